"""Speculative decoding: something cheap drafts, the model checks many drafts in one pass, and what comes out is distributed
exactly as if the model had drawn it alone. Source: Leviathan, Kalman, Matias 2023 (arXiv:2211.17192), algorithm 1.

A draft x from q is kept with probability min(1, p(x) / q(x)), else x is drawn from the rest, max(p - q, 0) normalised;
p is what generation.sample draws from, temperature and top-k included. At temperature 0 that is: kept where it is the best.

Codes of a frame are drafted by the depth decoder itself in int8 (it reads a quarter of the bytes per code, and the check
reads the float32 weights once per frame instead of K - 1 times) or from frames said before. Text is drafted by looking up what followed
the same letters before (prompt lookup) and checked by the backbone: not by that rule, but by drawing what would have been drawn (writing.py).

    note = speculate(model, "auto")                     # frames: generation.draw_codes uses it from then on, where it wins
    session.write = TextLookup(tokenizer, texts)        # text: Session.reply_text uses it

K codebooks, V rows per codebook, D width.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor

from architecture import CSM, DecodeState, FrameBatch
from config import ModelConfig, SamplingConfig
from generation import draw_codes
from quantisation import depth_products
from writing import TextStep, write

DRAFTS = ("int8", "int4-depth", "phrases")
MOST, LEAST = 12, 6           # text: tokens drafted at once at most; equal tokens before a place that make it worth looking at
TRIALS = 8                    # frames that "auto" measures


# ----------------------------------------------------------------------------- the rule

def distribution(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """(M, V) -> the probabilities (M, V) that generation.sample draws from."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    top = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, top.indices, torch.softmax(top.values / temperature, dim=-1))


def accept(p: Tensor, q: Tensor, drafts: Tensor, generator: torch.Generator | None = None) -> tuple[int, Tensor | None]:
    """p (n, V) of the model, q (n, V) that the drafts (n,) were drawn from -> how many are kept, and what replaces the next (None: all are kept)."""
    at = drafts.unsqueeze(1)
    luck = torch.rand(len(drafts), generator=generator, device=p.device)
    kept = luck * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]
    count = int(kept.long().cumprod(0).sum())
    if count == len(drafts):
        return count, None
    rest = (p[count] - q[count]).clamp(min=0)
    return count, draw(rest if bool(rest.any()) else p[count], generator)      # nothing is left only where p and q are equal but for rounding


def of_codes(logits: Tensor, cfg: ModelConfig, codebook_size: int, sampling: SamplingConfig) -> Tensor:
    """(M, V or more) -> probabilities (M, V) of the tokens that are codes of the codec, all others 0."""
    first, last = cfg.code_offset, cfg.code_offset + codebook_size
    p = distribution(logits[:, first:last], sampling.depth_temperature, sampling.depth_top_k)
    return torch.nn.functional.pad(p, (first, cfg.audio_vocab - last))


