"""What a watch hands out: the report and its advice, a plot, a dataframe, TensorBoard."""

import csv
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from watched import build, run, train, watching

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch

pytestmark = pytest.mark.ways("interpreter")


def test_a_watch_outlives_its_model():
    model = build()
    with GradientWatch(model) as watch:
        train(model, 2, "cpu")
    del model
    out = io.StringIO()
    watch.report(file=out)
    assert "was deleted" in out.getvalue()
    # Of the layer its kind is known, though its type is gone with it.
    assert re.search(r"\b1\W+sigmoid\W+0\.2", out.getvalue())
    assert len(watch.to_dict()["steps"]) == 2


def in_trouble(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 1)).to(device)
    nn.init.constant_(model[0].bias, 30.0)
    with GradientWatch(model, dead_after=2) as watch:
        train(nn.Sequential(nn.Linear(8, 4).to(device), model), 3, device)
    return watch


@pytest.mark.parametrize("rich", [True, False])
def test_the_report_names_the_layers_in_trouble_and_what_helps(rich, device, monkeypatch):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    out = io.StringIO()
    in_trouble(device).report(file=out)
    text = out.getvalue()
    assert ("┃" in text) == rich
    assert "LOST TO ROUNDING: 1\n" in text
    assert 'save="input"' in text
    assert "SATURATED: 1\n" in text
    assert "DEAD: 1\n" in text
    assert "VANISHED: 1\n" in text
    assert "6 of 6" in text
    assert "100 %" in text
    healthy = io.StringIO()
    with GradientWatch(model := build().to(device)) as watch:
        train(model, 2, device)
    watch.report(last=1, file=healthy)
    assert "No layer is in trouble" in healthy.getvalue()
    assert "steps 1 to 1" in healthy.getvalue()


def report_of(network, x, steps=1, loss=torch.sum, **options):
    """The report of a network that has been trained for some steps."""
    out = io.StringIO()
    with GradientWatch(network, **options) as watch:
        for _ in range(steps):
            loss(network(x)).backward()
            watch.step()
        watch.report(file=out)
    return out.getvalue()


def words_under(heading, text):
    """What the report says below a heading, up to the next line that is not indented; None without the heading."""
    found = re.search(rf"^{re.escape(heading)}$\n((?:  .*\n)+)", text, re.MULTILINE)
    return found and " ".join(found.group(1).split())


def cells_of(text):
    """The table's cells by layer and column, where it is drawn without rich."""
    head, *lines = (re.split(r" {2,}", line.strip()) for line in text.split("\n")[1:])
    rows = (line for line in lines if len(line) == len(head))
    return {row[0]: dict(zip(head, row)) for row in rows}


@pytest.fixture
def plain_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)


def deep(depth, activation=nn.Sigmoid, bias=None, width=16):
    """`depth` hidden layers, and a linear one behind them."""
    torch.manual_seed(0)
    network = nn.Sequential(*(each for _ in range(depth) for each in (nn.Linear(width, width), activation())))
    for linear in network[::2]:
        if bias is not None:
            nn.init.constant_(linear.bias, bias)
    return network.append(nn.Linear(width, 1))


def test_what_vanishes_mathematically_is_not_promised_to_save_input():
    x = torch.randn(32, 16)
    from_input = deep(8, lambda: torch_sigmoid.Sigmoid(save="input"))
    text = report_of(from_input, x)
    (heading,) = re.findall(r"^VANISHED: .*$", text, re.MULTILINE)
    words = words_under(heading, text)
    assert "mathematics, not rounding" in words
    assert 'save="input" cannot help' in words
    assert "1/4" in words
    assert "LOST TO ROUNDING" not in text
    # It says the truth: from the input or from the output, the gradients are the same.
    from_output = deep(8)
    report_of(from_output, x)
    torch.testing.assert_close(from_input[0].weight.grad, from_output[0].weight.grad, rtol=1e-3, atol=1e-12)


