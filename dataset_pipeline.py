"""Manifests to codec tokens to conversation windows to packed batches.

    python dataset_pipeline.py --data data/synthetic --codec pretrained/codec

First half: every turn's audio becomes codes, written as shards tokens/{split}-NNNNN.safetensors and
tokens/index.json; a shard that is there and right is not made again. Second half: ConversationDataset
cuts windows (a target turn and some earlier ones) from the shards and packs windows of like length.

B batch, S positions, K codebooks of the model, T frames of a turn, P length of a turn's text prefix.
"""
from __future__ import annotations

import atexit
import functools
import gzip
import hashlib
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator, NamedTuple

from config import PHONES, ModelConfig, Parser, codec_columns
from runtime import Ranks, atomic_write, plain_errors, release_freed_memory, write_json

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
from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm            # noqa: E402

import shards                    # noqa: E402
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


def _plan(data: Path, turns_per_shard: int) -> Iterator[tuple[Path, list[dict]]]:
    """(path, supervisions) of each shard: whole conversations in order. Streamed where the manifest is in order, else sorted in memory."""
    for split in SPLITS:
        path = data / "manifests" / split / "supervisions.jsonl.gz"
        ordered = path.is_file() and shards.count_in_order(path) is not None
        found = shards.stream(path) if ordered else iter(read_supervisions(data, split).values())
        for number, supervisions in enumerate(shards.grouped(found, turns_per_shard)):
            yield data / "tokens" / f"{split}-{number:05d}.safetensors", supervisions


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
    atomic_write(path, shards.stable(tensor_bytes(tensors, metadata=header)))
    release_freed_memory()                                                     # every shard has other sizes: the heap grew by 200 MB in an hour of speech
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
    data, folder, made, total, before = Path(data), Path(data) / "tokens", set(), 0, 0

    def done(path: Path, supervisions: list[dict]) -> bool:
        header = None if fresh and path not in made and shards.place()[1] == 1 or not path.exists() else _shard_header(path)
        return header is not None and (header.get("codec_fingerprint"), header.get("content")) == (codec.fingerprint, _content(supervisions, codec.fingerprint))
    for path, supervisions in _plan(data, turns_per_shard):                                      # all complaints before any work
        if not fresh and (header := _shard_header(path)) is not None:
            check_codec(f"{path.name} (made earlier; --fresh makes it again)", header.get("codec_fingerprint"), codec.fingerprint)
        total, before = total + len(supervisions), before + len(supervisions) * done(path, supervisions)
    with ThreadPoolExecutor(max(1, workers)) as pool, tqdm(total=total, initial=before, unit="turn", desc="tokenising", disable=not progress) as bar:
        def make(path: Path, supervisions: list[dict]) -> None:
            _write_shard(path, supervisions, data, codec, _content(supervisions, codec.fingerprint), pool, bar)
            made.add(path)
        kept = set(shards.share(lambda: _plan(data, turns_per_shard), done, make))
    for stale in {p for split in SPLITS for p in folder.glob(f"{split}-*.safetensors")} - kept:       # left by a larger collection
        stale.unlink(missing_ok=True)
    index = _write_index(folder, codec)
    shards.write_manifest(folder, [path.name for path in kept])
    return index


