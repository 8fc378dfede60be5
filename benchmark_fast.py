"""benchmark.py fast: one frame in every precision, compiled and speculative, and what int8 does to the voice.

A frame is what generation does 12.5 times a second of speech: first code, depth decoder, and the backbone's next position; the
codec is not in it. All variants of a size are timed in turns in one run, so that what else the machine does falls on all alike. Sizes
without trained weights have random ones (said so): their times are real, their codes mean nothing.
Beside each time stand the bytes of weights that a frame must read and how long reading them takes at the measured bandwidth.

K codebooks, D width.
"""
from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import config
from measuring import hear, paired, pick_turns, show, sound_of, table

FRAMES = 24                      # timed frames of each variant
SIZES = ("nano", "tiny", "blog", "small")
VARIANTS = ("plain", "fp32", "compiled", "bf16", "int8", "int8 compiled", "int8 activations", "int4-depth", "speculative")
LABELS = {"plain": "float32 as loaded", "fp32": "float32, laid out for one row", "compiled": "float32, depth decoder one graph", "bf16": "bfloat16", "int8": "**int8**",
          "int8 compiled": "int8, depth decoder one graph", "int8 activations": "int8, activations in 8 bits too", "int4-depth": "int8, depth decoder int4",
          "speculative": "float32, codes drafted in int8"}
TRAINED, CONTEXT, SENTENCES = "nano", 200, 8   # size with weights; positions before the timed frame; sentences of the speculative part
READ = 2 ** 28                   # numbers read to measure the bandwidth (1 GiB)
BITS = {"bf16": (16, 16), "int8": (8, 8), "int8 compiled": (8, 8), "int8 activations": (8, 8), "int4-depth": (8, 5)}      # backbone, depth decoder (int4 with its scales)


# ----------------------------------------------------------------------------- floors

def bandwidth() -> float:
    """Bytes per second that this process reads from memory, the best of five sums over an array that fits no cache."""
    import torch
    x, best = torch.ones(READ), math.inf
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def bytes_per_frame(cfg, variant: str, passes: float = 1.0) -> dict[str, float]:
    """Bytes of weights that one frame reads: the backbone once, the depth decoder K times ("steps"), or once where it stays in a cache ("cached").

    passes: checks of a speculative frame. Additions count as far as each frame reads them.
    """
    parts, extra, K = config.count_parameters(cfg), config.count_additions(cfg), cfg.num_codebooks
    wide, narrow = (bits / 8 for bits in BITS.get(variant, (32, 32)))
    once = parts["backbone"] + parts["c0_head"] + parts["projection"] + sum(extra.get(k, 0) for k in ("read_text", "read_memory", "advance_head"))
    depth, heads = parts["depth"], parts["audio_head"]
    if variant == "speculative":                                               # drafts in int8, checks in float32
        return {"steps": 4 * once + K * depth + heads + passes * 4 * (depth + heads), "cached": 4 * once + depth + heads + 4 * (depth + heads)}
    return {"steps": wide * once + narrow * (K * depth + heads), "cached": wide * once + narrow * (depth + heads)}


# ----------------------------------------------------------------------------- one frame

def build(size: str, args):
    """float32 model of a size: the given weights for the trained one, else random ones from the seed."""
    import checkpoint
    import torch
    from architecture import CSM
    if size == TRAINED:
        return checkpoint.load_model(args.checkpoint or "pretrained/nano")
    model = CSM(config.model_preset(size))
    model.init_weights(torch.Generator().manual_seed(args.seed), open_gates=True)
    return model.eval()


def prepare(variant: str, model) -> str:
    """Turn a fresh model into the variant, in place; the line that says what runs."""
    import depth_graph
    import quantisation
    import speculative
    precision = {"plain": "", "compiled": "fp32", "speculative": "fp32", "int8 compiled": "int8", "int8 activations": "int8"}.get(variant, variant)
    note = quantisation.quantise(model, precision, "dynamic" if variant == "int8 activations" else None) if precision else "float32"
    if variant.endswith("compiled"):
        note += "; " + depth_graph.compile_depth(model)
    if variant == "speculative":
        note += "; " + speculative.speculate(model, "int8")
    return note


