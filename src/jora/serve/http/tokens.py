"""Text to tokens and back, beside the event loop: a long prompt must not hold up the others' streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from jora.serve.http.errors import invalid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Result = TypeVar("Result")


class Text:
    """A tokenizer for a server. `max_length`: most tokens of a prompt; `vocab_size`: of the model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, vocab_size: int) -> None:
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        # One worker: the tokenizer's library raises "Already borrowed" where its settings are touched by two threads.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
        self._byte_level = '"ByteLevel"' in json.dumps(decoder)
        self._special = frozenset(tokenizer.get_added_vocab().values())
        self.token_bytes: Callable[[int], bytes] = lru_cache(65536)(self._token_bytes)

    async def beside(self, function: Callable[[], Result]) -> Result:
        """Run a function in the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)

    async def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """The tokens of texts; `special`: with what the tokenizer puts around plain text, such as BOS."""
        return await self.beside(lambda: [self._encode(text, special) for text in texts])

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise invalid("the prompt holds half a character (a lone surrogate): send valid Unicode") from None
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def check(self, tokens: Sequence[int], param: str) -> tuple[int, ...]:
        """A prompt that the model can read, or 400."""
        if not tokens:
            raise invalid("the prompt is empty: give at least one token", param)
        if len(tokens) >= self.max_length:
            raise invalid(
                f"the prompt has {len(tokens)} tokens; the model reads {self.max_length}, the answer included",
                param,
                "context_length_exceeded",
            )
        if max(tokens) >= self.vocab_size:
            raise invalid(f"token {max(tokens)} is not in the vocabulary of {self.vocab_size}", param)
        return tuple(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def token_text(self, token: int) -> str:
        """A token as it stands in log probabilities; a part of a character as OpenAI writes it, `bytes:\\xe4`."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _token_bytes(self, token: int) -> bytes:
        """The UTF-8 that a token stands for (b"" for one that the tokenizer does not know)."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._special:
            return piece.encode()
        if self._byte_level:
            return bytes(_byte_of()[char] for char in piece if char in _byte_of())
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


@lru_cache(1)
def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes are themselves, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
