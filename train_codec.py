"""Train the speech codec: reconstruction, phone supervision of the semantic codebooks, pitch, discriminators. One file, any size.

    python train_codec.py --data data/synthetic --minutes 40
    python train_codec.py --resume checkpoints/codec/last.pt
    python train_codec.py --init_from checkpoints/codec/last.pt --decoder_only --lr 3e-4 --output checkpoints/decoder
    python train_codec.py --export pretrained/codec --resume checkpoints/codec/last.pt

The data folder is one that collect_data.py wrote (audio per turn, phone times). Pitch is measured with WORLD.
The excitation is driven by the measured pitch during training, so the envelopes learn from aligned harmonics;
the pitch output itself is trained on the measured pitch directly.
Discriminators (discriminators.py) make the sound natural; with --decoder_only codes, tokens and models stay valid. --drawn shows
the decoder what a model draws (draw_codes.py).
"""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import time
from pathlib import Path

from config import CodecConfig, CodecTrainConfig, Parser, add_flags, from_flags

# semantic and acoustic codebooks of the crops that are decoded from fewer: few alone, as models use them, and half of all
TRUNCATIONS = ((1, 0), (1, 0), (1, 0), (2, 0), (2, 0), (2, 0), (4, 0), (4, 0), (8, 0), (8, 0), (10, 0), (3, 4), (3, 9), (3, 9), (3, 9), (3, 9), (3, 9), (10, 6), (10, 6), (6, 12))
ALONE_WEIGHT = 0.3              # of the spectral losses where no acoustic code says who speaks: they would ask for the mean of all voices
ACOUSTIC_ERRORS = 0.3           # share of the semantic side's exchanged codes: acoustic ones are foretold better
PHONE_LEVELS = (1, 2, 10)       # partial sums from which phones are read in training
HELD_OUT_SECONDS = 300          # of validation sound: 3,750 frames
SAMPLES, SAMPLE_SECONDS = 2, 4  # turns written out to hear and see
LOSSES = ("mel", "stft", "phones", "words", "f0", "commit", "adversarial", "features", "discriminator", "listener")
ADVERSARIAL_RAMP = 500          # steps over which the discriminators' weight grows
THAW = 400                      # steps for which weights taken from a folder wait for the new parts beside them to learn
ENCODER = ("feature_in.", "slot_encoder.", "merge.", "frame_encoder.", "semantic_in.")
JUDGED = ("adversarial", "features", "words")          # losses whose weight grows while those who judge learn
JITTER = 10.0                   # weight of the pitch's error from hop to hop, beside 4 for the pitch itself


# ----------------------------------------------------------------------------- losses

