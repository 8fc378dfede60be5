"""Scores of conversations, turn-taking and prosody: known answers, orders that must hold, and nothing that is not a number."""
import json
import math

import numpy as np
import pytest

import conversation_metrics as metrics
import prosody
import turn_taking as timing
from dialogue import RATE, Dialogue, Turn, from_results, mixed, placed


def tone(seconds, level=0.1):
    return (level * np.sin(2 * np.pi * 150 * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def quiet(seconds):
    return np.zeros(int(seconds * RATE), np.float32)


# ----------------------------------------------------------------------------- turn-taking

def test_speech_segments_are_where_the_sound_is_and_short_gaps_do_not_part_them():
    audio = np.concatenate([quiet(0.3), tone(0.5), quiet(0.1), tone(0.4), quiet(0.5), tone(0.3), quiet(0.2)])
    found = timing.speech_segments(audio, RATE)
    assert np.allclose(found, [(0.3, 1.3), (1.8, 2.1)], atol=0.03)
    assert timing.speech_segments(quiet(1), RATE) == [] and timing.speech_segments(np.zeros(0), RATE) == []


def test_speech_is_found_above_noise():
    rng = np.random.default_rng(0)
    audio = np.concatenate([quiet(0.5), tone(1.0), quiet(0.5)]) + rng.normal(0, 0.005, 2 * RATE)
    assert np.allclose(timing.speech_segments(audio, RATE), [(0.5, 1.5)], atol=0.03)


def test_offsets_are_counted_at_changes_of_speaker_only():
    turns = [("a", 0.0, 1.0), ("b", 1.2, 2.0), ("b", 2.5, 3.0), ("a", 2.9, 4.0)]
    assert np.allclose(timing.floor_transfers(turns), [0.2, -0.1])


def test_the_human_distribution_is_the_published_one():
    """Median 0.2 s, 30 % overlaps; its overlaps last about as long as the paper says (0.205 s in the median, 0.275 s in the mean)."""
    x = timing.human_offsets(100_000)
    assert abs(np.median(x) - 0.2) < 1e-3 and abs(np.mean(x < 0) - 0.30) < 1e-3
    assert abs(np.median(-x[x < 0]) - 0.205) < 0.01 and abs(np.mean(-x[x < 0]) - 0.275) < 0.01
    assert np.allclose(timing.human_share_below(x[::1000]), (np.arange(100_000)[::1000] + 0.5) / 100_000)


def test_distance_to_people_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(0).normal(0.6, 0.4, 37)
    assert abs(timing.distance_to_human(x) - stats.wasserstein_distance(x, timing.human_offsets(4000))) < 0.02


def test_flow_is_one_for_people_and_falls_with_delay_and_with_haste():
    people = timing.human_offsets(12).tolist()
    late, early = ([o + d for o in people] for d in (0.8, -0.8))
    assert timing.flow_score(people) > 0.99 and timing.flow_score(late) < 0.2 and timing.flow_score(early) < 0.2
    assert timing.flow_score([o + 0.3 for o in people]) > timing.flow_score([o + 0.6 for o in people])
    assert timing.flow_score(people[:2]) is None
    share = np.random.default_rng(1).uniform(0.001, 0.999, (200, 8))
    drawn = [timing.flow_score(list(0.2 + timing.SCALE * np.log(row / (1 - row)))) for row in share]
    assert np.median(drawn) > 0.9                     # few offsets are not held against a human talker


def test_turn_ends_oracle_silent_and_always_talking():
    ends, holds = [2.0, 5.0, 9.0], [(1.0, 1.4), (7.0, 7.6)]
    oracle = timing.match_ends(ends, ends, holds)
    assert oracle["recall"] == 1 and oracle["false_positive_rate"] == 0 and oracle["latency_ms"]["p50"] == 0
    silent = timing.match_ends([], ends, holds)
    assert silent["recall"] == 0 and silent["false_positive_rate"] == 0 and silent["latency_ms"]["p50"] is None
    talker = timing.match_ends(list(np.arange(0, 10, 0.1)), ends, holds)
    assert talker["recall"] == 1 and talker["false_positive_rate"] == 1
    assert timing.match_ends([], [], [])["recall"] is None


@pytest.mark.parametrize("fired, nexts, hits", [([1.74], None, 0), ([1.76], None, 1), ([4.9], None, 1), ([5.1], None, 0), ([3.1], [3.0], 0), ([2.1, 2.2], None, 1)])
def test_the_window_of_a_match(fired, nexts, hits):
    assert timing.match_ends(fired, [2.0], [], nexts)["recall"] == hits


def test_one_decision_matches_one_end():
    assert timing.match_ends([2.2], [2.0, 2.1], [])["recall"] == 0.5


def test_the_silence_endpointer_waits_as_long_as_it_says():
    audio = np.concatenate([tone(1.0), quiet(0.3), tone(0.5), quiet(1.0)])
    assert np.allclose(timing.silence_endpointer(audio, RATE, 0.5), [2.3], atol=0.05)
    assert np.allclose(timing.silence_endpointer(audio, RATE, 0.2), [1.2, 2.0], atol=0.05)


def test_listeners_whose_place_is_known():
    """A turn with a pause of 0.4 s: a short wait is fast and falls for the pause, a long one is slow and does not."""
    audio = np.concatenate([tone(1.0), quiet(0.4), tone(0.6), quiet(2.0), tone(1.0), quiet(2.0)])
    found = timing.endpointers([(audio, [(0.0, 2.0), (4.0, 5.0)])] * 2, RATE)
    assert [found[k]["recall"] for k in ("oracle", "never", "always", "0.2 s of silence", "0.8 s of silence")] == [1, 0, 1, 1, 1]
    assert [found[k]["false_positive_rate"] for k in ("oracle", "never", "always", "0.2 s of silence", "0.8 s of silence")] == [0, 0, 1, 1, 0]
    assert abs(found["0.8 s of silence"]["latency_ms"]["p50"] - 800) < 40 and found["oracle"]["ends"] == 4 and found["oracle"]["holds"] == 2


def test_floor_statistics_of_a_minute():
    found = timing.floor_statistics({"a": [(0.0, 10.0), (12.0, 20.0)], "b": [(19.0, 30.0), (31.0, 40.0)], "c": [(45.0, 50.0)]}, 60.0)
    assert found["pause"] == {"per_minute": 2, "seconds_per_minute": 3.0}
    assert found["gap"] == {"per_minute": 1, "seconds_per_minute": 5.0}
    assert found["overlap"] == {"per_minute": 1, "seconds_per_minute": 1.0}
    assert found["ipu"]["per_minute"] == 5


# ----------------------------------------------------------------------------- prosody

def line(pitch, speech=None, seed=0, cepstra=None):
    """A Line with this pitch (T,), and cepstra that change all the time, so that frames can be told apart."""
    pitch = np.asarray(pitch, dtype=np.float64)
    count = len(pitch)
    if cepstra is None:
        rng = np.random.default_rng(seed)
        cepstra = np.cumsum(rng.normal(size=(prosody.BANDS, count)), 1)
    return prosody.Line(pitch, np.full(count, -20.0), np.ones(count, bool) if speech is None else speech, cepstra, -5.0)


def melody(count=200):
    return 150 * 2 ** (3 * np.sin(np.linspace(0, 9, count)) / 12)


def stretched(one, take):
    return prosody.Line(one.f0[take], one.level[take], one.speech[take], one.cepstra[:, take], one.tilt)


def test_melody_agreement_knows_the_same_the_higher_the_flat_and_the_upside_down():
    natural = line(melody())
    path = prosody.align(natural, natural)

    def agreement(pitch):
        return prosody.melody_agreement(line(pitch), natural, path)
    assert agreement(melody()) > 0.999 and agreement(1.5 * melody()) > 0.999
    assert abs(agreement(np.full(200, 150.0) + np.linspace(0, 1e-3, 200))) < 0.01 and agreement(150 ** 2 / melody()) < -0.7
    assert prosody.melody_agreement(line(np.zeros(200)), natural, path) is None


def test_tempo_is_even_when_slower_throughout_and_uneven_when_it_changes():
    natural = line(melody())
    slower = stretched(natural, (np.arange(300) / 1.5).astype(int))
    jumpy = stretched(natural, np.concatenate([np.repeat(np.arange(a, a + 40), n) for a, n in ((0, 1), (40, 3), (80, 1), (120, 3), (160, 1))]))
    even, uneven = (prosody.tempo_unevenness(x, natural, prosody.align(x, natural)) for x in (slower, jumpy))
    assert even < 0.1 and uneven > 0.35


def test_pauses_count_where_the_natural_rendering_has_them():
    speech = np.ones(200, bool)
    speech[80:100] = False
    natural, other = line(melody(), speech), line(melody(), np.roll(speech, 60))
    path = np.repeat(np.arange(200)[:, None], 2, 1)
    assert prosody.pauses(natural) == [(80, 100)]
    assert prosody.pause_agreement(natural, natural, path) == 1.0 and prosody.pause_agreement(other, natural, path) == 0.0
    assert prosody.pause_agreement(line(melody()), line(melody()), path) is None


def test_a_question_rises():
    rising = np.concatenate([np.full(150, 150.0), np.linspace(150, 220, 50)])
    assert prosody.final_rise(line(rising)) > 4 > 0 > prosody.final_rise(line(rising[::-1])) - 3
    assert prosody.final_rise(line(np.zeros(100))) is None


def test_features_are_against_the_other_turns_of_the_speaker():
    rows = [dict.fromkeys(prosody.FEATURES, v) for v in (1.0, 2.0, 6.0)]
    found = prosody.relative([rows[0], None, rows[1], rows[2]])
    assert found[1] is None and [f[0] for f in found if f is not None] == [1 - 4, 2 - 3.5, 6 - 1.5]
    assert prosody.relative([rows[0], None]) == [None, None]


def test_mood_log_odds_are_those_of_the_regression():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, len(prosody.FEATURES))), np.array(["sad", "happy", "calm"])[np.arange(60) % 3]
    fitted = linear.LogisticRegression().fit(x, y)
    model = {"mean": [0.0] * 5, "std": [1.0] * 5, "weights": fitted.coef_.tolist(), "bias": fitted.intercept_.tolist(), "classes": list(fitted.classes_), "prior": [1 / 3] * 3}
    found = prosody.mood_log_odds(x[0], model)
    assert np.allclose([found[c] for c in fitted.classes_], np.log(3 * fitted.predict_proba(x[:1])[0]))
    assert prosody.mood_of(x[0], model) == fitted.predict(x[:1])[0]


