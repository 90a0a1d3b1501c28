"""`--method` and the options of the method that it chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from jora.cli import estimate_command, train_command
from jora.cli.method_choice import options_of
from jora.cli.options import option_names, read_options, read_values
from jora.errors import InputError
from jora.methods import registry
from jora.methods.lora import LoRA
from jora.methods.method import Method

GIVEN = ("--model", "m", "--data", "d", "--out", "o")


@dataclass(frozen=True)
class Outside(Method):
    """A method from outside the package (arXiv 0000.00000).

    size: how many, of which
    there may be more. patterns, kind: two that share a text. layers and
    whole: others.

    This is about none of them.
    """

    size: int = 3
    patterns: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["small", "large"] = "small"
    layers: int | Sequence[int] | None = None
    names: str | Sequence[str] = ()
    """Not a help text: docstrings of fields are not read."""
    rows: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    whole: bool = False

    name: ClassVar[str] = "outside"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError("outside: size must be at least 1")

    def init(self, model: Any, key: Any) -> Any: ...

    def axes(self, config: Any) -> Any: ...

    def bind(self, state: Any, rows: Any) -> Any: ...


@pytest.fixture
def outside(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    registry.register(Outside)


def method(*argv: str) -> Method:
    return read_options(train_command.Options, [*GIVEN, *argv], "jora train").build_method()


def test_lora_is_the_default():
    assert method() == LoRA()
    assert method("--method", "lora", "--rank=4") == LoRA(rank=4)


def test_every_kind_of_option_reaches_the_method():
    words = "--rank 4 --alpha 8 --targets q_proj v_proj --dropout 0.1 --use-rslora --rank-pattern q_proj 2"
    more = "--alpha-pattern v_proj 3 --layers-to-transform 1 --exclude-modules lm_head"
    assert method(*words.split(), *more.split()) == LoRA(
        4, 8.0, ("q_proj", "v_proj"), 0.1, True, {"q_proj": 2}, {"v_proj": 3.0}, 1, exclude_modules="lm_head"
    )


def test_one_target_may_be_a_regular_expression():
    chosen = method("--targets", r".*\.(q|v)_proj")
    assert isinstance(chosen, LoRA) and chosen.targets == r".*\.(q|v)_proj"


def test_a_method_from_outside_has_its_options(outside):
    words = "--method outside --size 5 --patterns a 1 b 2.5 --kind large --layers 1 2 --names x --rows 7 8 --whole"
    assert method(*words.split()) == Outside(5, {"a": 1.0, "b": 2.5}, "large", (1, 2), "x", (7, 8), True)
    assert method("--method=outside", '--rows={"x": [1, 2]}') == Outside(rows={"x": [1, 2]})


def test_a_method_may_come_from_a_file(outside, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text("method: outside\nsize: 5\nlayers: [4]\nnames: [a, b]\nrows: {x: [1, 2]}\nwhole: true\nseed: 9\n")
    options = read_options(train_command.Options, [*GIVEN, "--config", str(config), "--size", "6"], "jora train")
    assert options.build_method() == Outside(6, layers=(4,), names=("a", "b"), rows={"x": [1, 2]}, whole=True)
    assert options.training.seed == 9
    values = {"model": "m", "data": "d", "out": "o", "method": "outside", "patterns": {"a": 2}, "layers": None}
    assert read_values(train_command.Options, values, "here").build_method() == Outside(patterns={"a": 2.0})
    values |= {"patterns": {}, "rows": [1, 2]}
    assert read_values(train_command.Options, values, "here").build_method() == Outside(rows=(1, 2))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--size", "2"], ["unknown option --size", "the method is lora", "an option of outside"]),
        (["--method", "outside", "--rank", "2"], ["unknown option --rank", "the method is outside", "option of lora"]),
        (["--method", "outside", "--siz", "2"], ["unknown option --siz", "nearest is --size"]),
        (["--method", "outsid"], ["'outsid' is not known", "nearest is 'outside'"]),
        (["--method", "outside", "--kind", "tiny"], ["--kind", "'tiny'", "'small', 'large'"]),
        (["--method", "outside", "--size", "0"], ["outside: size must be at least 1"]),
        (["--method", "outside", "--rows=[1"], ["--rows"]),
        (["--method", "outside", '--layers=["1"]'], ["--layers", "1"]),
        (["--method", "outside", '--rows={"x": ["1"]}'], ["--rows", "1"]),
    ],
)
def test_a_mistake_is_named(outside, argv, words):
    with pytest.raises(InputError) as error:
        method(*argv)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_to_transform": ["a"]}, "here: layers_to_transform: 'a' is not a whole number"),
        ({"layers_to_transform": [1, "0"]}, "here: layers_to_transform: '0' is not a whole number"),
        ({"layers_to_transform": [True]}, "here: layers_to_transform: True is not a whole number"),
        ({"targets": ["q_proj", 1]}, "here: targets: 1 is not text"),
        ({"method": "flora", "targets": [None, "q_proj"]}, "here: targets: None is not text"),
        ({"targets": [date(2026, 1, 1)]}, r"here: targets: datetime.date\(2026, 1, 1\) is not text"),
        ({"trainable_token_indices": {"lm_head": [2.5]}}, "here: trainable_token_indices: 2.5 is not a whole number"),
        ({"trainable_token_indices": {"lm_head": 2}}, "here: trainable_token_indices: 'lm_head': 2 is not a list"),
    ],
)
def test_an_item_of_a_list_in_a_file_has_its_type(values, message):
    with pytest.raises(InputError, match=f"^{message}"):
        read_values(train_command.Options, {"model": "m", "data": "d", "out": "o", **values}, "here")


@pytest.mark.parametrize("name", ["lora", "nola", "flora", "vera", "ia3", "full"])
def test_a_method_checks_what_its_choices_hold(name):
    option = "weights" if name == "full" else "targets"
    with pytest.raises(InputError, match=f"{option}: 1 is not a module's name"):
        registry.method_class(name)(**{option: ["q_proj", 1]})
    if name not in ("ia3", "full"):
        for layers in (["0"], "0", [True]):
            with pytest.raises(InputError, match=r"layers_to_transform: .* is not the number of a layer"):
                registry.method_class(name)(layers_to_transform=layers)


def test_an_option_of_another_method_in_a_file_is_named(outside):
    values = {"model": "m", "data": "d", "out": "o", "size": 2}
    with pytest.raises(InputError, match=r"^here: unknown option 'size'; the method is lora, .* option of outside$"):
        read_values(train_command.Options, values, "here")


def test_help_shows_the_chosen_methods_options(outside, capsys):
    with pytest.raises(SystemExit):
        read_options(train_command.Options, ["--help", "--method", "outside"], "jora train")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "A method from outside the package (arXiv 0000.00000)." in text
    assert "How many, of which there may be more." in text
    assert text.count("Two that share a text.") == 2 and text.count("Others.") == 2
    assert "none of them" not in text and "Not a help text" not in text
    assert "--rank" not in text
    assert "--layers INT [INT ...] Others. (default: None)" in text
    with pytest.raises(SystemExit):
        read_options(estimate_command.Options, ["--help"], "jora estimate")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--rank" in text and "lora," in text and "outside" in text and ". `--method NAME --help` shows" in text


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_built_in_method_fits_the_command_line(name, capsys):
    cls = registry.method_class(name)
    commands = (train_command.Options, estimate_command.Options)
    shared = {option for command in commands for option in option_names(command)} & {f.name for f in fields(cls)}
    assert not shared, "names of the command's own options"
    assert method("--method", name) == cls()
    with pytest.raises(SystemExit):
        read_options(train_command.Options, ["--help", "--method", name], "jora train")
    texts = {f.name: typing_help(options_of(cls), f.name) for f in fields(cls)}
    assert all(texts.values()), f"the class docstring has no `name: text` for {[n for n, t in texts.items() if not t]}"


def typing_help(group: type, name: str) -> str:
    """The help text of an option."""
    return next(
        extra.help for extra in group.__annotations__[name].__metadata__ if getattr(extra, "help", None) is not None
    )
