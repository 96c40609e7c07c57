"""Draw every figure, and write every table of benchmarks/README.md between its markers.

Measures nothing: it reads the files under benchmarks/results/, and a second run changes nothing. Writes the .png files beside
the results that they show. Takes about ten seconds.
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from . import gpu_tables, train
from .measure import record, soak, speed
from .measure import versions as tested_versions
from .measure.operators import ORDERS, operators
from .tables import Table, pivot, source, where
from .training import boundary, vanishing

STYLES = {"torch": "-", "torch.compile": ":", "ours, output": "--", "ours, input": "-.", "naive Triton": (0, (1, 3))}
DTYPES = ("fp32", "bf16", "fp16")
# The dtypes and sizes at which the page shows the gates' and losses' times; SigLIP's are 256 and 1024 pairs, on a GPU 4096.
SHOWN_ON_CPU, SHOWN_ON_GPU = (("fp32", 1 << 16), ("fp32", 1 << 20)), (("bf16", 1 << 24), ("bf16", 1 << 26))
SHOWN_OF_SIGLIP_ON_CPU, SHOWN_OF_SIGLIP_ON_GPU = (("fp32", 1 << 16), ("fp32", 1 << 18)), (("bf16", 1 << 20),)
# At which size the page shows our times eager, compiled and exported, and what compiled training may take of torch's time.
SHOWN_OF_WAYS, TARGET_COMPILED = 1 << 20, 1.10
NOT_MEASURED = "not measured yet"


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
    record.save_figure(figure, folder / "gradient_errors.png")


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
    record.save_figure(figure, folder / "sigmoid.png")


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
            panel.plot([row["n"] for row in own], values, linestyle=STYLES.get(provider, "-"), marker=".", label=provider)
        if gpu:
            limit = {row["n"]: row["GB/s"] / row["of a copy"] for row in chosen if row.get("of a copy")}
            panel.plot(limit.keys(), limit.values(), color="grey", linewidth=0.8, label="device-to-device copy")
        panel.set(xscale="log", xlabel="elements", title=f"{mode}, {dtype}", ylabel="GB/s" if gpu else "time / torch")
        if not gpu:
            panel.set_ylim(bottom=0)
    grid[0][0].legend(fontsize="small")
    figure.suptitle(f"{speed['environment']['device']}, torch {speed['environment']['torch']}")
    record.save_figure(figure, folder / "speed.png")


def shown_ways(ways: dict) -> list[dict]:
    """The rows that the page shows: a training step, or the forward of what is exported, at one size with static shapes."""
    rows = where(ways, n=SHOWN_OF_WAYS, shapes="static")
    return [row for row in rows if row["mode"] == "both" or row["way"] == "exported"]


def draw_ways(ways, folder):
    """Our time over torch's for every operator, on the least number of threads."""
    threads = min(row["threads"] for row in ways["rows"])
    rows = [row for row in shown_ways(ways) if row["threads"] == threads]
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True, sharey=True)
    for panel, dtype in zip(panels, ("fp32", "bf16")):
        for (way, mode), marker in zip(dict.fromkeys((row["way"], row["mode"]) for row in rows), "osD"):
            own = [row for row in rows if (row["way"], row["dtype"]) == (way, dtype)]
            label = f"{way}, {'forward + backward' if mode == 'both' else mode}"
            panel.plot([row["ratio"] for row in own], [row["operator"] for row in own], marker, label=label)
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.axvline(TARGET_COMPILED, color="grey", linewidth=0.8, linestyle="--", label=f"{TARGET_COMPILED:.2f}")
        panel.set(title=dtype, xlabel="time / torch", xscale="log", xticks=(0.5, 1, 2, 4), xticklabels=("0.5", "1", "2", "4"))
        panel.minorticks_off()
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    about = ways["environment"]
    figure.suptitle(f"{about['device']}, torch {about['torch']}, 2²⁰ elements, threads: {threads}")
    record.save_figure(figure, folder / "ways.png")


