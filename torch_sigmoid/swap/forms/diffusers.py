"""What the layers of diffusers look like."""

from ..trees import Rewrite
from . import Activation, Form

LIBRARY, VERSIONS = "diffusers", "0.42"

ACTIVATIONS: tuple[Activation, ...] = ()

FORMS = (
    Form(
        "SwiGLU",
        LIBRARY,
        VERSIONS,
        ("bea134ef989dcde9",),
        # The gate is the second half.
        (Rewrite("UP * self.ACT(GATE)", "self.ACT(GATE, UP)"),),
        activation="silu",
    ),
    Form(
        "Flux2SwiGLU",
        LIBRARY,
        VERSIONS,
        ("a3103cc2003bbc1e",),
        (
            Rewrite(
                "HALF = PACKED.shape[-1] // 2\nOUT = self.ACT(PACKED[..., :HALF]) * PACKED[..., HALF:]",
                "OUT = self.ACT(PACKED, packed_dim=-1)",
            ),
        ),
        activation="silu",
    ),
)
