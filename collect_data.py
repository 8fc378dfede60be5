"""Collect conversations with transcripts: audio and Lhotse manifests under one folder.

    python collect_data.py --target_hours 1                        # synthetic speech, from packages alone
    python collect_data.py --source folder --input my_recordings   # your audio, a .txt beside each file

Writes OUTPUT/conversations/<split>/<id>/*.flac, OUTPUT/manifests/<split>/{recordings,supervisions,cuts}.jsonl.gz
and OUTPUT/collection.json. Paths in the manifests are relative to OUTPUT. Interrupted runs go on where they stopped.
"""
from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
import time
from pathlib import Path

import config

SPLITS = ("train", "validation", "test")


# ----------------------------------------------------------------------------- what is already there

class Index:
    """index.jsonl: a header with the settings, then one line per finished conversation, in order."""

    def __init__(self, root: Path, settings: dict):
        self.path, self.rows = root / "index.jsonl", []
        header = json.dumps({"settings": settings}, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else []
        if lines and lines[0] and lines[0] != header:
            raise ValueError(f"{root} holds a collection made with other settings: use --fresh to replace it or another --output")
        for line in lines[1:]:
            with contextlib.suppress(json.JSONDecodeError):                # the last line may be cut off
                self.rows.append(json.loads(line))
        self._rewrite(header)

    def _rewrite(self, header: str) -> None:
        temporary = self.path.with_name("index.jsonl.tmp")
        temporary.write_text("\n".join([header, *map(_dumps, self.rows)]) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", encoding="utf-8")

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self._file.write(_dumps(row) + "\n")
        self._file.flush()

    @property
    def seconds(self) -> float:
        return sum(row["duration"] for row in self.rows)

    def close(self) -> None:
        self._file.close()


def _dumps(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


# ----------------------------------------------------------------------------- Lhotse manifests

def _recording(row: dict) -> dict:
    return {"id": row["id"], "sources": [{"type": "file", "channels": [0], "source": row["audio"]}], "sampling_rate": 24000,
            "num_samples": row["num_samples"], "duration": row["duration"], "channel_ids": [0]}


def _supervisions(row: dict) -> list[dict]:
    return [{"id": t["id"], "recording_id": row["id"], "start": t["start"], "duration": t["duration"], "channel": 0, "text": t["text"],
             "language": "English", "speaker": t["speaker"], "custom": t["custom"]} for t in row["turns"]]


def _cut(row: dict) -> dict:
    return {"id": row["id"], "start": 0, "duration": row["duration"], "channel": 0, "supervisions": _supervisions(row),
            "recording": _recording(row), "custom": {"kind": row["kind"], "engine": row["engine"], "characters": row.get("characters", [])},
            "type": "MonoCut"}


def _write_lines(path: Path, lines) -> None:
    """gzip without a time stamp, so that the same lines are the same bytes; written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0, compresslevel=6) as file:
        for line in lines:
            file.write((_dumps(line) + "\n").encode("utf-8"))
    os.replace(temporary, path)


def write_manifests(root: Path, rows: list[dict]) -> None:
    """recordings, supervisions and cuts of each split."""
    for split in SPLITS:
        folder = root / "manifests" / split
        folder.mkdir(parents=True, exist_ok=True)
        mine = [row for row in rows if row["split"] == split]
        _write_lines(folder / "recordings.jsonl.gz", map(_recording, mine))
        _write_lines(folder / "supervisions.jsonl.gz", (s for row in mine for s in _supervisions(row)))
        _write_lines(folder / "cuts.jsonl.gz", map(_cut, mine))


def write_summary(root: Path, rows: list[dict], settings: dict, seconds: float) -> dict:
    """collection.json: hours, turns, engine shares, seconds taken in all."""
    total = sum(row["duration"] for row in rows) or 1.0
    path = root / "collection.json"
    before = json.loads(path.read_text(encoding="utf-8"))["seconds_taken"] if path.is_file() else 0.0
    engines = sorted({row["engine"] for row in rows})
    summary = settings | {
        "hours": round(total / 3600, 4), "conversations": len(rows), "turns": sum(len(row["turns"]) for row in rows),
        "hours_per_split": {s: round(sum(r["duration"] for r in rows if r["split"] == s) / 3600, 4) for s in SPLITS},
        "engine_shares": {e: round(sum(r["duration"] for r in rows if r["engine"] == e) / total, 4) for e in engines},
        "characters": len({t["speaker"] for r in rows for t in r["turns"]}), "seconds_taken": round(before + seconds, 1)}
    temporary = path.with_name("collection.json.tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return summary


# ----------------------------------------------------------------------------- synthetic

_plan = None


def _start_worker(settings: dict) -> None:
    global _plan
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    import synthetic_conversations
    _plan = synthetic_conversations.Plan(settings["seed"], settings["engine"], settings["kokoro_share"])


def _render(job: tuple) -> dict:
    import synthetic_conversations
    index, root = job
    return synthetic_conversations.render(_plan.script(index), root)


@contextlib.contextmanager
def _results(jobs, settings: dict, workers: int):
    """Iterator over the rendered conversations, in order, whatever the number of workers."""
    if workers == 1:
        _start_worker(settings)
        yield map(_render, jobs)
        return
    import multiprocessing
    pool = multiprocessing.get_context("spawn").Pool(workers, _start_worker, (settings,))
    try:
        yield _bounded(pool, jobs, workers * 3)
    finally:
        pool.terminate()
        pool.join()


def _bounded(pool, jobs, ahead: int):
    """imap, but never more than `ahead` jobs in flight."""
    pending = []
    for job in jobs:
        pending.append(pool.apply_async(_render, (job,)))
        if len(pending) >= ahead:
            yield pending.pop(0).get()
    while pending:
        yield pending.pop(0).get()


def collect_synthetic(root: Path, index: Index, settings: dict, hours: float, workers: int) -> None:
    """Speaks conversations until `hours` are there (and each split has one)."""
    import itertools
    from tqdm import tqdm
    target = hours * 3600
    if index.seconds >= target and len(index.rows) >= 3:
        return
    jobs = ((i, str(root)) for i in itertools.count(len(index.rows)))
    with tqdm(total=round(target), initial=round(index.seconds), unit="s", desc="speaking", dynamic_ncols=True) as bar, \
            _results(jobs, settings, workers) as results:
        for row in results:
            index.add(row)
            bar.update(round(row["duration"]))
            if index.seconds >= target and len(index.rows) >= 3:
                break
    _remove_orphans(root, index.rows)


def _remove_orphans(root: Path, rows: list[dict]) -> None:
    """Conversations begun by workers beyond the target, and unfinished ones."""
    known = {row["id"] for row in rows}
    for folder in (root / "conversations").glob("*/*"):
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------- command line

def _parser() -> config.Parser:
    parser = config.Parser(description="Collect conversations with transcripts into audio and Lhotse manifests.")
    parser.add_argument("--target_hours", type=float, default=1.0, help="hours of conversation to collect (default 1)")
    parser.add_argument("--source", default="synthetic", help="synthetic | folder | the name of a Lhotse recipe (default synthetic)")
    parser.add_argument("--engine", default="mix", choices=("hibari", "kokoro", "mix"), help="voices of the synthetic source (default mix)")
    parser.add_argument("--kokoro_share", type=float, default=0.06, help="share of Kokoro's conversations in the mix; about twice real time (default 0.06)")
    parser.add_argument("--seed", type=int, default=1234, help="same seed, same bytes (default 1234)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core, at most 8 (default 0)")
    parser.add_argument("--output", default="data/synthetic", help="folder to write (default data/synthetic)")
    parser.add_argument("--fresh", action="store_true", help="start again: delete what an earlier run wrote there")
    return parser


def _clear(root: Path) -> None:
    for name in ("conversations", "manifests", "tokens"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("index.jsonl", "collection.json"):
        (root / name).unlink(missing_ok=True)


def run(args) -> dict:
    root, workers = Path(args.output), args.workers or min(8, os.cpu_count() or 1)
    if not 0 < args.target_hours <= 10000:
        raise ValueError(f"--target_hours {args.target_hours} must be above 0")
    if not 1 <= workers <= 256:
        raise ValueError(f"--workers {args.workers} must be between 0 and 256")
    import synthetic_conversations
    settings = {"source": args.source, "engine": args.engine, "kokoro_share": args.kokoro_share, "seed": args.seed,
                "version": synthetic_conversations.VERSION}
    synthetic_conversations.Plan(args.seed, args.engine, args.kokoro_share)   # complains before anything is deleted
    if args.fresh:
        _clear(root)
    root.mkdir(parents=True, exist_ok=True)
    begin, index = time.time(), Index(root, settings)
    try:
        collect_synthetic(root, index, settings, args.target_hours, workers)
    finally:
        index.close()
        write_manifests(root, index.rows)
    return write_summary(root, index.rows, settings, time.time() - begin)


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    try:
        summary = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(f"{args.output}: {summary['hours']:.2f} h, {summary['conversations']} conversations, {summary['turns']} turns, "
          f"{summary['characters']} characters, engines {summary['engine_shares']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
