"""One set of adapters, references and compiled programs for all tests of the whole engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import jax
import pytest
from tests.serve.bases import base, randomised
from tests.serve.engines import ADAPTERS, Reference, serving

import jora
from jora.serve.engine import Engine


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """As for all tests, but modules that share the engine's programs leave them to the next."""
    yield
    if not Path(request.path).name.startswith(("test_engine", "test_async_engine")):
        jax.clear_caches()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all `ADAPTERS`; not to be changed."""
    directory = tmp_path_factory.mktemp("shelf")
    for seed, (name, method) in enumerate(ADAPTERS.items()):
        jora.save_adapter(randomised(method, base(), seed, 0.5), directory / name)
    return directory


@pytest.fixture(scope="session")
def reference(shelf: Path) -> Reference:
    return Reference(shelf)


@pytest.fixture(scope="module")  # modules of others may have come between, and cleared what was compiled
def warm(shelf: Path) -> None:
    """Engines of `serving` compile nothing from here on."""
    with serving(shelf) as engine:
        engine.warm_up()


@pytest.fixture
def engine_of(warm: None, shelf: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines of the shelf; options as for `serving`."""
    with ExitStack() as stack:
        yield lambda directory=shelf, **options: stack.enter_context(serving(directory, **options))


@pytest.fixture
def engine(engine_of: Callable[..., Engine]) -> Engine:
    """One that no other test has used."""
    return engine_of()
