"""Sound files to codes files and back, and what a codes file holds. The command line of the codec.

    python rvq_tokenizer.py encode voice.wav voice.codes --num_codebooks 16
    python rvq_tokenizer.py decode voice.codes again.wav
    python rvq_tokenizer.py info voice.codes
    python rvq_tokenizer.py encode recordings codes         # whole folders, with a progress bar

A codes file is safetensors: `codes` (K, T) int16, and in its header the fingerprint of the codec, the length of the
sound in samples, and the codec's rates. Long files are read, coded and written in pieces, so that an hour needs no
more memory than a minute. Any readable sound goes in: other rates are resampled, stereo is averaged, what is not a
number counts as silence and what is louder than full scale is clipped.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator

import config
import runtime

if TYPE_CHECKING:                # torch and numpy are imported inside the functions: --help is instant
    import numpy as np
    from torch import Tensor, nn

SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".g722")
CODES = ".codes"
PIECE_SECONDS = 10.0             # of sound in memory at a time
FORMAT = "1"
ENOUGH = 10                      # frames per code below which entropy and unused codes say little


# ----------------------------------------------------------------------------- codes files

@dataclass
class Codes:
    """What a codes file holds."""
    codes: Tensor                # (K, T) int16
    samples: int                 # length of the sound at sample_rate; (T - 1) * frame_size < samples <= T * frame_size
    fingerprint: str
    sample_rate: int
    frame_size: int
    codebook_size: int

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.frame_size


def write_codes(path, codes: Tensor, samples: int, codec: nn.Module) -> None:
    """codes (K, T) of `samples` samples -> one file, written whole or not at all."""
    import torch
    from safetensors.torch import save
    cfg = codec.cfg
    about = {"format": FORMAT, "kind": "codes", "codec_fingerprint": codec.fingerprint, "samples": samples, "sample_rate": cfg.sample_rate,
             "frame_size": cfg.frame_size, "codebook_size": cfg.codebook_size}
    runtime.atomic_write(path, save({"codes": codes.to(torch.int16).contiguous()}, {k: str(v) for k, v in about.items()}))


def read_codes(path) -> Codes:
    """ValueError (one line) for a file that is missing, damaged or not a codes file."""
    from safetensors import SafetensorError, safe_open
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no codes file {path}: check the path")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("kind") != "codes" or about.get("format") != FORMAT:
                raise ValueError(f"{path} is not a codes file of format {FORMAT}: make one with python rvq_tokenizer.py encode")
            found = Codes(file.get_tensor("codes"), int(about["samples"]), about["codec_fingerprint"], *(int(about[k]) for k in ("sample_rate", "frame_size", "codebook_size")))
    except (SafetensorError, OSError, KeyError):
        raise ValueError(f"{path} is no codes file, or it is damaged: make it again with python rvq_tokenizer.py encode") from None
    if found.codes.dim() != 2 or not 0 <= found.codes.shape[1] * found.frame_size - found.samples < found.frame_size:
        raise ValueError(f"{path} is damaged: {found.samples} samples do not fit codes of shape {tuple(found.codes.shape)}")
    return found


def check_fingerprint(path, codes: Codes, codec: nn.Module, name) -> None:
    """ValueError when the codes are another codec's: they would decode to noise."""
    if codes.fingerprint != codec.fingerprint:
        raise ValueError(f"{path} was made by the codec {codes.fingerprint}, but {name} is the codec {codec.fingerprint}: "
                         "name the one it was made with (--codec), or encode the sound again")


# ----------------------------------------------------------------------------- sound in pieces

def sound_pieces(path, sample_rate: int, seconds: float = PIECE_SECONDS) -> Iterator[np.ndarray]:
    """Mono float32 pieces (n,) at `sample_rate` Hz that together are the file's sound; at least one sample in all.

    Raises ValueError (one line) for a file that is missing, empty or not audio.
    """
    import audio_io
    import numpy as np
    import soundfile
    import soxr
    path = Path(path)
    if path.suffix.lower() == ".g722" or not path.is_file():
        yield audio_io.read_audio(path, sample_rate)
        return
    try:
        with soundfile.SoundFile(path) as file:
            rate, there, made = file.samplerate, False, 0
            stream = None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
            for block in file.blocks(max(1, int(seconds * rate)), dtype="float32", always_2d=True):
                mono = np.nan_to_num(block.mean(axis=1), posinf=1.0, neginf=-1.0)      # (n, channels) -> (n,)
                there = there or len(mono) > 0
                piece = stream.resample_chunk(mono) if stream else mono
                made += len(piece)
                yield piece
            rest = stream.resample_chunk(np.zeros(0, np.float32), last=True) if stream and there else np.zeros(0, np.float32)
            yield rest if len(rest) or made or not there else np.zeros(1, np.float32)  # one sample at 48 kHz is half a sample at 24 kHz
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is not a readable audio file ({' '.join(str(error).split())}): give a WAV, FLAC, Ogg or MP3 file") from None


