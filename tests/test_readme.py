"""The README: short, its code runs as it stands, and every figure in it is that of a file."""

import csv
import json
import re

import pytest
import torch
from pages import ROOT, blocks, run

import torch_sigmoid
from torch_sigmoid.operators import OPERATORS

README = ROOT.joinpath("README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
H100 = RESULTS.parent / "NVIDIA-H100-80GB-HBM3"
USE, LLAMA, RECIPE_LINES, WATCH = blocks("README.md")
# A sentence is found whatever its line breaks.
TEXT = " ".join(README.split())


def rows(name, folder=RESULTS):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_it_takes_two_minutes():
    assert len(README.splitlines()) <= 160


def test_what_a_gpu_has_measured_stands_on_the_first_screen():
    first_screen = " ".join("\n".join(README.splitlines()[:20]).split())
    about = json.loads((H100 / "exhaustive.json").read_text())["environment"]
    assert f"(torch {'.'.join(about['torch'].split('.')[:2])}) every fp32, fp16 and bf16 σ has torch's bits" in first_screen
    sigmoids = [row for row in rows("exhaustive", H100) if row["operator"] == "sigmoid"]
    assert {row["dtype"]: int(row["bits not torch's"]) for row in sigmoids} == {"fp32": 0, "fp16": 0, "bf16": 0}

    def ours(name, **where):
        chosen = [row for row in rows(name, H100) if row["provider"].startswith("ours")]
        return [row for row in chosen if all(row[key] == value for key, value in where.items())]

    times = {int(row["n"]): [] for row in ours("speed", layout="dense")}
    for row in ours("speed", layout="dense"):
        times[int(row["n"])].append(float(row["time / torch"]))
    assert max(max(times[n]) for n in times if n >= 1 << 26) < 1.02
    most = max(max(times[n]) for n in times if n < 1 << 26)
    assert f"torch's time from 2²⁶ elements on, and up to {most:.1f} times as long below" in first_screen
    gates = [float(row["time / torch"]) for row in ours("gates", mode="both", n=str(1 << 26))]
    assert f"gates take {min(gates):.1f} to {max(gates):.1f} times as long at 2²⁶" in first_screen


def test_the_lines_of_use_run():
    found = {}
    printed = run(USE.code, found)
    assert found["x"].grad.item() == pytest.approx(3.36e-4, rel=1e-3)
    assert type(found["model"][1]) is torch_sigmoid.Sigmoid
    assert found["model"][1].save == "input"
    assert found["model"][0].weight.grad.abs().sum() > 0
    assert printed.startswith("Path(name=")
    x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True)
    torch.sigmoid(x).backward()
    assert x.grad.item() == 0


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_llama_is_replaced_and_the_report_is_that_of_the_run():
    pytest.importorskip("transformers", reason="an extra")
    assert run(LLAMA.code, {"torch": torch, "torch_sigmoid": torch_sigmoid}) == LLAMA.printed


def test_what_replace_saves_is_measured():
    with open(RESULTS.parent / "models" / "models.csv", newline="") as file:
        models = {(row["library"], row["model"]): row for row in csv.DictReader(file)}
    three = [models[key] for key in (("transformers", "Llama"), ("transformers", "GptOss"), ("timm", "EfficientNet"))]
    llama, gpt_oss, efficient_net = (f"{100 * float(row['saved']):.1f} %" for row in three)
    times = "{:.2f}, {:.2f} and {:.2f}".format(*(float(row["time / torch"]) for row in three))
    difference = max(float(row["loss difference"]) for row in models.values())
    assert (
        f"Of [{len(models)} models](benchmarks/README.md#real-models), trained for 20 steps as they are and replaced, Llama "
        f"keeps {llama} fewer bytes for backward, GPT-OSS {gpt_oss}, EfficientNet {efficient_net}; losses differ by at most "
        f"{difference:.1e} of themselves, and a step on a CPU takes {times} times as long."
    ) in TEXT


RECIPES = {
    "c": randn(2, 5),
    "f": randn(2, 6)[:, 1:],
    "x": randn(2, 3, 4, 4),
    "s": randn(2, 3),
    "logits": randn(7),
    "target": (randn(7) > 0).float(),
    "gate": randn(4, 6),
    "up": randn(4, 6) + 1,
    "packed": randn(4, 12),
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c =", lambda c, f, **_: c * torch.sigmoid(f)),
        ("x =", lambda x, s, **_: x * torch.sigmoid(s)[:, :, None, None]),
        ("loss =", lambda logits, target, **_: torch.nn.functional.binary_cross_entropy(torch.sigmoid(logits), target)),
        ("h = torch_sigmoid.swiglu(gate, up)  ", lambda gate, up, **_: torch.nn.functional.silu(gate) * up),
        (
            "h = torch_sigmoid.swiglu_packed(packed)",
            lambda packed, **_: torch.nn.functional.silu(packed[:, :6]) * packed[:, 6:],
        ),
        (
            "h = torch_sigmoid.swiglu_packed(packed, interleaved",
            lambda packed, **_: packed[:, ::2] * torch.sigmoid(1.702 * packed[:, ::2]) * (packed[:, 1::2] + 1),
        ),
        ("torch_sigmoid.warmup", None),
    ],
)
def test_each_recipe_runs_and_computes_what_it_says(line, expected):
    (code,) = (each for each in RECIPE_LINES.code.splitlines() if each.startswith(line))
    found = {"torch": torch, "torch_sigmoid": torch_sigmoid, **RECIPES}
    run(code, found)
    if expected is not None:
        assert torch.allclose(found[line.split()[0]], expected(**RECIPES), rtol=1e-5, atol=1e-6)


