"""Everything a GPU can tell, in sections that each fit into 8 minutes; needs torch, Triton, numpy and pytest, and no install.

    python3 -m benchmarks gpu --out DIR [section ...]

    tests       the test suite, on CUDA too
    layouts     those of its tests that compile most: layouts, strides, tracing
    exhaustive  forward and gradient of every fp16, bf16 and fp32 input (N1)
    speed       time over size, dtype and layout
    gates       the same of the gates, over fewer sizes
    losses      the same of the losses
    pairs       peak memory and time of SigLIP over the number of pairs
    host        cost of a call and of a layer, eager and under CUDA graphs
    memory      saved and peak bytes
    watch       what a GradientWatch costs a training step
    tune        launch shapes

A section's output goes to DIR/<section>.log, its numbers to DIR/<the GPU's name>/. The summary comes last and is written to
DIR/summary.md; the exit status is 1 if a section failed or ran out of time.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import record, speed

SECTION_SECONDS = 480


# Of the tests, those that compile most: hundreds of layouts, and whole graphs.
COMPILING_TESTS = ("tests/test_layouts.py", "tests/test_strides.py", "tests/test_tracing.py")


def pytest_command(*arguments):
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *arguments]


def commands(out: Path) -> dict[str, list[str]]:
    out_option = ["--out", str(out)]
    timed = ["-m", "benchmarks.measure.speed", "--seconds", str(SECTION_SECONDS - 60)]
    return {
        "tests": pytest_command("tests", *(f"--ignore={path}" for path in COMPILING_TESTS)),
        "layouts": pytest_command(*COMPILING_TESTS),
        "exhaustive": ["-m", "benchmarks.measure.accuracy", *out_option],
        "speed": [*timed, "--operators", "sigmoid", *out_option],
        "gates": [*timed, "--operators", "gates", *out_option],
        "losses": [*timed, "--operators", "losses", "siglip", *out_option],
        "pairs": ["-m", "benchmarks.measure.pairs", *out_option],
        "host": ["-m", "benchmarks.measure.host", *out_option],
        "memory": ["-m", "benchmarks.measure.memory", *out_option],
        "watch": ["-m", "benchmarks.measure.watch", *out_option],
        "tune": ["-m", "benchmarks.measure.tune", *out_option],
    }


def run_section(name: str, command: list[str], out: Path) -> str:
    """Run it with its output in a file; the outcome in words, "passed" or what went wrong."""
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
    if results := record.read(folder, "exhaustive"):
        lines.append("")
        for row in results["rows"]:
            differ = row["bits not torch's"]
            lines.append(
                f"- every {row['dtype']} input: {differ} of {row['inputs']} differ from torch's forward; "
                f"largest errors {row['ulp of ours']} ulp forward (torch {row['ulp of torch']}), "
                f"{row['ulp of the gradient']} ulp gradient from the input"
            )
    for name in speed.FILES.values():
        if results := record.read(folder, name):
            lines += ["", "time / torch, and GB/s as a fraction of a copy's:"]
            lines += [
                f"- {row['operator']}, {row['provider']}, {row['mode']}, {row['dtype']}, {row['layout']}, {row['n']}: "
                f"{row['time / torch']:.2f}" + (f", {row['of a copy']:.2f} of a copy" if "of a copy" in row else "")
                for row in results["rows"]
                if row["provider"] != "torch"
            ]
    if results := record.read(folder, "host"):
        lines += ["", "host, 1024 elements, µs (÷ torch):"]
        for row in results["rows"]:
            lines.append(
                f"- {row['what']}, {row['dtype']}, {row['provider']}: {row['microseconds']:.1f} ({row['time / torch']:.2f})"
            )
    if results := record.read(folder, "watch"):
        lines += ["", "a training step with a GradientWatch:"]
        for row in results["rows"]:
            lines.append(f"- {row['watch']}: {row['microseconds a step']:.0f} µs ({row['overhead %']:+.1f} %)")
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help="all by default")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    available = commands(out)
    if unknown := set(arguments.sections) - set(available):
        parser.error(f"sections must be among {', '.join(available)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("gpu: skipped, there is no GPU")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for name in arguments.sections or available:
        print(f"{name} ...", flush=True)
        outcomes[name] = run_section(name, available[name], out)
        print(f"{name}: {outcomes[name]}", flush=True)
    text = summary(out, outcomes)
    (out / "summary.md").write_text(text)
    print(text)
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
