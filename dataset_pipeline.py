"""Manifests to codec tokens to conversation windows to packed batches.

    python dataset_pipeline.py --data data/synthetic --codec pretrained/codec

First half: every turn's audio becomes codes, written as shards tokens/{split}-NNNNN.safetensors and
tokens/index.json; a shard that is there and right is not made again. Second half: ConversationDataset
cuts windows (a target turn and some earlier ones) from the shards and packs windows of like length.

B batch, S positions, K codebooks of the model, T frames of a turn, P length of a turn's text prefix.
"""
from __future__ import annotations

import gzip
import hashlib
import json
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from config import PHONES, ModelConfig, Parser, codec_columns
from runtime import Ranks, atomic_write, plain_errors, write_json

SPLITS = ("train", "validation", "test")
TOKENS_FORMAT = 1


def build_parser() -> Parser:
    parser = Parser(description="Turn the collected audio into codec tokens (shards that training reads).")
    parser.add_argument("--data", default="data/synthetic", help="folder written by collect_data.py")
    parser.add_argument("--codec", default="pretrained/codec", help="codec weights")
    parser.add_argument("--workers", type=int, default=2, help="threads that read audio files (default 2)")
    parser.add_argument("--device", default="auto", help="auto|cpu|cuda|mps")
    parser.add_argument("--fresh", action="store_true", help="make all shards again, for instance with another codec")
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import numpy as np               # noqa: E402
import torch                     # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save as tensor_bytes  # noqa: E402
from torch import Tensor         # noqa: E402
from tqdm import tqdm            # noqa: E402

from architecture import FrameBatch  # noqa: E402
from audio_io import read_audio  # noqa: E402
from checkpoint import check_codec, load_codec  # noqa: E402
from runtime import pick_device  # noqa: E402
from text_tokenizer import NUM_SPEAKERS, load_tokenizer  # noqa: E402

PHONE_ID = {symbol: i for i, symbol in enumerate(PHONES)}      # 0 is silence and padding


# ----------------------------------------------------------------------------- manifests to shards

