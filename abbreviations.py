"""What people type, written out as it is said: titles, units, dates, abbreviations, letters. Knows no model.

    written_out("Dr. Lee watched TV at 9 p.m.")     # "doctor Lee watched tee vee at 9 pee em."

hibari's normaliser (Apache-2.0) does dates, units, times, Roman numerals and most abbreviations; its voice reads the rest from
a lexicon. A model that reads letters has none, so here they get their names.
"""
from __future__ import annotations

import re

LETTERS = dict(zip("abcdefghijklmnopqrstuvwxyz", "ay,bee,see,dee,ee,eff,jee,aitch,eye,jay,kay,ell,em,en,oh,pee,cue,are,ess,tee,you,vee,double you,ex,why,zee".split(",")))
WORDS = {"Mr": "mister", "MR": "mister", "Mrs": "missus", "MRS": "missus", "Dr": "doctor", "DR": "doctor", "PhD": "pee aitch dee", "USA": "you-ess-ay", "OK": "okay", "etc": "et cetera", "e.g": "for example", "i.e": "that is"}
SPELLED = {"AI", "API", "ATM", "CEO", "CIA", "DIY", "EU", "EV", "FAQ", "FBI", "IBM", "ID", "IP", "IQ", "IRS", "NYC", "OS", "SUV", "UFO", "UI", "UK", "UN", "URL", "USB", "UV", "VIP"}
SOUNDS = {"BRR", "GRR", "HM", "HMM", "MM", "MMM", "PFFT", "PSST", "SH", "SHH", "SHHH", "TSK", "ZZZ"}
READ = {"eg": "for example", "ie": "that is", "usa": WORDS["USA"]}     # of letters with dots
TITLED = re.compile(r"\b(" + "|".join(map(re.escape, WORDS)) + r")\b\.?")
DOTTED = re.compile(r"\b((?:[A-Za-z]\.\s?){1,5}[A-Za-z]\.)(?!\w)")
CAPITALS = re.compile(r"\b([A-Z]{2,5})('?s)?\b")
WORD_TOO = re.compile(r"\b([Nn]os?|[Ff]ig|[Cc]h|eds?|est|Sun|Sat|Wed|Mar|Hon|Gen)\.(?!\s?\d)")                     # short for something only before a number
NEEDED = re.compile(r"[^A-Za-z\s.,?!'-]|[A-Z]{2}|[a-z][A-Z]|\b[A-Za-z]\.|\.\s+[a-z]|\b(?:etc|vs|aka|Jr|Sr|Prof|[DMF]r|Mrs|Ms|[SM]t|Ft|Lt|Col|Sgt|Capt|Gov|Sen|Rep|Rev)\b|"
                    r"\b(?:Jan|Feb|Apr|Aug|Sept?|Oct|Nov|Dec|Ave|Blvd|Rd|Ltd|Inc|Corp|Co|Dept|Apt|Bros)\.")


def written_out(text: str) -> str:
    """The text in words that can be read letter by letter; text of which nothing is short comes back as it is."""
    if not NEEDED.search(text):
        return text
    from hibari.g2p.normalize import normalize
    text = normalize(WORD_TOO.sub(r"\1 .", text))                                            # apart from its stop it is left alone
    text = TITLED.sub(_word, DOTTED.sub(_dotted, text))
    return CAPITALS.sub(_capitals, text)


def _ends(match: re.Match) -> str:
    """A full stop, where the abbreviation's own one ends the sentence as well."""
    rest = match.string[match.end():]
    return "." if match[0].rstrip().endswith(".") and (not rest.strip() or re.match(r"\s+[A-Z]", rest)) else ""


def _word(match: re.Match) -> str:
    return WORDS[match[1]] + ("" if match[1].lower() in ("mr", "mrs", "dr") else _ends(match))


def _dotted(match: re.Match) -> str:
    letters = re.sub(r"[^a-z]", "", match[0].lower())
    return READ.get(letters, spelled(letters)) + _ends(match)


def _capitals(match: re.Match) -> str:
    word, ending = match[1], match[2] or ""
    if word not in SPELLED and (word in SOUNDS or set(word) & set("AEIOUY")):
        return match[0]
    return spelled(word) + ending


def spelled(word: str) -> str:
    """The names of its letters."""
    return " ".join(LETTERS[letter] for letter in word.lower())
