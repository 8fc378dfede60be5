"""Known ways to spoil a conversation, so that a metric can show what it notices and what it does not.

Every corruption takes a Dialogue and a numpy Generator and returns a new Dialogue; the old one stays as it was. Words,
voices and times that a corruption does not name are kept. Pitch, voice and pace are changed with WORLD (pyworld);
`vocoded` runs the same vocoder and changes nothing, so that what the vocoder itself costs can be told apart.

    from corruptions import CORRUPTIONS
    worse = CORRUPTIONS["flat pitch"](talk, numpy.random.default_rng(0))
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from config import MOODS
from dialogue import RATE, Dialogue, Turn, placed

PERIOD = 0.005                  # s between WORLD's frames


# ----------------------------------------------------------------------------- the vocoder

def _world():
    import warnings
    try:
        with warnings.catch_warnings():                                    # it imports the deprecated pkg_resources
            warnings.simplefilter("ignore")
            import pyworld
    except ImportError:
        raise ValueError("the package pyworld is not installed: run python setup_environment.py") from None
    return pyworld


def analyse(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f0 (T,) in Hz (0: unvoiced), spectral envelope and aperiodicity (T, F), every PERIOD (WORLD: dio, stonemask, cheaptrick, d4c)."""
    pyworld, sound = _world(), np.ascontiguousarray(audio, dtype=np.float64)
    f0, times = pyworld.dio(sound, RATE, f0_floor=60.0, f0_ceil=500.0, frame_period=1000 * PERIOD)
    f0 = pyworld.stonemask(sound, f0, times, RATE)
    return f0, pyworld.cheaptrick(sound, f0, times, RATE), pyworld.d4c(sound, f0, times, RATE)


def synthesise(f0: np.ndarray, envelope: np.ndarray, aperiodicity: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """WORLD parameters -> audio (N,) float32; at the level of `like` where it is given."""
    audio = _world().synthesize(np.ascontiguousarray(f0), np.ascontiguousarray(envelope), np.ascontiguousarray(aperiodicity), RATE, 1000 * PERIOD)
    audio = np.nan_to_num(audio)
    if like is not None:
        audio *= _rms(like) / max(_rms(audio), 1e-9)
    return np.clip(audio, -1, 1).astype(np.float32)


def _rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.asarray(audio, dtype=np.float64) ** 2))) if len(audio) else 0.0


def _too_short(audio: np.ndarray) -> bool:
    return len(audio) < 0.2 * RATE or _rms(audio) < 1e-4


def _middle(f0: np.ndarray) -> float:
    return float(np.median(np.log(f0[f0 > 0])))


def _warped(rows: np.ndarray, factor: float) -> np.ndarray:
    """Spectra (T, F) with every frequency multiplied by `factor`: another length of the vocal tract."""
    grid = np.arange(rows.shape[1])
    place = np.minimum(grid / factor, rows.shape[1] - 1)
    low = place.astype(int)
    part = place - low
    return rows[:, low] * (1 - part) + rows[:, np.minimum(low + 1, rows.shape[1] - 1)] * part


def reshape(audio: np.ndarray, semitones: float = 0.0, range_: float = 1.0, pace: float = 1.0, tract: float = 1.0, decibels: float = 0.0) -> np.ndarray:
    """Audio with its pitch moved, its pitch movement scaled, said `pace` times as fast, by a vocal tract whose frequencies are multiplied by `tract`."""
    if _too_short(audio):
        return audio
    f0, envelope, noise = analyse(audio)
    if (f0 > 0).any():
        middle, away = _middle(f0), np.where(f0 > 0, np.log(np.maximum(f0, 1.0)), 0.0)
        f0 = np.where(f0 > 0, np.exp(middle + (away - middle) * range_ + semitones * np.log(2) / 12), 0.0)
    if pace != 1.0:
        take = np.minimum((np.arange(int(len(f0) / pace)) * pace).astype(int), len(f0) - 1)
        f0, envelope, noise = f0[take], envelope[take], noise[take]
    if tract != 1.0:
        envelope, noise = _warped(envelope, tract), _warped(noise, tract)
    return np.clip(synthesise(f0, envelope, noise, audio) * 10 ** (decibels / 20), -1, 1).astype(np.float32)


# ----------------------------------------------------------------------------- on every turn

def _each(talk: Dialogue, change) -> Dialogue:
    """The conversation with change(turn, its place) as the sound of every turn; gaps between turns stay as they were."""
    return retimed(talk, [change(turn, i) for i, turn in enumerate(talk.turns)])


