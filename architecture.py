"""The CSM model: frame embedding, backbone with our additions (additions.py), depth decoder, streaming state, loss.

Knows nothing of files, text or audio: token ids in, logits out. Every state is an argument
(`DecodeState`; None is the offline case of the same code), so sessions cannot mix.

B batch rows, S new positions, N positions so far, K codebooks, V codes per codebook, D width, Dd depth width,
M chosen frames, W cross-attention width, R text runs, L text tokens of a run, T queries of a run.
A prediction at position s concerns position s + 1. With `cross`, `memory` and `text_head` off this is
Sesame's CSM exactly (CSM_SPEC 3.3-3.6) with its parameter names; RoPE is half-split (layers.Rope).
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from additions import (
    Blocks, HearProsody, MemoryWriter, Positions, ReadMemory, ReadText, Runs, Slots, TextReader, plan_blocks, plan_runs, sight_rows, spoken_runs, turn_sums)
from config import ModelConfig
from ear import Ear
from layers import CrossAttention, FoldedStack, KVCache, Packing, Product, RMSNorm, Transformer, in_pieces, pack

LOGITS = 2 ** 24                        # numbers: a loss over more logits than this makes them in pieces

# ----------------------------------------------------------------------------- data


@dataclass
class FrameBatch:
    """Rows of frames (CSM_SPEC 3.3) with what the additions need to know of each position."""
    frames: Tensor                      # (B, S, K + 1) long
    mask: Tensor                        # (B, S, K + 1) bool: columns that count
    turn: Tensor                        # (B, S) long: turn number, rising along a row; -1 = padding
    text_index: Tensor                  # (B, S) long: index inside the turn's run of text; -1 elsewhere
    reading: Tensor                     # (B, S) long: text_index the voice has reached; -1 = unknown
    audio_loss: Tensor | None = None    # (B, S) bool: voice positions whose codes are trained; None: all
    text_loss: Tensor | None = None     # (B, S) bool: text positions that are predicted; None: all but special tokens
    phones: Tensor | None = None        # (B, P) phone ids of the row's spoken texts in order, 0 = padding

    @property
    def B(self) -> int:
        return self.frames.shape[0]

    @property
    def S(self) -> int:
        return self.frames.shape[1]

    def to(self, device) -> "FrameBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return FrameBatch(**{k: v if v is None else v.to(device, non_blocking=True) for k, v in moved.items()})


@dataclass
class Plan:
    """Everything about one call that does not depend on the hidden states."""
    rope: tuple
    mask: Tensor | None                 # (B, 1, S, N) additive
    start: int = 0                      # positions already in the caches
    runs: Runs | None = None
    blocks: Blocks | None = None
    memory: Slots | None = None
    age: Tensor | None = None           # (B, S, M) turns since the slot was written


# ----------------------------------------------------------------------------- streaming state


class DecodeState:
    """All that one conversation (or B of them in lockstep) remembers. Made by CSM.new_state.

    `restart()` empties the window for a re-prefill; memory slots stay, and those of turns that the new
    window does not hold become visible to the model.
    """

    def __init__(self, cfg: ModelConfig, batch: int, limit: int, device, dtype):
        b = cfg.backbone
        self.cfg, self.batch, self.limit, self.device = cfg, batch, limit, device
        self.caches = [KVCache(batch, b.kv_heads, limit, b.head_dim, device, dtype) for _ in range(b.layers)]
        crosses = b.layers // cfg.cross.every if cfg.cross.enabled else 0
        self.heard = [torch.zeros(batch, limit, b.width, device=device, dtype=dtype) for _ in range(crosses)]
        self.slots: Slots | None = None
        self.current = -1                                                      # turn number being gathered
        self.gathered: dict = {}
        self.restart()

    def restart(self) -> None:
        """Forget the positions of the window (caches are reused), keep the memory slots."""
        self.length, self.position, self.first_turn = 0, 0, -1
        self.seen: Positions | None = None
        self.runs: Runs | None = None
        self.padded = False
        self.voiced = 0                                                        # newest positions, all voice of the last turn, that `seen` lacks (frame_step.py)

    def settle(self) -> None:
        """Note down in `seen` the voice positions that were only counted."""
        if not self.voiced:
            return
        count, last = self.voiced, self.seen.turn[:, -1:]
        here = last.new_ones(self.batch, count)
        order = self.seen.order[:, -1:] + torch.arange(1, count + 1, device=last.device)
        self.seen = self.seen.join(Positions(here.bool(), here.bool(), 0 * here, last * here, -here, order))
        self.voiced = 0

    def visible(self) -> Slots | None:
        """Slots of turns before the window's first one, the newest max_slots of them."""
        if self.slots is None:
            return None
        keep = (self.slots.turn < self.first_turn).any(0).nonzero()[:, 0][-self.cfg.memory.max_slots:]
        return self.slots[keep] if len(keep) else None


