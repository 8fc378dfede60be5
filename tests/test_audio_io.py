"""Audio files in and out."""
import numpy as np
import pytest
import soundfile

import audio_io


def tone(rate, seconds=0.5, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def test_stereo_44k_becomes_mono_24k(tmp_path):
    sound = tone(44100)
    soundfile.write(tmp_path / "a.wav", np.stack([sound, np.zeros_like(sound)], 1), 44100)
    audio = audio_io.read_audio(tmp_path / "a.wav")
    assert audio.dtype == np.float32 and audio.ndim == 1 and abs(len(audio) - 12000) <= 2
    peak = np.abs(np.fft.rfft(audio)).argmax() * 24000 / len(audio)
    assert abs(peak - 440) < 3 and 0.2 < np.abs(audio[2000:-2000]).max() < 0.3


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_write_and_read_back(tmp_path, suffix):
    path = tmp_path / "deep" / f"a{suffix}"
    audio_io.write_audio(path, 3 * tone(24000))                             # too loud: clipped, not wrapped
    assert abs(audio_io.duration(path) - 0.5) < 0.02
    assert np.abs(audio_io.read_audio(path)).max() > 0.9
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    audio_io.write_audio(path, tone(24000))
    before = path.read_bytes()

    def full(file, samples):
        raise RuntimeError("No space left")
    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    with pytest.raises(OSError, match="disk full"):
        audio_io.write_audio(path, tone(24000, 1.0))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_plain_errors(tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 24000)
    for name, said in (("none.wav", "no audio file"), ("text.wav", "not a readable audio file"), ("empty.wav", "no sound")):
        with pytest.raises(ValueError, match=said) as error:
            audio_io.read_audio(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=".wav"):
        audio_io.write_audio(tmp_path / "a.mp3", tone(24000))


def test_no_sound_device_is_a_plain_error(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert audio_io.can_play() is False
    for use in (lambda: audio_io.play(tone(24000)), lambda: audio_io.Microphone().__enter__()):
        with pytest.raises(ValueError, match="sounddevice"):
            use()


def test_telephone_format_is_read(tmp_path):
    av = pytest.importorskip("av")
    path, tone = tmp_path / "prompt.g722", (np.sin(np.arange(16000) * 2 * np.pi * 440 / 16000) * 12000).astype(np.int16)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    audio = audio_io.read_audio(path)
    assert abs(len(audio) - 24000) < 200
    peak = np.abs(np.fft.rfft(audio[4000:20000])).argmax() * 24000 / 16000
    assert abs(peak - 440) < 3
