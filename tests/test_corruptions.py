"""corruptions.py: each one spoils what it names, and leaves the rest."""
import numpy as np
import pytest

import corruptions
from dialogue import RATE, Dialogue, Turn, placed

pytest.importorskip("pyworld")


def voice(seconds=1.2, low=120.0, high=180.0, seed=0):
    """A buzz whose pitch goes from low to high Hz and back, (N,)."""
    n = int(seconds * RATE)
    pitch = low + (high - low) * np.sin(np.pi * np.arange(n) / n) ** 2
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = sum(np.sin(k * phase) / k for k in range(1, 12))
    return (0.1 * sound + 1e-4 * np.random.default_rng(seed).normal(size=n)).astype(np.float32)


@pytest.fixture(scope="module")
def talk():
    moods = ["sad", "happy", "excited", "calm", "happy", "sad"]
    sounds = [voice(1.0 + 0.1 * i, 110 if i % 2 else 190, 150 if i % 2 else 260, i) for i in range(6)]
    turns, clock = [], 0.0
    for i, (mood, sound) in enumerate(zip(moods, sounds)):
        turns.append(Turn("ab"[i % 2], f"this is turn number {i}.", sound, clock, mood, {"mood_strength": 1.0}))
        clock += len(sound) / RATE + 0.1 * (1 + i % 3)
    return Dialogue("t", tuple(turns))


def spoil(talk, kind, seed=0):
    return corruptions.CORRUPTIONS[kind](talk, np.random.default_rng(seed))


def gaps(talk):
    turns = placed(talk).turns
    return np.array([b.start - a.start - a.seconds for a, b in zip(turns, turns[1:])])


def pitch(audio):
    f0 = corruptions.analyse(audio)[0]
    return 12 * np.log2(f0[f0 > 0])


@pytest.mark.parametrize("kind", corruptions.CORRUPTIONS)
def test_the_same_seed_spoils_the_same_way_and_the_natural_one_is_kept(talk, kind):
    before = [(t.speaker, t.text, t.start, t.audio.copy()) for t in talk.turns]
    a, b = spoil(talk, kind), spoil(talk, kind)
    assert len(a.turns) == len(talk.turns)
    assert all(np.array_equal(x.audio, y.audio) and x.start == y.start and x.text == y.text for x, y in zip(a.turns, b.turns))
    assert all(np.array_equal(t.audio, old[3]) and (t.speaker, t.text, t.start) == old[:3] for t, old in zip(talk.turns, before))
    changed = any(not np.array_equal(x.audio, y.audio) or (x.speaker, x.text, x.start) != (y.speaker, y.text, y.start) for x, y in zip(a.turns, talk.turns))
    assert changed and all(np.isfinite(t.audio).all() and t.audio.dtype == np.float32 for t in a.turns)


@pytest.mark.parametrize("kind", corruptions.CORRUPTIONS)
@pytest.mark.parametrize("case", ["one turn", "silent", "tiny", "untimed", "three speakers"])
def test_odd_conversations_survive(talk, kind, case):
    turns = {"one turn": talk.turns[:1], "silent": [Turn("ab"[i % 2], "hush.", np.zeros(9000, np.float32), i, "sad") for i in range(3)],
             "tiny": [Turn("ab"[i % 2], "ah.", voice(0.05), i, "sad") for i in range(3)],
             "untimed": [Turn(t.speaker, t.text, t.audio) for t in talk.turns[:2]],
             "three speakers": [Turn("abc"[i], t.text, t.audio, t.start, t.mood) for i, t in enumerate(talk.turns[:3])]}[case]
    assert len(spoil(Dialogue("x", tuple(turns)), kind).turns) == len(turns)


@pytest.mark.parametrize("kind", ["vocoded", "noise", "pieces", "flat pitch", "exchanged pitch", "uneven pace", "voice changes", "swapped moods", "drifting voice"])
def test_what_is_done_to_sounds_keeps_words_names_and_gaps(talk, kind):
    worse = spoil(talk, kind)
    assert [(t.speaker, t.text, t.mood) for t in worse.turns] == [(t.speaker, t.text, t.mood) for t in talk.turns]
    assert np.allclose(gaps(worse), gaps(talk), atol=1e-6)


def test_flat_pitch_is_one_note_at_the_same_level(talk):
    for old, new in zip(talk.turns, spoil(talk, "flat pitch").turns):
        assert pitch(new.audio)[20:-20].std() < 0.3 < 1.5 < pitch(old.audio)[20:-20].std()         # the tracker errs at the ends
        assert abs(np.median(pitch(new.audio)) - np.median(pitch(old.audio))) < 0.7


