"""Human speech in training: does a model that has heard people keep a person's voice better, and what does it lose?

    python experiments/human_speech.py                     about an hour on one core; interrupted, it goes on
    python experiments/human_speech.py --conditions human --steps 100

People who are licensed for training and come from packages alone: the telephone prompts of Debian's
asterisk-core-sounds-{fr,it,ru}-g722 (CC-BY-SA-3.0, ru CC-BY-3.0) with the texts of asterisk-core-sounds-{fr,it,ru}. The speaker of the
English prompts, which are for tests only, also speaks the Spanish ones, so these are left out. Prompts are
put together to conversations of two people who take turns; in most of them each person is resampled by a factor of its own
(pitch, vocal tract and pace together), since three voices teach little about voices. One prompt in ten is kept for tests.

The texts are in the language spoken, in Latin letters without accents (Russian is transliterated): the model learns from them that
letters and sounds go along, and its English may suffer from it, which is measured. Where in the text a voice is, is not
known; letters are spread evenly over what is not silence.

Conditions, both from --checkpoint with the same steps, seed and learning rate (train.py):
  human       the synthetic conversations of --data and people's; people's are repeated until they are --share of the turns
  synthetic   the synthetic ones alone: what comes of training on, without people
  before      the checkpoint itself
Measured on the same sentences, seeds and contexts: English test sentences after a recording of a person never heard (the English
prompts), after held-out prompts of the people heard, and test turns of synthetic characters after their own voice; loss on held-out conversations.

Decision rule, written before the first run. It judges these weights, so intervals are over sentences (and seeds, where there are several).
  gain: cosine to the recording of a person never heard, `human` minus `before`, and minus `synthetic`. Smallest gain worth having: 0.05
  price: synthetic turns lose at most 0.03 of their cosine, and word error rises by at most 1 point on synthetic turns and on sentences after people
  supported (worth shipping): both gains lie above 0.05 with their whole interval and no price is over its bar
  refuted: one of the gains lies below 0.05 with its whole interval, or a price is over its bar with its whole interval
  undecided: else
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Parser, SamplingConfig, add_flags                # noqa: E402
from experiments.settings import add_common_flags, check_seeds      # noqa: E402

NAME = "human_speech"
VOICES = ("fr", "it", "ru")
TESTED = ("en", "es")            # one woman speaks both
GAIN, VOICE_PRICE, WORD_PRICE = 0.05, 0.03, 0.01
NAMES = ("human", "synthetic")
SHAPES = (0.86, 1.17)            # resampling factors of a person
UNSHAPED = 0.3                   # share of people left as they are
TURNS = 6                        # of a conversation
SECONDS = (1.0, 12.0)            # of a prompt
HELD_OUT = 10                    # every so many-th prompt is not trained on
LOUDNESS = -23.0                 # LUFS, as collect_data.py levels people
LETTERS = "a b v g d e zh z i i k l m n o p r s t u f kh ts ch sh shch - y - e yu ya"      # of the Russian alphabet in order; - has no sound
LATIN = {chr(0x430 + k): letters.strip("-") for k, letters in enumerate(LETTERS.split())} | {chr(0x451): "yo"}


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, seeds=1)
    parser.add_argument("--conditions", default=",".join(NAMES), help="default %(default)s")
    parser.add_argument("--data", default="data/synthetic", help="synthetic conversations with tokens; default %(default)s")
    parser.add_argument("--checkpoint", default="pretrained/nano", help="weights to start from; default %(default)s")
    parser.add_argument("--codec", default="pretrained/codec", help="default %(default)s")
    parser.add_argument("--prompts", default="/usr/share/asterisk/sounds", metavar="FOLDER", help="a folder of prompts per language; default %(default)s")
    parser.add_argument("--texts", default="/usr/share/doc/asterisk-core-sounds-{0}/core-sounds-{0}.txt.gz", metavar="FILE", help="their texts, {0} stands for the language; default %(default)s")
    parser.add_argument("--voices", default=",".join(VOICES), help="languages to train on; default %(default)s")
    parser.add_argument("--recordings", default="", metavar="FOLDER", help="recordings of a person never heard, for the test; default PROMPTS/en")
    parser.add_argument("--transcripts", default="", metavar="FILE", help="what they say; default the English table of --texts")
    parser.add_argument("--conversations", type=int, default=330, help="of people; default %(default)s")
    parser.add_argument("--share", type=float, default=0.4, help="of people's turns in training; default %(default)s")
    parser.add_argument("--steps", type=int, default=120, help="default %(default)s")
    parser.add_argument("--batch_positions", type=int, default=4096, help="default %(default)s")
    parser.add_argument("--lr_scale", type=float, default=0.1, help="of the learning rates of a new model (train.py --init_lr_scale); default %(default)s")
    parser.add_argument("--turns", type=int, default=24, help="sentences after a person, of each kind; default %(default)s")
    parser.add_argument("--test_turns", type=int, default=40, help="synthetic turns; default %(default)s")
    parser.add_argument("--eval_batches", type=int, default=8, help="batches of the held-out loss; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sentences and the drawing; default 0")
    parser.add_argument("--device", default="cpu", help="default cpu")
    add_flags(parser, SamplingConfig, only=("temperature", "top_k", "depth_temperature"))
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import copy                      # noqa: E402
import gzip                      # noqa: E402
import hashlib                   # noqa: E402
import json                      # noqa: E402
import random                    # noqa: E402
import re                        # noqa: E402
import shutil                    # noqa: E402
import subprocess                # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np               # noqa: E402
import torch                     # noqa: E402
from tqdm import tqdm            # noqa: E402

import audio_io                  # noqa: E402
import runtime                   # noqa: E402
from experiments import verdicts  # noqa: E402
from measuring import show, summary, table  # noqa: E402

RATE = audio_io.SAMPLE_RATE


# ----------------------------------------------------------------------------- prompts

@dataclass
class Prompt:
    """What a person says: name, text in Latin letters, sound (n,) at 24 kHz without the silence around it."""
    name: str
    text: str
    audio: np.ndarray


def latin(text: str) -> str | None:
    """The model's letters for a text in another language; None where signs, digits or remarks leave open what is spoken."""
    from text_tokenizer import normalise
    if re.search(r"[\d\[\](){}*#<>@&%+=/]", text):
        return None
    small = "".join(LATIN.get(c, c) for c in text.lower())
    try:
        return normalise(small)
    except ValueError:
        return None


