"""Ours in every model that transformers makes: its patch mechanism hands each model over when it is made.

`from_pretrained` and `from_config` of transformers put registered classes in the place of its own (`apply_patches`), construct
the model, and hand it to `patch_output_recorders`, which has it record the outputs of those classes. That last step is where
`replace` joins in: it sees the whole model, before any weight is loaded.

Names of classes, which the first step goes by, cannot tell what is ours. Four models have a class Qwen2MLP of their own, and
one name stands for one replacement; activations come from a table of classes, ACT2FN, which no patch reaches; and the class of
the model itself, such as SiglipModel with its loss, is never looked up by name.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..checks import check_save
from ..dispatch import Save
from .replacement import make_ours

_STEP = "patch_output_recorders"
_NEEDED = "transformers 5.3 or newer"


class _Step:
    """transformers' last step in making a model, and then ours."""

    def __init__(self, mechanism: Any, save: Save) -> None:
        self.original: Callable[[torch.nn.Module], None] = getattr(mechanism, _STEP)
        self.classes_of_others: Callable[[], dict[str, type]] = mechanism.get_patch_mapping
        self.save = save
        # Off, where somebody holds on to it after unregister_transformers().
        self.is_on = True

    def __call__(self, model: torch.nn.Module) -> None:
        self.original(model)
        if self.is_on:
            others = set(self.classes_of_others().values())
            make_ours([module for module in model.modules() if type(module) not in others], self.save)


_registered: _Step | None = None


def register_transformers(*, save: Save = "output") -> None:
    """Have each model of transformers come replaced, from now on, when `from_pretrained` or `from_config` makes it.

    Such a model is as `torch_sigmoid.replace(model, save=save)` leaves it, so `report` and `restore` know it; but where there
    is nothing to replace, there is no warning. Models constructed directly, such as LlamaForCausalLM(config), stay as they are,
    and so do those that exist already. `unregister_transformers` ends it; models made until then stay replaced.

    Classes that somebody else registers with transformers' `register_patch_mapping`, before or after, are left as they are.

    Args:
        save: as in `torch_sigmoid.Sigmoid`.

    Warns:
        UserWarning: somebody else has registered classes, and under which names.

    Raises:
        ValueError: `save` is neither "output" nor "input".
        ImportError: transformers is not installed.
        RuntimeError: it is older than 5.3 or makes models in another way; or this was called before.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> torch_sigmoid.register_transformers()
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
        >>> print(torch_sigmoid.report(AutoModelForCausalLM.from_config(config)))
        LlamaForCausalLM: 4 modules of torch_sigmoid
          modules                        class           now          known as
          model.layers.{0-1}.mlp         LlamaMLP        swiglu       gated MLP, transformers 5.24
          model.layers.{0-1}.mlp.act_fn  SiLUActivation  silu, gated
        >>> torch_sigmoid.unregister_transformers()
    """
    global _registered
    check_save(save)
    if _registered is not None:
        raise RuntimeError(
            f"register_transformers(): registered already, with save={_registered.save!r}; call unregister_transformers() first"
        )
    mechanism, modeling = _mechanism()
    if others := mechanism.get_patch_mapping():
        warnings.warn(
            f"register_transformers(): left as they are, since somebody else has registered them: {', '.join(sorted(others))}",
            stacklevel=2,
        )
    _registered = _Step(mechanism, save)
    for module in (mechanism, modeling):
        setattr(module, _STEP, _registered)


def unregister_transformers() -> None:
    """Undo `register_transformers`: models are made as before. Those made meanwhile stay replaced; `restore` undoes that.

    Raises:
        RuntimeError: nothing is registered.

    Example:
        >>> torch_sigmoid.register_transformers(save="input")
        >>> torch_sigmoid.unregister_transformers()
    """
    global _registered
    if _registered is None:
        raise RuntimeError("unregister_transformers(): nothing is registered; register_transformers() was not called")
    for module in _mechanism():
        if getattr(module, _STEP) is _registered:
            setattr(module, _STEP, _registered.original)
    _registered.is_on = False
    _registered = None


def _mechanism() -> tuple[Any, Any]:
    """transformers' modules with its patch mechanism, and with what makes models."""
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"register_transformers() needs {_NEEDED}, which is not installed") from error
    try:
        mechanism = importlib.import_module("transformers.monkey_patching")
        modeling = importlib.import_module("transformers.modeling_utils")
        model = modeling.PreTrainedModel
        makers = inspect.unwrap(model.from_pretrained.__func__), inspect.unwrap(model._from_config.__func__)
        is_known = hasattr(mechanism, "get_patch_mapping") and all(_STEP in maker.__code__.co_names for maker in makers)
    except (ModuleNotFoundError, AttributeError):
        is_known = False
    if not is_known:
        raise RuntimeError(
            f"register_transformers() needs {_NEEDED}, whose from_pretrained and from_config call {_STEP}; this is "
            f"transformers {getattr(transformers, '__version__', '?')}. replace(model) works with any version"
        )
    return mechanism, modeling
