"""The voice bench: every number that a bar rests on, on made-up rows; the whole of it with an untrained model."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

import benchmark
import benchmark_voice as voice
import synthetic_conversations as synthetic
import test_benchmark
from text_tokenizer import normalise, spoken

data, weights, judges = test_benchmark.data, test_benchmark.weights, test_benchmark.judges     # fixtures: two conversations; an untrained codec and model; judges by table
RATE = 24000


def tone(seconds: float, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 200 * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


# ----------------------------------------------------------------------------- ends

def test_silence_at_the_end_is_counted_from_the_last_loud_moment():
    quiet = tone(1.5, 0.002)                                                   # -57 dBFS
    assert voice.silence_at_end(np.concatenate([tone(1.0), quiet]), RATE) == pytest.approx(1.5, abs=0.011)
    assert voice.silence_at_end(np.concatenate([quiet, tone(1.0)]), RATE) == 0 == voice.silence_at_end(tone(1.0, 0.02), RATE)
    assert voice.silence_at_end(np.zeros(RATE), RATE) == 1.0 and voice.silence_at_end(np.zeros(0), RATE) == 0


def test_an_early_stop_is_missing_words():
    def stopped(said, heard, seconds=1.0, source=1.0):
        return voice.stopped_early({"said": said, "heard": heard}, seconds, source)
    said = "one word and four more words come then"
    assert stopped(said, "one word and four more words") and not stopped(said, "one word and four more words come")     # 2 of 8, 1 of 8
    assert not stopped(said, "one bird and for more birds come den", 0.3)                                               # all said, though not well and short
    assert not stopped("yes", "", 1.0, 1.0) and stopped("yes", "", 0.5, 1.0) and not stopped("yes", "", 0.5, None)
    assert stopped("this is five words long", "this is five", 1.0, None)


def test_faults_are_counted_once_per_utterance():
    heard = {"said": "this is five words long", "heard": "this"}
    made = {"end_reason": "runaway", "seconds": 2.5, "audio": np.concatenate([tone(1.0), np.zeros(int(1.5 * RATE), np.float32)])}
    bad = voice.faults_of(made, heard, 2.0, RATE)
    good = voice.faults_of({"end_reason": "eos", "seconds": 1.9, "audio": np.concatenate([tone(1.0), np.zeros(int(0.9 * RATE), np.float32)])}, heard | {"heard": heard["said"]}, 2.0, RATE)
    assert bad == dict.fromkeys(voice.FAULTS, True) and good == dict.fromkeys(voice.FAULTS, False)
    counted = voice.count_faults([{"faults": bad}] + 3 * [{"faults": good}])
    assert (counted["n"], counted["any"], counted["silent_end"], counted["share"]["mean"]) == (4, 1, 1, 0.25) and counted["share"]["high"] > 0.25


def test_long_texts_are_said_in_pieces_and_one_bad_piece_is_seen():
    said = []

    def say(speaker, piece, mood):
        said.append(piece)
        return SimpleNamespace(audio=tone(1.0), first_audio_ms=10.0 * len(said), total_ms=100.0, ended=len(said) != 1, end_reason="quiet" if len(said) != 1 else "runaway")
    text = " ".join(["This is a sentence of just eight words."] * 9)
    made = voice.utter(SimpleNamespace(say=say, codec=SimpleNamespace(cfg=SimpleNamespace(sample_rate=RATE))), 0, text)
    assert len(said) == made["pieces"] == 2 and " ".join(said) == text and max(map(len, said)) <= voice.PIECE
    assert (made["seconds"], made["total_ms"], made["first_audio_ms"], made["ended"], made["end_reason"]) == (2.0, 200.0, 10.0, False, "runaway")


def test_pieces_are_those_of_the_demo():
    import demo
    assert voice.PIECE == demo.PIECE and [p for p in ("Hello.", "...", "") if voice.speakable(p)] == demo.speakable(["Hello.", "...", ""])


# ----------------------------------------------------------------------------- voices

def test_separation_is_of_all_pairs_and_has_an_interval():
    apart = voice.told_apart([0.9, 0.8, 0.4, 0.2, 0.7], [0.5, 0.6, 0.3, 0.7, None])
    assert apart["n"] == 4 and apart["mean"] == pytest.approx(9 / 16) and 0 <= apart["low"] < 9 / 16 < apart["high"] <= 1
    assert voice.told_apart([0.9, 0.9], [0.1, 0.1]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    assert voice.told_apart([None], [0.1])["mean"] is None


def test_slope_and_tenths():
    places = list(range(2, 42))
    line = voice.slope(places, [0.9 - 0.002 * n for n in places])
    assert [line[k] for k in ("mean", "low", "high")] == pytest.approx([-0.002] * 3)
    noisy = voice.slope(places, [0.9 + 0.05 * (-1) ** n for n in places])
    assert noisy["low"] < 0 < noisy["high"] and voice.slope([1], [0.5])["mean"] is None
    assert voice.tenths(list(range(40))) == ([0, 1, 2, 3], [36, 37, 38, 39]) and voice.tenths([1, 2, 3]) == ([], [])


def test_a_long_conversation_that_drifts_and_slows_down():
    heard, good = {"said": "we are here", "heard": "we are here"}, dict.fromkeys(voice.FAULTS, False)
    rows = [{"made": heard, "faults": good, "voice": None if n < 2 else 0.9 - 0.01 * n, "total_ms": 300.0 + 10 * n, "seconds": 2.0} for n in range(22)]
    found = voice.long_result(rows)
    assert found["voice"]["drop"] == pytest.approx(0.18) and found["voice"]["slope_per_turn"]["mean"] == pytest.approx(-0.01)
    assert found["ms_per_second"]["first"]["mean"] == pytest.approx(152.5) and found["ms_per_second"]["ratio"] == pytest.approx(505 / 305)
    assert voice.long_result([]) is None and voice.long_result(rows[:2])["voice"]["drop"] is None


# ----------------------------------------------------------------------------- special sets

def test_special_texts_are_of_the_test_split_alone_and_repeatable():
    sets = voice.special_texts(12, 3)
    assert sets == voice.special_texts(12, 3) != voice.special_texts(12, 4) and {k: len(v) for k, v in sets.items()} == dict.fromkeys(voice.SPECIAL, 12)
    words, names = synthetic._coverage_words("test")
    heard = set().union(*(synthetic._marks(t["text"]) for d in synthetic.dialogues()["train"] for t in d["turns"]))
    rare = {w.lower() for w in words + names}
    assert all(synthetic.split_of(w) == "test" for w in rare)
    for text in sets["numbers"] + sets["names"]:
        assert rare & set(normalise(text).replace(",", "").replace(".", "").replace("?", "").replace("!", "").split()), text
    assert not any(c.isdigit() for texts in sets.values() for text in texts for c in text)
    assert all(t.endswith("?") and len(t.split()) >= 4 and not synthetic._marks(t) & heard for t in sets["questions"])
    assert all(len(t.split()) == 1 for t in sets["one word"]) and sum(t.strip(".").lower() in rare for t in sets["one word"]) >= 6 and {"Yes.", "No."} <= set(sets["one word"])
    assert all(50 <= len(t.split()) <= 65 and not synthetic._marks(t) & heard for t in sets["sixty words"])
    written = {spoken(t["text"]) for d in synthetic.dialogues()["test"] for t in d["turns"]}
    assert {*sets["said numbers"], *sets["said names"]} <= written and all(voice.NUMBER.search(t) for t in sets["said numbers"]) and all(voice.NAME.search(t) for t in sets["said names"])
    assert all(len(t.split()) == 1 and any(t in text for text in written) for t in sets["said word"]) and not {"Hmm.", "Um."} & {t for n in range(9) for t in voice.special_texts(50, n)["said word"]}


def test_what_counts_as_a_number_or_a_name():
    assert all(voice.NUMBER.search(t) for t in ("At half past seven.", "Nineteen, then.", "Page 8.")) and not any(voice.NUMBER.search(t) for t in ("No one.", "He often sat.", "A weight."))
    assert all(voice.NAME.search(t) for t in ("I told Mum.", "Right, Clive.")) and not any(voice.NAME.search(t) for t in ("Clive. It is.", "See you on Monday.", "What if I'm late?"))


def test_long_texts_are_consecutive_sentences():
    sentences = [f"{'word ' * 11}{n}." for n in range(12)]
    assert voice.long_texts([sentences]) == [" ".join(sentences[:5]), " ".join(sentences[5:10])]
    assert voice.long_texts([["word " * 70 + "end.", *sentences[:2]]]) == []


def collected(folder, **other) -> list[dict]:
    """The first test conversation of a collection as its manifest has it."""
    about = {"source": "synthetic", "version": synthetic.VERSION, "seed": 5, "engine": "hibari", "kokoro_share": 0.0, "conversations": 4} | other
    (folder / "collection.json").write_text(json.dumps(about))
    script = synthetic.Plan(5, "hibari", 0.0).script(2)
    return [{"id": f"{script.id}-{k:02d}", "recording_id": script.id, "text": normalise(t["text"]), "custom": {"character": script.characters[t["character"]].id}} for k, t in enumerate(script.turns)]


def test_characters_are_drawn_again_and_only_of_this_collection(tmp_path):
    turns = collected(tmp_path)
    found = voice.characters_of(tmp_path, [turns])
    assert found == {c.id: c for c in synthetic.Plan(5, "hibari", 0.0).script(2).characters} and turns[0]["custom"]["character"] in found
    for other in ({"seed": 6}, {"version": 1}, {"source": "folder"}, {"texts": "nowhere.txt"}):
        collected(tmp_path, **other)
        assert voice.characters_of(tmp_path, [turns]) == {}
    assert voice.characters_of(tmp_path / "nowhere", [turns]) == {}


# ----------------------------------------------------------------------------- the bench

def flags(data, weights, tmp_path, *more):
    return ("voice", "--data", data, "--codec", weights / "codec", "--checkpoint", weights / "nano", "--turns", 2, "--results", tmp_path / "R.md", "--save", tmp_path / "wavs", *more)


def test_the_main_set_alone(data, weights, tmp_path, judges, capsys):
    result = test_benchmark.run(capsys, *flags(data, weights, tmp_path, "--sets", 0, "--long", 0, "--listen", 0))
    assert result["n"] == 2 and sum(result["end_reasons"].values()) == 2 and result["ended"] + result["runaway"] <= 2
    assert set(result["conditions"]) == {"made", "codec", "source"} and result["real_time_factor"]["p50"] > 0 and result["first_audio_ms"]["p95"] > 0
    rows = [json.loads(line) for line in (tmp_path / "wavs" / "turns.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all((tmp_path / "wavs" / f"{row['id']}.wav").exists() == (row["seconds"] > 0) for row in rows)
    assert rows[0]["source_seconds"] == pytest.approx(1.2)
    for which in ("made", "source"):
        pairs = [(r[which]["voice"], r[which]["other"]) for r in rows]
        assert result["separation"][which]["mean"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, _ in pairs for _, b in pairs]))
    assert result["separation"]["source"]["mean"] == 1.0                       # told by the loudness, which is each character's own
    assert result["mos_drop"]["mean"] == pytest.approx(np.mean([r["source"]["mos"] - r["made"]["mos"] for r in rows]), abs=1e-3)
    assert result["sets"] is result["long"] is result["listening"] is None and result["faults"]["n"] == 2
    met = {bar["what"]: bar["met"] for bar in result["bars"]}
    assert met["listening: word error, %"] is None and met["mood"] is None and met["word error, rare names, %"] is None
    assert "| mood | - | - | - |" in (tmp_path / "R.md").read_text()


def test_everything_else(data, weights, tmp_path, judges, monkeypatch, capsys):
    who = synthetic.draw_character("c0-0", "hibari", synthetic.rng_of(1))
    monkeypatch.setattr(voice, "characters_of", lambda data, conversations: {"c0-0": who, "c0-1": who})
    asked = []
    monkeypatch.setattr(synthetic, "speak", lambda text, character, prosody, seed: asked.append((text, character, prosody)) or SimpleNamespace(audio=tone(1.0)))
    result = test_benchmark.run(capsys, *flags(data, weights, tmp_path, "--turns", 4, "--sets", 1, "--long", 6, "--listen", 3))
    texts = voice.special_texts(1, 0)
    assert list(result["sets"]) == list(voice.SPECIAL) and all(s["made"]["n"] == 1 for s in result["sets"].values())
    rows = [json.loads(line) for line in (tmp_path / "wavs" / "turns.jsonl").read_text().splitlines()]
    special = [r for r in rows if r["set"] in voice.SPECIAL]
    assert all(a[1] is who and a[2] == (0.0, 0.0, 0.0, 0.0) for a in asked)
    assert [a[0] for a in asked] == [texts[r["set"]][0] for r in special if r["source"]] and asked
    for r in special:
        assert r["made"]["said"] == texts[r["set"]][0] and (result["sets"][r["set"]]["source"] is None) == (r["source"] is None)
    long = [r for r in rows if r["set"] == "long"]
    assert [r["speaker"] for r in long] in ([0, 1] * 3, [1, 0] * 3) and [r["voice"] is None for r in long[:2]] == [True, True] and result["long"]["turns"] == 6
    assert result["long"]["ms_per_second"]["ratio"] > 0 and result["listening"]["n"] == 3 and result["listening"]["words"] > 0
    assert result["faults"]["n"] == len(rows) == 4 + 8 + 6 and result["faults"]["any"] == sum(any(r["faults"].values()) for r in rows)
    bars = {bar["what"]: bar for bar in result["bars"]}
    assert bars["listening: word error, %"]["value"] == pytest.approx(100 * result["listening"]["wer"]["mean"], abs=0.01)
    assert [w for w, b in bars.items() if b["met"] is None] in (["mood"], ["long conversation: voice, drop from the first to the last tenth", "mood"])
    assert all(value > 0 for value in result["seconds_per_utterance"].values())


def test_bars_are_met_at_their_limits():
    interval = {"mean": 0.05, "low": 0.01, "high": 0.1}
    result = {"conditions": {"made": {"wer": interval, "voice": {"mean": 0.85}}}, "wer_over_source": {"mean": 0.031}, "sets": {"names": {"made": {"wer": {"mean": 0.08}}}}, "faults": {"n": 500, "share": {"mean": 1 / 500}},
              "separation": {"made": {"mean": 0.96}}, "mos_drop": {"mean": 0.41}, "listening": {"wer": {"mean": 0.15}}, "real_time_factor": {"p50": 0.4}, "first_audio_ms": {"p50": 60.0, "p95": 121.0},
              "long": {"voice": {"drop": 0.05}, "ms_per_second": {"ratio": 1.2}}}
    found = voice.bars(result)
    assert [b["met"] for b in found] == [True, False, None, None, None, None, True, None, None, None, True, True, False, False, True, False, True, False, True, False, None]
    assert found[0] == {"what": "word error, %", "bar": "at most 5", "value": 5.0, "low": 1.0, "high": 10.0, "met": True}
    shown = voice.bars_table(found)
    assert "| word error, % | at most 5 | 5.00 (1.00 to 10.00) | met |" in shown and "| real-time factor, median | under 0.4 | 0.40 | **missed** |" in shown


def test_the_card_shows_the_bars(data, weights, tmp_path, judges, capsys):
    test_benchmark.run(capsys, *flags(data, weights, tmp_path, "--sets", 0, "--long", 0, "--listen", 2))
    test_benchmark.run(capsys, "card", "--kind", "nano", "--folder", weights / "nano", "--metrics", tmp_path / "none.jsonl", "--collection", tmp_path / "none.json", "--results", tmp_path / "R.md")
    card = (weights / "nano" / "README.md").read_text()
    assert "| listening: word error, % | at most 15 |" in card and "source TTS" in card and "runaway, early stop or silent end, % of 2 utterances" in card


def test_counts_below_zero_are_refused(data, weights, tmp_path, capsys):
    assert benchmark.main([str(w) for w in flags(data, weights, tmp_path, "--long", -1)]) == 2
    assert "use 0 for none" in capsys.readouterr().err
