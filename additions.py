"""What this project adds to CSM: voice-text cross-attention and the dual memory.

Each addition enters the backbone through a gate (shut: the model is CSM exactly) and has a switch in the config.
The modules stand first, then the plans: which position may look at what, worked out once per call from ids alone.

B batch rows, S new positions, N positions so far, D width, W cross-attention or memory width, R text runs,
L text tokens of a run, T queries of a run, M slots, NB blocks of voice, Tt text positions.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from layers import CrossAttention, Packing, RMSNorm, SwiGLU, pack

# ----------------------------------------------------------------------------- what is known of a call


@dataclass
class Slots:
    """Dual memory: one semantic and one prosodic slot per finished turn, oldest first."""
    semantic: Tensor                    # (B, M, W): what was said
    prosodic: Tensor                    # (B, M, W): how
    turn: Tensor                        # (B, M) long; -1 = empty

    def __getitem__(self, columns) -> "Slots":
        return Slots(self.semantic[:, columns], self.prosodic[:, columns], self.turn[:, columns])


@dataclass
class Positions:
    """What is known of every position of a row so far."""
    valid: Tensor                       # (B, N) bool
    voice: Tensor                       # (B, N) bool
    token: Tensor                       # (B, N) long: text id, 0 at voice positions
    turn: Tensor                        # (B, N) long
    text_index: Tensor                  # (B, N) long
    order: Tensor                       # (B, N) long: number of valid positions before this one

    def join(self, new: "Positions") -> "Positions":
        return Positions(*(torch.cat([getattr(self, f.name), getattr(new, f.name)], 1) for f in fields(self)))


@dataclass
class Runs:
    """Voice positions and the text runs they speak."""
    queries: Packing
    tokens: Tensor                      # (R, L) long
    filled: Tensor                      # (R, L) bool
    sight: Tensor                       # (R, T) long: row of ReadText.sights that the query looks through
    read: Tensor | None = None          # (R, L, W) the text reader's output
    keys: list | None = None            # per cross-attention: what ReadText.prepare makes


@dataclass
class Blocks:
    """Text positions and the finished blocks of voice in their past."""
    queries: Packing
    members: Tensor                     # (B, NB, pool) long: columns of each block
    age: Tensor                         # (B, Tt, NB) long: turns since the block; -1 = not to be seen


# ----------------------------------------------------------------------------- voice-text cross-attention


class ReaderBlock(nn.Module):
    """ConvNeXt-like residual block over one turn's text: depthwise convolution, norm, SwiGLU."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = RMSNorm(width)
        self.mlp = SwiGLU(width, 2 * width)

    def forward(self, x: Tensor, filled: Tensor) -> Tensor:
        """x (R, L, W), filled (R, L, 1): positions beyond a run's end stay zero, so runs cannot mix."""
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm(y)) * filled


