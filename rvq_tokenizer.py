"""The speech codec: audio (B, 1, N) at 24 kHz <-> codes (B, K, T) at 12.5 Hz, K = 10 semantic + 22 acoustic.

Encoder: log-mel and fine low-frequency spectra per 10-20 ms -> causal ConvNeXt -> one latent per 80 ms frame.
Quantiser: two residual quantisers over projections of that latent. The semantic one is supervised with phone
labels read from its partial sums, so the words sit in the first one or two codebooks; the acoustic one carries the rest.
Decoder: causal ConvNeXt -> per 10 ms a pitch, a harmonic and a noise envelope -> a source-filter synthesiser
(pulse train and noise, shaped in short spectra, overlap-add). Phase is the synthesiser's business, so no code is
spent on it and no adversarial loss is needed for a clean voice.

Everything is causal and `state=None` is the offline case of the same code: any chunking gives the same samples.
Knows nothing of text, files or training. Shapes: B batch, N samples, T frames, K codebooks, S slots (20 ms), D width.

    python rvq_tokenizer.py encode voice.wav voice.codes       (see codec_tools.py)
"""
from __future__ import annotations

import math

if __name__ == "__main__":       # the command line lives above, where weights and files can be opened; it answers --help before torch is loaded
    import runpy
    runpy.run_module("codec_tools", run_name="__main__")

import torch                     # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn     # noqa: E402

from config import CodecConfig   # noqa: E402
from layers import ConvStack     # noqa: E402

LOW_FFT = 2048                 # window of the fine low-frequency spectrum: 85 ms, 11.7 Hz bins
NOISE_TABLE = 1 << 16          # samples of fixed noise, addressed by absolute position
LOG_FLOOR = 1e-4


def mel_filters(bins: int, bands: int, sample_rate: int, low: float = 0.0, high: float | None = None) -> Tensor:
    """Triangular mel filters, (bins, bands), HTK scale, peak 1."""
    def mel(hz):
        return 2595.0 * math.log10(1.0 + hz / 700.0)

    edges = 700.0 * (10.0 ** (torch.linspace(mel(low), mel(high or sample_rate / 2), bands + 2, dtype=torch.float64) / 2595.0) - 1.0)
    hz = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64)[:, None]
    rise = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp_min(0).float()


def band_interpolation(bands: int, bins: int, sample_rate: int) -> Tensor:
    """(bands, bins): linear interpolation from mel-spaced envelope points to spectral bins."""
    hz = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64)
    position = torch.log1p(hz / 700.0) / math.log1p(sample_rate / 2 / 700.0) * (bands - 1)
    left = position.floor().clamp(max=bands - 2)
    weights = torch.zeros(bands, bins, dtype=torch.float64)
    columns = torch.arange(bins)
    weights[left.long(), columns] = 1 - (position - left)
    weights[left.long() + 1, columns] = position - left
    return weights.float()


# ----------------------------------------------------------------------------- analysis

def magnitude(spectrum: Tensor) -> Tensor:
    """abs() of a complex tensor, three times as fast on a CPU; its gradient at 0 is 0 as well."""
    return (spectrum.real.square() + spectrum.imag.square() + 1e-20).sqrt()


