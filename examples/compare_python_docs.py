"""The data of `compare_python_docs.yaml`: questions on Python's documentation, in prompts of up to 512 tokens.

    python examples/compare_python_docs.py       # writes python-docs-compare/data/
    jora compare examples/compare_python_docs.yaml --out python-docs-compare/results

The first takes seconds, the second about an hour on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jora
from jora.demo.run import build_data, prepare_model
from jora.ui.progress import reporter_for


def main(argv: Sequence[str] | None = None) -> None:
    """Write the documents, the questions and the data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("python-docs-compare"), help="directory for the data")
    parser.add_argument("--limit", type=int, default=64, help="questions for training, and at most for evaluation")
    parser.add_argument("--model", type=Path, help="a model directory; by default the demo's Gemma 3 270M")
    arguments = parser.parse_args(argv)
    with reporter_for(sys.stderr) as reporter:
        model = jora.load_model(arguments.model or prepare_model(reporter), reporter=reporter)
        build_data(model, arguments.out / "inputs", arguments.out / "data", arguments.limit, reporter)


if __name__ == "__main__":
    main()
