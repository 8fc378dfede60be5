"""In which order should a model say codec tokens? Four published orders on one backbone geometry and one codec.

    rq        RQ-Transformer (Lee et al. 2022), which is CSM's order: a backbone step per frame, a depth decoder over its codebooks
    delay     MusicGen (Copet et al. 2023): codebook k is said k steps late, all codebooks of a step at once, no depth decoder
    valle     VALL-E (Wang et al. 2023): the first codebook frame by frame, then each other one for all frames at once
    audiolm   AudioLM (Borsos et al. 2023): all semantic tokens, then all coarse acoustic ones, then the fine ones in pieces of 3 s

    python experiments/token_orders.py                                                     # what each costs, with random weights
    python experiments/token_orders.py --train_steps 2000 --data data/synthetic            # the same small budget for each: nats per frame, word error

Every order is a whole model: training loss (an exact negative log-likelihood, so nats per frame compare) and streaming
generation with caches. None has this project's additions: the text comes first in the same stream, as in CSM. benchmark_latency.py
runs this file for its rows.

B utterances, L text tokens, T frames, K codebooks, V codes of a codebook, D width, N positions. Codes are the codec's, 0..V - 1.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import config  # noqa: E402

ORDERS = ("rq", "delay", "valle", "audiolm")


@dataclass
class Settings:
    """One run of this experiment."""
    orders: str = ",".join(ORDERS)    # with commas between
    model_size: str = "nano"          # preset whose backbone, depth decoder and codebooks all orders get
    codec: str = "pretrained/codec"
    data: str = "data/synthetic"      # folder with tokens, for --train_steps
    frames: int = 50                  # length of a measured utterance
    repeats: int = 5                  # measured utterances
    train_steps: int = 0              # 0: random weights, speed alone
    batch: int = 16                   # utterances a step
    lr: float = 1e-3
    train_turns: int = 4000           # utterances to train on, at most
    eval_turns: int = 50              # held-out utterances: nats per frame
    spoken_turns: int = 20            # of them that are spoken and judged
    temperature: float = 0.7
    top_k: int = 50
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        unknown = [o for o in self.orders.split(",") if o not in ORDERS]
        if unknown:
            raise ValueError(f"unknown order {unknown[0]!r}: use --orders with some of {','.join(ORDERS)}")
        for name in ("frames", "repeats", "batch", "eval_turns", "train_turns", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1: change --{name}")
        if min(self.train_steps, self.spoken_turns, self.temperature) < 0:
            raise ValueError("train_steps, spoken_turns and temperature must be at least 0: change --train_steps, --spoken_turns or --temperature")


def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config.add_flags(parser, Settings)
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

from generation import sample  # noqa: E402
from layers import FoldedStack, KVCache, Transformer  # noqa: E402

CHUNK_SECONDS = 3.0      # AudioLM's fine stage takes pieces of this length
COARSE = 3               # AudioLM: a third of the acoustic codebooks is coarse


# ----------------------------------------------------------------------------- what the orders share

@dataclass
class Draw:
    """How tokens are drawn; temperature 0 is greedy."""
    temperature: float = 0.7
    top_k: int = 50
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """(M, V) -> (M,)."""
        return sample(logits, self.temperature, self.top_k, self.generator)


@dataclass
class Going:
    """The streaming state of one Line: keys and values of every layer, and the positions in them."""
    caches: list[KVCache]
    cache: list[tuple[Tensor, Tensor]]      # the same memory as FoldedStack sees it
    position: int = 0


class Line(nn.Module):
    """A causal Llama stack over vectors. `forward` is the whole row at once; `read` and `step` go on from a state, batch 1."""

    def __init__(self, cfg: config.TransformerConfig):
        super().__init__()
        self.stack, self.cfg, self._fast = Transformer(cfg), cfg, None

    def forward(self, x: Tensor, going: Going | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), normed. With an empty state its caches are filled."""
        rope = self.stack.rope.table(torch.arange(x.shape[1], device=x.device))
        for i, block in enumerate(self.stack.layers):
            x = block(x, rope, "causal", going.caches[i] if going else None)
        return self.stack.norm(x)

    def begin(self, positions: int) -> Going:
        """An empty state with room for `positions`."""
        c, p = self.cfg, self.stack.norm.scale
        caches = [KVCache(1, c.kv_heads, positions, c.head_dim, p.device, p.dtype) for _ in range(c.layers)]
        return Going(caches, [(cache.k[0], cache.v[0]) for cache in caches])

    @torch.no_grad()
    def read(self, going: Going, x: Tensor) -> Tensor:
        """The first N vectors of a row (N, D) at once -> the last one's hidden state (1, D)."""
        assert going.position == 0, going.position
        going.position = len(x)
        return self.forward(x[None], going)[:, -1]

    @torch.no_grad()
    def step(self, going: Going, x: Tensor) -> Tensor:
        """The next vector (1, D) -> its hidden state (1, D)."""
        fast = self._folded()
        h = fast.step(x, going.position, going.cache) * fast.scale
        going.position += 1
        return h

    def _folded(self) -> FoldedStack:
        key = tuple((p.data_ptr(), p._version) for p in self.stack.parameters())
        if self._fast is None or self._fast[0] != key:
            self._fast = key, FoldedStack(self.stack, self.cfg.max_positions)
        return self._fast[1]


