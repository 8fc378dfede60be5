"""Building blocks: Llama-shaped transformer parts, and causal streaming convolutions for the codec.

Knows nothing of speech, text or files. State is always an argument: `cache=None` is the offline case
of the same code. B batch, S new positions, N cached positions, D width, H heads, E head width.
Parameter names inside a block are those of Sesame's CSM checkpoint (torchtune), see CSM_SPEC 3.7.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import TransformerConfig

ROWS = 128                              # queries that causal attention takes at a time when training on a CPU

# ----------------------------------------------------------------------------- transformer


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; the statistics in float32 whatever the input."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return unit.type_as(x) * self.scale


def rope_frequencies(head_dim: int, cfg: TransformerConfig) -> Tensor:
    """(head_dim / 2,) radians per position, llama3-scaled. Source: CSM_SPEC 3.2.

    In float32 and in this order of operations, as the official code has it: at position 2000 a difference in the
    last bit of a frequency is one of 1e-4 radians.
    """
    freq = 1.0 / cfg.rope_base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if cfg.rope_scale_factor == 1:
        return freq
    turns = cfg.rope_old_context / (2 * math.pi / freq)      # rotations within the old context
    smooth = ((turns - cfg.rope_low_freq) / (cfg.rope_high_freq - cfg.rope_low_freq)).clamp(0, 1)
    return (1 - smooth) * freq / cfg.rope_scale_factor + smooth * freq


class Rope(nn.Module):
    """Rotary positions in the half-split layout: pair i is (x[i], x[i + E/2]), as in Hugging Face exports.

    Sesame's original checkpoint pairs (2i, 2i + 1): its q and k rows are permuted on import.
    The table is made on first use per device, so that a model built on the meta device needs no repair.
    """

    def __init__(self, head_dim: int, cfg: TransformerConfig):
        super().__init__()
        self.head_dim, self.cfg = head_dim, cfg
        self._table = None

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B, S) or (S,) -> cos, signed sin, each (..., S, 1, E) float32; ValueError beyond max_positions."""
        limit = self.cfg.max_positions
        if self._table is None or self._table.device != positions.device:
            angles = torch.outer(torch.arange(limit, dtype=torch.float32), rope_frequencies(self.head_dim, self.cfg))
            cos, sin = angles.cos(), angles.sin()
            table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
            self._table = table.to(positions.device)                           # (2, limit, E)
        cos, sin = self._table[:, positions].unsqueeze(-2)
        return cos, sin

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, S, H, E) turned by the angles of its position, in the dtype of x as Hugging Face does."""
        return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sin.to(x.dtype)


class KVCache:
    """Pre-allocated keys and values (B, H_kv, max, E) of one layer; `append` returns views of the filled part."""

    def __init__(self, batch: int, heads: int, max_positions: int, head_dim: int, device=None, dtype=None):
        self.k = torch.zeros(batch, heads, max_positions, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """k, v (B, H_kv, S, E) at positions start.. -> (B, H_kv, start + S, E) each."""
        end = start + k.shape[2]
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


def fused_linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Outputs of several bias-free Linear layers side by side; one matrix product when training.

    Without gradients the weights are not copied together: for one position the copy costs more than it saves.
    """
    joined = getattr(layers[0], "joined", None)              # quantisation.py keeps them side by side
    if joined is not None:
        return joined(x)
    if torch.is_grad_enabled():
        return F.linear(x, torch.cat([layer.weight for layer in layers]))
    return torch.cat([layer(x) for layer in layers], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """q (B, H, S, E); k, v (B, H_kv, N, E); mask as in Attention.forward -> (B, H, S, E).

    Training on a CPU has its own path: there the backward pass of PyTorch's fused attention is slow with a mask.
    """
    causal = isinstance(mask, str)
    if q.requires_grad and q.device.type == "cpu":
        if mask is not None and q.shape[2] == k.shape[2] >= 2 * ROWS:
            return _attend_in_strips(q, k, v, None if causal else mask)
        return attend_by_products(q, k, v, causal_mask(q.shape[2], q.device) if causal else mask)
    bias = None if causal or mask is None else mask.to(q.dtype)
    if bias is not None and q.device.type == "cuda":
        k, v = _same_heads(q, k, v)                          # the kernel for masks may refuse keys of fewer heads: then all scores would be held
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def causal_mask(size: int, device) -> Tensor:
    return torch.full((size, size), -math.inf, device=device).triu(1)


def _same_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (k, v) if q.shape[1] == k.shape[1] else tuple(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As attend, mask None or additive; nothing is assumed of the future, and all attention weights are held."""
    k, v = _same_heads(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                   # (B, H, S, N)
    if mask is not None:
        scores = scores.add_(mask.to(scores.dtype))
    return scores.softmax(-1).to(v.dtype) @ v


def _attend_in_strips(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = _same_heads(q, k, v)
    return _strips((q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.contiguous(), mask)


def _strip(q: Tensor, k: Tensor, mask: Tensor | None, start: int) -> tuple[Tensor, int]:
    """Attention weights (B, H, R, end) of queries start..end, and end."""
    end = min(start + ROWS, q.shape[2])
    scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)
    if mask is None:
        scores[..., start:] += causal_mask(end - start, q.device).to(scores.dtype)
    else:
        scores += mask[:, :, start:end, :end].to(scores.dtype)
    return scores.softmax(-1).to(q.dtype), end


# operators, so that torch.compile takes them whole instead of unrolling or breaking at them
@torch.library.custom_op("csm::strips", mutates_args=())
def _strips(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention, ROWS queries at a time: keys of the future are not multiplied, attention weights not kept but computed again.

    q (scaled), k, v (B, H, S, E); mask (B, 1, S, S) additive, or None: causal -> (B, H, S, E).
    """
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], ROWS):
        w, end = _strip(q, k, mask, start)
        out[:, :, start:end] = w @ v[:, :, :end]
    return out


