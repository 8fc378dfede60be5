"""Answers from written dialogues, by the similarity of what was said before them. Knows no model."""
from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple


class Match(NamedTuple):
    """A written reply; score: how near its question is; covered: share of what was said that its question and it know, words counted by how telling they are."""
    score: float
    reply: dict
    covered: float


class Retriever:
    """Answers from written dialogues: what was said after the most similar turns (TF-IDF cosine).

    A turn that opens its dialogue stands for itself, so the answer to it counts for more; so does an answer
    that takes up words of the question or of what was said before it.
    """
    OPENING, ECHO = 1.3, 2.0
    LOOKED_AT = 200                                             # most similar turns whose answers are looked at

    def __init__(self, dialogues: list[dict]):
        """dialogues: {"kind": str, "turns": [{"speaker", "mood", "text"}, ...]}, as in assets/dialogues."""
        self.pairs: list[tuple[str, dict, int]] = []            # said, answered, how many turns came before
        for dialogue in dialogues:
            turns = dialogue["turns"]
            for before, (a, b) in enumerate(zip(turns, turns[1:])):
                if a["speaker"] != b["speaker"] and (dialogue.get("kind") != "assistant" or b["speaker"] == "assistant"):
                    self.pairs.append((a["text"], b, before))
        counts = [Counter(_terms(said)) for said, _, _ in self.pairs]
        seen = Counter(term for count in counts for term in count)
        self.weight = {term: math.log(len(counts) / n) + 1 for term, n in seen.items()}
        self.index: dict[str, list] = {}
        for number, count in enumerate(counts):
            for term, value in self._vector(count).items():
                self.index.setdefault(term, []).append((number, value))

    def _vector(self, count: Counter) -> dict[str, float]:
        vector = {t: (1 + math.log(n)) * self.weight[t] for t, n in count.items() if t in self.weight}
        norm = math.sqrt(sum(v * v for v in vector.values())) or 1.0
        return {t: v / norm for t, v in vector.items()}

    def nearest(self, text: str, count: int = 8, before: str = "") -> list[Match]:
        """The best first. before: what was said before `text`."""
        asked, about, scores = self._vector(Counter(_terms(text))), self._vector(Counter(_terms(f"{before} {text}"))), Counter()
        for term, value in asked.items():
            for number, other in self.index[term]:
                scores[number] += value * other
        found = []
        for number, score in scores.most_common(max(self.LOOKED_AT, count)):
            said, reply, turns = self.pairs[number]
            echo = sum(v * about.get(t, 0.0) for t, v in self._vector(Counter(_terms(reply["text"]))).items())
            found.append((score * (self.OPENING if turns == 0 else 1.0) + self.ECHO * echo, said, reply))
        best = sorted(found, key=lambda one: -one[0])[:count]
        return [Match(score, reply, self._covered(text, f"{said} {reply['text']}")) for score, said, reply in best]

    def _covered(self, text: str, known: str) -> float:
        words, there = set(_words(text)), set(_words(known))
        rare = max(self.weight.values())
        telling = {word: self.weight.get(word, rare) - 1 for word in words}
        return math.fsum(telling[w] for w in words & there) / (math.fsum(telling.values()) or 1.0)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _terms(text: str) -> list[str]:
    words = _words(text)
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]
