"""The tokens that end an answer."""

from __future__ import annotations

from pathlib import Path

from jora.data.chat import Template, tokenise_example
from jora.data.formats import Example, Message
from jora.models.model import Model
from jora.models.source import read_json


def end_tokens(model: Model, template: Template | None = None) -> tuple[int, ...]:
    """The tokens that end an answer.

    Those of generation_config.json and config.json; with a template also the tokenizer's EOS and the
    special token that ends an assistant's turn (<end_of_turn>, <|eot_id|>, <|im_end|>), which older
    checkpoints forget to list.
    """
    ends: set[int] = set()
    stored = Path(model.path) / "generation_config.json"
    for settings in (read_json(stored) if stored.is_file() else {}, model.hf_config):
        ids = settings.get("eos_token_id")
        ends.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    if template is not None:
        turn: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        learned = tokenise_example(Example(turn), template)[-1]
        last = int(learned.tokens[learned.loss][-1])
        ends.update({template.tokenizer.eos_token_id} | ({last} & template.special_ids))
    return tuple(sorted(ends))