def read_supervisions(data: Path, split: str) -> dict[str, list[dict]]:
    """Conversation id -> its supervisions in order of time, from a Lhotse manifest. ValueError when missing or malformed."""
    path = Path(data) / "manifests" / split / "supervisions.jsonl.gz"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: collect data first (python collect_data.py --output {data})")
    conversations: dict[str, list[dict]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                supervision = json.loads(line)
                conversations.setdefault(supervision["recording_id"], []).append(supervision)
    except (OSError, EOFError, json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged near line {len(conversations) and number + 1} ({error}): collect the data again") from None
    return {key: sorted(turns, key=lambda s: s["start"]) for key, turns in sorted(conversations.items())}


def consumed_bytes(words: list, text_bytes: int, frames: int, frame_seconds: float) -> np.ndarray:
    """(frames,) int16: bytes of the text spoken by the end of each frame.

    words: [[byte_start, byte_end, start_s, end_s], ...]; linear inside a word and inside the gap between two words.
    Punctuation after the last word is consumed within one frame; the last frame has consumed everything.
    """
    times, places = [0.0], [0.0]
    for first, last, start, end in sorted(words, key=lambda w: w[2]):
        times += [start, end]
        places += [first, last]
    times.append(times[-1] + frame_seconds)
    places.append(text_bytes)
    times = np.maximum.accumulate(np.asarray(times)) + 1e-9 * np.arange(len(times))      # np.interp wants rising times
    ends = frame_seconds * np.arange(1, frames + 1)
    consumed = np.floor(np.interp(ends, times, np.maximum.accumulate(places)) + 1e-6)
    consumed[-1] = text_bytes
    return np.clip(consumed, 0, text_bytes).astype(np.int16)


def phone_ids(symbols: str) -> list[int]:
    """Indices into config.PHONES; silences and unknown symbols are left out."""
    return [PHONE_ID[s] for s in symbols if PHONE_ID.get(s, 0)]


def _plan_shards(conversations: dict[str, list[dict]], turns_per_shard: int) -> list[list[dict]]:
    """Whole conversations in groups of at least turns_per_shard supervisions."""
    shards: list[list[dict]] = [[]]
    for turns in conversations.values():
        if len(shards[-1]) >= turns_per_shard:
            shards.append([])
        shards[-1] += turns
    return [s for s in shards if s]


def _content(supervisions: list[dict], fingerprint: str) -> str:
    """Hash of everything a shard is made from."""
    parts = [[s["id"], s["text"], s["custom"].get("sha256"), s["custom"].get("alignment")] for s in supervisions]
    return hashlib.sha256(json.dumps([TOKENS_FORMAT, fingerprint, parts]).encode()).hexdigest()[:16]


@torch.inference_mode()
def encode_turns(codec, audios: list[np.ndarray], max_seconds: float = 60.0) -> list[Tensor]:
    """Mono audio (n,) each -> codes (K_all, T) int16 each; turns of like length are encoded together."""
    frame = codec.cfg.frame_size
    counts = [-(-max(1, len(a)) // frame) for a in audios]
    device = next(codec.parameters()).device
    codes: list[Tensor] = [torch.empty(0)] * len(audios)
    order = sorted(range(len(audios)), key=lambda i: counts[i])
    while order:
        longest = counts[order[-1]]
        size = max(1, int(max_seconds * codec.cfg.frame_rate / longest))
        group, order = order[-size:], order[:-size]
        batch = torch.zeros(len(group), 1, longest * frame)                    # (B, 1, N)
        for row, i in enumerate(group):
            batch[row, 0, :len(audios[i])] = torch.from_numpy(audios[i])
        encoded = codec.encode(batch.to(device)).to("cpu", torch.int16)        # (B, K, T): causal, so the padding is not heard
        for row, i in enumerate(group):
            codes[i] = encoded[row, :, :counts[i]].clone()
    return codes


def _turn_record(supervision: dict, codes: Tensor, codec_cfg) -> tuple[dict, Tensor, Tensor]:
    """One turn's header entry, consumed bytes (T,) (-1: unknown) and phone ids."""
    custom, text = supervision["custom"], supervision["text"]
    alignment = custom.get("alignment") or {}
    frames, size = codes.size(1), len(text.encode("utf-8"))
    consumed = torch.full((frames,), -1, dtype=torch.int16)
    if alignment.get("words"):
        consumed = torch.from_numpy(consumed_bytes(alignment["words"], size, frames, 1 / codec_cfg.frame_rate))
    phones = torch.tensor(phone_ids(alignment.get("phones", "")), dtype=torch.uint8)
    record = {"id": supervision["id"], "conversation": supervision["recording_id"], "text": text, "frames": frames, "phones": len(phones),
              "speaker": int(custom.get("speaker_index", 0)), "mood": custom.get("mood"), "character": custom.get("character")}
    return record, consumed, phones


def _write_shard(path: Path, supervisions: list[dict], data: Path, codec, content: str, pool: ThreadPoolExecutor, bar) -> None:
    audios = list(pool.map(lambda s: read_audio(data / s["custom"]["turn_audio"], codec.cfg.sample_rate), supervisions))
    codes = encode_turns(codec, audios)
    records, consumed, phones = zip(*(_turn_record(s, c, codec.cfg) for s, c in zip(supervisions, codes)))
    tensors = {"codes": torch.cat(codes, 1), "consumed": torch.cat(consumed), "phones": torch.cat(phones)}
    header = {"format": str(TOKENS_FORMAT), "codec_fingerprint": codec.fingerprint, "content": content, "turns": json.dumps(records), "digest": _digest(tensors)}
    atomic_write(path, tensor_bytes(tensors, metadata=header))
    bar.update(len(supervisions))


def _shard_header(path: Path) -> dict | None:
    """Metadata of a shard; None when it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None


def tokenise(data, codec, workers: int = 2, fresh: bool = False, turns_per_shard: int = 256, progress: bool = True) -> dict:
    """Write all missing shards and tokens/index.json below `data`; returns the index.

    ValueError when shards of another codec are there and fresh is not set.
    """
    data = Path(data)
    folder = data / "tokens"
    plans = {split: _plan_shards(read_supervisions(data, split), turns_per_shard) for split in SPLITS}
    todo, kept = [], set()
    for split, shards in plans.items():
        for number, supervisions in enumerate(shards):
            path, content = folder / f"{split}-{number:05d}.safetensors", _content(supervisions, codec.fingerprint)
            header = None if fresh or not path.exists() else _shard_header(path)
            if header is not None:
                check_codec(f"{path.name} (made earlier; --fresh makes it again)", header.get("codec_fingerprint"), codec.fingerprint)
            kept.add(path)
            if header is None or header.get("content") != content:
                todo.append((path, supervisions, content))
    total = sum(len(s) for shards in plans.values() for s in shards)
    with ThreadPoolExecutor(max(1, workers)) as pool, tqdm(total=total, unit="turn", desc="tokenising", disable=not progress) as bar:
        bar.update(total - sum(len(s) for _, s, _ in todo))
        for path, supervisions, content in todo:
            _write_shard(path, supervisions, data, codec, content, pool, bar)
    for stale in {p for split in SPLITS for p in folder.glob(f"{split}-*.safetensors")} - kept:       # left by a larger collection
        stale.unlink()
    return _write_index(folder, codec)


def _write_index(folder: Path, codec) -> dict:
    index = {"format": TOKENS_FORMAT, "codec_fingerprint": codec.fingerprint, "tokenizer": "bytes", "frame_rate": codec.cfg.frame_rate,
             "num_codebooks": codec.cfg.num_codebooks, "num_semantic": codec.cfg.num_semantic, "splits": {}}
    for split in SPLITS:
        names = sorted(p.name for p in folder.glob(f"{split}-*.safetensors"))
        records = [r for n in names for r in json.loads(_shard_header(folder / n)["turns"])]
        conversations: dict[str, int] = {}
        for record in records:
            conversations[record["conversation"]] = conversations.get(record["conversation"], 0) + 1
        frames = sum(r["frames"] for r in records)
        index["splits"][split] = {"shards": names, "turns": len(records), "frames": frames, "hours": frames / codec.cfg.frame_rate / 3600,
                                  "conversations": conversations}
    write_json(folder / "index.json", index)
    return index


# ----------------------------------------------------------------------------- shards to turns

@dataclass
class Turn:
    """One turn as tokens."""
    codes: Tensor            # (K, T) int16: all the codec's codebooks, or those that a model reads
    consumed: Tensor | None  # (T,) int64: text tokens spoken by the end of each frame; None: unknown
    ids: list[int]           # tokens of the text
    phones: Tensor           # (n,) uint8
    text: str
    speaker: int             # in the conversation
    mood: str | None
    character: str | None
    id: str = ""             # of its supervision

    def positions(self) -> int:
        """Positions of this turn in the stream, at most: prefix of 3, text, EOT, (TRANSCRIPT), frames, EOS."""
        return len(self.ids) + self.codes.size(1) + 6


def data_folders(data) -> list[str]:
    """"data/a,data/b" -> the folders that train together."""
    return [part.strip() for part in str(data).split(",") if part.strip()]


def read_index(data) -> dict:
    """The token index of a folder; of several, the first one's."""
    data = (data_folders(data) or [""])[0]
    path = Path(data) / "tokens" / "index.json"
    if not path.is_file():
        missing = "python dataset_pipeline.py" if (Path(data) / "manifests").is_dir() else "python collect_data.py, then python dataset_pipeline.py"
        raise ValueError(f"there are no tokens in {data}: run {missing} (or name the folder with --data)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run python dataset_pipeline.py again") from None


def read_turns(data, split: str, tokenizer, codec_fingerprint: str | None = None) -> list[list[Turn]]:
    """All conversations of a split, each a list of turns in order. Damaged shards are skipped, counted and named on stderr;
    ValueError where no shard is whole, and for shards of another codec.

    data: a folder with tokens/, or several with commas between; all of one codec.
    """
    folders = data_folders(data)
    if len(folders) > 1:
        codec_fingerprint = codec_fingerprint or read_index(data)["codec_fingerprint"]
        return [turns for folder in folders for turns in read_turns(folder, split, tokenizer, codec_fingerprint)]
    index = read_index(data)
    check_codec(f"{data}/tokens", index["codec_fingerprint"], codec_fingerprint)
    conversations: dict[str, list[Turn]] = {}
    names, damaged = index["splits"][split]["shards"], {}
    for name in names:
        path = Path(data) / "tokens" / name
        try:
            header, tensors = _read_shard(path)
            check_codec(path, header.get("codec_fingerprint"), index["codec_fingerprint"])
            turns = list(_split_shard(json.loads(header["turns"]), tensors, tokenizer))
        except (OSError, SafetensorError, DamagedShard, KeyError, TypeError, json.JSONDecodeError) as error:
            damaged[name] = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            continue
        for record, turn in turns:
            conversations.setdefault(record["conversation"], []).append(turn)
    if damaged:
        what = f"{len(damaged)} of {len(names)} {split} shards in {data}/tokens missing or damaged: {', '.join(f'{n} ({why})' for n, why in list(damaged.items())[:5])}"
        if len(damaged) == len(names):
            raise ValueError(f"{what}: run python dataset_pipeline.py --data {data} --fresh")
        print(f"note: {what}; going on without; python dataset_pipeline.py --data {data} --fresh makes them again", file=sys.stderr)
    return list(conversations.values())


class DamagedShard(Exception):
    """A shard whose parts do not belong together."""


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_shard(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors. DamagedShard where they contradict each other (older shards have no digest)."""
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in ("codes", "consumed", "phones")}
    records = json.loads(header["turns"])
    frames, phones = sum(r["frames"] for r in records), sum(r["phones"] for r in records)
    if not (tensors["codes"].size(1) == len(tensors["consumed"]) == frames and len(tensors["phones"]) == phones):
        raise DamagedShard("its tensors are not as long as its turns say")
    if header.get("digest") not in (None, _digest(tensors)):
        raise DamagedShard("its tensors have changed since it was written")
    return header, tensors


def _split_shard(records: list[dict], tensors: dict[str, Tensor], tokenizer):
    frame = phone = 0
    for r in records:
        ids = tokenizer.encode(r["text"])
        consumed = tensors["consumed"][frame:frame + r["frames"]].long()
        known = bool((consumed >= 0).all()) and len(ids) == len(r["text"].encode("utf-8"))      # else tokens are not bytes
        yield r, Turn(tensors["codes"][:, frame:frame + r["frames"]], consumed if known else None, ids,
                      tensors["phones"][phone:phone + r["phones"]], r["text"], r["speaker"], r["mood"], r["character"], r["id"])
        frame, phone = frame + r["frames"], phone + r["phones"]


# ----------------------------------------------------------------------------- turns to rows

@dataclass
class Window:
    """One row of a batch, before its tensors exist."""
    turns: list[Turn]
    speakers: dict[int, int] = field(default_factory=dict)   # conversation's speaker index -> speaker tag
    listening: list[bool] = field(default_factory=list)
    moods: list[bool] = field(default_factory=list)          # mood tag given
    history: list[Turn] = field(default_factory=list)        # turns before the window

    def positions(self) -> int:
        return sum(t.positions() for t in self.turns)

    def cost(self) -> int:
        """Positions that go through the backbone, the history's included."""
        return self.positions() + sum(t.positions() for t in self.history)


def _text_rows(ids: list[int], columns: int) -> tuple[Tensor, Tensor]:
    frames = torch.zeros(len(ids), columns, dtype=torch.long)
    frames[:, -1] = torch.tensor(ids)
    mask = torch.zeros(len(ids), columns, dtype=torch.bool)
    mask[:, -1] = True
    return frames, mask


def _audio_rows(codes: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """codes (K, T) -> rows (T + 1, K + 1): the frames, then EOS (all K columns 0)."""
    frames = torch.zeros(codes.size(1) + 1, cfg.num_codebooks + 1, dtype=torch.long)
    frames[:-1, :-1] = codes.long().T + cfg.code_offset
    mask = torch.ones_like(frames, dtype=torch.bool)
    mask[:, -1] = False
    return frames, mask


def turn_rows(turn: Turn, cfg: ModelConfig, tokenizer, speaker: int, mood: str | None = None, listening: bool = False) -> dict[str, Tensor]:
    """One turn as rows of the stream: the fields of FrameBatch without the batch dimension (and without `turn`)."""
    voice, voice_mask = _audio_rows(turn.codes, cfg)
    prefix = tokenizer.listen_prefix(speaker) if listening else tokenizer.speak_prefix(speaker, mood)
    before = prefix if listening else prefix + turn.ids + [tokenizer.eot]
    after = [tokenizer.transcript] + turn.ids + [tokenizer.eot] if listening else []
    first, first_mask = _text_rows(before, cfg.num_codebooks + 1)
    last, last_mask = _text_rows(after, cfg.num_codebooks + 1)
    n, v, m = len(before), len(voice), len(after)
    text_index = torch.full((n + v + m,), -1)
    text_index[:n], text_index[n + v:] = torch.arange(n), torch.arange(m)
    text_loss = torch.zeros(n + v + m, dtype=torch.bool)         # bytes and EOT
    text_loss[(n + v + 1) if listening else len(prefix):(n + v + m) if listening else n] = True
    audio_loss = torch.zeros(n + v + m, dtype=torch.bool)        # what was heard is not ours to say
    audio_loss[n:n + v] = not listening
    reading = torch.full((n + v + m,), -1)
    if turn.consumed is not None and not listening:
        reading[n - 1:n + 1] = len(prefix)                       # at EOT and at frame 0 nothing is spoken yet
        reading[n + 1:n + v] = len(prefix) + turn.consumed
    return {"frames": torch.cat((first, voice, last)), "mask": torch.cat((first_mask, voice_mask, last_mask)),
            "text_index": text_index, "reading": reading, "audio_loss": audio_loss, "text_loss": text_loss}


_PADDING = {"frames": 0, "mask": False, "turn": -1, "text_index": -1, "reading": -1, "audio_loss": False, "text_loss": False}


def _stack(rows: list[list[dict[str, Tensor]]], first_turns: list[int], columns: int) -> FrameBatch:
    """Turns of each row, one after the other -> padded FrameBatch (B, S, ...). first_turns: number of each row's first turn."""
    joined = []
    for turns, first in zip(rows, first_turns):
        row = {k: torch.cat([t[k] for t in turns]) for k in turns[0]} if turns else {}
        numbers = [torch.full((len(t["reading"]),), first + i) for i, t in enumerate(turns)]
        joined.append(row | {"turn": torch.cat(numbers) if turns else torch.empty(0, dtype=torch.long)})
    b, s = len(rows), max(1, max(len(r["turn"]) for r in joined))
    out = {}
    for key, fill in _PADDING.items():
        shape = (b, s, columns) if key in ("frames", "mask") else (b, s)
        out[key] = torch.full(shape, fill)
        for i, row in enumerate(joined):
            if key in row:
                out[key][i, :len(row[key])] = row[key]
    return FrameBatch(**out)


def collate(windows: list[Window], cfg: ModelConfig, tokenizer) -> tuple[FrameBatch, FrameBatch | None]:
    """Windows -> (batch (B, S, K+1), history (B, S', K+1) or None when no window has one)."""
    rows = [[turn_rows(t, cfg, tokenizer, w.speakers.get(t.speaker, t.speaker), t.mood if w.moods[i] else None, w.listening[i])
             for i, t in enumerate(w.turns)] for w in windows]
    batch = _stack(rows, [len(w.history) for w in windows], cfg.num_codebooks + 1)      # turn numbers go on from the history's
    phones = [_spoken_phones(w) for w in windows]
    batch.phones = torch.nn.utils.rnn.pad_sequence(phones, batch_first=True) if any(len(p) for p in phones) else None
    if not any(w.history for w in windows):
        return batch, None
    earlier = [[turn_rows(t, cfg, tokenizer, w.speakers.get(t.speaker, t.speaker)) for t in w.history] for w in windows]
    return batch, _stack(earlier, [0] * len(windows), cfg.num_codebooks + 1)


def _spoken_phones(window: Window) -> Tensor:
    """(P,) long: phones of the turns in speaking order, one after the other; none when those of one turn are unknown."""
    spoken = [t.phones.long() for t, heard in zip(window.turns, window.listening) if not heard]
    return torch.cat(spoken) if spoken and all(len(p) for p in spoken) else torch.empty(0, dtype=torch.long)


# ----------------------------------------------------------------------------- windows to batches

@dataclass
class Stage:
    """How hard the windows are at this point of the run (the curriculum)."""
    max_context: int = 3             # earlier turns in a window
    max_seconds: float = 1e9         # length of a turn


class ConversationDataset:
    """Endless packed batches of conversation windows, in an order that depends on the seed alone.

    iterate: `batch, history, state = dataset.next_batch(stage)`; state makes load_state_dict go on with the batch after it.
    """
    POOL = 512                       # windows sorted by length together

    def __init__(self, data, cfg: ModelConfig, split: str = "train", batch_positions: int = 4096, seed: int = 0, ranks: Ranks = Ranks(),
                 codec_fingerprint: str | None = None, p_listen: float = 0.15, p_mood: float = 0.5, p_history: float = 0.25,
                 p_skip: float = 0.25, shuffle_speakers: bool = True):
        """data: folder with tokens/, or several with commas between. p_listen, p_mood, p_history: share of turns in listening order, of turns with their mood tag
        and of windows with a history (only where the model has a memory). p_skip: share of context turns left out, so that the one before a turn may be
        of the same speaker: only the tag tells who speaks (where speakers always alternate a model goes by that, LOG.md)."""
        self.cfg, self.seed, self.ranks, self.batch_positions = cfg, seed, ranks, batch_positions
        self.p_listen, self.p_mood, self.shuffle_speakers = p_listen if cfg.text_head else 0.0, p_mood, shuffle_speakers
        self.p_history, self.p_skip = p_history if cfg.memory.enabled else 0.0, p_skip
        self.tokenizer = load_tokenizer(cfg.tokenizer)
        self.conversations = read_turns(data, split, self.tokenizer, codec_fingerprint)
        self._choose_codebooks(read_index(data))
        self.limit = min(cfg.backbone.max_positions, batch_positions)
        everything = [(c, t) for c, turns in enumerate(self.conversations) for t in range(len(turns))]
        self.targets = [(c, t) for c, t in everything if self.conversations[c][t].positions() <= self.limit]
        self.skipped = len(everything) - len(self.targets)
        if not self.targets:
            raise ValueError(f"the {split} split of {data} has no usable turn ({len(everything)} in all, {self.skipped} longer than {self.limit} positions): "
                             "collect more data, or raise --batch_positions")
        self._check_codes()
        self.pool_number, self.place, self.pool_stage, self._pool = 0, 0, Stage(), None
        self.used = self.padded = 0

    def _choose_codebooks(self, index: dict) -> None:
        """Keep the codebooks that the model reads (config.codec_columns)."""
        stored = index["num_codebooks"]
        columns = codec_columns(self.cfg.num_codebooks, self.cfg.num_semantic, index.get("num_semantic", self.cfg.num_semantic))
        if columns[-1] >= stored:
            raise ValueError(f"the model wants {self.cfg.num_codebooks} codebooks, {self.cfg.num_semantic} of them semantic, the tokens have {stored}: use another --model_size or codec")
        for turns in self.conversations:
            for turn in turns:
                turn.codes = turn.codes[columns]

    def _check_codes(self) -> None:
        highest = max(int(t.codes.max()) for turns in self.conversations for t in turns)
        if highest + self.cfg.code_offset >= self.cfg.audio_vocab:
            raise ValueError(f"code {highest} does not fit audio_vocab {self.cfg.audio_vocab}: use the --model_size this codec is meant for")

    # ---- windows

    def _window(self, target: tuple[int, int], stage: Stage, g: torch.Generator | None) -> Window:
        """g None: the fixed window of validation (all context that fits, speaking order, moods given)."""
        turns, t = self.conversations[target[0]], target[1]
        want = min(t, stage.max_context)
        context = want if g is None or _randint(g, 3) else _randint(g, want + 1)      # mostly all of it: a voice is learned from what came before
        start, size = t, turns[t].positions()
        while start > t - context and size + turns[start - 1].positions() <= self.limit:
            start -= 1
            size += turns[start].positions()
        window = Window(turns[start:t + 1])
        n = len(window.turns)
        if g is None:
            window.listening, window.moods = [False] * n, [True] * n
            return window
        skipped = (torch.rand(n - 1, generator=g) < self.p_skip).tolist()
        window.turns = [turn for turn, skip in zip(window.turns, [*skipped, False]) if not skip]
        n = len(window.turns)
        chance = torch.rand(2 * n + 1, generator=g).tolist()
        window.listening = [c < self.p_listen for c in chance[:n]]
        window.moods = [c < self.p_mood for c in chance[n:2 * n]]
        if self.shuffle_speakers:
            window.speakers = dict(enumerate(torch.randperm(NUM_SPEAKERS, generator=g).tolist()))
        if start and chance[-1] < self.p_history and stage.max_context:
            window.history = self._history(turns[:start], self.limit - size, g)
        return window

    def _history(self, earlier: list[Turn], room: int, g: torch.Generator) -> list[Turn]:
        """1..4 turns right before the window, as far as they fit into `room` positions."""
        kept: list[Turn] = []
        for turn in reversed(earlier[-(1 + _randint(g, 4)):]):
            if sum(t.positions() for t in kept) + turn.positions() > room:
                break
            kept.insert(0, turn)
        return kept

    # ---- pools of windows, packed

    def _make_pool(self, number: int, stage: Stage) -> list[list[Window]]:
        """The batches of one pool: windows of like length together, batches in random order."""
        targets = [(c, t) for c, t in self.targets if self.conversations[c][t].codes.size(1) <= stage.max_seconds * self.cfg.frame_rate] or self.targets
        windows, order, epoch = [], [], -1
        for n in range(number * self.POOL, (number + 1) * self.POOL):
            if n // len(targets) != epoch:
                epoch = n // len(targets)
                order = torch.randperm(len(targets), generator=_generator(self.seed, 0, epoch)).tolist()
            windows.append(self._window(targets[order[n % len(targets)]], stage, _generator(self.seed, 1, n)))
        batches = pack([w for w in windows if w.history], self.batch_positions)       # a history in one row costs all rows
        batches += pack([w for w in windows if not w.history], self.batch_positions)
        batches = [batches[i] for i in torch.randperm(len(batches), generator=_generator(self.seed, 2, number)).tolist()]
        missing = -len(batches) % self.ranks.world_size              # every rank gets as many
        return batches + [batches[i % len(batches)] for i in range(missing)]

    def next_batch(self, stage: Stage | None = None) -> tuple[FrameBatch, FrameBatch | None, dict]:
        """One micro-batch of this rank, from a pool of the given stage: a new stage begins a new pool."""
        if self.place and stage is not None and stage != self.pool_stage:
            self._next_pool()
        if self.place == 0:
            self.pool_stage = stage or self.pool_stage
        if self._pool is None:
            self._pool = self._make_pool(self.pool_number, self.pool_stage)
            if self.place * self.ranks.world_size >= len(self._pool):        # another number of ranks padded it otherwise
                self._next_pool()
                self._pool = self._make_pool(self.pool_number, self.pool_stage)
        windows = self._pool[self.place * self.ranks.world_size + self.ranks.rank]
        self.place += 1
        if self.place * self.ranks.world_size >= len(self._pool):
            self._next_pool()
        batch, history = collate(windows, self.cfg, self.tokenizer)
        self.used += int((batch.turn >= 0).sum())
        self.padded += batch.turn.numel()
        return batch, history, self.state_dict()

    def _next_pool(self) -> None:
        self.pool_number, self.place, self._pool = self.pool_number + 1, 0, None

    def fixed_batches(self, count: int, max_context: int) -> list[FrameBatch]:
        """The same `count` batches each time, for validation: turns spread over the split, no randomness in the windows."""
        spread = torch.randperm(len(self.targets), generator=_generator(self.seed, 3, 0)).tolist()
        windows = [self._window(self.targets[i], Stage(max_context), None) for i in spread]
        chosen, size = [], 0
        for window in windows:
            size += window.positions()
            if chosen and size > count * self.batch_positions:
                break
            chosen.append(window)
        return [collate(w, self.cfg, self.tokenizer)[0] for w in pack(chosen, self.batch_positions)[:count]]

    @property
    def waste(self) -> float:
        """Share of the positions handed out so far that were padding."""
        return 1 - self.used / self.padded if self.padded else 0.0

    def state_dict(self) -> dict:
        return {"pool": self.pool_number, "place": self.place, "ranks": self.ranks.world_size, "max_context": self.pool_stage.max_context, "max_seconds": self.pool_stage.max_seconds}

    def load_state_dict(self, state: dict) -> None:
        self.pool_number, self._pool = state["pool"], None
        self.place = state["place"] * state.get("ranks", self.ranks.world_size) // self.ranks.world_size      # the same place for more or fewer ranks
        self.pool_stage = Stage(state["max_context"], state["max_seconds"])


def pack(windows: list[Window], batch_positions: int) -> list[list[Window]]:
    """Group windows sorted by length so that rows x longest row (history included) <= batch_positions."""
    batches: list[list[Window]] = []
    for window in sorted(windows, key=lambda w: w.cost(), reverse=True):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].cost() > batch_positions:
            batches.append([])
        batches[-1].append(window)
    return batches


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by all the numbers: the same everywhere, unlike neighbours."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _randint(g: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (1,), generator=g))


class Prefetch:
    """Calls `make()` in one background thread, `depth` results ahead; get() returns them in order."""

    def __init__(self, make, depth: int):
        self._queue: queue.Queue = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make) -> None:
        while not self._stop.is_set():
            try:
                item = make()
            except Exception as error:      # handed to the caller of get()
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def get(self):
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: use 1 or more")
    codec = load_codec(args.codec, pick_device(args.device))
    index = tokenise(args.data, codec, args.workers, args.fresh)
    for split, part in index["splits"].items():
        print(f"{split:10s} {len(part['conversations']):6d} conversations {part['turns']:7d} turns {part['hours']:8.2f} h  {len(part['shards'])} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
