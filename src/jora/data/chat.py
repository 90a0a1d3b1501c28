"""Conversations and prompts as tokens, with the assistant's tokens marked, by the model's own template.

The whole text is tokenised once and the answers' character spans are mapped onto tokens by the offset
mapping, so that where an answer begins does not change how the text around it is split. Chat templates
write every special token themselves, hence nothing is added to what they render (no second BOS).

How the answers of a conversation are found, in this order:
1. `{% generation %}` marks in the template, where it has them;
2. otherwise by rendering: a turn is what lies between the conversation before it (with the generation
   prompt) and the conversation up to it;
3. where these are not prefixes of the whole (Qwen 3 drops earlier thinking), each assistant turn becomes
   an example of its own, rendered as it would be when that turn is generated. If even that is not a
   prefix, the template is refused.

Plain `prompt`/`completion` strings use no template: BOS if the tokenizer adds it, the two texts, EOS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from jora.data.batches import Tokenised
from jora.data.formats import DOCUMENTS_MARKER, ContextDocument, Example, Message
from jora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# For a tokenizer without a chat template. Neutral words instead of special tokens, which such a
# tokenizer does not have; the answer starts with a space, so that its first word is an ordinary token.
DEFAULT_TEMPLATE = (
    "{{ start }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n\n"
    "{% else %}{{ message.role.capitalize() }}: {{ message.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Llama 3's templates print today's date unless told one: a data set must not depend on the day.
PINNED = {"date_string": "26 Jul 2024"}

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Span = tuple[int, int]  # [start, end) in characters


class Template:
    """A tokenizer's way to write conversations; made once per data set.

    Raises `InputError` for a tokenizer that reports no character offsets ("slow") or has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.is_fast:
            raise InputError(f"{_name(tokenizer)}: a fast tokenizer (tokenizer.json) is needed for its offsets")
        if tokenizer.eos_token_id is None:
            raise InputError(f"{_name(tokenizer)} has no eos_token: set one in tokenizer_config.json")
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        self.text: str = tokenizer.get_chat_template() if own else DEFAULT_TEMPLATE
        self.is_default = not own
        self.marks_answers = _GENERATION.search(self.text) is not None
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        self.adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_texts = tuple(special | set(tokenizer.all_special_tokens))
        self.special_ids = frozenset(tokenizer.convert_tokens_to_ids(list(self.special_texts)))

    def render(self, messages: Sequence[Message], where: str, generate: bool = False) -> str:
        """The conversation as text; `generate` appends what precedes an assistant's turn."""
        return self._apply(messages, where, add_generation_prompt=generate, tokenize=False)

    def _apply(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        import jinja2

        if self.is_default:
            options["start"] = self.tokenizer.bos_token if self.adds_bos else ""
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=self.text, **PINNED, **options
            )
        except jinja2.TemplateError as error:
            text = " ".join(str(error).split())
            raise InputError(
                f"{where}: the chat template of {_name(self.tokenizer)} refuses this conversation: {text}"
            ) from None

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids and the characters each stands for; no special token is added."""
        # verbose=False: "longer than the model's maximum" is ours to say.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def marked(self, messages: Sequence[Message], where: str) -> Tokenised:
        """Tokens with the answers that the template's `{% generation %}` blocks mark.

        A special token right after a block (the end of the turn, left outside by some templates) is
        learned too: without it a model does not learn to stop.
        """
        encoded = self._apply(messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        tokens = np.array(encoded["input_ids"], np.int32)
        loss = np.array(encoded["assistant_masks"], bool)
        special = np.isin(tokens, list(self.special_ids))
        unended = loss[:-1] & ~special[:-1] & ~loss[1:] & special[1:]
        loss[1:] |= unended
        return Tokenised(tokens, loss)

    def spans(self, messages: Sequence[Message], loss_from: int, where: str) -> tuple[str, list[Span]] | None:
        """The whole text and its answers' spans, or None where a rendered prefix is not its prefix."""
        whole = self.render(messages, where)
        found = []
        for index in _answers(messages, loss_from):
            before = self.render(messages[:index], where, generate=True)
            until = self.render(messages[: index + 1], where)
            if not whole.startswith(until) or not until.startswith(before):
                return None
            found.append((len(before), self._answer_end(until, len(before))))
        return whole, found

    def turn(self, messages: Sequence[Message], index: int, where: str) -> tuple[str, Span]:
        """The text up to assistant turn `index`, as it is when that turn is generated, and its span."""
        before = self.render(messages[:index], where, generate=True)
        until = self.render(messages[: index + 1], where)
        if not until.startswith(before):
            raise InputError(
                f"{where}: the chat template of {_name(self.tokenizer)} writes an assistant turn differently "
                "from what its generation prompt begins: use a template with {% generation %} marks"
            )
        return until, (len(before), self._answer_end(until, len(before)))

    def _answer_end(self, text: str, start: int) -> int:
        """Where the answer ends: white space after the end-of-turn token is never generated."""
        stripped = text.rstrip()
        closed = len(stripped) > start and stripped.endswith(self.special_texts)
        return len(stripped) if closed else len(text)

    def with_loss(self, text: str, spans: Sequence[Span]) -> Tokenised:
        """Tokenise `text` once; tokens that share a character with a span carry loss."""
        ids, offsets = self.encode(text)
        loss = np.zeros(len(ids), bool)
        bounds = np.array(offsets, np.int64).reshape(-1, 2)
        for start, end in spans:
            inside = np.flatnonzero((bounds[:, 0] < end) & (bounds[:, 1] > start))
            if len(inside):  # everything between: byte tokens of one character may have empty offsets
                loss[inside[0] : inside[-1] + 1] = True
        return Tokenised(np.array(ids, np.int32), loss)

    def with_bos(self, ids: list[int]) -> list[int]:
        """Plain text's tokens with BOS in front if the tokenizer adds one and it is not there yet."""
        if not self.adds_bos or ids[:1] == [self.tokenizer.bos_token_id]:
            return ids
        return [self.tokenizer.bos_token_id, *ids]

    def plain(self, prompt: str, completion: str) -> Tokenised:
        """BOS if the tokenizer adds it, the two texts and EOS; loss on completion and EOS.

        A special token that the texts already hold in that place is not doubled.
        """
        whole = self.with_loss(prompt + completion, [(len(prompt), len(prompt) + len(completion))])
        tokens, loss = whole.tokens.tolist(), whole.loss.tolist()
        tokens = self.with_bos(tokens)
        loss = [False] * (len(tokens) - len(loss)) + loss
        if tokens[-1:] != [self.tokenizer.eos_token_id]:
            tokens, loss = [*tokens, self.tokenizer.eos_token_id], [*loss, True]
        return Tokenised(np.array(tokens, np.int32), np.array(loss, bool))


