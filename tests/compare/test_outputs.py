"""Tables, drawings and the page, from results that are made up."""

from __future__ import annotations

import csv
import io
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from jora.compare import page, plots, table
from jora.compare.plan import Entry, Evaluation, Plan
from jora.compare.results import Result, Training, read_result, write_result
from jora.errors import InputError

BASE = Result(
    "base", None, {"examples": 4, "loss": 3.0, "f1": 0.1, "exact_match": 0.0, "quote_share": None}, machine="x"
)


def result(label: str, seed: int, loss: float, parameters: int = 1000) -> Result:
    curve = tuple((0.5 * (step + 1), 4.0 - 0.1 * step) for step in range(10))
    training = Training(parameters, 4 * parameters, 10, 5.0, 0.5, 3 * 2**30, curve)
    scores = {"examples": 4, "loss": loss, "f1": 0.5, "exact_match": 0.25, "quote_share": 1.0, "answered": 1.0}
    return Result(label, seed, scores, training, machine="CPU (2 cores)")


RESULTS = [
    BASE,
    result("a|b <i>", 0, 2.0),
    result("tiny", 0, 2.5, 96),
    Result("broken", 0, error="step 3: the loss is nan"),
    result("a|b <i>", 1, 2.2),
    Result("tiny", 1, error="its process ended with code 1"),
    Result("broken", 1, error="step 4: the loss is nan"),
]
LABELS = ["a|b <i>", "tiny", "broken", "not run yet"]
PLAN = Plan(
    "p.yaml", "e.jsonl", (0, 1), Evaluation(), {"model": "m", "data": "d"}, tuple(Entry(x, {"rank": 1}) for x in LABELS)
)


@pytest.fixture(scope="module")
def rows():
    return table.summarise(LABELS, RESULTS)


def test_a_row_has_means_and_spreads_of_what_finished(rows):
    both, tiny, broken = rows
    assert both.spreads["loss"] == (pytest.approx(2.1), pytest.approx(statistics.stdev([2.0, 2.2])))
    assert both.spreads["parameters"] == (1000, 0)
    assert tiny.spreads["loss"] == (2.5, None) and tiny.failures == ("seed 1: its process ended with code 1",)
    assert not broken.spreads and len(broken.failures) == 2
    assert table.best(rows, "loss") is both and table.best(rows, "parameters") is tiny


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "2.100 ± 0.141"),
        ("f1", "50.0 %"),
        ("parameters", "1.0 k"),
        ("adapter_bytes", "3.9 KiB"),
        ("seconds_a_step", "0.500 s"),
        ("peak_bytes", "3.00 GiB"),
    ],
)
def test_cells_are_readable(rows, name, expected):
    assert table.cell(rows[0], name) == expected
    assert table.cell(rows[2], name) == "failed"


def test_markdown_has_a_line_a_method_and_the_failures(rows):
    text = table.markdown(rows, BASE)
    lines = text.splitlines()
    assert lines[0] == "4 examples; mean ± standard deviation over 2 seeds"
    cells = {line.count("|") - line.count("\\|") for line in lines if line.startswith("|")}
    assert len(cells) == 1  # a bar in a label is no column
    assert [line.split(" | ")[0] for line in lines[4:8]] == ["| base", "| a\\|b <i>", "| tiny", "| broken"]
    assert "- broken, seed 0: step 3: the loss is nan" in lines


def test_csv_has_every_run():
    lines = list(csv.DictReader(io.StringIO(table.csv(RESULTS))))
    assert [(line["label"], line["seed"]) for line in lines][:3] == [("base", ""), ("a|b <i>", "0"), ("tiny", "0")]
    assert float(lines[1]["loss"]) == 2.0 and lines[1]["peak_bytes"] == str(3 * 2**30)
    assert lines[0]["quote_share"] == "" and lines[3]["error"] == "step 3: the loss is nan"


def test_results_survive_the_disk(tmp_path: Path):
    for number, one in enumerate(RESULTS):
        write_result(tmp_path / f"{number}.json", one)
        assert read_result(tmp_path / f"{number}.json") == one


@pytest.fixture(scope="module")
def drawn(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn")
    return out, plots.draw(rows, BASE, out)


def test_the_drawings_are_pictures(drawn):
    out, svgs = drawn
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["loss-time.png", "memory.png", "score-parameters.png"]
    for file in files:
        picture = imread(file)[..., :3]
        height, width, _ = picture.shape
        assert width > 1200 and height > 250
        assert (picture[0] == 1).all() and (picture[:, 0] == 1).all()  # light, and nothing is cut off at the edge
        assert (picture != 1).any(axis=-1).mean() > 0.01
    assert len(svgs) == 3 and all(b"<svg" in svg for svg in svgs.values())


def test_drawings_of_nothing_but_failures(tmp_path: Path):
    rows = table.summarise(["broken"], RESULTS)
    assert len(plots.draw(rows, None, tmp_path)) == 3


def test_names_beside_points_cover_nothing():
    """Ten methods of nearly the same size and score."""
    crowd = [result(f"method number {i}", 0, 2.0 + 0.01 * i, 1000 + 10 * i) for i in range(10)]
    figure = plots._score_against_parameters(table.summarise([r.label for r in crowd], crowd), None)
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without leaders
        assert len(boxes) == 10
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file(rows, drawn):
    text = page.html(PLAN, rows, BASE, drawn[1], missing=2)
    parsed = _Page()
    parsed.feed(text)
    assert len(parsed.sources) == 3 and all(src.startswith("data:image/svg+xml;base64,") for src in parsed.sources)
    assert not {"script", "link", "iframe"} & set(parsed.tags) and not re.search(r"url\(|@import", text)
    assert "a|b <i>" in parsed.text and "i" not in parsed.tags  # labels are text, not markup
    assert "2.100 ± 0.141" in parsed.text and "broken, seed 0: step 3: the loss is nan" in parsed.text
    assert "2 runs have no result yet" in parsed.text and "CPU (2 cores)" in parsed.text
    assert re.search(r"class='best'>2\.100", text)


def test_without_matplotlib_there_is_a_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jora\[compare\]'"):
        plots.require_matplotlib()


def test_matplotlib_is_imported_for_drawing_only():
    import subprocess

    code = "import sys, jora.compare.run, jora.cli.compare_command; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
