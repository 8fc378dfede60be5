"""Listening while the other speaks, and stopping in the middle of a sentence.

    listener = Listener(session, speaker=0)
    for piece in microphone:                       # float32, any number of samples at the codec's rate
        listener.feed(piece)                       # encoded and taken into the model's state at once
    turn = listener.finish("how are you?")         # the transcript, from an ASR; the reply starts from a warm cache

    for chunk in session.speak(1, "well, you see, it is a long story ..."):
        if play(chunk) is interrupted: break
    cut_off(session, samples_heard)                # what was heard stays in the conversation, the rest was never said

Order of a heard turn (DESIGN.md 3): LISTEN prefix, frames, end frame, TRANSCRIPT, text, EOT. The frames go in as they come; the text, which
nobody knows before, goes in when the turn is over, and that is all that stands between the end of the user's voice and the reply.
A session's rows come in the order of its turns as ever: while it listens it neither speaks nor takes in other turns.

Shapes: N samples, T frames of frame_size samples, K codebooks.
"""
from __future__ import annotations

import copy
import math
import re
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from config import codec_columns
from frame_step import FrameStep
from text_tokenizer import read_aloud
from turns import Turn, audio_rows, cut_rows, device_of, join, prefill, text_rows, turn_rows
from writing import Earlier

RESERVE_SECONDS = 10.0    # room for so much more sound is made at a time
WORDS = 64, 2             # positions kept for the transcript: so many, and so many per frame (25 letters a second)


