"""The forms that are known of libraries: each on the library's own class, as it is and with one operator changed.

Libraries that are not installed are skipped; transformers is in the `test` extra.
"""

import ast
import copy
import importlib
import inspect
import linecache
import textwrap
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from torch_sigmoid import replace, restore
from torch_sigmoid.swap import Rewrite, forms, report, trees
from torch_sigmoid.swap.forms import fingerprint_of

LIBRARIES = "transformers", "timm", "torchvision", "diffusers", "open_clip"

# All that the blocks below ask of a model's configuration.
CONFIG = types.SimpleNamespace(
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), "silu"),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 8),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_intermediate_size"), 12),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("ffn_dim", "alignment_intermediate_size"), 24),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("dropout_rate", "residual_dropout", "attention_dropout"), 0.0),
    **dict.fromkeys(("rms_norm_eps", "post_norm_eps", "adapter_layer_norm_eps"), 1e-6),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "downsample_factor"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4),
    **dict.fromkeys(("add_bias_linear", "attention_bias", "block_auto_adjust_ff_dim"), False),
    **dict.fromkeys(("_attn_implementation", "_experts_implementation"), "eager"),
    **dict.fromkeys(("zero_expert_num", "num_codebooks", "num_mem_blocks"), 1),
    mlp_bias=True,
    norm_topk_prob=True,
    swiglu_limit=0.5,
    swiglu_alpha=1.702,
    learnable_sink_init=0.1,
    adapter_rank=2,
    hybrid_layer_ids=[0],
    layer_types=["sliding_attention"],
    sliding_window=8,
    indexer_types=["shared"],
    rope_parameters={},
    vision_config=types.SimpleNamespace(hidden_size=4),
    text_config=types.SimpleNamespace(hidden_size=8),
)


def of_config(block, *args, **options):
    return block(CONFIG, *args, **options)


def tokens():
    return (torch.randn(2, 5, 8),)


def patches():
    return (torch.randn(2, 16, 4),)


def images():
    return (torch.randn(2, 8, 5, 5),)


def routed():
    """Hidden states, the experts that each goes to, and their weights."""
    return torch.randn(6, 8), torch.stack([torch.randperm(4)[:2] for _ in range(6)]), torch.rand(6, 2)


def attended():
    return torch.randn(2, 5, 8), (torch.randn(2, 5, 4), torch.randn(2, 5, 4)), torch.zeros(2, 1, 5, 5)


def attended_to_all():
    """The last three: cache, positions, and the tokens that each one attends to."""
    return *attended(), None, None, torch.arange(5).expand(2, 5, 5)


def captioned():
    return torch.randint(0, 20, (3, 6)), torch.randn(3, 3, 8, 8), None, None, True


def captioned_patches():
    shapes = torch.tensor([[2, 2]] * 3)
    return torch.randint(0, 20, (3, 6)), torch.randn(3, 4, 48), torch.ones(3, 4, dtype=torch.int64), shapes, None, None, True


def pairs():
    features = (nn.functional.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    return *features, torch.tensor(2.3), torch.tensor(-1.5)


def boxes(n):
    corners = 8 * torch.rand(n, 2)
    return torch.cat([corners, corners + 4 + 8 * torch.rand(n, 2)], dim=-1)


def detected():
    """Two images; the anchors of each have an object, none (-1), or do not count (-2)."""
    targets = [{"labels": torch.tensor([0, 2]), "boxes": boxes(2)}, {"labels": torch.tensor([1]), "boxes": boxes(1)}]
    outputs = {"cls_logits": torch.randn(2, 9, 3), "bbox_regression": torch.rand(2, 9, 4), "bbox_ctrness": torch.randn(2, 9, 1)}
    matched = [torch.tensor([0, 1, -1, -2, -1, 0, 0, -1, -1]), torch.tensor([-1, 0, -1, -2, -1, -1, 0, -1, -1])]
    return targets, outputs, matched


def detected_by_anchors():
    targets, outputs, matched = detected()
    for target in targets:
        target["boxes"] = torch.tensor([2.0, 2.0, 9.0, 9.0]).expand(len(target["boxes"]), 4)
    anchors = [torch.cat([corner, corner + 6], dim=-1) for corner in 2 + 3 * torch.rand(2, 9, 2)]
    return targets, outputs, anchors, matched


def siglip(model, **vision):
    layer = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layer, "vocab_size": 20, "max_position_embeddings": 6, "projection_size": 8}
    return model(model.config_class(text_config=text, vision_config={**layer, "patch_size": 4, **vision}))


