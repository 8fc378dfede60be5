"""H2: remembering how things were said (prosodic memory) keeps a character coherent beyond the context window.

    python experiments/h2_prosodic_memory.py                     tens of minutes per seed on one core; interrupted, it goes on
    python experiments/h2_prosodic_memory.py --steps 0           the shipped model alone, nothing is trained

Where memory can matter: at the opening of a turn. Inside a turn the frames before tell who speaks and how; its first second
has nothing but what is remembered. So the window here is the turn alone, cut to its first --opening seconds, and all
earlier turns of the conversation, the speaker's own among them, live on as slots only (CSM.remember, as in talking).

Small models from scratch, equal parameters (the feed-forward of `off` is wider), the same turns in the same order:
  on         both slots of every earlier turn
  semantic   prosodic slots are zeros: what was said, not how
  shuffled   the slots of another conversation of the batch, in training and in judging
  off        no memory
  longer     no memory, and as many steps more as the arithmetic that `on` spends on earlier turns buys (as in h3)
and, without training, `exchanged`: the weights of `on`, judged with the slots of another conversation.
The shipped model (--checkpoint): the same conversations, a window of the turn and the one before it (the other speaker's),
four turns before that as slots; slots as they are, none, those of a stranger, and only the prosody or only the words of a
stranger. With --say it also speaks, and the judge compares the voice with the speaker's turn that has left the window.

Decision rule, written before the first run. Effect: held-out loss of a condition minus that of `on`, nats per frame summed
over the codebooks, over the openings of turns whose speaker has spoken before; more is better for H2. Smallest effect worth
having: 0.1 nats per frame. The 95 % bootstrap interval is over seeds and conversations (verdicts.py).
  supported: against off, shuffled and semantic the whole interval lies above 0.1 and every seed is above 0
  refuted:   against one of them the whole interval lies below 0.1 (how it was said adds nothing worth having)
  undecided: else; the section then says how many seeds or conversations would decide
`longer` and `exchanged` do not decide H2. The shipped model is judged by the same rule on its own rows (one set of weights, so its interval is over conversations).
Chance is `shuffled`: slots that are as rich, of somebody else.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Parser                                           # noqa: E402
from experiments.settings import Training, add_training_flags, check_seeds  # noqa: E402

NAME = "h2_prosodic_memory"
SMALLEST = 0.1                   # nats per frame, all codebooks together
NAMES = ("on", "semantic", "shuffled", "off", "longer")
DECIDING = ("off", "shuffled", "semantic")
BEFORE, WINDOW = 4, 2            # shipped model: turns as slots, turns as frames


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, steps=400)
    parser.set_defaults(max_context=0)
    parser.add_argument("--width", type=int, default=128, help="backbone of `on`; default 128")
    parser.add_argument("--layers", type=int, default=4, help="default 4")
    parser.add_argument("--codebooks", type=int, default=8, help="two of them semantic; default 8")
    parser.add_argument("--opening", type=float, default=1.0, help="seconds of a turn that are foretold; default 1")
    parser.add_argument("--conversations", type=int, default=3, help="conversations per training step, all their turns; default 3")
    parser.add_argument("--checkpoint", default="pretrained/nano", help="shipped model; empty: none; default pretrained/nano")
    parser.add_argument("--say", type=int, default=0, help="turns that the shipped model says under each kind of memory; default 0")
    parser.add_argument("--codec", default="pretrained/codec", help="for --say; default pretrained/codec")
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import dataclasses               # noqa: E402

import numpy as np               # noqa: E402
import torch                     # noqa: E402
from torch import Tensor         # noqa: E402
from tqdm import tqdm            # noqa: E402

import runtime                   # noqa: E402
from additions import Slots      # noqa: E402
from architecture import CSM, FrameBatch  # noqa: E402
from config import MemoryConfig, ModelConfig, from_flags  # noqa: E402
from dataset_pipeline import ConversationDataset, Turn, Window, collate  # noqa: E402
from experiments import small_models as small, verdicts  # noqa: E402
from measuring import show, table  # noqa: E402
from text_tokenizer import NUM_SPEAKERS  # noqa: E402


# ----------------------------------------------------------------------------- conversations as openings and slots

@dataclasses.dataclass
class Told:
    """What came before each opening: every turn of some conversations on its own row, and which rows each opening remembers."""
    rows: FrameBatch             # (R, S, K + 1): whole turns, numbered as in their conversation
    own: Tensor                  # (B, M) long: row of the j-th turn of the opening's conversation; -1: not before it
    other: Tensor                # (B, M) long: a row of another conversation instead, -1 at the same places


def numbered(batch: FrameBatch, numbers: list[int]) -> FrameBatch:
    """Each row's one turn gets its number in the conversation."""
    return dataclasses.replace(batch, turn=torch.where(batch.turn >= 0, torch.tensor(numbers).unsqueeze(1), -1))


