"""Which turns of people's recordings are fit to learn from: measured, judged, counted, drawn.

    values = measure(audio, 24000, text="so it goes", noise_db=-62.0)
    reason = verdict(values, FilterConfig())               # None: kept; else a few words, the same for every turn it holds of

Values of a turn: seconds, snr_db, clipped (share of samples), speech (share of the time), pace (letters a second), confidence (of
the ASR, None where the text was given), match (share of the given words that the ASR heard, None where it did not listen), language
(probability that the text is in the wanted one, None for too few words), mos (None unless asked for).
"""
from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_io import resample

LEAST_WORDS = 6           # a language is guessed from no fewer
LIMITED = {"seconds": ("min_seconds", "max_seconds"), "snr_db": ("min_snr_db", None), "clipped": (None, "max_clipped"), "speech": ("min_speech", None),
           "pace": ("min_pace", "max_pace"), "confidence": ("min_confidence", None), "match": ("min_match", None), "language": ("min_language", None),
           "mos": ("min_mos", None)}
NAMES = {"seconds": "length (s)", "snr_db": "signal to noise (dB)", "clipped": "clipped samples (share)", "speech": "speech (share of the time)", "pace": "letters per second",
         "confidence": "confidence of the ASR", "match": "given words that the ASR heard (share)", "language": "probability of the language", "mos": "DistillMOS"}


