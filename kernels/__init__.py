"""Triton kernels and their launchers: tensors in, tensors out. Nothing here knows autograd or imports from above.

Importable everywhere, and at no cost: Triton is imported when the first attribute below is asked for.

    UNAVAILABLE    why Triton cannot be used; None where it can
    INTERPRETED    whether TRITON_INTERPRET=1 runs the kernels on the CPU
    sigmoid, gates, interleaved, losses, siglip, statistics    the launchers of each family
"""

import importlib
from typing import Any

FAMILIES = ("sigmoid", "gates", "interleaved", "losses", "siglip", "statistics")


def __getattr__(name: str) -> Any:
    if name not in ("UNAVAILABLE", "INTERPRETED", *FAMILIES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def _load() -> None:
    """Import the families and set the attributes; without Triton there are no families."""
    found: dict[str, Any] = {"INTERPRETED": False, "UNAVAILABLE": None}
    try:
        import triton

        # Before 3.6 a correctly rounded quotient is flushed to 0 where it is subnormal; before 3.3 kernels take no tuples.
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
            raise ImportError(f"version {triton.__version__} is older than 3.6")
        found |= {family: importlib.import_module(f"{__name__}.{family}") for family in FAMILIES}
        maths = importlib.import_module(f"{__name__}.maths")
        found["INTERPRETED"] = bool(maths.INTERPRETED.value)
    except Exception as error:  # missing, too old, or failing while it is imported
        found["UNAVAILABLE"] = f"Triton cannot be used ({type(error).__name__}: {error})"
    for name, value in found.items():
        globals().setdefault(name, value)
