"""What `python -m torch_sigmoid` finds out: first facts, then the troubles that follow from them. Text and JSON tell both."""

import contextlib
import getpass
import json
import math
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import torch_sigmoid

from . import agreement, dispatch, kernels

# Of the environment: settings with which kernels, or torch, take longer.
SLOW = {
    "TRITON_INTERPRET": "runs the kernels in Triton's interpreter, which is for debugging",
    "TRITON_DEBUG": "checks what kernels do on the device, and sends each launch through Triton's own entry",
    "TRITON_ALWAYS_COMPILE": "compiles every kernel in every process, in place of reading it from the cache",
    "CUDA_LAUNCH_BLOCKING": "has each launch wait for its kernel",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "has each tensor ask the driver for its memory",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "has torch.compile compile everything in every process",
    "TORCH_COMPILE_DISABLE": "makes torch.compile do nothing",
    "TORCHDYNAMO_DISABLE": "makes torch.compile do nothing",
}


@dataclass(frozen=True)
class Tool:
    path: str
    version: str | None


@dataclass(frozen=True)
class Cache:
    """A folder of compilations, which `variable` moves."""

    path: str
    writable: bool
    variable: str


@dataclass(frozen=True)
class Form:
    """A form that `replace` knows, by how many functions, and how many of them are in the installed source."""

    name: str
    known: int
    found: int


@dataclass(frozen=True)
class Library:
    """`known_versions` are those in which the forms were seen; `forms` is None where the source was not read."""

    name: str
    version: str | None
    known_versions: str
    is_known: bool
    forms: list[Form] | None


@dataclass(frozen=True)
class Check:
    """The largest errors in a dtype, in ulp and by operator (None: not finite), or why they could not be computed."""

    dtype: str
    agrees: bool
    errors: dict[str, float | None]
    failure: str | None


@dataclass(frozen=True)
class Device:
    device: str
    name: str
    path: str
    reason: str
    checks: list[Check]


class Trouble(NamedTuple):
    trouble: str
    remedy: str


@dataclass(frozen=True)
class Facts:
    """What was found, under the names that `--json` prints."""

    torch_sigmoid: str
    torch: str
    triton: str | None
    python: str
    system: str
    machine: str
    kernels_unavailable: str | None
    triton_untested: str | None
    torch_cuda: str | None
    torch_sees_gpu: bool
    nvidia_devices: list[str]
    nvidia_driver: str | None
    c_compiler: Tool | None
    python_headers: bool
    ptxas: Tool | None
    caches: dict[str, Cache]
    slow_settings: dict[str, str]
    libraries: list[Library]
    devices: list[Device]

    @property
    def agrees(self) -> bool:
        return all(check.agrees for device in self.devices for check in device.checks)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it, with the troubles and whether everything agrees."""
        return asdict(self) | {"troubles": [each._asdict() for each in troubles(self)], "agrees": self.agrees}


# Finding out


def examine(read_forms: bool = False) -> Facts:
    """Look at everything; `read_forms` reads the installed libraries' source, too."""
    nvidia_devices, nvidia_driver = nvidia()
    found = devices()
    return Facts(
        torch_sigmoid=torch_sigmoid.__version__,
        torch=torch.__version__,
        triton=triton_version(),
        python=platform.python_version(),
        system=platform.system(),
        machine=platform.machine(),
        kernels_unavailable=kernels.UNAVAILABLE,
        triton_untested=kernels.untested(),
        torch_cuda=torch.version.cuda,
        torch_sees_gpu=any(device.type != "cpu" for device in found),
        nvidia_devices=nvidia_devices,
        nvidia_driver=nvidia_driver,
        c_compiler=c_compiler(),
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        ptxas=ptxas(),
        caches=caches(),
        slow_settings={name: os.environ[name] for name in SLOW if is_on(name)},
        libraries=libraries(read_forms),
        devices=[examined(device) for device in found],
    )


OFF = ("", "0", "false", "off", "no", "n", "f")
# Which torch takes for on if they are 1 alone.
ONLY_ONE = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


