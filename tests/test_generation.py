"""Talking with a tiny random model: fast path against the slow one, streaming against offline, every way to end."""
import dataclasses

import numpy as np
import pytest
import torch

import generation
from architecture import CSM
from config import CodecConfig, SamplingConfig, model_preset
from generation import Finger, Guard, Retriever, Session, Turn, generate_slow, sample, split_text, turn_rows
from rvq_tokenizer import Codec
from text_tokenizer import ByteTokenizer

TINY_CODEC = CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                         latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)
GREEDY = SamplingConfig(temperature=0.0, depth_temperature=0.0, text_temperature=0.0, max_seconds=2.0)
SHORT = SamplingConfig(max_seconds=1.0)
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return Codec(TINY_CODEC).eval()


def make_model(**overrides):
    torch.manual_seed(0)
    model = CSM(model_preset("test", **overrides))
    model.init_weights(open_gates=True)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def unguided():
    cfg = model_preset("test")
    return make_model(cross=dataclasses.replace(cfg.cross, guided=False))


def session(model, codec, sampling=SHORT):
    return Session(model, codec, TOKENIZER, sampling)


# ----------------------------------------------------------------------------- one path for streaming and offline

def test_chunks_are_the_decoded_codes(model, codec):
    s = session(model, codec)
    chunks = list(s.speak(0, "hello there, friend."))
    turn = s.turns[-1]
    assert all(chunk.shape == (TINY_CODEC.frame_size,) and chunk.dtype == np.float32 for chunk in chunks)
    assert turn.num_frames == len(chunks) > 1
    offline = codec.decode(turn.codes.unsqueeze(0))[0, 0].numpy()
    np.testing.assert_allclose(np.concatenate(chunks), offline, atol=1e-4)
    np.testing.assert_array_equal(turn.audio, np.concatenate(chunks))


