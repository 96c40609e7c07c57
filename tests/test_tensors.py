"""What torch's sigmoid takes beyond plain float tensors: subclasses, DTensor, nested, sparse, complex, integers; and out=."""

import pytest
import torch
import torch.distributed as dist
from reference import derivative, gradient, random, ulp_error
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

import torch_sigmoid

pytestmark = [pytest.mark.ways("interpreter"), pytest.mark.launches_nothing("most of these are torch's own")]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_give_the_default_dtype(dtype, device, save):
    x = torch.tensor([0, 1, 1], device=device).to(dtype)
    assert torch.equal(torch_sigmoid.sigmoid(x, save=save), torch.sigmoid(x))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_torchs(dtype, device, save):
    x = torch.randn(7, dtype=dtype, device=device)
    torch.testing.assert_close(torch_sigmoid.sigmoid(x, save=save), torch.sigmoid(x))
    torch.testing.assert_close(gradient(lambda x: torch_sigmoid.sigmoid(x, save=save), x), gradient(torch.sigmoid, x))
    conjugate = x.conj()
    torch.testing.assert_close(torch_sigmoid.sigmoid(conjugate, save=save), torch.sigmoid(conjugate))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
DTYPES += [torch.bool, torch.uint8, torch.int64]
REFUSED = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor([x], layout=torch.strided),
}


@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested tensors:UserWarning")
def test_layouts_torch_refuses_have_torchs_error(layout, device, save):
    """torch has no sigmoid of sparse tensors (σ(0) ≠ 0) or of nested ones in the old layout: the same error, not another."""
    x = REFUSED[layout](torch.eye(3, device=device))
    with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
        torch.sigmoid(x)
    with pytest.raises(theirs.type):
        torch_sigmoid.sigmoid(x, save=save)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested(device, save):
    parts = [random((2, 3), torch.float32, device), random((4, 3), torch.float32, device, seed=1)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = torch_sigmoid.sigmoid(nested, save=save)
    for ours, part in zip(y.unbind(), parts):
        torch.testing.assert_close(ours, torch.sigmoid(part))
    (grad,) = torch.autograd.grad(sum(part.sum() for part in y.unbind()), nested)
    for ours, part in zip(grad.unbind(), parts):
        torch.testing.assert_close(ours, gradient(torch.sigmoid, part))


class Labelled(torch.Tensor):
    """A subclass with no rules of its own."""


def test_a_plain_subclass_stays_what_it_is(device, save):
    x = random((5,), torch.bfloat16, device).as_subclass(Labelled)
    y = torch_sigmoid.sigmoid(x, save=save)
    assert type(y) is Labelled
    torch.testing.assert_close(y.as_subclass(torch.Tensor), torch.sigmoid(x.as_subclass(torch.Tensor)))
    assert torch_sigmoid.path(x).name == "torch"


def test_a_subclass_that_overrides_functions_sees_torchs_operators(device, save):
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    torch_sigmoid.sigmoid(random((5,), torch.float32, device).as_subclass(Watching), save=save)
    assert torch.sigmoid in seen


def test_a_dispatching_subclass_forward_and_backward(device, save):
    a, b = random((5,), torch.bfloat16, device), random((5,), torch.bfloat16, device, seed=1)
    x = TwoTensor(a, b).requires_grad_()
    y = torch_sigmoid.sigmoid(x, save=save)
    y.sum().backward()
    assert type(y) is type(x.grad) is TwoTensor
    for ours, part in ((x.grad.a, a), (x.grad.b, b)):
        torch.testing.assert_close(ours.double(), derivative(part.cpu()).to(device), rtol=0.02, atol=2e-3)


@pytest.fixture
def mesh(device, tmp_path):
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group(
        {"cpu": "gloo", "cuda": "nccl"}[device], init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_dtensor_forward_and_backward(placement, mesh, device, save):
    local = torch.tensor([[8.0, -1.0], [0.0, 3.0]], dtype=torch.bfloat16, device=device)
    x = distribute_tensor(local, mesh, [placement]).requires_grad_()
    y = torch_sigmoid.sigmoid(x, save=save)
    y.sum().backward()
    theirs = x.detach().requires_grad_()
    torch.sigmoid(theirs).sum().backward()
    assert isinstance(x.grad, DTensor)
    assert y.placements == (placement,)
    assert x.grad.placements in ((placement,), theirs.grad.placements)  # torch 2.11 gathers a 16-bit gradient
    torch.testing.assert_close(y.to_local(), torch.sigmoid(local))
    if save == "input":
        assert ulp_error(x.grad.full_tensor(), derivative(local.cpu())).max() <= 1
    else:
        # From the same σ: where Triton interprets the kernel, it truncates σ to bf16.
        torch.testing.assert_close(x.grad.full_tensor(), gradient(torch_sigmoid.sigmoid, local), rtol=8e-3, atol=0)


def test_parameters_and_buffers_take_the_kernels_path(device):
    plain = torch_sigmoid.path(torch.empty(1, device=device)).name
    assert torch_sigmoid.path(torch.nn.Parameter(torch.empty(1, device=device))).name == plain
    assert torch_sigmoid.path(torch.nn.Buffer(torch.empty(1, device=device))).name == plain


def test_out(device, save):
    x = random((7,), torch.float32, device)
    out = torch.empty(7, device=device)
    assert torch_sigmoid.sigmoid(x, save=save, out=out) is out
    assert torch.equal(out, torch_sigmoid.sigmoid(x)) or device == "cpu"
    torch.testing.assert_close(out, torch.sigmoid(x))
    strided = torch.zeros(14, device=device)[::2]
    torch.testing.assert_close(torch_sigmoid.sigmoid(x, out=strided), torch.sigmoid(x))
    assert torch_sigmoid.sigmoid(x, out=x) is x
    assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_out_of_every_dtype_is_what_torch_makes_of_it(dtype, out_dtype, device):
    x = torch.tensor([0, 1, 1], device=device).to(dtype)
    ours, theirs = (torch.full((3,), 7, device=device).to(out_dtype) for _ in range(2))
    try:
        torch.sigmoid(x, out=theirs)
    except RuntimeError:
        with pytest.raises(ValueError, match=rf"out must have .*, got {out_dtype} on"):
            torch_sigmoid.sigmoid(x, out=ours)
    else:
        assert torch_sigmoid.sigmoid(x, out=ours) is ours
    assert torch.equal(ours, theirs), "torch's values, or untouched"


def test_out_grows_from_empty_as_torchs_does(device):
    out = torch.empty(0, device=device)
    x = random((7,), torch.float32, device)
    torch.testing.assert_close(torch_sigmoid.sigmoid(x, out=out), torch.sigmoid(x))
    ints = torch_sigmoid.sigmoid(torch.arange(7, device=device), out=out)
    assert ints.dtype is torch.float32
