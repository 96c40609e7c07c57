"""How the kernels run, devices, and allocations that show a lane never written.

`--kernels` says what launches a kernel on a CPU tensor: nothing ("device", which leaves kernels to a GPU, if there is one),
Triton's interpreter, or a machine that executes the PTX compiled for a GPU (ptx/). A test that has a `device` on which kernels
run must launch one, unless it is marked `launches_nothing`, and so must a whole run: tests that silently take torch's path
show nothing.
"""

import collections
import importlib.util
import os

import pytest
import torch

# Two pytest workers on two cores: one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
WAYS = ("device", "interpreter", "ptx")
# Of ptx/arithmetic.py, which needs Triton; test_ptx.py holds the two together.
MODELS = ("exact", "ulp-high", "ulp-low", "isa-high", "isa-low", "isa-opposed", "random-1", "random-2")
# Files that take long to import, and the ways in which they have tests, besides `device`. The others skip them.
SLOW_TO_IMPORT = {
    "test_benchmarks.py": (),
    "test_codegen.py": (),
    "test_compiled.py": (),
    "test_distributed_training.py": (),
    "test_graphs.py": (),
    "test_models.py": (),
    "test_opinfo.py": ("interpreter",),
    "test_readme.py": (),
    "test_register_transformers.py": (),
    "test_tracing.py": ("interpreter",),
    "test_train.py": (),
    "test_trees.py": (),
}
# Tests of a minute each: the first to start, so that no worker waits for one in the end.
LONGEST = ("test_train.py", "test_distributed_training.py")


def pytest_addoption(parser):
    group = parser.getgroup("kernels")
    inherited = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "device"
    group.addoption("--kernels", choices=WAYS, default=inherited, help="what executes kernels (default: %(default)s)")
    group.addoption("--ptx-model", choices=MODELS, default="exact", help="the error of approximate instructions")
    group.addoption("--ptx-arch", type=int, default=90, help="the compute capability that PTX is compiled for: 80, 90 or 100")


def pytest_configure(config):
    config.addinivalue_line("markers", "launches_nothing(reason): has a device, but runs no kernel on it")
    config.addinivalue_line(
        "markers", "latin_square: a third of its cases is executed as machine code, which compiles for long"
    )
    config.addinivalue_line("markers", "ways(*names): where it runs besides `device`; without it, everywhere")
    way = config.getoption("kernels")
    if os.environ.get("TRITON_INTERPRET") == "1" and way != "interpreter":
        raise pytest.UsageError(f"TRITON_INTERPRET=1 contradicts --kernels={way}: unset it")
    if way != "device" and importlib.util.find_spec("triton") is None:
        raise pytest.UsageError(f"--kernels={way} needs Triton")
    config.kernels = Kernels(way)
    if way == "ptx":
        from ptx import MODELS, device

        config.kernels.ptx = device.activate(config.getoption("ptx_arch"))
        config.kernels.ptx.model = MODELS[config.getoption("ptx_model")]


class Kernels:
    """The way kernels run in this process, and how many did."""

    def __init__(self, way):
        self.way = way
        self.ptx = None
        self.n_launches = 0
        if way == "interpreter":
            os.environ["TRITON_INTERPRET"] = "1"
        import torch_sigmoid

        # Small tensors too are meant for the kernels here; test_launch.py tests where torch's operator takes over.
        torch_sigmoid.torch_below(0)
        if not torch_sigmoid.kernels.UNAVAILABLE:
            from torch_sigmoid.kernels.launch import Launcher

            launch = Launcher.__call__

            def counted(launcher, inputs, outputs, known=None):
                self.n_launches += outputs[0].numel() > 0
                return launch(launcher, inputs, outputs, known)

            Launcher.__call__ = counted

    def shows_nothing(self, config):
        """Whether a run that names a way to execute kernels has executed none."""
        return self.way != "device" and self.n_launches == 0 and not config.option.collectonly

    def models(self):
        """Each model of the approximate instructions in turn, in force; None alone on a machine that has its own."""
        if self.ptx is None:
            yield None
            return
        from ptx import MODELS

        before = self.ptx.model
        try:
            for self.ptx.model in MODELS.values():
                yield self.ptx.model
        finally:
            self.ptx.model = before


