"""Binary cross entropy with logits and focal loss: right against float64 and mpmath, whatever the targets, in every mode."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    FLOATS,
    LAYOUTS,
    NARROW_EXECUTED,
    SIXTEEN_BIT,
    WITHOUT_FLOAT16_EXECUTED,
    all_patterns,
    allowance,
    interpreted,
    is_normal,
    random,
    readable,
    runs_kernels,
    ulp,
)
from torch.autograd import gradcheck, gradgradcheck

import torch_sigmoid as ts
from torch_sigmoid import losses
from torch_sigmoid.operators import focal_loss as plain_focal

pytestmark = [pytest.mark.ways("ptx"), pytest.mark.usefixtures("poisoned_allocations")]
REDUCTIONS = ["none", "mean", "sum"]


def exact(x, t, gamma):
    """The loss of weight 1, and its derivatives, each followed by the sum of its terms without their signs, in float64.

    From the definitions, with 1 - p as a sigmoid of its own: in float64 these lose nothing over the range of fp32.
    """
    x, t = x.double().numpy(), t.double().numpy()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        p, q = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
        # An infinite logarithm does not count where nothing of the target is there.
        entropy = np.where(t == 0, 0, t * np.logaddexp(0, -x)) + np.where(t == 1, 0, (1 - t) * np.logaddexp(0, x))
        u = t * q + (1 - t) * p
        power = u**gamma
        # u'/u, and its derivative.
        rate = np.where(u == 0, 0, (1 - 2 * t) * p * q / u)
        turn = np.where(u == 0, 0, (1 - 2 * t) * p * q * (t * (q / u) ** 2 - (1 - t) * (p / u) ** 2))
    slope, size = (1 - t) * p - t * q, (1 - t) * p + t * q
    bend = p * q + 2 * gamma * rate * slope + gamma * entropy * (gamma * rate**2 + turn)
    terms_of_bend = p * q + 2 * gamma * np.abs(rate) * size + gamma * entropy * (gamma * rate**2 + np.abs(turn))
    return (
        torch.as_tensor(entropy * power),
        *(torch.as_tensor(power * each) for each in (slope + gamma * entropy * rate, size + gamma * entropy * np.abs(rate))),
        *(torch.as_tensor(power * each) for each in (bend, terms_of_bend)),
    )


def loss_of(gamma, reduction="none"):
    if gamma:
        return lambda x, t: ts.sigmoid_focal_loss(x, t, -1, gamma, reduction)
    return lambda x, t: ts.binary_cross_entropy_with_logits(x, t, reduction=reduction)


def value_and_gradient(function, x, *others):
    x = x.detach().requires_grad_()
    output = function(x, *others)
    return output.detach(), torch.autograd.grad(output, x, torch.ones_like(output))[0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_every_16_bit_logit_within_an_ulp(dtype, gamma, device):
    """The loss and both derivatives; the derivatives have zeros, around which errors are those of their terms."""
    finite = all_patterns(dtype)
    finite = finite[finite.isfinite()]
    finite = finite[readable(finite, device)]
    targets = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.9, 1e-3], dtype=dtype)
    x, t = finite.repeat(len(targets)), targets.repeat_interleave(len(finite))
    logits = x.to(device).detach().requires_grad_()
    value = loss_of(gamma)(logits, t.to(device))
    upstream = torch.ones_like(value).requires_grad_()
    (grad,) = torch.autograd.grad(value, logits, upstream, create_graph=True)
    grad_again, bend = torch.autograd.grad(grad, (upstream, logits), torch.ones_like(grad))
    true_value, true_grad, terms, true_bend, terms_of_bend = exact(x, t, gamma)
    assert grad_again.equal(grad)
    for actual, true, scale in ((value, true_value, true_value), (grad, true_grad, terms), (bend, true_bend, terms_of_bend)):
        actual, counted = actual.detach().cpu(), is_normal(true, dtype)
        error = (actual.double() - true).abs()
        bound = (0.5 + 1e-3 + allowance(dtype, device)) * ulp(true, dtype) + 2**-21 * (1 + gamma) * scale
        assert (error <= bound)[counted].all()
        assert (error <= (1.0 + allowance(dtype, device)) * ulp(torch.maximum(scale, true.abs()), dtype))[counted].all()
        assert (actual[counted & (true.abs() > 2**-20 * scale)] != 0).all()
        assert not actual.isnan().any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_fp32_over_its_range(gamma, device):
    """Within 5·(1 + γ) ulp, by an exp that is nearly always rounded correctly; tests/bounds.py derives what is sure."""
    x = torch.cat([torch.linspace(-87, 87, 20_001), torch.linspace(-600, 600, 5_001)]).float()
    targets = torch.tensor([0.0, 1.0, 0.25, 0.9, 1e-3])
    x, t = x.repeat(len(targets)), targets.repeat_interleave(len(x))
    value, grad = value_and_gradient(loss_of(gamma), x.to(device), t.to(device))
    true_value, true_grad, terms, *_ = exact(x, t, gamma)
    for actual, true, scale in ((value, true_value, true_value), (grad, true_grad, terms)):
        counted = is_normal(true, torch.float32)
        error = ((actual.cpu().double() - true).abs() / ulp(torch.maximum(scale, true.abs()), torch.float32))[counted]
        assert error.max() <= 5 * (1 + gamma)
        assert (actual.cpu()[counted & (true.abs() > 2**-20 * scale)] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_focal_loss_of_a_small_gamma_far_out_where_the_plain_formula_fails(dtype, device):
    mpmath = pytest.importorskip("mpmath")
    x = torch.tensor([20.0, -20.0, 20.0, -20.0], dtype=dtype, device=device)
    t = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=dtype, device=device)
    value, grad = value_and_gradient(lambda x, t: ts.sigmoid_focal_loss(x, t, 0.25, 0.5), x, t)

    def loss(logit, target):
        p = 1 / (1 + mpmath.exp(-logit if target else logit))
        return (0.25 if target else 0.75) * (1 - p) ** 0.5 * -mpmath.log(p)

    with mpmath.workdps(60):
        pairs = list(zip(x.tolist(), t.tolist()))
        values = [float(loss(*pair)) for pair in pairs]
        slopes = [float(mpmath.diff(lambda v: loss(v, target), logit)) for logit, target in pairs]  # noqa: B023
    rtol = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    for actual, true in ((value, values), (grad, slopes)):
        torch.testing.assert_close(actual.cpu().double(), torch.tensor(true, dtype=torch.float64), rtol=rtol, atol=0)
    if dtype is not torch.float64:
        plain_value, plain_grad = value_and_gradient(lambda x, t: plain_focal(x, t, 0.25, 0.5), x, t)
        assert plain_grad.isnan().any()
        assert (plain_value == 0).any()


def test_the_gradient_that_torch_loses(device):
    """bf16, target 1, x = 6.5: the truth is -1.5e-3."""
    x, t = torch.tensor([6.5], dtype=torch.bfloat16, device=device), torch.ones(1, dtype=torch.bfloat16, device=device)
    _, grad = value_and_gradient(ts.binary_cross_entropy_with_logits, x, t)
    _, torchs = value_and_gradient(F.binary_cross_entropy_with_logits, x, t)
    assert grad.item() == pytest.approx(-1 / (1 + math.exp(6.5)), rel=8e-3)
    assert torchs.item() == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinite_and_nan_logits(dtype, gamma, device):
    inf = math.inf
    x = torch.tensor([inf, -inf, inf, -inf, inf, -inf, math.nan], dtype=dtype, device=device)
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.25, 0.25, 0.5], dtype=dtype, device=device)
    value, grad = value_and_gradient(loss_of(gamma), x, t)
    assert value[:6].tolist() == [0, 0, inf, inf, inf, inf]
    assert value[6].isnan()
    assert grad[6].isnan()
    expected = [0, 0, 1, -1, 0.75 ** (1 + gamma), -(0.25 ** (1 + gamma))]
    assert grad[:6].tolist() == pytest.approx(expected, rel=1e-2)
    for index in range(6):
        # Ignored, it leaves the others alone.
        ignored = torch.where(torch.arange(7, device=device) == index, -1, (t > 0.5).long())
        options = {"reduction": "sum", "ignore_index": -1}
        if gamma:
            loss = lambda x, t: ts.sigmoid_focal_loss(x, t, -1, gamma, **options)  # noqa: E731, B023
        else:
            loss = lambda x, t: ts.binary_cross_entropy_with_logits(x, t, **options)  # noqa: E731, B023
        _, grad = value_and_gradient(loss, x, ignored)
        assert grad[index] == 0


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.launches_nothing("the formulas in torch operators")
@pytest.mark.ways("interpreter")
def test_an_infinite_weight_in_torch_operators(far, target, name, device):
    """∞·ℓ, as torch has it where torch has a number; `far` logits take another formula on a CPU."""
    inf = math.inf
    x = [-1.0, 0.0, 1.0] + [-inf, -200.0, -100.0, 100.0, 200.0, inf] * far
    x = torch.tensor(x, device=device, requires_grad=True)
    t, weights = torch.full_like(x, target), {"weight": None, "pos_weight": None, name: torch.full_like(x, inf)}
    loss = losses.Loss(reduction="none")
    value = loss.formula(x.detach(), t, **weights)
    (grad,) = loss.backward_formula(torch.ones_like(x), x.detach(), t, **weights, count=None)
    recorded = loss.formula(x, t, **weights).detach()
    theirs = F.binary_cross_entropy_with_logits(x, t, reduction="none", **weights)
    (their_grad,) = torch.autograd.grad(theirs.sum(), x)
    for actual, expected in ((value, theirs.detach()), (recorded, theirs.detach()), (grad, their_grad)):
        assert torch.equal(actual[~expected.isnan()], expected[~expected.isnan()])
    if name == "weight":
        assert torch.equal(value.isinf(), loss.formula(x.detach(), t, None, None) > 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_forward_mode_keeps_the_dtype_of_a_logit_without_dimensions(gamma, reduction, device):
    loss = loss_of(gamma, reduction)
    x, t, tangent = (torch.tensor(value, device=device) for value in (0.7, 0.3, 1.5))
    value, moved = torch.func.jvp(lambda x: loss(x, t), (x,), (tangent,))
    assert value.dtype is moved.dtype is torch.float32
    torch.testing.assert_close(moved, tangent * value_and_gradient(loss, x, t)[1])
    _, of_gradient = torch.func.jvp(torch.func.grad(lambda x: loss(x, t)), (x,), (tangent,))
    assert of_gradient.dtype is torch.float32


WEIGHT = random((7,), torch.float32, seed=5).abs()
POS_WEIGHT = random((5, 1), torch.float32, seed=6).abs() + 0.5


def bce(x, t, reduction, plain):
    function = F.binary_cross_entropy_with_logits if plain else ts.binary_cross_entropy_with_logits
    return function(x, t, reduction=reduction)


def weighted_bce(x, t, reduction, plain):
    function = F.binary_cross_entropy_with_logits if plain else ts.binary_cross_entropy_with_logits
    return function(x, t, WEIGHT.to(x), reduction=reduction, pos_weight=POS_WEIGHT.to(x))


def smoothed_bce(x, t, reduction, plain):
    if plain:
        return F.binary_cross_entropy_with_logits(x, 0.8 * t + 0.1, reduction=reduction)
    return ts.binary_cross_entropy_with_logits(x, t, reduction=reduction, label_smoothing=0.2)


def focal(x, t, reduction, plain):
    return (plain_focal if plain else ts.sigmoid_focal_loss)(x, t, reduction=reduction)


def focal_of_small_gamma(x, t, reduction, plain):
    return (plain_focal if plain else ts.sigmoid_focal_loss)(x, t, alpha=-1, gamma=0.7, reduction=reduction)


def smoothed_weighted_focal(x, t, reduction, plain):
    if not plain:
        return ts.sigmoid_focal_loss(x, t, 0.3, 3, reduction, label_smoothing=0.2, weight=WEIGHT.to(x))
    loss = plain_focal(x, 0.8 * t + 0.1, 0.3, 3) * WEIGHT.to(x)
    return {"none": lambda each: each, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


LOSSES = [bce, weighted_bce, smoothed_bce, focal, focal_of_small_gamma, smoothed_weighted_focal]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda function: function.__name__)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def examples(dtype, device, shape=(5, 7), soft=True):
    """Logits, and targets of which some are hard and some are soft."""
    t = random(shape, torch.float64, device, seed=1, scale=1.0).add(0.5).clamp(0, 1)
    return random(shape, dtype, device), (t if soft else t.round()).to(dtype)


def derivatives(function, x, *others):
    """Value, gradient, and what reaches upstream gradient and x from a second backward."""
    x = x.detach().requires_grad_()
    output = function(x, *others)
    upstream = random(output.shape, torch.float32, x.device, seed=8).to(output.dtype).requires_grad_()
    (grad,) = torch.autograd.grad(output, x, upstream, create_graph=True)
    v = random(x.shape, torch.float32, x.device, seed=9).to(x.dtype)
    return output, grad, *torch.autograd.grad(grad, (upstream, x), v)


@every_loss
@every_reduction
@pytest.mark.parametrize("dtype", WITHOUT_FLOAT16_EXECUTED, ids=str)
def test_values_and_derivatives_against_float64(loss, reduction, dtype, device):
    x, t = examples(dtype, device)
    actual = derivatives(lambda x, t: loss(x, t, reduction, False), x, t)
    expected = derivatives(lambda x, t: loss(x, t, reduction, True), x.double(), t.double())
    for one, other in zip(actual, expected):
        assert one.dtype is dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(one.double(), other, rtol=8 * eps, atol=16 * eps * other.abs().max().item())


# Executed, a mean alone takes seconds.
@every_loss
@pytest.mark.parametrize("reduction", [pytest.param(each, marks=[pytest.mark.ways] * (each != "mean")) for each in REDUCTIONS])
def test_all_first_and_second_derivatives(loss, reduction, device):
    x, t = examples(torch.float64, device)
    x.requires_grad_()
    function = lambda x: loss(x, t, reduction, False)  # noqa: E731
    options = {"fast_mode": True, "check_batched_grad": True}
    assert gradcheck(function, (x,), check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(function, (x,), check_fwd_over_rev=True, **options)


@every_loss
@every_reduction
def test_the_third_derivative_also_where_a_direction_is_zero(loss, reduction, device):
    x, t = examples(torch.float64, device)

    def third(plain):
        y = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(y, t, reduction, plain).sum(), y, create_graph=True)
        v = torch.zeros_like(grad).requires_grad_()
        (second,) = torch.autograd.grad(grad, y, v, create_graph=True)
        (of_v,) = torch.autograd.grad(second.sum(), v, create_graph=True)
        return of_v, torch.autograd.grad(of_v.square().sum(), y)[0]

    for actual, expected in zip(third(False), third(True)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@every_loss
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.launches_nothing("the formulas in torch operators")
@pytest.mark.ways("interpreter")
def test_function_transforms(loss, device):
    x, t = examples(torch.float64, device)

    def of(plain):
        def total(x, t):
            return loss(x, t, "sum", plain)

        yield torch.func.vmap(torch.func.grad(total))(torch.stack([x, -x, 2 * x]), torch.stack([t, t, 1 - t]))
        yield torch.func.hessian(total)(x, t)
        yield torch.func.jvp(lambda x: loss(x, t, "none", plain), (x,), (t,))
        yield torch.func.jacrev(torch.func.jacfwd(total))(x, t)
        yield torch.func.grad(total, 1)(x, t)

    torch.testing.assert_close(list(of(False)), list(of(True)), rtol=1e-9, atol=1e-10)


@every_reduction
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.launches_nothing("the formulas in torch operators")
@pytest.mark.ways("interpreter")
def test_gradients_of_targets_and_weights(gamma, soft, reduction, device):
    x, t = examples(torch.float64, device, soft=soft)

    def of(plain):
        tensors = [each.detach().requires_grad_() for each in (x, t, WEIGHT.to(x), POS_WEIGHT.to(x))]
        a, b, weight, pos_weight = tensors
        if gamma:
            tensors = tensors[:3]
            if plain:
                # p_t as written loses nothing of the derivative in t where t is hard.
                output = plain_focal(a, b, 0.25, gamma) * weight
            else:
                output = ts.sigmoid_focal_loss(a, b, 0.25, gamma, weight=weight)
        elif plain:
            output = weight * (pos_weight * b * F.softplus(-a, threshold=800) + (1 - b) * F.softplus(a, threshold=800))
        else:
            output = ts.binary_cross_entropy_with_logits(a, b, weight, pos_weight=pos_weight, reduction="none")
        output = {"none": lambda each: each, "mean": torch.mean, "sum": torch.sum}[reduction](output)
        grads = torch.autograd.grad(output.sum(), tensors, create_graph=True)
        return *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    for actual, expected in zip(of(False), of(True)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


TARGETS = {
    "bool": lambda t: t > 0.5,
    "int64": lambda t: (t > 0.5).long(),
    "int32": lambda t: (t > 0.5).int(),
    "uint8": lambda t: (t > 0.5).to(torch.uint8),
}


@pytest.mark.parametrize(
    ("dtype", "kind"),
    # Executed, every kind with one dtype, and every dtype with one kind.
    [
        pytest.param(dtype, kind, marks=[pytest.mark.ways] * (dtype is not torch.bfloat16 and kind != "int64"))
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for kind in TARGETS
    ],
    ids=str,
)
@pytest.mark.parametrize("loss", [bce, focal], ids=lambda function: function.__name__)
def test_integer_and_bool_targets(loss, dtype, kind, device):
    """Each element is the same to the last digit; a sum is taken in an order that depends on the target's dtype too."""
    x, t = examples(dtype, device, (33, 50))
    hard = TARGETS[kind](t)
    elements = loss(x, hard, "none", False).double()
    # Two sums of n numbers in any order differ by up to 2·(n - 1)·eps/2 of the sum of their sizes, and each is rounded once.
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = {"sum": (elements.numel() * arithmetic + torch.finfo(dtype).eps) * elements.abs().sum().item()}
    tolerance |= {"none": 0.0, "mean": tolerance["sum"] / elements.numel()}
    for reduction in REDUCTIONS:
        value, grad = value_and_gradient(lambda x, t: loss(x, t, reduction, False), x, hard)  # noqa: B023
        assert value.dtype is dtype
        expected, expected_grad = value_and_gradient(lambda x, t: loss(x, t, reduction, False), x, hard.to(dtype))  # noqa: B023
        assert torch.equal(grad, expected_grad)
        assert ((value.double() - expected.double()).abs() <= tolerance[reduction]).all()


