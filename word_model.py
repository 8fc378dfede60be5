"""Which words follow which, from written text; and the search for the words that letters and word model together like best.

    words = WordModel(sentences, known=["spelt", "right"])
    text = search(log_probabilities, letters, words)      # of a CTC over letters: (N, 1 + len(letters)), blank first

Knows no neural model. Bigrams with absolute discounting (Ney et al. 1994) over single words; a word never seen is spelt by a
letter model, so that a name can still be written. Search: prefix beam search with a word model at the end of each word (Hannun
et al. 2014), and a price for what begins no known word.
"""
from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass

WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
START = ""                    # before the first word of a sentence
DISCOUNT = 0.75
NEW = 1e-3                    # share of running words that were never seen
STOPS = ".?!"


class WordModel:
    """log P(word | word before)."""

    def __init__(self, texts, known=()):
        """texts: lines of writing; known: words that may come without having been read."""
        self.single, self.pairs, self.follows, self.total = Counter(), Counter(), Counter(), 0
        for text in texts:
            for sentence in re.split(r"[.?!]+", text.lower()):
                before = START
                for word in WORD.findall(sentence):
                    self.single[word] += 1
                    self.pairs[before, word] += 1
                    before = word
        for before, _ in self.pairs:
            self.follows[before] += 1
        self.after = Counter()
        for (before, _), n in self.pairs.items():
            self.after[before] += n
        self.rare = set(known) - self.single.keys()
        self.total = sum(self.single.values())
        self.begun = {word[:n] for word in (*self.single, *self.rare) for n in range(1, len(word) + 1)}
        self.letters = Counter(c for word in (*self.single, *self.rare) for c in f"{word} ")
        self.spelt = sum(self.letters.values())
        self.stranger = math.log(NEW / 2)                                      # that a word is none of the known ones

    @functools.lru_cache(maxsize=2 ** 16)                                      # noqa: B019     one model lives as long as the program
    def word(self, word: str) -> float:
        """log P(word), whatever came before."""
        if word in self.single:
            return math.log(self.single[word] / self.total) + math.log1p(-NEW)
        if word in self.rare:
            return math.log(NEW / 2 / len(self.rare))
        spelling = sum(math.log((self.letters[c] + 1) / (self.spelt + 100)) for c in f"{word} ")
        return math.log(NEW / 2) + spelling

    @functools.lru_cache(maxsize=2 ** 18)                                      # noqa: B019
    def next(self, before: str, word: str) -> float:
        """log P(word | before)."""
        count = self.after[before]
        if not count:
            return self.word(word)
        seen = max(0.0, self.pairs[before, word] - DISCOUNT) / count
        return math.log(seen + DISCOUNT * self.follows[before] / count * math.exp(self.word(word)))


@dataclass(frozen=True)
class Weights:
    """How much the word model counts."""
    words: float = 0.4        # of its log-probabilities
    each: float = 2.0         # for every word, against a liking for few
    unknown: float = -3.0     # for every letter from where no known word begins like that
    beam: int = 12
    least: float = -8.0       # letters less likely than this (log) are not tried


def _add(a: float, b: float) -> float:
    low, high = (a, b) if a < b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


class _Text:
    """What the word model says of a text so far: score of its finished words, the one that is being spelt, the one before."""
    __slots__ = ("text", "score", "part", "before", "strange")

    def __init__(self, text="", score=0.0, part="", before=START, strange=False):
        self.text, self.score, self.part, self.before, self.strange = text, score, part, before, strange

    def ended(self, model: WordModel, how: Weights) -> float:
        if not self.part:
            return self.score
        price = model.stranger if self.strange else model.next(self.before, self.part)
        return self.score + how.words * price + how.each

    def then(self, c: str, model: WordModel, how: Weights) -> "_Text":
        text = self.text + c
        if c.isalpha() or (c == "'" and self.part):
            part = self.part + c
            strange = part not in model.begun
            return _Text(text, self.score + how.unknown * strange, part, self.before, strange)
        before = START if c in STOPS else self.part or self.before
        return _Text(text, self.ended(model, how), "", before)


def search(log_probs, letters: str, model: WordModel, how: Weights = Weights()) -> str:
    """log_probs: (N, 1 + len(letters)) nested lists or an array, blank first -> the best text, "" for nothing."""
    beams = {"": [_Text(), 0.0, -math.inf]}                                    # text -> what is known of it, log p ending in blank, in a letter
    for step in log_probs:
        found = _one_step(beams, step, letters, model, how)
        kept = sorted(found.values(), key=lambda at: -(_add(at[1], at[2]) + at[0].score))[:how.beam]
        beams = {at[0].text: at for at in kept}
    best = max(beams.values(), key=lambda at: _add(at[1], at[2]) + at[0].ended(model, how))
    return best[0].text.strip()


def _one_step(beams: dict[str, list], step, letters: str, model: WordModel, how: Weights) -> dict[str, list]:
    """What the texts so far become by one more step of the CTC."""
    found: dict[str, list] = {}
    tried = [(letters[i - 1], p) for i, p in enumerate(step) if i and p > how.least]

    def reach(text: _Text, blank: float, letter: float) -> None:
        at = found.setdefault(text.text, [text, -math.inf, -math.inf])
        at[1], at[2] = _add(at[1], blank), _add(at[2], letter)
    for known, blank, letter in beams.values():
        both, last = _add(blank, letter), known.text[-1:]
        reach(known, both + step[0], -math.inf)
        for c, p in tried:
            if c == last:
                reach(known, -math.inf, letter + p)                            # the same letter goes on
                if blank > -math.inf and c != " ":
                    reach(known.then(c, model, how), -math.inf, blank + p)
            elif c != " " or last:
                reach(known.then(c, model, how), -math.inf, both + p)
    return found
