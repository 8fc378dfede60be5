"""benchmark.py ear: rows and sums, with readers that hear what they are told."""
import numpy as np
import pytest

import benchmark_ear
import config
from test_ear import model_with_ear


@pytest.fixture
def quick(monkeypatch):
    texts = ["good morning to you", "see you soon my friend"]
    heard = {"words": texts, "letters": ["good mourning to you", "see you son my friend"], "codec": texts, "whisper": texts}

    def readers(talker):
        def reader(name):
            return lambda sound: heard[name][int(sound[0])]
        return {name: reader(name) for name in heard}
    monkeypatch.setattr(benchmark_ear, "readers", readers)
    monkeypatch.setattr(benchmark_ear, "pick_turns", lambda data, split, count, seed: [([{"text": t, "place": i}], 0) for i, t in enumerate(texts[:count])])
    monkeypatch.setattr(benchmark_ear, "sound_of", lambda data, turn: np.full(24000, turn["place"], dtype=np.float32))
    monkeypatch.setattr(benchmark_ear, "weights_name", lambda path: {"path": "pretrained/x", "sha256": "0" * 16})
    monkeypatch.setattr(benchmark_ear, "recordings", lambda folder, table, count, seed: [("good morning to you", np.zeros(24000, dtype=np.float32))])


def settings(**changes):
    import argparse
    return argparse.Namespace(**{"turns": 2, "data": "d", "split": "test", "seed": 0, "recordings": "", "transcripts": "", "people": 1} | changes)


def test_each_reader_is_judged_on_the_same_turns(quick, monkeypatch):
    monkeypatch.setattr(benchmark_ear, "load_talker", lambda args: (model_with_ear(), None, None, "x"))
    result, body = benchmark_ear.bench_ear(settings(recordings="r"))
    found = result["sets"]["characters never trained on"]
    assert found["turns"] == 2 and found["seconds"] == 2.0
    assert found["readers"]["words"]["wer"]["mean"] == 0.0 and found["readers"]["letters"]["wer"]["mean"] == pytest.approx(2 / 9, abs=1e-3)
    assert result["sets"]["people"]["turns"] == 1 and result["bars"][0]["met"] is True
    assert "good mourning" not in body and "22 %" in body and "met" in body


def test_weights_without_an_ear_are_named(quick, monkeypatch):
    monkeypatch.setattr(benchmark_ear, "load_talker", lambda args: (model_with_ear(ear=config.EarConfig()), None, None, "x"))
    with pytest.raises(ValueError, match="train_ear.py"):
        benchmark_ear.bench_ear(settings())


def test_readers_take_the_models_codes(monkeypatch):
    """The ear gets tokens, words and letters the same codes, Whisper the sound of these codes or the sound itself."""
    import generation
    import judges
    from rvq_tokenizer import Codec
    model, codec = model_with_ear(), Codec(config.CodecConfig()).eval()
    monkeypatch.setattr(judges, "transcribe", lambda sound, *more: f"{len(sound)}")
    monkeypatch.setattr(generation.Session, "transcribe", lambda self, codes, speaker=0: f"{tuple(codes.shape)}")
    monkeypatch.setattr(model.ear, "transcribe", lambda codes: f"{int(codes.min()) >= 1} {tuple(codes.shape)}")
    read = benchmark_ear.readers((model, codec, None, "x"))
    sound = np.zeros(2000, dtype=np.float32)
    assert read["words"](sound) == "(8, 2)" and read["letters"](sound) == "True (8, 2)" and read["codec"](sound) == "3840" and read["whisper"](sound) == "2000"
