"""What torchvision's layers and detectors look like."""

from typing import Any

from torch import Tensor

from ..trees import Rewrite
from . import Activation, Form

LIBRARY, VERSIONS = "torchvision", "0.29"

ACTIVATIONS: tuple[Activation, ...] = ()


def squeeze_and_excite(self: Any, input: Tensor) -> Tensor:
    """input·σ(its squeezed channels), with the gate's σ taken where it is multiplied."""
    scale = self.fc2(self.activation(self.fc1(self.avgpool(input))))
    result: Tensor = self.scale_activation(scale, input)
    return result


FORMS = (
    Form(
        "squeeze and excitation",
        LIBRARY,
        VERSIONS,
        ("459d8728844e5b0e",),
        besides=(("_scale", ("f1f0dde47ca422f2",)),),
        forward=squeeze_and_excite,
        activation="sigmoid",
        gate="scale_activation",
    ),
    Form(
        "focal loss",
        LIBRARY,
        VERSIONS,
        (
            "8c1b80d0eef9f9bd",  # RetinaNetClassificationHead
            "d6960bb30a0b4ece",  # FCOSHead
        ),
        (Rewrite("sigmoid_focal_loss", "self.FUSED"),),
        method="compute_loss",
        fused="sigmoid_focal_loss",
    ),
)
