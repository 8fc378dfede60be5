"""A sample said in another mood has its level, range, loudness and pace, and the model hears it before a turn in that mood."""
import dataclasses

import numpy as np
import pytest
import torch

import generation
import moods
from architecture import CSM
from config import MOODS, CodecConfig, SamplingConfig, model_preset
from generation import Session, Turn, generate_slow
from rvq_tokenizer import Codec
from text_tokenizer import ByteTokenizer

pyworld = pytest.importorskip("pyworld")
GREEDY = SamplingConfig(temperature=0.0, depth_temperature=0.0, max_seconds=1.0, mood_strength=1.0)
RATE = 24000


@pytest.fixture(scope="module")
def voice():
    """Two seconds of a vowel-like tone around 150 Hz that moves by three semitones up and down."""
    time = np.arange(2 * RATE) / RATE
    f0 = 150 * 2 ** (3 / 12 * np.sin(2 * np.pi * 1.5 * time))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 20))).astype(np.float32)


def heard(audio):
    """(median pitch in semitones, spread of the pitch in semitones, dB, seconds)"""
    f0 = moods.analysed(audio).f0
    tone = 12 * np.log2(f0[f0 > 0])
    return np.median(tone), tone.std(), 10 * np.log10(np.mean(audio ** 2)), len(audio) / RATE


def test_every_mood_has_its_sound():
    assert set(moods.MOOD_PROSODY) == set(MOODS)
    assert moods.shift("neutral") == (0, 0, 0, 0) and moods.shift("sad", "sad", 2.0) == (0, 0, 0, 0)
    assert moods.shift("happy", "sad") == pytest.approx(np.subtract(moods.MOOD_PROSODY["happy"], moods.MOOD_PROSODY["sad"]))
    assert moods.shift("angry", None, 2.0) == pytest.approx(2 * np.array(moods.MOOD_PROSODY["angry"]))


@pytest.mark.parametrize("change", [(2.0, 0.0, 0.0, 0.0), (-2.0, 0.0, 0.0, 0.0), (0.0, 0.3, 0.0, 0.0), (0.0, -0.3, 0.0, 0.0), (0.0, 0.0, -4.0, 0.0), (0.0, 0.0, 0.0, 0.2), (1.0, -0.2, 3.0, -0.1)])
def test_a_sample_changes_as_told(voice, change):
    sample = moods.analysed(voice)
    plain, changed = heard(moods.in_mood(sample, (0, 0, 0, 0))), heard(moods.in_mood(sample, change))
    level, wider, loudness, pace = change
    assert changed[0] - plain[0] == pytest.approx(level, abs=0.15)
    assert np.log(changed[1] / plain[1]) == pytest.approx(wider, abs=0.05)
    assert changed[2] - plain[2] == pytest.approx(loudness, abs=0.7)
    assert np.log(plain[3] / changed[3]) == pytest.approx(pace, abs=0.01)


def test_what_has_no_voice_is_not_taken_apart(voice, monkeypatch):
    assert moods.analysed(np.zeros(RATE, np.float32)) is None
    assert moods.analysed(np.random.default_rng(0).normal(0, 0.1, RATE)) is None
    assert np.abs(moods.in_mood(moods.analysed(voice), (0, 0, 40.0, 0))).max() <= 0.97             # never over full scale
    monkeypatch.setitem(__import__("sys").modules, "pyworld", None)                                # not installed
    assert moods.analysed(voice) is None


# ----------------------------------------------------------------------------- in a session

TINY_CODEC = CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                         latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)


@pytest.fixture
def session(voice, monkeypatch):
    """A speaker whose voice is "oh well now." in eight frames, which the codec is said to decode to a voice."""
    torch.manual_seed(0)
    model, codec = CSM(model_preset("test")), Codec(TINY_CODEC).eval()
    model.init_weights(open_gates=True)
    taken = []
    monkeypatch.setattr(generation, "sound_of_codes", lambda cfg, codec, codes: taken.append(codes) or torch.from_numpy(voice[:8 * 1920]))
    made = Session(model.eval(), codec, ByteTokenizer(), GREEDY)
    made.voices[0] = said()
    made.taken = taken
    return made


