"""What all contestants share, made in a process of its own: the first LoRA factors and one row of RAFT data.

`python prepare.py DIRECTORY` reads DIRECTORY/request.json and writes the PEFT adapter, the row and the step's FLOPs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from floor import step_flops


def main() -> None:
    import jax
    import jax.numpy as jnp

    from jora.methods.lora import LoRA
    from jora.methods.storage import save_adapter
    from jora.models.model import Model
    from jora.models.params import abstract_params
    from jora.sharding import single_device
    from jora.train.estimation import read_config

    directory = Path(sys.argv[1])
    request = json.loads((directory / "request.json").read_text())
    config, layout = read_config(request["model"]), single_device()
    model = Model(abstract_params(config, layout, jnp.float32), config, layout, {}, request["model"], {})
    adapter = LoRA(rank=request["rank"], alpha=2 * request["rank"]).init(model, jax.random.key(0))
    save_adapter(adapter, directory / "adapter")
    length, answers = request["length"], request["answers"]
    flops = step_flops(config, length, answers, request["rank"])
    if request["random_tokens"]:
        tokens = np.random.default_rng(0).integers(3, config.vocab_size, length).tolist()
    else:
        tokens = raft_row(request["model"], length, answers)
    given = {"model": request["model"], "adapter": str(directory / "adapter"), "tokens": tokens, "answers": answers}
    steps = {"rate": request["rate"], "max_steps": request["max_steps"]}
    (directory / "task.json").write_text(json.dumps({**given, **steps}))
    sizes = {name: getattr(config, name) for name in ("embed", "mlp", "heads", "kv_heads", "head_dim")}
    (directory / "shape.json").write_text(json.dumps({"flops": flops, "config": sizes}))


def raft_row(model: str, length: int, answers: int) -> list[int]:
    """A RAFT example about Python of exactly `length` tokens, the last `answers` of them the answer's.

    The documents are the oracle and then others until the row is full; the last one is cut.
    """
    from jora.data import raft_format
    from jora.data.formats import DOCUMENTS_MARKER
    from jora.demo import python_docs
    from jora.models.model import load_tokenizer

    tokenizer = load_tokenizer(Path(model))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for question in python_docs.resolve(python_docs.load_questions("train")).questions:
        answer = encode(raft_format.target(question.answer, question.quote))
        if len(answer) >= answers:
            break
    else:
        raise SystemExit(f"no question has an answer of {answers} tokens: ask for fewer with --answers")
    before, after = raft_format.prompt(question.question).split(DOCUMENTS_MARKER)
    head, tail = [*_start(tokenizer), *encode(before)], encode(after + "\n\n")
    room = length - len(head) - len(tail) - answers
    documents = sorted(python_docs.documents(), key=lambda document: document["title"] != question.source)
    text: list[int] = []
    for document in documents:
        text += encode(f"{document['title']}\n{document['text']}\n\n")
        if len(text) >= room:
            return head + text[:room] + tail + answer[:answers]
    raise SystemExit(f"the documents do not fill {length} tokens")


def _start(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


if __name__ == "__main__":
    main()
