"""Writing safetensors files a block at a time.

The `safetensors` package writes from arrays that are all in memory; a model may be larger than the host's
memory. The format is simple: 8 bytes of header length, a JSON header, then every tensor's bytes in turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jora.errors import InputError

MAX_SHARD_BYTES = 5_000_000_000  # what transformers cuts its files at
_CODES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
}


class Entry(NamedTuple):
    """One tensor to write: `blocks()` gives its rows in order, a few MiB at a time, in any float dtype.

    dtype: of this tensor in the file (uint8, int8 and int32 too), whatever the others'; None: as the others.
    """

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]
    dtype: np.dtype[Any] | None = None


def write_safetensors(
    path: Path, entries: Sequence[Entry], dtype: np.dtype, on_tensor: Callable[[], None] | None = None
) -> None:
    """Write `entries` to one file in `dtype` (float32, float16 or bfloat16) or their own. Memory: one block.

    Raises InputError for a value that float16 cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for entry in entries:
        end = offset + _nbytes(entry, dtype)
        code = _CODES[_dtype(entry, dtype)]
        header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            written = sum(file.write(_bytes(block, entry.name, _dtype(entry, dtype))) for block in entry.blocks())
            if written != _nbytes(entry, dtype):
                raise RuntimeError(f"{entry.name}: {written} bytes were written, its shape {entry.shape} asks for more")
            if on_tensor is not None:
                on_tensor()


def write_sharded(
    directory: Path,
    entries: Sequence[Entry],
    dtype: np.dtype,
    max_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[], None] | None = None,
) -> None:
    """`model.safetensors`, or numbered files of at most `max_bytes` with their index (a larger tensor stands alone)."""
    shards = list(_shards(entries, dtype, max_bytes))
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0], dtype, on_tensor)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard, dtype, on_tensor)
        weight_map.update({entry.name: name for entry in shard})
    total = sum(_nbytes(entry, dtype) for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(entries: Iterable[Entry], dtype: np.dtype, max_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + _nbytes(entry, dtype) > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += _nbytes(entry, dtype)
    yield shard


def _nbytes(entry: Entry, dtype: np.dtype) -> int:
    return math.prod(entry.shape) * _dtype(entry, dtype).itemsize


def _dtype(entry: Entry, others: np.dtype) -> np.dtype:
    return others if entry.dtype is None else entry.dtype


def _bytes(block: np.ndarray, name: str, dtype: np.dtype) -> memoryview:
    with np.errstate(over="ignore"):  # looked at below, with the tensor's name
        cast = np.ascontiguousarray(block, dtype)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise InputError(f"{name}: holds a value that float16 cannot; write bfloat16 or float32 instead")
    return cast.reshape(-1).view(np.uint8).data  # bfloat16 has no buffer of its own