class Listener:
    """One turn that is heard while it is said. Its parts (encode, take, closing) may be called apart from each other: batching.py does.

    piece: positions that one call of the model may take in at most; the generators yield after each. ValueError for a speaker that there is
    not, and where the turn is longer than the model's window.
    """

    def __init__(self, session, speaker: int = 0, piece: int | None = None):
        model = session.model
        self.session, self.speaker, self.piece = session, speaker, piece
        self.prefix = session.tokenizer.listen_prefix(speaker)
        self.columns = codec_columns(model.cfg.num_codebooks, model.cfg.num_semantic, session.codec.cfg.num_semantic)
        self.codes: list[Tensor] = []                       # (K, t) each: all that was taken in
        self.audio: list[np.ndarray] = []
        self._rest, self._encoder = np.zeros(0, dtype=np.float32), None
        self._before = self._state = None
        self._words: list[int] = []                         # tokens of the newest transcript by the text head
        self._caught = 0, ""                                # frames that the newest transcript by the ear is of, and the transcript
        self._step = FrameStep(model)

    @property
    def num_frames(self) -> int:
        return sum(c.shape[1] for c in self.codes)

    # ---- in one go

    def feed(self, audio: np.ndarray) -> None:
        """audio (n,) float32 at the codec's rate, any n; what does not fill a frame waits for more."""
        codes = self.encode(audio)
        if codes is not None:
            _exhaust(self.take(codes))

    def finish(self, text: str | None = None) -> Turn:
        """The turn is over. text: what was said; None: the model writes it down, by its ear, or by its text head after what it has heard of the conversation. ValueError where nothing was heard, or for text that cannot be read."""
        codes = self.rest()
        if codes is not None:
            _exhaust(self.take(codes))
        _exhaust(self.closing(text))
        return self.session.turns[-1]

    def cancel(self) -> None:
        """Forget what was heard: the session is as it was before."""
        if self._before is not None:
            self.session._state, self._state, self._before = self._before, None, None

    @torch.inference_mode()
    def partial(self) -> str:
        """What the model makes of what was heard so far; nothing is taken into the state."""
        return "" if not self.codes or self._state is None else self._transcript()

    def _transcript(self) -> str:
        """By the ear; by the text head, after what was said before, where there is none."""
        session = self.session
        if session.model.ear is None:
            return session.written(self._ended(copy.copy(self._state)), self.num_frames, self._number, Earlier(self._words))
        if self._caught[0] != self.num_frames:
            self._caught = self.num_frames, session.transcribe(torch.cat(self.codes, 1), self.speaker)
        return self._caught[1]

    def rehearse(self, speaker: int) -> Iterator[None]:
        """In time that is left while the turn is being said, token by token: write down what was heard so far, and the first sentence that `speaker`
        would say to it. Nothing is taken into the state; the transcript and the reply proper are written more quickly after it, and are the same.
        """
        if not self.codes or self._state is None or self.session.model.text_head is None:
            return
        session = self.session
        if session.model.ear is None:
            words = []
            for token in session.transcript_tokens(self._ended(copy.copy(self._state)), self.num_frames, self._number, Earlier(self._words)):
                words.append(token)
                yield
            self._words = words
        yield
        text = self._transcript() if session.model.ear is not None else session.as_transcript(self._words)
        state, rows = copy.copy(self._state), self._closing_rows(self.heard(text))
        if state is None or state.length + rows.S + len(self.prefix) >= state.limit:
            return
        with torch.inference_mode():
            session.model(rows, state=state)
        yield from session.rehearse(state, self._number + 1, speaker)

    # ---- in steps

    @torch.inference_mode()
    def encode(self, audio: np.ndarray) -> Tensor | None:
        """audio (n,) -> codes (K, t) of the frames that are complete now; None where none is."""
        audio, size = np.asarray(audio, dtype=np.float32).reshape(-1), self.session.codec.cfg.frame_size
        self.audio.append(audio)
        self._rest = np.concatenate([self._rest, audio])
        whole = len(self._rest) // size * size
        if not whole:
            return None
        sound, self._rest = torch.from_numpy(self._rest[:whole].copy()).view(1, 1, -1), self._rest[whole:]
        codes, self._encoder = self.session.codec.encode_stream(sound.to(device_of(self.session.model)), self._encoder, self.columns[-1] + 1)
        return codes[0][self.columns]

    def rest(self) -> Tensor | None:
        """The last frame, filled up with silence, as codec.encode does it; None where the sound ended with a frame."""
        missing = -len(self._rest) % self.session.codec.cfg.frame_size
        if not missing:
            return None
        codes = self.encode(np.zeros(missing, dtype=np.float32))
        self.audio.pop()
        return codes

    def opening(self, text: str = "") -> Iterator[Tensor]:
        """Make room (for the transcript too, where it is known) and take in what stands before the sound. The session has no state until the turn is over."""
        session = self.session
        session._opens(self.speaker)
        yield from session.making_room(room_for(session, len(self.prefix), self.num_frames, text), self.piece, coming=1)
        self._before, self._state, session._state, session._said = copy.copy(session._state), session._state, None, None
        self._number = session._number
        rows = [text_rows(self.prefix, session.model.cfg, self._number, device=device_of(session.model)), *(self._rows(c) for c in self.codes)]
        yield from prefill(session.model, join(rows), self._state, self.piece)

    def has_room(self, frames: int) -> bool:
        """Whether `frames` more, and the words for all of them, fit into the state as it is."""
        return self._state is not None and self._state.length + frames + WORDS[0] + WORDS[1] * (self.num_frames + frames) <= self._state.limit

    def take(self, codes: Tensor) -> Iterator[Tensor]:
        """codes (K, t) of the next frames go into the state. Where the window is full, older turns leave it first."""
        if self.has_room(codes.shape[1]):
            yield from self._frames(codes)
            self.codes.append(codes)
        else:
            self.codes.append(codes)
            yield from self._again()

    def _frames(self, codes: Tensor) -> Iterator[Tensor]:
        if codes.shape[1] > 1:
            yield from prefill(self.session.model, self._rows(codes), self._state, self.piece)
        else:
            yield self._step([self._state], [self._number], codes.T.long() + self.session.model.cfg.code_offset, [-1]).unsqueeze(0)

    def _again(self, text: str = "") -> Iterator[Tensor]:
        self.cancel()
        yield from self.opening(text)

    def heard(self, text: str) -> Turn:
        codes = torch.cat(self.codes, 1).long().cpu() if self.codes else torch.zeros(self.session.model.cfg.num_codebooks, 0, dtype=torch.long)
        return Turn(self.speaker, read_aloud(text) if text else "", None, codes, np.concatenate(self.audio), heard=True)

    def closing(self, text: str | None = None) -> Iterator[Tensor]:
        """End frame, transcript, memory slots; the turn is in the session's turns."""
        if not self.codes:
            raise ValueError("nothing was heard: feed sound before the turn ends")
        session = self.session
        turn = self.heard(self._transcript() if text is None else text)
        rows = self._closing_rows(turn)
        if self._state.length + rows.S > self._state.limit:
            yield from self._again(turn.text)
        yield from prefill(session.model, rows, self._state, self.piece)
        session._state, self._state, self._before = self._state, None, None
        session._end_turn(session._state)
        session._keep(turn)

    def _closing_rows(self, turn: Turn):
        """What comes after the turn's frames: the end frame and the transcript."""
        rows = turn_rows(turn, self.session.model.cfg, self.session.tokenizer, self._number, device_of(self.session.model))
        return cut_rows(rows, len(self.prefix) + turn.num_frames, rows.S)

    def _rows(self, codes: Tensor):
        return audio_rows(codes.long() + self.session.model.cfg.code_offset, self.session.model.cfg, self._number)

    @torch.inference_mode()
    def _ended(self, state):
        cfg = self.session.model.cfg
        self.session.model(audio_rows(torch.zeros(cfg.num_codebooks, 1, dtype=torch.long, device=device_of(self.session.model)), cfg, self._number), state=state)
        return state


