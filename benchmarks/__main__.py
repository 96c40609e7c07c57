"""`python -m benchmarks` (`make bench`): every part of the suite that this machine can run; then `make figures` shows it.

Exits with 1 if a result was wrong. A part that needs what is not here says so and counts as done.
"""

import subprocess
import sys

import torch

from . import record

OTHERS = ("gates", "losses", "siglip")
# Each in a process of its own: what one leaves compiled, patched or allocated is nothing to the next.
PARTS = {
    "accuracy": ["benchmarks.accuracy"],
    "code": ["benchmarks.code"],
    "counts": ["benchmarks.counts"],
    "host": ["benchmarks.host"],
    "memory": ["benchmarks.memory"],
    "watch": ["benchmarks.watch"],
    "speed on the CPU": ["benchmarks.speed", "--device", "cpu"],
    "speed on the GPU": ["benchmarks.speed", "--device", "cuda"],
    "the gates' and losses' speed on the CPU": ["benchmarks.speed", "--device", "cpu", "--operators", *OTHERS],
    "the gates' and losses' speed on the GPU": ["benchmarks.speed", "--device", "cuda", "--operators", *OTHERS],
    "pairs": ["benchmarks.siglip"],
}


def main() -> int:
    failed = []
    if not torch.cuda.is_available():
        print("There is no GPU: its speed and peak memory, and the forward of all 2³² fp32 inputs, will not be measured.")
    for name, command in PARTS.items():
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", *command], cwd=record.ROOT).returncode:
            failed.append(name)
    print(f"\n{'FAILED: ' + ', '.join(failed) if failed else 'every part is done'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
