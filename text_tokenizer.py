"""Text to what is spoken, and what is spoken to token ids.

    from text_tokenizer import ByteTokenizer, normalise
    normalise("It's 3:30 - 20% off!")        # "it's three thirty, twenty percent off!"
    ByteTokenizer().encode("Hello.")          # bytes of the normalised text

Default ids: 0..255 bytes, then the special tokens below. `load_tokenizer(path)` takes a tokenizer.json instead.
"""
from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from abbreviations import written_out
from config import MOODS

PAD, BOS, EOT, LISTEN, TRANSCRIPT = 256, 257, 258, 259, 260
FIRST_SPEAKER, NUM_SPEAKERS = 264, 8
FIRST_MOOD = 272
VOCAB_SIZE = 320

_PLAIN = str.maketrans({"‘": "'", "’": "'", "‛": "'", "ʼ": "'", "`": "'", "´": "'", "“": '"', "”": '"', "–": "-", "‐": "-", "‑": "-",
                        "−": "-", "…": "...", "ß": "ss", "æ": "ae", "Æ": "Ae", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "œ": "oe", "đ": "d"})
_SYMBOLS = {"&": " and ", "%": " percent ", "@": " at ", "+": " plus ", "=": " equals ", "°": " degrees ", "#": " number "}
_CURRENCY = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
_MONEY = re.compile(r"([$€£])\s?(\d[\d,]*)(?:\.(\d\d?))?(?:\s?(hundred|thousand|million|billion))?", re.I)
_TIME = re.compile(r"\b(\d{1,2}):(\d\d)\b")
_ORDINAL = re.compile(r"\b(\d[\d,]*)(?:st|nd|rd|th)\b", re.I)
_DECADE = re.compile(r"\b(\d{2,4})s\b")
_RANGE = re.compile(r"(?<=\d)\s?-\s?(?=\d)")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


# ----------------------------------------------------------------------------- numbers

def _words(value, **kind) -> str:
    from num2words import num2words
    return num2words(value, **kind).replace(",", "")


def _cardinal(digits: str) -> str:
    """Digits (commas and a decimal part allowed) as words; four digits without a comma read as a year."""
    plain = digits.replace(",", "")
    whole, _, fraction = plain.partition(".")
    if len(whole) > 15 or (len(whole) > 1 and whole[0] == "0"):            # a phone number, a code: digit by digit
        spoken = " ".join(_words(int(d)) for d in whole)
    elif not fraction and "," not in digits and len(whole) == 4 and 1100 <= int(whole) <= 2099:
        spoken = _words(int(whole), to="year")
    else:
        spoken = _words(int(whole))
    return spoken + (" point " + " ".join(_words(int(d)) for d in fraction) if fraction else "")


def _money(match: re.Match) -> str:
    sign, whole, cents, scale = match.groups()
    unit, part = _CURRENCY[sign]
    if scale:
        return f"{_cardinal(whole)}{' point ' + ' '.join(_words(int(d)) for d in cents) if cents else ''} {scale} {unit}s"
    value = int(whole.replace(",", ""))
    spoken = f"{_words(value)} {unit}{'' if value == 1 else 's'}"
    few = int(cents.ljust(2, "0")) if cents else 0
    plural = "pence" if part == "penny" else part + "s"
    return spoken + (f" and {_words(few)} {part if few == 1 else plural}" if few else "")


def _clock(match: re.Match) -> str:
    hour, minute = int(match[1]), int(match[2])
    if minute == 0:
        return f"{_words(hour)} o'clock" if hour <= 12 else f"{_words(hour)} hundred"
    return f"{_words(hour)} {'oh ' if minute < 10 else ''}{_words(minute)}"


def _decade(match: re.Match) -> str:
    spoken = _words(int(match[1]), to="year") if len(match[1]) == 4 else _words(int(match[1]))
    return spoken[:-1] + "ies" if spoken.endswith("y") else spoken + "s"


def _expand_numbers(text: str) -> str:
    text = _MONEY.sub(_money, text)
    text = _TIME.sub(_clock, text)
    text = _ORDINAL.sub(lambda m: _words(int(m[1].replace(",", "")), to="ordinal") if len(m[1]) < 16 else m[1], text)
    text = _DECADE.sub(_decade, text)
    text = _RANGE.sub(" to ", text)
    text = re.sub(r"(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])", " ", text)
    return _NUMBER.sub(lambda m: f" {_cardinal(m[0].rstrip(','))}{',' if m[0].endswith(',') else ''} ", text)


# ----------------------------------------------------------------------------- spoken form

