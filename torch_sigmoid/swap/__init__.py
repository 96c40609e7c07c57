"""Put ours where torch's stands, in a model that exists: in its modules, or in the calls that it makes."""

from .intercept import intercept
from .replace import replace, restore

__all__ = ["intercept", "replace", "restore"]