def draw_host(host, folder):
    rows = [row for row in where(host, operator="sigmoid") if row["what"] in ("layer", "graph")]
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
    record.save_figure(figure, folder / "host.png")


def percent(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.2g} %" if value < 0.995 else "**100 %**"


def accuracy_lines(accuracy: dict) -> list[dict]:
    def line(row):
        errors = {key.removeprefix("error at "): percent(row[key]) for key in row if key.startswith("error at ")}
        at = ", ".join(f"{x}: {error}" for x, error in errors.items())
        return row | {"largest": percent(row["largest relative error"]), "at": at}

    return [line(row) for row in accuracy["rows"]]


def code_lines(code: dict) -> list[dict]:
    """The kernels for an odd n, whose code has a tail."""
    kernels = ("forward", "backward-from-output", "backward-from-input")
    rows = where(code, target="sm_90")
    return [row for row in rows if row["operator"] in kernels and row["dtype"] in DTYPES and row["n"] % 16]


def executed_lines(executed: dict) -> list[dict]:
    """What each order moves and issues, over the ideal and the budget; an order that launches no kernel is left out."""

    def ratios(line, dtype, over, under):
        rows = [line[key] for order in ORDERS if (key := f"{dtype} {order}") in line]
        return " / ".join(f"{row[over] / row[under]:.2f}" for row in rows)

    lines = pivot(executed["rows"], "operator", "dtype", "order")
    for line in lines:
        for dtype in ("fp32", "bf16"):
            line[f"bytes {dtype}"] = ratios(line, dtype, "bytes per element", "ideal bytes")
            line[f"instructions {dtype}"] = ratios(line, dtype, "instructions per element", "budget")
    return lines


def memory_lines(memory: dict) -> list[dict]:
    """One line for each of our functions: under each dtype, the bytes that torch's keeps and those that ours keeps."""
    saved = {(row["operator"], row["provider"], row["dtype"]): row["saved"] for row in memory["rows"]}
    lines = {}
    for (operator, provider, dtype), ours in saved.items():
        if provider.startswith("ours"):
            name = operator + provider.removeprefix("ours")
            lines.setdefault(name, {"operator": name})[dtype] = saved[operator, "torch", dtype], ours
    return list(lines.values())


def saturated_lines(results: dict) -> list[dict]:
    rows = [row for row in vanishing.saves(results["rows"]) if row["initialisation"] == "saturated"]
    first_step = "first step: "
    lines = [{key.removeprefix(first_step): value for key, value in row.items()} for row in rows]
    return [line | {"lost": percent(line["lost to rounding"])} for line in lines]


def pairs_lines(pairs: dict) -> list[dict]:
    lines = pivot(pairs["rows"], "pairs", "provider")
    return [line | {"ratio": line["ours"]["peak MiB"] / line["torch"]["peak MiB"]} for line in lines]


def distributed_lines(distributed: dict) -> list[dict]:
    """A line for each command: under each task, the largest difference of its losses in float64 and float32."""
    lines, tasks = {}, {row["task"] for row in distributed["rows"]}
    for row in distributed["rows"]:
        line = lines.setdefault((row["what"], row["engine"], row["processes"]), dict.fromkeys(tasks, ""))
        line |= {key: row[key] for key in ("what", "engine", "processes", "seconds with starts")}
        line["held"] = max(line.get("held", 0.0), row["parameters held"])
        line[row["task"]] = " / ".join(filter(None, [line[row["task"]], f"{row['largest loss difference']:.0e}"]))
    return list(lines.values())


def shards_lines(shards: dict) -> list[dict]:
    """A line for each operator: what torch's formula and ours do in two processes, under each placement of three rows."""

    def cell(row):
        if "refused" in row:
            return "refused"
        counts = ("+".join(str(row[f"{order} {what}"]) for order in ORDERS[:2]) for what in ("collectives", "operators"))
        return ", ".join(counts) + (" **wrong**" if not row["error"] <= 1e-12 else "")

    lines = pivot(where(shards, mesh="2", rows=3), "operator", "placement", "provider")
    for line in lines:
        for placement in ("S(0)", "S(1)", "R", "P(sum)"):
            line[placement] = " → ".join(cell(line[f"{placement} {provider}"]) for provider in ("torch", "ours"))
    return lines