def modeling(name):
    return f"transformers.models.{name}.modeling_{name}"


def with_config(*options):
    return lambda block: block(CONFIG, *options)


def of_sizes(*sizes, **options):
    return lambda block: block(*sizes, **options)


# The class, how to make one, what it is called with; and by which method, where it is not by calling it.
BLOCKS = [
    (modeling("llama"), "LlamaMLP", of_config, tokens),
    (modeling("qwen2_5_vl"), "Qwen2_5_VLMLP", of_config, tokens),
    (modeling("glm4v"), "Glm4vVisionPatchMerger", of_sizes(8, 12, "silu"), tokens),
    (modeling("t5gemma"), "T5GemmaMLP", of_config, tokens),
    (modeling("llama4"), "Llama4TextMLP", of_config, tokens),
    (modeling("seed_oss"), "SeedOssMLP", of_config, tokens),
    (modeling("bitnet"), "BitNetMLP", of_config, tokens),
    (modeling("glm5_next"), "Glm5NextTextMLP", of_config, tokens),
    (modeling("cohere2_vision"), "Cohere2VisionMultiModalProjector", of_config, patches),
    (modeling("aya_vision"), "AyaVisionMultiModalProjector", of_config, patches),
    (modeling("phi3"), "Phi3MLP", of_config, tokens),
    (modeling("moonshine"), "MoonshineDecoderMLP", with_config("silu"), tokens),
    (modeling("granitemoeshared"), "GraniteMoeSharedMLP", of_config, tokens),
    (modeling("moshi"), "MoshiGatingMLP", of_config, tokens),
    (modeling("zamba2"), "Zamba2MLP", with_config(1, 0), lambda: (*tokens(), 0)),
    (modeling("mixtral"), "MixtralExperts", of_config, routed),
    (modeling("aria"), "AriaExperts", of_config, routed),
    (modeling("longcat_flash"), "LongcatFlashExperts", of_config, routed),
    (modeling("muse_spark"), "MuseSparkExperts", of_config, routed),
    (modeling("jetmoe"), "JetMoeMoE", of_config, tokens),
    (modeling("llama4"), "Llama4TextExperts", of_config, lambda: (torch.randn(20, 8),)),
    (modeling("gpt_oss"), "GptOssExperts", of_config, routed),
    (modeling("lfm2"), "Lfm2MLP", of_config, tokens),
    (modeling("qwen3_next"), "Qwen3NextAttention", with_config(0), attended),
    (modeling("hy_v4"), "HYV4Attention", with_config(0), attended_to_all),
    (modeling("afmoe"), "AfmoeAttention", with_config(0), attended),
    (modeling("qwen3_next"), "Qwen3NextSparseMoeBlock", of_config, tokens),
    (modeling("siglip"), "SiglipModel", lambda model: siglip(model, image_size=8), captioned),
    (modeling("siglip2"), "Siglip2Model", lambda model: siglip(model, num_patches=4), captioned_patches),
    ("timm.layers.mlp", "SwiGLU", of_sizes(8, 12), tokens),
    ("timm.layers.mlp", "GluMlp", of_sizes(8, 12), tokens),
    ("timm.layers.mlp", "GluMlp", of_sizes(8, 12, act_layer=nn.SiLU, gate_last=False), tokens),
    ("timm.layers.mlp", "GluMlp", of_sizes(8, 12, gate_last=False, use_conv=True), images),
    ("timm.layers.squeeze_excite", "SEModule", of_sizes(8, add_maxpool=True), images),
    ("timm.layers.squeeze_excite", "EffectiveSEModule", of_sizes(8, gate_layer="sigmoid"), images),
    ("timm.models._efficientnet_blocks", "SqueezeExcite", of_sizes(8), images),
    ("timm.layers.eca", "EcaModule", of_sizes(8), images),
    ("timm.layers.eca", "CecaModule", of_sizes(8), images),
    ("torchvision.ops.misc", "SqueezeExcitation", of_sizes(8, 4), images),
    ("torchvision.models.detection.retinanet", "RetinaNetClassificationHead", of_sizes(8, 1, 3), detected, "compute_loss"),
    ("torchvision.models.detection.fcos", "FCOSHead", of_sizes(8, 1, 3, num_convs=0), detected_by_anchors, "compute_loss"),
    ("diffusers.models.activations", "SwiGLU", of_sizes(8, 12), tokens),
    ("diffusers.models.transformers.transformer_flux2", "Flux2SwiGLU", of_sizes(), tokens),
    ("open_clip.loss", "SigLipLoss", of_sizes(), pairs),
]
IDS = [f"{module.split('.')[0]}-{name}-{n}" for n, (module, name, *_) in enumerate(BLOCKS)]
by_block = pytest.mark.parametrize(
    ("module", "name", "make", "inputs", "method"), [(*row, "__call__")[:5] for row in BLOCKS], ids=IDS
)


