"""Give a trained model an ear: words of what it hears, by CTC over its codes (ear.py). The rest of the model stays as it is.

    python train_ear.py --data data/synthetic --checkpoint pretrained/nano --output checkpoints/with_ear
    python train_ear.py --resume checkpoints/with_ear/last.pt

A turn is heard without its context, so this is much cheaper than train.py. Where the data knows when each letter was said (the
synthetic data does), the first part of the run is guided: the letters' own steps are targets beside CTC, which would else take
long to find them. Writes a whole model: demo.py, serve.py and benchmark.py take the folder as --checkpoint.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import config
import runtime

GUIDED = 0.4             # share of the run in which the letters' own steps are targets too, less and less
FASTEST = 25.0           # letters a second: a turn that says more has another text than its sound
SHOWN = 6                # held-out transcripts that are printed
EAR = config.EarConfig(enabled=True)


@dataclass(frozen=True)
class EarTraining:
    data: str = "data/synthetic"         # folder with tokens; several with commas between
    checkpoint: str = "pretrained/nano"  # model that gets the ear; one that has an ear learns on
    output: str = "checkpoints/with_ear"
    codec: str = "pretrained/codec"
    resume: str = ""
    max_steps: int = 3000
    batch_frames: int = 2000             # frames of a step, padding included
    lr: float = 2e-3                     # of embedding and head
    muon_lr: float = 0.02                # of the matrices
    warmup_steps: int = 100
    ema: float = 0.998
    drop_codes: float = 0.1              # share of codes that are not heard
    drop_frames: float = 0.06            # share of a turn's frames that are not heard, in stretches of up to 4
    eval_every: int = 500
    eval_turns: int = 200
    save_minutes: float = 3.0
    precision: str = "bf16"
    seed: int = 0
    device: str = "auto"
    wandb: str = "offline"

    def __post_init__(self):
        if self.max_steps < 1 or self.batch_frames < 1 or self.eval_every < 1 or self.eval_turns < 1:
            raise ValueError("--max_steps, --batch_frames, --eval_every and --eval_turns must be at least 1")
        if not (0 <= self.drop_codes < 1 and 0 <= self.drop_frames < 1):
            raise ValueError("--drop_codes and --drop_frames are shares: use 0 to below 1")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"--precision {self.precision}: use bf16 or fp32")


# ----------------------------------------------------------------------------- data

def path_of(letters: list[int], at: list[int], steps: int, upsample: int) -> list[int] | None:
    """letters at their frames -> (steps,) letter or 0 of each step; None where they do not fit.

    Letters of one frame lie spread over it; the same letter twice leaves a step between, as CTC reads it.
    """
    path, last = [0] * steps, -1
    for i, (letter, frame) in enumerate(zip(letters, at)):
        first = at.index(frame)
        together = at.count(frame)
        wanted = frame * upsample + int((i - first + 0.5) * upsample / together)
        last = max(wanted, last + 1 + (i > 0 and letter == letters[i - 1]))
        if last >= steps:
            return None
        path[last] = letter
    return path


def frames_of_letters(text: str, consumed, ear) -> list[int]:
    """Frame in which each letter that the ear spells is said; consumed (T,): bytes of the text said by the end of each frame."""
    import numpy as np
    ends, frames, byte, gap = np.asarray(consumed), [], 0, True
    for c in text.lower():
        if c in ear.letters and not (c == " " and gap):
            frames.append(min(int(np.searchsorted(ends, byte, side="right")), len(ends) - 1))
            gap = c == " "
        byte += len(c.encode("utf-8"))
    return frames


def example(turn, ear, offset: int) -> dict | None:
    """codes (K, T) as the model reads them, letters, path; None for a turn without words or with more than can be said in its time."""
    from text_tokenizer import normalise
    text = normalise(turn.text)
    letters, T = ear.spell(text), turn.codes.shape[1]
    repeats = sum(a == b for a, b in zip(letters, letters[1:]))
    if not letters or len(letters) + repeats > T * ear.upsample or T * ear.upsample > ear.rope.cfg.max_positions:
        return None
    path = None
    if turn.consumed is not None and text == turn.text:
        at = frames_of_letters(text, turn.consumed, ear)
        path = path_of(letters, at[:len(letters)], T * ear.upsample, ear.upsample) if len(at) >= len(letters) else None
    return {"codes": turn.codes.long() + offset, "letters": letters, "path": path, "text": text}


def examples(model, how: EarTraining, split: str) -> list[dict]:
    """ValueError where there is none."""
    from dataset_pipeline import read_index, read_turns
    from text_tokenizer import load_tokenizer
    cfg = model.cfg
    index, found, count = read_index(how.data), [], 0
    columns = config.codec_columns(cfg.num_codebooks, cfg.num_semantic, index.get("num_semantic", cfg.num_semantic))
    for turns in read_turns(how.data, split, load_tokenizer(cfg.tokenizer), model.codec_fingerprint):
        for turn in turns:
            count += 1
            found += [example(dataclasses.replace(turn, codes=turn.codes[columns]), model.ear, cfg.code_offset)]
    found = [e for e in found if e is not None]
    if not found:
        raise ValueError(f"none of the {count} turns of the {split} split of {how.data} has words that fit into its time: collect more, or name another --data")
    return found


def plan_epoch(lengths: list[int], batch_frames: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of turns of like length, in an order that seed and epoch decide."""
    import random
    rng = random.Random(seed * 1_000_003 + epoch)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), 2000):
        batch: list[int] = []
        for i in sorted(order[start:start + 2000], key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > batch_frames:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


class Batches:
    """Batch number n of an endless order; `at(n)` needs no history, so a resumed run goes on with the same ones."""

    def __init__(self, found: list[dict], how: EarTraining):
        self.found, self.how, self.lengths = found, how, [e["codes"].shape[1] for e in found]
        self.starts, self.epochs = [0], []

    def at(self, number: int) -> list[dict]:
        while number >= self.starts[-1]:
            self.epochs.append(plan_epoch(self.lengths, self.how.batch_frames, self.how.seed, len(self.epochs)))
            self.starts.append(self.starts[-1] + len(self.epochs[-1]))
        epoch = next(e for e in range(len(self.epochs)) if number < self.starts[e + 1])
        return [self.found[i] for i in self.epochs[epoch][number - self.starts[epoch]]]


def collate(batch: list[dict], upsample: int):
    """-> codes (B, K, T), lengths (B,), letters (n,), counts (B,), path (B, N) with -1 where it is not known."""
    import torch
    lengths = torch.tensor([e["codes"].shape[1] for e in batch])
    T = int(lengths.max())
    codes = torch.zeros(len(batch), batch[0]["codes"].shape[0], T, dtype=torch.long)
    path = torch.full((len(batch), T * upsample), -1)
    for row, e in enumerate(batch):
        codes[row, :, :lengths[row]] = e["codes"]
        if e["path"] is not None:
            path[row, :len(e["path"])] = torch.tensor(e["path"])
    return codes, lengths, torch.tensor([c for e in batch for c in e["letters"]]), torch.tensor([len(e["letters"]) for e in batch]), path


def heard(codes, how: EarTraining, generator):
    """(B, K, T) bool: which codes are heard in training."""
    import torch
    B, K, T = codes.shape
    keep = torch.rand(B, K, T, generator=generator) >= how.drop_codes
    begins = torch.rand(B, 1, T, generator=generator) < how.drop_frames / 2.5
    length = torch.randint(1, 5, (B, 1, T), generator=generator)
    for n in range(4):
        gone = torch.nn.functional.pad(begins & (length > n), (n, 0))[..., :T]
        keep &= ~gone
    return keep


# ----------------------------------------------------------------------------- the run

def give_ear(model, seed: int):
    """The model with an ear of random weights; the one it has, where it has one."""
    import torch
    from architecture import CSM
    if model.ear is None:
        larger = CSM(dataclasses.replace(model.cfg, ear=EAR))
        larger.init_weights(torch.Generator().manual_seed(seed))
        larger.load_state_dict(model.state_dict(), strict=False)
        larger.codec_fingerprint = model.codec_fingerprint
        model = larger.eval()
    model.ear.requires_grad_(True)
    return model


class Run:
    """Everything a step needs."""

    def __init__(self, how: EarTraining, saved: dict | None):
        import checkpoint
        import torch
        from train import Average, TrainConfig, build_optimisers
        self.how, self.device = how, runtime.pick_device(how.device)
        self.model = give_ear(checkpoint.load_model(how.checkpoint), how.seed)
        self.ear = self.model.ear.to(self.device).train()
        self.batches, self.held_out = Batches(examples(self.model, how, "train"), how), examples(self.model, how, "validation")
        self.optimisers = build_optimisers(self.ear, TrainConfig(lr=how.lr, muon_lr=how.muon_lr, weight_decay=0.02))
        self.average, self.step, self.minutes, self.validation = Average(self.ear, how.ema), 0, 0.0, {}
        if saved is not None:
            self.ear.load_state_dict(saved["model"])
            for optimiser, state in zip(self.optimisers, saved["optimizer"]):
                optimiser.load_state_dict(state)
            self.average.load(saved["ema"], saved["ema_count"])
            self.step, self.minutes, self.validation = saved["step"], saved["minutes"], saved["validation"]
        self.last_file = Path(how.output) / "last.pt"
        self.generator, self.interrupted = torch.Generator(), False

    def losses(self, batch: list[dict]) -> tuple:
        """CTC and the guided letters' loss, each in nats per letter."""
        import torch.nn.functional as F
        codes, lengths, letters, counts, path = (t.to(self.device) for t in collate(batch, self.ear.upsample))
        self.generator.manual_seed(self.how.seed * 1_000_003 + self.step)
        keep = heard(codes.cpu(), self.how, self.generator).to(self.device)
        with runtime.autocast(self.device, self.how.precision):
            logits = self.ear(codes, lengths, keep)
        logits, total = logits.float(), max(1, int(counts.sum()))
        ctc = F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), letters, lengths * self.ear.upsample, counts, reduction="sum", zero_infinity=True) / total
        guided = F.cross_entropy(logits.flatten(0, 1), path.flatten(), ignore_index=-1, reduction="sum") / max(1, int((path > 0).sum()))
        return ctc, guided

    def train_step(self) -> dict:
        import torch
        ctc, guided = self.losses(self.batches.at(self.step))
        guide = max(0.0, 1 - self.step / max(1, GUIDED * self.how.max_steps))
        loss = ctc + guide * guided
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"the loss of step {self.step} is not finite: go on from {self.last_file} with a lower --lr and --muon_lr, or --precision fp32")
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.ear.parameters(), 5.0))
        factor = runtime.cosine_lr(self.step, self.how.max_steps, self.how.warmup_steps, 0.02)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = factor * group["base_lr"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update()
        self.step += 1
        return {"ctc": float(ctc.detach()), "guided": float(guided.detach()), "grad_norm": norm, "lr": factor * self.how.lr}

    def validate(self) -> dict:
        """Word and letter error of held-out turns by the averaged weights, and some transcripts."""
        from judges import align_words, word_error_rate
        self.ear.eval()
        with self.average.applied():
            pairs = [(e["text"], self.ear.transcribe(e["codes"].to(self.device))) for e in self.held_out[:self.how.eval_turns]]
        self.ear.train()
        wrong = sum(op != "equal" for said, read in pairs for op, _, _ in align_words(list(said), list(read)))
        self.validation = {"word_error": word_error_rate(*zip(*pairs))["wer"], "letter_error": wrong / sum(len(said) for said, _ in pairs), "turns": len(pairs)}
        self.shown = pairs[:SHOWN]
        return self.validation

    def save(self) -> None:
        import checkpoint
        state = self.average.state()
        checkpoint.save_training(self.last_file, kind="ear", config=config.to_dict(self.model.cfg), model=self.ear.state_dict(), ema=state["weights"], ema_count=state["count"],
                                 optimizer=[o.state_dict() for o in self.optimisers], step=self.step, minutes=self.minutes, validation=self.validation,
                                 train_config=config.to_dict(self.how), codec_fingerprint=self.model.codec_fingerprint)

    def finish(self) -> None:
        """The whole model with the averaged ear, as a folder like the one it came from."""
        import checkpoint
        hours = sum(self.batches.lengths) / self.model.cfg.frame_rate / 3600
        before = checkpoint.about_model(self.how.checkpoint)
        about = ({"before": before["ear"]} if before.get("ear") else {}) | {"from": before.get("sha256"), "data": self.how.data, "hours": round(hours, 2), "steps": self.step, "minutes": round(self.minutes, 1), "validation": self.validation, "commit": runtime.git_commit()}
        with self.average.applied():
            checkpoint.save_pretrained(self.model, self.how.output, int8="int8" in before.get("storage", "int8"), ear=about,
                                       **{k: v for k, v in before.items() if k in ("step", "minutes", "validation", "precision")})


def train(how: EarTraining, saved: dict | None = None) -> Run:
    from tqdm import tqdm
    from train import stop_on_signals
    run = Run(how, saved)
    log = runtime.MetricsLog(how.output, config.to_dict(how) | runtime.run_manifest(), how.wandb, run.step)
    bar, began, kept = tqdm(total=how.max_steps, initial=run.step, desc="training the ear", unit="step"), time.monotonic() - 60 * run.minutes, run.minutes
    stop_on_signals(run)
    while run.step < how.max_steps and not run.interrupted:
        values = run.train_step()
        run.minutes = (time.monotonic() - began) / 60
        log.log(run.step, **values)
        bar.update()
        bar.set_postfix_str(f"ctc {values['ctc']:.3f}, word error {100 * run.validation.get('word_error', math.nan):.1f} %", refresh=False)
        if run.step % how.eval_every == 0 or run.step == how.max_steps:
            log.log(run.step, kind="validation", **run.validate())
            for text, read in run.shown:
                tqdm.write(f"  said {text!r}\n  read {read!r}", file=sys.stderr)
        if run.minutes - kept >= how.save_minutes or run.step == how.max_steps or run.interrupted:
            run.save()
            kept = run.minutes
    bar.close()
    log.close()
    if not run.interrupted:
        run.finish()
    return run


def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config.add_flags(parser, EarTraining)
    return parser


@runtime.plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    how, saved = config.from_flags(EarTraining, args), None
    if how.resume:
        import checkpoint
        saved = checkpoint.load_training(how.resume, "ear")
        how = dataclasses.replace(config.from_dict(EarTraining, saved["train_config"]), resume=how.resume, output=str(Path(how.resume).parent))
    run = train(how, saved)
    if run.interrupted:
        print(f"interrupted at step {run.step}: go on with --resume {run.last_file}", file=sys.stderr)
        return 130
    print(f"{how.output}: word error {100 * run.validation['word_error']:.1f} %, letter error {100 * run.validation['letter_error']:.1f} % on {run.validation['turns']} held-out turns")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
