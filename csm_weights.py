"""Sesame's CSM on disk, both ways: files, tensor names, layouts and configs of the two formats that exist.

*original*: torchtune names, RoPE pairs (2i, 2i + 1), one file (model.safetensors or ckpt.pt).
*transformers*: a folder as `save_pretrained` writes it, one file or shards; RoPE halves (i, i + E/2), Mimi's
tensors beside the model's. `architecture.CSM` has the names of the first and the layout of the second, so an
import renames and permutes but computes nothing: every round trip is exact to the bit. Source: CSM_SPEC 3.7.

Tensors are dicts of name -> Tensor. Knows nothing of our own folders (checkpoint.py).
"""
from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig, TransformerConfig, model_preset, to_dict
from layers import rope_frequencies
from runtime import atomic_write, write_json

FORMATS = ("transformers", "original")
MIMI = "mimi"                           # stands for a codec fingerprint: these models know no other codec
CODEC = "codec_model."                  # prefix of Mimi's tensors in the transformers format
STACKS = {"backbone": "backbone_model", "decoder": "depth_decoder.model"}
TIED = ("depth_decoder.model.embed_tokens.weight", "backbone_model.embed_tokens.embed_audio_tokens.weight")    # save_pretrained writes the first
OUTSIDE = {"text_embeddings.weight": "embed_text_tokens.weight", "audio_embeddings.weight": TIED[0],
           "projection.weight": "depth_decoder.model.inputs_embeds_projector.weight", "codebook0_head.weight": "lm_head.weight",
           "audio_head": "depth_decoder.codebooks_head.weight",
           "backbone.norm.scale": "backbone_model.norm.weight", "decoder.norm.scale": "depth_decoder.model.norm.weight"}
INSIDE = {"attn.q_proj.weight": "self_attn.q_proj.weight", "attn.k_proj.weight": "self_attn.k_proj.weight",
          "attn.v_proj.weight": "self_attn.v_proj.weight", "attn.output_proj.weight": "self_attn.o_proj.weight",
          "mlp.w1.weight": "mlp.gate_proj.weight", "mlp.w2.weight": "mlp.down_proj.weight", "mlp.w3.weight": "mlp.up_proj.weight",
          "sa_norm.scale": "input_layernorm.weight", "mlp_norm.scale": "post_attention_layernorm.weight"}
FLAVOURS = {"backbone": "llama-1B", "depth": "llama-100M"}        # what the original calls CSM-1B's two stacks
SAFE_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
               torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
# what lies beside the weights and `transformers`' processor needs; carried along unread
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja")
AUDIO_ID = 128002                       # text id that stands for an audio frame in transformers' input; the next one for the end frame


@dataclass
class Official:
    """What a foreign file or folder held, in our names and layout."""
    cfg: ModelConfig
    tensors: dict[str, Tensor]
    layout: str                                     # one of FORMATS
    config: dict = field(default_factory=dict)      # its config.json, for an export that gives it back
    generation: dict = field(default_factory=dict)  # its generation_config.json
    codec: dict[str, Tensor] = field(default_factory=dict)


# ----------------------------------------------------------------------------- names and layouts

