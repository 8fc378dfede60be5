"""H1: voice tokens carry meaning: words and phones can be told from the semantic codebooks, and not as well from the acoustic ones.

    python experiments/h1_semantic_codes.py                      minutes per seed on one core

Frozen codes, trained probes, held-out characters and texts (validation and test splits; no character is in two splits).
Labels are the synthesiser's own times: the phone of each 20 ms (four per frame of 80 ms), and the words (the --words most
frequent ones of training, each with the frames it spans).
Codebooks: 1-10 (semantic), 11-32 (acoustic), all; at equal information budgets the first k of either side, k = 1, 3, 10
(k codes of 1024 are k x 10 bits at most; the entropy that is really used is measured); and 1-10 with labels shuffled between
turns, which is what the probes can reach without information.
Probes: linear (one frame, or the first, middle and last third of a word) and recurrent (a two-way GRU over the whole turn, or
over the word). Inputs are the codec's own vectors, summed over the codebooks of the group and standardised; and, so that the
codec's two spaces of other width decide nothing, the same linear probe on the bare codes (a learned table per codebook).
Measures: accuracy, and usable information in bits: entropy of the labels in training minus cross-entropy of the probe.

Decision rule, written before the first run. Effect: accuracy of 1-10 minus accuracy of 11-32, in points, for phones and for
words, with both probes; more is better for H1. Smallest effect worth having: 5 points. The 95 % bootstrap interval is over
probe seeds and held-out conversations (verdicts.py).
  supported: in all four the whole interval lies above 5 points and every seed is above 0, at equal budgets (10 against 10)
             as well, and shuffled labels are within 2 points of always saying the most frequent label
  refuted:   in one of the four the whole interval lies below 5 points
  undecided: else; the section then says how many seeds or conversations would decide
Chance: always the most frequent label of training. What H1 cannot say: these codebooks were trained with phone labels
(`CodecConfig.teacher`), so it is whether that worked on voices and texts it did not see, not whether it came by itself.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import PHONES, Parser                                   # noqa: E402
from experiments.settings import add_common_flags, check_seeds      # noqa: E402

NAME = "h1_semantic_codes"
SMALLEST = 0.05
CHANCE_MARGIN = 0.02             # shuffled labels may be so far above the most frequent label
SLOTS = 4                        # phone labels of a frame


@dataclass(frozen=True)
class Probes:
    """How the probes are trained."""
    train_turns: int = 1500
    test_turns: int = 0              # 0: all
    words: int = 200                 # most frequent words that are told apart
    linear_steps: int = 300
    recurrent_steps: int = 300
    width: int = 64                  # of the GRU, each way
    frames_per_step: int = 2048
    lr: float = 3e-3

    def __post_init__(self):
        for flag in ("train_turns", "linear_steps", "recurrent_steps", "width", "frames_per_step"):
            if getattr(self, flag) < 1:
                raise ValueError(f"{flag} {getattr(self, flag)} must be positive: change --{flag}")
        if self.words < 2:
            raise ValueError(f"words {self.words} must be at least 2: change --words")


def build_parser() -> Parser:
    import config
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/synthetic", help="folder of collect_data.py with tokens; default data/synthetic")
    parser.add_argument("--codec", default="pretrained/codec", help="default pretrained/codec")
    config.add_flags(parser, Probes)
    parser.add_argument("--deciding", action="store_true", help="run only the probes that the decision rule asks for")
    add_common_flags(parser)
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import collections               # noqa: E402
import hashlib                   # noqa: E402
import json                      # noqa: E402
import random                    # noqa: E402
import time                      # noqa: E402

import numpy as np               # noqa: E402
import torch                     # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn     # noqa: E402
from tqdm import tqdm            # noqa: E402

import runtime                   # noqa: E402
from config import from_flags    # noqa: E402
from experiments import verdicts  # noqa: E402
from experiments.small_models import SPLITS, read_result, save_result  # noqa: E402
from measuring import show, table  # noqa: E402


# ----------------------------------------------------------------------------- turns with labels

@dataclass
class Labelled:
    """One turn: codes (K, T), phone of every slot (T, SLOTS), words [(text, first frame, end frame)], its conversation."""
    codes: Tensor
    phones: Tensor
    words: list[tuple[str, int, int]]
    conversation: str


def phone_slots(alignment: dict, frames: int, frame_seconds: float) -> Tensor:
    """(frames, SLOTS) long: phone at the middle of every slot; silence (0) after the end and for unknown symbols."""
    times = (np.arange(frames * SLOTS) + 0.5) * frame_seconds / SLOTS
    symbols = np.array([max(0, PHONES.find(p)) for p in alignment["phones"]] + [0])
    index = np.searchsorted(np.asarray(alignment["ends"]), times, side="right")
    return torch.from_numpy(symbols[np.minimum(index, len(symbols) - 1)]).view(frames, SLOTS)


def word_spans(text: str, alignment: dict, frames: int, frame_seconds: float) -> list[tuple[str, int, int]]:
    """Words with the frames that they touch; at least one each."""
    raw, spans = text.encode("utf-8"), []
    for begin, end, start_s, end_s in alignment["words"]:
        first = min(frames - 1, int(start_s / frame_seconds))
        spans.append((raw[begin:end].decode("utf-8", "ignore").lower().strip(".,!?;:'\""), first, min(frames, max(first + 1, int(np.ceil(end_s / frame_seconds))))))
    return [s for s in spans if s[0]]


def labelled_turns(data: str, codec, split: str, count: int, seed: int) -> list[Labelled]:
    """Up to `count` (0: all) turns of a split that have phone and word times, in an order that depends on the seed alone."""
    from dataset_pipeline import read_supervisions, read_turns
    from text_tokenizer import ByteTokenizer
    times = {s["id"]: (s["recording_id"], s["text"], s["custom"].get("alignment") or {}) for turns in read_supervisions(Path(data), split).values() for s in turns}
    turns = [t for conversation in read_turns(data, split, ByteTokenizer(), codec.fingerprint) for t in conversation if times.get(t.id, (0, 0, {}))[2].get("ends")]
    random.Random(seed).shuffle(turns)
    found, seconds = [], 1 / codec.cfg.frame_rate
    for turn in turns[:count or None]:
        conversation, text, alignment = times[turn.id]
        frames = turn.codes.shape[1]
        found.append(Labelled(turn.codes.long(), phone_slots(alignment, frames, seconds), word_spans(text, alignment, frames, seconds), conversation))
    if not found:
        raise ValueError(f"the {split} split of {data} has no turn with phone times: collect synthetic data (python collect_data.py --output {data})")
    return found


def groups_of(codec_cfg) -> dict[str, tuple[int, int]]:
    """Name -> (codebooks from the semantic front, from the acoustic front)."""
    s, a = codec_cfg.num_semantic, codec_cfg.num_codebooks - codec_cfg.num_semantic
    groups = {"semantic": (s, 0), "acoustic": (0, a), "all": (s, a), "shuffled labels": (s, 0)}
    for k in (1, 3, 10):
        if k <= min(s, a):
            groups[f"semantic {k}"], groups[f"acoustic {k}"] = (k, 0), (0, k)
    equal = min(10, s, a)
    return groups | {f"semantic {equal}": (equal, 0), f"acoustic {equal}": (0, equal)}


def columns_of(group: tuple[int, int], codec_cfg) -> list[int]:
    s, a = group
    return [*range(s), *range(codec_cfg.num_semantic, codec_cfg.num_semantic + a)]


@torch.inference_mode()
def vectors_of(codec, turns: list[Labelled], group: tuple[int, int]) -> list[Tensor]:
    """Quantised sums of the group's codebooks, (T, d) of every turn; both sides one beside the other."""
    s, a, split = *group, codec.cfg.num_semantic
    found = []
    for turn in turns:
        codes = turn.codes[None]
        sides = ([codec.semantic.decode(codes[:, :s])[0]] if s else []) + ([codec.acoustic.decode(codes[:, split:split + a])[0]] if a else [])
        found.append(torch.cat(sides, -1).clone())
    return found