def make_trainer_modules(cfg: CodecConfig):
    """The codec's training side: reader of phones, spectral losses. Built here so that inference never sees them."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from rvq_tokenizer import mel_filters

    class PhoneReader(nn.Module):
        """Phones of every 20 ms slot, read from the semantic sum (B, T, dim) with one frame of context."""

        def __init__(self):
            super().__init__()
            self.mix = nn.Conv1d(cfg.semantic_dim, 256, 3, padding=1)
            self.out = nn.Linear(256, cfg.slots * len(cfg.phones))

        def forward(self, z):
            h = F.gelu(self.mix(z.transpose(1, 2)).transpose(1, 2))
            return self.out(h).view(z.shape[0], z.shape[1] * cfg.slots, -1)           # (B, S, phones)

    class SpectralLoss(nn.Module):
        """Multi-resolution log-mel and log-magnitude L1 plus spectral convergence (Yamamoto et al. 2020)."""

        def __init__(self):
            super().__init__()
            self.ffts = (480, 1024, 2048)
            for n in self.ffts:
                self.register_buffer(f"window_{n}", torch.hann_window(n), persistent=False)
                self.register_buffer(f"mel_{n}", mel_filters(n // 2 + 1, {480: 40, 1024: 80, 2048: 128}[n], cfg.sample_rate), persistent=False)

        def forward(self, fake, real):
            """-> mel, stft of every row, (B,) each."""
            mel = stft = 0.0
            for n in self.ffts:
                window = getattr(self, f"window_{n}")
                both = torch.stft(torch.cat([fake, real]), n, n // 4, window=window, return_complex=True).abs().clamp_min(1e-5)
                a, b = both.chunk(2)
                filters = getattr(self, f"mel_{n}")
                la, lb = ((x.transpose(1, 2) @ filters + 1e-3).log() for x in (a, b))
                mel = mel + (la - lb).abs().mean((1, 2)) / len(self.ffts)
                log_magnitude = ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean((1, 2))
                convergence = (b - a).norm(dim=(1, 2)) / b.norm(dim=(1, 2)).clamp_min(1.0)
                stft = stft + (0.5 * log_magnitude + 0.5 * convergence) / len(self.ffts)
            return mel, stft

    return PhoneReader(), SpectralLoss()


def quantise(codec, x, cfg: CodecTrainConfig, generator, ready=(True, True)):
    """latents (B, T, E) -> decoder input (B, T, E), commitment loss, per side (quantiser, z, codes, partial sums),
    what the decoder hears of the semantic side (B, T, d), and in which crops of nothing else (B,). A side that is not `ready` is heard unquantised; its codes are None."""
    import torch
    split = codec.cfg.num_semantic
    counts = draw_truncation(x.shape[0], split, codec.cfg.num_codebooks - split, cfg, generator)
    sides, commit, decoder_in, words = [], 0.0, 0.0, None
    for side, (quantizer, project, back) in enumerate(((codec.semantic, codec.semantic_in, codec.semantic_out), (codec.acoustic, codec.acoustic_in, codec.acoustic_out))):
        z = project(x).float()
        if ready[side]:
            codes = quantizer.encode(z.detach(), quantizer.levels)
            vectors = quantizer.vectors(codes)                                         # (L, B, T, d)
            sums = vectors.cumsum(0)
            before = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
            commit = commit + ((z[None] - before - vectors) ** 2).mean()
            keep = (torch.arange(quantizer.levels, device=counts.device)[:, None] < counts[side][None]).to(z.device, z.dtype)[..., None, None]
            rate = 1.0 if side == 0 else ACOUSTIC_ERRORS
            heard = (missample(vectors, cfg.sure_codebooks if side == 0 else 1, cfg.noise_probability, generator, rate) * keep).sum(0)
        else:
            codes, sums, heard = None, z[None].detach(), z.detach()
        sides.append((quantizer, z, codes, sums))
        words = heard if words is None else words
        there = (counts[side] > 0).to(z.device, z.dtype)[:, None, None]
        decoder_in = decoder_in + back(z + (heard - z).detach()) * there
    return decoder_in, commit, sides, words, counts[1] == 0


def draw_truncation(B: int, semantic: int, acoustic: int, cfg: CodecTrainConfig, generator):
    """Per crop: how many semantic and how many acoustic codebooks the decoder hears, (2, B)."""
    import torch
    device = generator.device
    short = torch.rand(B, generator=generator, device=device) < cfg.dropout_probability
    whole = _constant((semantic, acoustic), device)
    choice = _constant(TRUNCATIONS, device)[torch.randint(len(TRUNCATIONS), (B,), generator=generator, device=device)].minimum(whole)
    return torch.where(short[:, None], choice, whole).T


@functools.lru_cache(maxsize=8)
def _constant(values: tuple, device):
    """A tensor that is brought to the device once."""
    import torch
    return torch.tensor(values, device=device)


def missample(vectors, sure: int, probability: float, generator, most: float = 1.0):
    """vectors (L, B, T, d): in some crops a share of the later levels' codes are another crop's, as a language model's errors would be.

    The first `sure` levels are always right. Where errors begin and how frequent they are (0 to `most`) differs from crop to crop.
    """
    import torch
    (L, B, T, _), device = vectors.shape, generator.device

    def chance(*shape):
        return torch.rand(shape, generator=generator, device=device)
    first = torch.randint(min(sure, L), L + 1, (B,), generator=generator, device=device)
    first = torch.where(chance(B) < 0.5, sure, first)
    rate = most * chance(B) * (chance(B) < probability)
    may = torch.arange(L, device=device)[:, None] >= first[None]
    where = (chance(L, B, T) < rate[None, :, None]) & may[..., None]
    return torch.where(where[..., None].to(vectors.device), vectors.roll(1, 1), vectors)


def driving_pitch(predicted, measured, share: float, generator):
    """f0 (B, J) Hz that the synthesiser plays: the measured one, in a share of the crops the predicted one.

    Those crops sound as they will when decoding; their pulses drift away from the recording's, so that only magnitudes
    and the discriminators judge them. No gradient: through the phase of a pulse train it would be noise.
    """
    import torch
    if not share:
        return measured
    own = (torch.rand(len(measured), 1, generator=generator, device=generator.device) < share).to(measured.device)
    return torch.where(own, predicted.detach(), measured)


def codec_losses(codec, reader, spectral, batch, cfg: CodecTrainConfig, generator, ready, adversary=None, drawn_semantic: int = 0):
    """-> dict of losses (names as in cfg.loss_weights), tensors for the codebook update, metrics."""
    import torch
    import torch.nn.functional as F

    from codec_data import GRID, UNKNOWN
    audio, phones, f0_grid, drawn = batch
    B, N = audio.shape
    x, _ = codec.latents(audio)
    losses = {}
    decoder_in, losses["commit"], sides, words, alone = quantise(codec, x, cfg, generator, ready)
    weight = torch.where(alone.to(x.device), ALONE_WEIGHT, 1.0)
    losses["commit"] = audio.new_zeros(()) + losses["commit"]
    sums, zs = sides[0][3], sides[0][1]
    read = [*(sums[min(n, len(sums)) - 1] for n in PHONE_LEVELS), words] if ready[0] else [zs]
    partial = [zs + (part - zs).detach() for part in read]
    slots, per_slot = N // codec.cfg.slot_size, codec.cfg.slot_size // GRID
    target = phones[:, per_slot // 2:][:, ::per_slot][:, :slots]                       # label at the slot's centre
    logits = reader(torch.cat(partial).float())
    target = torch.where(target == UNKNOWN, -100, target)
    labels = (target >= 0).sum().clamp_min(1)
    phone_losses = [F.cross_entropy(p.reshape(-1, p.shape[-1]), target.reshape(-1), reduction="sum") / labels for p in logits.chunk(len(partial))]
    losses["phones"] = sum(phone_losses) / len(phone_losses)
    if drawn.shape[1]:
        heard = codec.dequantise(drawn.clamp_min(0), drawn_semantic).to(decoder_in.dtype)
        decoder_in = torch.where((drawn[:, :1, :1] >= 0), heard, decoder_in)
    (harmonic, noise, f0), _ = codec.controls(decoder_in)
    centre = codec.cfg.synth_hop // GRID
    true_f0 = f0_grid[:, centre:centre + f0.shape[1]]
    known = (true_f0 > 0).float()
    away = f0.log() - true_f0.abs().log()
    both = known[:, 1:] * known[:, :-1]                                                 # a pitch that trembles from hop to hop sounds rough
    losses["f0"] = 4 * (away.abs() * known).sum() / known.sum().clamp_min(1) + JITTER * (away.diff(dim=1).abs() * both).sum() / both.sum().clamp_min(1)
    state = {"tail": audio.new_zeros(B, codec.cfg.synth_fft - codec.cfg.synth_hop), "phase": None,
             "hop": torch.randint(0, 200, (B,), generator=generator, device=generator.device).to(audio.device)}
    with torch.autocast(audio.device.type, enabled=False):                              # envelopes and spectra in full precision
        fake, _ = codec.synth(harmonic, noise, driving_pitch(f0, true_f0.abs(), cfg.predicted_pitch, generator), state)
        losses["mel"], losses["stft"] = ((weight * row).sum() / weight.sum() for row in spectral(fake, audio))
    accuracy = [(p.argmax(-1) == target).sum() / labels for p in logits.chunk(len(partial))]
    metrics = {f"phones@{n}": a for n, a in zip((*PHONE_LEVELS, "heard") if ready[0] else ("z",), accuracy)}
    if adversary is not None:
        said, seen = adversary.judge(fake, audio, generator, target)
        losses, metrics = losses | said, metrics | seen
    return losses, sides, metrics


# ----------------------------------------------------------------------------- loop

class Run:
    """One training run: what a step changes, and what an exact resume needs."""

    def __init__(self, cfg: CodecTrainConfig, codec_cfg: CodecConfig, limit_hours: float = 0.0):
        import numpy as np
        import torch

        import runtime
        from checkpoint import check_codec, codec_fingerprint
        from codec_data import CodecData
        from discriminators import Adversary, PhoneListener, optimizer_options
        from rvq_tokenizer import Codec, mel_filters
        torch.manual_seed(cfg.seed)
        self.cfg, self.output, self.device = cfg, Path(cfg.output), runtime.pick_device(cfg.device)
        self.output.mkdir(parents=True, exist_ok=True)
        self.data = CodecData(cfg.data, "train", codec_cfg.phones, limit_hours, recordings=cfg.recordings, augment=cfg.augment, drawn=cfg.drawn, recorded=cfg.recorded)
        self.data.to(self.device)
        self.codec = Codec(codec_cfg).to(self.device)
        self.reader, self.spectral = (module.to(self.device) for module in make_trainer_modules(codec_cfg))
        self.parameters = trained_parameters(self.codec, self.reader, cfg.decoder_only)
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=cfg.weight_decay, betas=(0.9, 0.98), **optimizer_options(cfg.lr, self.device))
        self.adversary, self.adversarial_scale = None, torch.zeros((), device=self.device)
        if cfg.adversarial:
            listener = PhoneListener(len(codec_cfg.phones), codec_cfg.slot_size, mel_filters(513, 80, codec_cfg.sample_rate, 40.0)) if cfg.loss_weights.get("words") else None
            self.adversary = Adversary(cfg.discriminator_width, cfg.discriminator_phase, cfg.adversarial_seconds, codec_cfg.sample_rate, self.device, listener)
        self.rng, self.generator = np.random.default_rng(cfg.seed), torch.Generator(self.device).manual_seed(cfg.seed)
        self.replay = Replay(self) if self.device.type == "cuda" else None
        self.step, self.minutes, self.interrupted = 0, 0.0, False
        self.ready = [False, False]                                                         # are the semantic, the acoustic codebooks in use
        self.thaw = 0                                                                       # the encoder and the semantic codebooks rest until this step
        self.listener = None                                                                # held-out data, loaded when first needed
        if cfg.init_from and not cfg.resume and Path(cfg.init_from).is_dir():
            load_folder(cfg.init_from, self)
        elif cfg.resume or cfg.init_from:
            load_state(cfg.resume or cfg.init_from, self, weights_only=not cfg.resume)
        if cfg.drawn:
            check_codec(cfg.drawn, self.data.drawn_fingerprint, codec_fingerprint(self.codec))

    @property
    def started(self) -> bool:
        return all(self.ready)

    @property
    def progress(self) -> float:
        """Share of the run that is over, by steps or by time."""
        return max(self.step / self.cfg.max_steps, self.minutes / self.cfg.minutes if self.cfg.minutes else 0.0)

    @property
    def schedule(self) -> float:
        """Factor of both learning rates: linear warm-up, then half a cosine."""
        cfg = self.cfg
        return min(1.0, (self.step + 1) / cfg.warmup_steps) * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress))))

    @property
    def adversarial_start(self) -> int:
        """Step from which the discriminators learn; a decoder that is only finetuned has envelopes to judge at once."""
        return 0 if self.cfg.decoder_only else self.cfg.adversarial_start

    @property
    def adversarial_weight(self) -> float:
        """Grows from 0: discriminators that know nothing yet have nothing to say."""
        return self.cfg.adversarial * min(1.0, max(0, self.step - self.adversarial_start) / ADVERSARIAL_RAMP)

    def batch(self) -> tuple:
        return self.data.batch(self.rng, self.cfg.batch, int(self.cfg.seconds * self.codec.cfg.sample_rate))

    def due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0


def start_codebooks(run: Run) -> None:
    """k-means over latents of the warmed-up encoder, for the sides whose codebooks are not in use yet."""
    import torch
    codec, cfg = run.codec, run.cfg
    codec.eval()
    zs, za = [], []
    with torch.no_grad():
        for _ in range(max(4, 12000 // (cfg.batch * 24))):
            x, _ = codec.latents(run.batch()[0])
            zs.append(codec.semantic_in(x).reshape(-1, codec.cfg.semantic_dim))
            za.append(codec.acoustic_in(x).reshape(-1, codec.cfg.acoustic_dim))
        for side, (quantizer, z) in enumerate(((codec.semantic, zs), (codec.acoustic, za))):
            if not run.ready[side]:
                quantizer.kmeans(torch.cat(z))
    codec.train()
    run.ready = [True, True]


def load_folder(folder: str, run: Run) -> None:
    """Weights of a pretrained folder into `run`, as far as they fit: a side or a layer of another size starts anew, and is named."""
    from checkpoint import codec_tensors
    stored, own = codec_tensors(folder), run.codec.state_dict()
    fits = {name: value for name, value in stored.items() if name in own and own[name].shape == value.shape}
    anew = sorted({name.split(".")[0] for name in own if name not in fits})
    if not fits:
        raise ValueError(f"nothing in {folder} has the size of this codec: check --init_from")
    run.codec.load_state_dict(own | fits)
    print(f"starting from {folder}; " + (f"of another size, so new: {', '.join(anew)}" if anew else "all of it fits"))
    for side, name in enumerate(("semantic", "acoustic")):
        run.ready[side] = not {name, f"{name}_in", f"{name}_out"} & set(anew)
        quantizer = getattr(run.codec, name)
        quantizer.sums.copy_(quantizer.codebooks)
        quantizer.usage.fill_(1.0)
    run.thaw = THAW if run.ready[0] and not any(name.startswith(ENCODER) and name not in fits for name in own) else 0


def save_state(path: Path, run: Run) -> None:
    import dataclasses

    import torch

    import runtime
    codec = run.codec
    buffers = {f"{n}.{b}": getattr(getattr(codec, n), b) for n in ("semantic", "acoustic") for b in ("usage", "sums")}
    weights = codec.state_dict()                                     # under both names: checkpoint.load_codec reads "model"; the tensors are stored once
    state = {"kind": "codec", "format": 1, "config": dataclasses.asdict(codec.cfg), "codec": weights, "model": weights, "ema": buffers,
             "reader": run.reader.state_dict(), "optimizer": run.optimizer.state_dict(), "adversary": run.adversary.state_dict() if run.adversary else None,
             "step": run.step, "minutes": run.minutes, "ready": run.ready, "thaw": run.thaw, "rng": json.dumps(run.rng.bit_generator.state), "generator": run.generator.get_state(),
             "torch": torch.get_rng_state(), "cuda": runtime.rng_state()["cuda"], "train": dataclasses.asdict(run.cfg)}
    runtime.atomic_write(path, lambda file: torch.save(state, file))


def load_state(path, run: Run, weights_only: bool) -> None:
    """A training checkpoint into `run`: all of it, or codec, reader, codebooks and discriminators only."""
    import torch

    import runtime
    flag = "--init_from" if weights_only else "--resume"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {path}: check {flag}") from None
    except Exception as error:
        raise ValueError(f"{path} is not a codec checkpoint ({type(error).__name__}): check {flag}") from None
    if state.get("kind") != "codec" or state.get("format") != 1:
        raise ValueError(f"{path} is not a codec checkpoint of format 1: check {flag}")
    run.codec.load_state_dict(state["codec"])
    run.reader.load_state_dict(state["reader"])
    for name, value in state["ema"].items():
        module, buffer = name.split(".")
        getattr(getattr(run.codec, module), buffer).copy_(value)
    run.ready, run.thaw = list(state["ready"]), state["thaw"]
    if run.adversary is not None and state.get("adversary"):
        run.adversary.load_state_dict(state["adversary"])
    if weights_only:
        return
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.minutes = state["step"], state["minutes"]
    run.rng.bit_generator.state = json.loads(state["rng"])
    run.generator.set_state(state["generator"])
    runtime.set_rng_state({"cpu": state["torch"], "cuda": state.get("cuda", [])})


def trained_parameters(codec, reader, decoder_only: bool) -> list:
    """All parameters, or only the decoder's: then the encoder is frozen."""
    if not decoder_only:
        return [*codec.parameters(), *reader.parameters()]
    from checkpoint import CODEC_DECODER
    for name, parameter in [*codec.named_parameters(), *(("reader", p) for p in reader.parameters())]:
        parameter.requires_grad_(name.startswith(CODEC_DECODER))
    return [p for p in codec.parameters() if p.requires_grad]