@pytest.mark.ways("interpreter")
def test_dtypes_promote_and_autocast_gives_fp32(device):
    x, t = examples(torch.bfloat16, device)
    for function in (ts.binary_cross_entropy_with_logits, ts.sigmoid_focal_loss):
        for target, dtype in (
            (t, torch.bfloat16),
            (t.float(), torch.float32),
            (t.half(), torch.float32),
            (t.double(), torch.float64),
        ):
            value, grad = value_and_gradient(function, x, target)
            assert value.dtype is dtype
            assert grad.dtype is torch.bfloat16
        with torch.autocast(device, dtype=torch.bfloat16):
            value, grad = value_and_gradient(function, x, t)
            assert value.dtype is torch.float32
            assert grad.dtype is torch.bfloat16
            assert function(x.double(), t).dtype is torch.float64
        wide = value_and_gradient(function, x.double(), t.double())
        torch.testing.assert_close(value.double(), wide[0], rtol=1e-5, atol=1e-7)
    number = torch.tensor(2.0, dtype=torch.float64)
    assert ts.binary_cross_entropy_with_logits(x, t, number, pos_weight=number).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", NARROW_EXECUTED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.launches_nothing("empty tensors among the layouts")
def test_every_layout(layout, dtype, device):
    x, t = LAYOUTS[layout](dtype, device), LAYOUTS[layout](dtype, device, seed=1).abs().fmod(1)
    others = [t.contiguous(), t, t.mT.contiguous().mT if t.dim() > 1 else t]
    for target, (loss, reduction) in zip(others, ((bce, "none"), (bce, "mean"), (focal, "sum"))):
        before = x.clone()
        actual = derivatives(lambda x, t: loss(x, t, reduction, False), x, target)  # noqa: B023
        expected = derivatives(lambda x, t: loss(x, t, reduction, True), x.double(), target.double())  # noqa: B023
        for one, other in zip(actual, expected):
            eps = torch.finfo(dtype).eps
            if other.dim():
                terms = other.abs().max().item() if other.numel() else 0.0
            else:
                # A sum's error is relative to what it sums up; seeds as in `derivatives`.
                v, upstream = random(x.shape, torch.float32, device, seed=9), random((), torch.float32, device, seed=8)
                terms = (expected[1] * v / upstream).abs().sum().item()
            torch.testing.assert_close(one.double(), other, rtol=8 * eps, atol=4 * eps * terms, equal_nan=x.numel() == 0)
        assert torch.equal(x, before)


