"""The contract of every operator, case by case of the table torch_sigmoid.operators: a new row is tested without a new line.

The truth is the case's own formula in torch operators and float64, or `exact`, f and f' of a float. What only some operators
have (clamps, broadcast sums, weights, ignored targets, γ) is in test_gates.py, test_losses.py and test_siglip.py.
"""

import copy
import functools
import inspect
import itertools
import pickle
import re

import pytest
import torch
from reference import FLOATS, SIXTEEN_BIT, all_patterns, is_normal, random, runs_kernels, ulp
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from watched import gate_of, seen, watching

import torch_sigmoid
from benchmarks.measure import counts
from benchmarks.measure.operators import operators as benchmarked
from torch_sigmoid import agreement
from torch_sigmoid.diagnostics import layers as known_layers
from torch_sigmoid.operators import OPERATORS, cases

pytestmark = [
    pytest.mark.ways("ptx"),
    pytest.mark.usefixtures("poisoned_allocations"),
    # torch's own remarks on vmap and on functions that it will drop.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:nn.functional.sigmoid is deprecated"),
]

# In eps, of an element and of the largest. Of a number, a sum over elements, the terms may cancel.
ELEMENT, NUMBER = 4, 12
# Matrix products round to the features' dtype what is then multiplied by the scale, forward and backward.
PRODUCTS = {"siglip": 4.0}
# Of fp32, as the docstrings promise and tests/bounds.py derives.
FP32_ULP = 5.0

NAMED = {name: (row, case) for name, row, case in cases()}
every_case = pytest.mark.parametrize("name", NAMED)
ELEMENTWISE = [name for name, (row, _) in NAMED.items() if row.family in ("sigmoid", "gates")]
UNARY = [name for name, (row, _) in NAMED.items() if row.exact]
EXCHANGED = [name for name, (row, _) in NAMED.items() if row.torch_module]
ROWS, COLUMNS = 5, 6


def function_of(name):
    """The operator's name, that of its public function."""
    return name.partition(",")[0]


def operands(name, dtype, device, rows=ROWS, columns=COLUMNS, seed=0):
    """Random ones, twice as wide as a normal distribution: logits in both tails, and about every fourth beyond a limit."""
    seeds = itertools.count(seed)
    return NAMED[name][1].operands(lambda *shape: random(shape, dtype, device, next(seeds), scale=2.0), rows, columns)


def double(tensors):
    return tuple(tensor.double() for tensor in tensors)


def split(name, tensors):
    """The operands that get gradients, and a way to call a function with these alone."""
    constants = NAMED[name][1].constants
    differentiable = [index for index in range(len(tensors)) if index not in constants]

    def calling(function):
        def called(*given):
            arguments = list(tensors)
            for index, each in zip(differentiable, given):
                arguments[index] = each
            return function(*arguments)

        return called

    return tuple(tensors[index] for index in differentiable), calling


def both(name, tensors):
    """The operands that get gradients, and functions of them: ours, and the formula."""
    case = NAMED[name][1]
    given, calling = split(name, tensors)
    return given, calling(case.function), calling(case.formula)


def leaves(tensors):
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def value_and_gradients(function, tensors, upstream=None):
    tensors = leaves(tensors)
    output = function(*tensors)
    grads = torch.autograd.grad(output, tensors, torch.ones_like(output) if upstream is None else upstream.to(output.dtype))
    return output.detach(), *grads


def derivatives(function, tensors, dtype):
    """Value, gradients, and what reaches the upstream gradient and the tensors from a second backward; vectors of `dtype`."""
    tensors = leaves(tensors)
    output = function(*tensors)

    def vector(like, seed):
        return random(like.shape, dtype, like.device, seed).to(like.dtype)

    upstream = vector(output, 90).requires_grad_()
    grads = torch.autograd.grad(output, tensors, upstream, create_graph=True)
    v = [vector(grad, 91 + index) for index, grad in enumerate(grads)]
    again = torch.autograd.grad(grads, (upstream, *tensors), v)
    return tuple(each.detach() for each in (output, *grads, *again))


def assert_near(name, actual, expected, dtype, equal_nan=False):
    """Within the tolerance of the dtype, of the largest element."""
    tolerance = (ELEMENT if expected.dim() else NUMBER) * torch.finfo(dtype).eps * PRODUCTS.get(NAMED[name][0].family, 1.0)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    if expected.dim() == 0:
        # A sum may be smaller than its terms, and then errs by them.
        scale = max(scale, 0.1)
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=0.0 if scale != scale else tolerance * scale, equal_nan=equal_nan
    )


