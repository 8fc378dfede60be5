"""What every bench shares: test turns, one judged utterance, summaries with intervals, tables.

Imported by benchmark.py and benchmark_codec.py; knows no model.
"""
from __future__ import annotations

import random
import sys
from pathlib import Path

WORDS = (4, 25)             # length of the test sentences, in words
SECONDS = (1.0, 12.0)


# ----------------------------------------------------------------------------- numbers and tables

def show(value, digits: int = 2, percent: bool = False) -> str:
    """A number, or {mean, low, high} with its interval; a dash where it was not measured."""
    if isinstance(value, dict):
        inside = f" ({show(value['low'], digits, percent)} to {show(value['high'], digits, percent)})" if value.get("low") is not None else ""
        return show(value.get("mean"), digits, percent) + inside
    return "-" if value is None else f"{100 * value:.{max(0, digits - 1)}f} %" if percent else f"{value:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def rounded(value, digits: int = 4):
    """Floats of a nested result to `digits` places; not-a-number becomes null."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    if isinstance(value, float):
        return round(value, digits) if value == value and abs(value) != float("inf") else None
    return value


# ----------------------------------------------------------------------------- test turns

def pick_turns(data, split: str, count: int, seed: int, dialogues: bool = True, same_speaker_before: bool = False) -> list[tuple[list[dict], int]]:
    """`count` turns as (supervisions of the conversation, index), drawn evenly and repeatably.

    dialogues: not the single coverage sentences. same_speaker_before: the speaker has an earlier turn that can be heard as a prompt.
    """
    from dataset_pipeline import read_supervisions

    def fits(turn, words=WORDS):
        return SECONDS[0] <= turn["duration"] <= SECONDS[1] and words[0] <= len(turn["text"].split()) <= words[1]
    found = []
    for turns in read_supervisions(Path(data), split).values():
        for i, turn in enumerate(turns):
            before = [t for t in turns[:i] if t["speaker"] == turn["speaker"] and fits(t)]
            if fits(turn) and (len(turns) > 1 or not dialogues) and (before or not same_speaker_before):
                found.append((turns, i))
    if not found:
        raise ValueError(f"the {split} split of {data} has no fitting turn: collect more (python collect_data.py --output {data} --target_hours 1)")
    if len(found) < count:
        print(f"note: only {len(found)} fitting turns in the {split} split of {data}, {count} were asked for", file=sys.stderr)
    return random.Random(seed).sample(found, min(count, len(found)))


def sound_of(data, turn: dict):
    """Audio (N,) of one supervision at 24 kHz."""
    from audio_io import read_audio
    return read_audio(Path(data) / turn["custom"]["turn_audio"])


def hear(audio, text: str, mos: bool = True, voice=None) -> dict:
    """One judged utterance: said, heard, mos, and the voice's cosine to the embedding `voice`."""
    import judges as judge
    row = {"said": text, "heard": judge.transcribe(audio), "mos": judge.distill_mos(audio) if mos else None}
    return row if voice is None else row | {"voice": judge.speaker_similarity(audio, voice)}


def summary(rows: list[dict]) -> dict:
    """Corpus word error with interval, means of what else was judged, count of utterances more than half wrong."""
    import judges as judge
    said, heard = [r["said"] for r in rows], [r["heard"] for r in rows]
    rate = judge.word_error_rate(said, heard)
    out = {"n": len(rows), "words": rate["words"], "wer": judge.word_error_interval(said, heard), "over_half_wrong": rate["over_half"],
           "deletions": rate["deletions"], "insertions": rate["insertions"], "substitutions": rate["substitutions"],
           "cer": judge.character_error_rate(said, heard)["cer"]}
    for key in ("mos", "voice", "pesq", "stoi"):
        if any(r.get(key) is not None for r in rows):
            out[key] = judge.bootstrap_interval([r.get(key) for r in rows])
    return out


def percentiles(values: list) -> dict:
    import numpy as np
    values = [v for v in values if v is not None]
    return {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95))} if values else {"p50": None, "p95": None}


def paired(rows: list[dict], one: str, other: str) -> dict:
    """Word error of `one` minus that of `other` on the same sentences, with its interval."""
    import judges as judge

    def errors(row):
        found = judge.word_errors(row["said"], row["heard"])
        return found["substitutions"] + found["deletions"] + found["insertions"], found["words"]
    counts = [(errors(row[one]), errors(row[other])) for row in rows]
    return judge.bootstrap_interval([a[0] - b[0] for a, b in counts], weights=[a[1] for a, _ in counts])
