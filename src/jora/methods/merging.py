"""A base model and an adapter as one Hugging Face directory, a block of rows at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jora.methods.method import Adapter, ModuleSite, RowsMerger
from jora.methods.targets import EMBED, HEAD
from jora.models.model import Model
from jora.models.safetensors_file import MAX_SHARD_BYTES, Entry
from jora.models.saving import DeviceTensor, device_tensors, write_model
from jora.models.tensors import TensorSpec
from jora.reporting import SILENT, Reporter


@dataclass(frozen=True)
class MergedModel:
    """What `merge` returns: the sum is taken while it is written, so it costs no memory."""

    model: Model
    mergers: Mapping[ModuleSite, RowsMerger]

    @property
    def unties(self) -> bool:
        """Whether a tied embedding must be written as two tables: the adapter does not change both uses alike."""
        embed, head = (self.mergers.get((table, None)) for table in (EMBED, HEAD))
        return self.model.config.tied_embeddings and embed is not head

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        reporter: Reporter = SILENT,
    ) -> None:
        """Write a Hugging Face model directory: changed in fp32 and rounded to the model's dtype.

        Where a tied embedding must be untied, a UserWarning (and config.json) says so. An existing model
        directory is replaced when the new one is whole.
        """
        model = self.model
        hf_config = dict(model.hf_config)
        if self.unties:
            hf_config["tie_word_embeddings"] = False
            text = "merging unties the embeddings: the adapter changes embed_tokens or lm_head, which the base shares"
            if reporter is SILENT:
                warnings.warn(text, UserWarning, stacklevel=2)
            reporter.note(text)
        write_model(
            directory,
            self._entries(),
            dtype=np.dtype(model.dtype),
            hf_config=hf_config,
            source=Path(model.path),
            tokenizer=model._tokenizer,
            max_shard_bytes=max_shard_bytes,
            reporter=reporter,
        )

    def _entries(self) -> list[Entry]:
        tensors = list(device_tensors(self.model.params, self.model.config))
        if self.unties:
            table = self.model.params.embed
            spec = tensors[0].spec
            tensors.append(DeviceTensor(TensorSpec("lm_head.weight", spec.shape, spec.axes), table, site=(HEAD, None)))
        return [Entry(t.spec.name, t.spec.hf_shape, self._blocks(t)) for t in tensors]

    def _blocks(self, tensor: DeviceTensor) -> Callable[[], Iterable[np.ndarray]]:
        merger = self.mergers.get(tensor.site) if tensor.site else None
        return tensor.blocks if merger is None else partial(tensor.blocks, partial(_widened, merger))


def _widened(merger: RowsMerger, block: np.ndarray, rows: slice) -> np.ndarray:
    return merger(block.astype(np.float32, copy=False), rows)


def merge(model: Model, adapter: Adapter) -> MergedModel:
    """The adapter folded into its base, ready for `.save(directory)`.

    LoRA on a tied embedding or lm_head changes one of the table's two uses, as in PEFT; the merged model
    then has two tables. Raises InputError where the adapter was made for another kind of model, or cannot be merged.
    """
    model.parts_of(adapter)
    return MergedModel(model, adapter.method.mergers(adapter))
