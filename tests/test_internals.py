"""Private names of torch: used in one module, listed with the torch that has them first, and all there in this one."""

import ast
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_sigmoid import internals

ROOT = Path(__file__).parent.parent
# The one module, and the files below kernels/ that import nothing from it.
ALLOWED = {"torch_sigmoid/internals.py", "kernels/kept.py", "kernels/launch.py"}
# Private by their look: of named tuples, transformers and importlib, and of blocks that swap/ has fused.
OF_OTHERS = {"_asdict", "_fields", "_replace", "_from_config", "_initializing", "_fused_siglip_loss"}
NAMES = {name: since for since, names in internals.SINCE.items() for name in names}
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder in ("torch_sigmoid", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def is_private(word: str) -> bool:
    return word.startswith("_") and not word.startswith("__")


def own_names() -> set[str]:
    """The private names that the package itself defines."""
    found = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                found.add(node.attr)
    return found


def private_words(tree: ast.Module):
    """The private words of other packages in attributes, imports, and the strings of `getattr`, `hasattr` and `setattr`."""
    for node in ast.walk(tree):
        words = []
        if isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.Import):
            words = [word for alias in node.names for word in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            words = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            words = [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
        yield from filter(is_private, words)


def test_private_names_of_torch_stand_in_one_module():
    own = own_names() | OF_OTHERS
    found = {file: {*private_words(tree)} - own for file, tree in SOURCES.items() if file not in ALLOWED}
    assert {file: words for file, words in found.items() if words} == {}


def test_every_private_name_is_listed():
    """Compared by single words: the code reaches some names by way of an alias, such as `_C`, or of an instance."""
    used = {word for file in ALLOWED for word in private_words(SOURCES[file])} - own_names() - OF_OTHERS
    assert used - {word for name in NAMES for word in name.split(".")} == set()
    *code, table = SOURCES["torch_sigmoid/internals.py"].body
    assert ast.unparse(table).startswith("SINCE = ")
    source = " ".join(map(ast.unparse, [*code, *(SOURCES[file] for file in ALLOWED if file.startswith("kernels/"))]))
    assert [name for name in NAMES if name.rpartition(".")[2] not in source] == []


# Attributes that only instances have.
INSTANCES = {
    "torch._dynamo.OptimizedModule": lambda: torch.compile(nn.Linear(1, 1)),
    "torch._ops.OpOverload": lambda: torch.ops.aten.sigmoid.default,
    "torch.autograd.graph.Node": lambda: torch.ones(1, requires_grad=True).exp().grad_fn,
    "torch.nn.Module": nn.Module,
}
BUILDS = {"torch._C._cuda_getDevice": torch.backends.cuda.is_built}


def found(name: str):
    """What a dotted name stands for; an AttributeError if nothing does."""
    place, _, last = name.rpartition(".")
    if place in INSTANCES:
        return getattr(INSTANCES[place](), last)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(found(place), last)


@pytest.mark.parametrize("name", NAMES)
def test_this_torch_has(name):
    if not BUILDS.get(name, lambda: True)():
        pytest.skip("not in this build of torch")
    try:
        found(name)
    except AttributeError:
        pytest.fail(f"torch {torch.__version__} lacks {name}, there since torch {NAMES[name]}; torch_sigmoid uses it")


def test_a_name_that_is_missing_is_found_out():
    for missing in ("torch._C._no_such_name", "torch._no_such_module.name", "torch.nn.Module._no_such_name"):
        with pytest.raises(AttributeError, match="_no_such"):
            found(missing)


def test_no_name_is_newer_than_the_oldest_supported_torch():
    pyproject = (ROOT / "pyproject.toml").read_text()
    (oldest,) = {line.partition("torch>=")[2].partition('"')[0] for line in pyproject.splitlines() if "torch>=" in line}
    assert max(map(version, NAMES.values())) <= version(oldest) <= version(torch.__version__)


def version(text: str) -> list[int]:
    return [int(part) for part in text.partition("+")[0].split(".")[:2]]


def test_what_wraps_a_module_is_known_once_it_is_imported():
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    importlib.import_module("torch.distributed._composable.replicate_with_fsdp")
    assert [each.__name__ for each in internals.wrapping_types()] == ["FSDPModule", "ReplicateModule"]
    assert "torch.distributed.fsdp" in sys.modules


def test_what_a_backward_finds_is_referred_to_as_often_as_it_is_held():
    """torch 2.10 and 2.11 drop one reference too many, and a list that was freed so ends the process."""
    first, second = ["output"], ["input"]

    def in_a_thread():
        before = sys.getrefcount(first)
        for _ in range(3):
            internals.set_for_backward(first)
        assert internals.set_of_backward() is first
        assert sys.getrefcount(first) == before + 1
        internals.set_for_backward(second)
        assert internals.set_of_backward() is second
        assert sys.getrefcount(first) == before

    with ThreadPoolExecutor(1) as workers:
        workers.submit(in_a_thread).result()
