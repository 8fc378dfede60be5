"""H3: voice-text cross-attention inside one model beats separate pipelines.

    python experiments/h3_cross_attention.py                     tens of minutes per seed on one core; interrupted, it goes on
    python experiments/h3_cross_attention.py --speak 24          and lets the models of seed 0 be heard by the judge

Conditions, all trained from scratch on the same windows:
  on         the design: voice positions read single letters, guided by the reading position; text positions read pooled prosody
  unguided   the same without what only an aligned corpus gives: no reading position, no phones (the labels that `off` has)
  pooled     pooled both ways: the letters that the voice reads are means over blocks of five as well
  off        no cross-attention; the backbone is wider, so that the parameters are as many
  pipeline   two models, together as large: text to the first semantic code; codes to all other codes, without text
All have the same number of parameters within 1 % (the width of the backbone, then of its feed-forward, is enlarged) and the
same arithmetic: PyTorch counts the floating-point operations of a step on real batches, and each condition gets as many
steps as the budget of `on` at --steps buys. The measure is the held-out loss in nats per frame on conversations of other
characters and texts (validation and test splits), per codebook; it factorises alike in all conditions.

Decision rule, written before the first run. Effect: loss of the first semantic code (the one that carries the words) of the
other condition minus that of `on`, nats per frame; more is better for H3. Smallest effect worth having: 0.05 nats. The 95 %
bootstrap interval is over seeds and conversations (verdicts.py).
  supported: against `off` and against `pipeline` the whole interval lies above 0.05 and every seed is above 0
  refuted:   against one of them the whole interval lies below 0.05
  undecided: else; the section then says how many seeds or conversations would decide
`pooled` and `unguided` do not decide H3; they say which part of the design does it. All codebooks together are reported beside it.
Chance: a model that knows only how often each code occurs in training (its loss is in the table).
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Parser                                           # noqa: E402
from experiments.settings import Training, add_training_flags, check_seeds  # noqa: E402

NAME = "h3_cross_attention"
SMALLEST = 0.05                  # nats per frame of the first code
BLOCK = 5                        # letters that `pooled` reads at once
NAMES = ("on", "off", "pipeline", "pooled", "unguided")


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser)
    parser.add_argument("--width", type=int, default=128, help="backbone of `on`; default 128")
    parser.add_argument("--layers", type=int, default=4, help="default 4")
    parser.add_argument("--codebooks", type=int, default=8, help="two of them semantic; default 8")
    parser.add_argument("--conditions", default=",".join(NAMES), help="default %(default)s")
    parser.add_argument("--speak", type=int, default=0, help="test sentences that each condition of seed 0 says to the judge; 0: none (default)")
    parser.add_argument("--codec", default="pretrained/codec", help="for --speak; default pretrained/codec")
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import dataclasses               # noqa: E402

import numpy as np               # noqa: E402
import torch                     # noqa: E402

import runtime                   # noqa: E402
from config import from_flags    # noqa: E402
from experiments import small_models as small, verdicts  # noqa: E402
from measuring import show, table  # noqa: E402


# ----------------------------------------------------------------------------- conditions

def pool_letters(model) -> None:
    """Cross-attention to means of BLOCK letters: what the voice reads is as coarse as what the text hears."""
    for read in model.read_text:
        def prepare(text, plain=read.prepare):
            R, L, W = text.shape
            padded = torch.nn.functional.pad(text, (0, 0, 0, -L % BLOCK))
            means = padded.view(R, -1, BLOCK, W).mean(2).repeat_interleave(BLOCK, 1)[:, :L]
            return plain(means)
        read.prepare = prepare


def hear_words_only(model) -> None:
    """First half of the pipeline: of a heard frame only the first code."""
    embed = model.embed

    def first_code(frames, mask):
        mask = mask.clone()
        mask[..., 1:-1] = False
        return embed(frames, mask)
    model.embed = first_code


def read_nothing(model) -> None:
    """Second half of the pipeline: every letter looks alike."""
    embed = model.embed

    def blank(frames, mask):
        frames = frames.clone()
        frames[..., -1] = model.cfg.pad_id
        return embed(frames, mask)
    model.embed = blank


def pipeline(width: int, ffn: int, args) -> tuple[small.Condition, small.Condition]:
    """Text to first codes; codes to the other codes."""
    V = args.audio_vocab
    words = small.base_config(width, args.layers, ffn, 2, 2, 8, V, loss_weights={"c0": 1.0, "depth": 0.0})
    sound = small.base_config(width, args.layers, ffn, args.codebooks, 2, args.depth, V, loss_weights={"c0": 0.0, "depth": 1.0})
    idle = small.base_config(8, 1, 8, 2, 2, 8, V)                  # the depth decoder and its projection, which no loss of the first half reaches
    with torch.device("meta"):
        tiny = small.CSM(idle)
    depth = sum(p.numel() for p in tiny.decoder.parameters()) + tiny.audio_head.numel() + width * 8
    return (small.Condition("pipeline_words", words, hear_words_only, unused=depth + V * width),
            small.Condition("pipeline_sound", sound, read_nothing, unused=V * width + (words.text_vocab - 1) * width))


def conditions(args) -> dict[str, list[small.Condition]]:
    """Name -> the models that are trained for it (two for the pipeline), all with the parameters of `on` within 1 %."""
    def whole(name, width, ffn, change=None, unused=0, **changes):
        return small.Condition(name, small.base_config(width, args.layers, ffn, args.codebooks, 2, args.depth, args.audio_vocab, **changes), change, unused)
    guided, free = small.cross_config(args.cross_width), small.cross_config(args.cross_width, guided=False, phone_head=False)
    on = whole("on", args.width, 3 * args.width, cross=guided)
    target, weights = on.parameters(), on.cfg.loss_weights | {"advance": 0.0}                    # the reading position's labels are the alignment

    def like(make):
        return small.equal_parameters(make, lambda c: sum(x.parameters() for x in c) if isinstance(c, tuple) else c.parameters(), target, 8)
    made = {"on": lambda: [on], "pooled": lambda: [dataclasses.replace(on, name="pooled", change=pool_letters)],
            "unguided": lambda: [like(lambda w, f: whole("unguided", w, f, unused=(w + 1) * (free.max_advance + 1), cross=free, loss_weights=weights))],
            "off": lambda: [like(lambda w, f: whole("off", w, f))],
            "pipeline": lambda: list(like(lambda w, f: pipeline(w, f, args)))}
    wanted = [n.strip() for n in args.conditions.split(",")]
    if bad := [n for n in wanted if n not in made]:
        raise ValueError(f"unknown condition {bad[0]!r}: use --conditions {','.join(NAMES)}")
    return {name: made[name]() for name in dict.fromkeys(["on", *wanted])}


def plan_runs(args, training: Training) -> tuple[dict, dict]:
    """-> condition -> seed -> its runs; condition -> {"parameters", "steps", "flops_per_step"}."""
    folder, about, plans = Path(args.output) / "h3", {}, {}
    chosen = conditions(args)
    judged = {}
    budget = None
    for name, models in chosen.items():
        costs = []
        for model in models:
            windows = small.Windows(training, model.cfg, 12345)
            costs.append(small.step_flops(model, [windows.next_batch() for _ in range(args.count_batches)], training))
        budget = budget or sum(costs) * training.steps
        about[name] = {"parameters": sum(m.parameters() for m in models), "steps": max(1, round(budget / sum(costs))), "gflops_per_step": sum(costs) / 1e9,
                       "width": models[0].cfg.backbone.width, "ffn": models[0].cfg.backbone.ffn}
        for model in models:
            key = model.cfg.num_codebooks
            judged.setdefault(key, small.held_out_windows(training, model.cfg))
        plans[name] = {seed: [run_of(model, seed, about[name]["steps"], training, folder, judged[model.cfg.num_codebooks]) for model in models] for seed in check_seeds(args)}
    return plans, about


def run_of(condition, seed, steps, training, folder, windows) -> small.Run:
    return small.Run(condition, seed, steps, training, folder, lambda: small.Windows(training, condition.cfg, seed), lambda model: small.judge_windows(model, windows))


def join_halves(halves: list[dict]) -> dict:
    """Tables of the pipeline's two models -> one with the first code from the one and the others from the other."""
    if len(halves) == 1:
        return halves[0]
    words, sound = (h[max(h)] for h in halves)
    nats = np.concatenate([words["nats"][:, :1], sound["nats"][:, 1:]], 1)
    return {0: dict(sound) | {"nats": nats}}


