"""The readable page of an evaluation: scores beside the topline and the floors, plots, and conversations to listen to."""
from __future__ import annotations

import base64
import html
import io
from pathlib import Path

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}table{border-collapse:collapse;margin:1rem 0}
th,td{border-bottom:1px solid #ddd;padding:.3rem .7rem;text-align:left;vertical-align:top}th{background:#f4f4f4}img{max-width:100%}.low{color:#777;font-size:.85em}
audio{width:100%;max-width:36rem}details{margin:.6rem 0}code{background:#f4f4f4;padding:0 .2rem}"""
LABELS = {"natural": "natural (topline)", "codec": "codec only", "source": "pipeline: source TTS, turn by turn", "model": "the model"}
WORDS = {"character": "One person per name, another for the other name.", "voice": "Nobody changes within a turn.", "mood": "The moods heard fit those asked for better than in another order (0.5: chance).",
         "prosody": "Melody, timing and pauses as in a natural rendering of the words.", "flow": "Gaps and overlaps distributed as people's.", "words": "1 - word error rate.",
         "sound": "(DistillMOS - 1) / 4."}


def _cell(value: dict) -> str:
    if value.get("mean") is None:
        return "-"
    inside = f" <span class=low>{value['low']:.2f} to {value['high']:.2f}</span>" if value.get("low") is not None else ""
    return f"{value['mean']:.2f}{inside}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "<table><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr>" + "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows) + "</table>"


def _picture(figure) -> str:
    import matplotlib.pyplot as plt
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def scores_picture(conditions: dict) -> str:
    """Scores of every condition with their intervals, as an <img>."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = list(next(iter(conditions.values()))["scores"])
    figure, axes = plt.subplots(figsize=(9, 3.4))
    for k, (condition, facts) in enumerate(conditions.items()):
        for j, name in enumerate(names):
            s = facts["scores"][name]
            if s["mean"] is None:
                continue
            x = j + 0.16 * (k - (len(conditions) - 1) / 2)
            error = [[s["mean"] - s["low"]], [s["high"] - s["mean"]]] if s["low"] is not None else None
            axes.errorbar(x, s["mean"], yerror(error), fmt="o", color=f"C{k}", capsize=3, label=None)
        axes.plot([], [], "o", color=f"C{k}", label=LABELS[condition])
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.03)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    return _picture(figure)


def yerror(error):
    """Bounds below and above, never negative by rounding; None where there are none."""
    return None if error is None else [[max(0.0, v) for v in side] for side in error]


def offsets_picture(conditions: dict) -> str:
    """Floor-transfer offsets of every condition beside people's, as cumulative shares."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from turn_taking import human_share_below
    figure, axes = plt.subplots(figsize=(9, 3))
    grid = np.linspace(-1.5, 2.5, 200)
    axes.plot(grid, human_share_below(grid), "k--", label="people (published)")
    for k, (condition, facts) in enumerate(conditions.items()):
        x = np.sort(facts.get("offset_values") or [])
        if len(x):
            axes.step(x, (np.arange(len(x)) + 1) / len(x), color=f"C{k}", label=LABELS[condition])
    axes.set_xlim(-1.5, 2.5)
    axes.set_xlabel("start of the next speaker less end of the one before, s (below 0: overlap)")
    axes.set_ylabel("share below")
    axes.legend(fontsize=8)
    figure.tight_layout()
    return _picture(figure)


def _conversation(folder: Path, number: int, condition: str, row: dict, sound) -> str:
    """One conversation to listen to and to read."""
    from audio_io import write_audio
    name = f"{condition}_{number:03d}.ogg"
    write_audio(folder / "audio" / name, sound)
    scores = ", ".join(f"{k} {'-' if s['score'] is None else format(s['score'], '.2f')}" for k, s in row["scores"].items())
    missing = "; ".join(f"{k}: {s['reason']}" for k, s in row["scores"].items() if s["score"] is None)
    turns = [[html.escape(str(t["speaker"])), html.escape(t["mood"] or ""), html.escape(t["text"]), html.escape(t["heard"] or "")] for t in row["turns"]]
    return (f"<p><b>{LABELS[condition]}</b><br><audio controls preload=none src='audio/{name}'></audio><br><span class=low>{scores}{' (' + html.escape(missing) + ')' if missing else ''}</span></p>"
            f"<details><summary>turns, and what was heard</summary>{_table(['speaker', 'mood', 'text', 'heard'], turns)}</details>")


def write_page(result: dict, talks: dict, folder, command: str, manifest: dict, listen: int = 5) -> Path:
    """page.html in `folder`, with the sound of the first `listen` conversations beside it. Returns its path."""
    import runtime
    from dialogue import mixed
    folder, conditions = Path(folder), result["conditions"]
    names = list(next(iter(conditions.values()))["scores"])
    scores = [[LABELS[c], *(_cell(f["scores"][n]) for n in names)] for c, f in conditions.items()]
    more = [[LABELS[c], _percent(f["wer"]), _percent(f["wer_again"]), _count(f["faults"], "runaway"), _count(f["faults"], "early_stop"), _count(f["faults"], "silent_end"), _number(f["offsets"]["median_s"]),
             _share(f["offsets"]["overlap_share"]), _share(f["offsets"]["over_1s_share"]), _number(f["first_audio_ms"], 0)] for c, f in conditions.items()]
    heard = []
    for number in range(min(listen, result["conversations"])):
        parts = [_conversation(folder, number, c, result["per_conversation"][c][number], mixed(talks[c][number])) for c in conditions if number < len(talks[c])]
        heard.append(f"<h3>{html.escape(talks['model'][number].id)}</h3>" + "".join(parts))
    body = (f"<h1>Evaluation</h1><p>{result['conversations']} conversations, {result['turns']} turns by the model, {result['beside']} conversations beside it; weights <code>{html.escape(result['weights']['path'])}</code> "
            f"({result['weights']['sha256']}); {html.escape(manifest['time'][:10])}, commit {html.escape((manifest['commit'] or 'unknown')[:12])}, {html.escape(manifest['cpu'])}.<br>"
            f"<code>{html.escape(command)}</code></p><h2>Scores</h2>{_table(['', *names], scores)}<p class=low>Mean over conversations and its 95 % bootstrap interval; a dash: cannot be judged.</p>"
            f"<ul>{''.join(f'<li><b>{n}</b>: {WORDS[n]}</li>' for n in names)}</ul>{scores_picture(conditions)}<h2>Raw</h2>"
            + _table(["", "word error", "by a second ASR", "cut off", "words missing", "silent end", "median offset, s", "overlaps", "over 1 s", "first sound, ms"], more)
            + f"<h2>Gaps and overlaps</h2>{offsets_picture(conditions)}<h2>To listen to</h2>{''.join(heard)}")
    return runtime.atomic_write(folder / "page.html", f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{STYLE}</style><body>{body}</body></html>\n")


def _number(value, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _percent(value) -> str:
    if value is None or value["mean"] is None:
        return "-"
    return f"{100 * value['mean']:.1f} %" + (f" <span class=low>{100 * value['low']:.1f} to {100 * value['high']:.1f}</span>" if value["low"] is not None else "")


def _count(faults: dict, name: str) -> str:
    return "-" if faults[name] is None else f"{faults[name]} of {faults['turns']}"
