"""What every test stands on: eight simulated devices, full matmul precision, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# A process that a test starts runs this tree, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent / "src"), os.environ.get("PYTHONPATH")])
)
# Before anything imports huggingface_hub: a test that reaches for the network is a broken test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

import jax
import pytest

DEVICES = 8

# Before the first use of a backend. An accelerator, where there is one, stays the default device.
jax.config.update("jax_num_cpu_devices", DEVICES)
# The oracles are fp32; TPUs and recent GPUs would otherwise round the inputs of a matmul.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_go() -> Iterator[None]:
    """Every program on a CPU holds memory maps, of which a process may have so many (Linux: 65,530)."""
    yield
    jax.clear_caches()


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests, with the reason, on a machine without a GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU; jax sees {jax.default_backend()}"))


@pytest.fixture(scope="session")
def cpu_devices() -> list[jax.Device]:
    """The eight simulated devices of this process."""
    return jax.devices("cpu")[:DEVICES]
