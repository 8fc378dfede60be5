"""Who speaks when: speech segments, gaps and overlaps, and decisions that a turn has ended.

Numbers only: no model, no text. Times are seconds, audio is (N,) at `rate` Hz.

The human reference is a logistic distribution of floor-transfer offsets (start of the next speaker less end of the one
before) with median 0.2 s and 30 % of offsets below zero. Both are what Levinson and Torreira report for telephone
conversations in their review of timing in turn-taking (Frontiers in Psychology 6:731, 2015); they also fix its scale. As
a check, that distribution's overlaps last 0.21 s in the median and 0.28 s in the mean, where the same paper gives 0.205
and 0.275 s. These four figures are quoted from memory, not from the paper at hand: check them before you cite them.
"""
from __future__ import annotations

import functools
import math

import numpy as np

FRAME = 0.01                    # s
IPU_GAP = 0.2                   # s of silence that part two inter-pausal units (FIELD practice: fixed)
BELOW_PEAK = 35.0               # dB below the loudest frame that still count as speech
ABOVE_FLOOR = 6.0               # dB above the quietest frames, where noise lies under everything
MEDIAN_OFFSET, OVERLAPPING = 0.2, 0.30
SCALE = MEDIAN_OFFSET / math.log((1 - OVERLAPPING) / OVERLAPPING)           # of the logistic distribution, s
TOLERANCE = 0.3                 # s of Wasserstein distance at which the flow score falls to 1/e
BEFORE, AFTER = 0.25, 3.0       # s: a decision matches an end from BEFORE it until AFTER it or the next event


# ----------------------------------------------------------------------------- speech segments

