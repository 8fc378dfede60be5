"""A page of what was collected: hours per source, speaker and licence, turn-taking, pitch and pace, sounds to hear.

    python collect_data.py report --data data/people --output outputs/data_report.html

One file with everything inside; works on any folder of collect_data.py, synthetic ones too.
"""
from __future__ import annotations

import base64
import html
import io
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import config

SPLITS = ("train", "validation", "test")
# Floor transfers of people, as published: the mode lies around 200 ms (Levinson and Torreira 2015), the median of 1,656 video calls at 80 ms (CANDOR: Reece et al. 2023)
HUMAN_MODE, HUMAN_MEDIAN = 0.2, 0.08
MOST_VALUES = 200_000      # of one distribution that are kept (a random sample beyond)


@dataclass
class Facts:
    """What a pass over the manifests counts."""
    seconds: dict[str, Counter] = field(default_factory=lambda: {k: Counter() for k in ("source", "licence", "speaker", "split")})
    turns: int = 0
    conversations: int = 0
    values: dict[str, list] = field(default_factory=lambda: {"gap": [], "pitch": [], "pace": [], "turn": []})
    overlapping: int = 0
    samples: dict[str, list] = field(default_factory=dict)     # source -> drawn supervisions with their folder


def floor_transfers(turns: list[dict]) -> list[float]:
    """Seconds from the end of a turn to the begin of the next speaker's; negative: overlap. A turn that lies within another takes no floor."""
    gaps, holder = [], None
    for turn in sorted(turns, key=lambda t: t["start"]):
        end = turn["start"] + turn["duration"]
        if holder and turn["speaker"] != holder[0] and end > holder[1]:
            gaps.append(turn["start"] - holder[1])
        if holder is None or end > holder[1]:
            holder = turn["speaker"], end
    return gaps


def spoken(turn: dict) -> dict:
    """The turn from its first word to its last where those are known: files may begin and end in silence."""
    words = (turn["custom"].get("alignment") or {}).get("words")
    if not words:
        return turn
    first, last = min(w[2] for w in words), max(w[3] for w in words)
    return turn | {"start": turn["start"] + first, "duration": max(0.01, last - first)}


def gather(folders: list[Path], samples: int, seed: int = 0) -> Facts:
    """One pass over the manifests of the folders. ValueError where there are none."""
    import shards
    facts, rng, drawn = Facts(), random.Random(seed), Counter()
    for folder in folders:
        for split in SPLITS:
            path = folder / "manifests" / split / "supervisions.jsonl.gz"
            if not path.is_file():
                raise ValueError(f"{path} does not exist: collect data first (python collect_data.py --output {folder})")
            for turns in shards.stream(path):
                facts.conversations += 1
                _add(facts, rng, drawn, folder, split, turns, samples)
    if not facts.turns:
        raise ValueError(f"there are no turns in {', '.join(map(str, folders))}: collect more")
    return facts


def _add(facts: Facts, rng: random.Random, drawn: Counter, folder: Path, split: str, turns: list[dict], samples: int) -> None:
    gaps = floor_transfers([spoken(t) for t in turns])
    for value in gaps:
        _keep(facts.values["gap"], value, rng, facts.turns)
    facts.overlapping += sum(g < 0 for g in gaps)
    for turn in turns:
        custom, facts.turns = turn["custom"], facts.turns + 1
        for key, name in (("source", custom["engine"]), ("licence", custom.get("licence", "unknown")), ("speaker", turn["speaker"]), ("split", split)):
            facts.seconds[key][name] += turn["duration"]
        if custom.get("f0_median"):
            _keep(facts.values["pitch"], custom["f0_median"], rng, facts.turns)
        _keep(facts.values["pace"], len(turn["text"].split()) / max(0.1, spoken(turn)["duration"]), rng, facts.turns)
        _keep(facts.values["turn"], turn["duration"], rng, facts.turns)
        chosen = facts.samples.setdefault(custom["engine"], [])
        drawn[custom["engine"]] += 1
        if len(chosen) < samples:
            chosen.append((folder, turn))
        elif (place := rng.randrange(drawn[custom["engine"]])) < samples:      # a fair draw in one pass
            chosen[place] = folder, turn


