"""Ours in a model that exists: in its modules (`replace`), or in its calls (`intercept`)."""

from .forms import Form, register, unregister
from .intercept import intercept
from .replace import replace, restore
from .report import Report, report
from .trees import Rewrite

__all__ = ["Form", "Report", "Rewrite", "intercept", "register", "replace", "report", "restore", "unregister"]
