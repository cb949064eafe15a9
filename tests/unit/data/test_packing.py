"""Rows of documents: each where it belongs, whole or cut as configured, and apart from the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.dataset import IGNORED
from areal_ray.data.packing import build_rows
from areal_ray.data.packing.whole import best_fit, one_a_row, pieces_of
from areal_ray.engine.objectives import LanguageModeling
from areal_ray.models.masking import unasked

pytestmark = pytest.mark.unit


class Stream:
    """Documents in memory: of document d the tokens are 1000 d, 1000 d + 1, ..."""

    fingerprint, dtype, masked = "stream", np.dtype("<i4"), False

    def __init__(self, lengths, predicted=None):
        self._lengths = np.asarray(lengths)
        self._tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(lengths)])
        self.masked = predicted is not None
        self._predicted = None if predicted is None else np.concatenate(predicted)

    def __len__(self):
        return len(self._tokens)

    def document_lengths(self):
        return self._lengths

    def _read(self, values, begins, length):
        assert (begins >= 0).all()
        assert (begins + length <= len(values)).all()
        return np.stack([values[begin : begin + length] for begin in begins])

    def read(self, begins, length):
        return self._read(self._tokens, begins, length)

    def predicted(self, begins, length):
        return self._read(self._predicted, begins, length)


LENGTHS = [5, 0, 200, 1, 1, 64, 130, 3, 90, 2, 255, 256, 40, 7]


def rows_of(lengths, seq_len=256, predicted=None, **options):
    rows = build_rows(DataConfig(**options), Stream(lengths, predicted), seq_len, "<u2")
    return rows, rows[np.arange(len(rows))] if len(rows) else {}


def documents_in(rows):
    """(document, first token, tokens) of each stretch of rows with position_ids."""
    found = []
    for ids, positions, labels in zip(rows["input_ids"], rows["position_ids"], rows["labels"], strict=True):
        starts = np.flatnonzero(positions == 0)
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            part = ids[begin:end]
            if part.tolist() == [0]:  # padding: there is no document of this one token
                assert labels[begin] == IGNORED
                continue
            assert (part // 1000 == part[0] // 1000).all()
            assert part.tolist() == list(range(part[0], part[0] + len(part)))
            assert labels[begin:end].tolist() == [*part[1:], IGNORED]
            found.append((int(part[0]) // 1000, int(part[0]) % 1000, len(part)))
    return found


def test_concatenated_rows_with_a_mask_have_the_tokens_of_those_without_one():
    rows, masked = rows_of(LENGTHS, document_mask=True)
    plain, unmasked = rows_of(LENGTHS)
    assert (masked["input_ids"] == unmasked["input_ids"]).all()
    assert rows.fingerprint != plain.fingerprint
    stretches = documents_in(masked)
    assert sum(length for _, _, length in stretches) == len(rows) * 256
    assert [d for d, first, _ in stretches if first == 0] == [0, *range(2, 13)]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_documents_stay_whole_and_each_is_there_once(packing):
    rows, content = rows_of(LENGTHS, packing=packing, document_mask=True)
    found = documents_in(content)
    assert sorted(found) == [(d, 0, length) for d, length in enumerate(LENGTHS) if length]
    assert len(rows) == (5 if packing == "best_fit" else 13)


def test_best_fit_fills_rows():
    lengths = np.random.default_rng(0).integers(1, 400, 3000)
    plan = best_fit(pieces_of(lengths, 512, "error"), 512)
    taken = np.add.reduceat(plan.pieces.lengths, plan.bounds[:-1])
    assert taken.max() <= 512
    assert taken.sum() == lengths.sum()
    assert lengths.sum() / (len(taken) * 512) > 0.99
    assert (np.sort(plan.pieces.begins) == np.cumsum(lengths) - lengths).all()


@pytest.mark.parametrize(
    ("truncation", "pieces"),
    [
        ("left", [(0, 3), (9, 4), (13, 4)]),
        ("right", [(0, 3), (3, 4), (13, 4)]),
        ("drop", [(0, 3), (13, 4)]),
        ("split", [(0, 3), (3, 4), (7, 4), (11, 2), (13, 4)]),
    ],
)
def test_what_is_too_long_is_cut_as_configured_and_counted(truncation, pieces):
    found = pieces_of(np.asarray([3, 10, 0, 4]), 4, truncation)
    assert list(zip(found.begins.tolist(), found.lengths.tolist(), strict=True)) == pieces
    assert found.note.startswith("data: 1 of 4 documents are longer than train.seq_len=4 tokens: ")


def test_a_record_that_is_too_long_is_an_error_unless_configured():
    with pytest.raises(ConfigError, match=r"1 of 2 documents .* \(the longest has 300\)") as caught:
        len(rows_of([3, 300], packing="none", format="messages", source="jsonl")[0])
    assert caught.value.key == "data.truncation"
    assert len(rows_of([3, 300], packing="none")[0]) == 3


def test_padding_is_masked_and_rows_are_as_wide_as_they_must_be():
    rows, content = rows_of([5, 70, 200], packing="none")
    assert content["attention_mask"].sum(1).tolist() == [5, 70, 200]
    assert "position_ids" not in content
    assert rows[np.asarray([0])]["input_ids"].shape == (1, 64)
    assert rows[np.asarray([1, 0])]["input_ids"].shape == (2, 128)
    assert content["input_ids"].shape == (3, 256)


def test_only_what_is_predicted_has_labels():
    predicted = [np.asarray([False, True, False, True]), np.asarray([True, True])]
    for options in ({"packing": "none"}, {"packing": "best_fit", "document_mask": True}):
        _, rows = rows_of([4, 2], 8, predicted, **options)
        labels = sorted(rows["labels"][rows["labels"] != IGNORED].tolist())
        assert labels == [1, 3, 1001]


def test_a_preference_is_a_row_of_two_answers():
    predicted = [np.arange(n) >= 2 for n in (5, 4, 70, 3)]
    stream = Stream([5, 4, 70, 3], predicted)
    stream.sequence_lengths = stream.document_lengths
    config = DataConfig(source="jsonl", format="preference", packing="none")
    rows = build_rows(config, stream, 128, "<u2")
    assert len(rows) == 2
    found = rows[np.asarray([1, 0])]
    assert found["input_ids"][:, 0].tolist() == [2000, 0]
    assert found["rejected_input_ids"][:, 0].tolist() == [3000, 1000]
    assert found["rejected_labels"][1, :5].tolist() == [IGNORED, 1002, 1003, IGNORED, IGNORED]
    assert found["rejected_attention_mask"].sum(1).tolist() == [3, 4]
    assert {values.shape for values in found.values()} == {(2, 128)}
    with pytest.raises(ConfigError, match="1 of 4 documents are longer"):
        len(build_rows(config, stream, 64, "<u2"))
    drop = build_rows(replace(config, truncation="drop"), stream, 64, "<u2")
    assert (len(drop), drop.note) == (1, "data: 1 of 2 pairs are longer than train.seq_len=64 tokens: left out")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", ["best_fit", "none", "concatenate"])
@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_packed_documents_have_the_loss_that_each_has_alone(model_type, packing, attention):
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    if model_type == "gpt2":
        sizes = {"vocab_size": 97, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, num_attention_heads=2, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    lengths = [5, 30, 2, 17, 9, 40, 1, 1, 12, 11]
    stream = Stream(lengths)
    stream._tokens = np.random.default_rng(0).integers(0, 97, len(stream))
    rows = build_rows(DataConfig(packing=packing, document_mask=True), stream, 64, "<u2")
    batch = {name: torch.from_numpy(values) for name, values in rows[np.arange(len(rows))].items()}

    def losses(batch):
        inputs = LanguageModeling().model_inputs(batch)
        with torch.no_grad(), unasked(inputs):
            logits = model(**inputs, use_cache=False).logits
        per_token = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=IGNORED
        )
        return per_token[batch["labels"].flatten() != IGNORED]

    alone = []
    starts = (batch["position_ids"] == 0).nonzero().tolist()
    for (row, begin), (next_row, end) in zip(starts, [*starts[1:], (-1, 0)], strict=True):
        part = slice(begin, end if next_row == row else batch["labels"].shape[1])
        alone.append(losses({name: batch[name][row : row + 1, part] for name in ("input_ids", "labels")}))
    together = losses(batch)
    assert len(together) > 60
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_fingerprints_say_how_rows_are_made():
    options = [
        {"packing": packing, "document_mask": mask, "truncation": cut}
        for packing in ("best_fit", "none")
        for mask in (False, True)
        for cut in (None, "left")
    ]
    assert len({rows_of(LENGTHS, **each)[0].fingerprint for each in options}) == 8
    assert one_a_row(pieces_of(np.asarray([1, 2]), 4, "error"), 4).bounds.tolist() == [0, 1, 2]