def _name(tokenizer: Any) -> str:
    return f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"


def _answers(messages: Sequence[Message], loss_from: int) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= loss_from]


def render_documents(documents: Sequence[ContextDocument], template: str) -> str:
    """The documents as they stand in the prompt, in their order, an empty line between them."""

    def one(document: ContextDocument) -> str:
        fields = {"{title}": document.title, "{text}": document.text}
        return re.sub(r"\{title\}|\{text\}", lambda match: fields[match.group()], template)

    return "\n\n".join(one(document) for document in documents)


def fill_documents(example: Example) -> Example:
    """The example with its documents written into the prompt (and `documents` None)."""
    if example.documents is None:
        return example
    text = render_documents(example.documents, example.document_template)

    def fill(message: Message) -> Message:
        if message["role"] == "assistant":
            return message
        filled = message.copy()
        filled["content"] = message["content"].replace(DOCUMENTS_MARKER, text)
        return filled

    return replace(
        example,
        messages=tuple(fill(message) for message in example.messages),
        prompt=example.prompt.replace(DOCUMENTS_MARKER, text),
        documents=None,
    )


def tokenise_example(example: Example, template: Template) -> list[Tokenised]:
    """One example as tokens with loss on its answers; several where turns must be taken one at a time.

    Raises:
        InputError: no assistant turn to learn, a first message of the assistant, or a template that
            refuses the conversation or cannot be followed (see the module's text).
    """
    example = fill_documents(example)
    messages, where = example.messages, example.where
    if not messages:
        return [template.plain(example.prompt, example.completion)]
    answers = _answers(messages, example.loss_from)
    if not answers:
        raise InputError(f"{where}: no assistant turn to learn from: add one or remove the line")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's: put the user's before it")
    if template.marks_answers and example.loss_from <= _answers(messages, 0)[0]:
        marked = template.marked(messages, where)
        if not marked.loss.any():
            raise InputError(f"{where}: the template's {{% generation %}} blocks mark nothing here")
        return [marked]
    found = template.spans(messages, example.loss_from, where)
    if found is not None:
        return [template.with_loss(*found)]
    turns = [template.turn(messages, index, where) for index in answers]
    return [template.with_loss(text, [span]) for text, span in turns]


def prompt_tokens(example: Example, template: Template) -> Int32[np.ndarray, " t"]:
    """The tokens from which the answer is generated: everything before the last assistant turn.

    For plain text: BOS if the tokenizer adds it, then the prompt.
    """
    example = fill_documents(example)
    if not example.messages:
        ids, _ = template.encode(example.prompt)
        return np.array(template.with_bos(ids), np.int32)
    messages = example.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = template.encode(template.render(messages, example.where, generate=True))
    return np.array(ids, np.int32)