def class_of(module, name):
    """A library's class; skips where the library is not installed."""
    pytest.importorskip(module.partition(".")[0])
    with warnings.catch_warnings():
        # What other libraries warn of on import is theirs.
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), name)


def made(make, block):
    torch.manual_seed(0)
    module = make(block)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def step(module, inputs, method="__call__", dtype=torch.float64):
    """Outputs and gradients of parameters and inputs, from one seed."""

    def leaf(each):
        is_float = isinstance(each, torch.Tensor) and each.is_floating_point()
        return each.detach().to(dtype).requires_grad_() if is_float else each

    torch.manual_seed(1)
    args = tree_map(leaf, inputs())
    module.zero_grad()
    results = [each for each in tree_leaves(getattr(module, method)(*args)) if isinstance(each, torch.Tensor)]
    results = [each for each in results if each.is_floating_point()]
    sum((each * torch.randn_like(each)).sum() for each in results if each.requires_grad).backward()
    leaves = [*module.parameters(), *(each for each in tree_leaves(args) if isinstance(each, torch.Tensor))]
    return [each.detach() for each in results], [each.grad.clone() for each in leaves if each.grad is not None]


def assert_close(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected):
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def fused_names(module):
    return [name for row in report(module).replaced if row.form for name in row.names]


@by_block
def test_a_fused_block_computes_what_the_original_does(module, name, make, inputs, method):
    block = class_of(module, name)
    original = made(make, block)
    expected, attributes = step(original, inputs, method), {key: dict(vars(each)) for key, each in original.named_modules()}
    fused = replace(copy.deepcopy(original))
    assert fused_names(fused)[0] == "(the model)"
    assert type(fused) is not block
    assert isinstance(fused, block)
    assert_close(step(fused, inputs, method), expected)
    # Back: the same class, attributes and numbers, to the bit.
    assert type(copy.deepcopy(fused)) is type(fused)
    restore(fused)
    assert type(fused) is block
    assert {key: vars(each).keys() for key, each in fused.named_modules()} == {k: each.keys() for k, each in attributes.items()}
    for a, b in zip(step(fused, inputs, method), expected):
        assert all(map(torch.equal, a, b))


# One operator changed, in the source text


OTHERS = {ast.Mult: ast.Add, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


class _Changed(ast.NodeTransformer):
    """The operator with this number, changed: products to sums, sums to differences, numbers to the next."""

    def __init__(self, number):
        self.number = number
        self.seen = 0

    def is_it(self):
        self.seen += 1
        return self.seen - 1 == self.number

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if type(node.op) in OTHERS and self.is_it():
            node.op = OTHERS[type(node.op)]()
        return node

    def visit_Constant(self, node):
        is_number = isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
        return ast.Constant(node.value + 1) if is_number and self.is_it() else node


def text_of(function):
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))


def changed_texts(function):
    """The function's text with each of its operators changed in turn."""
    tree = trees.tree_of(text_of(function))
    counter = _Changed(-1)
    counter.visit(copy.deepcopy(tree))
    return [ast.unparse(_Changed(number).visit(copy.deepcopy(tree))) for number in range(counter.seen)]


def subclass_with(block, method, text):
    """A subclass whose method has this text, which can be read as its source."""
    namespace = dict(inspect.unwrap(getattr(block, method)).__globals__)
    filename = f"<changed {block.__name__}, {hash(text)}>"
    linecache.cache[filename] = len(text), None, text.splitlines(keepends=True), filename
    exec(compile(text, filename, "exec"), namespace)
    return type(block.__name__, (block,), {method: namespace[method], "__module__": block.__module__})


def known_methods(block):
    return {form.method for form in forms.forms() if form.knows(block)}


