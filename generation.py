"""Talking: sessions, prefill, one frame, a streaming turn, a text reply. No argparse, no printing.

One path for offline and streaming: a turn is made frame by frame, and every frame (80 ms) is decoded
to sound at once. `generate_slow` recomputes everything for every frame: the oracle of the tests.

    session = Session(model, codec, tokenizer, SamplingConfig(seed=1))
    session.add_turn(0, "how are you?")
    for chunk in session.speak(1, "very well, thank you.", mood="happy"):
        ...                                        # chunk: (1920,) float32 numpy, play it
    session.turns[-1].audio, session.turns[-1].first_audio_ms

Shapes: T frames, K codebooks, S positions, D model width, V rows per codebook, N samples.
A *code* is the codec's; a *token* is code + cfg.code_offset; a row of K zero tokens ends a turn.
"""
from __future__ import annotations

import copy
import dataclasses
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from architecture import CSM, FrameBatch, Slots
from config import ModelConfig, SamplingConfig, codec_columns
from text_tokenizer import normalise

END_FRAMES = 8            # frames after the finger reached the end of the text before the turn is closed by force
END_GUARD = 2             # text tokens before the end within which the model may end the turn itself
STALL_FRAMES = 15         # frames (1.2 s) without a step after which the finger is nudged on
QUIET_RMS = 1e-3          # below this a frame counts as silent (-60 dBFS)
QUIET_FRAMES = 19         # silent frames in a row (1.5 s), after something was said, that end a turn
QUIET_AT_END = 4          # the same once the finger is at the end of the text
SECONDS_PER_BYTE = 0.25   # three times slower than speech: slower than that is a runaway
SECONDS_TO_SPARE = 2.0
REPEAT_FRAMES = 25        # equal frames in a row (2 s) that end a turn
PROMPT_SECONDS = 10.0     # a voice prompt is cut to this
LEAD_FRAMES = 6           # a lead is at least this long
LEAD_REST = 2             # frames of it that may follow its last word
BYTES_PER_SECOND = 25     # no transcript is longer than this allows
REPLY_TOKENS = 160        # nor a reply than this
SPEAKABLE = b"abcdefghijklmnopqrstuvwxyz.,?!'- "


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


# ----------------------------------------------------------------------------- the codebooks a model uses

def semantic_count(cfg: ModelConfig, codec, num_codebooks: int | None = None) -> int:
    """How many of the model's first `num_codebooks` (None: all) are semantic ones of this codec."""
    return min(num_codebooks or cfg.num_codebooks, cfg.num_semantic, codec.cfg.num_semantic)


def codes_of_sound(cfg: ModelConfig, codec, audio: Tensor) -> Tensor:
    """audio (1, 1, N) -> the codes that this model reads, (K, T). See config.codec_columns."""
    columns = codec_columns(cfg.num_codebooks, cfg.num_semantic, codec.cfg.num_semantic)
    return codec.encode(audio, columns[-1] + 1)[0][columns]


def sound_of_codes(cfg: ModelConfig, codec, codes: Tensor) -> Tensor:
    """The model's codes (K, T) -> audio (N,)."""
    return codec.decode(codes.unsqueeze(0), semantic_count(cfg, codec))[0, 0]


# ----------------------------------------------------------------------------- small pure functions

def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None = None) -> Tensor:
    """(M, V) -> (M,): greedy at temperature 0, else drawn from the `top_k` likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    top = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    drawn = torch.multinomial(torch.softmax(top.values / temperature, dim=-1), 1, generator=generator)  # (M, 1)
    return top.indices.gather(-1, drawn).squeeze(-1)


def _only_codes(logits: Tensor, cfg: ModelConfig, codebook_size: int, end: bool) -> Tensor:
    """Logits with everything that is no code of the codec shut out; `end` leaves token 0 open as well."""
    logits = logits.clone()
    logits[..., cfg.code_offset + codebook_size:] = -math.inf
    if not end:
        logits[..., :cfg.code_offset] = -math.inf
    return logits


def draw_codes(model: CSM, hidden: Tensor, codebook_size: int, sampling: SamplingConfig, generator=None, first: Tensor | None = None) -> Tensor:
    """Hidden states (M, D) -> tokens (M, K) of the frames after them, none an end; `first` (M,) gives the first codebook's tokens."""
    if first is None:
        first = sample(_only_codes(model.c0_logits(hidden), model.cfg, codebook_size, False), sampling.temperature, sampling.top_k, generator)

    if model.frame_codes is not None and len(hidden) == 1:
        return model.frame_codes(hidden, first, codebook_size, sampling, generator)

    def pick(logits: Tensor, k: int) -> Tensor:
        return sample(_only_codes(logits, model.cfg, codebook_size, False), sampling.depth_temperature, sampling.depth_top_k, generator)
    return model.depth_generate(hidden, first, pick)


