"""Small, random models of the libraries that people train with, each with a loss and what must become ours in it.

Nothing is downloaded. A loss draws its batch from torch's default generator, so that the same seed gives the same batch.
The file is long because it holds 36 models.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module], Tensor]

# The packages, as they are imported, that the models need.
LIBRARIES = ("transformers", "timm", "torchvision", "diffusers", "open_clip")

# Language models have two layers of width 64, and batches of this shape.
VOCABULARY, TOKENS = 200, (4, 32)
CLASSES = 10
# AdamW's rate for deep random convolutions: at 1e-3, one rounding of their parameters moves later losses by percents.
CONVOLUTIONAL = 1e-5


class Case(NamedTuple):
    """A model; `becomes` names the operators that `replace` must make of its modules, and is empty where there is nothing.

    `saves` is the least share of the bytes kept for backward that must be saved, and `rate` AdamW's learning rate.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    loss: Loss
    becomes: tuple[str, ...]
    saves: float = 0.0
    rate: float = 1e-3


def cases() -> Iterator[Case]:
    """All models, none of which is built yet."""
    for of_library in (transformers_cases, timm_cases, torchvision_cases, diffusers_cases, open_clip_cases, by_hand_cases):
        yield from of_library()


def images(number: int = 4, size: int = 32) -> Tensor:
    return torch.randn(number, 3, size, size)


def tokens(shape: tuple[int, ...] = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def of_tokens(model: nn.Module) -> Tensor:
    ids = tokens()
    return model(input_ids=ids, labels=ids).loss


def of_classes(size: int = 64) -> Loss:
    """Cross entropy of a classifier of images."""

    def loss(model):
        output = model(images(size=size))
        return F.cross_entropy(getattr(output, "logits", output), torch.randint(CLASSES, (4,)))

    return loss


# transformers


LANGUAGE_MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS_OF_16 = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
LATENT_ATTENTION = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# By the prefix of the classes' names: how the configuration differs from LANGUAGE_MODEL, what becomes ours, and what it saves.
LANGUAGE_MODELS = {
    "Llama": ({}, ("swiglu",), 0.10),
    "Mistral": ({}, ("swiglu",), 0.0),
    "Qwen2": ({}, ("swiglu",), 0.0),
    "Qwen3": (HEADS_OF_16, ("swiglu",), 0.0),
    "Phi3": ({}, ("swiglu",), 0.0),
    "Mixtral": (LOCAL_EXPERTS, ("swiglu",), 0.0),
    "Qwen3Moe": (HEADS_OF_16 | EXPERTS | {"num_experts": 4}, ("swiglu",), 0.0),
    "DeepseekV3": (
        EXPERTS | LATENT_ATTENTION | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        ("swiglu",),
        0.0,
    ),
    "GptOss": (HEADS_OF_16 | LOCAL_EXPERTS, ("swiglu_packed",), 0.30),
    "Qwen3Next": (
        HEADS_OF_16
        | EXPERTS
        | LINEAR_ATTENTION
        | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
        ("swiglu", "sigmoid_gate"),
        0.0,
    ),
    "Llama4": (HEADS_OF_16 | LOCAL_EXPERTS | {"intermediate_size_mlp": 256}, ("swiglu",), 0.0),
    "Mamba": ({}, ("silu",), 0.0),
    "Mamba2": ({"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16}, ("silu",), 0.0),
    "Gemma2": (HEADS_OF_16, (), 0.0),
}
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = ENCODER | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "projection_size": 32}
VISION = ENCODER | {"image_size": 32, "patch_size": 8}
DETECTOR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 10,
    "num_labels": CLASSES,
}
PYRAMID = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}


# So many that the matrix of all pairs counts beside the features.
PAIRS = 64


def of_pairs(model: nn.Module) -> Tensor:
    """The contrastive loss of images and texts."""
    return model(input_ids=tokens((PAIRS, 16)), pixel_values=images(PAIRS), return_loss=True).loss


def of_patches(model: nn.Module) -> Tensor:
    """The same, of images that come as 16 patches of 8 × 8 pixels."""
    patches, shapes = torch.randn(PAIRS, 16, 3 * 8 * 8), torch.tensor([[4, 4]] * PAIRS)
    mask = torch.ones(PAIRS, 16, dtype=torch.int64)
    inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return model(input_ids=tokens((PAIRS, 16)), **inputs, return_loss=True).loss


def of_relative_boxes(model: nn.Module) -> Tensor:
    """A detector's loss, with one box in each image."""
    labels = [{"class_labels": torch.randint(CLASSES, (1,)), "boxes": 0.2 + 0.3 * torch.rand(1, 4)} for _ in range(2)]
    return model(pixel_values=images(2, 64), labels=labels).loss