def test_fewer_codebooks_change_the_sound_and_not_the_codes(model, codec):
    full, few = session(model, codec).say(0, "hello there"), Session(model, codec, TOKENIZER, SHORT, num_codebooks=2).say(0, "hello there")
    assert torch.equal(full.codes, few.codes)
    np.testing.assert_allclose(few.audio, codec.decode(few.codes[None, :2])[0, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["model", "unguided"])
def test_fast_equals_slow_over_two_turns(kind, codec, request):
    model = request.getfixturevalue(kind)
    s, context = session(model, codec, GREEDY), None
    for number, text in enumerate(("good morning to you.", "who is there?")):
        turn = s.say(number, text, "happy")
        codes, audio = generate_slow(model, codec, TOKENIZER, context, Turn(number, turn.text, "happy"), number, GREEDY)
        assert turn.end_reason in ("read", "eos", "max_seconds") and turn.num_frames > 1
        assert torch.equal(turn.codes, codes)
        np.testing.assert_allclose(turn.audio, audio.numpy(), atol=1e-4)
        context = generation.join([p for p in (context, turn_rows(turn, model.cfg, TOKENIZER, number)) if p is not None])


def test_fast_equals_slow_after_turns_became_memory(model, codec):
    s = session(model, codec, GREEDY)
    for number in range(4):                                    # the window of this preset holds two turns
        s.say(number % 2, f"turn {number}.")
    s.prepare()
    assert s._start == 2 and s._state.slots is not None
    context, memory, lead = s._window(), s._state.visible(), s._lead(0)
    assert memory.turn.tolist() == [[0, 1]]
    turn = s.say(0, "one more.")
    codes, _ = generate_slow(model, codec, TOKENIZER, context, Turn(0, turn.text), 4, GREEDY, memory, lead)
    assert torch.equal(turn.codes, codes)


# ----------------------------------------------------------------------------- the lead: what a speaker said before

def spoken(text, consumed, speaker=0, first=2):
    """A spoken turn with a frame per entry of `consumed` (letters spoken by its end)."""
    codes = torch.arange(8 * len(consumed)).view(8, -1) % 64
    return Turn(speaker, text, codes=codes, readings=[first, first, *(first + n for n in consumed)])


def test_a_lead_is_the_last_words_that_fit():
    consumed = [1, 3, 4, 6, 7, 8, 10, 12, 14, 15, 17, 19, 20, 21, 22, 23, 24, 24, 24, 24]
    turn = spoken("oh well. it is so late.", [min(n, 23) for n in consumed])
    whole = generation.lead_of(turn, 2.0, 12.5)
    assert whole.text == turn.text and whole.read[0] == 0 and whole.num_frames == 18               # two frames of rest are kept, two cut
    sentence = generation.lead_of(turn, 1.1, 12.5)
    first = consumed.index(10) + 1                                                                  # the first frame before which "it" is reached
    assert sentence.text == "it is so late." and torch.equal(sentence.codes, turn.codes[:, first:18])
    assert sentence.read == [min(n, 23) - 9 for n in consumed[first - 1:17]]
    words = generation.lead_of(turn, 0.7, 12.5)
    assert words.text in ("so late.", "is so late.") and generation.LEAD_FRAMES <= words.num_frames <= 8
    assert generation.lead_of(turn, 0.3, 12.5) is None and generation.lead_of(None, 2.0, 12.5) is None
    assert generation.lead_of(dataclasses.replace(turn, readings=None), 2.0, 12.5) is None
    assert generation.lead_of(dataclasses.replace(turn, heard=True), 2.0, 12.5) is None


def test_a_turn_after_a_lead_equals_the_slow_one_and_leaves_no_trace(model, codec):
    """The new frames follow text and frames of the lead as one turn; the state then holds the turn without them."""
    lead = generation.lead_of(spoken("oh well now.", [2, 3, 5, 6, 8, 9, 11, 12]), 2.0, 12.5)
    rows, finger, shift = generation.begin_turn(Turn(0, "who is there?"), lead, model.cfg, TOKENIZER, 0, "cpu")
    assert bytes(rows.frames[0, 2:28, -1].tolist()).decode() == "oh well now. who is there?" and shift == 13
    assert rows.reading[0, 28:].tolist() == [2, *(2 + r for r in lead.read)] and finger.position == 2 + lead.read[-1] and finger.end == 2 + 26
    s = session(model, codec, GREEDY)
    s.voices[0] = spoken("oh well now.", [2, 3, 5, 6, 8, 9, 11, 12])
    s.prepare(0)
    context, before = s._window(), s._state.length
    assert s._lead(0).text == "oh well now." and s._lead(1) is None
    turn = s.say(0, "who is there?")
    codes, audio = generate_slow(model, codec, TOKENIZER, context, Turn(0, turn.text), 1, GREEDY, lead=s._lead(0))
    assert torch.equal(turn.codes, codes) and turn.num_frames > 1 and turn.readings[:2] == [2, 2] and max(turn.readings) <= 2 + 13
    np.testing.assert_allclose(turn.audio, codec.decode(turn.codes[None])[0, 0].numpy(), atol=1e-4)
    clean = turn_rows(turn, model.cfg, TOKENIZER, 1)
    assert s._state.length == before + clean.S
    fresh = session(model, codec, GREEDY)
    fresh.voices[0] = s.voices[0]
    fresh.prepare(0)
    fresh._put(turn)
    probe = generation.text_rows(TOKENIZER.speak_prefix(1, None), model.cfg, 2)
    with torch.inference_mode():
        torch.testing.assert_close(model(probe, state=s._state), model(probe, state=fresh._state), atol=1e-5, rtol=1e-5)


def test_the_lead_can_be_off_and_is_the_first_thing_said_where_there_is_no_voice(model, codec):
    s = session(model, codec)
    first, second = s.say(0, "a long first turn, my friend."), s.say(0, "and a second one.")
    for turn in (first, second):                                                                    # whatever the random model has read
        turn.codes, turn.readings = torch.zeros(8, 9, dtype=torch.long), [2, 2, 4, 6, 8, 9, 11, 13, 15, 2 + len(turn.text), 2 + len(turn.text)]
    assert s._lead(0).text in first.text and s._lead(1) is None
    s.sampling = dataclasses.replace(SHORT, lead_seconds=0.0)
    assert s._lead(0) is None
    with pytest.raises(ValueError, match="--lead_seconds"):
        SamplingConfig(lead_seconds=-1.0)


def test_without_room_there_is_no_lead(model, codec, monkeypatch):
    """A window that the turn alone fills: the lead is given up, not the turn."""
    used = []
    monkeypatch.setattr(generation, "stream_turn", lambda *a, inner=generation.stream_turn, **k: used.append(a[-1]) or inner(*a, **k))
    for positions, there in ((512, True), (130, False)):
        small = make_model(backbone=dataclasses.replace(model.cfg.backbone, max_positions=positions))
        s = session(small, codec, SamplingConfig(max_seconds=6.0))
        s.voices[0] = spoken("oh well now.", [2, 3, 5, 6, 8, 9, 11, 12])
        s.say(0, "who is it that is there?")
        assert (used[-1] is not None) == there and s.turns[-1].num_frames


def test_a_voice_with_text_is_followed_by_the_finger(model, codec, monkeypatch):
    """Where nobody says how far the voice is in its text, the model's own steps do; a text that is not reached to its end is not believed."""
    codes, step = torch.zeros(8, 6, dtype=torch.long), []
    monkeypatch.setattr(model, "advance_logits", lambda h: torch.nn.functional.one_hot(torch.tensor(step[0]), 13).float())
    for step[:], known in (([2], True), ([1], False)):
        s = session(model, codec)
        s.set_voice(0, codes=codes, text="so it goes.")
        assert s.voices[0].readings == ([2, 2, 4, 6, 8, 10, 12, 13] if known else None)


# ----------------------------------------------------------------------------- rows

def test_rows_of_a_spoken_turn(model):
    cfg = model.cfg
    turn = Turn(3, "hi", "sad", torch.arange(2 * cfg.num_codebooks).view(cfg.num_codebooks, 2), readings=[3, 3, 4, 5])
    rows = turn_rows(turn, cfg, TOKENIZER, 7)
    ids = TOKENIZER.speak_prefix(3, "sad") + [ord("h"), ord("i"), TOKENIZER.eot]
    assert rows.frames[0, :6, -1].tolist() == ids and rows.S == 6 + 3
    assert rows.mask[0, :6].sum() == 6 and rows.mask[0, :6, -1].all() and rows.mask[0, 6:, :-1].all() and not rows.mask[0, 6:, -1].any()
    assert torch.equal(rows.frames[0, 6:8, :-1], turn.codes.T + cfg.code_offset)
    assert not rows.frames[0, 8].any()                         # the end frame
    assert rows.text_index[0].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    assert rows.reading[0].tolist() == [-1] * 5 + [3, 3, 4, 5]
    assert set(rows.turn[0].tolist()) == {7}


def test_rows_of_a_heard_turn(model):
    rows = turn_rows(Turn(0, "no", None, torch.zeros(8, 2, dtype=torch.long), heard=True), model.cfg, TOKENIZER, 0)
    assert rows.frames[0, :3, -1].tolist() == TOKENIZER.listen_prefix(0)
    assert rows.frames[0, 6:, -1].tolist() == [TOKENIZER.transcript, ord("n"), ord("o"), TOKENIZER.eot]
    assert rows.text_index[0].tolist() == [0, 1, 2, -1, -1, -1, 0, 1, 2, 3]
    assert (rows.reading == -1).all()


@pytest.mark.parametrize("heard", [False, True])
def test_rows_are_those_of_training(model, heard):
    import dataset_pipeline
    codes, text, consumed = torch.randint(0, 64, (8, 3), dtype=torch.int16), "oh no.", [2, 2, 6]
    trained = dataset_pipeline.Turn(codes, torch.tensor(consumed), TOKENIZER.encode(text), torch.zeros(0), text, 1, "sad", None)
    expected = dataset_pipeline.turn_rows(trained, model.cfg, TOKENIZER, 1, "sad", heard)
    ours = turn_rows(Turn(1, text, "sad", codes.long(), heard=heard, readings=None if heard else [3, 3, 5, 5, 9]), model.cfg, TOKENIZER, 0)
    for name in ("frames", "mask", "text_index", "reading"):
        assert torch.equal(getattr(ours, name)[0], expected[name]), name


@pytest.mark.parametrize("overrides", [{"cross": dataclasses.replace(model_preset("test").cross, enabled=False)},
                                       {"memory": dataclasses.replace(model_preset("test").memory, enabled=False)},
                                       {"text_head": False}, {"code_offset": 0}])
def test_every_addition_can_be_off(overrides, codec):
    s = session(make_model(**overrides), codec)
    for number in range(4):
        assert s.say(number % 2, "on and on").num_frames > 0
    s.add_turn(1, audio=np.full(4000, 0.1, np.float32))
    assert s.say(0, "and on").end_reason


# ----------------------------------------------------------------------------- ends, always

def test_random_models_end(model, unguided, codec):
    for each in (model, unguided):
        for seed in range(3):
            turn = session(each, codec, SamplingConfig(max_seconds=1.0, seed=seed, temperature=1.0)).say(0, "we will see how long this takes.")
            assert turn.num_frames <= 12 and turn.end_reason and turn.ended == (turn.end_reason in ("eos", "read", "quiet"))


class Script:
    """Stands in for the model: says code 5 in every codebook, ends or moves the finger as told."""

    def __init__(self, model, end_at=None, advance=0):
        self.real, self.cfg, self.end_at, self.advance, self.frames = model, model.cfg, end_at, advance, -1

    def __call__(self, batch, state=None, memory=None):
        self.frames += 1
        return self.real(batch, state=state)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def c0_logits(self, h):
        logits = torch.zeros(1, self.cfg.audio_vocab)
        logits[:, 5] = 5.0
        logits[:, 0] = 9.0 if self.end_at is not None and self.frames >= self.end_at else -9.0
        return logits

    def depth_generate(self, h, c0, pick):
        return c0.expand(1, self.cfg.num_codebooks)

    def advance_logits(self, h):
        return torch.nn.functional.one_hot(torch.tensor([self.advance]), self.cfg.cross.max_advance + 1).float()


def scripted(model, codec, text="one two three four five six seven eight", sampling=GREEDY, **script):
    return Session(Script(model, **script), codec, TOKENIZER, sampling).say(0, text)


def test_no_end_before_the_text_is_read(model, codec):
    text = "one two three four five six seven eight"
    turn = scripted(model, codec, text, end_at=0, advance=2)
    needed = -(-(len(text) - generation.END_GUARD) // 2)       # frames until the finger may let go
    assert (turn.end_reason, turn.num_frames) == ("eos", needed)


def test_end_after_the_finger_waited(model, codec):
    text = "one two three four"
    turn = scripted(model, codec, text, advance=6)
    assert turn.num_frames == len(text) // 6 + generation.END_FRAMES and turn.end_reason == "read" and turn.ended


def test_zero_frames_are_a_turn(unguided, codec):
    turn = scripted(unguided, codec, end_at=0)
    assert turn.codes.shape == (8, 0) and turn.audio.shape == (0,) and turn.first_audio_ms is None and turn.ended


def test_max_seconds_cuts_off(unguided, codec):
    turn = scripted(unguided, codec, sampling=dataclasses.replace(GREEDY, max_seconds=0.8))
    assert (turn.end_reason, turn.num_frames, turn.ended) == ("max_seconds", 10, False)


def test_the_same_frame_again_and_again_ends(unguided, codec):
    turn = scripted(unguided, codec, sampling=dataclasses.replace(GREEDY, max_seconds=30))
    assert turn.end_reason in ("repeat", "quiet") and turn.num_frames <= generation.REPEAT_FRAMES + 1


def test_guards():
    finger, loud, quiet = Finger(0, 10, guided=False), np.ones(4, np.float32), np.zeros(4, np.float32)
    guard = Guard(max_frames=1000, runaway_frames=50)
    assert guard.reason(torch.tensor([1]), loud, 1, finger) == ""
    reasons = [guard.reason(torch.tensor([n]), quiet, n, finger) for n in range(2, 2 + generation.QUIET_FRAMES)]
    assert reasons[:-1] == [""] * (generation.QUIET_FRAMES - 1) and reasons[-1] == "quiet"
    assert guard.reason(torch.tensor([1]), loud, 50, finger) == "runaway"


def test_a_stuck_finger_is_nudged():
    finger = Finger(2, 5)
    for _ in range(generation.STALL_FRAMES * 3):
        finger.move(0)
    assert finger.position == 5 and finger.may_end


# ----------------------------------------------------------------------------- seeds and sessions

def test_same_seed_same_codes_and_other_seed_others(model, codec):
    made = [session(model, codec, SamplingConfig(max_seconds=1.0, seed=seed)).say(0, "again and again").codes for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_sessions_are_independent(model, codec):
    alone = session(model, codec)
    expected = [alone.say(0, "first line").codes, alone.say(1, "second line").codes]
    a, b = session(model, codec), session(model, codec, SamplingConfig(max_seconds=1.0, seed=5))
    b.say(3, "something else entirely")
    first = a.speak(0, "first line")
    next(first)
    other = b.speak(2, "in between")
    for _ in zip(first, other):
        pass
    list(first)
    assert torch.equal(a.turns[0].codes, expected[0]) and torch.equal(a.say(1, "second line").codes, expected[1])


def test_a_turn_not_heard_to_its_end_is_forgotten(model, codec):
    s, clean = session(model, codec, GREEDY), session(model, codec, GREEDY)
    stopped = s.speak(0, "never mind")
    next(stopped)
    del stopped
    assert s.turns == []
    assert torch.equal(s.say(0, "never mind").codes, clean.say(0, "never mind").codes)


def test_context_and_voice_matter(model, codec):
    plain, spoken, voiced = (session(model, codec, GREEDY) for _ in range(3))
    spoken.add_turn(1, "who are you?")
    voiced.set_voice(0, audio=0.1 * np.random.default_rng(0).standard_normal(9600).astype(np.float32))
    codes = [s.say(0, "nobody at all").codes for s in (plain, spoken, voiced)]
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_window_stays_bounded_and_voices_stay(model, codec):
    s = session(model, codec)
    s.set_voice(0, codes=torch.zeros(8, 5, dtype=torch.long), text="a voice", consumed=[1, 2, 3, 5, 7])
    lengths = []
    for number in range(12):
        s.say(number % 2, "hello")
        s.prepare()
        lengths.append(s._state.length)
        assert len(s.voices) + len(s.turns) - s._start <= max(2, model.cfg.memory.window_turns)
    assert max(lengths[4:]) <= max(lengths[:4]) + 20
    assert s._state.visible().turn.shape[1] == min(s._start, model.cfg.memory.max_slots)
    assert s._window().reading[0, :16].max() == 2 + 7           # the recording's own alignment


def test_text_too_long_for_the_positions(model, codec):
    with pytest.raises(ValueError, match="split"):
        session(model, codec).say(0, "word " * 110)
    with pytest.raises(ValueError, match="speakable"):
        session(model, codec).speak(0, "...")
    with pytest.raises(ValueError, match="mood"):
        session(model, codec).speak(0, "hello", "grumpy")


# ----------------------------------------------------------------------------- text

def test_listening_writes_down(model, codec):
    s = session(model, codec, GREEDY)
    turn = s.add_turn(1, audio=np.random.default_rng(1).standard_normal(4800).astype(np.float32) * 0.1)
    assert turn.heard and turn.num_frames == 3 and len(turn.text) <= generation.BYTES_PER_SECOND
    assert s.say(0, "thank you").num_frames > 0


def test_reply_and_scores_leave_the_session_as_it_was(model, codec):
    s, clean = session(model, codec, GREEDY), session(model, codec, GREEDY)
    for each in (s, clean):
        each.add_turn(0, "how are you?")
    reply = s.reply_text(1)
    assert any(c.isalpha() for c in reply) and len(reply) <= generation.REPLY_TOKENS
    scores = s.score_texts(1, ["very well", "zzzz qqqq"])
    assert len(scores) == 2 and scores[0] != scores[1] and max(scores) < 0
    assert torch.equal(s.say(1, "very well").codes, clean.say(1, "very well").codes)


def test_sample():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(500, 4)
    assert sample(logits, 0.0, 50).eq(1).all()
    drawn = sample(logits, 1.0, 2, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}
    assert torch.equal(drawn, sample(logits, 1.0, 2, torch.Generator().manual_seed(0)))


def test_split_text():
    text = "One sentence here. Another one, with a comma in it! And a third?"
    assert split_text(text, 100) == [text]
    assert split_text(text, 30) == ["One sentence here.", "Another one,", "with a comma in it!", "And a third?"]
    pieces = split_text("x" * 95 + " " + "word " * 30, 20)
    assert max(map(len, pieces)) <= 20 and "".join(pieces).replace(" ", "") == "x" * 95 + "word" * 30


def test_retriever_finds_the_fitting_reply():
    turns = [("a", "I burned the rice."), ("b", "Open a window."), ("a", "My cat is ill."), ("b", "Call the vet.")]
    retriever = Retriever([{"kind": "people", "turns": [{"speaker": s, "mood": "calm", "text": t} for s, t in turns]}])
    score, reply, covered = retriever.nearest("the cat looks ill today")[0]
    assert reply["text"] == "Call the vet." and score > 0
    whole, less, least = (retriever.nearest(text)[0].covered for text in ("my cat is ill", "the cat looks ill today", "a cat burned zyzzyvas in Xanadu"))
    assert whole == pytest.approx(1) and less == covered and 1 > less > least > 0
    assert retriever.nearest("xyzzy") == []


def test_a_reply_that_takes_up_what_was_said_before_comes_first():
    pairs = [("What now?", "Paint the fence."), ("What now?", "Feed the rabbit.")]
    retriever = Retriever([{"kind": "people", "turns": [{"speaker": "a", "text": a}, {"speaker": "b", "text": b}]} for a, b in pairs]
                          + [{"kind": "people", "turns": [{"speaker": "a", "text": "The rabbit is hungry, the fence is old."}, {"speaker": "b", "text": "I see the rabbit and the fence."}]}])
    for before, wanted in (("The rabbit is hungry.", "Feed the rabbit."), ("The fence is old.", "Paint the fence.")):
        found = [match.reply["text"] for match in retriever.nearest("What now?", 8, before)]
        assert found[0] == wanted and set(found) >= {b for _, b in pairs}


# ----------------------------------------------------------------------------- the codebooks a model reads

def test_a_model_may_read_few_of_either_side(codec):
    """3 semantic and 2 acoustic ones of 4 + 4: what it hears and what it says go through the same columns."""
    model = make_model(num_codebooks=5, num_semantic=3)
    sound = 0.1 * torch.randn(1, 1, 7680, generator=torch.Generator().manual_seed(1))
    codes = codec.encode(sound)[0]
    assert torch.equal(generation.codes_of_sound(model.cfg, codec, sound), codes[[0, 1, 2, 4, 5]])
    s = session(model, codec)
    s.add_turn(1, "hello.", audio=sound.numpy())
    assert torch.equal(s.turns[0].codes, codes[[0, 1, 2, 4, 5]])
    said = s.say(0, "hello there, friend.")
    assert said.codes.shape[0] == 5
    np.testing.assert_allclose(said.audio, codec.decode(said.codes[None], 3)[0, 0].numpy(), atol=1e-4)


def test_drawn_codes_are_the_frames_that_would_be_said(model, codec):
    hidden = torch.randn(6, model.cfg.backbone.width, generator=torch.Generator().manual_seed(2))
    drawn = generation.draw_codes(model, hidden, TINY_CODEC.codebook_size, GREEDY)
    one = torch.stack([generation.decode_frame(model, h, TINY_CODEC.codebook_size, GREEDY, None, False) for h in hidden])
    assert torch.equal(drawn, one) and (drawn > 0).all()
    first = torch.arange(1, 7)
    given = generation.draw_codes(model, hidden, TINY_CODEC.codebook_size, GREEDY, first=first)
    assert torch.equal(given[:, 0], first) and not torch.equal(given[:, 1:], drawn[:, 1:])


def test_the_voice_right_before_a_turn_is_somebody_elses(model, codec):
    """Whoever opens after the voices has heard the other voice last; prepared for that speaker nothing is filled again."""
    def order(s):
        return s._window().frames[0, :, -1][s._window().text_index[0] == 1].tolist()
    sounds = [0.1 * torch.randn(3840, generator=torch.Generator().manual_seed(n)).numpy() for n in (1, 2)]
    orders = {}
    for speaker in (0, 1):
        s = session(model, codec)
        for who in (0, 1):
            s.set_voice(who, audio=sounds[who], text="hello.")
        s.prepare(speaker)
        state, orders[speaker] = s._state, order(s)
        said = s.say(speaker, "oh no.")
        assert s._state is state and s.turns == [said]
        assert order(s)[:2] == orders[speaker], "later turns keep it"
    assert orders[0] == orders[1][::-1] and len(set(orders[0])) == 2
    late = session(model, codec)
    for who in (0, 1):
        late.set_voice(who, audio=sounds[who], text="hello.")
    late.prepare(0)
    late.say(1, "oh no.")
    assert order(late)[:2] == orders[1], "another speaker than the one prepared for"