def decode_frame(model: CSM, hidden: Tensor, codebook_size: int, sampling: SamplingConfig, generator=None, may_end: bool = True) -> Tensor:
    """Hidden state (D,) of the last position -> tokens (K,) of the next frame; all zeros means the end."""
    cfg, hidden = model.cfg, hidden.unsqueeze(0)                     # (1, D)
    c0 = sample(_only_codes(model.c0_logits(hidden), cfg, codebook_size, may_end), sampling.temperature, sampling.top_k, generator)
    if cfg.code_offset > 0 and int(c0) == 0:
        return torch.zeros(cfg.num_codebooks, dtype=torch.long, device=hidden.device)
    return draw_codes(model, hidden, codebook_size, sampling, generator, c0)[0]


def _device(model) -> torch.device:
    return next(model.parameters()).device


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


@torch.inference_mode()
def trace(model: CSM, tokenizer, turn: Turn) -> list[int] | None:
    """Where the model's finger would be while this turn is said: its `readings`; None where it does not get through the text or has far too long."""
    cfg, codes = model.cfg, turn.codes
    ids = tokenizer.speak_prefix(turn.speaker, turn.mood) + tokenizer.encode(turn.text) + [tokenizer.eot]
    if not guided(cfg) or len(ids) + turn.num_frames + 1 > cfg.backbone.max_positions:
        return None
    state = model.new_state(1, len(ids) + turn.num_frames + 1)
    rows, finger, _ = begin_turn(turn, None, cfg, tokenizer, 0, _device(model))
    model(rows, state=state)
    readings = [finger.reading, finger.reading]
    for tokens in (codes.T + cfg.code_offset).to(_device(model)):
        hidden = model(audio_rows(tokens.view(-1, 1), cfg, 0, [finger.reading]), state=state)[0, -1]
        finger.move(int(model.advance_logits(hidden).argmax(-1)))
        readings.append(finger.reading)
    return readings if finger.may_end and finger.at_end <= turn.num_frames // 3 else None


