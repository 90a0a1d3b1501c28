"""A base model and a LoRA adapter as one Hugging Face directory, a block of rows at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jora.methods.factors import Factors, FactorSite, delta, factor_sites, host_factors
from jora.methods.method import Adapter
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
    adapter: Adapter

    @property
    def unties(self) -> bool:
        """Whether a tied embedding must be written as two tables: the adapter changes only one of its uses."""
        targets = self.adapter.method.sites(self.model.config)
        return self.model.config.tied_embeddings and (EMBED in targets or HEAD in targets)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        reporter: Reporter = SILENT,
    ) -> None:
        """Write a Hugging Face model directory: W + s A B, computed in fp32 and rounded to the model's dtype.

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
        sites = {(s.target, s.layer): s for s in factor_sites(self.adapter.method, self.model.config)}
        tensors = list(device_tensors(self.model.params, self.model.config))
        if self.unties:
            table = self.model.params.embed
            spec = tensors[0].spec
            tensors.append(DeviceTensor(TensorSpec("lm_head.weight", spec.shape, spec.axes), table, site=(HEAD, None)))
        return [Entry(t.spec.name, t.spec.hf_shape, self._blocks(t, sites)) for t in tensors]

    def _blocks(
        self, tensor: DeviceTensor, sites: dict[tuple[str, int | None], FactorSite]
    ) -> Callable[[], Iterable[np.ndarray]]:
        site = sites.get(tensor.site) if tensor.site else None
        return tensor.blocks if site is None else partial(_merged_blocks, tensor, self.adapter, site)


def _merged_blocks(tensor: DeviceTensor, adapter: Adapter, site: FactorSite) -> Iterator[np.ndarray]:
    factors = host_factors(adapter, site)
    return tensor.blocks(partial(_add, factors, site))


def _add(factors: Factors, site: FactorSite, block: np.ndarray, rows: slice) -> np.ndarray:
    change = delta(factors, site, rows)
    change += block  # fp32 whatever the block's dtype
    return change


def merge(model: Model, adapter: Adapter) -> MergedModel:
    """The adapter folded into its base, ready for `.save(directory)`.

    LoRA on a tied embedding or lm_head changes one of the table's two uses, as in PEFT; the merged model
    then has two tables. Raises InputError where the adapter was made for another kind of model.
    """
    model.parts_of(adapter)
    return MergedModel(model, adapter)
