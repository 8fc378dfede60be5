"""A live conversation with a tiny random model, a loudness detector for ears and a list for a transcriber."""
import dataclasses
import gc
import queue
import threading
import time
import weakref

import numpy as np
import pytest
import torch

import generation
import listening
import live
import responders
from architecture import CSM
from audio_io import resample
from batching import BatchingEngine, EngineFull
from config import BatchingConfig, CodecConfig, LiveConfig, SamplingConfig, model_preset
from generation import Session
from listening import heard_part, listen
from live import MODEL, USER, Closed, Ears, LiveConversation, cut_turn, heard_words, sentences
from responders import Words
from rvq_tokenizer import Codec
from text_tokenizer import ByteTokenizer

TINY_CODEC = CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                         latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)
SHORT = SamplingConfig(max_seconds=1.0)
TOKENIZER = ByteTokenizer()
RATE = 24000


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    codec, model = Codec(TINY_CODEC).eval(), CSM(model_preset("test"))
    model.init_weights(open_gates=True)
    return model.eval(), codec


class Loud:
    def __call__(self, pcm: bytes) -> float:
        return float(np.abs(np.frombuffer(pcm, "<i2")).mean() > 300)


class Says:
    """A responder that says what stands in a list, and notes what it was asked."""
    kind, on_model = "list", False

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def stream(self, session, speaker, history, me):
        self.asked.append(history)
        for words in self.replies.pop(0):
            if isinstance(words, Exception):
                raise words
            yield words


class Talk:
    """A LiveConversation and what comes out of it."""

    def __init__(self, parts, responder, heard=(), emit=None, sampling=SHORT, rate=RATE, **settings):
        self.events, self.heard, self.written, self.pcm = queue.Queue(), list(heard), 0, []
        self.engine, self.ears = BatchingEngine(*parts, TOKENIZER, BatchingConfig(ahead_seconds=60.0), sampling), Ears(self.transcribe)
        self.live = LiveConversation(lambda: Session(*parts, TOKENIZER, sampling), self.engine, responder, self.ears, emit or self.emit, sample_rate=rate,
                                     cfg=LiveConfig(**({"ahead_seconds": 60.0, "partial_seconds": 0.0, "user_sound": False} | settings)), vad=Loud())

    def transcribe(self, audio, rate):
        self.written += 1
        return self.heard.pop(0) if self.heard else "hello"

    def emit(self, event, pcm):
        if pcm is not None:
            self.pcm.append(pcm)
        self.events.put(event)

    def until(self, *kinds, seconds=30):
        """Events up to the first of these kinds, sound left out."""
        found = []
        while True:
            event = self.events.get(timeout=seconds)
            if event["type"] != "audio":
                found.append(event)
            if event["type"] in kinds:
                return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.live.close()
        self.ears.close()
        self.engine.close(finish=False)
        assert not self.live._worker.is_alive()


def kinds(events):
    return [e["type"] for e in events]


