"""Steps of a watch: what ends one, and how those of a long run share rows."""

import math

import pytest
import torch
from torch import nn
from watched import build, exact_derivative, run, seen, train, watching

from torch_sigmoid.diagnostics import GradientWatch

pytestmark = pytest.mark.ways("interpreter")


def test_a_step_ends_with_the_optimizer_not_with_a_backward(device):
    model = build().to(device)
    with GradientWatch(model) as watch:
        train(model, 3, device, accumulate=4)
    assert watch.to_dict()["steps"] == [[0, 0], [1, 1], [2, 2]]
    assert watch._gather()[1][:, 0, 0].tolist() == [4 * 32 * 16] * 3


def test_an_optimizer_of_another_model_ends_no_step_and_step_does_by_hand(device):
    model, other = build().to(device), build().to(device)
    with GradientWatch(model) as watch:
        model(torch.randn(4, 8, device=device)).sum().backward()
        train(other, 2, device)
        assert watch.to_dict()["steps"] == [[0, 0]], "the step at hand is shown, though it has not ended"
        watch.step()
        watch.step()
        model(torch.randn(4, 8, device=device)).sum().backward()
        assert watch.to_dict()["steps"] == [[0, 0], [1, 1]]


def test_a_grad_scalers_skipped_step_is_no_step(device):
    model = build().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    with GradientWatch(model) as watch:
        for factor in (math.inf, 1.0):
            scaler.scale(model(torch.ones(3, 8, device=device)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert watch.to_dict()["steps"] == [[0, 0]]
    # What overflowed is counted, and spoils no norm.
    numbers = seen(watch, "1")
    assert numbers["not_finite"] > 0
    assert 0 < numbers["entering"] < math.inf
    assert 0 < numbers["attenuation"] < 1


def test_norms_are_of_the_steps_that_had_a_gradient(device):
    layer = nn.Sigmoid()
    with watching(layer, history=2) as watch:
        for step in range(8):
            x = torch.ones(3, device=device, requires_grad=True)
            y = layer(x)
            if step % 4 == 0:
                y.sum().backward()
            watch.step()
    assert [step for row in watch.to_dict()["steps"] for step in row] == [0, 3, 4, 7]
    assert watch.to_dict()["layers"]["0"]["entering"] == pytest.approx([3**0.5] * 2)


def test_optimizers_may_step_within_the_backward(device):
    model = build().to(device)
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: optimizers[parameter].step())
    with GradientWatch(model) as watch:
        for _ in range(3):
            model(torch.ones(3, 8, device=device)).sum().backward()
    assert watch.to_dict()["steps"] == [[0, 0], [1, 1], [2, 2]]
    assert all(norm > 0 for norm in watch.to_dict()["layers"]["1"]["leaving"])


def test_a_backward_that_comes_late_is_not_the_next_samples(device):
    layer = nn.Sigmoid()
    with watching(layer, every=2) as watch:
        x = torch.ones(4, device=device, requires_grad=True)
        for step in range(3):
            y = layer(x)
            y.sum().backward(retain_graph=step == 0)
            watch.step()
            if step == 0:
                y.sum().backward()
    assert watch.to_dict()["layers"]["0"]["entering"] == [2, 2]


def test_parameters_that_an_optimizer_gets_later_end_steps_too(device):
    model = build().to(device)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1, device=device))], lr=0.1)
    with GradientWatch(model) as watch:
        for step in range(3):
            model(torch.ones(3, 8, device=device)).sum().backward()
            optimizer.step()
            if step == 0:
                optimizer.add_param_group({"params": list(model.parameters())})
        assert watch.to_dict()["steps"] == [[0, 0], [1, 1]]


@pytest.mark.ways
def test_memory_does_not_grow_with_the_shapes_of_inputs(device):
    layer, gate = nn.Sigmoid(), nn.GLU(1)
    with watching(layer, gate) as watch:
        for size in range(1, 30):
            run(layer, torch.ones(2, size, device=device))
            run(gate, torch.ones(2, 6, size, device=device))
    assert sum(map(len, watch._totals.units.values())) <= 5
    assert seen(watch, "1")["units"] == 3


@pytest.mark.ways
def test_a_long_run_is_merged_into_bounded_memory(device):
    model = nn.Sequential(layer := nn.Sigmoid())
    with GradientWatch(model, history=4) as watch:
        for step in range(11):
            run(layer, torch.full((2, 3), float(step), device=device))
            watch.step()
        steps = watch.to_dict()["steps"]
        assert len(steps) <= 4
        assert [first for first, _ in steps] == [0, *(last + 1 for _, last in steps[:-1])]
        assert steps[-1][1] == 10
    # Rows of several steps hold what all their elements give.
    layer_seen = watch.to_dict()["layers"]["0"]
    for (first, last), mean, least, entering in zip(
        steps, layer_seen["mean_derivative"], layer_seen["least_derivative"], layer_seen["entering"]
    ):
        slopes = exact_derivative(layer, torch.arange(first, last + 1, dtype=torch.float64))
        assert mean == pytest.approx(slopes.mean().item(), rel=1e-6)
        assert least == pytest.approx(slopes.min().item(), rel=1e-6)
        assert entering == pytest.approx(6**0.5, rel=1e-6)


@pytest.mark.ways
def test_every_row_of_a_long_run_holds_as_many_steps(device):
    layer = nn.Sigmoid()
    x = torch.ones(2, device=device, requires_grad=True)
    with watching(layer, history=8) as watch:
        for _ in range(100):
            layer(x).sum().backward()
            watch.step()
    lengths = [last - first + 1 for first, last in watch.to_dict()["steps"]]
    assert lengths == [16] * 6 + [4]
