"""The sigmoid loss of all pairs of images and texts, over a block of similarities s: its sum, and its gradient in s.

logit l = scale·s + bias       z = -l for a pair that belongs together, else l
loss      Σ log(1 + e^z)       gradient G = ∂loss/∂l = -σ(z) or σ(z), written over s, with ΣG·s and ΣG

A pair belongs together if its image and its text have equal ids. `scale` and `bias` are read on the device. Each program leaves
its sums, in fp32 (fp64 for fp64), for the caller to add up once all blocks of a matrix have left theirs.
"""

import triton
import triton.language as tl

from . import maths
from .launch import plan
from .reduce import programs_for, total


@triton.jit
def signed_logit(similarity, image_id, text_id, scale, bias):
    """z, and whether each pair belongs together."""
    logit = similarity * scale + bias
    together = image_id == text_id
    return tl.where(together, maths.negative(logit), logit), together


@triton.jit
def pairs_forward_formula(similarity, image_id, text_id, scale, bias, ROUND: tl.constexpr):
    z, _ = signed_logit(similarity, image_id, text_id, scale, bias)
    return maths.weighted(-1.0, maths.negative(z), maths.LOGSIGMOID, 0, ROUND)


@triton.jit
def pairs_gradient_formula(similarity, image_id, text_id, scale, bias, ROUND: tl.constexpr):
    """G, which is stored, and the terms of the loss, of ΣG·s and of ΣG."""
    z, together = signed_logit(similarity, image_id, text_id, scale, bias)
    loss = maths.weighted(-1.0, maths.negative(z), maths.LOGSIGMOID, 0, ROUND)
    gradient = maths.weighted(tl.where(together, -1.0, 1.0), z, maths.SIGMOID, 0, ROUND).to(similarity.dtype)
    return gradient, loss, gradient * similarity, gradient


_forward = total(pairs_forward_formula)
_gradient = total(pairs_gradient_formula, n_sums=3)


def programs_of(n_rows, n_columns):
    """How many sums a matrix of this shape leaves behind; no more than one of more rows."""
    strides = (n_columns, 1), (1, 0), (0, 1), (0, 0), (0, 0)
    return programs_for(plan((n_rows, n_columns), strides, leading=0).tiles)


def _inputs(similarity, image_ids, text_ids, scale, bias):
    return tuple(each.expand(similarity.shape) for each in (similarity, image_ids[:, None], text_ids, scale, bias))


def pairs_forward(similarity, image_ids, text_ids, scale, bias, sums):
    """Leaves sums of log(1 + e^z) over a contiguous matrix."""
    _forward(_inputs(similarity, image_ids, text_ids, scale, bias), (sums,))


def pairs_gradient(similarity, image_ids, text_ids, scale, bias, sums, scale_sums, bias_sums):
    """Writes G over the similarities, and leaves sums of log(1 + e^z), of G·s and of G."""
    _gradient(_inputs(similarity, image_ids, text_ids, scale, bias), (similarity, sums, scale_sums, bias_sums))
