"""Building models, naming their shard units, and first values that follow from the seed alone."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from areal_ray.config import ConfigError, ModelConfig, load
from areal_ray.distributed.tensor_parallel import tensor_plan
from areal_ray.models import (
    attention_of,
    build_model,
    check_model,
    init_buffers,
    init_weights,
    materialise,
    shard_units,
)

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
TINY = load(str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")).model
SMALL = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip


def initialised(config, seed=0):
    model = build_model(config)
    materialise(model, CPU)
    init_weights(model, seed)
    return model


def check(config, tokens, seq_len=8):
    """What the driver looks at before anything starts."""
    check_model(config, build_model(config), tokens, seq_len)


class TwoLayers(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(257, width), nn.Linear(width, 257)


class NoRule(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class HalfARule(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def reset_parameters(self):
        nn.init.ones_(self.a)


def two_layers(width=8):
    return TwoLayers(width)


def no_model():
    return "a string"


def raises():
    raise RuntimeError("out of ideas")


def factory(function, **args):
    return ModelConfig(factory=f"{__name__}:{function}", args=args)


def key_of(work, *arguments):
    with pytest.raises(ConfigError) as caught:
        work(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value.key


def test_the_tiny_model_is_built_without_memory():
    model = build_model(TINY)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.training
    assert 2.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 3.5e6


def test_the_units_are_the_decoder_layers_in_order():
    model = build_model(TINY)
    assert [type(unit).__name__ for unit in shard_units(model)] == ["Qwen3DecoderLayer"] * 4
    assert shard_units(model) == list(model.model.layers)


def test_units_can_be_chosen_by_class_name():
    model = build_model(factory("two_layers"))
    assert shard_units(model) == []
    assert shard_units(model, ["Linear"]) == [model.first, model.second]


def test_a_unit_class_that_the_model_lacks_is_a_config_error():
    with pytest.raises(ConfigError, match=r"model\.shard_units: the model has no module of class Blok") as caught:
        shard_units(build_model(factory("two_layers")), ["Linear", "Blok"])
    assert caught.value.key == "model.shard_units"


def planned(plan):
    model = two_layers()
    model.tp_plan = plan
    return model


def test_tensors_are_split_by_the_models_own_plan():
    plan = tensor_plan(build_model(TINY), 2)
    assert {style for name, style in plan.items() if name.endswith(("q_proj", "up_proj"))} == {"colwise"}
    assert {style for name, style in plan.items() if name.endswith(("o_proj", "down_proj"))} == {"rowwise"}
    assert len([name for name in plan if ".layers." in name]) == 4 * 9


def test_tied_embeddings_are_split_alike():
    plan = tensor_plan(build_model(TINY), 2)
    assert (plan["model.embed_tokens"], plan["lm_head"]) == ("embedding_rowwise", "colwise_gather_output")
    # Here the plan names the head only.
    neox = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    tied = build_model(
        ModelConfig(config={**neox, "intermediate_size": 64, "vocab_size": 264, "tie_word_embeddings": True})
    )
    assert tensor_plan(tied, 2)["gpt_neox.embed_in"] == "embedding_rowwise"


GPT2 = ModelConfig(config={"model_type": "gpt2", "n_layer": 1})
MIXTRAL = ModelConfig(
    config={"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
)
UNSPLITTABLE = [
    (lambda: build_model(GPT2), 2, "GPT2LMHeadModel has no tensor-parallel plan"),
    (lambda: build_model(factory("two_layers")), 2, "TwoLayers has no tensor-parallel plan"),
    (lambda: build_model(MIXTRAL), 2, "the plan of MixtralForCausalLM has the style 'moe_tp_experts', which is none"),
    (lambda: build_model(TINY), 4, "4 does not divide num_key_value_heads=2"),
    (lambda: build_model(TINY), 3, "3 does not divide 256, the size of dimension 0 of model.layers.0"),
    (lambda: planned({"frist": "colwise"}), 2, "names none of its modules: frist"),
    (lambda: planned({"first": "embedding_rowwise"}), 2, "first is a Linear, and 'embedding_rowwise' splits"),
    (lambda: planned({"first.weight": "colwise"}), 2, "splits the bare parameter first.weight"),
]


@pytest.mark.parametrize(("model", "size", "why"), UNSPLITTABLE, ids=[row[2] for row in UNSPLITTABLE])
def test_a_model_that_tensor_parallelism_cannot_split_is_a_config_error(model, size, why):
    with pytest.raises(ConfigError, match=r"engine\.mesh\.tensor") as caught:
        tensor_plan(model(), size)
    assert why in caught.value.message
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_may_lie_in_the_hosts_memory_and_buffers_on_the_device(tied):
    model = build_model(ModelConfig(config={**SMALL, "tie_word_embeddings": tied}))
    materialise(model, torch.device("meta"), offloaded=True)  # for want of another device
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_first_weights_follow_from_the_seed():
    first, again, other = (dict(initialised(ModelConfig(config=SMALL), seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    random = [name for name, parameter in first.items() if parameter.ndim == 2]
    assert len(random) == 1 + 2 * 7
    assert all(not torch.equal(first[name], other[name]) for name in random)


def test_no_two_modules_begin_with_the_same_weights():
    layers = initialised(ModelConfig(config=SMALL)).model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)


def test_initialising_neither_depends_on_global_randomness_nor_changes_it():
    torch.manual_seed(5)
    first = initialised(ModelConfig(config=SMALL)).lm_head.weight
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(initialised(ModelConfig(config=SMALL)).lm_head.weight, first)


def test_everything_is_initialised_and_the_buffers_as_transformers_does():
    model = initialised(ModelConfig(config=SMALL))
    config = AutoConfig.for_model(**SMALL)
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert expected
    assert {name: buffer.tolist() for name, buffer in model.named_buffers()} == {
        name: buffer.tolist() for name, buffer in expected.items()
    }
    assert abs(model.lm_head.weight.std().item() - config.initializer_range) < 0.002


def test_buffers_can_be_set_without_touching_the_weights():
    model, expected = initialised(ModelConfig(config=SMALL)), initialised(ModelConfig(config=SMALL))
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    for buffer in model.buffers():
        buffer.fill_(-1.0)
    init_buffers(model)
    assert all((parameter == 7.0).all() for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))


def test_tied_embeddings_stay_tied():
    model = initialised(ModelConfig(config=SMALL))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loose = initialised(ModelConfig(config={**SMALL, "tie_word_embeddings": False}))
    assert loose.lm_head.weight is not loose.model.embed_tokens.weight
    assert not torch.equal(loose.lm_head.weight, loose.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("module", "message"),
    [(NoRule, r"module 'inner' \(NoRule\) has parameters or buffers but neither"), (HalfARule, r"inner\.b: the init")],
)
def test_a_module_that_is_not_initialised_is_named(module, message):
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "inner": module()})
    with pytest.raises(ValueError, match=message):
        init_weights(model, 0)


class Router(nn.Module):
    """As transformers' routers: a weight that is set by the rule of the block around it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.linear = Router(), nn.Linear(4, 4)