def loud_parts(audio: np.ndarray) -> np.ndarray:
    """Which 10 ms of audio (n,) are no silence: less than 35 dB below the loudest, above -70 dB of full scale; (n // 240,) bool."""
    from segmentation import envelope_db
    level = envelope_db(audio, RATE)
    return level > max(-70.0, level.max(initial=-120.0) - 35)


def read_prompts(folder: Path, table_of: str) -> list[Prompt]:
    """The prompts of one person that have a text and a fitting length, in order of their names."""
    from benchmark_codec import SOUNDS, read_transcripts
    from filters import gain_to
    texts, found, size = read_transcripts(table_of), [], RATE // 100
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS):
        name = path.relative_to(folder).with_suffix("").as_posix()
        text = latin(texts.get(name, ""))
        if not text:
            continue
        audio = audio_io.read_audio(path, RATE)
        loud = np.flatnonzero(loud_parts(audio))
        audio = audio[loud[0] * size:(loud[-1] + 1) * size] if len(loud) else audio[:0]
        if SECONDS[0] <= len(audio) / RATE <= SECONDS[1]:
            found.append(Prompt(name.replace("/", "-"), text, (audio * gain_to(audio, RATE, LOUDNESS)).astype(np.float32)))
    if len(found) < 2 * HELD_OUT:
        raise ValueError(f"{folder} has {len(found)} prompts with a text in {table_of}, at least {2 * HELD_OUT} are needed: check --prompts and --texts (Debian: asterisk-core-sounds-fr-g722 and asterisk-core-sounds-fr)")
    return found


