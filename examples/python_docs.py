"""The longer run: Gemma 3 270M on Python's documentation, contexts of 2,048 tokens, three seeds with their spread.

    python examples/python_docs.py            # writes python-docs/; stop it with Ctrl-C, start it again to go on

What is trained and how stands in `python_docs.yaml`, the data set in `python_docs_raft.yaml`. Stages that are
finished are skipped: the base's evaluation, then for each seed its training (resumed from the last checkpoint) and
its evaluation. `results.json` and `results.md` are written anew after each seed. Of a finished seed `scores.json` is
enough: with `settings.json`, these small files can go on to another machine, which runs the other seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jora
from jora.cli import raft_build_command, train_command
from jora.cli.common import open_model
from jora.cli.options import read_options
from jora.data import raft
from jora.data.documents import read_documents
from jora.data.questions import read_questions
from jora.demo import python_docs
from jora.demo.run import prepare_model
from jora.files import atomic_write
from jora.methods.method import Adapter
from jora.reporting import Reporter
from jora.ui.progress import reporter_for

HERE = Path(__file__).resolve().parent
ANSWER_TOKENS = 96  # the longest answer with its quote has 78

METRICS = {
    "loss": "loss, nats per answer token",
    "f1": "answer F1",
    "exact_match": "exact match",
    "quote_share": "quotes that stand in the context",
    "answered": "reached an answer",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished yet; exit code 2 for a user's mistake, 130 when interrupted."""
    try:
        with reporter_for(sys.stderr) as reporter:
            report = run(_arguments(argv), reporter)
    except jora.InputError as error:
        print(f"python_docs: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("python_docs: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(report)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, default=HERE / "python_docs.yaml", help="training options")
    parser.add_argument("--raft-config", type=Path, default=HERE / "python_docs_raft.yaml", help="data set options")
    parser.add_argument("--out", type=Path, default=Path("python-docs"), help="directory for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, help="a model directory; by default the demo's Gemma 3 270M")
    parser.add_argument("--limit", type=int, help="only so many questions of each kind: a quick look, not a result")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, reporter: Reporter) -> str:
    """Everything, in order; returns the table."""
    out = arguments.out
    path = str(arguments.model or prepare_model(reporter))
    options = read_options(train_command.Options, ["--config", str(arguments.config), "--model", path], "python_docs")
    model = open_model(options, reporter)
    manifest = build_data(model, arguments, path, reporter)
    _same_settings(out, model, options, manifest)

    def scores(directory: Path, adapter: Callable[[], Adapter | None]) -> dict[str, Any]:
        return _once(directory / "scores.json", lambda: _evaluate(model, adapter(), out, directory, reporter))

    def trained(seed: int) -> Adapter:
        directory = out / f"seed-{seed}" / "run"
        _train(model, options, seed, out, directory, reporter)
        return jora.load_adapter(directory / "adapter", model)  # what was written, not what is in memory

    base = scores(out / "base", lambda: None)
    tuned: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        reporter.note(f"seed {seed}")
        tuned[seed] = scores(out / f"seed-{seed}", partial(trained, seed))
        report = table(base, tuned)
        _write(out / "results.json", _json({"base": base, "seeds": tuned, "spread": spread(tuned)}))
        _write(out / "results.md", report)
    return report


def build_data(model: jora.Model, arguments: argparse.Namespace, path: str, reporter: Reporter) -> dict[str, Any]:
    """Documents, questions and the RAFT set; takes seconds and gives the same bytes, so it is done every time."""
    inputs, limit = arguments.out / "inputs", arguments.limit
    for split in ("train", "heldout"):
        counts = python_docs.write_inputs(inputs, split)
        reporter.note(f"{split}: {counts.resolved} of {counts.asked} questions have their quote in this Python's docs")
    words = ["--config", str(arguments.raft_config), "--model", path]
    options = read_options(raft_build_command.Options, words, "python_docs").raft
    built = raft.build_raft(
        read_documents(inputs / python_docs.DOCUMENTS_FILE),
        read_questions(inputs / python_docs.questions_file("train"))[:limit],
        model.tokenizer,
        options,
        read_questions(inputs / python_docs.questions_file("heldout"))[:limit],
    )
    raft.write(built, arguments.out / "data")
    for line in raft.report(built):
        reporter.note(line)
    return built.manifest


def _same_settings(out: Path, model: jora.Model, options: train_command.Options, manifest: dict[str, Any]) -> None:
    """Refuse to mix results of different runs in one directory."""
    training = dataclasses.asdict(options.training)
    for name in ("seed", "save_every", "keep_checkpoints", "log_every", "resume"):
        del training[name]
    now = {
        "base": model.identity["fingerprint"],
        "method": {"name": options.method, **dataclasses.asdict(options.method_options)},
        "training": training,
        "data": manifest["inputs"] | manifest["options"],
        "questions": [manifest[part]["examples"] for part in ("train", "eval")],
    }
    then = json.loads(_once_text(out / "settings.json", lambda: _json(now)))
    for name, value in json.loads(_json(now)).items():
        if then.get(name) != value:
            raise jora.InputError(f"{out} holds results of another run ({name} differs): give another --out")


def _train(
    model: jora.Model, options: train_command.Options, seed: int, out: Path, directory: Path, reporter: Reporter
) -> None:
    if (directory / "adapter").is_dir():  # it appears when it is whole
        reporter.note(f"seed {seed} is trained already: {directory / 'adapter'}")
        return
    begun = (directory / "config.yaml").exists()
    training = dataclasses.replace(options.training, seed=seed, resume=begun)
    jora.train(
        model, options.build_method(), out / "data" / "train.jsonl", out=directory, options=training, reporter=reporter
    )


def _evaluate(
    model: jora.Model, adapter: Adapter | None, out: Path, directory: Path, reporter: Reporter
) -> dict[str, Any]:
    result = jora.evaluate(
        model,
        out / "data" / "eval.jsonl",
        adapter,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=4,
        out=directory / "answers.jsonl",
        reporter=reporter,
    )
    return result.metrics()


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier call wrote to `path`, or what `make` gives now."""
    return json.loads(_once_text(path, lambda: _json(make())))


def _once_text(path: Path, make: Callable[[], str]) -> str:
    if not path.exists():
        _write(path, make())
    return path.read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def spread(tuned: dict[int, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation (None for one seed) over the seeds; what a seed lacks is left out."""
    found = {}
    for name in METRICS:
        values = [scores[name] for scores in tuned.values()]
        if None not in values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            found[name] = {"mean": statistics.fmean(values), "deviation": deviation}
    return found


def table(base: dict[str, Any], tuned: dict[int, dict[str, Any]]) -> str:
    """Base, mean ± standard deviation, and each seed, as a Markdown table."""
    means = spread(tuned)
    header = ["", "base", "tuned, mean ± deviation", *(f"seed {seed}" for seed in tuned)]
    lines = [f"{base['examples']} held-out questions", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for name, label in METRICS.items():
        cells = [_cell(name, scores[name]) for scores in (base, *tuned.values())]
        lines.append(_line([label, cells[0], _mean_cell(name, means.get(name)), *cells[1:]]))
    return "\n".join(lines) + "\n"


def _mean_cell(name: str, found: dict[str, float | None] | None) -> str:
    if found is None:
        return "-"
    mean, deviation = _cell(name, found["mean"]), found["deviation"]
    return mean if deviation is None else f"{mean} ± {_cell(name, deviation)}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "none quoted"
    return f"{value:.3f}" if name == "loss" else f"{100 * value:.1f} %"


if __name__ == "__main__":
    main()
