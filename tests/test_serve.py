"""The server with a tiny random model: every route, every limit, every way to be turned away; once as a process, with OpenAI's own client."""
import asyncio
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

import serve
import serve_limits
from config import CodecConfig, EndpointConfig, LiveConfig, model_preset
from runtime import ROOT
from serve_limits import ServeConfig, host_allowed, origin_allowed, same_key
from speech_formats import MEDIA, from_pcm, to_pcm, wav_bytes

starlette = pytest.importorskip("starlette.testclient")
TONE = (0.2 * np.sin(np.arange(24000) * 0.06)).astype(np.float32)


class Says:
    kind, on_model = "list", False

    def warm(self):
        pass

    def stream(self, session, speaker, history, me):
        yield f"You said {history[-1][1]} "
        yield "And I say so."


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    import checkpoint
    from architecture import CSM
    from rvq_tokenizer import Codec
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    codec = Codec(CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                              latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20))
    model = CSM(model_preset("test"))
    model.init_weights()
    checkpoint.save_codec(codec, folder / "codec")
    checkpoint.save_pretrained(model, folder / "model", codec_fingerprint=codec.fingerprint)
    return ["--checkpoint", str(folder / "model"), "--codec", str(folder / "codec"), "--device", "cpu", "--max_seconds", "0.8"]


@pytest.fixture(scope="module")
def lab(weights):
    service = serve.load(serve.build_parser().parse_args(weights))
    service.close()
    return service.lab


@pytest.fixture(scope="module")
def make_client(lab):
    """A client of a fresh application; settings of ServeConfig by name."""
    from serve_app import make_app
    from service import Service
    open_clients = []

    def make(key="", responder=None, transcribe=None, endpoint=EndpointConfig(), **settings):
        cfg = ServeConfig(**({"requests_per_minute": 100_000} | settings))
        service = Service(lab, responder or Says(), cfg, LiveConfig(user_sound=False), endpoint, transcribe=transcribe or (lambda audio, rate: f"{len(audio) / rate:.1f} seconds"))
        client = starlette.TestClient(make_app(service, key), base_url="http://localhost", raise_server_exceptions=False)
        client.__enter__()
        client.house = client.app.state.house
        open_clients.append(client)
        return client
    yield make
    for client in open_clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(make_client):
    return make_client()


def error_of(answer, status):
    """The one line of an error, of which nothing else may come out."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"} and "\n" not in error["message"] and "Traceback" not in answer.text
    return error["message"]


def read(data):
    return soundfile.read(io.BytesIO(data), dtype="float32")


def speech(client, **body):
    return client.post("/v1/audio/speech", json={"input": "Hello there.", "response_format": "pcm"} | body)


# ----------------------------------------------------------------------------- loading

def test_what_is_freed_goes_back_to_the_system(weights, monkeypatch):
    called = []
    monkeypatch.setattr("runtime.return_freed_memory", lambda: called.append(True))
    serve.load(serve.build_parser().parse_args(weights)).close()
    assert called == [True]


def test_who_writes_down_what_is_heard(weights, tmp_path, monkeypatch):
    """--transcriber model: the model's own ear, at any rate; ValueError where the weights have none."""
    import dataclasses

    import checkpoint
    import config
    import generation
    from architecture import CSM
    with pytest.raises(ValueError, match="train_ear.py"):
        serve.load(serve.build_parser().parse_args([*weights, "--transcriber", "model"]))
    bare = checkpoint.load_model(weights[weights.index("--checkpoint") + 1])
    larger = CSM(dataclasses.replace(bare.cfg, ear=config.EarConfig(enabled=True, width=32, heads=2, layers=1)))
    larger.init_weights()
    larger.load_state_dict(bare.state_dict(), strict=False)
    checkpoint.save_pretrained(larger, tmp_path / "ear", codec_fingerprint=bare.codec_fingerprint)
    service = serve.load(serve.build_parser().parse_args([*weights, "--checkpoint", str(tmp_path / "ear"), "--transcriber", "model"]))
    asked = []
    monkeypatch.setattr(generation.Session, "transcribe", lambda self, codes, speaker=0: asked.append(codes.shape) or "i heard you. well?")
    try:
        tone = (0.1 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)
        assert service.ears.submit(tone, 16000).result(60) == "I heard you. Well?"
        assert asked == [(bare.cfg.num_codebooks, 13)], "a second of sound, of 12.5 frames"
    finally:
        service.close()


# ----------------------------------------------------------------------------- facts

