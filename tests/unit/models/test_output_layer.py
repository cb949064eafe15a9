"""The output layer of a model, and what the model makes of the logits, found out without its other layers."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from areal_ray.config import ModelConfig
from areal_ray.models import NoOutputLayer, build_model, output_layer
from tests.families.small import small_config

pytestmark = pytest.mark.unit

PLAIN = ["qwen3", "mixtral", "gpt2", "opt", "phi"]
FINISHED = ["gemma2", "granite", "cohere"]  # capped, divided, multiplied


def built(family):
    return build_model(ModelConfig(config=small_config(family)))


@pytest.mark.parametrize("family", [*PLAIN, *FINISHED])
def test_the_model_is_left_as_it_was(family):
    model = built(family)
    output = output_layer(model)
    assert output.layer is model.lm_head
    assert (output.finish is None) == (family in PLAIN)
    assert output.layer.weight.is_meta
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", [*PLAIN, *FINISHED])
def test_layer_and_finish_give_the_model_s_logits(family):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small_config(family)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # so that capping shows
        output, ids = output_layer(model), torch.arange(5)[None]
        logits = model(input_ids=ids, use_cache=False).logits
        with output.left_out() as seen:
            model(input_ids=ids, use_cache=False)
        states, weight, bias = seen
        made = nn.functional.linear(states, weight, bias)
        assert torch.equal(logits, made if output.finish is None else output.finish(made))


def test_a_model_of_one_s_own_has_its_logits():
    with pytest.raises(NoOutputLayer, match="Linear names no linear output layer"):
        output_layer(nn.Linear(2, 2))


def test_logits_that_depend_on_each_other_are_the_model_s_own(monkeypatch):
    model = built("qwen3")
    forward = type(model).forward

    def centred(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(1, keepdim=True)
        return output

    monkeypatch.setattr(type(model), "forward", centred)
    with pytest.raises(NoOutputLayer, match="in a way of its own"):
        output_layer(model)


def test_a_layer_in_a_shard_unit_is_not_there_when_the_model_has_returned():
    model = built("qwen3")
    with pytest.raises(NoOutputLayer, match=r"model\.shard_units"):
        output_layer(model, [*model.model.layers, model.lm_head])
    assert output_layer(model, list(model.model.layers)).layer is model.lm_head
