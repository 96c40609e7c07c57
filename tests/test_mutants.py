"""The mutants' tests: each source file has some, and they exist."""

from benchmarks.measure import mutants


def test_every_source_file_names_tests_that_concern_it():
    assert mutants.CONCERNED.keys() == set(mutants.sources())
    for stage in (stage for stages in mutants.CONCERNED.values() for stage in stages):
        way, *names = stage.split()
        assert way in ("device", "ptx", "interpreter")
        assert names
        assert all((mutants.record.ROOT / "tests" / f"test_{name}.py").is_file() for name in names)


def test_a_mutant_is_said_in_one_line():
    assert mutants.change_of("a\n    if x:\n    b\n", "a\n    if not x:\n    b\n") == "if x: → if not x:"
    assert mutants.change_of("@cache\ndef f(): ...\n", "def f(): ...\n") == "@cache → (nothing)"


def test_what_python_warns_of_is_no_mutant():
    assert mutants.compiles("x < 700")
    assert not mutants.compiles("x is 700")
    assert not mutants.compiles("f(+, x)")