class Analysis(nn.Module):
    """Audio to features per slot, causal: windows end where their hop ends."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        self.cfg, self.hop, self.fft = cfg, cfg.synth_hop, cfg.synth_fft
        self.per_slot = cfg.slot_size // cfg.synth_hop
        window = F.pad(torch.hann_window(2 * self.hop), (self.fft - 2 * self.hop, 0))       # the newest 20 ms
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("low_window", torch.hann_window(LOW_FFT), persistent=False)
        self.register_buffer("filters", mel_filters(self.fft // 2 + 1, cfg.num_mels, cfg.sample_rate, 40.0), persistent=False)

    @property
    def size(self) -> int:
        return self.per_slot * self.cfg.num_mels + self.cfg.num_low_bins

    def forward(self, audio: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """audio (B, N), N a multiple of the slot; past (B, LOW_FFT) -> features (B, S, size), past."""
        B, N = audio.shape
        past = audio.new_zeros(B, LOW_FFT) if past is None else past
        x = torch.cat([past, audio], 1)
        mel_in = x[:, LOW_FFT - (self.fft - self.hop):]
        spectrum = magnitude(torch.fft.rfft(mel_in.unfold(1, self.fft, self.hop) * self.window))      # (B, hops, bins)
        mel = (spectrum @ self.filters + LOG_FLOOR).log().view(B, N // self.cfg.slot_size, -1)
        low_in = x[:, self.cfg.slot_size:]
        low = magnitude(torch.fft.rfft(low_in.unfold(1, LOW_FFT, self.cfg.slot_size) * self.low_window)[..., 1:self.cfg.num_low_bins + 1])
        features = torch.cat([mel, (low + 10 * LOG_FLOOR).log()], -1)
        return features * 0.2 + 0.5, x[:, -LOW_FFT:]


# ----------------------------------------------------------------------------- quantiser

class ResidualQuantizer(nn.Module):
    """L codebooks of V vectors, each quantising what the ones before it left. EMA codebooks, k-means start.

    Source: van den Oord et al. 2017 (EMA VQ), Zeghidour et al. 2021 (residual VQ, k-means start, dead codes revived).
    """

    def __init__(self, levels: int, size: int, dim: int):
        super().__init__()
        self.levels, self.size, self.dim = levels, size, dim
        self.register_buffer("codebooks", torch.randn(levels, size, dim) * 0.1)
        self.register_buffer("usage", torch.ones(levels, size), persistent=False)
        self.register_buffer("sums", self.codebooks.clone(), persistent=False)
        self._known, self._norms = None, None

    def nearest(self, x: Tensor, level: int) -> Tensor:
        """x (M, dim) -> code index (M,)."""
        return torch.addmm(self.norms()[level], x, self.codebooks[level].T, alpha=-2.0).argmin(1)

    def norms(self) -> Tensor:
        """Squared length of every vector, (L, V); kept for as long as the codebooks stay what they are: for one frame they cost more than the search."""
        books = self.codebooks
        known = None if books.is_inference() else (books.data_ptr(), books._version)
        if known is None or known != self._known:
            self._known, self._norms = known, books.square().sum(2)
        return self._norms

    def encode(self, z: Tensor, levels: int) -> Tensor:
        """z (B, T, dim) -> codes (B, levels, T)."""
        B, T, d = z.shape
        residual, codes = z.reshape(-1, d), []
        for level in range(levels):
            index = self.nearest(residual, level)
            residual = residual - self.codebooks[level][index]
            codes.append(index.view(B, T))
        return torch.stack(codes, 1) if codes else z.new_zeros(B, 0, T, dtype=torch.long)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, L, T) -> the vectors of every level, (L, B, T, dim)."""
        return torch.stack([self.codebooks[level][codes[:, level]] for level in range(codes.shape[1])])

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, L, T), L <= levels -> sum of vectors (B, T, dim)."""
        if codes.shape[1] == 0:
            return self.codebooks.new_zeros(codes.shape[0], codes.shape[2], self.dim)
        return self.vectors(codes).sum(0)

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, decay: float, revive_below: float = 0.1) -> None:
        """One EMA step on z (B, T, dim) with its codes (B, L, T). Codes used less than `revive_below` of an even share move to random residuals."""
        residual = z.reshape(-1, self.dim)
        share = len(residual) / self.size                                                # uses per code and step, were all used alike
        for level in range(self.levels):
            index = codes[:, level].reshape(-1)
            counts = torch.zeros_like(self.usage[level]).index_add_(0, index, torch.ones_like(residual[:, 0]))
            total = torch.zeros_like(self.sums[level]).index_add_(0, index, residual)
            self.usage[level].mul_(decay).add_(counts, alpha=1 - decay)
            self.sums[level].mul_(decay).add_(total, alpha=1 - decay)
            before = self.codebooks[level][index]
            dead = self.usage[level] < revive_below * share                                      # (size,); no branch on it: a device need not be asked
            fresh = residual[torch.randint(len(residual), (self.size,), device=z.device)]
            self.sums[level].copy_(torch.where(dead[:, None], fresh * share, self.sums[level]))
            self.usage[level].copy_(torch.where(dead, share, self.usage[level]))
            self.codebooks[level].copy_(self.sums[level] / self.usage[level].clamp_min(1e-5)[:, None])
            residual = residual - before

    @torch.no_grad()
    def kmeans(self, samples: Tensor, rounds: int = 8) -> None:
        """Start every codebook by k-means over samples (M, dim), level after level."""
        residual = samples
        for level in range(self.levels):
            book = residual[torch.randperm(len(residual))[:self.size]]
            book = F.pad(book, (0, 0, 0, self.size - len(book)))
            for _ in range(rounds):
                self.codebooks[level].copy_(book)
                index = self.nearest(residual, level)
                counts = torch.bincount(index, minlength=self.size).float()[:, None]
                sums = torch.zeros_like(book).index_add_(0, index, residual)
                spare = residual[torch.randint(len(residual), (self.size,))]
                book = torch.where(counts > 0, sums / counts.clamp_min(1), spare)
            self.codebooks[level].copy_(book)
            residual = residual - book[self.nearest(residual, level)]
        self.sums.copy_(self.codebooks)
        self.usage.fill_(1.0)


# ----------------------------------------------------------------------------- synthesis

class SourceFilter(nn.Module):
    """Pitch and two envelopes per hop -> samples: pulses and noise, filtered in short spectra, overlap-add.

    A window is two hops of excitation, beginning where its hop begins; the rest of the transform holds the ringing of
    the causal filters. So a sample needs no later hop (streaming equals offline) and envelopes change within 10 ms.
    Pulse trains in closed form, harmonics up to 11 kHz; minimum-phase filters (Oppenheim & Schafer, cepstral folding).
    """

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        self.cfg, self.hop, self.fft = cfg, cfg.synth_hop, cfg.synth_fft
        self.overlap = self.fft // self.hop
        self.register_buffer("window", torch.hann_window(2 * self.hop), persistent=False)
        self.register_buffer("bands", band_interpolation(cfg.num_bands, self.fft // 2 + 1, cfg.sample_rate), persistent=False)
        noise = torch.randn(NOISE_TABLE, generator=torch.Generator().manual_seed(20261122))
        self.register_buffer("noise", noise, persistent=False)
        fold = torch.zeros(self.fft)
        fold[0] = fold[self.fft // 2] = 1.0
        fold[1:self.fft // 2] = 2.0
        self.register_buffer("fold", fold, persistent=False)

    def minimum_phase(self, log_envelope: Tensor) -> Tensor:
        """log magnitude (..., bins) -> complex minimum-phase response."""
        cepstrum = torch.fft.irfft(log_envelope, n=self.fft)
        angle, size = torch.fft.rfft(cepstrum * self.fold).imag.contiguous(), log_envelope.exp()
        return torch.complex(size * angle.cos(), size * angle.sin())         # polar() is four times slower on a CPU

    def pulses(self, f0: Tensor, phase: Tensor) -> Tensor:
        """f0 (B, J) Hz, phase (B, J) at the window centres -> (B, J, 2 hop): sum of all harmonics below 11 kHz."""
        n = torch.arange(2 * self.hop, device=f0.device, dtype=f0.dtype) - self.hop
        angle = phase[..., None] + (2 * math.pi / self.cfg.sample_rate) * f0[..., None] * n
        half = 2 * torch.sin(0.5 * angle)
        order = (11000.0 / f0).floor()[..., None] + 0.5
        near = half.abs() < 2e-3
        train = torch.where(near, order, torch.sin(order * angle) / torch.where(near, torch.ones_like(half), half)) - 0.5
        return train * (2.0 * f0[..., None] / self.cfg.sample_rate).sqrt()                # unit power at any pitch

    def phases(self, f0: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """Phase at the centre of every hop's window, carried over from the hop before. Double: long streams stay exact."""
        f0 = f0.double()
        last_f0, last_phase = state if state is not None else (f0[:, 0], torch.zeros_like(f0[:, 0]))
        previous = torch.cat([last_f0[:, None], f0[:, :-1]], 1)
        turns = (0.5 * (f0 + previous) * self.hop / self.cfg.sample_rate).cumsum(1) + last_phase[:, None]
        turns = turns % 1.0
        return (2 * math.pi * turns).float(), (f0[:, -1], turns[:, -1])

    def noise_frames(self, start: Tensor, hops: int) -> Tensor:
        """The fixed noise under every window, (B, hops, 2 hop); start (B,) is the absolute hop number."""
        position = (start[:, None] + torch.arange(hops, device=start.device)) * self.hop
        index = position[..., None] + torch.arange(2 * self.hop, device=start.device)
        return self.noise[index % NOISE_TABLE]

    def forward(self, harmonic: Tensor, noise: Tensor, f0: Tensor, state: dict | None = None) -> tuple[Tensor, dict]:
        """harmonic, noise (B, J, bands) log gains; f0 (B, J) Hz -> samples (B, J * hop), state.

        There is no voiced flag: where speech is unvoiced the harmonic gain is low, so a doubtful frame costs little.
        """
        B, J = f0.shape
        state = state or {"tail": f0.new_zeros(B, self.fft - self.hop), "phase": None, "hop": torch.zeros(B, dtype=torch.long, device=f0.device)}
        phase, phase_state = self.phases(f0, state["phase"])
        pulse_spectrum = torch.fft.rfft(self.pulses(f0, phase) * self.window, n=self.fft)
        noise_spectrum = torch.fft.rfft(self.noise_frames(state["hop"], J) * self.window, n=self.fft)
        filters = self.minimum_phase(torch.stack([harmonic, noise]) @ self.bands)               # (2, B, J, bins)
        frames = torch.fft.irfft(pulse_spectrum * filters[0] + noise_spectrum * filters[1], n=self.fft)   # (B, J, fft)
        total = self.overlap_add(frames, state["tail"])
        size = J * self.hop
        return total[:, :size], {"tail": total[:, size:], "phase": phase_state, "hop": state["hop"] + J}

    def overlap_add(self, frames: Tensor, tail: Tensor) -> Tensor:
        """frames (B, J, fft), tail (B, fft - hop) -> (B, (J - 1) * hop + fft)."""
        B, J, _ = frames.shape
        pieces = frames.view(B, J, self.overlap, self.hop)
        total = F.pad(tail.view(B, self.overlap - 1, self.hop), (0, 0, 0, J))
        for k in range(self.overlap):
            total = total + F.pad(pieces[:, :, k], (0, 0, k, self.overlap - 1 - k))
        return total.reshape(B, -1)


