"""One live conversation without HTTP: microphone sound in, events and speech out, and whoever speaks may be interrupted.

    live = LiveConversation(new_session, engine, responder, ears, emit, sample_rate=24000)
    live.hear(samples)            # int16 or float32, any number: voice activity, end of turn, barge-in
    live.type("hello")            # or a typed turn
    live.close()

What the user says is heard while it is said (batching.Hearing): encoded and taken into the session, so that at the end of the turn only its last
frames and the words are left to do. While the session speaks or is cut, the sound waits and is caught up with. With cfg.stream_sound off it is
heard when the turn is over, which gives the same session.

`emit(event, pcm)` gets the events of the protocol (dicts; `pcm` belongs to "audio") from two threads: the one that calls
`hear`, and the conversation's own, in which turns are written down, answered and spoken. emit may wait, which holds the
speaker back; it raises Closed where nobody listens any more.

What was interrupted is remembered as it was heard: the reply is cut at the sample up to which it was played, its codes and
its words with it, so that the model does not believe it said what nobody heard. Memory is bounded: by the endpointer, by the
turns that wait (WAITING), by `history`, and in the session, which keeps sound of its window alone.
"""
from __future__ import annotations

import contextlib
import itertools
import queue
import re
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Callable, Iterator

import numpy as np

from audio_io import SAMPLE_RATE
from batching import BatchingEngine, EngineFull, Hearing
from config import EndpointConfig, LiveConfig
from endpointing import Endpointer, sounds_finished
from generation import Session, sentences as sentences
from listening import heard_part, listen
from speech_formats import to_pcm
from turns import Turn

USER, MODEL = 0, 1                         # speakers of the session
NAMES = ("user", "assistant")
WAITING = 3                                # turns and orders that may wait for the worker
MIN_HEARD = 3                              # frames of an interrupted sentence, below which none of it counts as heard
LETTERS_PER_SECOND = 14.0                  # for the first estimate of what was heard, before the sentence's own readings are known
TAIL_SECONDS = 0.3                         # a reply may be interrupted for so long after it has played: buffers of the listener
REPORT_SECONDS = 0.25                      # so long a reply that was interrupted waits to be told what was played of it, before the next turn is heard
DRAFT_SHARE = 5                            # times as long as a transcript takes lie between two drafts of a turn
SLACK = 0.02                               # seconds that a piece may be late before it counts as an underrun


class Closed(Exception):
    """Nobody listens any more."""


# ----------------------------------------------------------------------------- the transcriber, shared