def test_what_vanishes_gets_the_advice_that_the_measured_table_credits():
    text = report_of(deep(8), torch.randn(32, 16))
    (heading,) = re.findall(r"^VANISHED: .*$", text, re.MULTILINE)
    words = words_under(heading, text)
    assert "SiLU or ReLU with Xavier (Glorot) initialisation" in words
    assert "20 layers" in words
    with open(Path(__file__).parent.parent / "benchmarks" / "results" / "cpu" / "vanishing.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["depth"], row["precision"]) == ("20", "fp32")]
    learns = {(row["activation"], row["initialisation"]): float(row["accuracy"]) > 0.5 for row in rows}
    assert learns["SiLU", "Xavier"]
    assert learns["ReLU", "Xavier"]
    # "Either alone does not":
    assert not any(learns[each] for each in (("sigmoid", "Xavier"), ("SiLU", "default"), ("ReLU", "default")))


def test_what_lies_between_two_watched_layers_is_shown(plain_table):
    network, x = deep(3), torch.randn(32, 16)
    cells = cells_of(report_of(network, x))
    # By hand: the gradients of each sigmoid's output and input.
    grads, h = [], x
    for linear, sigmoid in zip(network[:-1:2], network[1::2]):
        before = linear(h)
        h = sigmoid(before)
        grads += [before, h]
    norms = [grad.norm().item() for grad in torch.autograd.grad(network[-1](h).sum(), grads)]
    leaving, entering = norms[::2], norms[1::2]
    assert cells["1"]["between"] == "–"
    assert cells["3"]["between"] == f"{entering[0] / leaving[1]:.3g}"
    assert cells["5"]["between"] == f"{entering[1] / leaving[2]:.3g}"


def test_layers_that_did_not_run_are_skipped_between_the_others(plain_table):
    class Skipping(nn.Sequential):
        def forward(self, x):
            return self[6](self[5](self[4](self[1](self[0](x)))))

    cells = cells_of(report_of(Skipping(*deep(3)), torch.randn(8, 16)))
    assert cells["3"]["between"] == "–"
    assert float(cells["5"]["between"]) > 0


def test_a_linear_layer_that_takes_the_gradient_is_blamed_for_it():
    network = deep(2)
    nn.init.normal_(network[2].weight, std=1e-9)
    text = report_of(network, torch.randn(32, 16))
    assert "VANISHED BETWEEN WATCHED LAYERS: 1 and 3\n" in text
    assert "Linear" in words_under("VANISHED BETWEEN WATCHED LAYERS: 1 and 3", text)
    assert "VANISHED: " not in text


def numbers_of(watch):
    """The statistics of each layer in the last row."""
    layers = watch.to_dict()["layers"].items()
    return {name: {key: value[-1] for key, value in layer.items() if isinstance(value, list)} for name, layer in layers}


@pytest.mark.parametrize("depth", [9, 10, 11, 12])
def test_many_layers_that_lose_a_gradient_together_are_blamed_together(depth):
    """Also where it falls below the limit in a Linear, which multiplies it by no less than the sigmoids do."""
    network = deep(depth)
    with GradientWatch(network) as watch:
        network(torch.randn(32, 16)).sum().backward()
        out = io.StringIO()
        watch.report(file=out)
    numbers = numbers_of(watch)
    names = list(numbers)
    # From the last layer on, in the order of backward: each norm, relative to the first.
    norms = [
        (name, of, numbers[name][of] / numbers[names[-1]]["entering"]) for name in names[::-1] for of in ("entering", "leaving")
    ]
    name, of, left = next(each for each in norms if each[2] <= 1e-4)
    passed = names[names.index(name) + (of == "entering") :]
    kept = math.prod(numbers[each]["attenuation"] for each in passed)
    words = words_under(f"VANISHED: {', '.join(passed)}", out.getvalue())
    way = f"{left:.2g} of the gradient that entered {names[-1]} {'leaves' if of == 'leaving' else 'reaches'} {name}: "
    assert way + f"the watched layers multiply it by {kept:.2g}, what lies between them by {left / kept:.2g}" in words
    assert "VANISHED BETWEEN" not in out.getvalue()


def test_linear_layers_that_lose_a_gradient_together_are_blamed_together():
    """PyTorch's initialisation of Linear makes ReLU networks vanish; it is not the ReLUs."""
    network = deep(20, nn.ReLU, width=64)
    text = report_of(network, torch.randn(32, 64))
    (places,) = re.findall(r"^VANISHED BETWEEN WATCHED LAYERS: (.*)$", text, re.MULTILINE)
    assert places.count(" and ") > 5
    assert "Xavier (Glorot)" in words_under(f"VANISHED BETWEEN WATCHED LAYERS: {places}", text)
    assert "VANISHED: " not in text


def test_one_layer_among_many_is_blamed_alone():
    network = deep(6, nn.ReLU, width=64)
    network[5] = torch_sigmoid.Sigmoid(save="input")
    nn.init.constant_(network[4].bias, 20.0)
    text = report_of(network, torch.randn(32, 64))
    assert "VANISHED: 5\n" in text
    assert "VANISHED BETWEEN" not in text


def test_what_is_saturated_and_lost_gets_advice_on_saturation_first():
    network = deep(4, torch_sigmoid.Sigmoid, bias=8.0)
    x = torch.randn(32, 16)
    text = report_of(network.bfloat16(), x.bfloat16())
    saturated, lost = text.index("SATURATED: 1, 3, 5, 7\n"), text.index("LOST TO ROUNDING: 1, 3, 5, 7\n")
    assert saturated < lost
    words = words_under("LOST TO ROUNDING: 1, 3, 5, 7", text)
    assert words.index("first mend the saturation") < words.index('save="input"')
    # And rightly: what save="input" keeps of it is next to nothing.
    kept = deep(4, lambda: torch_sigmoid.Sigmoid(save="input"), bias=8.0).bfloat16()
    kept(x.bfloat16()).sum().backward()
    assert 0 < kept[0].weight.grad.norm() < 1e-9


def test_what_is_lost_without_being_saturated_gets_save_input_at_once():
    network = deep(1, torch_sigmoid.Sigmoid).bfloat16()
    x = torch.randn(64, 16)
    x[::4] *= 100
    text = report_of(network, x.bfloat16())
    assert "SATURATED" not in text
    assert 'save="input"' in words_under("LOST TO ROUNDING: 1", text)
    assert "saturation" not in words_under("LOST TO ROUNDING: 1", text)


def test_units_are_not_called_alive_before_enough_calls_were_watched(plain_table):
    network, x = deep(1, bias=30.0), torch.randn(8, 16)
    for steps, expected in ((2, "–"), (3, "16 of 16")):
        text = report_of(network, x, steps, dead_after=3)
        assert cells_of(text)["1"]["dead units"] == expected
        assert ("DEAD: 1\n" in text) == (steps == 3)
    assert "– before that" in text


def test_the_layer_that_loses_a_gradient_is_blamed_and_not_those_that_receive_nothing():
    network = nn.Sequential(*deep(1, nn.ReLU)[:2], *deep(1, nn.Tanh)[:2], *deep(1))
    nn.init.constant_(network[4].bias, 40.0)
    text = report_of(network, torch.randn(32, 16))
    assert network[0].weight.grad.norm() == 0
    assert "VANISHED: 5\n" in text


def test_the_layer_at_which_a_gradient_falls_below_is_blamed_and_not_those_behind_it():
    """Where something tiny is left, as where nothing is."""
    network = nn.Sequential(*deep(1, nn.ReLU)[:2], *deep(1, lambda: torch_sigmoid.Sigmoid(save="input"), bias=20.0))
    text = report_of(network, torch.randn(32, 16))
    assert 0 < network[0].weight.grad.norm() < 1e-4
    assert "VANISHED: 3\n" in text


def test_each_branch_that_loses_its_gradient_is_named():
    def head():
        return nn.Sequential(*deep(1, nn.ReLU)[:2], *deep(1, lambda: torch_sigmoid.Sigmoid(save="input"), bias=20.0))

    class Heads(nn.ModuleDict):
        def forward(self, x):
            return self["a"](x) + self["b"](x)

    text = report_of(Heads({"a": head(), "b": head()}), torch.randn(32, 16))
    assert "VANISHED: a.3, b.3\n" in text
    assert "VANISHED BETWEEN" not in text


def test_a_loss_that_sends_no_gradient_is_no_layers_fault():
    text = report_of(deep(2), torch.randn(32, 16), loss=lambda output: 0 * output.sum())
    assert "NO GRADIENT: 1, 3\n" in text
    assert "the loss" in words_under("NO GRADIENT: 1, 3", text)
    assert "VANISHED" not in text


def test_direct_calls_are_said_to_be_invisible():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(16, 16), nn.ReLU()

        def forward(self, x):
            return torch.sigmoid(self.linear(self.relu(self.linear(x))))

    text = report_of(Direct(), torch.randn(4, 16))
    assert "torch.sigmoid" not in text.split("\nmean, least")[0], "no row tells of it"
    assert "Only modules are watched" in text
    assert "torch.sigmoid(x)" in text
    assert "F.sigmoid(x)" in text
    out = io.StringIO()
    with GradientWatch(network := Direct()) as watch:
        torch.sigmoid(network.linear(torch.ones(4, 16)))
        watch.report(file=out)
    assert "torch.sigmoid(x)" in out.getvalue(), "nor is it forgotten where nothing was seen"


def words_about(layer, x, file=None, **options):
    out = io.StringIO() if file is None else file
    with watching(layer, **options) as watch:
        run(layer, x)
        watch.report(file=out)
    return out.getvalue() if file is None else None


def test_a_relu_is_not_said_to_be_saturated_and_tanh_gets_advice_of_its_own():
    x = -torch.ones(4, 4)
    x[0, 0] = 1
    assert "No layer is in trouble" in words_about(nn.ReLU(), x)
    words = words_about(nn.Tanh(), torch.full((4, 4), 6.0, dtype=torch.bfloat16))
    assert "2·sigmoid(2x) - 1" in words_under("LOST BY TANH: 0", words)


def test_what_is_not_finite_is_said():
    x = torch.ones(4)
    x[0] = math.nan
    words = words_about(nn.Sigmoid(), x)
    assert "NOT FINITE: 0" in words
    assert "No layer" not in words


def test_a_narrow_terminal_loses_no_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert "0.1966" in words_about(nn.Sigmoid(), torch.ones(4)) or "0.197" in words_about(nn.Sigmoid(), torch.ones(4))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
@pytest.mark.parametrize("rich", [True, False])
def test_any_encoding_can_print_the_report(encoding, rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    words_about(nn.Sigmoid(), torch.full((4,), 30.0), file)
    file.flush()
    assert b"SATURATED" in file.buffer.getvalue()


def test_the_report_goes_to_standard_output(capsys):
    in_trouble("cpu").report()
    assert "VANISHED" in capsys.readouterr().out


def test_a_dataframe_a_plot_and_tensorboard(device):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    watch = in_trouble(device)
    assert len(GradientWatch(build()).to_dataframe()) == 0
    frame = watch.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 2 * 3
    assert frame[frame.layer == "1"].saturated.tolist() == watch.to_dict()["layers"]["1"]["saturated"]
    figure = watch.plot()
    panels = [axes for axes in figure.axes if axes.collections and axes.get_xlabel() == "step"]
    assert [axes.get_title() for axes in panels][:2] == ["saturated", "lost to rounding"]
    assert panels[0].collections[0].get_array().shape == (2, 3)
    assert panels[0].collections[0].get_array()[0].tolist() == [1, 1, 1]

    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, scalar_value, global_step=None):
            self.scalars[tag] = (scalar_value, global_step)

    writer = Writer()
    watch.log_to(writer, step=7)
    assert writer.scalars["gradients/1/saturated"] == (1.0, 7)
    assert set(writer.scalars) >= {f"gradients/{name}/attenuation" for name in ("1", "3")}


@pytest.mark.parametrize(("package", "ask"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
def test_what_is_not_installed_is_named(package, ask, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}, which is not installed"):
        getattr(in_trouble("cpu"), ask)()
