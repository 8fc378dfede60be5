"""From recordings to turns: edges, channels, leaks, voices, overlaps, and the measure of their errors."""
from dataclasses import replace

import numpy as np
import pytest

import segmentation as sg
from segmentation import SegmentationConfig, Span
from people_speech import LINES, conversation, spoken

CFG = SegmentationConfig()
pytest.importorskip("hibari")


def errors(turns, truth):
    return sg.diarisation_error([(a, b, str(c)) for a, b, c, *_ in truth], [(t.start, t.end, t.speaker) for t in turns])


# ----------------------------------------------------------------------------- voice activity

def test_hysteresis_short_sounds_and_short_pauses():
    p = np.zeros(200)
    p[10:40], p[43:60], p[100:102], p[150:200] = 0.9, 0.4, 0.9, 0.8          # a pause of three, a blip, speech to the very end
    spans = sg.spans_of(p, CFG, step=0.032)
    assert [(round(s.start / 0.032), round(s.end / 0.032)) for s in spans] == [(10, 60), (150, 200)]
    assert len(sg.spans_of(p, replace(CFG, min_silence=0.06), step=0.032)) == 2 and sg.spans_of(np.zeros(5), CFG) == []


def test_edges_of_speech_are_found_in_noise():
    part = sg.resample(spoken()[0], 24000, sg.RATE)
    audio = np.random.default_rng(1).normal(0, 3e-4, len(part) + 2 * sg.RATE).astype(np.float32)
    audio[sg.RATE:sg.RATE + len(part)] += part
    spans = sg.find_speech(audio, CFG)
    assert abs(spans[0].start - 1) < 0.06 and abs(spans[-1].end - 1 - len(part) / sg.RATE) < 0.1
    assert sg.find_speech(audio[:sg.RATE // 2], CFG) == [] and sg.find_speech(np.zeros(10, np.float32), CFG) == []


# ----------------------------------------------------------------------------- channels

def test_a_voice_per_channel_keeps_turns_and_overlaps():
    sound, truth = conversation()
    turns, facts = sg.conversation(sound, 24000, CFG)
    assert facts["how"] == "channels" and facts["speakers"] == 2 and len(turns) == len(LINES)
    assert errors(turns, truth)["error"] < 0.03
    assert turns[3].start < turns[2].end and turns[3].speaker != turns[2].speaker       # the overlap that was made
    assert all(abs(t.start - a) < 0.08 and abs(t.end - b) < 0.1 for t, (a, b, *_) in zip(turns, truth))


def test_a_leak_into_the_other_microphone_is_left_out():
    sound, truth = conversation(leak=0.15)
    split = replace(CFG, channels="split")
    turns, facts = sg.conversation(sound, 24000, split)
    assert facts["leak_seconds"] > 2 and errors(turns, truth)["error"] < 0.1
    kept, _ = sg.conversation(sound, 24000, replace(split, leak_margin_db=0.0))
    assert errors(kept, truth)["false_alarm"] > 0.3


def test_microphones_that_hear_the_same_are_mixed():
    sound, truth = conversation()
    together = np.stack([sound.sum(0), 0.5 * sound.sum(0), 0.2 * sound.sum(0)])
    assert not sg.voices_per_channel(together) and not sg.voices_per_channel(np.stack([sound[0], 0 * sound[0]]))
    turns, facts = sg.conversation(together, 24000, CFG)
    assert facts["how"] == "voices" and facts["speakers"] == 2


# ----------------------------------------------------------------------------- voices

def test_voices_of_one_channel_are_told_apart():
    sound, truth = conversation()
    turns, facts = sg.conversation(sound.sum(0, keepdims=True), 24000, CFG)
    found = errors(turns, truth)
    assert facts["how"] == "voices" and facts["speakers"] == 2 and found["error"] < 0.2 and found["confused"] < 0.1
    one, _ = sg.conversation(sound[:1], 24000, CFG)
    assert {t.speaker for t in one} == {"s0"}
    known, facts = sg.conversation(sound.sum(0, keepdims=True), 24000, replace(CFG, speakers=1))
    assert facts["speakers"] == 1 and errors(known, truth)["confused"] > 0.3


def test_cheapest_labels_equal_every_path_tried():
    rng = np.random.default_rng(0)
    for cost in (0.0, 0.3, 5.0):
        scores = rng.random((6, 3))
        paths = np.array(np.meshgrid(*[range(3)] * 6)).reshape(6, -1).T
        worth = scores[np.arange(6), paths].sum(1) - cost * (np.diff(paths, axis=1) != 0).sum(1)
        assert np.array_equal(sg.cheapest_labels(scores, cost), paths[worth.argmax()])


def test_silence_and_tiny_sounds_have_no_turns():
    for sound in (np.zeros((1, 48000), np.float32), np.zeros((2, 100), np.float32), np.ones((1, 3), np.float32)):
        assert sg.conversation(sound, 24000, CFG)[0] == []


# ----------------------------------------------------------------------------- turns

def turns_of(*spans, **changes):
    return [(t.start, t.end, t.speaker) for t in sg.build_turns([(Span(a, b), s, 0) for a, b, s in spans], replace(CFG, **changes))]


def test_pauses_join_and_answers_part():
    assert turns_of((0, 1, "a"), (1.5, 2, "a"), (4, 5, "a")) == [(0, 2, "a"), (4, 5, "a")]
    assert turns_of((0, 1, "a"), (1.1, 1.7, "b"), (1.8, 3, "a")) == [(0, 1, "a"), (1.1, 1.7, "b"), (1.8, 3, "a")]


def test_a_mhm_within_the_others_words_cuts_nothing():
    assert turns_of((0, 3, "a"), (1, 1.3, "b"), (3.4, 5, "a")) == [(0, 5, "a"), (1, 1.3, "b")]
    assert turns_of((0, 3, "a"), (2.5, 4, "b")) == [(0, 3, "a"), (2.5, 4, "b")]


def test_long_turns_are_cut_at_their_longest_pause():
    assert turns_of((0, 20, "a"), (20.2, 30, "a"), (30.9, 45, "a")) == [(0, 30, "a"), (30.9, 45, "a")]
    assert turns_of((0, 45, "a")) == [(0, 45, "a")]


# ----------------------------------------------------------------------------- errors, words, settings

def test_diarisation_error_by_hand():
    truth = [(0, 4, "x"), (4, 10, "y")]
    assert sg.diarisation_error(truth, truth)["error"] == 0
    assert sg.diarisation_error(truth, [(0, 4, 1), (4, 10, 0)]) == sg.diarisation_error(truth, [(0, 4, 0), (4, 10, 1)])
    found = sg.diarisation_error(truth, [(0, 5, "a"), (5, 9, "b"), (10, 11, "b")])        # one second confused, one missed, one false
    assert found == pytest.approx({"error": 0.3, "missed": 0.1, "false_alarm": 0.1, "confused": 0.1})
    both = sg.diarisation_error([(0, 2, "x"), (0, 2, "y")], [(0, 2, "a")])
    assert both == pytest.approx({"error": 0.5, "missed": 0.5, "false_alarm": 0, "confused": 0})
    assert sg.diarisation_error([], [])["error"] == 0


def test_words_have_times_and_shares():
    heard = [("Good", 0.1, 0.3), ("moaning,", 0.3, 0.7), ("my", 0.8, 0.9), ("friend.", 0.9, 1.4)]
    assert sg.words_shared("good morning, my friend.", heard) == 0.75 and sg.words_shared("other", []) == 0
    assert [w[2:] for w in sg.word_times("good morning, my friend.", heard)] == [[0.1, 0.3], [0.8, 0.9], [0.9, 1.4]]


def test_the_recogniser_is_sure_of_speech_and_not_of_noise():
    heard = sg.listen(spoken()[0], 24000)
    assert sg.words_shared(LINES[0].lower(), heard.words) > 0.8 and 0.5 < heard.confidence <= 1
    assert all(a <= b for _, a, b in heard.words) and heard.words[-1][2] < len(spoken()[0]) / 24000 + 0.3
    assert sg.listen(np.zeros(24000, np.float32), 24000) == sg.Heard("", [], 0.0, 1.0)


@pytest.mark.parametrize("wrong", [{"channels": "left"}, {"speakers": 9}, {"vad_threshold": 0}, {"max_turn": 0.5}])
def test_wrong_settings_name_their_flag(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
        SegmentationConfig(**wrong)