def _keep(values: list, value: float, rng: random.Random, count: int) -> None:
    if len(values) < MOST_VALUES:
        values.append(value)
    elif (place := rng.randrange(count)) < MOST_VALUES:
        values[place] = value


# ----------------------------------------------------------------------------- pictures and sounds

def histogram(values: list[float], title: str, unit: str, low: float, high: float, marks: dict[str, float]) -> str:
    """An <img> of the distribution, with vertical marks; "" without values."""
    if not values:
        return ""
    import matplotlib
    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(5.2, 2.8))
    axis.hist(np.clip(values, low, high), np.linspace(low, high, 60), color="#3b7dd8")
    for style, (name, place) in zip(("-", "--", ":"), {"median here": float(np.median(values)), **marks}.items()):
        axis.axvline(place, color="black", linestyle=style, linewidth=1.2, label=f"{name}: {place:.2f}")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit, fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    pyplot.close(figure)
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def player(folder: Path, turn: dict) -> str:
    """The turn's text over its sound (MP3 inside the page)."""
    import soundfile
    from audio_io import SAMPLE_RATE, read_audio
    try:
        audio = read_audio(folder / turn["custom"]["turn_audio"])
    except ValueError as error:
        return f"<figure><figcaption>{html.escape(str(error))}</figcaption></figure>"
    buffer = io.BytesIO()
    soundfile.write(buffer, audio[:20 * SAMPLE_RATE], SAMPLE_RATE, format="MP3")
    quality = turn["custom"].get("quality", {})
    facts = ", ".join(f"{k} {v:g}" for k, v in quality.items() if v is not None and k in ("snr_db", "confidence", "match", "mos"))
    return (f'<figure><figcaption><b>{html.escape(str(turn["speaker"]))}</b> {html.escape(turn["text"])} <small>{html.escape(facts)}</small></figcaption>'
            f'<audio controls preload="none" src="data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"></audio></figure>')


# ----------------------------------------------------------------------------- the page

def hours_table(title: str, seconds: Counter, most: int = 15) -> str:
    total = sum(seconds.values()) or 1.0
    rows = [f"<tr><td>{html.escape(str(name))}</td><td>{value / 3600:.2f}</td><td>{100 * value / total:.1f} %</td></tr>" for name, value in seconds.most_common(most)]
    if len(seconds) > most:
        rest = total - sum(value for _, value in seconds.most_common(most))
        rows.append(f"<tr><td>{len(seconds) - most} more</td><td>{rest / 3600:.2f}</td><td>{100 * rest / total:.1f} %</td></tr>")
    return f"<div><h3>{html.escape(title)} ({len(seconds)})</h3><table><tr><th></th><th>hours</th><th>share</th></tr>{''.join(rows)}</table></div>"


def left_out_html(folders: list[Path]) -> str:
    """What the filters took, from collection.json, and the picture of it."""
    parts = []
    for folder in folders:
        path = folder / "collection.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        lost = summary.get("left_out", {})
        rows = [f"<tr><td>{html.escape(reason)}</td><td>{count}</td><td>turns</td></tr>" for reason, count in lost.get("turns", {}).items()]
        rows += [f"<tr><td>{html.escape(reason)}</td><td>{count}</td><td>{html.escape(', '.join(names))}</td></tr>" for reason, (count, names) in lost.get("files", {}).items()]
        rows += [f"<tr><td>taken, but: {html.escape(note)}</td><td>{count}</td><td>{html.escape(', '.join(names))}</td></tr>" for note, (count, names) in summary.get("notes", {}).items()]
        if rows:
            parts.append(f"<h3>{html.escape(folder.name)}: {summary['turns']} turns kept</h3><table>{''.join(rows)}</table>")
        if (folder / "filters.png").is_file():
            parts.append(f'<img alt="What was kept and what was left out" class="wide" src="data:image/png;base64,{base64.b64encode((folder / "filters.png").read_bytes()).decode()}">')
    return "".join(parts) or "<p>Nothing was left out.</p>"


