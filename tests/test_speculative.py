"""Speculative decoding is exact: equal at temperature 0, the model's own distribution at 1, and a wrong rule would be seen."""
import copy
import itertools

import pytest
import torch

import speculative
from architecture import CSM
from config import SamplingConfig, TransformerConfig, model_preset
from generation import draw_codes, generate_text
from speculative import Lookup, Phrases, Quick, SpeculativeDepth, TextLookup, accept, distribution, speculate
from text_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
GREEDY = SamplingConfig(temperature=0.0, depth_temperature=0.0)
WARM = SamplingConfig(depth_temperature=0.8, depth_top_k=4)
V = 6                                   # codes of the small vocabulary


def make_model(seed=0, **overrides):
    model = CSM(model_preset("test", **overrides))
    model.init_weights(torch.Generator().manual_seed(seed), open_gates=True)
    model.audio_head.data *= 20         # distributions with likely and unlikely codes
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def small():
    """Three codebooks of V codes: all frames can be counted."""
    return make_model(num_codebooks=3, num_semantic=2, audio_vocab=V + 1, depth=TransformerConfig(2, 32, 64, 2, 1, max_positions=8))


def too_far(counts: torch.Tensor, p: torch.Tensor) -> bool:
    """Chi-square of counts against probabilities p beyond the 0.1 % quantile (Wilson-Hilferty); cells of p = 0 must be empty."""
    if counts[p == 0].any():
        return True
    wanted = (p * counts.sum())[p > 0]
    statistic, df = float(((counts[p > 0] - wanted) ** 2 / wanted).sum()), int((p > 0).sum()) - 1
    return statistic > df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3


# ----------------------------------------------------------------------------- the rule

def always(p, q, drafts, generator=None):
    return len(drafts), None


def no_rest(p, q, drafts, generator=None):
    """Forgets to take q away from what replaces a refused draft."""
    count, other = accept(p, q, drafts, generator)
    return count, other if other is None else speculative.draw(p[count], generator)


def fair_coin(p, q, drafts, generator=None):
    """Keeps a draft with probability p alone, as if q were certain."""
    return accept(p, torch.ones_like(q), drafts, generator) if bool(drafts.numel()) else (0, None)


@pytest.mark.parametrize("rule, right", [(accept, True), (always, False), (no_rest, False), (fair_coin, False)], ids=lambda x: getattr(x, "__name__", None))
def test_the_rule_keeps_the_distribution(rule, right):
    """One token from two distributions; the test that passes the right rule fails the wrong ones."""
    p, q = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0]]), torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.2]])
    g, counts = torch.Generator().manual_seed(7), torch.zeros(5)
    for _ in range(4000):
        draft = torch.multinomial(q[0], 1, generator=g)
        count, other = rule(p, q, draft, g)
        counts[int(draft if other is None else other)] += 1
    assert too_far(counts, p[0]) != right


def test_the_rule_stops_at_the_first_refused_draft():
    p = torch.nn.functional.one_hot(torch.tensor([1, 2, 0]), 4).float()
    count, other = accept(p, torch.full((3, 4), 0.25), torch.tensor([1, 3, 0]))
    assert count == 1 and int(other) == 2
    assert accept(p, torch.full((3, 4), 0.25), torch.tensor([1, 2, 0])) == (3, None)


def test_distribution_is_what_sample_draws_from():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    assert distribution(logits, 0, 4).tolist() == [[0, 1, 0, 0]]
    p = distribution(logits, 0.5, 2)
    assert (p > 0).tolist() == [[False, True, True, False]] and p[0, 1] / p[0, 2] == pytest.approx(torch.e ** 2, rel=1e-4)


# ----------------------------------------------------------------------------- codes of a frame

def drafters(model):
    """Exact, near, rough, and unrelated drafts."""
    other = make_model(seed=5, **{k: getattr(model.cfg, k) for k in ("num_codebooks", "num_semantic", "audio_vocab", "depth")})
    return {"itself": Quick(model, "fp32"), "int8": Quick(model, "int8"), "another model": Quick(other, "fp32"), "phrases": Phrases(model)}


@pytest.mark.parametrize("name", ["itself", "int8", "another model", "phrases"])
def test_greedy_codes_are_equal(model, name):
    spoken = SpeculativeDepth(model, drafters(model)[name])
    hidden = torch.randn(12, model.cfg.backbone.width).repeat(2, 1)             # the second time the phrases are known
    with torch.inference_mode():
        for h in hidden:
            want = draw_codes(model, h[None], 64, GREEDY, None, torch.tensor([3]))
            assert torch.equal(spoken(h[None], torch.tensor([3]), 64, GREEDY), want)
    assert spoken.tally.frames == 24 and spoken.tally.made == 24 * 7
    if name == "itself":
        assert spoken.tally.acceptance == 1 and spoken.tally.passes == spoken.tally.whole == 24
    if name == "int8":
        assert 0.8 < spoken.tally.acceptance <= 1
    if name == "another model":
        assert spoken.tally.acceptance < 0.3