def cut(turn: Turn, frames: int) -> Turn:
    return dataclasses.replace(turn, codes=turn.codes[:, :frames], consumed=None if turn.consumed is None else turn.consumed[:frames])


def openings(conversations: list[list[Turn]], cfg: ModelConfig, tokenizer, frames: int, tags: list[dict]) -> tuple[FrameBatch, Told, list[tuple[int, int]]]:
    """-> openings of all turns whose speaker has spoken before, the slots they may remember, (conversation, turn) of each row."""
    starts, told, rows, places = [], [], [], []
    for turns, tag in zip(conversations, tags):
        starts.append(len(told))
        told += [Window([t], tag, [False], [False]) for t in turns]
    for c, turns in enumerate(conversations):
        for t, turn in enumerate(turns):
            if any(earlier.speaker == turn.speaker for earlier in turns[:t]):
                rows.append(Window([cut(turn, frames)], tags[c], [False], [False]))
                places.append((c, t))
    most = max(t for _, t in places)
    own, other = torch.full((len(places), most), -1), torch.full((len(places), most), -1)
    for row, (c, t) in enumerate(places):
        stranger = (c + 1) % len(conversations)
        own[row, :t] = starts[c] + torch.arange(t)
        other[row, :t] = starts[stranger] + torch.arange(t) % len(conversations[stranger])
    batch = numbered(collate(rows, cfg, tokenizer)[0], [t for _, t in places])
    batch = dataclasses.replace(batch, audio_loss=batch.audio_loss & batch.frames[..., :-1].any(-1), phones=None)      # a cut turn does not end
    return batch, Told(numbered(collate(told, cfg, tokenizer)[0], [t for turns in conversations for t in range(len(turns))]), own, other), places


def remember(model: CSM, told: Told, kind: str) -> Slots | None:
    """Slots (B, M) of a memory that is "on", "semantic" (prosodic ones are zeros) or "shuffled" (another conversation's)."""
    if kind == "off":
        return None
    each = CSM.remember(model, told.rows)                                      # (R, 1, W)
    rows = (told.other if kind == "shuffled" else told.own).clamp(min=0)
    semantic, prosodic = (slots[:, 0][rows] for slots in (each.semantic, each.prosodic))
    turn = torch.where(told.own >= 0, torch.arange(told.own.shape[1]), -1)
    return Slots(semantic, torch.zeros_like(prosodic) if kind == "semantic" else prosodic, turn)


def keep(kind: str):
    """A change for small.Condition: what the model remembers of a Told."""
    def change(model: CSM) -> None:
        model.remember = lambda told: remember(model, told, kind)
    return change


def dialogues(training: Training, cfg: ModelConfig, split: str) -> tuple[list[list[Turn]], object]:
    """Conversations of two speakers and more than two turns, and the tokenizer."""
    data = ConversationDataset(training.data, cfg, split, training.batch_positions, 0)
    kept = [turns for turns in data.conversations if len(turns) > 2 and len({t.speaker for t in turns}) > 1]
    if len(kept) < 2:
        raise ValueError(f"the {split} split of {training.data} has {len(kept)} conversations of more than two turns, 2 are needed: collect more, or change --data")
    return kept, data.tokenizer


