"""People's recordings -> conversations on the disk: read, cut into turns, written down, filtered, levelled, stored.

    for job in folder_jobs(Path("my_recordings"), options): row = work(job, root, options)

A job is a stretch of one recording (or a dialogue in several files) and becomes one row of index.jsonl: its turns, what was left out
and why, what was odd about the file. A file that cannot be used gives a row that says so: nothing stops a collection. A job
needs no other job, so processes share them out; only repeats are found by whoever takes the rows in (`without_repeats`).
"""
from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import numpy as np

import audio_io
import corpora
import filters
import segmentation
import text_tokenizer
from segmentation import Span, Turn

AUDIO_SUFFIXES = {".wav", ".wave", ".flac", ".ogg", ".oga", ".mp3", ".opus", ".aiff", ".aif", ".m4a", ".aac", ".webm", ".g722"}
SIDECARS = (".json", ".vtt", ".srt", ".txt")
MAGIC = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b"\xff\xfb", b"\xff\xf3")
BLOCK = 1800.0            # seconds of a long recording that are worked on at once, so that its length costs no memory
LONGEST_UTTERANCE = 30.0  # seconds: a longer file without a transcript is a recording to be cut, a shorter one a turn
PAUSE = 0.3               # seconds put between utterances that lie in files of their own
MARGIN = 0.06             # seconds of sound kept around a turn that the VAD found
MOST_SPEAKERS = text_tokenizer.NUM_SPEAKERS
MADE_UP = re.compile(r"(thank you|thanks)( very much| so much)? for (watching|listening|viewing)|please subscribe|subtitles by", re.I)   # Whisper's words for no words


@dataclass(frozen=True)
class Options:
    """How recordings are taken in."""
    segmentation: segmentation.SegmentationConfig = field(default_factory=segmentation.SegmentationConfig)
    filters: filters.FilterConfig | None = field(default_factory=filters.FilterConfig)     # None: keep everything as it is
    listen: str = "missing"          # missing: the ASR hears what has no transcript | all: it also checks those | never
    asr: str = "tiny.en"
    licence: str = "the owner's"

    def __post_init__(self):
        if self.listen not in ("missing", "all", "never"):
            raise ValueError(f"--listen {self.listen}: use missing, all or never")

    @property
    def language(self) -> str:
        return (self.filters.language if self.filters else "") or "en"


@dataclass
class Job:
    """What becomes one conversation. Either files (each a turn, or one recording from `begin` to `end` seconds) or recordings of a corpus."""
    id: str
    split: str
    source: str
    licence: str
    files: list[str] = field(default_factory=list)
    begin: float = 0.0
    end: float | None = None
    corpus: list[tuple] = field(default_factory=list)        # (Recording, [SupervisionSegment]) of Lhotse


class Unusable(Exception):
    """A file or recording from which nothing can be had; the message says why."""


# ----------------------------------------------------------------------------- transcripts beside recordings

def sidecar(path: Path) -> Path | None:
    return next((p for p in (path.with_suffix(s) for s in SIDECARS) if p.is_file() and p != path), None)


def _seconds(clock: str) -> float:
    parts = [float(p) for p in clock.replace(",", ".").split(":")]
    return sum(p * 60 ** k for k, p in enumerate(reversed(parts)))


def _cues(text: str) -> list[dict]:
    """Cues of a .vtt or .srt; the speaker is what a voice tag (<v Anna>) or a leading "Anna:" says."""
    cues = []
    for match in re.finditer(r"([\d:.,]+)\s+-->\s+([\d:.,]+)[^\n]*\n(.*?)(?=\n\s*\n|\Z)", text.replace("\r", ""), re.S):
        said = " ".join(match[3].split())
        voice = re.match(r"<v[^ >]*\s+([^>]+)>", said) or re.match(r"([A-Z][\w ]{0,20}):\s", said)
        said = re.sub(r"<[^>]*>", "", said)
        cues.append({"start": _seconds(match[1]), "end": _seconds(match[2]), "speaker": voice[1] if voice else None,
                     "text": said.removeprefix(f"{voice[1]}:").strip() if voice else said})
    return cues


