"""A keyed mark in the sound, meant not to be heard, that says "a machine made this"; and a detector that knows how sure it is.

    python watermark.py embed speech.wav --output outputs/marked.wav
    python watermark.py detect outputs/marked.wav

The mark is a slow, small change of timbre: the spectral envelope is tilted by a sum of cosines over the mel bands (cepstral
coefficients), whose signs a secret key chooses anew every block and which fade into each other. A codec that says pitch and
envelope again in its own words (this project's does, with another phase and other noise) must keep such a change, where it
drops a mark in the samples. Levels, telephone bandwidth and lossy formats leave it in place as well.

A small network, trained on marked speech that went through the codec (train_watermark.py), says for each 10 ms how far every
coefficient lies from what the speech alone would have had. The detector adds that up with the key's signs. For sound that was
not marked with this key the signs are coin flips that know nothing of the sound, so the p-value is a bound (a tail bound of
Rademacher sums), whatever the sound is and however good or bad the network.

    marker = Marker(key)                         # a stream: any chunking gives the same samples, 10 ms late
    out = marker.push(chunk), ..., marker.finish()
    marked = embed(audio, key)                   # float32 (N,) at 24 kHz, all at once
    found = detect(marked, key)                  # .score, .p_value

Also here: what a file's metadata say of the same fact (AI_TAGS, tag_sound, wav_info for streams). Knows nothing of models and of the codec.
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import config
import runtime

RATE, HOP, WINDOW = 24000, 240, 480              # Hz, samples: 10 ms steps, 20 ms windows
FLOOR_DB = 50.0                                  # below the loudest band: not looked at
WEIGHTS = runtime.ROOT / "pretrained" / "watermark"
SPEEDS = (1.0, 0.96, 0.97, 0.98, 0.99, 1.01, 1.02, 1.03, 1.04)          # at which the mark is looked for; its own comes first
PUBLIC_KEY = "csm-lab"                           # known to everyone: says "made by this code", proves nothing about who made it
AI_TAGS = {"title": "AI-generated speech", "comment": "AI-generated: this voice is synthetic", "software": "csm-lab"}


@dataclass(frozen=True)
class WatermarkConfig:
    """How strong the mark is and where it lies."""
    strength_db: float = 2.0                     # root mean square of the gain over bands and time
    first: int = 3                               # cepstral coefficients that carry it: first..last
    last: int = 10
    block: int = 8                               # steps of 10 ms from one set of signs to the next
    period: int = 48                             # blocks until the signs repeat
    bands: int = 40                              # mel bands between low and high
    low: float = 150.0                           # Hz
    high: float = 7500.0

    def __post_init__(self):
        if not 0 < self.strength_db <= 6:
            raise ValueError(f"strength {self.strength_db} dB must be above 0 and at most 6: change --strength_db")
        if not 0 < self.first <= self.last < self.bands:
            raise ValueError(f"coefficients {self.first}..{self.last} must lie within 1..{self.bands - 1}: change first and last")
        if self.block < 2 or self.period < 8:
            raise ValueError("block must be at least 2 steps and period at least 8 blocks")

    @property
    def carriers(self) -> int:
        return self.last - self.first + 1


def signs(key: str, cfg: WatermarkConfig):
    """(period, carriers) of -1.0 and 1.0, from SHAKE-256 of the key: without it they are coin flips."""
    import numpy as np
    count = cfg.period * cfg.carriers
    stream = hashlib.shake_256(b"csm-lab watermark 1\0" + key.encode()).digest((count + 7) // 8)
    return 1.0 - 2.0 * np.unpackbits(np.frombuffer(stream, np.uint8))[:count].reshape(cfg.period, cfg.carriers).astype(float)


@functools.lru_cache
def _mel_positions(cfg: WatermarkConfig):
    """Where each bin of the spectrum lies among the bands, (WINDOW / 2 + 1,): 0 is the middle of the first."""
    import numpy as np

    def mel(hz):
        return 2595.0 * np.log10(1.0 + np.asarray(hz) / 700.0)
    low, high = mel(cfg.low), mel(cfg.high)
    return (mel(np.fft.rfftfreq(WINDOW, 1 / RATE)) - low) / (high - low) * cfg.bands - 0.5


def cosines(cfg: WatermarkConfig):
    """(bands, carriers): the shapes over frequency."""
    import numpy as np
    return np.cos(np.pi * np.outer(np.arange(cfg.bands) + 0.5, np.arange(cfg.first, cfg.last + 1)) / cfg.bands)


@functools.lru_cache
def _gain_shapes(cfg: WatermarkConfig):
    """(carriers, bins) in dB: what one carrier at +1 does to each bin; faded out at both ends of the range."""
    import numpy as np
    at = _mel_positions(cfg)
    left = np.clip(np.floor(at), 0, cfg.bands - 2).astype(int)
    part = np.clip(at - left, 0, 1)
    shapes = cosines(cfg).T
    over_bins = shapes[:, left] * (1 - part) + shapes[:, left + 1] * part
    edge = np.clip((at + 1.5) / 2, 0, 1) * np.clip((cfg.bands + 0.5 - at) / 2, 0, 1)
    return over_bins * edge * cfg.strength_db / math.sqrt(cfg.carriers / 2 * 2 / 3)          # cosines: 1/2; signs that fade into each other: 2/3


@functools.lru_cache
def _window():
    import numpy as np
    return np.sqrt(np.hanning(WINDOW + 1)[:-1])


def pattern(signs, steps, cfg: WatermarkConfig):
    """The carriers at these steps (numbers or an array (T,)): (T, carriers) or (carriers,) of -1..1, one set of signs fading into the next."""
    import numpy as np
    block, within = np.divmod(steps, cfg.block)
    part = np.asarray(within / cfg.block)[..., None]
    return signs[block % cfg.period] * (1 - part) + signs[(block + 1) % cfg.period] * part


class Marker:
    """Marks a stream. push(chunk (n,)) returns the samples that are ready, finish() the rest: together as many as went in.

    Every 10 ms step is computed on its own, so that chunks cannot matter to the last bit.
    """

    def __init__(self, key: str = PUBLIC_KEY, cfg: WatermarkConfig | None = None):
        import numpy as np
        self.cfg = cfg or WatermarkConfig()
        self.signs = signs(key, self.cfg)
        self.shapes = _gain_shapes(self.cfg)
        self.step = 0
        self.waiting = np.zeros(HOP)             # HOP samples before the next step, then what has not been looked at
        self.tail = np.zeros(HOP)                # second half of the last step's window
        self.silent = HOP                        # samples to leave out: the silence put before the sound
        self.owed = 0                            # samples that came in and have not gone out

    def push(self, chunk):
        import numpy as np
        chunk = np.asarray(chunk, np.float64).reshape(-1)
        self.waiting = np.concatenate([self.waiting, chunk])
        ready, window = [], _window()
        while len(self.waiting) >= WINDOW:
            gains = 10.0 ** (pattern(self.signs, self.step, self.cfg) @ self.shapes / 20.0)          # (bins,)
            spectrum = np.fft.rfft(self.waiting[:WINDOW] * window) * gains
            frame = np.fft.irfft(spectrum, WINDOW) * window
            ready.append(self.tail + frame[:HOP])
            self.tail, self.waiting, self.step = frame[HOP:], self.waiting[HOP:], self.step + 1
        out = np.concatenate([*ready, np.zeros(0)])
        leave, self.silent = min(self.silent, len(out)), max(0, self.silent - len(out))
        self.owed += len(chunk) - len(out[leave:])
        return np.clip(out[leave:], -1.0, 1.0).astype(np.float32)

    def finish(self):
        """The last samples; afterwards the marker is used up."""
        import numpy as np
        owed = self.owed
        return self.push(np.zeros(WINDOW))[:owed]


def embed(audio, key: str = PUBLIC_KEY, cfg: WatermarkConfig | None = None):
    """Marked float32 (N,) of audio (N,) at 24 kHz."""
    import numpy as np
    marker = Marker(key, cfg)
    return np.concatenate([marker.push(audio), marker.finish()])


# ----------------------------------------------------------------------------- detection

def log_bands(audio, cfg: WatermarkConfig):
    """Band energies in dB, float32 (T, bands), of audio (N,) at 24 kHz: one row per 10 ms step of Marker."""
    import numpy as np
    padded = np.pad(np.nan_to_num(np.asarray(audio, np.float64).reshape(-1)), (HOP, WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * _window())) ** 2
    band = np.floor(_mel_positions(cfg) + 0.5).astype(int)
    member = (band[:, None] == np.arange(cfg.bands)).astype(float)
    return (10 * np.log10(power @ member + 1e-9)).astype(np.float32)


def features(bands):
    """What the network reads, (T, bands): dB / 10 above a floor under the loudest, centred, so that the level does not matter."""
    import numpy as np
    raised = np.maximum(bands, bands.max() - FLOOR_DB) / 10
    return raised - raised.mean()


def make_network(cfg: WatermarkConfig, width: int = 48):
    """Dilated convolutions over time: (B, bands, T) -> (B, carriers, T), 0.3 s to either side."""
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, dilation: int):
            super().__init__()
            self.body = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation), nn.ReLU(), nn.Conv1d(width, width, 1))

        def forward(self, x):
            return x + self.body(x)
    return nn.Sequential(nn.Conv1d(cfg.bands, width, 5, padding=2), *map(Residual, (1, 2, 4, 8)), nn.ReLU(), nn.Conv1d(width, cfg.carriers, 1))


def save_network(network, cfg: WatermarkConfig, folder, **about) -> None:
    """float16 weights and a config.json beside them."""
    from safetensors.torch import save
    folder = Path(folder)
    runtime.atomic_write(folder / "model.safetensors", save({k: v.half().contiguous() for k, v in network.state_dict().items()}))
    runtime.write_json(folder / "config.json", {"format": 1, "kind": "watermark", "config": asdict(cfg), "width": network[0].out_channels} | about)


@functools.lru_cache(maxsize=4)
def load_network(folder=WEIGHTS):
    """(network, WatermarkConfig) of a folder. ValueError where there is none."""
    from safetensors.torch import load
    folder = Path(folder)
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load((folder / "model.safetensors").read_bytes())
        cfg = WatermarkConfig(**about["config"])
        network = make_network(cfg, about["width"])
        network.load_state_dict({k: v.float() for k, v in tensors.items()})
    except (OSError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} holds no watermark detector ({' '.join(str(error).split())[:100]}): git checkout pretrained/watermark, or python train_watermark.py") from None
    return network.eval(), cfg


def carriers_of(audio, network, cfg: WatermarkConfig, piece: int = 6000):
    """The network's estimate of every carrier, (T, carriers), in pieces of a minute."""
    import numpy as np
    import torch
    read, out, margin = features(log_bands(audio, cfg)), [], 64
    with torch.inference_mode():
        for start in range(0, len(read), piece):
            first = max(0, start - margin)
            part = torch.from_numpy(read[first:start + piece + margin]).T[None]
            out.append(network(part)[0].T.numpy()[start - first:][:piece])
    return np.concatenate(out)


