"""Draw every figure, and write every table of the README between its markers, from the files under benchmarks/results/.

Nothing is measured here: running it twice changes nothing the second time.
"""

import itertools
import json
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .measure import record, speed
from .measure.operators import operators
from .training import vanishing

STYLES = {"torch": "-", "torch.compile": ":", "ours, output": "--", "ours, input": "-.", "naive Triton": (0, (1, 3))}
DTYPES = ("fp32", "bf16", "fp16")
# Of the gates' and losses' times, those that the README shows; SigLIP's are of 256 and 1024 pairs, on a GPU of 4096.
SHOWN_ON_CPU, SHOWN_ON_GPU = (("fp32", 1 << 16), ("fp32", 1 << 20)), (("bf16", 1 << 24),)
SHOWN_OF_SIGLIP_ON_CPU, SHOWN_OF_SIGLIP_ON_GPU = (("fp32", 1 << 16), ("fp32", 1 << 18)), (("bf16", 1 << 20),)
NOT_MEASURED = "not measured yet"


def save(figure, path):
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    print(f"drew {path.relative_to(record.ROOT)}")


def draw_errors(accuracy, folder):
    figure, panels = plt.subplots(1, len(DTYPES), figsize=(12, 3.8), constrained_layout=True, sharey=True)
    styles = dict(zip(dict.fromkeys(curve["provider"] for curve in accuracy["curves"]), ("-", "--", "-")))
    for curve in accuracy["curves"]:
        panel = panels[("bf16", "fp16", "fp32").index(curve["dtype"])]
        x = np.arange(len(curve["worst"])) * accuracy["bin_width"]
        panel.semilogy(x, curve["worst"], styles[curve["provider"]], label=curve["provider"])
        panel.set(title=curve["dtype"], xlabel="x", ylim=(1e-8, 3))
    panels[0].set_ylabel("largest relative error of the gradient")
    panels[0].legend(loc="lower right", fontsize="small")
    save(figure, folder / "gradient_errors.png")


def draw_sigmoid(accuracy, folder):
    """σ and σ' as the package computes them, and the σ' that bf16 leaves of it."""
    samples = accuracy["samples"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    panels[0].plot(samples["x"], samples["sigma"], label="σ(x)")
    panels[0].plot(samples["x"], samples["derivative"], label="σ'(x)")
    for provider, style in (('ours, save="input"', "-"), ("torch.sigmoid", "--")):
        derivative = np.array(samples[f"bf16 derivative by {provider}"])
        derivative[derivative == 0] = np.nan
        panels[1].semilogy(samples["bf16 x"], derivative, style, label=f"{provider}, bf16")
    panels[1].set(ylabel="σ'(x)")
    for panel in panels:
        panel.set(xlabel="x")
        panel.legend()
    save(figure, folder / "sigmoid.png")


def draw_speed(speed, folder):
    """Forward and backward over size: GB/s on a GPU, with the copy as the memory's limit; time over torch's on a CPU."""
    rows = [row for row in speed["rows"] if row["layout"] == "dense"]
    gpu = any(row.get("of a copy") for row in rows)
    modes, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "dtype"))
    figure, grid = plt.subplots(
        len(dtypes), len(modes), figsize=(4.6 * len(modes), 3.4 * len(dtypes)), constrained_layout=True, squeeze=False
    )
    for panel, (dtype, mode) in zip(grid.flat, itertools.product(dtypes, modes)):
        chosen = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        for provider in dict.fromkeys(row["provider"] for row in chosen):
            own = [row for row in chosen if row["provider"] == provider]
            values = [row["GB/s"] if gpu else row.get("time / torch") or 1.0 for row in own]
            panel.plot([row["n"] for row in own], values, STYLES.get(provider, "-"), marker=".", label=provider)
        if gpu:
            limit = {row["n"]: row["GB/s"] / row["of a copy"] for row in chosen if row.get("of a copy")}
            panel.plot(limit.keys(), limit.values(), color="grey", linewidth=0.8, label="device-to-device copy")
        panel.set(xscale="log", xlabel="elements", title=f"{mode}, {dtype}", ylabel="GB/s" if gpu else "time / torch")
        if not gpu:
            panel.set_ylim(bottom=0)
    grid[0][0].legend(fontsize="small")
    figure.suptitle(f"{speed['environment']['device']}, torch {speed['environment']['torch']}")
    save(figure, folder / "speed.png")


