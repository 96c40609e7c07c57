"""Executes the PTX that a GPU would be given, on a CPU: every thread of a launch at once, each register a numpy array.

Triton compiles the kernels for a GPU that need not exist. What it hands to the driver, PTX, is carried out here:

device.py        stands under Triton as the driver of a GPU; tensors on a CPU then take the kernels' path
program.py       the text of a kernel, as instructions
instructions.py  what each instruction does
machine.py       which threads run when: branches, barriers, warps
memory.py        what a thread may read and write, and who did
arithmetic.py    floating point, rounded once, and how wrong the approximate instructions may be

`pytest --kernels=ptx` runs the test suite this way. What a GPU would get wrong, or what is not known here, raises `PtxError`,
which names the kernel, the instruction, the thread and the tensor: an access out of bounds or off its alignment, a read of
memory that nobody has written, two threads that write different values to one place, a read of what another thread writes,
a barrier or a shuffle that not all of its threads reach, an output never written, a kernel that was unloaded, an unknown
instruction.

What it does not show: an access past one tensor that lands in another one of the same launch; lanes of one warp that exchange
values through memory without a barrier; products and sums that ptxas fuses although the PTX has them apart
(tests/test_codegen.py looks for that); the bits of a NaN.
"""

from .arithmetic import EXACT, MODELS, Model
from .machine import PtxError, launch
from .program import parse

__all__ = ["EXACT", "MODELS", "Model", "PtxError", "launch", "parse"]
