"""Rules for first values, recorded and done to a tensor block by block; and large parameters that are drawn so."""

import math

import pytest
import torch
from torch import nn

from areal_ray.models import init, initial_parts
from areal_ray.models.recorded_rule import NeedsWholeTensor, StandIn, recording

pytestmark = pytest.mark.unit

SHAPE = (300, 40)


def drawn(rule, shape=SHAPE, seed="0"):
    """A tensor to which a rule was done in parts."""
    stand_in = StandIn.of(torch.empty(shape))
    with recording():
        rule(nn.Parameter(stand_in))
    assert stand_in.is_set
    tensor = torch.full(shape, torch.nan)
    initial_parts.draw_part(tensor, stand_in, seed)
    return tensor


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(initial_parts, "BLOCK", 512)  # 12 rows


def by_hand(weight):
    """As trunc_normal_ was before torch 2.13, without a single value read."""
    with torch.no_grad():
        weight.uniform_(-0.9, 0.9).erfinv_().mul_(0.02 * math.sqrt(2)).add_(1.0).clamp_(min=-1, max=3)


@pytest.mark.parametrize(
    ("rule", "mean", "std"),
    [
        (lambda w: nn.init.normal_(w, 0.5, 0.02), 0.5, 0.02),
        (lambda w: nn.init.uniform_(w, -1, 3), 1.0, 4 / math.sqrt(12)),
        (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), 0.0, 1 / math.sqrt(3 * SHAPE[1])),
        (lambda w: nn.init.xavier_normal_(w), 0.0, math.sqrt(2 / sum(SHAPE))),
        (lambda w: nn.init.trunc_normal_(w, 0.0, 0.02, -0.04, 0.04), 0.0, 0.0176),
        (by_hand, 1.0, 0.01579),
        (lambda w: nn.init.ones_(w), 1.0, 0.0),
        (lambda w: w.data.normal_().mul_(0.1), 0.0, 0.1),
        (lambda w: w.data.view(-1).normal_(), 0.0, 1.0),
    ],
)
def test_values_are_those_of_the_rule(rule, mean, std):
    values = drawn(rule)
    assert values.mean() == pytest.approx(mean, abs=max(3 * std / math.sqrt(values.numel()), 1e-6))
    assert values.std() == pytest.approx(std, rel=0.03)
    assert len(torch.unique(values[:, 0])) in (1, SHAPE[0])  # no block is like another
    assert torch.equal(values, drawn(rule))
    if std:
        assert not torch.equal(values, drawn(rule, seed="1"))
        assert torch.corrcoef(values)[0, 1:].abs().max() < 0.8


def test_bounds_are_kept():
    values = drawn(lambda w: nn.init.trunc_normal_(w, 0.0, 1.0, -0.5, 0.25))
    assert (values.min(), values.max()) == (pytest.approx(-0.5, abs=0.01), pytest.approx(0.25, abs=0.01))


def test_rows_of_a_padding_token_and_groups_of_rows_are_found_in_their_blocks():
    def rule(weight):
        nn.init.normal_(weight)
        nn.init.zeros_(weight[17])
        nn.init.constant_(weight[100:130], 3.0)
        for third, value in zip(weight.data[150:].chunk(3), (1.0, 2.0, 4.0), strict=True):
            third.fill_(value)

    values = drawn(rule)
    assert (values[17] == 0).all()
    assert (values[100:130] == 3).all()
    assert [float(values[row].unique()) for row in (150, 199, 200, 249, 250, 299)] == [1, 1, 2, 2, 4, 4]
    assert (values[[0, 16, 18, 99, 130, 149]] != 0).all()


@pytest.mark.parametrize("shape", [(5000,), (7, 11, 13), (2, 3000), (700, 1)])
def test_any_shape_is_a_number_of_rows(shape):
    values = drawn(lambda w: nn.init.normal_(w), shape)
    assert len(values.unique()) > 0.999 * values.numel()
    assert abs(values.std() - 1) < 0.1


@pytest.mark.parametrize(
    "rule",
    [
        nn.init.orthogonal_,
        lambda w: w.data.copy_(torch.ones(SHAPE)),
        lambda w: w.data.mul_(1 / w.data.norm()),
        lambda w: w.data[:, 3].zero_(),
        lambda w: w.data.t().normal_(),
        lambda w: w.data.normal_() if float(w.data[0, 0]) > 0 else w.data.zero_(),
        lambda w: nn.init.normal_(w, generator=torch.Generator()),
        lambda w: w.data.add_(torch.ones(SHAPE)),
        lambda w: w.data.random_(),
        lambda w: w.data.view(torch.int32).fill_(1),
        lambda w: w.data.tril_(),
        lambda w: w.data.numpy().fill(1.0),
    ],
)
def test_a_rule_that_cannot_be_done_in_parts_is_refused(rule):
    with pytest.raises((NeedsWholeTensor, RuntimeError)), recording():
        rule(nn.Parameter(StandIn.of(torch.empty(SHAPE))))


def test_what_is_not_set_is_seen():
    for rule in (lambda w: None, lambda w: w.data[:5].zero_(), lambda w: w.data.mul_(2.0)):
        stand_in = StandIn.of(torch.empty(SHAPE))
        rule(nn.Parameter(stand_in))
        assert not stand_in.is_set


class Tower(nn.Module):
    """Layers of all kinds: large and small ones, one with a rule of its own, and one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(70, 40, padding_idx=3)
        self.linear, self.norm = nn.Linear(40, 80), nn.LayerNorm(40)
        self.own, self.head = Own(), nn.Linear(40, 70, bias=False)
        self.head.weight = self.embed.weight


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(50, 40))
        self.register_buffer("scale", torch.empty(40))

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.constant_(self.scale, 2.0)


def test_small_parameters_and_rules_that_look_at_values_have_the_bits_that_they_always_had(monkeypatch):
    model, small = Tower(), Tower()
    init.init_weights(small, 0)
    monkeypatch.setattr(init, "LARGE", 2000)
    init.init_weights(model, 0)
    assert torch.equal(model.own.weight, small.own.weight)
    assert (model.own.scale == 2.0).all()
    assert torch.equal(model.norm.weight, small.norm.weight)
    for name in ("embed", "linear"):
        mine, other = getattr(model, name).weight.detach(), getattr(small, name).weight.detach()
        assert not torch.equal(mine, other)
        assert mine.std() == pytest.approx(float(other.std()), rel=0.05)
    assert (model.embed.weight[3] == 0).all()
    assert (model.embed.weight[:3] != 0).all()
    assert torch.isfinite(model.linear.bias).all()
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed.weight, nn.Parameter)
    assert type(model.embed.weight) is nn.Parameter


def test_buffers_beside_large_parameters_are_set_without_drawing(monkeypatch):
    monkeypatch.setattr(init, "LARGE", 1)
    monkeypatch.setattr(init, "draw_part", lambda *_: pytest.fail("drawn"))
    model = Tower()
    init.init_buffers(model)
    assert (model.own.scale == 2.0).all()


def test_a_large_parameter_that_nothing_sets_is_named(monkeypatch):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(30, 4)), nn.Parameter(torch.ones(30, 4))

        def reset_parameters(self):
            nn.init.ones_(self.a)

    monkeypatch.setattr(init, "LARGE", 10)
    with pytest.raises(ValueError, match=r"inner\.b: the init"):
        init.init_weights(nn.ModuleDict({"inner": Half()}), 0)


def test_threads_do_not_change_values(monkeypatch):
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(initial_parts, "_free_cores", lambda threads=threads: threads)
        found.append(drawn(lambda w: nn.init.normal_(w)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