# ----------------------------------------------------------------------------- codec

class Codec(nn.Module):
    """Encoder, hierarchical quantiser and decoder. See the module docstring for the shapes."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        self.cfg = cfg
        self.fingerprint = "untrained"
        D, E, W = cfg.width, cfg.latent, cfg.decoder_width
        self.analysis = Analysis(cfg)
        self.feature_in = nn.Linear(self.analysis.size, D)
        self.slot_encoder = ConvStack(cfg.encoder_layers, D, kernel=7)
        self.merge = nn.Linear(cfg.slots * D, E)
        self.frame_encoder = ConvStack(cfg.latent_layers, E, kernel=5)
        self.semantic_in, self.semantic_out = nn.Linear(E, cfg.semantic_dim), nn.Linear(cfg.semantic_dim, E)
        self.acoustic_in, self.acoustic_out = nn.Linear(E, cfg.acoustic_dim), nn.Linear(cfg.acoustic_dim, E)
        self.semantic = ResidualQuantizer(cfg.num_semantic, cfg.codebook_size, cfg.semantic_dim)
        self.acoustic = ResidualQuantizer(cfg.num_codebooks - cfg.num_semantic, cfg.codebook_size, cfg.acoustic_dim)
        self.frame_decoder = ConvStack(cfg.latent_layers, E, kernel=5)
        self.split = nn.Linear(E, cfg.slots * W)
        fine = cfg.decoder_layers // 3
        self.slot_decoder = ConvStack(cfg.decoder_layers - fine, W, kernel=7)
        self.per_slot = cfg.slot_size // cfg.synth_hop
        self.refine = nn.Linear(W, self.per_slot * W)
        self.hop_decoder = ConvStack(fine, W, kernel=7)
        self.head = nn.Linear(W, 2 * cfg.num_bands + 1)
        self.synth = SourceFilter(cfg)
        nn.init.normal_(self.head.weight, std=0.01)
        with torch.no_grad():
            self.head.bias.fill_(-5.0)
            self.head.bias[-1:].fill_(-1.0)

    # -- halves ------------------------------------------------------------------------------

    def latents(self, audio: Tensor, state: dict | None = None) -> tuple[Tensor, dict]:
        """audio (B, N), N a multiple of frame_size -> latents (B, T, E), state."""
        s = state or {}
        features, past = self.analysis(audio, s.get("past"))
        x, slot = self.slot_encoder(self.feature_in(features), s.get("slot"))
        x = self.merge(x.reshape(x.shape[0], -1, self.cfg.slots * self.cfg.width))
        x, frame = self.frame_encoder(x, s.get("frame"))
        return x, {"past": past, "slot": slot, "frame": frame}

    def controls(self, z: Tensor, state: dict | None = None) -> tuple[tuple, dict]:
        """latents (B, T, E) -> (harmonic, noise (B, J, bands), f0 Hz (B, J)), J = 10 ms hops."""
        s, B = state or {}, z.shape[0]
        x, frame = self.frame_decoder(z, s.get("frame"))
        x, slot = self.slot_decoder(self.split(x).view(B, -1, self.cfg.decoder_width), s.get("slot"))
        x, hop = self.hop_decoder(self.refine(x).view(B, -1, self.cfg.decoder_width), s.get("hop"))
        out = self.head(x).float()
        harmonic, noise, pitch = out.split([self.cfg.num_bands, self.cfg.num_bands, 1], -1)
        low, high = math.log(self.cfg.f0_min), math.log(self.cfg.f0_max)
        f0 = (low + (high - low) * torch.sigmoid(pitch[..., 0])).exp()
        return (harmonic.clamp(-14, 6), noise.clamp(-14, 6), f0), {"frame": frame, "slot": slot, "hop": hop}

    def dequantise(self, codes: Tensor, semantic: int | None = None) -> Tensor:
        """codes (B, k, T), the first `semantic` of them semantic (None: all that can be) -> latents (B, T, E).

        A side without codes adds nothing. Both sides are quantised on their own, so that either may be cut short.
        """
        k = self.cfg.num_semantic if semantic is None else semantic
        z = self.semantic_out(self.semantic.decode(codes[:, :k]))
        return z + self.acoustic_out(self.acoustic.decode(codes[:, k:])) if codes.shape[1] > k else z

    # -- public ------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, audio: Tensor, num_codebooks: int | None = None) -> Tensor:
        """audio (B, 1, N) at sample_rate -> codes (B, K, ceil(N / frame_size)). ValueError for wrong shape or no samples."""
        self._check_audio(audio)
        pad = -audio.shape[-1] % self.cfg.frame_size
        codes, _ = self.encode_stream(F.pad(audio, (0, pad)), None, num_codebooks)
        return codes

    @torch.inference_mode()
    def encode_stream(self, audio: Tensor, state: dict | None = None, num_codebooks: int | None = None) -> tuple[Tensor, dict]:
        """audio (B, 1, n * frame_size) -> codes (B, K, n), state. Whole frames only: buffer what is left over."""
        self._check_audio(audio)
        if audio.shape[-1] % self.cfg.frame_size:
            raise ValueError(f"a stream takes whole frames of {self.cfg.frame_size} samples, got {audio.shape[-1]}: buffer the rest")
        K = self.cfg.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= K <= self.cfg.num_codebooks:
            raise ValueError(f"num_codebooks {K} must be 1..{self.cfg.num_codebooks}: change --num_codebooks")
        audio = torch.nan_to_num(audio[:, 0].float()).clamp(-1, 1)
        x, state = self.latents(audio, state)
        x = x.float()
        codes = self.semantic.encode(self.semantic_in(x), min(K, self.cfg.num_semantic))
        if K > self.cfg.num_semantic:
            codes = torch.cat([codes, self.acoustic.encode(self.acoustic_in(x), K - self.cfg.num_semantic)], 1)
        return codes, state

    @torch.inference_mode()
    def decode(self, codes: Tensor, semantic: int | None = None) -> Tensor:
        """codes (B, k, T), k <= num_codebooks -> audio (B, 1, T * frame_size). semantic: see dequantise."""
        return self.decode_stream(codes, None, semantic)[0]

    @torch.inference_mode()
    def decode_stream(self, codes: Tensor, state: dict | None = None, semantic: int | None = None) -> tuple[Tensor, dict]:
        """codes (B, k, t) -> audio (B, 1, t * frame_size), state. Zero frames give zero samples. semantic: see dequantise."""
        self._check_codes(codes, semantic)
        if codes.shape[2] == 0:
            return torch.zeros(codes.shape[0], 1, 0, device=codes.device), state or {}
        s = state or {}
        controls, net = self.controls(self.dequantise(codes, semantic), s.get("net"))
        audio, synth = self.synth(*controls, s.get("synth"))
        return audio[:, None].clamp(-1, 1), {"net": net, "synth": synth}

    def _check_audio(self, audio: Tensor) -> None:
        if audio.dim() != 3 or audio.shape[1] != 1:
            raise ValueError(f"audio must be (batch, 1, samples) mono at {self.cfg.sample_rate} Hz, got shape {tuple(audio.shape)}")
        if audio.shape[-1] == 0:
            raise ValueError("audio has no samples")

    def _check_codes(self, codes: Tensor, semantic: int | None = None) -> None:
        acoustic = 0 if semantic is None else codes.shape[1] - semantic
        if semantic is not None and not (0 < semantic <= self.cfg.num_semantic and acoustic <= self.cfg.num_codebooks - self.cfg.num_semantic):
            raise ValueError(f"{semantic} semantic and {acoustic} acoustic codes a frame, but this codec has {self.cfg.num_semantic} and "
                             f"{self.cfg.num_codebooks - self.cfg.num_semantic}: change --num_codebooks or num_semantic")
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.cfg.num_codebooks:
            raise ValueError(f"codes must be (batch, 1..{self.cfg.num_codebooks} codebooks, frames), got {tuple(codes.shape)}: change --num_codebooks")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.cfg.codebook_size):
            raise ValueError(f"codes must be 0..{self.cfg.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}: are these codes of another codec?")


def code_statistics(codes: Tensor, size: int) -> dict:
    """codes (K, M) -> normalised entropy (1 = uniform) and share of unused codes, per codebook."""
    entropy, dead = [], []
    for row in codes:
        p = torch.bincount(row, minlength=size).double() / max(1, row.numel())
        entropy.append(float(-(p[p > 0] * p[p > 0].log()).sum() / math.log(size)))
        dead.append(float((p == 0).double().mean()))
    return {"entropy": entropy, "dead": dead}
