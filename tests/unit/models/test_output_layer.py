"""The output layer of a model: given where its output is the logits, and refused where it is not."""

import pytest
import torch
from torch import nn

from areal_ray.config import ModelConfig
from areal_ray.models import NoOutputLayer, build_model, output_layer
from tests.families.small import small_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt2", "opt", "phi"])
def test_the_layer_whose_output_is_the_logits(family):
    model = build_model(ModelConfig(config=small_config(family)))
    layer = output_layer(model)
    assert layer is model.lm_head
    assert layer.forward.__func__ is nn.Linear.forward  # and nothing else is left either
    assert layer.weight.is_meta


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_logits_that_are_changed_afterwards_are_the_model_s_own(family):
    with pytest.raises(NoOutputLayer, match="scales or caps"):
        output_layer(build_model(ModelConfig(config=small_config(family))))


def test_a_model_of_one_s_own_has_its_logits():
    with pytest.raises(NoOutputLayer, match="Linear names no linear output layer"):
        output_layer(nn.Linear(2, 2))


def test_a_layer_in_a_shard_unit_is_not_there_when_the_model_has_returned():
    model = build_model(ModelConfig(config=small_config("qwen3")))
    with pytest.raises(NoOutputLayer, match=r"model\.shard_units"):
        output_layer(model, [*model.model.layers, model.lm_head])
    assert isinstance(output_layer(model, list(model.model.layers)).weight, torch.nn.Parameter)