def spoken(text: str) -> str:
    """What is spoken, with its capitals: ASCII letters . , ? ! ' - and single spaces; numbers as words.

    Raises ValueError where nothing speakable is left.
    """
    text = unicodedata.normalize("NFKC", text.translate(_PLAIN)).translate(_PLAIN)
    text = _expand_numbers(text)
    for symbol, word in _SYMBOLS.items():
        text = text.replace(symbol, word)
    text = unicodedata.normalize("NFKD", text.replace("—", ", ")).encode("ascii", "ignore").decode()
    text = re.sub(r"\.{2,}(?=\s+[a-z])", ",", text)                        # a hesitation inside a sentence
    text = re.sub(r"\s+-+\s+|--+|[;:]", ", ", text)
    text = re.sub(r"[^A-Za-z.,?!' \-]+", " ", text)
    text = re.sub(r"(?<![A-Za-z])['-]+(?![A-Za-z])", " ", text)
    text = re.sub(r"(?<![A-Za-z.?!])-|-(?![A-Za-z])", " ", text)
    return _punctuate(text)


def _punctuate(text: str) -> str:
    """One mark at a time, each right after a word; a sentence is never opened by a mark."""
    text = re.sub(r"\s+([.,?!])", r"\1", text)
    text = re.sub(r"[.,?!]{2,}", lambda m: next(mark for mark in "?!.," if mark in m[0]), text)
    text = re.sub(r"([.,?!])(?=[A-Za-z])", r"\1 ", text)
    text = re.sub(r"\s+", " ", text).strip().lstrip(".,?!- ").strip()
    if not re.search("[A-Za-z]", text):
        raise ValueError("nothing speakable in this text: write at least one word in Latin letters")
    return text


def normalise(text: str) -> str:
    """The model's text: `spoken(text)` in lower case (same length, so positions carry over)."""
    return spoken(text).lower()


def read_aloud(text: str) -> str:
    """The model's text of what somebody typed: `normalise`, with titles, units, dates and abbreviations in words first. Training texts go through `normalise` alone."""
    return normalise(written_out(text))


def sentence_case(text: str) -> str:
    """Normalised text made readable: capitals at sentence starts and for the word I."""
    text = re.sub(r"\bi\b", "I", text.strip())
    return re.sub(r"(^|[.?!]\s+)([a-z])", lambda m: m[1] + m[2].upper(), text)


# ----------------------------------------------------------------------------- tokenizers

class _Tags:
    """Turn prefixes; needs bos, listen and the first speaker and mood ids."""
    bos, listen, first_speaker, first_mood = BOS, LISTEN, FIRST_SPEAKER, FIRST_MOOD

    def _speaker(self, index: int) -> int:
        if not 0 <= index < NUM_SPEAKERS:
            raise ValueError(f"speaker index {index} is not in 0..{NUM_SPEAKERS - 1}: use at most {NUM_SPEAKERS} speakers in one conversation")
        return self.first_speaker + index

    def speak_prefix(self, speaker: int, mood: str | None = None) -> list[int]:
        """[BOS, SPEAKER] or [BOS, SPEAKER, MOOD]. Raises ValueError for an unknown speaker or mood."""
        ids = [self.bos, self._speaker(speaker)]
        if mood is None:
            return ids
        if mood not in MOODS:
            raise ValueError(f"unknown mood {mood!r}: use one of {', '.join(MOODS)}")
        return ids + [self.first_mood + MOODS.index(mood)]

    def listen_prefix(self, speaker: int) -> list[int]:
        """[BOS, SPEAKER, LISTEN]."""
        return [self.bos, self._speaker(speaker), self.listen]


class ByteTokenizer(_Tags):
    """Bytes of the normalised text; 320 ids with the special tokens."""
    name = "bytes"
    vocab_size = VOCAB_SIZE
    pad, eot, transcript = PAD, EOT, TRANSCRIPT

    def encode(self, text: str) -> list[int]:
        return list(normalise(text).encode("ascii"))

    def decode(self, ids) -> str:
        """Readable text of the byte ids; special tokens are skipped."""
        return sentence_case(bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", "ignore"))


class FileTokenizer(_Tags):
    """A tokenizer.json (package `tokenizers`); the special tokens follow its own ids."""

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("a tokenizer.json needs the package `tokenizers`: pip install tokenizers, or use --tokenizer bytes") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                                         # the package raises bare Exception
            raise ValueError(f"cannot read the tokenizer {path} ({error}): give a tokenizer.json") from None
        self.name = str(path)
        base = self._tokenizer.get_vocab_size()
        shift = base - 256
        self.base, self.vocab_size = base, VOCAB_SIZE + shift
        self.pad, self.bos, self.eot, self.listen, self.transcript = (i + shift for i in (PAD, BOS, EOT, LISTEN, TRANSCRIPT))
        self.first_speaker, self.first_mood = FIRST_SPEAKER + shift, FIRST_MOOD + shift

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(normalise(text), add_special_tokens=False).ids

    def decode(self, ids) -> str:
        return sentence_case(self._tokenizer.decode([int(i) for i in ids if 0 <= int(i) < self.base]))


def load_tokenizer(name: str = "bytes"):
    """"bytes" or the path of a tokenizer.json. Raises ValueError naming what to give."""
    if name == "bytes":
        return ByteTokenizer()
    if not Path(name).is_file():
        raise ValueError(f"no tokenizer {name!r}: use bytes or the path of a tokenizer.json")
    return FileTokenizer(name)
