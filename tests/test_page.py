"""The web page in a real Chromium, with a fake microphone, against a small server that speaks the documented protocol.

Skipped with a reason where Chromium or playwright is not installed. Nothing is downloaded; every request is to this machine.
"""
import asyncio
import json
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from audio_io import read_audio, resample, write_audio

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "static"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOICES = [{"id": "alba", "name": "Alba", "description": "Bright and quick."}, {"id": "rowan", "name": "Rowan", "description": "Low and slow."}]
SECONDS = 2.4       # of a reply of the fake server
WAIT = 20000        # ms; only a busy machine needs more than a moment

pytestmark = pytest.mark.slow


# ----------------------------------------------------------------------------- a server that follows the protocol

class Fake:
    """Answers every turn with a tone, sent faster than it is played; hears speech by its loudness. Keeps what the page sent."""

    def __init__(self, key: str = "", pace: float = 0.5):
        self.key, self.pace = key, pace                  # pace: seconds of waiting per second of sound sent
        self.messages, self.heard_bytes, self.connections = [], 0, 0

    def of(self, kind: str) -> list[dict]:
        return [m for m in self.messages if m["type"] == kind]

    def app(self):
        from starlette.applications import Starlette
        from starlette.responses import FileResponse, JSONResponse
        from starlette.routing import Mount, Route, WebSocketRoute
        from starlette.staticfiles import StaticFiles

        async def page(request):
            return FileResponse(STATIC / "index.html")

        async def voices(request):
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "unauthorized"}}, 401)
            return JSONResponse({"voices": VOICES})
        return Starlette(routes=[Route("/", page), Route("/v1/audio/voices", voices), WebSocketRoute("/v1/conversation", self.converse),
                                 Mount("/static", StaticFiles(directory=STATIC))])

    async def converse(self, ws):
        await ws.accept()
        self.connections += 1
        session = FakeSession(self, ws)
        try:
            while True:
                event = await ws.receive()
                if event["type"] == "websocket.disconnect":
                    break
                if event.get("bytes") is not None:
                    self.heard_bytes += len(event["bytes"])
                    await session.hear(np.frombuffer(event["bytes"], np.int16))
                else:
                    message = json.loads(event["text"])
                    self.messages.append(message)
                    if await session.obey(message) is False:
                        break
        finally:
            session.stop()


class FakeSession:
    def __init__(self, server: Fake, ws):
        self.server, self.ws, self.turn, self.task, self.allowed = server, ws, 0, None, not server.key
        self.speaking, self.loud, self.quiet = False, 0, 0

    async def tell(self, kind: str, **more):
        await self.ws.send_text(json.dumps({"type": kind} | more))

    async def obey(self, message):
        kind = message["type"]
        if kind == "auth":
            self.allowed = message["key"] == self.server.key
        elif not self.allowed:
            await self.tell("error", code="key", message="the key is missing or wrong")
            await self.ws.close(1008)
            return False
        elif kind == "start":
            await self.tell("ready", session="s1", sample_rate=24000, voices=[v["id"] for v in VOICES], model="fake")
        elif kind == "text" and message["text"] == "break":
            await self.tell("error", code="text_too_odd", message="This text cannot be spoken: write words.")
        elif kind == "text" and message["text"] == "vanish":
            await self.tell("error", code="busy", message="All places are taken: try again in a minute.")
            await self.ws.close(1013)
            return False
        elif kind == "text" and message["text"] == "fall":
            await self.ws.close(1011)
            return False
        elif kind == "text":
            self.turn += 1
            await self.answer(f"You wrote {message['text']}, and I answer at some length.")
        elif kind == "end_of_turn":
            await self.understood()
        elif kind == "voice":
            await self.tell("voice_set", voice=message["voice"])
        elif kind in ("cancel", "reset"):
            await self.interrupt()

    async def answer(self, text: str):
        self.stop()
        self.task = asyncio.create_task(self.speak(self.turn, text))

    def stop(self):
        if self.task:
            self.task.cancel()

    async def interrupt(self):
        if self.task and not self.task.done():
            self.stop()
            await self.tell("interrupted", turn=self.turn, heard_ms=700, text="And this")

    async def speak(self, turn: int, text: str):
        await self.tell("reply_started", turn=turn, text=text)
        tone = (0.3 * 32767 * np.sin(2 * np.pi * 220 * np.arange(int(SECONDS * 24000)) / 24000)).astype(np.int16)
        for block in np.array_split(tone, int(SECONDS / 0.08)):
            await self.tell("audio", turn=turn, samples=len(block))
            await self.ws.send_bytes(block.tobytes())
            await asyncio.sleep(len(block) / 24000 * self.server.pace)
        await self.tell("reply_done", turn=turn, text=text, latency_ms={"first_audio": 41.0, "total": 900.0}, duration_s=SECONDS,
                        memory={"context_positions": 312 + turn, "slots": turn, "context_limit": 2048})

    async def hear(self, pcm):
        """Voice activity by loudness; 0.6 s of silence end a turn."""
        loud = np.abs(pcm.astype(float)).max() > 1500
        self.loud, self.quiet = (self.loud + 1, 0) if loud else (self.loud, self.quiet + len(pcm) / 24000)
        if not self.speaking and self.loud > 3:
            self.speaking = True
            await self.tell("speech_started")
            await self.interrupt()
        if self.speaking and self.quiet > 0.6:
            await self.tell("speech_stopped", ms=600)
            await self.understood()

    async def understood(self):
        self.speaking, self.loud = False, 0
        self.turn += 1
        await self.tell("partial_transcript", text="hello")
        await self.tell("transcript", text=f"Hello number {self.turn}.", turn=self.turn)
        await self.answer("And this is what I say to that, which is not short.")


