"""Measure the gradient errors of torch and of ours over every 16-bit input, and rewrite the README's table and figures.

For each dtype: relative error against the true derivative (mpmath for the exact values of every finite 16-bit input, float64
for a sample of fp32), over the inputs whose true derivative is a normal number of that dtype.
"""

import argparse
import csv
import functools
import json
import platform
import sys
from pathlib import Path

import matplotlib
import mpmath
import numpy as np
import torch
from tqdm import tqdm

import torch_sigmoid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
MARKERS = ("<!-- accuracy: written by `make accuracy` -->", "<!-- end of accuracy -->")
PROVIDERS = {
    "torch.sigmoid": torch.sigmoid,
    'ours, save="output"': torch_sigmoid.sigmoid,
    'ours, save="input"': functools.partial(torch_sigmoid.sigmoid, save="input"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BIN_WIDTH = 0.25  # of x, in the figure
AT = {torch.bfloat16: (4.0, 5.0, 6.0, 8.0), torch.float16: (4.0, 6.0, 8.0, 9.0), torch.float32: (8.0, 12.0, 15.0, 20.0)}


def inputs(dtype):
    """Every finite value in 16 bit; in fp32 a grid over the range where the derivative is normal, and the points named."""
    if dtype.itemsize == 2:
        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        return patterns[patterns.isfinite()]
    return torch.cat([torch.linspace(-87, 87, 100_001, dtype=torch.float64), torch.tensor(AT[dtype])]).to(dtype)


def true_derivative(x, label):
    with mpmath.workdps(40):
        values = [mpmath.exp(-abs(mpmath.mpf(v))) for v in tqdm(x.tolist(), desc=f"exact values, {label}", unit="value")]
        return np.array([float(e / (1 + e) ** 2) for e in values])


def gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0].double().cpu().numpy()


def name_of(dtype):
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def measure(device):
    """One row a dtype and provider, and the curves of the figure."""
    rows, curves = [], {}
    for dtype in DTYPES:
        x = inputs(dtype)
        exact = true_derivative(x, name_of(dtype))
        normal = exact >= torch.finfo(dtype).smallest_normal
        positions = x.double().numpy()
        for provider, function in PROVIDERS.items():
            actual = gradient(function, x.to(device))
            error = np.abs(actual - exact) / exact.clip(min=torch.finfo(dtype).smallest_normal)
            lost = normal & (actual == 0)
            row = {
                "dtype": name_of(dtype),
                "provider": provider,
                "inputs": int(normal.sum()),
                "flushed_to_0": int(lost.sum()),
                "over_1_percent": int((error[normal] > 0.01).sum()),
                "largest_relative_error": float(error[normal].max()),
            }
            for at in AT[dtype]:
                row[f"error_at_{at:g}"] = float(error[np.flatnonzero(positions == at)[0]])
            rows.append(row)
            curves[dtype, provider] = (positions, error, normal)
    return rows, curves


def percent(value):
    return "0" if value == 0 else f"{100 * value:.2g} %" if value < 0.995 else "**100 %**"


def table(rows, environment):
    lines = [
        "| dtype | gradient by | lost (exactly 0) | more than 1 % off | largest error | at x = … |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        prefix = "error_at_"
        at = ", ".join(f"{key.removeprefix(prefix)}: {percent(row[key])}" for key in row if key.startswith(prefix))
        lines.append(
            f"| {row['dtype']} | {row['provider']} | {row['flushed_to_0']} of {row['inputs']} | {row['over_1_percent']} |"
            f" {percent(row['largest_relative_error'])} | {at} |"
        )
    source = f"Measured on {environment['device']}, torch {environment['torch']}, path {environment['path']}"
    return "\n".join([*lines, "", f"{source}; [the numbers]({environment['file']})."])


def draw_errors(curves, path):
    figure, panels = plt.subplots(1, len(DTYPES), figsize=(12, 3.8), constrained_layout=True, sharey=True)
    for panel, dtype in zip(panels, DTYPES):
        for provider, style in zip(PROVIDERS, ("-", "--", "-")):
            x, error, normal = curves[dtype, provider]
            keep = normal & (x >= 0) & (x <= (25 if dtype is torch.float32 else 12))
            bins = np.floor(x[keep] / BIN_WIDTH).astype(int)
            worst = np.zeros(bins.max() + 1)
            np.maximum.at(worst, bins, error[keep])
            panel.semilogy(np.arange(len(worst)) * BIN_WIDTH, worst, style, label=provider)
        panel.set(title=name_of(dtype), xlabel="x", ylim=(1e-8, 3))
    panels[0].set_ylabel("largest relative error of the gradient")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sigmoid(device, path):
    """σ and σ' as the package computes them, and the σ' that bf16 leaves of it."""
    x = torch.linspace(-10, 10, 801, device=device)
    rounded = x.bfloat16()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    panels[0].plot(x.cpu(), torch_sigmoid.sigmoid(x).cpu(), label="σ(x)")
    panels[0].plot(x.cpu(), gradient(PROVIDERS['ours, save="input"'], x), label="σ'(x)")
    panels[0].set(xlabel="x")
    panels[0].legend()
    for provider, style in (('ours, save="input"', "-"), ("torch.sigmoid", "--")):
        panels[1].semilogy(rounded.float().cpu(), gradient(PROVIDERS[provider], rounded), style, label=f"{provider}, bf16")
    panels[1].set(xlabel="x", ylabel="σ'(x)")
    panels[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def update_readme(text):
    readme = ROOT / "README.md"
    content = readme.read_text()
    before, rest = content.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    readme.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    folder = ROOT / "benchmarks" / "results" / (device.type if device.type == "cpu" else device_name.replace(" ", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "device": device_name,
        "torch": torch.__version__,
        "path": torch_sigmoid.path(torch.empty(1, device=device)).name,
        "file": (folder / "accuracy.csv").relative_to(ROOT).as_posix(),
    }
    rows, curves = measure(device)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "accuracy.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "accuracy.json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    draw_errors(curves, folder / "gradient_errors.png")
    draw_sigmoid(device, folder / "sigmoid.png")
    text = table(rows, environment)
    update_readme(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
