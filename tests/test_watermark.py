"""The mark: the same in any chunks, where it says it is, found through the codec; and a p-value that keeps its word."""
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import watermark
from audio_io import read_audio, resample, write_audio
from watermark import HOP, RATE, SPEEDS, Marker, WatermarkConfig, arrange, at_speed, detect, embed, match, pattern, search, signs, tail

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "pretrained/nano/samples"


@pytest.fixture(scope="module")
def speech():
    """Some seconds of the model's samples, (N,)."""
    return np.concatenate([read_audio(SAMPLES / f"item_0{n}.ogg") for n in (1, 2, 3)])[:9 * RATE]


@pytest.fixture(scope="module")
def marked(speech):
    return embed(speech, "secret")


# ----------------------------------------------------------------------------- marking

def test_chunks_do_not_matter_to_the_last_bit(speech):
    whole = embed(speech[:RATE], "secret")
    rng = np.random.default_rng(0)
    for most in (3, 300, 1920, 5000):
        marker, out, at = Marker("secret"), [], 0
        while at < RATE:
            size = int(rng.integers(0, most))
            out.append(marker.push(speech[at:min(RATE, at + size)]))
            at += size
        assert np.array_equal(np.concatenate([*out, marker.finish()]), whole)


@pytest.mark.parametrize("samples", [0, 1, 239, 240, 241, 479, 480, 481, 719, 5000])
def test_as_many_samples_come_out_as_went_in(speech, samples):
    assert len(embed(speech[:samples], "secret")) == samples


def test_a_stream_is_ten_milliseconds_late_and_no_more(speech):
    marker = Marker("secret")
    assert [len(marker.push(speech[n * 1920:(n + 1) * 1920])) for n in range(3)] == [1920 - HOP, 1920, 1920]


def test_the_mark_is_as_strong_as_it_says_and_stays_in_its_bands():
    """White noise, half a minute: gains have the asked root mean square where the mark lies, and are 1 above it."""
    noise = np.random.default_rng(0).normal(0, 0.1, 30 * RATE).astype(np.float32)
    for strength in (1.0, 2.0):
        cfg = replace(WatermarkConfig(), strength_db=strength)
        steps = pattern(signs("secret", cfg), np.arange(3000), cfg) @ watermark._gain_shapes(cfg)          # (T, bins) dB
        hz = np.fft.rfftfreq(480, 1 / RATE)
        inside = (hz > 300) & (hz < 6500)
        assert abs(np.sqrt((steps[:, inside] ** 2).mean()) / strength - 1) < 0.1 and not steps[:, (hz < 50) | (hz > 8200)].any()
        change = np.fft.rfft(embed(noise, "secret", cfg) - noise)
        at = np.fft.rfftfreq(len(noise), 1 / RATE)
        assert np.abs(change[at > 8400]).mean() < 0.01 * np.abs(change[(at > 500) & (at < 6000)]).mean()


def test_silence_stays_silent():
    assert not embed(np.zeros(RATE), "secret").any()


def test_keys_choose_the_signs():
    cfg = WatermarkConfig()
    one = signs("secret", cfg)
    assert np.array_equal(one, signs("secret", cfg)) and set(np.unique(one)) == {-1.0, 1.0} and one.shape == (cfg.period, cfg.carriers)
    agreement = [np.mean(one == signs(f"other {n}", cfg)) for n in range(50)]
    assert 0.4 < min(agreement) and max(agreement) < 0.6 and abs(one.mean()) < 0.15


