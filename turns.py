"""One turn: what it is, its rows in the frame stream, and how far it has come while it is said. Draws nothing and decodes nothing.

Shapes: T frames, K codebooks, S positions, D model width, N samples. A *code* is the codec's; a *token* is
code + cfg.code_offset; a row of K zero tokens ends a turn.
"""
from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from architecture import CSM, FrameBatch
from config import ModelConfig, SamplingConfig

END_FRAMES = 8            # frames after the finger reached the end of the text before the turn is closed by force
END_GUARD = 2             # text tokens before the end within which the model may end the turn itself
STALL_FRAMES = 15         # frames (1.2 s) without a step after which the finger is nudged on
QUIET_RMS = 1e-3          # below this a frame counts as silent (-60 dBFS)
QUIET_FRAMES = 19         # silent frames in a row (1.5 s), after something was said, that end a turn
QUIET_AT_END = 4          # the same once the finger is at the end of the text
SECONDS_PER_BYTE = 0.25   # three times slower than speech: slower than that is a runaway
SECONDS_TO_SPARE = 2.0
REPEAT_FRAMES = 25        # equal frames in a row (2 s) that end a turn
LEAD_FRAMES = 6           # a lead is at least this long
LEAD_REST = 2             # frames of it that may follow its last word


@dataclass
class Turn:
    """One turn: what went in, what came out, and how long it took."""
    speaker: int                        # index 0..7
    text: str                           # what was said, normalised
    mood: str | None = None
    codes: Tensor | None = None         # (K, T) long, the codec's codes; None: nothing was heard, text only
    audio: np.ndarray | None = None     # (N,) float32
    heard: bool = False                 # True: listening order (audio, then transcript)
    readings: list[int] | None = None   # finger at EOT, at each of the T frames and at the end frame; None: unknown
    first_audio_ms: float | None = None # from the text being known to the first chunk
    total_ms: float | None = None
    ended: bool = True                  # False: cut off by a guard
    end_reason: str = "given"           # eos | read | quiet | repeat | runaway | max_seconds | given

    @property
    def num_frames(self) -> int:
        return 0 if self.codes is None else self.codes.shape[1]


# ----------------------------------------------------------------------------- rows of the frame stream

def text_rows(ids: list[int], cfg: ModelConfig, number: int, reading: list[int] | None = None, device=None) -> FrameBatch:
    """Token ids of one text run -> FrameBatch (1, S = len(ids)); source: CSM_SPEC 3.3."""
    frames = torch.zeros(1, len(ids), cfg.num_codebooks + 1, dtype=torch.long, device=device)
    frames[0, :, -1] = torch.tensor(ids, dtype=torch.long, device=device)
    mask = torch.zeros_like(frames, dtype=torch.bool)
    mask[:, :, -1] = True
    return _batch(frames, mask, number, list(range(len(ids))), reading or [-1] * len(ids))


def audio_rows(tokens: Tensor, cfg: ModelConfig, number: int, reading: list[int] | None = None) -> FrameBatch:
    """Audio tokens (K, S) -> FrameBatch (1, S)."""
    frames = torch.nn.functional.pad(tokens.T.unsqueeze(0), (0, 1))  # (1, S, K + 1)
    mask = torch.ones_like(frames, dtype=torch.bool)
    mask[:, :, -1] = False
    count = tokens.shape[1]
    return _batch(frames, mask, number, [-1] * count, reading or [-1] * count)


def _batch(frames: Tensor, mask: Tensor, number: int, text_index: list[int], reading: list[int]) -> FrameBatch:
    def row(values):
        return torch.tensor([values], dtype=torch.long, device=frames.device)
    return FrameBatch(frames=frames, mask=mask, turn=row([number] * frames.shape[1]), text_index=row(text_index), reading=row(reading))


def join(parts: list[FrameBatch]) -> FrameBatch:
    """Batches one after another along S."""
    names = ("frames", "mask", "turn", "text_index", "reading")
    return FrameBatch(**{n: torch.cat([getattr(p, n) for p in parts], dim=1) for n in names})


def cut_rows(rows: FrameBatch, start: int, end: int) -> FrameBatch:
    """Positions start..end of rows."""
    names = ("frames", "mask", "turn", "text_index", "reading")
    return FrameBatch(**{n: getattr(rows, n)[:, start:end] for n in names})


def prefill(model: CSM, rows: FrameBatch, state, piece: int | None = None) -> Iterator[Tensor]:
    """Take `rows` into the state, at most `piece` positions at a time; hidden states (1, s, D) of each piece as it is done."""
    piece = piece or rows.S
    for at in range(0, rows.S, piece):
        with torch.inference_mode():
            hidden = model(cut_rows(rows, at, at + piece), state=state)
        yield hidden


