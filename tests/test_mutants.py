"""The mutants' tests: each source file has some, and they exist."""

import pytest

from benchmarks import mutants


def test_every_source_file_names_tests_that_concern_it():
    assert mutants.CONCERNED.keys() == set(mutants.sources())
    assert set(mutants.test_names()) >= mutants.NO_KILLERS


@pytest.mark.parametrize("file", mutants.CONCERNED)
def test_a_survivor_has_faced_every_test_that_could_kill_it(file):
    faced = list(mutants.stages(file))
    for way, tests in faced:
        assert way in ("device", "ptx", "interpreter")
        assert tests
        assert all((mutants.record.ROOT / test).is_file() for test in tests)
    device = [test for way, tests in faced if way == "device" for test in tests]
    assert sorted(device) == [f"tests/test_{name}.py" for name in mutants.test_names() if name not in mutants.NO_KILLERS]


def test_a_mutant_is_said_in_one_line():
    assert mutants.change_of("a\n    if x:\n    b\n", "a\n    if not x:\n    b\n") == "if x: → if not x:"
    assert mutants.change_of("@cache\ndef f(): ...\n", "def f(): ...\n") == "@cache → (nothing)"


def test_what_python_warns_of_is_no_mutant():
    assert mutants.compiles("x < 700")
    assert not mutants.compiles("x is 700")
    assert not mutants.compiles("f(+, x)")
