"""What is spoken, and token ids."""
import re

import pytest

import text_tokenizer as tt
from config import MOODS


@pytest.mark.parametrize("text, expected", [
    ("It's 3:30 - 20% off!", "it's three thirty, twenty percent off!"),
    ("I paid $9.99 on the 3rd of March 2024, caf\u00e9\u2026", "i paid nine dollars and ninety-nine cents on the third of march twenty twenty-four, cafe."),
    ("\u201cHello\u201d \u2014 she said: no; yes", "hello, she said, no, yes"),
    ("1,250 people, 7:00, the 1980s, 12-15 kids", "one thousand two hundred and fifty people, seven o'clock, the nineteen eighties, twelve to fifteen kids"),
    ("don\u2019t  worry \U0001f600", "don't worry"),
    ("Really?! No...", "really? no."),
    ("Code 007, 3.14", "code zero zero seven, three point one four"),
])
def test_normalise(text, expected):
    assert tt.normalise(text) == expected


@pytest.mark.parametrize("text", ["", "  ", "...", "\U0001f600\U0001f600", "\u043f\u0440\u0438\u0432\u0435\u0442"])
def test_nothing_speakable(text):
    with pytest.raises(ValueError, match="at least one word"):
        tt.normalise(text)


@pytest.mark.parametrize("text", ["A - B -- c", "'tis x-ray -y- 'q' 'n'", "1e999 9" + "9" * 40, "$1,000,000.5 \u00a33", "a\x00b\nc\td", "?!.,a.,!?b", "99:99 0:00 00th 5th's"])
def test_only_the_alphabet_remains_and_it_is_stable(text):
    once = tt.normalise(text)
    assert re.fullmatch(r"[a-z.,?!'\-]+( [a-z.,?!'\-]+)*", once)
    assert tt.normalise(once) == once


def test_spoken_keeps_capitals_at_the_same_places():
    text = "Mr. Smith, I'm 5!"
    assert tt.spoken(text) == "Mr. Smith, I'm five!"
    assert tt.spoken(text).lower() == tt.normalise(text)


def test_bytes_round_trip():
    tokenizer = tt.load_tokenizer("bytes")
    ids = tokenizer.encode("Hello there. I am 5.")
    assert max(ids) < 256 and len(ids) == len(tt.normalise("Hello there. I am 5."))
    assert tokenizer.decode([tt.BOS, *ids, tt.EOT]) == "Hello there. I am five."


def test_prefixes_and_special_ids():
    tokenizer = tt.ByteTokenizer()
    assert tokenizer.speak_prefix(2) == [tt.BOS, tt.FIRST_SPEAKER + 2]
    assert tokenizer.speak_prefix(0, "calm") == [tt.BOS, tt.FIRST_SPEAKER, tt.FIRST_MOOD + MOODS.index("calm")]
    assert tokenizer.listen_prefix(7) == [tt.BOS, tt.FIRST_SPEAKER + 7, tt.LISTEN]
    special = [tt.PAD, tt.BOS, tt.EOT, tt.LISTEN, tt.TRANSCRIPT, *range(tt.FIRST_SPEAKER, tt.FIRST_SPEAKER + 8), *range(tt.FIRST_MOOD, tt.FIRST_MOOD + 8)]
    assert len(set(special)) == len(special) and min(special) == 256 and max(special) < tt.VOCAB_SIZE
    with pytest.raises(ValueError, match="speaker"):
        tokenizer.speak_prefix(8)
    with pytest.raises(ValueError, match="neutral"):
        tokenizer.speak_prefix(0, "grumpy")


def test_tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "you": 1, ".": 2, "[UNK]": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tt.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode("Hello you.") == [0, 1, 2]
    assert loaded.bos == 5 and loaded.speak_prefix(0)[0] == 5 and max(loaded.speak_prefix(7, MOODS[-1])) < loaded.vocab_size


def test_unknown_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json"):
        tt.load_tokenizer("nowhere.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer"):
        tt.load_tokenizer(str(tmp_path / "bad.json"))