# ----------------------------------------------------------------------------- plans


def describe(cfg: ModelConfig, batch: FrameBatch, before: Positions | None) -> Positions:
    """What forward must know of the new positions; `before` only shifts their order."""
    valid = batch.turn >= 0
    voice = valid & batch.mask[..., 0]
    order = valid.cumsum(1) - 1
    if before is not None:
        order = order + before.valid.sum(1, keepdim=True)
    return Positions(valid, voice, batch.frames[..., -1] * ~voice, batch.turn, batch.text_index, order.clamp(min=0))


def check_codes(cfg: ModelConfig, codes: Tensor) -> None:
    """codes (..., K) of whole frames. ValueError for another number of codebooks, no integers, or a code out of range."""
    K, V = cfg.num_codebooks, cfg.audio_vocab
    if codes.shape[-1] != K:
        raise ValueError(f"codes of {codes.shape[-1]} codebooks for a model of {K}: change --num_codebooks, or tokenise with the codec of this model")
    if codes.dtype != torch.long:
        raise ValueError(f"codes are {codes.dtype}, not torch.int64: convert them with .long()")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= V):
        raise ValueError(f"codes {int(codes.min())}..{int(codes.max())} are not all in 0..{V - 1}: use the --codec this model was made with, or change --audio_vocab")


@functools.lru_cache(maxsize=16)
def _limits(codebooks: int, audio_vocab: int, text_vocab: int, device) -> Tensor:
    return torch.tensor([audio_vocab] * codebooks + [text_vocab], device=device)


def check_batch(cfg: ModelConfig, batch: FrameBatch, weight: Tensor) -> None:
    """ValueError for what would be read as something else, or fail deep inside: shapes, dtypes, devices, ids out of range."""
    K, frames, mask = cfg.num_codebooks, batch.frames, batch.mask
    if frames.dim() != 3 or frames.shape[-1] != K + 1:
        raise ValueError(f"frames have shape {tuple(frames.shape)}, this model takes (rows, positions, {K} codebooks + 1 text column): "
                         "change --num_codebooks, or tokenise for this model")
    if mask.shape != frames.shape or any(getattr(batch, n).shape != frames.shape[:2] for n in ("turn", "text_index", "reading")):
        raise ValueError(f"frames have shape {tuple(frames.shape)}, but mask {tuple(mask.shape)}, turn {tuple(batch.turn.shape)}, "
                         f"text_index {tuple(batch.text_index.shape)}, reading {tuple(batch.reading.shape)}: they must describe the same positions")
    if frames.dtype != torch.long or mask.dtype != torch.bool:
        raise ValueError(f"frames are {frames.dtype} and mask is {mask.dtype}, not torch.int64 and torch.bool: convert them with .long() and .bool()")
    devices = {t.device for t in (frames, mask, batch.turn, batch.text_index, batch.reading, weight)}
    if len(devices) > 1:
        raise ValueError(f"the batch is on {frames.device} and the model on {weight.device} (seen: {', '.join(sorted(map(str, devices)))}): "
                         "move the batch with .to(device), or change --device")
    limit = _limits(K, cfg.audio_vocab, cfg.text_vocab, frames.device)
    bad = (frames < 0).logical_or_(frames >= limit)
    if bool(bad.any()) and bool((bad := bad & mask).any()):
        row, position, column = bad.nonzero()[0].tolist()
        what, fix = (f"code of codebook {column}", "use the --codec this model was made with, or change --audio_vocab") if column < K else \
                    ("text id", "use the --tokenizer this model was made with, or change --text_vocab")
        raise ValueError(f"{what} is {int(frames[row, position, column])} at row {row}, position {position}, not in 0..{int(limit[column]) - 1}: {fix}")


def check_state(state: "DecodeState", batch: FrameBatch, weight: Tensor) -> None:
    """ValueError where a state does not belong to this batch and these weights."""
    if state.batch != batch.B:
        raise ValueError(f"the state is for {state.batch} conversations, the batch has {batch.B} rows: make it with new_state(batch_size={batch.B})")
    kept = state.caches[0].k
    mixed = kept.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type)
    if mixed or kept.device != weight.device:
        raise ValueError(f"the state is {kept.dtype} on {kept.device}, the model {weight.dtype} on {weight.device}: "
                         "make the state after the model was moved, or change --device or --precision")


