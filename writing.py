"""Text written by the model's text head: token by token, or several at once where somebody has a guess at what comes.

    step = TextStep(model, state, number, room)
    for token in write(step, tokenizer, ids, most, temperature, generator, drafts):
        ...

What does not change while one run of text goes on (finished blocks of voice, memory slots, who may see what) is worked out once, so that a
token costs little more than its weights. The keys of what is written stand in buffers of their own: the conversation's state is only read, when
the step is made, and may go on with something else while the text is being written.

A guess is never taken on trust. Every place of the text has its own random numbers, so what is chosen there depends on the text before it alone:
guesses are kept as far as they are what would have been chosen, and the text is the same with any guesses and without.

S new positions, N positions so far, D model width, V text tokens.
"""
from __future__ import annotations

import copy
import math
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from additions import Positions, plan_blocks
from architecture import CSM, DecodeState
from layers import KVCache, Rope, attend, fused_linear

SPEAKABLE = b"abcdefghijklmnopqrstuvwxyz.,?!'- "
MOST = 24                 # tokens looked at in one pass, at most
AGAIN = 5                 # equal letters after which a guess that went wrong is taken up again


# ----------------------------------------------------------------------------- the model's part

class _Newest(KVCache):
    """The newest positions of a cache in buffers of its own, with room for more; positions are counted from their first."""

    def __init__(self, cache: KVCache, first: int, end: int, room: int):
        shape = list(cache.k.shape)
        shape[2] = end - first + room
        self.k, self.v = cache.k.new_empty(shape), cache.k.new_empty(shape)
        self.k[:, :, :end - first] = cache.k[:, :, first:end]
        self.v[:, :, :end - first] = cache.v[:, :, first:end]


