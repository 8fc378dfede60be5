"""benchmark.py ear: what the model writes down of what it hears, beside Whisper on the same sounds.

Turns of characters and texts that were never trained on, and, with --recordings, of people. Three readers of the same codes: the
letters alone; letters and words together, as in conversations; and Whisper on the sound that these codes give, which says how much
of the words is in them. Times: from the sound to its words, the codec included.
"""
from __future__ import annotations

import time

from benchmark_codec import recordings
from benchmark_voice import load_talker, weights_name
from measuring import percentiles, pick_turns, rounded, show, sound_of, table

NAMES = {"words": "**the model's ear**", "letters": "its letters alone, no words known", "codec": "Whisper, through the codec", "whisper": "Whisper"}


def readers(talker) -> dict:
    """name -> function from a sound (N,) at 24 kHz to text."""
    import judges
    import torch
    from generation import Session, codes_of_sound, sound_of_codes
    model, codec, tokenizer = talker[:3]
    session, device = Session(model, codec, tokenizer), next(codec.parameters()).device

    def codes(sound):
        return codes_of_sound(model.cfg, codec, torch.from_numpy(sound).view(1, 1, -1).to(device))

    def through_codec(sound):
        return judges.transcribe(sound_of_codes(model.cfg, codec, codes(sound)).cpu().numpy())
    return {"words": lambda sound: session.transcribe(codes(sound)), "letters": lambda sound: model.ear.transcribe(codes(sound) + model.cfg.code_offset),
            "codec": through_codec, "whisper": judges.transcribe}


def rows_of(sounds: list[tuple], talker, what: str) -> list[dict]:
    """(text, sound (N,)) -> {said, seconds, name of reader: heard, name_ms}."""
    import torch
    from tqdm import tqdm
    read, rows = readers(talker), []
    for function in read.values():
        function(sounds[0][1])                                   # what loads on first use
    for text, sound in tqdm(sounds, desc=f"listening, {what}", unit="turn"):
        row = {"said": text, "seconds": len(sound) / 24000}
        for name, function in read.items():
            start = time.perf_counter()
            with torch.inference_mode():
                row[name] = function(sound)
            row[f"{name}_ms"] = 1000 * (time.perf_counter() - start)
        rows.append(row)
    return rows


def summary(rows: list[dict]) -> dict:
    import judges
    said = [row["said"] for row in rows]
    return {"turns": len(rows), "seconds": sum(row["seconds"] for row in rows),
            "readers": {name: {"wer": judges.word_error_interval(said, [row[name] for row in rows]), "ms": percentiles([row[f"{name}_ms"] for row in rows])} for name in NAMES}}


def bench_ear(args) -> tuple[dict, str]:
    """What the model writes down of turns of unseen characters and of people, beside Whisper on the same sounds."""
    talker = load_talker(args)
    if talker[0].ear is None:
        raise ValueError("these weights have no ear: name others with --checkpoint, or train one (python train_ear.py)")
    picked = [(turns[i]["text"], sound_of(args.data, turns[i])) for turns, i in pick_turns(args.data, args.split, args.turns, args.seed)]
    rows = {"characters never trained on": rows_of(picked, talker, "characters")}
    if args.recordings:
        rows["people"] = rows_of(recordings(args.recordings, args.transcripts, args.people, args.seed), talker, "people")
    result = {"weights": weights_name(talker[3]), "sets": {name: summary(each) for name, each in rows.items()}, "shown": {name: [{k: r[k] for k in ("said", "words", "letters")} for r in each[:10]] for name, each in rows.items()}}
    value = result["sets"]["characters never trained on"]["readers"]["words"]["wer"]["mean"]
    result["bars"] = [{"what": "listening: word error of its own transcripts of unseen characters, %", "bar": 15, "value": 100 * value, "met": 100 * value <= 15}]
    return rounded(result), ear_body(result)


def ear_body(result: dict) -> str:
    body = [f"Weights `{result['weights']['path']}` ({result['weights']['sha256']})."]
    for name, found in result["sets"].items():
        body.append(f"{found['turns']} turns, {name} ({found['seconds'] / 60:.1f} minutes):\n\n" + table(["who reads", "word error", "ms a turn, median", "p95"], [
            [NAMES[reader], show(r["wer"], 1, True), show(r["ms"]["p50"], 0), show(r["ms"]["p95"], 0)] for reader, r in found["readers"].items()]))
    body.append(table(["said", "heard"], [[row["said"], row["words"]] for row in result["shown"]["characters never trained on"]]))
    body.append(table(["bar", "", "measured", ""], [[b["what"], f"at most {b['bar']}", show(b["value"]), "met" if b["met"] else "**missed**"] for b in result["bars"]]))
    return "\n\n".join(body)


def add_flags(part) -> None:
    part.add_argument("--recordings", default="", metavar="DIR", help="recordings of people; default none")
    part.add_argument("--transcripts", default="", metavar="FILE", help="what they say: lines `name: text`, plain or .gz; default NAME.txt beside each")
    part.add_argument("--people", type=int, default=100, help="of these; default 100")
