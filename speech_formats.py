"""Sound to bytes while it is made: every format gives its first bytes with the first piece.

    out = Encoder("opus")
    for piece in pieces:                     # float32 (n,) at 24 kHz
        send(out.feed(piece))
    send(out.finish())

wav and pcm are plain; opus (in Ogg), mp3, aac (ADTS) and flac come from PyAV's libraries, which the ASR brings along.
Also the way in: `decode` reads a sound file that a stranger sent, and looks at its length before it decodes.
"""
from __future__ import annotations

import base64
import binascii
import io
import struct

import numpy as np

from audio_io import SAMPLE_RATE, resample

MEDIA = {"wav": "audio/wav", "pcm": "audio/pcm", "opus": "audio/ogg", "mp3": "audio/mpeg", "aac": "audio/aac", "flac": "audio/flac"}
# container, codec, sample format, options of the container
CODECS = {"opus": ("ogg", "libopus", "flt", {"page_duration": "20000"}), "mp3": ("mp3", "libmp3lame", "fltp", {"write_xing": "0", "id3v2_version": "4"}),
          "aac": ("adts", "aac", "fltp", {}), "flac": ("flac", "flac", "s16", {})}
READABLE = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "RF64", "AIFF")


def to_pcm(audio: np.ndarray) -> bytes:
    """float32 (n,) -> 16 bit little endian."""
    return (np.clip(np.asarray(audio, np.float32), -1, 1) * 32767).astype("<i2").tobytes()


def from_pcm(data: bytes) -> np.ndarray:
    """16 bit little endian -> int16 (n,); an odd last byte is dropped."""
    return np.frombuffer(data[:len(data) // 2 * 2], dtype="<i2").astype(np.int16)


def wav_header(rate: int = SAMPLE_RATE, samples: int | None = None, more: bytes = b"") -> bytes:
    """44 bytes of a 16 bit mono WAV, and `more` chunks in them; without `samples` the sizes say "until the end", as streams do."""
    size = 0xFFFFFFFF if samples is None else 2 * samples
    riff = 0xFFFFFFFF if samples is None else 36 + len(more) + size
    return struct.pack("<4sI4s4sIHHIIHH", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16) + more + struct.pack("<4sI", b"data", size)


def wav_bytes(audio: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    return wav_header(rate, len(audio)) + to_pcm(audio)


class Encoder:
    """One stream of sound. tags: what the file says of itself (title, comment), where its format can; wav_info: the same as a chunk for WAV.

    ValueError for a format that is not in MEDIA.
    """

    def __init__(self, form: str, rate: int = SAMPLE_RATE, tags: dict | None = None, wav_info: bytes = b""):
        if form not in MEDIA:
            raise ValueError(f"response_format {form!r} is not known: use one of {', '.join(MEDIA)}")
        self.form, self.rate, self._begun, self._sink, self._pts = form, rate, False, _Sink(), 0
        self.tags, self.wav_info = tags or {}, wav_info
        self._container = self._stream = None
        if form in CODECS:
            self._open()

    def _open(self) -> None:
        import av
        container, codec, sample_format, options = CODECS[self.form]
        self._container = av.open(self._sink, "w", format=container, options=options | {"flush_packets": "1"})
        self._stream = self._container.add_stream(codec, rate=self.rate)
        self._stream.layout, self._stream.format = "mono", sample_format
        self._container.metadata.update(self.tags)

    def feed(self, audio: np.ndarray) -> bytes:
        """float32 (n,) -> the bytes that are ready, maybe none."""
        if self._stream is None:
            head = b"" if self._begun or self.form == "pcm" else wav_header(self.rate, more=self.wav_info)
            self._begun = True
            return head + to_pcm(audio)
        import av
        integers = CODECS[self.form][2] == "s16"
        samples = from_pcm(to_pcm(audio)) if integers else np.asarray(audio, np.float32)
        frame = av.AudioFrame.from_ndarray(samples[None], format=CODECS[self.form][2], layout="mono")
        frame.sample_rate, frame.pts = self.rate, self._pts
        self._pts += len(samples)
        self._container.mux(self._stream.encode(frame))
        return self._sink.take()

    def finish(self) -> bytes:
        """What is left; of a WAV that was fed nothing, its header."""
        if self._stream is None:
            return b"" if self._begun or self.form == "pcm" else wav_header(self.rate, 0, self.wav_info)
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()

    def close(self) -> None:
        """Free what an unfinished stream holds."""
        if self._container is not None:
            self._container.close()
            self._container = None


def from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.split(",", 1)[1] if text.startswith("data:") and "," in text else text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the recording is not base64: encode the bytes of a sound file") from None


class _Sink:
    """What PyAV writes into: it cannot go back, so nothing that was sent is changed later."""

    def __init__(self):
        self.waiting = bytearray()

    def write(self, data) -> int:
        self.waiting += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self.waiting)
        self.waiting.clear()
        return data


def decode(data: bytes, max_seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    """The bytes of a sound file -> float32 (n,) at `rate`. ValueError where they are none, or last longer than max_seconds.

    The header is read first: kind, channels and length are checked before anything is decoded.
    """
    import soundfile
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in READABLE:
                raise ValueError(f"{file.format} files are not read: send WAV, FLAC, Ogg or MP3")
            if not 4000 <= file.samplerate <= 192000 or not 1 <= file.channels <= 8:
                raise ValueError(f"{file.channels} channels at {file.samplerate} Hz are not read: send mono at 16000 to 48000 Hz")
            most = int(max_seconds * file.samplerate)
            if file.frames > most and file.frames < 1 << 40:
                raise ValueError(f"the sound lasts {file.frames / file.samplerate:.1f} s, at most {max_seconds:g} s are read: send less")
            audio = _read(file, most)
            found = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, TypeError, OSError):
        raise ValueError("this is not a readable sound file: send WAV, FLAC, Ogg or MP3") from None
    if len(audio) > most:
        raise ValueError(f"the sound lasts longer than {max_seconds:g} s: send less")
    if not len(audio):
        raise ValueError("the file holds no sound: send a longer recording")
    return resample(np.clip(np.nan_to_num(audio), -1, 1), found, rate)


def _read(file, most: int) -> np.ndarray:
    """Mono (n,), one sample more than `most` where there are more. In blocks: the length in a header may be a lie."""
    blocks, count = [np.zeros(0, np.float32)], 0
    while count <= most:
        block = file.read(min(1 << 16, most + 1 - count), dtype="float32", always_2d=True)
        if not len(block):
            break
        blocks.append(block.mean(axis=1))
        count += len(block)
    return np.concatenate(blocks)
