"""A table of benchmarks/README.md, made from a file of results."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .measure import record


class Table(NamedTuple):
    """A table of the page: `row` is a format string for each of `lines`, which are made from a file of results.

    `caption` is a format string over the results and `source`, which names machine, versions, date and file. The first
    `n_labels` columns are text.
    """

    file: str
    header: str
    row: str
    caption: str = "Measured on {source}"
    lines: Callable[[dict], list[dict]] = lambda results: results["rows"]
    n_labels: int = 1

    def write(self, results: dict, folder: Path) -> str:
        cells = [self.row.format_map(line).split(" | ") for line in self.lines(results)]
        table = record.markdown(self.header.split(" | "), cells, self.n_labels)
        return f"{table}\n\n{self.caption.format(**results, source=source(folder, self.file.rpartition('/')[2], results))}"


def source(folder: Path, name: str, results: dict) -> str:
    about = results["environment"]
    versions = [f"{label} {about[key]}" for key, label in (("torch", "torch"), ("triton", "Triton")) if about.get(key)]
    link = (folder / f"{name}.csv").relative_to(record.RESULTS).as_posix()
    return f"{', '.join([about['device'], *versions, about['date']])}; [the numbers](results/{link})."


def where(results: dict, **wanted) -> list[dict]:
    return [row for row in results["rows"] if all(row[key] == value for key, value in wanted.items())]


def pivot(rows: list[dict], line: str, *columns: str) -> list[dict]:
    """One mapping for each value of `line`, with its rows under the values of `columns`, joined by a space."""
    lines = {}
    for row in rows:
        lines.setdefault(row[line], {line: row[line]})[" ".join(row[column] for column in columns)] = row
    return list(lines.values())