SHAPES = {
    "classes": ((64, 30), (30,)),
    "samples": ((64, 30), (64, 1)),
    "channels": ((4, 6, 5, 7), (6, 1, 1)),
    "batch": ((4, 6, 5, 7), (4, 1, 1, 1)),
    "all": ((4, 6, 5, 7), (4, 6, 5, 7)),
    "one": ((4, 6, 5, 7), (1,)),
    "number": ((4, 6), ()),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_weights_that_broadcast(name, last, device):
    shape, weight_shape = SHAPES[name]
    x, t = examples(torch.float32, device, shape)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = random(weight_shape, torch.float32, device, seed=3).abs()
    pos_weight = random(weight_shape, torch.float32, device, seed=4).abs()
    for reduction in REDUCTIONS:
        arguments = {"reduction": reduction, "pos_weight": pos_weight}
        actual = derivatives(lambda x: ts.binary_cross_entropy_with_logits(x, t, weight, **arguments), x)  # noqa: B023
        arguments["pos_weight"] = pos_weight.double()
        expected = derivatives(
            lambda x: F.binary_cross_entropy_with_logits(x, t.double(), weight.double(), **arguments),  # noqa: B023
            x.double(),
        )
        for one, other in zip(actual, expected):
            torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6 * other.abs().max().item())


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.float32, torch.bfloat16], ids=str)
@every_reduction
def test_ignored_elements(reduction, target_dtype, gamma, device):
    x, t = examples(torch.float32, device, (70, 90), soft=False)
    ignored = random((70, 90), torch.float32, device, seed=4) > 2
    x[ignored] = math.nan
    target = torch.where(ignored, 255, t).to(target_dtype)
    options = {"reduction": reduction, "ignore_index": 255}

    def ours(x):
        if gamma:
            return ts.sigmoid_focal_loss(x, target, gamma=gamma, **options)
        return ts.binary_cross_entropy_with_logits(x, target, **options)

    def plain(x):
        kept = x[~ignored]
        value = plain_focal(kept, t[~ignored].double(), gamma=gamma) if gamma else bce(kept, t[~ignored].double(), "none", True)
        full = x.new_zeros(x.shape).masked_scatter(~ignored, value)
        return {"none": full, "sum": value.sum(), "mean": value.mean()}[reduction]

    actual, expected = derivatives(ours, x), derivatives(plain, x.double())
    for one, other in zip(actual, expected):
        if one.shape == ignored.shape:
            assert (one[ignored] == 0).all()
        torch.testing.assert_close(
            one.double(), other.nan_to_num(), rtol=4e-6, atol=2e-6 * other.nan_to_num().abs().max().item()
        )
    # By the formula, as under transforms.
    torch.testing.assert_close(torch.func.grad(lambda x: ours(x).sum())(x), value_and_gradient(lambda x: ours(x).sum(), x)[1])