class Rules(nn.Module):
    """With transformers' rule, one call per module."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, Block):
            module.router.weight.data.normal_()
            module.linear.weight.data.fill_(9.0)


def with_rules():
    return Rules()


def test_what_a_module_s_rule_leaves_is_set_by_that_of_the_module_around_it():
    model = initialised(factory("with_rules"))
    assert model.block.router.weight.std() > 0.3
    assert model.block.linear.weight.abs().max() <= 0.5  # which has a rule of its own
    again = initialised(factory("with_rules"), seed=0).block.router.weight
    assert torch.equal(model.block.router.weight, again)
    assert not torch.equal(model.block.router.weight, initialised(factory("with_rules"), seed=1).block.router.weight)


def test_a_factory_builds_a_model_of_one_s_own():
    check(factory("two_layers", width=4), 257)
    model = initialised(factory("two_layers", width=4))
    assert isinstance(model, TwoLayers)
    assert model.second.weight.shape == (257, 4)
    assert 0 < model.second.weight.abs().max() <= 0.5  # nn.Linear's own rule: uniform in 1/sqrt(fan in)


@pytest.mark.parametrize("work", [build_model, lambda config: check(config, 257)], ids=["build", "check"])
@pytest.mark.parametrize("name", ["no_such_module:f", f"{__name__}.deeper:f", f"{__name__}:no_such_function"])
def test_a_factory_that_is_not_there_is_a_config_error(work, name):
    assert key_of(work, ModelConfig(factory=name)) == "model.factory"


@pytest.mark.parametrize(
    "config", [factory("no_model"), factory("raises"), factory("two_layers", widht=3)], ids=lambda c: c.factory[-10:]
)
def test_a_factory_that_gives_no_model_is_a_config_error(config):
    assert key_of(build_model, config).startswith("model.")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "qwen33"}, "model.config.model_type"),
        ({"model_type": None}, "model.config.model_type"),
        ({"model_type": "vit"}, "model.config.model_type"),  # no language model
        ({"vocab_size": 256}, "model.config.vocab_size"),
        ({"hidden_size": "wide"}, "model.config"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_a_config_error_before_anything_starts(change, key):
    assert key_of(check, ModelConfig(config={**SMALL, **change}), 257) == key


def test_a_model_with_a_row_for_every_token_passes():
    check(TINY, 257)
    check(ModelConfig(config=SMALL), 300)


WITH_WPE = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
OPT = {"model_type": "opt", "vocab_size": 300, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1,
       "num_attention_heads": 2, "max_position_embeddings": 128, "word_embed_proj_dim": 32}  # fmt: skip
CODEGEN = {"model_type": "codegen", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4,
           "n_positions": 128}  # fmt: skip


@pytest.mark.parametrize("config", [WITH_WPE, OPT, CODEGEN], ids=lambda config: config["model_type"])
def test_rows_longer_than_a_table_of_positions_are_a_config_error(config):
    check(ModelConfig(config=config), 257, 128)
    assert key_of(check, ModelConfig(config=config), 257, 129) == "train.seq_len"


def test_rotary_positions_have_no_end():
    check(ModelConfig(config={**SMALL, "max_position_embeddings": 16}), 257, 64)


GEMMA2 = {**SMALL, "model_type": "gemma2"}


def test_attention_is_what_the_model_has():
    assert attention_of(build_model(ModelConfig(config=SMALL))) == "sdpa"
    assert attention_of(build_model(ModelConfig(config=SMALL, attention="eager"))) == "eager"
    assert attention_of(build_model(ModelConfig(config=GEMMA2))) == "eager"
    assert attention_of(build_model(ModelConfig(config=SMALL, attention="flex_attention"))) == "flex_attention"


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_attention_that_the_model_does_not_have_is_a_config_error(attention):
    assert key_of(build_model, ModelConfig(config=GEMMA2, attention=attention)) == "model.attention"


def test_quantized_weights_are_a_config_error(tmp_path):
    AutoConfig.for_model(**SMALL, quantization_config={"quant_method": "fp8"}).save_pretrained(tmp_path)
    assert key_of(build_model, ModelConfig(path=str(tmp_path))) == "model.path"


def test_a_user_s_module_is_imported_outside_of_the_model_s_device(tmp_path, monkeypatch):
    (tmp_path / "table_of_a_test.py").write_text(
        "import torch\nfrom torch import nn\nTABLE = torch.arange(4.0)\ndef model():\n    return nn.Linear(2, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    built = build_model(ModelConfig(factory="table_of_a_test:model"))
    assert built.weight.is_meta
    assert sys.modules["table_of_a_test"].TABLE.device.type == "cpu"
