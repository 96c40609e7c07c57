"""Ours in a model that exists: in its modules (`replace`), or in its calls (`intercept`); or when transformers makes it.

All but `intercept` is imported when it is first asked for: it takes as long as the rest of the package.
"""

import importlib
from typing import TYPE_CHECKING

from .intercept import intercept

if TYPE_CHECKING:
    from .forms import Form, register, unregister
    from .replacement import replace, restore
    from .reporting import Report, report
    from .transformers_hook import register_transformers, unregister_transformers
    from .trees import Rewrite

__all__ = [
    "Form",
    "Report",
    "Rewrite",
    "intercept",
    "register",
    "register_transformers",
    "replace",
    "report",
    "restore",
    "unregister",
    "unregister_transformers",
]

_FILES = {
    "forms": ("Form", "register", "unregister"),
    "replacement": ("replace", "restore"),
    "reporting": ("Report", "report"),
    "transformers_hook": ("register_transformers", "unregister_transformers"),
    "trees": ("Rewrite",),
}

if not TYPE_CHECKING:

    def __getattr__(name):
        for file, names in _FILES.items():
            if name in names:
                globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{file}"), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
