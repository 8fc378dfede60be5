"""Collect conversations with transcripts: audio and Lhotse manifests under one folder.

    python collect_data.py --target_hours 1                        # synthetic speech, from packages alone
    python collect_data.py --source folder --path my_recordings    # your audio, with or without transcripts
    python collect_data.py --sources librispeech,daily_talk,ami --target_hours 100
    python collect_data.py corpora | report | plan                 # what there is; a page of what was collected; what many hours cost

Writes OUTPUT/conversations/<split>/<id>/*.flac, OUTPUT/manifests/<split>/{recordings,supervisions,cuts}.jsonl.gz
and OUTPUT/collection.json. Paths in the manifests are relative to OUTPUT. Interrupted runs go on where they stopped.
"""
from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from pathlib import Path

import config

SPLITS = ("train", "validation", "test")


# ----------------------------------------------------------------------------- what is already there

class Index:
    """index.jsonl: a header with the settings, then one line per finished conversation, in order.

    A line is written at once or not at all, so a killed run loses at most what it was working on. In memory is a few words per
    conversation (`rows`); `read` gives the whole lines again.
    """

    def __init__(self, root: Path, settings: dict):
        self.path, self.rows, self.seconds = root / "index.jsonl", [], 0.0
        header = (json.dumps({"settings": settings}, sort_keys=True) + "\n").encode()
        lines = self._lines() if self.path.is_file() else iter(())
        first = next(lines, None)
        end = len(header)
        for offset, line in lines:
            if first[1] != header:
                raise ValueError(f"{root} holds a collection made with other settings: use --fresh to replace it or another --output")
            with contextlib.suppress(ValueError):                          # a cut-off line
                self._take(json.loads(line), offset)
                end = offset + len(line)
        self._file = open(self.path, "r+b" if first and first[1] == header else "w+b")
        self._file.write(header)
        self._file.truncate(max(end, len(header)))                         # less a last line that was cut off
        self._file.seek(0, os.SEEK_END)

    def _lines(self):
        offset = 0
        with open(self.path, "rb") as file:
            for line in file:
                yield offset, line
                offset += len(line)

    def _take(self, row: dict, offset: int) -> None:
        self.rows.append({"id": row["id"], "split": row["split"], "duration": row["duration"], "engine": row["engine"], "offset": offset, "turns": len(row["turns"]),
                          "speakers": list({t["speaker"] for t in row["turns"]})})
        self.seconds += row["duration"]

    def add(self, row: dict) -> None:
        offset = self._file.tell()
        self._file.write((_dumps(row) + "\n").encode("utf-8"))
        self._file.flush()
        self._take(row, offset)

    def read(self, rows: list[dict] | None = None):
        """Yields the whole rows, one at a time, in the order of `rows` (default: as they were added)."""
        with open(self.path, "rb") as file:
            for row in self.rows if rows is None else rows:
                file.seek(row["offset"])
                yield json.loads(file.readline())

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
             "language": row.get("language", "English"), "speaker": t["speaker"], "custom": t["custom"]} for t in row["turns"]]


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


def write_manifests(root: Path, index: Index) -> None:
    """recordings, supervisions and cuts of each split, conversations by id; what was left out in dropped.jsonl.gz."""
    for split in SPLITS:
        folder = root / "manifests" / split
        folder.mkdir(parents=True, exist_ok=True)
        mine = sorted((row for row in index.rows if row["split"] == split and row["turns"]), key=lambda row: row["id"])
        _write_lines(folder / "recordings.jsonl.gz", map(_recording, index.read(mine)))
        _write_lines(folder / "supervisions.jsonl.gz", (s for row in index.read(mine) for s in _supervisions(row)))
        _write_lines(folder / "cuts.jsonl.gz", map(_cut, index.read(mine)))
    if any("dropped" in row or row.get("notes") for row in index.read(index.rows[:1])):
        _write_lines(root / "dropped.jsonl.gz", ({"conversation": row["id"], "source": row["engine"]} | lost for row in index.read() for lost in row.get("dropped", [])))