def turn_rows(turn: Turn, cfg: ModelConfig, tokenizer, number: int, device=None) -> FrameBatch:
    """A finished turn as the model saw it: speaking or listening order, its end frame included."""
    audio = []
    if turn.codes is not None:
        tokens = torch.nn.functional.pad(turn.codes.to(device) + cfg.code_offset, (0, 1))  # (K, T + 1)
        audio = [audio_rows(tokens, cfg, number, turn.readings[1:] if turn.readings else None)]
    if turn.heard:
        transcript = [tokenizer.transcript, *(tokenizer.encode(turn.text) if turn.text else []), tokenizer.eot]
        return join([text_rows(tokenizer.listen_prefix(turn.speaker), cfg, number, device=device), *audio,
                     text_rows(transcript, cfg, number, device=device)])
    ids = tokenizer.speak_prefix(turn.speaker, turn.mood) + tokenizer.encode(turn.text) + [tokenizer.eot]
    at_text = [-1] * (len(ids) - 1) + [turn.readings[0] if turn.readings else -1]
    return join([text_rows(ids, cfg, number, at_text, device), *audio])


def device_of(model) -> torch.device:
    return next(model.parameters()).device


# ----------------------------------------------------------------------------- how far the voice has come, and when it must end

def guided(cfg: ModelConfig) -> bool:
    """Whether the model moves a reading position along the text."""
    return cfg.cross.enabled and cfg.cross.guided


@dataclass
class Finger:
    """The reading position: how far the voice has come in the text of its turn."""
    position: int           # text index of the next token to be spoken
    end: int                # text index of EOT
    guided: bool = True     # False: the model has no reading position, it stays unknown
    at_end: int = 0         # frames spent there
    still: int = 0          # frames without a step

    def move(self, advance: int) -> None:
        self.still = 0 if advance else self.still + 1
        if self.still >= STALL_FRAMES:
            advance, self.still = 1, 0
        self.position = min(self.position + advance, self.end)
        self.at_end += self.position == self.end

    def move_on(self, advance: int, opening: int) -> None:
        """The step after a lead: at most to where the new text begins, of which nothing was said yet."""
        self.position = min(self.position + advance, opening)

    @property
    def reading(self) -> int:
        return self.position if self.guided else -1

    @property
    def may_end(self) -> bool:
        return not self.guided or self.end - self.position <= END_GUARD

    @property
    def done(self) -> bool:
        return self.guided and self.at_end > END_FRAMES


@dataclass
class Guard:
    """Says when a turn has gone on for no reason: silence, the same frame again and again, no end."""
    max_frames: int
    runaway_frames: int
    quiet: int = 0
    equal: int = 0
    spoke: bool = False
    last: Tensor | None = None

    def reason(self, tokens: Tensor, chunk: np.ndarray, count: int, finger: Finger) -> str:
        """"" to go on, else why to stop after frame number `count`."""
        loud = float(np.sqrt(np.mean(chunk ** 2))) > QUIET_RMS
        self.spoke |= loud
        self.quiet = 0 if loud else self.quiet + 1
        self.equal = self.equal + 1 if self.last is not None and torch.equal(self.last, tokens) else 0
        self.last = tokens
        limit = QUIET_AT_END if finger.guided and finger.at_end else QUIET_FRAMES
        if finger.done:
            return "read"
        if self.spoke and self.quiet >= limit and finger.may_end:
            return "quiet"
        if self.equal >= REPEAT_FRAMES and finger.may_end:
            return "repeat"
        if count >= self.max_frames:
            return "max_seconds"
        return "runaway" if count >= self.runaway_frames else ""


@dataclass
class Lead:
    """The end of what a speaker said before: the model hears it as the beginning of the new turn and goes on in that voice.

    Nobody hears it again. text; codes (K, T); read: letters of the text spoken before each frame, T of them.
    """
    text: str
    codes: Tensor
    read: list[int]

    @property
    def num_frames(self) -> int:
        return len(self.read)


def lead_of(turn: Turn | None, seconds: float, frame_rate: float) -> Lead | None:
    """The last words of a spoken turn, from the beginning of a sentence if there is one, of at most `seconds`; None where it has none to give."""
    if turn is None or turn.heard or not turn.readings or not turn.text.isascii():
        return None
    read = [r - turn.readings[0] for r in turn.readings[1:-1]]                     # before each of the T frames
    rest = sum(r >= len(turn.text) for r in read)
    end, most = len(read) - max(0, rest - LEAD_REST), int(seconds * frame_rate)
    places = []
    for word in re.finditer(r"\S+", turn.text):
        first = next((i for i, r in enumerate(read) if r >= word.start()), end)
        if LEAD_FRAMES <= end - first <= most:
            opens = word.start() == 0 or turn.text[word.start() - 2] in ".?!"
            places.append((opens, end - first, first, word.start()))
    if not places:
        return None
    *_, first, begin = max(places)
    return Lead(turn.text[begin:], turn.codes[:, first:end], [r - begin for r in read[first:end]])