# ----------------------------------------------------------------------------- chance, words, report

def chance_nats(training: Training, cfg, windows) -> np.ndarray:
    """(K,) nats per frame of codes drawn as often as in training (one added to every count)."""
    train = small.ConversationDataset(training.data, cfg, "train", training.batch_positions, 0)
    counts = np.ones((cfg.num_codebooks, cfg.audio_vocab))
    for turns in train.conversations:
        for turn in turns:
            for k in range(cfg.num_codebooks):
                np.add.at(counts[k], turn.codes[k].numpy().astype(int) + cfg.code_offset, 1)
    costs, total, n = -np.log(counts / counts.sum(1, keepdims=True)), np.zeros(cfg.num_codebooks), 0
    for group in windows[0]:
        for window in group:
            codes = window.turns[-1].codes.numpy().astype(int) + cfg.code_offset
            total, n = total + np.array([costs[k][codes[k]].sum() for k in range(cfg.num_codebooks)]), n + codes.shape[1]
    return total / n


def spoken_words(args, runs: list[small.Run]) -> dict | None:
    """Word error of test sentences said by a trained model (one model that makes all codes); None for the pipeline, whose halves have no common sampler."""
    from checkpoint import load_codec
    from config import SamplingConfig
    from generation import Session
    from measuring import hear, pick_turns, summary
    from text_tokenizer import load_tokenizer
    from tqdm import tqdm
    if len(runs) > 1:
        return None
    model, codec, rows = small.load_run(runs[0]), load_codec(args.codec), []
    for number, (turns, i) in enumerate(tqdm(pick_turns(args.data, "test", args.speak, 0), desc=f"{runs[0].condition.name} speaks", unit="turn")):
        with torch.inference_mode():
            session = Session(model, codec, load_tokenizer(model.cfg.tokenizer), SamplingConfig(max_seconds=10.0, lead_seconds=0.0, seed=number))
            turn = session.say(0, turns[i]["text"])
        rows.append(hear(turn.audio, turns[i]["text"], mos=False))
    return summary(rows)


