"""The bench of people's recordings: who speaks when, what the filters take, what a killed collector loses, rates and memory.

Conversations with known turns are mixed from people's prompts (the Asterisk packages of Debian: a woman or man per language; English is
for tests only) or, where there are none, from the characters of a collection. Parts: turns, filters, broken, kills, scale, many. Nothing
is trained on. Each part's figures are kept in --save, so that a run that was stopped goes on; changed code or flags measure anew.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from measuring import percentiles, show, table

PARTS = {"turns": "conversations turns", "filters": "clips heard", "broken": "", "kills": "kills files", "scale": "files shard pools batch_positions hours codec",
         "many": "files shard many codec"}                                  # what is measured, and the flags that it depends on besides the shared ones
CODE = ("benchmark_people", "people", "segmentation", "filters", "collect_data", "dataset_pipeline", "shards")      # what the figures depend on
VOICES = ("es", "fr", "it", "ru")
SOUNDS_ONLY = re.compile(r"beep|silence|tt-|monkey|music|digits|phonetic|letters|dtmf|ring|tone|busy|weasel")
SECONDS = (0.6, 8.0)
NEAR = 0.25              # seconds within which a turn's begin counts as found
PADDING = 0.05           # bar: share of padding in the loader's batches
GROWTH = 20.0            # bar: MB between the second quarter and the last of what becomes tokens


# ----------------------------------------------------------------------------- conversations with known turns

def prompts_of(folder: Path, language: str) -> list:
    """Spoken prompts of one voice at 16 kHz, without the silence around them."""
    import numpy as np
    import audio_io
    import segmentation
    found = []
    for path in sorted((folder / language).rglob("*.g722")):
        if SOUNDS_ONLY.search(path.relative_to(folder / language).as_posix()):
            continue
        with contextlib.suppress(ValueError):
            audio = audio_io.read_audio(path, segmentation.RATE)
            level = segmentation.envelope_db(audio)
            loud = np.flatnonzero(level > np.percentile(level, 95) - 30) if len(level) else []
            if len(loud) and SECONDS[0] < len(audio) / segmentation.RATE < SECONDS[1]:
                found.append(audio[loud[0] * 160:(loud[-1] + 1) * 160])
    return found


def voices_of(args) -> tuple[dict[str, list], str]:
    """Voice -> its utterances at 16 kHz, and what they are."""
    folder = Path(args.prompts)
    if args.prompts and folder.is_dir():
        found = {language: utterances for language in VOICES if len(utterances := prompts_of(folder, language)) > 20}
        if len(found) > 1:
            return found, f"people: {sum(map(len, found.values()))} prompts of {len(found)} voices"
    from dataset_pipeline import read_supervisions
    from measuring import sound_of
    from audio_io import resample
    groups: dict[str, list[dict]] = {}
    for turns in read_supervisions(Path(args.data), args.split).values():
        for turn in turns:
            groups.setdefault(turn["speaker"], []).append(turn)
    chosen = sorted(groups, key=lambda s: -len(groups[s]))[:4]
    if len(chosen) < 2:
        raise ValueError(f"the {args.split} split of {args.data} has one speaker: name a folder of prompts with --prompts (Debian: asterisk-core-sounds-es-g722 and others)")
    return {s: [resample(sound_of(args.data, t), 24000, 16000) for t in groups[s][:40]] for s in chosen}, f"{len(chosen)} synthetic characters (no prompts in {args.prompts or 'no folder'})"


@dataclass
class Mixed:
    """A conversation made of prompts: sound (2, N) at 16 kHz, a voice per channel, and what is true of it."""
    sound: object
    turns: list[tuple[float, float, str]]


def mix(voices: list[list], count: int, rng: random.Random, rate: int = 16000) -> Mixed:
    """Turns of one to three prompts in turn; gaps are drawn around 0.2 s, a third of them overlap."""
    import numpy as np
    turns, parts, clock = [], [], 0.5
    for k in range(count):
        who, pieces = k % len(voices), []
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            pieces += [np.zeros(int(rng.uniform(0.1, 0.6) * rate), np.float32)] * bool(pieces) + [rng.choice(voices[who])]
        audio = np.concatenate(pieces)
        start = max(0.1, clock + min(1.5, max(-0.8, rng.gauss(0.2, 0.4))))
        clock = start + len(audio) / rate
        turns.append((start, clock, f"p{who}"))
        parts.append((int(start * rate), audio, who))
    sound = np.zeros((len(voices), int((max(t[1] for t in turns) + 0.5) * rate)), np.float32)
    for at, audio, who in parts:
        sound[who, at:at + len(audio)] += audio
    return Mixed(sound, turns)


def turn_errors(truth: list[tuple], found: list[tuple]) -> dict:
    """Found turns against true ones: hits (begin within NEAR), median errors of begin and end (s), and the true and found floor transfers."""
    free, begins, ends = list(found), [], []
    for start, end, _ in truth:
        near = [f for f in free if abs(f[0] - start) <= NEAR]
        if near:
            best = min(near, key=lambda f: abs(f[0] - start) + abs(f[1] - end))
            free.remove(best)
            begins.append(abs(best[0] - start))
            ends.append(abs(best[1] - end))
    return {"true": len(truth), "found": len(found), "hits": len(begins), "begin_s": begins, "end_s": ends}


def bench_turns(args, voices: dict) -> dict:
    """Diarisation and turn-building error for a channel per person, one channel, leaks and noise."""
    import numpy as np
    import data_report
    import segmentation
    from tqdm import tqdm
    rng, noise = random.Random(args.seed), np.random.default_rng(args.seed)
    names = sorted(voices)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]]
    chosen = [pairs[k % len(pairs)] for k in range(args.conversations)]
    kinds = {"a channel each": (False, 0.0, None), "a channel each, leaking at -16 dB": (False, 0.16, None), "one channel": (True, 0.0, None), "one channel, noise at 20 dB": (True, 0.0, 20.0),
             "one channel, two people known": (True, 0.0, None)}
    rows: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for pair in tqdm(chosen, desc="turns", unit="conversation"):
        mixed = mix([voices[v] for v in pair], args.turns, rng)
        for kind, (summed, leak, snr) in kinds.items():
            sound = mixed.sound + leak * mixed.sound[::-1]
            level = float(np.sqrt(np.mean(np.square(mixed.sound[mixed.sound != 0])))) if mixed.sound.any() else 1e-3
            sound = sound + noise.normal(0, 1e-3 if snr is None else level * 10 ** (-snr / 20), sound.shape).astype(np.float32)
            cfg = replace(segmentation.SegmentationConfig(), speakers=2 if "known" in kind else 0)
            start = time.process_time()
            turns, facts = segmentation.conversation(sound.sum(0, keepdims=True) if summed else sound, 16000, cfg)
            found = [(t.start, t.end, t.speaker) for t in turns]
            rows[kind].append(segmentation.diarisation_error(mixed.turns, found) | turn_errors(mixed.turns, found)
                              | {"speakers_right": facts["speakers"] == 2, "seconds": sound.shape[1] / 16000, "cpu": time.process_time() - start,
                                 "gaps": [gaps_of(mixed.turns, data_report), gaps_of(found, data_report)]})
    return {kind: _turn_summary(found) for kind, found in rows.items()}


def gaps_of(turns, data_report) -> list[float]:
    return data_report.floor_transfers([{"start": a, "duration": b - a, "speaker": s} for a, b, s in turns])


def _turn_summary(rows: list[dict]) -> dict:
    import numpy as np
    import judges
    seconds = [r["seconds"] for r in rows]
    out = {key: judges.bootstrap_interval([r[key] * s for r, s in zip(rows, seconds)], weights=seconds) for key in ("error", "missed", "false_alarm", "confused")}
    hits, true, found = (sum(r[k] for r in rows) for k in ("hits", "true", "found"))
    gaps = [np.concatenate([r["gaps"][k] for r in rows]) for k in (0, 1)]
    return out | {"conversations": len(rows), "turns": true, "recall": hits / max(1, true), "precision": hits / max(1, found), "speakers_right": float(np.mean([r["speakers_right"] for r in rows])),
                  "begin_s": percentiles([x for r in rows for x in r["begin_s"]]), "end_s": percentiles([x for r in rows for x in r["end_s"]]),
                  "median_gap_s": [float(np.median(g)) if len(g) else None for g in gaps], "overlapping": [float(np.mean(g < 0)) if len(g) else None for g in gaps],
                  "times_real_time": sum(seconds) / max(1e-9, sum(r["cpu"] for r in rows))}


# ----------------------------------------------------------------------------- filters

def bench_filters(args, voices: dict) -> dict:
    """Is the signal-to-noise ratio what was mixed, are foreign prompts left out and English ones kept, are repeats found?"""
    import numpy as np
    import filters
    import segmentation
    from audio_io import resample
    from tqdm import tqdm
    rng, noise, cfg = random.Random(args.seed), np.random.default_rng(args.seed), filters.FilterConfig()
    sounds = [rng.choice(voices[rng.choice(sorted(voices))]) for _ in range(args.clips)]
    wrong = {snr: [] for snr in (0, 10, 20, 30)}
    for sound in tqdm(sounds, desc="noise", unit="clip"):
        speech = np.zeros(len(segmentation.envelope_db(np.pad(sound, 16000))), bool)
        speech[100:100 + len(sound) // 160] = True
        for snr in wrong:
            mixed = np.pad(sound, 16000) + noise.normal(0, np.sqrt(np.mean(sound ** 2)) * 10 ** (-snr / 20), len(sound) + 32000)
            level = segmentation.envelope_db(mixed.astype(np.float32))
            wrong[snr].append(filters.snr_db(level[speech], filters.noise_level(level, speech)) - snr)
    out = {"snr_error_db": {str(k): {"median": float(np.median(v)), "p95": float(np.percentile(np.abs(v), 95))} for k, v in wrong.items()}}
    return out | repeats(sounds, cfg) | (languages(args, voices, cfg, rng, resample) if Path(args.prompts or "-").is_dir() else {"kept": None})


def repeats(sounds: list, cfg) -> dict:
    """Copies through MP3 at another gain and telephone rate: found; different clips: not taken for copies."""
    import filters
    import soundfile
    from audio_io import resample
    seen, unlike, found, asked = filters.Seen(), 0, 0, 0
    distinct = list({s.tobytes(): s for s in sounds if len(s) > 16000}.values())
    with tempfile.TemporaryDirectory() as folder:
        for k, sound in enumerate(distinct):
            mark, seconds = filters.fingerprint(sound, 16000), len(sound) / 16000
            unlike += seen.find(mark, seconds) is not None
            seen.add(str(k), mark, seconds)
        for k, sound in enumerate(distinct):
            path = Path(folder) / "copy.mp3"
            soundfile.write(path, 0.4 * resample(resample(sound, 16000, 8000), 8000, 16000), 16000)
            copy, rate = soundfile.read(path, dtype="float32")
            asked, found = asked + 1, found + (seen.find(filters.fingerprint(copy, rate), len(copy) / rate) == str(k))
    return {"repeats": {"clips": asked, "found": found / max(1, asked), "taken_for_another": unlike / max(1, asked)}}


def languages(args, voices: dict, cfg, rng, resample) -> dict:
    """Share of prompts that pass all filters after the English ASR wrote them down: English ones should, others should not."""
    import numpy as np
    import people
    import segmentation
    from tqdm import tqdm
    options, kept = people.Options(), {}
    for language, sounds in {**voices, "en": prompts_of(Path(args.prompts), "en")}.items():
        long = [s for s in sounds if len(s) > 24000]
        verdicts = []
        for sound in tqdm(rng.sample(long, min(args.heard, len(long))), desc=f"hearing {language}", unit="clip"):
            audio = resample(np.pad(sound, 3200), 16000, 24000)
            _, reason, _, _ = people.judge_cut(people.Cut(segmentation.Turn(0.0, len(audio) / 24000, "x"), audio, 0.0), options)
            verdicts.append(reason)
        kept[language] = {"clips": len(verdicts), "kept": float(np.mean([r is None for r in verdicts])) if verdicts else None,
                          "reasons": {r: verdicts.count(r) for r in sorted({r for r in verdicts if r})}}
    return {"kept": kept}


# ----------------------------------------------------------------------------- broken files

def broken_files(folder: Path, sound) -> list[str]:
    """Writes one file of each kind of damage, with sound (n,) at 16 kHz where sound is needed; their names."""
    import numpy as np
    import soundfile
    (folder / "empty.wav").write_bytes(b"")
    (folder / "corrupt.flac").write_bytes(b"fLaC" + bytes(range(256)) * 20)
    (folder / "words.mp3").write_text("this is no sound at all")
    soundfile.write(folder / "nothing.wav", np.zeros(0), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(32000), 16000)
    for name, text in (("bad_text.txt", b"\xff\xfe\x00x"), ("bad_times.json", b"{]")):
        soundfile.write((folder / name).with_suffix(".wav"), sound, 16000)
        (folder / name).write_bytes(text)
    return ["empty.wav", "corrupt.flac", "words.mp3", "nothing.wav", "silent.wav", "bad_text.wav", "bad_times.wav"]


def bench_broken(args, voices: dict) -> dict:
    """Broken files among good ones: does the collection end, are they counted and named, and are the good ones all there?"""
    import collect_data
    with tempfile.TemporaryDirectory() as name:
        mine, out, good = Path(name) / "mine", Path(name) / "out", 9
        mine.mkdir()
        recordings_for(voices, mine, good, 3.0, args.seed)
        broken = broken_files(mine, voices[min(voices)][0])
        summary = collect_data.collect(*collecting(mine, out))
        index = collect_data.Index(out, json.loads((out / "index.jsonl").read_text().splitlines()[0])["settings"])
        named = [lost["file"] for row in index.read() for lost in row.get("dropped", []) if "file" in lost]
        index.close()
    return {"good": good, "kept": summary["conversations"], "broken": len(broken), "named": len(set(named) & set(broken)), "wrongly_named": sorted(set(named) - set(broken)), "missing": sorted(set(broken) - set(named)),
            "counted": sum(count for count, _ in summary["left_out"]["files"].values())}


def collecting(mine: Path, out: Path) -> tuple[str, ...]:
    """Words of the collector for a folder with transcripts."""
    return "--source", "folder", "--path", str(mine), "--output", str(out), "--target_hours", "1e4", "--listen", "never", "--language", "", "--workers", "1"


# ----------------------------------------------------------------------------- kills

def recordings_for(voices: dict, folder: Path, count: int, seconds: float, seed: int) -> float:
    """`count` files with transcripts, every tenth one a copy of an earlier one; hours in all."""
    import numpy as np
    import soundfile
    rng, total = random.Random(seed), 0.0
    for k in range(count):
        parts = []
        while sum(map(len, parts)) < seconds * 16000:
            parts.append(rng.choice(voices[rng.choice(sorted(voices))]))
        sound = np.concatenate(parts)
        (folder / f"f{k:05d}.txt").write_text("These words stand for whatever was said, about as long as it was.", encoding="utf-8")
        if k % 10 == 9:
            sound, _ = soundfile.read(folder / f"f{k - 5:05d}.wav", dtype="float32")
        soundfile.write(folder / f"f{k:05d}.wav", sound, 16000)
        total += len(sound) / 16000
    return total / 3600


def bench_kills(args, voices: dict) -> dict:
    """Kill the collector at random times, then let it end: is it what an undisturbed one makes?"""
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder) / "mine"
        mine.mkdir()
        recordings_for(voices, mine, args.files, 3.0, args.seed)
        start = time.monotonic()
        if _collector(mine, Path(folder) / "whole").wait():
            raise ValueError("the collector fails on the test recordings: run it by hand to see why")
        whole, killed, starts = time.monotonic() - start, 0, 0
        while killed < args.kills and starts < 4 * args.kills:
            process, starts = _collector(mine, Path(folder) / "parts"), starts + 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.2, 0.8) * whole)
            killed += process.poll() is None                               # one that had ended by itself was not killed
            process.send_signal(signal.SIGKILL)
            process.wait()
            index = Path(folder) / "parts/index.jsonl"
            if index.is_file() and index.read_bytes().count(b"\n") > args.files:                # all done: begin anew, so that kills fall into work
                shutil.rmtree(Path(folder) / "parts")
        _collector(mine, Path(folder) / "parts").wait()
        one, two = (_content(Path(folder) / name) for name in ("whole", "parts"))
        ids = [json.loads(line)["id"] for line in (Path(folder) / "parts/index.jsonl").read_text().splitlines()[1:]]
    return {"files": args.files, "kills": killed, "starts": starts, "conversations": len(ids), "lost": len(set(one) - set(two)), "added": len(set(two) - set(one)),
            "doubled": len(ids) - len(set(ids)), "changed": sum(one[k] != two[k] for k in set(one) & set(two)), "undisturbed_s": whole}


def _collector(mine: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "ignore", "collect_data.py", *collecting(mine, out)], cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _content(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in ("collection.json", "filters.png")}


# ----------------------------------------------------------------------------- rates, memory, the loader

def resident_mb() -> float:
    """Memory of this process now, in MB (10^6 bytes)."""
    fields = Path("/proc/self/statm").read_text().split() if Path("/proc/self/statm").is_file() else None
    if fields is None:
        import runtime
        return runtime.peak_memory_mb() or 0.0
    import os
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def repeated_manifest(source: Path, folder: Path, hours: float) -> int:
    """`hours` of conversations in `folder` by naming the same turns again and again under other ids; the number of turns."""
    import gzip
    import os
    import shards
    (folder / "conversations").parent.mkdir(parents=True, exist_ok=True)
    os.symlink((source / "conversations").resolve(), folder / "conversations")
    turns = 0
    for split in ("train", "validation", "test"):
        path = folder / "manifests" / split / "supervisions.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
            seconds, lap = 0.0, 0
            while split == "train" and seconds < hours * 3600:
                for conversation in shards.stream(source / "manifests/train/supervisions.jsonl.gz"):
                    for s in conversation:
                        name = f"{lap:06d}-{s['recording_id']}"
                        file.write(json.dumps(s | {"recording_id": name, "id": f"{lap:06d}-{s['id']}"}) + "\n")
                        seconds, turns = seconds + s["duration"], turns + 1
                    if seconds >= hours * 3600:
                        break
                lap += 1
    return turns


def bench_scale(args, voices: dict) -> dict:
    """Rates of one core, memory while tokens are made of repeated hours, padding waste and speed of the loader, bytes per hour."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates, stored = collecting_rates(args, voices, folder)
        memory, tokens = tokenising(args, folder / "people", folder / "repeated", args.hours)
        loader = loading(args, folder / "repeated")
    return {"rates": rates | {"tokens": memory["times_real_time"]}, "bytes_per_hour": stored | {"tokens": tokens}, "memory": memory, "loader": loader}


