"""Train the CSM model. One file for every size (--model_size), machine and number of GPUs.

    python train.py --max_steps 100                          # from the shipped weights of this size where there are some
    python train.py --from_scratch --minutes 60              # an hour on this machine
    python train.py --resume checkpoints/last.pt             # exactly where it stopped, with its own settings
    python train.py --lora --data my_recordings              # a voice: low-rank adapters on the shipped weights
    torchrun --nproc_per_node 8 train.py --model_size small  # one process per GPU
    python train.py --model_size large --dry_run --ranks 64 --gpu_memory_gb 80      # how that would be spread

Writes checkpoints/last.pt and best_model.pt (by validation loss, averaged weights inside), metrics.jsonl,
loss.png and samples/ (the model's own speech of held-out lines: watching.py). Order of the loop: validate, sample and score, save, stop, step, log.
"""
from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from argparse import SUPPRESS
from pathlib import Path

from config import ModelConfig, Parser, TrainConfig, add_flags, count_parameters, from_dict, from_flags, model_preset, to_dict, training_bytes
from runtime import Ranks, plain_errors

LARGE, CPU_POSITIONS = 100e6, 1024          # a CPU trains models of more parameters than this on smaller batches, unless told otherwise
EARLY_SHARE, EARLY_SECONDS = 0.15, 6.0       # curriculum: single turns up to this long in the first part of a run from scratch
FRAME_SHARE, OVERHEAD = 0.6, 2.5            # voice positions among all; a step's time over that of its matrix products (both only for a guess)
ADAPTER_RUN = "csm-adapter"                  # kind of a training file that holds adapters alone


def build_parser() -> Parser:
    parser = Parser(description="Train the CSM model.", epilog="With --minutes the run lasts that long and --max_steps does not count.")
    add_flags(parser, TrainConfig)
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import torch                     # noqa: E402
from torch import Tensor, nn     # noqa: E402
from tqdm import tqdm            # noqa: E402

import lora                      # noqa: E402
import parallel                  # noqa: E402
import runtime                   # noqa: E402
import watching                  # noqa: E402
from architecture import CSM, FrameBatch  # noqa: E402
from checkpoint import carry_over, check_codec, find, link_file, load_model, load_training, save_training  # noqa: E402
from dataset_pipeline import ConversationDataset, Stage, data_folders, phone_ids, read_index, widen  # noqa: E402
from optimisers import Muon      # noqa: E402


# ----------------------------------------------------------------------------- settings

def read_settings(argv) -> tuple[TrainConfig, dict | None]:
    """Flags -> (settings, contents of the file to resume from or None). A resumed run keeps its settings except for flags given now."""
    parser = build_parser()
    cfg = from_flags(TrainConfig, parser.parse_args(argv))
    for action in parser._actions:
        action.default = SUPPRESS
    given = vars(parser.parse_args(argv))
    if not cfg.resume:
        if "batch_positions" not in given and runtime.pick_device(cfg.device).type == "cpu" and count_parameters(model_preset(cfg.model_size))["total"] > LARGE:
            cfg.batch_positions = CPU_POSITIONS
        return cfg, None
    saved = read_run(Path(cfg.resume))
    size = saved["train_config"]["model_size"]
    if given.get("model_size", size) != size:
        raise ValueError(f"{cfg.resume} is a run of --model_size {size}: leave out --model_size, or start anew without --resume")
    return from_dict(TrainConfig, saved["train_config"] | given), saved


def read_run(path: Path) -> dict:
    """A training file; or what lies beside the shares of a sharded checkpoint, whose folder is then "shards"."""
    if not path.is_dir():
        return load_training(path, ADAPTER_RUN) if path.name.endswith(".adapter.pt") else load_training(path)
    return load_training(path / parallel.RUN, "csm-shards") | {"shards": str(path)}


def start_of(cfg: TrainConfig) -> Path | None:
    """Weights that a new run begins with; None: from scratch."""
    shipped = find(cfg.init_from or f"pretrained/{cfg.model_size}")
    return shipped if not cfg.from_scratch and (cfg.init_from or shipped.exists()) else None


def model_config(cfg: TrainConfig, saved: dict | None) -> ModelConfig:
    """What the model will be, as cheaply as it can be known."""
    start = None if saved is not None else start_of(cfg)
    if saved is not None:
        return from_dict(ModelConfig, saved["config"])
    if start is None:
        return model_preset(cfg.model_size)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):         # not a folder of ours
        return from_dict(ModelConfig, json.loads((start / "config.json").read_text(encoding="utf-8"))["config"])
    return load_model(start).cfg


