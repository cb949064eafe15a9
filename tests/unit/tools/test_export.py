"""Export of a checkpoint: what it names is not loaded unasked."""

import pytest
import torch

from areal_ray.checkpoint import save
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from areal_ray.tools.export import export

pytestmark = pytest.mark.unit


class Box:
    def state_dict(self):
        return {"model": {"w": torch.ones(2)}}

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