def tail(z: float) -> float:
    """Bound of P(sum of independent +-a_i >= z sqrt(sum a_i^2)), for any a_i.

    The smaller of Hoeffding's and Bentkus and Dzindzalieta's (2015): 3.178 times the normal tail.
    """
    return min(1.0, math.exp(-z * z / 2), 3.178 * 0.5 * math.erfc(z / math.sqrt(2))) if z > 0 else 1.0


@dataclass(frozen=True)
class Found:
    """score: standard deviations of chance at the best place; p_value: bound on the chance that unmarked sound gets it.

    start_s: where the signs begin; speed: how much too fast it is played.
    """
    score: float
    p_value: float
    start_s: float
    speed: float


def at_speed(carriers, speed: float):
    """Carriers (T, carriers) of sound that was played `speed` times too fast, as they were before."""
    import numpy as np
    if speed == 1.0:
        return np.asarray(carriers, float)
    at = np.arange(0, len(carriers) - 1, 1 / speed)
    return np.stack([np.interp(at, np.arange(len(carriers)), row) for row in np.asarray(carriers, float).T], 1)


def arrange(carriers, cfg: WatermarkConfig, stride: int = 2):
    """Carriers (T, carriers) gathered under every place where the signs may begin, in strides of 10 ms steps: (starts, period, carriers)."""
    import numpy as np
    length = cfg.block * cfg.period
    rise = 1 - np.abs(np.arange(1 - cfg.block, cfg.block)) / cfg.block                  # a set of signs fades in and out
    smooth = np.stack([np.convolve(row, rise) for row in np.asarray(carriers, float).T], 1)     # row t is centred on step t - (block - 1)
    lead = cfg.block - 1
    smooth = np.pad(smooth, ((-lead % length, 0), (0, 0)))
    smooth = np.pad(smooth, ((0, -len(smooth) % length), (0, 0)))
    folded = smooth.reshape(-1, length, cfg.carriers).sum(0)                            # of all repetitions; row t is step t modulo length
    starts = np.arange(0, length, stride)
    return folded[(starts[:, None] + cfg.block * np.arange(cfg.period)) % length]


