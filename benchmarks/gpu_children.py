"""Contestants of the GPU scripts as processes: results come line by line, and a hung or killed one loses no others."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "RESULT "  # libraries may write lines of their own


def emit(result: dict[str, Any]) -> None:
    """One result of a child, to its parent."""
    print(MARK + json.dumps(result), flush=True)


def say(text: str) -> None:
    """Progress, at once."""
    print(text, file=sys.stderr, flush=True)


def attempt(work: Callable[[], dict[str, Any]], about: dict[str, Any]) -> bool:
    """Emit what `work` returns beside `about`; an error, out of memory say, is emitted in its place."""
    try:
        found = work()
    except Exception as error:
        # The frames hold the arrays that filled the device: only text is kept.
        traceback.print_exc(limit=6)
        text = f"{type(error).__name__}: {error}".strip()
        error.__traceback__ = None
        found = {"error": short(text)}
    gc.collect()
    emit({**about, **found})
    return "error" not in found


def short(text: str, most: int = 200) -> str:
    """The first line that says something, fit for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "no message").replace("|", "/")[:most]


def run_child(script: str, arguments: list[str], timeout: float, seen: Callable[[dict[str, Any]], None]) -> str | None:
    """Run a script of ours; `seen` gets each result as it comes. None, or why the process did not end well.

    Its stderr is ours, so that progress is seen while it runs.
    """
    # jax otherwise takes most of the GPU's memory at once; the peak is what is really in use either way.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout, kill)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                seen(json.loads(line[len(MARK) :]))
            else:
                say(line.rstrip())
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.stdout.close()
    if expired.is_set():
        return f"stopped after {timeout:g} s"
    return f"ended with code {code}" if code else None


def check_device(platform: str, allow_cpu: bool) -> None:
    """Raise RuntimeError where a child finds no GPU, rather than try a 7B model on a CPU."""
    if platform == "cpu" and not allow_cpu:
        raise RuntimeError("no GPU in this process: only the CPU was found")


def gpu_name() -> str | None:
    """The GPU by nvidia-smi, or None. jax and torch would start on it here, beside the contestants."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "a GPU without nvidia-smi" if Path("/dev/nvidiactl").exists() else None
    lines = run.stdout.strip().splitlines()
    return lines[0] if lines else None


def write(path: Path | None, report: dict[str, Any]) -> None:
    """The report as JSON, whole at every moment."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)
