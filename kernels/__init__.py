"""Triton kernels and their launchers: tensors in, tensors out. Nothing here knows autograd or imports from above.

Importable everywhere. Where Triton cannot be used, `UNAVAILABLE` says why and the launchers are absent.
"""

try:
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
        raise ImportError(f"version {triton.__version__} has no tuples in kernels, 3.3 is the first that does")

    from .maths import INTERPRETED
    from .sigmoid import sigmoid_backward, sigmoid_double_backward, sigmoid_forward
except Exception as error:  # missing, too old, or failing while it is imported
    UNAVAILABLE = f"Triton cannot be used ({type(error).__name__}: {error})"
    INTERPRETED = False
else:
    UNAVAILABLE = None
    INTERPRETED = bool(INTERPRETED.value)

__all__ = ["INTERPRETED", "UNAVAILABLE", "sigmoid_backward", "sigmoid_double_backward", "sigmoid_forward"]