def sound_seconds(path) -> float:
    """Length from the header, for the progress bar; 0 where it cannot be read."""
    import audio_io
    try:
        return Path(path).stat().st_size / 8000 if Path(path).suffix.lower() == ".g722" else audio_io.duration(path)
    except (ValueError, OSError):
        return 0.0


def encode_pieces(codec: nn.Module, pieces: Iterable[np.ndarray], num_codebooks: int | None = None, heard=None) -> tuple[Tensor, int]:
    """Sound in pieces -> codes (K, T) int16 on the CPU and the number of samples; the last frame is filled up with silence.

    heard: called with the seconds of every piece. Same codes as encoding the whole at once.
    """
    import numpy as np
    import torch
    device, size = next(codec.parameters()).device, codec.cfg.frame_size
    state, waiting, found, samples = None, np.zeros(0, np.float32), [], 0

    def encode(sound):
        codes, after = codec.encode_stream(torch.from_numpy(sound).to(device).view(1, 1, -1), state, num_codebooks)
        found.append(codes[0].to("cpu", torch.int16))
        return after
    for piece in pieces:
        samples += len(piece)
        waiting = np.concatenate([waiting, piece])
        whole = len(waiting) // size * size
        if whole:
            state, waiting = encode(waiting[:whole]), waiting[whole:]
        if heard:
            heard(len(piece) / codec.cfg.sample_rate)
    if len(waiting):
        encode(np.pad(waiting, (0, size - len(waiting))))
    if not samples:
        raise ValueError("there is no sound in it: give a longer recording")
    return torch.cat(found, 1), samples


def decode_pieces(codec: nn.Module, codes: Codes, seconds: float = PIECE_SECONDS) -> Iterator[np.ndarray]:
    """Float32 pieces (n,) that together are the sound, exactly `samples` long."""
    device, state, left = next(codec.parameters()).device, None, codes.samples
    frames = max(1, int(seconds * codes.frame_rate))
    for part in codes.codes.split(frames, 1):
        sound, state = codec.decode_stream(part[None].long().to(device), state)
        piece = sound[0, 0, :left].float().cpu().numpy()
        left -= len(piece)
        yield piece


