"""Everything that a GPU can tell, in sections that each take at most eight minutes.

tests       the tests that take CUDA tensors
layouts     those of them that compile most: layouts, strides, tracing
exhaustive  gradients, and value and gradient of every fp16, bf16 and fp32 input (N1 of kernels/README.md)
speed       sigmoid's time over size, dtype and layout
gates       the gates' time, over fewer sizes
losses      the losses' time
pairs       peak memory and time of SigLIP over the number of pairs
host        what a call and a layer cost on the host, eager and as a CUDA graph
counts      bytes saved for backward and at the peak, and kernels launched
watch       what a GradientWatch costs a training step
threshold   from which size on the kernels cost no more than torch's operator
tune        launch shapes

Needs torch, Triton, numpy and pytest, and no install. Writes to --out: each section's output to <section>.log, its numbers to a
folder with the GPU's name, and summary.md. Exits with 1 if a section failed or ran out of time. Takes about an hour.
"""

import collections
import importlib.util
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from . import record, speed

SECTION_SECONDS = 480
TIMES = ("operator", "provider", "mode", "dtype", "layout", "n", "microseconds", "time / torch", "of a copy")
# What summary.md shows of each file of results.
SHOWN = {
    "tests": ("file", "passed", "failed", "skipped"),
    "exhaustive": ("operator", "dtype", "inputs", "bits not torch's", "ulp of torch", "ulp of ours", "ulp of the gradient"),
    **dict.fromkeys(speed.FILES.values(), TIMES),
    "pairs": ("provider", "pairs", "peak MiB", "milliseconds"),
    "host": ("provider", "what", "dtype", "microseconds", "time / torch"),
    "memory": ("operator", "provider", "dtype", "saved", "peak forward", "peak both"),
    "watch": ("watch", "microseconds a step", "overhead %"),
    "threshold": ("mode", "n", "kernels", "torch", "kernels / torch"),
}
# Of the tests: each holds a CUDA context of half a GiB or more, and up to 14 GiB for a test of two billion elements.
MOST_WORKERS = 12
# These tests compile most: hundreds of layouts, and whole graphs.
COMPILING_TESTS = ("tests/test_layouts.py", "tests/test_strides.py", "tests/test_tracing.py")


def pytest_command(report: Path, *arguments):
    # pytest-benchmark warns of workers, which here is an error. Tests that take a device are named after it.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-k", "cuda or test_gpu", f"--junit-xml={report}"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "worksteal"]
    return ["-m", "pytest", *options, *arguments]


def commands(out: Path) -> dict[str, list[str]]:
    out_option = ["--out", str(out)]
    timed = ["-m", "benchmarks.measure.speed", "--seconds", str(SECTION_SECONDS - 60)]
    return {
        "tests": pytest_command(out / "tests.xml", "tests", *(f"--ignore={path}" for path in COMPILING_TESTS)),
        "layouts": pytest_command(out / "layouts.xml", *COMPILING_TESTS),
        "exhaustive": ["-m", "benchmarks.measure.accuracy", *out_option],
        "speed": [*timed, "--operators", "sigmoid", *out_option],
        "gates": [*timed, "--operators", "gates", *out_option],
        "losses": [*timed, "--operators", "losses", "siglip", *out_option],
        "pairs": ["-m", "benchmarks.measure.pairs", *out_option],
        "host": ["-m", "benchmarks.measure.host", *out_option],
        "counts": ["-m", "benchmarks.measure.counts", *out_option],
        "watch": ["-m", "benchmarks.measure.watch", *out_option],
        "threshold": ["-m", "benchmarks.measure.threshold", *out_option],
        "tune": ["-m", "benchmarks.measure.tune", *out_option],
    }


def run_section(name: str, command: list[str], out: Path) -> str:
    """Run a section with its output in a file; "passed" and the time, or what went wrong."""
    start = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        try:
            completed = subprocess.run(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=record.ROOT,
                timeout=SECTION_SECONDS,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        except subprocess.TimeoutExpired:
            return f"FAILED: not done after {SECTION_SECONDS} s"
    outcome = "passed" if completed.returncode == 0 else f"FAILED: exit status {completed.returncode}"
    return f"{outcome} in {time.monotonic() - start:.0f} s"


def tests_of(reports: list[Path]) -> list[dict]:
    """A row for each file of tests, from pytest's JUnit reports."""
    counts = collections.defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = "passed"
            if case.find("failure") is not None or case.find("error") is not None:
                outcome = "failed"
            elif case.find("skipped") is not None:
                outcome = "skipped"
            # A file that is skipped whole is a case without a class.
            name = case.get("classname") or case.get("name")
            counts["tests/" + name.removeprefix("tests.").partition(".")[0] + ".py"][outcome] += 1
    return [{"file": file} | counts[file] for file in sorted(counts)]


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def summary(out: Path, outcomes: dict[str, str]) -> str:
    device = torch.device("cuda")
    about = record.environment(device)
    lines = [
        f"# {about['device']}",
        ", ".join(f"{key} {about[key]}" for key in ("driver", "torch", "triton", "date", "commit")),
        "",
        *(f"- {name}: {outcome}" for name, outcome in outcomes.items()),
    ]
    if "tests" in outcomes:
        lines.append(f"- pytest: {last_line(out / 'tests.log')}")
    folder = record.folder_of(device, out)
    for name, columns in SHOWN.items():
        if results := record.read(folder, name):
            rows = [[record.format_cell(row.get(column)) for column in columns] for row in results["rows"]]
            lines += ["", f"## {name}", "", record.markdown(columns, rows)]
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    parser = record.parser("gpu", __doc__, device=False, out=Path("runs/gpu"))
    parser.add_argument("--sections", nargs="+", choices=commands(Path()), metavar="SECTION", help="default: all")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    available = commands(out)
    if not torch.cuda.is_available():
        print("gpu: skipped, there is no GPU")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for name in arguments.sections or available:
        print(f"{name} ...", flush=True)
        outcomes[name] = run_section(name, available[name], out)
        print(f"{name}: {outcomes[name]}", flush=True)
    if reports := [path for name in outcomes if (path := out / f"{name}.xml").exists()]:
        device = torch.device("cuda")
        record.write(record.folder_of(device, out), "tests", tests_of(reports), record.environment(device))
    text = summary(out, outcomes)
    (out / "summary.md").write_text(text)
    print(text)
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
