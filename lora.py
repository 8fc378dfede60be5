"""Low-rank adapters: a voice in a few megabytes beside a model that stays as it was.

    python lora.py --adapter checkpoints/adapter --output pretrained/mine      # base and adapter as one model

`train.py --lora` trains them, `demo.py --adapter` uses them. Each adapted weight W is read as W + scale * up @ down
(Hu et al., arXiv:2106.09685) through torch.nn.utils.parametrize. Not through `peft`: its layers add the adapter in
forward(), but our blocks multiply by several `.weight`s at once (layers.fused_linear), generation folds them
(layers.FoldedStack), and the depth decoder's heads are one bare tensor; such an adapter would silently not be heard.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from pathlib import Path

from config import Parser, to_dict
from runtime import atomic_write, plain_errors, write_json

WEIGHTS, ABOUT, FORMAT = "adapter.safetensors", "adapter.json", 1
# the voice: both transformers, what joins them, the heads that choose codes and the end of a turn, and the pace
TARGETS = ("backbone.", "decoder.", "projection", "codebook0_head", "audio_head", "advance_head")


def build_parser() -> Parser:
    parser = Parser(description="Merge an adapter into the model it was trained on.")
    parser.add_argument("--adapter", default="checkpoints/adapter", help="folder written by train.py --lora (default checkpoints/adapter)")
    parser.add_argument("--checkpoint", default="", help="the model below it (default: the one it was trained on)")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--storage", default="bf16", choices=("int8", "bf16"), help="how matrices are stored (default bf16)")
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import torch                     # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load as load_tensors, save as tensor_bytes  # noqa: E402
from torch import Tensor, nn     # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

from checkpoint import check_codec, find, load_model, save_pretrained  # noqa: E402


class LowRank(nn.Module):
    """weight (..., rows, columns) -> weight + scale * up (..., rows, rank) @ down (..., rank, columns); begins as no change."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator | None = None):
        super().__init__()
        *batch, rows, columns = weight.shape
        self.scale = scale
        down = torch.randn(*batch, rank, columns, generator=generator) / math.sqrt(columns)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(*batch, rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


# ----------------------------------------------------------------------------- on and off

def _targets(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of every weight that is adapted."""
    found = [(name, module, "weight") for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(TARGETS)]
    return found + [("audio_head", model, "audio_head")]


def attach(model: nn.Module, rank: int, alpha: float, seed: int = 0) -> None:
    """Give every target its adapter and freeze all else, in place. ValueError for a rank that is no saving."""
    smallest = min(min(getattr(module, name).shape[-2:]) for path, module, name in _targets(model) if path != "advance_head")
    if not 0 < rank <= smallest:
        raise ValueError(f"lora_rank {rank} must be 1..{smallest} for this model: change --lora_rank")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, module, name in _targets(model):
        parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank, alpha / rank, generator))


def adapters(model: nn.Module) -> dict[str, LowRank]:
    """Name of the adapted weight -> its adapter; {} for a model without."""
    suffix = {"weight": ".parametrizations.weight.0", "audio_head": "parametrizations.audio_head.0"}
    return {name.removesuffix(suffix["weight"]) if name != suffix["audio_head"] else "audio_head": module
            for name, module in model.named_modules() if isinstance(module, LowRank)}


def merge(model: nn.Module) -> nn.Module:
    """Add the adapters to the weights for good, in place; the model is then one without adapters."""
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model.requires_grad_(True)


@contextlib.contextmanager
def settled(model: nn.Module):
    """Inside, adapted weights are worked out once rather than at each use, for generation. Nothing to do for a model without adapters."""
    with torch.no_grad(), parametrize.cached():
        for _, module, name in _targets(model):
            getattr(module, name)                            # not first in inference mode: such tensors do not tell when they change
        yield


def _digest(model: nn.Module) -> str:
    """Tells the base model from others: 16 hex digits over two of its matrices, without adapters."""
    digest = hashlib.sha256()
    for module in (model.projection, model.codebook0_head):
        weight = module.parametrizations.weight.original if parametrize.is_parametrized(module) else module.weight
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------- files

def save(model: nn.Module, folder, base: str, codec_fingerprint: str | None, **about) -> int:
    """Write the adapters of `model` as float16 safetensors + JSON; bytes of the tensors. base: where its weights came from."""
    tensors = {f"{name}.{part}": getattr(adapter, part).detach().half().cpu().contiguous()
               for name, adapter in adapters(model).items() for part in ("up", "down")}
    first = next(iter(adapters(model).values()))
    data = tensor_bytes(tensors)
    atomic_write(Path(folder) / WEIGHTS, data)
    write_json(Path(folder) / ABOUT, {"format": FORMAT, "kind": "adapter", "base": base, "base_digest": _digest(model), "codec_fingerprint": codec_fingerprint,
                                      "rank": first.up.shape[-1], "alpha": first.scale * first.up.shape[-1], "config": to_dict(model.cfg),
                                      "sha256": hashlib.sha256(data).hexdigest()} | about)
    return len(data)


def read(folder) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a folder of `save`. ValueError for anything else."""
    folder = find(folder)
    try:
        data, about = (folder / WEIGHTS).read_bytes(), json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about.get("format") != FORMAT or about.get("kind") != "adapter" or about["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("not of this format, or changed since it was written")
        return load_tensors(data), about
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder} is no adapter ({error}): use --adapter with a folder that train.py --lora wrote") from None


def load(model: nn.Module, folder) -> nn.Module:
    """Merge the adapter in `folder` into `model`, in place. ValueError where it was trained on another model or codec."""
    tensors, about = read(folder)
    check_codec(folder, about["codec_fingerprint"], getattr(model, "codec_fingerprint", None))
    if about["base_digest"] != _digest(model):
        raise ValueError(f"{folder} was trained on other weights ({about['base']}): use --checkpoint {about['base']}")
    attach(model, about["rank"], about["alpha"])
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            adapter.up.copy_(tensors[f"{name}.up"])
            adapter.down.copy_(tensors[f"{name}.down"])
    return merge(model).eval()


@plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    base = args.checkpoint or read(args.adapter)[1]["base"]
    model = load(load_model(base), args.adapter)
    save_pretrained(model, args.output, int8=args.storage == "int8", adapter=str(args.adapter), base=str(base))
    print(f"{args.output}: {base} with {args.adapter} merged in")
    return 0


if __name__ == "__main__":
    sys.exit(main())
