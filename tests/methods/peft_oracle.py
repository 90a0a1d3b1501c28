"""PEFT on the tiny models: making, loading and running adapters, without its chatter."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny import tiny

from jora import LoRA
from jora.methods.method import Adapter
from jora.methods.method import State as MethodState
from jora.models.model import Model, load_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Every option at once: ranks and scales differ by layer and target, embeddings and output layer included.
RICH: dict[str, Any] = dict(
    targets=sorted([*LINEARS, "embed_tokens", "lm_head"]),
    rank=3,
    alpha=5,
    use_rslora=True,
    dropout=0.1,
    rank_pattern={"layers.0.self_attn.q_proj": 5, "down_proj": 2, "lm_head": 4, "embed_tokens": 6},
    alpha_pattern={"v_proj": 9, "^model.layers.1.mlp.up_proj": 1.5},
)
_PEFT_NAMES = {"targets": "target_modules", "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}


@functools.cache
def base(family: str, mesh: str | None = None) -> Model:
    """Our model of a tiny family."""
    return load_model(tiny(family)[1], mesh=mesh)


def peft_made(family: str, directory: Path, **options: Any) -> PeftModel:
    """A random adapter made and saved by PEFT; options go under our names or PEFT's."""
    config = LoraConfig(task_type="CAUSAL_LM", **{_PEFT_NAMES.get(k, k): v for k, v in options.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings, saved embeddings
        model = get_peft_model(copy.deepcopy(tiny(family)[0]), config).eval()
        randomise(model)
        model.save_pretrained(str(directory))
    return model


def randomise(model: PeftModel, seed: int = 0) -> None:
    """Random factors in place of PEFT's zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def peft_loaded(family: str, directory: Path) -> PeftModel:
    """The adapter of a directory on the transformers model; any warning about keys is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`|Model with `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(copy.deepcopy(tiny(family)[0]), str(directory)).eval()


def random_adapter(model: Model, seed: int = 0, **options: Any) -> Adapter:
    """One of our adapters with random factors; what pads a rank or the vocabulary stays zero."""
    adapter = LoRA(**options).init(model, jax.random.key(seed))
    generator = np.random.default_rng(seed)

    def draw(x: jax.Array) -> np.ndarray:
        return 0.2 * generator.standard_normal(x.shape).astype(np.float32)

    words = np.arange(model.config.padded_vocab) < model.config.vocab_size
    trained = {}
    for target, pair in adapter.state.trained.items():
        a, b = pair["a"], pair["b"]
        if target == "embed_tokens":
            trained[target] = {"a": jnp.asarray(draw(a) * words[:, None]), "b": b}
            continue
        stacked = target != "lm_head"
        true = np.asarray(a != 0).any(axis=tuple(range(int(stacked), a.ndim - 1)))
        mask = true.reshape(*true.shape, *(1,) * (b.ndim - true.ndim))
        mask = mask * words if target == "lm_head" else mask
        trained[target] = {"a": a, "b": jnp.asarray(draw(b) * mask)}
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trained, adapter.state.trained)
    return Adapter(adapter.method, MethodState(placed, adapter.state.constant), adapter.config, adapter.base)
