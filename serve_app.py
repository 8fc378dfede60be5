"""The HTTP and WebSocket side of the server: routes, keys, limits, errors, metrics. What is said and heard is service.py's.

    app = make_app(service, key="...")            # an ASGI application; serve.py runs it on uvicorn

The order of a request: host and origin, key, rate, size of the body, a place (or the queue), the work in a thread of its own,
and back in pieces. Nothing of a request is ever opened as a path, unpickled, or put into a shell.
"""
from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import importlib.util
import json
import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import serve_schemas as schemas
from audio_io import SAMPLE_RATE
from live import Closed
from runtime import ROOT
from serve_limits import Places, Rates, Refused, bearer, host_allowed, origin_allowed, same_key
from service import Service, mood_of
from speech_formats import MEDIA, Encoder, decode, from_pcm, wav_header
from watermark import AI_TAGS, wav_info

OPEN = ("/", "/health", "/ready", "/favicon.ico", "/docs", "/openapi.json")          # without a key, as everything under /static/ and /docs/
START_SECONDS = 10.0               # for the first message of a conversation, the key included
AHEAD_SECONDS = 5.0                # sound may arrive so much faster than it was spoken
OUTGOING = 64                      # pieces of sound (80 ms each) that may wait for a slow listener
EVENTS = 1000                      # other events that may
CLOSING, NOT_NOW, POLICY, TOO_LARGE = 1012, 1013, 1008, 1009
SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
        "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; connect-src 'self' ws: wss:; worker-src 'self' blob:; frame-ancestors 'none'"}
DOCS = ('<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Routes of this server</title><link rel="stylesheet" href="/docs/swagger-ui.css"></head>'
        '<body><div id="swagger-ui"></div><script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></body></html>')
DOCS_START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui"});'
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


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request, error):
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        message, where = one_line(error.errors())
        return JSONResponse(error_body(message, "invalid_request_error", "invalid", where), 422)

    @app.exception_handler(ValueError)
    async def unfit(request, error):
        return JSONResponse(error_body(error, "invalid_request_error", "invalid"), 400)

    @app.exception_handler(HTTPException)
    async def http(request, error):
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


# ----------------------------------------------------------------------------- speech over HTTP

