"""One self-contained HTML page about a run: listen, look, and compare what was said with what an independent ASR heard.

    python report.py                             # outputs/report.html from outputs/demo, checkpoints, outputs/steps
    python report.py --output page.html --demo talks

Sound (MP3), pictures and numbers are inside the page; it needs no network and no other file. Parts of the
run that are missing are said to be missing. All numbers are written to a .json beside the page as well.
"""
from __future__ import annotations

import base64
import html
import io
import json
import math
import struct
import zlib
from pathlib import Path

import config

SPECTRUM_TOP = 8000.0                      # Hz, upper edge of the spectrograms
PITCH_RANGE = (60.0, 500.0)                # Hz, the overlay's own logarithmic scale
RAMP = ("0f1022", "2a1f5c", "6b2a7f", "b43a78", "ee6a5f", "fbb26a", "fdf0b8")   # quiet to loud
SAMPLED_STEPS = 5                          # of each line said during training, on the page
STEPS = ("setup", "collect", "tokenise", "train", "demo", "report")
TERMS = {"c0": "first codebook", "depth": "other codebooks", "text": "text", "advance": "reading pace", "phones": "letters to phones"}


# ----------------------------------------------------------------------------- small pieces of HTML

def esc(text) -> str:
    return html.escape(str(text), quote=True)


def number(value, digits: int = 2, unit: str = "", scale: float = 1.0) -> str:
    """A measured number, or a dash where there is none."""
    return "&ndash;" if value is None else f"{value * scale:,.{digits}f}{unit}"