def transformers_cases() -> Iterator[Case]:
    import transformers

    def language_model(prefix, changes):
        config = getattr(transformers, f"{prefix}TextConfig" if prefix == "Llama4" else f"{prefix}Config")
        return lambda: getattr(transformers, f"{prefix}ForCausalLM")(config(**LANGUAGE_MODEL | changes))

    def two_towers(prefix, vision):
        config = getattr(transformers, f"{prefix}Config")
        return lambda: getattr(transformers, f"{prefix}Model")(config(text_config=TEXT, vision_config=vision))

    def dinov2():
        config = transformers.Dinov2Config(**VISION, use_swiglu_ffn=True, num_labels=CLASSES)
        return transformers.Dinov2ForImageClassification(config)

    def deformable_detr():
        backbone = transformers.ResNetConfig(**PYRAMID, out_features=["stage2", "stage3", "stage4"])
        config = transformers.DeformableDetrConfig(**DETECTOR, backbone_config=backbone)
        return transformers.DeformableDetrForObjectDetection(config)

    def rt_detr():
        backbone = transformers.RTDetrResNetConfig(**PYRAMID, out_features=["stage2", "stage3", "stage4"])
        channels = {"encoder_in_channels": [16, 16, 32], "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32]}
        sizes = {"num_denoising": 4, "decoder_n_points": 2}
        config = transformers.RTDetrConfig(**DETECTOR | channels | sizes, backbone_config=backbone)
        return transformers.RTDetrForObjectDetection(config)

    for prefix, (changes, becomes, saves) in LANGUAGE_MODELS.items():
        yield Case("transformers", prefix, language_model(prefix, changes), of_tokens, becomes, saves)
    yield Case("transformers", "DINOv2, SwiGLU", dinov2, of_classes(32), ("swiglu",))
    yield Case("transformers", "CLIP", two_towers("CLIP", VISION), of_pairs, ("quick_gelu",))
    yield Case("transformers", "SigLIP", two_towers("Siglip", VISION), of_pairs, ("siglip_loss",))
    patches = ENCODER | {"num_patches": 16, "patch_size": 8}
    yield Case("transformers", "SigLIP2", two_towers("Siglip2", patches), of_patches, ("siglip_loss",))
    yield Case("transformers", "Deformable DETR", deformable_detr, of_relative_boxes, ("sigmoid_focal_loss",))
    yield Case("transformers", "RT-DETR", rt_detr, of_relative_boxes, ("silu",))


# timm


def timm_cases() -> Iterator[Case]:
    import timm
    from timm.layers import GluMlp, SwiGLUPacked
    from timm.models import Eva, VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": CLASSES}

    def vision_transformer(mlp, activation):
        return lambda: VisionTransformer(**sizes, mlp_layer=mlp, act_layer=activation)

    def eva02():
        return Eva(**sizes, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True)

    def named(name):
        return lambda: timm.create_model(name, num_classes=CLASSES)

    yield Case("timm", "SE-ResNet", named("seresnet18"), of_classes(), ("sigmoid_gate",), rate=CONVOLUTIONAL)
    yield Case("timm", "EfficientNet", named("efficientnet_b0"), of_classes(), ("silu", "sigmoid_gate"), rate=CONVOLUTIONAL)
    yield Case("timm", "ECA-ResNet", named("ecaresnet26t"), of_classes(), ("sigmoid_gate",), rate=CONVOLUTIONAL)
    yield Case("timm", "RegNetY", named("regnety_002"), of_classes(), ("sigmoid_gate",), rate=CONVOLUTIONAL)
    yield Case("timm", "EVA-02, SwiGLU", eva02, of_classes(32), ("swiglu",))
    yield Case("timm", "ViT, SwiGLUPacked", vision_transformer(SwiGLUPacked, nn.SiLU), of_classes(32), ("swiglu",))
    yield Case("timm", "ViT, GluMlp", vision_transformer(GluMlp, nn.Sigmoid), of_classes(32), ("sigmoid_gate",))


# torchvision


def of_boxes(model: nn.Module) -> Tensor:
    """The sum of a detector's losses, with one box in each image."""
    targets = [
        {"boxes": torch.cat([corner := 30 * torch.rand(1, 2), corner + 30], 1), "labels": torch.randint(1, CLASSES, (1,))}
        for _ in range(2)
    ]
    return sum(model([*images(2, 64)], targets).values())


class Pyramid(nn.Module):
    """A backbone of a detector, with two levels: of 4 × 4 and 2 × 2 positions for an image of 64 × 64 pixels.

    A random ResNet amplifies the rounding of torchvision's focal loss, whose 1 - p_t loses digits: gradients of logits near
    -4.6, where training begins, are wrong by 9e-6 on average, and ours by 9e-8.
    """

    out_channels = 64

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 8, stride=8), nn.GELU())
        self.first, self.second = (nn.Conv2d(64, 64, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, x):
        first = self.first(self.stem(x))
        return {"first": first, "second": self.second(F.gelu(first))}


def torchvision_cases() -> Iterator[Case]:
    from torchvision import models
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    def detector(kind, aspect_ratios):
        def build():
            anchors = AnchorGenerator(((16,), (32,)), (aspect_ratios,) * 2)
            return kind(Pyramid(), num_classes=CLASSES, min_size=64, max_size=64, anchor_generator=anchors)

        return build

    def efficientnet():
        return models.efficientnet_b0(num_classes=CLASSES)

    yield Case("torchvision", "EfficientNet", efficientnet, of_classes(), ("silu", "sigmoid_gate"), rate=CONVOLUTIONAL)
    yield Case("torchvision", "RetinaNet", detector(RetinaNet, (0.5, 1.0, 2.0)), of_boxes, ("sigmoid_focal_loss",))
    yield Case("torchvision", "FCOS", detector(FCOS, (1.0,)), of_boxes, ("sigmoid_focal_loss",))


# diffusers


def of_noise(model: nn.Module) -> Tensor:
    """The squared error of the noise that is predicted."""
    noise = torch.randn(2, 3, 16, 16)
    return F.mse_loss(model(noise, torch.randint(1000, (2,))).sample, torch.randn_like(noise))


def of_sequences(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randn(4, 32, 64)), torch.randn(4, 32, 64))