def models_lines(models: dict) -> list[dict]:
    def line(row):
        name = f"{row['library']}: {row['model']}"
        difference = f"{row['loss difference']:.1e}" if row["loss difference"] else "0"
        kept = {"kept": "", "saved": ""}
        if "saved" in row:
            before, after = (f"{row[f'bytes kept, {whose}'] / 2**20:.2f}" for whose in ("torch", "ours"))
            kept = {"kept": f"{before} → {after}", "saved": f"{100 * row['saved']:.1f} %"}
        return row | kept | {"name": name, "difference": difference}

    return [line(row) for row in models["rows"]]


def ways_lines(ways: dict) -> list[dict]:
    """A line for each operator: the ratios in each way and dtype with one number of threads after another."""
    lines = {}
    for row in shown_ways(ways):
        cells = lines.setdefault(row["operator"], {})
        cells.setdefault(f"{row['way']} {row['dtype']}", []).append(f"{row['ratio']:.2f}")
    empty = {f"{way} {dtype}": [NOT_MEASURED] for way in speed.WAYS for dtype in ("fp32", "bf16")}

    def line(name, cells):
        rows = where(ways, operator=name)
        compiled = [row["ratio"] for row in rows if (row["way"], row["mode"]) == ("compiled", "both")]
        cells = {key: " / ".join(ratios) for key, ratios in (empty | cells).items()}
        largest = f"{max(compiled):.2f}" if compiled else NOT_MEASURED
        noise = max(row.get("noise", 0.0) for row in shown_ways(ways | {"rows": rows}))
        return cells | {"operator": name, "largest": largest, "noise": noise}

    return [line(*each) for each in lines.items()]


def versions_lines(versions: dict) -> list[dict]:
    """A line for each environment: under each way what passed, failed and was skipped."""
    rows = [row | {"versions": f"{row['torch']} | {row['triton']} | {row['python']}"} for row in versions["rows"]]
    lines = pivot(rows, "versions", "way")
    for line in lines:
        for way in tested_versions.WAYS:
            line[way] = "{passed} / {failed} / {skipped}".format_map(line[way]) if way in line else NOT_MEASURED
    return lines


def graphs_lines(graphs: dict) -> list[dict]:
    lines = pivot(graphs["rows"], "operator", "provider")
    for line in lines:
        in_onnx = [line[label].get("onnx", NOT_MEASURED) for label in ("torch", "ours")]
        line["onnx"] = " → ".join(map(str, dict.fromkeys(in_onnx) if NOT_MEASURED in in_onnx else in_onnx))
    return lines


def soak_lines(results: dict) -> list[dict]:
    """By how much each count of a call has grown, on one path after the other."""
    lines = {}
    for row in results["rows"]:
        for count, grown in soak.growth(row).items():
            lines.setdefault(row["what"], {}).setdefault(count, []).append(f"{grown:+}" if grown else "0")
    return [{"what": what} | {count: " / ".join(line.get(count, [])) for count in soak.ALLOWED} for what, line in lines.items()]


