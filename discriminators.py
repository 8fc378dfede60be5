"""Adversarial training: small networks that tell decoded speech from recordings, and what the decoder learns from them.

Three short-time spectra (85, 32 and 11 ms windows), each cut into the frequency bands of DAC (Kumar et al. 2023) with a
stack of convolutions of its own per band, so that a band knows where it is. Least squares (Mao et al. 2017), as in DAC
and FARGAN, and feature matching (Larsen et al. 2016), as a share of the size of the features, so that it has no unit.

They see log magnitudes alone unless `phase` is on. Our decoder is a source-filter synthesiser: its pulses are not where
the recording's are and its filters have minimum phase, which one look at the phase gives away and no envelope can
mend. FARGAN, driven by pitch as well, is trained against magnitudes for the same reason; DAC, EnCodec and Vocos make
their own phase and are judged on complex spectra.

A listener besides reads phones from recordings; the decoder learns to make sound in which it reads the same. That is
what keeps words clear where spectra cannot be right, as in crops decoded from few codes, in another voice.

Knows nothing of codes. Shapes: B batch, N samples, T spectral frames, F bins, S slots.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

FFTS = (2048, 768, 256)
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)          # edges, as shares of half the sample rate
FLOOR = 3e-4                                      # of the amplitude, -70 dB: fainter sound is not judged
KERNELS = (((3, 7), (1, 3), 1), ((3, 7), (1, 3), 1), ((3, 5), (1, 2), 2), ((3, 3), (1, 1), 4))     # time x frequency, stride, dilation in time


class BandStack(nn.Module):
    """Convolutions over one band of one spectrum: (B, C, T, F) -> features of every layer and a map of scores."""

    def __init__(self, channels_in: int, width: int):
        super().__init__()
        layers = []
        for (time, bins), stride, dilation in KERNELS:
            layers.append(weight_norm(nn.Conv2d(channels_in, width, (time, bins), stride, (dilation * (time // 2), bins // 2), (dilation, 1))))
            channels_in = width
        self.layers = nn.ModuleList(layers)
        self.out = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return features, self.out(x)


class SpectrumDiscriminator(nn.Module):
    """One window length, all bands."""

    def __init__(self, fft: int, width: int, phase: bool):
        super().__init__()
        self.fft, self.phase = fft, phase
        window = torch.hann_window(fft)
        self.register_buffer("window", window / window.pow(2).sum().sqrt(), persistent=False)      # white noise of power 1 has magnitudes about 1
        bins = fft // 2 + 1
        edges = [round(edge * bins) for edge in BANDS]
        self.bands = list(zip(edges, edges[1:]))
        self.stacks = nn.ModuleList(BandStack(3 if phase else 1, width) for _ in self.bands)

    def spectrum(self, audio: Tensor) -> Tensor:
        """audio (B, N) -> (B, C, T, F): log magnitude about -1..3, and with `phase` the direction of the complex number."""
        x = torch.stft(audio.float(), self.fft, self.fft // 4, window=self.window, return_complex=True).transpose(1, 2)
        size = x.abs()
        level = (size + FLOOR).log() / 2 + 3
        return torch.stack([level, x.real / (size + FLOOR), x.imag / (size + FLOOR)] if self.phase else [level], 1)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with torch.autocast(audio.device.type, enabled=False):
            x = self.spectrum(audio)
        features, scores = [], []
        for (low, high), stack in zip(self.bands, self.stacks):
            inside, score = stack(x[..., low:high])
            features += inside
            scores.append(score)
        return features, scores


class Discriminators(nn.Module):
    """All window lengths. audio (B, N), N > 1024 -> features, scores: lists of tensors, one per layer and per band."""

    def __init__(self, width: int = 16, phase: bool = False):
        super().__init__()
        self.parts = nn.ModuleList(SpectrumDiscriminator(fft, width, phase) for fft in FFTS)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        results = [part(audio) for part in self.parts]
        return [f for features, _ in results for f in features], [s for _, scores in results for s in scores]


# ----------------------------------------------------------------------------- losses

def discriminator_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Scores of recordings should be 1, of decoded sound 0; undecided is 0.5."""
    return sum((1 - r.float()).pow(2).mean() + f.float().pow(2).mean() for r, f in zip(real, fake)) / len(real)


def adversarial_loss(fake: list[Tensor]) -> Tensor:
    """Scores of decoded sound should be 1."""
    return sum((1 - f.float()).pow(2).mean() for f in fake) / len(fake)


def feature_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean distance of the features of decoded sound from the recording's, as a share of their mean size."""
    return sum((r.detach() - f).float().abs().mean() / r.detach().float().abs().mean().clamp_min(1e-4) for r, f in zip(real, fake)) / len(real)


