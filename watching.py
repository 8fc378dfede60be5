"""What a person sees and hears of a training while it runs: samples of the model's own speech, a short evaluation, gates, a picture.

train.py asks at its evaluations. Nothing here may stop a training or change what it computes: whatever fails is one line on stderr, and
random numbers, weights and threads are afterwards as they were. Files lie under the output folder, so that nobody needs an account:

    samples/step_000250/1.wav, 1.png, ..., samples.json      what was said, its spectrogram, and the words that were asked for
    metrics.jsonl                                            lines of kind "evaluation": `evaluation/<score>`, null where nothing was scored
"""
from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import lora
import parallel
import runtime
from additions import CrossAttention, HearProsody, ReadMemory
from config import SamplingConfig, TrainConfig

LINES = ("Hello, how are you today?", "I am so sorry to hear that.", "The bus leaves at seven, so please do not be late.")    # where no text is held out
LINE_WORDS = (4, 14)            # length of a held-out line that is spoken
SECONDS, TURNS = 10.0, 6        # a turn is cut off here (an untrained model does not end); turns of a conversation that are scored
SCORES = ("character", "voice", "mood", "prosody", "flow", "words", "sound", "wer")


def note(text: str) -> None:
    tqdm.write(f"note: {text}", file=sys.stderr)


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ----------------------------------------------------------------------------- the additions