class Ears:
    """Writes down what is said, for all conversations: whole turns before drafts, and drafts only where nothing else waits."""

    def __init__(self, transcribe: Callable[[np.ndarray, int], str], workers: int = 1, limit: int = 64):
        self.transcribe, self.limit, self.seconds, self.newest = transcribe, limit, 0.0, 0.0        # newest: seconds that the newest transcript took
        self._jobs, self._count = queue.PriorityQueue(), itertools.count()
        self._threads = [threading.Thread(target=self._work, name=f"ears-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, audio: np.ndarray, rate: int, draft: bool = False) -> Future | None:
        """A future of the text; None where there is no time for it."""
        if self._jobs.qsize() >= (1 if draft else self.limit):
            return None
        future = Future()
        self._jobs.put((draft, next(self._count), future, audio, rate))
        return future

    def _work(self) -> None:
        while True:
            _, _, future, audio, rate = self._jobs.get()
            if future is None:
                return
            if not future.set_running_or_notify_cancel():
                continue
            start = time.perf_counter()
            try:
                future.set_result(self.transcribe(audio, rate))
            except Exception as error:                          # whatever it was, it belongs to whoever asked
                future.set_exception(error)
            self.newest = time.perf_counter() - start
            self.seconds += self.newest

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put((2, next(self._count), None, None, None))


# ----------------------------------------------------------------------------- small pure functions

def one_by_one(words: Iterator, call: Callable) -> Iterator:
    """The same words, each computed in a call of the engine: what is said between two of them may use the session."""
    nothing = object()
    try:
        while (word := call(lambda: next(words, nothing))) is not nothing:
            yield word
    finally:
        words.close()


def speakable(text: str) -> bool:
    return bool(re.search(r"[A-Za-z0-9]", text))


def heard_words(text: str, seconds: float) -> str:
    """A guess at what of `text` is said in so many seconds, in whole words."""
    letters = seconds * LETTERS_PER_SECOND
    ends = [m.end() for m in re.finditer(r"\S+", text) if (m.start() + m.end()) / 2 <= letters]
    return text[:ends[-1]] if ends else ""


def cut_turn(turn: Turn, samples: int, frame: int, tokenizer) -> Turn | None:
    """What was heard of a turn within its first `samples`; None for less than MIN_HEARD frames or no word."""
    if samples < MIN_HEARD * frame or turn.codes is None or not turn.num_frames:
        return None
    part = heard_part(turn, samples, frame, tokenizer)
    return part if part is not None and speakable(part.text) else None


# ----------------------------------------------------------------------------- a reply

@dataclass
class Part:
    """One sentence of a reply."""
    text: str
    start: int                             # samples of the reply before it
    samples: int = 0
    turn: Turn | None = None               # None: it is being made
    whole: bool = False                    # it is a turn of the session


@dataclass
class Reply:
    number: int
    asked_at: float                        # perf_counter() when the user's turn was over
    parts: list[Part] = field(default_factory=list)
    samples: int = 0                       # sent
    first_at: float | None = None
    made: bool = False                     # nothing more will come
    stopped: threading.Event = field(default_factory=threading.Event)
    reported: int | None = None            # samples that the listener says were played
    stopped_at: int = 0                    # samples played when it was stopped, estimated
    underruns: int = 0                     # pieces that came when all before them had been played
    marker: object = None                  # watermark.Marker

    @property
    def text(self) -> str:
        return " ".join(part.text for part in self.parts)

    def played(self) -> int:
        """Samples that can have been heard by now."""
        return 0 if self.first_at is None else min(self.samples, int((time.perf_counter() - self.first_at) * SAMPLE_RATE))

    @property
    def audible(self) -> bool:
        """Whether it still has to be heard, or to be made."""
        if self.stopped.is_set() or (self.reported is not None and self.made and self.reported >= self.samples):
            return False
        return not self.made or (self.first_at is not None and time.perf_counter() < self.first_at + self.samples / SAMPLE_RATE + TAIL_SECONDS)

    @property
    def heard(self) -> int:
        if not self.stopped.is_set():
            return self.samples
        return self.stopped_at if self.reported is None else min(self.reported, self.samples)

    def heard_text(self, tokenizer, frame: int) -> str:
        """In whole words: by the readings of sentences that are made, by the clock of the one that is being made."""
        words = []
        for part in self.parts:
            count = min(max(0, self.heard - part.start), part.samples)
            if part.whole and count == part.samples:
                words.append(part.text)
            elif part.whole:
                cut = cut_turn(part.turn, count, frame, tokenizer)
                words.append(cut.text if cut else "")
            else:
                words.append(heard_words(part.text, count / SAMPLE_RATE))
        return " ".join(filter(None, words))


class Utterance:
    """Something that the user says, and the hearing of it that follows the sound while it is said.

    The worker opens the hearing when the session is free; the thread that brings the sound catches up and goes on; the worker finishes or drops it.
    """

    def __init__(self, rate: int, longest: float):
        self.rate, self.most = rate, int(longest * rate)
        self.hearing: Hearing | None = None
        self.asked = self.over = self.whole = False      # the worker was asked; nothing more comes; all of it was fed
        self.fed = 0                                     # samples
        self._resampler = None
        if rate != SAMPLE_RATE:
            import soxr
            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def feed(self, sound: np.ndarray, last: bool = False) -> None:
        """Sound (n,) after what was fed. A hearing that fails, or would last too long, is dropped: the turn is heard when it is over then."""
        hearing = self.hearing
        if hearing is None:
            return
        self.fed += len(sound)
        try:
            if self.fed > self.most:
                raise ValueError("longer than the model is to hear")
            hearing.feed(self._resampler.resample_chunk(sound, last=last) if self._resampler else sound)
            self.whole = last
        except (ValueError, RuntimeError):               # longer than the window; the engine is being closed; dropped by the worker
            self.drop()

    def drop(self) -> None:
        hearing, self.hearing, self.whole = self.hearing, None, False
        if hearing is not None:
            hearing.cancel()

    def finish(self, text: str) -> bool:
        """The turn goes into the session with its transcript; False where it was not heard, or not all of it."""
        if self.hearing is None or not self.whole:
            self.drop()
            return False
        hearing, self.hearing = self.hearing, None
        try:
            hearing.finish(text)
        except (ValueError, RuntimeError):
            return False
        return True


@dataclass
class Job:
    """Something for the worker: a turn of the user (text, or sound with the transcript that was begun), an order, or to hear what is being said."""
    kind: str                              # turn | order | hear
    at: float = field(default_factory=time.perf_counter)
    text: str | None = None
    audio: np.ndarray | None = None
    draft: Future | None = None
    order: Callable | None = None
    utterance: Utterance | None = None


# ----------------------------------------------------------------------------- the conversation

class LiveConversation:
    """See the module. `new_session()` gives a Session with the reply's voice set for speaker MODEL; `marker()` a watermark.Marker for one reply, or None."""

    def __init__(self, new_session: Callable[[], Session], engine: BatchingEngine, responder, ears: Ears, emit: Callable, *, sample_rate: int = SAMPLE_RATE,
                 cfg: LiveConfig | None = None, endpoint: EndpointConfig | None = None, vad=None, marker: Callable = lambda: None):
        self.marker = marker
        self.cfg, self.engine, self.responder, self.ears, self._emit = cfg or LiveConfig(), engine, responder, ears, emit
        self.new_session, self.sample_rate, self.ear = new_session, sample_rate, Endpointer(endpoint, sample_rate, vad)
        self.session = new_session()
        self.history: list[tuple[str, str]] = []
        self.turns, self.touched = 0, time.monotonic()
        self._reply: Reply | None = None
        self._voice: dict | None = None                         # another than new_session gives
        self._draft: tuple[float, Future] | None = None         # length of the speech it covers
        self._utterance, self._drafted = 0, 0.0
        self._said: Utterance | None = None                     # what the user is saying
        self._heard: Utterance | None = None                    # whose hearing holds the session; the worker's own
        self._lock, self._jobs, self._closed = threading.RLock(), queue.Queue(WAITING), threading.Event()
        self._worker = threading.Thread(target=self._work, name="conversation", daemon=True)
        self._worker.start()

    # ---- what comes in (any thread, one at a time)

    def hear(self, samples: np.ndarray) -> None:
        """Microphone sound (n,), int16 or float32, at sample_rate."""
        for event in self.ear.push(samples):
            self._on(event)
        self._follow()
        self._maybe_draft()

    def end_of_turn(self) -> None:
        """The user let the button go."""
        for event in self.ear.finish():
            self._on(event)

    def type(self, text: str) -> None:
        """A typed turn; it interrupts. ValueError where nothing of it can be spoken or too many turns wait."""
        if not speakable(text):
            raise ValueError("nothing speakable in this text: write at least one word in Latin letters")
        self.interrupt()
        self._put(Job("turn", text=text))

    def set_voice(self, **voice) -> None:
        """Arguments of Session.set_voice for the reply's voice, from now on."""
        self._put(Job("order", order=lambda: self._change_voice(voice)))

    def reset(self) -> None:
        """Forget the conversation; the voice stays."""
        self.interrupt()
        self._put(Job("order", order=self._reset))

    def played(self, ms: float) -> None:
        """The listener has heard so much of the current reply, or of the one just stopped."""
        with self._lock:
            if self._reply is not None:
                self._reply.reported = max(0, int(ms * SAMPLE_RATE / 1000))

    def interrupt(self) -> None:
        """Stop the reply, where one is being made or heard."""
        with self._lock:
            reply = self._reply
            if reply is None or not reply.audible:
                return
            reply.stopped_at = reply.played()
            reply.reported = None                                # what was said of a part of it before is out of date
            reply.stopped.set()
        self._send({"type": "interrupted", "turn": reply.number, "heard_ms": round(1000 * reply.heard / SAMPLE_RATE),
                    "text": reply.heard_text(self.session.tokenizer, self._frame)})

    def close(self, wait: float = 10.0) -> None:
        """Stop everything; the worker has ended when this returns, if it does within `wait` seconds."""
        self._closed.set()
        with self._lock:
            if self._reply is not None:
                self._reply.stopped.set()
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait(Job("order", order=lambda: None))
        if threading.current_thread() is not self._worker:
            self._worker.join(wait)
        if self._heard is not None:
            self._heard.drop()
        self.session.rest()
        self._emit = lambda event, pcm=None: None                # whoever listened is not held any longer
        with contextlib.suppress(queue.Empty):                   # orders that still wait, and a draft's callback, hold the conversation, which holds them
            while True:
                self._jobs.get_nowait()
        draft, self._draft = self._draft, None
        if draft is not None:
            draft[1].cancel()

    @property
    def busy(self) -> bool:
        """Whether a turn is waiting, being answered or still to be heard."""
        reply = self._reply
        return not self._jobs.empty() or (reply is not None and reply.audible)

    @property
    def memory_bytes(self) -> int:
        """What this conversation holds besides the model's window: sound that waits, and the codes of turns."""
        turns = [*self.session.turns, *self.session.voices.values()]
        said = self._said
        heard = 4 * said.fed if said is not None and said.hearing is not None else 0
        codes = sum(t.codes.numel() * t.codes.element_size() for t in turns if t.codes is not None)
        return int(4 * self.ear.kept_seconds * self.sample_rate) + heard + codes + sum(t.audio.nbytes for t in turns if t.audio is not None) + 1000 * len(turns)

    @property
    def _frame(self) -> int:
        return self.session.codec.cfg.frame_size

    def _call(self, work: Callable):
        """Work of the model on this session, when it is its turn."""
        return self.engine.call(self.session, lambda _: work())

    def _put(self, job: Job) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise ValueError(f"{WAITING} turns wait already: let the reply come first") from None

    def _send(self, event: dict, pcm: bytes | None = None) -> None:
        self.touched = time.monotonic()
        if not self._closed.is_set():
            self._emit(event, pcm)

    # ---- listening

    def _on(self, event) -> None:
        if event.kind == "start":
            self._utterance, self._draft, self._drafted = self._utterance + 1, None, 0.0
            self._said = Utterance(self.sample_rate, self.cfg.user_seconds)
            self._send({"type": "speech_started"})
            if not (self._reply is not None and self._reply.audible):
                self._ask_to_hear()
        elif event.kind == "barge_in":
            self.interrupt()
            self._ask_to_hear()
        elif event.kind == "pause":
            self._begin_draft(event.audio, event.speech_ms)
        elif event.kind == "resume":
            self._draft = None
        elif event.kind == "end":
            self._send({"type": "speech_stopped", "ms": round(event.speech_ms)})
            draft = self._draft[1] if self._draft and self._draft[0] == event.speech_ms else None
            self._draft, said, self._said = None, self._said, None
            said.over = True
            if self._reply is not None and self._reply.audible and event.speech_ms < self.ear.cfg.barge_in_ms:
                return said.drop()                               # a cough, or a listener's "mm": the reply goes on
            self.interrupt()
            said.feed(event.audio[said.fed:], last=True)
            try:
                self._put(Job("turn", audio=event.audio, draft=draft, utterance=said))
            except ValueError as error:
                said.drop()
                self._send({"type": "error", "code": "too_fast", "message": str(error)})

    def _ask_to_hear(self) -> None:
        """Let the worker open a hearing of what is being said, once the session is free."""
        if self._said is None or self._said.asked or not (self.cfg.user_sound and self.cfg.stream_sound):
            return
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait(Job("hear", utterance=self._said))
            self._said.asked = True

    def _follow(self) -> None:
        """Give the hearing what was said since, or all of it where it has just been opened."""
        if self._said is not None and self._said.hearing is not None:
            self._said.feed(self.ear.audio(self._said.fed))

    def _begin_draft(self, audio: np.ndarray, speech_ms: float) -> None:
        """At a pause: write down the turn so far, which is the transcript if nothing more comes, and says whether more is to come."""
        future = self.ears.submit(audio, self.sample_rate)
        if future is not None:
            self._draft = (speech_ms, future)
            future.add_done_callback(lambda done, n=self._utterance: self._drafted_text(done, n, hint=True))

    def _maybe_draft(self) -> None:
        """While somebody speaks on and on; the rarer the longer it takes, since the transcript of the whole turn may come to wait for it."""
        due = max(self.cfg.partial_seconds, DRAFT_SHARE * self.ears.newest)
        if not self.ear.speaking or not self.cfg.partial_seconds or self.ear.kept_seconds - self._drafted < due:
            return
        self._drafted = self.ear.kept_seconds
        future = self.ears.submit(self.ear.audio(), self.sample_rate, draft=True)
        if future is not None:
            future.add_done_callback(lambda done, n=self._utterance: self._drafted_text(done, n))

    def _drafted_text(self, done: Future, utterance: int, hint: bool = False) -> None:
        if done.cancelled() or done.exception() or utterance != self._utterance or not self.ear.speaking:
            return
        if hint and self._draft and self._draft[1] is done:
            self.ear.hint(sounds_finished(done.result()))
        with contextlib.suppress(Closed):
            self._send({"type": "partial_transcript", "text": done.result()})

    # ---- the worker

    def _work(self) -> None:
        while not self._closed.is_set():
            job = self._jobs.get()
            try:
                if self._heard is not None and self._heard is not job.utterance:
                    self._heard.drop()                           # something else comes first: this is heard when it is over
                    self._heard = None
                if job.kind == "order":
                    job.order()
                else:
                    self._turn(job) if job.kind == "turn" else self._hear(job.utterance)
            except Closed:
                self._closed.set()
            except ValueError as error:
                self._failed("cannot_answer", str(error))
            except EngineFull as error:
                self._failed("full", str(error))
            except Exception as error:                           # one bad turn must not end the conversation, nor take others with it
                self._failed("internal", f"this turn failed ({type(error).__name__}): try again")

    def _failed(self, code: str, message: str) -> None:
        with self._lock:
            if self._reply is not None:
                self._reply.made = True
        with contextlib.suppress(Closed):
            self._send({"type": "error", "code": code, "message": message})

    def _change_voice(self, voice: dict | None) -> None:
        self._voice = voice
        if voice:
            self._call(lambda: self.session.set_voice(MODEL, **voice))

    def _reset(self) -> None:
        self.session, self.history, self._reply, self.turns = self.new_session(), [], None, 0
        self._change_voice(self._voice)

    def _hear(self, said: Utterance) -> None:
        """The session listens from now on. A reply that was interrupted is cut first, when its listener has told what was played of it."""
        reply, until = self._reply, time.monotonic() + REPORT_SECONDS
        while reply is not None and reply.stopped.is_set() and reply.reported is None and not said.over and time.monotonic() < until:
            time.sleep(0.01)
        if said.over or self._closed.is_set():
            return
        self._settle()
        self.session.lighten()
        said.hearing, self._heard = self.engine.listen(self.session, USER), said

    def _turn(self, job: Job) -> None:
        try:
            text = job.text if job.text is not None else self._transcript(job)
            number = self.turns + 1
            self._send({"type": "transcript", "text": text, "turn": number})
            heard = speakable(text) and not self._closed.is_set() and job.utterance is not None and job.utterance.finish(text)
        finally:
            if job.utterance is not None:
                job.utterance.drop()
            self._heard = None
        if not speakable(text) or self._closed.is_set():
            return
        self._settle()
        self.session.lighten()
        self.turns = number
        with self._lock:
            reply = self._reply = Reply(number, job.at, marker=self.marker())
        if not heard:
            self._call(lambda: self._take_in(text, job.audio))
        self._remember(NAMES[USER], text)
        self._answer(reply)
        if not reply.stopped.is_set() and self._jobs.empty():
            self._call(lambda: self.session.prepare(MODEL))
            self._call(lambda: self.session.make_moods(MODEL, 1))

    def _transcript(self, job: Job) -> str:
        future = job.draft or self.ears.submit(job.audio, self.sample_rate)
        if future is None:
            raise ValueError("the transcriber is overloaded: say it again")
        return future.result()

    def _take_in(self, text: str, audio: np.ndarray | None) -> None:
        """The user's turn into the session."""
        if audio is not None and self.cfg.user_sound:
            from audio_io import resample
            audio = resample(audio[-int(self.cfg.user_seconds * self.sample_rate):], self.sample_rate, SAMPLE_RATE)
            listen(self.session, USER, audio, text)
        else:
            self.session.add_turn(USER, text)

    def _remember(self, name: str, text: str) -> None:
        self.history.append((name, text))
        del self.history[:-self.cfg.history]

    def _words(self) -> Iterator[str]:
        words = self.responder.stream(self.session, MODEL, list(self.history), NAMES[MODEL])
        return one_by_one(words, self._call) if self.responder.on_model else words

    def _answer(self, reply: Reply) -> None:
        words = self._words()
        try:
            for sentence, mood in sentences(words):
                if reply.stopped.is_set() or self._closed.is_set():
                    break
                if speakable(sentence):
                    self._say(reply, sentence, mood)
        finally:
            if hasattr(words, "close"):
                words.close()
            reply.made = True
            if reply.parts:
                self._remember(NAMES[MODEL], reply.text)
        if not reply.parts and not reply.stopped.is_set():
            raise ValueError("the responder gave nothing speakable: try again, or change --responder")
        if not reply.stopped.is_set():
            if reply.marker is not None and reply.first_at is not None:
                self._play(reply, reply.parts[-1], reply.marker.finish())
            self._send(self._done(reply))

    def _done(self, reply: Reply) -> dict:
        positions, slots = self.session.in_use
        first = None if reply.first_at is None else round(1000 * (reply.first_at - reply.asked_at), 1)
        return {"type": "reply_done", "turn": reply.number, "text": reply.text, "duration_s": round(reply.samples / SAMPLE_RATE, 3), "underruns": reply.underruns,
                "latency_ms": {"first_audio": first, "total": round(1000 * (time.perf_counter() - reply.asked_at), 1)},
                "memory": {"context_positions": positions, "slots": slots, "context_limit": self.session.model.cfg.backbone.max_positions}}

    def _say(self, reply: Reply, sentence: str, mood: str | None) -> None:
        part = Part(sentence, reply.samples)
        reply.parts.append(part)
        self._send({"type": "reply_started" if len(reply.parts) == 1 else "reply_text", "turn": reply.number, "text": reply.text})
        speech = self.engine.speak(self.session, sentence, MODEL, mood)
        try:
            for piece in speech:
                if reply.stopped.is_set() or self._closed.is_set():
                    break
                self._play(reply, part, piece if reply.marker is None else reply.marker.push(piece))
            else:
                part.whole = True
        finally:
            speech.cancel()
            part.turn = speech.turn

    def _play(self, reply: Reply, part: Part, piece: np.ndarray) -> None:
        with self._lock:
            now = time.perf_counter()
            reply.first_at = reply.first_at or now
            reply.underruns += now > reply.first_at + reply.samples / SAMPLE_RATE + SLACK
            reply.samples += len(piece)
            part.samples += len(piece)
        self._send({"type": "audio", "turn": reply.number, "samples": len(piece)}, to_pcm(piece))
        ahead = reply.samples / SAMPLE_RATE - (time.perf_counter() - reply.first_at)
        if ahead > self.cfg.ahead_seconds:
            reply.stopped.wait(ahead - self.cfg.ahead_seconds)

    def _settle(self) -> None:
        """Before the next turn: of a reply that was interrupted, the session and the history keep what was heard."""
        with self._lock:
            reply, self._reply = self._reply, None
        if reply is None or not reply.stopped.is_set() or not reply.parts:
            return
        heard, tokenizer = reply.heard, self.session.tokenizer
        first = next((i for i, p in enumerate(reply.parts) if not p.whole or heard < p.start + p.samples), len(reply.parts))
        cut = None
        if first < len(reply.parts) and reply.parts[first].turn is not None:
            cut = cut_turn(reply.parts[first].turn, max(0, heard - reply.parts[first].start), self._frame, tokenizer)
        count = sum(part.whole for part in reply.parts[first:])
        if count or cut:
            self._call(lambda: self.session.replace_last(count, cut))
        said = " ".join([*(part.text for part in reply.parts[:first]), *([cut.text] if cut else [])])
        if self.history and self.history[-1][0] == NAMES[MODEL]:
            self.history.pop()
        if said:
            self._remember(NAMES[MODEL], said)
