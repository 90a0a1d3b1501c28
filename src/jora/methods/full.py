"""Full fine-tuning: the model's own weights train, all of them or some, and the result is a model.

The trained tree takes the weights' place in the model: they are never held twice. So training changes the
model that it is given, as it does in every other trainer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jora.errors import InputError
from jora.methods.method import Adapter, Method, ModuleSite, RowsMerger, State
from jora.methods.targets import checked_choice
from jora.models.adapted import BASE, Bound, Rows
from jora.models.config import LINEARS, ModelConfig
from jora.models.loading import fingerprint
from jora.models.params import Layers, Params, map_params
from jora.models.saving import save_model
from jora.models.source import SafetensorsSource
from jora.sharding import hosts

if TYPE_CHECKING:
    from jora.methods.served import Served

GROUPS = ("embed_tokens", "lm_head", "norms", *LINEARS)


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: no adapter, the model's own weights train.

    weights: "all", "all-linear", or names among embed_tokens, lm_head, norms and the linear layers (q_proj ...
    down_proj, each in every layer and with its bias). What is not named stays frozen.
    """

    weights: str | Sequence[str] = "all"

    name: ClassVar[str] = "full"
    needs: ClassVar[frozenset[str]] = frozenset({"dense_weight"})
    in_place: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str):
            chosen = tuple(sorted(checked_choice("weights", self.weights)))
            object.__setattr__(self, "weights", chosen[0] if chosen in (("all",), ("all-linear",)) else chosen)
        for name in self._groups():
            if name not in GROUPS:
                raise InputError(f"full: weights {name!r} is not known; use all, all-linear or {', '.join(GROUPS)}")

    def _groups(self) -> tuple[str, ...]:
        shorthand = {"all": GROUPS, "all-linear": LINEARS}
        return shorthand.get(self.weights, (self.weights,)) if isinstance(self.weights, str) else tuple(self.weights)

    def init(self, model: Any, key: Array) -> Adapter:
        """The model's own arrays, not copies: training takes them over."""
        if self.weights != "all" and "lm_head" in self._groups() and model.config.tied_embeddings:
            raise InputError("full: this model's lm_head is its embedding table; name embed_tokens instead")
        model.check_method(self)
        trained = self._split(model.params, True)
        return Adapter(self, State(jax.tree.map(_value, trained), {}), model.config, dict(model.identity))

    def axes(self, config: ModelConfig) -> State:
        axes = map_params(config, lambda spec, shape: spec.axes, lambda specs, shape: (None, *specs[0].axes))
        return State(self._split(axes, True), {})

    def bind(self, state: State, rows: Rows) -> Bound:
        return BASE

    def base(self, state: State, params: Params) -> Params:
        return merge(state.trained, params)

    def rest(self, params: Params) -> Params:
        return self._split(params, False)

    def mergers(self, adapter: Adapter) -> Mapping[ModuleSite, RowsMerger]:
        raise InputError("full: there is no adapter to merge; a run's model/ directory is the trained model")

    def lower(self, adapter: Adapter, model: Any) -> Served:
        raise InputError("full: there is no adapter to serve; a run's model/ directory is the trained model to serve")

    def save_result(self, adapter: Adapter, model: Any, run: Path) -> Path:
        """The model itself, in RUN/model; `model` then is that one."""
        directory = run / "model"
        save_model(model, directory)
        hosts.barrier("the model is written")
        identity = {"name": str(directory), "fingerprint": fingerprint(SafetensorsSource(directory), model.config)}
        model.path, model.identity = str(directory), identity
        return directory

    def _split(self, params: Params, trained: bool) -> Params:
        """The leaves that train, or the others; None (or no entry) for those that are left out."""
        groups = self._groups()

        def top(group: str, leaf: Any) -> Any:
            return leaf if (group in groups) == trained else None

        def stack(leaves: dict[str, Any], group: str | None = None) -> dict[str, Any]:
            return {name: leaf for name, leaf in leaves.items() if ((group or name) in groups) == trained}

        layers = params.layers
        return Params(
            top("embed_tokens", params.embed),
            Layers(stack(layers.norms, "norms"), stack(layers.weights), stack(layers.biases)),
            top("norms", params.final_norm),
            None if params.head is None else top("lm_head", params.head),
        )


def merge(some: Params, others: Params) -> Params:
    """One set of weights from two that have different ones."""
    return Params(
        others.embed if some.embed is None else some.embed,
        merge_layers(some.layers, others.layers),
        others.final_norm if some.final_norm is None else some.final_norm,
        others.head if some.head is None else some.head,
    )


def merge_layers(some: Layers, others: Layers) -> Layers:
    """The same for layers, stacked or one of them."""
    fields = (field.name for field in dataclasses.fields(Layers))
    return Layers(**{name: {**getattr(some, name), **getattr(others, name)} for name in fields})


def _value(leaf: Any) -> Any:
    # Shapes in place of weights: an estimate, which asks for the state's shapes alone.
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