@torch.library.custom_op("csm::strips_backward", mutates_args=())
def _strips_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad, dq = grad.contiguous(), torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)    # they are sums over strips
    for start in range(0, q.shape[2], ROWS):
        w, end = _strip(q, k, mask, start)
        g = grad[:, :, start:end]
        dv[:, :, :end] += w.transpose(-1, -2) @ g
        ds = torch.ops.aten._softmax_backward_data(g @ v[:, :, :end].transpose(-1, -2), w, -1, w.dtype)
        dq[:, :, start:end] = ds @ k[:, :, :end]
        dk[:, :, :end] += ds.transpose(-1, -2) @ q[:, :, start:end]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


_strips.register_fake(lambda q, k, v, mask: torch.empty_like(q))
_strips_backward.register_fake(lambda grad, q, k, v, mask: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
_strips.register_autograd(lambda ctx, grad: (*_strips_backward(grad, *ctx.saved_tensors), None),
                          setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def again(function, *tensors: Tensor) -> Tensor:
    """function(*tensors). Training on a CPU keeps the tensors alone and computes what function makes inside once more in the backward pass.

    For what is cheap before a matrix product; the product itself is not done twice (torch.utils.checkpoint stops before it).
    """
    if torch.is_grad_enabled() and tensors[0].device.type == "cpu" and not torch.compiler.is_compiling():
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return function(*tensors)


def in_pieces(function, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Sum of the tensors function(*pieces) over pieces of at most `rows` rows.

    Several pieces are computed one at a time, and again in the backward pass: what function makes inside (logits) is never held for all rows.
    It must draw no random numbers.
    """
    if len(tensors[0]) <= rows:
        return function(*tensors)
    pieces = zip(*(t.split(rows) for t in tensors))
    return tuple(map(sum, zip(*(checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces))))


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE, no biases."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        kv = cfg.kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.width, cfg.width, bias=False)
        self.k_proj = nn.Linear(cfg.width, kv, bias=False)
        self.v_proj = nn.Linear(cfg.width, kv, bias=False)
        self.output_proj = nn.Linear(cfg.width, cfg.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache: KVCache | None = None, start: int = 0, norm: nn.Module | None = None) -> Tensor:
        """x (B, S, D), normed by `norm` first -> (B, S, D).

        mask: None (every key is seen), "causal", or additive (B, 1, S, N), which with N = S shuts out the future too.
        """
        B, S, _ = x.shape
        turned = self.heads + self.kv_heads
        qkv = again(lambda x: fused_linear(norm(x) if norm else x, self.q_proj, self.k_proj, self.v_proj), x).view(B, S, -1, self.head_dim)
        qk = Rope.rotate(qkv[:, :, :turned], *rope).transpose(1, 2)              # (B, H + H_kv, S, E)
        q, k, v = qk[:, :self.heads], qk[:, self.heads:], qkv[:, :, turned:].transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v, start)
        return self.output_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, S, -1))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(..., D), normed by `norm` first -> (..., D)."""
        return again(self._down, again(lambda x: fused_linear(norm(x) if norm else x, self.w1, self.w3), x))

    def _down(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm Llama block: x + attention, then x + feed-forward."""

    def __init__(self, cfg: TransformerConfig, dropout: float = 0.0):
        super().__init__()
        self.attn = Attention(cfg)
        self.mlp = SwiGLU(cfg.width, cfg.ffn)
        self.sa_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.dropout = dropout

    def forward(self, x: Tensor, rope, mask=None, cache: KVCache | None = None, start: int = 0) -> Tensor:
        x = x + F.dropout(self.attn(x, rope, mask, cache, start, self.sa_norm), self.dropout, self.training)
        return x + F.dropout(self.mlp(x, self.mlp_norm), self.dropout, self.training)


class Transformer(nn.Module):
    """A stack of blocks and its final norm; the caller brings embeddings, rope table and mask."""

    def __init__(self, cfg: TransformerConfig, dropout: float = 0.0):
        super().__init__()
        self.cfg = cfg
        self.layers = nn.ModuleList(Block(cfg, dropout) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.rope = Rope(cfg.head_dim, cfg)


@dataclass
class Packing:
    """Queries of uneven groups as one padded rectangle: packed row `flat[i]` of (B*S) goes to `slot[i]` of (R*T)."""
    flat: Tensor                        # (n,) long
    slot: Tensor                        # (n,) long
    shape: tuple[int, int]              # R, T

    def spread(self, x: Tensor) -> Tensor:
        """x (n, C) -> (R, T, C), zeros where there is no query."""
        return x.new_zeros(self.shape[0] * self.shape[1], x.shape[-1]).index_copy(0, self.slot, x).view(*self.shape, -1)

    def collect(self, x: Tensor) -> Tensor:
        """x (R, T, C) -> (n, C)."""
        return x.flatten(0, 1).index_select(0, self.slot)


def pack(chosen: Tensor, row: Tensor, rows: int) -> Packing:
    """chosen (B, S) bool; row (n,) the rectangle's row, rising, of each chosen position in flat order."""
    flat = chosen.flatten().nonzero()[:, 0]                                    # (n,)
    count = torch.bincount(row, minlength=rows)
    longest = int(count.max()) if len(flat) else 0
    rank = torch.arange(len(flat), device=flat.device) - (count.cumsum(0) - count)[row]
    return Packing(flat, row * longest + rank, (rows, longest))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                       # (R, L, W) -> (R, H, L, E)


class CrossAttention(nn.Module):
    """Attention with a learned null key of value zero and a gate; the parts of both directions.

    Keys and values come from width `source`; a query that finds nothing looks at the null key and gets zero.
    """

    def __init__(self, width: int, source: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(source, inner, bias=False)
        self.v_proj = nn.Linear(source, inner, bias=False)
        self.output_proj = nn.Linear(inner, width, bias=False)
        self.null = nn.Parameter(torch.zeros(heads, inner // heads))
        self.gate = nn.Parameter(torch.zeros(1))

    def keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(R, L, W) -> k, v, each (R, H, L, E)."""
        return _heads(self.k_proj(source), self.heads), _heads(self.v_proj(source), self.heads)

    def look(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q (R, T, W); k, v (R, H, L, E); bias (R, H, T, L) additive -> (R, T, W)."""
        q = _heads(q, self.heads) * self.null.shape[-1] ** -0.5                # (R, H, T, E)
        scores = torch.cat([q @ k.transpose(-1, -2) + bias, q @ self.null.unsqueeze(-1).to(q.dtype)], -1)
        weights = scores.softmax(-1, dtype=torch.float32)[..., :-1].to(v.dtype)             # (R, H, T, L): the null key's value is zero
        return (weights @ v).transpose(1, 2).flatten(2)

    def add(self, x: Tensor, flat: Tensor, y: Tensor) -> Tensor:
        """x (n, D) plus the gated projection of y (m, W) at rows `flat`."""
        return x.index_add(0, flat, (self.output_proj(y) * self.gate).to(x.dtype))


class Product:
    """One weight matrix (out, in) kept in whatever form multiplies fastest: x (M, in) -> (M, out).

    `run(x, *tensors)` is the product itself, free of this object, for a compiled graph. quantisation.py has others.
    """

    def __init__(self, weight: Tensor):
        self.tensors = (weight.t().contiguous(),)                              # one row x then reads it in order

    @staticmethod
    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return x @ tensors[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, *self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class FoldedStack:
    """A Transformer's weights rearranged for one position at a time, without gradients.

    q, k, v and w1, w3 stand side by side, the attention scale is folded into q, and sqrt(width) and the norm scales into the
    following matrices. With another `product` (quantisation.py) the norm scales are kept apart, so that a matrix which is
    already rounded by rows stays what it is. A copy: stale once the weights change.
    """

    @torch.no_grad()
    def __init__(self, stack: Transformer, positions: int, product=Product):
        cfg, root = stack.cfg, math.sqrt(stack.cfg.width)
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        self.positions, self.folds, self.product = positions, product is Product, product
        weight = stack.norm.scale
        self.floor = weight.new_tensor(math.sqrt(cfg.norm_eps * cfg.width))
        cos, sin = stack.rope.table(torch.arange(positions, device=weight.device))
        self.turns = [(c, s) for c, s in zip(cos.to(weight.dtype), sin.to(weight.dtype))]  # positions x (1, E)
        self.layers = [self._fold(block, root) for block in stack.layers]
        self.scale = weight * root                                             # of the final norm, for the caller's heads

    def _fold(self, block: Block, root: float) -> tuple:
        attn, mlp = block.attn, block.mlp
        qkv = torch.cat([attn.q_proj.weight * self.head_dim ** -0.5, attn.k_proj.weight, attn.v_proj.weight])
        gate_up = torch.cat([mlp.w1.weight, mlp.w3.weight])
        norms = block.sa_norm.scale * root, block.mlp_norm.scale * root
        if self.folds:
            qkv, gate_up, norms = qkv * norms[0], gate_up * norms[1], (None, None)
        return (*(self.product(w) for w in (qkv, attn.output_proj.weight, gate_up, mlp.w2.weight)), *norms)

    def cache(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Empty keys and values, (rows * H_kv, positions, E), of every layer."""
        like = self.scale
        return [(like.new_empty(rows * self.kv_heads, self.positions, self.head_dim),
                 like.new_empty(rows * self.kv_heads, self.positions, self.head_dim)) for _ in self.layers]

    def unit(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x (M, D) / sqrt(sum of squares + D eps), times `scale` (D,) where it is not folded into what follows."""
        x = x / torch.hypot(torch.linalg.vector_norm(x, dim=1, keepdim=True), self.floor)
        return x if scale is None else x * scale

    def step(self, x: Tensor, position: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x (M, D) at `position`, after positions 0.. of the same rows -> (M, D): normed, the final scale left out."""
        M, turned, n = len(x), self.heads + self.kv_heads, position + 1
        cos, sin = self.turns[position]
        for (qkv_of, out_of, gate_up_of, down_of, before_attn, before_mlp), (keys, values) in zip(self.layers, cache):
            qkv = qkv_of(self.unit(x, before_attn)).view(M, -1, self.head_dim)    # (M, H + 2 H_kv, E)
            qk = qkv[:, :turned]
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
            keys[:, position] = qk[:, self.heads:].reshape(-1, self.head_dim)
            values[:, position] = qkv[:, turned:].reshape(-1, self.head_dim)
            q = qk[:, :self.heads].reshape(M * self.kv_heads, -1, self.head_dim)  # (M H_kv, H / H_kv, E)
            weights = torch.bmm(q, keys[:, :n].transpose(1, 2)).softmax(-1)
            x = x + out_of(torch.bmm(weights, values[:, :n]).view(M, -1))
            gate, up = gate_up_of(self.unit(x, before_mlp)).chunk(2, -1)
            x = x + down_of(F.silu(gate).mul_(up))
        return self.unit(x)


# ----------------------------------------------------------------------------- causal streaming convolutions

class CausalDepthwise(nn.Module):
    """Depthwise convolution over time that sees only the past. Streaming state: the last kernel - 1 inputs."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.past = kernel - 1
        self.weight = nn.Parameter(torch.randn(width, 1, kernel) / kernel ** 0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), state (B, kernel - 1, D) or None -> (B, T, D), state."""
        state = x.new_zeros(x.shape[0], self.past, x.shape[2]) if state is None else state
        x = torch.cat([state, x], 1)
        weight, bias, kept = self.weight.to(x.dtype), self.bias.to(x.dtype), x[:, x.shape[1] - self.past:]
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return self._summed(x, weight[:, 0].T, bias), kept
        return F.conv1d(x.transpose(1, 2), weight, bias, groups=x.shape[2]).transpose(1, 2), kept

    def _summed(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same sum tap by tap: weight (kernel, D). On a CPU two to seven times as fast as the library's convolution, which wants time last."""
        count = x.shape[1] - self.past
        y = torch.addcmul(bias, x[:, :count], weight[0])
        for k in range(1, self.past + 1):
            y.addcmul_(x[:, k:k + count], weight[k])
        return y


class ConvNeXtBlock(nn.Module):
    """x + scale * MLP(norm(depthwise(x))). Source: Liu et al. 2022; Vocos (Siuzdak 2023) for audio."""

    def __init__(self, width: int, kernel: int, expansion: int = 2):
        super().__init__()
        self.mix = CausalDepthwise(width, kernel)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, state = self.mix(x, state)
        return x + self.scale * self.down(F.gelu(self.up(self.norm(y)), approximate="tanh")), state


class ConvStack(nn.Module):
    """A stack of causal ConvNeXt blocks with one streaming state per block. x (B, T, D) -> (B, T, D)."""

    def __init__(self, layers: int, width: int, kernel: int):
        super().__init__()
        self.blocks = nn.ModuleList(ConvNeXtBlock(width, kernel) for _ in range(layers))

    def forward(self, x: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        states = state or [None] * len(self.blocks)
        after = []
        for block, past in zip(self.blocks, states, strict=True):
            x, past = block(x, past)
            after.append(past)
        return x, after
