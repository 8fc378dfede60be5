"""What the codec trains on: crops of collected speech with phone and pitch labels every 10 ms, and codes that a model drew for them.

    data = CodecData("data/synthetic", "train", CodecConfig().phones)
    audio, phones, f0, drawn = data.batch(numpy.random.default_rng(0), 8, 46080)

Pitch is measured with WORLD; phone times come from the collection. Labels are made once and kept beside the data.
Shapes: N samples, P label points, K codebooks, T frames.
"""
from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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


def label_turn(job: tuple) -> tuple:
    """One turn -> (int16 samples (N,), phones (N // GRID + 1,) uint8, f0 Hz (same) float32)."""
    import numpy as np
    import soundfile
    path, alignment, alphabet = job
    audio, _ = soundfile.read(path, dtype="float32")
    points = len(audio) // GRID + 1
    phones = np.zeros(points, np.uint8)
    times = np.arange(points) * GRID / 24000
    index = np.searchsorted(np.asarray(alignment["ends"]), times, side="right")
    symbols = np.asarray([max(0, alphabet.find(p)) for p in alignment["phones"]] + [0], np.uint8)
    phones[:] = symbols[np.minimum(index, len(symbols) - 1)]
    return (audio * 32767).astype(np.int16), phones, measure_pitch(audio)


def continuous_pitch(f0, gap: int = 12):
    """f0 (P,) with zeros -> interpolated everywhere; negative where no voiced point lies within `gap` points (120 ms).

    WORLD's quick tracker leaves out a fifth of the voiced frames, so its voiced flag is not believed (LOG.md).
    """
    import numpy as np
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
    import numpy as np

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
    import numpy as np
    import pyworld
    x, points = audio.astype(np.float64), len(audio) // GRID + 1
    f0, t = pyworld.dio(x, 24000, f0_floor=55, f0_ceil=580, frame_period=10.0)
    f0 = pyworld.stonemask(x, f0, t, 24000).astype(np.float32)[:points]
    return np.pad(f0, (0, points - len(f0)))


