"""Memory per device and time per step, before anything is loaded: the train step compiled on shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jora.data.batches import Shape
from jora.errors import InputError
from jora.methods.method import Adapter
from jora.methods.targets import check_options_match
from jora.models.config import ModelConfig
from jora.models.decoder import Remat
from jora.models.families import config_from_hf
from jora.models.model import Model
from jora.models.params import abstract_params
from jora.models.source import read_json
from jora.models.tensors import parameter_count
from jora.quant import Kind, QuantisedWeight
from jora.sharding import Layout, MeshSpec, parse_mesh
from jora.sharding.layout import make_layout
from jora.sharding.memory import USABLE, free_bytes
from jora.train.feed import batch_options
from jora.train.flops import matmul_flops, matmul_rate
from jora.train.memory import GIB, ProgramMemory
from jora.train.optimizer import optimizer_for
from jora.train.options import TrainOptions
from jora.train.programs import Programs
from jora.train.remat import POLICIES
from jora.train.state import abstract_adapter, abstract_train_state, placement
from jora.train.step import Program

ANSWERS = 256  # answer tokens a row, where the caller does not say: logits exist for these alone


@dataclass(frozen=True)
class Estimate:
    """What one optimiser step needs. Bytes are per device, FLOPs over all devices and micro-batches.

    Attributes:
        memory: by the compiler's analysis, at the base's dtype; temporaries of a bfloat16 model that was
            compiled for a CPU are those of the float32 program, an upper bound.
        available: bytes of a device that may be used (90 % of what it has free, or of what was given).
        seconds: FLOPs over the measured rate of a matrix product on this machine: a floor.
    """

    mesh: MeshSpec
    shape: Shape
    accumulation: int
    remat: Remat
    parameters: int
    trained: int
    memory: ProgramMemory
    available: int
    flops: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device can hold it."""
        return self.memory.total <= self.available

    def advice(self) -> str:
        """One line: it fits, or what to try."""
        if self.fits:
            return "fits"
        lacking = (self.memory.total - self.available) / GIB
        tries = []
        if self.remat != "full":
            tries.append("remat=full")
        if self.shape.rows > self.mesh.data * self.mesh.fsdp:
            tries.append("a smaller batch_size with more accumulation")
        if self.memory.arguments > self.available / 2:
            tries.append("more devices on fsdp or tensor (they share the weights)")
        tries.append("a smaller max_length")
        return f"does not fit by {lacking:.1f} GiB a device: try {', or '.join(tries)}"

    def table(self) -> str:
        """All of it as text, a line each."""
        m = self.memory
        rows, length, _ = self.shape
        lines = {
            "parameters": f"{self.parameters / 1e6:,.1f} M in the model; {self.trained / 1e6:,.2f} M train",
            "mesh": f"{self.mesh} ({self.mesh.devices} device{'s' * (self.mesh.devices > 1)})",
            "step": f"{self.accumulation} x {rows} rows of {length} tokens, remat {self.remat}",
            "weights, optimiser, batch": f"{m.arguments / GIB:.2f} GiB a device",
            "activations and temporaries": f"{m.added / GIB:.2f} GiB a device",
            "in all": f"{m.total / GIB:.2f} GiB a device, of {self.available / GIB:.2f} GiB",
            "compute": f"{self.flops / 1e12:.2f} TFLOP a step, at least {self.seconds:,.2f} s on this machine",
            "verdict": self.advice(),
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def estimate(
    path: str | Path | ModelConfig,
    method: Any,
    *,
    options: TrainOptions | None = None,
    mesh: str | MeshSpec | None = None,
    dtype: Any = "auto",
    quant: Kind | None = None,
    answers: int = ANSWERS,
    device_gib: float | None = None,
) -> Estimate:
    """Compile one train step without weights and ask the compiler what it needs.

    Args:
        path: a model directory (config.json is enough), a hub id, a .gguf file, or a `ModelConfig`.
        method: as for `train`.
        options: rows (`batch_size`), tokens a row (`max_length`), accumulation, remat, packing.
        mesh: like "fsdp=4"; devices that this machine lacks are simulated (see `sharding.start_devices`).
        dtype: of the base; "auto" is bfloat16 unless the step is to run on this CPU.
        quant: "int8" or "nf4", as for `load_model`.
        answers: tokens a row that carry loss.
        device_gib: memory of the device that is meant, in GiB; by default this machine's.

    Raises:
        InputError: an unknown model, a mesh with more devices than can be simulated, or `answers` below 1.
    """
    options = options or TrainOptions()
    if device_gib is not None and device_gib <= 0:
        raise InputError(f"device_gib is {device_gib}: a device has more than 0 GiB")
    if answers < 1:
        raise InputError(f"answers is {answers}: at least one token of a row carries loss")
    if isinstance(method, Adapter):
        method = method.method
    config = path if isinstance(path, ModelConfig) else read_config(path)
    spec = parse_mesh(mesh)
    layout = simulated_layout(spec, config)
    device = layout.mesh.devices.flat[0]
    kind = _dtype(dtype, device, device_gib)
    # The CPU's compiler keeps fp32 copies of bfloat16 weights, which says nothing about an accelerator.
    compiled_kind = jnp.dtype(jnp.float32) if device.platform == "cpu" else kind
    available = int(USABLE * (free_bytes(layout) if device_gib is None else device_gib * GIB))
    cut = batch_options(options, layout, prompt_slots=method.prompt_slots)
    rows = math.ceil(cut.rows / cut.row_multiple) * cut.row_multiple
    length = math.ceil(cut.max_length / cut.multiple) * cut.multiple
    shape = Shape(rows, length, min(answers, length))
    programs = abstract_programs(config, layout, method, options, compiled_kind, quant)
    weights = (programs.params, programs.state.trained) if method.in_place else programs.params
    saved = _weight_bytes(weights) * (compiled_kind.itemsize - kind.itemsize) // compiled_kind.itemsize
    for remat in POLICIES if options.remat == "auto" else (options.remat,):
        program = programs.program._replace(remat=remat)
        memory = ProgramMemory.of(programs.compile_train(shape, program))
        memory = memory._replace(arguments=memory.arguments - saved)
        if memory.total <= available:
            break
    flops = matmul_flops(programs.trace_train(shape, program).jaxpr)
    # Simulated devices share one host.
    workers = 1 if device.platform == "cpu" else layout.devices
    seconds = flops / (matmul_rate(device, kind) * workers)
    trained = sum(leaf.size for leaf in jax.tree.leaves(programs.state.trained))
    return Estimate(
        spec, shape, options.accumulation, remat, parameter_count(config), trained, memory, available, flops, seconds
    )


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a model without its weights. Raises InputError for what is no model."""
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        from jora.models.model import open_model

        return config_from_hf(open_model(local)[1])
    if local.is_dir():
        return config_from_hf(read_json(local / "config.json"))
    if local.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise InputError(f"{path}: no such model; give a directory with config.json, a .gguf file or a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return config_from_hf(read_json(Path(hf_hub_download(str(path), "config.json"))))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: no such directory, and the hub did not give it: {reason}") from error


def simulated_layout(spec: MeshSpec, config: ModelConfig) -> Layout:
    """The mesh over real devices where there are enough, else over simulated ones."""
    devices = jax.devices() if len(jax.devices()) >= spec.devices else jax.devices("cpu")
    if len(devices) < spec.devices:
        raise InputError(
            f"mesh {spec}: needs {spec.devices} devices and only {len(devices)} could be simulated: "
            "estimate in a process of its own, before anything else uses jax"
        )
    tensor_kv = math.gcd(spec.tensor, config.kv_heads)
    return make_layout(spec.data, spec.fsdp, tensor_kv, spec.tensor // tensor_kv, devices)


def _dtype(dtype: Any, device: jax.Device, device_gib: float | None) -> Any:
    if dtype != "auto":
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if device.platform == "cpu" and device_gib is None else jnp.bfloat16)


def abstract_programs(
    config: ModelConfig,
    layout: Layout,
    method: Any,
    options: TrainOptions,
    dtype: Any,
    quant: Kind | None = None,
) -> Programs:
    """The programs of a run over shapes: nothing is allocated."""
    params = abstract_params(config, layout, dtype, quant)
    model = Model(params, config, layout, {}, "", {})
    model.check_method(method)
    check_options_match(method, config)
    shapes = jax.eval_shape(lambda key: method.init(model, key).state, jax.random.key(0))
    adapter = abstract_adapter(method, shapes, config, layout)
    optimizer = optimizer_for(method, options, 1000, config, layout, adapter.trained)
    state = abstract_train_state(adapter.trained, optimizer, layout)
    program = Program(config, layout, method, optimizer, "none", placement(state, layout))
    return Programs(program, state, adapter.constant, method.rest(params), options)


def _weight_bytes(params: Any) -> int:
    """Bytes on one device of the weights that are in the model's dtype."""
    weights = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantisedWeight))
    leaves = (x for x in weights if not isinstance(x, QuantisedWeight))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