@torch.inference_mode()
def stream_turn(model: CSM, codec, tokenizer, state, turn: Turn, number: int, sampling: SamplingConfig,
                generator=None, num_codebooks: int | None = None, start: float | None = None, lead: Lead | None = None) -> Iterator[np.ndarray]:
    """Speak `turn` (speaker, text, mood are read, the rest is filled in); yields (frame_size,) float32 chunks.

    `state` ends up holding the whole turn, its end frame included, and the turn's memory slots; with a `lead`, which is no
    part of the turn, it is used up: give a copy.
    num_codebooks: how many are decoded to sound (all are made). start: perf_counter() when the text was known.
    Ends always: see Finger and Guard. Raises ValueError where the text leaves no room for sound in the state.
    """
    start = time.perf_counter() if start is None else start
    cfg, size = model.cfg, codec.cfg.codebook_size
    semantic = semantic_count(cfg, codec, num_codebooks)
    rows, finger, shift = begin_turn(turn, lead, cfg, tokenizer, number, _device(model))
    guard = Guard(*frame_limits(cfg, sampling, finger.end - finger.position, state.limit - state.length - rows.S))
    hidden, opening = model(rows, state=state)[0, -1], finger.end - len(tokenizer.encode(turn.text))
    if lead:
        finger.move_on(int(model.advance_logits(hidden).argmax(-1)), opening)
    frames, chunks, readings, sound = [], [], [opening, opening], None
    turn.end_reason = ""
    while not turn.end_reason:
        tokens = decode_frame(model, hidden, size, sampling, generator, finger.may_end)
        if not tokens.any() and finger.may_end:
            turn.end_reason = "eos"
            break
        codes = (tokens - cfg.code_offset).view(1, -1, 1)                          # (1, K, 1)
        audio, sound = codec.decode_stream(codes[:, :num_codebooks], sound, semantic)
        frames.append(codes[0])
        chunks.append(audio.reshape(-1).float().cpu().numpy())
        if turn.first_audio_ms is None:
            turn.first_audio_ms = 1000 * (time.perf_counter() - start)
        yield chunks[-1]
        hidden = model(audio_rows(tokens.view(-1, 1), cfg, number, [finger.reading]), state=state)[0, -1]
        if finger.guided:
            finger.move(int(model.advance_logits(hidden).argmax(-1)))
        readings.append(finger.reading)
        turn.end_reason = guard.reason(tokens, chunks[-1], len(frames), finger)
    if lead is None:
        model(audio_rows(torch.zeros(cfg.num_codebooks, 1, dtype=torch.long, device=hidden.device), cfg, number, [finger.reading]), state=state)
        model.end_turn(state)
    turn.codes = torch.cat(frames, dim=1).cpu() if frames else torch.zeros(cfg.num_codebooks, 0, dtype=torch.long)
    turn.audio = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)
    turn.readings = [max(opening, r) - shift for r in readings] if finger.guided else None
    turn.ended = turn.end_reason in ("eos", "read", "quiet")
    turn.total_ms = 1000 * (time.perf_counter() - start)


def frame_limits(cfg: ModelConfig, sampling: SamplingConfig, text_tokens: int, room: int) -> tuple[int, int]:
    """Frames after which a turn is cut off: by max_seconds and by `room` (positions left for audio), and as a runaway."""
    if room < 2:
        raise ValueError(f"a text of {text_tokens} tokens leaves no room for its sound: split it into shorter pieces")
    most = max(1, min(int(sampling.max_seconds * cfg.frame_rate), room - 1))    # one position is kept for the end frame
    return most, math.ceil((SECONDS_TO_SPARE + SECONDS_PER_BYTE * text_tokens) * cfg.frame_rate)


@torch.inference_mode()
def generate_slow(model: CSM, codec, tokenizer, context: FrameBatch | None, turn: Turn, number: int, sampling: SamplingConfig,
                  memory=None, lead: Lead | None = None) -> tuple[Tensor, Tensor]:
    """The oracle: greedy, no caches, everything computed anew for each frame. `context`: rows before this turn.

    Returns codes (K, T) and audio (N,), decoded at once. Ends by the model's end frame, the finger or max_seconds alone.
    """
    cfg, size = model.cfg, codec.cfg.codebook_size
    rows, finger, _ = begin_turn(turn, lead, cfg, tokenizer, number, _device(model))
    rows = join([context, rows]) if context is not None else rows
    if lead:
        finger.move_on(int(model.advance_logits(model(rows, memory=memory)[0, -1]).argmax(-1)), finger.end - len(tokenizer.encode(turn.text)))
    frames, greedy = [], dataclasses.replace(sampling, temperature=0.0, depth_temperature=0.0)
    while len(frames) < int(sampling.max_seconds * cfg.frame_rate) and not finger.done:
        hidden = model(rows, memory=memory)[0, -1]
        tokens = decode_frame(model, hidden, size, greedy, None, finger.may_end)
        if not tokens.any() and finger.may_end:
            break
        frames.append(tokens - cfg.code_offset)
        rows = join([rows, audio_rows(tokens.view(-1, 1), cfg, number, [finger.reading])])
        if finger.guided:
            finger.move(int(model.advance_logits(model(rows, memory=memory)[0, -1]).argmax(-1)))
    codes = torch.stack(frames, 1) if frames else torch.zeros(cfg.num_codebooks, 0, dtype=torch.long)
    return codes.cpu(), sound_of_codes(model.cfg, codec, codes)


# ----------------------------------------------------------------------------- text: transcripts and replies

