"""benchmark.py latency: the race. Who is heard first, who keeps up, what it costs: our model, its variants, and the alternatives.

One run, one machine, the same texts. Every row is a racer (racers.py) in a process of its own, so that its peak memory is its own; the
rows of a heat take their items in turns, in an order that alternates, so that a slow moment of the machine hits all alike.

    speak    a text to sound: nano and its variants, two text-to-speech engines, the other token orders
    answer   the user's sound to the reply's sound: nano in three ways, the classic pipeline with either text-to-speech
    csm      frames alone, greedy: our model beside transformers' CSM, same geometry, same weights, the same codes
    sizes    tiny, blog, small with random weights
    long     turn 200 of a conversation beside turn 5 of another one

Each row stands beside its floor: the weights that one frame reads over the memory bandwidth measured here.
"""
from __future__ import annotations

import multiprocessing
import random
import time
from dataclasses import dataclass
from pathlib import Path

from measuring import percentiles, pick_turns, show, sound_of, summary, table

LONG_PAIRS = 10                  # turns of the old and of the young conversation that are compared
YOUNG = 4                        # turns that the young conversation has when it is compared
SHORT_WORDS = 8                  # words of a turn of the long conversation, at most
QUIET = 10 ** (-50 / 20)         # sound below this level is not heard
BANDWIDTH_MB = 256               # size of the matrix by which memory bandwidth is measured


VARIANTS = ("plain", "compiled", "int8", "int8 compiled", "speculative")      # of our model: racers.vary


@dataclass(frozen=True)
class Row:
    """One racer: its name in the tables, its heat, how it is built (racers.KINDS and the spec's fields), what it is asked."""
    name: str
    heat: str
    kind: str
    spec: dict
    ask: str = "speak"
    judged: bool = False         # what it says is transcribed


def our_rows(size: str, heat: str, judged: bool, spec: dict, variants=VARIANTS) -> list[Row]:
    return [Row(size if variant == "plain" else f"{size} {variant}", heat, "ours", spec | {"variant": variant}, judged=judged)
            for variant in variants]


def csm_rows(size: str, label: str) -> list[Row]:
    ours = [Row(f"{label}, ours" + ("" if variant == "plain" else f" {variant}"), "csm", "csm", {"size": size, "side": "ours", "variant": variant})
            for variant in VARIANTS if variant != "speculative"]
    return [*ours, Row(f"{label}, transformers", "csm", "csm", {"size": size, "side": "theirs"})]


ROWS = [
    *our_rows("nano", "speak", True, {}),
    Row("hibari alone", "speak", "mouth", {"tts": "hibari"}, judged=True), Row("Kokoro alone", "speak", "mouth", {"tts": "kokoro"}, judged=True),
    *(Row(f"order: {name}", "speak", "order", {"order": order, "size": "nano"}) for order, name in
      (("rq", "RQ-Transformer"), ("delay", "delay pattern"), ("valle", "VALL-E"), ("audiolm", "AudioLM"))),
    Row("nano, reply at hand", "answer", "ours", {"reply": "given"}, "answer", True),
    Row("nano int8 compiled, reply at hand", "answer", "ours", {"reply": "given", "variant": "int8 compiled"}, "answer", True), Row("nano, its own reply", "answer", "ours", {"reply": "head"}, "answer", True),
    Row("nano int8 compiled, its own reply", "answer", "ours", {"reply": "head", "variant": "int8 compiled"}, "answer", True),
    Row("nano, its ear and written replies", "answer", "ours", {"reply": "chosen"}, "answer", True),
    Row("nano int8 compiled, its ear and written replies", "answer", "ours", {"reply": "chosen", "variant": "int8 compiled"}, "answer", True),
    Row("nano, Whisper and written replies", "answer", "ours", {"reply": "written"}, "answer", True),
    Row("pipeline with hibari", "answer", "classic", {"tts": "hibari"}, "answer", True), Row("pipeline with Kokoro", "answer", "classic", {"tts": "kokoro"}, "answer", True),
    *csm_rows("csm-nano", "CSM 8x384 + 3x256"), *csm_rows("csm-tiny", "CSM 18x1024 + 4x512"),
    *our_rows("tiny", "sizes", False, {"size": "tiny"}), *our_rows("blog", "sizes", False, {"size": "blog"}), *our_rows("small", "sizes", False, {"size": "small"}, ("plain", "int8")),
    Row("nano, turn after turn", "long", "ours", {}, "paired"),
]
HEATS = {"speak": "from a text", "answer": "from the user's sound", "csm": "beside transformers' CSM", "sizes": "larger sizes, random weights", "long": "a long conversation"}
NOT_QUICK = ("tiny", "blog", "small", "CSM 18x1024", "Kokoro", "pipeline with Kokoro", "order: AudioLM")
LARGE = ("small",)               # few frames, few items, a row at a time
WARM = {"speak": 2, "answer": 2}         # untimed items of a heat, elsewhere one


