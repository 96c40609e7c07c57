"""One kernel for every element-wise operator: load the inputs, apply a formula, store its results.

A formula is a device function on loaded values, `formula(*inputs, *constants, ROUND_TO_16_BIT)`, which returns the value of
the only output, or a tuple with one for each. Its arithmetic is fp32 (fp64 for fp64), rounded once when stored. With `given`,
it gets one more value after its inputs: the "columns" of the elements, or "n_elements", how many of them the walk covers.
"""

import types

import triton
import triton.language as tl

from .launch import Launcher
from .tiles import SIZES, count_elements, load, place_of, select_part, store

FORMULA = None  # `with_formula` gives each kernel its own


@triton.jit
def load_all(inputs, strides, n_matrices, n_rows, n_columns, part, N_INPUTS: tl.constexpr, GIVEN: tl.constexpr):
    """The values for a formula, floats in the first one's arithmetic. An input that is None is a factor of 1."""
    values = (load(inputs[0], strides[0], part),)
    for i in tl.static_range(1, N_INPUTS):
        if inputs[i] is None:
            values += (1.0,)
        else:
            value = load(inputs[i], strides[i], part)
            if value.dtype.is_floating():
                value = value.to(values[0].dtype)
            values += (value,)
    if GIVEN == "columns":
        values += (part[2],)
    elif GIVEN == "n_elements":
        values += (count_elements(n_matrices, n_rows, n_columns, values[0]),)
    return values


def pointwise_kernel(
    inputs,
    outputs,
    strides,
    n_matrices,
    n_rows,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_INT64: tl.constexpr,
    N_INPUTS: tl.constexpr,
    GIVEN: tl.constexpr,
    constants,
):
    """`strides` are those of the inputs, then those of the outputs."""
    ROUND_TO_16_BIT: tl.constexpr = inputs[0].dtype.element_ty.primitive_bitwidth == 16
    N_OUTPUTS: tl.constexpr = len(outputs)
    place = place_of(tl.program_id(0), n_matrices, n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
    for TAIL in tl.static_range(2):
        present, part = select_part(place, n_matrices, n_rows, n_columns, TAIL, BLOCK_ROWS, BLOCK_COLUMNS, USE_INT64)
        if present:
            values = load_all(inputs, strides, n_matrices, n_rows, n_columns, part, N_INPUTS, GIVEN)
            results = FORMULA(*values, *constants, ROUND_TO_16_BIT)
            for i in tl.static_range(N_OUTPUTS):
                result = results if N_OUTPUTS == 1 else results[i]
                store(outputs[i], strides[N_INPUTS + i], part, result)


def with_formula(kernel, formula):
    """A copy of the kernel that has the formula among its globals, and is named after it.

    Passed as an argument instead, a function cannot be described to a compilation hook by Triton 3.6.
    """
    body = types.FunctionType(kernel.__code__, kernel.__globals__ | {"FORMULA": formula})
    body.__annotations__ = kernel.__annotations__
    name = formula.__name__.removesuffix("formula") + "kernel"
    return triton.jit(body, do_not_specialize=[*SIZES, "n_splits", "n_steps"], repr=lambda _: name)


def as_constants(values) -> tuple:
    """For a kernel to spread: it can spread a tuple of constants, but not a constant that is a tuple."""
    return tuple(value if value is None else tl.constexpr(value) for value in values)


def pointwise(formula, *constants, given=None, layouts_follow=True):
    """The launcher of a formula with its constants."""
    kernel = with_formula(pointwise_kernel, formula)
    return Launcher(kernel, given, as_constants(constants), layouts_follow=layouts_follow)
