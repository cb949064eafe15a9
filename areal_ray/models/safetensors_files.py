"""Files of safetensors: read in parts, and written from tensors that need not be in memory.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from areal_ray.models.lazy_tensor import Box, LazyTensor, part_of, whole_box, windows
from areal_ray.storage import Storage, read_ahead

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_WINDOW = 8 << 20  # bytes that are read in one go while a file is written


def opened(path: str) -> dict[str, LazyTensor]:
    """Every weight in a directory of safetensors files, by name; those of its index, if it has one.

    Nothing but the headers is read. What is kept open grows with the files, the rest with the weights.

    Raises:
        ValueError: if there are no such files, one of them is damaged or has values of a type that is not known here,
            or a weight of the index is in none of them.
    """
    found: dict[str, LazyTensor] = {}
    files = sorted(glob.glob(os.path.join(path, "*.safetensors")))
    if not files:
        raise ValueError(f"there are no safetensors files in {path}")
    for name in files:
        try:
            file = safe_open(name, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{name} cannot be read: {error}") from None
        for key in file.keys():  # noqa: SIM118  (not a dict)
            header = file.get_slice(key)
            dtype = _BY_NAME.get(header.get_dtype())
            if dtype is None:
                text = f"{key} is {header.get_dtype()}; quantized weights are not trained here"
                raise ValueError(f"{os.path.basename(name)} in {path}: {text}")
            found[key] = LazyTensor(header.get_shape(), dtype, partial(read_part, file, key))
    index = os.path.join(path, _INDEX)
    if os.path.isfile(index):  # some models lie there twice, under other names
        with open(index) as listing:
            listed = json.load(listing)["weight_map"]
        if lost := sorted(set(listed) - set(found)):
            raise ValueError(f"{path}: the index lists {lost[0]}, but no file has it")
        found = {key: found[key] for key in listed}
    return found


def read_part(file: Any, key: str, box: Box) -> torch.Tensor:
    """The values in a box of a tensor, from an opened file."""
    if not box:
        return file.get_tensor(key)
    return file.get_slice(key)[tuple(slice(begin, end) for begin, end in box)]


def write(
    out: Storage, tensors: Mapping[str, torch.Tensor], shard_bytes: int, rank: int = 0, ranks: int = 1
) -> dict[str, Any]:
    """Write tensors as `from_pretrained` reads them, in several files where they are large, a few MB in memory.

    Each of several ranks that all have the same tensors writes some of the files.

    Args:
        out: where to; files of these names must not be there.
        tensors: by name, lazy ones or others.
        shard_bytes: largest file, unless one tensor is larger.
        rank, ranks: which of how many.

    Returns:
        The content of `model.safetensors.index.json`, which is not written here.
    """
    split = split_state_dict_into_shards_factory(
        {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in tensors.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in list(split.filename_to_tensors.items())[rank::ranks]:
        write_file(out, file, {name: tensors[name] for name in names})
    return {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def write_index(out: Storage, index: Mapping[str, Any]) -> None:
    """Write what `write` returns, if there is more than one file."""
    if len(set(index["weight_map"].values())) > 1:
        out.replace(_INDEX, json.dumps(index, indent=2).encode() + b"\n")


def write_file(out: Storage, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into one file, a few MB in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.dtype.itemsize
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors has not")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin aligned
    with out.create(file) as sink:
        sink.write(len(text).to_bytes(8, "little"))
        sink.write(text)
        for part in read_ahead(_reads(tensors)):
            sink.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)


def _reads(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, Any]]:
    for tensor in tensors.values():
        size = 3 * min(_WINDOW, tensor.numel() * tensor.dtype.itemsize)  # while it is read
        for box in windows(whole_box(tensor.shape), tensor.dtype.itemsize, _WINDOW):
            yield size, partial(part_of, tensor, box)
