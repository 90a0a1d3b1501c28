"""The command line's LoRA options against the method's own."""

from __future__ import annotations

from jora.cli.lora_options import LoraOptions
from jora.methods.lora import LoRA


def test_defaults_are_the_methods_own():
    assert LoraOptions().method() == LoRA()


def test_every_option_reaches_the_method():
    options = LoraOptions(4, 8.0, ("q_proj", "v_proj"), 0.1, True, {"q_proj": 2}, {"v_proj": 3.0}, (1,), ("lm_head",))
    method = options.method()
    assert method == LoRA(
        4, 8.0, ("q_proj", "v_proj"), 0.1, True, {"q_proj": 2}, {"v_proj": 3.0}, (1,), exclude_modules="lm_head"
    )


def test_one_target_may_be_a_regular_expression():
    assert LoraOptions(targets=(r".*\.(q|v)_proj",)).method().targets == r".*\.(q|v)_proj"
