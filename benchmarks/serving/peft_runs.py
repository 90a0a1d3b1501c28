"""HF PEFT with adapter switching as a contestant: all adapters in memory, one active at a time, `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bases import adapter_name
from .metrics import Served
from .trace import Arrival


def open_peft(base: str, adapters: str, count: int) -> Any:
    """`PeftModel` over the base (fp32, sdpa attention) with `count` adapters loaded."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    names = [adapter_name(number) for number in range(count)]
    adapted = peft.PeftModel.from_pretrained(model, Path(adapters) / names[0], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(Path(adapters) / name, adapter_name=name)
    adapted.generation_config.eos_token_id = None  # answers are as long as the trace says
    adapted.generation_config.pad_token_id = 0
    return adapted.eval()


def play(model: Any, trace: Sequence[Arrival], batch: int, limit: float) -> list[Served]:
    """The oldest waiting request chooses the adapter; up to `batch` that wait for it are generated together.

    limit: no batch begins later than after so many seconds.
    """
    waiting, found, start = list(trace), [], time.perf_counter()
    while waiting and (now := time.perf_counter() - start) < limit:
        if waiting[0].time > now:
            time.sleep(waiting[0].time - now)
            continue
        group = [a for a in waiting if a.adapter == waiting[0].adapter and a.time <= now][:batch]
        waiting = [a for a in waiting if a not in group]
        assert group[0].adapter is not None
        name = adapter_name(group[0].adapter)
        if model.active_adapter != name:
            model.set_adapter(name)
        found += generate(model, group, start)
    return found


def generate(model: Any, group: Sequence[Arrival], start: float) -> list[Served]:
    """Greedy answers of one batch (padded on the left, with a cache); a row ends at its own length."""
    import torch
    import transformers

    times: list[list[float]] = [[] for _ in group]

    class Lengths(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            now = time.perf_counter() - start
            for row, arrival in zip(times, group, strict=True):
                if len(row) < arrival.output:
                    row.append(now)
            return torch.tensor([len(row) >= a.output for row, a in zip(times, group, strict=True)])

    width = max(len(a.prompt) for a in group)
    ids = torch.tensor([[0] * (width - len(a.prompt)) + list(a.prompt) for a in group])
    mask = torch.tensor([[0] * (width - len(a.prompt)) + [1] * len(a.prompt) for a in group])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(a.output for a in group),
            stopping_criteria=transformers.StoppingCriteriaList([Lengths()]),
        )
    answers = out[:, width:].tolist()
    return [
        Served(a.number, a.time, len(a.prompt), tuple(row), a.client, tuple(answer[: a.output]))
        for a, row, answer in zip(group, times, answers, strict=True)
    ]
