"""Can the scores tell good from bad? Natural conversations against the same ones spoiled in known ways; and the fit of the judges.

Measuring is cached: one JSON file per sound (and per sound and text), named by its contents, so that nothing is listened to
twice. Called by evaluation_framework.py (validate, fit) and benchmark_evaluation.py.
"""
from __future__ import annotations

import functools
import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import config
from corruptions import CORRUPTIONS
from dialogue import Dialogue, Turn, fingerprint, from_supervisions

VERSION = 3                     # of the measurements: another number, other cache files
# What each score must notice, and what it may notice since the corruption touches by construction what it measures.
OWN = {"character": ("swapped speakers", "drifting voice"), "voice": ("voice changes",), "mood": ("swapped moods",), "prosody": ("flat pitch", "exchanged pitch", "uneven pace"),
       "flow": ("stretched gaps", "rushed turns"), "words": ("wrong words", "pieces"), "sound": ("noise", "pieces")}
TOUCHED = {"character": ("voice changes", "pieces", "noise"), "voice": ("pieces", "noise"), "mood": ("swapped speakers", "drifting voice", "flat pitch", "pieces", "noise", "voice changes", "wrong words"),
           "prosody": ("pieces", "noise", "wrong words", "swapped moods", "voice changes"), "flow": ("pieces", "noise"), "words": ("noise", "uneven pace"),
           "sound": ("vocoded", "uneven pace", "flat pitch", "exchanged pitch", "voice changes", "drifting voice", "swapped moods")}
GOOD = 0.9                      # the least AUC of a score on its own corruptions
STILL = 0.75                    # a score that reaches more on a corruption that is neither its own nor touches it moves where it should not


# ----------------------------------------------------------------------------- conversations and their measurements

def natural_talks(data, split: str, count: int, seed: int = 0, offset: int = 0) -> list:
    """`count` conversations of the split with several turns, drawn repeatably, as Dialogues (0: all). ValueError where there is none."""
    found, names = _drawn(data, split, seed)
    names = names[offset:]
    if count and len(names) < count:
        print(f"note: only {len(names)} conversations in the {split} split of {data}, {count} were asked for", file=sys.stderr)
    return [from_supervisions(name, found[name], data) for name in (names[:count] if count else names)]


def each_talk(data, split: str, seed: int = 0):
    """All of them in the same order, each read when it is asked for."""
    found, names = _drawn(data, split, seed)
    return (from_supervisions(name, found[name], data) for name in names)


def _drawn(data, split: str, seed: int) -> tuple[dict[str, list], list[str]]:
    """Supervisions of the conversations of several turns, and their names in an order drawn repeatably."""
    import random
    from dataset_pipeline import read_supervisions
    found = {name: rows for name, rows in read_supervisions(Path(data), split).items() if len(rows) > 1}
    if not found:
        raise ValueError(f"the {split} split of {data} has no conversation of several turns: collect more (python collect_data.py --output {data} --target_hours 1)")
    return found, random.Random(seed).sample(sorted(found), len(found))


def recorded_talks(pairs: list[tuple], turns: int = 6) -> list[Dialogue]:
    """Recordings [(text, audio (N,)), ...] of one voice as conversations with itself, `turns` in each: what words, sound, voice and prosody can be tested on."""
    from dialogue import placed
    rows = [pairs[i:i + turns] for i in range(0, len(pairs) - turns + 1, turns)]
    if not rows:
        raise ValueError(f"{len(pairs)} fitting recordings, {turns} are needed: check --recordings and --transcripts")
    return [placed(Dialogue(f"recorded-{k:03d}", tuple(Turn("recorded", text, audio) for text, audio in row))) for k, row in enumerate(rows)]


@functools.lru_cache(maxsize=512)
def natural_rendering(text: str):
    """The text in the source TTS's own voice, without mood or context, as a prosody.Line; None for what it cannot say."""
    import conversation_metrics as metrics
    import synthetic_conversations as synthetic
    try:
        return metrics.reference_line(synthetic.speak(text, synthetic.Character("reference", "hibari")).audio)
    except ValueError:
        return None


