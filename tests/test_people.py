"""Recordings of people: folders, transcripts beside them, dirt, filters, resuming, and what becomes of them on the disk."""
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio_io
import collect_data as cd
import filters
import people
import segmentation as sg
from people_speech import LINES, conversation, spoken, trimmed


PATIENCE = 300      # seconds; only a busy machine needs more than a few


@pytest.fixture
def heard(monkeypatch):
    """A recogniser that knows the lines by their sound, so that no test waits for the real one."""
    def bits(audio):
        return np.unpackbits(np.frombuffer(bytes.fromhex(filters.fingerprint(audio, 24000)), np.uint8))
    known = [bits(a) for a in spoken()]

    def listen(audio, rate, asr="tiny.en", language="en"):
        tight = trimmed(np.where(np.abs(audio) > 0.02 * np.abs(audio).max(), audio, 0.0))
        k = int(np.argmin([np.mean(bits(tight) != mark) for mark in known]))
        words = LINES[k].split()
        step = len(audio) / rate / len(words)
        return sg.Heard(LINES[k], [(w, n * step, (n + 1) * step) for n, w in enumerate(words)], 0.8, 0.0)
    monkeypatch.setattr(sg, "listen", listen)
    monkeypatch.setattr(people, "prepare", lambda options: None)


def collect(source, out, *flags):
    return cd.main(["--source", "folder", "--path", str(source), "--output", str(out), *flags])


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def turns(out):
    return sorted((t for split in cd.SPLITS for t in lines(out / "manifests" / split / "supervisions.jsonl.gz")), key=lambda t: (t["recording_id"], t["start"]))


def summary(out):
    return json.loads((out / "collection.json").read_text())


# ----------------------------------------------------------------------------- from recordings to conversations

def test_a_two_channel_recording_becomes_turns_with_overlaps(heard, tmp_path):
    sound, truth = conversation()
    (tmp_path / "mine").mkdir()
    soundfile.write(tmp_path / "mine/call.flac", sound.T, 24000)
    assert collect(tmp_path / "mine", tmp_path / "out", "--licence", "CC0") == 0
    found = turns(tmp_path / "out")
    assert [t["text"] for t in found] == [people._speakable(line) for line in LINES] and [t["custom"]["speaker_index"] for t in found] == [0, 1, 0, 1, 0, 1]
    first = found[0]["start"] - truth[0][0]
    assert all(abs(t["start"] - first - a) < 0.12 for t, (a, *_) in zip(found, truth)) and found[3]["start"] < found[2]["start"] + found[2]["duration"]
    custom = found[0]["custom"]
    assert custom["licence"] == "CC0" and custom["alignment"]["words"][0][:2] == [0, 3] and custom["quality"]["confidence"] == 0.8 and custom["f0_median"] > 100
    assert (tmp_path / "out/filters.png").stat().st_size > 1000
    mix = audio_io.read_audio(tmp_path / "out" / lines(tmp_path / "out/manifests/train/recordings.jsonl.gz")[0]["sources"][0]["source"])
    assert abs(len(mix) / 24000 - (truth[-1][1] - truth[0][0])) < 0.4
    import pyloudnorm
    own = np.concatenate([audio_io.read_audio(tmp_path / "out" / t["custom"]["turn_audio"]) for t in found[::2]])
    assert pyloudnorm.Meter(24000).integrated_loudness(own.astype(float)) == pytest.approx(-23, abs=1.0)


