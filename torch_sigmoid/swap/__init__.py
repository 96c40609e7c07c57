"""Put ours in the place of torch's in a model that exists: in its modules (`replace`), or in its calls (`intercept`)."""

from .intercept import intercept
from .replace import replace, restore

__all__ = ["intercept", "replace", "restore"]