@torch.inference_mode()
def generate_text(model: CSM, tokenizer, state, ids: list[int], number: int, most: int, temperature: float, generator=None) -> list[int]:
    """Go on with a text run that starts with `ids`: up to `most` more token ids, without the closing EOT."""
    first, out = 0, []
    while True:
        hidden = model(_run_on(ids, model.cfg, number, first, _device(model)), state=state)[0, -1:]  # (1, D)
        first += len(ids)
        if len(out) >= most:
            return out
        logits = _only_text(model.text_logits(hidden), tokenizer, may_end=bool(out))
        token = int(sample(logits, temperature, logits.shape[-1], generator))
        if token == tokenizer.eot:
            return out
        out.append(token)
        ids = [token]


def _run_on(ids: list[int], cfg: ModelConfig, number: int, first: int, device) -> FrameBatch:
    rows = text_rows(ids, cfg, number, device=device)
    rows.text_index += first
    return rows


def _only_text(logits: Tensor, tokenizer, may_end: bool) -> Tensor:
    """Shut out what no normalised text holds: special tokens, other bytes; the end too unless `may_end`."""
    open_ = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    open_[list(SPEAKABLE) if tokenizer.name == "bytes" else slice(0, tokenizer.pad)] = True
    open_[tokenizer.eot] = may_end
    return logits.masked_fill(~open_, -math.inf)