# ----------------------------------------------------------------------------- tasks: sequences and labels

@dataclass
class Task:
    """Sequences (T, d) with one label row each step (phones) or one label (words). owner: conversation of each sequence."""
    inputs: list[Tensor]
    labels: list[Tensor]
    owner: list[str]
    classes: int


def phone_task(vectors: list[Tensor], turns: list[Labelled]) -> Task:
    return Task(vectors, [t.phones for t in turns], [t.conversation for t in turns], len(PHONES))


def frequent_words(turns: list[Labelled], count: int) -> dict[str, int]:
    counts = collections.Counter(w for t in turns for w, _, _ in t.words)
    return {w: i for i, (w, _) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count])}


def word_task(vectors: list[Tensor], turns: list[Labelled], index: dict[str, int]) -> Task:
    found = [(v[a:b], torch.tensor(index[w]), t.conversation) for v, t in zip(vectors, turns) for w, a, b in t.words if w in index]
    if not found:
        raise ValueError(f"none of the {len(index)} most frequent words is in these {len(turns)} turns: raise --words, --train_turns or --test_turns")
    inputs, labels, owner = map(list, zip(*found))
    return Task(inputs, labels, owner, len(index))


def shuffled(task: Task, seed: int) -> Task:
    """Labels of another sequence, repeated or cut to its length."""
    order = np.random.default_rng(seed).permutation(len(task.labels))
    labels = list(task.labels)
    for i, j in zip(order, np.roll(order, 1)):                                 # never its own
        wrong, n = task.labels[j], len(task.inputs[i])
        labels[i] = wrong if wrong.dim() == 0 else wrong.repeat(-(-n // len(wrong)), 1)[:n]
    return Task(task.inputs, labels, task.owner, task.classes)


def thirds(x: Tensor) -> Tensor:
    """(T, d) -> (3 d,): means over the first, middle and last third of the frames."""
    edges = [0, -(-len(x) // 3), -(-2 * len(x) // 3), len(x)]
    return torch.cat([x[min(a, len(x) - 1):max(b, a + 1)].mean(0) for a, b in zip(edges, edges[1:])])


# ----------------------------------------------------------------------------- probes

class Recurrent(nn.Module):
    """Two-way GRU; a label at every step (phones) or from the mean over the steps (words)."""

    def __init__(self, inputs: int, width: int, classes: int, every_step: bool):
        super().__init__()
        self.every_step, self.classes = every_step, classes
        self.mix = nn.GRU(inputs, width, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, classes * (SLOTS if every_step else 1))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (B, T, d), lengths (B,) -> (B, T, SLOTS, classes) or (B, classes)."""
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.mix(packed)[0], batch_first=True)
        if self.every_step:
            return self.out(h).view(*h.shape[:2], SLOTS, self.classes)
        return self.out(h.sum(1) / lengths.unsqueeze(1))


class Tables(nn.Module):
    """Linear in the bare codes: one learned row per code and codebook, summed. Codes (n, K) -> (n, outputs)."""

    def __init__(self, codebooks: int, size: int, outputs: int):
        super().__init__()
        self.table = nn.EmbeddingBag(codebooks * size, outputs, mode="sum")
        nn.init.zeros_(self.table.weight)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("shift", torch.arange(codebooks) * size)

    def forward(self, codes: Tensor) -> Tensor:
        return self.table(codes + self.shift) + self.bias


def optimise(model: nn.Module, batches, steps: int, lr: float, loss_of) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=max(0.1, 2 / max(3, steps)))
    for batch in batches:
        loss = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def rows_of(task: Task) -> tuple[Tensor, Tensor, list[str]]:
    """What a linear probe sees: inputs (n, d), labels (n, slots), conversation of each row."""
    if task.labels[0].dim() == 0:
        return torch.stack([thirds(x) for x in task.inputs]), torch.stack(task.labels).unsqueeze(1), task.owner
    return torch.cat(task.inputs), torch.cat(task.labels), [o for o, x in zip(task.owner, task.inputs) for _ in range(len(x))]


def linear_probe(train: Task, test: Task, settings: Probes, seed: int, tables: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Logits (n, slots, classes) and labels (n, slots) of the test rows, and their conversations. tables: (codebooks, size) where inputs are bare codes."""
    torch.manual_seed(seed)
    x, y, _ = rows_of(train)
    outputs = y.shape[1] * train.classes
    model = Tables(*tables, outputs) if tables else nn.Linear(x.shape[1], outputs)
    generator = torch.Generator().manual_seed(seed)
    picks = (torch.randint(len(x), (settings.frames_per_step,), generator=generator) for _ in range(settings.linear_steps))
    optimise(model, ((x[i], y[i]) for i in picks), settings.linear_steps, 10 * settings.lr,
             lambda m, a, b: F.cross_entropy(m(a).view(-1, train.classes), b.flatten()))
    x, y, owner = rows_of(test)
    with torch.inference_mode():
        return model(x).view(len(x), y.shape[1], train.classes), y, owner


def padded(task: Task, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, d), lengths (B,), labels (B, T, slots) with -100 beyond the end, or (B,)."""
    pad = nn.utils.rnn.pad_sequence
    labels = [task.labels[i] for i in chosen]
    y = torch.stack(labels) if labels[0].dim() == 0 else pad(labels, batch_first=True, padding_value=-100)
    return pad([task.inputs[i] for i in chosen], batch_first=True), torch.tensor([len(task.inputs[i]) for i in chosen]), y


def draws(task: Task, frames: int, steps: int, seed: int):
    """Batches of sequences that hold about `frames` frames together."""
    generator, mean = torch.Generator().manual_seed(seed), max(1.0, float(np.mean([len(x) for x in task.inputs])))
    size = max(2, round(frames / mean))
    for _ in range(steps):
        yield padded(task, torch.randint(len(task.inputs), (size,), generator=generator).tolist())


def recurrent_probe(train: Task, test: Task, settings: Probes, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """As linear_probe, from whole sequences."""
    torch.manual_seed(seed)
    phones = train.labels[0].dim() > 0
    model = Recurrent(train.inputs[0].shape[1], settings.width, train.classes, phones)
    optimise(model, draws(train, settings.frames_per_step, settings.recurrent_steps, seed), settings.recurrent_steps, settings.lr,
             lambda m, x, n, y: F.cross_entropy(m(x, n).flatten(0, -2), y.flatten(), ignore_index=-100))
    logits, labels, owner = [], [], []
    order = sorted(range(len(test.inputs)), key=lambda i: len(test.inputs[i]))
    with torch.inference_mode():
        for first in range(0, len(order), 64):
            chosen = order[first:first + 64]
            x, n, y = padded(test, chosen)
            out = model(x, n)
            for row, i in enumerate(chosen):
                logits.append(out[row, :n[row]] if phones else out[row].view(1, 1, -1))
                labels.append(y[row, :n[row]] if phones else y[row].view(1, 1))
                owner += [test.owner[i]] * len(labels[-1])
    return torch.cat(logits), torch.cat(labels), owner


def score(logits: Tensor, labels: Tensor, owner: list[str]) -> dict:
    """Per conversation: accuracy, nats per label, labels; conversations in order of name."""
    hits = (logits.argmax(-1) == labels).float().mean(-1)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels).mean(-1)
    names = sorted(set(owner))
    index = torch.tensor([names.index(o) for o in owner])
    count = torch.bincount(index, minlength=len(names)).double()
    return {"names": names, "count": count.numpy(), **{k: (torch.zeros(len(names), dtype=torch.double).index_add_(0, index, v.double()) / count).numpy() for k, v in (("accuracy", hits), ("nats", nats))}}


# ----------------------------------------------------------------------------- all probes of one seed

class Bench:
    """Turns and codec, and the probes on them; results of each (task, group, probe, seed) are kept on disk."""

    def __init__(self, args, settings: Probes):
        from checkpoint import load_codec
        self.codec, self.settings, self.folder = load_codec(args.codec), settings, Path(args.output) / "h1"
        self.train = labelled_turns(args.data, self.codec, "train", settings.train_turns, 0)
        self.test = [t for split in SPLITS for t in labelled_turns(args.data, self.codec, split, settings.test_turns, 0)]
        self.words = frequent_words(self.train, settings.words)
        self.groups, self.deciding = groups_of(self.codec.cfg), args.deciding
        self.equal = max(int(g.split()[1]) for g in self.groups if g.split()[-1].isdigit())
        about = json.dumps([vars(settings), self.codec.fingerprint, [t.conversation for t in self.train[:50]], len(self.train), len(self.test)])
        self.key = hashlib.sha256(about.encode()).hexdigest()[:8]

    def jobs(self, seeds: list[int]) -> list[tuple]:
        """(seed, group, probe), those of the decision rule first; `bare` is the linear probe on codes, at equal budgets only."""
        whole, numbered = [g for g in self.groups if not g.split()[-1].isdigit()], [g for g in self.groups if g.split()[-1].isdigit()]
        equal = [f"{side} {self.equal}" for side in ("semantic", "acoustic")]
        first = [(g, p) for g in ("semantic", "acoustic", *equal, "shuffled labels") for p in ("linear", "recurrent")]
        rest = [(g, p) for g in whole for p in ("linear", "recurrent")] + [(g, p) for g in numbered for p in ("linear", "bare")]
        return [(seed, g, p) for chosen in ([first] if self.deciding else [first, rest]) for seed in seeds for g, p in chosen]

    def tasks(self, group: str, probe: str, seed: int) -> dict[str, tuple[Task, Task]]:
        """"phones" and "words" -> (training, test) of one group, standardised (bare codes are left as they are)."""
        if probe == "bare":
            columns = columns_of(self.groups[group], self.codec.cfg)
            vectors = [[t.codes[columns].T for t in turns] for turns in (self.train, self.test)]
        else:
            vectors = [vectors_of(self.codec, turns, self.groups[group]) for turns in (self.train, self.test)]
            flat = torch.cat(vectors[0])
            mean, scale = flat.mean(0), flat.std(0).clamp_min(1e-3)
            vectors = [[(v - mean) / scale for v in part] for part in vectors]
        made = {"phones": [phone_task(v, turns) for v, turns in zip(vectors, (self.train, self.test))]}
        if probe != "bare":
            made["words"] = [word_task(v, turns, self.words) for v, turns in zip(vectors, (self.train, self.test))]
        if group == "shuffled labels":
            made = {name: [shuffled(train, seed), test] for name, (train, test) in made.items()}
        return {name: tuple(pair) for name, pair in made.items()}

    def run(self, seed: int, group: str, probe: str) -> dict[str, dict]:
        """Task -> scores; trained now or read back. Groups of the same codebooks are run once."""
        if group != "shuffled labels":
            group = next(name for name, codebooks in self.groups.items() if codebooks == self.groups[group])
        path = self.folder / f"{group.replace(' ', '-')}-{probe}-seed{seed}-{self.key}.npz"
        if path.exists():
            kept = read_result(path)
            return {name: kept[i] for i, name in enumerate(("phones", "words")) if i in kept}
        start, found = time.monotonic(), {}
        tables = (sum(self.groups[group]), self.codec.cfg.codebook_size) if probe == "bare" else None
        for name, (train, test) in self.tasks(group, probe, seed).items():
            out = recurrent_probe(train, test, self.settings, seed) if probe == "recurrent" else linear_probe(train, test, self.settings, seed, tables)
            found[name] = score(*out)
        save_result(path, {("phones", "words").index(name): value for name, value in found.items()})
        said = ", ".join(f"{name} {np.average(v['accuracy'], weights=v['count']):.3f}" for name, v in found.items())
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {path.name}: {time.monotonic() - start:.0f} s, {said}\n")
        return found

    def chance(self) -> dict[str, dict]:
        """Task -> accuracy of the most frequent training label on the test turns, entropy of the training labels in nats."""
        phones = torch.bincount(torch.cat([t.phones for t in self.train]).flatten(), minlength=len(PHONES)).double()
        words = torch.zeros(len(self.words), dtype=torch.double)
        for t in self.train:
            for w, _, _ in t.words:
                if w in self.words:
                    words[self.words[w]] += 1
        truth = {"phones": torch.cat([t.phones for t in self.test]).flatten(), "words": torch.tensor([self.words[w] for t in self.test for w, _, _ in t.words if w in self.words])}
        out = {}
        for name, counts in (("phones", phones), ("words", words)):
            p = counts / counts.sum()
            out[name] = {"accuracy": float((truth[name] == int(counts.argmax())).double().mean()), "entropy_nats": float(-(p[p > 0] * p[p > 0].log()).sum())}
        return out

    def code_bits(self, group: str) -> float:
        """Entropy of the group's codes, each on its own, in bits per frame (k codes of 1024: 10 k at most)."""
        total = 0.0
        for k in columns_of(self.groups[group], self.codec.cfg):
            p = torch.bincount(torch.cat([t.codes[k] for t in self.train]), minlength=self.codec.cfg.codebook_size).double()
            p = p[p > 0] / p.sum()
            total -= float((p * p.log2()).sum())
        return total


# ----------------------------------------------------------------------------- report

def matrix_of(results: dict, seeds: list[int], group: str, probe: str, task: str, what: str = "accuracy") -> tuple[np.ndarray, np.ndarray]:
    """(S, C) and the labels of each conversation (C,)."""
    found = [results[seed, group, probe][task] for seed in seeds]
    return np.stack([f[what] for f in found]), np.asarray(found[0]["count"])


def effects(results: dict, seeds: list[int], equal: int) -> list[dict]:
    """Verdict rows: semantic minus acoustic, as they are and at equal budgets."""
    rows = []
    for a, b in (("semantic", "acoustic"), (f"semantic {equal}", f"acoustic {equal}")):
        for task in ("phones", "words"):
            for probe in ("linear", "recurrent"):
                one, count = matrix_of(results, seeds, a, probe, task)
                other, _ = matrix_of(results, seeds, b, probe, task)
                rows.append(verdicts.judge(f"{task}, {probe} probe: {a} - {b}", one - other, count, SMALLEST, "of accuracy"))
    return rows


def verdict(rows: list[dict], controls: dict, seeds: int) -> str:
    """As the decision rule says; shuffled labels that are above chance make it undecided."""
    main = verdicts.all_of([r["verdict"] for r in rows[:4]])
    if main == verdicts.SUPPORTED and (verdicts.all_of([r["verdict"] for r in rows[4:]]) != verdicts.SUPPORTED or not all(c["clean"] for c in controls.values())):
        return verdicts.UNDECIDED
    return main if seeds >= 3 else verdicts.UNDECIDED


def controls_of(results: dict, seeds: list[int], chance: dict) -> dict:
    found = {}
    for task in ("phones", "words"):
        for probe in ("linear", "recurrent"):
            values, count = matrix_of(results, seeds, "shuffled labels", probe, task)
            mean = float(np.average(values.mean(0), weights=count))
            found[f"{task}, {probe}"] = {"accuracy": mean, "chance": chance[task]["accuracy"], "clean": mean <= chance[task]["accuracy"] + CHANCE_MARGIN}
    return found


def summaries(bench: Bench, results: dict, seeds: list[int], chance: dict) -> dict:
    """(group, probe, task) joined with "/" -> accuracy with interval and usable bits."""
    found = {}
    for group, probe in dict.fromkeys((g, p) for _, g, p in results):
        for task in results[seeds[0], group, probe]:
            accuracy, count = matrix_of(results, seeds, group, probe, task)
            nats, _ = matrix_of(results, seeds, group, probe, task, "nats")
            bits = (chance[task]["entropy_nats"] - nats) / np.log(2)
            found[f"{group}/{probe}/{task}"] = {"accuracy": verdicts.effect(accuracy, count), "bits": verdicts.effect(bits, count)}
    return found


def draw(path: Path, found: dict, chance: dict, equal: int) -> str:
    drawing, axes = verdicts.figure(panels=2, width=12)
    for one, task in zip(axes, ("phones", "words")):
        for side, colour in (("semantic", "#c0504d"), ("acoustic", "#4f81bd")):
            ks = [k for k in dict.fromkeys((1, 3, equal)) if f"{side} {k}/linear/{task}" in found]
            values = [found[f"{side} {k}/linear/{task}"]["accuracy"] for k in ks]
            one.errorbar(ks, [v["mean"] for v in values], yerr=np.abs(np.array([[v["mean"] - v["low"], v["high"] - v["mean"]] for v in values]).T), fmt="o-", color=colour, capsize=3, label=f"first k of the {side}")
            for probe, style in (("linear", ":"), ("recurrent", "--")):
                one.axhline(found[f"{side}/{probe}/{task}"]["accuracy"]["mean"], color=colour, linestyle=style, linewidth=1, label=f"all {side}, {probe}")
        one.axhline(chance[task]["accuracy"], color="black", linewidth=1, label="chance")
        one.set(title=task, xlabel="codebooks k (k x 10 bits at most), linear probe", ylabel="accuracy on held-out characters", xlim=(0, equal + 1), ylim=(0, 1))
        one.legend(fontsize=7)
    return verdicts.save_picture(drawing, path)


def body_of(result: dict, rows: list[dict]) -> str:
    head = ["codebooks", "bits a frame", "phones, linear", "phones, recurrent", "phones, bits", "words, linear", "words, recurrent"]
    found, lines = result["probes"], []

    def cell(group, probe, task, what="accuracy"):
        value = found.get(f"{group}/{probe}/{task}")
        return "-" if value is None else show(value[what], 2, what == "accuracy")
    for group, bits in result["code_bits"].items():
        if f"{group}/linear/phones" not in found:
            continue
        best = "recurrent" if f"{group}/recurrent/phones" in found else "linear"
        lines.append([group, f"{bits:.0f}", cell(group, "linear", "phones"), cell(group, "recurrent", "phones"), cell(group, best, "phones", "bits"), cell(group, "linear", "words"), cell(group, "recurrent", "words")])
    chance = result["chance"]
    lines.append(["chance", "-", show(chance["phones"]["accuracy"], 2, True), "", "0.00", show(chance["words"]["accuracy"], 2, True), ""])
    body = f"**H1 is {result['verdict']}**: {result['seeds']} seeds, {result['test_turns']} turns of {result['n_conversations']} conversations of held-out characters; probes learned from {result['train_turns']} turns.\n\n"
    body += table(head, lines) + "\n\n" + verdicts.verdict_table(rows)
    bare = ", ".join(f"{key.split('/')[0]} {show(value['accuracy'], 2, True)}" for key, value in found.items() if "/bare/" in key)
    bare = f"Phones, linear probe on bare codes: {bare}. " if bare else ""
    return body + (f"\n\n{bare}These codebooks were trained with phone labels: this says that it worked on unseen voices and texts."
                   f"\n\nDecision rule: `experiments/{NAME}.py`. Picture: `{result['picture']}`.")


@runtime.plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    bench, seeds, results = Bench(args, from_flags(Probes, args)), check_seeds(args), {}
    for seed, group, probe in tqdm(list(dict.fromkeys(bench.jobs(seeds))), desc="probes", unit="probe"):
        results[seed, group, probe] = bench.run(seed, group, probe)
    chance, equal = bench.chance(), bench.equal
    rows, controls = effects(results, seeds, equal), controls_of(results, seeds, chance)
    found = summaries(bench, results, seeds, chance)
    result = {"verdict": verdict(rows, controls, args.seeds), "seeds": args.seeds, "train_turns": len(bench.train), "test_turns": len(bench.test),
              "n_conversations": len({t.conversation for t in bench.test}), "chance": chance, "controls": controls, "effects": rows, "probes": found,
              "code_bits": {group: bench.code_bits(group) for group in bench.groups}, "picture": draw(Path(args.output) / "h1" / "h1.png", found, chance, equal)}
    return verdicts.publish(args, NAME, sys.argv[1:] if argv is None else list(argv), result, body_of(result, rows))


if __name__ == "__main__":
    sys.exit(main())
