"""Weights across the disk: what comes back, and what is refused."""
import json
import shutil

import pytest
import torch

import checkpoint
from architecture import CSM
from config import CodecConfig, model_preset, to_dict
from rvq_tokenizer import Codec

CFG = model_preset("test")


@pytest.fixture(scope="module")
def model():
    made = CSM(CFG)
    made.init_weights(torch.Generator().manual_seed(0), open_gates=True)
    made.codec_fingerprint = "a" * 16
    return made


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return Codec(CodecConfig(width=32, latent=32, codebook_size=32)).eval()


def write(path, model, **rest):
    return checkpoint.save_training(path, config=to_dict(model.cfg), model=model.state_dict(), **rest)


def test_int8_rows_are_within_half_a_step():
    weight = torch.randn(3, 50, 64) * torch.logspace(-3, 1, 50)[:, None]
    q, scale = checkpoint.quantise_rows(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.float16 and scale.shape == (3, 50, 1)
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((q.float() * scale.float() - weight).abs() <= 0.6 * step).all()
    assert checkpoint.quantise_rows(torch.zeros(4, 64))[0].eq(0).all()


def test_rows_of_convolutions_are_output_channels():
    assert checkpoint.quantise_rows(torch.randn(5, 6, 7))[1].shape == (5, 1, 1)


@pytest.mark.parametrize("int8, most", [(True, 0.02), (False, 0.01)])
def test_shipped_folder_round_trip(tmp_path, model, int8, most):
    checkpoint.save_pretrained(model, tmp_path / "m", int8=int8, steps=7)
    loaded = checkpoint.load_model(tmp_path / "m")
    assert loaded.cfg == model.cfg and loaded.codec_fingerprint == "a" * 16 and not loaded.training
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert b.dtype == torch.float32 and (a - b).abs().max() <= most * max(1e-6, a.abs().max()), name
    assert json.loads((tmp_path / "m/config.json").read_text())["steps"] == 7
    size = (tmp_path / "m/model.safetensors").stat().st_size / sum(p.numel() for p in model.parameters())
    assert size < (2.0 if int8 else 2.7)      # float32 would be 4; small tensors stay float32


def test_codec_fingerprint_survives_saving_and_changes_with_the_weights(tmp_path, codec):
    first = checkpoint.save_codec(codec, tmp_path / "c")
    loaded = checkpoint.load_codec(tmp_path / "c")
    assert loaded.fingerprint == first == codec.fingerprint and len(first) == 16 and not loaded.training
    assert checkpoint.save_codec(loaded, tmp_path / "again") == first
    with torch.no_grad():
        next(p for p in loaded.parameters() if p.dim() > 1)[0, 0] += 0.1
    assert checkpoint.save_codec(loaded, tmp_path / "other") != first


def test_loaded_codec_hears_and_sounds_as_it_was_saved(tmp_path, codec):
    checkpoint.save_codec(codec, tmp_path / "c")
    a, b = (checkpoint.load_codec(tmp_path / "c") for _ in range(2))
    audio = torch.randn(1, 1, 4 * 1920) * 0.1
    assert torch.equal(a.encode(audio), b.encode(audio)) and torch.equal(a.decode(a.encode(audio)), b.decode(b.encode(audio)))


def test_only_the_large_stacks_of_a_codec_lose_precision(tmp_path):
    """int8 rows there, float16 elsewhere: the codes are those of float16, the sound is close."""
    import copy

    from config import CodecConfig
    from rvq_tokenizer import Codec
    from safetensors.torch import load_file
    torch.manual_seed(0)
    codec = Codec(CodecConfig(num_codebooks=6, num_semantic=2, codebook_size=32, semantic_dim=8, acoustic_dim=12, width=32, latent=32, encoder_layers=1,
                              decoder_width=96, decoder_layers=3, num_mels=20, num_low_bins=24, num_bands=16)).eval()
    half = copy.deepcopy(codec).half().float()
    checkpoint.save_codec(codec, tmp_path / "c")
    loaded, stored = checkpoint.load_codec(tmp_path / "c"), load_file(tmp_path / "c" / "model.safetensors")
    int8 = {name.split(".")[0] for name, value in stored.items() if value.dtype == torch.int8}
    assert int8 == {"slot_decoder", "hop_decoder"} and stored["head.weight"].dtype == torch.float16
    audio = torch.randn(1, 1, 4 * 1920) * 0.1
    codes = loaded.encode(audio)
    assert torch.equal(codes, half.encode(audio))
    (a, *_), (b, *_) = (c.controls(c.dequantise(codes))[0] for c in (loaded, half))
    assert 0 < (a - b).abs().max() < 0.05 and json.loads((tmp_path / "c" / "config.json").read_text())["storage"].startswith("float16")


def test_training_file_prefers_the_averaged_weights(tmp_path, model):
    ema = {name: p.detach() + 1 for name, p in model.named_parameters()}
    loaded = checkpoint.load_model(write(tmp_path / "a.pt", model, ema=ema, codec_fingerprint="c"))
    assert torch.equal(loaded.projection.weight, model.projection.weight + 1)
    loaded = checkpoint.load_model(write(tmp_path / "b.pt", model, ema=None, codec_fingerprint="c"))
    assert torch.equal(loaded.projection.weight, model.projection.weight)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        checkpoint.load_model(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="--codec"):
        checkpoint.load_codec(tmp_path / "none")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "flipped"])
