"""A stub of a GPU: Triton compiles for an sm_90 and launches on a driver that returns at once, with CPU tensors.

What remains of an operator is the host's part, its dispatch and its launch; its results are uninitialised memory.
`environment` builds the driver and gives the environment of a process that finds it; `activate` puts it in place there.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("stub_cuda.c")


def unavailable() -> str | None:
    """Why this machine cannot run the stub; None if it can."""
    from torch_sigmoid import kernels

    if kernels.UNAVAILABLE:
        return kernels.UNAVAILABLE
    if compiler() is None:
        return "there is no C compiler (cc, gcc or clang) to build the stub of the CUDA driver"
    return None


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def environment(folder: Path) -> dict[str, str]:
    """Build the driver in `folder`, and give the environment of a process that finds it in place of NVIDIA's."""
    library = folder / "libcuda.so.1"
    command = [compiler(), "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    # A cache of its own: nothing may pass between the stub and a real GPU.
    return inherited | {
        "LD_LIBRARY_PATH": ":".join(paths),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(Path(tempfile.gettempdir()) / "torch_sigmoid-stub-cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def activate():
    """Make CPU tensors take the kernels' path, as tensors on that GPU would."""
    import triton.backends.nvidia.driver as nvidia
    from triton.runtime.driver import driver

    from torch_sigmoid import dispatch, nn

    class StubDriver(nvidia.CudaDriver):
        def __init__(self):
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.device = -1  # the index that tensors on a CPU have
            self.get_current_device = lambda: self.device
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=None: (9, 0)

    driver.set_active(StubDriver())
    dispatch.kernels_refusal = lambda device: None
    dispatch.torch_below(dispatch.TORCH_BELOW_ON_NVIDIA)
    nn._TORCH_ALONE = False


class Launch(ctypes.Structure):
    """The stub's record of its last launch."""

    _fields_ = (
        ("launches", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * 32),
    )


def last_launch(n_parameters: int) -> Launch:
    """The record, updated by every launch; from now on it holds the first `n_parameters` parameters of each."""
    library = ctypes.CDLL("libcuda.so.1")
    library.stub_expect(n_parameters)
    library.stub_last.restype = ctypes.POINTER(Launch)
    return library.stub_last().contents