@by_block
def test_a_block_with_one_operator_changed_is_left_and_reported(module, name, make, inputs, method):
    block = class_of(module, name)
    (*_, method) = sorted(known_methods(block))  # forward, where a class of experts has _apply_gate too
    texts = changed_texts(getattr(block, method))
    same = ast.unparse(trees.tree_of(text_of(getattr(block, method))))
    assert method in known_methods(subclass_with(block, method, same))
    assert method not in known_methods(subclass_with(block, method, f"def {method}(self, x):\n    return x"))
    for text in texts:
        changed = subclass_with(block, method, text)
        assert method not in known_methods(changed), text
        torch.manual_seed(0)
        instance = make(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a loss has nothing else to replace
            replace(instance)
        if not known_methods(changed):
            assert type(instance) is changed, text
            (left,) = (row for row in report(instance).left if "(the model)" in row.names)
            assert f"{method} is not that of {block.__name__}" in left.reason
        else:
            assert method not in vars(type(instance))


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_known_method_is_tested_above(library):
    pytest.importorskip(library)
    of_library = [form for form in forms.forms() if form.library == library]
    classes = [class_of(module, name) for module, name, *_ in BLOCKS if module.partition(".")[0] == library]
    tested = {
        (form.method, fingerprint_of(getattr(each, form.method))) for form in of_library for each in classes if form.knows(each)
    }
    assert tested == {(form.method, each) for form in of_library for each in form.fingerprints}


ACTIVATIONS = [
    ("transformers.activations", "SiLUActivation"),
    ("transformers.activations", "QuickGELUActivation"),
    ("timm.layers.activations", "Sigmoid"),
    ("timm.layers.activations", "QuickGELU"),
    ("open_clip.transformer", "QuickGELU"),
]


@pytest.mark.parametrize(("module", "name"), ACTIVATIONS, ids=lambda each: each)
def test_activations_of_libraries(module, name):
    activation = class_of(module, name)
    model = nn.Sequential(activation(), nn.Linear(3, 3)).double()
    (kind,) = (each.kind for each in forms.activations() if each.knows(activation))
    expected = step(model, lambda: (torch.randn(4, 3),))
    replace(model)
    (row,) = report(model).replaced
    assert (row.names, row.type, row.became) == (["0"], name, kind)
    assert_close(step(model, lambda: (torch.randn(4, 3),)), expected)
    assert type(restore(model)[0]) is activation
    changed = subclass_with(activation, "forward", "def forward(self, input):\n    return input")
    model = replace(nn.Sequential(changed(), nn.Sigmoid()))
    assert type(model[0]) is changed
    (left,) = report(model).left
    assert left.reason == "its forward is not the one that is known of this class"


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_known_activation_is_tested_above(library):
    tested = {name for module, name in ACTIVATIONS if module.partition(".")[0] == library}
    assert tested == {each.name for each in forms.activations() if each.library == library}


def test_a_sigmoid_in_place_is_fused_whatever_is_saved():
    squeeze = class_of("timm.layers.squeeze_excite", "SEModule")
    in_place = class_of("timm.layers.activations", "Sigmoid")
    for save in ("output", "input"):
        block = made(lambda block: block(8, gate_layer=lambda **_: in_place(inplace=True)), squeeze)
        expected = step(block, images)
        assert "(the model)" in fused_names(replace(block, save=save))
        assert_close(step(block, images), expected)


# Models of transformers


def tiny(name="Llama", **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes | heads | options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


IDENTIFIERS = torch.arange(1, 21).view(2, 10)


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDENTIFIERS, labels=IDENTIFIERS).loss
    loss.backward()
    return [loss.detach()], [each.grad.clone() for each in model.parameters()]


def test_a_llama_trains_the_same_and_says_what_became_ours():
    model = tiny().double()
    expected = loss_and_gradients(model)
    assert_close(loss_and_gradients(replace(model)), expected)
    found = report(model, forward=lambda: model(input_ids=IDENTIFIERS, labels=IDENTIFIERS).loss)
    assert [(row.names, row.became, row.library) for row in found.replaced] == [
        ([f"model.layers.{n}.mlp" for n in range(2)], "swiglu", "transformers"),
        ([f"model.layers.{n}.mlp.act_fn" for n in range(2)], "silu, gated", ""),
    ]
    # In each of two layers one tensor less, of 24 features.
    assert found.saved_bytes[0] - found.saved_bytes[1] == 2 * IDENTIFIERS.numel() * 24 * 8


def test_a_replaced_llama_generates_the_same():
    model = tiny().eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDENTIFIERS, **options)
    assert torch.equal(replace(model).generate(IDENTIFIERS, **options), expected)
    assert expected.shape == (2, 18)


