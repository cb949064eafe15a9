"""Frozen models asked once about all of the data, before training, and then let go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from areal_ray.data import TokenDataset
from areal_ray.data.answers import AnsweredRows, AnswerFile
from areal_ray.data.corpus.manifest import digest
from areal_ray.distributed import Ranks
from areal_ray.engine import FSDPEngine, Objective
from areal_ray.storage import Storage

Rows = dict[str, TokenDataset]  # by name: to train on, held out, of evaluation sets
PIECE = 4096  # rows after which what was said is durable
_SAY_EVERY_S = 30.0


class Answers:
    """What an objective's frozen models say of every row (`Objective.once`), found where it was kept, or asked for.

    The answers lie in a directory named by a hash of the data, of the frozen models and of the number format: runs that
    differ in nothing of it share them. Asking takes a forward pass of the frozen models over all data and is cut among
    the ranks; rows go through them in the same micro-batches whatever the number of ranks. Rank 0 writes 4 bytes a
    number; a restart goes on after the last 4,096 rows. A rank holds all answers: 8 bytes for each preference pair.

    Args:
        storage: where directories of answers lie.
        objective: whose frozen models they are.
        data: all of it, by names that its files may have.
        ranks: all ranks.
        settings: what else the answers depend on.
    """

    def __init__(
        self, storage: Storage, objective: Objective, data: Rows, ranks: Ranks, settings: Mapping[str, str]
    ) -> None:
        self._storage, self._objective, self._data = storage, objective, data
        self._ranks, self._settings = ranks, dict(settings)

    def find(self, fingerprints: Mapping[str, str]) -> Rows | None:
        """The data with the answers of frozen models of these fingerprints; None if they are not all there.

        A collective. Rank 0 reads them and sends them to the others.
        """
        if not set(self._objective.references) <= fingerprints.keys():
            return None
        found = self._ranks.on_rank_zero(lambda: self._read(fingerprints))
        return None if found is None else self._answered(found)

    def ask(self, engine: FSDPEngine, micro_batch: int, beat: Callable[[], None], say: Callable[[str], None]) -> Rows:
        """The data with the answers of the engine's frozen models, which are asked for what is not there yet.

        A collective.

        Args:
            engine: initialised with the objective's references.
            micro_batch: rows of a forward pass.
            beat: called before every forward pass.
            say: prints a line.
        """
        fingerprints = engine.references
        if (found := self.find(fingerprints)) is not None:
            return found
        began = told = time.monotonic()
        place = self._place(fingerprints)
        self._ranks.on_rank_zero(place.ensure)
        total = sum(len(rows) for rows in self._data.values())
        say(f"{', '.join(self._objective.references)}: asked once about {total:,} rows; kept in {place.location}")
        done = 0
        for split, rows in self._data.items():
            files = {name: self._file(place, split, name) for name in self._objective.once}
            missing = self._ranks.on_rank_zero(partial(_missing, files))
            for piece in missing:
                values = self._of_piece(engine, rows, piece, micro_batch, beat)
                self._ranks.on_rank_zero(lambda p=piece, v=values, f=files: _write(f, p, v))  # type: ignore[misc]
                done += len(piece)
                if time.monotonic() - told > _SAY_EVERY_S:
                    told = time.monotonic()
                    say(f"{', '.join(self._objective.references)}: {done:,} of {total:,} rows")
            if len(rows):
                self._ranks.on_rank_zero(lambda f=files: _finish(f))  # type: ignore[misc]
        say(f"{', '.join(self._objective.references)}: {done:,} rows in {time.monotonic() - began:.1f} s")
        found = self.find(fingerprints)
        assert found is not None, "what was just written is there"
        return found

    def _of_piece(
        self, engine: FSDPEngine, rows: TokenDataset, piece: range, micro_batch: int, beat: Callable[[], None]
    ) -> dict[str, np.ndarray]:
        """Answers about some rows, on every rank."""
        begins = list(piece[::micro_batch])
        mine = begins[engine.dp_rank :: engine.dp_size]
        # Forward passes are collectives: who has one less asks once more about the first rows, for nothing.
        rounds = -(-len(begins) // engine.dp_size)
        sums: dict[str, torch.Tensor] = {}
        for number in range(rounds):
            beat()
            first = mine[number] if number < len(mine) else begins[0]
            last = min(first + micro_batch, piece.stop)
            answers = engine.ask(_batch(rows, range(first, last), engine.device), self._objective)
            for name in self._objective.once:
                values = answers[name].float().flatten(1)
                if name not in sums:
                    sums[name] = torch.zeros(len(piece), values.shape[1], device=values.device)
                if number < len(mine):
                    sums[name][first - piece.start : last - piece.start] = values
        for total in sums.values():  # one rank has each row, the others zeros
            dist.all_reduce(total, group=engine.dims.batch_group)
        return {name: total.cpu().numpy() for name, total in sums.items()}

    def _read(self, fingerprints: Mapping[str, str]) -> list[dict[str, np.ndarray]] | None:
        place, found = self._place(fingerprints), []
        for split, rows in self._data.items():
            of_split = {name: self._file(place, split, name).read() for name in self._objective.once if len(rows)}
            if any(values is None for values in of_split.values()):
                return None
            found.append({name: values for name, values in of_split.items() if values is not None})
        return found

    def _answered(self, found: list[dict[str, np.ndarray]]) -> Rows:
        pairs = zip(self._data.items(), found, strict=True)
        return {name: AnsweredRows(rows, of) for (name, rows), of in pairs}

    def _place(self, fingerprints: Mapping[str, str]) -> Storage:
        models = {name: fingerprints[name] for name in self._objective.references}
        data = [rows.fingerprint for rows in self._data.values()]
        return self._storage.sub(f"answers-{digest([models, data, list(self._objective.once), self._settings])[:16]}")

    def _file(self, place: Storage, split: str, name: str) -> AnswerFile:
        return AnswerFile(place, f"{split}.{name}", len(self._data[split]), PIECE)


def _batch(rows: TokenDataset, chosen: range, device: torch.device) -> dict[str, torch.Tensor]:
    arrays = rows[np.asarray(chosen)]
    if "attention_mask" in arrays and arrays["attention_mask"].all():  # as in training
        arrays = {name: values for name, values in arrays.items() if name != "attention_mask"}
    return {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}


def _missing(files: Mapping[str, AnswerFile]) -> list[range]:
    pieces = {piece.start: piece for file in files.values() for piece in file.missing()}
    return [pieces[start] for start in sorted(pieces)]


def _write(files: Mapping[str, AnswerFile], piece: range, values: Mapping[str, np.ndarray]) -> None:
    for name, file in files.items():
        file.write(piece, values[name])


def _finish(files: Mapping[str, AnswerFile]) -> None:
    for file in files.values():
        file.finish()
