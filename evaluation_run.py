"""A model's conversations beside what they could be: natural ones, the same through the codec, and a TTS that knows no context.

The model speaks through demo.py (`Lab.converse`), one session per conversation, each speaker in the voice of an opening turn.
Everything that is made is kept in the cache folder under a name drawn from weights, settings and texts.

Conditions: `natural` (the recordings: the topline), `codec` (the recordings through the codec, with the codebooks the model uses: what the
model could reach at most), `source` (the pipeline: the source TTS speaks turn by turn in the same voices, without mood or context) and `model`.
"""
from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import config
import conversation_metrics as metrics
import demo
import validity
from corruptions import retimed
from dataset_pipeline import data_folders
from dialogue import RATE, Dialogue, Turn, fingerprint

CONDITIONS = ("natural", "codec", "source", "model")
NAMES = {"natural": "natural (topline)", "codec": "codec only", "source": "pipeline: source TTS, turn by turn", "model": "**the model**"}
VOICE_SECONDS = (1.0, 12.0)     # length of an opening turn that can be a speaker's voice
QUIET_END = 1.0                 # s after the last speech: a silent end
MISSING, FEW_WORDS = 0.2, 3     # over this share of the words not heard, of texts with at least so many: an early stop


# ----------------------------------------------------------------------------- what is to be spoken

def opening(talk: Dialogue) -> int | None:
    """How many first turns are heard, so that everybody who speaks in the rest (two turns at least) has a voice; None where that cannot be."""
    for count in range(1, len(talk.turns) - 1):
        known = {t.speaker for t in talk.turns[:count] if VOICE_SECONDS[0] <= t.seconds <= VOICE_SECONDS[1]}
        if {t.speaker for t in talk.turns[count:]} <= known:
            return count
    return None


def plan_natural(talk: Dialogue) -> tuple[demo.Conversation, Dialogue] | None:
    """What the model is asked to say, with voices from the opening turns, and the natural turns that it stands beside; None where nothing fits."""
    count = opening(talk)
    if count is None:
        return None
    voices = {t.speaker: t.audio for t in talk.turns[:count] if VOICE_SECONDS[0] <= t.seconds <= VOICE_SECONDS[1]}
    rest = talk.with_turns(talk.turns[count:])
    first = {speaker: rest.of(speaker)[0] for speaker in rest.speakers}
    turns = [demo.PlannedTurn(t.speaker, t.text, t.mood, voices[t.speaker] if first[t.speaker] == i else None) for i, t in enumerate(rest.turns)]
    return demo.Conversation(talk.id, turns), rest


def read_plans(args) -> tuple[list[demo.Conversation], list[Dialogue] | None]:
    """What --conversations names: a JSON file as demo.py's batch mode takes it, or a data folder, whose natural conversations come along."""
    if Path(args.conversations).is_file():
        found, warnings = demo.read_conversations(Path(args.conversations))
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return (found[:args.count] if args.count else found), None
    pairs = [pair for pair in map(plan_natural, natural_of(args.conversations, args.split, args.seed)) if pair]
    pairs = pairs[:args.count] if args.count else pairs
    if not pairs:
        raise ValueError(f"no conversation of the {args.split} split of {args.conversations} has an opening and two turns after it: collect more")
    return [c for c, _ in pairs], [rest for _, rest in pairs]


def natural_of(data: str, split: str, seed: int) -> list[Dialogue]:
    """Conversations of several turns of all folders and splits (both with commas between), one place after the other. ValueError for one that is not there."""
    folders, splits = data_folders(data), [part.strip() for part in split.split(",")]
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise ValueError(f"there is no {missing[0]}: give --conversations a JSON file (examples/conversations.json) or folders of collect_data.py")
    if unknown := set(splits) - {"train", "validation", "test"}:
        raise ValueError(f"--split {sorted(unknown)[0]}: use test, validation or train, several with commas between")
    found = []
    for folder in folders:
        for part in splits:
            found += [named_apart(talk, folder) if len(folders) > 1 else talk for talk in validity.natural_talks(folder, part, 0, seed)]
    return found


