"""Soft prompts: trained vectors in front of a row's tokens. Prompt tuning (arXiv 2104.08691), as PEFT defines it.

The vectors take the place of the first embeddings (after the family's scale), at positions 0 to m - 1; BOS and the
prompt follow at m. They stand next to the text whatever pads the row, because rows are padded on the right.

Shape legend: b rows, m soft tokens, d model width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jora.errors import InputError
from jora.methods.method import Adapter, Method, State
from jora.models.adapted import Bound, Rows
from jora.models.config import ModelConfig
from jora.sharding import Layout

if TYPE_CHECKING:
    from jora.methods.served import Served
    from jora.methods.storage import PeftFiles

Start = Literal["vocabulary", "random"]


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """What all methods with soft tokens share. prompt_tokens: soft tokens m in front of each row."""

    prompt_tokens: int = 10

    # Tokens stand in front of the text that the base would not have.

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise InputError(f"{self.name}: prompt_tokens must be at least 1, found {self.prompt_tokens}")

    @property
    def prompt_slots(self) -> int:
        return self.prompt_tokens

    def to_lora(self, adapter: Adapter) -> Adapter:
        raise InputError(f"{self.name}: a soft prompt is no change of a weight: it can be neither merged nor be a LoRA")


@dataclass(frozen=True, kw_only=True)
class PromptTuning(SoftPrompt):
    """m trained vectors, the same in front of every prompt: PEFT's PROMPT_TUNING.

    start: "vocabulary" begins with the embeddings of m words drawn at random, "random" with N(0, 1).
    """

    start: Start = "vocabulary"

    name: ClassVar[str] = "prompt-tuning"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.name, self.start)

    def init(self, model: Any, key: Array) -> Adapter:
        prompt = first_prompt(key, self.start, self.prompt_tokens, model)
        return Adapter(self, State({"prompt": prompt}, {}), model.config, dict(model.identity))

    def axes(self, config: ModelConfig) -> State:
        return State({"prompt": (None, None)}, {})

    def bind(self, state: State, rows: Rows) -> Bound:
        return Bound(prefix=state.trained["prompt"][None])

    def lower(self, adapter: Adapter, model: Any) -> Served:
        from jora.methods.served import Served, finite

        prompt = finite(self.name, "the soft prompt", np.asarray(adapter.state.trained["prompt"], np.float32))
        return Served(prefix_slots=self.prompt_slots, prefix=lambda vector: prompt)

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        from jora.methods.peft.prompt_tuning import write_peft

        return write_peft(adapter)


def check_start(name: str, start: str) -> None:
    """Raise InputError for a `start` that is none."""
    if start not in ("vocabulary", "random"):
        raise InputError(f"{name}: start is {start!r}: it must be vocabulary or random")


def first_prompt(key: Array, start: Start, count: int, model: Any) -> Float[Array, "m d"]:
    """The first values of `count` soft tokens, fp32, whole on every device."""
    table = model.params.embed
    if isinstance(table, jax.ShapeDtypeStruct):  # planning without weights
        table = jnp.zeros(table.shape, table.dtype)
    return _first_prompt(key, table, start, count, model.config, model.layout)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _first_prompt(
    key: Array, table: Float[Array, "v d"], start: Start, count: int, config: ModelConfig, layout: Layout
) -> Float[Array, "m d"]:
    if start == "random":
        prompt = jax.random.normal(key, (count, config.embed), jnp.float32)
    else:
        words = jax.random.randint(key, (count,), 0, config.vocab_size)
        prompt = table[words].astype(jnp.float32) * config.embed_scale
    return layout.constrain(prompt, None, None)
