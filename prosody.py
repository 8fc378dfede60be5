"""How a turn is said: level, range, loudness, pace, melody, pauses; and the mood that these carry.

Arrays only; the pitch track comes from the caller (judges.pitch_track). A *reference* is a natural rendering of the same
words by any voice; the turn is laid along it by dynamic time warping, so that melody and timing can be compared word for
word whatever the speaker's own level and pace.
"""
from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HOP = 0.01                      # s between the frames of this module
RATE = 16000                    # Hz of the sound that is aligned
BANDS = 13                      # cepstral coefficients used for alignment, the level left out
PAUSE = 0.12                    # s of quiet inside a turn that count as a pause
FEATURES = ("pitch", "range", "loudness", "pace", "tilt")
UNITS = {"pitch": "semitones", "range": "log ratio of the spread in semitones", "loudness": "dB", "pace": "log ratio", "tilt": "dB"}
MODELS = Path(__file__).parent / "assets" / "evaluation.json"


@dataclass(frozen=True)
class Line:
    """A turn as prosody sees it, frames every HOP: f0 (T,) in Hz (0: unvoiced), level (T,) in dB, speech (T,) bool, cepstra (BANDS, T), tilt in dB."""
    f0: np.ndarray
    level: np.ndarray
    speech: np.ndarray
    cepstra: np.ndarray
    tilt: float

    @property
    def judgeable(self) -> bool:
        return int((self.f0 > 0).sum()) >= 20 and int(self.speech.sum()) >= 20


