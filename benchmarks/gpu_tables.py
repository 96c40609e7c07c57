"""What each GPU has measured, as tables of benchmarks/README.md."""

from pathlib import Path

from .measure import record
from .tables import Table, pivot, where

DTYPES, MODES = ("fp32", "bf16"), ("forward", "backward", "both")


def failures_lines(tests: dict) -> list[dict]:
    """The files in which a test failed, and all files together."""
    total = {key: sum(row[key] for row in tests["rows"]) for key in ("passed", "failed", "skipped")}
    return [*(row for row in tests["rows"] if row["failed"]), {"file": "all tests that take CUDA tensors"} | total]


def exhaustive_lines(exhaustive: dict) -> list[dict]:
    def shown(value):
        return "" if value is None else f"{value:.2f}"

    errors = ("ulp of torch", "ulp of ours", "ulp of the gradient")
    return [
        row
        | {key: shown(row[key]) for key in errors}
        | {"differing": "" if row["bits not torch's"] is None else row["bits not torch's"]}
        for row in exhaustive["rows"]
    ]


def speed_lines(speed: dict) -> list[dict]:
    """Our times over torch's at each size: with save="output" / with "input"."""

    def cell(line, dtype, mode):
        both = (f"{dtype} ours, {save} {mode}" for save in ("output", "input"))
        return " / ".join(f"{line[key]['time / torch']:.2f}" for key in both)

    rows = [row for row in where(speed, layout="dense") if row["provider"].startswith("ours") and row["dtype"] in DTYPES]
    for line in pivot(rows, "n", "dtype", "provider", "mode"):
        yield {"n": line["n"], "times": " | ".join(cell(line, dtype, mode) for dtype in DTYPES for mode in MODES)}


TABLES = (
    Table("tests", "file | passed | failed | skipped", "{file} | {passed:,} | {failed} | {skipped}", lines=failures_lines),
    Table(
        "exhaustive",
        "operator | dtype | inputs | σ whose bits are not torch's | ulp of torch's value | of ours | of our gradient",
        "`{operator}` | {dtype} | {inputs:,} | {differing} | {ulp of torch} | {ulp of ours} | {ulp of the gradient}",
        "Largest errors over every input with a normal result (in fp32 above 2⁻¹¹⁹ for silu and logsigmoid, and gradients for "
        "abs(x) < 87); of the gradient of silu, in ulp of its terms: {source}",
        exhaustive_lines,
        n_labels=2,
    ),
    Table(
        "speed",
        " | ".join(["elements", *(f"{dtype} {mode}" for dtype in DTYPES for mode in MODES)]),
        "{n:,} | {times}",
        'Time over torch.nn.Sigmoid\'s, with save="output" / "input": {source}',
        speed_lines,
        n_labels=0,
    ),
    Table(
        "threshold",
        "elements | forward | forward + backward | and a second derivative",
        "{n:,} | {forward[kernels / torch]:.2f} | {both[kernels / torch]:.2f} | {second derivative[kernels / torch]:.2f}",
        'Time of the kernels over that of torch\'s operator, fp32, save="output": {source}',
        lambda threshold: pivot(threshold["rows"], "n", "mode"),
        n_labels=0,
    ),
)


def write(folders: list[Path]) -> str:
    """The tables of each GPU, with the figure of its speed."""
    parts = []
    for folder in folders:
        for table in TABLES:
            if results := record.read(folder, table.file):
                parts.append(table.write(results, folder))
                if table.file == "speed":
                    parts.append(f"![time over size](results/{folder.name}/speed.png)")
    return "\n\n".join(parts) or "Not measured yet: no GPU has run the suite."
