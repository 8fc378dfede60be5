"""Every way weights cross the disk: training files, shipped folders, the codec.

Two shapes on disk. A *training file* (checkpoints/last.pt, best_model.pt) is one torch.save of tensors
and plain data, read with weights_only=True; everything an exact resume needs is in it. A *shipped
folder* (pretrained/nano, pretrained/codec) is model.safetensors + config.json, small enough for git.

    python checkpoint.py --checkpoint checkpoints/best_model.pt --output pretrained/nano
"""
from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

from config import CodecConfig, ModelConfig, Parser, from_dict, to_dict
from runtime import ROOT, atomic_write, plain_errors, write_json


def build_parser() -> Parser:
    parser = Parser(description="Write the weights of a training file as a small folder (model.safetensors + config.json).")
    parser.add_argument("--checkpoint", default="checkpoints/best_model.pt", help="training file of train.py")
    parser.add_argument("--output", required=True, help="folder to write, such as pretrained/nano")
    parser.add_argument("--storage", default="int8", choices=("int8", "bf16"), help="how matrices are stored (default int8 rows with fp16 scales)")
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import torch                     # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load as load_tensors, save as tensor_bytes  # noqa: E402
from torch import Tensor, nn     # noqa: E402

FORMAT = 1
WEIGHTS = "model.safetensors"
SCALE = "::scale"                # suffix of the scales that belong to an int8 tensor
SMALL = 4096                     # tensors below this many numbers stay float32: little to gain, biases and gates to lose


def find(path) -> Path:
    """`path` as given, or inside the repository when it is relative and not in the current folder."""
    path = Path(path)
    return path if path.exists() or path.is_absolute() or not (ROOT / path).exists() else ROOT / path


# ----------------------------------------------------------------------------- storage of single tensors

def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) float -> int8 of the same shape and float16 scales that broadcast to it: weight ~ q * scale.

    A row is the last dimension; for convolutions (short last dimension) all of one output channel.
    """
    dims = (-1,) if weight.size(-1) >= 32 else tuple(range(1, weight.dim()))
    scale = (weight.float().abs().amax(dims, keepdim=True) / 127).half()
    divisor = scale.float().clamp(min=1e-12)
    q = (weight.float() / divisor).round().clamp(-127, 127).to(torch.int8)
    return q, scale


def _pack(state: dict[str, Tensor], int8: bool) -> dict[str, Tensor]:
    """Named float32 tensors -> what the shipped file holds."""
    packed = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        large = value.is_floating_point() and value.dim() >= 2 and value.numel() >= SMALL
        if large and int8:
            packed[name], packed[name + SCALE] = quantise_rows(value)
        else:
            packed[name] = value.to(torch.bfloat16) if large else value.clone()
    return packed


def _unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in packed:
            value = value.float() * packed[name + SCALE].float()
        state[name] = value.float() if value.is_floating_point() else value
    return state


def _half(value: Tensor) -> Tensor:
    """float16 where the range allows it (a value that came from float16 survives unchanged), else as it is."""
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point() or (value.numel() and not value.abs().amax() < 65504):
        return value.clone()
    return value.to(torch.float16)


CODEC_DECODER = ("semantic_out.", "acoustic_out.", "frame_decoder.", "split.", "slot_decoder.", "refine.", "hop_decoder.", "head.")


def _fingerprint(config: dict, tensors: dict[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over the config and the stored tensors that decide which codes a sound gets.

    The decoder is left out: a better one may be trained later without making tokens and models worthless.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(n for n in tensors if not n.startswith(CODEC_DECODER)):
        value = tensors[name].contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------- folders

def _write_folder(folder, tensors: dict[str, Tensor], about: dict) -> None:
    folder = Path(folder)
    data = tensor_bytes(tensors)
    atomic_write(folder / WEIGHTS, data)
    write_json(folder / "config.json", {"format": FORMAT} | about | {"sha256": hashlib.sha256(data).hexdigest()})


def _read_folder(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Stored tensors and config.json of a shipped folder. ValueError for anything that is not one."""
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: it is not a folder of {kind} weights; check the path")
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        data = (folder / WEIGHTS).read_bytes()
        tensors = load_tensors(data)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is corrupt ({error}): copy it again") from None
    _check_kind(folder, about, kind)
    if about.get("sha256") not in (None, hashlib.sha256(data).hexdigest()):
        raise ValueError(f"{folder / WEIGHTS} is corrupt (its SHA-256 is not the one in config.json): copy it again")
    return tensors, about


def _check_kind(path, about, kind: str) -> None:
    if not isinstance(about, dict) or "format" not in about or "kind" not in about:
        raise ValueError(f"{path} was not written by this project: use a file of train.py or a folder of pretrained/")
    if about["format"] != FORMAT:
        raise ValueError(f"{path} has format version {about['format']}, this code reads version {FORMAT}: use the code it was written with, or train again")
    if about["kind"] != kind:
        raise ValueError(f"{path} holds weights of kind {about['kind']!r} where {kind!r} is needed: check --checkpoint and --codec")


def _load_state(module: nn.Module, state: dict[str, Tensor], where) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"{where} does not fit the model of its own config ({lines[min(1, len(lines) - 1)].strip()[:200]}): "
                         "it was written by another version of the code; train again or use the shipped weights") from None


# ----------------------------------------------------------------------------- the codec

def save_codec(codec: nn.Module, folder, **about) -> str:
    """Write the codec as float16 safetensors + config.json; sets and returns codec.fingerprint.

    about: plain data for config.json, such as the steps trained.
    """
    config = to_dict(codec.cfg)
    tensors = {name: _half(value) for name, value in codec.state_dict().items()}
    codec.fingerprint = _fingerprint(config, tensors)
    _write_folder(folder, tensors, {"kind": "codec", "config": config, "fingerprint": codec.fingerprint} | about)
    return codec.fingerprint