@pytest.fixture
def serve():
    """serve(key="...") -> (address, Fake); all are stopped at the end."""
    uvicorn = pytest.importorskip("uvicorn", reason="the page's test server needs uvicorn")
    running = []

    def start(**how):
        fake = Fake(**how)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(fake.app(), host="127.0.0.1", port=port, log_level="critical", lifespan="off", ws="websockets-sansio"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.02)
        return f"http://127.0.0.1:{port}", fake
    yield start
    for server, thread in running:
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture
def real_server(tmp_path):
    """serve.py's own application with a tiny untrained model; its address."""
    uvicorn = pytest.importorskip("uvicorn")
    serve = pytest.importorskip("serve")
    import checkpoint
    from architecture import CSM
    from config import CodecConfig, model_preset
    from rvq_tokenizer import Codec
    from serve_app import make_app
    codec = Codec(CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1, latent_layers=1,
                              decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20))
    model = CSM(model_preset("test"))
    model.init_weights()
    checkpoint.save_codec(codec, tmp_path / "codec")
    checkpoint.save_pretrained(model, tmp_path / "model", codec_fingerprint=codec.fingerprint)
    service = serve.load(serve.build_parser().parse_args(["--checkpoint", str(tmp_path / "model"), "--codec", str(tmp_path / "codec"), "--device", "cpu", "--max_seconds", "1.5"]))
    server = uvicorn.Server(uvicorn.Config(make_app(service, "secret"), host="127.0.0.1", port=0, log_level="critical", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(20)


# ----------------------------------------------------------------------------- a browser

@pytest.fixture(scope="module")
def microphone(tmp_path_factory):
    """What the fake microphone hears: silence, a sentence, a pause in which an answer begins, another sentence, silence."""
    speech = read_audio(ROOT / "pretrained/nano/samples/item_03.ogg")[:int(1.5 * 24000)]
    speech = speech / np.abs(speech).max() * 0.7
    quiet = np.zeros(24000, np.float32)
    path = tmp_path_factory.mktemp("microphone") / "speech.wav"
    write_audio(path, resample(np.concatenate([quiet, speech, quiet, quiet[:18000], speech, np.tile(quiet, 20)]), 24000, 48000), 48000)
    return path


@pytest.fixture(scope="module")
def browser(microphone):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright (no browser download is needed)")
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as run:
        flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}%noloop",
                 "--autoplay-policy=user-gesture-required", "--no-sandbox", "--disable-dev-shm-usage"]
        chromium = run.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page whose errors and requests are watched: none may fail, none may leave this machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, permissions=["microphone"])
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    tab.errors, tab.hosts, tab.allowed_errors = [], set(), ()
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.on("console", lambda line: tab.errors.append(line.text) if line.type in ("error", "warning") else None)
    tab.on("request", lambda request: tab.hosts.add(re.sub(r"^(\w+)://([^/:]*).*", r"\1 \2", request.url)))
    tab.on("websocket", lambda ws: tab.hosts.add(re.sub(r"^(\w+)://([^/:]*).*", r"\1 \2", ws.url)))
    yield tab
    context.close()
    assert [e for e in tab.errors if not any(a in e for a in tab.allowed_errors)] == []
    assert {host.split()[-1] for host in tab.hosts if not host.startswith("data")} <= {"127.0.0.1"}


