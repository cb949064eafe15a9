"""Tokenizers of others are data, never code."""

import io
import json
import sys

import pytest

from areal_ray.config import ConfigError
from areal_ray.data import build_tokenizer

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