CSS = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem}h2{margin-top:2.2rem;font-size:1.2rem}table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left}
.row{display:flex;flex-wrap:wrap;gap:2rem}img{max-width:100%}figure{margin:.7rem 0}audio{width:100%;max-width:30rem}small{color:#666}
@media(prefers-color-scheme:dark){body{background:#161616;color:#e8e8e8}img{background:#fff}small{color:#aaa}}"""


def page(folders: list[Path], facts: Facts) -> str:
    import numpy as np
    gaps, total = facts.values["gap"], sum(facts.seconds["split"].values()) / 3600
    lead = f"{total:.2f} hours of speech, {facts.turns:,} turns, {facts.conversations:,} conversations, {len(facts.seconds['speaker']):,} speakers."
    taking = ""
    if gaps:
        low, high = np.percentile(gaps, [25, 75])
        taking = (f"<p>{len(gaps):,} changes of speaker: median {np.median(gaps):.2f} s, half of them between {low:.2f} and {high:.2f} s, "
                  f"{100 * np.mean(np.array(gaps) < 0):.0f} % overlap, {100 * np.mean(np.array(gaps) > 1):.0f} % wait more than a second. "
                  f"People, as published: mode {HUMAN_MODE} s, median {HUMAN_MEDIAN} s in video calls.</p>")
    pictures = [histogram(gaps, "From one speaker to the next", "seconds; below zero: overlap", -2, 3, {"people, mode": HUMAN_MODE, "people, median": HUMAN_MEDIAN}),
                histogram(facts.values["turn"], "Length of a turn", "seconds", 0, 30, {}),
                histogram(facts.values["pitch"], "Pitch of a turn", "Hz, median of its voiced frames", 50, 400, {}), histogram(facts.values["pace"], "Pace", "words per second", 0, 8, {})]
    sounds = "".join(f"<h3>{html.escape(source)}</h3>{''.join(player(*sample) for sample in chosen)}" for source, chosen in sorted(facts.samples.items()))
    tables = "".join(hours_table(title, facts.seconds[key]) for title, key in (("Sources", "source"), ("Licences", "licence"), ("Splits", "split"), ("Speakers", "speaker")))
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>What was collected</title><style>{CSS}</style></head>'
            f"<body><h1>{html.escape(', '.join(f.name for f in folders))}</h1><p>{lead}</p><div class=row>{tables}</div><h2>Turn-taking</h2>{taking or '<p>Nobody answers anybody here.</p>'}"
            f"<div class=row>{pictures[0]}{pictures[1]}</div><h2>Pitch and pace</h2><div class=row>{pictures[2]}{pictures[3]}</div><h2>Left out</h2>{left_out_html(folders)}"
            f"<h2>To hear</h2>{sounds}</body></html>")


def parser() -> config.Parser:
    made = config.Parser(prog="collect_data.py report", description="One page of what was collected: hours, speakers, licences, turn-taking, pitch, pace, sounds.")
    made.add_argument("--data", default="data/synthetic", help="folder of collect_data.py, several with commas (default data/synthetic)")
    made.add_argument("--output", default="outputs/data_report.html", help="the page (default outputs/data_report.html)")
    made.add_argument("--samples", type=int, default=6, help="sounds per source (default 6)")
    return made


def main(words=None) -> int:
    args = parser().parse_args(words)
    import runtime

    def work(_) -> int:
        folders = [Path(part.strip()) for part in args.data.split(",") if part.strip()]
        facts = gather(folders, max(0, args.samples))
        runtime.atomic_write(args.output, page(folders, facts))
        print(f"{args.output}: {sum(facts.seconds['split'].values()) / 3600:.2f} h, {facts.turns} turns, {len(facts.seconds['speaker'])} speakers")
        return 0
    return runtime.plain_errors(work)(None)
