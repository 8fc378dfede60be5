"""What the experiments share when they judge: intervals over seeds and conversations, the three-way decision, the sample
that would decide, the section of RESULTS.md, pictures.

An effect is a matrix (S seeds, C conversations) of paired differences with weights (C,), frames of each conversation say.
The interval is a bootstrap that draws seeds and conversations anew, each with replacement (crossed: every seed is judged on
the same conversations). A bootstrap over few seeds is too narrow, so their deviations are first widened as Student's interval
is wider than the normal one, and by sqrt(S / (S - 1)) for the variance that drawing from S loses. Imports no model.
"""
from __future__ import annotations

import json
import math

import numpy as np

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
POWER = 1.96 + 0.84              # standard errors between effect and threshold: 95 % interval, found 4 times in 5


# ----------------------------------------------------------------------------- intervals and decisions

def seed_factor(seeds: int) -> float:
    """How much wider Student's 95 % interval of so many seeds is than the normal one: 2.2 for three, 1.4 for five."""
    from scipy.stats import t
    return float(t.ppf(0.975, seeds - 1)) / 1.96


def effect(differences, weights=None, draws: int = 4000, seed: int = 0) -> dict:
    """(S, C) paired differences -> {mean, low, high, seeds, n_seeds, n}: 95 % interval of the weighted mean, and the mean of every seed."""
    d = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    S, C = d.shape
    w = np.ones(C) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (C,) or w.sum() <= 0 or not np.isfinite(d).all():
        raise ValueError(f"differences {d.shape} need finite values and {C} weights, not {w.shape}")
    each = d @ w / w.sum()                                                     # (S,)
    wide = d + ((math.sqrt(S / (S - 1)) * seed_factor(S) - 1) * (each - each.mean()))[:, None] if S > 1 else d
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(0, S, (draws, S)), rng.integers(0, C, (draws, C))
    means = np.array([(wide[r].mean(0)[c] @ w[c]) / max(w[c].sum(), 1e-12) for r, c in zip(rows, columns)])
    low, high = np.percentile(means, [2.5, 97.5]) if max(S, C) > 1 else (None, None)
    return {"mean": float(each.mean()), "low": None if low is None else float(low), "high": None if high is None else float(high),
            "seeds": each.tolist(), "n_seeds": S, "n": C}


def decide(found: dict, threshold: float) -> str:
    """Supported: the whole interval lies above `threshold`, the smallest effect worth having, and every seed is above 0; refuted: it lies below; else undecided.

    Effects are written so that the hypothesis says "more".
    """
    if found["low"] is None:
        return UNDECIDED
    if found["low"] > threshold and min(found["seeds"]) > 0:
        return SUPPORTED
    return REFUTED if found["high"] < threshold else UNDECIDED


def all_of(verdicts: list[str]) -> str:
    """A hypothesis with several conditions: refuted by one, supported by all."""
    return REFUTED if REFUTED in verdicts else SUPPORTED if set(verdicts) == {SUPPORTED} else UNDECIDED


def needed(differences, weights, threshold: float) -> dict:
    """What would decide an effect of the size seen: {"conversations": with these seeds, "seeds": with these conversations}; None: that alone never would.

    Variance of the mean: seeds / S + conversations / C, both estimated from the matrix.
    """
    d, w = np.atleast_2d(np.asarray(differences, dtype=np.float64)), np.asarray(weights, dtype=np.float64)
    S, C = d.shape
    each = d @ w / w.sum()
    between = float(each.var(ddof=1)) if S > 1 else 0.0
    within = float(((w / w.mean()) ** 2 * (d.mean(0) - each.mean()) ** 2).sum() / max(1, C - 1))
    between = max(0.0, between - within / C)                                   # part of the seeds' spread is the conversations'
    allowed = ((each.mean() - threshold) / POWER) ** 2

    def count(variance: float, other: float) -> int | None:
        return math.ceil(variance / (allowed - other)) if allowed > other else None
    return {"conversations": count(within, between / S * (seed_factor(S) ** 2 if S > 1 else 1)), "seeds": count(between, within / C)}


def judge(name: str, differences, weights, threshold: float, unit: str) -> dict:
    """One row of a verdict table: the effect, its decision, and where undecided the sample that would decide."""
    found = effect(differences, weights)
    verdict = decide(found, threshold)
    return {"what": name, "unit": unit, "threshold": threshold, "effect": found, "verdict": verdict,
            "needed": needed(differences, weights, threshold) if verdict == UNDECIDED else None}


# ----------------------------------------------------------------------------- section and picture

def verdict_table(rows: list[dict], digits: int = 3) -> str:
    """The rows of `judge` as a table; each seed on its own in the last column but one."""
    from measuring import show, table

    def sample(row):
        n = row["needed"]
        return "-" if n is None else f"{n['conversations'] or 'no number of'} conversations or {n['seeds'] or 'no number of'} seeds"
    lines = [[r["what"], f"{show(r['effect'], digits)} {r['unit']}", f"{r['threshold']:g}", ", ".join(f"{v:.{digits}f}" for v in r["effect"]["seeds"]), r["verdict"], sample(r)]
             for r in rows]
    return table(["effect", "measured", "at least", "seed by seed", "verdict", "would decide it"], lines)


def publish(args, name: str, words: list[str], result: dict, body: str) -> int:
    """Write the section of RESULTS.md and print the body, then the JSON as the last line. Returns the exit code."""
    import shlex

    import benchmark
    import runtime
    from measuring import rounded
    result = rounded({"command": f"python experiments/{name}.py {shlex.join(words)}".strip()} | result)
    benchmark.write_section(args.results, name.split("_")[0], result, body, runtime.run_manifest())
    print(f"\n{body}\n")
    print(json.dumps(result, ensure_ascii=False))
    return 0


def figure(width: float = 9, height: float = 4.5, panels: int = 1):
    """An empty figure and its axes (a list), without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = [drawing.add_subplot(1, panels, i + 1) for i in range(panels)]
    for one in axes:
        one.grid(alpha=0.3)
    return drawing, axes


def save_picture(drawing, path) -> str:
    import runtime
    return runtime.atomic_write(path, lambda file: drawing.savefig(file, format="png", dpi=110)).as_posix()


def bars(axes, names: list[str], effects: list[dict], label: str) -> None:
    """Means with intervals."""
    mean = np.array([e["mean"] for e in effects])
    low, high = (np.array([e[k] if e[k] is not None else e["mean"] for e in effects]) for k in ("low", "high"))
    axes.bar(range(len(names)), mean, yerr=[np.maximum(0, mean - low), np.maximum(0, high - mean)], capsize=4, color="#5b8db8")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(label)
