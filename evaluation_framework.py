"""Evaluate conversational speech: first whether the scores can tell good from bad, then a model.

    python evaluation_framework.py validate                                 natural conversations against the same ones spoiled in known ways
    python evaluation_framework.py run --checkpoint pretrained/nano --conversations data/synthetic --output outputs/evaluation
    python evaluation_framework.py run --conversations examples/conversations.json --output outputs/evaluation
    python evaluation_framework.py pronunciation                            homographs, and words that keep their pronunciation
    python evaluation_framework.py fit                                      fits the judges of person and mood: assets/evaluation.json

The scores are explained in conversation_metrics.py, the ways of spoiling in corruptions.py. What was listened to once is kept in
--cache. The last line printed is JSON; nothing is simulated, and what cannot be judged is null, with a reason.
"""
from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import config

COUNTS = {"validate": 24, "run": 20, "fit": 60}


def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True, metavar="validate|run|pronunciation|fit")
    for name, action in ACTIONS.items():
        part = parts.add_parser(name, help=action.__doc__.split("\n")[0], description=action.__doc__)
        part.add_argument("--seed", type=int, default=0, help="default 0")
        part.add_argument("--cache", default="outputs/cache/evaluation", help="what was listened to and made; default outputs/cache/evaluation")
        if name in COUNTS:
            part.add_argument("--count", type=int, default=COUNTS[name], help=f"conversations; 0: all; default {COUNTS[name]}")
            part.add_argument("--jobs", type=int, default=0, help="processes that listen (run: and speak, on a CPU); 0: one per core (default)")
        if name in ("validate", "fit"):
            part.add_argument("--data", default="data/synthetic", help="folder of collect_data.py; default data/synthetic")
        part.add_argument("--output", default=f"outputs/evaluation/{name}" if name != "fit" else "assets/evaluation.json", help="folder, or the file that fit writes")
        if name == "validate":
            part.add_argument("--split", default="test", choices=("test", "validation", "train"), help="default test")
            part.add_argument("--listen", type=int, default=2, help="turns of each conversation whose words and naturalness are judged; 0: all; default 2")
            part.add_argument("--kinds", default="", help="corruptions, with commas between; default all")
            part.add_argument("--recordings", default="", metavar="FOLDER", help="people's recordings of one voice, in place of --data")
            part.add_argument("--transcripts", default="", metavar="FILE", help="what they say: lines `name: text`, plain or .gz; default NAME.txt beside each")
        if name in ("run", "pronunciation"):
            part.add_argument("--checkpoint", default="", help="weights; default the newest of checkpoints/best_model.pt, else pretrained/nano")
            part.add_argument("--codec", default="pretrained/codec", help="default pretrained/codec")
            part.add_argument("--device", default="cpu", help="auto|cpu|cuda|mps; default cpu")
            config.add_flags(part, config.SamplingConfig, skip=("seed",))
        if name == "run":
            part.add_argument("--conversations", default="data/synthetic", help="a JSON file of demo.py's batch mode, or a folder of collect_data.py (several with commas between); default data/synthetic")
            part.add_argument("--split", default="test", help="of such a folder: test, validation, train, or several with commas between; default test")
            part.add_argument("--beside", type=int, default=30, help="of these, conversations that stand beside the model's as natural speech, codec and source TTS; 0: all; default 30")
            part.add_argument("--again", type=int, default=5, help="conversations that a second ASR hears as well; default 5")
            part.add_argument("--hear", type=int, default=5, help="conversations whose sound stands on the page; default 5")
        if name == "pronunciation":
            part.add_argument("--voices", type=int, default=3, help="voices in which every sentence is said; default 3")
            part.add_argument("--judge_voices", type=int, default=2, help="voices in which the judge is tested; default 2")
    return parser


def validate(args, words: list[str]) -> dict:
    """Area under the ROC curve of every score on every corruption, natural against spoiled, as a table and a picture."""
    import corruptions
    import prosody
    import validity
    kinds = [kind.strip() for kind in args.kinds.split(",") if kind.strip()]
    wrong = [kind for kind in kinds if kind not in corruptions.CORRUPTIONS]
    if wrong:
        raise ValueError(f"unknown corruption {wrong[0]!r}: use --kinds with {', '.join(corruptions.CORRUPTIONS)}")
    if args.recordings:
        from benchmark_codec import recordings
        talks = validity.recorded_talks(recordings(args.recordings, args.transcripts, 6 * (args.count or 1000), args.seed))
    else:
        talks = validity.natural_talks(args.data, args.split, args.count, args.seed)
    result = validity.validate(talks, validity.Listening(args.cache, turns=args.listen, jobs=args.jobs), prosody.load_models(), kinds, args.seed)
    validity.draw_matrix(result, Path(args.output) / "validity.png")
    print(validity.matrix_text(result))
    return result