def seconds_text(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"


def not_yet(what: str, command: str) -> str:
    return f'<p class="missing"><b>Not yet.</b> {what} <code>{esc(command)}</code></p>'


def section(name: str, title: str, lead: str, body: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2><p class="lead">{lead}</p>{body}</section>'


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead><tbody>{cells}</tbody></table></div>'


# ----------------------------------------------------------------------------- pictures

def png(pixels, palette: bytes) -> bytes:
    """Indexed picture (H, W) uint8 -> PNG bytes; palette: 256 x RGB."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
            + chunk(b"PLTE", palette) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def _palette() -> bytes:
    import numpy as np
    stops = np.array([[int(c[i:i + 2], 16) for i in (0, 2, 4)] for c in RAMP], dtype=float)          # (stops, 3)
    at = np.linspace(0, 255, len(RAMP))
    return np.stack([np.interp(np.arange(256), at, stops[:, i]) for i in range(3)], 1).round().astype(np.uint8).tobytes()


def spectrogram_png(audio, rate: int, width: int = 640, height: int = 120) -> bytes:
    """Audio (N,) -> PNG of its spectrogram, 0..8 kHz on the mel scale, 70 dB of range."""
    import numpy as np
    window = 1024
    centres = np.linspace(0, len(audio) - 1, width).astype(int)
    padded = np.pad(audio, (window // 2, window))
    frames = padded[centres[:, None] + np.arange(window)] * np.hanning(window)                        # (width, window)
    decibel = 10 * np.log10(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)                                  # (width, bins)
    top = 2595 * np.log10(1 + SPECTRUM_TOP / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, height) / 2595) - 1)
    bins = np.clip(hertz / rate * window, 0, decibel.shape[1] - 1)
    low = np.floor(bins).astype(int)
    high = np.minimum(low + 1, decibel.shape[1] - 1)
    picture = decibel[:, low] * (1 - bins + low) + decibel[:, high] * (bins - low)                    # (width, height)
    shade = np.clip((picture - picture.max() + 70) / 70, 0, 1)
    return png(np.ascontiguousarray((shade.T[::-1] * 255).astype(np.uint8)), _palette())


def pitch_svg(audio, rate: int) -> str:
    """Pitch as an SVG overlay, stretched over the spectrogram; "" where there is none to see."""
    import numpy as np
    import judges as judge
    if judge.unjudgeable(audio, rate):
        return ""
    times, f0 = judge.pitch_track(audio, rate)
    low, high = (math.log(f) for f in PITCH_RANGE)
    x = 1000 * times / (len(audio) / rate)
    y = 100 - 100 * (np.log(np.maximum(f0, 1.0)) - low) / (high - low)
    runs = np.split(np.arange(len(f0)), np.flatnonzero(np.diff((f0 > 0).astype(int))) + 1)
    lines = "".join(f'<path d="M{" L".join(f"{x[i]:.1f} {y[i]:.1f}" for i in run[::2])}"/>' for run in runs if f0[run[0]] > 0 and len(run) > 4)
    return f'<svg class="pitch" viewBox="0 0 1000 100" preserveAspectRatio="none" aria-hidden="true"><g class="halo">{lines}</g><g>{lines}</g></svg>'


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    raw = (high - low) / count or 1.0
    step = min((m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(points: list[tuple], share: float = 0.04) -> list[tuple]:
    """Running mean over a share of the points, for curves of many steps."""
    half = int(len(points) * share / 2)
    windows = [points[max(0, i - half):i + half + 1] for i in range(len(points))]
    return [(points[i][0], sum(y for _, y in w) / len(w)) for i, w in enumerate(windows)]


def line_chart(series: dict[str, list[tuple]], width: int = 720, height: int = 260, title: str = "") -> str:
    """SVG of {name: [(step, value), ...]}: raw points faint, smoothed line strong, last value written at its end."""
    xs, ys = zip(*(p for points in series.values() for p in points))
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(ys), max(ys)
    pad = 0.06 * (y1 - y0) or 0.5
    y0, y1 = max(0.0, y0 - pad) if min(ys) >= 0 else y0 - pad, y1 + pad
    left, right, top, bottom = 44, 58, 14, 26

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (width - left - right), top + (y1 - y) / (y1 - y0) * (height - top - bottom)
    parts, ends = [], []
    for y in _ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at(x0, y)[1]:.1f}" y2="{at(x0, y)[1]:.1f}"/>'
                     f'<text class="tick" x="{left - 8}" y="{at(x0, y)[1] + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(x0, x1, 5):
        parts.append(f'<text class="tick" x="{at(x, y0)[0]:.1f}" y="{height - 6}" text-anchor="middle">{x:,.0f}</text>')
    for i, points in enumerate(series.values()):
        def path(p):
            return "M" + " L".join("{:.1f} {:.1f}".format(*at(*q)) for q in p)
        raw = f'<path class="raw s{i}" d="{path(points)}"/>' if len(points) > 30 else ""
        dots = "".join('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>'.format(i, *at(*p)) for p in points) if len(points) <= 15 else ""
        line = smooth(points) if len(points) > 30 else points
        ends.append((at(*line[-1])[1] + 4, at(*line[-1])[0] + 8, i, line[-1][1]))
        parts.append(f'{raw}<path class="line s{i}" d="{path(line)}"/>{dots}')
    lowest = math.inf
    for y, x, i, value in sorted(ends, reverse=True):                         # from the bottom up, so that labels do not overlap
        lowest = min(y, lowest - 13)
        parts.append(f'<text class="end s{i}" x="{x:.1f}" y="{lowest:.1f}">{value:.2f}</text>')
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{esc(title)}">{"".join(parts)}</svg>'


# ----------------------------------------------------------------------------- what was measured

def read_json(path: Path):
    """The parsed file, or None where it does not exist. ValueError where it is malformed."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): run the step that writes it again") from None


def read_steps(folder: Path) -> list[dict]:
    """Finished steps of run_experiment.py in their order."""
    found = [s for s in map(read_json, sorted(folder.glob("*.json"))) if isinstance(s, dict) and s.get("state") in (None, "done")]
    return sorted(found, key=lambda s: STEPS.index(s["name"]) if s.get("name") in STEPS else len(STEPS))


def judge_turn(turn: dict, folder: Path, judging: bool, asr: str) -> dict:
    """A turn of results.json with its sound, real-time factor, and what the judges say."""
    import audio_io
    import judges as judge
    turn = dict(turn)
    path = folder / turn["audio"] if turn.get("audio") else None
    turn["sound"] = audio_io.read_audio(path) if path and path.is_file() else None
    turn["path"] = path
    spoken = turn.get("duration_s")
    turn["real_time_factor"] = turn["total_ms"] / 1000 / spoken if turn.get("total_ms") is not None and spoken else None
    if turn["sound"] is not None and judging:
        turn |= judge.judge_speech(turn["sound"], turn.get("text"), audio_io.SAMPLE_RATE, asr)
        turn["voice"] = judge.speaker_embedding(turn["sound"], audio_io.SAMPLE_RATE)
    return turn


def judge_demo(folder: Path, judging: bool = True, asr: str = "tiny.en") -> dict | None:
    """results.json of demo.py with every turn judged; None where there is none."""
    from tqdm import tqdm
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give --demo the folder that demo.py wrote")
    results = read_json(folder / "results.json")
    if results is None:
        return None
    if not isinstance(results.get("conversations"), list):
        raise ValueError(f"{folder / 'results.json'} has no list \"conversations\": run python demo.py --mode test --output {folder}")
    with tqdm(total=sum(len(c["turns"]) for c in results["conversations"]), desc="judging", unit="turn") as bar:
        for conversation in results["conversations"]:
            turns = []
            for turn in conversation["turns"]:
                turns.append(judge_turn(turn, folder, judging, asr))
                bar.update()
            conversation["turns"] = turns
    return results


def voice_table(turns: list[dict]) -> list[list[float | None]]:
    """Cosine between the voices of all turns."""
    import judges as judge
    return [[judge.speaker_similarity(a.get("voice"), b.get("voice")) for b in turns] for a in turns]


def voice_means(conversations: list[dict]) -> tuple[float | None, float | None]:
    """Mean voice cosine between turns of one character, and between characters of one conversation."""
    same, other = [], []
    for conversation in conversations:
        turns = conversation["turns"]
        cosine = voice_table(turns)
        for i in range(len(turns)):
            for j in range(i):
                if cosine[i][j] is not None:
                    (same if turns[i]["speaker"] == turns[j]["speaker"] else other).append(cosine[i][j])
    return tuple(sum(v) / len(v) if v else None for v in (same, other))


def summarise(results: dict | None) -> dict:
    """The numbers of the head of the page; None where not measured."""
    import judges as judge
    import numpy as np
    if results is None:
        return {}
    turns = [t for c in results["conversations"] for t in c["turns"]]
    made = [t for t in turns if t.get("total_ms") is not None]
    read = [t for t in made if t.get("text") and t.get("heard") is not None]
    said, heard = [t["text"] for t in read], [t["heard"] for t in read]
    same, other = voice_means(results["conversations"])

    def middle(key, values=made):
        found = [t[key] for t in values if t.get(key) is not None]
        return float(np.median(found)) if found else None
    return {"turns": len(turns), "generated": len(made), "wer": judge.word_error_rate(said, heard) if read else None,
            "wer_interval": judge.word_error_interval(said, heard) if read else None, "first_audio_ms": middle("first_audio_ms"),
            "real_time_factor": middle("real_time_factor"), "mos": judge.bootstrap_interval([t.get("mos") for t in made]),
            "ended": sum(bool(t.get("ended")) for t in made), "same_voice": same, "other_voice": other}


def metric_series(rows: list[dict]) -> tuple[dict, dict]:
    """Lines of metrics.jsonl -> ({"training"|"validation": points} of the total loss, {term: {split: points}})."""
    total, terms = {}, {}
    for row in rows:
        for key, value in row.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or "step" not in row:
                continue
            words = key.lower().replace("/", "_").replace(".", "_").split("_")
            split = "validation" if any(w.startswith("val") or w == "eval" for w in words) else "training"
            name = [w for w in words if w not in ("train", "training", "val", "valid", "validation", "eval", "loss")]
            if "loss" in words and name in ([], ["total"]):
                total.setdefault(split, []).append((row["step"], value))
            elif len(name) == 1 and name[0] in TERMS:
                terms.setdefault(name[0], {}).setdefault(split, []).append((row["step"], value))
    def ordered(parts):
        return {split: parts[split] for split in ("training", "validation") if split in parts}
    return ordered(total), {name: ordered(parts) for name, parts in terms.items()}


# ----------------------------------------------------------------------------- sections of the page

def mp3(audio, rate: int) -> str:
    """Sound as a data address; MP3 plays in every browser."""
    import numpy as np
    import soundfile
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio, -1, 1), rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.2)
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def player(audio, rate: int, height: int = 120, label: str = "", width: int = 640) -> str:
    """Play button over a spectrogram that is also the time line; plain browser controls without scripts."""
    if audio is None or not len(audio):
        return '<p class="missing">No sound was written for this turn.</p>'
    picture = base64.b64encode(spectrogram_png(audio, rate, width, height)).decode()
    return (f'<div class="player"><button type="button" class="play" aria-label="Play {esc(label)}"><svg viewBox="0 0 24 24"><path class="go" d="M8 5v14l11-7z"/>'
            f'<path class="halt" d="M7 5h4v14H7zM13 5h4v14h-4z"/></svg></button><div class="picture" style="height:{height}px">'
            f'<img alt="Spectrogram of {esc(label)}" src="data:image/png;base64,{picture}">{pitch_svg(audio, rate)}<i class="head"></i>'
            f'<span class="clock">{len(audio) / rate:.1f} s</span></div><audio controls preload="none" src="{mp3(audio, rate)}"></audio></div>')