@dataclass(frozen=True)
class Listening:
    """How conversations are measured: where results are kept, whether words and naturalness are judged, on how many turns of each (0: all), by how many processes."""
    folder: str = "outputs/cache/evaluation"
    words: bool = True
    sound: bool = True
    turns: int = 0
    jobs: int = 1

    def __post_init__(self):
        if self.turns < 0:
            raise ValueError(f"--listen {self.turns} counts turns of a conversation: use 0 for all of them")
        if self.jobs < 1:
            raise ValueError(f"--jobs {self.jobs} must be at least 1")

    def listened(self, count: int) -> set[int]:
        """Places of the turns whose words and naturalness are judged, spread evenly."""
        return set(range(count)) if not self.turns or count <= self.turns else {int((k + 0.5) * count / self.turns) for k in range(self.turns)}


def digest(*parts) -> str:
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:24]


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):                                             # not there, or torn: measured anew
        return None


def _measured_turn(turn, folder: Path, words: bool, sound: bool) -> dict:
    """One turn from the cache, what is missing measured now."""
    import conversation_metrics as metrics
    import runtime
    from measuring import rounded
    mark = digest(fingerprint(turn.audio))
    path, said_path = folder / f"{mark}.json", folder / f"{mark}-{digest(turn.text)}.json"
    found, said = _read(path), _read(said_path)
    before = found
    found = rounded(metrics.measure_sound(turn.audio, words, sound), 6) if found is None else dict(found)
    if words and found["heard"] is None:
        found["heard"] = metrics.judges.transcribe(turn.audio)
    if sound and found["mos"] is None:
        found["mos"] = rounded(metrics.judges.distill_mos(turn.audio), 6)
    if found != before:
        runtime.write_json(path, found)
    if said is None:
        said = rounded(metrics.measure_prosody(turn.audio, turn.text, natural_rendering(turn.text) if turn.text else None), 6)
        runtime.write_json(said_path, said)
    return found | said


def _talk_file(job: tuple) -> Path:
    talk, kind, seed, how = job
    key = digest(talk.id, kind, seed if kind else None, how.words, how.sound, sorted(how.listened(len(talk.turns))), [(fingerprint(t.audio), t.speaker, t.text, t.start, t.mood) for t in talk.turns])
    return Path(how.folder) / f"talk-{key}.json"


def _kept_talk(job: tuple) -> tuple[Dialogue, list[dict]] | None:
    """(talk, corruption or None, seed, Listening) -> the conversation without its sound, and its measured turns; None where it is not kept."""
    import numpy as np
    kept, silent = _read(_talk_file(job)), np.zeros(0, np.float32)
    return kept and (Dialogue(job[0].id, tuple(Turn(speaker, text, silent, start, mood) for speaker, text, start, mood in kept["turns"])), kept["rows"])


def _measure_talk(job: tuple) -> None:
    """Measures one conversation and keeps what was found."""
    import numpy as np
    import runtime
    talk, kind, seed, how = job
    listened = how.listened(len(talk.turns))
    spoiled = CORRUPTIONS[kind](talk, np.random.default_rng(seed)) if kind else talk
    rows = [_measured_turn(t, Path(how.folder), how.words and i in listened, how.sound and i in listened) for i, t in enumerate(spoiled.turns)]
    runtime.write_json(_talk_file(job), {"turns": [[t.speaker, t.text, t.start, t.mood] for t in spoiled.turns], "rows": rows})


def _one_thread() -> None:
    import torch
    torch.set_num_threads(1)


def measure(talks: list[Dialogue], how: Listening, kinds: tuple = (None,), seed: int = 0) -> dict:
    """kind -> [(conversation without sound, measured turns), ...]; kind None: as they are, else spoiled. Cached, with a bar."""
    from tqdm import tqdm
    jobs = [(talk, kind, [seed, number], how) for kind in kinds for number, talk in enumerate(talks)]
    found = list(map(_kept_talk, jobs))
    missing = [i for i, kept in enumerate(found) if kept is None]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="listening", unit="conversation", disable=len(jobs) < 2, file=sys.stderr) as bar:
        for i, _ in zip(missing, spread(_measure_talk, [jobs[i] for i in missing], how.jobs)):
            found[i] = _kept_talk(jobs[i])
            bar.update()
    return {kind: found[k * len(talks):(k + 1) * len(talks)] for k, kind in enumerate(kinds)}


