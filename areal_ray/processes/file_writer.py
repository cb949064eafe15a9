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
from collections.abc import Iterable
from typing import Any

import xxhash

from areal_ray.storage import Storage

_PIECE = 8 << 20  # bytes hashed and written at a time: they stay in the processor's cache in between


def write_summed(storage: Storage, name: str, chunks: Iterable[memoryview]) -> dict[str, Any]:
    """Write the new file `name`, summing while writing.

    Args:
        storage: an existing directory.
        name: must not exist yet.
        chunks: the content, in parts of which each gets a checksum of its own.

    Returns:
        size, xxh3_128 of the whole, chunks as [offset, length, xxh3_64]: a manifest's record of the file.
    """
    whole, size = xxhash.xxh3_128(), 0
    sums: list[list[Any]] = []
    with storage.create(name) as file:
        for chunk in chunks:
            part = xxhash.xxh3_64()
            for start in range(0, len(chunk), _PIECE):
                piece = chunk[start : start + _PIECE]
                whole.update(piece)
                part.update(piece)
                file.write(piece)
            sums.append([size, len(chunk), part.hexdigest()])
            size += len(chunk)
    return {"size": size, "xxh3_128": whole.hexdigest(), "chunks": sums}


class FileWriter:
    """The parent's end: a child that is started when it is first needed, and again if it died."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the child now, so that the first save need not wait for it."""
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", "areal_ray.processes.file_writer"]
            # A session of its own: Ctrl-C is for the driver, which lets the last save finish.
            self._child = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )

    def write(
        self, directory: Storage, name: str, memory: str, size: int, chunks: list[tuple[int, int]]
    ) -> dict[str, Any]:
        """Have a file written; waits without holding the interpreter's lock.

        Args:
            directory: an existing directory.
            name: of the new file.
            memory: path of the memory to write, one that the child can open.
            size: bytes to write.
            chunks: (offset, length) of the parts that get a checksum of their own; they cover the memory without gaps.

        Raises:
            OSError: if the file could not be written, or the child is gone.
        """
        self.start()
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        request = {
            "storage": base64.b64encode(pickle.dumps(directory)).decode(),
            "name": name,
            "memory": memory,
            "size": size,
            "chunks": chunks,
        }
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise OSError(f"the process that writes checkpoints is gone (exit status {self._child.wait()})")
        reply = json.loads(answer)
        if "error" in reply:
            raise OSError(*reply["error"])
        return dict(reply)

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


def _serve() -> None:
    memory = _Memory()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            image = memory.image(request["memory"], request["size"])
            chunks = (image[start : start + length] for start, length in request["chunks"])
            directory = pickle.loads(base64.b64decode(request["storage"]))  # noqa: S301  (of its parent)
            reply = write_summed(directory, request["name"], chunks)
        except OSError as error:
            reply = {"error": [error.errno, error.strerror, error.filename] if error.errno else [str(error)]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve()