def heard_html(said: str | None, heard: str | None) -> str:
    """What the ASR heard, with every difference marked."""
    import judges as judge
    if heard is None:
        return ""
    if not said:
        return f'<p class="heard"><b>Heard</b> {esc(heard) or "<i>nothing</i>"}</p>'
    path = judge.align_words(judge.normalise_words(said), judge.heard_words(said, heard))
    if all(op == "equal" for op, _, _ in path):
        return '<p class="heard all"><b>Heard</b> every word</p>'
    marked = []
    for op, wanted, got in path:
        lost = f"<del>{esc(' '.join(wanted))}</del>" if wanted and op != "equal" else ""
        new = f"<ins>{esc(' '.join(got))}</ins>" if got and op != "equal" else ""
        marked.append(esc(" ".join(got)) if op == "equal" else lost + ("&#8201;" if lost and new else "") + new)
    return f'<p class="heard"><b>Heard</b> {" ".join(marked)}</p>'


def facts(turn: dict) -> str:
    """The numbers of one turn as a line of small labels."""
    if turn.get("total_ms") is None:
        return '<ul class="facts"><li>given, not generated</li></ul>'
    pitch = (turn.get("pitch") or {}).get("median_hz")
    items = [("first sound", turn.get("first_audio_ms"), "{:.0f} ms"), ("real time", turn.get("real_time_factor"), "&times; {:.2f}"),
             ("word error", turn.get("wer") or None, "{:.0%}"), ("DistillMOS", turn.get("mos"), "{:.1f}"), ("pitch", pitch, "{:.0f} Hz")]
    out = "".join(f"<li>{name} <b>{form.format(value)}</b></li>" for name, value, form in items if value is not None)
    if turn.get("ended") is False:
        out += f'<li class="bad">did not end by itself ({esc(turn.get("end_reason") or "cut off")})</li>'
    if turn.get("reason"):
        out += f'<li class="bad">{esc(turn["reason"])}</li>'
    return f'<ul class="facts">{out}</ul>'


def mood_chip(turn: dict) -> str:
    return f'<span class="mood">{esc(turn["mood"])}</span>' if turn.get("mood") else ""


def single_card(conversation: dict, rate: int) -> str:
    turn = conversation["turns"][0]
    title = esc(str(conversation["id"]).replace("_", " ").replace("-", " ").capitalize())
    return (f'<article class="card"><header><h3>{title}</h3>{mood_chip(turn)}</header><p class="said">{esc(turn.get("text") or "")}</p>'
            f'{player(turn["sound"], rate, label=title)}{heard_html(turn.get("text"), turn.get("heard"))}{facts(turn)}</article>')


def chat(conversation: dict, folder: Path, rate: int) -> str:
    """A conversation as a column of bubbles, one side per character."""
    import audio_io
    names = list(dict.fromkeys(t["speaker"] for t in conversation["turns"]))
    whole = folder / conversation["audio"] if conversation.get("audio") else None
    mix = player(audio_io.read_audio(whole), rate, 84, "the whole conversation", 1000) if whole and whole.is_file() else ""
    bubbles = []
    for i, turn in enumerate(conversation["turns"]):
        who = names.index(turn["speaker"])
        bubbles.append(f'<article class="turn v{who % 4} {"odd" if who % 2 else "even"}"><div class="face" aria-hidden="true">{esc(str(turn["speaker"])[:1].upper())}</div>'
                       f'<div class="bubble"><header><b>{esc(turn["speaker"])}</b>{mood_chip(turn)}</header><p class="said">{esc(turn.get("text") or "")}</p>'
                       f'{player(turn["sound"], rate, 92, "turn " + str(i + 1), 560)}{heard_html(turn.get("text"), turn.get("heard"))}{facts(turn)}</div></article>')
    title = esc(str(conversation["id"]).replace("_", " ").replace("-", " ").capitalize())
    return (f'<div class="talk"><header class="talkhead"><h3>{title}</h3><span>{len(conversation["turns"])} turns, {" and ".join(esc(n) for n in names)}</span></header>'
            f'{mix}<div class="chat">{"".join(bubbles)}</div></div>')


