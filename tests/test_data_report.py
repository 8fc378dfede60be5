"""The page of what was collected, the plan of many hours, the script that is recorded."""
import json

import numpy as np
import pytest

import audio_io
import collect_data as cd
import data_plan
import data_report
import record_script
from people_speech import spoken


# ----------------------------------------------------------------------------- the page

def turn(start, end, speaker, words=None):
    return {"start": start, "duration": end - start, "speaker": speaker, "custom": {"alignment": {"words": words} if words else None}}


def test_floor_transfers_by_hand():
    turns = [turn(0, 2, "a"), turn(2.5, 4, "b"), turn(3.5, 6, "a"), turn(4, 4.5, "b"), turn(6.1, 7, "a"), turn(7, 8, "b")]
    assert data_report.floor_transfers(turns) == pytest.approx([0.5, -0.5, 0.0])       # a "mhm" within takes no floor, nor does the same speaker
    quiet = data_report.spoken(turn(10, 14, "a", [[0, 2, 0.5, 1.0], [3, 5, 1.0, 3.0]]))
    assert (quiet["start"], quiet["duration"]) == (10.5, 2.5)


@pytest.fixture
def collected(tmp_path):
    mine = tmp_path / "mine/talk"
    for k in range(4):
        audio_io.write_audio(mine / f"{k}_{'ann' if k % 2 else 'ben'}.wav", spoken()[k])
        (mine / f"{k}_{'ann' if k % 2 else 'ben'}.txt").write_text(f"<Line> number {k}.")
    (tmp_path / "mine/broken.wav").write_bytes(b"")
    assert cd.main(["--source", "folder", "--path", str(tmp_path / "mine"), "--output", str(tmp_path / "out"), "--listen", "never", "--no_filters", "--licence", "CC0 <1.0>"]) == 0
    return tmp_path / "out"


def test_the_page_says_what_is_there(collected, tmp_path, capsys):
    assert cd.main(["report", "--data", str(collected), "--output", str(tmp_path / "page.html"), "--samples", "2"]) == 0
    page, hours = (tmp_path / "page.html").read_text(), sum(map(len, spoken()[:4])) / 24000 / 3600
    assert f"{hours:.2f} hours of speech, 4 turns, 1 conversations, 2 speakers" in page and "CC0 &lt;1.0&gt;" in page and "<1.0>" not in page
    assert "3 changes of speaker: median 0.20 s" in page and "empty file" in page and "broken.wav" in page
    assert page.count("<audio") == 2 and page.count("data:image/png") == 4 and "ann" in page
    assert "http" not in page.replace("http-equiv", "")                    # nothing is fetched
    facts = data_report.gather([collected, collected], 1)
    assert facts.turns == 8 and facts.seconds["speaker"]["ann"] == pytest.approx(2 * (len(spoken()[1]) + len(spoken()[3])) / 24000)


def test_a_page_of_nothing(tmp_path, capsys):
    assert cd.main(["report", "--data", str(tmp_path), "--output", str(tmp_path / "p.html")]) == 2 and "collect data first" in capsys.readouterr().err


def test_samples_and_values_are_fair_draws():
    import random
    rng, values = random.Random(0), []
    old, data_report.MOST_VALUES = data_report.MOST_VALUES, 100
    try:
        for k in range(1, 5001):
            data_report._keep(values, float(k), rng, k)
    finally:
        data_report.MOST_VALUES = old
    assert len(values) == 100 and 2000 < np.mean(values) < 3000


# ----------------------------------------------------------------------------- the plan

def results(path, **rates):
    body = {"rates": {"channels": 20.0, "voices": 10.0, "asr": 5.0, "filters": 40.0, "tokens": 50.0} | rates, "bytes_per_hour": {"flac": 2e8, "manifests": 1e6, "tokens": 3e6}}
    path.write_text(f"<!-- begin people -->\n2026-01-01, commit abc, some CPU\n\n```json\n{json.dumps(body)}\n```\n<!-- end people -->\n")
    return path


