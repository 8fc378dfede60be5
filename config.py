"""Every knob of the project: strict dataclasses, presets on one screen, JSON in and out, CLI flags.

Standard library only, so that `--help` of any script is instant. Nothing here knows of torch.
`python config.py` prints parameter counts and a memory plan for every preset.

    from config import model_preset, CodecConfig
    cfg = model_preset("nano", dropout=0.1)
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path

MOODS = ("neutral", "happy", "excited", "sad", "angry", "calm", "worried", "surprised")
# Symbols of the phone alphabet (Misaki's American English); "_" is silence. Stress marks are not phones.
PHONES = "_AIOTWYbdfhijklmnpstuvwzæðŋɐɑɔəɛɜɡɪɹɾʃʊʌʒʤʧʔθᵊᵻ"

PRECISIONS = ("fp32", "bf16", "int8", "int4-depth")      # what a model computes in when it talks (quantisation.py)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


# ----------------------------------------------------------------------------- codec

@dataclass
class CodecConfig:
    """The speech codec: audio (B, 1, N) at `sample_rate` <-> codes (B, K, T) at `frame_rate`."""
    sample_rate: int = 24000          # Hz
    frame_size: int = 1920            # samples per code frame; 24000 / 1920 = 12.5 Hz
    slots: int = 4                    # encoder sub-frames (phone labels) per frame: 20 ms each
    num_codebooks: int = 32
    num_semantic: int = 10            # codebooks 1..num_semantic carry the words
    codebook_size: int = 1024
    semantic_dim: int = 32            # width of the space in which semantic codes are chosen
    acoustic_dim: int = 256           # the same for acoustic codes
    num_mels: int = 80
    num_low_bins: int = 96            # fine linear bins below 1125 Hz: pitch is read from these
    width: int = 256                  # encoder at the slot rate
    latent: int = 320                 # width at the frame rate
    encoder_layers: int = 4
    latent_layers: int = 2
    decoder_width: int = 384          # decoder at the slot rate, and at the hop rate
    decoder_layers: int = 7           # a third of them at the hop rate
    synth_hop: int = 240              # samples per spectral frame of the source-filter head (10 ms)
    synth_fft: int = 960              # its transform: 40 ms; the window is two hops, the rest rings out
    num_bands: int = 100              # spectral envelope points, warped in frequency
    f0_min: float = 50.0              # Hz
    f0_max: float = 600.0
    phones: str = PHONES
    teacher: str = "phone times of the synthesiser (20 ms labels), read from the quantised sum of codebooks 1..10"

    def __post_init__(self):
        _require(self.frame_size % (self.slots * self.synth_hop) == 0,
                 f"frame_size {self.frame_size} must be a multiple of slots x synth_hop = {self.slots * self.synth_hop}: change --frame_size or --synth_hop")
        _require(0 < self.num_semantic <= self.num_codebooks,
                 f"num_semantic {self.num_semantic} must be 1..num_codebooks ({self.num_codebooks}): change --num_semantic")
        _require(self.synth_fft % self.synth_hop == 0, f"synth_fft {self.synth_fft} must be a multiple of synth_hop {self.synth_hop}: change --synth_fft")

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.frame_size

    @property
    def slot_size(self) -> int:
        return self.frame_size // self.slots


def codec_columns(count: int, wanted_semantic: int, codec_semantic: int) -> list[int]:
    """Which of the codec's codebooks a model of `count` reads: its semantic ones from the front, the others from the first acoustic one on.

    12 = 3 + 9 of a codec of 10 + 22: 0, 1, 2, 10, ..., 18. All the codec's semantic ones, or more: simply the first `count`.
    """
    semantic = min(count, wanted_semantic, codec_semantic)
    return [*range(semantic), *range(codec_semantic, codec_semantic + count - semantic)]


# ----------------------------------------------------------------------------- model

@dataclass
class TransformerConfig:
    """One Llama-shaped stack (backbone or depth decoder). Source: CSM_SPEC 3.1 (torchtune llama3_2)."""
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    max_positions: int = 2048
    rope_base: float = 500000.0
    rope_scale_factor: float = 32.0   # llama3 scaling; 1 switches it off
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_old_context: int = 8192
    norm_eps: float = 1e-5

    def __post_init__(self):
        _require(self.width % self.heads == 0, f"width {self.width} is not a multiple of heads {self.heads}: change --heads")
        _require(self.heads % self.kv_heads == 0, f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: change --kv_heads")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class CrossAttentionConfig:
    """Voice-text cross-attention: voice reads single text tokens, text reads pooled prosody."""
    enabled: bool = True
    every: int = 3                    # a cross-attention after every n-th backbone layer
    heads: int = 4
    width: int = 256                  # of queries, keys and values; also of the text reader
    reader_layers: int = 4            # local bidirectional layers over one turn's text
    reader_kernel: int = 7
    guided: bool = True               # a reading position (bytes already spoken) biases voice -> text attention
    max_distance: int = 24            # learned bias for text positions within +-max_distance of the reading position
    max_advance: int = 12             # text tokens one audio frame may consume
    reading_noise: float = 0.15       # share of training frames whose reading position is 1 or 2 off: the advance head learns to correct itself
    text_window: int = 256            # positions a text position sees in self-attention
    pool_frames: int = 5              # voice frames per prosody block (0.4 s)
    phone_head: bool = True           # auxiliary CTC on the text reader (letters to phones)
    phones: str = PHONES

    def __post_init__(self):
        _require(self.width % self.heads == 0, f"cross-attention width {self.width} is not a multiple of its heads {self.heads}: change --cross.heads")
        _require(self.every > 0, f"every {self.every} must be positive: change --cross.every")


@dataclass
class MemoryConfig:
    """Dual conversational memory: one semantic and one prosodic slot per finished turn."""
    enabled: bool = True
    every: int = 3                    # read after every n-th backbone layer
    heads: int = 4
    width: int = 128
    max_slots: int = 64               # turns remembered
    semantic_half_life: float = 16.0  # turns; initial value of a learned decay
    prosodic_half_life: float = 4.0
    window_turns: int = 6             # turns kept as frames; older ones live on as slots

    def __post_init__(self):
        _require(self.width % self.heads == 0, f"memory width {self.width} is not a multiple of its heads {self.heads}: change --memory.heads")


@dataclass
class EarConfig:
    """Words of a heard turn by CTC over its codes (ear.py); trained by train_ear.py, everything else at rest."""
    enabled: bool = False
    width: int = 256
    heads: int = 4
    kernel: int = 9                   # of the depthwise convolutions
    coarse_layers: int = 1            # at the frame rate
    layers: int = 4                   # at upsample times the frame rate
    upsample: int = 3                 # letters a frame can hold (37.5 a second at 12.5 Hz; people say 10 to 25)
    max_frames: int = 512             # of a turn that is read at once (41 s)
    letters: str = "abcdefghijklmnopqrstuvwxyz' .,?!-"

    def __post_init__(self):
        _require(self.width % (2 * self.heads) == 0, f"ear width {self.width} is not a multiple of twice its heads {self.heads}: change --ear.width")
        _require(self.kernel % 2 == 1, f"ear kernel {self.kernel} must be odd: change --ear.kernel")
        _require(min(self.upsample, self.layers, self.max_frames) >= 1 and self.coarse_layers >= 0, "an ear needs at least one layer, step and frame: change --ear.layers, --ear.upsample or --ear.max_frames")
        _require(len(set(self.letters)) == len(self.letters) > 0, "the ear's letters must be different ones: change --ear.letters")


@dataclass
class ModelConfig:
    """The CSM model. Frames are (B, S, K + 1): K audio columns, then one text column (CSM_SPEC 3.3)."""
    name: str
    backbone: TransformerConfig
    depth: TransformerConfig
    num_codebooks: int = 32           # K codebooks of the codec:
    num_semantic: int = 10            # so many from its first one on, the others from its first acoustic one on (codec_columns)
    audio_vocab: int = 1025           # V: rows per codebook: the codec's codes and the offset (CSM-1B: 2051)
    code_offset: int = 1              # codec code c is token c + code_offset, so token 0 means end alone (CSM-1B: 0)
    text_vocab: int = 320             # bytes and special tokens (CSM-1B: 128256)
    tokenizer: str = "bytes"          # or the path of a tokenizer.json
    pad_id: int = 256                 # text ids from here on are special tokens; padding of text
    eot_id: int = 258                 # end of text: the position that predicts a spoken turn's first frame
    listen_id: int = 259              # the same for a turn that is heard
    transcript_id: int = 260          # first token of the text that follows heard audio
    frame_rate: float = 12.5          # Hz
    text_head: bool = True
    depth_fraction: float = 0.0625    # share of audio frames that train the depth decoder (1/16)
    depth_decay: float = 0.0          # weight of the n-th semantic or acoustic codebook in the depth loss: n ** -depth_decay; 0: all alike
    dropout: float = 0.0
    recompute: bool = False           # training keeps each backbone block's input only and computes the rest again: less memory, more time
    code_noise: float = 0.0           # share of heard frames exchanged in training: generation hears its own mistakes too
    cross: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    ear: EarConfig = field(default_factory=EarConfig)
    loss_weights: dict = field(default_factory=lambda: {"c0": 1.0, "depth": 1.0, "text": 0.1, "advance": 0.5, "phones": 0.3})

    def __post_init__(self):
        _require(0 < self.depth_fraction <= 1, f"depth_fraction {self.depth_fraction} must be in (0, 1]: change --depth_fraction")
        _require(self.num_codebooks >= 2, f"num_codebooks {self.num_codebooks} must be at least 2: change --num_codebooks")
        _require(0 <= self.code_noise < 1, f"code_noise {self.code_noise} must be in [0, 1): change --code_noise")
        _require(self.depth_decay >= 0, f"depth_decay {self.depth_decay} must be at least 0: change --depth_decay")
        _require(self.depth.max_positions >= self.num_codebooks, f"depth.max_positions {self.depth.max_positions} < num_codebooks {self.num_codebooks}: raise --depth.max_positions")

    @property
    def depth_weights(self) -> list[float]:
        """Weights of codebooks 2..K in the depth loss, mean 1: coarse codes decide more of what is heard than fine ones."""
        # the very first codebook has a loss of its own, so the second is the first here
        raw = [(k if k < self.num_semantic else k - self.num_semantic + 1) ** -self.depth_decay for k in range(1, self.num_codebooks)]
        return [w * len(raw) / sum(raw) for w in raw]


def _depth(layers, width, ffn, heads, kv_heads) -> TransformerConfig:
    return TransformerConfig(layers, width, ffn, heads, kv_heads, max_positions=64)


OFF = {"cross": CrossAttentionConfig(enabled=False), "memory": MemoryConfig(enabled=False), "text_head": False}

MODEL_PRESETS = {
    # laptop CPU; the shipped weights. Of the codec's codebooks the first 3 semantic and the first 9 acoustic ones: the
    # other semantic ones say little that text and context foretell (LOG.md).
    "nano": lambda: ModelConfig("nano", TransformerConfig(7, 320, 768, 5, 5), _depth(2, 256, 640, 4, 4), num_codebooks=12, num_semantic=3, depth_fraction=0.25, depth_decay=0.5,
                                cross=CrossAttentionConfig(every=2), memory=MemoryConfig(window_turns=4)),
    # seconds on a CPU, for tests
    "test": lambda: ModelConfig("test", TransformerConfig(3, 64, 128, 4, 2, max_positions=512), _depth(2, 32, 64, 2, 1), num_codebooks=8, num_semantic=4,
                                audio_vocab=65, depth_fraction=1.0, cross=CrossAttentionConfig(heads=2, width=32, reader_layers=2, reading_noise=0.0),
                                memory=MemoryConfig(heads=2, width=16, max_slots=8, window_turns=2)),
    "tiny": lambda: ModelConfig("tiny", TransformerConfig(18, 1024, 4096, 16, 4), _depth(4, 512, 2048, 8, 2)),
    "blog": lambda: ModelConfig("blog", TransformerConfig(20, 1024, 4736, 16, 4), _depth(4, 768, 3072, 8, 2), num_codebooks=16, num_semantic=8),
    "small": lambda: ModelConfig("small", TransformerConfig(16, 2048, 8192, 32, 8), TransformerConfig(4, 1024, 8192, 8, 2, max_positions=33)),
    "medium": lambda: ModelConfig("medium", TransformerConfig(32, 4096, 13312, 32, 8), _depth(4, 1024, 8192, 8, 2), recompute=True),
    "large": lambda: ModelConfig("large", TransformerConfig(80, 8192, 28672, 64, 8), _depth(6, 1536, 12288, 12, 4), recompute=True),
    # Sesame's CSM-1B, exactly: our additions off
    "csm-1b": lambda: ModelConfig("csm-1b", TransformerConfig(16, 2048, 8192, 32, 8), TransformerConfig(4, 1024, 8192, 8, 2, max_positions=33),
                                  audio_vocab=2051, code_offset=0, text_vocab=128256, tokenizer="sesame/csm-1b",
                                  pad_id=128000, eot_id=128001, listen_id=128004, transcript_id=128005, **OFF),
}


def model_preset(name: str, **overrides) -> ModelConfig:
    """The preset `name` with fields replaced. Raises ValueError naming the presets that exist."""
    if name not in MODEL_PRESETS:
        raise ValueError(f"unknown model size {name!r}: use --model_size {'|'.join(MODEL_PRESETS)}")
    return dataclasses.replace(MODEL_PRESETS[name](), **overrides)


def count_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Parameters of the CSM part (our additions not counted), by block. Source: CSM_SPEC 3.1."""
    def stack(t: TransformerConfig) -> int:
        attn = 2 * t.width * t.width + 2 * t.width * t.kv_heads * t.head_dim
        return t.layers * (attn + 3 * t.width * t.ffn + 2 * t.width) + t.width

    d, dd, k, v = cfg.backbone.width, cfg.depth.width, cfg.num_codebooks, cfg.audio_vocab
    parts = {"backbone": stack(cfg.backbone), "depth": stack(cfg.depth), "text_embeddings": cfg.text_vocab * d,
             "audio_embeddings": k * v * d, "projection": d * dd, "c0_head": d * v, "audio_head": (k - 1) * dd * v}
    return parts | {"total": sum(parts.values())}