def voice_html(conversation: dict) -> str:
    """Who sounds like whom: cosine of every turn with every other, ordered by character."""
    names = list(dict.fromkeys(t["speaker"] for t in conversation["turns"]))
    order = sorted(range(len(conversation["turns"])), key=lambda i: names.index(conversation["turns"][i]["speaker"]))
    turns = [conversation["turns"][i] for i in order]
    cosine = voice_table(turns)
    rows = []
    for i, line in enumerate(cosine):
        cells = []
        for j, value in enumerate(line):
            strength = 0 if value is None or i == j else max(0.0, min(1.0, (value - 0.4) / 0.6))
            text = "" if i == j else number(value)
            cells.append(f'<td class="v{names.index(turns[i]["speaker"]) % 4} {"own" if turns[i]["speaker"] == turns[j]["speaker"] else ""}" style="--w:{strength:.2f}">{text}</td>')
        rows.append(f'<tr><th>{esc(turns[i]["speaker"])} {order[i] + 1}</th>{"".join(cells)}</tr>')
    head = "".join(f"<th>{esc(t['speaker'])} {order[i] + 1}</th>" for i, t in enumerate(turns))
    grid = f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    means = "".join(f'<div class="v{i % 4}"><strong>{number(voice_means([{"turns": [t for t in turns if t["speaker"] == n]}])[0])}</strong><span>{esc(n)} with {esc(n)}</span></div>' for i, n in enumerate(names))
    return f'<div class="voices">{grid}<div class="means">{means}<div><strong>{number(voice_means([conversation])[1])}</strong><span>different characters</span></div></div></div>'


def bar_cell(value: float | None, text: str, full: float, bad: bool = False) -> str:
    share = 0 if value is None else min(100.0, 100 * value / full)
    return f'<div class="bar{" over" if bad else ""}"><i style="width:{share:.1f}%"></i><span>{text}</span></div>'


def latency_html(results: dict) -> str:
    rows, made = [], [(c, i, t) for c in results["conversations"] for i, t in enumerate(c["turns"]) if t.get("total_ms") is not None]
    slowest = max((t["first_audio_ms"] or 0 for _, _, t in made), default=1) or 1
    for conversation, i, turn in made:
        place = esc(conversation["id"]) + (f" {i + 1}" if len(conversation["turns"]) > 1 else "")
        factor = turn["real_time_factor"]
        rows.append([place, esc(turn["speaker"]), number(turn.get("duration_s"), 1, " s"),
                     bar_cell(turn.get("first_audio_ms"), number(turn.get("first_audio_ms"), 0, " ms"), slowest),
                     number(turn["total_ms"], 0, " ms"), bar_cell(factor, number(factor), 1.0, factor is not None and factor > 1),
                     "yes" if turn.get("ended") else "no"])
    return table(["turn", "who", "speech", "first sound after", "whole turn after", "time per second of speech", "ended by itself"], rows, "wide")


def training_html(rows: list[dict]) -> str:
    total, terms = metric_series(rows)
    if not total and not terms:
        return not_yet("No training has been logged.", "python train.py")
    body = ""
    if total:
        keys = "".join(f'<span class="key s{i}">{name}</span>' for i, name in enumerate(total))
        body += f'<figure class="panel"><figcaption>Loss over steps {keys}</figcaption>{line_chart(total, 1000, 300, "loss over training steps")}</figure>'
    small = "".join(f'<figure class="panel"><figcaption>{TERMS[name]}</figcaption>{line_chart(parts, 340, 190, TERMS[name])}</figure>'
                    for name, parts in sorted(terms.items(), key=lambda item: list(TERMS).index(item[0])))
    return body + f'<div class="multiples">{small}{codebooks_html(rows)}{evaluations_html(rows)}</div>'


def evaluations_html(rows: list[dict]) -> str:
    """The short evaluations during training, one curve per score; "" where nothing was scored."""
    looks = [row for row in rows if row.get("kind") == "evaluation"]
    series = {key: [(row["step"], row[key]) for row in looks if row.get(key) is not None] for row in looks for key in row if key.startswith("evaluation/")}
    figures = [(key.split("/")[1], points) for key, points in series.items() if points and key.split("/")[1] not in ("conversations", "seconds")]
    return "".join(f'<figure class="panel"><figcaption>score: {"word error rate" if name == "wer" else esc(name)}</figcaption>{line_chart({name: points}, 340, 190, name)}</figure>' for name, points in figures)


def read_samples(folder: Path) -> dict[str, list[tuple[int, Path, dict]]]:
    """What train.py's model said while it learned (samples/step_NNNNNN/samples.json): text -> [(step, WAV, facts), ...], at most SAMPLED_STEPS of them, spread evenly."""
    found: dict[str, list] = {}
    for path in sorted(folder.glob("step_*/samples.json")):
        for row in read_json(path):
            if (path.parent / row["audio"]).is_file():
                found.setdefault(row["text"], []).append((int(path.parent.name.removeprefix("step_")), path.parent / row["audio"], row))
    def spread(rows):
        return [rows[round(k * (len(rows) - 1) / (SAMPLED_STEPS - 1))] for k in range(SAMPLED_STEPS)] if len(rows) > SAMPLED_STEPS else rows
    return {text: spread(rows) for text, rows in found.items()}


