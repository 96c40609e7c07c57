"""What `intercept` replaces, where, for whom, and that everything has its own again afterwards."""

import functools
import importlib
import pickle
import subprocess
import sys
import textwrap
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from reference import derivative, gradient, random, ulp_error
from torch.utils.checkpoint import checkpoint

from torch_sigmoid import intercept
from torch_sigmoid.swap import focal
from torch_sigmoid.swap.intercept import intercepted_save
from torch_sigmoid.swap.trees import fingerprint_of

OWNERS = {"torch": torch, "special": torch.special, "functional": F, "Tensor": torch.Tensor}
COVERED = {
    "torch": {"sigmoid", "sigmoid_", "binary_cross_entropy_with_logits"},
    "special": {"expit"},
    "functional": {"sigmoid", "silu", "glu", "logsigmoid", "binary_cross_entropy_with_logits"},
    "Tensor": {"sigmoid", "sigmoid_"},
}


def attributes():
    names = {owner: [name for name in dir(OWNERS[owner]) if not name.startswith("__")] for owner in OWNERS}
    return {(owner, name): getattr(OWNERS[owner], name) for owner in OWNERS for name in names[owner]}


def changed(before):
    after = attributes()
    assert after.keys() == before.keys()
    return {key for key in before if after[key] is not before[key]}


def is_ours(function, x=8.0):
    """Whether the gradient at a saturated σ is there, which torch's is not."""
    return gradient(function, torch.tensor([x], dtype=torch.bfloat16)).item() != 0


def run(code, path=""):
    """In a process of its own: what a process does first matters here."""
    prelude = f"import sys; sys.path[:0] = [{str(path)!r}] * bool({str(path)!r})\n"
    subprocess.run([sys.executable, "-c", prelude + textwrap.dedent(code)], check=True)


def test_a_call_that_is_not_covered_runs_the_same_object_and_no_mode_listens():
    before, n_modes = attributes(), torch._C._len_torch_function_stack()
    with intercept():
        assert changed(before) == {(owner, name) for owner in COVERED for name in COVERED[owner]}
        assert torch._C._len_torch_function_stack() == n_modes
    assert changed(before) == set()
    assert "sigmoid" not in vars(torch.Tensor)


def test_a_wrapper_says_the_name_and_the_documentation_of_its_function():
    with intercept():
        assert torch.sigmoid.__name__ == "sigmoid"
        assert F.silu.__doc__ == F.silu.__wrapped__.__doc__
        assert F.silu.__module__ == "torch.nn.functional"


def test_everything_has_its_own_again_after_an_exception_and_after_nesting():
    before = attributes()
    with intercept(save="input"):
        with pytest.raises(ZeroDivisionError), intercept():
            raise ZeroDivisionError
        assert is_ours(lambda x: torch.sigmoid(x)), "the outer one is still there"
    assert changed(before) == set()
    with intercept(save="input"), pytest.raises(TypeError):
        torch.sigmoid("no tensor")
    with intercept(save="input"):
        assert is_ours(lambda x: torch.sigmoid(x)), "an error inside of ours leaves no trace"


def test_it_is_a_decorator_too():
    @intercept(save="input")
    def function(x, *, times):
        """Documented."""
        return torch.sigmoid(x) * times

    assert is_ours(functools.partial(function, times=2))
    assert function.__doc__ == "Documented."
    assert not is_ours(lambda x: torch.sigmoid(x))


def test_other_threads_have_torchs_functions():
    entered, leave = threading.Barrier(2), threading.Barrier(2)
    seen = []

    def first():
        with intercept(save="input"):
            entered.wait(60)
            leave.wait(60)

    before = attributes()
    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(60)
    assert changed(before), "the wrappers are everybody's"
    seen.append(is_ours(lambda x: torch.sigmoid(x)))
    with intercept(save="input"):
        leave.wait(60)
        thread.join(60)
        seen.append(is_ours(lambda x: torch.sigmoid(x)))
    assert seen == [False, True], "the first to leave takes nothing from the second"
    assert changed(before) == set()