TABLES = {
    "versions": Table(
        "versions",
        "torch | Triton | Python | plain | interpreter | ptx",
        "{versions} | {plain} | {interpreter} | {ptx}",
        "Tests passed / failed / skipped: {environment[device]}, {environment[date]}; [the numbers](results/versions.csv).",
        versions_lines,
        n_labels=3,
    ),
    "accuracy": Table(
        "cpu/accuracy",
        "dtype | gradient by | lost (exactly 0) | more than 1 % off | largest error | at x = …",
        "{dtype} | {provider} | {flushed to 0} of {inputs} | {over 1 %} | {largest} | {at}",
        "Measured on path {environment[path]}: {source}",
        accuracy_lines,
        n_labels=2,
    ),
    "imports": Table(
        "cpu/imports",
        "import | median (20 % to 80 %) | ÷ torch",
        "`{import}` | {milliseconds} ms ({20 %} to {80 %}) | {time / torch}",
        "Measured on {source}",
    ),
    "intercept": Table(
        "cpu/intercept",
        "what | median µs (20 % to 80 %) | ÷ forward",
        "{what} | {microseconds:.0f} ({20 %:.0f} to {80 %:.0f}) | {time / forward:.3f}",
        "A model of {layers} small layers, none of them covered: {source}",
    ),
    "host": Table(
        "cpu/host",
        "layer | fp32 | ÷ torch | bf16 | ÷ torch",
        "{provider} | {fp32[microseconds]:.1f} µs | {fp32[time / torch]:.2f} "
        "| {bf16[microseconds]:.1f} µs | {bf16[time / torch]:.2f}",
        "Measured on a {source}",
        lambda results: pivot(where(results, operator="sigmoid", what="layer"), "provider", "dtype"),
    ),
    "code": Table(
        "code/code",
        "kernel on sm_90, n odd | dtype | instructions per element | registers | spills",
        "{operator} | {dtype} | {instructions per element} | {registers} | {spills}",
        "Read off the machine code: {source}",
        code_lines,
        n_labels=2,
    ),
    "executed": Table(
        "code/executed",
        "operator | bytes ÷ ideal, fp32 | bytes ÷ ideal, bf16 | instructions ÷ budget, fp32 | instructions ÷ budget, bf16",
        "`{operator}` | {bytes fp32} | {bytes bf16} | {instructions fp32} | {instructions bf16}",
        "Forward / backward / double backward, {source}",
        executed_lines,
    ),
    "memory": Table(
        "cpu/memory",
        "operator | fp32, torch → ours | bf16, torch → ours",
        "`{operator}` | {fp32[0]:.4g} → {fp32[1]:.4g} | {bf16[0]:.4g} → {bf16[1]:.4g}",
        "Bytes per element, {source}",
        memory_lines,
    ),
    "distributed": Table(
        "cpu/distributed",
        "what happens | engine | processes | part of the parameters in each | transformer | `replace`d | BCE | focal | SigLIP "
        "| seconds",
        "{what} | {engine} | {processes} | {held:.2f} | {transformer} | {replaced} | {bce} | {focal} | {siglip} "
        "| {seconds with starts:.0f}",
        "Largest difference of a loss, in float64 / float32 or in one of them; seconds with the start of the processes, whose "
        "number of threads is 1: {source}",
        distributed_lines,
        n_labels=2,
    ),
    "shards": Table(
        "cpu/shards",
        "operator | Shard(0) | Shard(1) | Replicate | Partial",
        "`{operator}` | {S(0)} | {S(1)} | {R} | {P(sum)}",
        "Collectives, local operators, each in forward+backward; torch's formula → ours, three rows on two processes: {source}",
        shards_lines,
    ),
    "vanishing": Table(
        "cpu/vanishing",
        "activation | precision | initialisation | learns up to depth | stops at depth",
        "{activation} | {precision} | {initialisation} | {learns up to depth} | {stops at depth}",
        lines=lambda results: vanishing.summary(results["rows"]),
        n_labels=3,
    ),
    "saturated": Table(
        "cpu/vanishing",
        "saturated layers | precision | activation | accuracy | gradient entering the last | leaving the first "
        "| lost to rounding",
        "{depth} | {precision} | {activation} | {accuracy:.3f} | {gradient entering the last layer:.2g} "
        "| {gradient leaving the first layer:.2g} | {lost}",
        lines=saturated_lines,
        n_labels=3,
    ),
    "watch": Table(
        "cpu/watch",
        "watch | µs a step | overhead",
        "{watch} | {microseconds a step:.0f} | {overhead %:+.1f} %",
        "{rows[0][layers]} hidden layers of width {rows[0][width]}, batches of {rows[0][batch]}: {source}",
    ),
    "soak": Table(
        "cpu/soak",
        "what is called | objects | tensors | blocks | cached answers | kept launches | resident MiB",
        "{what} | {objects} | {tensors} | {blocks} | {cached} | {launches} | {MiB}",
        "{rows[0][calls]:,} calls, after the first {settled}, on the CPU's path / on a stub of a GPU: {source}",
        soak_lines,
    ),
    "models": Table(
        "models/models",
        "model | became ours | largest relative loss difference | MiB kept for backward, torch → ours | saved "
        "| time of a step ÷ torch's",
        "{name} | {became ours} | {difference} | {kept} | {saved} | {time / torch:.2f}",
        "{steps} AdamW steps each, in fp32; transformers {environment[transformers]}, timm {environment[timm]}, "
        "torchvision {environment[torchvision]}, diffusers {environment[diffusers]}, open_clip {environment[open_clip]}: "
        "{source}",
        models_lines,
        n_labels=2,
    ),
    "ways": Table(
        "cpu/ways",
        "operator | eager, fp32 | eager, bf16 | compiled, fp32 | compiled, bf16 | exported, fp32 | exported, bf16 "
        "| largest of all compiled | noise",
        "`{operator}` | {eager fp32} | {eager bf16} | {compiled fp32} | {compiled bf16} | {exported fp32} | {exported bf16} "
        "| {largest} | {noise:.2f}",
        "Time over that of torch's formula, on {environment[threads]} threads, 2²⁰ elements, static shapes: {source}",
        ways_lines,
    ),
    "graphs": Table(
        "cpu/graphs",
        "operator | transcendental operators | divisions | bytes kept an element, fp32 | bf16 | exported operators | in ONNX",
        "`{operator}` | {torch[transcendental]} → {ours[transcendental]} | {torch[divisions]} → {ours[divisions]} "
        "| {torch[saved, fp32]:.4g} → {ours[saved, fp32]:.4g} | {torch[saved, bf16]:.4g} → {ours[saved, bf16]:.4g} "
        "| {torch[exported]} → {ours[exported]} | {onnx}",
        "Torch's formula → ours: {source}",
        graphs_lines,
    ),
    "pairs": Table(
        "cpu/pairs",
        "pairs | peak MiB, plain formula → ours | ours ÷ plain | ms, forward + backward",
        "{pairs} | {torch[peak MiB]:.0f} → {ours[peak MiB]:.0f} | {ratio:.2f} "
        "| {torch[milliseconds]:.0f} → {ours[milliseconds]:.0f}",
        "Features of width {width}, fp32, above the features themselves: {source}",
        pairs_lines,
        n_labels=0,
    ),
}