def load_codec(path="pretrained/codec", device="cpu") -> nn.Module:
    """rvq_tokenizer.Codec in eval mode, from a folder of save_codec. ValueError for anything else."""
    from rvq_tokenizer import Codec
    path = find(path)
    if not path.exists():
        raise ValueError(f"there is no codec at {path}: use --codec pretrained/codec, or train one with train_codec.py")
    tensors, about = _read_folder(path, "codec") if path.is_dir() else _codec_of_training_file(path)
    codec = Codec(from_dict(CodecConfig, about["config"]))
    _load_state(codec, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, path)
    codec.fingerprint = _fingerprint(about["config"], tensors)
    if about.get("fingerprint") not in (None, codec.fingerprint):
        raise ValueError(f"{path} is corrupt: its tensors have fingerprint {codec.fingerprint}, its config says {about['fingerprint']}; copy it again")
    return codec.eval().to(device)


def _codec_of_training_file(path: Path) -> tuple[dict, dict]:
    saved = load_training(path, "codec")
    return {name: _half(value) for name, value in saved["model"].items()}, {"config": saved["config"]}


# ----------------------------------------------------------------------------- training files

def save_training(path, *, kind: str = "csm", config: dict, model: dict, **rest) -> Path:
    """Write one training file atomically.

    config: to_dict of the model's config; model: its state_dict; rest (tensors and plain data): ema, optimizer,
    step, rng, loader, train_config, codec_fingerprint and whatever else the resume needs.
    """
    saved = {"format": FORMAT, "kind": kind, "config": config, "model": model} | rest
    return atomic_write(path, lambda file: torch.save(saved, file))


def load_training(path, kind: str = "csm", codec_fingerprint: str | None = None, mmap: bool = False) -> dict:
    """Read a training file to the CPU. ValueError for a missing, corrupt, foreign or too new one.

    codec_fingerprint: when given, a file trained on another codec's tokens is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: check the path, or train first (python train.py)")
    try:
        if not mmap and zipfile.ZipFile(path).testzip():          # torch itself does not look at the check sums
            raise EOFError
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:       # zip, pickle and torch each raise their own kinds for a damaged file
        why = "holds more than tensors and plain data" if isinstance(error, pickle.UnpicklingError) else "is damaged or cut short"
        raise ValueError(f"{path} {why}: it is no checkpoint of this project; use another --checkpoint/--resume or train again") from None
    _check_kind(path, saved, kind)
    check_codec(path, saved.get("codec_fingerprint"), codec_fingerprint)
    return saved


def check_codec(what, trained: str | None, now: str | None) -> None:
    """ValueError when both fingerprints are known and differ: their codes mean different sounds."""
    if trained and now and trained != now:
        raise ValueError(f"{what} belongs to the codec with fingerprint {trained}, but this codec is {now}: "
                         "use the --codec it was made with, or tokenise again (python dataset_pipeline.py) and train again")


def link_file(source, target) -> None:
    """Make `target` the same file as `source`, atomically; a copy where the file system has no links."""
    source, target = Path(source), Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        with open(source, "rb") as file:
            atomic_write(target, lambda out: _copy(file, out))


def _copy(source, target) -> None:
    while block := source.read(1 << 22):
        target.write(block)


# ----------------------------------------------------------------------------- the model

def save_pretrained(model: nn.Module, folder, int8: bool = True, codec_fingerprint: str | None = None, **about) -> None:
    """Write a CSM as model.safetensors + config.json; matrices as int8 rows with float16 scales, or bfloat16.

    about: plain data for config.json (steps, hours, losses).
    """
    fingerprint = codec_fingerprint or getattr(model, "codec_fingerprint", None)
    storage = "int8 rows, float16 scales" if int8 else "bfloat16"
    _write_folder(folder, _pack(model.state_dict(), int8),
                  {"kind": "csm", "config": to_dict(model.cfg), "codec_fingerprint": fingerprint, "storage": storage} | about)


def load_model(path, device="cpu", codec_fingerprint: str | None = None) -> nn.Module:
    """architecture.CSM in eval mode and float32, from a shipped folder or a training file (averaged weights where it has them).

    Sets model.codec_fingerprint. ValueError for anything unreadable, or trained on another codec than codec_fingerprint.
    """
    from architecture import CSM
    path = find(path)
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}: use --checkpoint pretrained/nano, or train first (python train.py)")
    if path.is_dir():
        tensors, about = _read_folder(path, "csm")
        state = _unpack(tensors)
    else:
        about = load_training(path, "csm", mmap=path.stat().st_size > 2 ** 30)
        state = about["model"] | (about.get("ema") or {})
    check_codec(path, about.get("codec_fingerprint"), codec_fingerprint)
    model = CSM(from_dict(ModelConfig, about["config"]))
    _load_state(model, state, path)
    model.codec_fingerprint = about.get("codec_fingerprint")
    return model.eval().to(device)


def default_checkpoint() -> Path:
    """checkpoints/best_model.pt where train.py wrote one, else the shipped pretrained/nano. ValueError when neither is there."""
    for name in ("checkpoints/best_model.pt", "pretrained/nano"):
        if find(name).exists():
            return find(name)
    raise ValueError("there are no weights yet: train first (python train.py), or name some with --checkpoint")


@plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    model = load_model(args.checkpoint)
    path = find(args.checkpoint)
    saved = {} if path.is_dir() else load_training(path, mmap=True)
    save_pretrained(model, args.output, int8=args.storage == "int8", **{k: saved[k] for k in ("step", "minutes", "validation") if k in saved})
    print(f"{args.output}: {(Path(args.output) / WEIGHTS).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