def build_model(cfg: TrainConfig, saved: dict | None, codec_fingerprint: str) -> tuple[CSM, str]:
    """The model to train, and a plain word on where its weights come from (those of a sharded checkpoint are read later)."""
    if saved is not None:
        check_codec(cfg.resume, saved["codec_fingerprint"], codec_fingerprint)
        if cfg.lora:
            model = with_adapters(cfg, load_model(saved["base"]))
            model.load_state_dict(model.state_dict() | saved["model"])
        else:
            model = CSM(from_dict(ModelConfig, saved["config"]))
        if not cfg.lora and "shards" not in saved:
            model.load_state_dict(saved["model"])
        return model, f"resumed from {cfg.resume} at step {saved['step']}"
    if shipped := start_of(cfg):
        return with_adapters(cfg, load_model(shipped, codec_fingerprint=codec_fingerprint)), f"starting from {shipped}"
    if cfg.lora:
        raise ValueError(f"there are no weights of size {cfg.model_size} to adapt: name some with --init_from")
    model = CSM(model_preset(cfg.model_size))
    model.init_weights(torch.Generator().manual_seed(cfg.seed), open_gates=True)
    if cfg.carry_over:
        copied, total = carry_over(model, load_model(cfg.carry_over))
        return model, f"starting from {copied / total:.0%} of the numbers of {cfg.carry_over}, the rest from scratch"
    return model, "starting from scratch"


