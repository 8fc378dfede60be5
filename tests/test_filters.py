"""Filters: what they measure, what they take, repeats in other clothes, loudness, the picture."""
from dataclasses import replace

import numpy as np
import pytest

import filters
from filters import FilterConfig, Seen, fingerprint, verdict
from people_speech import spoken

CFG = FilterConfig()
GOOD = {"seconds": 3.0, "snr_db": 30.0, "clipped": 0.0, "speech": 0.9, "pace": 14.0, "confidence": 0.8, "match": 1.0, "language": 0.9, "mos": None}


def test_every_limit_takes_what_breaks_it_and_nothing_else():
    assert verdict(GOOD, CFG) is None and verdict({"seconds": 3.0}, CFG) is None
    breaks = {"too short": {"seconds": 0.1}, "too long": {"seconds": 31}, "too noisy": {"snr_db": 5}, "clipped": {"clipped": 0.1}, "little speech": {"speech": 0.2},
              "few words for its length": {"pace": 1}, "many words for its length": {"pace": 50}, "the ASR is unsure": {"confidence": 0.3},
              "not what its transcript says": {"match": 0.2}, "another language": {"language": 0.0}}
    assert {reason: verdict(GOOD | change, CFG) for reason, change in breaks.items()} == {reason: reason for reason in breaks}
    assert set(breaks) | {"unnatural"} == set(filters.REASONS.values())
    assert verdict(GOOD | {"mos": 2.0}, replace(CFG, min_mos=3.0)) == "unnatural" and verdict(GOOD | {"mos": 2.0}, CFG) is None
    assert verdict(GOOD | {"snr_db": 0.0}, replace(CFG, min_snr_db=0)) is None


def test_clipping_is_flat_tops_not_loudness():
    tone = np.sin(np.arange(24000) * 0.05).astype(np.float32)
    assert filters.clipped_share(0.99 * tone) < 0.03 < 0.2 < filters.clipped_share(np.clip(2 * tone, -1, 1)) and filters.clipped_share(np.zeros(10)) == 0
    speech = spoken()[0]
    assert filters.clipped_share(speech) < CFG.max_clipped < filters.clipped_share(np.clip(speech * 12, -1, 1))


def test_signal_to_noise_is_what_was_mixed():
    rng = np.random.default_rng(0)
    import segmentation as sg
    speech = sg.resample(spoken()[0], 24000, sg.RATE)
    for wanted in (5, 15, 25):
        noise = rng.normal(0, np.sqrt(np.mean(speech ** 2)) * 10 ** (-wanted / 20), len(speech) + 2 * sg.RATE)
        noise[sg.RATE:-sg.RATE] += speech
        level = sg.envelope_db(noise.astype(np.float32))
        on = np.zeros(len(level), bool)
        on[100:-100] = True
        assert filters.snr_db(level[on], filters.noise_level(level, on)) == pytest.approx(wanted, abs=1.5)
    assert filters.snr_db(np.array([]), -50.0) == 0 and filters.snr_db(np.array([-20.0]), -120.0) == 80
    assert filters.noise_level(np.linspace(-60, 0, 100), np.ones(100, bool)) < -55            # nobody is silent: the quietest frames


def test_language_of_the_text():
    assert filters.language_probability("I think that we should go there after the rain", "en") > 0.9
    assert filters.language_probability("creo que tendremos que ir despues de la lluvia", "en") < CFG.min_language
    assert filters.language_probability("oh no", "en") is None and filters.language_probability("a b c d e f g h", "") is None


def test_loudness_is_reached_and_no_peak_passes():
    audio = spoken()[0]
    for gain in (0.02, 0.3):
        factor = filters.gain_to(gain * audio, 24000, -30.0)
        assert filters.gain_to(factor * gain * audio, 24000, -30.0) == pytest.approx(1.0, abs=0.02)
    click = np.zeros(24000, np.float32)
    click[::4000] = 0.9
    assert filters.gain_to(click, 24000, -10.0) * 0.9 <= 10 ** (-1 / 20) + 1e-6
    assert filters.gain_to(np.zeros(100, np.float32), 24000, -23) == 1 and 0 < filters.gain_to(audio[:2000], 24000, -23)


# ----------------------------------------------------------------------------- repeats

def test_a_repeat_is_known_in_other_clothes(tmp_path):
    """Through MP3, another rate, another gain and cut edges; other sentences and other voices are new."""
    import soundfile
    from audio_io import read_audio, resample
    seen, lines = Seen(), spoken()
    for k, audio in enumerate(lines):
        assert seen.find(fingerprint(audio, 24000), len(audio) / 24000) is None
        seen.add(f"t{k}", fingerprint(audio, 24000), len(audio) / 24000)
    for k, audio in enumerate(lines):
        soundfile.write(tmp_path / "a.mp3", 0.3 * audio, 24000)
        low = resample(resample(audio, 24000, 16000), 16000, 24000)
        for other in (read_audio(tmp_path / "a.mp3"), low, 0.1 * audio, audio[480:-480]):
            assert seen.find(fingerprint(other, 24000), len(other) / 24000) == f"t{k}"
    assert seen.find(fingerprint(lines[0], 24000), 2 * len(lines[0]) / 24000) is None          # as long as it is
    assert seen.find(fingerprint(lines[0][:12000], 24000), 0.5) is None                         # too short to be held against anybody


def test_noise_repeats_nothing():
    rng, seen = np.random.default_rng(0), Seen()
    for k in range(40):
        mark = fingerprint(rng.normal(0, 0.1, 36000).astype(np.float32), 24000)
        assert seen.find(mark, 1.5) is None
        seen.add(str(k), mark, 1.5)


# ----------------------------------------------------------------------------- picture and settings

def test_counts_and_picture(tmp_path):
    turns = [(GOOD | {"snr_db": float(k)}, None if k > 10 else "too noisy") for k in range(40)] + [({"seconds": 0.1}, "too short")]
    assert filters.count(turns) == {"kept": 29, "too noisy": 11, "too short": 1}
    filters.draw(turns, CFG, tmp_path / "filters.png")
    from matplotlib import image
    assert image.imread(tmp_path / "filters.png").shape[0] > 300 and len(list(tmp_path.iterdir())) == 1
    filters.draw([({"seconds": 1.0}, None)], CFG, tmp_path / "one.png")


@pytest.mark.parametrize("wrong", [{"min_seconds": 40}, {"min_pace": 50}, {"min_speech": 2}, {"loudness": 3}, {"min_mos": 6}, {"language": "klingon"}, {"max_clipped": -1}])
def test_wrong_limits_name_their_flag(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
        FilterConfig(**wrong)
