"""What `import torch_sigmoid` adds to `import torch`, in fresh processes that take turns with nothing else.

Writes imports.csv and .json. Takes about a minute.
"""

import os
import subprocess
import sys

import torch

from . import record

ROUNDS = 11
CODE = """
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import torch_sigmoid
end = time.perf_counter()
print(middle - start, end - middle, "triton" in sys.modules)
"""


def imported() -> tuple[float, float]:
    """Seconds for torch, and for torch_sigmoid after it; an error if that imported Triton."""
    command = [sys.executable, "-c", CODE]
    # Users' Python keeps the bytecode that it has compiled.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    of_torch, added, triton = subprocess.run(
        command, cwd=record.ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    if triton == "True":
        raise record.WrongResultError("import torch_sigmoid has imported Triton")
    return float(of_torch), float(added)


def measure(rounds: int = ROUNDS) -> list[dict]:
    imported()  # so that the files are in the page cache, and compiled
    samples = zip(*(imported() for _ in record.progress(range(rounds), "importing")))
    names = "torch", "torch_sigmoid, after torch"
    quantiles = [record.quantiles([1e3 * seconds for seconds in each]) for each in samples]
    return [
        {
            "import": name,
            "milliseconds": round(median, 1),
            "20 %": round(low, 1),
            "80 %": round(high, 1),
            "time / torch": round(median / quantiles[0][0], 4),
        }
        for name, (median, low, high) in zip(names, quantiles)
    ]


@record.reporting
def main(argv=None) -> int:
    arguments = record.parser("imports", __doc__, device=False).parse_args(argv)
    rows = measure()
    cpu = torch.device("cpu")
    record.write(record.folder_of(cpu, arguments.out), "imports", rows, record.environment(cpu))
    record.show("Import", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
