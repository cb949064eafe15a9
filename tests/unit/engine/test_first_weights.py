"""First weights from what others wrote: found, renamed, compared with the model, and read without running a pickle."""

import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM

from areal_ray.checkpoint import Catalog, save
from areal_ray.checkpoint.format.torch_item import NoTensor, find_tensor
from areal_ray.config import ConfigError, ModelConfig, NameConfig
from areal_ray.distributed import Ranks
from areal_ray.engine.first_weights import as_before, examine, resolve, source_of
from areal_ray.engine.state import DCPState
from areal_ray.models import (
    architecture,
    build_model,
    hf_weights,
    init_buffers,
    init_weights,
    materialise,
    merged_adapter,
)
from areal_ray.models.merged_adapter import MergedAdapter
from areal_ray.storage import LocalStorage

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:torch.distributed is")]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
IDS = torch.arange(12).view(1, 12)
Q = "model.layers.0.self_attn.q_proj"


def drawn(config, seed=0):
    model = build_model(config)
    materialise(model, torch.device("cpu"))
    init_weights(model, seed)
    return model


def begun(model, said=None):
    """The model of a configuration with its first weights, as the driver settles it and a worker reads it."""
    said = [] if said is None else said
    model = examine(resolve(model, said.append).model, said.append, Ranks())
    found = build_model(model)
    materialise(found, torch.device("cpu"))
    source = source_of(model)
    if source.allow_missing:
        init_weights(found, seed=9)
    else:
        init_buffers(found)
    hf_weights.load_weights(source, found, build_model(model), Ranks())
    return found


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(model):
    with pytest.raises(ConfigError) as caught:
        begun(model)
    assert "\n" not in str(caught.value)
    return caught.value.key, str(caught.value)


@pytest.fixture(scope="module")
def model():
    return drawn(ModelConfig(config=LLAMA))


@pytest.fixture(scope="module")
def root(tmp_path_factory, model):
    """What others, and this package, have written of one model."""
    root = tmp_path_factory.mktemp("first")
    model.save_pretrained(root / "hf")
    weights = model.state_dict()
    dcp.save(weights, checkpoint_id=root / "plain", no_dist=True)
    # As torchtitan's, with names of its own, an optimizer and pickled objects.
    named = {re.sub(r"^model\.", "net.", name).replace("lm_head", "output"): tensor for name, tensor in weights.items()}
    moments = {f"{name}.exp_avg": torch.ones_like(tensor) for name, tensor in named.items()}
    titan = {**named, "optimizer": {"state": moments}, "train_state": {"step": 3, "when": "now"}}
    dcp.save(titan, checkpoint_id=root / "titan" / "step-3", no_dist=True)
    # As Ray's tutorial has it.
    optimizer = torch.optim.AdamW(model.parameters())
    dcp.save({"app": {"model": weights, "optim": optimizer.state_dict()}}, checkpoint_id=root / "ray", no_dist=True)
    (root / "run").mkdir()
    for step in (1, 2):
        info = {"step": step, "attempt": 1, "hf_config": architecture(ModelConfig(config=LLAMA)), "tokenizer": "bytes"}
        directory = LocalStorage(root / "run").sub(Catalog.name(step, 1))
        save(directory, {"engine": DCPState(model, optimizer)}, info, Ranks())
    os.remove(root / "run" / Catalog.name(2, 1) / "shard-00000.distcp")  # the newest good one is the first
    return root


BESIDE = {
    "plain": {},
    "titan/step-3": {
        "names": [NameConfig(r"^net\.(?=layers|norm|embed)", "model."), NameConfig("^output", "lm_head")],
        "allow_unused": [r"^optimizer\."],
    },
    "ray": {"names": [NameConfig(r"^app\.model\.")], "allow_unused": [r"^app\.optim\."]},
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_directory_of_dcp_is_read_by_the_names_of_modules(root, model, name):
    assert same(begun(ModelConfig(config=LLAMA, path=str(root / name), **BESIDE[name])), model)


@pytest.mark.parametrize("name", ["hf", "run", f"run/{Catalog.name(1, 1)}"])
def test_what_says_which_model_it_is_needs_no_config(root, model, name):
    said = []
    assert same(begun(ModelConfig(path=str(root / name)), said), model)
    assert said == ([f"first weights: those of {Catalog.name(1, 1)} in {root}/run"] if name == "run" else [])


def test_what_is_missing_or_unused_is_an_error_unless_allowed(root, model):
    path = str(root / "titan" / "step-3")
    key, text = refused(ModelConfig(config=LLAMA, path=path))
    assert key == "model.path"
    assert "model.embed_tokens.weight is missing" in text
    renamed = replace(ModelConfig(config=LLAMA, path=path), names=BESIDE["titan/step-3"]["names"])
    assert "optimizer.state.net.embed_tokens.weight.exp_avg is unknown here" in refused(renamed)[1]
    three = {**LLAMA, "num_hidden_layers": 3}
    plain = ModelConfig(config=three, path=str(root / "plain"))
    assert "model.layers.2.self_attn.q_proj.weight is missing" in refused(plain)[1]
    said = []
    found = begun(replace(plain, allow_missing=[r"layers\.2\."]), said).state_dict()
    (line,) = said
    assert line.startswith(f"not in {root}/plain, drawn from run.seed: 9 (model.layers.2.")
    drawn_all = drawn(ModelConfig(config=three), seed=9).state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, drawn_all[name] if "layers.2." in name else model.state_dict()[name])


