"""Formats for a prepared corpus beside each other: `python -m tests.bench.data_formats --megabytes 200`.

The same tokens (uint16) in each: 32 MiB a file, rows of 1,024 tokens, 8 random rows a batch; a process for each number.
On S3 eight threads read, as training does. Lance is measured where it is installed (`pip install pylance`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from areal_ray.storage import storage_at

from .memory import proportional

ROW, BATCH, PER_FILE = 1024, 8, 1 << 14  # tokens a row, rows a batch, rows a file
SECONDS = 4.0
Rows = Callable[[np.ndarray], list[np.ndarray]]


def tokens(rows: int, first: int) -> np.ndarray:
    return np.random.default_rng(first).integers(0, 60_000, (rows, ROW), dtype=np.uint16)


def files(count: int) -> list[tuple[int, np.ndarray]]:
    """(number, rows) of every file."""
    return [(n, tokens(min(PER_FILE, count - n * PER_FILE), n)) for n in range(-(-count // PER_FILE))]


class Megatron:
    """.bin/.idx, as areal_ray/data/corpus/token_file.py writes them; read by pread, or memory-mapped."""

    @staticmethod
    def write(folder: Path, count: int) -> None:
        from areal_ray.data.corpus import token_file

        for number, rows in files(count):
            with storage_at(str(folder)).create(f"{number}.bin") as sink:
                sink.write(rows.tobytes())
            index = token_file.index(np.full(len(rows), ROW), np.dtype(np.uint16))
            (folder / f"{number}.idx").write_bytes(index)

    @staticmethod
    def open(folder: str, s3: dict[str, str] | None) -> Rows:
        if s3 is None:
            found = [os.open(f"{folder}/{n}.bin", os.O_RDONLY) for n in range(len(list(Path(folder).glob("*.bin"))))]

            def one(row: int) -> np.ndarray:
                return np.frombuffer(os.pread(found[row // PER_FILE], ROW * 2, row % PER_FILE * ROW * 2), np.uint16)

            return lambda rows: [one(int(row)) for row in rows]
        storage, pool = storage_at(folder, s3), ThreadPoolExecutor(BATCH)

        def far(row: int) -> np.ndarray:
            data = storage.read_range(f"{row // PER_FILE}.bin", int(row % PER_FILE) * ROW * 2, ROW * 2)
            return np.frombuffer(data, np.uint16)

        return lambda rows: list(pool.map(far, rows.tolist()))


class Mapped(Megatron):
    @staticmethod
    def open(folder: str, s3: dict[str, str] | None) -> Rows:
        assert s3 is None
        found = [np.memmap(f"{folder}/{n}.bin", np.uint16, "r") for n in range(len(list(Path(folder).glob("*.bin"))))]
        return lambda rows: [np.array(found[r // PER_FILE][r % PER_FILE * ROW :][:ROW]) for r in rows]


class ArrayRecord:
    """One row a record, as MaxText's pipeline has it: seq_len is fixed when it is written. It reads no S3."""

    @staticmethod
    def write(folder: Path, count: int) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        for number, rows in files(count):
            writer = ArrayRecordWriter(str(folder / f"{number}.array_record"), "group_size:1,uncompressed")
            for row in rows:
                writer.write(row.tobytes())
            writer.close()

    @staticmethod
    def open(folder: str, s3: dict[str, str] | None) -> Rows:
        from grain.python import ArrayRecordDataSource

        names = sorted(Path(folder).iterdir(), key=lambda path: int(path.stem))
        source = ArrayRecordDataSource([str(name) for name in names])
        return lambda rows: [np.frombuffer(data, np.uint16) for data in source.__getitems__(rows.tolist())]