def _cross_attention(width: int, source: int, inner: int) -> int:
    return width + 2 * width * inner + 2 * source * inner + inner + 1          # norm; q, out; k, v; null key; gate


def count_additions(cfg: ModelConfig) -> dict[str, int]:
    """Parameters of what we add to CSM, by block; empty for a CSM without additions."""
    d, c, m = cfg.backbone.width, cfg.cross, cfg.memory
    parts = {}
    if c.enabled:
        n, w, phones = cfg.backbone.layers // c.every, c.width, 2 * len(c.phones)
        reader_layer = w * c.reader_kernel + 2 * w + 6 * w * w
        parts["reader"] = cfg.text_vocab * w + c.reader_layers * reader_layer + w + (phones * (w + 1) if c.phone_head else 0)
        parts["read_text"] = n * (_cross_attention(d, w, w) + (2 * c.max_distance + 2) * c.heads)
        parts["hear_prosody"] = n * (_cross_attention(d, d, w) + c.heads)
        parts["advance_head"] = (d + 1) * (c.max_advance + 1)
    if m.enabled:
        parts["memory_writer"] = (3 * d + 2) * m.width
        parts["read_memory"] = cfg.backbone.layers // m.every * (_cross_attention(d, m.width, m.width) + 2 * m.width + 2 * m.heads)
    if cfg.text_head:
        parts["text_head"] = cfg.text_vocab * d
    if cfg.ear.enabled:
        e, w = cfg.ear, cfg.ear.width
        block = 3 * w + 4 * w * w + (e.kernel + 1) * w + 6 * w * w
        parts["ear"] = cfg.num_codebooks * cfg.audio_vocab * w + (e.coarse_layers + e.layers) * block + (w + 1) * w * e.upsample + w + (w + 1) * (1 + len(e.letters))
    return parts


