"""The GGUF container: metadata and where each tensor lies, over a memory map.

The `gguf` package's own `GGUFReader` makes three numpy views for every element of every array: 10 s and 0.7 GB
for a vocabulary of 262,144 tokens, where this reader takes 0.1 s. Types, block sizes and dequantisation are the
package's.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from jora.errors import InputError

_VERSIONS = (2, 3)  # version 1 counted in 32 bits and left circulation in 2023
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # ggml's own limit

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file: `shape` is row-major, as in PyTorch; `offset` counts bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


class GGUFFile:
    """Metadata and tensor table of a GGUF file; tensor data stays in the file until it is asked for.

    `metadata` holds Python scalars and strings, `list[str]` for arrays of strings and numpy arrays for the others.
    float32 scalars come back as the shortest decimal that rounds to them (1e-06, not 9.99999997e-07).

    Raises:
        InputError: the file is missing, is no GGUF file, is cut off or damaged, is one part of several, or holds a
            tensor type that the `gguf` package cannot dequantise.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = self._open()
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, _Malformed) as error:
            detail = str(error) if isinstance(error, _Malformed) else "its header cannot be read"
            self._refuse(f"{detail}; the file is cut off or damaged, download it again")
        if int(self.metadata.get("split.count", 1)) > 1:
            self._refuse("is one part of a split model; join the parts with `llama-gguf-split --merge` first")
        self._check_types()

    @property
    def architecture(self) -> str:
        """`general.architecture`: the family's name in llama.cpp."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            self._refuse("has no general.architecture, so its model family is unknown")
        return name

    def blocks(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor's bytes as uint8 [rows, blocks, bytes per block], a view of the file; a vector is one row."""
        block, size = GGML_QUANT_SIZES[tensor.kind]
        rows = math.prod(tensor.shape[:-1])
        flat = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(rows, tensor.shape[-1] // block, size)

    def _open(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    self._refuse("is not a GGUF file: it does not start with the four letters GGUF")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read ({error.strerror}); give the path of a .gguf file"
            ) from error

    def _parse(self) -> None:
        cursor = _Cursor(self._map, 4)
        version = cursor.scalar("<u4")
        if version not in _VERSIONS:
            self._refuse(f"is GGUF version {version}; versions 2 and 3 (little-endian) can be read")
        tensors, pairs = cursor.scalar("<u8"), cursor.scalar("<u8")
        for _ in range(pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(key)
        table = [self._entry(cursor) for _ in range(tensors)]
        alignment = int(self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
        if alignment <= 0:
            raise _Malformed(f"general.alignment is {alignment}")
        start = -(-cursor.position // alignment) * alignment
        for tensor in table:
            end = start + tensor.offset + tensor.nbytes
            if end > len(self._map):
                raise _Malformed(f"tensor {tensor.name} ends at byte {end} of {len(self._map)}")
            if tensor.name in self.tensors:
                raise _Malformed(f"tensor {tensor.name} occurs twice")
            self.tensors[tensor.name] = StoredTensor(
                tensor.name, tensor.shape, tensor.kind, start + tensor.offset, tensor.nbytes
            )

    def _entry(self, cursor: _Cursor) -> StoredTensor:
        name = cursor.string()
        dimensions = cursor.scalar("<u4")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _Malformed(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("<u8") for _ in range(dimensions))[::-1]
        number, offset = cursor.scalar("<u4"), cursor.scalar("<u8")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            self._refuse(f"tensor {name} has the unknown type {number}; update the `gguf` package")
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _Malformed(f"tensor {name}: rows of {shape[-1]} do not divide into {kind.name} blocks of {block}")
        return StoredTensor(name, shape, kind, offset, math.prod(shape) // block * size)

    def _check_types(self) -> None:
        for kind in {tensor.kind for tensor in self.tensors.values()}:
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                name = next(tensor.name for tensor in self.tensors.values() if tensor.kind is kind)
                self._refuse(f"tensor {name} is stored as {kind.name}, which the `gguf` package cannot dequantise")

    def _refuse(self, message: str) -> NoReturn:
        raise InputError(f"{self.path}: {message}")


class _Malformed(Exception):
    """A header that contradicts itself or the file's length."""


class _Cursor:
    """Reads values one after another from a buffer and never past its end."""

    def __init__(self, buffer: mmap.mmap, position: int) -> None:
        self._buffer = buffer
        self.position = position

    def scalar(self, code: str) -> Any:
        return self._numbers(code, 1)[0].item()

    def string(self) -> str:
        return self._strings(1)[0]

    def value(self, key: str) -> Any:
        kind = self._kind(key)
        if kind is not GGUFValueType.ARRAY:
            return self._one(kind)
        element, count = self._kind(key), self.scalar("<u8")
        if element is GGUFValueType.STRING:
            return self._strings(count)
        if element is GGUFValueType.ARRAY:
            raise _Malformed(f"{key} is an array of arrays")
        return self._numbers(_SCALARS[element], count).copy()

    def _one(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string()
        number = self._numbers(_SCALARS[kind], 1)[0]
        return float(str(number)) if kind is GGUFValueType.FLOAT32 else number.item()

    def _kind(self, key: str) -> GGUFValueType:
        number = self.scalar("<u4")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _Malformed(f"{key} has the unknown value type {number}") from None

    def _numbers(self, code: str, count: int) -> np.ndarray:
        size = np.dtype(code).itemsize * count
        if self.position + size > len(self._buffer):
            raise _Malformed("the header runs past the end of the file")
        numbers = np.frombuffer(self._buffer, code, count, self.position)
        self.position += size
        return numbers

    def _strings(self, count: int) -> list[str]:
        # a tight loop: a vocabulary has a quarter of a million of these
        buffer, position, size = self._buffer, self.position, len(self._buffer)
        length_at: Callable[[mmap.mmap, int], tuple[int]] = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            (length,) = length_at(buffer, position)
            position += 8
            if position + length > size:
                raise _Malformed("the header runs past the end of the file")
            strings.append(buffer[position : position + length].decode())
            position += length
        self.position = position
        return strings