def test_the_shipped_judges_know_all_moods_and_are_better_than_chance():
    from config import MOODS
    models = prosody.load_models()
    assert set(models["mood"]["classes"]) == set(MOODS) and models["mood"]["features"] == list(prosody.FEATURES)
    assert models["mood"]["test"]["balanced_accuracy"] > 3 * models["mood"]["test"]["chance"]
    assert models["person"]["test"]["balanced_accuracy"] > 0.8 and models["halves"]["test"]["auc"] > 0.9
    assert "licence" in models["data"]


def test_missing_judges_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="evaluation_framework.py fit"):
        prosody.load_models(tmp_path / "none.json")


# ----------------------------------------------------------------------------- scores from measured turns

MODELS = {"person": {"mean": [0.7, 2.0], "std": [0.1, 2.0], "weights": [4.0, -0.2], "bias": 0.0},
          "halves": {"accept": 0.7},
          "mood": {"mean": [0.0] * 5, "std": [1.0] * 5, "weights": [[3.0, 0, 0, 0, 0], [-3.0, 0, 0, 0, 0]], "bias": [0.0, 0.0], "classes": ["happy", "sad"], "prior": [0.5, 0.5]}}


def measured(who=0, pitch=0.0, heard="yes", mos=4.0, halves=0.9, units=((0.1, 0.9),), melody=0.8, uneven=0.1, seconds=1.0):
    rng = np.random.default_rng(who)
    own = rng.normal(size=256)
    own /= np.linalg.norm(own)
    shifts = dict.fromkeys(prosody.FEATURES, 0.0) | {"pitch": pitch}
    return {"seconds": seconds, "reason": None, "voice": own.tolist(), "halves": halves, "units": [list(u) for u in units], "heard": heard, "mos": mos,
            "profile": {"pitch": 80.0 + pitch, "pace": 1.0}, "melody": melody, "unevenness": uneven, "pauses": None, "rise": 1.0, "natural_rise": 2.0, "shifts": shifts}


