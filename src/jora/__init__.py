"""Fine-tune language models on retrieval-augmented prompts, on one device or many.

The names below are imported on first use, so that `import jora` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jora.errors import InputError
    from jora.inference.evaluate import evaluate
    from jora.inference.generate import generate
    from jora.methods.lora import LoRA
    from jora.methods.merging import merge
    from jora.methods.peft_format import load_adapter, save_adapter
    from jora.models.model import Model, load_model
    from jora.train import train

__version__ = "0.1.0"

_HOMES = {
    "InputError": "jora.errors",
    "LoRA": "jora.methods.lora",
    "Model": "jora.models.model",
    "evaluate": "jora.inference.evaluate",
    "generate": "jora.inference.generate",
    "load_adapter": "jora.methods.peft_format",
    "load_model": "jora.models.model",
    "merge": "jora.methods.merging",
    "save_adapter": "jora.methods.peft_format",
    "train": "jora.train",
}

__all__ = [
    "InputError",
    "LoRA",
    "Model",
    "__version__",
    "evaluate",
    "generate",
    "load_adapter",
    "load_model",
    "merge",
    "save_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'jora' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
