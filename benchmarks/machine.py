"""What a measurement was made on: commit, date, hardware, versions, and the memory of this process."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def facts(packages: Iterable[str]) -> dict[str, Any]:
    """Commit, date, hardware and versions, to stand beside every figure."""
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def lines(found: dict[str, Any]) -> str:
    """The facts as one Markdown paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    hardware = f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB"
    return (
        f"Commit {found['commit']}, {found['date']}; {hardware} (load average {found['load_at_start']} at the start); "
        f"Python {found['python']}, {versions}."
    )


def commit() -> str:
    """The commit of the source tree; "+" marks changes that are not in it."""
    try:
        run = ["git", "-C", str(ROOT)]
        name = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_bytes() -> int:
    """The most physical memory that this process ever held, loading and compiling included."""
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a child inherits from the process that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spread(values: Sequence[float]) -> str:
    """Median and range, as they stand in a table."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"