def test_what_is_there(client):
    assert client.get("/health").json() == {"status": "ok"} and client.get("/favicon.ico").status_code == 204
    assert client.get("/ready").json() == {"status": "ready", "model": "model", "sessions": 0, "waiting": 0}
    models = client.get("/v1/models").json()
    assert models["object"] == "list" and models["data"][0]["id"] == "model" and client.get("/v1/models/model").json() == models["data"][0]
    assert "there is no model" in error_of(client.get("/v1/models/gpt"), 404)
    voices = client.get("/v1/audio/voices").json()["voices"]
    assert {"alba", "emil"} <= {v["id"] for v in voices} and all(v["name"] and v["description"] for v in voices)


def test_the_openapi_page_has_examples_and_every_route(client):
    page = client.get("/openapi.json").json()
    assert {"/generate", "/transcribe", "/v1/audio/speech", "/v1/audio/voices", "/v1/models", "/health", "/ready", "/metrics"} <= set(page["paths"])
    for name in ("SpeechRequest", "GenerateRequest"):
        assert page["components"]["schemas"][name]["examples"]
    assert page["components"]["securitySchemes"] and "played" in page["info"]["description"]
    html = client.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(links) == 3 and all(link.startswith("/docs/") and client.get(link).status_code == 200 for link in links), "everything comes from this server"
    assert "<script>" not in html and client.get("/docs/../serve.py").status_code == client.get("/docs/nothing.js").status_code == 404


def test_metrics_count_what_happens(client):
    def value(name):
        text = client.get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M).group(1))
    speech(client)
    before = value("serve_spoken_seconds_total")
    answer = speech(client)
    assert value("serve_spoken_seconds_total") - before == pytest.approx(len(answer.content) / 48000)
    assert value('serve_requests_total{route="/v1/audio/speech",status="200"}') >= 2 and value("serve_sessions") == 0 and value("serve_frames") > 0
    assert value('serve_first_audio_seconds_count{kind="request"}') >= 2


# ----------------------------------------------------------------------------- speaking

@pytest.mark.parametrize("form", list(MEDIA))
def test_speech_in_every_format(client, form):
    answer = speech(client, response_format=form)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(MEDIA[form]) and "content-length" not in answer.headers and len(answer.content) > 200
    if form in ("wav", "opus", "mp3"):
        sound, rate = read(answer.content)
        assert rate == 24000 and 0.1 < len(sound) / rate < 1.2


@pytest.mark.parametrize("form", ["wav", "opus", "mp3", "flac"])
def test_files_say_that_they_are_synthetic(client, form):
    import av
    answer = speech(client, response_format=form)
    with av.open(io.BytesIO(answer.content)) as file:
        tags = dict(file.metadata) | dict(file.streams.audio[0].metadata)
    assert "AI-generated" in tags["comment"] and answer.headers["x-synthetic-speech"] == "true"


def test_speech_is_marked_where_it_is_wanted(make_client, client, monkeypatch):
    """The mark of watermark.py: as much sound, changed a little, the same in a reply of a conversation."""
    import watermark
    monkeypatch.setenv("WATERMARK_KEY", "secret")
    marking = make_client(watermark=True)
    plain, marked = (from_pcm(speech(c, input="Hello there, my friend.").content) / 32767 for c in (client, marking))
    assert len(plain) == len(marked)
    np.testing.assert_allclose(marked, watermark.embed(plain.astype(np.float32), "secret"), atol=2e-4)
    assert np.abs(marked - plain).max() > 1e-3
    pushed = []
    monkeypatch.setattr(watermark.Marker, "push", lambda self, chunk, push=watermark.Marker.push: pushed.append(len(chunk)) or push(self, chunk))
    with Talk(marking) as talk:
        talk.say(type="text", text="Hello.")
        done = talk.until("reply_done")[-1]
    assert len(talk.sound) == 2 * sum(n for n in pushed if n == 1920) and done["duration_s"] == pytest.approx(len(talk.sound) / 48000, abs=1e-3)


def test_speech_is_what_the_model_says(client, lab):
    from generation import Session
    session, voice = Session(lab.model, lab.codec, lab.tokenizer, lab.sampling), client.house.service.voices["bruna"].arguments
    session.set_voice(1, **voice)
    session.prepare(1)
    said = session.say(1, "hello there.")
    np.testing.assert_allclose(from_pcm(speech(client, voice="bruna").content) / 32767, said.audio, atol=1e-3)


def test_long_texts_are_spoken_in_pieces(client):
    one, many = speech(client, input="Hello there."), speech(client, input="Hello there, my friend. " * 40)
    assert len(many.content) > 2.5 * len(one.content)


def test_server_sent_events(client):
    answer = speech(client, stream_format="sse")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream") and events[-1] == {"type": "speech.audio.done"}
    assert b"".join(base64.b64decode(e["audio"]) for e in events[:-1]) == speech(client).content