def voice(ms):
    return (0.2 * np.sin(np.arange(RATE * ms // 1000) * 0.08)).astype(np.float32)


def rest(ms):
    return np.zeros(RATE * ms // 1000, np.float32)


# ----------------------------------------------------------------------------- turns

def test_a_typed_turn_is_answered_sentence_by_sentence(parts):
    responder = Says(["Well, hel", "lo there. ", "How are ", "you?"])
    with Talk(parts, responder) as talk:
        talk.live.type("Hello!")
        events = talk.until("reply_done")
        assert kinds(events) == ["transcript", "reply_started", "reply_text", "reply_done"]
        assert [e.get("text") for e in events] == ["Hello!", "Well, hello there.", "Well, hello there. How are you?", "Well, hello there. How are you?"]
        done = events[-1]
        assert done["duration_s"] == pytest.approx(sum(map(len, talk.pcm)) / 2 / RATE, abs=1e-3) and done["duration_s"] > 0
        assert 0 < done["latency_ms"]["first_audio"] < done["latency_ms"]["total"]
        assert 0 < done["memory"]["context_positions"] < done["memory"]["context_limit"] and done["memory"]["slots"] > 0
        assert [t.text for t in talk.live.session.turns] == ["hello!", "well, hello there.", "how are you?"]
        assert responder.asked == [[("user", "Hello!")]]
        np.testing.assert_allclose(np.frombuffer(b"".join(talk.pcm), "<i2") / 32767, np.concatenate([t.audio for t in talk.live.session.turns[1:]]), atol=1e-4)


@pytest.mark.parametrize("on_model", [False, True])
def test_the_first_sentence_is_spoken_before_the_second_is_written(parts, on_model):
    heard = threading.Event()

    def slowly():
        yield "The first sentence. "
        yield "And"
        assert heard.wait(30)
        yield " the second."
    responder = Says(slowly())
    responder.on_model = on_model
    with Talk(parts, responder) as talk:
        talk.live.type("go on")
        talk.until("reply_started")
        while talk.events.get(timeout=30)["type"] != "audio":
            pass
        heard.set()
        assert talk.until("reply_done")[-1]["text"] == "The first sentence. And the second."


def test_the_text_heads_reply_is_spoken_as_it_is_written(parts):
    """All of it is what the head would have written at once, though its sentences were spoken in between."""
    greedy = dataclasses.replace(SHORT, text_temperature=0.0)
    alone = Session(*parts, TOKENIZER, greedy)
    alone.add_turn(USER, "hello")
    whole = alone.reply_text(MODEL)
    with Talk(parts, responders.make("model"), sampling=greedy) as talk:
        pieces, stream = [], talk.live.responder.stream
        talk.live.responder.stream = lambda *asked: (pieces.append(piece) or piece for piece in stream(*asked))
        talk.live.type("hello")
        said = talk.until("reply_done", "error")[-1]
        assert "".join(pieces) == whole and len(pieces) > 5 and said["text"] == " ".join(part for part, _ in sentences([whole]) if live.speakable(part))


@pytest.mark.parametrize("piece", [480, 1111])
def test_a_spoken_turn_is_found_written_down_and_answered(parts, piece):
    with Talk(parts, Says(["I see."]), heard=["I lost my keys."]) as talk:
        sound = np.concatenate([rest(500), voice(700), rest(1000)])
        for at in range(0, len(sound), piece):
            talk.live.hear(sound[at:at + piece])
        events = talk.until("reply_done")
        order = [k for k in kinds(events) if k != "partial_transcript"]
        assert order == ["speech_started", "speech_stopped", "transcript", "reply_started", "reply_done"]
        assert next(e for e in events if e["type"] == "transcript")["text"] == "I lost my keys."
        assert next(e for e in events if e["type"] == "speech_stopped")["ms"] == pytest.approx(700, abs=80)
        assert talk.written == 1, "what was written at the pause is the transcript"


def test_the_model_hears_the_users_voice_where_it_is_told_to(parts):
    with Talk(parts, Says(["I see."]), heard=["I lost my keys."], user_sound=True, user_seconds=0.5) as talk:
        talk.live.hear(np.concatenate([rest(500), voice(900), rest(1000)]))
        talk.until("reply_done")
        turn = talk.live.session.turns[0]
        assert turn.heard and turn.num_frames == 7 and turn.text == "i lost my keys."                  # half a second and what fills the frame


def say(talk, sound, piece=1920):
    """As a microphone does; then all that the engine was given is in its states."""
    for at in range(0, len(sound), piece):
        talk.live.hear(sound[at:at + piece])
        time.sleep(0.002)


def opened(talk, seconds=30):
    """The utterance that is being heard, once it is."""
    until = time.monotonic() + seconds
    while talk.live._said is None or talk.live._said.hearing is None:
        assert time.monotonic() < until, "nobody hears"
        time.sleep(0.005)
    return talk.live._said


GREEDY = dataclasses.replace(SHORT, temperature=0.0, depth_temperature=0.0)


def noise(ms, seed=0):
    return (0.2 * np.random.default_rng(seed).standard_normal(RATE * ms // 1000)).astype(np.float32)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("rate", [24000, 16000])
def test_a_turn_heard_while_it_is_said_equals_one_heard_when_it_is_over(parts, streamed, rate, monkeypatch):
    """The oracle is listening.listen on the sound that the endpointer gives."""
    heard, ends = [], []
    monkeypatch.setattr(listening, "RESERVE_SECONDS", 1.0)         # so that the preset's small window need not give up turns for sound that never comes
    monkeypatch.setattr(live, "listen", lambda *arguments: heard.append(1) or listen(*arguments))
    with Talk(parts, Says(["Very well."], ["I see."]), heard=["how are you?", "and now?"], sampling=GREEDY, rate=rate, user_sound=True, stream_sound=streamed) as talk:
        push = talk.live.ear.push
        monkeypatch.setattr(talk.live.ear, "push", lambda samples: [ends.append(e.audio) or e if e.kind == "end" else e for e in push(samples)])
        for turn in range(2):
            sound = resample(np.concatenate([rest(300), noise(900, turn), rest(1000)]), RATE, rate)
            say(talk, sound[:len(sound) // 3])
            if streamed:
                opened(talk)
            say(talk, sound[len(sound) // 3:])
            talk.live.played(1000 * talk.until("reply_done")[-1]["duration_s"])
        alone = Session(*parts, TOKENIZER, GREEDY)
        for audio, (words, reply) in zip(ends, (("how are you?", "Very well."), ("and now?", "I see."))):
            listen(alone, USER, resample(audio, rate, RATE), words)
            alone.say(MODEL, reply)
        turns = talk.live.session.turns
        assert [t.text for t in turns] == [t.text for t in alone.turns] and len(turns) == 4 and turns[0].heard and turns[0].num_frames > 10
        assert [torch.equal(a.codes, b.codes) for a, b in zip(turns, alone.turns)] == 4 * [True], "what was heard and what was answered to it"
        assert len(heard) == (0 if streamed else 2)


def test_frames_are_in_the_session_before_the_turn_is_over(parts):
    with Talk(parts, Says(["I see."]), heard=["I lost my keys."], user_sound=True) as talk:
        say(talk, voice(600))
        said = opened(talk)
        say(talk, voice(400))
        listener, until = said.hearing._lane.listener, time.monotonic() + 30
        while listener.num_frames < 12 and time.monotonic() < until:
            time.sleep(0.01)
        assert listener.num_frames == 12 and listener._state.length >= 12 and talk.live.ear.speaking and not talk.live.session.turns
        say(talk, rest(1000))
        talk.until("reply_done")
        assert talk.live.session.turns[0].num_frames > 12


def test_what_is_no_turn_is_forgotten(parts):
    """Untranscribable speech leaves the session free and as it was."""
    with Talk(parts, Says(["Yes."]), heard=[" ", "hello"], user_sound=True) as talk:
        for words in range(2):
            say(talk, voice(500))
            opened(talk)
            say(talk, rest(1000))
            talk.until("transcript" if words == 0 else "reply_done")
        assert [t.text for t in talk.live.session.turns] == ["hello", "yes."] and talk.live._said is None


def test_a_typed_turn_comes_first_and_what_is_being_said_is_heard_when_it_is_over(parts):
    with Talk(parts, Says(["Yes."], ["No."]), heard=["I lost my keys."], user_sound=True) as talk:
        say(talk, voice(500))
        said = opened(talk)
        talk.live.type("one")
        talk.live.played(1000 * talk.until("reply_done")[-1]["duration_s"])
        assert said.hearing is None
        say(talk, np.concatenate([voice(300), rest(1000)]))
        talk.until("reply_done")
        assert [t.text for t in talk.live.session.turns] == ["one", "yes.", "i lost my keys.", "no."] and talk.live.session.turns[2].num_frames >= 10


def test_a_long_turn_is_heard_when_it_is_over(parts):
    with Talk(parts, Says(["Yes."]), heard=["a long one"], user_sound=True, user_seconds=0.5) as talk:
        say(talk, voice(300))
        said = opened(talk)
        say(talk, np.concatenate([voice(600), rest(1000)]))
        talk.until("reply_done")
        assert said.hearing is None and talk.live.session.turns[0].num_frames == 7


def test_who_interrupts_is_heard_after_the_reply_was_cut(parts):
    """While the reply is made the session cannot hear: the sound waits, the reply is cut to what was heard of it, and then the beginning is caught up with."""
    with Talk(parts, Says(REPLY, ["Yes."]), heard=["stop it"], user_sound=True) as talk:
        talk.live.type("tell me")
        talk.until("reply_done")
        say(talk, voice(400))
        assert talk.until("interrupted")
        talk.live.played(0)
        said = opened(talk)
        say(talk, voice(200))
        assert said.fed >= RATE // 2 and [t.text for t in talk.live.session.turns] == ["tell me"]
        say(talk, rest(1000))
        talk.until("reply_done")
        turns = talk.live.session.turns
        assert [t.text for t in turns] == ["tell me", "stop it", "yes."] and turns[1].heard and turns[1].num_frames >= 8


def test_partial_transcripts_while_somebody_speaks_on(parts):
    with Talk(parts, Says(["Yes."]), heard=["one", "one two", "one two three"], partial_seconds=0.5) as talk:
        for _ in range(12):
            talk.live.hear(voice(100))
            time.sleep(0.02)
        talk.live.hear(rest(1000))
        events = talk.until("reply_done")
        partial = [e["text"] for e in events if e["type"] == "partial_transcript"]
        assert partial[:2] == ["one", "one two"]


def test_a_slow_transcriber_is_asked_for_fewer_drafts(parts):
    with Talk(parts, Says(["Yes."]), partial_seconds=0.5) as talk:
        talk.ears.newest = 10.0
        for _ in range(12):
            talk.live.hear(voice(100))
        assert talk.written == 0 and talk.events.get(timeout=5)["type"] == "speech_started" and talk.events.empty()


def test_a_whole_sentence_is_answered_sooner_than_a_broken_off_one(parts):
    with Talk(parts, Says(["Yes."], ["Yes."]), heard=["I lost my keys.", "I went to the"]) as talk:
        for whole in (True, False):
            talk.live.hear(np.concatenate([voice(640), rest(290)]))
            talk.until("partial_transcript")
            talk.live.hear(rest(320))                                      # 0.6 s of silence in all
            if whole:
                talk.until("reply_done")
        assert talk.live.ear.speaking and talk.events.empty()
        talk.live.hear(rest(1000))
        talk.until("reply_done")
        assert talk.written == 2


def test_nothing_heard_is_no_turn(parts):
    with Talk(parts, Says(["Never said."]), heard=[" "]) as talk:
        talk.live.hear(np.concatenate([voice(500), rest(1000)]))
        assert talk.until("transcript")[-1]["text"] == " "
        time.sleep(0.05)
        assert talk.live.session.turns == [] and talk.events.empty() and not talk.live.busy


def test_push_to_talk(parts):
    with Talk(parts, Says(["Yes."]), heard=["over"]) as talk:
        talk.live.hear(voice(400))
        talk.live.end_of_turn()
        assert "reply_done" in kinds(talk.until("reply_done"))


# ----------------------------------------------------------------------------- interruptions

REPLY = ["This is the first sentence of it. ", "Here comes the second one. ", "And the third."]


def test_what_was_not_heard_was_not_said(parts):
    """The reply was made to its end, then stopped in the middle of its second sentence."""
    responder = Says(REPLY, ["Yes."])
    with Talk(parts, responder) as talk:
        talk.live.type("tell me")
        talk.until("reply_done")
        first, second, third = talk.live.session.turns[1:]
        frame, heard = TINY_CODEC.frame_size, len(first.audio) + 5 * TINY_CODEC.frame_size - 100
        wanted = heard_part(second, heard - len(first.audio), frame, TOKENIZER)
        talk.live.interrupt()
        assert kinds(talk.until("interrupted")) == ["interrupted"]
        talk.live.played(1000 * heard / RATE)
        talk.live.type("and then?")
        talk.until("reply_done")
        turns = talk.live.session.turns
        assert [t.text for t in turns] == ["tell me", first.text, *([wanted.text] if wanted else []), "and then?", "yes."]
        if wanted:
            assert torch.equal(turns[2].codes, second.codes[:, :5]) and turns[2].readings == wanted.readings
        said = " ".join([REPLY[0].strip(), *([wanted.text] if wanted else [])])
        assert responder.asked[1] == [("user", "tell me"), ("assistant", said), ("user", "and then?")]


def test_a_reply_that_nobody_heard_is_forgotten(parts):
    responder = Says(REPLY, ["Yes."])
    with Talk(parts, responder) as talk:
        talk.live.type("tell me")
        talk.until("reply_done")
        talk.live.interrupt()
        talk.live.played(0)
        talk.live.type("and then?")
        talk.until("reply_done")
        assert [t.text for t in talk.live.session.turns] == ["tell me", "and then?", "yes."]
        assert responder.asked[1] == [("user", "tell me"), ("user", "and then?")]


def test_barge_in_stops_the_speaker_within_its_sentence(parts):
    """The listener takes three pieces and then speaks: nothing more is made, and the rest of the sentence was never said."""
    pieces, go = [], threading.Event()

    def emit(event, pcm):
        talk.emit(event, pcm)
        if pcm is not None:
            pieces.append(pcm)
            if len(pieces) == 6:
                go.wait(30)
    with Talk(parts, Says(["This is a long sentence which goes on and on. ", "And one more."], ["Yes."]), heard=["stop it"], emit=emit) as talk:
        talk.live.type("tell me")
        while len(pieces) < 6:
            time.sleep(0.01)
        talk.live.hear(voice(400))
        stopped = talk.until("interrupted")[-1]
        assert stopped["turn"] == 1 and 0 <= stopped["heard_ms"] <= 6 * 80
        talk.live.played(4 * 80)
        go.set()
        talk.live.hear(rest(1000))
        events = talk.until("reply_done")
        assert "reply_text" not in kinds(events)
        before = [t for t in talk.live.session.turns[:-2] if t.speaker == MODEL]
        assert len(before) <= 1 and all(t.num_frames == 4 for t in before)
        assert talk.live.history[-2:] == [("user", "stop it"), ("assistant", "Yes.")]


def test_a_cough_does_not_interrupt(parts):
    with Talk(parts, Says([*REPLY])) as talk:
        talk.live.type("tell me")
        talk.until("reply_started")
        talk.live.hear(np.concatenate([voice(150), rest(900)]))
        talk.until("reply_done")
        assert not talk.live._reply.stopped.is_set() and talk.written <= 1


def test_after_a_reply_was_heard_speech_is_no_interruption(parts):
    with Talk(parts, Says(["Yes."], ["No."])) as talk:
        talk.live.type("one")
        done = talk.until("reply_done")[-1]
        talk.live.played(1000 * done["duration_s"])
        talk.live.type("two")
        assert "interrupted" not in kinds(talk.until("reply_done"))
        assert [t.text for t in talk.live.session.turns] == ["one", "yes.", "two", "no."]


def test_the_speaker_does_not_run_far_ahead(parts):
    with Talk(parts, Says(REPLY), ahead_seconds=0.25) as talk:
        start = time.perf_counter()
        talk.live.type("tell me")
        done = talk.until("reply_done")[-1]
        assert time.perf_counter() - start >= done["duration_s"] - 0.35


def test_heard_words_and_cut_turns(parts):
    assert heard_words("one two three", 0.0) == "" and heard_words("one two three", 0.5) == "one two" and heard_words("one two", 9) == "one two"
    session = Session(*parts, TOKENIZER, SHORT)
    turn = session.say(MODEL, "a turn of some words.")
    assert cut_turn(turn, 100, TINY_CODEC.frame_size, TOKENIZER) is None
    assert cut_turn(dataclasses.replace(turn, codes=None), 10 ** 6, TINY_CODEC.frame_size, TOKENIZER) is None


# ----------------------------------------------------------------------------- what goes wrong, and what it costs

def test_a_bad_turn_does_not_end_the_conversation(parts):
    with Talk(parts, Says([ValueError("no answer today")], [RuntimeError("broken")], ["..."], ["Fine."])) as talk:
        for code, words in (("cannot_answer", "no answer today"), ("internal", "RuntimeError"), ("cannot_answer", "nothing speakable")):
            talk.live.type("hello")
            error = talk.until("error")[-1]
            assert error["code"] == code and words in error["message"]
        talk.live.type("hello")
        assert talk.until("reply_done")[-1]["text"] == "Fine."
        assert not talk.live.history[-1][1] == "hello"


def test_what_cannot_be_spoken_or_is_too_much_is_refused(parts):
    hold = threading.Event()

    def waiting():
        hold.wait(30)
        yield "Done."
    with Talk(parts, Says(waiting(), *[["Yes."]] * 5)) as talk:
        with pytest.raises(ValueError, match="nothing speakable"):
            talk.live.type("?!")
        talk.live.type("zero")
        talk.until("transcript")
        for n in range(live.WAITING):
            talk.live.type(f"turn {n}")
        with pytest.raises(ValueError, match="wait already"):
            talk.live.type("one too many")
        hold.set()


def test_voice_and_reset(parts):
    codes = torch.randint(64, (8, 20))
    with Talk(parts, Says(["Yes."], ["No."])) as talk:
        talk.live.set_voice(codes=codes, text="my voice.")
        talk.live.type("one")
        talk.until("reply_done")
        talk.live.reset()
        talk.live.type("two")
        assert talk.until("reply_done")[-1]["turn"] == 1
        assert [t.text for t in talk.live.session.turns] == ["two", "no."] and talk.live.history == [("user", "two"), ("assistant", "No.")]
        assert torch.equal(talk.live.session.voices[MODEL].codes, codes)


def test_a_listener_who_has_gone_ends_it(parts):
    def emit(event, pcm):
        if pcm is not None:
            raise Closed
    with Talk(parts, Says(REPLY), emit=emit) as talk:
        talk.live.type("tell me")
        talk.live._worker.join(30)
        assert not talk.live._worker.is_alive()


def test_closing_in_the_middle_of_a_reply(parts):
    talk = Talk(parts, Says(["One more sentence. " * 40]))
    talk.live.type("tell me")
    talk.until("reply_started")
    talk.live.close()
    talk.ears.close()
    talk.engine.close(finish=False)
    assert not talk.live._worker.is_alive()


@pytest.mark.parametrize("what", ["orders that wait", "a draft"])
def test_a_closed_conversation_is_freed_at_once(parts, what):
    """What still waits holds it, and it holds what waits."""
    hold, written = threading.Event(), threading.Event()

    def waiting():
        hold.wait(30)
        yield "Done."
    gc.collect()
    gc.disable()
    try:
        talk = Talk(parts, Says(waiting()), emit=lambda event, pcm: None)
        if what == "a draft":
            talk.ears.transcribe = lambda audio, rate: written.set() or "hello"
            talk.live.hear(np.concatenate([voice(600), rest(talk.live.ear.cfg.pause_ms + 100)]))
            assert talk.live._draft is not None and written.wait(30)
        else:
            talk.live.type("zero")
            talk.live.set_voice(text="a voice")
            talk.live.reset()
        threading.Timer(0.2, hold.set).start()
        talk.live.close()
        talk.ears.close()
        ended, talk.live = weakref.ref(talk.live), None
        until = time.monotonic() + 10
        while ended() is not None and time.monotonic() < until:
            time.sleep(0.01)
        assert ended() is None
    finally:
        gc.enable()
    talk.engine.close(finish=False)


def test_memory_stays_where_it_is(parts):
    """After many turns the session holds the sound and codes of its window alone, and no more history than it shows."""
    with Talk(parts, Says(*[["A reply."]] * 14), user_sound=True, history=4, heard=["a turn"] * 14) as talk:
        sizes = []
        for _ in range(14):
            talk.live.hear(np.concatenate([voice(400), rest(1000)]))
            talk.live.played(1000 * talk.until("reply_done")[-1]["duration_s"])
            sizes.append(talk.live.memory_bytes)
        turns, start = talk.live.session.turns, talk.live.session._start
        assert len(turns) == 28 and start > 20
        assert all(t.codes is None for t in turns[2:start - 4]) and turns[0].codes is not None
        assert all(t.audio is None for t in turns[:-2]) and len(talk.live.history) == 4
        assert sizes[-1] - sizes[5] < 8 * 3000, sizes


def test_a_full_engine_is_said_and_survived(parts, monkeypatch):
    with Talk(parts, Says(["Yes."], ["No."])) as talk:
        def full(*_):
            raise EngineFull("try again later")
        with monkeypatch.context() as patch:
            patch.setattr(talk.engine, "speak", full)
            talk.live.type("one")
            assert talk.until("error")[-1]["code"] == "full"
        talk.live.type("two")
        talk.until("reply_done")


# ----------------------------------------------------------------------------- the transcriber

def test_whole_turns_are_written_down_before_drafts():
    begun, hold, order = threading.Event(), threading.Event(), []

    def transcribe(audio, rate):
        begun.set()
        hold.wait(30)
        order.append(int(audio[0]))
        return str(int(audio[0]))
    ears = Ears(transcribe)
    first = ears.submit(np.array([0.0]), RATE)
    assert begun.wait(30)
    draft = ears.submit(np.array([1.0]), RATE, draft=True)
    assert ears.submit(np.array([2.0]), RATE, draft=True) is None, "a draft waits for nobody"
    whole = ears.submit(np.array([3.0]), RATE)
    hold.set()
    assert [f.result(30) for f in (first, whole, draft)] == ["0", "3", "1"] and order == [0, 3, 1]
    ears.close()


def test_a_failed_transcript_belongs_to_whoever_asked():
    ears = Ears(lambda audio, rate: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ears.submit(np.zeros(1), RATE).result(30)
    with pytest.raises(ZeroDivisionError):
        ears.submit(np.zeros(1), RATE).result(30)
    ears.close()


# ----------------------------------------------------------------------------- sentences

def test_sentences_come_as_soon_as_they_are_whole():
    taken = []

    def words():
        for word in ("Oh. ", "Well, that is ", "it. And", " more", "."):
            taken.append(word)
            yield word
    stream = sentences(words())
    assert next(stream) == ("Oh. Well, that is it.", None) and len(taken) == 3
    assert list(stream) == [("And more.", None)]


def test_sentences_have_their_mood_and_no_more_than_so_many_letters():
    assert list(sentences([Words.of("We won the whole race! We did.", "excited")])) == [("We won the whole race!", "excited"), ("We did.", "excited")]
    long = [text for text, _ in sentences(("word " for _ in range(1000)))]
    assert sum(map(len, long)) <= generation.REPLY_CHARACTERS and all(len(text) <= 240 for text in long)


def test_settings_name_their_flag():
    with pytest.raises(ValueError, match="--ahead_seconds"):
        LiveConfig(ahead_seconds=0)
    with pytest.raises(ValueError, match="--history"):
        LiveConfig(history=0)
    assert USER != MODEL