def state(page, *wanted: str) -> None:
    until(page, f"{list(wanted)}.includes(document.body.dataset.state)")


def wait(what, seconds: float = WAIT / 1000):
    """Until what() is true; its value."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return value


def until(page, condition: str) -> None:
    """Until the JavaScript expression is true. (playwright's own waiting evaluates text inside the page, which its policy forbids.)"""
    wait(lambda: page.evaluate(condition))


# ----------------------------------------------------------------------------- turns

def test_a_typed_turn_is_heard_seen_and_measured(page, serve):
    address, fake = serve()
    page.goto(address)
    page.fill("#text", "good morning")
    page.press("#text", "Enter")
    page.wait_for_selector(".turn.you .words:has-text('good morning')")
    state(page, "speaking")
    until(page, "document.querySelector('.turn.voice .about').textContent.includes('2.40 s long')")
    page.wait_for_selector(".turn.voice .again")
    played = wait(lambda: fake.of("played"))[0]["ms"]
    assert abs(played - 1000 * SECONDS) < 30                                 # every sample went to the loudspeaker
    assert page.inner_text(".turn.voice .words") == "You wrote good morning, and I answer at some length."
    assert "model 0.04 s" in page.inner_text(".turn.voice .about") and "first sound after" in page.inner_text(".turn.voice .about")
    assert page.inner_text("#memory_about") == "313 of 2,048 positions, 1 memory slot"
    assert page.evaluate("document.querySelector('#memory').value") == 313
    assert re.fullmatch(r"\d\.\d\d s", page.inner_text("#latency_now"))
    assert fake.of("start")[0]["voice"] == "alba" and fake.of("start")[0]["sample_rate"] == 24000


RENDER = """async ([rate, pieces, silence]) => {
  const context = new OfflineAudioContext(1, rate * 3, rate);
  await context.audioWorklet.addModule("static/worklet.js");
  const node = new AudioWorkletNode(context, "speaker", {numberOfInputs: 0, outputChannelCount: [1]}), told = [];
  node.port.onmessage = (event) => { if (event.data.kind !== "level") told.push(event.data); };
  node.connect(context.destination);
  for (const piece of pieces) node.port.postMessage({turn: 1, samples: Float32Array.from(piece)});
  node.port.postMessage({end: 1});
  if (silence) context.suspend(silence).then(() => { node.port.postMessage({silence: true}); setTimeout(() => context.resume(), 200); });
  await new Promise((done) => setTimeout(done, 200));
  const sound = await context.startRendering();
  await new Promise((done) => setTimeout(done, 100));
  return [Array.from(sound.getChannelData(0)), told];
}"""


def render(page, address: str, rate: int, silence: float = 0.0):
    """What the worklet plays of a tone of 1.2 s in pieces of odd lengths, (N,), and what it reports."""
    page.goto(address)
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(28800) / 24000)
    cuts = np.sort(np.random.default_rng(0).integers(0, len(tone), 17))
    sound, told = page.evaluate(RENDER, [rate, [piece.tolist() for piece in np.split(tone, cuts) if len(piece)], silence])
    return np.array(sound), told


