"""The layer, replace and restore, intercept, sigmoid_."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from reference import ROUNDED_ONCE, SIXTEEN_BIT, allowance, derivative, gradient, is_normal, random, ulp_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_sigmoid
from torch_sigmoid import Sigmoid, intercept, replace, restore

pytestmark = pytest.mark.ways("interpreter")


FUNCTIONS_OF_MODULES = {
    torch_sigmoid.Sigmoid: torch_sigmoid.sigmoid,
    torch_sigmoid.SiLU: torch_sigmoid.silu,
    torch_sigmoid.GLU: torch_sigmoid.glu,
    torch_sigmoid.SwiGLU: torch_sigmoid.swiglu,
    torch_sigmoid.BCEWithLogitsLoss: torch_sigmoid.binary_cross_entropy_with_logits,
    torch_sigmoid.SigmoidFocalLoss: torch_sigmoid.sigmoid_focal_loss,
    torch_sigmoid.SigLIPLoss: torch_sigmoid.siglip_loss,
}


@pytest.mark.parametrize("module", FUNCTIONS_OF_MODULES)
def test_a_modules_defaults_are_its_functions(module):
    of_module = inspect.signature(module).parameters
    of_function = inspect.signature(FUNCTIONS_OF_MODULES[module]).parameters
    shared = of_module.keys() & of_function.keys()
    assert shared
    for name in shared:
        assert of_module[name].default == of_function[name].default, name


def test_the_layer_is_a_drop_in():
    layer, theirs = Sigmoid(), nn.Sigmoid()
    assert repr(layer) == repr(theirs) == "Sigmoid()"
    assert repr(Sigmoid(save="input")) == "Sigmoid(save='input')"
    assert repr(Sigmoid(inplace=True)) == "Sigmoid(inplace=True)"
    assert isinstance(layer, nn.Sigmoid)
    assert layer.state_dict() == theirs.state_dict() == {}
    theirs.load_state_dict(layer.state_dict())
    assert list(layer.parameters()) == list(layer.buffers()) == []
    assert layer.eval().training is False


@pytest.mark.parametrize("layer", [Sigmoid(), Sigmoid(save="input"), Sigmoid(inplace=True)], ids=repr)
def test_copies_keep_the_options(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert (twin.save, twin.inplace) == (layer.save, layer.inplace)
        assert repr(twin) == repr(layer)


class Shared(nn.Module):
    """One sigmoid under two names, another deep inside, and one that is not a torch.nn.Sigmoid proper."""

    class Own(nn.Sigmoid):
        def forward(self, x):
            return super().forward(x) * 2

    def __init__(self):
        super().__init__()
        self.first = nn.Sigmoid()
        self.again = self.first
        self.own = Shared.Own()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"act": nn.Sigmoid()})["act"])])

    def forward(self, x):
        return self.own(self.blocks[0](self.again(self.first(x))))


def test_replace_and_restore(device, save):
    torch.manual_seed(0)
    model, x = Shared().to(device).eval(), random((2, 4), torch.float32, device)
    expected, names, first = model(x), [name for name, _ in model.named_modules(remove_duplicate=False)], model.first
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append(1))

    assert replace(model, save=save) is model
    assert type(model.first) is type(model.blocks[0][1]) is Sigmoid
    assert model.first.save == save
    assert type(model.own) is Shared.Own
    assert model.again is model.first is first
    assert not model.first.training
    assert names == [name for name, _ in model.named_modules(remove_duplicate=False)]
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2

    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    assert restore(model) is model
    assert type(model.first) is type(model.blocks[0][1]) is nn.Sigmoid
    assert model.first.__dict__.keys() == nn.Sigmoid().__dict__.keys()
    torch.testing.assert_close(model(x), expected)


def test_replace_a_root_and_change_its_save():
    root = nn.Sigmoid()
    assert type(replace(root)) is Sigmoid
    assert replace(root, save="input").save == "input"
    assert repr(root) == "Sigmoid(save='input')"
    assert type(restore(root)) is nn.Sigmoid


def test_restore_leaves_layers_that_were_ours():
    model = nn.Sequential(Sigmoid(save="input"), nn.Sigmoid())
    replace(model)
    assert [layer.save for layer in model] == ["input", "output"]
    restore(model)
    assert [type(layer) for layer in model] == [Sigmoid, nn.Sigmoid]


def test_a_replaced_model_survives_pickling_and_can_be_restored():
    model = pickle.loads(pickle.dumps(replace(nn.Sequential(nn.Sigmoid()), save="input")))
    assert model[0].save == "input"
    assert type(restore(model)[0]) is nn.Sigmoid


SPELLINGS = {
    "torch.sigmoid": lambda x: torch.sigmoid(x),
    "Tensor.sigmoid": lambda x: x.sigmoid(),
    "torch.special.expit": lambda x: torch.special.expit(x),
    "F.sigmoid": nn.functional.sigmoid,
    "nn.Sigmoid": nn.Sigmoid(),
    "torch.sigmoid(input=)": lambda x: torch.sigmoid(input=x),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.filterwarnings("ignore:nn.functional.sigmoid is deprecated")
def test_intercept_covers_every_spelling(spelling, device):
    function = SPELLINGS[spelling]
    x = torch.tensor([8.0, -8.0, 1.0], dtype=torch.bfloat16, device=device)
    assert gradient(function, x)[0] == 0
    with intercept(save="input"):
        y = function(x)
        grad = gradient(function, x)
    torch.testing.assert_close(y, torch.sigmoid(x))
    assert ulp_error(grad, derivative(x.cpu())).max() <= 1 + allowance(torch.bfloat16, device)
    assert gradient(function, x)[0] == 0, "the context has ended"


def test_intercept_of_the_in_place_spellings(device):
    x = random((50,), torch.float16, device)
    grad = random((50,), torch.float16, device, seed=1)
    for function in (lambda x: torch.sigmoid_(x * 1), lambda x: (x * 1).sigmoid_()):
        with intercept():
            actual = gradient(function, x, grad)
        torch.testing.assert_close(actual, gradient(torch_sigmoid.sigmoid, x, grad), rtol=0, atol=0)


def test_intercept_passes_out_and_other_functions_through(device):
    x, out = random((3,), torch.float32, device), torch.empty(3, device=device)
    with intercept():
        assert torch.sigmoid(x, out=out) is out
        assert torch.sigmoid(x, out=out.double()).dtype is torch.float64
        torch.testing.assert_close(torch.tanh(x), x.tanh())
        assert torch.nn.Sequential(nn.Linear(3, 2).to(device), nn.Sigmoid())(x).shape == (2,)


def test_intercept_nests_and_backward_may_run_outside(device):
    x = torch.tensor([20.0], device=device, requires_grad=True)
    with intercept(save="input"):
        exact = torch.sigmoid(x)
        with intercept():
            lost = torch.sigmoid(x)
    assert torch.autograd.grad(exact, x)[0] != 0
    assert torch.autograd.grad(lost, x)[0] == 0


def test_intercept_does_not_mix_up_what_a_checkpoint_recomputes(device):
    """The recomputation runs in backward, outside the context, and saves σ: a backward that expects x would be wrong."""
    x = random((9,), torch.float32, device).requires_grad_()
    expected = gradient(torch.sigmoid, x)
    with intercept(save="input"), pytest.warns(UserWarning, match="replace"):
        y = checkpoint(nn.Sigmoid(), x * 1, use_reentrant=False)
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)
    with intercept(save="output"), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = checkpoint(nn.Sigmoid(), x * 1, use_reentrant=False)
    x.grad = None
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BIT], ids=str)
@pytest.mark.launches_nothing("torch's operator writes in place")
def test_in_place(dtype, device):
    x, grad = random((200,), dtype, device), random((200,), dtype, device, seed=1)
    base = (x.detach().requires_grad_() * 1).detach().requires_grad_()
    hidden = base * 1
    y = torch_sigmoid.sigmoid_(hidden)
    assert y is hidden
    assert torch.equal(y, torch.sigmoid(x)) or dtype.itemsize > 2
    (actual,) = torch.autograd.grad(y, base, grad)
    sigma = y.detach().cpu().double()
    exact = grad.cpu().double() * sigma * (1 - sigma)
    if dtype in SIXTEEN_BIT:
        assert ulp_error(actual, exact)[is_normal(exact, dtype)].max() <= ROUNDED_ONCE + allowance(dtype, device)
    else:
        torch.testing.assert_close(actual.cpu().double(), exact)
    with torch.no_grad():
        assert torch_sigmoid.sigmoid_(hidden.detach()) is not None
    assert Sigmoid(inplace=True)(random((3,), dtype, device)).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.launches_nothing("torch's operator writes in place")
def test_in_place_on_a_view(dtype, device):
    x = random((6, 4), dtype, device)

    def through(sigmoid_):
        leaf = x.detach().requires_grad_()
        base = leaf * 1
        sigmoid_(base[:, ::2])
        return base, torch.autograd.grad(base, leaf, torch.ones_like(base), create_graph=True)[0]

    ours, theirs = through(torch_sigmoid.sigmoid_), through(torch.sigmoid_)
    torch.testing.assert_close(ours[0], theirs[0], rtol=8e-3, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.launches_nothing("torch's operator writes in place")
def test_in_place_in_higher_orders_and_transforms(dtype, device):
    x = random((5,), dtype, device, scale=1.0)

    def ours(x):
        return torch_sigmoid.sigmoid_(x * 1)

    tolerances = {"rtol": 3e-2, "atol": 4e-3} if dtype is torch.bfloat16 else {}
    for transform in (torch.func.grad, lambda f: torch.func.grad(torch.func.grad(f))):
        actual, expected = (torch.vmap(transform(f))(x) for f in (ours, torch.sigmoid))
        torch.testing.assert_close(actual, expected, **tolerances)
    actual, expected = (torch.func.jvp(f, (x,), (torch.ones_like(x),))[1] for f in (ours, torch.sigmoid))
    torch.testing.assert_close(actual, expected, **tolerances)
    leaf = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(ours(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    s = torch.sigmoid(x.double())
    torch.testing.assert_close(second.double(), s * (1 - s) * (1 - 2 * s), **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.launches_nothing("torch's operator writes in place")
def test_in_place_inside_a_transform_of_something_else(dtype, device):
    """A tensor that the transform does not see, and one that carries a tangent and requires grad."""
    x = random((2, 3), dtype, device).requires_grad_()

    def captured(sigmoid_):
        hidden = x * 1
        y = torch.vmap(lambda scale: sigmoid_(hidden.clone()) * scale)(torch.ones(2, dtype=dtype, device=device))
        return torch.autograd.grad(y.sum(), x)[0]

    def dual(sigmoid_):
        with forward_ad.dual_level():
            y = sigmoid_(forward_ad.make_dual(x, torch.ones_like(x)) * 1)
            return torch.autograd.grad(forward_ad.unpack_dual(y).tangent.sum(), x)[0]

    for case in (captured, dual):
        torch.testing.assert_close(case(torch_sigmoid.sigmoid_), case(torch.sigmoid_), rtol=5e-3, atol=1e-3)


@pytest.mark.launches_nothing("torch's operator writes in place")
def test_in_place_change_after_in_place_is_detected(device):
    x = random((4,), torch.bfloat16, device).requires_grad_()
    y = torch_sigmoid.sigmoid_(x * 1)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
