"""The live conversation's WebSocket: messages in order into a LiveConversation, its events and sound out."""
from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
import time

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

import serve_schemas as schemas
from audio_io import SAMPLE_RATE
from live import Closed
from serve_gate import House, client_of, error_body, one_line
from serve_limits import Refused, bearer, same_key
from speech_formats import from_base64, from_pcm

START_SECONDS = 10.0               # for the first message of a conversation, the key included
AHEAD_SECONDS = 5.0                # sound may arrive so much faster than it was spoken
LOOK_SECONDS = 0.25                # between two looks at clocks and memory
OUTGOING = 64                      # pieces of sound (80 ms each) that may wait for a slow listener
EVENTS = 1000                      # other events that may
CLOSING, NOT_NOW, POLICY, TOO_LARGE = 1012, 1013, 1008, 1009


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
                async with asyncio.timeout(self.house.cfg.stall_seconds):
                    await self.socket.send_text(json.dumps(event))
                if pcm is not None:
                    async with asyncio.timeout(self.house.cfg.stall_seconds):
                        await self.socket.send_bytes(pcm)
        except (WebSocketDisconnect, RuntimeError, asyncio.TimeoutError, OSError):
            self.closed.set()

    async def say_error(self, code: str, message: str) -> None:
        self.outgoing.put_nowait(({"type": "error", "code": code, "message": error_body(message, "", code)["error"]["message"]}, None))

    # ---- in

    async def _next(self, seconds: float) -> dict | bytes | None:
        """The next message; None where the other side has gone or is silent. ValueError for text that is no JSON object with a type."""
        async with asyncio.timeout(seconds):
            message = await self.socket.receive()
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
        cfg, looked = self.house.cfg, 0.0
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
            if now - looked < LOOK_SECONDS:
                continue
            looked = now
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
            self.live = None                                     # it holds this connection's emit, and tens of MB: they go now, not when the collector comes by
        sender.cancel()
        if entered:
            self.house.places.leave(self.client)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError):
            async with asyncio.timeout(5):                       # wait_for would be in a cycle with the exception (Python 3.11), and hold the connection's buffers
                await self.socket.close(code, why.encode("ascii", "ignore").decode()[:120])


def parse_message(message: dict):
    """The message as its schema. ValueError, one line."""
    try:
        return schemas.MESSAGES[message["type"]].model_validate(message)
    except ValidationError as error:
        raise ValueError(one_line(error.errors(include_input=False, include_url=False))[0]) from None
