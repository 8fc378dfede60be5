"""What people type is written out as it is said."""
import pytest

from abbreviations import written_out
from generation import sentences, split_text
from text_tokenizer import normalise, read_aloud

READ = [
    ("Only Mr Petrov next door.", "only mister petrov next door."),
    ("Mrs. Jones called Dr. Smith and Ms Lee.", "missus jones called doctor smith and miz lee."),
    ("Dr. Kim lives at 12 Main St. in St. Louis.", "doctor kim lives at twelve main street in saint louis."),
    ("I watch TV on the BBC, not on NASA's channel.", "i watch tee vee on the bee bee see, not on nasa's channel."),
    ("The CEO's TVs, a USB cable, OK?", "the see ee oh's tee vees, a you ess bee cable, okay?"),
    ("It was 5 km at 7:05 p.m. on Jan. 3rd, 1998.", "it was five kilometers at seven oh five pee em on january third, nineteen ninety-eight."),
    ("We came at 9 a.m. He left at 5 p.m.", "we came at nine ay em. he left at five pee em."),
    ("From the U.S. to the U.K., e.g. by ship, etc.", "from the you ess to the you kay, for example by ship, et cetera."),
    ("The U.S.A. and the USA", "the you-ess-ay and the you-ess-ay"),
    ("TELL MR LEE WHY THE TV IS ON!", "tell mister lee why the tee vee is on!"),
    ("Henry VIII ate 1/2 of it.", "henry the eighth ate one half of it."),
    ("A PhD? I.e. a doctor.", "a pee aitch dee? that is a doctor."),
]
LEFT = ["Oh no. I forgot.", "I said no.", "She ate a fig. Good.", "We lay in the Sun. It was hot.", "So do I. Then we left.", "Hmm, PSST.", "I AM SO HAPPY", "I am SO happy.", "I told you WHY.", "It works.", "well, i went home", "..."]


@pytest.mark.parametrize("typed, said", READ)
def test_short_forms_are_read_in_full(typed, said):
    assert read_aloud(typed) == said == read_aloud(said)                    # and that again is the same


@pytest.mark.parametrize("typed", LEFT)
def test_words_are_left_alone(typed):
    assert written_out(typed) == typed


def test_a_number_makes_the_difference():
    assert read_aloud("I said no. Then no. 5 came, on Mar. 5.") == "i said no. then number five came, on march fifth."


def test_a_sentence_does_not_end_after_a_title():
    text = "Yesterday I met Dr. Smith. He knows J. Doe and Mrs. Lee. So do I. Now Prof. Kim vs. Mr. Wu."
    parts = ["Yesterday I met Dr. Smith.", "He knows J. Doe and Mrs. Lee.", "So do I.", "Now Prof. Kim vs. Mr. Wu."]
    assert split_text(text, 30) == parts
    assert [part for part, _ in sentences(f"{part} " for part in parts)] == [parts[0], parts[1], " ".join(parts[2:])]


def test_recordings_keep_their_letters_where_positions_count_them():
    """A voice whose reading positions are known counts the letters that were read; typed words are written out."""
    import torch

    from architecture import CSM
    from config import model_preset
    from generation import Session
    from text_tokenizer import ByteTokenizer
    session = Session(CSM(model_preset("test")).eval(), None, ByteTokenizer())
    codes = torch.zeros(8, 4, dtype=torch.long)
    session.set_voice(0, codes=codes, text="Mr. Lee.", consumed=[2, 4, 6, 8])
    assert session.voices[0].text == normalise("Mr. Lee.") == "mr. lee." and session.voices[0].readings[-1] == session.voices[0].readings[0] + 8
    assert session._given(0, "Mr. Lee.", None, None).text == "mister lee." and session.planned(0, "At 5 km.")[0].text == "at five kilometers."
