"""The bench of a new voice: its recordings, its numbers on made-up rows, and the whole of it with an untrained model."""
import random

import pytest

import benchmark
import benchmark_personal as personal
import synthetic_conversations as synthetic
import test_benchmark

data, weights, judges = test_benchmark.data, test_benchmark.weights, test_benchmark.judges


def test_texts_are_fit_to_be_said_once_each_and_the_splits_share_none():
    train, test = personal.texts_of("train", 0), personal.texts_of("test", 0)
    assert len(set(train)) == len(train) > 1000 and len(set(test)) == len(test) > 50 and not set(train) & set(test)
    assert personal.texts_of("test", 0) == test != personal.texts_of("test", 1)
    assert all(personal.LENGTH[0] <= len(t.split()) <= personal.LENGTH[1] for t in test)


def test_a_seed_names_a_voice():
    assert personal.new_character("hibari", 0) == personal.new_character("hibari", 0) != personal.new_character("hibari", 1)
    assert personal.new_character("hibari", 0) not in [synthetic.draw_character("x", "hibari", random.Random(k)) for k in range(20)]


def test_recordings_are_a_folder_that_train_lora_takes(tmp_path):
    import recordings
    sounds = personal.record(personal.new_character("hibari", 3), tmp_path, 0.1, 3)
    wavs, texts = sorted(tmp_path.glob("*.wav")), sorted(tmp_path.glob("*.txt"))
    assert recordings.is_recordings(tmp_path) and len(wavs) == len(texts) == len(sounds) and 6 <= sum(map(len, sounds)) / 24000 < 16
    assert [p.read_text().strip() for p in texts] == personal.texts_of("train", 3)[:len(texts)]
    assert [len(s) for s in personal.person(tmp_path)] == [len(s) for s in sounds]


def test_what_is_lost_is_a_paired_difference():
    before, after = [{"voice": 0.9}, {"voice": 0.8}, {"voice": None}], [{"voice": 0.88}, {"voice": 0.82}, {"voice": 0.5}]
    found = personal.lost(before, after)
    assert found["mean"] == pytest.approx(0.0) and found["n"] == 2
    bars = personal.bars({"conditions": {"after": {"voice": {"mean": 0.86}}}, "lost": {"mean": 0.05}})
    assert [b["met"] for b in bars] == [True, False]
    assert not any(b["met"] for b in personal.bars({"conditions": {"after": {}}, "lost": {"mean": None}}))


def test_the_whole_of_it(data, weights, tmp_path, judges, capsys):
    result = test_benchmark.run(capsys, "personal", "--data", data, "--codec", weights / "codec", "--checkpoint", weights / "nano", "--turns", 2, "--minutes", 0.25, "--steps", 1,
                                "--threads", 1, "--save", tmp_path / "work", "--results", tmp_path / "R.md")
    assert set(result["conditions"]) == {"source", "before", "after"} and result["conditions"]["after"]["n"] == 2 and result["other_voices"]["after"]["n"] == 2
    assert result["seconds"] >= 15 and result["adapter_mb"] > 0 and (tmp_path / "work" / "adapter" / "adapter" / "adapter.safetensors").exists()
    text = (tmp_path / "R.md").read_text()
    assert "A voice of one's own" in text and "with the adapter" in text and benchmark.read_results(tmp_path / "R.md")["personal"] == result


@pytest.mark.parametrize("words", [("--minutes", "0"), ("--steps", "0"), ("--recordings", "nowhere")])
def test_bad_input_is_one_line(data, weights, words, tmp_path, capsys):
    assert benchmark.main(["personal", "--data", str(data), "--codec", str(weights / "codec"), "--checkpoint", str(weights / "nano"), "--turns", "2", *words, "--results", str(tmp_path / "R.md")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words[1].strip("0") in error and not (tmp_path / "R.md").exists()