def line_of(audio: np.ndarray, f0: np.ndarray, rate: int, f0_period: float = 0.005) -> Line:
    """Audio (N,) at `rate` Hz and its pitch track (every f0_period s) -> Line."""
    import librosa
    from audio_io import resample
    from turn_taking import frame_levels, speech_mask
    level, speech = frame_levels(audio, rate), speech_mask(audio, rate)
    count = len(level)
    place = np.minimum((np.arange(count) * HOP / f0_period).astype(int), len(f0) - 1)
    pitch = np.asarray(f0)[place] if count else np.zeros(0)
    sound = resample(audio, rate, RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                       # librosa warns of short turns
        cepstra = librosa.feature.mfcc(y=sound, sr=RATE, n_mfcc=BANDS + 1, n_fft=400, hop_length=int(RATE * HOP), n_mels=40)[1:, :count]
    cepstra = np.pad(cepstra, ((0, 0), (0, max(0, count - cepstra.shape[1]))), mode="edge") if cepstra.shape[1] else np.zeros((BANDS, count))
    voiced = np.where(speech & (pitch > 0), pitch, 0.0)
    return Line(voiced, level, speech, cepstra, _tilt(sound))


def _tilt(sound: np.ndarray) -> float:
    """Energy from 1 to 4 kHz less that below 1 kHz, dB."""
    power = np.abs(np.fft.rfft(sound)) ** 2
    edge = np.array([100, 1000, 4000]) * len(sound) // RATE
    low, high = power[edge[0]:edge[1]].sum(), power[edge[1]:edge[2]].sum()
    return float(10 * np.log10(max(high, 1e-12) / max(low, 1e-12)))


def semitones(f0: np.ndarray) -> np.ndarray:
    """Hz -> semitones above 1 Hz; not-a-number where unvoiced."""
    return np.where(f0 > 0, 12 * np.log2(np.maximum(f0, 1.0)), np.nan)


def syllables(text: str) -> int:
    """A count of vowel groups: enough for a pace."""
    return max(1, sum(max(1, len(re.findall(r"[aeiouy]+", re.sub(r"e\b", "", word)))) for word in re.findall(r"[a-z]+", text.lower())))


def profile(line: Line, text: str) -> dict | None:
    """{pitch (semitones above 1 Hz), range (log of the std in semitones), loudness (dB of voiced frames), pace (log syllables per second of speech), tilt (dB)}."""
    if not line.judgeable:
        return None
    tone = semitones(line.f0[line.f0 > 0])
    return {"pitch": float(np.median(tone)), "range": float(np.log(max(0.1, np.subtract(*np.percentile(tone, [90, 10]))))),
            "loudness": float(np.mean(line.level[line.f0 > 0])), "pace": float(np.log(syllables(text) / (line.speech.sum() * HOP))), "tilt": line.tilt}


# ----------------------------------------------------------------------------- along a reference

def align(line: Line, reference: Line) -> np.ndarray:
    """Dynamic time warping of a turn along its reference: (P, 2) frames of the turn and of the reference, from first to last."""
    import librosa

    def normal(c):
        return (c - c.mean(1, keepdims=True)) / np.maximum(c.std(1, keepdims=True), 1e-6)
    _, path = librosa.sequence.dtw(normal(line.cepstra), normal(reference.cepstra), metric="euclidean")
    return path[::-1]


def melody_agreement(line: Line, reference: Line, path: np.ndarray) -> float | None:
    """Concordance (Lin 1989) of the two melodies along the path, each around its own median: 1 the same, 0 unrelated or flat. None under 20 shared frames."""
    a, b = semitones(line.f0)[path[:, 0]], semitones(reference.f0)[path[:, 1]]
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 20:
        return None
    a, b = a[both] - np.median(a[both]), b[both] - np.median(b[both])
    a, b = np.clip(a, -9, 9), np.clip(b, -9, 9)                               # an octave error of the tracker is no melody
    below = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    return float(2 * np.mean((a - a.mean()) * (b - b.mean())) / below) if below > 1e-9 else None


def tempo_unevenness(line: Line, reference: Line, path: np.ndarray, window: float = 0.25) -> float | None:
    """Spread (std of log ratio) of local pace against the reference, over pieces of the reference's speech of `window` s. None under 4 pieces."""
    count = reference.cepstra.shape[1]
    place = np.interp(np.arange(count + 1), path[:, 1], path[:, 0])           # reference frame -> turn frame
    step = int(window / HOP)
    ratios = [np.log(max(1.0, place[b] - place[a]) / step) for a, b in zip(range(0, count - step, step), range(step, count, step)) if reference.speech[a:b].mean() > 0.8]
    return float(np.std(ratios)) if len(ratios) >= 4 else None


def pauses(line: Line) -> list[tuple[int, int]]:
    """Frames [(a, b), ...] of quiet of PAUSE or longer between the first and the last speech."""
    from turn_taking import runs
    where = np.flatnonzero(line.speech)
    if not len(where):
        return []
    inside = ~line.speech
    inside[:where[0]] = inside[where[-1]:] = False
    return [(a, b) for a, b in runs(inside) if (b - a) * HOP >= PAUSE]


def pause_agreement(line: Line, reference: Line, path: np.ndarray, near: float = 0.12) -> float | None:
    """F1 of the turn's pauses against the reference's, matched along the path within `near` s; None where neither pauses."""
    back = np.interp(np.arange(line.cepstra.shape[1] + 1), path[:, 0], path[:, 1])
    own = [(back[a], back[b]) for a, b in pauses(line)]
    natural = pauses(reference)
    if not own and not natural:
        return None
    reach = near / HOP
    hit = sum(any(a <= d + reach and b >= c - reach for a, b in own) for c, d in natural)
    return 2 * hit / (len(own) + len(natural)) if hit else 0.0


def final_rise(line: Line, seconds: float = 0.35) -> float | None:
    """Semitones from the median of the turn to the end of its last voiced stretch."""
    voiced = np.flatnonzero(line.f0)
    if len(voiced) < 20:
        return None
    tone = semitones(line.f0)
    last = voiced[voiced > voiced[-1] - seconds / HOP][-8:]
    return float(np.mean(tone[last]) - np.nanmedian(tone[voiced]))


def against(line: Line, reference: Line) -> dict:
    """What a turn shares with a natural rendering of its words: {melody, unevenness, pauses, rise, natural_rise, shifts}.

    shifts: per FEATURES the turn less its reference (None where one cannot be judged).
    """
    empty = dict.fromkeys(("melody", "unevenness", "pauses", "rise", "natural_rise", "shifts"))
    if not line.judgeable or not reference.judgeable:
        return empty
    path = align(line, reference)
    mine, its = profile(line, ""), profile(reference, "")
    return {"melody": melody_agreement(line, reference, path), "unevenness": tempo_unevenness(line, reference, path), "pauses": pause_agreement(line, reference, path),
            "rise": final_rise(line), "natural_rise": final_rise(reference), "shifts": {k: mine[k] - its[k] for k in FEATURES}}


# ----------------------------------------------------------------------------- mood

def load_models(path: Path = MODELS) -> dict:
    """The fitted judges (python evaluation_framework.py fit). ValueError where the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): make it with python evaluation_framework.py fit") from None


def relative(shifts: list[dict | None]) -> list[np.ndarray | None]:
    """Features of a speaker's turns less the mean of the speaker's other turns, (F,) each; None for a turn that is alone or cannot be judged."""
    rows = [None if s is None else np.array([s[k] for k in FEATURES]) for s in shifts]
    known = [r for r in rows if r is not None]
    if len(known) < 2:
        return [None] * len(rows)
    total = np.sum(known, 0)
    return [None if r is None else r - (total - r) / (len(known) - 1) for r in rows]


def mood_log_odds(features: np.ndarray, model: dict) -> dict[str, float]:
    """log P(mood | features) less log P(mood) of a multinomial logistic regression, per mood."""
    scaled = (features - np.array(model["mean"])) / np.array(model["std"])
    scores = np.array(model["weights"]) @ scaled + np.array(model["bias"])
    log_p = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
    return dict(zip(model["classes"], (log_p - np.log(model["prior"])).tolist()))


def mood_of(features: np.ndarray, model: dict) -> str:
    """The likeliest mood, all moods taken as equally frequent."""
    odds = mood_log_odds(features, model)
    return max(odds, key=odds.get)
