"""benchmark.py serve: the server as a process of its own, under the load of clients that play what they get in real time.

Streams: N clients ask for a sentence over HTTP, play it while it comes, wait a little and ask again. A stream has run dry
where its sound came later than it had to be played, the first piece being played CUSHION after it came. Conversations: N
clients speak test turns into a WebSocket in real time and hear the answer. Ends of turns: the endpointer on test turns, as they
are and in noise. Memory: turns, interruptions and spoken turns over and over. Malformed: requests drawn from the OpenAPI page
by schemathesis, broken bodies, sound files and WebSocket frames. All over loopback; the clients run in this process, on the same cores.
"""
from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from measuring import percentiles, pick_turns, show, sound_of, table

CUSHION = 0.2                    # seconds that a player waits after the first piece: a common jitter buffer
PAUSE = (0.3, 1.2)               # seconds between what a client hears and its next request
HANG = 60.0                      # seconds without an answer
SETTLE = 20.0                    # seconds without requests before memory is looked at again
RATE = 24000
SHORT = ["--max_seconds", "0.4", "--max_text", "200", "--stall_seconds", "5"]           # of the server that is sent nonsense: what is valid among it costs little
SNR_DB = 15.0
LOOKS = 100                      # at the memory during a replay
CUT_EARLY, MISSED = 0.1, 3.0     # seconds: an end before the last word's end; no end so long after it


# ----------------------------------------------------------------------------- the server

class Server:
    """serve.py as a process; a context manager. ValueError where it does not start."""

    def __init__(self, args, *more: str):
        command = [sys.executable, "serve.py", "--port", "0", "--codec", args.codec, "--device", args.device, "--requests_per_minute", "10000000", "--per_client", "1000", "--queue", "64", *more]
        command += ["--checkpoint", args.checkpoint] if args.checkpoint else []
        command += ["--threads", str(args.threads)] if args.threads else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent, env=os.environ | {"SERVE_API_KEY": ""})
        line = self.process.stdout.readline()
        found = re.search(r"at http://([^:]+):(\d+)", line)
        if not found:
            raise ValueError(f"serve.py did not start: {self.process.stderr.read().strip().splitlines()[-1:]}")
        self.host, self.port = found.group(1), int(found.group(2))

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def metric(self, name: str) -> float:
        import requests
        found = re.search(rf"^{re.escape(name)} (\S+)$", requests.get(self.url + "/metrics", timeout=HANG).text, re.M)
        return float(found.group(1)) if found else 0.0

    @property
    def memory_mb(self) -> float:
        return self.metric("process_resident_memory_bytes") / 1e6

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ----------------------------------------------------------------------------- streams

def dryness(arrivals: list[tuple[float, int]]) -> float:
    """(time, samples) of the pieces -> how many seconds after its first piece a player must begin, so that it never waits."""
    begun, had, late = arrivals[0][0], 0, 0.0
    for when, samples in arrivals:
        late = max(late, when - begun - had / RATE)
        had += samples
    return late


async def listen_once(client, url: str, text: str, voice: str) -> dict:
    """One sentence, played while it comes."""
    start, arrivals, odd = time.perf_counter(), [], 0
    async with client.stream("POST", url + "/v1/audio/speech", json={"input": text, "voice": voice, "response_format": "pcm"}, timeout=HANG) as answer:
        async for data in answer.aiter_raw():
            if answer.status_code == 200 and data:
                arrivals.append((time.perf_counter(), (len(data) + odd) // 2))
                odd = (len(data) + odd) % 2
        if answer.status_code != 200 or not arrivals:
            return {"status": answer.status_code}
    seconds = sum(n for _, n in arrivals) / RATE
    await asyncio.sleep(max(0.0, arrivals[0][0] + CUSHION + seconds - time.perf_counter()))
    return {"status": 200, "first_ms": 1000 * (arrivals[0][0] - start), "dry_s": dryness(arrivals), "seconds": seconds}


async def one_client(number: int, client, url: str, texts: list[str], voices: list[str], until: float, seed: int) -> list[dict]:
    rng, rows = random.Random(seed * 1000 + number), []
    await asyncio.sleep(rng.uniform(0, 1.0))
    while time.perf_counter() < until:
        rows.append(await listen_once(client, url, rng.choice(texts), voices[number % len(voices)]))
        await asyncio.sleep(rng.uniform(*PAUSE))
    return rows


async def load(server: Server, clients: int, seconds: float, texts: list[str], voices: list[str], seed: int) -> list[dict]:
    import httpx2
    until = time.perf_counter() + seconds
    async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None)) as client:
        rows = await asyncio.gather(*(one_client(n, client, server.url, texts, voices, until, seed) for n in range(clients)))
    return [row for some in rows for row in some]


