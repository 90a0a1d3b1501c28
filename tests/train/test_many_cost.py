"""What many jobs in one step cost, by the compiler: memory beside one job's, and FLOPs by the sum of ranks."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jora.data.batches import Shape
from jora.methods.bank import Kind
from jora.methods.lora import LoRA
from jora.models.config import LINEARS
from jora.models.families import config_from_hf
from jora.models.model import Model
from jora.models.params import abstract_params
from jora.models.tensors import linear_shape
from jora.sharding import single_device
from jora.train import TrainOptions
from jora.train.estimation import abstract_programs
from jora.train.flops import matmul_flops
from jora.train.many.jobs import Job
from jora.train.many.plan import Group, Planned, Prepared
from jora.train.many.programs import BankPrograms
from jora.train.memory import ProgramMemory

CONFIG = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "intermediate_size": 256,
    }
)
LENGTH, ANSWERS = 32, 8


def together(ranks: list[int], remat: Any) -> tuple[Any, int]:
    """(the traced step of jobs of these ranks with one row each, trained parameters)."""
    model = Model(abstract_params(CONFIG, single_device(), jnp.float32), CONFIG, single_device(), {}, "", {})
    kinds = [Kind(LoRA(rank=rank), count, 1) for rank, count in Counter(ranks).items()]
    jobs = [Job(name=f"j{number}", data=[], method=kind.method) for number, kind in enumerate(kinds)]
    # A step's shapes follow from the kinds; of the jobs only options are asked for.
    prepared: list[Any] = [Prepared(job, None, None, None, {}) for job in jobs]  # type: ignore[arg-type]
    programs = BankPrograms(model, [Group(k, (n,)) for n, k in enumerate(kinds)], prepared, deterministic=False)
    traced = programs.trace(Planned(tuple(range(len(kinds))), LENGTH, ANSWERS), remat)
    return traced, sum(math.prod(x.shape) for each in programs.arrays for x in jax.tree.leaves(each.state.trained))


def alone(rank: int, rows: int, remat: Any) -> tuple[Any, int]:
    """The same of one job with that many rows."""
    programs = abstract_programs(CONFIG, single_device(), LoRA(rank=rank), TrainOptions(), jnp.float32)
    traced = programs.trace_train(Shape(rows, LENGTH, ANSWERS), programs.program._replace(remat=remat))
    return traced, sum(math.prod(x.shape) for x in jax.tree.leaves(programs.state.trained))


def test_memory_is_one_jobs_and_the_adapters() -> None:
    """Those of one job with as many rows; of every further parameter its gradient and two moments, 16 bytes in all."""
    (many, parameters), (one, own) = together([8, 16, 32, 64], "selective"), alone(30, 4, "selective")
    found, single = (ProgramMemory.of(traced.lower().compile()) for traced in (many, one))
    more = parameters - own
    assert found.arguments - single.arguments == pytest.approx(12 * more, rel=1e-3)
    # On layers this small the inputs that each kind has apart are 4 % of all; moments held twice would be a quarter.
    assert found.total <= 1.06 * (single.total + 16 * more)


def test_flops_of_a_step_grow_with_the_sum_of_ranks() -> None:
    even, mixed, double = (
        matmul_flops(together(ranks, "none")[0].jaxpr) for ranks in ([4] * 4, [1, 1, 1, 13], [8] * 4)
    )
    assert mixed == pytest.approx(even, rel=1e-3)
    shapes = [linear_shape(CONFIG, target) for target in LINEARS]
    # Forward, and twice as much backward; one row a job.
    products = 6 * LENGTH * CONFIG.layers * sum(s.in_size + s.out_size for s in shapes)
    assert double - even == pytest.approx(16 * products, rel=0.01)
    base = even - 16 * products
    assert base > 0 and matmul_flops(alone(4, 4, "none")[0].jaxpr) == pytest.approx(even, rel=0.01)
