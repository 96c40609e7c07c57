"""What every part of the suite shares: where results go, what is said about the machine, progress, and the README's tables."""

import csv
import datetime
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

import torch_sigmoid

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


class WrongResultError(Exception):
    """A provider's result is not what the formula says, so its time means nothing."""


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()})"
    return torch.get_device_module(device).get_device_name(device)


def folder_of(device: torch.device, out: Path | None = None) -> Path:
    """`benchmarks/results/cpu`, or the folder with the GPU's name; under `out` where that is given."""
    name = "cpu" if device.type == "cpu" else re.sub(r"[^A-Za-z0-9.]+", "-", device_name(device))
    return (out or RESULTS) / name


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a reader must know to weigh the numbers beside it."""
    try:
        import triton
    except ImportError:
        triton_version = None
    else:
        triton_version = triton.__version__
    driver = None
    if device.type == "cuda":
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)])
    return {
        "device": device_name(device),
        "driver": driver,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "torch_sigmoid": torch_sigmoid.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": output_of(["git", "rev-parse", "--short", "HEAD"]),
    }


def write(folder: Path, name: str, rows: list[dict], about: dict, **more) -> None:
    """`name`.csv with the rows, and `name`.json with the machine, the rows and whatever else the figures need."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.json").write_text(json.dumps({"environment": about, "rows": rows, **more}, indent=1) + "\n")
    print(f"wrote {folder / name}.csv and .json")


def read(folder: Path, name: str) -> dict | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def progress(items, description: str):
    """A tqdm bar, or a line of text where tqdm is not installed, as on a bare GPU machine."""
    items = list(items)
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{description}: {len(items)} steps", file=sys.stderr)
        return items
    return tqdm(items, desc=description, mininterval=0.5)


def show(title: str, rows: list[dict], columns: list[str] | None = None) -> None:
    """A table: rich's where it is installed."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_cell(row.get(column)) for column in columns] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([title, "\t".join(columns), *("\t".join(line) for line in cells)]))
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("operator", "provider", "dtype", "mode", "layout") else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def format_cell(value) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(values.tolist())
