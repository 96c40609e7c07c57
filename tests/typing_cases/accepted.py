"""What users write, and the types they get: `mypy --strict` has nothing to say. Read by tests/test_types.py, not run."""

import io
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

import torch_sigmoid
from torch_sigmoid import Path, debug, intercept
from torch_sigmoid.diagnostics import GradientWatch


class Model(torch.nn.Module):
    def __init__(self, save: Literal["output", "input"] = "output") -> None:
        super().__init__()
        self.depth = 2
        self.gate = torch_sigmoid.Sigmoid(save=save)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


model, x = Model(), torch.zeros(4, 8)

# The functions.
assert_type(torch_sigmoid.sigmoid(x), Tensor)
assert_type(torch_sigmoid.sigmoid(x, save="input", out=None), Tensor)
assert_type(torch_sigmoid.sigmoid_(x), Tensor)
assert_type(torch_sigmoid.functional.silu(x, inplace=True), Tensor)
assert_type(torch_sigmoid.logsigmoid(x), Tensor)
assert_type(torch_sigmoid.glu(x, dim=0), Tensor)
assert_type(torch_sigmoid.sigmoid_gate(x, gate=x), Tensor)
assert_type(torch_sigmoid.swiglu(x, x, alpha=1.702, limit=7, up_offset=1), Tensor)
assert_type(torch_sigmoid.swiglu_packed(x, -1, limit=None), Tensor)
assert_type(torch_sigmoid.swiglu_packed(x, interleaved=True, limit=7.0), Tensor)
assert_type(torch_sigmoid.binary_cross_entropy_with_logits(x, x, reduction="sum", ignore_index=-1), Tensor)
assert_type(torch_sigmoid.sigmoid_focal_loss(x, x, 0.25, 2, "mean"), Tensor)
assert_type(torch_sigmoid.siglip_loss(x, x, 10.0, torch.zeros(()), group="world"), Tensor)
assert_type(torch_sigmoid.siglip_loss(x, x, 10.0, image_ids=x, text_ids=x, chunk_size=None), Tensor)
assert_type(torch_sigmoid.SigmoidFunction.apply(x, "input"), Tensor)
assert_type(torch_sigmoid.path(x, save="input"), Path)
assert_type(torch_sigmoid.path(x).name, Literal["triton", "traced", "torch"])
assert_type(torch_sigmoid.torch_below(0), int)
torch_sigmoid.warmup("cuda", [torch.bfloat16], ["gates", model])

# The layers, called.
assert_type(torch_sigmoid.Sigmoid(save="input")(x), Tensor)
assert_type(torch_sigmoid.nn.LogSigmoid()(x), Tensor)
assert_type(torch_sigmoid.SiLU(inplace=True)(x), Tensor)
assert_type(torch_sigmoid.GLU(0)(x), Tensor)
assert_type(torch_sigmoid.SigmoidGate()(x, x), Tensor)
assert_type(torch_sigmoid.SwiGLU(limit=7.0)(x, x), Tensor)
assert_type(torch_sigmoid.SwiGLUPacked(-1)(x), Tensor)
assert_type(torch_sigmoid.SwiGLUPacked(interleaved=True)(x), Tensor)
assert_type(torch_sigmoid.BCEWithLogitsLoss(pos_weight=x, reduction="none")(x, x), Tensor)
assert_type(torch_sigmoid.SigmoidFocalLoss(gamma=1.5, reduction="sum")(x, x), Tensor)
assert_type(torch_sigmoid.siglip_loss(x, x, 10.0, group=DeviceMesh("cpu", [0])), Tensor)
assert_type(torch_sigmoid.SigLIPLoss(group=DeviceMesh("cpu", [0]))(x, x, 10.0), Tensor)
assert_type(torch_sigmoid.SigLIPLoss(chunk_size=16)(x, x, 10.0), Tensor)
assert_type(torch_sigmoid.SigLIPLoss()(x, x, 10.0, image_ids=x, text_ids=x), Tensor)

# What Hugging Face's `kernels` asks of a layer and of a repository.
repository = torch_sigmoid.layers.InstalledLayerRepository("SiLU")
assert_type(repository.load(), type[torch.nn.Module])
assert_type(torch_sigmoid.layers.SiLU.can_torch_compile, bool)
torch_sigmoid.layers.MAPPING["SiLU"]["cuda"] = repository

# What is handed through keeps its type.
assert_type(torch_sigmoid.replace(model, save="input"), Model)
assert_type(torch_sigmoid.replace(model).depth, int)
assert_type(torch_sigmoid.restore(torch.nn.Sequential(model)), torch.nn.Sequential)

# Contexts and decorators.
with intercept(save="input") as mode:
    assert_type(mode, intercept)
    assert_type(mode.save, Literal["output", "input"])


@intercept()
def activated(x: Tensor, factor: float) -> Tensor:
    return factor * x.sigmoid()


assert_type(activated(x, factor=2.0), Tensor)

with debug():
    ...


@debug()
def loss(x: Tensor, factor: float) -> Tensor:
    return factor * torch_sigmoid.binary_cross_entropy_with_logits(x, x)


assert_type(loss(x, factor=2.0), Tensor)


def reached_after(context: intercept | debug | GradientWatch) -> int:
    """No context swallows exceptions: a checker knows that the end is not reached, and asks for no other return."""
    with context:
        return 1


class MyWatch(GradientWatch): ...


with MyWatch(model, every=2, modules=(*torch_sigmoid.diagnostics.SIGMOID_LIKE, "gate")) as watch:
    assert_type(watch, MyWatch)
assert_type(watch.attach(), MyWatch)
watch.report(last=3, file=io.StringIO())
watch.plot().savefig("gradients.png")
watch.to_dict()["layers"]["gate"]["saturated"]
