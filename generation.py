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
import functools
import math
import re
import time
import weakref
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from architecture import CSM, FrameBatch, Slots
from config import ModelConfig, SamplingConfig, codec_columns
from frame_step import FrameStep
from moods import NEUTRAL, USUAL, Sample, analysed, in_mood, shift
from retriever import Retriever as Retriever
from text_tokenizer import normalise, read_aloud
from turns import (  # noqa: F401  (what others know under this module's name)
    END_FRAMES, END_GUARD, LEAD_FRAMES, LEAD_REST, QUIET_AT_END, QUIET_FRAMES, REPEAT_FRAMES, SECONDS_PER_BYTE, SECONDS_TO_SPARE, STALL_FRAMES,
    Finger, Guard, Lead, Speaking, Turn, audio_rows, begin_turn, cut_rows, device_of, frame_limits, guided, join, lead_of, prefill, text_rows, turn_rows)
from word_model import WordModel, search
from writing import Earlier, Luck, TextStep, choose, only_text, write

PROMPT_SECONDS = 10.0      # a voice prompt is cut to this
BYTES_PER_SECOND = 25      # no transcript is longer than this allows
REPLY_TOKENS = 160         # nor a reply than this
REPLY_CHARACTERS = 1200    # of a reply that is cut into sentences
SHORTEST = 12              # characters of a first sentence, so that it is no mere "Oh."
SHORT = ("Mr", "Ms", "Dr", "St", "Mrs", "Prof", "vs", "[A-HJ-Z]")                          # a full stop after these ends no sentence
SENTENCE_END = re.compile("".join(rf"(?<!\b{short})" for short in SHORT) + r"[.?!]+[\"')\]]*\s+(?=\S)")


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

def samples_of(codec_cfg, piece_ms: int | None) -> int:
    """Samples of a piece of `piece_ms`; None: of a whole frame. ValueError where a frame is no multiple of it."""
    size = codec_cfg.frame_size if piece_ms is None else codec_cfg.sample_rate * piece_ms // 1000
    if size <= 0 or codec_cfg.frame_size % size:
        raise ValueError(f"piece_ms {piece_ms}: a frame of {1000 * codec_cfg.frame_size // codec_cfg.sample_rate} ms must be a multiple of it, use 80, 40 or 20")
    return size


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None = None) -> Tensor:
    """(M, V) -> (M,): greedy at temperature 0, else drawn from the `top_k` likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    top = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    chances = torch.softmax(top.values / temperature, dim=-1)
    race = torch.empty_like(chances).exponential_(generator=generator)      # the same draw as torch.multinomial's, without its checks
    return top.indices.gather(-1, (chances / race).argmax(-1, keepdim=True)).squeeze(-1)


def open_tokens(cfg: ModelConfig, codebook_size: int, end: bool) -> slice:
    """The tokens that are codes of the codec, of a model with more of them; `end`: token 0 as well."""
    return slice(0 if end else cfg.code_offset, cfg.code_offset + codebook_size)


def _sample_token(logits: Tensor, among: slice, temperature: float, top_k: int, generator) -> Tensor:
    """logits (M, V) -> (M,), one of the tokens `among`."""
    return sample(logits[:, among], temperature, top_k, generator) + among.start


def draw_codes(model: CSM, hidden: Tensor, codebook_size: int, sampling: SamplingConfig, generator=None, first: Tensor | None = None) -> Tensor:
    """Hidden states (M, D) -> tokens (M, K) of the frames after them, none an end; `first` (M,) gives the first codebook's tokens."""
    codes = open_tokens(model.cfg, codebook_size, end=False)
    if first is None:
        first = _sample_token(model.c0_logits(hidden), codes, sampling.temperature, sampling.top_k, generator)
    if model.frame_codes is not None and len(hidden) == 1:
        return model.frame_codes(hidden, first, codebook_size, sampling, generator)
    return model.depth_generate(hidden, first, lambda logits, k: _sample_token(logits, codes, sampling.depth_temperature, sampling.depth_top_k, generator))


