"""benchmark.py personal: does an adapter speak with a voice that the model never heard, and do other voices keep theirs?

Some minutes of one new voice (a character spoken by an engine of the default data, or `--recordings` of a person) train an
adapter through `train.py --lora`, as a user would. Then sentences of the test split are said without any audio before them,
by the model with and without its adapter; and turns of other characters, after their own voices, with both.
"""
from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import config
from benchmark_voice import load_talker, sampling_of, session_with_voices, weights_name, written_sentences
from measuring import hear, pick_turns, show, sound_of, summary, table

SIMILAR, KEPT = 0.85, 0.03            # bars: cosine of the new voice; how much other voices may lose
LENGTH = (6, 25)                      # words of a sentence: shorter ones say little about a voice
SPEAKER = 1                           # the assistant's tag, the one that demo.py speaks with
NAMES = {"source": "the voice itself, other sentences", "before": "the model", "after": "**with the adapter**"}


# ----------------------------------------------------------------------------- the new voice

def new_character(engine: str, seed: int):
    """A character that no collection has drawn: its name is of this benchmark."""
    import synthetic_conversations as synthetic
    return synthetic.draw_character(f"personal {seed}", engine, random.Random(f"personal voice {engine} {seed}"))


def texts_of(split: str, seed: int) -> list[str]:
    """Sentences of the written dialogues of a split in a drawn order, each once."""
    import synthetic_conversations as synthetic
    if split == "test":
        found = [s for part in written_sentences() for s in part]
    else:
        found = [turn["text"] for d in synthetic.dialogues()[split] for turn in d["turns"]]
    found = sorted({s for s in found if LENGTH[0] <= len(s.split()) <= LENGTH[1]})
    random.Random(f"personal texts {seed}").shuffle(found)
    return found


def record(who, folder: Path, minutes: float, seed: int) -> list:
    """Writes `minutes` of a character as numbered WAV files with their words beside them -> their sounds (N,)."""
    import synthetic_conversations as synthetic
    from audio_io import write_audio
    from tqdm import tqdm
    folder.mkdir(parents=True, exist_ok=True)
    sounds, seconds = [], 0.0
    with tqdm(total=round(minutes * 60), desc="recordings", unit="s") as bar:
        for number, text in enumerate(texts_of("train", seed)):
            if seconds >= minutes * 60:
                break
            sound = synthetic.speak(text, who, seed=seed + number).audio
            write_audio(folder / f"{number:04d}.wav", sound)
            (folder / f"{number:04d}.txt").write_text(text + "\n", encoding="utf-8")
            sounds.append(sound)
            seconds += len(sound) / 24000
            bar.update(round(len(sound) / 24000))
    return sounds


def person(folder: Path) -> list:
    """The sounds (N,) of a folder of recordings."""
    from audio_io import read_audio
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".wav", ".flac", ".mp3", ".ogg", ".opus"))
    if not files:
        raise ValueError(f"{folder} holds no recordings: name a folder of sound files with --recordings")
    return [read_audio(path) for path in files]