def count_all(cfg: ModelConfig) -> int:
    return count_parameters(cfg)["total"] + sum(count_additions(cfg).values())


# ----------------------------------------------------------------------------- memory

VOICE_SHARE = 0.5        # of the positions of a conversation that are audio frames: letters and frames come at about the same rate


def activation_bytes(cfg: ModelConfig, positions: int, voice_share: float = VOICE_SHARE) -> dict[str, int]:
    """What a training forward of `positions` keeps for the backward pass under bf16 autocast with fused attention, by part.

    Per position and Llama block: each norm keeps its input and the unit vector in float32 and its output in bf16 (20 D),
    attention the projections, the turned q and k, its output twice (8 D + 6 KV), the feed-forward four hidden vectors (8 F).
    """
    def block(t: TransformerConfig) -> int:
        return 28 * t.width + 6 * t.kv_heads * t.head_dim + 8 * t.ffn

    d, c, voice = cfg.backbone.width, cfg.cross, voice_share * positions
    frames = max(1, voice * cfg.depth_fraction)
    parts = {"backbone": positions * (cfg.backbone.layers * block(cfg.backbone) + 10 * d),
             "depth": frames * cfg.num_codebooks * (cfg.depth.layers * block(cfg.depth) + 10 * cfg.depth.width),
             "logits": 4 * cfg.audio_vocab * (voice + frames * (cfg.num_codebooks - 1)) + 4 * cfg.text_vocab * (positions - voice) * cfg.text_head}
    if c.enabled:
        n = cfg.backbone.layers // c.every
        parts["cross"] = n * positions * (20 * d + 8 * c.width) + (positions - voice) * c.reader_layers * 30 * c.width
    return {name: int(value) for name, value in parts.items()}


