"""Mimi behind the codec's interface, with small random weights: transformers' own offline path is the oracle."""
import sys

import pytest
import torch

import codec_tools
import mimi_codec

FRAME, RATE = 12, 24000


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    # a frame is 3 * 2 * 2 = 12 samples here; 24 positions of attention are 6 frames
    config = transformers.MimiConfig(hidden_size=16, num_filters=4, upsampling_ratios=[3, 2], codebook_size=32, codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=5,
                                     upsample_groups=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, sliding_window=12,
                                     layer_scale_initial_scale=0.5, max_position_embeddings=512)
    model = transformers.MimiModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("embed_sum"):
                value.normal_()
    return model


@pytest.fixture(scope="module")
def codec(model):
    return mimi_codec.MimiCodec(model)


def noise(n, batch=1):
    return 0.3 * torch.randn(batch, 1, n, generator=torch.Generator().manual_seed(n))


def test_what_it_is(codec):
    cfg = codec.cfg
    assert (cfg.sample_rate, cfg.frame_size, cfg.num_codebooks, cfg.num_semantic, cfg.codebook_size) == (RATE, FRAME, 5, 1, 32) and cfg.frame_rate == RATE / FRAME
    assert codec.fingerprint.startswith("mimi-")


def test_whole_frames_are_coded_as_by_transformers(codec, model):
    """Offline on both sides: longer than the window of attention, all codebooks used."""
    audio = noise(20 * FRAME, 2)
    with torch.inference_mode():
        codes = model.encode(audio).audio_codes
        sound = model.decode(codes).audio_values
        fewer = model.decode(codes[:, :2]).audio_values
    assert torch.equal(codec.encode(audio), codes) and len(codes.unique()) > 10
    assert (codec.decode(codes) - sound.clamp(-1, 1)).abs().max() < 1e-5 and sound.std() > 1e-3
    assert (codec.decode(codes[:, :2]) - fewer.clamp(-1, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("n", [1, 2, *(k * FRAME + d for k in (1, 2, 3, 7) for d in (-1, 0, 1))])
def test_frame_counts_near_the_borders(codec, model, n):
    frames = -(-n // FRAME)
    codes = codec.encode(noise(n, 2))
    assert codes.shape == (2, 5, frames) and codec.decode(codes).shape == (2, 1, frames * FRAME)
    with torch.inference_mode():
        assert model.encode(noise(n, 2)).audio_codes.shape[-1] == frames, "transformers counts otherwise"
    assert codec.encode(noise(n), num_codebooks=3).equal(codec.encode(noise(n))[:, :3])


@pytest.mark.parametrize("chunks", [[1] * 20, [3, 1, 9, 7], [20], [13, 7]])
def test_streams_equal_offline(codec, chunks):
    audio = noise(20 * FRAME)
    codes = codec.encode(audio)
    sound, encoded, decoded, encoder, decoder = codec.decode(codes), [], [], None, None
    for part in audio.split([n * FRAME for n in chunks], -1):
        piece, encoder = codec.encode_stream(part, encoder)
        heard, decoder = codec.decode_stream(piece, decoder)
        encoded.append(piece)
        decoded.append(heard)
    assert torch.equal(torch.cat(encoded, -1), codes)
    assert (torch.cat(decoded, -1) - sound).abs().max() < 1e-5


def test_bad_input(codec):
    for bad in (torch.zeros(1, 2, 24), torch.zeros(1, 1, 0), torch.zeros(24)):
        with pytest.raises(ValueError, match="samples"):
            codec.encode(bad)
    with pytest.raises(ValueError, match="whole frames"):
        codec.encode_stream(noise(FRAME + 1))
    with pytest.raises(ValueError, match="num_codebooks"):
        codec.encode(noise(24), num_codebooks=6)
    with pytest.raises(ValueError, match="another codec"):
        codec.decode(torch.full((1, 2, 3), 32))
    for odd in (torch.full((1, 1, 50), float("nan")), torch.full((1, 1, 50), float("inf")), torch.zeros(1, 1, 50), 1000 * noise(50)):
        assert torch.isfinite(codec.decode(codec.encode(odd))).all()
    assert codec.decode_stream(torch.zeros(1, 5, 0, dtype=torch.long))[0].shape == (1, 1, 0)


def test_the_fingerprint_is_of_what_decides_the_codes(model):
    import copy
    before, other = mimi_codec.fingerprint(model), copy.deepcopy(model)
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1)
    assert mimi_codec.fingerprint(other) == before
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1e-3)
    assert mimi_codec.fingerprint(other) != before


def test_the_tools_take_it(model, tmp_path, capsys):
    """--codec mimi:FOLDER through files, and the codes of one are refused by the other."""
    import numpy as np
    import soundfile
    model.save_pretrained(tmp_path / "weights")
    soundfile.write(tmp_path / "a.wav", noise(100)[0, 0].numpy(), RATE)
    flags = ("--codec", f"mimi:{tmp_path / 'weights'}")
    for words in (("encode", tmp_path / "a.wav", tmp_path / "a.codes", *flags), ("decode", tmp_path / "a.codes", tmp_path / "b.wav", *flags)):
        assert codec_tools.main([str(w) for w in words]) == 0, capsys.readouterr().err
    sound = soundfile.read(tmp_path / "b.wav")[0]
    assert len(sound) == 100 and np.isfinite(sound).all() and codec_tools.read_codes(tmp_path / "a.codes").codes.shape == (5, 9)


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    words = ["encode", "x.wav", "x.codes", "--codec"]
    assert codec_tools.main([*words, f"mimi:{tmp_path}"]) == 2 and "mimi:FOLDER" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert codec_tools.main([*words, "mimi"]) == 2
    error = capsys.readouterr().err
    assert "pip install" in error and error.count("\n") == 1


def test_without_weights_it_says_where_to_get_them(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def missing(*args, **kwargs):
        assert kwargs["local_files_only"], "nothing may be downloaded"
        raise OSError("not in the cache")
    monkeypatch.setattr(transformers.MimiModel, "from_pretrained", missing)
    with pytest.raises(ValueError, match="hf download"):
        mimi_codec.load_mimi()
