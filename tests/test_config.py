"""The settings: weights of the depth loss."""
import pytest

from config import MODEL_PRESETS, model_preset


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_depth_weights_have_mean_one(name):
    weights = model_preset(name).depth_weights
    assert len(weights) == model_preset(name).num_codebooks - 1
    assert sum(weights) / len(weights) == pytest.approx(1.0)


def test_depth_weights_are_even_without_decay():
    assert set(model_preset("tiny").depth_weights) == {1.0}


def test_coarse_codebooks_weigh_more_on_both_sides():
    cfg = model_preset("tiny", depth_decay=1.0)
    weights, split = cfg.depth_weights, cfg.num_semantic - 1          # weights[i] belongs to codebook i + 2
    assert weights[:split] == sorted(weights[:split], reverse=True) and weights[split:] == sorted(weights[split:], reverse=True)
    assert weights[0] == pytest.approx(weights[split]) and weights[0] > 2 * weights[2]


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="--depth_decay"):
        model_preset("nano", depth_decay=-1.0)


def test_noisy_frames_change_some_inputs_only_in_training():
    import dataclasses

    import torch

    from architecture import CSM, FrameBatch
    cfg = model_preset("test", code_noise=0.3)
    model = CSM(cfg)
    g = torch.Generator().manual_seed(0)
    B, S, K = 2, 60, cfg.num_codebooks
    frames = torch.zeros(B, S, K + 1, dtype=torch.long)
    frames[:, :10, -1] = torch.randint(1, 200, (B, 10), generator=g)
    frames[:, 10:-1, :-1] = torch.randint(1, cfg.audio_vocab, (B, S - 11, K), generator=g)
    mask = torch.ones_like(frames, dtype=torch.bool)
    mask[:, :10, :-1] = mask[:, 10:, -1] = False
    none = torch.full((B, S), -1)
    batch = FrameBatch(frames, mask, torch.zeros(B, S, dtype=torch.long), none, none)
    noisy = model.train()._noisy_frames(batch, g)
    changed = (noisy != frames).any(-1)
    assert 0.15 < changed[:, 10:-1].float().mean() < 0.45 and not changed[:, :10].any() and not changed[:, -1].any()
    known = {tuple(f) for f in frames[:, 10:-1].reshape(-1, K + 1).tolist()}
    assert {tuple(f) for f in noisy[:, 10:-1].reshape(-1, K + 1).tolist()} <= known
    assert torch.equal(model.eval()._noisy_frames(batch, g), frames)
    assert torch.equal(CSM(dataclasses.replace(cfg, code_noise=0.0)).train()._noisy_frames(batch, g), frames)


def test_a_model_reads_the_first_codebooks_of_either_side():
    from config import codec_columns
    assert codec_columns(12, 3, 10) == [0, 1, 2, *range(10, 19)]
    assert codec_columns(16, 8, 10) == [*range(8), *range(10, 18)]
    assert codec_columns(16, 10, 10) == list(range(16)) and codec_columns(32, 10, 1) == list(range(32)) and codec_columns(2, 4, 10) == [0, 1]
