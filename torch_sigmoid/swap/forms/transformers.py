"""What transformers' models look like. Each fingerprint is that of a method; the comment says whose."""

from ..trees import Rewrite
from . import Activation, Form

LIBRARY, VERSIONS = "transformers", "5.24"

# The gate is the first half of a packed tensor, which is then never taken apart.
HALVES = Rewrite(
    "GATE, UP = PACKED.chunk(2, dim=DIM)\nOUT = self.ACT(GATE) * UP",
    "OUT = self.ACT(PACKED, packed_dim=DIM)",
)
HALVES_UP_FIRST = Rewrite(
    "GATE, UP = PACKED.chunk(2, dim=DIM)\nOUT = UP * self.ACT(GATE)",
    "OUT = self.ACT(PACKED, packed_dim=DIM)",
)
RETURNED_HALVES = Rewrite(
    "GATE, UP = PACKED.chunk(2, dim=DIM)\nreturn self.ACT(GATE) * UP",
    "return self.ACT(PACKED, packed_dim=DIM)",
)
PRODUCT = Rewrite("self.ACT(GATE) * UP", "self.ACT(GATE, UP)")
PRODUCT_UP_FIRST = Rewrite("UP * self.ACT(GATE)", "self.ACT(GATE, UP)")

ACTIVATIONS = (
    Activation("silu", LIBRARY, VERSIONS, "SiLUActivation", ("aab17fb60622911e",)),
    Activation("quick_gelu", LIBRARY, VERSIONS, "QuickGELUActivation", ("751d5918205eaef4",)),
)

FORMS = (
    Form(
        "gated MLP",
        LIBRARY,
        VERSIONS,
        (
            "6ecc5ff33ba2cb93",  # Llama, Mistral, Qwen2, Qwen3, DeepseekV3, Dinov2SwiGLUFFN and 130 others
            "e41dd5dd0af54ded",  # Qwen2_5_VL, Glm4Vision and 7 others
            "6c8f5a1521bdb13d",  # Glm4vVisionPatchMerger and 2 others
            "041b0febb2240b0d",  # T5Gemma, Gte
            "acac2df89b8abb1f",  # Llama4
            "628e661cf5d770e3",  # SeedOss
            "8d85aa6a70d8d989",  # BitNet
            "d2e4b823b1957a35",  # Glm5Next
            "18aecb0212642ead",  # Cohere2VisionMultiModalProjector
            "bd8f1a50277c5263",  # AyaVisionMultiModalProjector
        ),
        (PRODUCT,),
        activation="silu",
    ),
    Form(
        "gated MLP, packed",
        LIBRARY,
        VERSIONS,
        (
            "a4a8007aee504c5c",  # Phi3, Glm, Glm4vText, Dia and 6 others
            "cdc85b16728a872d",  # Moonshine
            "dc478785ca4d640f",  # GraniteMoeShared, GraniteMoeHybrid
            "e914277ab44f755c",  # Moshi, KyutaiSpeechToText
            "48b96c66bdc709ad",  # Zamba2
        ),
        (HALVES_UP_FIRST, HALVES, PRODUCT, PRODUCT_UP_FIRST),
        activation="silu",
    ),
    Form(
        "experts",
        LIBRARY,
        VERSIONS,
        (
            "acc6f4705cbbe2b7",  # Mixtral, Qwen3Moe, DeepseekV3 and 52 others
            "c2d94b1920a48b32",  # Aria
            "3a8b0f9d28749bb9",  # LongcatFlash
            "8803a0280935964a",  # MuseSpark
            "0e6e9cb8c99f76d3",  # JetMoe
            "ef06b04c769e4803",  # Llama4
        ),
        (HALVES, HALVES_UP_FIRST, PRODUCT, PRODUCT_UP_FIRST),
        activation="silu",
    ),
    Form(
        "experts",
        LIBRARY,
        VERSIONS,
        ("709959ba3cf07ca5",),  # what transformers gives to the experts above
        (RETURNED_HALVES,),
        method="_apply_gate",
        activation="silu",
    ),
    Form(
        "experts, interleaved and clamped",
        LIBRARY,
        VERSIONS,
        ("38e4a9cd68e58ee2",),  # GptOss
        (
            Rewrite(
                "GATE, UP = PACKED[..., ::2], PACKED[..., 1::2]\n"
                "GATE = GATE.clamp(min=None, max=LIMIT)\n"
                "UP = UP.clamp(min=-LIMIT, max=LIMIT)\n"
                "GLU = GATE * sigmoid(GATE * ALPHA)\n"
                "OUT = (UP + 1) * GLU\n"
                "return OUT",
                "return self.FUSED(PACKED, interleaved=True, alpha=ALPHA, limit=LIMIT, up_offset=1.0)",
            ),
        ),
        method="_apply_gate",
        fused="swiglu_packed",
    ),
    Form(
        "gated MLP, without a module for silu",
        LIBRARY,
        VERSIONS,
        ("d642e023e4bea4b6",),  # Lfm2
        (Rewrite("silu(GATE) * UP", "self.FUSED(GATE, UP)"),),
        fused="swiglu",
    ),
    Form(
        "gated attention",
        LIBRARY,
        VERSIONS,
        (
            "4b2129d03ba1d97c",  # Qwen3Next, Qwen3_5, Qwen3_5Moe
            "a2c55298f8f5f4ff",  # HYV4
            "72619a1637829141",  # Afmoe
        ),
        (Rewrite("OUT * sigmoid(GATE)", "self.FUSED(OUT, GATE)"),),
        fused="sigmoid_gate",
    ),
    Form(
        "shared expert",
        LIBRARY,
        VERSIONS,
        ("2302b934f4fdf0d4",),  # Qwen2Moe, Qwen3Next, Qwen3_5Moe
        (Rewrite("sigmoid(GATE) * OUT", "self.FUSED(OUT, GATE)"),),
        fused="sigmoid_gate",
    ),
    Form(
        "SigLIP's loss",
        LIBRARY,
        VERSIONS,
        (
            "e3e69b4988ee6ac8",  # Siglip
            "43ddc64646a290d6",  # Siglip2
        ),
        (
            # The logits are returned as well, but nothing is kept of them.
            Rewrite(
                "LOGITS = torch.matmul(TEXT, IMAGE.t().to(TEXT.device))\n"
                "SCALE, BIAS = self.logit_scale.to(TEXT.device), self.logit_bias.to(TEXT.device)\n"
                "LOGITS = LOGITS * SCALE.exp() + BIAS\n"
                "TRANSPOSED = LOGITS.t()\n"
                "LOSS = None\n"
                "if WANTED:\n"
                "    EYE = torch.eye(LOGITS.size(0), device=LOGITS.device)\n"
                "    SIGNS = -torch.ones_like(LOGITS) + 2 * EYE\n"
                "    TERMS = logsigmoid(SIGNS * LOGITS)\n"
                "    SUMS = -torch.sum(TERMS, dim=-1)\n"
                "    LOSS = SUMS.mean()",
                "LOGITS = torch.matmul(TEXT, IMAGE.t().to(TEXT.device))\n"
                "SCALE, BIAS = self.logit_scale.to(TEXT.device), self.logit_bias.to(TEXT.device)\n"
                "LOGITS = LOGITS * SCALE.exp() + BIAS\n"
                "TRANSPOSED = LOGITS.t()\n"
                "LOSS = self.FUSED(IMAGE.to(TEXT.device), TEXT, SCALE.exp(), BIAS) if WANTED else None",
            ),
        ),
        fused="siglip_loss",
    ),
)
