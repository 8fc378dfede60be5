"""What was said comes back as a question of the listener's."""
import pytest

from demo import Responder
from mirroring import mirror


@pytest.mark.parametrize("said, taken", [
    ("I left the back door open.", "You left the back door open?"),
    ("We're moving my mother's piano.", "You're moving your mother's piano?"),
    ("I was late, but I wasn't sorry.", "You were late, but you weren't sorry?"),
    ("He told me I am wrong.", "He told you you are wrong?"),
    ("Oh, um, well, the clutch is gone.", "The clutch is gone?"),
    ("And wearing my late husband's fishing jacket. No wonder.", "Wearing your late husband's fishing jacket?"),
    ("Dr. Lee came at 9 p.m. on Friday.", "Dr. Lee came at 9 p.m. on Friday?"),                         # a stop that ends no sentence
    ("i left. she stayed with my parrot.", "She stayed with your parrot?"),
    ("What about the old lighthouse?", "The old lighthouse?"),                                          # of a question the thing
    ("There's a dog in my kitchen and it is certainly not my dog at all.", "Your kitchen?"),            # of a long sentence as well
    ("Do you like my red bicycle?", "Your red bicycle?"),
])
def test_what_was_said_is_taken_up(said, taken):
    assert mirror(said) == taken


@pytest.mark.parametrize("said", ["", "Yes.", "Okay, bye!", "Thank you so much, that was lovely.", "Who are you?", "Everyone?", "12", "???", "Hm.", "\U0001F642", "\x00\x01", "A" * 5000])
def test_where_there_is_nothing_to_take_up(said):
    assert mirror(said) is None


def test_the_telling_part_is_chosen():
    said = "The weather is fine. The parrot is ill."
    assert mirror(said, {"weather": 5.0, "fine": 2.0, "parrot": 9.0, "ill": 3.0}) == "The parrot is ill?"
    assert mirror(said, {"weather": 9.0, "fine": 3.0, "parrot": 5.0, "ill": 2.0}) == "The weather is fine?"


class Dice:
    def random(self):
        return 0.0


def talk(*lines):
    """What the default responder answers to each line, in one conversation."""
    responder, history, answers = Responder("retrieval"), [], []
    for line in lines:
        history.append(("user", line))
        answers.append(responder.reply(Dice(), 1, history, "assistant")[0])
        history.append(("assistant", answers[-1]))
    return answers


def test_an_answer_fits_or_takes_up_what_was_said():
    """Words that no written dialogue knows are taken up, once; the third such line again; what is known is answered."""
    answers = talk("My zyzzyva ate the quokka.", "The okapi saw it.", "I own an axolotl.", "How are you?")
    assert answers[0].startswith("Your zyzzyva ate the quokka? ")
    assert "okapi" not in answers[1] and "?" in answers[1] + "?"
    assert answers[2].startswith("You own an axolotl? ") and len({a.split("? ", 1)[-1] for a in answers[:3]}) == 3
    assert answers[3].startswith("I'm ")


def test_a_question_about_something_unknown_gets_no_other_fact():
    assert "Ankara" in talk("What's the capital of Turkey?")[0]                                         # a written dialogue knows that
    assert "Ankara" not in talk("What is the capital of Zyzzyva?")[0]
