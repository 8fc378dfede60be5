"""Many conversations on one model: continuous batching.

    engine = BatchingEngine(model, codec, tokenizer, BatchingConfig(max_turns=8), SamplingConfig())
    session = engine.session()                                   # a generation.Session
    for piece in engine.speak(session, "hello.", speaker=1, piece_ms=20):
        play(piece)                                              # float32 (n,) at codec.cfg.sample_rate
    hearing = engine.listen(session, speaker=0)                  # the user's turn, while it is said
    hearing.feed(audio); hearing.finish("how are you?")          # the words from an ASR
    engine.call(session, Session.set_voice, 1, audio=recording)  # anything else that a session does, in the calling thread
    speech.cancel()   speech.cut_off(samples)   engine.rest(session)   engine.stats()   engine.close()

One worker thread makes one frame at a time for all turns that are being said: one step of the backbone (frame_step.py), one pass of the depth
decoder, one of the codec. Turns join and leave between frames. What a newcomer must take in first (its window, its text) is taken in between
two frames of the others, `prefill_positions` at a time. Every turn draws from its own generator and ends by its own rules, so that it comes out
as `Session.speak` alone would make it, but for rounding (frame_step.py says why); an error in one is raised by its own iterator and concerns no other.
All methods may be called from any thread; one session does one thing at a time.
"""
from __future__ import annotations

import copy
import queue
import threading
import time
from collections import deque
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import listening
from config import BatchingConfig as BatchingConfig, SamplingConfig
from frame_step import FrameStep
from generation import Session, draw_codes, samples_of, semantic_count
from rvq_tokenizer import Codec
from turns import Speaking, Turn, guided, prefill


class EngineFull(RuntimeError):
    """As many turns wait as may: try again later."""


class EngineClosed(RuntimeError):
    """The engine takes nothing more."""


class SessionBusy(RuntimeError):
    """The session speaks, listens or is being worked on."""


# ----------------------------------------------------------------------------- one turn in the engine

class _Lane:
    """One turn of one session in the engine: what is being done for it and who waits for it. The worker's, but for the flags and the queue."""

    def __init__(self, session: Session):
        self.session = session
        self.steps: Iterator | None = None                  # prefill to be done, piece by piece
        self.after: Callable | None = None                  # what comes when it is done
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.cancelled = False
        self.winding_up = False                             # made to its end: nobody hears what is left to do

    def undo(self) -> None:
        """The session as it was before."""

    def over(self) -> None:
        """The session is free again: tell who waits."""
        self.done.set()


class _SpeechLane(_Lane):
    def __init__(self, session: Session, size: int):
        super().__init__(session)
        self.size, self.start, self.turn = size, time.perf_counter(), None
        self.generator = self.state = None
        self.run: Speaking | None = None
        self.hidden: Tensor | None = None                   # (D,) of the newest position
        self.codes: Tensor | None = None                    # (1, k, 1) of the newest frame
        self.sound = None                                   # the codec's stream
        self.pieces: queue.SimpleQueue = queue.SimpleQueue()
        self.resting = False                                # far enough ahead of its listener

    def row(self) -> tuple:
        """state, turn number, tokens (K,) and reading of the newest frame, for the backbone."""
        return self.run.state, self.run.number, self.run.tokens, self.run.finger.reading

    def undo(self) -> None:
        self.session.take_back(self.turn)
        if self.run is not None:
            self.run.close()

    def deliver(self, audio: Tensor) -> None:
        chunk = self.run.sounded(audio.float().cpu().numpy())
        for at in range(0, len(chunk), self.size):
            self.pieces.put(chunk[at:at + self.size])

    def over(self) -> None:
        super().over()
        self.pieces.put(None)


class _HearingLane(_Lane):
    def __init__(self, session: Session, listener: listening.Listener):
        super().__init__(session)
        self.listener = listener
        self.pending: deque[Tensor] = deque()               # codes (K, t) that are not yet in the state
        self.closing, self.text = False, ""

    def row(self) -> tuple:
        listener = self.listener
        return listener._state, listener._number, self.pending[0][:, 0] + self.session.model.cfg.code_offset, -1

    def undo(self) -> None:
        self.listener.cancel()


