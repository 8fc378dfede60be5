"""benchmark.py codec: our codec, with few and with all codebooks, side by side with other codecs in one run.

Two sets: turns of the synthetic test split, and a folder of people's recordings with a table of what they say
(--recordings, --transcripts). Every version of a sound is judged against the same input: words, voice, naturalness,
PESQ and STOI where their packages are installed. Codec2 runs as its programs c2enc and c2dec, Opus through the package
av or as opusenc and opusdec; one that is not installed has a row that says so.
"""
from __future__ import annotations

import contextlib
import gzip
import io
import math
import random
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

from measuring import SECONDS, WORDS, hear, paired, pick_turns, show, sound_of, summary, table

LEVELS = (1, 2, 4, 8, 16, 32)
PAIRS = ((3, 9),)               # semantic and acoustic codebooks, as the model nano reads them
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".g722")
PROMPT_SECONDS, PROMPT_WORDS = 2.0, 2      # shorter recordings are single words, of which a judge hears little
OPUS_RATE = 6000                # bit/s, the lowest that Opus offers
RATE = 24000
NAMES = {"input": "the input itself", "mixed": "first 2 true, the others from wrong frames", "codec2": "Codec2 3200", "opus": "Opus 6 kbit/s"}


# ----------------------------------------------------------------------------- other codecs