def train(cfg: CodecTrainConfig, codec_cfg: CodecConfig, limit_hours: float = 0.0) -> int:
    import dataclasses

    from tqdm import tqdm

    import runtime
    if runtime.pick_device(cfg.device).type == "cuda":
        import torch
        torch.cuda.set_stream(torch.cuda.Stream())                   # graphs are captured on a stream that is not the default one
        torch.set_float32_matmul_precision("high")                   # TF32: with --precision fp32 a third of the kernels, the casts, fall away
    run = Run(cfg, codec_cfg, limit_hours)
    sizes = f"{sum(p.numel() for p in run.codec.parameters()) / 1e6:.1f} M parameters" + (
        f", discriminators {sum(p.numel() for p in run.adversary.nets.parameters()) / 1e6:.1f} M" if run.adversary else "")
    print(f"codec: {sizes}, {run.data.hours:.2f} h of speech, from step {run.step}")
    held_out(run)                       # labelled in processes of its own: before torch has threads, and before hours are spent
    if not cfg.resume:
        set_aside(run.output)
    stop_on_signals(run)
    metrics = runtime.MetricsLog(run.output, dataclasses.asdict(cfg) | runtime.run_manifest(), cfg.wandb, run.step + 1 if run.step else 0)
    bar = tqdm(total=cfg.max_steps if not cfg.minutes else None, initial=run.step, unit="step", mininterval=10)
    clock, first, warm = time.monotonic(), run.step, min(300, cfg.max_steps // 10)
    while run.progress < 1 and not run.interrupted:
        if run.step >= warm and not run.started:
            start_codebooks(run)
        values = train_step(run)
        bar.update(1)
        now = time.monotonic()
        run.minutes, clock = run.minutes + (now - clock) / 60, now
        if run.due(cfg.log_every):
            row = values()
            metrics.log(run.step, kind="train", minutes=round(run.minutes, 2), **row)
            bar.set_postfix({k: f"{row[k]:.3f}" for k in ("mel", "phones", "f0", "adversarial") if k in row}, refresh=False)
        if run.due(cfg.eval_every) and run.progress < 1:
            report(run, metrics)
        if run.due(cfg.save_every) and run.progress < 1:
            save_state(run.output / "last.pt", run)
    if run.step > first or not (run.output / "last.pt").exists():
        save_state(run.output / "last.pt", run)
    if not run.interrupted:
        report(run, metrics)
    bar.close()
    metrics.close()
    plot_losses(run.output)
    runtime.write_json(run.output / "run.json", runtime.run_manifest() | {"steps": run.step, "minutes": run.minutes, "hours": run.data.hours})
    print(f"saved {run.output / 'last.pt'} at step {run.step}" + ("; go on with --resume" if run.interrupted else ""))
    return 0


def set_aside(output: Path) -> None:
    """Move what an earlier run left in `output` to output/previous: a new run must not write over it."""
    for name in ("last.pt", "metrics.jsonl", "loss.png"):
        if (output / name).exists():
            (output / "previous").mkdir(exist_ok=True)
            (output / name).replace(output / "previous" / name)


def stop_on_signals(run: Run) -> None:
    """The first Ctrl-C (or SIGTERM) finishes the step and saves; the second one kills."""
    def ask(number, frame):
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):       # not in the main thread
            signal.signal(number, ask)