def test_a_replaced_llama_is_saved_and_loaded(tmp_path):
    model = tiny().eval()
    expected = model(IDENTIFIERS).logits
    replace(model).save_pretrained(tmp_path)
    loaded = type(tiny()).from_pretrained(tmp_path, local_files_only=True).eval()
    assert [type(each) for each in loaded.modules()] == [type(each) for each in tiny().modules()]
    assert torch.equal(loaded(IDENTIFIERS).logits, expected)
    assert fused_names(replace(loaded)) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_root_that_is_fused_is_saved_under_its_own_name(tmp_path):
    block = class_of(modeling("siglip"), "SiglipModel")
    model = replace(made(lambda model: siglip(model, image_size=8), block).float())
    assert "(the model)" in fused_names(model)
    model.save_pretrained(tmp_path)
    loaded = block.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.config.architectures == ["SiglipModel"]
    assert type(loaded) is block
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers(use_reentrant):
    model = tiny().double().train()
    expected = loss_and_gradients(model)
    replace(model).gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert_close(loss_and_gradients(model), expected)


# fp64 has no grouped product of matrices.
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("eager", torch.float64, 1e-12), ("batched_mm", torch.float64, 1e-12), ("grouped_mm", torch.float32, 1e-5)],
)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts_in_each_implementation(name, implementation, dtype, tolerance):
    model = tiny(name, num_local_experts=4, head_dim=8).to(dtype)
    model.set_experts_implementation(implementation)
    expected = loss_and_gradients(model)
    replace(model)
    assert fused_names(model) == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert_close(loss_and_gradients(model), expected, tolerance)


def test_a_model_with_another_activation_is_told_that_there_is_nothing():
    model = tiny(hidden_act="gelu")
    types_before = [type(each) for each in model.modules()]
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has nothing.*GELUActivation \(2\)"):
        replace(model)
    assert [type(each) for each in model.modules()] == types_before


def test_a_focal_loss_of_the_detr_family():
    criterion = class_of("transformers.loss.loss_deformable_detr", "DeformableDetrImageLoss")
    loss_of = class_of("transformers.loss.loss_deformable_detr", "DeformableDetrForObjectDetectionLoss")
    from transformers import PreTrainedConfig, PreTrainedModel

    class Detector(PreTrainedModel):
        """No more of a detector than its loss."""

        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.loss_type = "DeformableDetrForObjectDetection"
            self.proj = nn.Linear(8, 3)

        def forward(self, x):
            labels = [
                {"class_labels": torch.tensor([n]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]]).double()} for n in (0, 2)
            ]
            boxes = torch.full((2, 5, 4), 0.4, dtype=x.dtype)
            loss, parts, _ = self.loss_function(self.proj(x), labels, x.device, boxes, self.config)
            return loss, parts["loss_ce"]

    costs = dict.fromkeys(("class_cost", "bbox_cost", "giou_cost", "bbox_loss_coefficient", "giou_loss_coefficient"), 1.0)
    model = made(lambda block: block(PreTrainedConfig(**costs, num_labels=3, focal_alpha=0.25, auxiliary_loss=False)), Detector)
    attributes = dict(vars(model))
    expected = step(model, tokens)
    replace(model)
    assert [(row.names, row.became) for row in report(model).replaced] == [(["(the model)"], "sigmoid_focal_loss")]
    assert_close(step(model, tokens), expected)
    assert_close(step(copy.deepcopy(model), tokens), expected)
    restore(model)
    assert vars(model).keys() == attributes.keys()
    assert model.loss_function is loss_of
    assert trees.match(criterion.loss_labels, Rewrite("detr_focal_loss", "self.FUSED")) is not None
    assert forms.fingerprint_of(criterion.loss_labels) is not None


@pytest.mark.ways("interpreter")
def test_the_gate_of_a_llama_is_one_kernel_forward_and_one_backward(device, kernels):
    model, before = replace(tiny(num_hidden_layers=1)).to(device), kernels.n_launches
    loss = model(input_ids=IDENTIFIERS.to(device), labels=IDENTIFIERS.to(device)).loss
    runs_kernels = device == "cuda" or kernels.way == "interpreter"
    assert kernels.n_launches - before == runs_kernels
    loss.backward()
    assert kernels.n_launches - before == 2 * runs_kernels
