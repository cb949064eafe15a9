"""Export of a checkpoint: what it names is not loaded unasked."""

import pytest
import safetensors.torch
import torch

from areal_ray.checkpoint import save
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.tools.export import export

pytestmark = pytest.mark.unit


class Box:
    def state_dict(self):
        return {"model": {"w": torch.ones(2), "frozen": torch.zeros(1)}, "ema": {"w": torch.full((2,), 5.0)}}

    def load_state_dict(self, state): ...


@pytest.mark.parametrize("name", ["somebody/model", "/etc", "a b"])
def test_a_tokenizer_that_only_the_checkpoint_names_is_not_loaded(tmp_path, name):
    directory = LocalStorage(tmp_path / "checkpoint")
    save(directory, {"engine": Box()}, {"hf_config": {"model_type": "qwen3"}, "tokenizer": name}, Ranks())
    with pytest.raises(ValueError, match="not loaded unasked: give --tokenizer"):
        export(directory, LocalStorage(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    done = export(directory, LocalStorage(tmp_path / "out"), tokenizer="none")
    assert sorted(done.files) == ["config.json", "model.safetensors"]


def test_averages_are_exported_on_request(tmp_path):
    directory = LocalStorage(tmp_path / "checkpoint")
    save(directory, {"engine": Box()}, {"hf_config": {"model_type": "qwen3"}}, Ranks())
    for name, ema in (("weights", False), ("averages", True)):
        export(directory, LocalStorage(tmp_path / name), tokenizer="none", ema=ema)
    weights = {
        name: safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("weights", "averages")
    }
    assert {name: w["w"].tolist() for name, w in weights.items()} == {"weights": [1, 1], "averages": [5, 5]}
    assert all(w["frozen"].tolist() == [0] for w in weights.values())


def test_averages_that_a_checkpoint_has_not_are_not_exported(tmp_path):
    class Plain(Box):
        def state_dict(self):
            return {"model": {"w": torch.ones(2)}}

    directory = LocalStorage(tmp_path / "checkpoint")
    save(directory, {"engine": Plain()}, {"hf_config": {"model_type": "qwen3"}}, Ranks())
    with pytest.raises(ValueError, match="no averages of the weights"):
        export(directory, LocalStorage(tmp_path / "out"), tokenizer="none", ema=True)
    assert not (tmp_path / "out").exists()