def talk_of(names, moods=None, texts=None):
    return Dialogue("t", tuple(Turn(n, (texts or ["yes"] * len(names))[i], np.zeros(0, np.float32), 1.1 * i, (moods or [None] * len(names))[i]) for i, n in enumerate(names)))


def test_one_person_per_name_scores_high_and_exchanged_names_low():
    rows = [measured(who=i % 2) for i in range(6)]
    natural, swapped = (metrics.character_score(talk_of(names), rows, MODELS) for names in ("ababab", "abaaba"))
    assert natural["score"] > 0.95 and swapped["score"] < natural["score"] - 0.2
    assert natural["parts"]["same"] > 0.9 > 0.1 > natural["parts"]["different"]
    assert metrics.character_score(talk_of("aa"), [measured(0), measured(0)], MODELS)["score"] > 0.9
    alike = metrics.character_score(talk_of("abab"), [measured(0)] * 4, MODELS)
    assert abs(alike["score"] - 0.5) < 0.05                    # both names in one voice


def test_a_voice_that_wanders_is_seen_between_the_halves():
    first, last = measured(0), measured(1)
    wander = metrics.character_score(talk_of("aaaa"), [first, first, last, last], MODELS)
    assert wander["score"] < 0.1


def test_voice_is_the_share_of_turns_in_one_voice():
    assert metrics.voice_score(talk_of("abab"), [measured(halves=h) for h in (0.9, 0.9, 0.5, None)], MODELS)["score"] == pytest.approx(2 / 3)
    assert metrics.voice_score(talk_of("a"), [measured(halves=None)], MODELS)["score"] is None


