"""Which pronunciation was said: the two tests that Sesame describes for CSM, rebuilt with a judge that is itself tested.

*Homograph disambiguation*: does "lead" sound as its sentence asks? *Continuation consistency*: does a word keep the
pronunciation that the conversation has given it? The judge aligns the sound with the sentence once per pronunciation (CMU
PocketSphinx, trained on people) and takes the likelier one. Words, sentences and phones are in assets/pronunciation.json.
Imports no model of ours: what speaks comes in as a function.
"""
from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np

TABLE = Path(__file__).parent / "assets" / "pronunciation.json"
MARGIN = 0.004                  # of PocketSphinx's path score: nearer than this the judge abstains
ENGINES = ("hibari", "kokoro")


def load_table(path: Path = TABLE) -> dict:
    """{homographs, continuation}. ValueError where the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): get the whole repository") from None


# ----------------------------------------------------------------------------- the judge

def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _align_score(decoder, sound: bytes, words: list[str]) -> float | None:
    """Path score of the sound aligned with the words; None where it does not fit at all."""
    decoder.set_align_text(" ".join(words))
    decoder.start_utt()
    decoder.process_raw(sound, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return None if found is None else float(found.best_score)


def which_variant(audio: np.ndarray, text: str, word: str, variants: dict[str, str]) -> dict:
    """{choice: the variant heard or None (abstains), margin}. variants: name -> ARPAbet. ValueError for a word that the judge does not know."""
    import judges
    from conversation_metrics import _sphinx, pcm
    words = _words(text)
    if word not in words:
        raise ValueError(f"{word!r} is not in {text!r}")
    decoder = _sphinx()
    unknown = [w for w in words if w != word and decoder.lookup_word(w) is None]
    if unknown:
        raise ValueError(f"the judge does not know {unknown[0]!r}: write another sentence")
    if judges.unjudgeable(audio):
        return {"choice": None, "margin": None}
    scores, sound = {}, pcm(audio)
    for name, phones in variants.items():
        entry = f"{word}-as-{'-'.join(phones.lower().split())}"
        if decoder.lookup_word(entry) is None:
            decoder.add_word(entry, phones, True)
        scores[name] = _align_score(decoder, sound, [entry if w == word else w for w in words])
    fitting = sorted((s, name) for name, s in scores.items() if s is not None)
    if not fitting:
        return {"choice": None, "margin": None}
    margin = fitting[-1][0] - fitting[-2][0] if len(fitting) > 1 else None
    return {"choice": fitting[-1][1] if margin is None or margin >= MARGIN else None, "margin": margin}


# ----------------------------------------------------------------------------- speech whose pronunciation is known

def say_as(text: str, word: str, phones: str, who, seed: int = 0) -> np.ndarray:
    """One sentence by the embedded TTS, its word `word` said with these phones -> audio (N,) at 24 kHz."""
    import synthetic_conversations as synthetic
    symbols, owner = synthetic.phonemes(text)
    place = [re.sub(r"[^a-z']", "", w.lower()) for w in text.split()].index(word)
    inside = [i for i, o in enumerate(owner) if o == place]
    forced = symbols[:inside[0]] + phones + symbols[inside[-1] + 1:]
    return synthetic._engine(who.engine).sentence(forced, who, (0.0, 0.0, 0.0, 0.0), np.random.default_rng(seed))[0]


def drawn_voice(seed: int, engine: str = "hibari"):
    import synthetic_conversations as synthetic
    return synthetic.draw_character(f"judge-{seed}", engine, synthetic.rng_of("pronunciation", engine, seed))


# ----------------------------------------------------------------------------- counting

def share(right: int, count: int, z: float = 1.96) -> dict:
    """{mean, low, high, n}: a share with its Wilson interval at 95 %."""
    if not count:
        return {"mean": None, "low": None, "high": None, "n": 0}
    p, width = right / count, z * z / count
    middle = (p + width / 2) / (1 + width)
    reach = z * math.sqrt(p * (1 - p) / count + width / (4 * count)) / (1 + width)
    return {"mean": p, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach), "n": count}


def tally(rows: list[dict]) -> dict:
    """Of rows {word, wanted, choice}: accuracy over decided rows, abstained, per word, and what always saying a word's likelier variant would have reached."""
    decided = [r for r in rows if r["choice"] is not None]
    words = sorted({r["word"] for r in rows})
    per_word = {w: share(sum(r["choice"] == r["wanted"] for r in decided if r["word"] == w), sum(r["word"] == w for r in decided)) for w in words}
    asked = {w: [r["wanted"] for r in decided if r["word"] == w] for w in words}
    majority = sum(max(map(a.count, set(a)), default=0) for a in asked.values())
    favourite = sum(max((list(r["choice"] for r in decided if r["word"] == w).count(v) for v in {r["choice"] for r in decided if r["word"] == w}), default=0) for w in words)
    return {"accuracy": share(sum(r["choice"] == r["wanted"] for r in decided), len(decided)), "abstained": len(rows) - len(decided), "per_word": per_word,
            "majority": majority / len(decided) if decided else None, "favourite_share": favourite / len(decided) if decided else None}


