"""Numbers as a person reads them beside a progress bar."""

from __future__ import annotations

from collections.abc import Mapping


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:05`, `1:02:05`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(bytes_: float) -> str:
    """A size in binary units, `1.4 GiB`."""
    value = float(bytes_)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def number(value: float | int | str) -> str:
    """Four significant digits, whole numbers as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rate(per_second: float) -> str:
    """`3.1/s`, or `20 s each` when slower than one a second."""
    if per_second >= 1:
        return f"{number(round(per_second, 1))}/s"
    return f"{duration(1 / per_second)} each" if per_second > 0 else ""


def fact(name: str, value: float | int | str) -> str:
    """One field of a `Reporter` call: rates and sizes by their names' endings."""
    if name.endswith("_per_s") and not isinstance(value, str):
        return f"{value:.0f} {name.removesuffix('_per_s')}/s"
    if name.endswith("_bytes") and not isinstance(value, str):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {size(value)}"
    return f"{name.replace('_', ' ')} {number(value)}"


def facts(fields: Mapping[str, float | int | str]) -> str:
    """All fields of a call, in their order."""
    return ", ".join(fact(name, value) for name, value in fields.items())
