"""Settings of the small trainings and the flags that the experiments share. Standard library only, so that --help is instant."""
from __future__ import annotations

from dataclasses import dataclass

import config


@dataclass(frozen=True)
class Training:
    """How every model of an experiment is trained. `steps` are those of the reference condition: the others get what the same arithmetic buys."""
    data: str = "data/synthetic"
    output: str = "outputs/experiments"
    steps: int = 600
    batch_positions: int = 2048      # sequence positions per step
    max_context: int = 1             # earlier turns in a window
    lr: float = 3e-3
    muon_lr: float = 0.02
    min_lr_ratio: float = 0.05
    warmup_steps: int = 50
    ema: float = 0.99
    held_out: int = 0                # held-out turns that judge; 0: all
    save_seconds: float = 60.0

    def __post_init__(self):
        for flag in ("steps", "batch_positions"):
            if getattr(self, flag) < 1:
                raise ValueError(f"{flag} {getattr(self, flag)} must be positive: change --{flag}")
        if self.held_out < 0 or self.max_context < 0:
            raise ValueError("held_out and max_context must be at least 0: change --held_out")

    def optimiser_config(self) -> config.TrainConfig:
        return config.TrainConfig(lr=self.lr, muon_lr=self.muon_lr, warmup_steps=self.warmup_steps, min_lr_ratio=self.min_lr_ratio, wandb="disabled")


def add_common_flags(parser, seeds: int = 3) -> None:
    """--output, --seeds and --results."""
    parser.add_argument("--output", default=Training.output, help="folder of trained models, results and pictures; default %(default)s")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"seeds 0, 1, ...: at least 3 for a verdict; default {seeds}")
    parser.add_argument("--results", default="RESULTS.md", help="file to write the section into; default RESULTS.md")


def add_training_flags(parser, **defaults) -> None:
    """Flags of Training, with this experiment's defaults, and the common ones."""
    config.add_flags(parser, Training, skip=("output", "save_seconds"))
    add_common_flags(parser)
    parser.set_defaults(**defaults)


def check_seeds(args) -> list[int]:
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: use at least 1 (3 for a verdict)")
    return list(range(args.seeds))