# Numbers


@every_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value_gradient_and_second_derivative_are_those_of_the_formula_in_float64(name, dtype, device):
    tensors = operands(name, dtype, device)
    given, ours, _ = both(name, tensors)
    wide, _, formula = both(name, double(tensors))
    before = [tensor.clone() for tensor in tensors]
    for actual, expected in zip(derivatives(ours, given, dtype), derivatives(formula, wide, dtype), strict=True):
        assert actual.dtype is dtype
        assert actual.shape == expected.shape
        assert_near(name, actual, expected, dtype)
    assert all(map(torch.equal, tensors, before))


@functools.cache
def exact_results(operator, dtype):
    """Every finite 16-bit number, or a sample of fp32, in ascending order, with f and f' of each."""
    if dtype in SIXTEEN_BIT:
        x = all_patterns(dtype)
    else:
        x = torch.cat([torch.linspace(-104, 104, 30_001), torch.linspace(-3, 3, 30_001)])
    x = x[x.isfinite()].sort().values
    return x, *(torch.tensor([each(value) for value in x.tolist()], dtype=torch.float64) for each in OPERATORS[operator].exact)


def near_a_zero(x, slope):
    """Where f' changes its sign no farther than 1 away: its terms, of the size of 1, cancel there."""
    turns = x[1:][(slope[1:] * slope[:-1]) < 0].double()
    return ((x.double()[:, None] - turns).abs() < 1).any(1)


def assert_exact(actual, true, allowed, near):
    """Within `allowed` ulp of the true value and not lost, wherever that is normal; near a zero, of terms of the size of 1."""
    normal, error = is_normal(true, actual.dtype), (actual.double() - true).abs()
    bound = allowed * ulp(true, actual.dtype) + 2**-21 * near
    worst = (error / ulp(true, actual.dtype))[normal & ~near]
    assert (error <= bound)[normal].all(), f"{worst.max()} ulp"
    assert (actual != 0)[normal & ~(near & (true.abs() < 2**-20))].all()


# Sigmoid has tests of its own, test_forward.py and test_backward.py.
@pytest.mark.parametrize("name", [name for name in UNARY if function_of(name) != "sigmoid"])
@pytest.mark.parametrize("dtype", [*SIXTEEN_BIT, torch.float32], ids=str)
def test_every_16_bit_input_within_an_ulp_and_fp32_within_a_few(name, dtype, device):
    _, case = NAMED[name]
    x, value, slope = exact_results(function_of(name), dtype)
    actual, grad = (each.cpu() for each in value_and_gradients(case.function, [x.to(device)]))
    allowed = FP32_ULP if dtype is torch.float32 else 1.0
    assert_exact(actual, value, allowed, torch.zeros_like(x, dtype=torch.bool))
    assert_exact(grad, slope, allowed, near_a_zero(x, slope))


@every_case
def test_where_the_formula_gives_nan_so_does_the_kernel_and_nowhere_else(name, device):
    tensors = operands(name, torch.float32, device)
    for index in range(len(split(name, tensors)[0])):
        given, ours, formula = both(name, tensors)
        broken = [tensor.clone() for tensor in given]
        broken[index].view(-1)[-1] = float("nan")
        (value, *grads), (expected, *true) = value_and_gradients(ours, broken), value_and_gradients(formula, broken)
        assert value.isnan().any()
        assert torch.equal(value.isnan(), expected.isnan())
        for grad, other in zip(grads, true):
            # The gradient of torch's clamp is 0 at NaN.
            assert (grad.isnan() >= other.isnan()).all()
            assert not grad.isnan().all() or other.isnan().all() or grad.numel() == 1


# Modes of differentiation


