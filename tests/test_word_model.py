"""Words that follow words, and the search over letters: against counting by hand and trying every text."""
import itertools
import math

import pytest

from word_model import START, Weights, WordModel, search

TEXTS = ["The cat sat on the mat.", "The cat ran. The dog sat!", "It's the cat's mat."]


@pytest.fixture
def model():
    return WordModel(TEXTS, known=["hat", "cat"])


def test_a_bigram_is_what_counting_says(model):
    assert model.after["the"] == 5 and model.follows["the"] == 4 and model.pairs["the", "cat"] == 2
    single = model.single["cat"] / model.total * (1 - 1e-3)
    assert math.isclose(math.exp(model.next("the", "cat")), (2 - 0.75) / 5 + 0.75 * 4 / 5 * single)
    assert model.next(START, "the") > model.next("cat", "the")
    assert model.next("never", "cat") == model.word("cat"), "after a word that was never seen a word is as likely as anywhere"


def test_all_that_follows_sums_to_one(model):
    """Over the words that were read; what is left is for new ones."""
    for before in ("the", "cat", START):
        total = sum(math.exp(model.next(before, word)) for word in model.single)
        assert 0.998 < total <= 1.0


def test_known_words_beat_unknown_ones_and_read_ones_beat_both(model):
    assert model.word("mat") > model.word("hat") > model.word("zat")


def probabilities(rows, letters):
    """[{letter or "": p}, ...] -> log-probabilities, blank first; the rest shared out."""
    out = []
    for row in rows:
        rest = (1 - sum(row.values())) / (1 + len(letters) - len(row))
        out.append([math.log(row.get(c, rest)) for c in ("", *letters)])
    return out


def test_the_search_finds_what_trying_everything_finds(model):
    """Without a beam's limits: every path of letters is summed by its text, then judged by the words."""
    letters = "athc "
    rows = probabilities([{"c": 0.5, "h": 0.3}, {"": 0.5, "a": 0.3}, {"a": 0.5, "": 0.2}, {"t": 0.6, "": 0.3}, {"t": 0.4, " ": 0.4}], letters)
    how = Weights(words=0.7, each=0.5, unknown=-1.0, beam=10 ** 6, least=-100.0)
    sums: dict[str, float] = {}
    for path in itertools.product(range(len(letters) + 1), repeat=len(rows)):
        text = "".join(letters[c - 1] for c, _ in itertools.groupby(path) if c)
        if not text.startswith(" ") and "  " not in text:
            sums[text] = sums.get(text, 0.0) + math.exp(sum(row[c] for row, c in zip(rows, path)))

    def judged(text: str) -> float:
        total, before = math.log(sums[text]), START
        for word in text.split():
            strange = [n for n in range(1, len(word) + 1) if word[:n] not in model.begun]
            total += how.unknown * len(strange) + how.each + how.words * (model.stranger if strange else model.next(before, word))
            before = word
        return total
    assert search(rows, letters, model, how) == max(sums, key=judged).strip()


def test_the_words_decide_between_like_letters(model):
    rows = probabilities([{"c": 0.45, "z": 0.5}, {"a": 0.9}, {"t": 0.9}], "catz ")
    assert search(rows, "catz ", model) == "cat"
    assert search(rows, "catz ", model, Weights(words=0.0, each=0.0, unknown=0.0)) == "zat", "without words the letters alone decide"


def test_doubled_letters_need_a_blank_between(model):
    sure = {"least": -8.0, "words": 0.0, "each": 0.0, "unknown": 0.0}
    rows = [{"h": 0.97}, {"t": 0.97}, {"": 0.97}, {"t": 0.97}]
    assert search(probabilities(rows, "ht "), "ht ", model, Weights(**sure)) == "htt"
    assert search(probabilities([rows[0], rows[1], rows[1]], "ht "), "ht ", model, Weights(**sure)) == "ht"


def test_marks_end_words_and_sentences(model):
    letters = "cathe.,' "
    said = "the cat. it's"
    rows = probabilities([{c if c in letters else "": 0.97} for c in said], letters)
    assert search(rows, letters, model).startswith("the cat.")
    assert search([], letters, model) == ""