class Arrow:
    """IPC files with lists of uint16 in batches of 100, as `datasets` maps them (its own are of 1,000)."""

    @staticmethod
    def write(folder: Path, count: int) -> None:
        import pyarrow as pa

        schema = pa.schema([("input_ids", pa.list_(pa.uint16()))])
        for number, rows in files(count):
            with pa.OSFile(str(folder / f"{number}.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for at in range(0, len(rows), 100):
                    values, offsets = rows[at : at + 100].reshape(-1), np.arange(len(rows[at : at + 100]) + 1) * ROW
                    column = pa.ListArray.from_arrays(offsets.astype(np.int32), values)
                    writer.write_batch(pa.record_batch([column], schema=schema))

    @staticmethod
    def open(folder: str, s3: dict[str, str] | None) -> Rows:
        import pyarrow as pa

        if s3 is None:
            count, where = len(list(Path(folder).iterdir())), None
        else:
            storage = storage_at(folder, s3)
            count, where = len(storage.names()), storage.filesystem
        inside = folder.removeprefix("s3://")

        def reader(number: int) -> Any:
            name = f"{inside}/{number}.arrow"
            return pa.ipc.open_file(where.open_input_file(name) if where else pa.memory_map(name))

        found, pool = [reader(number) for number in range(count)], ThreadPoolExecutor(BATCH)

        def one(row: int) -> np.ndarray:
            batch = found[row // PER_FILE].get_batch(row % PER_FILE // 100)
            return np.array(batch.column(0)[row % PER_FILE % 100].values)

        return lambda rows: list((pool.map if where else map)(one, rows.tolist()))


class Lance:
    @staticmethod
    def write(folder: Path, count: int) -> None:
        import lance
        import pyarrow as pa

        schema = pa.schema([("input_ids", pa.list_(pa.uint16(), ROW))])
        for _, rows in files(count):
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), ROW)
            table = pa.table([column], schema=schema)
            lance.write_dataset(table, str(folder / "set"), mode="append" if (folder / "set").exists() else "create")

    @staticmethod
    def open(folder: str, s3: dict[str, str] | None) -> Rows:
        import lance

        options = None
        if s3 is not None:
            names = {"access_key": "access_key_id", "secret_key": "secret_access_key"}
            options = {names.get(name, name): value for name, value in s3.items()} | {"allow_http": "true"}
        found = lance.dataset(f"{folder}/set", storage_options=options)

        def take(rows: np.ndarray) -> list[np.ndarray]:
            column = found.take(rows.tolist()).column(0).combine_chunks()
            return list(column.flatten().to_numpy().reshape(-1, ROW))

        return take


FORMATS = {
    "bin/idx, pread": Megatron,
    "bin/idx, mmap": Mapped,
    "ArrayRecord": ArrayRecord,
    "Arrow": Arrow,
    "Lance": Lance,
}
NOT_ON_S3 = ("bin/idx, mmap", "ArrayRecord")


def measure(name: str, folder: str, count: int, s3: dict[str, str] | None) -> dict[str, float]:
    """In a process of its own: seconds to the first batch, rows/s, and what the memory has grown by."""
    before, began = proportional(os.getpid())[0], time.perf_counter()
    rows = FORMATS[name].open(folder, s3)
    draw = np.random.default_rng(1)
    first = rows(draw.integers(0, count, BATCH))
    opened = time.perf_counter() - began
    assert all(len(row) == ROW for row in first)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        wanted = draw.integers(0, count, BATCH)
        got = rows(wanted)
        done += BATCH
    assert (got[0] == tokens(PER_FILE, int(wanted[0]) // PER_FILE)[wanted[0] % PER_FILE]).all() or count < PER_FILE
    rate = done / (time.perf_counter() - began)
    return {"open_s": opened, "rows_per_s": rate, "grown_mb": (proportional(os.getpid())[0] - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))))
        return
    from tests.s3_server import BUCKET, S3Server

    count = arguments.megabytes * 1_000_000 // (ROW * 2) // PER_FILE * PER_FILE or PER_FILE
    folder = Path(tempfile.mkdtemp(prefix="formats-"))
    server = S3Server(folder / "s3")
    server.start()
    try:
        for name, form in FORMATS.items():
            here = folder / "data"
            here.mkdir()
            began = time.perf_counter()
            try:
                form.write(here, count)
            except ModuleNotFoundError as error:
                print(f"{name}: not here ({error.name})")
                here.rmdir()
                continue
            wrote = time.perf_counter() - began
            size = sum(path.stat().st_size for path in here.rglob("*") if path.is_file())
            line = f"{name:<15} written in {wrote:5.2f} s, {size / 1e6:6.1f} MB"
            places = [("disk", str(here), None)]
            if name not in NOT_ON_S3:
                far = f"s3://{BUCKET}/{name.split('/')[0]}"
                _upload(here, far, server.options)
                places.append(("S3", far, server.options))
            for place, where, s3 in places:
                asked = json.dumps({"name": name, "folder": where, "count": count, "s3": s3})
                command = [sys.executable, "-m", "tests.bench.data_formats", "--measure", asked]
                got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                line += f"; {place}: open {got['open_s'] * 1e3:5.0f} ms, {got['rows_per_s']:8,.0f} rows/s"
                line += f", +{got['grown_mb']:.0f} MB"
            print(line, flush=True)
            shutil.rmtree(here)
    finally:
        server.stop()
        shutil.rmtree(folder)


def _upload(here: Path, far: str, s3: dict[str, str]) -> None:
    storage = storage_at(far, s3)
    for path in here.rglob("*"):
        if path.is_file():
            storage.replace(path.relative_to(here).as_posix(), path.read_bytes())


if __name__ == "__main__":
    main()
