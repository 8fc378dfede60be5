"""Streamed listening against offline listening, barge-in against having said only so much, pieces of 20 ms."""
import copy
import dataclasses

import numpy as np
import pytest
import torch

import listening
from architecture import CSM
from config import CodecConfig, SamplingConfig, model_preset
from generation import Session, Turn, generate_slow, generate_text, turn_rows
from listening import Listener, cut_off, heard_part, listen, read_text
from rvq_tokenizer import Codec
from text_tokenizer import ByteTokenizer

TINY_CODEC = CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                         latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)
GREEDY = SamplingConfig(temperature=0.0, depth_temperature=0.0, text_temperature=0.0, max_seconds=2.0)
TOKENIZER = ByteTokenizer()
SIZE = TINY_CODEC.frame_size


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return Codec(TINY_CODEC).eval()


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch):
    """So that the preset's small window need not give up turns for sound that never comes."""
    monkeypatch.setattr(listening, "RESERVE_SECONDS", 1.0)


def make_model(**overrides):
    torch.manual_seed(0)
    model = CSM(model_preset("test", **overrides))
    model.init_weights(open_gates=True)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def talk(model, codec, turns=1, sampling=GREEDY, **more):
    """A session in which something was said."""
    session = Session(model, codec, TOKENIZER, sampling, **more)
    for number in range(turns):
        session.say(1 - number % 2, f"turn number {number}.")
    return session


def sound(frames=9.4, seed=0):
    return (0.3 * np.random.default_rng(seed).standard_normal(int(frames * SIZE))).astype(np.float32)


def same_state(a, b):
    """Keys, values, what was heard, gathered sums, slots and positions are equal up to rounding."""
    a.settle(), b.settle()
    assert a.length == b.length, (a.length, b.length, a.limit)
    assert a.current == b.current
    n = a.length
    for x, y in [*((p.k, q.k) for p, q in zip(a.caches, b.caches)), *((p.v, q.v) for p, q in zip(a.caches, b.caches))]:
        torch.testing.assert_close(x[:, :, :n], y[:, :, :n], atol=1e-4, rtol=1e-4)
    for x, y in zip(a.heard, b.heard):
        torch.testing.assert_close(x[:, :n], y[:, :n], atol=1e-4, rtol=1e-4)
    for field in dataclasses.fields(a.seen):
        assert torch.equal(getattr(a.seen, field.name), getattr(b.seen, field.name)), field.name
    assert (a.slots is None) == (b.slots is None)
    if a.slots is not None:
        torch.testing.assert_close(a.slots.semantic, b.slots.semantic, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.slots.prosodic, b.slots.prosodic, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------- listening

@pytest.mark.parametrize("chunk", [137, SIZE, 3 * SIZE + 1, 10 ** 6])
@pytest.mark.parametrize("turns", [1, 4])                      # the window of this preset holds two turns: with four, there are memory slots
def test_streamed_listening_equals_offline(model, codec, chunk, turns):
    audio, text = sound(), "how are you?"
    streamed, offline = talk(model, codec, turns), talk(model, codec, turns)
    listener = Listener(streamed, 0)
    for at in range(0, len(audio), chunk):
        listener.feed(audio[at:at + chunk])
    turn, wanted = listener.finish(text), listen(offline, 0, audio, text)
    assert torch.equal(turn.codes, wanted.codes) and turn.codes.shape[1] == 10 and turn.heard and turn.text == wanted.text
    np.testing.assert_array_equal(turn.audio, audio)
    same_state(streamed._state, offline._state)
    assert len(streamed.turns) == len(streamed._slots) == turns + 1
    assert torch.equal(streamed.say(1, "very well.").codes, offline.say(1, "very well.").codes)


def test_the_reply_is_the_slow_ones(model, codec):
    """Against the model without caches, over the rows of the whole conversation."""
    session = Session(model, codec, TOKENIZER, GREEDY)
    listener = Listener(session, 0)
    for piece in np.array_split(sound(), 7):
        listener.feed(piece)
    heard = listener.finish("how are you?")
    reply = session.say(1, "very well.")
    codes, _ = generate_slow(model, codec, TOKENIZER, turn_rows(heard, model.cfg, TOKENIZER, 0), Turn(1, reply.text), 1, GREEDY)
    assert torch.equal(reply.codes, codes)


def test_the_sound_is_in_the_state_before_the_turn_is_over(model, codec):
    session = talk(model, codec)
    before = session._state.length
    listener = Listener(session, 0)
    listener.feed(sound(5.0))
    assert listener._state.length == before + len(listener.prefix) + 5
    calls = []
    hook = model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].S))
    listener.finish("hello.")
    hook.remove()
    assert calls == [1 + 1 + len("hello.") + 1]                # the end frame, TRANSCRIPT, the words, EOT


