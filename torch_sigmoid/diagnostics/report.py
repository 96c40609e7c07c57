"""Puts the numbers of a watch before people: the printed report, heat maps, a dataframe."""

import importlib
import io
import textwrap
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

from .advice import troubles
from .totals import Row, between

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

COLUMNS = {
    "layer": "name",
    "type": "type",
    "mean |f'|": "mean_derivative",
    "least |f'|": "least_derivative",
    "saturated": "saturated",
    "lost to rounding": "lost_to_rounding",
    "dead units": "dead_units",
    "‖grad‖ in": "entering",
    "‖grad‖ out": "leaving",
    "out / in": "attenuation",
    "between": "between",
}

MEANINGS = """\
mean, least |f'|   the layer's own derivative at its inputs: what it multiplies gradients by. A sigmoid's is 1/4 at best.
saturated          inputs where |f'| is below {threshold:g}: hardly any gradient passes.
lost to rounding   inputs whose gradient comes out as exactly 0 although |f'| is a normal number of the dtype.
dead units         units saturated on every sample of the last {dead_after} watched calls; – before that many were watched.
‖grad‖ in, out     norms of the gradient as it enters the layer in backward, and as it leaves; out / in is what it keeps.
                   Of a gate that multiplies another tensor, by which the gradient goes on too, out is the gate's alone.
between            ‖grad‖ in of the layer listed above over ‖grad‖ out of this one: what Linears, normalisation, residual
                   connections and layers that are not watched multiply gradients by. Layers stand in the model's order.
Only modules are watched: direct calls such as torch.sigmoid(x), F.sigmoid(x) and F.silu(x) are invisible here, and what they
take shows under "between".\
"""


def write(
    layers: list[dict[str, Any]], rows: list[Row], file: TextIO, *, every: int, threshold: float, dead_after: int
) -> None:
    """Print the table of `layers`, what its columns mean, and the troubles.

    Args:
        layers: in the model's order; of each, its "name", "type" and "kind", and the statistics of `GradientWatch.to_dict` as
            numbers.
        rows: the recorded rows that the numbers come from.
        every, threshold, dead_after: the watch's.
    """
    watched = sum(row.watched for row in rows)
    title = f"Gradients in steps {rows[0].first} to {rows[-1].last}: {watched} watched (every={every}), in {len(rows)} rows"
    shown = [layer | {"between": ratio} for layer, ratio in zip(layers, between(layers))]
    cells = [[_cell(key, layer) for key in COLUMNS.values()] for layer in shown]
    lines = [MEANINGS.format(threshold=threshold, dead_after=dead_after)]
    unseen = [layer["name"] for layer in layers if layer["mean_derivative"] is None and layer["entering"] is None]
    if unseen:
        lines.append(f"Not seen: {', '.join(unseen)} (not run in grad mode, or within torch.compile, a tracer or torch.func)")
    found = troubles(layers)
    for trouble in found:
        lines.append(f"{trouble.heading}: {', '.join(trouble.places)}")
        lines += [_paragraph(words) for words in trouble.words]
    if not found:
        lines.append("No layer is in trouble.")
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = "\n".join([_table(title, list(COLUMNS), cells, encoding), *lines])
    print(_encodable(text, encoding), file=file)


def _paragraph(words: str) -> str:
    return textwrap.fill(words, 120, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _cell(key: str, layer: dict[str, Any]) -> str:
    value = layer[key]
    if value is None:
        return "–"
    if key in ("saturated", "lost_to_rounding"):
        return f"{100 * value:.3g} %"
    if key == "dead_units":
        return f"{value} of {layer['units']}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# Replacements for signs that a terminal, such as a Windows console, cannot print.
_PLAIN = str.maketrans({"‖": "|", "–": "-", "·": "*", "±": "+-"})


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return text


def _table(title: str, heads: list[str], rows: list[list[str]], encoding: str) -> str:
    """As wide as it needs to be, whatever the terminal: a number that is cut off misleads."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(heads, *rows)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in (heads, *rows)]
        return "\n".join([title, *lines])
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if not encoding.lower().startswith("utf"):
        table.box = box.ASCII
    written = io.StringIO()
    Console(file=written, width=10_000).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip("\n").split("\n"))


def heat_maps(seen: dict[str, Any]) -> "Figure":
    """A Figure: layer × step, one panel a statistic; white where nothing was seen."""
    _need("matplotlib", "plot()")
    import numpy as np
    from matplotlib import colors
    from matplotlib.figure import Figure

    names = list(seen["layers"])
    panels = (
        ("saturated", "saturated", "linear"),
        ("lost_to_rounding", "lost to rounding", "linear"),
        ("attenuation", "attenuation (‖grad‖ out / in)", "log"),
    )
    figure = Figure(figsize=(4.5 * len(panels), 1.5 + 0.3 * len(names)), layout="constrained")
    edges = [*(first for first, _ in seen["steps"]), seen["steps"][-1][1] + seen["every"]]
    for axes, (key, title, scale) in zip(figure.subplots(1, len(panels), sharey=True), panels):
        values = np.array([seen["layers"][name][key] for name in names], dtype=float)
        values = np.ma.masked_invalid(values)
        norm: colors.Normalize
        if scale == "log":
            # 0 has no logarithm: what is lost altogether takes the lowest colour.
            norm = colors.LogNorm(vmin=1e-6, vmax=1, clip=True)
        else:
            norm = colors.Normalize(vmin=0, vmax=1)
        image = axes.pcolormesh(edges, np.arange(len(names) + 1), values, norm=norm)
        axes.set(title=title, xlabel="step", yticks=np.arange(len(names)) + 0.5, yticklabels=names)
        axes.set_ylim(len(names), 0)
        figure.colorbar(image, ax=axes)
    return figure


def dataframe(seen: dict[str, Any]) -> "pandas.DataFrame":
    """A pandas.DataFrame with one row a layer and recorded row."""
    pandas = _need("pandas", "to_dataframe()")
    rows = []
    for name, layer in seen["layers"].items():
        series = {key: values for key, values in layer.items() if isinstance(values, list)}
        for index, (first, last) in enumerate(seen["steps"]):
            row = {"layer": name, "type": layer["type"], "step": first, "last_step": last}
            rows.append(row | {key: values[index] for key, values in series.items()})
    return pandas.DataFrame(rows)


def _need(name: str, caller: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{caller} needs {name}, which is not installed: pip install {name}") from None
