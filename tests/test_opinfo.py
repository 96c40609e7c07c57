"""PyTorch's own test data for sigmoid (OpInfo) and for nn.Sigmoid (ModuleInfo), every sample, driven against ours."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import torch_sigmoid

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
pytest.importorskip("scipy", reason="torch.testing._internal needs it")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.ways()

SIGMOID = next(info for info in op_db if info.name == "sigmoid")
MODULE = next(info for info in module_db if info.module_cls is torch.nn.Sigmoid)
# The fp32 and fp64 exponentials of a CPU, of Triton's interpreter and of a GPU differ in the last digits. bf16 truncates
# in the interpreter.
TOLERANCES = {
    torch.float16: {"rtol": 1e-3, "atol": 1e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-30},
    torch.float32: {"rtol": 1e-6, "atol": 1e-30},
    torch.float64: {"rtol": 1e-14, "atol": 0.0},
}

# Interpreted are a dtype that the kernels compute in, one that they narrow to, and two that stay torch's own.
INTERPRETED = (torch.float32, torch.bfloat16, torch.complex64, torch.int64)
DTYPES = [
    pytest.param(dtype, id=str(dtype), marks=[pytest.mark.ways("interpreter")] * (dtype in INTERPRETED))
    for dtype in sorted(SIGMOID.dtypes, key=str)
]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCES.get(expected.dtype, {"rtol": None, "atol": None}))


def samples(device, dtype, requires_grad):
    """The samples of the common tests, and those against references: extremal, large, strided, empty."""
    yield from SIGMOID.sample_inputs(device, dtype, requires_grad=requires_grad)
    yield from SIGMOID.reference_inputs(device, dtype, requires_grad=requires_grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.launches_nothing("some dtypes are torch's own")
def test_every_operator_sample(dtype, device):
    differentiable = dtype.is_floating_point or dtype.is_complex
    count = 0
    for sample in samples(device, dtype, differentiable):
        count += 1
        x = sample.input.detach().requires_grad_(differentiable)
        assert not sample.args
        assert not sample.kwargs
        theirs = torch.sigmoid(x)
        results = [torch_sigmoid.sigmoid(x, save=save) for save in ("output", "input")]
        if differentiable:
            upstream = torch.randn_like(theirs)
            wide = dtype if dtype.is_complex else torch.float64
            exact_x = x.detach().to(wide).requires_grad_()
            (exact,) = torch.autograd.grad(torch.sigmoid(exact_x), exact_x, upstream.to(wide))
        for ours in results:
            close(ours, theirs)
            if differentiable:
                (actual,) = torch.autograd.grad(ours, x, upstream)
                # From a rounded output, 1 - σ is off by an ulp of 1: an error relative to the upstream gradient.
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(actual.to(wide), exact, equal_nan=True, rtol=4 * eps, atol=8 * eps)
    assert count > 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_sample_through_the_in_place_form_and_the_module(dtype, device):
    for sample in samples(device, dtype, False):
        close(torch_sigmoid.Sigmoid()(sample.input), torch.sigmoid(sample.input))
        close(torch_sigmoid.sigmoid_(sample.input.clone()), torch.sigmoid(sample.input))


@pytest.mark.filterwarnings("ignore")
def test_gradcheck_on_every_small_sample(device, save):
    for sample in SIGMOID.sample_inputs(device, torch.float64, requires_grad=True):
        if sample.input.numel() > 30:
            continue

        def function(x):
            return torch_sigmoid.sigmoid(x, save=save)

        assert gradcheck(function, (sample.input,), check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, (sample.input,), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("dtype", sorted(MODULE.dtypes, key=str), ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_every_module_sample(training, dtype, device, save):
    inputs = MODULE.module_inputs_func(MODULE, device=device, dtype=dtype, requires_grad=True, training=training)
    assert inputs
    for sample in inputs:
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        ours, theirs = torch_sigmoid.Sigmoid(*arguments, save=save, **options), torch.nn.Sigmoid(*arguments, **options)
        forward = sample.forward_input
        actual = ours.train(training)(*forward.args, **forward.kwargs)
        close(actual, theirs.train(training)(*forward.args, **forward.kwargs))
        if sample.reference_fn is not None:
            close(actual, sample.reference_fn(ours, *ours.parameters(), *forward.args, **forward.kwargs))


GATES = {
    "nn.functional.silu": (torch_sigmoid.silu, torch.nn.functional.silu),
    "nn.functional.glu": (torch_sigmoid.glu, torch.nn.functional.glu),
    "nn.functional.logsigmoid": (torch_sigmoid.logsigmoid, torch.nn.functional.logsigmoid),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_every_sample_of_the_gates(name, dtype, device):
    ours, theirs = GATES[name]
    info = next(info for info in op_db if info.name == name and not info.variant_test_name)
    count = 0
    for generate in (info.sample_inputs, info.reference_inputs):
        for sample in generate(device, dtype, requires_grad=True):
            count += 1
            x = sample.input.detach().requires_grad_()
            wide = x.detach().double()
            if name == "nn.functional.silu":
                # torch's is NaN at -inf.
                wide = wide.clamp(min=-1e4)
            wide.requires_grad_()
            y, expected = ours(x, *sample.args, **sample.kwargs), theirs(wide, *sample.args, **sample.kwargs)
            upstream = torch.randn_like(y)
            (grad,) = torch.autograd.grad(y, x, upstream)
            (true,) = torch.autograd.grad(expected, wide, upstream.double())
            assert y.dtype is dtype
            finite = x.isfinite() if name != "nn.functional.glu" else torch.ones_like(x, dtype=torch.bool)
            eps = torch.finfo(dtype).eps
            if name != "nn.functional.glu":
                y, expected = y[finite], expected[finite]
            # As torch rounds it: a value beyond the dtype is infinite.
            torch.testing.assert_close(y, expected.to(dtype), equal_nan=True, rtol=8 * eps, atol=4 * eps)
            torch.testing.assert_close(grad[finite], true[finite].to(dtype), equal_nan=True, rtol=8 * eps, atol=8 * eps)
    assert count > 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GATES)
def test_gradcheck_on_every_small_sample_of_the_gates(name, device):
    info = next(info for info in op_db if info.name == name and not info.variant_test_name)
    for sample in info.sample_inputs(device, torch.float64, requires_grad=True):
        if 0 < sample.input.numel() <= 60:

            def function(x):
                return GATES[name][0](x, *sample.args, **sample.kwargs)  # noqa: B023

            x = sample.input.detach().clone().requires_grad_()
            assert gradcheck(function, (x,), check_forward_ad=True, fast_mode=True)
            assert gradgradcheck(function, (x,), check_fwd_over_rev=True, fast_mode=True)


BCE = next(info for info in op_db if info.name == "nn.functional.binary_cross_entropy_with_logits")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_sample_of_binary_cross_entropy(dtype, device):
    def widened(value):
        return value.detach().double() if isinstance(value, torch.Tensor) else value

    count = 0
    for sample in BCE.sample_inputs(device, dtype, requires_grad=True):
        count += 1
        x = sample.input.detach().requires_grad_()
        wide = widened(x).requires_grad_()
        arguments = [widened(value) for value in sample.args]
        options = {key: widened(value) for key, value in sample.kwargs.items()}
        loss = torch_sigmoid.binary_cross_entropy_with_logits(x, *sample.args, **sample.kwargs)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(wide, *arguments, **options)
        assert loss.dtype is dtype
        upstream = torch.randn_like(loss)
        (grad,) = torch.autograd.grad(loss, x, upstream)
        (true,) = torch.autograd.grad(expected, wide, upstream.double())
        eps = torch.finfo(dtype).eps
        # The samples' targets are any numbers, so that terms cancel.
        terms = 1 + (wide.abs().max() * arguments[0].abs().max()).item()
        for actual, exact in ((loss, expected), (grad, true)):
            torch.testing.assert_close(actual.double(), exact, rtol=4 * eps, atol=4 * eps * terms)
    assert count > 5


@pytest.mark.filterwarnings("ignore")
def test_gradcheck_on_every_sample_of_binary_cross_entropy(device):
    for sample in BCE.sample_inputs(device, torch.float64, requires_grad=True):

        def function(x, target):
            return torch_sigmoid.binary_cross_entropy_with_logits(x, target, *sample.args[1:], **sample.kwargs)  # noqa: B023

        for target in (sample.args[0].detach(), sample.args[0].detach().clone().requires_grad_()):
            x = sample.input.detach().clone().requires_grad_()
            assert gradcheck(function, (x, target), check_forward_ad=True, fast_mode=True)
            assert gradgradcheck(function, (x, target), check_fwd_over_rev=True, fast_mode=True)
