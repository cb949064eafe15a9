"""What the machine can do: copying memory, writing one file with fsync, a multipart PUT to the tests' S3 server."""

import os
import tempfile
import time
from pathlib import Path

import torch

from ..s3_server import BUCKET, S3Server
from . import report
from .options import Options

SIZE = 256 << 20
PART = 16 << 20


def copying(size: int = SIZE) -> float:
    """GB/s of one thread that copies into memory that it has used before."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    target.copy_(source)
    seconds = time.perf_counter() - began
    torch.set_num_threads(threads)
    return size / seconds / 1e9


def plain_write(folder: Path, size: int) -> float:
    """Seconds to write that many bytes into one file, one after the other, with fsync."""
    data = torch.randint(0, 255, (size,), dtype=torch.uint8).numpy().data
    path = folder / "plain"
    began = time.perf_counter()
    with open(path, "wb") as file:
        for start in range(0, size, 8 << 20):
            file.write(data[start : start + (8 << 20)])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def multipart_put(server: S3Server, data: bytes) -> float:
    """Seconds for one object, part after part, by botocore and nothing else."""
    import botocore.session

    options = server.options
    client = botocore.session.Session().create_client(
        "s3",
        region_name=options["region"],
        endpoint_url=options["endpoint"],
        aws_access_key_id=options["access_key"],
        aws_secret_access_key=options["secret_key"],
    )
    where = {"Bucket": BUCKET, "Key": "plain"}
    began = time.perf_counter()
    upload = client.create_multipart_upload(**where)["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(data), PART), 1):
        body = data[start : start + PART]
        answer = client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})
    seconds = time.perf_counter() - began
    client.delete_object(**where)
    return seconds


def run(options: Options) -> list[dict]:
    memory, disk, objects = [], [], []
    data = os.urandom(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder) / "s3")
        server.start()
        try:
            for _ in range(options.rounds):
                memory.append(copying())
                disk.append(SIZE / plain_write(Path(folder), SIZE) / 1e9)
                objects.append(SIZE / multipart_put(server, data) / 1e9)
        finally:
            server.stop()
    rows = {"memory copy, one thread": memory, "one file and fsync": disk, "multipart PUT": objects}
    return [report.show("limits of this machine", "GB/s", rows, "one file and fsync", report.HIGHER)]