def run_program(*words, folder) -> None:
    """ValueError with the program's last words when it fails."""
    done = subprocess.run([str(w) for w in words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"{words[0]} failed ({last[0]}): mend it, or take it off the PATH to go on without it")


def codec2(audio) -> tuple:
    """audio (N,) at 24 kHz -> what Codec2 makes of it at 3200 bit/s (8 kHz inside), and its bytes."""
    import numpy as np
    from audio_io import resample
    with tempfile.TemporaryDirectory() as folder:
        narrow = resample(audio, RATE, 8000)
        (Path(folder) / "in.raw").write_bytes((np.clip(narrow, -1, 1) * 32767).astype("<i2").tobytes())
        run_program("c2enc", "3200", "in.raw", "out.bit", folder=folder)
        run_program("c2dec", "3200", "out.bit", "out.raw", folder=folder)
        sound = np.frombuffer((Path(folder) / "out.raw").read_bytes(), "<i2").astype(np.float32) / 32768
        return resample(sound, 8000, RATE), (Path(folder) / "out.bit").stat().st_size


def opus_packets(audio) -> tuple:
    """Opus through the package av: the packets' bytes alone are counted, not the file around them."""
    import av
    import numpy as np
    from audio_io import resample
    held = io.BytesIO()
    with av.open(held, "w", format="ogg") as file:
        stream = file.add_stream("libopus", rate=RATE, layout="mono", options={"application": "voip"})
        stream.bit_rate = OPUS_RATE
        frame = av.AudioFrame.from_ndarray((np.clip(audio, -1, 1) * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        packets = [p for f in (frame, None) for p in stream.encode(f)]
        size = sum(p.size for p in packets)
        for packet in packets:
            file.mux(packet)
    held.seek(0)
    with av.open(held) as file:
        rate = file.streams.audio[0].rate
        pieces = [decoded.to_ndarray().reshape(-1) for decoded in file.decode(audio=0)]       # mono: planar or not is the same
    return resample(np.concatenate(pieces), rate, RATE), size


def opus_programs(audio) -> tuple:
    """Opus as opusenc and opusdec; the bytes are the file's, a little more than the packets'."""
    import audio_io
    with tempfile.TemporaryDirectory() as folder:
        audio_io.write_audio(Path(folder) / "in.wav", audio, RATE)
        run_program("opusenc", "--quiet", "--speech", "--bitrate", str(OPUS_RATE / 1000), "in.wav", "out.opus", folder=folder)
        run_program("opusdec", "--quiet", "--rate", str(RATE), "out.opus", "out.wav", folder=folder)
        return audio_io.read_audio(Path(folder) / "out.wav"), (Path(folder) / "out.opus").stat().st_size


def find_peers() -> dict:
    """Name -> function (audio -> audio, bytes), or a word on what is not installed."""
    found = {"codec2": codec2 if shutil.which("c2enc") and shutil.which("c2dec") else "not installed (c2enc, c2dec of the package codec2)"}
    try:
        import av
        av.codec.Codec("libopus", "w")
        found["opus"] = opus_packets
    except Exception:                                                     # no package, or one built without libopus
        programs = shutil.which("opusenc") and shutil.which("opusdec")
        found["opus"] = opus_programs if programs else "not installed (the package av, or opusenc and opusdec of opus-tools)"
    return found


def fitted(sound, length: int):
    """(M,) -> (length,): cut, or filled up with silence; a codec's own delay stays in."""
    import numpy as np
    return np.pad(sound[:length], (0, max(0, length - len(sound)))).astype(np.float32)


# ----------------------------------------------------------------------------- comparing with the input

def classic(reference, other) -> dict:
    """PESQ (wide band, 1 to 4.6) and STOI (0 to 1) of `other` (N,) against `reference` (N,); null where the package is missing.

    Both expect the waveform back. A codec that makes its own phase scores low in PESQ however it sounds (Moshi's
    report found the two to disagree), so they stand here to be compared with others' tables, not to rank by.
    """
    from audio_io import resample
    a, b = (resample(x, RATE, 16000) for x in (reference, fitted(other, len(reference))))
    found = {"pesq": None, "stoi": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):
            from pesq import PesqError, pesq
            with contextlib.suppress(PesqError):                          # no speech found in it
                found["pesq"] = float(pesq(16000, a, b, "wb"))
        with contextlib.suppress(ImportError):
            from pystoi import stoi
            found["stoi"] = float(stoi(a, b, 16000))
    return found


# ----------------------------------------------------------------------------- what is coded

def read_transcripts(path) -> dict[str, str]:
    """A table of lines `name: text`, `name<tab>text` or `name|text`, plain or .gz -> texts by name. Lines of ; or # are comments."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no table {path}: check --transcripts")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as lines:
            rows = [re.match(r"([^;#\s:|][^:|\t]*?)\s*[:|\t]\s*(.*\S)", line) for line in lines]
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): check --transcripts") from None
    return {row[1]: row[2] for row in rows if row}


def recordings(folder, transcripts: str, count: int, seed: int) -> list[tuple[str, object]]:
    """(text, audio (N,)) of up to `count` recordings of fitting length, drawn evenly and repeatably.

    Without a table the text stands beside each sound as NAME.txt. Texts with brackets are effects; signs can be read aloud in many ways.
    """
    from audio_io import read_audio
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS)
    if not files:
        raise ValueError(f"there are no sound files in {folder}: check --recordings")
    texts = read_transcripts(transcripts) if transcripts else {}
    found = []
    for path in random.Random(seed).sample(files, len(files)):
        beside, name = path.with_suffix(".txt"), path.relative_to(folder).with_suffix("").as_posix()
        text = texts.get(name) or texts.get(path.name) or (beside.read_text(encoding="utf-8").strip() if beside.is_file() else "")
        if set("[(*#<") & set(text) or not PROMPT_WORDS <= len(text.split()) <= 2 * WORDS[1]:
            continue
        audio = read_audio(path, RATE)
        if PROMPT_SECONDS <= len(audio) / RATE <= 2 * SECONDS[1]:
            found.append((text, audio))
        if len(found) == count:
            break
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} recordings of {PROMPT_SECONDS:g} s or more with a text: name the table of their texts with --transcripts")
    return found


def mis_sampled(codes, keep: int, generator):
    """codes (1, K, T) with all codebooks after the first `keep` taken from other frames."""
    import torch
    shuffled = codes.clone()
    for k in range(keep, codes.shape[1]):
        shuffled[:, k] = codes[:, k, torch.randperm(codes.shape[2], generator=generator)]
    return shuffled


def codebook_use(data, codec, fallback) -> dict:
    """Entropy (1 = uniform) and share of unused codes of every codebook, over the training tokens where they belong to this codec."""
    import torch
    from dataset_pipeline import read_turns
    from rvq_tokenizer import code_statistics
    from text_tokenizer import load_tokenizer
    try:
        codes, source = torch.cat([t.codes for c in read_turns(data, "train", load_tokenizer("bytes"), codec.fingerprint) for t in c], 1).long(), "training tokens"
    except ValueError:
        codes, source = fallback, "the turns above"
    return code_statistics(codes, codec.cfg.codebook_size) | {"frames": codes.shape[1], "source": source}


# ----------------------------------------------------------------------------- speed

@contextlib.contextmanager
def one_thread():
    """Torch on one core, as the bars ask for."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed_round_trip(codec, audio, clock: dict):
    """audio (1, 1, N) -> codes (1, K, T) and the decoded samples (N,), on one core; adds to the clock. The first call warms up."""
    import torch

    def now():
        if audio.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
    with one_thread():
        if not clock["audio"]:
            codec.decode(codec.encode(audio))
        start = now()
        codes = codec.encode(audio)
        middle = now()
        sound = codec.decode(codes)
        end = now()
    clock["encode"] += middle - start
    clock["decode"] += end - middle
    clock["audio"] += audio.shape[-1] / codec.cfg.sample_rate
    return codes, sound[0, 0, :audio.shape[-1]].float().cpu().numpy()


def times_real_time(clock: dict) -> dict:
    both = clock["encode"] + clock["decode"]
    return {name: clock["audio"] / seconds if seconds else None for name, seconds in (("encode", clock["encode"]), ("decode", clock["decode"]), ("both", both))}


def mimi_speed(sounds: list) -> dict | None:
    """Mimi's architecture with random weights on the same sounds and core; None without transformers. Speed only: such weights say nothing."""
    import torch
    try:
        from transformers import MimiConfig, MimiModel
    except ImportError:
        return None
    from mimi_codec import MimiCodec
    codec, clock = MimiCodec(MimiModel(MimiConfig())), {"encode": 0.0, "decode": 0.0, "audio": 0.0}
    for audio in sounds:
        timed_round_trip(codec, torch.from_numpy(audio).view(1, 1, -1), clock)
    return times_real_time(clock)


# ----------------------------------------------------------------------------- the bench

class Bench:
    """One codec beside the others on one set of sounds."""

    def __init__(self, codec, peers: dict, seed: int):
        import torch
        self.codec, self.peers, self.device = codec, peers, next(codec.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        self.levels = [k for k in LEVELS if k < codec.cfg.num_codebooks] + [codec.cfg.num_codebooks]
        acoustic = codec.cfg.num_codebooks - codec.cfg.num_semantic
        self.pairs = {f"{s}+{a}": (s, a) for s, a in PAIRS if s < codec.cfg.num_semantic and a <= acoustic}
        self.rows: dict[str, list] = {name: [] for name in ("input", *map(str, self.levels), *self.pairs, "mixed", *peers)}
        self.clock = {"encode": 0.0, "decode": 0.0, "audio": 0.0}
        self.bytes, self.seconds, self.codes, self.pitch = dict.fromkeys(peers, 0), dict.fromkeys(peers, 0.0), [], []

    def add(self, text: str, audio) -> None:
        """All versions of one sound (N,) at 24 kHz, judged."""
        import judges as judge
        import torch
        voice = judge.speaker_embedding(audio)
        self.rows["input"].append(hear(audio, text))
        for name, sound in self.versions(torch.from_numpy(audio), audio):
            self.rows[name].append(hear(sound, text, voice=voice) | classic(audio, sound))
            if name == str(self.levels[-1]):
                self.pitch.append(judge.pitch_error(audio, sound))

    def versions(self, audio, samples):
        """-> (name, sound (N,)) of every way to code it; the codes are kept and the time is taken."""
        codes, full = timed_round_trip(self.codec, audio.view(1, 1, -1).to(self.device), self.clock)
        self.codes.append(codes[0].cpu())
        for k in self.levels:
            yield str(k), full if k == self.levels[-1] else self.decode(codes[:, :k], len(samples))
        for name, (s, a) in self.pairs.items():
            split = self.codec.cfg.num_semantic
            yield name, self.decode(codes[:, [*range(s), *range(split, split + a)]], len(samples), s)
        yield "mixed", self.decode(mis_sampled(codes.cpu(), 2, self.generator).to(self.device), len(samples))
        for name, peer in self.peers.items():
            if callable(peer):
                start = time.perf_counter()
                sound, size = peer(samples)
                self.seconds[name] += time.perf_counter() - start
                self.bytes[name] += size
                yield name, fitted(sound, len(samples))

    def decode(self, codes, length: int, semantic: int | None = None):
        return self.codec.decode(codes, semantic)[0, 0, :length].float().cpu().numpy()

    def result(self) -> dict:
        """Per condition: words, voice, naturalness, distance of the words from the input's, bits per second."""
        cfg, out = self.codec.cfg, {}
        for name, rows in self.rows.items():
            if not rows:
                out[name] = {"missing": self.peers[name]}
                continue
            out[name] = summary(rows)
            if name != "input":
                out[name]["wer_over_input"] = paired([{"a": a, "b": b} for a, b in zip(rows, self.rows["input"])], "a", "b")
            if name in self.peers:
                out[name] |= {"bits_per_second": 8 * self.bytes[name] / self.clock["audio"], "times_real_time": self.clock["audio"] / self.seconds[name]}
            elif name != "input":
                count = cfg.num_codebooks if name == "mixed" else sum(map(int, name.split("+")))
                out[name]["bits_per_second"] = count * math.log2(cfg.codebook_size) * cfg.frame_rate
        return out


def bench_codec(args) -> tuple[dict, str]:
    """Test turns, and people's recordings, through the first codebooks, through all, and through other codecs."""
    import checkpoint
    import judges as judge
    import runtime
    import torch
    from tqdm import tqdm
    codec, peers = checkpoint.load_codec(args.codec, runtime.pick_device(args.device)), find_peers()
    turns = [(turns[i]["text"], sound_of(args.data, turns[i])) for turns, i in pick_turns(args.data, args.split, args.turns, args.seed)]
    people = recordings(args.recordings, args.transcripts, args.prompts, args.seed) if args.recordings else []
    synthetic, human = Bench(codec, peers, args.seed), Bench(codec, peers, args.seed)
    for bench, sounds, name in ((synthetic, turns, "codec"), (human, people, "people")):
        for text, audio in tqdm(sounds, desc=name, unit="turn", disable=not sounds):
            bench.add(text, audio)
    pitch = [p for p in synthetic.pitch if p]
    result = {"fingerprint": codec.fingerprint, "parameters": sum(p.numel() for p in codec.parameters()), "conditions": synthetic.result(),
              "human": human.result() if people else None, "human_files": len(people) or None,
              "pitch_semitones": judge.bootstrap_interval([p["semitones"] for p in pitch]), "voicing_agreement": judge.bootstrap_interval([p["voicing_agreement"] for p in pitch]),
              "times_real_time": times_real_time(synthetic.clock), "mimi_times_real_time": mimi_speed([audio for _, audio in turns[:3]]),
              "codebooks": codebook_use(args.data, codec, torch.cat(synthetic.codes, 1)), "frame_ms": 1000 / codec.cfg.frame_rate, "device": str(codec_device(codec))}
    result["bars"] = bars(result)
    return result, codec_body(result)


def codec_device(codec):
    return next(codec.parameters()).device


# ----------------------------------------------------------------------------- bars

def mean(part, *keys):
    """The mean at conditions[key][...]; None where it was not measured."""
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    return part.get("mean") if isinstance(part, dict) else part


def bars(result: dict) -> list[dict]:
    """What this project asks of its codec: {what, bar, value, met}, met None where it was not measured."""
    full = str(max(int(k) for k in result["conditions"] if k.isdigit()))
    found = []

    def bar(what, limit, value, at_least=True, unit=""):
        met = None if value is None else bool(value >= limit if at_least else value <= limit)
        found.append({"what": what, "bar": f"{'at least' if at_least else 'at most'} {limit:g}{unit}", "value": value, "met": met})
    for where, part, words, voice, drop in (("synthetic", result["conditions"], 1.0, 0.95, 0.3), ("human", result["human"] or {}, 3.0, 0.88, 0.6)):
        over = mean(part, full, "wer_over_input")
        bar(f"{where}: word error, points above the input's own", words, None if over is None else 100 * over, at_least=False)
        bar(f"{where}: voice, cosine to the input", voice, mean(part, full, "voice"))
        mos = mean(part, "input", "mos"), mean(part, full, "mos")
        bar(f"{where}: DistillMOS, drop from the input", drop, None if None in mos else mos[0] - mos[1], at_least=False)
        for peer in ("codec2", "opus"):
            pairs = [(mean(part, full, key), mean(part, peer, key), sign) for key, sign in (("wer", -1), ("voice", 1), ("mos", 1))]
            better = None if any(None in pair for pair in pairs) else sum(sign * (ours - theirs) > 0 for ours, theirs, sign in pairs)
            bar(f"{where}: measures (words, voice, DistillMOS) better than {NAMES[peer]}", 3, better)
    for k, limit in ((1, 20), (2, 8), (4, 4), (8, 2)):
        over = mean(result["conditions"], str(k), "wer_over_input")
        bar(f"synthetic: word error with the first {k} alone, points above the input's own", limit, None if over is None else 100 * over, at_least=False)
    use, ours, mimi = result["codebooks"], result["times_real_time"]["both"], (result["mimi_times_real_time"] or {}).get("both")
    bar("mean entropy of the codebooks (1 = uniform)", 0.85, sum(use["entropy"]) / len(use["entropy"]))
    bar("unused codes", 1, 100 * sum(use["dead"]) / len(use["dead"]), at_least=False, unit=" %")
    bar("encoding and decoding on one core, times faster than real time", 40, ours)
    bar("the same, times faster than Mimi's architecture", 10, ours / mimi if ours and mimi else None)
    bar("sound that must be there before the first code, ms", 80, result["frame_ms"], at_least=False)
    return found


# ----------------------------------------------------------------------------- tables

def conditions_table(conditions: dict) -> str:
    rows = []
    for key, s in conditions.items():
        label = NAMES.get(key, f"first {key}" if key.isdigit() else f"first {key.replace('+', ' semantic, first ')} acoustic")
        if "missing" in s:
            rows.append([label, s["missing"], *["-"] * 7])
            continue
        rows.append([label, show(s.get("bits_per_second"), 0), str(s["n"]), show(s["wer"], 2, True), show(s.get("wer_over_input"), 2, True), show(s.get("mos")), show(s.get("voice")),
                     show((s.get("pesq") or {}).get("mean")), show((s.get("stoi") or {}).get("mean"))])
    return table(["codebooks or codec", "bit/s", "sounds", "word error", "above the input's", "DistillMOS", "voice, cosine to the input", "PESQ", "STOI"], rows)


def bars_table(found: list[dict]) -> str:
    said = {True: "met", False: "**missed**", None: "not measured"}
    return table(["bar", "", "measured", ""], [[b["what"], b["bar"], show(None if b["value"] is None else float(b["value"])), said[b["met"]]] for b in found])


def codec_body(result: dict) -> str:
    """The section's text, also for the codec's card."""
    body = "Synthetic test turns:\n\n" + conditions_table(result["conditions"])
    if result.get("human"):
        body += f"\n\nPeople's recordings ({result['human_files']} files):\n\n" + conditions_table(result["human"])
    speed, use, mimi = result["times_real_time"], result["codebooks"], result.get("mimi_times_real_time")
    body += (f"\n\nEncoding {show(speed['encode'], 0)}, decoding {show(speed['decode'], 0)}, both {show(speed['both'], 0)} times faster than real time on one core ({result['device']}); "
             f"Mimi's architecture with random weights {show(mimi['both'] if mimi else None, 1)}. "
             f"Pitch off by {show(result['pitch_semitones'])} semitones (median per turn), voicing agrees in {show(result['voicing_agreement'], 2, True)} of frames. "
             f"{result['parameters'] / 1e6:.1f} M parameters, fingerprint {result['fingerprint']}. PESQ and STOI expect the waveform back: they do not rank codecs that make their own phase.\n\n")
    body += f"Use of the codebooks over {use['frames']} frames ({use['source']}); entropy 1 is uniform:\n\n"
    body += table(["codebook"] + [str(i + 1) for i in range(len(use["entropy"]))],
                  [["entropy"] + [f"{e:.2f}" for e in use["entropy"]], ["unused"] + [f"{100 * d:.0f} %" for d in use["dead"]]])
    return body + ("\n\n" + bars_table(result["bars"]) if result.get("bars") else "")


def add_flags(part) -> None:
    part.add_argument("--recordings", default="", metavar="FOLDER", help="people's recordings, measured besides")
    part.add_argument("--transcripts", default="", metavar="FILE", help="what they say: lines `name: text` (or tab, or |), plain or .gz; default NAME.txt beside each")
    part.add_argument("--prompts", type=int, default=200, help="recordings at most; default 200")
