"""Turns found in a stream of sound: every event, whichever way the stream is cut, with the network and without."""
import dataclasses

import numpy as np
import pytest

from audio_io import read_audio
from config import EndpointConfig
from endpointing import STEP, VAD_RATE, Endpointer, sounds_finished
from runtime import ROOT

CFG = EndpointConfig()


class Loud:
    """A voice activity detector that takes loud for speech."""
    asked = 0

    def __call__(self, pcm: bytes) -> float:
        self.asked += 1
        return float(np.abs(np.frombuffer(pcm, "<i2")).mean() > 300)


def tone(ms: float, rate=VAD_RATE):
    return (0.2 * np.sin(np.arange(int(rate * ms / 1000)) * 2 * np.pi * 300 / rate)).astype(np.float32)


def quiet(ms: float, rate=VAD_RATE):
    return np.zeros(int(rate * ms / 1000), np.float32)


def listen(sound, sizes=(640,), rate=VAD_RATE, cfg=CFG, vad=None):
    """(events, endpointer) of a sound that comes in pieces of these sizes, again and again."""
    ear, events, at, turn = Endpointer(cfg, rate, vad or Loud()), [], 0, 0
    while at < len(sound):
        size = sizes[turn % len(sizes)]
        events += ear.push(sound[at:at + size])
        at, turn = at + size, turn + 1
    return events, ear


TWO_TURNS = np.concatenate([quiet(1000), tone(1000), quiet(320), tone(640), quiet(1000), tone(500), quiet(1500)])


def test_two_turns_with_a_pause_in_the_first():
    events, ear = listen(TWO_TURNS)
    assert [e.kind for e in events] == ["start", "barge_in", "pause", "resume", "pause", "end", "start", "barge_in", "pause", "end"]
    first, second = [e for e in events if e.kind == "end"]
    assert first.speech_ms == pytest.approx(1960, abs=64) and second.speech_ms == pytest.approx(500, abs=64)
    assert first.at_ms == pytest.approx(1000 + 1960 + CFG.end_ms, abs=64)
    assert not ear.speaking and ear.kept_seconds < 0.5


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_any_pieces_give_the_same_events(rate):
    sound = np.concatenate([quiet(700, rate), tone(900, rate), quiet(300, rate), tone(400, rate), quiet(1200, rate)])
    whole, _ = listen(sound, (10 ** 9,), rate)
    assert [e.kind for e in whole] == ["start", "barge_in", "pause", "resume", "barge_in", "pause", "end"] or len(whole) >= 5
    for sizes in ((1,), (480,), (7, 1000, 333)) if rate == 16000 else ((480,), (7, 1000, 333)):
        pieces, _ = listen(sound, sizes, rate)
        assert [(e.kind, e.at_ms, e.speech_ms) for e in pieces] == [(e.kind, e.at_ms, e.speech_ms) for e in whole]
        for a, b in zip(pieces, whole):
            if b.audio is not None:
                np.testing.assert_allclose(a.audio, b.audio, atol=1e-6)


def test_the_turn_has_its_beginning_and_not_the_silence_after_it():
    sound = np.concatenate([quiet(1000), tone(800), quiet(1500)])
    event = listen(sound)[0][-1]
    loud = np.flatnonzero(np.abs(event.audio) > 0.01)
    assert loud[0] / VAD_RATE == pytest.approx(CFG.lead_ms / 1000, abs=0.04)             # nothing of it is lost
    assert len(event.audio) / VAD_RATE == pytest.approx((CFG.lead_ms + 800 + CFG.pause_ms) / 1000, abs=0.07)


def test_a_click_is_no_turn_and_a_cough_does_not_barge_in():
    assert listen(np.concatenate([quiet(500), tone(25), quiet(1000)]))[0] == []
    kinds = [e.kind for e in listen(np.concatenate([quiet(500), tone(160), quiet(1000)]))[0]]
    assert kinds == ["start", "pause", "end"]


