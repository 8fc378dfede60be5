"""How moods sound, and a sample of speech said in another mood. Knows no model.

    sample = analysed(audio)                       # None where that cannot be done
    happy = in_mood(sample, shift("happy"))

The sample is taken apart and put together by the WORLD vocoder (Morise et al. 2016; package pyworld).
"""
from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from audio_io import SAMPLE_RATE

# Per mood at full strength: pitch level (semitones), pitch range (log ratio), loudness (dB), pace (log ratio).
MOOD_PROSODY = {
    "neutral": (0.0, 0.0, 0.0, 0.0), "happy": (1.2, 0.18, 1.0, 0.04), "excited": (2.0, 0.28, 2.5, 0.09),
    "sad": (-1.3, -0.30, -3.0, -0.11), "angry": (0.5, 0.15, 3.5, 0.06), "calm": (-0.6, -0.15, -1.5, -0.06),
    "worried": (0.8, -0.12, -0.8, 0.03), "surprised": (2.2, 0.25, 1.5, -0.02)}
NEUTRAL = "neutral"
USUAL = ("calm", "happy", "surprised", "excited", "worried", "sad", "angry")       # the others, the most frequent in the written answers first
HOP = 5.0                                          # ms between the vocoder's frames
FLOOR, CEILING = 70.0, 600.0                       # Hz of its pitch
VOICED = 20                                        # frames of pitch that a sample needs


@dataclass(frozen=True)
class Sample:
    """What WORLD hears, T frames every HOP: f0 (T,) in Hz (0: unvoiced), spectrum and aperiodicity (T, F)."""
    f0: np.ndarray
    spectrum: np.ndarray
    aperiodicity: np.ndarray


def shift(mood: str, before: str | None = None, strength: float = 1.0) -> tuple[float, ...]:
    """What has to change (as in MOOD_PROSODY) for speech in the mood `before` (None: neutral) to sound like `mood`."""
    return tuple(strength * (np.array(MOOD_PROSODY[mood]) - MOOD_PROSODY[before or NEUTRAL]))


def analysed(audio: np.ndarray) -> Sample | None:
    """audio (N,) at 24 kHz -> Sample; None where the vocoder is not installed or there is no voice in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                    # it warns of its own packaging
            import pyworld
    except ImportError:
        return None
    sound = np.ascontiguousarray(audio, np.float64)
    f0, times = pyworld.dio(sound, SAMPLE_RATE, f0_floor=FLOOR, f0_ceil=CEILING, frame_period=HOP)
    f0 = pyworld.stonemask(sound, f0, times, SAMPLE_RATE)
    if (f0 > 0).sum() < VOICED:
        return None
    return Sample(f0, pyworld.cheaptrick(sound, f0, times, SAMPLE_RATE), pyworld.d4c(sound, f0, times, SAMPLE_RATE))


def in_mood(sample: Sample, change: tuple[float, ...]) -> np.ndarray:
    """The sample with pitch level (semitones), pitch range (log ratio), loudness (dB) and pace (log ratio) changed -> audio (N,) at 24 kHz."""
    import pyworld
    level, wider, loudness, pace = change
    voiced = sample.f0 > 0
    tone = np.log(np.maximum(sample.f0, 1.0))
    away = np.clip(tone - np.median(tone[voiced]), -0.4, 0.5)
    f0 = np.where(voiced, np.exp(tone + away * (math.exp(wider) - 1.0) + level * math.log(2) / 12), 0.0)
    sound = pyworld.synthesize(f0, sample.spectrum, sample.aperiodicity, SAMPLE_RATE, frame_period=HOP / math.exp(pace)) * 10 ** (loudness / 20)
    return (sound * min(1.0, 0.97 / max(1e-6, float(np.abs(sound).max())))).astype(np.float32)
