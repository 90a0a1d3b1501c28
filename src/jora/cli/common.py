"""What several commands share: the options that name a model, opening it, and the file of --out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jora.cli.options import CommandOptions
from jora.errors import InputError
from jora.files import atomic_write
from jora.reporting import Reporter

if TYPE_CHECKING:
    from jora.methods.method import Adapter
    from jora.models.model import Model
    from jora.quant import Kind


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CommandOptions):
    """Which base model, and where it computes."""

    model: str
    """A Hugging Face model directory, a hub id, or a .gguf file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights; auto is bfloat16 on an accelerator and float32 on a CPU."""
    quant: Literal["none", "int8", "nf4"] = "none"
    """Keep the linear layers' weights in 8 or 4 bits; a model that is stored so is loaded as it is."""
    mesh: str | None = None
    """Devices to share the work, like fsdp=2,tensor=4; a CPU simulates them."""


def start_devices(mesh: str | None, reporter: Reporter) -> None:
    """Make the devices of `mesh` exist, before anything else uses jax; say so when they are simulated."""
    from jora import sharding

    if line := sharding.start_devices(sharding.parse_mesh(mesh)):
        reporter.note(line)


def open_model(options: ModelOptions, reporter: Reporter) -> Model:
    """The model that the options name, on its devices."""
    start_devices(options.mesh, reporter)
    import jora

    kind = quant_kind(options)
    return jora.load_model(options.model, dtype=options.dtype, mesh=options.mesh, quant=kind, reporter=reporter)


def quant_kind(options: ModelOptions) -> Kind | None:
    """How the base's linear layers are to be quantised, as the Python API names it."""
    return None if options.quant == "none" else options.quant


def open_adapter(directory: str | None, model: Model) -> Adapter | None:
    """The adapter in `directory`, or None for the base alone."""
    import jora

    return None if directory is None else jora.load_adapter(directory, model)


def open_tokenizer(model: str) -> Any:
    """The tokenizer of a model, without its weights."""
    from jora.models.model import load_tokenizer, resolve

    path = resolve(model)
    if path.suffix == ".gguf":
        from jora.models.gguf import gguf_tokenizer

        return gguf_tokenizer(path)
    return load_tokenizer(path)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_out(out: str, text: str) -> None:
    """Write the file of --out, whole or not at all. Raises InputError, with that name, where it cannot be written."""
    try:
        with atomic_write(Path(out).expanduser()) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"--out {out}: could not be written: {error.strerror}") from error
