"""The suite around the scores: caches, the matrix of validity, a run beside its floors, the page, pronunciation. Slow judges are stand-ins."""
import argparse
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import conversation_metrics as metrics
import demo
import evaluation_framework
import evaluation_page
import evaluation_run
import pronunciation
import validity
from dialogue import RATE, Dialogue, Turn

pytest.importorskip("pyworld")


def voice(number, seconds=1.1):
    """A buzz of its own melody, (N,)."""
    n = int(seconds * RATE)
    rng = np.random.default_rng(number)
    pitch = (130 if number % 2 else 200) * np.exp(np.interp(np.arange(n), np.linspace(0, n, 8), rng.normal(0, 0.15, 8)))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, 10))).astype(np.float32)


def make_talk(number=0, count=6):
    moods = ["happy", "sad", "excited", "calm", "sad", "excited", "calm", "happy"]
    turns, clock = [], 0.0
    for i in range(count):
        sound = voice(100 * number + i)
        turns.append(Turn("ab"[i % 2], f"turn number {i} of {number}.", sound, clock, moods[(i + number) % 8], {"mood_strength": 1.0}))
        clock += len(sound) / RATE + (0.1, 0.3, 0.05)[i % 3]
    return Dialogue(f"talk-{number}", tuple(turns))


@pytest.fixture
def quick(monkeypatch):
    """Judges that answer at once, from the sound alone; counts what they were asked."""
    asked = {"words": 0, "renderings": 0}

    def transcribe(audio, *more):
        asked["words"] += 1
        return "turn number one"

    def embedding(audio, *more):
        spectrum = np.abs(np.fft.rfft(audio[:RATE // 2], RATE))[50:306]
        return (spectrum / np.linalg.norm(spectrum)).astype(np.float32)

    def rendering(text):
        asked["renderings"] += 1
        return metrics.reference_line(voice(sum(map(ord, text))))
    monkeypatch.setattr(metrics.judges, "transcribe", transcribe)
    monkeypatch.setattr(metrics.judges, "speaker_embedding", embedding)
    monkeypatch.setattr(metrics.judges, "distill_mos", lambda audio, *more: 3.0)
    monkeypatch.setattr(validity, "natural_rendering", rendering)
    return asked


# ----------------------------------------------------------------------------- measuring

def test_what_was_listened_to_is_not_listened_to_again(quick, tmp_path, monkeypatch):
    talks, how = [make_talk(0), make_talk(1)], validity.Listening(str(tmp_path))
    first = validity.measure(talks, how)[None]
    assert quick["words"] == 12
    again = validity.measure(talks, how)[None]
    assert quick["words"] == 12 and [rows for _, rows in first] == [rows for _, rows in again]
    with monkeypatch.context() as patch:
        patch.setattr(validity, "processes", lambda count: pytest.fail("a process for what is kept"))
        turned = validity.measure(talks[::-1], validity.Listening(str(tmp_path), jobs=2))[None]
    assert [rows for _, rows in turned] == [rows for _, rows in first][::-1]
    moved = talks[0].with_turns([Turn(t.speaker, t.text, t.audio, t.start + 1, t.mood) for t in talks[0].turns])
    validity.measure([moved], how)
    assert quick["words"] == 12                                             # other times, the same sounds
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:20])                              # torn by a crash
    assert [rows for _, rows in validity.measure(talks, how)[None]] == [rows for _, rows in first] and quick["words"] == 24


def test_measured_in_the_order_of_the_conversations_and_kinds(quick, tmp_path):
    talks = [make_talk(0), make_talk(1)]
    found = validity.measure(talks, validity.Listening(str(tmp_path)), (None, "wrong words", "flat pitch"))
    assert list(found) == [None, "wrong words", "flat pitch"]
    for pairs in found.values():
        assert [talk.id for talk, _ in pairs] == ["talk-0", "talk-1"] and all(len(rows) == 6 for _, rows in pairs)
    direct = metrics.measure_turn(talks[1].turns[2], validity.natural_rendering(talks[1].turns[2].text))
    assert found[None][1][1][2]["melody"] == pytest.approx(direct["melody"], abs=1e-5)
    assert {t.text for t in found["wrong words"][0][0].turns} == {t.text for t in talks[0].turns}


def test_only_some_turns_are_listened_to(quick, tmp_path):
    how = validity.Listening(str(tmp_path), turns=2)
    (_, rows), = validity.measure([make_talk()], how)[None]
    assert [row["heard"] is not None for row in rows] == [i in how.listened(6) for i in range(6)] and len(how.listened(6)) == 2
    assert how.listened(1) == {0} and validity.Listening().listened(3) == {0, 1, 2}
    (_, rows), = validity.measure([make_talk()], validity.Listening(str(tmp_path)))[None]
    assert all(row["heard"] is not None for row in rows)                    # what was left out is made up for
    words = quick["words"]
    validity.measure([make_talk()], validity.Listening(str(tmp_path), words=False, turns=1))
    (_, rows), = validity.measure([make_talk()], validity.Listening(str(tmp_path), turns=5))[None]
    assert words == quick["words"] == 6                                     # and what was heard is not forgotten


@pytest.mark.parametrize("wrong, flag", [({"turns": -1}, "--listen"), ({"jobs": 0}, "--jobs")])
def test_settings_name_their_flag(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        validity.Listening(**wrong)


# ----------------------------------------------------------------------------- validity

def test_auc_and_its_interval():
    high, low = list(np.linspace(0.5, 1, 20)), list(np.linspace(0, 0.6, 20))
    found = validity.auc_interval(high, low)
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])
    assert found["mean"] == pytest.approx(wins) and found["low"] < wins < found["high"] and found["n"] == 20
    assert validity.auc_interval([1.0, None], [0.0])["mean"] == 1.0 and validity.auc_interval([None], [0.0])["mean"] is None


