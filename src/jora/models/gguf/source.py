"""Tensors of a GGUF file under their Hugging Face names, shapes and values.

llama.cpp's converter renames every tensor, reorders the rows of Q and K for its own rotary layout (architecture
`llama`, which Mistral uses too), stores Gemma's norm weights as w + 1, leaves out an output weight that equals the
embedding, and stores Llama 3.1's rope scaling as a tensor of factors. All of it is undone here and in `config`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from jora.errors import InputError
from jora.models.gguf.config import GEMMAS, ROPE_FACTORS, hf_config
from jora.models.gguf.reader import GGUFFile, StoredTensor

_PIECE = 1 << 18
"""Values dequantised at a time: 1 MiB of float32 and some 5 MiB of temporaries in the `gguf` package."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_NORM_AFTER_ATTENTION = {"ffn_norm.weight": "post_attention_layernorm.weight"}
_QKV_BIAS = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
_QK_NORM = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
_SANDWICH_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_LAYER_OF_ARCHITECTURE: dict[str, dict[str, str]] = {
    "llama": _LAYER | _NORM_AFTER_ATTENTION,
    "qwen2": _LAYER | _NORM_AFTER_ATTENTION | _QKV_BIAS,
    "qwen3": _LAYER | _NORM_AFTER_ATTENTION | _QK_NORM,
    "gemma": _LAYER | _NORM_AFTER_ATTENTION,
    "gemma2": _LAYER | _SANDWICH_NORMS,
    "gemma3": _LAYER | _SANDWICH_NORMS | _QK_NORM,
}


class GGUFSource:
    """A `TensorSource` over a .gguf file: Hugging Face names and shapes, float32 values, nothing read ahead.

    Attributes:
        file: the container (metadata and tensor table).
        hf_config: the contents of the Hugging Face `config.json` that describes the same model.

    Raises:
        InputError: an unreadable file, an architecture outside the supported families, a tensor or a setting that
            the family does not have - each named.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = GGUFFile(path)
        self.hf_config: dict[str, Any] = hf_config(self.file)
        self._gemma = self.file.architecture in GEMMAS
        self._tensors = {
            _hf_name(self.file, name, self.hf_config["num_hidden_layers"]): tensor
            for name, tensor in self.file.tensors.items()
            if name != ROPE_FACTORS
        }

    def names(self) -> frozenset[str]:
        """Hugging Face names of the tensors; a tied model has no `lm_head.weight`."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as in Hugging Face, e.g. [out, in] for a linear weight."""
        return self._tensor(name).shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Values of `name[index]` as float32; `index` has one contiguous slice (step 1) for each axis.

        Only the blocks that hold the asked rows and columns are read and dequantised, a piece at a time, so beyond
        the result memory stays near 5 MiB whatever the tensor's size.
        """
        tensor = self._tensor(name)
        ranges = [range(*part.indices(size)) for part, size in zip(index, tensor.shape, strict=True)]
        if any(extent.step != 1 for extent in ranges):
            raise ValueError(f"{name}: a GGUF tensor is read in contiguous slices, got {index}")
        rows, columns = (range(1), ranges[0]) if len(ranges) == 1 else (ranges[0], ranges[1])
        values = self._read_rows(tensor, rows, columns, self._heads_of(name))
        if self._gemma and name.endswith("norm.weight"):
            values -= 1.0
        return values.reshape([len(extent) for extent in ranges])

    def _tensor(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{self.file.path}: has no tensor {name}") from None

    def _heads_of(self, name: str) -> int | None:
        """Heads whose rows llama.cpp reordered in this tensor; None where it reordered nothing."""
        if self.file.architecture != "llama":
            return None
        if name.endswith("q_proj.weight"):
            return int(self.hf_config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return int(self.hf_config["num_key_value_heads"])
        return None

    def _read_rows(self, tensor: StoredTensor, rows: range, columns: range, heads: int | None) -> np.ndarray:
        out = np.empty((len(rows), len(columns)), np.float32)
        if not out.size:
            return out
        block, _ = GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)
        stored = self.file.blocks(tensor)[:, first:last]
        keep = slice(columns.start - first * block, columns.stop - first * block)
        step = max(1, _PIECE // ((last - first) * block))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            where = slice(part.start, part.stop) if heads is None else _stored_rows(part, heads, tensor.shape[0])
            # one long row: the package would otherwise loop over groups of sixteen rows
            flat = np.ascontiguousarray(stored[where]).reshape(1, -1)
            values = dequantize(flat, tensor.kind).reshape(len(part), -1)
            out[start : start + len(part)] = values[:, keep]
        return out


def _stored_rows(rows: range, heads: int, total: int) -> np.ndarray:
    """Where llama.cpp keeps the given rows of a Q or K weight, int64 [rows].

    Hugging Face pairs row i of a head with row i + d/2 for the rotation, llama.cpp with its neighbour: row (half j,
    pair i) of each head is stored as row 2 i + j.
    """
    size = total // heads
    row = np.asarray(rows, np.int64)
    head, inside = np.divmod(row, size)
    half, pair = np.divmod(inside, size // 2)
    return head * size + 2 * pair + half


def _hf_name(file: GGUFFile, name: str, layers: int) -> str:
    if name in _TOP:
        return _TOP[name]
    prefix, _, rest = name.partition(".")
    number, _, leaf = rest.partition(".")
    known = _LAYER_OF_ARCHITECTURE[file.architecture].get(leaf)
    if prefix != "blk" or known is None or not number.isdecimal() or int(number) >= layers:
        raise InputError(
            f"{file.path}: tensor {name} is unknown in a {file.architecture} model of {layers} layers;"
            " this model cannot be represented"
        )
    return f"model.layers.{int(number)}.{known}"
