"""Which chunks stand in the prompt of a question: its oracle, its distractors, or what retrieval finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jora.data.chat import render_documents
from jora.data.documents import Chunk, Document, chunk_around, token_offsets
from jora.data.draws import permutation, text_key, uniform
from jora.data.formats import DOCUMENT_TEMPLATE, ContextDocument
from jora.data.questions import Finder, Place, Question, Unresolved
from jora.data.raft_format import normalise
from jora.data.retrieval import Retriever

# Streams of draws of one question; the split between training and evaluation uses stream 1.
ABSENT, SHARE, RANDOM, ORDER = 2, 3, 4, 5
MISFITS = 8  # the token limit counts as reached when so many more candidates do not fit


class ContextOptions(Protocol):
    """The part of `RaftOptions` that is used here."""

    @property
    def seed(self) -> int: ...
    @property
    def chunk_tokens(self) -> int: ...
    @property
    def contexts(self) -> int: ...
    @property
    def max_context_tokens(self) -> int | None: ...
    @property
    def random_share(self) -> float: ...
    @property
    def oracle_absent(self) -> float: ...


@dataclass
class Context:
    """The chunks of one prompt, in order; True marks a protected oracle. Ranks count from 1."""

    chunks: list[tuple[Chunk, bool]]
    source: str
    has_oracle: bool
    oracle_absent: bool = False
    hard: int = 0
    random: int = 0
    ranks: list[int] = field(default_factory=list)
    oracle_rank: int | None = None
    short: bool = False  # fewer chunks than asked for: too few, or the token limit


@dataclass
class _Support:
    oracle: Chunk
    forbidden: set[int]  # chunks that touch the support anywhere
    holders: set[int]  # chunks that hold it whole


class ContextMaker:
    """Chooses chunks for questions about one set of documents."""

    def __init__(
        self,
        documents: Sequence[Document],
        chunks: Sequence[Chunk],
        retriever: Retriever,
        tokenizer: Callable[..., Any],
        options: ContextOptions,
    ) -> None:
        self.documents = documents
        self.chunks = chunks
        self.retriever = retriever
        self.tokenizer = tokenizer
        self.options = options
        self.finder = Finder(documents)
        self.texts = [normalise(chunk.text) for chunk in chunks]
        self.of_document: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks):
            self.of_document.setdefault(chunk.document, []).append(index)

    def train(self, question: Question) -> Context:
        """Oracle and distractors in random order; the oracle is absent in a share of the questions."""
        draw = uniform(self.options.seed, text_key(question.question), ABSENT)
        return self._with_distractors(question, absent=draw < self.options.oracle_absent)

    def with_oracle(self, question: Question) -> Context:
        """Oracle and distractors in random order."""
        return self._with_distractors(question, absent=False)

    def retrieved(self, question: Question) -> Context:
        """What retrieval finds, the best first. No chunk is marked: nobody knows the oracle in earnest."""
        ranking = self._ranking(question)
        support = self._support(question, ranking)
        chosen = best_chunks(ranking, self.chunks, self.tokenizer, self.options)
        return Context(
            [(self.chunks[index], False) for index in chosen],
            support.oracle.title,
            any(index in support.holders for index in chosen),
            oracle_rank=_best_rank(ranking, support.holders),
            short=len(chosen) < self.options.contexts,
        )

    def _with_distractors(self, question: Question, absent: bool) -> Context:
        ranking = self._ranking(question)
        support = self._support(question, ranking)
        oracles = [] if absent else [support.oracle]
        wanted = self.options.contexts - len(oracles)
        indices, random = self._distractors(question, ranking, support, oracles, wanted)
        chunks = [(chunk, True) for chunk in oracles] + [(self.chunks[index], False) for index in indices]
        order = permutation(len(chunks), self.options.seed, text_key(question.question), ORDER)
        rank = {index: position for position, index in enumerate(ranking, start=1)}
        return Context(
            [chunks[index] for index in order],
            support.oracle.title,
            not absent,
            oracle_absent=absent,
            hard=len(indices) - random,
            random=random,
            ranks=[rank[index] for index in indices],
            oracle_rank=_best_rank(ranking, support.holders),
            short=len(indices) < wanted,
        )

    def _ranking(self, question: Question) -> list[int]:
        return self.retriever.rank(question.question, len(self.chunks))

    def _distractors(
        self, question: Question, ranking: Sequence[int], support: _Support, oracles: list[Chunk], wanted: int
    ) -> tuple[list[int], int]:
        """Chunks that are not the oracle, each text once: the hardest, then random ones; and how many are random."""
        key = (self.options.seed, text_key(question.question))
        random_wanted = int(wanted * self.options.random_share + uniform(*key, SHARE))
        allowed = [index for index in ranking if index not in support.forbidden]
        chosen: list[int] = []
        seen = {normalise(support.oracle.text)}

        def take(candidates: Iterable[int], until: int) -> None:
            misfits = 0
            for index in candidates:
                if len(chosen) >= until or misfits == MISFITS:
                    return
                if self.texts[index] in seen:
                    continue
                if self._fits([*oracles, *(self.chunks[i] for i in chosen), self.chunks[index]]):
                    chosen.append(index)
                    seen.add(self.texts[index])
                else:
                    misfits += 1

        take(allowed, wanted - random_wanted)
        hard = len(chosen)
        # In the order of the file, so that the draw does not depend on the retriever.
        pool = sorted(allowed)
        take((pool[i] for i in permutation(len(pool), *key, RANDOM)), min(wanted, hard + random_wanted))
        return chosen, len(chosen) - hard

    def _fits(self, chunks: Sequence[Chunk]) -> bool:
        return _fits(chunks, self.tokenizer, self.options)

    def _support(self, question: Question, ranking: Sequence[int]) -> _Support:
        sources = self.finder.sources(question)
        if question.quote is None:
            return self._whole_source(question, sources)
        inside = self.finder.places(question.quote, sources)
        if not inside:
            where = f"document {question.source!r}" if question.source else "any document"
            raise Unresolved(f"the quote is not in {where}")
        places = self.finder.places(question.quote)
        forbidden = {index for place in places for index in self._touching(place)}
        holders = {index for place in places for index in self._holding(place)}
        of_sources = {index for place in inside for index in self._holding(place)}
        best = _best_rank(ranking, of_sources)
        oracle = self._around(inside[0]) if best is None else self.chunks[ranking[best - 1]]
        if not self._fits([oracle]):
            oracle = self._around(inside[0], shorter=True)
        return _Support(oracle, forbidden, holders)

    def _whole_source(self, question: Question, sources: Sequence[int]) -> _Support:
        """Without a quote, any chunk of the source may hold the answer: the best for question and answer."""
        own = {index for document in sources for index in self.of_document.get(document, ())}
        order = self.retriever.rank(f"{question.question} {question.answer}", len(self.chunks))
        best = _best_rank(order, own)
        if best is None:
            raise Unresolved(f"document {question.source!r} has no text")
        oracle = order[best - 1]
        if not self._fits([self.chunks[oracle]]):
            raise Unresolved("its chunk is longer than max_context_tokens")
        return _Support(self.chunks[oracle], own, {oracle})

    def _around(self, place: Place, shorter: bool = False) -> Chunk:
        """A chunk of its own for a quote that a border cuts (or, `shorter`, whose chunk is too long)."""
        size = self.options.chunk_tokens
        while True:
            chunk = chunk_around(self.documents, *place, self.tokenizer, size)
            if chunk is None:
                raise Unresolved(f"the quote does not fit in a context of {self.options.chunk_tokens} tokens")
            if not shorter or self._fits([chunk]):
                return chunk
            size = size * 3 // 4

    def _touching(self, place: Place) -> list[int]:
        own = self.of_document.get(place.document, ())
        return [i for i in own if self.chunks[i].start < place.end and self.chunks[i].end > place.start]

    def _holding(self, place: Place) -> list[int]:
        own = self.of_document.get(place.document, ())
        return [i for i in own if self.chunks[i].start <= place.start and self.chunks[i].end >= place.end]


def searched(chunk: Chunk) -> str:
    """What retrieval sees of a chunk."""
    return f"{chunk.title}\n{chunk.text}"


def best_chunks(
    ranking: Iterable[int], chunks: Sequence[Chunk], tokenizer: Callable[..., Any], options: ContextOptions
) -> list[int]:
    """The chunks of a prompt that retrieval fills, the best first and each text once: as many as are asked for and fit.

    Evaluation with retrieved contexts and serving with documents both choose so.
    """
    chosen: list[int] = []
    seen: set[str] = set()
    for index in ranking:
        candidates = [chunks[i] for i in (*chosen, index)]
        if len(chosen) == options.contexts or not _fits(candidates, tokenizer, options):
            break
        if (text := normalise(chunks[index].text)) not in seen:
            chosen.append(index)
            seen.add(text)
    return chosen


def _fits(chunks: Sequence[Chunk], tokenizer: Callable[..., Any], options: ContextOptions) -> bool:
    limit = options.max_context_tokens
    if limit is None:
        return True
    text = render_documents([ContextDocument(c.title, c.text) for c in chunks], DOCUMENT_TEMPLATE)
    return len(token_offsets(text, tokenizer)) <= limit


def _best_rank(ranking: Sequence[int], wanted: set[int]) -> int | None:
    return next((rank for rank, index in enumerate(ranking, start=1) if index in wanted), None)
