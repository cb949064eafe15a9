"""What torch's own tools, and accelerate, make of a checkpoint."""

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from areal_ray.checkpoint import save
from areal_ray.config import ModelConfig
from areal_ray.distributed import Ranks
from areal_ray.engine.state import DCPState
from areal_ray.models import build_model, init_weights, materialise
from areal_ray.storage import LocalStorage

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:torch.distributed is")]

TIED = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}


def tied_model(seed):
    model = build_model(ModelConfig(config=TIED))
    materialise(model, torch.device("cpu"))
    init_weights(model, seed)
    return model


def same(found, model):
    wanted = get_model_state_dict(model)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def trained():
    model = tied_model(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return DCPState(model, optimizer)


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory):
    directory = LocalStorage(tmp_path_factory.mktemp("saved") / "step")
    save(directory, {"engine": trained}, {}, Ranks())
    return directory.location


def test_the_model_is_read_into_what_torch_gives_of_a_tied_one(trained, path):
    other = tied_model(seed=1)
    state = get_model_state_dict(other)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < state.keys()
    dcp.load({"engine": {"model": state}}, checkpoint_id=path, no_dist=True)
    assert same(state, trained.model)


def test_the_model_is_read_by_its_key(trained, path):
    found = _load_state_dict_from_keys("engine.model", checkpoint_id=path)
    assert found.keys() == {"engine"}
    assert found["engine"].keys() == {"model"}
    assert same(found["engine"]["model"], trained.model)


def test_it_is_nested_again_in_a_file_of_torch(trained, path, tmp_path):
    dcp_to_torch_save(path, tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=True)["engine"]
    assert same(found["model"], trained.model)
    assert found["optim"].keys() == {name for name, _ in trained.model.named_parameters()}
    assert found["optim"]["model.norm.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_accelerate_does_not_take_the_optimizer_for_weights(path, tmp_path):
    fsdp_utils = pytest.importorskip("accelerate.utils.fsdp_utils")
    with pytest.raises((ValueError, TypeError, AttributeError)):
        fsdp_utils._distributed_checkpoint_to_merged_weights(path, str(tmp_path))
    assert not list(tmp_path.iterdir())
