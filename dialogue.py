"""A conversation as the judges take it: turns with words, voice and times.

Arrays and transcripts only. Comes from manifests (natural conversations) or from a folder that demo.py's batch mode wrote.

    talk = from_results("outputs/batch")[0]
    print(talk.id, [(turn.speaker, turn.text, turn.seconds) for turn in talk.turns])
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

RATE = 24000            # Hz


@dataclass(frozen=True)
class Turn:
    """One turn: who, what, audio (N,) float32 at RATE, start in the conversation (s; None: unknown), the mood asked for (None: none)."""
    speaker: str
    text: str
    audio: np.ndarray
    start: float | None = None
    mood: str | None = None
    facts: dict = field(default_factory=dict)           # what else is known: character, engine, mood_strength, ended, ...

    def __post_init__(self):
        if np.ndim(self.audio) != 1:
            raise ValueError(f"mono audio (N,) expected for a turn, got the shape {np.shape(self.audio)}: mix the channels first")

    @property
    def seconds(self) -> float:
        return len(self.audio) / RATE


@dataclass(frozen=True)
class Dialogue:
    """A conversation; turns stand in the order in which they begin."""
    id: str
    turns: tuple[Turn, ...]

    @property
    def speakers(self) -> list[str]:
        return list(dict.fromkeys(turn.speaker for turn in self.turns))

    @property
    def timed(self) -> bool:
        """Whether every turn has a start, so that gaps and overlaps can be told."""
        return bool(self.turns) and all(turn.start is not None for turn in self.turns)

    def of(self, speaker: str) -> list[int]:
        """Places of a speaker's turns."""
        return [i for i, turn in enumerate(self.turns) if turn.speaker == speaker]

    def with_turns(self, turns) -> Dialogue:
        return replace(self, turns=tuple(turns))


def fingerprint(audio: np.ndarray) -> str:
    """Name of this sound's contents, for caches: 24 hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(audio, dtype=np.float32).tobytes()).hexdigest()[:24]


# ----------------------------------------------------------------------------- reading

def from_supervisions(name: str, rows: list[dict], folder) -> Dialogue:
    """The supervisions of one conversation (see dataset_pipeline.read_supervisions) with their sound."""
    from audio_io import read_audio
    turns = []
    for row in sorted(rows, key=lambda r: r["start"]):
        custom = row["custom"]
        facts = {key: custom[key] for key in ("character", "engine", "mood_strength") if key in custom}
        facts["words"] = (custom.get("alignment") or {}).get("words")
        turns.append(Turn(row["speaker"], row["text"], read_audio(Path(folder) / custom["turn_audio"]), float(row["start"]), custom.get("mood"), facts))
    return Dialogue(name, tuple(turns))


def from_results(folder) -> list[Dialogue]:
    """What demo.py --mode batch wrote into `folder`. ValueError where there is no results.json or it is damaged."""
    from audio_io import read_audio
    folder = Path(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}: make it with python demo.py --mode batch --output {folder}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["conversations"]
        return [Dialogue(c["id"], tuple(Turn(t["speaker"], t["text"], read_audio(folder / t["audio"]), t.get("start"), t.get("mood"),
                                             {"ended": t.get("ended"), "first_audio_ms": t.get("first_audio_ms")}) for t in c["turns"])) for c in found]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): make it anew with python demo.py --mode batch --output {folder}") from None


def placed(talk: Dialogue, gap: float = 0.2) -> Dialogue:
    """The conversation with a start for every turn: those known, else `gap` seconds after the end of the turn before."""
    turns, clock = [], 0.0
    for number, turn in enumerate(talk.turns):
        start = turn.start if turn.start is not None else clock + (gap if number else 0.0)
        turns.append(replace(turn, start=start))
        clock = start + turn.seconds
    return talk.with_turns(turns)


def mixed(talk: Dialogue) -> np.ndarray:
    """The conversation as one sound (N,), every turn at its start (see placed)."""
    turns = placed(talk).turns
    first = min((t.start for t in turns), default=0.0)
    places = [int((t.start - first) * RATE) for t in turns]
    mix = np.zeros(max((p + len(t.audio) for p, t in zip(places, turns)), default=0), np.float32)
    for place, turn in zip(places, turns):
        mix[place:place + len(turn.audio)] += turn.audio
    return np.clip(mix, -1, 1)
