"""What `torch.save` writes around the bytes of a tensor.

DCP stores each tensor as `torch.save` writes it. Around the data these bytes depend on shape and type alone, once the
zip's CRCs are off (the manifest has better ones). So a file can be laid out beforehand and the data copied straight to
where they belong; plain `torch.load` and `dcp.load` read the outcome.
"""

from __future__ import annotations

import io
import struct
import zipfile
from functools import lru_cache

import torch


@lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes before and after the data of a contiguous tensor."""
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        buffer = io.BytesIO()
        torch.save(torch.zeros(shape, dtype=dtype), buffer)
    finally:
        torch.serialization.set_crc32_options(checked)
    blob = buffer.getvalue()
    with zipfile.ZipFile(buffer) as archive:
        record = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    # A zip entry's data follow its local header: 30 bytes, then a name and extra fields of these lengths.
    name, extra = struct.unpack_from("<HH", blob, record.header_offset + 26)
    start = record.header_offset + 30 + name + extra
    return blob[:start], blob[start + record.file_size :]