@torch.inference_mode()
def score_text(model: CSM, tokenizer, state, prefix: list[int], text: str, number: int) -> float:
    """Mean log-likelihood per token of `text` after `prefix` under the text head. `state` is used up."""
    ids = tokenizer.encode(text) + [tokenizer.eot]
    hidden = model(text_rows(prefix + ids, model.cfg, number, device=_device(model)), state=state)[0]  # (S, D)
    logits = model.text_logits(hidden[len(prefix) - 1:-1]).float()
    return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids, device=logits.device)[:, None]).mean())


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters, cut at sentence ends, else at commas, else at spaces."""
    pieces = [text.strip()]
    for mark in (r"(?<=[.?!])\s+", r"(?<=,)\s+", r"\s+", r"(?<=.{%d})" % limit):
        pieces = [short for piece in pieces for short in (_pack(re.split(mark, piece), limit) if len(piece) > limit else [piece])]
    return [p for p in pieces if p]


def _pack(parts: list[str], limit: int) -> list[str]:
    packed = parts[:1]
    for part in parts[1:]:
        if len(packed[-1]) + 1 + len(part) <= limit:
            packed[-1] += " " + part
        else:
            packed.append(part)
    return packed


# ----------------------------------------------------------------------------- a conversation

class Session:
    """One conversation: its turns, voices, random numbers and the model's state. Sessions share nothing but weights.

    The last turns stand in the window as frames (cfg.memory.window_turns, voices included, as far as positions
    allow); older ones live on as memory slots. Generated codes are kept, never encoded again.
    """

    def __init__(self, model: CSM, codec, tokenizer, sampling: SamplingConfig | None = None, num_codebooks: int | None = None):
        self.model, self.codec, self.tokenizer = model, codec, tokenizer
        self.sampling, self.num_codebooks = sampling or SamplingConfig(), num_codebooks
        self.generator = torch.Generator(_device(model)).manual_seed(self.sampling.seed)
        self.turns: list[Turn] = []
        self.voices: dict[int, Turn] = {}           # speaker -> recording that stays at the start of the window
        self._slots: list[Slots | None] = []        # of each turn
        self._state, self._spare = None, None       # None: to be filled again from the turns; its buffers
        self._start = 0                             # first turn in the window
        self._opener: int | None = None             # who speaks first after the voices
        self.write = generate_text                  # or a speculative.TextLookup

    # ---- what is known

    def set_voice(self, speaker: int, audio: np.ndarray | None = None, codes: Tensor | None = None,
                  text: str | None = None, consumed: list[int] | None = None) -> None:
        """Let `speaker` sound like this recording (at most PROMPT_SECONDS of it); with `text` it counts as spoken, else as heard.

        consumed: bytes of the text spoken by the end of each frame, where that is known; else the model's own finger is followed.
        """
        codes = self._codes(audio, codes)
        if text is None:
            codes = codes[:, :int(PROMPT_SECONDS * self.model.cfg.frame_rate)]
        voice = self.voices[speaker] = self._given(speaker, text, None, codes, consumed)
        if not voice.heard and voice.readings is None and codes.shape[1]:
            voice.readings = trace(self.model, self.tokenizer, voice)
        self._state = None

    def add_turn(self, speaker: int, text: str | None = None, audio: np.ndarray | None = None, codes: Tensor | None = None,
                 mood: str | None = None) -> Turn:
        """A turn that somebody else made. Without text it is listened to and written down by the text head.

        audio (N,) at the codec's rate, or codes (K, T). ValueError where nothing is given or nothing can be spoken.
        """
        heard = audio is not None or codes is not None
        if not heard and text is None:
            raise ValueError("a turn needs text or audio")
        turn = self._given(speaker, text, mood, self._codes(audio, codes) if heard else None)
        turn.audio = audio
        self._opens(speaker)
        self._room(len(turn.text) + turn.num_frames + 8)
        self._put(turn)
        return turn

    def _codes(self, audio, codes) -> Tensor:
        if codes is None:
            sound = torch.as_tensor(np.asarray(audio, dtype=np.float32)).view(1, 1, -1).to(_device(self.model))
            codes = codes_of_sound(self.model.cfg, self.codec, sound)
        return codes[:self.model.cfg.num_codebooks].long().cpu()

    def _given(self, speaker: int, text: str | None, mood, codes: Tensor | None, consumed=None) -> Turn:
        if text is None:
            return Turn(speaker, self.transcribe(codes, speaker), mood, codes, heard=True)
        first = len(self.tokenizer.speak_prefix(speaker, mood))
        readings = None
        if consumed is not None and guided(self.model.cfg) and len(consumed) == codes.shape[1]:
            readings = [first, first] + [first + n for n in consumed]
        return Turn(speaker, normalise(text), mood, codes, readings=readings)

    def _lead(self, speaker: int) -> Lead | None:
        """What the model hears before a turn of `speaker`: of its voice, else of the first thing it said, so that nothing drifts."""
        seconds, rate = self.sampling.lead_seconds, self.model.cfg.frame_rate
        if not seconds or not guided(self.model.cfg) or self.tokenizer.name != "bytes":
            return None
        said = [self.voices.get(speaker), *(t for t in self.turns if t.speaker == speaker)]
        return next(filter(None, (lead_of(turn, seconds, rate) for turn in said)), None)

    # ---- the window

    def prepare(self, speaker: int | None = None) -> None:
        """Fill the window now (after a turn, say), so that the next turn need not. speaker: who is going to speak, where that is known."""
        if speaker is not None:
            self._opens(speaker)
        limit = self.model.cfg.backbone.max_positions
        self._room(min(limit // 2, 256 + int(self.sampling.max_seconds * self.model.cfg.frame_rate)))

    @property
    def _window_is_long(self) -> bool:
        kept = len(self.turns) - self._start
        return kept > 1 and kept + len(self.voices) > self.model.cfg.memory.window_turns

    @torch.inference_mode()
    def _room(self, positions: int) -> None:
        """A filled state in which `positions` more fit, if need be with fewer turns."""
        if self._state is not None and not self._window_is_long and self._state.length + positions <= self._state.limit:
            return
        while self._window_is_long:
            self._start += 1
        while True:
            rows = self._window()
            length = rows.S if rows else 0
            if self._start >= len(self.turns) or length + positions <= self.model.cfg.backbone.max_positions:
                break
            self._start += 1
        self._refill(rows)

    def _window(self) -> FrameBatch | None:
        """The rows of voices and turns; voices are numbered on from the last turn that has left the window.

        Speakers take turns in all that the model has seen, so the voice of whoever speaks first after the voices comes
        first: the one right before a turn is somebody else's (LOG.md: the other way round it speaks in the wrong voice).
        """
        cfg, device = self.model.cfg, _device(self.model)
        kept = self.turns[self._start:]
        opener = kept[0].speaker if kept else self._opener
        turns = [self.voices[s] for s in sorted(self.voices, key=lambda s: (s != opener, s))] + kept
        parts = [turn_rows(t, cfg, self.tokenizer, self._start + i, device) for i, t in enumerate(turns)]
        return join(parts) if parts else None

    def _opens(self, speaker: int) -> None:
        """`speaker` is the next to speak: where nobody has spoken since the voices, their order depends on it."""
        if self._start >= len(self.turns) and self._opener != speaker:
            self._opener = speaker
            if len(self.voices) > 1:
                self._state = None

    def _refill(self, rows: FrameBatch | None) -> None:
        state = self._spare or self.model.new_state(1)
        state.restart()
        state.current, state.gathered = -1, {}
        gone = [s for s in self._slots[:self._start] if s is not None][-self.model.cfg.memory.max_slots:]
        state.slots = Slots(*(torch.cat([getattr(s, f.name) for s in gone], 1) for f in dataclasses.fields(Slots))) if gone else None
        if rows is not None:
            self.model(rows, state=state)
            self.model.end_turn(state)
        self._state = self._spare = state

    @property
    def _number(self) -> int:
        return len(self.voices) + len(self.turns)

    @torch.inference_mode()
    def _put(self, turn: Turn) -> None:
        self.model(turn_rows(turn, self.model.cfg, self.tokenizer, self._number, _device(self.model)), state=self._state)
        self.model.end_turn(self._state)
        self._keep(turn)

    def _keep(self, turn: Turn) -> None:
        """Remember a turn that the state has just taken in, and its slots under the turn's own number."""
        slots = self._state.slots
        number = torch.full((1, 1), len(self.turns), device=_device(self.model))
        self._slots.append(None if slots is None else Slots(slots.semantic[:, -1:], slots.prosodic[:, -1:], number))
        self.turns.append(turn)

    # ---- what is said

    def speak(self, speaker: int, text: str, mood: str | None = None) -> Iterator[np.ndarray]:
        """Chunks (frame_size,) of 80 ms as they are made; when the last one is taken the turn is in `turns`.

        ValueError (at once) for text that cannot be spoken, an unknown mood or speaker. A turn that is not
        listened to until its end is forgotten.
        """
        start = time.perf_counter()
        turn = Turn(speaker, normalise(text), mood)
        self._opens(speaker)
        tokens = len(self.tokenizer.speak_prefix(speaker, mood)) + len(self.tokenizer.encode(turn.text)) + 1
        seconds, lead = min(self.sampling.max_seconds, SECONDS_TO_SPARE + SECONDS_PER_BYTE * tokens), self._lead(speaker)
        heard = lead.num_frames + len(self.tokenizer.encode(lead.text)) + 1 if lead else 0
        needed = tokens + heard + math.ceil(seconds * self.model.cfg.frame_rate) + 1
        self._room(needed)
        if self._state.length + needed > self._state.limit:          # rather in another voice than cut short
            lead = None
        return self._speak(turn, start, lead)

    def _speak(self, turn: Turn, start: float, lead: Lead | None) -> Iterator[np.ndarray]:
        state, self._state = self._state, None
        used = copy.copy(state) if lead else state               # the lead is no part of the turn: the state takes in the turn without it
        yield from stream_turn(self.model, self.codec, self.tokenizer, used, turn, self._number, self.sampling,
                               self.generator, self.num_codebooks, start, lead)
        self._state = state
        self._put(turn) if lead else self._keep(turn)

    def say(self, speaker: int, text: str, mood: str | None = None) -> Turn:
        """`speak` to its end; returns the turn."""
        for _ in self.speak(speaker, text, mood):
            pass
        return self.turns[-1]

    def reply_text(self, speaker: int, mood: str | None = None, tries: int = 4) -> str:
        """What `speaker` would say now, by the text head. ValueError where nothing speakable comes out."""
        self.prepare()
        for _ in range(tries):
            ids = self.write(self.model, self.tokenizer, copy.copy(self._state), self.tokenizer.speak_prefix(speaker, mood),
                             self._number, REPLY_TOKENS, self.sampling.text_temperature, self.generator)
            text = self.tokenizer.decode(ids)
            if any(c.isascii() and c.isalpha() for c in text):
                return text
        raise ValueError("the text head gave nothing speakable: use --responder retrieval, or a model that has learned to reply")

    def score_texts(self, speaker: int, texts: list[str], mood: str | None = None) -> list[float]:
        """Mean log-likelihood per token of each text as the next turn."""
        self.prepare()
        prefix = self.tokenizer.speak_prefix(speaker, mood)
        return [score_text(self.model, self.tokenizer, copy.copy(self._state), prefix, text, self._number) for text in texts]

    @torch.inference_mode()
    def transcribe(self, codes: Tensor, speaker: int = 0) -> str:
        """What the text head hears in codes (K, T), out of context; "" for nothing or without a text head."""
        cfg = self.model.cfg
        if self.model.text_head is None or codes.shape[1] == 0:
            return ""
        most = math.ceil(BYTES_PER_SECOND * codes.shape[1] / cfg.frame_rate)
        state = self.model.new_state(1, codes.shape[1] + most + 8)
        listened = turn_rows(Turn(speaker, "", None, codes, heard=True), cfg, self.tokenizer, 0, _device(self.model))
        self.model(_until(listened, -2), state=state)                    # all but the empty transcript
        ids = generate_text(self.model, self.tokenizer, state, [self.tokenizer.transcript], 0, most, 0.0)
        try:
            return normalise(self.tokenizer.decode(ids))
        except ValueError:
            return ""

    def random(self) -> float:
        """The next number of the session's generator, in [0, 1)."""
        return float(torch.rand(1, generator=self.generator, device=self.generator.device))


