"""Shards of tokens made by one process or by many machines that share a folder.

    RANK=3 WORLD_SIZE=8 python dataset_pipeline.py --data data/people      # what torchrun and `srun` set by themselves

No process talks to another: a shard is there when its file is there and right, a claim file beside it says that somebody is at it. Each
worker makes its share, then whatever is still missing and not freshly claimed: a lost worker's shards are made by the others. Made
twice a shard is the same and is replaced whole, so a claim need not be exact.

Plans are streamed from the manifest, so the memory does not grow with the hours.
"""
from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable, Iterator

from runtime import write_json

STALE_SECONDS = 600.0       # a claim so old is a lost worker's
_ID = re.compile(rb'"recording_id":\s*"((?:[^"\\]|\\.)*)"')


def place() -> tuple[int, int]:
    """(rank, number of workers) from torchrun's environment or Slurm's; (0, 1) alone. ValueError where they contradict each other."""
    rank, world = (os.environ.get(a, os.environ.get(b, default)) for a, b, default in (("RANK", "SLURM_PROCID", "0"), ("WORLD_SIZE", "SLURM_NTASKS", "1")))
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} do not fit: ranks count from 0")
    return int(rank), int(world)


# ----------------------------------------------------------------------------- plans, streamed

def count_in_order(path: Path) -> int | None:
    """Supervisions in a manifest whose conversations stand together and by ascending id; None where they do not (or it is damaged)."""
    last, count = b"", 0
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                found = _ID.search(line)
                if not found or found[1] < last:
                    return None
                last, count = found[1], count + 1
    except (OSError, EOFError):
        return None
    return count


def stream(path: Path) -> Iterator[list[dict]]:
    """The conversations of a manifest in order, one at a time, each a list of supervisions by start."""
    turns: list[dict] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            supervision = json.loads(line)
            if turns and turns[-1]["recording_id"] != supervision["recording_id"]:
                yield sorted(turns, key=lambda s: s["start"])
                turns = []
            turns.append(supervision)
    if turns:
        yield sorted(turns, key=lambda s: s["start"])


def grouped(conversations: Iterator[list[dict]], turns_per_shard: int) -> Iterator[list[dict]]:
    """Whole conversations in groups of at least turns_per_shard supervisions."""
    shard: list[dict] = []
    for turns in conversations:
        if len(shard) >= turns_per_shard:
            yield shard
            shard = []
        shard = shard + turns
    if shard:
        yield shard


# ----------------------------------------------------------------------------- shared work

def claim(path: Path, stale_seconds: float = STALE_SECONDS) -> bool:
    """Take a shard: True where nobody else freshly has. Taken over from whoever has been silent for stale_seconds."""
    mark = path.with_name(f".{path.name}.claim")
    mark.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if time.time() - mark.stat().st_mtime > stale_seconds:
            mark.unlink(missing_ok=True)
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return True
    except FileExistsError:
        return False


def release(path: Path) -> None:
    path.with_name(f".{path.name}.claim").unlink(missing_ok=True)


def share(plan: Callable[[], Iterator[tuple[Path, list]]], done: Callable[[Path, list], bool], make: Callable[[Path, list], None], stale_seconds: float = STALE_SECONDS,
          poll: float = 2.0) -> list[Path]:
    """Make every shard of the plan that is not done, together with the other workers; returns when all are there. All paths of the plan.

    plan() gives (path, what it is made of) anew each time it is called; rank r of n begins with every n-th shard from the r-th.
    """
    rank, world = place()
    paths = []
    for number, (path, parts) in enumerate(plan()):
        paths.append(path)
        if number % world == rank and not done(path, parts):
            _make(path, parts, make, world, stale_seconds)
    missing = world > 1
    while missing:
        missing, made = False, False
        for path, parts in plan():
            if not done(path, parts):
                made = _make(path, parts, make, world, stale_seconds) or made
                missing = True
        if missing and not made:
            time.sleep(poll)                                                # others are at what is left
    return paths


def _make(path: Path, parts: list, make: Callable[[Path, list], None], world: int, stale_seconds: float) -> bool:
    if world > 1 and not claim(path, stale_seconds):
        return False
    try:
        make(path, parts)
    finally:
        if world > 1:
            release(path)
    return True


def stable(data: bytes) -> bytes:
    """A safetensors file with its metadata in order (the package writes it in a random one), so that a shard made twice is the same bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size:]


# ----------------------------------------------------------------------------- the manifest

def write_manifest(folder: Path, names: list[str]) -> dict:
    """folder/manifest.json: size and SHA-256 of each shard, so that a copy (object storage, another machine) can be checked. Unchanged files are not read again."""
    path = folder / "manifest.json"
    old = {}
    with suppress(OSError, ValueError, KeyError):
        old = json.loads(path.read_text(encoding="utf-8"))["shards"]
    shards = {}
    for name in sorted(names):
        stat = (folder / name).stat()
        known = old.get(name, {})
        if (known.get("bytes"), known.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
            known = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(folder / name)}
        shards[name] = known
    write_json(path, {"format": 1, "bytes": sum(s["bytes"] for s in shards.values()), "shards": shards})
    return shards


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_manifest(folder: Path) -> list[str]:
    """Names of shards that are missing or not what manifest.json says. ValueError without a manifest."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}: run python dataset_pipeline.py")
    shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
    return [name for name, known in shards.items() if not (Path(folder) / name).is_file() or sha256(Path(folder) / name) != known["sha256"]]