def bench_many(args, voices: dict) -> dict:
    """--many hours through manifests, plan, shards, checksums and index, with codes that are computed once for each sound: what grows with the hours?"""
    import collect_data
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "mine").mkdir()
        recordings_for(voices, folder / "mine", args.files, 4.0, args.seed)
        collect_data.collect(*collecting(folder / "mine", folder / "people"))
        start = time.monotonic()
        memory, tokens = tokenising(args, folder / "people", folder / "repeated", args.many, remember=True)
        return memory | {"distinct_hours": json.loads((folder / "people/collection.json").read_text())["hours"], "bytes_per_hour": tokens, "minutes": (time.monotonic() - start) / 60}


@contextlib.contextmanager
def sounds_remembered(pipeline):
    """Inside, each file is read once and its codes are computed once, however often it is named: the rest of the pipeline does all its work."""
    sounds, codes, read, encode = {}, {}, pipeline.read_audio, pipeline.encode_turns

    def read_once(path, rate):
        if path not in sounds:
            sounds[path] = read(path, rate)
        return sounds[path]

    def encode_once(codec, audios):
        fresh = {id(a): a for a in audios if id(a) not in codes}           # `sounds` holds them, so that an id stays that of one sound
        codes.update(zip(fresh, encode(codec, list(fresh.values()))))
        return [codes[id(a)] for a in audios]
    pipeline.read_audio, pipeline.encode_turns = read_once, encode_once
    try:
        yield
    finally:
        pipeline.read_audio, pipeline.encode_turns = read, encode


