"""What type checkers tell users of this package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "typing_cases"


def errors(file):
    """The errors that `mypy --strict` finds, as (line, code)."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", CASES / file]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not result.stderr
    found = re.findall(r"^.*?:(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.MULTILINE)
    assert len(found) == result.stdout.count(" error: "), result.stdout
    assert bool(found) == bool(result.returncode), result.stdout
    return [(int(line), code) for line, code in found], result.stdout


def test_what_users_write_has_the_types_it_should():
    found, said = errors("accepted.py")
    assert not found, said


def test_what_is_wrong_is_refused_where_it_stands():
    lines = (CASES / "refused.py").read_text().splitlines()
    expected = [(number, line.split("  # ")[1]) for number, line in enumerate(lines, 1) if "  # " in line]
    assert len(expected) > 20
    found, said = errors("refused.py")
    assert found == expected, said