def _write_index(folder: Path, codec) -> dict:
    index = {"format": TOKENS_FORMAT, "codec_fingerprint": codec.fingerprint, "tokenizer": "bytes", "frame_rate": codec.cfg.frame_rate,
             "num_codebooks": codec.cfg.num_codebooks, "num_semantic": codec.cfg.num_semantic, "splits": {}}
    for split in SPLITS:
        names = sorted(p.name for p in folder.glob(f"{split}-*.safetensors"))
        conversations: dict[str, int] = {}
        frames = 0
        for record in (r for n in names for r in json.loads(_shard_header(folder / n)["turns"])):
            conversations[record["conversation"]] = conversations.get(record["conversation"], 0) + 1
            frames += record["frames"]
        index["splits"][split] = {"shards": names, "turns": sum(conversations.values()), "frames": frames, "hours": frames / codec.cfg.frame_rate / 3600,
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

    def __getstate__(self) -> dict:
        """By value: pickled as tensors for a spawned worker, every turn would take its whole shard or a file descriptor along."""
        return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update((k, torch.from_numpy(v) if isinstance(v, np.ndarray) else v) for k, v in state.items())


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

    def earlier(self) -> int:
        return sum(t.positions() for t in self.history)


class Piece(NamedTuple):
    """A turn with the texts around its voice."""
    turn: Turn
    before: list[int]        # prefix; spoken: then the text and EOT
    after: list[int]         # heard: TRANSCRIPT, the text, EOT
    prefix: int
    heard: bool

    def length(self) -> int:
        return len(self.before) + self.turn.codes.size(1) + 1 + len(self.after)


def _piece(turn: Turn, tokenizer, speaker: int, mood: str | None = None, listening: bool = False) -> Piece:
    if listening:
        prefix = tokenizer.listen_prefix(speaker)
        return Piece(turn, prefix, [tokenizer.transcript, *turn.ids, tokenizer.eot], len(prefix), True)
    prefix = tokenizer.speak_prefix(speaker, mood)
    return Piece(turn, [*prefix, *turn.ids, tokenizer.eot], [], len(prefix), False)


def _write(row: dict[str, np.ndarray], at: int, number: int, piece: Piece, code_offset: int) -> int:
    """Fill positions from `at` on of one row: text, frames and EOS (all columns 0), text; returns where they end."""
    turn, before, after, prefix, heard = piece
    voice, last = at + len(before), at + len(before) + turn.codes.size(1) + 1
    end = last + len(after)
    row["turn"][at:end] = number
    row["frames"][at:voice, -1] = before
    row["frames"][voice:last - 1, :-1] = turn.codes.numpy().T + code_offset
    row["text_index"][at:voice] = np.arange(len(before))
    if heard:                                                    # what was heard is not ours to say
        row["frames"][last:end, -1] = after
        row["text_index"][last:end] = np.arange(len(after))
        row["text_loss"][last + 1:end] = True                    # bytes and EOT
        return end
    row["text_loss"][at + prefix:voice] = True
    row["audio_loss"][voice:last] = True
    if turn.consumed is not None:
        row["reading"][voice - 1:voice + 1] = prefix             # at EOT and at frame 0 nothing is spoken yet
        row["reading"][voice + 1:last] = turn.consumed.numpy() + prefix
    return end


def _integers(cfg: ModelConfig) -> type:
    """The narrowest type for every token and place of this model."""
    return np.int16 if max(cfg.audio_vocab, cfg.text_vocab, cfg.backbone.max_positions) < 2 ** 15 else np.int32


def _stack(rows: list[list[Piece]], first_turns: list[int], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Turns of each row, one after the other -> padded fields of a FrameBatch (B, S, ...) without its mask. first_turns: number of each row's first turn."""
    shape, kind = (len(rows), max(1, max(sum(p.length() for p in row) for row in rows))), _integers(cfg)
    out = {"frames": np.zeros((*shape, cfg.num_codebooks + 1), kind)}
    out |= {key: np.full(shape, -1, kind) for key in ("turn", "text_index", "reading")}
    out |= {key: np.zeros(shape, bool) for key in ("audio_loss", "text_loss")}
    for b, (pieces, first) in enumerate(zip(rows, first_turns)):
        row, at = {key: values[b] for key, values in out.items()}, 0
        for number, piece in enumerate(pieces, first):
            at = _write(row, at, number, piece, cfg.code_offset)
    return out


Arrays = tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]


def collate_arrays(windows: list[Window], cfg: ModelConfig, tokenizer) -> Arrays:
    """Windows -> (batch, history or None when no window has one), as small as they can be handed to another process."""
    rows = [[_piece(t, tokenizer, w.speakers.get(t.speaker, t.speaker), t.mood if mood else None, heard)
             for t, mood, heard in zip(w.turns, w.moods, w.listening)] for w in windows]
    batch = _stack(rows, [len(w.history) for w in windows], cfg)                        # turn numbers go on from the history's
    phones = [_spoken_phones(w) for w in windows]
    if longest := max(len(p) for p in phones):
        batch["phones"] = np.zeros((len(phones), longest), np.uint8)
        for row, p in zip(batch["phones"], phones):
            row[:len(p)] = p
    if not any(w.history for w in windows):
        return batch, None
    earlier = [[_piece(t, tokenizer, w.speakers.get(t.speaker, t.speaker)) for t in w.history] for w in windows]
    return batch, _stack(earlier, [0] * len(windows), cfg)


def _spoken_phones(window: Window) -> np.ndarray:
    """(P,) uint8: phones of the turns in speaking order, one after the other; none when those of one turn are unknown."""
    spoken = [t.phones.numpy() for t, heard in zip(window.turns, window.listening) if not heard]
    return np.concatenate(spoken) if spoken and all(len(p) for p in spoken) else np.zeros(0, np.uint8)


def narrow_batch(arrays: dict[str, np.ndarray] | None) -> FrameBatch | None:
    """Arrays of collate_arrays -> FrameBatch on the same memory and in the same types: few bytes to move to a device, `widen` it there."""
    if arrays is None:
        return None
    tensors = {key: torch.from_numpy(values) for key, values in arrays.items()}
    text, mask = tensors["text_index"] >= 0, torch.empty(tensors["frames"].shape, dtype=torch.bool)
    mask[..., :-1] = ((tensors["turn"] >= 0) & ~text)[..., None]
    mask[..., -1] = text
    return FrameBatch(mask=mask, **tensors)


def widen(batch: FrameBatch) -> FrameBatch:
    """Integers as long, as the model wants them (a batch that is so already stays as it is)."""
    return replace(batch, **{k: v.long() for k, v in vars(batch).items() if v is not None and v.dtype != torch.bool})


def collate(windows: list[Window], cfg: ModelConfig, tokenizer) -> tuple[FrameBatch, FrameBatch | None]:
    """Windows -> (batch (B, S, K+1), history (B, S', K+1) or None when no window has one)."""
    batch, history = map(narrow_batch, collate_arrays(windows, cfg, tokenizer))
    return widen(batch), history and widen(history)


def turn_rows(turn: Turn, cfg: ModelConfig, tokenizer, speaker: int, mood: str | None = None, listening: bool = False) -> dict[str, Tensor]:
    """One turn as rows of the stream: the fields of FrameBatch without the batch dimension."""
    batch = widen(narrow_batch(_stack([[_piece(turn, tokenizer, speaker, mood, listening)]], [0], cfg)))
    return {key: values[0] for key, values in vars(batch).items() if values is not None}


# ----------------------------------------------------------------------------- windows to batches

@dataclass
class Stage:
    """How hard the windows are at this point of the run (the curriculum)."""
    max_context: int = 3             # earlier turns in a window
    max_seconds: float = 1e9         # length of a turn


class ConversationDataset:
    """Endless packed batches of conversation windows, in an order that depends on the seed alone.

    iterate: `batch, history, state = dataset.next_batch(stage)`; state makes load_state_dict go on with the batch after it.
    num_workers > 0: so many processes make the same batches ahead, until close().
    """

    def __init__(self, data, cfg: ModelConfig, split: str = "train", batch_positions: int = 4096, seed: int = 0, ranks: Ranks = Ranks(),
                 codec_fingerprint: str | None = None, p_listen: float = 0.15, p_mood: float = 0.5, p_history: float = 0.25,
                 p_skip: float = 0.25, shuffle_speakers: bool = True, num_workers: int = 0):
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
        self.pool_size = max(512, batch_positions // 3)              # windows sorted by length together: a hundred batches, or padding eats them
        everything = [(c, t) for c, turns in enumerate(self.conversations) for t in range(len(turns))]
        self.targets = [(c, t) for c, t in everything if self.conversations[c][t].positions() <= self.limit]
        self.skipped = len(everything) - len(self.targets)
        if not self.targets:
            raise ValueError(f"the {split} split of {data} has no usable turn ({len(everything)} in all, {self.skipped} longer than {self.limit} positions): "
                             "collect more data, or raise --batch_positions")
        self._check_codes()
        self.pool_number, self.place, self.pool_stage = 0, 0, Stage()
        self.used = self.padded = 0
        self._made, self._usable = (), {}                            # the last pool; targets by the longest that a stage allows
        self._workers = Workers(self, num_workers) if num_workers else None

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

    def _targets(self, stage: Stage) -> list[tuple[int, int]]:
        """Targets that are short enough; all where none is."""
        if stage.max_seconds not in self._usable:
            most = stage.max_seconds * self.cfg.frame_rate
            self._usable[stage.max_seconds] = [(c, t) for c, t in self.targets if self.conversations[c][t].codes.size(1) <= most] or self.targets
        return self._usable[stage.max_seconds]

    def _make_pool(self, number: int, stage: Stage) -> list[list[Window]]:
        """The batches of one pool: windows of like length together, batches in random order."""
        targets, windows = self._targets(stage), []
        for n in range(number * self.pool_size, (number + 1) * self.pool_size):
            order = _epoch_order(self.seed, n // len(targets), len(targets))
            windows.append(self._window(targets[order[n % len(targets)]], stage, _generator(self.seed, 1, n)))
        batches = pack([w for w in windows if w.history], self.batch_positions)       # a history in one row costs all rows
        batches += pack([w for w in windows if not w.history], self.batch_positions)
        batches = [batches[i] for i in torch.randperm(len(batches), generator=_generator(self.seed, 2, number)).tolist()]
        missing = -len(batches) % self.ranks.world_size              # every rank gets as many
        return batches + [batches[i % len(batches)] for i in range(missing)]

    def _own_batches(self, number: int, stage: Stage) -> list[list[Window]]:
        """This rank's batches of a pool, kept until another pool is asked for."""
        if self._made[:2] != (number, stage):
            self._made = number, stage, self._make_pool(number, stage)[self.ranks.rank::self.ranks.world_size]
        return self._made[2]

    def __getitem__(self, request: tuple[int, Stage]) -> tuple[tuple[int, Stage], Part | ValueError]:
        """Part n of all pools' parts, made in a worker. A plain error is handed over: raised here it would come out with a traceback in its message."""
        pool, part = divmod(request[0], PARTS)
        try:
            batches = self._own_batches(pool, request[1])
            first, end = (len(batches) * p // PARTS for p in (part, part + 1))
            return request, Part(len(batches), first, [collate_arrays(w, self.cfg, self.tokenizer) for w in batches[first:end]])
        except ValueError as error:
            return request, error

    def __getstate__(self) -> dict:
        return vars(self) | {"_workers": None, "_made": ()}          # for a worker

    def _fetch(self) -> tuple[int, Arrays | None]:
        """How many batches this rank has in the present pool, and the one in turn (None: they are fewer)."""
        if self._workers:
            return self._workers.get(self.pool_number, self.pool_stage, self.place)
        batches = self._own_batches(self.pool_number, self.pool_stage)
        return len(batches), collate_arrays(batches[self.place], self.cfg, self.tokenizer) if self.place < len(batches) else None

    def draw(self, stage: Stage | None = None) -> tuple[FrameBatch, FrameBatch | None, dict]:
        """One micro-batch of this rank in narrow types, from a pool of the given stage: a new stage begins a new pool."""
        if self.place and stage is not None and stage != self.pool_stage:
            self._next_pool()
        if self.place == 0:
            self.pool_stage = stage or self.pool_stage
        count, arrays = self._fetch()
        if arrays is None:                                           # another number of ranks padded it otherwise
            self._next_pool()
            count, arrays = self._fetch()
        self.place += 1
        if self.place >= count:
            self._next_pool()
        batch, history = map(narrow_batch, arrays)
        self.used += int((batch.turn >= 0).sum())
        self.padded += batch.turn.numel()
        return batch, history, self.state_dict()

    def next_batch(self, stage: Stage | None = None) -> tuple[FrameBatch, FrameBatch | None, dict]:
        """`draw`, ready for the model."""
        batch, history, state = self.draw(stage)
        return widen(batch), history and widen(history), state

    def _next_pool(self) -> None:
        self.pool_number, self.place = self.pool_number + 1, 0

    def close(self) -> None:
        """End the workers; a batch asked for later starts them again."""
        if self._workers:
            self._workers.close()

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
        self.pool_number = state["pool"]
        self.place = state["place"] * state.get("ranks", self.ranks.world_size) // self.ranks.world_size      # the same place for more or fewer ranks
        self.pool_stage = Stage(state["max_context"], state["max_seconds"])


def pack(windows: list[Window], batch_positions: int) -> list[list[Window]]:
    """Group windows of like length so that rows x (longest window + longest history) <= batch_positions."""
    batches: list[list[Window]] = []
    longest = earlier = 0                                            # of the last batch
    for own, past, window in _by_length([(w.positions(), w.earlier(), w) for w in windows], batch_positions):
        longest, earlier = max(longest, own), max(earlier, past)
        if not batches or (len(batches[-1]) + 1) * (longest + earlier) > batch_positions:
            batches.append([])
            longest, earlier = own, past
        batches[-1].append(window)
    return batches


def _by_length(sized: list[tuple[int, int, Window]], batch_positions: int) -> list[tuple[int, int, Window]]:
    """(length of the window, of its history, window), longest first. The two are padded apart: with histories, strips of like history,
    each sorted by the windows, longest and shortest first in turn."""
    total = sum(own + past for own, past, _ in sized)
    # as many strips as batches in a strip would pad both alike; windows have the losses besides, so fewer strips
    count = max(1, round(0.7 * (total / batch_positions) ** 0.5)) if any(past for _, past, _ in sized) else 1
    strips: list[list[tuple[int, int, Window]]] = [[] for _ in range(count)]
    done = 0
    for own, past, window in sorted(sized, key=lambda s: s[1], reverse=True):
        strips[done * count // total].append((own, past, window))
        done += own + past
    return [s for i, strip in enumerate(strips) for s in sorted(strip, key=lambda s: s[0], reverse=i % 2 == 0)]


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by all the numbers: the same everywhere, unlike neighbours."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """A permutation of `count` targets; two are kept, since a pool may begin in one epoch and end in the next."""
    return torch.randperm(count, generator=_generator(seed, 0, epoch)).tolist()


def _randint(g: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (1,), generator=g))


# ----------------------------------------------------------------------------- worker processes

PARTS = 8        # a worker hands a pool over in so many parts: a whole one is hundreds of megabytes where batches are large


class Part(NamedTuple):
    """Batches first, first + 1, ... of the `count` that a rank has in a pool."""
    count: int
    first: int
    batches: list[Arrays]


class Workers:
    """Parts of pools from processes that work ahead (torch's DataLoader), in order.

    What is asked for ahead is the rest of the present pool and those after it. Where another pool or stage is wanted,
    requests go on from there and what is still to come of the earlier ones is thrown away: batches are those of no workers.
    """

    def __init__(self, data: ConversationDataset, count: int):
        self._data, self._count, self._parts = data, count, None
        self.close()

    def get(self, pool: int, stage: Stage, place: int) -> tuple[int, Arrays | None]:
        """How many batches the pool has, and the one at `place` (None: there are fewer). ValueError as the worker raised it."""
        def of_this_pool(request: tuple[int, Stage]) -> bool:
            return (request[0] // PARTS, request[1]) == (pool, stage)
        while True:
            if self._held and of_this_pool(self._held[0]):
                count, first, batches = self._held[1]
                if place >= count or first <= place < first + len(batches):
                    return count, None if place >= count else batches[place - first]
            if not any(map(of_this_pool, self._asked)):
                self._next = pool * PARTS, stage
            if self._parts is None:
                self._start()
            request, part = next(self._parts)
            self._asked.remove(request)
            if isinstance(part, ValueError):
                raise part
            self._held = request, part

    def _start(self) -> None:
        # a tuple stays what it is with collate_fn=tuple: the default makes tensors, each with a file descriptor and shared memory;
        # without a generator the DataLoader draws from the one that dropout draws from
        self._parts = iter(DataLoader(self._data, sampler=self._requests(), batch_size=None, num_workers=self._count, collate_fn=tuple,
                                      worker_init_fn=_obey_the_main_process, generator=torch.Generator()))
        atexit.register(self.close)

    def _requests(self) -> Iterator[tuple[int, Stage]]:
        """Endless; the DataLoader takes one more for each part it hands out."""
        while True:
            request, self._next = self._next, (self._next[0] + 1, self._next[1])
            self._asked.append(request)
            yield request

    def close(self) -> None:
        if self._parts is not None:
            self._parts._shutdown_workers()                          # torch has no other way to say when
            atexit.unregister(self.close)
        self._parts, self._held, self._asked = None, None, []


def _obey_the_main_process(worker: int) -> None:
    """Ctrl-C and often SIGTERM reach every process of a run: the main one finishes its step and saves, so workers wait for its word.
    Killed it says none, and DataLoader does not see that while a part waits in a pipe: then they leave."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_without, args=(os.getppid(),), daemon=True).start()


def _leave_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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
