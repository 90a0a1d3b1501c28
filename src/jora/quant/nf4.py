"""nf4 weights on the devices (QLoRA, arXiv 2305.14314): 4-bit codes, and a scale for each block of 64.

Canonical form, that of bitsandbytes: blocks are 64 elements of the weight [out, in], flattened row by row; a
block's absmax is itself 8 bits, in groups of 256 blocks with an fp32 scale each, around the weight's mean absmax:

    w = NF4[code] * absmax,    absmax = dynamic[scale] * nested[block // 256] + offset

Blocks are the same on every mesh. A device's piece [in, out] keeps the codes of two inputs in a byte and the
scales of every block that it touches: where its edges cut a block, both sides hold the block's scale, and an odd
number of inputs is padded to even. So a weight has the same values however it is cut, at 4 + 8/64 + 32/(64 * 256)
bits an element where no block is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, UInt8

from jora.quant.codebooks import NF4, dynamic
from jora.quant.pieces import Pieces, Where
from jora.quant.weight import Field, Kind, QuantisedWeight

BLOCK = 64  # elements that share a scale
GROUP = 256  # blocks whose scales share one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Weight(QuantisedWeight):
    """Codes and scales stand in a matrix [pieces x rows, pieces x columns]; nested scales are on every device."""

    codes: UInt8[Array, "..."]  # [half the inputs, out]; the high nibble is the first of two inputs
    scales: UInt8[Array, "..."]  # [runs x blocks a run touches, out]
    nested: Float32[Array, "..."]  # [groups]
    offset: Float32[Array, "..."]  # []

    kind: ClassVar[Kind] = "nf4"

    @classmethod
    def fields(cls, pieces: Pieces) -> dict[str, Field]:
        down, across = pieces.matrix_shards
        columns = across * pieces.local_columns
        scales = pieces.local_rows // pieces.run * blocks_of_a_run(pieces)
        groups = -(-pieces.rows * pieces.columns // (BLOCK * GROUP))
        return {
            "codes": Field((down * -(-pieces.local_rows // 2), columns), jnp.uint8, pieces.matrix_spec),
            "scales": Field((down * scales, columns), jnp.uint8, pieces.matrix_spec),
            "nested": Field((groups,), jnp.float32, PartitionSpec(None)),
            "offset": Field((), jnp.float32, PartitionSpec()),
        }

    @staticmethod
    def restore(pieces: Pieces, dtype: Any, where: Where, *arrays: Array) -> Float[Array, "..."]:
        codes, scales, nested, offset = arrays
        rows, columns = pieces.local_rows, pieces.local_columns
        first = first_blocks(pieces, where, jnp)
        touched = blocks_of_a_run(pieces)
        group = (first[:, None] + jnp.arange(touched)[:, None]) // GROUP
        scales = scales.reshape(group.shape)
        absmax = jnp.asarray(dynamic())[scales.astype(jnp.int32)] * nested.at[group].get(mode="clip") + offset
        values = _values(codes)[:rows]
        if whole_blocks(pieces):
            dense = values.reshape(-1, BLOCK, columns) * absmax.reshape(-1, 1, columns)
        else:
            block = _element_blocks(pieces, where) - first[:, None]
            dense = values.reshape(block.shape) * jnp.take_along_axis(absmax, block, axis=1)
        return dense.astype(dtype).reshape(pieces.local_shape)


def _values(codes: UInt8[Array, "half out"]) -> Float32[Array, "rows out"]:
    """The code book's values of both nibbles."""
    nibbles = (codes[:, None, :] >> jnp.array([4, 0], jnp.uint8)[:, None]) & 15
    return jnp.asarray(NF4)[nibbles.astype(jnp.int32)].reshape(-1, codes.shape[-1])


def whole_blocks(pieces: Pieces) -> bool:
    """Whether no block crosses a row of the weight or the edge of a piece."""
    return pieces.rows % BLOCK == 0 and pieces.run % BLOCK == 0


def blocks_of_a_run(pieces: Pieces) -> int:
    """How many blocks a run of inputs touches, at most."""
    return pieces.run // BLOCK if whole_blocks(pieces) else (pieces.run + BLOCK - 2) // BLOCK + 1


def first_blocks(pieces: Pieces, where: Where, xp: Any) -> Any:
    """The number of the first block that each run of a piece touches, for each output: [runs, out]."""
    starts = pieces.indices(pieces.ins, where, xp)[:: pieces.run]
    return (pieces.indices(pieces.outs, where, xp) * pieces.rows + starts[:, None]) // BLOCK


def _element_blocks(pieces: Pieces, where: Where) -> Array:
    """The block of each element of a piece: [runs, run, out]."""
    inputs = pieces.indices(pieces.ins, where, jnp).reshape(-1, pieces.run, 1)
    return (pieces.indices(pieces.outs, where, jnp) * pieces.rows + inputs) // BLOCK