def train_step(run: Run):
    """One update of weights, codebooks and discriminators -> a function that gives the numbers to log. Stops on a loss that is not finite:
    at once on a CPU, elsewhere when the numbers are read (asking the device at every step would make it wait).
    """
    from discriminators import set_rate
    batch, rate = run.batch(), run.schedule
    set_rate(run.optimizer, run.cfg.lr * rate)
    if run.adversary is not None:
        set_rate(run.adversary.optimizer, run.cfg.discriminator_lr * rate)
    run.adversarial_scale.fill_(run.adversarial_weight)
    phase = (tuple(run.ready), run.adversary is not None and run.step >= run.adversarial_start, run.step < run.thaw)
    found = run.replay(phase, batch) if run.replay else update(run, batch, phase)
    run.step += 1

    def values() -> dict:
        numbers = {k: float(v) for k, v in found.items()}
        if not math.isfinite(numbers["loss"]):
            raise ValueError(f"the loss is not finite ({numbers}): lower --lr or resume from an earlier checkpoint")
        return {"lr": run.cfg.lr * rate} | numbers
    if run.device.type == "cpu":
        values()
    return values


def update(run: Run, batch: tuple, phase: tuple) -> dict:
    """The part of a step that happens on the device alone; nothing in it waits for the device. -> numbers as tensors."""
    import torch
    cfg, (ready, judged, resting) = run.cfg, phase
    with torch.autocast(run.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        losses, sides, metrics = codec_losses(run.codec, run.reader, run.spectral, batch, cfg, run.generator, ready, run.adversary if judged else None, run.data.drawn_semantic)
    total = sum(cfg.loss_weights[name] * value * (run.adversarial_scale if name in JUDGED else 1.0) for name, value in losses.items())
    run.optimizer.zero_grad(set_to_none=True)
    total.backward(inputs=run.parameters)                            # not the discriminators': theirs wait in the adversary
    if resting:
        for name, parameter in run.codec.named_parameters():
            if name.startswith(ENCODER):
                parameter.grad = None
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, cfg.grad_clip)
    run.optimizer.step()
    if judged:
        run.adversary.update()
    for quantizer, z, codes, _ in sides:
        if codes is not None and not cfg.decoder_only and not (resting and quantizer is run.codec.semantic):
            quantizer.update(z.detach(), codes, cfg.ema)
    return {"loss": total.detach(), "grad_norm": norm} | {k: v.detach() for k, v in (losses | metrics).items()}