def speed_table(results: dict, folder: Path) -> str:
    """Our time over torch's at each size, in every dtype and mode that was measured."""
    rows = [row for row in where(results, layout="dense") if row["provider"].startswith("ours")]
    heads = {f"{row['dtype']} {row['provider']} {row['mode']}": "{provider}, {dtype} {mode}".format_map(row) for row in rows}
    header, row = " | ".join(["elements", *heads.values()]), " | ".join(["{n:,}", *(f"{{{key}}}" for key in heads)])
    lines = [
        {"n": line["n"]} | {key: f"{line[key]['time / torch']:.2f}" if key in line else "" for key in heads}
        for line in pivot(rows, "n", "dtype", "provider", "mode")
    ]
    caption = "Time over torch.nn.Sigmoid's, {source}"
    return Table("speed", header, row, caption, lambda results: lines, n_labels=0).write(results, folder)


def operators_table(cpu: Path, gpus: list[Path]) -> str:
    """What each operator launches and keeps, and its time over torch's on the CPU and on every GPU."""
    files = [name for family, name in speed.FILES.items() if family != "sigmoid"]
    timed = {(folder, name): results for folder in (cpu, *gpus) for name in files if (results := record.read(folder, name))}
    measured = {folder: results["environment"]["device"] for (folder, _), results in timed.items() if folder != cpu}

    def times(folder, operator, shown, shown_of_siglip):
        """Our time over torch's, forward and backward, at the dtypes and sizes shown."""
        family = operators()[operator].family
        rows = where(timed.get((folder, speed.FILES[family]), {"rows": []}), operator=operator, provider="ours", mode="both")
        ratios = {(row["dtype"], row["n"]): f"{row['time / torch']:.2f}" for row in rows}
        keys = shown_of_siglip if family == "siglip" else shown
        return " / ".join(ratios.get(key, NOT_MEASURED) for key in keys) if ratios else NOT_MEASURED

    def lines(counts):
        for line in pivot(counts["rows"], "operator", "provider"):
            name = line["operator"]
            on_gpus = [times(folder, name, SHOWN_ON_GPU, SHOWN_OF_SIGLIP_ON_GPU) for folder in measured] or [NOT_MEASURED]
            on_cpu = times(cpu, name, SHOWN_ON_CPU, SHOWN_OF_SIGLIP_ON_CPU)
            yield line | {"formula": operators()[name].written, "times": " | ".join([on_cpu, *on_gpus])}

    launched, launched_by_ours = (" / ".join(f"{{{who}[{order}]}}" for order in ORDERS) for who in ("torch", "ours"))
    on_gpus = [f"{device}, time ÷ torch's, bf16, 2²⁴ / 2²⁶ elements" for device in measured.values()] or ["GPU, time ÷ torch's"]
    table = Table(
        "cpu/counts",
        "operator | formula | kernels forward / backward / double backward, torch → ours "
        "| saved, in tensors of the output's size (a loss's: of the logits'), torch → ours "
        f"| CPU, time ÷ torch's, forward + backward, fp32, 2¹⁶ / 2²⁰ elements | {' | '.join(on_gpus)}",
        f"`{{operator}}` | {{formula}} | {launched} → {launched_by_ours} "
        "| {torch[saved]:.4g} → {ours[saved]:.4g} | {times}",
        "\n".join(
            ["Kernels and memory counted on {source}"]
            + [f"Timed on {source(folder, name, results)}" for (folder, name), results in timed.items()]
        ),
        lines,
        n_labels=2,
    )
    return table.write(record.read(cpu, "counts"), cpu)


