"""Teach the detector of watermark.py to see the mark through the codec.

    python train_watermark.py --data data/synthetic

Each turn of the training split is marked with a key of its own and read twice: as it is, and through the codec; half of the turns
went through the codec once before they were marked, as what the model says has. The network learns what the signs were. No
p-value rests on it (see watermark.py): better training finds more marks and raises no false alarm.
"""
from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import config
import runtime


@dataclass(frozen=True)
class WatermarkTraining:
    data: str = "data/synthetic"
    codec: str = "pretrained/codec"
    output: str = "checkpoints/watermark"
    turns: int = 1500                    # utterances that are marked
    held_out: float = 0.1                # share of them that says how good it is
    steps: int = 2500
    batch: int = 48
    crop: int = 160                      # steps of 10 ms of each example
    lr: float = 2e-3
    weakest_db: float = 1.0              # the mark's strength is drawn between these two
    strongest_db: float = 3.0
    seed: int = 0

    def __post_init__(self):
        if self.turns < 10:
            raise ValueError(f"--turns {self.turns}: use at least 10")
        if not 0 < self.weakest_db <= self.strongest_db:
            raise ValueError(f"--weakest_db {self.weakest_db} must be above 0 and at most --strongest_db {self.strongest_db}")


def through(codec, audio):
    """Audio (N,) coded and decoded, (N,)."""
    import torch
    sound = torch.as_tensor(audio, dtype=torch.float32).view(1, 1, -1)
    return codec.decode(codec.encode(sound))[0, 0, :len(audio)].numpy()


def marked_twice(codec, audio, key: str, cfg, spoken_by_model: bool) -> list[dict]:
    """{read (T, bands), signs (T, carriers), coded}: one utterance, marked, as it is and coded."""
    import numpy as np
    import watermark
    marked = watermark.embed(through(codec, audio) if spoken_by_model else audio, key, cfg)
    rows = []
    for coded in (False, True):
        read = watermark.features(watermark.log_bands(through(codec, marked) if coded else marked, cfg))
        rows.append({"read": read, "signs": watermark.pattern(watermark.signs(key, cfg), np.arange(len(read)), cfg), "coded": coded, "key": key,
                     "db": cfg.strength_db})
    return rows


def make_examples(how: WatermarkTraining, codec) -> list[dict]:
    from dataclasses import replace

    from measuring import pick_turns, sound_of
    from tqdm import tqdm
    from watermark import WatermarkConfig
    rng, rows = random.Random(how.seed), []
    for number, (turns, i) in enumerate(tqdm(pick_turns(how.data, "train", how.turns, how.seed), desc="marking", unit="turn")):
        cfg = replace(WatermarkConfig(), strength_db=rng.uniform(how.weakest_db, how.strongest_db))
        rows += marked_twice(codec, sound_of(how.data, turns[i]), f"training {how.seed} {number}", cfg, number % 2 == 0)
    return rows


def draw(rows: list[dict], how: WatermarkTraining, rng):
    """A batch of crops: read (B, bands, crop), signs (B, carriers, crop); short ones end in their quietest value."""
    import numpy as np
    import torch
    read, signs = [], []
    for row in rng.choices(rows, k=how.batch):
        start = rng.randint(0, max(0, len(row["read"]) - how.crop))
        a, b = (row[name][start:start + how.crop] for name in ("read", "signs"))
        missing = ((0, how.crop - len(a)), (0, 0))
        read.append(np.pad(a, missing, constant_values=float(row["read"].min())))
        signs.append(np.pad(b, missing))
    return (torch.from_numpy(np.stack(x).astype(np.float32)).transpose(1, 2) for x in (read, signs))


def scores(rows: list[dict], network, cfg) -> dict:
    """Standard deviations of chance per square root of a second, at 1.5 dB, where the key and its beginning are known."""
    import numpy as np
    import torch
    import watermark
    found = {False: [], True: []}
    network.eval()
    for row in rows:
        with torch.inference_mode():
            carriers = network(torch.from_numpy(row["read"]).T[None])[0].T.numpy()
        one = watermark.match(carriers, row["key"], cfg, stride=cfg.block * cfg.period, speeds=(1.0,))
        found[row["coded"]].append(one.score / np.sqrt(len(carriers) / 100) * 1.5 / row["db"])
    network.train()
    return {"as_it_is": float(np.mean(found[False])), "coded": float(np.mean(found[True]))}


def fit(rows: list[dict], how: WatermarkTraining, cfg, held_out: list[dict] = ()):
    """The trained network, and its scores on the held-out rows."""
    import torch
    from tqdm import tqdm
    from watermark import make_network
    runtime.set_seed(how.seed)
    network, rng = make_network(cfg), random.Random(how.seed)
    optimiser = torch.optim.AdamW(network.parameters(), how.lr, weight_decay=0.05)
    for step in tqdm(range(how.steps), desc="training", unit="step"):
        for group in optimiser.param_groups:
            group["lr"] = how.lr * runtime.cosine_lr(step, how.steps, warmup_steps=50)
        read, signs = draw(rows, how, rng)
        loss = (network(read) - signs).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval(), scores(held_out, network, cfg) if held_out else {}


def build_parser() -> config.Parser:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config.add_flags(parser, WatermarkTraining)
    return parser


def train(args) -> int:
    import checkpoint
    import watermark
    how, began = config.from_flags(WatermarkTraining, args), time.time()
    codec, cfg = checkpoint.load_codec(how.codec), watermark.WatermarkConfig()
    rows = make_examples(how, codec)
    kept = max(2, int(len(rows) * how.held_out)) // 2 * 2
    network, found = fit(rows[kept:], how, cfg, rows[:kept])
    watermark.save_network(network, cfg, how.output, codec_fingerprint=codec.fingerprint, utterances=len(rows) // 2, steps=how.steps,
                           minutes=round((time.time() - began) / 60, 1), scores_held_out=found, commit=runtime.git_commit())
    print(f"{how.output}: {found['as_it_is']:.2f} as it is, {found['coded']:.2f} through the codec (standard deviations of chance after a second at 1.5 dB)")
    return 0


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    return runtime.plain_errors(lambda _: train(args))(argv)


if __name__ == "__main__":
    raise SystemExit(main())