def room_for(session, prefix: int, frames: int, text: str = "") -> int:
    """Positions that a heard turn may come to need: its frames so far, RESERVE_SECONDS more, and the words."""
    more = frames + math.ceil(RESERVE_SECONDS * session.model.cfg.frame_rate)
    return min(prefix + more + 3 + max(WORDS[0] + WORDS[1] * more, len(text)), session.model.cfg.backbone.max_positions)


def _exhaust(steps: Iterator) -> None:
    for _ in steps:
        pass


def listen(session, speaker: int, audio: np.ndarray, text: str) -> Turn:
    """The same turn offline: all the sound at once, after it was said. The oracle of Listener."""
    turn = Turn(speaker, read_aloud(text), None, session._codes(audio, None), np.asarray(audio, dtype=np.float32), heard=True)
    session._opens(speaker)
    session._room(room_for(session, len(session.tokenizer.listen_prefix(speaker)), turn.num_frames, turn.text), coming=1)
    session._put(turn)
    return turn


# ----------------------------------------------------------------------------- barge-in

def cut_off(session, samples: int) -> Turn | None:
    """The turn being spoken, or the one just spoken, was heard for `samples` samples only: that much of it stays, as if no more had been said.

    The turn as it stands in the session then, or None where nothing of it was heard. Codes end with the frame that was heard last, the text with
    the word that the voice had reached, the sound with the sample. A turn that was heard to its end stays whole. ValueError where nothing was
    spoken, or something else was said since.
    """
    stream = session._stream and session._stream()
    if stream is not None:
        stream.close()
    if session._said is None:
        raise ValueError("there is no turn to cut off: nothing was spoken yet, or something else was said or heard since")
    turn, before = session._said
    made = bool(session.turns) and session.turns[-1] is turn
    if made and samples >= len(turn.audio):
        return turn
    part = heard_part(turn, samples, session.codec.cfg.frame_size, session.tokenizer)
    if made:
        session.turns.pop()
        session._slots.pop()
    session._state, session._said = before, None
    if part is not None:
        if before is None:
            session._room(len(session.tokenizer.encode(part.text)) + part.num_frames + 8)
        session._put(part)
    return part


def heard_part(turn: Turn, samples: int, frame_size: int, tokenizer) -> Turn | None:
    """The beginning of a spoken turn that lasts `samples`; None where no word of it had begun.

    A model without a reading position does not know how far it is in the text: there the text stays whole.
    """
    frames = min(math.ceil(samples / frame_size), turn.num_frames)
    text = turn.text if turn.readings is None else read_text(turn.text, turn.readings[1 + frames] - turn.readings[0], tokenizer)
    if frames <= 0 or not text:
        return None
    readings = turn.readings
    if readings is not None:
        end = readings[0] + len(tokenizer.encode(text))
        readings = [min(r, end) for r in readings[:frames + 2]]
    return Turn(turn.speaker, text, turn.mood, turn.codes[:, :frames], turn.audio[:max(0, samples)], readings=readings,
                first_audio_ms=turn.first_audio_ms, total_ms=turn.total_ms, ended=False, end_reason="cut off")


def read_text(text: str, tokens: int, tokenizer) -> str:
    """The first `tokens` tokens of a text, to the end of the word that they end in."""
    if tokens <= 0:
        return ""
    for word in re.finditer(r"\S+", text):
        if re.search(r"\w", text[:word.end()]) and len(tokenizer.encode(text[:word.end()])) >= tokens:
            return text[:word.end()]
    return text
