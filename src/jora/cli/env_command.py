"""`jora env`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from jora.cli.options import CommandOptions
from jora.reporting import Reporter

PACKAGES = ("jax", "jaxlib", "optax", "orbax-checkpoint", "transformers", "tokenizers", "safetensors", "gguf")


@dataclass(frozen=True)
class Options(CommandOptions):
    """Show versions, devices, and which kernel is chosen for what and why."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def run(options: Options, reporter: Reporter) -> None:
    """Print one fact a line."""
    import jax

    from jora import __version__
    from jora.kernels.attention import explain
    from jora.ui.facts import size

    print(f"python {platform.python_version()} on {platform.platform()}")
    print(f"jora {__version__}")
    for package in PACKAGES:
        print(f"{package} {_version(package)}")
    for device in jax.local_devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        print(f"device {device.id}: {device.platform} {device.device_kind}{f', {size(limit)}' if limit else ''}")
    print("\n".join(explain()))