def effects(results: dict[str, list[dict]]) -> list[dict]:
    """Verdict rows: every other condition minus `on`, for the first code and for all codes."""
    rows = []
    for name in results:
        if name == "on":
            continue
        for what, pick in (("first code", lambda nats: nats[:, 0]), ("all codes", lambda nats: nats.sum(1))):
            ours, frames = small.matrix(results["on"], pick)
            theirs, _ = small.matrix(results[name], pick)
            rows.append(verdicts.judge(f"{name} - on, {what}", theirs - ours, frames, SMALLEST, "nats per frame"))
    return rows


def verdict(rows: list[dict], seeds: int) -> str:
    deciding = [r["verdict"] for r in rows if r["what"] in ("off - on, first code", "pipeline - on, first code")]
    return verdicts.all_of(deciding) if len(deciding) == 2 and seeds >= 3 else verdicts.UNDECIDED


def draw(path: Path, results: dict, rows: list[dict], chance: np.ndarray) -> str:
    drawing, (left, right) = verdicts.figure(panels=2, width=11)
    K = len(chance)
    for name, found in results.items():
        values, frames = small.matrix(found, lambda nats: nats)
        left.plot(range(1, K + 1), np.average(values.mean(0), axis=0, weights=frames), "o-", label=name, markersize=4)
    left.plot(range(1, K + 1), chance, "k:", label="chance")
    left.set(xlabel="codebook", ylabel="held-out nats per frame", title="Loss of each codebook")
    left.legend(fontsize=8)
    firsts = [r for r in rows if r["what"].endswith("first code")]
    verdicts.bars(right, [r["what"].split(",")[0] for r in firsts], [r["effect"] for r in firsts], "nats per frame, first code")
    right.axhline(SMALLEST, color="black", linestyle=":")
    right.set_title("What cross-attention saves (dotted: worth having)")
    return verdicts.save_picture(drawing, path)


def body_of(result: dict, rows: list[dict], results: dict, chance: np.ndarray) -> str:
    lines = []
    for name, about in result["conditions"].items():
        first, frames = small.matrix(results[name], lambda nats: nats[:, 0])
        every, _ = small.matrix(results[name])
        wer = (result["words"] or {}).get(name)
        lines.append([name, f"{about['parameters']:,}", f"{about['steps']:,}", f"{about['gflops_per_step']:.1f}", show(verdicts.effect(first, frames)), show(verdicts.effect(every, frames)),
                      show(wer["wer"], 2, True) if wer else "-"])
    lines.append(["chance", "-", "-", "-", show(float(chance[0])), show(float(chance.sum())), "-"])
    body = f"**H3 is {result['verdict']}** at this budget: {result['seeds']} seeds, {result['n_conversations']} held-out conversations, models of {lines[0][1]} parameters.\n\n"
    body += table(["condition", "parameters", "steps", "GFLOP a step", "first code, nats a frame", "all codes", "word error"], lines) + "\n\n"
    body += verdicts.verdict_table(rows)
    return body + f"\n\nDecision rule: `experiments/{NAME}.py`. Picture: `{result['picture']}`."


@runtime.plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    args.depth, args.cross_width, args.audio_vocab, args.count_batches = 96, 96, 1025, 4
    return experiment(args, sys.argv[1:] if argv is None else list(argv))


def experiment(args, words: list[str]) -> int:
    training = from_flags(Training, args)
    plans, about = plan_runs(args, training)
    order = [(name, seed) for seed in check_seeds(args) for name in plans]                       # a whole comparison after every seed
    flat = [run for name, seed in order for run in plans[name][seed]]
    found = dict(zip(map(id, flat), small.train_all(flat)))
    results = {name: [join_halves([found[id(run)] for run in runs]) for runs in seeds.values()] for name, seeds in plans.items()}
    rows = effects(results)
    on = plans["on"][0][0]
    chance = chance_nats(training, on.condition.cfg, small.held_out_windows(training, on.condition.cfg))
    said = {name: spoken_words(args, plans[name][0]) for name in plans} if args.speak else None
    result = {"verdict": verdict(rows, args.seeds), "seeds": args.seeds, "n_conversations": int(len(small.matrix(results["on"])[1])), "conditions": about, "effects": rows,
              "chance_nats": chance.tolist(), "words": said, "picture": draw(Path(args.output) / "h3" / "h3.png", results, rows, chance)}
    return verdicts.publish(args, NAME, words, result, body_of(result, rows, results, chance))


if __name__ == "__main__":
    sys.exit(main())
