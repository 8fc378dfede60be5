"""Kyutai's Mimi behind the codec's interface, through the package transformers: the codec of Sesame's CSM-1B.

    codec = load_mimi()                       # the weights of kyutai/mimi in this machine's cache
    codec = load_mimi("a/folder")             # or a folder that transformers wrote

encode, decode, encode_stream, decode_stream, cfg and fingerprint as in rvq_tokenizer.Codec. transformers streams the
encoder; its decoder keeps no state between calls for the convolutions, so that is kept here. Nothing is downloaded.
Shapes: B batch, N samples, K codebooks, T frames of 80 ms (Mimi's own numbers: 24 kHz, 1920 samples, 32 x 2048).
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "mimi"                    # as --codec; "mimi:FOLDER" names the weights
HUB = "kyutai/mimi"


@dataclass(frozen=True)
class MimiInfo:
    """What the rest of the house asks of a codec's config."""
    sample_rate: int
    frame_size: int
    num_codebooks: int
    num_semantic: int
    codebook_size: int

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.frame_size


class MimiCodec(nn.Module):
    """A transformers MimiModel in eval mode. A stream's state is used up by the call that it is given to."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, c = model.eval(), model.config
        if not c.use_causal_conv or c.trim_right_ratio != 1.0:
            raise ValueError("this Mimi is not causal (use_causal_conv, trim_right_ratio): it cannot be streamed; use the weights of kyutai/mimi")
        self.cfg = MimiInfo(c.sampling_rate, int(c.frame_size), c.num_quantizers, c.num_semantic_quantizers, c.codebook_size)
        self.fingerprint = fingerprint(model)

    # -- encoding ----------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, audio: Tensor, num_codebooks: int | None = None) -> Tensor:
        """audio (B, 1, N) at sample_rate -> codes (B, K, ceil(N / frame_size)); the last frame is filled up with silence."""
        self._check_audio(audio)
        return self.encode_stream(F.pad(audio, (0, -audio.shape[-1] % self.cfg.frame_size)), None, num_codebooks)[0]

    @torch.inference_mode()
    def encode_stream(self, audio: Tensor, state: dict | None = None, num_codebooks: int | None = None) -> tuple[Tensor, dict]:
        """audio (B, 1, n * frame_size) -> codes (B, K, n), state. Whole frames only."""
        self._check_audio(audio)
        K = self.cfg.num_codebooks if num_codebooks is None else num_codebooks
        if audio.shape[-1] % self.cfg.frame_size:
            raise ValueError(f"a stream takes whole frames of {self.cfg.frame_size} samples, got {audio.shape[-1]}: buffer the rest")
        if not self.cfg.num_semantic <= K <= self.cfg.num_codebooks:
            raise ValueError(f"num_codebooks {K} must be {self.cfg.num_semantic}..{self.cfg.num_codebooks}: change --num_codebooks")
        s = state or {"past": None, "convolutions": None}
        audio = torch.nan_to_num(audio.float(), posinf=1.0, neginf=-1.0).clamp(-1, 1)
        out = self.model.encode(audio, num_quantizers=K, encoder_past_key_values=s["past"], padding_cache=s["convolutions"], use_streaming=True, return_dict=True)
        return out.audio_codes, {"past": out.encoder_past_key_values, "convolutions": out.padding_cache}

    # -- decoding ----------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, codes: Tensor, semantic: int | None = None) -> Tensor:
        """codes (B, k, T), k <= num_codebooks -> audio (B, 1, T * frame_size). semantic: must be all of them."""
        return self.decode_stream(codes, None, semantic)[0]

    @torch.inference_mode()
    def decode_stream(self, codes: Tensor, state: dict | None = None, semantic: int | None = None) -> tuple[Tensor, dict]:
        """codes (B, k, t) -> audio (B, 1, t * frame_size), state. Zero frames give zero samples. semantic: must be all of them."""
        self._check_codes(codes)
        if semantic not in (None, self.cfg.num_semantic):
            raise ValueError(f"{semantic} semantic codes a frame, Mimi has {self.cfg.num_semantic}: change num_semantic")
        if codes.shape[2] == 0:
            return torch.zeros(codes.shape[0], 1, 0, device=codes.device), state or {}
        decoder, before, after = self.model.decoder, state or {}, {}
        x = up(decoder.upsample, self.model.quantizer.decode(codes), "upsample", before, after)
        out = decoder.decoder_transformer(x.transpose(1, 2), past_key_values=before.get("past"), use_cache=True)
        after["past"], x = out.past_key_values, out.last_hidden_state.transpose(1, 2)
        for number, layer in enumerate(decoder.decoder_seanet.layers):
            x = step(layer, x, str(number), before, after)
        return x.float().clamp(-1, 1), after

    # -- checks ------------------------------------------------------------------------------

    def _check_audio(self, audio: Tensor) -> None:
        if audio.dim() != 3 or audio.shape[1] != 1:
            raise ValueError(f"audio must be (batch, 1, samples) mono at {self.cfg.sample_rate} Hz, got shape {tuple(audio.shape)}")
        if audio.shape[-1] == 0:
            raise ValueError("audio has no samples")

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dim() != 3 or not self.cfg.num_semantic <= codes.shape[1] <= self.cfg.num_codebooks:
            raise ValueError(f"codes must be (batch, {self.cfg.num_semantic}..{self.cfg.num_codebooks} codebooks, frames), got {tuple(codes.shape)}: change --num_codebooks")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.cfg.codebook_size):
            raise ValueError(f"codes must be 0..{self.cfg.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}: are these codes of another codec?")


# ----------------------------------------------------------------------------- one layer of the decoder, streaming

def step(layer: nn.Module, x: Tensor, name: str, before: dict, after: dict) -> Tensor:
    """One layer of Mimi's SEANet decoder on the newest samples x (B, C, t); its past is read from `before`, written to `after`."""
    kind = type(layer).__name__
    if kind == "MimiConvTranspose1d":
        return up(layer, x, name, before, after)
    if kind == "MimiConv1d":
        past = before.get(name)
        x = torch.cat([x.new_zeros(*x.shape[:2], int(layer.padding_total)) if past is None else past, x], -1)
        after[name] = x[..., x.shape[-1] - int(layer.padding_total):]
        return layer.conv(x)
    if kind == "MimiResnetBlock":
        y = x
        for number, inner in enumerate(layer.block):
            y = step(inner, y, f"{name}.{number}", before, after)
        return step(layer.shortcut, x, f"{name}.shortcut", before, after) + y
    return layer(x)                                                      # activations, identity: nothing to remember


