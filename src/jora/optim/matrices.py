"""Which leaves of one decoder layer are matrices, and along which axes their moments' 8-bit blocks run."""

from __future__ import annotations

from jora.models.config import ModelConfig
from jora.models.tensors import linear_shape
from jora.optim.adam import KeepAxes
from jora.optim.galore import Matrices
from jora.optim.projection import Side


def layer_matrices(config: ModelConfig) -> Matrices:
    """The linear layers, by their path in `params.Layers`: "weights.q_proj"."""

    def inputs_of(path: str, shape: tuple[int, ...] = ()) -> int | None:
        group, _, target = path.partition(".")
        return len(linear_shape(config, target).in_shape) if group == "weights" else None

    return inputs_of


def layer_blocks(config: ModelConfig, rank: int | None) -> KeepAxes:
    """Blocks run along a matrix's outputs, or along the rank that takes their place; rank: GaLore's."""
    inputs_of = layer_matrices(config)

    def keep(path: str) -> int:
        inputs = inputs_of(path, ())
        if inputs is None:
            return 0
        shape = linear_shape(config, path.partition(".")[2])
        if rank is not None and Side(shape.in_shape + shape.out_shape, inputs, rank).projects_input:
            return 1  # [r, *out]
        return inputs

    return keep


def table_blocks(path: str) -> int:
    """Of what is outside the layers: tables [vocabulary, width], and the final norm."""
    return 0 if path == "final_norm" else 1
