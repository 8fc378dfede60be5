"""Small models trained alike, for the experiments: equal parameters, equal arithmetic, resumable, judged frame by frame.

A Condition is a model config and a change to what the model does. Each (condition, seed) is trained once, into its own
folder below outputs/experiments, whose name holds a hash of everything that decides the result: a finished one is read back,
an unfinished one goes on where it was saved. The parts of the trainer (optimisers, average, schedule, loss) are train.py's.

K codebooks, n frames, C conversations, S seeds.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import runtime
from architecture import CSM, FrameBatch
from checkpoint import load_training, save_training
from config import OFF, CrossAttentionConfig, ModelConfig, TransformerConfig, to_dict
from dataset_pipeline import ConversationDataset, Stage, Window, collate, pack, read_index, widen
from experiments.settings import Training
from train import Average, build_optimisers, target_counts, weighted_loss

KIND = "experiment"              # of the checkpoints
SPLITS = ("validation", "test")  # both are held out here: nothing is chosen by them
VERSION = 1                      # of what a result depends on in this file: raise it when training or judging changes


@dataclass(frozen=True)
class Condition:
    """A model and what it does otherwise. `change` patches a built model in place; `unused` counts parameters that no loss reaches."""
    name: str
    cfg: ModelConfig
    change: Callable[[CSM], None] | None = None
    unused: int = 0

    def build(self, seed: int) -> CSM:
        model = CSM(self.cfg)
        model.init_weights(torch.Generator().manual_seed(seed), open_gates=True)
        if self.change:
            self.change(model)
        return model

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in CSM(self.cfg).parameters()) - self.unused


def base_config(width: int = 128, layers: int = 4, ffn: int = 0, codebooks: int = 8, semantic: int = 2, depth: int = 96, audio_vocab: int = 1025, **changes) -> ModelConfig:
    """A few million parameters: backbone `layers` x `width`, depth decoder 2 x `depth`; our additions off unless given."""
    off = {k: v for k, v in OFF.items() if k not in changes}
    return ModelConfig("small", TransformerConfig(layers, width, ffn or 3 * width, 4, 4), TransformerConfig(2, depth, 2 * depth, 4, 4, max_positions=64), num_codebooks=codebooks,
                       num_semantic=semantic, audio_vocab=audio_vocab, **({"depth_fraction": 0.25} | off | changes))


def cross_config(width: int = 96, **changes) -> CrossAttentionConfig:
    return CrossAttentionConfig(**({"every": 2, "heads": 4, "width": width, "reader_layers": 3} | changes))


def equal_parameters(make: Callable[[int, int], object], count: Callable[[object], int], target: int, width: int, step: int = 8) -> object:
    """make(width, ffn) -> whatever `count` counts, with `target` parameters within 1 %: the widest that fits with ffn = 3 width, then ffn fills the rest.

    ValueError where no width comes near.
    """
    if count(make(width, 3 * width)) > target:
        raise ValueError(f"{count(make(width, 3 * width)):,} parameters at width {width} are more than the {target:,} to be matched")
    while count(make(width + step, 3 * (width + step))) <= target:
        width += step
    ffn = 3 * width
    slope = count(make(width, ffn + 1)) - count(make(width, ffn))
    made = make(width, ffn + round((target - count(make(width, ffn))) / slope))
    if abs(count(made) / target - 1) > 0.01:
        raise ValueError(f"{count(made):,} parameters are not within 1 % of {target:,}: change --width")
    return made


# ----------------------------------------------------------------------------- batches

class Windows:
    """Training batches of conversation windows in an order that depends on the seed alone (dataset_pipeline's)."""

    def __init__(self, run: Training, cfg: ModelConfig, seed: int):
        self.data, self.stage = ConversationDataset(run.data, cfg, "train", run.batch_positions, seed), Stage(run.max_context)

    def next_batch(self) -> tuple[FrameBatch, FrameBatch | None]:
        batch, history, _ = self.data.draw(self.stage)
        return widen(batch), history and widen(history)

    def state_dict(self) -> dict:
        return self.data.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.data.load_state_dict(state)


def last_turn_only(batch: FrameBatch) -> FrameBatch:
    """The batch with losses on the frames of each row's last turn alone (its end frame is not judged)."""
    last = batch.turn == batch.turn.max(1, keepdim=True).values
    return dataclasses.replace(batch, audio_loss=batch.audio_loss & last & batch.frames[..., :-1].any(-1))


def held_out_windows(run: Training, cfg: ModelConfig) -> tuple[list[list[Window]], dict[int, str], object]:
    """Fixed windows of the held-out splits, packed; id(window) -> conversation; the tokenizer. `run.held_out` of them, spread evenly."""
    windows, owner = [], {}
    for split in SPLITS:
        data = ConversationDataset(run.data, cfg, split, run.batch_positions, 0)
        for c, t in data.targets:
            turns = data.conversations[c][max(0, t - run.max_context):t + 1]
            while sum(turn.positions() for turn in turns) > data.limit:
                turns = turns[1:]
            windows.append(Window(turns, listening=[False] * len(turns), moods=[True] * len(turns)))
            owner[id(windows[-1])] = data.conversations[c][0].id.rsplit("-", 1)[0]
    if run.held_out:
        windows = windows[::max(1, len(windows) // run.held_out)][:run.held_out]
    return pack(windows, run.batch_positions), owner, data.tokenizer


# ----------------------------------------------------------------------------- judging

@torch.no_grad()
def frame_nats(model: CSM, batch: FrameBatch, slots=None) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss in nats of every judged frame and codebook (n, K), its row (n,) and its column (n,)."""
    with runtime.autocast(torch.device("cpu"), "bf16"):
        h = model(batch, memory=slots).flatten(0, 1)
        source, target = model._before(batch, (batch.turn >= 0) & batch.mask[..., 0] & batch.audio_loss)
        codes = batch.frames.flatten(0, 1)[target, :-1]                        # (n, K)
        first, rest = model.c0_logits(h[source]), model.depth_logits(h[source], codes)
    logits = torch.cat([first.unsqueeze(1), rest], 1).float()                  # (n, K, V)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
    return nats, target // batch.S, target % batch.S


class Sums:
    """Nats and frames of each conversation."""

    def __init__(self):
        self.nats: dict[str, np.ndarray] = {}
        self.frames: dict[str, int] = {}

    def add(self, names: list[str], nats: Tensor) -> None:
        """names (n,) of the conversations, nats (n, ...)."""
        for name in sorted(set(names)):
            mine = nats[torch.tensor([n == name for n in names])]
            self.nats[name] = self.nats.get(name, 0) + mine.double().sum(0).numpy()
            self.frames[name] = self.frames.get(name, 0) + len(mine)

    def table(self) -> dict:
        """{"names": C, "nats": (C, K) mean nats per frame, "frames": (C,)} in the order of names."""
        names = sorted(self.nats)
        frames = np.array([self.frames[n] for n in names], float)
        return {"names": names, "nats": np.stack([self.nats[n] for n in names]) / frames.reshape(-1, *[1] * np.ndim(self.nats[names[0]])), "frames": frames}


def judge_windows(model: CSM, windows) -> dict:
    """Held-out nats per frame and codebook of each conversation: Sums.table."""
    packed, owner, tokenizer = windows
    sums = Sums()
    model.eval()
    for group in packed:
        batch = last_turn_only(collate(group, model.cfg, tokenizer)[0])
        nats, rows, _ = frame_nats(model, batch)
        sums.add([owner[id(group[r])] for r in rows.tolist()], nats)
    return sums.table()


# ----------------------------------------------------------------------------- arithmetic

def step_flops(condition: Condition, batches: list, run: Training) -> float:
    """Floating-point operations of one training step (forward, backward, update), counted by PyTorch on real batches; lookups are none."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = condition.build(0).train()
    optimisers = build_optimisers(model, run.optimiser_config())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # the fused kernel of a CPU has no count
        for number, (batch, history) in enumerate(batches):
            gradients(model, batch, history, torch.Generator().manual_seed(number), "fp32")
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(batches)


def gradients(model: CSM, batch, history, generator, precision: str = "bf16") -> dict[str, float]:
    """Forward and backward of one batch; the mean of each loss term."""
    counts = target_counts(model, batch, None)
    with runtime.autocast(torch.device("cpu"), precision):
        terms = model.loss(batch, history, None, generator)
    loss = weighted_loss(terms, counts, model.cfg.loss_weights)
    loss.backward()
    return {"loss": float(loss.detach())} | {n: float(terms[n][0].detach()) / max(1, c) for n, c in counts.items()}


# ----------------------------------------------------------------------------- one run

@dataclass
class Run:
    """One model to train: `steps` steps; at `checks` (steps, the last included) judge(model) -> arrays is kept."""
    condition: Condition
    seed: int
    steps: int
    training: Training
    folder: Path
    batches: Callable[[], object]
    judge: Callable[[CSM], dict]
    checks: tuple[int, ...] = ()
    extra: tuple = ()                              # what else the result depends on
    found: dict = field(default_factory=dict)      # step -> what judge returned

    def key(self) -> str:
        about = [VERSION, to_dict(self.condition.cfg), self.condition.name, self.seed, self.steps, dataclasses.asdict(dataclasses.replace(self.training, output="", save_seconds=0)),
                 list(self.checks), read_index(self.training.data)["codec_fingerprint"], read_index(self.training.data)["splits"]["train"]["turns"], *self.extra]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]

    @property
    def home(self) -> Path:
        return self.folder / f"{self.condition.name}-seed{self.seed}-{self.key()}"


def save_result(path: Path, found: dict) -> None:
    """{step: {name: array}} as one .npz, whole or not at all."""
    flat = {f"{step}/{name}": np.asarray(value) for step, table in found.items() for name, value in table.items()}
    runtime.atomic_write(path, lambda file: np.savez_compressed(file, **flat))


def read_result(path: Path) -> dict:
    found: dict = {}
    with np.load(path) as flat:
        for key in flat.files:
            step, name = key.split("/", 1)
            found.setdefault(int(step), {})[name] = flat[key]
    return found


def load_run(run: Run) -> CSM:
    """The averaged weights of a finished run."""
    model = run.condition.build(run.seed)
    model.load_state_dict(load_training(run.home / "weights.pt", KIND)["model"])
    return model.eval()


def train_run(run: Run, bar: tqdm) -> dict:
    """Train, or read back what was trained. -> {step: what judge found there}."""
    done = run.home / "held_out.npz"
    if done.exists() and (run.home / "weights.pt").exists():
        bar.update(run.steps)
        return read_result(done)
    runtime.set_seed(run.seed)
    runtime.keep_freed_memory()
    model, batches = run.condition.build(run.seed).train(), run.batches()
    optimisers, average = build_optimisers(model, run.training.optimiser_config()), Average(model, run.training.ema)
    step = _resume(run, model, optimisers, average, batches)
    bar.update(step)
    log, saved = runtime.MetricsLog(run.home, to_dict(run.condition.cfg), start_step=step), time.monotonic()
    while step < run.steps:
        means = _step(run, step, model, optimisers, average, batches)
        step += 1
        bar.update(1)
        bar.set_postfix_str(f"{run.condition.name} seed {run.seed} loss {means['loss']:.2f}", refresh=False)
        if step % 10 == 0 or step == run.steps:
            log.log(step, **means)
        if step in run.checks or step == run.steps:
            with average.applied():
                run.found[step] = run.judge(model.eval())
            model.train()
        if time.monotonic() - saved > run.training.save_seconds:
            _save(run, step, model, optimisers, average, batches)
            saved = time.monotonic()
    log.close()
    with average.applied():
        save_training(run.home / "weights.pt", kind=KIND, config=to_dict(run.condition.cfg), model=model.state_dict())
    save_result(done, run.found)
    for name in ("last.pt", "found.npz"):
        (run.home / name).unlink(missing_ok=True)
    return run.found


def _step(run: Run, step: int, model: CSM, optimisers: list, average: Average, batches) -> dict[str, float]:
    batch, history = batches.next_batch()
    means = gradients(model, batch, history, torch.Generator().manual_seed(run.seed * 1_000_003 + step))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    factor = runtime.cosine_lr(step, run.steps, run.training.warmup_steps, run.training.min_lr_ratio)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = factor * group["base_lr"]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    average.update()
    return means


def _save(run: Run, step: int, model, optimisers, average, batches) -> None:
    kept = average.state()
    save_training(run.home / "last.pt", kind=KIND, config=to_dict(run.condition.cfg), model=model.state_dict(), optimizer=[o.state_dict() for o in optimisers],
                  ema=kept["weights"], ema_count=kept["count"], step=step, loader=batches.state_dict())
    save_result(run.home / "found.npz", run.found)


def _resume(run: Run, model, optimisers, average, batches) -> int:
    """Go on from last.pt where there is one; returns the step."""
    path = run.home / "last.pt"
    if not path.exists():
        return 0
    saved = load_training(path, KIND)
    model.load_state_dict(saved["model"])
    for optimiser, state in zip(optimisers, saved["optimizer"]):
        optimiser.load_state_dict(state)
    average.load(saved["ema"], saved["ema_count"])
    batches.load_state_dict(saved["loader"])
    if (run.home / "found.npz").exists():
        run.found = {step: table for step, table in read_result(run.home / "found.npz").items() if step <= saved["step"]}
    return saved["step"]


def train_all(runs: list[Run]) -> list[dict]:
    """Every run in turn behind one bar with its ETA; a line of each in outputs/experiments/NAME/log.txt as it ends."""
    results = []
    with tqdm(total=sum(r.steps for r in runs), unit="step", desc="training", smoothing=0.05) as bar:
        for run in runs:
            start = time.monotonic()
            results.append(train_run(run, bar))
            last = results[-1][max(results[-1])]
            nats = float(np.average(last["nats"].reshape(len(last["frames"]), -1).sum(1), weights=last["frames"])) if "frames" in last else float("nan")
            with open(run.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {run.home.name}: {run.steps} steps, {time.monotonic() - start:.0f} s, {nats:.3f} nats per frame held out\n")
    return results


# ----------------------------------------------------------------------------- tables of results

def matrix(results: list[dict], pick: Callable[[np.ndarray], np.ndarray] = lambda nats: nats.sum(-1)) -> tuple[np.ndarray, np.ndarray]:
    """Final tables of S seeds -> pick(nats (C, K)) as (S, C), frames (C,). All were judged on the same conversations."""
    tables = [r[max(r)] for r in results]
    names = [list(t["names"]) for t in tables]
    if any(n != names[0] for n in names):
        raise ValueError("the runs were judged on other conversations: delete their folders below --output and run again")
    return np.stack([pick(np.asarray(t["nats"])) for t in tables]), np.asarray(tables[0]["frames"])
