"""Triton kernels and their launchers: tensors in, tensors out. Nothing here knows autograd or imports from above.

Importable everywhere, and at no cost: Triton is imported when the first attribute below is asked for.

    UNAVAILABLE    why Triton cannot be used; None where it can
    INTERPRETED    whether TRITON_INTERPRET=1 runs the kernels on the CPU
    untested()     what is different with a Triton newer than those tested; None with one of these, and without Triton
    sigmoid, gates, interleaved, losses, siglip, statistics    the launchers of each family
"""

import importlib
from typing import Any

# The minor versions of Triton whose kernels and launches are tested. Before the first one a correctly rounded quotient is
# flushed to 0 where it is subnormal; before 3.3 kernels take no tuples.
TESTED = ((3, 6), (3, 7), (3, 8), (3, 9))
FAMILIES = ("sigmoid", "gates", "interleaved", "losses", "siglip", "statistics")


def __getattr__(name: str) -> Any:
    if name not in ("UNAVAILABLE", "INTERPRETED", *FAMILIES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def minor_version(triton: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _written(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def untested() -> str | None:
    """What is different with a Triton newer than those tested; None with one of these, and where Triton cannot be used."""
    if __getattr__("UNAVAILABLE"):
        return None
    import triton

    if minor_version(triton) in TESTED:
        return None
    return (
        f"Triton {triton.__version__} is not tested with this version, only {_written(TESTED[0])} to {_written(TESTED[-1])}: "
        "each launch goes through Triton's public entry, which costs the host some microseconds more"
    )


def _load() -> None:
    """Import the families and set the attributes; without Triton there are no families."""
    found: dict[str, Any] = {"INTERPRETED": False, "UNAVAILABLE": None}
    try:
        import triton

        if minor_version(triton) < TESTED[0]:
            raise ImportError(f"version {triton.__version__} is older than {_written(TESTED[0])}")
        found |= {family: importlib.import_module(f"{__name__}.{family}") for family in FAMILIES}
        maths = importlib.import_module(f"{__name__}.maths")
        found["INTERPRETED"] = bool(maths.INTERPRETED.value)
    except Exception as error:  # missing, too old, or failing while it is imported
        found["UNAVAILABLE"] = f"Triton cannot be used ({type(error).__name__}: {error})"
    for name, value in found.items():
        globals().setdefault(name, value)
