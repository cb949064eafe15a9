"""Parts of one's own: a data source and an objective. Rename, change, delete."""

import hashlib

import numpy as np

from areal_ray.data import IGNORED, next_tokens
from areal_ray.engine import LanguageModeling

END = 256  # of a row; below it are the bytes


class Sums:
    """Rows such as "12+30=42": row n is a function of n, so that a run can be resumed and resized.

    Args:
        rows: how many.
        seq_len: tokens in each.
        seed: another one gives other rows.
    """

    def __init__(self, rows, seq_len, seed):
        self.rows, self.seq_len, self.seed = rows, seq_len, seed

    def __len__(self):
        return self.rows

    def __getitem__(self, indices):
        rows = np.stack([self.row(int(index)) for index in indices])
        labels = next_tokens(rows)
        labels[rows == END] = IGNORED  # the first END is predicted, those after it are not
        return {"input_ids": rows, "labels": labels}

    def row(self, index):
        a, b = np.random.default_rng((self.seed, index)).integers(0, 100, 2)
        text = f"{a}+{b}={a + b}".encode()
        return np.array([*text, *[END] * (self.seq_len - len(text))], dtype=np.int64)

    @property
    def fingerprint(self):
        """A run goes on only with the data that it began with."""
        return hashlib.sha256(f"sums {self.rows} {self.seq_len} {self.seed}".encode()).hexdigest()


def sums(tokenizer, seq_len, rows):
    """What data.source names: rows to train on, and held-out ones."""
    return Sums(rows, seq_len, 0), Sums(max(1000, rows // 20), seq_len, 1)


class WithAccuracy(LanguageModeling):
    """Cross entropy, with the share of right tokens as a metric beside it."""

    metrics = ("accuracy",)

    def loss(self, output, batch):
        loss, others = super().loss(output, batch)
        counted = batch["labels"] != IGNORED
        right = (output.argmax(-1) == batch["labels"])[counted].float().mean()
        return loss, {**others, "accuracy": right}
