"""The command line check, life without Triton, and the installed package."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

import torch_sigmoid
from torch_sigmoid.operators import OPERATORS

ROOT = Path(__file__).parent.parent


def run(*arguments, cwd=ROOT, **options):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def test_the_doctor_agrees():
    result = run("-m", "torch_sigmoid")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"torch         {torch.__version__}" in result.stdout
    assert torch_sigmoid.path(torch.empty(1)).reason in result.stdout
    assert result.stdout.count("agrees with float64") == 4 * (1 + torch.cuda.device_count())


def test_the_doctor_reports_a_disagreement(monkeypatch, capsys):
    from torch_sigmoid import __main__ as doctor

    cases = OPERATORS["sigmoid"].cases
    monkeypatch.setitem(cases, "", dataclasses.replace(cases[""], function=lambda x: torch.sigmoid(x * 1.001)))
    assert doctor.main() == 1
    assert "DISAGREES" in capsys.readouterr().out


WITHOUT_TRITON = "import sys, runpy; sys.modules['triton'] = None; "


def test_the_doctor_works_without_triton():
    code = WITHOUT_TRITON + "runpy.run_module('torch_sigmoid', run_name='__main__')"
    result = run("-c", code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "triton        not installed" in result.stdout
    assert "Triton cannot be used" in result.stdout


def test_a_layer_trains_without_triton():
    code = WITHOUT_TRITON + (
        "import torch, torch_sigmoid as ts; x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True); "
        "ts.Sigmoid(save='input')(x).backward(); print(ts.path(x).name, x.grad.item() > 0)"
    )
    assert run("-c", code).stdout.split() == ["torch", "True"]


def test_a_triton_that_is_too_old_is_named():
    code = (
        "import sys, types; sys.modules['triton'] = types.SimpleNamespace(__version__='3.5.1'); "
        "import torch, torch_sigmoid as ts; print(ts.kernels.UNAVAILABLE)"
    )
    assert "3.5.1 is older than 3.6" in run("-c", code).stdout


def test_a_triton_newer_than_tested_is_named_and_launches_by_its_public_entry():
    pytest.importorskip("triton")
    code = (
        "import sys, triton; triton.__version__ = sys.argv[1]; from torch_sigmoid import kernels; "
        "from torch_sigmoid.kernels import kept; print(kernels.UNAVAILABLE, kept.KEEPS_COMPILATIONS, kernels.untested())"
    )
    for version in ("3.10.0", "3.99.1+git", "4.0.0"):
        expected = f"None False Triton {version} is not tested with this version, only 3.6 to 3.9: each launch goes through"
        assert run("-c", code, version).stdout.startswith(expected)
    assert run("-c", code, "3.9.7").stdout.split() == ["None", "True", "None"]


def test_public_names():
    assert set(torch_sigmoid.__all__) <= set(dir(torch_sigmoid))
    for name in torch_sigmoid.__all__:
        assert getattr(torch_sigmoid, name).__doc__
    assert torch_sigmoid.functional.sigmoid is torch_sigmoid.sigmoid
    assert torch_sigmoid.nn.Sigmoid is torch_sigmoid.Sigmoid


@pytest.mark.parametrize("name", OPERATORS)
def test_function_and_layer_of_every_row_are_exported(name):
    layer = OPERATORS[name].module.__name__
    assert {name, layer} <= {*torch_sigmoid.__all__}
    assert name in torch_sigmoid.functional.__all__
    assert layer in torch_sigmoid.nn.__all__


def test_a_star_import_leaves_torchs_modules_alone():
    names = {}
    exec("from torch import nn; from torch.nn import functional; from torch_sigmoid import *", names)
    assert names["nn"] is torch.nn
    assert names["functional"] is torch.nn.functional
    assert names["sigmoid"] is torch_sigmoid.sigmoid
    assert not any(isinstance(getattr(torch_sigmoid, name), types.ModuleType) for name in torch_sigmoid.__all__)


@pytest.mark.parametrize("name", ["torch_sigmoid", "tests", "benchmarks"])
def test_the_package_holds_its_kernels_and_nothing_else_of_the_checkout(name):
    assert importlib.util.find_spec("torch_sigmoid.kernels.gates") is not None
    assert importlib.util.find_spec(f"torch_sigmoid.{name}") is None


def test_kernels_import_nothing_from_above():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "torch_sigmoid" not in path.read_text()


def test_a_wheel_holds_the_kernels_and_works_outside_the_checkout(tmp_path):
    # The first with PEP 639's license expressions.
    pytest.importorskip("setuptools", "77")
    # Hugging Face's `kernels` takes part in every build that sees it, and fails where the checkout's kernels/ hides it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path)
    built = run(*command, env=environment)
    if "No module named pip" in built.stderr:
        pytest.skip("no pip")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert torch_sigmoid.__version__ in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"torch_sigmoid/kernels/sigmoid.py", "torch_sigmoid/py.typed"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "torch_sigmoid").rglob("*.py")} <= names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    assert not any(name.endswith(".pyi") for name in names)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import torch, torch_sigmoid; "
        "import torch_sigmoid.kernels as kernels; print(kernels.__file__, torch_sigmoid.Sigmoid()(torch.zeros(1)).item())"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.stdout.split() == [str(tmp_path / "site/torch_sigmoid/kernels/__init__.py"), "0.5"], result.stderr
