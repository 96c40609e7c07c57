"""Ours in a model that exists: in its modules (`replace`), or in its calls (`intercept`); or when transformers makes it."""

from .forms import Form, register, unregister
from .intercept import intercept
from .register_transformers import register_transformers, unregister_transformers
from .replace import replace, restore
from .report import Report, report
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
