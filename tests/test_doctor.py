"""`python -m torch_sigmoid`: each trouble is provoked and named with its remedy, and text and JSON say the same."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_sigmoid
from torch_sigmoid import __main__ as command
from torch_sigmoid import doctor, kernels
from torch_sigmoid.operators import OPERATORS
from torch_sigmoid.swap import Form, Rewrite, libraries, register, unregister
from torch_sigmoid.swap.forms import forms
from torch_sigmoid.swap.libraries import installed

ROOT = Path(__file__).parent.parent


def run(*arguments, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def healthy():
    """Facts without a trouble, whatever machine this is."""
    found = doctor.examine()
    return dataclasses.replace(
        found,
        triton="3.7.1",
        kernels_unavailable=None,
        triton_untested=None,
        torch_cuda="13.0",
        torch_sees_gpu=True,
        nvidia_devices=["NVIDIA H100"],
        nvidia_driver="580.65",
        c_compiler=doctor.Tool("/usr/bin/gcc", "gcc 12"),
        python_headers=True,
        ptxas=doctor.Tool("/ptxas", "12.8"),
        caches={"triton": doctor.Cache("/cache", True, "TRITON_CACHE_DIR")},
        slow_settings={},
        libraries=[doctor.Library("timm", "1.0.31", "1.0.31", True, None)],
    )


def troubles_of(facts):
    """By name, as both the text and the JSON tell them."""
    found = dict(doctor.troubles(facts))
    told = json.loads(doctor.as_json(facts))["troubles"]
    assert told == [{"trouble": trouble, "remedy": remedy} for trouble, remedy in found.items()]
    text = doctor.as_text(facts)
    assert text.count("trouble: ") == len(found)
    for trouble, remedy in found.items():
        assert f"trouble: {trouble}\n     do: {remedy}" in text
    return found


def test_all_is_well(healthy):
    assert not troubles_of(healthy)
    assert healthy.agrees


def test_it_agrees_here():
    result = run("-m", "torch_sigmoid")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"torch          {torch.__version__}" in result.stdout
    assert torch_sigmoid.path(torch.empty(1)).reason in result.stdout
    assert result.stdout.count("agrees with float64") == 4 * (1 + torch.cuda.device_count())
    assert "everything agrees" in result.stdout


def test_json_is_one_object_with_what_the_text_says(capsys):
    assert command.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {field.name for field in dataclasses.fields(doctor.Facts)} | {"troubles", "agrees"}
    assert all(key in command.__doc__ for key in found)
    assert found["agrees"] is True
    assert command.main([]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "triton", "python"):
        assert found[name] is None or f" {found[name]}" in text
    for cache in found["caches"].values():
        assert f"{cache['path']}, {'writable' if cache['writable'] else 'NOT writable'}" in text
    for library in found["libraries"]:
        assert f"{library['name']} " in text
    for device in found["devices"]:
        assert f"path {device['path']}: {device['reason']}" in text
        for check in device["checks"]:
            assert all(f"{error:.2f} {name}" in text for name, error in check["errors"].items())


def wrong(function):
    cases = OPERATORS["sigmoid"].cases
    return cases, "", dataclasses.replace(cases[""], function=function)


@pytest.mark.parametrize(
    ("function", "shown", "disagreeing"),
    # In bf16 1.001·x is x.
    [(lambda x: torch.sigmoid(x * 1.001), False, 3), (lambda x: torch.where(x > 5, torch.nan, torch.sigmoid(x)), True, 4)],
    ids=["wrong", "NaN"],
)
def test_a_disagreement_is_told_and_is_the_exit_status(function, shown, disagreeing, monkeypatch, capsys):
    monkeypatch.setitem(*wrong(function))
    assert command.main([]) == 1
    text = capsys.readouterr().out
    assert text.count("DISAGREES with float64") == disagreeing
    assert ("inf sigmoid" in text) == shown
    assert "NOT everything agrees" in text
    assert "trouble: torch.float32 on cpu disagrees with float64" in text
    assert command.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is False
    checks = found["devices"][0]["checks"]
    assert [check["agrees"] for check in checks] == [False] * disagreeing + [True] * (4 - disagreeing)
    assert [check["errors"]["sigmoid"] is None for check in checks] == [shown] * 4


def test_a_device_that_cannot_be_used_is_told_with_its_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu"), torch.device("cuda", 64)])
    before = torch_sigmoid.torch_below()
    assert command.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    of_cpu, of_gpu = found["devices"]
    assert all(check["agrees"] for check in of_cpu["checks"])
    assert of_gpu["reason"] == of_gpu["checks"][0]["failure"] != ""
    assert torch_sigmoid.torch_below() == before


def test_a_check_that_fails_is_told_with_its_error(monkeypatch, capsys):
    def function(x):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(*wrong(function))
    assert command.main([]) == 1
    text = capsys.readouterr().out
    assert text.count("FAILS: RuntimeError: no kernel image") == text.count("on cpu fails") == 4


WITHOUT_TRITON = "import sys, runpy; sys.modules['triton'] = None; "
OLD_TRITON = "import sys, runpy, types; sys.modules['triton'] = types.SimpleNamespace(__version__='3.5.1'); "


@pytest.mark.parametrize(
    ("code", "head", "trouble", "remedy"),
    [
        (WITHOUT_TRITON, "not installed", "Triton is not installed", "pip install 'triton>=3.6'"),
        (OLD_TRITON, "3.5.1", "version 3.5.1 is older than 3.6", "install torch 2.10 or newer"),
    ],
    ids=["none", "too old"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="there is no Triton")
def test_without_a_triton_that_can_be_used_torchs_path_agrees(code, head, trouble, remedy):
    result = run("-c", code + "sys.argv = ['', '--json']; runpy.run_module('torch_sigmoid', run_name='__main__')")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["triton"] == (None if head == "not installed" else head)
    assert "Triton cannot be used" in found["kernels_unavailable"]
    (told,) = (each for each in found["troubles"] if "the kernels on every device" in each["trouble"])
    assert trouble in told["trouble"]
    assert remedy in told["remedy"]


def test_a_triton_newer_than_tested_is_told(monkeypatch, healthy):
    triton = pytest.importorskip("triton")
    if kernels.UNAVAILABLE:
        pytest.skip(kernels.UNAVAILABLE)
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    found = dataclasses.replace(healthy, triton="4.0.0", triton_untested=kernels.untested())
    ((trouble, remedy),) = troubles_of(found).items()
    assert "Triton 4.0.0 is not tested" in trouble
    assert "everything agrees" in remedy


def test_settings_that_slow_are_told(monkeypatch, healthy):
    for variable in doctor.SLOW:
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "True")
    monkeypatch.setattr(doctor, "devices", list)
    settings = doctor.examine().slow_settings
    assert settings == {"CUDA_LAUNCH_BLOCKING": "1", "TRITON_ALWAYS_COMPILE": "True"}
    found = troubles_of(dataclasses.replace(healthy, slow_settings=settings))
    assert sorted(found.values()) == ["unset CUDA_LAUNCH_BLOCKING", "unset TRITON_ALWAYS_COMPILE"]


@pytest.mark.skipif(bool(kernels.UNAVAILABLE), reason="needs Triton")
def test_the_interpreter_is_told_and_no_failure():
    result = run("-m", "torch_sigmoid", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter" in result.stdout
    assert "do: unset TRITON_INTERPRET" in result.stdout
    assert "cpu (" in result.stdout
    assert "path triton" in result.stdout


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path, healthy):
    # Even root makes no folder below a file.
    (tmp_path / "file").touch()
    variables = "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"
    for variable in variables:
        monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    found = doctor.caches()
    assert [cache.writable for cache in found.values()] == [False, False]
    told = troubles_of(dataclasses.replace(healthy, caches=found))
    assert list(told.values()) == [
        f"set {name} to a folder of yours" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    ]
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "not" / "there" / "yet"))
    assert all(cache.writable for cache in doctor.caches().values())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("variable", [None, "TRITON_CACHE_DIR", "TRITON_HOME"])
def test_the_caches_are_where_triton_and_inductor_keep_them(variable, monkeypatch, tmp_path):
    for each in ("TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(each, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    cache_dir_utils = pytest.importorskip("torch._inductor.runtime.cache_dir_utils")
    assert doctor.caches()["inductor"].path == cache_dir_utils.default_cache_dir()
    knobs = pytest.importorskip("triton.knobs")
    assert doctor.caches()["triton"].path == knobs.cache.dir


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="runs scripts")


@needs_sh
def test_a_missing_compiler_is_told(monkeypatch, tmp_path, healthy):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert doctor.c_compiler() is None
    ((trouble, remedy),) = troubles_of(dataclasses.replace(healthy, c_compiler=None)).items()
    assert "There is no C compiler" in trouble
    assert "install gcc" in remedy
    gcc = executable(tmp_path / "gcc", "echo 'gcc 99.1'; echo more")
    assert doctor.c_compiler() == doctor.Tool(str(gcc), "gcc 99.1")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert doctor.c_compiler() is None
    ((trouble, remedy),) = troubles_of(dataclasses.replace(healthy, c_compiler=None)).items()
    assert "CC=no-such-compiler is not there" in trouble
    assert "unset CC" in remedy


def test_missing_headers_and_ptxas_are_told(monkeypatch, tmp_path, healthy):
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(doctor, "devices", list)
    headers = doctor.examine().python_headers
    assert headers is False
    ((trouble, remedy),) = troubles_of(dataclasses.replace(healthy, python_headers=headers)).items()
    assert "Python.h" in trouble
    assert "python3-dev" in remedy
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor.ptxas() is None
    ((_, remedy),) = troubles_of(dataclasses.replace(healthy, ptxas=None)).items()
    assert "TRITON_PTXAS_PATH" in remedy


@needs_sh
def test_a_gpu_that_torch_does_not_see_is_told(monkeypatch, tmp_path, healthy):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvidia() == ([], None)
    script = executable(tmp_path / "nvidia-smi", "echo '580.65.06, NVIDIA H100 80GB HBM3'; echo '580.65.06, NVIDIA T4'")
    names, driver = doctor.nvidia()
    assert (names, driver) == (["NVIDIA H100 80GB HBM3", "NVIDIA T4"], "580.65.06")
    unseen = dataclasses.replace(healthy, nvidia_devices=names, nvidia_driver=driver, torch_sees_gpu=False)
    ((trouble, remedy),) = troubles_of(dataclasses.replace(unseen, torch_cuda=None)).items()
    assert "NVIDIA H100 80GB HBM3 (driver 580.65.06)" in trouble
    assert "built without CUDA" in trouble
    assert "install a build with CUDA" in remedy
    ((trouble, remedy),) = troubles_of(unseen).items()
    assert "does not see it" in trouble
    assert "CUDA_VISIBLE_DEVICES" in remedy
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, because it cannot communicate with the driver'; exit 9\n")
    assert doctor.nvidia() == ([], None)


def test_a_gpu_on_torchs_path_is_told(healthy):
    reason = "compute capability (6, 1) is below Triton's minimum of (7, 5)"
    old = doctor.Device("cuda:0", "GTX 1080", "torch", reason, [])
    ((trouble, _),) = troubles_of(dataclasses.replace(healthy, devices=[old])).items()
    assert trouble == f"cuda:0 runs torch's operators in place of the kernels: {reason}"


KNOWN = "def forward(self, x):\n    y = self.gate(x)\n    return self.out(self.act(y) * self.up(x))"
KNOWN_TOO = "def forward(self, x):\n    return self.last(self.act(self.gate(x)) * self.up(x))"
SOURCE = '''
class Block:
    def forward(self, x):
        return x + 1

    # The known one with another name for its local, and a docstring.
    def forward_gated(
        self, x
    ):
        return None

class MLP:
    def forward(self, x):
        """Gated."""
        gated = self.gate(x)

        return self.out(
            self.act(gated) * self.up(x)
        )'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An installed library of which one of two known methods is there; importing it is an error."""
    (tmp_path / "gated_library").mkdir()
    (tmp_path / "gated_library" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "gated_library" / "mlp.py").write_text(SOURCE)
    (tmp_path / "gated_library-9.9.dist-info").mkdir()
    (tmp_path / "gated_library-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gated_library\nVersion: 9.9\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewrite = Rewrite("self.ACT(GATE) * UP", "self.ACT(GATE, UP)")
    form = register(Form("my MLP", "gated_library", "9.8", (KNOWN, KNOWN_TOO), (rewrite,), activation="silu"))
    yield "gated_library"
    unregister(form)


@pytest.mark.usefixtures("library")
def test_a_library_of_another_version_is_told_and_its_source_read_when_asked(monkeypatch, healthy, capsys):
    def found(*options):
        assert command.main([*options, "--json"]) == 0
        everything = json.loads(capsys.readouterr().out)
        (library,) = (each for each in everything["libraries"] if each["name"] == "gated_library")
        (trouble,) = (each for each in everything["troubles"] if "gated_library" in each["trouble"])
        assert command.main(options) == 0
        text = capsys.readouterr().out
        assert f"trouble: {trouble['trouble']}\n     do: {trouble['remedy']}" in text
        return library, trouble, next(line for line in text.splitlines() if line.startswith("gated_library "))

    monkeypatch.setattr(doctor, "devices", list)
    others = {form.library for form in forms()} - {"gated_library"}
    monkeypatch.setattr(libraries, "installed", lambda: [each for each in installed() if each.name not in others])
    library, trouble, line = found()
    expected = {"name": "gated_library", "version": "9.9", "known_versions": "9.8", "is_known": False}
    assert library == expected | {"forms": None}
    assert "gated_library 9.9 is not of a version whose code is known (9.8)" in trouble["trouble"]
    assert "--forms" in trouble["remedy"]
    assert line.split(maxsplit=1)[1] == "9.9; replace knows the code of 9.8"
    library, trouble, line = found("--forms")
    assert library == expected | {"forms": [{"name": "my MLP", "known": 2, "found": 1}]}
    assert "lacks code that replace knows" in trouble["trouble"]
    assert "my MLP (1 of 2)" in trouble["trouble"]
    assert "torch_sigmoid.report(model)" in trouble["remedy"]
    assert line.split(maxsplit=1)[1] == "9.9, whose source has 1 of the 2 functions that replace knows"


@pytest.mark.parametrize(
    ("version", "known"), [("1.0.31", True), ("1.0.31.post1", True), ("1.0.310", False), ("1.0.3", False), (None, False)]
)
def test_a_version_is_known_with_all_that_it_leaves_open(version, known):
    assert libraries.Library("timm", version, "1.0.31").is_known == known


@pytest.mark.parametrize("library", ["timm", "torchvision", "diffusers", "open_clip"])
def test_a_library_of_a_known_version_has_all_known_functions(library):
    if library not in {each.name for each in libraries.installed() if each.is_known}:
        pytest.skip(f"{library} is not installed, or of another version")
    assert all(form.found == form.known > 0 for form in libraries.found_in_source(library))


def test_nothing_is_imported_of_a_library_nor_by_the_package():
    code = (
        "import sys, torch_sigmoid; assert 'torch_sigmoid.doctor' not in sys.modules; "
        "from torch_sigmoid.swap import libraries; libraries.installed(); assert 'transformers' not in sys.modules"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [["--jsom"], ["--js"], ["cpu"]])
def test_bad_arguments_are_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_tells_what_it_does(capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert command.__doc__.splitlines()[0] in said
    assert "--forms" in said
