"""Reading a comparison's plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from jora.compare.plan import Evaluation, read_plan
from jora.errors import InputError

PLAN = """
model: org/model
data: train.jsonl
eval_data: eval.jsonl
seeds: [3, 5]
batch_size: 2
learning_rate: 1e-3
dtype: float32
evaluation: {max_new_tokens: 8}
methods:
  - {label: LoRA r4, method: lora, rank: 4, targets: [q_proj]}
  - {label: "rsLoRA, r=4", method: lora, rank: 4, use_rslora: true, learning_rate: 2e-4}
  - {method: lora}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return path

    return write


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_plan_gives_a_config_for_each_run(write):
    plan = read_plan(write(PLAN))
    assert (plan.seeds, plan.eval_data, plan.evaluation) == ((3, 5), "eval.jsonl", Evaluation(max_new_tokens=8))
    assert [(entry.label, entry.slug) for entry in plan.entries] == [
        ("LoRA r4", "lora-r4"),
        ("rsLoRA, r=4", "rslora-r-4"),
        ("lora", "lora"),
    ]
    common = {"model": "org/model", "data": "train.jsonl", "batch_size": 2, "dtype": "float32"}
    assert plan.options(plan.entries[1], 5, Path("run")) == {
        **common,
        "learning_rate": "2e-4",  # the method's, not the plan's
        "method": "lora",
        "rank": 4,
        "use_rslora": True,
        "seed": 5,
        "out": "run",
    }


def test_one_seed_by_default(write):
    plan = read_plan(write("model: m\ndata: d\neval_data: e\nmethods: [{method: lora}]\n"))
    assert plan.seeds == (0,) and plan.evaluation == Evaluation()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("batch_size:", "batchsize:", ["unknown key 'batchsize'", "nearest is 'batch_size'"]),
        ("batch_size: 2", "rank: 2", ["unknown key 'rank'", "stands under `methods`"]),
        ("batch_size: 2", "seed: 2", ["seed is decided by the comparison"]),
        ("model: org/model", "", ["model is missing"]),
        ("seeds: [3, 5]", "seeds: [3, 3]", ["seeds", "[3, 3]"]),
        ("seeds: [3, 5]", "seeds: two", ["seeds", "'two'"]),
        ("max_new_tokens: 8", "max_tokens: 8", ["evaluation", "'max_tokens'", "nearest is 'max_new_tokens'"]),
        ("max_new_tokens: 8", "max_new_tokens: 0", ["evaluation", "max_new_tokens", "0"]),
        ("rank: 4, targets", "rnak: 4, targets", ["method 'LoRA r4'", "unknown option 'rnak'", "nearest is 'rank'"]),
        ("rank: 4, targets", "rank: 0, targets", ["rank must be at least 1"]),
        ("rank: 4, targets", "rank: many, targets", ["method 'LoRA r4'", "--rank", "many"]),
        ("rank: 4, targets", "epochs: 4, targets", ["method 'LoRA r4'", "epochs is the same for all methods"]),
        ("rank: 4, targets", "seed: 4, targets", ["method 'LoRA r4'", "seed is no option of one method"]),
        ("method: lora, rank: 4, targets", "method: lorra, rank: 4, targets", ["'lorra'", "nearest is 'lora'"]),
        ("label: LoRA r4, method: lora", "label: LoRA r4", ["entry 1 of methods has no `method: NAME`"]),
        ("label: LoRA r4", "label: LORA", ["'LORA' and 'lora' would share a directory"]),
        ("label: LoRA r4", "label: '!'", ["'!' has no letter"]),
        ("methods:", "methods: {}\nother:", ["unknown key 'other'"]),
    ],
)
def test_a_mistake_is_named(write, old, new, words):
    assert old in PLAN
    path = write(PLAN.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        read_plan(path)
    assert all(word in str(error.value) for word in words), error.value
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_plan_that_is_not_there():
    with pytest.raises(InputError, match=r"^absent\.yaml: No such file"):
        read_plan("absent.yaml")


def test_the_example_is_a_plan_of_at_least_eight_methods():
    plan = read_plan(EXAMPLES / "compare_python_docs.yaml")
    assert len({entry.options["method"] for entry in plan.entries}) >= 8
    assert plan.common["max_length"] == 512


def test_other_rates_are_tried_at_the_same_budget():
    plans = [read_plan(EXAMPLES / name) for name in ("compare_python_docs.yaml", "compare_rates.yaml")]
    assert plans[0].common == plans[1].common and plans[0].evaluation == plans[1].evaluation
    rates = [{(e.options["method"], e.options["learning_rate"]) for e in plan.entries} for plan in plans]
    assert {method for method, _ in rates[1]} < {method for method, _ in rates[0]} and not rates[0] & rates[1]