@pytest.mark.parametrize("body, status, words", [
    ({"voice": "nobody"}, 400, "use one of alba"), ({"voice": "../../etc/passwd"}, 400, "there is no voice"), ({"model": "other"}, 404, "use model"), ({"speed": 2}, 400, "speed 1"),
    ({"input": "?!"}, 400, "nothing speakable"), ({"input": ""}, 422, "input"), ({"input": "a" * 5001}, 422, "input"), ({"input": "a" * 4500}, 400, "4096"),
    ({"response_format": "ogg"}, 422, "response_format"), ({"input": 5}, 422, "input"), ({"speed": "nan"}, 422, "speed")])
def test_what_cannot_be_spoken(client, body, status, words):
    assert words in error_of(speech(client, **body), status)


def test_openai_names_for_voices_and_models_are_known(client):
    assert speech(client, voice="alloy", model="tts-1").content == speech(client, voice="alba").content
    assert client.house.service.voice("alloy").id == "alba"


def test_instructions_may_name_a_mood(client, monkeypatch):
    moods, service = [], client.house.service
    speak = service.speak
    monkeypatch.setattr(service, "speak", lambda *a, **k: (moods.append(k.get("mood")), speak(*a, **k))[1])
    speech(client, instructions="Sound happy, please.")
    speech(client, instructions="Like a pirate.")
    assert moods == ["happy", None]


@pytest.mark.parametrize("body", [b"", b"{", b'{"input": "\\ud800"}', b'{"input": NaN}', b"[" * 100_000, b'{"input": ' + b"9" * 5000 + b"}", b"\xff\xfe\x00", b'"text"', b"null"], ids=range(9))
def test_broken_json(client, body):
    for path in ("/v1/audio/speech", "/generate"):
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), answer.text
        error_of(answer, answer.status_code)


# ----------------------------------------------------------------------------- generate

def test_generate_gives_text_voice_and_latency(client):
    answer = client.post("/generate", json={"text": "Hello there.", "seed": 5}).json()
    sound, rate = read(base64.b64decode(answer["voice"]))
    assert answer["text"] == "Hello there." and answer["latency_ms"] > 0 and answer["duration_s"] == pytest.approx(len(sound) / rate, abs=1e-3)
    assert soundfile.info(io.BytesIO(base64.b64decode(answer["voice"]))).frames == len(sound) > 1920
    again, other = (client.post("/generate", json={"text": "Hello there.", "seed": seed}).json() for seed in (5, 6))
    assert again["voice"] == answer["voice"] != other["voice"]


def test_generate_can_answer_and_stream(client):
    answer = client.post("/generate", json={"text": "I lost my keys.", "reply": True}).json()
    assert answer["text"] == "You said I lost my keys. And I say so."
    streamed = client.post("/generate", json={"text": "Hello there.", "seed": 5, "streaming": True})
    assert streamed.headers["content-type"].startswith("audio/wav") and read(streamed.content)[1] == 24000
    whole = base64.b64decode(client.post("/generate", json={"text": "Hello there.", "seed": 5}).json()["voice"])
    assert streamed.content[-2000:] == whole[-2000:] and len(streamed.content) == len(whole)


def test_a_voice_of_a_request_is_used_and_not_kept(client):
    prompt = base64.b64encode(wav_bytes(TONE)).decode()
    body = {"text": "Hello there.", "seed": 5}
    plain = client.post("/generate", json=body).json()["voice"]
    with_words = client.post("/generate", json=body | {"voice_prompt": prompt, "voice_text": "my own voice."}).json()["voice"]
    assert with_words != plain
    assert client.post("/generate", json=body).json()["voice"] == plain and set(client.house.service.voices) == {v["id"] for v in client.get("/v1/audio/voices").json()["voices"]}


@pytest.mark.parametrize("prompt, words", [("***", "not base64"), ("data:,", "readable sound file"), (base64.b64encode(b"RIFFxxxx").decode(), "readable sound file"),
                                           (base64.b64encode(wav_bytes(0 * TONE)).decode(), "silent"), (base64.b64encode(wav_bytes(TONE[:500])).decode(), "at least 0.5 s"),
                                           (base64.b64encode(wav_bytes(np.zeros(24000 * 61, np.float32))).decode(), "at most 60 s")], ids=range(6))
def test_voices_that_are_none(client, prompt, words):
    answer = client.post("/generate", json={"text": "Hello.", "voice_prompt": prompt, "voice_text": "hello"})
    assert words in error_of(answer, 400)