class TextReader(nn.Module):
    """Local bidirectional reader of one run of text. Complete before its audio starts, so causal for the voice."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        c = cfg.cross
        self.embedding = nn.Embedding(cfg.text_vocab, c.width)
        self.layers = nn.ModuleList(ReaderBlock(c.width, c.reader_kernel) for _ in range(c.reader_layers))
        self.norm = RMSNorm(c.width)
        # two phones at most per text token; index 0 (silence) serves as the CTC blank: silence is never a target
        self.phone_head = nn.Linear(c.width, 2 * len(c.phones)) if c.phone_head else None

    def forward(self, tokens: Tensor, filled: Tensor) -> Tensor:
        """tokens (R, L) long, filled (R, L) bool -> (R, L, W)."""
        filled = filled.unsqueeze(-1)
        x = self.embedding(tokens) * filled
        for layer in self.layers:
            x = layer(x, filled)
        return self.norm(x)

    def phone_logits(self, read: Tensor) -> Tensor:
        """(R, L, W) -> (R, 2 L, phones)."""
        R, L, _ = read.shape
        return self.phone_head(read).view(R, 2 * L, -1)


class _Rows(torch.autograd.Function):
    """Rows of a table for every query, -inf beyond a run's end. The gradient is a sum over queries that needs no sorting."""

    @staticmethod
    def forward(ctx, table: Tensor, chosen: Tensor, filled: Tensor) -> Tensor:
        """table (H, n, L), chosen (R, T) long, filled (R, L) bool -> (R, H, T, L)."""
        (H, n, L), (R, T) = table.shape, chosen.shape
        rows = (chosen.unsqueeze(1) + torch.arange(0, H * n, n, device=chosen.device).unsqueeze(1)).flatten()
        ctx.save_for_backward(chosen, rows)
        ctx.size = H, n, table.dtype
        return table.flatten(0, 1).index_select(0, rows).view(R, H, T, L).masked_fill_(~filled[:, None, None, :], -math.inf)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (chosen, rows), (H, n, dtype) = ctx.saved_tensors, ctx.size
        if grad.device.type == "cpu":
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = torch.zeros(H * n, grad.shape[-1], dtype=wide).index_add_(0, rows, grad.flatten(0, 2).to(wide))
        else:
            total = _Rows.by_product(grad, chosen, n)
        return total.view(H, n, -1).to(dtype), None, None

    @staticmethod
    def by_product(grad: Tensor, chosen: Tensor, n: int) -> Tensor:
        """The same sum for a GPU, where atomic sums would queue since thousands of queries share a row."""
        hot = (chosen.flatten() == torch.arange(n, device=chosen.device).unsqueeze(1)).to(grad.dtype)  # (n, R*T)
        return (hot @ grad.transpose(1, 2).flatten(2).flatten(0, 1)).unflatten(1, (grad.shape[1], -1)).transpose(0, 1).contiguous()


