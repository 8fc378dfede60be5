"""The depth decoder's frame as one compiled graph: K - 1 steps, sampling included, one call. Batch 1, inference only.

On a CPU the steps are a loop inside the graph (torch.while_loop through Inductor's C++), so it compiles in seconds whatever
the number of codebooks; it needs a C++ compiler. On a GPU they are unrolled and captured as a CUDA graph (mode
"reduce-overhead"). Random numbers are drawn outside, in the order in which sampling step by step draws them: the same
seed gives the same codes.

    note = compile_depth(model)             # generation.draw_codes uses it from then on; a line that says what runs
"""
from __future__ import annotations

import math
import types

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import while_loop

from architecture import CSM
from config import SamplingConfig


class DepthGraph:
    """Codes of one frame from one compiled graph. A copy of the weights: stale once they change."""

    def __init__(self, model: CSM):
        cfg, fast = model.cfg, model._folded()
        self.model, self.K, self.offset = model, cfg.num_codebooks, cfg.code_offset
        self.fast, self.stack, device = fast, fast.stack, fast.stack.scale.device
        self.cos, self.sin = (torch.stack([turn[i].flatten() for turn in fast.stack.turns]) for i in (0, 1))   # (K, E)
        self.mask = torch.full((self.K, self.K), -math.inf, device=device).triu(1).to(self.cos.dtype)
        self.tables = fast.tables.reshape(-1, fast.tables.shape[-1])
        kinds = {type(product) for product in fast.heads}
        if any(not isinstance(t, Tensor) for product in fast.heads for t in product.tensors) or len({p.tensors[0].shape for p in fast.heads}) > 1:
            raise ValueError("these weights have no form that a graph can hold: leave out --compile_depth, or use another --precision")
        self.head_run = kinds.pop().run
        self.heads = [torch.stack(each) for each in zip(*(product.tensors for product in fast.heads))]
        self.graphs: dict[tuple, object] = {}
        self.loops = device.type == "cpu"

    def __call__(self, hidden: Tensor, c0: Tensor, codebook_size: int, sampling: SamplingConfig, generator=None) -> Tensor:
        """hidden (1, D), c0 (1,) -> tokens (1, K); sampling as in generation.sample."""
        greedy = sampling.depth_temperature == 0
        top = 1 if greedy else min(sampling.depth_top_k, codebook_size)
        key = codebook_size, top
        if key not in self.graphs:
            self.graphs[key] = self.compiled(codebook_size, top)
        noise = hidden.new_ones(self.K, top)
        if not greedy:
            for row in noise[1:]:                                              # as torch.multinomial draws them, one codebook after another
                row.exponential_(1, generator=generator)
        heat = hidden.new_tensor(1.0 if greedy else sampling.depth_temperature)
        return self.graphs[key](self.model.projection(hidden), c0, noise, heat)

    def compiled(self, codebook_size: int, top: int):
        """A graph that is called with the same shapes and weights ever after, so that nothing need be checked at each call."""
        def run(*inputs):
            return self.frame(*inputs, codebook_size, top)
        # torch keeps compiled code by code object, without those checks any other graph's would be found
        run = types.FunctionType(run.__code__.replace(), run.__globals__, "depth_frame", None, run.__closure__)
        options = {"options": {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}} if self.loops else {"mode": "reduce-overhead"}
        return torch.compile(run, fullgraph=True, dynamic=False, **options)

    def frame(self, x: Tensor, c0: Tensor, noise: Tensor, heat: Tensor, codebook_size: int, top: int) -> Tensor:
        """x (1, Dd) of position 0, c0 (1,), noise (K, top) exponential, heat () -> (1, K). What is compiled."""
        shape = len(self.stack.layers), self.stack.kv_heads, self.K, self.stack.head_dim
        keys, values = x.new_zeros(shape), x.new_zeros(shape)
        place = torch.arange(self.K, device=x.device)
        _, keys, values = self.step(x, place[:1], keys, values, place)
        codes = torch.where(place == 0, c0, 0)

        def goes_on(k, codes, keys, values):
            return k < self.K

        def next_code(k, codes, keys, values):
            before = (k - 1).view(1)
            x = self.embed(codes.index_select(0, before) + before * self.model.cfg.audio_vocab)
            x, keys, values = self.step(x, k.view(1), keys, values, place)
            logits = self.head(x, k)[:, self.offset:self.offset + codebook_size]
            code = self.offset + self.drawn(logits, noise.index_select(0, k.view(1)), heat, top)
            return k + 1, torch.where(place == k, code, codes), keys, values

        state = torch.ones((), dtype=torch.long, device=x.device), codes, keys, values
        if self.loops:
            state = while_loop(goes_on, next_code, state)
        else:
            for k in range(1, self.K):
                state = next_code(place[k], *state[1:])
        return state[1].unsqueeze(0)

    @staticmethod
    def drawn(logits: Tensor, noise: Tensor, heat: Tensor, top: int) -> Tensor:
        if top == 1:
            return logits.argmax(-1)
        best = logits.topk(top, dim=-1)
        pick = ((best.values / heat).softmax(-1) / noise).argmax(-1, keepdim=True)
        return best.indices.gather(-1, pick).squeeze(-1)

    def embed(self, rows: Tensor) -> Tensor:
        x = self.tables.index_select(0, rows)
        return x if self.fast.projection is None else self.fast.projection(x)

    def head(self, x: Tensor, k: Tensor) -> Tensor:
        """x (1, Dd) -> logits (1, V) of codebook k."""
        before = (k - 1).view(1)
        return self.head_run(x, *(each.index_select(0, before)[0] for each in self.heads))

    def step(self, x: Tensor, k: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (1, Dd) at position k (1,) -> normed (1, Dd) and the caches (layers, H_kv, K, E) with it."""
        stack = self.stack
        cos, sin, mask = (t.index_select(0, k) for t in (self.cos, self.sin, self.mask))
        here, turned, half = (place == k).view(1, -1, 1), stack.heads + stack.kv_heads, stack.head_dim // 2
        new_keys, new_values = [], []
        for i, (qkv_of, out_of, gate_up_of, down_of, before_attn, before_mlp) in enumerate(stack.layers):
            qkv = qkv_of(stack.unit(x, before_attn)).view(-1, stack.head_dim)  # (H + 2 H_kv, E)
            qk = qkv[:turned]
            qk = qk * cos + torch.cat([qk[:, half:], qk[:, :half]], -1) * sin
            new_keys.append(torch.where(here, qk[stack.heads:].unsqueeze(1), keys[i]))
            new_values.append(torch.where(here, qkv[turned:].unsqueeze(1), values[i]))
            q = qk[:stack.heads].view(stack.kv_heads, -1, stack.head_dim)
            weights = (torch.bmm(q, new_keys[i].transpose(1, 2)) + mask).softmax(-1)
            x = x + out_of(torch.bmm(weights, new_values[i]).view(1, -1))
            gate, up = gate_up_of(stack.unit(x, before_mlp)).chunk(2, -1)
            x = x + down_of(F.silu(gate) * up)
        return stack.unit(x), torch.stack(new_keys), torch.stack(new_values)


def compile_depth(model: CSM, sampling: SamplingConfig | None = None, codebook_size: int | None = None) -> str:
    """Compile the frame of `model` as it is now (after quantise) and let generation use it; returns a line that says what runs.

    Where it cannot be compiled (no C++ compiler, as a rule) everything stays as it was and the line says why.
    """
    cfg = model.cfg
    try:
        graph, weight = DepthGraph(model), model.text_embeddings.weight
        with torch.inference_mode():                                           # the first call compiles
            graph(weight.new_zeros(1, cfg.backbone.width), torch.full((1,), cfg.code_offset, device=weight.device),
                  codebook_size or cfg.audio_vocab - cfg.code_offset, sampling or SamplingConfig())
    except Exception as error:                                                 # the compiler's own kinds are many
        return f"depth decoder not compiled ({' '.join(str(error).split())[:120]}): step by step instead"
    model.frame_codes = graph
    return "depth decoder compiled: one graph a frame"