def read_transcript(path: Path) -> str | list[dict]:
    """The words of a .txt, or the segments (start, end in s, speaker or None, text) of a .json, .vtt or .srt. Unusable where it cannot be read.

    JSON: a list of segments, or an object with "segments" (as Whisper writes it) or with "text".
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return text
        if path.suffix != ".json":
            return _cues(text)
        value = json.loads(text)
        if isinstance(value, dict) and "segments" not in value:
            return str(value["text"])
        segments = value["segments"] if isinstance(value, dict) else value
        return [{"start": float(s["start"]), "end": float(s["end"]), "speaker": s.get("speaker"), "text": str(s["text"])} for s in segments]
    except UnicodeDecodeError:
        raise Unusable(f"its transcript {path.name} is not UTF-8 text") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"its transcript {path.name} cannot be read") from None


# ----------------------------------------------------------------------------- which jobs there are

def is_audio(path: Path) -> bool:
    """By its ending, or by its first bytes where the ending is none of ours."""
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return True
    if path.suffix.lower() in SIDECARS or path.name.startswith("."):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4).startswith(MAGIC)
    except OSError:
        return False


def folder_groups(folder: Path) -> dict[str, list[Path]]:
    """Conversation -> its files in name order: a subfolder is one, a loose file is one of its own. ValueError without any."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give the folder of your recordings with --path")
    groups: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and is_audio(p)):
        inside = path.parent.relative_to(folder).as_posix()
        groups.setdefault(path.stem if inside == "." else inside, []).append(path)
    if not groups:
        raise ValueError(f"no audio in {folder}: put {', '.join(sorted(AUDIO_SUFFIXES))} files there, with or without transcripts beside them")
    return groups


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or hashlib.sha256(name.encode()).hexdigest()[:8]


def _is_recording(path: Path) -> bool:
    """To be cut into turns: several speakers' segments beside it, or no words and more than one channel or half a minute."""
    beside = sidecar(path)
    if beside is not None:
        return beside.suffix != ".txt"
    try:
        seconds, _, channels, _ = audio_io.inspect_audio(path) if path.suffix != ".g722" else (0.0, 16000, 1, [])
    except ValueError:
        return True                                                        # complained of when its turn comes
    return channels > 1 or seconds > LONGEST_UTTERANCE


def _blocks(path: Path) -> list[tuple[float, float | None]]:
    """Stretches of a recording of BLOCK seconds; the last one may be half as long again."""
    try:
        seconds = audio_io.inspect_audio(path)[0]
    except ValueError:
        return [(0.0, None)]
    count = max(1, round(seconds / BLOCK - 0.1))
    return [(k * BLOCK, (k + 1) * BLOCK if k + 1 < count else None) for k in range(count)]


def folder_jobs(folder: Path, options: Options) -> Iterator[Job]:
    """The conversations of a folder in order of their ids."""
    groups = folder_groups(folder)
    splits, jobs = corpora.held_out(groups), []
    for name, paths in groups.items():
        whole = [p for p in paths if _is_recording(p)]
        turns = [p for p in paths if p not in whole]
        if turns:
            jobs.append(Job(_safe(name), splits[name], "folder", options.licence, [str(p) for p in turns]))
        for path in whole:
            base = _safe(name) if len(paths) == 1 else _safe(f"{name}-{path.stem}")
            blocks = _blocks(path)
            jobs += [Job(base if len(blocks) == 1 else f"{base}-b{k:03d}", splits[name], "folder", options.licence, [str(path)], begin, end) for k, (begin, end) in enumerate(blocks)]
    seen: dict[str, int] = {}
    for job in jobs:                                                       # two names may have become one
        seen[job.id] = seen.get(job.id, 0) + 1
        if seen[job.id] > 1:
            job.id += f"-again{seen[job.id]}"
    yield from sorted(jobs, key=lambda job: job.id)


def corpus_jobs(name: str, corpus: Path) -> Iterator[Job]:
    """The conversations of a corpus; a long recording in stretches of BLOCK seconds."""
    for item in corpora.conversations(name, corpus):
        recording, spoken = item.items[0]
        if len(item.items) > 1 or recording.duration <= 1.5 * BLOCK:
            yield Job(item.id, item.split, name, corpora.licence(name), corpus=item.items)
            continue
        for k in range(max(1, round(recording.duration / BLOCK - 0.1))):
            mine = [s for s in spoken if k * BLOCK <= s.start < (k + 1) * BLOCK and s.end <= recording.duration]
            if mine:
                yield Job(f"{item.id}-b{k:03d}", item.split, name, corpora.licence(name), corpus=[(recording, mine)])


