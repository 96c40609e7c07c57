"""Times of our operators over those of torch's formula, in each way to run them on a CPU: eager, compiled and exported.

eager      fp32 and bf16, 2¹⁰, 2¹⁶ and 2²⁰ elements; forward, and forward and backward
compiled   torch.compile(fullgraph=True) with Inductor: 2²⁰ and 2²² elements; static shapes, and dynamic ones at 2²⁰
exported   torch.export.export(...).module() under no_grad, 2²⁰ elements: forward

Ours and torch's take turns in each round. A row holds both medians, their ratio, and the 20 % and 80 % quantiles of the rounds'
own ratios. After the last row all are measured again, with the same compiled code: `again` is the second ratio, `noise` how far
the two are apart. Rows of operators and ways that are not measured stay in the file, each with its date and commit, if device
and torch are the same. Inductor takes the number of threads at run time here, so that it compiles once for all of them. SigLIP
is left out: `pairs` times it.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import record
from .graphs import CPU, Call, each_case
from .operators import Operator, Provider
from .speed import Case, build, compare, measure, powers_of_two, prepare, truth, value_and_gradients

DTYPES = (torch.float32, torch.bfloat16)
STATIC, DYNAMIC = "static", "dynamic"
SIZES = {"eager": powers_of_two(10, 16, 20), "compiled": powers_of_two(20, 22), "exported": powers_of_two(20)}
DYNAMIC_SIZE = 1 << 20
# Few, because there are hundreds of rows.
ROUNDS = 11
MODES = {"eager": ("forward", "both"), "compiled": ("forward", "both"), "exported": ("forward",)}
_numbers = itertools.count()


class Variant(NamedTuple):
    """What is compiled once and checked once; it has a row for each mode and number of threads."""

    way: str
    shapes: str
    operator: str
    case: Case


def variants(ways, names) -> Iterator[Variant]:
    for name, way, dtype in itertools.product(names, ways, DTYPES):
        for n in SIZES[way]:
            for shapes in (STATIC, DYNAMIC) if way == "compiled" and n == DYNAMIC_SIZE else (STATIC,):
                yield Variant(way, shapes, name, Case(dtype, "dense", n))


def alone(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` behind code of its own: torch.compile keeps what it compiles with a function's code, and limits how much."""

    def call(*operands):
        return function(*operands)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(_numbers)}")
    return call


def in_its_way(variant: Variant, function: Callable[..., Tensor], operands) -> Callable[..., Tensor]:
    if variant.way == "compiled":
        return torch.compile(alone(function), fullgraph=True, dynamic=variant.shapes == DYNAMIC)
    if variant.way == "exported":
        return torch.export.export(Call(function), tuple(operands)).module()
    return function


class Prepared:
    """A variant's functions, torch's formula and ours, compiled and checked."""

    def __init__(self, variant: Variant, operator: Operator):
        self.variant = variant
        self.operator = operator
        self.modes = MODES[variant.way]
        operands, grad = self.build()
        true = truth(operator, operands, grad)
        self.functions = {}
        for label, provider in operator.providers.items():
            function = self.functions[label] = in_its_way(variant, provider.function, operands)
            name = f"{variant.operator} by {label}, {variant.way}, {variant.shapes}"
            with torch.no_grad():
                compare(name, variant.case, [function(*operands)], true)
            if "both" in self.modes:
                compare(name, variant.case, value_and_gradients(function, operator.leaves(operands), grad), true)

    def build(self):
        torch.manual_seed(0)
        return build(self.operator, self.variant.case, CPU)

    def samples(self, mode: str, rounds: int) -> dict[str, list[float]]:
        buffers = [self.build()]
        runs = {label: prepare(self.operator, Provider(function), mode, buffers) for label, function in self.functions.items()}
        with torch.set_grad_enabled(mode == "both"):
            return measure(runs, CPU, rounds)


def row_of(variant: Variant, threads: int, mode: str, samples: dict[str, list[float]]) -> dict:
    (torchs, *_), (ours, *_) = (record.quantiles(samples[label]) for label in ("torch", "ours"))
    _, low, high = record.quantiles([own / other for own, other in zip(samples["ours"], samples["torch"])])
    return {
        "operator": variant.operator,
        "way": variant.way,
        "shapes": variant.shapes,
        "threads": threads,
        "mode": mode,
        "dtype": record.short(variant.case.dtype),
        "n": variant.case.n,
        "torch, microseconds": round(1e6 * torchs, 3),
        "ours, microseconds": round(1e6 * ours, 3),
        "ratio": round(ours / torchs, 3),
        "20 %": round(low, 3),
        "80 %": round(high, 3),
    }


def run(names, ways, threads, rounds=ROUNDS, repeat=2, seconds=math.inf) -> tuple[list[dict], list[str]]:
    """All rows, and the variants that would have begun after `seconds`."""
    table, default, end = dict(each_case()), torch.get_num_threads(), time.monotonic() + seconds
    skipped, prepared, rows = [], [], {}
    torch.set_num_threads(max(threads))
    for variant in record.progress(variants(ways, names), "ways: compile and check"):
        if time.monotonic() > end:
            skipped.append(f"{variant.operator}, {variant.way}, {variant.shapes}, {variant.case}")
            continue
        # dynamic=True makes symbols of numbers, too; here shapes alone are dynamic.
        with torch._dynamo.config.patch(specialize_float=True), torch._inductor.config.patch({"cpp.dynamic_threads": True}):
            prepared.append(Prepared(variant, table[variant.operator]))
    for number in range(1, repeat + 1):
        for each in record.progress(prepared, f"ways: measure, {number} of {repeat}"):
            for n_threads, mode in itertools.product(threads if each.variant.way != "exported" else threads[:1], each.modes):
                torch.set_num_threads(n_threads)
                row = row_of(each.variant, n_threads, mode, each.samples(mode, rounds))
                first = rows.setdefault((each.variant, n_threads, mode), row)
                if first is not row:
                    noise = max(first.get("noise", 0.0), round(abs(row["ratio"] - first["ratio"]), 3))
                    first |= {"again": row["ratio"], "noise": noise}
    torch.set_num_threads(default)
    return list(rows.values()), skipped


def updated(before: dict | None, rows: list[dict], about: dict) -> list[dict]:
    """The rows, after those of a file that was there before and that they do not replace."""
    rows = [row | {"date": about["date"], "commit": about["commit"]} for row in rows]
    same = before and all(before["environment"][key] == about[key] for key in ("device", "torch"))
    measured = {(row["operator"], row["way"]) for row in rows}
    kept = [row for row in before["rows"] if (row["operator"], row["way"]) not in measured] if same else []
    order = list(itertools.product((name for name, _ in each_case()), SIZES))
    return sorted(kept + rows, key=lambda row: order.index((row["operator"], row["way"])))
