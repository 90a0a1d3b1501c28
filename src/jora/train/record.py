"""What a run writes down about itself: config.yaml, and the identity that a resumed run must share."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jora import __version__
from jora.errors import InputError
from jora.files import atomic_write
from jora.methods.method import Adapter
from jora.methods.storage import method_options
from jora.models.model import Model
from jora.sharding import hosts
from jora.train.options import TrainOptions

CONFIG = "config.yaml"
INSTANCES = "instances.safetensors"  # vectors of the data's prompts, for the methods that need them
TRAINED_FROM = "trained_from"  # in a model's identity: the fingerprint that it had before a run changed its weights
# These may differ when a run is resumed: they change what is shown and kept, not what is computed.
FREE = ("save_every", "keep_checkpoints", "log_every", "resume", "remat")


def identity(
    model: Model,
    adapter: Adapter,
    options: TrainOptions,
    total_steps: int,
    data: str,
    eval_data: str | None,
    start: str | None = None,
) -> dict[str, Any]:
    """Everything that decides a run's numbers, as JSON; `data`, `eval_data` and `start` (`digest_of`) are digests."""
    numbers = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
    base = model.identity.get("fingerprint")
    if base is None and adapter.method.in_place:  # a run that was interrupted goes on with the model that it changed
        base = model.identity.get(TRAINED_FROM)
    return {
        "base fingerprint": base,
        "dtype": str(model.dtype),
        "quant": model.quant,
        "mesh": {axis: int(size) for axis, size in model.layout.mesh.shape.items()},
        "method": adapter.method.name,
        **{f"method option {k}": v for k, v in method_options(adapter.method).items()},
        **{f"option {k}": v for k, v in numbers.items()},
        "number of steps": total_steps,
        "training data": data,
        "evaluation data": eval_data,
        "adapter to begin with": start,
    }


def digest_of(adapter: Adapter) -> str | None:
    """A hash (sha256) of an adapter's arrays; None of a whole model, which the base's fingerprint names."""
    if adapter.method.in_place:
        return None
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(hosts.whole(adapter.state)):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:32]


def write_config(
    directory: Path,
    model: Model,
    adapter: Adapter,
    options: TrainOptions,
    about: Mapping[str, Any],
    data: Mapping[str, Any],
) -> None:
    """config.yaml: all options of the run, flat and by name; `about` goes into a comment on top.

    data: name -> what was given; only paths are written. An `adapter` among them brings its own options.
    """
    method = {} if "adapter" in data else {"method": adapter.method.name, **method_options(adapter.method)}
    values = {
        **model_values(model),
        **{name: os.fspath(value) for name, value in data.items() if isinstance(value, str | os.PathLike)},
        "out": os.fspath(directory),
        **method,
        **dataclasses.asdict(options),
    }
    del values["resume"]
    write_values(directory / CONFIG, values, about)


def model_values(model: Model) -> dict[str, Any]:
    """The options of `load_model` that gave `model`."""
    mesh = {axis: int(size) for axis, size in model.layout.mesh.shape.items()}
    tensor = mesh.pop("tensor_kv") * mesh.pop("tensor_rep")
    return {
        "model": model.identity.get("name", model.path),
        "dtype": str(model.dtype),
        "quant": model.quant,
        "mesh": ",".join(f"{axis}={size}" for axis, size in (*mesh.items(), ("tensor", tensor))),
    }


def write_values(path: Path, values: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Options as YAML, those that are None left out; `about`, and the versions, go into a comment on top."""
    import yaml

    notes = {"jora": __version__, "jax": jax.__version__, **about}
    with atomic_write(path) as temporary:
        header = "".join(f"# {name}: {value}\n" for name, value in notes.items())
        kept = {name: value for name, value in values.items() if value is not None}
        temporary.write_text(header + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")


def open_directory(out: str | os.PathLike[str], resume: bool) -> Path:
    """The run's directory. Raises InputError where it holds a run (or anything else) and `resume` is off."""
    directory = Path(out).expanduser()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a directory for the run")
    holds_run = (directory / CONFIG).exists()
    if holds_run and not resume:
        raise InputError(f"{directory} holds a run already: resume it, or give another directory")
    # Vectors that a failed start had computed are used again.
    if not holds_run and directory.exists() and any(path.name != INSTANCES for path in directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no run: give a new directory")
    if not holds_run and resume:
        raise InputError(f"{directory} holds no run to resume: leave resume off to start one")
    return directory
