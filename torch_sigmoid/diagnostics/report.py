"""How `diagnostics` puts its numbers before people: a table with words, and heat maps."""

import importlib
import io
import math

from .totals import Row

# Fractions of units that are worth a word, and a gradient's norm relative to the largest of the network.
MANY_SATURATED = 0.5
MANY_LOST = 0.01
VANISHED = 1e-4

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
}

MEANINGS = """\
mean, least |f'|   the layer's own derivative at its inputs: what it multiplies gradients by. A sigmoid's is 1/4 at best.
saturated          inputs where |f'| is below {threshold:g}: hardly any gradient passes.
lost to rounding   inputs whose gradient comes out as exactly 0 although |f'| is a normal number of the dtype.
dead units         units saturated on every sample of the last {dead_after} watched calls.
‖grad‖ in, out     norms of the gradient as it enters the layer in backward, and as it leaves; out / in is what it keeps.\
"""

ADVICE = {
    "not finite": "gradients with infinities or NaN, which the norms leave out: under a GradScaler a few steps are expected to "
    "overflow; else a lower learning rate, gradient clipping, bf16 in place of fp16",
    "lost to rounding": 'rounding, not mathematics: torch_sigmoid.Sigmoid(save="input"), or replace(model, save="input"), '
    "keeps these gradients, and those of SiLU and GLU",
    "lost by tanh": "rounding, not mathematics: tanh has rounded to 1; tanh(x) is 2·sigmoid(2x) - 1, whose gradient "
    'torch_sigmoid.sigmoid(2 * x, save="input") keeps; or normalisation before the layer',
    "saturated": "inputs too large: a smaller or Xavier initialisation, normalisation before the layer, a lower learning rate",
    "dead": "units that no sample moves: look at their biases and initialisation; normalisation brings them back",
    "vanished": "the product of many small derivatives: SiLU or ReLU in hidden layers, residual connections, fewer sigmoids",
}


def troubles(layer: dict, largest: float) -> list[str]:
    """What is wrong with a layer, as keys of ADVICE."""
    found = []
    if layer["not_finite"] or math.isnan(layer["mean_derivative"] or 0):
        found.append("not finite")
    if (layer["lost_to_rounding"] or 0) > MANY_LOST:
        found.append("lost by tanh" if layer["kind"] == "tanh" else "lost to rounding")
    # A ReLU is meant to be off for half of its inputs.
    if (layer["saturated"] or 0) > MANY_SATURATED and layer["kind"] != "relu":
        found.append("saturated")
    if layer["dead_units"]:
        found.append("dead")
    if layer["leaving"] is not None and layer["leaving"] <= VANISHED * largest:
        found.append("vanished")
    return found


def cell(key: str, layer: dict) -> str:
    value = layer[key]
    if value is None:
        return "–"
    if key in ("saturated", "lost_to_rounding"):
        return f"{100 * value:.3g} %"
    if key == "dead_units":
        return f"{value} of {layer['units']}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(layers: list[dict], rows: list[Row], file, *, every: int, threshold: float, dead_after: int) -> None:
    entering = [layer["entering"] for layer in layers if layer["entering"] is not None]
    largest = max((norm for norm in entering if math.isfinite(norm)), default=0.0)
    watched = sum(row.watched for row in rows)
    title = f"Gradients in steps {rows[0].first} to {rows[-1].last}: {watched} watched (every={every}), in {len(rows)} rows"
    cells = [[cell(key, layer) for key in COLUMNS.values()] for layer in layers]
    lines = [MEANINGS.format(threshold=threshold, dead_after=dead_after)]
    unseen = [layer["name"] for layer in layers if layer["mean_derivative"] is None and layer["entering"] is None]
    if unseen:
        lines.append(f"Not seen: {', '.join(unseen)} (not run in grad mode, or within torch.compile, a tracer or torch.func)")
    in_trouble = {}
    for layer in layers:
        for trouble in troubles(layer, largest):
            in_trouble.setdefault(trouble, []).append(layer["name"])
    for trouble, names in in_trouble.items():
        lines.append(f"{trouble.upper()}: {', '.join(names)}\n    {ADVICE[trouble]}")
    if not in_trouble:
        lines.append("No layer is in trouble.")
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = "\n".join([_table(title, list(COLUMNS), cells, encoding), *lines])
    print(_encodable(text, encoding), file=file)


# For what cannot print the others, such as a Windows console.
_PLAIN = str.maketrans({"‖": "|", "–": "-", "·": "*", "²": "^2"})


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return text


def _table(title: str, heads: list[str], rows: list[list[str]], encoding: str) -> str:
    """As wide as it needs to be: a number that is cut off is none."""
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


def heat_maps(seen: dict):
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


def dataframe(seen: dict):
    """A pandas.DataFrame with one row a layer and recorded row."""
    pandas = _need("pandas", "to_dataframe()")
    rows = []
    for name, layer in seen["layers"].items():
        series = {key: values for key, values in layer.items() if isinstance(values, list)}
        for index, (first, last) in enumerate(seen["steps"]):
            row = {"layer": name, "type": layer["type"], "step": first, "last_step": last}
            rows.append(row | {key: values[index] for key, values in series.items()})
    return pandas.DataFrame(rows)


def _need(name: str, caller: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{caller} needs {name}, which is not installed: pip install {name}") from None
