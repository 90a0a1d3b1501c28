"""From the user's `data=2,tensor=4` to a layout over real or simulated devices."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jora.errors import InputError

if TYPE_CHECKING:
    from jora.sharding.layout import Layout


@dataclass(frozen=True)
class MeshSpec:
    """How many devices share out the batch (`data`), the weights (`fsdp`) and each layer (`tensor`)."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    def __str__(self) -> str:
        return f"data={self.data},fsdp={self.fsdp},tensor={self.tensor}"


def parse_mesh(text: str | MeshSpec | None) -> MeshSpec:
    """Read `tensor=2,fsdp=4` (missing axes are 1). Raises InputError on an unknown axis or a bad size."""
    if text is None or isinstance(text, MeshSpec):
        return text or MeshSpec()
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in ("data", "fsdp", "tensor") or not equals or name in sizes:
            raise InputError(f"mesh {text!r}: cannot read {part!r}; write axes like data=2,fsdp=2,tensor=2")
        if not value.isdigit() or int(value) < 1:
            raise InputError(f"mesh {text!r}: the size of {name} must be a positive whole number, not {value!r}")
        sizes[name] = int(value)
    return MeshSpec(**sizes)


MOST_SIMULATED = 256  # XLA's collectives among a thousand threads of one process end in a crash


def start_devices(spec: MeshSpec) -> str | None:
    """Make sure that enough devices exist; call it before anything else uses jax.

    On a machine whose only platform is the CPU the missing devices are simulated. Returns the line to
    show the user when that happened, else None.
    """
    import jax

    if spec.devices == 1 or jax.distributed.is_initialized():  # `start_hosts` has seen to it
        return None
    if jax.config.values["jax_num_cpu_devices"] < spec.devices:
        # jax refuses this once a backend runs; `build_layout` then says which devices are missing.
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(spec.devices, MOST_SIMULATED))
    if jax.default_backend() == "cpu" and jax.device_count() >= spec.devices:
        return f"mesh {spec}: {spec.devices} devices simulated on this CPU"
    return None


def host_device() -> Any:
    """The host's CPU, as jax sees it beside an accelerator. Raises InputError where JAX_PLATFORMS leaves it out."""
    import jax

    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise InputError(
            "jax may not use the host's CPU, where adapters are read: name it in JAX_PLATFORMS too (cuda,cpu)"
        ) from error


def build_layout(spec: MeshSpec, kv_heads: int) -> Layout:
    """The layout for a model with `kv_heads` KV heads. Raises InputError when devices are missing."""
    import jax

    from jora.sharding.layout import make_layout

    devices = jax.devices()
    if len(devices) < spec.devices:
        platform = devices[0].platform
        remedy = ""
        if platform == "cpu" and spec.devices <= MOST_SIMULATED:  # jax ran before anybody could ask for them
            remedy = f'; to simulate them, begin with jax.config.update("jax_num_cpu_devices", {spec.devices})'
        raise InputError(
            f"mesh {spec}: needs {spec.devices} devices, this machine has {len(devices)} ({platform}){remedy}"
        )
    if jax.process_count() > 1 and len(devices) != spec.devices:
        raise InputError(f"mesh {spec}: over several hosts it must take all of their {len(devices)} devices")
    tensor_kv = math.gcd(spec.tensor, kv_heads)
    return make_layout(spec.data, spec.fsdp, tensor_kv, spec.tensor // tensor_kv, devices)