def test_verdicts_ask_for_the_own_and_frown_on_strays():
    row = {"stretched gaps": 1.0, "rushed turns": 0.85, "flat pitch": 0.8, "noise": 0.99, "swapped moods": 0.6}
    matrix = {"flow": {k: {"mean": v} for k, v in row.items()}}
    assert validity.verdicts(matrix)["flow"] == {"own": 0.85, "valid": False, "strays": ["flat pitch"]}
    assert validity.verdicts({"flow": {"noise": {"mean": None}}})["flow"]["valid"] is None


def test_every_score_has_a_corruption_of_its_own_and_names_only_known_ones():
    assert set(validity.OWN) == set(validity.TOUCHED) == set(metrics.SCORES)
    for name in metrics.SCORES:
        assert validity.OWN[name] and set(validity.OWN[name] + validity.TOUCHED[name]) <= set(validity.CORRUPTIONS) and not set(validity.OWN[name]) & set(validity.TOUCHED[name])


def test_validate_separates_gaps_in_flow_and_nothing_else(quick, tmp_path):
    import prosody
    talks = [make_talk(n) for n in range(3)]
    result = validity.validate(talks, validity.Listening(str(tmp_path / "cache")), prosody.load_models(), ["stretched gaps", "wrong words"])
    assert result["matrix"]["flow"]["stretched gaps"]["mean"] == 1.0 and result["matrix"]["sound"]["stretched gaps"]["mean"] == 0.5
    assert result["verdicts"]["flow"]["valid"] is True and result["conversations"] == 3
    json.dumps(result, allow_nan=False)
    text = validity.matrix_text(result)
    assert "**1.00** (1.00 to 1.00)" in text and "| stretched gaps |" in text
    validity.draw_matrix(result, tmp_path / "pictures/validity.png")
    assert (tmp_path / "pictures/validity.png").read_bytes()[:4] == b"\x89PNG"


