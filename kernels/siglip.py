"""The sigmoid loss of all pairs of images and texts, over a block of similarities s: its sum, and its gradient in s.

logit l = scale·s + bias       z = -l for a pair that belongs together, else l
loss      Σ log(1 + e^z)       gradient G = ∂loss/∂l = -σ(z) or σ(z), written over s, with ΣG·s and ΣG

`scale` and `bias` are read on the device. `labels` says which column belongs to each row; -1 means none.
Each program leaves its sums, in fp32 (fp64 for fp64), for the caller to add up once all chunks of a matrix have left theirs.
"""

import triton
import triton.language as tl

from . import maths
from .launch import plan
from .reduce import programs_for, total


@triton.jit
def signed_logit(similarity, label, scale, bias, columns):
    """z, and whether each pair belongs together."""
    logit = similarity * scale + bias
    together = label == columns
    return tl.where(together, maths.negative(logit), logit), together


@triton.jit
def pairs_forward_formula(similarity, label, scale, bias, columns, ROUND: tl.constexpr):
    z, _ = signed_logit(similarity, label, scale, bias, columns)
    return maths.weighted(-1.0, maths.negative(z), maths.LOGSIGMOID, 0, ROUND)


@triton.jit
def pairs_gradient_formula(similarity, label, scale, bias, columns, ROUND: tl.constexpr):
    """G, which is stored, and the terms of ΣG·s and ΣG."""
    z, together = signed_logit(similarity, label, scale, bias, columns)
    gradient = maths.weighted(tl.where(together, -1.0, 1.0), z, maths.SIGMOID, 0, ROUND).to(similarity.dtype)
    return gradient, gradient * similarity, gradient


_forward = total(pairs_forward_formula, given="columns")
_gradient = total(pairs_gradient_formula, n_sums=2, given="columns")


def programs_of(n_rows, n_columns):
    """How many sums a matrix of this shape leaves behind; no more than one of more rows."""
    return programs_for(plan((n_rows, n_columns), ((n_columns, 1), (1, 0), (0, 0), (0, 0)), leading=0).tiles)


def _inputs(similarity, labels, scale, bias):
    return tuple(each.expand(similarity.shape) for each in (similarity, labels[:, None], scale, bias))


def pairs_forward(similarity, labels, scale, bias, sums):
    """Leaves sums of log(1 + e^z) over a contiguous matrix of more than one column."""
    _forward(_inputs(similarity, labels, scale, bias), (sums,))


def pairs_gradient(similarity, labels, scale, bias, scale_sums, bias_sums):
    """Writes G over the similarities, and leaves sums of G·s and of G."""
    _gradient(_inputs(similarity, labels, scale, bias), (similarity, scale_sums, bias_sums))
