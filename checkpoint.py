"""Every way weights cross the disk: training files, shipped folders, the codec.

Two shapes on disk. A *training file* (checkpoints/last.pt, best_model.pt) is one torch.save of tensors
and plain data, read with weights_only=True; everything an exact resume needs is in it. A *shipped
folder* (pretrained/nano, pretrained/codec) is model.safetensors + config.json, small enough for git.

    python checkpoint.py --checkpoint checkpoints/best_model.pt --output pretrained/nano
    python checkpoint.py import_csm PATH --output DIR         # Sesame's CSM-1B: a folder, a file, or its name at the hub
    python checkpoint.py export_csm DIR --format transformers --output DIR2
"""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

from config import PRECISIONS, CodecConfig, CrossAttentionConfig, MemoryConfig, ModelConfig, Parser, from_dict, to_dict
from runtime import ROOT, atomic_write, plain_errors, write_json


def build_parser() -> Parser:
    parser = Parser(description="Write the weights of a training file as a small folder (model.safetensors + config.json), or bring official CSM weights in or out.")
    parser.add_argument("--checkpoint", default="checkpoints/best_model.pt", help="training file of train.py")
    parser.add_argument("--output", help="folder to write, such as pretrained/nano")
    parser.add_argument("--storage", default="int8", choices=("int8", "bf16"), help="how matrices are stored (default int8 rows with fp16 scales)")
    parser.add_argument("--quantise", default="fp32", choices=PRECISIONS, help="what the weights are to compute in where they are loaded by demo.py: written into config.json (default fp32)")
    commands = parser.add_subparsers(dest="command", metavar="import_csm | export_csm")
    bring = commands.add_parser("import_csm", help="official CSM weights of either format -> a folder of this project")
    bring.add_argument("path", help="folder in the original or the transformers format, an original file, or a name at the hub (sesame/csm-1b)")
    bring.add_argument("--output", required=True, help="folder to write")
    bring.add_argument("--storage", default="exact", choices=("exact", "bf16", "int8"), help="exact (default) keeps every bit, so that an export gives them back")
    bring.add_argument("--additions", action="store_true", help="with our cross-attention, memory and text head, untrained and shut: to train from")
    give = commands.add_parser("export_csm", help="a CSM without our additions -> the original or the transformers format")
    give.add_argument("path", help="folder of this project, training file, or official weights in the other format")
    give.add_argument("--output", required=True, help="folder to write")
    give.add_argument("--format", required=True, choices=("transformers", "original"), help="whose names and layout to write")
    give.add_argument("--shard_gb", type=float, default=5.0, help="largest file of the transformers format, in GB (default 5)")
    return parser