def test_mistakes_are_one_line(root, tmp_path):
    here = ModelConfig(config=LLAMA)
    assert refused(replace(here, path=str(root / "titan")))[1].endswith("give one of them, step-3 for example")
    key, text = refused(ModelConfig(path=str(root / "plain")))
    assert (key, "give model.config, too" in text) == ("model.config", True)
    assert "found in no name" in refused(replace(here, path=str(root / "plain"), names=[NameConfig("^net")]))[1]
    both = replace(here, path=str(root / "plain"), names=[NameConfig(r"layers\.\d", "layers.0")])
    assert "would both be" in refused(both)[1]
    wide = {**LLAMA, "intermediate_size": 40}
    assert "(24, 16) in it and (40, 16) here" in refused(ModelConfig(config=wide, path=str(root / "plain")))[1]
    (tmp_path / "model.bin").write_bytes(b"")
    assert "is a pickle" in refused(replace(here, path=str(tmp_path)))[1]


def test_no_pickle_is_run(root, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "evil"
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    text = refused(ModelConfig(config=LLAMA, path=str(path)))[1]
    assert "refused, it wants to load posix.mkdir" in text
    torch.save({"a": Evil()}, tmp_path / "item")
    data = (tmp_path / "item").read_bytes()
    with pytest.raises(NoTensor, match=r"refused, it wants to load posix\.mkdir"):
        find_tensor(lambda offset, size: data[offset : offset + size], len(data))
    # Bytes in the place of a tensor, and a file that was cut short.
    for cut in (100, 5000):
        (tmp_path / "cut").mkdir(exist_ok=True)
        for file in (root / "plain").iterdir():
            whole = file.read_bytes()
            (tmp_path / "cut" / file.name).write_bytes(whole[:-cut] if file.suffix else whole)
        with pytest.raises(Exception, match=r"__0_0\.distcp"):
            begun(ModelConfig(config=LLAMA, path=str(tmp_path / "cut")))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(4, 6).t(), torch.tensor(3.5), torch.randn(1000)[10:20], torch.nn.Parameter(torch.randn(5).bfloat16())],
)
def test_a_tensor_is_found_in_what_torch_saves(tmp_path, tensor):
    torch.save(tensor, tmp_path / "item")
    data = (tmp_path / "item").read_bytes()
    item = find_tensor(lambda offset, size: data[offset : offset + size], len(data))
    found = torch.frombuffer(
        bytearray(data), dtype=item.dtype, offset=item.data, count=item.extent // item.dtype.itemsize
    )
    assert torch.equal(found.as_strided(item.shape, item.stride), tensor)


def adapter(path, base, **settings):
    """A LoRA on a model of this size, as peft saves one; what it adds to each weight."""
    path.mkdir()
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    parts = {f"{Q}.lora_A.weight": draw(2, 16), f"{Q}.lora_B.weight": draw(16, 2), "model.norm.weight": draw(16)}
    parts |= {"lm_head.lora_A.weight": draw(4, 16), "lm_head.lora_B.weight": draw(32, 4)}
    save_file({f"base_model.model.{name}": each for name, each in parts.items()}, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "rank_pattern": {"lm_head": 4}, **settings}
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return parts


