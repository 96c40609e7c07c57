"""What open_clip's layers and its SigLIP loss look like."""

from typing import Any

from torch import Tensor

from . import Activation, Form

LIBRARY, VERSIONS = "open_clip", "3.3"

ACTIVATIONS = (Activation("quick_gelu", LIBRARY, VERSIONS, "QuickGELU", ("751d5918205eaef4",)),)


def siglip_loss(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    output_dict: bool = False,
) -> Tensor | dict[str, Tensor]:
    """The loss over all ranks, where there are several, instead of this rank's part of it; the gradients are the same."""
    group = "world" if self.world_size > 1 else None
    loss = self._fused_siglip_loss(image_features, text_features, logit_scale, logit_bias, group=group)
    return {"contrastive_loss": loss} if output_dict else loss


FORMS = (
    Form(
        "SigLIP's loss",
        LIBRARY,
        VERSIONS,
        ("4ae1d12193eded84",),
        besides=(
            ("_loss", ("2716b08f84049e26",)),
            ("get_logits", ("352f150e655e8fbe",)),
            ("get_ground_truth", ("9a0a197b53b87a7e",)),
        ),
        forward=siglip_loss,
        fused="siglip_loss",
    ),
)