@every_case
def test_gradcheck_and_gradgradcheck(name, device):
    given, ours, _ = both(name, operands(name, torch.float64, device, 3, 4))
    options = {"fast_mode": True, "check_batched_grad": True}
    assert gradcheck(ours, leaves(given), check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(ours, leaves(given), check_fwd_over_rev=True, **options)


@every_case
def test_the_third_derivative(name, device):
    given, ours, formula = both(name, operands(name, torch.float64, device))

    def third(function):
        tensors = leaves(given)
        grads = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
        for last in (False, True):
            grads = torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors, create_graph=not last)
        return grads

    torch.testing.assert_close(third(ours), third(formula), rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.launches_nothing("transforms see the losses' formulas")
def test_function_transforms(name, device, kernels):
    given, ours, formula = both(name, operands(name, torch.float64, device, 3, 4))
    tangents = both(name, operands(name, torch.float64, device, 3, 4, seed=5))[0]
    batch = tuple(torch.stack([tensor, 2 * tensor, -tensor], -1) for tensor in given)
    numbers = tuple(range(len(given)))

    def of(function):
        def loss(*tensors):
            return function(*tensors).sin().sum()

        gradient = torch.func.grad(loss, numbers)
        first = torch.stack([given[0]] * 2)
        return {
            "jvp": lambda: torch.func.jvp(function, given, tangents),
            "jvp of jvp": lambda: torch.func.jvp(lambda *t: torch.func.jvp(function, t, tangents)[1], given, tangents),
            "jvp of grad": lambda: torch.func.jvp(gradient, given, tangents),
            "grad of jvp": lambda: torch.func.grad(lambda *t: torch.func.jvp(loss, t, tangents)[1], numbers)(*given),
            "vmap": lambda: torch.func.vmap(function, -1)(*batch),
            "vmap of one operand": lambda: torch.func.vmap(function, (0, *(None for _ in numbers[1:])))(first, *given[1:]),
            "vmap of grad": lambda: torch.func.vmap(gradient, -1)(*batch),
            "hessian": lambda: torch.func.hessian(loss, numbers)(*given),
            "jacrev of jacrev": lambda: torch.func.jacrev(torch.func.jacrev(loss, numbers), numbers)(*given),
        }

    before = kernels.n_launches
    for (mode, actual), expected in zip(of(ours).items(), of(formula).values()):
        try:
            true = expected()
        except RuntimeError as error:
            # torch's glu has no derivatives of its tangent; test_gates.py compares with its halves.
            assert re.search("does not support it|is not implemented", str(error)), error  # noqa: PT017
            continue
        torch.testing.assert_close(actual(), true, rtol=1e-9, atol=1e-9, msg=lambda text: f"{mode}: {text}")  # noqa: B023
    if runs_kernels(device) and name in ELEMENTWISE:
        assert kernels.n_launches > before


@every_case
def test_batched_upstream_gradients_can_be_differentiated(name, device):
    given, ours, formula = both(name, operands(name, torch.float64, device))

    def of(function):
        tensors = leaves(given)
        output = function(*tensors)
        upstream = torch.stack([torch.ones_like(output), output.detach()])
        grads = torch.autograd.grad(output, tensors, upstream, is_grads_batched=True, create_graph=True)
        return *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    torch.testing.assert_close(of(ours), of(formula), rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor hooks", "reentrant"])
@pytest.mark.ways("interpreter")
def test_checkpointing_gives_the_same_bits(name, use_reentrant, device):
    given, ours, _ = both(name, operands(name, torch.float32, device))
    _, *plain = value_and_gradients(ours, given)
    again = leaves(given)
    checkpoint(ours, *again, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(grad, tensor.grad) for grad, tensor in zip(plain, again))


@every_case
def test_an_inference_tensor_beside_one_that_requires_grad(name, device):
    given, ours, _ = both(name, operands(name, torch.float32, device))
    value, *grads = value_and_gradients(ours, given)
    with torch.inference_mode():
        frozen = [tensor.clone() for tensor in given]
    for index, grad in enumerate(grads):
        mixed = [*frozen]
        mixed[index] = given[index].detach().requires_grad_()
        output = ours(*mixed)
        assert torch.equal(output.detach(), value)
        (actual,) = torch.autograd.grad(output, mixed[index], torch.ones_like(output))
        assert torch.equal(actual, grad)


def saved_by(function, tensors):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = function(*tensors)
    return output, saved


@every_case
def test_what_exists_anyway_is_saved_and_backward_twice_gives_the_same(name, device):
    tensors = operands(name, torch.bfloat16, device)
    case = NAMED[name][1]
    arguments = [each.detach().requires_grad_(index not in case.constants) for index, each in enumerate(tensors)]
    output, saved = saved_by(case.function, arguments)
    existing = {tensor.untyped_storage().data_ptr() for tensor in (*arguments, output)}
    # SigLIP's loss computes gradients in forward, and keeps them: tests/test_siglip.py.
    if NAMED[name][0].family != "siglip":
        assert {each.untyped_storage().data_ptr() for each in saved} <= existing
    inputs = [each for each in arguments if each.requires_grad]
    first, second = (torch.autograd.grad(output, inputs, torch.ones_like(output), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@every_case
def test_one_kernel_for_each_derivative(name, device):
    if not runs_kernels(device):
        pytest.skip("counts kernels")
    if NAMED[name][0].family == "siglip":
        pytest.skip("as many as there are chunks: tests/test_siglip.py")
    given, ours, _ = both(name, operands(name, torch.float32, device))

    def count(function):
        with counts.counted() as counter:
            result = function()
        return counter.launches, result

    tensors = leaves(given)
    forward, output = count(lambda: ours(*tensors))
    grad = torch.ones_like(output).requires_grad_()
    backward, grads = count(lambda: torch.autograd.grad(output, tensors, grad, create_graph=True))
    v = [torch.ones_like(each) for each in grads]
    double_backward, _ = count(lambda: torch.autograd.grad(grads, (grad, *tensors), v))
    # A saved output depends on the input: its own gradient goes through backward once more.
    saves_output = name == "sigmoid"
    assert (forward, backward, double_backward) == (1, 1, 1 + saves_output)


# Tracers


class Calling(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@every_case
@pytest.mark.launches_nothing("a compiler sees torch operators")
@pytest.mark.ways
def test_torch_compile_sees_the_whole_graph_forward_and_backward(name, device):
    torch._dynamo.reset()
    given, ours, formula = both(name, operands(name, torch.float64, device))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results, expected = (value_and_gradients(function, given) for function in (compiled, formula))
    torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-13)


@every_case
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.launches_nothing("tracers see torch operators")
@pytest.mark.ways("interpreter")
def test_what_make_fx_and_export_record_holds_for_other_operands(name, device):
    tensors, other = (operands(name, torch.float64, device, seed=seed) for seed in (0, 40))
    case = NAMED[name][1]
    exported = torch.export.export(Calling(case.function), tensors, strict=False).module()
    torch.testing.assert_close(exported(*other), case.formula(*other), rtol=1e-11, atol=1e-13)
    given, ours, _ = both(name, tensors)
    _, _, formula = both(name, tensors)
    graph = make_fx(lambda *given: value_and_gradients(ours, given))(*given)
    moved = split(name, other)[0]
    torch.testing.assert_close(tuple(graph(*moved)), value_and_gradients(formula, moved), rtol=1e-11, atol=1e-13)


# Shapes, layouts, dtypes and devices


def in_storage(tensor, shape, view):
    """The tensor's values in a view of a storage whose other elements are NaN."""
    memory = view(torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device))
    return memory.copy_(tensor)


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def sliced(tensor):
    n = tensor.shape[-1] if tensor.dim() else 0
    return in_storage(tensor, (*tensor.shape[:-1], n + 7), lambda memory: memory[..., 3 : 3 + n]) if n else tensor


def offset_by_one(tensor):
    return in_storage(tensor, (tensor.numel() + 1,), lambda memory: memory[1:].view(tensor.shape))


def three_strided_dimensions(tensor):
    """Three dimensions, each with gaps, so that no two are walked as one; a vector or a number stays what it is."""
    if tensor.dim() < 2:
        return tensor
    tensor = tensor.unflatten(0, (3, -1))
    steps = (slice(None, None, 2),) * 3
    return in_storage(tensor, [2 * size for size in tensor.shape], lambda memory: memory[steps])


LAYOUTS = {function.__name__: function for function in (transposed, sliced, offset_by_one, three_strided_dimensions)}


@pytest.mark.latin_square
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [pytest.param(layout, dtype, id=layout) for layout, dtype in zip(LAYOUTS, [torch.bfloat16, torch.float32] * 2)],
)
@every_case
def test_every_layout_has_the_bits_of_the_dense_tensors(name, layout, dtype, device):
    """Of all operands, or of the first alone with an expanded upstream gradient; sums have an order of their own."""
    tensors = operands(name, dtype, device, 6, 34)
    if layout == "three_strided_dimensions":
        tensors = tuple(each.unflatten(0, (3, -1)) if each.dim() > 1 else each for each in tensors)
        moved = tuple(three_strided_dimensions(each.flatten(0, 1)) if each.dim() > 2 else each for each in tensors)
    else:
        moved = tuple(map(LAYOUTS[layout], tensors))
    try:
        output = NAMED[name][1].function(*tensors)
    except ValueError:
        pytest.skip("takes matrices only")
    dense = random(output.shape, dtype, device, seed=90)
    expanded = dense.new_full((), 0.75).expand(output.shape)
    for arguments, upstream in ((moved, transposed(dense)), ((moved[0], *tensors[1:]), expanded)):
        (given, ours, _), (others, alike, _) = both(name, arguments), both(name, tensors)
        expected = value_and_gradients(alike, others, upstream.contiguous())
        for actual, other in zip(value_and_gradients(ours, given, upstream), expected):
            if runs_kernels(device) and other.numel() >= output.numel() > 1:
                assert torch.equal(actual, other)
            assert_near(name, actual, other.double(), dtype)


@every_case
@pytest.mark.launches_nothing("there are no elements")
def test_empty_operands_have_the_value_and_gradients_of_the_formula(name, device):
    given, ours, formula = both(name, operands(name, torch.float32, device, rows=0))
    results, expected = value_and_gradients(ours, given), value_and_gradients(formula, given)
    torch.testing.assert_close(results, expected, equal_nan=True)


@every_case
@pytest.mark.launches_nothing("some formulas take no tensors without dimensions")
@pytest.mark.filterwarnings("ignore:Tensor.T is deprecated")
def test_tensors_without_dimensions_where_the_formula_takes_them(name, device):
    tensors = tuple(tensor.flatten()[0] for tensor in operands(name, torch.float32, device))
    given, ours, _ = both(name, tensors)
    wide, _, formula = both(name, double(tensors))
    try:
        expected = derivatives(formula, wide, torch.float32)
    except (RuntimeError, TypeError, IndexError):
        with pytest.raises((RuntimeError, ValueError), match=rf"^{function_of(name)}\(\): "):
            ours(*given)
        return
    for actual, other in zip(derivatives(ours, given, torch.float32), expected):
        assert actual.shape == other.shape == ()
        assert actual.dtype is torch.float32
        torch.testing.assert_close(actual.double(), other, rtol=1e-5, atol=1e-6)


@every_case
def test_meta_tensors_have_shapes_and_dtypes(name):
    tensors = tuple(tensor.to("meta") for tensor in operands(name, torch.bfloat16, "cpu"))
    given, ours, formula = both(name, tensors)
    for actual, expected in zip(value_and_gradients(ours, given), value_and_gradients(formula, given)):
        assert actual.is_meta
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.ways("interpreter")
def test_under_autocast_gates_keep_the_dtype_and_losses_are_fp32(name, dtype, device):
    tensors = operands(name, dtype, device)
    given, ours, _ = both(name, tensors)
    wide, _, formula = both(name, double(tensors))
    with torch.autocast(device, dtype=torch.bfloat16):
        value, *grads = value_and_gradients(ours, given)
    expected, *true = value_and_gradients(formula, wide)
    assert value.dtype is (dtype if name in ELEMENTWISE else torch.float32)
    assert all(grad.dtype is dtype for grad in grads)
    for actual, other in zip((value, *grads), (expected, *true)):
        assert_near(name, actual, other, torch.bfloat16)


# Errors


@functools.cache
def argument_names(name):
    """What the errors call the operands of a case, in order."""
    tensors, found = operands(name, torch.float32, "cpu"), []
    for index in range(len(tensors)):
        with pytest.raises(TypeError) as error:
            NAMED[name][1].function(*tensors[:index], [1.0], *tensors[index + 1 :])
        message = re.fullmatch(rf"{function_of(name)}\(\): (\w+) must be a torch\.Tensor, got list", str(error.value))
        assert message, error.value
        found.append(message[1])
    return found


@every_case
def test_a_list_is_refused_by_the_names_of_function_and_argument(name):
    names, parameters = argument_names(name), list(inspect.signature(getattr(torch_sigmoid, function_of(name))).parameters)
    assert len(set(names)) == len(names)
    assert set(names) <= set(parameters)
    assert names[0] == parameters[0]


@every_case
@pytest.mark.launches_nothing("integers are torch's own, or refused")
def test_integers_are_refused_by_name_or_give_what_the_formula_gives(name, device):
    case = NAMED[name][1]
    tensors = operands(name, torch.float32, device)
    integers = tuple(each if i in case.constants else each.round().long() for i, each in enumerate(tensors))
    try:
        actual = case.function(*integers)
    except TypeError as error:
        assert re.match(rf"{function_of(name)}\(\): .* must be .*, got torch\.int64", str(error)), error  # noqa: PT017
    else:
        torch.testing.assert_close(actual, case.formula(*integers))


# The module, and torch's


def options_of(name, tensors):
    """The options that make of the module this case's function, and the operands with which it is called."""
    row, case = NAMED[name]
    options = dict(case.function.keywords) if isinstance(case.function, functools.partial) else {}
    n_called = len(inspect.signature(row.module.forward).parameters) - 1
    return options | dict(zip(argument_names(name)[n_called:], tensors[n_called:])), tensors[:n_called]


def of_module(module, name, tensors):
    """Value and gradients of a module called with operands."""
    constants = NAMED[name][1].constants
    arguments = [each.detach().requires_grad_(index not in constants) for index, each in enumerate(tensors)]
    output = module(*arguments)
    inputs = [each for each in arguments if each.requires_grad]
    return output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))