def test_reshape_does_what_it_says(talk):
    sound = talk.turns[0].audio
    up = corruptions.reshape(sound, semitones=4.0)
    assert abs(np.median(pitch(up)) - np.median(pitch(sound)) - 4) < 0.5
    assert abs(len(corruptions.reshape(sound, pace=1.25)) / len(sound) - 0.8) < 0.02
    louder = corruptions.reshape(sound, decibels=-6.0)
    assert abs(20 * np.log10(corruptions._rms(louder) / corruptions._rms(sound)) + 6) < 0.3

    def centre(audio):
        power = np.abs(np.fft.rfft(audio)) ** 2
        return float((power * np.arange(len(power))).sum() / power.sum()) / len(audio)
    assert centre(corruptions.reshape(sound, tract=1.2)) > 1.05 * centre(corruptions.reshape(sound))


def test_exchanged_pitch_keeps_level_and_changes_the_line():
    """A rising and a falling turn change melodies."""
    rise, fall = voice(1.2, 120, 120), voice(1.2, 120, 120)
    n = len(rise)
    for sound, line in ((rise, np.linspace(100, 200, n)), (fall, np.linspace(200, 100, n))):
        phase = 2 * np.pi * np.cumsum(line) / RATE
        sound[:] = 0.1 * sum(np.sin(k * phase) / k for k in range(1, 12))
    talk = Dialogue("x", (Turn("a", "up.", rise, 0.0), Turn("b", "down.", fall, 2.0)))
    new = spoil(talk, "exchanged pitch")
    slopes = [np.polyfit(np.arange(len(p)), p, 1)[0] for p in (pitch(t.audio) for t in (*talk.turns, *new.turns))]
    assert slopes[0] > 0 > slopes[1] and slopes[2] < 0 < slopes[3]


def test_swapped_moods_go_where_the_other_mood_is():
    """A sad and an excited turn of one speaker: the sad one rises by 3.3 semitones and gets louder."""
    turns = [Turn("a", "one.", voice(), 0.0, "sad", {"mood_strength": 1.0}), Turn("a", "two.", voice(seed=1), 2.0, "excited", {"mood_strength": 1.0})]
    new = spoil(Dialogue("x", tuple(turns)), "swapped moods").turns
    moved = [np.median(pitch(b.audio)) - np.median(pitch(a.audio)) for a, b in zip(turns, new)]
    assert abs(moved[0] - 3.3) < 0.6 and abs(moved[1] + 3.3) < 0.6
    assert corruptions._rms(new[0].audio) > 1.5 * corruptions._rms(turns[0].audio)


def test_noise_has_the_level_it_names(talk):
    old, new = talk.turns[2].audio, spoil(talk, "noise").turns[2].audio
    assert abs(20 * np.log10(corruptions._rms(old) / corruptions._rms(new - old)) - 5) < 0.3


def test_gaps_are_stretched_and_turns_rushed(talk):
    longer, shorter = gaps(spoil(talk, "stretched gaps")) - gaps(talk), gaps(spoil(talk, "rushed turns")) - gaps(talk)
    assert (longer >= 0.5 - 1e-6).all() and (longer <= 1.5 + 1e-6).all() and longer.std() > 0
    assert (shorter <= -0.5 + 1e-6).all() and (shorter >= -1.0 - 1e-6).all()


def test_shuffling_moves_whole_turns_of_a_speaker_and_keeps_gaps(talk):
    new = spoil(talk, "shuffled turns", 3)
    assert [t.speaker for t in new.turns] == [t.speaker for t in talk.turns]
    assert sorted((t.speaker, t.text, t.mood) for t in new.turns) == sorted((t.speaker, t.text, t.mood) for t in talk.turns)
    assert [t.text for t in new.turns] != [t.text for t in talk.turns] and np.allclose(gaps(new), gaps(talk))
    assert all(np.array_equal(t.audio, next(o.audio for o in talk.turns if o.text == t.text)) for t in new.turns)


def test_speakers_change_names_half_way(talk):
    assert [t.speaker for t in spoil(talk, "swapped speakers").turns] == list("aba") + list("aba")


def test_voices_drift_more_and_more(talk):
    new = spoil(talk, "drifting voice")
    for speaker in "ab":
        moved = [abs(np.median(pitch(new.turns[i].audio)) - np.median(pitch(talk.turns[i].audio))) for i in talk.of(speaker)]
        assert moved[0] < 0.1 and moved[0] < moved[1] < moved[2] and moved[2] > 4


def test_wrong_words_are_the_words_of_another_turn(talk):
    new = spoil(talk, "wrong words")
    assert all(a.text != b.text for a, b in zip(talk.turns, new.turns)) and {t.text for t in new.turns} == {t.text for t in talk.turns}


def test_without_the_vocoder_one_line_says_what_to_install(talk, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "pyworld", None)
    with pytest.raises(ValueError, match="setup_environment"):
        spoil(talk, "vocoded")