def test_the_answer_finds_the_window_as_it_is(model, codec):
    """In a long conversation too nothing but the transcript and the answer's text goes into the model after the user's last sound."""
    session = talk(model, codec, 5, dataclasses.replace(GREEDY, lead_seconds=0.0))
    listener = Listener(session, 0)
    listener.feed(sound())
    calls = []
    hook = model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].S))
    listener.finish("hello.")
    stream = session.speak(1, "well then.")
    next(stream)
    hook.remove()
    assert session._start == 4 and calls == [3 + len("hello."), 2 + len("well then.") + 1]


def test_a_cancelled_turn_leaves_no_trace(model, codec):
    session, untouched = talk(model, codec), talk(model, codec)
    listener = Listener(session, 0)
    listener.feed(sound())
    listener.cancel()
    assert torch.equal(session.say(0, "never mind.").codes, untouched.say(0, "never mind.").codes)
    same_state(session._state, untouched._state)


def test_nothing_heard_is_an_error_and_the_session_lives(model, codec):
    session = talk(model, codec)
    with pytest.raises(ValueError, match="nothing was heard"):
        Listener(session, 0).finish("hello.")
    with pytest.raises(ValueError, match="speaker"):
        Listener(session, 99)
    assert session.say(0, "hello.").num_frames


def test_a_long_turn_pushes_older_ones_out_of_the_window(codec, monkeypatch):
    cfg = model_preset("test")
    model = make_model(backbone=dataclasses.replace(cfg.backbone, max_positions=220))
    monkeypatch.setattr(listening, "RESERVE_SECONDS", 0.5)
    session = talk(model, codec, 2, dataclasses.replace(GREEDY, max_seconds=1.0))
    listener = Listener(session, 0)
    for at in range(0, 45 * SIZE, 5 * SIZE):
        listener.feed(sound(45)[at:at + 5 * SIZE])
    turn = listener.finish("a very long turn.")
    assert turn.num_frames == 45 and session._start > 0
    rest = Session(model, codec, TOKENIZER, session.sampling)
    rest.turns, rest._slots, rest._start = session.turns[:], session._slots[:], session._start
    rest._room(1)
    assert rest._state.length == session._state.length
    for a, b in zip(rest._state.caches, session._state.caches):
        torch.testing.assert_close(a.k[:, :, :rest._state.length], b.k[:, :, :rest._state.length], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="positions"):
        Listener(session, 0).feed(sound(300))


def test_without_a_transcript_the_text_head_writes(model, codec):
    session = talk(model, codec)
    listener = Listener(session, 0)
    assert listener.partial() == ""
    listener.feed(sound())
    length = listener._state.length
    assert isinstance(listener.partial(), str) and listener._state.length == length
    rest = talk(model, codec)
    for _ in listener.rehearse(1):                             # a draft of what was heard so far, and of the reply
        pass
    listener.feed(sound(2.6, 1))
    for _ in listener.rehearse(1):
        pass
    passes = []
    hook = model.text_head.register_forward_pre_hook(lambda module, given: passes.append(1))
    turn = listener.finish()
    hook.remove()
    oracle = Listener(rest, 0)
    oracle.feed(np.concatenate([sound(), sound(2.6, 1)]))
    ids = generate_text(model, TOKENIZER, oracle._ended(copy.copy(oracle._state)), [TOKENIZER.transcript], oracle._number, 25, 0.0)
    assert turn.text == TOKENIZER.decode(ids).lower() and len(passes) < len(turn.text) / 2 and torch.equal(turn.codes, torch.cat(oracle.codes, 1))
    assert session._rehearsed and session.reply_text(1)


# ----------------------------------------------------------------------------- barge-in

