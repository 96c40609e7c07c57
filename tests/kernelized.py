"""What Hugging Face's `kernels` does with our layers: cases that tests/test_hub.py runs in a process of its own.

At the root of a checkout, kernels/ hides that package, so this must not run there. It prints a JSON object: for each case null
if it passes, its traceback if it fails, and a list with the reason if it cannot run.
"""

import copy
import json
import sys
import traceback

import torch
from torch import nn

import torch_sigmoid
from torch_sigmoid import layers

IMPORTED = "kernels" in sys.modules

from kernels import (
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@use_kernel_forward_from_hub("Sigmoid")
class Sigmoid(nn.Module):
    def forward(self, x):
        return 1 / (1 + torch.exp(-x))


@use_kernel_forward_from_hub("SiLU")
class SiLU(nn.Module):
    def forward(self, x):
        return x / (1 + torch.exp(-x))


@use_kernel_forward_from_hub("QuickGELU")
class QuickGELU(nn.Module):
    def forward(self, x):
        return x / (1 + torch.exp(-1.702 * x))


@use_kernel_forward_from_hub("SiluAndMul")
class SiluAndMul(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        return a / (1 + torch.exp(-a)) * b


@use_kernel_forward_from_hub("SwiGLUMLP")
class MLP(nn.Module):
    def __init__(self, act_fn=None):
        super().__init__()
        self.gate_proj = nn.Linear(8, 12, bias=False)
        self.up_proj = nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)
        self.act_fn = act_fn or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


MODELS = {"Sigmoid": Sigmoid, "SiLU": SiLU, "QuickGELU": QuickGELU, "SiluAndMul": SiluAndMul, "SwiGLUMLP": MLP}


def kernelized(model, mode, **options):
    with use_kernel_mapping(layers.MAPPING):
        return kernelize(copy.deepcopy(model), mode=mode, device=DEVICE, **options)


def gradients(model, x):
    """The output, and the gradients of the input and the parameters from a random upstream gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)).to(y.device)
    return y, *torch.autograd.grad(y, [x, *model.parameters()], upstream)


def some_input(dtype=torch.float64):
    return torch.randn(5, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]().to(DEVICE, torch.float64)


def case_each_layer_of_the_mapping_trains_with_our_forward():
    assert layers.MAPPING.keys() == MODELS.keys()
    for name in MODELS:
        model = model_of(name)
        ours = kernelized(model, Mode.TRAINING, use_fallback=False)
        assert ours.forward.__func__ is getattr(layers, name).forward
        torch.testing.assert_close(gradients(ours, some_input()), gradients(model, some_input()))


def case_each_layer_of_the_mapping_serves_inference():
    for name in MODELS:
        model = model_of(name).eval()
        ours = kernelized(model, Mode.INFERENCE, use_fallback=False)
        assert ours.forward.__func__ is getattr(layers, name).forward
        with torch.inference_mode():
            torch.testing.assert_close(ours(some_input()), model(some_input()))


def case_each_layer_of_the_mapping_compiles_without_a_graph_break():
    for name in MODELS:
        model = model_of(name)
        # Without fallback, kernelize refuses a layer that does not declare can_torch_compile.
        ours = kernelized(model, Mode.TRAINING | Mode.TORCH_COMPILE, use_fallback=False)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(compiled, some_input()), gradients(model, some_input()))


def case_a_silu_at_minus_infinity_is_0_and_so_is_its_gradient():
    """Torch, and the formula of the model's own layer, give NaN."""
    x = torch.tensor([-torch.inf], dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    y = kernelized(SiLU(), Mode.TRAINING)(x)
    assert torch.isnan(SiLU()(x))
    assert y.item() == torch.autograd.grad(y, x)[0].item() == 0


def case_the_gated_mlp_keeps_two_tensors_beside_those_of_its_linear_layers():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.data_ptr(), t.numel())) or t, lambda t: t):
            model(some_input().requires_grad_())
        return sum(n for _, n in {*sizes} if n == 5 * 12)

    model = model_of("SwiGLUMLP")
    # Both keep gate, up and their product, which down_proj reads; the original keeps silu(gate) too.
    assert kept(kernelized(model, Mode.TRAINING)) == kept(model) - 5 * 12 == 3 * 5 * 12


