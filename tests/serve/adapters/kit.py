"""Adapters of every kind that the engine serves, on one tiny model, each with an oracle outside our own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peft import IA3Config, LoraConfig, VeraConfig
from tests.methods.peft_configs import made
from tests.tiny import logits
from transformers import AutoModelForCausalLM

import jora
from jora.methods.flora import FLoRA
from jora.methods.method import Adapter, Method, State
from jora.methods.nola import NOLA
from jora.methods.per_head import PerHeadLoRA
from jora.models import decoder, head
from jora.models.adapted import Bound, Rows
from jora.models.model import Model

FAMILY = "qwen2"  # biases in q, k, v; two query heads on each of two KV heads
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PEFT: Mapping[str, Callable[[], Any]] = {
    "rank 1": lambda: LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "rank 6": lambda: LoraConfig(
        r=6, lora_alpha=5, target_modules=ALL, rank_pattern={"down_proj": 2, "layers.0.self_attn.v_proj": 3}
    ),
    "rslora 9": lambda: LoraConfig(r=9, use_rslora=True, target_modules=["v_proj", "o_proj", "up_proj"]),
    "dora": lambda: LoraConfig(r=3, use_dora=True, target_modules=ALL, layers_to_transform=[1]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "vera": lambda: VeraConfig(r=7, d_initial=0.3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
}
OWN: Mapping[str, Method] = {
    "flora": FLoRA(rank=3, targets=["q_proj", "o_proj", "down_proj"], layers_to_transform=[0]),
    "nola": NOLA(rank=4, bases=10, alpha=6, targets=["q_proj", "gate_proj", "down_proj"]),
    "per-head": PerHeadLoRA(rank=2, alpha=4, targets=["q_proj", "v_proj"]),
}


class Case(NamedTuple):
    """An adapter and what the model with it gives for some tokens, by transformers or PEFT."""

    adapter: Adapter
    expected: Callable[[np.ndarray], np.ndarray]


def case(name: str, model: Model, directory: Path) -> Case:
    """One of the adapters above, with random values."""
    if name in PEFT:
        peft = made(FAMILY, PEFT[name](), directory / "peft")
        return Case(jora.load_adapter(directory / "peft", model), lambda ids: logits(peft, ids))
    fresh = OWN[name].init(model, jax.random.key(0))
    draw = np.random.default_rng(0)

    def moved(x: jax.Array) -> jax.Array:
        return jax.device_put(x + 0.3 * draw.standard_normal(x.shape).astype(np.float32), x.sharding)

    adapter = dataclasses.replace(fresh, state=State(jax.tree.map(moved, fresh.state.trained), fresh.state.constant))
    jora.merge(model, adapter).save(directory / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(directory / "merged")).eval().float()
    return Case(adapter, lambda ids: logits(merged, ids))


def run(model: Model, bind: Callable[..., Bound], ids: np.ndarray, *arrays: Any) -> np.ndarray:
    """Logits of whole sequences under `bind(*arrays)`, inside jit."""

    @jax.jit
    def forward(params: Any, ids: Any, arrays: Any) -> Any:
        bound, rows = bind(*arrays), Rows()
        hidden, _ = decoder.forward(params, model.config, model.layout, ids, bound=bound, rows=rows)
        return head.logits(params, model.config, model.layout, hidden, bound, rows)

    return np.asarray(forward(model.params, jnp.asarray(ids), arrays))
