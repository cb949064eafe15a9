"""Optimizers of this package on one rank, beside those of torch."""

import copy

import pytest
import torch
from torch import nn

from areal_ray.config import AdapterConfig, ConfigError, OptimConfig, ParameterGroupConfig, load
from areal_ray.engine.optim import build_optimizer
from areal_ray.engine.optim.muon import outer_matrices
from areal_ray.models import build_adapted

pytestmark = pytest.mark.unit


class Tiny(nn.Module):
    """An embedding, matrices wide and tall, norms, and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.wide, self.norm, self.tall = nn.Linear(6, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 9)
        self.experts = nn.Parameter(torch.randn(2, 9, 5))
        self.head = nn.Linear(5, 11, bias=False)

    def forward(self, ids):
        hidden = self.tall(self.norm(self.wide(self.table(ids)))).tanh()
        return self.head(torch.einsum("...i,eij->...j", hidden, self.experts))

    def get_output_embeddings(self):
        return self.head


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny()


def step(model, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    logits = model(torch.arange(8) % 5)
    nn.functional.cross_entropy(logits, torch.arange(8) % 3).backward()
    for optimizer in optimizers:
        optimizer.step()


def furthest(one, other):
    return max(float((p - q).detach().abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_takes_the_steps_of_torch_s_muon_and_adamw_takes_the_rest(model, adjust):
    other = copy.deepcopy(model)
    args = {"momentum": 0.8, "adjust_lr_fn": adjust, "precision": "bfloat16"}
    config = OptimConfig(name="muon", args=args, lr=0.02, weight_decay=0.3)
    mine = build_optimizer(model, config)
    hidden = [other.wide.weight, other.tall.weight]
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.3, momentum=0.8, adjust_lr_fn=adjust)
    rest = [p for p in other.parameters() if all(p is not each for each in hidden)]
    decays = [{"params": [p], "weight_decay": 0.3 if p.ndim >= 2 else 0.0} for p in rest]
    adamw = torch.optim.AdamW(decays, lr=0.02, betas=config.betas, eps=config.eps, fused=True)
    for _ in range(4):
        step(model, mine)
        step(other, muon, adamw)
    assert furthest(model, other) == 0
    assert furthest(model, Tiny()) > 0.01


def test_muon_is_told_what_else_adamw_takes(model):
    optimizer = build_optimizer(model, OptimConfig(name="muon", args={"adamw": ["tall"]}))
    with_muon = [p for p, state in optimizer.state.items() if "momentum_buffer" in state]
    assert [p is model.wide.weight for p in with_muon] == [True]


def test_muon_orthogonalises_in_the_precision_of_the_model_unless_it_is_told_another(model):
    def after(of_model, **args):
        network = copy.deepcopy(model)
        optimizer = build_optimizer(network, OptimConfig(name="muon", args=args, lr=0.02), precision=of_model)
        step(network, optimizer)
        return network

    exact, rough = after("float32"), after("bfloat16")
    assert 0 < furthest(exact, rough) < 0.2 * furthest(exact, model)
    assert furthest(rough, after("float32", precision="bfloat16")) == 0


@pytest.mark.parametrize(
    "args", [{}, {"beta2_decay": -0.5, "eps": [1e-6, 0.01], "d": 2.0}], ids=["usual", "other arguments"]
)
def test_adafactor_takes_the_steps_of_torch_s(model, args):
    other = copy.deepcopy(model)
    mine = build_optimizer(model, OptimConfig(name="adafactor", args=args, lr=0.3, weight_decay=0.1))
    decays = [{"params": [p], "weight_decay": 0.1 if p.ndim >= 2 else 0.0} for p in other.parameters()]
    right = torch.optim.Adafactor(decays, lr=0.3, **{**args, "eps": tuple(args.get("eps", (None, 1e-3)))})
    first = copy.deepcopy(model)
    for _ in range(4):
        step(model, mine)
        step(other, right)
    assert furthest(model, other) < 1e-5 < 0.1 < furthest(model, first)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert {k: v.shape for k, v in mine.state[p].items()} == {k: v.shape for k, v in right.state[q].items()}


@pytest.mark.parametrize("args", [{}, {"momentum": 0}, {"nesterov": True}], ids=["usual", "no momentum", "nesterov"])
def test_sgd_takes_the_steps_of_torch_s(model, args):
    other = copy.deepcopy(model)
    mine = build_optimizer(model, OptimConfig(name="sgd", args=args, lr=0.3, weight_decay=0.0))
    right = torch.optim.SGD(other.parameters(), lr=0.3, **{"momentum": 0.9, **args})
    for _ in range(3):
        step(model, mine)
        step(other, right)
    assert furthest(model, other) == 0


@pytest.mark.parametrize("name", ["muon", "adafactor", "sgd"])
def test_the_state_is_there_before_the_first_step_and_a_step_adds_nothing(model, name):
    optimizer = build_optimizer(model, OptimConfig(name=name))
    before = {p: {key: value.shape for key, value in state.items()} for p, state in optimizer.state.items()}
    assert set(before) == set(model.parameters())
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    step(model, optimizer)
    assert {p: {key: value.shape for key, value in s.items()} for p, s in optimizer.state.items()} == before


@pytest.mark.parametrize("name", ["muon", "adafactor", "sgd"])
def test_groups_set_rate_and_decay_and_a_parameter_without_a_gradient_stays(model, name):
    groups = [ParameterGroupConfig("wide", lr_scale=0.0, weight_decay=0.0)]
    optimizer, first = build_optimizer(model, OptimConfig(name=name, groups=groups)), copy.deepcopy(model)
    model.norm.bias.requires_grad_(False)
    step(model, optimizer)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, first.get_parameter(name))}
    assert changed == {"table.weight", "norm.weight", "tall.weight", "tall.bias", "experts", "head.weight"}


@pytest.mark.parametrize(
    ("name", "args", "key", "part"),
    [
        ("muon", {"ns_step": 5}, "optim.args", "unexpected keyword argument 'ns_step'"),
        ("muon", {"adjust_lr_fn": "none"}, "optim.args", "none is not supported"),
        ("muon", {"precision": "float16"}, "optim.args.precision", "bfloat16 or float32"),
        ("muon", {"adamw": ["nowhere"]}, "optim.args.adamw", "found in no parameter's name"),
        ("muon", {"adamw": ["weight"]}, "optim.name", "no matrix of a hidden layer"),
        ("adafactor", {"d": 0.5}, "optim.args", "should be >= 1"),
        ("adafactor", {"eps": 1e-3}, "optim.args", "adafactor failed"),
        ("sgd", {"nesterov": True, "momentum": 0}, "optim.args", "requires a momentum"),
        ("adamw", {"betas": 1}, "optim.args", "unexpected keyword"),
    ],
)
def test_arguments_that_they_do_not_take_are_config_errors(model, name, args, key, part):
    with pytest.raises(ConfigError, match=part) as caught:
        build_optimizer(model.to("meta"), OptimConfig(name=name, args=args))
    assert caught.value.key == key


def test_a_head_that_an_adapter_trains_whole_goes_to_adamw():
    pytest.importorskip("peft")
    args = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    untied = load("conf/experiments/tiny.yaml", ["model.config.tie_word_embeddings=false"]).model
    adapted, _ = build_adapted(untied, AdapterConfig("lora", args))
    (head,) = [p for name, p in adapted.named_parameters() if "lm_head" in name and p.requires_grad]
    assert any(head is each for each in outer_matrices(adapted))