class CodecData:
    """All turns of a split in memory: int16 audio, phone and pitch labels every 10 ms. Crops are drawn at random.

    drawn: a file of draw_codes.py; half of the crops of its turns come with these codes, beginning at a frame.
    """

    def __init__(self, data: str, split: str, alphabet: str, limit_hours: float = 0.0, workers: int = 2, recordings: str = "", augment: float = 0.0, drawn: str = ""):
        turns = read_supervisions(data, split)
        if limit_hours:
            before = [0.0, *itertools.accumulate(t["duration"] for t in turns)]
            turns = [t for t, seconds in zip(turns, before) if seconds <= limit_hours * 3600]
        jobs = [(str(Path(data) / t["custom"]["turn_audio"]), t["custom"]["alignment"], alphabet) for t in turns]
        cache = Path(data) / "codec_labels" / f"{split}-{hashlib.sha256(json.dumps(jobs).encode()).hexdigest()[:16]}.npz"
        labelled = cached_labels(cache, label_turn, jobs, workers, f"labels {split}")
        if recordings:
            labelled += self._recordings(recordings, workers)
        self.drawn, self.drawn_semantic, self.drawn_fingerprint = read_drawn(drawn) if drawn else ({}, 0, "")
        names = [t["id"] for t in turns] + [""] * (len(labelled) - len(turns))
        self.turns = [(audio, phones, continuous_pitch(f0), self.drawn.get(name)) for (audio, phones, f0), name in zip(labelled, names)]
        if drawn and not any(t[3] is not None for t in self.turns):
            raise ValueError(f"{drawn} has none of the turns in {data}: check --drawn and --data")
        self.hours = sum(len(t[0]) for t in self.turns) / 24000 / 3600
        self.augment = augment

    def _recordings(self, folder: str, workers: int) -> list[tuple]:
        files = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in RECORDINGS and p.parent.name != "silence")
        if not files:
            raise ValueError(f"no audio files in {folder}: check --recordings")
        cache = Path(folder) / f".codec_labels-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}.npz"
        return cached_labels(cache, label_recording, files, workers, "recordings")

    def crop(self, rng, length: int) -> tuple:
        """-> audio (length,) float, phones and f0 at the label points of the crop, the codes drawn for it (K, T) or None."""
        import numpy as np
        audio, phones, f0, codes = self.turns[rng.integers(len(self.turns))]
        points = length // GRID + 4
        if codes is not None and (codes.shape[1] < length // FRAME or rng.random() < 0.5):
            codes = None
        if codes is None:
            start = int(rng.integers(-8, max(1, len(phones) - length // GRID + 8)))
        else:
            frame = int(rng.integers(codes.shape[1] - length // FRAME + 1))
            start, codes = frame * (FRAME // GRID), codes[:, frame:frame + length // FRAME]
        take = np.arange(start, start + points)
        inside = (take >= 0) & (take < len(phones))
        take = take.clip(0, len(phones) - 1)
        sample = np.zeros(length, np.float32)
        left, right = max(0, start * GRID), min(len(audio), start * GRID + length)
        if right > left:
            sample[left - start * GRID:right - start * GRID] = audio[left:right].astype(np.float32) / 32767
        return sample, np.where(inside, phones[take], 0), np.where(inside, f0[take], -120.0).astype(np.float32), codes

    def batch(self, rng, size: int, length: int):
        """-> audio (B, N), phones (B, P) long, f0 (B, P), drawn codes (B, K, T), -1 where there are none; P = N / 240 + 4 label points."""
        import numpy as np
        import torch
        items = [self.crop(rng, length) for _ in range(size)]
        gain = 10 ** (rng.uniform(-12, 3, (size, 1)) / 20)
        gain[[i[3] is not None for i in items]] = 1.0                                      # codes say how loud it is
        audio = np.stack([roughen(i[0], rng, self.augment if i[3] is None else 0.0) for i in items]) * gain.astype(np.float32)
        codebooks = max((len(codes) for codes in self.drawn.values()), default=0)
        codes = np.stack([np.full((codebooks, length // FRAME), -1) if i[3] is None else i[3] for i in items]).astype(np.int64)
        return (torch.from_numpy(audio).float().clamp(-1, 1), torch.from_numpy(np.stack([i[1] for i in items])).long(),
                torch.from_numpy(np.stack([i[2] for i in items])), torch.from_numpy(codes))


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


def cached_labels(cache: Path, label, jobs: list, workers: int, what: str) -> list[tuple]:
    """label(job) for every job, in parallel, kept in `cache`; what gave None is left out."""
    import numpy as np
    from tqdm import tqdm

    import runtime
    if cache.exists():
        with np.load(cache) as stored:
            return [tuple(stored[f"{i}_{part}"] for part in range(3)) for i in range(len(stored.files) // 3)]
    with ProcessPoolExecutor(workers) as pool:
        found = [t for t in tqdm(pool.map(label, jobs, chunksize=8), total=len(jobs), desc=what, unit="file", mininterval=5) if t is not None]
    cache.parent.mkdir(exist_ok=True)
    runtime.atomic_write(cache, lambda file: np.savez(file, **{f"{i}_{part}": a for i, turn in enumerate(found) for part, a in enumerate(turn)}))
    return found


def roughen(audio, rng, probability: float):
    """(N,) -> the same, sometimes with a narrower band (2.8 to 10 kHz), sometimes with steady noise 15 to 40 dB below it."""
    import numpy as np
    if rng.random() < probability:
        spectrum = np.fft.rfft(audio)
        hz = np.arange(len(spectrum)) * (12000 / (len(spectrum) - 1))
        audio = np.fft.irfft(spectrum / (1 + (hz / rng.uniform(2800, 10000)) ** 16), len(audio)).astype(np.float32)
    if rng.random() < probability:
        noise = np.fft.rfft(rng.standard_normal(len(audio)).astype(np.float32))
        noise = np.fft.irfft(noise / (1 + np.arange(len(noise)) * rng.uniform(0, 20) / len(noise)), len(audio))
        level = np.sqrt(np.mean(audio ** 2)) * 10 ** (-rng.uniform(15, 40) / 20)
        audio = audio + (noise / max(1e-9, noise.std()) * level).astype(np.float32)
    return audio
