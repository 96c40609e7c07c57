"""`python -m torch_sigmoid`: what is installed, which path each device takes and why, and whether it agrees with float64.

Exits with 0 only if every check agrees.
"""

import math
import platform
import sys

import torch

import torch_sigmoid
from torch_sigmoid import ops

# Largest errors in ulp of the exact value: one rounding in 16 bit, the arithmetic of exp, sum and quotient in fp32 and fp64.
FORWARD_ULP = {torch.float64: 4, torch.float32: 4, torch.float16: 1, torch.bfloat16: 1}
BACKWARD_ULP = {torch.float64: 8, torch.float32: 4, torch.float16: 1, torch.bfloat16: 1}
# The interpreter truncates to bf16 where a GPU rounds.
INTERPRETER_ULP = 0.5


def exact_sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def exact_derivative(x: float) -> float:
    return math.exp(-abs(x)) / (1 + math.exp(-abs(x))) ** 2


def exact_logsigmoid(x: float) -> float:
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


def worst_ulp(actual: torch.Tensor, exact: list[float]) -> float:
    """The largest error in ulps of the exact value."""
    info = torch.finfo(actual.dtype)
    errors = [
        abs(value - true) / (2 ** max(math.floor(math.log2(abs(true))), math.log2(info.smallest_normal)) * info.eps)
        for value, true in zip(actual.tolist(), exact)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def worst_ulp_of_what_is_built_on_it(x: torch.Tensor) -> float:
    """The largest error of log-sigmoid, SiLU, a gate of 2.5 and a cross entropy, with gradients where these have no zero."""
    numbers = [value for value in x.tolist() if value]
    x = x.detach()[x != 0].requires_grad_()
    operand = torch.full_like(x, 2.5).requires_grad_()
    logsigmoid, gated = torch_sigmoid.logsigmoid(x), torch_sigmoid.sigmoid_gate(operand, x)
    (of_logsigmoid,) = torch.autograd.grad(logsigmoid, x, torch.ones_like(x))
    of_operand, of_gate = torch.autograd.grad(gated, (operand, x), torch.ones_like(x))
    entropy = torch_sigmoid.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    (of_entropy,) = torch.autograd.grad(entropy, x, torch.ones_like(x))
    results = (
        (torch_sigmoid.silu(x), lambda v: v * exact_sigmoid(v)),
        (logsigmoid, exact_logsigmoid),
        (of_logsigmoid, lambda v: exact_sigmoid(-v)),
        (gated, lambda v: 2.5 * exact_sigmoid(v)),
        (of_operand, exact_sigmoid),
        (of_gate, lambda v: 2.5 * exact_derivative(v)),
        (entropy, lambda v: -exact_logsigmoid(v)),
        (of_entropy, lambda v: -exact_sigmoid(-v)),
    )
    return max(worst_ulp(actual.detach().cpu(), list(map(exact, numbers))) for actual, exact in results)


def check(device: torch.device, dtype: torch.dtype, allowance: float) -> tuple[list[float], bool]:
    """The largest errors of σ, of its gradient from σ and from x, and of gates and losses, and whether all are in bounds.

    The grid is one on which the true gradients are normal numbers. The gradient from σ is held against the σ it came from.
    """
    reach = 9.0 if dtype is torch.float16 else 80.0
    x = torch.linspace(-reach, reach, 1003, dtype=torch.float64).to(dtype).to(device).requires_grad_()
    sigma = torch_sigmoid.sigmoid(x)
    from_sigma, from_x = (
        torch.autograd.grad(torch_sigmoid.sigmoid(x, save=save), x, torch.ones_like(x))[0].cpu() for save in ("output", "input")
    )
    slopes = torch.tensor([s * (1 - s) for s in sigma.tolist()], dtype=torch.float64)
    normal = slopes > torch.finfo(dtype).smallest_normal
    errors = [
        worst_ulp(sigma.detach().cpu(), [exact_sigmoid(value) for value in x.tolist()]),
        worst_ulp(from_sigma[normal], slopes[normal].tolist()),
        worst_ulp(from_x, [exact_derivative(value) for value in x.tolist()]),
        worst_ulp_of_what_is_built_on_it(x),
    ]
    bounds = (FORWARD_ULP[dtype], *[BACKWARD_ULP[dtype]] * 3)
    return errors, all(error <= bound + allowance for error, bound in zip(errors, bounds))


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found += [torch.device("xpu", index) for index in range(torch.xpu.device_count())]
    return found + [torch.device("mps")] * torch.backends.mps.is_available()


def main() -> int:
    try:
        import triton
    except ImportError:
        triton_version = "not installed"
    else:
        triton_version = triton.__version__
    print(f"torch_sigmoid {torch_sigmoid.__version__}")
    print(f"torch         {torch.__version__}")
    print(f"triton        {triton_version}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")

    all_agree = True
    # The kernels are checked, also at sizes that otherwise go to torch's operator.
    ops.torch_below = 0
    for device in devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        chosen = torch_sigmoid.path(torch.empty(1, device=device))
        interpreted = torch_sigmoid.functional.ops.kernels.INTERPRETED
        print(f"\n{device} ({name}): path {chosen.name}: {chosen.reason}")
        for dtype in FORWARD_ULP:
            if dtype is torch.float64 and device.type == "mps":
                continue
            allowance = INTERPRETER_ULP if interpreted and dtype is torch.bfloat16 else 0
            (forward, from_sigma, from_x, of_others), agrees = check(device, dtype, allowance)
            print(
                f"  {dtype!s:15} off by at most {forward:.2f} ulp forward, {from_sigma:.2f} backward from the output,"
                f" {from_x:.2f} from the input, {of_others:.2f} in gates and losses:"
                f" {'agrees' if agrees else 'DISAGREES'} with float64"
            )
            all_agree = all_agree and agrees
    print("\n" + ("everything agrees" if all_agree else "NOT everything agrees"))
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
