"""Soft prompts as PEFT stores them: adapter_config.json and the tensor, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jora.errors import InputError
from jora.methods.method import Adapter, State
from jora.methods.peft.options import check_numbers, refuse_unknown
from jora.methods.prompt_tuning import PromptTuning
from jora.methods.storage import AdapterFile, PeftFiles, place, whole
from jora.models.model import Model
from jora.models.safetensors_file import Entry

_KNOWN = (
    "num_virtual_tokens",
    "num_transformer_submodules",
    # What the file's tensor says too, and how the prompt was first made.
    "num_attention_heads",
    "num_layers",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
)
_PROMPT = "prompt_embeddings"


def write_peft(adapter: Adapter) -> PeftFiles:
    """What a PEFT directory of this adapter holds; the tensor is fp32."""
    method, config = adapter.method, adapter.config
    prompt = adapter.state.trained["prompt"]
    peft = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": method.prompt_tokens,
        "token_dim": config.embed,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "prompt_tuning_init": "SAMPLE_VOCAB" if method.start == "vocabulary" else "RANDOM",
    }
    return PeftFiles(peft, [Entry(_PROMPT, prompt.shape, partial(whole, prompt))])


def read_peft(peft: Mapping[str, Any], file: AdapterFile, model: Model, where: str) -> tuple[PromptTuning, State]:
    """The method and its state from a directory of peft_type PROMPT_TUNING (`storage.PeftReader`)."""
    refuse_unknown(peft, _KNOWN, where)
    if peft.get("num_transformer_submodules", 1) not in (1, None):
        raise InputError(f"{where}: num_transformer_submodules is for an encoder with a decoder; a decoder has 1")
    count = peft.get("num_virtual_tokens")
    check_numbers(where, {"num_virtual_tokens": count}, int)
    method = PromptTuning(prompt_tokens=count)  # type: ignore[arg-type]  # checked
    file.check({_PROMPT: (method.prompt_tokens, model.config.embed)})
    prompt = np.asarray(file.read(_PROMPT), np.float32)
    return method, State({"prompt": place(model.layout, (None, None), prompt)}, {})