def decode_frame(model: CSM, hidden: Tensor, codebook_size: int, sampling: SamplingConfig, generator=None, may_end: bool = True) -> Tensor:
    """Hidden state (D,) of the last position -> tokens (K,) of the next frame; all zeros means the end."""
    cfg, hidden = model.cfg, hidden.unsqueeze(0)                     # (1, D)
    c0 = _sample_token(model.c0_logits(hidden), open_tokens(cfg, codebook_size, may_end), sampling.temperature, sampling.top_k, generator)
    if cfg.code_offset > 0 and int(c0) == 0:
        return torch.zeros(cfg.num_codebooks, dtype=torch.long, device=hidden.device)
    return draw_codes(model, hidden, codebook_size, sampling, generator, c0)[0]


@torch.inference_mode()
def trace(model: CSM, tokenizer, turn: Turn) -> list[int] | None:
    """Where the model's finger would be while this turn is said: its `readings`; None where it does not get through the text or has far too long."""
    cfg, codes = model.cfg, turn.codes
    ids = tokenizer.speak_prefix(turn.speaker, turn.mood) + tokenizer.encode(turn.text) + [tokenizer.eot]
    if not guided(cfg) or len(ids) + turn.num_frames + 1 > cfg.backbone.max_positions:
        return None
    state = model.new_state(1, len(ids) + turn.num_frames + 1)
    rows, finger, _ = begin_turn(turn, None, cfg, tokenizer, 0, device_of(model))
    model(rows, state=state)
    readings, step = [finger.reading, finger.reading], FrameStep(model)
    for tokens in (codes.T + cfg.code_offset).to(device_of(model)):
        hidden = step([state], [0], tokens.unsqueeze(0), [finger.reading])[0]
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
    cfg, size = model.cfg, codec.cfg.codebook_size
    semantic, sound = semantic_count(cfg, codec, num_codebooks), None
    run, step = Speaking(model, tokenizer, state, turn, number, sampling, lead, start), FrameStep(model)
    try:
        hidden = model(run.rows, state=state)[0, -1]
        run.opened(model, hidden)
        while not turn.end_reason:
            tokens = decode_frame(model, hidden, size, sampling, generator, run.finger.may_end)
            if run.ended(tokens):
                break
            audio, sound = codec.decode_stream(run.codes(tokens)[:, :num_codebooks], sound, semantic)
            yield run.sounded(audio.reshape(-1).float().cpu().numpy())
            hidden = step([state], [number], tokens.unsqueeze(0), [run.finger.reading])[0]
            run.moved(int(model.advance_logits(hidden).argmax(-1)) if run.finger.guided else 0)
        run.take_end(model)
    finally:
        run.close()


@torch.inference_mode()
def generate_slow(model: CSM, codec, tokenizer, context: FrameBatch | None, turn: Turn, number: int, sampling: SamplingConfig,
                  memory=None, lead: Lead | None = None) -> tuple[Tensor, Tensor]:
    """The oracle: greedy, no caches, everything computed anew for each frame. `context`: rows before this turn.

    Returns codes (K, T) and audio (N,), decoded at once. Ends by the model's end frame, the finger or max_seconds alone.
    """
    cfg, size = model.cfg, codec.cfg.codebook_size
    rows, finger, _ = begin_turn(turn, lead, cfg, tokenizer, number, device_of(model))
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

@functools.cache
def written_words() -> WordModel:
    """What the ear knows of words: those of the training split's dialogues and, where its package is installed, of the pronouncing lexicon."""
    from synthetic_conversations import SPLITS, dialogues, lexicon
    try:
        known = [word for split in SPLITS for word, _ in lexicon(split)]       # a dictionary, whole
    except ImportError:
        known = []
    return WordModel((turn["text"] for dialogue in dialogues()["train"] for turn in dialogue["turns"]), known)