@pytest.mark.parametrize(
    ("dtype", "values", "ignore_index", "counted"),
    [
        (torch.bfloat16, [1, 0, -1000], -1000, 2),
        (torch.int64, [1, 0, 2**24 + 1], 2**24 + 1, 2),
        (torch.int8, [1, 0, -1], -1, 2),
        (torch.uint8, [1, 0, 255], 255, 2),
        (torch.bool, [1, 0, 1], 0, 2),
    ],
    ids=str,
)
def test_what_is_ignored_is_what_is_equal_in_the_targets_own_dtype(dtype, values, ignore_index, counted, device):
    x = torch.zeros(3, dtype=torch.bfloat16, device=device)
    target = torch.tensor(values).to(dtype).to(device)
    loss = ts.binary_cross_entropy_with_logits(x, target, reduction="none", ignore_index=ignore_index)
    assert (loss != 0).sum() == counted
    mean = ts.binary_cross_entropy_with_logits(x.float(), target, ignore_index=ignore_index)
    assert mean.item() == pytest.approx(math.log(2))


def test_nothing_left_to_average(device):
    x = random((5,), torch.float32, device)
    every = torch.full((5,), -100, device=device)
    assert ts.binary_cross_entropy_with_logits(x, every, ignore_index=-100).isnan()
    assert ts.binary_cross_entropy_with_logits(x, every, ignore_index=-100, reduction="sum") == 0
    for reduction, check in (
        ("mean", torch.isnan),
        ("sum", lambda value: value == 0),
        ("none", lambda value: value.shape == (0, 3)),
    ):
        for function in (ts.binary_cross_entropy_with_logits, ts.sigmoid_focal_loss):
            empty = torch.zeros(0, 3, device=device, requires_grad=True)
            value = function(empty, torch.zeros(0, 3, device=device), reduction=reduction)
            assert check(value)
            (grad,) = torch.autograd.grad(value.sum(), empty)
            assert grad.shape == (0, 3)


