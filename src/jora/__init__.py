"""Fine-tune language models on retrieval-augmented prompts, on one device or many.

The names below are imported on first use, so that `import jora` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jora import serve
    from jora.errors import InputError
    from jora.inference.evaluate import evaluate
    from jora.inference.generate import generate
    from jora.methods.dora import DoRA
    from jora.methods.flora import FLoRA
    from jora.methods.full import Full
    from jora.methods.ia3 import IA3
    from jora.methods.lopa import IDPG, LoPA
    from jora.methods.lora import LoRA
    from jora.methods.merging import merge
    from jora.methods.nola import NOLA
    from jora.methods.per_head import PerHeadLoRA
    from jora.methods.pissa import PiSSA, save_residual
    from jora.methods.prompt_tuning import PromptTuning
    from jora.methods.registry import register_method
    from jora.methods.storage import load_adapter, save_adapter
    from jora.methods.vera import VeRA
    from jora.models.model import Model, load_model
    from jora.train import train
    from jora.train.many.api import train_many
    from jora.train.many.jobs import Job, ManyOptions

__version__ = "0.1.0"

_HOMES = {
    "FLoRA": "jora.methods.flora",
    "Full": "jora.methods.full",
    "DoRA": "jora.methods.dora",
    "IA3": "jora.methods.ia3",
    "IDPG": "jora.methods.lopa",
    "InputError": "jora.errors",
    "Job": "jora.train.many.jobs",
    "LoPA": "jora.methods.lopa",
    "ManyOptions": "jora.train.many.jobs",
    "NOLA": "jora.methods.nola",
    "LoRA": "jora.methods.lora",
    "Model": "jora.models.model",
    "PerHeadLoRA": "jora.methods.per_head",
    "PiSSA": "jora.methods.pissa",
    "PromptTuning": "jora.methods.prompt_tuning",
    "VeRA": "jora.methods.vera",
    "evaluate": "jora.inference.evaluate",
    "generate": "jora.inference.generate",
    "load_adapter": "jora.methods.storage",
    "load_model": "jora.models.model",
    "merge": "jora.methods.merging",
    "register_method": "jora.methods.registry",
    "save_adapter": "jora.methods.storage",
    "save_residual": "jora.methods.pissa",
    "train": "jora.train",
    "train_many": "jora.train.many.api",
}

__all__ = [
    "IA3",
    "IDPG",
    "NOLA",
    "DoRA",
    "FLoRA",
    "Full",
    "InputError",
    "Job",
    "LoPA",
    "LoRA",
    "ManyOptions",
    "Model",
    "PerHeadLoRA",
    "PiSSA",
    "PromptTuning",
    "VeRA",
    "__version__",
    "evaluate",
    "generate",
    "load_adapter",
    "load_model",
    "merge",
    "register_method",
    "save_adapter",
    "save_residual",
    "serve",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:
    if name == "serve":
        return importlib.import_module("jora.serve")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'jora' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