def case_every_spelling_of_silu_is_accepted():
    for act_fn in (nn.SiLU(), torch_sigmoid.SiLU(), nn.functional.silu, torch_sigmoid.silu, SiLU()):
        model = MLP(act_fn).to(DEVICE, torch.float64)
        torch.testing.assert_close(gradients(kernelized(model, Mode.TRAINING), some_input()), gradients(model, some_input()))


def case_another_activation_is_refused_by_name():
    class Doubled(nn.SiLU):
        def forward(self, x):
            return 2 * super().forward(x)

    for act_fn, name in ((nn.GELU(), "GELU"), (Doubled(), "Doubled"), (nn.functional.gelu, "gelu"), (QuickGELU(), "QuickGELU")):
        model = kernelized(MLP(act_fn), Mode.TRAINING)
        calls = []
        model.gate_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        message = error_of(ValueError, lambda model=model: model(some_input(torch.float32)))
        assert message == f"SwiGLUMLP needs a SiLU as act_fn, got {name} in a MLP", message
        assert not calls


def case_a_layer_that_lacks_something_is_refused_by_what_it_lacks():
    @use_kernel_forward_from_hub("SwiGLUMLP")
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.down_proj(self.up_proj(x).relu())

    message = error_of(TypeError, lambda: kernelized(Other(), Mode.TRAINING)(some_input(torch.float32)))
    assert message.endswith("got a Other without gate_proj and act_fn"), message


def error_of(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def case_a_layer_that_writes_over_its_input_still_does():
    class InPlace(nn.SiLU): ...

    replace_kernel_forward_from_hub(InPlace, "SiLU")
    x = some_input()
    y = kernelized(InPlace(inplace=True), Mode.INFERENCE, use_fallback=False)(x)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, nn.functional.silu(some_input()))


def case_our_mapping_replaces_one_that_is_there_and_gives_way_after():
    other = {"SiLU": {DEVICE: layers.InstalledLayerRepository("Sigmoid")}}
    with use_kernel_mapping(other):
        ours = kernelized(SiLU(), Mode.INFERENCE)
        theirs = kernelize(SiLU(), mode=Mode.INFERENCE, device=DEVICE)
    assert ours.forward.__func__ is layers.SiLU.forward
    assert theirs.forward.__func__ is layers.Sigmoid.forward
    assert kernelize(ours, mode=Mode.INFERENCE, device=DEVICE).forward.__func__ is SiLU.forward


def case_importing_torch_sigmoid_does_not_import_kernels():
    assert not IMPORTED


def case_a_llama_of_transformers_trains_with_our_forward():
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.activations import SiLUActivation
        from transformers.models.llama.modeling_llama import LlamaMLP
    except ImportError as error:
        return [str(error)]
    replace_kernel_forward_from_hub(LlamaMLP, "SwiGLUMLP")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(DEVICE, torch.float64).train()
    tokens = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def trained(model):
        loss = model(input_ids=tokens, labels=tokens).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    def forwards(model, kind):
        return [module.forward.__func__ for module in model.modules() if type(module) is kind]

    expected = trained(model)
    ours = kernelized(model, Mode.TRAINING)
    assert forwards(ours, LlamaMLP) == [layers.SwiGLUMLP.forward] * 2
    torch.testing.assert_close(trained(ours), expected)

    # transformers itself names its activations only for the versions of `kernels` that it knows.
    replace_kernel_forward_from_hub(SiLUActivation, "SiLU")
    with use_kernel_mapping({"SiLU": layers.MAPPING["SiLU"]}):
        kernelize(model, mode=Mode.TRAINING, device=DEVICE)
    assert forwards(model, LlamaMLP) == [LlamaMLP.forward] * 2
    assert forwards(model, SiLUActivation) == [layers.SiLU.forward] * 2
    torch.testing.assert_close(trained(model), expected)

    gelu = LlamaForCausalLM(LlamaConfig(**sizes, hidden_act="gelu")).to(DEVICE)
    message = error_of(ValueError, lambda: kernelized(gelu, Mode.TRAINING)(input_ids=tokens))
    assert message == "SwiGLUMLP needs a SiLU as act_fn, got GELUActivation in a LlamaMLP", message
    return None


def outcome(case):
    try:
        return case()
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    cases = {name: case for name, case in globals().items() if name.startswith("case_")}
    print(json.dumps({name: outcome(case) for name, case in cases.items()}))