# ----------------------------------------------------------------------------- the tests

def homograph_items(table: dict) -> list[tuple[str, str, str]]:
    """(word, sense, sentence), both senses of a word equally often."""
    return [(word, sense, sentence) for word, senses in table["homographs"].items() for sense, facts in senses.items() for sentence in facts["sentences"]]


def homographs(say, voices: int, table: dict | None = None, label: str = "homographs") -> list[dict]:
    """Rows {word, wanted, choice, margin, text}; say(text, number of the voice) -> audio (N,)."""
    from tqdm import tqdm
    table = table or load_table()
    rows = []
    for number, (word, sense, text) in tqdm([(v, item) for v in range(voices) for item in homograph_items(table)], desc=label, unit="sentence"):
        variants = {s: facts["arpabet"] for s, facts in table["homographs"][word].items()}
        rows.append({"word": word, "wanted": sense, "text": text, "voice": number} | which_variant(say(text, number), text, word, variants))
    return rows


def judge_rows(voices: int, engine: str = "hibari", swapped: bool = False, table: dict | None = None) -> list[dict]:
    """The judge put to the test: sentences whose pronunciation is forced; swapped: the other sense's, which the judge must hear as such."""
    table = table or load_table()
    rows = []
    for voice in range(voices):
        who = drawn_voice(voice, engine)
        for word, sense, text in homograph_items(table):
            senses = table["homographs"][word]
            said = next(s for s in senses if (s != sense) == swapped)
            heard = which_variant(say_as(text, word, senses[said]["phones"], who, voice), text, word, {s: f["arpabet"] for s, f in senses.items()})
            rows.append({"word": word, "wanted": said, "text": text, "voice": voice} | heard)
        for word, facts in table["continuation"].items():
            for variant, how in facts["variants"].items():
                sound = say_as(facts["next"], word, how["phones"], who, voice)
                rows.append({"word": word, "wanted": variant, "text": facts["next"], "voice": voice}
                            | which_variant(sound, facts["next"], word, {v: f["arpabet"] for v, f in facts["variants"].items()}))
    return rows


def continuation(say_after, voices: int, how: str, table: dict | None = None) -> list[dict]:
    """Rows {word, wanted: the variant of the prompt, choice}. how: "same" or "other" speaker said the prompt, or "none" was said.

    say_after(prompt text, prompt audio or None, text, by the same speaker, number of the voice) -> audio (N,).
    """
    from tqdm import tqdm
    table = table or load_table()
    rows = []
    for voice, (word, facts) in tqdm([(v, item) for v in range(voices) for item in table["continuation"].items()], desc=f"continuation, prompt: {how}", unit="word"):
        variants = {v: f["arpabet"] for v, f in facts["variants"].items()}
        without = say_after(facts["prompt"], None, facts["next"], True, voice) if how == "none" else None
        for variant, forced in facts["variants"].items():
            sound = without
            if how != "none":
                prompt = say_as(facts["prompt"], word, forced["phones"], drawn_voice(voice), voice)
                sound = say_after(facts["prompt"], prompt, facts["next"], how == "same", voice)
            rows.append({"word": word, "wanted": variant, "text": facts["next"], "voice": voice} | which_variant(sound, facts["next"], word, variants))
    return rows
