"""Scores of whole conversations, each in [0, 1], from arrays and transcripts alone. Imports no model of ours.

A conversation is a dialogue.Dialogue. Its turns are first measured one by one (`measure_turn`: plain numbers, cached by the
sound's contents), then scored together (`score`). What cannot be judged scores None, with a reason; never not-a-number.

    measured = [measure_turn(turn, reference=natural_rendering(turn.text)) for turn in talk.turns]
    scores = score(talk, measured, prosody.load_models())        # name -> {score, reason, parts}

| score | 1 means | source |
|---|---|---|
| character | one person per name: a fitted verifier takes a name's turns for one person and two names for two | cosine of Resemblyzer's d-vectors (arXiv 1710.10467), pitch level |
| voice | nobody changes within a turn: the halves of every turn are near enough | cosine of d-vectors |
| mood | the moods heard fit the moods asked for better than in any other order of the speaker's turns | logistic regression on pitch, range, loudness, pace, tilt |
| prosody | melody, timing and pauses are those of a natural rendering of the same words | concordance (Lin 1989), DTW |
| flow | gaps and overlaps are distributed as people's | Levinson and Torreira 2015, Wasserstein distance |
| words | every word is heard | 1 - word error rate (Whisper tiny.en) |
| sound | the sound is as clean as recordings of speech | (DistillMOS - 1) / 4 |
"""
from __future__ import annotations

import functools
import warnings

import numpy as np

import judges
import prosody
import turn_taking
from dialogue import RATE, Dialogue, Turn

SCORES = ("character", "voice", "mood", "prosody", "flow", "words", "sound")
UNITS = {"character": "mean probability of the right decision", "voice": "share of turns in one voice", "mood": "share of orders that fit worse",
         "prosody": "mean of melody, evenness and pauses", "flow": "exp(-excess Wasserstein distance / 0.3 s)", "words": "1 - word error rate", "sound": "(MOS - 1) / 4"}
HALF = 1.2                      # s of each half of a turn, at least, for its voice to be compared
UNEVEN = 0.25                   # std of log local pace at which evenness falls to 1/e
ORDERS = 500                    # orders of a speaker's turns that the mood score tries


# ----------------------------------------------------------------------------- one turn

def measure_sound(audio: np.ndarray, words: bool = True, sound: bool = True) -> dict:
    """What depends on the sound alone: {seconds, reason, voice, halves, units, heard, mos}; lists and numbers for JSON."""
    reason = judges.unjudgeable(audio)
    units = [] if reason else turn_taking.speech_segments(audio, RATE)
    embedding = None if reason else judges.speaker_embedding(audio)
    return {"seconds": len(audio) / RATE, "reason": reason, "voice": None if embedding is None else embedding.tolist(), "halves": halves(audio, units),
            "units": [list(u) for u in units], "heard": judges.transcribe(audio) if words else None, "mos": judges.distill_mos(audio) if sound else None}


