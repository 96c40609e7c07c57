"""The sdist and the wheel: what they hold, and that each way to install them works, without Triton, in a path with spaces."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import torch

import torch_sigmoid

# Only processes of their own import these: setuptools changes what it is imported into.
if missing := {"build", "pip", "setuptools"} - {distribution.name for distribution in metadata.distributions()}:
    pytest.skip(f"not installed: {', '.join(sorted(missing))}", allow_module_level=True)
# The first with PEP 639's license expressions.
if int(metadata.version("setuptools").partition(".")[0]) < 77:
    pytest.skip("setuptools is older than 77", allow_module_level=True)

ROOT = Path(__file__).parent.parent
VERSION = torch_sigmoid.__version__
# Hugging Face's `kernels` takes part in every build that sees it, and fails where a checkout's kernels/ in PYTHONPATH hides it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}


def run(*command, cwd, **variables):
    environment = ENVIRONMENT | variables
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sources():
    """The files of the repository: git knows them in a checkout, and setuptools' list in an unpacked sdist."""
    if (ROOT / ".git").exists():
        names = run("git", "ls-files", cwd=ROOT).splitlines()
        return {name for name in names if (ROOT / name).is_file()}
    listed = ROOT / "torch_sigmoid.egg-info" / "SOURCES.txt"
    if not listed.exists():
        pytest.skip("neither a checkout of git nor an sdist: nothing says which files belong to the repository")
    return {name for name in listed.read_text().splitlines() if ".egg-info/" not in name} - {"setup.cfg"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What can be installed: an unpacked sdist, the sdist, and the wheel that was built from it."""
    # Builds write into the tree, and other workers may build too: they take place in a copy.
    folder = tmp_path_factory.mktemp("a path with spaces")
    for name in sources():
        copy = folder / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "copy", cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return {"tree": folder / f"torch_sigmoid-{VERSION}", "sdist": sdist, "wheel": wheel}


def test_the_sdist_holds_every_file_of_the_repository_and_no_other(places):
    tree = places["tree"]
    names = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert {name for name in names if ".egg-info/" not in name} == sources() | {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_its_kernels_and_nothing_else(places):
    with zipfile.ZipFile(places["wheel"]) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torch_sigmoid").rglob("*.py")}
    kernels = {f"torch_sigmoid/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    info = f"torch_sigmoid-{VERSION}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == modules | kernels | {"torch_sigmoid/py.typed"}
    assert info + "licenses/LICENSE" in names


def test_the_metadata_names_the_version_the_license_and_every_extra(places):
    with zipfile.ZipFile(places["wheel"]) as archive:
        stated = Parser().parsestr(archive.read(f"torch_sigmoid-{VERSION}.dist-info/METADATA").decode())
    assert stated["Version"] == VERSION
    assert stated["License-Expression"] == "MIT"
    assert stated["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in stated.get_all("Classifier")
    (documented,) = re.findall(r'^pip install "\.\[.*$', (ROOT / "README.md").read_text(), re.M)
    assert {*stated.get_all("Provides-Extra")} <= {*re.findall(r"\w+", documented)}


def test_the_changelog_and_the_citation_name_the_version():
    released = re.findall(r"^## (\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == VERSION
    assert released[-1] == "0.1.0"
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture
def installed(places, tmp_path_factory):
    """Install into a new environment that links to this one's packages, Triton perhaps not; returns how to run its Python."""

    def install(place, *options, triton):
        folder = tmp_path_factory.mktemp("an environment with spaces")
        venv.create(folder)
        python = folder / "bin" / "python"
        site = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder)}))
        # Not the torch_sigmoid that is installed here: Python would find it before an editable one.
        hidden = ("torch_sigmoid", "__editable__", *([] if triton else ["triton"]))
        for shared in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
            for package in shared.iterdir():
                link = site / package.name
                if not package.name.startswith(hidden) and package.suffix != ".pth" and not link.exists():
                    link.symlink_to(package)
        pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile")
        run(python, *pip, "--no-deps", "--no-build-isolation", *options, places[place], cwd=folder)
        return lambda code, **variables: run(python, "-c", code, cwd=folder, **variables)

    return install


DOCTOR = (
    "import runpy, torch_sigmoid, torch_sigmoid.kernels; "
    "print(torch_sigmoid.__file__, torch_sigmoid.kernels.__file__, sep='\\n'); "
    "runpy.run_module('torch_sigmoid', run_name='__main__')"
)


@pytest.mark.parametrize(
    ("place", "options"),
    [("tree", ()), ("tree", ("--editable",)), ("sdist", ()), ("wheel", ())],
    ids=["tree", "tree, editable", "sdist", "wheel"],
)
def test_it_installs_and_agrees_without_triton_in_a_path_with_spaces(place, options, places, installed):
    python = installed(place, *options, triton=False)
    root, kernels, *said = python(DOCTOR).splitlines()
    root, kernels = Path(root), Path(kernels)
    if options:
        assert root == places["tree"] / "torch_sigmoid" / "__init__.py"
        assert kernels == places["tree"] / "kernels" / "__init__.py"
    else:
        assert "an environment with spaces" in str(root)
        assert kernels == root.parent / "kernels" / "__init__.py"
    assert ["triton", "not", "installed"] in [line.split() for line in said]
    assert sum("agrees with float64" in line for line in said) == 4 * (1 + torch.cuda.device_count())


def test_the_kernels_of_the_wheel_run(installed):
    pytest.importorskip("triton")
    python = installed("wheel", triton=True)
    code = (
        "import torch, torch_sigmoid; x = torch.zeros(1); torch_sigmoid.torch_below(0); "
        "print(torch_sigmoid.path(x).name, torch_sigmoid.sigmoid(x).item())"
    )
    assert python(code, TRITON_INTERPRET="1").split() == ["triton", "0.5"]


def test_tests_run_from_the_sdist(places):
    arguments = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_errors.py")
    assert re.search(r"^\d+ passed", run(sys.executable, *arguments, cwd=places["tree"]), re.M)
