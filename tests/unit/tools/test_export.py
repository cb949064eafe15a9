"""Export of a checkpoint: what it names is not loaded unasked; what it writes is what others serve."""

import json
import sys

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from areal_ray import models
from areal_ray.checkpoint import save
from areal_ray.config import DataConfig, ModelConfig
from areal_ray.data import build_tokenizer
from areal_ray.data.rendering.special import trained_tokens
from areal_ray.distributed import Ranks
from areal_ray.engine.state import DCPState
from areal_ray.models.generation import source_generation
from areal_ray.run import RunDir
from areal_ray.storage import LocalStorage
from areal_ray.tools.export import Form, TokenNames, export
from tests.unit.data.tokenizer_files import save_tokenizer

pytestmark = pytest.mark.unit
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "vocab_size": 264, "num_key_value_heads": 1, "rope_theta": 5e5, **SMALL}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class Own(LlamaForCausalLM):
    config_class = OwnConfig

def make(**args):
    return Own(OwnConfig(**args))
"""


class Box:
    def state_dict(self):
        return {"model": {"w": torch.ones(2), "frozen": torch.zeros(1)}, "ema": {"w": torch.full((2,), 5.0)}}

    def load_state_dict(self, state): ...


class Progress:
    def state_dict(self):
        return {"step": 4, "samples": 32}

    def load_state_dict(self, state): ...


def saved(path, info, config, made=None):
    """A checkpoint of a model with random weights, in a run directory; of one on the meta device if that is given."""
    torch.manual_seed(0)
    made = made or models.build_model(config)
    models.materialise(made, torch.device("cpu"))
    models.init_buffers(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    directory = LocalStorage(path)
    told = {"step": 4, "hf_config": models.architecture(config), "model": {"config": config.config}, **info}
    save(directory, {"engine": DCPState(made), "progress": Progress()}, told, Ranks())
    return directory, made


def out(tmp_path, name="out"):
    return LocalStorage(tmp_path / name)


@pytest.mark.parametrize("name", ["somebody/model", "/etc", "a b"])
def test_a_tokenizer_that_only_the_checkpoint_names_is_not_loaded(tmp_path, name):
    directory = LocalStorage(tmp_path / "checkpoint")
    save(directory, {"engine": Box()}, {"hf_config": {"model_type": "qwen3"}, "tokenizer": name}, Ranks())
    with pytest.raises(ValueError, match="not loaded unasked: give --tokenizer"):
        export(directory, out(tmp_path))
    assert not (tmp_path / "out").exists()
    done = export(directory, out(tmp_path), tokenizer="none")
    assert sorted(done.files) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def test_the_tokens_of_training_are_those_of_config_generation_and_tokenizer(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer")
    data = DataConfig(tokenizer=path, format="messages", chat_template=CHATML)
    serving = {
        "tokens": trained_tokens(data, build_tokenizer(path)),
        "generation": {"temperature": 0.6, "do_sample": True},
    }
    assert serving["tokens"] == {"begins": False, "ends": [259], "chat_template": CHATML}
    directory, _ = saved(tmp_path / "c", {"tokenizer": path, "serving": serving}, ModelConfig(config=LLAMA))
    export(directory, out(tmp_path), tokenizer=path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Llama's own defaults are 1 and 2, which are bytes here.
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, [259, 257])
    assert (config["rope_theta"], config["torch_dtype"]) == (5e5, "float32")  # as older readers look for them
    assert config.get("pad_token_id") is None  # it is an end of text, whose row must go on learning
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == ([259, 257], 256, 257)
    assert (generation.temperature, generation.do_sample) == (0.6, True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.chat_template, tokenizer.pad_token, tokenizer.eos_token) == (CHATML, "</s>", "</s>")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    names = TokenNames(eos="<|im_end|>", pad="<|im_start|>")
    export(directory, out(tmp_path, "own"), form=Form(tokenizer=path, tokens=names))
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (259, 258)
    assert AutoTokenizer.from_pretrained(tmp_path / "own").eos_token == "<|im_end|>"
    with pytest.raises(ValueError, match="no token '<pad>'"):
        export(directory, out(tmp_path, "none"), form=Form(tokenizer=path, tokens=TokenNames(pad="<pad>")))


@pytest.mark.parametrize(("own", "said"), [(False, True), (True, None), (True, False)])
def test_texts_begin_as_in_training(tmp_path, own, said):
    path = save_tokenizer(tmp_path / "tokenizer", bos=own)
    serving = {"tokens": trained_tokens(DataConfig(tokenizer=path, add_bos=said), build_tokenizer(path))}
    directory, _ = saved(tmp_path / "c", {"tokenizer": path, "serving": serving}, ModelConfig(config=LLAMA))
    export(directory, out(tmp_path), tokenizer=path)
    begins = AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [
        256,
        *build_tokenizer(path).ids(b"ab"),
    ]
    assert begins == (own if said is None else said)
    (generation,) = [json.loads((tmp_path / "out" / "generation_config.json").read_text())]
    assert generation["eos_token_id"] == 257


def test_another_precision_is_that_of_files_and_config(tmp_path):
    directory, made = saved(tmp_path / "c", {"tokenizer": "bytes"}, ModelConfig(config=LLAMA))
    export(directory, out(tmp_path), form=Form(dtype="bfloat16"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    expected = {name: value.bfloat16() for name, value in made.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == 256
    with torch.no_grad():
        next(made.parameters())[0, 0] = 1e6
    save(
        LocalStorage(tmp_path / "large"),
        {"engine": DCPState(made)},
        {"hf_config": models.architecture(ModelConfig(config=LLAMA))},
        Ranks(),
    )
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has values that float16 has not"):
        export(LocalStorage(tmp_path / "large"), out(tmp_path, "half"), form=Form(dtype="float16"))
    assert not (tmp_path / "half" / "config.json").exists()


def test_the_card_has_data_steps_losses_and_config(tmp_path):
    run = RunDir(LocalStorage(tmp_path / "run"))
    run.storage.ensure()
    for step in range(0, 9, 2):
        run.log_metrics(step, {"held_out_loss": 5.0 - step / 2, "lr": 0.1})
    run.flush()
    settings = {
        "run": {"name": "mine", "storage_path": "/secret/place"},
        "data": {"source": "text", "paths": ["/books"], "held_out": 0.05, "format": "text"},
        "train": {"seq_len": 8, "steps": 9},
        "optim": {"name": "adamw", "lr": 0.01},
        "cluster": {"env": {"WHERE": "/secret/place"}},
    }
    info = {"tokenizer": "bytes", "config": settings, "metrics": {"loss": 2.5, "held_out_loss": 3.0}}
    directory, _ = saved(tmp_path / "run" / "c", info, ModelConfig(config=LLAMA))
    export(directory, out(tmp_path), run=run)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("# mine", "LlamaForCausalLM", "4 of 9", "32 of 8 tokens", "text, /books", '"lr": 0.01', "| 256 |"):
        assert text in card, text
    assert "| 2 |  | 4.0000 |" in card
    assert "| 4 | 2.5000 | 3.0000 |" in card
    assert "| 6 |" not in card  # the checkpoint is of step 4
    assert "/secret" not in card


def test_a_factory_model_is_exported_by_its_class_when_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    args = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = ModelConfig(factory="own_model:make", args=args)
    made = models.factory_architecture(config)
    assert made["class"] == "own_model:Own"
    directory, model = saved(tmp_path / "c", {"serving": {"factory": made}}, config)
    with pytest.raises(ValueError, match="not run unasked: give --model-class own_model:Own"):
        export(directory, out(tmp_path))
    export(directory, out(tmp_path), form=Form(model_class="own_model:Own"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__module__ != "own_model"  # the copy beside the weights
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    del sys.modules["own_model"]


def test_a_factory_model_of_transformers_needs_no_name(tmp_path):
    values = {"class": "transformers.models.llama.modeling_llama:LlamaForCausalLM"}
    config = ModelConfig(config=LLAMA)
    info = {"hf_config": None, "serving": {"factory": {**values, "config": models.architecture(config)}}}
    directory, _ = saved(tmp_path / "c", info, config)
    export(directory, out(tmp_path))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 264


def test_how_a_pretrained_model_generates_is_recorded(tmp_path):
    assert source_generation(ModelConfig(path=str(tmp_path))) is None
    (tmp_path / "generation_config.json").write_text('{"top_k": 20, "eos_token_id": [1, 2]}')
    assert source_generation(ModelConfig(path=str(tmp_path))) == {"top_k": 20, "eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        source_generation(ModelConfig(path=str(tmp_path)))


def test_weights_of_another_kind_have_no_generation_config_nor_has_what_is_gone(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")  # would be an error, if it were read
    config = {"model_type": "llama"}
    for model in (
        ModelConfig(path="s3://bucket/run/step-00000001.a1", config=config),
        ModelConfig(path=str(tmp_path), config=config),
        ModelConfig(path=str(tmp_path), factory="mine:make"),
        ModelConfig(path=str(tmp_path / "gone")),
    ):
        assert source_generation(model) is None


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


def test_a_card_does_without_what_a_manifest_says_in_another_way(tmp_path):
    parts = {"model": 1, "train": [], "run": "a", "objective": 2, "optim": None}
    for i, data in enumerate(({"mixture": 3}, {"mixture": [4, {"name": 5, "source": 6, "paths": 7}]}, "text")):
        info = {"tokenizer": "bytes", "config": {**parts, "data": data}, "metrics": {"loss": 1}}
        info |= {"serving": {"generation": {"\ud800": 1}}, "versions": {"\ud800": "1"}}
        directory, _ = saved(tmp_path / f"run-{i}", info, ModelConfig(config=LLAMA))
        export(directory, out(tmp_path, f"out-{i}"))
        assert (tmp_path / f"out-{i}" / "README.md").read_text().startswith("---\nlibrary_name")