def test_moods_that_fit_beat_other_orders_and_exchanged_ones_do_not():
    moods = ["happy", "sad"] * 4
    fits = [measured(pitch=1.0 if m == "happy" else -1.0) for m in moods]
    against = [measured(pitch=-1.0 if m == "happy" else 1.0) for m in moods]
    flat = [measured(pitch=0.0) for _ in moods]
    scores = [metrics.mood_score(talk_of("a" * 8, moods), rows, MODELS)["score"] for rows in (fits, flat, against)]
    assert scores[0] > 0.95 and scores[1] == pytest.approx(0.5) and scores[2] < 0.05
    assert metrics.mood_score(talk_of("a" * 8, moods), fits, MODELS)["parts"]["accuracy"] == 1.0
    assert "one mood" in metrics.mood_score(talk_of("aaa", ["sad"] * 3), fits[:3], MODELS)["reason"]
    assert metrics.mood_score(talk_of("aaa"), fits[:3], MODELS)["score"] is None


def test_moods_of_two_speakers_are_not_exchanged_between_them():
    """The orders tried stay within a speaker: one who is always high is no happier for it."""
    names, moods = "abababab", ["happy", "sad", "sad", "happy"] * 2
    rows = [measured(pitch=(20 if n == "a" else 0) + (1 if m == "happy" else -1)) for n, m in zip(names, moods)]
    assert metrics.mood_score(talk_of(names, moods), rows, MODELS)["score"] > 0.9
    steady = metrics.mood_score(talk_of("abab", ["happy", "sad"] * 2), rows[:4], MODELS)
    assert steady["score"] is None and "one mood" in steady["reason"]


def test_prosody_falls_with_the_melody_and_with_uneven_pace():
    good, flat, jumpy = (metrics.prosody_score(talk_of("ab"), [measured(melody=m, uneven=u)] * 2, MODELS)["score"] for m, u in ((0.8, 0.1), (0.0, 0.1), (0.8, 0.6)))
    assert good > flat + 0.3 and good > jumpy + 0.2
    assert metrics.prosody_score(talk_of("ab"), [measured(melody=None)] * 2, MODELS)["score"] is None


