"""Audio files to float32 mono arrays and back; optional playback and microphone.

    from audio_io import read_audio, write_audio
    audio = read_audio("voice.mp3")          # float32 (n,), 24 kHz, mono, whatever the file held
    write_audio("out.flac", audio)           # written whole or not at all

Playback needs the optional package `sounddevice`; without it (or without a sound device) play() says so.
"""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np

SAMPLE_RATE = 24000


def resample(audio: np.ndarray, source_rate: float, target_rate: float, quality: str = "HQ") -> np.ndarray:
    """Mono audio (n,) at `source_rate` Hz -> float32 (n * target / source,) at `target_rate` Hz."""
    if source_rate == target_rate:
        return np.asarray(audio, np.float32)
    import soxr
    return soxr.resample(np.ascontiguousarray(audio, np.float32), source_rate, target_rate, quality=quality)


def read_audio(path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """The file's sound as float32 (n,) at `sample_rate` Hz; stereo is averaged, other rates are resampled.

    Raises ValueError (one line) for a file that is missing, empty or not audio.
    """
    import soundfile
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no audio file {path}: check the path")
    try:
        audio, rate = _read_g722(path) if path.suffix == ".g722" else soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable audio file ({reason}): give a WAV, FLAC, Ogg or MP3 file") from None
    if not len(audio):
        raise ValueError(f"{path} holds no sound: give a longer recording")
    mono = np.nan_to_num(audio.mean(axis=1))                               # (n, channels) -> (n,)
    return resample(mono, rate, sample_rate)


def _read_g722(path: Path) -> tuple[np.ndarray, int]:
    """The telephone format of the Asterisk prompts, 16 kHz -> (n, 1) float32 and its rate."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{path} needs the package av: pip install av, or convert the file to WAV") from None
    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return np.concatenate(frames or [np.zeros(0, np.int16)]).astype(np.float32)[:, None] / 32768, 16000


SUBTYPES = {"PCM_U8": "8 bit", "PCM_S8": "8 bit", "ULAW": "8 bit", "ALAW": "8 bit"}
CONTENTS = {"WAV": ".wav", "WAVEX": ".wav", "FLAC": ".flac", "MPEG": ".mp3", "MP3": ".mp3", "OGG": ".ogg", "AIFF": ".aiff", "RF64": ".wav", "W64": ".w64"}


def inspect_audio(path) -> tuple[float, int, int, list[str]]:
    """(seconds, rate, channels, notes) from the header; notes name what is unusual: 8 bit, above 48 kHz, more than two channels, a wrong name.

    Raises ValueError (one line) for a file that is empty or not audio. What soundfile does not know (M4A, AAC, WebM) PyAV may.
    """
    import soundfile
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no audio file {path}: check the path")
    if not path.stat().st_size:
        raise ValueError("empty file")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError, TypeError):
        sound, rate = _read_av(path)
        info = None
    frames, rate, channels = (info.frames, info.samplerate, info.channels) if info else (sound.shape[1], rate, sound.shape[0])
    if not frames:
        raise ValueError("no sound in it")
    notes = [SUBTYPES[info.subtype]] if info and info.subtype in SUBTYPES else []
    notes += [f"{rate / 1000:g} kHz"] if rate > 48000 or rate < 16000 else []
    notes += [f"{channels} channels"] if channels > 2 else []
    same = {".opus": ".ogg", ".oga": ".ogg", ".wave": ".wav", ".aif": ".aiff"}.get(path.suffix.lower(), path.suffix.lower())
    if info and CONTENTS.get(info.format, same) != same:
        notes.append(f"named {path.suffix or 'without an ending'}, holds {info.format}")
    return frames / rate, rate, channels, notes


def read_channels(path, start: float = 0.0, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """(channels, n) float32 of a part of a file at its own rate, and that rate. What a cut-off file still holds is read.

    Raises ValueError (one line) for a file that is empty or not audio.
    """
    import soundfile
    path = Path(path)
    if path.suffix.lower() == ".g722":
        sound, rate = _read_g722(path)
        first = int(start * rate)
        return sound.T[:, first:None if seconds is None else first + int(seconds * rate)], rate
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            file.seek(min(int(start * rate), file.frames))
            sound = file.read(-1 if seconds is None else int(seconds * rate), dtype="float32", always_2d=True).T
    except (soundfile.LibsndfileError, RuntimeError, TypeError):
        sound, rate = _read_av(path)
        first = int(start * rate)
        sound = sound[:, first:None if seconds is None else first + int(seconds * rate)]
    return np.nan_to_num(sound), rate


def _read_av(path: Path) -> tuple[np.ndarray, int]:
    """(channels, n) float32 and rate by PyAV: other containers than soundfile reads."""
    try:
        import av
    except ImportError:
        raise ValueError("not a readable audio file") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError("no sound in it")
            stream = container.streams.audio[0]
            into = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            frames = [out.to_ndarray() for frame in container.decode(stream) for out in into.resample(frame)]
            rate = stream.rate
    except (av.error.FFmpegError, OSError, IndexError, TypeError):
        raise ValueError("not a readable audio file") from None
    if not frames:
        raise ValueError("no sound in it")
    return np.concatenate(frames, axis=1).astype(np.float32), rate


def write_audio(path, audio: np.ndarray, sample_rate: int = SAMPLE_RATE, tags: dict | None = None) -> None:
    """Write mono audio (n,) in -1..1 as 16-bit WAV, FLAC or Ogg (by suffix), atomically. tags: {title, comment, software, artist: text}."""
    import soundfile
    path = Path(path)
    kind = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"cannot write {path}: end the name in .wav, .flac or .ogg")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    samples = np.clip(np.asarray(audio, np.float32).reshape(-1), -1.0, 1.0)
    subtype = "VORBIS" if kind == "OGG" else "PCM_16"
    try:
        with soundfile.SoundFile(str(temporary), "w", sample_rate, 1, subtype, format=kind) as file:
            for name, text in (tags or {}).items():
                setattr(file, name, text)
            file.write(samples)
        os.replace(temporary, path)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise OSError(f"cannot write {path} ({' '.join(str(error).split())}): is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def duration(path) -> float:
    """Length of an audio file in seconds, from its header."""
    import soundfile
    try:
        return soundfile.info(str(path)).duration
    except (soundfile.LibsndfileError, RuntimeError, TypeError):
        raise ValueError(f"{path} is not a readable audio file: give a WAV, FLAC, Ogg or MP3 file") from None


# ----------------------------------------------------------------------------- sound devices

def _sounddevice():
    try:
        import sounddevice
    except (ImportError, OSError):                                         # OSError: PortAudio is missing
        raise ValueError("no sound device: pip install sounddevice (and PortAudio), or listen to the files") from None
    return sounddevice


def can_play() -> bool:
    """True where `sounddevice` imports and an output device exists."""
    try:
        return any(device["max_output_channels"] > 0 for device in _sounddevice().query_devices())
    except Exception:                                                      # PortAudio's own errors count as no device
        return False


def play(audio: np.ndarray, sample_rate: int = SAMPLE_RATE, wait: bool = True) -> None:
    """Play mono audio (n,). Raises ValueError where there is no device."""
    device = _sounddevice()
    try:
        device.play(np.asarray(audio, np.float32), sample_rate)
        if wait:
            device.wait()
    except device.PortAudioError as error:
        raise ValueError(f"cannot play sound ({error}): listen to the written files") from None


class Microphone:
    """Iterates over float32 chunks (frame,) from the default input; a context manager.

        with Microphone() as mic:
            for chunk in mic: ...
    """

    def __init__(self, sample_rate: int = SAMPLE_RATE, frame: int = 1920):
        self.sample_rate, self.frame = sample_rate, frame
        self._stream = None

    def __enter__(self):
        device = _sounddevice()
        try:
            self._stream = device.InputStream(samplerate=self.sample_rate, channels=1, dtype="float32", blocksize=self.frame)
            self._stream.start()
        except device.PortAudioError as error:
            raise ValueError(f"cannot open the microphone ({error}): give an audio file") from None
        return self

    def __exit__(self, *exc):
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __iter__(self):
        while self._stream is not None:
            block, _ = self._stream.read(self.frame)                       # (frame, 1)
            yield block[:, 0].copy()
