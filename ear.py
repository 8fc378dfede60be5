"""The ear: codes of a heard turn to its words, by CTC.

The text head writes one letter after the other and has to find each one's place in the sound by itself, which a small model
learns late or never. Here every frame is spread over `upsample` steps, each of which says one letter or nothing; the order of
the sound is the order of the words. The turn is seen to its end, so a transcript costs one pass over a few hundred steps; a
turn that goes on is simply read again. Source: connectionist temporal classification (Graves et al. 2006), conformer-like
blocks (Gulati et al. 2020) with RoPE and SwiGLU.

B turns, K codebooks, T frames, N = upsample x T steps, W width, A letters and the blank.
"""
from __future__ import annotations

import itertools
import math
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, TransformerConfig
from layers import RMSNorm, Rope, SwiGLU, attend_by_products

BLANK = 0


class EarBlock(nn.Module):
    """x + attention over the whole turn, + depthwise convolution, + SwiGLU; each normed first."""

    def __init__(self, width: int, heads: int, kernel: int):
        super().__init__()
        self.heads = heads
        self.attend_norm, self.conv_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.mlp = SwiGLU(width, 2 * width)

    def forward(self, x: Tensor, there: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, N, W), there (B, N) bool -> (B, N, W); what is not there is neither attended to nor convolved."""
        B, N, W = x.shape
        hidden = torch.where(there, 0.0, -math.inf)[:, None, None]                              # (B, 1, 1, N)
        qkv = self.qkv(self.attend_norm(x)).view(B, N, 3 * self.heads, -1)
        qk = Rope.rotate(qkv[:, :, :2 * self.heads], *rope).transpose(1, 2)                    # (B, 2 H, N, E)
        q, k = qk.chunk(2, 1)
        y = attend_by_products(q, k, qkv[:, :, 2 * self.heads:].transpose(1, 2), hidden)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, W))
        y = self.conv((self.conv_norm(x) * there.unsqueeze(-1)).transpose(1, 2)).transpose(1, 2)
        x = x + F.silu(y)
        return x + self.mlp(self.mlp_norm(x))


class Ear(nn.Module):
    """Codes of whole turns -> letters."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        e = cfg.ear
        self.letters, self.upsample, self.rows = e.letters, e.upsample, cfg.audio_vocab
        self.embedding = nn.Embedding(cfg.num_codebooks * cfg.audio_vocab, e.width)            # row c + V * k, as CSM's own
        self.coarse = nn.ModuleList(EarBlock(e.width, e.heads, e.kernel) for _ in range(e.coarse_layers))
        self.spread = nn.Linear(e.width, e.width * e.upsample)
        self.fine = nn.ModuleList(EarBlock(e.width, e.heads, e.kernel) for _ in range(e.layers))
        self.norm = RMSNorm(e.width)
        self.head = nn.Linear(e.width, 1 + len(e.letters))
        self.rope = Rope(e.width // e.heads, TransformerConfig(1, e.width, e.width, e.heads, e.heads, max_positions=e.max_frames * e.upsample, rope_base=1e4, rope_scale_factor=1.0))

    def embed(self, codes: Tensor, keep: Tensor | None = None) -> Tensor:
        """codes (B, K, T) as the model reads them (offset added) -> (B, T, W); keep (B, K, T) bool: of which codes anything is heard."""
        rows = codes + self.rows * torch.arange(codes.shape[1], device=codes.device).unsqueeze(1)
        each = self.embedding(rows)                                                             # (B, K, T, W)
        return (each if keep is None else each * keep.unsqueeze(-1)).sum(1)

    def forward(self, codes: Tensor, lengths: Tensor, keep: Tensor | None = None) -> Tensor:
        """codes (B, K, T), lengths (B,) frames -> logits (B, N, A). ValueError for a turn beyond max_frames."""
        T = codes.shape[-1]
        if T * self.upsample > self.rope.cfg.max_positions:
            raise ValueError(f"a turn of {T} frames is longer than the ear takes in at once ({self.rope.cfg.max_positions // self.upsample}): cut it, or raise --ear.max_frames and train again")
        there = torch.arange(T, device=codes.device) < lengths.unsqueeze(1)                     # (B, T)
        x = self.embed(codes, keep)
        rope = self.rope.table(torch.arange(T, device=codes.device))
        for block in self.coarse:
            x = block(x, there, rope)
        x = self.spread(x).view(len(x), T * self.upsample, -1)
        there = there.repeat_interleave(self.upsample, 1)
        rope = self.rope.table(torch.arange(T * self.upsample, device=codes.device))
        for block in self.fine:
            x = block(x, there, rope)
        return self.head(self.norm(x))

    def loss(self, codes: Tensor, lengths: Tensor, letters: Tensor, counts: Tensor, keep: Tensor | None = None) -> Tensor:
        """letters (sum of counts,) from 1 on, of all turns one after the other; counts (B,) -> summed CTC loss. A turn that has more letters than steps counts nothing."""
        logits = self(codes, lengths, keep).float().log_softmax(-1).transpose(0, 1)             # (N, B, A)
        return F.ctc_loss(logits, letters, lengths * self.upsample, counts, blank=BLANK, reduction="sum", zero_infinity=True)

    # ---- letters

    def spell(self, text: str) -> list[int]:
        """Text -> numbers of its letters from 1 on, small; what is no letter of the ear's is left out, and no two spaces come together."""
        kept = "".join(c for c in text.lower() if c in self.letters)
        return [1 + self.letters.index(c) for c in " ".join(kept.split())]

    def read(self, best: list[int]) -> str:
        """The most likely letter of every step -> text: repetitions are one letter, blanks none."""
        return "".join(self.letters[c - 1] for c, _ in itertools.groupby(best) if c != BLANK).strip()

    @torch.no_grad()
    def listen(self, codes: Tensor) -> Iterator[Tensor]:
        """codes (K, T) of one turn, as the model reads them -> log-probabilities (N, A) of its parts, each no longer than max_frames; none for nothing."""
        for part in codes.split(self.rope.cfg.max_positions // self.upsample, 1):
            if part.shape[1]:
                yield self(part[None], torch.tensor([part.shape[1]], device=part.device))[0].float().log_softmax(-1)

    def transcribe(self, codes: Tensor) -> str:
        """The likeliest letter of every step; "" for nothing. With what is known of words: word_model.search."""
        return " ".join(filter(None, (self.read(part.argmax(-1).tolist()) for part in self.listen(codes))))
