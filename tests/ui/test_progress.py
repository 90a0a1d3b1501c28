"""Plain lines where output is piped, a live bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest

from jora.ui.facts import duration, facts, rate, size
from jora.ui.progress import PlainReporter, reporter_for

PROGRAM = """
import sys
from jora.ui.progress import reporter_for
with reporter_for(sys.stderr) as reporter:
    reporter.note("a note")
    reporter.start(3, "training, steps")
    for done in (1, 2, 3):
        reporter.update(done, loss=1.5, tokens_per_s=812.0)
        if done == 2:
            reporter.start(None, "evaluating, rows")
            reporter.update(4)
            reporter.finish(loss=0.25)
    reporter.finish(loss=0.5)
"""


def test_piped_output_is_plain_lines():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert b"\r" not in done.stderr and b"\x1b" not in done.stderr
    lines = done.stderr.decode().splitlines()
    assert lines[:3] == ["a note", "training: 3 steps", "evaluating ..."]
    assert lines[3].startswith("evaluating: 4 rows in ") and lines[3].endswith("loss 0.25")
    assert lines[4].startswith("training: 3 steps in ") and lines[4].endswith("loss 0.5")


def test_terminal_gets_a_live_bar_and_the_same_closing_lines():
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
    os.close(ours)
    assert child.wait() == 0
    text = output.decode()
    assert "\x1b[" in text and "━" in text
    assert "training: 3 steps in " in text and "evaluating: 4 rows in " in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is given back


def test_a_line_now_and_then_with_rate_memory_and_time_left():
    stream = io.StringIO()
    reporter = PlainReporter(stream, every_s=0.0)
    reporter.start(4, "training, steps")
    reporter.update(1, loss=2.0, tokens_per_s=99.6)
    line = stream.getvalue().splitlines()[-1]
    assert line.startswith("training: 1/4 steps, ")
    assert all(word in line for word in ("loss 2", "100 tokens/s", "memory ", "left"))


def test_the_rate_of_resumed_work_is_its_own():
    stream = io.StringIO()
    reporter = PlainReporter(stream, every_s=0.0)
    reporter.start(40, "training, steps", 30)
    reporter._stack[-1].started -= 30.0  # half a minute ago
    reporter.update(31)
    line = stream.getvalue().splitlines()[-1]
    assert line.startswith("training: 31/40 steps, 30 s each, ") and line.endswith("4:30 left")
    reporter.finish()
    assert stream.getvalue().splitlines()[-1] == "training: 1 steps in 30 s"


def test_lines_do_not_come_more_often_than_asked():
    stream = io.StringIO()
    reporter = PlainReporter(stream, every_s=1000.0)
    reporter.start(100, "training")
    for done in range(100):
        reporter.update(done)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_file_is_not_a_terminal():
    with reporter_for(io.StringIO()) as reporter:
        assert isinstance(reporter, PlainReporter)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (duration(0.44), "0.4 s"),
        (duration(59.7), "1:00"),
        (duration(3725), "1:02:05"),
        (size(3 << 29), "1.5 GiB"),
        (size(512), "512 B"),
        (rate(0.25), "4.0 s each"),
        (rate(12.0), "12/s"),
        (
            facts({"exact_match": 0.123456, "peak_bytes": 1 << 20, "kind": "x"}),
            "exact match 0.1235, peak 1 MiB, kind x",
        ),
    ],
)
def test_numbers_read_well(got, wanted):
    assert got == wanted
