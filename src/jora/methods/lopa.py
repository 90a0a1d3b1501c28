"""LoPA (arXiv 2405.15282) and IDPG (arXiv 2204.04497): soft prompts that depend on what is asked.

LoPA: e = Enc(prompt); U = rows(e) [m, r], V = columns(e) [d, r], each a head W2 tanh(W1 e + c1) + c2;
Z = Z_S ∘ sigmoid(U V^T) with a trained prompt Z_S [m, d] that all inputs share. IDPG: Z = head(e), without either.
The encoder is frozen, so e is computed once a prompt, outside the step.

The other fusions of U V^T and Z_S are those of the authors' code, without the sigmoid: concat (2 m soft tokens), add,
max.

Shape legend: b rows, m soft tokens, d model width, r rank, h width of e, M width of a head's hidden layer.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from jora.encoders import Encoder, open_encoder
from jora.errors import InputError
from jora.kernels.counter_hash import fold_all, keep_mask
from jora.methods.lopa_instances import mean_embeddings, text_vectors
from jora.methods.method import Adapter, State
from jora.methods.prompt_tuning import SoftPrompt, Start, check_start, first_prompt
from jora.models.adapted import Bound, Rows
from jora.models.config import ModelConfig
from jora.reporting import SILENT, Reporter
from jora.sharding import Layout

if TYPE_CHECKING:
    from jora.methods.served import Served

Fusion = Literal["multiply", "concat", "add", "max"]
FUSIONS: tuple[Fusion, ...] = ("multiply", "concat", "add", "max")
BASE = "base"  # the encoder that is the base's own table of embeddings
SPREAD = 0.02  # standard deviation of a head's first weights, as of the encoders'


@dataclass(frozen=True, kw_only=True)
class InstancePrompt(SoftPrompt):
    """A soft prompt that heads make from the prompt's vector.

    encoder: "base" (the mean of the prompt's embeddings in the base, the cheapest), or a directory or hub id of a
    BERT or RoBERTa, or of a sentence-transformers model (extra `[dense]`). hidden: width M of a head's hidden layer.
    dropout: rate on the vector. encoder_width, encoder_fingerprint: filled in by `init`; an encoder that has others
    is refused.
    """

    encoder: str = BASE
    hidden: int = 256
    dropout: float = 0.0
    encoder_width: int = 0
    encoder_fingerprint: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise InputError(f"{self.name}: hidden must be at least 1, found {self.hidden}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"{self.name}: dropout must be in [0, 1), found {self.dropout}")

    @abstractmethod
    def heads(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """What each head gives: name -> shape of its output."""

    def instance_width(self, config: ModelConfig) -> int:
        if self.encoder_width:
            return self.encoder_width
        return config.embed if self.encoder == BASE else open_encoder(self.encoder).width

    def instances(
        self, model: Any, prompts: Sequence[Sequence[int]], cache: Path | None = None, reporter: Reporter = SILENT
    ) -> Float32[np.ndarray, "n h"]:
        if self.encoder == BASE:
            self._check_width(model.config.embed)
            return mean_embeddings(model, prompts)
        return self.encoded(open_encoder(self.encoder), model, prompts, cache, reporter)

    def encoded(
        self,
        encoder: Encoder,
        model: Any,
        prompts: Sequence[Sequence[int]],
        cache: Path | None = None,
        reporter: Reporter = SILENT,
    ) -> Float32[np.ndarray, "n h"]:
        """`instances`, by an encoder that is open. Raises InputError where the heads were made for another."""
        self._check_width(encoder.width)
        if self.encoder_fingerprint not in ("", encoder.fingerprint):
            raise InputError(f"{self.name}: encoder {self.encoder} is not the one that this adapter was trained with")
        texts = model.tokenizer.batch_decode([list(p) for p in prompts], skip_special_tokens=True)
        return text_vectors(encoder, texts, cache, reporter)

    def _check_width(self, found: int) -> None:
        if self.encoder_width not in (0, found):
            raise InputError(
                f"{self.name}: encoder {self.encoder} makes vectors of {found}, "
                f"the adapter's heads take {self.encoder_width}; use the encoder that it was trained with"
            )

    def identified(self, config: ModelConfig) -> Any:
        """This method with its encoder's width and fingerprint written down."""
        if self.encoder_width or self.encoder == BASE:
            return replace(self, encoder_width=self.instance_width(config))
        encoder = open_encoder(self.encoder)
        return replace(self, encoder_width=encoder.width, encoder_fingerprint=encoder.fingerprint)

    def init(self, model: Any, key: Array) -> Adapter:
        """Head weights ~ N(0, 0.02), first bias as a torch Linear's, second 0; then the shared prompt."""
        method = self.identified(model.config)
        prompt_key, heads_key = jax.random.split(key)
        trained = dict(_draw_heads(heads_key, method, model.config, model.layout))
        return Adapter(
            method, State(trained | method.shared(model, prompt_key), {}), model.config, dict(model.identity)
        )

    def shared(self, model: Any, key: Array) -> dict[str, Array]:
        """What trains besides the heads."""
        return {}

    def axes(self, config: ModelConfig) -> State:
        heads = {
            name: {"w1": (None, None), "c1": (None,), "w2": (None,) * (1 + len(out)), "c2": (None,) * len(out)}
            for name, out in self.heads(config).items()
        }
        return State(heads, {})

    def lower(self, adapter: Adapter, model: Any) -> Served:
        """`bind` in numpy, once a request: in jax each new shape of the heads would compile."""
        from jora.methods.served import Served, finite

        trained = jax.tree.map(lambda x: finite(self.name, "the soft prompt", np.asarray(x)), adapter.state.trained)

        def prefix(vector: np.ndarray | None) -> np.ndarray:
            instance: Any = None if vector is None else vector[None]
            return np.asarray(self.bind(State(trained, {}), Rows(instance=instance)).prefix, np.float32)[0]

        return Served(prefix_slots=self.prompt_slots, prefix=prefix)

    def run_head(self, state: State, name: str, rows: Rows) -> Float[Array, "b *out"]:
        """A head's output for each row's vector."""
        vector = rows.instance
        if vector is None:
            raise InputError(f"{self.name}: give each row's vector (instance), as adapter.method.instances makes them")
        width = state.trained[name]["w1"].shape[0]
        if vector.shape[1] != width:
            raise InputError(f"{self.name}: a row's vector has {vector.shape[1]} elements, the heads take {width}")
        if self.dropout and rows.dropout is not None:
            vector = _dropped(vector, fold_all(rows.dropout, np.uint32(zlib.crc32(name.encode()))), self.dropout)
        return head(state.trained[name], vector)


@dataclass(frozen=True, kw_only=True)
class LoPA(InstancePrompt):
    """Low-rank prompt adaptation: a shared soft prompt, scaled by what the prompt asks.

    rank: the rank r of U V^T. fusion: how it meets the shared prompt; all but "multiply" are the authors' ablations.
    start: first values of the shared prompt: "vocabulary", embeddings of words drawn at random, or "random", N(0, 1).

    For the other options see `InstancePrompt` and `SoftPrompt`.
    """

    rank: int = 4
    fusion: Fusion = "multiply"
    start: Start = "vocabulary"

    name: ClassVar[str] = "lopa"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.name, self.start)
        if not 1 <= self.rank <= self.prompt_tokens:
            raise InputError(f"lopa: rank must be 1 to prompt_tokens ({self.prompt_tokens}), found {self.rank}")
        if self.fusion not in FUSIONS:
            raise InputError(f"lopa: fusion is {self.fusion!r}: it must be one of {', '.join(FUSIONS)}")

    @property
    def prompt_slots(self) -> int:
        return self.prompt_tokens * (2 if self.fusion == "concat" else 1)

    def heads(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {"rows": (self.prompt_tokens, self.rank), "columns": (config.embed, self.rank)}

    def shared(self, model: Any, key: Array) -> dict[str, Array]:
        return {"prompt": first_prompt(key, self.start, self.prompt_tokens, model)}

    def axes(self, config: ModelConfig) -> State:
        heads, constant = super().axes(config)
        return State({**heads, "prompt": (None, None)}, constant)

    def bind(self, state: State, rows: Rows) -> Bound:
        u, v = self.run_head(state, "rows", rows), self.run_head(state, "columns", rows)
        own = u.__array_namespace__().einsum("bmr,bdr->bmd", u, v)
        return Bound(prefix=fuse(state.trained["prompt"], own, self.fusion))


@dataclass(frozen=True, kw_only=True)
class IDPG(InstancePrompt):
    """Instance-dependent prompt generation: one head of full width makes all m d elements, nothing is shared."""

    name: ClassVar[str] = "idpg"

    def heads(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {"prompt": (self.prompt_tokens, config.embed)}

    def bind(self, state: State, rows: Rows) -> Bound:
        return Bound(prefix=self.run_head(state, "prompt", rows))


def fuse(shared: Float[Array, "m d"], own: Float[Array, "b m d"], fusion: Fusion) -> Float[Array, "b slots d"]:
    """The soft prompt of each row from the shared one and its own (arXiv 2405.15282, eq. 3 and its ablations).

    As `head` and `bind`, in the library of its arrays: jax, or numpy to serve.
    """
    library: Any = own.__array_namespace__()
    if fusion == "multiply":
        return shared * _sigmoid(own)
    if fusion == "add":
        return shared + own
    if fusion == "max":
        return library.maximum(shared, own)
    return library.concat([library.broadcast_to(shared, own.shape), own], axis=1)


def _sigmoid(x: Any) -> Any:
    return jax.nn.sigmoid(x) if isinstance(x, jax.Array) else (np.tanh(x / 2) + 1) / 2  # which does not overflow


def head(weights: Mapping[str, Array], vector: Float[Array, "b h"]) -> Float[Array, "b *out"]:
    """W2 tanh(W1 e + c1) + c2, fp32."""
    hidden = vector @ weights["w1"] + weights["c1"]
    library = hidden.__array_namespace__()
    inner = library.tanh(hidden)
    return library.tensordot(inner, weights["w2"], axes=1) + weights["c2"]


def _dropped(vector: Float[Array, "b h"], seeds: UInt32[Array, " b"], rate: float) -> Float[Array, "b h"]:
    keep = keep_mask(seeds, (vector.shape[0], 1, vector.shape[1]), rate)[:, 0]
    return jnp.where(keep, vector, 0) / (1 - rate)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_heads(key: Array, method: InstancePrompt, config: ModelConfig, layout: Layout) -> dict[str, dict[str, Array]]:
    width, hidden = method.encoder_width, method.hidden
    drawn = {}
    for number, (name, out) in enumerate(method.heads(config).items()):
        first, bias, second = jax.random.split(jax.random.fold_in(key, number), 3)
        drawn[name] = {
            "w1": SPREAD * jax.random.normal(first, (width, hidden), jnp.float32),
            "c1": jax.random.uniform(bias, (hidden,), jnp.float32, -(width**-0.5), width**-0.5),
            "w2": SPREAD * jax.random.normal(second, (hidden, *out), jnp.float32),
            "c2": jnp.zeros(out, jnp.float32),
        }
    return jax.tree.map(lambda leaf: layout.constrain(leaf, *(None,) * leaf.ndim), drawn)
