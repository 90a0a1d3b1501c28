"""A SentencePiece-like tokenizer whose byte tokens are ordinary tokens, as in real vocabularies."""

from __future__ import annotations

import json
from functools import cache

from tests.data import tokenizers as made
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast


@cache
def spm(strip: bool = False) -> PreTrainedTokenizerFast:
    """strip: the decoder takes away the first space, as Llama 2's does."""
    stored = json.loads(made.gemma().backend_tokenizer.to_str())
    stored["added_tokens"] = [t for t in stored["added_tokens"] if not t["content"].startswith("<0x")]
    core = Tokenizer.from_str(json.dumps(stored))
    if strip:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