@every_case
@pytest.mark.ways("interpreter", "ptx")
def test_the_module_and_its_copies_have_the_functions_bits(name, device):
    row, _ = NAMED[name]
    tensors = operands(name, torch.bfloat16, device)
    options, arguments = options_of(name, tensors)
    module = row.module(**options)
    given, ours, _ = both(name, tensors)
    expected = value_and_gradients(ours, given)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(each) is row.module
        assert repr(each) == repr(module)
        assert all(map(torch.equal, of_module(each, name, arguments), expected))
    # Weights are buffers; nothing else is kept.
    assert module.state_dict().keys() == {key for key, option in options.items() if isinstance(option, torch.Tensor)}
    assert not list(module.parameters())


@pytest.mark.parametrize("name", EXCHANGED)
@pytest.mark.ways("interpreter")
@pytest.mark.launches_nothing("TorchScript has torch's operators only")
def test_the_module_is_scriptable_as_torchs_is(name, device):
    row, case = NAMED[name]
    tensors = operands(name, torch.float64, device)
    options, arguments = options_of(name, tensors)
    module = row.module(**options)
    for scripted in (module, torch.nn.Sequential(module))[: 3 - len(arguments)]:
        torch.testing.assert_close(torch.jit.script(scripted)(*arguments), case.formula(*tensors))


