"""Averages of the weights on one rank."""

import pytest
import torch
from torch import nn

from areal_ray.config import EmaConfig
from areal_ray.engine.optim import WeightAverages

pytestmark = pytest.mark.unit


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].weight.requires_grad_(False)
    return model


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def begun(model, **config):
    averages = WeightAverages(model, EmaConfig(**config))
    averages.reset()
    return averages


def values(averages):
    return [sorted(set(tensor.flatten().tolist())) for tensor in averages.tensors.values()]


def test_they_follow_the_weights_that_are_trained_from_the_first_ones_on(model):
    fill(model, 1.0)
    averages, expected = begun(model, decay=0.3, every_steps=2), 1.0
    assert set(averages.tensors) == {"0.weight", "0.bias", "1.bias"}
    for step in range(1, 11):
        fill(model, float(step))
        averages.update(step)
        if step % 2 == 0:
            count = step // 2 - 1
            decay = min(0.3, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * step
        assert values(averages) == [[pytest.approx(expected)]] * 3
    assert decay == 0.3 > (1 + 1) / (10 + 1)


def test_an_update_that_is_refused_on_the_device_changes_no_bit(model):
    averages = begun(model)
    before = {name: tensor.clone() for name, tensor in averages.tensors.items()}
    fill(model, 7.0)
    averages.update(1, torch.tensor(1.0))
    assert all(torch.equal(averages.tensors[name], tensor) for name, tensor in before.items())
    averages.update(1, torch.tensor(0.0))
    refused_never = begun(model)
    for name, tensor in before.items():
        refused_never.tensors[name].copy_(tensor)
    refused_never.update(1)
    assert all(torch.allclose(averages.tensors[name], t, rtol=1e-6) for name, t in refused_never.tensors.items())


def test_they_are_the_weights_for_a_while_also_if_that_fails(model):
    fill(model, 1.0)
    averages = begun(model)
    fill(model, 2.0)
    inside = []

    def look():
        with averages.in_place():
            inside.extend([*model[0].weight.unique().tolist(), *model[1].weight.unique().tolist()])
            raise RuntimeError("a trained one, a frozen one")

    with pytest.raises(RuntimeError, match="a frozen one"):
        look()
    assert inside == [1.0, 2.0]
    assert {value for p in model.parameters() for value in p.unique().tolist()} == {2.0}
    assert values(averages) == [[1.0]] * 3