def collecting_rates(args, voices: dict, folder: Path) -> tuple[dict, dict]:
    """Hours of recording per core-hour of each stage (CPU time), and bytes per kept hour."""
    import collect_data
    import people
    import segmentation
    mixed = mix([voices[v] for v in sorted(voices)[:2]], 30, random.Random(args.seed))
    hours, rates, cfg = mixed.sound.shape[1] / 16000 / 3600, {}, segmentation.SegmentationConfig()
    segmentation.conversation(mixed.sound[:1, :80000], 16000, cfg)         # loads the networks
    segmentation.listen(mixed.sound[0, :80000], 16000)

    def clock(name: str, done: float, work) -> None:
        start = time.process_time()
        work()
        rates[name] = done / ((time.process_time() - start) / 3600)
    clock("channels", hours, lambda: segmentation.conversation(mixed.sound, 16000, cfg))
    clock("voices", hours, lambda: segmentation.conversation(mixed.sound.sum(0, keepdims=True), 16000, cfg))
    clip = mixed.sound.sum(0)[:60 * 16000]
    clock("asr", len(clip) / 16000 / 3600, lambda: segmentation.listen(clip, 16000))
    mine = folder / "mine"
    mine.mkdir()
    recorded = recordings_for(voices, mine, args.files, 4.0, args.seed)
    people.prepare(people.Options(listen="never"))
    clock("filters", recorded, lambda: collect_data.collect(*collecting(mine, folder / "people")))
    summary = json.loads((folder / "people/collection.json").read_text())
    size = {kind: sum(p.stat().st_size for p in (folder / "people").rglob("*") if p.is_file() and (p.suffix == ".flac") == (kind == "flac") and p.suffix != ".png") for kind in ("flac", "manifests")}
    return rates, {kind: value / max(1e-9, summary["hours"]) for kind, value in size.items()}


