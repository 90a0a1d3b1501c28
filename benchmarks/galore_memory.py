"""GaLore's memory, without allocating any: parameter counts, optimiser state in bytes, and a compiled 7B step.

    python benchmarks/galore_memory.py [--no-step]

State bytes are those of the arrays that `jora.optim` would make (`jax.eval_shape`), beside the formula of
arXiv 2403.03507: for each matrix m r + 2 n r (m <= n), for other weights 2 each. The step is compiled for this
machine's backend from shapes alone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp

from jora.data.batches import Shape
from jora.methods.full import Full
from jora.models.config import LINEARS, ModelConfig
from jora.models.families import config_from_hf
from jora.models.params import abstract_params
from jora.models.tensors import linear_shape, parameter_count
from jora.optim import GaLore, scale_by_adam
from jora.optim.matrices import layer_blocks, layer_matrices, table_blocks
from jora.optim.model import Direct, ModelOptimizer
from jora.sharding import single_device
from jora.train.estimation import abstract_programs
from jora.train.memory import ProgramMemory
from jora.train.options import TrainOptions

# (width, MLP width, layers, heads, rank) of the paper's models; vocabulary 32,000, embeddings not tied.
SIZES = {
    "60M": (512, 1376, 8, 8, 128),
    "130M": (768, 2048, 12, 12, 256),
    "350M": (1024, 2736, 24, 16, 256),
    "1B": (2048, 5461, 24, 32, 512),
    "7B": (4096, 11008, 32, 32, 1024),
}


def paper_config(size: str) -> ModelConfig:
    width, mlp, layers, heads, _ = SIZES[size]
    entries = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    return config_from_hf(
        dict(model_type="llama", vocab_size=32000, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0)
        | dict(max_position_embeddings=1024, num_key_value_heads=heads, tie_word_embeddings=False)
        | entries
    )


def formula(config: ModelConfig, rank: int | None) -> tuple[int, int]:
    """(elements of P, elements of moments); rank None: plain Adam."""
    total = parameter_count(config)
    if rank is None:
        return 0, 2 * total
    projectors = moments = matrices = 0
    for target in LINEARS:
        s = linear_shape(config, target)
        m, n = sorted((s.in_size, s.out_size))
        projectors += config.layers * m * rank
        moments += config.layers * 2 * n * rank
        matrices += config.layers * m * n
    return projectors, moments + 2 * (total - matrices)


def state_bytes(config: ModelConfig, rank: int | None, moments: Any, precision: Any = "bfloat16") -> int:
    """Bytes of the optimiser state that would be made for bf16 weights."""
    adam = scale_by_adam(moments=moments, keep=layer_blocks(config, rank))
    layer: Any = Direct(adam)
    if rank is not None:
        matrices = layer_matrices(config)
        layer = GaLore(adam, rank, matrices=matrices, precision=precision, layers=config.layers)
    optimizer = ModelOptimizer(scale_by_adam(moments=moments, keep=table_blocks), layer, lambda step: 0.0)
    state = jax.eval_shape(optimizer.init, abstract_params(config, single_device(), jnp.bfloat16))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def headline(config: ModelConfig, rank: int) -> list[dict[str, Any]]:
    """Optimiser state at 7B against bf16 AdamW."""
    base = state_bytes(config, None, "bfloat16")
    plain = formula(config, None)[1] * 2
    rows = [dict(state="AdamW, bf16 moments", formula_gb=plain / 1e9, measured_gb=base / 1e9)]
    elements = formula(config, rank)
    for moments, size in (("bfloat16", 2), ("int8", 1)):
        for precision, width in (("bfloat16", 2), ("int8", 1)):
            said = elements[0] * width + elements[1] * size
            found = state_bytes(config, rank, moments, precision)
            rows.append(
                dict(
                    state=f"GaLore r{rank}, {moments} moments, {precision} P",
                    formula_gb=said / 1e9,
                    measured_gb=found / 1e9,
                    formula_less=1 - said / plain,
                    measured_less=1 - found / base,
                )
            )
    return rows


def step_memory(config: ModelConfig, rank: int, **changes: Any) -> dict[str, Any]:
    """The compiler's analysis of one step of 256 tokens with bf16 weights, in GB.

    A CPU's compiler turns bf16 stacks into fp32 ones, which says nothing about an accelerator. There the fp32
    program is compiled, and half of its weights taken off: its gradients and slices of weights stay twice too large.
    """
    settings: dict[str, Any] = dict(optimizer="galore8bit", galore_rank=rank, layerwise=True, max_grad_norm=0.0)
    options = TrainOptions(**{**settings, **changes})
    kind = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    programs = abstract_programs(config, single_device(), Full(), options, kind)
    memory = ProgramMemory.of(programs.compile_train(Shape(1, 256, 256), programs.program._replace(remat="full")))
    arguments = memory.arguments - (2 * parameter_count(config) if kind == jnp.float32 else 0)
    added = memory.added / 1e9
    return {
        "program": jnp.dtype(kind).name,
        "weights_and_state_gb": arguments / 1e9,
        "temporaries_gb": added,
        "total_gb": arguments / 1e9 + added,
        "total_gib": (arguments + memory.added) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-step", action="store_true", help="only count bytes, compile nothing")
    given = parser.parse_args()
    for size, (*_, rank) in SIZES.items():
        config = paper_config(size)
        p, m = formula(config, rank)
        count = parameter_count(config)
        print(json.dumps(dict(model=size, parameters=count, rank=rank, bf16_state_gb=2 * (p + m) / 1e9)))
    config = paper_config("7B")
    for row in headline(config, 1024):
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    if given.no_step:
        return
    for name, changes in (
        ("no clipping", {}),
        ("int8 projection", dict(galore_projection="int8")),
        ("clipped exactly, two passes", dict(max_grad_norm=1.0)),
        ("clipped by the projected norm", dict(max_grad_norm=1.0, clip_projected=True)),
        ("8-bit Adam, layer-wise", dict(optimizer="adamw8bit")),
    ):
        found = step_memory(config, 1024, **changes)
        print(json.dumps({"step": name} | {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}))


if __name__ == "__main__":
    main()
