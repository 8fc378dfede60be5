"""Text written quickly is the text of the slow path: token by token, with right and wrong guesses, while the state goes on, in pieces."""
import copy
import dataclasses

import pytest
import torch

import writing
from architecture import CSM
from config import CodecConfig, SamplingConfig, model_preset
from generation import Session, generate_text, sentences, settled, stream_text
from rvq_tokenizer import Codec
from speculative import Tally
from text_tokenizer import ByteTokenizer, sentence_case
from turns import text_rows
from writing import Earlier, TextStep, write

TINY_CODEC = CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                         latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)
GREEDY = SamplingConfig(temperature=0.0, depth_temperature=0.0, text_temperature=0.0, max_seconds=1.0)
TOKENIZER = ByteTokenizer()
PREFIX = TOKENIZER.speak_prefix(1)
SEED = 8                                # of a text that does not end at once


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return Codec(TINY_CODEC).eval()


def make_model(**overrides):
    torch.manual_seed(0)
    model = CSM(model_preset("test", **overrides))
    model.init_weights(open_gates=True)
    return model.eval()


KINDS = {"all of it": {}, "a short window for text": {"cross.text_window": 8}, "no cross-attention": {"cross.enabled": False}, "no memory": {"memory.enabled": False}}


def kind(name):
    cfg = model_preset("test")
    changed = {}
    for key, value in KINDS[name].items():
        part, field = key.split(".")
        changed[part] = dataclasses.replace(getattr(cfg, part), **{field: value})
    return make_model(**changed)


@pytest.fixture(scope="module")
def model():
    return make_model()


def talk(model, codec, turns=4, sampling=GREEDY):
    """Turns spoken and heard; the window of this preset holds two, so that there are memory slots."""
    session = Session(model, codec, TOKENIZER, sampling)
    for number in range(turns):
        session.say(number % 2, f"turn number {number}.")
    session.add_turn(0, "and you?", codes=torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(1)))
    session.prepare()
    return session


# ----------------------------------------------------------------------------- a step

@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("turns", [0, 4])
def test_hidden_states_are_the_models(name, turns, codec):
    model = kind(name)
    session = talk(model, codec, turns)
    ids, state = [*PREFIX, *b"very well, thank you."], copy.copy(session._state)
    assert turns == 0 or state.visible() is not None or name == "no memory"
    with torch.inference_mode():
        want = model(text_rows(ids, model.cfg, session._number), state=state)[0]
    step = TextStep(model, session._state, session._number, 40)
    got = torch.cat([step(ids[:3]), step(ids[3:4]), step(ids[4:])])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    step.length = 5
    step([*b"zz"])
    step.length = 5
    torch.testing.assert_close(step(ids[5:]), want[5:], atol=1e-4, rtol=1e-4)


def test_a_session_without_turns(model, codec):
    session = Session(model, codec, TOKENIZER, GREEDY)
    session.prepare()
    with torch.inference_mode():
        want = model(text_rows(PREFIX, model.cfg, 0), state=model.new_state(1))[0]
    torch.testing.assert_close(TextStep(model, session._state, 0, 9)(PREFIX), want, atol=1e-4, rtol=1e-4)


def test_states_that_do_not_fit(model):
    with pytest.raises(ValueError, match="positions"):
        TextStep(model, model.new_state(1, 8), 0, 9)
    with pytest.raises(ValueError, match="padding"):
        TextStep(model, model.new_state(2, 20), 0, 9)


# ----------------------------------------------------------------------------- writing

def slowly(session, temperature, most=40):
    return generate_text(session.model, TOKENIZER, copy.copy(session._state), PREFIX, session._number, most, temperature, torch.Generator().manual_seed(SEED))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guess", ["none", "right", "half right", "shifted", "wrong", "too long"])
def test_the_text_is_the_slow_ones_whatever_is_guessed(model, codec, temperature, guess):
    session = talk(model, codec)
    want = slowly(session, temperature)
    drafts = {"none": None, "right": Earlier(want), "half right": Earlier([*want[:9], *b"something else"]), "shifted": Earlier([*want[:3], 97, 98, *want[4:]]),
              "wrong": lambda out: list(b"wrong"), "too long": lambda out: (want + [TOKENIZER.eot] * 50)[len(out):]}[guess]
    looked, tally = [], Tally()
    hook = model.text_head.register_forward_pre_hook(lambda module, given: looked.append(len(given[0])))
    step = TextStep(model, session._state, session._number, 60)
    assert list(write(step, TOKENIZER, PREFIX, 40, temperature, torch.Generator().manual_seed(SEED), drafts, tally)) == want and len(want) > 20
    hook.remove()
    assert tally.passes == len(looked) and (guess not in ("right", "shifted") or len(looked) < len(want) / 2), "guesses save passes"