def with_adapters(cfg: TrainConfig, model: CSM) -> CSM:
    if cfg.lora:
        lora.attach(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    return model


def on_meta(model_cfg: ModelConfig) -> CSM:
    with torch.device("meta"):
        return CSM(model_cfg)


# ----------------------------------------------------------------------------- spreading over ranks

def memory_needs(cfg: TrainConfig, model_cfg: ModelConfig, gpus: int) -> dict[str, int]:
    """config.training_bytes of this run: its positions, its average, its optimisers."""
    needs = training_bytes(model_cfg, cfg.batch_positions, gpus, cfg.recompute or model_cfg.recompute)
    del needs["total"]
    if cfg.lora:                                             # what is trained is a hundredth
        needs |= dict.fromkeys(("gradients", "optimiser", "average"), 0)
    if cfg.ema <= 0:
        needs["average"] = 0
    if cfg.muon_lr <= 0 and not cfg.lora:
        needs["optimiser"] = 2 * needs["weights"]
    return needs


def plan_run(cfg: TrainConfig, model_cfg: ModelConfig, ranks: int, device: torch.device) -> parallel.Plan:
    """How this run is spread. ValueError with the flag to change where it fits nowhere."""
    if cfg.dry_run and not cfg.gpu_memory_gb:
        raise ValueError("a dry run needs the memory of one GPU: add --gpu_memory_gb 80 (and --ranks 64, say)")
    memory = cfg.gpu_memory_gb * 1e9 or parallel.device_bytes(device)
    host = None if cfg.dry_run else parallel.device_bytes(torch.device("cpu"))
    return parallel.choose(lambda gpus: memory_needs(cfg, model_cfg, gpus), ranks, memory, host, cfg.parallel)


def blocks_of(model: CSM) -> list[nn.Module]:
    return [*model.backbone.layers, *model.decoder.layers]


def unheard(batch: FrameBatch) -> FrameBatch:
    """A history of padding alone: ranks that share weights must run the same blocks forward and backward, whatever their batch."""
    one, frames, mask = batch.turn.new_full((batch.B, 1), -1), torch.zeros_like(batch.frames[:, :1]), torch.zeros_like(batch.mask[:, :1])
    mask[..., -1] = True                                     # embedded, so that gradients reach back through every block, but never looked at
    return FrameBatch(frames, mask, one, one, one)


class Objective(nn.Module):
    """CSM.loss as a module's forward, which PyTorch's wrappers need.

    Our loss is a sum divided by the targets of all micro-batches and ranks; both wrappers take the mean of the
    gradients over ranks, hence the factor `ranks`. touch_all: every parameter outside the blocks gets a gradient (of 0
    where this batch does not use it), since FSDP's ranks must reduce the same ones.
    """

    def __init__(self, model: CSM, ranks: int = 1, touch_all: bool = False):
        super().__init__()
        self.model, self.ranks, self.touch_all = model, ranks, touch_all

    def forward(self, batch, history, words, generator, counts: dict[str, float]) -> tuple[Tensor, Tensor]:
        """-> loss to run backward on, sums (terms + K - 1,) of the terms in the order of counts and of codebooks 1 to K - 1."""
        terms = self.model.loss(batch, history, words, generator)
        nothing = torch.zeros((), device=terms["c0"][0].device)
        codebooks = [terms["metrics"].get(f"depth_{k}", (nothing, 0))[0] for k in range(1, self.model.cfg.num_codebooks)]
        loss = weighted_loss(terms, counts, self.model.cfg.loss_weights) * self.ranks
        if self.touch_all:
            loss = loss + sum(0 * p.sum() for n, p in self.model.named_parameters() if not n.startswith(("backbone.layers.", "decoder.layers.")))
        return loss, torch.stack([value.detach().double() for value in [terms[n][0] for n in counts] + codebooks])


def dry_run(cfg: TrainConfig, model_cfg: ModelConfig) -> None:
    """Say how the run would be spread, and shard it for real on the meta device where it would be sharded."""
    ranks = cfg.ranks or 1
    plan = plan_run(cfg, model_cfg, ranks, torch.device("cpu"))
    model = on_meta(model_cfg)
    total = sum(p.numel() for p in model.parameters())
    print(f"{model_cfg.name}: {total / 1e9:.3f} B parameters; {plan.say()}")
    if plan.sharded:
        held = parallel.rehearse(model, blocks_of(model), plan)
        print(f"rehearsed on the meta device: rank 0 of {ranks} holds {held['numbers']:,} numbers ({held['numbers'] / total * ranks:.3f} of an even share) "
              f"of {held['tensors']} tensors in {held['groups']} groups")


# ----------------------------------------------------------------------------- optimisers

def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Parameters for Muon (hidden matrices), AdamW with decay (embeddings and heads) and AdamW without (all that is small)."""
    hidden = {name + ".weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name}
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if name in hidden and parameter.dim() == 2:
            matrices.append(parameter)
        else:
            (decayed if parameter.dim() >= 2 and ("embedding" in name or "head" in name) else plain).append(parameter)
    return matrices, decayed, plain


def build_optimisers(model: nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices (muon_lr 0: none) and AdamW for the rest; each group remembers its base_lr."""
    if cfg.lora:                                             # small matrices that begin at zero: AdamW alone
        adapted = [p for p in model.parameters() if p.requires_grad]
        return [torch.optim.AdamW([{"params": adapted, "weight_decay": 0.0, "base_lr": cfg.lr}], lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8)]
    matrices, decayed, plain = split_parameters(model)
    optimisers = [Muon(matrices, lr=cfg.muon_lr, weight_decay=cfg.weight_decay, momentum=0.95)] if cfg.muon_lr > 0 else []
    groups = [{"params": decayed if optimisers else matrices + decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = all(p.device.type == "cuda" for p in model.parameters())
    optimisers.append(torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=fused))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers


class Average:
    """Exponential moving average of the parameters; its decay warms up, so that short runs are averaged over their end only."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names, self.live = list(learning), list(learning.values())
        self.values = [p.detach().clone() for p in self.live] if decay > 0 else []          # shares of a sharded model

    @torch.no_grad()
    def update(self) -> None:
        if self.values:
            decay = min(self.decay, (1 + self.count) / (10 + self.count))
            torch._foreach_lerp_([parallel.local(v) for v in self.values], [parallel.local(p.detach()) for p in self.live], 1 - decay)
            self.count += 1

    @contextlib.contextmanager
    def applied(self):
        """Inside, the model holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.live if self.values else ()):
            value = self.values[i]
            if parallel.local(value) is value:
                parameter.data, self.values[i] = value, parameter.data
            else:                                            # the wrapper holds on to the memory of its shares
                ours, theirs = parallel.local(value), parallel.local(parameter.detach())
                kept = theirs.clone()
                theirs.copy_(ours)
                ours.copy_(kept)

    def state(self) -> dict:
        return {"weights": dict(zip(self.names, self.values)) if self.values else None, "count": self.count}

    def load(self, weights: dict | None, count: int) -> None:
        self.count = count
        for name, value in zip(self.names, self.values):
            if weights is not None:
                value.copy_(weights[name])


# ----------------------------------------------------------------------------- loss

class Lexicon:
    """Bare words for the letters-to-phones loss."""

    def __init__(self, words: list[tuple[str, str]], tokenizer):
        pairs = [(tokenizer.encode(word), phone_ids(phones)) for word, phones in words]
        self.pairs, self.pad = [(t, p) for t, p in pairs if 0 < len(p) <= 2 * len(t)], tokenizer.pad

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """count words -> tokens (count, L), phones (count, P) padded with 0."""
        chosen = [self.pairs[i] for i in torch.randint(len(self.pairs), (count,), generator=generator).tolist()]
        tokens, phones = zip(*((torch.tensor(t), torch.tensor(p)) for t, p in chosen))
        pad = nn.utils.rnn.pad_sequence
        return pad(tokens, batch_first=True, padding_value=self.pad), pad(phones, batch_first=True)


def load_lexicon(count: int, model_cfg: ModelConfig, tokenizer) -> Lexicon | None:
    """Words of the training split with their phones; None when the model or the flags have no use for them."""
    if not count or not (model_cfg.cross.enabled and model_cfg.cross.phone_head):
        return None
    try:
        from synthetic_conversations import lexicon
        return Lexicon(lexicon("train"), tokenizer)
    except ImportError as error:
        print(f"note: no pronouncing lexicon ({error}): training without it", file=sys.stderr)
        return None


def target_counts(model: CSM, batch: FrameBatch, lexicon: tuple[Tensor, Tensor] | None) -> dict[str, int]:
    """What CSM.loss will count per term, known before the forward pass: micro-batches share one normaliser."""
    cfg, valid = model.cfg, batch.turn >= 0
    voice = valid & batch.mask[..., 0]
    n = len(model._before(batch, voice & batch.audio_loss)[0])
    counts = {"c0": n, "depth": max(min(n, 1), int(n * cfg.depth_fraction)) * (cfg.num_codebooks - 1)}
    if model.text_head is not None:
        counts["text"] = len(model._before(batch, valid & ~voice & batch.text_loss)[0])
    if model.advance_head is not None:
        known = voice & (batch.reading >= 0)
        counts["advance"] = int(known.flatten()[model._before(batch, known)[0]].sum())
    if model.reader is not None and model.reader.phone_head is not None:
        counts["phones"] = sum(int((p > 0).sum()) for p in (batch.phones, lexicon and lexicon[1]) if p is not None)
    return counts


def weighted_loss(terms: dict, counts: dict[str, float], weights: dict[str, float]) -> Tensor:
    """Sum over terms of weight x sum / number of targets (of all micro-batches and ranks)."""
    return sum(weights.get(name, 0.0) * terms[name][0] / max(1, count) for name, count in counts.items())


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2 ** 63 - 1)
    return seed