def test_recordings_of_one_voice_become_conversations(quick, tmp_path, monkeypatch):
    import benchmark_codec
    talks = validity.recorded_talks([(f"text {i}", voice(i)) for i in range(13)])
    assert [len(t.turns) for t in talks] == [6, 6] and talks[0].timed and talks[1].turns[0].text == "text 6"
    with pytest.raises(ValueError, match="--recordings"):
        validity.recorded_talks([("a", voice(0))])
    monkeypatch.setattr(benchmark_codec, "recordings", lambda folder, transcripts, count, seed: [(f"text {i}", voice(i)) for i in range(6)])
    words = ["validate", "--recordings", "somewhere", "--kinds", "flat pitch", "--jobs", "1", "--cache", str(tmp_path / "c"), "--output", str(tmp_path / "o")]
    assert evaluation_framework.main(words) == 0
    result = json.loads((tmp_path / "o/results.json").read_text())
    assert result["natural"]["prosody"]["mean"] is not None and result["natural"]["character"]["n"] == 1 and (tmp_path / "o/validity.png").exists()


def test_a_fit_finds_what_was_put_in():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    model = validity._regression(x, x[:, 0] - x[:, 1] > 0, ["a", "b"])
    right = np.mean([(metrics.logistic(row, model) > 0.5) == (row[0] > row[1]) for row in x])
    assert right > 0.95 and model["weights"][0] > 0 > model["weights"][1]
    assert validity._right(model, x.tolist(), (x[:, 0] > x[:, 1]).tolist())["balanced_accuracy"] > 0.95
    with pytest.raises(ValueError, match="--count"):
        validity._regression([], [], ["a"])
    with pytest.raises(ValueError, match="--count"):
        validity._regression(x, np.ones(300, bool), ["a", "b"])


def test_the_accepted_cosine_leaves_out_the_lowest_of_one_voice():
    x, y = [[v] for v in (*np.linspace(0.5, 0.9, 41), 0.2, 0.7)], [True] * 41 + [False] * 2
    found = validity.accepted([row[0] for row in x[:41]], share=0.9)
    assert found["accept"] == pytest.approx(0.54) and found["n"] == 41
    right = validity.accepted_right(found["accept"], x, y)
    assert right["one_voice_accepted"] == pytest.approx(37 / 41) and right["two_voices_found"] == 0.5
    with pytest.raises(ValueError, match="--count"):
        validity.accepted([0.5])


def test_fit_writes_judges_that_the_scores_take(quick, tmp_path, monkeypatch):
    talks = {"train": [make_talk(n) for n in range(2)], "test": [make_talk(n) for n in range(4, 6)]}
    monkeypatch.setattr(validity, "natural_talks", lambda data, split, *more: talks[split])
    monkeypatch.setattr(metrics, "HALF", 0.3)
    assert evaluation_framework.main(["fit", "--data", str(tmp_path), "--jobs", "1", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "judges.json")]) == 0
    models = json.loads((tmp_path / "judges.json").read_text())
    assert models["mood"]["test"]["turns"] == 12 and models["mood"]["test"]["chance"] == pytest.approx(0.25)
    (talk, rows), = validity.measure(talks["test"][:1], validity.Listening(str(tmp_path / "cache")))[None]
    assert metrics.score(talk, rows, models)["character"]["score"] is not None


# ----------------------------------------------------------------------------- a run

def test_the_opening_gives_everybody_a_voice():
    talk = make_talk()
    plan, rest = evaluation_run.plan_natural(talk)
    assert evaluation_run.opening(talk) == 2 and len(rest.turns) == 4 == len(plan.turns)
    assert [t.voice is not None for t in plan.turns] == [True, True, False, False]
    assert np.array_equal(plan.turns[0].voice, talk.turns[0].audio) and plan.turns[0].mood == rest.turns[0].mood
    assert evaluation_run.plan_natural(make_talk(count=2)) is None and evaluation_run.opening(make_talk(count=3)) is None


