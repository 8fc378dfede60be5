"""benchmark.py tokens: the probe reads text where it is, and nowhere else; drawn codes keep the first codebook."""
from types import SimpleNamespace

import pytest
import torch

import benchmark_tokens as tokens
from config import CodecConfig
from rvq_tokenizer import Codec

CONFIG = CodecConfig(num_codebooks=4, num_semantic=2, codebook_size=64, semantic_dim=16, acoustic_dim=16, width=16, latent=16, encoder_layers=1, latent_layers=1,
                     decoder_width=16, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    codec = Codec(CONFIG).eval()
    codec.semantic.codebooks.mul_(20)
    codec.acoustic.codebooks.mul_(20)
    return codec


def turn(text: str, seed: int):
    """The first codebook spells the text, a letter a frame; the others are noise."""
    letters = torch.tensor([tokens.LETTERS.index(c) for c in text])
    codes = torch.randint(0, 64, (4, len(text)), generator=torch.Generator().manual_seed(seed))
    codes[0] = letters
    return SimpleNamespace(text=text, codes=codes.to(torch.int16))


def corpus(count: int, seed: int):
    """Twelve letters in random order: nothing but the codes tells them."""
    generator = torch.Generator().manual_seed(seed)
    texts = ["".join("abcdefgh"[i] for i in torch.randint(8, (12,), generator=generator).tolist()) for _ in range(count)]
    return [turn(text, 1000 * seed + n) for n, text in enumerate(texts)]


def test_text_is_read_from_the_codebooks_that_hold_it(codec, monkeypatch):
    monkeypatch.setattr(tokens, "PROBE_WIDTH", 48)
    train, test = corpus(64, 1), corpus(8, 2)
    semantic = tokens.read_text(codec, train, test, "semantic", 150, 0)
    acoustic = tokens.read_text(codec, train, test, "acoustic", 150, 0)
    assert semantic["cer"]["mean"] < 0.2 and acoustic["cer"]["mean"] > 0.5
    assert semantic["example"]["said"] == tokens.spelled(test[0].text)


def test_spelling():
    assert tokens.spelled("It's 9 o'clock, Ann!") == "it's o'clock ann"


def test_codes_are_filled_in_behind_the_true_first_one(codec):
    model = tokens.frame_model(codec, 0).eval()
    codes = turn("we are here", 3).codes
    made = tokens.fill_in(model, codes, 0.0, 5, None)
    assert made.shape == codes.shape and torch.equal(made[0], codes[0].long()) and 0 <= made.min() and made.max() < 64
    assert not torch.equal(made[1:], codes[1:].long()) and torch.equal(made, tokens.fill_in(model, codes, 0.0, 5, None))
    other = codes.clone()
    other[0, 5] = (other[0, 5] + 1) % 64
    assert torch.equal(tokens.fill_in(model, other, 0.0, 5, None)[:, :5], made[:, :5]), "what comes later must not matter"


def test_the_frame_model_learns_what_can_be_foretold(codec, monkeypatch):
    """Codebook 2 repeats the first one, codebook 3 is noise: one gets cheap, the other stays at the entropy of its codes."""
    monkeypatch.setattr(tokens, "FRAMES_PER_STEP", 120)
    train = corpus(32, 5)
    for t in train:
        t.codes[1] = (t.codes[0] + 3) % 64
    model, nats = tokens.train_frame_model(codec, train, 120, 0)
    assert len(nats) == 4 and nats[1] < 1.0 and nats[2] > 3.5 and not model.training


def test_bars_say_what_was_missed():
    part = {"text": {"semantic": {"cer": {"mean": 0.1}}, "acoustic": {"cer": {"mean": 0.2}}}, "words": {"drawn_over_input": {"mean": 0.05}}}
    assert [b["met"] for b in tokens.token_bars(part)] == [True, False, True]
