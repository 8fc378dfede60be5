"""benchmark.py train and benchmark.py inspect: the model beside transformers' CSM, and what its additions do.

train: forward and backward at the same geometry, weights, batch and share of frames for the depth decoder, our additions
off. Each side lives in a fresh process of its own, so that its peak memory is its own; the two take their steps in turns.
Then the memory plan of `python config.py` beside what a training step takes.
inspect: pictures of gates, half-lives, and of what one test turn attends to.

B batch rows, S positions, K codebooks, T queries, L letters, M slots.
"""
from __future__ import annotations

import contextlib
import copy
import gc
import math
import multiprocessing
import statistics
import time
from pathlib import Path

import config
from measuring import pick_turns, show, sound_of, table

TURN = 128                      # positions of a turn in the batch; half text, half voice, the last its end frame
PLAN_POSITIONS = 128            # of the step that is compared with the plan, for sizes other than the raced one
NAMES = {"ours": "this model, additions off", "theirs": "transformers"}
# how each side computes: the same precision for both; blocks of ours compiled; and each as it trains when nobody says anything (train.py in bf16)
RACES = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "compiled": ("bf16 compiled", "bf16"), "defaults": ("bf16", "fp32")}
# their model holds a Mimi that training does not run: the smallest there can be, so that it does not count against them
MIMI = {"model_type": "mimi", "hidden_size": 16, "num_filters": 4, "num_residual_layers": 1, "upsampling_ratios": [4, 2], "codebook_size": 32, "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16, "upsample_groups": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 16, "frame_rate": 1500}


# ----------------------------------------------------------------------------- memory of a process

def memory_mb(device, peak: bool = True) -> float:
    """Megabytes (10^6 bytes) of this process: its peak or what it holds now; on a GPU what torch has given out there."""
    import runtime
    import torch
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return runtime.peak_memory_mb() or float("nan")
    # not ru_maxrss: a child inherits its parent's
    word = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(word)) * 1024 / 1e6


# ----------------------------------------------------------------------------- one batch for both

