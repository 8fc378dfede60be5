"""benchmark.py engine: many conversations at once beside one after another, and hearing beforehand beside hearing afterwards.

Real turns of the test split are said. Whatever is compared is measured in turn within one run, so that what else the machine does
meets both sides. CPU time is that of the whole process; waiting for others is not in it.
"""
from __future__ import annotations

import threading
import time

import config
from measuring import percentiles, pick_turns, show, sound_of, table

SESSIONS, LONG = "1,2,4,8", 200            # defaults of --sessions, --long
STAGGER = 0.3                              # seconds between newcomers in the run in which they join
LONG_TEXTS = ("so it goes on and on.", "yes, and then some more.")
BEFORE = 6                                 # turns before those that are timed
EARLY = 8                                  # turns from this one on are compared with the last ones: before it the window is not yet full


# ----------------------------------------------------------------------------- many at once

def waiting_session(talker, sampling, cold: bool):
    """A session in the midst of a conversation, its window full; cold: the window is to be filled when it speaks."""
    from generation import Session
    session = Session(*talker[:3], sampling)
    for number in range(BEFORE):
        session.add_turn(1 - number % 2, LONG_TEXTS[number % 2])
    session.prepare(1)
    if cold:
        session.rest()
    return session


def listen_to(pieces, asked: float) -> list[float]:
    """Seconds after `asked` at which each piece came."""
    return [time.perf_counter() - asked for _ in pieces]


def in_time(arrivals: list[float], frame: float) -> bool:
    """Whether a listener who begins with the first piece never runs dry."""
    return all(at <= arrivals[0] + k * frame for k, at in enumerate(arrivals))


def one_after_another(talker, texts: list[str], args) -> list[list[float]]:
    """All are asked for at the same moment and said one after another -> arrivals of each."""
    sessions = [waiting_session(talker, config.SamplingConfig(seed=args.seed + n), False) for n in range(len(texts))]
    asked = time.perf_counter()
    return [listen_to(session.speak(1, text), asked) for session, text in zip(sessions, texts)]