class PhoneListener(nn.Module):
    """audio (B, N) -> logits (B, S, phones) of every slot, read from log-mel spectra with 0.4 s around it."""

    def __init__(self, phones: int, slot_size: int, filters: Tensor, width: int = 192):
        super().__init__()
        self.fft, self.hop = 2 * (len(filters) - 1), slot_size // 2
        self.register_buffer("window", torch.hann_window(self.fft), persistent=False)
        self.register_buffer("filters", filters, persistent=False)
        self.enter = nn.Conv1d(filters.shape[1], width, 5, padding=2)
        self.halve = nn.Conv1d(width, width, 4, stride=2, padding=1)
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 9, padding=4, groups=width) for _ in range(6))
        self.turn = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)) for _ in range(6))
        self.out = nn.Linear(width, phones)

    def forward(self, audio: Tensor) -> Tensor:
        with torch.autocast(audio.device.type, enabled=False):
            size = torch.stft(audio.float(), self.fft, self.hop, window=self.window, return_complex=True).abs()[..., :audio.shape[1] // self.hop]
            x = (size.transpose(1, 2) @ self.filters + 1e-2).log()                      # (B, T, mels)
        x = F.gelu(self.enter(x.transpose(1, 2)))
        for number, (mix, turn) in enumerate(zip(self.mix, self.turn)):
            if number == 2:
                x = F.gelu(self.halve(x))                                               # from here on slots
            x = x + turn(mix(x).transpose(1, 2)).transpose(1, 2)
        return self.out(x.transpose(1, 2)).float()


def words_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits (B, S, phones) of the recording and of the decoded sound -> mean Kullback-Leibler divergence in nats per slot."""
    return F.kl_div(fake.log_softmax(-1), real.detach().log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()


class Adversary:
    """Discriminators and listener with their optimiser. One look at a batch serves both players, so a step needs one forward pass.

    judge() leaves their gradients waiting; update() applies them, after the decoder's own backward pass.
    """

    def __init__(self, width: int, phase: bool, seconds: float, sample_rate: int, device="cpu", listener: nn.Module | None = None):
        self.nets, self.listener = Discriminators(width, phase).to(device), None if listener is None else listener.to(device)
        self.length = int(seconds * sample_rate)
        self.parameters = [p for net in (self.nets, self.listener) if net is not None for p in net.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.8, 0.99), weight_decay=0.0, **optimizer_options(1e-4, torch.device(device)))
        self.waiting: list[Tensor] = []

    def judge(self, fake: Tensor, real: Tensor, generator: torch.Generator, phones: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """fake with gradient and real (B, N), aligned; phones (B, S), -100 where unknown -> losses of the decoder, and metrics.

        The discriminators see a part of each crop, the same in all; the listener hears them whole.
        """
        start = torch.randint(0, max(1, fake.shape[1] - self.length + 1), (1,), generator=generator, device=generator.device)
        part = (start + torch.arange(min(self.length, fake.shape[1]), device=start.device)).to(fake.device)
        with parametrize.cached():
            fake_features, fake_scores = self.nets(fake.index_select(1, part))
            real_features, real_scores = self.nets(real.index_select(1, part))
        loss = discriminator_loss(real_scores, fake_scores)
        losses = {"adversarial": adversarial_loss(fake_scores), "features": feature_loss(real_features, fake_features)}
        right = [torch.stack([((s > 0.5) == wanted).float().mean() for s in scores]).mean() for scores, wanted in ((real_scores, True), (fake_scores, False))]
        metrics = {"discriminator": loss.detach(), "told_apart": (right[0] + right[1]) / 2}
        if self.listener is not None:
            heard, made = self.listener(real), self.listener(fake)
            losses["words"] = words_loss(heard, made)
            reading = F.cross_entropy(heard.flatten(0, 1), phones.flatten(), reduction="sum") / (phones >= 0).sum().clamp_min(1)
            hits = [((logits.detach().argmax(-1) == phones).sum() / (phones >= 0).sum().clamp_min(1)) for logits in (heard, made)]
            metrics |= {"listener": reading.detach(), "heard": hits[0], "understood": hits[1]}
            loss = loss + reading
        self.waiting = list(torch.autograd.grad(loss, self.parameters, retain_graph=True))
        return losses, metrics

    def update(self) -> None:
        for parameter, gradient in zip(self.parameters, self.waiting):
            parameter.grad = gradient
        for net in filter(None, (self.nets, self.listener)):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.waiting = []

    def state_dict(self) -> dict:
        return {"nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict(), "listener": None if self.listener is None else self.listener.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """ValueError when the state is of discriminators of another size."""
        try:
            self.nets.load_state_dict(state["nets"])
            if self.listener is not None:
                self.listener.load_state_dict(state["listener"])
        except (RuntimeError, KeyError, TypeError):
            raise ValueError("the checkpoint's discriminators have another size: give the --discriminator_width and --discriminator_phase of its run") from None
        self.optimizer.load_state_dict(state["optimizer"])


def optimizer_options(lr: float, device: torch.device) -> dict:
    """On CUDA the rate is a tensor and nothing is asked of the device, so that a step can be captured as a graph."""
    cuda = device.type == "cuda"
    return {"lr": torch.tensor(lr, device=device) if cuda else lr, "fused": True, "capturable": cuda}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