@pytest.mark.parametrize("name", EXCHANGED)
@pytest.mark.ways("interpreter")
def test_replace_makes_torchs_module_ours_and_restore_gives_it_back(name, device):
    row, _ = NAMED[name]
    tensors = operands(name, torch.float64, device)
    options, arguments = options_of(name, tensors)
    own = {"save": options.pop("save")} if "save" in options else {}
    theirs = row.torch_module(**options)
    attributes, shown = vars(theirs).keys(), repr(theirs)
    model = torch.nn.ModuleDict({"layer": theirs})
    expected = of_module(theirs, name, arguments)
    assert issubclass(row.module, row.torch_module)
    assert torch_sigmoid.replace(model, **own) is model
    assert model["layer"] is theirs
    assert type(theirs) is row.module
    assert own or repr(theirs) == shown
    torch.testing.assert_close(of_module(theirs, name, arguments), expected, rtol=1e-12, atol=1e-14)
    assert torch_sigmoid.restore(model) is model
    assert type(theirs) is row.torch_module
    assert vars(theirs).keys() == attributes
    torch.testing.assert_close(of_module(theirs, name, arguments), expected, rtol=0, atol=0)


def looked_up(function):
    """A call of `function` by its name, which is looked up at each call."""
    owners = (torch, torch.special, torch.nn.functional, torch.Tensor)
    owner, name = next((owner, name) for owner in owners for name in dir(owner) if getattr(owner, name) is function)
    return lambda *args, **kwargs: getattr(owner, name)(*args, **kwargs)