def draw(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """weights (V,) -> () drawn in their proportion."""
    return torch.multinomial(weights, 1, generator=generator)[0]


@dataclass
class Tally:
    """What was drafted and kept since the beginning."""
    drafted: int = 0
    kept: int = 0
    made: int = 0            # codes or tokens that came out
    passes: int = 0          # checks by the model
    whole: int = 0           # frames whose first draft was kept to its end
    frames: int = 0

    @property
    def acceptance(self) -> float | None:
        return self.kept / self.drafted if self.drafted else None


# ----------------------------------------------------------------------------- who drafts the codes of a frame

class Quick:
    """The depth decoder itself in fewer bits; q is its own distribution."""

    def __init__(self, model: CSM, precision: str = "int8"):
        self.model, self.fast = model, depth_products(model, precision)

    def begin(self, hidden: Tensor, c0: Tensor) -> None:
        self.cache = self.fast.stack.cache(1)
        self.fast.stack.step(self.model.projection(hidden), 0, self.cache)

    def draft(self, codes: Tensor, codebook_size: int, sampling: SamplingConfig, generator) -> tuple[Tensor, Tensor]:
        """codes (n,) so far -> the others (K - n,), and the distributions they were drawn from (K - n, V)."""
        found, chosen, code = [], [], codes[-1:]
        for k in range(len(codes), self.model.cfg.num_codebooks):
            x = self.fast.stack.step(self.fast.embed(k - 1, code), k, self.cache)
            q = of_codes(self.fast.heads[k - 1](x), self.model.cfg, codebook_size, sampling)
            code = q.argmax(-1) if sampling.depth_temperature == 0 else draw(q[0], generator).view(1)
            found.append(q)
            chosen.append(code)
        return torch.cat(chosen), torch.cat(found)

    def learn(self, codes: Tensor) -> None:
        pass


class Phrases:
    """Frames said before: after the same first code, and the same one before it where that was heard too. q is certain."""

    def __init__(self, model: CSM):
        self.V, self.known, self.last = model.cfg.audio_vocab, {}, None

    def begin(self, hidden: Tensor, c0: Tensor) -> None:
        self.frame = self.known.get((self.last, int(c0)), self.known.get(int(c0)))

    def draft(self, codes: Tensor, codebook_size: int, sampling: SamplingConfig, generator) -> tuple[Tensor, Tensor]:
        frame = codes.new_zeros(0) if self.frame is None else self.frame[len(codes):]
        if self.frame is not None and not torch.equal(self.frame[:len(codes)], codes):
            frame = frame[:0]                                                  # the frame has turned out another one
        return frame, torch.nn.functional.one_hot(frame, self.V).float()

    def learn(self, codes: Tensor) -> None:
        first = int(codes[0])
        self.known[self.last, first] = self.known[first] = codes
        self.last = first


# ----------------------------------------------------------------------------- codes of a frame

class SpeculativeDepth:
    """Codes of one frame, drafted and checked; takes the place of CSM.depth_generate in generation.draw_codes."""

    def __init__(self, model: CSM, drafter):
        self.model, self.drafter, self.tally = model, drafter, Tally()

    @torch.no_grad()
    def __call__(self, hidden: Tensor, c0: Tensor, codebook_size: int, sampling: SamplingConfig, generator=None) -> Tensor:
        """hidden (1, D), c0 (1,) -> tokens (1, K)."""
        K, codes, first = self.model.cfg.num_codebooks, c0, True
        self.drafter.begin(hidden, c0)
        while len(codes) < K:
            drafts, q = self.drafter.draft(codes, codebook_size, sampling, generator)
            if not len(drafts):
                codes = self._finish(hidden, codes, codebook_size, sampling, generator)
                break
            p = self._check(hidden, torch.cat([codes, drafts]), len(codes), codebook_size, sampling)
            count, other = accept(p, q, drafts, generator)
            self.tally.drafted, self.tally.kept, self.tally.passes = self.tally.drafted + len(drafts), self.tally.kept + count, self.tally.passes + 1
            self.tally.whole += first and other is None
            codes, first = torch.cat([codes, drafts[:count], *([] if other is None else [other.view(1)])]), False
        self.drafter.learn(codes)
        self.tally.made, self.tally.frames = self.tally.made + K - 1, self.tally.frames + 1
        return codes.unsqueeze(0)

    def _check(self, hidden: Tensor, codes: Tensor, known: int, codebook_size: int, sampling: SamplingConfig) -> Tensor:
        """Distributions (K - known, V) of codes `known`.. given all before them, in one pass of the depth decoder."""
        x = self.model._depth_hidden(hidden, codes.unsqueeze(0))[known - 1:]   # (K - known, 1, Dd)
        return of_codes(torch.bmm(x, self.model.audio_head[known - 1:])[:, 0], self.model.cfg, codebook_size, sampling)

    def _finish(self, hidden: Tensor, codes: Tensor, codebook_size: int, sampling: SamplingConfig, generator) -> Tensor:
        """The codes after `codes` one by one, as without a draft."""
        def pick(logits: Tensor, k: int) -> Tensor:
            p = of_codes(logits, self.model.cfg, codebook_size, sampling)[0]
            return codes[k:k + 1] if k < len(codes) else (p.argmax() if sampling.depth_temperature == 0 else draw(p, generator)).view(1)
        return self.model.depth_generate(hidden, codes[:1], pick)[0]


@torch.inference_mode()
def _race(model: CSM, drafter, sampling: SamplingConfig, frames: int = TRIALS) -> float:
    """Seconds of a plain frame over those of a speculative one, medians of frames made in turns, after random frames."""
    g = torch.Generator().manual_seed(0)
    cfg, device = model.cfg, model.text_embeddings.weight.device
    tokens = torch.randint(cfg.code_offset, cfg.audio_vocab, (1, frames, cfg.num_codebooks), generator=g).to(device)
    ones = torch.ones(1, frames, cfg.num_codebooks + 1, dtype=torch.bool, device=device)
    ones[..., -1] = False
    row = torch.zeros(1, frames, dtype=torch.long, device=device)
    hidden = model(FrameBatch(torch.nn.functional.pad(tokens, (0, 1)), ones, row, row - 1, row - 1))[0]
    spoken, seconds = SpeculativeDepth(model, drafter), ([], [])
    for h in hidden:
        for which, own in enumerate((None, spoken)):
            model.frame_codes, start = own, time.perf_counter()
            draw_codes(model, h[None], cfg.audio_vocab - cfg.code_offset, sampling, None, tokens[:, 0, 0])
            seconds[which].append(time.perf_counter() - start)
    model.frame_codes = None
    plain, fast = (sorted(s)[len(s) // 2] for s in seconds)
    return plain / fast


def speculate(model: CSM, draft: str = "auto", sampling: SamplingConfig | None = None) -> str:
    """Let frames of `model` (float32) be drafted from now on; returns a line that says what runs.

    draft: one of DRAFTS; "auto": int8 where it is measured to be faster here, else nothing. ValueError for a model that is quantised already.
    """
    if draft not in ("auto", *DRAFTS):
        raise ValueError(f"unknown draft {draft!r}: use --speculative auto|off|{'|'.join(DRAFTS)}")
    if getattr(model, "precision", "fp32") != "fp32":
        raise ValueError(f"the model computes in {model.precision}: a draft must be cheaper than the model; use --precision fp32 or --speculative off")
    drafter = Phrases(model) if draft == "phrases" else Quick(model, "int8" if draft == "auto" else draft)
    if draft == "auto":
        gain = _race(model, drafter, sampling or SamplingConfig())
        if gain < 1.05:
            return f"no speculative decoding: it would take {1 / gain:.2f} times as long here"
    model.frame_codes = SpeculativeDepth(model, drafter)
    return f"codes drafted by {'frames said before' if draft == 'phrases' else 'the depth decoder in ' + ('int8' if draft == 'auto' else draft)}"


# ----------------------------------------------------------------------------- text

class Lookup:
    """Where did these tokens stand before, and what came next?"""

    def __init__(self, texts: list[list[int]], least: int = LEAST, most: int = MOST):
        self.least, self.most, self.places, self.stream = least, most, {}, []
        for text in texts:
            self.add(text)

    def add(self, ids: list[int]) -> None:
        """Remember a text; -1 stands between texts."""
        start = len(self.stream)
        self.stream += [*ids, -1]
        for end in range(start + self.least, len(self.stream) - 1):
            self.places.setdefault(tuple(self.stream[end - self.least:end]), []).append(end)

    def after(self, ids: list[int]) -> list[int]:
        """Up to `most` tokens that followed the longest match of the end of `ids`; [] where nothing matches."""
        def length(end: int) -> int:
            same = 0
            while same < min(len(ids), 32) and self.stream[end - 1 - same] == ids[-1 - same]:
                same += 1
            return same
        places = self.places.get(tuple(ids[-self.least:]), [])[-64:]
        if len(ids) < self.least or not places:
            return []
        end = max(places, key=length)
        found = self.stream[end:end + self.most]
        return found[:found.index(-1)] if -1 in found else found


class TextLookup:
    """generation.stream_text with drafts looked up in `texts` and in what was written before. Counts in `tally`."""

    def __init__(self, tokenizer, texts: list[str] = (), least: int = LEAST, most: int = MOST):
        self.lookup, self.tally = Lookup([tokenizer.encode(text) + [tokenizer.eot] for text in texts], least, most), Tally()

    def __call__(self, model: CSM, tokenizer, state: DecodeState, ids: list[int], number: int, most: int, temperature: float, generator=None, drafts=None) -> Iterator[int]:
        """As generation.stream_text, the same tokens. drafts: asked first."""
        def guess(out: list[int]) -> list[int]:
            return (drafts(out) if drafts else []) or self.lookup.after(out)
        out, most = [], min(most, state.limit - state.length - len(ids))
        for token in write(TextStep(model, state, number, len(ids) + most), tokenizer, ids, most, temperature, generator, guess, self.tally):
            out.append(token)
            yield token
        self.lookup.add([*out, tokenizer.eot])