class Replay:
    """`update` on CUDA: captured as a graph once per phase of the run and replayed, for it is some thousands of small kernels,
    which take longer to launch than to run. All of it on one stream of its own, as capturing wants.
    """
    WARM = 4                                                         # steps before a capture: libraries make their workspaces, optimisers their states

    def __init__(self, run: Run):
        self.run, self.graphs, self.seen = run, {}, {}

    def __call__(self, phase: tuple, batch: tuple) -> dict:
        self.seen[phase] = self.seen.get(phase, 0) + 1
        if self.seen[phase] <= self.WARM:
            return update(self.run, batch, phase)
        if phase not in self.graphs:
            self.graphs[phase] = self._capture(phase, batch)
        graph, given, found = self.graphs[phase]
        for held, new in zip(given, batch):
            held.copy_(new)
        graph.replay()
        return found

    def _capture(self, phase: tuple, batch: tuple) -> tuple:
        import torch
        given, graph = tuple(t.clone() for t in batch), torch.cuda.CUDAGraph()
        graph.register_generator_state(self.run.generator)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            found = update(self.run, given, phase)
        return graph, given, found


# ----------------------------------------------------------------------------- held-out figures, samples, pictures

def held_out(run: Run):
    """CodecData of the validation split; the training data where there is none, which the log then says."""
    from codec_data import CodecData
    if run.listener is None:
        folder = run.cfg.data.split(",")[0]
        there = (Path(folder) / "manifests" / "validation").exists()
        run.listener = CodecData(folder, "validation", run.codec.cfg.phones, HELD_OUT_SECONDS / 3600).to(run.device) if there else run.data
    return run.listener


