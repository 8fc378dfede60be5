"""Human speech in training: texts in Latin letters, times of words, conversations that share nothing held out, the rule, and the whole of it with an untrained model."""
import json
import shutil

import numpy as np
import pytest
import soundfile

import benchmark
import corpora
import test_benchmark
from experiments import human_speech as human, verdicts

data, weights, judges = test_benchmark.data, test_benchmark.weights, test_benchmark.judges


def tone(seconds: float, pitch: float) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * human.RATE)) / human.RATE)).astype(np.float32)


def prompts(count=20):
    return {voice: [human.Prompt(f"{voice}{k}", "una prova", tone(1.0, 200.0)) for k in range(count)] for voice in human.VOICES}


# ----------------------------------------------------------------------------- texts and sounds

def test_texts_become_the_models_letters_or_are_left_out():
    assert human.latin("Введите пароль, пожалуйста.") == "vvedite parol, pozhaluista."
    assert human.latin("La conférence est déjà verrouillée.") == "la conference est deja verrouillee."
    assert [human.latin(t) for t in ("appuyez sur 2", "[un bip]", "(9 seconds of silence)", "...", "")] == [None] * 5


def test_letters_are_spread_over_what_is_not_silence():
    audio = np.concatenate([tone(1.0, 200.0), np.zeros(human.RATE, np.float32), tone(1.0, 200.0)])
    (a, b, start, end), (c, d, again, last) = human.words_in_time(audio, "alfa beta.")
    assert (a, b, c, d) == (0, 4, 5, 9)
    assert start == 0 and end == pytest.approx(1.0, abs=0.03) and 1.0 - 0.03 <= again <= 2.0 and last == pytest.approx(3.0, abs=0.03)


def test_a_longer_vocal_tract_is_lower_and_slower():
    def pitch(audio):
        return np.abs(np.fft.rfft(audio)).argmax() * human.RATE / len(audio)
    sound = tone(1.0, 200.0)
    low = human.shaped(sound, 1.25)
    assert pitch(low) == pytest.approx(160.0, abs=2) and len(low) == pytest.approx(1.25 * len(sound), rel=0.01) and human.shaped(sound, 1) is sound


def test_prompts_are_trimmed_levelled_and_have_a_text(tmp_path):
    for k in range(22):
        sound = np.concatenate([np.zeros(human.RATE, np.float32), 0.1 * tone(1.5, 300.0), np.zeros(human.RATE, np.float32)])
        soundfile.write(tmp_path / f"p{k:02d}.wav", sound if k else sound[:human.RATE], human.RATE)
    (tmp_path / "table.txt").write_text("".join(f"p{k:02d}: {'premere 5' if k == 1 else 'una prova'}\n" for k in range(22)), encoding="utf-8")
    found = human.read_prompts(tmp_path, str(tmp_path / "table.txt"))
    assert [p.name for p in found] == [f"p{k:02d}" for k in range(2, 22)]          # silence alone, and a digit, are no prompts
    assert all(len(p.audio) == pytest.approx(1.5 * human.RATE, rel=0.03) for p in found)
    (tmp_path / "table.txt").write_text("p00: una prova\n", encoding="utf-8")
    with pytest.raises(ValueError, match="--prompts"):
        human.read_prompts(tmp_path, str(tmp_path / "table.txt"))


# ----------------------------------------------------------------------------- conversations

def test_two_people_take_turns_and_nothing_held_out_is_trained_on():
    mine = prompts()
    plan = human.plan_conversations(mine, 60, 0)
    splits = corpora.held_out(plan)
    held = {p.name for voice in mine.values() for p in voice[::human.HELD_OUT]}
    used = {which: {p.name for name, turns in plan.items() for _, _, p in turns if (splits[name] == "train") == which} for which in (True, False)}
    assert used[False] <= held and len(used[False]) == len(held) and not used[True] & held and len(used[True]) == 3 * 18
    for turns in plan.values():
        speakers = [voice for voice, _, _ in turns]
        assert len(turns) == human.TURNS and speakers[::2] == speakers[:1] * 3 and speakers[1::2] == speakers[1:2] * 3 and len(set(speakers)) == 2
        assert len({(voice, factor) for voice, factor, _ in turns}) == 2          # a person keeps its shape
    factors = [factor for turns in plan.values() for _, factor, _ in turns]
    assert 0.1 < np.mean(np.array(factors) == 1) < 0.5 and min(factors) < 0.9 and max(factors) > 1.1
    assert human.plan_conversations(mine, 60, 0) == plan != human.plan_conversations(mine, 60, 1)


@pytest.mark.parametrize("voices", ["fr,es", "en,it", "fr"])
def test_the_speaker_of_the_tests_is_never_trained_on(voices):
    with pytest.raises(ValueError, match="--voices"):
        human.voices_of(human.build_parser().parse_args(["--voices", voices]))


# ----------------------------------------------------------------------------- the rule

def rows(cosine: float, wrong: int = 0, n: int = 30):
    return [{"said": "one two three four", "heard": " ".join(["one", "two", "three", "four"][wrong if k % 2 else 0:]), "voice": cosine + 0.01 * (k % 3), "mos": None} for k in range(n)]