SPELLED = [
    pytest.param(name, looked_up(function), id=f"{name}-{getattr(function, '__qualname__', function)}")
    for name, (row, case) in NAMED.items()
    if row.torch_module and case is row.cases[""]
    for function in row.torch_functions
] + [
    pytest.param(name, row.torch_module(), id=f"{name}-{row.torch_module.__name__}")
    for name, (row, case) in NAMED.items()
    if row.torch_module and case is row.cases[""]
]


@pytest.mark.parametrize(("name", "function"), SPELLED)
@pytest.mark.ways("interpreter")
def test_intercept_puts_our_function_in_the_place_of_torchs(name, function, device):
    tensors = operands(name, torch.bfloat16, device)
    given, ours, _ = both(name, tensors)
    their_function = split(name, tensors)[1](function)
    expected, by = value_and_gradients(ours, given), type(ours(*leaves(given)).grad_fn)
    with torch_sigmoid.intercept():
        actual, covered = value_and_gradients(their_function, given), type(their_function(*leaves(given)).grad_fn)
    assert covered.__name__ == by.__name__
    assert all(map(torch.equal, actual, expected))
    after = type(their_function(*leaves(given)).grad_fn)
    assert after.__name__ != by.__name__ or not runs_kernels(device), "the context has ended"


# What else reads the table


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.ways("interpreter", "ptx")
def test_after_warmup_by_name_nothing_is_compiled_for_dense_tensors(operator, device, kernels, monkeypatch):
    executed, before = set(), kernels.n_launches
    if kernels.ptx:
        program = kernels.ptx.program
        monkeypatch.setattr(kernels.ptx, "program", lambda text: executed.add(text) or program(text))
    torch_sigmoid.warmup(device, [torch.bfloat16], operators=[operator])
    assert (kernels.n_launches > before) == runs_kernels(device)
    if kernels.ptx:
        compiled = set(executed)
        for name in (name for name in NAMED if function_of(name) == operator):
            # Halves of one tensor are slices, and all pairs are a matrix: these compile again at other sizes.
            of_any_size = all(each.numel() <= 2 * 17 for each in operands(name, torch.bfloat16, device, 2, 17))
            for rows, columns in ((2, 17), (3, 40)) if of_any_size and OPERATORS[operator].family != "siglip" else ((2, 17),):
                given, ours, _ = both(name, operands(name, torch.bfloat16, device, rows, columns))
                derivatives(ours, given, torch.bfloat16)
                tensors = leaves(given)
                torch.autograd.grad(ours(*tensors).sum(), tensors)
                with torch.no_grad():
                    ours(*tensors)
        assert executed == compiled