def voices_of(args) -> list[str]:
    chosen = [v.strip() for v in args.voices.split(",") if v.strip()]
    if bad := [v for v in chosen if v in TESTED]:
        raise ValueError(f"--voices {bad[0]}: the speaker of the tests is never trained on, use --voices {','.join(VOICES)}")
    if len(chosen) < 2:
        raise ValueError(f"--voices {args.voices}: a conversation needs two people, use --voices {','.join(VOICES)}")
    return chosen


def all_prompts(args) -> dict[str, list[Prompt]]:
    return {voice: read_prompts(Path(args.prompts) / voice, args.texts.format(voice)) for voice in voices_of(args)}


# ----------------------------------------------------------------------------- conversations of people

def endless(items: list, rng: random.Random):
    while True:
        yield from rng.sample(items, len(items))


def shaped(audio: np.ndarray, factor: float) -> np.ndarray:
    """Sound (n,) of a person with a longer (factor above 1) or shorter vocal tract: lower and slower, or higher and faster."""
    return audio if factor == 1 else audio_io.resample(audio, RATE, round(RATE * factor))


def plan_conversations(prompts: dict[str, list[Prompt]], count: int, seed: int) -> dict[str, list[tuple[str, float, Prompt]]]:
    """Name -> turns (speaker, factor, prompt). Conversations that the collector will hold out are made of held-out prompts alone."""
    import corpora
    rng, names = random.Random(f"people {seed}"), [f"people{k:04d}" for k in range(count)]
    splits, found = corpora.held_out(names), {}
    drawn = {(voice, held): endless([p for k, p in enumerate(mine) if (k % HELD_OUT == 0) == held], rng) for voice, mine in prompts.items() for held in (False, True)}
    for name in names:
        pair = rng.sample(sorted(prompts), 2)
        factors = [1.0 if rng.random() < UNSHAPED else rng.uniform(*SHAPES) for _ in pair]
        found[name] = [(pair[t % 2], factors[t % 2], next(drawn[pair[t % 2], splits[name] != "train"])) for t in range(TURNS)]
    return found


def words_in_time(audio: np.ndarray, text: str) -> list[list]:
    """[[first byte, end byte, start s, end s], ...] of the words, letters spread evenly over what is not silence."""
    spoken = np.concatenate([[0.0], np.cumsum(loud_parts(audio))])
    places = [(m.start(), m.end()) for m in re.finditer(r"[a-z'-]+", text)]
    letters = np.cumsum([0] + [b - a for a, b in places])
    clock = np.interp(letters / letters[-1] * spoken[-1], spoken + 1e-6 * np.arange(len(spoken)), 0.01 * np.arange(len(spoken)))
    return [[a, b, round(float(clock[k]), 3), round(float(clock[k + 1]), 3)] for k, (a, b) in enumerate(places)]