def draw_host(host, folder):
    rows = [row for row in host["rows"] if row["what"] in ("layer", "graph")]
    kinds = list(dict.fromkeys((row["what"], row["dtype"]) for row in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3), constrained_layout=True, squeeze=False)
    for panel, (what, dtype) in zip(panels[0], kinds):
        own = [row for row in rows if (row["what"], row["dtype"]) == (what, dtype)]
        bars = panel.barh([row["provider"] for row in own], [row["microseconds"] for row in own])
        panel.bar_label(bars, [f"{row['microseconds']:.1f}" for row in own], padding=2)
        panel.margins(x=0.15)
        panel.invert_yaxis()
        panel.set(xlabel=f"µs a {what}, forward and backward", title=dtype)
    figure.suptitle(host["environment"]["device"])
    save(figure, folder / "host.png")


def markdown(columns, rows, right=()):
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if column in right else "---" for column in columns) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def source(folder, name, results):
    about = results["environment"]
    versions = ", ".join(f"{label} {about[key]}" for key, label in (("torch", "torch"), ("triton", "Triton")) if about.get(key))
    path = (folder / f"{name}.csv").relative_to(record.ROOT)
    return f"{about['device']}, {versions}, {about['date']}; [the numbers]({path.as_posix()})."


def percent(value):
    return "0" if value == 0 else f"{100 * value:.2g} %" if value < 0.995 else "**100 %**"


def accuracy_table(accuracy, folder):
    rows = []
    for row in accuracy["rows"]:
        prefix = "error at "
        at = ", ".join(f"{key.removeprefix(prefix)}: {percent(row[key])}" for key in row if key.startswith(prefix))
        lost = f"{row['flushed to 0']} of {row['inputs']}"
        rows.append((row["dtype"], row["provider"], lost, row["over 1 %"], percent(row["largest relative error"]), at))
    columns = ("dtype", "gradient by", "lost (exactly 0)", "more than 1 % off", "largest error", "at x = …")
    path = f"path {accuracy['environment']['path']}"
    return f"{markdown(columns, rows)}\n\nMeasured on {path}: {source(folder, 'accuracy', accuracy)}"


def host_table(host, folder):
    """A layer's forward and backward, one row a provider."""
    layers = [row for row in host["rows"] if row["what"] == "layer"]
    providers = list(dict.fromkeys(row["provider"] for row in layers))
    rows = []
    for provider in providers:
        cells = [provider]
        for dtype in ("fp32", "bf16"):
            (row,) = (row for row in layers if (row["provider"], row["dtype"]) == (provider, dtype))
            cells += [f"{row['microseconds']:.1f} µs", f"{row['time / torch']:.2f}"]
        rows.append(cells)
    columns = ("layer", "fp32", "÷ torch", "bf16", "÷ torch")
    return f"{markdown(columns, rows, right=columns[1:])}\n\nMeasured on a {source(folder, 'host', host)}"


def speed_table(speed, folder):
    """Time over torch's at each size."""
    rows = [row for row in speed["rows"] if row["layout"] == "dense" and row["provider"].startswith("ours")]
    columns = list(dict.fromkeys((row["dtype"], row["provider"], row["mode"]) for row in rows))
    lines = []
    for n in dict.fromkeys(row["n"] for row in rows):
        by = {(row["dtype"], row["provider"], row["mode"]): row["time / torch"] for row in rows if row["n"] == n}
        lines.append([f"{n:,}", *(f"{by[column]:.2f}" if column in by else "" for column in columns)])
    heads = ["elements", *(f"{provider}, {dtype} {mode}" for dtype, provider, mode in columns)]
    return f"{markdown(heads, lines, right=heads)}\n\nTime over torch.nn.Sigmoid's, {source(folder, 'speed', speed)}"


def code_table(code, folder):
    operators = ("forward", "backward-from-output", "backward-from-input")
    rows = [
        (row["operator"], row["dtype"], row["instructions per element"], row["registers"], row["spills"])
        for row in code["rows"]
        if row["target"] == "sm_90" and row["operator"] in operators and row["dtype"] in DTYPES and row["n"] % 16
    ]
    columns = ("kernel on sm_90, n odd", "dtype", "instructions per element", "registers", "spills")
    about = f"Read off the machine code: {source(folder, 'code', code)}"
    executed = record.read(folder, "executed")
    return "\n\n".join(
        [markdown(columns, rows, right=columns[2:]), about, *([executed_table(executed, folder)] if executed else [])]
    )


