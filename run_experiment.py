"""One command from a fresh clone to a model that talks: setup, data, tokens, training, demo, report.

    ./run_experiment.sh                          # Linux, macOS; run_experiment.bat on Windows
    TARGET_HOURS=2 MAX_STEPS=500 ./run_experiment.sh
    ./run_experiment.sh --model_size tiny --from_scratch

Runs under any Python 3.11 to 3.13 with the standard library alone; the steps run as scripts under the
environment's Python. A finished step leaves outputs/steps/NAME.json with a hash of all it depended on
(settings, source files, inputs, the steps before) and of what it made, and is skipped while both are
unchanged. An interrupted step goes on when the same command is given again.
"""
from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import setup_environment
from config import MODEL_PRESETS, Parser, TrainConfig, count_parameters, model_preset
from runtime import fail, human_time, plain_errors, write_json

ROOT = Path(__file__).resolve().parent
TINY_GPU_BYTES = 8e9      # a GPU with this much memory trains `tiny`


@dataclass
class Settings:
    """What a run of the experiment depends on. Environment variables of the same names in capitals are the defaults."""
    target_hours: float = 1.0
    max_steps: int = 100
    model_size: str = ""      # empty: tiny on a GPU of 8 GB, else nano
    from_scratch: bool = False

    def __post_init__(self):
        if not (math.isfinite(self.target_hours) and self.target_hours > 0):
            raise ValueError(f"TARGET_HOURS (--target_hours) is {self.target_hours}: give hours above 0")
        if self.max_steps < 1:
            raise ValueError(f"MAX_STEPS (--max_steps) is {self.max_steps}: give at least 1")
        if self.model_size and self.model_size not in MODEL_PRESETS:
            raise ValueError(f"MODEL_SIZE (--model_size) is {self.model_size!r}: one of {', '.join(MODEL_PRESETS)}")


@dataclass
class Step:
    """One script run. Inputs and outputs are paths relative to the root; folders count with all their files."""
    name: str
    line: str
    script: str
    arguments: list[str]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    resume: str = ""          # file from which an unfinished run goes on with --resume
    keeps: list[str] = field(default_factory=list)    # files of somebody else that it would overwrite are set aside
    fresh: str = ""           # flag that makes the script start anew, for --fresh


def build_steps(settings: Settings) -> list[Step]:
    """The pipeline, in order. This list is the experiment."""
    train = ["--max_steps", str(settings.max_steps), "--model_size", settings.model_size] + ["--from_scratch"] * settings.from_scratch
    return [
        Step("collect", f"collecting {settings.target_hours:g} h of conversations with transcripts", "collect_data.py",
             ["--target_hours", f"{settings.target_hours:g}"], ["assets"], ["data/synthetic/index.jsonl"], fresh="--fresh"),
        Step("tokenise", "turning the speech into codec tokens", "dataset_pipeline.py",
             ["--data", "data/synthetic", "--codec", "pretrained/codec"], ["pretrained/codec"], ["data/synthetic/tokens/index.json"], fresh="--fresh"),
        Step("train", f"training the {settings.model_size} model for {settings.max_steps} steps"
             + (" from nothing" if settings.from_scratch else ""), "train.py", train, ["pretrained"],
             ["checkpoints/best_model.pt", "checkpoints/metrics.jsonl"], resume="checkpoints/last.pt",
             keeps=["checkpoints/best_model.pt", "checkpoints/last.pt"]),
        Step("demo", "letting the trained model talk", "demo.py", ["--mode", "test", "--checkpoint", "checkpoints/best_model.pt"],
             ["examples"], ["outputs/demo/results.json"]),
        Step("report", "listening to what was said and writing the page", "report.py", [], [], ["outputs/report.html"]),
    ]


# ----------------------------------------------------------------------------- what a step depends on

def source_files(script: str, root: Path = ROOT) -> list[Path]:
    """The script and every module of this folder that it imports, directly or through others."""
    found, waiting = set(), [root / script]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            waiting += [root / (name.split(".")[0] + ".py") for name in names]
    return sorted(found)


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content(paths: list[str], root: Path) -> dict[str, str | None]:
    """SHA-256 of every file named or inside a folder named; None for what does not exist."""
    found = {}
    for name in paths:
        path = root / name
        files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts) if path.is_dir() else [path]
        for file in files:
            found[file.relative_to(root).as_posix()] = file_hash(file) if file.exists() else None
    return found


