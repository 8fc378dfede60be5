"""Many turns at a time against one after another: the same codes; who comes, goes, fails or waits concerns nobody else."""
import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch

import listening
from architecture import CSM
from batching import BatchingConfig, BatchingEngine, EngineClosed, EngineFull, SessionBusy, sample_rows
from config import CodecConfig, SamplingConfig, model_preset
from frame_step import FrameStep
from generation import Session, Turn, audio_rows, begin_turn, sample
from rvq_tokenizer import Codec
from text_tokenizer import ByteTokenizer

TINY_CODEC = CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                         latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)
GREEDY = SamplingConfig(temperature=0.0, depth_temperature=0.0, text_temperature=0.0, max_seconds=2.0)
TOKENIZER = ByteTokenizer()
SIZE = TINY_CODEC.frame_size
TEXTS = ["hello there.", "this is a longer sentence, of a dog and a cat.", "no.", "good morning to you all, my friends."]
OFF = model_preset("test")
KINDS = {"all": {}, "unguided": {"cross": dataclasses.replace(OFF.cross, guided=False)}, "no memory": {"memory": dataclasses.replace(OFF.memory, enabled=False)},
         "no cross": {"cross": dataclasses.replace(OFF.cross, enabled=False)}}
MODELS = {}


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return Codec(TINY_CODEC).eval()


def make_model(kind="all"):
    if kind not in MODELS:
        torch.manual_seed(0)
        MODELS[kind] = CSM(model_preset("test", **KINDS[kind]))
        MODELS[kind].init_weights(open_gates=True)
    return MODELS[kind].eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def engine(model, codec):
    with BatchingEngine(model, codec, TOKENIZER, BatchingConfig(max_turns=4, max_waiting=4, prefill_positions=16), GREEDY) as engine:
        yield engine


def talk(model, codec, turns, sampling=GREEDY, **more):
    """A session in which something was said: with more than two turns, memory slots are in use."""
    session = Session(model, codec, TOKENIZER, sampling, **more)
    for number in range(turns):
        session.say(number % 2, f"turn number {number}.")
    return session


def said(speech):
    pieces = list(speech)
    np.testing.assert_array_equal(np.concatenate(pieces), speech.turn.audio)
    return speech.turn


def same_turn(a, b):
    assert torch.equal(a.codes, b.codes) and a.readings == b.readings and (a.end_reason, a.text) == (b.end_reason, b.text)
    gap = np.abs(a.audio - b.audio)                              # the synthesiser's pulses have edges: there rounding may show in a sample
    assert a.audio.shape == b.audio.shape and gap.max() < 0.02 and gap.mean() < 1e-5


# ----------------------------------------------------------------------------- one frame for many

def in_a_turn(model, session, frames):
    """A copy of the session's state in the midst of a turn, the number of the turn, and the reading position."""
    session.prepare()
    state = copy.deepcopy(session._state)
    rows, finger, _ = begin_turn(Turn(0, "this is said now" + frames * " and so" + "."), None, model.cfg, TOKENIZER, session._number, "cpu")
    with torch.inference_mode():
        model(rows, state=state)
        for n in range(frames):
            model(audio_rows(torch.full((8, 1), 3 + n), model.cfg, session._number, [finger.reading]), state=state)
    return state, session._number, finger.reading


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_one_row_is_the_models_to_the_bit(codec, kind):
    model = make_model(kind)
    fast, number, reading = in_a_turn(model, talk(model, codec, 4), 1)
    slow, step = copy.deepcopy(fast), FrameStep(model)
    for n in range(5):
        tokens, at = torch.randint(1, 65, (8,)), reading + n if reading >= 0 else -1
        assert step.ready(fast, number)
        with torch.inference_mode():
            wanted = model(audio_rows(tokens.view(-1, 1), model.cfg, number, [at]), state=slow)[0, -1]
        assert torch.equal(step([fast], [number], tokens.unsqueeze(0), [at])[0], wanted)
    fast.settle()
    assert fast.length == slow.length and all(torch.equal(a.k, b.k) and torch.equal(a.v, b.v) for a, b in zip(fast.caches, slow.caches))
    assert all(torch.equal(a, b) for a, b in zip(fast.heard, slow.heard)) and all(torch.equal(fast.gathered[k], slow.gathered[k]) for k in slow.gathered)
    assert all(torch.equal(getattr(fast.seen, f.name), getattr(slow.seen, f.name)) for f in dataclasses.fields(slow.seen))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_several_rows_is_that_of_each(codec, kind):
    """Rows at different positions, of different texts, some with memory slots, one in its first frame."""
    model = make_model(kind)
    rows = [in_a_turn(model, talk(model, codec, turns), frames) for turns, frames in ((0, 3), (4, 1), (1, 0), (3, 7))]
    alone, step = copy.deepcopy(rows), FrameStep(model)
    for n in range(4):
        tokens = torch.randint(1, 65, (len(rows), 8))
        together = step([r[0] for r in rows], [r[1] for r in rows], tokens, [r[2] for r in rows])
        for i, (state, number, reading) in enumerate(alone):
            with torch.inference_mode():
                wanted = model(audio_rows(tokens[i].view(-1, 1), model.cfg, number, [reading]), state=state)[0, -1]
            torch.testing.assert_close(together[i], wanted, atol=1e-4, rtol=1e-4)
        if n == 1:
            rows, alone = rows[1:], alone[1:]                   # one leaves