def test_a_guess_is_taken_up_again_after_a_difference():
    earlier = Earlier(list(b"the state of the art"), lambda out: list(b"?"))
    assert bytes(earlier(list(b"the st"))) == b"ate of the art" and bytes(earlier(list(b"a state of"))) == b" the art"
    assert bytes(earlier(list(b"zebra"))) == b"?" and Earlier([])([]) == []


def test_the_state_may_go_on_while_a_text_is_written(model, codec):
    """The rest of a reply is written after its first sentence was spoken into the same state."""
    session = talk(model, codec)
    want, text = slowly(session, 0.0), stream_text(model, TOKENIZER, session._state, PREFIX, session._number, 40, 0.0)
    begun = [next(text) for _ in range(5)]
    session.say(1, "something else.")
    session.prepare()
    assert begun + list(text) == want


# ----------------------------------------------------------------------------- replies

def words_of(monkeypatch, ids):
    """As if the text head wrote these letters."""
    monkeypatch.setattr(writing, "choose", lambda logits, temperature, luck, first: [*ids, TOKENIZER.eot][first:first + len(logits)])


@pytest.mark.parametrize("text", ["well, i see. it is i. and that is it! is it? yes", "no end", "i. am. here and there. i", "?!"])
def test_sentence_by_sentence_is_the_whole_reply(model, codec, monkeypatch, text):
    session = talk(model, codec)
    words_of(monkeypatch, text.encode())
    if text == "?!":
        with pytest.raises(ValueError, match="nothing speakable"):
            list(session.reply_stream(1))
        return
    pieces = list(session.reply_stream(1))
    assert "".join(pieces) == sentence_case(text) == session.reply_text(1) and len(pieces) > 3
    assert " ".join(part for part, _ in sentences(session.reply_stream(1))) == sentence_case(text)


def test_a_greedy_reply_in_pieces_is_the_slow_paths(model, codec):
    session = talk(model, codec)
    want = TOKENIZER.decode(slowly(session, 0.0, 160))
    assert "".join(session.reply_stream(1)) == want


def test_nothing_is_written_beyond_the_first_sentence_before_it_is_taken(model, codec, monkeypatch):
    session, text = talk(model, codec), "this is the first one. and this the second, which is long."
    words_of(monkeypatch, text.encode())
    passes = []
    hook = model.text_head.register_forward_pre_hook(lambda module, given: passes.append(1))
    parts = sentences(session.reply_stream(1))
    assert next(parts)[0] == "This is the first one." and len(passes) == len("this is the first one. a")
    session.say(1, "this is the first one.")
    assert next(parts)[0] == "And this the second, which is long." and len(passes) == len(text) + 1
    hook.remove()


def test_what_is_settled_does_not_change():
    for text in ("i think i am. is it i? it is", "i", "so i", "so it"):
        shown = [settled(sentence_case(text[:n])) for n in range(len(text) + 1)]
        assert all(sentence_case(text).startswith(s) for s in shown)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rehearsed_reply_is_the_same_and_quicker(model, codec, temperature):
    """Rehearsed in the same context it needs few passes, in another one it is what it would have been."""
    sampling = SamplingConfig(temperature=0.0, depth_temperature=0.0, text_temperature=temperature, max_seconds=1.0)
    plain, same, other = (talk(model, codec, sampling=sampling) for _ in range(3))
    want, passes = plain.reply_text(1), []
    for _ in same.rehearse(same._state, same._number, 1):
        pass
    for _ in other.rehearse(talk(model, codec, 0)._state, 1, 1):
        pass
    rehearsed = len(same._rehearsed)
    hook = model.text_head.register_forward_pre_hook(lambda module, given: passes.append(1))
    assert same.reply_text(1) == want and rehearsed > 11 and len(passes) <= len(want) + 1 - rehearsed // 2
    hook.remove()
    assert other.reply_text(1) == want and not other._rehearsed
