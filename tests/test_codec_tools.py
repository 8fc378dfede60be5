"""The codec's tools: any sound in, right lengths out, pieces equal the whole, codes of another codec refused."""
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

import audio_io
import codec_tools
from checkpoint import save_codec
from config import CodecConfig
from rvq_tokenizer import Codec
from runtime import ROOT

TINY = CodecConfig(num_codebooks=8, num_semantic=2, codebook_size=32, semantic_dim=8, acoustic_dim=12, width=24, latent=32, encoder_layers=1,
                   latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=24, num_bands=16)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two tiny untrained codecs as shipped folders."""
    root = tmp_path_factory.mktemp("weights")
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_codec(Codec(TINY).eval(), root / str(seed))
    return root


def voice(seconds, rate=24000, channels=1):
    t = np.arange(int(seconds * rate)) / rate
    sound = 0.3 * np.sin(2 * np.pi * 150 * t) + 0.02 * np.random.default_rng(0).standard_normal(len(t))
    return np.stack([sound * (1 - 0.5 * c) for c in range(channels)], 1).astype(np.float32)


def run(*words) -> int:
    return codec_tools.main([str(w) for w in words])


def round_trip(tmp_path, weights, sound, rate, *flags):
    """-> decoded samples; sound (N, channels) is written as a float WAV, which may hold anything."""
    soundfile.write(tmp_path / "in.wav", sound, rate, subtype="FLOAT")
    assert run("encode", tmp_path / "in.wav", tmp_path / "x.codes", "--codec", weights / "0", *flags) == 0
    assert run("decode", tmp_path / "x.codes", tmp_path / "out.wav", "--codec", weights / "0") == 0
    out, out_rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert out_rate == 24000 and np.isfinite(out).all()
    return out


BAD = {"8 kHz": (voice(0.5, 8000), 8000, 12000), "48 kHz stereo": (voice(0.5, 48000, 2), 48000, 12000), "44.1 kHz": (voice(0.3, 44100), 44100, 7200),
       "silence": (np.zeros((5000, 1), np.float32), 24000, 5000), "one sample": (np.full((1, 1), 0.5, np.float32), 24000, 1),
       "one sample at 48 kHz": (np.full((1, 1), 0.5, np.float32), 48000, 1), "clipping": (200 * voice(0.3), 24000, 7200),
       "not numbers": (np.where(np.arange(7200)[:, None] % 7 == 0, np.nan, voice(0.3)), 24000, 7200), "infinite": (voice(0.3, 48000) + np.inf, 48000, 7200),
       "a whole frame": (voice(0.08), 24000, 1920), "a sample more": (voice(0.08)[[*range(1920), 0]], 24000, 1921)}


@pytest.mark.parametrize("name", BAD)
def test_any_sound_comes_back_with_its_length(tmp_path, weights, name):
    sound, rate, samples = BAD[name]
    assert len(round_trip(tmp_path, weights, sound, rate)) == samples
    codes = codec_tools.read_codes(tmp_path / "x.codes")
    assert codes.samples == samples and codes.codes.shape == (8, -(-samples // 1920)) and codes.codes.dtype == torch.int16


def test_nan_is_heard_as_silence(tmp_path, weights):
    sound = voice(0.4)
    sound[3000:4000] = np.nan
    with_nan = round_trip(tmp_path, weights, sound, 24000)
    assert np.array_equal(with_nan, round_trip(tmp_path, weights, np.nan_to_num(sound), 24000))


@pytest.mark.parametrize("rate, channels", [(24000, 1), (16000, 2), (48000, 1)])
def test_pieces_together_are_the_whole(tmp_path, rate, channels):
    soundfile.write(tmp_path / "a.wav", voice(1.3, rate, channels), rate)
    pieces = list(codec_tools.sound_pieces(tmp_path / "a.wav", 24000, seconds=0.2))
    whole = audio_io.read_audio(tmp_path / "a.wav")
    assert len(pieces) > 5 and max(map(len, pieces)) <= 2 * 0.2 * 24000
    assert len(np.concatenate(pieces)) == len(whole) and np.abs(np.concatenate(pieces) - whole).max() < 1e-4


def test_a_long_sound_is_coded_in_pieces(weights):
    """What the codec sees at a time does not grow with the sound, and the result is that of one go."""
    import checkpoint
    codec = checkpoint.load_codec(weights / "0")
    sound, seen = voice(2.0)[:, 0], []
    inner = codec.encode_stream, codec.decode_stream

    def encode(audio, *rest):
        seen.append(audio.shape[-1])
        return inner[0](audio, *rest)

    def decode(codes, *rest):
        seen.append(codes.shape[-1] * 1920)
        return inner[1](codes, *rest)
    whole = codec.encode(torch.from_numpy(sound).view(1, 1, -1))
    made = codec.decode(whole)[0, 0, :len(sound)].numpy()
    codec.encode_stream, codec.decode_stream = encode, decode
    codes, samples = codec_tools.encode_pieces(codec, (sound[i:i + 5000] for i in range(0, len(sound), 5000)))
    assert samples == len(sound) and torch.equal(codes.long(), whole[0])
    held = codec_tools.Codes(codes, samples, codec.fingerprint, 24000, 1920, 32)
    again = np.concatenate(list(codec_tools.decode_pieces(codec, held, seconds=0.25)))
    assert len(again) == samples and np.abs(again - made).max() < 1e-4 and max(seen) <= 5000 + 1920


def test_fewer_codebooks(tmp_path, weights):
    sound = voice(0.5)
    few = round_trip(tmp_path, weights, sound, 24000, "--num_codebooks", 2)
    assert codec_tools.read_codes(tmp_path / "x.codes").codes.shape[0] == 2
    round_trip(tmp_path, weights, sound, 24000)
    assert run("decode", tmp_path / "x.codes", tmp_path / "two.wav", "--codec", weights / "0", "--num_codebooks", 2) == 0
    assert np.array_equal(audio_io.read_audio(tmp_path / "two.wav"), few)


def test_another_codecs_codes_are_refused(tmp_path, weights, capsys):
    round_trip(tmp_path, weights, voice(0.2), 24000)
    capsys.readouterr()
    assert run("decode", tmp_path / "x.codes", tmp_path / "b.wav", "--codec", weights / "1") == 2
    error = capsys.readouterr().err
    fingerprints = [json.loads((weights / w / "config.json").read_text())["fingerprint"] for w in "01"]
    assert all(f in error for f in fingerprints) and "--codec" in error and not (tmp_path / "b.wav").exists()


def test_folders_keep_their_shape_and_name_bad_files(tmp_path, weights, capsys):
    (tmp_path / "in/deep").mkdir(parents=True)
    soundfile.write(tmp_path / "in/a.wav", voice(0.2), 24000)
    soundfile.write(tmp_path / "in/deep/b.flac", voice(0.3, 16000), 16000)
    flags = ("--codec", weights / "0")
    assert run("encode", tmp_path / "in", tmp_path / "codes", *flags) == 0
    assert "100%" in capsys.readouterr().err
    assert run("decode", tmp_path / "codes", tmp_path / "out", *flags) == 0
    assert len(audio_io.read_audio(tmp_path / "out/a.wav")) == 4800 and len(audio_io.read_audio(tmp_path / "out/deep/b.wav")) == 7200
    (tmp_path / "in/0.wav").write_text("no sound")
    capsys.readouterr()
    assert run("encode", tmp_path / "in", tmp_path / "again", *flags) == 2
    assert "left out" in capsys.readouterr().err and (tmp_path / "again/a.codes").exists() and (tmp_path / "again/deep/b.codes").exists()
    soundfile.write(tmp_path / "in/a.flac", voice(0.2), 24000)
    assert run("encode", tmp_path / "in", tmp_path / "again", *flags) == 2 and "rename" in capsys.readouterr().err


def test_info_counts_what_is_there(tmp_path, weights, capsys):
    import checkpoint
    codec = checkpoint.load_codec(weights / "0")
    for i in range(2):                                                     # codebook 1 uniform, codebook 2 always the same
        codes = torch.stack([torch.arange(64) % 32, torch.full((64,), 5)])
        codec_tools.write_codes(tmp_path / f"{i}.codes", codes, 64 * 1920 - 100, codec)
    found = codec_tools.statistics([codec_tools.read_codes(tmp_path / f"{i}.codes") for i in range(2)])
    assert found["entropy"] == [pytest.approx(1.0), 0.0] and found["dead"] == [0.0, 31 / 32]
    assert found["bits_per_second"] == pytest.approx(2 * 5 * 12.5) and found["entropy_bits_per_second"] == pytest.approx(5 * 12.5)
    assert found["seconds"] == pytest.approx(2 * (64 * 1920 - 100) / 24000) and found["frames"] == 128
    assert run("info", tmp_path) == 0
    said = capsys.readouterr().out
    assert "2 files" in said and "125 bit/s; 62 bit/s" in said and "96.9 %" in said
    codec_tools.write_codes(tmp_path / "2.codes", codes, 64 * 1920, checkpoint.load_codec(weights / "1"))
    assert run("info", tmp_path) == 2 and "one codec" in capsys.readouterr().err


def test_damaged_and_foreign_files_are_one_line(tmp_path, weights, capsys):
    codec_tools.write_codes(tmp_path / "good.codes", torch.zeros(2, 3, dtype=torch.long), 5000, Codec(TINY))
    data = (tmp_path / "good.codes").read_bytes()
    (tmp_path / "cut.codes").write_bytes(data[:-3])
    (tmp_path / "text.codes").write_text("nothing of the kind")
    save_file({"codes": torch.zeros(2, 3)}, tmp_path / "other.codes")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 24000)
    flags = ("--codec", weights / "0")
    for words in [("info", tmp_path / n) for n in ("cut.codes", "text.codes", "other.codes", "nowhere.codes")] + [("info", weights), (
            "encode", tmp_path / "empty.wav", tmp_path / "x.codes", *flags), ("encode", tmp_path / "none.wav", tmp_path / "x.codes", *flags), (
            "encode", tmp_path / "nowhere.wav", tmp_path / "x.codes", *flags), ("decode", tmp_path / "text.codes", tmp_path / "x.wav", *flags), (
            "decode", tmp_path / "good.codes", tmp_path / "x.wav", *flags), ("encode", tmp_path / "none.wav", tmp_path / "x.codes", *flags, "--num_codebooks", 9)]:
        assert run(*words) == 2, words
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == 1 and errors[0].startswith("error: "), errors
    assert not (tmp_path / "x.codes").exists() and not (tmp_path / "x.wav").exists()


def test_the_command_of_the_codec_is_this_one(tmp_path, weights):
    soundfile.write(tmp_path / "a.wav", voice(0.1), 24000)
    done = subprocess.run([sys.executable, "rvq_tokenizer.py", "encode", tmp_path / "a.wav", tmp_path / "a.codes", "--codec", weights / "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "a.codes").exists(), done.stderr