def test_rows_draw_as_they_would_alone():
    logits = 0.3 * torch.randn(4, 50)
    temperatures, top_ks = [0.0, 0.7, 5.0, 2.0], [30, 2, 1, 100]
    for seed in range(20):
        drawn = sample_rows(logits, temperatures, top_ks, [torch.Generator().manual_seed(seed + r) for r in range(4)])
        alone = [sample(logits[r:r + 1], temperatures[r], top_ks[r], torch.Generator().manual_seed(seed + r)) for r in range(4)]
        assert torch.equal(drawn, torch.cat(alone))


def test_the_draw_is_that_of_multinomial():
    chances = torch.softmax(torch.randn(3, 40), -1).sort(descending=True).values
    for seed in range(20):
        wanted = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed)).squeeze(-1)
        assert torch.equal(sample(chances.log(), 1.0, 40, torch.Generator().manual_seed(seed)), wanted)


# ----------------------------------------------------------------------------- the same as one after another

@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_several_sessions_are_those_of_each_alone(codec, kind):
    """Different histories (with and without memory slots), lengths and numbers of codebooks; the last joins when the first is under way."""
    model, more = make_model(kind), [{}, {}, {"num_codebooks": 5}, {}]
    wanted = [talk(model, codec, turns, **more[turns]) for turns in range(4)]
    with BatchingEngine(model, codec, TOKENIZER, BatchingConfig(max_turns=3, prefill_positions=16), GREEDY) as engine:
        sessions = [talk(model, codec, turns, **more[turns]) for turns in range(4)]
        for repeat in range(2):
            speeches = [engine.speak(s, text) for s, text in zip(sessions[:3], TEXTS)]
            first = next(speeches[0])
            speeches.append(engine.speak(sessions[3], TEXTS[3], speaker=0, mood="happy"))
            assert len(first) == SIZE
            list(speeches[0])
            for i in (1, 2, 3):
                said(speeches[i])
            for i, (session, text) in enumerate(zip(wanted, TEXTS)):
                turn = session.say(*((1, text) if i < 3 else (0, text, "happy")))
                same_turn(sessions[i].turns[-1], turn)
        assert engine.stats()["ended"] == 8 and engine.stats()["frames"] == sum(sum(t.num_frames for t in s.turns[-2:]) for s in sessions)


def test_a_seed_says_what_is_drawn_whatever_else_is_said(model, codec, engine):
    warm = SamplingConfig(max_seconds=1.0, temperature=1.0, depth_temperature=1.0)
    alone = said(engine.speak(engine.session(warm), TEXTS[0], seed=5))
    others = [engine.speak(engine.session(dataclasses.replace(warm, temperature=t, top_k=k, seed=k)), TEXTS[1]) for t, k in ((0.3, 7), (0.0, 30))]
    again = said(engine.speak(engine.session(warm), TEXTS[0], seed=5))
    other = said(engine.speak(engine.session(warm), TEXTS[0], seed=6))
    [said(s) for s in others]
    same_turn(again, alone)
    assert not torch.equal(other.codes[:, :5], alone.codes[:, :5])
    session = Session(model, codec, TOKENIZER, dataclasses.replace(warm, seed=5))
    same_turn(session.say(1, TEXTS[0]), alone)


def test_pieces_of_20_ms(engine):
    speech = engine.speak(engine.session(), TEXTS[0], piece_ms=20)
    assert {len(piece) for piece in speech} == {480}
    with pytest.raises(ValueError, match="piece_ms"):
        engine.speak(engine.session(), TEXTS[0], piece_ms=33)