def tokenising(args, source: Path, folder: Path, hours: float, remember: bool = False) -> tuple[dict, float]:
    """Tokens of `hours` by repetition: memory after each shard (MB), its growth from the second quarter to the last, times real time of one core; bytes per hour.

    remember: codes of a sound are computed once (sounds_remembered).
    """
    import numpy as np
    import dataset_pipeline
    import runtime
    import torch
    from checkpoint import load_codec
    turns = repeated_manifest(source, folder, hours)
    codec, track, real = load_codec(args.codec, runtime.pick_device("cpu")), [], dataset_pipeline._write_shard

    def watched(path, supervisions, *rest):
        real(path, supervisions, *rest)
        track.append((sum(s["duration"] for s in supervisions) / 3600, resident_mb()))
    dataset_pipeline._write_shard = watched
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        with sounds_remembered(dataset_pipeline) if remember else contextlib.nullcontext():
            index = dataset_pipeline.tokenise(folder, codec, workers=1, turns_per_shard=args.shard)
        spent = time.process_time() - start
    finally:
        dataset_pipeline._write_shard = real
        torch.set_num_threads(threads)
    memory = [m for _, m in track]
    quarter = max(1, len(memory) // 4)                                     # the first quarter fills caches
    growth = float(np.mean(memory[-quarter:]) - np.mean(memory[quarter:2 * quarter])) if len(memory) > 3 else None
    done = sum(part["hours"] for part in index["splits"].values())
    size = sum(p.stat().st_size for p in (folder / "tokens").glob("*.safetensors"))
    return {"hours": done, "turns": turns, "shards": len(track), "first_mb": track[0][1], "last_mb": track[-1][1], "largest_mb": max(m for _, m in track), "indexed_mb": resident_mb(),
            "growth_mb": growth, "times_real_time": done * 3600 / spent}, size / done


def loading(args, folder: Path) -> dict:
    """Padding waste and hours of speech per second that one core hands out to training, without a model: whole pools, from windows to batches."""
    from config import model_preset
    from dataset_pipeline import ConversationDataset
    cfg = model_preset("nano")
    data = ConversationDataset(Path(args.data) if (Path(args.data) / "tokens/index.json").is_file() else folder, cfg, batch_positions=args.batch_positions, seed=args.seed)
    batches, frames, start = 0, 0, time.process_time()
    while data.pool_number < args.pools:
        batch, _, _ = data.draw()
        frames, batches = frames + int(batch.mask[..., 0].sum()), batches + 1
    spent = time.process_time() - start
    return {"batches": batches, "positions": args.batch_positions, "waste": data.waste, "hours_per_core_second": frames / cfg.frame_rate / 3600 / spent}


# ----------------------------------------------------------------------------- the section

def kept(args, part: str, bench, voices: dict):
    """The part's figures, from an earlier run where neither code nor flags have changed since."""
    import runtime
    about = {k: getattr(args, k) for k in ("prompts", "data", "split", "seed", *PARTS[part].split())}
    code = hashlib.sha256(b"".join((runtime.ROOT / f"{name}.py").read_bytes() for name in CODE)).hexdigest()
    path = Path(args.save) / f"{part}-{hashlib.sha256(json.dumps([about, code], sort_keys=True, default=str).encode()).hexdigest()[:12]}.json"
    if not path.exists():
        runtime.write_json(path, bench(args, voices))
    return json.loads(path.read_text(encoding="utf-8"))


def bench_people(args) -> tuple[dict, str]:
    """Recordings of people: diarisation, filters, broken files, a collector that is killed, rates, memory and the loader."""
    parts = [p for p in args.parts.split(",") if p]
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"--parts {', '.join(sorted(unknown))}: use {','.join(PARTS)}")
    voices, what = voices_of(args)
    benches = {"turns": bench_turns, "filters": bench_filters, "broken": bench_broken, "kills": bench_kills, "many": bench_many}
    result = {"voices": what} | {part: kept(args, part, bench, voices) if part in parts else None for part, bench in benches.items()}
    result |= kept(args, "scale", bench_scale, voices) if "scale" in parts else {"rates": None, "bytes_per_hour": None, "memory": None, "loader": None}
    result["bars"] = bars(result)
    return result, people_body(result)


