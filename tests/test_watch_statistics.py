"""The numbers of a watch, against float64 and against the gradients that autograd computes."""

import math

import pytest
import torch
from reference import FLOATS, all_patterns, allowance, random, sample
from torch import nn
from watched import exact_derivative, gate_of, layers, run, seen, watching

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch, statistics
from torch_sigmoid.diagnostics import layers as known_layers
from torch_sigmoid.operators import Watched

pytestmark = pytest.mark.ways("interpreter")


SHAPES = {"matrix": (37, 54), "vector": (1030,), "sequence": (3, 7, 18), "images": (2, 5, 4, 34), "scalar-like": (1, 2)}
# Every shape in bfloat16; in fp32 and fp64 one whose units are columns, and one whose units are channels.
EXECUTED = [(shape, torch.bfloat16) for shape in SHAPES]
EXECUTED += [(shape, dtype) for shape in ("matrix", "images") for dtype in (torch.float32, torch.float64)]


@pytest.mark.latin_square
@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(size, dtype, id=f"{shape}-{dtype}", marks=pytest.mark.ways(*["ptx"] * ((shape, dtype) in EXECUTED)))
        for shape, size in SHAPES.items()
        for dtype in FLOATS
    ],
)
def test_statistics_are_those_of_float64(name, dtype, shape, device):
    layer = layers()[name]
    x, grad_output = random(shape, dtype, device, scale=4.0), random(shape, dtype, device, seed=1, scale=1e-4)
    grad_output = grad_output.chunk(2, -1)[0] if name.endswith("glu") else grad_output
    with watching(layer) as watch:
        grad_input = run(layer, x, grad_output)
    numbers = seen(watch)
    slope = exact_derivative(layer, gate_of(layer, x).double().cpu()).abs()
    assert numbers["saturated"] == (slope < 0.01).double().mean().item()
    assert numbers["mean_derivative"] == pytest.approx(slope.mean().item(), rel=1e-6)
    assert numbers["least_derivative"] == pytest.approx(slope.min().item(), rel=1e-5, abs=1e-7)
    assert numbers["entering"] == pytest.approx(grad_output.double().norm().item(), rel=1e-6)
    assert numbers["leaving"] == pytest.approx(grad_input.double().norm().item(), rel=1e-6)
    assert numbers["attenuation"] == pytest.approx((grad_input.double().norm() / grad_output.double().norm()).item(), rel=1e-6)
    assert numbers["not_finite"] == 0

    broken = grad_output.clone(memory_format=torch.contiguous_format)
    broken.view(-1)[-1] = math.inf
    with watching(layer) as watch:
        grad_input = run(layer, x, broken)
    assert seen(watch)["not_finite"] == 1 + (~grad_input.isfinite()).sum().item()


@pytest.mark.latin_square
@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.ways("ptx")
def test_lost_is_what_autograd_loses(name, dtype, device):
    """Compared with the gradient that comes out of the layer itself, for every 16-bit input and a sample of the others."""
    if name == "ours" and allowance(dtype, device):
        pytest.skip("the interpreter truncates σ")
    layer = layers()[name]
    x = sample(dtype)
    x = x[x.isfinite()].to(device)
    slope = exact_derivative(layer, x.double()).abs()
    inputs = torch.cat([torch.ones_like(x)[None], x[None]], dim=1) if name.endswith("glu") else x[None]
    gradient = gate_of(layer, run(layer, inputs))
    lost = (gradient[0] == 0) & (slope >= torch.finfo(dtype).smallest_normal)
    with watching(layer) as watch:
        run(layer, inputs)
    assert round(seen(watch)["lost_to_rounding"] * len(x)) == lost.sum().item()
    # SiLU's fp16 derivative is subnormal before its sigmoid underflows in fp32; a GPU's GLU works in fp32.
    exceptions = [("silu", torch.float16, device), ("glu", torch.float16, "cuda")]
    expected = name in ("sigmoid", "ours", "tanh", "glu", "silu") and (name, dtype, device) not in exceptions
    assert lost.any() == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bf16_at_8_is_lost_by_torch_and_kept_from_the_input(dtype, device):
    x = torch.full((4, 8), 8.0, dtype=dtype, device=device)
    model = nn.Sequential(nn.Sigmoid(), torch_sigmoid.Sigmoid(save="input"))
    with GradientWatch(model) as watch:
        for layer in model:
            run(layer, x)
    assert seen(watch, "0")["lost_to_rounding"] == float(dtype is torch.bfloat16)
    assert seen(watch, "1")["lost_to_rounding"] == 0
    assert (run(model[1], x) != 0).all()