def test_listening_beside_others(model, codec, engine):
    """Sound that comes frame by frame and in larger pieces, while another session speaks: the state and the reply are those of offline listening."""
    audio = (0.3 * np.random.default_rng(0).standard_normal(int(8.5 * SIZE))).astype(np.float32)
    offline = talk(model, codec, 1)
    listening.listen(offline, 0, audio, "how are you?")
    for chunk in (SIZE, 100, 4 * SIZE):
        session, other = talk(model, codec, 1), talk(model, codec, 3)
        beside = engine.speak(other, TEXTS[1])
        hearing = engine.listen(session, 0)
        for at in range(0, len(audio), chunk):
            hearing.feed(audio[at:at + chunk])
            if at == chunk:
                next(beside)
        turn = hearing.finish("how are you?")
        assert turn is session.turns[-1] and torch.equal(turn.codes, offline.turns[-1].codes)
        n = session._state.length
        assert n == offline._state.length
        for a, b in zip(session._state.caches, offline._state.caches):
            torch.testing.assert_close(a.k[:, :, :n], b.k[:, :, :n], atol=1e-4, rtol=1e-4)
        same_turn(said(engine.speak(session, "well.")), copy.deepcopy(offline).say(1, "well."))
        list(beside)
        same_turn(beside.turn, talk(model, codec, 3).say(1, TEXTS[1]))


def test_a_hearing_can_be_given_up_and_can_be_empty(model, codec, engine):
    session = talk(model, codec, 1)
    hearing = engine.listen(session, 0)
    hearing.feed(np.zeros(3 * SIZE, np.float32))
    with pytest.raises(SessionBusy):
        engine.speak(session, "hello.")
    hearing.cancel()
    with pytest.raises(ValueError, match="is over"):
        hearing.feed(np.zeros(SIZE, np.float32))
    with pytest.raises(ValueError, match="nothing was heard"):
        engine.listen(session, 0).finish("hello.")
    same_turn(said(engine.speak(session, TEXTS[0])), talk(model, codec, 1).say(1, TEXTS[0]))


class OneByOne:
    """A codec whose streams cannot be stacked, as Mimi's."""

    def __init__(self, codec):
        self.codec, self.cfg = codec, codec.cfg

    def decode_stream(self, codes, state, semantic):
        assert len(codes) == 1
        return self.codec.decode_stream(codes, state, semantic)


def test_a_codec_that_cannot_be_stacked(model, codec):
    with BatchingEngine(model, OneByOne(codec), TOKENIZER, BatchingConfig(), GREEDY) as engine:
        speeches = [engine.speak(engine.session(), text) for text in TEXTS[:3]]
        for text, speech in zip(TEXTS, speeches):
            same_turn(said(speech), Session(model, codec, TOKENIZER, GREEDY).say(1, text))


# ----------------------------------------------------------------------------- who comes and goes

def held(engine):
    """Keep the worker from working until the returned lock is released."""
    lock = threading.Lock()
    lock.acquire()
    inner = engine._prefill

    def prefill():
        with lock:
            inner()
    engine._prefill = prefill
    return lock


def test_a_bounded_queue(model, codec):
    with BatchingEngine(model, codec, TOKENIZER, BatchingConfig(max_turns=2, max_waiting=1), GREEDY) as engine:
        lock = held(engine)
        speeches = [engine.speak(engine.session(), TEXTS[0]) for _ in range(3)]
        fourth = engine.session()
        with pytest.raises(EngineFull, match="--max_waiting"):
            engine.speak(fourth, TEXTS[0])
        lock.release()
        assert len({tuple(said(s).codes.flatten().tolist()) for s in speeches}) == 1
        assert said(engine.speak(fourth, TEXTS[0])).num_frames and engine.stats()["turned_away"] == 1


def test_one_thing_at_a_time_in_a_session(model, codec, engine):
    session = engine.session()
    lock = held(engine)
    speech = engine.speak(session, TEXTS[0])
    for other in (lambda: engine.speak(session, TEXTS[0]), lambda: engine.listen(session), lambda: engine.call(session, Session.prepare), lambda: engine.rest(session)):
        with pytest.raises(SessionBusy):
            other()
    lock.release()
    said(speech)
    assert engine.call(session, Session.add_turn, 0, "and now?").text == "and now?" and len(session.turns) == 2
    assert engine.call(None, lambda _: 5) == 5                   # work that is no session's
    with pytest.raises(ValueError, match="another model"):
        engine.speak(talk(copy.deepcopy(model), codec, 0), TEXTS[0])