class Openings:
    """Training batches: all turns of a few conversations. The order depends on the seed alone."""

    def __init__(self, training: Training, cfg: ModelConfig, seed: int, frames: int, count: int):
        self.conversations, self.tokenizer = dialogues(training, cfg, "train")
        self.cfg, self.seed, self.frames, self.count, self.step = cfg, seed, frames, max(2, count), 0

    def next_batch(self) -> tuple[FrameBatch, Told]:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        self.step += 1
        chosen = [self.conversations[i] for i in torch.randperm(len(self.conversations), generator=g)[:self.count].tolist()]
        tags = [dict(enumerate(torch.randperm(NUM_SPEAKERS, generator=g).tolist())) for _ in chosen]
        batch, told, _ = openings(chosen, self.cfg, self.tokenizer, self.frames, tags)
        return batch, told

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


def held_out(training: Training, cfg: ModelConfig, frames: int, count: int = 4) -> list[tuple]:
    """(openings, Told, name of each row's conversation) of the held-out splits, a few conversations at a time."""
    groups = []
    for split in small.SPLITS:
        conversations, tokenizer = dialogues(training, cfg, split)
        conversations = conversations[:training.held_out or None]
        edges = [*range(0, max(1, len(conversations) - 1), count), len(conversations)]           # at least two in every group: each has a stranger
        for first, last in zip(edges, edges[1:]):
            part = conversations[first:last]
            batch, told, places = openings(part, cfg, tokenizer, frames, [{}] * len(part))
            groups.append((batch, told, [part[c][0].id.rsplit("-", 1)[0] for c, _ in places]))
    return groups


def judge_openings(model: CSM, groups: list[tuple], kind: str, frames: int) -> dict:
    """small.Sums.table with "by_frame" (frames, K) besides: mean nats of the first, second, ... frame of a turn."""
    sums, by_frame, counts = small.Sums(), np.zeros((frames, model.cfg.num_codebooks)), np.zeros(frames)
    model.eval()
    for batch, told, names in groups:
        with torch.no_grad(), runtime.autocast(torch.device("cpu"), "bf16"):
            slots = remember(model, told, kind)
        nats, rows, columns = small.frame_nats(model, batch, slots)
        sums.add([names[r] for r in rows.tolist()], nats)
        first = batch.audio_loss.int().argmax(1)                               # column of each row's first frame
        place = (columns - first[rows]).numpy()
        np.add.at(by_frame, place, nats.numpy())
        np.add.at(counts, place, 1)
    return sums.table() | {"by_frame": by_frame / np.maximum(counts, 1)[:, None]}


# ----------------------------------------------------------------------------- small models

def conditions(args) -> dict[str, small.Condition]:
    """Name -> condition, with the parameters of `on` within 1 %."""
    memory = MemoryConfig(every=2, heads=4, width=args.memory_width)

    def model(ffn, **changes):
        return small.base_config(args.width, args.layers, ffn, args.codebooks, 2, args.depth, args.audio_vocab, depth_fraction=1.0, **changes)
    made = {name: small.Condition(name, model(3 * args.width, memory=memory), keep(name)) for name in ("on", "semantic", "shuffled")}
    off = small.equal_parameters(lambda w, f: small.Condition("off", model(f), keep("off")), lambda c: c.parameters(), made["on"].parameters(), args.width, step=10 ** 6)
    return made | {"off": off, "longer": dataclasses.replace(off, name="longer")}


def train_small(args, training: Training) -> tuple[dict, dict, list]:
    """-> condition (and `exchanged`) -> tables of every seed; condition -> what was trained; held-out groups."""
    frames, folder, chosen, about, budget = frames_of(args), Path(args.output) / "h2", conditions(args), {}, None
    groups = held_out(training, chosen["on"].cfg, frames)
    plans = {}
    for name, condition in chosen.items():
        batches = Openings(training, condition.cfg, 12345, frames, args.conversations)
        cost = small.step_flops(condition, [batches.next_batch() for _ in range(args.count_batches)], training)
        budget = budget or cost * training.steps
        about[name] = {"parameters": condition.parameters(), "steps": max(1, round(budget / cost)) if name == "longer" else training.steps, "gflops_per_step": cost / 1e9}
        plans[name] = [run_of(condition, seed, about[name]["steps"], training, folder, args, groups) for seed in check_seeds(args)]
    order = [plans[name][seed] for seed in check_seeds(args) for name in plans]                  # a whole comparison after every seed
    found = dict(zip(map(id, order), small.train_all(order)))
    results = {name: [found[id(run)] for run in runs] for name, runs in plans.items()}
    results["exchanged"] = [{0: judge_openings(small.load_run(run), groups, "shuffled", frames)} for run in tqdm(plans["on"], desc="slots exchanged", unit="model")]
    return results, about, groups