def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every tensor of CSM without additions."""
    D, Dd, K, V = cfg.backbone.width, cfg.depth.width, cfg.num_codebooks, cfg.audio_vocab
    all_shapes = {"text_embeddings.weight": (cfg.text_vocab, D), "audio_embeddings.weight": (K * V, D), "projection.weight": (Dd, D),
                  "codebook0_head.weight": (V, D), "audio_head": (K - 1, Dd, V)}
    for stack, t in (("backbone", cfg.backbone), ("decoder", cfg.depth)):
        kv = t.kv_heads * t.head_dim
        inside = {"attn.q_proj.weight": (t.width, t.width), "attn.k_proj.weight": (kv, t.width), "attn.v_proj.weight": (kv, t.width),
                  "attn.output_proj.weight": (t.width, t.width), "mlp.w1.weight": (t.ffn, t.width), "mlp.w2.weight": (t.width, t.ffn),
                  "mlp.w3.weight": (t.ffn, t.width), "sa_norm.scale": (t.width,), "mlp_norm.scale": (t.width,)}
        all_shapes |= {f"{stack}.layers.{i}.{name}": shape for i in range(t.layers) for name, shape in inside.items()}
        all_shapes[f"{stack}.norm.scale"] = (t.width,)
    return all_shapes


def transformers_name(name: str) -> str:
    """Our name of a tensor -> theirs."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    stack, _, layer, inside = name.split(".", 3)
    return f"{STACKS[stack]}.layers.{layer}.{INSIDE[inside]}"


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection (H * E, D): RoPE pairs (2i, 2i + 1) of each head -> (i, i + E/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of halves_from_pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _turned(tensors: dict[str, Tensor], cfg: ModelConfig, turn) -> dict[str, Tensor]:
    """`turn(weight, heads)` applied to every q and k projection."""
    def heads(name: str) -> int:
        t = cfg.backbone if name.startswith("backbone.") else cfg.depth
        return t.heads if ".q_proj." in name else t.kv_heads
    return {n: turn(w, heads(n)) if re.search(r"\.[qk]_proj\.", n) else w for n, w in tensors.items()}


def check_tensors(tensors: dict[str, Tensor], wanted: dict[str, tuple], where) -> None:
    """ValueError that names the first missing, surplus or misshapen tensor."""
    for problem, names in (("lacks", wanted.keys() - tensors.keys()), ("holds, beyond CSM,", tensors.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{where} {problem} the tensor {min(names)}{more}: give the whole official weights, of a geometry that fits their config.json")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{where} has {name} of shape {tuple(tensors[name].shape)} where its config means {shape}: weights and config.json do not belong together")


def from_original(tensors: dict[str, Tensor], cfg: ModelConfig, where="the file") -> dict[str, Tensor]:
    check_tensors(tensors, shapes(cfg), where)
    return _turned(tensors, cfg, halves_from_pairs)


def to_original(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    return _turned(tensors, cfg, pairs_from_halves)


def from_transformers(tensors: dict[str, Tensor], cfg: ModelConfig, where="the folder") -> dict[str, Tensor]:
    """Without Mimi's tensors. The tied audio table may be there under one name or both; ValueError where the two differ."""
    tensors, (first, second) = dict(tensors), TIED
    if first in tensors and second in tensors and not torch.equal(tensors[first], tensors[second]):
        raise ValueError(f"{where} has {first} and {second} that differ: CSM ties them (tie_codebooks_embeddings)")
    if second in tensors:
        table = tensors.pop(second)
        tensors.setdefault(first, table)
    named = {transformers_name(name): (name, shape) for name, shape in shapes(cfg).items()}
    check_tensors(tensors, {theirs: shape for theirs, (_, shape) in named.items()}, where)
    return {name: tensors[theirs] for theirs, (name, _) in named.items()}


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {transformers_name(name): value for name, value in tensors.items()}


# ----------------------------------------------------------------------------- configs

def _same_stack(a: TransformerConfig, b: TransformerConfig) -> bool:
    """Equal but for the window and for how the same RoPE frequencies are written down."""
    plain = ("layers", "width", "ffn", "heads", "kv_heads", "norm_eps")
    return all(getattr(a, n) == getattr(b, n) for n in plain) and torch.equal(rope_frequencies(a.head_dim, a), rope_frequencies(b.head_dim, b))


def _usual(stack: TransformerConfig, which: str) -> TransformerConfig:
    """CSM-1B's own way to write a stack of its geometry."""
    known = getattr(model_preset("csm-1b"), which)
    return dataclasses.replace(known, max_positions=stack.max_positions) if _same_stack(stack, known) else stack


def _finished(cfg: ModelConfig) -> ModelConfig:
    cfg.backbone, cfg.depth = _usual(cfg.backbone, "backbone"), _usual(cfg.depth, "depth")
    cfg.name = "csm-1b"
    if cfg != model_preset("csm-1b"):
        cfg.name = "csm"
    return cfg


def _stack_from_transformers(data: dict, usual: TransformerConfig, where: str) -> TransformerConfig:
    """A field that is missing has the value of CSM-1B, as in `transformers`; missing RoPE means RoPE without scaling."""
    heads, width = data.get("num_attention_heads", usual.heads), data.get("hidden_size", usual.width)
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("head_dim", width // heads)):
        if data.get(key, wanted) not in (wanted, None):
            raise ValueError(f"{where} has {key} {data[key]!r}, CSM has {wanted!r}: these are no weights of a CSM")
    rope = {"rope_theta": data.get("rope_theta", 500000.0)} | (data.get("rope_scaling") or {}) | (data.get("rope_parameters") or {})
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where} has rope_type {kind!r}, CSM has 'llama3' or 'default': these are no weights of a CSM")
    scaling = {}
    if kind == "llama3":
        theirs = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [key for key in theirs if key not in rope]
        if missing:
            raise ValueError(f"{where} has llama3 RoPE without {missing[0]}: complete its rope_parameters")
        scaling = dict(zip(("rope_scale_factor", "rope_low_freq", "rope_high_freq", "rope_old_context"), (rope[key] for key in theirs)))
    return TransformerConfig(data.get("num_hidden_layers", usual.layers), width, data.get("intermediate_size", usual.ffn), heads,
                             data.get("num_key_value_heads") or heads, data.get("max_position_embeddings", usual.max_positions),
                             rope_base=rope["rope_theta"], norm_eps=data.get("rms_norm_eps", usual.norm_eps), **({"rope_scale_factor": 1.0} | scaling))


def config_from_transformers(data: dict, where="config.json") -> ModelConfig:
    """Their config.json -> ours, additions off. ValueError for what CSM is not."""
    usual, depth = model_preset("csm-1b"), data.get("depth_decoder_config") or {}
    cfg = dataclasses.replace(usual, backbone=_stack_from_transformers(data, usual.backbone, f"{where}"),
                              depth=_stack_from_transformers(depth, usual.depth, f"{where}, depth_decoder_config,"),
                              num_codebooks=data.get("num_codebooks", usual.num_codebooks), audio_vocab=data.get("vocab_size", usual.audio_vocab),
                              text_vocab=data.get("text_vocab_size", usual.text_vocab))
    for key, value in (("num_codebooks", cfg.num_codebooks), ("vocab_size", cfg.audio_vocab), ("backbone_hidden_size", cfg.backbone.width)):
        known = {"num_codebooks": usual.num_codebooks, "vocab_size": usual.audio_vocab, "backbone_hidden_size": usual.backbone.width}[key]
        if depth.get(key, known) != value:
            raise ValueError(f"{where} has {key} {depth.get(key, known)} in depth_decoder_config and {value} outside: they must agree")
    if data.get("codebook_eos_token_id", 0) != 0:
        raise ValueError(f"{where} has codebook_eos_token_id {data['codebook_eos_token_id']}, CSM ends with frames of zeros: these are no weights of a CSM")
    return _finished(cfg)


def _stack_to_transformers(t: TransformerConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": t.rope_base}
    if t.rope_scale_factor != 1:
        # the same frequencies from a context of at most half the window: transformers warns of a longer one
        shift = 2 ** max(0, math.ceil(math.log2(2 * t.rope_old_context / t.max_positions)))
        rope |= {"rope_type": "llama3", "factor": t.rope_scale_factor, "low_freq_factor": t.rope_low_freq / shift,
                 "high_freq_factor": t.rope_high_freq / shift, "original_max_position_embeddings": max(1, t.rope_old_context // shift)}
    return {"num_hidden_layers": t.layers, "hidden_size": t.width, "intermediate_size": t.ffn, "num_attention_heads": t.heads,
            "num_key_value_heads": t.kv_heads, "head_dim": t.head_dim, "max_position_embeddings": t.max_positions, "rms_norm_eps": t.norm_eps,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_parameters": rope}


def config_to_transformers(cfg: ModelConfig, kept: dict | None = None) -> dict:
    """Ours -> their config.json. `kept`: the one that came with the weights, given back where it still means `cfg`."""
    if kept and kept.get("model_type") == "csm" and dataclasses.replace(config_from_transformers(kept), name=cfg.name) == cfg:
        return kept
    K, V = cfg.num_codebooks, cfg.audio_vocab
    audio = AUDIO_ID if cfg.text_vocab > AUDIO_ID + 1 else cfg.text_vocab - 2
    depth = {"model_type": "csm_depth_decoder_model", "num_codebooks": K, "vocab_size": V, "backbone_hidden_size": cfg.backbone.width}
    return {"architectures": ["CsmForConditionalGeneration"], "model_type": "csm", "num_codebooks": K, "vocab_size": V, "text_vocab_size": cfg.text_vocab,
            "audio_token_id": audio, "audio_eos_token_id": audio + 1, "pad_token_id": audio, "bos_token_id": min(cfg.pad_id, cfg.text_vocab - 1),
            "codebook_pad_token_id": V - 1, "codebook_eos_token_id": 0, "tie_codebooks_embeddings": True, "tie_word_embeddings": True,
            **_stack_to_transformers(cfg.backbone), "depth_decoder_config": depth | _stack_to_transformers(cfg.depth),
            "codec_config": {"model_type": "mimi", "num_quantizers": K}}


def config_from_original(data: dict, where="config.json") -> ModelConfig:
    """Their five fields -> ours. An empty dict means CSM-1B. A flavour may also be a dict of config.TransformerConfig (our exports)."""
    usual = model_preset("csm-1b")
    stacks = {}
    for which, key in (("backbone", "backbone_flavor"), ("depth", "decoder_flavor")):
        flavour = data.get(key, FLAVOURS[which])
        if flavour != FLAVOURS[which] and not isinstance(flavour, dict):
            raise ValueError(f"{where} has {key} {flavour!r}: only {FLAVOURS[which]!r} is known")
        stacks[which] = TransformerConfig(**flavour) if isinstance(flavour, dict) else getattr(usual, which)
    return _finished(dataclasses.replace(usual, num_codebooks=data.get("audio_num_codebooks", usual.num_codebooks),
                                         audio_vocab=data.get("audio_vocab_size", usual.audio_vocab), text_vocab=data.get("text_vocab_size", usual.text_vocab), **stacks))


def config_to_original(cfg: ModelConfig) -> dict:
    usual = model_preset("csm-1b")
    flavours = {which: FLAVOURS[which] if getattr(cfg, which) == getattr(usual, which) else to_dict(getattr(cfg, which)) for which in FLAVOURS}
    return {"backbone_flavor": flavours["backbone"], "decoder_flavor": flavours["depth"], "text_vocab_size": cfg.text_vocab,
            "audio_vocab_size": cfg.audio_vocab, "audio_num_codebooks": cfg.num_codebooks}


# ----------------------------------------------------------------------------- reading

def is_official(path) -> bool:
    """Whether `path` looks like weights of one of the two formats rather than like ours."""
    path = Path(path)
    if path.is_file():
        return path.suffix == ".safetensors" or path.name == "ckpt.pt"
    about = _json(path / "config.json")
    return "kind" not in about and (about.get("model_type") == "csm" or "backbone_flavor" in about or (path / "ckpt.pt").is_file())


def read(path) -> Official:
    """Official weights of either format: a folder, or one original file. ValueError for anything missing, surplus or unreadable."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there are no weights at {path}: give a folder or a file of CSM-1B, or its name at the hub (sesame/csm-1b)")
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json")
    if path.is_dir() and "kind" in config:
        raise ValueError(f"{path} is a folder of this project already: load it as it is, or write it elsewhere with export_csm")
    tensors = _read_files(weight_files(path, config) if path.is_dir() else [path])
    if any(name.startswith(("backbone_model.", "depth_decoder.")) for name in tensors):
        codec = {name: value for name, value in tensors.items() if name.startswith(CODEC)}
        own = {name: value for name, value in tensors.items() if name not in codec}
        cfg = config_from_transformers(config, folder / "config.json")
        return Official(cfg, from_transformers(own, cfg, path), "transformers", config, _json(folder / "generation_config.json"), codec)
    cfg = config_from_original(config if "backbone_flavor" in config else {}, folder / "config.json")
    return Official(cfg, from_original(tensors, cfg, path), "original", config)


def weight_files(folder: Path, config: dict) -> list[Path]:
    """The files that hold the weights: shards by their index, else the one file. ValueError where there are none."""
    for name in (config.get("transformers_weights"), "model.safetensors.index.json", "transformers.safetensors.index.json"):
        if name and (folder / name).is_file():
            if not str(name).endswith(".json"):
                return [folder / name]
            files = [folder / shard for shard in sorted(set(_json(folder / name).get("weight_map", {}).values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent or not files:
                raise ValueError(f"{folder} lacks {absent[0] if absent else 'the shards'} that {name} names: copy the folder again")
            return files
    for name in ("model.safetensors", "ckpt.pt"):
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} holds neither model.safetensors, nor shards with their index, nor ckpt.pt: give the folder of CSM-1B's weights")


def _read_files(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is damaged or no weights ({str(error).splitlines()[0][:120]}): copy it again") from None
        part = part.get("model", part) if isinstance(part, dict) else {}
        twice = tensors.keys() & part.keys()
        if twice or not all(isinstance(value, Tensor) for value in part.values()):
            raise ValueError(f"{file} holds {min(twice) + ' a second time' if twice else 'more than tensors'}: copy the folder again")
        tensors |= part
    return tensors


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}): copy it again") from None
    return data if isinstance(data, dict) else {}


# ----------------------------------------------------------------------------- writing

def write(official: Official, folder, layout: str, shard_bytes: int = 5 * 10 ** 9) -> list[Path]:
    """Write `official` as one of FORMATS; the weight files, written one after another. Mimi's tensors go along in the transformers format."""
    folder = Path(folder)
    if layout == "original":
        write_json(folder / "config.json", config_to_original(official.cfg))
        return _write_shards(folder, to_original(official.tensors, official.cfg), 2 ** 63)
    if layout != "transformers":
        raise ValueError(f"unknown format {layout!r}: use --format {'|'.join(FORMATS)}")
    config = {"dtype": str(official.tensors["audio_head"].dtype).removeprefix("torch.")} | config_to_transformers(official.cfg, official.config)
    config.pop("transformers_weights", None)         # the name of files that are not written here
    write_json(folder / "config.json", config)
    if official.generation:
        write_json(folder / "generation_config.json", official.generation)
    return _write_shards(folder, to_transformers(official.tensors) | official.codec, shard_bytes)


def _write_shards(folder: Path, tensors: dict[str, Tensor], most: int) -> list[Path]:
    groups: list[list[str]] = [[]]
    room = most
    for name, value in tensors.items():
        if value.nbytes > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= value.nbytes
    single = len(groups) == 1
    files = [folder / ("model.safetensors" if single else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors") for i in range(len(groups))]
    for file, names in zip(files, groups):
        write_tensors(file, {name: tensors[name] for name in names})
    stale = [f for f in folder.glob("model*.safetensors") if f not in files] + ([folder / "model.safetensors.index.json"] if single else [])
    for file in stale:
        file.unlink(missing_ok=True)
    if not single:
        where = {name: file.name for file, names in zip(files, groups) for name in names}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(v.nbytes for v in tensors.values())}, "weight_map": where})
    return files


def write_tensors(path, tensors: dict[str, Tensor]) -> Path:
    """One safetensors file, atomically and tensor by tensor: no second copy of 6 GB in memory."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))      # every tensor begins at a multiple of its item
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        value = tensors[name]
        header[name] = {"dtype": SAFE_DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def stream(file) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return atomic_write(path, stream)


def copy_beside(source, folder) -> None:
    """The tokenizer and processor files of one folder into another."""
    source, folder = Path(source), Path(folder)
    source = source if source.is_dir() else source.parent
    for name in BESIDE:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            atomic_write(folder / name, (source / name).read_bytes())


# ----------------------------------------------------------------------------- the hub

def is_hub_name(name) -> bool:
    """Whether it reads owner/name; the caller knows whether a folder of that name is on the disk."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))) and not str(name).endswith((".pt", ".safetensors"))


def fetch(name: str) -> Path:
    """Folder with the weights of `owner/name` at the Hugging Face hub, from its cache where they are. ValueError offline or gated."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(f"{name} is not on this disk, and loading by name needs the package huggingface_hub: install it, or give a folder") from None
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.jinja"]))
        index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
        if index is not None:
            hub.snapshot_download(name, allow_patterns=sorted(set(_json(index).get("weight_map", {}).values())))
        else:
            _fetch_one(hub, errors, name)
        return folder
    except errors.GatedRepoError:
        raise ValueError(f"{name} is gated: accept its terms on its page at the hub and log in (hf auth login), or give the path of a folder with the weights") from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        # a file that is in no cache raises the same kind as one that does not exist: offline is the likelier
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise ValueError(_unreachable(name)) from None
        raise ValueError(f"there is no folder {name} here, and no such weights at the hub: check the name, or give the path of a folder") from None
    except Exception as error:           # each version of the hub's client brings its own kinds for a network that fails
        raise ValueError(f"{_unreachable(name)} ({type(error).__name__})") from None


def _fetch_one(hub, errors, name: str) -> None:
    try:
        hub.hf_hub_download(name, "model.safetensors")
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:
        hub.hf_hub_download(name, "ckpt.pt")


def _unreachable(name: str) -> str:
    return f"there is no folder {name} here, and the hub cannot be reached: connect, or give the path of a folder with the weights"
