"""The benchmark: sections replaced and never doubled, numbers from runs alone, cards that say what is not known.

The judges are stood in for by tables (they have their own tests), so that the expected numbers are known here.
"""
import gzip
import json
import shutil

import numpy as np
import pytest

import benchmark

TEXTS = ["we are going home now", "it was a long day", "please bring the soup", "there is no more soup"]


@pytest.fixture
def judges(monkeypatch):
    """Every second utterance is heard with one word wrong; voices are told by the loudness."""
    import judges as judge
    said = []

    def transcribe(audio, rate=24000, asr="tiny.en"):
        said.append(len(audio))
        return "we are going home now"
    monkeypatch.setattr(judge, "transcribe", transcribe)
    monkeypatch.setattr(judge, "distill_mos", lambda audio, rate=24000: 1 + float(np.std(audio)))
    monkeypatch.setattr(judge, "speaker_embedding", lambda audio, rate=24000: np.pad(np.array([1.0, float(np.std(audio))], dtype=np.float32), (0, 254)))
    monkeypatch.setattr(judge, "pitch_error", lambda a, b: {"semitones": 0.5, "voicing_agreement": 0.9})
    return said


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two test conversations of four turns and their manifests."""
    import audio_io
    root = tmp_path_factory.mktemp("data")
    t = np.arange(int(1.2 * 24000)) / 24000
    rows = []
    for c in range(2):
        for i, text in enumerate(TEXTS):
            audio_io.write_audio(root / f"{c}{i}.flac", 0.1 * (1 + i % 2) * np.sin(2 * np.pi * (150 + 60 * (i % 2)) * t))
            words = [[0, 5, 0.1, 0.5], [6, len(text), 0.5, 1.1]]
            rows.append({"id": f"c{c}-{i}", "recording_id": f"c{c}", "start": 1.3 * i, "duration": 1.2, "text": text, "speaker": f"c{c}-{i % 2}",
                         "custom": {"turn_audio": f"{c}{i}.flac", "speaker_index": i % 2, "mood": "happy", "engine": "hibari", "character": f"c{c}-{i % 2}",
                                    "alignment": {"phones": "", "ends": [], "words": words}}})
    for split in ("train", "test"):
        path = root / "manifests" / split / "supervisions.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny untrained codec and model, as shipped folders."""
    import torch
    from architecture import CSM
    from checkpoint import save_codec, save_pretrained
    from config import CodecConfig, model_preset
    from rvq_tokenizer import Codec
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    codec = Codec(CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=32, latent=32, encoder_layers=1, latent_layers=1,
                              decoder_layers=3, num_mels=40))
    fingerprint = save_codec(codec.eval(), root / "codec")
    model = CSM(model_preset("test"))
    model.init_weights(torch.Generator().manual_seed(0))
    save_pretrained(model, root / "nano", codec_fingerprint=fingerprint)
    return root


