"""int8 weights: each output channel is scaled by its largest magnitude, as in LLM.int8 (arXiv 2208.07339).

w = code * absmax / 127, with code = round(127 w / absmax): at most half a step of absmax / 127 off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int8

from jora.errors import InputError
from jora.quant.pieces import Pieces, Where
from jora.quant.weight import Field, Kind, QuantisedWeight

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight(QuantisedWeight):
    """Codes are laid out as the dense weight is; a scale belongs to an output."""

    codes: Int8[Array, "..."]  # [*in, *out]
    absmax: Float32[Array, "..."]  # [*out]

    kind: ClassVar[Kind] = "int8"

    @classmethod
    def fields(cls, pieces: Pieces) -> dict[str, Field]:
        spec, inputs = pieces.spec(), len(pieces.ins)
        shape = tuple(cut.size for cut in pieces.cuts)
        return {
            "codes": Field(shape, jnp.int8, spec),
            "absmax": Field(shape[inputs:], jnp.float32, PartitionSpec(*spec[inputs:])),
        }

    @staticmethod
    def restore(pieces: Pieces, dtype: Any, where: Where, *arrays: Array) -> Float[Array, "..."]:
        codes, absmax = arrays
        return (codes.astype(jnp.float32) * (absmax * np.float32(1 / LARGEST))).astype(dtype)


@dataclass(frozen=True)
class Int8Tensor:
    """One weight [out, in] as files hold it. codes: int8 [out, in]; absmax: fp32 [out]."""

    codes: np.ndarray
    absmax: np.ndarray

    weight: ClassVar[type[QuantisedWeight]] = Int8Weight

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        rows, columns = self.codes.shape
        return rows, columns

    @classmethod
    def quantise(cls, shape: tuple[int, int], read: Callable[[int, int], np.ndarray], piece: int) -> Int8Tensor:
        """From rows that `read(start, stop)` gives, some `piece` elements at a time."""
        codes, absmax = np.empty(shape, np.int8), np.empty(shape[0], np.float32)
        step = max(1, piece // shape[1])
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            rows = np.asarray(read(start, stop), np.float32)
            absmax[start:stop] = np.abs(rows).max(axis=1)
            largest = absmax[start:stop, None]
            inverse = np.divide(np.float32(LARGEST), largest, out=np.zeros_like(largest), where=largest > 0)
            np.rint(rows * inverse, out=codes[start:stop], casting="unsafe")
        return cls(codes, absmax)

    def dense(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), fp32 [n, in]."""
        return self.codes[start:stop].astype(np.float32) * (self.absmax[start:stop, None] * np.float32(1 / LARGEST))

    def arrays(self, pieces: Pieces) -> dict[str, np.ndarray]:
        """As the devices hold it, all pieces together."""
        shape = tuple(cut.size for cut in pieces.cuts)
        codes = np.ascontiguousarray(self.codes.T).reshape(shape)
        return {"codes": codes, "absmax": self.absmax.reshape(shape[len(pieces.ins) :])}

    @classmethod
    def collect(cls, arrays: Mapping[str, np.ndarray], pieces: Pieces) -> Int8Tensor:
        """What `arrays` gave, back."""
        codes = np.ascontiguousarray(arrays["codes"].reshape(pieces.rows, pieces.columns).T)
        return cls(codes, arrays["absmax"].reshape(-1))

    def stored(self, name: str, dtype: str) -> dict[str, np.ndarray]:
        """The tensors that stand for weight `name` in a file, as bitsandbytes' Linear8bitLt writes them."""
        return {
            name: self.codes,
            _beside(name, "SCB"): self.absmax,
            _beside(name, "weight_format"): np.zeros((), np.uint8),  # 0: row by row
        }

    @classmethod
    def stored_shapes(cls, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{tensor: (shape, dtype)} of what `stored` gives for a weight of this shape [out, in]."""
        return {
            name: (shape, np.int8),
            _beside(name, "SCB"): (shape[:1], np.float32),
            _beside(name, "weight_format"): ((), np.uint8),
        }

    @classmethod
    def stored_names(cls, names: frozenset[str]) -> dict[str, frozenset[str]]:
        """{weight: what belongs to it} of the quantised weights among a file's tensors."""
        return {
            name: frozenset(_beside(name, part) for part in ("SCB", "weight_format"))
            for name in names
            if name.endswith(".weight") and _beside(name, "SCB") in names
        }

    @classmethod
    def stored_shape(cls, name: str, read: Callable[[str], np.ndarray], codes: tuple[int, ...]) -> tuple[int, ...]:
        """[out, in] of weight `name` in a file where its codes have shape `codes`."""
        return codes

    @classmethod
    def load(cls, name: str, read: Callable[[str], np.ndarray]) -> Int8Tensor:
        """Weight `name` from a file's tensors. Raises InputError where its form is another one."""
        codes, absmax = read(name), read(_beside(name, "SCB"))
        if codes.dtype != np.int8 or absmax.shape != codes.shape[:1]:
            raise InputError(f"{name}: is not int8 by rows ({codes.dtype} {codes.shape}); load the unquantised model")
        return cls(codes, absmax.astype(np.float32))

    @staticmethod
    def quantization_config(dtype: str) -> dict[str, Any]:
        """What config.json says of it to transformers."""
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}


def _beside(name: str, part: str) -> str:
    return name.removesuffix("weight") + part
