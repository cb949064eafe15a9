"""The schedule's values, and an optimizer whose state is there from the beginning and changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from areal_ray.checkpoint.tree import flatten
from areal_ray.config import ConfigError, OptimConfig, ParameterGroupConfig
from areal_ray.engine.optim import LrSchedule, build_optimizer, freeze, parameter_groups, skips_on_device
from areal_ray.engine.state import DCPState, plain_group_values

pytestmark = pytest.mark.unit


def rates(config, steps, count):
    schedules = [LrSchedule(config, steps) for _ in range(count)]
    for step, schedule in enumerate(schedules):
        schedule.load_state_dict({"step": step})
    return [schedule.lr(config.lr) for schedule in schedules]


def test_warmup_rises_in_equal_steps_to_the_full_rate():
    values = rates(OptimConfig(lr=1.0, warmup_steps=4), 12, 5)
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_over_the_middle_to_the_smallest_rate_and_stays_there():
    values = rates(OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1), 12, 20)
    assert values[4] == 2.0
    assert values[6] == pytest.approx(2.0 * (0.1 + 0.9 * (0.5 + math.sqrt(0.125))))
    assert values[8] == pytest.approx(1.1)
    assert values[12] == pytest.approx(0.2)
    assert values[13:] == [values[12]] * 7
    assert values[4:13] == sorted(values[4:13], reverse=True)


def test_cosine_without_warmup_begins_at_the_full_rate():
    assert rates(OptimConfig(lr=3.0), 10, 1) == [3.0]


def test_constant_stays_after_warmup():
    assert rates(OptimConfig(lr=1.0, warmup_steps=2, schedule="constant"), 4, 7) == [0.5] + [1.0] * 6


def test_a_line_falls_in_equal_steps_to_the_smallest_rate():
    values = rates(OptimConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.2, schedule="linear"), 10, 12)
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2])


def test_warmup_stable_decay_falls_at_the_end_alone_and_a_longer_run_has_the_same_rates_before():
    config = OptimConfig(lr=1.0, warmup_steps=2, decay_steps=4, min_lr_ratio=0.0, schedule="wsd")
    values = rates(config, 10, 11)
    assert values == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates(config, 20, 17)[:7] == values[:7]
    assert rates(OptimConfig(lr=1.0, min_lr_ratio=0.0, schedule="wsd"), 25, 25)[21:] == pytest.approx(
        [1, 1, 2 / 3, 1 / 3]
    )


def test_a_schedule_goes_on_where_its_state_was():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    first, second = LrSchedule(config, 12), LrSchedule(config, 12)
    first.step = 7
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"step": 7, "lr": first.lr(1.0)}
    assert second.lr(3.0) == first.lr(3.0) != LrSchedule(config, 12).lr(3.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    nn.init.normal_(model[1].weight)
    return model


def test_the_state_is_made_at_once_and_stands_at_step_0(model):
    optimizer = build_optimizer(model, OptimConfig())
    assert set(optimizer.state) == set(model.parameters())
    for parameter, state in optimizer.state.items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"].item() == 0
        assert state["exp_avg"].shape == parameter.shape
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_making_the_state_changes_neither_parameters_nor_rates_nor_gradients(model):
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OptimConfig(lr=0.3, weight_decay=0.5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_the_first_step_is_that_of_a_fresh_adamw(model):
    config = OptimConfig(lr=0.3, weight_decay=0.5)
    other = copy.deepcopy(model)
    matrices = [p for p in other.parameters() if p.ndim == 2]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    fresh = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.3,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for network, optimizer in ((model, build_optimizer(model, config)), (other, fresh)):
        network(torch.arange(6.0).view(2, 3)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_only_matrices_decay(model):
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.5,
    }


def test_frozen_parameters_are_left_out(model):
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    assert set(optimizer.state) == {*model[1].parameters(), *model[2].parameters()}


def groups_of(model, *groups, **options):
    """Rate, decay and names of each group."""
    config = OptimConfig(
        lr=2.0, weight_decay=0.5, groups=[ParameterGroupConfig(**group) for group in groups], **options
    )
    freeze(model, config.groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = parameter_groups(model, config)
    return [(each["lr"], each["weight_decay"], [names[p] for p in each["params"]]) for each in found]


def test_groups_by_name_have_rates_and_decays_of_their_own_and_the_first_that_matches_counts(model):
    first, second = {"pattern": r"^0\.", "lr_scale": 0.5}, {"pattern": "weight", "weight_decay": 0.25}
    assert groups_of(model, first, second) == [
        (1.0, 0.5, ["0.weight"]),
        (1.0, 0.0, ["0.bias"]),
        (2.0, 0.25, ["1.weight", "2.weight"]),
        (2.0, 0.0, ["1.bias"]),
    ]


def test_a_frozen_group_is_not_trained(model):
    assert groups_of(model, {"pattern": "bias", "freeze": True}) == [
        (2.0, 0.5, ["0.weight", "2.weight"]),
        (2.0, 0.0, ["1.weight"]),
    ]
    assert not model[0].bias.requires_grad


@pytest.mark.parametrize(
    ("group", "key", "part"),
    [
        ({"pattern": "head"}, "optim.groups[0].pattern", "'head' is found in no parameter's name; .* 0.weight, 0.bias"),
        ({"pattern": ".", "freeze": True}, "optim.groups", "nothing is left"),
    ],
    ids=["matches nothing", "freezes everything"],
)
def test_groups_that_cannot_be_meant_are_refused(model, group, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        groups_of(model, group)
    assert caught.value.key == key


def plain_sgd(groups, momentum=0.0):
    return torch.optim.SGD(groups, lr=7.0, momentum=momentum)


def test_an_optimizer_of_one_s_own_is_given_groups_and_args(model):
    optimizer = build_optimizer(model, OptimConfig(name=f"{__name__}:plain_sgd", args={"momentum": 0.5}, lr=2.0))
    assert [(group["lr"], group["initial_lr"], group["momentum"]) for group in optimizer.param_groups] == [
        (2.0, 2.0, 0.5)
    ] * 2


@pytest.mark.parametrize("name", ["SGD", "NAdam", "Rprop", "ASGD", "RAdam", "Adagrad"])
def test_an_optimizer_of_one_s_own_steps_as_it_would_alone(model, name):
    alone = copy.deepcopy(model)
    optimizer = build_optimizer(model, OptimConfig(name=f"torch.optim:{name}", lr=0.1, weight_decay=0.0))
    fresh = getattr(torch.optim, name)(alone.parameters(), lr=0.1)
    for _ in range(3):
        for network, stepping in ((model, optimizer), (alone, fresh)):
            stepping.zero_grad()
            network(torch.arange(6.0).view(2, 3)).square().sum().backward()
            stepping.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))


class Counting(torch.optim.Optimizer):
    """Counts its steps in its groups, as schedule-free optimizers do; each step is as long as the count says."""

    def __init__(self, groups):
        super().__init__(groups, {"k": 0, "rho": 0.5})

    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["sum"] = state.get("sum", torch.zeros_like(parameter)) + parameter.grad
                    parameter.data.add_(state["sum"], alpha=-group["lr"] * group["k"])


def test_numbers_that_an_optimizer_keeps_in_its_groups_and_state_that_it_lacks_come_back(model):
    config = OptimConfig(name=f"{__name__}:Counting", lr=0.01)
    model.add_module("unused", nn.Linear(2, 2))

    def step(network, optimizer):
        network[:3](torch.arange(6.0).view(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = build_optimizer(model, config)
    state = DCPState(model, first, group_values=plain_group_values(first))
    assert "optim_groups" not in state.state_dict()
    step(model, first)
    saved = copy.deepcopy(state.state_dict())
    assert saved["optim_groups"] == {"0": {"k": 1}, "1": {"k": 1}}
    other = copy.deepcopy(model)
    second = build_optimizer(other, config, restored=True)
    restored = DCPState(other, second, group_values=plain_group_values(second))
    assert "optim.unused.weight.sum" in flatten(restored.state_dict())[0]
    restored.expect({name for name in flatten(saved)[0]})
    restored.load_state_dict(saved)
    step(model, first)
    step(other, second)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert flatten(restored.state_dict())[0].keys() == flatten(state.state_dict())[0].keys()
    restored.load_state_dict(saved)  # a rollback
    assert second.param_groups[0]["k"] == 1


@pytest.mark.parametrize(
    ("name", "args", "key", "part"),
    [
        (f"{__name__}:nothing", {}, "optim.name", "has no nothing"),
        (f"{__name__}:plain_sgd", {"rho": 1}, "optim.args", "unexpected keyword argument 'rho'"),
        ("builtins:list", {}, "optim.name", "returned list, no torch.optim.Optimizer"),
        ("builtins:__doc__", {}, "optim.name", "cannot be called"),
        ("torch.optim:LBFGS", {}, "optim", "parameter groups|closure"),
    ],
    ids=["missing", "wrong arguments", "no optimizer", "no function", "takes a closure"],
)
def test_an_optimizer_that_cannot_be_made_is_a_config_error(model, name, args, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        build_optimizer(model, OptimConfig(name=name, args=args))
    assert caught.value.key.startswith(key)


def test_a_schedule_multiplies_each_rate():
    schedule = LrSchedule(OptimConfig(lr=1.0, warmup_steps=4), 12)
    assert [schedule.lr(base) for base in (1.0, 8.0)] == [0.25, 2.0]


def test_a_model_without_vectors_has_one_group():
    assert len(build_optimizer(nn.Linear(3, 2, bias=False), OptimConfig()).param_groups) == 1


class OldConvention(torch.optim.SGD):
    """Says that it scales gradients itself, and wants to be told by an argument."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None): ...


def test_which_optimizers_can_be_told_on_the_device_to_change_nothing():
    weight = [nn.Parameter(torch.ones(2))]
    assert skips_on_device(build_optimizer(nn.Linear(2, 2), OptimConfig()))
    assert skips_on_device(torch.optim.SGD(weight, fused=True))
    for other in (torch.optim.SGD(weight), torch.optim.AdamW(weight), OldConvention(weight)):
        assert not skips_on_device(other)
