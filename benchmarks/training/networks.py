"""Two small networks for images of digits, 8 × 8, whose gates the caller gives: a transformer and convolutions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torch_sigmoid

SIDE = 8


class Gates(NamedTuple):
    """Makes what gates a network: silu(gate)·up of a tensor in which gate and up alternate, and x·σ(gate)."""

    swiglu_packed: Callable[[], nn.Module]
    sigmoid_gate: Callable[[], nn.Module]


class TorchSwiGLUPacked(nn.Module):
    def forward(self, packed: Tensor) -> Tensor:
        return nn.functional.silu(packed[..., ::2]) * packed[..., 1::2]


class TorchSigmoidGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return input * self.sigmoid(gate)


TORCH = Gates(TorchSwiGLUPacked, TorchSigmoidGate)
OURS = Gates(functools.partial(torch_sigmoid.SwiGLUPacked, interleaved=True), torch_sigmoid.SigmoidGate)


class PackedMLP(nn.Module):
    """SwiGLU. Each shard of the rows of `gate_and_up` holds whole pairs, because gate and up alternate."""

    def __init__(self, gates: Gates, width: int):
        super().__init__()
        self.gate_and_up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.swiglu_packed = gates.swiglu_packed()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.swiglu_packed(self.gate_and_up(x)))


class LlamaMLP(nn.Module):
    """SwiGLU as people write it: a form that `torch_sigmoid.replace` knows."""

    def __init__(self, gates: Gates, width: int):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Self-attention, where each token gates the output of each head by a σ of its own, then a SwiGLU layer; both residual.

    A head's query, key and value are neighbours among the rows of `project`, so that each shard of them holds whole heads.
    """

    def __init__(self, gates: Gates, width: int, heads: int, mlp: Callable[[Gates, int], nn.Module]):
        super().__init__()
        self.head_width = width // heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.gate, self.sigmoid_gate = nn.Linear(width, heads), gates.sigmoid_gate()
        self.out = nn.Linear(width, width)
        self.mlp = mlp(gates, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = self.project(normed).unflatten(-1, (-1, 3, self.head_width)).permute(3, 0, 2, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        # (B, T, heads, D) against (B, T, heads, 1)
        attended = self.sigmoid_gate(attended, self.gate(normed)[..., None])
        x = x + self.out(attended.flatten(2))
        return x + self.mlp(self.feed_norm(x))


class Transformer(nn.Module):
    """A transformer over an image's rows."""

    def __init__(self, gates: Gates, classes: int, width: int = 32, heads: int = 4, depth: int = 2, mlp=PackedMLP):
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.position = nn.Parameter(0.1 * torch.randn(SIDE, width))
        self.blocks = nn.Sequential(*(Block(gates, width, heads, mlp) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.unflatten(1, (SIDE, SIDE))) + self.position).mean(1))


class SqueezeExcitation(nn.Module):
    """Gates each channel by a σ that a small network computes from the means of all channels."""

    def __init__(self, gates: Gates, channels: int, squeezed: int):
        super().__init__()
        self.sigmoid_gate = gates.sigmoid_gate()
        self.excite = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels))

    def forward(self, x: Tensor) -> Tensor:
        # (N, C, H, W) against (N, C, 1, 1)
        return self.sigmoid_gate(x, self.excite(x.mean((2, 3)))[..., None, None])


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