def run_of(condition, seed, steps, training, folder, args, groups) -> small.Run:
    frames = frames_of(args)
    return small.Run(condition, seed, steps, training, folder, lambda: Openings(training, condition.cfg, seed, frames, args.conversations),
                     lambda model: judge_openings(model, groups, "off" if condition.name == "longer" else condition.name, frames), extra=(frames, args.conversations))


def frames_of(args) -> int:
    frames = round(args.opening * 12.5)
    if frames < 1:
        raise ValueError(f"--opening {args.opening}: use at least 0.08 seconds")
    return frames


# ----------------------------------------------------------------------------- the shipped model

def shipped_windows(data: str, model: CSM, limit: int) -> list[list[tuple[Window, str, dict]]]:
    """Packed windows of turns whose speaker's earlier turns have all left the window: (window with its history, conversation, where the turn is)."""
    from dataset_pipeline import pack
    found = {}
    for split in small.SPLITS:
        dataset = ConversationDataset(data, model.cfg, split, 4096, 0)
        conversations = [turns for turns in dataset.conversations if len(turns) > BEFORE + 1][:limit or None]
        for turns in conversations:
            for t in range(BEFORE + WINDOW - 1, len(turns)):
                first = t - WINDOW + 1
                speaker = turns[t].speaker
                if any(x.speaker == speaker for x in turns[first:t]) or not any(x.speaker == speaker for x in turns[first - BEFORE:first]):
                    continue
                window = Window(turns[first:t + 1], {}, [False] * WINDOW, [False] * WINDOW, turns[first - BEFORE:first])
                found[id(window)] = (window, turns[0].id.rsplit("-", 1)[0])
    if len({name for _, name in found.values()}) < 2:
        raise ValueError(f"the held-out splits of {data} have no two conversations of {BEFORE + WINDOW} turns or more, which the shipped model is judged on: "
                         "collect more, or leave it out with --checkpoint ''")
    packed = pack([w for w, _ in found.values()], 4096)
    return [[found[id(w)] for w in group] for group in packed]


def strangers(names: list[str]) -> list[int]:
    """For each row the next row of another conversation; itself where there is none."""
    n = len(names)
    return [next((j % n for j in range(i + 1, i + n) if names[j % n] != names[i]), i) for i in range(n)]


MEMORIES = {"on": (0, 0), "off": None, "a stranger's": (1, 1), "a stranger's prosody": (0, 1), "a stranger's words": (1, 0)}


def mixed(slots: Slots, others: list[int], kind) -> Slots | None:
    """Semantic and prosodic slots of oneself (0) or of the stranger (1)."""
    if kind is None:
        return None
    return Slots(slots.semantic[others] if kind[0] else slots.semantic, slots.prosodic[others] if kind[1] else slots.prosodic, slots.turn)


def judge_shipped(model: CSM, data: str, limit: int, frames: int) -> dict[str, dict]:
    """Memory -> table of conversations: nats over the first `frames` frames of the last turn. Rows without a stranger are left out."""
    from text_tokenizer import load_tokenizer
    tokenizer, sums = load_tokenizer(model.cfg.tokenizer), {name: small.Sums() for name in MEMORIES}
    for group in tqdm(shipped_windows(data, model, limit), desc="shipped model", unit="batch"):
        names = [name for _, name in group]
        others = strangers(names)
        batch, history = collate([w for w, _ in group], model.cfg, tokenizer)
        batch = small.last_turn_only(batch)
        first = batch.audio_loss.int().argmax(1, keepdim=True)
        judged = torch.arange(batch.S) < first + frames
        judged &= torch.tensor([j != i for i, j in enumerate(others)]).unsqueeze(1)
        batch = dataclasses.replace(batch, audio_loss=batch.audio_loss & judged)
        if not batch.audio_loss.any():
            continue
        with torch.no_grad(), runtime.autocast(torch.device("cpu"), "bf16"):
            slots = model.remember(history)
        for name, kind in MEMORIES.items():
            nats, rows, _ = small.frame_nats(model, batch, mixed(slots, others, kind))
            sums[name].add([names[r] for r in rows.tolist()], nats)
    return {name: s.table() for name, s in sums.items()}


