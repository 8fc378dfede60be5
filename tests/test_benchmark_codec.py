"""The codec's bench: other codecs through their programs, tables of texts, codes from wrong frames, bars."""
import gzip
import shutil
import sys

import numpy as np
import pytest
import torch

import benchmark_codec


def buzz(seconds=1.0):
    t = np.arange(int(seconds * 24000)) / 24000
    return (0.3 * np.sign(np.sin(2 * np.pi * 130 * t)) * (0.5 + 0.5 * np.sin(2 * np.pi * 4 * t))).astype(np.float32)


def test_mis_sampling_keeps_the_first_codebooks():
    codes = torch.arange(5 * 40).view(1, 5, 40)
    mixed = benchmark_codec.mis_sampled(codes, 2, torch.Generator().manual_seed(0))
    assert torch.equal(mixed[:, :2], codes[:, :2]) and not torch.equal(mixed[:, 2:], codes[:, 2:])
    assert torch.equal(mixed.sort(-1).values, codes)


def test_tables_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("; c\n# d\nhello: Hello: you there.\ndeep/x | One two\nlast\tThree four \nno text here\n:\n")
    with gzip.open(tmp_path / "b.gz", "wt") as file:
        file.write("one: The first.\n")
    assert benchmark_codec.read_transcripts(tmp_path / "a.txt") == {"hello": "Hello: you there.", "deep/x": "One two", "last": "Three four"}
    assert benchmark_codec.read_transcripts(tmp_path / "b.gz") == {"one": "The first."}
    (tmp_path / "c.gz").write_text("no gzip")
    for name in ("c.gz", "nowhere"):
        with pytest.raises(ValueError, match="--transcripts"):
            benchmark_codec.read_transcripts(tmp_path / name)
    with pytest.raises(ValueError, match="--recordings"):
        benchmark_codec.recordings(tmp_path, "", 3, 0)


def test_recordings_with_texts_beside_them(tmp_path):
    import audio_io
    for name in "abc":
        audio_io.write_audio(tmp_path / f"{name}.wav", buzz(2.1))
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    found = benchmark_codec.recordings(tmp_path, "", 2, 5)
    assert len(found) == 2 and found[0][0].startswith("this is") and len(found[0][1]) == int(2.1 * 24000)
    assert [t for t, _ in found] == [t for t, _ in benchmark_codec.recordings(tmp_path, "", 2, 5)]
    with pytest.raises(ValueError, match="--transcripts"):
        (tmp_path / "none.txt").write_text("x y: z\n")
        [(tmp_path / f"{n}.txt").unlink() for n in "abc"]
        benchmark_codec.recordings(tmp_path, tmp_path / "none.txt", 2, 5)


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
def test_codec2_runs_as_its_programs(tmp_path, monkeypatch):
    """Stand-ins that copy: what comes back is the sound at 8 kHz, and the bytes are the file's."""
    for name in ("c2enc", "c2dec"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = 3200 ] && cp "$2" "$3"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert benchmark_codec.find_peers()["codec2"] is benchmark_codec.codec2
    from audio_io import resample
    sound, size = benchmark_codec.codec2(buzz())
    assert size == 2 * 8000 and abs(len(sound) - 24000) < 5
    assert np.abs(sound[1000:23000] - resample(resample(buzz(), 24000, 8000), 8000, 24000)[1000:23000]).max() < 1e-2
    (tmp_path / "c2dec").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    with pytest.raises(ValueError, match=r"c2dec failed \(broken\)"):
        benchmark_codec.codec2(buzz())


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "av", None)
    assert all(isinstance(word, str) and word.startswith("not installed") for word in benchmark_codec.find_peers().values())


def test_opus_comes_back_in_place_at_its_rate():
    pytest.importorskip("av")
    audio = buzz(2.0)
    sound, size = benchmark_codec.opus_packets(audio)
    sound = benchmark_codec.fitted(sound, len(audio))
    assert 4000 < 8 * size / 2.0 < 9000
    assert np.corrcoef(sound, audio)[0, 1] > 0.7, "the codec's delay must be taken off"


