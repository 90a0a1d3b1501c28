"""S-LoRA's tensor parallelism beside ours: the same logits, and what formulas say of exchanges, products and bytes."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from benchmarks.serving.bases import BASES
from benchmarks.serving.parallel_plans import PLANS, Shape, all_plans, cost, expected, largest_difference

from jora.models.families import config_from_hf
from jora.sharding import MeshSpec, build_layout

RANKS = 16
TINY = config_from_hf(BASES["tiny"])
ONE_KV_HEAD = replace(TINY, kv_heads=1, heads=4)


@pytest.mark.parametrize(
    ("config", "tensor", "shape"),
    [(TINY, 2, Shape("decode", 5, 1, 9)), (ONE_KV_HEAD, 4, Shape("prefill", 1, 24, 0))],
    ids=["decode", "prefill"],
)
def test_plans_agree_and_cost_what_formulas_say(config, tensor, shape):
    layout = build_layout(MeshSpec(tensor=tensor), config.kv_heads)
    programs, pool = all_plans(config, layout, RANKS, shape, xla_backend_optimization_level="0")
    logits, costs = {}, {}
    for plan, one in programs.items():
        pool, logits[plan] = one.run(pool)
        costs[plan] = cost(one.program, config.layers)
    assert largest_difference(logits) < 1e-5
    assert np.abs(logits["base"] - logits["training"]).max() > 0.1 * np.std(logits["base"])
    assert set(costs) == {"base", *PLANS}
    for plan in PLANS:
        added, formula = costs[plan].beyond(costs["base"]), expected(plan, config, layout, RANKS, shape)
        assert added.exchanged == formula.exchanged, plan
        assert added.sent(tensor) == (4 + 5 * (plan == "s-lora")) * (tensor - 1) * shape.total * RANKS * 4 / tensor
        # Beside the factors' products there is the mask, beside the factors the ranks' owners.
        assert formula.flops < added.flops < 1.05 * formula.flops, plan
        assert formula.resident < added.resident < formula.resident + 1024, plan
    assert costs["s-lora"].resident < costs["mixed"].resident < costs["training"].resident


def test_the_further_cut_has_no_whole_factor():
    from benchmarks.serving.parallel_plans import cut_further, random_active

    from jora.models.config import LINEARS

    layout = build_layout(MeshSpec(tensor=2), TINY.kv_heads)
    active = random_active(TINY, layout, RANKS, Shape("decode", 5, 1, 9), np.random.default_rng(0))
    cut = cut_further(active, layout, LINEARS)
    for one in jax.tree.leaves((cut.a, cut.b)):
        assert one.addressable_shards[0].data.size * 2 == one.size