def evaluate(run: Run) -> dict:
    """Held-out losses with all codebooks and nothing exchanged; entropy and unused codes of every codebook. Draws nothing from the run's own generators."""
    import dataclasses

    import numpy as np
    import torch

    from rvq_tokenizer import code_statistics
    cfg = dataclasses.replace(run.cfg, dropout_probability=0.0, noise_probability=0.0, predicted_pitch=0.0)
    data, codec, generator = held_out(run), run.codec, torch.Generator(run.device).manual_seed(0)
    batch = data.batch(np.random.default_rng(0), cfg.batch, int(cfg.seconds * codec.cfg.sample_rate))
    with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        losses, _, metrics = codec_losses(codec, run.reader, run.spectral, batch, cfg, generator, run.ready)
    found = {f"validation_{k}": float(v) for k, v in (losses | metrics).items()} | {"held_out": data is not run.data}
    if run.started:
        sound = np.concatenate(list(data.turns()))[:HELD_OUT_SECONDS * codec.cfg.sample_rate].astype(np.float32) / 32767
        rows = np.array_split(sound, max(1, len(sound) // (10 * codec.cfg.sample_rate)))                       # ten seconds each
        codes = torch.cat([codec.encode(torch.from_numpy(row).to(run.device).view(1, 1, -1))[0].cpu() for row in rows], 1)
        use = code_statistics(codes, codec.cfg.codebook_size)
        found |= {"entropy_mean": float(np.mean(use["entropy"])), "dead_mean": float(np.mean(use["dead"])), "frames": codes.shape[1], **use}
    return found


def report(run: Run, metrics) -> None:
    """One line of held-out figures, samples to hear and see, the picture of the losses."""
    from tqdm import tqdm
    run.codec.eval()
    found = evaluate(run)
    metrics.log(run.step, kind="validation", minutes=round(run.minutes, 2), **found)
    names = ("validation_mel", "validation_phones", "entropy_mean", "dead_mean")
    tqdm.write(f"step {run.step}: " + "  ".join(f"{name} {found[name]:.3f}" for name in names if name in found) + ("" if found["held_out"] else "  (no validation split: training data)"))
    if run.started:
        write_samples(run)
    plot_losses(run.output)
    run.codec.train()


def write_samples(run: Run) -> None:
    """Two held-out turns through all, half and the first two codebooks: samples/*.wav and a picture of their spectra."""
    import numpy as np
    import torch

    import audio_io
    codec, folder = run.codec, run.output / "samples"
    rate, all_of_them = codec.cfg.sample_rate, codec.cfg.num_codebooks
    turns = sorted(held_out(run).turns(), key=lambda turn: len(turn) < 2 * rate)[:SAMPLES]                    # the first two of two seconds or more
    for number, turn in enumerate(turns, 1):
        sound = turn[:SAMPLE_SECONDS * rate].astype(np.float32) / 32767
        codes = codec.encode(torch.from_numpy(sound).to(run.device).view(1, 1, -1))
        made = {"input": sound}
        for count in dict.fromkeys((all_of_them, max(1, all_of_them // 2), min(2, all_of_them))):
            made[str(count)] = codec.decode(codes[:, :count])[0, 0, :len(sound)].float().cpu().numpy()
        for name, audio in made.items():
            stem = f"{number}_input" if name == "input" else f"step{run.step:07d}_{number}_{name}"
            audio_io.write_audio(folder / f"{stem}.wav", audio, rate)
        draw_spectra(folder / f"step{run.step:07d}_{number}.png", {k if k == "input" else f"{k} codebooks": v for k, v in made.items()}, rate)


def figure_or_none(rows: int, height: float):
    """A matplotlib figure and its axes without a screen; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, sharex=True, squeeze=False)[:, 0]


def draw_spectra(path: Path, sounds: dict, rate: int) -> None:
    """Name -> audio (N,), drawn below each other as spectrograms over 80 dB."""
    import numpy as np

    import runtime
    drawing = figure_or_none(len(sounds), 1.8 * len(sounds))
    if drawing is None:
        return
    window = np.hanning(960)
    for axes, (name, audio) in zip(drawing[1], sounds.items()):
        frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, 480), 960)[::240] * window             # (T, 960)
        level = 20 * np.log10(np.abs(np.fft.rfft(frames)) + 1e-3)
        axes.imshow(level.T, origin="lower", aspect="auto", vmin=-40, vmax=40, extent=(0, len(audio) / rate, 0, rate / 2000), cmap="magma")
        axes.set(title=name, ylabel="kHz")
    drawing[1][-1].set(xlabel="s")
    runtime.atomic_write(path, lambda file: drawing[0].savefig(file, format="png", dpi=80))


def plot_losses(folder: Path) -> None:
    """metrics.jsonl -> loss.png: every loss by name, held-out ones dotted; use of the codebooks below."""
    import runtime
    lines = runtime.read_metrics(folder / "metrics.jsonl")
    drawing = figure_or_none(2, 8)
    if drawing is None or not lines:
        return
    figure, (above, below) = drawing

    def points(key):
        return zip(*[(m["step"], m[key]) for m in lines if m.get(key) is not None])
    for name in LOSSES:
        if any(m.get(name) is not None for m in lines):
            line, = above.plot(*points(name), label=name, alpha=0.6)
            if any(m.get(f"validation_{name}") is not None for m in lines):
                above.plot(*points(f"validation_{name}"), "o:", color=line.get_color())
    for name, label in (("entropy_mean", "entropy, mean of the codebooks (1 = uniform)"), ("dead_mean", "share of unused codes"), ("told_apart", "told apart by the discriminators")):
        if any(m.get(name) is not None for m in lines):
            below.plot(*points(name), "o-", markersize=3, label=label, alpha=0.8)
    above.set(yscale="log", title="Losses, held-out ones dotted")
    below.set(xlabel="step", ylim=(0, 1.02))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(ncols=2, fontsize=8)
    runtime.atomic_write(folder / "loss.png", lambda file: figure.savefig(file, format="png", dpi=100))


# ----------------------------------------------------------------------------- export and main

def export(resume: str, folder: str) -> int:
    """Write the weights of a training checkpoint as a pretrained folder."""
    import torch

    from checkpoint import save_codec
    from config import from_dict
    from rvq_tokenizer import Codec
    state = torch.load(resume, map_location="cpu", weights_only=True)
    codec = Codec(from_dict(CodecConfig, state["config"]))
    codec.load_state_dict(state["codec"])
    save_codec(codec.eval(), folder)
    print(f"wrote {folder} ({os.path.getsize(Path(folder) / 'model.safetensors') / 1e6:.1f} MB)")
    return 0


def main(argv=None) -> int:
    parser = Parser(description="Train the speech codec.")
    add_flags(parser, CodecTrainConfig)
    parser.add_argument("--limit_hours", type=float, default=0.0, help="use at most this much speech; 0: all")
    parser.add_argument("--export", default="", metavar="FOLDER", help="write the weights of --resume to this folder and stop")
    args = parser.parse_args(argv)
    try:
        if args.export:
            return export(args.resume, args.export)
        return train(from_flags(CodecTrainConfig, args), CodecConfig(), args.limit_hours)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