def stream_summary(clients: int, rows: list[dict]) -> dict:
    good = [r for r in rows if r["status"] == 200]
    dry = [r for r in good if r["dry_s"] > CUSHION]
    return {"clients": clients, "requests": len(rows), "refused": len(rows) - len(good), "ran_dry": len(dry), "held": bool(good) and not dry and len(good) == len(rows),
            "first_ms": percentiles([r["first_ms"] for r in good]), "cushion_needed_ms": percentiles([1000 * r["dry_s"] for r in good]), "spoken_s": sum(r["seconds"] for r in good)}


def bench_streams(server: Server, args, texts: list[str]) -> list[dict]:
    import requests
    from tqdm import tqdm
    voices = [v["id"] for v in requests.get(server.url + "/v1/audio/voices", timeout=HANG).json()["voices"]] or [""]
    asyncio.run(load(server, 1, 1.0, texts, voices, args.seed))                              # warm
    return [stream_summary(n, asyncio.run(load(server, n, args.seconds, texts, voices, args.seed))) for n in tqdm(args.sessions, desc="streams", unit="level")]


# ----------------------------------------------------------------------------- conversations

async def converse(number: int, server: Server, turns: list, seed: int) -> list[dict]:
    """Speak each turn (audio, text, second at which its last word ends) in real time; the answer is heard to its end."""
    import websockets
    rows, rng = [], random.Random(seed * 1000 + number)
    async with websockets.connect(f"ws://{server.host}:{server.port}/v1/conversation", max_size=None) as ws:
        await ws.send(json.dumps({"type": "start", "sample_rate": RATE}))
        await asyncio.sleep(rng.uniform(0, 1.0))
        for audio, text, last in turns:
            rows.append(await one_turn(ws, audio, last))
    return rows