@pytest.mark.parametrize("when", ["while it is made", "after it was made", "after the window was filled again"])
@pytest.mark.parametrize("turns", [1, 3])
def test_cut_off_equals_having_said_only_that(model, codec, when, turns):
    session = talk(model, codec, turns)
    heard = 5 * SIZE + 7
    if when == "while it is made":
        for number, _ in enumerate(session.speak(1, "this is a long story of a dog.")):
            if number == 7:
                break
    else:
        session.say(1, "this is a long story of a dog.")
    if when == "after the window was filled again":
        session._state = None
        session.prepare(0)
    part = cut_off(session, heard)
    whole = talk(model, codec, turns).say(1, "this is a long story of a dog.")
    assert part is session.turns[-1] and len(session.turns) == len(session._slots) == turns + 1
    assert torch.equal(part.codes, whole.codes[:, :6]) and len(part.audio) == heard and not part.ended
    np.testing.assert_array_equal(part.audio, whole.audio[:heard])
    assert part.text and whole.text.startswith(part.text) and len(part.readings) == 6 + 2
    said_only_that = talk(model, codec, turns)
    said_only_that._room(len(part.text) + 20)
    said_only_that._put(dataclasses.replace(part))
    assert torch.equal(session.say(0, "i see.").codes, said_only_that.say(0, "i see.").codes)
    if when != "after the window was filled again":
        same_state(session._state, said_only_that._state)


def test_after_a_cut_the_slow_path_agrees(model, codec):
    session = Session(model, codec, TOKENIZER, dataclasses.replace(GREEDY, lead_seconds=0.0))
    for number, _ in enumerate(session.speak(1, "this is a long story of a dog.")):
        if number == 6:
            break
    part = cut_off(session, 6 * SIZE)
    reply = session.say(0, "i see.")
    codes, _ = generate_slow(model, codec, TOKENIZER, turn_rows(part, model.cfg, TOKENIZER, 0), Turn(0, reply.text), 1, session.sampling)
    assert torch.equal(reply.codes, codes)


def test_cut_before_the_first_word_or_after_the_last(model, codec):
    session, untouched = talk(model, codec), talk(model, codec)
    session.say(1, "well then.")
    assert cut_off(session, 0) is None and len(session.turns) == 1
    same_state(session._state, untouched._state)
    turn = session.say(1, "well then.")
    assert cut_off(session, len(turn.audio)) is turn and session.turns[-1] is turn
    session.say(0, "what?")
    listen(session, 1, sound(), "stop.")
    for nothing in (session, Session(model, codec, TOKENIZER, GREEDY)):
        with pytest.raises(ValueError, match="no turn to cut off"):
            cut_off(nothing, 100)


def test_text_is_cut_at_words():
    text = "well, you see it."
    assert [read_text(text, n, TOKENIZER) for n in (0, 1, 5, 6, 7, 9, 10, 17, 30)] == [
        "", "well,", "well,", "well, you", "well, you", "well, you", "well, you see", text, text]
    turn = Turn(0, text, codes=torch.zeros(8, 4, dtype=torch.long), audio=np.zeros(4 * SIZE, np.float32), readings=[2, 2, 4, 9, 19, 19])
    part = heard_part(turn, 2 * SIZE, SIZE, TOKENIZER)
    assert part.text == "well, you" and part.readings == [2, 2, 4, 9] and part.codes.shape[1] == 2
    turn.readings = None                                       # a model without a reading position
    assert heard_part(turn, SIZE, SIZE, TOKENIZER).text == text


# ----------------------------------------------------------------------------- pieces

@pytest.mark.parametrize("piece_ms", [20, 40, 80])
def test_pieces_are_the_same_samples(model, codec, piece_ms):
    session = talk(model, codec)
    made, first = [], None
    for piece in session.speak(0, "hello there.", piece_ms=piece_ms):
        first = first or len(session.turns)
        made.append(piece)
    turn = session.turns[-1]
    assert {len(p) for p in made} == {24 * piece_ms} and first == 1
    np.testing.assert_array_equal(np.concatenate(made), turn.audio)
    np.testing.assert_allclose(turn.audio, codec.decode(turn.codes.unsqueeze(0))[0, 0].numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="piece_ms"):
        session.speak(0, "hello.", piece_ms=30)