@pytest.mark.parametrize("body", [{"text": "Hello.", "path": "/etc/passwd"}, {"text": "Hello.", "speaker": 9}, {"text": "Hello.", "temperature": 1e9}, {"text": "Hello.", "seed": -1}, {}])
def test_generate_takes_nothing_else(client, body):
    error_of(client.post("/generate", json=body), 422)
    assert "mood" in error_of(client.post("/generate", json={"text": "Hello.", "mood": "furious"}), 400)


# ----------------------------------------------------------------------------- transcribing

def test_recordings_are_written_down(client):
    sound = wav_bytes(np.concatenate([TONE, TONE]))
    for answer in (client.post("/transcribe", files={"file": ("a.wav", sound)}), client.post("/transcribe", content=sound), client.post("/v1/audio/transcriptions", files={"file": sound}, data={"model": "whisper-1"})):
        assert answer.json() == {"text": "2.0 seconds", "duration_s": 2.0}


@pytest.mark.parametrize("upload", [{"content": b""}, {"content": b"no sound" * 9}, {"files": {"other": b"x"}}, {"data": {"file": "text"}, "files": {"x": b"x"}},
                                    {"content": b"--", "headers": {"content-type": "multipart/form-data; boundary=x"}}, {"content": b"x", "headers": {"content-type": "multipart/form-data"}}], ids=range(6))
def test_what_is_no_recording(client, upload):
    error_of(client.post("/transcribe", **upload), 400)


def test_a_failing_transcriber_is_a_plain_error(make_client):
    client = make_client(transcribe=lambda audio, rate: 1 / 0)
    assert "inside the server" in error_of(client.post("/transcribe", content=wav_bytes(TONE)), 500)
    assert client.house.places.taken == 0


# ----------------------------------------------------------------------------- who may

def test_the_key_opens_and_nothing_else_does(make_client):
    client = make_client(key="s3cret")
    for path in ("/v1/models", "/v1/audio/voices", "/metrics"):
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": b"Bearer \xe9"}):
            assert "the key is missing or wrong" in error_of(client.get(path, headers=header), 401)
        assert client.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 200
    error_of(speech(client), 401)
    assert all(client.get(path).status_code == 200 for path in ("/health", "/ready", "/docs", "/openapi.json"))


