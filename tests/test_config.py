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
    cfg = model_preset("nano", depth_decay=1.0)
    weights, split = cfg.depth_weights, cfg.num_semantic - 1          # weights[i] belongs to codebook i + 2
    assert weights[:split] == sorted(weights[:split], reverse=True) and weights[split:] == sorted(weights[split:], reverse=True)
    assert weights[0] == pytest.approx(weights[split]) and weights[0] > 2 * weights[2]


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="--depth_decay"):
        model_preset("nano", depth_decay=-1.0)