def write_pieces(path, pieces: Iterable[np.ndarray], sample_rate: int, written=None) -> None:
    """Pieces (n,) -> a 16-bit WAV or FLAC or an Ogg file, written whole or not at all. written: called with the seconds of every piece."""
    import numpy as np
    import soundfile
    path = Path(path)
    kind = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"cannot write {path}: end the name in .wav, .flac or .ogg")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with soundfile.SoundFile(temporary, "w", sample_rate, 1, kind[1], format=kind[0]) as file:
            for piece in pieces:
                file.write(np.clip(piece, -1.0, 1.0))
                if written:
                    written(len(piece) / sample_rate)
        os.replace(temporary, path)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise OSError(f"cannot write {path} ({' '.join(str(error).split())}): is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------- commands

def pair_up(source: Path, target: Path, endings: tuple, ending: str) -> list[tuple[Path, Path]]:
    """(input, output) of one file, or of every fitting file below a folder."""
    if not source.is_dir():
        return [(source, target)]
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not files:
        raise ValueError(f"no files ending in {', '.join(endings)} below {source}: check the path")
    pairs = [(p, target / p.relative_to(source).with_suffix(ending)) for p in files]
    taken: dict[Path, Path] = {}
    for one, out in pairs:
        if out in taken:
            raise ValueError(f"{taken[out]} and {one} would both become {out}: rename one of them")
        taken[out] = one
    return pairs


def work_through(pairs: list[tuple[Path, Path]], seconds: list[float], what: str, do) -> int:
    """do(input, output, bar.update) for all; in a folder a bad file is named and the others go on."""
    from tqdm import tqdm
    bad = 0
    with tqdm(total=sum(seconds), desc=what, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of sound [{elapsed}<{remaining}]") as bar:
        for source, target in pairs:
            try:
                do(source, target, lambda seconds: bar.update(max(0.0, min(seconds, bar.total - bar.n))))      # headers may promise too little
            except ValueError as error:
                if len(pairs) == 1:
                    raise
                bad += 1
                tqdm.write(f"left out: {' '.join(str(error).split())}", file=sys.stderr)
    if bad:
        raise ValueError(f"{bad} of {len(pairs)} files were left out: see the lines above")
    return len(pairs)


def open_codec(args) -> nn.Module:
    """The codec of --codec on --device, with --num_codebooks checked."""
    import checkpoint
    codec = checkpoint.load_codec(args.codec, runtime.pick_device(args.device))
    if args.num_codebooks is not None and not 1 <= args.num_codebooks <= codec.cfg.num_codebooks:
        raise ValueError(f"{args.codec} has {codec.cfg.num_codebooks} codebooks: use --num_codebooks 1 to {codec.cfg.num_codebooks}, not {args.num_codebooks}")
    return codec


def encode(args) -> None:
    pairs = pair_up(args.input, args.output, SOUNDS, CODES)
    codec = open_codec(args)

    def one(source, target, heard):
        try:
            codes, samples = encode_pieces(codec, sound_pieces(source, codec.cfg.sample_rate), args.num_codebooks, heard)
        except ValueError as error:
            raise ValueError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
        write_codes(target, codes, samples, codec)
    count = work_through(pairs, [sound_seconds(source) for source, _ in pairs], "encoding", one)
    print(f"{args.output}: {count} file{'s' * (count > 1)}, {args.num_codebooks or codec.cfg.num_codebooks} codebooks")


def decode(args) -> None:
    pairs = pair_up(args.input, args.output, (CODES,), ".wav")
    codec = open_codec(args)

    def one(source, target, written):
        codes = read_codes(source)
        check_fingerprint(source, codes, codec, args.codec)
        if args.num_codebooks is not None:
            codes.codes = codes.codes[:args.num_codebooks]
        write_pieces(target, decode_pieces(codec, codes), codec.cfg.sample_rate, written)

    def seconds(source):
        try:
            return read_codes(source).seconds
        except ValueError:
            return 0.0
    count = work_through(pairs, [seconds(source) for source, _ in pairs], "decoding", one)
    print(f"{args.output}: {count} file{'s' * (count > 1)}")


def statistics(files: list[Codes]) -> dict:
    """Bits per second, nominal and by entropy, and use of the codebooks over all the files together."""
    import torch
    from rvq_tokenizer import code_statistics
    first, fewest = files[0], min(f.codes.shape[0] for f in files)
    codes = torch.cat([f.codes[:fewest].long() for f in files], 1)
    use, bits = code_statistics(codes, first.codebook_size), math.log2(first.codebook_size)
    return use | {"files": len(files), "seconds": sum(f.seconds for f in files), "frames": codes.shape[1], "num_codebooks": fewest, "codebook_size": first.codebook_size,
                  "fingerprint": first.fingerprint, "bits_per_second": fewest * bits * first.frame_rate, "entropy_bits_per_second": sum(use["entropy"]) * bits * first.frame_rate}


def info(args) -> None:
    """Bit rate, entropy and unused codes per codebook."""
    files = []
    for path, _ in pair_up(args.input, args.input, (CODES,), CODES):
        files.append(read_codes(path))
        if files[-1].fingerprint != files[0].fingerprint:
            raise ValueError(f"{path} was made by the codec {files[-1].fingerprint}, the files before it by {files[0].fingerprint}: look at one codec's files at a time")
    found = statistics(files)
    print(f"{args.input}: {found['files']} file{'s' * (found['files'] > 1)}, {found['seconds']:.2f} s, {found['frames']} frames of {found['num_codebooks']} codebooks "
          f"with {found['codebook_size']} codes, codec {found['fingerprint']}")
    print(f"{found['bits_per_second']:.0f} bit/s; {found['entropy_bits_per_second']:.0f} bit/s by the entropy of each codebook")
    if found["frames"] < ENOUGH * found["codebook_size"]:
        print(f"note: {found['frames']} frames are few for {found['codebook_size']} codes: entropy comes out too low and unused codes too many")
    print("codebook  entropy (1 = uniform)  unused codes")
    for k, (entropy, dead) in enumerate(zip(found["entropy"], found["dead"]), 1):
        print(f"{k:8d}  {entropy:21.3f}  {100 * dead:10.1f} %")


# ----------------------------------------------------------------------------- command line

def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True, metavar="encode|decode|info")
    for name, does in (("encode", "sound file or folder -> codes"), ("decode", "codes file or folder -> sound")):
        part = parts.add_parser(name, help=does, description=does)
        part.add_argument("input", type=Path, help="file or folder")
        part.add_argument("output", type=Path, help="file, or folder where the input is one")
        part.add_argument("--codec", default="pretrained/codec", metavar="PATH|mimi", help="folder of weights, mimi (Kyutai's, through transformers) or mimi:FOLDER; default pretrained/codec")
        part.add_argument("--num_codebooks", type=int, metavar="8|16|32", help="only the first so many; default all")
        part.add_argument("--device", default="cpu", help="auto|cpu|cuda|mps; default cpu")
    part = parts.add_parser("info", help=info.__doc__, description=info.__doc__)
    part.add_argument("input", type=Path, help="codes file, or folder of them")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)

    def run(_) -> int:
        {"encode": encode, "decode": decode, "info": info}[args.what](args)
        return 0
    return runtime.plain_errors(run)(argv)


if __name__ == "__main__":
    sys.exit(main())