# ----------------------------------------------------------------------------- processes

def serve(pipe, kind: str, spec: dict) -> None:
    """Body of a row's process: builds its racer, then answers (method, item) until None."""
    import os
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)                                           # llama.cpp and onnxruntime talk
    try:
        import racers
        racers.check(spec.get("variant", ""))                                  # before anything heavy is loaded
        import torch
        torch.set_num_threads(spec["threads"])
        memory = spec["tools"]["memory_mb"]
        libraries = memory(torch.device("cpu"), peak=False)
        racer = racers.KINDS[kind](spec)
        pipe.send(racer.about())
        while (asked := pipe.recv()) is not None:
            method, item = asked
            pipe.send({"peak_mb": memory(torch.device("cpu")), "libraries_mb": libraries} if method == "memory" else getattr(racer, method)(item))
    except Exception as error:             # anything that goes wrong there is told here, and the other rows go on
        pipe.send({"error": f"{' '.join(str(error).split())[:300] or type(error).__name__}"})


class Runner:
    """One row's process."""

    def __init__(self, row: Row, spec: dict):
        spawn = multiprocessing.get_context("spawn")
        self.row, (self.pipe, there) = row, spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(there, row.kind, spec | row.spec), daemon=True)
        self.process.start()
        there.close()
        self.about = self.answer()
        self.error = self.about.get("error")

    def answer(self) -> dict:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return {"error": "its process died; memory may have run out"}

    def ask(self, method: str, item=None) -> dict:
        """An item's answer; {} from a row that has failed, then and before."""
        if self.error:
            return {}
        try:
            self.pipe.send((method, item))
        except OSError:
            return {}
        found = self.answer()
        self.error = found.get("error")
        return {} if self.error else found

    def close(self) -> None:
        try:
            self.pipe.send(None)
        except OSError:
            pass
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def run_heat(rows: list[Row], spec: dict, items: list) -> dict[str, dict]:
    """Row name -> {about, answers (one per item), peak_mb, error}; the first items are asked once more before, untimed."""
    from tqdm import tqdm
    runners: list[Runner] = []
    heat = rows[0].heat
    try:
        for row in tqdm(rows, desc=f"{heat}: build", unit="row"):
            runners.append(Runner(row, spec))
        for item in items[:WARM.get(heat, 1)]:
            for runner in runners:
                if runner.row.ask != "paired":
                    runner.ask(runner.row.ask, item)
        answers = {row.name: [] for row in rows}
        for number, item in enumerate(tqdm(items, desc=heat, unit="item")):
            for runner in (runners if number % 2 == 0 else runners[::-1]):
                answers[runner.row.name].append(runner.ask(runner.row.ask, item) | {"number": number})
        return {r.row.name: {"about": r.about, "answers": [a for a in answers[r.row.name] if len(a) > 1], "error": r.error} | r.ask("memory") for r in runners}
    finally:
        for runner in runners:
            runner.close()


def memory_bandwidth(threads: int) -> float:
    """GB/s at which a matrix too large for the caches is read by a product with a vector: the best of eight."""
    import torch
    torch.set_num_threads(threads)
    rows = BANDWIDTH_MB * 10 ** 6 // 4 // 4096
    matrix, vector = torch.ones(rows, 4096), torch.ones(4096)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        matrix.mv(vector)
        best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best / 1e9


# ----------------------------------------------------------------------------- what is asked

