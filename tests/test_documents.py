"""What README and docs tell people to type: the options exist, the files parse, the Python example runs."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jora.cli import raft_build_command, train_command
from jora.cli.main import COMMANDS
from jora.cli.options import read_options

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
_COMMAND = re.compile(r"^(?: {4}|`|.*\s`)(?:\.venv/bin/)?(jora (?:raft build|[a-z]+)(?: --?[^`#\n]*)?)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+?)(#[^)]*)?\)")


def _commands(page: Path) -> list[str]:
    return [match.group(1).strip() for match in _COMMAND.finditer(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_have_the_options(page):
    for text in _commands(page):
        words = shlex.split(text.replace("COMMAND", "env"))[1:]
        name = "raft build" if words[:2] == ["raft", "build"] else words[0]
        if name not in COMMANDS:
            assert name == "bench", f"{page.name}: {text}"  # named as not there yet
            continue
        rest = words[len(name.split()) :]
        if not rest or rest in (["--help"], ["--config"]):
            continue  # only mentioned
        options = importlib.import_module(f"jora.cli.{name.replace(' ', '_')}_command").Options
        read_options(options, rest, text)


def test_the_readme_has_its_commands():
    found = {" ".join(text.split()[:2]) for text in _commands(ROOT / "README.md")}
    assert {"jora raft", "jora train", "jora eval", "jora generate", "jora merge", "jora serve", "jora demo"} <= found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page):
    for target, _ in _LINK.findall(page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_longer_run_is_what_its_page_says():
    data = read_options(raft_build_command.Options, ["--config", str(ROOT / "examples/python_docs_raft.yaml")], "x")
    run = read_options(train_command.Options, ["--config", str(ROOT / "examples/python_docs.yaml")], "x")
    assert (run.training.epochs, run.training.max_length, run.method_options.rank) == (3, 2048, 16)
    assert run.method_options.targets == "all-linear" and run.eval_data is None
    # every document fits whole, so that the stated share of distractors is random
    assert data.raft.contexts * data.raft.chunk_tokens <= (data.raft.max_context_tokens or 0) < 2048


def _bytewise_llama(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _bytewise_llama(tmp_path / "org" / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "eval"):
        turns = [{"role": "user", "content": f"{split}?"}, {"role": "assistant", "content": "two years"}]
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    section = (ROOT / "README.md").read_text().split("## In Python\n")[1]
    block = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    base = transformers.AutoModelForCausalLM.from_pretrained("org/model")
    tuned = peft.PeftModel.from_pretrained(base, "adapter").merge_and_unload()
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    expected = dict(tuned.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
