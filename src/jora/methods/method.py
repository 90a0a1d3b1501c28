"""What an adapter method is, and the Adapter that users hold.

A method is one frozen dataclass of options. Three functions make it train, evaluate and generate on every
mesh: `init`, `axes` and `bind`. The others have defaults: a method that PEFT does not know is stored in Jora's
own format, and one that can say what it is as a plain LoRA can be merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Array, Float32

from jora.errors import InputError
from jora.models.adapted import Bound, Rows
from jora.models.config import ModelConfig
from jora.models.params import Params
from jora.reporting import SILENT, Reporter

if TYPE_CHECKING:
    from jora.methods.served import Served
    from jora.methods.storage import AdapterFile, PeftFiles
    from jora.models.safetensors_file import Entry

PyTree = Any


class State(NamedTuple):
    """A method's arrays: what the optimiser moves, and what it must not (scales, seeds, random bases)."""

    trained: PyTree
    constant: PyTree


# What merging does to rows [start, stop) of a module's Hugging Face weight: fp32 [n, in] -> fp32 [n, in].
RowsMerger = Callable[[np.ndarray, slice], np.ndarray]
ModuleSite = tuple[str, int | None]  # (target, layer); the layer is None for embed_tokens and lm_head


class Method(ABC):
    """An adapter method: subclasses are frozen, hashable dataclasses of options."""

    name: ClassVar[str]
    # "dense_weight": reads or changes the base's own weights, which a quantised base does not have.
    needs: ClassVar[frozenset[str]] = frozenset()
    in_place: ClassVar[bool] = False  # trains the model's own weights, which then are no longer in `rest`

    @abstractmethod
    def init(self, model: Any, key: Array) -> Adapter:
        """A fresh adapter for `model`, laid out on its devices. Also called abstractly, without weights."""

    @abstractmethod
    def axes(self, config: ModelConfig) -> State:
        """Logical axes, leaf for leaf like the state."""

    @abstractmethod
    def bind(self, state: State, rows: Rows) -> Bound:
        """The projections of one forward pass, inside jit."""

    def check_ranks(self, config: ModelConfig) -> None:
        """Raise InputError for a rank that a matrix cannot have. Asked where training begins, not of files."""
        return

    @property
    def prompt_slots(self) -> int:
        """Positions in front of each row's tokens, which `Bound.prefix` fills."""
        return 0

    def instance_width(self, config: ModelConfig) -> int:
        """Elements of the vector of its prompt that each row carries (`Rows.instance`); 0: none."""
        return 0

    def instances(
        self, model: Any, prompts: Sequence[Sequence[int]], cache: Path | None = None, reporter: Reporter = SILENT
    ) -> Float32[np.ndarray, "n h"] | None:
        """The vectors of prompts, given as tokens; None where `instance_width` is 0. cache: a file for them."""
        return None

    def base(self, state: State, params: Params) -> Params:
        """The weights that the forward pass reads, inside jit: `params`, unless the method trains some of them."""
        return params

    def rest(self, params: Params) -> Params:
        """The weights that training needs beside the state: all of them, unless the method trains in place."""
        return params

    def rates(self, trained: PyTree) -> PyTree | None:
        """What the learning rate is multiplied by, leaf for leaf; None: by 1 everywhere."""
        return None

    def for_inference(self, adapter: Adapter) -> Adapter:
        """What generation and evaluation bind in its place, made once: where every `bind` makes the same anew."""
        return adapter

    def to_lora(self, adapter: Adapter) -> Adapter:
        """The same change of the base as an adapter of method `LoRA`. Raises InputError where it is none."""
        raise InputError(f"{self.name}: what it does to the base is not of low rank, so it is no LoRA adapter")

    def mergers(self, adapter: Adapter) -> Mapping[ModuleSite, RowsMerger]:
        """How to fold the adapter into each module that it changes. Raises InputError where that is impossible."""
        lora = self.to_lora(adapter)
        return lora.method.mergers(lora)

    def lower(self, adapter: Adapter, model: Any) -> Served:
        """The forms that the serving engine knows, on the host. Raises InputError for what has none, with the remedy.

        By default the low-rank form of `to_lora`. model: what the adapter was made for, with its weights.
        """
        from jora.methods.served import lower_lora, refused

        try:
            lora = self.to_lora(adapter)
        except InputError as error:
            raise refused(self.name, "what is not of low rank") from error
        return lower_lora(lora, self.name)

    def to_peft(self, adapter: Adapter) -> PeftFiles | None:
        """The adapter as a PEFT directory holds it; None: PEFT has no such method, Jora's own format is written."""
        return None

    def tensors(self, adapter: Adapter) -> list[Entry]:
        """What Jora's own format holds: by default the trained leaves, named by their path."""
        from jora.methods.storage import leaf_entries

        return leaf_entries(adapter.state.trained)

    def save_result(self, adapter: Adapter, model: Any, run: Path) -> Path:
        """Write what a run in the directory `run` gave, and say where. Of several hosts the first calls it; all, if
        the method trains `in_place`.
        """
        from jora.methods.storage import save_adapter

        save_adapter(adapter, run / "adapter")
        return run / "adapter"

    def restore(self, file: AdapterFile, model: Any) -> State:
        """The state from Jora's own format, laid out for `model`: by default `init`'s with the file's leaves."""
        from jora.methods.storage import restore_leaves

        return restore_leaves(self, file, model)


@dataclass(frozen=True)
class Adapter:
    """A method with its state, for models of one config; `base` identifies the one it was made for."""

    method: Any
    state: State
    config: ModelConfig
    base: Mapping[str, str] = field(default_factory=dict)