def run(args, words: list[str]) -> dict:
    """A model's conversations beside natural ones, the codec alone and the source TTS: results.json and page.html."""
    import prosody
    import runtime
    from evaluation_page import write_page
    from evaluation_run import evaluate
    result, talks = evaluate(args, prosody.load_models())
    page = write_page(result, talks, args.output, "python evaluation_framework.py " + shlex.join(words), runtime.run_manifest(), args.hear)
    print(conditions_text(result))
    print(f"{page} and results.json beside it")
    return result


def conditions_text(result: dict) -> str:
    """The scores of every condition as a Markdown table."""
    from evaluation_run import NAMES
    from measuring import show, table
    names = list(next(iter(result["conditions"].values()))["scores"])
    told = {c: f.get("mood") for c, f in result["conditions"].items()}
    rows = [[NAMES[c], *(show(f["scores"][n]) for n in names), show(f["wer"], 2, True), show(f["wer_again"], 2, True), show(told[c] and told[c]["accuracy"], 2, True)] for c, f in result["conditions"].items()]
    chance = next((t["chance"] for t in told.values() if t), None)
    return table(["speech", *names, "word error", "by a second ASR", f"moods told (chance {show(chance, 2, True)})"], rows)


def pronunciation(args, words: list[str]) -> dict:
    """Sesame's two tests: homographs by their sentence, and words that keep the pronunciation of the conversation."""
    from evaluation_run import pronunciation_tests
    result = pronunciation_tests(args)
    print(pronunciation_text(result))
    return result


def pronunciation_text(result: dict) -> str:
    from measuring import show, table

    def row(label, t, majority=True):
        return [label, str(t["accuracy"]["n"]), show(t["accuracy"], 2, True), str(t["abstained"]), show(t["majority"], 2, True) if majority else "-", show(t["favourite_share"], 2, True)]
    rows = [row("judge: pronunciation forced", result["judge"]["hibari"]), row("judge: the other one forced, text as it was", result["judge"]["text swapped"]),
            row("homographs: **the model**", result["homographs"]["model"]), row("homographs: source TTS", result["homographs"]["source"]),
            row("continuation: same speaker said it", result["continuation"]["same"]), row("continuation: other speaker said it", result["continuation"]["other"]),
            row("continuation: nobody said it (control)", result["continuation"]["none"])]
    return table(["test", "decided", "right", "undecided", "always the frequent one", "share of the favourite"], rows)


def fit(args, words: list[str]) -> dict:
    """Fits the judges of person and mood on the train split, tests them on the test split, writes assets/evaluation.json."""
    import runtime
    import validity
    from measuring import rounded
    result = rounded(validity.fit(args.data, args.count, validity.Listening(args.cache, words=False, sound=False, jobs=args.jobs), args.seed), 6)
    runtime.write_json(args.output, result)
    return {name: result[name]["test"] for name in ("mood", "person", "halves")}


ACTIONS = {"validate": validate, "run": run, "pronunciation": pronunciation, "fit": fit}


def act(args, words: list[str]) -> int:
    import runtime
    from measuring import rounded
    if getattr(args, "count", 0) < 0:
        raise ValueError(f"--count {args.count} counts conversations: use 0 for all of them")
    if min(getattr(args, name, 0) for name in ("beside", "again", "hear", "voices")) < 0:
        raise ValueError("--beside, --again, --hear and --voices count: use 0 or more")
    if hasattr(args, "jobs"):
        args.jobs = args.jobs or runtime.cpu_count()
    runtime.set_seed(args.seed)
    result = rounded({"command": "python evaluation_framework.py " + shlex.join(words)} | ACTIONS[args.what](args, words), 6)
    if args.what != "fit":
        runtime.write_json(Path(args.output) / "results.json", result | {"manifest": runtime.run_manifest()})
    print(json.dumps({k: v for k, v in result.items() if k != "per_conversation"}, ensure_ascii=False))
    return 0


def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    import runtime
    return runtime.plain_errors(lambda _: act(args, words))(argv)


if __name__ == "__main__":
    raise SystemExit(main())
