"""What was said, taken up as a question, as a listener does who wants to hear more. Knows no model.

    mirror("My sister moved out. I kept the cat.")     # "You kept the cat?"

Weizenbaum's ELIZA (1966) answered so, and reflective listening (Rogers 1951) is the habit it copied.
"""
from __future__ import annotations

import functools
import gzip
import json
import math
import re
from importlib import resources
from typing import Mapping, NamedTuple

LONGEST = 10                                                    # words of a clause that is said back whole
MOST = 80                                                       # characters of anything that is said back
FLIPPED = {"i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself", "we": "you", "us": "you", "our": "your", "ours": "yours",
           "i'm": "you're", "i've": "you've", "i'd": "you'd", "i'll": "you'll", "we're": "you're", "we've": "you've", "we'd": "you'd", "we'll": "you'll", "am": "are"}
WAS = {"was": "were", "wasn't": "weren't"}                      # after "I"
TO_THE_LISTENER = re.compile(r"\b(?:you|your|yours|yourself|you're|you've|you'd|you'll|let's)\b", re.I)
OPENERS = re.compile(r"(?:(?:oh|um|uh|er|well|and|but|so|okay|ok|yes|yeah|yep|no|nope|nah|hmm|hm|mm|ah|aw|look|right|because|still|then|honestly|actually|anyway|"
                     r"also|please|sorry|ha|hi|hello|hey|wait)\b[ ,.!]*)+", re.I)
SENTENCE = re.compile(r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\bProf\.)(?:(?<=[.?!])\s+(?=[A-Z])|(?<=[a-z]{3}[.?!])\s+)")     # between two
PARTING = re.compile(r"\b(?:bye|goodbye|good night|goodnight|thanks|thank you|see you|cheers)\b", re.I)
NOTHING = {"something", "anything", "nothing", "everything", "someone", "anyone", "everyone", "somebody", "anybody", "everybody", "nobody", "one", "thing", "things", "lot", "kind",
           "sort", "bit", "way", "time", "deal", "rest", "ones", "moment", "ok", "okay"}
BARE = {"be", "is", "are", "was", "were", "am", "been", "being", "'s", "'re", "'m", "have", "has", "had", "'ve", "'d", "do", "does", "did", "don't", "didn't", "doesn't", "get", "got", "go", "know", "think", "say", "said"}


class Word(NamedTuple):
    """A word with its Penn Treebank tag and the space after it."""
    text: str
    tag: str
    space: str


@functools.lru_cache(maxsize=1)
def _tools() -> tuple:
    """hibari's tokenizer and tagger alone: its pronunciations would take 80 MB."""
    from hibari.g2p.tagger import Tagger
    from hibari.g2p.tokenize import Tokenizer
    assets = resources.files("hibari") / "assets"
    return (Tokenizer(json.loads((assets / "tokenizer_exceptions.json").read_text(encoding="utf-8"))),
            Tagger(json.loads(gzip.decompress((assets / "tagger.json.gz").read_bytes()))))


def tagged(text: str) -> list[Word]:
    tokenize, tag = _tools()
    pairs = tokenize(text)
    return [Word(word, kind, space) for (word, space), kind in zip(pairs, tag([word for word, _ in pairs]) if pairs else [])]


def mirror(text: str, weight: Mapping[str, float] | None = None) -> str | None:
    """What weighs most of `text`, as a question from the one who heard it; None where there is nothing to take up.

    A short statement comes back as a whole, I and you exchanged; of a question, of a long sentence and of one about the listener
    only the thing that it is about. weight: word -> how telling it is (Retriever.weight); unknown words tell most.
    """
    if PARTING.search(text):
        return None
    found = [taken for sentence in SENTENCE.split(text.strip()) if (taken := _taken_up(sentence)) and len(taken) <= MOST and re.search("[A-Za-z]{2}", taken)]
    if not found:
        return None
    best = max(found, key=lambda taken: _tells(taken, weight or {}))
    return best[0].upper() + best[1:] + "?"


def _taken_up(sentence: str) -> str | None:
    clause = OPENERS.sub("", sentence.strip(), count=1) if OPENERS.match(sentence.strip()) else sentence.strip()
    whole = not clause.endswith("?") and not TO_THE_LISTENER.search(clause)
    clause = clause.rstrip(".?!,;: ")
    if whole and 2 <= len(clause.split()) <= LONGEST:
        return _flipped(clause) if _content(clause) else None
    return _thing(clause)


def _flipped(clause: str) -> str:
    """I and you exchanged, in a clause that is not about the listener."""
    before = ""

    def other(match) -> str:
        nonlocal before
        word, last, before = match[0].lower(), before, match[0].lower()
        return (WAS.get(word) if last == "i" else None) or FLIPPED.get(word, match[0])
    return re.sub(r"[A-Za-z']+", other, clause)


def _thing(clause: str) -> str | None:
    """The longest noun phrase with its article or owner: what a sentence is about."""
    phrases, open_ = [], []
    for token in [*tagged(clause), None]:
        tag = token.tag if token is not None else ""
        starts, inside = tag in ("DT", "PRP$"), tag in ("CD", "JJ", "JJR", "JJS", "POS") or tag.startswith("NN")
        if not inside or starts:
            phrases.append(open_)
            open_ = []
        if inside or starts:
            open_.append(token)
    phrases = [kept for phrase in phrases if (kept := _to_its_noun(phrase))]
    if not phrases:
        return None
    best = max(phrases, key=lambda phrase: sum(len(t.text) for t in phrase if t.tag != "DT"))
    return _flipped("".join(t.text + t.space for t in best).strip())


def _to_its_noun(phrase: list[Word]) -> list[Word]:
    """The phrase up to its last noun; nothing where that says nothing, or where it is the listener's."""
    while phrase and not phrase[-1].tag.startswith("NN"):
        phrase = phrase[:-1]
    empty = not phrase or phrase[-1].text.lower() in NOTHING | BARE or any(t.text.lower() == "your" for t in phrase)
    return [] if empty else phrase


def _content(clause: str) -> list[str]:
    """Words that name something: nouns, verbs that are not helpers, adjectives, numbers."""
    return [t.text.lower() for t in tagged(clause)
            if t.tag.startswith(("NN", "VB", "JJ", "CD")) and t.text.lower() not in BARE | NOTHING]


def _tells(taken: str, weight: Mapping[str, float]) -> float:
    rare = max(weight.values(), default=1.0)
    return math.fsum(weight.get(word, rare) for word in set(_content(taken)))
