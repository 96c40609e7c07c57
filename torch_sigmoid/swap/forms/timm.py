"""What timm's layers look like."""

from ..trees import Rewrite
from . import Activation, Form
from .transformers import PRODUCT

LIBRARY, VERSIONS = "timm", "1.0.31"

ACTIVATIONS = (
    Activation("sigmoid", LIBRARY, VERSIONS, "Sigmoid", ("fe4433b1b51517cf",)),
    Activation("quick_gelu", LIBRARY, VERSIONS, "QuickGELU", ("f77589ac6eac82be",)),
)

GLU_MLP = "46e64ee999e0daba"
HALVES_IN_EITHER_ORDER = "AA, BB = PACKED.chunk(2, dim=DIM)\nOUT = AA * self.ACT(BB) if LAST else self.ACT(AA) * BB"

FORMS = (
    Form("SwiGLU", LIBRARY, VERSIONS, ("a1d3af440b7adacf",), (PRODUCT,), activation="silu"),
    Form(
        "GluMlp, which is also SwiGLUPacked",
        LIBRARY,
        VERSIONS,
        (GLU_MLP,),
        (
            Rewrite(
                HALVES_IN_EITHER_ORDER,
                "AA, BB = PACKED.chunk(2, dim=DIM)\nOUT = self.ACT(BB, AA) if LAST else self.ACT(PACKED, packed_dim=DIM)",
            ),
        ),
        activation="silu",
    ),
    Form(
        "GluMlp",
        LIBRARY,
        VERSIONS,
        (GLU_MLP,),
        (
            Rewrite(
                HALVES_IN_EITHER_ORDER,
                "AA, BB = PACKED.chunk(2, dim=DIM)\nOUT = self.ACT(PACKED, packed_dim=DIM) if LAST else self.ACT(AA, BB)",
            ),
        ),
        activation="sigmoid",
    ),
    Form(
        "squeeze and excitation",
        LIBRARY,
        VERSIONS,
        (
            "60818b174816158b",  # SEModule
            "876bbab5f975d278",  # SqueezeExcite of the EfficientNets
            "e6bba060e3338927",  # EffectiveSEModule
        ),
        (Rewrite("XS * self.ACT(GATE)", "self.ACT(GATE, XS)"),),
        activation="sigmoid",
    ),
    Form(
        "efficient channel attention",
        LIBRARY,
        VERSIONS,
        (
            "1f697d39e9d3136a",  # EcaModule
            "e758bbefba054fda",  # CecaModule
        ),
        (
            Rewrite(
                "YS = self.ACT(GATE).view(BATCH, -1, 1, 1)\nreturn XS * YS.expand_as(XS)",
                "return self.ACT(GATE.view(BATCH, -1, 1, 1), XS)",
            ),
        ),
        activation="sigmoid",
    ),
)
