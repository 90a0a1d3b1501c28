"""`jora COMMAND ...`: find the command, read its options, run it, turn a user's mistake into one line."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from jora.cli.options import read_options
from jora.errors import InputError

# Command -> one line of help; the module is jora.cli.<words joined by _>, imported when it is called.
COMMANDS = {
    "raft build": "documents + questions -> train.jsonl, eval.jsonl and a manifest",
    "train": "fine-tune an adapter: data -> run directory with adapter/, checkpoints/, metrics.jsonl",
    "train-many": "many adapters of one base in one batch: jobs.yaml -> a run directory for each",
    "eval": "loss, exact match, F1, share of quotes found in the context; a row per example",
    "generate": "answer one prompt or a file of prompts",
    "index": "documents -> an index that `jora serve --documents` answers from",
    "serve": "one base and a directory of adapters through OpenAI's API",
    "merge": "base + adapter -> Hugging Face directory",
    "convert": ".gguf -> Hugging Face directory",
    "compare": "several methods on the same data, budget and seeds: a table and plots",
    "estimate": "memory per device and time per step, before anything is loaded",
    "env": "devices, versions, which kernel is chosen for what and why",
    "demo": "the main job end to end on real input",
}


OUT_OF_MEMORY = "try fewer or shorter rows at a time, or more devices; `jora estimate` tells what training fits"
# Errors of a write to an open file, which name no file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jora COMMAND [options]",
            "",
            "Fine-tune language models on retrieval-augmented prompts, on one device or many.",
            "",
            *lines,
            "",
            "`jora COMMAND --help` lists a command's options; each can also stand in a YAML file (--config).",
        ]
    )


def _split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name and the arguments after it."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS and len(argv) >= words:
            return name, list(argv[words:])
    given = " ".join(word for word in argv[:2] if not word.startswith("-")) or argv[0]
    near = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    near = near or difflib.get_close_matches(given, COMMANDS, n=1) or difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"the nearest is {near[0]!r}" if near else "`jora --help` lists the commands"
    raise InputError(f"there is no command {given!r}; {hint}")


def run(argv: Sequence[str]) -> None:
    """Run one command.

    Raises:
        InputError: something the user gave cannot be used.
        SystemExit: after the help.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return
    if argv[0] == "--version":
        from jora import __version__

        print(f"jora {__version__}")
        return
    name, rest = _split_command(argv)
    module = importlib.import_module(f"jora.cli.{name.replace(' ', '_').replace('-', '_')}_command")
    options = read_options(module.Options, rest, f"jora {name}")
    from jora.ui.progress import reporter_for

    with reporter_for(sys.stderr) as reporter:
        module.run(options, reporter)


def main() -> None:
    """The entry point of the `jora` command; never returns without an exit code.

    2: the user's mistake, one line on stderr. 130: interrupted.
    """
    warnings.showwarning = _warn
    # transformers is here for tokenizers; that it found no torch is no news to our users.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        run(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader (`| head`) has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        if error.filename is not None:
            sys.exit(_complain(f"{error.filename}: {error.strerror}"))
        if error.errno not in _NO_ROOM:
            raise
        sys.exit(_complain(f"{error.strerror}: make room where the command writes and run it again"))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # jax's word for it, on every kind of device
            raise
        sys.exit(_complain(f"out of memory: {OUT_OF_MEMORY} ({str(error).splitlines()[0]})"))
    except KeyboardInterrupt:
        print("jora: interrupted", file=sys.stderr)
        sys.exit(130)


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    """A warning as a line for the user, without the place in the code."""
    print(f"jora: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _complain(message: str) -> int:
    print(f"jora: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
