"""Transformer parts: values against formulas, fast paths against slow ones."""
import math

import pytest
import torch
import torch.nn.functional as F

import layers
from config import TransformerConfig

CFG = TransformerConfig(layers=2, width=48, ffn=96, heads=6, kv_heads=2, max_positions=64)


def fill(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, 0.0 if p.dim() > 1 else 1.0, 0.2)
    return module


@pytest.mark.parametrize("head_dim, kept", [(64, 15), (128, 29)])
def test_rope_scaling_keeps_the_fast_and_slows_the_slow_frequencies(head_dim, kept):
    cfg = TransformerConfig(1, 2048, 8192, 2048 // head_dim, 8)
    plain = 500000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    got = layers.rope_frequencies(head_dim, cfg).double()
    assert int(((got / plain - 1).abs() < 1e-6).sum()) == kept
    assert got[-1].item() == pytest.approx(plain[-1].item() / 32, rel=1e-6)


def test_rope_scaling_equals_the_numbers_of_the_hugging_face_export():
    here = layers.rope_frequencies(64, TransformerConfig(1, 2048, 8192, 32, 8))
    there = TransformerConfig(1, 2048, 8192, 32, 8, rope_low_freq=0.125, rope_high_freq=0.5, rope_old_context=1024)
    torch.testing.assert_close(here, layers.rope_frequencies(64, there), rtol=1e-6, atol=0)


def test_rope_turns_by_distance_only():
    rope, q, k = layers.Rope(8, CFG), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i, j):
        return (rope.rotate(q, *rope.table(torch.tensor([i]))) * rope.rotate(k, *rope.table(torch.tensor([j])))).sum()
    torch.testing.assert_close(score(9, 4), score(45, 40))
    assert not torch.isclose(score(9, 4), score(9, 5))


def test_rope_pairs_the_halves():
    rope, x = layers.Rope(8, CFG), torch.zeros(1, 1, 1, 8)
    x[..., 0] = 1
    turned = rope.rotate(x, *rope.table(torch.tensor([1])))[0, 0, 0]
    assert turned[0].item() == pytest.approx(math.cos(1)) and turned[4].item() == pytest.approx(math.sin(1))


def test_rmsnorm_squares_in_float32():
    norm, x = layers.RMSNorm(16), torch.full((1, 16), 300.0, dtype=torch.float16)   # 300 squared is no float16
    torch.testing.assert_close(norm(x).float(), torch.ones(1, 16), rtol=1e-3, atol=0)


