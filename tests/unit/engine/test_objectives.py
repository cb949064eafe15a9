"""Objectives of one's own, and the sums of their metrics."""

import pytest
import torch

from areal_ray.config import ConfigError, ObjectiveConfig
from areal_ray.engine import Objective
from areal_ray.engine.metric_sums import MetricSums
from areal_ray.engine.objectives import LanguageModeling, build_objective, labels_of, next_token_loss, predicted_tokens

pytestmark = pytest.mark.unit


class Named(LanguageModeling):
    def __init__(self, *metrics):
        self.metrics = metrics


def make(metric):
    return Named(metric)


def test_the_objective_is_the_one_that_is_named():
    assert isinstance(build_objective(ObjectiveConfig()), LanguageModeling)
    assert build_objective(ObjectiveConfig(f"{__name__}:make", {"metric": "accuracy"})).metrics == ("accuracy",)


def test_a_regularised_loss_says_the_plain_one_beside_other_metrics():
    class Own(LanguageModeling):
        metrics = ("accuracy",)

    assert (Own().metrics, Own(z_loss=0.1).metrics) == (("accuracy",), ("accuracy", "nll"))
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    loss, values = LanguageModeling(label_smoothing=0.5).loss(torch.zeros(1, 3, 4), batch)
    assert float(values["nll"]) == pytest.approx(float(torch.tensor(4.0).log()))
    assert LanguageModeling().loss(torch.zeros(1, 3, 4), batch) == (loss, {})  # of even logits all of them are the same


@pytest.mark.parametrize("metric", ["loss", "step", "grad_norm", "held_out_loss", "held_out_accuracy"])
def test_a_metric_that_every_run_has_is_refused(metric):
    with pytest.raises(ConfigError, match=f"`{metric}` is the name of a metric that there is already"):
        build_objective(ObjectiveConfig(f"{__name__}:make", {"metric": metric}))


def test_an_abstract_objective_is_refused():
    with pytest.raises(ConfigError, match="abstract"):
        build_objective(ObjectiveConfig("areal_ray.engine:Objective"))
    assert issubclass(Named, Objective)


def test_a_metric_is_a_mean_over_the_parts_that_have_it():
    sums = MetricSums(["a", "b"], torch.device("cpu"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sums.add({"a": torch.tensor(1.0, requires_grad=True)}, torch.tensor(1.0))
        sums.add({"a": 4.0}, torch.tensor(2.0))
        sums.add({}, torch.tensor(5.0))
        means = sums.means(None)
    finally:
        torch.distributed.destroy_process_group()
    assert {name: float(value) for name, value in means.items()} == {"a": 3.0, "b": 0.0}


def test_a_metric_that_was_not_announced_is_an_error():
    with pytest.raises(ValueError, match="gives `c`, which is not among its `metrics`"):
        MetricSums(["a"], torch.device("cpu")).add({"c": 1.0}, torch.tensor(1.0))


def test_labels_are_those_of_the_batch_or_the_next_attended_tokens():
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert labels_of({"input_ids": ids, "attention_mask": mask}).tolist() == [[6, 7, -100, -100]]
    own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[-100, 7, 8, -100]])}
    assert int(predicted_tokens(own)) == 2
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits[0, 1:3], torch.tensor([7, 8]))
    assert torch.allclose(next_token_loss(logits, own), expected)


def test_without_a_mask_all_tokens_are_attended():
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(
        labels_of({"input_ids": ids}), labels_of({"input_ids": ids, "attention_mask": ids.new_ones(1, 4)})
    )
    assert int(predicted_tokens({"input_ids": ids})) == 3