def processes(count: int) -> ProcessPoolExecutor:
    """New processes of one torch thread each."""
    import multiprocessing
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)


def spread(act, jobs: list, count: int):
    """act(job) of every job in their order, by so many processes."""
    if count == 1 or len(jobs) < 2:
        yield from map(act, jobs)
        return
    with processes(min(count, len(jobs))) as pool:
        yield from pool.map(act, jobs)


# ----------------------------------------------------------------------------- fitting the judges

def _regression(x, y, names: list) -> dict:
    """A logistic regression as plain numbers: {features, mean, std, weights, bias} and, of several classes, {classes, prior}."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    if len(set(y.tolist())) < 2:
        raise ValueError(f"too little speech to fit a judge of {names[0]}: give more --data or a higher --count")
    mean, std = x.mean(0), np.maximum(x.std(0), 1e-6)
    fitted = LogisticRegression(max_iter=2000, class_weight="balanced").fit((x - mean) / std, y)
    found = {"features": names, "mean": mean.tolist(), "std": std.tolist(), "n": len(x)}
    if len(fitted.classes_) == 2:
        return found | {"weights": fitted.coef_[0].tolist(), "bias": float(fitted.intercept_[0])}
    return found | {"weights": fitted.coef_.tolist(), "bias": fitted.intercept_.tolist(), "classes": list(fitted.classes_), "prior": [1 / len(fitted.classes_)] * len(fitted.classes_)}


def person_pairs(talks: list, measured: list) -> tuple[list, list]:
    """Features of pairs of turns of a conversation, and whether both are one person's."""
    import conversation_metrics as metrics
    x, y = [], []
    for talk, rows in zip(talks, measured):
        for i in range(len(rows)):
            for j in range(i):
                features = metrics.pair_features(rows[i], rows[j])
                if features is not None:
                    x.append(features)
                    y.append(talk.turns[i].speaker == talk.turns[j].speaker)
    return x, y