def voices_of_shipped(model: CSM, args) -> dict[str, list[dict]]:
    """The shipped model says turns under each memory (no lead: what else would tell the voice); cosine to the speaker's turn that has left the window."""
    import judges
    from checkpoint import load_codec
    from config import SamplingConfig
    from dataset_pipeline import read_supervisions
    from generation import Turn as Spoken, stream_turn
    from measuring import sound_of
    from text_tokenizer import load_tokenizer
    codec, tokenizer = load_codec(args.codec), load_tokenizer(model.cfg.tokenizer)
    supervisions = {s["id"]: s for split in small.SPLITS for turns in read_supervisions(Path(args.data), split).values() for s in turns}
    pairs = [pair for group in shipped_windows(args.data, model, args.held_out) for pair in group]
    pairs = sorted(pairs, key=lambda p: p[0].turns[-1].id)[::max(1, len(pairs) // args.say)][:args.say]
    found: dict[str, list[dict]] = {}
    others = strangers([name for _, name in pairs])
    with torch.inference_mode():
        slots = [model.remember(collate([w], model.cfg, tokenizer)[1]) for w, _ in pairs]
        for number, (window, name) in enumerate(tqdm(pairs, desc="shipped model speaks", unit="turn")):
            target, before = window.turns[-1], [t for t in window.history if t.speaker == window.turns[-1].speaker][-1]
            reference = sound_of(args.data, supervisions[before.id])
            context = dataclasses.replace(collate([dataclasses.replace(window, turns=window.turns[:-1], listening=[False], moods=[False])], model.cfg, tokenizer)[0],
                                          audio_loss=None, text_loss=None, phones=None)
            for kind in ("on", "off", "a stranger's"):
                state = model.new_state(1)
                model(context, state=state, memory={"on": slots[number], "off": None, "a stranger's": slots[others[number]]}[kind])
                turn = Spoken(target.speaker, target.text, None)
                for _ in stream_turn(model, codec, tokenizer, state, turn, BEFORE + WINDOW - 1, SamplingConfig(max_seconds=8.0, lead_seconds=0.0),
                                     torch.Generator().manual_seed(number)):
                    pass
                found.setdefault(kind, []).append({"conversation": name, "voice": judges.speaker_similarity(turn.audio, reference)})
    return found


def shipped(args) -> dict | None:
    """Effects on the shipped model, and the voice of what it says."""
    if not args.checkpoint:
        return None
    from checkpoint import load_model
    from dataset_pipeline import read_index
    model = load_model(args.checkpoint, codec_fingerprint=read_index(args.data)["codec_fingerprint"]).eval()
    if model.memory_writer is None:
        raise ValueError(f"{args.checkpoint} has no memory: name other weights with --checkpoint, or none with --checkpoint ''")
    tables = judge_shipped(model, args.data, args.held_out, frames_of(args))
    base = tables["on"]
    rows = [verdicts.judge(f"shipped model, {name} - on", (t["nats"].sum(1) - base["nats"].sum(1))[None], base["frames"], SMALLEST, "nats per frame")
            for name, t in tables.items() if name != "on"]
    result = {"effects": rows, "nats": {name: float(np.average(t["nats"].sum(1), weights=t["frames"])) for name, t in tables.items()}, "n_conversations": len(base["names"]), "voice": None}
    if args.say:
        import judges
        said = voices_of_shipped(model, args)
        result["voice"] = {kind: judges.bootstrap_interval([r["voice"] for r in rows]) for kind, rows in said.items()}
        for kind in [k for k in said if k != "on"]:
            pairs = [(a["voice"], b["voice"]) for a, b in zip(said["on"], said[kind]) if a["voice"] is not None and b["voice"] is not None]
            result["voice"][f"on - {kind}"] = judges.bootstrap_interval([a - b for a, b in pairs])
    return result


# ----------------------------------------------------------------------------- report

def effects(results: dict[str, list[dict]]) -> list[dict]:
    ours, frames = small.matrix(results["on"])
    return [verdicts.judge(f"{name} - on", small.matrix(results[name])[0] - ours, frames, SMALLEST, "nats per frame") for name in (*DECIDING, "longer", "exchanged") if name in results]


def draw(path: Path, results: dict, rows: list[dict]) -> str:
    drawing, axes = verdicts.figure(panels=2 if results else 1, width=11 if results else 6)
    left, right = axes[0], axes[-1]
    for name in [n for n in results if n != "on"]:
        gap = np.mean([np.asarray(r[max(r)]["by_frame"]).sum(1) for r in results[name]], 0) - np.mean([np.asarray(r[max(r)]["by_frame"]).sum(1) for r in results["on"]], 0)
        left.plot(np.arange(len(gap)) * 0.08, gap, "o-", markersize=4, label=f"{name} - on")
    if results:
        left.axhline(0, color="black", linewidth=0.8)
        left.set(xlabel="seconds into the turn", ylabel="nats per frame", title="What memory saves, frame by frame")
        left.legend(fontsize=8)
    verdicts.bars(right, [r["what"] for r in rows], [r["effect"] for r in rows], "nats per frame")
    right.axhline(SMALLEST, color="black", linestyle=":")
    right.set_title("Loss without it minus loss with it (dotted: worth having)")
    return verdicts.save_picture(drawing, path)


def body_of(result: dict) -> str:
    rows, body = result["effects"], ""
    if result["conditions"]:
        body += (f"**H2 is {result['verdict']}** at this budget: {result['seeds']} seeds, {result['n_conversations']} held-out conversations; nats per frame over the first "
                 f"{result['opening_s']:g} s of turns whose speaker has spoken before and is remembered in slots only.\n\n")
        body += table(["condition", "parameters", "steps", "held-out nats per frame"],
                      [[name, f"{a['parameters']:,}", f"{a['steps']:,}", show(a["nats"])] for name, a in result["conditions"].items()]) + "\n\n"
    nano = result["shipped"]
    body += verdicts.verdict_table(rows + (nano["effects"] if nano else []))
    if nano:
        body += f"\n\nShipped model: {nano['n_conversations']} conversations, window of {WINDOW} turns, {BEFORE} more as slots, " + ", ".join(f"{k} {v:.3f}" for k, v in nano["nats"].items()) + " nats per frame."
        if nano["voice"]:
            body += " Voice cosine of what it says to the speaker's turn that has left the window (no lead): " + ", ".join(f"{k} {show(v)}" for k, v in nano["voice"].items()) + "."
    return body + f"\n\nDecision rule: `experiments/{NAME}.py`. Picture: `{result['picture']}`."


@runtime.plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    args.depth, args.memory_width, args.audio_vocab, args.count_batches = 96, 64, 1025, 4
    return experiment(args, sys.argv[1:] if argv is None else list(argv))


def experiment(args, words: list[str]) -> int:
    result = {"verdict": verdicts.UNDECIDED, "seeds": args.seeds if args.steps else 0, "opening_s": frames_of(args) / 12.5, "conditions": {}, "effects": [], "n_conversations": None}
    results: dict = {}
    if args.steps:
        results, about, _ = train_small(args, from_flags(Training, args))
        for name in about:
            values, frames = small.matrix(results[name])
            about[name]["nats"] = verdicts.effect(values, frames)
        result |= {"conditions": about, "effects": effects(results), "n_conversations": len(frames)}
        deciding = [r["verdict"] for r in result["effects"] if r["what"].split()[0] in DECIDING]
        result["verdict"] = verdicts.all_of(deciding) if args.seeds >= 3 else verdicts.UNDECIDED
    result["shipped"] = shipped(args)
    result["picture"] = draw(Path(args.output) / "h2" / "h2.png", results, result["effects"] + (result["shipped"] or {"effects": []})["effects"])
    return verdicts.publish(args, NAME, words, result, body_of(result))


if __name__ == "__main__":
    sys.exit(main())