# ----------------------------------------------------------------------------- a job's sound and turns

@dataclass
class Cut:
    """A turn with its sound at 24 kHz, before it is judged."""
    turn: Turn
    audio: np.ndarray                # (n,)
    start: float                     # of `audio`, in the conversation
    noise_db: float | None = None    # level of the noise in its channel; None: measured in the turn itself
    words: list[tuple] = field(default_factory=list)     # (word, start, end) from the beginning of `audio`


def _whole_file(path: Path, notes: list[str]) -> Cut:
    """A file that is one turn. Its speaker is what follows the last "_" of the name; none: the conversation's."""
    if path.suffix.lower() != ".g722":
        notes += [f"{path.name}: {note}" for note in audio_io.inspect_audio(path)[3]]
    sound, rate = audio_io.read_channels(path)
    if not sound.size:
        raise Unusable("no sound in it")
    audio = audio_io.resample(sound.mean(axis=0), rate, audio_io.SAMPLE_RATE)
    if np.abs(audio).max(initial=0.0) < 1e-4:
        raise Unusable("silent")
    beside = sidecar(path)
    text = read_transcript(beside) if beside else None
    speaker = path.stem.rsplit("_", 1)[1] if "_" in path.stem else ""
    return Cut(Turn(0.0, len(audio) / audio_io.SAMPLE_RATE, speaker, text=text if isinstance(text, str) else None), audio, 0.0)


def file_turns(job: Job, notes: list[str], dropped: list[dict]) -> list[Cut]:
    """Files that are a turn each, one after the other. An unusable one is named in `dropped`."""
    cuts, clock = [], 0.0
    for name in job.files:
        try:
            cut = _whole_file(Path(name), notes)
        except (Unusable, ValueError) as error:
            dropped.append({"file": Path(name).name, "reason": _short(error, name)})
            continue
        cut.start, clock = clock, clock + len(cut.audio) / audio_io.SAMPLE_RATE + PAUSE - 0.1
        cut.turn.speaker = cut.turn.speaker or job.id
        cuts.append(cut)
    return cuts


def _short(error, name: str) -> str:
    """A reason without the path in it, so that equal ones are counted together."""
    text = " ".join(str(error).split())
    return re.sub(r"its transcript \S+ ", "its transcript ", "not a readable audio file" if "not a readable audio file" in text or "no audio file" in text else text).replace(str(name), "").strip()[:120]


def recording_turns(job: Job, options: Options, notes: list[str]) -> list[Cut]:
    """A recording cut into turns: by the segments beside it, else by what is heard in it."""
    path = Path(job.files[0])
    seconds, _, _, odd = audio_io.inspect_audio(path)
    notes += [f"{path.name}: {note}" for note in odd]
    wanted = None if job.end is None else job.end - job.begin
    sound, rate = audio_io.read_channels(path, job.begin, wanted)
    if not sound.size:
        raise Unusable("no sound in it")
    if sound.shape[1] / rate < (min(wanted or seconds, seconds - job.begin) - 0.5):
        notes.append(f"{path.name}: cut off, {sound.shape[1] / rate:.1f} s of it are there")
    if np.abs(sound).max(initial=0.0) < 1e-4:
        raise Unusable("silent")
    segments = read_transcript(beside) if (beside := sidecar(path)) else None
    if isinstance(segments, str):
        return [Cut(Turn(0.0, sound.shape[1] / rate, job.id, text=segments), audio_io.resample(sound.mean(axis=0), rate, audio_io.SAMPLE_RATE), 0.0)]
    if segments is None:
        turns, facts = segmentation.conversation(sound, rate, options.segmentation)
        notes.append(f"{path.name}: by {facts['how']}, {facts['speakers']} speakers" + (f", {facts['leak_seconds']:.1f} s of leaks" if facts["leak_seconds"] > 1 else ""))
        edges = job.begin > 0, job.end is not None                         # a turn that crosses a block's edge is in neither block whole
        turns = [t for t in turns if not (edges[0] and t.start < 0.05) and not (edges[1] and t.end > wanted - 0.05)]
    else:
        turns = _given_turns(segments, job, sound, rate, options.segmentation)
    return _cuts(turns, sound, rate, margin=MARGIN if segments is None else 0.0)