@pytest.mark.parametrize("n", [1, 1000, 4096, 4097, 70_000, 2_500_000])
def test_sums_are_the_same_in_every_run_and_close_to_float64(n, device):
    """Over one program, several, and several tiles a program, on a GPU; over its larger tiles in the interpreter."""
    x, t = random((n,), torch.float32, device), random((n,), torch.float32, device, seed=1) > 0
    values = [ts.binary_cross_entropy_with_logits(x, t, reduction="sum") for _ in range(2)]
    assert torch.equal(*values)
    wide = F.binary_cross_entropy_with_logits(x.double(), t.double(), reduction="sum")
    torch.testing.assert_close(values[0].double(), wide, rtol=2e-6, atol=0)
    torch.testing.assert_close(ts.binary_cross_entropy_with_logits(x, t).double(), wide / n, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("gamma", "shape"), [(0.0, (40, 33)), (2.0, (3, 400)), (2.0, (1205,))], ids=str)
@pytest.mark.ways("interpreter")
def test_several_tiles_a_program_and_more_sums_than_are_added_up_at_once(gamma, shape, device, monkeypatch):
    """Which takes millions of elements else."""
    if not interpreted(device):
        pytest.skip("the kernels' sizes are changed in the interpreter")
    from torch_sigmoid.kernels import launch, reduce

    for name in ("TILE_ELEMENTS", "INTERPRETED_TILE_ELEMENTS"):
        monkeypatch.setattr(launch, name, 64)
    monkeypatch.setattr(reduce, "MAX_PROGRAMS", 7)
    fold = launch.Launcher(reduce.fold_kernel, 4, arrange=reduce._arrange_fold, layouts_follow=False)
    monkeypatch.setattr(reduce, "_fold", fold)
    launch.plan.cache_clear()
    try:
        x, t = examples(torch.float64, device, shape, soft=False)
        x = x.mT.contiguous().mT if x.dim() > 1 else x
        t[..., ::5] = 7
        options = {"reduction": "mean", "ignore_index": 7}
        kept = t != 7

        def ours(x):
            if gamma:
                return ts.sigmoid_focal_loss(x, t, gamma=gamma, **options)
            return ts.binary_cross_entropy_with_logits(x, t, **options)

        def plain(x):
            return (
                plain_focal(x[kept], t[kept], gamma=gamma, reduction="mean") if gamma else bce(x[kept], t[kept], "mean", True)
            )

        for actual, expected in zip(derivatives(ours, x), derivatives(plain, x)):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)
    finally:
        launch.plan.cache_clear()


