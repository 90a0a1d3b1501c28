"""Soft prompts: trained vectors in front of a row's tokens. Prompt tuning (arXiv 2104.08691), as PEFT defines it.

The vectors take the place of the first embeddings (after the family's scale), at positions 0 to m - 1; BOS and the
prompt follow at m. They stand next to the text whatever pads the row, because rows are padded on the right.

Shape legend: b rows, m soft tokens, d model width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    from jora.methods.storage import AdapterFile, PeftFiles
    from jora.models.model import Model

Start = Literal["vocabulary", "random"]


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """What all methods with soft tokens share. prompt_tokens: soft tokens m in front of each row."""

    prompt_tokens: int = 10

    # Tokens stand in front of the text that the base would not have.
    identity: ClassVar[Literal["exact", "rounding", "no"]] = "no"

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

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        from jora.methods.storage import PeftFiles
        from jora.models.safetensors_file import Entry

        config = adapter.config
        prompt = adapter.state.trained["prompt"]
        peft = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.prompt_tokens,
            "token_dim": config.embed,
            "num_transformer_submodules": 1,
            "num_attention_heads": config.heads,
            "num_layers": config.layers,
            "prompt_tuning_init": "SAMPLE_VOCAB" if self.start == "vocabulary" else "RANDOM",
        }
        return PeftFiles(peft, [Entry("prompt_embeddings", prompt.shape, lambda: (np.asarray(prompt),))])


_READ = frozenset({"peft_type", "num_virtual_tokens", "num_transformer_submodules", "token_dim", "modules_to_save"})
# Of how the prompt was first made, and provenance: say nothing about what it computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "num_attention_heads",
        "num_layers",
        "peft_version",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "revision",
        "task_type",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)


def read_peft(peft: Mapping[str, Any], file: AdapterFile, model: Model, where: str) -> tuple[PromptTuning, State]:
    """The method and its state from a directory of peft_type PROMPT_TUNING (`storage.PeftReader`)."""
    from jora.methods.storage import place

    unknown = sorted(name for name, value in peft.items() if name not in _READ | _HARMLESS and value)
    if unknown:
        raise InputError(f"{where}: option {unknown[0]} of prompt tuning is not known")
    if peft.get("modules_to_save"):
        raise InputError(f"{where}: modules_to_save beside a soft prompt is not supported")
    if peft.get("num_transformer_submodules", 1) not in (1, None):
        raise InputError(f"{where}: num_transformer_submodules is for an encoder with a decoder; a decoder has 1")
    count = peft.get("num_virtual_tokens")
    if not isinstance(count, int):
        raise InputError(f"{where}: num_virtual_tokens is {count!r}, no whole number")
    file.check({"prompt_embeddings": (count, model.config.embed)})
    method = PromptTuning(prompt_tokens=count)
    prompt = np.asarray(file.read("prompt_embeddings"), np.float32)
    return method, State({"prompt": place(model.layout, (None, None), prompt)}, {})


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