class Speech:
    """A turn that the engine makes: an iterator of its sound. Dropped or cancelled before its end, the turn is forgotten."""

    def __init__(self, engine: "BatchingEngine", lane: _SpeechLane):
        self._engine, self._lane = engine, lane
        self.session, self.turn = lane.session, lane.turn   # the turn is filled in when the iterator has ended

    def __iter__(self) -> "Speech":
        return self

    def __next__(self) -> np.ndarray:
        piece = self.next()
        if piece is None:
            raise StopIteration
        return piece

    def next(self, timeout: float | None = None) -> np.ndarray | None:
        """The next piece (n,) float32, None after the last. TimeoutError after `timeout` seconds; raises what went wrong in this turn."""
        lane = self._lane
        if lane.cancelled:
            return None
        try:
            piece = lane.pieces.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no sound within {timeout} s") from None
        if piece is None:
            lane.pieces.put(None)                           # for whoever asks again
            if lane.error is not None and not lane.cancelled:
                raise lane.error
            return None
        if lane.resting:
            self._engine._notify()
        return None if lane.cancelled else piece

    def cancel(self, wait: bool = True) -> None:
        """Stop: the iterator ends, the session is as it was before the turn. wait: until the session is free again (a frame at most)."""
        self._engine._cancel(self._lane, wait)

    def cut_off(self, samples: int) -> Turn | None:
        """Barge-in: stop, and keep in the session what was heard, the first `samples` samples (listening.cut_off); also after the turn was made to its end.

        The turn as it stands in the session now, None where nothing was heard. ValueError where something else was said since.
        """
        self.cancel()
        return self._engine.call(self.session, self._cut_off, samples)

    def _cut_off(self, session: Session, samples: int) -> Turn | None:
        if self._lane.run is None:
            return None
        if session._said is None or session._said[0] is not self.turn:
            raise ValueError("this turn was cut off already, or something else was said since")
        return listening.cut_off(session, samples)

    def __enter__(self) -> "Speech":
        return self

    def __exit__(self, *_) -> None:
        self.cancel()

    def __del__(self):
        self._engine._cancel(self._lane, wait=False)


class Hearing:
    """A turn that is heard while it is said. The session is free again after finish or cancel."""

    def __init__(self, engine: "BatchingEngine", lane: _HearingLane):
        self._engine, self._lane, self._feeding = engine, lane, threading.Lock()
        self._codes: list[Tensor] = []

    def feed(self, audio: np.ndarray) -> None:
        """audio (n,) float32 at the codec's rate, any n. Encoded here; the worker takes it in with its next frame."""
        with self._feeding:
            self._raise()
            self._hand_over(self._lane.listener.encode(audio))

    def finish(self, text: str | None = None) -> Turn:
        """The turn is over and was `text` (None: the model's text head writes it down). The turn, once it is in the session's state.

        ValueError where nothing was heard or the text cannot be read: the turn is forgotten then.
        """
        with self._feeding:
            self._raise()
            lane, listener = self._lane, self._lane.listener
            self._hand_over(listener.rest())
            if text is None and self._codes:
                text = lane.session.transcribe(torch.cat(self._codes, 1), listener.speaker)
            with self._engine._wake:
                lane.closing, lane.text = True, text
                self._engine._wake.notify_all()
        lane.done.wait()
        if lane.error is not None:
            raise lane.error
        return lane.session.turns[-1]

    def cancel(self) -> None:
        """Forget the turn: the session is as it was before."""
        self._engine._cancel(self._lane, wait=True)

    def _hand_over(self, codes: Tensor | None) -> None:
        if codes is not None:
            self._codes.append(codes.long())
            with self._engine._wake:
                self._lane.pending.append(codes.long())
                self._engine._wake.notify_all()

    def _raise(self) -> None:
        if self._lane.error is not None:
            raise self._lane.error
        if self._lane.done.is_set() or self._lane.cancelled:
            raise ValueError("this turn is over: listen again for the next one")

    def __del__(self):
        self._engine._cancel(self._lane, wait=False)


# ----------------------------------------------------------------------------- drawing and decoding for many