def parse(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.output:
        parser.error("the following arguments are required: --output")
    return args


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    parse()

import torch                     # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load as load_tensors, load_file  # noqa: E402
from torch import Tensor, nn     # noqa: E402

import csm_weights               # noqa: E402
import parallel                  # noqa: E402

FORMAT = 1
WEIGHTS = "model.safetensors"
MIMI = "mimi.safetensors"        # the codec that came with official weights: carried for an export, not used
LARGE = 2 ** 30                  # bytes; weights beyond this are mapped from the disk rather than read
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


# its large stacks (what is left of the decoder speaks in logarithms), and the acoustic codebooks
CODEC_INT8 = ("frame_decoder.", "slot_decoder.", "hop_decoder.", "acoustic.codebooks")
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
    path = csm_weights.write_tensors(Path(folder) / WEIGHTS, tensors)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_json(Path(folder) / "config.json", {"format": FORMAT} | about | {"sha256": digest})


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a safetensors file and its SHA-256."""
    if path.stat().st_size > LARGE:
        with open(path, "rb") as file:
            return load_file(path), hashlib.file_digest(file, "sha256").hexdigest()
    data = path.read_bytes()
    return load_tensors(data), hashlib.sha256(data).hexdigest()


def _read_folder(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Stored tensors and config.json of a shipped folder. ValueError for anything that is not one."""
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: it is not a folder of {kind} weights; check the path")
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors, digest = _read_weights(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is corrupt ({error}): copy it again") from None
    _check_kind(folder, about, kind)
    if about.get("sha256") not in (None, digest):
        raise ValueError(f"{folder / WEIGHTS} is corrupt (its SHA-256 is not the one in config.json): copy it again")
    return tensors, about


def _check_kind(path, about, kind: str) -> None:
    if not isinstance(about, dict) or "format" not in about or "kind" not in about:
        raise ValueError(f"{path} was not written by this project: use a file of train.py or a folder of pretrained/")
    if about["format"] != FORMAT:
        raise ValueError(f"{path} has format version {about['format']}, this code reads version {FORMAT}: use the code it was written with, or train again")
    if about["kind"] != kind:
        raise ValueError(f"{path} holds weights of kind {about['kind']!r} where {kind!r} is needed: check --checkpoint and --codec")


def _load_state(module: nn.Module, state: dict[str, Tensor], where, assign: bool = False) -> None:
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"{where} does not fit the model of its own config ({lines[min(1, len(lines) - 1)].strip()[:200]}): "
                         "it was written by another version of the code; train again or use the shipped weights") from None


@torch.no_grad()
def carry_over(model: nn.Module, source: nn.Module) -> tuple[int, int]:
    """Copy into `model` what fits of `source`, a CSM of another codec or size; returns numbers copied, numbers in all.

    Tensors of the same name and size, and of tables by codebook those of the semantic codebooks that both read: a
    codec that was trained on keeps the meaning of these (not of its acoustic ones).
    """
    both = min(model.cfg.num_semantic, source.cfg.num_semantic)
    theirs, copied = source.state_dict(), 0
    tables = {"audio_embeddings.weight": both, "audio_head": both - 1}
    for name, value in model.state_dict().items():
        other = theirs.get(name)
        if name in tables and other is not None:
            pairs = ((c.cfg.num_codebooks - (name == "audio_head"), t) for c, t in ((model, value), (source, other)))
            ours, other = (t.view(count, -1, t.shape[-1])[:tables[name]] for count, t in pairs)
            if ours.shape == other.shape:
                ours.copy_(other)
                copied += ours.numel()
        elif other is not None and other.shape == value.shape:
            value.copy_(other)
            copied += value.numel()
    return copied, sum(v.numel() for v in model.state_dict().values())


# ----------------------------------------------------------------------------- the codec

def _stored_codec(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A codec's state -> the tensors of its file. What is read from the file and stored again gives the same bytes."""
    rows = {name: value for name, value in state.items() if name.startswith(CODEC_INT8)}
    tensors = {name: _half(value) for name, value in state.items() if name not in rows}
    return tensors | {name: value if value.dtype == torch.int8 else _half(value) for name, value in _pack(rows, int8=True).items()}


def codec_fingerprint(codec: nn.Module) -> str:
    """What the codec's fingerprint will be when it is saved."""
    return _fingerprint(to_dict(codec.cfg), _stored_codec(codec.state_dict()))


def save_codec(codec: nn.Module, folder, **about) -> str:
    """Write the codec as safetensors + config.json; sets and returns codec.fingerprint.

    The encoder is float16; the matrices of the decoder's stacks and the acoustic codebooks are int8 rows, by which sounds get their codes from then on.
    about: plain data for config.json, such as the steps trained.
    """
    config, tensors = to_dict(codec.cfg), _stored_codec(codec.state_dict())
    codec.fingerprint = _fingerprint(config, tensors)
    storage = "float16; the decoder's stacks and the acoustic codebooks int8 rows with float16 scales"
    _write_folder(folder, tensors, {"kind": "codec", "config": config, "fingerprint": codec.fingerprint, "storage": storage} | about)
    return codec.fingerprint


def codec_tensors(folder) -> dict[str, Tensor]:
    """The float32 tensors of a folder of save_codec, whatever the codec's size. ValueError for anything else."""
    return _unpack(_read_folder(Path(folder), "codec")[0])


def load_codec(path="pretrained/codec", device="cpu") -> nn.Module:
    """rvq_tokenizer.Codec in eval mode, from a folder of save_codec; "mimi" or "mimi:FOLDER" is Kyutai's. ValueError for anything else."""
    if str(path).split(":")[0] == "mimi":
        from mimi_codec import load_mimi
        return load_mimi(path, device)
    from rvq_tokenizer import Codec
    path = find(path)
    if not path.exists():
        raise ValueError(f"there is no codec at {path}: use --codec pretrained/codec, or train one with train_codec.py")
    tensors, about = _read_folder(path, "codec") if path.is_dir() else _codec_of_training_file(path)
    codec = Codec(from_dict(CodecConfig, about["config"]))
    _load_state(codec, _unpack(tensors), path)
    codec.fingerprint = _fingerprint(about["config"], tensors)
    if about.get("fingerprint") not in (None, codec.fingerprint):
        raise ValueError(f"{path} is corrupt: its tensors have fingerprint {codec.fingerprint}, its config says {about['fingerprint']}; copy it again")
    return codec.eval().to(device)


def _codec_of_training_file(path: Path) -> tuple[dict, dict]:
    saved = load_training(path, "codec")
    return _stored_codec(saved["model"]), {"config": saved["config"]}


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
    """ValueError when both fingerprints are known and differ: their codes mean different sounds. "mimi" stands for any "mimi-...":
    official weights name no checksum of their codec."""
    kinds = {trained, now}
    if trained and now and len(kinds) > 1 and not (csm_weights.MIMI in kinds and all(kind.startswith(csm_weights.MIMI) for kind in kinds)):
        raise ValueError(f"{what} belongs to the codec with fingerprint {trained}, but this codec is {now}: "
                         "use the --codec it was made with, or tokenise again (python dataset_pipeline.py) and train again")


def link_file(source, target) -> None:
    """Make `target` the same file as `source`, atomically; a copy where the file system has no links."""
    source, target = Path(source), Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)       # renaming does nothing where both names are the same file already
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
    """architecture.CSM in eval mode and float32, from a shipped folder, a training file (averaged weights where it has them),
    official CSM weights of either format, or their name at the hub (sesame/csm-1b).

    Sets model.codec_fingerprint and model.wanted_precision (what quantisation.quantise is to be asked for). ValueError for anything unreadable, or trained on another codec than codec_fingerprint.
    """
    path = find_weights(path)
    if csm_weights.is_official(path):
        official, about = csm_weights.read(path), {"codec_fingerprint": csm_weights.MIMI}
        cfg, state = official.cfg, {name: value.float() for name, value in official.tensors.items()}
    else:
        state, about = _read_model(path)
        cfg = from_dict(ModelConfig, about["config"])
    check_codec(path, about.get("codec_fingerprint"), codec_fingerprint)
    model = _build(cfg, state, path)
    model.codec_fingerprint, model.wanted_precision = about.get("codec_fingerprint"), about.get("precision", "fp32")
    return model.eval().to(device)


def find_weights(path) -> Path:
    """`path` on this disk, or fetched where it is a name at the hub. ValueError where it is neither."""
    found = find(path)
    if not found.exists() and csm_weights.is_hub_name(path) and not find(Path(path).parent).exists():
        return csm_weights.fetch(str(path))
    if not found.exists():
        raise ValueError(f"there is no checkpoint {found}: use --checkpoint pretrained/nano, or train first (python train.py)")
    return found


def _read_model(path: Path) -> tuple[dict[str, Tensor], dict]:
    """float32 tensors and config of one of our folders or training files."""
    if (path / parallel.RUN).is_file():
        return parallel.read_shards(path), load_training(path / parallel.RUN, "csm-shards")
    if path.is_dir():
        tensors, about = _read_folder(path, "csm")
        return _unpack(tensors), about
    about = load_training(path, "csm", mmap=path.stat().st_size > LARGE)
    return about["model"] | (about.get("ema") or {}), about


def about_model(path) -> dict:
    """What a model's folder or training file says of it besides weights and config: steps, losses, storage; {} for official weights."""
    path = find_weights(path)
    about = {} if csm_weights.is_official(path) else _read_model(path)[1]
    return {k: v for k, v in about.items() if k not in ("model", "ema", "optimizer", "rng", "loader", "config")}


def _build(cfg: ModelConfig, state: dict[str, Tensor], where) -> nn.Module:
    from architecture import CSM
    large = sum(value.nbytes for value in state.values()) > LARGE              # then the tensors themselves become the parameters
    with torch.device("meta" if large else "cpu"):
        model = CSM(cfg)
    _load_state(model, state, where, assign=large)
    return model


# ----------------------------------------------------------------------------- official CSM weights

def import_csm(path, folder, storage: str = "exact", additions: bool = False) -> csm_weights.Official:
    """Official weights of either format -> our folder. Mimi and the tokenizer, where they came along, lie beside them.

    storage "exact" keeps every bit; "bf16" and "int8" are those of save_pretrained. additions: see with_additions.
    ValueError for a missing or surplus tensor.
    """
    path = find_weights(path)
    official = csm_weights.read(path)
    if additions:
        larger = with_additions(_build(official.cfg, {n: v.float() for n, v in official.tensors.items()}, path))
        official = dataclasses.replace(official, cfg=larger.cfg, tensors=larger.state_dict() | official.tensors)
    tensors = official.tensors if storage == "exact" else _pack(official.tensors, storage == "int8")
    if official.codec:
        csm_weights.write_tensors(Path(folder) / MIMI, official.codec)
    _write_folder(folder, tensors, {"kind": "csm", "config": to_dict(official.cfg), "codec_fingerprint": csm_weights.MIMI, "storage": storage,
                                    "official": {"layout": official.layout, "config": official.config, "generation": official.generation}})
    csm_weights.copy_beside(path, folder)
    return official


def with_additions(model: nn.Module, seed: int = 1234, **switches) -> nn.Module:
    """A CSM's weights in a model that has our additions, whose gates are shut: the same logits, to the bit, until they are trained.

    switches: cross, memory, text_head of ModelConfig; all on where they are left out. Texts keep the whole window they had in CSM.
    """
    cross = CrossAttentionConfig(text_window=model.cfg.backbone.max_positions)
    cfg = dataclasses.replace(copy.deepcopy(model.cfg), **({"cross": cross, "memory": MemoryConfig(), "text_head": True} | switches))
    from architecture import CSM
    larger = CSM(cfg)
    larger.init_weights(torch.Generator().manual_seed(seed))
    missing, surplus = larger.load_state_dict(model.state_dict(), strict=False)
    if surplus or set(missing) & csm_weights.shapes(cfg).keys():
        raise ValueError(f"the model has {(surplus or missing)[0]}, which a CSM with these additions has not: start from a model without additions")
    larger.codec_fingerprint = getattr(model, "codec_fingerprint", None)
    return larger.eval()


def export_csm(path, folder, layout: str, shard_bytes: int = 5 * 10 ** 9) -> list[Path]:
    """Weights of a CSM without additions -> the original or the transformers format; the files written.

    ValueError where the model has tensors for which those formats have no place.
    """
    path = find_weights(path)
    official = csm_weights.read(path) if csm_weights.is_official(path) else _as_official(path)
    files = csm_weights.write(official, folder, layout, shard_bytes)
    csm_weights.copy_beside(path, folder)
    return files


def _as_official(path: Path) -> csm_weights.Official:
    tensors, about = _read_folder(path, "csm") if path.is_dir() else ({}, {})
    if about.get("storage") != "exact":
        tensors, about = _read_model(path)
    cfg, kept = from_dict(ModelConfig, about["config"]), about.get("official", {})
    wanted = csm_weights.shapes(cfg)
    ours = sorted(tensors.keys() - wanted.keys())
    if ours:
        raise ValueError(f"{path} holds {ours[0]} and {len(ours) - 1} more tensors for which CSM's formats have no place: "
                         "export a model whose cross.enabled, memory.enabled and text_head are false, as import_csm makes it")
    csm_weights.check_tensors(tensors, wanted, path)
    codec = _read_weights(path / MIMI)[0] if path.is_dir() and (path / MIMI).is_file() else {}
    return csm_weights.Official(cfg, tensors, kept.get("layout", "original"), kept.get("config", {}), kept.get("generation", {}), codec)


def default_checkpoint() -> Path:
    """checkpoints/best_model.pt where train.py wrote one, else the shipped pretrained/nano. ValueError when neither is there."""
    for name in ("checkpoints/best_model.pt", "pretrained/nano"):
        if find(name).exists():
            return find(name)
    raise ValueError("there are no weights yet: train first (python train.py), or name some with --checkpoint")


@plain_errors
def main(argv=None) -> int:
    args = parse(argv)
    if args.command == "import_csm":
        official = import_csm(args.path, args.output, args.storage, args.additions)
        count = sum(value.numel() for value in official.tensors.values())
        print(f"{args.output}: {count:,} parameters in {len(official.tensors)} tensors, from the {official.layout} format")
    elif args.command == "export_csm":
        files = export_csm(args.path, args.output, args.format, int(args.shard_gb * 10 ** 9))
        print(f"{args.output}: {args.format} format, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {len(files)} file{'s' * (len(files) > 1)}")
    else:
        _ship(args)
    return 0


def _ship(args) -> None:
    model = load_model(args.checkpoint)
    path = find_weights(args.checkpoint)
    saved = {} if path.is_dir() or csm_weights.is_official(path) else load_training(path, mmap=True)
    wanted = {} if args.quantise == "fp32" else {"precision": args.quantise}
    save_pretrained(model, args.output, int8=args.storage == "int8", **wanted, **{k: saved[k] for k in ("step", "minutes", "validation") if k in saved})
    print(f"{args.output}: {(Path(args.output) / WEIGHTS).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