def make_batch(cfg, rows: int, positions: int, seed: int):
    """A FrameBatch of random letters and codes, (rows, positions), no padding."""
    import torch
    from architecture import FrameBatch
    g, K = torch.Generator().manual_seed(seed), cfg.num_codebooks
    place = torch.arange(positions) % TURN
    voice, end = place >= TURN // 2, place == TURN - 1
    frames = torch.zeros(rows, positions, K + 1, dtype=torch.long)
    frames[..., :K] = torch.randint(1, cfg.audio_vocab, (rows, positions, K), generator=g) * (voice & ~end)[:, None]
    frames[..., K] = torch.randint(0, 256, (rows, positions), generator=g) * ~voice
    mask = torch.cat([voice[:, None].expand(-1, K), ~voice[:, None]], 1).expand(rows, -1, -1).contiguous()
    turn = (torch.arange(positions) // TURN).expand(rows, -1).contiguous()
    index = torch.where(voice, -1, place).expand(rows, -1).contiguous()
    return FrameBatch(frames, mask, turn, index, torch.full_like(turn, -1))


def official(cfg: config.ModelConfig) -> dict:
    """transformers' config.json of a geometry without our additions."""
    import csm_weights
    return csm_weights.config_to_transformers(cfg) | {"codec_config": MIMI | {"num_quantizers": cfg.num_codebooks}}


def weights(spec: dict):
    """Our model with the weights that both sides get."""
    import csm_weights
    import torch
    from architecture import CSM
    model = CSM(csm_weights.config_from_transformers(official(config.model_preset(spec["model_size"], **copy.deepcopy(config.OFF)))))
    model.init_weights(torch.Generator().manual_seed(spec["seed"]))
    return model


def their_model(own):
    """transformers' model with the weights of a CSM of ours without additions. ValueError where it does not take them."""
    import csm_weights
    from transformers import CsmConfig, CsmForConditionalGeneration
    theirs = CsmForConditionalGeneration(CsmConfig(**official(own.cfg)))
    missing, surplus = theirs.load_state_dict(csm_weights.to_transformers(own.state_dict()), strict=False)
    lost = [name for name in missing if not name.startswith(csm_weights.CODEC) and name not in csm_weights.TIED and "offsets" not in name]
    if lost or surplus:
        raise ValueError(f"transformers' model does not take our weights ({(lost + list(surplus))[0]}): install the version that setup_environment.py --dev installs")
    return theirs


# ----------------------------------------------------------------------------- the two sides

def our_step(spec: dict, device):
    """-> function that goes forward and backward once and returns (c0 loss, depth loss)."""
    import runtime
    import torch
    model = weights(spec).to(device).train()
    if spec.get("compile"):
        model.compile_blocks(dynamic=False)
    batch = make_batch(model.cfg, spec["rows"], spec["positions"], spec["seed"]).to(device)

    def step():
        model.zero_grad(set_to_none=True)
        with runtime.autocast(device, spec["precision"]):
            terms = model.loss(batch, generator=torch.Generator().manual_seed(spec["seed"]))
            c0, depth = (terms[k][0] / terms[k][1] for k in ("c0", "depth"))
        (c0 + depth).backward()
        return c0.item(), depth.item()
    return step


def their_step(spec: dict, device):
    """The same of transformers' model: the codes come from a stand-in for Mimi, labels name the same frames for the depth decoder."""
    from types import SimpleNamespace

    import runtime
    own = weights(spec)
    batch = make_batch(own.cfg, spec["rows"], spec["positions"], spec["seed"])
    theirs = their_model(own)
    inputs, codes = their_inputs(own, batch, theirs.config, spec["seed"])
    del own
    theirs, codes = theirs.to(device).train(), codes.to(device)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    theirs.codec_model.encode = lambda wave: SimpleNamespace(audio_codes=codes)

    def step():
        theirs.zero_grad(set_to_none=True)
        with runtime.autocast(device, spec["precision"]):
            out = theirs(**inputs, use_cache=False)
        out.loss.backward()
        return out.backbone_loss.item(), out.depth_decoder_loss.item()
    return step


def their_inputs(own, batch, theirs, seed: int) -> tuple[dict, object]:
    """A batch of ours as arguments of their forward, and the codes (1, K, frames) that their codec is to give."""
    import torch
    K = own.cfg.num_codebooks
    voice = batch.mask[..., 0]
    end = voice & ~batch.frames[..., :K].any(-1)
    ids = torch.where(end, theirs.audio_eos_token_id, torch.where(voice, theirs.audio_token_id, batch.frames[..., K]))
    trained = own._before(batch, voice)[1]
    # the same draw as in CSM.loss
    chosen = trained[torch.randperm(len(trained), generator=torch.Generator().manual_seed(seed))[:max(1, int(len(trained) * own.cfg.depth_fraction))]]
    if len(chosen) == K:
        raise ValueError(f"transformers takes {K} frames of {K} codebooks for something else (its mask of one-dimensional positions): use other --rows or --positions")
    labels = torch.full((ids.numel(),), -100)
    labels[trained] = -101                                                     # first codebook only
    labels[chosen] = ids.flatten()[chosen]
    codes = batch.frames[..., :K][voice & ~end].T.unsqueeze(0)
    samples = codes.shape[-1] * theirs.codec_config.frame_size
    return {"input_ids": ids, "labels": labels.view_as(ids), "input_values": torch.zeros(1, 1, samples), "input_values_cutoffs": torch.tensor([[samples]])}, codes


STEPS = {"ours": our_step, "theirs": their_step}


def step_flops(spec: dict) -> float:
    """Floating point operations that the model asks of one step: three times those of its forward pass, attention counted whole, nothing computed twice."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    model = weights(spec)
    batch = make_batch(model.cfg, spec["rows"], spec["positions"], spec["seed"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.loss(batch, generator=torch.Generator().manual_seed(spec["seed"]))
    return 3.0 * counter.get_total_flops()


def peak_flops(device, precision: str, size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of the best of some large matrix products: what this machine can do at most."""
    import torch
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ b).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size ** 3 / min(seconds[1:])