@torch.inference_mode()
def generate_text(model: CSM, tokenizer, state, ids: list[int], number: int, most: int, temperature: float, generator=None) -> list[int]:
    """Go on with a text run that starts with `ids`: up to `most` more token ids, without the closing EOT. The oracle of writing.write; uses the state up."""
    first, out, luck = 0, [], Luck(model.cfg.text_vocab, generator, device_of(model))
    while True:
        rows = text_rows(ids, model.cfg, number, device=device_of(model))
        rows.text_index += first
        hidden = model(rows, state=state)[0, -1:]  # (1, D)
        first += len(ids)
        if len(out) >= most:
            return out
        token = choose(only_text(model.text_logits(hidden), tokenizer, may_end=bool(out)), temperature, luck, len(out))[0]
        if token == tokenizer.eot:
            return out
        out.append(token)
        ids = [token]


def stream_text(model: CSM, tokenizer, state, ids: list[int], number: int, most: int, temperature: float, generator=None, drafts=None) -> Iterator[int]:
    """generate_text, token by token as it is written and without a trace in the state; drafts: see writing.write."""
    most = min(most, state.limit - state.length - len(ids))
    return write(TextStep(model, state, number, len(ids) + most), tokenizer, ids, most, temperature, generator, drafts)


@torch.inference_mode()
def score_text(model: CSM, tokenizer, state, prefix: list[int], text: str, number: int) -> float:
    """Mean log-likelihood per token of `text` after `prefix` under the text head. `state` is used up."""
    ids = tokenizer.encode(text) + [tokenizer.eot]
    hidden = model(text_rows(prefix + ids, model.cfg, number, device=device_of(model)), state=state)[0]  # (S, D)
    logits = model.text_logits(hidden[len(prefix) - 1:-1]).float()
    return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids, device=logits.device)[:, None]).mean())


def sentences(words, longest: int = 240) -> Iterator[tuple[str, str | None]]:
    """Pieces of text -> (sentence, mood) as soon as each is complete, none longer than `longest`; at most REPLY_CHARACTERS in all.

    mood: that of the piece it ends in, where pieces have one (responders.Words).
    """
    text, total, mood = "", 0, None
    for piece in words:
        mood = getattr(piece, "mood", None)
        piece = piece[:REPLY_CHARACTERS - total]
        total += len(piece)
        text += piece
        while cut := sentence_end(text):
            yield from ((part, mood) for part in split_text(text[:cut], longest))
            text = text[cut:]
        if total >= REPLY_CHARACTERS:
            break
    yield from ((part, mood) for part in split_text(text, longest))