async def one_turn(ws, audio, last: float) -> dict:
    """Microphone on: the turn, then silence until the answer is over."""
    from speech_formats import to_pcm
    pcm, begun, row, arrivals = to_pcm(audio), time.perf_counter(), {"answered": False}, []
    stop = asyncio.Event()

    async def microphone():
        step, at = RATE // 25 * 2, 0                                                          # 40 ms
        while not stop.is_set():
            await ws.send(pcm[at:at + step].ljust(step, b"\0"))
            at += step
            await asyncio.sleep(max(0.0, begun + at / 2 / RATE - time.perf_counter()))
    speaking = asyncio.create_task(microphone())
    try:
        while True:
            message = await asyncio.wait_for(ws.recv(), HANG)
            now = time.perf_counter()
            if isinstance(message, bytes):
                arrivals.append((now, len(message) // 2))
                continue
            event = json.loads(message)
            row.setdefault(event["type"] + "_ms", 1000 * (now - begun - last))
            if event["type"] == "transcript":
                row["text"] = event["text"]
            if event["type"] == "error":
                row["error"] = event["code"]
            if event["type"] in ("reply_done", "error"):
                break
    except asyncio.TimeoutError:
        row["error"] = "hang"
    stop.set()
    await speaking
    if arrivals:
        row |= {"answered": True, "first_ms": 1000 * (arrivals[0][0] - begun - last), "dry_s": dryness(arrivals)}
        await asyncio.sleep(max(0.0, arrivals[0][0] + sum(n for _, n in arrivals) / RATE - time.perf_counter()))
        await ws.send(json.dumps({"type": "played", "ms": 1000 * sum(n for _, n in arrivals) / RATE}))
    return row


def spoken_turns(args, count: int) -> list:
    """(audio, text, second at which the last word ends) of test turns; the end of the sound where the words have no times."""
    found = []
    for turns, i in pick_turns(args.data, args.split, count, args.seed):
        audio = sound_of(args.data, turns[i])
        words = (turns[i]["custom"].get("alignment") or {}).get("words")
        found.append((audio, turns[i]["text"], min(words[-1][3], len(audio) / RATE) if words else len(audio) / RATE))
    return found


async def all_conversations(server: Server, clients: int, turns: list, each: int, seed: int) -> list[dict]:
    rows = await asyncio.gather(*(converse(n, server, [turns[(n * each + k) % len(turns)] for k in range(each)], seed) for n in range(clients)))
    return [row for some in rows for row in some]


def conversation_summary(clients: int, rows: list[dict]) -> dict:
    good = [r for r in rows if r["answered"]]
    return {"clients": clients, "turns": len(rows), "answered": len(good), "ran_dry": sum(r["dry_s"] > CUSHION for r in good), "errors": sorted({r["error"] for r in rows if "error" in r}),
            "end_noticed_ms": percentiles([r.get("speech_stopped_ms") for r in good]), "transcript_ms": percentiles([r.get("transcript_ms") for r in good]),
            "first_ms": percentiles([r["first_ms"] for r in good])}


def bench_conversations(server: Server, args) -> list[dict]:
    from tqdm import tqdm
    turns = spoken_turns(args, 4 * args.talks)
    levels = [n for n in args.sessions if n <= 4]
    return [conversation_summary(n, asyncio.run(all_conversations(server, n, turns, args.talks, args.seed))) for n in tqdm(levels, desc="conversations", unit="level")] if args.talks else []


# ----------------------------------------------------------------------------- ends of turns

def ends_of(audio, cfg) -> list[float]:
    """Seconds at which the endpointer says that a turn is over."""
    from endpointing import Endpointer
    return [event.at_ms / 1000 for event in Endpointer(cfg, RATE).push(audio) if event.kind == "end"]


def bench_endpointing(args) -> dict:
    """Test turns between silences, as they are and in white noise: ends before the last word, none at all, and the wait."""
    import numpy as np
    from config import EndpointConfig
    rng, cfg, result = np.random.default_rng(args.seed), EndpointConfig(), {}
    turns = spoken_turns(args, args.ends)
    for name, noisy in (("as they are", False), (f"in white noise at {SNR_DB:g} dB", True)):
        early = missed = 0
        waits = []
        for audio, _, last in turns:
            sound = np.concatenate([np.zeros(RATE // 2), audio, np.zeros(int(MISSED * RATE))]).astype(np.float32)
            if noisy:
                sound += (np.sqrt(np.mean(audio ** 2)) * 10 ** (-SNR_DB / 20) * rng.standard_normal(len(sound))).astype(np.float32)
            ends = ends_of(sound, cfg)
            early += any(end < 0.5 + last - CUT_EARLY for end in ends)
            after = [end - 0.5 - last for end in ends if end >= 0.5 + last - CUT_EARLY]
            missed += not after
            waits += after[:1]
        result[name] = {"turns": len(turns), "split_early": early, "missed": missed, "wait_ms": percentiles([1000 * w for w in waits])}
    return result


# ----------------------------------------------------------------------------- memory

@dataclasses.dataclass
class Replay:
    """How far a replay has come: it is over after `turns` turns and `seconds` of sound, heard and spoken."""
    server: Server
    turns: int
    seconds: float
    bar: object
    done: int = 0
    sound: float = 0.0
    memory: list = dataclasses.field(default_factory=list)       # (turns, MB of the server) along the way

    @property
    def share(self) -> float:
        return min(self.done / self.turns if self.turns else 1.0, self.sound / self.seconds if self.seconds else 1.0)

    async def add(self, sound: float) -> None:
        self.done, self.sound = self.done + 1, self.sound + sound
        self.bar.update(min(1.0, self.share) - self.bar.n)
        if self.share * LOOKS > len(self.memory):
            self.memory.append((self.done, 0.0))                 # its place, so that nobody else looks meanwhile
            place = len(self.memory) - 1
            self.memory[place] = (self.memory[place][0], await asyncio.to_thread(lambda: self.server.memory_mb))


async def one_talker(replay: Replay, rng: random.Random, spoken: list, texts: list[str]) -> None:
    """Turns one after another, now and then interrupted, spoken, or in a new conversation."""
    import websockets
    ws = None
    while replay.share < 1.0:
        if ws is None or rng.random() < 0.04:
            if ws is not None:
                await ws.close()
            ws = await websockets.connect(f"ws://{replay.server.host}:{replay.server.port}/v1/conversation", max_size=None)
            await ws.send(json.dumps({"type": "start", "sample_rate": RATE}))
        await replay.add(await hurried_turn(ws, rng, spoken, texts))
    if ws is not None:
        await ws.close()


async def many_turns(server: Server, turns: int, seconds: float, talkers: int, spoken: list, texts: list[str], seed: int) -> dict:
    """`talkers` conversations side by side until there were so many turns and so much sound. Memory of the server along the way, and with nobody there."""
    from tqdm import tqdm
    before = server.memory_mb
    with tqdm(total=1.0, desc="memory", bar_format="{desc}: {percentage:3.0f}% [{elapsed}<{remaining}]") as bar:
        replay = Replay(server, turns, seconds, bar)
        await asyncio.gather(*(one_talker(replay, random.Random(seed * 1000 + n), spoken, texts) for n in range(talkers)))
    await asyncio.sleep(3.0)                                     # the last conversations leave
    return {"turns": replay.done, "talkers": talkers, "seconds_of_sound": replay.sound, "memory_mb": replay.memory, "memory_before_mb": before, "memory_after_mb": server.memory_mb,
            "growth_mb_per_100_turns": growth(replay.memory), "places_taken_after": server.metric("serve_sessions")}


async def hurried_turn(ws, rng, spoken: list, texts: list[str]) -> float:
    """One turn, not played in real time; seconds of sound that went in and came out."""
    from speech_formats import to_pcm
    heard, interrupt = 0, rng.random() < 0.15
    if spoken and rng.random() < 0.1:
        audio = rng.choice(spoken)[0]
        heard += len(audio)
        await ws.send(to_pcm(audio)[:20 * 2 * RATE])
        await ws.send(json.dumps({"type": "end_of_turn"}))
    else:
        await ws.send(json.dumps({"type": "text", "text": rng.choice(texts)}))
    while True:
        message = await asyncio.wait_for(ws.recv(), HANG)
        if isinstance(message, bytes):
            heard += len(message) // 2
            if interrupt and heard > RATE:
                interrupt = False
                await ws.send(json.dumps({"type": "cancel"}))
                await ws.send(json.dumps({"type": "played", "ms": rng.randint(0, 900)}))
            continue
        event = json.loads(message)
        if event["type"] == "reply_done":
            await ws.send(json.dumps({"type": "played", "ms": 1000 * event["duration_s"] + 1}))
        if event["type"] in ("reply_done", "interrupted", "error") or (event["type"] == "transcript" and not re.search("[A-Za-z0-9]", event["text"])):
            return heard / RATE


def bench_memory(args, texts: list[str]) -> dict | None:
    if not args.replay and not args.replay_hours:
        return None
    with Server(args, "--ahead_seconds", "1000", "--partial_seconds", "0", "--max_sessions", str(args.talkers)) as server:
        return asyncio.run(many_turns(server, args.replay, 3600 * args.replay_hours, args.talkers, spoken_turns(args, 8), texts, args.seed))


def growth(memory: list[tuple[int, float]]) -> float | None:
    """MB per 100 turns over the second half: the slope of a straight line, after the buffers of the first half were made."""
    import numpy as np
    half = memory[len(memory) // 2:]
    return float(100 * np.polyfit(*zip(*half), 1)[0]) if len(half) > 2 else None


# ----------------------------------------------------------------------------- malformed requests

class Tally:
    """Answers to nonsense."""

    def __init__(self):
        self.counts, self.failed, self.hangs = {}, [], 0

    def add(self, kind: str, status: int, what: str = "") -> None:
        self.counts.setdefault(kind, {}).setdefault(str(status), 0)
        self.counts[kind][str(status)] += 1
        if status >= 500 and status != 503:
            self.failed.append(f"{kind}: {what[:200]}")

    @property
    def total(self) -> int:
        return sum(sum(c.values()) for c in self.counts.values())


def ask(session, tally: Tally, kind: str, method: str, url: str, **request) -> None:
    import requests
    try:
        answer = session.request(method, url, timeout=HANG, **request)
        tally.add(kind, answer.status_code, answer.text if answer.status_code >= 500 else "")
    except requests.Timeout:
        tally.hangs += 1
    except (requests.RequestException, ValueError, UnicodeError):
        tally.add(kind, 0)                                       # it could not be sent, or was cut off: no HTTP any more


def fuzz_schema(server: Server, tally: Tally, count: int, seed: int) -> None:
    """Requests that break the OpenAPI page in every way that schemathesis knows, and for what costs nothing such as keep to it."""
    try:
        import hypothesis
        import schemathesis
    except ImportError:
        raise ValueError("schemathesis is not installed: python setup_environment.py --dev, or --malformed 0") from None
    import requests
    schema, session = schemathesis.openapi.from_url(server.url + "/openapi.json"), requests.Session()
    operations = [result.ok() for result in schema.get_all_operations()]
    no_checks, rich = list(hypothesis.HealthCheck), [o for o in operations if o.body or o.path_parameters or o.query]
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            if mode == schemathesis.GenerationMode.POSITIVE and operation.path in ("/generate", "/v1/audio/speech"):
                continue
            each = max(1, count // (2 * len(rich) - 2)) if operation in rich else 10      # a route that takes nothing can hardly be broken
            with contextlib.suppress(Exception):                 # an operation without parameters cannot be broken in every mode
                strategy = operation.as_strategy(generation_mode=mode)

                @hypothesis.seed(seed)
                @hypothesis.settings(max_examples=each, database=None, deadline=None, suppress_health_check=no_checks, phases=[hypothesis.Phase.generate])
                @hypothesis.given(case=strategy)
                def send(case):
                    request = case.as_transport_kwargs(base_url=server.url)
                    ask(session, tally, "openapi", request.pop("method"), request.pop("url"), **{k: v for k, v in request.items() if k in ("params", "json", "data", "headers", "files", "cookies")})
                send()


def broken_bytes(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A valid file with bytes flipped, cut, repeated or of another; or noise."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        way, at = rng.randrange(5), rng.randrange(max(1, min(len(data), 200 if rng.random() < 0.7 else len(data))))
        if way == 0:
            data[at:at + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            data[at:at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x01\0\0\0"))
        elif way == 2:
            del data[at:]
        elif way == 3:
            data[at:at] = data[at // 2:at]
        else:
            data[at:at + 50] = rng.randbytes(rng.randint(0, 50))
    return bytes(data)


def fuzz_bodies(server: Server, tally: Tally, count: int, seed: int) -> None:
    """Broken sound files to /transcribe and as voices, broken JSON to the rest."""
    import numpy as np
    import requests
    from speech_formats import MEDIA, Encoder
    rng, session, tone, sounds = random.Random(seed), requests.Session(), (0.2 * np.sin(np.arange(9600) * 0.1)).astype(np.float32), []
    for form in MEDIA:
        encoder = Encoder(form)
        sounds.append(encoder.feed(tone) + encoder.finish())
    good = [json.dumps(body).encode() for body in ({"input": "Hello.", "voice": "alba", "response_format": "wav"}, {"text": "Hello.", "seed": 1, "streaming": True}, {"text": "Hi.", "reply": True})]
    for _ in range(count):
        sound, way = broken_bytes(rng, sounds), rng.randrange(4)
        if way == 0:
            ask(session, tally, "sound", "POST", server.url + "/transcribe", data=sound)
        elif way == 1:
            ask(session, tally, "sound", "POST", server.url + "/transcribe", files={"file": ("x", sound)})
        elif way == 2:
            ask(session, tally, "voice", "POST", server.url + "/generate", json={"text": "Hi.", "voice_prompt": base64.b64encode(sound).decode(), "voice_text": "hi"})
        else:
            ask(session, tally, "json", "POST", server.url + rng.choice(("/generate", "/v1/audio/speech")), data=broken_bytes(rng, good), headers={"content-type": "application/json"})


async def fuzz_frames(server: Server, tally: Tally, count: int, seed: int) -> None:
    """Frames that are no messages, messages that are wrong, sound that is none; every connection must still answer a ping, or have been closed with a code."""
    import websockets
    rng, sent = random.Random(seed), 0
    good = [json.dumps(m).encode() for m in ({"type": "start", "voice": "alba", "sample_rate": 24000}, {"type": "text", "text": "Hello."}, {"type": "played", "ms": 10}, {"type": "cancel"}, {"type": "reset"},
                                             {"type": "voice_prompt", "audio": "AAAA"}, {"type": "voice", "voice": "emil"}, {"type": "end_of_turn"})]
    while sent < count:
        try:
            async with websockets.connect(f"ws://{server.host}:{server.port}/v1/conversation", max_size=None) as ws:
                if rng.random() < 0.8:
                    await ws.send(good[0].decode())
                for _ in range(rng.randint(1, 40)):
                    data = broken_bytes(rng, good)
                    await ws.send(data if rng.random() < 0.3 else data.decode("utf-8", "replace") if rng.random() < 0.6 else rng.choice(good).decode())
                    sent += 1
                await ws.send('{"type": "ping"}')
                while json.loads(await next_text(ws))["type"] != "pong":
                    pass
            tally.add("frames", 200)
        except websockets.ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else 0
            tally.add("frames", 500 if code == 1011 else 400, f"closed with {code}")
        except asyncio.TimeoutError:
            tally.hangs += 1
    frames = tally.counts.setdefault("frames", {})
    frames["frames sent"] = frames.get("frames sent", 0) + sent


async def next_text(ws) -> str:
    while True:
        message = await asyncio.wait_for(ws.recv(), HANG)
        if isinstance(message, str):
            return message


def bench_malformed(args) -> dict:
    """args.malformed requests and frames to a server of its own; memory before them, after the first tenth of every kind and after all."""
    with Server(args, *SHORT) as server:
        tally, before, tenth = Tally(), server.memory_mb, max(1, args.malformed // 10)
        nonsense(server, tally, tenth, args.seed + 1)                                          # what loads or grows to its size on first use has done so
        first, begun = settled(server), tally.total
        nonsense(server, tally, args.malformed - tenth, args.seed)
        last = settled(server)
        alive, grown = last is not None, None if None in (first, last) else 1000 * (last - first) / max(1, tally.total - begun)
        return {"answers": tally.counts, "requests": tally.total - tally.counts["frames"]["frames sent"], "failed_inside": len(tally.failed), "examples": tally.failed[:5], "hangs": tally.hangs,
                "alive": alive, "places_taken_after": server.metric("serve_sessions") if alive else None, "memory_before_mb": before, "memory_after_a_tenth_mb": first, "memory_after_mb": last,
                "growth_mb_per_1000": grown}


def nonsense(server: Server, tally: Tally, count: int, seed: int) -> None:
    """A third of it drawn from the schema, a third bodies, a third frames."""
    from tqdm import tqdm
    part = max(1, count // 3)
    for fuzz in tqdm((fuzz_schema, fuzz_bodies, lambda *what: asyncio.run(fuzz_frames(*what))), desc="malformed", unit="part"):
        fuzz(server, tally, part, seed)


def settled(server: Server) -> float | None:
    """MB of the server once what was freed has gone back (runtime.return_freed_memory); None where it has ended."""
    time.sleep(SETTLE)
    return server.memory_mb if server.process.poll() is None else None


# ----------------------------------------------------------------------------- the whole

def add_flags(part) -> None:
    part.add_argument("--sessions", default="1,2,4,8", help="clients at once; default 1,2,4,8")
    part.add_argument("--seconds", type=float, default=30.0, help="of every level of streams; default 30")
    part.add_argument("--talks", type=int, default=4, help="spoken turns of every conversation; 0: none; default 4")
    part.add_argument("--ends", type=int, default=60, help="turns of which the end is looked for; 0: none; default 60")
    part.add_argument("--replay", type=int, default=600, help="turns over which memory is looked at; 0: none; default 600")
    part.add_argument("--replay_hours", type=float, default=0.0, help="go on with them until so many hours of sound were heard and spoken; default 0")
    part.add_argument("--talkers", type=int, default=8, help="conversations side by side in which they are; default 8")
    part.add_argument("--malformed", type=int, default=10_000, help="malformed requests and frames; 0: none; default 10000")


def bench_serve(args) -> tuple[dict, str]:
    """The server under load: streams and conversations in real time, ends of turns, memory over many turns, malformed requests."""
    args.sessions = [int(n) for n in str(args.sessions).split(",")]
    texts = [turns[i]["text"] for turns, i in pick_turns(args.data, args.split, 40, args.seed)]
    result = {"endpointing": bench_endpointing(args) if args.ends else None}
    with Server(args, "--max_sessions", str(max(args.sessions))) as server:
        result |= {"streams": bench_streams(server, args, texts), "conversations": bench_conversations(server, args)}
    result["memory"] = bench_memory(args, texts)
    result["malformed"] = bench_malformed(args) if args.malformed else None
    return result, serve_body(result)


def serve_body(result: dict) -> str:
    """The section of RESULTS.md."""
    def two(value):
        return f"{show(value['p50'], 0)} / {show(value['p95'], 0)}"
    parts = [table(["clients at once", "sentences", "ran dry", "turned away", "first sound p50 / p95 (ms)", "cushion needed p50 / p95 (ms)"],
                   [[str(s["clients"]), str(s["requests"]), str(s["ran_dry"]), str(s["refused"]), two(s["first_ms"]), two(s["cushion_needed_ms"])] for s in result["streams"]])]
    held = [s["clients"] for s in result["streams"] if s["held"]]
    parts.append(f"Streams held without running dry (cushion {1000 * CUSHION:.0f} ms): {max(held) if held else 0} at once. The clients run on the same cores.")
    if result["conversations"]:
        parts.append(table(["conversations at once", "spoken turns", "answered", "ran dry", "end noticed p50 / p95 (ms)", "transcript p50 / p95 (ms)", "first sound p50 / p95 (ms)"],
                           [[str(c["clients"]), str(c["turns"]), str(c["answered"]), str(c["ran_dry"]), two(c["end_noticed_ms"]), two(c["transcript_ms"]), two(c["first_ms"])] for c in result["conversations"]])
                     + "\n\nTimes from the end of the user's last word; the wait for the end of a turn is part of them.")
    if result["endpointing"]:
        parts.append(table(["test turns", "number", "split before their last word", "end missed", "wait p50 / p95 (ms)"],
                           [[name, str(e["turns"]), str(e["split_early"]), str(e["missed"]), two(e["wait_ms"])] for name, e in result["endpointing"].items()]))
    if result.get("memory"):
        m = result["memory"]
        parts.append(f"{m['turns']} turns ({m['seconds_of_sound'] / 60:.0f} minutes of sound) in {m['talkers']} conversations side by side: memory {m['memory_mb'][len(m['memory_mb']) // 2][1]:.0f} MB half way, "
                     f"{m['memory_mb'][-1][1]:.0f} MB at the end, growth over the second half {show(m['growth_mb_per_100_turns'])} MB per 100 turns; with nobody there {m['memory_before_mb']:.0f} MB before and "
                     f"{m['memory_after_mb']:.0f} MB after.")
    if result["malformed"]:
        f = result["malformed"]
        parts.append(f"{f['requests']} malformed requests and {f['answers'].get('frames', {}).get('frames sent', 0)} WebSocket frames: {f['failed_inside']} failures inside the server, {f['hangs']} hangs, "
                     f"{show(f['places_taken_after'], 0)} places still taken after it; memory {show(f['memory_before_mb'], 0)} MB before, "
                     f"{show(f['memory_after_a_tenth_mb'], 0)} MB after the first tenth, {show(f['memory_after_mb'], 0)} MB after all ({show(f['growth_mb_per_1000'])} MB per 1000), each time {SETTLE:.0f} s after the last.")
    return "\n\n".join(parts)
