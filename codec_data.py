"""What the codec trains on: crops of collected speech with phone and pitch labels every 10 ms, and codes that a model drew for them.

    data = CodecData("data/synthetic", "train", CodecConfig().phones).to("cuda")
    audio, phones, f0, drawn = data.batch(numpy.random.default_rng(0), 8, 46080)

Phone times and pitch are the synthesiser's own, from the collection; where there are none the pitch is measured with WORLD. Labels are made once and kept beside the data.
All sound of a split lies in one tensor on the device that trains, where crops are cut and roughened: no loader to wait for.
Shapes: B crops, N samples, P label points, K codebooks, T frames.
"""
from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import runtime

GRID = 240                      # samples between label points: 10 ms
FRAME = 1920                    # samples of a code frame, for crops with drawn codes
UNKNOWN = 255                   # phone label where nobody knows the phone
RECORDINGS = (".wav", ".flac", ".ogg", ".mp3", ".g722")


def read_supervisions(data: str, split: str) -> list[dict]:
    path = Path(data) / "manifests" / split / "supervisions.jsonl.gz"
    if not path.exists():
        raise ValueError(f"no manifest {path}: run python collect_data.py --output {data}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def within(turns: list[dict], seconds: float) -> list[dict]:
    """The first turns that last `seconds` together; 0: all."""
    before = [0.0, *itertools.accumulate(t["duration"] for t in turns)]
    return [t for t, start in zip(turns, before) if start <= seconds] if seconds else turns


def label_turn(job: tuple) -> tuple:
    """One turn -> (int16 samples (N,), phones (N // GRID + 1,) uint8, f0 Hz (same) float32)."""
    import soundfile
    path, alignment, alphabet = job
    audio, _ = soundfile.read(path, dtype="float32")
    points = len(audio) // GRID + 1
    phones = np.zeros(points, np.uint8)
    times = np.arange(points) * GRID / 24000
    index = np.searchsorted(np.asarray(alignment["ends"]), times, side="right")
    symbols = np.asarray([max(0, alphabet.find(p)) for p in alignment["phones"]] + [0], np.uint8)
    phones[:] = symbols[np.minimum(index, len(symbols) - 1)]
    return (audio * 32767).astype(np.int16), phones, known_pitch(alignment, points) if "pitch" in alignment else measure_pitch(audio)


def known_pitch(alignment: dict, points: int):
    """f0 in Hz every 10 ms, (points,), that the synthesiser played; 0 where unvoiced."""
    from synthetic_conversations import unpack_pitch
    f0 = unpack_pitch(alignment["pitch"])[:points]
    return np.pad(f0, (0, points - len(f0)))


def continuous_pitch(f0, gap: int = 12):
    """f0 (P,) with zeros -> interpolated everywhere; negative where no voiced point lies within `gap` points (120 ms).

    WORLD's quick tracker leaves out a fifth of the voiced frames, so its voiced flag is not believed (LOG.md).
    """
    voiced = np.flatnonzero(f0 > 0)
    if len(voiced) == 0:
        return np.full(len(f0), -120.0, np.float32)
    points = np.arange(len(f0))
    filled = np.exp(np.interp(points, voiced, np.log(f0[voiced])))
    after = np.minimum(np.searchsorted(voiced, points), len(voiced) - 1)
    near = np.minimum(np.abs(voiced[after] - points), np.abs(points - voiced[np.maximum(after - 1, 0)])) <= gap
    return np.where(near, filled, -filled).astype(np.float32)


def label_recording(path: str) -> tuple:
    """A recording without transcript -> as label_turn, phones unknown; None for one that is too short or cannot be read."""
    import audio_io
    try:
        audio = audio_io.read_audio(path)
    except ValueError:
        return None
    if len(audio) < 12000 or np.abs(audio).max() < 0.01:
        return None
    audio = audio / np.abs(audio).max() * 0.7
    return (audio * 32767).astype(np.int16), np.full(len(audio) // GRID + 1, UNKNOWN, np.uint8), measure_pitch(audio)


def measure_pitch(audio):
    """float32 (N,) -> f0 in Hz every 10 ms, (N // GRID + 1,); 0 where unvoiced. WORLD's dio and stonemask (Morise et al. 2016)."""
    import pyworld
    x, points = audio.astype(np.float64), len(audio) // GRID + 1
    f0, t = pyworld.dio(x, 24000, f0_floor=55, f0_ceil=580, frame_period=10.0)
    f0 = pyworld.stonemask(x, f0, t, 24000).astype(np.float32)[:points]
    return np.pad(f0, (0, points - len(f0)))


@dataclass
class Sound:
    """Turns one after the other: samples (sum of N,) int16, label points (sum of P,) uint8 and Hz, samples of each turn."""
    audio: Tensor
    phones: Tensor
    f0: Tensor
    lengths: np.ndarray

    def __post_init__(self):
        self.points = self.lengths // GRID + 1
        self.begins = np.concatenate([[0], self.lengths.cumsum()[:-1]])
        self.firsts = np.concatenate([[0], self.points.cumsum()[:-1]])

    def __add__(self, other: "Sound") -> "Sound":
        return Sound(*(torch.cat([a, b]) for a, b in ((self.audio, other.audio), (self.phones, other.phones), (self.f0, other.f0))),
                     np.concatenate([self.lengths, other.lengths]))

    def to(self, device) -> "Sound":
        return Sound(self.audio.to(device), self.phones.to(device), self.f0.to(device), self.lengths)

    def turn(self, number: int) -> np.ndarray:
        """int16 samples (N,) of one turn."""
        begin = self.begins[number]
        return self.audio[begin:begin + self.lengths[number]].cpu().numpy()


class CodecData:
    """All turns of a split in memory: int16 audio, phone and pitch labels every 10 ms. Crops are drawn at random.

    data: a folder of collect_data.py, or several with commas between; limit_hours: at most so much of each.
    recordings: a folder of people's recordings besides; a share `recorded` of the crops comes from them (0: as many as there are among all turns).
    drawn: a file of draw_codes.py; half of the crops of its turns come with these codes, beginning at a frame.
    """

    def __init__(self, data: str, split: str, alphabet: str, limit_hours: float = 0.0, workers: int = 0, recordings: str = "", augment: float = 0.0, drawn: str = "",
                 recorded: float = 0.0):
        turns, workers, self.sound = [], workers or runtime.cpu_count(), None
        for folder in (part.strip() for part in str(data).split(",")):
            some = within(read_supervisions(folder, split), limit_hours * 3600)
            jobs = [(str(Path(folder) / t["custom"]["turn_audio"]), t["custom"]["alignment"], alphabet) for t in some]
            sound = cached_labels(Path(folder) / "codec_labels", label_turn, jobs, workers, split)
            self.sound, turns = sound if self.sound is None else self.sound + sound, turns + some
        self.spoken, self.recorded = len(turns), 0.0
        if recordings:
            self.sound += cached_labels(Path(recordings) / ".codec_labels", label_recording, recording_files(recordings), workers, "recordings")
            self.recorded = recorded or 1 - self.spoken / len(self.sound.lengths)
        self.drawn, self.drawn_semantic, self.drawn_fingerprint = read_drawn(drawn) if drawn else ({}, 0, "")
        self.codes = {i: self.drawn[t["id"]] for i, t in enumerate(turns) if t["id"] in self.drawn}
        if drawn and not self.codes:
            raise ValueError(f"{drawn} has none of the turns in {data}: check --drawn and --data")
        self.hours = self.sound.lengths.sum() / 24000 / 3600
        self.augment = augment

    def to(self, device) -> "CodecData":
        self.sound = self.sound.to(device)
        return self

    def turns(self):
        """int16 samples of every turn, in order."""
        return map(self.sound.turn, range(len(self.sound.lengths)))

    def _pick(self, rng, size: int) -> np.ndarray:
        """Turn numbers (B,)."""
        spoken = rng.integers(self.spoken, size=size)
        if not self.recorded:
            return spoken
        return np.where(rng.random(size) < self.recorded, rng.integers(self.spoken, len(self.sound.lengths), size=size), spoken)

    def _places(self, rng, picks: np.ndarray, length: int) -> tuple[np.ndarray, dict]:
        """First label point of every crop (B,); by row the drawn codes (K, T) of those that begin at a frame."""
        starts, given = rng.integers(-8, np.maximum(1, self.sound.points[picks] - length // GRID + 8)), {}
        for row, codes in enumerate(map(self.codes.get, picks) if self.codes else ()):
            if codes is not None and codes.shape[1] >= length // FRAME and rng.random() < 0.5:
                frame = int(rng.integers(codes.shape[1] - length // FRAME + 1))
                starts[row], given[row] = frame * (FRAME // GRID), codes[:, frame:frame + length // FRAME]
        return starts, given

    def batch(self, rng, size: int, length: int):
        """-> audio (B, N), phones (B, P) long, f0 (B, P), drawn codes (B, K, T), -1 where there are none; P = N / 240 + 4 label points."""
        sound, picks = self.sound, self._pick(rng, size)
        starts, given = self._places(rng, picks, length)
        gain = 10 ** (rng.uniform(-12, 3, size) / 20)
        gain[list(given)] = 1.0                                                            # codes say how loud it is
        device = sound.audio.device
        where = send(np.stack([starts, sound.points[picks], sound.firsts[picks], sound.lengths[picks], sound.begins[picks]]), device)
        start, points, first, samples, begin = where[..., None]                            # (B, 1) each
        take = start + torch.arange(length // GRID + 4, device=device)
        inside, at = (take >= 0) & (take < points), first + take.clamp(min=0).minimum(points - 1)
        phones, f0 = torch.where(inside, sound.phones[at], 0).long(), torch.where(inside, sound.f0[at], -120.0)
        take = start * GRID + torch.arange(length, device=device)
        audio = torch.where((take >= 0) & (take < samples), sound.audio[begin + take.clamp(min=0).minimum(samples - 1)], 0).float() / 32767
        rough = np.full(size, self.augment)
        rough[list(given)] = 0.0
        audio = roughen(audio, rng, rough) * send(gain.astype(np.float32), device)[:, None]
        codebooks = max((len(codes) for codes in self.drawn.values()), default=0)
        codes = torch.full((size, codebooks, length // FRAME), -1)
        for row, drawn in given.items():
            codes[row] = torch.from_numpy(drawn.astype(np.int64))
        return audio.clamp(-1, 1), phones, f0, codes.to(device)


def send(values: np.ndarray, device) -> Tensor:
    """To the device without waiting for what it is doing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor


def recording_files(folder: str) -> list[str]:
    files = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in RECORDINGS and p.parent.name != "silence")
    if not files:
        raise ValueError(f"no audio files in {folder}: check --recordings")
    return files


def read_drawn(path: str) -> tuple[dict, int, str]:
    """A file of draw_codes.py -> codes (K, T) by turn, how many of them are semantic, the codec's fingerprint."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "np") as file:
            header, codes = file.metadata(), file.get_tensor("codes")
        turns, found, at = json.loads(header["turns"]), {}, 0
        for turn in turns:
            found[turn["id"]] = codes[:, at:at + turn["frames"]]
            at += turn["frames"]
        return found, int(header["num_semantic"]), header["codec_fingerprint"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of draw_codes.py ({error}): check --drawn") from None


def cached_labels(folder: Path, label, jobs: list, workers: int, what: str) -> Sound:
    """label(job) for every job, in parallel, kept in `folder`; what gave None is left out."""
    cache = folder / f"{what}-{hashlib.sha256(json.dumps([2, jobs]).encode()).hexdigest()[:16]}.npz"
    if not cache.exists():
        with ProcessPoolExecutor(workers) as pool:
            found = [t for t in tqdm(pool.map(label, jobs, chunksize=8), total=len(jobs), desc=f"labels {what}", unit="file", mininterval=5) if t is not None]
        parts = {"audio": [t[0] for t in found], "phones": [t[1] for t in found], "f0": [continuous_pitch(t[2]) for t in found]}
        whole = {name: np.concatenate(part) for name, part in parts.items()} | {"lengths": np.array([len(t[0]) for t in found])}
        folder.mkdir(parents=True, exist_ok=True)
        runtime.atomic_write(cache, lambda file: np.savez(file, **whole))
    else:
        with np.load(cache) as stored:
            whole = dict(stored)
    return Sound(*(torch.from_numpy(whole[name]) for name in ("audio", "phones", "f0")), whole["lengths"])


def roughen(audio: Tensor, rng, probability: np.ndarray) -> Tensor:
    """(B, N) -> the same, some rows with a narrower band (2.8 to 10 kHz), some with steady noise 15 to 40 dB below them; probability (B,)."""
    narrow, noisy = rng.random((2, len(audio))) < probability
    cutoff, slope, level = rng.uniform(2800, 10000, len(audio)), rng.uniform(0, 20, len(audio)), 10 ** (-rng.uniform(15, 40, len(audio)) / 20)
    generator = torch.Generator(audio.device).manual_seed(int(rng.integers(2 ** 62)))
    if not (narrow | noisy).any():
        return audio
    cutoff, slope, level, narrow = send(np.stack([cutoff, slope, level * noisy, narrow]).astype(np.float32), audio.device)[..., None]     # (B, 1) each
    place = torch.linspace(0, 1, audio.shape[1] // 2 + 1, device=audio.device)            # of a bin between 0 and 12 kHz
    spectrum = torch.fft.rfft(audio) / (1 + narrow * (place * 12000 / cutoff) ** 16)
    noise = torch.randn(audio.shape, generator=generator, device=audio.device)
    noise = torch.fft.irfft(torch.fft.rfft(noise) / (1 + place * slope / 2), audio.shape[1])
    audio = torch.fft.irfft(spectrum, audio.shape[1])
    return audio + noise / noise.std(1, keepdim=True) * audio.square().mean(1, keepdim=True).sqrt() * level
