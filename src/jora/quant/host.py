"""What the host side of every kind of quantised weight can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from jora.errors import InputError
from jora.quant.pieces import Pieces
from jora.quant.weight import QuantisedWeight


class HostTensor(Protocol):
    """One weight [out, in] in the canonical form of bitsandbytes' files, whatever the mesh."""

    weight: ClassVar[type[QuantisedWeight]]

    @property
    def shape(self) -> tuple[int, int]: ...

    @classmethod
    def quantise(cls, shape: tuple[int, int], read: Callable[[int, int], np.ndarray], piece: int) -> HostTensor:
        """From rows that `read(start, stop)` gives, some `piece` elements at a time."""
        ...

    def dense(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), fp32 [n, in]."""
        ...

    def arrays(self, pieces: Pieces) -> dict[str, np.ndarray]:
        """As the devices hold it (`QuantisedWeight.fields`), all pieces together."""
        ...

    @classmethod
    def collect(cls, arrays: Mapping[str, np.ndarray], pieces: Pieces) -> HostTensor:
        """What `arrays` gave, back."""
        ...

    def stored(self, name: str, dtype: str) -> dict[str, np.ndarray]:
        """The tensors that stand for weight `name` in a file; `dtype` is the one to compute in."""
        ...

    @classmethod
    def stored_shapes(cls, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{tensor: (shape, dtype)} of what `stored` gives for a weight of this shape [out, in]."""
        ...

    @classmethod
    def stored_names(cls, names: frozenset[str]) -> dict[str, frozenset[str]]:
        """{weight: what belongs to it} of the quantised weights among a file's tensors."""
        ...

    @classmethod
    def stored_shape(cls, name: str, read: Callable[[str], np.ndarray], codes: tuple[int, ...]) -> tuple[int, ...]:
        """[out, in] of weight `name` in a file where its codes have shape `codes`."""
        ...

    @classmethod
    def load(cls, name: str, read: Callable[[str], np.ndarray]) -> HostTensor:
        """Weight `name` from a file's tensors. Raises InputError where its form is another one."""
        ...

    @staticmethod
    def quantization_config(dtype: str) -> dict[str, Any]:
        """What config.json says of it to transformers."""
        ...


def host_type(kind: str) -> type[HostTensor]:
    """The host side of "int8" or "nf4". Raises InputError for another kind."""
    from jora.quant.int8 import Int8Tensor
    from jora.quant.nf4_host import NF4Tensor

    kinds: dict[str, type[HostTensor]] = {"int8": Int8Tensor, "nf4": NF4Tensor}
    if kind not in kinds:
        raise InputError(f"quant {kind!r} is not known; use {' or '.join(kinds)}")
    return kinds[kind]
