"""Rows of several sources in fixed proportions."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property

import numpy as np

from areal_ray.data.corpus.manifest import digest
from areal_ray.data.dataset import IGNORED, Order, TokenDataset
from areal_ray.data.shuffle import shuffled

_LONGEST = 10_000  # samples of a round


class MixedRows:
    """The rows of several data sets one after the other, and the order in which they are mixed. A TokenDataset.

    Args:
        parts: by name; each has a row at least.
        weights: by name; what counts is their proportion, to a ten-thousandth of all.
    """

    def __init__(self, parts: Mapping[str, TokenDataset], weights: Mapping[str, float]) -> None:
        self._parts, self._counts = dict(parts), round_of({name: weights[name] for name in parts})
        self._ends = np.cumsum([len(part) for part in self._parts.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of the given numbers; where those of one part are less wide, or lack an array, that is padded."""
        source = np.searchsorted(self._ends, indices, "right")
        found: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for number, part in enumerate(self._parts.values()):
            chosen = np.flatnonzero(source == number)
            if len(chosen):
                first = int(self._ends[number]) - len(part)
                found.append((chosen, part[np.asarray(indices)[chosen] - first]))
        width = max(rows["input_ids"].shape[1] for _, rows in found)
        mixed: dict[str, np.ndarray] = {}
        for name in dict.fromkeys(name for _, rows in found for name in rows):
            mixed[name] = np.full((len(source), width), IGNORED if name == "labels" else 0, np.int64)
            for chosen, rows in found:
                # Without a mask of its own all of a row is attended to.
                values = rows.get(name, np.ones_like(rows["input_ids"]))
                mixed[name][chosen, : values.shape[1]] = values
        return mixed

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the parts' and of their proportions; reads nothing."""
        return digest([(name, self._counts[name], part.fingerprint) for name, part in self._parts.items()])

    @property
    def note(self) -> str:
        """What the parts have to say of how their rows are made."""
        return "\n".join(note for part in self._parts.values() if (note := getattr(part, "note", "")))

    def order(self, seed: int) -> Order:
        """The row of each sample: a fixed round of sources, each with a shuffle and epochs of its own."""
        return _Mix(self, seed)

    def metrics(self, samples: int) -> dict[str, float]:
        """How many times each source has been gone through after so many samples, and its share of them."""
        found: dict[str, float] = {}
        for number, (name, part) in enumerate(self._parts.items()):
            taken = self._taken(number, samples)
            found |= {f"data/{name}/epoch": round(taken / len(part), 4), f"data/{name}/samples": taken}
        return found

    @cached_property
    def _round(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each place of a round the number of its source, and how often that one stood before it; read-only."""
        counts = list(self._counts.values())
        places = spread(counts)
        before = np.zeros(len(places), np.int64)
        for number in range(len(counts)):
            before[places == number] = np.arange(counts[number])
        return places, before

    def _taken(self, number: int, samples: int) -> int:
        places, _ = self._round
        rounds, rest = divmod(samples, len(places))
        return rounds * list(self._counts.values())[number] + int((places[:rest] == number).sum())

    def row(self, n: int, shuffles: list[Order]) -> int:
        """The row of sample n, if each part is in the order of its shuffle."""
        places, before = self._round
        rounds, at = divmod(n, len(places))
        number = int(places[at])
        taken = rounds * list(self._counts.values())[number] + int(before[at])
        part = list(self._parts.values())[number]
        return int(self._ends[number]) - len(part) + int(shuffles[number][taken])

    def shuffles(self, seed: int) -> list[Order]:
        """The order of each part; that of one does not depend on what else there is."""
        seeds = [(seed + zlib.crc32(name.encode())) % 2**32 for name in self._parts]
        return [shuffled(len(part), own) for part, own in zip(self._parts.values(), seeds, strict=True)]


class _Mix:
    """The order of MixedRows."""

    def __init__(self, rows: MixedRows, seed: int) -> None:
        self._rows, self._shuffles = rows, rows.shuffles(seed)

    def __getitem__(self, n: int) -> int:
        return self._rows.row(n, self._shuffles)


def round_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Samples of each source in a round: the shortest that has the weights' proportions, or the nearest of 10,000."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    shares = {name: weight / sum(exact.values()) for name, weight in exact.items()}
    length = math.lcm(*(share.denominator for share in shares.values()))
    if length <= _LONGEST:
        return {name: int(share * length) for name, share in shares.items()}
    counts = {name: max(1, int(share * _LONGEST)) for name, share in shares.items()}
    by_rest = sorted(shares, key=lambda name: counts[name] - shares[name] * _LONGEST)
    for i in range(_LONGEST - sum(counts.values())):
        counts[by_rest[i % len(by_rest)]] += 1
    return counts


def spread(counts: list[int]) -> np.ndarray:
    """A round with each number so often, as evenly as can be: of any stretch each has its share, but for two or less.

    The one whose turn has to come first, of those that may come (Tijdeman 1980, The chairman assignment problem).
    """
    length = sum(counts)
    taken = [0] * len(counts)
    places = np.empty(length, np.int64)
    for at in range(length):
        # The k-th time of one (from 0) may not come before k/share, and has to before (k + 1)/share.
        may = [i for i, count in enumerate(counts) if taken[i] * length < (at + 1) * count]
        place = min(may, key=lambda i: (Fraction((taken[i] + 1) * length, counts[i]), i))
        places[at], taken[place] = place, taken[place] + 1
    return places