@pytest.mark.parametrize("wrong, flag", [({"strength_db": 0}, "--strength_db"), ({"first": 12}, "first"), ({"block": 1}, "block")])
def test_settings_that_cannot_be_are_named(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        WatermarkConfig(**wrong)


# ----------------------------------------------------------------------------- finding

def test_it_is_found_with_its_key_alone(speech, marked):
    assert detect(marked, "secret").p_value < 1e-6
    assert detect(speech, "secret").p_value > 0.01 and detect(marked, "another").p_value > 0.01


def test_it_survives_the_codec(marked):
    """Coded and decoded by the shipped codec, which keeps no waveform: nearly nothing in common with what went in but the envelope."""
    import torch
    from checkpoint import load_codec
    codec = load_codec(ROOT / "pretrained/codec")
    coded = codec.decode(codec.encode(torch.from_numpy(marked).view(1, 1, -1)))[0, 0, :len(marked)].numpy()
    assert abs(np.corrcoef(coded, marked)[0, 1]) < 0.5
    assert detect(coded, "secret").p_value < 1e-4


@pytest.mark.parametrize("rate", [16000, 8000])
def test_it_survives_other_rates(marked, rate):
    assert detect(resample(resample(marked, RATE, rate), rate, RATE), "secret").p_value < 1e-4


def test_it_survives_levels_noise_and_opus(marked):
    from benchmark_watermark import through_file, with_noise
    assert detect(0.05 * marked, "secret").p_value < 1e-6
    assert detect(with_noise(marked, 20), "secret").p_value < 1e-4
    pytest.importorskip("av")
    assert detect(through_file(marked, "ogg", "libopus", 24000), "secret").p_value < 1e-6


@pytest.mark.parametrize("speed", [0.97, 1.02])
def test_it_is_found_at_another_speed(marked, speed):
    found = detect(resample(marked, RATE * speed, RATE), "secret")
    assert found.p_value < 1e-4 and found.speed == pytest.approx(speed, abs=0.011)


def test_it_is_found_in_the_middle_and_says_where_the_signs_begin(marked):
    cfg = WatermarkConfig()
    later = detect(marked[RATE:], "secret")
    assert later.p_value < 1e-5
    period = cfg.block * cfg.period * HOP / RATE
    assert abs((later.start_s + 1.0) % period) < 0.05 or abs((later.start_s + 1.0) % period - period) < 0.05


def test_the_score_is_what_the_slow_way_computes():
    """At a known beginning: carriers times signs that fade into each other, step by step, folded over repetitions."""
    cfg = replace(WatermarkConfig(), block=4, period=8)
    carriers, wanted = np.random.default_rng(0).normal(size=(75, cfg.carriers)), signs("secret", cfg)
    cells = np.zeros((cfg.period, cfg.carriers))
    for step in range(-cfg.block, 75 + cfg.block):
        for within in range(1 - cfg.block, cfg.block):
            if step % cfg.block == 0 and 0 <= step + within < 75:
                cells[step // cfg.block % cfg.period] += (1 - abs(within) / cfg.block) * carriers[step + within]
    slow = (cells * wanted).sum() / np.sqrt((cells ** 2).sum())
    assert match(carriers, "secret", cfg, stride=cfg.block * cfg.period, speeds=(1.0,)).score == pytest.approx(slow)


def test_the_tail_bound_holds_for_every_sum_of_signs():
    """All 2^12 choices of signs, for even, falling and single large weights: the bound is never below the truth."""
    choices = np.array(list(itertools.product((-1, 1), repeat=12)))
    for weights in (np.ones(12), 0.7 ** np.arange(12), np.r_[5.0, np.ones(11)]):
        sums = choices @ weights / np.sqrt((weights ** 2).sum())
        for z in np.linspace(0.1, 3.4, 34):
            assert (sums >= z - 1e-9).mean() <= tail(z) + 1e-12
    assert tail(0) == 1 and tail(5) < 1e-6 and tail(6) < tail(5)


def test_p_values_keep_their_word_whatever_the_network_says():
    """Carriers with drift and heavy tails, as a bad network would give, against 600 keys: no more alarms than the p-value allows."""
    rng, cfg = np.random.default_rng(0), WatermarkConfig()
    carriers = np.cumsum(rng.standard_t(1.5, size=(400, cfg.carriers)), 0)
    arranged = {speed: arrange(at_speed(carriers, speed), cfg, 8) for speed in SPEEDS}
    p_values = np.array([search(arranged, f"key {n}", cfg, 8).p_value for n in range(600)])
    assert p_values[0] == match(carriers, "key 0", cfg, stride=8).p_value
    assert (p_values < 0.05).sum() <= 600 * 0.05 and (p_values < 0.5).sum() <= 600 * 0.5


def test_pieces_of_a_long_sound_say_the_same_as_the_whole(marked):
    network, cfg = watermark.load_network()
    whole, pieces = watermark.carriers_of(marked, network, cfg), watermark.carriers_of(marked, network, cfg, piece=100)
    assert whole.shape == pieces.shape and np.abs(whole - pieces).max() < 1e-4


# ----------------------------------------------------------------------------- teaching

class Nothing:
    """A codec that changes nothing."""

    def encode(self, audio):
        return audio

    def decode(self, codes):
        return codes


def test_a_network_learns_to_see_the_mark(tmp_path):
    import train_watermark
    from train_watermark import WatermarkTraining
    cfg, rng = WatermarkConfig(strength_db=3.0), np.random.default_rng(0)
    how = WatermarkTraining(steps=80, batch=8, crop=100)
    rows = [row for n in range(12) for row in train_watermark.marked_twice(Nothing(), rng.normal(0, 0.1, 2 * RATE), f"key {n}", cfg, n % 2 == 0)]
    untrained = train_watermark.scores(rows[:6], watermark.make_network(cfg), cfg)["as_it_is"]
    network, found = train_watermark.fit(rows[6:], how, cfg, rows[:6])
    assert abs(untrained) < 1.5 < 3 < found["as_it_is"]
    watermark.save_network(network, cfg, tmp_path)
    again, cfg_again = watermark.load_network(tmp_path)
    assert cfg_again == cfg
    audio = embed(rng.normal(0, 0.1, 4 * RATE), "secret", cfg)
    assert np.abs(watermark.carriers_of(audio, again, cfg) - watermark.carriers_of(audio, network, cfg)).max() < 0.02         # float16


def test_a_folder_without_a_detector_is_named(tmp_path):
    with pytest.raises(ValueError, match="train_watermark.py"):
        watermark.load_network(tmp_path)


# ----------------------------------------------------------------------------- counting

def test_intervals_are_exact():
    """Clopper and Pearson: 0 of 100 goes to 3.6 %, and the interval's ends have 2.5 % beyond them."""
    from benchmark_watermark import share
    from scipy.stats import binom
    assert share([False] * 100)["high"] == pytest.approx(1 - 0.025 ** (1 / 100)) and share([True] * 5)["high"] == 1.0
    some = share([True] * 7 + [False] * 13)
    assert binom.sf(6, 20, some["low"]) == pytest.approx(0.025) and binom.cdf(7, 20, some["high"]) == pytest.approx(0.025)
    assert share([])["mean"] is None


def test_joined_stretches_are_long_and_of_one_kind():
    from benchmark_watermark import JOINED, joined
    rows = [{"kind": kind, "audio": np.full(5 * RATE, value, np.float32)} for kind, value in (("model", 1.0), ("people", 2.0)) * 4]
    stretches = joined(rows)
    assert [s["kind"] for s in stretches] == ["model", "people"] and all(len(s["audio"]) >= JOINED * RATE and len(np.unique(s["audio"])) == 1 for s in stretches)


# ----------------------------------------------------------------------------- metadata and command line

@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_files_say_that_a_machine_made_them(tmp_path, speech, name):
    write_audio(tmp_path / name, speech[:RATE])
    before = read_audio(tmp_path / name)
    assert not watermark.is_tagged(tmp_path / name)
    assert watermark.tag_sound(tmp_path / name, {"artist": "nano"}) | {} == watermark.AI_TAGS | {"artist": "nano"} | {"software": watermark.read_tags(tmp_path / name)["software"]}
    assert watermark.is_tagged(tmp_path / name) and "csm-lab" in watermark.read_tags(tmp_path / name)["software"]
    after = read_audio(tmp_path / name)
    assert np.array_equal(after, before) if name != "a.ogg" else len(after) == len(before)       # Vorbis is coded again


def test_a_stream_can_carry_the_same_words(tmp_path):
    """RIFF with the chunk of wav_info between fmt and data, as another program reads it."""
    import struct
    import wave
    write_audio(tmp_path / "a.wav", np.zeros(1001))
    with wave.open(str(tmp_path / "a.wav")) as plain:
        data = plain.readframes(1001)
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    rest = b"WAVE" + fmt + watermark.wav_info() + struct.pack("<4sI", b"data", len(data)) + data
    (tmp_path / "b.wav").write_bytes(struct.pack("<4sI", b"RIFF", len(rest)) + rest)
    assert watermark.read_tags(tmp_path / "b.wav") == watermark.AI_TAGS
    assert len(read_audio(tmp_path / "b.wav")) == 1001


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "watermark.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_marks_and_finds(tmp_path, speech):
    write_audio(tmp_path / "a.wav", speech)
    assert run("embed", tmp_path / "a.wav", "--output", tmp_path / "b.wav", "--key", "mine").returncode == 0
    found = run("detect", tmp_path / "b.wav", "--key", "mine")
    assert found.returncode == 0 and json.loads(found.stdout)["marked"] and json.loads(found.stdout)["metadata"]
    plain = run("detect", tmp_path / "a.wav", "--key", "mine")
    assert plain.returncode == 1 and json.loads(plain.stdout) | {"score": 0, "p_value": 1} == {"marked": False, "score": 0, "p_value": 1, "metadata": False}
    wrong = run("detect", tmp_path / "none.wav")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