@pytest.mark.parametrize("operator", [name for name, row in OPERATORS.items() if row.watched])
@pytest.mark.ways("interpreter", "ptx")
def test_a_watch_knows_the_layer_and_its_mean_slope(operator, device):
    row = OPERATORS[operator]
    ours = row.module()
    scale = row.watched.scale(ours)
    assert known_layers.known(ours) == (row.watched.kind, scale, row.watched.lost)
    if row.torch_module:
        assert known_layers.known(row.torch_module()) == (row.watched.kind, scale, row.watched.lost_by_torch)
    assert isinstance(ours, known_layers.SIGMOID_LIKE)
    inputs = row.cases[""].operands(lambda *shape: random(shape, torch.float32, device, scale=4.0), 37, 54)
    with watching(ours) as watch:
        ours(*(each.requires_grad_() for each in inputs)).sum().backward()
    slope_of = OPERATORS[row.watched.kind].exact[1]
    slopes = [abs(scale * slope_of(scale * value)) / scale for value in gate_of(ours, *inputs).flatten().tolist()]
    assert seen(watch)["mean_derivative"] == pytest.approx(sum(slopes) / len(slopes), rel=1e-6)
    assert seen(watch)["least_derivative"] == pytest.approx(min(slopes), rel=1e-5, abs=1e-7)


@pytest.mark.ways("interpreter")
def test_the_doctor_examines_every_operator_with_an_exact_formula(device):
    found = agreement.check(torch.device(device), torch.float32)
    assert set(found) == {name.replace(",", "") for name in UNARY} | {"gates and losses"}
    assert max(found.values()) <= agreement.ALLOWED_ULP[torch.float32]


def test_the_benchmarks_time_every_case():
    table = benchmarked()
    for name, (row, case) in NAMED.items():
        if row.family == "sigmoid":
            # One operator, with a provider for each `save`.
            providers = table[row.family].providers
            assert {"torch", "torch.compile", "ours, output", "ours, input"} <= providers.keys()
        else:
            assert table[name].providers["ours"].function is case.function
            assert (table[name].formula, table[name].written) == (case.formula, case.written)
            assert (table[name].operands, table[name].constants) == (case.operands, case.constants)