class SpeechResponse(Response):
    """Sound in pieces while it is made. Holds a place from before the first piece until the end, whoever ends it."""

    def __init__(self, house: House, spoken, form: str, client: str, sse: bool = False):
        super().__init__(media_type="text/event-stream" if sse else MEDIA[form], headers={"X-Synthetic-Speech": "true"})
        self.house, self.spoken, self.form, self.client, self.sse = house, spoken, form, client, sse
        self.stop, self.first, self.samples = threading.Event(), None, 0

    async def __call__(self, scope, receive, send) -> None:
        queue: asyncio.Queue = asyncio.Queue(OUTGOING)
        await self.house.places.enter(self.client)
        try:
            maker = asyncio.ensure_future(self.house.run(self._make, queue, asyncio.get_running_loop()))
            watcher = asyncio.ensure_future(self._watch(receive))
            try:
                await self._send_all(queue, maker, scope, receive, send)
            finally:
                self.stop.set()
                watcher.cancel()
                while not maker.done():                          # its last piece may wait for room in the queue
                    with contextlib.suppress(asyncio.QueueEmpty):
                        queue.get_nowait()
                    await asyncio.wait([maker], timeout=0.05)
        finally:
            self.house.places.leave(self.client)

    async def _watch(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stop.set()

    def _make(self, queue: asyncio.Queue, loop) -> None:
        """In a thread: pieces of sound to bytes, into the queue; None at the end, an exception where it broke."""
        def put(item) -> bool:
            future = asyncio.run_coroutine_threadsafe(queue.put(item), loop)
            while not self.stop.is_set():
                with contextlib.suppress(TimeoutError):
                    future.result(0.2)
                    return True
            future.cancel()
            return False
        encoder = open_encoder(self.form)
        try:
            for piece in self.spoken.pieces:
                if self.first is None:
                    self.first = time.perf_counter() - self.spoken.started
                    self.house.metrics.first_audio.labels("request").observe(self.first)
                self.samples += len(piece)
                self.house.metrics.spoken.inc(len(piece) / SAMPLE_RATE)
                data = encoder.feed(piece)
                if self.stop.is_set() or (data and not put(data)):
                    return
            put(encoder.finish())
            put(None)
        except Exception as error:
            put(error)
        finally:
            self.spoken.pieces.close()
            encoder.close()

    async def _send_all(self, queue, maker, scope, receive, send) -> None:
        item = await queue.get()
        if isinstance(item, Exception):
            return await self._fail(item, scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": [(k, v) for k, v in self.raw_headers if k != b"content-length"]})
        while item is not None and not self.stop.is_set():
            if isinstance(item, Exception):
                log.error("speech broke off: %s", item)
                raise item                                       # the connection is cut: a whole file must not be believed
            await asyncio.wait_for(send({"type": "http.response.body", "body": self._wrap(item), "more_body": True}), self.house.cfg.stall_seconds)
            item = await self._next(queue)
        if not self.stop.is_set():
            done = b'data: {"type": "speech.audio.done"}\n\n' if self.sse else b""
            await send({"type": "http.response.body", "body": done, "more_body": False})

    async def _next(self, queue):
        while not self.stop.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(queue.get(), 0.5)
        return None

    def _wrap(self, data: bytes) -> bytes:
        if not self.sse:
            return data
        return b"data: " + json.dumps({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()}).encode() + b"\n\n"

    async def _fail(self, error, scope, receive, send) -> None:
        if isinstance(error, Refused):
            return await refusal(error)(scope, receive, send)
        if isinstance(error, ValueError):
            return await JSONResponse(error_body(error, "invalid_request_error", "invalid"), 400)(scope, receive, send)
        log.error("speech failed", exc_info=error)
        await JSONResponse(error_body("this request failed inside the server: try again", "server_error", "internal"), 500)(scope, receive, send)


def open_encoder(form: str) -> Encoder:
    """What comes out says of itself that it is synthetic."""
    return Encoder(form, tags=AI_TAGS, wav_info=wav_info())


def from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.split(",", 1)[1] if text.startswith("data:") and "," in text else text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the recording is not base64: encode the bytes of a sound file") from None


def collect(house: House, spoken, form: str) -> tuple[bytes, int, float | None]:
    """Everything at once: file, samples, milliseconds to the first sound."""
    encoder, data, samples, first = open_encoder(form), b"", 0, None
    try:
        for piece in spoken.pieces:
            if first is None:
                first = 1000 * (time.perf_counter() - spoken.started)
                house.metrics.first_audio.labels("request").observe(first / 1000)
            samples += len(piece)
            data += encoder.feed(piece)
        data += encoder.finish()
        if form == "wav":                                        # now the length is known
            data = wav_header(samples=samples, more=wav_info()) + data[len(wav_header(more=wav_info())):]
        return data, samples, first
    finally:
        encoder.close()
        house.metrics.spoken.inc(samples / SAMPLE_RATE)


@contextlib.asynccontextmanager
async def place(house: House, client: str):
    await house.places.enter(client)
    try:
        yield
    finally:
        house.places.leave(client)


# ----------------------------------------------------------------------------- routes

ERRORS = {code: {"model": schemas.ErrorResponse} for code in (400, 401, 403, 404, 413, 422, 429, 503)}
SOUND = {200: {"description": "sound, in pieces as it is made", "content": {media: {"schema": {"type": "string", "format": "binary"}} for media in [*MEDIA.values(), "text/event-stream"]}}}
UPLOAD = {"requestBody": {"required": True, "content": {
    "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}


def add_speech(router: APIRouter, house: House) -> None:
    service = house.service

    @router.post("/v1/audio/speech", response_class=Response, responses=SOUND | ERRORS, summary="Speak a text (OpenAI's request)")
    async def speech(body: schemas.SpeechRequest, request: Request):
        service.check_model(body.model)
        if body.speed != 1:
            raise Refused(400, "speed", "only speed 1 is spoken: leave speed out")
        spoken = service.speak(body.input, body.voice, mood=mood_of(body.instructions))
        return SpeechResponse(house, spoken, body.response_format, client_of(request.scope), body.stream_format == "sse")

    @router.post("/generate", responses={200: {"model": schemas.GenerateResponse, "content": SOUND[200]["content"]}} | ERRORS, summary="Speak a text, or answer it")
    async def generate(body: schemas.GenerateRequest, request: Request):
        client, voice = client_of(request.scope), body.voice
        service.check_text(body.text)
        if body.voice_prompt:
            async with place(house, client):
                voice = await house.run(service.read_voice, from_base64(body.voice_prompt), body.voice_text)
        spoken = service.speak(body.text, voice, speaker=body.speaker, mood=body.mood, reply=body.reply, seed=body.seed, temperature=body.temperature)
        if body.streaming:
            return SpeechResponse(house, spoken, body.response_format, client)
        async with place(house, client):
            data, samples, first = await house.run(collect, house, spoken, body.response_format)
        return JSONResponse({"text": " ".join(spoken.words), "voice": base64.b64encode(data).decode(), "latency_ms": first and round(first, 1),
                             "duration_s": round(samples / SAMPLE_RATE, 3)})

    async def written(request: Request) -> dict:
        data = await sound_of(request)
        async with place(house, client_of(request.scope)):
            audio = await house.run(decode, data, house.cfg.max_audio_seconds)
            future = service.ears.submit(audio, SAMPLE_RATE)
            if future is None:
                raise Refused(503, "full", "too many recordings wait: try again", 5)
            return {"text": await asyncio.wrap_future(future), "duration_s": round(len(audio) / SAMPLE_RATE, 3)}

    @router.post("/transcribe", response_model=schemas.TranscribeResponse, responses=ERRORS, openapi_extra=UPLOAD, summary="Write down a recording (by the ASR, not the model)")
    async def transcribe(request: Request):
        return await written(request)

    @router.post("/v1/audio/transcriptions", response_model=schemas.TranscribeResponse, responses=ERRORS, openapi_extra=UPLOAD, summary="The same by OpenAI's name")
    async def transcriptions(request: Request):
        return await written(request)


async def sound_of(request: Request) -> bytes:
    """The uploaded file: a form's `file`, or the whole body."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        data = await request.body()
    else:
        async with request.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            data = await file.read() if hasattr(file, "read") else b""
    if not data:
        raise ValueError("no sound came: send it as the form's field `file`, or as the body")
    return data


def add_facts(router: APIRouter, house: House) -> None:
    service = house.service

    @router.get("/health", response_model=schemas.State, response_model_exclude_none=True)
    async def health():
        return {"status": "ok"}

    @router.get("/ready", response_model=schemas.State, responses={503: {"model": schemas.State}})
    async def ready():
        state = {"status": "ready" if house.ready else "closing", "model": service.model_name, "sessions": house.places.taken, "waiting": house.places.waiting}
        return state if house.ready else JSONResponse(state, 503, {"Retry-After": "5"})

    @router.get("/metrics", response_class=Response, responses={401: ERRORS[401]})
    async def metrics():
        return Response(generate_latest(house.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models", response_model=schemas.ModelsResponse, responses={401: ERRORS[401]})
    async def models():
        return {"object": "list", "data": [model_card()]}

    @router.get("/v1/models/{model}", response_model=schemas.ModelOut, responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(model: str):
        service.check_model(model)
        return model_card()

    def model_card() -> dict:
        return {"id": service.model_name, "object": "model", "created": service.started, "owned_by": "local"}

    @router.get("/v1/audio/voices", response_model=schemas.VoicesResponse, responses={401: ERRORS[401]})
    async def voices():
        return {"voices": [{"id": v.id, "name": v.id.capitalize(), "description": v.description} for v in service.voices.values()]}


def files_below(folder: Path) -> dict[str, Path]:
    """Name within the folder -> file, listed once: what a request names is looked up here and never opened."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()} if folder.is_dir() else {}


def send_file(files: dict[str, Path], name: str) -> FileResponse:
    if name not in files:
        raise HTTPException(404, "there is no such file")
    return FileResponse(files[name], media_type={".js": "text/javascript"}.get(files[name].suffix))


def add_page(app: FastAPI) -> None:
    """static/, where it is there, and the OpenAPI page, of which nothing comes from another server."""
    files = files_below(ROOT / "static")
    spec = importlib.util.find_spec("fastapi_offline")
    swagger = files_below(Path(spec.origin).parent / "static") if spec else {}

    @app.get("/", include_in_schema=False)
    async def page():
        return send_file(files, "index.html") if files else JSONResponse({"status": "ok", "see": "/docs"})

    @app.get("/static/{name:path}", include_in_schema=False)
    async def static(name: str):
        return send_file(files, name)

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return Response(DOCS, media_type="text/html")

    @app.get("/docs/{name:path}", include_in_schema=False)
    async def docs_file(name: str):
        return Response(DOCS_START, media_type="text/javascript") if name == "start.js" else send_file(swagger, name)


# ----------------------------------------------------------------------------- the conversation

class Connection:
    """One WebSocket: messages in order into a LiveConversation, its events out. serve_schemas.DESCRIPTION has the messages."""

    def __init__(self, house: House, socket: WebSocket):
        self.house, self.socket, self.client = house, socket, client_of(socket.scope)
        self.loop, self.outgoing = asyncio.get_running_loop(), asyncio.Queue()
        self.room, self.closed = threading.BoundedSemaphore(OUTGOING), threading.Event()
        self.live, self.begun, self.sound, self.voices, self.skip = None, time.monotonic(), 0, 0, 0

    # ---- out

    def emit(self, event: dict, pcm: bytes | None = None) -> None:
        """From any thread. Sound waits for the listener; where there is none any more, Closed."""
        if pcm is not None and not self._wait_for_room() or self.closed.is_set() or self.outgoing.qsize() > EVENTS:
            self.closed.set()
            raise Closed
        if event["type"] == "interrupted":
            self.skip = event["turn"]
            self.house.metrics.interrupted.inc()
        if event["type"] == "reply_done" and event["latency_ms"]["first_audio"] is not None:
            self.house.metrics.underruns.inc(event["underruns"])
            self.house.metrics.first_audio.labels("conversation").observe(event["latency_ms"]["first_audio"] / 1000)
        self.loop.call_soon_threadsafe(self.outgoing.put_nowait, (event, pcm))

    def _wait_for_room(self) -> bool:
        until = time.monotonic() + self.house.cfg.stall_seconds
        while not self.closed.is_set() and time.monotonic() < until:
            if self.room.acquire(timeout=0.2):
                return True
        return False

    async def _send_all(self) -> None:
        try:
            while True:
                item = await self.outgoing.get()
                if item is None:
                    return
                event, pcm = item
                if pcm is not None:
                    self.room.release()
                    if event["turn"] <= self.skip:
                        continue                                 # it was interrupted: what has not left yet never does
                    self.house.metrics.spoken.inc(event["samples"] / SAMPLE_RATE)
                await asyncio.wait_for(self.socket.send_text(json.dumps(event)), self.house.cfg.stall_seconds)
                if pcm is not None:
                    await asyncio.wait_for(self.socket.send_bytes(pcm), self.house.cfg.stall_seconds)
        except (WebSocketDisconnect, RuntimeError, asyncio.TimeoutError, OSError):
            self.closed.set()

    async def say_error(self, code: str, message: str) -> None:
        self.outgoing.put_nowait(({"type": "error", "code": code, "message": error_body(message, "", code)["error"]["message"]}, None))

    # ---- in

    async def _next(self, seconds: float) -> dict | bytes | None:
        """The next message; None where the other side has gone or is silent. ValueError for text that is no JSON object with a type."""
        message = await asyncio.wait_for(self.socket.receive(), seconds)
        if message["type"] != "websocket.receive":
            return None
        if message.get("bytes") is not None:
            return message["bytes"]
        try:
            parsed = json.loads(message["text"])
        except (ValueError, RecursionError):
            raise ValueError("the message is not JSON: see the protocol") from None
        if not isinstance(parsed, dict) or parsed.get("type") not in (*schemas.MESSAGES, "auth"):
            raise ValueError(f"the message has no known type: use one of {', '.join(schemas.MESSAGES)}")
        return parsed

    async def _admit(self) -> None:
        """The key, by header, query or first message. Refused (401) without it."""
        key = self.house.key
        given = bearer(self.socket.headers.get("authorization", "")) or self.socket.query_params.get("key", "")
        if key and not given:
            message = await self._next(START_SECONDS)
            given = message.get("key") if isinstance(message, dict) and message["type"] == "auth" else ""
        if key and not (isinstance(given, str) and same_key(given, key)):
            raise Refused(401, "key", "the key is missing or wrong: send {\"type\": \"auth\", \"key\": ...} first")

    async def _start(self) -> None:
        message = await self._next(START_SECONDS)
        while isinstance(message, dict) and message["type"] == "auth":
            message = await self._next(START_SECONDS)
        if message is None:
            raise WebSocketDisconnect
        if not isinstance(message, dict) or message["type"] != "start":
            raise ValueError("the first message must be {\"type\": \"start\", ...}: see the protocol")
        start, service = parse_message(message), self.house.service
        if start.responder not in (None, service.responder.kind):
            raise ValueError(f"this server answers with the responder {service.responder.kind}: leave responder out")
        self.live = await self.house.run(service.converse, self.emit, start.voice, start.sample_rate)
        self.house.conversations.add(self.live)
        self.outgoing.put_nowait(({"type": "ready", "session": secrets.token_hex(8), "sample_rate": SAMPLE_RATE, "voices": list(service.voices), "model": service.model_name,
                                   "responder": service.responder.kind}, None))

    async def _listen(self) -> None:
        """Messages until the end of the conversation."""
        cfg = self.house.cfg
        while not self.closed.is_set():
            try:
                message = await self._next(1.0)
                if message is None:
                    return
                if isinstance(message, bytes):
                    await self._hear(message)
                elif not await self._obey(message):
                    return
            except asyncio.TimeoutError:
                pass                                             # nothing came: look at the clocks
            except (ValueError, Refused) as error:
                await self.say_error(getattr(error, "code", "invalid"), str(error))
            now = time.monotonic()
            if self.outgoing.qsize() > EVENTS:                   # it asks and asks, and does not read
                return
            if now - self.live.touched > cfg.idle_seconds:
                return await self.say_error("idle", f"nothing was said for {cfg.idle_seconds:g} s: connect again to go on")
            if now - self.begun > 60 * cfg.session_minutes:
                return await self.say_error("too_long", f"a conversation lasts at most {cfg.session_minutes:g} minutes: connect again")
            if self.live.memory_bytes > 1e6 * cfg.session_mb:
                return await self.say_error("memory", "this conversation holds too much: connect again")
            if self.house.places.closing and not self.live.busy:
                return await self.say_error("closing", "the server is shutting down: connect again later")

    async def _hear(self, data: bytes) -> None:
        """Sound that comes faster than it can have been spoken waits, and with it the sender."""
        samples = from_pcm(data)
        ahead = self.sound / self.live.sample_rate - (time.monotonic() - self.begun)
        if ahead > AHEAD_SECONDS:
            await asyncio.sleep(min(1.0, ahead - AHEAD_SECONDS))
        self.sound += len(samples)
        await self.house.run(self.live.hear, samples)

    async def _obey(self, message: dict) -> bool:
        """One order; False to leave."""
        kind, live, service = message["type"], self.live, self.house.service
        if kind == "auth":
            return True
        order = parse_message(message)
        if kind == "text":
            self.house.rates.take(self.client)
            service.check_text(order.text)
            await self.house.run(live.type, order.text)
        elif kind == "voice":
            await self.house.run(lambda: live.set_voice(**service.voice(order.voice).arguments))
            self.outgoing.put_nowait(({"type": "voice_set", "voice": order.voice}, None))
        elif kind == "voice_prompt":
            if self.voices >= self.house.cfg.max_voices:
                raise Refused(429, "too_many_voices", f"{self.house.cfg.max_voices} voices were sent in this conversation: connect again")
            self.voices += 1
            voice = await self.house.run(service.read_voice, from_base64(order.audio), order.text)
            await self.house.run(lambda: live.set_voice(**voice))
            self.outgoing.put_nowait(({"type": "voice_set", "voice": "upload", "text": voice.get("text")}, None))
        elif kind == "start":
            raise ValueError("the conversation has begun: send reset to begin anew")
        elif kind == "played":
            live.played(order.ms)
        elif kind in ("cancel", "end_of_turn", "reset"):
            await self.house.run({"cancel": live.interrupt, "end_of_turn": live.end_of_turn, "reset": live.reset}[kind])
        elif kind == "ping":
            self.outgoing.put_nowait(({"type": "pong"}, None))
        return kind != "close"

    # ---- the whole

    async def run(self) -> None:
        await self.socket.accept()
        sender, code, why, entered = asyncio.ensure_future(self._send_all()), 1000, "", False
        try:
            await self._admit()
            await self.house.places.enter(self.client)
            entered = True
            await self._start()
            await self._listen()
            code = CLOSING if self.house.places.closing else 1000
        except Refused as error:
            self.house.metrics.refused.labels(error.code).inc()
            code, why = (POLICY if error.status < 429 else NOT_NOW), error.message
            await self.say_error(error.code, error.message)
        except asyncio.TimeoutError:
            code, why = POLICY, "no first message came"
            await self.say_error("too_slow", f"no first message came within {START_SECONDS:g} s: send start")
        except ValueError as error:
            code, why = POLICY, str(error)
            await self.say_error("invalid", why)
        except (WebSocketDisconnect, Closed):
            pass
        finally:
            await asyncio.shield(self._leave(sender, code, why, entered))

    async def _leave(self, sender, code: int, why: str, entered: bool) -> None:
        self.outgoing.put_nowait(None)                           # what was said last still goes out
        await asyncio.wait([sender], timeout=1.0)
        self.closed.set()
        if self.live is not None:
            await self.house.run(self.live.close)
            self.house.conversations.discard(self.live)
        sender.cancel()
        if entered:
            self.house.places.leave(self.client)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
            await asyncio.wait_for(self.socket.close(code, why.encode("ascii", "ignore").decode()[:120]), 5)


def parse_message(message: dict):
    """The message as its schema. ValueError, one line."""
    try:
        return schemas.MESSAGES[message["type"]].model_validate(message)
    except ValidationError as error:
        raise ValueError(one_line(error.errors(include_input=False, include_url=False))[0]) from None


# ----------------------------------------------------------------------------- the application

def make_app(service: Service, key: str = "") -> FastAPI:
    """The application; app.state.house is its House."""
    house = House(service, key)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        house.close_doors()
        for live in list(house.conversations):
            await house.run(live.close)
        house.threads.shutdown(wait=False, cancel_futures=True)
        service.close()
    app = FastAPI(title="A conversational speech model that you can run, train and take apart", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
                  description=schemas.DESCRIPTION)
    app.state.house = house
    router = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))])      # for the page's sake: the Gate is what asks for the key
    add_facts(router, house)
    add_speech(router, house)
    app.include_router(router)
    add_page(app)
    add_error_handlers(app)

    @app.websocket("/v1/conversation")
    async def conversation(socket: WebSocket):
        await Connection(house, socket).run()
    if service.cfg.origins:
        from fastapi.middleware.cors import CORSMiddleware
        app.add_middleware(CORSMiddleware, allow_origins=sorted(service.cfg.origins), allow_methods=["GET", "POST"], allow_headers=["authorization", "content-type"])
    app.add_middleware(Gate, house=house)
    return app