def attention_mask(seen: Positions, start: int, wide: Tensor | None, window: int) -> Tensor:
    """Additive (B, 1, S, N): causal; text positions see `window` positions unless `wide` (B, N). No row is empty."""
    order, S = seen.order, seen.order.shape[1] - start
    back = order[:, start:, None] - order[:, None, :]                          # (B, S, N)
    sees = seen.valid[:, None, :] & (back >= 0)
    if wide is not None:
        sees &= wide[:, start:, None] | (back < window)
    sees |= torch.eye(start + S, dtype=torch.bool, device=order.device)[start:]
    return torch.zeros_like(sees, dtype=torch.float32).masked_fill_(~sees, -math.inf).unsqueeze(1)


# ----------------------------------------------------------------------------- depth decoder, folded


class FoldedDepth:
    """The depth decoder's weights as depth_generate wants them (see layers.FoldedStack)."""
    TABLE = 2 ** 25                     # numbers: beyond this the projected embeddings are not kept

    @torch.no_grad()
    def __init__(self, model: "CSM", product=Product):
        cfg = model.cfg
        self.stack = FoldedStack(model.decoder, cfg.num_codebooks, product)
        self.heads = [product((head * self.stack.scale.unsqueeze(1)).t()) for head in model.audio_head]  # K - 1 times (M, Dd) -> (M, V)
        small = cfg.num_codebooks * cfg.audio_vocab * cfg.depth.width <= self.TABLE
        rows = model.audio_embeddings.weight
        self.tables = (model.projection(rows) if small else rows).view(cfg.num_codebooks, cfg.audio_vocab, -1)
        self.projection = None if small else product(model.projection.weight)

    def embed(self, k: int, codes: Tensor) -> Tensor:
        """codes (M,) of codebook k -> (M, Dd)."""
        x = self.tables[k].index_select(0, codes)
        return x if self.projection is None else self.projection(x)


# ----------------------------------------------------------------------------- the model


