"""Adapters on the tiny model: only they learn, merging changes nothing that is heard, the voice is learnt; folders of recordings."""
import json

import numpy as np
import pytest
import torch

import checkpoint
import collect_data
import lora
import recordings
import train
from audio_io import SAMPLE_RATE, write_audio
from dataset_pipeline import read_turns
from test_train import FINGERPRINT, flags, losses, same, settings, write_tokens
from text_tokenizer import ByteTokenizer

OPTIONS = {"from_scratch": False, "lora": True, "lora_rank": 4, "lexicon_words": 0, "lr": 2e-2, "warmup_steps": 0, "max_steps": 12, "eval_every": 4, "ema": 0.5}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base model, and a run that adapts it to data/."""
    folder = tmp_path_factory.mktemp("lora")
    write_tokens(folder / "data", conversations=3)
    cfg = settings(folder / "data", folder / "out", **OPTIONS, init_from=str(folder / "base"), codec=str(folder / "none"))
    base, _ = train.build_model(settings(folder / "data", folder / "x"), None, FINGERPRINT)
    checkpoint.save_pretrained(base, folder / "base", int8=False, codec_fingerprint=FINGERPRINT)
    trainer = train.Trainer(cfg)
    trainer.run()
    return folder, cfg, trainer


def test_only_adapters_learn(tuned):
    folder, cfg, trainer = tuned
    before = checkpoint.load_model(folder / "base").state_dict()
    after = trainer.model.state_dict()
    adapted = set(lora.adapters(trainer.model))
    for name, value in before.items():
        path = name.removesuffix(".weight")
        now = after[f"{path}.parametrizations.weight.original" if name != "audio_head" else "parametrizations.audio_head.original"] if path in adapted else after[name]
        assert torch.equal(value, now), name
    assert {"audio_head", "codebook0_head", "projection"} <= adapted
    assert any(n.startswith("decoder.layers") for n in adapted) and any(n.startswith("backbone.layers") for n in adapted) and not any("text_head" in n for n in adapted)
    assert all(bool(a.up.any()) for a in lora.adapters(trainer.model).values())               # each of them has learnt


def test_the_loss_on_that_voice_falls(tuned):
    folder, cfg, trainer = tuned
    held = [m for m in train.runtime.read_metrics(folder / "out/metrics.jsonl") if m["kind"] == "train"]
    assert held[-1]["c0"] < held[0]["c0"] - 0.02 and held[-1]["depth"] < held[0]["depth"]


def test_merging_is_using(tuned, tmp_path):
    """The adapter's folder, loaded into the base and merged, gives the logits of the adapted model; so does the merged folder."""
    folder, cfg, trainer = tuned
    size = lora.save(trainer.model, tmp_path / "adapter", cfg.init_from, FINGERPRINT)
    assert size < 1e6 and sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [lora.ABOUT, lora.WEIGHTS]
    loaded = lora.load(checkpoint.load_model(folder / "base"), tmp_path / "adapter")
    assert lora.main(["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged, base = checkpoint.load_model(tmp_path / "merged"), checkpoint.load_model(folder / "base")
    assert loaded.state_dict().keys() == base.state_dict().keys() and not lora.adapters(loaded)
    batch = trainer.data.next_batch(train.Stage(1))[0]
    trainer.model.eval()
    with torch.no_grad():
        heard = [(model.c0_logits(h := model(batch)), model.depth_logits(h[0, :3], batch.frames[0, -4:-1, :-1].clamp(max=64))) for model in (trainer.model, loaded, merged, base)]
    for want, got, stored, without in zip(*heard):
        assert torch.allclose(want, got, atol=2e-2 * float(want.abs().max())) and not torch.allclose(want, without, atol=5e-2 * float(want.abs().max()))
        assert (stored - want).abs().max() < 0.3 * (without - want).abs().max()
    same(lora.merge(loaded).state_dict(), loaded.state_dict())


def test_the_depth_decoder_speaks_with_its_adapter(tuned):
    """Generation folds weights: it must fold the adapted ones."""
    model = tuned[2].model.eval()
    pick = lambda logits, k: logits.argmax(-1)                                # noqa: E731
    h = torch.randn(3, model.cfg.backbone.width, generator=torch.Generator().manual_seed(0))
    with lora.settled(model), torch.inference_mode():
        codes = model.depth_generate(h, torch.tensor([1, 2, 3]), pick)
        assert model._folded() is model._folded()                             # worked out once, not at every frame
        assert torch.equal(model.depth_logits(h, codes).argmax(-1), codes[:, 1:])


def test_the_run_goes_on_from_its_small_file(tuned, tmp_path):
    folder, cfg, trainer = tuned
    part = train.Trainer(settings(folder / "data", tmp_path, **OPTIONS | {"max_steps": 12}, init_from=str(folder / "base"), codec=str(folder / "none")))
    step = part._step_and_log

    def stop():
        step()
        part.interrupted = part.step == 6
    part._step_and_log = stop
    part.run()
    assert (tmp_path / "last.adapter.pt").stat().st_size < (folder / "base/model.safetensors").stat().st_size
    assert train.main(["--resume", str(tmp_path / "last.adapter.pt")]) == 0
    assert losses(tmp_path) == losses(folder / "out") and (tmp_path / "adapter" / lora.WEIGHTS).read_bytes() == (folder / "out/adapter" / lora.WEIGHTS).read_bytes()


def test_adapters_of_other_models_are_refused(tuned, tmp_path):
    folder, cfg, trainer = tuned
    other = checkpoint.load_model(folder / "base")
    with torch.no_grad():
        other.projection.weight.add_(1e-3)
    with pytest.raises(ValueError, match="other weights.*--checkpoint"):
        lora.load(other, folder / "out/adapter")
    (tmp_path / lora.ABOUT).write_text(json.dumps({"format": 1, "kind": "adapter"}))
    (tmp_path / lora.WEIGHTS).write_bytes(b"x")
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="--adapter"):
            lora.read(place)
    with pytest.raises(ValueError, match="--lora_rank"):
        lora.attach(other, 1000, 1.0)


def test_lora_without_a_model_or_with_contradictions(tuned, tmp_path, capsys):
    folder, cfg, trainer = tuned
    assert train.main(flags(settings(folder / "data", tmp_path, from_scratch=False, lora=True, codec=str(folder / "none")))) == 2      # there is no pretrained/test
    assert "--init_from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--from_scratch"):
        settings(folder, tmp_path, lora=True, from_scratch=True)


