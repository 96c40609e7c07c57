"""Life without Triton, and public names."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import torch_sigmoid
from torch_sigmoid.operators import OPERATORS

ROOT = Path(__file__).parent.parent


def run(*arguments, cwd=ROOT, **options):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, **options)


WITHOUT_TRITON = "import sys, runpy; sys.modules['triton'] = None; "


def test_a_layer_trains_without_triton():
    code = WITHOUT_TRITON + (
        "import torch, torch_sigmoid as ts; x = torch.tensor([8.0], dtype=torch.bfloat16, requires_grad=True); "
        "ts.Sigmoid(save='input')(x).backward(); print(ts.path(x).name, x.grad.item() > 0)"
    )
    assert run("-c", code).stdout.split() == ["torch", "True"]


def test_a_triton_that_is_too_old_is_named():
    code = (
        "import sys, types; sys.modules['triton'] = types.SimpleNamespace(__version__='3.5.1'); "
        "import torch, torch_sigmoid as ts; print(ts.kernels.UNAVAILABLE)"
    )
    assert "3.5.1 is older than 3.6" in run("-c", code).stdout


def test_a_triton_newer_than_tested_is_named_and_launches_by_its_public_entry():
    pytest.importorskip("triton")
    code = (
        "import sys, triton; triton.__version__ = sys.argv[1]; from torch_sigmoid import kernels; "
        "from torch_sigmoid.kernels import kept; print(kernels.UNAVAILABLE, kept.KEEPS_COMPILATIONS, kernels.untested())"
    )
    for version in ("3.10.0", "3.99.1+git", "4.0.0"):
        expected = f"None False Triton {version} is not tested with this version, only 3.6 to 3.9: each launch goes through"
        assert run("-c", code, version).stdout.startswith(expected)
    assert run("-c", code, "3.9.7").stdout.split() == ["None", "True", "None"]


def test_public_names():
    assert set(torch_sigmoid.__all__) <= set(dir(torch_sigmoid))
    for name in torch_sigmoid.__all__:
        assert getattr(torch_sigmoid, name).__doc__
    assert torch_sigmoid.functional.sigmoid is torch_sigmoid.sigmoid
    assert torch_sigmoid.nn.Sigmoid is torch_sigmoid.Sigmoid


@pytest.mark.parametrize("name", OPERATORS)
def test_function_and_layer_of_every_row_are_exported(name):
    layer = OPERATORS[name].module.__name__
    assert {name, layer} <= {*torch_sigmoid.__all__}
    assert name in torch_sigmoid.functional.__all__
    assert layer in torch_sigmoid.nn.__all__


def test_a_star_import_leaves_torchs_modules_alone():
    names = {}
    exec("from torch import nn; from torch.nn import functional; from torch_sigmoid import *", names)
    assert names["nn"] is torch.nn
    assert names["functional"] is torch.nn.functional
    assert names["sigmoid"] is torch_sigmoid.sigmoid
    assert not any(isinstance(getattr(torch_sigmoid, name), types.ModuleType) for name in torch_sigmoid.__all__)


@pytest.mark.parametrize("name", ["torch_sigmoid", "tests", "benchmarks"])
def test_the_package_holds_its_kernels_and_nothing_else_of_the_checkout(name):
    assert importlib.util.find_spec("torch_sigmoid.kernels.gates") is not None
    assert importlib.util.find_spec(f"torch_sigmoid.{name}") is None


def test_kernels_import_nothing_from_above():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "torch_sigmoid" not in path.read_text()
