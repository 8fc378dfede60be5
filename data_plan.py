"""What many hours of people's recordings cost: cores, days, bytes and money, from rates that were measured.

    python collect_data.py plan --hours 100000 --cores 1000 --price 0.03

The rates are those of the section "people" of RESULTS.md (`python benchmark.py people` measures them on one core of this machine);
nothing here is a guess but what a flag says: share that is kept, price, network.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import config

# stage -> what its rate is called in the results; hours of recording that one core does in an hour
STAGES = (("cut by channels", "channels"), ("cut by voices", "voices"), ("speech recognition", "asr"), ("filters, loudness, pitch, FLAC", "filters"), ("tokens on a CPU core", "tokens"))


@dataclass(frozen=True)
class Plan:
    """What is asked for, and what it comes to."""
    hours: float
    cores: int
    price: float             # of a core-hour
    kept: float              # share of the recordings that the filters let through
    transcribed: float       # share that comes with transcripts
    split_channels: float    # share that has a person per channel


def read_rates(path) -> dict:
    """{"rates": {...}, "bytes_per_hour": {...}, "machine"} of the section people of RESULTS.md. ValueError that names the command which measures them."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"<!-- begin people -->(.*?)```json\n(.*?)\n```.*?<!-- end people -->", text, re.S)
    result = json.loads(found[2]) if found else {}
    if not result.get("rates"):
        raise ValueError(f"{path} holds no measured rates: run python benchmark.py people (or name its file with --results)")
    machine = re.search(r"^\d{4}-\d\d-\d\d, commit .*$", found[1], re.M)
    return {"rates": result["rates"], "bytes_per_hour": result["bytes_per_hour"], "machine": machine[0] if machine else "unknown"}


def core_hours(plan: Plan, rates: dict) -> dict[str, float]:
    """Core-hours of each stage. Only what is cut goes on; only what was not transcribed is listened to; only what is kept becomes tokens."""
    shares = {"channels": plan.split_channels, "voices": 1 - plan.split_channels, "asr": 1 - plan.transcribed, "filters": 1.0, "tokens": plan.kept}
    return {name: plan.hours * shares[key] / rates[key] for name, key in STAGES if rates.get(key)}


def stored_bytes(plan: Plan, per_hour: dict) -> dict[str, float]:
    kept = plan.hours * plan.kept
    return {"turns and conversations as FLAC": kept * per_hour["flac"], "index and manifests": kept * per_hour["manifests"], "tokens": kept * per_hour["tokens"]}


def text_of(plan: Plan, measured: dict) -> str:
    """The plan as Markdown."""
    spent, stored = core_hours(plan, measured["rates"]), stored_bytes(plan, measured["bytes_per_hour"])
    total = sum(spent.values())
    folders = max(1, round(plan.hours / 500))
    rows = [f"| {name} | {measured['rates'][key]:.1f} | {spent[name]:,.0f} | {spent[name] / plan.cores / 24:,.2f} | {spent[name] * plan.price:,.0f} |" for name, key in STAGES if name in spent]
    lines = [f"# {plan.hours:,.0f} hours of people's recordings", "",
             f"Rates of one core, measured: {measured['machine']}. {100 * plan.kept:.0f} % kept, {100 * plan.transcribed:.0f} % with transcripts, {100 * plan.split_channels:.0f} % with a person per channel.", "",
             f"| stage | hours of recording per core-hour | core-hours | days on {plan.cores:,} cores | cost at {plan.price:g} a core-hour |", "|---|---|---|---|---|", *rows,
             f"| **all** | {plan.hours / total:.2f} | {total:,.0f} | {total / plan.cores / 24:,.2f} | {total * plan.price:,.0f} |", "",
             "| stored | GB |", "|---|---|", *[f"| {name} | {size / 1e9:,.0f} |" for name, size in stored.items()], f"| **all** | {sum(stored.values()) / 1e9:,.0f} |", "",
             f"1. Collect into {folders:,} folders of about 500 hours, a machine each: `python collect_data.py --source folder --path DIR --part K/{folders} --output data/K --workers CORES`. "
             "Killed anywhere, the same command goes on.",
             "2. Tokens of each folder, by as many machines as share it: `python dataset_pipeline.py --data data/K` under torchrun or srun (RANK and WORLD_SIZE); a lost one's shards are made by the others.",
             "3. Audio can go when its tokens are there and `manifest.json` checks: tokens are what training reads.",
             "4. `python collect_data.py report --data data/K` before anything is trained on it."]
    return "\n".join(lines) + "\n"


def parser() -> config.Parser:
    made = config.Parser(prog="collect_data.py plan", description="Cores, days, bytes and cost of many hours, from the measured rates of `python benchmark.py people`.")
    made.add_argument("--hours", type=float, default=100000, help="hours of recording (default 100000)")
    made.add_argument("--cores", type=int, default=1000, help="cores that work on it (default 1000)")
    made.add_argument("--price", type=float, default=0.03, help="of a core-hour, in your currency (default 0.03)")
    made.add_argument("--kept", type=float, default=0.7, help="share that the filters let through (default 0.7; the report of a first folder says it)")
    made.add_argument("--transcribed", type=float, default=0.0, help="share that comes with transcripts (default 0)")
    made.add_argument("--split_channels", type=float, default=0.5, help="share with a person per channel (default 0.5)")
    made.add_argument("--results", default="RESULTS.md", help="where the rates stand (default RESULTS.md)")
    made.add_argument("--output", default="outputs/plan.md", help="file to write (default outputs/plan.md)")
    return made


def main(words=None) -> int:
    args = parser().parse_args(words)
    import runtime

    def work(_) -> int:
        for name in ("kept", "transcribed", "split_channels"):
            if not 0 <= getattr(args, name) <= 1:
                raise ValueError(f"--{name} {getattr(args, name)} must lie between 0 and 1")
        for name in ("hours", "cores"):
            if getattr(args, name) <= 0:
                raise ValueError(f"--{name} {getattr(args, name)} must be above 0")
        if args.price < 0:
            raise ValueError(f"--price {args.price} must not be negative")
        plan = Plan(args.hours, args.cores, args.price, args.kept, args.transcribed, args.split_channels)
        text = text_of(plan, read_rates(args.results))
        runtime.atomic_write(args.output, text)
        print(text)
        return 0
    return runtime.plain_errors(work)(None)