@pytest.mark.parametrize("threshold", [1e-6, 0.01, 0.2, 0.25, 0.3, 1.05])
@pytest.mark.parametrize("kind", statistics.KINDS)
@pytest.mark.ways("ptx")
def test_saturation_is_exact_at_every_threshold(kind, threshold):
    x = all_patterns(torch.float16)
    x = x[~x.isnan()]
    slope = statistics.KINDS[kind].slope
    expected = sum(abs(slope(value)) < threshold for value in x.tolist())
    limits = statistics.bounds(kind, "never", torch.float16, threshold, torch.device("cpu"))
    totals, units = torch.tensor([0, 0, 0, 0, math.inf], dtype=torch.float64), torch.zeros(2, 1)
    statistics.add_activation(x.view(1, 1, -1), kind, limits, totals, *units.unbind())
    assert totals[1] == expected


@pytest.mark.parametrize("scale", [0.5, 1.702])
@pytest.mark.parametrize("kind", statistics.KINDS)
@pytest.mark.ways
def test_intervals_are_exact_at_every_scale(kind, scale):
    x = all_patterns(torch.float16)
    x = x[~x.isnan()]
    slope = torch.tensor([abs(statistics.KINDS[kind].slope(scale * value)) for value in x.tolist()], dtype=torch.float64)
    limits = statistics.bounds(kind, "sigmoid rounds to 1", torch.float16, 0.01, torch.device("cpu"), scale)
    totals, units = torch.tensor([0, 0, 0, 0, math.inf], dtype=torch.float64), torch.zeros(2, 1)
    statistics.add_activation(x.view(1, 1, -1), kind, limits, totals, *units.unbind(), scale)
    assert totals[1] == (slope < 0.01).sum()
    # The product is rounded to fp16 before the sigmoid, as in a module that computes torch.sigmoid(scale * x).
    assert totals[2] == ((torch.sigmoid(scale * x) == 1) & (slope >= torch.finfo(torch.float16).smallest_normal)).sum()


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.ways("interpreter", "ptx")
def test_a_scaled_derivative_is_what_autograd_computes_in_float64(dtype, device, monkeypatch):
    """x·σ(1.702x) has the derivative silu'(1.702x)."""
    row = Watched("silu", "never", scale=lambda module: 1.702)
    monkeypatch.setitem(known_layers._TORCHS_FORWARDS, QuickGELU.forward, row)
    x = random((37, 54), dtype, device, scale=4.0)
    with watching(layer := QuickGELU(), modules=QuickGELU) as watch:
        run(layer, x)
    slope = run(layer, x.double().cpu()).abs()
    numbers = seen(watch)
    assert numbers["mean_derivative"] == pytest.approx(slope.mean().item(), rel=1e-6)
    assert numbers["least_derivative"] == pytest.approx(slope.min().item(), rel=1e-5, abs=1e-7)
    assert numbers["saturated"] == (slope < 0.01).double().mean().item()


@pytest.mark.parametrize("kind", statistics.KINDS)
@pytest.mark.ways("ptx")
def test_derivatives_of_infinite_inputs_are_finite_and_nan_is_neither_saturated_nor_a_minimum(kind, device):
    x = torch.tensor([-math.inf, math.inf], device=device)
    for extra in ([], [math.nan]):
        values = torch.cat([x, torch.tensor(extra, device=device)]).view(1, 1, -1)
        limits = statistics.bounds(kind, "never", torch.float32, 0.01, x.device)
        totals = torch.tensor([0, 0, 0, 0, math.inf], dtype=torch.float64, device=device)
        statistics.add_activation(values, kind, limits, totals, *torch.zeros(2, 1, device=device).unbind())
        slopes = [abs(statistics.KINDS[kind].slope(value)) for value in (-math.inf, math.inf)]
        assert totals[1] == sum(slope < 0.01 for slope in slopes)
        assert totals[4] == min(slopes)
        assert totals[3].isnan() if extra else totals[3] == sum(slopes)


