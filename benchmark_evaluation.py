"""benchmark.py evaluation: whether the scores of conversations are valid, and the model's scores beside the topline and the floors."""
from __future__ import annotations

import argparse

import config

SPOILED, SPOKEN, VOICES = 24, 20, 3      # defaults of --spoiled, --spoken, --voices


def add_flags(part: argparse.ArgumentParser) -> None:
    part.add_argument("--spoiled", type=int, default=SPOILED, help=f"natural conversations that are spoiled to test the scores; 0: all; default {SPOILED}")
    part.add_argument("--spoken", type=int, default=SPOKEN, help=f"conversations that the model speaks; 0: all; default {SPOKEN}")
    part.add_argument("--voices", type=int, default=VOICES, help=f"voices of the pronunciation tests; 0: none; default {VOICES}")
    part.add_argument("--kinds", default="", help="corruptions, with commas between; default all")
    part.add_argument("--jobs", type=int, default=0, help="processes that listen; 0: one per core (default)")
    part.add_argument("--cache", default="outputs/cache/evaluation", help="what was listened to and made; default outputs/cache/evaluation")
    part.add_argument("--save", default="outputs/evaluation", help="folder for the picture and the page; default outputs/evaluation")
    config.add_flags(part, config.SamplingConfig, only=("temperature", "top_k", "depth_temperature", "max_seconds"))


def bench_evaluation(args) -> tuple[dict, str]:
    """Natural conversations against spoiled ones per score; then the model beside natural speech, its codec and the source TTS."""
    from pathlib import Path

    import prosody
    import runtime
    import validity
    from evaluation_framework import conditions_text, pronunciation_text
    from evaluation_page import write_page
    from evaluation_run import evaluate, pronunciation_tests
    if min(args.spoiled, args.spoken, args.voices) < 0:
        raise ValueError("--spoiled, --spoken and --voices count: use 0 for all of the first two, for none of the third")
    args.jobs, models = args.jobs or runtime.cpu_count(), prosody.load_models()
    kinds = [kind.strip() for kind in args.kinds.split(",") if kind.strip()]
    talks = validity.natural_talks(args.data, args.split, args.spoiled, args.seed)
    valid = validity.validate(talks, validity.Listening(args.cache, turns=2, jobs=args.jobs), models, kinds, args.seed)
    validity.draw_matrix(valid, Path(args.save) / "validity.png")
    asked = argparse.Namespace(**vars(args) | {"conversations": args.data, "count": args.spoken, "again": 3, "beside": 0})
    made, sounds = evaluate(asked, models)
    write_page(made, sounds, args.save, "python benchmark.py evaluation", runtime.run_manifest(), 3)
    said = pronunciation_tests(argparse.Namespace(**vars(args) | {"judge_voices": 2})) if args.voices else None
    result = {"validity": valid, "conversations": made["conversations"], "turns": made["turns"], "weights": made["weights"], "pronunciation": said, "device": args.device,
              "conditions": {name: {k: v for k, v in part.items() if k != "offset_values"} for name, part in made["conditions"].items()},
              "judges": {name: models[name].get("test") for name in ("mood", "person", "halves")}}
    return result, body_of(result, validity.matrix_text(valid), conditions_text(made), pronunciation_text(said) if said else "")


def body_of(result: dict, matrix: str, conditions: str, said: str) -> str:
    """The section's text."""
    from measuring import show
    mood, person, halves = (result["judges"][name] or {} for name in ("mood", "person", "halves"))
    body = (f"First the scores themselves. {result['validity']['conversations']} natural conversations of the test split against the same ones spoiled: area under the ROC curve "
            f"(0.5: cannot tell). Bold: what the score is for, with its interval; in brackets: what touches by construction what it measures.\n\n{matrix}\n\n"
            f"The judges behind them, fitted on the train split, on the test split: mood of a turn, {show(mood.get('balanced_accuracy'), 2, True)} (mean over moods; chance {show(mood.get('chance'), 2, True)}, "
            f"{mood.get('turns', '-')} turns); one person or two, {show(person.get('balanced_accuracy'), 2, True)} over {person.get('pairs', '-')} pairs of turns; one voice or two in the halves of a turn, "
            f"{show(halves.get('balanced_accuracy'), 2, True)} over {halves.get('pairs', '-')} (chance 50 %).\n\n"
            f"Then the model (`{result['weights']['path']}`, {result['weights']['sha256']}): {result['conversations']} conversations, {result['turns']} turns, each speaker in the voice of an opening turn; "
            f"the brackets are intervals over conversations.\n\n{conditions}")
    faults = result["conditions"]["model"]["faults"]
    body += (f"\n\nOf the model's {faults['turns']} turns {faults['runaway']} were cut off, {faults['early_stop']} miss over 20 % of their words, {faults['silent_end']} end in over 1 s of silence.")
    return body + (f"\n\nSesame's two tests, rebuilt (the judge is CMU PocketSphinx, aligned once per pronunciation):\n\n{said}" if said else "")


# ----------------------------------------------------------------------------- many conversations

def add_conversation_flags(part) -> None:
    part.add_argument("--data", default="data/synthetic", help="folder of collect_data.py, several with commas between; default data/synthetic")
    part.add_argument("--split", default="test", help="test, validation, train, or several with commas between; default test")
    part.add_argument("--count", type=int, default=100, help="conversations; default 100")
    part.add_argument("--beside", type=int, default=30, help="of these, conversations of natural speech, codec and source TTS; default 30")
    part.add_argument("--again", type=int, default=5, help="conversations that a second ASR hears as well; default 5")
    part.add_argument("--jobs", type=int, default=0, help="processes; default one per core")
    part.add_argument("--cache", default="outputs/cache/evaluation", help="default outputs/cache/evaluation: what is kept there is not made again")
    config.add_flags(part, config.SamplingConfig, skip=("seed",))      # all of them: what evaluation_framework.py run has made is found again


def bench_conversations(args) -> tuple[dict, str]:
    """The scores of many conversations of the model beside natural ones, the codec alone and the source TTS (evaluation_framework.py run)."""
    import prosody
    import runtime
    from evaluation_run import evaluate
    from measuring import rounded
    asked = argparse.Namespace(**vars(args) | {"conversations": args.data, "jobs": args.jobs or runtime.cpu_count()})
    made, _ = evaluate(asked, prosody.load_models())
    result = rounded({name: made[name] for name in ("weights", "conversations", "turns", "beside")}
                     | {"conditions": {name: {k: v for k, v in part.items() if k != "offset_values"} for name, part in made["conditions"].items()}})
    return result, many_body(result)


def many_body(result: dict) -> str:
    from evaluation_framework import conditions_text
    faults = result["conditions"]["model"]["faults"]
    return (f"Weights `{result['weights']['path']}` ({result['weights']['sha256']}): {result['conversations']} conversations, {result['turns']} turns, each speaker in the voice of an opening turn; {result['beside']} of "
            f"them beside it as natural speech, codec and source TTS. What the scores are worth: the section before. Brackets are intervals over conversations.\n\n{conditions_text(result)}\n\n"
            f"Of the model's {faults['turns']} turns {faults['runaway']} were cut off, {faults['early_stop']} miss over 20 % of their words, {faults['silent_end']} end in over 1 s of silence.")