def begin_turn(turn: Turn, lead: Lead | None, cfg: ModelConfig, tokenizer, number: int, device) -> tuple[FrameBatch, Finger, int]:
    """Rows (1, S) before the first new frame, the finger there, and how many text tokens the lead has put in."""
    prefix, body = tokenizer.speak_prefix(turn.speaker, turn.mood), tokenizer.encode(f"{lead.text} {turn.text}" if lead else turn.text)
    ids, finger = prefix + body + [tokenizer.eot], Finger(len(prefix), len(prefix) + len(body), guided(cfg))
    rows = text_rows(ids, cfg, number, [-1] * (len(ids) - 1) + [finger.reading], device)
    if lead:
        rows = join([rows, audio_rows(lead.codes.to(device) + cfg.code_offset, cfg, number, [len(prefix) + r for r in lead.read])])
        finger.position = len(prefix) + max(lead.read[-1], 0)
    return rows, finger, len(body) - len(tokenizer.encode(turn.text))


def frame_limits(cfg: ModelConfig, sampling: SamplingConfig, text_tokens: int, room: int) -> tuple[int, int]:
    """Frames after which a turn is cut off: by max_seconds and by `room` (positions left for audio), and as a runaway."""
    if room < 2:
        raise ValueError(f"a text of {text_tokens} tokens leaves no room for its sound: split it into shorter pieces")
    most = max(1, min(int(sampling.max_seconds * cfg.frame_rate), room - 1))    # one position is kept for the end frame
    return most, math.ceil((SECONDS_TO_SPARE + SECONDS_PER_BYTE * text_tokens) * cfg.frame_rate)


# ----------------------------------------------------------------------------- a turn on its way

class Speaking:
    """One turn while it is said: finger, guard and frames, without the arithmetic, which is the caller's (stream_turn; batching.py for many turns at a time).

    Prefill `rows` into `state`; opened(); then per frame: draw tokens (an end where finger.may_end), ended(), decode codes(), sounded(),
    take the frame in with finger.reading, moved(); until turn.end_reason is set; take_end(). close() in any case: it fills in the turn.
    """

    def __init__(self, model: CSM, tokenizer, state, turn: Turn, number: int, sampling: SamplingConfig, lead: Lead | None = None, start: float | None = None):
        cfg = model.cfg
        self.cfg, self.state, self.turn, self.number, self.lead = cfg, state, turn, number, lead
        self.start = time.perf_counter() if start is None else start
        self.rows, self.finger, self.shift = begin_turn(turn, lead, cfg, tokenizer, number, device_of(model))
        self.guard = Guard(*frame_limits(cfg, sampling, self.finger.end - self.finger.position, state.limit - state.length - self.rows.S))
        self.opening = self.finger.end - len(tokenizer.encode(turn.text))
        self.tokens: Tensor | None = None                                          # (K,) of the newest frame
        self.frames, self.chunks, self.readings = [], [], [self.opening, self.opening]
        turn.end_reason = ""

    def opened(self, model: CSM, hidden: Tensor) -> None:
        """hidden (D,) of the last of `rows`."""
        if self.lead:
            self.finger.move_on(int(model.advance_logits(hidden).argmax(-1)), self.opening)

    def ended(self, tokens: Tensor) -> bool:
        """Whether tokens (K,), just drawn, are the end."""
        self.tokens = tokens
        if self.finger.may_end and not tokens.any():
            self.turn.end_reason = "eos"
        return bool(self.turn.end_reason)

    def codes(self, tokens: Tensor) -> Tensor:
        """tokens (K,) -> codes (1, K, 1), noted down."""
        self.frames.append((tokens - self.cfg.code_offset).view(-1, 1))
        return self.frames[-1].unsqueeze(0)

    def sounded(self, chunk: np.ndarray) -> np.ndarray:
        self.chunks.append(chunk)
        if self.turn.first_audio_ms is None:
            self.turn.first_audio_ms = 1000 * (time.perf_counter() - self.start)
        return chunk

    def moved(self, advance: int) -> None:
        """advance: text tokens that the frame has consumed, 0 for a model without a reading position."""
        if self.finger.guided:
            self.finger.move(advance)
        self.readings.append(self.finger.reading)
        self.turn.end_reason = self.guard.reason(self.tokens, self.chunks[-1], len(self.frames), self.finger)

    def take_end(self, model: CSM) -> None:
        """The end frame and the memory slots go into the state; not where a lead stands in it."""
        if self.lead is None:
            end = torch.zeros(self.cfg.num_codebooks, 1, dtype=torch.long, device=self.rows.frames.device)
            model(audio_rows(end, self.cfg, self.number, [self.finger.reading]), state=self.state)
            model.end_turn(self.state)

    def close(self) -> None:
        """What was made so far into the turn; without an end it has no end_reason."""
        turn, count = self.turn, len(self.chunks)
        turn.codes = torch.cat(self.frames[:count], dim=1).cpu() if count else torch.zeros(self.cfg.num_codebooks, 0, dtype=torch.long)
        turn.audio = np.concatenate(self.chunks) if count else np.zeros(0, dtype=np.float32)
        readings = (self.readings + self.readings[-1:])[:count + 2]                # a turn that was stopped has not yet moved after its last frame
        turn.readings = [max(self.opening, r) - self.shift for r in readings] if self.finger.guided else None
        turn.ended = turn.end_reason in ("eos", "read", "quiet")
        turn.total_ms = 1000 * (time.perf_counter() - self.start)