def _until(rows: FrameBatch, end: int) -> FrameBatch:
    names = ("frames", "mask", "turn", "text_index", "reading")
    return FrameBatch(**{n: getattr(rows, n)[:, :end] for n in names})


# ----------------------------------------------------------------------------- written answers

class Retriever:
    """Answers from written dialogues: what was said after the most similar turns (TF-IDF cosine).

    A turn that opens its dialogue stands for itself, so the answer to it counts for more; so does an answer
    that takes up words of the question.
    """
    OPENING, ECHO = 1.3, 0.5

    def __init__(self, dialogues: list[dict]):
        """dialogues: {"kind": str, "turns": [{"speaker", "mood", "text"}, ...]}, as in assets/dialogues."""
        self.pairs: list[tuple[str, dict, int]] = []            # said, answered, how many turns came before
        for dialogue in dialogues:
            turns = dialogue["turns"]
            for before, (a, b) in enumerate(zip(turns, turns[1:])):
                if a["speaker"] != b["speaker"] and (dialogue.get("kind") != "assistant" or b["speaker"] == "assistant"):
                    self.pairs.append((a["text"], b, before))
        counts = [Counter(_terms(said)) for said, _, _ in self.pairs]
        seen = Counter(term for count in counts for term in count)
        self.weight = {term: math.log(len(counts) / n) + 1 for term, n in seen.items()}
        self.index: dict[str, list] = {}
        for number, count in enumerate(counts):
            for term, value in self._vector(count).items():
                self.index.setdefault(term, []).append((number, value))

    def _vector(self, count: Counter) -> dict[str, float]:
        vector = {t: (1 + math.log(n)) * self.weight[t] for t, n in count.items() if t in self.weight}
        norm = math.sqrt(sum(v * v for v in vector.values())) or 1.0
        return {t: v / norm for t, v in vector.items()}

    def nearest(self, text: str, count: int = 8) -> list[tuple[float, dict]]:
        """(score, reply turn), best first."""
        asked, scores = self._vector(Counter(_terms(text))), Counter()
        for term, value in asked.items():
            for number, other in self.index[term]:
                scores[number] += value * other
        found = []
        for number, score in scores.most_common(8 * count):
            _, reply, before = self.pairs[number]
            echo = sum(v * asked.get(t, 0.0) for t, v in self._vector(Counter(_terms(reply["text"]))).items())
            found.append((score * (self.OPENING if before == 0 else 1.0) + self.ECHO * echo * score, reply))
        return sorted(found, key=lambda pair: -pair[0])[:count]


def _terms(text: str) -> list[str]:
    words = re.findall(r"[a-z']+", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]