def _given_turns(segments: list[dict], job: Job, sound: np.ndarray, rate: int, cfg: segmentation.SegmentationConfig) -> list[Turn]:
    """Turns of transcript segments that begin in this stretch. Split channels: a segment is in the loudest."""
    end = job.begin + sound.shape[1] / rate
    mine = [s for s in segments if job.begin <= s["start"] < end and s["end"] <= end + 0.5 and s["end"] > s["start"]]
    low = np.stack([audio_io.resample(c, rate, segmentation.RATE) for c in sound]) if len(sound) > 1 else sound
    split = cfg.channels == "split" or (cfg.channels == "auto" and len(low) > 1 and segmentation.voices_per_channel(low))
    spans, texts = [], {}
    for s in mine:
        span = Span(s["start"] - job.begin, min(s["end"], end) - job.begin)
        part = sound[:, int(span.start * rate):int(span.end * rate)]
        channel = int(np.square(part).mean(axis=1).argmax()) if split and part.size else -1
        speaker = str(s["speaker"] or (f"s{channel}" if split else job.id))
        spans.append((span, speaker, channel))
        texts[span, speaker] = s["text"]
    return _with_texts(segmentation.build_turns(spans, cfg), texts, {})


def _with_texts(turns: list[Turn], texts: dict, words: dict) -> list[Turn]:
    """Each turn with the texts and words of the segments it was built from."""
    for turn in turns:
        turn.text = " ".join(texts[piece, turn.speaker] for piece in turn.pieces).strip()
        turn.words = [w for piece in turn.pieces for w in words.get((piece, turn.speaker), [])]
    return turns


def _cuts(turns: list[Turn], sound: np.ndarray, rate: int, margin: float, words_known: bool = False) -> list[Cut]:
    """The sound of each turn, from its channel (-1: the mean of all), and the noise of that channel."""
    cuts, noise = [], {}
    mean = sound.mean(axis=0)
    for turn in turns:
        channel = mean if turn.channel < 0 or turn.channel >= len(sound) else sound[turn.channel]
        if turn.channel not in noise:
            noise[turn.channel] = _channel_noise(channel, rate, [t for t in turns if turn.channel < 0 or t.channel == turn.channel])
        start = max(0.0, turn.start - margin)
        audio = channel[int(start * rate):int((turn.end + margin) * rate)]
        if audio.size:
            cuts.append(Cut(turn, audio_io.resample(audio, rate, audio_io.SAMPLE_RATE), start, noise[turn.channel], [(w, a - start, b - start) for w, a, b in turn.words]))
    return cuts


def _channel_noise(channel: np.ndarray, rate: int, turns: list[Turn]) -> float:
    level = segmentation.envelope_db(channel, rate)
    speech = np.zeros(len(level), bool)
    for turn in turns:
        for piece in turn.pieces or [Span(turn.start, turn.end)]:
            speech[max(0, int((piece.start - 0.1) / segmentation.FRAME)):int((piece.end + 0.1) / segmentation.FRAME)] = True
    return filters.noise_level(level, speech)


def corpus_turns(job: Job, options: Options) -> list[Cut]:
    """The turns of a corpus's conversation: utterances in files of their own one after the other, or a long recording by its supervisions."""
    if len(job.corpus) == 1:
        return _recording_of_corpus(*job.corpus[0], options)
    cuts, clock = [], 0.0
    for recording, spoken in job.corpus:
        mine = _recording_of_corpus(recording, spoken, options)
        for cut in mine:
            cut.start += clock
        cuts += mine
        clock += recording.duration + PAUSE
    return cuts


def _recording_of_corpus(recording, spoken: list, options: Options) -> list[Cut]:
    first = max(0.0, min(s.start for s in spoken) - 1.0)
    last = min(recording.duration, max(s.end for s in spoken) + 1.0)
    sound, rate = recording.load_audio(offset=first, duration=last - first), recording.sampling_rate      # (channels, n)
    ids = list(recording.channel_ids)
    spans, texts, words = [], {}, {}
    for s in sorted(spoken, key=lambda s: (s.start, str(s.speaker))):
        channel = s.channel[0] if isinstance(s.channel, list) else s.channel
        span, speaker = Span(s.start - first, s.end - first), str(s.speaker or recording.id)
        spans.append((span, speaker, ids.index(channel) if channel in ids else -1))
        texts[span, speaker] = s.text or ""
        words[span, speaker] = [(w.symbol, w.start - first, w.end - first) for w in (s.alignment or {}).get("word", [])]
    return _cuts(_with_texts(segmentation.build_turns(spans, options.segmentation), texts, words), sound, rate, margin=0.0)


