"""`jora serve`."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jora.cli.checks import check_names, check_there
from jora.cli.common import ModelOptions, open_model
from jora.errors import InputError
from jora.reporting import Reporter
from jora.serve.options import EngineOptions

if TYPE_CHECKING:
    from jora.models.model import Model
    from jora.serve.async_engine import AsyncEngine
    from jora.serve.http.auth import Keys
    from jora.serve.http.backend import Backend
    from jora.serve.http.documents import Retriever
    from jora.serve.http.server import Server
    from jora.serve.memory import Memory
    from jora.serve.ray.wire import Facts
    from jora.serve.text.grammar import Grammars

DEMO = "demo"  # a directory of that name is ./demo
DEMO_RUN = Path("jora-demo") / "run"
GB = 10**9
SHOWN = 8  # names of adapters at start


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Serve a base model and a directory of adapters through OpenAI's API; by default what `jora demo` made."""

    model: str = DEMO
    """A Hugging Face model directory, a hub id, or a .gguf file; `demo` is the demo's model."""
    adapters: str | None = None
    """A directory of adapters, each named by its path in there; it may grow while the server runs."""
    served_model_name: str | None = None
    """What clients call the base; by default the last part of its path."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes one that is free."""
    keys: str | None = None
    """A YAML file of API keys with their clients, weights, rates and adapters; without it nobody needs a key."""
    documents: str | None = None
    """An index of `jora index`, or documents: chat is answered from them, with citations."""
    allow_adapter_loading: bool = False
    """Let clients load and unload adapters (POST /v1/load_lora_adapter) from within the adapters' directory."""
    pool_gb: float | None = None
    """Size of the page pool in GB over all devices; by default what is free."""
    max_length: int | None = EngineOptions.max_length
    """Most tokens of prompt and answer; by default the model's positions."""
    max_batch: int = EngineOptions.max_batch
    """Most sequences that decode together."""
    chunk: int = EngineOptions.chunk
    """Most prompt tokens of one step."""
    page_tokens: int = EngineOptions.page_tokens
    """Tokens that a page of the cache holds."""
    rank_buckets: tuple[int, ...] = EngineOptions.rank_buckets
    """Total ranks of the adapters that run together, a program each; the largest is the limit."""
    product_buckets: tuple[int, ...] | None = EngineOptions.product_buckets
    """The same for the base products of DoRA, IA3 and fLoRA adapters; by default what those at start need, or none."""
    targets: tuple[str, ...] | None = EngineOptions.targets
    """Linears that adapters may change; by default those that an adapter changes at start, or all."""
    soft_tokens: int | None = EngineOptions.soft_tokens
    """Most soft tokens of an adapter (LoPA, prompt tuning); by default what those at start have."""
    encoders: tuple[str, ...] = ()
    """Directories or hub ids of encoders that adapters may use for their prompts (LoPA, IDPG), as they name them."""
    scheduler: Literal["vtc", "fcfs"] = "vtc"
    """vtc shares the devices between clients by their weights; fcfs is first come, first served."""
    optimistic: bool = EngineOptions.optimistic
    """Admit by what requests need now, and put some back when the pool is full."""
    prefix_cache: bool = EngineOptions.prefix_cache
    """Keep the pages of prompts for requests that begin alike."""
    cluster: int = EngineOptions.cluster
    """Prefer requests of running adapters once so many adapters run; 0 is off."""
    slo: float | None = EngineOptions.slo
    """Seconds to the first token after which a request that cannot make it is given up."""
    max_queue: int = EngineOptions.max_queue
    """Waiting requests before new ones are answered with 429."""
    host_adapters_gb: float = EngineOptions.host_adapters_bytes / GB
    """Most GB of adapters in host memory."""
    drain_seconds: float = 30.0
    """After SIGTERM, seconds for running requests to finish."""
    ray: bool = False
    """Run the engine in processes of Ray Serve (docs/scale-out.md): here, or on the cluster of RAY_ADDRESS."""
    replicas: int = 1
    """With --ray: engines, each with the accelerators of --mesh."""


def run(options: Options, reporter: Reporter) -> None:
    """Load, warm up, say what is served, serve."""
    from jora.serve.http.auth import Keys
    from jora.serve.http.run import address_of, listen, serve
    from jora.serve.text.grammar import Grammars

    if options.replicas < 1 or (options.replicas > 1 and not options.ray):
        raise InputError(f"--replicas {options.replicas}: a number from 1, together with --ray")
    options = with_demo(options, reporter)
    check_names(options.model, None)
    if options.adapters is not None:
        check_there("--adapters", options.adapters, directory=True)
    if options.documents is not None:
        check_there("--documents", options.documents)
    keys = Keys.load(options.keys, reporter)
    engine_options = engine_options_of(options, keys.weights)
    if options.keys is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        reporter.note(f"warning: anybody who reaches {options.host} can use this server; --keys FILE names who may")
    with listen(options.host, options.port) as bound:  # before the weights: a port in use should be known at once
        if options.ray:
            from jora.cli.serve_ray import serve_replicas

            return serve_replicas(options, engine_options, keys, bound, reporter)
        model = open_model(options, reporter)
        retriever = None if options.documents is None else open_retriever(options.documents, model.tokenizer, reporter)
        engine, memory = start_engine(model, options, engine_options, reporter)
        facts = facts_of(engine, model, memory)
        grammars = Grammars(model.tokenizer, facts.vocab_size, facts.ends)
        server = make_server(options, facts, model.tokenizer, grammars, engine, keys, retriever)
        names = [info.name for info in engine.engine.adapters()]
        print("\n".join(told(server, names, memory, address_of(bound))), flush=True)
        from jora.serve.http.app import create_app

        app = create_app(server)
        serve(app, server, bound, drain=engine.drain, drain_seconds=options.drain_seconds, reporter=reporter)
        engine.stop()