def test_the_plan_is_the_rates_multiplied(tmp_path, capsys):
    path = results(tmp_path / "R.md")
    assert cd.main(["plan", "--hours", "1000", "--cores", "10", "--price", "0.5", "--kept", "0.5", "--transcribed", "0.2", "--split_channels", "0.5", "--results", str(path), "--output", str(tmp_path / "plan.md")]) == 0
    plan = data_plan.Plan(1000, 10, 0.5, 0.5, 0.2, 0.5)
    spent = data_plan.core_hours(plan, data_plan.read_rates(path)["rates"])
    assert list(spent.values()) == pytest.approx([25, 50, 160, 25, 10])
    text = (tmp_path / "plan.md").read_text()
    assert "| **all** | 3.70 | 270 | 1.12 | 135 |" in text and "| **all** | 102 |" in text and "some CPU" in text and text in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [(["--kept", "2"], "--kept"), (["--cores", "0"], "--cores"), (["--price", "-1"], "--price"), (["--results", "none.md"], "benchmark.py people")])
def test_plans_that_cannot_be_made(flags, said, tmp_path, capsys):
    path = results(tmp_path / "R.md")
    assert cd.main(["plan", "--results", str(path), "--output", str(tmp_path / "p.md"), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and not (tmp_path / "p.md").exists()


# ----------------------------------------------------------------------------- the recorder

class Microphone:
    """Says one line after the other, with silence before and after it; a stand-in for audio_io.Microphone."""
    takes, opened = [], 0

    def __enter__(self):
        self.sound = np.pad(self.takes[type(self).opened], (12000, 24000 * 4)) + np.random.default_rng(0).normal(0, 1e-4, len(self.takes[type(self).opened]) + 24000 * 4 + 12000)
        type(self).opened += 1
        return self

    def __exit__(self, *exc):
        pass

    def __iter__(self):
        self.given = 0
        for at in range(0, len(self.sound), 1920):
            self.given = at
            yield self.sound[at:at + 1920].astype(np.float32)


@pytest.fixture
def microphone():
    Microphone.takes, Microphone.opened = list(spoken()), 0
    return Microphone


def test_a_take_ends_with_its_speech(microphone):
    with microphone() as opened:
        audio = record_script.take(opened)
    assert abs(len(audio) / 24000 - len(spoken()[0]) / 24000 - 2 * record_script.KEPT_SILENCE) < 0.15
    assert opened.given < len(opened.sound) - 24000                        # it did not wait for the end
    assert record_script.complaint(audio[:0]) and "loud" in record_script.complaint(audio * 100) and "quiet" in record_script.complaint(0.001 * audio) and not record_script.complaint(audio)


def test_recording_keeps_repeats_skips_and_goes_on(microphone, tmp_path):
    lines, said = ["The first line of it.", "The second line of it.", "The third line of it."], []
    answers = iter(["", "r", "", "", "s", "q"])                            # record, again; record, keep; skip the second; enough
    assert record_script.record(lines, tmp_path, microphone, lambda prompt: next(answers), said.append) == 1
    first = record_script.place_of(tmp_path, 0)
    assert first.with_suffix(".txt").read_text() == lines[0] and not record_script.place_of(tmp_path, 1).exists() and microphone.opened == 2
    answers = iter(["", "", "", ""])
    assert record_script.record(lines, tmp_path, microphone, lambda prompt: next(answers), said.append) == 3 and microphone.opened == 4
    with pytest.raises(ValueError, match="nothing was recorded"):
        record_script.record(lines, tmp_path / "none", microphone, lambda prompt: "q", said.append)


def test_what_was_recorded_is_collected(microphone, tmp_path, monkeypatch):
    (tmp_path / "script.txt").write_text("\n".join(f"This is line number {k} of it." for k in range(3)))
    real = record_script.record
    monkeypatch.setattr(record_script, "record", lambda lines, folder: real(lines, folder, microphone, lambda prompt: "", lambda text: None))
    assert cd.main(["--source", "record", "--script", str(tmp_path / "script.txt"), "--output", str(tmp_path / "out"), "--language", ""]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/index.jsonl").read_text().splitlines()[1:]]
    assert [t["text"] for t in rows[0]["turns"]] == ["this is line number zero of it.", "this is line number one of it.", "this is line number two of it."]
    assert {t["speaker"] for t in rows[0]["turns"]} == {"me"} and cd.main(["--source", "record", "--script", "none.txt", "--output", str(tmp_path / "o")]) == 2


def test_the_default_script_can_be_spoken():
    lines = record_script.script_lines()
    assert 50 < len(lines) <= record_script.LINES and len(set(lines)) == len(lines)
