"""Models of transformers, timm, torchvision, diffusers and open_clip, trained as they are and after `replace`.

Each model is small and random, and nothing is downloaded. It is trained for 20 steps of AdamW twice, from one seed and on the
same batches: as it is, and with what `torch_sigmoid.replace` makes of it. The part says what became ours, how far the losses
differ, what is kept for backward, and the time of a step on one thread of a CPU, where steps take turns.

Fails if a model does not become what it must, if a loss differs by more than 1e-5 of itself (1e-3 in a model with a batch norm,
which divides by a spread that may be small), if Llama saves less than 10 % of the bytes kept for backward or GPT-OSS less than
30 %, or if a model without anything to replace is not told so.

`make models` installs the libraries into an environment of their own. Where they are not installed, the part is skipped.
Writes models.csv and .json. Takes about five minutes.
"""

import collections
import importlib.util
import os
import sys
import time
import warnings

import torch

import torch_sigmoid
from torch_sigmoid.swap import Report

from . import record, zoo
from .speed import CPU_THREADS

STEPS = 20
TOLERANCE, TOLERANCE_WITH_BATCH_NORM = 1e-5, 1e-3
NOTHING = "nothing to replace"


class Training:
    """A model with its optimizer, the same for the same case."""

    def __init__(self, case: zoo.Case):
        torch.manual_seed(0)
        self.loss, self.rate, self.model = case.loss, case.rate, case.build().train()
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def start(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.rate)

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        start = time.perf_counter()
        loss = self.loss(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def replaced(training: Training) -> tuple[Report, list[str]]:
    """Replace the model; what became of it, and the warnings that there was nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch_sigmoid.replace(training.model)
    told = [str(each.message) for each in caught if str(each.message).startswith("replace()")]
    if told:
        return torch_sigmoid.report(training.model), told
    torch.manual_seed(0)
    return torch_sigmoid.report(training.model, forward=lambda: training.loss(training.model)), told


def changes(report: dict) -> str:
    """What became ours, as `LlamaMLP → swiglu (2), SiLUActivation → silu, gated (2)`."""
    counts = collections.Counter()
    for each in report["replaced"]:
        counts[f"{each['type']} → {each['became']}"] += len(each["names"])
    return "; ".join(f"{change} × {count}" for change, count in counts.items())


def measure(case: zoo.Case) -> dict:
    """A row: what became of a model, and both trainings of it."""
    plain, ours = Training(case), Training(case)
    report, told = replaced(ours)
    described = report.to_dict()
    row = {
        "library": case.library,
        "model": case.name,
        "became ours": changes(described) or (NOTHING if told else ""),
        "operators": ", ".join(sorted({name for each in described["replaced"] for name in each["became"].split(", ")})),
        "left": sum(len(each["names"]) for each in described["left"]),
        "batch norm": any(isinstance(each, torch.nn.modules.batchnorm._BatchNorm) for each in plain.model.modules()),
    }
    for training in (plain, ours):
        training.start()
    for step in range(STEPS):
        for training in (plain, ours) if step % 2 else (ours, plain):
            training.step(step)
    differences = [abs(mine / theirs - 1) for theirs, mine in zip(plain.losses, ours.losses)]
    row |= {"first loss": plain.losses[0], "last loss": plain.losses[-1], "loss difference": max(differences)}
    if report.saved_bytes:
        before, after = report.saved_bytes
        row |= {"bytes kept, torch": before, "bytes kept, ours": after, "saved": round(1 - after / before, 4)}
    theirs, mine = (record.quantiles(training.seconds)[0] for training in (plain, ours))
    return row | {
        "ms a step, torch": round(1e3 * theirs, 2),
        "ms a step, ours": round(1e3 * mine, 2),
        "time / torch": round(mine / theirs, 3),
    }


def faults(case: zoo.Case, row: dict) -> list[str]:
    """What in a row is not as it must be."""
    found = []
    missing = sorted({*case.becomes} - {*row["operators"].split(", ")})
    if missing:
        found.append(f"{', '.join(missing)} did not come into it; became ours: {row['became ours'] or 'nothing'}")
    if not case.becomes and row["became ours"] != NOTHING:
        found.append(f"replace should have said that there is nothing to replace; became ours: {row['became ours']}")
    tolerance = TOLERANCE_WITH_BATCH_NORM if row["batch norm"] else TOLERANCE
    if not row["loss difference"] <= tolerance:
        found.append(f"a loss differs by {row['loss difference']:.2g} of itself, more than {tolerance:g}")
    if row.get("saved", 0.0) < case.saves:
        found.append(f"it saves {row.get('saved', 0.0):.1%} of the bytes kept for backward, less than {case.saves:.0%}")
    return [f"{case.library}, {case.name}: {fault}" for fault in found]


def missing_libraries() -> list[str]:
    return [name for name in zoo.LIBRARIES if importlib.util.find_spec(name) is None]


@record.reporting
def main(argv=None) -> int:
    parser = record.parser("models", __doc__, device=False, out=record.RESULTS / "models")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="only models whose library or name has one of these words in it"
    )
    arguments = parser.parse_args(argv)
    if missing := missing_libraries():
        print(f"models: skipped, {', '.join(missing)} not installed here; `make models` installs what it needs and runs it")
        return 0
    # Before transformers is imported: it asks no server for anything, and does not tell which kernels would be faster.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    torch.set_num_threads(CPU_THREADS)
    chosen = [
        case
        for case in zoo.cases()
        if not arguments.only or any(word.lower() in f"{case.library} {case.name}".lower() for word in arguments.only)
    ]
    rows, wrong = [], []
    for case in record.progress(chosen, "models, trained twice"):
        try:
            row = measure(case)
        except Exception as error:
            wrong.append(f"{case.library}, {case.name}: {type(error).__name__}: {error}")
            continue
        rows.append(row)
        wrong += faults(case, row)
    if rows:
        columns = ["library", "model", "became ours", "loss difference", "saved", "time / torch"]
        record.show(f"{STEPS} AdamW steps, as it is and replaced", rows, columns)
    if wrong:
        raise record.WrongResultError("\n".join(wrong))
    if not arguments.only:
        about = record.environment(torch.device("cpu")) | {name: version_of(name) for name in zoo.LIBRARIES}
        record.write(arguments.out, "models", rows, about, steps=STEPS)
    return 0


def version_of(library: str) -> str:
    return importlib.import_module(library).__version__


if __name__ == "__main__":
    sys.exit(main())