def retimed(talk: Dialogue, sounds: list[np.ndarray]) -> Dialogue:
    """New sounds for the turns; where lengths change, later turns move so that every gap is kept."""
    turns, shift, before = [], 0.0, None
    for turn, sound in zip(talk.turns, sounds):
        if before is not None:
            shift += (len(before[1]) - len(before[0].audio)) / RATE
        turns.append(replace(turn, audio=sound, start=None if turn.start is None else turn.start + shift))
        before = turn, sound
    return talk.with_turns(turns)


def vocoded(talk: Dialogue, rng) -> Dialogue:
    """Through the vocoder and back, nothing changed: the control of all that use it."""
    return _each(talk, lambda turn, i: reshape(turn.audio))


def noise(talk: Dialogue, rng, snr_db: float = 5.0) -> Dialogue:
    """White noise under every turn."""
    return _each(talk, lambda turn, i: (turn.audio + rng.normal(0, max(1e-9, _rms(turn.audio)) * 10 ** (-snr_db / 20), len(turn.audio))).astype(np.float32))


def pieces(talk: Dialogue, rng, seconds: float = 0.1) -> Dialogue:
    """Every turn in pieces of 0.1 s, in random order."""
    def change(turn: Turn, i: int) -> np.ndarray:
        parts = np.array_split(turn.audio, max(2, int(turn.seconds / seconds)))
        return np.concatenate([parts[k] for k in rng.permutation(len(parts))])
    return _each(talk, change)


def flat_pitch(talk: Dialogue, rng) -> Dialogue:
    """Every turn on one note, its own median."""
    return _each(talk, lambda turn, i: reshape(turn.audio, range_=0.0))


def exchanged_pitch(talk: Dialogue, rng) -> Dialogue:
    """Every turn with the melody of another turn, stretched to its length, at its own level and range."""
    found = [None if _too_short(t.audio) else analyse(t.audio) for t in talk.turns]
    usable = [i for i, parts in enumerate(found) if parts is not None and (parts[0] > 0).sum() > 20]
    if len(usable) < 2:
        return talk
    donor = dict(zip(usable, np.roll(usable, rng.integers(1, len(usable)))))

    def change(turn: Turn, i: int) -> np.ndarray:
        if i not in donor:
            return turn.audio
        f0, envelope, aperiodicity = found[i]
        other = found[donor[i]][0]
        voiced = np.flatnonzero(other)
        line = np.interp(np.linspace(voiced[0], voiced[-1], len(f0)), voiced, np.log(other[voiced]))       # of the other turn, through its gaps
        own = np.log(f0[f0 > 0])
        line = (line - np.median(line)) / max(1e-6, line.std()) * own.std() + np.median(own)
        return synthesise(np.where(f0 > 0, np.exp(line), 0.0), envelope, aperiodicity, turn.audio)
    return _each(talk, change)


def uneven_pace(talk: Dialogue, rng, seconds: float = 0.4) -> Dialogue:
    """Pieces of 0.4 s, each said at its own pace, from half to twice as fast."""
    def change(turn: Turn, i: int) -> np.ndarray:
        if _too_short(turn.audio):
            return turn.audio
        f0, envelope, aperiodicity = analyse(turn.audio)
        paces = np.repeat(np.exp(rng.uniform(np.log(0.5), np.log(2.0), 1 + int(len(f0) * PERIOD / seconds))), int(seconds / PERIOD))[:len(f0)]
        times = np.cumsum(1 / paces)
        take = np.minimum(np.searchsorted(times, np.arange(int(times[-1]))), len(f0) - 1)
        return synthesise(f0[take], envelope[take], aperiodicity[take], turn.audio)
    return _each(talk, change)


def voice_changes(talk: Dialogue, rng) -> Dialogue:
    """The second half of every turn in another voice: 4 semitones and a sixth of the vocal tract away."""
    def change(turn: Turn, i: int) -> np.ndarray:
        up = bool(rng.integers(2))
        half = len(turn.audio) // 2
        return np.concatenate([turn.audio[:half], reshape(turn.audio[half:], 4.0 if up else -4.0, tract=1.17 if up else 1 / 1.17)])
    return _each(talk, change)


def swapped_moods(talk: Dialogue, rng) -> Dialogue:
    """The moods of each speaker's turns change places in the sound, not in the labels. Turns without a mood stay as they are."""
    new = {}
    for speaker in talk.speakers:
        places = [i for i in talk.of(speaker) if talk.turns[i].mood in MOODS]
        order = _deranged([talk.turns[i].mood for i in places], rng)
        new |= {i: talk.turns[places[k]] for i, k in zip(places, order)}

    def change(turn: Turn, i: int) -> np.ndarray:
        other = new.get(i)
        if other is None or other.mood == turn.mood:
            return turn.audio
        old, shape = _shape(turn), _shape(other)
        level, spread, loud, pace = shape - old
        return reshape(turn.audio, level, float(np.exp(spread)), float(np.exp(pace)), decibels=loud)
    return _each(talk, change)


