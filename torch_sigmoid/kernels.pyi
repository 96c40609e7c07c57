"""What type checkers see of kernels/ in a checkout, where it stands beside the package: device code has no types.

An installed package contains kernels/ itself, and not this file.
"""

from typing import Any

UNAVAILABLE: str | None
INTERPRETED: bool
FAMILIES: tuple[str, ...]

def untested() -> str | None: ...
def __getattr__(name: str) -> Any: ...