def test_every_recipe_is_tested():
    assert len(RECIPE_LINES.code.splitlines()) == 7


def test_the_watch_runs():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sigmoid())

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(randn(3, 4)).sum().backward()
        optimizer.step()

    pytest.importorskip("rich")
    assert "Sigmoid" in run(WATCH.code, {"model": model, "train": train, "torch_sigmoid": torch_sigmoid})


def test_the_table_is_that_of_the_operators():
    table = README.partition("## Operators")[2].partition("\n## ")[0]
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    counted = {row["operator"]: row for row in rows("counts") if row["provider"] == "ours"}
    assert [row[:3] for row in found] == [
        [f"`{name}`", f"`{row.module.__name__}`", row.cases[""].written] for name, row in OPERATORS.items()
    ]
    for name, *_, launches, _ in found:
        # Sigmoid is not counted there: N1 and test_autograd hold it to one kernel each.
        ones = {"forward": 1, "backward": 1, "double backward": 1}
        own = ones if name == "`sigmoid`" else counted[name.strip("`")]
        assert launches == " / ".join(str(own[order]) for order in ("forward", "backward", "double backward"))


def test_what_replace_reaches_is_what_the_table_of_operators_says():
    (sentence,) = re.findall(r"makes ours the activations of torch \((.*?)\)", TEXT)
    names = re.findall(r"`(?:torch\.nn\.)?(\w+)`", sentence)
    assert set(names) == {row.torch_module.__name__ for row in OPERATORS.values() if row.torch_module}


def test_what_is_wrong_and_what_is_lost_is_measured():
    (torchs,) = (row for row in rows("accuracy") if (row["dtype"], row["provider"]) == ("bf16", "torch.sigmoid"))
    assert f"{100 * float(torchs['error at 5']):.0f} % wrong at x = 5" in TEXT
    assert "exactly 0 from x = 6.25 on" in TEXT
    x = torch.tensor([6.21875, 6.25, 7.0, 80.0], dtype=torch.bfloat16, requires_grad=True)
    torch.sigmoid(x).sum().backward()
    assert (x.grad == 0).tolist() == [False, True, True, True]


def test_what_is_kept_is_counted():
    saved = {(row["operator"], row["provider"]): float(row["saved"]) for row in rows("counts")}
    swiglu, clamped = ((saved[name, "ours"], saved[name, "torch"]) for name in ("swiglu", "swiglu, clamped"))
    assert "`swiglu` keeps {:g} tensors for backward where torch keeps {:g}".format(*swiglu) in TEXT
    assert "for GPT-OSS {:g}, not {:g}.".format(*clamped) in TEXT


def test_what_it_costs_on_a_cpu_is_measured():
    times = {
        (row["operator"], row["provider"]): float(row["time / torch"])
        for name in ("speed", "gates", "losses")
        for row in rows(name)
        if (row["mode"], row["dtype"], row["n"]) == ("both", "fp32", str(1 << 20)) and row["provider"] != "torch"
    }
    assert times["sigmoid", "ours, output"] == pytest.approx(1, abs=0.05)
    (name, _), most = max(times.items(), key=lambda pair: pair[1])
    layer = OPERATORS[name].module.__name__
    sentence = f"take from as long as torch's for `Sigmoid` to {most:.1f} times as long for `{layer}`"
    assert sentence in TEXT
    for name in ("speed", "gates", "losses"):
        about = json.loads((RESULTS / f"{name}.json").read_text())["environment"]
        assert (about["device"], about["torch"], about["threads"]) == ("CPU (x86_64)", "2.13.0+cpu", 1)


def test_how_the_boundary_moves_is_measured():
    results = json.loads((RESULTS / "train" / "boundary.json").read_text())
    about = results["environment"]
    assert f"({about['device'].replace(' (', ', ').rstrip(')')}, torch {about['torch']}; all records" in TEXT
    for (name, own), subject in zip(results["models"].items(), ("unit", "network")):
        start, end = own["panels"]["start"], own["panels"]["end"]
        assert f"In {end['step']} steps" in TEXT
        assert (
            f"the {subject}'s loss falls from {start['loss']:.3f} to {end['loss']:.3f} "
            f"and its accuracy rises from {start['accuracy']:.3f} to {end['accuracy']:.3f}"
        ) in TEXT, name


def test_the_kernel_that_is_shown_is_the_one_that_runs():
    shown, *_ = blocks("kernels/README.md")
    assert shown.code in ROOT.joinpath("kernels", "gates.py").read_text()