def samples_html(samples: dict) -> str:
    """A panel per line: how it sounded at step after step."""
    import audio_io
    panels = []
    for text, rows in samples.items():
        players = "".join(f'<figure><figcaption>step {step:,}{"" if row.get("ended", True) else " (cut off)"}</figcaption>'
                          f'{player(audio_io.read_audio(path), audio_io.SAMPLE_RATE, 84, f"step {step}", 420)}</figure>' for step, path, row in rows)
        panels.append(f'<div class="panel"><p class="said">{esc(text)}</p><div class="multiples">{players}</div></div>')
    return "".join(panels)


def codebooks_html(rows: list[dict]) -> str:
    """Validation loss of every codebook, at the first and at the last look."""
    looks = [row for row in rows if isinstance(row.get("validation_per_codebook"), list)]
    if not looks:
        return ""
    series = {f"step {row['step']}": list(enumerate(row["validation_per_codebook"], 1)) for row in ([looks[0], looks[-1]] if len(looks) > 1 else looks)}
    keys = "".join(f'<span class="key s{i}">{name}</span>' for i, name in enumerate(series))
    return f'<figure class="panel"><figcaption>by codebook {keys}</figcaption>{line_chart(series, 340, 190, "validation loss by codebook")}</figure>'


def steps_html(steps: list[dict]) -> str:
    if not steps:
        return not_yet("No step of the experiment has been timed.", "./run_experiment.sh")
    whole = sum(s.get("seconds") or 0 for s in steps) or 1
    strip = "".join(f'<i class="k{i % 6}" style="flex:{max(s.get("seconds") or 0, 0.004 * whole):.3f}" title="{esc(s.get("name"))}"></i>' for i, s in enumerate(steps))
    rows = [[f'<i class="dot k{i % 6}"></i>{esc(s.get("name"))}', seconds_text(s.get("seconds")), number(s.get("seconds"), 0, " %", 100 / whole),
             number(s.get("peak_memory_mb"), 0, " MB")] for i, s in enumerate(steps)]
    rows.append(["<b>all steps</b>", f"<b>{seconds_text(whole)}</b>", "", ""])
    return f'<div class="panel"><div class="strip">{strip}</div>{table(["step", "time", "share", "peak memory"], rows)}</div>'


def machine_html(manifest: dict, results: dict | None) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items() if v)
    gpu = manifest.get("gpu")
    rows = {"Model": (results or {}).get("model"), "Device": (results or {}).get("device"), "Seed": (results or {}).get("seed"),
            "Processor": f"{manifest.get('cpu')}, {manifest.get('cores')} cores", "Memory": number(manifest.get("memory_mb"), 0, " GB", 1e-3),
            "Graphics": gpu or "none used", "System": manifest.get("system"), "Python": manifest.get("python"), "Packages": versions,
            "Commit": manifest.get("commit"), "Written": manifest.get("time")}
    return '<dl class="panel machine">' + "".join(f"<dt>{k}</dt><dd>{v if k == 'Memory' else esc(v) if v is not None else 'unknown'}</dd>" for k, v in rows.items()) + "</dl>"


def files_html(results: dict | None, args, here: Path) -> str:
    import os
    paths = [Path(args.demo) / "results.json", Path(args.checkpoints) / "best_model.pt", Path(args.checkpoints) / "last.pt",
             Path(args.checkpoints) / "metrics.jsonl", here.with_suffix(".json")]
    for conversation in (results or {}).get("conversations", []):
        paths += [Path(args.demo) / conversation["audio"]] if conversation.get("audio") else []
        paths += [t["path"] for t in conversation["turns"] if t["path"]]
    links = [f'<li><a href="{esc(Path(os.path.relpath(p, here.parent)).as_posix())}">{esc(p.as_posix())}</a></li>'
             for p in dict.fromkeys(paths) if p.is_file() or p == here.with_suffix(".json")]
    return f'<ul class="files">{"".join(links)}</ul>'


def tiles_html(summary: dict) -> str:
    """The page's headline numbers."""
    rate, span, mos = summary.get("wer"), summary.get("wer_interval") or {}, summary.get("mos") or {}
    tiles = []
    if rate and rate["wer"] is not None:
        between = f"; 95 % interval {span['low']:.0%} to {span['high']:.0%}" if span.get("low") is not None else ""
        tiles.append((f"{rate['wer']:.1%}", "words misheard", f"{rate['words']} words in {summary['generated']} turns{between}"))
    if summary.get("first_audio_ms") is not None:
        tiles.append((f"{summary['first_audio_ms']:.0f} ms", "to the first sound", "median over the turns below"))
    if summary.get("real_time_factor") is not None:
        tiles.append((f"{summary['real_time_factor']:.2f} s", "per second of speech", "below 1 it can talk live"))
    if mos.get("mean") is not None:
        tiles.append((f"{mos['mean']:.1f}", "naturalness (DistillMOS)", "1 is bad, 5 is excellent; a machine's guess"))
    if summary.get("same_voice") is not None:
        other = f"{summary['other_voice']:.2f} between different ones" if summary.get("other_voice") is not None else "cosine between turns"
        tiles.append((f"{summary['same_voice']:.2f}", "voice kept by a character", other))
    if summary.get("generated"):
        tiles.append((f"{summary['ended']} of {summary['generated']}", "turns ended by themselves", "the rest was cut off by a guard"))
    return '<div class="tiles">' + "".join(f'<div class="tile"><strong>{a}</strong><span>{b}</span><small>{c}</small></div>' for a, b, c in tiles) + "</div>"


