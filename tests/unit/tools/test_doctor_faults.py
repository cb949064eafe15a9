"""Things set wrong, one after the other, and the line of `areal-ray doctor` about each: what it is, and what to do.

`pytest -s tests/unit/tools/test_doctor_faults.py tests/ray/test_doctor.py` prints the lines.
"""

import dataclasses
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from areal_ray.checkpoint import Catalog, save
from areal_ray.cli.main import main as run_cli
from areal_ray.config import load, redact
from areal_ray.distributed import Ranks
from areal_ray.driver.jobs import upload
from areal_ray.storage import LocalStorage
from areal_ray.tools.doctor import limits
from tests.unit.checkpoint.boxes import Box, weights
from tests.unit.data.tokenizer_files import save_tokenizer

pytestmark = pytest.mark.unit
TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")
GPT2 = ("model.config.model_type=gpt2", "model.config.max_position_embeddings=32")
HUGE = ("model.config.hidden_size=16384", "model.config.num_hidden_layers=200", "model.config.head_dim=4096")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run would be, with a corpus of two files."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def arguments(self, *overrides):
        sizes = ["train.seq_len=64", "data=text", f"data.paths=[{self.folder}/corpus]"]
        return [*sizes, f"run.storage_path={self.folder}/runs", *overrides]


def nothing(place):
    return ()


def foreign_tokenizer(place):
    from transformers import GPT2Config, GPT2LMHeadModel

    own = save_tokenizer(place.folder / "model")
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=257)
    GPT2LMHeadModel(config).save_pretrained(own)
    return "model=pretrained", f"model.path={own}", "data.tokenizer=bytes"


def other_schedule(place):
    """A run that has come to the end of its cosine, and is made longer."""
    assert run_cli(["prepare", "--config", TINY, *place.arguments()]) == 0
    config = load(TINY, place.arguments("train.steps=100"))
    info = {"step": 100, "attempt": 1, "config": redact(dataclasses.asdict(config))}
    runs = LocalStorage(place.folder / "runs" / "tiny")
    runs.ensure()
    save(runs.sub(Catalog.name(100, 1)), {"box": Box(**weights())}, info, Ranks())
    return ("train.steps=200",)


def no_folder(place):
    (place.folder / "runs").write_text("a file")
    return ()


def large_upload(place):
    place.monkeypatch.setattr(upload, "LIMIT_BYTES", 1 << 20)
    here = place.folder / "here"
    here.mkdir()
    (here / "weights.bin").write_bytes(os.urandom(2 << 20))
    place.monkeypatch.chdir(here)
    return ()


def few_open_files(place):
    place.monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    return ()


def little_shared_memory(place):
    own = shutil.disk_usage
    little = SimpleNamespace(free=64 << 20)  # docker's default
    place.monkeypatch.setattr(shutil, "disk_usage", lambda path: little if path == limits.SHARED_MEMORY else own(path))
    return ()


def no_data(place):
    shutil.rmtree(place.folder / "corpus")
    return ()


# What is set wrong, what is typed beside that, the exit status, and the line.
FAULTS = {
    "nothing": (nothing, (), 0, r"nothing stands in the way"),
    "a sequence longer than the positions": (nothing, GPT2, 2, r"train\.seq_len: .*32 positions, .* 64 .*at most 32"),
    "a foreign tokenizer": (foreign_tokenizer, (), 2, r"data\.tokenizer: bytes is not .*leave data\.tokenizer out"),
    "a jump of the learning rate": (
        other_schedule,
        (),
        0,
        r"note  learning rate .* jumps from \S+ to \S+ after step 100, as train\.steps was 100 and is 200\. To go on",
    ),
    "an indivisible batch": (nothing, ("train.global_batch_size=7",), 2, r"train\.global_batch_size: .*7.*workers"),
    "an indivisible mesh": (
        nothing,
        ("engine.mesh.replicate=3",),
        2,
        r"engine\.mesh\.replicate: 3 does not divide .*=2",
    ),
    "too little memory": (nothing, HUGE, 1, r"BAD   memory of this machine .* In this order: \S+=null \(about .* TB\)"),
    "a storage that is no folder": (no_folder, (), 2, r"run\.storage_path: cannot write below .*/runs"),
    "an upload that is too large": (large_upload, (), 0, r"note  upload .*weights\.bin \(2 MB\)\. Name .*\.rayignore"),
    "too few open files": (few_open_files, (), 1, r"BAD   open files .* up to 1,024: raise it to 4096, ulimit -n"),
    "a small /dev/shm": (little_shared_memory, (), 0, r"note  /dev/shm .*67\.1 MB free: .*--shm-size=8g"),
    "data that are not there": (no_data, (), 2, r"data\.paths: .*corpus"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_set_wrong_has_a_line_that_says_what_to_do(tmp_path, monkeypatch, capsys, fault):
    wrong, overrides, status, line = FAULTS[fault]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "corpus").mkdir()
    for name in ("one", "two"):
        (tmp_path / "corpus" / name).write_bytes(b"a" * 1000)
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, monkeypatch)
    more = wrong(place)
    got = run_cli(["doctor", "--config", TINY, *place.arguments(*more, *overrides)])
    said = "".join(capsys.readouterr())
    found = [text for text in said.splitlines() if re.search(line, text)]
    print(f"{fault}:\n    {found[0] if found else said}")
    assert (got, len(found)) == (status, 1)
