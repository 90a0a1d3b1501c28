"""GGUF to a Hugging Face directory, file to file: nothing is put on a device, memory is one block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from jora.errors import InputError
from jora.models.families import config_from_hf
from jora.models.gguf import GGUFSource, gguf_tokenizer
from jora.models.loading import check_tensors
from jora.models.safetensors_file import MAX_SHARD_BYTES, Entry
from jora.models.saving import BLOCK, check_replaceable, write_model
from jora.models.source import TensorSource
from jora.models.tensors import all_specs
from jora.reporting import SILENT, Reporter

DType = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: DType = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    reporter: Reporter = SILENT,
) -> None:
    """Write the model of a .gguf file as a Hugging Face directory: weights, config.json, tokenizer.

    dtype "auto" keeps the file's own where its matrices are float32, float16 or bfloat16; a quantised file
    is written in bfloat16, what these models are published in. That rounding (2^-9 of a value) is well below
    what quantisation cost already; ask for "float32" where the very numbers that a .gguf gives are wanted.
    Raises InputError for a file that is no supported .gguf, and for a value that float16 cannot hold.
    """
    path = Path(source).expanduser()
    if path.suffix != ".gguf":
        raise InputError(f"{path}: convert reads a .gguf file; a Hugging Face directory needs no conversion")
    if dtype != "auto" and dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; use auto, {', '.join(_DTYPES)}")
    check_replaceable(Path(out).expanduser(), "config.json")
    file = GGUFSource(path)
    config = config_from_hf(file.hf_config)
    check_tensors(file, config)
    write_model(
        out,
        [Entry(spec.name, spec.hf_shape, partial(_blocks, file, spec.name)) for spec in all_specs(config)],
        dtype=_DTYPES[_stored_dtype(file) if dtype == "auto" else dtype],
        hf_config=file.hf_config,
        source=path,
        tokenizer=gguf_tokenizer(path),
        max_shard_bytes=max_shard_bytes,
        reporter=reporter,
    )


def _stored_dtype(file: GGUFSource) -> str:
    kinds = {tensor.kind.name for tensor in file.file.tensors.values() if len(tensor.shape) == 2}
    return _STORED.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _blocks(source: TensorSource, name: str) -> Iterator[np.ndarray]:
    shape = source.shape(name)
    step = max(1, BLOCK * shape[0] // (4 * math.prod(shape)))
    for start in range(0, shape[0], step):
        yield source.read(name, (slice(start, min(start + step, shape[0])), *(slice(0, n) for n in shape[1:])))