def train_adapter(args, base: Path, recordings: Path, output: Path) -> Path:
    """`train.py --lora` in a process of its own -> folder of the adapter. ValueError with its last line where it fails."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--lora", "--data", str(recordings), "--output", str(output), "--codec", args.codec,
               "--max_steps", str(args.steps), "--seed", str(args.seed), "--wandb", "disabled", "--samples", "0", "--init_from", str(base)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None if sys.stderr.isatty() else subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"train.py --lora failed: {((done.stderr or done.stdout or 'no message').strip().splitlines() or ['no message'])[-1]}")
    return output / "adapter"


# ----------------------------------------------------------------------------- measuring

def centre(sounds: list):
    """Mean voice (256,) of some sounds, of length 1; None where none can be judged."""
    import judges as judge
    import numpy as np
    found = [e for e in map(judge.speaker_embedding, sounds) if e is not None]
    if not found:
        return None
    mean = np.mean(found, 0)
    return mean / np.linalg.norm(mean)


def say_alone(talker, args, texts: list[str], voice) -> list[dict]:
    """Each text said in a new session without any audio before it."""
    from generation import Session
    from tqdm import tqdm
    model, codec, tokenizer = talker[:3]
    rows = []
    for number, text in enumerate(tqdm(texts, desc="without context", unit="turn")):
        session = Session(model, codec, tokenizer, sampling_of(args, number))
        rows.append(hear(session.say(SPEAKER, text).audio, text, voice=voice))
    return rows


def say_after(talker, args, picked: list) -> list[dict]:
    """Turns of other characters after their own voices, judged against these."""
    import judges as judge
    from benchmark_voice import contexts
    from tqdm import tqdm
    rows = []
    for number, (turns, index) in enumerate(tqdm(picked, desc="other voices", unit="turn")):
        speaker, text = turns[index]["custom"]["speaker_index"], turns[index]["text"]
        session = session_with_voices(talker, args.data, turns, index, sampling_of(args, number))
        own = judge.speaker_embedding(sound_of(args.data, contexts(turns, index)[speaker]))
        rows.append(hear(session.say(speaker, text).audio, text, mos=False, voice=own))
    return rows


def lost(before: list[dict], after: list[dict]) -> dict:
    """Mean loss of cosine between two runs over the same turns, with its interval."""
    import judges as judge
    return judge.bootstrap_interval([None if None in (a["voice"], b["voice"]) else a["voice"] - b["voice"] for a, b in zip(before, after)])


def bench_personal(args) -> tuple[dict, str]:
    """Some minutes of a new voice learnt by an adapter, sentences without context, and what other voices lose."""
    import lora
    if args.minutes <= 0 or args.steps < 1:
        raise ValueError(f"--minutes {args.minutes}, --steps {args.steps}: use more than 0 and at least 1")
    talker, work = load_talker(args), Path(args.save)
    texts, picked = texts_of("test", args.seed)[:args.turns], pick_turns(args.data, "test", args.turns, args.seed, same_speaker_before=True)
    if args.recordings:
        folder, sounds, others = Path(args.recordings), person(Path(args.recordings)), None
    else:
        import synthetic_conversations as synthetic
        who, folder = new_character(args.engine, args.seed), work / f"recordings_{args.engine}_{args.seed}"
        sounds = record(who, folder, args.minutes, args.seed)
        others = [synthetic.speak(text, who, seed=args.seed + number).audio for number, text in enumerate(texts)]
    voice = centre(sounds)
    rows = {"source": [hear(sound, text, voice=voice) for sound, text in zip(others or [], texts)], "before": say_alone(talker, args, texts, voice)}
    kept = {"before": say_after(talker, args, picked)}
    adapter = train_adapter(args, talker[3], folder, work / "adapter")
    lora.load(talker[0], adapter)
    rows["after"], kept["after"] = say_alone(talker, args, texts, voice), say_after(talker, args, picked)
    result = {"weights": weights_name(talker[3]), "voice_of": args.recordings or args.engine, "seconds": sum(map(len, sounds)) / 24000, "steps": args.steps,
              "adapter_mb": (adapter / lora.WEIGHTS).stat().st_size / 1e6, "conditions": {k: summary(v) for k, v in rows.items() if v},
              "other_voices": {k: summary(v) for k, v in kept.items()}, "lost": lost(kept["before"], kept["after"])}
    result["bars"] = bars(result)
    return result, body_of(result)


def bars(result: dict) -> list[dict]:
    after, gone = result["conditions"]["after"].get("voice"), result["lost"]["mean"]
    return [{"what": "the new voice without context, cosine", "bar": f"at least {SIMILAR}", "value": after and after["mean"], "met": bool(after) and after["mean"] >= SIMILAR},
            {"what": "what other voices lose, cosine", "bar": f"at most {KEPT}", "value": gone, "met": gone is not None and gone <= KEPT}]


def body_of(result: dict) -> str:
    def row(name: str, part: dict) -> list[str]:
        voice, error = part.get("voice", {}), part["wer"]
        return [name, str(part["n"]), show(voice.get("mean")), f"{show(error['mean'], 1, True)} ({show(error['low'], 1, True)} to {show(error['high'], 1, True)})",
                show(part.get("mos", {}).get("mean"))]
    head = ["", "sentences", "cosine", "word error, %", "DistillMOS"]
    body = table(head, [row(NAMES[k], part) for k, part in result["conditions"].items()])
    body += (f"\n\n{show(result['seconds'] / 60, 1)} minutes of a voice that the model never heard ({Path(result['voice_of']).name}), {result['steps']} steps of `train.py --lora`, an adapter of "
             f"{show(result['adapter_mb'], 1)} MB; sentences of the test split said without any audio before them. Cosine: to the mean voice of the recordings.\n\n"
             "Turns of other characters after their own voices, cosine to these:\n\n")
    body += table(head, [row(NAMES[k], part) for k, part in result["other_voices"].items()])
    said = {True: "met", False: "**missed**"}
    return body + "\n\n" + table(["bar", "", "measured", ""], [[b["what"], b["bar"], show(b["value"], 3), said[b["met"]]] for b in result["bars"]])


def add_flags(part) -> None:
    config.add_flags(part, config.SamplingConfig, only=("temperature", "top_k", "depth_temperature"))
    part.add_argument("--engine", default="hibari", choices=("hibari", "kokoro"), help="who speaks the new voice; default hibari")
    part.add_argument("--recordings", default="", help="folder of one person's recordings instead")
    part.add_argument("--minutes", type=float, default=5.0, help="of the new voice; default 5")
    part.add_argument("--steps", type=int, default=50, help="steps of train.py --lora; default 50: more of them cost other voices theirs")
    part.add_argument("--save", default="outputs/benchmark/personal", help="folder for recordings and adapter; default outputs/benchmark/personal")