def test_made_sounds_are_kept_and_torn_files_are_made_anew(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return [voice(0), np.zeros(0, np.float32)], [{"a": 1}]
    first = evaluation_run.kept(tmp_path, "k", make)
    second = evaluation_run.kept(tmp_path, "k", make)
    assert len(calls) == 1 and second[1] == [{"a": 1}] and all(np.array_equal(a, b) for a, b in zip(first[0], second[0]))
    assert np.abs(first[0][0] - voice(0)).max() < 1e-4 and len(first[0][1]) == 0
    (tmp_path / "made-k.npz").write_bytes((tmp_path / "made-k.npz").read_bytes()[:100])
    evaluation_run.kept(tmp_path, "k", make)
    assert len(calls) == 2


class StandIn:
    """A model that hums."""

    def __init__(self, args):
        self.args = args

    def name(self):
        return {"path": "hum", "sha256": "0"}

    def settings(self):
        return ("hum",)

    def converse(self, plan):
        return [voice(i, 1.2) for i, _ in enumerate(plan.turns)], [{"speaker": t.speaker, "text": t.text or "an answer.", "ended": i != 1, "first_audio_ms": 50.0, "total_ms": 90.0} for i, t in enumerate(plan.turns)]

    def through_codec(self, sounds):
        return [s * 0.9 for s in sounds]


@pytest.fixture
def humming(quick, monkeypatch):
    monkeypatch.setattr(evaluation_run, "Speaker", StandIn)
    monkeypatch.setattr(metrics, "transcribe_again", lambda audio, *more: "turn number one")
    return quick


def test_a_run_writes_scores_of_all_conditions_and_a_page_with_sound(humming, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    monkeypatch.setattr(validity, "natural_talks", lambda *a: [make_talk(0), make_talk(1)])
    words = ["run", "--conversations", str(data), "--cache", str(tmp_path / "cache"), "--output", str(out), "--jobs", "1", "--hear", "2", "--again", "1", "--beside", "1"]
    assert evaluation_framework.main(words) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((out / "results.json").read_text())
    assert set(said["conditions"]) == {"natural", "codec", "source", "model"} and result["manifest"]["commit"] is not None
    model = result["conditions"]["model"]
    assert model["faults"]["runaway"] == 2 and model["first_audio_ms"] == 50.0 and result["conditions"]["natural"]["faults"]["runaway"] is None
    assert model["offsets"]["median_s"] == pytest.approx(0.05, abs=0.03)
    assert len(result["per_conversation"]["model"]) == 2 and result["turns"] == 8 and model["wer_again"]["n"] == 4
    page = (out / "page.html").read_text()
    assert page.count("<audio") == 5 and result["beside"] == 1 and len(result["per_conversation"]["natural"]) == 1 and all((out / "audio" / f"{c}_000.ogg").stat().st_size > 1000 for c in result["conditions"])
    with monkeypatch.context() as patch:                                      # all of it is kept: nobody listens again, and the figures are the same
        patch.setattr(metrics, "transcribe_again", lambda *more: pytest.fail("heard again"))
        patch.setattr(metrics.judges, "transcribe", lambda *more: pytest.fail("listened again"))
        assert evaluation_framework.main(words) == 0 and json.loads((out / "results.json").read_text())["conditions"] == result["conditions"]
    assert "pipeline: source TTS" in page and "data:image/png" in page and "nan" not in re.sub("base64,[^\"]+", "", page).lower()


def test_moods_told_are_counted_by_turns_beside_always_saying_the_frequent_one():
    rows = [{"mood": {"score": 0.5, "parts": {"accuracy": 1.0, "turns": 3}}}, {"mood": {"score": 0.5, "parts": {"accuracy": 0.0, "turns": 1}}}, {"mood": {"score": None, "parts": {"turns": 0}}}]
    talks = [SimpleNamespace(turns=[SimpleNamespace(mood=m) for m in ("happy", "happy", "sad", None)]), SimpleNamespace(turns=[SimpleNamespace(mood="calm")])]
    told = evaluation_run.moods_told(talks, rows)
    assert told["accuracy"]["mean"] == 0.75 and told["turns"] == 4 and told["chance"] == 0.5
    assert evaluation_run.moods_told(talks, rows[2:]) is None and evaluation_run.moods_told([], []) is None


def test_conversations_of_several_places_stay_apart(tmp_path, monkeypatch):
    """Each collection counts its conversations from 0: the same name, another person."""
    monkeypatch.setattr(validity, "natural_talks", lambda data, split, *more: [make_talk(0 if split == "test" else 1)])
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    one, two = str(tmp_path / "a"), f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    assert [t.id for t in evaluation_run.natural_of(one, "test", 0)] == [make_talk(0).id]
    found = evaluation_run.natural_of(two, "test, validation", 0)
    assert len({t.id for t in found}) == 4 and not {s for t in found[:2] for s in t.speakers} & {s for t in found[2:] for s in t.speakers}
    assert [x.audio is y.audio or (x.audio == y.audio).all() for x, y in zip(found[2].turns, make_talk(0).turns)]
    for data, split, named in ((f"{one},{tmp_path / 'none'}", "test", "none"), (one, "tset", "--split tset")):
        with pytest.raises(ValueError, match=named):
            evaluation_run.natural_of(data, split, 0)


def test_a_file_of_conversations_has_no_topline(humming, tmp_path, capsys):
    file = tmp_path / "in.json"
    file.write_text(json.dumps({"conversations": [{"id": "x<y>", "turns": [{"speaker": "u", "text": "Hello <b>there</b>."}, {"speaker": "v"}]}]}))
    assert evaluation_framework.main(["run", "--conversations", str(file), "--cache", str(tmp_path / "c"), "--output", str(tmp_path / "o"), "--jobs", "1", "--again", "0"]) == 0
    result = json.loads((tmp_path / "o/results.json").read_text())
    assert set(result["conditions"]) == {"source", "model"} and result["conditions"]["model"]["scores"]["character"]["mean"] is None
    page = (tmp_path / "o/page.html").read_text()
    assert "<b>there</b>" not in page and "x&lt;y&gt;" in page and "no speaker has two turns" in page


def test_ends_that_are_faults():
    turns = [Turn("a", "one two three four", np.zeros(0, np.float32), None, None, {"ended": e}) for e in (True, False, None)]
    rows = [{"heard": "one two three four", "seconds": 3.0, "units": [[0.1, 2.5]]}, {"heard": "one two", "seconds": 3.0, "units": [[0.1, 1.5]]}, {"heard": None, "seconds": 2.0, "units": []}]
    found = evaluation_run.end_faults(Dialogue("t", tuple(turns)), rows)
    assert found == [{"runaway": False, "early_stop": False, "silent_end": False}, {"runaway": True, "early_stop": True, "silent_end": True}, {"runaway": None, "early_stop": False, "silent_end": True}]


@pytest.mark.parametrize("words, message", [
    (["run", "--conversations", "nowhere"], "--conversations"), (["validate", "--data", "nowhere"], "nowhere"), (["validate", "--kinds", "nonsense"], "unknown corruption 'nonsense'"),
    (["validate", "--count", "-1"], "--count"), (["run", "--beside", "-1"], "--beside"), (["run", "--checkpoint", "nowhere"], "nowhere"), (["fit", "--data", "nowhere"], "nowhere")])
def test_what_a_user_can_mend_is_one_line(words, message, capsys, tmp_path):
    if words[0] == "run" and "--checkpoint" in words:
        file = tmp_path / "in.json"
        file.write_text(json.dumps({"conversations": [{"id": "x", "turns": [{"speaker": "u", "text": "Hello."}]}]}))
        words = [*words, "--conversations", str(file)]
    assert evaluation_framework.main([*words, "--jobs", "1", "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_numbers_of_the_page_have_dashes_where_nothing_was_measured():
    none = {"mean": None, "low": None, "high": None}
    assert evaluation_page._cell(none) == "-" and evaluation_page._percent(none) == "-" and evaluation_page._number(None) == "-"
    assert "0.50" in evaluation_page._cell({"mean": 0.5, "low": None, "high": None})


# ----------------------------------------------------------------------------- pronunciation

def test_shares_have_wilsons_interval():
    found = pronunciation.share(8, 10)
    assert found["mean"] == 0.8 and found["low"] == pytest.approx(0.4902, abs=1e-3) and found["high"] == pytest.approx(0.9433, abs=1e-3)
    assert pronunciation.share(0, 0)["mean"] is None and pronunciation.share(10, 10)["high"] == pytest.approx(1.0)


def test_a_tally_counts_decided_rows_and_the_baselines():
    rows = [{"word": "lead", "wanted": w, "choice": c} for w, c in (("a", "a"), ("b", "a"), ("a", "a"), ("b", None))]
    found = pronunciation.tally(rows)
    assert found["accuracy"]["mean"] == pytest.approx(2 / 3) and found["abstained"] == 1 and found["majority"] == pytest.approx(2 / 3) and found["favourite_share"] == 1.0
    assert pronunciation.tally([])["accuracy"]["mean"] is None


def test_the_table_is_balanced_and_its_words_stand_in_their_sentences():
    table = pronunciation.load_table()
    items = pronunciation.homograph_items(table)
    assert len({(w, s) for w, s, _ in items}) == 10 and len(items) == 40 and len(table["continuation"]) == 10
    for word, senses in table["homographs"].items():
        assert len(senses) == 2 and len({len(f["sentences"]) for f in senses.values()}) == 1
        assert all(word in pronunciation._words(text) for f in senses.values() for text in f["sentences"])
    assert all(word in pronunciation._words(f[k]) for word, f in table["continuation"].items() for k in ("prompt", "next"))


def test_the_judge_hears_which_pronunciation_was_forced_and_knows_all_words():
    pytest.importorskip("pocketsphinx")
    table = pronunciation.load_table()
    decoder = metrics._sphinx()
    texts = [text for *_, text in pronunciation.homograph_items(table)] + [f["next"] for f in table["continuation"].values()]
    assert [w for text in texts for w in pronunciation._words(text) if decoder.lookup_word(w) is None] == []
    senses = table["homographs"]["lead"]
    variants = {s: f["arpabet"] for s, f in senses.items()}
    for sense, facts in senses.items():
        sound = pronunciation.say_as("They lead us up the hill.", "lead", facts["phones"], pronunciation.drawn_voice(0))
        assert pronunciation.which_variant(sound, "They lead us up the hill.", "lead", variants)["choice"] == sense
    assert pronunciation.which_variant(np.zeros(RATE, np.float32), "They lead us.", "lead", variants)["choice"] is None
    with pytest.raises(ValueError, match="qwertyish"):
        pronunciation.which_variant(sound, "They lead qwertyish.", "lead", variants)
    assert "hill" in metrics.transcribe_again(sound) and metrics.transcribe_again(np.zeros(RATE)) == ""


def test_continuation_asks_with_either_prompt_and_once_without(monkeypatch):
    table = {"continuation": {"data": pronunciation.load_table()["continuation"]["data"]}}
    monkeypatch.setattr(pronunciation, "say_as", lambda text, word, phones, who, seed=0: phones)
    monkeypatch.setattr(pronunciation, "which_variant", lambda sound, text, word, variants: {"choice": sound, "margin": 1.0})
    asked = []

    def say_after(prompt_text, prompt, text, same, number):
        asked.append((prompt, same))
        return {None: "a", "d\u02c8AT\u0259": "ay", "d\u02c8\u00e6T\u0259": "a"}[prompt]
    kept, prior = (pronunciation.tally(pronunciation.continuation(say_after, 1, how, table)) for how in ("other", "none"))
    assert kept["accuracy"]["mean"] == 1.0 and prior["accuracy"]["mean"] == 0.5
    assert len(asked) == 3 and not asked[0][1] and asked[2][0] is None


# ----------------------------------------------------------------------------- the real speaker, tiny and untrained

def test_the_model_speaks_through_the_demo(tmp_path):
    import checkpoint
    import config
    from architecture import CSM
    from rvq_tokenizer import Codec
    codec = Codec(config.CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1, latent_layers=1, decoder_layers=3, num_mels=20,
                                     num_low_bins=16, num_bands=20))
    model = CSM(config.model_preset("test"))
    model.init_weights()
    checkpoint.save_codec(codec, tmp_path / "codec")
    checkpoint.save_pretrained(model, tmp_path / "model", codec_fingerprint=codec.fingerprint)
    args = evaluation_framework.build_parser().parse_args(["run", "--checkpoint", str(tmp_path / "model"), "--codec", str(tmp_path / "codec"), "--max_seconds", "0.4"])
    speaker = evaluation_run.Speaker(args)
    plan = demo.Conversation("c", [demo.PlannedTurn("a", "Hello.", "sad"), demo.PlannedTurn("b", "Hi there.")])
    talk = evaluation_run.model_talk(speaker, plan, tmp_path)
    assert [t.text for t in talk.turns] == ["Hello.", "Hi there."] and talk.timed and talk.turns[0].mood == "sad"
    gap = talk.turns[1].start - talk.turns[0].seconds
    assert math.isclose(gap, talk.turns[1].facts["first_audio_ms"] / 1000, abs_tol=1e-6)
    sound = voice(0)
    assert len(speaker.through_codec([sound])[0]) == len(sound)
    other = argparse.Namespace(**vars(args) | {"temperature": 0.123})
    assert evaluation_run.Speaker(other).settings() != speaker.settings()
    assert len(list(Path(tmp_path).glob("made-*.npz"))) == 1


def test_several_processes_speak_as_one_does_and_what_was_said_is_not_said_again(tmp_path, capsys):
    import checkpoint
    import config
    from architecture import CSM
    from rvq_tokenizer import Codec
    codec = Codec(config.CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1, latent_layers=1, decoder_layers=3, num_mels=20,
                                     num_low_bins=16, num_bands=20))
    model = CSM(config.model_preset("test"))
    model.init_weights()
    checkpoint.save_codec(codec, tmp_path / "codec")
    checkpoint.save_pretrained(model, tmp_path / "model", codec_fingerprint=codec.fingerprint)
    plans = [demo.Conversation(text, [demo.PlannedTurn("a", text)]) for text in ("Hello.", "Hi there.", "Good morning.")]
    made = {}
    for jobs in ("1", "2"):
        args = evaluation_framework.build_parser().parse_args(["run", "--checkpoint", str(tmp_path / "model"), "--codec", str(tmp_path / "codec"), "--max_seconds", "0.4", "--jobs", jobs])
        speaker, folder = evaluation_run.Speaker(args), tmp_path / f"jobs{jobs}"
        made[jobs] = evaluation_run.model_talks(args, speaker, plans, folder)
        assert (speaker._lab is None) == (jobs == "2") and len(list(folder.glob("made-*.npz"))) == 3     # others spoke: no weights were loaded here
    assert [t.id for t in made["2"]] == ["Hello.", "Hi there.", "Good morning."]
    assert all(np.array_equal(a.turns[0].audio, b.turns[0].audio) for a, b in zip(made["1"], made["2"]))
    args.checkpoint = "none"                                                   # nobody speaks what is kept
    again = evaluation_run.model_talks(args, speaker, plans, folder)
    assert all(np.array_equal(a.turns[0].audio, b.turns[0].audio) for a, b in zip(again, made["2"])) and "3/3" in capsys.readouterr().err


def test_the_section_of_the_results_says_what_was_found(humming, tmp_path, monkeypatch):
    import benchmark
    monkeypatch.setattr(validity, "natural_talks", lambda *a: [make_talk(0), make_talk(1)])
    words = ["evaluation", "--data", str(tmp_path), "--kinds", "stretched gaps", "--voices", "0", "--jobs", "1", "--cache", str(tmp_path / "c"), "--save", str(tmp_path / "s"), "--results", str(tmp_path / "R.md")]
    assert benchmark.main(words) == 0
    text = (tmp_path / "R.md").read_text()
    assert "## Conversations" in text and "**1.00**" in text and "| **the model** |" in text
    assert benchmark.read_results(tmp_path / "R.md")["evaluation"]["turns"] == 8
    assert (tmp_path / "s/page.html").exists() and (tmp_path / "s/validity.png").exists()
