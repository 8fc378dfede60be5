"""What every script needs from the machine: device, seeds, safe files, metrics, ranks, plain errors.

Knows nothing of models or data. torch is imported inside the functions, so that a script which
only answers --help stays instant.
"""
from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------- plain errors

def fail(message: str) -> int:
    """Print `error: message` as one line on stderr; returns the exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    return 2


def plain_errors(main: Callable) -> Callable:
    """Decorator for CLI mains: what a user can mend becomes one line and exit code 2, not a traceback."""
    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        try:
            return main(argv)
        except FileNotFoundError as error:
            return fail(f"{error.filename} does not exist: check the path" if error.filename else str(error))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return fail(f"the disk is full ({error.filename or 'while writing'}): free some space or write elsewhere")
            return fail(f"{error.strerror or error}: {error.filename or 'check the path and the network'}")
        except ValueError as error:
            return fail(str(error))
        except KeyboardInterrupt:
            print("\ninterrupted: what was saved is complete; run the same command again to go on", file=sys.stderr)
            return 130
    return wrapped


# ----------------------------------------------------------------------------- files

def atomic_write(path, data) -> Path:
    """Write bytes, a str, or whatever the callback data(file) writes, so that `path` is either old or complete.

    Written beside it, flushed to the disk, then renamed. ValueError when that fails (full disk): the old file survives.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.{os.getpid()}.tmp")       # machines that share a disk may have equal process ids
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            _write_into(file, data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:      # torch.save reports a failed write as RuntimeError
        reason = "the disk is full" if getattr(error, "errno", None) == errno.ENOSPC else str(error).split("\n")[0]
        raise ValueError(f"cannot write {path}: {reason}. Free some space or write elsewhere; "
                         "the file that stood there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _write_into(file, data) -> None:
    if callable(data):
        data(file)
    else:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def sweep_unfinished(folder) -> list[Path]:
    """Remove what atomic_write left in `folder` when its process was killed; files of living processes stay. Returns the removed."""
    removed = []
    for path in Path(folder).glob(".*.tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and not _alive(int(owner)):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    if os.name == "nt":            # signal 0 would end the process there
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:                # it lives and is another user's
        pass
    return True


def write_json(path, value) -> Path:
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------- device and seeds

def pick_device(name: str = "auto"):
    """"auto" | "cpu" | "cuda" | "cuda:1" | "mps" -> torch.device. ValueError when that device is not here.

    Attention is left to PyTorch's own kernels: cuDNN, which it prefers on an H100, is reported to plan anew for every new shape, and no two
    batches, nor two positions of a conversation, have the same.
    """
    import torch
    torch.backends.cuda.enable_cudnn_sdp(False)
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if here["cuda"] else "cpu")
    kind = name.split(":")[0]
    if kind not in here:
        raise ValueError(f"unknown device {name!r}: use --device auto|cpu|cuda|mps")
    if not here[kind]:
        raise ValueError(f"no {kind} device is available to torch {torch.__version__}: use --device cpu")
    return torch.device(name)


ATTENTION: dict = {}      # what choose_attention has measured and switched on, for the run manifest


def choose_attention(device, heads: int, kv_heads: int, head_dim: int, positions: int = 512, repeats: int = 5) -> dict:
    """Time PyTorch's attention backends on this device at a model's shape, switch on what is fastest and off what is slower; {"backend", "ms"}.

    One new position among `positions` and a prefill of as many, the two shapes of talking, count alike (geometric mean).
    A backend that cannot do these shapes is left out; "math" stays on: some masks have nothing else.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, positions, head_dim, generator=g).to(device, dtype) for h in (heads, kv_heads, kv_heads))
    backends = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION} | ({"efficient": SDPBackend.EFFICIENT_ATTENTION} if device.type == "cuda" else {})
    found = {}
    for name, backend in backends.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend), torch.inference_mode():
            one, many = (_seconds(lambda rows=rows: torch.nn.functional.scaled_dot_product_attention(q[:, :, -rows:], k, v, is_causal=rows > 1, enable_gqa=heads != kv_heads),
                                  repeats, device) for rows in (1, positions))
            found[name] = {"one_ms": 1000 * one, "prefill_ms": 1000 * many}
    speed = {name: 1 / math.sqrt(ms["one_ms"] * ms["prefill_ms"]) for name, ms in found.items()}
    best = max(speed, key=speed.get, default="math")
    if "flash" in speed and speed[best] < 1.2 * speed["flash"]:                # torch's own first choice: noise must not change what a seed gives
        best = "flash"
    torch.backends.cuda.enable_flash_sdp(best == "flash")                      # these switches hold for the CPU as well
    torch.backends.cuda.enable_mem_efficient_sdp(best != "math")               # the one that takes masks on a GPU
    ATTENTION.update(device=str(device), shape=[heads, kv_heads, head_dim, positions], backend=best, ms=found)
    return ATTENTION


def _seconds(step: Callable, repeats: int, device) -> float:
    """The fastest of `repeats` runs after one that warms up."""
    import torch
    best = math.inf
    for number in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start if number else math.inf)
    return best


def autocast(device, precision: str = "bf16"):
    """Context for the forward pass: bfloat16 matrix products with float32 weights; fp32 switches it off."""
    import torch
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy
    import torch
    random.seed(seed)
    numpy.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """State of torch's generators (CPU and CUDA) as tensors, for an exact resume."""
    import torch
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict) -> None:
    import torch
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextlib.contextmanager
def undisturbed():
    """Afterwards the random numbers of Python, NumPy and torch go on, and torch has as many threads, as if nothing had happened inside."""
    import numpy
    import torch
    before = random.getstate(), numpy.random.get_state(), rng_state(), torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        set_rng_state(before[2])
        torch.set_num_threads(before[3])


MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -4, -3, -1, -8     # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks instead of giving them back to the system and fetching them anew each step (CPU training).

    Returns whether it could be done (Linux with glibc).
    """
    return _set_malloc({MMAP_MAX: 0, TRIM_THRESHOLD: 2 ** 31 - 1})


def return_freed_memory(every: float = 15.0) -> bool:
    """Make glibc give freed memory back to the system (servers): blocks of 1 MB and more at once, the rest every so many seconds.

    Left alone it raises its own thresholds to up to 32 and 64 MB after the first large block, and has a heap for each of up to eight threads a core:
    what comes and goes with conversations (windows, a recording's activations) then lies between small blocks that stay, and memory grows with the
    turns although nothing more is in use. Returns whether it could be done (Linux with glibc).
    """
    if not _set_malloc({MMAP_THRESHOLD: 2 ** 20, TRIM_THRESHOLD: 2 ** 23, ARENA_MAX: 2}):
        return False
    threading.Thread(target=_trim_for_ever, args=(every,), name="trim", daemon=True).start()
    return True


def _trim_for_ever(every: float) -> None:
    while True:
        time.sleep(every)
        release_freed_memory()                                 # pages between blocks that are in use, of every heap


def _set_malloc(settings: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    import ctypes
    try:
        libc = ctypes.CDLL("libc.so.6")
        return all([libc.mallopt(name, value) for name, value in settings.items()])
    except (OSError, AttributeError):                         # another C library
        return False


def release_freed_memory() -> bool:
    """Give what glibc keeps of freed blocks back to the system: after work on arrays of ever other sizes its heap is full of holes and grows. Returns whether it could be asked to."""
    if sys.platform != "linux":
        return False
    import ctypes
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return True
    except (OSError, AttributeError):                         # another C library
        return False


# ----------------------------------------------------------------------------- what ran where

def peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far in MB (10^6 bytes); None where the system does not say."""
    try:
        import resource
    except ImportError:       # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def total_memory_mb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    except (AttributeError, ValueError, OSError):
        return None


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of this checkout, with "+" when tracked files differ from it; None outside a git checkout."""
    def git(*words):
        return subprocess.run(("git", "-C", str(ROOT), *words), capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def run_manifest() -> dict:
    """Commit, versions, hardware, attention backend (None: left to torch) and time, to stand beside every result. Unknown is None."""
    import torch
    gpu = torch.cuda.is_available()
    return {"commit": git_commit(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "python": platform.python_version(), "system": platform.platform(),
            "versions": {p: _version(p) for p in ("torch", "numpy", "safetensors", "onnxruntime", "lhotse", "transformers")},
            "cpu": _cpu_name(), "cores": cpu_count(), "memory_mb": total_memory_mb(), "torch_threads": torch.get_num_threads(), "attention": ATTENTION or None,
            "gpu": torch.cuda.get_device_name() if gpu else None,
            "gpu_memory_mb": torch.cuda.get_device_properties(0).total_memory / 1e6 if gpu else None}


# ----------------------------------------------------------------------------- schedule

def cosine_lr(step: int, max_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0, progress: float | None = None) -> float:
    """Multiplier of the learning rate: linear warm-up, then half a cosine down to min_ratio.

    progress in 0..1 (share of the run that is over) replaces step / max_steps where a run is limited by time.
    Warm-up ends after warmup_steps or a tenth of the run, whichever comes first: a short run warms up as well.
    """
    progress = min(1.0, step / max(1, max_steps) if progress is None else progress)
    warm = min(1.0, max((step + 1) / warmup_steps, progress / 0.1)) if warmup_steps > 0 else 1.0
    return warm * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


# ----------------------------------------------------------------------------- metrics

class MetricsLog:
    """Appends one JSON object per call to folder/metrics.jsonl, and to W&B where that is wanted and works.

    start_step > 0 (a resumed run) drops the lines that will be written again: those of that step on, its validation and evaluation aside.
    W&B never asks for an account and its failure never stops a run: a line on stderr says so.
    """

    def __init__(self, folder, config: dict | None = None, wandb: str = "disabled", start_step: int = 0, name: str | None = None):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        def old(line):
            return line["step"] < start_step or (line["step"] == start_step and line.get("kind") in ("validation", "evaluation"))
        kept = [line for line in read_metrics(self.path) if old(line)] if start_step else []
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.run, self.lost = _start_wandb(Path(folder), config or {}, wandb, name), 0

    def log(self, step: int, **values) -> None:
        """Values are numbers or lists of numbers; not-a-number becomes null. A full disk loses lines, said once, and stops nothing."""
        line = {"step": step} | {k: _finite(v) for k, v in values.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" * bool(self.lost) + json.dumps(line) + "\n")       # what was lost may have been cut off within its line
            self.lost = 0
        except OSError as error:
            if not self.lost:
                print(f"note: cannot write {self.path} ({error.strerror}): lines are lost until there is room", file=sys.stderr)
            self.lost += 1
        if self.run is not None:
            try:
                self.run.log(_curves(line), step=step)
            except Exception as error:                    # any failure of W&B: go on without it
                self._drop_wandb(error)

    def show(self, step: int, sound, picture, caption: str) -> None:
        """A WAV file and a PNG file for W&B, under "samples/" and "spectrograms/" and the name of the file."""
        if self.run is not None:
            try:
                import wandb
                name = Path(sound).stem
                self.run.log({f"samples/{name}": wandb.Audio(str(sound), caption=caption), f"spectrograms/{name}": wandb.Image(str(picture), caption=caption)}, step=step)
            except Exception as error:
                self._drop_wandb(error)

    def close(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._drop_wandb(error)
        self.run = None

    def _drop_wandb(self, error) -> None:
        print(f"note: W&B stopped ({str(error).splitlines()[0] if str(error) else type(error).__name__}); metrics.jsonl goes on", file=sys.stderr)
        self.run = None


def _curves(line: dict) -> dict:
    """The numbers of a line; of a list one curve per place, counted from 1."""
    found = {}
    for name, value in line.items():
        parts = {f"{name}/{place:02d}": v for place, v in enumerate(value, 1)} if isinstance(value, list) else {name: value}
        found |= {k: v for k, v in parts.items() if isinstance(v, (int, float)) and k != "step"}
    return found


def _finite(value):
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path) -> list[dict]:
    """Lines of a metrics.jsonl; a last line cut off by a crash is left out. [] where there is no file."""
    lines = []
    with contextlib.suppress(OSError):
        for text in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def _start_wandb(folder: Path, config: dict, mode: str, name: str | None):
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
        if mode == "online" and not wandb.api.api_key:
            print("note: W&B has no key on this machine (`wandb login` once): logging offline", file=sys.stderr)
            mode = "offline"
        return wandb.init(project="csm-lab", name=name, dir=str(folder), config=config, mode=mode,
                          settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30))
    except Exception as error:                            # not installed, no network, no disk: metrics.jsonl is enough
        print(f"note: W&B is off ({str(error).splitlines()[0] if str(error) else type(error).__name__}); metrics go to metrics.jsonl", file=sys.stderr)
        return None


# ----------------------------------------------------------------------------- ranks

@dataclass
class Ranks:
    """This process among those torchrun started; alone by default."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values):
        """Tensor summed over all ranks (unchanged when alone)."""
        if self.world_size > 1:
            import torch.distributed as dist
            dist.all_reduce(values)
        return values

    def share(self, value):
        """The first rank's value (plain data) on every rank."""
        if self.world_size > 1:
            import torch.distributed as dist
            box = [value]
            dist.broadcast_object_list(box)
            return box[0]
        return value

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            import torch.distributed as dist
            dist.barrier()


def start_distributed(device=None) -> Ranks:
    """Join the process group that torchrun's environment describes: nccl for what lies on GPUs, gloo for the rest."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    import torch
    import torch.distributed as dist
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=ranks.rank, world_size=world)
    return ranks


def stop_distributed(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        import torch.distributed as dist
        dist.destroy_process_group()


# ----------------------------------------------------------------------------- small things

def free_disk_mb(folder) -> float:
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e6


def human_time(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
