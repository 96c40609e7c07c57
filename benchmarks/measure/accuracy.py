"""How far gradients and values are from the truth: torch's, and ours with each `save`.

The truth is σ' = e/(1+e)², e = e^-|x|, computed in float64, where nothing in it cancels. The gradients are compared with it at
every finite 16-bit input, and on a grid of fp32 inputs, wherever the true derivative is a normal number of the dtype. On a GPU
every fp16, bf16 and fp32 input is visited, 2³² of them, by sigmoid, silu and logsigmoid: a σ whose bits are not torch's is a
failure (N1 of kernels/README.md), and the worst errors in ulp are recorded, those of silu's derivative in ulp of its terms. So
are those of CUDA's exp, exp2 and log.

Writes accuracy.csv and .json, and on a GPU exhaustive.csv and .json. Takes a few seconds, and a few minutes on a GPU.
"""

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import torch_sigmoid

from . import record

PROVIDERS = {
    "torch.sigmoid": torch.sigmoid,
    'ours, save="output"': torch_sigmoid.sigmoid,
    'ours, save="input"': functools.partial(torch_sigmoid.sigmoid, save="input"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BIN_WIDTH = 0.25  # of x, in the figure
REACH = {torch.bfloat16: 12, torch.float16: 12, torch.float32: 25}
AT = {torch.bfloat16: (4.0, 5.0, 6.0, 8.0), torch.float16: (4.0, 6.0, 8.0, 9.0), torch.float32: (8.0, 12.0, 15.0, 20.0)}
CHUNK = 1 << 26
# Further out e^-|x| is subnormal in fp32, and N3 promises nothing.
FP32_REACH = 87.0
# Below it a product with the residual of a quotient is subnormal, in an operator that multiplies by more than σ.
GATES, FP32_GATES_LEAST = ("silu", "logsigmoid"), 2.0**-119


def inputs(dtype):
    """Every finite value of a 16-bit dtype; in fp32 a grid where the derivative is normal, and the points of AT."""
    if dtype.itemsize == 2:
        patterns = patterns_16_bit(dtype, "cpu")
        return patterns[patterns.isfinite()]
    return torch.cat([torch.linspace(-87, 87, 100_001, dtype=torch.float64), torch.tensor(AT[dtype])]).to(dtype)


def true_derivative(x):
    e = torch.exp(-x.double().abs())
    return e / (1 + e) ** 2


def gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def worst_by_bin(x, error, reach):
    """The largest error in each bin of 0 ≤ x ≤ reach."""
    keep = (x >= 0) & (x <= reach)
    bins = np.floor(x[keep] / BIN_WIDTH).astype(int)
    worst = np.zeros(bins.max() + 1)
    np.maximum.at(worst, bins, error[keep])
    return [float(f"{value:.4g}") for value in worst]


def measure(device):
    """A row for each dtype and provider, and the curves of the figure."""
    rows, curves = [], []
    for dtype, (provider, function) in record.progress(
        [(dtype, item) for dtype in DTYPES for item in PROVIDERS.items()], "gradients"
    ):
        x = inputs(dtype)
        exact = true_derivative(x).numpy()
        normal = exact >= torch.finfo(dtype).smallest_normal
        positions = x.double().numpy()[normal]
        actual = gradient(function, x.to(device)).double().cpu().numpy()[normal]
        exact = exact[normal]
        error = np.abs(actual - exact) / exact
        row = {
            "dtype": record.short(dtype),
            "provider": provider,
            "inputs": len(exact),
            "flushed to 0": int((actual == 0).sum()),
            "over 1 %": int((error > 0.01).sum()),
            "largest relative error": float(f"{error.max():.4g}"),
        }
        for at in AT[dtype]:
            row[f"error at {at:g}"] = float(f"{error[np.flatnonzero(positions == at)[0]]:.4g}")
        rows.append(row)
        curves.append({"dtype": row["dtype"], "provider": provider, "worst": worst_by_bin(positions, error, REACH[dtype])})
    return rows, curves


def samples(device):
    """What the figure beside the formula shows: σ, σ', and what remains of σ' in bf16, on a grid."""
    x = torch.linspace(-10, 10, 401, device=device)
    rounded = x.bfloat16()
    by = {name: gradient(PROVIDERS[name], rounded) for name in ("torch.sigmoid", 'ours, save="input"')}
    columns = {
        "x": x,
        "sigma": torch_sigmoid.sigmoid(x),
        "derivative": gradient(PROVIDERS['ours, save="input"'], x),
        "bf16 x": rounded,
        "bf16 derivative by torch.sigmoid": by["torch.sigmoid"],
        'bf16 derivative by ours, save="input"': by['ours, save="input"'],
    }
    return {name: [float(f"{value:.5g}") for value in column.tolist()] for name, column in columns.items()}


def fp32_patterns(device):
    for start in range(-(2**31), 2**31, CHUNK):
        yield torch.arange(start, start + CHUNK, device=device).to(torch.int32).view(torch.float32)


def patterns_16_bit(dtype, device):
    return torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(dtype)


def ulps(actual, exact, scale):
    """Errors in ulps of `scale`, in the dtype of `actual`; a NaN is infinitely wrong."""
    info = torch.finfo(actual.dtype)
    exponent = torch.floor(torch.log2(scale.abs().clamp(min=info.smallest_normal)))
    return ((actual.double() - exact).abs() / (torch.exp2(exponent) * info.eps)).nan_to_num(nan=torch.inf)


class Subject(NamedTuple):
    """What is compared over every input: our function, torch's; and in float64 value, derivative and the size of its terms."""

    ours: Callable | None
    theirs: Callable
    value: Callable
    slope: Callable | None = None
    terms: Callable | None = None


def silu_slope(x, sign=1):
    """silu'; with a sign that makes the second term positive, the size of its terms."""
    return torch.sigmoid(x) * (1 + sign * x * torch.sigmoid(-x))


# The last three are those of CUDA: what our bounds in fp32 are derived from (tests/bounds.py).
SUBJECTS = {
    "sigmoid": Subject(PROVIDERS['ours, save="input"'], torch.sigmoid, torch.sigmoid, true_derivative, true_derivative),
    "silu": Subject(
        torch_sigmoid.silu, F.silu, lambda x: x * torch.sigmoid(x), silu_slope, lambda x: silu_slope(x, torch.sign(x))
    ),
    "logsigmoid": Subject(
        torch_sigmoid.logsigmoid,
        F.logsigmoid,
        lambda x: x.clamp(max=0) - torch.exp(-x.abs()).log1p(),
        lambda x: torch.sigmoid(-x),
        lambda x: torch.sigmoid(-x),
    ),
    "exp": Subject(None, torch.exp, torch.exp),
    "exp2": Subject(None, torch.exp2, torch.exp2),
    "log": Subject(None, torch.log, torch.log),
}
COMPARED = ("inputs", "bits not torch's", "first at", "ulp of torch", "ulp of ours", "ulp of the gradient")


def differing(actual, expected):
    """Where the bits differ, but for NaN."""
    integers = {2: torch.int16, 4: torch.int32}[actual.dtype.itemsize]
    return (actual.view(integers) != expected.view(integers)) & ~(actual.isnan() & expected.isnan())


def compare(name, subject, x, row):
    """Count in `row` what these inputs show."""
    wide, theirs = x.double(), subject.theirs(x)
    row["inputs"] += x.numel()
    least, most = torch.finfo(x.dtype).smallest_normal, torch.finfo(x.dtype).max
    if name in GATES and x.dtype is torch.float32:
        least = FP32_GATES_LEAST
    value = subject.value(wide)
    counted = x.isfinite() & (value.abs() >= least) & (value.abs() <= most)
    errors = [("ulp of torch", theirs, value, value, counted)]
    if subject.ours:
        ours = subject.ours(x)
        terms = subject.terms(wide)
        sloping = x.isfinite() & (terms >= least) & (x.abs() < FP32_REACH)
        errors.append(("ulp of ours", ours, value, value, counted))
        errors.append(("ulp of the gradient", gradient(subject.ours, x), subject.slope(wide), terms, sloping))
        if name == "sigmoid":
            differ = differing(ours, theirs)
            row["bits not torch's"] = (row["bits not torch's"] or 0) + int(differ.sum())
            if row["first at"] is None and bool(differ.any()):
                row["first at"] = x[differ][0].item()
    for column, actual, exact, scale, mask in errors:
        if bool(mask.any()):
            row[column] = max(row[column] or 0, round(ulps(actual, exact, scale)[mask].max().item(), 4))


def exhaustive(device):
    """A row for each subject and dtype, over all its bit patterns: values that differ from torch's, and the worst errors."""
    rows = []
    for name, subject in SUBJECTS.items():
        for dtype in DTYPES if subject.ours else [dtype for dtype in DTYPES if dtype is torch.float32]:
            chunks = fp32_patterns(device) if dtype is torch.float32 else [patterns_16_bit(dtype, device)]
            total = 2**32 // CHUNK if dtype is torch.float32 else 1
            row = dict.fromkeys(COMPARED) | {"inputs": 0}
            for x, _ in zip(chunks, record.progress(range(total), f"{name} of every {record.short(dtype)}")):
                compare(name, subject, x, row)
            rows.append({"operator": name, "dtype": record.short(dtype)} | row)
    return rows


def main(argv=None) -> int:
    arguments = record.parser("accuracy", __doc__).parse_args(argv)
    device, status = arguments.device, 0
    # Measure the kernels, even where a small tensor would go to torch's operator.
    torch_sigmoid.torch_below(0)
    about = record.environment(device) | {"path": torch_sigmoid.path(torch.empty(1, device=device)).name}
    folder = record.folder_of(device, arguments.out)
    rows, curves = measure(device)
    record.write(folder, "accuracy", rows, about, bin_width=BIN_WIDTH, curves=curves, samples=samples(device))
    record.show(f"Gradients on {record.device_name(device)}", rows)
    if device.type == "cpu":
        print("accuracy: no GPU, so no comparison over all 2³² fp32 inputs")
        return 0
    rows = exhaustive(device)
    record.write(folder, "exhaustive", rows, about)
    record.show(f"Every input, on {record.device_name(device)}", rows)
    for row in rows:
        if count := row["bits not torch's"]:  # of sigmoid
            print(f"accuracy: FAILED, N1: {count} values of {row['dtype']} differ from torch's")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
