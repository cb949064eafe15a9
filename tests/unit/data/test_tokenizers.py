"""Tokenizers of others are data, never code."""

import io
import json
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from areal_ray.config import ConfigError
from areal_ray.data import build_tokenizer
from areal_ray.data.byte_lengths import byte_lengths

from .tokenizer_files import SPECIAL, save_tokenizer

pytestmark = pytest.mark.unit


def test_code_that_comes_with_a_tokenizer_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    about = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ConfigError, match="cannot load"):
        build_tokenizer(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def merged_tokenizer(folder, tokens):
    """One of bytes with some of them merged; only the tokens with bars or angles are special."""
    path = save_tokenizer(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= {token: number for token, number in tokens.items() if number > 259}
    saved["model"]["merges"] = [["r", "e"], ["re", "t"], ["Ã", "¼"]]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return path


TEXT = "def f(x):\n\treturn 'ü – 字 🙂' \x00  # \r\n"


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "sentencepiece"])
def test_bytes_of_tokens_add_up_to_those_of_the_text(tmp_path, kind):
    if kind == "sentencepiece":
        tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁re", "ret", "x", "字", "</s>"]
        merges = [("▁", "re")]
        model = models.BPE(
            vocab={token: i for i, token in enumerate([*tokens, "r", "e", "t", "re"])},
            merges=[("r", "e"), *merges, ("re", "t")],
            byte_fallback=True,
        )
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        made.add_special_tokens(["</s>"])
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
        tokenizer = build_tokenizer(str(tmp_path))
    else:
        # Merged ones stand for several bytes.
        more = {**SPECIAL, "re": 260, "ret": 261, "Ã¼": 262}
        path = "bytes" if kind == "bytes" else merged_tokenizer(tmp_path, more)
        tokenizer = build_tokenizer(path)
    lengths = byte_lengths(tokenizer)
    ids = tokenizer.encode(TEXT.encode())
    assert lengths[ids].sum() == len(TEXT.encode())  # the end of the text is none of it
    assert lengths[tokenizer.eos_id] == 0
    assert len(lengths) == tokenizer.vocab_size
