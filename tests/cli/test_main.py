"""The `jora` command as a process: exit codes, one-line errors, what it imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import jora
from jora.cli.main import COMMANDS


def jora_command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jora", *argv], capture_output=True, text=True, check=False)


def test_help_names_every_command():
    done = jora_command("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stderr == ""


def test_version():
    assert jora_command("--version").stdout == f"jora {jora.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["'trian'", "nearest is 'train'"]),
        (["raft"], ["nearest is 'raft build'"]),
        (["generate", "--modle", "x"], ["--modle", "nearest is --model"]),
        (["generate"], ["--model is missing"]),
        (["convert", "--model", "absent.gguf", "--out", "x"], ["absent.gguf"]),
        (["merge", "--model", "./absent", "--adapter", "a", "--out", "x"], ["./absent"]),
        (["generate", "--model", "./absent", "--prompt", "a", "--config", "absent.yaml"], ["absent.yaml"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words):
    done = jora_command(*argv)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("jora: error: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert done.stdout == ""


@pytest.mark.parametrize(
    "code",
    [
        "import jora; jora.serve",
        "import jora.cli.main as m; m.run(['--help'])",
        "import jora.reporting",
    ],
)
def test_jax_is_not_imported(code):
    check = "import sys; heavy = {'jax', 'transformers', 'torch', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_found():
    for package in (jora, jora.serve):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = package.no_such_name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_help(name, capsys):
    from jora.cli.main import run

    with pytest.raises(SystemExit) as stop:
        run([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: jora {name}" in capsys.readouterr().out


def main_with(run: str) -> subprocess.CompletedProcess[str]:
    """`main()` in a process of its own, with a command that does `run`."""
    program = f"import signal, warnings, jora.cli.main as m\ndef run(argv):\n    {run}\nm.run = run\nm.main()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_ctrl_c_ends_with_130():
    # A shell starts background jobs with SIGINT ignored, and this suite may be one.
    done = main_with("signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, "jora: interrupted\n")


def test_a_file_that_cannot_be_opened_is_one_line():
    done = main_with("open('/no/such/file')")
    assert (done.returncode, done.stderr) == (2, "jora: error: /no/such/file: No such file or directory\n")


def test_a_full_disk_is_one_line():
    done = main_with("raise OSError(28, 'No space left on device')")  # as a write to an open file says it
    told = "jora: error: No space left on device: make room where the command writes and run it again\n"
    assert (done.returncode, done.stderr) == (2, told)
    assert "Traceback" in main_with("raise OSError('who knows')").stderr


def test_too_little_device_memory_is_one_line():
    code = "from jora.cli import main; main.run = f; main.main()"
    raising = "def f(argv): raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.')"
    done = subprocess.run([sys.executable, "-c", f"{raising}\n{code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "out of memory: try fewer or shorter rows" in done.stderr and "allocate 9 bytes" in done.stderr


def test_a_warning_is_one_line_and_a_bug_is_a_traceback():
    done = main_with("warnings.warn('made for another base'); {}['bug']")
    assert done.stderr.startswith("jora: warning: made for another base\nTraceback")
    assert done.returncode == 1


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "jora", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
