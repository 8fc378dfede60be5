"""Is the watermark found, is it found where there is none, and can it be heard? (python benchmark.py watermark)

Marked and unmarked speech of three kinds (what the model said, the synthetic test split, people's recordings) goes through what
happens to sound: this project's codec, other formats, other rates and levels, cuts and noise. Called by benchmark.py.
"""
from __future__ import annotations

import io
import random
import sys
from dataclasses import replace
from pathlib import Path

from measuring import hear, paired, pick_turns, show, sound_of, summary, table

RATE = 24000
SAYS_YES = 0.001            # p-value below which the detector says "marked"
LENGTHS = (0.0, 3.0, 5.0, 8.0, 1e9)          # s
JOINED = 12.0               # s of one source that are also looked at together, as a longer reply
KINDS = {"model": "the model's samples", "synthetic": "synthetic test turns", "people": "people's recordings"}


# ----------------------------------------------------------------------------- what happens to sound

def through_file(audio, kind: str, codec: str, bits: int):
    """audio (N,) written as a lossy file and read again. ValueError without the package av or its encoder."""
    import numpy as np
    from audio_io import resample
    try:
        import av
        held = io.BytesIO()
        with av.open(held, "w", format=kind) as file:
            stream = file.add_stream(codec, rate=RATE, layout="mono")
            stream.bit_rate = bits
            frame = av.AudioFrame.from_ndarray((np.clip(audio, -1, 1) * 32767).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate = RATE
            for part in (*av.AudioResampler(format=stream.format, layout="mono", rate=RATE).resample(frame), None):
                for packet in stream.encode(part):
                    file.mux(packet)
        held.seek(0)
        with av.open(held) as file:
            rate = file.streams.audio[0].rate
            pieces = [np.asarray(decoded.to_ndarray().reshape(-1), np.float32) / (32768 if decoded.format.name.startswith("s16") else 1) for decoded in file.decode(audio=0)]
    except (ImportError, OSError, av.error.FFmpegError) as error:
        raise ValueError(f"{codec} is not to be had here ({error})") from None
    return resample(np.concatenate(pieces), rate, RATE)


def at_rate(audio, rate: int):
    from audio_io import resample
    return resample(resample(audio, RATE, rate), rate, RATE)


def with_noise(audio, db: float):
    """White noise so many dB below the speech."""
    import numpy as np
    noise = np.random.default_rng(0).normal(0, 1, len(audio))
    return (audio + noise * np.sqrt(np.mean(audio ** 2)) * 10 ** (-db / 20)).astype(np.float32)


def coded(codec, audio, columns: list[int] | None = None, semantic: int | None = None):
    """audio (N,) through this project's codec, with all its codebooks or these columns of them."""
    import torch
    codes = codec.encode(torch.as_tensor(audio).view(1, 1, -1))
    return codec.decode(codes if columns is None else codes[:, columns], semantic)[0, 0, :len(audio)].numpy()


def channels(codec) -> dict:
    """Name -> audio (N,) to what arrives."""
    from config import codec_columns
    cfg, few = codec.cfg, 12
    columns, semantic = codec_columns(few, 3, cfg.num_semantic), min(3, cfg.num_semantic)
    return {"as it is": lambda a: a,
            "this codec": lambda a: coded(codec, a),
            "this codec, 12 of its codebooks": lambda a: coded(codec, a, columns[:few], semantic) if cfg.num_codebooks >= few else coded(codec, a),
            "this codec twice": lambda a: coded(codec, coded(codec, a)),
            "16 kHz and back": lambda a: at_rate(a, 16000),
            "8 kHz and back": lambda a: at_rate(a, 8000),
            "20 dB quieter": lambda a: a * 0.1,
            "Opus 24 kbit/s": lambda a: through_file(a, "ogg", "libopus", 24000),
            "MP3 32 kbit/s": lambda a: through_file(a, "mp3", "libmp3lame", 32000),
            "begun 0.7 s later": lambda a: a[int(0.7 * RATE):],
            "noise 20 dB below": lambda a: with_noise(a, 20.0),
            "played 2 % faster": lambda a: at_speed(a, 1.02)}


def at_speed(audio, factor: float):
    from audio_io import resample
    return resample(audio, RATE * factor, RATE)


# ----------------------------------------------------------------------------- what is marked

def samples_of_the_model(folder, count: int) -> list[dict]:
    """What the shipped weights said: their codec's sound, with its text."""
    import json

    from audio_io import read_audio
    listed = Path(folder) / "samples.json"
    if not listed.is_file():
        print(f"note: no {listed}: the model's samples are left out", file=sys.stderr)
        return []
    return [{"kind": "model", "text": row["text"], "audio": read_audio(Path(folder) / row["file"])} for row in json.loads(listed.read_text(encoding="utf-8"))[:count]]


def sources(args, recordings) -> list[dict]:
    """{kind, text, audio (N,)} of the three kinds, --turns of them in all."""
    rows = samples_of_the_model(args.samples, args.turns // 4)
    people = []
    if args.recordings and Path(args.recordings).is_dir():
        people = [{"kind": "people", "text": text, "audio": audio} for text, audio in recordings(args.recordings, args.transcripts, (args.turns - len(rows)) // 2, args.seed)]
    else:
        print(f"note: no recordings in {args.recordings or '(none named)'}: people's speech is left out (--recordings)", file=sys.stderr)
    turns = pick_turns(args.data, args.split, args.turns - len(rows) - len(people), args.seed)
    return rows + [{"kind": "synthetic", "text": t[i]["text"], "audio": sound_of(args.data, t[i])} for t, i in turns] + people


def joined(rows: list[dict]) -> list[dict]:
    """Utterances of one kind one after the other until each is JOINED seconds long: what a longer reply would be."""
    import numpy as np
    longer = []
    for kind in KINDS:
        part = []
        for row in (r for r in rows if r["kind"] == kind):
            part.append(row["audio"])
            if sum(map(len, part)) >= JOINED * RATE:
                longer.append({"kind": kind, "audio": np.concatenate(part), "text": ""})
                part = []
    return longer


# ----------------------------------------------------------------------------- counting

def share(hits: list[bool]) -> dict:
    """Share of True with its exact 95 % interval (Clopper and Pearson), {mean, low, high, n}."""
    from scipy.stats import beta
    n, k = len(hits), sum(hits)
    if not n:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return {"mean": k / n, "low": float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0, "high": float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0, "n": n}


class Detector:
    """Knows the network; finds with one key or counts false alarms over many."""

    def __init__(self, folder):
        import watermark
        self.watermark, (self.network, self.cfg) = watermark, watermark.load_network(folder)

    def carriers(self, audio):
        return self.watermark.carriers_of(audio, self.network, self.cfg)

    def found(self, audio, key: str) -> dict:
        one = self.watermark.match(self.carriers(audio), key, self.cfg)
        return {"p": one.p_value, "score": one.score, "yes": one.p_value < SAYS_YES}

    def p_values(self, audio, keys: list[str]) -> list[float]:
        carriers, w = self.carriers(audio), self.watermark
        arranged = {speed: w.arrange(w.at_speed(carriers, speed), self.cfg) for speed in w.SPEEDS}
        return [w.search(arranged, key, self.cfg).p_value for key in keys]


def detection(rows: list[dict], paths: dict, detector: Detector, key: str) -> tuple[dict, dict]:
    """Share found per channel; and of what came through the codec, by length."""
    from tqdm import tqdm
    found = {name: [] for name in paths}
    for row in tqdm(rows, desc="detection", unit="utterance"):
        for name, path in list(paths.items()):
            try:
                found[name].append(detector.found(path(row["marked"]), key)["yes"])
            except ValueError as error:
                print(f"note: {name} is left out: {error}", file=sys.stderr)
                del paths[name]
    lengths = [len(row["audio"]) / RATE for row in rows]
    by_length = {f"{low:g} to {high:g} s" if high < 1e6 else f"{low:g} s and more": share([hit for hit, s in zip(found["this codec"], lengths) if low <= s < high])
                 for low, high in zip(LENGTHS, LENGTHS[1:])}
    return {name: share(found[name]) for name in paths}, by_length


def false_alarms(rows: list[dict], paths: dict, detector: Detector, keys: int) -> dict:
    """Share of unmarked sounds that are called marked, over many keys, as they are and coded; and of marked ones under another key."""
    from tqdm import tqdm
    names, counts = [f"another key {n}" for n in range(keys)], {"unmarked": [], "unmarked, this codec": [], "marked with another key": []}
    for row in tqdm(rows, desc="false alarms", unit="utterance"):
        for what, sound in (("unmarked", row["audio"]), ("unmarked, this codec", paths["this codec"](row["audio"])), ("marked with another key", row["marked"])):
            counts[what] += [p < SAYS_YES for p in detector.p_values(sound, names)]
    return {what: share(hits) for what, hits in counts.items()}


def quality(rows: list[dict]) -> dict:
    """What marking costs: level of the change, words, naturalness, paired on the same utterances."""
    import judges as judge
    import numpy as np
    from tqdm import tqdm
    pairs = [{"plain": hear(r["audio"], r["text"]), "marked": hear(r["marked"], r["text"]),
              "snr": float(10 * np.log10(np.sum(r["audio"] ** 2) / (np.sum((r["audio"] - r["marked"]) ** 2) + 1e-12)))} for r in tqdm(rows, desc="judging", unit="utterance")]
    drop = [a["plain"]["mos"] - a["marked"]["mos"] for a in pairs if None not in (a["plain"]["mos"], a["marked"]["mos"])]
    return {"plain": summary([a["plain"] for a in pairs]), "marked": summary([a["marked"] for a in pairs]), "wer_over_plain": paired(pairs, "marked", "plain"),
            "mos_drop": judge.bootstrap_interval(drop), "snr_db": judge.bootstrap_interval([a["snr"] for a in pairs])}


# ----------------------------------------------------------------------------- the section

def bench_watermark(args, recordings) -> tuple[dict, str]:
    """Marked speech through codecs, rates and noise: how often it is found, how often something else is, and whether it can be heard."""
    import checkpoint
    import watermark
    codec, detector = checkpoint.load_codec(args.codec), Detector(args.weights)
    cfg, key = replace(detector.cfg, strength_db=args.strength_db), f"benchmark {args.seed}"
    rows = sources(args, recordings)
    random.Random(args.seed).shuffle(rows)
    longer = joined(rows)
    for row in rows + longer:
        row["marked"] = watermark.embed(row["audio"], key, cfg)
    paths = channels(codec)
    found, by_length = detection(rows, paths, detector, key)
    long_found, _ = detection(longer, dict(paths), detector, key)
    result = {"utterances": len(rows), "kinds": {kind: sum(r["kind"] == kind for r in rows) for kind in KINDS}, "seconds": sum(len(r["audio"]) for r in rows) / RATE,
              "strength_db": args.strength_db, "says_yes_below": SAYS_YES, "joined": len(longer), "found": found, "found_joined": long_found,
              "found_by_length_coded": by_length, "false_alarms": false_alarms(rows, paths, detector, args.keys), "quality": quality(rows) if args.judge else None}
    return result, body(result)


def body(result: dict) -> str:
    kinds = ", ".join(f"{count} {KINDS[kind]}" for kind, count in result["kinds"].items() if count)
    text = (f"{result['utterances']} utterances ({kinds}; {result['seconds'] / max(1, result['utterances']):.1f} s on average), marked at {result['strength_db']:g} dB, and "
            f"{result['joined']} stretches of {JOINED:g} s and more joined from them. \"Found\": p-value below {result['says_yes_below']:g}.\n\n")
    text += table(["what happened to it", "found, single utterances", f"found, {JOINED:g} s and more"],
                  [[name, show(hits, 2, True), show(result["found_joined"].get(name, {}), 2, True)] for name, hits in result["found"].items()])
    text += "\n\nThrough this codec, by length: " + "; ".join(f"{name} {show(hits, 2, True)} of {hits['n']}" for name, hits in result["found_by_length_coded"].items() if hits["n"]) + "."
    text += "\n\n" + table(["false alarms", "trials (utterances x keys)", "called marked"],
                           [[name, str(hits["n"]), show(hits, 3, True)] for name, hits in result["false_alarms"].items()])
    judged = result["quality"]
    if judged:
        text += (f"\n\nThe change lies {show(judged['snr_db'], 1)} dB below the speech. DistillMOS {show(judged['plain'].get('mos'))} unmarked, {show(judged['marked'].get('mos'))} marked: a drop of "
                 f"{show(judged['mos_drop'], 3)} on the same utterances. Word error {show(judged['plain']['wer'], 2, True)} unmarked, {show(judged['marked']['wer'], 2, True)} marked: "
                 f"{show(judged['wer_over_plain'], 2, True)} more.")
    return text


def add_flags(part) -> None:
    """Flags of `benchmark.py watermark` that no other part has."""
    part.add_argument("--weights", default="pretrained/watermark", help="folder of the detector; default pretrained/watermark")
    part.add_argument("--strength_db", type=float, default=2.0, help="strength of the mark; default 2")
    part.add_argument("--samples", default="pretrained/nano/samples", help="what the model said; default pretrained/nano/samples")
    part.add_argument("--recordings", default="", metavar="FOLDER", help="people's recordings, marked besides")
    part.add_argument("--transcripts", default="", metavar="FILE", help="what they say (see benchmark.py codec)")
    part.add_argument("--keys", type=int, default=20, help="keys with which each sound is searched for false alarms; default 20")
    part.add_argument("--judge", type=int, default=1, choices=(0, 1), help="0: skip words and naturalness; default 1")
