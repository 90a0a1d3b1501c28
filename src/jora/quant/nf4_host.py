"""nf4 on the host: quantising, the canonical form of bitsandbytes' files, and the way to a mesh's pieces and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jora.errors import InputError
from jora.quant.codebooks import NF4, dynamic, midpoints
from jora.quant.nf4 import BLOCK, GROUP, NF4Weight, blocks_of_a_run, first_blocks
from jora.quant.pieces import Pieces
from jora.quant.weight import QuantisedWeight

CACHED = 1 << 15  # elements coded at a time: the comparisons below stay in a core's cache
TINY = np.float32(1e-38)  # what bitsandbytes divides by in a block of zeros
STATE = ".quant_state.bitsandbytes__nf4"
STATE_BYTES = 256  # blanks pad the state, so that its length is known before its numbers are
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


@dataclass(frozen=True)
class NF4Tensor:
    """One weight [out, in] as files hold it.

    codes: uint8 [ceil(n / 2)], the high nibble first; scales: uint8 [blocks]; nested: fp32 [groups];
    offset: fp32, the mean absmax.
    """

    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray
    nested: np.ndarray
    offset: np.float32

    weight: ClassVar[type[QuantisedWeight]] = NF4Weight

    @classmethod
    def quantise(cls, shape: tuple[int, int], read: Callable[[int, int], np.ndarray], piece: int) -> NF4Tensor:
        """From rows that `read(start, stop)` gives, some `piece` elements at a time."""
        count = math.prod(shape)
        codes = np.empty(-(-count // BLOCK) * BLOCK // 2, np.uint8)
        absmax = np.empty(-(-count // BLOCK), np.float32)
        whole = BLOCK // math.gcd(BLOCK, shape[1])  # rows that end where a block does
        step = max(1, piece // (shape[1] * whole)) * whole
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            flat = np.asarray(read(start, stop), np.float32).reshape(-1)
            blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
            first = start * shape[1] // BLOCK
            part = slice(first, first + len(blocks))
            _code(blocks, absmax[part], codes[part.start * BLOCK // 2 : part.stop * BLOCK // 2])
        offset = np.float32(np.mean(absmax, dtype=np.float64).item())
        scales, nested = _quantise_scales(absmax - offset)
        return cls(shape, codes[: -(-count // 2)], scales, nested, offset)

    def dense(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), fp32 [n, in]."""
        first, last = start * self.shape[1], stop * self.shape[1]
        values = NF4[_unpacked(self.codes[first // 2 : -(-last // 2)])][first % 2 :][: last - first]
        blocks = np.arange(first // BLOCK, -(-last // BLOCK))
        absmax = dynamic()[self.scales[blocks]] * self.nested[blocks // GROUP] + self.offset
        return (values * np.repeat(absmax, BLOCK)[first % BLOCK :][: last - first]).reshape(-1, self.shape[1])

    def arrays(self, pieces: Pieces) -> dict[str, np.ndarray]:
        """As the devices hold it, all pieces together."""
        found = {name: np.zeros(field.shape, field.dtype) for name, field in NF4Weight.fields(pieces).items()}
        found["nested"][:], found["offset"][()] = self.nested, self.offset
        nibbles = _unpacked(self.codes)[: math.prod(self.shape)].reshape(self._folded(pieces))
        for box, part, numbers in _parts(found, pieces):
            values = nibbles[box].reshape(pieces.local_columns, -1)
            odd = values.shape[1] % 2
            pairs = np.pad(values, ((0, 0), (0, odd))) if odd else values
            part["codes"][:] = ((pairs[:, ::2] << 4) | pairs[:, 1::2]).T
            part["scales"][:] = self.scales[np.minimum(numbers, len(self.scales) - 1)]
        return found

    @classmethod
    def collect(cls, arrays: Mapping[str, np.ndarray], pieces: Pieces) -> NF4Tensor:
        """What `arrays` gave, back."""
        shape = pieces.columns, pieces.rows
        count = math.prod(shape)
        scales = np.empty(-(-count // BLOCK), np.uint8)
        nibbles = np.full(-(-count // BLOCK) * BLOCK, _ZERO, np.uint8)
        folded = nibbles[:count].reshape(cls._folded(pieces))
        for box, part, numbers in _parts(arrays, pieces):
            values = np.stack([part["codes"] >> 4, part["codes"] & 15], axis=1).reshape(-1, pieces.local_columns)
            folded[box] = values[: pieces.local_rows].T.reshape(folded[box].shape)
            inside = numbers < len(scales)
            scales[numbers[inside]] = part["scales"][inside]
        codes = ((nibbles[::2] << 4) | nibbles[1::2])[: -(-count // 2)]
        return cls(shape, codes, scales, arrays["nested"], np.float32(arrays["offset"].item()))

    @staticmethod
    def _folded(pieces: Pieces) -> tuple[int, ...]:
        """[*out, *in]: the file's order, heads apart."""
        return tuple(cut.size for cut in (*pieces.outs, *pieces.ins))

    def stored(self, name: str, dtype: str) -> dict[str, np.ndarray]:
        """The tensors that stand for weight `name` in a file, as bitsandbytes' QuantState packs them."""
        state = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": dtype,
            "shape": list(self.shape),
            "nested_blocksize": GROUP,
            "nested_dtype": "float32",
            "nested_offset": float(self.offset),
        }
        packed = np.frombuffer(json.dumps(state).encode().ljust(STATE_BYTES), np.uint8)
        parts: tuple[np.ndarray, ...] = (self.scales, NF4, self.nested, dynamic(), packed)
        return {name: self.codes[:, None], **{name + p: value for p, value in zip(PARTS, parts, strict=True)}}

    @classmethod
    def stored_shapes(cls, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{tensor: (shape, dtype)} of what `stored` gives for a weight of this shape [out, in]."""
        count = math.prod(shape)
        blocks = -(-count // BLOCK)
        sizes = (blocks, len(NF4), -(-blocks // GROUP), len(dynamic()), STATE_BYTES)
        kinds: tuple[Any, ...] = (np.uint8, np.float32, np.float32, np.float32, np.uint8)
        parts = {name + part: ((n,), kind) for part, n, kind in zip(PARTS, sizes, kinds, strict=True)}
        return {name: ((-(-count // 2), 1), np.uint8), **parts}

    @classmethod
    def stored_names(cls, names: frozenset[str]) -> dict[str, frozenset[str]]:
        """{weight: what belongs to it} of the quantised weights among a file's tensors."""
        weights = (name.removesuffix(STATE) for name in names if name.endswith(STATE))
        return {name: frozenset(name + part for part in PARTS) for name in weights}

    @classmethod
    def stored_shape(cls, name: str, read: Callable[[str], np.ndarray], codes: tuple[int, ...]) -> tuple[int, ...]:
        """[out, in] of weight `name` in a file where its codes have shape `codes`."""
        return tuple(_state(name, read)["shape"])

    @classmethod
    def load(cls, name: str, read: Callable[[str], np.ndarray]) -> NF4Tensor:
        """Weight `name` from a file's tensors. Raises InputError where its form is another one."""
        state = _state(name, read)
        wanted = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": GROUP, "nested_dtype": "float32"}
        for key, value in wanted.items():
            if state.get(key) != value:
                raise InputError(f"{name}: {key} is {state.get(key)}, not {value}; load the unquantised model instead")
        codes, scales, book, nested, nested_book = (read(name + part) for part in ("", *PARTS[:-1]))
        if codes.dtype != np.uint8 or not (_same(book, NF4) and _same(nested_book, dynamic())):
            raise InputError(f"{name}: its code book or storage is not bitsandbytes' nf4; load the unquantised model")
        rows, columns = state["shape"]
        blocks = -(-rows * columns // BLOCK)
        if (codes.size, scales.size, nested.size) != (-(-rows * columns // 2), blocks, -(-blocks // GROUP)):
            sizes = f"{codes.size} bytes of codes, {scales.size} scales"
            raise InputError(f"{name}: cut short: {sizes} are not a weight [{rows}, {columns}]")
        return cls((rows, columns), codes.reshape(-1), scales, nested, np.float32(state["nested_offset"]))

    @staticmethod
    def quantization_config(dtype: str) -> dict[str, Any]:
        """What config.json says of it to transformers."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
        }


def _state(name: str, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """What bitsandbytes writes beside a weight, as JSON in bytes. Raises InputError where it is not that."""
    try:
        state = json.loads(read(name + STATE).tobytes())
        rows, columns = state["shape"]
        float(state["nested_offset"])
        if not (type(rows) is type(columns) is int and min(rows, columns) > 0):
            raise ValueError("shape")
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{name}{STATE}: is not bitsandbytes' state of a weight; save the model again") from None
    return state


_ZERO = int(np.flatnonzero(NF4 == 0)[0])  # the code of what pads a last block


def _parts(
    arrays: Mapping[str, np.ndarray], pieces: Pieces
) -> Iterator[tuple[tuple[slice, ...], dict[str, np.ndarray], np.ndarray]]:
    """Every piece: its box in [*out, *in], its own part of codes and scales, and the scales' block numbers."""
    inputs, shards = len(pieces.ins), pieces.matrix_shards
    touched = np.arange(blocks_of_a_run(pieces))[:, None]
    for box, place, where in pieces.each():
        part = {}
        for name in ("codes", "scales"):
            sizes = (n // count for n, count in zip(arrays[name].shape, shards, strict=True))
            part[name] = arrays[name][tuple(slice(p * n, (p + 1) * n) for p, n in zip(place, sizes, strict=True))]
        numbers = first_blocks(pieces, where, np)[:, None] + touched
        yield (*box[inputs:], *box[:inputs]), part, numbers.reshape(part["scales"].shape)


def _same(book: np.ndarray, ours: np.ndarray) -> bool:
    # On a processor without fused multiply-add torch makes some of the dynamic type's values an ulp different.
    return book.shape == ours.shape and np.allclose(book, ours, rtol=0, atol=1e-6)


def _code(blocks: np.ndarray, absmax: np.ndarray, codes: np.ndarray) -> None:
    """Fill `absmax` [n] and the packed `codes` [n * 32] of `blocks` [n, 64]."""
    step = CACHED // BLOCK
    above = np.empty((step, BLOCK), np.bool_)
    ones = above.view(np.uint8)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        largest = np.abs(part).max(axis=1)
        absmax[start : start + step] = largest
        scaled = part * (np.float32(1) / np.maximum(largest, TINY))[:, None]
        code = np.zeros(scaled.shape, np.uint8)
        for bound in midpoints(NF4):
            np.greater(scaled, bound, out=above[: len(part)])
            np.add(code, ones[: len(part)], out=code)
        codes[start * BLOCK // 2 : (start + step) * BLOCK // 2] = ((code[:, ::2] << 4) | code[:, 1::2]).reshape(-1)


def _quantise_scales(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(8-bit codes [blocks], largest magnitude of each group) of the scales less their mean."""
    groups = np.pad(centred, (0, -centred.size % GROUP)).reshape(-1, GROUP)
    largest = np.abs(groups).max(axis=1)
    scaled = groups * (np.float32(1) / np.maximum(largest, TINY))[:, None]
    codes = np.searchsorted(midpoints(dynamic()), scaled.reshape(-1)[: centred.size], side="left")
    return codes.astype(np.uint8), largest


def _unpacked(codes: np.ndarray) -> np.ndarray:
    """uint8 [n] -> uint8 [2n] of four bits each."""
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