def up(layer: nn.Module, x: Tensor, name: str, before: dict, after: dict) -> Tensor:
    """Transposed convolution of x (B, C, t) -> (B, C', t * stride); what rings on is added to the samples that come next."""
    y, ready = layer.conv(x), x.shape[-1] * layer.conv.stride[0]
    tail = before.get(name)
    if tail is not None:
        y[..., :tail.shape[-1]] += tail
    bias = 0.0 if layer.conv.bias is None else layer.conv.bias[:, None]
    after[name] = y[..., ready:] - bias                                  # the next call adds the bias again
    return y[..., :ready]


# ----------------------------------------------------------------------------- weights

def fingerprint(model: nn.Module) -> str:
    """From all tensors that decide which codes a sound gets, whatever their names: transformers renames them now and then."""
    state = model.state_dict()
    kept = [v for name, v in state.items() if not name.startswith(("decoder", "upsample")) and "output_proj" not in name]
    digests = sorted(hashlib.sha256(f"{tuple(v.shape)}".encode() + v.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest() for v in kept)
    return "mimi-" + hashlib.sha256("".join(digests).encode()).hexdigest()[:11]


def load_mimi(name: str = NAME, device="cpu") -> MimiCodec:
    """"mimi" (the weights of kyutai/mimi in the cache of transformers) or "mimi:FOLDER". ValueError where there is no transformers or no weights."""
    folder = str(name).partition(":")[2]
    try:
        from transformers import MimiModel
    except ImportError:
        raise ValueError("--codec mimi needs the package transformers: pip install -c constraints.txt transformers, or use --codec pretrained/codec") from None
    if folder and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no Mimi of transformers (config.json): check --codec mimi:FOLDER")
    try:
        model = MimiModel.from_pretrained(folder or HUB, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        if folder:
            raise ValueError(f"{folder} cannot be read as Mimi ({' '.join(str(error).split())[:200]}): check --codec mimi:FOLDER") from None
        raise ValueError(f"the weights of Mimi are not on this machine: get them once where there is a network (hf download {HUB}), "
                         "or name their folder with --codec mimi:FOLDER, or use --codec pretrained/codec") from None
    return MimiCodec(model).to(device)