def result(never: float, heard: float = 0.7, characters: float = 0.8, wrong: int = 0) -> list[dict]:
    return [{"never heard": rows(never), "heard": rows(heard), "characters": rows(characters, wrong), "losses": {"synthetic": {"loss": 5.0}, "people": {"loss": 9.0}}}]


@pytest.mark.parametrize("after, control, expected", [
    (result(0.70), result(0.56), verdicts.SUPPORTED), (result(0.57), result(0.56), verdicts.REFUTED), (result(0.70), result(0.69), verdicts.REFUTED), (result(0.70), None, verdicts.UNDECIDED),
    (result(0.70, characters=0.70), result(0.56), verdicts.REFUTED), (result(0.70, wrong=2), result(0.56), verdicts.REFUTED)])
def test_the_rule(after, control, expected):
    results = {"before": result(0.56), "human": after} | ({"synthetic": control} if control else {})
    gains, costs = human.gains(results), human.prices(results)
    assert human.verdict(gains, costs) == expected, (gains, costs)
    assert len(gains) == (4 if control else 2) and gains[0]["effect"]["mean"] == pytest.approx(after[0]["never heard"][0]["voice"] - 0.56)


def test_a_price_is_a_rise_per_word():
    after, before = result(0.6, wrong=2), result(0.6)
    rise, words = human.word_rise(after, before, "characters")
    assert rise.shape == (1, 30) and words.tolist() == [4.0] * 30 and verdicts.effect(rise, words)["mean"] == pytest.approx(0.25)
    assert [c["met"] for c in human.prices({"before": before, "human": after})] == [True, False, True]


# ----------------------------------------------------------------------------- the whole of it

@pytest.fixture
def packages(tmp_path):
    """Prompts of three voices as the packages have them; en is the person never heard."""
    rng = np.random.default_rng(0)
    for number, voice in enumerate(("fr", "it", "en")):
        (tmp_path / "sounds" / voice).mkdir(parents=True)
        for k in range(20):
            noise = tone(2.1, 150.0 + 60 * number) * (1 + 0.3 * rng.standard_normal(int(2.1 * human.RATE)))
            soundfile.write(tmp_path / "sounds" / voice / f"p{k:02d}.wav", noise, human.RATE)
        (tmp_path / f"{voice}.txt").write_text("".join(f"p{k:02d}: una prova di voce\n" for k in range(20)), encoding="utf-8")
    return ["--prompts", str(tmp_path / "sounds"), "--texts", str(tmp_path / "{0}.txt"), "--voices", "fr,it"]


@pytest.fixture
def tokens(data, weights, tmp_path):
    """The synthetic collection with tokens of the untrained codec."""
    from checkpoint import load_codec
    from dataset_pipeline import tokenise
    shutil.copytree(data, tmp_path / "synthetic")
    for split in ("train", "validation"):
        shutil.copytree(data / "manifests/test", tmp_path / "synthetic/manifests" / split, dirs_exist_ok=True)
    tokenise(tmp_path / "synthetic", load_codec(weights / "codec"), workers=1, progress=False)
    return tmp_path / "synthetic"


def test_the_whole_of_it_and_again(packages, tokens, weights, tmp_path, judges, capsys, monkeypatch):
    words = [*packages, "--data", str(tokens), "--codec", str(weights / "codec"), "--checkpoint", str(weights / "nano"), "--conversations", "10", "--steps", "1", "--batch_positions", "1024", "--turns", "2",
             "--test_turns", "2", "--eval_batches", "1", "--output", str(tmp_path / "work"), "--results", str(tmp_path / "R.md")]
    assert human.main(words) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["people_turns"] == 6 * 8 and 0 < found["share"] < 1 and found["verdict"] in (verdicts.SUPPORTED, verdicts.REFUTED, verdicts.UNDECIDED)
    assert set(found["losses"]) == {"before", "human", "synthetic"} and all(found["losses"][name][0][which]["loss"] > 0 for name in found["losses"] for which in ("synthetic", "people"))
    assert len({found["weights"][name][0]["sha256"] for name in found["weights"]}) == 3
    turns = human.turns_in(next((tmp_path / "work/human").glob("people-*")))
    assert turns == 48 and "Human speech in training" in (tmp_path / "R.md").read_text() and benchmark.read_results(tmp_path / "R.md")["human"]["people_turns"] == 48
    monkeypatch.setattr(human, "subprocess", None)                                   # a second run trains and says nothing again
    monkeypatch.setattr("benchmark_replies.say_in_voices", None)
    assert human.main(words) == 0 and json.loads(capsys.readouterr().out.strip().splitlines()[-1])["losses"] == found["losses"]


@pytest.mark.parametrize("words", [("--share", "1"), ("--steps", "0"), ("--conditions", "synthetic"), ("--voices", "es,fr")])
def test_bad_input_is_one_line(words, tmp_path, capsys):
    assert human.main([*words, "--output", str(tmp_path), "--results", str(tmp_path / "R.md")]) == 2
    assert words[0] in capsys.readouterr().err and not (tmp_path / "R.md").exists()
