"""How far gradients and values are from the truth: torch's, and ours with each `save`.

The truth is σ' = e/(1+e)², e = e^-|x|, computed in float64, where nothing in it cancels. The gradients are compared with it at
every finite 16-bit input, and on a grid of fp32 inputs, wherever the true derivative is a normal number of the dtype. On a GPU
every fp16, bf16 and fp32 input is visited, 2³² of them: a forward value whose bits are not torch's is a failure (N1 of
kernels/README.md), and the worst errors in ulp are recorded.

Writes accuracy.csv and .json, and on a GPU exhaustive.csv and .json. Takes a few seconds, and a few minutes on a GPU.
"""

import functools
import sys

import numpy as np
import torch

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


def ulps(actual, exact):
    """Errors in ulps of the exact value, in the dtype of `actual`."""
    info = torch.finfo(actual.dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=info.smallest_normal)))
    return (actual.double() - exact).abs() / (torch.exp2(exponent) * info.eps)


def exhaustive(device):
    """A row for each dtype, over all its bit patterns: forward values that differ from torch's, and the worst errors."""
    rows = []
    for dtype in DTYPES:
        chunks = fp32_patterns(device) if dtype is torch.float32 else [patterns_16_bit(dtype, device)]
        total = 2**32 // CHUNK if dtype is torch.float32 else 1
        integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        row = dict.fromkeys(("inputs", "bits not torch's", "first at", "ulp of torch", "ulp of ours", "ulp of the gradient"), 0)
        row["first at"] = None
        for x, _ in zip(chunks, record.progress(range(total), f"every {record.short(dtype)}")):
            ours, theirs = torch_sigmoid.sigmoid(x), torch.sigmoid(x)
            differ = (ours.view(integers) != theirs.view(integers)) & ~(ours.isnan() & theirs.isnan())
            row["inputs"] += x.numel()
            row["bits not torch's"] += int(differ.sum())
            if row["first at"] is None and bool(differ.any()):
                row["first at"] = x[differ][0].item()
            finite = x.isfinite()
            exact = torch.sigmoid(x.double())
            normal = finite & (exact >= torch.finfo(dtype).smallest_normal)
            derivative = true_derivative(x)
            counted = finite & (derivative >= torch.finfo(dtype).smallest_normal) & (x.abs() < FP32_REACH)
            slopes = gradient(PROVIDERS['ours, save="input"'], x)
            for name, actual, truth, mask in (
                ("ulp of torch", theirs, exact, normal),
                ("ulp of ours", ours, exact, normal),
                ("ulp of the gradient", slopes, derivative, counted),
            ):
                if bool(mask.any()):
                    row[name] = max(row[name], round(ulps(actual, truth)[mask].max().item(), 4))
        rows.append({"dtype": record.short(dtype)} | row)
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
        if count := row["bits not torch's"]:
            print(f"accuracy: FAILED, N1: {count} values of {row['dtype']} differ from torch's")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
