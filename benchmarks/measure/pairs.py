"""Peak memory and time of SigLIP's loss over the number of pairs: the plain formula and ours.

The plain formula holds the matrix of all pairs several times; ours holds a block of its rows, of the default size. On a CPU
each measurement has a process of its own, and the peak is how far its resident memory rises above what the features take.
On a GPU it is the allocator's. Before it is measured, ours must give the plain formula's loss and gradients, to 1e-5 of the
largest.

Writes pairs.csv and .json. Takes about a minute.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

import torch_sigmoid
from torch_sigmoid.operators import siglip_loss

from . import record

WIDTH = 256
PAIRS = {"cpu": (512, 1024, 2048, 4096), "cuda": (1024, 4096, 16384, 32768)}
TOLERANCE = 1e-5
REPEATS = 15
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PROVIDERS = {"torch": siglip_loss, "ours": torch_sigmoid.siglip_loss}


def operands_of(pairs: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Normalised features, and the scale and bias with which the paper begins training."""
    torch.manual_seed(0)
    features = (torch.nn.functional.normalize(torch.randn(pairs, WIDTH), dim=1).to(device) for _ in range(2))
    numbers = (torch.tensor(value, device=device) for value in (10.0, -10.0))
    return tuple(each.requires_grad_() for each in (*features, *numbers))


def run(function, operands) -> tuple[torch.Tensor, ...]:
    loss = function(*operands)
    return loss.detach(), *torch.autograd.grad(loss, operands)


def resident_mebibytes(field: str) -> float:
    """VmRSS is what is resident now, VmHWM the highest since it was cleared."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text()).group(1)) / 1024


def check(pairs: int, device: torch.device) -> None:
    operands = operands_of(pairs, device)
    theirs, ours = (run(PROVIDERS[name], operands) for name in ("torch", "ours"))
    for index, (actual, expected) in enumerate(zip(ours, theirs)):
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE:
            raise record.WrongResultError(f"siglip_loss of {pairs} pairs: result {index} is off by {error:.2g} of the largest")


def measure(provider: str, pairs: int, device: torch.device) -> dict:
    """A row; on a CPU the process must have done nothing else before."""
    operands = operands_of(pairs, device)
    # A first call loads libraries and allocates for good, which is not the loss's memory.
    run(PROVIDERS[provider], operands_of(64, device))
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(PROVIDERS[provider], operands)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        before = resident_mebibytes("VmRSS")
        CLEAR.write_text("5")  # the peak starts anew
        run(PROVIDERS[provider], operands)
        peak = resident_mebibytes("VmHWM") - before
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(PROVIDERS[provider], operands)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median, _, _ = record.quantiles(seconds)
    return {"pairs": pairs, "provider": provider, "peak MiB": round(peak, 1), "milliseconds": round(1e3 * median, 2)}


@record.reporting
def main(argv=None) -> int:
    parser = record.parser("pairs", __doc__)
    parser.add_argument("--pairs", type=int, nargs="+", help="numbers of pairs (default: 512 to 4096, 1024 to 32768 on a GPU)")
    parser.add_argument("--only", choices=PROVIDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = arguments.device
    if arguments.only:
        print(json.dumps(measure(arguments.only, *arguments.pairs, device)))
        return 0
    if device.type == "cpu" and not CLEAR.exists():
        print("pairs: skipped, a process's peak memory is known on Linux only")
        return 0
    rows = []
    for pairs in record.progress(arguments.pairs or PAIRS[device.type], f"SigLIP on {device}"):
        check(pairs, device)
        for provider in PROVIDERS:
            if device.type == "cuda":
                rows.append(measure(provider, pairs, device))
            else:
                command = [sys.executable, "-m", "benchmarks.measure.pairs", "--device", "cpu", "--only", provider]
                output = subprocess.check_output([*command, "--pairs", str(pairs)], cwd=record.ROOT, text=True)
                rows.append(json.loads(output))
    about = record.environment(device)
    record.write(record.folder_of(device, arguments.out), "pairs", rows, about, width=WIDTH)
    record.show(f"SigLIP on {record.device_name(device)}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
