"""`make models`: what it measures, and what makes it fail. Its own models are tried where their libraries are installed."""

import json

import pytest
import torch
from torch import nn

import torch_sigmoid
from benchmarks.measure import models, zoo


def case(activation, becomes, saves=0.0, norm=nn.Identity):
    return zoo.Case(
        "torch",
        "a network",
        lambda: nn.Sequential(nn.Linear(8, 16), norm(16), activation(), nn.Linear(16, 1)),
        lambda model: model(torch.randn(32, 8)).square().mean(),
        becomes,
        saves,
    )


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(models, "STEPS", 3)


@pytest.fixture
def only(monkeypatch, few_steps):
    """Have `main` know these models only, which need no library."""
    monkeypatch.setattr(zoo, "LIBRARIES", ())
    return lambda *known: monkeypatch.setattr(zoo, "cases", lambda: iter(known))


def test_a_row_tells_what_became_ours(few_steps):
    row = models.measure(case(nn.SiLU, ("silu",)))
    assert row["became ours"] == "SiLU → silu × 1"
    assert row["last loss"] != row["first loss"]
    assert row["bytes kept, torch"] > 0
    assert not row["batch norm"]
    assert models.faults(case(nn.SiLU, ("silu",)), row) == []


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (case(nn.SiLU, ("swiglu",)), "swiglu did not come into it; became ours: SiLU → silu × 1"),
        (case(nn.ReLU, ("silu",)), "silu did not come into it; became ours: nothing to replace"),
        (case(nn.SiLU, ()), "replace should have said that there is nothing to replace; became ours: SiLU → silu × 1"),
        (case(nn.SiLU, ("silu",), saves=0.5), "of the bytes kept for backward, less than 50%"),
        (case(nn.ReLU, (), saves=0.5), "it saves 0.0% of the bytes kept for backward, less than 50%"),
    ],
    ids=["another operator", "nothing", "something", "too little saved", "nothing saved"],
)
def test_a_model_that_is_not_as_it_must_be_is_a_fault(wrong, fault, few_steps):
    assert any(fault in found for found in models.faults(wrong, models.measure(wrong)))


@pytest.mark.parametrize(("norm", "bound"), [(nn.Identity, 1e-5), (nn.BatchNorm1d, 1e-3)], ids=["no norm", "batch norm"])
def test_a_loss_that_differs_is_a_fault(norm, bound, few_steps):
    one = case(nn.SiLU, ("silu",), norm=norm)
    row = models.measure(one)
    assert models.faults(one, row | {"loss difference": 0.99 * bound}) == []
    for difference in (1.01 * bound, float("nan")):
        (fault,) = models.faults(one, row | {"loss difference": difference})
        assert "a loss differs" in fault


def test_losses_are_compared(few_steps, monkeypatch):
    monkeypatch.setattr(torch_sigmoid.SiLU, "forward", lambda self, x: 1.001 * nn.functional.silu(x))
    assert 1e-5 < models.measure(case(nn.SiLU, ("silu",)))["loss difference"] < 1e-2


def test_results_are_written_if_all_is_well(only, tmp_path, capsys):
    only(case(nn.SiLU, ("silu",)), case(nn.ReLU, ()))
    assert models.main(["--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [row["became ours"] for row in rows] == ["SiLU → silu × 1", models.NOTHING]
    assert "loss difference" in capsys.readouterr().out


def test_nothing_is_written_if_one_is_wrong(only, tmp_path, capsys):
    def broken():
        raise ImportError("no such thing")

    only(case(nn.ReLU, ("silu",)), case(nn.SiLU, ("silu",)), case(nn.SiLU, ("silu",))._replace(build=broken))
    assert models.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "silu did not come into it" in said
    assert "ImportError: no such thing" in said
    assert not any(tmp_path.iterdir())


def test_without_the_libraries_it_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(zoo, "LIBRARIES", ("torch", "no_such_library"))
    assert models.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("models: skipped, no_such_library not installed")
    assert not any(tmp_path.iterdir())


def of_transformers(name):
    pytest.importorskip("transformers", minversion="5.24")
    return next(each for each in zoo.transformers_cases() if each.name == name)


@pytest.mark.parametrize("name", ["Llama", "GptOss", "Gemma2"])
def test_models_of_transformers_are_as_they_must_be(name, few_steps):
    one = of_transformers(name)
    assert models.faults(one, models.measure(one)) == []


@pytest.mark.parametrize("name", ["Llama", "CLIP", "SigLIP", "Deformable DETR"])
def test_a_report_leaves_a_model_replaced(name):
    if name == "Deformable DETR":
        pytest.importorskip("scipy")
    one = of_transformers(name)
    model = torch_sigmoid.replace(one.build())
    before = torch_sigmoid.report(model).to_dict()
    assert before["replaced"]
    assert torch_sigmoid.report(model, forward=lambda: one.loss(model)).saved_bytes
    assert torch_sigmoid.report(model).to_dict() == before