def half_pairs(talks: list, most: int = 2) -> tuple[list, list]:
    """Cosines of two halves: of one turn, and of turns of two characters of a conversation; `most` turns of each conversation."""
    import conversation_metrics as metrics
    import numpy as np
    from turn_taking import speech_segments
    x, y = [], []
    for talk in talks:
        long = [t for t in talk.turns if t.seconds > 2 * metrics.HALF + 0.4]
        for a, b in [pair for pair in zip(long, long[1:]) if pair[0].speaker != pair[1].speaker][:most]:
            for sound, same in ((a.audio, True), (np.concatenate([a.audio[:len(a.audio) // 2], b.audio[len(b.audio) // 2:]]), False)):
                cosine = metrics.halves(sound, speech_segments(sound, 24000))
                if cosine is not None:
                    x.append([cosine])
                    y.append(same)
    return x, y


def mood_rows(talks: list, measured: list) -> tuple[list, list]:
    """Features of turns against the speaker's other turns, and their moods."""
    import prosody
    x, y = [], []
    for talk, rows in zip(talks, measured):
        for speaker in talk.speakers:
            places = talk.of(speaker)
            for i, features in zip(places, prosody.relative([rows[k]["shifts"] for k in places])):
                if features is not None and talk.turns[i].mood:
                    x.append(features)
                    y.append(talk.turns[i].mood)
    return x, y


def fit(data, count: int, how: Listening, seed: int = 0) -> dict:
    """Fits the judges on the train split and tests them on the test split: what assets/evaluation.json holds."""
    import numpy as np
    from prosody import FEATURES, mood_of
    train, test = natural_talks(data, "train", count, seed), natural_talks(data, "test", 0, seed)
    measured, tested = ([rows for _, rows in measure(talks, how)[None]] for talks in (train, test))
    mood = _regression(*mood_rows(train, measured), list(FEATURES))
    person = _regression(*person_pairs(train, measured), ["cosine", "pitch level, semitones"])
    halves = accepted([m["halves"] for rows in measured for m in rows if m["halves"] is not None])
    x, y = mood_rows(test, tested)
    guesses = [mood_of(row, mood) for row in x]
    per_class = {m: float(np.mean([g == m for g, t in zip(guesses, y) if t == m])) for m in config.MOODS if m in y}
    mood["test"] = {"turns": len(y), "accuracy": float(np.mean([a == b for a, b in zip(guesses, y)])), "balanced_accuracy": float(np.mean(list(per_class.values()))),
                    "chance": 1 / len(per_class), "majority": float(max(map(y.count, set(y))) / len(y)), "per_mood": per_class}
    person["test"] = _right(person, *person_pairs(test, tested))
    halves["test"] = accepted_right(halves["accept"], *half_pairs(test))
    return {"note": "Written by `python evaluation_framework.py fit`: logistic regressions over measured speech; see conversation_metrics.py.",
            "data": {"folder": Path(data).as_posix(), "split": "train", "conversations": len(train), "licence": "fitted on synthetic speech of this project's own collection "
                     "(texts MIT; voices hibari-tts and Kokoro-82M, Apache-2.0); the numbers are under this project's MIT licence"}, "mood": mood, "person": person, "halves": halves}


def accepted(cosines: list[float], share: float = 0.98) -> dict:
    """The least cosine that `share` of natural turns in one voice exceed: {accept, share, n}. So low that processed speech passes as well."""
    import numpy as np
    if len(cosines) < 2:
        raise ValueError("too little speech to fit a judge of the halves of turns: give more --data or a higher --count")
    return {"accept": float(np.percentile(cosines, 100 * (1 - share))), "share": share, "n": len(cosines)}


def accepted_right(accept: float, x: list, y: list) -> dict:
    """How the threshold does on pairs it has not seen."""
    import judges
    import numpy as np
    same, other = ([row[0] for row, one in zip(x, y) if one == wanted] for wanted in (True, False))
    kept, found = (float(np.mean(np.array(part) >= accept)) if part else None for part in (same, other))
    return {"pairs": len(y), "one_voice_accepted": kept, "two_voices_found": None if found is None else 1 - found, "chance": 0.5, "auc": judges.separation(same, other),
            "balanced_accuracy": None if kept is None or found is None else (kept + 1 - found) / 2}


def _right(model: dict, x: list, y: list) -> dict:
    """How often a two-class judge is right on pairs it has not seen, both classes weighing the same."""
    import conversation_metrics as metrics
    import judges
    import numpy as np
    p = [metrics.logistic(row, model) for row in x]
    same, other = [v for v, t in zip(p, y) if t], [v for v, t in zip(p, y) if not t]
    return {"pairs": len(p), "balanced_accuracy": float((np.mean(np.array(same) > 0.5) + np.mean(np.array(other) <= 0.5)) / 2), "chance": 0.5, "auc": judges.separation(same, other)}


# ----------------------------------------------------------------------------- the matrix

def auc_interval(high: list, low: list, draws: int = 1000, seed: int = 0) -> dict:
    """Area under the ROC curve of natural over spoiled conversations, None left out, with a bootstrap interval over both: {mean, low, high, n}."""
    import numpy as np
    high, low = (np.array([v for v in values if v is not None], dtype=np.float64) for values in (high, low))
    if not len(high) or not len(low):
        return {"mean": None, "low": None, "high": None, "n": 0}
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    rng = np.random.default_rng(seed)
    drawn = [wins[np.ix_(rng.integers(0, len(high), len(high)), rng.integers(0, len(low), len(low)))].mean() for _ in range(draws)]
    return {"mean": float(wins.mean()), "low": float(np.percentile(drawn, 2.5)), "high": float(np.percentile(drawn, 97.5)), "n": min(len(high), len(low))}


def validate(talks: list, how: Listening, models: dict, kinds=None, seed: int = 0) -> dict:
    """Natural against spoiled: {natural: summary, matrix: score -> corruption -> AUC, spoiled: corruption -> summary, verdicts, rows}."""
    import conversation_metrics as metrics
    found = measure(talks, how, (None, *(kinds or CORRUPTIONS)), seed)
    rows = {kind: [metrics.score(talk, measured, models) for talk, measured in pairs] for kind, pairs in found.items()}
    natural = rows.pop(None)
    matrix = {name: {kind: auc_interval([r[name]["score"] for r in natural], [r[name]["score"] for r in part]) for kind, part in rows.items()} for name in metrics.SCORES}
    spoiled = {kind: metrics.summary(part) for kind, part in rows.items()}
    return {"conversations": len(talks), "natural": metrics.summary(natural), "spoiled": spoiled, "matrix": matrix, "verdicts": verdicts(matrix), "endpointing": endpointing(talks)}


def endpointing(talks: list) -> dict:
    """Simple listeners on each speaker's channel of the conversations (see turn_taking.endpointers)."""
    import numpy as np
    from dialogue import RATE, placed
    from turn_taking import endpointers, speech_segments
    channels = []
    for talk in map(placed, talks):
        for speaker in talk.speakers:
            turns = [talk.turns[i] for i in talk.of(speaker)]
            audio = np.zeros(int((max(t.start + t.seconds for t in talk.turns) + 3.0) * RATE), np.float32)
            spans = []
            for t in turns:
                place, units = int(t.start * RATE), speech_segments(t.audio, RATE)
                audio[place:place + len(t.audio)] += t.audio
                spans += [(t.start + units[0][0], t.start + units[-1][1])] if units else []
            channels.append((audio, spans))
    return endpointers(channels, RATE)


def verdicts(matrix: dict) -> dict:
    """Per score {own: least AUC on its own corruptions, valid, strays: corruptions on which it moves and should not}."""
    found = {}
    for name, row in matrix.items():
        own = [row[kind]["mean"] for kind in OWN[name] if kind in row and row[kind]["mean"] is not None]
        strays = [kind for kind, auc in row.items() if kind not in OWN[name] + TOUCHED[name] and auc["mean"] is not None and auc["mean"] > STILL]
        found[name] = {"own": min(own) if own else None, "valid": min(own) >= GOOD if own else None, "strays": strays}
    return found


def matrix_text(result: dict) -> str:
    """The matrix as a Markdown table; own corruptions in bold, touched ones in brackets."""
    from measuring import show, table
    names = list(result["matrix"])
    kinds = list(next(iter(result["matrix"].values())))

    def cell(name, kind):
        auc = result["matrix"][name][kind]
        text = "-" if auc["mean"] is None else f"{auc['mean']:.2f}"
        if kind in OWN[name] and auc["low"] is not None:
            return f"**{text}** ({auc['low']:.2f} to {auc['high']:.2f})"
        return f"({text})" if kind in TOUCHED[name] else text
    rows = [[kind, *(cell(name, kind) for name in names)] for kind in kinds]
    verdict = [[name, show(v["own"]), {True: "yes", False: "**no**", None: "-"}[v["valid"]], ", ".join(v["strays"]) or "none"] for name, v in result["verdicts"].items()]
    ends = [[name, show(e["recall"], 2, True), show(e["false_positive_rate"], 2, True), show(e["latency_ms"]["p50"], 0)] for name, e in result["endpointing"].items()]
    return (table(["natural against", *names], rows) + "\n\n" + table(["score", "least AUC on its own", f"valid ({GOOD:g})", f"moves where it should not (over {STILL:g})"], verdict)
            + "\n\nDecisions that a turn has ended, by TurnBench's rules, of listeners whose place is known:\n\n" + table(["listener", "recall", "false in pauses", "latency, ms"], ends))


def draw_matrix(result: dict, path) -> None:
    """The matrix as a picture: rows are corruptions, columns scores; own cells are framed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    names = list(result["matrix"])
    kinds = list(next(iter(result["matrix"].values())))
    values = np.array([[np.nan if result["matrix"][n][k]["mean"] is None else result["matrix"][n][k]["mean"] for n in names] for k in kinds])
    figure, axes = plt.subplots(figsize=(1.1 * len(names) + 2.2, 0.42 * len(kinds) + 1.2))
    picture = axes.imshow(values, vmin=0, vmax=1, cmap="PuOr", aspect="auto")
    for i, kind in enumerate(kinds):
        for j, name in enumerate(names):
            if np.isfinite(values[i, j]):
                axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8, weight="bold" if kind in OWN[name] else "normal", color="white" if abs(values[i, j] - 0.5) > 0.35 else "black")
            if kind in OWN[name]:
                axes.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title(f"how well a score tells natural from spoiled (AUC, {result['conversations']} conversations)", fontsize=9)
    figure.colorbar(picture, ax=axes, fraction=0.04)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