class ReadText(CrossAttention):
    """Voice positions look at single text tokens, guided by how far the voice has read."""

    def __init__(self, cfg: ModelConfig):
        c = cfg.cross
        super().__init__(cfg.backbone.width, c.width, c.width, c.heads)
        self.reach = c.max_distance
        self.bias = nn.Embedding(2 * c.max_distance + 2, c.heads)              # last row: reading unknown

    def init_bias(self) -> None:
        """A bump around the reading position: head i looks i-th furthest ahead, 0 to 6 tokens."""
        distance = torch.arange(-self.reach, self.reach + 1, dtype=torch.float32).unsqueeze(1)
        centre = torch.linspace(0, 6, self.heads) if self.heads > 1 else torch.tensor([2.0])
        self.bias.weight.zero_()
        self.bias.weight[:-1] = (-(distance - centre).square() / 8).clamp(min=-6).to(self.bias.weight)

    def sights(self, length: int) -> Tensor:
        """(H, n, L): the reading bias of L text tokens from every place the voice may have reached; rows as in sight_rows."""
        reach = self.reach
        distance = torch.arange(1 - length - reach, length, device=self.bias.weight.device)
        line = self.bias(distance.clamp(-reach, reach) + reach)                # (2 L + reach - 1, H)
        unknown = self.bias.weight[-1].view(-1, 1, 1).expand(-1, 1, length)
        return torch.cat([line.T.unfold(1, length, 1), unknown], 1)

    def prepare(self, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """read (R, L, W) -> k, v, each (R, H, L, E), and the sights: all that depends on the text alone."""
        k, v = self.keys(read)
        return k, v, self.sights(read.shape[1]).to(k.dtype)

    def forward(self, x: Tensor, runs: Runs, layer: int) -> Tensor:
        """x (B*S, D) -> (B*S, D)."""
        pack = runs.queries
        q = pack.spread(self.q_proj(self.norm(x.index_select(0, pack.flat))))  # (R, T, W)
        k, v, sights = runs.keys[layer] if runs.keys else self.prepare(runs.read)
        bias = _Rows.apply(sights, runs.sight, runs.filled)                    # (R, H, T, L)
        return self.add(x, pack.flat, pack.collect(self.look(q, k, v, bias)))


class HearProsody(CrossAttention):
    """Text positions look at means over finished blocks of voice positions in their past."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.backbone.width, cfg.backbone.width, cfg.cross.width, cfg.cross.heads)
        self.decay = nn.Parameter(torch.zeros(cfg.cross.heads))                # per turn of age, through softplus

    def forward(self, x: Tensor, normed: Tensor, heard: Tensor, blocks: Blocks) -> Tensor:
        """x and normed (B*S, D), heard (B, N, D) normed hidden states so far -> (B*S, D)."""
        B, NB, pool = blocks.members.shape
        rows = blocks.members.flatten(1).unsqueeze(-1).expand(-1, -1, heard.shape[-1])
        pooled = heard.gather(1, rows).view(B, NB, pool, -1).mean(2)           # (B, NB, D)
        k, v = self.keys(pooled)
        q = self.q_proj(normed.index_select(0, blocks.queries.flat))
        bias = -F.softplus(self.decay)[:, None, None] * blocks.age.unsqueeze(1)
        bias = bias.masked_fill((blocks.age < 0).unsqueeze(1), -math.inf)      # (B, H, Tt, NB)
        y = self.look(blocks.queries.spread(q), k, v, bias.to(q.dtype))
        return self.add(x, blocks.queries.flat, blocks.queries.collect(y))


# ----------------------------------------------------------------------------- dual memory


class MemoryWriter(nn.Module):
    """Turns a finished turn into a semantic slot (mean over text) and a prosodic slot (level and spread over voice)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.semantic = nn.Linear(cfg.backbone.width, cfg.memory.width)
        self.prosodic = nn.Linear(2 * cfg.backbone.width, cfg.memory.width)

    def forward(self, gathered: dict) -> tuple[Tensor, Tensor]:
        """turn_sums of finished turns -> semantic and prosodic slots, (B, M, W) each."""
        gathered = {k: v.to(self.semantic.weight.dtype) for k, v in gathered.items()}
        voices = gathered["voices"].clamp(min=1)
        level = gathered["voice"] / voices
        spread = (gathered["square"] / voices - level.square()).clamp(min=1e-6).sqrt()
        return self.semantic(gathered["text"] / gathered["texts"].clamp(min=1)), self.prosodic(torch.cat([level, spread], -1))


def turn_sums(h: Tensor, turns: Tensor, voice: Tensor, wanted: Tensor) -> dict:
    """h (B, S, D), turns and voice (B, S), wanted (B, M) turns -> what MemoryWriter needs of each: (B, M, D) or (B, M, 1)."""
    here = wanted.unsqueeze(-1) == turns.unsqueeze(1)                          # (B, M, S)
    voice = voice.unsqueeze(1)
    with torch.autocast(h.device.type, enabled=False):                         # the spread is a difference of sums
        h, text, voice = h.float(), (here & ~voice).float(), (here & voice).float()
        return {"text": text @ h, "voice": voice @ h, "square": voice @ h.square(),
                "texts": text.sum(-1, keepdim=True), "voices": voice.sum(-1, keepdim=True)}


class ReadMemory(CrossAttention):
    """Every position looks at the slots; older slots fade at a learned rate per bank and head."""

    def __init__(self, cfg: ModelConfig):
        m = cfg.memory
        super().__init__(cfg.backbone.width, m.width, m.width, m.heads)
        self.bank = nn.Parameter(torch.zeros(2, m.width))                      # tells semantic from prosodic
        self.decay = nn.Parameter(torch.zeros(2, m.heads))
        self.half_lives = (m.semantic_half_life, m.prosodic_half_life)

    def init_decay(self) -> None:
        rate = torch.tensor([math.log(2) / half for half in self.half_lives])
        self.decay.copy_(rate.expm1().log().unsqueeze(1).expand_as(self.decay))  # softplus(decay) = rate

    def prepare(self, slots: Slots, age: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v (B, H, 2 M, E) and bias (B, H, S, 2 M): all that does not depend on the hidden states."""
        both = torch.cat([slots.semantic + self.bank[0], slots.prosodic + self.bank[1]], 1)  # (B, 2 M, W)
        k, v = self.keys(both)
        fade = -F.softplus(self.decay)[..., None, None] * age[:, None, None]   # (B, 2, H, S, M)
        fade = fade.masked_fill((slots.turn < 0)[:, None, None, None, :], -math.inf)
        return k, v, torch.cat([fade[:, 0], fade[:, 1]], -1)

    def forward(self, x: Tensor, slots: Slots, age: Tensor) -> Tensor:
        """x (B, S, D), age (B, S, M) -> (B, S, D)."""
        k, v, bias = self.prepare(slots, age)
        q = self.q_proj(self.norm(x))
        return x + (self.output_proj(self.look(q, k, v, bias.to(q.dtype))) * self.gate).to(x.dtype)


# ----------------------------------------------------------------------------- who looks at what


def spoken_runs(cfg: ModelConfig, seen: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Per position (B, N): column where its text run begins, whether it belongs to a run that is (to be)
    spoken or heard, whether it is the text position that predicts the first frame of the voice."""
    begins = seen.text_index == 0
    column = torch.arange(begins.shape[1], device=begins.device)
    begin = torch.where(begins, column, 0).cummax(1).values
    inside = seen.valid & (begins.cumsum(1) > 0) & (seen.turn.gather(1, begin) == seen.turn)
    inside &= seen.token.gather(1, begin) != cfg.transcript_id
    opens = inside & ~seen.voice & ((seen.token == cfg.eot_id) | (seen.token == cfg.listen_id))
    return begin, inside, opens


def sight_rows(cfg: ModelConfig, reading: Tensor, length: int) -> Tensor:
    """reading (R, T) -> (R, T) row of ReadText.sights(length): the furthest place first, the last row where reading is unknown."""
    furthest = length - 1 + cfg.cross.max_distance                             # from there on all tokens lie out of reach
    if not cfg.cross.guided:
        return torch.full_like(reading, furthest + 1)
    return torch.where(reading >= 0, (furthest - reading).clamp(min=0), furthest + 1)


def plan_runs(cfg: ModelConfig, seen: Positions, reading: Tensor, start: int) -> Runs | None:
    """The new voice positions, grouped by the text run they speak. None where there are none."""
    begin, inside, opens = spoken_runs(cfg, seen)
    query = (inside & (seen.voice | opens))[:, start:]                         # (B, S)
    if not query.any():
        return None
    N = seen.valid.shape[1]
    row = torch.arange(len(begin), device=begin.device).unsqueeze(1)
    ids, group = torch.unique_consecutive((row * N + begin)[:, start:][query], return_inverse=True)
    queries = pack(query, group, len(ids))
    column = (ids % N).unsqueeze(1) + torch.arange(N, device=ids.device)       # (R, N)
    inner, column, row = column < N, column.clamp(max=N - 1), (ids // N).unsqueeze(1)
    filled = inner & (seen.text_index[row, column] == torch.arange(N, device=ids.device))
    filled = filled[:, :int(filled.sum(1).max())]                              # (R, L)
    tokens = seen.token[row, column][:, :filled.shape[1]] * filled
    read = queries.spread(reading.flatten()[queries.flat].unsqueeze(-1)).squeeze(-1)
    return Runs(queries, tokens, filled, sight_rows(cfg, read, filled.shape[1]))


def plan_blocks(cfg: ModelConfig, seen: Positions, start: int) -> Blocks | None:
    """The new text positions and the finished blocks of voice; None where either is missing."""
    pool, (B, N) = cfg.cross.pool_frames, seen.valid.shape
    column = torch.arange(N, device=seen.valid.device).expand(B, N)
    before = torch.where(seen.voice, -1, column).cummax(1).values              # last column that is not voice
    ends = seen.voice & ((column - before) % pool == 0)
    text = (seen.valid & ~seen.voice)[:, start:]
    most = int(ends.sum(1).max())
    if most == 0 or not text.any():
        return None
    end = torch.where(ends, column, N).sort(1).values[:, :most]                # (B, NB), N = no block
    queries = pack(text, text.nonzero()[:, 0], B)
    place = torch.stack([column[:, start:][text], seen.turn[:, start:][text]], -1)
    place = queries.spread(place)                                              # (B, Tt, 2)
    age = place[..., 1:] - seen.turn.gather(1, end.clamp(max=N - 1)).unsqueeze(1)
    age = torch.where(end.unsqueeze(1) < place[..., :1], age, -1)              # (B, Tt, NB)
    members = end.unsqueeze(-1) - torch.arange(pool - 1, -1, -1, device=end.device)
    return Blocks(queries, members.clamp(0, N - 1), age)