@pytest.mark.parametrize("rate", [24000, 44100, 48000])
def test_the_loudspeaker_plays_without_gaps_or_clicks(page, serve, rate):
    address, _ = serve()
    sound, told = render(page, address, rate)
    loud = np.flatnonzero(np.abs(sound) > 1e-3)
    inside = sound[loud[0]:loud[-1]]
    assert abs(len(inside) / rate - 1.2) < 0.005 and [t["kind"] for t in told] == ["started", "ended"] and told[1]["heard"] == pytest.approx(1.2, abs=1e-3)
    assert np.lib.stride_tricks.sliding_window_view(np.abs(inside), rate // 330).max(axis=1).min() > 0.28      # a peak in every 3 ms
    assert np.abs(np.diff(inside)).max() < 1.05 * 0.3 * 2 * np.pi * 220 / rate


def test_the_loudspeaker_falls_silent_quickly_without_a_click(page, serve):
    address, _ = serve()
    sound, told = render(page, address, 24000, silence=0.512)
    after = np.flatnonzero(np.abs(sound) > 1e-6)[-1] / 24000
    assert 0.512 <= after < 0.53 and told[-1]["kind"] == "stopped" and told[-1]["heard"] == pytest.approx(after, abs=0.006)
    assert np.abs(np.diff(sound)).max() < 1.5 * 0.3 * 2 * np.pi * 220 / 24000


def test_a_spoken_turn_and_breaking_in(page, serve):
    """The fake microphone speaks, the page hears the answer, and the second sentence makes it fall silent."""
    address, fake = serve(pace=1.0)
    page.goto(address)
    page.click("#mic")
    state(page, "listening")
    page.wait_for_selector(".turn.you .words:has-text('Hello number 1.')")
    page.wait_for_selector(".turn.voice .words s")                           # the second sentence came over the answer: what was not heard is struck out
    wait(lambda: fake.of("played"))
    assert fake.of("played")[0]["ms"] < 1000 * SECONDS - 200                 # it stopped early
    assert page.inner_text(".turn.voice >> nth=0 >> .words").startswith("And this") and "stopped after 0.70 s" in page.inner_text(".turn.voice >> nth=0 >> .about")
    page.wait_for_selector(".turn.you .words:has-text('Hello number 2.')")
    until(page, "document.querySelectorAll('.turn.voice .about')[1]?.textContent.includes('2.40 s long')")
    assert fake.heard_bytes > 4 * 48000
    page.click("#mic")
    state(page, "ready")
    page.wait_for_timeout(400)                                               # what was on its way when the button was pressed arrives
    before = fake.heard_bytes
    page.wait_for_timeout(400)
    assert fake.heard_bytes == before                                        # off is off


def test_hold_to_talk_sends_only_while_held(page, serve):
    address, fake = serve()
    page.goto(address)
    page.check("input[value=hold]")
    page.focus("#mic")
    page.keyboard.down("Space")
    wait(lambda: fake.heard_bytes)
    page.keyboard.up("Space")
    wait(lambda: fake.of("end_of_turn"))
    before = fake.heard_bytes
    page.wait_for_selector(".turn.voice")
    assert fake.heard_bytes == before


def test_escape_stops_the_voice(page, serve):
    address, fake = serve(pace=1.0)
    page.goto(address)
    page.fill("#text", "talk long")
    page.press("#text", "Enter")
    state(page, "speaking")
    page.keyboard.press("Escape")
    wait(lambda: fake.of("cancel") and fake.of("played"))
    assert fake.of("played")[0]["ms"] < 1000 * SECONDS - 200
    state(page, "ready")


def test_with_the_real_server(page, real_server):
    """Key, typed turn, another voice, a recording, silence: nothing that one side says is unknown to the other."""
    page.allowed_errors = ("401",)
    page.goto(real_server)
    page.wait_for_selector("#key_form:visible")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("#voice option[value=alba]", state="attached")
    assert page.input_value("#voice") == "alba"
    page.click("text=How was your day?")
    page.wait_for_selector(".turn.voice .again")
    assert "first sound after" in page.inner_text(".turn.voice .about") and "positions" in page.inner_text("#memory_about")
    page.select_option("#voice", "bruna")
    page.set_input_files("#upload", str(ROOT / "pretrained/voices/voice_2.flac"))
    page.fill("#text", "And now?")
    page.press("#text", "Enter")
    page.wait_for_selector(".turn.voice >> nth=1 >> .again")
    assert page.is_hidden("#alert") and len(page.query_selector_all(".turn.you")) == 2


# ----------------------------------------------------------------------------- voices, keys, errors

def test_a_recording_becomes_the_voice(page, serve, microphone):
    address, fake = serve()
    page.goto(address)
    page.set_input_files("#upload", str(ROOT / "pretrained/nano/samples/item_01.ogg"))
    page.wait_for_selector("#voice option[value=upload]", state="attached")
    assert page.input_value("#voice") == "upload" and page.inner_text("#status").startswith("The next answers")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    sent = wait(lambda: fake.of("voice_prompt"))[0]
    import base64
    assert base64.b64decode(sent["audio"]) == (ROOT / "pretrained/nano/samples/item_01.ogg").read_bytes() and sent["text"] is None


def test_another_voice_is_asked_for(page, serve):
    address, fake = serve()
    page.goto(address)
    page.wait_for_selector("#voice option[value=rowan]", state="attached")
    page.select_option("#voice", "rowan")
    assert page.inner_text("#voice_about") == "Low and slow."
    page.click("text=How was your day?")
    page.wait_for_selector(".turn.voice .again")
    assert fake.of("start")[0]["voice"] == "rowan"
    page.select_option("#voice", "alba")                                     # within the conversation
    assert wait(lambda: fake.of("voice")) == [{"type": "voice", "voice": "alba"}] and fake.connections == 1


def test_a_server_with_a_key_asks_for_it(page, serve):
    address, fake = serve(key="secret")
    page.allowed_errors = ("401",)
    page.goto(address)
    page.wait_for_selector("#key_form:visible")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#alert:has-text('does not know this key')")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("#key_form", state="hidden")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    page.wait_for_selector(".turn.voice")
    assert fake.messages[0] == {"type": "auth", "key": "secret"}


def test_errors_say_what_to_do(page, serve):
    address, fake = serve()
    page.goto(address)
    page.fill("#text", "break")
    page.press("#text", "Enter")
    page.wait_for_selector("#alert:has-text('This text cannot be spoken: write words.')")
    page.fill("#text", "vanish")
    page.press("#text", "Enter")
    state(page, "lost")
    assert page.inner_text("#alert_text") == "All places are taken: try again in a minute."      # the reason is not covered by "the connection ended"
    page.fill("#text", "fall")
    page.press("#text", "Enter")
    page.wait_for_selector("#alert:has-text('The connection ended. Speak or write to begin a new conversation.')")
    page.fill("#text", "back")
    page.press("#text", "Enter")
    page.wait_for_selector(".turn.voice:has-text('You wrote back')")
    assert fake.connections == 3


def test_without_a_microphone_it_says_so(page, serve):
    address, _ = serve()
    page.goto(address)
    page.evaluate("() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', 'NotAllowedError')); }")
    page.click("#mic")
    page.wait_for_selector("#alert:has-text('may not use the microphone')")
    assert page.get_attribute("#mic", "aria-pressed") == "false"


# ----------------------------------------------------------------------------- for everyone

def test_everything_can_be_done_by_keyboard(page, serve):
    """Tab reaches every control, in the order in which they are seen; a turn is spoken, stopped and heard again without a mouse."""
    address, fake = serve(pace=1.0)
    page.goto(address)
    page.wait_for_selector("#voice option[value=alba]", state="attached")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("good day")
    page.keyboard.press("Enter")
    state(page, "speaking")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Enter")
    wait(lambda: fake.of("cancel"))
    seen = []
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        if seen[-1] == "mic":
            page.keyboard.press("Tab")
    assert seen[0] == "send" and {"voice", "upload", "mode", "announce", "reset"} <= set(seen)


def test_a_screen_reader_finds_names_for_everything(page, serve):
    address, _ = serve()
    page.goto(address)
    page.wait_for_selector("#voice option[value=alba]", state="attached")
    nameless = page.evaluate("""[...document.querySelectorAll('button, input, select, meter, canvas')].filter((e) => !e.closest('[hidden]')
      && !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim() || e.getAttribute('aria-describedby'))).map((e) => e.outerHTML)""")
    assert nameless == []
    assert page.get_attribute("#status", "aria-live") == "polite" and page.get_attribute("#alert", "role") == "alert"
    assert page.is_visible("#synthetic") and "synthetic" in page.inner_text("#synthetic")
    page.click("#mic")
    until(page, "document.querySelector('#status').textContent === 'Listening'")
    assert page.get_attribute("#mic", "aria-pressed") == "true" and page.inner_text("#mic_text") == "Turn the microphone off"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_can_be_read(page, serve, width, scheme):
    """No sideways scrolling, and every text stands out from its background by WCAG's 4.5 to 1."""
    address, _ = serve()
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    page.wait_for_selector(".turn.voice .again")
    page.evaluate("document.querySelector('#panel').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
  const parts = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = parts(c).map((v) => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor, p = parts(c); if (p.length < 4 || p[3] > 0) return c; } return 'rgb(255,255,255)'; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('.hidden, .skip')) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))], ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.textContent.trim().slice(0, 30)}`);
  }
  return bad;
}"""


# ----------------------------------------------------------------------------- files

def test_the_page_needs_nothing_from_elsewhere():
    """No address of another host in any file, and a policy that would forbid it."""
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+", text), path.name
    assert "default-src 'none'" in (STATIC / "index.html").read_text() and sum(p.stat().st_size for p in STATIC.iterdir()) < 100_000
