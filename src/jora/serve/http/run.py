"""Running the app: the port, the signals, and a shutdown that loses no request.

SIGTERM or SIGINT: `/ready` and new requests are answered with 503 while running ones finish, within `drain_seconds`;
then the process goes on behind `serve`. A second one ends the process at once. SIGHUP reads the keys' file again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from jora.errors import InputError
from jora.reporting import Reporter
from jora.serve.http.server import Server

FLUSH_SECONDS = 5  # for responses to reach their clients after the engine is done with them
KEEP_ALIVE_SECONDS = 30


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; nobody can connect until `serve` listens on it. Port 0: one that is free.

    Raises:
        InputError: the port is in use, or the address is not this machine's.
    """
    where = f"--host {host} --port {port}"
    if not 0 <= port < 1 << 16:  # the look-up would take what is left of it modulo 65536
        raise InputError(f"{where}: a port is a number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        hint = "; stop what uses it, or give another --port" if error.errno == errno.EADDRINUSE else ""
        raise InputError(f"{where}: {error.strerror}{hint}") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """`http://host:port` of a bound socket, as a client on this machine can use it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def serve(
    app: ASGIApp,
    server: Server,
    bound: socket.socket,
    *,
    drain: Callable[[float], Awaitable[bool]],
    drain_seconds: float,
    reporter: Reporter,
) -> None:
    """Serve until a signal says to stop and running requests have ended.

    Args:
        app: from `create_app(server)`.
        bound: from `listen`.
        drain: wait so many seconds for what the engine runs; whether all of it ended.
        reporter: told of signals.
    """
    config = uvicorn.Config(
        app,
        log_config=None,  # the log is Python's own: warnings and tracebacks on stderr, no line a request
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    _Uvicorn(config, server, lambda: drained(server, drain, drain_seconds), reporter).run(sockets=[bound])


async def drained(server: Server, drain: Callable[[float], Awaitable[bool]], seconds: float) -> bool:
    """Wait until all that was let in has ended, at most so long; whether that came true. See `serve` for `drain`."""
    until = time.monotonic() + seconds
    while server.open and time.monotonic() < until:
        await asyncio.sleep(0.05)
    # Nothing comes after these: what the engine has now is the last of it.
    return not server.open and await drain(max(0.0, until - time.monotonic()))


class _Uvicorn(uvicorn.Server):
    """uvicorn with a drain before its shutdown, which closes the port first: then nobody could ask `/ready`."""

    def __init__(
        self, config: uvicorn.Config, server: Server, drain: Callable[[], Awaitable[bool]], reporter: Reporter
    ) -> None:
        super().__init__(config)
        self._server, self._drain, self._reporter = server, drain, reporter
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP"):
            self._loop.add_signal_handler(signal.SIGHUP, self._reload_keys)
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn makes the handler of SIGTERM and SIGINT."""
        if self._server.draining or self._loop is None:
            # At once: the engine's thread may be inside a device program, which nothing interrupts.
            sys.stdout.flush()
            os._exit(128 + sig)
        self._server.draining = True
        self._loop.call_soon_threadsafe(self._begin, signal.Signals(sig).name)

    def _begin(self, name: str) -> None:
        self._reporter.note(f"{name}: finishing what runs; once more to stop at once")
        self._draining = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        try:
            if not await self._drain():
                self._reporter.note("the time to finish is over; what still runs is cut off")
                self.config.timeout_graceful_shutdown = 1
        finally:
            self.should_exit = True

    def _reload_keys(self) -> None:
        try:
            self._server.keys.reload(self._reporter)
        except (InputError, OSError) as error:
            self._reporter.note(f"SIGHUP: {error}; the keys stay as they are")
        else:
            self._reporter.note("SIGHUP: keys read again")