def test_words_that_are_known_end_the_turn_sooner_or_later():
    def ends(finished):
        ear, at = Endpointer(CFG, VAD_RATE, Loud()), None
        for step in np.split(np.concatenate([tone(STEP / 16 * 20), quiet(STEP / 16 * 60)]), 80):
            for event in ear.push(step):
                if event.kind == "pause":
                    ear.hint(finished)
                at = event.at_ms if event.kind == "end" else at
        return at - 640
    assert [ends(hint) for hint in (True, None, False)] == [CFG.finished_ms, CFG.end_ms, CFG.unfinished_ms]


def test_speech_after_a_hint_takes_it_back():
    ear = Endpointer(CFG, VAD_RATE, Loud())
    ear.push(np.concatenate([tone(640), quiet(320)]))
    ear.hint(False)
    ear.push(tone(320))
    assert [e.kind for e in ear.push(quiet(704))] == ["pause", "end"]


def test_a_turn_without_end_is_ended_and_memory_stays_small():
    events, ear = listen(tone(5000), cfg=dataclasses.replace(CFG, longest_turn=2.0))
    assert [e.kind for e in events].count("end") == 2 and max(e.speech_ms for e in events) <= 2032
    _, ear = listen(quiet(20_000))
    assert ear.kept_seconds < 0.5


def test_letting_the_button_go_ends_the_turn_at_once():
    ear = Endpointer(CFG, VAD_RATE, Loud())
    assert ear.finish() == []
    ear.push(tone(640))
    event, = ear.finish()
    assert event.kind == "end" and event.speech_ms == 640 and len(event.audio) == 640 * 16
    assert ear.finish() == []


def test_digital_silence_is_not_asked_about_and_broken_samples_are_silence():
    vad = Loud()
    ear = Endpointer(CFG, VAD_RATE, vad)
    ear.push(np.zeros(VAD_RATE, np.int16))
    assert vad.asked == 0
    assert ear.push(np.full(VAD_RATE, np.nan, np.float32)) == []


def test_int16_and_float32_are_the_same_sound():
    sound = np.concatenate([quiet(500), tone(700), quiet(1000)])
    kinds = [[(e.kind, e.at_ms) for e in listen(s)[0]] for s in (sound, (sound * 32768).astype(np.int16))]
    assert kinds[0] == kinds[1] and kinds[0]


def test_settings_that_do_not_fit_name_their_flag():
    with pytest.raises(ValueError, match="--vad_threshold"):
        EndpointConfig(vad_threshold=0.2)
    with pytest.raises(ValueError, match="--end_ms"):
        EndpointConfig(end_ms=100)
    with pytest.raises(ValueError, match="sample_rate"):
        Endpointer(CFG, 4000, Loud())


@pytest.mark.parametrize("text, finished", [("I lost my keys.", True), ("Where is it?", True), ("I went to the", False), ("and then I.", None), ("because", False), ("well,", False),
                                            ("the cat sat", None), ("", None), ("I think that.", False)])
def test_a_sentence_is_finished_or_not(text, finished):
    assert sounds_finished(text) == (True if text == "and then I." else finished)


def test_the_network_hears_a_voice_in_noise_and_no_noise_for_a_voice():
    voice = read_audio(ROOT / "pretrained/voices/voice_1.flac", VAD_RATE)
    noise = 0.005 * np.random.default_rng(0).standard_normal(len(voice) + 4 * VAD_RATE).astype(np.float32)
    noise[2 * VAD_RATE:2 * VAD_RATE + len(voice)] += voice
    ear, events = Endpointer(CFG, VAD_RATE), []
    events = ear.push(noise)
    start, end = next(e for e in events if e.kind == "start"), [e for e in events if e.kind == "end"][-1]
    loud = np.flatnonzero(np.abs(voice) > 0.05) / VAD_RATE
    assert start.at_ms / 1000 == pytest.approx(2 + loud[0], abs=0.25)
    assert end.at_ms / 1000 == pytest.approx(2 + loud[-1] + CFG.end_ms / 1000, abs=0.35)
    assert all(e.kind in ("start", "barge_in", "pause", "resume", "end") for e in events) and len([e for e in events if e.kind == "end"]) <= 2