@pytest.mark.parametrize("name, right", [("int8", True), ("another model", True), ("phrases", True), ("another model", False)])
def test_frames_are_distributed_as_the_model_draws_them(small, name, right, monkeypatch):
    """All V x V frames after one hidden state, counted, against the product of the model's probabilities; with a broken rule it is seen."""
    if not right:
        monkeypatch.setattr(speculative, "accept", always)
    h, c0, g = torch.randn(1, small.cfg.backbone.width, generator=torch.Generator().manual_seed(1)), torch.tensor([2]), torch.Generator().manual_seed(11)
    spoken, counts, p = SpeculativeDepth(small, drafters(small)[name]), torch.zeros(V, V), torch.zeros(V, V)
    with torch.inference_mode():
        for a, b in itertools.product(range(V), repeat=2):
            logits = small.depth_logits(h, torch.tensor([[2, a + 1, b + 1]]))[0, :, 1:]
            p[a, b] = distribution(logits[:1], 0.8, 4)[0, a] * distribution(logits[1:], 0.8, 4)[0, b]
        for _ in range(1200):
            _, a, b = spoken(h, c0, V, WARM, g)[0].tolist()
            counts[a - 1, b - 1] += 1
    assert p.sum() == pytest.approx(1, abs=1e-4) and too_far(counts.flatten(), p.flatten()) != right
    assert not right or 0 < spoken.tally.acceptance < 1 or name == "int8"


def test_generation_uses_it_for_one_row_only(model, monkeypatch):
    model = copy.copy(model)
    note = speculate(model, "int8")
    assert "int8" in note and isinstance(model.frame_codes, SpeculativeDepth)
    draw_codes(model, torch.randn(1, model.cfg.backbone.width), 64, GREEDY)
    draw_codes(model, torch.randn(3, model.cfg.backbone.width), 64, GREEDY)
    assert model.frame_codes.tally.frames == 1
    model.frame_codes = None
    monkeypatch.setattr(speculative, "_race", lambda *_: 0.8)
    assert "no speculative" in speculate(model, "auto") and model.frame_codes is None
    monkeypatch.setattr(speculative, "_race", lambda *_: 1.5)
    assert speculate(model, "auto") and model.frame_codes is not None


def test_the_race_runs_and_leaves_the_model_as_it_was(model):
    assert speculative._race(model, Quick(model), GREEDY, frames=2) > 0 and model.frame_codes is None


def test_refusals(model):
    with pytest.raises(ValueError, match="--speculative"):
        speculate(copy.copy(model), "oracle")
    other = copy.copy(model)
    other.precision = "int8"
    with pytest.raises(ValueError, match="--precision fp32"):
        speculate(other, "int8")


# ----------------------------------------------------------------------------- text

def test_lookup_takes_the_longest_match():
    found = Lookup([list(b"the cat sat"), list(b"a cat ran off")], least=3, most=4)
    assert bytes(found.after(list(b"the cat"))) == b" sat" and bytes(found.after(list(b"a cat"))) == b" ran"
    assert found.after(list(b"dog")) == [] and found.after(list(b"at")) == []
    assert bytes(Lookup([list(b"abcd")], 3, 9).after(list(b"abc"))) == b"d"


def plain_text(model, temperature=0.0, most=40):
    return generate_text(model, TOKENIZER, model.new_state(1, 200), TOKENIZER.speak_prefix(0, None), 0, most, temperature)


@pytest.mark.parametrize("known", ["all of it", "half, then another way", "nothing"])
def test_greedy_text_is_equal(model, known):
    want = plain_text(model)
    corpus = {"all of it": [want], "half, then another way": [want[:20] + list(b"zebra zebra")], "nothing": []}[known]
    writer = TextLookup(TOKENIZER, least=3)
    for ids in corpus:
        writer.lookup.add(ids)
    got = list(writer(model, TOKENIZER, model.new_state(1, 200), TOKENIZER.speak_prefix(0, None), 0, 40, 0.0))
    assert got == want and len(got) > 20
    assert known != "all of it" or (writer.tally.passes < 0.5 * writer.tally.made and writer.tally.kept > 10)


def test_the_end_is_drafted_too_and_never_comes_first(model):
    writer = TextLookup(TOKENIZER, least=1, most=3)
    ids = list(writer(model, TOKENIZER, model.new_state(1, 200), TOKENIZER.speak_prefix(0, None), 0, 30, 1.0, torch.Generator().manual_seed(2)))
    assert ids and TOKENIZER.eot not in ids and len(ids) <= 30


def test_replies_go_through_the_writer(model):
    from generation import Session
    from rvq_tokenizer import Codec
    from test_quantisation import TINY_CODEC
    session = Session(model, Codec(TINY_CODEC).eval(), TOKENIZER, SamplingConfig(text_temperature=0.0))
    session.add_turn(0, "hello.")
    plain = session.reply_text(1)
    session.write = TextLookup(TOKENIZER, [plain])
    assert session.reply_text(1) == plain and session.write.tally.made > 0