def frame_levels(audio: np.ndarray, rate: int) -> np.ndarray:
    """Level of every 10 ms in dB of full scale, (T,), -120 for digital silence."""
    step = int(rate * FRAME)
    frames = np.asarray(audio, dtype=np.float64)[:len(audio) // step * step].reshape(-1, step)
    return 10 * np.log10(np.maximum(np.mean(frames ** 2, 1), 1e-12)) if len(frames) else np.zeros(0)


def speech_mask(audio: np.ndarray, rate: int) -> np.ndarray:
    """Which 10 ms hold speech, (T,) bool: within BELOW_PEAK of the loudest, and above the noise where there is any."""
    levels = frame_levels(audio, rate)
    if not len(levels) or levels.max() < -70:
        return np.zeros(len(levels), bool)
    floor = np.percentile(levels, 5) + ABOVE_FLOOR
    threshold = max(levels.max() - BELOW_PEAK, min(floor, levels.max() - 20.0))
    smooth = np.convolve(levels > threshold, np.ones(3) / 3, "same") > 0.5                # no single clicks, no single holes
    return smooth


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[first, past the last) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def speech_segments(audio: np.ndarray, rate: int, gap: float = IPU_GAP, shortest: float = 0.05) -> list[tuple[float, float]]:
    """Inter-pausal units [(t0, t1), ...]: speech with no silence of `gap` seconds or more inside. [] for silence."""
    units: list[list[float]] = []
    for a, b in runs(speech_mask(audio, rate)):
        t0, t1 = a * FRAME, b * FRAME
        if units and t0 - units[-1][1] < gap:
            units[-1][1] = t1
        else:
            units.append([t0, t1])
    return [(a, b) for a, b in units if b - a >= shortest]


# ----------------------------------------------------------------------------- offsets

def floor_transfers(turns: list[tuple[str, float, float]]) -> list[float]:
    """Offsets (s) at every change of speaker of [(speaker, t0, t1), ...] in order; negative: overlap."""
    ordered = sorted(turns, key=lambda t: t[1])
    return [b[1] - a[2] for a, b in zip(ordered, ordered[1:]) if a[0] != b[0]]


def human_share_below(offset):
    """Share of human offsets below `offset` (s)."""
    return 1 / (1 + np.exp(-(np.asarray(offset, dtype=np.float64) - MEDIAN_OFFSET) / SCALE))


def human_offsets(count: int) -> np.ndarray:
    """`count` evenly spaced quantiles (s) of the human distribution."""
    share = (np.arange(count) + 0.5) / count
    return MEDIAN_OFFSET + SCALE * np.log(share / (1 - share))


def distance_to_human(offsets, grid: int = 400) -> float:
    """Wasserstein-1 distance (s) between the offsets and the human distribution."""
    found = np.sort(np.asarray(offsets, dtype=np.float64))
    place = np.minimum((np.arange(grid) + 0.5) / grid * len(found), len(found) - 1).astype(int)
    return float(np.mean(np.abs(found[place] - human_offsets(grid))))


@functools.lru_cache(maxsize=64)
def distance_by_chance(count: int, draws: int = 400, seed: int = 0) -> float:
    """Mean distance (s) of `count` offsets that people could have made: what a perfect talker would be charged for a small sample."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(1e-6, 1 - 1e-6, (draws, count))
    return float(np.mean([distance_to_human(row) for row in MEDIAN_OFFSET + SCALE * np.log(share / (1 - share))]))


def flow_score(offsets: list[float]) -> float | None:
    """exp(-excess / TOLERANCE), excess = distance to the human distribution beyond what so few offsets have by chance; None under 3 offsets."""
    if len(offsets) < 3:
        return None
    return float(np.exp(-max(0.0, distance_to_human(offsets) - distance_by_chance(len(offsets))) / TOLERANCE))


def offset_facts(offsets: list[float]) -> dict:
    """{n, median_s, iqr_s, overlap_share, over_1s_share, wasserstein_s}; None where there is none."""
    if not offsets:
        return {"n": 0} | dict.fromkeys(("median_s", "iqr_s", "overlap_share", "over_1s_share", "wasserstein_s"))
    x = np.asarray(offsets, dtype=np.float64)
    low, middle, high = np.percentile(x, [25, 50, 75])
    return {"n": len(x), "median_s": float(middle), "iqr_s": float(high - low), "overlap_share": float(np.mean(x < 0)),
            "over_1s_share": float(np.mean(x > 1.0)), "wasserstein_s": distance_to_human(x)}


def floor_statistics(units: dict[str, list[tuple[float, float]]], seconds: float) -> dict:
    """Number and seconds per minute of units, pauses (same speaker), gaps (change of speaker) and overlaps (dGSLM, arXiv 2203.16502).

    `units`: speaker -> [(t0, t1), ...] in the time of the conversation, which lasts `seconds`.
    """
    counts = {name: [0, 0.0] for name in ("ipu", "pause", "gap", "overlap")}

    def add(name, length):
        counts[name][0] += 1
        counts[name][1] += length
    flat = sorted((a, b, speaker) for speaker, parts in units.items() for a, b in parts)
    reach, last = None, None
    for a, b, speaker in flat:
        add("ipu", b - a)
        if reach is not None and a >= reach:
            add("pause" if speaker == last else "gap", a - reach)
        elif reach is not None and speaker != last:
            add("overlap", min(b, reach) - a)
        if reach is None or b > reach:
            reach, last = b, speaker
    minutes = seconds / 60
    return {name: {"per_minute": n / minutes if minutes else None, "seconds_per_minute": s / minutes if minutes else None} for name, (n, s) in counts.items()}


# ----------------------------------------------------------------------------- decisions that a turn has ended

def match_ends(fired: list[float], ends: list[float], holds: list[tuple[float, float]], nexts: list[float] | None = None) -> dict:
    """End-of-turn decisions against true ends, one to one, after TurnBench's rules (arXiv 2608.25218).

    fired: times of the decisions. ends: true ends. holds: (t0, t1) of pauses within turns and of backchannels, where a
    decision is false (one each at most). nexts: for each end, the next event (s), which closes its window.
    Returns {recall, false_positive_rate, latency_ms: {p10, p50, p90}, ends, holds}; None where there is nothing to count.
    """
    nexts = nexts or [math.inf] * len(ends)
    free, latencies = sorted(fired), []
    for end, after in sorted(zip(ends, nexts)):
        inside = [t for t in free if end - BEFORE <= t <= min(end + AFTER, after)]
        if inside:
            free.remove(inside[0])
            latencies.append(1000 * (inside[0] - end))
    wrong = sum(any(a <= t <= b for t in free) for a, b in holds)
    p10, p50, p90 = (float(v) for v in np.percentile(latencies, [10, 50, 90])) if latencies else (None,) * 3
    return {"recall": len(latencies) / len(ends) if ends else None, "false_positive_rate": wrong / len(holds) if holds else None,
            "latency_ms": {"p10": p10, "p50": p50, "p90": p90}, "ends": len(ends), "holds": len(holds)}


def silence_endpointer(audio: np.ndarray, rate: int, silence: float = 0.5) -> list[float]:
    """Times at which a listener that waits for `silence` seconds of quiet says that the turn has ended (causal: the wait is in the time)."""
    units = speech_segments(audio, rate, gap=FRAME)
    ends = [(b, units[i + 1][0] if i + 1 < len(units) else len(audio) / rate + silence) for i, (_, b) in enumerate(units)]
    return [b + silence for b, following in ends if following - b >= silence]


def endpointers(channels: list[tuple[np.ndarray, list[tuple[float, float]]]], rate: int, waits: tuple = (0.2, 0.5, 0.8)) -> dict[str, dict]:
    """What simple listeners reach (match_ends, all channels counted together), and the bounds that a metric of endpointing must show.

    channels: (audio (N,) of one speaker with silence where the other speaks, its turns [(t0, t1), ...]). `oracle` knows the ends,
    `never` is silent, `always` decides every 0.1 s, the others wait for so much silence.
    """
    deciders = {"oracle": lambda audio, turns: [b for _, b in turns], "never": lambda audio, turns: [], "always": lambda audio, turns: np.arange(0, len(audio) / rate, 0.1).tolist()}
    deciders |= {f"{wait:g} s of silence": (lambda audio, turns, wait=wait: silence_endpointer(audio, rate, wait)) for wait in waits}
    found = {}
    for name, decide in deciders.items():
        fired, ends, holds, nexts, shift = [], [], [], [], 0.0
        for audio, turns in channels:
            units = speech_segments(audio, rate)
            pauses = [(a[1], b[0]) for a, b in zip(units, units[1:]) if any(t0 <= a[1] and b[0] <= t1 for t0, t1 in turns)]
            fired += [t + shift for t in decide(audio, turns)]
            ends += [b + shift for _, b in turns]
            nexts += [a + shift for a, _ in turns[1:]] + [len(audio) / rate + shift + AFTER]
            holds += [(a + shift, b + shift) for a, b in pauses]
            shift += len(audio) / rate + 2 * AFTER
        found[name] = match_ends(fired, ends, holds, nexts)
    return found
