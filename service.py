"""What the server does, without HTTP: voices, one text spoken, one conversation begun. Holds the model, the engine and the ears."""
from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from audio_io import SAMPLE_RATE, resample
from batching import BatchingEngine, EngineFull
from config import MOODS, BatchingConfig, LiveConfig
from demo import PIECE, Lab, check_mood, check_text, shipped_voices, speakable, written_voice
from generation import PROMPT_SECONDS, Session, codes_of_sound, split_text
from live import MODEL, NAMES, USER, Ears, LiveConversation, one_by_one, sentences
from runtime import ROOT
from serve_limits import Refused, ServeConfig
from speech_formats import decode
from text_tokenizer import sentence_case
from watermark import PUBLIC_KEY, Marker

# OpenAI's names, so that programs which know no others can speak: they are names here, and no likeness.
ALIASES = {"alloy": "alba", "nova": "alba", "shimmer": "greta", "coral": "greta", "sage": "ida", "ballad": "ida", "echo": "emil", "onyx": "emil", "ash": "fritz",
           "verse": "fritz", "fable": "bruna"}
MODEL_ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
# Recordings that are shipped, by their place in pretrained/voices; and characters that the embedded text-to-speech speaks at start.
RECORDED = {"alba": (0, "clear, a little bright"), "bruna": (1, "lower, calm"), "dana": (3, "soft, even")}
CHARACTERS = {"emil": (dict(size=0.77, pitch=-1.2, tilt=-1.0), "deep, slow", dict(pace=0.06)), "fritz": (dict(size=0.84, pitch=-0.6, range=0.15), "low, lively", {}),
              "greta": (dict(size=1.05, pitch=0.3, range=0.1, pace=-0.06), "high, quick", {}), "ida": (dict(size=0.95, breath=2.5, tilt=-1.2), "warm, breathy", {})}
SAMPLE_TEXT = "Good morning. I hope you slept well, because we have a long and lovely day ahead of us."


@dataclass
class Voice:
    """A named voice: arguments of Session.set_voice, codes instead of sound, so that nothing is encoded twice."""
    id: str
    description: str
    arguments: dict


def as_codes(model, codec, recording: dict) -> dict:
    """Arguments of Session.set_voice with the sound replaced by its codes (K, T)."""
    sound = torch.as_tensor(recording["audio"][:int(PROMPT_SECONDS * SAMPLE_RATE)]).view(1, 1, -1).to(next(model.parameters()).device)
    codes = codes_of_sound(model.cfg, codec, sound)[:model.cfg.num_codebooks].long().cpu()
    return {name: value for name, value in recording.items() if name != "audio"} | {"codes": codes}


def named_voices(model, codec, folder: Path = ROOT / "pretrained" / "voices") -> dict[str, Voice]:
    """The shipped recordings and the characters of the embedded text-to-speech, as far as they can be had here."""
    recordings, voices = shipped_voices(folder), {}
    for name, (place, words) in RECORDED.items():
        if place < len(recordings):
            voices[name] = Voice(name, f"a recording of the default data: {words}", as_codes(model, codec, recordings[place]))
    for name in CHARACTERS:
        try:
            voices[name] = Voice(name, f"a character of the embedded text-to-speech: {CHARACTERS[name][1]}", as_codes(model, codec, spoken_character(name, codec)))
        except (ImportError, OSError, ValueError):
            continue                                             # the text-to-speech is not installed: the recordings are enough
    return voices


