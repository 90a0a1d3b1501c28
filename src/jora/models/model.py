"""`jora.Model` and `jora.load_model`: a base model with its weights on the devices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.errors import InputError
from jora.models import decoder, head
from jora.models.adapted import BASE, Rows
from jora.models.bitsandbytes import QuantisedSource, open_quantised
from jora.models.config import ModelConfig
from jora.models.families import config_from_hf
from jora.models.loading import fingerprint, has_own_head, load_params
from jora.models.params import Params
from jora.models.source import SafetensorsSource, TensorSource, read_json
from jora.models.tensors import all_specs
from jora.quant import Kind, QuantisedWeight, host_type
from jora.reporting import SILENT, Reporter
from jora.sharding import Layout, MeshSpec, build_layout, parse_mesh, start_devices


@dataclass
class Model:
    """A decoder, its weights, and what is needed to write it out again.

    `hf_config` is the parsed config.json; `identity` names the base (path or hub id) and carries a
    fingerprint of its weights, which adapters record.
    """

    params: Params
    config: ModelConfig
    layout: Layout
    hf_config: dict[str, Any]
    path: str
    identity: dict[str, str]
    _tokenizer: Any = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer (a PreTrainedTokenizerFast). Raises InputError where the model has none."""
        if self._tokenizer is not None:
            return self._tokenizer
        return load_tokenizer(Path(self.path))

    @property
    def dtype(self) -> Any:
        return self.params.embed.dtype

    @property
    def quant(self) -> Kind | None:
        """How the linear layers' weights are quantised; None where they are not."""
        weight = next(iter(self.params.layers.weights.values()))
        return weight.kind if isinstance(weight, QuantisedWeight) else None

    def abstract(self) -> Model:
        """This model with shapes in place of its weights, for a method's `init` where only shapes are asked for."""
        return replace(self, params=jax.eval_shape(lambda params: params, self.params))

    def check_method(self, method: Any) -> None:
        """Raise InputError for a method that needs the dense weights of a base that is quantised."""
        check_dense(method, self.quant)

    def parts_of(self, adapter: Any) -> tuple[Any, Any]:
        """(method, state) of an adapter that fits this model, (None, None) of None; else InputError."""
        if adapter is None:
            return None, None
        if adapter.config != self.config:
            theirs, ours = (f"{c.family} {c.layers} x {c.embed}" for c in (adapter.config, self.config))
            raise InputError(f"the adapter was made for a {theirs} (layers x width), this model is a {ours}")
        self.check_method(adapter.method)
        return adapter.method, adapter.state

    def __call__(
        self,
        tokens: Int[Array, "b s"],
        adapter: Any = None,
        positions: Int[Array, "b s"] | None = None,
        segments: Int[Array, "b s"] | None = None,
        instance: Float[Array, "b h"] | None = None,
        jobs: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b s vocab"]:
        """Next-token logits, float32, of int32 tokens [batch, seq].

        segments: 0 marks padding, equal numbers see each other (needed for packed or left-padded rows).
        positions: for the rotary embedding, counted from 0 by default. instance: a vector of each row's prompt, for
        an adapter that asks for one (`adapter.method.instances(model, prompts)`). jobs: which adapter is each row's,
        where `adapter` is several in one (`methods.flora.together`).
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        method, state = self.parts_of(adapter)
        if method is not None and method.prompt_slots and not (positions is None and segments is None):
            raise InputError(f"{method.name}: each row is one sequence padded on the right: no positions or segments")
        rows = Rows(instance=instance, jobs=None if jobs is None else jnp.asarray(jobs, jnp.int32))
        return _logits(self.params, state, tokens, positions, segments, rows, self.config, self.layout, method)


def check_dense(method: Any, quant: Kind | None) -> None:
    """Raise InputError for a method that needs the dense weights of a base that is quantised."""
    if quant is not None and "dense_weight" in method.needs:
        raise InputError(
            f"{method.name} needs the base's dense weights: load the model without quant={quant}, or the "
            "unquantised one where it is stored so"
        )


@partial(jax.jit, static_argnums=(6, 7, 8))
def _logits(
    params: Params,
    state: Any,
    tokens: Array,
    positions: Array | None,
    segments: Array | None,
    rows: Rows,
    config: ModelConfig,
    layout: Layout,
    method: Any,
) -> Array:
    reserved = 0 if method is None else method.prompt_slots
    tokens = jnp.pad(tokens, ((0, 0), (reserved, 0)))
    bound = BASE if method is None else method.bind(state, rows)
    params = params if method is None else method.base(state, params)
    hidden, _ = decoder.forward(params, config, layout, tokens, positions, segments, bound=bound, rows=rows)
    return head.logits(params, config, layout, hidden[:, reserved:], bound, rows)


def load_model(
    path: str | Path,
    *,
    dtype: Any = "auto",
    mesh: str | MeshSpec | None = None,
    quant: Kind | None = None,
    reporter: Reporter = SILENT,
) -> Model:
    """Load a Hugging Face model directory, a hub id or a .gguf file onto the devices of `mesh`.

    dtype "auto" is bfloat16 on accelerators and float32 on a CPU. mesh is like "fsdp=2,tensor=4"; None is
    one device. quant "int8" or "nf4" keeps the linear layers' weights in few bits; a directory that holds
    them so (`save_model`, transformers with bitsandbytes) is loaded as it is. Raises InputError for whatever
    cannot be computed exactly as transformers does.
    """
    local = resolve(path)
    source, hf_config, tokenizer = open_model(local)
    quant = _quant(quant, source)
    config = config_from_hf(hf_config)
    if config.tied_embeddings and has_own_head(source):
        reporter.note("config.json ties the head to the embeddings, but both are stored and differ: they are not tied")
        hf_config = {**hf_config, "tie_word_embeddings": False}
        config = config_from_hf(hf_config)
    spec = parse_mesh(mesh)
    start_devices(spec)
    layout = build_layout(spec, config.kv_heads)
    total = sum(1 for _ in all_specs(config))
    reporter.start(total, f"loading {Path(path).name}")
    params = load_params(source, config, layout, _dtype(dtype), reporter.update, quant)
    reporter.finish()
    identity = {"name": str(path), "fingerprint": fingerprint(source, config)}
    return Model(params, config, layout, hf_config, str(local), identity, tokenizer)


def _quant(quant: Kind | None, source: TensorSource) -> Kind | None:
    if quant is not None:
        host_type(quant)
    if not isinstance(source, QuantisedSource):
        return quant
    if quant not in (None, source.kind):
        raise InputError(f"the model is stored as {source.kind}; quant={quant} needs the unquantised model")
    return source.kind


def _dtype(dtype: Any) -> Any:
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    names = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    if isinstance(dtype, str) and dtype not in names:
        raise InputError(f"dtype {dtype!r} is not known; use auto, {', '.join(names)}")
    return names.get(dtype, dtype) if isinstance(dtype, str) else dtype


def resolve(path: str | Path) -> Path:
    """A local path as it is; a hub id as the directory that huggingface_hub keeps it in."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    text = str(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or text.endswith(".gguf"):
        raise InputError(f"{path}: no such model; give a directory, a .gguf file or a hub id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: no such directory, and the hub did not give it: {reason}") from error


def open_model(path: Path) -> tuple[TensorSource, dict[str, Any], Any]:
    """The tensors, the config and (for a .gguf) the tokenizer of a local model."""
    if path.suffix == ".gguf":
        from jora.models.gguf import GGUFSource, gguf_tokenizer

        source = GGUFSource(path)
        return source, source.hf_config, gguf_tokenizer(path)
    if not path.is_dir():
        raise InputError(f"{path}: not a model directory and not a .gguf file")
    return *open_quantised(SafetensorsSource(path), read_json(path / "config.json")), None


# What a tokenizer is made from. From tokenizer_config.json alone transformers makes some without any vocabulary.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory. Raises InputError where there is none or it cannot be read."""
    found = [name for name in _VOCABULARIES if (path / name).exists()]
    if not found:
        raise InputError(f"{path}: no tokenizer.json here; copy the model's tokenizer files beside its weights")
    if all(name.endswith(".model") for name in found) and not any(map(find_spec, ("sentencepiece", "tiktoken"))):
        remedy = "copy the model's tokenizer.json beside it, or pip install sentencepiece"
        raise InputError(f"{path / found[0]}: needs the package sentencepiece to be read; {remedy}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # tokenizers raises bare ones, transformers whatever a damaged file leads it to
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise InputError(
            f"{path}: its tokenizer cannot be read ({reason}); copy the model's tokenizer files here again"
        ) from error
