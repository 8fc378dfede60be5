"""The classic pipeline: what is heard, when a clause is spoken, in which order; its networks stood in for, but for one test of the real model."""
from types import SimpleNamespace

import numpy as np
import pytest

import classic_pipeline as cp


def tone(seconds: float, level=0.3, rate=cp.RATE) -> np.ndarray:
    """Sound that a VAD takes for speech: a harmonic series with a syllable's rhythm."""
    t = np.arange(int(seconds * rate)) / rate
    voice = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 20))
    return (level * voice / np.abs(voice).max() * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))).astype(np.float32)


class Whisper:
    """Hears how long the sound is."""
    asked: list = []

    def __init__(self, *a, cpu_threads, **k):
        self.threads = cpu_threads

    def transcribe(self, audio, **how):
        Whisper.asked.append((len(audio), how))
        return [SimpleNamespace(text=" hello "), SimpleNamespace(text="there.")], None


@pytest.fixture
def parts(monkeypatch):
    import faster_whisper
    monkeypatch.setattr(faster_whisper, "WhisperModel", Whisper)
    Whisper.asked = []
    said = []

    class Model:
        def __init__(self, cfg):
            pass

        def write(self, text):
            said.append(("asked", text))
            for piece in ("Well, ", "I think so, but ", "not yet. ", "May", "be later."):
                said.append(("wrote", piece))
                yield piece
    monkeypatch.setattr(cp, "SmallModel", Model)

    def mouth(threads):
        return lambda text: said.append(("spoke", text)) or tone(0.2)
    monkeypatch.setitem(cp.MOUTHS, "hibari", mouth)
    return said


# ----------------------------------------------------------------------------- clauses

@pytest.mark.parametrize("pieces, wanted", [
    (["I am here. ", "Where are you?"], ["I am here.", "Where are you?"]),
    (["I think we ", "could go, ", "if it is dry, today. ", "Fine"], ["I think we could go,", "if it is dry, today.", "Fine"]),
    (["No, ", "thanks a lot"], ["No, thanks a lot"]),
    (["No, thanks. ", "Bye, all of you, now."], ["No, thanks.", "Bye, all of you, now."]),
    (["It is 3.5 metres."], ["It is 3.5 metres."]),
    ([" ", ""], [])])
def test_clauses_are_spoken_as_soon_as_they_end(pieces, wanted):
    assert list(cp.clauses(iter(pieces))) == wanted


def test_the_first_clause_comes_before_the_rest_is_written():
    written = []

    def write():
        for piece in ("This is the first, ", "and this ", "the second."):
            written.append(piece)
            yield piece
    assert next(cp.clauses(write())) == "This is the first," and len(written) == 1


# ----------------------------------------------------------------------------- ears and mouth

def test_ears_keep_what_was_speech(parts):
    ears, silence = cp.Ears(cp.PipelineConfig(threads=1)), np.zeros(cp.RATE, np.float32)
    for sound in (silence, tone(1.5), silence):
        for i in range(0, len(sound), 1920):
            ears.feed(sound[i:i + 1920])
    kept = len(ears.spoken()) / cp.EAR_RATE
    assert 1.2 < kept < 2.4 and 0.5 < np.mean(ears.speech[50:125]) and np.mean(ears.speech[:40]) == 0
    assert ears.transcript() == "hello there." and Whisper.asked[-1][0] == len(ears.spoken()) and ears.asr.threads == 1
    ears.reset()
    assert len(ears.spoken()) == 0
    ears.feed(silence)
    assert len(ears.spoken()) > 0.8 * cp.EAR_RATE                              # no speech: all of it, whatever Whisper makes of it


def test_silence_before_the_first_sound_is_cut_away():
    quiet = np.zeros(cp.RATE // 2, np.float32)
    assert len(cp.trimmed(np.concatenate([quiet, tone(0.5)]))) == pytest.approx(0.51 * cp.RATE, abs=40)
    assert len(cp.trimmed(quiet)) == len(quiet)


# ----------------------------------------------------------------------------- the whole

def test_the_reply_is_spoken_clause_by_clause(parts):
    pipeline = cp.Pipeline(cp.PipelineConfig(threads=1))
    pipeline.feed(tone(1.0), last=True)
    sounds = pipeline.answer()
    next(sounds)
    assert [k for k, _ in parts] == ["asked", "wrote", "wrote", "spoke"]          # the model has not gone on yet
    assert len(list(sounds)) == 2 and pipeline.heard == "hello there."
    assert [t for k, t in parts if k == "spoke"] == ["Well, I think so,", "but not yet.", "Maybe later."] and pipeline.text == "Well, I think so, but not yet. Maybe later."
    assert list(pipeline.stages) == ["asr", "first clause", "first sound", "all"] and list(pipeline.stages.values()) == sorted(pipeline.stages.values())
    list(pipeline.answer())
    assert Whisper.asked[-1][0] < 100                                          # the turn before is forgotten


def test_what_cannot_be_spoken_is_passed_over(parts, monkeypatch):
    pipeline = cp.Pipeline(cp.PipelineConfig(threads=1))
    monkeypatch.setattr(pipeline.model, "write", lambda text: iter(["... ", "\U0001f600. ", "Yes."]), raising=False)
    assert len(list(pipeline.answer())) == 1 and pipeline.text == "Yes."


@pytest.mark.parametrize("wrong", [{"tts": "loud"}, {"threads": 0}, {"vad_mode": 7}, {"max_tokens": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="use hibari or kokoro|at least 1"):
        cp.PipelineConfig(**wrong)
