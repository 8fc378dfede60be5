"""The report: everything inside one file, true to its inputs, whole when parts are missing."""
import json
import re

import numpy as np
import pytest

import report

RATE = 24000


def write(folder, conversations):
    import audio_io
    folder.mkdir(parents=True, exist_ok=True)
    t = np.arange(RATE) / RATE
    for conversation in conversations:
        for turn in conversation["turns"]:
            if turn["audio"]:
                audio_io.write_audio(folder / turn["audio"], 0.3 * np.sin(2 * np.pi * 200 * t), RATE)
    (folder / "results.json").write_text(json.dumps({"conversations": conversations, "model": "checkpoints/best_model.pt", "device": "cpu", "seed": 0}))


def turn(speaker, text, audio, **more):
    return {"speaker": speaker, "text": text, "audio": audio, "duration_s": 1.0, "first_audio_ms": 90.0, "total_ms": 400.0, "ended": True} | more


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A single turn and a conversation; the ASR is a table so that the test says what was heard."""
    import judges as judge
    texts = iter(["good morning", "how were you", "", "i am fine"])
    monkeypatch.setattr(judge, "transcribe", lambda audio, rate, asr="tiny.en": next(texts))
    monkeypatch.setattr(judge, "distill_mos", lambda audio, rate: 3.5)
    voices = iter([(1, 0), (1, 0), (0, 1), (1, 0)])
    monkeypatch.setattr(judge, "speaker_embedding", lambda audio, rate=RATE: np.pad(np.array(next(voices), dtype=np.float32), (0, 254)))
    write(tmp_path / "demo", [
        {"id": "greeting", "audio": "g.wav", "turns": [turn("Mia", "Good morning!", "g.wav", mood="happy")]},
        {"id": "a_talk", "audio": None, "turns": [turn("Mia", "How are you?", "t1.wav"), turn("T<om>", "Fine.", "t2.wav", ended=False, first_audio_ms=None),
                                                  turn("Mia", "I am fine.", "t3.wav", total_ms=1500.0)]}])
    return tmp_path


def run(folder, *flags) -> tuple[str, dict]:
    page = folder / "out" / "report.html"
    assert report.main(["--output", str(page), "--demo", str(folder / "demo"), "--checkpoints", str(folder / "ckpt"), "--steps", str(folder / "steps"), *flags]) == 0
    return page.read_text(encoding="utf-8"), json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


def test_page_holds_every_turn_and_needs_nothing_else(demo):
    text, _ = run(demo)
    assert text.count("data:audio/mpeg;base64,") == 4 and text.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(https?:)?//', text) and "@import" not in text and "url(" not in text
    for said in ("Good morning!", "How are you?", "Fine.", "I am fine."):
        assert said in text
    assert "T&lt;om&gt;" in text and "T<om>" not in text
    assert "prefers-color-scheme:dark" in text


def test_differences_are_marked_and_counted(demo):
    text, numbers = run(demo)
    assert "<del>are</del>&#8201;<ins>were</ins>" in text and "every word" in text
    assert numbers["summary"]["wer"]["wer"] == pytest.approx(2 / 9)            # are/were, and "fine" not heard, of 9 words
    assert [t["heard"] for t in numbers["conversations"][1]["turns"]] == ["how were you", "", "i am fine"]


def test_latency_voices_and_endings(demo):
    text, numbers = run(demo)
    summary = numbers["summary"]
    assert summary["first_audio_ms"] == 90 and summary["real_time_factor"] == pytest.approx(0.4) and summary["ended"] == 3 and summary["generated"] == 4
    assert summary["same_voice"] == pytest.approx(1) and summary["other_voice"] == pytest.approx(0)
    assert "did not end by itself" in text and 'class="bar over"' in text      # 1.5 s for 1 s of speech


def test_training_and_steps(tmp_path):
    (tmp_path / "ckpt").mkdir()
    rows = [{"step": s, "loss": 7.0 - s / 50, "c0": 6.9 - s / 50} for s in range(0, 100, 2)] + [
        {"step": s, "validation_loss": 5.4, "validation_per_codebook": [4.0, 5.0, v]} for s, v in ((0, 6.93), (90, 5.5))]
    (tmp_path / "ckpt" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "train.json").write_text(json.dumps({"name": "train", "seconds": 330, "peak_memory_mb": 3900}))
    (tmp_path / "steps" / "setup.json").write_text(json.dumps({"name": "setup", "state": "done", "seconds": 20}))
    (tmp_path / "steps" / "demo.json").write_text(json.dumps({"name": "demo", "state": "running", "seconds": 77}))
    text, _ = run(tmp_path)
    assert "first codebook" in text and "validation" in text and "5.40" in text and "5.5 min" in text and "3,900 MB" in text
    assert "by codebook" in text and "6.93" in text and "5.50" in text
    assert text.index("</i>setup") < text.index("</i>train") and "77 s" not in text       # in order, finished steps only


def test_samples_of_a_training_stand_over_its_steps(tmp_path):
    import audio_io
    for step in range(0, 700, 100):
        folder = tmp_path / f"ckpt/samples/step_{step:06d}"
        folder.mkdir(parents=True)
        audio_io.write_audio(folder / "1.wav", 0.3 * np.sin(np.arange(RATE // 2) / 10), RATE)
        (folder / "samples.json").write_text(json.dumps([{"text": "A <held> line.", "audio": "1.wav", "ended": step > 0}, {"text": "gone", "audio": "2.wav", "ended": True}]))
    rows = [{"step": s, "kind": "evaluation", "evaluation/words": w, "evaluation/mood": None, "evaluation/seconds": 3.0} for s, w in ((100, 0.25), (600, 0.75))]
    (tmp_path / "ckpt/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"step": 0, "loss": 1.0}, *rows]))
    text, _ = run(tmp_path)
    assert text.count("data:audio/mpeg") == 5 and re.findall(r"<figcaption>step (\d+)", text) == ["0", "200", "300", "400", "600"]         # the first and the last among them
    assert "A &lt;held&gt; line." in text and "gone" not in text and text.count("(cut off)") == 1 and 'href="#samples"' in text
    assert "score: words" in text and ">0.75<" in text and "score: mood" not in text and "score: seconds" not in text
    assert 'id="samples"' not in run(tmp_path / "none")[0]


def test_empty_folder_gives_a_page_that_says_not_yet(tmp_path):
    text, numbers = run(tmp_path)
    assert text.count("Not yet.") == 3 and "python demo.py --mode test" in text and numbers["conversations"] == []
    assert "Commit" in text and "NaN" not in text


def test_given_turns_and_missing_sound(tmp_path):
    given = turn("user", "Hello.", None, first_audio_ms=None, total_ms=None, ended=True)
    write(tmp_path / "demo", [{"id": "c", "audio": None, "turns": [given, turn("bot", "Hi.", "gone.wav")]}])
    (tmp_path / "demo" / "gone.wav").unlink()
    text, numbers = run(tmp_path, "--no_judges")
    assert "given, not generated" in text and text.count("No sound was written") == 2
    assert numbers["summary"]["wer"] is None and numbers["summary"]["generated"] == 1 and "wrote down" not in text


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("x")
    assert report.main(["--demo", str(tmp_path / "x.txt"), "--output", str(tmp_path / "r.html")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "{}"])
def test_malformed_results_are_one_line(tmp_path, capsys, content):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text(content)
    assert report.main(["--demo", str(tmp_path / "demo"), "--output", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "r.html").exists()


def test_png_is_a_picture_of_the_sound():
    import struct
    import zlib
    t = np.arange(RATE) / RATE
    tone = np.where(t < 0.5, np.sin(2 * np.pi * 3000 * t), 0.0)
    data = report.spectrogram_png(tone, RATE, 100, 60)
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (100, 60)
    at = data.index(b"IDAT")
    size = struct.unpack(">I", data[at - 4:at])[0]
    pixels = np.frombuffer(zlib.decompress(data[at + 4:at + 4 + size]), dtype=np.uint8).reshape(60, 101)[:, 1:]
    assert pixels[:, 60:].max() == 0                                           # silence is dark
    row = int(pixels[:, 25].argmax())                                          # 3 kHz on the mel axis of 0..8 kHz, top row first
    assert 59 - row == pytest.approx(59 * np.log10(1 + 3000 / 700) / np.log10(1 + 8000 / 700), abs=2)


def test_metric_names_are_sorted_into_curves():
    total, terms = report.metric_series([{"step": 0, "validation_loss": 9.0}, {"step": 1, "loss": 3.0, "val/loss": 4.0, "lr": 1.0, "depth": 2.0, "val_c0": 5.0, "depth_per_codebook": [1, 2]}])
    assert total == {"training": [(1, 3.0)], "validation": [(0, 9.0), (1, 4.0)]} and list(total) == ["training", "validation"]
    assert terms == {"depth": {"training": [(1, 2.0)]}, "c0": {"validation": [(1, 5.0)]}}