def pytest_report_header(config):
    import torch_sigmoid

    kernels = config.kernels
    devices = ["cpu"] if kernels.ptx else DEVICES
    paths = {device: torch_sigmoid.path(torch.empty(1, device=device)) for device in devices}
    detail = f", sm_{kernels.ptx.arch}, approximate instructions {kernels.ptx.model}" if kernels.ptx else ""
    return [
        f"kernels: {kernels.way}{detail}",
        *(f"torch_sigmoid on {device}: {path.name} ({path.reason})" for device, path in paths.items()),
    ]


def pytest_ignore_collect(collection_path, config):
    way = config.kernels.way
    return (way != "device" and way not in SLOW_TO_IMPORT.get(collection_path.name, WAYS)) or None


def has_its_place(item, way):
    """Whether a test shows something in a way to run kernels.

    What no kernel takes part in runs once, with the kernels left to the device. The interpreter is for the choice of path;
    executed machine code is for numbers and layouts. Models of approximate instructions are for the machine that has them.
    """
    if way != "ptx" and getattr(item, "callspec", None) and item.callspec.params.get("model", "exact") != "exact":
        return False
    if way == "device":
        return True
    if way == "ptx" and getattr(item, "callspec", None) and item.callspec.params.get("device") == "cuda":
        return False  # it executes what lies in the host's memory
    chosen = item.get_closest_marker("ways")
    return (chosen is None or way in chosen.args) and ("device" in item.fixturenames or "kernels" in item.fixturenames)


class LatinSquare:
    """A third of a test's cases, in which each value of each parameter comes: those whose places add up to a multiple of 3."""

    def __init__(self):
        self.places = collections.defaultdict(dict)

    def __contains__(self, item):
        total = 0
        for name, value in item.callspec.params.items():
            of_values = self.places[item.function, name]
            total += of_values.setdefault(repr(value), len(of_values))
        return total % 3 == 0


def pytest_collection_modifyitems(config, items):
    """Each test runs in the ways in which it shows something, the longest first."""
    kept, elsewhere, square = [], [], LatinSquare()
    for item in items:
        shown = has_its_place(item, config.kernels.way)
        if shown and config.kernels.way == "ptx" and item.get_closest_marker("latin_square"):
            shown = item in square
        (kept if shown else elsewhere).append(item)
        for way in WAYS[1:]:
            if way not in SLOW_TO_IMPORT.get(item.path.name, WAYS) and has_its_place(item, way):
                raise pytest.UsageError(f"{item.nodeid} is skipped with --kernels={way}: mark it, or correct SLOW_TO_IMPORT")
    items[:] = sorted(kept, key=lambda item: item.path.name not in LONGEST)
    config.hook.pytest_deselected(items=elsewhere)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test on a device that runs kernels must have launched one."""
    kernels = item.config.kernels
    before = kernels.n_launches
    result = yield
    device = getattr(item, "funcargs", {}).get("device")
    runs_kernels = device == "cuda" or (device == "cpu" and kernels.way != "device")
    if runs_kernels and kernels.n_launches == before and not item.get_closest_marker("launches_nothing"):
        pytest.fail(f"no kernel was launched on {device}, where kernels run; mark the test if it needs none", pytrace=False)
    return result


def pytest_sessionfinish(session, exitstatus):
    """A run that names a way to execute kernels, and passes without having executed one, has shown nothing."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["n_launches"] = config.kernels.n_launches
    elif config.kernels.shows_nothing(config) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """What an xdist worker has launched."""
    node.config.kernels.n_launches += getattr(node, "workeroutput", {}).get("n_launches", 0)


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(f"kernels: {config.kernels.way}, {config.kernels.n_launches} launches")
    if config.kernels.shows_nothing(config):
        terminalreporter.write_line("no kernel was launched, so this run shows nothing: it fails", red=True)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def kernels(request):
    """How kernels run: `way`, `n_launches`, and the machine that executes PTX, `ptx`, or None."""
    return request.config.kernels


@pytest.fixture(params=MODELS)
def model(request, kernels):
    """The error of approximate instructions, while a test runs; None on a machine that has its own."""
    if kernels.ptx is None:
        yield None
        return
    from ptx import MODELS

    before, kernels.ptx.model = kernels.ptx.model, MODELS[request.param]
    yield kernels.ptx.model
    kernels.ptx.model = before


@pytest.fixture(params=["output", "input"])
def save(request):
    return request.param


@pytest.fixture
def poisoned_allocations(monkeypatch):
    """Fresh float memory holds NaN, so an element that a kernel leaves out cannot pass for a result."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():  # torch makes some that require grad
                return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