# ----------------------------------------------------------------------------- the run

class Trainer:
    """One run: everything the loop needs, and the loop."""

    def __init__(self, cfg: TrainConfig, saved: dict | None = None, ranks: Ranks = Ranks()):
        self.cfg, self.ranks = cfg, ranks
        self.device = runtime.pick_device(cfg.device)
        if self.device.type == "cpu":
            runtime.keep_freed_memory()
        runtime.set_seed(cfg.seed + ranks.rank)
        self.codec_fingerprint = read_index(cfg.data)["codec_fingerprint"]
        self._build(saved)
        self.curriculum = self.origin == "starting from scratch" if saved is None else saved["curriculum"]
        self.lr_scale = 1.0 if self.curriculum or cfg.from_scratch else cfg.init_lr_scale
        self.weights = self.model.cfg.loss_weights
        options = {"codec_fingerprint": self.codec_fingerprint, "batch_positions": cfg.batch_positions}
        self.data = ConversationDataset(cfg.data, self.model.cfg, "train", seed=cfg.seed, ranks=ranks, num_workers=cfg.num_workers, **options)
        held_out = ConversationDataset(cfg.data, self.model.cfg, "validation", seed=0, **options)
        self.validation_batches = held_out.fixed_batches(cfg.eval_batches, cfg.max_context_turns)
        self.lexicon = load_lexicon(0 if cfg.lora else cfg.lexicon_words, self.model.cfg, self.data.tokenizer)
        self.optimisers = build_optimisers(self.model, cfg)
        self.average = Average(self.model, cfg.ema)
        self.watcher = watching.Watcher(cfg, self.model, self.average, self.data.tokenizer, self.codec_fingerprint, held_out.conversations)
        self.step, self.minutes, self.best, self.validation = 0, 0.0, math.inf, {}
        self.loader_state = self.data.state_dict()
        if saved is not None:
            self._restore(saved)
        self.first_step, self.interrupted = self.step, False
        self.saved_step, self.saved_minutes = -1, self.minutes
        if cfg.compile:
            torch._dynamo.config.recompile_limit = 64            # two stacks of other widths, training and validation, masks of several kinds
            self.model.compile_blocks()

    def _build(self, saved: dict | None) -> None:
        """The model on its device, spread as the memory plan says; self.objective computes its loss."""
        cfg, first = self.cfg, model_config(self.cfg, saved)
        self.plan = plan_run(cfg, first, self.ranks.world_size, self.device)
        shards = saved is not None and "shards" in saved
        if self.plan.sharded and saved is not None and not shards:
            raise ValueError(f"{cfg.resume} was written by ranks that each held the whole model: resume it with --parallel ddp, or start from its weights with --init_from")
        if self.plan.sharded and (shards or not self.ranks.main):
            check_codec(cfg.resume, saved and saved["codec_fingerprint"], self.codec_fingerprint)
            self.model, self.origin = on_meta(first), f"resumed from {cfg.resume} at step {saved['step']}" if shards else ""
        else:
            self.model, self.origin = build_model(cfg, saved, self.codec_fingerprint)
        self.origin = self.ranks.share(self.origin)
        self.base = saved["base"] if saved is not None and cfg.lora else cfg.init_from or f"pretrained/{cfg.model_size}"
        if self.plan.sharded:
            self._shard(fill=not shards)
        self.model.cfg.recompute |= cfg.recompute
        if not self.plan.sharded:
            self.model.to(self.device)
        self.model.train()
        self.objective = Objective(self.model, self.ranks.world_size, touch_all=self.plan.sharded)
        if self.plan.kind == "ddp":
            self.objective = parallel.whole_on_every_rank(self.objective)

    def _shard(self, fill: bool) -> None:
        whole = self.model.state_dict() if fill and self.ranks.main else {}
        self.model = on_meta(self.model.cfg)
        parallel.shard(self.model, blocks_of(self.model), self.plan, self.device, self.cfg.precision == "bf16")
        if fill:
            parallel.fill(self.model, whole, self.device, self.plan.offload)
        else:
            self.model.to_empty(device="cpu" if self.plan.offload else self.device)

    def _restore(self, saved: dict) -> None:
        if "shards" in saved:
            parallel.load_shards(Path(saved["shards"]), self.model, self.optimisers, self.average.state()["weights"] or {})
            self.average.count = saved["ema_count"]
        else:
            for optimiser, state in zip(self.optimisers, saved["optimizer"]):
                optimiser.load_state_dict(state)
            self.average.load(saved["ema"], saved["ema_count"])
        self.step, self.minutes, self.best, self.validation = saved["step"], saved["minutes"], saved["best"], saved["validation"]
        self.loader_state = saved["loader"]
        self.data.load_state_dict(saved["loader"])
        if self.ranks.world_size == 1:
            runtime.set_rng_state(saved["rng"])
        else:                                                # the file has the first rank's alone; only dropout draws from it
            runtime.set_seed(_mix(self.cfg.seed, self.step, self.ranks.rank))

    # ---- where the run stands

    @property
    def progress(self) -> float:
        """Share of the run that is over, by time where --minutes is set, else by steps."""
        return self.minutes / self.cfg.minutes if self.cfg.minutes > 0 else self.step / self.cfg.max_steps

    def stage(self) -> Stage:
        """Short single turns first, then turns with context."""
        if self.curriculum and self.progress < EARLY_SHARE:
            return Stage(0, EARLY_SECONDS)
        return Stage(self.cfg.max_context_turns)

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step > self.first_step

    def due_to_save(self) -> bool:
        long_ago = 0 < self.cfg.save_minutes <= self.minutes - self.saved_minutes
        return self.saved_step != self.step and (self.due(self.cfg.save_every) or long_ago)

    # ---- one step

    def _draw(self) -> list[tuple]:
        """This step's micro-batches: (batch, history, lexicon words, generator of the depth decoder's frames), in main memory."""
        drawn = []
        for number in range(self.cfg.accumulate):
            batch, history, self.loader_state = self.next_batch()
            seed = _mix(self.cfg.seed, self.step, number * self.ranks.world_size + self.ranks.rank)      # one rank with more micro-batches draws the same
            words = self.lexicon and self.lexicon.draw(self.cfg.lexicon_words, torch.Generator().manual_seed(seed))
            if self.plan.sharded and history is None and self.data.p_history > 0:
                history = unheard(batch)
            drawn.append((batch, history, words, torch.Generator().manual_seed(seed)))
        return drawn

    def _moved(self, batch: FrameBatch | None) -> FrameBatch | None:
        """On the device, narrow on the way."""
        return batch and widen(batch.to(self.device))

    def _counts(self, drawn: list[tuple]) -> dict[str, float]:
        """Valid targets per term over the micro-batches and all ranks: counted before they move, a GPU would be waited for at every number."""
        each = [target_counts(self.model, batch, words) for batch, _, words, _ in drawn]
        names = list(each[0])
        total = self.ranks.sum(torch.tensor([sum(c[n] for c in each) for n in names], dtype=torch.float64))
        return dict(zip(names, total.tolist()))

    def gradients(self) -> dict[str, float]:
        """Forward and backward of one step; returns the mean of each loss term over its valid targets, "loss", and "per_codebook" (K values)."""
        drawn = self._draw()
        counts, sums = self._counts(drawn), 0.0
        self.positions = sum(int((batch.turn >= 0).sum()) for batch, *_ in drawn)
        for number, (*rows, words, generator) in enumerate(drawn, start=1):
            self.last_batch = batch, history, words = *map(self._moved, rows), words and tuple(w.to(self.device) for w in words)
            with parallel.without_sync(self.objective, number < len(drawn)):
                with runtime.autocast(self.device, self.cfg.precision):
                    loss, part = self.objective(batch, history, words, generator, counts)
                loss.backward()
                self._require_finite(loss.detach(), "loss")  # after it, since this waits for the device
            sums = sums + part
        total = self.ranks.sum(sums).tolist()
        means = {n: value / max(1.0, counts[n]) for n, value in zip(counts, total)}
        frames = max(1.0, counts["depth"] / max(1, self.model.cfg.num_codebooks - 1))
        depth = [value / frames for value in total[len(counts):]]
        return {"loss": sum(self.weights.get(n, 0.0) * v for n, v in means.items())} | means | {"per_codebook": [means["c0"], *depth]}

    def update(self) -> tuple[float, float]:
        """Clip, check, step; returns the gradient norm and the factor of the schedule."""
        norm = float(parallel.full(nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)))
        self._require_finite(norm, "gradient norm")
        factor = self.lr_scale * runtime.cosine_lr(self.step, self.cfg.max_steps, self.cfg.warmup_steps, self.cfg.min_lr_ratio, self.progress)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = factor * group["base_lr"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update()
        return norm, factor

    def _require_finite(self, value: Tensor | float, what: str) -> None:
        """ValueError before the step where `value` is not finite; the (last) micro-batch lies in the output folder for inspection."""
        if math.isfinite(value):
            return
        path = Path(self.cfg.output) / f"nonfinite-{self.ranks.rank}.pt"
        batch, history, words = self.last_batch
        found = {"step": self.step, "history": history and vars(history.to("cpu")), "words": words and tuple(w.cpu() for w in words)}
        runtime.atomic_write(path, lambda file: torch.save(found | vars(batch.to("cpu")), file))
        raise ValueError(f"the {what} of step {self.step} is not finite: weights were left as they were and the batch saved to {path}; "
                         f"go on from {self.cfg.output}/last.pt with a lower --lr and --muon_lr, or --precision fp32")

    # ---- validation, samples, files

    @torch.no_grad()
    def validate(self) -> dict:
        """Mean of each term over the fixed validation batches with the averaged weights; keeps and returns it."""
        sums: dict[str, list[float]] = {}
        self.model.eval()
        with self.average.applied():
            for number, batch in enumerate(self.validation_batches):
                with runtime.autocast(self.device, self.cfg.precision):
                    terms = self.model.loss(batch.to(self.device), generator=torch.Generator().manual_seed(number))
                metrics = terms.pop("metrics")
                for name, (value, count) in (terms | metrics).items():
                    entry = sums.setdefault(name, [0.0, 0.0])
                    entry[0], entry[1] = entry[0] + float(value), entry[1] + float(count)
            parallel.scatter(self.model)                                     # what was gathered are averaged weights
        self.model.train()
        means = {name: value / count for name, (value, count) in sums.items() if count}
        depth = [means.pop(f"depth_{k}") for k in range(1, self.model.cfg.num_codebooks) if f"depth_{k}" in means]
        self.validation = {"loss": sum(self.weights.get(n, 0.0) * v for n, v in means.items() if n in self.weights)} | means
        self.validation["per_codebook"] = [means["c0"]] + depth
        return self.validation

    def save(self, best: bool = False) -> Path:
        """Write last.pt (or the folder behind last.dcp, when sharded), with everything an exact resume needs; best: it is to be best_model too."""
        average, output = self.average.state(), Path(self.cfg.output)
        about = {"ema_count": average["count"], "step": self.step, "minutes": self.minutes, "best": self.best, "validation": self.validation,
                 "curriculum": self.curriculum, "loader": self.loader_state, "rng": runtime.rng_state(), "codec_fingerprint": self.codec_fingerprint,
                 "train_config": to_dict(self.cfg), "config": to_dict(self.model.cfg), "is_best": best}
        optimisers = [o.state_dict() for o in self.optimisers] if not self.plan.sharded else []
        if self.plan.sharded:
            path = parallel.save_shards(output / f"step{self.step:06d}{parallel.SUFFIX}", self.model, self.optimisers, average["weights"] or {}, self.ranks,
                                        lambda file: save_training(file, kind="csm-shards", model={}, **about))
            self._point("last", path)
        elif self.cfg.lora:
            learning = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
            path = save_training(self.last_file, kind=ADAPTER_RUN, model=learning, ema=average["weights"], optimizer=optimisers, base=self.base, **about)
        else:
            path = save_training(self.last_file, kind="csm", model=self.model.state_dict(), ema=average["weights"], optimizer=optimisers, **about)
        self.saved_step, self.saved_minutes = self.step, self.minutes
        return path

    @property
    def last_file(self) -> Path:
        """Where `save` writes."""
        return Path(self.cfg.output) / ("last" + (parallel.SUFFIX if self.plan.sharded else ".adapter.pt" if self.cfg.lora else ".pt"))

    def _point(self, name: str, folder: Path) -> None:
        if self.ranks.main:
            parallel.point(Path(self.cfg.output) / (name + parallel.SUFFIX), folder)

    def save_or_say(self, must: bool, best: bool = False) -> bool:
        """Save; where that fails (full disk) say so and go on, unless `must`: the file before is whole and the next save may have room."""
        try:
            self.save(best)
        except ValueError as error:
            if must:
                raise
            self.saved_minutes = self.minutes                                # not again at every step
            tqdm.write(f"note: {error}; training goes on and saves again later", file=sys.stderr)
            return False
        return True

    def save_if_best(self) -> None:
        """best_model.pt is last.pt of the moment with the lowest validation loss: one file under two names."""
        before, better = self.best, self.validation["loss"] < self.best
        if self.ranks.share(better) if self.plan.sharded else better:            # sharded: every rank writes, or none
            self.best = self.validation["loss"]
            if self.save_or_say(self.progress >= 1, best=True):
                self._name_best()
            else:
                self.best = before

    def _name_best(self) -> None:
        if self.plan.sharded:
            self._point("best_model", self.last_file.resolve())
        elif self.cfg.lora:
            with self.average.applied():
                lora.save(self.model, Path(self.cfg.output) / "adapter", self.base, self.codec_fingerprint, step=self.step, validation=self.validation)
        else:
            link_file(self.last_file, self.last_file.with_name("best_model.pt"))

    def settle(self, saved: dict | None) -> None:
        """Finish what a killed run left: its unfinished files, and the second name of a best model that was saved."""
        runtime.sweep_unfinished(self.cfg.output)
        last = self.last_file
        if saved is not None and saved.get("is_best") and last.exists() and last.resolve() == Path(self.cfg.resume).resolve():
            self._name_best()

    # ---- the loop

    def run(self) -> None:
        """Validate, sample and score, save, stop, step, log; once more at the end, so that the end needs no code of its own."""
        cfg, main = self.cfg, self.ranks.main
        self.metrics = runtime.MetricsLog(cfg.output, to_dict(cfg) | runtime.run_manifest(), cfg.wandb, self.step) if main else None
        self.next_batch = lambda: self.data.draw(self.stage())
        self.bar = tqdm(total=cfg.max_steps if not cfg.minutes else None, initial=self.step, unit="step", desc="training", disable=not main)
        self.clock = time.monotonic()
        try:
            while True:
                last = self.progress >= 1
                stop = last or self.interrupted
                validating = last or self.due(cfg.eval_every) or self.step == 0
                if validating and not self.interrupted:
                    self._evaluate(keep=self.step > self.first_step)
                if main and not self.interrupted:
                    self._watch(validating, last)
                if (main or self.plan.sharded) and (self.due_to_save() or (stop and self.saved_step != self.step)):
                    self.save_or_say(must=stop)
                if stop:
                    break
                self._step_and_log()
        finally:
            self.data.close()
            self.bar.close()
            if main:
                self.metrics.close()
        if main:
            watching.plot_losses(Path(cfg.output))

    def _watch(self, validating: bool, last: bool) -> None:
        """Let the model speak, and be judged, as often as the flags say; what knows nothing yet is not asked."""
        def wanted(every: int) -> bool:
            return last or (self.due(every) if every else validating and (self.step > 0 or not self.curriculum))
        sample, score = wanted(self.cfg.sample_every), wanted(self.cfg.score_every)
        if not self.plan.sharded:
            self.watcher.look(self.step, self.metrics, sample, score)
        elif last and (self.cfg.samples or self.cfg.scored):
            watching.note("no samples: no rank of a sharded run holds the whole model; python demo.py --checkpoint speaks with its checkpoints")

    def _evaluate(self, keep: bool) -> None:
        """Every rank validates (same batches, same result); the first one writes."""
        values = self.validate()
        if self.ranks.main:
            self.metrics.log(self.step, kind="validation", minutes=self.minutes, **{f"validation_{k}": v for k, v in values.items()})
            text = "  ".join(f"{k} {v:.3f}" for k, v in values.items() if isinstance(v, float))
            tqdm.write(f"step {self.step}: validation {text}" + (f"  (ln {self.model.cfg.audio_vocab} = {math.log(self.model.cfg.audio_vocab):.3f})" if not self.step else ""))
        if keep and (self.ranks.main or self.plan.sharded):
            self.save_if_best()

    def _step_and_log(self) -> None:
        start = time.monotonic()
        means = self.gradients()
        norm, factor = self.update()
        self.step += 1
        now = time.monotonic()
        seconds, before, self.clock = now - start, self.clock, now
        self._agree_on_time(now - before)                    # validation and saving count as well
        self.bar.update(1)
        logged = (self.step - 1) % self.cfg.log_every == 0 or self.progress >= 1
        additions = watching.additions_now(self.model) if logged and (self.ranks.main or self.plan.sharded) else {}
        if not self.ranks.main:
            return
        if self.step == self.first_step + 2 and not self.cfg.minutes:
            left = (self.cfg.max_steps - self.step) * seconds
            tqdm.write(f"about {runtime.human_time(left)} for the remaining {self.cfg.max_steps - self.step} steps ({seconds:.2f} s each), peak memory so far {runtime.peak_memory_mb() or 0:.0f} MB")
        self.bar.set_postfix_str(f"loss {means['loss']:.3f} c0 {means['c0']:.3f}", refresh=False)
        if logged:
            rates = dict(zip(("lr", "muon_lr"), (optimiser.param_groups[0]["lr"] for optimiser in reversed(self.optimisers))))
            self.metrics.log(self.step - 1, kind="train", **means, grad_norm=norm, lr_factor=factor, **rates, **additions, seconds=seconds, minutes=self.minutes,
                             positions_per_second=self.positions * self.ranks.world_size / seconds, padding=self.data.waste)

    def _agree_on_time(self, seconds: float) -> None:
        """Minutes and the wish to stop, the same on every rank."""
        shared = self.ranks.sum(torch.tensor([seconds if self.ranks.main else 0.0, float(self.interrupted)], dtype=torch.float64))
        self.minutes += float(shared[0]) / 60
        self.interrupted = bool(shared[1] > 0)


# ----------------------------------------------------------------------------- main

def set_aside(output: Path) -> None:
    """Move what an earlier run left in `output` to output/previous: a new run must not write over it."""
    for name in ("last.pt", "best_model.pt", "last.adapter.pt", "metrics.jsonl", "loss.png", "samples"):
        if (output / name).exists():
            (output / "previous").mkdir(exist_ok=True)
            shutil.rmtree(output / "previous" / name, ignore_errors=True)            # a folder is not written over
            (output / name).replace(output / "previous" / name)


def stop_on_signals(trainer: Trainer) -> None:
    """The first Ctrl-C (or SIGTERM) finishes the step and saves; the second one kills."""
    def ask(number, frame):
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = True
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):       # not in the main thread
            signal.signal(number, ask)