def said(mood=None):
    return Turn(0, "oh well now.", mood, torch.arange(64).view(8, 8), readings=[2, 2, 4, 5, 7, 8, 10, 11, 13, 14])


def test_the_lead_is_said_in_the_mood_of_the_turn(session, voice):
    plain, sad = session._lead(0), session._lead(0, "sad")
    expected = session._codes(moods.in_mood(moods.analysed(voice[:8 * 1920]), moods.shift("sad")), None)
    assert torch.equal(sad.codes, expected) and not torch.equal(sad.codes[:, :8], plain.codes)
    assert sad.text == plain.text and sad.num_frames == sad.codes.shape[1] > plain.num_frames       # a sad voice is slower
    assert sad.read[0] == plain.read[0] and sad.read == sorted(sad.read) and set(sad.read) == set(plain.read)
    assert torch.equal(session.taken[0], plain.codes)


def test_what_needs_no_change_is_left_alone(session):
    plain = session._lead(0)
    for lead in (session._lead(0, None), session._lead(0, "neutral")):
        assert torch.equal(lead.codes, plain.codes)
    session.voices[0] = said("sad")
    assert torch.equal(session._lead(0, "sad").codes, plain.codes) and not session.taken
    assert not torch.equal(session._lead(0, "neutral").codes[:, :8], plain.codes)                   # from sad to neutral is a change
    session.sampling = dataclasses.replace(GREEDY, mood_strength=0.0)
    assert torch.equal(session._lead(0, "happy").codes, plain.codes)
    with pytest.raises(ValueError, match="--mood_strength"):
        SamplingConfig(mood_strength=4.0)


def test_it_is_made_once(session):
    """make_moods() does it beforehand, the usual moods first; another voice is another matter."""
    session.prepare(0)
    assert not session.taken                                                                        # whoever speaks without a mood does not wait
    session.make_moods(0, 2)
    assert [mood for mood, *_ in session._known(0, session.voices[0])] == list(moods.USUAL[:2]) and len(session.taken) == 1
    first = session._lead(0, moods.USUAL[0])
    assert session._lead(0, moods.USUAL[0]) is first and session._lead(0, "angry") is not first and len(session.taken) == 1
    session.make_moods(0)
    assert {*moods.USUAL, moods.NEUTRAL} == set(MOODS) and len(session._known(0, session.voices[0])) == 7
    assert session._sample is None and len(session.taken) == 1                                      # megabytes, of no more use
    session.voices[0] = said()
    assert session._lead(0, "happy") is not first and len(session.taken) == 2
    session.rest()
    assert not session._moods and session._sample is None


def test_a_voice_of_many_sessions_is_made_once(session):
    shared: dict = {}
    first, second = (Session(session.model, session.codec, session.tokenizer, GREEDY) for _ in range(2))
    for one in (first, second):
        one.set_voice(0, codes=said().codes, text="oh well now.", consumed=[2, 3, 5, 6, 8, 9, 11, 12], moods=shared)
    lead = first._lead(0, "sad")
    assert second._lead(0, "sad") is lead and len(session.taken) == 1 and not any(isinstance(made, moods.Sample) for made in shared.values())
    second.rest()
    assert second._lead(0, "sad") is lead
    second.sampling = dataclasses.replace(GREEDY, mood_strength=2.0)
    assert second._lead(0, "sad") is not lead and len(session.taken) == 2                           # said again
    second.set_voice(0, codes=said().codes, text="oh well now.", consumed=[2, 3, 5, 6, 8, 9, 11, 12])
    assert second._lead(0, "sad") is not lead and first._lead(0, "sad") is lead


def test_without_a_voice_in_it_the_lead_stays(session, monkeypatch):
    monkeypatch.setattr(generation, "analysed", lambda audio: None)
    assert torch.equal(session._lead(0, "happy").codes, session._lead(0).codes)


def test_a_turn_in_a_mood_equals_the_slow_one(session):
    session.prepare(0)
    context, lead = session._window(), session._lead(0, "happy")
    turn = session.say(0, "who is there?", "happy")
    for heard_first, same in ((lead, True), (session._lead(0), False)):
        codes, _ = generate_slow(session.model, session.codec, session.tokenizer, context, Turn(0, turn.text, "happy"), 1, GREEDY, lead=heard_first)
        assert torch.equal(turn.codes, codes) is same
