"""Codes as a model draws them: for every frame of training speech, what the model says there after the true frames before it.

    python draw_codes.py --data data/synthetic --checkpoint pretrained/nano --hours 3
    python train_codec.py --decoder_only --init_from checkpoints/codec/last.pt --drawn data/synthetic/tokens/drawn.safetensors

A codec's decoder learns from true codes; a model's are only likely ones. Here the decoder is shown what it will get, beside
the sound that was meant (as vocoders are finetuned on the spectra of their own acoustic model, Shen et al. 2018). The
first code stays the true one in most turns: a drawn one may be a word's other timing, with which the sound would not agree.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from config import Parser, SamplingConfig
from runtime import atomic_write, plain_errors

TRUE_FIRST = 0.7                 # share of the turns whose first codebook is the true one
POSITIONS = 4096                 # of a batch


def build_parser() -> Parser:
    parser = Parser(description="Write the codes that a model draws for training speech, for train_codec.py --drawn.")
    parser.add_argument("--data", default="data/synthetic", help="folder with tokens (collect_data.py, dataset_pipeline.py)")
    parser.add_argument("--checkpoint", default="", help="the model (default: the newest in checkpoints, else the shipped one)")
    parser.add_argument("--codec", default="pretrained/codec", help="the codec of the tokens")
    parser.add_argument("--hours", type=float, default=3.0, help="speech to draw for (default 3)")
    parser.add_argument("--output", default="", help="default DATA/tokens/drawn.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto|cpu|cuda|mps")
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import torch                     # noqa: E402
from safetensors.torch import save as tensor_bytes  # noqa: E402
from torch import Tensor         # noqa: E402
from tqdm import tqdm            # noqa: E402

from checkpoint import default_checkpoint, load_codec, load_model  # noqa: E402
from dataset_pipeline import ConversationDataset, Stage, collate, pack  # noqa: E402
from generation import draw_codes  # noqa: E402
from runtime import pick_device  # noqa: E402


@torch.inference_mode()
def drawn_batch(model, windows: list, tokenizer, codebook_size: int, sampling: SamplingConfig, generator) -> list[Tensor]:
    """Windows -> per window the last turn's codes as drawn, (K, T) each. Every frame is drawn after the true ones before it."""
    batch, _ = collate(windows, model.cfg, tokenizer)
    device = next(model.parameters()).device
    batch = batch.to(device)
    hidden = model(batch)                                                      # (B, S, D)
    out = []
    for row, window in enumerate(windows):
        voice = batch.mask[row, :, 0] & (batch.turn[row] == len(window.turns) - 1)
        at = voice.nonzero()[:-1, 0]                                           # without the end frame
        true = batch.frames[row, at, :-1]                                      # (T, K)
        first = true[:, 0] if torch.rand((), generator=generator) < TRUE_FIRST else None
        tokens = draw_codes(model, hidden[row, at - 1], codebook_size, sampling, generator, first)
        out.append((tokens - model.cfg.code_offset).T.cpu())
    return out


def draw(args) -> Path:
    """Draw for `hours` of the training split and write the file. ValueError for tokens of another codec."""
    if not args.hours > 0:
        raise ValueError(f"--hours {args.hours}: use more than 0")
    device = pick_device(args.device)
    codec = load_codec(args.codec, device)
    model = load_model(args.checkpoint or default_checkpoint(), device=device, codec_fingerprint=codec.fingerprint)
    data = ConversationDataset(args.data, model.cfg, "train", POSITIONS, args.seed, codec_fingerprint=codec.fingerprint)
    generator = torch.Generator(device).manual_seed(args.seed)
    order = torch.randperm(len(data.targets), generator=torch.Generator().manual_seed(args.seed)).tolist()
    chosen, frames, most = [], 0, args.hours * 3600 * model.cfg.frame_rate
    for i in order:
        if frames >= most:
            break
        window = data._window(data.targets[i], Stage(), None)
        chosen.append(window)
        frames += window.turns[-1].codes.size(1)
    records, codes = [], []
    with tqdm(total=len(chosen), unit="turn", desc="drawing") as bar:
        for windows in pack(chosen, POSITIONS):
            for window, found in zip(windows, drawn_batch(model, windows, data.tokenizer, codec.cfg.codebook_size, SamplingConfig(), generator)):
                records.append({"id": window.turns[-1].id, "frames": found.shape[1]})
                codes.append(found.to(torch.int16))
            bar.update(len(windows))
    header = {"kind": "drawn codes", "codec_fingerprint": codec.fingerprint, "num_semantic": str(min(model.cfg.num_semantic, codec.cfg.num_semantic)), "turns": json.dumps(records)}
    path = Path(args.output or Path(args.data) / "tokens" / "drawn.safetensors")
    atomic_write(path, tensor_bytes({"codes": torch.cat(codes, 1)}, metadata=header))
    print(f"wrote {path}: {len(records)} turns, {frames / model.cfg.frame_rate / 3600:.2f} h")
    return path


@plain_errors
def main(argv=None) -> int:
    draw(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