def nats(h: Tensor, heads: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of h (n, M, D) against targets (n, M) through heads (n, D, V'); -1 is no target."""
    return F.cross_entropy(torch.bmm(h, heads).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def shut(logits: Tensor, end: bool) -> Tensor:
    """Logits (..., V + 1) with the end, their last column, shut out unless `end`."""
    return logits if end else logits[..., :-1]


class Order(nn.Module):
    """One order. Subclasses have `loss`, `generate` and `most_frames`."""

    def __init__(self, cfg: config.ModelConfig):
        super().__init__()
        self.cfg, self.K, self.V, self.D = cfg, cfg.num_codebooks, cfg.audio_vocab - cfg.code_offset, cfg.backbone.width
        self.text = nn.Embedding(cfg.text_vocab, self.D)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal with 1 / sqrt(inputs) for matrices, 0.1 for embeddings, 0.02 for heads (all other parameters of more than one dimension)."""
        kinds = {id(m.weight): 1 / math.sqrt(m.in_features) for m in self.modules() if isinstance(m, nn.Linear)}
        kinds |= {id(m.weight): 0.1 for m in self.modules() if isinstance(m, nn.Embedding)}
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() > 1:
                    p.normal_(0.0, kinds.get(id(p), 0.02), generator=generator)

    def rows(self, *parts: list[Tensor]) -> Tensor:
        """Lists of (n, D) per utterance, one after another -> (B, N, D), zeros behind the end, which causal rows never see."""
        return pad_sequence([torch.cat(row) for row in zip(*parts)], batch_first=True)

    def loss(self, batch: list[tuple[Tensor, Tensor]], generator=None) -> tuple[Tensor, int]:
        """batch: (text ids (L,), codes (K, T)) per utterance -> summed nats of all codes and ends, number of frames."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def most_frames(self, text: int) -> int:
        """Frames that fit behind a text of so many tokens."""
        raise TypeError(f"{type(self).__name__} has no limit")

    def limit(self, ids: Tensor, most: int) -> int:
        """`most`, or less where positions run out. ValueError where nothing fits."""
        room = self.most_frames(len(ids))
        if room < 1:
            raise ValueError(f"a text of {len(ids)} tokens leaves no room for its sound: split it, or raise --backbone.max_positions")
        return min(most, room)

    def generate(self, ids: Tensor, most: int, draw: Draw, least: int = 1) -> Iterator[Tensor]:
        """Codes (K, n) as soon as they are final, n >= 1, `least` to `most` frames in all."""
        raise TypeError(f"{type(self).__name__} cannot generate")


# ----------------------------------------------------------------------------- RQ-Transformer

class RQ(Order):
    """A step of the backbone per frame, the codebooks of the frame one after another by a small depth decoder: CSM without additions."""

    def __init__(self, cfg: config.ModelConfig):
        super().__init__(cfg)
        self.codes = nn.Embedding(self.K * self.V, self.D)
        self.line, self.depth = Line(cfg.backbone), Line(cfg.depth)
        self.projection = nn.Linear(self.D, cfg.depth.width, bias=False)
        self.first = nn.Parameter(torch.empty(1, self.D, self.V + 1))          # with the end
        self.heads = nn.Parameter(torch.empty(self.K - 1, cfg.depth.width, self.V))

    def most_frames(self, text: int) -> int:
        return self.cfg.backbone.max_positions - text

    def _embed(self, codes: Tensor) -> Tensor:
        """codes (K, T) -> (K, T, D)."""
        return self.codes(codes + self.V * torch.arange(self.K, device=codes.device).unsqueeze(1))

    def loss(self, batch, generator=None):
        h = self.line(self.rows([self.text(ids) for ids, _ in batch], [self._embed(c).sum(0) for _, c in batch]))
        before = torch.cat([h[i, len(ids) - 1:len(ids) + c.shape[1]] for i, (ids, c) in enumerate(batch)])     # (sum T + 1, D)
        targets = torch.cat([F.pad(c[0], (0, 1), value=self.V) for _, c in batch])
        total = nats(before[None], self.first, targets[None])
        spoken, codes = before[targets < self.V], torch.cat([c for _, c in batch], 1)                       # (M, D), (K, M)
        x = torch.cat([spoken.unsqueeze(1), self._embed(codes)[:-1].transpose(0, 1)], 1)                       # (M, K, D)
        hidden = self.depth(self.projection(x))[:, 1:].transpose(0, 1)                                         # (K - 1, M, Dd)
        return total + nats(hidden, self.heads, codes[1:]), codes.shape[1]

    @torch.no_grad()
    def generate(self, ids, most, draw, least=1):
        most, going = self.limit(ids, most), self.line.begin(self.cfg.backbone.max_positions)
        h = self.line.read(going, self.text(ids))
        for t in range(most):
            c0 = draw(shut(h @ self.first[0], t >= least))                     # (1,)
            if int(c0) == self.V:
                return
            codes = self._frame(h, c0, draw)
            yield codes
            if t + 1 < most:
                h = self.line.step(going, self._embed(codes).sum(0))

    def _frame(self, h: Tensor, c0: Tensor, draw: Draw) -> Tensor:
        """h (1, D), first codes (1,) -> codes (K, 1)."""
        going, codes = self.depth.begin(self.K), [c0]
        self.depth.step(going, self.projection(h))
        for k in range(1, self.K):
            x = self.depth.step(going, self.projection(self.codes(codes[-1] + self.V * (k - 1))))
            codes.append(draw(x @ self.heads[k - 1]))
        return torch.stack(codes)


# ----------------------------------------------------------------------------- the delay pattern

def delay(codes: Tensor, pad: int) -> Tensor:
    """codes (K, T) -> (K, T + K - 1): row k moved k steps to the right, `pad` where it has nothing. Source: MusicGen, section 2.2."""
    K, T = codes.shape
    out = codes.new_full((K, T + K - 1), pad)
    for k in range(K):
        out[k, k:k + T] = codes[k]
    return out


def undelay(late: Tensor) -> Tensor:
    """The inverse of delay: (K, T + K - 1) -> (K, T)."""
    K, steps = late.shape
    return torch.stack([late[k, k:k + steps - K + 1] for k in range(K)])


class Delay(Order):
    """Codebook k of frame t at step t + k: one step of the backbone says one code of each of K frames."""

    def __init__(self, cfg: config.ModelConfig):
        super().__init__(cfg)
        self.codes = nn.Embedding(self.K * (self.V + 1), self.D)               # with one that says: nothing here
        self.line = Line(cfg.backbone)
        self.heads = nn.Parameter(torch.empty(self.K, self.D, self.V + 1))     # the end belongs to the first codebook

    def most_frames(self, text: int) -> int:
        return self.cfg.backbone.max_positions - text - self.K + 1

    def _embed(self, late: Tensor) -> Tensor:
        """Tokens of n steps (K, n), V for nothing -> (n, D)."""
        return self.codes(late + (self.V + 1) * torch.arange(self.K, device=late.device).unsqueeze(1)).sum(0)

    def loss(self, batch, generator=None):
        late = [delay(c, self.V) for _, c in batch]
        h = self.line(self.rows([self.text(ids) for ids, _ in batch], [self._embed(x) for x in late]))
        hidden, targets = [], []
        for i, ((ids, c), x) in enumerate(zip(batch, late)):
            wanted = torch.where(x == self.V, -1, x)
            wanted[0, c.shape[1]] = self.V                                     # the first codebook ends the utterance; K >= 2, so the step is there
            hidden.append(h[i, len(ids) - 1:len(ids) - 1 + x.shape[1]])
            targets.append(wanted)
        return nats(torch.cat(hidden).expand(self.K, -1, -1), self.heads, torch.cat(targets, 1)), sum(c.shape[1] for _, c in batch)

    @torch.no_grad()
    def generate(self, ids, most, draw, least=1):
        most, going = self.limit(ids, most), self.line.begin(self.cfg.backbone.max_positions)
        h, late, frames = self.line.read(going, self.text(ids)), [], most
        s = 0
        while s < frames + self.K - 1:
            late.append(self._say(h, s, frames, draw, s >= least))
            if late[-1][0] == self.V and s < frames:                           # the end was drawn: what has begun is finished
                frames = s
            if self.K - 1 <= s < frames + self.K - 1:
                yield torch.stack([late[s - self.K + 1 + k][k] for k in range(self.K)]).unsqueeze(1)
            s += 1
            if s < frames + self.K - 1:
                h = self.line.step(going, self._embed(late[-1].unsqueeze(1)))

    def _say(self, h: Tensor, s: int, frames: int, draw: Draw, end: bool) -> Tensor:
        """h (1, D) -> the tokens of step s (K,): V where the codebook has nothing to say there, and for the end."""
        logits = torch.bmm(h.expand(self.K, 1, -1), self.heads)[:, 0]          # (K, V + 1)
        says = torch.full((self.K,), self.V, device=h.device)
        first, last = max(0, s - frames + 1), min(self.K, s + 1)               # the codebooks with 0 <= s - k < frames
        says[first:last] = draw(shut(logits[first:last], False))
        if first == 0 and end:
            says[0] = draw(shut(logits[:1], True))[0]
        return says


# ----------------------------------------------------------------------------- VALL-E

class Valle(Order):
    """The first codebook autoregressively; then codebook k for all frames at once, from text and codebooks 0..k-1, seen from both sides.

    Nothing can be heard before the last codebook: the second model looks at the whole utterance. The other codebooks are taken greedily,
    as in the paper.
    """

    def __init__(self, cfg: config.ModelConfig):
        super().__init__(cfg)
        self.codes = nn.Embedding(self.K * self.V, self.D)
        self.line, self.other = Line(cfg.backbone), Transformer(cfg.backbone)
        self.other_text, self.stage = nn.Embedding(cfg.text_vocab, self.D), nn.Embedding(self.K - 1, self.D)
        self.first = nn.Parameter(torch.empty(1, self.D, self.V + 1))
        self.heads = nn.Parameter(torch.empty(self.K - 1, self.D, self.V))

    def most_frames(self, text: int) -> int:
        return self.cfg.backbone.max_positions - text

    def _embed(self, codes: Tensor, first: int = 0) -> Tensor:
        """codes (n, T) of codebooks first.. -> (n, T, D)."""
        return self.codes(codes + self.V * (first + torch.arange(len(codes), device=codes.device)).unsqueeze(1))

    def _whole(self, x: Tensor, lengths: list[int]) -> Tensor:
        """(B, N, D) of which `lengths` count -> (B, N, D): every position sees all others."""
        there = torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device).unsqueeze(1)
        mask = None if bool(there.all()) else torch.zeros(there.shape, device=x.device).masked_fill_(~there, -math.inf)[:, None, None]
        mask = mask if mask is None else mask.expand(-1, 1, x.shape[1], -1)
        rope = self.other.rope.table(torch.arange(x.shape[1], device=x.device))
        for block in self.other.layers:
            x = block(x, rope, mask)
        return self.other.norm(x)

    def _given(self, ids: Tensor, codes: Tensor, k: int) -> list[Tensor]:
        """What is known when codebook k is said: text (L, D) and the sum of codebooks 0..k-1 (T, D)."""
        stage = self.stage.weight[k - 1]
        return [self.other_text(ids) + stage, self._embed(codes[:k]).sum(0) + stage]

    def loss(self, batch, generator=None):
        """Training takes one codebook of the second model per step, drawn, times their number; evaluation all."""
        h = self.line(self.rows([self.text(ids) for ids, _ in batch], [self._embed(c[:1])[0] for _, c in batch]))
        before = torch.cat([h[i, len(ids) - 1:len(ids) + c.shape[1]] for i, (ids, c) in enumerate(batch)])
        total = nats(before[None], self.first, torch.cat([F.pad(c[0], (0, 1), value=self.V) for _, c in batch])[None])
        stages = [1 + int(torch.randint(self.K - 1, (), generator=generator))] if self.training else range(1, self.K)
        for k in stages:
            lengths = [len(ids) + c.shape[1] for ids, c in batch]
            h = self._whole(pad_sequence([torch.cat(self._given(ids, c, k)) for ids, c in batch], batch_first=True), lengths)
            spoken = torch.cat([h[i, len(ids):n] for i, ((ids, _), n) in enumerate(zip(batch, lengths))])
            total = total + (self.K - 1) / len(stages) * nats(spoken[None], self.heads[k - 1:k], torch.cat([c[k] for _, c in batch])[None])
        return total, sum(c.shape[1] for _, c in batch)

    @torch.no_grad()
    def generate(self, ids, most, draw, least=1):
        most, going, said = self.limit(ids, most), self.line.begin(self.cfg.backbone.max_positions), []
        h = self.line.read(going, self.text(ids))
        while len(said) < most:
            code = draw(shut(h @ self.first[0], len(said) >= least))
            if int(code) == self.V:
                break
            said.append(code)
            if len(said) < most:
                h = self.line.step(going, self._embed(code.unsqueeze(0))[0])
        codes = torch.cat(said)[None]                                          # (1, T)
        for k in range(1, self.K):
            h = self._whole(torch.cat(self._given(ids, codes, k))[None], [len(ids) + len(said)])
            codes = torch.cat([codes, (h[0, len(ids):] @ self.heads[k - 1]).argmax(-1)[None]])
        yield codes


# ----------------------------------------------------------------------------- AudioLM

class Stage(nn.Module):
    """One of AudioLM's three models: what is given, a sign to begin, then `count` codebooks of each frame, one token a position."""

    def __init__(self, cfg: config.TransformerConfig, count: int, size: int, ends: bool):
        super().__init__()
        self.count, self.V, self.ends, self.limit = count, size, ends, cfg.max_positions
        self.codes, self.start = nn.Embedding(count * size, cfg.width), nn.Embedding(1, cfg.width)
        self.line = Line(cfg)
        self.heads = nn.Parameter(torch.empty(count, cfg.width, size + 1 if ends else size))

    def embed(self, codes: Tensor, first: int = 0) -> Tensor:
        """codes (count, T) -> one token after another, frame by frame, (count * T, D)."""
        rows = torch.arange(len(codes), device=codes.device).unsqueeze(1) + first
        return self.codes((codes + self.V * rows).T.flatten())

    def loss(self, given: list[Tensor], codes: list[Tensor]) -> Tensor:
        """given (n, D) and codes (count, T) per utterance -> summed nats."""
        x = [torch.cat([g, self.start.weight, self.embed(c)]) for g, c in zip(given, codes)]
        h = self.line(pad_sequence(x, batch_first=True))
        hidden = [h[i, len(g):len(g) + c.numel()].view(c.shape[1], self.count, -1) for i, (g, c) in enumerate(zip(given, codes))]
        total = nats(torch.cat(hidden).transpose(0, 1), self.heads, torch.cat(codes, 1))
        if not self.ends:
            return total
        last = torch.stack([h[i, len(g) + c.numel()] for i, (g, c) in enumerate(zip(given, codes))])
        return total + nats(last[None], self.heads[:1], torch.full((1, len(given)), self.V, device=last.device))

    def generate(self, given: Tensor, least: int, most: int, draw: Draw) -> Tensor:
        """given (n, D) -> codes (count, T), T from `least` to `most`; a stage without an end says `most`."""
        going, said = self.line.begin(self.limit), []
        h = self.line.read(going, torch.cat([given, self.start.weight]))
        while len(said) < most * self.count:
            k = len(said) % self.count
            logits = h @ self.heads[k]
            code = draw(shut(logits, k == 0 and len(said) >= least * self.count) if self.ends else logits)
            if self.ends and int(code) == self.V:
                break
            said.append(code)
            if len(said) < most * self.count:
                h = self.line.step(going, self.embed(code.view(1, 1), k))
        return torch.cat(said).view(-1, self.count).T


class AudioLM(Order):
    """Semantic tokens from the text, coarse acoustic ones from these, fine ones from the coarse: three models of the same geometry.

    The semantic tokens are those of this project's codec, where the paper has those of a speech encoder.
    """

    def __init__(self, cfg: config.ModelConfig):
        super().__init__(cfg)
        acoustic = self.K - cfg.num_semantic
        if cfg.num_semantic < 1 or acoustic < 2:
            raise ValueError(f"AudioLM needs semantic, coarse and fine codebooks, not {cfg.num_semantic} + {acoustic}: use another --model_size")
        self.semantic, self.coarse = cfg.num_semantic, -(-acoustic // COARSE)
        self.chunk = max(1, int(CHUNK_SECONDS * cfg.frame_rate))
        sizes = (self.semantic, self.coarse, acoustic - self.coarse)
        self.stages = nn.ModuleList(Stage(cfg.backbone, n, self.V, ends=i == 0) for i, n in enumerate(sizes))
        self.given = nn.ModuleList(nn.Embedding(n * self.V, self.D) for n in sizes[:2])

    def most_frames(self, text: int) -> int:
        room = self.cfg.backbone.max_positions - 1
        return min((room - text) // self.semantic, room // (self.semantic + self.coarse))

    def _known(self, stage: int, codes: Tensor) -> Tensor:
        """codes (n, T) -> (n * T, D), as given to stage 2 or 3."""
        return self.given[stage]((codes + self.V * torch.arange(len(codes), device=codes.device).unsqueeze(1)).T.flatten())

    def loss(self, batch, generator=None):
        a, b = self.semantic, self.semantic + self.coarse
        total = self.stages[0].loss([self.text(ids) for ids, _ in batch], [c[:a] for _, c in batch])
        total = total + self.stages[1].loss([self._known(0, c[:a]) for _, c in batch], [c[a:b] for _, c in batch])
        pieces = [piece for _, c in batch for piece in c.split(self.chunk, dim=1)]
        total = total + self.stages[2].loss([self._known(1, p[a:b]) for p in pieces], [p[b:] for p in pieces])
        return total, sum(c.shape[1] for _, c in batch)

    @torch.no_grad()
    def generate(self, ids, most, draw, least=1):
        most = self.limit(ids, most)
        semantic = self.stages[0].generate(self.text(ids), least, most, draw)
        frames = semantic.shape[1]
        coarse = self.stages[1].generate(self._known(0, semantic), frames, frames, draw)
        for s, c in zip(semantic.split(self.chunk, 1), coarse.split(self.chunk, 1)):
            yield torch.cat([s, c, self.stages[2].generate(self._known(1, c), c.shape[1], c.shape[1], draw)])


CLASSES = {"rq": RQ, "delay": Delay, "valle": Valle, "audiolm": AudioLM}


# ----------------------------------------------------------------------------- what a step moves

def moved_bytes(order: Order, frames: int) -> float:
    """Bytes of weights that one utterance reads, per frame: every matrix as often as it is multiplied, embeddings left out."""
    def stack(module: Transformer) -> int:
        return sum(p.nbytes for p in module.layers.parameters())
    K = order.K
    if isinstance(order, RQ):
        return stack(order.line.stack) + order.first.nbytes + K * (stack(order.depth.stack) + order.projection.weight.nbytes) + order.heads.nbytes
    if isinstance(order, Delay):
        return (stack(order.line.stack) + order.heads.nbytes) * (frames + K - 1) / frames
    if isinstance(order, Valle):
        return stack(order.line.stack) + order.first.nbytes + ((K - 1) * stack(order.other) + order.heads.nbytes) / frames
    return sum(s.count * (stack(s.line.stack) + s.heads[0].nbytes) for s in order.stages)


# ----------------------------------------------------------------------------- speaking

def text_ids(text: str, device="cpu") -> Tensor:
    """A text as all orders read it: speaker tag, bytes, end of text."""
    from text_tokenizer import ByteTokenizer
    tokenizer = ByteTokenizer()
    return torch.tensor(tokenizer.speak_prefix(0) + tokenizer.encode(text) + [tokenizer.eot], device=device)


@torch.inference_mode()
def speak(order: Order, codec, text: str, draw: Draw, most: int, least: int = 1) -> dict:
    """One utterance, decoded to sound as its frames become final -> {codes, audio, first_audio_ms, total_ms, cpu_ms, frames}."""
    import numpy as np
    from generation import semantic_count
    start, busy, first, sound, chunks, codes = time.perf_counter(), time.process_time(), None, None, [], []
    semantic = semantic_count(order.cfg, codec)
    for piece in order.generate(text_ids(text, order.text.weight.device), most, draw, least):
        audio, sound = codec.decode_stream(piece.unsqueeze(0), sound, semantic)
        chunks.append(audio.reshape(-1).float().cpu().numpy())
        codes.append(piece)
        first = first or 1000 * (time.perf_counter() - start)
    total, cpu = 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - busy)
    made = torch.cat(codes, 1)
    return {"codes": made, "audio": np.concatenate(chunks), "first_audio_ms": first, "total_ms": total, "cpu_ms": cpu, "frames": made.shape[1]}


def build(name: str, cfg: config.ModelConfig, seed: int = 0, device="cpu") -> Order:
    """One order with random weights, in eval mode."""
    order = CLASSES[name](cfg)
    order.init_weights(torch.Generator().manual_seed(seed))
    return order.eval().to(device)


def order_config(model_size: str, codec) -> config.ModelConfig:
    """The preset without additions, its vocabulary that of the codec."""
    cfg = config.model_preset(model_size, **config.OFF)
    if cfg.num_codebooks > codec.cfg.num_codebooks:
        raise ValueError(f"{model_size} has {cfg.num_codebooks} codebooks, the codec {codec.cfg.num_codebooks}: use another --model_size or --codec")
    cfg.audio_vocab, cfg.num_semantic = codec.cfg.codebook_size + cfg.code_offset, min(cfg.num_semantic, codec.cfg.num_semantic)
    return cfg


# ----------------------------------------------------------------------------- training on the same budget

def utterances(settings: Settings, codec, cfg: config.ModelConfig, split: str, count: int) -> list[tuple[str, Tensor, Tensor]]:
    """Up to `count` turns as (text, ids (L,), codes (K, T)), codebooks chosen as the model of this size reads them."""
    from benchmark_tokens import split_turns
    columns = config.codec_columns(cfg.num_codebooks, cfg.num_semantic, codec.cfg.num_semantic)
    turns = split_turns(settings.data, codec, split, count, settings.seed)
    if not turns:
        raise ValueError(f"the {split} split of {settings.data} has no turn that fits: collect more, or name another folder with --data")
    return [(t.text, text_ids(t.text, settings.device), t.codes.long()[columns].to(settings.device)) for t in turns]


def train(order: Order, examples: list, settings: Settings) -> dict:
    """AdamW with warm-up and half a cosine on settings.train_steps batches, the same for every order; {last_nats_per_frame, seconds}."""
    import runtime
    from tqdm import tqdm
    order.train()
    optimizer = torch.optim.AdamW(order.parameters(), lr=settings.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: runtime.cosine_lr(step, settings.train_steps, settings.train_steps // 10))
    g, start, last = torch.Generator().manual_seed(settings.seed), time.perf_counter(), []
    for _ in tqdm(range(settings.train_steps), desc=f"train {type(order).__name__}", unit="step"):
        batch = [examples[i][1:] for i in torch.randint(len(examples), (settings.batch,), generator=g).tolist()]
        total, frames = order.loss(batch, g)
        optimizer.zero_grad()
        (total / frames).backward()
        torch.nn.utils.clip_grad_norm_(order.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = [*last[-49:], float(total.detach()) / frames]
    order.eval()
    return {"last_nats_per_frame": sum(last) / len(last), "seconds": time.perf_counter() - start}


@torch.no_grad()
def held_out(order: Order, examples: list, batch: int) -> float:
    """Nats per frame over all codebooks and the end, each utterance's frames counted once."""
    totals = [order.loss([e[1:] for e in examples[i:i + batch]]) for i in range(0, len(examples), batch)]
    return float(sum(t for t, _ in totals)) / sum(n for _, n in totals)


def spoken(order: Order, codec, examples: list, settings: Settings) -> dict:
    """Word error of held-out texts, each drawn with its own seed."""
    from measuring import hear, summary
    rows = []
    for number, (text, _, codes) in enumerate(examples):
        draw = Draw(settings.temperature, settings.top_k, torch.Generator(codes.device).manual_seed(settings.seed + number))
        rows.append(hear(speak(order, codec, text, draw, most=3 * codes.shape[1])["audio"], text, mos=False))
    return summary(rows)


# ----------------------------------------------------------------------------- the experiment

TEXT = "The kettle is on, and there is a little cake left for both of us."


def measure(orders: dict[str, Order], codec, settings: Settings) -> dict[str, dict]:
    """First sound, total and milliseconds per frame of utterances of settings.frames, the orders in turns; the first round warms up."""
    from measuring import percentiles
    rows = {name: [] for name in orders}
    for number in range(settings.repeats + 1):
        for name, order in orders.items():
            draw = Draw(settings.temperature, settings.top_k, torch.Generator(settings.device).manual_seed(settings.seed + number))
            made = speak(order, codec, TEXT, draw, settings.frames, least=settings.frames)
            rows[name] += [made] if number else []
    out = {}
    for name, made in rows.items():
        totals = percentiles([m["total_ms"] for m in made])
        out[name] = {"parameters": sum(p.numel() for p in orders[name].parameters()), "frames": made[0]["frames"],
                     "first_audio_ms": percentiles([m["first_audio_ms"] for m in made]), "total_ms": totals, "ms_per_frame": totals["p50"] / settings.frames,
                     "real_time_factor": totals["p50"] / 1000 * codec.cfg.frame_rate / settings.frames,
                     "moved_mb_per_frame": moved_bytes(orders[name], settings.frames) / 1e6}
    return out


def experiment(settings: Settings) -> dict:
    """All orders: trained where that is asked for, then measured."""
    import checkpoint
    import runtime
    device = runtime.pick_device(settings.device)
    codec = checkpoint.load_codec(settings.codec, device=device)
    cfg = order_config(settings.model_size, codec)
    orders = {name: build(name, cfg, settings.seed, device) for name in settings.orders.split(",")}
    learned: dict[str, dict] = {name: {} for name in orders}
    if settings.train_steps:
        examples = utterances(settings, codec, cfg, "train", settings.train_turns)
        kept = utterances(settings, codec, cfg, "test", settings.eval_turns)
        for name, order in orders.items():
            learned[name] = {"training": train(order, examples, settings), "nats_per_frame": held_out(order, kept, settings.batch)}
            if settings.spoken_turns:
                learned[name]["spoken"] = spoken(order, codec, kept[:settings.spoken_turns], settings)
    measured = measure(orders, codec, settings)
    return {"settings": config.to_dict(settings), "weights": "trained here" if settings.train_steps else "random",
            "orders": {name: measured[name] | learned[name] for name in orders}}


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    import runtime

    def run(_) -> int:
        from measuring import rounded, show, table
        settings = config.from_flags(Settings, args)
        runtime.set_seed(settings.seed)
        result = experiment(settings)
        rows = [[name, f"{r['parameters'] / 1e6:.1f}", show(r["first_audio_ms"]["p50"], 0), show(r["first_audio_ms"]["p95"], 0), show(r["ms_per_frame"], 1), show(r["real_time_factor"]),
                 show(r.get("nats_per_frame")), show(r.get("spoken", {}).get("wer"), 2, True)] for name, r in result["orders"].items()]
        print(table(["order", "M parameters", "first sound, ms", "p95", "ms per frame", "real-time factor", "nats per frame", "word error"], rows))
        print(f"\n{settings.frames} frames; weights: {result['weights']}.\n")
        print(json.dumps(rounded(result), ensure_ascii=False))
        return 0
    return runtime.plain_errors(run)(argv)


if __name__ == "__main__":
    raise SystemExit(main())
