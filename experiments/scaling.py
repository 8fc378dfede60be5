"""Scaling: held-out loss against arithmetic for models of several sizes, with a fitted law and its uncertainty.

    python experiments/scaling.py                                tens of minutes per seed on one core; interrupted, it goes on

Every size (backbone, depth decoder and cross-attention grow together) is trained from scratch with the same arithmetic: PyTorch
counts the operations of a step, --steps are those of the largest size. The learning rate stays at its height after the warm-up
(no decay), so that each check on the way is a run of its own that ended there; the averaged weights are judged.
Law (Hoffmann et al. 2022, eq. 2): L(N, D) = E + A / N^a + B / D^b, nats per frame over all codebooks; N parameters that multiply
(input tables aside), D positions seen. From it the compute-optimal frontier at C = 6 N D. Fitted by least squares on the log of
the loss with a soft absolute value (Huber-like, as there), from many starts; the interval refits runs drawn anew within each size.
And L(C) = E + A / C^a on the best loss at each amount of arithmetic, with the operations that were counted.

Decision rule, written before the first run. The law is fitted without each size's last check and asked to foretell it.
  holds:     the mean error of these predictions is at most 0.5 % of the loss, and more arithmetic helps (the whole interval of the
             exponent a of L(C) lies above 0)
  fails:     the mean error is above 2 %, or the interval of a reaches 0
  undecided: else; more seeds, sizes or steps are needed (the section says which interval was too wide)
Chance: the loss of knowing only how often each code occurs (h3's chance) is in the picture.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Parser                                           # noqa: E402
from experiments.settings import Training, add_training_flags, check_seeds  # noqa: E402

NAME = "scaling"
GOOD, BAD = 0.005, 0.02
SIZES = "48x2,80x3,128x4,176x5"
CHECKS = 6                       # losses of a run, evenly spaced in the log of the steps
HOLDS, FAILS = "holds", "fails"


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, min_lr_ratio=1.0, held_out=200)
    parser.add_argument("--sizes", default=SIZES, help="width x layers of each backbone, smallest first; at least 4 for a verdict; default %(default)s")
    parser.add_argument("--codebooks", type=int, default=8, help="two of them semantic; default 8")
    parser.add_argument("--draws", type=int, default=200, help="refits for the intervals; default 200")
    return parser


if __name__ == "__main__":       # --help and wrong flags are answered before torch is loaded
    build_parser().parse_args()

import numpy as np               # noqa: E402

import runtime                   # noqa: E402
from config import from_flags    # noqa: E402
from experiments import small_models as small, verdicts  # noqa: E402
from experiments.h3_cross_attention import chance_nats   # noqa: E402
from measuring import show, table  # noqa: E402


# ----------------------------------------------------------------------------- laws

def law(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """theta (log E, log A, log B, a, b) -> E + A / n^a + B / d^b. n and d are in units of their geometric means, which keeps the fit well scaled."""
    return np.exp(theta[0]) + np.exp(theta[1] - theta[3] * np.log(n)) + np.exp(theta[2] - theta[4] * np.log(d))


def curve(theta: np.ndarray, c: np.ndarray) -> np.ndarray:
    """theta (log E, log A, a) -> E + A / c^a."""
    return np.exp(theta[0]) + np.exp(theta[1] - theta[2] * np.log(c))


def best_fit(form, starts: list, bounds: tuple, loss: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """Parameters with the least soft absolute error of the log loss over all starts."""
    from scipy.optimize import least_squares
    fits = [least_squares(lambda theta: np.log(form(theta, *inputs)) - np.log(loss), np.clip(start, *(np.array(b) for b in bounds)), bounds=bounds, loss="soft_l1", f_scale=1e-3, max_nfev=300)
            for start in starts]
    return min(fits, key=lambda fit: fit.cost).x


def fit_law(n, d, loss, start=None) -> np.ndarray:
    low = np.log(min(loss))
    starts = [start] if start is not None else [np.array([low + np.log(e), low + np.log(0.05), low + np.log(0.2), a, b]) for e in (0.5, 0.9) for a in (0.2, 0.5) for b in (0.2, 0.6)]
    return best_fit(law, starts, ([low - 6, low - 12, low - 12, 0.0, 0.0], [low, low + 3, low + 3, 2.0, 2.0]), loss, n, d)


def fit_curve(c, loss, start=None) -> np.ndarray:
    low = np.log(min(loss))
    starts = [start] if start is not None else [np.array([low + np.log(e), low + np.log(1.01 - e), a]) for e in (0.3, 0.6, 0.9) for a in (0.1, 0.3, 0.6)]
    return best_fit(curve, starts, ([low - 6, low - 12, -1.0], [low, low + 3, 2.0]), loss, c)


def frontier(points: list[dict]) -> list[dict]:
    """Points that no point with as little arithmetic beats, by arithmetic."""
    best, kept = np.inf, []
    for p in sorted(points, key=lambda p: (p["flops"], p["loss"])):
        if p["loss"] < best:
            best = p["loss"]
            kept.append(p)
    return kept


def columns(points: list[dict], *names: str) -> list[np.ndarray]:
    return [np.array([p[n] for p in points], float) for n in names]


def envelope(points: list[dict]) -> list[dict]:
    """Means over seeds first, so that a lucky seed makes no frontier."""
    cells: dict[tuple, list] = {}
    for p in points:
        cells.setdefault((p["size"], p["check"]), []).append(p)
    return frontier([cell[0] | {"loss": float(np.mean([p["loss"] for p in cell]))} for cell in cells.values()])


def redraw(points: list[dict], rng) -> list[dict]:
    """Runs (seeds) of every size drawn anew with replacement, with all their checks."""
    drawn = []
    for size in sorted({p["size"] for p in points}):
        seeds = sorted({p["seed"] for p in points if p["size"] == size})
        for new, old in enumerate(rng.choice(seeds, len(seeds))):
            drawn += [p | {"seed": new} for p in points if p["size"] == size and p["seed"] == old]
    return drawn


def fit_all(points: list[dict], start: dict | None = None) -> dict:
    """{"law": theta, "curve": theta, "scale": units} of these points; start: another fit to begin with."""
    scale = start["scale"] if start else {k: float(np.exp(np.mean(np.log(columns(points, k)[0])))) for k in ("parameters", "positions", "flops")}
    n, d, loss = columns(points, "parameters", "positions", "loss")
    front = envelope(points)
    c, best = columns(front, "flops", "loss")
    return {"law": fit_law(n / scale["parameters"], d / scale["positions"], loss, start and start["law"]), "curve": fit_curve(c / scale["flops"], best, start and start["curve"]), "scale": scale}


def foretold(points: list[dict]) -> list[dict]:
    """Each size's last check, as a law fitted without all of them says: {"size", "loss", "predicted", "error"} (relative)."""
    last = {size: max(p["check"] for p in points if p["size"] == size) for size in dict.fromkeys(p["size"] for p in points)}
    fit = fit_all([p for p in points if p["check"] < last[p["size"]]])
    found = []
    for size in last:
        mine = [p for p in points if p["size"] == size and p["check"] == last[size]]
        loss = float(np.mean([p["loss"] for p in mine]))
        said = float(law(fit["law"], np.array(mine[0]["parameters"] / fit["scale"]["parameters"]), np.array(mine[0]["positions"] / fit["scale"]["positions"])))
        found.append({"size": size, "loss": loss, "predicted": said, "error": abs(said / loss - 1)})
    return found


