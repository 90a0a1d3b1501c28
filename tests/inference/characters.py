"""A tokenizer of one token a character that fits the tiny models' 99 words, and models that carry it."""

from __future__ import annotations

import shutil
import string
from functools import cache
from typing import Any

from tests.tiny import VOCAB, tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jora
from jora.models.model import Model

END_OF_TURN = "<end_of_turn>"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<end_of_turn>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """<pad> 0, <bos> 1, <eos> 2, <end_of_turn> 3, then the characters."""
    characters = [c for c in string.printable if c.isprintable() and c not in "`^~|"] + ["\n"]
    words = ["<pad>", "<bos>", "<eos>", END_OF_TURN, *characters]
    words += [f"<unused{i}>" for i in range(VOCAB - len(words))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<pad>", "<bos>", "<eos>", END_OF_TURN])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )


def talking(family: str, folder: Any, mesh: str | None = None, **overrides: Any) -> tuple[Any, Model]:
    """(transformers' model, ours) of a tiny family whose directory `folder` also holds the tokenizer."""
    hf, path = tiny(family, **overrides)
    shutil.copytree(path, folder, dirs_exist_ok=True)
    tokenizer().save_pretrained(folder)
    return hf, jora.load_model(folder, mesh=mesh)