def training_bytes(cfg: ModelConfig, positions: int = 4096, gpus: int = 1, recompute: bool = False) -> dict[str, int]:
    """Bytes per GPU while training: float32 weights, gradients, optimiser (Muon for hidden matrices, AdamW for the rest) and
    average, all split evenly over the GPUs; bf16 copies of the weights in use; activations of `positions` per GPU.

    recompute: only the input of each backbone block is kept, and one block's activations at a time.
    """
    total, matrices = count_all(cfg), count_matrices(cfg)
    states = {"weights": 4 * total, "gradients": 4 * total, "optimiser": 4 * matrices + 8 * (total - matrices), "average": 4 * total}
    parts = {name: -(-value // gpus) for name, value in states.items()}
    layer = (count_parameters(cfg)["backbone"] - cfg.backbone.width) // cfg.backbone.layers
    parts["bf16 copies"] = 2 * total if gpus == 1 else 4 * layer               # alone: all of them; split: this layer and the next
    kept = activation_bytes(cfg, positions)
    if recompute:
        kept["backbone"] = kept["backbone"] // cfg.backbone.layers + 4 * cfg.backbone.width * cfg.backbone.layers * positions
    parts["activations"] = sum(kept.values())
    return parts | {"total": sum(parts.values())}


def count_matrices(cfg: ModelConfig) -> int:
    """Parameters in matrices between hidden layers: those that Muon trains (train.split_parameters)."""
    def stack(t: TransformerConfig) -> int:
        return t.layers * (2 * t.width * t.width + 2 * t.width * t.kv_heads * t.head_dim + 3 * t.width * t.ffn)

    d, c, m = cfg.backbone.width, cfg.cross, cfg.memory
    total = stack(cfg.backbone) + stack(cfg.depth) + d * cfg.depth.width
    if c.enabled:
        total += c.reader_layers * 6 * c.width ** 2 + cfg.backbone.layers // c.every * (4 * d * c.width + 2 * c.width * (c.width + d))
    if m.enabled:
        total += 3 * d * m.width + cfg.backbone.layers // m.every * (2 * d * m.width + 2 * m.width ** 2)
    return total


def conversation_bytes(cfg: ModelConfig, size: int = 2) -> dict[str, int]:
    """What one conversation holds at the full window, in numbers of `size` bytes: KV cache, what text may hear of the voice, memory slots."""
    b = cfg.backbone
    heard = b.layers // cfg.cross.every * b.max_positions * b.width if cfg.cross.enabled else 0
    slots = cfg.memory.max_slots * (2 * cfg.memory.width * size + 8) if cfg.memory.enabled else 0
    return {"kv_cache": size * b.layers * 2 * b.kv_heads * b.head_dim * b.max_positions, "heard": size * heard, "memory": slots}


# ----------------------------------------------------------------------------- sampling and training

@dataclass
class SamplingConfig:
    """How codes are drawn. temperature 0 is greedy."""
    temperature: float = 0.5          # first codebook
    top_k: int = 30
    depth_temperature: float = 0.6
    depth_top_k: int = 30
    text_temperature: float = 0.7
    max_seconds: float = 30.0         # a turn is ended here at the latest
    lead_seconds: float = 2.0         # so much of what a speaker said or of its voice is heard by the model as the beginning of its turn, which keeps the voice; 0: nothing
    mood_strength: float = 2.0        # how far that beginning is put into the mood of the turn, times the moods of the training characters; 0: it stays as it was said
    seed: int = 0

    def __post_init__(self):
        _require(min(self.temperature, self.depth_temperature, self.text_temperature) >= 0, "temperatures must be at least 0: change --temperature")
        _require(self.top_k >= 1 and self.depth_top_k >= 1, "top_k must be at least 1: change --top_k")
        _require(self.max_seconds > 0, "max_seconds must be positive: change --max_seconds")
        _require(self.lead_seconds >= 0, "lead_seconds must be at least 0: change --lead_seconds")
        _require(0 <= self.mood_strength <= 3, "mood_strength must be 0..3: change --mood_strength")


@dataclass(frozen=True)
class EndpointConfig:
    """When a turn begins and ends (endpointing.py). Times in milliseconds, probabilities of the voice activity network."""
    vad_threshold: float = 0.5        # from here on a step of 32 ms is speech
    vad_release: float = 0.35         # below this it is silence again
    start_ms: int = 96
    barge_in_ms: int = 256            # speech that interrupts a reply
    pause_ms: int = 256               # silence at which the turn so far is written down
    end_ms: int = 640                 # silence that ends a turn, nothing known of its words
    finished_ms: int = 448            # where the words so far make a sentence
    unfinished_ms: int = 1216         # where they break off
    lead_ms: int = 320                # sound kept from before the speech
    longest_turn: float = 30.0        # seconds; a turn is ended here at the latest

    def __post_init__(self):
        _require(0 < self.vad_release <= self.vad_threshold < 1, "0 < vad_release <= vad_threshold < 1 does not hold: change --vad_threshold or --vad_release")
        _require(0 < self.start_ms <= self.barge_in_ms, "barge_in_ms is shorter than start_ms: change --barge_in_ms or --start_ms")
        _require(0 < self.pause_ms <= self.finished_ms <= self.end_ms <= self.unfinished_ms,
                 "pause_ms <= finished_ms <= end_ms <= unfinished_ms does not hold: change --pause_ms, --finished_ms, --end_ms or --unfinished_ms")
        _require(0 <= self.lead_ms <= 2000, "lead_ms must be 0..2000: change --lead_ms")
        _require(0.5 <= self.longest_turn <= 120, "longest_turn must be 0.5..120 s: change --longest_turn")


@dataclass(frozen=True)
class LiveConfig:
    """A live conversation (live.py)."""
    ahead_seconds: float = 2.0        # speech is made so far ahead of what can have been heard
    partial_seconds: float = 1.5      # between two transcripts of a turn that goes on; 0: none
    history: int = 24                 # turns that a responder is shown
    user_sound: bool = True           # the model hears the user's voice, not the words alone
    user_seconds: float = 8.0         # the newest of it, at most
    stream_sound: bool = True         # the voice is taken in while the user speaks, not after the turn (which is what happens where a turn exceeds user_seconds)

    def __post_init__(self):
        _require(min(self.ahead_seconds, self.user_seconds) > 0 <= self.partial_seconds, "times must be positive: change --ahead_seconds, --user_seconds or --partial_seconds")
        _require(self.history >= 1, "history must be at least 1: change --history")


@dataclass(frozen=True)
class BatchingConfig:
    """Many conversations on one model (batching.py)."""
    max_turns: int = 8                # turns that are made at the same time
    max_waiting: int = 32             # further ones that wait for their turn; beyond them they are turned away
    prefill_positions: int = 64       # positions that newcomers take in between two frames of the others
    ahead_seconds: float = 4.0        # a turn that is so far ahead of its listener rests, which leaves the machine to the others

    def __post_init__(self):
        _require(self.max_turns >= 1, "max_turns must be at least 1: change --max_turns")
        _require(self.max_waiting >= 0, "max_waiting must be at least 0: change --max_waiting")
        _require(self.prefill_positions >= 1, "prefill_positions must be at least 1: change --prefill_positions")
        _require(self.ahead_seconds > 0, "ahead_seconds must be positive: change --ahead_seconds")


@dataclass
class TrainConfig:
    """One training run of the CSM model (train.py)."""
    model_size: str = "nano"
    data: str = "data/synthetic"      # folder written by collect_data.py and dataset_pipeline.py; several with commas between
    output: str = "checkpoints"
    codec: str = "pretrained/codec"
    init_from: str = ""               # weights to start from; empty: the shipped ones of this size where they exist
    from_scratch: bool = False
    carry_over: str = ""              # with --from_scratch: a trained model of another codec or size, of which what fits is taken
    lora: bool = False                # train low-rank adapters only (a voice); writes output/adapter, a few MB
    lora_rank: int = 8
    lora_alpha: float = 16.0          # the adapters' change is multiplied by lora_alpha / lora_rank
    init_lr_scale: float = 0.2        # factor on both learning rates when starting from trained weights
    resume: str = ""
    max_steps: int = 100
    batch_positions: int = 4096       # sequence positions per micro-batch (length-packed)
    accumulate: int = 1
    max_context_turns: int = 3        # earlier turns in a training window
    lr: float = 2e-3
    muon_lr: float = 0.02             # matrices of the backbone and depth decoder; 0: AdamW for all
    min_lr_ratio: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.999                # 0 switches the averaged copy off
    precision: str = "bf16"           # bf16 | fp32
    compile: bool = False             # torch.compile of every block: slower to start, faster where there is a GPU
    recompute: bool = False           # keep less for the backward pass and compute it again (medium and large do it anyway)
    parallel: str = "auto"            # several ranks: auto (by the memory plan) | ddp | fsdp
    dry_run: bool = False             # say how the run would be spread over --ranks of --gpu_memory_gb each, and stop
    ranks: int = 0                    # dry run: processes to pretend; 0: those there are
    gpu_memory_gb: float = 0.0        # memory the plan may use per rank; 0: what the device has
    lexicon_words: int = 64           # words per step for the letter-to-phone loss; 0: none
    eval_every: int = 250
    eval_batches: int = 8
    save_every: int = 100
    save_minutes: float = 3.0         # also save when the last time was this long ago; 0: by steps alone
    samples: int = 3                  # held-out lines that the model says, as sound and picture; 0: none
    sample_every: int = 0             # steps between them; 0: with every validation; -1: only at the end
    scored: int = 0                   # held-out conversations that the model holds and the scores of evaluation_framework.py judge; 0: none (some ten seconds each on a free CPU core)
    score_every: int = 0              # steps between them; 0: with every validation; -1: only at the end
    log_every: int = 10
    minutes: float = 0.0              # the run lasts this long (schedule included), whatever max_steps says; 0: max_steps counts
    seed: int = 1234
    num_workers: int = 0              # processes that prepare batches ahead (same batches; a process makes millions of positions per second); 0: the main one does
    device: str = "auto"
    wandb: str = "offline"            # online | offline | disabled

    def __post_init__(self):
        _require(self.wandb in ("online", "offline", "disabled"), f"wandb {self.wandb!r}: use --wandb online|offline|disabled")
        _require(self.precision in ("bf16", "fp32"), f"precision {self.precision!r}: use --precision bf16|fp32")
        _require(min(self.samples, self.scored) >= 0, "samples and scored count lines and conversations: use --samples 0 or --scored 0 for none")
        _require(self.max_steps > 0 and self.accumulate > 0, "max_steps and accumulate must be positive: change --max_steps")
        _require(not self.lora or (self.lora_rank > 0 and self.lora_alpha > 0), "lora_rank and lora_alpha must be positive: change --lora_rank")
        _require(not self.carry_over or self.from_scratch, "carry_over fills a new model: add --from_scratch, or use --init_from for weights of the same codec and size")
        _require(not (self.lora and self.from_scratch), "adapters need a trained model below them: leave out --from_scratch or --lora")
        _require(not (self.lora and self.parallel == "fsdp"), "adapters are trained by ranks that hold the whole model: use --parallel ddp or leave out --lora")
        _require(self.parallel in ("auto", "ddp", "fsdp"), f"parallel {self.parallel!r}: use --parallel auto|ddp|fsdp")
        _require(self.ranks >= 0 and self.gpu_memory_gb >= 0, "ranks and gpu_memory_gb must be at least 0: change --ranks or --gpu_memory_gb")


@dataclass
class CodecTrainConfig:
    """One training run of the codec (train_codec.py)."""
    data: str = "data/synthetic"      # folder of collect_data.py; several with commas between
    recordings: str = ""              # a folder of people's recordings besides (WAV, FLAC, .g722 ...); no transcripts needed
    recorded: float = 0.0             # share of crops that come from them; 0: as they stand among all turns
    output: str = "checkpoints/codec"
    drawn: str = ""                   # a file of draw_codes.py: the decoder learns from what a model draws as well
    resume: str = ""
    init_from: str = ""               # weights to start from (a training checkpoint or a pretrained folder); the optimiser starts anew
    decoder_only: bool = False        # codes stay as they are: tokens and models made with them stay valid
    max_steps: int = 20000
    minutes: float = 0.0
    batch: int = 8
    seconds: float = 1.92             # length of a training crop; a whole number of frames
    lr: float = 1e-3
    warmup_steps: int = 200
    min_lr_ratio: float = 0.05
    grad_clip: float = 1.0
    weight_decay: float = 0.01
    dropout_probability: float = 0.6  # quantiser dropout: share of crops decoded from fewer codebooks
    sure_codebooks: int = 1           # the first ones, which are never exchanged
    noise_probability: float = 0.5    # share of crops whose later codes are exchanged, as a model would mis-sample them
    augment: float = 0.25             # share of crops with a narrower band, and again with noise
    ema: float = 0.995                # codebook decay
    adversarial: float = 1.0          # weight of what the discriminators say; 0: there are none
    adversarial_start: int = 2000     # step from which they learn; their weight grows from 0 over the next 500 steps; with decoder_only from the first one
    adversarial_seconds: float = 0.48  # part of each crop that they see
    discriminator_lr: float = 2e-3    # at a quarter of it they told decoded speech apart in 53 of 100 patches: too slow to teach (LOG.md)
    discriminator_width: int = 16
    discriminator_phase: bool = False  # they see phase too: for a decoder that can shape it, which a source-filter synthesiser cannot
    predicted_pitch: float = 0.2      # share of crops whose decoder is driven by the pitch it predicts, as when decoding; 0: all by the measured one
    precision: str = "bf16"           # bf16 | fp32
    eval_every: int = 1000            # held-out losses, use of the codebooks, samples; 0: only at the end
    save_every: int = 500
    log_every: int = 20
    seed: int = 1234
    device: str = "auto"
    wandb: str = "offline"
    # adversarial, features and words are multiplied by `adversarial` besides
    loss_weights: dict = field(default_factory=lambda: {"mel": 2.0, "stft": 1.0, "phones": 2.0, "f0": 1.0, "commit": 0.25, "adversarial": 1.0, "features": 2.0, "words": 1.5})

    def __post_init__(self):
        _require(self.precision in ("bf16", "fp32"), f"precision {self.precision!r}: use --precision bf16|fp32")
        _require(self.wandb in ("online", "offline", "disabled"), f"wandb {self.wandb!r}: use --wandb online|offline|disabled")
        _require(self.adversarial >= 0, f"adversarial {self.adversarial} must be at least 0: change --adversarial")
        _require(self.adversarial_seconds >= 0.1, f"adversarial_seconds {self.adversarial_seconds} must be at least 0.1: change --adversarial_seconds")
        _require(not self.drawn or self.decoder_only, "drawn codes belong to one encoder, which must not change: add --decoder_only")
        _require(0 <= self.predicted_pitch <= 1, f"predicted_pitch {self.predicted_pitch} must be in [0, 1]: change --predicted_pitch")


# ----------------------------------------------------------------------------- JSON and CLI

def to_dict(cfg) -> dict:
    return dataclasses.asdict(cfg)


def from_dict(cls, data: dict, where: str = ""):
    """Strict inverse of to_dict: an unknown or mistyped key is a ValueError that names it."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in known:
            raise ValueError(f"unknown key {where}{key!r} for {cls.__name__}: one of {', '.join(known)}")
    values = {}
    for key, value in data.items():
        kind = hints[key]
        values[key] = from_dict(kind, value, f"{where}{key}.") if dataclasses.is_dataclass(kind) else value
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def save_json(cfg, path) -> None:
    Path(path).write_text(json.dumps(to_dict(cfg), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(cls, path):
    try:
        return from_dict(cls, json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config {path}: {error}") from None


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def add_flags(parser: argparse.ArgumentParser, cls, skip: tuple = (), only: tuple = ()) -> None:
    """One `--field` per simple field of the dataclass; defaults stand in the dataclass alone."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if f.name in skip or (only and f.name not in only) or kind not in (int, float, str, bool):
            continue
        if kind is bool:
            parser.add_argument(f"--{f.name}", type=_boolean, nargs="?", const=True, default=f.default, metavar="BOOL", help=f"default {f.default}")
        else:
            parser.add_argument(f"--{f.name}", type=kind, default=f.default, metavar=kind.__name__.upper(), help=f"default {f.default!r}")


def from_flags(cls, args: argparse.Namespace):
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in vars(args).items() if k in names})