def update_page(name: str, text: str) -> None:
    """Replace what stands between the markers of `name`."""
    begin, end = f"<!-- {name}: written by `make figures` -->", f"<!-- end of {name} -->"
    content = record.README.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{record.README} must have each of {begin} and {end} once")
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    record.README.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content))


# What is drawn from each file of results; a drawing gets the results and the folder for the figure. Of a GPU, its speed alone.
DRAWINGS = {
    "speed": (draw_speed,),
    "accuracy": (draw_errors, draw_sigmoid),
    "ways": (draw_ways,),
    "host": (draw_host,),
    "vanishing": (vanishing.draw_all,),
    "train/train": (train.draw_all,),
    "train/boundary": (boundary.draw,),
}


def main(argv=None) -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    folders = sorted(path for path in record.RESULTS.iterdir() if path.is_dir())
    cpu, gpus = record.RESULTS / "cpu", [folder for folder in folders if folder.name not in ("cpu", "code", "models")]
    for folder in folders:
        for name, drawings in DRAWINGS.items():
            if (folder not in gpus or name == "speed") and (results := record.read(folder, name)):
                for draw in drawings:
                    draw(results, (folder / name).parent)
    for name, table in TABLES.items():
        folder, _, file = table.file.rpartition("/")
        if results := record.read(record.RESULTS / folder, file):
            update_page(name, table.write(results, record.RESULTS / folder))
    if results := record.read(cpu, "speed"):
        update_page("speed", speed_table(results, cpu))
    update_page("gpu", gpu_tables.write(gpus))
    update_page("operators", operators_table(cpu, gpus))
    print(f"wrote the tables of {record.README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