# ----------------------------------------------------------------------------- judging

def judge_cut(cut: Cut, options: Options) -> tuple[dict, str | None, str, list]:
    """(values, reason or None, normalised text, word times) of one turn; what has no words is listened to."""
    cfg, rate = options.filters, audio_io.SAMPLE_RATE
    seconds, text, heard = len(cut.audio) / rate, cut.turn.text, None
    if cfg and seconds < cfg.min_seconds:
        return {"seconds": round(seconds, 3)}, filters.REASONS["min_seconds"], "", []
    if options.listen == "all" or (text is None and options.listen == "missing"):
        heard = segmentation.listen(cut.audio, rate, options.asr, options.language)
    given = text is not None
    raw = text if given else heard.text if heard else ""
    said = _speakable(raw)
    if not said:
        return {"seconds": round(seconds, 3)}, filters.NO_TEXT if given or heard else "no transcript", "", []
    words = segmentation.word_times(said, heard.words if heard else cut.words)
    if cfg is None:
        return {"seconds": round(seconds, 3)}, None, said, words
    if not given and MADE_UP.search(raw):
        return {"seconds": round(seconds, 3)}, "a phrase the ASR makes up", said, []
    match = segmentation.words_shared(said, heard.words) if given and heard else None
    values = filters.measure(cut.audio, rate, said, cfg, *_speech_and_snr(cut), confidence=None if given or not heard else heard.confidence, match=match,
                             language=filters.language_probability(raw, cfg.language))
    return values, filters.verdict(values, cfg), said, words


def _speakable(text: str) -> str:
    try:
        return text_tokenizer.normalise(text)
    except ValueError:
        return ""


def _speech_and_snr(cut: Cut) -> tuple[float, float]:
    """Share of the turn that is speech, and its signal to noise ratio in dB."""
    low = audio_io.resample(cut.audio, audio_io.SAMPLE_RATE, segmentation.RATE)
    level = segmentation.envelope_db(low)
    probability = segmentation.speech_probability(low)
    speech = np.interp(np.arange(len(level)) * segmentation.FRAME, np.arange(len(probability)) * segmentation.CHUNK / segmentation.RATE, probability) > 0.5
    noise = filters.noise_level(level, speech) if cut.noise_db is None else cut.noise_db
    return float(speech.mean()) if len(speech) else 0.0, filters.snr_db(level[speech], noise)


def level_speakers(cuts: list[Cut], target: float) -> None:
    """Bring each speaker's turns together to `target` LUFS: what they say louder stays louder."""
    for speaker in {cut.turn.speaker for cut in cuts}:
        mine = [cut for cut in cuts if cut.turn.speaker == speaker]
        gain = filters.gain_to(np.concatenate([cut.audio for cut in mine]), audio_io.SAMPLE_RATE, target)
        for cut in mine:
            cut.audio = (cut.audio * gain).astype(np.float32)


# ----------------------------------------------------------------------------- onto the disk

def _median_f0(audio: np.ndarray) -> float:
    import judges
    found = judges.pitch_statistics(audio, audio_io.SAMPLE_RATE)["median_hz"]
    return round(found, 1) if found else 0.0


def store(root: Path, job: Job, kept: list[tuple[Cut, dict, str, list]]) -> dict:
    """Writes one conversation like a synthetic one: a FLAC per turn and one of all; returns its row."""
    rate, folder = audio_io.SAMPLE_RATE, Path("conversations") / job.split / job.id
    first = min((cut.start for cut, *_ in kept), default=0.0)
    order = list(dict.fromkeys(cut.turn.speaker for cut, *_ in kept))
    end = max((round((cut.start - first) * rate) + len(cut.audio) for cut, *_ in kept), default=0)
    mix, rows = np.zeros(end, np.float32), []
    for k, (cut, values, text, words) in enumerate(kept):
        path, start = folder / f"{k:03d}.flac", cut.start - first
        audio_io.write_audio(root / path, cut.audio)
        custom = {"mood": None, "character": cut.turn.speaker, "engine": job.source, "f0_median": _median_f0(cut.audio), "turn_audio": path.as_posix(),
                  "sha256": hashlib.sha256((root / path).read_bytes()).hexdigest(), "licence": job.licence, "speaker_index": order.index(cut.turn.speaker),
                  "alignment": {"phones": "", "words": words} if words else None} | ({"quality": values} if len(values) > 1 else {})
        rows.append({"id": f"{job.id}-{k:03d}", "start": round(start, 4), "num_samples": len(cut.audio), "duration": len(cut.audio) / rate, "text": text,
                     "speaker": cut.turn.speaker, "custom": custom, "fingerprint": filters.fingerprint(cut.audio, rate)})
        place = round(start * rate)
        mix[place:place + len(cut.audio)] += cut.audio
    if kept:
        audio_io.write_audio(root / folder / "mix.flac", mix / max(1.0, float(np.abs(mix).max())))
    return {"id": job.id, "split": job.split, "kind": job.source, "engine": job.source, "num_samples": len(mix), "duration": len(mix) / rate,
            "audio": (folder / "mix.flac").as_posix(), "turns": rows}


