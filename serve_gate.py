"""What stands before every route of the server: its state, metrics, plain errors, and the gate through which requests come. Knows no route."""
from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.exceptions import HTTPException

from serve_limits import Places, Rates, Refused, bearer, host_allowed, origin_allowed, same_key
from service import Service

OPEN = ("/", "/health", "/ready", "/favicon.ico", "/docs", "/openapi.json")          # without a key, as everything under /static/ and /docs/
POLICY = 1008                      # WebSocket close code
SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
        "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; connect-src 'self' ws: wss:; worker-src 'self' blob:; frame-ancestors 'none'"}
log = logging.getLogger("serve")


class Metrics:
    """What Prometheus reads at /metrics."""

    def __init__(self, house: "House"):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("serve_requests", "requests by route and status", ["route", "status"], registry=registry)
        self.refused = Counter("serve_refused", "requests and conversations turned away", ["code"], registry=registry)
        self.first_audio = Histogram("serve_first_audio_seconds", "from the request, or the end of the user's turn, to the first sound", ["kind"], registry=registry,
                                     buckets=(.05, .1, .15, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10))
        self.spoken = Counter("serve_spoken_seconds", "sound sent", registry=registry)
        self.underruns = Counter("serve_underruns", "pieces of replies that came when all before them had been played", registry=registry)
        self.interrupted = Counter("serve_interruptions", "replies that were interrupted", registry=registry)
        for name, words, value in (("sessions", "places taken", lambda: house.places.taken), ("waiting", "requests in the queue", lambda: house.places.waiting),
                                   ("frames", "frames made since the start", lambda: house.service.engine.stats()["frames"]),
                                   ("asr_seconds", "time spent writing down", lambda: house.service.ears.seconds)):
            Gauge("serve_" + name, words, registry=registry).set_function(value)


class House:
    """The state of one application."""

    def __init__(self, service: Service, key: str):
        self.service, self.cfg, self.key = service, service.cfg, key
        self.places, self.rates, self.ready = Places(self.cfg), Rates(self.cfg.requests_per_minute), True
        self.threads = ThreadPoolExecutor(3 * self.cfg.max_sessions + 4, "serve")
        self.conversations: set = set()
        self.metrics = Metrics(self)

    async def run(self, work, *arguments):
        """In a thread: the event loop never computes."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def close_doors(self) -> None:
        """No new work; what goes on may end."""
        self.ready, self.places.closing = False, True

    @property
    def busy(self) -> bool:
        """Whether somebody still has a place. When the doors are closed, conversations leave as soon as their reply was heard."""
        return self.places.taken > 0


# ----------------------------------------------------------------------------- errors

def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict:
    plain = " ".join(str(message).encode("utf-8", "replace").decode().split())[:500]
    return {"error": {"message": plain, "type": kind, "code": code, "param": param}}


def refusal(error: Refused) -> JSONResponse:
    kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}.get(error.status, "invalid_request_error")
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error.message, kind, error.code), error.status, headers)


def one_line(errors) -> tuple[str, str]:
    """pydantic's errors -> (message of the first, where it is)."""
    first = errors[0]
    where = ".".join(str(step) for step in first["loc"] if step != "body") or "body"
    return f"{where}: {first['msg'].lower()}: see /openapi.json", where


def let_go(error: BaseException | None) -> None:
    """FastAPI's frame holds the error of a body that is no JSON, which holds the frame and with it the body: not until the collector of cycles comes by."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__ or error.__context__


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request, error):
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        let_go(error)
        message, where = one_line(error.errors())
        return JSONResponse(error_body(message, "invalid_request_error", "invalid", where), 422)

    @app.exception_handler(ValueError)
    async def unfit(request, error):
        return JSONResponse(error_body(error, "invalid_request_error", "invalid"), 400)

    @app.exception_handler(HTTPException)
    async def http(request, error):
        let_go(error)
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code, "invalid")
        return JSONResponse(error_body(error.detail, "invalid_request_error", code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request, error):
        log.exception("a request failed")
        return JSONResponse(error_body("this request failed inside the server: try again", "server_error", "internal"), 500)


# ----------------------------------------------------------------------------- the gate

class Gate:
    """Before every request: host, origin, key, rate, and the size of what comes in. Pure ASGI, so that nothing is buffered."""

    def __init__(self, app, house: House):
        self.app, self.house = app, house

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status = {"status": 0}

        async def sending(message):
            if message["type"] == "http.response.start":
                status["status"] = message["status"]
                message["headers"] = [*message.get("headers", []), *((k.lower().encode(), v.encode()) for k, v in SAFE.items())]
            await send(message)
        try:
            self._check(scope, headers)
            await self.app(scope, self._measured(receive) if scope["type"] == "http" else receive, sending if scope["type"] == "http" else send)
        except Refused as error:
            self.house.metrics.refused.labels(error.code).inc()
            if scope["type"] == "websocket":
                return await self._refuse_socket(receive, send)
            await refusal(error)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.house.metrics.requests.labels(route, status["status"] or scope["type"]).inc()

    def _check(self, scope, headers: dict) -> None:
        cfg, path, host = self.house.cfg, scope["path"], headers.get("host", "")
        if not host_allowed(host, cfg):
            raise Refused(403, "host", "this server is not known by that name: call it as localhost, or start it with --allow_host")
        if not origin_allowed(headers.get("origin", ""), host, cfg):
            raise Refused(403, "origin", "pages of other origins may not call this server: start it with --allow_origin")
        client = client_of(scope)
        if scope["type"] == "http" and self.house.key and path not in OPEN and not path.startswith(("/static/", "/docs/")):
            if scope["method"] != "OPTIONS" and not same_key(bearer(headers.get("authorization", "")), self.house.key):
                self.house.rates.take(client)
                raise Refused(401, "key", "the key is missing or wrong: send Authorization: Bearer KEY")
        if path not in ("/health", "/ready", "/metrics"):
            self.house.rates.take(client)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most:
            raise Refused(413, "too_large", f"the body is larger than {self.house.cfg.max_body_mb:g} MB: send less")

    @property
    def _most(self) -> int:
        return int(1e6 * self.house.cfg.max_body_mb)

    def _measured(self, receive):
        """Counts the body, and does not wait for ever for the rest of it."""
        count, more = 0, True

        async def receiving():
            nonlocal count, more
            try:
                message = await asyncio.wait_for(receive(), self.house.cfg.stall_seconds if more else None)
            except asyncio.TimeoutError:
                raise HTTPException(408, "the rest of the body did not come: send it again") from None
            count += len(message.get("body", b""))
            more = message.get("more_body", False)
            if count > self._most:
                raise HTTPException(413, f"the body is larger than {self.house.cfg.max_body_mb:g} MB: send less")
            return message
        return receiving

    @staticmethod
    async def _refuse_socket(receive, send) -> None:
        await receive()                                          # websocket.connect
        await send({"type": "websocket.close", "code": POLICY})


def client_of(scope) -> str:
    return (scope.get("client") or ("unknown", 0))[0]


@contextlib.asynccontextmanager
async def place(house: House, client: str):
    await house.places.enter(client)
    try:
        yield
    finally:
        house.places.leave(client)