def sample_rows(logits: Tensor, temperatures: list[float], top_ks: list[int], generators: list) -> Tensor:
    """generation.sample for rows of their own temperature, top_k and generator: logits (R, V) -> (R,). Each row's draw is what it would be alone."""
    greedy = logits.argmax(-1)
    if not any(temperatures):
        return greedy
    kept = [min(k, logits.shape[-1]) for k in top_ks]
    top = logits.float().topk(max(kept), dim=-1)
    scale = torch.tensor([t or 1.0 for t in temperatures], device=logits.device).unsqueeze(1)
    values, race = top.values / scale, torch.ones_like(top.values)
    for r, (k, temperature, generator) in enumerate(zip(kept, temperatures, generators)):
        values[r, k:] = -torch.inf
        if temperature:
            race[r, :k].exponential_(generator=generator)
    drawn = top.indices.gather(-1, (values.softmax(-1) / race).argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(torch.tensor([bool(t) for t in temperatures], device=logits.device), drawn, greedy)


def draw_frames(model, lanes: list[_SpeechLane], codebook_size: int) -> list[Tensor]:
    """The next frame of every lane, tokens (K,) each; zeros where the turn ends. generation.decode_frame for many."""
    cfg = model.cfg
    hidden, samplings = torch.stack([lane.hidden for lane in lanes]), [lane.session.sampling for lane in lanes]
    last = cfg.code_offset + codebook_size
    logits = model.c0_logits(hidden)[:, :last]
    if cfg.code_offset:
        shut = torch.tensor([not lane.run.finger.may_end for lane in lanes], device=hidden.device)
        logits = logits.clone()
        logits[shut, :cfg.code_offset] = -torch.inf
    first = sample_rows(logits, [s.temperature for s in samplings], [s.top_k for s in samplings], [lane.generator for lane in lanes])
    on = [r for r, c in enumerate(first.tolist()) if c or not cfg.code_offset]
    tokens = first.new_zeros(len(lanes), cfg.num_codebooks)
    if len(on) == 1:
        lane = lanes[on[0]]
        tokens[on] = draw_codes(model, hidden[on], codebook_size, lane.session.sampling, lane.generator, first[on])
    elif on:
        temperatures, top_ks = [samplings[r].depth_temperature for r in on], [samplings[r].depth_top_k for r in on]
        generators = [lanes[r].generator for r in on]

        def pick(logits: Tensor, k: int) -> Tensor:
            return sample_rows(logits[:, cfg.code_offset:last], temperatures, top_ks, generators) + cfg.code_offset
        tokens[on] = model.depth_generate(hidden[on], first[on], pick)
    return list(tokens)


class Sounds:
    """The codec's streams of many turns, decoded together where the codec's state can be stacked (ours; Mimi goes one by one)."""

    def __init__(self, codec):
        self.codec, self.stackable = codec, isinstance(codec, Codec)
        self._together: dict[tuple, tuple] = {}                                  # (codebooks, semantic ones) -> lanes, their stacked state

    def decode(self, lanes: list[_SpeechLane], semantic: Callable) -> list[Tensor]:
        """One frame (1, k, 1) of every lane -> audio (frame_size,) each."""
        out, groups = {}, {}
        for lane in lanes:
            if lane.sound is None or not self.stackable:
                audio, lane.sound = self.codec.decode_stream(lane.codes, lane.sound, semantic(lane))
                out[lane] = audio.reshape(-1)
            else:
                groups.setdefault((lane.codes.shape[1], semantic(lane)), []).append(lane)
        for key, group in groups.items():
            audio = self._decode(key, group)
            out |= {lane: audio[r].reshape(-1) for r, lane in enumerate(group)}
        return [out[lane] for lane in lanes]

    def forget(self, lane: _SpeechLane) -> None:
        """The lane leaves; those whose states were stacked with its own go on."""
        for key, (lanes, state) in list(self._together.items()):
            if lane in lanes:
                self._spread(lanes, state)
                del self._together[key]

    @staticmethod
    def _spread(lanes: list[_SpeechLane], state) -> None:
        for r, lane in enumerate(lanes):
            lane.sound = each_leaf(lambda x, r=r: x[r:r + 1], state)

    def _decode(self, key: tuple, group: list[_SpeechLane]) -> Tensor:
        before, state = self._together.get(key, ([], None))
        if before != group:
            self._spread(before, state)
            state = each_leaf(lambda *rows: torch.cat(rows), *(lane.sound for lane in group))
        audio, state = self.codec.decode_stream(torch.cat([lane.codes for lane in group]), state, key[1])
        self._together[key] = list(group), state
        return audio


def each_leaf(function, *trees):
    """function of the tensors that stand in the same place of trees of dicts, lists and tuples; None stays."""
    first = trees[0]
    if isinstance(first, dict):
        return {k: each_leaf(function, *(t[k] for t in trees)) for k in first}
    if isinstance(first, (list, tuple)):
        return type(first)(each_leaf(function, *parts) for parts in zip(*trees, strict=True))
    return None if first is None else function(*trees)


# ----------------------------------------------------------------------------- the engine

class BatchingEngine:
    """See the module's docstring. One engine per model; its thread runs until close()."""

    def __init__(self, model, codec, tokenizer, cfg: BatchingConfig | None = None, sampling: SamplingConfig | None = None):
        self.model, self.codec, self.tokenizer = model, codec, tokenizer
        self.cfg, self.sampling = cfg or BatchingConfig(), sampling or SamplingConfig()
        self._step, self._sounds = FrameStep(model), Sounds(codec)
        self._wake = threading.Condition()
        self._busy: dict[int, object] = {}                  # id(session) -> who works on it
        self._waiting: deque[_SpeechLane] = deque()
        self._preparing: deque[_Lane] = deque()             # prefill to do; the worker's own, as are the next two
        self._speaking: list[_SpeechLane] = []
        self._hearing: list[_HearingLane] = []
        self._made, self._seconds, self._turned_away, self._ended = 0, 0.0, 0, 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="batching", daemon=True)
        self._thread.start()

    # ---- for everybody

    def session(self, sampling: SamplingConfig | None = None, num_codebooks: int | None = None) -> Session:
        """A new conversation on this engine's model."""
        return Session(self.model, self.codec, self.tokenizer, sampling or self.sampling, num_codebooks)

    def speak(self, session: Session, text: str, speaker: int = 1, mood: str | None = None, seed: int | None = None, piece_ms: int | None = None) -> Speech:
        """`speaker` says `text` in the session: an iterator of the sound in pieces of `piece_ms` (None: frames, 80 ms).

        seed: of this turn's draws; None: the session's generator goes on. ValueError for what cannot be spoken; EngineFull, SessionBusy, EngineClosed.
        """
        lane = _SpeechLane(session, samples_of(self.codec.cfg, piece_ms))
        with self._wake:
            self._open()
            if len(self._lanes(_SpeechLane)) >= self.cfg.max_turns + self.cfg.max_waiting:
                self._turned_away += 1
                raise EngineFull(f"{len(self._waiting)} turns wait already: try again later, or raise --max_waiting")
            self._reserve(session, lane)
        try:
            lane.turn, lead, needed = session.planned(speaker, text, mood)
            lane.generator = session.generator if seed is None else torch.Generator(session.generator.device).manual_seed(seed)
            self._enter(lane, self._beginning(lane, lead, needed), self._speaking.append, self._waiting)
        except BaseException:
            self._release(session)
            raise
        return Speech(self, lane)

    def listen(self, session: Session, speaker: int = 0) -> Hearing:
        """`speaker` begins to talk: give the sound to the Hearing as it comes. ValueError for an unknown speaker; SessionBusy, EngineClosed."""
        listener = listening.Listener(session, speaker, self.cfg.prefill_positions)
        lane = _HearingLane(session, listener)
        with self._wake:
            self._reserve(session, lane)
            self._enter(lane, listener.opening(), self._hearing.append, self._preparing)
        return Hearing(self, lane)

    def call(self, session: Session | None, function: Callable, *args, **more):
        """function(session, *args, **more) in this thread, while nobody else works on the session (None: on none). It slows the others only by the work itself."""
        with self._wake:
            self._open()
            if session is not None:
                self._reserve(session, self)
        try:
            return function(session, *args, **more)
        finally:
            if session is not None:
                self._release(session)

    def rest(self, session: Session) -> None:
        """Give the session's buffers back; turns and memory stay, the next turn fills its window again."""
        self.call(session, Session.rest)

    def stats(self) -> dict:
        """Turns speaking, preparing and waiting, hearings, turns ended and turned away, frames made, and the seconds that the worker took for them."""
        with self._wake:
            return {"speaking": len(self._speaking), "preparing": len(self._preparing), "waiting": len(self._waiting), "hearing": len(self._lanes(_HearingLane)),
                    "resting": sum(lane.resting for lane in list(self._speaking)), "ended": self._ended, "turned_away": self._turned_away,
                    "frames": self._made, "seconds": self._seconds}

    def close(self, finish: bool = True) -> None:
        """Take nothing more; turns that are being made are made to their end (finish) or dropped; those that wait, and hearings, get EngineClosed."""
        with self._wake:
            self._closing = True
            for lane in self._lanes(_Lane):
                if not finish or lane in self._waiting or isinstance(lane, _HearingLane):
                    lane.error = EngineClosed("the engine was closed before this turn was over")
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "BatchingEngine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- who works on what

    def _lanes(self, kind) -> list:
        return [lane for lane in self._busy.values() if isinstance(lane, kind)]

    def _open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine is closed")

    def _reserve(self, session: Session, who) -> None:
        if session.model is not self.model:
            raise ValueError("this session belongs to another model: make it with engine.session()")
        self._open()
        if id(session) in self._busy:
            raise SessionBusy("the session speaks or listens: wait for its end, or cancel it")
        self._busy[id(session)] = who

    def _enter(self, lane: _Lane, steps: Iterator, after: Callable, line: deque) -> None:
        with self._wake:
            self._open()
            lane.steps, lane.after = steps, after
            line.append(lane)
            self._wake.notify_all()

    def _release(self, session: Session) -> None:
        with self._wake:
            self._busy.pop(id(session), None)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _cancel(self, lane: _Lane, wait: bool) -> None:
        if lane.done.is_set():
            return
        lane.cancelled = True
        if isinstance(lane, _SpeechLane):
            lane.pieces.put(None)
        if wait:
            self._notify()
            lane.done.wait()
        elif self._wake.acquire(blocking=False):                                 # from __del__, which may run anywhere: never waits
            self._wake.notify_all()
            self._wake.release()

    # ---- the worker

    def _work(self) -> None:
        with torch.inference_mode():
            try:
                while self._wait():
                    start = time.perf_counter()
                    self._prefill()
                    self._frame()
                    self._seconds += time.perf_counter() - start
            except BaseException as error:                                       # a fault of this module: nobody may wait for ever
                with self._wake:
                    self._closing = True
                    for lane in self._lanes(_Lane):
                        self._fail(lane, error)
                raise

    def _wait(self) -> bool:
        """Until there is something to do; False when all is over."""
        with self._wake:
            while True:
                for lane in self._lanes(_Lane):
                    if (lane.cancelled or lane.error is not None) and lane.steps is not None:
                        self._fail(lane, lane.error)
                while self._waiting and len([lane for lane in (*self._preparing, *self._speaking) if isinstance(lane, _SpeechLane)]) < self.cfg.max_turns:
                    self._preparing.append(self._waiting.popleft())
                if self._preparing or any(not self._rests(lane) for lane in self._speaking) or any(lane.pending or lane.closing for lane in self._hearing):
                    return True
                if self._closing and not self._lanes(_Lane):
                    return False
                self._wake.wait(1.0)

    def _rests(self, lane: _SpeechLane) -> bool:
        lane.resting = True                                                      # before the count: who takes a piece after it wakes the worker
        lane.resting = not self._closing and lane.pieces.qsize() * lane.size >= self.cfg.ahead_seconds * self.codec.cfg.sample_rate
        return lane.resting

    def _prefill(self) -> None:
        """At most `prefill_positions` for all newcomers in turn; four times as much where nobody speaks who could be kept waiting."""
        budget = self.cfg.prefill_positions * (1 if any(not lane.resting for lane in self._speaking) else 4)
        while budget > 0 and self._preparing:
            lane = min(self._preparing, key=lambda lane: lane.winding_up)        # who has not yet been heard comes first
            self._preparing.remove(lane)
            try:
                budget -= next(lane.steps).shape[1]
                self._preparing.append(lane)
            except StopIteration:
                lane.after(lane)
            except Exception as error:
                self._fail(lane, error)

    def _frame(self) -> None:
        """One frame of every turn that does not rest, and of everyone who is heard."""
        size, on = self.codec.cfg.codebook_size, []
        for lane, tokens in self._each(lambda lanes: draw_frames(self.model, lanes, size), [lane for lane in self._speaking if not self._rests(lane)]):
            if lane.run.ended(tokens):
                self._wind_up(lane)
            else:
                lane.codes = lane.run.codes(tokens)[:, :lane.session.num_codebooks]
                on.append(lane)
        on = [lane for lane, audio in self._each(lambda lanes: self._sounds.decode(lanes, self._semantic), on) if self._delivered(lane, audio)]
        self._made += len(on)
        self._take_in(on + self._heard())

    def _semantic(self, lane: _SpeechLane) -> int:
        return semantic_count(self.model.cfg, self.codec, lane.session.num_codebooks)

    def _delivered(self, lane: _SpeechLane, audio: Tensor) -> bool:
        return bool(self._each(lambda lanes: [lanes[0].deliver(audio)], [lane]))

    def _heard(self) -> list[_HearingLane]:
        """Those of whom a single frame has come; more than that, and what comes at the end, is prefill."""
        single = []
        for lane in list(self._hearing):
            with self._wake:
                pending, closing = list(lane.pending), lane.closing
            count = sum(codes.shape[1] for codes in pending)
            if count == 1 and lane.listener.has_room(1):
                single.append(lane)
            elif count or closing:
                self._hearing.remove(lane)
                lane.steps, lane.after = self._catching_up(lane, pending, closing), self._end if closing else self._hearing.append
                self._preparing.append(lane)
        return single

    @staticmethod
    def _catching_up(lane: _HearingLane, pending: list[Tensor], closing: bool) -> Iterator[Tensor]:
        if pending:
            yield from lane.listener.take(torch.cat(pending, 1))
        for _ in pending:
            lane.pending.popleft()
        if closing:
            yield from lane.listener.closing(lane.text)

    def _take_in(self, lanes: list[_Lane]) -> None:
        """The newest frames go into the states; turns that are over leave."""
        def step(lanes: list[_Lane]) -> list[Tensor]:
            states, turns, tokens, reading = zip(*(lane.row() for lane in lanes))
            return list(self._step(list(states), list(turns), torch.stack(tokens), list(reading)))
        together = [lane for lane in lanes if self._step.ready(*lane.row()[:2])]
        taken = self._each(step, together)
        for lane in lanes:
            if lane not in together:
                taken += self._each(step, [lane])
        spoken = [(lane, hidden) for lane, hidden in taken if isinstance(lane, _SpeechLane)]
        advance = [0] * len(spoken)
        if spoken and guided(self.model.cfg):
            advance = self.model.advance_logits(torch.stack([hidden for _, hidden in spoken])).argmax(-1).tolist()
        for (lane, hidden), steps in zip(spoken, advance):
            lane.hidden = hidden
            if self._each(lambda lanes, steps=steps: [lanes[0].run.moved(steps)], [lane]) and lane.turn.end_reason:
                self._wind_up(lane)
        for lane, _ in taken:
            if isinstance(lane, _HearingLane):
                lane.listener.codes.append(lane.pending.popleft())

    def _each(self, function: Callable, lanes: list[_Lane]) -> list[tuple]:
        """(lane, result) of function(lanes). Where that fails they are tried one by one, and whose fault it is leaves with the error."""
        if not lanes:
            return []
        try:
            return list(zip(lanes, function(lanes), strict=True))
        except Exception as error:
            if len(lanes) > 1:
                return [pair for lane in lanes for pair in self._each(function, [lane])]
            self._fail(lanes[0], error)
            return []

    # ---- a turn's beginning and end

    def _beginning(self, lane: _SpeechLane, lead, needed: int) -> Iterator[Tensor]:
        session, piece = lane.session, self.cfg.prefill_positions
        yield from session.making_room(needed, piece)
        lead, number = session.fitting(lead, needed), session._number
        lane.state = session.hand_out(lane.turn)
        state = copy.copy(lane.state) if lead else lane.state
        lane.run = Speaking(self.model, self.tokenizer, state, lane.turn, number, session.sampling, lead, lane.start)
        for hidden in prefill(self.model, lane.run.rows, state, piece):
            lane.hidden = hidden[0, -1]
            yield hidden
        lane.run.opened(self.model, lane.hidden)

    def _wind_up(self, lane: _SpeechLane) -> None:
        self._speaking.remove(lane)
        self._sounds.forget(lane)
        lane.steps, lane.after, lane.winding_up = self._ending(lane), self._end, True
        self._preparing.append(lane)

    def _ending(self, lane: _SpeechLane) -> Iterator[Tensor]:
        lane.run.take_end(self.model)
        lane.run.close()
        lane.session._state = lane.state
        if lane.run.lead:
            yield from lane.session.putting(lane.turn, self.cfg.prefill_positions)
        else:
            lane.session._keep(lane.turn)

    def _end(self, lane: _Lane) -> None:
        self._ended += 1
        self._release(lane.session)
        lane.over()

    def _fail(self, lane: _Lane, error: BaseException | None) -> None:
        """The turn leaves, by an error of its own or cancelled (None); its session is as it was before."""
        with self._wake:
            for line in (self._waiting, self._preparing, self._speaking, self._hearing):
                if lane in line:
                    line.remove(lane)
            lane.steps, steps = None, lane.steps
        lane.error = error
        try:
            self._sounds.forget(lane)
            if hasattr(steps, "close"):
                steps.close()
            lane.undo()
        finally:
            self._release(lane.session)
            lane.over()
