"""Jora's programs, lowered from shapes alone: a LoRA step, a decode step of the serving engine, a GaLore step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jora
from jora.data.batches import Shape
from jora.methods.full import Full
from jora.models.config import LINEARS, ModelConfig
from jora.models.params import abstract_params
from jora.quant import Kind
from jora.serve.adapters.active import Active, active_parts, active_shardings
from jora.serve.device.programs import Program, decode
from jora.serve.pages.layout import PoolLayout, pool_sharding
from jora.sharding import Layout
from jora.train.estimation import abstract_programs
from jora.train.options import TrainOptions

ROWS, ADAPTERS, RANK, CONTEXT, PAGE, PAGES = 64, 64, 8, 1024, 16, 4096
ANSWERS = 64


METHODS = {"lora": jora.LoRA, "dora": jora.DoRA, "pissa": jora.PiSSA}


def adapter_step(
    config: ModelConfig, layout: Layout, tokens: int, remat: str, method: str = "lora", quant: Kind | None = None
) -> Any:
    """Rank 16 on all linears in fp32, one row, a bf16 base."""
    options = TrainOptions(max_length=tokens, batch_size=1)
    programs = abstract_programs(config, layout, METHODS[method](rank=16), options, jnp.bfloat16, quant)
    program = programs.program._replace(remat=remat)
    return programs.trace_train(Shape(1, tokens, min(ANSWERS, tokens)), program).lower()


def galore_step(config: ModelConfig, layout: Layout, projection: str) -> Any:
    """Layer-wise, 8-bit moments, rank 1024, one row of 256 tokens, no clipping (docs/galore.md)."""
    galore: dict[str, Any] = dict(optimizer="galore8bit", galore_rank=1024, layerwise=True, max_grad_norm=0.0)
    options = TrainOptions(**galore, galore_projection=projection)
    programs = abstract_programs(config, layout, Full(), options, jnp.bfloat16)
    return programs.trace_train(Shape(1, 256, 256), programs.program._replace(remat="full")).lower()


def decode_step(config: ModelConfig, layout: Layout, quant: Kind | None = None) -> Any:
    """ROWS rows beside ADAPTERS adapters on all linears, in bf16."""
    dtype = jnp.bfloat16
    pool_layout = PoolLayout.of(config, layout, dtype, PAGE)
    ranks = ADAPTERS * RANK

    def abstract(shape: tuple[int, ...], kind: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    def integers(*shape: int) -> Any:
        return abstract(shape, jnp.int32, layout.sharding((None,) * len(shape)))

    factors: dict[str, dict[Any, Any]] = {name: {} for name in "abuv"}
    for part in active_parts(config, LINEARS, ranks, 0):
        factors[part.name][part.key] = abstract(part.shape, dtype, layout.sharding(part.axes, part.shape))
    whole = active_shardings(config, layout, LINEARS, ranks, 0).scales_bias
    active = Active(**factors, owner=integers(ranks), scales_bias=abstract((0,), bool, whole))
    pool = abstract((PAGES, pool_layout.shards, pool_layout.elements), dtype, pool_sharding(layout))
    tables = integers(len(pool_layout.groups), ROWS, pool_layout.blocks(CONTEXT))
    rows = (integers(ROWS) for _ in range(3))
    params = abstract_params(config, layout, dtype, quant)
    return decode.lower(params, active, pool, *rows, tables, program=Program(config, layout, pool_layout))
