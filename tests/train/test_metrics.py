"""metrics.jsonl as a resumed run finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jora.errors import InputError
from jora.train.metrics import MetricsFile

LINES = ['{"step": 1, "seconds": 1.0}', '{"step": 2, "seconds": 2.0}']


def resumed(path: Path, keep_until: int = 3) -> list[int]:
    """The steps that are left in the file, after a step more."""
    metrics = MetricsFile(path, keep_until)
    metrics.write({"step": 9})
    metrics.close()
    again = MetricsFile(path, 9)
    again.close()
    assert again.history == metrics.history
    return [line["step"] for line in metrics.history]


@pytest.mark.parametrize(
    "end", [b"", b"\n", b'\n{"step": 3, "sec', b'\n{"step": 3, "sec\n', b"\n\0\0\0\0", b"\n\xff\xfe"]
)
def test_a_cut_last_line_is_dropped(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join(LINES).encode() + end)
    assert resumed(path) == [1, 2, 9]


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    assert resumed(path, keep_until=1) == [1, 9]


def test_nothing_but_a_cut_line(tmp_path: Path) -> None:
    for content in ("", '{"st'):
        (tmp_path / "metrics.jsonl").write_text(content)
        assert resumed(tmp_path / "metrics.jsonl") == [9]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([LINES[0], '{"step": 2, "sec', LINES[1], '{"st']))
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not JSON"):
        MetricsFile(path, 3)
