"""benchmark.py tokens: what can be read from the codes, and how well a small model foretells them.

Text: one small recurrent probe per group of codebooks (1-10, 11-32), trained alike on frozen code vectors, spells what was
said (CTC); its character error on held-out characters says how much of the text a group holds.
Predictability: a small frame model without text learns the codes for a fixed number of steps. It is then given the true
first codebook of a turn and draws the others; the judge says how many words are left (the losses say what each codebook costs).

B turns, T frames, K codebooks, U outputs per frame, V letters.
"""
from __future__ import annotations

import math
import string

import config
from measuring import hear, paired, pick_turns, show, sound_of, summary, table

LETTERS = "\0" + string.ascii_lowercase + " '"       # index 0 is CTC's blank
OUTPUTS = 4                       # letters at most per frame of 80 ms
PROBE_BATCH, PROBE_WIDTH = 24, 128
LONGEST = 100                     # frames of a turn
FRAMES_PER_STEP = 1024            # of the predictability model


def spelled(text: str) -> str:
    """Lower-case letters, spaces and apostrophes of a text."""
    return " ".join("".join(c for c in text.lower() if c in LETTERS[1:]).split())


def split_turns(data, codec, split: str, count: int, seed: int) -> list:
    """Up to `count` turns of a split with their codes (K, T), in an order that depends on the seed alone."""
    import random
    from dataset_pipeline import read_turns
    from text_tokenizer import ByteTokenizer
    turns = [t for conversation in read_turns(data, split, ByteTokenizer(), codec.fingerprint) for t in conversation]
    turns = [t for t in turns if len(spelled(t.text)) > 1 and t.codes.shape[1] <= LONGEST and OUTPUTS * t.codes.shape[1] > 1.2 * len(spelled(t.text))]
    random.Random(seed).shuffle(turns)
    return turns[:count]


# ----------------------------------------------------------------------------- text from codes

def make_probe(inputs: int):
    """Frozen vectors (B, T, inputs) -> log probabilities (B, T * OUTPUTS, letters)."""
    from torch import nn

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.into = nn.Linear(inputs, PROBE_WIDTH)
            self.mix = nn.GRU(PROBE_WIDTH, PROBE_WIDTH, batch_first=True, bidirectional=True)
            self.out = nn.Linear(2 * PROBE_WIDTH, OUTPUTS * len(LETTERS))

        def forward(self, x):
            h, _ = self.mix(self.into(x).relu())
            return self.out(h).view(len(x), -1, len(LETTERS)).log_softmax(-1)
    return Probe()


def group_vectors(codec, turn, group: str):
    """Quantised sum of one side of the codec, (T, d)."""
    import torch
    split, codes = codec.cfg.num_semantic, turn.codes.long()[None]
    with torch.inference_mode():
        side = codec.semantic.decode(codes[:, :split]) if group == "semantic" else codec.acoustic.decode(codes[:, split:])
    return side[0].clone()


