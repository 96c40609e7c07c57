"""What each operator's machine code does when it is executed: bytes moved and instructions issued.

tests/ptx executes the code that Triton compiles for sm_90, in the launches that forward, backward and double backward make.

bytes          in sectors of 32 bytes, the unit in which a GPU's memory moves them. "bytes per element" counts each sector once
               per program, because the first-level cache holds what a program reads again; "by access" counts it once for every
               access of a warp; "ideal bytes" is each element of each tensor once
instructions   of PTX, issued by warps, per element. "budget" is how many an H200 can issue while its memory moves the ideal
               bytes: 62 for an fp32 element read and written at 4.3 TB/s, that is 7.75 for each byte
"""

import sys

import torch

import torch_sigmoid

from . import record
from .operators import Operator, operators, orders

ROWS, COLUMNS = 17, 4096
# SigLIP's images and texts; its elements are all pairs.
PAIRS, WIDTH = 256, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLOTS_PER_BYTE = 62 / 8


def machine():
    """Put the machine that executes PTX in place, for the rest of this process."""
    sys.path.insert(0, str(record.ROOT / "tests"))
    from ptx import device

    torch_sigmoid.torch_below(0)
    return device.activate(90)


def execute(device, name: str, operator: Operator, label: str, dtype: torch.dtype) -> list[dict]:
    """A row for each order."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    of_pairs = operator.family == "siglip"
    operands = operator.operands(make, PAIRS, WIDTH) if of_pairs else operator.operands(make, *shape_of(operator))
    n = PAIRS**2 if of_pairs else ROWS * COLUMNS
    rows = []
    for order, call in orders(operator.providers[label].function, operator.leaves(operands)):
        device.reports = []
        call()
        reports, device.reports = device.reports, None
        # Torch's operators ran in place of kernels.
        if not reports:
            continue
        kinds = zip(*((report.fetched, report.sectors, report.ideal) for report in reports))
        fetched, accessed, ideal = (sum(sum(each.values()) for each in kind) / n for kind in kinds)
        rows.append(
            {
                "operator": name + (label.removeprefix("ours")),
                "order": order,
                "dtype": record.short(dtype),
                "launches": len(reports),
                "bytes per element": round(fetched, 3),
                "by access": round(accessed, 3),
                "ideal bytes": round(ideal, 3),
                "instructions per element": round(32 * sum(report.instructions for report in reports) / n, 1),
                "budget": round(SLOTS_PER_BYTE * ideal, 1),
            }
        )
    return rows


def shape_of(operator: Operator) -> tuple[int, int]:
    """ROWS · COLUMNS elements, in rows of the length that the operator is timed with."""
    columns = operator.columns if operator.columns > 1 else COLUMNS
    return (ROWS * COLUMNS // columns, columns) if operator.family != "sigmoid" else (ROWS * COLUMNS, 1)


def measure() -> list[dict]:
    device = machine()
    work = [
        (name, operator, label, dtype)
        for name, operator in operators().items()
        for label in operator.providers
        if label.startswith("ours")
        for dtype in DTYPES
    ]
    return [row for step in record.progress(work, "executing") for row in execute(device, *step)]
