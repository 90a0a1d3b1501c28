"""Tiny random BERT and RoBERTa models with a tokenizer of whole words: the oracle is transformers'."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

torch.set_num_threads(1)

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = {"bert": ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "roberta": ["<s>", "<pad>", "</s>", "<unk>"]}
TOKENS = 24  # positions of an encoder, [CLS] and [SEP] included
_COMMON: dict[str, Any] = dict(
    vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
_ROBERTA: dict[str, Any] = dict(
    pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1, max_position_embeddings=TOKENS + 2
)
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (BertModel, BertConfig, dict(max_position_embeddings=TOKENS)),
    "bert-mlm": (BertForMaskedLM, BertConfig, dict(max_position_embeddings=TOKENS, hidden_act="gelu_new")),
    "roberta": (RobertaModel, RobertaConfig, dict(**_ROBERTA, layer_norm_eps=1e-5)),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, dict(**_ROBERTA, hidden_act="relu")),
}
_DIRECTORIES: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def tokenizer(style: str) -> PreTrainedTokenizerFast:
    """[CLS] words [SEP], or <s> words </s>."""
    special = SPECIAL[style]
    pad, first, last = ("[PAD]", "[CLS]", "[SEP]") if style == "bert" else ("<pad>", "<s>", "</s>")
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token=special[3]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(special)
    ids = [(first, special.index(first)), (last, special.index(last))]
    made.post_processor = processors.TemplateProcessing(f"{first} $A {last}", special_tokens=ids)
    names = dict(pad_token=pad, cls_token=first, sep_token=last, unk_token=special[3])
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@functools.cache
def tiny_encoder(kind: str, width: int = 32, seed: int = 0) -> tuple[PreTrainedModel, str]:
    """A random transformers model in eval mode, and the directory it is saved in with its tokenizer."""
    model_class, config_class, options = KINDS[kind]
    model = model_class(config_class(**{**_COMMON, **options, "hidden_size": width})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else 0.5 + 0.3 * noise)
    folder = tempfile.TemporaryDirectory(prefix=f"tiny-{kind}-")
    _DIRECTORIES.append(folder)
    model.save_pretrained(folder.name)
    tokenizer("bert" if kind.startswith("bert") else "roberta").save_pretrained(folder.name)
    return model, folder.name
