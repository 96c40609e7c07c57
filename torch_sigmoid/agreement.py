"""Whether each operator agrees with float64 on a device: its errors in ulp, for `python -m torch_sigmoid`."""

import math

import torch

import torch_sigmoid

from .operators import OPERATORS, Row, exact_sigmoid_slope

# Largest errors in ulp of the exact value: one rounding in 16 bit, the arithmetic of exp, sum and quotient in fp32 and fp64.
ALLOWED_ULP = {torch.float64: 8, torch.float32: 6, torch.float16: 1, torch.bfloat16: 1}
# The interpreter truncates to bf16 where a GPU rounds.
INTERPRETER_ULP = 0.5


def worst_ulp(actual: torch.Tensor, exact: list[float]) -> float:
    """The largest error in ulps of the exact value, over those that are normal numbers."""
    info = torch.finfo(actual.dtype)
    errors = [
        abs(value - true) / (2.0 ** math.floor(math.log2(abs(true))) * info.eps)
        for value, true in zip(actual.tolist(), exact)
        if abs(true) >= info.smallest_normal
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def inputs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A grid on which σ' is a normal number, without 0."""
    reach = 9.0 if dtype is torch.float16 else 80.0
    x = torch.linspace(-reach, reach, 1003, dtype=torch.float64).to(dtype)
    return x[x != 0].to(device).requires_grad_()


def errors_of(row: Row, case: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of an operator of one tensor and of its gradient, but where it has a zero to cross."""
    assert row.exact is not None
    value, slope = row.exact
    x = inputs(device, dtype)
    output = row.cases[case].function(x)
    (grad,) = torch.autograd.grad(output, x, torch.ones_like(x))
    numbers = x.tolist()
    if row.family == "sigmoid" and not case:
        # From the output: the slope of the σ that it has kept.
        slopes = [sigma * (1 - sigma) for sigma in output.tolist()]
    else:
        slopes = [slope(number) for number in numbers]
    # Around a zero of the derivative, errors are those of its terms.
    steady = torch.tensor([abs(each) > 0.1 or not -3 < number < 0 for each, number in zip(slopes, numbers)])
    slopes = [each for each, kept in zip(slopes, steady.tolist()) if kept]
    return max(worst_ulp(output.detach().cpu(), list(map(value, numbers))), worst_ulp(grad.cpu()[steady], slopes))


def errors_of_the_others(device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a gate of 2.5 and of a cross entropy, and of their gradients."""
    x = inputs(device, dtype)
    numbers = x.tolist()
    operand = torch.full_like(x, 2.5).requires_grad_()
    gated = torch_sigmoid.sigmoid_gate(operand, x)
    of_operand, of_gate = torch.autograd.grad(gated, (operand, x), torch.ones_like(x))
    entropy = torch_sigmoid.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    (of_entropy,) = torch.autograd.grad(entropy, x, torch.ones_like(x))
    sigmoid, _ = OPERATORS["sigmoid"].exact or (None, None)
    logsigmoid, _ = OPERATORS["logsigmoid"].exact or (None, None)
    assert sigmoid is not None
    assert logsigmoid is not None
    results = (
        (gated, [2.5 * sigmoid(number) for number in numbers]),
        (of_operand, [sigmoid(number) for number in numbers]),
        (of_gate, [2.5 * exact_sigmoid_slope(number) for number in numbers]),
        (entropy, [-logsigmoid(number) for number in numbers]),
        (of_entropy, [-sigmoid(-number) for number in numbers]),
    )
    return max(worst_ulp(actual.detach().cpu(), exact) for actual, exact in results)


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The largest errors of each operator with an exact formula, and of the rest, by name."""
    found = {}
    for name, row in OPERATORS.items():
        if row.exact:
            for case in row.cases:
                found[f"{name} {case}".strip()] = errors_of(row, case, device, dtype)
    return found | {"gates and losses": errors_of_the_others(device, dtype)}
