"""Tiny bases with a tokenizer, adapters for them, and what transformers says each request should give."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from peft import PeftModel
from tests.bytewise import bytewise_tokenizer
from tests.tiny import tiny
from transformers import PreTrainedModel

import jora
from jora.methods.method import Adapter, Method
from jora.methods.method import State as MethodState
from jora.models.model import Model, load_model

VOCAB = 258  # the tokenizer's 256 bytes, <s> and </s>
SIZES: dict[str, Any] = dict(vocab_size=VOCAB, max_position_embeddings=1024, bos_token_id=256, eos_token_id=257)


def hf_base(family: str = "llama2") -> tuple[PreTrainedModel, str]:
    """A tiny model of transformers that knows bytes, and its directory with the tokenizer in it."""
    model, directory = tiny(family, **SIZES)
    if not (Path(directory) / "tokenizer.json").exists():
        bytewise_tokenizer().save_pretrained(directory)
    return model, directory


@functools.cache
def base(family: str = "llama2", mesh: str | None = None) -> Model:
    """Ours."""
    return load_model(hf_base(family)[1], mesh=mesh)


def randomised(method: Method, model: Model, seed: int, spread: float = 0.3) -> Adapter:
    """An adapter whose trained numbers all differ from their first values, as training leaves them."""
    adapter = method.init(model, jax.random.key(seed))
    generator = np.random.default_rng(seed)

    def moved(x: jax.Array) -> jax.Array:
        noise = spread * generator.standard_normal(x.shape).astype(np.float32)
        return jax.device_put(np.asarray(x) + noise, x.sharding)

    trained = jax.tree.map(moved, adapter.state.trained)
    return Adapter(adapter.method, MethodState(trained, adapter.state.constant), adapter.config, adapter.base)


def merged(family: str, directory: Path | None) -> PreTrainedModel:
    """transformers' model with an adapter folded in by PEFT; fLoRA, which PEFT lacks, by numpy; None: the base."""
    model = copy.deepcopy(hf_base(family)[0])
    if directory is None:
        return model
    if (directory / "adapter_config.json").exists():
        return PeftModel.from_pretrained(model, str(directory)).merge_and_unload().eval()
    adapter = jora.load_adapter(directory, base(family))
    if adapter.method.name == "nola":
        jora.save_adapter(adapter.method.to_lora(adapter), directory / "as-lora")
        return merged(family, directory / "as-lora")
    assert adapter.method.name == "flora"
    with torch.no_grad():
        for target, parts in adapter.state.trained.items():
            for layer in np.flatnonzero(adapter.state.constant[target]).tolist():
                rank = adapter.method.rank
                into, out = (np.asarray(parts[side][layer]).reshape(rank, -1) for side in ("inputs", "outputs"))
                block = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                weight = getattr(getattr(model.model.layers[layer], block), target).weight
                weight.copy_(weight * torch.tensor(out.T @ into))
    return model


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers generates after a prompt, EOS ignored."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=VOCAB - 1,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()