def announce(trainer: Trainer) -> None:
    cfg, model = trainer.cfg, trainer.model
    million = sum(p.numel() for p in model.parameters()) / 1e6
    held = sum(memory_needs(cfg, model.cfg, 1)[part] for part in ("weights", "optimiser", "average")) / 1e6
    print(f"{model.cfg.name}: {million:.1f} M parameters, {trainer.origin}; {trainer.device}, {cfg.precision}; "
          f"{len(trainer.data.targets)} training turns ({trainer.data.skipped} too long)\n{trainer.plan.say()}", flush=True)
    if trainer.plan.memory and trainer.plan.on_device > trainer.plan.memory:
        print("note: that may be too much for this device: lower --batch_positions or add --recompute if memory runs out", file=sys.stderr)
    if trainer.device.type == "cpu" and not cfg.minutes:
        left = cfg.max_steps - trainer.step
        print(f"roughly {runtime.human_time(left * rough_step_seconds(trainer))} for {left} steps of {cfg.batch_positions} positions; "
              "a better guess follows after two of them", flush=True)
    free = runtime.free_disk_mb(cfg.output)
    if free < held:
        raise ValueError(f"the checkpoints need about {held:.0f} MB and the disk of {cfg.output} has {free:.0f} MB free: free some space or change --output")


