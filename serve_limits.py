"""What keeps the server within its means: its settings, keys, rates, places. Standard library only; knows no HTTP and no model.

Everything that a stranger can make grow has a number here: bytes, seconds, characters, sessions, turns, requests per minute.
"""
from __future__ import annotations

import hmac
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the server; each is a flag of serve.py. ValueError names the flag to change."""
    host: str = "127.0.0.1"
    port: int = 8000
    key_env: str = "SERVE_API_KEY"         # environment variable that holds the key; where it is empty, no key is asked for
    open_to_all: bool = False              # listen beyond loopback without a key
    allow_origin: str = ""                 # web pages of these origins may call (comma separated); the server's own page always may
    allow_host: str = ""                   # names under which the server may be called, besides its own (comma separated)
    max_sessions: int = 8                  # conversations and speaking requests at a time
    queue: int = 16                        # requests that may wait for a place
    queue_seconds: float = 10.0            # and for how long
    per_client: int = 8                    # places and waiting requests of one client together
    requests_per_minute: int = 240         # of one client
    idle_seconds: float = 300.0            # a conversation in which nothing happens is closed
    session_minutes: float = 120.0         # and a long one as well
    session_mb: float = 64.0               # memory that one conversation may hold besides the model's window
    max_body_mb: float = 12.0
    max_text: int = 4096                   # characters of one text
    max_audio_seconds: float = 60.0        # of one sound file
    max_voices: int = 4                    # uploaded in one conversation
    stall_seconds: float = 20.0            # a listener who takes nothing for so long is given up
    grace_seconds: float = 30.0            # for turns to finish at the end
    watermark: bool = False                # an inaudible mark in all that is said (watermark.py finds it); that it is synthetic stands in the metadata in any case

    def __post_init__(self):
        def require(good, message):
            if not good:
                raise ValueError(message)
        require(0 <= self.port <= 65535, f"port {self.port} is not in 0..65535: change --port")
        require(self.max_sessions >= 1, "max_sessions must be at least 1: change --max_sessions")
        require(self.queue >= 0 and self.per_client >= 1 and self.max_voices >= 0, "counts must not be negative: change --queue, --per_client or --max_voices")
        require(self.requests_per_minute >= 1, "requests_per_minute must be at least 1: change --requests_per_minute")
        require(min(self.queue_seconds, self.idle_seconds, self.session_minutes, self.session_mb, self.max_body_mb, self.stall_seconds) > 0,
                "limits of time and memory must be positive: change --queue_seconds, --idle_seconds, --session_minutes, --session_mb, --max_body_mb or --stall_seconds")
        require(1 <= self.max_text <= 5000, "max_text must be 1..5000: change --max_text")
        require(0.5 <= self.max_audio_seconds <= 600, "max_audio_seconds must be 0.5..600: change --max_audio_seconds")
        require(self.grace_seconds >= 0, "grace_seconds must be at least 0: change --grace_seconds")

    @property
    def loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def origins(self) -> set[str]:
        return {o.strip().rstrip("/") for o in self.allow_origin.split(",") if o.strip()}

    @property
    def hosts(self) -> set[str]:
        """Names that a request may call this server by; empty: any (it listens beyond loopback and asks for a key)."""
        named = {h.strip().lower() for h in self.allow_host.split(",") if h.strip()}
        return named | set(LOOPBACK) if self.loopback or named else set()


class Refused(Exception):
    """A request that is turned away: HTTP status, a code, one line that names the fix, and when to come again (seconds)."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = None if retry_after is None else max(1, round(retry_after))


# ----------------------------------------------------------------------------- who may

def same_key(given: str, key: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), key.encode("utf-8"))


def bearer(header: str) -> str:
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def host_allowed(host: str, cfg: ServeConfig) -> bool:
    """Against pages that make a browser call loopback under a name of their own."""
    return not cfg.hosts or (urlsplit("//" + host).hostname or "").lower() in cfg.hosts


def origin_allowed(origin: str, host: str, cfg: ServeConfig) -> bool:
    """Whether a page of `origin` ("" where none was sent: no browser) may call the server that was called as `host`."""
    if not origin:
        return True
    return origin.rstrip("/") in cfg.origins or urlsplit(origin).netloc.lower() == host.lower()


# ----------------------------------------------------------------------------- how often

class Rates:
    """Token buckets, one per client: `per_minute` in a minute, up to a sixth of them at once (at least 10). At most `most` clients are remembered."""

    def __init__(self, per_minute: int, most: int = 10_000, clock=time.monotonic):
        self.per_second, self.size, self.most, self.clock = per_minute / 60, max(10.0, per_minute / 6), most, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()        # client -> (tokens, when)
        self._lock = threading.Lock()

    def take(self, client: str) -> None:
        """Refused (429) where the client's bucket is empty."""
        with self._lock:
            now = self.clock()
            tokens, when = self._buckets.pop(client, (self.size, now))
            tokens = min(self.size, tokens + (now - when) * self.per_second)
            self._buckets[client] = (tokens - (tokens >= 1), now)
            while len(self._buckets) > self.most:
                self._buckets.popitem(last=False)
        if tokens < 1:
            raise Refused(429, "rate_limited", "too many requests: wait, or have --requests_per_minute raised", (1 - tokens) / self.per_second)


# ----------------------------------------------------------------------------- how many

class Places:
    """`max_sessions` places, a bounded queue in order of arrival before them, and a share for each client. Used within one event loop."""

    def __init__(self, cfg: ServeConfig):
        self.cfg, self.taken, self.closing = cfg, 0, False
        self._queue: OrderedDict[object, tuple] = OrderedDict()
        self._clients: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self, client: str, wait: bool = True) -> None:
        """Returns with a place taken. Refused: 429 for too many of one client, 503 where the queue is full, too slow, or the server closes."""
        import asyncio
        if self.closing:
            raise Refused(503, "closing", "the server is shutting down: try again later", self.cfg.grace_seconds)
        if self._clients.get(client, 0) >= self.cfg.per_client:
            raise Refused(429, "too_many_at_once", f"{self.cfg.per_client} requests of yours are being served: wait for one to end", 2)
        free = self.taken < self.cfg.max_sessions and not self._queue
        if not free and (not wait or len(self._queue) >= self.cfg.queue):
            raise Refused(503, "full", "all places are taken: try again", self.cfg.queue_seconds)
        self._clients[client] = self._clients.get(client, 0) + 1
        if free:
            self.taken += 1
            return
        ticket = asyncio.get_running_loop().create_future()
        self._queue[ticket] = client
        try:
            await asyncio.wait_for(asyncio.shield(ticket), self.cfg.queue_seconds)
        except BaseException as error:
            self._queue.pop(ticket, None)
            if ticket.done() and not ticket.cancelled():
                self.leave(client)                       # the place came at the same moment
            else:
                self._forget(client)
            if isinstance(error, asyncio.TimeoutError):
                raise Refused(503, "full", "no place became free: try again", self.cfg.queue_seconds) from None
            raise

    def leave(self, client: str) -> None:
        self.taken -= 1
        self._forget(client)
        while self._queue and self.taken < self.cfg.max_sessions:
            ticket, _ = self._queue.popitem(last=False)
            if not ticket.done():
                self.taken += 1
                ticket.set_result(True)

    def _forget(self, client: str) -> None:
        self._clients[client] = self._clients.get(client, 1) - 1
        if self._clients[client] <= 0:
            self._clients.pop(client, None)