def with_demo(options: Options, reporter: Reporter) -> Options:
    """The options with the demo's model and, where no directory is given, its adapter.

    Raises:
        InputError: there is no demo here.
    """
    if options.model != DEMO:
        return options
    if options.adapters is None and not (DEMO_RUN / "adapter").is_dir():
        raise InputError(f"jora serve: give --model, or run `jora demo` here first: {DEMO_RUN}/adapter is not there")
    from jora.demo.run import prepare_model

    return dataclasses.replace(options, model=str(prepare_model(reporter)), adapters=options.adapters or str(DEMO_RUN))


def engine_options_of(options: Options, weights: Mapping[str, float]) -> EngineOptions:
    """The engine's part of the options. weights: of the clients."""
    alike = {field.name for field in dataclasses.fields(EngineOptions)}
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in alike}
    return EngineOptions(
        **given,
        weights=dict(weights),
        pool_bytes=None if options.pool_gb is None else int(options.pool_gb * GB),
        host_adapters_bytes=int(options.host_adapters_gb * GB),
    )


def open_retriever(documents: str, tokenizer: Any, reporter: Reporter) -> Retriever:
    """What answers chat from an index, or from documents that are indexed now."""
    from jora.data.index import open_index
    from jora.serve.http.documents import Retriever

    index = open_index(documents, tokenizer)
    reporter.note(f"{documents}: {len(index.chunks)} chunks of {len(index.sources)} documents")
    return Retriever(index, tokenizer)


def start_engine(
    model: Model, options: Options, engine_options: EngineOptions, reporter: Reporter
) -> tuple[AsyncEngine, Memory]:
    """The engine, warm and running, and what it does with the memory."""
    from jora.serve import memory
    from jora.serve.adapters.catalogue import Catalogue
    from jora.serve.adapters.needs import fitted
    from jora.serve.async_engine import AsyncEngine
    from jora.serve.engine import Engine

    directory = None if options.adapters is None else Path(options.adapters).expanduser()
    catalogue = Catalogue(directory, model.config, model.identity, encoders=options.encoders)
    adapters = catalogue.infos(lambda name, error: reporter.note(f"warning: {error}"))
    engine_options = memory.with_pool(model, fitted(engine_options, adapters))
    planned = memory.plan(model, engine_options)
    engine = Engine(model, engine_options, catalogue)
    if engine.max_length < (asked := engine_options.longest(model.config.max_positions)):
        reporter.note(
            f"warning: the page pool holds sequences of {engine.max_length} tokens at most, not {asked}, and beside an "
            "adapter fewer; --pool-gb makes it larger"
        )
    engine.warm_up(reporter)
    # What starting has made stays: without this the collector looks through it in the middle of a step (150 ms seen).
    gc.collect()
    gc.freeze()
    running = AsyncEngine(engine)
    running.start()
    return running, planned


def facts_of(engine: AsyncEngine, model: Model, memory: Memory) -> Facts:
    """What the app needs to know of the model."""
    from jora.data.chat import Template
    from jora.inference.ends import end_tokens
    from jora.serve.ray.wire import Facts

    return Facts(
        engine.engine.max_length, model.config.vocab_size, end_tokens(model, Template(model.tokenizer)), memory
    )


def make_server(
    options: Options,
    facts: Facts,
    tokenizer: Any,
    grammars: Grammars,
    backend: Backend,
    keys: Keys,
    retriever: Retriever | None,
) -> Server:
    """What the app serves."""
    from jora.serve.http.server import Server
    from jora.serve.http.tokens import Text

    return Server(
        backend=backend,
        text=Text(tokenizer, facts.max_length, facts.vocab_size),
        grammars=grammars,
        model=options.served_model_name or Path(options.model).name,
        keys=keys,
        retriever=retriever,
        adapters=None if options.adapters is None else Path(options.adapters).expanduser(),
        allow_adapter_loading=options.allow_adapter_loading,
        ready=True,  # the engine is warm before the port answers
    )


def told(server: Server, adapters: Sequence[str], memory: Memory, address: str) -> list[str]:
    """What is served, where, with how much memory, and how to ask it."""
    from jora.ui.facts import size

    names = ", ".join(adapters[:SHOWN]) + (", ..." if len(adapters) > SHOWN else "")
    count = "no adapters yet" if not adapters else f"{len(adapters)} adapter{'s' * (len(adapters) > 1)}: {names}"
    body = {"model": adapters[0] if adapters else server.model, "messages": [{"role": "user", "content": "Hello"}]}
    header = ' -H "Authorization: Bearer $KEY"' if server.keys.required else ""
    return [
        f"serving   {server.model}, {count}",
        f"at        {address}/v1",
        "memory    " + ", ".join(f"{name} {size(count)}" for name, count in memory.parts().items()) + " (a device)",
        f"try       curl {address}/v1/chat/completions -H 'Content-Type: application/json'{header} \\\n"
        f"            -d '{json.dumps(body)}'",
    ]
