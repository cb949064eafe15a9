"""AdamW's state is allocated as torch's own first step would make it."""

import pytest
import torch
from torch import nn

from areal_ray.config import OptimConfig
from areal_ray.engine.optim import build_optimizer, parameter_groups

pytestmark = pytest.mark.unit


def test_the_state_is_what_adamw_makes_in_its_first_step():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False).to(torch.bfloat16))
    allocated = build_optimizer(model, OptimConfig())
    stepped = torch.optim.AdamW(parameter_groups(model, OptimConfig()), lr=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    for parameter in model.parameters():
        mine, own = allocated.state[parameter], stepped.state[parameter]
        assert list(mine) == list(own)
        for name, value in own.items():
            one, other = ((x.shape, x.dtype, x.device, x.stride()) for x in (mine[name], value))
            assert one == other, name
            assert torch.equal(mine[name], value - int(name == "step")), name
