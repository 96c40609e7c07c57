"""What the machine code of each operator does when it is executed, without a GPU: bytes moved and instructions issued.

bytes          in sectors of 32 bytes, as a GPU's memory moves them: those that a program touches, each once, since a program's
               first-level cache has what it reads again; those that each warp's access touches, counted access by access; and
               the ideal, each element of each tensor that a launch is given, once
instructions   of PTX, issued by warps, for each element; beside them the budget, below which an H200's memory takes longer than
               its arithmetic: 62 for an fp32 element read and written at 4.3 TB/s, and so 7.75 for each byte moved

tests/ptx executes the code that Triton compiles for sm_90, in the launches that forward, backward and double backward make.
"""

import sys

import torch

from . import record
from .operators import Operator, differentiable, operators

ROWS, COLUMNS = 17, 4096
# The images and texts of SigLIP, all pairs of which are elements.
PAIRS, WIDTH = 256, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = ("forward", "backward", "double backward")
SLOTS_PER_BYTE = 62 / 8


def machine():
    """The machine that executes PTX, put in place for this process."""
    sys.path.insert(0, str(record.ROOT / "tests"))
    from ptx import device

    from torch_sigmoid import ops

    ops.torch_below = 0
    return device.activate(90)


def stages(function, leaves):
    """Calls whose kernels are those of one order alone."""
    inputs = differentiable(leaves)
    output = function(*leaves)
    upstream = torch.ones_like(output).requires_grad_()
    grads = torch.autograd.grad(output, inputs, upstream, create_graph=True)
    v = [torch.ones_like(grad) for grad in grads]
    yield "forward", lambda: function(*leaves)
    yield "backward", lambda: torch.autograd.grad(output, inputs, upstream.detach(), retain_graph=True)
    yield "double backward", lambda: torch.autograd.grad(grads, (upstream, *inputs), v)


def execute(device, name: str, operator: Operator, label: str, dtype: torch.dtype) -> list[dict]:
    """A row for each order."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    of_pairs = operator.family == "siglip"
    operands = operator.operands(make, PAIRS, WIDTH) if of_pairs else operator.operands(make, *shape_of(operator))
    n = PAIRS**2 if of_pairs else ROWS * COLUMNS
    rows = []
    for order, call in stages(operator.providers[label].function, operator.leaves(operands)):
        device.reports = []
        call()
        reports, device.reports = device.reports, None
        if not reports:  # by torch's operators
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
    """As many elements for all, in rows of the length that the operator is measured with."""
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
