"""What a watch says of gates: of layers called with several tensors, and of blocks that `replace` has fused.

The same model written with torch's layers is watched beside it; its activation sees the same gate.
"""

import copy
import io
import math
import re

import pytest
import torch
import torch.nn.functional as F
from reference import random
from torch import nn
from watched import exact_derivative, seen

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch

pytestmark = pytest.mark.ways("interpreter")

# What depends on x alone.
OF_X = ("mean_derivative", "least_derivative", "saturated", "lost_to_rounding", "units")


class Llama(nn.Module):
    """A gated MLP with a module for its activation."""

    def __init__(self, n=8, hidden=12):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(n, hidden), nn.Linear(n, hidden)
        self.down_proj = nn.Linear(hidden, n)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Inline(Llama):
    """The same without one."""

    def __init__(self):
        super().__init__()
        del self.act

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def network(block):
    torch.manual_seed(0)
    return nn.Sequential(block(), block())


def step(model, device, scale=30.0):
    """One forward and backward, whose gates are saturated here and there."""
    model(random((16, 8), torch.float32, device, scale=scale)).square().mean().backward()


def watched(model, device, **options):
    model = model.to(device)
    with GradientWatch(model, **options) as watch:
        step(model, device)
    return watch


@pytest.mark.parametrize("block", [Llama, Inline])
def test_a_fused_block_has_the_statistics_of_the_block_as_it_was(block, device):
    plain, fused = network(Llama), torch_sigmoid.replace(network(block))
    names = {Llama: ["0.act", "1.act"], Inline: ["0.swiglu", "1.swiglu"]}[block]
    watches = watched(plain, device, dead_after=1), watched(fused, device, dead_after=1)
    assert list(watches[1].to_dict()["layers"]) == names
    for before, now in zip(("0.act", "1.act"), names):
        expected, found = seen(watches[0], before), seen(watches[1], now)
        assert 0 < expected["saturated"] < 1
        for key in (*OF_X, "dead_units", "leaving"):
            if key != "lost_to_rounding":
                assert found[key] == pytest.approx(expected[key], rel=1e-5), key
        assert found["lost_to_rounding"] == 0
        # What enters is the gradient of the product, not of silu.
        assert found["entering"] != pytest.approx(expected["entering"], rel=1e-2)


