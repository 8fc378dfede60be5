"""A folder of one person's recordings -> data to train on: cut, written down, collected, tokenised.

What train.py does by itself when --data names such a folder. NAME.txt beside NAME.wav is taken as what is said; where
there is none, the recogniser of `judges.py` writes it. It also says when each word is spoken, which is how the
model learns where in the text a voice is. Nothing is written into the folder itself: the work lies in FOLDER-prepared.
"""
from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

import collect_data
from audio_io import SAMPLE_RATE, read_audio, write_audio
from checkpoint import load_codec
from dataset_pipeline import SPLITS, tokenise
from people import AUDIO_SUFFIXES
from segmentation import listen, word_times
from text_tokenizer import normalise

SHORTEST, LONGEST = 1.0, 12.0    # seconds of a turn; without a transcript a longer recording is cut at its quietest places
FEWEST = 3                       # turns: one to learn from, one to validate with, one to test with


def is_recordings(folder) -> bool:
    """A folder with audio that nothing has been made of yet."""
    folder = Path(folder)
    made = any((folder / name).exists() for name in ("tokens", "manifests", "index.jsonl"))
    return folder.is_dir() and not made and any(p.suffix.lower() in AUDIO_SUFFIXES for p in folder.rglob("*"))


def cut(audio: np.ndarray, longest: float = LONGEST) -> list[np.ndarray]:
    """audio (n,) -> pieces of at most `longest` seconds, each cut in the quietest 0.3 s of its second half."""
    pieces, limit, step, width = [], int(longest * SAMPLE_RATE), SAMPLE_RATE // 50, int(0.3 * SAMPLE_RATE)
    while len(audio) > limit:
        places = range(limit // 2, limit - width, step)
        quietest = min(places, key=lambda at: float(np.square(audio[at:at + width]).mean())) + width // 2
        pieces.append(audio[:quietest])
        audio = audio[quietest:]
    return [*pieces, audio]


def heard_words(audio: np.ndarray) -> list[tuple[str, float, float]]:
    """What the recogniser hears: (word, start, end in seconds)."""
    return listen(audio, SAMPLE_RATE).words


# ----------------------------------------------------------------------------- the steps

def _turns(folder: Path):
    """Yields (name, audio, text or None) of every turn."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
        audio, beside = read_audio(path), path.with_suffix(".txt")
        name = re.sub(r"[^A-Za-z0-9]+", "-", path.relative_to(folder).with_suffix("").as_posix())
        if beside.is_file():
            yield name, audio, beside.read_text(encoding="utf-8")
        else:
            yield from ((f"{name}-{k:03d}", piece, None) for k, piece in enumerate(cut(audio)))


def write_down(folder: Path, work: Path, progress: bool = True) -> tuple[dict[str, list], list[str]]:
    """Turns as FLAC and text into work/turns; (word times of each, names of those left out)."""
    times, left = {}, []
    shutil.rmtree(work, ignore_errors=True)
    for name, audio, text in tqdm(list(_turns(folder)), desc="listening", unit="turn", disable=not progress):
        heard = heard_words(audio) if len(audio) >= SHORTEST * SAMPLE_RATE else []
        try:
            said = normalise(text if text is not None else " ".join(word for word, _, _ in heard))
        except ValueError:                                                     # nothing was said, or nothing speakable
            said = ""
        if not said or len(audio) < SHORTEST * SAMPLE_RATE:
            left.append(name)
            continue
        write_audio(work / f"{name}.flac", audio)
        (work / f"{name}.txt").write_text(said, encoding="utf-8")
        times[name] = word_times(said, heard)
    return times, left


def _add_word_times(prepared: Path, times: dict[str, list]) -> None:
    for split in SPLITS:
        path = prepared / "manifests" / split / "supervisions.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        for line in lines:
            if words := times.get(line["recording_id"]):
                line["custom"]["alignment"] = {"phones": "", "words": words}
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def prepare(folder, codec_path, say=print) -> Path:
    """Everything that makes the folder trainable, each step said before it; returns the folder to train on. ValueError where there is too little."""
    folder = Path(folder)
    prepared = folder.with_name(f"{folder.name}-prepared")
    if (prepared / "tokens" / "index.json").is_file():
        say(f"{folder} was prepared before: using {prepared} (delete it after changing the recordings)")
        return prepared
    codec = load_codec(codec_path)
    say(f"1 of 3: cutting the recordings in {folder} into turns and writing down what is said (where no .txt does)")
    times, left = write_down(folder, prepared / "turns")
    if left:
        say(f"left out, nothing heard or shorter than {SHORTEST:g} s: {', '.join(left[:5])}{f' and {len(left) - 5} more' if len(left) > 5 else ''}")
    if len(times) < FEWEST:
        raise ValueError(f"{folder} gives {len(times)} usable turns, at least {FEWEST} are needed (a few minutes are better): add recordings")
    say(f"2 of 3: collecting {len(times)} turns into {prepared}")
    collect_data.collect("--source", "folder", "--path", str(prepared / "turns"), "--output", str(prepared), "--target_hours", "1e5", "--no_filters", "--listen", "never", "--fresh")
    _add_word_times(prepared, times)
    say("3 of 3: turning the audio into codec tokens")
    tokenise(prepared, codec)
    return prepared