# ----------------------------------------------------------------------------- the page

CSS = """
:root{--paper:#f6f5f1;--card:#fff;--ink:#1c1b22;--soft:#6a6872;--line:#e4e1d8;--fill:#eeece5;--accent:#b3365f;--good:#1c7a55;--bad:#b3261e;
--c0:#b3365f;--c1:#26669e;--c2:#4d7a2a;--c3:#8a5a00;--shadow:0 1px 2px #1c1b220d,0 8px 24px #1c1b220a;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#131218;--card:#1c1b23;--ink:#edebf2;--soft:#a09dab;--line:#302e3a;--fill:#272530;--accent:#ff8fb1;
--good:#6fd3a6;--bad:#ff8a80;--c0:#ff8fb1;--c1:#84c1f5;--c2:#a9d58a;--c3:#f0c36a;--shadow:none}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:56px 24px 96px}
h1{font-size:clamp(30px,5vw,46px);line-height:1.1;letter-spacing:-.025em;margin:0 0 14px;font-weight:700}
h2{font-size:26px;letter-spacing:-.015em;margin:72px 0 4px}h3{font-size:17px;margin:0}
.lead{color:var(--soft);max-width:68ch;margin:0 0 22px}.hero .lead{font-size:18px;color:var(--ink);max-width:62ch}
code{font:.88em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--fill);padding:.15em .4em;border-radius:5px}
a{color:var(--accent);text-underline-offset:3px}nav{display:flex;flex-wrap:wrap;gap:6px 20px;font-size:14px;margin:26px 0 0}nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;background:var(--line);border:1px solid var(--line);border-radius:16px;overflow:hidden;margin-top:34px}
.tile:last-child:nth-child(3n+1){grid-column:1/-1}.tile:last-child:nth-child(3n+2){grid-column:span 2}.tile{background:var(--card);padding:18px 20px 16px;display:flex;flex-direction:column}.tile strong{font-size:30px;letter-spacing:-.02em;line-height:1.15;font-variant-numeric:tabular-nums}
.tile span{font-weight:600;font-size:14.5px}.tile small{color:var(--soft);font-size:12.5px;line-height:1.4;margin-top:3px}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:20px}
.card,.panel,.bubble{background:var(--card);border:1px solid var(--line);border-radius:16px;box-shadow:var(--shadow)}.card{padding:20px 22px 16px;display:flex;flex-direction:column}.card .said{flex:1}
.card header,.bubble header{display:flex;align-items:baseline;gap:10px;justify-content:space-between}.bubble header{font-size:14px}
.mood{font-size:12.5px;color:var(--soft);border:1px solid var(--line);border-radius:99px;padding:0 9px;line-height:1.7}
.said{font-size:18px;line-height:1.45;margin:8px 0 14px;text-wrap:pretty}.bubble .said{font-size:16.5px;margin:4px 0 12px}
.player{display:grid;grid-template-columns:auto 1fr;gap:12px;align-items:center}.player audio{grid-column:1/-1;width:100%}.player.live audio{display:none}
.play{display:none;width:46px;height:46px;border-radius:50%;border:0;background:var(--accent);color:var(--card);cursor:pointer;padding:0;transition:transform .12s}
.player.live .play{display:block}.player:not(.live) .picture{grid-column:1/-1}.play:hover{transform:scale(1.06)}.play:focus-visible,.picture:focus-visible{outline:3px solid var(--accent);outline-offset:3px}
.play svg{width:24px;height:24px;fill:currentColor;display:block;margin:auto}.play .halt,.playing .play .go{display:none}.playing .play .halt{display:block}
.picture{position:relative;border-radius:10px;overflow:hidden;background:#0f1022;cursor:pointer;min-width:0}.picture img{width:100%;height:100%;display:block}
.pitch{position:absolute;inset:0;width:100%;height:100%;fill:none;stroke-linecap:round;stroke-linejoin:round}.pitch path{vector-effect:non-scaling-stroke;stroke:#7df0ff;stroke-width:2px}
.pitch .halo path{stroke:#0f1022b0;stroke-width:5px}.head{position:absolute;top:0;bottom:0;left:0;width:2px;background:#fff;opacity:0}.playing .head,.paused .head{opacity:.95}
.clock{position:absolute;right:6px;bottom:5px;font-size:11.5px;line-height:1;color:#fff;background:#0f1022b8;padding:4px 6px;border-radius:5px;font-variant-numeric:tabular-nums}
.heard{font-size:14.5px;color:var(--soft);margin:12px 0 0}.heard b{font-weight:600;color:var(--ink);margin-right:4px}.heard.all b,.heard.all{color:var(--good)}
del{color:var(--bad);text-decoration-thickness:1.5px}ins{color:var(--good);text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:3px;font-weight:600}
.facts{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;padding:0;margin:10px 0 0;font-size:12.5px;color:var(--soft);font-variant-numeric:tabular-nums}.facts b{color:var(--ink);font-weight:600}.bad{color:var(--bad)}
.talk{margin-top:8px}.talkhead{display:flex;gap:12px;align-items:baseline;margin:0 0 12px}.talkhead span{color:var(--soft);font-size:14px}.talk+.talk{margin-top:56px}
.chat{display:flex;flex-direction:column;gap:16px;margin-top:26px}.turn{display:flex;gap:12px;width:min(100%,720px)}.turn.odd{align-self:flex-end;flex-direction:row-reverse}
.face{flex:none;width:38px;height:38px;border-radius:50%;display:grid;place-items:center;font-weight:700;background:color-mix(in srgb,var(--v) 16%,var(--card));color:var(--v)}
.bubble{flex:1;min-width:0;padding:14px 18px 12px;border-top-left-radius:5px}.odd .bubble{border-radius:16px 5px 16px 16px}.bubble header b,.matrix .own{color:var(--v)}.turn .play{background:var(--v)}
.v0{--v:var(--c0)}.v1{--v:var(--c1)}.v2{--v:var(--c2)}.v3{--v:var(--c3)}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;font-size:13px;color:var(--soft);margin:-8px 0 20px;align-items:center}.legend i{display:inline-block;vertical-align:middle;margin-right:7px;border-radius:3px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;width:100%}th{text-align:left;font-weight:600;font-size:12.5px;color:var(--soft);padding:8px 14px 8px 0;white-space:nowrap;vertical-align:bottom}
td{padding:7px 14px 7px 0;border-top:1px solid var(--line);white-space:nowrap}.panel{padding:18px 22px;margin:0 0 20px}
.bar{position:relative;min-width:150px;background:var(--fill);border-radius:6px;overflow:hidden}.bar i{position:absolute;inset:0 auto 0 0;background:color-mix(in srgb,var(--c1) 32%,transparent);border-radius:6px}.bar.over i{background:color-mix(in srgb,var(--bad) 38%,transparent)}.bar span{position:relative;padding:1px 8px;display:block}
.voices{display:flex;flex-wrap:wrap;gap:28px 64px;align-items:center}.means{display:flex;flex-direction:column;gap:14px}.means div{display:flex;flex-direction:column;border-left:4px solid var(--v,var(--line));padding-left:14px}.means strong{font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}.means span{color:var(--soft);font-size:13.5px}
.matrix{width:auto}.matrix tbody th{vertical-align:middle}.matrix th{padding:4px 8px}.matrix td{border:2px solid var(--card);border-radius:8px;padding:9px 14px;text-align:center;background:color-mix(in srgb,var(--ink) calc(var(--w)*22%),var(--fill))}.matrix td.own{background:color-mix(in srgb,var(--v) calc(8% + var(--w)*40%),var(--card));color:var(--ink);font-weight:600}
figure{margin:0}figcaption{font-weight:600;font-size:14.5px;margin-bottom:8px}.multiples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:20px}.multiples .panel{margin:0}
.chart{width:100%;height:auto;display:block;overflow:visible}.chart .grid{stroke:var(--line)}.chart text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}.chart .line{fill:none;stroke-width:2.2;stroke-linejoin:round}.chart .raw{fill:none;stroke-width:1;opacity:.28}
.chart .s0{stroke:var(--c1)}.chart .s1{stroke:var(--c0)}.chart circle.s0{fill:var(--c1)}.chart circle.s1{fill:var(--c0)}.chart text.end{font-weight:700;stroke:none}.chart text.s0{fill:var(--c1)}.chart text.s1{fill:var(--c0)}
.key{white-space:nowrap;display:inline-block;font-weight:500;font-size:13px;margin-left:14px}.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;background:currentColor}.key.s0{color:var(--c1)}.key.s1{color:var(--c0)}
.strip{display:flex;gap:2px;height:22px;border-radius:8px;overflow:hidden;margin-bottom:12px}.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:9px}
.k0{background:#26669e}.k1{background:#2f9c95}.k2{background:#8fb339}.k3{background:#e0a030}.k4{background:#d9614c}.k5{background:#97459b}
.machine{display:grid;grid-template-columns:minmax(90px,auto) 1fr;gap:6px 22px;font-size:14.5px}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.files{columns:280px;font-size:14px;padding-left:18px}.missing{background:var(--fill);border-radius:12px;padding:14px 18px;color:var(--soft)}.missing b{color:var(--ink)}
footer{margin-top:72px;color:var(--soft);font-size:13.5px;border-top:1px solid var(--line);padding-top:18px}
@media(max-width:560px){main{padding:36px 16px 64px}.face{display:none}.card,.panel,.bubble{padding-left:16px;padding-right:16px}h2{margin-top:56px}.tiles{grid-template-columns:1fr 1fr}.tile{padding:14px}.tile strong{font-size:25px}}
@media print{.play{display:none!important}body{background:#fff}}
"""