def test_flow_uses_the_speech_inside_the_turns():
    rows = [measured(units=((0.1, 0.9),))] * 6
    found = metrics.flow_score(talk_of("ababab"), rows, MODELS)
    assert found["parts"]["median_s"] == pytest.approx(1.1 + 0.1 - 0.9) and found["parts"]["n"] == 5 and 0 < found["score"] <= 1
    untimed = Dialogue("t", tuple(Turn("ab"[i % 2], "yes", np.zeros(0, np.float32)) for i in range(6)))
    assert metrics.flow_score(untimed, rows, MODELS)["reason"] == "the turns have no starts"
    assert "changes of speaker" in metrics.flow_score(talk_of("aab"), rows[:3], MODELS)["reason"]


def test_words_and_sound():
    rows = [measured(heard="the cat sat", mos=5.0), measured(heard="nothing alike here", mos=3.0)]
    talk = talk_of("ab", texts=["the cat sat", "dogs run far"])
    assert metrics.words_score(talk, rows)["score"] == 0.5 and metrics.sound_score(talk, rows)["score"] == 0.75
    assert metrics.words_score(talk, [measured(heard=None)] * 2)["score"] is None and metrics.sound_score(talk, [measured(mos=None)] * 2)["score"] is None


# ----------------------------------------------------------------------------- bad input

@pytest.fixture
def deaf(monkeypatch):
    """The slow judges replaced: words are never heard, every voice is one voice, sound is fair."""
    monkeypatch.setattr(metrics.judges, "transcribe", lambda audio, *a: "")
    monkeypatch.setattr(metrics.judges, "speaker_embedding", lambda audio, *a: np.ones(256, np.float32) / 16)
    monkeypatch.setattr(metrics.judges, "distill_mos", lambda audio, *a: 3.0)


@pytest.mark.parametrize("sounds", [[], [quiet(1.0)], [quiet(1.0)] * 4, [tone(0.05)] * 4, [np.zeros(0, np.float32)] * 2, [np.full(RATE, np.nan, np.float32)] * 3,
                                    [tone(3.0)], [tone(3.0), quiet(2.0), tone(0.1)]], ids=["none", "one silent", "silent", "tiny", "empty", "not numbers", "one turn", "mixed"])
@pytest.mark.parametrize("mood", [None, "sad", "no such mood"])
def test_odd_conversations_score_null_with_a_reason_and_never_nan(deaf, sounds, mood):
    pytest.importorskip("pyworld")
    talk = Dialogue("odd", tuple(Turn("ab"[i % 2], "", s, float(i), mood) for i, s in enumerate(sounds)))
    rows = [metrics.measure_turn(turn) for turn in talk.turns]
    json.dumps(rows, allow_nan=False)
    scores = metrics.score(talk, rows, prosody.load_models())
    json.dumps(scores, allow_nan=False)
    for found in scores.values():
        assert (found["score"] is None) == (found["reason"] is not None)
        assert found["score"] is None or 0 <= found["score"] <= 1
    assert scores["character"]["score"] is None
    summary = metrics.summary([scores])
    json.dumps(summary, allow_nan=False)
    assert summary["character"]["mean"] is None and summary["character"]["n"] == 0


def test_as_many_measurements_as_turns():
    with pytest.raises(ValueError, match="2 turns but 1"):
        metrics.score(talk_of("ab"), [measured()], MODELS)


def test_summaries_are_intervals_over_conversations():
    rows = [{n: {"score": v} for n in metrics.SCORES} for v in (0.2, 0.4, None, 0.9)]
    found = metrics.summary(rows)["flow"]
    assert found["mean"] == pytest.approx(0.5) and found["low"] < 0.5 < found["high"] and found["n"] == 3 and found["unit"]


def test_a_turn_must_be_mono():
    with pytest.raises(ValueError, match="mono"):
        Turn("a", "x", np.zeros((2, 10)))


# ----------------------------------------------------------------------------- beside a reference