def executed_table(executed, folder):
    """Bytes over the ideal, and instructions over the budget, of each operator in each order."""
    by = {(row["operator"], row["dtype"], row["order"]): row for row in executed["rows"]}
    shown = ("fp32", "bf16")

    def ratios(operator, over, under):
        orders = dict.fromkeys(row["order"] for row in executed["rows"])
        cells = [by.get((operator, dtype, order)) for dtype in shown for order in orders]
        return ["" if row is None else f"{row[over] / row[under]:.2f}" for row in cells]

    lines = []
    for operator in dict.fromkeys(row["operator"] for row in executed["rows"]):
        moved = ratios(operator, "bytes per element", "ideal bytes")
        issued = ratios(operator, "instructions per element", "budget")
        cells = (" / ".join(each[first : first + 3]).rstrip(" /") for each in (moved, issued) for first in (0, 3))
        lines.append([f"`{operator}`", *cells])
    columns = ["operator", *(f"{what}, {dtype}" for what in ("bytes ÷ ideal", "instructions ÷ budget") for dtype in shown)]
    about = f"Forward / backward / double backward, {source(folder, 'executed', executed)}"
    return f"{markdown(columns, lines, right=columns[1:])}\n\n{about}"


def vanishing_table(vanishing_results, folder):
    """Where each activation stops to learn, then what save= does to sigmoid layers that start saturated."""
    stops = [list(row.values()) for row in vanishing.summary(vanishing_results["rows"])]
    saves = []
    for row in vanishing.saves(vanishing_results["rows"]):
        if row["initialisation"] != "saturated":
            continue
        norms = [
            f"{row[f'first step: gradient {where}']:.2g}" for where in ("entering the last layer", "leaving the first layer")
        ]
        lost = percent(row["first step: lost to rounding"])
        about = (row[key] for key in ("depth", "precision", "activation"))
        saves.append((*about, f"{row['accuracy']:.3f}", *norms, lost))
    first = markdown(list(vanishing.summary([])[0]), stops)
    gradient = ("gradient entering the last", "leaving the first", "lost to rounding")
    columns = ("saturated layers", "precision", "activation", "accuracy", *gradient)
    return f"{first}\n\n{markdown(columns, saves)}\n\nMeasured on {source(folder, 'vanishing', vanishing_results)}"


def watch_table(watch, folder):
    rows = [(row["watch"], f"{row['microseconds a step']:.0f}", f"{row['overhead %']:+.1f} %") for row in watch["rows"]]
    shape = watch["rows"][0]
    about = f"{shape['layers']} hidden layers of width {shape['width']}, batches of {shape['batch']}"
    return f"{markdown(('watch', 'µs a step', 'overhead'), rows)}\n\n{about}: {source(folder, 'watch', watch)}"


def ratios(rows, operator, shown):
    """Our time over torch's, forward and backward, at each of the dtypes and sizes shown."""
    by = {
        (row["dtype"], row["n"]): row["time / torch"]
        for row in rows
        if (row["operator"], row["provider"], row["mode"]) == (operator, "ours", "both")
    }
    return " / ".join(f"{by[key]:.2f}" if key in by else NOT_MEASURED for key in shown)


def operators_table(cpu, gpus):
    """What each operator launches and keeps, and its time over torch's on the CPU and on every GPU."""
    counts = record.read(cpu, "counts")
    files = [name for family, name in speed.FILES.items() if family != "sigmoid"]
    timed = {(folder, name): results for folder in (cpu, *gpus) for name in files if (results := record.read(folder, name))}
    measured = list(dict.fromkeys(folder for folder, _ in timed if folder != cpu))
    by = {(row["operator"], row["provider"]): row for row in counts["rows"]}

    def times(folder, name, shown):
        results = timed.get((folder, speed.FILES[operators()[name].family]))
        return ratios(results["rows"], name, shown) if results else NOT_MEASURED

    lines = []
    for name in dict.fromkeys(name for name, _ in by):
        both = by[name, "torch"], by[name, "ours"]
        kernels = [" / ".join(str(row[order]) for order in ("forward", "backward", "double backward")) for row in both]
        is_siglip = operators()[name].family == "siglip"
        on_cpu, on_gpu = (SHOWN_OF_SIGLIP_ON_CPU, SHOWN_OF_SIGLIP_ON_GPU) if is_siglip else (SHOWN_ON_CPU, SHOWN_ON_GPU)
        lines.append(
            [
                f"`{name}`",
                operators()[name].written,
                " → ".join(kernels),
                " → ".join(f"{row['saved']:.4g}" for row in both),
                times(cpu, name, on_cpu),
                *(times(folder, name, on_gpu) for folder in measured),
                *([] if measured else [NOT_MEASURED]),
            ]
        )
    columns = [
        "operator",
        "formula",
        "kernels forward / backward / double backward, torch → ours",
        "saved, in tensors of the output's size (a loss's: of the logits'), torch → ours",
        "CPU, time ÷ torch's, forward + backward, fp32, 2¹⁶ / 2²⁰ elements",
    ]
    devices = {folder: results["environment"]["device"] for (folder, _), results in timed.items()}
    columns += [f"{devices[folder]}, time ÷ torch's, bf16, 2²⁴ elements" for folder in measured]
    columns += [] if measured else ["GPU, time ÷ torch's"]
    about = [f"Kernels and memory counted on {source(cpu, 'counts', counts)}"]
    about += [f"Timed on {source(folder, name, results)}" for (folder, name), results in timed.items()]
    return f"{markdown(columns, lines)}\n\n" + "\n".join(about)


