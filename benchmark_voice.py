"""benchmark.py voice: what the model says and hears, against the bars of this project.

The main set are turns of the test split, each spoken after an earlier turn of either character and judged beside the
source TTS. Besides: special sets (numbers, names, questions, answers of one word, turns of about sixty words), one long
conversation, and test turns that the model writes down itself. Every utterance made is also looked at for its end.
"""
from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import config
from measuring import SECONDS, WORDS, hear, paired, percentiles, pick_turns, rounded, show, sound_of, summary, table

SETS, LONG, LISTEN = 50, 100, 50           # defaults of --sets, --long, --listen
PIECE = 240                                # characters that demo.py speaks at once; longer text is spoken in pieces
CUT_OFF = ("runaway", "max_seconds", "repeat")
MISSING, SHORT, FEW_WORDS = 0.2, 0.6, 5    # an early stop: so much of the words is missing; few words count only where the sound is short as well
QUIET_DB, QUIET_SECONDS = -50.0, 1.0       # a silent end: quieter than this for longer than this
ANSWERS = ("Yes.", "No.", "Maybe.", "Sure.", "Okay.", "Never.", "Always.", "Please.", "Thanks.", "Really?", "Sometimes.", "Tomorrow.", "Exactly.", "Perhaps.", "Sorry.", "Hello.")
SIXTY = (50, 65)                           # words of a long turn
SPECIAL = {"said numbers": "numbers and times that are said in the dialogues", "said names": "names that are said in the dialogues", "said word": "answers of one word that are said in the dialogues",
           "numbers": "numbers, times and years beside rare words", "names": "rare names", "questions": "questions", "one word": "answers of one word, every second a rare one",
           "sixty words": "turns of about 60 words"}
NUMBER = re.compile(r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million)\b", re.I)
NAME = re.compile(r"(?<=[a-z,] )(?!(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day)[A-Z][a-z]+")
FAULTS = {"runaway": "cut off by a guard", "early_stop": "over 20 % of the words missing", "silent_end": "over 1 s of silence at the end"}
NAMES = {"made": "**the model**", "codec": "codec only (the source through the model's codebooks)", "source": "source TTS"}


# ----------------------------------------------------------------------------- the model and its voices

def load_talker(args):
    """(model, codec, tokenizer, path of the weights)."""
    import checkpoint
    import runtime
    from text_tokenizer import load_tokenizer
    device, path = runtime.pick_device(args.device), args.checkpoint or checkpoint.default_checkpoint()
    codec = checkpoint.load_codec(args.codec, device=device)
    model = checkpoint.load_model(path, device=device, codec_fingerprint=codec.fingerprint)
    return model, codec, load_tokenizer(model.cfg.tokenizer), checkpoint.find(path)


def weights_name(path: Path) -> dict:
    """How the measured weights can be recognised: path inside the repository and the start of their SHA-256."""
    import hashlib
    file = path / "model.safetensors" if path.is_dir() else path
    shown = path.resolve().relative_to(Path(__file__).resolve().parent) if path.resolve().is_relative_to(Path(__file__).resolve().parent) else Path(path.name)
    return {"path": shown.as_posix(), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16]}


def contexts(turns: list[dict], index: int) -> dict[int, dict]:
    """Speaker -> its latest turn before turn `index` that is long enough to be its voice."""
    return {t["custom"]["speaker_index"]: t for t in turns[:index] if SECONDS[0] <= t["duration"] <= SECONDS[1]}