@pytest.mark.parametrize("bad", [{"text": "???"}, {"text": "hello.", "mood": "hungry"}, {"text": "hello.", "speaker": 77}])
def test_what_cannot_be_said_is_said_at_once(engine, bad):
    session = engine.session()
    with pytest.raises(ValueError):
        engine.speak(session, **bad)
    assert said(engine.speak(session, "hello.")).num_frames


def test_cancelled_at_a_frame_the_turn_is_forgotten_and_the_others_go_on(model, codec, engine):
    session, other = talk(model, codec, 2), talk(model, codec, 3)
    speech, beside = engine.speak(session, TEXTS[1]), engine.speak(other, TEXTS[3])
    length = session._state.length
    next(speech)
    speech.cancel()
    assert list(speech) == [] and len(session.turns) == 2 and session._state.length == length
    list(beside)
    same_turn(beside.turn, talk(model, codec, 3).say(1, TEXTS[3]))
    same_turn(said(engine.speak(session, TEXTS[0])), talk(model, codec, 2).say(1, TEXTS[0]))
    engine.speak(session, TEXTS[1])                              # dropped at once
    waiting = [engine.speak(engine.session(), TEXTS[0]) for _ in range(6)]
    waiting[-1].cancel()
    [said(s) for s in waiting[:-1]]
    assert not engine._busy


@pytest.mark.parametrize("when", ["early", "made"])
def test_cut_off_leaves_what_was_heard(model, codec, engine, when):
    session, beside = talk(model, codec, 1), engine.speak(talk(model, codec, 3), TEXTS[3])
    speech = engine.speak(session, TEXTS[1])
    for _ in range(6 if when == "early" else 10 ** 6):
        if speech.next() is None:
            break
    part = speech.cut_off(4 * SIZE + 5)
    wanted = talk(model, codec, 1)
    wanted.say(1, TEXTS[1])
    same = listening.cut_off(wanted, 4 * SIZE + 5)
    assert part.num_frames == 5 and part is session.turns[-1]
    same_turn(part, same)
    same_turn(said(engine.speak(session, "i see.", speaker=0)), wanted.say(0, "i see."))
    list(beside)
    with pytest.raises(ValueError, match="cut off already"):
        speech.cut_off(100)


class Broken:
    """A generator that fails when something is drawn with it."""
    device = torch.device("cpu")


def test_an_error_in_one_turn_is_its_own(model, codec, engine):
    session = engine.session(dataclasses.replace(GREEDY, temperature=1.0))
    others = [talk(model, codec, n) for n in (1, 3)]
    session.generator = Broken()
    speeches = [engine.speak(s, TEXTS[1]) for s in (others[0], session, others[1])]
    with pytest.raises(TypeError):
        list(speeches[1])
    for n, speech in ((1, speeches[0]), (3, speeches[2])):
        same_turn(said(speech), talk(model, codec, n).say(1, TEXTS[1]))
    session.generator = torch.Generator().manual_seed(0)
    assert said(engine.speak(session, TEXTS[0])).num_frames and session.turns[-1].text == TEXTS[0] and len(session.turns) == 1


def test_an_error_in_the_midst_of_the_batch(model, codec, engine, monkeypatch):
    """Of the backbone, of the codec, of a full window: only the turn that has it ends."""
    bad, good = talk(model, codec, 1), talk(model, codec, 3)
    inner, calls = engine._step._step, []

    def step(states, turns, tokens, reading):
        calls.append(len(states))
        if any(s.caches[0] is bad._spare.caches[0] for s in states) and len(calls) > 4:
            raise RuntimeError("out of order")
        return inner(states, turns, tokens, reading)
    monkeypatch.setattr(engine._step, "_step", step)
    speeches = [engine.speak(s, TEXTS[1]) for s in (bad, good)]
    with pytest.raises(RuntimeError, match="out of order"):
        list(speeches[0])
    same_turn(said(speeches[1]), talk(model, codec, 3).say(1, TEXTS[1]))
    assert max(calls) == 2 and len(bad.turns) == 1