# Each loss once, and each reduction, which all losses share.
@pytest.mark.parametrize(
    ("loss", "reduction", "backend"),
    [pytest.param(loss, "mean", "aot_eager", id=f"{loss.__name__}-mean") for loss in LOSSES]
    + [pytest.param(bce, "none", "aot_eager", id="bce-none"), pytest.param(focal, "sum", "eager", id="focal-sum")],
)
@pytest.mark.launches_nothing("the formulas in torch operators")
@pytest.mark.ways
def test_torch_compile_sees_the_whole_graph(loss, reduction, backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: loss(x, t, reduction, False), fullgraph=True, backend=backend)
    for shape in ((5, 7), (9, 7)):
        if loss is weighted_bce and shape[0] != 5:
            continue
        x, t = examples(torch.float64, device, shape)
        results = value_and_gradient(compiled, x, t)
        expected = value_and_gradient(lambda x, t: loss(x, t, reduction, True), x, t)
        torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("loss", [bce, focal], ids=lambda function: function.__name__)
@pytest.mark.launches_nothing("the formulas in torch operators")
@pytest.mark.ways
def test_under_inductor_no_gradient_is_lost(loss, device):
    torch._dynamo.reset()
    x = torch.linspace(-40, 40, 801).to(torch.bfloat16).to(device)
    t = (torch.arange(801, device=device) % 2).bfloat16()
    compiled = torch.compile(lambda x, t: loss(x, t, "none", False), fullgraph=True)
    value, grad = value_and_gradient(compiled, x, t)
    true_value, true_grad, *_ = exact(x.cpu(), t.cpu(), 2.0 * (loss is focal))
    alpha = torch.where(t.cpu() == 1, 0.25, 0.75).double() if loss is focal else 1.0
    for actual, true in ((value, alpha * true_value), (grad, alpha * true_grad)):
        assert ((actual.cpu().double() - true).abs() <= ulp(true, torch.bfloat16))[is_normal(true, torch.bfloat16)].all()


