"""Test this torch, Triton and Python: how many tests pass, fail and are skipped in each way to run kernels.

`make versions` runs this in an environment for each supported version; noxfile.py lists them.
Writes benchmarks/results/versions.csv and .json at once, with one row for each environment and way; a new run replaces its own.
pytest's output and its JUnit report go to runs/versions/. Takes about 20 minutes for each environment on two cores: half as the
tests are, and the rest with kernels in Triton's interpreter and with the machine code of a GPU, executed.
"""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from . import record

# The columns' names for the ways of tests/conftest.py.
WAYS = {"plain": "device", "interpreter": "interpreter", "ptx": "ptx"}
CHECKOUT = record.ROOT
WORK = CHECKOUT / "runs" / "versions"


def counts(report: Path) -> dict[str, int]:
    """The columns of a row from pytest's JUnit report; an error outside of a test is a failure."""
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    total = {key: sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"]
    seconds = sum(float(suite.get("time")) for suite in suites)
    return {
        "passed": total["tests"] - failed - total["skipped"],
        "failed": failed,
        "skipped": total["skipped"],
        "seconds": round(seconds),
    }


def run(report: Path, way: str, jobs: str) -> dict[str, int]:
    """Run the tests in one way, and count."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    options = "-n", jobs, "--dist", "worksteal", f"--kernels={WAYS[way]}", f"--junit-xml={report}"
    with open(report.with_suffix(".log"), "w") as log:
        command = [sys.executable, "-m", "pytest", *options]
        status = subprocess.run(command, cwd=CHECKOUT, stdout=log, stderr=log).returncode
    if not report.exists() or status not in (0, 1):
        raise record.WrongResultError(f"pytest ended with status {status} and has not run all tests: {log.name}")
    return counts(report)


def place(row: dict) -> tuple:
    """What tells a row from others, in the order of the table."""
    release = row["torch"].partition("+")[0]
    return [int(part) for part in release.split(".")], row["triton"], row["python"], list(WAYS).index(row["way"])


@record.reporting
def main(argv=None) -> int:
    parser = record.parser("versions", __doc__, device=False)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all of them")
    parser.add_argument("--jobs", default="auto", help="tests at once, a core each (default: as many as there are cores)")
    arguments = parser.parse_args(argv)
    about = record.environment(torch.device("cpu"))
    failed = []
    for way in arguments.ways:
        row = {key: about[key] for key in ("torch", "triton", "python")} | {"way": way}
        row |= run(WORK / f"{'-'.join(row.values())}.xml", way, arguments.jobs) | {"date": about["date"]}
        # Read anew for each way: rows of other environments may have been written meanwhile.
        known = (record.read(arguments.out, "versions") or {"rows": []})["rows"]
        rows = sorted([row, *(other for other in known if place(other) != place(row))], key=place)
        record.write(arguments.out, "versions", rows, {key: about[key] for key in ("device", "date", "commit")})
        record.show("Tests", [row])
        failed += [way] * bool(row["failed"])
    if failed:
        print(f"FAILED: {', '.join(failed)}; see {WORK}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
