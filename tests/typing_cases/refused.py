"""What `mypy --strict` finds wrong, each line with the code of its error. Read by tests/test_types.py, not run."""

import torch

import torch_sigmoid
from torch_sigmoid.diagnostics import GradientWatch


class Model(torch.nn.Module):
    depth: int = 2


model, x = Model(), torch.zeros(4, 8)

torch_sigmoid.sigmoid(x, save="inptu")  # arg-type
torch_sigmoid.sigmoid([1.0])  # arg-type
torch_sigmoid.Sigmoid(save="x")  # arg-type
torch_sigmoid.path(x, save="x")  # arg-type
assert torch_sigmoid.path(x).name == "tritno"  # comparison-overlap
torch_sigmoid.replace(model, save="x")  # arg-type
torch_sigmoid.intercept(save="x")  # arg-type
torch_sigmoid.SigmoidFunction.apply(x, "x")  # arg-type
torch_sigmoid.binary_cross_entropy_with_logits(x, x, reduction="avg")  # arg-type
torch_sigmoid.sigmoid_focal_loss(x, x, reduction="avg")  # arg-type
torch_sigmoid.BCEWithLogitsLoss(reduction="avg")  # arg-type
torch_sigmoid.SigmoidFocalLoss(reduction="avg")  # arg-type
torch_sigmoid.swiglu(x, x, alpha="1")  # arg-type
torch_sigmoid.swiglu(x, x, 1.702)  # call-arg
torch_sigmoid.torch_below(1.5)  # arg-type
torch_sigmoid.siglip_loss(x, x, 10.0, chunk_size=0.5)  # arg-type
torch_sigmoid.siglip_loss(x, x, 10.0, image_ids=[0, 1], text_ids=x)  # arg-type
torch_sigmoid.Sigmoid()(x, x)  # call-arg
torch_sigmoid.SwiGLU()(x)  # call-arg
torch_sigmoid.SwiGLUPacked()(x, x)  # call-arg
torch_sigmoid.BCEWithLogitsLoss()(x)  # call-arg
torch_sigmoid.replace(x)  # type-var
torch_sigmoid.restore(model).depth + "1"  # operator
torch_sigmoid.debug()(1)  # type-var
torch_sigmoid.layers.InstalledLayerRepository(1)  # arg-type
print(torch_sigmoid.kernals)  # attr-defined
GradientWatch(model, evry=2)  # call-arg
GradientWatch(model).attach().reprot()  # attr-defined