def step_key(step: Step, root: Path, before: list[dict]) -> str:
    """Hash of the command, its source files, its inputs and the stamps of the steps before."""
    parts = [step.script, step.arguments, content([p.relative_to(root).as_posix() for p in source_files(step.script, root)], root),
             content(step.inputs, root), [[stamp["key"], stamp["outputs"]] for stamp in before]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_stamp(root: Path, name: str) -> dict:
    try:
        return json.loads((root / "outputs/steps" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_done(step: Step, root: Path, key: str) -> bool:
    stamp = read_stamp(root, step.name)
    return stamp.get("state") == "done" and stamp["key"] == key and stamp["outputs"] == content(step.outputs, root)


# ----------------------------------------------------------------------------- running one step

class MemoryMeter:
    """Samples the memory of a process and all its descendants. Peak in MB; None where the system does not say."""

    def __init__(self, pid: int, every: float = 1.0):
        self.pid, self.peak, self.stop = pid, None, threading.Event()
        self.thread = threading.Thread(target=self._sample, args=(every,), daemon=True)

    def __enter__(self) -> MemoryMeter:
        self.thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop.set()
        self.thread.join()

    def _sample(self, every: float) -> None:
        while not self.stop.wait(every if self.peak else 0.05):
            with contextlib.suppress(OSError, ValueError):
                self.peak = max(self.peak or 0.0, sum(map(_memory_mb, _family(self.pid))))


def _family(pid: int) -> list[int]:
    """The process and its descendants (Linux; elsewhere raises OSError)."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()[1])
    family = [pid]
    for member in family:                       # grows while it is read: breadth first
        family += [p for p, parent in parents.items() if parent == member]
    return family


def _memory_mb(pid: int) -> float:
    """Proportional set size: pages shared by several workers count once in the sum."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def children_peak_mb() -> float | None:
    """Largest memory of any single finished child so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def run_command(command: list[str], root: Path) -> tuple[int, float, float | None]:
    """Runs it with our terminal. Returns exit code, seconds, peak memory in MB. An interrupt reaches it and is raised again."""
    before, start = children_peak_mb(), time.monotonic()
    # A group of its own: Ctrl-C reaches us alone and is handed on once, for a second one means "kill".
    # close_fds=False: the lock of only_one goes with the child, so that it outlives a killed parent.
    process = subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONUNBUFFERED": "1"}, close_fds=False,
                               process_group=None if os.name == "nt" else 0)
    try:
        with MemoryMeter(process.pid) as meter:
            code = process.wait()
    except KeyboardInterrupt:
        stop(process)
        raise
    after = children_peak_mb()
    single = after if after and before is not None and after > before else None
    peaks = [p for p in (meter.peak, single) if p]
    return code, time.monotonic() - start, max(peaks, default=None)


def stop(process: subprocess.Popen, patience: float = 60.0) -> None:
    """Lets the process save and end; kills it only when it does not."""
    if process.poll() is None and os.name != "nt":
        process.send_signal(signal.SIGINT)
    try:
        process.wait(patience)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def set_aside(step: Step, root: Path) -> None:
    """Moves files that this step would overwrite and that no run of it has made into a folder beside them."""
    ours = read_stamp(root, step.name).get("made", {})
    foreign = [name for name, digest in content(step.keeps, root).items() if digest and ours.get(name) != digest]
    for name in foreign:
        folder = (root / name).parent / time.strftime("before-%Y%m%d-%H%M%S")
        folder.mkdir(exist_ok=True)
        os.replace(root / name, folder / Path(name).name)
        print(f"  {name} was not made by this experiment: kept as {(folder / Path(name).name).relative_to(root)}")


def run_step(step: Step, root: Path, python: Path, key: str, fresh: bool) -> dict:
    """Runs one step and writes its stamp. ValueError when it fails; an interrupt leaves a stamp to go on from."""
    old = read_stamp(root, step.name)
    again = not fresh and old.get("state") == "running" and old.get("key") == key
    path = root / "outputs/steps" / f"{step.name}.json"
    command = [str(python), str(root / step.script), *step.arguments] + [step.fresh] * bool(fresh and step.fresh)
    if again and step.resume and (root / step.resume).exists() and (root / step.resume).stat().st_mtime >= old["started"]:
        command += ["--resume", step.resume]
        print(f"  going on from {step.resume}", flush=True)
    elif step.keeps:
        set_aside(step, root) if not again else None
    earlier = old.get("seconds", 0.0) if again else 0.0
    stamp = {"name": step.name, "state": "running", "key": key, "command": [step.script, *command[2:]],
             "started": old["started"] if again else time.time(), "seconds": earlier, "peak_memory_mb": None, "outputs": {}, "made": {}}
    write_json(path, stamp)
    start = time.monotonic()
    try:
        code, _, peak = run_command(command, root)
    finally:
        stamp["seconds"] = earlier + time.monotonic() - start
        write_json(path, stamp)
    outputs = content(step.outputs, root)
    missing = [name for name, digest in outputs.items() if digest is None]
    if code or missing:
        reason = f"{step.script} ended with code {code}" if code else f"{step.script} did not write {', '.join(missing)}"
        raise ValueError(f"the step {step.name!r} failed ({reason}): mend what it said above and run again, finished steps are kept")
    stamp |= {"state": "done", "peak_memory_mb": peak, "outputs": outputs, "made": content(step.keeps, root)}
    write_json(path, stamp)
    return stamp


# ----------------------------------------------------------------------------- how long it will take

# A training step of nano takes this many times as long as its matrix products alone (one thread; LOG.md, 2026-11-22).
# Larger models spend a larger share in matrix products, so for them the estimate should be high, not low.
OVERHEAD = 2.06

SPEED_PROBE = r"""
import json, time, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
n = 4096 if device == "cuda" else 1024
a, b = torch.randn(n, n, device=device, dtype=torch.bfloat16), torch.randn(n, n, device=device, dtype=torch.bfloat16)
def run(times):
    for _ in range(times): c = a @ b
    return float(c[0, 0])
run(3); start, times = time.time(), 0
while time.time() - start < 1.0: run(10); times += 10
print(json.dumps(2 * n ** 3 * times / (time.time() - start)))
"""


def training_flops(model_size: str, steps: int) -> float:
    """Matrix products of a run: forward and backward (6 per weight and position; the depth decoder sees a share of
    the frames) and Muon's five Newton-Schulz iterations on every matrix."""
    cfg, train = model_preset(model_size), TrainConfig()
    counts = count_parameters(cfg)
    depth = counts["depth"] + counts["audio_head"] / cfg.num_codebooks
    passes = 6.0 * (counts["backbone"] + counts["c0_head"] + depth * cfg.num_codebooks * cfg.depth_fraction) * train.batch_positions * train.accumulate
    muon = sum(t.layers * (2 * newton_schulz_flops(t.width, t.width) + 2 * newton_schulz_flops(t.kv_heads * t.head_dim, t.width)
                           + 3 * newton_schulz_flops(t.width, t.ffn)) for t in (cfg.backbone, cfg.depth)) if train.muon_lr > 0 else 0.0
    return (passes + muon) * steps


def newton_schulz_flops(rows: int, columns: int) -> float:
    m, n = sorted((rows, columns))
    return 5.0 * (4 * m * m * n + 2 * m ** 3)


def training_seconds(root: Path, python: Path, settings: Settings) -> tuple[float, str] | None:
    """Expected time of the training step and where the figure comes from; None where nothing can be measured."""
    old = read_stamp(root, "train")
    command = old.get("command", [])
    if old.get("state") == "done" and settings.model_size in command and "--max_steps" in command:
        steps = int(command[command.index("--max_steps") + 1])
        return old["seconds"] / steps * settings.max_steps, "as measured in the last run"
    out = subprocess.run([str(python), "-c", SPEED_PROBE], capture_output=True, text=True)
    if out.returncode:
        return None
    return training_flops(settings.model_size, settings.max_steps) / float(out.stdout) * OVERHEAD, "estimated from this machine's matrix speed"


# ----------------------------------------------------------------------------- the whole run

@contextlib.contextmanager
def only_one(root: Path):
    """Refuses to run twice in one folder. The children inherit the lock, so an orphan of a killed run holds it too."""
    try:
        import fcntl
    except ImportError:                         # Windows: no lock
        yield
        return
    (root / "outputs").mkdir(exist_ok=True)
    with open(root / "outputs/.lock", "w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another run is at work in this folder: wait for it or stop it, then run again") from None
        yield


def pick_model_size(found: dict) -> str:
    return "tiny" if any(size >= TINY_GPU_BYTES for _, size in found["gpus"]) else "nano"


def run_steps(steps: list[Step], root: Path, python: Path, fresh: bool = False, before_step=None) -> list[dict]:
    """Runs or skips every step in order; returns their stamps, with "skipped" set on those that were."""
    stamps = []
    for number, step in enumerate(steps, 2):
        key = step_key(step, root, stamps)
        title = f"[{number}/{len(steps) + 1}] {step.line}"
        if not fresh and is_done(step, root, key):
            print(f"{title}: done before, skipped", flush=True)
            stamps.append(read_stamp(root, step.name) | {"skipped": True})
            continue
        print(title, flush=True)
        if before_step:
            before_step(step)
        stamps.append(run_step(step, root, python, key, fresh))
    return stamps


def summary(stamps: list[dict], setup_seconds: float, total: float) -> str:
    """What each step took, and where to look and listen."""
    lines = ["", f"{'step':10s} {'time':>14s} {'peak memory':>12s}", f"{'setup':10s} {human_time(setup_seconds):>14s}"]
    for stamp in stamps:
        memory = f"{stamp['peak_memory_mb'] / 1000:.1f} GB" if stamp["peak_memory_mb"] else "unknown"
        took = "skipped" if stamp.get("skipped") else human_time(stamp["seconds"])
        lines.append(f"{stamp['name']:10s} {took:>14s} {memory:>12s}")
    lines += [f"{'all':10s} {human_time(total):>14s}", "", "made:"]
    return "\n".join(lines + [f"  {name}" for stamp in stamps for name in stamp["outputs"]])


def announce_training(root: Path, python: Path, settings: Settings):
    def before(step: Step) -> None:
        expected = training_seconds(root, python, settings) if step.name == "train" else None
        if expected:
            print(f"  the steps will take about {human_time(expected[0])} ({expected[1]}); loading and checking come on top", flush=True)
    return before


def parse(argv=None):
    parser = Parser(description="From a fresh clone to a model that talks: setup, data, tokens, training, demo, report.")
    env = os.environ.get
    parser.add_argument("--target_hours", default=env("TARGET_HOURS", "1"), metavar="HOURS", help="hours of conversations (TARGET_HOURS), default 1")
    parser.add_argument("--max_steps", default=env("MAX_STEPS", "100"), metavar="N", help="training steps (MAX_STEPS), default 100")
    parser.add_argument("--model_size", default=env("MODEL_SIZE", ""), metavar="NAME", help="nano, tiny, ... (MODEL_SIZE); default tiny on a GPU of 8 GB, else nano")
    parser.add_argument("--from_scratch", action="store_true", help="train from nothing instead of the shipped weights")
    parser.add_argument("--fresh", action="store_true", help="do every step again")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR", help="the virtual environment, default .venv")
    return parser.parse_args(argv)


def read_settings(args) -> Settings:
    try:
        hours = float(args.target_hours)
    except ValueError:
        raise ValueError(f"TARGET_HOURS (--target_hours) is {args.target_hours!r}: give a number of hours") from None
    try:
        steps = int(args.max_steps)
    except ValueError:
        raise ValueError(f"MAX_STEPS (--max_steps) is {args.max_steps!r}: give a whole number") from None
    return Settings(hours, steps, args.model_size, args.from_scratch)


@plain_errors
def main(argv=None) -> int:
    args = parse(argv)
    settings = read_settings(args)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    start = time.monotonic()
    with only_one(ROOT):
        print(f"[1/6] setting up the environment in {args.venv}", flush=True)
        try:
            installed = setup_environment.setup(args.venv)
            found = setup_environment.inspect(args.venv)
            problems = setup_environment.check(args.venv, found)
        except setup_environment.SetupError as error:
            return fail(str(error))
        if problems:
            return fail(problems[0])
        setup_seconds = time.monotonic() - start
        if installed:
            write_json(ROOT / "outputs/steps/setup.json", {"name": "setup", "state": "done", "seconds": setup_seconds, "peak_memory_mb": None})
        settings.model_size = settings.model_size or pick_model_size(found)
        python = setup_environment.venv_python(args.venv)
        stamps = run_steps(build_steps(settings), ROOT, python, args.fresh, announce_training(ROOT, python, settings))
    print(summary(stamps, setup_seconds, time.monotonic() - start))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