def sentence_end(text: str) -> int:
    """Where the second sentence of a text begins, the first having at least SHORTEST characters; 0 where it has not begun."""
    return next((m.end() for m in SENTENCE_END.finditer(text) if m.end() >= SHORTEST), 0)


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters, cut at sentence ends, else at commas, else at spaces."""
    pieces = [text.strip()]
    ends = "".join(rf"(?<!\b{short}\.)" for short in SHORT) + r"(?<=[.?!])\s+"
    for mark in (ends, r"(?<=,)\s+", r"\s+", r"(?<=.{%d})" % limit):
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


def has_letter(text: str) -> bool:
    return any(c.isascii() and c.isalpha() for c in text)


def settled(text: str) -> str:
    """What of a decoded text will not change as it goes on: a last "I" may become another word, a last character may be half there."""
    return re.sub(r"(?<![.?!]\s)\bI$", "", text.rstrip("\ufffd"))


# ----------------------------------------------------------------------------- a conversation

class Session:
    """One conversation: its turns, voices, random numbers and the model's state. Sessions share nothing but weights.

    The last turns stand in the window as frames (cfg.memory.window_turns, voices included, as far as positions
    allow); older ones live on as memory slots. Generated codes are kept, never encoded again.
    """

    def __init__(self, model: CSM, codec, tokenizer, sampling: SamplingConfig | None = None, num_codebooks: int | None = None):
        self.model, self.codec, self.tokenizer = model, codec, tokenizer
        self.sampling, self.num_codebooks = sampling or SamplingConfig(), num_codebooks
        self.generator = torch.Generator(device_of(model)).manual_seed(self.sampling.seed)
        self.turns: list[Turn] = []
        self.voices: dict[int, Turn] = {}           # speaker -> recording that stays at the start of the window
        self._slots: list[Slots | None] = []        # of each turn
        self._state, self._spare = None, None       # None: to be filled again from the turns; its buffers
        self._start = 0                             # first turn in the window
        self._opener: int | None = None             # who speaks first after the voices
        self._said: tuple | None = None             # the newest spoken turn and the state before it; None: that state is gone
        self._stream = None                         # weak reference to the generator that speaks it
        self.write = stream_text                    # or a speculative.TextLookup
        self._rehearsed: list[int] = []             # a reply as it would have been before the user's turn was over
        self._reply_seed: int | None = None         # of the next reply's random numbers, once somebody has asked
        self._moods: dict[int, tuple] = {}          # speaker -> the turn its lead is from, and what was made of that for moods, whether others share it
        self._sample: tuple | None = None           # of the newest lead that was put into a mood: its turn, frames, moods.Sample

    # ---- what is known

    def set_voice(self, speaker: int, audio: np.ndarray | None = None, codes: Tensor | None = None,
                  text: str | None = None, consumed: list[int] | None = None, moods: dict | None = None) -> None:
        """Let `speaker` sound like this recording (at most PROMPT_SECONDS of it); with `text` it counts as spoken, else as heard.

        consumed: bytes of the text spoken by the end of each frame, where that is known; else the model's own finger is followed.
        moods: a dict that keeps what is made of this voice for moods; with the same one it is made once for many sessions.
        """
        codes = self._codes(audio, codes)
        if text is None:
            codes = codes[:, :int(PROMPT_SECONDS * self.model.cfg.frame_rate)]
        voice = self.voices[speaker] = self._given(speaker, text, None, codes, consumed)
        if not voice.heard and voice.readings is None and codes.shape[1]:
            voice.readings = trace(self.model, self.tokenizer, voice)
        self._moods[speaker] = voice, {} if moods is None else moods, moods is not None
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
        self._room(len(turn.text) + turn.num_frames + 8, coming=1)       # so that the answer finds the window as it is then
        self._put(turn)
        return turn

    def _codes(self, audio, codes) -> Tensor:
        if codes is None:
            sound = torch.as_tensor(np.asarray(audio, dtype=np.float32)).view(1, 1, -1).to(device_of(self.model))
            codes = codes_of_sound(self.model.cfg, self.codec, sound)
        return codes[:self.model.cfg.num_codebooks].long().cpu()

    def _given(self, speaker: int, text: str | None, mood, codes: Tensor | None, consumed=None) -> Turn:
        if text is None:
            return Turn(speaker, self.transcribe(codes, speaker), mood, codes, heard=True)
        first = len(self.tokenizer.speak_prefix(speaker, mood))
        readings = None
        if consumed is not None and guided(self.model.cfg) and len(consumed) == codes.shape[1]:
            readings = [first, first] + [first + n for n in consumed]
        return Turn(speaker, read_aloud(text) if consumed is None else normalise(text), mood, codes, readings=readings)

    def _lead(self, speaker: int, mood: str | None = None) -> Lead | None:
        """What the model hears before a turn of `speaker`, put into the turn's mood, which it would drown out else."""
        turn, lead = self._said_before(speaker)
        if lead is None or mood is None or not self.sampling.mood_strength or mood == (turn.mood or NEUTRAL):
            return lead
        return self._in_mood(speaker, turn, lead, mood)

    def _said_before(self, speaker: int) -> tuple[Turn, Lead] | tuple[None, None]:
        """A lead and the turn it is from: the speaker's voice, else the first thing it said, so that nothing drifts."""
        seconds, rate = self.sampling.lead_seconds, self.model.cfg.frame_rate
        if not seconds or not guided(self.model.cfg) or self.tokenizer.name != "bytes":
            return None, None
        said = [self.voices.get(speaker), *(t for t in self.turns if t.speaker == speaker)]
        return next(((turn, lead) for turn in said if (lead := lead_of(turn, seconds, rate))), (None, None))

    @torch.inference_mode()
    def _in_mood(self, speaker: int, turn: Turn, lead: Lead, mood: str) -> Lead:
        """The lead said in another mood; as it is where that cannot be done (moods.analysed)."""
        known, key = self._known(speaker, turn), self._key(mood, lead)
        if key not in known:
            known[key] = self._reshaped(lead, self._taken_apart(turn, lead), shift(mood, turn.mood, self.sampling.mood_strength))
        return known[key]

    def _taken_apart(self, turn: Turn, lead: Lead) -> Sample | None:
        """The newest lead that was put into a mood, taken apart: megabytes, so it is not for others to keep."""
        if self._sample is None or self._sample[0] is not turn or self._sample[1] != lead.num_frames:
            self._sample = turn, lead.num_frames, analysed(sound_of_codes(self.model.cfg, self.codec, lead.codes.to(device_of(self.codec))).cpu().numpy())
        return self._sample[2]

    def _key(self, mood: str, lead: Lead) -> tuple:
        return mood, self.sampling.mood_strength, lead.num_frames

    def _known(self, speaker: int, turn: Turn) -> dict:
        """What was made of `turn` for moods, key -> Lead, for as long as leads come from it."""
        if self._moods.get(speaker, (None,))[0] is not turn:
            self._moods[speaker] = turn, {}, False
        return self._moods[speaker][1]

    def _reshaped(self, lead: Lead, sample: Sample | None, change: tuple[float, ...]) -> Lead:
        if sample is None:
            return lead
        codes = self._codes(in_mood(sample, change), None)
        places = np.linspace(0, lead.num_frames, codes.shape[1], endpoint=False).astype(int)                 # of each new frame in the old ones
        return Lead(lead.text, codes, [lead.read[i] for i in places])

    # ---- the window

    def prepare(self, speaker: int | None = None) -> None:
        """Fill the window now (after a turn, say), so that the next turn need not. speaker: who is going to speak, where that is known."""
        if speaker is not None:
            self._opens(speaker)
        limit = self.model.cfg.backbone.max_positions
        self._room(min(limit // 2, 256 + int(self.sampling.max_seconds * self.model.cfg.frame_rate)))

    def make_moods(self, speaker: int, count: int = len(USUAL)) -> None:
        """Make now what a turn of `speaker` in a mood begins with, for so many moods that were not made yet, about 40 ms each; else the first turn in a mood waits for it."""
        turn, lead = self._said_before(speaker)
        if lead is None or not self.sampling.mood_strength:
            return
        made = self._known(speaker, turn)
        missing = [m for m in USUAL if self._key(m, lead) not in made]
        for mood in missing[:count]:
            self._lead(speaker, mood)
        if count >= len(missing):
            self._sample = None

    def rest(self) -> None:
        """Give the buffers back (tens of MB); turns and memory slots stay, the next turn fills the window again."""
        self._state = self._spare = None
        self._said = self._said and (self._said[0], None)
        self._moods, self._sample = {speaker: made for speaker, made in self._moods.items() if made[2]}, None

    def _too_many(self, coming: int) -> bool:
        """More turns in the window than it is for, `coming` ones included; one always stays."""
        kept = len(self.turns) - self._start
        return kept > 1 and kept + len(self.voices) + coming > self.model.cfg.memory.window_turns

    def _room(self, positions: int, coming: int = 0) -> None:
        """A filled state in which `positions` more fit, if need be with fewer turns. coming: turns that are to be taken in before the next one is spoken."""
        for _ in self.making_room(positions, coming=coming):
            pass

    def making_room(self, positions: int, piece: int | None = None, coming: int = 0) -> Iterator[Tensor]:
        """_room in steps of at most `piece` positions of prefill; between them the session is without a state."""
        if self._state is not None and not self._too_many(coming) and self._state.length + positions <= self._state.limit:
            return
        while self._too_many(coming):
            self._start += 1
        while True:
            rows = self._window()
            length = rows.S if rows else 0
            if self._start >= len(self.turns) or length + positions <= self.model.cfg.backbone.max_positions:
                break
            self._start += 1
        yield from self._refill(rows, piece)

    def _window(self) -> FrameBatch | None:
        """The rows of voices and turns; voices are numbered on from the last turn that has left the window.

        Speakers take turns in all that the model has seen, so the voice of whoever speaks first after the voices comes
        first: the one right before a turn is somebody else's (LOG.md: the other way round it speaks in the wrong voice).
        """
        cfg, device = self.model.cfg, device_of(self.model)
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

    def _refill(self, rows: FrameBatch | None, piece: int | None) -> Iterator[Tensor]:
        state, self._state = self._spare or self.model.new_state(1), None
        self._said = self._said and (self._said[0], None)
        state.restart()
        state.current, state.gathered = -1, {}
        gone = [s for s in self._slots[:self._start] if s is not None][-self.model.cfg.memory.max_slots:]
        state.slots = Slots(*(torch.cat([getattr(s, f.name) for s in gone], 1) for f in dataclasses.fields(Slots))) if gone else None
        self._spare = state
        if rows is not None:
            yield from prefill(self.model, rows, state, piece)
            self._end_turn(state)
        self._state = state

    @torch.inference_mode()
    def _end_turn(self, state) -> None:
        self.model.end_turn(state)

    @property
    def _number(self) -> int:
        return len(self.voices) + len(self.turns)

    def _put(self, turn: Turn) -> None:
        for _ in self.putting(turn):
            pass

    def putting(self, turn: Turn, piece: int | None = None) -> Iterator[Tensor]:
        """The whole turn goes into the state and is kept, in steps of at most `piece` positions."""
        yield from prefill(self.model, turn_rows(turn, self.model.cfg, self.tokenizer, self._number, device_of(self.model)), self._state, piece)
        self._end_turn(self._state)
        self._keep(turn)

    def _keep(self, turn: Turn) -> None:
        """Remember a turn that the state has just taken in, and its slots under the turn's own number."""
        if self._said and self._said[0] is not turn:
            self._said = None
        slots = self._state.slots
        number = torch.full((1, 1), len(self.turns), device=device_of(self.model))
        self._slots.append(None if slots is None else Slots(slots.semantic[:, -1:], slots.prosodic[:, -1:], number))
        self.turns.append(turn)

    def replace_last(self, count: int, kept: Turn | None = None) -> None:
        """Forget the last `count` turns; `kept`, a turn with codes, stands in their place (what was heard of them, say)."""
        left = len(self.turns) - count
        if count:
            del self.turns[left:], self._slots[left:]
            self._start, self._state = min(self._start, left), None
        self._said = None
        if kept is not None:
            self._room(len(self.tokenizer.encode(kept.text)) + kept.num_frames + 8)
            self._put(kept)

    def lighten(self) -> None:
        """Forget what is needed no more: the sound of all turns, codes and slots of those that have left the window (the first of each speaker keeps its voice)."""
        first = {turn.speaker: number for number, turn in reversed(list(enumerate(self.turns)))}
        for number, turn in enumerate(self.turns):
            turn.audio = None
            if number < self._start and number != first[turn.speaker]:
                turn.codes = turn.readings = None
        for number in range(self._start - self.model.cfg.memory.max_slots):
            self._slots[number] = None

    @property
    def in_use(self) -> tuple[int, int]:
        """Positions of the window that are filled, and memory slots that are kept."""
        slots = self._spare.slots if self._spare else None
        return (self._state.length if self._state else 0), (0 if slots is None else slots.turn.shape[1])

    # ---- what is said

    def speak(self, speaker: int, text: str, mood: str | None = None, piece_ms: int | None = None) -> Iterator[np.ndarray]:
        """Chunks of `piece_ms` (a part of a frame; None: a frame, 80 ms) as they are made; when the last one is taken the turn is in `turns`.

        ValueError (at once) for text that cannot be spoken, an unknown mood or speaker. A turn that is not
        listened to until its end is forgotten (listening.cut_off keeps what was heard of it).
        """
        size, start = samples_of(self.codec.cfg, piece_ms), time.perf_counter()
        turn, lead, needed = self.planned(speaker, text, mood)
        self._room(needed)
        stream = self._speak(turn, start, self.fitting(lead, needed), size)
        self._stream = weakref.ref(stream)
        return stream

    def planned(self, speaker: int, text: str, mood: str | None = None) -> tuple[Turn, Lead | None, int]:
        """The turn that `speaker` is to say now, the lead before it, and the positions that both need. Errors as of `speak`."""
        turn = Turn(speaker, read_aloud(text), mood)
        tokens = len(self.tokenizer.speak_prefix(speaker, mood)) + len(self.tokenizer.encode(turn.text)) + 1
        self._opens(speaker)
        seconds, lead = min(self.sampling.max_seconds, SECONDS_TO_SPARE + SECONDS_PER_BYTE * tokens), self._lead(speaker, mood)
        heard = lead.num_frames + len(self.tokenizer.encode(lead.text)) + 1 if lead else 0
        return turn, lead, tokens + heard + math.ceil(seconds * self.model.cfg.frame_rate) + 1

    def fitting(self, lead: Lead | None, needed: int) -> Lead | None:
        """The lead, if the filled window has room for `needed` positions: rather in another voice than cut short."""
        return lead if self._state.length + needed <= self._state.limit else None

    def _speak(self, turn: Turn, start: float, lead: Lead | None, size: int) -> Iterator[np.ndarray]:
        state = self.hand_out(turn)
        try:
            for chunk in stream_turn(self.model, self.codec, self.tokenizer, copy.copy(state) if lead else state, turn, self._number,
                                     self.sampling, self.generator, self.num_codebooks, start, lead):
                yield from np.split(chunk, range(size, len(chunk), size))
        except BaseException:
            self.take_back(turn)
            raise
        self._state = state
        self._put(turn) if lead else self._keep(turn)      # the lead is no part of the turn: the state takes in the turn without it

    def hand_out(self, turn: Turn):
        """The state, for `turn` to be spoken into it; the session is without one until it is given back."""
        state, self._state = self._state, None
        self._said = turn, copy.copy(state)
        return state

    def take_back(self, turn: Turn) -> None:
        """As if `turn`, the one last begun, had not been: the state before it."""
        if self._said and self._said[0] is turn and self._said[1] is not None:
            self._state = copy.copy(self._said[1])

    def say(self, speaker: int, text: str, mood: str | None = None) -> Turn:
        """`speak` to its end; returns the turn."""
        for _ in self.speak(speaker, text, mood):
            pass
        return self.turns[-1]

    def reply_text(self, speaker: int, mood: str | None = None, tries: int = 4) -> str:
        """What `speaker` would say now, by the text head. ValueError where nothing speakable comes out."""
        return "".join(self.reply_stream(speaker, mood, tries))

    def reply_stream(self, speaker: int, mood: str | None = None, tries: int = 4) -> Iterator[str]:
        """reply_text in pieces, each as soon as it is certain. The session may go on with other things between them: the text is of the moment of the first piece."""
        self.prepare()
        for _ in range(tries):
            ids, sent, guess = [], "", Earlier(self._rehearsed)
            generator = torch.Generator(self.generator.device).manual_seed(self._seed_of_reply())
            self._rehearsed, self._reply_seed = [], None
            for token in self.write(self.model, self.tokenizer, self._state, self.tokenizer.speak_prefix(speaker, mood), self._number, REPLY_TOKENS,
                                    self.sampling.text_temperature, generator, guess):
                ids.append(token)
                text = settled(self.tokenizer.decode(ids))
                if len(text) > len(sent) and (sent or has_letter(text)):
                    yield text[len(sent):]
                    sent = text
            text = self.tokenizer.decode(ids)
            if has_letter(text):
                if len(text) > len(sent):
                    yield text[len(sent):]
                return
        raise ValueError("the text head gave nothing speakable: use --responder retrieval, or a model that has learned to reply")

    def _seed_of_reply(self) -> int:
        """Of the reply that comes next, in a rehearsal and then in earnest."""
        if self._reply_seed is None:
            self._reply_seed = int(torch.randint(2 ** 62, (1,), generator=self.generator, device=self.generator.device))
        return self._reply_seed

    def rehearse(self, state, number: int, speaker: int) -> Iterator[None]:
        """Write the first sentence that `speaker` would say after `state` as turn `number`, token by token: the guess from which the reply is then written quickly."""
        generator, ids = torch.Generator(self.generator.device).manual_seed(self._seed_of_reply()), []
        for token in stream_text(self.model, self.tokenizer, state, self.tokenizer.speak_prefix(speaker), number, REPLY_TOKENS,
                                 self.sampling.text_temperature, generator, Earlier(self._rehearsed)):
            ids.append(token)
            yield
            if sentence_end(self.tokenizer.decode(ids)):
                break
        self._rehearsed = ids

    def score_texts(self, speaker: int, texts: list[str], mood: str | None = None) -> list[float]:
        """Mean log-likelihood per token of each text as the next turn."""
        self.prepare()
        prefix = self.tokenizer.speak_prefix(speaker, mood)
        return [score_text(self.model, self.tokenizer, copy.copy(self._state), prefix, text, self._number) for text in texts]

    @torch.inference_mode()
    def transcribe(self, codes: Tensor, speaker: int = 0) -> str:
        """What the model hears in codes (K, T), out of context: by its ear, or by its text head where it has none; "" for nothing or without both."""
        cfg = self.model.cfg
        if codes.shape[1] == 0 or (self.model.ear is None and self.model.text_head is None):
            return ""
        if self.model.ear is not None:
            heard = self.model.ear.listen(codes.to(device_of(self.model)) + cfg.code_offset)
            words = " ".join(filter(None, (search(part.tolist(), self.model.ear.letters, written_words()) for part in heard)))
            return normalise(words) if re.search("[a-z0-9]", words) else ""
        most = math.ceil(BYTES_PER_SECOND * codes.shape[1] / cfg.frame_rate)
        state = self.model.new_state(1, codes.shape[1] + most + 8)
        listened = turn_rows(Turn(speaker, "", None, codes, heard=True), cfg, self.tokenizer, 0, device_of(self.model))
        self.model(cut_rows(listened, 0, -2), state=state)                    # all but the empty transcript
        return self.written(state, codes.shape[1], 0)

    def written(self, state, frames: int, number: int, drafts=None) -> str:
        """The transcript by the text head of a turn of `frames` frames that the state ends with; "" for nothing. drafts: see writing.write."""
        return self.as_transcript(self.transcript_tokens(state, frames, number, drafts))

    def transcript_tokens(self, state, frames: int, number: int, drafts=None) -> Iterator[int]:
        """The same as token ids, one by one."""
        if self.model.text_head is None:
            return iter(())
        most = math.ceil(BYTES_PER_SECOND * frames / self.model.cfg.frame_rate)
        return stream_text(self.model, self.tokenizer, state, [self.tokenizer.transcript], number, most, 0.0, None, drafts)

    def as_transcript(self, ids) -> str:
        try:
            return normalise(self.tokenizer.decode(list(ids)))
        except ValueError:
            return ""

    def random(self) -> float:
        """The next number of the session's generator, in [0, 1)."""
        return float(torch.rand(1, generator=self.generator, device=self.generator.device))


