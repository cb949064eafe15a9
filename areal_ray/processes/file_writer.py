"""Writes files from shared memory to storage, in a process that shares no lock with the training.

The child imports neither torch nor Ray: it is up in a tenth of a second and costs a few megabytes. One request at a
time goes in as a line of JSON, one answer comes back. It ends when its parent does, which closes its standard input.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import xxhash

from areal_ray.processes.dcp_pickle import MetadataParts, encode
from areal_ray.storage import Storage

PIECE = 1 << 20  # bytes that get a checksum of their own: nothing smaller can be read and verified
SUMS = ".sums"
Record = dict[str, Any]  # of a file in a manifest: size in bytes, xxh3_128


def sums_name(name: str) -> str:
    """The name of the table of checksums of a shard file."""
    return name.removesuffix(".distcp") + SUMS


def write_summed(
    storage: Storage, name: str, content: memoryview, chunks: Sequence[tuple[int, int]]
) -> dict[str, Record]:
    """Write a shard file, summing while writing, then its table of checksums.

    The table is text: a first line with its format and PIECE, then for each tensor its bytes with its frame, of these
    the ones before its data, and an xxh3_64 for every PIECE of them (the last one is shorter).

    Args:
        storage: an existing directory.
        name: must not exist yet.
        content: all bytes.
        chunks: for each tensor its bytes, of these the ones before its data; they cover the content without gaps.

    Returns:
        The manifest's records of both files, by name.
    """
    whole, start = xxhash.xxh3_128(), 0
    lines = [f"sums 1 {PIECE}"]
    with storage.create(name) as file:
        for length, before in chunks:
            line = [f"{length} {before}"]
            for at in range(start, start + length, PIECE):
                piece = content[at : min(at + PIECE, start + length)]
                whole.update(piece)
                line.append(xxhash.xxh3_64_hexdigest(piece))
                file.write(piece)
            lines.append(" ".join(line))
            start += length
    table = "\n".join([*lines, ""]).encode()
    shard = {"size": start, "xxh3_128": whole.hexdigest()}
    return {name: shard, sums_name(name): write_small(storage, sums_name(name), table)}


def write_small(storage: Storage, name: str, data: bytes) -> Record:
    """Write a small file that must not exist yet; the manifest's record of it."""
    with storage.create(name) as file:
        file.write(data)
    return {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


class FileWriter:
    """The parent's end: a child that is started when it is first needed, and again if it died."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._encoded: MetadataParts | None = None  # what the child has the bytes of

    def start(self) -> None:
        """Start the child now, so that the first save need not wait for it."""
        if self._child is None or self._child.poll() is not None:
            self._encoded = None
            command = [sys.executable, "-m", "areal_ray.processes.file_writer"]
            # A session of its own: Ctrl-C is for the driver, which lets the last save finish.
            self._child = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )

    def write(
        self, directory: Storage, name: str, memory: str, size: int, chunks: Sequence[tuple[int, int]]
    ) -> dict[str, Record]:
        """Have a shard file and its table written, see `write_summed`; waits without holding the interpreter's lock.

        Args:
            directory: an existing directory.
            name: of the new file.
            memory: path of the memory to write, one that the child can open.
            size: bytes to write.
            chunks: as for `write_summed`.

        Raises:
            OSError: if they could not be written, or the child is gone.
        """
        return self._ask(directory, name, memory=memory, size=size, chunks=chunks)

    def write_metadata(self, directory: Storage, name: str, parts: MetadataParts) -> Record:
        """Have DCP's `.metadata` encoded and written; the child keeps what it has encoded for the next time.

        Raises:
            OSError: as `write`.
        """
        self.start()
        if self._encoded is parts:
            return dict(self._ask(directory, name, parts=None)[name])
        memory = os.memfd_create("areal_ray metadata")
        try:
            with open(memory, "wb", closefd=False) as file:
                pickle.dump(parts, file)
            records = self._ask(directory, name, parts=f"/proc/{os.getpid()}/fd/{memory}")
        finally:
            os.close(memory)
        self._encoded = parts
        return records[name]

    def _ask(self, directory: Storage, name: str, **request: Any) -> dict[str, Record]:
        self.start()
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        storage = base64.b64encode(pickle.dumps(directory)).decode()
        try:
            self._child.stdin.write(json.dumps({"storage": storage, "name": name, **request}) + "\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise OSError(f"the process that writes checkpoints is gone (exit status {self._child.wait()})")
        reply = json.loads(answer)
        if "error" in reply:
            raise OSError(*reply["error"])
        records: dict[str, Record] = reply["written"]
        return records

    def close(self) -> None:
        """End the child, after the request that it is at."""
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
            self._child.wait()
            self._child = None


class _Memory:
    """The parent's shard image, mapped once: mapping 100 MB anew takes as long as writing them."""

    def __init__(self) -> None:
        self._key: tuple[int, int, int] | None = None
        self._image = memoryview(b"")

    def image(self, path: str, size: int) -> memoryview:
        fd = os.open(path, os.O_RDONLY)
        try:
            # The path may come again for other memory; the inode cannot, while it is mapped here.
            status = os.fstat(fd)
            key = status.st_dev, status.st_ino, size
            if key != self._key:
                self._image.release()
                self._image, self._key = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ)), key
        finally:
            os.close(fd)
        return self._image


class _Metadata:
    """What was encoded last, for the saves that follow."""

    def __init__(self) -> None:
        self._data = b""

    def data(self, path: str | None) -> bytes:
        if path is not None:
            with open(path, "rb") as file:
                self._data = encode(pickle.load(file))  # noqa: S301  (of its parent)
        if not self._data:  # of a child in whose place this one has come just now
            raise OSError("the process that writes checkpoints does not have the metadata")
        return self._data


def _serve() -> None:
    memory, metadata = _Memory(), _Metadata()
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        try:
            directory = pickle.loads(base64.b64decode(request["storage"]))  # noqa: S301  (of its parent)
            if "memory" in request:
                image = memory.image(request["memory"], request["size"])
                written = write_summed(directory, name, image, request["chunks"])
            else:
                written = {name: write_small(directory, name, metadata.data(request["parts"]))}
            reply: dict[str, Any] = {"written": written}
        except OSError as error:
            reply = {"error": [error.errno, error.strerror, error.filename] if error.errno else [str(error)]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