def match(carriers, key: str, cfg: WatermarkConfig, stride: int = 2, speeds: tuple = SPEEDS) -> Found:
    """Carriers (T, carriers) against the signs of `key`, at every beginning and some speeds."""
    return search({speed: arrange(at_speed(carriers, speed), cfg, stride) for speed in speeds}, key, cfg, stride)


def search(arranged: dict, key: str, cfg: WatermarkConfig, stride: int = 2) -> Found:
    """The best of all beginnings and speeds. arranged: speed -> what `arrange` gave.

    The chance of a false alarm is dealt out (union bound): half of it to sound that begins with the mark at its own speed, as most does,
    most of the rest to other beginnings, a tenth to other speeds.
    """
    import numpy as np
    best, wanted = Found(0.0, 1.0, 0.0, 1.0), signs(key, cfg)
    for speed, cells in arranged.items():
        scores = (cells * wanted).sum((1, 2)) / np.sqrt((cells ** 2).sum((1, 2)) + 1e-12)
        share = np.full(len(cells), (0.4 if speed == 1.0 else 0.1 / max(1, len(arranged) - 1)) / len(cells))
        share[0] += 0.5 if speed == 1.0 else 0.0
        p_values = [tail(score) / part for score, part in zip(scores.tolist(), share.tolist())]
        place = int(np.argmin(p_values))
        if p_values[place] < best.p_value or speed == 1.0:
            best = Found(scores[place].item(), min(1.0, p_values[place]), place * stride * HOP / RATE, speed)
    return best