class Parser(argparse.ArgumentParser):
    """ArgumentParser that suggests the nearest flag for an unknown one and exits with 2."""

    def error(self, message: str):
        import difflib
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, [o for a in self._actions for o in a.option_strings], 1)
            message += f" (did you mean {near[0]}?)" if near else " (see --help)"
        self.exit(2, f"error: {message}\n")


def _amount(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}" if value < 1e3 * size or unit == "GB" else f"{value / size:,.0f} {unit}"
    return f"{value / 1e3:.1f} kB"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def plan(positions: int, names=tuple(MODEL_PRESETS)) -> str:
    """The tables of `python config.py`."""
    gpus = (1, 8, 64, 512)
    counts = [["parameters", "all", "CSM", "additions", "backbone", "depth", "embeddings", "heads"]]
    training = [["training", "weights", "gradients", "optimiser", "average", "activations", "recomputed", *(f"{n} GPU{'s' * (n > 1)}" for n in gpus)]]
    talking = [["talking", "weights", "KV cache", "heard voice", "memory"]]
    for name in names:
        cfg = model_preset(name)
        csm, extra = count_parameters(cfg), sum(count_additions(cfg).values())
        parts = (csm["total"] + extra, csm["total"], extra, csm["backbone"], csm["depth"], csm["text_embeddings"] + csm["audio_embeddings"],
                 csm["projection"] + csm["c0_head"] + csm["audio_head"])
        counts.append([name, *(f"{n:,}" for n in parts)])
        full, lean = training_bytes(cfg, positions), training_bytes(cfg, positions, recompute=True)
        states = [_amount(full[k]) for k in ("weights", "gradients", "optimiser", "average", "activations")]
        training.append([name, *states, _amount(lean["activations"]), *(_amount(training_bytes(cfg, positions, n, True)["total"]) for n in gpus)])
        talking.append([name, _amount(2 * count_all(cfg)), *(_amount(n) for n in conversation_bytes(cfg).values())])
    return (f"{_table(counts)}\n\n{_table(training)}\n"
            f"{positions} positions per GPU, bf16 autocast, float32 weights; per GPU: everything but activations split over the GPUs, backbone recomputed.\n\n"
            f"{_table(talking)}\n16-bit weights and caches; per conversation at the full window of positions.")


def main(argv=None) -> int:
    parser = Parser(description="Print parameter counts and the memory that training and talking need, for all presets.")
    parser.add_argument("--batch_positions", type=int, default=TrainConfig.batch_positions, metavar="INT", help="positions per GPU and step (default %(default)s)")
    args = parser.parse_args(argv)
    if args.batch_positions < 1:
        parser.error(f"batch_positions {args.batch_positions} must be positive: change --batch_positions")
    print(plan(args.batch_positions))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