def run(capsys, *words) -> dict:
    assert benchmark.main([str(w) for w in words]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


# ----------------------------------------------------------------------------- RESULTS.md

def test_sections_are_replaced_in_place_and_ordered():
    text = benchmark.INTRO
    for name in ("voice", "judges", "codec"):
        text = benchmark.replace_section(text, name, f"old {name}")
    again = benchmark.replace_section(text, "codec", "new codec")
    assert again == text.replace("old codec", "new codec")
    assert text.startswith(benchmark.INTRO.rstrip()) and [text.index(f"old {n}") for n in ("judges", "codec", "voice")] == sorted(text.index(f"old {n}") for n in ("judges", "codec", "voice"))
    assert benchmark.replace_section(again, "codec", "new codec") == again


def test_results_can_be_read_back(tmp_path):
    manifest = {"torch_threads": 1, "cpu": "a cpu", "cores": 2, "gpu": None, "time": "2026-01-02T03:04:05Z", "commit": "a" * 40 + "+", "versions": {"torch": "2"}}
    for value in (1.5, None):
        benchmark.write_section(tmp_path / "R.md", "speed", {"command": "c", "x": value}, "body", manifest)
    benchmark.write_section(tmp_path / "R.md", "codec", {"command": "c", "x": "</details>"}, "body", manifest)
    assert benchmark.read_results(tmp_path / "R.md") == {"speed": {"command": "c", "x": None}, "codec": {"command": "c", "x": "</details>"}}
    text = (tmp_path / "R.md").read_text()
    assert text.count("## Speed") == 1 and "2026-01-02, commit aaaaaaaaaaaa+, a cpu, 2 cores, 1 torch thread, torch 2" in text


def test_what_is_unknown_is_a_dash_or_null():
    assert benchmark.show(None) == "-" and benchmark.show({"mean": None, "low": None, "high": None}) == "-"
    assert benchmark.show({"mean": 0.123, "low": 0.1, "high": 0.2}, 2, True) == "12.3 % (10.0 % to 20.0 %)"
    assert benchmark.rounded({"a": [float("nan"), 1.23456789]}) == {"a": [None, 1.2346]}


# ----------------------------------------------------------------------------- test turns

def test_turns_are_drawn_repeatably_with_an_earlier_turn_of_the_speaker(data):
    one, two = (benchmark.pick_turns(data, "test", 3, 5, same_speaker_before=True) for _ in range(2))
    assert [(t[i]["id"]) for t, i in one] == [(t[i]["id"]) for t, i in two] and len(one) == 3
    assert all(any(b["speaker"] == turns[i]["speaker"] for b in turns[:i]) for turns, i in one)
    assert len(benchmark.pick_turns(data, "test", 99, 0)) == 8


def test_paired_difference():
    rows = [{"a": {"said": "one two", "heard": "one"}, "b": {"said": "one two", "heard": "one two"}}, {"a": {"said": "three", "heard": "three"}, "b": {"said": "three", "heard": "x"}}]
    assert benchmark.paired(rows, "a", "b")["mean"] == 0 and benchmark.paired(rows[:1], "a", "b")["mean"] == pytest.approx(0.5)


def test_original_texts_are_those_of_the_manifest():
    import synthetic_conversations
    import text_tokenizer
    plan = synthetic_conversations.Plan(3, "hibari", 0.0)
    script = plan.script(2)
    found = benchmark.original_texts({"source": "synthetic", "seed": 3, "engine": "hibari", "kokoro_share": 0.0, "conversations": 3}, {script.id})
    text = script.turns[0]["text"]
    assert found[f"{script.id}-00", text_tokenizer.normalise(text)] == text and text != text.lower() and benchmark.original_texts({}, set()) == {}


def test_gaps_are_from_word_to_word(data):
    from dataset_pipeline import read_supervisions
    gaps = benchmark.speech_gaps(read_supervisions(data, "train").values())
    assert len(gaps) == 6 and gaps[0] == pytest.approx(1.3 + 0.1 - 1.1)


# ----------------------------------------------------------------------------- the benches

def test_judges_bench(data, tmp_path, judges, capsys):
    result = run(capsys, "judges", "--data", data, "--turns", 4, "--results", tmp_path / "R.md")
    assert set(result["conditions"]) == {"as it is", "noise", "pieces"} and result["voice"]["separation"] is not None
    assert len(judges) == 12 and "told apart" in (tmp_path / "R.md").read_text()


def test_data_bench_stands_beside_the_plain_voice(data, tmp_path, judges, monkeypatch, capsys):
    import synthetic_conversations
    monkeypatch.setattr(synthetic_conversations, "unshaped", lambda text, engine: np.ones(30000, dtype=np.float32))
    monkeypatch.setattr(benchmark, "speaking_speed", lambda engine, texts, seed: 50.0)
    result = run(capsys, "data", "--data", data, "--turns", 6, "--results", tmp_path / "R.md")
    assert result["groups"]["all"]["shaped"]["n"] == 6 and set(result["groups"]) == {"all", "engine hibari", "kind dialogue"}
    assert result["groups"]["all"]["wer_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 6}          # both are heard alike here
    assert result["gaps"]["median_s"] == pytest.approx(0.3) and result["collection"]["hours"] is None


@pytest.fixture
def peers(monkeypatch):
    """One codec that is not installed, and one that gives the sound back in 1,000 bytes; no Mimi."""
    import benchmark_codec
    monkeypatch.setattr(benchmark_codec, "find_peers", lambda: {"codec2": "not installed (c2enc)", "opus": lambda audio: (audio[:-10], 1000)})
    monkeypatch.setattr(benchmark_codec, "mimi_speed", lambda sounds: {"encode": 2.0, "decode": 2.0, "both": 1.0})


def test_codec_bench(data, weights, tmp_path, judges, peers, capsys):
    flags = ("codec", "--data", data, "--codec", weights / "codec", "--turns", 3, "--results", tmp_path / "R.md")
    result = run(capsys, *flags)
    assert list(result["conditions"]) == ["input", "1", "2", "4", "8", "mixed", "codec2", "opus"] and len(judges) == 21 and result["human"] is None
    assert result["times_real_time"]["both"] > 0 and len(result["codebooks"]["entropy"]) == 8 and result["codebooks"]["source"] == "the turns above"
    said = [t[i]["text"] for t, i in benchmark.pick_turns(data, "test", 3, 0)]
    import judges
    assert result["conditions"]["1"]["wer"]["mean"] == pytest.approx(judges.word_error_rate(said, [TEXTS[0]] * 3)["wer"], abs=1e-4)
    assert result["conditions"]["4"]["bits_per_second"] == pytest.approx(4 * 6 * 12.5) and result["conditions"]["opus"]["bits_per_second"] == pytest.approx(8000 / 1.2, rel=1e-3)
    assert result["conditions"]["opus"]["voice"]["mean"] == pytest.approx(1.0) and result["conditions"]["opus"]["wer_over_input"]["mean"] == 0
    assert result["conditions"]["codec2"] == {"missing": "not installed (c2enc)"}
    by_name = {bar["what"]: bar for bar in result["bars"]}
    assert by_name["the same, times faster than Mimi's architecture"]["value"] == pytest.approx(result["times_real_time"]["both"], rel=1e-3)
    assert by_name["synthetic: word error with the first 8 alone, points above the input's own"]["met"] is True
    assert by_name["human: voice, cosine to the input"]["met"] is None
    run(capsys, *flags)
    text = (tmp_path / "R.md").read_text()
    assert text.count("## Codec") == 1 and benchmark.read_results(tmp_path / "R.md")["codec"]["fingerprint"] == result["fingerprint"]
    assert "| Codec2 3200 | not installed (c2enc) |" in text and "not measured" in text


def test_codec_bench_on_peoples_recordings(data, weights, tmp_path, judges, peers, capsys):
    import audio_io
    t = np.arange(int(2.5 * 24000)) / 24000
    for name in ("a", "deep/b", "beep", "star", "short"):
        audio_io.write_audio(tmp_path / "rec" / f"{name}.wav", 0.2 * np.sin(2 * np.pi * 200 * (t[:24000] if name == "short" else t)))
    (tmp_path / "texts").write_text("; a comment\na: We are going home now.\ndeep/b: We are home.\nbeep: [a long tone]\nstar: Press * or # now.\nshort: Go home now.\n")
    result = run(capsys, "codec", "--data", data, "--codec", weights / "codec", "--turns", 2, "--results", tmp_path / "R.md", "--recordings", tmp_path / "rec", "--transcripts", tmp_path / "texts")
    assert result["human_files"] == 2 and result["human"]["input"]["n"] == 2 and result["human"]["input"]["words"] == 8
    assert result["human"]["8"]["voice"]["mean"] is not None and "People's recordings (2 files)" in (tmp_path / "R.md").read_text()
    assert next(bar for bar in result["bars"] if bar["what"] == "human: voice, cosine to the input")["met"] is not None


def test_speed_bench_accounts_for_all_of_the_time(data, weights, tmp_path, capsys):
    result = run(capsys, "speed", "--data", data, "--codec", weights / "codec", "--checkpoint", weights / "nano", "--turns", 2, "--results", tmp_path / "R.md")
    stages = result["ms_per_frame"]
    assert set(stages) == {"backbone", "depth decoder", "codec decoder", "the rest"} and min(stages.values()) >= 0
    assert sum(stages.values()) == pytest.approx(1000 / result["frames_per_second"], rel=1e-3)
    assert result["real_time_factor"] == pytest.approx(sum(stages.values()) / 80, rel=1e-3)


# ----------------------------------------------------------------------------- cards

def test_cards_say_only_what_is_known(weights, tmp_path, capsys):
    made = run(capsys, "card", "--kind", "nano", "--folder", weights / "nano", "--metrics", tmp_path / "none.jsonl", "--collection", tmp_path / "none.json", "--results", tmp_path / "R.md",
               "--besides", "2 h of prompts (CC-BY-SA-3.0)")
    card = (weights / "nano" / "README.md").read_text()
    assert card.count("2 h of prompts (CC-BY-SA-3.0)") == 2 and "| besides |" in card
    assert "| data | not measured |" in card and "| steps | not measured |" in card and "Not measured with these weights" in card
    assert "Apache-2.0" in card and "`test`" in card and made["parameters"] > 0 and "Its ear" not in card


def test_the_card_says_how_the_ear_was_trained(weights, tmp_path, capsys):
    folder = tmp_path / "heard"
    shutil.copytree(weights / "nano", folder)
    about = json.loads((folder / "config.json").read_text())
    run_of, deaf = {"steps": 1500, "hours": 9.25, "minutes": 24.5, "validation": {"word_error": 0.3}}, "d" * 64
    (folder / "config.json").write_text(json.dumps(about | {"ear": run_of | {"steps": 2400, "from": "e" * 64, "before": run_of | {"from": deaf}}}))
    results = {"command": "python benchmark.py ear", "weights": {"path": "x", "sha256": about["sha256"][:16]}, "sets": {}, "shown": {"characters never trained on": [{"said": "hello", "words": "hallo"}]}, "bars": []}
    moods = {"command": "python benchmark.py conversations", "weights": {"path": "x", "sha256": deaf[:16]}, "conditions": {"model": {"mood": {"accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6}, "chance": 0.2}}}}
    strange = {"command": "python benchmark.py replies", "weights": {"path": "x", "sha256": "f" * 16}, "bars": [{"what": "answers", "bar": "at least 90", "value": 95.0, "met": True}]}
    sections = {"ear": results, "conversations": moods, "replies": strange}
    (tmp_path / "R.md").write_text("".join(f"<!-- begin {k} -->\n## {k}\n\n```json\n{json.dumps(v)}\n```\n<!-- end {k} -->\n" for k, v in sections.items()))
    run(capsys, "card", "--kind", "nano", "--folder", folder, "--metrics", tmp_path / "none.jsonl", "--collection", tmp_path / "none.json", "--results", tmp_path / "R.md")
    card = (folder / "README.md").read_text()
    assert "1,500 steps on 9.2 h" in card and "; then 2,400 steps" in card and "| hello | hallo |" in card and "Printed by `python benchmark.py ear`" in card
    assert "(chance 20.0)" in card and "| conversations |" in card, "an ear changes nothing of what the model says, so what was measured before it stands"
    assert "answers" not in card, "what other weights did does not"


def test_cards_use_results_of_the_same_weights_only(data, weights, tmp_path, judges, peers, capsys):
    run(capsys, "codec", "--data", data, "--codec", weights / "codec", "--turns", 2, "--results", tmp_path / "R.md")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "minutes": 30, "mel": 0.5, "phones": 1.25}\n')
    (tmp_path / "collection.json").write_text('{"hours": 2.5, "engine_shares": {"hibari": 0.9, "kokoro": 0.1}, "texts": "my_texts.txt"}')
    flags = ("card", "--kind", "codec", "--folder", weights / "codec", "--metrics", tmp_path / "metrics.jsonl", "--collection", tmp_path / "collection.json", "--results", tmp_path / "R.md")
    run(capsys, *flags)
    card = (weights / "codec" / "README.md").read_text()
    assert "| first 2 |" in card and "2.5 h" in card and "kokoro 10 %" in card and "| steps | 10 |" in card and "30 min 0 s" in card and "| sentences read | my_texts.txt |" in card and "phones 1.250" in card
    (tmp_path / "R.md").write_text((tmp_path / "R.md").read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    run(capsys, *flags)
    assert "Not measured with these weights" in (weights / "codec" / "README.md").read_text()


# ----------------------------------------------------------------------------- plain errors

@pytest.mark.parametrize("words", [("voice", "--data", "nowhere"), ("judges", "--turns", "1"), ("card", "--kind", "nano", "--folder", "nowhere"), ("codec", "--codec", "nowhere")])
def test_bad_input_is_one_line(words, data, tmp_path, capsys):
    words = [*words] + (["--data", str(data)] if words[0] != "card" and "--data" not in words else [])
    assert benchmark.main([*words, "--results", str(tmp_path / "R.md")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "R.md").exists()


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["voice", "--turnz", "3"])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
