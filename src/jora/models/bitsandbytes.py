"""Model directories whose linear layers bitsandbytes' formats hold, read and written.

Names and bytes are those that transformers writes for `BitsAndBytesConfig`: nf4 with double quantisation, and
int8 by rows. Embeddings, head, norms and biases are stored as in any other directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from jora.errors import InputError
from jora.models.source import TensorSource
from jora.quant import HostTensor, Kind, host_type

# Where config.json keeps the fingerprint of the weights from before they were quantised.
FINGERPRINT = "jora_base_fingerprint"


class QuantisedSource:
    """A directory of quantised weights, seen as the dense tensors that they stand for."""

    def __init__(self, inner: TensorSource, kind: Kind, fingerprint: str | None):
        self.kind: Kind = kind
        self.fingerprint = fingerprint
        self._inner = inner
        self._host = host_type(kind)
        self._weights = self._host.stored_names(inner.names())
        self._beside = frozenset().union(*self._weights.values())
        self.stored = lru_cache(maxsize=1)(self._load)

    def names(self) -> frozenset[str]:
        return self._inner.names() - self._beside

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._inner.shape(name)
        return self._host.stored_shape(name, self._whole, shape) if name in self._weights else shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in self._weights:
            return self._inner.read(name, index)
        tensor = self.stored(name)
        rows = range(*index[0].indices(tensor.shape[0]))
        return tensor.dense(rows.start, rows.stop)[:, index[1]]

    def _load(self, name: str) -> HostTensor:
        """Weight `name` as it is stored. Raises InputError for one that is not quantised."""
        if name not in self._weights:
            raise InputError(f"{name} is not quantised although config.json says so; load the unquantised model")
        return self._host.load(name, self._whole)

    def _whole(self, name: str) -> np.ndarray:
        return self._inner.read(name, (slice(None),) * len(self._inner.shape(name)))


def open_quantised(source: TensorSource, hf_config: dict[str, Any]) -> tuple[TensorSource, dict[str, Any]]:
    """`source` and config as an unquantised model's, where config.json says that bitsandbytes wrote it.

    Raises InputError for other ways to quantise.
    """
    config = dict(hf_config)
    found = config.pop("quantization_config", None)
    fingerprint = config.pop(FINGERPRINT, None)
    if not found:
        return source, config
    return QuantisedSource(source, _kind(found), fingerprint), config


def _kind(found: Mapping[str, Any]) -> Kind:
    if found.get("quant_method") == "bitsandbytes":
        if found.get("load_in_8bit"):
            return "int8"
        if found.get("load_in_4bit") and found.get("bnb_4bit_quant_type") == "nf4":
            if found.get("bnb_4bit_use_double_quant"):
                return "nf4"
            raise InputError("config.json: nf4 without double quantisation; load the unquantised model with quant=nf4")
    name = found.get("bnb_4bit_quant_type") or found.get("quant_method")
    raise InputError(f"config.json: quantization_config is of {name}; jora reads bitsandbytes' int8 and nf4 alone")