def halves(audio: np.ndarray, units: list) -> float | None:
    """Cosine of the voices of the two halves of the speech; None where a half is under HALF seconds."""
    if not units or units[-1][1] - units[0][0] < 2 * HALF:
        return None
    a, b = int(units[0][0] * RATE), int(units[-1][1] * RATE)
    return judges.speaker_similarity(audio[a:(a + b) // 2], audio[(a + b) // 2:b])


def reference_line(audio: np.ndarray) -> prosody.Line | None:
    """A natural rendering of a text, ready to lay turns along; None where it cannot be judged."""
    return None if judges.unjudgeable(audio) else prosody.line_of(audio, judges.pitch_track(audio)[1], RATE)


def measure_prosody(audio: np.ndarray, text: str, reference: prosody.Line | None) -> dict:
    """What depends on sound and words: {profile, melody, unevenness, pauses, rise, natural_rise, shifts}; None where it cannot be judged."""
    empty = dict.fromkeys(("profile", "melody", "unevenness", "pauses", "rise", "natural_rise", "shifts"))
    line = reference_line(audio)
    if line is None or not line.judgeable:
        return empty
    found = {"profile": prosody.profile(line, text)}
    return empty | found | (prosody.against(line, reference) if reference is not None else {})


def measure_turn(turn: Turn, reference: prosody.Line | None = None, words: bool = True, sound: bool = True) -> dict:
    """Both of the above for a turn."""
    return measure_sound(turn.audio, words, sound) | measure_prosody(turn.audio, turn.text, reference)


# ----------------------------------------------------------------------------- one conversation

def _scored(value: float | None, reason: str | None = None, **parts) -> dict:
    value = None if value is None or not np.isfinite(value) else float(np.clip(value, 0.0, 1.0))
    return {"score": value, "reason": None if value is not None else reason or "cannot be judged", "parts": parts}


def logistic(features, model: dict) -> float:
    """Probability of a fitted two-class logistic regression over features (F,)."""
    scaled = (np.asarray(features, dtype=np.float64) - np.array(model["mean"])) / np.array(model["std"])
    return float(1 / (1 + np.exp(-np.clip(scaled @ np.array(model["weights"]) + model["bias"], -50, 50))))


def pair_features(a: dict, b: dict) -> list[float] | None:
    """What tells whether two measured turns are one person's: [cosine, distance of pitch levels (semitones)]; None where a turn cannot be judged."""
    if a["voice"] is None or b["voice"] is None or not a.get("profile") or not b.get("profile"):
        return None
    return [float(np.dot(a["voice"], b["voice"])), abs(a["profile"]["pitch"] - b["profile"]["pitch"])]


def character_score(talk: Dialogue, measured: list[dict], models: dict) -> dict:
    """Character consistency: mean probability of the right decision of the verifier over pairs of one name, and over pairs of two names, averaged.

    Of one name the first third of the turns is paired with the last third: a voice that wanders or changes shows most between these.
    With one name the first part alone. parts: same (mean probability within names), different (between), cosine, pairs.
    """
    same, different, cosines = [], [], []
    for i, j in _pairs(talk, measured):
        features = pair_features(measured[i], measured[j])
        one = talk.turns[i].speaker == talk.turns[j].speaker
        (same if one else different).append(logistic(features, models["person"]))
        cosines += [features[0]] if one else []
    if not same:
        return _scored(None, "no speaker has two turns that can be judged", pairs=0)
    within, between = float(np.mean(same)), float(np.mean(different)) if different else None
    return _scored(within if between is None else (within + 1 - between) / 2, same=within, different=between, cosine=float(np.mean(cosines)), pairs=len(same))


def _pairs(talk: Dialogue, measured: list[dict]) -> list[tuple[int, int]]:
    """Places of the turns that are compared: each name's first third with its last third, and every turn with those of other names."""
    usable = {s: [i for i in talk.of(s) if pair_features(measured[i], measured[i]) is not None] for s in talk.speakers}
    third = {s: (len(places) + 2) // 3 for s, places in usable.items()}
    own = [(i, j) for s, places in usable.items() for i in places[:third[s]] for j in places[-third[s]:] if i < j]
    names = list(usable)
    return own + [(i, j) for k, a in enumerate(names) for b in names[k + 1:] for i in usable[a] for j in usable[b]]


def voice_score(talk: Dialogue, measured: list[dict], models: dict) -> dict:
    """Voice consistency within turns: share of turns whose halves the verifier takes for one person's. parts: cosine (mean, lowest), turns.

    A share of decisions, since the cosines themselves move with anything that is done to a sound. The least cosine that is accepted is
    the one that 98 % of natural turns exceed (validity.fit), low enough for speech that went through a vocoder.
    """
    cosines = [m["halves"] for m in measured if m["halves"] is not None]
    if not cosines:
        return _scored(None, f"no turn holds {2 * HALF:g} s of speech", turns=0)
    return _scored(float(np.mean([c >= models["halves"]["accept"] for c in cosines])), cosine=float(np.mean(cosines)), lowest=min(cosines), turns=len(cosines))


def mood_evidence(talk: Dialogue, measured: list[dict], models: dict) -> list[dict[str, float] | None]:
    """Per turn the log odds of every mood, heard against the speaker's own other turns; None where that cannot be told."""
    found: list = [None] * len(talk.turns)
    for speaker in talk.speakers:
        places = talk.of(speaker)
        for i, features in zip(places, prosody.relative([measured[k].get("shifts") for k in places])):
            found[i] = None if features is None else prosody.mood_log_odds(features, models["mood"])
    return found


def mood_score(talk: Dialogue, measured: list[dict], models: dict, seed: int = 0) -> dict:
    """Emotional coherence: share of the other orders of each speaker's turns in which the heard moods fit the moods asked for worse (ties count half).

    0.5 is chance. parts: agreement (mean log odds of the mood asked for), accuracy (share of turns whose likeliest mood is the one asked for), turns.
    Without moods asked for there is no score: guessed from the words, too few conversations can be told from exchanged ones (see LOG.md).
    """
    odds = mood_evidence(talk, measured, models)
    usable = {s: [i for i in talk.of(s) if odds[i] is not None and talk.turns[i].mood in models["mood"]["classes"]] for s in talk.speakers}
    kept = [i for places in usable.values() for i in places]
    if not kept:
        return _scored(None, "no turn has a mood asked for and a sound that can be judged", turns=0)
    if all(len({talk.turns[i].mood for i in places}) < 2 for places in usable.values()):
        return _scored(None, "every speaker has one mood throughout", turns=len(kept))
    rng = np.random.default_rng(seed)
    tables = [np.array([[odds[i][talk.turns[k].mood] for k in places] for i in places]) for places in usable.values() if len(places) > 1]
    true = sum(float(np.trace(t)) for t in tables)
    others = np.sum([_shuffled_traces(t, rng) for t in tables], 0)
    right = [max(odds[i], key=odds[i].get) == talk.turns[i].mood for i in kept]
    share = float(np.mean(others < true - 1e-9) + 0.5 * np.mean(np.abs(others - true) <= 1e-9))
    return _scored(share, agreement=true / len(kept), accuracy=float(np.mean(right)), turns=len(kept))


def _shuffled_traces(table: np.ndarray, rng) -> np.ndarray:
    """Sum over turns of table[turn, label] for ORDERS random assignments of labels."""
    count = len(table)
    orders = np.argsort(rng.random((ORDERS, count)), 1)
    return table[np.arange(count), orders].sum(1)


def prosody_score(talk: Dialogue, measured: list[dict], models: dict) -> dict:
    """Prosodic naturalness: mean over turns of the mean of melody (concordance), evenness (exp(-spread of local pace / UNEVEN)) and pauses (F1).

    parts: melody, unevenness, pauses, question_rise (share of questions that end as high, within 3 semitones, as the natural rendering), turns.
    """
    rows = [[None if m["melody"] is None else max(0.0, m["melody"]), None if m["unevenness"] is None else float(np.exp(-m["unevenness"] / UNEVEN)), m["pauses"]] for m in measured]
    values = [np.mean([v for v in row if v is not None]) for row in rows if row[0] is not None]
    if not values:
        return _scored(None, "no turn could be laid along a natural rendering of its words", turns=0)

    def mean(key):
        known = [m[key] for m in measured if m[key] is not None]
        return float(np.mean(known)) if known else None
    asked = [m for t, m in zip(talk.turns, measured) if t.text.rstrip().endswith("?") and m["rise"] is not None and m["natural_rise"] is not None]
    rises = [m["rise"] >= m["natural_rise"] - 3 for m in asked]
    return _scored(float(np.mean(values)), melody=mean("melody"), unevenness=mean("unevenness"), pauses=mean("pauses"), question_rise=float(np.mean(rises)) if rises else None, turns=len(values))


def speech_spans(talk: Dialogue, measured: list[dict]) -> list[tuple[str, float, float]]:
    """(speaker, first speech, last speech) of every turn with speech, in the time of the conversation."""
    return [(t.speaker, t.start + m["units"][0][0], t.start + m["units"][-1][1]) for t, m in zip(talk.turns, measured) if t.start is not None and m["units"]]


def flow_score(talk: Dialogue, measured: list[dict], models: dict) -> dict:
    """Turn-taking: how near the floor-transfer offsets are to people's (turn_taking.flow_score). parts: the offsets' distribution and dGSLM's counts."""
    if not talk.timed:
        return _scored(None, "the turns have no starts")
    spans = speech_spans(talk, measured)
    offsets = turn_taking.floor_transfers(spans)
    units: dict[str, list] = {}
    for t, m in zip(talk.turns, measured):
        units.setdefault(t.speaker, []).extend((t.start + a, t.start + b) for a, b in m["units"])
    length = max((t.start + m["seconds"] for t, m in zip(talk.turns, measured)), default=0.0)
    return _scored(turn_taking.flow_score(offsets), f"{len(offsets)} changes of speaker, at least 3 are needed", **turn_taking.offset_facts(offsets), floor=turn_taking.floor_statistics(units, length))


def words_score(talk: Dialogue, measured: list[dict], models: dict | None = None) -> dict:
    """1 - word error rate of the conversation, 0 at the least. parts: wer, words, over_half."""
    pairs = [(t.text, m["heard"]) for t, m in zip(talk.turns, measured) if m["heard"] is not None and t.text]
    if not pairs:
        return _scored(None, "nobody listened to the words")
    rate = judges.word_error_rate(*map(list, zip(*pairs)))
    return _scored(None if rate["wer"] is None else 1 - rate["wer"], "the texts hold no words", wer=rate["wer"], words=rate["words"], over_half=rate["over_half"])


def sound_score(talk: Dialogue, measured: list[dict], models: dict | None = None) -> dict:
    """(mean DistillMOS - 1) / 4. parts: mos, lowest."""
    found = [m["mos"] for m in measured if m["mos"] is not None]
    return _scored((np.mean(found) - 1) / 4 if found else None, "no turn could be judged", mos=float(np.mean(found)) if found else None, lowest=min(found, default=None))


METRICS = {"character": character_score, "voice": voice_score, "mood": mood_score, "prosody": prosody_score, "flow": flow_score, "words": words_score, "sound": sound_score}


def score(talk: Dialogue, measured: list[dict], models: dict, only=SCORES) -> dict[str, dict]:
    """Every score of a conversation: name -> {score in [0, 1] or None, reason, parts}. ValueError unless there is one measurement per turn."""
    if len(measured) != len(talk.turns):
        raise ValueError(f"conversation {talk.id}: {len(talk.turns)} turns but {len(measured)} measurements")
    if not talk.turns:
        return {name: _scored(None, "no turns") for name in only}
    return {name: METRICS[name](talk, measured, models) for name in only}


def summary(rows: list[dict[str, dict]], only=SCORES) -> dict[str, dict]:
    """Over conversations: name -> {mean, low, high (95 % bootstrap over conversations), n, unit}."""
    return {name: judges.bootstrap_interval([row[name]["score"] for row in rows if name in row]) | {"unit": UNITS[name]} for name in only}


# ----------------------------------------------------------------------------- beside a reference recording

def mel_cepstral_distortion(audio: np.ndarray, reference: np.ndarray, rate: int = RATE, order: int = 13, bands: int = 40) -> float | None:
    """MCD in dB along a DTW path (Kubichek 1993), the level left out; None where one cannot be judged. Lengths may differ.

    Over 40 mel bands in dB with an orthonormal DCT the root mean square of the spectral difference is sqrt(sum(difference ** 2) / bands) (Parseval).
    """
    import librosa
    if judges.unjudgeable(audio, rate) or judges.unjudgeable(reference, rate):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (librosa.feature.mfcc(y=judges.as_audio(x), sr=rate, n_mfcc=order + 1, hop_length=rate // 100, n_mels=bands, norm="ortho")[1:] for x in (audio, reference))
    _, path = librosa.sequence.dtw(a, b, metric="euclidean")
    distance = np.sqrt(np.sum((a[:, path[:, 0]] - b[:, path[:, 1]]) ** 2, 0))
    return float(np.mean(distance) / np.sqrt(bands))


def intrusive(audio: np.ndarray, reference: np.ndarray, rate: int = RATE) -> dict:
    """{pesq (wide band, 1 to 4.6), stoi (0 to 1), mcd_db, reason}: against the same recording; None with a reason where lengths differ or a package is missing."""
    empty = {"pesq": None, "stoi": None, "mcd_db": mel_cepstral_distortion(audio, reference, rate)}
    a, b = judges.as_audio(audio), judges.as_audio(reference)
    reason = judges.unjudgeable(a, rate) or judges.unjudgeable(b, rate)
    if reason or abs(len(a) - len(b)) > 0.1 * rate:
        return empty | {"reason": reason or f"lengths differ: {len(a) / rate:.2f} s and {len(b) / rate:.2f} s"}
    try:
        from pesq import NoUtterancesError, pesq
        from pystoi import stoi
    except ImportError as error:
        return empty | {"reason": f"the package {error.name} is not installed"}
    n = min(len(a), len(b))
    wide = [judges.resample(x[:n], rate, judges.JUDGE_RATE) for x in (b, a)]
    try:
        quality = float(pesq(judges.JUDGE_RATE, *wide, "wb"))
    except NoUtterancesError:
        quality = None
    return empty | {"pesq": quality, "stoi": float(stoi(b[:n], a[:n], rate)), "reason": None if quality is not None else "PESQ found no utterance"}


# ----------------------------------------------------------------------------- a second pair of ears

@functools.lru_cache(maxsize=1)
def _sphinx():
    with judges._installed("pocketsphinx"):
        from pocketsphinx import Decoder
    return Decoder(samprate=judges.JUDGE_RATE, loglevel="FATAL")


def pcm(audio: np.ndarray, rate: int = RATE) -> bytes:
    """Audio (N,) as 16-bit samples at 16 kHz."""
    return (np.clip(judges.resample(judges.as_audio(audio), rate, judges.JUDGE_RATE), -1, 1) * 32767).astype("<i2").tobytes()


def transcribe_again(audio: np.ndarray, rate: int = RATE) -> str:
    """What CMU PocketSphinx hears (an older kind of recogniser that shares nothing with Whisper); "" for what cannot be judged."""
    if judges.unjudgeable(audio, rate):
        return ""
    decoder = _sphinx()
    decoder.start_utt()
    decoder.process_raw(pcm(audio, rate), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found else ""
