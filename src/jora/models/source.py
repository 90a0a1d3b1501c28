"""Where a model's tensors come from: a protocol, and safetensors files read by byte range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jora.errors import InputError


class TensorSource(Protocol):
    """Named tensors under Hugging Face's names and shapes, read a slice at a time."""

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Only the bytes of this slice, in the file's dtype (bfloat16 through ml_dtypes)."""
        ...


class SafetensorsSource:
    """One or many safetensors files of a directory, `model.safetensors.index.json` included.

    Raises InputError when a file is missing, cut short or no safetensors file.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        index = directory / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map", {})
            for path in sorted({directory / file for file in weight_map.values()}):
                self._open(path)
            missing = [name for name, file in weight_map.items() if self._where.get(name) != directory / file]
            if missing:
                raise InputError(f"{index}: {missing[0]} is not in the file that the index names")
        else:
            paths = sorted(directory.glob("*.safetensors"))
            if not paths:
                raise InputError(f"{directory}: no .safetensors file here; give a Hugging Face model directory")
            for path in paths:
                self._open(path)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise InputError(f"{path}: the index names this file but it is not there; download the model again")
        try:
            file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); download it again") from error
        self._files[path] = file
        self._where.update(dict.fromkeys(file.keys(), path))

    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
