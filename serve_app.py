"""The routes of the server, and the application. What is said and heard is service.py's, the WebSocket serve_socket.py's, what stands before all serve_gate.py's.

    app = make_app(service, key="...")            # an ASGI application; serve.py runs it on uvicorn

The order of a request: host and origin, key, rate, size of the body, a place (or the queue), the work in a thread of its own,
and back in pieces. Nothing of a request is ever opened as a path, unpickled, or put into a shell.
"""
from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import logging
import threading
import time
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

import serve_schemas as schemas
from audio_io import SAMPLE_RATE
from runtime import ROOT
from serve_gate import Gate, House, add_error_handlers, client_of, error_body, place, refusal
from serve_limits import Refused
from serve_socket import Connection
from service import Service, mood_of
from speech_formats import MEDIA, Encoder, decode, from_base64, wav_header
from watermark import AI_TAGS, wav_info

OUTGOING = 64                      # pieces of sound (80 ms each) that may wait for a slow listener
DOCS = ('<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Routes of this server</title><link rel="stylesheet" href="/docs/swagger-ui.css"></head>'
        '<body><div id="swagger-ui"></div><script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></body></html>')
DOCS_START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui"});'
log = logging.getLogger("serve")


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

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon():
        return Response(status_code=204)

    @app.get("/static/{name:path}", include_in_schema=False)
    async def static(name: str):
        return send_file(files, name)

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return Response(DOCS, media_type="text/html")

    @app.get("/docs/{name:path}", include_in_schema=False)
    async def docs_file(name: str):
        return Response(DOCS_START, media_type="text/javascript") if name == "start.js" else send_file(swagger, name)


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
