"""A growing list of tokens to text, piece by piece, with stop strings.

Decoding is not additive: a character may take several tokens, and a SentencePiece decoder reads a run of byte tokens
as a whole (<0x41> alone is "A", but before <0xFF> the two are invalid together). So a piece is decoded behind the
piece before it (the window of vLLM and TGI), the difference is its text, and it counts as settled only when no later
token can change it. Settled text may still be held back: where it ends like the beginning of a stop string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character, or not yet one


class Detokeniser:
    """What the streams of one tokenizer share: which tokens are not shown, and which stand for a byte.

    tokenizer: a PreTrainedTokenizerFast. The text is that of its `decode(tokens, skip_special_tokens=True)`.
    """

    def __init__(self, tokenizer: Any):
        self._core = tokenizer.backend_tokenizer
        self._special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        decoder = self._core.decoder
        falls_back = decoder is not None and "ByteFallback" in json.dumps(json.loads(decoder.__getstate__()))
        names = (f"<0x{byte:02X}>" for byte in range(256 if falls_back else 0))
        self.bytes = frozenset(i for name in names if (i := self._core.token_to_id(name)) is not None)

    def shows(self, token: int) -> bool:
        """False for special tokens and, where a model has more words than its tokenizer, for those without a text."""
        return token not in self._special and self._core.id_to_token(token) is not None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens alone."""
        return self._core.decode(tokens, skip_special_tokens=True)


class TextStream:
    """The text of one answer as its tokens arrive.

    stop: the text ends before the string of these that is complete first (behind it with `include_stop`); equally
    early, the longer one. min_tokens: what settles before so many tokens is not searched for stop strings, as in vLLM.
    """

    def __init__(
        self, detokeniser: Detokeniser, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ):
        self._detokeniser = detokeniser
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._pushed = 0
        self._before: list[int] = []  # tokens of the piece before: the new piece's context
        self._piece: list[int] = []  # tokens that are not settled
        self._shown = 0  # characters of the piece that are settled already
        self._held = ""  # settled text that may begin a stop string
        self.stopped_by: str | None = None  # the stop string that ended the text

    def push(self, token: int) -> str:
        """One more token: the text that is new and settled. After a stop string always empty."""
        if self.stopped_by is not None:
            return ""
        self._pushed += 1
        detokeniser = self._detokeniser
        if not detokeniser.shows(token):  # decoded as if it were not there: a run of bytes goes on behind it
            return ""
        self._piece.append(token)
        if token in detokeniser.bytes:
            return ""
        return self._until_stop(self._settled(last=False), last=False)

    def finish(self) -> str:
        """The answer has ended: what was held back. May still complete a stop string."""
        if self.stopped_by is not None:
            return ""
        return self._until_stop(self._settled(last=True), last=True)

    def _settled(self, last: bool) -> str:
        context = self._detokeniser.decode(self._before)
        text = self._detokeniser.decode(self._before + self._piece)[len(context) :]
        # Only the last character can still change: the first bytes of one that is not complete look broken.
        whole = last or not text.endswith(BROKEN)
        new = text[self._shown :] if whole else text[self._shown : -1]
        self._shown += len(new)
        if whole and text:
            self._before, self._piece, self._shown = self._piece, [], 0
        return new

    def _until_stop(self, new: str, last: bool) -> str:
        if not self._stop or self._pushed < self._min_tokens:
            return new
        text = self._held + new
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.stopped_by = min(found)
            self._held = ""
            return text[: end if self._include_stop else start]
        held = 0 if last else self._possible_start(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _possible_start(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)


__all__ = ["Detokeniser", "TextStream"]