def test_keys_are_compared_in_constant_time(monkeypatch):
    seen = []
    monkeypatch.setattr(serve_limits.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    assert same_key("key", "key") and not same_key("kex", "key") and not same_key("\ud800", "key") and len(seen) == 3


def test_pages_of_others_may_not_call(make_client):
    client = make_client()
    for origin, host, status in (("http://evil.example", "localhost", 403), ("http://localhost", "localhost", 200), ("null", "localhost", 403), ("", "rebound.example", 403), ("", "127.0.0.1:8000", 200)):
        answer = client.get("/v1/models", headers={"host": host} | ({"origin": origin} if origin else {}))
        assert answer.status_code == status and "access-control-allow-origin" not in answer.headers
    preflight = client.options("/v1/audio/speech", headers={"origin": "http://localhost", "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers
    friendly = make_client(key="k", allow_origin="https://friend.example")
    preflight = friendly.options("/v1/audio/speech", headers={"origin": "https://friend.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://friend.example"
    assert friendly.get("/health", headers={"origin": "https://evil.example"}).status_code == 403


def test_hosts_and_origins():
    near, far = ServeConfig(), ServeConfig(host="0.0.0.0")
    assert host_allowed("[::1]:80", near) and not host_allowed("", near) and not host_allowed("localhost.evil.example", near) and host_allowed("any.example", far)
    assert not host_allowed("any.example", ServeConfig(host="0.0.0.0", allow_host="mine.example")) and host_allowed("MINE.example:8", ServeConfig(allow_host="mine.example"))
    assert origin_allowed("", "x", near) and origin_allowed("http://localhost:8000", "localhost:8000", near) and not origin_allowed("http://localhost:1", "localhost:8000", near)


def test_answers_carry_safe_headers(client):
    headers = client.get("/health").headers
    assert headers["x-content-type-options"] == "nosniff" and "default-src 'self'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]


def test_beyond_loopback_only_with_a_key(monkeypatch):
    monkeypatch.delenv("SERVE_API_KEY", raising=False)
    with pytest.raises(ValueError, match="SERVE_API_KEY"):
        serve.the_key(ServeConfig(host="0.0.0.0"))
    assert serve.the_key(ServeConfig()) == "" and serve.the_key(ServeConfig(host="0.0.0.0", open_to_all=True)) == ""
    monkeypatch.setenv("SERVE_API_KEY", "k")
    assert serve.the_key(ServeConfig(host="0.0.0.0")) == "k"


def test_no_path_of_a_request_is_opened(client, monkeypatch):
    import builtins
    opened = []
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: (opened.append(str(file)), real(file, *a, **k))[1])
    for path in ("/static/../serve.py", "/static/..%2fserve.py", "/static//etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/serve.py"):
        assert client.get(path).status_code == 404
    speech(client, voice="/etc/passwd", model="/etc/passwd")
    client.post("/generate", json={"text": "Hello.", "voice": "/etc/passwd"})
    client.post("/transcribe", files={"file": ("/etc/passwd", b"x")})
    assert not [name for name in opened if "passwd" in name or name.endswith("serve.py")]


# ----------------------------------------------------------------------------- how much

def test_large_bodies_are_refused_before_they_are_read(make_client):
    client = make_client(max_body_mb=0.01)
    assert "0.01 MB" in error_of(client.post("/transcribe", content=b"x" * 20_000), 413)
    assert "0.01 MB" in error_of(client.post("/transcribe", content=(b"x" * 5000 for _ in range(4))), 413)          # no length is named
    assert "0.01 MB" in error_of(client.post("/generate", json={"text": "Hello.", "voice_prompt": "A" * 20_000}), 413)
    assert client.post("/transcribe", content=b"x", headers={"content-length": "-5"}).status_code in (400, 413)


def test_a_body_that_does_not_come_is_not_waited_for(make_client):
    """The rest of a body is waited for no longer than stall_seconds."""
    client = make_client(stall_seconds=0.1)
    sent = []

    async def talk():
        parts = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive():
            if parts:
                return parts.pop()
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)
        scope = {"type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b"", "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
                 "client": ("1.2.3.4", 5), "server": ("localhost", 80), "scheme": "http", "http_version": "1.1", "root_path": "", "state": {}}
        await asyncio.wait_for(client.app(scope, receive, send), 10)
    asyncio.run(talk())
    assert sent[0]["status"] == 408


def test_too_many_requests(make_client):
    client = make_client(requests_per_minute=60)
    answers = [client.get("/v1/models") for _ in range(14)]
    assert [a.status_code for a in answers[:10]] == [200] * 10 and answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1 and "wait" in error_of(answers[-1], 429)
    assert client.get("/health").status_code == 200


def test_wrong_keys_cost_as_much_as_right_ones(make_client):
    client = make_client(key="k", requests_per_minute=60)
    codes = [client.get("/v1/models", headers={"Authorization": "Bearer guess"}).status_code for _ in range(14)]
    assert codes[0] == 401 and codes[-1] == 429


def test_a_full_server_says_when_to_come_again(make_client):
    hold, client = threading.Event(), make_client(max_sessions=1, queue=0)
    client.house.service.ears.transcribe = lambda audio, rate: str(hold.wait(30))
    busy = threading.Thread(target=lambda: client.post("/transcribe", content=wav_bytes(TONE)))
    busy.start()
    while client.house.places.taken == 0:
        time.sleep(0.01)
    answer = speech(client)
    assert "all places are taken" in error_of(answer, 503) and int(answer.headers["retry-after"]) >= 1
    hold.set()
    busy.join()
    assert speech(client).status_code == 200


def test_a_broken_engine_is_a_plain_error_and_gives_its_place_back(make_client, monkeypatch):
    client = make_client()
    monkeypatch.setattr(client.house.service.engine, "speak", lambda *a: 1 / 0)
    assert "inside the server" in error_of(speech(client), 500)
    assert "inside the server" in error_of(client.post("/generate", json={"text": "Hello."}), 500)
    assert client.house.places.taken == 0 and client.get("/health").status_code == 200


# ----------------------------------------------------------------------------- conversations

class Talk:
    """A conversation by WebSocket; events and sound as they come."""

    def __init__(self, client, start=True, path="/v1/conversation", headers=None, **fields):
        self.socket, self.sound = client.websocket_connect(path, headers={"host": "localhost"} | (headers or {})), b""
        self.ws = self.socket.__enter__()
        if start:
            self.say(type="start", **({"voice": "alba"} | fields))

    def say(self, **message):
        self.ws.send_text(json.dumps(message))

    def until(self, *kinds):
        found = []
        while True:
            message = self.ws.receive()
            if message["type"] == "websocket.close":
                found.append({"type": "close", "code": message["code"], "reason": message.get("reason")})
                assert "close" in kinds, found
                return found
            if message.get("bytes") is not None:
                assert self.last["type"] == "audio" and self.last["samples"] == len(message["bytes"]) // 2
                self.sound += message["bytes"]
            else:
                found.append(json.loads(message["text"]))
                self.last = found[-1]
                if found[-1]["type"] in kinds:
                    return found

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.__exit__(*error)


def kinds(events):
    return [e["type"] for e in events if e["type"] != "audio"]


def wait_until(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_typed_conversation(client):
    with Talk(client) as talk:
        ready = talk.until("ready")[-1]
        assert ready["sample_rate"] == 24000 and ready["model"] == "model" and "alba" in ready["voices"] and len(ready["session"]) == 16
        talk.say(type="text", text="Good morning.")
        events = talk.until("reply_done")
        assert kinds(events) == ["transcript", "reply_started", "reply_text", "reply_done"]
        assert events[-1]["text"] == "You said Good morning. And I say so." and events[-1]["duration_s"] == pytest.approx(len(talk.sound) / 48000, abs=1e-3)
        talk.say(type="close")
        assert talk.until("close")[-1]["code"] == 1000
    wait_until(lambda: client.house.places.taken == 0 and not client.house.conversations)


def test_a_spoken_conversation_with_a_real_voice(client):
    from audio_io import read_audio
    voice = read_audio(ROOT / "pretrained/voices/voice_1.flac", 16000)[:32000]
    pcm = to_pcm(np.concatenate([np.zeros(8000, np.float32), voice, np.zeros(24000, np.float32)]))
    with Talk(client, sample_rate=16000) as talk:
        talk.until("ready")
        for at in range(0, len(pcm), 3200):
            talk.ws.send_bytes(pcm[at:at + 3200] + b"\x01")                   # an odd number of bytes is somebody's fault, and no end of the world
        events = talk.until("reply_done")
        assert [k for k in kinds(events) if k != "partial_transcript"] == ["speech_started", "speech_stopped", "transcript", "reply_started", "reply_done"]
        assert len(talk.sound) > 3840


def test_an_interrupted_reply(client):
    with Talk(client) as talk:
        talk.say(type="text", text="Tell me.")
        talk.until("audio")
        talk.say(type="cancel")
        stopped = talk.until("interrupted")[-1]
        assert stopped["turn"] == 1 and stopped["heard_ms"] >= 0
        talk.say(type="played", ms=0)
        talk.say(type="text", text="And now?")
        events = talk.until("reply_done")
        assert events[-1]["turn"] == 2 and all(e["turn"] == 2 for e in events if e["type"] == "audio"), "sound of a reply that was stopped came after it"
        live, = client.house.conversations
        assert [t.text for t in live.session.turns][:2] == ["tell me.", "and now?"]


@pytest.mark.parametrize("message, words", [({"type": "text", "text": ""}, "text"), ({"type": "text", "text": "?!"}, "nothing speakable"), ({"type": "text", "text": "a" * 4500}, "4096"),
                                            ({"type": "text"}, "text"), ({"type": "sing"}, "no known type"), ({"type": ["text"]}, "no known type"), ({}, "no known type"), ([1], "no known type"),
                                            ({"type": "played", "ms": -1}, "ms"), ({"type": "voice", "voice": "nobody"}, "there is no voice"), ({"type": "start"}, "has begun"),
                                            ({"type": "voice_prompt", "audio": "***"}, "base64"), ({"type": "cancel", "more": 1}, "more"), ({"type": "text", "text": "\ud800"}, "text")], ids=range(14))
def test_bad_messages_are_answered_and_survived(client, message, words):
    with Talk(client) as talk:
        talk.until("ready")
        talk.ws.send_text(json.dumps(message))
        error = talk.until("error")[-1]
        assert words in error["message"] and error["code"] and "\n" not in error["message"]
        talk.say(type="ping")
        assert talk.until("pong")


@pytest.mark.parametrize("text", ["{", "", "null", "9" * 5000, "[" * 50_000], ids=range(5))
def test_frames_that_are_no_json_are_survived(client, text):
    with Talk(client) as talk:
        talk.until("ready")
        talk.ws.send_text(text)
        assert talk.until("error")
        talk.ws.send_bytes(b"")
        talk.ws.send_bytes(b"\x01")
        talk.say(type="ping")
        assert talk.until("pong")


@pytest.mark.parametrize("first", [{"type": "text", "text": "Hello."}, {"type": "start", "sample_rate": 8000}, {"type": "start", "voice": "nobody"}, {"type": "start", "responder": "command"}, b"\0\0"], ids=range(5))
def test_a_wrong_beginning_ends_it(client, first):
    with Talk(client, start=False) as talk:
        talk.ws.send_bytes(first) if isinstance(first, bytes) else talk.say(**first)
        events = talk.until("close")
        assert kinds(events) == ["error", "close"] and events[-1]["code"] == 1008
    wait_until(lambda: client.house.places.taken == 0)


def test_voices_stay_in_their_conversation(make_client):
    client = make_client(max_voices=1)
    prompt = {"type": "voice_prompt", "audio": base64.b64encode(wav_bytes(TONE)).decode(), "text": "my own voice."}
    with Talk(client) as talk, Talk(client) as other:
        talk.say(**prompt)
        assert talk.until("voice_set")[-1] == {"type": "voice_set", "voice": "upload", "text": "my own voice."}
        talk.say(**prompt)
        assert talk.until("error")[-1]["code"] == "too_many_voices"
        for one in (talk, other):
            one.say(type="text", text="Hello.")
            one.until("reply_done")
        texts = sorted(live.session.voices[1].text for live in client.house.conversations)
        assert texts == ["everybody may breathe. who can spot a yellow car?", "my own voice."]
        talk.say(type="voice", voice="bruna")
        assert talk.until("voice_set")[-1]["voice"] == "bruna"
        talk.say(type="reset")
        talk.say(type="text", text="Hello.")
        assert talk.until("reply_done")[-1]["turn"] == 1


def test_the_key_of_a_conversation(make_client):
    client = make_client(key="s3cret")
    for how in ({"headers": {"Authorization": "Bearer s3cret"}}, {"path": "/v1/conversation?key=s3cret"}):
        with Talk(client, **how) as talk:
            assert talk.until("ready")
    with Talk(client, start=False) as talk:
        talk.say(type="auth", key="s3cret")
        talk.say(type="start")
        assert talk.until("ready")
    for wrong in ({"type": "auth", "key": "guess"}, {"type": "auth", "key": 5}, {"type": "auth"}, {"type": "start"}):
        with Talk(client, start=False) as talk:
            talk.say(**wrong)
            events = talk.until("close")
            assert events[0]["code"] == "key" and events[-1]["code"] == 1008
    with Talk(client, start=False, path="/v1/conversation?key=guess") as talk:
        assert talk.until("close")[-1]["code"] == 1008


def test_pages_of_others_cannot_converse(client):
    with pytest.raises(starlette.WebSocketDisconnect):
        with client.websocket_connect("/v1/conversation", headers={"host": "localhost", "origin": "http://evil.example"}) as ws:
            ws.receive_text()


def test_a_full_house_turns_conversations_away(make_client):
    client = make_client(max_sessions=1, queue=0)
    with Talk(client) as talk:
        talk.until("ready")
        with Talk(client, start=False) as other:
            events = other.until("close")
            assert events[0]["code"] == "full" and events[-1]["code"] == 1013 and "all places are taken" in events[-1]["reason"]
    wait_until(lambda: client.house.places.taken == 0)


@pytest.mark.parametrize("settings, code", [({"idle_seconds": 0.3}, "idle"), ({"session_minutes": 0.005}, "too_long"), ({"session_mb": 1e-6}, "memory")])
def test_conversations_end_that_are_idle_or_too_long_or_too_large(make_client, settings, code):
    client = make_client(**settings)
    with Talk(client) as talk:
        talk.until("ready")
        talk.ws.send_bytes(b"\0\0" * 2400)                                    # silence is no sign of life
        events = talk.until("close")
        assert events[-2]["code"] == code
    wait_until(lambda: not client.house.conversations)


def test_a_conversation_that_is_cut_leaves_nothing_behind(client):
    before = threading.active_count()
    for _ in range(3):
        with Talk(client) as talk:
            talk.say(type="text", text="Tell me.")
            talk.until("audio")
        wait_until(lambda: client.house.places.taken == 0 and not client.house.conversations)
    assert [t.name for t in threading.enumerate()].count("conversation") == 0 and threading.active_count() <= before + 3 * client.house.cfg.max_sessions


def test_a_conversation_that_is_over_is_freed_at_once(client):
    """Its buffers are tens of MB in a real model: they may not wait for the collector of cycles."""
    import gc
    import weakref
    gc.collect()
    gc.disable()
    try:
        with Talk(client) as talk:
            talk.say(type="text", text="Tell me.")
            talk.until("reply_done")
            live, = client.house.conversations
            seen = [weakref.ref(live.session._spare), weakref.ref(live.session), weakref.ref(live)]
            del live
        wait_until(lambda: not client.house.conversations)
        wait_until(lambda: not any(ref() for ref in seen[:1]))
        wait_until(lambda: not any(ref() for ref in seen))
    finally:
        gc.enable()


def test_a_closing_server_lets_replies_end(make_client):
    client = make_client()
    with Talk(client) as talk:
        talk.say(type="text", text="Tell me.")
        talk.until("audio")
        assert client.house.busy
        client.house.close_doors()
        assert client.get("/ready").status_code == 503
        error_of(speech(client), 503)
        events = talk.until("close")
        assert "reply_done" in kinds(events) and events[-2]["code"] == "closing" and events[-1]["code"] == 1012
    assert not client.house.busy


def test_the_page_talks_with_this_server(lab):
    """A real Chromium: typed, answered, heard to its end, and nothing to complain about."""
    playwright, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here: apt-get install chromium")
    from serve_app import make_app
    from service import Service
    cfg, complaints = ServeConfig(port=0), []
    server = serve.make_server(make_app(Service(lab, Says(), cfg, LiveConfig(user_sound=False), EndpointConfig(), transcribe=lambda audio, rate: "words")), cfg)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        with playwright.sync_playwright() as run, run.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]) as browser:
            page = browser.new_page()
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
            page.goto(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
            page.fill("#text", "good morning.")
            page.press("#text", "Enter")
            page.wait_for_selector(".turn.voice .again", timeout=60_000)
            assert page.inner_text(".turn.voice .words") == "You said good morning. And I say so."
            page.goto(page.url.rstrip("/") + "/docs")
            page.wait_for_selector('[data-path="/v1/audio/speech"]', timeout=60_000)
    finally:
        server.should_exit = True
        thread.join(30)
    assert complaints == []


# ----------------------------------------------------------------------------- a process

@pytest.fixture(scope="module")
def process(weights):
    """(address, process) of a real server with a key."""
    running = subprocess.Popen([sys.executable, "serve.py", *weights, "--port", "0", "--grace_seconds", "20", "--responder", "command", "--responder_command", "echo So it is, and so it was. And more."],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"SERVE_API_KEY": "k"})
    line = running.stdout.readline()
    found = re.search(r"at (http://\S+)", line)
    assert found, line + running.stderr.read()
    yield found.group(1), running
    running.kill()
    running.wait()


def test_openais_own_client(process):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=process[0] + "/v1", api_key="k", max_retries=0)
    assert [m.id for m in client.models.list()] == ["model"]
    with client.audio.speech.with_streaming_response.create(model="model", voice="alba", input="Hello there.", response_format="wav") as answer:
        pieces = list(answer.iter_bytes(4096))
    assert len(pieces) > 1 and read(b"".join(pieces))[1] == 24000
    assert len(client.audio.speech.create(model="tts-1", voice="alloy", input="Hello there.").content) > 300          # mp3, its default
    assert isinstance(client.audio.transcriptions.create(model="whisper-1", file=("a.wav", wav_bytes(TONE))).text, str)
    with pytest.raises(openai.BadRequestError, match="there is no voice"):
        client.audio.speech.create(model="model", voice="nobody", input="Hello.")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=process[0] + "/v1", api_key="wrong", max_retries=0).models.list()