def test_products_equal_fused_attention_with_a_mask():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.zeros(2, 1, 5, 9).masked_fill(torch.rand(2, 1, 5, 9) < 0.4, -math.inf)
    mask[..., 0] = 0
    fast = layers.attend(q.clone().requires_grad_(), k, v, mask)
    torch.testing.assert_close(fast, layers.attend(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_causal_strips_equal_products(masked, monkeypatch):
    """Output and gradients; grouped queries, a last strip that is not full, and a mask that hides more than the future."""
    q, k, v = (torch.randn(2, heads, 11, 8, requires_grad=True) for heads in (6, 2, 2))
    hidden = torch.triu(torch.ones(11, 11), 1).bool() | (torch.rand(2, 1, 11, 11) < 0.3) & ~torch.eye(11).bool()
    mask = torch.zeros(2, 1, 11, 11).masked_fill(hidden, -math.inf) if masked else "causal"
    results = []
    for rows in (100, 4):
        monkeypatch.setattr(layers, "ROWS", rows)
        y = layers.attend(q, k, v, mask)
        assert ("strips" in y.grad_fn.name()) == (rows == 4)
        results.append((y, *torch.autograd.grad((y * torch.arange(8)).sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_block_keeps_little_for_its_backward_pass(monkeypatch):
    """Residual streams, q, k, v, attention output, gate and up: no norms, no activations, no attention weights."""
    monkeypatch.setattr(layers, "ROWS", 16)
    block, x = fill(layers.Block(CFG)), torch.randn(1, 32, 48, requires_grad=True)
    rope, kept = layers.Rope(8, CFG).table(torch.arange(x.shape[1])), {}
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4, t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = block(x, rope, "causal")
    per_position = sum(size for size, _ in kept.values()) / x.shape[1]
    assert per_position <= 6 * 48 + 2 * CFG.ffn + 2 * CFG.head_dim
    y.sum().backward()
    assert x.grad.abs().min() > 0


def test_what_is_computed_again_is_no_matrix_product(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    block, rope, counts = fill(layers.Block(CFG)), layers.Rope(8, CFG).table(torch.arange(12)), []
    for again in (layers.again, lambda function, *tensors: function(*tensors)):
        monkeypatch.setattr(layers, "again", again)
        with FlopCounterMode(display=False) as counter:
            block(torch.ones(1, 12, 48, requires_grad=True), rope, "causal").sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_attention_is_causal():
    attn, x = fill(layers.Attention(CFG)), torch.randn(1, 7, 48)
    rope = layers.Rope(8, CFG).table(torch.arange(7))
    late = x.clone()
    late[:, 4:] += 1
    before, after = attn(x, rope, "causal"), attn(late, rope, "causal")
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


@torch.no_grad()
def test_cached_chunks_equal_the_whole():
    attn, x = fill(layers.Attention(CFG)), torch.randn(2, 9, 48)
    rope, cache = layers.Rope(8, CFG), layers.KVCache(2, 2, 9, 8)
    cache.k.fill_(math.nan)                                                    # what was not written must not be read
    whole, parts, start = attn(x, rope.table(torch.arange(9)), "causal"), [], 0
    for size in (4, 1, 3, 1):
        mask = layers.causal_mask(start + size, "cpu")[start:]
        parts.append(attn(x[:, start:start + size], rope.table(torch.arange(start, start + size)), mask, cache, start))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_swiglu_is_its_formula_with_and_without_gradients():
    mlp, x = fill(layers.SwiGLU(8, 16)), torch.randn(3, 8)
    want = mlp.w2(F.silu(mlp.w1(x)) * mlp.w3(x))
    torch.testing.assert_close(mlp(x), want)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), want)


@torch.no_grad()
def test_folded_stack_equals_the_transformer():
    stack, x = fill(layers.Transformer(CFG)), torch.randn(3, 6, 48)
    y, rope = x, stack.rope.table(torch.arange(6))
    for block in stack.layers:
        y = block(y, rope, "causal")
    folded = layers.FoldedStack(stack, 6)
    cache = folded.cache(3)
    steps = [folded.step(x[:, t], t, cache) * folded.scale for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), stack.norm(y), rtol=1e-4, atol=1e-4)


def test_packing_returns_every_row_to_its_place():
    chosen = torch.tensor([[True, False, True, True], [False, True, False, False]])
    packing = layers.pack(chosen, torch.tensor([0, 0, 0, 1]), 2)
    x = torch.arange(1.0, 5.0).unsqueeze(1)
    assert packing.flat.tolist() == [0, 2, 3, 5]
    assert packing.spread(x)[..., 0].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert torch.equal(packing.collect(packing.spread(x)), x)


def test_cross_attention_finds_nothing_behind_a_full_mask():
    cross = fill(layers.CrossAttention(8, 8, 8, 2))
    k, v = cross.keys(torch.randn(1, 5, 8))
    q = torch.randn(1, 3, 8)
    nothing = torch.full((1, 2, 3, 5), -math.inf)
    assert torch.equal(cross.look(q, k, v, nothing), torch.zeros(1, 3, 8))
    assert cross.look(q, k, v, torch.zeros(1, 2, 3, 5)).abs().min() > 0


@pytest.mark.parametrize("count, kernel", [(1, 5), (3, 7), (40, 7)])
def test_taps_sum_to_the_convolution(count, kernel):
    """Without gradients the taps are summed one by one; with them the library's convolution is the oracle."""
    torch.manual_seed(0)
    conv = layers.CausalDepthwise(6, kernel)
    torch.nn.init.normal_(conv.bias)
    x, past = torch.randn(2, count, 6), torch.randn(2, kernel - 1, 6)
    for state in (None, past):
        wanted, kept = conv(x, state)
        assert wanted.requires_grad
        with torch.no_grad():
            summed, same = conv(x, state)
        torch.testing.assert_close(summed, wanted.detach())
        assert torch.equal(same, kept) and summed.is_contiguous()
