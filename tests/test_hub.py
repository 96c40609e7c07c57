"""Layers for Hugging Face's `kernels`: tests/kernelized.py holds the cases, which run outside of the checkout's root."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torch_sigmoid import layers

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "kernelized.py"
CASES = re.findall(r"^def (case_\w+)", SCRIPT.read_text(), re.M)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each case has to say. The package lies in a folder as an install leaves it: kernels/ inside, and not beside it."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kernels is not installed")
    site = tmp_path_factory.mktemp("site")
    package = site / "torch_sigmoid"
    package.mkdir()
    for path in (*(ROOT / "torch_sigmoid").iterdir(), ROOT / "kernels"):
        (package / path.name).symlink_to(path)
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT]
    result = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_kernelized(case, outcomes):
    outcome = outcomes[case]
    if isinstance(outcome, list):
        pytest.skip(*outcome)
    assert outcome is None, outcome


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="one of Sigmoid, SiLU, QuickGELU, SiluAndMul, SwiGLUMLP, got 'GeLU'"):
        layers.InstalledLayerRepository("GeLU")