def test_a_client_that_leaves_gives_its_place_back(process):
    import requests
    head = {"Authorization": "Bearer k"}
    with requests.post(process[0] + "/v1/audio/speech", json={"input": "Hello there, my friend. " * 100, "response_format": "pcm"}, headers=head, stream=True) as answer:
        next(answer.iter_content(1000))
    wait_until(lambda: requests.get(process[0] + "/ready").json()["sessions"] == 0)


def test_sigterm_lets_the_turn_end(process):
    """The last test of the process: it ends with exit code 0, after the reply was heard."""
    import websockets.sync.client
    address, running = process
    with websockets.sync.client.connect(address.replace("http", "ws") + "/v1/conversation?key=k") as ws:
        ws.send(json.dumps({"type": "start", "voice": "alba"}))
        ws.send(json.dumps({"type": "text", "text": "Hello."}))
        kinds = []
        while "audio" not in kinds:
            message = ws.recv(timeout=60)
            kinds += [json.loads(message)["type"]] if isinstance(message, str) else []
        running.send_signal(signal.SIGTERM)
        with pytest.raises(websockets.ConnectionClosed):
            while True:
                message = ws.recv(timeout=60)
                kinds += [json.loads(message)["type"]] if isinstance(message, str) else []
    assert "reply_done" in kinds and kinds[-1] == "error"
    assert running.wait(30) == 0
    assert "Traceback" not in running.stderr.read()


def test_a_port_that_is_taken_is_one_line(lab, weights, monkeypatch, capsys):
    import socket
    from service import Service
    monkeypatch.setattr(serve, "load", lambda args: Service(lab, Says(), ServeConfig(), LiveConfig(), EndpointConfig(), transcribe=lambda audio, rate: ""))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert serve.main([*weights, "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cannot listen on 127.0.0.1") and "choose another --port" in error


def test_sound_comes_back_as_it_went(client):
    assert from_pcm(to_pcm(TONE)).dtype == np.int16 and abs(from_pcm(to_pcm(TONE)) / 32768 - TONE).max() < 1e-4
