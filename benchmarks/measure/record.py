"""What all commands share: their options, where results go, what is said about the machine, progress, tables and figures."""

import argparse
import csv
import datetime
import functools
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
README = ROOT / "benchmarks" / "README.md"


class WrongResultError(Exception):
    """A provider's result is not what the formula says, so its time means nothing."""


def parser(name: str, doc: str, device: bool = True, out: Path = RESULTS) -> argparse.ArgumentParser:
    """The parser of a command whose help is `doc`, its module's docstring; `device`: whether the user chooses one."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if device:
        parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    shown = out.relative_to(ROOT) if out.is_absolute() else out
    parser.add_argument("--out", type=Path, default=out, help=f"folder for the results (default: {shown})")
    return parser


def reporting(main):
    """Decorate a command's `main`: on a WrongResultError it prints what was wrong and returns 1."""

    @functools.wraps(main)
    def reported(argv=None) -> int:
        try:
            return main(argv)
        except WrongResultError as error:
            print(f"FAILED: {error}")
            return 1

    return reported


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()})"
    return torch.get_device_module(device).get_device_name(device)


def folder_of(device: torch.device, out: Path = RESULTS) -> Path:
    """Where a device's results go below `out`: `cpu`, or a folder with the GPU's name."""
    return out / ("cpu" if device.type == "cpu" else re.sub(r"[^A-Za-z0-9.]+", "-", device_name(device)))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """HEAD, "with changes" if a Python file differs from it or is new; None without git."""
    head = output_of(["git", "rev-parse", "--short", "HEAD"])
    changed = output_of(["git", "status", "--porcelain", "--", "*.py"])
    return f"{head} with changes" if head and changed else head


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a reader must know to judge the numbers beside it: device, versions, date and commit."""
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
        "commit": commit(),
    }


def write(folder: Path, name: str, rows: list[dict], about: dict, **more) -> None:
    """Write `name`.csv with the rows, and `name`.json with the machine, the rows and whatever else the figures need."""
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
    """A tqdm bar over `items`, or one line of text if tqdm is not installed, as on a bare GPU machine."""
    items = list(items)
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{description}: {len(items)} steps", file=sys.stderr)
        return items
    return tqdm(items, desc=description, mininterval=0.5)


def show(title: str, rows: list[dict], columns: list[str] | None = None, caption: str | None = None) -> None:
    """Print the rows as a table, rich's if it is installed."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_cell(row.get(column)) for column in columns] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [title, "\t".join(columns), *("\t".join(line) for line in cells), *filter(None, [caption])]
        print("\n".join(lines))
        return
    table = Table(title=title, caption=caption)
    for index, column in enumerate(columns):
        numbers = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=index == 0)
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def format_cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def markdown(headers: list[str], lines: list[list], n_labels: int = 1) -> str:
    """A table in Markdown: the first `n_labels` columns are text, on the left; the others are numbers, on the right."""
    rule = "".join("---|" if index < n_labels else "---:|" for index in range(len(headers)))
    return "\n".join([f"| {' | '.join(headers)} |", f"|{rule}", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    # Without the version of matplotlib, which would change the file with every release.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    print(f"drew {path}")


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(values.tolist())


def timing(seconds: list[float], name: str = "microseconds") -> dict[str, float]:
    """Columns of a row: the median of the samples and their 20 % and 80 % quantiles, in microseconds."""
    return {column: round(1e6 * value, 3) for column, value in zip((name, "20 %", "80 %"), quantiles(seconds))}
