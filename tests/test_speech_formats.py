"""Sound to bytes in pieces and back: every format from its first piece, and what strangers send."""
import io

import av
import numpy as np
import pytest
import soundfile

import speech_formats
from speech_formats import CODECS, MEDIA, Encoder, decode, from_pcm, to_pcm, wav_bytes

TONE = (0.3 * np.sin(np.arange(24000) * 2 * np.pi * 440 / 24000)).astype(np.float32)


def encoded(form, audio=TONE, piece=1920):
    """(all bytes, how many had come after each piece)."""
    out, data, sizes = Encoder(form), b"", []
    for at in range(0, len(audio), piece):
        data += out.feed(audio[at:at + piece])
        sizes.append(len(data))
    return data + out.finish(), sizes


def read_by_av(data):
    with av.open(io.BytesIO(data)) as file:
        frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
        rate = file.streams.audio[0].rate
    sound = np.concatenate([f.mean(0) for f in frames])
    return (sound / 32768 if frames[0].dtype.kind == "i" else sound), rate


@pytest.mark.parametrize("form", list(MEDIA))
def test_every_format_is_a_stream_and_holds_the_sound(form):
    data, sizes = encoded(form)
    assert sizes[2] > 0 and len(set(sizes)) > 6                          # bytes come with the pieces, not at the end
    sound, rate = (from_pcm(data) / 32768, 24000) if form == "pcm" else read_by_av(data)
    assert len(sound) / rate == pytest.approx(1.0, abs=0.1)
    middle = sound[len(sound) // 4:len(sound) // 2]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * rate / len(middle) == pytest.approx(440, abs=6)
    assert np.abs(middle).max() == pytest.approx(0.3, abs=0.05)


def test_plain_formats_keep_every_sample():
    data, sizes = encoded("wav")
    assert sizes[0] == 44 + 2 * 1920
    sound, rate = soundfile.read(io.BytesIO(data))                       # a header that names no length
    assert rate == 24000
    np.testing.assert_allclose(sound, TONE, atol=1e-4)
    assert encoded("pcm")[0] == to_pcm(TONE) == data[44:]
    assert soundfile.info(io.BytesIO(wav_bytes(TONE))).frames == 24000


@pytest.mark.parametrize("form", list(MEDIA))
def test_nothing_fed_and_nothing_finished_leave_nothing_open(form):
    out = Encoder(form)
    data = out.finish()
    assert form != "wav" or len(data) == 44
    half = Encoder(form)
    half.feed(TONE[:1920])
    half.close()
    half.close()


@pytest.mark.parametrize("form", ["opus", "mp3", "flac"])
def test_a_stream_can_say_what_it_is(form):
    out = Encoder(form, tags={"comment": "made by a machine"})
    data = out.feed(TONE) + out.finish()
    with av.open(io.BytesIO(data)) as file:
        assert "made by a machine" in (dict(file.metadata) | dict(file.streams.audio[0].metadata)).values()


def test_an_unknown_format_names_the_known():
    with pytest.raises(ValueError, match="wav, pcm, opus"):
        Encoder("ogg")


def test_loud_sound_is_cut_and_not_turned_over():
    assert from_pcm(to_pcm(np.array([2.0, -2.0], np.float32))).tolist() == [32767, -32767]
    assert from_pcm(b"\x01\x02\x03").tolist() == [0x0201]


# ----------------------------------------------------------------------------- what strangers send

def sound_file(audio, rate, form, subtype=None):
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_files_are_read_as_mono_at_24_khz(form):
    stereo = np.stack([TONE, 0 * TONE], 1)
    sound = decode(sound_file(stereo, 24000, form), 5.0)
    assert sound.dtype == np.float32 and sound.ndim == 1 and len(sound) == pytest.approx(24000, abs=2400)
    assert np.abs(sound[6000:12000]).max() == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"no sound at all" * 50, bytes(range(256)) * 9, wav_bytes(TONE)[:43], wav_bytes(TONE[:0])], ids=range(6))
def test_what_is_no_sound_is_a_plain_error(data):
    with pytest.raises(ValueError, match="send"):
        decode(data, 5.0)


def test_long_sound_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(speech_formats, "_read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="lasts 2.0 s, at most 1 s"):
        decode(sound_file(np.zeros(32000), 16000, "WAV"), 1.0)


def test_a_header_that_lies_about_its_length_does_not_help():
    long = speech_formats.wav_header() + to_pcm(np.zeros(48000, np.float32))
    with pytest.raises(ValueError, match="longer than 1 s|lasts"):
        decode(long, 1.0)


def test_rare_kinds_and_rates_are_refused():
    with pytest.raises(ValueError, match="AU files are not read"):
        decode(sound_file(TONE, 24000, "AU"), 5.0)
    with pytest.raises(ValueError, match="channels at 2000 Hz"):
        decode(sound_file(TONE, 2000, "WAV"), 50.0)


def test_broken_samples_become_silence():
    bad = TONE.copy()
    bad[100:200], bad[300], bad[400:500] = np.nan, np.inf, 1e30
    sound = decode(sound_file(bad, 24000, "WAV", "FLOAT"), 5.0)
    assert np.isfinite(sound).all() and np.abs(sound).max() <= 1.0


def test_all_codecs_are_known_formats():
    assert set(CODECS) | {"wav", "pcm"} == set(MEDIA)