def test_what_leaves_is_the_gradient_of_the_gate_alone(device):
    gate, up, grad = (random((5, 6), torch.float32, device, seed=seed) for seed in range(3))
    # A gradient of up a thousand times as large as that of the gate would be seen.
    gate, up = (gate * 10).requires_grad_(), (up * 1e-3).requires_grad_()
    model = nn.ModuleList([torch_sigmoid.SwiGLU()])
    with GradientWatch(model) as watch:
        to_gate, _ = torch.autograd.grad(model[0](gate * 1, up * 1), (gate, up), grad)
    assert seen(watch)["leaving"] == pytest.approx(to_gate.double().norm().item(), rel=1e-6)
    assert seen(watch)["entering"] == pytest.approx(grad.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_a_small_gradient_of_a_gate_is_no_sign_that_gradients_vanish(gated, device):
    """It goes on by the operand. The same numbers of an activation alone are a sign."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch_sigmoid.SigmoidGate() if gated else torch_sigmoid.Sigmoid(save="input")

        def forward(self, x):
            return self.gate(x, x + 20) if gated else self.gate(x + 20)

    out = io.StringIO()
    model = nn.Sequential(Block(), Block())
    with GradientWatch(model) as watch:
        model(random((4, 5), torch.float32, device).requires_grad_() * 1).sum().backward()
    watch.report(file=out)
    assert ("VANISHED" in out.getvalue()) != gated
    assert seen(watch, "1.gate")["attenuation"] < 1e-4
    last = re.search(r"1\.gate.*", out.getvalue())[0]
    assert bool(re.search(r"–\W*$", last)) == gated


CASES = "swiglu", "alpha", "clamped", "packed", "packed, clamped", "interleaved", "sigmoid gate", "broadcast"


def case(name, device):
    """A layer, its inputs, its gate among them, alpha and limit."""

    def make(*shape, seed=0):
        return random(shape, torch.float32, device, seed=seed, scale=6.0)

    gate, other, packed = make(7, 10), make(7, 10, seed=1), make(3, 8, 5)
    return {
        "swiglu": (torch_sigmoid.SwiGLU(), (gate, other), gate, 1.0, None),
        "alpha": (torch_sigmoid.SwiGLU(alpha=1.702), (gate, other), gate, 1.702, None),
        "clamped": (torch_sigmoid.SwiGLU(alpha=1.702, limit=2.0, up_offset=1.0), (gate, other), gate, 1.702, 2.0),
        "packed": (torch_sigmoid.SwiGLUPacked(1), (packed,), packed[:, :4], 1.0, None),
        "packed, clamped": (torch_sigmoid.SwiGLUPacked(-2, limit=2.0), (packed,), packed[:, :4], 1.0, 2.0),
        "interleaved": (torch_sigmoid.SwiGLUPacked(1, interleaved=True, limit=2.0), (packed,), packed[:, ::2], 1.0, 2.0),
        "sigmoid gate": (torch_sigmoid.SigmoidGate(), (other, gate), gate, None, None),
        "broadcast": (torch_sigmoid.SigmoidGate(), (make(3, 4, 5, 6), gate[:3, :4, None, None]), gate[:3, :4], None, None),
    }[name]


@pytest.mark.parametrize("name", CASES)
def test_layers_with_gates_have_the_statistics_of_float64(name, device):
    layer, inputs, gate, alpha, limit = case(name, device)
    inputs = [each.clone().requires_grad_() for each in inputs]
    with GradientWatch(layer, dead_after=1) as watch:
        grads = torch.autograd.grad(layer(*(each * 1 for each in inputs)).sum(), inputs)
    numbers = seen(watch, type(layer).__name__)
    x = gate.double().cpu()
    slopes = exact_derivative(nn.Sigmoid() if alpha is None else nn.SiLU(), x * (alpha or 1.0)).abs()
    if limit is not None:
        assert (x > limit).any()
        slopes = torch.where(x > limit, 0.0, slopes)
    assert numbers["saturated"] == (slopes < 0.01).double().mean().item() > 0
    assert numbers["mean_derivative"] == pytest.approx(slopes.mean().item(), rel=1e-5)
    assert numbers["least_derivative"] == pytest.approx(slopes.min().item(), rel=1e-5, abs=1e-7)
    assert numbers["lost_to_rounding"] == 0
    assert numbers["units"] == gate.shape[1 if gate.dim() == 3 else -1]
    leaves = grads[1] if isinstance(layer, torch_sigmoid.SigmoidGate) else grads[0]
    assert numbers["leaving"] == pytest.approx(leaves.double().norm().item(), rel=1e-6)


def test_packed_gates_of_replaced_activations(device):
    """A gate in one tensor: the first half is silu's, the second σ's."""
    for kind, index in ((nn.SiLU, 0), (nn.Sigmoid, 1)):
        model = nn.ModuleList([kind()]).to(device)
        packed = random((6, 10), torch.float32, device, scale=6.0)
        model[0].__class__ = torch_sigmoid.swap.gates.GATED[kind.__name__.lower()]
        with GradientWatch(model) as watch:
            model[0](packed.requires_grad_() * 1, packed_dim=-1).sum().backward()
        slopes = exact_derivative(kind(), packed.detach().chunk(2, -1)[index].double().cpu()).abs()
        assert seen(watch)["mean_derivative"] == pytest.approx(slopes.mean().item(), rel=1e-5)
        assert seen(watch)["leaving"] == pytest.approx(packed.grad.double().norm().item(), rel=1e-6)


def test_an_inline_gate_takes_its_options_from_the_call(device):
    """As GPT-OSS has it, fused: pairs, alpha and a limit."""
    model = nn.Sequential(torch_sigmoid.swap.gates.FusedGate("swiglu_packed"))
    packed = random((6, 10), torch.float32, device, scale=6.0)
    with GradientWatch(model) as watch:
        model[0](packed.requires_grad_() * 1, interleaved=True, alpha=1.702, limit=2.0, up_offset=1.0).sum().backward()
    x = packed.detach()[:, ::2].double().cpu()
    slopes = torch.where(x > 2, 0.0, exact_derivative(nn.SiLU(), 1.702 * x).abs())
    assert seen(watch)["mean_derivative"] == pytest.approx(slopes.mean().item(), rel=1e-5)
    assert seen(watch)["saturated"] == (slopes < 0.01).double().mean().item() > 0
    assert seen(watch)["leaving"] == pytest.approx(packed.grad.double().norm().item(), rel=1e-6)


def test_a_gated_sigmoid_loses_to_rounding_only_alone(device):
    x = torch.full((4, 5), 8.0, dtype=torch.bfloat16, device=device)
    lost = []
    for operands in ((x,), (x, x)):
        model = nn.ModuleList([nn.Sigmoid()])
        model[0].__class__ = torch_sigmoid.swap.gates.GatedSigmoid
        model[0].save = "output"
        with GradientWatch(model) as watch:
            model[0](*(each.clone().requires_grad_() for each in operands)).sum().backward()
        lost.append(seen(watch)["lost_to_rounding"])
    assert lost == [1.0, 0.0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_gate_is_a_half_or_every_second_number(interleaved):
    packed = torch.arange(48.0).reshape(2, 6, 4)
    for dim in (1, -2):
        gate = torch_sigmoid.operators.Gate.packed(packed, dim, 0, interleaved)
        assert torch.equal(gate.x, packed[:, ::2] if interleaved else packed[:, :3])
        assert gate.tensor is packed
        assert gate.dim == 1


def test_the_limit_itself_has_a_derivative_and_nan_stays():
    x = torch.tensor([1.0, 2.0, 3.0, math.inf, math.nan])
    below = torch_sigmoid.operators.Gate(x, x).below(2.0).x
    torch.testing.assert_close(below, torch.tensor([1.0, 2.0, -math.inf, -math.inf, math.nan]), equal_nan=True)


@pytest.mark.parametrize("block", [Llama, Inline])
def test_training_a_fused_model_gives_the_same_bits(block, device):
    model = torch_sigmoid.replace(network(block)).to(device)
    other, before = copy.deepcopy(model), copy.deepcopy(model)
    with GradientWatch(model) as watch:
        for each in (model, other):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                step(each, device, scale=1.0)
                optimizer.step()
    assert len(watch.to_dict()["steps"]) == 3
    for mine, others, earlier in zip(model.parameters(), other.parameters(), before.parameters()):
        assert torch.equal(mine, others)
        assert torch.equal(mine.grad, others.grad)
        assert not torch.equal(mine, earlier)


def test_losses_are_not_watched_and_names_are_not_taken_twice():
    block = torch_sigmoid.replace(network(Inline))[0]
    block.__dict__["_fused_siglip_loss"] = torch_sigmoid.swap.gates.FusedGate("siglip_loss")
    assert list(GradientWatch(block).to_dict()["layers"]) == ["swiglu"]
    block.swiglu = torch_sigmoid.SwiGLU()
    assert list(GradientWatch(block).to_dict()["layers"]) == ["_fused_swiglu", "swiglu"]
    assert list(GradientWatch(block, modules="_fused*").to_dict()["layers"]) == ["_fused_swiglu"]


@pytest.mark.parametrize("arguments", [(), (torch.ones(2, 3),), (torch.ones(2, 3), 1.0), ("x", "y")], ids=str)
def test_a_wrong_call_is_refused_in_the_words_of_the_layer(arguments):
    for layer in (torch_sigmoid.SwiGLU(), torch_sigmoid.SigmoidGate()):
        with pytest.raises(TypeError) as unwatched:
            layer(*arguments)
        with GradientWatch(layer) as watch, pytest.raises(TypeError) as refused:
            layer(*arguments)
        assert str(refused.value) == str(unwatched.value)
        assert seen_nothing(watch)


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_what_cannot_be_halved_is_refused_in_the_words_of_the_layer(shape):
    layer = torch_sigmoid.SwiGLUPacked()
    with pytest.raises(RuntimeError) as unwatched:
        layer(torch.ones(shape))
    with GradientWatch(layer) as watch, pytest.raises(RuntimeError) as refused:
        layer(torch.ones(shape))
    assert str(refused.value) == str(unwatched.value)
    assert seen_nothing(watch)


def seen_nothing(watch):
    (layer,) = watch.to_dict()["layers"].values()
    return all(value is None for series in layer.values() if isinstance(series, list) for value in series)