def is_on(name: str) -> bool:
    value = os.environ.get(name, "")
    return value == "1" if name in ONLY_ONE else value.lower() not in OFF


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def output_of(*command: str) -> str:
    """What a command prints; "" where it does not exist or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    return ""


def nvidia() -> tuple[list[str], str | None]:
    """The names of NVIDIA's devices and the driver's version, from nvidia-smi: torch need not be built for them."""
    lines = output_of("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader").splitlines()
    found = [[part.strip() for part in line.split(",", 1)] for line in lines if "," in line]
    return [name for _, name in found], found[0][0] if found else None


def c_compiler() -> Tool | None:
    """The compiler that Triton would take for its launchers."""
    chosen = os.environ.get("CC")
    path = shutil.which(chosen) if chosen else shutil.which("gcc") or shutil.which("clang")
    return (path and Tool(path, next(iter(output_of(path, "--version").splitlines()), None))) or None


def ptxas() -> Tool | None:
    """The assembler that Triton would take, its own unless TRITON_PTXAS_PATH names another."""
    try:
        from triton import knobs

        return Tool(str(knobs.nvidia.ptxas.path), str(knobs.nvidia.ptxas.version))
    except Exception:  # no Triton, none that has knobs, or none that finds an assembler
        return None


def caches() -> dict[str, Cache]:
    user = "unknown_user"
    with contextlib.suppress(KeyError, OSError, ImportError):
        user = getpass.getuser()
    of_triton = os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
    of_inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{user}")
    folders = ("triton", of_triton, "TRITON_CACHE_DIR"), ("inductor", of_inductor, "TORCHINDUCTOR_CACHE_DIR")
    return {name: Cache(str(folder), is_writable(Path(folder)), variable) for name, folder, variable in folders}


def is_writable(folder: Path) -> bool:
    """Whether a file can be made there, or, where the folder is missing, in what would hold it."""
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def libraries(read_forms: bool) -> list[Library]:
    from .swap import libraries as known

    return [
        Library(
            each.name,
            each.version,
            each.versions,
            each.is_known,
            [Form(*form) for form in known.found_in_source(each.name)] if read_forms else None,
        )
        for each in known.installed()
    ]


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found += [torch.device("xpu", index) for index in range(torch.xpu.device_count())]
    return found + [torch.device("mps")] * torch.backends.mps.is_available()


def examined(device: torch.device) -> Device:
    dtypes = [dtype for dtype in agreement.ALLOWED_ULP if not (dtype is torch.float64 and device.type == "mps")]
    # The kernels are checked, also at sizes that otherwise go to torch's operator.
    before = dispatch.torch_below(0)
    try:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        chosen = torch_sigmoid.path(torch.empty(1, device=device))
        return Device(str(device), name, chosen.name, chosen.reason, [checked(device, dtype) for dtype in dtypes])
    except Exception as error:  # of a device that is busy, or whose driver has failed
        return Device(str(device), "not usable", "none", told(error), [Check(str(dtypes[0]), False, {}, told(error))])
    finally:
        dispatch.torch_below(before)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def checked(device: torch.device, dtype: torch.dtype) -> Check:
    interpreted = dispatch.kernels_refusal(device) is None and kernels.INTERPRETED
    allowed = agreement.ALLOWED_ULP[dtype] + (agreement.INTERPRETER_ULP if interpreted and dtype is torch.bfloat16 else 0)
    try:
        found = agreement.check(device, dtype)
    except Exception as error:  # whatever keeps a kernel from being compiled or launched
        return Check(str(dtype), False, {}, told(error))
    errors = {name: error if math.isfinite(error) else None for name, error in found.items()}
    return Check(str(dtype), all(error <= allowed for error in found.values()), errors, None)


# What to do


def troubles(facts: Facts) -> Iterator[Trouble]:
    """What is wrong, or slower than it need be, and what to do about it."""
    if facts.nvidia_devices and not facts.torch_sees_gpu:
        there = f"There is an {facts.nvidia_devices[0]} (driver {facts.nvidia_driver}), but torch {facts.torch}"
        if facts.torch_cuda is None:
            yield Trouble(
                f"{there} is built without CUDA", "install a build with CUDA: https://pytorch.org/get-started/locally"
            )
        else:
            yield Trouble(
                f"{there}, which is built for CUDA {facts.torch_cuda}, does not see it",
                "unset CUDA_VISIBLE_DEVICES if it hides the device; if the driver is too old for this CUDA, update the driver "
                "or install a torch for an older CUDA",
            )
    if facts.triton is None and facts.system == "Linux":
        yield Trouble(
            "Triton is not installed, so that torch's operators take the place of the kernels on every device",
            "on a machine with a GPU, pip install 'triton>=3.6'; on others, nothing",
        )
    elif facts.triton is not None and facts.kernels_unavailable:
        yield Trouble(
            f"{facts.kernels_unavailable}, so that torch's operators take the place of the kernels on every device",
            "on a machine with a GPU, install torch 2.10 or newer with the Triton that it brings; on others, nothing",
        )
    if facts.triton_untested:
        yield Trouble(facts.triton_untested, "nothing, if everything agrees; for the fastest launches, install a tested Triton")
    launchers = "Triton cannot build the code that launches kernels"
    launches = facts.triton is not None and facts.system != "Windows"
    if launches and facts.c_compiler is None:
        chosen = os.environ.get("CC")
        missing = f"CC={chosen} is not there" if chosen else "There is no C compiler"
        yield Trouble(
            f"{missing}: {launchers}", "unset CC, or set it to a compiler" if chosen else "install gcc, or set CC to a compiler"
        )
    elif launches and not facts.python_headers:
        yield Trouble(
            f"Python's headers are missing (Python.h): {launchers}", "install python3-dev, or a Python that brings them"
        )
    if facts.triton and facts.torch_cuda and facts.ptxas is None:
        yield Trouble(
            "Triton finds no ptxas: it cannot compile kernels",
            "install Triton again, or set TRITON_PTXAS_PATH to the ptxas of a CUDA toolkit",
        )
    for name, cache in facts.caches.items():
        if not cache.writable:
            yield Trouble(
                f"{name.capitalize()} cannot write into its cache, {cache.path}", f"set {cache.variable} to a folder of yours"
            )
    for variable, value in facts.slow_settings.items():
        yield Trouble(f"{variable}={value} {SLOW[variable]}", f"unset {variable}")
    for library in facts.libraries:
        yield from _troubles_of(library)
    for device in facts.devices:
        if device.path == "torch" and device.device != "cpu":
            yield Trouble(
                f"{device.device} runs torch's operators in place of the kernels: {device.reason}",
                "results are right; see the other troubles for Triton, else this device has no kernels",
            )
        for check in device.checks:
            if not check.agrees:
                yield Trouble(
                    f"{check.dtype} on {device.device} {'fails' if check.failure else 'disagrees with float64'}",
                    "see the other troubles; if there are none, report it with the output of python -m torch_sigmoid --json",
                )


def _troubles_of(library: Library) -> Iterator[Trouble]:
    remedy = "torch_sigmoid.report(model) says what is left; torch_sigmoid.register(Form(...)) adds a form"
    if library.forms is not None:
        missing = [f"{form.name} ({form.found} of {form.known})" for form in library.forms if form.found < form.known]
        if missing:
            yield Trouble(
                f"The source of {library.name} {library.version} lacks code that replace knows, and keeps what it has instead: "
                + ", ".join(missing),
                remedy,
            )
    elif not library.is_known:
        yield Trouble(
            f"{library.name} {library.version} is not of a version whose code is known ({library.known_versions}): replace "
            "leaves alone what is written in another way",
            f"python -m torch_sigmoid --forms reads which known code it has; {remedy}",
        )


# Telling


def as_json(facts: Facts) -> str:
    return json.dumps(facts.as_dict(), indent=2, allow_nan=False)


def as_text(facts: Facts) -> str:
    """The same for a reader."""

    def tool(found: Tool | None) -> str:
        return "not found" if found is None else f"{found.version or 'of unknown version'} ({found.path})"

    heads = {
        "torch_sigmoid": facts.torch_sigmoid,
        "torch": facts.torch,
        "triton": facts.triton or "not installed",
        "kernels": facts.kernels_unavailable or "can be compiled",
        "python": f"{facts.python} on {facts.system} {facts.machine}",
        "C compiler": tool(facts.c_compiler),
        "ptxas": tool(facts.ptxas),
        "GPU driver": f"{facts.nvidia_driver}: {', '.join(facts.nvidia_devices)}"
        if facts.nvidia_driver
        else "none of NVIDIA's",
    }
    for name, cache in facts.caches.items():
        heads[f"{name} cache"] = f"{cache.path}, {'writable' if cache.writable else 'NOT writable'}"
    heads |= {library.name: _described(library) for library in facts.libraries}
    width = max(map(len, heads))
    lines = [f"{name:{width}} {value}" for name, value in heads.items()]
    for device in facts.devices:
        lines += ["", f"{device.device} ({device.name}): path {device.path}: {device.reason}"]
        for check in device.checks:
            errors = ", ".join(f"{math.inf if error is None else error:.2f} {name}" for name, error in check.errors.items())
            told = f"FAILS: {check.failure}" if check.failure else f"with float64; ulp off at most: {errors}"
            lines.append(f"  {check.dtype:15} {'' if check.failure else 'agrees ' if check.agrees else 'DISAGREES '}{told}")
    for each in troubles(facts):
        lines += ["", f"trouble: {each.trouble}", f"     do: {each.remedy}"]
    return "\n".join([*lines, "", "everything agrees" if facts.agrees else "NOT everything agrees"])


def _described(library: Library) -> str:
    version = library.version or "of unknown version"
    if library.forms is not None:
        found, known = (sum(getattr(form, what) for form in library.forms) for what in ("found", "known"))
        return f"{version}, whose source has {found} of the {known} functions that replace knows"
    if library.is_known:
        return f"{version}, whose code replace knows"
    return f"{version}; replace knows the code of {library.known_versions}"
