"""Pre-training a Llama of 10M parameters on the standard library's text: AdamW, GaLore and LoRA-only.

    python benchmarks/pretrain_small.py --out runs/pretrain [--steps 1000] [--methods adamw,galore,lora,lora-tables]

All see the same batches in the same order and are evaluated on the same files held out. Start it again to go on
where it stopped. GaLore and LoRA have the same rank, a quarter of the width, as in arXiv 2403.03507. "lora" trains
adapters on every linear layer of the same random weights and nothing else; "lora-tables" the embeddings, head and
norms in full beside them. Writes OUT/result.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jora
from jora.data.batches import Tokenised
from jora.files import atomic_write
from jora.train import TrainOptions

VOCABULARY, LENGTH, ROWS = 4096, 256, 8
RANK = 64
BOS, PAD = 0, 1
HELD_OUT = 32  # of how many files one is held out, by the hash of its name
EVALUATED = 128  # rows of the files held out
MODEL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=BOS,
    pad_token_id=PAD,
)


def texts(held_out: bool) -> Iterator[str]:
    """The standard library's modules, tests and third-party packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"site-packages", "test", "tests", "idle_test"} & set(inside.parts):
            continue
        one_of = int(hashlib.sha256(inside.as_posix().encode()).hexdigest(), 16) % HELD_OUT
        if (one_of == 0) == held_out:
            yield path.read_text(encoding="utf-8", errors="replace")


def make_model(directory: Path) -> None:
    """A tokenizer trained on the text, and random weights, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(held_out=False), trainer)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>").save_pretrained(directory)


def rows(tokenizer: Any, held_out: bool) -> list[Tokenised]:
    """All text as rows of LENGTH tokens; every token but the first carries loss."""
    stream: list[int] = []
    for text in texts(held_out):
        stream += [BOS, *tokenizer.encode(text, add_special_tokens=False)]
    count = len(stream) // (LENGTH - 1)
    body = np.array(stream[: count * (LENGTH - 1)], np.int32).reshape(count, LENGTH - 1)
    loss = np.arange(LENGTH) > 0
    return [Tokenised(np.concatenate([[BOS], row]).astype(np.int32), loss) for row in body]


def methods() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (method, options). docs/galore.md says which other rates were tried."""
    whole = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")
    return {
        "adamw": (jora.Full(), dict(learning_rate=2e-3)),
        "galore": (
            jora.Full(),
            dict(learning_rate=8e-3, optimizer="galore", galore_rank=RANK, galore_scale=0.25, galore_refresh=50),
        ),
        "lora": (jora.LoRA(rank=RANK, alpha=float(RANK)), dict(learning_rate=2e-3)),
        "lora-tables": (jora.LoRA(rank=RANK, alpha=float(RANK), modules_to_save=whole), dict(learning_rate=2e-3)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--methods", default="adamw,galore,lora,lora-tables")
    parser.add_argument("--rate", type=float, help="in place of each method's own learning rate")
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    base = given.out / "model"
    if not (base / "config.json").exists():
        make_model(base)
    written = given.out / "result.json"
    result: dict[str, Any] = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    for name in given.methods.split(","):
        method, changes = methods()[name]
        model = jora.load_model(base, dtype="float32")  # anew: full training changes it
        train, held_out = rows(model.tokenizer, False), rows(model.tokenizer, True)[:EVALUATED]
        out = given.out / name
        if given.rate is not None:
            changes["learning_rate"] = given.rate
        options = TrainOptions(
            max_steps=given.steps,
            batch_size=ROWS,
            max_length=LENGTH,
            warmup=0.1,
            eval_every=max(1, given.steps // 4),
            save_every=max(1, given.steps // 8),
            resume=(out / "config.yaml").exists(),
            remat="selective",
            **changes,
        )
        done = jora.train(model, method, train, out=out, options=options, eval_data=held_out)
        losses = {line["step"]: line["eval_loss"] for line in done.history if "eval_loss" in line}
        result[name] = {
            "tokens": given.steps * ROWS * (LENGTH - 1),
            "held_out_loss": losses[max(losses)],
            "by_step": losses,
            "seconds": round(done.history[-1]["seconds"]),
        }
        if "adamw" in result:
            result[name]["above_adamw"] = losses[max(losses)] / result["adamw"]["held_out_loss"] - 1
        with atomic_write(written) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(name, json.dumps(result[name]), flush=True)


if __name__ == "__main__":
    main()
