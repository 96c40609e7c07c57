"""Two small networks for images of digits, 8 × 8, whose gates the caller gives: a transformer and convolutions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torch_sigmoid

SIDE = 8


class Gates(NamedTuple):
    swiglu_packed: Callable[[Tensor], Tensor]
    sigmoid_gate: Callable[[Tensor, Tensor], Tensor]


def torch_swiglu_packed(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, -1)
    return nn.functional.silu(gate) * up


TORCH = Gates(torch_swiglu_packed, lambda input, gate: input * torch.sigmoid(gate))
OURS = Gates(torch_sigmoid.swiglu_packed, torch_sigmoid.sigmoid_gate)


class Block(nn.Module):
    """Self-attention, where each token gates the output of each head by a σ of its own, then a SwiGLU layer; both residual."""

    def __init__(self, gates: Gates, width: int, heads: int):
        super().__init__()
        self.gates = gates
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, heads)
        self.out = nn.Linear(width, width)
        self.gate_and_up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = self.project(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        # (B, T, heads, D) against (B, T, heads, 1)
        attended = self.gates.sigmoid_gate(attended, self.gate(normed)[..., None])
        x = x + self.out(attended.flatten(2))
        return x + self.down(self.gates.swiglu_packed(self.gate_and_up(self.feed_norm(x))))


class Transformer(nn.Module):
    """A transformer over an image's rows."""

    def __init__(self, gates: Gates, classes: int, width: int = 32, heads: int = 4, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.position = nn.Parameter(0.1 * torch.randn(SIDE, width))
        self.blocks = nn.Sequential(*(Block(gates, width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.unflatten(1, (SIDE, SIDE))) + self.position).mean(1))


class SqueezeExcitation(nn.Module):
    """Gates each channel by a σ that a small network computes from the means of all channels."""

    def __init__(self, gates: Gates, channels: int, squeezed: int):
        super().__init__()
        self.gates = gates
        self.excite = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels))

    def forward(self, x: Tensor) -> Tensor:
        # (N, C, H, W) against (N, C, 1, 1)
        return self.gates.sigmoid_gate(x, self.excite(x.mean((2, 3)))[..., None, None])


def squeeze_excitation_network(gates: Gates, classes: int, channels: int = 24) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, SIDE, SIDE))]
    for inside in (1, channels):
        layers += [nn.Conv2d(inside, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers.append(SqueezeExcitation(gates, channels, channels // 4))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes))


NETWORKS = {
    "transformer, SwiGLU and gated attention": Transformer,
    "convolutions, squeeze-and-excitation": squeeze_excitation_network,
}
