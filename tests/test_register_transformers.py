"""Models that transformers makes come replaced while register_transformers() is in force, and as they are before and after."""

import importlib
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch

import torch_sigmoid

transformers = pytest.importorskip("transformers", minversion="5.3")
monkey_patching = importlib.import_module("transformers.monkey_patching")
modeling_utils = importlib.import_module("transformers.modeling_utils")

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "llama": ("LlamaConfig", SMALL),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3_moe": ("Qwen3MoeConfig", SMALL | EXPERTS | {"decoder_sparse_step": 1}),
    "mamba": ("MambaConfig", {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 8}),
}
OURS = {name for name in CONFIGS if name != "gemma2"}


def config_of(name):
    config, options = CONFIGS[name]
    return getattr(transformers, config)(**options)


def make(name, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config_of(name)).eval()


def classes(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def tokens():
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def registered():
    torch_sigmoid.register_transformers()
    yield
    torch_sigmoid.unregister_transformers()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", CONFIGS)
def test_from_config_makes_what_replace_makes(name):
    original = make(name)
    expected = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "gemma2" else "error")
        torch_sigmoid.replace(expected)
    torch_sigmoid.register_transformers()
    try:
        with warnings.catch_warnings(record=True) as caught:
            model = make(name)
    finally:
        torch_sigmoid.unregister_transformers()
    assert not [str(each.message) for each in caught if "replace" in str(each.message)]
    assert classes(model) == classes(expected)
    assert (classes(model) != classes(original)) == (name in OURS)
    assert torch_sigmoid.report(model).to_dict() == torch_sigmoid.report(expected).to_dict()
    assert list(model.state_dict()) == list(original.state_dict())
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits, rtol=0, atol=0)
    torch_sigmoid.restore(model)
    assert classes(model) == classes(original)
    assert torch.equal(model(tokens()).logits, original(tokens()).logits)


@pytest.mark.parametrize("name", OURS)
def test_from_pretrained_loads_what_was_saved_and_saves_it_again(name, tmp_path, offline, registered):
    model = make(name)
    model.save_pretrained(tmp_path / "once")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "once").eval()
    assert classes(loaded) == classes(model)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    copy = pickle.loads(pickle.dumps(loaded))
    assert classes(copy) == classes(model)
    loaded.save_pretrained(tmp_path / "twice")
    once, twice = ({path.name: path.read_bytes() for path in sorted((tmp_path / each).iterdir())} for each in ("once", "twice"))
    assert once == twice
    torch_sigmoid.unregister_transformers()
    try:
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()
    finally:
        torch_sigmoid.register_transformers()
    assert not torch_sigmoid.report(plain).replaced
    torch.testing.assert_close(plain(tokens()).logits, loaded(tokens()).logits)


def test_a_fused_block_is_still_of_its_class(registered):
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = make("llama").model.layers[0].mlp
    assert isinstance(mlp, LlamaMLP)
    assert type(mlp) is not LlamaMLP


def test_recorded_outputs_are_those_of_a_model_as_it_is(registered):
    wanted = {"output_router_logits": True, "output_attentions": True, "output_hidden_states": True}
    config = config_of("qwen3_moe")
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = model(tokens(), **wanted)
    expected = torch_sigmoid.restore(model)(tokens(), **wanted)
    for name, length in (("router_logits", 2), ("attentions", 2), ("hidden_states", 3)):
        assert len(found[name]) == length
        torch.testing.assert_close(found[name], expected[name])


def test_a_class_of_one_name_is_found_in_each_model(registered):
    """Qwen2's MLP and that of Qwen2-VL are different classes called Qwen2MLP; both are loaded here."""
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    assert modeling_qwen2.Qwen2MLP is not modeling_qwen2_vl.Qwen2MLP
    assert isinstance(make("qwen2").model.layers[0].mlp, modeling_qwen2.Qwen2MLP)
    text = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen2VLForConditionalGeneration._from_config(config)
    mlp = model.model.language_model.layers[0].mlp
    assert isinstance(mlp, modeling_qwen2_vl.Qwen2MLP)
    assert torch_sigmoid.report(model).replaced