def buzz(seconds=1.0, seed=0):
    rng = np.random.default_rng(seed)
    n = int(seconds * RATE)
    slow = np.interp(np.arange(n), np.linspace(0, n, 30), rng.uniform(0.2, 1, 30))
    return (0.1 * slow * sum(np.sin(2 * np.pi * 140 * k * np.arange(n) / RATE) / k for k in range(1, 20)) + 0.002 * rng.normal(size=n)).astype(np.float32)


def test_cepstral_distortion_is_nothing_for_the_same_grows_with_noise_and_forgives_length():
    sound = buzz()
    noisy = [sound + np.random.default_rng(1).normal(0, s, len(sound)).astype(np.float32) for s in (0.01, 0.1)]
    same, slower, little, much = (metrics.mel_cepstral_distortion(x, sound) for x in (sound, np.repeat(sound.reshape(-1, 240), 2, 0).reshape(-1), *noisy))
    assert same == pytest.approx(0, abs=1e-4) and 0 < little < much and slower < much
    assert metrics.mel_cepstral_distortion(quiet(1.0), sound) is None


def test_cepstral_distortion_is_in_decibels():
    """White noise through a filter of +6 dB above 3 kHz: with all coefficients the root mean square difference of the mel bands."""
    import librosa
    rng = np.random.default_rng(0)
    sound = rng.normal(0, 0.05, RATE).astype(np.float32)
    spectrum = np.fft.rfft(sound)
    spectrum[3000:] *= 2
    other = np.fft.irfft(spectrum).astype(np.float32)
    bands = [librosa.power_to_db(librosa.feature.melspectrogram(y=x, sr=RATE, n_mels=40, hop_length=240)).mean(1) for x in (sound, other)]
    difference = bands[1] - bands[0]
    found = metrics.mel_cepstral_distortion(other, sound, order=39)
    assert found == pytest.approx(float(np.std(difference)), rel=0.15)


def test_pesq_and_stoi_where_lengths_agree_and_a_reason_where_not():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    sound = buzz(2.0)
    same, noisy = metrics.intrusive(sound, sound), metrics.intrusive(sound + np.random.default_rng(1).normal(0, 0.05, len(sound)).astype(np.float32), sound)
    assert same["pesq"] > 4 and same["stoi"] > 0.99 and noisy["stoi"] < same["stoi"] and noisy["pesq"] < same["pesq"]
    other = metrics.intrusive(buzz(1.0), sound)
    assert other["pesq"] is None and other["stoi"] is None and "lengths differ" in other["reason"] and other["mcd_db"] is not None
    assert metrics.intrusive(quiet(2.0), sound)["reason"] == "silent"


# ----------------------------------------------------------------------------- dialogues

def test_turns_are_placed_and_mixed_at_their_starts():
    talk = Dialogue("t", (Turn("a", "x", tone(0.5)), Turn("b", "y", tone(0.5)), Turn("a", "z", tone(0.5), 5.0)))
    assert [round(t.start, 6) for t in placed(talk).turns] == [0.0, 0.7, 5.0]
    sound = mixed(talk)
    assert len(sound) == int(5.5 * RATE) and not sound[int(0.55 * RATE):int(0.65 * RATE)].any() and sound[int(5.1 * RATE):].any()
    assert not talk.timed and placed(talk).timed and len(mixed(Dialogue("e", ()))) == 0


def test_results_of_the_batch_mode_are_read(tmp_path):
    from audio_io import write_audio
    write_audio(tmp_path / "c1_turn_01.wav", tone(0.5))
    row = {"speaker": "user", "text": "Hello.", "audio": "c1_turn_01.wav", "ended": True, "first_audio_ms": 50.0}
    (tmp_path / "results.json").write_text(json.dumps({"conversations": [{"id": "c1", "turns": [row]}]}))
    talk, = from_results(tmp_path)
    assert talk.id == "c1" and talk.turns[0].text == "Hello." and math.isclose(talk.turns[0].seconds, 0.5) and talk.turns[0].facts["ended"]
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        from_results(tmp_path)
    with pytest.raises(ValueError, match="--mode batch"):
        from_results(tmp_path / "none")