def test_what_somebody_puts_there_meanwhile_stays(monkeypatch):
    def theirs(x):
        return x

    original = torch.sigmoid
    with intercept():
        monkeypatch.setattr(torch, "sigmoid", theirs)
        monkeypatch.setattr(torch.Tensor, "sigmoid", theirs)
    assert torch.sigmoid is torch.Tensor.sigmoid is theirs
    with intercept():
        assert torch.sigmoid is theirs
    monkeypatch.undo()  # puts our wrapper back, which was there when it was called
    with intercept(save="input"):
        assert is_ours(lambda x: torch.sigmoid(x))
    assert torch.sigmoid is original
    assert "sigmoid" not in vars(torch.Tensor)


@pytest.fixture
def library(monkeypatch):
    """A module that has functions by name, in a table and in an object."""
    module = types.ModuleType("a_library")
    module.sigmoid, module.table = torch.sigmoid, {"silu": F.silu, "sigmoid": torch.sigmoid}
    module.layer = types.SimpleNamespace(silu=F.silu, glu=F.glu, cross_entropy=F.binary_cross_entropy_with_logits)
    monkeypatch.setitem(sys.modules, "a_library", module)
    return module


def test_functions_that_a_library_has_by_name_and_in_a_table(library):
    with intercept(save="input"):
        assert is_ours(lambda x: library.sigmoid(x))
        assert is_ours(lambda x: library.table["sigmoid"](x))
        assert library.table["silu"] is F.silu
    assert library.sigmoid is library.table["sigmoid"] is torch.sigmoid
    assert library.table["silu"] is F.silu
    assert not is_ours(library.sigmoid)


@pytest.mark.parametrize("name", ["silu", "glu", "cross_entropy"])
def test_functions_in_python_are_reached_wherever_they_are_held(name, library, device):
    held = functools.partial(getattr(library.layer, name))
    x, target = random((4, 6), torch.float64, device), random((4, 6), torch.float64, device, seed=1).sigmoid()

    def called(x):
        return held(x, target, pos_weight=target, reduction="sum") if name == "cross_entropy" else held(x)

    expected, by = gradient(called, x), type(called(x.clone().requires_grad_()).grad_fn)
    with intercept():
        actual, ours = gradient(called, x), type(called(x.clone().requires_grad_()).grad_fn)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert ours is not by


def test_silu_in_place_is_reached_where_it_is_held(device):
    held, x = F.silu, random((9,), torch.float64, device)
    expected = held(x)
    with intercept():
        y = x.clone()
        assert held(y, inplace=True) is y
    torch.testing.assert_close(y, expected)