@pytest.mark.skipif(not (shutil.which("c2enc") and shutil.which("c2dec")), reason="codec2 is not installed")
def test_the_real_codec2():
    sound, size = benchmark_codec.codec2(buzz(2.0))
    assert 3000 < 8 * size / 2.0 < 3300 and np.isfinite(sound).all() and abs(len(sound) - 48000) < 1000


def test_lengths_are_fitted():
    assert benchmark_codec.fitted(np.ones(5), 3).tolist() == [1, 1, 1] and benchmark_codec.fitted(np.ones(2), 3).tolist() == [1, 1, 0]


def test_classic_measures_tell_a_copy_from_noise(monkeypatch):
    """Stand-ins for the packages; without them there is nothing to say."""
    import types
    kind = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "pesq", kind(pesq=lambda rate, a, b, band: 4.6 - float(np.abs(a - b).mean()), PesqError=RuntimeError))
    monkeypatch.setitem(sys.modules, "pystoi", kind(stoi=lambda a, b, rate: 1 - float(np.abs(a - b).mean())))
    audio = buzz()
    same, other = benchmark_codec.classic(audio, audio), benchmark_codec.classic(audio, -audio)
    assert same == {"pesq": 4.6, "stoi": 1.0} and other["pesq"] < 4.4 and other["stoi"] < 0.9
    for name in ("pesq", "pystoi"):
        monkeypatch.setitem(sys.modules, name, None)
    assert benchmark_codec.classic(audio, audio) == {"pesq": None, "stoi": None}


def bar_result(wer=0.05, over=0.005, mos=3.8, voice=0.97):
    ours = {"wer": {"mean": wer}, "wer_over_input": {"mean": over}, "mos": {"mean": mos}, "voice": {"mean": voice}}
    peer = {"wer": {"mean": 0.2}, "mos": {"mean": 2.0}, "voice": {"mean": 0.7}}
    few = {str(k): {"wer_over_input": {"mean": 0.03}} for k in (1, 2, 4, 8)}
    return {"conditions": {"input": {"wer": {"mean": 0.045}, "mos": {"mean": 4.0}}, **few, "32": ours, "codec2": {"missing": "not installed"}, "opus": peer}, "human": None,
            "codebooks": {"entropy": [0.9, 0.9], "dead": [0.0, 0.03]}, "times_real_time": {"both": 50.0}, "mimi_times_real_time": {"both": 4.0}, "frame_ms": 80.0}


def test_bars_are_met_missed_or_not_measured():
    found = {bar["what"]: bar for bar in benchmark_codec.bars(bar_result())}

    def met(words):
        hit = [bar["met"] for what, bar in found.items() if words in what]
        assert len(hit) == 1, words
        return hit[0]
    assert met("synthetic: word error, points") and met("synthetic: voice") and met("synthetic: DistillMOS, drop") and met("synthetic: measures (words, voice, DistillMOS) better than Opus")
    assert met("synthetic: measures (words, voice, DistillMOS) better than Codec2") is None and met("human: voice") is None
    assert met("first 1 alone") and met("first 2 alone") and met("first 4 alone") and met("first 8 alone") is False
    assert met("entropy") and met("unused codes") is False and met("one core") and met("Mimi") and met("sound that must be there")
    worse = {bar["what"]: bar for bar in benchmark_codec.bars(bar_result(over=0.02, mos=1.9))}
    assert worse["synthetic: word error, points above the input's own"]["met"] is False and worse["synthetic: DistillMOS, drop from the input"]["value"] == pytest.approx(2.1)
    assert worse["synthetic: measures (words, voice, DistillMOS) better than Opus 6 kbit/s"]["value"] == 2
    text = benchmark_codec.bars_table(list(worse.values()))
    assert "**missed**" in text and "not measured" in text and "met" in text