@pytest.mark.parametrize("norm", [1e-30, 1e30])
@pytest.mark.ways("ptx")
def test_norms_neither_vanish_nor_overflow(norm, device):
    x = random((5, 7), torch.float32, device)
    grad = torch.full_like(x, norm)
    with watching(layer := nn.Sigmoid()) as watch:
        run(layer, x, grad)
    assert seen(watch)["entering"] == pytest.approx(norm * 35**0.5, rel=1e-6)


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "sliced": lambda x: x[:, 3:20],
    "every second": lambda x: x[::2, ::2],
    "expanded": lambda x: x[:1].expand(37, -1),
    "channels last": lambda x: x[:36, :48].reshape(4, 9, 12, 4).to(memory_format=torch.channels_last),
    "permuted": lambda x: x[:36, :48].reshape(4, 9, 12, 4).permute(1, 2, 3, 0),
    "block": lambda x: x[:36, :48].reshape(4, 9, 12, 4)[:, :5, 2:7, :3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.ways("interpreter", "ptx")
def test_layouts_are_read_as_they_are(layout, device):
    x = LAYOUTS[layout](random((37, 54), torch.float32, device, scale=4.0))
    grad = LAYOUTS[layout](random((37, 54), torch.float32, device, seed=1))
    layer = nn.Sigmoid()
    with watching(layer, dead_after=1, threshold=0.2) as watch:
        (layer(leaf := x.detach().requires_grad_())).backward(grad)
    slope = exact_derivative(layer, x.double().cpu())
    numbers = seen(watch)
    assert numbers["saturated"] == (slope < 0.2).double().mean().item()
    assert numbers["mean_derivative"] == pytest.approx(slope.mean().item(), rel=1e-6)
    assert numbers["entering"] == pytest.approx(grad.double().norm().item(), rel=1e-6)
    assert numbers["leaving"] == pytest.approx(leaf.grad.double().norm().item(), rel=1e-6)
    by_unit = (slope < 0.2).movedim(1 if x.ndim == 4 else -1, 0).flatten(1)
    assert (numbers["dead_units"], numbers["units"]) == (by_unit.all(1).sum().item(), len(by_unit))


@pytest.mark.ways("ptx")
def test_the_same_tensor_gives_the_same_bits(device):
    layer, x = nn.Sigmoid(), random((300, 700), torch.float32, device, scale=4.0)
    found = []
    for _ in range(2):
        with watching(layer) as watch:
            run(layer, x)
        found.append(seen(watch))
    assert found[0] == found[1]


def test_under_autocast_the_layers_own_dtype_is_judged(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).to(device)
    nn.init.constant_(model[0].bias, 8.0)
    nn.init.zeros_(model[0].weight)
    with GradientWatch(model) as watch, torch.autocast(device, dtype=torch.bfloat16):
        model(torch.ones(3, 4, device=device)).float().sum().backward()
    assert seen(watch, "1")["lost_to_rounding"] == 1
    assert seen(watch, "1")["mean_derivative"] == pytest.approx(1 / (2 + math.exp(8) + math.exp(-8)), rel=1e-6)


@pytest.mark.parametrize(("save", "lost"), [("output", 1.0), ("input", 0.0)])
def test_what_intercept_saves_is_known(save, lost, device):
    layer, x = nn.Sigmoid(), torch.full((4,), 20.0, dtype=torch.bfloat16, device=device)
    with watching(layer) as watch, torch_sigmoid.intercept(save=save):
        assert (run(layer, x) == 0).all() == (lost == 1)
    assert seen(watch)["lost_to_rounding"] == lost


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, torch_sigmoid.Sigmoid])
def test_in_place_modules_are_read_before_they_write(kind, device):
    module = kind(inplace=True)
    x = random((9, 6), torch.float32, device, scale=4.0)
    with watching(module) as watch:
        gradient = run(module, x)
    slope = exact_derivative(module, x.double().cpu()).abs()
    assert seen(watch)["mean_derivative"] == pytest.approx(slope.mean().item(), rel=1e-6)
    assert seen(watch)["leaving"] == pytest.approx(gradient.double().norm().item(), rel=1e-6)


@pytest.mark.ways("interpreter", "ptx")
def test_by_default_a_unit_is_dead_after_ten_calls(device):
    layer = nn.Sigmoid()
    with watching(layer) as watch:
        for call in range(1, 12):
            run(layer, torch.full((3, 2), 9.0, device=device))
            assert seen(watch)["dead_units"] == (2 if call >= 10 else None), "unknown before"


@pytest.mark.ways("interpreter", "ptx")
def test_units_are_dead_after_k_calls_and_revive(device):
    layer = nn.Sigmoid()
    x = torch.zeros(4, 3, device=device)
    x[:, 1] = 20
    with watching(layer, dead_after=3) as watch:
        counts = []
        for _ in range(4):
            run(layer, x)
            counts.append(seen(watch)["dead_units"])
        x[2, 1] = 0
        run(layer, x)
        counts.append(seen(watch)["dead_units"])
    assert counts == [None, None, 1, 1, 0]
    assert seen(watch)["units"] == 3


def test_units_of_a_size_seen_too_rarely_are_not_judged(device):
    layer = nn.Sigmoid()
    with watching(layer, dead_after=2) as watch:
        run(layer, torch.full((3, 2), 9.0, device=device))
        assert (seen(watch)["dead_units"], seen(watch)["units"]) == (None, None)
        run(layer, torch.full((3, 2), 9.0, device=device))
        run(layer, torch.full((3, 5), 9.0, device=device))
    assert (seen(watch)["dead_units"], seen(watch)["units"]) == (2, 2)


