"""The supported versions: one list, which the package's metadata and the results follow; and tests are counted as they end."""

import ast
import re
import sys

import pytest

from benchmarks.measure import record, versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((record.ROOT / "pyproject.toml").read_text())["project"]


def environments() -> dict[str, list[str]]:
    """Python, torch and Triton of each environment of noxfile.py, by its name."""
    calls = (node for node in ast.walk(ast.parse((record.ROOT / "noxfile.py").read_text())) if isinstance(node, ast.Call))
    params = [call for call in calls if ast.unparse(call.func) == "nox.param"]
    return {call.keywords[0].value.value: [argument.value for argument in call.args] for call in params}


def test_the_first_environment_is_the_oldest_that_the_metadata_allows():
    python, torch, triton = next(iter(environments().values()))
    assert PROJECT["requires-python"] == f">={python}"
    least = dict(re.match(r"(\w+)>=([\d.]+)", requirement).groups() for requirement in PROJECT["dependencies"])
    assert least == {"torch": torch.removesuffix(".0"), "triton": triton.removesuffix(".0")}


def test_the_page_names_the_range_of_the_environments():
    def minor(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:2]]

    pythons, torches, tritons = (sorted(map(minor, versions)) for versions in zip(*environments().values()))
    ranges = ["{}.{} to {}.{}".format(*each[0], *each[-1]) for each in (torches, tritons, pythons)]
    assert "For torch {}, Triton {} and Python {} (".format(*ranges) in (record.ROOT / "README.md").read_text()


def test_every_result_is_that_of_an_environment():
    measured = (record.read(record.RESULTS, "versions") or {"rows": []})["rows"]
    of_rows = {(row["python"].rpartition(".")[0], row["torch"].partition("+")[0], row["triton"]) for row in measured}
    assert of_rows <= set(map(tuple, environments().values()))


TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert False
def test_is_skipped(): pytest.skip("so")
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_does_not_start(broken): pass
"""


@pytest.fixture
def project(monkeypatch, tmp_path):
    """A folder with some tests in the place of this project's."""
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--kernels')")
    (tmp_path / "test_some.py").write_text(TESTS)
    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    monkeypatch.setattr(versions, "WORK", tmp_path / "runs")
    return tmp_path


def test_tests_are_counted_and_a_row_replaces_its_own(project, tmp_path):
    command = ["--ways", "plain", "--jobs", "0", "--out", str(tmp_path)]
    assert versions.main(command) == 1
    (row,) = record.read(tmp_path, "versions")["rows"]
    assert [row[key] for key in ("way", "passed", "failed", "skipped")] == ["plain", 1, 2, 2]
    older = row | {"torch": "2.9.1+cpu"}
    ptx = row | {"way": "ptx"}
    record.write(tmp_path, "versions", [row, older, ptx], {})
    (project / "test_some.py").write_text("def test_passes(): pass")
    assert versions.main(command) == 0
    rows = record.read(tmp_path, "versions")["rows"]
    assert [(each["torch"], each["way"], each["failed"]) for each in rows] == [
        ("2.9.1+cpu", "plain", 2),
        (row["torch"], "plain", 0),
        (row["torch"], "ptx", 2),
    ]


def test_a_run_that_did_not_end_gives_no_row(project, tmp_path, capsys):
    (project / "test_some.py").write_text("import os\ndef test_ends_the_process(): os._exit(0)")
    assert versions.main(["--ways", "plain", "--jobs", "0", "--out", str(tmp_path)]) == 1
    assert "has not run all tests" in capsys.readouterr().out
    assert record.read(tmp_path, "versions") is None
