"""What a data set was made from: hashes of its inputs and versions of what made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("jora", "bm25s", "numpy", "tokenizers", "sentence-transformers")


def content_hash(value: Any) -> dict[str, Any]:
    """Number of items and the SHA-256 of their JSON: of what was read, wherever it lay."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return {"count": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(tokenizer: Callable[..., Any]) -> dict[str, str]:
    """Versions of the packages that shape the result, and the tokenizer's own hash where it has one."""
    found = {package: number for package in PACKAGES if (number := _version(package)) is not None}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        found["tokenizer_sha256"] = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return found