def test_formats_and_transcripts_beside(heard, tmp_path):
    """WAV, FLAC, MP3, Ogg, Opus; .txt, .json, .vtt, .srt."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for k, (name, form) in enumerate((("a.wav", {}), ("b.flac", {}), ("c.mp3", {}), ("d.ogg", {}), ("e.opus", {"format": "OGG", "subtype": "OPUS"}))):
        soundfile.write(mine / name, spoken()[k], 24000, **form)
    (mine / "a.txt").write_text(LINES[0])
    (mine / "b.json").write_text(json.dumps({"text": LINES[1]}))
    sound, truth = conversation()
    for name in ("s1", "s2", "s3"):
        soundfile.write(mine / f"{name}.wav", sound.T * (0.5 + 0.1 * int(name[1])), 24000)
    def clock(x, mark=","):
        return f"00:00:{int(x):02d}{mark}{int(x % 1 * 1000):03d}"
    (mine / "s1.json").write_text(json.dumps([{"start": a, "end": b, "speaker": "Ann" if c == 0 else "Ben", "text": x} for a, b, c, x in truth]))
    (mine / "s2.vtt").write_text("WEBVTT\n\n" + "\n\n".join(f"{clock(a, '.')} --> {clock(b, '.')}\n<v {'Ann' if c == 0 else 'Ben'}>{x}" for a, b, c, x in truth))
    (mine / "s3.srt").write_text("\n\n".join(f"{k}\n{clock(a)} --> {clock(b)}\n{'Ann' if c == 0 else 'Ben'}: {x}" for k, (a, b, c, x) in enumerate(truth, 1)))
    (mine / "notes.docx").write_text("not a recording")
    assert collect(mine, tmp_path / "out", "--no_filters") == 0
    found = turns(tmp_path / "out")
    said = {name: [(t["speaker"], t["text"]) for t in found if t["recording_id"] == name] for name in ("a", "b", "c", "d", "e", "s1", "s2", "s3")}
    assert [said[n][0][1] for n in "abcde"] == [people._speakable(line) for line in LINES[:5]]
    wanted = [("Ann" if c == 0 else "Ben", people._speakable(x)) for _, _, c, x in truth]
    assert said["s1"] == said["s2"] == said["s3"] == wanted


def test_long_recordings_are_worked_on_in_stretches(heard, tmp_path, monkeypatch):
    sound, truth = conversation()
    (tmp_path / "mine").mkdir()
    soundfile.write(tmp_path / "mine/long.wav", np.concatenate([sound.T] * 3), 24000)
    whole = len(sound[0]) / 24000
    monkeypatch.setattr(people, "BLOCK", whole)
    assert collect(tmp_path / "mine", tmp_path / "out", "--no_filters") == 0
    found = turns(tmp_path / "out")
    assert {t["recording_id"] for t in found} == {"long-b000", "long-b001", "long-b002"} and len(found) == 3 * len(LINES)
    assert len({cut["id"] for split in cd.SPLITS for cut in lines(tmp_path / "out/manifests" / split / "cuts.jsonl.gz")}) == 3
    splits = {row["split"] for row in map(json.loads, (tmp_path / "out/index.jsonl").read_text().splitlines()[1:])}
    assert len(splits) == 1                                                # no recording is in two splits


def test_parts_share_a_folder_out(heard, tmp_path):
    (tmp_path / "mine").mkdir()
    for k, audio in enumerate(spoken()):
        soundfile.write(tmp_path / f"mine/f{k}.wav", audio, 24000)
    for part in (1, 2):
        assert collect(tmp_path / "mine", tmp_path / f"o{part}", "--part", f"{part}/2", "--no_filters") == 0
    ids = [{t["recording_id"] for t in turns(tmp_path / f"o{part}")} for part in (1, 2)]
    assert ids[0] | ids[1] == {f"f{k}" for k in range(6)} and not ids[0] & ids[1]


# ----------------------------------------------------------------------------- dirt

def test_dirty_files_are_counted_and_named_and_never_fatal(heard, tmp_path, capsys):
    mine, (sound, _), line = tmp_path / "mine", conversation(), spoken()[0]
    mine.mkdir()
    soundfile.write(mine / "good.wav", spoken()[1], 24000)
    (mine / "empty.wav").write_bytes(b"")
    soundfile.write(mine / "nothing.wav", np.zeros(0), 24000)
    (mine / "corrupt.flac").write_bytes(b"fLaC" + bytes(range(256)) * 20)
    (mine / "words.mp3").write_text("this is no sound at all")
    soundfile.write(mine / "silent.wav", np.zeros(48000), 24000)
    soundfile.write(mine / "eight_bit.wav", spoken()[2], 24000, subtype="PCM_U8")
    soundfile.write(mine / "fast.wav", audio_io.resample(spoken()[3], 24000, 96000), 96000)
    soundfile.write(mine / "eight.wav", np.stack([sound.sum(0)] * 8).T, 24000)
    soundfile.write(mine / "wrong.wav", spoken()[4], 24000, format="FLAC")
    soundfile.write(mine / "no_ending", spoken()[5], 24000, format="WAV")
    soundfile.write(mine / "cut.wav", np.stack([line, line]).T, 24000)
    (mine / "cut.wav").write_bytes((mine / "cut.wav").read_bytes()[:-len(line) * 2])
    soundfile.write(mine / "bad_text.wav", line, 24000)
    (mine / "bad_text.txt").write_bytes(b"\xff\xfe\x00x")
    soundfile.write(mine / "bad_json.wav", line, 24000)
    (mine / "bad_json.json").write_text("{]")
    soundfile.write(mine / "dots.wav", line, 24000)
    (mine / "dots.txt").write_text("...")
    assert collect(mine, tmp_path / "out", "--no_filters") == 0
    said, facts = capsys.readouterr().out, summary(tmp_path / "out")
    files, notes = facts["left_out"]["files"], facts["notes"]
    assert files == {"empty file": [1, ["empty.wav"]], "no sound in it": [1, ["nothing.wav"]], "not a readable audio file": [2, ["corrupt.flac", "words.mp3"]], "silent": [1, ["silent.wav"]],
                     "its transcript is not UTF-8 text": [1, ["bad_text.wav"]], "its transcript cannot be read": [1, ["bad_json.wav"]]}
    assert {k: v[1] for k, v in notes.items()}.items() >= {"8 bit": ["eight_bit.wav"], "96 kHz": ["fast.wav"], "8 channels": ["eight.wav"], "named .wav": ["wrong.wav"], "named without an ending": ["no_ending"]}.items()
    assert {"good", "eight_bit", "fast", "eight", "wrong", "no_ending"} <= {t["recording_id"] for t in turns(tmp_path / "out")}
    assert "empty.wav" in said and "8 channels: eight.wav" in said and "no speakable text" in said
    lost = lines(tmp_path / "out/dropped.jsonl.gz")
    assert sum("file" in x for x in lost) == 7 and facts["left_out"]["turns"]["no speakable text"] == 1


def test_nothing_usable_is_one_line_that_says_why(heard, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.wav").write_bytes(b"")
    assert collect(tmp_path / "mine", tmp_path / "out") == 2
    err = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert err.startswith("error: nothing usable") and "empty file" in err and "a.wav" in err and "--no_filters" in err


# ----------------------------------------------------------------------------- filters at work

def test_noise_repeats_and_foreign_speech_are_left_out(heard, tmp_path):
    mine, rng = tmp_path / "mine", np.random.default_rng(0)
    mine.mkdir()
    for k in range(3):
        soundfile.write(mine / f"a{k}.wav", spoken()[k], 24000)
        (mine / f"a{k}.txt").write_text(LINES[k])
    soundfile.write(mine / "b_again.mp3", 0.4 * spoken()[0], 24000)
    (mine / "b_again.txt").write_text(LINES[0])
    loud = np.sqrt(np.mean(spoken()[3] ** 2))
    soundfile.write(mine / "c_noisy.wav", np.pad(spoken()[3], 12000) + rng.normal(0, loud, len(spoken()[3]) + 24000), 24000)
    (mine / "c_noisy.txt").write_text(LINES[3])
    soundfile.write(mine / "d_spanish.wav", spoken()[4], 24000)
    (mine / "d_spanish.txt").write_text("muchas gracias por todo lo que has hecho hoy por nosotros")
    assert collect(mine, tmp_path / "out") == 0
    assert {t["recording_id"] for t in turns(tmp_path / "out")} == {"a0", "a1", "a2"}
    assert summary(tmp_path / "out")["left_out"]["turns"] == {"said before": 1, "too noisy": 1, "another language": 1}
    again = next(x for x in lines(tmp_path / "out/dropped.jsonl.gz") if x["reason"] == "said before")
    assert again["same_as"] == "a0-000" and again["conversation"] == "b_again"
    assert not list((tmp_path / "out/conversations").rglob("b_again/*.flac")) or not (tmp_path / "out/conversations/train/b_again/000.flac").exists()
    assert collect(mine, tmp_path / "all", "--no_filters") == 0 and len(turns(tmp_path / "all")) == 6


def test_listening_checks_transcripts(heard, tmp_path):
    (tmp_path / "mine").mkdir()
    for k in range(2):
        soundfile.write(tmp_path / f"mine/f{k}.wav", spoken()[k], 24000)
    (tmp_path / "mine/f0.txt").write_text(LINES[0])
    (tmp_path / "mine/f1.txt").write_text("Something else entirely was written down for this file.")
    assert collect(tmp_path / "mine", tmp_path / "out", "--listen", "all") == 0
    kept, = turns(tmp_path / "out")
    assert kept["recording_id"] == "f0" and kept["custom"]["quality"]["match"] == 1 and kept["custom"]["alignment"]["words"]
    assert summary(tmp_path / "out")["left_out"]["turns"] == {"not what its transcript says": 1}


def test_phrases_that_the_recogniser_makes_up(heard, tmp_path, monkeypatch):
    monkeypatch.setattr(sg, "listen", lambda audio, *rest: sg.Heard("Thank you very much for watching!", [], 0.9, 0.1))
    cut = people.Cut(sg.Turn(0, 2, "a"), spoken()[0], 0.0)
    assert people.judge_cut(cut, people.Options())[1] == "a phrase the ASR makes up"
    cut.turn.text = "Thank you very much for watching!"
    assert people.judge_cut(cut, people.Options())[1] is None


# ----------------------------------------------------------------------------- stopping and going on

def run_apart(mine, out):
    """The collector in a process of its own, which may be killed."""
    words = ["--source", "folder", "--path", str(mine), "--output", str(out), "--target_hours", "9", "--listen", "never", "--language", ""]
    return subprocess.Popen([sys.executable, "-W", "ignore", "collect_data.py", *words], cwd=Path(cd.__file__).parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def content(out: Path) -> dict:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("collection.json", "filters.png")}


def test_killed_anywhere_nothing_is_lost_and_nothing_doubled(tmp_path):
    mine, rng = tmp_path / "mine", np.random.default_rng(0)
    mine.mkdir()
    for k in range(10):                                                    # every third one says what was said before
        soundfile.write(mine / f"f{k:02d}.wav", np.concatenate([spoken()[j] for j in rng.permutation(6)[:2]]) if k % 3 else spoken()[0], 24000)
        (mine / f"f{k:02d}.txt").write_text("What was said there by somebody, twice perhaps.")
    assert run_apart(mine, tmp_path / "whole").wait(PATIENCE) == 0
    index, killed = tmp_path / "parts/index.jsonl", 0
    for wanted in (3, 7):                                                  # killed right after so many lines
        process, until = run_apart(mine, tmp_path / "parts"), time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until and (not index.exists() or index.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        process.kill()
        killed += process.wait() != 0
    assert killed == 2 and run_apart(mine, tmp_path / "parts").wait(PATIENCE) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "parts") and len(turns(tmp_path / "parts")) + sum(summary(tmp_path / "parts")["left_out"]["turns"].values()) == 10
    assert len(turns(tmp_path / "parts")) > 3 and summary(tmp_path / "parts")["left_out"]["turns"]["said before"] >= 3


def test_a_second_run_does_no_work(heard, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    soundfile.write(tmp_path / "mine/a.wav", spoken()[0], 24000)
    (tmp_path / "mine/b.wav").write_bytes(b"")
    assert collect(tmp_path / "mine", tmp_path / "out") == 0
    before = content(tmp_path / "out")
    monkeypatch.setattr(people, "work", lambda *a: pytest.fail("worked again"))
    assert collect(tmp_path / "mine", tmp_path / "out") == 0 and content(tmp_path / "out") == before


@pytest.mark.slow
def test_processes_make_the_same_bytes(tmp_path):
    (tmp_path / "mine").mkdir()
    for k, audio in enumerate(spoken()):
        soundfile.write(tmp_path / f"mine/f{k}.wav", audio, 24000)
        (tmp_path / f"mine/f{k}.txt").write_text(LINES[k])
    for workers in ("1", "2"):
        assert collect(tmp_path / "mine", tmp_path / workers, "--workers", workers, "--listen", "never") == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_what_was_collected_becomes_tokens(heard, tmp_path):
    """Manifests of people's turns are what dataset_pipeline reads."""
    lhotse = pytest.importorskip("lhotse")
    sound, _ = conversation()
    (tmp_path / "mine").mkdir()
    soundfile.write(tmp_path / "mine/call.wav", sound.T, 24000)
    assert collect(tmp_path / "mine", tmp_path / "out") == 0
    import dataset_pipeline as dp
    from test_dataset import ToyCodec
    index = dp.tokenise(tmp_path / "out", ToyCodec(), progress=False)
    assert index["splits"]["train"]["turns"] == len(LINES)
    lhotse.qa.validate(lhotse.CutSet.from_file(tmp_path / "out/manifests/train/cuts.jsonl.gz").with_recording_path_prefix(tmp_path / "out"))
    assert os.path.exists(tmp_path / "out/tokens/manifest.json")
