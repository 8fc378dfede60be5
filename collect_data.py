"""Collect conversations with transcripts: audio and Lhotse manifests under one folder.

    python collect_data.py --target_hours 1                        # synthetic speech, from packages alone
    python collect_data.py --source folder --input my_recordings   # your audio, a .txt beside each file

Writes OUTPUT/conversations/<split>/<id>/*.flac, OUTPUT/manifests/<split>/{recordings,supervisions,cuts}.jsonl.gz
and OUTPUT/collection.json. Paths in the manifests are relative to OUTPUT. Interrupted runs go on where they stopped.
"""
from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from pathlib import Path

import config

SPLITS = ("train", "validation", "test")
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff"}
PART_NAMES = {"train": ("train",), "validation": ("valid", "dev"), "test": ("test", "eval")}   # in the part names of corpora


# ----------------------------------------------------------------------------- what is already there

class Index:
    """index.jsonl: a header with the settings, then one line per finished conversation, in order."""

    def __init__(self, root: Path, settings: dict):
        self.path, self.rows = root / "index.jsonl", []
        header = json.dumps({"settings": settings}, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.is_file() else []
        if lines[1:2] not in ([], [""]) and lines[0] != header:
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
    _plan = synthetic_conversations.Plan(settings["seed"], settings["engine"], settings["kokoro_share"], texts=settings.get("texts", ""))


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
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_quiet_worker, (settings,))
    try:
        yield _bounded(pool, jobs, workers * 3)
    except BrokenProcessPool:
        raise ValueError("a worker process died (out of memory?): run again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_quiet_worker(settings: dict) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)                           # Ctrl-C is the parent's business
    _start_worker(settings)


def _bounded(pool, jobs, ahead: int):
    """Results in order, with never more than `ahead` jobs in flight."""
    pending = deque()
    for job in jobs:
        pending.append(pool.submit(_render, job))
        if len(pending) >= ahead:
            yield pending.popleft().result()


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


# ----------------------------------------------------------------------------- recordings of people

def _store(root: Path, conversation: str, split: str, source: str, licence: str, turns: list[dict]) -> dict:
    """Writes one recorded conversation like a synthetic one. turns: {audio (n,), text, speaker, start (s) or None}."""
    import numpy as np
    import audio_io
    from synthetic_conversations import measured_f0
    folder, speakers = Path("conversations") / split / conversation, list(dict.fromkeys(t["speaker"] for t in turns))
    rows, clock, mix = [], 0.0, np.zeros(0, np.float32)
    for k, turn in enumerate(turns):
        audio, path = turn["audio"], folder / f"{k:02d}.flac"
        start = clock if turn["start"] is None else turn["start"]
        clock = start + len(audio) / audio_io.SAMPLE_RATE + 0.2
        audio_io.write_audio(root / path, audio)
        f0 = measured_f0(audio)
        custom = {"mood": None, "character": turn["speaker"], "engine": source, "f0_median": round(float(np.median(f0)), 1) if len(f0) else 0.0,
                  "turn_audio": path.as_posix(), "sha256": hashlib.sha256((root / path).read_bytes()).hexdigest(), "licence": licence,
                  "speaker_index": speakers.index(turn["speaker"]), "alignment": None}
        rows.append({"id": f"{conversation}-{k:02d}", "start": round(start, 4), "num_samples": len(audio), "duration": len(audio) / audio_io.SAMPLE_RATE,
                     "text": turn["text"], "speaker": turn["speaker"], "custom": custom})
        place = round(start * audio_io.SAMPLE_RATE)
        mix = np.pad(mix, (0, max(0, place + len(audio) - len(mix))))
        mix[place: place + len(audio)] += audio
    audio_io.write_audio(root / folder / "mix.flac", mix)
    return {"id": conversation, "split": split, "kind": source, "engine": source, "num_samples": len(mix), "duration": len(mix) / audio_io.SAMPLE_RATE,
            "audio": (folder / "mix.flac").as_posix(), "turns": rows}


def _text_beside(path: Path) -> str:
    """The normalised transcript in the .txt beside an audio file."""
    import text_tokenizer
    beside = path.with_suffix(".txt")
    try:
        return text_tokenizer.normalise(beside.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"no transcript for {path}: write what is said into {beside.name} beside it") from None
    except UnicodeDecodeError:
        raise ValueError(f"{beside} is not UTF-8 text: save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{beside}: {error}") from None


def folder_conversations(folder: Path):
    """Yields (id, [audio paths]): a subfolder is a conversation of its files in name order, a loose file one of its own."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give the folder of your recordings with --input")
    groups: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
        inside = path.parent.relative_to(folder).as_posix()
        groups.setdefault(path.stem if inside == "." else inside, []).append(path)
    if not groups:
        raise ValueError(f"no audio in {folder}: put {', '.join(sorted(AUDIO_SUFFIXES))} files there, a .txt beside each")
    yield from groups.items()


def _held_out(names: list[str]) -> dict[str, str]:
    """A split per conversation or speaker by its hash; from three names on, one at least validates and one tests."""
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    share = max(1, len(order) // 25) if len(order) >= 3 else 0
    return {name: "validation" if k < share else "test" if k < 2 * share else "train" for k, name in enumerate(order)}


def collect_folder(root: Path, index: Index, source: Path, hours: float) -> None:
    """A user's recordings: NAME.wav with NAME.txt; the speaker is what follows the last "_" of the name, else the conversation."""
    import audio_io
    from tqdm import tqdm
    groups = list(folder_conversations(source))
    for paths in (paths for _, paths in groups):
        for path in paths:
            _text_beside(path)                                             # all complaints before any work
    splits, done = _held_out([name for name, _ in groups]), {row["id"] for row in index.rows}
    for name, paths in tqdm(groups, desc="reading", unit="conversation"):
        safe = name.replace("/", "-")
        if safe in done or index.seconds >= hours * 3600:
            continue
        turns = [{"audio": audio_io.read_audio(p), "text": _text_beside(p), "start": None,
                  "speaker": p.stem.rsplit("_", 1)[1] if "_" in p.stem else safe} for p in paths]
        index.add(_store(root, safe, splits[name], "folder", "the owner's", turns))


def _recipe(name: str):
    """(download or None, prepare) of a Lhotse recipe."""
    import difflib
    from lhotse import recipes
    known = sorted(f[8:] for f in dir(recipes) if f.startswith("prepare_"))
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise ValueError(f"unknown source {name!r}: use --source synthetic, folder or a Lhotse recipe{' such as ' + ', '.join(near) if near else ''} "
                         f"({len(known)} are known, e.g. daily_talk, librispeech, libritts, ami)")
    return getattr(recipes, f"download_{name}", None), getattr(recipes, f"prepare_{name}")


def _corpus(name: str, root: Path, given: str) -> Path:
    """The corpus folder: --input, or downloaded by the recipe into OUTPUT/download."""
    download, _ = _recipe(name)
    if given:
        if not Path(given).is_dir():
            raise ValueError(f"no folder {given}: give the folder of the corpus with --input")
        return Path(given)
    if download is None:
        raise ValueError(f"{name} cannot be downloaded by Lhotse (it needs a licence): get it by hand and give its folder with --input")
    target = root / "download"
    target.mkdir(parents=True, exist_ok=True)
    try:
        found = download(target)
    except Exception as error:                                             # each recipe has its own way to fail without a network
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot download {name} ({type(error).__name__}: {reason}): check the network, or get it by hand and give its folder with --input") from None
    return Path(found) if found else target


def _parts(found, name: str = ""):
    """Yields (split name, recordings, supervisions) from whatever nesting a recipe returns."""
    if isinstance(found, dict) and "recordings" in found:
        if "supervisions" in found:
            yield name, found["recordings"], found["supervisions"]
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from _parts(value, f"{name}/{key}")


def _recorded_turns(recording, supervisions) -> list[dict]:
    """The turns of one recording; what has no transcript in letters is left out."""
    import audio_io
    import text_tokenizer
    channels, turns = None, []
    for s in sorted(supervisions, key=lambda s: s.start):
        try:
            text = text_tokenizer.normalise(s.text or "")
        except ValueError:
            continue
        if channels is None:
            sound = recording.load_audio()                                 # (channels, n)
            channels = {c: audio_io.resample(sound[k], recording.sampling_rate, audio_io.SAMPLE_RATE) for k, c in enumerate(recording.channel_ids)}
        channel = s.channel[0] if isinstance(s.channel, list) else s.channel
        begin = int(s.start * audio_io.SAMPLE_RATE)
        audio = channels.get(channel, next(iter(channels.values())))[begin: begin + int(s.duration * audio_io.SAMPLE_RATE)]
        if len(audio) >= audio_io.SAMPLE_RATE // 10:
            turns.append({"audio": audio, "text": text, "speaker": str(s.speaker or recording.id), "start": s.start})
    first = turns[0]["start"] if turns else 0.0
    return [t | {"start": t["start"] - first} for t in turns]


def collect_lhotse(root: Path, index: Index, name: str, given: str, hours: float) -> None:
    """A corpus by Lhotse's own download and prepare functions; a recording is a conversation."""
    from tqdm import tqdm
    _, prepare = _recipe(name)
    corpus = _corpus(name, root, given)
    try:
        parts = list(_parts(prepare(corpus)))
    except Exception as error:
        raise ValueError(f"{corpus} is not the {name} corpus as Lhotse expects it ({' '.join(str(error).split())[:200]}): check --input") from None
    done = {row["id"] for row in index.rows}
    with tqdm(total=round(hours * 3600), initial=round(index.seconds), unit="s", desc=f"reading {name}", dynamic_ncols=True) as bar:
        for part, recordings, supervisions in parts:
            groups: dict[str, list] = {}
            for s in supervisions:
                groups.setdefault(s.recording_id, []).append(s)
            splits = _held_out([str(groups[r][0].speaker) for r in groups])
            named = next((split for split, keys in PART_NAMES.items() if any(k in part for k in keys)), None)
            for recording in recordings:
                safe = recording.id.replace("/", "-")
                if safe in done or recording.id not in groups or index.seconds >= hours * 3600:
                    continue
                turns = _recorded_turns(recording, groups[recording.id])
                if turns:
                    split = named or splits[str(groups[recording.id][0].speaker)]
                    row = _store(root, safe, split, name, f"of the corpus {name}", turns)
                    index.add(row)
                    bar.update(round(row["duration"]))
    if not index.rows:
        raise ValueError(f"no recording of {name} in {corpus} has a transcript: check --input")


# ----------------------------------------------------------------------------- command line

def _parser() -> config.Parser:
    parser = config.Parser(description="Collect conversations with transcripts into audio and Lhotse manifests.")
    parser.add_argument("--target_hours", type=float, default=1.0, help="hours of conversation to collect (default 1)")
    parser.add_argument("--source", default="synthetic", help="synthetic | folder | the name of a Lhotse recipe (default synthetic)")
    parser.add_argument("--input", default="", help="your recordings (source folder), or a corpus that is already on the disk (Lhotse recipe)")
    parser.add_argument("--engine", default="mix", choices=("hibari", "kokoro", "mix"), help="voices of the synthetic source (default mix)")
    parser.add_argument("--kokoro_share", type=float, default=0.06, help="share of Kokoro's conversations in the mix; about twice real time (default 0.06)")
    parser.add_argument("--texts", default="", metavar="PATH", help="speak the sentences of this file (one a line) instead of the dialogues; or the folder "
                        "of WordNet, such as /usr/share/wordnet of Debian's wordnet-base")
    parser.add_argument("--seed", type=int, default=1234, help="same seed, same bytes (default 1234)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core, at most 8 (default 0)")
    parser.add_argument("--output", default="data/synthetic", help="folder to write (default data/synthetic)")
    parser.add_argument("--fresh", action="store_true", help="start again: delete what an earlier run wrote there")
    return parser


def _clear(root: Path) -> None:
    for name in ("conversations", "manifests", "tokens"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("index.jsonl", "collection.json", "readings.json"):
        (root / name).unlink(missing_ok=True)


def _check(args) -> None:
    """Complains about the flags before anything is written or deleted."""
    if not 0 < args.target_hours <= 100000:
        raise ValueError(f"--target_hours {args.target_hours} must be above 0")
    if not 0 <= args.workers <= 256:
        raise ValueError(f"--workers {args.workers} must be between 0 and 256")
    if not 0 <= args.kokoro_share <= 1:
        raise ValueError(f"--kokoro_share {args.kokoro_share} must be between 0 and 1")
    if args.source == "folder" and not args.input:
        raise ValueError("source folder needs your recordings: add --input DIR")
    if args.source == "folder":
        next(folder_conversations(Path(args.input)))
    elif args.source == "synthetic":
        import synthetic_conversations
        synthetic_conversations.prepare("hibari" if args.engine == "mix" and not args.kokoro_share else args.engine)
        if args.texts:
            synthetic_conversations.readings(args.texts)
    else:
        _recipe(args.source)


def _settings(args) -> dict:
    if args.source != "synthetic":
        return {"source": args.source, "input": args.input}
    from synthetic_conversations import VERSION
    return {"source": args.source, "engine": args.engine, "kokoro_share": args.kokoro_share, "seed": args.seed, "version": VERSION} | ({"texts": args.texts} if args.texts else {})


def _with_readings(root: Path, settings: dict) -> dict:
    """The settings for the workers: the sentences to read are sifted once and written down."""
    if not settings.get("texts"):
        return settings
    from synthetic_conversations import readings
    path = root / "readings.json"
    path.write_text(json.dumps(readings(settings["texts"]), ensure_ascii=False), encoding="utf-8")
    return settings | {"texts": str(path)}


def run(args) -> dict:
    _check(args)
    root, settings = Path(args.output), _settings(args)
    if args.fresh:
        _clear(root)
    root.mkdir(parents=True, exist_ok=True)
    begin, index = time.time(), Index(root, settings)
    try:
        if args.source == "synthetic":
            collect_synthetic(root, index, _with_readings(root, settings), args.target_hours, args.workers or min(8, os.cpu_count() or 1))
        elif args.source == "folder":
            collect_folder(root, index, Path(args.input), args.target_hours)
        else:
            collect_lhotse(root, index, args.source, args.input, args.target_hours)
    finally:
        index.close()
        if index.rows:
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