@dataclass(frozen=True)
class FilterConfig:
    """Limits that a turn has to keep; 0 switches a lower limit off."""
    language: str = "en"            # ISO 639-1 code of the text; empty: any
    min_seconds: float = 0.3
    max_seconds: float = 30.0
    min_snr_db: float = 10.0
    max_clipped: float = 0.005
    min_speech: float = 0.4
    min_pace: float = 2.5           # letters per second
    max_pace: float = 30.0
    min_confidence: float = 0.5
    min_match: float = 0.5
    min_language: float = 0.005    # disfluent English is given a few hundredths, Spanish less than a thousandth
    min_mos: float = 0.0            # DistillMOS (1..5); above 0 it is measured, at a fifth of real time
    loudness: float = -23.0         # LUFS that each speaker of a recording is brought to
    dedupe: bool = True

    def __post_init__(self):
        if not 0 <= self.min_seconds < self.max_seconds:
            raise ValueError(f"--min_seconds {self.min_seconds} must lie below --max_seconds {self.max_seconds}")
        if not 0 <= self.min_pace < self.max_pace:
            raise ValueError(f"--min_pace {self.min_pace} must lie below --max_pace {self.max_pace}")
        for name in ("max_clipped", "min_speech", "min_confidence", "min_match", "min_language"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie between 0 and 1")
        if not -50 <= self.loudness <= -5:
            raise ValueError(f"--loudness {self.loudness}: use -50 to -5 LUFS")
        if not 0 <= self.min_mos <= 5:
            raise ValueError(f"--min_mos {self.min_mos}: use 0 (off) to 5")
        if self.language and self.language not in languages():
            raise ValueError(f"--language {self.language}: use an ISO 639-1 code such as en, or nothing for any")


# ----------------------------------------------------------------------------- measuring

def clipped_share(audio: np.ndarray) -> float:
    """Share of the samples (N,) that stand at the highest or lowest value three or more in a row: what a converter does at its end."""
    top = np.abs(audio).max(initial=0.0)
    if top < 0.05:
        return 0.0
    high = np.abs(audio) > 0.998 * top
    middle = high[1:-1] & high[:-2] & high[2:]
    return float(middle.mean()) if len(middle) else 0.0


def snr_db(speech_db: np.ndarray, noise_db: float) -> float:
    """Level (T,) of frames with speech, and of the noise alone, both dB of full scale -> ratio of speech to noise in dB, 0 to 80."""
    power = float(np.mean(10 ** (np.asarray(speech_db, np.float64) / 10))) if len(speech_db) else 0.0
    noise = max(10 ** (noise_db / 10), 1e-12)
    return float(np.clip(10 * np.log10(max(power - noise, 1e-12) / noise), 0.0, 80.0))


def noise_level(level_db: np.ndarray, speech: np.ndarray) -> float:
    """Level of the noise in dB: the mean power of the quieter half of the frames (T,) in which nobody speaks (the others may be edges of
    words); where those are few, of the quietest fiftieth of all (closures within speech: the ratio is then said too small, never too large)."""
    quiet = np.sort(level_db[~speech])[:max(1, int((~speech).sum()) // 2)]
    if (~speech).sum() < 20:
        quiet = np.sort(level_db)[:max(1, len(level_db) // 50)]
    return float(10 * np.log10(np.mean(10 ** (np.asarray(quiet, np.float64) / 10)))) if len(quiet) else -120.0


@functools.lru_cache(maxsize=1)
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError(f"the package py3langid cannot be imported ({error}): run python setup_environment.py") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages() -> set[str]:
    return set(_identifier().labels)


def language_probability(text: str, language: str) -> float | None:
    """How probable it is that the text is in `language`; None for texts too short to say."""
    if not language or len(text.split()) < LEAST_WORDS:
        return None
    return float(dict(_identifier().rank(text.lower()))[language])


def measure(audio: np.ndarray, rate: int, text: str, cfg: FilterConfig, speech: float, snr: float, confidence: float | None = None, match: float | None = None,
            language: float | None = None) -> dict:
    """The values of one turn: audio (N,), what is said, share of the time that is speech, SNR in dB, what the ASR thinks, and the language."""
    seconds = len(audio) / rate
    mos = None
    if cfg.min_mos > 0:
        import judges
        mos = judges.distill_mos(audio, rate)
    def short(value):
        return None if value is None else round(float(value), 4)
    letters = sum(c.isalpha() for c in text)
    return {"seconds": short(seconds), "snr_db": short(snr), "clipped": short(clipped_share(audio)), "speech": short(speech), "pace": short(letters / max(seconds, 1e-3)),
            "confidence": short(confidence), "match": short(match), "language": short(language), "mos": short(mos)}


# ----------------------------------------------------------------------------- judging

REASONS = {"min_seconds": "too short", "max_seconds": "too long", "min_snr_db": "too noisy", "max_clipped": "clipped", "min_speech": "little speech",
           "min_pace": "few words for its length", "max_pace": "many words for its length", "min_confidence": "the ASR is unsure",
           "min_match": "not what its transcript says", "min_language": "another language", "min_mos": "unnatural"}
DUPLICATE, NO_TEXT = "said before", "no speakable text"


def verdict(values: dict, cfg: FilterConfig) -> str | None:
    """Why a turn with these values is left out: the first limit that it breaks; None where it keeps them all."""
    for name, (low, high) in LIMITED.items():
        value = values.get(name)
        if value is None:
            continue
        if low and getattr(cfg, low) > 0 and value < getattr(cfg, low):
            return REASONS[low]
        if high and value > getattr(cfg, high):
            return REASONS[high]
    return None


# ----------------------------------------------------------------------------- loudness

def gain_to(audio: np.ndarray, rate: int, target: float) -> float:
    """Factor that brings audio (N,) to `target` LUFS (ITU-R BS.1770 by pyloudnorm), held so that no sample passes -1 dB of full scale."""
    import warnings
    try:
        import pyloudnorm
    except ImportError as error:
        raise ValueError(f"the package pyloudnorm cannot be imported ({error}): run python setup_environment.py") from None
    peak = float(np.abs(audio).max(initial=0.0))
    if peak < 1e-4:
        return 1.0
    padded = np.pad(audio, (0, max(0, int(0.4 * rate) + 1 - len(audio))), mode="wrap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loudness = pyloudnorm.Meter(rate).integrated_loudness(padded.astype(np.float64))
    if not np.isfinite(loudness):
        return 1.0
    return min(10 ** ((target - loudness) / 20), 10 ** (-1 / 20) / peak)


# ----------------------------------------------------------------------------- said before

SLICES, BANDS, BITS = 33, 9, 256     # (33 - 1) x (9 - 1) signs
CHUNK_BITS, DIFFERENT = 12, 0.25     # a repeat agrees in a whole chunk somewhere, and in three quarters of all bits


def fingerprint(audio: np.ndarray, rate: int) -> str:
    """64 hex digits that stay nearly the same through other gains, rates and lossy files: signs of how the differences between neighbouring bands change
    from one slice of time to the next (Haitsma and Kalker 2002), over a fixed number of slices."""
    sound = resample(audio, rate, 8000)
    size = 256
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, (0, size)), size)[::64]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2                       # (T, 129), 31 Hz apart
    edges = np.geomspace(300, 3400, BANDS + 1) / 8000 * size
    bands = np.stack([power[:, int(a):max(int(a) + 1, int(b))].sum(1) for a, b in zip(edges, edges[1:])], axis=1)
    places = np.linspace(0, len(bands), SLICES + 1)
    slices = np.stack([bands[int(a):max(int(a) + 1, int(b))].mean(0) for a, b in zip(places, places[1:])])    # (33, 9)
    level = np.log(slices + 1e-6 * max(float(slices.max()), 1e-12))
    bits = np.diff(np.diff(level, axis=1), axis=0) > 0                                         # (32, 8)
    return np.packbits(bits.reshape(-1)).tobytes().hex()


class Seen:
    """Turns heard so far: is this one a repeat? 32 bytes and 20 dictionary entries a turn, so some hundreds of hours per folder."""

    def __init__(self):
        self.prints: list[np.ndarray] = []
        self.names: list[str] = []
        self.seconds: list[float] = []
        self.chunks: dict[tuple[int, int], list[int]] = {}
        self.hashes: dict[str, str] = {}

    def _keys(self, bits: np.ndarray):
        weights = 1 << np.arange(CHUNK_BITS)
        for k in range(BITS // CHUNK_BITS):
            yield k, int(bits[k * CHUNK_BITS:(k + 1) * CHUNK_BITS] @ weights)

    def find(self, mark: str, seconds: float) -> str | None:
        """The name of the turn that this one repeats; None where it is new. Turns under a second are never repeats: "yes" may be said twice."""
        if seconds < 1.0:
            return None
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(mark), np.uint8)).astype(np.int64)
        for i in sorted({i for key in self._keys(bits) for i in self.chunks.get(key, ())}):
            if abs(self.seconds[i] - seconds) < 0.1 * seconds and np.mean(bits != self.prints[i]) < DIFFERENT:
                return self.names[i]
        return None

    def add(self, name: str, mark: str, seconds: float) -> None:
        if seconds < 1.0:
            return
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(mark), np.uint8)).astype(np.int64)
        for key in self._keys(bits):
            self.chunks.setdefault(key, []).append(len(self.prints))
        self.prints.append(bits.astype(np.uint8))
        self.names.append(name)
        self.seconds.append(seconds)

    def file(self, path: Path, name: str) -> str | None:
        """The earlier file with the very same bytes, if there is one."""
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        earlier = self.hashes.setdefault(digest.hexdigest(), name)
        return None if earlier == name else earlier


# ----------------------------------------------------------------------------- the picture

def count(turns) -> dict[str, int]:
    """{"kept": n, reason: n, ...} of (values, reason or None) pairs."""
    tally = Counter(reason or "kept" for _, reason in turns)
    return {"kept": tally.pop("kept", 0), **dict(tally.most_common())}


def draw(turns: list[tuple[dict, str | None]], cfg: FilterConfig, path: Path) -> None:
    """PNG: for each value what was kept and what was left out, with the limits; and how many each filter took."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    measured = [n for n in LIMITED if sum(v.get(n) is not None for v, _ in turns) > 1]
    rows = -(-(len(measured) + 1) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3 * rows), squeeze=False)
    for axis, name in zip(axes.flat, measured):
        kept, left = ([v[name] for v, r in turns if v.get(name) is not None and (r is None) is want] for want in (True, False))
        low, high = np.percentile([*kept, *left], [0.5, 99.5])
        bins = np.linspace(low, high if high > low else low + 1, 40)
        axis.hist([np.clip(kept, bins[0], bins[-1]), np.clip(left, bins[0], bins[-1])], bins, stacked=True, color=["#3b7dd8", "#d8663b"], label=["kept", "left out"])
        for limit in LIMITED[name]:
            if limit and getattr(cfg, limit) > 0 and bins[0] <= getattr(cfg, limit) <= bins[-1]:
                axis.axvline(getattr(cfg, limit), color="black", linestyle="--", linewidth=1)
        axis.set_title(NAMES[name], fontsize=10)
    if measured:
        axes.flat[0].legend(fontsize=8)
    tally, axis = count(turns), axes.flat[len(measured)]
    axis.barh(list(tally)[::-1], list(tally.values())[::-1], color=["#d8663b"] * (len(tally) - 1) + ["#3b7dd8"])
    axis.set_title("turns", fontsize=10)
    for axis in list(axes.flat)[len(measured) + 1:]:
        axis.axis("off")
    figure.tight_layout()
    temporary = path.with_name(path.name + ".tmp.png")
    figure.savefig(temporary, dpi=80)
    pyplot.close(figure)
    temporary.replace(path)