class TextStep:
    """One run of text of turn `number` that goes on from `state`, at most `room` tokens long. The state is only read, and at once.

    `length`: tokens taken in; set it back to forget the newest. ValueError for a state with padding or without room.
    """

    @torch.inference_mode()
    def __init__(self, model: CSM, state: DecodeState, number: int, room: int):
        cfg = model.cfg
        state.settle()
        if state.padded or state.batch != 1:
            raise ValueError("text is written after one conversation without padding: give it a state of its own")
        if state.length + room > state.limit:
            raise ValueError(f"{state.length + room} positions do not fit into {state.limit}: raise --backbone.max_positions or lower --memory.window_turns")
        self.model, self.start, self.length = model, state.length, 0
        self.window = cfg.cross.text_window if model.reader is not None else state.limit
        self.first = max(0, state.length + 1 - self.window)
        self.caches = [_Newest(cache, self.first, state.length, room) for cache in state.caches]
        self.voice = self._voice(state, number) if model.reader is not None else None
        self.memory = self._memory(state, number) if model.memory_writer is not None else None

    def _voice(self, state: DecodeState, number: int) -> list | None:
        """k, v and bias (1, H, 1, NB) of the finished blocks of voice, for each cross-attention; None where there are none."""
        if state.seen is None:
            return None
        at = state.seen.order.new_full((1, 1), number)
        here = Positions(at == at, at != at, 0 * at, at, 0 * at, 0 * at)
        blocks = plan_blocks(self.model.cfg, state.seen.join(here), state.length)
        if blocks is None:
            return None
        found, (_, NB, pool) = [], blocks.members.shape
        for hear, heard in zip(self.model.hear_prosody, state.heard):
            pooled = heard[0, blocks.members.flatten()].view(1, NB, pool, -1).mean(2)
            bias = -F.softplus(hear.decay)[:, None, None] * blocks.age.unsqueeze(1)
            k, v = hear.keys(pooled)
            found.append((k, v, bias.masked_fill((blocks.age < 0).unsqueeze(1), -math.inf).to(k.dtype)))
        return found

    def _memory(self, state: DecodeState, number: int) -> list | None:
        after = copy.copy(state)
        after.first_turn = state.first_turn if state.first_turn >= 0 else number
        slots = after.visible()
        if slots is None:
            return None
        age = (number - slots.turn.unsqueeze(1)).clamp(min=0)                        # (1, 1, M)
        return [read.prepare(slots, age) for read in self.model.read_memory]

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> Tensor:
        """The next tokens of the text -> hidden states (S, D)."""
        model, S, at = self.model, len(ids), self.start + self.length
        every, remember = model.cfg.cross.every, model.cfg.memory.every
        x = model.text_embeddings(torch.tensor([ids], device=model.text_embeddings.weight.device))             # (1, S, D)
        rope, mask = model.backbone.rope.table(torch.arange(at, at + S, device=x.device).unsqueeze(0)), self._mask(S, at, x)
        low = max(self.first, at + 1 - self.window) - self.first
        for i, block in enumerate(model.backbone.layers):
            x = x + self._attend(block, x, rope, mask, self.caches[i], at - self.first, low)
            x = x + block.mlp(x, block.mlp_norm)
            if self.voice and (i + 1) % every == 0:
                hear = model.hear_prosody[(i + 1) // every - 1]
                x = self._add(hear, x, hear.norm(x), self.voice[(i + 1) // every - 1])
            if self.memory and (i + 1) % remember == 0:
                read = model.read_memory[(i + 1) // remember - 1]
                x = self._add(read, x, read.norm(x), self.memory[(i + 1) // remember - 1])
        self.length += S
        return model.backbone.norm(x)[0]

    def _mask(self, S: int, at: int, x: Tensor) -> Tensor | None:
        """Additive (1, 1, S, n) over the positions from the first that one of them may see."""
        if S == 1:
            return None
        low = max(self.first, at + 1 - self.window)
        back = torch.arange(at, at + S, device=x.device).unsqueeze(1) - torch.arange(low, at + S, device=x.device)
        return torch.zeros_like(back, dtype=x.dtype).masked_fill((back < 0) | (back >= self.window), -math.inf)[None, None]

    @staticmethod
    def _attend(block, x: Tensor, rope, mask, cache: KVCache, at: int, low: int) -> Tensor:
        attn = block.attn
        turned = attn.heads + attn.kv_heads
        qkv = fused_linear(block.sa_norm(x), attn.q_proj, attn.k_proj, attn.v_proj).view(1, x.shape[1], -1, attn.head_dim)
        qk = Rope.rotate(qkv[:, :, :turned], *rope).transpose(1, 2)
        k, v = cache.append(qk[:, attn.heads:], qkv[:, :, turned:].transpose(1, 2), at)
        return attn.output_proj(attend(qk[:, :attn.heads], k[:, :, low:], v[:, :, low:], mask).transpose(1, 2).reshape(1, x.shape[1], -1))

    @staticmethod
    def _add(cross, x: Tensor, normed: Tensor, keys: tuple) -> Tensor:
        k, v, bias = keys
        return x + (cross.output_proj(cross.look(cross.q_proj(normed), k, v, bias.to(k.dtype))) * cross.gate).to(x.dtype)


# ----------------------------------------------------------------------------- what is chosen

def only_text(logits: Tensor, tokenizer, may_end: bool) -> Tensor:
    """Shut out what no normalised text holds: special tokens, other bytes; the end too unless `may_end`."""
    open_ = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    open_[list(SPEAKABLE) if tokenizer.name == "bytes" else slice(0, tokenizer.pad)] = True
    open_[tokenizer.eot] = may_end
    return logits.masked_fill(~open_, -math.inf)


class Luck:
    """Random numbers of one text: (V,) for every place in it, whatever is asked for first."""

    def __init__(self, size: int, generator: torch.Generator | None, device):
        self.size, self.generator, self.device, self.drawn = size, generator, device, []

    def rows(self, first: int, end: int) -> Tensor:
        while len(self.drawn) < end:
            self.drawn.append(torch.empty(self.size, device=self.device).exponential_(generator=self.generator))
        return torch.stack(self.drawn[first:end])


def choose(logits: Tensor, temperature: float, luck: Luck, first: int) -> list[int]:
    """logits (S, V) at places first.. of a text -> a token of each: drawn, greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    return ((logits.float() / temperature).softmax(-1) / luck.rows(first, first + len(logits))).argmax(-1).tolist()


# ----------------------------------------------------------------------------- writing

def write(step: TextStep, tokenizer, ids: list[int], most: int, temperature: float, generator: torch.Generator | None = None,
          drafts: Callable[[list[int]], list[int]] | None = None, tally=None) -> Iterator[int]:
    """Go on with a run of text that begins with `ids`: up to `most` more tokens as they are known, without the closing EOT.

    drafts: the text so far -> a guess at what follows. generator: of this text alone; how far it is used depends on the guesses.
    tally: its drafted, kept, made and passes are counted up.
    """
    out, reach = [], MOST
    luck = Luck(step.model.cfg.text_vocab, generator, step.caches[0].k.device)
    while len(out) < most:
        guess = drafts(out)[:min(reach, most - len(out) - 1)] if drafts else []
        chosen = _look(step, tokenizer, [*ids, *guess], len(guess), temperature, luck, len(out))
        kept = next((n for n, (a, b) in enumerate(zip(chosen, guess)) if a != b), len(guess))
        step.length -= len(guess) - kept
        reach = min(MOST, 2 * kept + 2)                                        # guess further where it went well
        if tally is not None:
            tally.drafted, tally.kept, tally.passes, tally.made = tally.drafted + len(guess), tally.kept + kept, tally.passes + 1, tally.made + kept + 1
        for token in chosen[:kept + 1]:
            if token == tokenizer.eot:
                return
            out.append(token)
            yield token
        ids = chosen[kept:kept + 1]


@torch.inference_mode()
def _look(step: TextStep, tokenizer, ids: list[int], guessed: int, temperature: float, luck: Luck, place: int) -> list[int]:
    """What is chosen after the last of `ids` that is no guess, and after each guess."""
    logits = only_text(step.model.text_logits(step(ids)[-1 - guessed:]), tokenizer, may_end=True)
    if place == 0:
        logits[0, tokenizer.eot] = -math.inf
    return choose(logits, temperature, luck, place)


class Earlier:
    """Guesses from an earlier version of the same text, taken up again after a difference."""

    def __init__(self, ids: list[int], then: Callable[[list[int]], list[int]] | None = None):
        self.ids, self.then = list(ids), then

    def __call__(self, out: list[int]) -> list[int]:
        n = len(out)
        if self.ids[:n] == out:
            found = self.ids[n:]
        else:
            ends = [e for e in range(AGAIN, len(self.ids) + 1) if n >= AGAIN and self.ids[e - AGAIN:e] == out[-AGAIN:]]
            found = self.ids[min(ends, key=lambda e: abs(e - n)):] if ends else []
        return found or (self.then(out) if self.then else [])