def at_once(talker, texts: list[str], args, joining: bool = False) -> list[list[float]]:
    """The same through the engine. joining: each begins STAGGER after the one before, with its window still to be filled."""
    from batching import BatchingConfig, BatchingEngine
    sessions = [waiting_session(talker, config.SamplingConfig(seed=args.seed + n), joining) for n in range(len(texts))]
    arrivals: list = [None] * len(texts)
    with BatchingEngine(*talker[:3], BatchingConfig(max_turns=len(texts), ahead_seconds=1000)) as engine:
        def user(n: int) -> None:
            time.sleep(n * STAGGER if joining else 0)
            asked = time.perf_counter()
            arrivals[n] = listen_to(engine.speak(sessions[n], texts[n]), asked)
        threads = [threading.Thread(target=user, args=(n,)) for n in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return arrivals


def timed(way, *args, **more) -> dict:
    """frames, seconds and CPU seconds of one way, and the arrivals that it gives."""
    wall, cpu = time.perf_counter(), time.process_time()
    arrivals = way(*args, **more)
    return {"arrivals": arrivals, "frames": sum(map(len, arrivals)), "seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def summed(runs: list[dict], frame: float) -> dict:
    """The figures of repeated runs of one way. A frame is `frame` seconds of sound."""
    arrivals = [a for run in runs for a in run["arrivals"] if a]
    gaps = [b - a for each in arrivals for a, b in zip(each, each[1:])]
    frames = sum(run["frames"] for run in runs)
    return {"frames": frames, "frames_per_second": frames / sum(run["seconds"] for run in runs), "cpu_ms_per_frame": 1000 * sum(run["cpu"] for run in runs) / frames,
            "worst_gap_ms": 1000 * max(gaps, default=0.0), "gap_ms": percentiles([1000 * g for g in gaps]), "first_sound_ms": percentiles([1000 * a[0] for a in arrivals]),
            "streams": len(arrivals), "in_time": sum(in_time(a, frame) for a in arrivals)}


def throughput(talker, args) -> list[dict]:
    """A row per number of sessions: one after another, at once, and at once while newcomers join."""
    from tqdm import tqdm
    frame, rows = 1 / talker[1].cfg.frame_rate, []
    counts = [int(n) for n in args.sessions.split(",")]
    texts = [turns[i]["text"] for turns, i in pick_turns(args.data, args.split, max(counts), args.seed)]
    timed(at_once, talker, texts[:1], args)                                     # the first of everything is slow
    for count in tqdm(counts, desc="sessions", unit="row"):
        runs: dict[str, list] = {"one_after_another": [], "at_once": [], "joining": []}
        for repeat in range(args.repeats):
            chosen = [texts[(repeat + n) % len(texts)] for n in range(count)]
            runs["one_after_another"].append(timed(one_after_another, talker, chosen, args))
            runs["at_once"].append(timed(at_once, talker, chosen, args))
            runs["joining"].append(timed(at_once, talker, chosen, args, joining=True))
        row = {"sessions": count} | {way: summed(found, frame) for way, found in runs.items()}
        rows.append(row | {"speed_up": row["at_once"]["frames_per_second"] / row["one_after_another"]["frames_per_second"],
                           "cpu_ratio": row["one_after_another"]["cpu_ms_per_frame"] / row["at_once"]["cpu_ms_per_frame"]})
    return rows


# ----------------------------------------------------------------------------- hearing

def hear_and_answer(talker, audio, said: str, answer: str, sampling, streamed: bool) -> tuple[float, object]:
    """From the end of the user's sound (its words known) to the first sound of the answer, ms; and the answer's turn."""
    import listening
    session, size = waiting_session(talker, sampling, False), talker[1].cfg.frame_size
    if streamed:
        listener = listening.Listener(session, 0)
        for at in range(0, len(audio), size):
            listener.feed(audio[at:at + size])
    over = time.perf_counter()
    listener.finish(said) if streamed else listening.listen(session, 0, audio, said)
    pieces = session.speak(1, answer)
    next(pieces)
    first = 1000 * (time.perf_counter() - over)
    for _ in pieces:
        pass
    return first, session.turns[-1]


def hearing(talker, args) -> dict:
    """Test turns heard while they are said and afterwards, in turn; the answers must be the same frames."""
    import torch
    from tqdm import tqdm
    first, equal, seconds = {True: [], False: []}, 0, []
    for number, (turns, i) in enumerate(tqdm(pick_turns(args.data, args.split, args.turns, args.seed), desc="hearing", unit="turn")):
        audio = sound_of(args.data, turns[i])
        answer = turns[(i + 1) % len(turns)]["text"] if len(turns) > 1 else "i see."
        made = {}
        for streamed in ((True, False) if number % 2 else (False, True)):
            sampling = config.SamplingConfig(seed=args.seed + number, max_seconds=4.0)
            ms, made[streamed] = hear_and_answer(talker, audio, turns[i]["text"], answer, sampling, streamed)
            first[streamed].append(ms)
        equal += torch.equal(made[True].codes, made[False].codes)
        seconds.append(len(audio) / talker[1].cfg.sample_rate)
    return {"turns": len(seconds), "seconds": percentiles(seconds), "streamed_ms": percentiles(first[True]), "offline_ms": percentiles(first[False]), "same_answer": equal}


# ----------------------------------------------------------------------------- a long conversation

def long_conversation(talker, args) -> dict | None:
    """Two conversations of --long turns at once through the engine: milliseconds a frame early on and at the end."""
    from batching import BatchingConfig, BatchingEngine
    from tqdm import tqdm
    if args.long < 2 * EARLY:
        return None
    costs = []
    with BatchingEngine(*talker[:3], BatchingConfig(max_turns=2)) as engine:
        sessions = [engine.session(config.SamplingConfig(seed=args.seed + n, max_seconds=4.0)) for n in range(2)]
        for number in tqdm(range(args.long), desc="long", unit="turn"):
            before, cpu = engine.stats()["frames"], time.process_time()
            for speech in [engine.speak(session, LONG_TEXTS[number % 2], speaker=number % 2) for session in sessions]:
                for _ in speech:
                    pass
            costs.append(1000 * (time.process_time() - cpu) / max(1, engine.stats()["frames"] - before))
        positions = max(session._state.length for session in sessions)
    part = max(1, (args.long - EARLY) // 10)
    early, late = (percentiles(costs[a:b])["p50"] for a, b in ((EARLY - 1, EARLY - 1 + part), (args.long - part, args.long)))
    return {"turns": args.long, "early_ms_per_frame": early, "late_ms_per_frame": late, "ratio": late / early, "positions": positions}


# ----------------------------------------------------------------------------- the section

def bench_engine(args, talker, name: dict) -> tuple[dict, str]:
    """Many conversations on one model at once, hearing while the other speaks, and what a long conversation costs."""
    import runtime
    import torch
    rows, heard = throughput(talker, args), hearing(talker, args)
    result = {"rows": rows, "hearing": heard, "long": long_conversation(talker, args), "threads": torch.get_num_threads(), "device": args.device, "weights": name,
              "parameters": sum(p.numel() for p in talker[0].parameters()), "peak_memory_mb": runtime.peak_memory_mb()}
    return result, body_of(result)


def body_of(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        one, many, joining = row["one_after_another"], row["at_once"], row["joining"]
        lines.append([str(row["sessions"]), show(one["frames_per_second"], 1), show(many["frames_per_second"], 1), show(row["speed_up"]), show(row["cpu_ratio"]), show(many["cpu_ms_per_frame"], 1),
                      show(one["first_sound_ms"]["p95"], 0), show(many["first_sound_ms"]["p95"], 0), f"{show(many['worst_gap_ms'], 0)} / {show(joining['worst_gap_ms'], 0)}",
                      f"{many['in_time']} / {joining['in_time']} of {many['streams']}"])
    head = ["sessions", "frames/s, one after another", "frames/s, at once", "times as many", "times less CPU", "CPU ms a frame", "first sound p95, one after another", "at once", "worst gap, ms", "never dry"]
    heard, long = result["hearing"], result["long"]
    body = table(head, lines) + ("\n\n12.5 frames a second are needed for each voice. Two figures: all begin together / each joins 0.3 s after the one before, its window still to be filled. Never dry: "
                                 "streams whose listener, beginning with the first piece, has each frame when it is due.")
    body += (f"\n\nHearing {heard['turns']} turns (median {show(heard['seconds']['p50'], 1)} s): from the end of the user's sound, its words known, to the first sound of the answer "
             f"{show(heard['streamed_ms']['p50'], 0)} ms (p95 {show(heard['streamed_ms']['p95'], 0)}) where it was heard while it was said, {show(heard['offline_ms']['p50'], 0)} ms (p95 "
             f"{show(heard['offline_ms']['p95'], 0)}) where afterwards; the same answer to the frame in {heard['same_answer']} of {heard['turns']}.")
    if long:
        body += (f"\n\nTwo conversations of {long['turns']} turns at once: {show(long['early_ms_per_frame'], 1)} CPU ms a frame from turn {EARLY} on, {show(long['late_ms_per_frame'], 1)} at the end "
                 f"({show(long['ratio'])} times), {long['positions']} positions in use.")
    return body + f"\n\n{result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads, peak memory {show(result['peak_memory_mb'], 0)} MB."


def add_flags(part) -> None:
    part.add_argument("--sessions", default=SESSIONS, help=f"numbers of conversations at once; default {SESSIONS}")
    part.add_argument("--repeats", type=int, default=2, help="runs of each; default 2")
    part.add_argument("--long", type=int, default=LONG, help=f"turns of the long conversations; 0: none; default {LONG}")
