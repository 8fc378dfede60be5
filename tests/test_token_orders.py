"""The token orders: each is a likelihood that counts every code once, generates what it was taught, in its own order and length."""
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import test_benchmark
from config import OFF, model_preset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import token_orders as orders  # noqa: E402

weights = test_benchmark.weights                                               # fixture: an untrained codec and model
GREEDY = orders.Draw(temperature=0.0)
IDS = torch.tensor([256, 270, *b"a word", 258])


def small(name, loud=30.0, **other):
    """An order of the smallest size whose logits differ by several units."""
    torch.manual_seed(1)
    order = orders.build(name, model_preset("test", **(OFF | other)), seed=3)
    with torch.no_grad():
        for key, p in order.named_parameters():
            if "heads" in key or key == "first":
                p.mul_(loud)
    return order


def utterances(order, lengths=(5, 9, 2), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(IDS[: 4 + i], torch.randint(order.V, (order.K, T), generator=g)) for i, T in enumerate(lengths)]


def end_columns(order):
    """The parameters whose last column means the end."""
    return [p for key, p in order.named_parameters() if p.dim() == 3 and p.shape[-1] == order.V + 1]


# ----------------------------------------------------------------------------- likelihood

@pytest.mark.parametrize("name", orders.ORDERS)
def test_every_code_and_one_end_is_counted_once(name):
    order = small(name, loud=0.0)
    batch = utterances(order)
    T, K, V, A = sum(c.shape[1] for _, c in batch), order.K, order.V, order.cfg.num_semantic
    with_end = {"rq": T, "valle": T, "delay": K * T, "audiolm": A * T}[name] + len(batch)
    total, frames = order.loss(batch)
    assert frames == T and float(total.detach()) == pytest.approx(with_end * math.log(V + 1) + (K * T + len(batch) - with_end) * math.log(V), rel=1e-5)


@pytest.mark.parametrize("name", orders.ORDERS)
def test_padding_changes_nothing(name):
    order = small(name)
    batch = utterances(order)
    alone = sum(float(order.loss([example])[0].detach()) for example in batch)
    assert float(order.loss(batch)[0].detach()) == pytest.approx(alone, rel=1e-4)


def test_one_drawn_codebook_stands_for_all_while_training():
    order = small("valle", loud=1.0)
    batch = utterances(order)
    whole, g = float(order.loss(batch)[0].detach()), torch.Generator().manual_seed(0)
    order.train()
    drawn = [float(order.loss(batch, g)[0].detach()) for _ in range(40)]
    assert sum(drawn) / 40 == pytest.approx(whole, rel=0.02) and len({round(d, 3) for d in drawn}) == order.K - 1


# ----------------------------------------------------------------------------- generation

@pytest.mark.parametrize("name", orders.ORDERS)
def test_what_is_generated_step_by_step_is_the_best_of_the_whole_row(name, monkeypatch):
    """Caches, causality and the order itself: the training forward, on greedily generated codes, prefers every one of them."""
    order = small(name)
    codes = torch.cat(list(order.generate(IDS, 50, GREEDY, least=50)), 1)
    assert codes.shape == (order.K, 50) and codes.unique().numel() > 15
    seen = []

    def compare(h, heads, targets):
        best = torch.bmm(h, heads)[..., :order.V].argmax(-1)
        kept = (targets >= 0) & (targets < order.V)
        assert torch.equal(best[kept], targets[kept])
        seen.append(int(kept.sum()))
        return h.sum()
    monkeypatch.setattr(orders, "nats", compare)
    order.loss([(IDS, codes)])
    assert sum(seen) == codes.numel()


