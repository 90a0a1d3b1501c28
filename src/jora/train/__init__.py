"""Floor 6: training.

`jora.train(model, LoRA(), "train.jsonl", out="run")` trains: see `jora.train.api.train`, which it calls.

`jora.train` is the public function and this package's name. Importing any module below a package sets the
package as its parent's attribute, so a function of that name would vanish or not by the order of imports.
Hence the package itself can be called, and `from jora.train import train` gives the same object.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jora.train.api import train
    from jora.train.estimation import Estimate, estimate
    from jora.train.loop import TrainResult
    from jora.train.options import TrainOptions

_HOMES = {
    "Estimate": "jora.train.estimation",
    "TrainOptions": "jora.train.options",
    "TrainResult": "jora.train.loop",
    "estimate": "jora.train.estimation",
}

__all__ = ["Estimate", "TrainOptions", "TrainResult", "estimate", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return sys.modules[__name__]
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'jora.train' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("jora.train.api").train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