def detect(audio, key: str = PUBLIC_KEY, folder=WEIGHTS) -> Found:
    """Is audio (N,) at 24 kHz marked with `key`? A p_value below 0.001 says yes; without the mark that happens less than once in a thousand."""
    network, cfg = load_network(folder)
    return match(carriers_of(audio, network, cfg), key, cfg)


# ----------------------------------------------------------------------------- metadata

def tag_sound(path, tags: dict | None = None) -> dict:
    """Write AI_TAGS (and `tags`) into a WAV (LIST/INFO), FLAC or Ogg (comments) file, samples untouched; returns what is read back."""
    import os

    import soundfile
    path = Path(path)
    wanted, temporary = AI_TAGS | (tags or {}), path.with_name(path.name + ".tmp")
    try:
        info = soundfile.info(str(path))
        samples, rate = soundfile.read(str(path), dtype="int16" if info.subtype == "PCM_16" else "float32", always_2d=True)
        with soundfile.SoundFile(str(temporary), "w", rate, info.channels, info.subtype, format=info.format) as file:
            set_tags(file, wanted)
            file.write(samples)
        os.replace(temporary, path)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"cannot tag {path} ({' '.join(str(error).split())}): give a WAV, FLAC or Ogg file") from None
    finally:
        temporary.unlink(missing_ok=True)
    return read_tags(path)


def wav_info(tags: dict | None = None) -> bytes:
    """A LIST/INFO chunk with the tags, to put between `fmt ` and `data` of a WAV file whose samples are not known yet."""
    names = {"title": b"INAM", "comment": b"ICMT", "software": b"ISFT", "artist": b"IART"}
    inside = b"INFO"
    for name, text in (tags or AI_TAGS).items():
        value = text.encode("ascii", "replace") + b"\0"
        inside += names[name] + len(value).to_bytes(4, "little") + value + b"\0" * (len(value) % 2)
    return b"LIST" + len(inside).to_bytes(4, "little") + inside


def set_tags(file, tags: dict | None = None) -> None:
    """Give an open soundfile.SoundFile (before its samples) the tags."""
    for name, text in (tags or AI_TAGS).items():
        setattr(file, name, text)


def read_tags(path) -> dict:
    """{name: text} of the tags among title, comment, software, artist that the file has."""
    import soundfile
    with soundfile.SoundFile(str(path)) as file:
        return {name: text for name in ("title", "comment", "software", "artist") if (text := getattr(file, name))}


def is_tagged(path) -> bool:
    """True where the metadata say that a machine made it."""
    return "AI-generated" in " ".join(read_tags(path).values())


# ----------------------------------------------------------------------------- command line

def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True, metavar="embed|detect")
    for name, words in (("embed", "mark a sound file, and say so in its metadata"), ("detect", "is this file marked? exit code 0: yes, 1: no")):
        part = parts.add_parser(name, help=words, description=words)
        part.add_argument("file", help="WAV, FLAC, Ogg or MP3")
        part.add_argument("--key", default=PUBLIC_KEY, help="secret of whoever marks; default: a public one, which anybody may detect")
    parts.choices["embed"].add_argument("--output", default="", help="default FILE.marked.wav")
    config.add_flags(parts.choices["embed"], WatermarkConfig, only=("strength_db",))
    parts.choices["detect"].add_argument("--weights", default=str(WEIGHTS), help="folder of the detector; default pretrained/watermark")
    return parser


def mark_file(args) -> int:
    from audio_io import read_audio, write_audio
    output = Path(args.output or Path(args.file).with_suffix(".marked.wav"))
    cfg = config.from_flags(WatermarkConfig, args)
    write_audio(output, embed(read_audio(args.file), args.key, cfg), tags=AI_TAGS)
    print(output)
    return 0


def look_at_file(args) -> int:
    from audio_io import read_audio
    found = detect(read_audio(args.file), args.key, args.weights)
    marked = found.p_value < 0.001
    print(json.dumps({"marked": marked, "score": round(found.score, 2), "p_value": float(f"{found.p_value:.2g}"), "metadata": is_tagged(args.file)}))
    return 0 if marked else 1


def main(argv=None) -> int:
    args = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    return runtime.plain_errors(lambda _: (mark_file if args.what == "embed" else look_at_file)(args))(argv)


if __name__ == "__main__":
    raise SystemExit(main())