def test_corrupt_training_file_is_refused(tmp_path, model, damage):
    path = write(tmp_path / "a.pt", model)
    data = bytearray(path.read_bytes())
    start = data.index(model.projection.weight.detach().numpy().tobytes()[:64])       # inside a tensor, not in padding
    data[start] ^= 255
    path.write_bytes({"cut": data[:len(data) // 2], "garbage": b"not a checkpoint" * 9, "empty": b"", "flipped": bytes(data)}[damage])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load_model(path)


def test_pickled_code_is_refused(tmp_path):
    torch.save({"format": 1, "kind": "csm", "config": CSM}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="plain data"):
        checkpoint.load_training(tmp_path / "a.pt")


def test_foreign_wrong_version_and_wrong_kind(tmp_path, model):
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save({"format": 99, "kind": "csm"}, tmp_path / "new.pt")
    write(tmp_path / "codec.pt", model, kind="codec")
    for name, word in (("foreign.pt", "not written by this project"), ("new.pt", "version 99"), ("codec.pt", "kind 'codec'")):
        with pytest.raises(ValueError, match=word):
            checkpoint.load_model(tmp_path / name)


def test_weights_of_another_architecture(tmp_path, model):
    path = checkpoint.save_training(tmp_path / "a.pt", config=to_dict(model_preset("test", audio_vocab=33)), model=model.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        checkpoint.load_model(path)


def test_another_codec_is_refused(tmp_path, model):
    path = write(tmp_path / "a.pt", model, codec_fingerprint="a" * 16)
    checkpoint.load_model(path, codec_fingerprint="a" * 16)
    with pytest.raises(ValueError, match="fingerprint"):
        checkpoint.load_model(path, codec_fingerprint="b" * 16)
    with pytest.raises(ValueError, match="fingerprint"):
        checkpoint.load_training(path, codec_fingerprint="b" * 16)


def test_damaged_shipped_folder(tmp_path, model):
    checkpoint.save_pretrained(model, tmp_path / "m")
    with pytest.raises(ValueError, match="kind"):
        checkpoint.load_codec(tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 255
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        checkpoint.load_model(tmp_path / "m")
    weights.write_bytes(b"short")
    with pytest.raises(ValueError, match="corrupt"):
        checkpoint.load_model(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match="config.json"):
        checkpoint.load_model(tmp_path / "m")


def test_one_file_under_two_names_parts_when_rewritten(tmp_path, model):
    last, best = write(tmp_path / "last.pt", model, step=1), tmp_path / "best_model.pt"
    checkpoint.link_file(last, best)
    write(last, model, step=2)
    assert checkpoint.load_training(best)["step"] == 1 and checkpoint.load_training(last)["step"] == 2


def test_default_checkpoint_prefers_what_was_trained_here(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="train first"):
        checkpoint.default_checkpoint()
    (tmp_path / "pretrained/nano").mkdir(parents=True)
    assert checkpoint.default_checkpoint().name == "nano"
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "checkpoints/best_model.pt", model)
    assert checkpoint.default_checkpoint().name == "best_model.pt"


def test_export_command(tmp_path, model, capsys):
    write(tmp_path / "a.pt", model, step=5, codec_fingerprint="a" * 16)
    assert checkpoint.main(["--checkpoint", str(tmp_path / "a.pt"), "--output", str(tmp_path / "m")]) == 0
    assert checkpoint.load_model(tmp_path / "m").codec_fingerprint == "a" * 16
    assert checkpoint.main(["--checkpoint", str(tmp_path / "none.pt"), "--output", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no checkpoint")


def test_carry_over_takes_what_fits():
    """A model of fewer codebooks keeps reader, backbone and the rows of the semantic codebooks that both read."""
    from architecture import CSM
    from checkpoint import carry_over
    from config import model_preset
    old, new = CSM(model_preset("test")), CSM(model_preset("test", num_codebooks=5, num_semantic=2))
    for seed, model in enumerate((old, new)):
        model.init_weights(torch.Generator().manual_seed(seed), open_gates=True)
    before = {n: v.clone() for n, v in new.state_dict().items()}
    copied, total = carry_over(new, old)
    V = old.cfg.audio_vocab
    assert torch.equal(new.backbone.layers[0].mlp.w1.weight, old.backbone.layers[0].mlp.w1.weight)
    rows = new.audio_embeddings.weight
    assert torch.equal(rows[:2 * V], old.audio_embeddings.weight[:2 * V]) and torch.equal(rows[2 * V:], before["audio_embeddings.weight"][2 * V:])
    assert torch.equal(new.audio_head[:1], old.audio_head[:1]) and torch.equal(new.audio_head[1:], before["audio_head"][1:])
    assert 0.5 < copied / total < 1