def serve(pipe, name: str, spec: dict) -> None:
    """Body of a side's process: builds its model, then answers "step", "memory" and "peak" (after it) until "stop"."""
    try:
        import architecture  # noqa: F401      what both import does not count as the model's
        import csm_weights  # noqa: F401
        import runtime
        import torch
        if name == "theirs":
            from transformers import CsmConfig, CsmForConditionalGeneration  # noqa: F401
        if spec["threads"]:
            torch.set_num_threads(spec["threads"])
        device = runtime.pick_device(spec["device"])
        libraries = memory_mb(device, peak=False)
        step = STEPS[name](spec, device)
        gc.collect()
        while (word := pipe.recv()) != "stop":
            if word in ("memory", "peak"):
                pipe.send({"libraries": libraries, "peak": memory_mb(device)} if word == "memory" else {"flops": peak_flops(device, spec["precision"])})
                continue
            start, busy = time.perf_counter(), time.process_time()
            loss = step()
            pipe.send({"seconds": time.perf_counter() - start, "cpu": time.process_time() - busy, "c0": loss[0], "depth": loss[1]})
    except (ValueError, ImportError, RuntimeError) as error:
        pipe.send({"error": " ".join(str(error).split())[:300]})


class Side:
    """One process with one model; `ask` waits for its answer."""

    def __init__(self, name: str, spec: dict):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        self.name, self.process = name, spawn.Process(target=serve, args=(there, name, spec), daemon=True)
        self.process.start()
        there.close()

    def ask(self, word: str) -> dict:
        try:
            self.pipe.send(word)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            answer = {"error": "its process has died; memory may have run out: use fewer --rows"}
        if "error" in answer:
            raise ValueError(f"{NAMES[self.name]}: {answer['error']}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("stop")
        self.process.join(30)
        if self.process.is_alive():
            self.process.terminate()


def race(spec: dict, name: str, repeats: int) -> dict:
    """Steps of both sides in turns: seconds of each, losses, memory. The first step of each warms up and is not timed. name: of RACES."""
    from tqdm import tqdm
    sides: dict[str, Side] = {}
    try:
        for side, how in zip(STEPS, RACES[name]):
            precision, *compiled = how.split()
            sides[side] = Side(side, spec | {"precision": precision, "compile": bool(compiled)})
        first = {name: side.ask("step") for name, side in sides.items()}
        seconds, cpu = ({name: [] for name in sides} for _ in range(2))
        for number in tqdm(range(repeats), desc=f"train {name}", unit="pair"):
            for side in sorted(sides, reverse=bool(number % 2)):
                taken = sides[side].ask("step")
                seconds[side].append(taken["seconds"])
                cpu[side].append(taken["cpu"])
        memory = {name: side.ask("memory") for name, side in sides.items()}
        peak = {name: side.ask("peak")["flops"] for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    used = {side: step_flops(spec) / statistics.median(seconds[side]) / peak[side] for side in sides}
    return race_result(spec, first, seconds, memory) | {"speed_by_cpu_time": sum(cpu["theirs"]) / sum(cpu["ours"]), "model_flop_utilisation": used}


def race_result(spec: dict, first: dict, seconds: dict, memory: dict) -> dict:
    """speed, memory: ratios as the bars ask for them; spread over the pairs of steps."""
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"])]
    used = {name: m["peak"] - m["libraries"] for name, m in memory.items()}
    loss = {name: {k: step[k] for k in ("c0", "depth")} for name, step in first.items()}
    return {"positions_per_second": {name: spec["rows"] * spec["positions"] / statistics.median(values) for name, values in seconds.items()},
            "speed": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "pairs": len(ratios)},
            "peak_mb": {name: m["peak"] for name, m in memory.items()}, "above_libraries_mb": used,
            "memory": used["ours"] / used["theirs"], "memory_of_processes": memory["ours"]["peak"] / memory["theirs"]["peak"],
            "loss": loss, "loss_difference": max(abs(loss["ours"][k] - loss["theirs"][k]) for k in ("c0", "depth"))}


# ----------------------------------------------------------------------------- the memory plan

def training_memory(pipe, name: str, rows: int, positions: int, build_optimisers, threads: int) -> None:
    """Body of a process: MB that a training step of a preset adds to it: weights, gradients, optimisers, average, activations in bf16."""
    import runtime
    import torch
    from architecture import CSM
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    before = memory_mb(device, peak=False)
    model = CSM(config.model_preset(name)).train()
    model.init_weights()
    average = [p.detach().clone() for p in model.parameters()]
    optimisers = build_optimisers(model, config.TrainConfig())
    batch = make_batch(model.cfg, rows, positions, 0)
    for number in range(2):                                                    # the second finds the optimisers' states
        model.zero_grad(set_to_none=True)
        with runtime.autocast(device):
            terms = model.loss(batch)
            total = sum(terms[k][0] / max(1, terms[k][1]) for k in terms if k != "metrics")
        total.backward()
        if number == 0:
            for optimiser in optimisers:
                optimiser.step()
    pipe.send({"mb": memory_mb(device) - before, "average": len(average)})


def plan_row(name: str, rows: int, positions: int, build_optimisers, threads: int) -> dict:
    """Planned and measured bytes of training one preset on a CPU. ValueError where the process dies."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=training_memory, args=(there, name, rows, positions, build_optimisers, threads), daemon=True)
    process.start()
    there.close()
    try:
        measured = here.recv()["mb"]
    except EOFError:
        raise ValueError(f"the training step of {name} died; memory may have run out: leave it out with --plan") from None
    finally:
        process.join()
    planned = config.training_bytes(config.model_preset(name), rows * positions)
    return {"positions": rows * positions, "planned_mb": planned["total"] / 1e6, "measured_mb": measured, "measured_over_planned": 1e6 * measured / planned["total"],
            "planned_parts_mb": {k: v / 1e6 for k, v in planned.items() if k != "total"}}


# ----------------------------------------------------------------------------- benchmark.py train

def bench_train(args, build_optimisers) -> tuple[dict, str]:
    """Both models in every race, and the plan; build_optimisers: those of train.py."""
    if args.rows < 1 or args.positions < TURN or args.repeats < 1:
        raise ValueError(f"--rows {args.rows}, --positions {args.positions}, --repeats {args.repeats}: use at least 1, {TURN} and 1")
    names = [name for name in args.plan.split(",") if name]
    if unknown := set(args.races.split(",")) - set(RACES):
        raise ValueError(f"--races {','.join(sorted(unknown))}: use some of {', '.join(RACES)}")
    for name in (args.model_size, *names):
        config.model_preset(name)
    spec = {k: getattr(args, k) for k in ("model_size", "rows", "positions", "seed", "device", "threads")}
    result = {"batch": spec, "depth_fraction": config.model_preset("csm-1b").depth_fraction,
              "races": {name: race(spec, name, args.repeats) for name in args.races.split(",")}, "plan": {}}
    for name in names:
        rows, positions = (args.rows, args.positions) if name == args.model_size else (1, PLAN_POSITIONS)
        result["plan"][name] = plan_row(name, rows, positions, build_optimisers, args.threads)
    result["bars"] = bars(result["races"])
    return result, train_body(result)


def bars(races: dict) -> list[dict]:
    """What this project asks of its training step beside transformers', in each race; the losses are compared in float32."""
    found = []
    for precision, r in races.items():
        found.append({"what": f"{precision}: positions per second, times transformers'", "bar": "at least 2", "value": r["speed"]["median"], "met": r["speed"]["median"] >= 2})
        found.append({"what": f"{precision}: peak memory above the libraries', of transformers'", "bar": "at most 0.6", "value": r["memory"], "met": r["memory"] <= 0.6})
        if precision == "fp32":
            found.append({"what": "fp32: difference of the losses", "bar": "at most 1e-4", "value": r["loss_difference"], "met": r["loss_difference"] <= 1e-4})
    return found


def train_body(result: dict) -> str:
    rows = []
    for precision, r in result["races"].items():
        for name in STEPS:
            rows.append([precision, NAMES[name], RACES[precision][name == "theirs"], show(r["positions_per_second"][name], 0), show(100 * r["model_flop_utilisation"][name], 0), show(r["peak_mb"][name], 0), show(r["above_libraries_mb"][name], 0),
                         show(r["loss"][name]["c0"], 5), show(r["loss"][name]["depth"], 5)])
    body = table(["race", "model", "precision", "positions/s", "MFU, %", "peak memory, MB", "of it above the libraries'", "loss of codebook 1", "loss of the others"], rows)
    b = result["batch"]
    body += (f"\n\nForward and backward of the `{b['model_size']}` geometry on {b['rows']} rows of {b['positions']} positions, half of them voice, {show(result['depth_fraction'], 4)} of the frames "
             "through the depth decoder, same weights, frames and codes; the two take their steps in turns. "
             "MFU: operations that the model asks for (a forward pass three times, nothing computed twice) over those of the best large matrix product of that process. ")
    body += " ".join(f"{p}: {show(r['speed']['median'])} times the positions per second ({show(r['speed']['lowest'])} to {show(r['speed']['highest'])} over {r['speed']['pairs']} pairs of steps; {show(r['speed_by_cpu_time'])} by CPU time, which does not count what else the machine did), "
                     f"{show(r['memory'])} of the memory ({show(r['memory_of_processes'])} with the libraries)." for p, r in result["races"].items())
    said = {True: "met", False: "**missed**"}
    body += "\n\n" + table(["bar", "", "measured", ""], [[x["what"], x["bar"], f"{x['value']:.3g}", said[x["met"]]] for x in result["bars"]])
    if result["plan"]:
        body += "\n\nThe memory plan of `python config.py` beside a training step (additions on, bf16, the optimisers' states there, on a CPU, which keeps attention weights that the plan leaves out):\n\n"
        body += table(["size", "positions", "planned, MB", "measured, MB", "measured / planned"],
                      [[k, str(p["positions"]), show(p["planned_mb"], 0), show(p["measured_mb"], 0), show(p["measured_over_planned"])] for k, p in result["plan"].items()])
    return body


# ----------------------------------------------------------------------------- benchmark.py inspect

def half_lives(decay):
    """Learned decay (through softplus, per turn) -> turns until a slot counts half."""
    import torch.nn.functional as F
    return math.log(2) / F.softplus(decay.detach().float()).clamp(min=1e-6)


def as_turn(talker, data, supervision: dict):
    """One supervision as the generation.Turn that the model would have spoken, its reading position known where its words are."""
    import torch
    from dataset_pipeline import consumed_bytes
    from generation import Turn, codes_of_sound, guided
    model, codec, tokenizer = talker[:3]
    custom, text = supervision["custom"], supervision["text"]
    audio = torch.from_numpy(sound_of(data, supervision)).view(1, 1, -1).to(next(codec.parameters()).device)
    codes = codes_of_sound(model.cfg, codec, audio).long()                     # (K, T)
    words, readings = (custom.get("alignment") or {}).get("words"), None
    if words and guided(model.cfg):
        first = len(tokenizer.speak_prefix(custom["speaker_index"], None))
        consumed = consumed_bytes(words, len(text.encode("utf-8")), codes.shape[1], 1 / codec.cfg.frame_rate).tolist()
        readings = [first, first, *(first + n for n in consumed)]
    return Turn(custom["speaker_index"], text, None, codes, readings=readings)


@contextlib.contextmanager
def watched(modules):
    """Attention weights of CrossAttention modules while they run: {module: (R, H, T, L)}, the null key's share left out."""
    import torch
    seen = {}

    def watch(module):
        inner = module.look

        def look(q, k, v, bias):
            split = q.unflatten(-1, (module.heads, -1)).transpose(1, 2) * module.null.shape[-1] ** -0.5
            scores = torch.cat([split @ k.transpose(-1, -2) + bias, split @ module.null.unsqueeze(-1).to(q.dtype)], -1)
            seen[module] = scores.float().softmax(-1)[..., :-1].cpu()
            return inner(q, k, v, bias)
        module.look = look
    for module in modules:
        watch(module)
    try:
        yield seen
    finally:
        for module in modules:
            del module.look


def attend_to_turn(talker, data, turns: list[dict], index: int) -> dict:
    """Runs turn `index` with the turn before it in the window and older ones as slots.

    -> letters, reading (T,), text: per layer (T, L) mean over heads; memory: per layer (2 M, S), slots: their turns, borders of turns.
    """
    import torch
    from generation import join, turn_rows
    model, _, tokenizer = talker[:3]
    device, limit = next(model.parameters()).device, model.cfg.backbone.max_positions
    rows = [turn_rows(as_turn(talker, data, t), model.cfg, tokenizer, n, device) for n, t in enumerate(turns[:index + 1])]
    window, older = rows[-2:] if len(rows) > 2 else rows[-1:], rows[:-2] if len(rows) > 2 else rows[:-1]
    while sum(r.S for r in older) > limit:
        older = older[1:]
    batch, runs = join(window), {}
    slots = model.remember(join(older)) if older and model.memory_writer is not None else None
    readers = [*model.read_text, *model.read_memory]
    hooks = [read.register_forward_pre_hook(lambda _, given: runs.update(kept=given[1])) for read in list(model.read_text)[:1]]
    with watched(readers) as seen:
        model(batch, memory=slots)
    for hook in hooks:
        hook.remove()
    out = {"borders": [sum(r.S for r in window[:i]) for i in range(1, len(window))], "text": [], "memory": []}
    if "kept" in runs:
        queries, tokens = runs["kept"].queries, runs["kept"].tokens[-1][runs["kept"].filled[-1]]
        own = queries.slot // queries.shape[1] == queries.shape[0] - 1
        out["reading"] = batch.reading.flatten()[queries.flat[own]].tolist()
        out["letters"] = [chr(t) if 32 < t < 127 else " " for t in tokens.tolist()]
        out["text"] = [seen[read][-1].mean(0)[:int(own.sum()), :len(tokens)] for read in model.read_text]
    if slots is not None:
        out["slots"] = slots.turn[0].tolist()
        out["memory"] = [seen[read][0].mean(0).T for read in model.read_memory]
    assert all(torch.isfinite(w).all() for w in out["text"] + out["memory"])
    return out


def write_pictures(talker, args) -> dict:
    """gates.png, half_lives.png, text.png and memory.png in --save, and their numbers."""
    import torch
    model = talker[0]
    if model.reader is None and model.memory_writer is None:
        raise ValueError("these weights have neither cross-attention nor memory: name others with --checkpoint")
    turns, index = pick_turns(args.data, args.split, 1, args.seed, same_speaker_before=True)[0]
    with torch.no_grad():
        seen = attend_to_turn(talker, args.data, turns, index)
    gates = {kind: [float(m.gate.detach()) for m in getattr(model, kind)] for kind in ("read_text", "hear_prosody", "read_memory")}
    lives = {"semantic slots": [half_lives(m.decay[0]).tolist() for m in model.read_memory], "prosodic slots": [half_lives(m.decay[1]).tolist() for m in model.read_memory],
             "voice heard by text": [half_lives(m.decay).tolist() for m in model.hear_prosody]}
    folder, made = Path(args.save), []
    made += draw_bars(folder / "gates.png", {k.replace("_", " "): [[g] for g in v] for k, v in gates.items()}, "gate", log=False)
    made += draw_bars(folder / "half_lives.png", lives, "half-life, turns (one bar per head)", log=True)
    made += draw_text(folder / "text.png", seen) if seen["text"] else []
    made += draw_memory(folder / "memory.png", seen) if seen["memory"] else []
    return {"pictures": [p.as_posix() for p in made], "turn": turns[index]["id"], "gates": gates, "half_lives": lives, "letters_off": letters_off(seen)}


def letters_off(seen: dict) -> list[float] | None:
    """Per layer: mean distance of the attended letter (centre of the weights) from the reading position; None where that is unknown."""
    import torch
    known = torch.tensor(seen.get("reading", [])) if seen["text"] else torch.zeros(0)
    if not len(known) or int(known.min()) < 0:
        return None
    return [float(((w / w.sum(-1, keepdim=True).clamp(min=1e-9)) @ torch.arange(w.shape[1], dtype=w.dtype) - known).abs().mean()) for w in seen["text"]]


# ----------------------------------------------------------------------------- drawing

def canvas(columns: int, width: float, height: float):
    """A figure without a screen and its row of axes. ValueError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: run python setup_environment.py") from None
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def keep(figure, path: Path) -> list[Path]:
    import io
    import runtime
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return [runtime.atomic_write(path, data.getvalue())]


def draw_bars(path: Path, groups: dict, label: str, log: bool) -> list[Path]:
    """groups: title -> per layer its values."""
    groups = {k: v for k, v in groups.items() if v}
    figure, axes = canvas(len(groups), 3.2, 3.0)
    for axis, (title, layers) in zip(axes, groups.items()):
        for number, values in enumerate(layers):
            width = 0.8 / len(values)
            axis.bar([number - 0.4 + (i + 0.5) * width for i in range(len(values))], values, 0.9 * width, color="tab:blue")
        axis.set(title=title, xlabel="layer", ylabel=label, xticks=range(len(layers)), **({"yscale": "log"} if log else {}))
    return keep(figure, path)


def draw_text(path: Path, seen: dict) -> list[Path]:
    """Letters up, frames right, the reading position as a line."""
    figure, axes = canvas(len(seen["text"]), 5.0, 5.0)
    for number, (axis, weights) in enumerate(zip(axes, seen["text"])):
        axis.imshow(weights.T, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
        known = [(i, r) for i, r in enumerate(seen["reading"]) if r >= 0]
        axis.plot([i for i, _ in known], [r for _, r in known], color="red", linewidth=1, label="reading position")
        axis.set_yticks(range(len(seen["letters"])), seen["letters"], fontsize=6)
        axis.set(title=f"voice reads text, layer {number}", xlabel="frame")
        if known:
            axis.legend(loc="upper left", fontsize=7)
    return keep(figure, path)


def draw_memory(path: Path, seen: dict) -> list[Path]:
    """Slots up (what was said, then how), positions of the window right; white lines where a turn begins."""
    figure, axes = canvas(len(seen["memory"]), 5.0, 0.8 + 0.3 * 2 * len(seen["slots"]) + 1)
    names = [f"{bank}, turn {turn}" for bank in ("said", "how") for turn in seen["slots"]]
    for number, (axis, weights) in enumerate(zip(axes, seen["memory"])):
        picture = axis.imshow(weights, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
        figure.colorbar(picture, ax=axis, shrink=0.7)
        for border in seen["borders"]:
            axis.axvline(border - 0.5, color="white", linewidth=1)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set(title=f"memory, layer {number}", xlabel="position")
    return keep(figure, path)


def add_flags(part) -> None:
    part.add_argument("--model_size", default="nano", help="preset whose geometry is raced; default nano")
    part.add_argument("--rows", type=int, default=8, help="rows of the batch; default 8")
    part.add_argument("--positions", type=int, default=512, help="positions of a row; default 512")
    part.add_argument("--repeats", type=int, default=8, help="timed pairs of steps; default 8")
    part.add_argument("--races", default="fp32,bf16,compiled,defaults", help="which of them; default fp32,bf16,compiled,defaults (bf16 as train.py trains, against float32)")
    part.add_argument("--plan", default="nano,tiny", help="presets whose memory plan is checked; empty: none; default nano,tiny")


def add_picture_flags(part) -> None:
    part.add_argument("--save", default="outputs/benchmark/inspect", help="folder for what was drawn; default outputs/benchmark/inspect")