class CSM(nn.Module):
    """Frames in, hidden states out; heads and losses beside it. See the module docstring."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        D, Dd, K, V = cfg.backbone.width, cfg.depth.width, cfg.num_codebooks, cfg.audio_vocab
        self.text_embeddings = nn.Embedding(cfg.text_vocab, D)
        self.audio_embeddings = nn.Embedding(K * V, D)                         # row c + V * k
        self.backbone = Transformer(cfg.backbone, cfg.dropout)
        self.decoder = Transformer(cfg.depth, cfg.dropout)
        self.projection = nn.Linear(D, Dd, bias=False)
        self.codebook0_head = nn.Linear(D, V, bias=False)
        self.audio_head = nn.Parameter(torch.empty(K - 1, Dd, V))
        self.text_head = nn.Linear(D, cfg.text_vocab, bias=False) if cfg.text_head else None
        c, m = cfg.cross, cfg.memory
        crosses = cfg.backbone.layers // c.every if c.enabled else 0
        self.reader = TextReader(cfg) if c.enabled else None
        self.read_text = nn.ModuleList(ReadText(cfg) for _ in range(crosses))
        self.hear_prosody = nn.ModuleList(HearProsody(cfg) for _ in range(crosses))
        self.advance_head = nn.Linear(D, c.max_advance + 1) if c.enabled else None
        self.memory_writer = MemoryWriter(cfg) if m.enabled else None
        self.read_memory = nn.ModuleList(ReadMemory(cfg) for _ in range(cfg.backbone.layers // m.every if m.enabled else 0))
        self.ear = Ear(cfg).requires_grad_(False) if cfg.ear.enabled else None  # learns by itself: train_ear.py
        self._fast: tuple | None = None
        self.frame_codes = None                                                # instead of depth_generate for one row: depth_graph.py, speculative.py
        self.precision = "fp32"                                                # what products compute in: quantisation.py

    # ---- weights

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, open_gates: bool = False) -> None:
        """Fill every tensor. The additions' gates are shut (identity), for imported CSM weights;
        `open_gates=True` opens them, for training from scratch."""
        done: set[int] = set()

        def normal(p: Tensor, std: float) -> None:
            done.add(id(p))
            p.normal_(0.0, std, generator=generator)

        def constant(p: Tensor, value: float) -> None:
            done.add(id(p))
            p.fill_(value)

        normal(self.text_embeddings.weight, 0.1)
        normal(self.audio_embeddings.weight, 0.1 / math.sqrt(self.cfg.num_codebooks))
        normal(self.audio_head, 0.02)
        heads = [self.codebook0_head, self.text_head, self.advance_head]
        for head in filter(None, heads):
            normal(head.weight, 0.02)
        for stack in (self.backbone, self.decoder):
            shrink = 1 / math.sqrt(2 * len(stack.layers))
            for block in stack.layers:
                normal(block.attn.output_proj.weight, shrink / math.sqrt(stack.cfg.width))
                normal(block.mlp.w2.weight, shrink / math.sqrt(stack.cfg.ffn))
        for module in self.modules():
            if isinstance(module, RMSNorm):
                constant(module.scale, 1.0)
            if isinstance(module, nn.Linear) and id(module.weight) not in done:
                normal(module.weight, 1 / math.sqrt(module.in_features))
            if isinstance(module, (nn.Linear, nn.Conv1d)) and module.bias is not None:
                constant(module.bias, 0.0)
            if isinstance(module, nn.Conv1d):
                normal(module.weight, 1 / math.sqrt(module.kernel_size[0]))
            if isinstance(module, CrossAttention):
                constant(module.gate, float(open_gates))
                normal(module.null, 0.02)
        self._init_additions(normal, constant, done)
        missing = [name for name, p in self.named_parameters() if id(p) not in done]
        assert not missing, f"init_weights forgot {missing}"

    def _init_additions(self, normal, constant, done: set) -> None:
        if self.reader is not None:
            normal(self.reader.embedding.weight, 1.0)
        if self.ear is not None:
            normal(self.ear.embedding.weight, 0.3 / math.sqrt(self.cfg.num_codebooks))
        for read in self.read_text:
            done.add(id(read.bias.weight))
            read.init_bias()
        for hear in self.hear_prosody:
            constant(hear.decay, -1.0)
        for read in self.read_memory:
            normal(read.bank, 0.5)
            done.add(id(read.decay))
            read.init_decay()

    # ---- backbone

    def embed(self, frames: Tensor, mask: Tensor) -> Tensor:
        """frames, mask (B, S, K + 1) -> (B*S, D): sum over the columns that count."""
        K, V = self.cfg.num_codebooks, self.cfg.audio_vocab
        frames, mask = frames.flatten(0, 1), mask.flatten(0, 1)
        x = self.text_embeddings.weight.new_zeros(len(frames), self.cfg.backbone.width)
        text = mask[:, -1].nonzero()[:, 0]
        voice = mask[:, :-1].any(1).nonzero()[:, 0]
        if len(text):
            x = x.index_add(0, text, self.text_embeddings(frames[text, -1]))
        if len(voice):
            codes, weights = frames[voice, :-1], None
            if not mask[voice, :-1].all():                                     # what is masked may hold anything
                weights = mask[voice, :-1].to(x.dtype)
                codes = codes * mask[voice, :-1]
            codes = codes + torch.arange(K, device=frames.device) * V
            x = x.index_add(0, voice, F.embedding_bag(codes, self.audio_embeddings.weight, mode="sum", per_sample_weights=weights))
        return x

    def forward(self, batch: FrameBatch, state: DecodeState | None = None, memory: Slots | None = None) -> Tensor:
        """-> hidden states (B, S, D) after the final norm.

        With `state` the batch holds only the new positions and all caches grow by S. `memory`: slots to read;
        given with a state they replace the state's. Raises ValueError when the window is full and for a batch or
        state that does not fit the model (check_batch, check_state).
        """
        return self._encode(batch, state, memory)[0]

    def _encode(self, batch: FrameBatch, state=None, memory=None) -> tuple[Tensor, Plan]:
        plan = self._plan(batch, state, memory)
        B, S, every, remember = batch.B, batch.S, self.cfg.cross.every, self.cfg.memory.every
        x = self.embed(batch.frames, batch.mask).view(B, S, -1)
        again = self.cfg.recompute and self.training and state is None and torch.is_grad_enabled()
        for i, block in enumerate(self.backbone.layers):
            if again:
                x = checkpoint(block, x, plan.rope, plan.mask, use_reentrant=False)
            else:
                x = block(x, plan.rope, plan.mask, state.caches[i] if state else None, plan.start)
            if self.reader is not None and (i + 1) % every == 0:
                x = self._cross((i + 1) // every - 1, x, plan, state)
            if plan.memory is not None and (i + 1) % remember == 0:
                x = self.read_memory[(i + 1) // remember - 1](x, plan.memory, plan.age)
        h = self.backbone.norm(x)
        if state is not None:
            state.length += S
            if self.memory_writer is not None:
                self._gather(h, batch, state)
        return h, plan

    def _cross(self, layer: int, x: Tensor, plan: Plan, state: DecodeState | None) -> Tensor:
        B, S, D = x.shape
        out = x.reshape(B * S, D)
        if plan.runs is not None:
            out = self.read_text[layer](out, plan.runs, layer)
        if state is None and plan.blocks is None:
            return out.view(B, S, D)
        normed = self.hear_prosody[layer].norm(x)
        heard = normed
        if state is not None:
            state.heard[layer][:, plan.start:plan.start + S] = normed
            heard = state.heard[layer][:, :plan.start + S]
        if plan.blocks is not None:
            out = self.hear_prosody[layer](out, normed.flatten(0, 1), heard, plan.blocks)
        return out.view(B, S, D)

    def _plan(self, batch: FrameBatch, state: DecodeState | None, memory: Slots | None) -> Plan:
        cfg, start = self.cfg, state.length if state else 0
        check_batch(cfg, batch, self.text_embeddings.weight)
        if state is not None:
            state.settle()
            check_state(state, batch, self.text_embeddings.weight)
        limit = state.limit if state else cfg.backbone.max_positions
        if start + batch.S > limit:
            raise ValueError(f"{start + batch.S} positions do not fit into {limit}: raise --backbone.max_positions or lower --memory.window_turns")
        seen = new = describe(cfg, batch, state.seen if state else None)
        if state is not None:
            seen = self._advance(state, batch, new, memory)
            memory = state.visible()
        plan = Plan(self.backbone.rope.table(new.order), None, start)
        if self.memory_writer is not None and memory is not None:
            plan.memory, plan.age = memory, (batch.turn.unsqueeze(-1) - memory.turn.unsqueeze(1)).clamp(min=0)
        plan.mask = self._mask(seen, start, state)
        if self.reader is not None:
            plan.runs = self._runs(seen, new, batch.reading, start, state)
            plan.blocks = plan_blocks(cfg, seen, start)
        return plan

    def _advance(self, state: DecodeState, batch: FrameBatch, new: Positions, memory: Slots | None) -> Positions:
        if memory is not None:
            state.slots = memory
        if state.first_turn < 0 and new.valid.any():
            state.first_turn = int(batch.turn[new.valid].min())
        if state.seen is not None and bool((state.seen.turn[:, -1] != new.turn[:, 0]).any()):
            state.runs = None                                                  # another turn: another text
        state.seen = new if state.seen is None else state.seen.join(new)
        state.padded |= not bool(new.valid.all())
        return state.seen

    def _mask(self, seen: Positions, start: int, state: DecodeState | None) -> Tensor | None:
        N = seen.valid.shape[1]
        if state is not None and not state.padded and N - start == 1:
            if self.reader is None or N <= self.cfg.cross.text_window or bool(seen.voice[:, -1].all()):
                return None                                                    # one new position that sees everything
        wide = None
        if self.reader is not None:
            wide = seen.voice | spoken_runs(self.cfg, seen)[2]
        return attention_mask(seen, start, wide, self.cfg.cross.text_window)

    def _runs(self, seen: Positions, new: Positions, reading: Tensor, start: int, state: DecodeState | None) -> Runs | None:
        only_voice = state is not None and bool(new.voice.all())
        if not only_voice or state.runs is None:
            runs = plan_runs(self.cfg, seen, reading, start)
            if runs is not None:
                runs.read = self.reader(runs.tokens, runs.filled)
            if state is not None:
                state.runs = runs if self._goes_on(runs, only_voice, state.batch, reading.shape[1]) else None
            if state is not None and state.runs is not None:
                runs.keys = [read.prepare(runs.read) for read in self.read_text]
            return runs
        # the voice goes on over the same text: only the queries and the reading position are new
        B, S = reading.shape
        everyone = torch.arange(B * S, device=reading.device)
        sight = sight_rows(self.cfg, reading, state.runs.filled.shape[1])
        return Runs(Packing(everyone, everyone, (B, S)), state.runs.tokens, state.runs.filled, sight, state.runs.read, state.runs.keys)

    @staticmethod
    def _goes_on(runs: Runs | None, only_voice: bool, batch: int, S: int) -> bool:
        """Whether a voice position that comes next reads the same text: kept then, so that it is not read again."""
        if runs is None or runs.queries.shape[0] != batch:
            return False
        return only_voice or (batch == 1 and int(runs.queries.flat[-1]) == S - 1)

    def compile_blocks(self, **options) -> None:
        """torch.compile every block of both stacks, each one graph. The embedding and the plans stay as they are: they depend on the data."""
        for block in (*self.backbone.layers, *self.decoder.layers):
            block.compile(**({"dynamic": True, "fullgraph": True} | options))

    # ---- heads

    def c0_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V): the first code of the next frame."""
        return self.codebook0_head(h)

    def text_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., text_vocab). Raises ValueError without a text head."""
        if self.text_head is None:
            raise ValueError("this model has no text head: use --responder for replies, or train with text_head")
        return self.text_head(h)

    def advance_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., max_advance + 1): text tokens that the frame at this position consumes."""
        if self.advance_head is None:
            raise ValueError("this model has no reading position: it was built with --cross.enabled false")
        return self.advance_head(h)

    # ---- depth decoder

    def _depth_hidden(self, h: Tensor, codes: Tensor) -> Tensor:
        """h (M, D), codes (M, K) -> (K - 1, M, Dd), normed: output k predicts codebook k + 1."""
        K = self.cfg.num_codebooks
        rows = codes[:, :-1] + torch.arange(K - 1, device=codes.device) * self.cfg.audio_vocab
        x = self.projection(torch.cat([h.unsqueeze(1), self.audio_embeddings(rows).to(h.dtype)], 1))  # (M, K, Dd)
        rope = self.decoder.rope.table(torch.arange(K, device=h.device))
        for block in self.decoder.layers:
            x = block(x, rope, "causal")
        return self.decoder.norm(x[:, 1:].transpose(0, 1))

    def depth_logits(self, h: Tensor, codes: Tensor) -> Tensor:
        """Teacher forced: h (M, D) of the position before the frame, codes (M, K) -> (M, K - 1, V). ValueError: see check_codes."""
        check_codes(self.cfg, codes)
        return torch.bmm(self._depth_hidden(h, codes), self.audio_head).transpose(0, 1)

    @torch.no_grad()
    def depth_generate(self, h: Tensor, c0: Tensor, pick) -> Tensor:
        """h (M, D), c0 (M,), pick(logits (M, V), k) -> (M,) long -> codes (M, K).

        One position at a time from folded weights; `depth_logits` on the codes so far is the slow oracle.
        """
        fast = self._folded()
        cache = fast.stack.cache(len(h))
        fast.stack.step(self.projection(h), 0, cache)
        codes = [c0]
        for k in range(1, self.cfg.num_codebooks):
            x = fast.stack.step(fast.embed(k - 1, codes[-1]), k, cache)
            codes.append(pick(fast.heads[k - 1](x), k))
        return torch.stack(codes, 1)

    def _folded(self) -> "FoldedDepth":
        if self._fast is None or self._fast[0] != self._fold_key():
            self._fast = self._fold_key(), FoldedDepth(self)
        return self._fast[1]

    def _fold_key(self) -> tuple:
        # the version counts in-place changes: an optimiser step or load_state_dict makes the copy stale
        sources = [*self.decoder.parameters(), self.audio_head, *self.projection.parameters(), self.audio_embeddings.weight]
        return tuple((p.data_ptr(), p._version) for p in sources)

    def keep_folded(self, fast: "FoldedDepth") -> None:
        """Let depth_generate use these weights until the model's own change (quantisation.py)."""
        self._fast = self._fold_key(), fast

    # ---- memory

    def remember(self, history: FrameBatch) -> Slots:
        """Encode earlier turns to slots, with gradient: the newest max_slots turns of each row."""
        h = self._encode(history)[0]                                           # not self(): wrappers count forward passes
        valid = history.turn >= 0
        first = torch.where(valid, history.turn, torch.iinfo(torch.long).max).min(1, keepdim=True).values
        M = int(torch.where(valid, history.turn - first, 0).max()) + 1
        turn = first + torch.arange(M, device=h.device)                        # (B, M)
        sums = turn_sums(h, history.turn, history.mask[..., 0], turn)
        semantic, prosodic = self.memory_writer(sums)
        there = (sums["texts"] + sums["voices"])[..., 0] > 0
        return Slots(semantic, prosodic, torch.where(there, turn, -1))[slice(-self.cfg.memory.max_slots, None)]

    def _gather(self, h: Tensor, batch: FrameBatch, state: DecodeState) -> None:
        for turn in batch.turn.unique().tolist():
            if turn < 0:
                continue
            if turn != state.current:
                self.end_turn(state)
                state.current = turn
            sums = turn_sums(h, batch.turn, batch.mask[..., 0], torch.full((batch.B, 1), turn, device=h.device))
            state.gathered = {k: v + state.gathered[k] if state.gathered else v for k, v in sums.items()}

    def end_turn(self, state: DecodeState) -> None:
        """Write one semantic and one prosodic slot from what the state gathered since the turn began.

        A turn that already has slots (it was only prefilled again) is not written twice.
        """
        gathered, turn = state.gathered, state.current
        state.gathered, state.current = {}, -1
        if self.memory_writer is None or not gathered or (state.slots is not None and bool((state.slots.turn == turn).any())):
            return
        semantic, prosodic = self.memory_writer(gathered)
        there = (gathered["texts"] + gathered["voices"])[..., 0] > 0           # (B, 1)
        new = Slots(semantic, prosodic, torch.where(there, turn, -1))
        old = state.slots
        state.slots = new if old is None else Slots(*(torch.cat([getattr(old, f.name), getattr(new, f.name)], 1) for f in fields(Slots)))

    def new_state(self, batch_size: int = 1, max_positions: int | None = None, device=None, dtype=None) -> DecodeState:
        """An empty state for `batch_size` conversations in lockstep (padding where one has nothing to add).

        max_positions: room for less than the model's own window; more than that there never is. ValueError for weights of several kinds.
        """
        weight, longest = self.text_embeddings.weight, self.cfg.backbone.max_positions
        kinds = {(p.dtype, p.device) for p in self.parameters()}
        if len(kinds) > 1:
            raise ValueError(f"the weights are {' and '.join(sorted(f'{d} on {where}' for d, where in kinds))}: "
                             "bring them together with model.to(device, dtype), or change --device or --precision")
        return DecodeState(self.cfg, batch_size, min(max_positions or longest, longest), device or weight.device, dtype or weight.dtype)

    # ---- losses

    def loss(self, batch: FrameBatch, history: FrameBatch | None = None, lexicon: tuple[Tensor, Tensor] | None = None,
             generator: torch.Generator | None = None) -> dict:
        """Unnormalised sums and counts per term, and "metrics" (for logging, also sum and count).

        history: earlier turns, encoded to memory slots. lexicon: (text (M, L) padded with pad_id, phones (M, P)
        padded with 0) for the letters-to-phones term. generator: picks the frames of the depth decoder.
        """
        slots = self.remember(history) if history is not None and self.memory_writer is not None else None
        reading = self._noisy_reading(batch.reading, generator)
        h, plan = self._encode(replace(batch, reading=reading, frames=self._noisy_frames(batch, generator)), memory=slots)
        h = h.flatten(0, 1)
        valid = batch.turn >= 0
        voice = valid & batch.mask[..., 0]
        out, metrics = {}, {}
        self._audio_loss(h, batch, voice, generator, out, metrics)
        if self.text_head is not None:
            self._text_loss(h, batch, valid & ~voice, out)
        if self.advance_head is not None:
            self._advance_loss(h, batch, reading, voice, out, metrics)
        if self.reader is not None and self.reader.phone_head is not None:
            self._phone_loss(batch, plan.runs, lexicon, h, out)
        return out | {"metrics": metrics}

    @staticmethod
    def _before(batch: FrameBatch, target: Tensor) -> tuple[Tensor, Tensor]:
        """target (B, S) bool -> flat indices of the positions before the targets, and of the targets; same turn only."""
        after = target.clone()
        after[:, 0] = False
        after[:, 1:] &= batch.turn[:, 1:] == batch.turn[:, :-1]
        at = after.flatten().nonzero()[:, 0]
        return at - 1, at

    def _audio_loss(self, h, batch, voice, generator, out, metrics) -> None:
        K = self.cfg.num_codebooks
        source, target = self._before(batch, voice if batch.audio_loss is None else voice & batch.audio_loss)
        codes = batch.frames.flatten(0, 1)[target, :K]                         # (n, K)
        n, h = len(source), h.index_select(0, source)
        loss, hits = self._cross_entropy(self.c0_logits, self.cfg.audio_vocab, h, codes[:, 0])
        out["c0"], metrics["c0_accuracy"] = (loss, n), (hits, n)
        if n == 0:                                                             # a batch without a voice trains the rest
            unheard = self._depth_hidden(h.new_zeros(1, h.shape[1]), codes.new_zeros(1, K))      # ranks that share weights do the same in the same order
            out["depth"] = loss + 0 * unheard.sum(), 0
            return
        m = max(1, int(n * self.cfg.depth_fraction))
        pick = torch.randperm(n, generator=generator, device=generator.device if generator else None)[:m].to(h.device, non_blocking=True)
        codes = codes[pick]
        hidden = self._depth_hidden(h.index_select(0, pick), codes).transpose(0, 1)             # (m, K - 1, Dd)
        each, = in_pieces(self._depth_losses, max(1, LOGITS // ((K - 1) * self.cfg.audio_vocab)), hidden, codes)
        weights = torch.tensor(self.cfg.depth_weights, dtype=each.dtype).to(each.device, non_blocking=True)
        out["depth"] = (each * weights).sum(), m * (K - 1)
        for k, value in enumerate(each.detach(), start=1):
            metrics[f"depth_{k}"] = value, m

    def _depth_losses(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor]:
        """hidden (m, K - 1, Dd), codes (m, K) -> summed loss of each codebook (K - 1,)."""
        logits = torch.bmm(hidden.transpose(0, 1), self.audio_head)            # (K - 1, m, V)
        return (F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].T.flatten(), reduction="none").view(logits.shape[:2]).sum(1),)

    @staticmethod
    def _cross_entropy(head, classes: int, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """h (n, D), target (n,) -> summed loss over head(h) (n, classes), number of hits."""
        def piece(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(h)
            return F.cross_entropy(logits, target, reduction="sum"), (logits.detach().argmax(-1) == target).sum()
        return in_pieces(piece, max(1, LOGITS // classes), h, target)

    def _text_loss(self, h, batch, text, out) -> None:
        token = batch.frames[..., -1]
        plain = (token < self.cfg.pad_id) | (token == self.cfg.eot_id)
        source, target = self._before(batch, text & (plain if batch.text_loss is None else batch.text_loss))
        out["text"] = self._cross_entropy(self.text_logits, self.cfg.text_vocab, h.index_select(0, source), token.flatten()[target])[0], len(source)

    def _noisy_reading(self, reading: Tensor, generator) -> Tensor:
        """reading (B, S) with some known positions 1 or 2 off while training, as they may be in generation."""
        if not self.training or not self.cfg.cross.enabled or self.cfg.cross.reading_noise <= 0:
            return reading
        device = generator.device if generator else None
        off = torch.randint(1, 3, reading.shape, generator=generator, device=device) * (2 * torch.randint(0, 2, reading.shape, generator=generator, device=device) - 1)
        hit = torch.rand(reading.shape, generator=generator, device=device) < self.cfg.cross.reading_noise
        off = (off * hit).to(reading.device, non_blocking=True)
        return torch.where(reading >= 0, (reading + off).clamp(min=0), reading)

    def _noisy_frames(self, batch: FrameBatch, generator) -> Tensor:
        """The input frames with a share of the voice's exchanged for other voice frames of the batch; targets stay."""
        if not self.training or self.cfg.code_noise <= 0:
            return batch.frames
        device = generator.device if generator else None
        voice = (batch.mask[..., 0] & batch.frames[..., :-1].any(-1)).flatten().nonzero()[:, 0]
        hit = voice[(torch.rand(len(voice), generator=generator, device=device) < self.cfg.code_noise).to(voice.device, non_blocking=True)]
        frames, other = batch.frames.clone(), torch.randint(max(1, len(voice)), (len(hit),), generator=generator, device=device)
        frames.view(-1, frames.shape[-1])[hit] = frames.flatten(0, 1)[voice[other.to(voice.device, non_blocking=True)]]
        return frames

    def _advance_loss(self, h, batch, given, voice, out, metrics) -> None:
        known = voice & (batch.reading >= 0)
        source, target = self._before(batch, known)
        inside = known.flatten()[source]                                       # the position before must be a frame too
        source, target = source[inside], target[inside]
        wanted = (batch.reading.flatten()[target] - given.flatten()[source]).clamp(0, self.cfg.cross.max_advance)
        logits = self.advance_logits(h.index_select(0, source))
        out["advance"] = F.cross_entropy(logits, wanted, reduction="sum"), len(source)
        metrics["advance_accuracy"] = (logits.detach().argmax(-1) == wanted).sum(), len(source)

    def _phone_loss(self, batch, runs: Runs | None, lexicon, h, out) -> None:
        total, count = h.new_zeros(()), 0
        if batch.phones is not None and runs is not None:
            row = runs.queries.flat.new_zeros(len(runs.filled))
            row[runs.queries.slot // runs.queries.shape[1]] = runs.queries.flat // batch.S
            filled = runs.filled.repeat_interleave(2, 1)                       # (R, 2 L)
            spread = pack(filled, row.repeat_interleave(filled.sum(1)), batch.B)
            logits = spread.spread(self.reader.phone_logits(runs.read).flatten(0, 1)[spread.flat])
            lengths = torch.bincount(row, filled.sum(1).float(), minlength=batch.B).long()
            total, count = self._ctc(logits, lengths, batch.phones)
        if lexicon is not None:
            tokens, phones = lexicon
            filled = tokens != self.cfg.pad_id
            read = self.reader(tokens, filled)
            part, n = self._ctc(self.reader.phone_logits(read), 2 * filled.sum(1), phones)
            total, count = total + part, count + n
        out["phones"] = total, count

    @staticmethod
    def _ctc(logits: Tensor, lengths: Tensor, phones: Tensor) -> tuple[Tensor, int]:
        """logits (R, T, phones), lengths (R,), phones (R, P) padded with 0 -> summed CTC loss, number of phones. A row without phones is one whose phones
        are unknown (people's speech): it has no loss, where CTC itself would ask for silence."""
        there = phones > 0
        loss = F.ctc_loss(logits.float().log_softmax(-1).transpose(0, 1), phones[there], lengths, there.sum(1),
                          blank=0, reduction="none", zero_infinity=True)
        return loss.masked_fill(~there.any(1), 0.0).sum(), int(there.sum())
