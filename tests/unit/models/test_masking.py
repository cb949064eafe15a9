"""A model is given the mask that it needs, and asks the device nothing about masks and positions."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from areal_ray.models.masking import keeps_no_documents_apart, unasked, with_mask

pytestmark = pytest.mark.unit

IDS = torch.arange(8).reshape(2, 4)
ONES = torch.ones_like(IDS)
_READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")


class Reads(TorchFunctionMode):
    """Counts what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or "").rpartition(".")[2]
        if name in _READS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=["qwen3", "llama", "gpt2"])
def model(request):
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if request.param == "gpt2":
        sizes = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0}
    config = AutoConfig.for_model(request.param, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.eval()


def run(model, inputs):
    with Reads() as reads, unasked(inputs):
        return model(**inputs).logits, reads.seen


def test_rows_of_one_document_are_not_asked_about(model):
    (logits, reads), (masked, asked) = (
        run(model, {"input_ids": IDS}),
        run(model, {"input_ids": IDS, "attention_mask": ONES}),
    )
    assert reads == []
    assert asked != []  # else this test sees nothing
    assert torch.equal(logits, masked)  # the same attention, to the bit


def test_positions_of_packed_documents_are_looked_at(model):
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    packed, _ = run(model, {"input_ids": IDS, "position_ids": positions})
    alone, _ = run(model, {"input_ids": IDS[:1, 2:]})
    assert torch.allclose(packed[0, 2:], alone[0], atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        {"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])},
        {"position_ids": torch.arange(4).repeat(2, 1)},
        {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])},
        {"attention_mask": ONES},
    ],
    ids=["packed", "not packed", "padded", "not padded"],
)
def test_on_a_gpu_neither_masks_nor_positions_are_asked_about(model, more, monkeypatch):
    inputs = {"input_ids": IDS, **more}
    expected, asked = run(model, inputs)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    logits, reads = run(model, inputs)
    assert asked != []
    assert reads == []
    assert torch.allclose(logits, expected, atol=1e-6)


def test_transformers_is_what_it_was_afterwards(model):
    before = masking_utils.find_packed_sequence_indices
    with unasked({"input_ids": IDS}):
        assert masking_utils.find_packed_sequence_indices is not before
    assert masking_utils.find_packed_sequence_indices is before
    with pytest.raises(TypeError), unasked({"input_ids": IDS}):
        model(IDS, nonsense=len(1))
    assert masking_utils.find_packed_sequence_indices is before


class Insists(nn.Module):
    def forward(self, input_ids, attention_mask): ...


class Takes(nn.Module):
    def forward(self, input_ids, attention_mask=None): ...


def test_a_mask_is_made_for_a_model_that_insists_on_one():
    made = with_mask(Insists(), {"input_ids": IDS})
    assert torch.equal(made["attention_mask"], ONES)
    assert set(with_mask(Takes(), {"input_ids": IDS})) == {"input_ids"}
    given = {"input_ids": IDS, "attention_mask": 0 * ONES}
    assert with_mask(Insists(), given) is given


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("qwen3", None), ("gpt2", None), ("bloom", "takes no position_ids"), ("mamba", "takes no position_ids")],
)
def test_models_that_cannot_keep_documents_apart_are_known(model_type, why):
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "n_layer": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    found = keeps_no_documents_apart(model)
    assert found is None if why is None else why in found