def of_latents(model: nn.Module) -> Tensor:
    """The squared error of a flow, of latents of 4 × 4 positions beside 8 positions of a text."""
    latents, text = torch.randn(2, 16, 16), torch.randn(2, 8, 32)
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4), torch.arange(1))
    text_positions = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(8))
    flow = model(
        hidden_states=latents,
        encoder_hidden_states=text,
        timestep=torch.rand(2),
        img_ids=positions.float(),
        txt_ids=text_positions.float(),
        guidance=torch.ones(2),
    ).sample
    return F.mse_loss(flow, torch.randn_like(flow))


def diffusers_cases() -> Iterator[Case]:
    import diffusers
    from diffusers.models.attention import BasicTransformerBlock

    def unet():
        return diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
        )

    def block():
        return BasicTransformerBlock(64, num_attention_heads=4, attention_head_dim=16, activation_fn="swiglu")

    def flux2():
        return diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )

    yield Case("diffusers", "UNet2D", unet, of_noise, ("silu",))
    yield Case("diffusers", "transformer block, SwiGLU", block, of_sequences, ("swiglu",))
    yield Case("diffusers", "Flux.2", flux2, of_latents, ("swiglu",))


# open_clip


class TwoTowers(nn.Module):
    """Two linear towers, and the scale and bias that SigLIP's loss learns."""

    def __init__(self, loss):
        super().__init__()
        self.image, self.text = nn.Linear(64, 32), nn.Linear(64, 32)
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0).log()), nn.Parameter(torch.tensor(-10.0))
        self.loss = loss

    def forward(self, images, texts):
        features = (F.normalize(tower(each), dim=1) for tower, each in ((self.image, images), (self.text, texts)))
        return self.loss(*features, self.scale.exp(), self.bias)


def open_clip_cases() -> Iterator[Case]:
    import open_clip

    def clip():
        vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
        text = {"context_length": 16, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
        return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=True)

    def of_clip(model):
        return open_clip.ClipLoss()(*model(images(), tokens((4, 16))))

    def of_features(model):
        return model(torch.randn(32, 64), torch.randn(32, 64))

    yield Case("open_clip", "CLIP, QuickGELU", clip, of_clip, ("quick_gelu",))
    yield Case("open_clip", "SigLipLoss", lambda: TwoTowers(open_clip.loss.SigLipLoss()), of_features, ("siglip_loss",))


# Written by hand


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, width, hidden, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.feed_forward = FeedForward(width, hidden)

    def attention(self, x):
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-2, 1)
        mixed = F.scaled_dot_product_attention(*heads.unbind(-2), is_causal=True)
        return self.output(mixed.movedim(1, -2).flatten(-2))

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class LlamaByHand(nn.Sequential):
    """A decoder as people write it themselves, with learned positions."""

    def __init__(self, width=64, hidden=256, layers=2, heads=4):
        super().__init__(
            nn.Embedding(VOCABULARY, width),
            *(Layer(width, hidden, heads) for _ in range(layers)),
            nn.RMSNorm(width),
            nn.Linear(width, VOCABULARY, bias=False),
        )


def of_next_token(model: nn.Module) -> Tensor:
    ids = tokens()
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def by_hand_cases() -> Iterator[Case]:
    yield Case("by hand", "Llama", LlamaByHand, of_next_token, ("swiglu",))
