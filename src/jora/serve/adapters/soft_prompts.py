"""The soft prompts of requests that wait. What an encoder reads, it reads on a thread of its own.

An encoder's weights stay loaded once it has been used: adapters name only those that the operator has listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32

from jora.encoders import Encoder, open_encoder
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

    def warm_up(self, longest: int) -> None:
        """Compile the means of the base's embeddings for prompts of up to so many tokens."""
        length = SHORTEST
        while length < 2 * longest:
            mean_embeddings(self._model, [(0,) * min(length, longest)])
            length *= 2

    def of(self, request: Request, loaded: Loaded) -> SoftTokens | None:
        """What stands in front of the request's prompt; None while an encoder is reading: ask again.

        Raises InputError for an encoder that is missing, or another than the adapter was trained with.
        """
        method = loaded.method
        if not isinstance(method, InstancePrompt) or method.encoder == BASE:
            vectors = method.instances(self._model, [request.prompt])
            return loaded.prefix(None if vectors is None else vectors[0])
        if request.id not in self._coming:
            self._coming[request.id] = self._thread.submit(self._encoded, method, loaded, request.prompt)
        if not self._coming[request.id].done():
            return None
        return self._coming.pop(request.id).result()

    def _encoded(self, method: InstancePrompt, loaded: Loaded, prompt: Sequence[int]) -> SoftTokens:
        if method.encoder not in self._encoders:
            self._encoders[method.encoder] = open_encoder(method.encoder, keep=True)
        return loaded.prefix(method.encoded(self._encoders[method.encoder], self._model, [prompt])[0])

    def forget(self, request: str) -> None:
        """Nobody waits for it any more."""
        if (coming := self._coming.pop(request, None)) is not None:
            coming.cancel()

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._thread.shutdown(cancel_futures=True)
