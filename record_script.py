"""Record a script with the microphone: a line is shown, read aloud, heard to its end, kept or taken again.

What `python collect_data.py --source record` does. The takes lie as FOLDER/session-NN/NNNN_me.flac with their text beside them, ten
lines to a session, and are collected like any folder of recordings. Lines that have a take are not asked for again.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import audio_io
import segmentation
import text_tokenizer
from runtime import ROOT

LINES, WORDS = 100, (5, 16)          # of the default script, and of one of its lines
SESSION = 10                         # lines that make one conversation
PATIENCE, LONGEST = 1.2, 30.0        # seconds of silence that end a take; of a take
KEPT_SILENCE = 0.2                   # seconds before and after the speech
LOUD, QUIET = 0.98, 0.05             # peaks at which a take is too loud or too quiet


def script_lines(path: str = "") -> list[str]:
    """The lines of a file, or sentences drawn evenly from the written dialogues. ValueError without any, or for one that cannot be spoken."""
    if path:
        if not Path(path).is_file():
            raise ValueError(f"there is no script {path}: check --script")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    else:
        turns = [t["text"] for file in sorted((ROOT / "assets/dialogues").glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines() for t in json.loads(line)["turns"]]
        fitting = list(dict.fromkeys(t for t in turns if WORDS[0] <= len(t.split()) <= WORDS[1]))
        lines = fitting[::max(1, len(fitting) // LINES)][:LINES]
    if not lines:
        raise ValueError(f"the script {path or 'of the dialogues'} has no lines: check --script")
    for number, line in enumerate(lines, 1):
        try:
            text_tokenizer.normalise(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    return lines


def take(microphone, longest: float = LONGEST) -> np.ndarray:
    """One take (n,) at 24 kHz: from the opened microphone until PATIENCE seconds of silence follow speech; [] where nobody spoke."""
    cfg, chunks, seconds, checked, spans = segmentation.SegmentationConfig(), [], 0.0, 0.0, []
    rate = audio_io.SAMPLE_RATE
    for chunk in microphone:
        chunks.append(np.asarray(chunk, np.float32))
        seconds += len(chunk) / rate
        if seconds - checked >= 0.4:
            checked = seconds
            spans = segmentation.find_speech(audio_io.resample(np.concatenate(chunks), rate, segmentation.RATE), cfg)
            if spans and seconds - spans[-1].end > PATIENCE:
                break
        if seconds >= longest:
            break
    audio = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    spans = segmentation.find_speech(audio_io.resample(audio, rate, segmentation.RATE), cfg) if len(audio) else []
    if not spans:
        return audio[:0]
    first, last = max(0.0, spans[0].start - KEPT_SILENCE), spans[-1].end + KEPT_SILENCE
    return audio[int(first * rate):int(last * rate)]


def complaint(audio: np.ndarray) -> str:
    """What is wrong with a take, in words for who read it; "" where nothing is."""
    if not len(audio):
        return "nothing was heard"
    peak = float(np.abs(audio).max())
    return "too loud: go back from the microphone" if peak >= LOUD else "very quiet: come nearer" if peak < QUIET else ""


def place_of(folder: Path, number: int) -> Path:
    return folder / f"session-{number // SESSION:02d}" / f"{number:04d}_me.flac"


def record(lines: list[str], folder: Path, microphone=audio_io.Microphone, ask=input, say=print) -> int:
    """Record what has no take yet; returns the number of lines that have one. Ends early at q."""
    for number, line in enumerate(lines):
        path = place_of(folder, number)
        if path.is_file() and path.with_suffix(".txt").is_file():
            continue
        if not _record_line(f"{number + 1} of {len(lines)}: {line}", line, path, microphone, ask, say):
            break
    made = sum(place_of(folder, n).is_file() for n in range(len(lines)))
    if not made:
        raise ValueError("nothing was recorded: run it again when you are ready, or use --source folder with recordings")
    return made


def _record_line(title: str, line: str, path: Path, microphone, ask, say) -> bool:
    """False at q."""
    while True:
        say(f"\n{title}")
        answer = ask("Enter: record, s: skip, q: enough > ").strip().lower()
        if answer in ("q", "s"):
            return answer == "s"
        with microphone() as opened:
            audio = take(opened)
        wrong = complaint(audio)
        say(f"{len(audio) / audio_io.SAMPLE_RATE:.1f} s" + (f"; {wrong}" if wrong else ""))
        if not len(audio) or ask("Enter: keep, r: again > ").strip().lower() == "r":
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(line, encoding="utf-8")
        audio_io.write_audio(path, audio)
        return True