SCRIPT = """
let current=null;
for(const box of document.querySelectorAll('.player')){
 const sound=box.querySelector('audio'),head=box.querySelector('.head'),clock=box.querySelector('.clock'),picture=box.querySelector('.picture');
 box.classList.add('live');sound.controls=false;
 const length=clock.textContent;
 const draw=()=>{if(!sound.duration)return;head.style.left=100*sound.currentTime/sound.duration+'%';clock.textContent=sound.currentTime.toFixed(1)+' / '+length;if(!sound.paused)requestAnimationFrame(draw)};
 const start=()=>{if(current&&current!==sound)current.pause();current=sound;sound.play()};
 box.querySelector('.play').onclick=()=>sound.paused?start():sound.pause();
 picture.onclick=e=>{const r=picture.getBoundingClientRect(),at=(e.clientX-r.left)/r.width,go=()=>{sound.currentTime=at*sound.duration;start()};
  if(sound.readyState>0)go();else{sound.addEventListener('loadedmetadata',go,{once:true});sound.load()}};
 sound.onplay=()=>{box.classList.add('playing');box.classList.remove('paused');draw()};
 sound.onpause=()=>{box.classList.remove('playing');box.classList.add('paused');draw()};
 sound.onended=()=>{box.classList.remove('playing','paused');clock.textContent=length};
}
"""