def add_words(folder: Path) -> None:
    """Times of the words into the manifests of a collection."""
    for path in sorted((folder / "manifests").glob("*/supervisions.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            turns = [json.loads(line) for line in file]
        for turn in turns:
            audio = audio_io.read_audio(folder / turn["custom"]["turn_audio"], RATE)
            turn["custom"]["alignment"] = {"phones": "", "words": words_in_time(audio, turn["text"])}
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(turn, ensure_ascii=False) + "\n" for turn in turns)


def make_people(args, home: Path) -> tuple[Path, Path]:
    """Conversations of people with tokens, and the held-out prompts as WAV files with their words beside them; kept from an earlier run."""
    import collect_data
    from checkpoint import load_codec
    from dataset_pipeline import tokenise
    key = hashlib.sha256(json.dumps([args.prompts, voices_of(args), args.conversations, args.seed]).encode()).hexdigest()[:8]
    data, held, ready = home / f"people-{key}", home / f"held_out-{key}", home / f"people-{key}" / "ready"
    if not ready.exists():
        for folder in (data, held):
            shutil.rmtree(folder, ignore_errors=True)
        prompts, parts = all_prompts(args), data / "recordings"
        for name, turns in tqdm(plan_conversations(prompts, args.conversations, args.seed).items(), desc="conversations of people", unit="conversation"):
            for k, (voice, factor, prompt) in enumerate(turns):
                _put(parts / name / f"{k:03d}_{voice}", shaped(prompt.audio, factor), prompt.text)
        for voice, mine in prompts.items():
            for prompt in mine[::HELD_OUT]:
                _put(held / voice / prompt.name, prompt.audio, prompt.text)
        collect_data.collect("--source", "folder", "--path", str(parts), "--output", str(data), "--target_hours", "1e5", "--no_filters", "--listen", "never", "--workers", "1",
                             "--licence", "CC-BY-SA-3.0 and CC-BY-3.0 (Debian's asterisk-core-sounds)", "--fresh")
        shutil.rmtree(parts)
        add_words(data)
        ready.touch()
    tokenise(data, load_codec(args.codec, runtime.pick_device(args.device)), workers=1)
    return data, held


def _put(path: Path, audio: np.ndarray, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio_io.write_audio(path.with_name(path.name + ".wav"), audio)
    path.with_name(path.name + ".txt").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------- training

def turns_in(data) -> int:
    from dataset_pipeline import data_folders, read_index
    return sum(read_index(folder)["splits"]["train"]["turns"] for folder in data_folders(data))


def repeated(args, people: Path) -> str:
    """--data and people's folder as often as makes them --share of the turns."""
    times = max(1, round(args.share / (1 - args.share) * turns_in(args.data) / max(1, turns_in(people))))
    return ",".join([args.data, *[str(people)] * times])


def train(args, home: Path, name: str, seed: int, data: str) -> Path:
    """`train.py` in a process of its own, gone on with where it stopped -> the training file. ValueError with its last line where it fails."""
    about = [args.checkpoint, args.steps, args.batch_positions, args.lr_scale, seed, data, turns_in(data), (runtime.ROOT / "train.py").name]
    output = home / f"{name}-seed{seed}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}"
    if (output / "done").exists():
        return output / "last.pt"
    begin = ["--resume", str(output / "last.pt")] if (output / "last.pt").exists() else ["--init_from", args.checkpoint]
    flags = {"data": data, "output": output, "codec": args.codec, "max_steps": args.steps, "batch_positions": args.batch_positions, "init_lr_scale": args.lr_scale, "seed": seed,
             "warmup_steps": max(1, args.steps // 10), "eval_every": max(1, args.steps // 4), "eval_batches": 4, "device": args.device, "wandb": "disabled", "save_minutes": 1}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    done = subprocess.run([sys.executable, str(runtime.ROOT / "train.py"), *begin, *words], stdout=subprocess.DEVNULL, stderr=None if sys.stderr.isatty() else subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"train.py failed: {((done.stderr or 'no message').strip().splitlines() or ['no message'])[-1]}")
    (output / "done").touch()
    return output / "last.pt"


# ----------------------------------------------------------------------------- judging

@torch.no_grad()
def held_out_loss(model, data, args) -> dict:
    """Mean of each loss term over fixed held-out batches (nats per target), and "loss", weighted as in training."""
    from dataset_pipeline import ConversationDataset
    batches = ConversationDataset(data, model.cfg, "validation", args.batch_positions, 0).fixed_batches(args.eval_batches, 3)
    sums: dict[str, list[float]] = {}
    for number, batch in enumerate(batches):
        terms = model.loss(batch.to(runtime.pick_device(args.device)), generator=torch.Generator().manual_seed(number))
        for name in model.cfg.loss_weights:
            if name in terms:
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0], entry[1] = entry[0] + float(terms[name][0]), entry[1] + float(terms[name][1])
    means = {name: value / count for name, (value, count) in sums.items() if count}
    return {"loss": sum(model.cfg.loss_weights[n] * v for n, v in means.items())} | means


def judged(args, home: Path, weights: str, people: Path, held: Path) -> dict:
    """Everything that is measured of some weights: rows of the three kinds of sentences, held-out losses; kept from an earlier run."""
    from benchmark_codec import recordings
    from benchmark_personal import say_after
    from benchmark_replies import say_in_voices
    from benchmark_voice import load_talker, weights_name
    from measuring import pick_turns
    args = copy.copy(args)
    args.checkpoint = weights
    talker = load_talker(args)
    name = weights_name(talker[3])
    asked = [name["sha256"], args.data, args.recordings, args.turns, args.test_turns, args.eval_batches, args.batch_positions, args.seed, args.temperature, args.top_k, args.depth_temperature, str(held)]
    kept = home / f"judged-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    english, table_of = args.recordings or str(Path(args.prompts) / "en"), args.transcripts or args.texts.format("en")
    with torch.inference_mode():
        found = {"weights": name, "losses": {"synthetic": held_out_loss(talker[0], args.data, args), "people": held_out_loss(talker[0], str(people), args)},
                 "never heard": say_in_voices(talker, args, recordings(english, table_of, args.turns, args.seed)),
                 "heard": say_in_voices(talker, args, recordings(held, "", args.turns, args.seed)),
                 "characters": say_after(talker, args, pick_turns(args.data, "test", args.test_turns, args.seed, same_speaker_before=True))}
    runtime.write_json(kept, found)
    return found


def word_errors(row: dict) -> tuple[int, int]:
    """(errors, words) of an utterance."""
    import judges
    found = judges.word_errors(row["said"], row["heard"])
    return found["substitutions"] + found["deletions"] + found["insertions"], found["words"]


def cosine_gain(after: list[dict], before: list[dict], kind: str) -> np.ndarray:
    """(S, C) cosine of `after` minus that of `before`; both have one result per seed, sentences that cannot be judged count as no change."""
    return np.array([[0.0 if None in (a["voice"], b["voice"]) else a["voice"] - b["voice"] for a, b in zip(x[kind], y[kind])] for x, y in zip(after, before)])


def word_rise(after: list[dict], before: list[dict], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(S, C) rise of the word error of a sentence, and words (C,)."""
    words = np.array([max(1, word_errors(row)[1]) for row in after[0][kind]], dtype=float)
    return np.array([[word_errors(a)[0] - word_errors(b)[0] for a, b in zip(x[kind], y[kind])] for x, y in zip(after, before)]) / words, words


def gains(results: dict[str, list[dict]]) -> list[dict]:
    """Verdict rows of `human` against the others, people never heard (these decide) and people heard."""
    rows = []
    for kind in ("never heard", "heard"):
        for other in ("before", *[n for n in results if n not in ("before", "human")]):
            d = cosine_gain(results["human"], results[other], kind)
            rows.append(verdicts.judge(f"people {kind}: human - {other}", d, np.ones(d.shape[1]), GAIN, "cosine"))
    return rows


def prices(results: dict[str, list[dict]]) -> list[dict]:
    """What `human` costs against `before`: {what, bar, effect, met}; met is None where the interval holds the bar and the mean is over it."""
    human, before = results["human"], results["before"]
    lost = -cosine_gain(human, before, "characters")
    rows = [("cosine that characters lose", VOICE_PRICE, verdicts.effect(lost))]
    rows += [(f"word error, rise {where}", WORD_PRICE, verdicts.effect(*word_rise(human, before, kind))) for kind, where in (("characters", "on synthetic turns"), ("never heard", "after people never heard"))]
    return [{"what": what, "bar": bar, "effect": e, "met": True if e["mean"] <= bar else False if e["low"] is not None and e["low"] > bar else None} for what, bar, e in rows]


def verdict(rows: list[dict], costs: list[dict]) -> str:
    deciding = [r["verdict"] for r in rows if r["what"].startswith("people never heard")]
    if any(c["met"] is False for c in costs):
        return verdicts.REFUTED
    found = verdicts.all_of(deciding)
    complete = len(deciding) == 2 and all(c["met"] for c in costs)
    return found if found == verdicts.REFUTED or complete else verdicts.UNDECIDED


# ----------------------------------------------------------------------------- report

def conditions_table(results: dict[str, list[dict]]) -> str:
    rows = []
    for name, found in results.items():
        parts = {kind: summary([row for f in found for row in f[kind]]) for kind in ("never heard", "heard", "characters")}
        cells = [cell for kind in parts for cell in (show(parts[kind].get("voice")), show(parts[kind]["wer"], 2, True))]
        losses = [float(np.mean([f["losses"][which]["loss"] for f in found])) for which in ("synthetic", "people")]
        rows.append([name, *cells, show(parts["never heard"].get("mos")), *(show(loss, 3) for loss in losses)])
    return table(["", "person never heard: cosine", "word error", "people heard: cosine", "word error", "characters: cosine", "word error", "DistillMOS, never heard", "held-out loss, synthetic", "people"], rows)


def body_of(result: dict, results: dict[str, list[dict]], rows: list[dict], costs: list[dict]) -> str:
    said = {True: "met", False: "**missed**", None: "not decided"}
    body = (f"**Training on people as well is {result['verdict']}** at this budget: {result['steps']} steps of {result['batch_positions']} positions, {result['people_hours']:.2f} h of {', '.join(result['voices'])} "
            f"prompts ({result['people_turns']} turns, {100 * result['share']:.0f} % of the turns in training), {len(results['human'])} seed{'s' if len(results['human']) > 1 else ''}. "
            f"A sentence is said after one recording of the person (the same for all); cosine to it.\n\n{conditions_table(results)}\n\n{verdicts.verdict_table(rows)}\n\n")
    body += table(["price of `human` against `before`", "at most", "measured", ""], [[c["what"], f"{c['bar']:g}", show(c["effect"], 3), said[c["met"]]] for c in costs])
    return body + f"\n\nThe person never heard speaks English, the people heard other languages. Decision rule: `experiments/{NAME}.py`."


@runtime.plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 < args.share < 1 or args.conversations < 10 or args.steps < 1:
        raise ValueError(f"--share {args.share}, --conversations {args.conversations}, --steps {args.steps}: use a share between 0 and 1, at least 10 conversations and 1 step")
    return experiment(args, sys.argv[1:] if argv is None else list(argv))


def experiment(args, words: list[str]) -> int:
    names = [n.strip() for n in args.conditions.split(",") if n.strip()]
    if "human" not in names or (bad := [n for n in names if n not in NAMES]):
        raise ValueError(f"--conditions {args.conditions}: use human, or {','.join(NAMES)}" + (f" (not {bad[0]})" if "human" in names else ""))
    home = Path(args.output) / "human"
    home.mkdir(parents=True, exist_ok=True)
    people, held = make_people(args, home)
    mixed, seeds = repeated(args, people), check_seeds(args)
    trained = {name: [train(args, home, name, seed, mixed if name == "human" else args.data) for seed in seeds] for name in names}
    results: dict[str, list[dict]] = {"before": [judged(args, home, args.checkpoint, people, held)] * len(seeds)}
    results |= {name: [judged(args, home, str(weights), people, held) for weights in paths] for name, paths in trained.items()}
    from dataset_pipeline import read_index
    index, rows, costs = read_index(str(people))["splits"]["train"], gains(results), prices(results)
    result = {"verdict": verdict(rows, costs), "seeds": args.seeds, "steps": args.steps, "batch_positions": args.batch_positions, "voices": voices_of(args), "people_hours": index["hours"],
              "people_turns": index["turns"], "share": 1 - turns_in(args.data) / turns_in(mixed), "gains": rows, "prices": costs,
              "losses": {name: [f["losses"] for f in found] for name, found in results.items()}, "weights": {name: [f["weights"] for f in found] for name, found in results.items()}}
    return verdicts.publish(args, NAME, words, result, body_of(result, results, rows, costs))


if __name__ == "__main__":
    sys.exit(main())