def write_summary(root: Path, index: Index, settings: dict, seconds: float) -> dict:
    """collection.json: hours, turns, engine shares, what was left out, seconds taken in all."""
    rows, total = index.rows, index.seconds or 1.0
    path = root / "collection.json"
    before = json.loads(path.read_text(encoding="utf-8"))["seconds_taken"] if path.is_file() else 0.0
    engines = sorted({row["engine"] for row in rows if row["turns"]})
    summary = settings | {
        "hours": round(index.seconds / 3600, 4), "conversations": sum(row["turns"] > 0 for row in rows), "turns": sum(row["turns"] for row in rows),
        "hours_per_split": {s: round(sum(r["duration"] for r in rows if r["split"] == s) / 3600, 4) for s in SPLITS},
        "engine_shares": {e: round(sum(r["duration"] for r in rows if r["engine"] == e) / total, 4) for e in engines},
        "characters": len({speaker for row in rows for speaker in row["speakers"]}), "seconds_taken": round(before + seconds, 1)}
    if settings["source"] != "synthetic":
        summary["left_out"], summary["notes"] = left_out(index)
    temporary = path.with_name("collection.json.tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return summary


def left_out(index: Index) -> tuple[dict, dict]:
    """({"turns": {reason: count}, "files": {reason: [count, first names]}}, {note: [count, first names]})."""
    turns, files, notes = Counter(), {}, {}
    for row in index.read():
        for lost in row.get("dropped", []):
            if "file" in lost:
                _name(files, lost["reason"], lost["file"])
            else:
                turns[lost["reason"]] += 1
        for note in row.get("notes", []):
            if not note.split(": ", 1)[1].startswith("by "):
                _name(notes, note.split(": ", 1)[1].split(",")[0], note.split(": ", 1)[0])
    return {"turns": dict(turns.most_common()), "files": files}, notes


def _name(table: dict, reason: str, name: str, most: int = 5) -> None:
    entry = table.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < most:
        entry[1].append(name)


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
def _results(jobs, work, start, settings, workers: int):
    """Iterator over work(job), in order, whatever the number of workers; each begins with start(settings)."""
    if workers == 1:
        start(settings)
        yield map(work, jobs)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_quiet_worker, (start, settings))
    try:
        yield _bounded(pool, work, jobs, workers * 3)
    except BrokenProcessPool:
        raise ValueError("a worker process died (out of memory?): run again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_quiet_worker(start, settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)                           # Ctrl-C is the parent's business
    start(settings)


def _bounded(pool, work, jobs, ahead: int):
    """Results in order, with never more than `ahead` jobs in flight."""
    pending = deque()
    for job in jobs:
        pending.append(pool.submit(work, job))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
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
            _results(jobs, _render, _start_worker, settings, workers) as results:
        for row in results:
            index.add(row)
            bar.update(round(row["duration"]))
            if index.seconds >= target and len(index.rows) >= 3:
                break
    _remove_orphans(root, index.rows)


def _remove_orphans(root: Path, rows: list[dict]) -> None:
    """Conversations begun by workers beyond the target, and unfinished ones."""
    known = {row["id"] for row in rows if row["turns"]}
    for folder in (root / "conversations").glob("*/*"):
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------- recordings of people

_options = None


def _start_people(options) -> None:
    global _options
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    _options = options


def _take_in(job: tuple) -> dict:
    import people
    return people.work(job[0], Path(job[1]), _options)


def collect_people(root: Path, index: Index, jobs, options, seconds: float, workers: int, name: str) -> None:
    """Takes in jobs that were not done before until the source has given `seconds` of conversation."""
    import filters
    import people
    from tqdm import tqdm
    seen, done = filters.Seen(), {row["id"] for row in index.rows}
    if options.filters and options.filters.dedupe:
        for row in index.read():
            people.remember(row, seen)
    have = sum(row["duration"] for row in index.rows if row["engine"] == name)
    if have >= seconds:
        return
    waiting = ((job, str(root)) for job in jobs if job.id not in done)
    with tqdm(total=round(seconds / 3600, 2), initial=round(have / 3600, 3), unit="h", desc=f"reading {name}", dynamic_ncols=True, bar_format="{l_bar}{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}]") as bar, \
            _results(waiting, _take_in, _start_people, options, workers) as results:
        for row in results:
            if options.filters and options.filters.dedupe:
                row = people.without_repeats(row, seen, root)
            index.add(row)
            have += row["duration"]
            bar.update(row["duration"] / 3600)
            if have >= seconds:
                break


def collect_sources(root: Path, index: Index, args, options) -> None:
    """Each source gives its share of the hours; what a small one lacks is asked of the ones after it. Smallest first."""
    import corpora
    import people
    names = sorted(_sources(args), key=lambda n: (corpora.CORPORA[n].hours or 1e9) if n in corpora.CORPORA else 0)
    left = args.target_hours * 3600
    def mine(jobs, name):
        for k, job in enumerate(jobs):
            job.id = f"{name}-{job.id}" if len(names) > 1 else job.id
            if k % args.part[1] == args.part[0]:
                yield job
    for number, name in enumerate(names):
        share = left / (len(names) - number)
        if name == "folder":
            jobs = people.folder_jobs(Path(args.input), options)
        else:
            jobs = people.corpus_jobs(name, corpora.corpus_folder(name, args.input, root / "download", share / 3600))
        collect_people(root, index, mine(jobs, name), options, share, args.workers or 1, name)
        left -= min(share, sum(row["duration"] for row in index.rows if row["engine"] == name))
    _remove_orphans(root, index.rows)
    if not any(row["turns"] for row in index.rows):
        lost, _ = left_out(index)
        why = ", ".join([f"{n} x {reason}" for reason, n in lost["turns"].items()] + [f"{n} x {reason} ({', '.join(files)})" for reason, (n, files) in lost["files"].items()])
        raise ValueError(f"nothing usable in {', '.join(names)}{': ' + why if why else ' has a transcript'}: check --path, or relax a limit (--no_filters keeps everything)")


def _draw_filters(root: Path, index: Index, options) -> None:
    """filters.png: what was kept, what not, and why."""
    import filters
    turns = [(t["custom"].get("quality", {}), None) for row in index.read() for t in row["turns"]]
    turns += [(lost.get("values", {}), lost["reason"]) for row in index.read() for lost in row.get("dropped", []) if "file" not in lost]
    if options.filters and turns:
        filters.draw(turns, options.filters, root / "filters.png")


# ----------------------------------------------------------------------------- command line

def _parser() -> config.Parser:
    parser = config.Parser(description="Collect conversations with transcripts into audio and Lhotse manifests.")
    parser.add_argument("--target_hours", type=float, default=1.0, help="hours of conversation to collect (default 1)")
    parser.add_argument("--source", "--sources", dest="source", default="synthetic", help="synthetic | folder | record | names of Lhotse recipes with commas between (default synthetic; "
                        "python collect_data.py corpora lists them)")
    parser.add_argument("--input", "--path", dest="input", default="", metavar="DIR", help="your recordings (source folder), or where a corpus already is (itself, or in DIR/NAME)")
    parser.add_argument("--engine", default="mix", choices=("hibari", "kokoro", "mix"), help="voices of the synthetic source (default mix)")
    parser.add_argument("--kokoro_share", type=float, default=0.06, help="share of Kokoro's conversations in the mix; about twice real time (default 0.06)")
    parser.add_argument("--texts", default="", metavar="PATH", help="speak the sentences of this file (one a line) instead of the dialogues; or the folder "
                        "of WordNet, such as /usr/share/wordnet of Debian's wordnet-base")
    parser.add_argument("--seed", type=int, default=1234, help="same seed, same bytes (default 1234)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core, at most 8 (default 0)")
    parser.add_argument("--output", default="data/synthetic", help="folder to write (default data/synthetic)")
    parser.add_argument("--fresh", action="store_true", help="start again: delete what an earlier run wrote there")
    _people_flags(parser)
    return parser


def _people_flags(parser) -> None:
    """Flags of people's recordings; the limits are those of filters.FilterConfig and segmentation.SegmentationConfig."""
    group = parser.add_argument_group("recordings of people")
    group.add_argument("--listen", default="missing", choices=("missing", "all", "never"), help="what the ASR hears: turns without a transcript (default), all (checks those too, and times the words), nothing")
    group.add_argument("--asr", default="tiny.en", help="Whisper of the listening: the packaged tiny.en (default), or a name or folder of faster-whisper")
    group.add_argument("--licence", default="the owner's", help="of your own recordings, written into the manifests")
    group.add_argument("--part", default="1/1", metavar="K/N", help="only every N-th conversation, beginning with the K-th: N machines collect into N folders (default 1/1)")
    group.add_argument("--no_filters", action="store_true", help="keep every turn as it is, at its own loudness")
    for flag, kind, what in LIMIT_FLAGS:
        group.add_argument(flag, type=kind, default=None, help=what)
    group.add_argument("--script", default="", metavar="FILE", help="source record: lines to be read aloud (default: sentences of the dialogues)")


LIMIT_FLAGS = (("--language", str, "ISO code that the text must be in; '' for any (default en)"), ("--min_seconds", float, "shortest turn (default 0.3)"),
               ("--max_seconds", float, "longest turn (default 30)"), ("--min_snr_db", float, "signal to noise in dB (default 10)"),
               ("--max_clipped", float, "share of clipped samples (default 0.005)"), ("--min_speech", float, "share of a turn that is speech (default 0.4)"),
               ("--min_pace", float, "letters per second (default 2.5)"), ("--max_pace", float, "letters per second (default 30)"),
               ("--min_confidence", float, "of the ASR where it wrote the text (default 0.5)"), ("--min_match", float, "share of a transcript's words that the ASR hears, with --listen all (default 0.5)"),
               ("--min_mos", float, "DistillMOS, 1 to 5; takes a fifth of real time (default 0: off)"), ("--loudness", float, "LUFS that each speaker is brought to (default -23)"),
               ("--channels", str, "auto | split (a person per channel) | mix (voices are told apart) (default auto)"),
               ("--speakers", int, "people in a one-channel recording; 0: find out (default 0)"), ("--max_pause", float, "pause that does not end a turn, s (default 1)"),
               ("--vad_threshold", float, "of the voice activity (default 0.5)"))


def _options_of(args):
    """people.Options of the flags; ValueError names the flag that is wrong."""
    import dataclasses
    import filters
    import people
    import segmentation
    given = {flag[2:]: value for flag, _, _ in LIMIT_FLAGS if (value := getattr(args, flag[2:])) is not None}

    def build(kind):
        return kind(**{k: v for k, v in given.items() if k in {f.name for f in dataclasses.fields(kind)}})
    return people.Options(build(segmentation.SegmentationConfig), None if args.no_filters else build(filters.FilterConfig), args.listen, args.asr, args.licence)


def _sources(args) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in args.source.split(",") if part.strip()))


