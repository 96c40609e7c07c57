"""The sigmoid loss of image-text pairs: equal to the plain formula, in chunks, in every mode."""

import contextlib
import copy
import pickle
import shutil
import threading

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from reference import random, runs_kernels
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torch_sigmoid as ts
from torch_sigmoid import siglip
from torch_sigmoid.operators import siglip_loss as plain

pytestmark = pytest.mark.ways("ptx")


def pairs(size, width, dtype, device, scale=10.0, bias=-3.0):
    features = (F.normalize(random((size, width), torch.float64, device, seed), dim=1).to(dtype) for seed in (0, 1))
    return *features, torch.tensor(scale, dtype=dtype, device=device), torch.tensor(bias, dtype=dtype, device=device)


def value_and_gradients(function, tensors):
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    loss = function(*tensors)
    return loss.detach(), *torch.autograd.grad(2 * loss, tensors)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize(
    ("size", "chunk_size"),
    # Executed, a block for each of 17 images takes long; two images have one each too.
    [
        (1, 1),
        (1, 16),
        (2, 1),
        (2, 3),
        pytest.param(17, 1, marks=pytest.mark.ways),
        (17, 3),
        (17, 16),
        (17, 1000),
        (100, 16),
        (100, 99),
        (100, 100),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.launches_nothing("one pair is one column, which torch operators compute")
def test_loss_and_gradients_of_the_plain_formula(dtype, size, chunk_size, device):
    tensors = pairs(size, 8, dtype, device)
    actual = value_and_gradients(lambda *t: ts.siglip_loss(*t, chunk_size=chunk_size), tensors)
    expected = value_and_gradients(plain, [tensor.double() for tensor in tensors])
    # In 16 bit similarities are rounded by matmul, and multiplied by the scale.
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    for one, other in zip(actual, expected):
        assert one.dtype is dtype
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=rtol * other.abs().max().item())


def plain_by_ids(image, text, scale, bias, image_ids, text_ids):
    """The formula in double precision, from the matrix of all pairs."""
    signs = 2 * (image_ids[:, None] == text_ids).to(image) - 1
    return -F.logsigmoid(signs * (scale * image @ text.mT + bias)).sum() / len(image)


def with_ids(function, image_ids, text_ids):
    return lambda *tensors: function(*tensors, image_ids, text_ids)


# The numbers of images and texts, and their ids.
PAIRINGS = {
    "more texts than images": (7, 19, None, None),
    "one image, many texts": (1, 33, None, None),
    "groups": (19, 19, [i // 3 for i in range(19)], [i % 7 for i in range(19)]),
    "fewer texts": (17, 4, [i % 5 for i in range(17)], [0, 1, 2, 9]),
    "one text": (5, 1, [0, 1, 0, 2, 0], [0]),
    "64-bit ids": (3, 4, [2**40, -(2**62), 7], [7, 2**40 + 2**32, 2**40, -(2**62)]),
}


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("chunk_size", [5, None])
@pytest.mark.parametrize("name", PAIRINGS)
def test_ids_and_rectangles_are_those_of_the_plain_formula(name, chunk_size, device):
    n_images, n_texts, *ids = PAIRINGS[name]
    image, text, scale, bias = pairs(max(n_images, n_texts), 6, torch.float64, device)
    tensors = image[:n_images], text[:n_texts], scale, bias
    by_position = torch.arange(n_images, device=device), torch.arange(n_texts, device=device)
    given = [by_position[index] if each is None else torch.tensor(each, device=device) for index, each in enumerate(ids)]
    options = {} if ids[0] is None else {"image_ids": given[0], "text_ids": given[1]}
    actual = value_and_gradients(lambda *t: ts.siglip_loss(*t, chunk_size=chunk_size, **options), tensors)
    expected = value_and_gradients(with_ids(plain_by_ids, *given), tensors)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * other.abs().max().item())
    with torch.no_grad():
        value = ts.siglip_loss(*tensors, chunk_size=chunk_size, **options)
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_ids_are_of_any_integer_dtype_and_stride(dtype, device):
    tensors = pairs(6, 4, torch.float64, device)
    ids = torch.tensor([3, 3, 1, 2, 1, 3], device=device)
    expected = ts.siglip_loss(*tensors, image_ids=ids, text_ids=ids)
    apart = torch.stack([ids, ids + 1], 1).to(dtype)[:, 0]
    assert torch.equal(ts.SigLIPLoss()(*tensors, image_ids=apart, text_ids=ids), expected)


# Executed, test_operators.py has them, of fewer pairs.
@pytest.mark.parametrize("size", [1, pytest.param(5, marks=pytest.mark.ways)])
@pytest.mark.launches_nothing("one pair is one column, which torch operators compute")
def test_first_and_second_derivatives_in_every_mode(size, device):
    tensors = tuple(tensor.requires_grad_() for tensor in pairs(size, 3, torch.float64, device, scale=2.0, bias=-0.3))
    function = lambda *t: ts.siglip_loss(*t, chunk_size=2)  # noqa: E731
    options = {"check_batched_grad": True, "fast_mode": True}
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("ids", ["by position", "given"])
def test_the_second_derivative_of_a_rectangle(ids, device):
    image, text, scale, bias = pairs(9, 3, torch.float64, device, scale=2.0)
    tensors = [each.detach().requires_grad_() for each in (image[:5], text, scale, bias)]
    given = torch.arange(5, device=device), torch.arange(9, device=device)
    if ids == "given":
        given = given[0] // 2, given[1] // 3
    options = {"image_ids": given[0], "text_ids": given[1]} if ids == "given" else {}

    def second(function):
        grads = torch.autograd.grad(function(*tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    actual = second(lambda *t: ts.siglip_loss(*t, chunk_size=2, **options))
    expected = second(with_ids(plain_by_ids, *given))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_the_second_derivative_is_that_of_the_plain_formula_also_for_confident_pairs(device):
    tensors = pairs(12, 4, torch.float32, device, scale=60.0, bias=-1.0)

    def second(function, tensors):
        tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
        grads = torch.autograd.grad(function(*tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    actual = second(lambda *t: ts.siglip_loss(*t, chunk_size=5), tensors)
    for one, other in zip(actual, second(plain, [tensor.double() for tensor in tensors])):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.ways("interpreter")
@pytest.mark.launches_nothing("transforms see torch operators")
def test_function_transforms(device):
    tensors = pairs(5, 3, torch.float64, device)
    numbers = (0, 1, 2, 3)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        actual, expected = (transform(function, numbers)(*tensors) for function in (ts.siglip_loss, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    batch = [torch.stack([tensor, -tensor]) for tensor in tensors]
    actual, expected = (torch.vmap(torch.func.grad(function, numbers))(*batch) for function in (ts.siglip_loss, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# Tracers see the formula in torch operators, and torch.compile sees one operator of ours. Here a tangent or a gradient that is
# lost in a view would show, and a trace that holds for one batch size only.

NUMBERS = (0, 1, 2, 3)
traced = pytest.mark.launches_nothing("a tracer sees torch operators")


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.ways("interpreter")
@traced
def test_linearize_and_jvp(device):
    tensors, tangents = pairs(5, 3, torch.float64, device), pairs(5, 3, torch.float64, device, 0.3, 0.7)
    expected = torch.func.jvp(plain, tensors, tangents)
    torch.testing.assert_close(torch.func.jvp(ts.siglip_loss, tensors, tangents), expected)
    value, linear = torch.func.linearize(ts.siglip_loss, *tensors)
    torch.testing.assert_close((value, linear(*tangents)), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.ways("interpreter")
@traced
def test_transforms_of_ids(device):
    tensors = pairs(5, 3, torch.float64, device)
    several = torch.tensor([[0, 1, 0, 2, 1], [0, 0, 0, 1, 1]], device=device)

    def gradients(function):
        return torch.vmap(torch.func.grad(function, NUMBERS), (None,) * 4 + (0, 0))(*tensors, several, several.flip(1))

    ours = gradients(lambda *t: ts.siglip_loss(*t[:4], image_ids=t[4], text_ids=t[5]))
    torch.testing.assert_close(ours, gradients(plain_by_ids))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.ways("interpreter")
@traced
def test_make_fx_traces_loss_and_gradients_of_any_batch(mode, device):
    def gradients(image, text, scale, bias):
        tensors = [each.detach().requires_grad_() for each in (image, text, scale, bias)]
        return torch.autograd.grad(ts.siglip_loss(*tensors), tensors)

    trace = make_fx(gradients, tracing_mode=mode)(*pairs(5, 3, torch.float64, device))
    tensors = pairs(9 if mode == "symbolic" else 5, 3, torch.float64, device, 4.0, -1.0)
    torch.testing.assert_close(trace(*tensors), torch.func.grad(plain, NUMBERS)(*tensors))


@pytest.mark.ways("interpreter")
@traced
def test_functionalize(device):
    tensors = pairs(5, 3, torch.float64, device)
    torch.testing.assert_close(torch.func.functionalize(ts.siglip_loss)(*tensors), plain(*tensors))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_have_shapes(kind):
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        device = "meta" if kind == "meta" else "cpu"
        features = [torch.empty(size, 3, device=device, requires_grad=True) for size in (5, 7)]
        loss = ts.siglip_loss(*features, 10.0, torch.zeros((), device=device))
        loss.backward()
        assert (loss.shape, features[1].grad.shape) == ((), (7, 3))
        assert {type(loss), type(features[1].grad)} == {type(features[0])}
        assert loss.device.type == device


@traced
@pytest.mark.ways("interpreter")
@pytest.mark.parametrize("ids", ["by position", "given"])
def test_torch_compile_compiles_once_for_all_batches_and_never_holds_the_matrix(ids, device):
    """In one graph with one operator of ours; forward and backward."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    def ours(image, text, scale, bias, image_ids, text_ids):
        options = {"image_ids": image_ids, "text_ids": text_ids} if ids == "given" else {}
        return ts.siglip_loss(image, text, scale, bias, chunk_size=4, **options)

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=backend))
    for size in range(2, 10):
        tensors, numbers = pairs(size, 3, torch.float64, device), torch.arange(size, device=device)
        given = (numbers // 2,) * 2 if ids == "given" else (numbers,) * 2
        actual, expected = (value_and_gradients(with_ids(function, *given), tensors) for function in (compiled, plain_by_ids))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    forward, backward = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    assert forward.count("torch_sigmoid.siglip.default") == 1
    assert not any("mm" in target for target in forward + backward)


@traced
@pytest.mark.ways
def test_torch_compile_of_transforms(device):
    torch._dynamo.reset()
    tensors = pairs(4, 3, torch.float64, device)
    for transform in (lambda f: torch.func.grad(f, NUMBERS), lambda f: lambda *t: torch.func.jvp(f, t, t)):
        compiled = torch.compile(transform(ts.siglip_loss), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), transform(plain)(*tensors))


# torch 2.15 hides a warning of its own by a means that does not help where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operator_of_torch_library_keeps_its_promises():
    from torch_sigmoid.siglip_library import siglip

    ids = torch.arange(5) // 2, torch.arange(5) // 3
    for needs, given in (([True] * 4, ids), ([False] * 4, ids), ([True, False, True, False], (None, None))):
        tensors = [each.requires_grad_(needed) for each, needed in zip(pairs(5, 3, torch.float64, "cpu"), needs)]
        torch.library.opcheck(siglip, (*tensors, *given, 2, needs))
    tensors = [each.requires_grad_() for each in pairs(5, 3, torch.float64, "cpu")]
    loss, *_ = siglip(*tensors, None, None, None, [True] * 4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, tensors, create_graph=True)


class Exported(torch.nn.Module):
    """The loss with a scale of its own, as a model that is exported contains it."""

    def __init__(self):
        super().__init__()
        self.loss = ts.SigLIPLoss()
        self.scale = torch.nn.Parameter(torch.tensor(10.0, dtype=torch.float64))

    def forward(self, image, text, image_ids, text_ids):
        by_ids = self.loss(image, text, self.scale, -3.0, image_ids=image_ids, text_ids=text_ids)
        return by_ids + self.loss(image, text, self.scale)


def exported(size):
    """Arguments of that batch size, and the sizes that vary."""
    image, text, *_ = pairs(size, 3, torch.float64, "cpu")
    batch = torch.export.Dim("batch", min=2, max=4096)
    return (image, text, torch.arange(size) // 2, torch.arange(size) // 3), ({0: batch},) * 4


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_leaves_the_batch_size_open_and_needs_none_of_our_operators(strict):
    arguments, shapes = exported(4)
    program = torch.export.export(Exported(), arguments, dynamic_shapes=shapes, strict=strict)
    assert not any("torch_sigmoid" in str(node.target) for node in program.graph.nodes)
    arguments, _ = exported(11)
    torch.testing.assert_close(program.module()(*arguments), Exported()(*arguments))


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_aot_inductor(tmp_path):
    arguments, shapes = exported(4)
    with torch.no_grad():
        program = torch.export.export(Exported(), arguments, dynamic_shapes=shapes)
        # Optimising the C++ around the kernels takes as long as all the rest.
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        path = str(tmp_path / "loss.pt2")
        package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
        arguments, _ = exported(11)
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*arguments), Exported()(*arguments))


@pytest.mark.filterwarnings("ignore")
def test_onnx():
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    arguments, shapes = exported(4)
    program = torch.onnx.export(Exported(), arguments, dynamo=True, dynamic_shapes=shapes, verbose=False)
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    arguments, _ = exported(11)
    inputs = {each.name: argument.numpy() for each, argument in zip(program.model_proto.graph.input, arguments)}
    (loss,) = evaluator.run(None, inputs)
    torch.testing.assert_close(torch.from_numpy(loss), Exported()(*arguments).detach())


def products_of(function):
    """How many matrix products run."""

    class Products(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += func._schema.name.rstrip("_") in ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul")
            return func(*args, **(kwargs or {}))

    with Products() as products:
        function()
    return products.n


@traced
@pytest.mark.ways("interpreter")
def test_matrix_products(device):
    """Three for loss and gradients, all of them in forward; without gradients one, and for a frozen encoder two."""
    tensors = [each.requires_grad_() for each in pairs(6, 3, torch.float64, device)]
    losses = []
    assert products_of(lambda: losses.append(ts.siglip_loss(*tensors))) == 3
    assert products_of(losses[0].backward) == 0
    with torch.no_grad():
        assert products_of(lambda: ts.siglip_loss(*tensors)) == 1
    assert products_of(lambda: ts.siglip_loss(*[each.detach() for each in tensors])) == 1
    assert products_of(lambda: ts.siglip_loss(tensors[0].detach(), *tensors[1:])) == 2
    assert products_of(lambda: ts.siglip_loss(*[each.detach() for each in tensors[:2]], *tensors[2:])) == 1
    assert products_of(lambda: ts.siglip_loss(*tensors, chunk_size=2)) == 9


def test_a_block_takes_a_bounded_memory_and_no_fewer_rows_than_products_need():
    for n_texts, dtype, rows in ((4096, torch.float32, 256), (4096, torch.bfloat16, 512), (1 << 20, torch.float32, 64)):
        assert siglip.default_chunk_size(torch.empty(n_texts, 0, dtype=dtype)) == rows
    # On a GPU siglip-kernel's best at 65,536 pairs in bf16.
    assert siglip.default_chunk_size(torch.empty(65536, 0, dtype=torch.bfloat16, device="meta")) == 4096


def test_no_gradient_is_lost_where_a_pair_is_certain(device):
    """In bf16 σ of a logit of 10 rounds to 1; a pair that belongs together keeps a gradient of -σ(-10)."""
    image = torch.eye(2, dtype=torch.bfloat16, device=device)
    _, to_image, *_ = value_and_gradients(lambda image, text: ts.siglip_loss(image, text, 10.0, 0.0), [image, image])
    expected = -10.0 / (1 + torch.tensor(10.0, dtype=torch.float64).exp())
    torch.testing.assert_close(to_image[0, 0].double().cpu(), expected, rtol=8e-3, atol=0)


def test_the_operands_and_their_gradients_are_saved_and_nothing_of_the_matrix(device):
    """Once per element of the features, and backward may be called twice."""
    size, width = 40, 8
    tensors = [tensor.requires_grad_() for tensor in pairs(size, width, torch.bfloat16, device)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = ts.siglip_loss(*tensors, chunk_size=7)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in saved}
    features = 2 * size * width
    # 2 bytes as they were given, and 4 of their gradients; what is left are numbers.
    assert 0 < sum(storages.values()) - features * (2 + 4) < 100
    first, second = (torch.autograd.grad(loss, tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.launches_nothing("a compiler, or a mode that records operators, sees torch's")
@pytest.mark.ways("interpreter")
def test_the_matrix_of_all_pairs_is_never_there(device):
    """The largest tensor of forward and backward is a chunk of it, whatever operators run."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(result):
                if isinstance(each, torch.Tensor):
                    self.elements = max(self.elements, each.numel())
            return result

    size, chunk_size = 200, 10
    tensors = [tensor.requires_grad_() for tensor in pairs(size, 4, torch.float32, device)]
    with Largest() as largest:
        ts.siglip_loss(*tensors, chunk_size=chunk_size).backward()
    assert largest.elements == chunk_size * size


def test_scale_and_bias_as_numbers_and_of_one_element(device):
    image, text, scale, bias = pairs(7, 4, torch.float32, device)
    expected = ts.siglip_loss(image, text, scale, bias)
    assert torch.equal(ts.siglip_loss(image, text, 10.0, -3), expected)
    assert torch.equal(
        ts.SigLIPLoss(chunk_size=3)(image, text, scale, bias), ts.siglip_loss(image, text, scale, bias, chunk_size=3)
    )
    torch.testing.assert_close(ts.siglip_loss(image, text, scale), plain(image, text, scale, None))
    one = scale.reshape(1).requires_grad_()
    ts.siglip_loss(image, text, one, torch.tensor(-3.0)).backward()
    assert one.grad.shape == (1,)
    assert repr(ts.SigLIPLoss()) == "SigLIPLoss()"


def test_autocast_multiplies_in_16_bit_and_gives_fp32(device):
    tensors = [tensor.requires_grad_() for tensor in pairs(9, 8, torch.float32, device)]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ts.siglip_loss(*tensors)
    grads = torch.autograd.grad(loss, tensors)
    assert loss.dtype is torch.float32
    assert all(grad.dtype is torch.float32 for grad in grads)
    rounded = [tensor.detach().bfloat16() for tensor in tensors[:2]] + [tensor.detach() for tensor in tensors[2:]]
    expected = value_and_gradients(ts.siglip_loss, rounded)
    torch.testing.assert_close(loss.detach(), expected[0].float(), rtol=8e-3, atol=0)
    torch.testing.assert_close(grads[0], expected[1].float() / 2, rtol=2e-2, atol=1e-4)


def test_layouts_of_features(device):
    image, text, scale, bias = pairs(12, 6, torch.float32, device)
    expected = value_and_gradients(ts.siglip_loss, (image, text, scale, bias))
    strided = image.mT.contiguous().mT, torch.cat([text, text], 1)[:, :6], scale, bias
    torch.testing.assert_close(value_and_gradients(ts.siglip_loss, strided), expected)


@pytest.mark.launches_nothing("nothing to compute")
@pytest.mark.ways("interpreter")
def test_an_empty_batch(device):
    empty = torch.zeros(0, 4, device=device, requires_grad=True)
    loss = ts.siglip_loss(empty, empty, 10.0, -10.0)
    assert loss.isnan()
    loss.backward()
    assert empty.grad.shape == (0, 4)


features = torch.zeros(4, 3)
BAD = {
    "no tensor": (lambda: ts.siglip_loss([1.0], features, 1.0), TypeError, "image_features must be a torch.Tensor, got list"),
    "unequal width": (lambda: ts.siglip_loss(features, torch.zeros(4, 2), 1.0), ValueError, r"got \(4, 3\) and \(4, 2\)"),
    "fewer texts than images": (
        lambda: ts.siglip_loss(features, torch.zeros(3, 3), 1.0),
        ValueError,
        r"without image_ids and text_ids expected a text for each image, got \(4, 3\) and \(3, 3\)",
    ),
    "no matrices": (lambda: ts.siglip_loss(features[0], features[0], 1.0), ValueError, r"must be \(B, D\) .* got \(3,\)"),
    "one of the ids": (
        lambda: ts.siglip_loss(features, features, 1.0, text_ids=torch.arange(4)),
        TypeError,
        "text_ids were given without image_ids",
    ),
    "ids of another shape": (
        lambda: ts.siglip_loss(features, features, 1.0, image_ids=torch.arange(4), text_ids=torch.arange(5)),
        ValueError,
        r"text_ids must have shape \(4,\), one for each row of its features, got \(5,\)",
    ),
    "ids in a list": (
        lambda: ts.siglip_loss(features, features, 1.0, image_ids=[0, 1, 2, 3], text_ids=torch.arange(4)),
        TypeError,
        "image_ids must be a torch.Tensor, got list",
    ),
    "ids that are no integers": (
        lambda: ts.siglip_loss(features, features, 1.0, image_ids=torch.arange(4), text_ids=torch.arange(4.0)),
        TypeError,
        "text_ids must be dense integers, got torch.float32",
    ),
    "ids on another device": (
        lambda: ts.siglip_loss(features, features, 1.0, image_ids=torch.arange(4, device="meta"), text_ids=torch.arange(4)),
        ValueError,
        "image_features on cpu and image_ids on meta",
    ),
    "chunk_size 0": (lambda: ts.siglip_loss(features, features, 1.0, chunk_size=0), ValueError, "at least 1, got 0"),
    "chunk_size 1.5": (lambda: ts.siglip_loss(features, features, 1.0, chunk_size=1.5), TypeError, "or None, got float"),
    "two scales": (
        lambda: ts.siglip_loss(features, features, torch.ones(2)),
        ValueError,
        r"logit_scale must have one element, got",
    ),
    "a scale that is no number": (
        lambda: ts.siglip_loss(features, features, "10"),
        TypeError,
        "logit_scale must be .* got str",
    ),
    "two devices": (
        lambda: ts.siglip_loss(features, features.to("meta"), 1.0),
        ValueError,
        "image_features on cpu and text_features on meta",
    ),
    "a group": (lambda: ts.siglip_loss(features, features, 1.0, group=3), TypeError, "group must be a process group .* got 3"),
    "no world": (lambda: ts.siglip_loss(features, features, 1.0, group="world"), ValueError, "init_process_group"),
    "a complex scale": (
        lambda: ts.siglip_loss(features, features, torch.tensor(1j)),
        TypeError,
        "must be real, got torch.complex64",
    ),
    "a module's chunk_size": (lambda: ts.SigLIPLoss(chunk_size=0), ValueError, "at least 1, got 0"),
    "sparse features": (lambda: ts.siglip_loss(features.to_sparse(), features, 1.0), TypeError, "torch.sparse_coo"),
    "integers": (lambda: ts.siglip_loss(features.long(), features.long(), 1.0), TypeError, "got torch.int64"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    call, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 3)], ids=str)
def test_only_what_is_needed_has_a_gradient(needed, device):
    tensors = pairs(11, 4, torch.float64, device)
    for index in needed:
        tensors[index].requires_grad_()
    grads = torch.autograd.grad(ts.siglip_loss(*tensors, chunk_size=4), [tensors[index] for index in needed])
    every = value_and_gradients(plain, tensors)[1:]
    for grad, index in zip(grads, needed):
        torch.testing.assert_close(2 * grad, every[index], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.ways("interpreter")
def test_traced_and_pickled(device):
    tensors = pairs(6, 3, torch.float32, device)
    with torch.no_grad():
        traced = torch.jit.trace(lambda *t: ts.siglip_loss(*t, chunk_size=4), tensors)
        torch.testing.assert_close(traced(*tensors), plain(*tensors))
    module = pickle.loads(pickle.dumps(ts.SigLIPLoss(chunk_size=3, group="world")))
    assert (module.chunk_size, module.group) == (3, "world")


def test_a_deep_copy_shares_the_group_and_nothing_else(device):
    tensors = pairs(6, 3, torch.float32, device)
    module, calls = ts.SigLIPLoss(), []
    module.register_forward_hook(lambda *_: calls.append("original"))
    twin = copy.deepcopy(module)
    twin.register_forward_hook(lambda *_: calls.append("copy"))
    twin.chunk_size = 2
    module(*tensors)
    assert (calls, module.chunk_size) == (["original"], None)
    twin(*tensors)
    assert calls == ["original", "original", "copy"]
    # Like a process group, a lock cannot be copied.
    module.group = threading.Lock()
    pair = copy.deepcopy([module, module])
    assert pair[0] is pair[1] is not module
    assert pair[0].group is module.group


def test_kernels_of_a_chunk(device, monkeypatch):
    if not runs_kernels(device):
        pytest.skip("counts kernels")
    from torch_sigmoid.kernels import siglip as kernels

    launches = []
    for name in ("_forward", "_gradient"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *t, launch=launch, name=name: launches.append(name) or launch(*t))
    tensors = [tensor.requires_grad_() for tensor in pairs(20, 4, torch.float32, device)]
    ts.siglip_loss(*tensors, chunk_size=10).backward()
    assert launches == ["_gradient"] * 2
    with torch.no_grad():
        ts.siglip_loss(*tensors, chunk_size=10)
    assert launches == ["_gradient"] * 2 + ["_forward"] * 2
