"""The tokenizer that a GGUF file describes, built with `tokenizers` from the file's own metadata.

Two kinds exist in the supported families. SentencePiece-BPE (`llama`: Llama 2, Mistral, Gemma) stores scores and no
merges; those are recovered by cutting every token into every pair of tokens, best score first. Byte-level BPE (`gpt2`:
Llama 3, Qwen, Mistral Nemo) stores merges, and the name of the expression that splits text into words.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from jora.errors import InputError
from jora.models.gguf.config import GEMMAS
from jora.models.gguf.reader import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # gguf.TokenType; 1 is an ordinary token
_NEVER_MERGED = frozenset({_UNKNOWN, _CONTROL, _UNUSED, _BYTE})
_SPACE = "\u2581"  # SentencePiece's visible space


class _Split(NamedTuple):
    """How a byte-level vocabulary splits text, and what goes with it in the original tokenizers."""

    pattern: str
    whole_words: bool  # a word that is a token needs no merges (`ignore_merges`)
    adds_bos: bool  # when the file does not say
    composed: bool  # text is brought to NFC first


_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = _Split(rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, adds_bos=True, composed=False)
_QWEN2 = _Split(rf"{_WORD}|\p{{N}}|{_REST}", whole_words=False, adds_bos=False, composed=True)
_TEKKEN = _Split(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    adds_bos=True,
    composed=False,
)
_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


class _Vocabulary:
    """The token lists of one file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.tokens: list[str] = self._array("tokens")
        count = len(self.tokens)
        kinds = self.get("token_type")
        self.kinds: list[int] = [1] * count if kinds is None else kinds.tolist()
        if len(self.kinds) != count:
            raise self.refusal(f"tokenizer.ggml.token_type has {len(self.kinds)} entries for {count} tokens")

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)

    def _array(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise self.refusal(f"metadata lack tokenizer.ggml.{key}, so no tokenizer can be built")
        return value

    def scores(self) -> list[float]:
        return self._array("scores").tolist()

    def merges(self, ids: dict[str, int]) -> list[tuple[str, str]]:
        pairs = []
        for merge in self._array("merges"):
            left, _, right = merge.partition(" ")
            if left not in ids or right not in ids or left + right not in ids:
                raise self.refusal(f"tokenizer.ggml.merges holds {merge!r}, which does not join two tokens to a third")
            pairs.append((left, right))
        return pairs

    def special(self, name: str) -> str | None:
        identifier = self.get(f"{name}_token_id")
        if identifier is None:
            return None
        if not 0 <= identifier < len(self.tokens):
            raise self.refusal(f"tokenizer.ggml.{name}_token_id is {identifier} of {len(self.tokens)} tokens")
        return self.tokens[identifier]

    def ids(self, tokens: list[str]) -> dict[str, int]:
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            repeated = next(token for number, token in enumerate(tokens) if ids[token] != number)
            raise self.refusal(f"token {repeated!r} occurs twice in tokenizer.ggml.tokens")
        return ids

    def refusal(self, message: str) -> InputError:
        return InputError(f"{self.file.path}: {message}")


def gguf_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer of the model in a .gguf file: ids, special tokens, BOS/EOS habits, chat template.

    Where llama.cpp's and Hugging Face's tokenizers of a family differ, the original Hugging Face one is followed:
    Qwen text is brought to NFC, and Llama 3 takes a word that is itself a token whole.

    Raises:
        InputError: a tokenizer model or pre-tokenizer that is not known, missing or inconsistent lists; by name.
    """
    from transformers import PreTrainedTokenizerFast

    file = GGUFFile(path)
    vocabulary = _Vocabulary(file)
    kind = vocabulary.get("model")
    if kind == "llama":
        gemma = file.architecture in GEMMAS
        tokenizer, adds_bos = (_gemma if gemma else _sentencepiece)(vocabulary), True
    elif kind == "gpt2":
        tokenizer, adds_bos = _byte_level(vocabulary)
    else:
        raise vocabulary.refusal(f"tokenizer model {kind!r} is not supported; supported are llama and gpt2")
    _add_tokens(tokenizer, vocabulary)
    named = {f"{name}_token": vocabulary.special(name) for name in ("bos", "eos")}
    named |= {"unk_token": vocabulary.special("unknown"), "pad_token": vocabulary.special("padding")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name, token in named.items() if token is not None},
        add_bos_token=bool(vocabulary.get("add_bos_token", adds_bos)),
        add_eos_token=bool(vocabulary.get("add_eos_token", False)),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=_context_length(vocabulary),
    )


def _context_length(vocabulary: _Vocabulary) -> int:
    key = f"{vocabulary.file.architecture}.context_length"
    if key not in vocabulary.file.metadata:
        raise vocabulary.refusal(f"metadata lack {key}")
    return int(vocabulary.file.metadata[key])


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    prefix = bool(vocabulary.get("add_space_prefix", True))  # absent in older files, when all had it
    tokenizer = Tokenizer(_scored_bpe(vocabulary, vocabulary.tokens, vocabulary.scores()))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _gemma(vocabulary: _Vocabulary) -> Tokenizer:
    # llama.cpp writes the tokens for runs of spaces with plain spaces and scores them -1000, below everything
    # they should win against; Gemma's real merge order is the order of the ids
    tokens = [token.replace(" ", _SPACE) if not token.strip(" ") else token for token in vocabulary.tokens]
    scores = [-float(number) for number in range(len(tokens))]
    tokenizer = Tokenizer(_scored_bpe(vocabulary, tokens, scores))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _scored_bpe(vocabulary: _Vocabulary, tokens: list[str], scores: list[float]) -> BPE:
    if len(scores) != len(tokens):
        raise vocabulary.refusal(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    ids = vocabulary.ids(tokens)
    if vocabulary.get("merges") is not None:
        merges = vocabulary.merges(ids)
    else:
        merges = merges_from_scores(tokens, scores, vocabulary.kinds, ids)
    return BPE(vocab=ids, merges=merges, unk_token=vocabulary.special("unknown"), fuse_unk=True, byte_fallback=True)


def merges_from_scores(
    tokens: list[str], scores: list[float], kinds: list[int], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """The merges a SentencePiece-BPE vocabulary implies: every cut of a token into two tokens, best score first.

    Cuts of one token, and tokens of equal score, go by longer left part, then longer right part: the order in which
    Hugging Face's own conversions write them.
    """
    found: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind in _NEVER_MERGED:
            continue
        size = len(token)
        found.extend(
            (-score, -cut, cut - size, token[:cut], token[cut:])
            for cut in range(1, size)
            if token[:cut] in ids and token[cut:] in ids
        )
    found.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in found]


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.get("pre")
    if name not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise vocabulary.refusal(f"pre-tokenizer {name!r} is not supported; supported are {known}")
    split = _SPLITS[name]
    ids = vocabulary.ids(vocabulary.tokens)
    tokenizer = Tokenizer(BPE(vocab=ids, merges=vocabulary.merges(ids), ignore_merges=split.whole_words))
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.adds_bos


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control and user-defined tokens are found whole in the raw text, before any splitting."""
    known = tokenizer.get_vocab(with_added_tokens=False)
    listed = list(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    control = [AddedToken(token, normalized=False, special=True) for token, kind in listed if kind == _CONTROL]
    # Gemma's runs of spaces were respelled and stay ordinary tokens
    plain = [
        AddedToken(token, normalized=False, special=False)
        for token, kind in listed
        if kind == _USER_DEFINED and token in known
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)