def test_a_default_device_changes_nothing(device):
    statistics.bounds.cache_clear()
    layer = nn.Sigmoid()
    torch.set_default_device("meta")
    try:
        with watching(layer) as watch:
            run(layer, torch.full((3,), 9.0, device=device, dtype=torch.bfloat16))
    finally:
        torch.set_default_device(None)
    assert seen(watch)["lost_to_rounding"] == 1


@pytest.mark.ways("ptx")
def test_the_tail_of_silu_in_fp32(device):
    layer, x = nn.SiLU(), torch.full((3,), -90.0, device=device)
    with watching(layer) as watch:
        run(layer, x)
    assert seen(watch)["mean_derivative"] == pytest.approx(89 * math.exp(-90), rel=1e-6)
    assert seen(watch)["lost_to_rounding"] == 1


class Deceiving(nn.Sigmoid):
    def forward(self, x):
        return x * 2


def test_a_subclass_with_its_own_forward_is_not_taken_for_a_sigmoid(device):
    layer = Deceiving()
    with watching(layer) as watch:
        run(layer, torch.ones(3, device=device))
    assert seen(watch)["mean_derivative"] is None
    assert seen(watch)["attenuation"] == pytest.approx(2)


def activation_totals(x, kind, threshold=0.01):
    """What `add_activation` gives, and the streak of each unit."""
    totals = torch.zeros(len(statistics.ACTIVATION_COLUMNS), dtype=torch.float64)
    totals[statistics.LEAST] = math.inf
    alive, streak = torch.zeros(2, x.shape[1]).unbind()
    limits = statistics.bounds(kind, "sigmoid rounds to 1", x.dtype, threshold, x.device)
    statistics.add_activation(x, kind, limits, totals, alive, streak)
    return totals.tolist(), streak.tolist()


@pytest.mark.ways
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "layer"), [("sigmoid", nn.Sigmoid()), ("tanh", nn.Tanh())], ids=["sigmoid", "tanh"])
def test_chunks_add_up_whatever_their_extremes_say(kind, layer, dtype, monkeypatch):
    """Chunks of three rows: within no interval, within one, in part, with a NaN, with ±∞."""
    x = random((18, 5), dtype, scale=0.5)
    x[3:6], x[6:9] = -30.0, 30.0
    x[9:12], x[:, 4] = random((3, 5), dtype, scale=20.0), 40.0
    x[12, 0], x[15, 1], x[16, 2], x[:, 3] = math.nan, math.inf, -math.inf, -50.0
    slope = exact_derivative(layer, x.double()).abs()
    saturated = slope < 0.01
    lost = (torch.sigmoid(x) == 1) & (slope >= torch.finfo(dtype).smallest_normal)
    for chunk in (15, 1 << 16):
        monkeypatch.setattr(statistics, "_CHUNK", chunk)
        (n, n_saturated, n_lost, total, least), streak = activation_totals(x[..., None], kind)
        assert (n, n_saturated, n_lost) == (x.numel(), saturated.sum(), lost.sum())
        assert math.isnan(total)
        assert least == pytest.approx(slope[~slope.isnan()].min().item(), rel=1e-5, abs=1e-37)
        assert streak == saturated.all(0).tolist()
    x[12, 0] = 0.0
    monkeypatch.setattr(statistics, "_CHUNK", 15)
    by_chunks, _ = activation_totals(x.t().contiguous().t()[..., None], kind)
    assert by_chunks[3] == pytest.approx(exact_derivative(layer, x.double()).abs().sum().item(), rel=1e-6)


@pytest.mark.ways
@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_squares_of_any_layout_and_size_leave_out_what_is_not_finite(chunk, monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    g = random((6, 8, 5), torch.float32, scale=1e-30)
    dirty = g.clone()
    dirty[0, 1, 2], dirty[3, 0, 0], dirty[5, 7, 4] = math.inf, math.nan, -math.inf
    huge = torch.tensor([1e200, 1.0], dtype=torch.float64)
    for tensor in (g, g.mT, g[:, ::2], g[:1].expand(6, 8, 5), g[0, 0, 0], g.bfloat16(), dirty, dirty.permute(2, 0, 1), huge):
        totals = torch.zeros(len(statistics.SQUARES_COLUMNS), dtype=torch.float64)
        statistics.add_squares(tensor, totals)
        finite = tensor[tensor.isfinite()].double()
        expected = [finite.square().sum().item(), tensor.numel(), tensor.numel() - finite.numel()]
        assert totals.tolist() == [pytest.approx(expected[0], rel=1e-12), *expected[1:]]