ABOUT = "A conversational speech model, small enough to learn and to talk on a laptop"
SPOKE = " It read the lines below aloud, hearing the earlier turns while it spoke; nothing here was picked or edited."
HEARD = " A recogniser that has never seen the texts (Whisper {asr}) wrote down what it understood; every word that differs is marked."
LEGEND = ('<p class="legend"><span><i style="width:54px;height:12px;background:linear-gradient(90deg,#0f1022,#6b2a7f,#ee6a5f,#fdf0b8)"></i>energy, 0 to 8 kHz upwards</span>'
          '<span><i style="width:22px;height:3px;background:#18b6cc"></i>pitch, 60 to 500 Hz upwards</span><span><del>word</del> said but not heard</span><span><ins>word</ins> heard instead</span></p>')


def demo_sections(results: dict | None, folder: Path, rate: int) -> str:
    if results is None:
        return section("turns", "What it says", "", not_yet("The model has not spoken.", "python demo.py --mode test"))
    singles = [c for c in results["conversations"] if len(c["turns"]) == 1]
    talks = [c for c in results["conversations"] if len(c["turns"]) > 1]
    body = ""
    if singles:
        body += section("turns", "Single turns", "Each line was spoken with nothing before it. Click into a picture to play from there.",
                        LEGEND + f'<div class="grid2">{"".join(single_card(c, rate) for c in singles)}</div>')
    if talks:
        body += section("talk", "In conversation", "Two characters take turns. Each turn is spoken with the sound of the earlier ones in memory.",
                        ("" if singles else LEGEND) + "".join(chat(c, folder, rate) for c in talks))
        if any(t.get("voice") is not None for c in talks for t in c["turns"]):
            body += section("voices", "Who sounds like whom", "Cosine between the voices of any two turns, as a speaker verification network (Resemblyzer) hears them. "
                            "Turns of one character stand together; a voice that is kept is high there and lower elsewhere.",
                            "".join(f'<div class="panel">{voice_html(c)}</div>' for c in talks))
    body += section("speed", "How fast", "The clock starts when the text is known. Below 1 second of work per second of speech, it can talk live.",
                    f'<div class="panel">{latency_html(results)}</div>')
    return body


def page(results: dict | None, summary: dict, metrics: list[dict], steps: list[dict], manifest: dict, args, rate: int) -> str:
    """The whole page as one string."""
    here = Path(args.output)
    body = demo_sections(results, Path(args.demo), rate)
    body += section("training", "How it learned", "Loss in nats, lower is better: how surprised the model is by the next piece of speech or text.", training_html(metrics))
    if samples := read_samples(Path(args.checkpoints) / "samples"):
        body += section("samples", "How it came to sound", "Held-out lines, said by the model while it was trained; the draw is the same at every step.", samples_html(samples))
    body += section("steps", "What it took", "Each step of the experiment, its time and its largest memory.", steps_html(steps))
    body += section("machine", "Where and with what", "", machine_html(manifest, results))
    body += section("files", "Files", "Addresses are relative to this page.", files_html(results, args, here))
    about = ABOUT + "." + (SPOKE if results else "") + (HEARD.format(asr=esc(args.asr)) if results and not args.no_judges else "")
    names = {"turns": "Single turns", "talk": "Conversation", "voices": "Voices", "speed": "Speed", "training": "Training", "samples": "Samples", "steps": "Steps", "machine": "Machine", "files": "Files"}
    nav = "".join(f'<a href="#{key}">{name}</a>' for key, name in names.items() if f'id="{key}"' in body)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>A model that talks</title>'
            f'<style>{CSS}</style></head><body><main><div class="hero"><h1>A model that talks</h1><p class="lead">{about}</p>{tiles_html(summary) if summary else ""}<nav>{nav}</nav></div>'
            f'{body}<footer>Written by <code>python report.py</code> on {esc(manifest.get("time"))} from the files named above. Numbers that were not measured are not shown.</footer>'
            f'</main><script>{SCRIPT}</script></body></html>')


def plain_results(results: dict | None) -> list[dict]:
    """The judged turns without sound and vectors, for the JSON beside the page."""
    keys = ("speaker", "text", "mood", "audio", "duration_s", "first_audio_ms", "total_ms", "real_time_factor", "ended", "end_reason", "heard", "wer", "mos", "level_db", "pitch", "reason")
    return [{"id": c["id"], "turns": [{k: t.get(k) for k in keys} for t in c["turns"]]} for c in (results or {}).get("conversations", [])]


def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=__import__("argparse").RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="outputs/report.html", help="the page; default outputs/report.html")
    parser.add_argument("--demo", default="outputs/demo", help="folder with results.json of demo.py; default outputs/demo")
    parser.add_argument("--checkpoints", default="checkpoints", help="folder with metrics.jsonl of train.py; default checkpoints")
    parser.add_argument("--steps", default="outputs/steps", help="folder with the times written by run_experiment.py; default outputs/steps")
    parser.add_argument("--asr", default="tiny.en", help="tiny.en (in the packages), a folder, or a Whisper of your own cache; default tiny.en")
    parser.add_argument("--no_judges", action="store_true", help="skip recognition and the other judges (faster)")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    import runtime
    return runtime.plain_errors(lambda _: run(args))(argv)


def run(args) -> int:
    import audio_io
    import runtime
    results = judge_demo(Path(args.demo), not args.no_judges, args.asr)
    summary = summarise(results)
    steps = read_steps(Path(args.steps))
    manifest = runtime.run_manifest()
    text = page(results, summary, runtime.read_metrics(Path(args.checkpoints) / "metrics.jsonl"), steps, manifest, args, audio_io.SAMPLE_RATE)
    runtime.atomic_write(args.output, text)
    runtime.write_json(Path(args.output).with_suffix(".json"), {"summary": summary, "conversations": plain_results(results), "steps": steps, "manifest": manifest})
    print(f"report: {args.output} ({len(text) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