def describe(fit: dict) -> dict:
    """A fit in plain numbers: E, exponents, and how fast the best size grows with arithmetic (Hoffmann et al. eq. 4)."""
    e, _, _, a, b = fit["law"]
    return {"E": float(np.exp(e)), "alpha": float(a), "beta": float(b), "best_size_exponent": float(b / (a + b)) if a + b > 0 else None,
            "compute_E": float(np.exp(fit["curve"][0])), "compute_exponent": float(fit["curve"][2])}


def intervals(points: list[dict], fit: dict, draws: int, seed: int = 0) -> dict:
    """Name -> {mean: of the fit itself, low, high} over refits of redrawn runs."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        found.append(describe(fit_all(redraw(points, rng), fit)))
    here = describe(fit)
    out = {}
    for name, value in here.items():
        values = [f[name] for f in found if f[name] is not None]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) > 1 else (None, None)
        out[name] = {"mean": value, "low": low if low is None else float(low), "high": high if high is None else float(high)}
    return out


def decide(error: float, exponent: dict, seeds: int, sizes: int) -> str:
    if exponent["low"] is None or seeds < 3 or sizes < 4:
        return verdicts.UNDECIDED
    if error > BAD or exponent["low"] <= 0:
        return FAILS
    return HOLDS if error <= GOOD else verdicts.UNDECIDED


# ----------------------------------------------------------------------------- runs

def read_sizes(text: str) -> list[tuple[int, int]]:
    try:
        sizes = [tuple(int(x) for x in part.lower().split("x")) for part in text.split(",")]
        if all(len(s) == 2 and s[0] > 0 and s[0] % 8 == 0 and s[1] > 1 for s in sizes) and len(set(sizes)) == len(sizes) > 1:
            return sizes
    except ValueError:
        pass
    raise ValueError(f"--sizes {text}: use WIDTHxLAYERS,WIDTHxLAYERS,... with widths in multiples of 8 and at least 2 layers, such as {SIZES}")


def condition_of(width: int, layers: int, args) -> small.Condition:
    """Everything grows with the backbone: depth decoder, cross-attention and its reader at three quarters of its width."""
    inner = -(-width * 3 // 4 // 8) * 8
    cross = small.cross_config(inner, reader_layers=max(2, layers - 1))
    return small.Condition(f"{width}x{layers}", small.base_config(width, layers, 0, args.codebooks, 2, inner, args.audio_vocab, cross=cross))


def multiplying(condition: small.Condition) -> int:
    """Parameters without the input tables."""
    cfg = condition.cfg
    return condition.parameters() - cfg.backbone.width * (cfg.text_vocab + cfg.num_codebooks * cfg.audio_vocab) - cfg.cross.width * cfg.text_vocab


def checks_of(steps: int) -> tuple[int, ...]:
    """CHECKS steps from a tenth of the run to its end, evenly spaced in the logarithm."""
    return tuple(sorted({max(1, round(steps * 10 ** -x)) for x in np.linspace(1, 0, CHECKS)}))


def plan(args, training: Training) -> list[dict]:
    """{"condition", "steps", "flops" of a step, "runs"} of every size."""
    made = [condition_of(width, layers, args) for width, layers in read_sizes(args.sizes)]
    windows = small.held_out_windows(training, made[0].cfg)
    batches = small.Windows(training, made[0].cfg, 12345)
    costs = [small.step_flops(c, [batches.next_batch() for _ in range(args.count_batches)], training) for c in made]
    plans = []
    for condition, cost in zip(made, costs):
        steps = max(CHECKS, round(training.steps * max(costs) / cost))
        runs = [small.Run(condition, seed, steps, training, Path(args.output) / "scaling", lambda c=condition, s=seed: small.Windows(training, c.cfg, s),
                          lambda model: small.judge_windows(model, windows), checks_of(steps)) for seed in check_seeds(args)]
        plans.append({"condition": condition, "steps": steps, "flops": cost, "runs": runs})
    return plans


def points_of(plans: list[dict], results: dict, positions: int) -> list[dict]:
    points = []
    for p in plans:
        for run in p["runs"]:
            for number, (step, found) in enumerate(sorted(results[id(run)].items())):
                points.append({"size": run.condition.name, "seed": run.seed, "check": number, "parameters": multiplying(p["condition"]), "positions": step * positions,
                               "flops": step * p["flops"], "loss": float(np.average(found["nats"].sum(1), weights=found["frames"]))})
    return points


# ----------------------------------------------------------------------------- report

def draw(path: Path, points: list[dict], fit: dict, chance: float) -> str:
    drawing, (left, right) = verdicts.figure(panels=2, width=11)
    for size in dict.fromkeys(p["size"] for p in points):
        mine = [p for p in points if p["size"] == size]
        line, = left.plot(*columns(mine, "flops", "loss"), "o", markersize=4, label=f"{size}: {mine[0]['parameters'] / 1e6:.2f} M")
        d = np.geomspace(min(p["positions"] for p in mine), max(p["positions"] for p in mine), 50)
        cost = mine[0]["flops"] / mine[0]["positions"]
        left.plot(d * cost, law(fit["law"], np.full(50, mine[0]["parameters"] / fit["scale"]["parameters"]), d / fit["scale"]["positions"]), color=line.get_color(), linewidth=1)
    c = np.geomspace(min(p["flops"] for p in points), max(p["flops"] for p in points), 50)
    left.plot(c, curve(fit["curve"], c / fit["scale"]["flops"]), "k--", label="best at this arithmetic")
    left.axhline(chance, color="black", linestyle=":", label="chance")
    left.set(xscale="log", xlabel="floating-point operations", ylabel="held-out nats per frame", title="Loss against arithmetic; lines: L(N, D)")
    left.legend(fontsize=7)
    n, d, loss = columns(points, "parameters", "positions", "loss")
    said = law(fit["law"], n / fit["scale"]["parameters"], d / fit["scale"]["positions"])
    right.plot(loss, said, "o", markersize=4)
    right.plot([loss.min(), loss.max()], [loss.min(), loss.max()], "k:", linewidth=1)
    right.set(xlabel="measured", ylabel="law", title="The fit")
    return verdicts.save_picture(drawing, path)


def body_of(result: dict) -> str:
    fitted = result["fit"]
    body = (f"**The law {result['verdict'] if result['verdict'] != verdicts.UNDECIDED else 'is undecided'}**: {result['seeds']} seeds of {len(result['sizes'])} sizes; it foretells each size's last check "
            f"within {100 * result['prediction_error']:.2f} % (at most {100 * GOOD:g} % to hold).\n\n")
    body += table(["size", "parameters that multiply", "steps", "PFLOP", "nats per frame", "foretold"],
                  [[s["size"], f"{s['parameters']:,}", f"{s['steps']:,}", f"{s['gflops'] / 1e6:.3f}", show(s["loss"]), show(f["predicted"])] for s, f in zip(result["sizes"], result["foretold"])])
    names = {"E": "E (what no size removes), nats per frame", "alpha": "a, exponent of parameters", "beta": "b, exponent of positions", "best_size_exponent": "best size grows with arithmetic to the power",
             "compute_E": "E of L(C)", "compute_exponent": "exponent of L(C)"}
    body += "\n\n" + table(["fitted", "value"], [[label, show(fitted[key], 3)] for key, label in names.items()])
    return body + f"\n\nChance: {result['chance']:.2f} nats per frame. Decision rule: `experiments/{NAME}.py`. Picture: `{result['picture']}`."


@runtime.plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    args.audio_vocab, args.count_batches = 1025, 4
    return experiment(args, sys.argv[1:] if argv is None else list(argv))


def experiment(args, words: list[str]) -> int:
    training = from_flags(Training, args)
    plans = plan(args, training)
    order = [p["runs"][i] for i in range(args.seeds) for p in plans]                             # all sizes after every seed
    results = dict(zip(map(id, order), small.train_all(order)))
    points = points_of(plans, results, training.batch_positions)
    fit, said = fit_all(points), foretold(points)
    found, error = intervals(points, fit, args.draws), float(np.mean([f["error"] for f in said]))
    cfg = plans[0]["condition"].cfg
    chance = float(chance_nats(training, cfg, small.held_out_windows(training, cfg)).sum())
    sizes = [{"size": p["condition"].name, "parameters": multiplying(p["condition"]), "steps": p["steps"], "gflops": p["steps"] * p["flops"] / 1e9, "loss": f["loss"]} for p, f in zip(plans, said)]
    result = {"verdict": decide(error, found["compute_exponent"], args.seeds, len(plans)), "seeds": args.seeds, "prediction_error": error, "sizes": sizes, "foretold": said, "fit": found, "chance": chance,
              "points": points, "picture": draw(Path(args.output) / "scaling" / "scaling.png", points, fit, chance)}
    return verdicts.publish(args, NAME, words, result, body_of(result))


if __name__ == "__main__":
    sys.exit(main())