def probe_batches(vectors: list, texts: list[str], steps: int, seed: int):
    """Endless shuffled batches: x (B, T, d), frames (B,), letters (B, L), lengths (B,)."""
    import torch
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if len(order) < PROBE_BATCH:
            order = torch.randperm(len(vectors), generator=generator).tolist() + order
        chosen, order = order[:PROBE_BATCH], order[PROBE_BATCH:]
        letters = [torch.tensor([LETTERS.index(c) for c in texts[i]]) for i in chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        yield (pad([vectors[i] for i in chosen], batch_first=True), torch.tensor([len(vectors[i]) for i in chosen]),
               pad(letters, batch_first=True), torch.tensor([len(x) for x in letters]))


def read_text(codec, train: list, test: list, group: str, steps: int, seed: int) -> dict:
    """Train a probe on one group of codebooks; character error on the test turns, with interval, and its training loss."""
    import judges as judge
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm
    vectors = [group_vectors(codec, t, group) for t in train]
    flat = torch.cat(vectors)
    mean, scale = flat.mean(0), flat.std(0).clamp_min(1e-3)
    vectors = [(v - mean) / scale for v in vectors]
    torch.manual_seed(seed)
    probe = make_probe(flat.shape[1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=max(0.3, 2 / steps))
    for x, frames, letters, lengths in tqdm(probe_batches(vectors, [spelled(t.text) for t in train], steps, seed), total=steps, desc=f"text from the {group} codebooks", unit="step"):
        loss = F.ctc_loss(probe(x).transpose(0, 1), letters, frames * OUTPUTS, lengths, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    said, read = [], []
    with torch.inference_mode():
        for turn in test:
            best = probe(((group_vectors(codec, turn, group) - mean) / scale)[None])[0].argmax(-1)
            said.append(spelled(turn.text))
            read.append("".join(LETTERS[i] for i in torch.unique_consecutive(best).tolist() if i))
    rates = [judge.character_error_rate([a], [b]) for a, b in zip(said, read)]
    return {"cer": judge.bootstrap_interval([r["errors"] for r in rates], weights=[r["characters"] for r in rates]), "last_loss": float(loss.detach()), "example": {"said": said[0], "read": read[0]}}


# ----------------------------------------------------------------------------- foretelling the codes

def frame_model(codec, seed: int):
    """A small CSM without text and additions, over all codebooks of the codec."""
    import torch
    from architecture import CSM
    from config import OFF, ModelConfig, TransformerConfig
    cfg = ModelConfig("tokens", TransformerConfig(4, 192, 512, 4, 4), TransformerConfig(2, 128, 384, 2, 2, max_positions=64), num_codebooks=codec.cfg.num_codebooks,
                      num_semantic=codec.cfg.num_semantic, audio_vocab=codec.cfg.codebook_size + 1, text_vocab=2, pad_id=0, eot_id=1, listen_id=1, transcript_id=1, depth_fraction=0.125, **OFF)
    model = CSM(cfg)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def frame_rows(codes: list, cfg):
    """Codes (K, T) of some turns -> one FrameBatch: an opening text position, then the frames, one row a turn."""
    import torch
    from architecture import FrameBatch
    K, S = cfg.num_codebooks, 1 + max(c.shape[1] for c in codes)
    frames, mask = torch.zeros(len(codes), S, K + 1, dtype=torch.long), torch.zeros(len(codes), S, K + 1, dtype=torch.bool)
    turn = torch.full((len(codes), S), -1)
    for row, c in enumerate(codes):
        T = c.shape[1]
        frames[row, 1:T + 1, :K] = c.long().T + cfg.code_offset
        mask[row, 0, K], mask[row, 1:T + 1, :K] = True, True
        turn[row, :T + 1] = 0
    none = torch.full_like(turn, -1)
    return FrameBatch(frames, mask, turn, none, none)


def train_frame_model(codec, train: list, steps: int, seed: int):
    """-> the model and its loss per codebook in nats over the last tenth of the steps."""
    import torch
    from tqdm import tqdm
    model = frame_model(codec, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=max(0.1, 2 / steps))
    generator, sums, K = torch.Generator().manual_seed(seed), {}, model.cfg.num_codebooks
    for step in tqdm(range(steps), desc="foretelling the codes", unit="step"):
        chosen, frames = [], 0
        while frames < FRAMES_PER_STEP:
            chosen.append(train[int(torch.randint(len(train), (1,), generator=generator))].codes)
            frames += chosen[-1].shape[1]
        with torch.autocast("cpu", torch.bfloat16):
            terms = model.loss(frame_rows(chosen, model.cfg), generator=generator)
        metrics = terms.pop("metrics")
        loss = sum(value / max(1, count) for value, count in terms.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step >= 0.9 * steps:
            for name, (value, count) in {"c0": terms["c0"], **{k: v for k, v in metrics.items() if k.startswith("depth_")}}.items():
                entry = sums.setdefault(name, [0.0, 0.0])
                entry[0], entry[1] = entry[0] + float(value.detach()), entry[1] + float(count)
    return model.eval(), [sums["c0"][0] / sums["c0"][1]] + [sums[f"depth_{k}"][0] / sums[f"depth_{k}"][1] for k in range(1, K)]


def fill_in(model, codes, temperature: float, top_k: int, generator):
    """True codes (K, T) -> the same with every codebook but the first drawn by the model, which hears what it drew."""
    import torch
    from config import SamplingConfig
    from generation import audio_rows, draw_codes
    sampling, cfg = SamplingConfig(depth_temperature=temperature, depth_top_k=top_k), model.cfg
    state, drawn = model.new_state(1, codes.shape[1] + 2), []
    with torch.inference_mode():
        start = frame_rows([codes[:, :0]], cfg)
        hidden = model(start, state=state)[0, -1:]
        for t in range(codes.shape[1]):
            tokens = draw_codes(model, hidden, cfg.audio_vocab - 1, sampling, generator, first=codes[:1, t].long() + cfg.code_offset)
            drawn.append(tokens[0] - cfg.code_offset)
            hidden = model(audio_rows(tokens.T, cfg, 0), state=state)[0, -1:]
    return torch.stack(drawn, 1)


def judge_filled(codec, model, args) -> dict:
    """Words left when the model draws all codebooks but the first, beside the input and beside the true codes."""
    import torch
    from tqdm import tqdm
    generator, rows = torch.Generator().manual_seed(args.seed), []
    for turns, i in tqdm(pick_turns(args.data, args.split, args.turns, args.seed), desc="drawn codes", unit="turn"):
        text, audio = turns[i]["text"], sound_of(args.data, turns[i])
        codes = codec.encode(torch.from_numpy(audio).view(1, 1, -1))[0]
        made = codec.decode(fill_in(model, codes, args.depth_temperature, args.top_k, generator)[None])[0, 0].numpy()
        rows.append({"input": hear(audio, text, mos=False), "true": hear(codec.decode(codes[None])[0, 0].numpy(), text, mos=False), "drawn": hear(made, text, mos=False)})
    return {name: summary([r[name] for r in rows]) for name in ("input", "true", "drawn")} | {"drawn_over_input": paired(rows, "drawn", "input")}


# ----------------------------------------------------------------------------- the bench

def bench_tokens(args) -> tuple[dict, str]:
    """Text read back from the semantic and from the acoustic codebooks; how well a small model foretells the codes."""
    import checkpoint
    for flag, least in (("steps", 3), ("model_steps", 10), ("train_turns", 1), ("probe_turns", 1)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)}: use at least {least}")
    codec = checkpoint.load_codec(args.codec)
    train, test = split_turns(args.data, codec, "train", args.train_turns, args.seed), split_turns(args.data, codec, args.split, args.probe_turns, args.seed)
    result = {"fingerprint": codec.fingerprint, "train_turns": len(train), "test_turns": len(test), "steps": args.steps,
              "text": {group: read_text(codec, train, test, group, args.steps, args.seed) for group in ("semantic", "acoustic")}}
    model, losses = train_frame_model(codec, train, args.model_steps, args.seed)
    result |= {"model_steps": args.model_steps, "model_parameters": sum(p.numel() for p in model.parameters()), "nats": losses, "words": judge_filled(codec, model, args)}
    result["bars"] = token_bars(result)
    return result, tokens_body(result)


def token_bars(result: dict) -> list[dict]:
    semantic, acoustic = (result["text"][g]["cer"]["mean"] for g in ("semantic", "acoustic"))
    over = 100 * result["words"]["drawn_over_input"]["mean"]
    found = [("character error of text read from codebooks 1-10", "at most 15 %", 100 * semantic, semantic <= 0.15),
             ("the same as a share of the error from codebooks 11-32", "at most 0.33", semantic / acoustic, semantic <= acoustic / 3),
             ("first codebook true, the others drawn: word error, points above the input's own", "at most 8", over, over <= 8)]
    return [{"what": what, "bar": bar, "value": value, "met": bool(met)} for what, bar, value, met in found]


def tokens_body(result: dict) -> str:
    text, words, nats = result["text"], result["words"], result["nats"]
    body = table(["codebooks", "character error of the text read from them", "loss of the probe"],
                 [["semantic (1-10)", show(text["semantic"]["cer"], 2, True), show(text["semantic"]["last_loss"])],
                  ["acoustic (11-32)", show(text["acoustic"]["cer"], 2, True), show(text["acoustic"]["last_loss"])]])
    body += (f"\n\nA recurrent probe of width {PROBE_WIDTH}, {result['steps']} steps on {result['train_turns']} turns, read {result['test_turns']} turns of other characters and texts.\n\n")
    body += table(["codes", "turns", "word error"], [["the input itself", str(words["input"]["n"]), show(words["input"]["wer"], 2, True)],
                                                       ["all codes true", str(words["true"]["n"]), show(words["true"]["wer"], 2, True)],
                                                       ["first codebook true, the others drawn", str(words["drawn"]["n"]), show(words["drawn"]["wer"], 2, True)]])
    body += (f"\n\nDrawn by a frame model of {result['model_parameters'] / 1e6:.1f} M parameters without text, after {result['model_steps']} steps: "
             f"{show(words['drawn_over_input'], 2, True)} above the input. What each codebook costs it, in nats (uniform: {math.log(1024):.2f}):\n\n")
    body += table(["codebook"] + [str(k + 1) for k in range(len(nats))], [["nats"] + [f"{n:.1f}" for n in nats]])
    said = {True: "met", False: "**missed**"}
    return body + "\n\n" + table(["bar", "", "measured", ""], [[b["what"], b["bar"], show(float(b["value"])), said[b["met"]]] for b in result["bars"]])


def add_flags(part) -> None:
    part.add_argument("--train_turns", type=int, default=3000, help="training turns of both probes; default 3000")
    part.add_argument("--probe_turns", type=int, default=200, help="test turns that are spelled; default 200")
    part.add_argument("--steps", type=int, default=1500, help="training steps of a text probe; default 1500")
    part.add_argument("--model_steps", type=int, default=600, help="training steps of the frame model; default 600")
    config.add_flags(part, config.SamplingConfig, only=("top_k", "depth_temperature"))
