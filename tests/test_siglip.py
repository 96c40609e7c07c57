"""The sigmoid loss of image-text pairs: equal to the plain formula, in chunks, in every mode."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from reference import random, runs_kernels
from torch.autograd import gradcheck, gradgradcheck

import torch_sigmoid as ts
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
    [(1, 1), (1, 16), (2, 1), (2, 3), (17, 1), (17, 3), (17, 16), (17, 1000), (100, 16), (100, 99), (100, 100)],
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


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.launches_nothing("one pair is one column, which torch operators compute")
def test_first_and_second_derivatives_in_every_mode(size, device):
    tensors = tuple(tensor.requires_grad_() for tensor in pairs(size, 3, torch.float64, device, scale=2.0, bias=-0.3))
    function = lambda *t: ts.siglip_loss(*t, chunk_size=2)  # noqa: E731
    options = {"check_batched_grad": True, "fast_mode": True}
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, **options)


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


@pytest.mark.launches_nothing("a compiler, or a mode that records operators, sees torch's")
@pytest.mark.ways("interpreter")
def test_torch_compile_sees_the_whole_graph(device):
    torch._dynamo.reset()
    tensors = pairs(6, 3, torch.float64, device)
    compiled = torch.compile(lambda *t: ts.siglip_loss(*t, chunk_size=4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, tensors), value_and_gradients(plain, tensors), rtol=1e-10, atol=1e-12
    )


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
    from torch.utils._python_dispatch import TorchDispatchMode

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
    assert launches == ["_forward"] * 2 + ["_gradient"] * 2