def test_modules_imported_meanwhile_have_torchs_functions_afterwards(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("from torch import sigmoid\nfrom torch.nn.functional import silu\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imported_late", raising=False)
    with intercept(save="input"):
        module = importlib.import_module("imported_late")
        assert is_ours(module.sigmoid)
    assert module.sigmoid is torch.sigmoid
    assert module.silu is F.silu
    with intercept(save="input"):
        assert is_ours(module.sigmoid)
    del sys.modules["imported_late"]


def test_names_given_in_the_main_module_later(monkeypatch):
    main = sys.modules["__main__"]
    with intercept(save="input"):
        pass
    monkeypatch.setattr(main, "late_sigmoid", torch.sigmoid, raising=False)
    with intercept(save="input"):
        assert is_ours(main.late_sigmoid)


def test_what_is_pickled_outside_is_torchs():
    with intercept():
        pass
    assert pickle.loads(pickle.dumps((torch.sigmoid, F.silu, F.logsigmoid))) == (torch.sigmoid, F.silu, F.logsigmoid)


def test_out_of_none_is_no_out(device):
    x = torch.tensor([8.0], dtype=torch.bfloat16, device=device)
    with intercept(save="input"):
        grad = gradient(lambda x: torch.sigmoid(x, out=None), x)
    assert ulp_error(grad, derivative(x.cpu())).max() <= 1


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_a_script_compiled_inside_has_torchs_operators():
    def function(x):
        return torch.sigmoid(x) + F.silu(x) + F.glu(x) + x.sigmoid()

    x = torch.linspace(-3, 3, 2)
    with intercept():
        inside = torch.jit.script(function)
    assert torch.equal(inside(x), function(x))
    assert torch.equal(torch.jit.script(function)(x), function(x))
    assert "aten::sigmoid" in str(inside.inlined_graph)


def test_a_recomputation_in_a_backward_inside_is_ours(device):
    """On a GPU, backward runs in a thread of its own."""
    seen = []

    def function(x):
        seen.append(intercepted_save())
        return F.silu(x) * 1

    x = random((9,), torch.float32, device).requires_grad_()
    for reentrant in (False, True):
        with intercept():
            checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    assert seen == ["output"] * 4


@pytest.mark.parametrize("first", ["inside", "outside"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_follows_the_context(backend, first):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: torch.sigmoid(x) + 0, backend=backend, fullgraph=True)
    seen = []
    for inside in (first == "inside", first != "inside") * 2:
        if inside:
            with intercept(save="input"):
                seen.append(is_ours(compiled) == inside)
        else:
            seen.append(is_ours(compiled) == inside)
    assert all(seen)


made_outside = intercept(save="input")


@intercept(save="input")
def decorated(x):
    return torch.sigmoid(x) + 0


def entered_inside(x):
    with intercept(save="input"):
        return x.sigmoid() + torch.sigmoid(x)


def nested_inside(x):
    with intercept(), intercept(save="input"):
        return torch.sigmoid(x) + 0


def entered_again(x):
    with made_outside:
        return torch.sigmoid(x) + 0


@pytest.mark.parametrize("function", [decorated, entered_inside, nested_inside, entered_again])
@pytest.mark.parametrize("around", [False, True])
def test_a_context_inside_a_compiled_function(function, around):
    torch.compiler.reset()
    before = attributes()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with intercept() if around else threading.Lock():
        assert is_ours(compiled)
        assert is_ours(lambda x: torch.sigmoid(x)) is False
    assert changed(before) == set()


def test_a_graph_break_inside_the_context():
    torch.compiler.reset()

    @torch.compile(backend="aot_eager")
    def function(x):
        with intercept(save="input"):
            y = torch.sigmoid(x)
            torch._dynamo.graph_break()
            return torch.sigmoid(x) + 0 * y

    x = torch.tensor([8.0], dtype=torch.bfloat16)
    assert ulp_error(gradient(function, x), derivative(x)).max() <= 1
    assert torch.equal(function(x), torch.sigmoid(x))


def test_what_torch_looks_up_by_identity_for_the_first_time_inside_is_right_outside():
    run(
        """
        import torch, torch_sigmoid
        x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True)
        def inside(x):
            with torch_sigmoid.intercept(save="input"):
                return torch.sigmoid(x) + 0
        with torch_sigmoid.intercept():
            torch.compile(lambda x: torch.sigmoid(x) + 0, backend="eager", fullgraph=True)(x)
            torch.overrides.get_testing_overrides()
        assert torch.sigmoid in torch.overrides.get_testing_overrides()
        (grad,) = torch.autograd.grad(torch.compile(inside, backend="eager", fullgraph=True)(x).sum(), x)
        assert grad != 0
        """
    )


# The focal losses of libraries

FOCAL_LOSSES = {
    "torchvision.ops.focal_loss": ["torchvision.ops", "torchvision.models.detection.retinanet"],
    "transformers.loss.loss_for_object_detection": ["transformers.loss.loss_deformable_detr", "transformers.loss.loss_rt_detr"],
    "transformers.loss.loss_grounding_dino": [],
    "transformers.models.maskformer.modeling_maskformer": [],
}
BY_NAME = [(home, name) for home, importers in FOCAL_LOSSES.items() for name in (home, *importers)]


def test_every_library_is_tested():
    assert tuple(FOCAL_LOSSES) == focal.LIBRARIES


@pytest.mark.parametrize("options", [{}, {"alpha": -1}, {"alpha": 0.75, "gamma": 1.5}, {"gamma": 0}], ids=str)
@pytest.mark.parametrize(("home", "name"), BY_NAME, ids=[name for _, name in BY_NAME])
def test_focal_losses_of_libraries(home, name, options):
    pytest.importorskip(home.partition(".")[0])
    importlib.import_module(home)
    module = importlib.import_module(name)
    x, target = random((4, 5, 3), torch.float64, "cpu"), (random((4, 5, 3), torch.float64, "cpu", seed=1) > 0.5).double()
    normaliser = () if home.startswith("torchvision") else (torch.tensor(3.0),)

    def loss(x):
        return module.sigmoid_focal_loss(x, target, *normaliser, **options)

    value, grad, by = loss(x), gradient(loss, x), module.sigmoid_focal_loss
    with intercept():
        assert module.sigmoid_focal_loss is not by
        torch.testing.assert_close(loss(x), value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient(loss, x), grad, rtol=1e-12, atol=1e-14)
        n_nodes = number_of_nodes(loss(x.clone().requires_grad_()))
    assert module.sigmoid_focal_loss is by
    assert n_nodes <= 5 < number_of_nodes(loss(x.clone().requires_grad_()))


def number_of_nodes(tensor):
    nodes, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        nodes.add(node)
        waiting += [next for next, _ in node.next_functions if next is not None]
    return len(nodes)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_of_torchvisions_focal_loss(reduction):
    ops = pytest.importorskip("torchvision.ops")
    x, target = random((4, 5), torch.float64, "cpu"), random((4, 5), torch.float64, "cpu", seed=1).sigmoid()
    expected = ops.sigmoid_focal_loss(x, target, reduction=reduction)
    with intercept():
        torch.testing.assert_close(ops.sigmoid_focal_loss(x, target, reduction=reduction), expected, rtol=1e-12, atol=1e-14)
        with pytest.raises(ValueError, match="reduction"):
            ops.sigmoid_focal_loss(x, target, reduction="max")
        with pytest.raises(ValueError, match="alpha"):
            ops.sigmoid_focal_loss(x, target, alpha=-2)


A_LIBRARY = """
    import torch
    import torch.nn.functional as F

    def sigmoid_focal_loss(inputs, targets, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"):
        '''Of no library.'''
        return F.binary_cross_entropy_with_logits(inputs, targets, reduction=reduction) * 7
"""


@pytest.mark.parametrize("imports", ["math", "torchvision.user"], ids=["imported meanwhile", "imported before"])
@pytest.mark.parametrize("known", [True, False], ids=["known form", "unknown form"])
def test_a_form_that_is_not_known_is_left_alone(known, imports, tmp_path):
    (tmp_path / "torchvision" / "ops").mkdir(parents=True)
    for name, source in {
        "__init__": "",
        "ops/__init__": "",
        "ops/focal_loss": textwrap.dedent(A_LIBRARY),
        "user": "from torchvision.ops.focal_loss import sigmoid_focal_loss\n",
    }.items():
        (tmp_path / "torchvision" / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location("theirs", tmp_path / "torchvision" / "ops" / "focal_loss.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    form = fingerprint_of(theirs.sigmoid_focal_loss)
    run(
        f"""
        import {imports}
        import torch, torch_sigmoid
        from torch_sigmoid.swap import focal

        x = torch.zeros(2)
        if {known}:
            focal.FORMS[{form!r}] = lambda theirs, *args, **kwargs: "ours"
        with torch_sigmoid.intercept():
            import torchvision.user
            inside = torchvision.user.sigmoid_focal_loss(x, x)
        assert isinstance(inside, str) == {known}, inside
        import torchvision.ops.focal_loss
        theirs = torchvision.ops.focal_loss.sigmoid_focal_loss
        assert torchvision.user.sigmoid_focal_loss is theirs
        assert isinstance(theirs(x, x), torch.Tensor)
        """,
        tmp_path,
    )


def test_no_library_is_imported():
    run(
        """
        import sys, torch, torch_sigmoid
        with torch_sigmoid.intercept():
            pass
        assert not {"torchvision", "transformers", "torch._dynamo"} & sys.modules.keys()
        """
    )