# ----------------------------------------------------------------------------- recordings

def voice(seconds, seed=0):
    """Noise in syllables: quiet every half second."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    return (0.2 * np.random.default_rng(seed).standard_normal(n) * (np.sin(2 * np.pi * t) > -0.5)).astype(np.float32)


def test_long_recordings_are_cut_in_their_pauses():
    audio = voice(30)
    pieces = recordings.cut(audio)
    assert np.array_equal(np.concatenate(pieces), audio) and len(pieces) >= 3 and all(len(p) <= 12 * SAMPLE_RATE for p in pieces)
    for piece in pieces[:-1]:
        assert np.abs(piece[-1200:]).max() == 0


def test_word_times_belong_to_the_words_that_were_heard():
    heard = [("Good", 0.1, 0.3), ("moaning,", 0.3, 0.7), ("my", 0.8, 0.9), ("friend.", 0.9, 1.4)]
    assert recordings.word_times("good morning, my friend.", heard) == [[0, 4, 0.1, 0.3], [14, 16, 0.8, 0.9], [17, 24, 0.9, 1.4]]
    assert recordings.word_times("nothing of the kind", heard) == []


def test_a_folder_of_recordings_becomes_tokens(tmp_path, monkeypatch, capsys):
    """With and without transcripts; nothing is written into the folder; what cannot be used is named."""
    from config import CodecConfig
    from rvq_tokenizer import Codec
    fingerprint = checkpoint.save_codec(Codec(CodecConfig(width=32, latent=32, codebook_size=64)), tmp_path / "codec")
    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(4):
        write_audio(mine / f"take_{number}.wav", voice(1.5, number))
    write_audio(mine / "click.wav", voice(0.2))
    (mine / "take_0.txt").write_text("I have 2 dogs.", encoding="utf-8")
    monkeypatch.setattr(recordings, "heard_words", lambda audio: [("I", 0.1, 0.2), ("have", 0.2, 0.5), ("too", 0.5, 0.7), ("dogs.", 0.8, 1.3)])
    before = sorted(mine.iterdir())
    assert recordings.is_recordings(mine)
    cfg = settings(mine, tmp_path / "out", codec=str(tmp_path / "codec"))
    assert train.trainable(cfg) == str(tmp_path / "mine-prepared") and sorted(mine.iterdir()) == before
    said = capsys.readouterr().out
    assert "1 of 3" in said and "2 of 3" in said and "3 of 3" in said and "click" in said
    turns = [t for split in collect_data.SPLITS for c in read_turns(tmp_path / "mine-prepared", split, ByteTokenizer(), fingerprint) for t in c]
    assert sorted(t.text for t in turns) == ["i have too dogs."] * 3 + ["i have two dogs."] and all(t.consumed is not None for t in turns)
    assert train.trainable(cfg) == str(tmp_path / "mine-prepared") and "prepared before" in capsys.readouterr().out
    assert not recordings.is_recordings(tmp_path / "mine-prepared")


def test_the_demo_speaks_on_the_model_below_the_adapter(tuned):
    from pathlib import Path

    import demo
    folder, cfg, trainer = tuned
    assert demo.Lab.find_weights("", str(folder / "out/adapter")) == Path(cfg.init_from)
    assert demo.Lab.find_weights("given", str(folder / "out/adapter")) == Path("given")
    assert demo.build_parser().parse_args(["--adapter", "x"]).adapter == "x"
