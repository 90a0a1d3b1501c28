"""Methods by name. The built-in ones are imported when they are asked for; others register themselves."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, TypeVar

from jora.errors import InputError
from jora.methods.method import Method

MethodT = TypeVar("MethodT", bound=type[Method])

# Name -> where the class is.
BUILT_IN = {
    "lora": "jora.methods.lora:LoRA",
    "full": "jora.methods.full:Full",
    "dora": "jora.methods.dora:DoRA",
    "pissa": "jora.methods.pissa:PiSSA",
    "per-head": "jora.methods.per_head:PerHeadLoRA",
    "prompt-tuning": "jora.methods.prompt_tuning:PromptTuning",
    "lopa": "jora.methods.lopa:LoPA",
    "idpg": "jora.methods.lopa:IDPG",
    "vera": "jora.methods.vera:VeRA",
    "ia3": "jora.methods.ia3:IA3",
    "nola": "jora.methods.nola:NOLA",
    "flora": "jora.methods.flora:FLoRA",
}
# PEFT's peft_type -> the function that reads such a directory (see `storage.PeftReader`).
PEFT_READERS = {
    "LORA": "jora.methods.peft.lora:read_peft",
    "VERA": "jora.methods.peft.vera:read_peft",
    "IA3": "jora.methods.peft.ia3:read_peft",
    "PROMPT_TUNING": "jora.methods.peft.prompt_tuning:read_peft",
}
_registered: dict[str, type[Method]] = {}


def register(cls: MethodT) -> MethodT:
    """Make a method known by its `name`, for `jora.load_adapter` and the command line; usable as a decorator."""
    if cls.name in BUILT_IN:
        raise ValueError(f"{cls.name!r} is the name of a built-in method")
    _registered[cls.name] = cls
    return cls


register_method = register  # as the package exports it


def names() -> list[str]:
    """Every method that can be chosen."""
    return [*BUILT_IN, *_registered]


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises InputError, naming the nearest, for a name that nobody knows."""
    if name in _registered:
        return _registered[name]
    if name not in BUILT_IN:
        nearest = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)[0]
        raise InputError(f"method {name!r} is not known; the nearest is {nearest!r} (all: {', '.join(names())})")
    return load_object(BUILT_IN[name])


def load_object(where: str) -> Any:
    """The object at "module:name"."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