def _clear(root: Path) -> None:
    for name in ("conversations", "manifests", "tokens"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("index.jsonl", "collection.json", "readings.json", "dropped.jsonl.gz", "filters.png"):
        (root / name).unlink(missing_ok=True)


def _check(args) -> None:
    """Complains about the flags before anything is written or deleted."""
    if not 0 < args.target_hours <= 100000:
        raise ValueError(f"--target_hours {args.target_hours} must be above 0")
    if not 0 <= args.workers <= 256:
        raise ValueError(f"--workers {args.workers} must be between 0 and 256")
    if not 0 <= args.kokoro_share <= 1:
        raise ValueError(f"--kokoro_share {args.kokoro_share} must be between 0 and 1")
    if not _sources(args):
        raise ValueError("--source names nothing: use synthetic, folder, record or Lhotse recipes")
    if _sources(args) == ["synthetic"]:
        import synthetic_conversations
        synthetic_conversations.prepare("hibari" if args.engine == "mix" and not args.kokoro_share else args.engine)
        if args.texts:
            synthetic_conversations.readings(args.texts)
    else:
        _check_people(args)


def _check_people(args) -> None:
    import corpora
    import people
    names = _sources(args)
    if len(names) > 1 and {"synthetic", "record"} & set(names):
        raise ValueError("--source synthetic and record stand alone: collect them into folders of their own, training takes several (--data data/a,data/b)")
    args.part = _part(args.part) if isinstance(args.part, str) else args.part
    options = _options_of(args)
    if names == ["record"]:
        return
    if "folder" in names:
        if not args.input:
            raise ValueError("source folder needs your recordings: add --path DIR")
        people.folder_groups(Path(args.input))
    recipes = [name for name in names if name != "folder"]
    for name in recipes:
        if corpora.recipe(name)[0] is None:
            corpora.corpus_folder(name, args.input, Path(args.output), 0)      # cannot be fetched: it has to be there
    if recipes:
        print(corpora.table(recipes, args.target_hours / len(names)), flush=True)
        corpora.check_disk({name: args.target_hours / len(names) for name in recipes}, args.input, Path(args.output))
    people.prepare(options)


def _part(text: str) -> tuple[int, int]:
    """"2/8" -> (1, 8)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part {text}: use K/N, for instance 1/8 to 8/8")
    return int(number) - 1, int(count)


def _settings(args) -> dict:
    if args.source != "synthetic":
        chosen = {flag[2:]: value for flag, _, _ in LIMIT_FLAGS if (value := getattr(args, flag[2:])) is not None}
        parts = {"part": args.part} if args.part[1] > 1 else {}
        return {"source": args.source, "input": args.input, "listen": args.listen, "asr": args.asr, "filters": not args.no_filters} | chosen | parts
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


def collect(*words: str) -> dict:
    """What the command line does with these words; returns the summary. Raises ValueError."""
    return run(_parser().parse_args(list(words)))


def run(args) -> dict:
    _check(args)
    root = Path(args.output)
    if _sources(args) == ["record"]:
        args = _recorded(args, root)
    settings = _settings(args)
    if args.fresh:
        _clear(root)
    root.mkdir(parents=True, exist_ok=True)
    begin, index = time.time(), Index(root, settings)
    try:
        if args.source == "synthetic":
            collect_synthetic(root, index, _with_readings(root, settings), args.target_hours, args.workers or min(8, os.cpu_count() or 1))
        else:
            collect_sources(root, index, args, _options_of(args))
    finally:
        index.close()
        if any(row["turns"] for row in index.rows):
            write_manifests(root, index)
    summary = write_summary(root, index, settings, time.time() - begin)
    if args.source != "synthetic":
        _draw_filters(root, index, _options_of(args))
    return summary


def _recorded(args, root: Path):
    """Record what is not yet recorded of the script, then go on as with a folder."""
    import record_script
    lines = record_script.script_lines(args.script)
    record_script.record(lines, root / "recorded")
    args.source, args.input, args.no_filters = "folder", str(root / "recorded"), args.no_filters
    return args


ROOMS = {"corpora": "what is known of the corpora that Lhotse can fetch", "report": "a page of what was collected", "plan": "cores, days, bytes and cost of many hours"}


def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] and words[0] in ROOMS:
        return _room(words[0], words[1:])
    args = _parser().parse_args(words)
    try:
        summary = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(f"{args.output}: {summary['hours']:.2f} h, {summary['conversations']} conversations, {summary['turns']} turns, "
          f"{summary['characters']} characters, engines {summary['engine_shares']}")
    _say_left_out(summary)
    return 0


def _say_left_out(summary: dict) -> None:
    for reason, count in summary.get("left_out", {}).get("turns", {}).items():
        print(f"  left out: {count} turns, {reason}")
    for reason, (count, names) in summary.get("left_out", {}).get("files", {}).items():
        print(f"  left out: {count} files, {reason}: {', '.join(names)}{' ...' if count > len(names) else ''}")
    for note, (count, names) in summary.get("notes", {}).items():
        print(f"  note: {count} files, {note}: {', '.join(names)}{' ...' if count > len(names) else ''}")


def _room(name: str, words: list[str]) -> int:
    """python collect_data.py corpora | report | plan."""
    if name == "report":
        import data_report
        return data_report.main(words)
    if name == "plan":
        import data_plan
        return data_plan.main(words)
    config.Parser(prog="collect_data.py corpora", description="What the publishers say of the corpora that Lhotse knows.").parse_args(words)
    import corpora
    print(corpora.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
