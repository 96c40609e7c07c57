"""Measure, train and draw.

python -m benchmarks                       measure all that this machine can, within half an hour: the parts marked *
python -m benchmarks PART ... [OPTION ...] run these parts; each of them gets the options
python -m benchmarks PART --help           what a part measures, what it writes and how long it takes
"""

import argparse
import ast
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

ON_THIS_MACHINE = ("accuracy", "code", "counts", "graphs", "host", "imports", "intercept", "watch", "pairs", "shards", "speed")
MEASUREMENTS = (*ON_THIS_MACHINE, "threshold", "tune", "gpu", "models", "mutants", "soak", "versions")
# Each part is a module with a `main`; the first line of its docstring says here what it is.
PARTS = {
    **{name: f"benchmarks.measure.{name}" for name in MEASUREMENTS},
    "train": "benchmarks.train",
    "vanishing": "benchmarks.training.vanishing",
    "boundary": "benchmarks.training.boundary",
    "distributed": "benchmarks.training.distributed",
    "figures": "benchmarks.figures",
}
# What runs if no part is named.
SUITE = (
    ("accuracy",),
    ("code",),
    ("counts",),
    ("graphs",),
    ("host",),
    ("imports",),
    ("intercept",),
    ("watch",),
    ("pairs",),
    ("shards",),
    ("speed", "--device", "cpu"),
    ("speed", "--device", "cpu", "--ways", "eager", "compiled", "exported"),
    ("speed", "--device", "cuda"),
)


def list_of_parts() -> str:
    in_suite = {name for name, *_ in SUITE}
    lines = ["parts:"]
    for name, module in PARTS.items():
        # Parsed, not imported: help must not wait for torch.
        source = Path(importlib.util.find_spec(module).origin).read_text()
        summary = ast.get_docstring(ast.parse(source)).splitlines()[0]
        lines.append(f"  {'*' if name in in_suite else ' '} {name:<11} {summary}")
    return "\n".join(lines)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    options = argv[len(names) :]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="python -m benchmarks [PART ...] [OPTION ...]",
        description=f"{__doc__}\n{list_of_parts()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    if not names and {"-h", "--help"} & {*options}:
        parser.print_help()
        return 0
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"a part is one of {', '.join(PARTS)}; got {', '.join(unknown)}")
    commands = [(name,) for name in names] or SUITE
    failed = []
    for name, *own in commands:
        if len(commands) > 1:
            print(f"\n== {' '.join([name, *own])}", flush=True)
        # In a process of its own, so that no part sees what another one compiled, patched or allocated.
        if subprocess.run([sys.executable, "-m", PARTS[name], *own, *options]).returncode:
            failed.append(name)
    if len(commands) > 1:
        print(f"\nFAILED: {', '.join(failed)}" if failed else "\nevery part is done")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