def test_newcomers_take_in_little_at_a_time(model, codec):
    """While one speaks, no more than prefill_positions go into the model between two of its frames."""
    newcomer, size = talk(model, codec, 2), 8
    newcomer.rest()                                              # its whole window is to be filled again
    with BatchingEngine(model, codec, TOKENIZER, BatchingConfig(max_turns=4, prefill_positions=size), GREEDY) as engine:
        log, inner = [], engine._take_in
        engine._take_in = lambda lanes: (log.append("frame") if lanes else None, inner(lanes))[1]
        hook = model.register_forward_pre_hook(lambda module, arguments: log.append(arguments[0].S))
        speaking = engine.speak(talk(model, codec, 1), TEXTS[1])
        next(speaking)
        del log[:]
        said(engine.speak(newcomer, "hello."))
        hook.remove()
        list(speaking)
    pieces = [[]]
    for entry in log:
        pieces.append([]) if entry == "frame" else pieces[-1].append(entry)
    during = pieces[1:len(pieces) // 2]
    assert sum(sum(p) for p in pieces) > 4 * size and all(s <= size for p in during for s in p) and max(sum(p) for p in during) <= 2 * size


def test_a_turn_far_ahead_of_its_listener_rests(model, codec):
    with BatchingEngine(model, codec, TOKENIZER, BatchingConfig(ahead_seconds=0.4), GREEDY) as engine:
        speech = engine.speak(engine.session(), TEXTS[1])
        next(speech)
        for _ in range(200):
            if engine.stats()["resting"]:
                break
            threading.Event().wait(0.02)
        made = engine.stats()["frames"]
        assert engine.stats()["resting"] == 1 and made <= 8
        list(speech)
        same_turn(speech.turn, Session(model, codec, TOKENIZER, GREEDY).say(1, TEXTS[1]))
        lock = held(engine)
        late = engine.speak(engine.session(), "hello.")
        with pytest.raises(TimeoutError):
            late.next(timeout=0.05)
        lock.release()
        assert said(late).num_frames


def test_many_threads(model, codec, engine):
    wanted = {text: Session(model, codec, TOKENIZER, GREEDY).say(1, text) for text in TEXTS}
    failures = []

    def user(number):
        try:
            session = engine.session()
            same_turn(said(engine.speak(session, TEXTS[number % 4])), wanted[TEXTS[number % 4]])
            engine.call(session, Session.prepare, 0)
            engine.rest(session)
            assert session._state is None and said(engine.speak(session, "and on.")).num_frames
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=user, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert failures == [] and not engine._busy


# ----------------------------------------------------------------------------- the end

def test_close_lets_turns_end_and_turns_others_away(model, codec):
    engine = BatchingEngine(model, codec, TOKENIZER, BatchingConfig(max_turns=1, ahead_seconds=0.1), GREEDY)
    running, waiting = engine.speak(engine.session(), TEXTS[1]), engine.speak(engine.session(), TEXTS[0])
    hearing = engine.listen(engine.session(), 0)
    next(running)
    engine.close()
    assert len(list(running)) + 1 == running.turn.num_frames
    for gone in (lambda: list(waiting), lambda: hearing.finish("hello."), lambda: engine.speak(engine.session(), TEXTS[0]), lambda: engine.listen(engine.session())):
        with pytest.raises(EngineClosed):
            gone()
    engine.close()
    engine = BatchingEngine(model, codec, TOKENIZER, BatchingConfig(), GREEDY)
    running = engine.speak(engine.session(), TEXTS[1])
    next(running)
    engine.close(finish=False)
    with pytest.raises(EngineClosed):
        list(running)
    assert not engine._thread.is_alive() and not engine._busy


def test_a_fault_of_the_worker_reaches_who_waits(model, codec, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    engine = BatchingEngine(model, codec, TOKENIZER, BatchingConfig(), GREEDY)
    monkeypatch.setattr(engine, "_frame", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.speak(engine.session(), TEXTS[0]))
    with pytest.raises(EngineClosed):
        engine.speak(engine.session(), TEXTS[0])


def test_settings_are_checked():
    for wrong in ({"max_turns": 0}, {"max_waiting": -1}, {"prefill_positions": 0}, {"ahead_seconds": 0.0}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
            BatchingConfig(**wrong)


def test_a_long_conversation_costs_what_a_short_one_does(model, codec, engine):
    """Positions that a turn takes in, refills included, do not grow with the conversation."""
    session, taken, costs = engine.session(dataclasses.replace(GREEDY, max_seconds=0.5)), [0], []
    hook = model.register_forward_pre_hook(lambda module, arguments: taken.append(taken.pop() + arguments[0].S))
    for number in range(16):
        taken[0] = 0
        said(engine.speak(session, "so it goes on.", speaker=number % 2))
        costs.append(taken[0])
    hook.remove()
    assert max(costs[8:]) <= max(costs[2:8]) and session._state.length < 200