@torch.no_grad()
def additions_now(model: nn.Module) -> dict[str, float]:
    """`gate/MODULE` (mean of an addition's gate; 0: shut) and `decay/MODULE[/BANK]` (mean rate per turn at which memories and heard voices fade).

    Every rank that holds a share of the model must ask.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CrossAttention):
            found[f"gate/{name}"] = parallel.full(module.gate).float().mean()
        if isinstance(module, HearProsody):
            found[f"decay/{name}"] = nn.functional.softplus(parallel.full(module.decay).float()).mean()
        if isinstance(module, ReadMemory):
            rates = nn.functional.softplus(parallel.full(module.decay).float()).mean(1)
            found |= {f"decay/{name}/{bank}": rate for bank, rate in zip(("semantic", "prosodic"), rates)}
    return dict(zip(found, torch.stack(list(found.values())).tolist())) if found else {}


# ----------------------------------------------------------------------------- what is to be said

def held_out_lines(conversations: list, count: int) -> list[str]:
    """`count` texts of the validation split (lists of dataset_pipeline.Turn), the same ones in every run on this data; LINES where there is none."""
    texts = sorted({turn.text for turns in conversations for turn in turns if LINE_WORDS[0] <= len(turn.text.split()) <= LINE_WORDS[1]})
    return random.Random(0).sample(texts, min(count, len(texts))) or list(LINES[:count])


def held_out_plans(data: str, count: int) -> list:
    """`count` conversations (demo.Conversation) of the validation splits of the data folders, their first TURNS turns after an opening."""
    from dataclasses import replace

    import evaluation_run
    import validity
    from dataset_pipeline import data_folders
    plans = []
    for folder in data_folders(data):
        if len(plans) < count and (Path(folder) / "manifests" / "validation").is_dir():
            found = filter(None, map(evaluation_run.plan_natural, validity.each_talk(folder, "validation")))
            plans += [replace(plan, turns=plan.turns[:TURNS]) for plan, _ in _first(found, count - len(plans))]
    if not plans:
        raise ValueError(f"no conversation with an opening is held out in {data}")
    return plans


def _first(found, count: int) -> list:
    return [item for item, _ in zip(found, range(count))]


# ----------------------------------------------------------------------------- the watcher

class Watcher:
    """Lets a model in training speak, draws and scores what it says; for the first rank."""

    def __init__(self, cfg: TrainConfig, model: nn.Module, average, tokenizer, codec_fingerprint: str, held_out: list):
        """average: train.Average, whose weights speak. held_out: conversations of the validation split, for their lines."""
        self.cfg, self.model, self.average, self.tokenizer, self.codec_fingerprint = cfg, model, average, tokenizer, codec_fingerprint
        self.lines = held_out_lines(held_out, cfg.samples)
        self._lab, self._plans, self._said = None, None, set()

    @property
    def lab(self):
        """demo.Lab around the model. ValueError where the codec is missing or is not that of the data."""
        if self._lab is None:
            import demo
            from checkpoint import check_codec, find, load_codec
            if not find(self.cfg.codec).exists():
                raise ValueError(f"there is no codec {self.cfg.codec}: use --codec")
            codec = load_codec(self.cfg.codec)
            check_codec(self.cfg.data, self.codec_fingerprint, codec.fingerprint)
            device = next(self.model.parameters()).device
            voices = [] if self.cfg.lora else demo.shipped_voices(runtime.ROOT / "pretrained" / "voices")
            self._lab = demo.Lab.around(self.model, codec.to(device), self.tokenizer, SamplingConfig(max_seconds=SECONDS), voices)
        return self._lab

    @contextlib.contextmanager
    def speaking(self):
        """Inside, the averaged weights speak."""
        self.model.eval()
        try:
            with self.average.applied(), lora.settled(self.model), torch.inference_mode():
                yield self.lab
        finally:
            self.model.train()

    def look(self, step: int, log, sample: bool, score: bool) -> None:
        """Samples and scores where they are wanted, into files and `log` (runtime.MetricsLog)."""
        if sample and self.cfg.samples:
            self._try("samples", lambda: self._show_samples(step, log))
        if score and self.cfg.scored:
            found = self._try("scores", self.scores) or {}
            log.log(step, kind="evaluation", **{f"evaluation/{name}": found.get(name) for name in (*SCORES, "conversations", "seconds")})
            if found:
                tqdm.write(f"step {step}: evaluation " + "  ".join(f"{name} {found[name]:.2f}" for name in SCORES if found[name] is not None) + f"  ({runtime.human_time(found['seconds'])})")

    def _try(self, what: str, act):
        """What act() returns; None where it failed, which is said."""
        try:
            with runtime.undisturbed():
                _ = self.lab                                 # its weights must not be loaded inside inference mode
                return act()
        except Exception as error:                           # listening in must not end a training
            if (said := f"no {what} ({reason(error)}); training goes on") not in self._said:
                note(said)
            self._said.add(said)
            return None

    # ---- samples

    def _show_samples(self, step: int, log) -> None:
        folder = self.write_samples(step)
        for row in json.loads((folder / "samples.json").read_text(encoding="utf-8")):
            log.show(step, folder / row["audio"], folder / row["picture"], row["text"])

    def write_samples(self, step: int) -> Path:
        """Speak the held-out lines, one alone, into the folder samples/step_NNNNNN, which is returned."""
        from audio_io import write_audio
        from dialogue import RATE
        from report import spectrogram_png
        folder, rows = Path(self.cfg.output) / "samples" / f"step_{step:06d}", []
        folder.mkdir(parents=True, exist_ok=True)
        for number, (text, spoken) in enumerate(zip(self.lines, self.speak_lines()), 1):
            rows.append({"text": text, "audio": f"{number}.wav", "picture": f"{number}.png", "seconds": len(spoken.audio) / RATE, "ended": spoken.ended})
            write_audio(folder / rows[-1]["audio"], spoken.audio)
            runtime.atomic_write(folder / rows[-1]["picture"], lambda file, audio=spoken.audio: file.write(spectrogram_png(audio, RATE)))
        runtime.write_json(folder / "samples.json", rows)
        return folder

    def speak_lines(self) -> list:
        """A demo.Spoken per line, each in a session of its own and in the next of the shipped voices."""
        from demo import Conversation, PlannedTurn
        spoken = []
        with self.speaking() as lab:
            voices = list(lab.voices)
            for number, text in enumerate(self.lines):
                turn = number % max(1, len(voices))
                lab.voices = voices[turn:] + voices[:turn]
                spoken += lab.converse(Conversation(f"line {number + 1}", [PlannedTurn("speaker", text)]))
            lab.voices = voices
        return spoken

    # ---- scores

    def scores(self) -> dict[str, float | None]:
        """Means over held-out conversations of the scores of conversation_metrics.py, and the word error rate; None for what cannot be judged."""
        import conversation_metrics as metrics
        import evaluation_run
        import judges
        import prosody
        import validity
        began, models = time.monotonic(), prosody.load_models()
        self._plans = self._plans or held_out_plans(self.cfg.data, self.cfg.scored)
        with self.speaking() as lab:
            talks = [evaluation_run.spoken_talk(plan, *evaluation_run.spoken_by(lab, plan)) for plan in self._plans]
        measured = [[metrics.measure_turn(turn, validity.natural_rendering(turn.text)) for turn in talk.turns] for talk in talks]
        found = metrics.summary([metrics.score(talk, rows, models) for talk, rows in zip(talks, measured)])
        pairs = [(turn.text, row["heard"] or "") for talk, rows in zip(talks, measured) for turn, row in zip(talk.turns, rows)]
        return {name: s["mean"] for name, s in found.items()} | {"wer": judges.word_error_rate(*map(list, zip(*pairs)))["wer"], "conversations": len(talks), "seconds": time.monotonic() - began}


# ----------------------------------------------------------------------------- picture

def plot_losses(folder: Path) -> Path | None:
    """metrics.jsonl -> loss.png; None where there is nothing to draw or no matplotlib."""
    lines = runtime.read_metrics(folder / "metrics.jsonl")
    train, held = ([m for m in lines if m.get("kind") == kind] for kind in ("train", "validation"))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not train:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in ("c0", "depth", "text", "advance", "phones"):
        if any(m.get(name) is not None for m in train):
            line, = axes.plot([m["step"] for m in train], [m.get(name) for m in train], label=name, alpha=0.6)
            axes.plot([m["step"] for m in held], [m.get(f"validation_{name}") for m in held], "o--", color=line.get_color(), label=f"{name} (validation)")
    axes.set(xlabel="step", ylabel="nats per target", title="Loss")
    axes.legend(ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    runtime.atomic_write(folder / "loss.png", lambda file: figure.savefig(file, format="png", dpi=110))
    return folder / "loss.png"