def test_the_model_itself_is_fused_too(registered):
    """SigLIP's loss stands in the forward of the model, whose class no patch by name reaches."""
    text = VISION | {"vocab_size": 32, "max_position_embeddings": 8, "projection_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION | {"image_size": 8, "patch_size": 4})
    model = transformers.AutoModel.from_config(config)
    assert ["(the model)"] in [each.names for each in torch_sigmoid.report(model).replaced]
    assert isinstance(model, transformers.SiglipModel)


def test_models_made_otherwise_stay_as_they_are(registered):
    model = transformers.LlamaForCausalLM(config_of("llama"))
    assert not torch_sigmoid.report(model).replaced
    # By hand, in transformers' words: under its patches, and with its last step.
    monkey_patching.patch_output_recorders(model)
    assert torch_sigmoid.report(model).replaced


def test_save_is_passed_on():
    torch_sigmoid.register_transformers(save="input")
    try:
        model = make("gemma2")
        model.lm_head = torch.nn.Sigmoid()
        monkey_patching.patch_output_recorders(model)
    finally:
        torch_sigmoid.unregister_transformers()
    assert model.lm_head.save == "input"


def test_unregistering_leaves_nothing_behind():
    before = {module: dict(vars(module)) for module in (monkey_patching, modeling_utils)}
    mapping = monkey_patching.get_patch_mapping()
    torch_sigmoid.register_transformers()
    held = modeling_utils.patch_output_recorders
    torch_sigmoid.unregister_transformers()
    for module, attributes in before.items():
        assert vars(module) == attributes
    assert monkey_patching.get_patch_mapping() == mapping
    # Somebody may hold on to the step that was ours.
    model = transformers.LlamaForCausalLM(config_of("llama"))
    held(model)
    assert not torch_sigmoid.report(model).replaced


def test_a_failure_in_the_making_changes_no_later_model(registered):
    config = config_of("llama")
    config.hidden_act = "no such activation"
    with pytest.raises(KeyError):
        transformers.AutoModelForCausalLM.from_config(config)
    assert not torch_sigmoid.report(transformers.LlamaForCausalLM(config_of("llama"))).replaced


def test_what_somebody_else_has_wrapped_around_it_stays():
    torch_sigmoid.register_transformers()
    ours, called = modeling_utils.patch_output_recorders, []

    def theirs(model):
        called.append(model)
        ours(model)

    modeling_utils.patch_output_recorders = theirs
    try:
        torch_sigmoid.unregister_transformers()
        assert modeling_utils.patch_output_recorders is theirs
        model = make("llama")
    finally:
        modeling_utils.patch_output_recorders = monkey_patching.patch_output_recorders
    assert called == [model]
    assert not torch_sigmoid.report(model).replaced


def test_classes_that_somebody_else_has_registered_are_left_to_him():
    from transformers.models.llama.modeling_llama import LlamaMLP

    class TheirMLP(LlamaMLP):
        pass

    monkey_patching.register_patch_mapping({"LlamaMLP": TheirMLP})
    try:
        with pytest.warns(UserWarning, match=r"somebody else has registered them: LlamaMLP$"):
            torch_sigmoid.register_transformers()
        model, other = make("llama"), make("qwen2")
    finally:
        torch_sigmoid.unregister_transformers()
        monkey_patching.unregister_patch_mapping(["LlamaMLP"])
    assert type(model.model.layers[0].mlp) is TheirMLP
    assert isinstance(model.model.layers[0].mlp.act_fn, torch_sigmoid.SiLU)
    assert torch_sigmoid.report(other).replaced[0].type == "Qwen2MLP"


def test_twice_is_an_error_and_so_is_undoing_nothing(registered):
    with pytest.raises(RuntimeError, match=r"registered already, with save='output'; call unregister_transformers\(\) first"):
        torch_sigmoid.register_transformers(save="input")
    torch_sigmoid.unregister_transformers()
    try:
        with pytest.raises(RuntimeError, match="nothing is registered"):
            torch_sigmoid.unregister_transformers()
    finally:
        torch_sigmoid.register_transformers()


def test_a_wrong_save_registers_nothing():
    with pytest.raises(ValueError, match="save"):
        torch_sigmoid.register_transformers(save="x")
    with pytest.raises(RuntimeError, match="nothing is registered"):
        torch_sigmoid.unregister_transformers()


def test_an_old_transformers_is_told_which_it_must_be(monkeypatch):
    for other in (None, types.SimpleNamespace(PreTrainedModel=torch.nn.Module), modeling_utils):
        with monkeypatch.context() as context:
            if other is modeling_utils:
                context.setattr(other.PreTrainedModel, "from_pretrained", classmethod(lambda cls: cls()))
            else:
                context.setitem(sys.modules, "transformers.modeling_utils", other)
            with pytest.raises(
                RuntimeError, match=rf"needs transformers 5\.3 or newer.*this is transformers {transformers.__version__}"
            ):
                torch_sigmoid.register_transformers()


def test_without_transformers_it_says_so():
    code = "import sys; sys.modules['transformers'] = None; import torch_sigmoid; torch_sigmoid.register_transformers()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stderr.splitlines()[-1] == (
        "ImportError: register_transformers() needs transformers 5.3 or newer, which is not installed"
    )


def test_nothing_of_transformers_is_imported_before():
    code = "import sys, torch_sigmoid; print([name for name in sys.modules if name.split('.')[0] == 'transformers'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "[]"