def bars(r: dict) -> list[dict]:
    """What was asked for, beside what was measured; None where it was not."""
    kills, broken, memory, many, loader = (r[k] for k in ("kills", "broken", "memory", "many", "loader"))
    wrong = kills and kills["lost"] + kills["added"] + kills["doubled"] + kills["changed"]
    unnamed = broken and len(broken["missing"]) + len(broken["wrongly_named"]) + abs(broken["good"] - broken["kept"]) + abs(broken["counted"] - broken["broken"])
    rows = [("files lost, added, doubled or changed by kills", 0, wrong), ("broken files not counted and named, good ones lost", 0, unnamed),
            ("growth of memory, speech that becomes tokens, MB", GROWTH, memory and memory["growth_mb"]), ("growth of memory, many hours by repetition, MB", GROWTH, many and many["growth_mb"]),
            ("padding in batches, %", 100 * PADDING, loader and 100 * loader["waste"])]
    return [{"what": what, "bar": f"at most {bar:g}", "value": value, "met": None if value is None else value <= bar} for what, bar, value in rows]


def people_body(r: dict) -> str:
    """The section's text."""
    body = [f"Voices: {r['voices']}."]
    if r["turns"]:
        rows = [[kind, show(t["error"], 2, True), show(t["missed"]["mean"], 2, True), show(t["false_alarm"]["mean"], 2, True), show(t["confused"]["mean"], 2, True), show(t["speakers_right"], 1, True),
                 f"{show(t['recall'], 2, True)} / {show(t['precision'], 2, True)}", f"{show(t['begin_s']['p50'])} / {show(t['end_s']['p50'])}",
                 f"{show(t['median_gap_s'][1])} ({show(t['median_gap_s'][0])})", f"{show(t['overlapping'][1], 1, True)} ({show(t['overlapping'][0], 1, True)})", show(t["times_real_time"], 0)]
                for kind, t in r["turns"].items()]
        body.append(table(["recording", "diarisation error", "missed", "false alarm", "confused", "number of people right", "turns found / right", "begin / end off by (s, median)", "median gap found (true)",
                           "overlapping found (true)", "times real time"], rows))
    if r["filters"]:
        f = r["filters"]
        body.append("Signal to noise against what was mixed, dB: " + ", ".join(f"{k}: {v['median']:+.1f} (95 % within {v['p95']:.1f})" for k, v in f["snr_error_db"].items()) + ". "
                    f"Repeats through MP3, another gain and telephone rate: {show(f['repeats']['found'], 2, True)} of {f['repeats']['clips']} found, {show(f['repeats']['taken_for_another'], 2, True)} of different clips taken for one.")
        if f["kept"]:
            body.append(table(["prompts written down by the ASR", "clips", "kept", "left out because"], [[k, str(v["clips"]), show(v["kept"], 2, True), ", ".join(f"{n} {why}" for why, n in v["reasons"].items()) or "-"] for k, v in f["kept"].items()]))
    if r["kills"]:
        k = r["kills"]
        body.append(f"Collector killed at work {k['kills']} times at random (of {k['starts']} starts) over {k['files']} files: {k['lost']} files lost, {k['added']} added, {k['doubled']} conversations doubled, "
                    f"{k['changed']} files changed.")
    if r["broken"]:
        b = r["broken"]
        body.append(f"{b['broken']} broken files (empty, no audio in them, silent, their transcript unreadable) among {b['good']} good ones: {b['counted']} counted, {b['named']} named; {b['kept']} good ones kept.")
    if r["rates"]:
        m, loader = r["memory"], r["loader"]
        body.append(table(["stage", "hours of recording per core-hour"], [[name, show(r["rates"][key], 1)] for name, key in (("cut, a channel each", "channels"), ("cut, one channel", "voices"), ("speech recognition (tiny.en)", "asr"),
                                                                                                                         ("filters, loudness, pitch, FLAC", "filters"), ("tokens", "tokens"))]))
        body.append(f"Tokens of {m['hours']:.1f} h by repetition ({m['turns']} turns, {m['shards']} shards): memory {m['first_mb']:.0f} MB after the first shard, {m['last_mb']:.0f} MB after the last, "
                    f"largest {m['largest_mb']:.0f} MB, from the second quarter to the last {show(m['growth_mb'], 1)} MB. Loader: {show(loader['waste'], 2, True)} padding in {loader['batches']} batches of {loader['positions']} positions, "
                    f"{loader['hours_per_core_second']:.2f} hours of speech per second and core.")
    if r["many"]:
        m = r["many"]
        body.append(f"{m['hours']:.0f} h by repetition of {m['distinct_hours']:.2f} h ({m['turns']} turns, {m['shards']} shards, {m['bytes_per_hour'] * m['hours'] / 1e9:.2f} GB of tokens, {m['minutes']:.0f} minutes): manifests, plan, shards, checksums and "
                    f"index are real, the sounds are read and coded once each. Memory {m['first_mb']:.0f} MB after the first shard, {m['last_mb']:.0f} MB after the last, from the second quarter to the last {show(m['growth_mb'], 1)} MB; "
                    f"{m['indexed_mb']:.0f} MB with the index of all conversations.")
    said = {True: "met", False: "**missed**", None: "-"}
    body.append(table(["bar", "", "measured", ""], [[b["what"], b["bar"], show(b["value"], 1), said[b["met"]]] for b in r["bars"]]))
    return "\n\n".join(body)


def add_flags(part) -> None:
    prompts = "/usr/share/asterisk/sounds"
    part.add_argument("--prompts", default=prompts, metavar="FOLDER", help=f"people's prompts, a folder per voice; without it characters of --data speak; default {prompts}")
    part.add_argument("--parts", default=",".join(PARTS), help="what is measured; default all: %(default)s")
    for flag, value, what in (("--conversations", 12, "conversations that are cut"), ("--turns", 20, "turns of each"), ("--clips", 60, "clips with noise"), ("--heard", 25, "prompts of each voice that are written down"),
                              ("--kills", 20, "times that the collector is killed"), ("--files", 60, "files of that collector"), ("--shard", 64, "turns of a shard"), ("--pools", 2, "pools of windows that the loader packs"),
                              ("--batch_positions", 4096, "positions of a batch")):
        part.add_argument(flag, type=int, default=value, help=f"{what}; default {value}")
    part.add_argument("--hours", type=float, default=2.0, help="hours that become tokens, by repetition; default 2")
    part.add_argument("--many", type=float, default=1000.0, help="hours that go through the pipeline with codes computed once for each sound; default 1000")
    part.add_argument("--save", default="outputs/benchmark/people", help="folder for the figures of each part; default outputs/benchmark/people")