def session_with_voices(talker, data, turns: list[dict], index: int, sampling):
    """A session that has heard the latest earlier turn of each speaker as that speaker's voice, texts and reading positions known."""
    from dataset_pipeline import consumed_bytes
    from generation import Session
    model, codec, tokenizer, _ = talker
    session, size = Session(model, codec, tokenizer, sampling), codec.cfg.frame_size
    for speaker, turn in contexts(turns, index).items():
        audio = sound_of(data, turn)
        words = (turn["custom"].get("alignment") or {}).get("words")
        consumed = consumed_bytes(words, len(turn["text"].encode("utf-8")), -(-len(audio) // size), 1 / codec.cfg.frame_rate).tolist() if words else None
        session.set_voice(speaker, audio=audio, text=turn["text"], consumed=consumed)
    session.prepare(turns[index]["custom"]["speaker_index"])
    return session


def sampling_of(args, number: int):
    """How utterance `number` of the run is drawn."""
    return config.SamplingConfig(temperature=args.temperature, top_k=args.top_k, depth_temperature=args.depth_temperature, seed=args.seed + number)


def speakable(piece: str) -> bool:
    from text_tokenizer import normalise
    try:
        return bool(normalise(piece))
    except ValueError:
        return False


def utter(session, speaker: int, text: str, mood: str | None = None) -> dict:
    """`text` said as demo.py says it, in pieces where it is long -> {audio (N,), seconds, first_audio_ms, total_ms, ended, end_reason, pieces}."""
    import numpy as np
    from generation import split_text
    turns = [session.say(speaker, piece, mood) for piece in split_text(text, PIECE) if speakable(piece)]
    audio = np.concatenate([t.audio for t in turns])
    return {"audio": audio, "seconds": len(audio) / session.codec.cfg.sample_rate, "first_audio_ms": turns[0].first_audio_ms, "total_ms": sum(t.total_ms for t in turns),
            "ended": all(t.ended for t in turns), "end_reason": next((t.end_reason for t in turns if not t.ended), turns[-1].end_reason), "pieces": len(turns)}


# ----------------------------------------------------------------------------- how an utterance ends

def silence_at_end(audio, rate: int) -> float:
    """Seconds at the end of audio (N,) in which every 10 ms are below QUIET_DB of full scale."""
    import numpy as np
    step = rate // 100
    frames = np.asarray(audio, dtype=np.float64)[len(audio) % step:].reshape(-1, step)
    loud = np.flatnonzero(np.sqrt(np.mean(frames ** 2, 1)) >= 10 ** (QUIET_DB / 20)) if len(frames) else frames
    return (len(frames) - 1 - int(loud[-1])) * step / rate if len(loud) else len(audio) / rate


def stopped_early(heard: dict, seconds: float, source_seconds: float | None) -> bool:
    """Over MISSING of the words were not heard; of a text of a few words that counts only where the sound is also shorter than SHORT of the source."""
    import judges as judge
    found = judge.word_errors(heard["said"], heard["heard"])
    short = source_seconds is not None and seconds < SHORT * source_seconds
    return found["deletions"] > MISSING * found["words"] and (found["words"] >= FEW_WORDS or short)


def faults_of(made: dict, heard: dict, source_seconds: float | None, rate: int) -> dict:
    """What is wrong with the end of an utterance: {runaway, early_stop, silent_end}, each true or false."""
    return {"runaway": made["end_reason"] in CUT_OFF, "early_stop": stopped_early(heard, made["seconds"], source_seconds),
            "silent_end": silence_at_end(made["audio"], rate) > QUIET_SECONDS}


def count_faults(rows: list[dict]) -> dict:
    """How many utterances have which fault, how many have any, and the share of these with its interval."""
    import judges as judge
    any_ = [any(r["faults"].values()) for r in rows]
    return {"n": len(rows)} | {name: sum(r["faults"][name] for r in rows) for name in FAULTS} | {"any": sum(any_), "share": judge.bootstrap_interval([float(x) for x in any_])}


# ----------------------------------------------------------------------------- the main set

def cosines(audio, own, other) -> dict:
    """Cosines of the voice of audio (N,) to two embeddings (256,) or None: its own character's and the other one's."""
    import judges as judge
    voice = judge.speaker_embedding(audio)
    return {"voice": judge.speaker_similarity(voice, own), "other": judge.speaker_similarity(voice, other)}


def told_apart(own: list, other: list, draws: int = 2000, seed: int = 0) -> dict:
    """How surely a cosine to the own character exceeds one to the other character (area under the ROC curve), with its bootstrap interval over utterances."""
    import judges as judge
    import numpy as np
    pairs = [pair for pair in zip(own, other) if None not in pair]
    own, other, n = [a for a, _ in pairs], [b for _, b in pairs], len(pairs)
    result = {"mean": judge.separation(own, other), "low": None, "high": None, "n": n}
    if n > 1:
        a, b = np.array(own)[:, None], np.array(other)
        counts = np.random.default_rng(seed).multinomial(n, [1 / n] * n, draws)                  # (draws, n): how often each utterance is drawn
        areas = ((counts @ ((a > b) + 0.5 * (a == b))) * counts).sum(1) / n ** 2
        result["low"], result["high"] = (float(x) for x in np.percentile(areas, [2.5, 97.5]))
    return result


def speak_target(talker, args, turns: list[dict], index: int, number: int) -> dict:
    """The model says turn `index` of a conversation; judged beside the source and beside the codec's version of the source."""
    import judges as judge
    import torch
    from generation import codes_of_sound, sound_of_codes
    model, codec, _, _ = talker
    target, rate = turns[index], codec.cfg.sample_rate
    speaker, text = target["custom"]["speaker_index"], target["text"]
    session = session_with_voices(talker, args.data, turns, index, sampling_of(args, number))
    made = utter(session, speaker, text, target["custom"].get("mood") if args.moods else None)
    source, heard = sound_of(args.data, target), contexts(turns, index)
    own = judge.speaker_embedding(sound_of(args.data, heard[speaker]))
    others = [judge.speaker_embedding(sound_of(args.data, t)) for s, t in heard.items() if s != speaker][:1]
    other = others[0] if others else None
    sound = torch.from_numpy(source).view(1, 1, -1).to(next(codec.parameters()).device)
    copied = sound_of_codes(model.cfg, codec, codes_of_sound(model.cfg, codec, sound)).cpu().numpy()
    judged = {which: hear(audio, text) | cosines(audio, own, other) for which, audio in (("made", made["audio"]), ("source", source), ("codec", copied))}
    return {"set": "main", "id": target["id"]} | judged | made | {"source_seconds": len(source) / rate, "faults": faults_of(made, judged["made"], len(source) / rate, rate)}


def main_result(rows: list[dict]) -> dict:
    """The numbers of the main set from its rows."""
    import judges as judge
    reasons = [r["end_reason"] for r in rows]
    timed = [r for r in rows if r["seconds"] > 0]
    drops = [None if None in (r["made"]["mos"], r["source"]["mos"]) else r["source"]["mos"] - r["made"]["mos"] for r in rows]
    counted = count_faults(rows)
    return {"conditions": {which: summary([r[which] for r in rows]) for which in ("made", "codec", "source")}, "wer_over_source": paired(rows, "made", "source"),
            "mos_drop": judge.bootstrap_interval(drops), "other_voice": judge.bootstrap_interval([r["made"]["other"] for r in rows]),
            "separation": {which: told_apart([r[which]["voice"] for r in rows], [r[which]["other"] for r in rows]) for which in ("made", "source")},
            "ended": sum(bool(r["ended"]) for r in rows), "end_reasons": {x: reasons.count(x) for x in sorted(set(reasons))},
            **{name: counted[name] for name in ("n", *FAULTS)}, "length_ratio": judge.bootstrap_interval([r["seconds"] / r["source_seconds"] for r in rows]),
            "real_time_factor": percentiles([r["total_ms"] / 1000 / r["seconds"] for r in timed]), "first_audio_ms": percentiles([r["first_audio_ms"] for r in timed])}


# ----------------------------------------------------------------------------- special sets

def filled(template: str, rng: random.Random) -> str:
    """A template of synthetic_conversations.COVERAGE with words and names of the test split, as coverage_text fills it."""
    import synthetic_conversations as synthetic
    words, names = synthetic._coverage_words("test")
    if not re.search(r"\{[wWN]\}", template):
        template = "{W}. " + template
    draw = {"w": lambda: rng.choice(words), "W": lambda: rng.choice(words).capitalize(), "N": lambda: rng.choice(names), "n": lambda: str(rng.randint(2, 10 ** rng.randint(1, 4))),
            "k": lambda: str(rng.randint(2, 30)), "d": lambda: rng.choice(synthetic.DAYS), "y": lambda: str(rng.randint(1500, 2050)),
            "t": lambda: f"{rng.randint(1, 12)}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"}
    return re.sub(r"\{(\w)\}", lambda m: draw[m[1]](), template)


def written_sentences() -> list[list[str]]:
    """The sentences of each dialogue of the test split, in order; those of four words or more never occur in training."""
    import synthetic_conversations as synthetic
    return [[s for turn in d["turns"] for s in re.split(r"(?<=[.?!])\s+", turn["text"].strip())] for d in synthetic.dialogues()["test"]]


def long_texts(conversations: list[list[str]]) -> list[str]:
    """Consecutive sentences of a dialogue joined to SIXTY words; no sentence is used twice."""
    found = []
    for sentences in conversations:
        joined: list[str] = []
        for sentence in sentences:
            joined.append(sentence)
            while len(" ".join(joined).split()) > SIXTY[1]:
                joined.pop(0)
            if len(" ".join(joined).split()) >= SIXTY[0]:
                found.append(" ".join(joined))
                joined = []
    return found


def special_texts(count: int, seed: int) -> dict[str, list[str]]:
    """`count` texts of each special set, as they are spoken (numbers in words), from the test split alone; the same seed gives the same texts.

    What is said in the dialogues: turns with a number or a name in them, and sentences of one word (of which training has heard many).
    Beside rare words: sentences around numbers and names hold a word or a name that training never hears; questions have four words or
    more; of the answers of one word every second one is an everyday one, the others are words of the test split.
    """
    import synthetic_conversations as synthetic
    from judges import normalise_words
    from text_tokenizer import spoken
    rng, sentences = random.Random(f"special sets {seed}"), written_sentences()
    templates = {"numbers": [t for t in synthetic.COVERAGE if re.search(r"\{[nty]\}", t)], "names": [t for t in synthetic.COVERAGE if "{N}" in t and not re.search(r"\{[ntyk]\}", t)]}
    found = {name: [filled(rng.choice(of), rng) for _ in range(count)] for name, of in templates.items()}
    questions = sorted({s for part in sentences for s in part if s.endswith("?") and len(s.split()) >= WORDS[0]})
    found["questions"] = rng.sample(questions, min(count, len(questions)))
    found["one word"] = [filled("{W}.", rng) if k % 2 else ANSWERS[k // 2 % len(ANSWERS)] for k in range(count)]
    turns = long_texts(sentences)
    found["sixty words"] = rng.sample(turns, min(count, len(turns)))
    said = sorted({t["text"] for d in synthetic.dialogues()["test"] for t in d["turns"] if WORDS[0] <= len(t["text"].split()) <= WORDS[1]})
    alone = sorted({s for part in sentences for s in part if len(s) > 2 and len(s.split()) == 1 and normalise_words(s)})
    ordinary = {"said numbers": [t for t in said if NUMBER.search(t)], "said names": [t for t in said if NAME.search(t)], "said word": alone}
    found |= {name: rng.sample(of, min(count, len(of))) for name, of in ordinary.items()}
    return {name: [spoken(text) for text in found[name]] for name in SPECIAL}


def characters_of(data, conversations: list[list[dict]]) -> dict:
    """Character id -> synthetic_conversations.Character, drawn again as the collection drew it; none where its texts are others (another source or recipe)."""
    import synthetic_conversations as synthetic
    from text_tokenizer import normalise
    path = Path(data) / "collection.json"
    collection = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if collection.get("source") != "synthetic" or collection.get("version") != synthetic.VERSION:
        return {}
    found, wanted = {}, {turns[0]["recording_id"]: turns for turns in conversations}
    try:
        plan = synthetic.Plan(collection["seed"], collection["engine"], collection["kokoro_share"], texts=collection.get("texts", ""))
        for index in range(collection["conversations"]):
            script = plan.script(index)
            turns = wanted.get(script.id)
            texts = {f"{script.id}-{k:02d}": normalise(t["text"]) for k, t in enumerate(script.turns)} if turns else {}
            if turns and all(texts.get(t["id"]) == t["text"] for t in turns):
                found |= {c.id: c for c in script.characters}
    except (ValueError, KeyError):                                            # the texts that were read aloud are not here
        return {}
    return found


def special_rows(talker, args, picked) -> dict[str, list[dict]]:
    """Every text of the special sets said by the model in a test character's voice, and by the TTS that made this voice."""
    import synthetic_conversations as synthetic
    from tqdm import tqdm
    if not args.sets:
        return {}
    characters, rate, number = characters_of(args.data, [turns for turns, _ in picked]), talker[1].cfg.sample_rate, 0
    rows: dict[str, list[dict]] = {}
    for name, texts in special_texts(args.sets, args.seed).items():
        for text in tqdm(texts, desc=name, unit="turn"):
            turns, index = picked[number % len(picked)]
            number += 1
            session = session_with_voices(talker, args.data, turns, index, sampling_of(args, 10_000 + number))
            made = utter(session, turns[index]["custom"]["speaker_index"], text)
            who = characters.get(turns[index]["custom"].get("character"))
            source = synthetic.speak(text, who, (0.0, 0.0, 0.0, 0.0), args.seed + number).audio if who else None
            seconds, judged = None if source is None else len(source) / synthetic.SAMPLE_RATE, hear(made["audio"], text, mos=False)
            rows.setdefault(name, []).append({"set": name, "id": f"{name.replace(' ', '-')}-{len(rows.get(name, [])):03d}", "character": who.id if who else None, "made": judged,
                                              "source": None if source is None else hear(source, text, mos=False), "source_seconds": seconds,
                                              "faults": faults_of(made, judged, seconds, rate)} | made)
    return rows


def special_result(rows: dict[str, list[dict]]) -> dict | None:
    """Per set: words of the model, of the source, and the difference; null where there is no source."""
    out = {}
    for name, part in rows.items():
        both = [r for r in part if r["source"]]
        out[name] = {"made": summary([r["made"] for r in part]), "source": summary([r["source"] for r in both]) if both else None,
                     "wer_over_source": paired(both, "made", "source") if both else None, "faults": count_faults(part)}
    return out or None


# ----------------------------------------------------------------------------- listening

def listening_rows(talker, args) -> list[dict]:
    """Test turns written down by the model itself (its ear, else its text head): {said, heard}; none where it has neither."""
    import torch
    from generation import Session, codes_of_sound
    from tqdm import tqdm
    model, codec, tokenizer, _ = talker
    if not args.listen or (model.ear is None and model.text_head is None):
        return []
    session, rows = Session(model, codec, tokenizer), []
    for turns, i in tqdm(pick_turns(args.data, args.split, args.listen, args.seed), desc="listening", unit="turn"):
        sound = torch.from_numpy(sound_of(args.data, turns[i])).view(1, 1, -1).to(next(codec.parameters()).device)
        codes = codes_of_sound(model.cfg, codec, sound).long()
        rows.append({"said": turns[i]["text"], "heard": session.transcribe(codes, turns[i]["custom"]["speaker_index"])})
    return rows


# ----------------------------------------------------------------------------- a long conversation

def long_rows(talker, args, picked) -> list[dict]:
    """One conversation of args.long turns between the two characters of a test conversation, whose voices are set at its start.

    voice: cosine of a turn to the first turn of its character (None for that one). total_ms holds everything from the text being
    known to the last sound, refilling the window included. The texts are those of the split's dialogues, in order.
    """
    import judges as judge
    from dataset_pipeline import read_supervisions
    from tqdm import tqdm
    place = next(((turns, i) for turns, i in picked if len(contexts(turns, i)) == 2), None)
    if not args.long or place is None:
        return []
    rate, (turns, index) = talker[1].cfg.sample_rate, place
    texts = [t for ts in read_supervisions(Path(args.data), args.split).values() if len(ts) > 1 for t in ts if WORDS[0] <= len(t["text"].split()) <= WORDS[1]]
    session = session_with_voices(talker, args.data, turns, index, sampling_of(args, 50_000))
    first = turns[index]["custom"]["speaker_index"]
    speakers = [first, *(s for s in contexts(turns, index) if s != first)]
    rows, begun = [], {}
    for n in tqdm(range(args.long), desc="long", unit="turn"):
        speaker, given = speakers[n % 2], texts[n % len(texts)]
        made = utter(session, speaker, given["text"])
        voice, judged = judge.speaker_embedding(made["audio"]), hear(made["audio"], given["text"], mos=False)
        cosine = judge.speaker_similarity(voice, begun[speaker]) if speaker in begun else None
        if voice is not None:
            begun.setdefault(speaker, voice)
        rows.append({"set": "long", "id": f"long-{n:03d}", "speaker": speaker, "made": judged, "voice": cosine, "source_seconds": given["duration"],
                     "faults": faults_of(made, judged, given["duration"], rate)} | made)
    return rows


def tenths(rows: list) -> tuple[list, list]:
    """The first and the last tenth, two at least; nothing where these would overlap."""
    count = max(2, len(rows) // 10)
    return (rows[:count], rows[-count:]) if len(rows) >= 2 * count else ([], [])


def slope(places: list, values: list, draws: int = 2000, seed: int = 0) -> dict:
    """Least-squares slope of the values over their places, with its bootstrap interval over the pairs: {mean, low, high, n}."""
    import numpy as np
    x, y, n = np.array(places, dtype=np.float64), np.array(values, dtype=np.float64), len(values)
    if n < 2:
        return {"mean": None, "low": None, "high": None, "n": n}

    def fit(x, y):                                                            # (draws, n) -> (draws,)
        x = x - x.mean(-1, keepdims=True)
        spread = (x * x).sum(-1)
        return (x * y).sum(-1)[spread > 0] / spread[spread > 0]
    pick = np.random.default_rng(seed).integers(0, n, (draws, n))
    low, high = np.percentile(fit(x[pick], y[pick]), [2.5, 97.5])
    return {"mean": float(fit(x[None], y[None])[0]), "low": float(low), "high": float(high), "n": n}


def long_result(rows: list[dict]) -> dict | None:
    """Whether the voice drifts and whether turns take longer, from the rows of the long conversation."""
    import judges as judge
    if not rows:
        return None
    later = [(n, r["voice"]) for n, r in enumerate(rows) if r["voice"] is not None]
    voice = [judge.bootstrap_interval([v for _, v in part]) for part in tenths(later)]
    cost = [judge.bootstrap_interval([r["total_ms"] for r in part], weights=[r["seconds"] for r in part]) for part in tenths([r for r in rows if r["seconds"] > 0])]
    known = None not in (voice[0]["mean"], voice[1]["mean"]), None not in (cost[0]["mean"], cost[1]["mean"])
    return {"turns": len(rows), "made": summary([r["made"] for r in rows]), "voice": {"first": voice[0], "last": voice[1], "drop": voice[0]["mean"] - voice[1]["mean"] if known[0] else None,
            "slope_per_turn": slope([n for n, _ in later], [v for _, v in later])},
            "ms_per_second": {"first": cost[0], "last": cost[1], "ratio": cost[1]["mean"] / cost[0]["mean"] if known[1] else None}, "faults": count_faults(rows)}


# ----------------------------------------------------------------------------- the bench

def bench_voice(args) -> tuple[dict, str]:
    """Test sentences spoken by the model, each after a turn of the same character; special sets, a long conversation, listening."""
    import torch
    from tqdm import tqdm
    if min(args.sets, args.long, args.listen) < 0:
        raise ValueError("--sets, --long and --listen count utterances: use 0 for none")
    talker = load_talker(args)
    picked = pick_turns(args.data, args.split, args.turns, args.seed, same_speaker_before=True)
    clock = [time.perf_counter()]

    def taken(result):
        clock.append(time.perf_counter())
        return result
    with torch.inference_mode():
        session_with_voices(talker, args.data, *picked[0], config.SamplingConfig(max_seconds=1.0)).say(0, "a warm up.")
        taken(None)
        rows = taken([speak_target(talker, args, turns, i, n) for n, (turns, i) in enumerate(tqdm(picked, desc="voice", unit="turn"))])
        special, long, listened = taken(special_rows(talker, args, picked)), taken(long_rows(talker, args, picked)), taken(listening_rows(talker, args))
    said = [*rows, *(r for part in special.values() for r in part), *long]
    save_sounds(Path(args.save), said, talker[1].cfg.sample_rate)
    counts = {"main": len(rows), "special": sum(map(len, special.values())), "long": len(long), "listening": len(listened)}
    result = main_result(rows) | {"sets": special_result(special), "long": long_result(long), "listening": summary(listened) if listened else None, "faults": count_faults(said),
                                  "weights": weights_name(talker[3]), "codec_fingerprint": talker[1].fingerprint, "device": args.device, "moods": args.moods,
                                  "sampling": {k: getattr(args, k) for k in ("temperature", "top_k", "depth_temperature")},
                                  "seconds_per_utterance": {name: (b - a) / n if n else None for (name, n), a, b in zip(counts.items(), clock[1:], clock[2:])}}
    result["bars"] = bars(result)
    return result, voice_body(result)


def save_sounds(folder: Path, rows: list[dict], rate: int) -> None:
    """What was said, to listen to, with what was heard beside it."""
    import audio_io
    import runtime
    for row in rows:
        if len(row["audio"]):
            audio_io.write_audio(folder / f"{row['id']}.wav", row["audio"], rate)
    plain = [{k: v for k, v in row.items() if k != "audio"} for row in rows]
    runtime.atomic_write(folder / "turns.jsonl", "".join(json.dumps(rounded(row), ensure_ascii=False) + "\n" for row in plain))


# ----------------------------------------------------------------------------- bars

def bars(result: dict) -> list[dict]:
    """What this project asks of its model: {what, bar, value, low, high, met}; value and met are None where it was not measured."""
    found, made = [], result["conditions"]["made"]
    reach = {"at most": lambda a, b: a <= b, "at least": lambda a, b: a >= b, "under": lambda a, b: a < b}

    def bar(what, limit, value, kind="at most", scale=1.0):
        value = value if isinstance(value, dict) else {"mean": value}
        mean, low, high = (None if value.get(k) is None else scale * value[k] for k in ("mean", "low", "high"))
        found.append({"what": what, "bar": f"{kind} {limit:g}", "value": mean, "low": low, "high": high, "met": None if mean is None else bool(reach[kind](mean, limit))})
    bar("word error, %", 5, made["wer"], scale=100)
    bar("word error, points above the source", 3, result["wer_over_source"], scale=100)
    for name, label in SPECIAL.items():
        bar(f"word error, {label}, %", 8, ((result["sets"] or {}).get(name) or {}).get("made", {}).get("wer"), scale=100)
    bar(f"runaway, early stop or silent end, % of {result['faults']['n']} utterances", 0.2, result["faults"]["share"], scale=100)
    bar("voice, cosine to the character's context", 0.85, made.get("voice"), "at least")
    bar("own character told from the other one", 0.97, result["separation"]["made"], "at least")
    bar("DistillMOS, drop from the source", 0.4, result["mos_drop"])
    bar("listening: word error, %", 15, (result["listening"] or {}).get("wer"), scale=100)
    bar("real-time factor, median", 0.4, result["real_time_factor"]["p50"], "under")
    bar("first sound, ms, median", 60, result["first_audio_ms"]["p50"])
    bar("first sound, ms, 95 % of turns", 120, result["first_audio_ms"]["p95"])
    long = result["long"] or {"voice": {"drop": None}, "ms_per_second": {"ratio": None}}
    bar("long conversation: voice, drop from the first to the last tenth", 0.05, long["voice"]["drop"])
    bar("long conversation: time, last tenth against the first", 1.1, long["ms_per_second"]["ratio"])
    found.append({"what": "mood", "bar": "-", "value": None, "low": None, "high": None, "met": None})
    return found


# ----------------------------------------------------------------------------- the section's text

def bars_table(found: list[dict]) -> str:
    said = {True: "met", False: "**missed**", None: "-"}
    return table(["bar", "", "measured", ""], [[b["what"], b["bar"], show({"mean": b["value"], "low": b["low"], "high": b["high"]}), said[b["met"]]] for b in found])


def more_body(result: dict) -> str:
    """Ends, special sets, the long conversation, listening and the bars, as far as they were measured."""
    ends, apart, long, listened = result["faults"], result["separation"], result["long"], result["listening"]
    body = (f"\n\nOf all {ends['n']} utterances of the run {', '.join(f'{ends[name]} {label}' for name, label in FAULTS.items())}; {ends['any']} with any of these. Cut off: no end by "
            f"itself ({', '.join(CUT_OFF)}). Words missing: deletions in what Whisper heard; of a text under {FEW_WORDS} words only where the sound is also shorter than {SHORT:g} of the source. Silence: "
            f"below {QUIET_DB:g} dBFS. Cosines to the own character's context exceed those to the other character's in {show(apart['made'], 2, True)} of pairs (source {show(apart['source'], 2, True)}).")
    if result["sets"]:
        rows = [[SPECIAL[name], str(s["made"]["n"]), show(s["made"]["wer"], 2, True), show((s["source"] or {}).get("wer"), 2, True), show(s["wer_over_source"], 2, True), str(s["faults"]["any"])]
                for name, s in result["sets"].items()]
        body += "\n\nTexts of the test split, in the voices of test characters:\n\n" + table(["set", "n", "word error", "source TTS", "difference", "bad ends"], rows)
    if long:
        voice, cost = long["voice"], long["ms_per_second"]
        body += (f"\n\nOne conversation of {long['turns']} turns: cosine of a turn to its character's first turn {show(voice['first'])} in the first tenth, {show(voice['last'])} in the last, slope "
                 f"{show(voice['slope_per_turn'], 4)} per turn; {show(cost['first'], 0)} ms per second of sound in the first tenth, {show(cost['last'], 0)} in the last; word error {show(long['made']['wer'], 2, True)}.")
    if listened:
        body += f"\n\nWritten down by the model itself: {listened['n']} turns, word error {show(listened['wer'], 2, True)}."
    return body + "\n\n" + bars_table(result["bars"])


def voice_body(result: dict) -> str:
    """The section's text, also for the model's card."""
    body = table(["speech", "turns", "word error", "turns more than half wrong", "DistillMOS", "voice, cosine to an earlier turn"],
                 [[NAMES[k], str(s["n"]), show(s["wer"], 2, True), str(s["over_half_wrong"]), show(s.get("mos")), show(s.get("voice"))] for k, s in result["conditions"].items()])
    rtf, first, n = result["real_time_factor"], result["first_audio_ms"], result["n"]
    reasons = ", ".join(f"{k} {v}" for k, v in result["end_reasons"].items())
    body += (f"\n\nWeights `{result['weights']['path']}` ({result['weights']['sha256']}). Ended by themselves {result['ended']} of {n} ({reasons}); "
             f"word error above the source by {show(result['wer_over_source'], 2, True)}; length against the source {show(result['length_ratio'])}. Cosine of the made voice to the other character "
             f"{show(result['other_voice'])}. Real-time factor {show(rtf['p50'])} (p95 {show(rtf['p95'])}); first sound after {show(first['p50'], 0)} ms (p95 {show(first['p95'], 0)}).")
    return body + (more_body(result) if result.get("bars") else "")


def add_flags(part) -> None:
    config.add_flags(part, config.SamplingConfig, only=("temperature", "top_k", "depth_temperature"))
    part.add_argument("--moods", action="store_true", help="give the mood of each turn")
    part.add_argument("--sets", type=int, default=SETS, help=f"utterances of each special set (numbers, names, ...); 0: none; default {SETS}")
    part.add_argument("--long", type=int, default=LONG, help=f"turns of the long conversation; 0: none; default {LONG}")
    part.add_argument("--listen", type=int, default=LISTEN, help=f"turns that the model writes down; 0: none; default {LISTEN}")
    part.add_argument("--save", default="outputs/benchmark/voice", help="folder for what was said; default outputs/benchmark/voice")