def _shape(turn: Turn) -> np.ndarray:
    """(semitones, log range, dB, log pace) of a turn's mood: the shapes that the default data gives to its moods."""
    from moods import MOOD_PROSODY
    return np.array(MOOD_PROSODY[turn.mood]) * turn.facts.get("mood_strength", 0.8)


def _deranged(moods: list[str], rng, tries: int = 50) -> list[int]:
    """The order that leaves the fewest turns with the mood that they had."""
    orders = [rng.permutation(len(moods)) for _ in range(tries)]
    return min(orders, key=lambda order: sum(moods[i] == moods[k] for i, k in enumerate(order))).tolist() if moods else []


# ----------------------------------------------------------------------------- on the conversation

def swapped_speakers(talk: Dialogue, rng) -> Dialogue:
    """From half-way on the first two speakers answer in each other's voice (the sound stays, the names change places)."""
    if len(talk.speakers) < 2:
        return talk
    a, b = talk.speakers[:2]
    other, half = {a: b, b: a}, len(talk.turns) // 2
    return talk.with_turns(t if i < half else replace(t, speaker=other.get(t.speaker, t.speaker)) for i, t in enumerate(talk.turns))


def drifting_voice(talk: Dialogue, rng, semitones: float = 5.0, tract: float = 1.22) -> Dialogue:
    """Every voice wanders, turn by turn, by 5 semitones and a fifth of the vocal tract up to the end."""
    up = {speaker: bool(rng.integers(2)) for speaker in talk.speakers}
    steps = {i: k / max(1, len(talk.of(s)) - 1) for s in talk.speakers for k, i in enumerate(talk.of(s))}

    def change(turn: Turn, i: int) -> np.ndarray:
        sign = 1.0 if up[turn.speaker] else -1.0
        return turn.audio if steps[i] == 0 else reshape(turn.audio, sign * semitones * steps[i], tract=tract ** (sign * steps[i]))
    return _each(talk, change)


def shuffled_turns(talk: Dialogue, rng) -> Dialogue:
    """The turns of each speaker in another order, sound, words and mood together; who speaks when, and every gap, stays."""
    order = list(range(len(talk.turns)))
    for speaker in talk.speakers:
        places = talk.of(speaker)
        for i, k in zip(places, rng.permutation(places)):
            order[i] = int(k)
    slots = placed(talk)
    moved = [replace(talk.turns[k], start=slots.turns[i].start) for i, k in enumerate(order)]
    gaps = [b.start - a.start - a.seconds for a, b in zip(slots.turns, slots.turns[1:])]
    return _with_gaps(talk.with_turns(moved), gaps)


def _with_gaps(talk: Dialogue, gaps: list[float]) -> Dialogue:
    turns, clock = [], talk.turns[0].start or 0.0
    for i, turn in enumerate(talk.turns):
        start = clock if i == 0 else max(turns[-1].start, clock + gaps[i - 1])
        turns.append(replace(turn, start=start))
        clock = start + turn.seconds
    return talk.with_turns(turns)


def _gaps(talk: Dialogue) -> list[float]:
    turns = placed(talk).turns
    return [b.start - a.start - a.seconds for a, b in zip(turns, turns[1:])]


def stretched_gaps(talk: Dialogue, rng) -> Dialogue:
    """Every answer comes 0.5 to 1.5 s later."""
    return _with_gaps(placed(talk), [gap + rng.uniform(0.5, 1.5) for gap in _gaps(talk)])


def rushed_turns(talk: Dialogue, rng) -> Dialogue:
    """Every answer comes 0.5 to 1.0 s earlier: people talk over each other."""
    return _with_gaps(placed(talk), [gap - rng.uniform(0.5, 1.0) for gap in _gaps(talk)])


def wrong_words(talk: Dialogue, rng) -> Dialogue:
    """Every turn with the text of another turn beside it; the sound stays."""
    count = len(talk.turns)
    shift = int(rng.integers(1, count)) if count > 1 else 0
    return talk.with_turns(replace(t, text=talk.turns[(i + shift) % count].text) for i, t in enumerate(talk.turns))


CORRUPTIONS = {"vocoded": vocoded, "noise": noise, "pieces": pieces, "wrong words": wrong_words, "swapped speakers": swapped_speakers, "drifting voice": drifting_voice,
               "voice changes": voice_changes, "flat pitch": flat_pitch, "exchanged pitch": exchanged_pitch, "uneven pace": uneven_pace,
               "swapped moods": swapped_moods, "shuffled turns": shuffled_turns, "stretched gaps": stretched_gaps, "rushed turns": rushed_turns}