class Frame:
    """One conversation at CONTEXT positions; every call makes its next frame anew."""

    def __init__(self, model, seed: int):
        import torch
        from frame_step import FrameStep
        from turns import audio_rows, join, text_rows
        g, cfg = torch.Generator().manual_seed(seed), model.cfg
        tokens = torch.randint(cfg.code_offset, cfg.audio_vocab, (cfg.num_codebooks, CONTEXT // 2), generator=g)
        letters = [97 + int(i) for i in torch.randint(26, (CONTEXT // 2 - 1,), generator=g)] + [cfg.eot_id]
        self.model, self.sampling, self.state = model, config.SamplingConfig(temperature=0.0, depth_temperature=0.0), model.new_state(1, CONTEXT + 8)
        rows = join([text_rows(letters, cfg, 0), audio_rows(tokens, cfg, 0, [0] * (CONTEXT // 2))])
        with torch.inference_mode():
            self.hidden = model(rows, state=self.state)[0, -(CONTEXT // 2):]
            model(audio_rows(tokens[:, :1], cfg, 0, [0]), state=self.state)      # a turn's first frame leaves the text's keys in the state
        self.step = FrameStep(model)

    def __call__(self, number: int) -> tuple[list[int], dict]:
        """Codes after hidden state `number`, and seconds of the depth decoder and the backbone, and of processor time for both."""
        import torch
        from generation import decode_frame
        model, state = self.model, copy.copy(self.state)
        with torch.inference_mode():
            start, busy = time.perf_counter(), time.process_time()
            tokens = decode_frame(model, self.hidden[number % len(self.hidden)], model.cfg.audio_vocab - model.cfg.code_offset, self.sampling, None, False)
            middle = time.perf_counter()
            self.step([state], [0], tokens.view(1, -1), [0])
        return tokens.tolist(), {"depth": middle - start, "backbone": time.perf_counter() - middle, "cpu": time.process_time() - busy}


def time_size(size: str, args, speed: float) -> dict:
    """Every variant of a size, timed in turns; large ones (over 10^9 parameters) one after another, since they do not fit side by side."""
    from tqdm import tqdm
    cfg, names = config.model_preset(size), [v for v in VARIANTS if v in args.variants.split(",")]
    together = config.count_all(cfg) < 1e9
    groups = [names] if together else [[name] for name in names]
    made, seconds, notes, frames, codes = {}, {n: [] for n in names}, {}, {}, {n: [] for n in names}
    for group in groups:
        for name in tqdm(group, desc=f"{size}: variants", unit="variant"):
            model = build(size, args)
            cfg, notes[name] = model.cfg, prepare(name, model)
            frames[name] = Frame(model, args.seed)
            frames[name](0)
        for number in tqdm(range(args.frames), desc=f"{size}: frames", unit="frame"):
            for name in group[::-1] if number % 2 else group:
                found, taken = frames[name](number)
                codes[name].append(found)
                seconds[name].append(taken)
        made |= {name: variant_result(frames[name].model, seconds[name]) for name in group}
        frames.clear()
    first = codes[names[0]]
    for name in names:
        tally = made[name].pop("tally")
        moved = bytes_per_frame(cfg, name, tally["passes"] / tally["frames"] if tally else 1.0)
        equal = sum(a == b for one, other in zip(first, codes[name]) for a, b in zip(one, other)) / sum(map(len, first))
        made[name] |= {"note": notes[name], "bytes": moved, "floor_ms": {k: 1000 * v / speed for k, v in moved.items()}, "equal_codes": equal, "tally": tally,
                       "times_faster": made[names[0]]["ms"] / made[name]["ms"]}
    return {"variants": made, "parameters": config.count_all(cfg), "codebooks": cfg.num_codebooks, "trained": size == TRAINED, "interleaved": together}


def variant_result(model, seconds: list[dict]) -> dict:
    import numpy as np
    depth, backbone, cpu = (1000 * np.array([s[k] for s in seconds]) for k in ("depth", "backbone", "cpu"))
    spoken = getattr(model.frame_codes, "tally", None)
    return {"ms": float(np.median(depth + backbone)), "best_ms": float(np.min(depth + backbone)), "cpu_ms": float(np.median(cpu)), "depth_ms": float(np.median(depth)), "backbone_ms": float(np.median(backbone)),
            "tally": vars(spoken) | {"acceptance": spoken.acceptance} if spoken else None}


# ----------------------------------------------------------------------------- speculative decoding of speech and text

def say_all(args, texts: list[str], codec) -> dict:
    """Each sentence said twice in one conversation, once new and once said before, with each draft in turns: acceptance and milliseconds per frame."""
    import speculative
    from generation import Session
    from text_tokenizer import load_tokenizer
    from tqdm import tqdm
    sessions, rows = {}, []
    for draft in ("plain", "int8", "phrases"):
        model = build(TRAINED, args)
        if draft != "plain":
            speculative.speculate(model, draft)
        sessions[draft] = Session(model, codec, load_tokenizer(model.cfg.tokenizer), config.SamplingConfig(seed=args.seed))
    for number, text in enumerate(tqdm(texts + texts, desc="speech", unit="sentence")):
        for draft, session in sessions.items():
            spoken = session.model.frame_codes
            before = dict(vars(spoken.tally)) if spoken else {}
            turn = session.say(0, text)
            rows.append({"draft": draft, "kind": "new" if number < len(texts) else "said before", "made": turn.num_frames, "ms": turn.total_ms}
                        | ({k: v - before[k] for k, v in vars(spoken.tally).items()} if spoken else {}))
    return {draft: {kind: speech_result([r for r in rows if (r["draft"], r["kind"]) == (draft, kind)]) for kind in ("new", "said before")} for draft in sessions}


def speech_result(rows: list[dict]) -> dict:
    def total(key):
        return sum(r.get(key, 0) for r in rows)
    drafted = total("drafted") > 0
    return {"frames": total("made") if not drafted else total("frames"), "ms_per_frame": total("ms") / max(1, total("frames") if drafted else total("made")),
            "acceptance": total("kept") / total("drafted") if drafted else None, "whole_frames": total("whole") / total("frames") if drafted else None}


def write_all(args, texts: list[str], temperature: float, codec) -> dict:
    """Replies of the text head to each sentence, plain and with drafts looked up, in turns: milliseconds per byte, acceptance, bytes per pass."""
    import speculative
    from generation import Session
    from text_tokenizer import load_tokenizer
    model = build(TRAINED, args)
    tokenizer = load_tokenizer(model.cfg.tokenizer)
    writers = {"plain": None, "from the written dialogues": speculative.TextLookup(tokenizer, written()), "from its own replies alone": speculative.TextLookup(tokenizer)}
    found = {name: {"bytes": 0, "seconds": 0.0} for name in writers}
    for number, text in enumerate(texts):
        for name, writer in writers.items():
            session = Session(model, codec, tokenizer, config.SamplingConfig(seed=args.seed + number, text_temperature=temperature))
            session.write = writer or session.write
            session.add_turn(0, text)
            session.prepare()
            start = time.perf_counter()
            found[name]["bytes"] += len(_reply(session)) + 1
            found[name]["seconds"] += time.perf_counter() - start
    return {name: {"bytes": f["bytes"], "ms_per_byte": 1000 * f["seconds"] / f["bytes"], "acceptance": writers[name].tally.acceptance if writers[name] else None,
                   "bytes_per_pass": writers[name].tally.made / writers[name].tally.passes if writers[name] else None} for name, f in found.items()}


def _reply(session) -> str:
    """What the text head writes; nothing where no try of it can be spoken."""
    try:
        return session.reply_text(1)
    except ValueError:
        return ""


def written() -> list[str]:
    """What is said in the written dialogues, normalised."""
    from text_tokenizer import normalise
    folder = Path(__file__).resolve().parent / "assets" / "dialogues"
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [normalise(turn["text"]) for line in lines for turn in line["turns"]]


def bench_speculative(args, codec) -> dict:
    """Speech with each draft, and text by lookup."""
    texts = [turns[i]["text"] for turns, i in pick_turns(args.data, args.split, args.sentences, args.seed)]
    return {"speech": say_all(args, texts, codec), "text": {f"temperature {t:g}": write_all(args, texts, t, codec) for t in (0.0, config.SamplingConfig.text_temperature)}}


# ----------------------------------------------------------------------------- quality

def bench_quality(args, codec) -> dict:
    """The same test turns said in float32 and in int8 with the same random numbers, after a turn of the same character: word error and voice, paired."""
    import judges as judge
    import quantisation
    from generation import Session
    from text_tokenizer import load_tokenizer
    from tqdm import tqdm
    models = {"fp32": build(TRAINED, args), "int8": build(TRAINED, args)}
    quantisation.quantise(models["int8"], "int8")
    tokenizer, rows = load_tokenizer(models["fp32"].cfg.tokenizer), []
    picked = pick_turns(args.data, args.split, args.turns, args.seed, same_speaker_before=True)
    for number, (turns, i) in enumerate(tqdm(picked, desc="quality", unit="turn")):
        target = turns[i]
        before = [t for t in turns[:i] if t["speaker"] == target["speaker"] and 1 <= t["duration"] <= 12][-1]
        voice, row = sound_of(args.data, before), {}
        own = judge.speaker_embedding(voice)
        for name, model in models.items():
            session = Session(model, codec, tokenizer, config.SamplingConfig(seed=args.seed + number))
            session.set_voice(0, audio=voice, text=before["text"])
            turn = session.say(0, target["text"])
            row[name] = hear(turn.audio, target["text"], mos=False, voice=own) | {"total_ms": turn.total_ms, "frames": turn.num_frames}
        rows.append(row)
    differences = [None if None in (r["int8"]["voice"], r["fp32"]["voice"]) else r["int8"]["voice"] - r["fp32"]["voice"] for r in rows]
    error = {name: judge.word_error_interval([r[name]["said"] for r in rows], [r[name]["heard"] for r in rows]) for name in models}
    pace = {name: sum(r[name]["total_ms"] for r in rows) / sum(r[name]["frames"] for r in rows) / (1000 / models["fp32"].cfg.frame_rate) for name in models}
    return {"turns": len(rows), "wer": error, "wer_difference": paired(rows, "int8", "fp32"), "voice_difference": judge.bootstrap_interval(differences),
            "voice": {name: judge.bootstrap_interval([r[name]["voice"] for r in rows]) for name in models}, "real_time_factor": pace}


# ----------------------------------------------------------------------------- the section

def bench_fast(args) -> tuple[dict, str]:
    """Milliseconds of a frame in every precision, compiled and speculative, beside its floor; what int8 does to the voice."""
    import checkpoint
    import runtime
    sizes = [s for s in args.sizes.split(",") if s]
    unknown = [s for s in sizes if s not in SIZES] + [v for v in args.variants.split(",") if v not in VARIANTS]
    if unknown or args.frames < 3 or "plain" not in args.variants.split(","):
        raise ValueError(f"--sizes {args.sizes} --variants {args.variants} --frames {args.frames}: sizes of {','.join(SIZES)}; plain and others of {','.join(VARIANTS)}; at least 3 frames")
    speed, codec = bandwidth(), checkpoint.load_codec(args.codec)
    shapes = [config.model_preset(size).backbone for size in sizes]
    attention = [copy.deepcopy(runtime.choose_attention("cpu", b.heads, b.kv_heads, b.head_dim)) for b in shapes]
    result = {"read_gb_per_s": speed / 1e9, "attention": dict(zip(sizes, attention)), "sizes": {size: time_size(size, args, speed) for size in sizes}}
    if TRAINED in sizes:
        result |= {"speculative": bench_speculative(args, codec), "quality": bench_quality(args, codec)}
    return result, fast_body(result)


def fast_body(result: dict) -> str:
    """The section's text from its numbers."""
    lines = [f"Memory is read at {result['read_gb_per_s']:.1f} GB/s. A floor is the time to read a frame's weights at that rate: with the depth decoder read at each of its steps, and read "
             "once (where it stays in a cache).", ""]
    for size, found in result["sizes"].items():
        lines += [f"**{size}**, {found['parameters'] / 1e6:,.0f} M parameters, {found['codebooks']} codebooks, {'shipped weights' if found['trained'] else 'random weights'}; "
                  + ("variants timed in turns" if found["interleaved"] else "variants timed one after another") + "; " + attention_line(result["attention"][size]), "",
                  table(["frame", "ms", "times faster", "processor ms", "depth decoder ms", "backbone ms", "real-time factor without codec", "MB of weights read", "floor ms", "greedy codes equal"],
                        [[LABELS[name], show(v["ms"]), show(v["times_faster"]), show(v["cpu_ms"]), show(v["depth_ms"]), show(v["backbone_ms"]), show(v["ms"] / 80), show(v["bytes"]["steps"] / 1e6, 0),
                          f"{v['floor_ms']['cached']:.2f} to {v['floor_ms']['steps']:.2f}", show(v["equal_codes"], 3, True)] for name, v in found["variants"].items()]), "", *drafts_line(found["variants"])]
    if "speculative" in result:
        lines += [speculative_body(result["speculative"]), "", quality_body(result["quality"])]
    return "\n".join(lines)


def drafts_line(variants: dict) -> list[str]:
    """How far the drafts went; random weights are sure of nothing, so that their greedy codes change with the smallest rounding."""
    tally = variants.get("speculative", {}).get("tally")
    return [f"Of the drafted codes {show(tally['acceptance'], 2, True)} were kept, with {tally['passes'] / tally['frames']:.2f} checks a frame.", ""] if tally else []


def attention_line(chosen: dict) -> str:
    each = ", ".join(f"{name} {show(ms['one_ms'], 3)} and {show(ms['prefill_ms'])} ms" for name, ms in chosen["ms"].items())
    return f"attention by measurement: {chosen['backend']} (one position and a prefill of {chosen['shape'][-1]}: {each})"


def speculative_body(found: dict) -> str:
    speech = [[name, kind, str(v["frames"]), show(v["ms_per_frame"]), show(v["acceptance"], 2, True), show(v["whole_frames"], 2, True)]
              for name, kinds in found["speech"].items() for kind, v in kinds.items()]
    text = [[heat, name, str(v["bytes"]), show(v["ms_per_byte"]), show(v["acceptance"], 2, True), show(v["bytes_per_pass"])] for heat, each in found["text"].items() for name, v in each.items()]
    return ("Speculative decoding of speech (nano; drafts of the depth decoder in int8, and of frames said before), sentences said for the first and for the second time:\n\n"
            + table(["drafts", "sentences", "frames", "ms per frame with codec", "codes kept", "frames kept whole"], speech)
            + "\n\nReplies of the text head, drafts looked up:\n\n" + table(["replies", "drafts", "bytes", "ms per byte", "bytes kept", "bytes per pass"], text))


def quality_body(q: dict) -> str:
    return (f"int8 against float32 on {q['turns']} test turns, same random numbers: word error {show(q['wer']['int8'], 2, True)} against {show(q['wer']['fp32'], 2, True)}, difference "
            f"{show(q['wer_difference'], 2, True)}; voice cosine {show(q['voice']['int8'], 3)} against {show(q['voice']['fp32'], 3)}, difference {show(q['voice_difference'], 4)}; "
            f"real-time factor with codec {show(q['real_time_factor']['int8'])} against {show(q['real_time_factor']['fp32'])}.")


def add_flags(part) -> None:
    part.add_argument("--sizes", default="nano,tiny", help=f"presets, of {','.join(SIZES)}; default nano,tiny")
    part.add_argument("--variants", default=",".join(VARIANTS), help="default all")
    part.add_argument("--frames", type=int, default=FRAMES, help=f"timed frames of each variant; default {FRAMES}")
    part.add_argument("--sentences", type=int, default=SENTENCES, help=f"sentences of the speculative part; default {SENTENCES}")
