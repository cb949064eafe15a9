"""Tokenizing as the Hugging Face course does: python -m tests.bench.peers.datasets_map TEXT_FOLDER OUT TOKENIZER|bytes

`datasets.map` with as many processes as the machine has cores, batches of 16 files, `save_to_disk`. Prints the tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 16  # files of a megabyte: the usual thousand would take a gigabyte in every process
Batch = dict[str, Any]


def by_bytes(batch: Batch) -> Batch:
    import numpy as np

    end = np.array([256], np.uint16)
    return {"input_ids": [np.append(np.frombuffer(text.encode(), np.uint8), end) for text in batch["text"]]}


def by_tokenizer(folder: str) -> Callable[[Batch], Batch]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(batch: Batch) -> Batch:
        found = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in found]}

    return tokenize


def main(text: str, out: str, tokenizer: str) -> None:
    from datasets import Features, Sequence, Value, load_dataset

    files = sorted(map(str, Path(text).iterdir()))
    given = load_dataset("text", data_files=files, sample_by="document", split="train", cache_dir=f"{out}.cache")
    small = tokenizer == "bytes"
    ids = given.map(
        by_bytes if small else by_tokenizer(tokenizer),
        batched=True,
        batch_size=BATCH,
        num_proc=os.cpu_count(),
        remove_columns=["text"],
        features=Features({"input_ids": Sequence(Value("uint16" if small else "int32"))}),
    )
    ids.save_to_disk(out)
    print(sum(len(row) for row in ids.with_format("numpy")["input_ids"]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
