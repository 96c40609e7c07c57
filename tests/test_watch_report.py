"""What a watch hands out: the report and its advice, a plot, a dataframe, TensorBoard."""

import io
import math
import re
import sys

import pytest
import torch
from torch import nn
from watched import build, run, train, watching

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
    assert "LOST BY TANH" in words
    assert "2·sigmoid(2x) - 1" in words


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