def named_apart(talk: Dialogue, folder) -> Dialogue:
    """Each collection counts its conversations and speakers from 0."""
    place = Path(folder).name
    return Dialogue(f"{place}-{talk.id}", tuple(replace(turn, speaker=f"{place}-{turn.speaker}") for turn in talk.turns))


# ----------------------------------------------------------------------------- keeping what was made

def made_file(folder, key: str) -> Path:
    return Path(folder) / f"made-{key}.npz"


def kept(folder, key: str, make) -> tuple[list[np.ndarray], list]:
    """Sounds [(N,), ...] and a JSON value of make(), kept in folder/made-<key>.npz as 16-bit samples."""
    import runtime
    path = made_file(folder, key)
    try:
        with np.load(path, allow_pickle=False) as file:
            sounds = [file[f"s{i}"].astype(np.float32) / 32767 for i in range(len(file.files) - 1)]
            return sounds, json.loads(str(file["facts"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):                # not there, or torn: made anew
        pass
    sounds, facts = make()
    arrays = {f"s{i}": np.round(np.clip(s, -1, 1) * 32767).astype(np.int16) for i, s in enumerate(sounds)}
    runtime.atomic_write(path, lambda file: np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays))
    return [a.astype(np.float32) / 32767 for a in arrays.values()], facts


class Speaker:
    """The model behind demo.Lab, loaded when it is first needed."""

    def __init__(self, args):
        import checkpoint
        from benchmark_voice import weights_name
        self.args, self._lab = args, None
        self._name = weights_name(checkpoint.find(args.checkpoint or checkpoint.default_checkpoint()))

    @property
    def lab(self) -> demo.Lab:
        if self._lab is None:
            given = demo.build_parser().parse_args([])
            for name in ("checkpoint", "codec", "device", *config.SamplingConfig.__dataclass_fields__):
                if hasattr(self.args, name):
                    setattr(given, name, getattr(self.args, name))
            self._lab = demo.Lab(given)
        return self._lab

    def name(self) -> dict:
        """{path, sha256} of the weights."""
        return self._name

    def settings(self) -> tuple:
        sampling = sorted((k, getattr(self.args, k)) for k in config.SamplingConfig.__dataclass_fields__ if hasattr(self.args, k))
        return self.name()["sha256"], str(self.args.codec), sampling

    def converse(self, plan: demo.Conversation) -> tuple[list[np.ndarray], list]:
        import torch
        lab = self.lab                                                         # weights loaded inside inference mode would be inference tensors
        with torch.inference_mode():
            return spoken_by(lab, plan)

    def through_codec(self, sounds: list[np.ndarray]) -> list[np.ndarray]:
        """Sounds with only what the model's codebooks hold of them."""
        import torch
        from generation import codes_of_sound, sound_of_codes
        model, codec, out = self.lab.model, self.lab.codec, []
        with torch.inference_mode():
            for sound in sounds:
                given = torch.from_numpy(np.ascontiguousarray(sound)).view(1, 1, -1).to(self.lab.device)
                made = sound_of_codes(model.cfg, codec, codes_of_sound(model.cfg, codec, given)).cpu().numpy()
                out.append(np.pad(made, (0, max(0, len(sound) - len(made))))[:len(sound)])
        return out


# ----------------------------------------------------------------------------- the conditions

def spoken_by(lab: demo.Lab, plan: demo.Conversation) -> tuple[list[np.ndarray], list[dict]]:
    """The turns' sounds and their facts, in a new session."""
    spoken = list(lab.converse(plan))
    return [s.audio for s in spoken], [{"speaker": s.speaker, "text": s.text, "ended": s.ended, "first_audio_ms": s.first_audio_ms, "total_ms": s.total_ms} for s in spoken]


def spoken_talk(plan: demo.Conversation, sounds: list[np.ndarray], facts: list[dict]) -> Dialogue:
    """An answer begins when the turn before it is over and the time to its first sound has passed."""
    turns, clock = [], 0.0
    for planned, sound, fact in zip(plan.turns, sounds, facts):
        start = clock + (fact["first_audio_ms"] or 0.0) / 1000 if turns else 0.0
        turns.append(Turn(fact["speaker"], fact["text"], sound, start, planned.mood, fact))
        clock = start + len(sound) / RATE
    return Dialogue(plan.id, tuple(turns))


def model_talk(speaker: Speaker, plan: demo.Conversation, folder) -> Dialogue:
    """What the model says (see spoken_talk), kept in the folder."""
    return spoken_talk(plan, *kept(folder, model_key(speaker, plan), lambda: speaker.converse(plan)))


def model_key(speaker: Speaker, plan: demo.Conversation) -> str:
    return validity.digest("model", speaker.settings(), [(t.speaker, t.text, t.mood, None if t.voice is None else fingerprint(t.voice)) for t in plan.turns])


def model_talks(args, speaker: Speaker, plans: list, folder) -> list[Dialogue]:
    """model_talk of every plan, with a bar. What is not kept yet is spoken by args.jobs processes of one thread each, where a CPU speaks."""
    from tqdm import tqdm
    with tqdm(total=len(plans), desc="speaking", unit="conversation", file=sys.stderr) as bar:
        missing = [plan for plan in plans if not made_file(folder, model_key(speaker, plan)).exists()]
        bar.update(len(plans) - len(missing))
        alone = args.jobs < 2 or len(missing) < 2 or str(args.device) != "cpu"
        done = map(lambda plan: model_talk(speaker, plan, folder), missing) if alone else validity.spread(_speak_here, [(args, plan, folder) for plan in missing], args.jobs)
        for _ in done:
            bar.update()
    return [model_talk(speaker, plan, folder) for plan in plans]


_HERE: dict = {}                # a process that speaks keeps its model


def _speak_here(job: tuple) -> None:
    """In a process of its own: (args, plan, folder) -> the file that model_talk keeps."""
    args, plan, folder = job
    if "speaker" not in _HERE:
        _HERE["speaker"] = Speaker(args)
    model_talk(_HERE["speaker"], plan, folder)


def codec_talk(speaker: Speaker, talk: Dialogue, folder) -> Dialogue:
    key = validity.digest("codec", speaker.settings()[:2], [fingerprint(t.audio) for t in talk.turns])
    sounds, _ = kept(folder, key, lambda: (speaker.through_codec([t.audio for t in talk.turns]), []))
    return retimed(talk, sounds)


def characters_of(data) -> dict:
    """Speaker -> synthetic Character of synthetic collections; {} for other data."""
    import synthetic_conversations as synthetic
    folders, found = data_folders(data), {}
    try:
        for folder in folders:
            lines = (Path(folder) / "index.jsonl").read_text(encoding="utf-8").splitlines()
            rows, place = [json.loads(line) for line in lines if line.strip()], f"{Path(folder).name}-" * (len(folders) > 1)
            found |= {place + c["id"]: synthetic.Character(**c) for row in rows for c in row.get("characters", ())}
        return found
    except (OSError, ValueError, TypeError):
        return {}


def source_talk(talk: Dialogue, characters: dict, folder) -> Dialogue:
    """The source TTS: every turn for itself, in the speaker's voice, without a mood and without what was said before."""
    import synthetic_conversations as synthetic
    whos = {s: characters.get(s) or synthetic.draw_character(s, "hibari", synthetic.rng_of("evaluation", k)) for k, s in enumerate(talk.speakers)}

    def make():
        return [synthetic.speak(t.text, whos[t.speaker], (0.0, 0.0, 0.0, 0.0), i).audio for i, t in enumerate(talk.turns)], []
    sounds, _ = kept(folder, validity.digest("source", synthetic.VERSION, [(str(whos[t.speaker]), t.text) for t in talk.turns]), make)
    return retimed(talk, sounds)


def end_faults(talk: Dialogue, measured: list[dict]) -> list[dict]:
    """Per turn {runaway: cut off, early_stop: words missing, silent_end}; the first is None where nobody knows whether it ended by itself."""
    import judges
    found = []
    for fact, text, m in zip([t.facts for t in talk.turns], [t.text for t in talk.turns], measured):
        errors = judges.word_errors(text, m["heard"] or "")
        ended = fact.get("ended")
        quiet = m["seconds"] - (m["units"][-1][1] if m["units"] else 0.0)
        found.append({"runaway": None if ended is None else not ended, "early_stop": m["heard"] is not None and errors["words"] >= FEW_WORDS and errors["deletions"] > MISSING * errors["words"],
                      "silent_end": quiet > QUIET_END})
    return found


def second_ears(talks: list[Dialogue], how: validity.Listening) -> list[tuple[str, str]]:
    """(text, what PocketSphinx hears) of the turns, kept in the folder; [] where it is not installed."""
    from tqdm import tqdm
    if importlib.util.find_spec("pocketsphinx") is None:
        return []
    turns = [turn for talk in talks for turn in talk.turns]
    jobs = [(turn.audio, how.folder) for turn in turns]
    missing = [job for job in jobs if not _again_file(job).exists()]
    for _ in tqdm(validity.spread(_hear_again, missing, how.jobs), desc="a second ASR", unit="turn", initial=len(jobs) - len(missing), total=len(jobs), disable=not missing, file=sys.stderr):
        pass
    return [(turn.text, _hear_again(job)) for turn, job in zip(turns, jobs)]


def _again_file(job: tuple) -> Path:
    return Path(job[1]) / f"again-{validity.digest(fingerprint(job[0]))}.json"


def _hear_again(job: tuple) -> str:
    """(audio, folder) -> what PocketSphinx hears, from the folder or heard now."""
    import runtime
    try:
        return json.loads(_again_file(job).read_text(encoding="utf-8"))["heard"]
    except (OSError, ValueError, KeyError):                                    # not there, or torn
        heard = metrics.transcribe_again(job[0])
        runtime.write_json(_again_file(job), {"heard": heard})
        return heard


# ----------------------------------------------------------------------------- the whole

def evaluate(args, models: dict, conditions=CONDITIONS) -> tuple[dict, dict]:
    """(result for JSON, condition -> Dialogues with sound). result: conditions -> {scores, parts, faults, wer, wer_again}, conversations, weights."""
    from tqdm import tqdm
    plans, natural = read_plans(args)
    speaker, how = Speaker(args), validity.Listening(args.cache, jobs=args.jobs)
    Path(how.folder).mkdir(parents=True, exist_ok=True)
    wanted = [c for c in conditions if natural is not None or c in ("model", "source")]
    talks: dict[str, list] = {}
    if "model" in wanted:
        talks["model"] = model_talks(args, speaker, plans, how.folder)
    natural = None if natural is None else natural[:args.beside or None]
    known = natural if natural is not None else talks["model"][:args.beside or None]
    characters = characters_of(args.conversations) if natural is not None else {}
    if natural is not None:
        talks["natural"] = natural
    if "source" in wanted:
        talks["source"] = [source_talk(talk, characters, how.folder) for talk in tqdm(known, desc="source TTS", unit="conversation", file=sys.stderr)]
    if "codec" in wanted:
        talks["codec"] = [codec_talk(speaker, talk, how.folder) for talk in tqdm(natural, desc="codec", unit="conversation", file=sys.stderr)]
    talks = {c: talks[c] for c in CONDITIONS if c in talks}
    heard = iter(validity.measure([talk for part in talks.values() for talk in part], how)[None])               # all at once: one bar, and processes start once
    again = iter(second_ears([talk for part in talks.values() for talk in part[:args.again]], how))
    checked = {c: [pair for talk in part[:args.again] for _, pair in zip(talk.turns, again)] for c, part in talks.items()}
    scored = {c: _condition(part, [rows for _, rows in (next(heard) for _ in part)], models, checked[c]) for c, part in talks.items()}
    result = {"conversations": len(plans), "turns": sum(len(p.turns) for p in plans), "weights": speaker.name(), "beside": len(known), "conditions": {c: s[0] for c, s in scored.items()},
              "per_conversation": {c: s[1] for c, s in scored.items()}}
    return result, talks


def moods_told(talks: list, rows: list[dict]) -> dict | None:
    """Share of turns whose mood asked for is the likeliest one heard, and chance: that of always saying the most frequent mood. None where no mood was asked for."""
    import judges
    told = [row["mood"] for row in rows if row["mood"]["parts"].get("accuracy") is not None]
    asked = [t.mood for talk in talks for t in talk.turns if t.mood]
    if not told or not asked:
        return None
    turns = [one["parts"]["turns"] for one in told]
    interval = judges.bootstrap_interval([one["parts"]["accuracy"] * n for one, n in zip(told, turns)], weights=turns)
    return {"accuracy": interval, "turns": sum(turns), "chance": max(map(asked.count, set(asked))) / len(asked)}


def _condition(talks: list, measured: list[list[dict]], models: dict, checked: list[tuple]) -> tuple[dict, list]:
    """One condition, its turns measured and some (text, heard) by a second ASR: summary over conversations, and one row per conversation."""
    import judges
    rows = [metrics.score(talk, part, models) for talk, part in zip(talks, measured)]
    faults = [f for talk, part in zip(talks, measured) for f in end_faults(talk, part)]
    pairs = [(t.text, m["heard"]) for talk, part in zip(talks, measured) for t, m in zip(talk.turns, part)]
    offsets = [o for talk, part in zip(talks, measured) for o in metrics.turn_taking.floor_transfers(metrics.speech_spans(talk, part))]
    waits = [t.facts["first_audio_ms"] for talk in talks for t in talk.turns if t.facts.get("first_audio_ms") is not None]
    known = [f["runaway"] for f in faults if f["runaway"] is not None]
    summary = {"scores": metrics.summary(rows), "wer": judges.word_error_interval(*map(list, zip(*pairs))), "wer_again": judges.word_error_interval(*map(list, zip(*checked))) if checked else None,
               "faults": {"turns": len(faults), "runaway": sum(known) if known else None, "early_stop": sum(f["early_stop"] for f in faults), "silent_end": sum(f["silent_end"] for f in faults)},
               "offsets": metrics.turn_taking.offset_facts(offsets), "first_audio_ms": float(np.median(waits)) if waits else None, "mood": moods_told(talks, rows)}
    conversations = [{"id": talk.id, "scores": row, "turns": [{"speaker": t.speaker, "text": t.text, "mood": t.mood, "heard": m["heard"], "mos": m["mos"], "start": t.start, "seconds": m["seconds"],
                                                                "reason": m["reason"]} for t, m in zip(talk.turns, part)]} for talk, part, row in zip(talks, measured, rows)]
    return summary | {"offset_values": offsets}, conversations


# ----------------------------------------------------------------------------- Sesame's two tests

def pronunciation_tests(args) -> dict:
    """Homographs and continuation by the model and by the source TTS, with the judge's own tests and the controls (see pronunciation.py)."""
    import pronunciation as said
    import synthetic_conversations as synthetic
    from generation import Session
    speaker, voices = Speaker(args), args.voices
    lab = speaker.lab
    judged = {"hibari": said.tally(said.judge_rows(args.judge_voices)), "text swapped": said.tally(said.judge_rows(args.judge_voices, swapped=True))}

    def voice_of(number):
        return said.drawn_voice(1000 + number)

    def session(number, prompt=None, text=None, same=True):
        made = Session(lab.model, lab.codec, lab.tokenizer, replace(lab.sampling, seed=lab.sampling.seed + number))
        calm = "It was a quiet day and we had time to talk."
        for who in (0, 1):
            made.set_voice(who, audio=synthetic.speak(calm, said.drawn_voice(number) if who == 0 else voice_of(number)).audio, text=calm.lower())
        if prompt is not None:
            made.add_turn(0 if same else 1, text, prompt)
        made.prepare(0)
        return made

    def say(text, number):
        return session(number).say(0, text).audio

    def say_after(prompt_text, prompt, text, same, number):
        return session(number, prompt, prompt_text, same).say(0, text).audio
    import torch
    with torch.inference_mode():
        rows = {"model": said.homographs(say, voices), "source": said.homographs(lambda text, n: synthetic.speak(text, said.drawn_voice(n)).audio, voices, label="source TTS")}
        kept_on = {how: said.tally(said.continuation(say_after, voices, how)) for how in ("same", "other", "none")}
    before = kept_on["none"]["accuracy"]["mean"]
    uplift = {how: None if before is None or kept_on[how]["accuracy"]["mean"] is None else kept_on[how]["accuracy"]["mean"] - before for how in ("same", "other")}
    return {"judge": judged, "homographs": {name: said.tally(part) for name, part in rows.items()}, "continuation": kept_on, "uplift": uplift, "voices": voices, "weights": speaker.name()}