def pairs_table(pairs, folder):
    """Peak memory and time of SigLIP over the number of pairs."""
    by = {(row["pairs"], row["provider"]): row for row in pairs["rows"]}
    lines = []
    for size in dict.fromkeys(row["pairs"] for row in pairs["rows"]):
        theirs, ours = by[size, "torch"], by[size, "ours"]
        ratio = ours["peak MiB"] / theirs["peak MiB"]
        seconds = f"{theirs['milliseconds']:.0f} → {ours['milliseconds']:.0f}"
        lines.append((size, f"{theirs['peak MiB']:.0f} → {ours['peak MiB']:.0f}", f"{ratio:.2f}", seconds))
    columns = ("pairs", "peak MiB, plain formula → ours", "ours ÷ plain", "ms, forward + backward")
    about = f"Features of width {pairs['width']}, fp32, chunks of {pairs['chunk_size']}, above the features themselves"
    return f"{markdown(columns, lines, right=columns)}\n\n{about}: {source(folder, 'pairs', pairs)}"


def gpu_table(folders):
    """The speed on each GPU that has been measured."""
    tables = []
    for folder in folders:
        if speed := record.read(folder, "speed"):
            tables.append(
                f"{speed_table(speed, folder)}\n\n![speed over size]({(folder / 'speed.png').relative_to(record.ROOT)})"
            )
    return "\n\n".join(tables) or "Not measured yet: no GPU has run the suite."


def update_readme(name, text):
    """Replace what stands between the markers of `name`."""
    begin, end = f"<!-- {name}: written by `make figures` -->", f"<!-- end of {name} -->"
    content = record.README.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"README.md must have each of {begin} and {end} once")
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    record.README.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content))


DRAWINGS = {"accuracy": (draw_errors, draw_sigmoid), "speed": (draw_speed,), "host": (draw_host,)}
TABLES = {
    "accuracy": accuracy_table,
    "speed": speed_table,
    "host": host_table,
    "code": code_table,
    "vanishing": vanishing_table,
    "watch": watch_table,
    "pairs": pairs_table,
}


def main() -> int:
    folders = sorted(path for path in record.RESULTS.iterdir() if path.is_dir())
    for folder in folders:
        for name, drawings in DRAWINGS.items():
            if results := record.read(folder, name):
                for draw in drawings:
                    draw(results, folder)
        if results := record.read(folder, "vanishing"):
            for path in vanishing.draw_all(results, folder):
                print(f"drew {path.relative_to(record.ROOT)}")
        if (folder / "train" / "train.json").exists():
            from . import train

            for path in train.draw_all(json.loads((folder / "train" / "train.json").read_text()), folder / "train"):
                print(f"drew {path.relative_to(record.ROOT)}")
    for name, table in TABLES.items():
        folder = record.RESULTS / ("code" if name == "code" else "cpu")
        if results := record.read(folder, name):
            update_readme(name, table(results, folder))
    gpus = [folder for folder in folders if folder.name not in ("cpu", "code")]
    update_readme("gpu", gpu_table(gpus))
    if (record.RESULTS / "cpu" / "counts.json").exists():
        update_readme("operators", operators_table(record.RESULTS / "cpu", gpus))
    print("updated the tables of README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