@pytest.mark.launches_nothing("the formulas in torch operators")
@pytest.mark.ways("interpreter")
def test_export_and_make_fx(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, t = examples(torch.float32, device)
    exported = torch.export.export(ts.BCEWithLogitsLoss(pos_weight=torch.full((7,), 2.0, device=device)), (x, t)).module()
    torch.testing.assert_close(exported(x, t), F.binary_cross_entropy_with_logits(x, t, pos_weight=torch.full_like(x[0], 2.0)))
    graph = make_fx(lambda x, t: value_and_gradient(ts.sigmoid_focal_loss, x, t))(x, t)
    torch.testing.assert_close(graph(-x, t), list(value_and_gradient(plain_focal, -x, t)))


def test_an_exported_loss_is_that_of_eager_calls_far_out_and_with_small_weights(device):
    infinity = float("inf")
    x = torch.tensor([-infinity, -120.0, -95.0, 20.0, 120.0, infinity, 1.0], dtype=torch.bfloat16, device=device)
    loss = ts.BCEWithLogitsLoss(reduction="none", pos_weight=torch.full_like(x, 0.001))
    for target in ((x > 0).to(x.dtype), torch.ones_like(x)):
        assert torch.equal(torch.export.export(loss, (x, target)).module()(x, target), loss(x, target))


@every_loss
def test_batched_upstream_gradients_can_be_differentiated(loss, device):
    x, t = examples(torch.float64, device)

    def of(plain):
        y = x.detach().requires_grad_()
        output = loss(y, t, "none", plain)
        upstream = torch.stack([torch.ones_like(output), output.detach()])
        (grad,) = torch.autograd.grad(output, y, upstream, is_grads_batched=True, create_graph=True)
        return grad, torch.autograd.grad(grad.square().sum(), y)[0]

    torch.testing.assert_close(of(False), of(True), rtol=1e-9, atol=1e-10)


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = function()
    return output, saved


@pytest.mark.parametrize("ignore_index", [None, -1])
@every_reduction
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_what_is_given_is_saved_and_a_count_and_nothing_is_overwritten(gamma, reduction, ignore_index, device):
    x, t = examples(torch.bfloat16, device)
    x.requires_grad_()
    before = x.detach().clone(), t.clone()
    options = {"reduction": reduction, "ignore_index": ignore_index}
    function = ts.sigmoid_focal_loss if gamma else ts.binary_cross_entropy_with_logits
    output, saved = saved_by(lambda: function(x, t, **options))
    given = {x.untyped_storage().data_ptr(), t.untyped_storage().data_ptr()}
    others = [each for each in saved if each.untyped_storage().data_ptr() not in given]
    assert [(each.dtype, each.numel()) for each in others] == [(torch.int64, 1)] * (
        reduction == "mean" and ignore_index is not None
    )
    upstream = torch.ones_like(output)
    first, second = (torch.autograd.grad(output, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(t, before[1])
    output = function(x, t, **options)
    t.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, x, upstream)


@every_loss
@pytest.mark.ways("interpreter")
def test_checkpointing(loss, device):
    from torch.utils.checkpoint import checkpoint

    x, t = examples(torch.float32, device)
    _, plain = value_and_gradient(lambda x: loss(x, t, "mean", False), x)
    for use_reentrant in (False, True):
        again = x.detach().requires_grad_()
        checkpoint(lambda x: loss(x, t, "mean", False), again, use_reentrant=use_reentrant).backward()
        assert torch.equal(plain, again.grad)


@pytest.mark.ways("interpreter")
@pytest.mark.launches_nothing("the formulas in torch operators")
def test_gradients_of_targets_and_weights_far_out(device):
    x = torch.tensor([2000.0, 5000.0], device=device)
    t, weight = (torch.tensor(values, device=device, requires_grad=True) for values in ([1.0, 0.0], [1.0, 0.0]))
    loss = ts.binary_cross_entropy_with_logits(x, t, weight, reduction="sum")
    to_t, to_weight = torch.autograd.grad(loss, (t, weight))
    assert to_t.tolist() == [-2000, 0]
    assert to_weight.tolist() == [0, 5000]


@pytest.mark.parametrize("gamma", [33.13, 100.4, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_large_gamma_leaves_nothing_that_is_no_number(gamma, dtype, device):
    x = torch.tensor([0.0, 1.0, 750.0, 1000.0, 3e4, math.inf], dtype=dtype, device=device)
    for t in (torch.ones_like(x), torch.zeros_like(x), torch.full_like(x, 0.5)):
        for function in (lambda x, t: ts.sigmoid_focal_loss(x, t, -1, gamma), torch.func.vmap(loss_of(gamma))):
            value, grad = value_and_gradient(function, x, t)
            assert not value.isnan().any()
            assert grad.isfinite().all()


x23, t23 = torch.zeros(2, 3), torch.ones(2, 3)
BAD = {
    "target of another shape": (
        lambda: ts.binary_cross_entropy_with_logits(x23, torch.ones(3)),
        ValueError,
        r"target must have the shape of input, \(2, 3\), got \(3,\)",
    ),
    "targets of another shape": (
        lambda: ts.sigmoid_focal_loss(x23, torch.ones(3, 2)),
        ValueError,
        r"targets must .* got \(3, 2\)",
    ),
    "a weight that does not broadcast": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23, torch.ones(2)),
        ValueError,
        r"weight must broadcast to input's shape \(2, 3\), got \(2,\)",
    ),
    "a weight larger than the input": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23, pos_weight=torch.ones(4, 2, 3)),
        ValueError,
        "pos_weight must broadcast",
    ),
    "a reduction": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23, reduction="avg"),
        ValueError,
        "reduction must be .* got 'avg'",
    ),
    "focal reduction": (lambda: ts.sigmoid_focal_loss(x23, t23, reduction="batchmean"), ValueError, "got 'batchmean'"),
    "a negative gamma": (lambda: ts.sigmoid_focal_loss(x23, t23, gamma=-1), ValueError, "gamma must not be negative.* got -1"),
    "gamma nan": (lambda: ts.sigmoid_focal_loss(x23, t23, gamma=math.nan), ValueError, "got nan"),
    "an alpha": (
        lambda: ts.sigmoid_focal_loss(x23, t23, alpha=1.5),
        ValueError,
        r"alpha must be in \[0, 1\], or -1 .* got 1.5",
    ),
    "an alpha of -0.5": (lambda: ts.sigmoid_focal_loss(x23, t23, alpha=-0.5), ValueError, "got -0.5"),
    "a smoothing": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23, label_smoothing=1.5),
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    "an ignore_index": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23, ignore_index=0.5),
        TypeError,
        "ignore_index must be an int, got float",
    ),
    "an ignore_index that a 16-bit target rounds": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23.bfloat16(), ignore_index=-999),
        ValueError,
        "ignore_index must be a value that torch.bfloat16 has, got -999",
    ),
    "an ignore_index beyond the target": (
        lambda: ts.sigmoid_focal_loss(x23, t23.to(torch.uint8), ignore_index=-100),
        ValueError,
        "torch.uint8 has, got -100",
    ),
    "an ignore_index beyond everything": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23, ignore_index=10**40),
        ValueError,
        "torch.float32 has",
    ),
    "an alpha that is a tensor": (lambda: ts.sigmoid_focal_loss(x23, t23, torch.tensor(0.5)), TypeError, "alpha .* got Tensor"),
    "two gammas": (lambda: ts.sigmoid_focal_loss(x23, t23, gamma=[2]), TypeError, "gamma must be a number, got list"),
    "no alpha": (lambda: ts.sigmoid_focal_loss(x23, t23, None), TypeError, "alpha must be a number, got NoneType"),
    "gamma in words": (lambda: ts.sigmoid_focal_loss(x23, t23, gamma="2"), TypeError, "gamma must be a number, got str"),
    "an infinite gamma": (lambda: ts.sigmoid_focal_loss(x23, t23, gamma=math.inf), ValueError, "got inf"),
    "sparse targets": (
        lambda: ts.sigmoid_focal_loss(x23, t23.to_sparse()),
        TypeError,
        "targets torch.float32, torch.sparse_coo",
    ),
    "a module's gamma": (lambda: ts.SigmoidFocalLoss(gamma=-1), ValueError, "gamma must not be negative.* got -1"),
    "a module's reduction": (lambda: ts.BCEWithLogitsLoss(reduction="bad"), ValueError, "got 'bad'"),
    "two devices": (
        lambda: ts.binary_cross_entropy_with_logits(x23, t23.to("meta")),
        ValueError,
        "input on cpu and target on meta",
    ),
    "complex targets": (lambda: ts.sigmoid_focal_loss(x23, t23 + 0j), TypeError, "got torch.complex64"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    call, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.ways("interpreter")
def test_numbers_of_numpy(device):
    x, t = examples(torch.float32, device)
    numbers = np.float32(0.5), np.float64(2.0)
    assert torch.equal(ts.sigmoid_focal_loss(x, t, *numbers), ts.sigmoid_focal_loss(x, t, 0.5, 2.0))


def test_targets_are_looked_at_under_debug_only(device):
    x, t = examples(torch.float32, device)
    t[0, 0] = 1.5
    assert ts.binary_cross_entropy_with_logits(x, t).isfinite()
    with ts.debug(), pytest.raises(ValueError, match=r"target must be in \[0, 1\], got 1.5"):
        ts.binary_cross_entropy_with_logits(x, t)
    t[0, 0] = math.nan
    with ts.debug(), pytest.raises(ValueError, match="got nan"):
        ts.sigmoid_focal_loss(x, t)
    t[0, 0] = -100

    @ts.debug()
    def ignoring():
        return ts.binary_cross_entropy_with_logits(x, t, ignore_index=-100)

    assert ignoring().isfinite()
    assert ts.sigmoid_focal_loss(x, t).shape == x.shape


def test_debug_ends_with_its_context_and_stays_in_its_thread_and_task(device):
    x, t = examples(torch.float32, device)
    t[0, 0] = 1.5

    def is_looked_at():
        try:
            ts.binary_cross_entropy_with_logits(x, t)
        except ValueError:
            return True
        return False

    async def looking(steps):
        with ts.debug():
            await asyncio.sleep(0)
            steps.append(is_looked_at())
            await asyncio.sleep(0)

    async def passing(steps):
        for _ in range(3):
            steps.append(is_looked_at())
            await asyncio.sleep(0)

    async def both():
        looked, passed = [], []
        await asyncio.gather(looking(looked), passing(passed))
        return looked, passed

    with ThreadPoolExecutor(1) as other_thread:
        with ts.debug():
            with ts.debug():
                assert not other_thread.submit(is_looked_at).result()
            assert is_looked_at()
            assert other_thread.submit(ts.debug()(is_looked_at)).result()
        assert not is_looked_at()
    assert asyncio.run(both()) == ([True], [False] * 3)


@pytest.mark.ways("interpreter")
def test_the_deprecated_arguments_of_torch(device):
    x, t = examples(torch.float32, device)
    for arguments in ({"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="deprecated"):
            actual = ts.binary_cross_entropy_with_logits(x, t, **arguments)
        with pytest.warns(UserWarning, match="deprecated"):
            torch.testing.assert_close(actual, F.binary_cross_entropy_with_logits(x, t, **arguments))


@pytest.mark.ways("interpreter")
def test_modules(device):
    x, t = examples(torch.float32, device)
    weight = torch.full((7,), 2.0, device=device)
    ours = ts.BCEWithLogitsLoss(weight, reduction="sum", pos_weight=weight)
    theirs = torch.nn.BCEWithLogitsLoss(weight, reduction="sum", pos_weight=weight)
    assert isinstance(ours, torch.nn.BCEWithLogitsLoss)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(x, t), theirs(x, t))
    torch.testing.assert_close(torch.jit.script(ours)(x, t), theirs(x, t))
    smoothed = ts.BCEWithLogitsLoss(label_smoothing=0.1, ignore_index=-1)
    assert torch.equal(smoothed(x, t), ts.binary_cross_entropy_with_logits(x, t, label_smoothing=0.1, ignore_index=-1))
    with pytest.raises(NotImplementedError, match="without label_smoothing"):
        torch.jit.script(smoothed)
    loss = ts.SigmoidFocalLoss(0.3, 1.5, "mean", weight=weight)
    assert torch.equal(loss(x, t), ts.sigmoid_focal_loss(x, t, 0.3, 1.5, "mean", weight=weight))
    assert "weight" in loss.state_dict()
    assert repr(loss) == "SigmoidFocalLoss(alpha=0.3, gamma=1.5, reduction='mean')"
    assert repr(smoothed) == "BCEWithLogitsLoss(label_smoothing=0.1, ignore_index=-1)"


@pytest.mark.ways("interpreter")
def test_replace_and_intercept(device):
    x, t = examples(torch.float64, device)
    model = torch.nn.ModuleDict({"loss": torch.nn.BCEWithLogitsLoss(pos_weight=torch.full((7,), 2.0, device=device))})
    expected = value_and_gradient(model["loss"], x, t)
    ts.replace(model)
    assert type(model["loss"]) is ts.BCEWithLogitsLoss
    torch.testing.assert_close(value_and_gradient(model["loss"], x, t), expected, rtol=1e-12, atol=1e-14)
    ts.restore(model)
    assert type(model["loss"]) is torch.nn.BCEWithLogitsLoss
    far, ones = (
        torch.full((1, 7), 6.5, dtype=torch.bfloat16, device=device),
        torch.ones(1, 7, dtype=torch.bfloat16, device=device),
    )
    with ts.intercept():
        torch.testing.assert_close(value_and_gradient(model["loss"], x, t), expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            value_and_gradient(lambda x, t: F.binary_cross_entropy_with_logits(x, t, None, reduction="none"), x, t),
            value_and_gradient(lambda x, t: ts.binary_cross_entropy_with_logits(x, t, reduction="none"), x, t),
        )
        assert (value_and_gradient(F.binary_cross_entropy_with_logits, far, ones)[1] != 0).all()


@pytest.mark.launches_nothing("subclasses see torch operators")
@pytest.mark.ways("interpreter")
def test_subclasses(device):
    class Tagged(torch.Tensor):
        pass

    x, t = examples(torch.float32, device)
    value, grad = value_and_gradient(ts.binary_cross_entropy_with_logits, x.as_subclass(Tagged), t)
    assert type(value) is Tagged
    torch.testing.assert_close(torch.Tensor(grad), value_and_gradient(F.binary_cross_entropy_with_logits, x, t)[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_kernel_for_each_derivative(reduction, device, monkeypatch):
    if not runs_kernels(device):
        pytest.skip("counts kernels")
    from torch_sigmoid.kernels import launch

    launches = []
    call = launch.Launcher.__call__
    monkeypatch.setattr(launch.Launcher, "__call__", lambda self, *tensors: launches.append(self) or call(self, *tensors))

    def counts(n):
        x, t = examples(torch.float32, device, (n,))
        x.requires_grad_()
        output = ts.sigmoid_focal_loss(x, t, reduction=reduction)
        yield len(launches)
        upstream = torch.ones_like(output).requires_grad_()
        (grad,) = torch.autograd.grad(output, x, upstream, create_graph=True)
        yield len(launches)
        torch.autograd.grad(grad, (upstream, x), torch.ones_like(grad))
        yield len(launches)
        launches.clear()

    assert list(counts(1000)) == [1, 2, 3]
    # A sum of more than one program's takes another to add up.
    more = reduction != "none"
    assert list(counts(5 * 65536)) == [1 + more, 2 + more, 3 + 2 * more]
