"""`jora serve --ray`: the HTTP app here, the engines in replicas under Ray Serve."""

from __future__ import annotations

import socket
import sys
from functools import partial

from jora.cli.common import open_model, open_tokenizer
from jora.cli.serve_command import Options, facts_of, make_server, open_retriever, start_engine, told
from jora.errors import InputError
from jora.reporting import Reporter
from jora.serve.http.app import create_app
from jora.serve.http.auth import Keys
from jora.serve.http.run import address_of, serve
from jora.serve.options import EngineOptions
from jora.serve.ray.wire import CheckedGrammars
from jora.serve.text.grammar import Grammars
from jora.ui.progress import PlainReporter

try:
    from jora.serve.ray import app as cluster
    from jora.serve.ray.backend import Replicas
    from jora.serve.ray.metrics import ReplicaCollector
    from jora.serve.ray.replica import Started
except ModuleNotFoundError as error:
    if error.name != "ray":
        raise
    raise InputError("--ray needs Ray Serve: pip install 'jora[ray]'") from None


def serve_replicas(
    options: Options, engine_options: EngineOptions, keys: Keys, bound: socket.socket, reporter: Reporter
) -> None:
    """Start the replicas, say what is served, serve."""
    tokenizer = open_tokenizer(options.model)
    retriever = None if options.documents is None else open_retriever(options.documents, tokenizer, reporter)
    reporter.note(f"starting {options.replicas} replicas")
    start, batch, queue = partial(_start, options, engine_options), options.max_batch, options.max_queue
    with cluster.replicas(start, options.replicas, mesh=options.mesh, batch=batch, queue=queue) as handle:
        facts = handle.facts.remote().result()
        adapters = [info.name for info in handle.adapters.remote({}).result()]
        backend = Replicas(handle)
        grammars = CheckedGrammars(tokenizer, facts.vocab_size, facts.ends)
        server = make_server(options, facts, tokenizer, grammars, backend, keys, retriever)
        server.metrics.registry.register(ReplicaCollector(lambda: backend.statuses))
        lines = told(server, adapters, facts.memory, address_of(bound))
        print("\n".join([*lines[:2], f"replicas  {options.replicas}, each:", *lines[2:]]), flush=True)
        drain = backend.drain
        serve(create_app(server), server, bound, drain=drain, drain_seconds=options.drain_seconds, reporter=reporter)


def _start(options: Options, engine_options: EngineOptions) -> Started:
    """Runs in the process of a replica."""
    reporter = PlainReporter(sys.stderr)  # Ray shows it where the server runs
    model = open_model(options, reporter)
    engine, memory = start_engine(model, options, engine_options, reporter)
    facts = facts_of(engine, model, memory)
    return Started(engine, Grammars(model.tokenizer, facts.vocab_size, facts.ends), facts)