def speak_items(args, count: int) -> list[dict]:
    """Test turns as texts to speak; `frames`: what their source took."""
    import math
    picked = pick_turns(args.data, args.split, count, args.seed, same_speaker_before=True)
    return [{"turns": turns[:i + 1], "index": i, "text": turns[i]["text"], "frames": math.ceil(turns[i]["duration"] * 12.5), "seed": args.seed + n} for n, (turns, i) in enumerate(picked)]


def answer_items(args, count: int) -> list[dict]:
    """The same with the turn before as the user's sound."""
    items = speak_items(args, count)
    for item in items:
        user = item["turns"][item["index"] - 1]
        item |= {"user": sound_of(args.data, user), "user_text": user["text"], "user_speaker": user["custom"]["speaker_index"]}
    return items


def long_items(args) -> list[dict]:
    """LONG_PAIRS turns to be said at both ages, after short texts of the test split."""
    count = min(LONG_PAIRS, max(2, args.long // 4))
    picked = pick_turns(args.data, args.split, 60, args.seed, same_speaker_before=True)
    texts = [t[i]["text"] for t, i in picked if len(t[i]["text"].split()) <= SHORT_WORDS] or [t[i]["text"] for t, i in picked]
    turns, index = picked[0]
    return [{"turns": turns[:index + 1], "index": index, "texts": texts, "text": texts[n % len(texts)], "old": args.long - count, "young": YOUNG, "seed": args.seed + n} for n in range(count)]


def wanted(args) -> list[Row]:
    """The rows of this run. ValueError where --rows names none."""
    words = [w.strip().lower() for w in args.rows.split(",") if w.strip()]
    rows = [r for r in ROWS if not words or any(r.name.lower().startswith(w) or r.heat == w for w in words)]
    if not rows:
        raise ValueError(f"--rows {args.rows}: no row begins so; use heats ({', '.join(HEATS)}) or names such as {ROWS[0].name!r}, {ROWS[-3].name!r}")
    return rows if words or not args.quick else [r for r in rows if not r.name.startswith(NOT_QUICK)]


# ----------------------------------------------------------------------------- numbers of a row

def audible_ms(answer: dict, rate: int = 24000) -> float | None:
    """When something is heard: the first chunk, and the quiet before its first sound."""
    import numpy as np
    loud = np.flatnonzero(np.abs(answer["audio"]) > QUIET) if answer["first_ms"] is not None else []
    return answer["first_ms"] + 1000 * loud[0] / rate if len(loud) else None


def heard(answers: list[dict]) -> dict | None:
    """Word error of what was said, by Whisper."""
    from measuring import hear
    rows = [hear(a["audio"], a["text"], mos=False) for a in answers if a["text"]]
    return summary(rows) if rows else None


def after(answer: dict) -> float:
    """From where the real-time factor counts: an answer's first sound, since what comes before is no speech yet."""
    return answer["first_ms"] if "stages" in answer else 0.0


def row_result(row: Row, found: dict, bandwidth: float, frame_ms: float, judge: bool) -> dict:
    """The numbers of one row; what was not measured is null."""
    about, answers = found["about"], [a for a in found["answers"] if a.get("first_ms") is not None]
    out = {"heat": row.heat, "weights": about.get("weights"), "parameters": about.get("parameters"), "note": about.get("note") or None, "error": found["error"],
           "n": len(answers), "peak_mb": found.get("peak_mb"), "libraries_mb": found.get("libraries_mb")}
    if not answers:
        return out
    seconds = [len(a["audio"]) / 24000 for a in answers]
    out |= {"first_sound_ms": percentiles([a["first_ms"] for a in answers]), "audible_ms": percentiles([audible_ms(a) for a in answers]), "total_ms": percentiles([a["total_ms"] for a in answers]),
            "real_time_factor": percentiles([(a["total_ms"] - after(a)) / 1000 / s for a, s in zip(answers, seconds) if s > 0]), "seconds_of_sound": sum(seconds)}
    if answers[0]["frames"] and row.ask == "speak":
        frames = sum(a["frames"] for a in answers)
        own = [a["ms_per_frame"] for a in answers if "ms_per_frame" in a]
        out |= {"frames": frames, "ms_per_frame": percentiles(own)["p50"] if own else sum(a["total_ms"] for a in answers) / frames, "without_codec": bool(own),
                "cpu_ms_per_frame": percentiles([a["cpu_ms_per_frame"] for a in answers])["p50"] if own else sum(a["cpu_ms"] for a in answers) / frames}
    if about.get("bytes") and row.ask == "speak":
        mb = {k: v for k, v in about["bytes"].items() if v is not None}
        less = mb.get("codec", 0.0) if out.get("without_codec") else 0.0
        out |= {"mb_per_frame": mb, "floor_ms": {k: (mb[k] - less) / 1000 / bandwidth * 1000 for k in ("once", "every_read")}}
    if "stages" in answers[0]:
        out["stages_ms"] = {k: percentiles([a["stages"].get(k) for a in answers]) for k in answers[0]["stages"]}
        out["heard_real_time_factor"] = percentiles([a["heard_real_time_factor"] for a in answers])["p50"]
    out["wer"] = heard(answers)["wer"] if judge and row.judged else None
    return out


def same_codes(found: dict, ours: str, theirs: str) -> dict | None:
    """How many frames of both sides are equal, over the items that both have: {frames, equal}."""
    a, b = (found.get(name, {}).get("answers") or [] for name in (ours, theirs))
    if not a or not b:
        return None
    theirs_by = {x["number"]: x["codes"] for x in b}
    pairs = [(x["codes"], theirs_by[x["number"]]) for x in a if x["number"] in theirs_by]
    return {"frames": sum(max(len(x), len(y)) for x, y in pairs), "equal": sum(p == q for x, y in pairs for p, q in zip(x, y))}


def csm_result(found: dict) -> dict:
    """Per geometry and variant of ours: times faster per frame than transformers, over the pairs of items, and equal codes."""
    import statistics
    out = {}
    for name in found:
        if ", ours" not in name:
            continue
        theirs = name.split(", ours")[0] + ", transformers"
        a, b = found[name]["answers"], {x["number"]: x for x in (found.get(theirs) or {}).get("answers", ())}
        pairs = [(x, b[x["number"]]) for x in a if x["number"] in b]
        ratios = [y["ms_per_frame"] / x["ms_per_frame"] for x, y in pairs]
        if pairs:
            cpu = sum(y["cpu_ms_per_frame"] for _, y in pairs) / sum(x["cpu_ms_per_frame"] for x, _ in pairs)
            out[name] = {"faster": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "pairs": len(pairs), "faster_by_cpu_time": cpu, "codes": same_codes(found, name, theirs)}
    return out


def long_result(found: dict) -> dict | None:
    """Cost of a turn per frame and first sound, old over young, over the pairs of turns."""
    pairs = next((f["answers"] for f in found.values()), [])
    pairs = [p for p in pairs if p["old"]["frames"] and p["young"]["frames"]]
    if not pairs:
        return None
    cost = {which: sum(p[which]["cost_ms"] for p in pairs) / sum(p[which]["frames"] for p in pairs) for which in ("old", "young")}
    first = {which: percentiles([p[which]["first_ms"] for p in pairs])["p50"] for which in ("old", "young")}
    return {"pairs": len(pairs), "turns": {which: [min(p[which]["turn"] for p in pairs), max(p[which]["turn"] for p in pairs)] for which in ("old", "young")},
            "cost_ms_per_frame": cost, "first_sound_ms": first, "cost_ratio": cost["old"] / cost["young"], "first_sound_ratio": first["old"] / first["young"],
            "positions": {which: percentiles([float(p[which]["positions"]) for p in pairs])["p50"] for which in ("old", "young")}}


# ----------------------------------------------------------------------------- bars

def bars(rows: dict, csm: dict, long: dict | None) -> list[dict]:
    """What this project asks of its speed: {what, bar, value, met}; value and met are None where it was not measured."""
    found = []

    def bar(what: str, limit: float, value, kind: str = "under", also: bool = True) -> None:
        reach = {"under": lambda: value < limit, "at least": lambda: value >= limit, "at most": lambda: value <= limit}
        found.append({"what": what, "bar": f"{kind} {limit:g}", "value": value, "met": None if value is None else bool(reach[kind]() and also)})

    def value(name: str, *keys: str):
        got = rows.get(name) or {}
        for key in keys:
            got = (got or {}).get(key)
        return got
    best = min((name for name in rows if name.split(" ")[0] == "nano" and "," not in name and value(name, "real_time_factor")), default="nano",
               key=lambda name: value(name, "real_time_factor", "p50"))
    for name in dict.fromkeys(("nano", best)):
        bar(f"{name}: first sound after the text, ms, 95 % of turns", 120, value(name, "first_sound_ms", "p95"))
        bar(f"{name}: real-time factor, median", 0.3, value(name, "real_time_factor", "p50"))
    hands = ("nano, reply at hand", "nano int8 compiled, reply at hand", "nano, its ear and written replies", "nano int8 compiled, its ear and written replies", "nano, its own reply",
             "nano int8 compiled, its own reply")
    for name in hands:
        bar(f"{name}: first sound after the user's turn, ms, 95 % of turns", 180, value(name, "first_sound_ms", "p95"))
    for label, times in (("CSM 8x384 + 3x256", 10), ("CSM 18x1024 + 4x512", 4)):
        for name in [n for n in csm if n.startswith(label)] or [f"{label}, ours"]:
            got, exact = csm.get(name), "int8" not in name
            same = bool(got and got["codes"] and got["codes"]["equal"] == got["codes"]["frames"])
            bar(f"{name}: times faster per frame than transformers{', greedy codes equal' if exact else ' (other numbers, so other codes)'}", times, got and got["faster"], "at least", same or not exact)
    for name in ("tiny int8", "tiny int8 compiled"):
        bar(f"{name}: real-time factor, median", 1, value(name, "real_time_factor", "p50"))
    bar("long conversation: cost of a frame, old over young", 1.1, long and long["cost_ratio"], "at most")
    pipelines = [value(n, "first_sound_ms", "p50") for n in ("pipeline with hibari", "pipeline with Kokoro")]
    quickest = min((p for p in pipelines if p), default=None)
    for name in hands:
        own = value(name, "first_sound_ms", "p50")
        bar(f"{name}: first sound sooner than the quicker pipeline's, times", 4, quickest / own if own and quickest else None, "at least")
    return found


# ----------------------------------------------------------------------------- text and pictures

def heat_table(heat: str, rows: dict) -> str:
    names = [n for n, r in rows.items() if r["heat"] == heat and r.get("first_sound_ms")]
    if not names:
        return ""
    head = ["", "first sound, ms", "95 %", "heard after, ms", "in all, ms", "real-time factor", "ms per frame", "floor, ms", "peak MB", "word error", "weights"]
    lines = []
    for name in names:
        r = rows[name]
        floor = r.get("floor_ms")
        lines.append([name, show(r["first_sound_ms"]["p50"], 0), show(r["first_sound_ms"]["p95"], 0), show(r["audible_ms"]["p50"], 0), show(r["total_ms"]["p50"], 0),
                      show(r["real_time_factor"]["p50"]), show(r.get("ms_per_frame"), 1), f"{show(floor['once'], 1)} to {show(floor['every_read'], 1)}" if floor else "-",
                      show(r["peak_mb"], 0), show(r["wer"], 2, True), r["weights"]])
    return f"**{HEATS[heat].capitalize()}**\n\n" + table(head, lines)


def stages_text(rows: dict) -> str:
    lines = []
    for name, r in rows.items():
        if r.get("stages_ms"):
            lines.append([name, ", ".join(f"{stage} {show(p['p50'], 0)}" for stage, p in r["stages_ms"].items()), show(r["heard_real_time_factor"], 3)])
    return "" if not lines else "Milliseconds from the end of the user's turn to the end of each stage (median), and the share of real time that hearing took while the user spoke:\n\n" + table(["", "stages", "hearing"], lines)


def csm_text(csm: dict) -> str:
    if not csm:
        return ""
    lines = [[name, f"{show(c['faster'], 1)} ({show(c['lowest'], 1)} to {show(c['highest'], 1)}, {c['pairs']} pairs)", show(c["faster_by_cpu_time"], 1), f"{c['codes']['equal']} of {c['codes']['frames']}"] for name, c in csm.items()]
    return "Codec left out on both sides; the same weights, text and number of frames:\n\n" + table(["", "times faster per frame than transformers", "by CPU time", "equal frames"], lines)


def latency_body(result: dict) -> str:
    rows, said = result["rows"], {True: "met", False: "**missed**", None: "-"}
    parts = [heat_table(heat, rows) for heat in ("speak", "answer")]
    parts += [stages_text(rows), heat_table("csm", rows), csm_text(result["csm"]), heat_table("sizes", rows)]
    long = result["long"]
    if long:
        parts.append(f"**A long conversation**\n\nTurns {long['turns']['old'][0]} to {long['turns']['old'][1]} of one beside turns {long['turns']['young'][0]} to {long['turns']['young'][1]} of another, the same {long['pairs']} texts "
                     f"in turns: {show(long['cost_ms_per_frame']['old'], 1)} and {show(long['cost_ms_per_frame']['young'], 1)} ms per frame with the refilling of the window ({show(long['cost_ratio'])} times), first sound "
                     f"{show(long['first_sound_ms']['old'], 0)} and {show(long['first_sound_ms']['young'], 0)} ms; {show(long['positions']['old'], 0)} and {show(long['positions']['young'], 0)} positions in the window.")
    out = [f"{name}: {r['error']}" for name, r in rows.items() if r["error"]]
    parts += [f"Left out. {'; '.join(out)}." if out else "", how_measured(result)]
    parts.append(table(["bar", "", "measured", ""], [[b["what"], b["bar"], show(b["value"], 2), said[b["met"]]] for b in result["bars"]]))
    return "\n\n".join(p for p in parts if p)


def how_measured(result: dict) -> str:
    return (f"{result['threads']} thread{'s' * (result['threads'] != 1)} for every row; rows of a heat in turns, each in its own process (peak with its libraries). First sound: the first chunk there is to play; heard after: that and the "
            f"quiet before its first sound. The user's turn is over when its last sound has arrived: whatever decides that waits alike for all rows. \"Reply at hand\" means that its text lies ready then, as for Sesame's CSM; "
            f"\"its own reply\": the model writes down what it heard and answers, each sentence spoken as soon as it is written; while the user speaks it rehearses both in the time that is left between two blocks of 80 ms, and work that is not done by the next block counts as delay. \"Its ear and written replies\": it writes down what it heard by its ear, and the reply is chosen from the written dialogues, as demo.py does by default. Floor: weights of a frame, each once to every time it is multiplied (depth decoder: once per codebook), "
            f"over {show(result['bandwidth_gb_s'], 1)} GB/s measured here; caches can beat the second. The real-time factor of an answer counts from its first sound. The orders and sizes with random weights say nothing about quality; the orders stand without voices heard before. A pipeline's text is its language model's own, so its total is of another length.")


def write_pictures(result: dict, folder: Path) -> list[str]:
    """first_sound.png and frame.png; none where matplotlib or the rows are missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder.mkdir(parents=True, exist_ok=True)
    rows, made = result["rows"], []
    shown = [(n, r["first_sound_ms"]) for n, r in rows.items() if r.get("first_sound_ms")]
    if shown:
        figure, axis, at = empty_chart(plt, [n for n, _ in shown], "first sound, ms (dot: median; bar to 95 % of turns)")
        axis.hlines(at, [p["p50"] for _, p in shown], [p["p95"] for _, p in shown], color="#2b6cb0", linewidth=2)
        axis.plot([p["p50"] for _, p in shown], at, "o", color="#2b6cb0")
        made.append(finished(figure, folder / "first_sound.png"))
    shown = [(n, r["ms_per_frame"], r["floor_ms"]) for n, r in rows.items() if r.get("floor_ms") and r.get("ms_per_frame")]
    if shown:
        figure, axis, at = empty_chart(plt, [n for n, *_ in shown], "ms per frame of 80 ms (dot: measured; bar: floor, weights read once to every time)")
        axis.hlines(at, [floor["once"] for *_, floor in shown], [floor["every_read"] for *_, floor in shown], color="#c05621", linewidth=4)
        axis.plot([ms for _, ms, _ in shown], at, "o", color="#2b6cb0")
        axis.axvline(80, color="black", linewidth=0.8, linestyle=":")
        made.append(finished(figure, folder / "frame.png"))
    return made


def empty_chart(plt, names: list[str], label: str):
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(names) + 1.2))
    axis.set(yticks=list(range(len(names))), yticklabels=names, xscale="log", xlabel=label)
    axis.grid(axis="both", which="both", linewidth=0.3)
    axis.invert_yaxis()
    return figure, axis, list(range(len(names)))


def finished(figure, path: Path) -> str:
    import matplotlib.pyplot as plt
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.as_posix()


# ----------------------------------------------------------------------------- the bench

def heats_of(args, rows: list[Row]) -> list[tuple[list[Row], list, dict]]:
    """(rows, items, further spec) in the order in which they are run; large models by themselves, one size at a time."""
    few, plan = max(2, args.turns // 4), []

    def add(part: list[Row], items, **spec) -> None:
        if part:
            plan.append((part, items(), spec))
    by = {heat: [r for r in rows if r.heat == heat] for heat in HEATS}
    add(by["speak"], lambda: speak_items(args, args.turns))
    add(by["answer"], lambda: answer_items(args, args.turns))
    for size in dict.fromkeys(r.spec["size"] for r in by["csm"]):
        add([r for r in by["csm"] if r.spec["size"] == size], lambda: speak_items(args, few), frames=max(2, args.frames // 2) if size == "csm-tiny" else args.frames)
    for size in dict.fromkeys(r.spec["size"] for r in by["sizes"]):
        part = [r for r in by["sizes"] if r.spec["size"] == size]
        if size in LARGE:                  # each alone: several would not fit into memory
            for row in part:
                add([row], lambda: speak_items(args, 2), frames=max(2, args.frames // 6))
        else:
            add(part, lambda: speak_items(args, few), frames=args.frames)
    add(by["long"], lambda: long_items(args))
    return plan


def bench_latency(args, tools: dict) -> tuple[dict, str]:
    """The race: first sound, real-time factor, memory and word error of our model, transformers' CSM, the classic pipeline, other token orders."""
    import checkpoint
    import runtime
    import torch
    if args.frames < 2 or args.long < 8:
        raise ValueError(f"--frames {args.frames}, --long {args.long}: use at least 2 and 8")
    if args.quick:
        args.turns, args.frames, args.long = min(args.turns, 4), min(args.frames, 10), min(args.long, 24)
    rows = wanted(args)
    threads = args.threads or runtime.cpu_count()
    torch.set_num_threads(threads)
    path = args.checkpoint or str(checkpoint.default_checkpoint())
    spec = {"codec": args.codec, "checkpoint": path, "data": args.data, "seed": args.seed, "threads": threads, "tools": tools, "frames": args.frames}
    bandwidth, found = memory_bandwidth(threads), {}
    random.seed(args.seed)
    for part, items, more in heats_of(args, rows):
        found |= run_heat(part, spec | more, items)
    bandwidth = max(bandwidth, memory_bandwidth(threads))
    results = {r.name: row_result(r, found[r.name], bandwidth, 80.0, not args.no_judge) for r in rows if r.ask != "paired"}
    csm = csm_result({n: f for n, f in found.items() if n in results and results[n]["heat"] == "csm"})
    long = long_result({r.name: found[r.name] for r in rows if r.ask == "paired"})
    result = {"rows": results, "csm": csm, "long": long, "bars": bars(results, csm, long), "bandwidth_gb_s": bandwidth, "threads": threads, "turns": args.turns, "frames": args.frames,
              "load_average": runtime_load(), "weights": tools["weights_name"](checkpoint.find(path)), "device": "cpu"}
    result["pictures"] = write_pictures(result, Path(args.save))
    return result, latency_body(result)


def runtime_load() -> float | None:
    """Processes that wanted the machine in the last five minutes: more than `threads` and others were at work."""
    import os
    return os.getloadavg()[1] if hasattr(os, "getloadavg") else None


def add_flags(part) -> None:
    """Flags of benchmark.py latency beside those that benches share."""
    part.add_argument("--rows", default="", help=f"rows or heats with commas between, by the beginning of their names; heats: {', '.join(HEATS)}; default all")
    part.add_argument("--quick", action="store_true", help="few turns and frames, without the slow rows: minutes")
    part.add_argument("--frames", type=int, default=25, help="frames of the rows with random weights; default 25")
    part.add_argument("--long", type=int, default=200, help="turns of the long conversation; default 200")
    part.add_argument("--no_judge", action="store_true", help="no word error")
    part.add_argument("--save", default="outputs/benchmark/latency", help="folder for what was drawn; default outputs/benchmark/latency")
