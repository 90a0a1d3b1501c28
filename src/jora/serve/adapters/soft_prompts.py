"""The soft prompts of requests that wait. What an encoder reads, it reads on a thread of its own.

An encoder's weights stay loaded: adapters name only those that the operator has listed, which `warm_up` loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32

from jora.encoders import Encoder, open_encoder
from jora.errors import InputError
from jora.methods.lopa import BASE, InstancePrompt
from jora.methods.lopa_instances import SHORTEST, mean_embeddings
from jora.models.model import Model
from jora.serve.adapters.loading import Loaded
from jora.serve.requests import Request

SoftTokens = Float32[np.ndarray, "m d"]


class SoftPrompts:
    """Not thread-safe: for the engine's thread, which alone reads the base's weights."""

    def __init__(self, model: Model):
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._coming: dict[str, Future[SoftTokens]] = {}  # by request
        self._encoders: dict[str, Encoder] = {}  # by name; of the thread alone

    def warm_up(self, longest: int, encoders: Sequence[str] = ()) -> None:
        """Load these encoders, and compile them and the means of the base's embeddings for prompts of up to so many
        tokens.

        Raises InputError for an encoder that cannot be read.
        """
        for name in encoders:
            self._thread.submit(self._warm_up_one, name).result()
        length = SHORTEST
        while length < 2 * longest:
            mean_embeddings(self._model, [(0,) * min(length, longest)])
            length *= 2

    def of(self, request: Request, loaded: Loaded) -> SoftTokens | None:
        """What stands in front of the request's prompt; None while an encoder is reading: ask again.

        Raises InputError for an encoder that is missing, or another than the adapter was trained with, and for whatever
        else goes wrong in it.
        """
        method = loaded.method
        if not isinstance(method, InstancePrompt) or method.encoder == BASE:
            vectors = method.instances(self._model, [request.prompt])
            return loaded.prefix(None if vectors is None else vectors[0])
        if request.id not in self._coming:
            self._coming[request.id] = self._thread.submit(self._encoded, method, loaded, request.prompt)
        if not self._coming[request.id].done():
            return None
        coming = self._coming.pop(request.id)
        if (error := coming.exception()) is not None:
            raise _told(request, error)
        return coming.result()

    def _encoded(self, method: InstancePrompt, loaded: Loaded, prompt: Sequence[int]) -> SoftTokens:
        return loaded.prefix(method.encoded(self._opened(method.encoder), self._model, [prompt])[0])

    def _opened(self, name: str) -> Encoder:
        if name not in self._encoders:
            self._encoders[name] = open_encoder(name, keep=True)
        return self._encoders[name]

    def _warm_up_one(self, name: str) -> None:
        encoder = self._opened(name)
        encoder.warm_up()
        _ = encoder.fingerprint  # reads of every tensor, once

    def forget(self, request: str) -> None:
        """Nobody waits for it any more."""
        if (coming := self._coming.pop(request, None)) is not None:
            coming.cancel()

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._thread.shutdown(cancel_futures=True)


def _told(request: Request, error: BaseException) -> InputError:
    """What goes wrong in an encoder must stop the requests that need it alone."""
    if isinstance(error, InputError):
        return error
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    told = InputError(f"adapter {request.adapter!r}: its encoder cannot read the prompt ({text})")
    told.__cause__ = error
    return told
