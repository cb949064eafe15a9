"""Adapters in a model on one process: what is refused, first values, and the fingerprint of a base."""

import pytest
import torch
from torch import nn

from areal_ray.config import AdapterConfig, ConfigError, ModelConfig
from areal_ray.models import Adapter, build_adapted, build_model, init_weights, materialise
from areal_ray.models.adapters import Fingerprint, attach, quick_fingerprint
from areal_ray.models.hf_weights import weights_of

pytestmark = pytest.mark.unit

SMALL = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
MODEL = ModelConfig(config=SMALL)


def lora(**args):
    pytest.importorskip("peft", reason="adapters by LoRA need the extra areal_ray[lora]")
    return AdapterConfig("lora", args)


@pytest.mark.parametrize(
    ("args", "key", "part"),
    [
        ({"bias": "all"}, "adapter.args", "lora takes r, lora_alpha"),
        ({"init_lora_weights": "pissa"}, "adapter.args.init_lora_weights", "must be true or gaussian"),
        ({"init_lora_weights": 1}, "adapter.args.init_lora_weights", "must be true or gaussian"),
        ({"r": 0}, "adapter.args", "positive"),
        ({"target_modules": ["nope"]}, "adapter.args", "not for Qwen3ForCausalLM"),
        ({"target_modules": ["embed_tokens"]}, "adapter.args", "are one weight (tied)"),
        ({"modules_to_save": ["lm_head"]}, "adapter.args", "are one weight (tied)"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "adapter.args", "layers_to_transform"),
    ],
)
def test_what_lora_cannot_do_is_said(args, key, part):
    with pytest.raises(ConfigError) as caught:
        build_adapted(MODEL, lora(**args))
    assert caught.value.key == key
    assert part in caught.value.message


def test_nothing_but_the_adapter_is_trained():
    model, adapted = build_adapted(MODEL, lora())  # the modules that peft knows for this model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapted.trained(weights_of(model)))
    assert {name.split(".")[4] for name in trained} == {"q_proj", "v_proj"}
    assert set(adapted.base.values()) == set(weights_of(build_model(MODEL)))


class Wrong(Adapter):
    """Does to a model what it is called with."""

    def __init__(self, what):
        self.attach, self.disabled = what, None


def replaces(model):
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    model.model.norm.weight = nn.Parameter(torch.empty_like(model.model.norm.weight))


def adds_to_the_base(model):
    model.model.norm.register_parameter("extra", nn.Parameter(torch.empty(3)))


@pytest.mark.parametrize(
    ("what", "part"),
    [
        (replaces, "takes model.norm.weight of the base away"),
        (adds_to_the_base, "puts model.norm.extra into a module of the base"),
        (lambda model: None, "puts no parameter that is trained into Qwen3ForCausalLM"),
    ],
)
def test_an_adapter_that_does_not_leave_the_base_alone_is_refused(what, part):
    Wrong.__abstractmethods__ = frozenset()
    with pytest.raises(ConfigError, match="Wrong") as caught:
        attach(Wrong(what), build_model(MODEL))
    assert part in caught.value.message


def initialised(config, adapter=None, seed=0):
    model, adapted = build_adapted(config, adapter)
    materialise(model, torch.device("cpu"))
    init_weights(model, seed, adapted)
    return weights_of(model), adapted


def test_first_values_are_those_of_the_model_without_the_adapter_and_change_nothing():
    untied = ModelConfig(config={**SMALL, "tie_word_embeddings": False})
    plain, _ = initialised(untied)
    args = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    weights, adapted = initialised(untied, lora(**args))
    for here, there in {**adapted.base, **adapted.copies}.items():
        assert torch.equal(weights[here], plain[there]), here
    assert adapted.copies == {"lm_head.modules_to_save.default.weight": "lm_head.weight"}
    own = {name: weights[name] for name in weights if ".lora_" in name}
    empty = {name for name, tensor in own.items() if not tensor.any()}
    assert empty == {name for name in own if "lora_B" in name or "lora_embedding_A" in name}
    first, second = (own[f"model.layers.{i}.self_attn.q_proj.lora_A.default.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(
        first, initialised(untied, lora(**args))[0]["model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    )
    bound = 32**-0.5  # kaiming_uniform_ with a = sqrt(5), as peft has it
    assert 0.9 * bound < first.abs().max() <= bound


SHAPE = (6, 5, 4)


def fingerprint(values, name="w", boxes=(((0, 6), (0, 5), (0, 4)),)):
    found = Fingerprint()
    for box in boxes:
        found.add(name, values.shape, box, values[tuple(slice(*each) for each in box)])
    return found.text(found.total)


def test_a_fingerprint_is_the_same_in_whatever_parts_values_come():
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = [((i, i + 1), (0, 5), (0, 4)) for i in range(6)]
    columns = [((0, 6), (0, 5), (0, 1)), ((0, 2), (0, 3), (1, 4)), ((0, 2), (3, 5), (1, 4)), ((2, 6), (0, 5), (1, 4))]
    whole = fingerprint(values)
    assert {fingerprint(values, boxes=boxes) for boxes in (rows, rows[::-1], columns)} == {whole}
    assert fingerprint(values.float()) == whole  # in another file format
    parts = [Fingerprint(), Fingerprint()]
    for part, box in zip(parts, (((0, 4), (0, 5), (0, 4)), ((4, 6), (0, 5), (0, 4))), strict=True):
        part.add("w", SHAPE, box, values[slice(*box[0])])
    assert Fingerprint.text(sum(part.total for part in parts)) == whole


def test_a_fingerprint_notices_what_is_not_the_same():
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    swapped, nudged = values.clone(), values.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = values[0, 0, 1], values[0, 0, 0]
    nudged.view(torch.int32)[5, 4, 3] ^= 1
    others = [values, swapped, nudged, -values, 2 * values, values.flip(0)]
    assert len({fingerprint(each) for each in others} | {fingerprint(values, name="v")}) == 7


def test_a_quick_fingerprint_looks_at_every_weight():
    weights = {"a": torch.randn(3, 2000), "b": torch.randn(7), "c": torch.tensor(3.0)}
    first = quick_fingerprint(weights)
    for name in weights:
        other = {key: tensor.clone() for key, tensor in weights.items()}
        other[name].view(-1)[0] += 1
        assert quick_fingerprint(other) != first, name