def test_an_adapter_of_peft_is_added_to_its_base(root, model, tmp_path):
    parts = adapter(tmp_path / "lora", str(root / "hf"))
    said = []
    found = begun(ModelConfig(path=str(tmp_path / "lora")), said).state_dict()
    assert said[0].startswith(f"first weights: those of {root}/hf, which {tmp_path}/lora names as its base")
    wanted = dict(model.state_dict())
    for name, scale in ((Q, 4.0), ("lm_head", 2.0)):
        added = parts[f"{name}.lora_B.weight"] @ parts[f"{name}.lora_A.weight"]
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + scale * added
    wanted["model.norm.weight"] = parts["model.norm.weight"]
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    on_run = begun(ModelConfig(path=str(root / "run"), merge_adapter=str(tmp_path / "lora"))).state_dict()
    assert all(torch.equal(found[name], on_run[name]) for name in found)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_an_adapter_adds_has_the_same_bits_however_it_is_cut(transposed):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 40, generator=generator), torch.randn(24, 16, generator=generator)
    base = torch.randn((40, 24) if transposed else (24, 40), generator=generator)
    pair = merged_adapter._Pair(a, b, 0.5, transposed)
    whole = pair.read(base, tuple((0, size) for size in base.shape))
    product = (b.double() @ a.double()).float() * 0.5
    torch.testing.assert_close(whole, base + (product.T if transposed else product))
    for rows in (1, 2, 3, 5, 8):
        for columns in (1, 7, 24):
            boxes = [
                ((i, min(i + rows, base.shape[0])), (j, min(j + columns, base.shape[1])))
                for i in range(0, base.shape[0], rows)
                for j in range(0, base.shape[1], columns)
            ]
            for box in boxes:
                (i, i_end), (j, j_end) = box
                assert torch.equal(pair.read(base, box), whole[i:i_end, j:j_end]), box


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"peft_type": "IA3"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_is_more_than_a_sum_is_refused(root, tmp_path, settings):
    adapter(tmp_path / "lora", str(root / "hf"), **settings)
    with pytest.raises(ValueError, match="the adapter in"):
        MergedAdapter.read(str(tmp_path / "lora"))
    assert refused(ModelConfig(path=str(root / "hf"), merge_adapter=str(tmp_path / "lora")))[0] == "model.path"


@pytest.mark.parametrize("differing", [True, False])
def test_two_matrices_under_a_config_that_ties_are_taken_as_transformers_does(tmp_path, model, differing):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not differing:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    config = {**architecture(ModelConfig(config=LLAMA)), "tie_word_embeddings": True}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = []
    found = begun(ModelConfig(path=str(tmp_path)), said)
    assert [("NOT tied" in line) for line in said] == [True] * differing
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(found.eval()(IDS).logits, theirs.eval()(IDS).logits)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is not differing
    forced = begun(ModelConfig(path=str(tmp_path), tie=True), said)
    assert forced.lm_head.weight is forced.model.embed_tokens.weight
    assert torch.equal(forced.lm_head.weight, model.model.embed_tokens.weight)


def test_a_run_that_goes_on_keeps_what_was_settled(root):
    first = resolve(ModelConfig(path=str(root / "run")), print).model
    assert first.path == str(root / "run" / Catalog.name(1, 1))
    saved = {"path": first.path, "config": first.config, "merge_adapter": None, "tie": False}
    assert as_before(ModelConfig(path=f"{root}/run"), saved) == replace(first, tie=False)
    assert as_before(ModelConfig(path="/elsewhere"), saved) == ModelConfig(path="/elsewhere", tie=False)
    assert as_before(ModelConfig(path="/models/hf"), {"path": "/models/hf"}) == ModelConfig(path="/models/hf")
    assert as_before(ModelConfig(path="/models"), {"path": "/models/hf"}) == ModelConfig(path="/models")
    in_s3 = {"path": "s3://b/run/step-00000001.a1", "config": LLAMA}
    assert as_before(ModelConfig(path="s3://b/run/"), in_s3) == ModelConfig(path=in_s3["path"], config=LLAMA)


def test_what_was_settled_is_kept_however_the_path_is_written_and_the_model_is_said(root, tmp_path, monkeypatch):
    run = root / "run"
    saved = {"path": str(run / Catalog.name(1, 1)), "config": {}, "merge_adapter": None}
    for said in ({"factory": "mine:make"}, {"config": LLAMA}):  # and not the run's newest checkpoint of now
        assert as_before(ModelConfig(path=str(run), **said), saved) == ModelConfig(path=saved["path"], **said)
    (tmp_path / "link").symlink_to(run)
    assert as_before(ModelConfig(path=str(tmp_path / "link")), saved).path == saved["path"]
    monkeypatch.chdir(root)
    assert as_before(ModelConfig(path="run"), saved).path == saved["path"]
    relative = {"path": f"run/{Catalog.name(1, 1)}", "config": LLAMA, "merge_adapter": "lora"}
    for path in (relative["path"], f"{root}/{relative['path']}"):
        assert as_before(ModelConfig(path=path), relative) == ModelConfig(path=relative["path"], config=LLAMA)
    kept = ModelConfig(path=relative["path"], config=LLAMA, merge_adapter="lora")
    assert as_before(ModelConfig(path="lora"), relative) == kept
    assert as_before(ModelConfig(path=f"{root}/lora"), relative) == kept