def rough_step_seconds(trainer: Trainer) -> float:
    """Seconds one step should take, from its arithmetic and the speed of a matrix product measured now."""
    cfg, model_cfg = trainer.cfg, trainer.model.cfg
    parts = count_parameters(model_cfg)
    passes = FRAME_SHARE * model_cfg.depth_fraction * model_cfg.num_codebooks                # depth positions per backbone position
    work = 6 * OVERHEAD * cfg.batch_positions * cfg.accumulate * (parts["backbone"] + parts["c0_head"] + passes * (parts["depth"] + parts["projection"]))
    if cfg.muon_lr > 0:                                                                      # five Newton-Schulz rounds of three products
        work += sum(5 * (4 * min(p.shape) * p.numel() + 2 * min(p.shape) ** 3) for p in split_parameters(trainer.model)[0])
    square = torch.ones(1024, 1024, dtype=torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
    square @ square
    start = time.monotonic()
    for _ in range(3):
        square @ square
    return work * (time.monotonic() - start) / (3 * 2 * 1024 ** 3)


def trainable(cfg: TrainConfig) -> str:
    """cfg.data, with folders of bare recordings cut, written down, collected and tokenised."""
    import recordings
    return ",".join(str(recordings.prepare(folder, cfg.codec)) if recordings.is_recordings(folder) else folder for folder in data_folders(cfg.data)) or cfg.data


@plain_errors
def main(argv=None) -> int:
    cfg, saved = read_settings(argv)
    if cfg.dry_run:
        dry_run(cfg, model_config(cfg, saved))
        return 0
    ranks = runtime.start_distributed(runtime.pick_device(cfg.device))
    try:
        cfg.data = ranks.share(trainable(cfg) if ranks.main else "")
        trainer = Trainer(cfg, saved, ranks)
        if ranks.main:
            announce(trainer)
            trainer.settle(saved)
        if trainer.progress >= 1:
            print(f"{cfg.resume} is at step {trainer.step}: this run is over; raise --max_steps (or --minutes) to go on")
            return 0
        if saved is None and ranks.main:
            set_aside(Path(cfg.output))
        stop_on_signals(trainer)
        trainer.run()
        if ranks.main:
            done = "interrupted: go on with --resume" if trainer.interrupted else "done:"
            print(f"{done} {trainer.last_file} (step {trainer.step}), best validation loss {trainer.best:.4f}")
        return 130 if trainer.interrupted else 0
    finally:
        runtime.stop_distributed(ranks)


if __name__ == "__main__":
    sys.exit(main())