@pytest.mark.parametrize("name", ["rq", "delay"])
def test_later_codes_do_not_change_earlier_likelihoods(name, monkeypatch):
    order, kept = small(name), []
    monkeypatch.setattr(orders, "nats", lambda h, heads, targets: kept.append(h) or h.sum())
    codes = utterances(order, (9,))[0][1]
    other = codes.clone()
    other[:, 6:] = (other[:, 6:] + 1) % order.V
    for c in (codes, other):
        order.loss([(IDS, c)])
    first, second = kept[0], kept[len(kept) // 2]
    assert torch.allclose(first[:, :7], second[:, :7], atol=1e-5) and not torch.allclose(first[:, 7:], second[:, 7:], atol=1e-3)


def test_the_second_model_of_valle_sees_both_sides_and_only_earlier_codebooks(monkeypatch):
    order, kept = small("valle"), []
    monkeypatch.setattr(orders, "nats", lambda h, heads, targets: kept.append(h[0]) or h.sum())
    codes = utterances(order, (9,))[0][1]
    late, last = codes.clone(), codes.clone()
    late[1, 8] = (late[1, 8] + 1) % order.V                                    # the last frame of codebook 2
    last[-1] = (last[-1] + 1) % order.V                                        # the last codebook
    for c in (codes, late, last):
        order.loss([(IDS, c)])
    plain, with_late, with_last = kept[:8], kept[8:16], kept[16:]
    assert not torch.allclose(plain[2][0], with_late[2][0], atol=1e-4) and torch.allclose(plain[1], with_late[1])
    assert all(torch.equal(a, b) for a, b in zip(plain, with_last))


def test_the_delay_pattern_is_undone_exactly():
    codes = torch.arange(12).view(3, 4)
    late = orders.delay(codes, -1)
    assert late.tolist() == [[0, 1, 2, 3, -1, -1], [-1, 4, 5, 6, 7, -1], [-1, -1, 8, 9, 10, 11]]
    for K, T in ((2, 1), (8, 5), (5, 8), (12, 30)):
        codes = torch.randint(9, (K, T))
        assert torch.equal(orders.undelay(orders.delay(codes, 9)), codes)


def test_delayed_generation_gives_back_the_frames_it_said(monkeypatch):
    """The pieces are the columns of the steps' tokens with the delay taken out."""
    order, said = small("delay"), []
    inner = order._say
    monkeypatch.setattr(order, "_say", lambda *a: said.append(inner(*a)) or said[-1])
    codes = torch.cat(list(order.generate(IDS, 11, GREEDY, least=11)), 1)
    late = torch.stack(said, 1)
    assert torch.equal(orders.undelay(late), codes) and torch.equal(orders.delay(codes, order.V), late)


# ----------------------------------------------------------------------------- order and length

@pytest.mark.parametrize("name", orders.ORDERS)
def test_sound_comes_when_the_order_allows(name, monkeypatch):
    """Tokens said before the first frames are final, and how the frames come."""
    order, steps = small(name), []
    inner = orders.Line.step
    monkeypatch.setattr(orders.Line, "step", lambda self, going, x: steps.append(self) or inner(self, going, x))
    order.chunk, pieces = 8, []
    for piece in order.generate(IDS, 20, GREEDY, least=20):
        pieces.append((piece.shape[1], sum(line is not getattr(order, "depth", None) for line in steps)))
    K, A = order.K, order.cfg.num_semantic
    if name == "rq":
        assert pieces == [(1, t) for t in range(20)]
    if name == "delay":
        assert pieces == [(1, t + K - 1) for t in range(20)]
    if name == "valle":
        assert pieces == [(20, 19)]
    if name == "audiolm":
        before, fine = (20 * A - 1) + (20 * order.coarse - 1), K - A - order.coarse
        assert pieces == [(8, before + 8 * fine - 1), (8, before + 16 * fine - 2), (4, before + 20 * fine - 3)]


@pytest.mark.parametrize("name", orders.ORDERS)
def test_length_is_between_least_and_most(name):
    order = small(name)

    def length(least, most):
        return torch.cat(list(order.generate(IDS, most, GREEDY, least)), 1).shape[1]
    with torch.no_grad():
        wanted = [p[..., -1].clone() for p in end_columns(order)]
        for p in end_columns(order):
            p[..., -1] = 0
    assert wanted and length(1, 13) <= 13
    heads = orders.shut
    orders.shut = lambda logits, end: torch.nn.functional.pad(logits[..., :-1], (0, 1), value=1e6) if end else logits[..., :-1]
    try:
        assert [length(least, 13) for least in (1, 4, 13)] == [1, 4, 13]
    finally:
        orders.shut = heads
    assert length(13, 13) == 13


@pytest.mark.parametrize("name", orders.ORDERS)
def test_a_text_that_leaves_little_room_is_cut_and_one_that_leaves_none_is_refused(name):
    order = small(name)
    text = torch.full((500,), 97)
    assert torch.cat(list(order.generate(text, 99, GREEDY, least=99)), 1).shape[1] == order.most_frames(500) < 13
    with pytest.raises(ValueError, match="max_positions"):
        next(order.generate(torch.full((512,), 97), 9, GREEDY))


@pytest.mark.parametrize("name", orders.ORDERS)
def test_the_same_seed_gives_the_same_codes(name):
    order = small(name, loud=5.0)
    a, b, c = (torch.cat(list(order.generate(IDS, 9, orders.Draw(1.0, 20, torch.Generator().manual_seed(seed)), 9)), 1) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ----------------------------------------------------------------------------- learning

@pytest.mark.parametrize("name", orders.ORDERS)
def test_two_utterances_are_learned_by_heart_with_their_lengths(name):
    cfg = model_preset("test", **OFF)
    cfg.num_codebooks, cfg.num_semantic, cfg.audio_vocab = 4, 2, 17
    torch.manual_seed(0)
    order = orders.build(name, cfg)
    batch = [(torch.tensor([256, 97, 258]), torch.randint(16, (4, 5))), (torch.tensor([256, 98, 99, 258]), torch.randint(16, (4, 8)))]
    settings = orders.Settings(train_steps=260 if name == "valle" else 120, batch=4, lr=4e-3)
    before = orders.held_out(order, batch_of(batch), 2)
    orders.train(order, batch_of(batch), settings)
    assert orders.held_out(order, batch_of(batch), 2) < 0.1 * before
    for ids, codes in batch:
        assert torch.equal(torch.cat(list(order.generate(ids, 30, GREEDY)), 1), codes)


def batch_of(batch):
    return [("text", ids, codes) for ids, codes in batch]


# ----------------------------------------------------------------------------- the same as CSM

@torch.no_grad()
def test_rq_is_csm_without_additions():
    """The same weights in architecture.CSM, whose token 0 is our end, give the same likelihood."""
    from architecture import CSM
    from generation import Turn, turn_rows
    from text_tokenizer import ByteTokenizer
    cfg = model_preset("test", depth_decay=0.0, **OFF)
    order, csm = small("rq"), CSM(cfg)
    csm.init_weights()
    turned = {"text.weight": order.text.weight, "projection.weight": order.projection.weight}
    csm.text_embeddings.weight.copy_(turned["text.weight"])
    csm.projection.weight.copy_(turned["projection.weight"])
    csm.backbone.load_state_dict(order.line.stack.state_dict())
    csm.decoder.load_state_dict(order.depth.stack.state_dict())
    table = csm.audio_embeddings.weight.view(order.K, order.V + 1, -1)
    table[:, 1:] = order.codes.weight.view(order.K, order.V, -1)
    table[:, 0] = 0
    csm.codebook0_head.weight.copy_(order.first[0].T.roll(1, 0))
    csm.audio_head[..., 1:], csm.audio_head[..., 0] = order.heads, 0
    codes = torch.randint(order.V, (order.K, 7))
    tokenizer = ByteTokenizer()
    rows = turn_rows(Turn(0, "a word", None, codes), cfg, tokenizer, 0)
    loss = csm.loss(rows)
    assert float(loss["c0"][0]) == pytest.approx(float(first_codebook(order, rows, codes)), rel=1e-4)
    hidden = csm(rows)[0, len(rows.frames[0]) - 9:-2]
    depth = csm.depth_logits(hidden, codes.T + 1)[..., 1:]
    mine = []
    inner, orders.nats = orders.nats, lambda h, heads, targets: mine.append(torch.bmm(h, heads)) or h.sum()
    try:
        order.loss([(rows.frames[0, :-8, -1], codes)])
    finally:
        orders.nats = inner
    assert torch.allclose(mine[1].transpose(0, 1), depth, atol=1e-3)


def first_codebook(order, rows, codes):
    kept = []
    inner, orders.nats = orders.nats, lambda h, heads, targets: kept.append(inner(h, heads, targets)) or kept[-1]
    try:
        order.loss([(rows.frames[0, :-8, -1], codes)])
    finally:
        orders.nats = inner
    return kept[0]


# ----------------------------------------------------------------------------- the experiment

def test_moved_bytes_are_those_of_what_is_multiplied():
    order = small("delay")
    stack = sum(p.nbytes for p in order.line.stack.layers.parameters())
    assert orders.moved_bytes(order, 10) == pytest.approx((stack + order.heads.nbytes) * 17 / 10)
    assert orders.moved_bytes(small("audiolm"), 10) > orders.moved_bytes(order, 10) and orders.moved_bytes(small("rq"), 10) > 0
    assert orders.moved_bytes(small("valle"), 100) < orders.moved_bytes(small("valle"), 10)


def test_an_experiment_from_end_to_end(weights, monkeypatch, capsys):
    import benchmark_tokens
    import measuring
    g = torch.Generator().manual_seed(0)
    turns = [SimpleNamespace(text="a word", codes=torch.randint(64, (8, 6), generator=g).to(torch.int16)) for _ in range(3)]
    monkeypatch.setattr(benchmark_tokens, "split_turns", lambda data, codec, split, count, seed: turns[:count])
    monkeypatch.setattr(measuring, "hear", lambda audio, text, mos=True: {"said": text, "heard": text if len(audio) else "", "mos": None})
    words = f"--codec {weights}/codec --model_size test --frames 4 --repeats 1 --train_steps 2 --batch 2 --spoken_turns 1".split()
    assert orders.main(words) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(result["orders"]) == list(orders.ORDERS) and result["weights"] == "trained here"
    for row in result["orders"].values():
        assert row["frames"] == 4 and 0 < row["first_audio_ms"]["p50"] <= row["total_ms"]["p50"] and row["spoken"]["wer"]["mean"] == 0
        assert 0 < row["nats_per_frame"] < 2 * 8 * math.log(65) and row["training"]["seconds"] > 0


def test_help_is_instant_and_mistakes_are_one_line():
    script = str(ROOT / "experiments" / "token_orders.py")
    shown = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--train_steps" in shown.stdout and " torch\n" not in shown.stderr
    for words in (["--orders", "rq,best"], ["--frames", "0"], ["--orderz", "rq"]):
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
