"""Triton kernels and their launchers: tensors in, tensors out. Nothing here knows autograd or imports from above.

Importable everywhere. Where Triton cannot be used, `UNAVAILABLE` says why and the launchers are absent.
"""

try:
    import triton

    # Before 3.6 a correctly rounded quotient is flushed to 0 where it is subnormal; before 3.3 kernels take no tuples.
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        raise ImportError(f"version {triton.__version__} is older than 3.6")

    from . import gates, losses, siglip
    from .maths import INTERPRETED
    from .sigmoid import sigmoid_backward, sigmoid_double_backward, sigmoid_forward
    from .statistics import add_activation, add_squares
except Exception as error:  # missing, too old, or failing while it is imported
    UNAVAILABLE = f"Triton cannot be used ({type(error).__name__}: {error})"
    INTERPRETED = False
else:
    UNAVAILABLE = None
    INTERPRETED = bool(INTERPRETED.value)

__all__ = [
    "INTERPRETED",
    "UNAVAILABLE",
    "add_activation",
    "add_squares",
    "gates",
    "losses",
    "siglip",
    "sigmoid_backward",
    "sigmoid_double_backward",
    "sigmoid_forward",
]
