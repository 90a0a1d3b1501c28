"""`jora.train` can be called, whatever was imported before it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = "assert callable(jora.train) and jora.train.TrainOptions(epochs=2).epochs == 2"


@pytest.mark.parametrize(
    "imports",
    [
        "import jora",
        "import jora; jora.train",
        "import jora.train.options; import jora",
        "import jora; jora.train; import jora.train.options",
        "import jora; from jora.train import train; assert train is jora.train",
    ],
)
def test_package_and_function_are_one(imports: str) -> None:
    # A process of its own: here everything is imported already.
    subprocess.run([sys.executable, "-c", f"{imports}; {CHECK}"], check=True)


def test_the_call_arrives() -> None:
    import jora

    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'out'"):
        jora.train(None, None, [])