def _analyse(job: Job, options: Options, notes: list[str], dropped: list[dict]) -> list[tuple[Cut, dict, str, list]]:
    """The turns that are kept: (cut, values, text, words); the others go into `dropped`."""
    if job.corpus:
        cuts = corpus_turns(job, options)
    elif len(job.files) == 1 and _is_recording(Path(job.files[0])):
        cuts = recording_turns(job, options, notes)
    else:
        cuts = file_turns(job, notes, dropped)
    kept, speakers = [], list(dict.fromkeys(cut.turn.speaker for cut in cuts))[:MOST_SPEAKERS]
    for cut in cuts:
        if cut.turn.speaker not in speakers:
            values, reason, text, words = {}, f"more than {MOST_SPEAKERS} speakers", "", []
        else:
            values, reason, text, words = judge_cut(cut, options)
        if reason:
            dropped.append({"start": round(cut.start, 3), "duration": round(len(cut.audio) / audio_io.SAMPLE_RATE, 3), "speaker": cut.turn.speaker, "reason": reason, "values": values})
        else:
            kept.append((cut, values, text, words))
    if options.filters:
        level_speakers([cut for cut, *_ in kept], options.filters.loudness)
    return kept


def prepare(options: Options) -> None:
    """Load what the work needs, so that a missing package is said once and at the beginning. ValueError."""
    import judges
    segmentation.speech_probability(np.zeros(segmentation.CHUNK, np.float32))
    if options.listen != "never":
        judges.load_asr(options.asr)
    if options.filters and options.filters.language:
        filters.languages()


def work(job: Job, root: Path, options: Options) -> dict:
    """One job from sound to row. Whatever is wrong with a file is written into the row, never raised."""
    notes, dropped = [], []
    try:
        kept = _analyse(job, options, notes, dropped)
    except MemoryError:
        raise
    except Exception as error:                                             # a damaged file must not end a collection: its name and reason are kept
        name, known = job.files[0] if job.files else job.id, isinstance(error, (Unusable, ValueError))
        dropped.append({"file": Path(name).name, "reason": _short(error, name) if known else f"cannot be read ({type(error).__name__})"})
        kept = []
    return store(root, job, kept) | {"dropped": dropped, "notes": notes}


def without_repeats(row: dict, seen: filters.Seen, root: Path) -> dict:
    """The row less the turns that were heard before, which are added to what was left out; the others are remembered."""
    turns, dropped = [], list(row.get("dropped", []))
    for turn in row["turns"]:
        earlier = seen.find(turn["fingerprint"], turn["duration"])
        if earlier:
            dropped.append({"start": turn["start"], "duration": round(turn["duration"], 3), "speaker": turn["speaker"], "reason": filters.DUPLICATE,
                            "values": turn["custom"].get("quality", {}), "same_as": earlier})
            (root / turn["custom"]["turn_audio"]).unlink(missing_ok=True)
        else:
            seen.add(turn["id"], turn["fingerprint"], turn["duration"])
            turns.append(turn)
    return row | {"turns": turns, "dropped": dropped} | ({} if turns else {"num_samples": 0, "duration": 0.0})


def remember(row: dict, seen: filters.Seen) -> None:
    """Take the turns of an earlier run's row in."""
    for turn in row["turns"]:
        if "fingerprint" in turn:
            seen.add(turn["id"], turn["fingerprint"], turn["duration"])