def spoken_character(name: str, codec) -> dict:
    """SAMPLE_TEXT in the voice of one of CHARACTERS, with how far the text is read by the end of each frame."""
    import synthetic_conversations as synthetic
    from dataset_pipeline import consumed_bytes
    from text_tokenizer import normalise
    shape, _, more = CHARACTERS[name]
    said, text = synthetic.speak(SAMPLE_TEXT, synthetic.Character(name, "hibari", **(shape | more))), normalise(SAMPLE_TEXT)
    frames = -(-len(said.audio) // codec.cfg.frame_size)
    return {"audio": said.audio, "text": text, "consumed": consumed_bytes(said.words, len(text), frames, 1 / codec.cfg.frame_rate).tolist(), "moods": {}}


@dataclass
class Spoken:
    """A request to speak, ready to be carried out: `pieces` makes the sound, `words` collects what is said."""
    pieces: Iterator[np.ndarray]
    words: list[str]
    started: float


def own_ear(lab: Lab):
    """(audio (N,), rate) -> what the model itself hears. ValueError where it has no ear."""
    if lab.model.ear is None:
        raise ValueError("these weights have no ear: leave out --transcriber model, or train one (python train_ear.py)")
    session, device = Session(lab.model, lab.codec, lab.tokenizer), next(lab.codec.parameters()).device

    @torch.inference_mode()
    def transcribe(audio: np.ndarray, rate: int) -> str:
        sound = torch.from_numpy(np.ascontiguousarray(resample(audio, rate, SAMPLE_RATE), dtype=np.float32)).view(1, 1, -1).to(device)
        return sentence_case(session.transcribe(codes_of_sound(lab.model.cfg, lab.codec, sound)))
    return transcribe


class Service:
    """Everything that is loaded once."""

    def __init__(self, lab: Lab, responder, cfg: ServeConfig, live: LiveConfig, endpoint, transcribe=None, prefill_positions: int = 64):
        from judges import transcribe as whisper
        self.lab, self.responder, self.cfg, self.live_cfg, self.endpoint = lab, responder, cfg, live, endpoint
        batching = BatchingConfig(cfg.max_sessions, cfg.queue, prefill_positions, live.ahead_seconds)
        self.engine = BatchingEngine(lab.model, lab.codec, lab.tokenizer, batching, lab.sampling)
        self.ears = Ears(transcribe or whisper)
        self.voices = named_voices(lab.model, lab.codec)
        if lab.given_voices:
            self.voices = {f"voice{n}": Voice(f"voice{n}", f"recording number {n} of --voice", as_codes(lab.model, lab.codec, voice))
                           for n, voice in enumerate(lab.voices, 1)} | self.voices
        self.model_name = Path(lab.model_name).name
        self.started = int(time.time())

    def warm(self) -> None:
        """Everything that loads on first use, so that the first user does not wait."""
        self.responder.warm()
        with_voice = next(iter(self.voices), None)
        if with_voice:
            self.session(self.voices[with_voice].arguments).make_moods(MODEL)
        for _ in self.speak("Hello number 1.", with_voice, mood="happy").pieces:    # a number loads what writes it out, a mood the vocoder
            pass
        ready = self.ears.submit(0.01 * np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32), SAMPLE_RATE)
        if ready is not None:
            ready.result()

    def close(self) -> None:
        self.engine.close(finish=False)
        self.ears.close()

    # ---- names

    def voice(self, name: str | None) -> Voice | None:
        """Refused (400) for an unknown name; None where there are no voices at all."""
        if not name:
            return next(iter(self.voices.values()), None)
        found = self.voices.get(name) or self.voices.get(ALIASES.get(name, ""))
        if found is None:
            raise Refused(400, "unknown_voice", f"there is no voice of that name: use one of {', '.join(self.voices) or '(none)'}")
        return found

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model_name, *MODEL_ALIASES):
            raise Refused(404, "model_not_found", f"there is no model of that name: use {self.model_name}")

    def read_voice(self, data: bytes, text: str | None) -> dict:
        """A stranger's recording -> arguments of Session.set_voice. ValueError where it is none. Slow: in a thread of the caller."""
        audio = decode(data, self.cfg.max_audio_seconds)
        if len(audio) < SAMPLE_RATE / 2:
            raise ValueError(f"the voice lasts {len(audio) / SAMPLE_RATE:.2f} s: send a recording of at least 0.5 s")
        if np.abs(audio).max() < 1e-3:
            raise ValueError("the recording is silent: send one of a voice")
        if text:
            recording = {"audio": audio, "text": check_text(text)}
        else:
            recording = written_voice(audio[:int(PROMPT_SECONDS * SAMPLE_RATE)])
        return as_codes(self.lab.model, self.lab.codec, recording)

    # ---- speaking

    def session(self, voice: dict | None, speaker: int = MODEL, **sampling) -> Session:
        chosen = dataclasses.replace(self.lab.sampling, **{k: v for k, v in sampling.items() if v is not None})
        session = Session(self.lab.model, self.lab.codec, self.lab.tokenizer, chosen, num_codebooks=self.lab.num_codebooks)
        if voice:
            session.set_voice(speaker, **voice)
            session.prepare(speaker)
        return session

    def check_text(self, text: str) -> None:
        """ValueError for text that cannot be spoken or is too long."""
        if len(text) > self.cfg.max_text:
            raise ValueError(f"the text has {len(text)} characters, at most {self.cfg.max_text} are spoken: split it")
        check_text(text)

    def speak(self, text: str, voice: str | dict | None = None, *, speaker: int = MODEL, mood: str | None = None, reply: bool = False,
              seed: int | None = None, temperature: float | None = None) -> Spoken:
        """Say the text, or the answer to it. voice: a name, or arguments of Session.set_voice. ValueError and Refused at once, for what cannot be said."""
        self.check_text(text)
        check_mood(mood)
        started = time.perf_counter()
        arguments = voice if isinstance(voice, dict) else getattr(self.voice(voice), "arguments", None)
        words: list[str] = []
        return Spoken(marked(self._pieces(text, arguments, speaker, mood, reply, words, seed, temperature), self.marker()), words, started)

    def marker(self) -> Marker | None:
        """Of one stream, where the server marks what it says: with the key in WATERMARK_KEY, else the public one."""
        return Marker(os.environ.get("WATERMARK_KEY") or PUBLIC_KEY) if self.cfg.watermark else None

    def _pieces(self, text, voice, speaker, mood, reply, words, seed, temperature) -> Iterator[np.ndarray]:
        session = self.session(voice, speaker, seed=seed, temperature=temperature)
        parts = self._answer(session, text, speaker) if reply else ((part, None) for part in speakable(split_text(text, PIECE)))
        for part, found in parts:
            if speakable([part]):
                words.append(part)
                try:
                    speech = self.engine.speak(session, part, speaker, mood or found)
                except EngineFull as error:
                    raise Refused(503, "full", str(error), self.cfg.queue_seconds) from None
                try:
                    yield from speech
                finally:
                    speech.cancel()

    def _answer(self, session: Session, text: str, speaker: int):
        user = USER if speaker != USER else MODEL
        self.engine.call(session, lambda s: s.add_turn(user, text))
        stream = self.responder.stream(session, speaker, [(NAMES[USER], text)], NAMES[MODEL])
        yield from sentences(one_by_one(stream, lambda work: self.engine.call(session, lambda _: work())) if self.responder.on_model else stream)

    def converse(self, emit, voice: str | None, sample_rate: int) -> LiveConversation:
        """A live conversation. Slow: in a thread of the caller."""
        arguments = getattr(self.voice(voice), "arguments", None)
        return LiveConversation(lambda: self.session(arguments), self.engine, self.responder, self.ears, emit,
                                sample_rate=sample_rate, cfg=self.live_cfg, endpoint=self.endpoint, marker=self.marker)


def marked(pieces, marker: Marker | None):
    """The same sound with the marker's mark; unchanged without one."""
    try:
        for piece in pieces:
            piece = piece if marker is None else marker.push(piece)
            if len(piece):
                yield piece
        if marker is not None:
            yield marker.finish()
    finally:
        pieces.close()


def mood_of(instructions: str | None) -> str | None:
    """OpenAI's `instructions`: the mood they name, if any."""
    words = (instructions or "").lower().replace(",", " ").replace(".", " ").split()
    return next((mood for mood in MOODS if mood in words), None)
