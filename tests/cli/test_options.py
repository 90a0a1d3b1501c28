"""Options from the command line and from `--config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro

from jora.cli.options import CommandOptions, read_options
from jora.errors import InputError


@dataclass(frozen=True)
class Inner:
    """A method."""

    rank: int = 16
    """Columns."""
    targets: str | tuple[str, ...] = "all"
    """Names."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By name."""


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Do it."""

    model: str
    """The model."""
    learning_rate: float = 1e-4
    """Step size."""
    pack: bool = True
    """Pack."""
    seed: int | None = None
    """Seed."""
    inner: tyro.conf.OmitArgPrefixes[Inner] = Inner()


def read(*argv: str) -> Options:
    return read_options(Options, argv, "jora it")


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_file_fills_every_kind_of_option(config):
    path = config(
        "model: some/dir\nlearning_rate: 2e-5\npack: false\nseed: 3\nrank: 4\n"
        "targets: [q_proj, v_proj]\nranks: {q_proj: 8}\n"
    )
    options = read("--config", path)
    # 2e-5 is a string to YAML 1.1; it must still be a number to us.
    assert (options.model, options.learning_rate, options.pack, options.seed) == ("some/dir", 2e-5, False, 3)
    assert options.inner == Inner(4, ("q_proj", "v_proj"), {"q_proj": 8})


def test_command_line_wins_over_file_and_file_over_default(config):
    path = config("model: from-file\nlearning-rate: 1\npack: false\ntargets: [a, b]\nrank: 4\n")
    options = read("--model", "given", f"--config={path}", "--pack", "--targets", "c", "--rank=8")
    assert options.model == "given"
    assert options.learning_rate == 1.0
    assert options.pack is True
    assert options.inner == Inner(8, "c")


def test_null_and_empty_file(config):
    assert read("--model", "m", "--config", config("seed: null\n")).seed is None
    assert read("--model", "m", "--config", config("# nothing\n")).model == "m"


@pytest.mark.parametrize("words", [["--config=~/run.yaml"], ["--config", "~/run.yaml"]])
def test_a_tilde_is_the_home_directory(config, monkeypatch, words):
    monkeypatch.setenv("HOME", str(Path(config("model: m\n")).parent))
    assert read(*words).model == "m"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: x\n", ["run.yaml", "'modle'", "nearest is 'model'"]),
        ("lerning_rate: 1\n", ["run.yaml", "nearest is 'learning_rate'"]),
        ("pack: 7\n", ["run.yaml", "pack is true or false"]),
        ("model: [\n", ["run.yaml", "line 2"]),
        ("- model\n", ["run.yaml", "holds a list"]),
        ("model: m\nrank: many\n", ["run.yaml", "--rank", "many"]),
    ],
)
def test_bad_file_is_named(config, text, words):
    with pytest.raises(InputError) as error:
        read("--config", config(text))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modle", "x"], ["unknown option --modle", "nearest is --model"]),
        (["--model", "m", "--no-seed"], ["unknown option --no-seed"]),
        ([], ["--model is missing"]),
        (["--model", "m", "--rank", "many"], ["--rank", "many"]),
        (["--model", "m", "--rank"], ["--rank"]),
        (["--model", "m", "stray"], ["stray"]),
        (["--model", "m", "--config", "absent.yaml"], ["absent.yaml"]),
    ],
)
def test_bad_command_line_is_one_line(argv, words):
    with pytest.raises(InputError) as error:
        read(*argv)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and "│" not in str(error.value)


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--config", "--model", "--learning-rate", "--pack", "--rank", "Step size."))
