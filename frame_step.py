"""One voice frame for several conversations at once: each stands at its own position, in its own state, after its own text.

The weights are read once for all rows (at one row a CPU waits for them most of the time); what belongs to one conversation, its keys
and values, is looked at row by row. The result is that of `model(audio_rows(...), state=...)` for each conversation alone:
equal to the bit for one row, within rounding for several (matrix products of other shapes sum in another order).

R rows, H heads, E head width, L text tokens, M memory slots, D model width, K codebooks.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from additions import Slots
from architecture import CSM, DecodeState, FrameBatch
from layers import Rope, attend, fused_linear


@dataclass
class _Texts:
    """The rows' text runs, padded to the longest."""
    keys: list                          # of each cross-attention: k, v (R, H, L, E)
    shut: Tensor | None                 # (R, 1, 1, L) bool: beyond the run's end; None: nowhere


@dataclass
class _Memories:
    """The rows' memory slots, padded to the most."""
    keys: list                          # of each reading layer: k, v (R, H, 2 M, E), bias (R, H, 1, 2 M)


class FrameStep:
    """The step, and what stays the same from frame to frame while the same conversations go on with the same turns."""

    def __init__(self, model: CSM):
        self.model = model
        self._texts: tuple = ((), None)
        self._memories: tuple = ((), None)
        self._offsets: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, states: list[DecodeState], turns: list[int], tokens: Tensor, reading: list[int]) -> Tensor:
        """tokens (R, K) of the newest frames of `turns`, reading (R,) -> hidden states (R, D). Every state grows by one position.

        Each turn's text has been read before. ValueError where a window is full.
        """
        together = [r for r in range(len(states)) if self.ready(states[r], turns[r])]
        if len(together) == len(states):
            return self._step(states, turns, tokens, reading)
        hidden = tokens.new_empty(len(states), self.model.cfg.backbone.width, dtype=states[0].caches[0].k.dtype)
        for r in set(range(len(states))) - set(together):
            hidden[r] = self.model(_row(tokens[r], turns[r], reading[r]), state=states[r])[0, -1]
        if together:
            hidden[together] = self._step(*([values[r] for r in together] for values in (states, turns)), tokens[together], [reading[r] for r in together])
        return hidden

    def ready(self, state: DecodeState, turn: int) -> bool:
        """Whether the state is in the midst of the voice of `turn`, nothing padded, so that its next position need not be planned.

        The first frame of a turn is not: it goes through the model, which leaves the text's keys in the state.
        """
        model = self.model
        begun = state.seen is not None and not state.padded and (model.memory_writer is None or state.current == turn)
        return begun and state.batch == 1 and state.length < state.limit and (model.reader is None or state.runs is not None)

    def _step(self, states: list[DecodeState], turns: list[int], tokens: Tensor, reading: list[int]) -> Tensor:
        model, R = self.model, len(states)
        at = [s.length for s in states]
        rope = model.backbone.rope.table(torch.tensor(at, device=tokens.device).unsqueeze(1))          # (R, 1, 1, E)
        texts = self._of_texts(states) if model.reader is not None else None
        memories = self._of_memories(states, turns) if model.memory_writer is not None else None
        sight = self._sight(texts, reading, tokens.device) if texts else None
        x = self._embed(tokens)
        every, remember = model.cfg.cross.every, model.cfg.memory.every
        for i, block in enumerate(model.backbone.layers):
            x = x + self._attend(block.attn, block.sa_norm, x, rope, [s.caches[i] for s in states], at)
            x = x + block.mlp(x, block.mlp_norm)
            if texts and (i + 1) % every == 0:
                x = self._cross((i + 1) // every - 1, x, texts, sight, states, at)
            if memories and (i + 1) % remember == 0:
                x = self._remember((i + 1) // remember - 1, x, memories)
        h = model.backbone.norm(x)
        for r in range(R):
            self._grow(states[r], h[r])
        return h

    # ---- the layers' parts

    def _embed(self, tokens: Tensor) -> Tensor:
        cfg = self.model.cfg
        if self._offsets is None or self._offsets.device != tokens.device:
            self._offsets = torch.arange(cfg.num_codebooks, device=tokens.device) * cfg.audio_vocab
        return F.embedding_bag(tokens + self._offsets, self.model.audio_embeddings.weight, mode="sum")

    @staticmethod
    def _attend(attn, norm, x: Tensor, rope, caches: list, at: list[int]) -> Tensor:
        """x (R, D), not yet normed -> (R, D)."""
        turned = attn.heads + attn.kv_heads
        qkv = fused_linear(norm(x), attn.q_proj, attn.k_proj, attn.v_proj).view(len(x), 1, -1, attn.head_dim)
        qk = Rope.rotate(qkv[:, :, :turned], *rope).transpose(1, 2)              # (R, H + H_kv, 1, E)
        q, k, v = qk[:, :attn.heads], qk[:, attn.heads:], qkv[:, :, turned:].transpose(1, 2)
        seen = []
        for r, (cache, start) in enumerate(zip(caches, at)):
            row = slice(r, r + 1)
            seen.append(attend(q[row], *cache.append(k[row], v[row], start), None))
        return attn.output_proj(_cat(seen).transpose(1, 2).reshape(len(x), -1))

    def _cross(self, layer: int, x: Tensor, texts: _Texts, sight: Tensor, states: list[DecodeState], at: list[int]) -> Tensor:
        read, hear, (k, v) = self.model.read_text[layer], self.model.hear_prosody[layer], texts.keys[layer]
        normed = hear.norm(x)
        for r, state in enumerate(states):
            state.heard[layer][:, at[r]] = normed[r]
        bias = read.bias.weight[sight].permute(0, 2, 1).unsqueeze(2).to(k.dtype)     # (R, H, 1, L)
        if texts.shut is not None:
            bias = bias.masked_fill(texts.shut, -torch.inf)
        return self._add(read, x, read.look(read.q_proj(read.norm(x)).unsqueeze(1), k, v, bias))

    def _remember(self, layer: int, x: Tensor, memories: _Memories) -> Tensor:
        read, (k, v, bias) = self.model.read_memory[layer], memories.keys[layer]
        return self._add(read, x, read.look(read.q_proj(read.norm(x)).unsqueeze(1), k, v, bias))

    @staticmethod
    def _add(read, x: Tensor, y: Tensor) -> Tensor:
        return x + (read.output_proj(y.squeeze(1)) * read.gate).to(x.dtype)

    def _sight(self, texts: _Texts, reading: list[int], device) -> Tensor:
        """(R, L): rows of ReadText.bias for every text token from where each voice has read to."""
        cross, length = self.model.cfg.cross, texts.keys[0][0].shape[2]
        place = torch.tensor(reading, device=device).unsqueeze(1)
        distance = torch.arange(length, device=device) - place
        row = distance.clamp(-cross.max_distance, cross.max_distance) + cross.max_distance
        return torch.where(place < 0, 2 * cross.max_distance + 1, row) if cross.guided else torch.full_like(row, 2 * cross.max_distance + 1)

    # ---- what a conversation's turn brings along

    def _of_texts(self, states: list[DecodeState]) -> _Texts:
        """Put together anew where a row's text is another one. `runs` is made once per turn, so its identity says which text it is."""
        runs = [s.runs for s in states]
        if len(self._texts[0]) != len(runs) or any(a is not b for a, b in zip(self._texts[0], runs)):
            longest = max(run.filled.shape[1] for run in runs)
            keys = [tuple(_cat([_pad(run.keys[layer][n], 2, longest) for run in runs]) for n in (0, 1)) for layer in range(len(self.model.read_text))]
            filled = _cat([_pad(run.filled, 1, longest) for run in runs])
            self._texts = runs, _Texts(keys, None if bool(filled.all()) else ~filled[:, None, None])
        return self._texts[1]

    def _of_memories(self, states: list[DecodeState], turns: list[int]) -> _Memories | None:
        known = [(s.slots, s.first_turn, turn) for s, turn in zip(states, turns)]
        old = self._memories[0]
        if len(old) != len(known) or any(a[0] is not b[0] or a[1:] != b[1:] for a, b in zip(old, known)):
            slots = [s.visible() for s in states]
            self._memories = known, None if all(s is None for s in slots) else self._remembered(slots, turns)
        return self._memories[1]

    def _remembered(self, slots: list[Slots | None], turns: list[int]) -> _Memories:
        most, keys = max(s.turn.shape[1] for s in slots if s is not None), []
        some = next(s for s in slots if s is not None)
        empty = Slots(torch.zeros_like(some.semantic[:, :0]), torch.zeros_like(some.prosodic[:, :0]), some.turn[:, :0])
        padded = [Slots(_pad(s.semantic, 1, most), _pad(s.prosodic, 1, most), _pad(s.turn, 1, most, -1)) for s in (s or empty for s in slots)]
        together = Slots(_cat([s.semantic for s in padded]), _cat([s.prosodic for s in padded]), _cat([s.turn for s in padded]))
        age = (torch.tensor(turns, device=some.turn.device).view(-1, 1, 1) - together.turn.unsqueeze(1)).clamp(min=0)
        for read in self.model.read_memory:
            k, v, bias = read.prepare(together, age)
            keys.append((k, v, bias.to(k.dtype)))
        return _Memories(keys)

    # ---- growing a state

    @staticmethod
    def _grow(state: DecodeState, h: Tensor) -> None:
        state.length += 1
        state.voiced += 1
        if state.gathered:
            h = h.float().view(1, 1, -1)
            old = state.gathered
            state.gathered = old | {"voice": old["voice"] + h, "square": old["square"] + h.square(), "voices": old["voices"] + 1}


def _row(tokens: Tensor, turn: int, reading: int) -> FrameBatch:
    """tokens (K,) -> a batch of this one voice position."""
    frames = F.pad(tokens, (0, 1)).view(1, 1, -1)
    mask = torch.ones_like(frames, dtype=torch.bool)
    mask[..., -1] = False
    return FrameBatch(frames, mask, *(frames.new_full((1, 1), value) for value in (turn, -1, reading)))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pad(x: Tensor, dim: int, size: int, value: int = 0) -> Tensor:
    missing = size - x.shape[dim]
    if not missing:
        return x
    return torch.cat([x, x.new_full((*x.shape[:dim], missing, *x.shape[dim + 1:]), value)], dim)
