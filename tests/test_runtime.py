"""Plain errors, safe files, schedule and metrics."""
import errno
import json
import math
import os
import platform
import subprocess
import sys
import time

import pytest
import torch

import runtime


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "sub" / "a.bin"
    runtime.atomic_write(path, b"old")
    runtime.atomic_write(path, lambda file: file.write(b"new"))
    runtime.atomic_write(tmp_path / "t.txt", "gruen \u00fc")
    assert path.read_bytes() == b"new" and (tmp_path / "t.txt").read_text(encoding="utf-8") == "gruen \u00fc"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_old_file_survives_a_failing_writer(tmp_path, error):
    path = runtime.atomic_write(tmp_path / "a.bin", b"old")

    def half(file):
        file.write(b"new but cut")
        raise error
    with pytest.raises(ValueError, match="untouched"):
        runtime.atomic_write(path, half)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_old_checkpoint_survives_a_full_disk(tmp_path):
    """A real torch.save that the system stops in the middle."""
    code = ("import resource, torch, runtime\n"
            f"path = {str(tmp_path / 'a.pt')!r}\n"
            "runtime.atomic_write(path, b'old')\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "try: runtime.atomic_write(path, lambda f: torch.save(torch.zeros(100_000), f))\n"
            "except ValueError as error: print('plain', open(path, 'rb').read(), 'cannot write' in str(error))")
    done = subprocess.run([sys.executable, "-c", code], cwd=runtime.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "plain b'old' True", done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".last.pt.{gone.pid}.tmp", f".last.pt.{os.getpid()}.tmp", "notes.tmp", ".last.pt.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    assert [p.name for p in runtime.sweep_unfinished(tmp_path)] == names[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_metrics_survive_a_full_disk(tmp_path, monkeypatch, capsys):
    log = runtime.MetricsLog(tmp_path)
    log.log(0, loss=3.0)
    log.path.unlink()
    log.path.mkdir()                                                          # cannot be opened for writing
    log.log(1, loss=2.0)
    log.log(2, loss=2.0)
    log.path.rmdir()
    log.log(3, loss=1.0)
    assert capsys.readouterr().err.count("lines are lost") == 1
    assert [line["step"] for line in runtime.read_metrics(log.path)] == [3]


@pytest.mark.parametrize("error, word", [(ValueError("change --x\nnow"), "change --x now"), (FileNotFoundError(2, "No such file", "a.wav"), "a.wav"),
                                         (OSError(errno.ENOSPC, "No space left", "b.pt"), "full")])
def test_errors_become_one_line_and_code_2(capsys, error, word):
    @runtime.plain_errors
    def main(argv=None):
        raise error
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_a_bug_keeps_its_traceback():
    @runtime.plain_errors
    def main(argv=None):
        raise KeyError("bug")
    with pytest.raises(KeyError):
        main([])


def test_schedule_warms_up_and_comes_down():
    values = [runtime.cosine_lr(s, 1000, 50, 0.1) for s in range(1001)]
    assert values[0] == pytest.approx(1 / 50) and max(values) == pytest.approx(values[50], abs=0.01) and values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(values[50:], values[51:]))
    short = [runtime.cosine_lr(s, 100, 1000, 0.1) for s in range(100)]
    assert max(short) > 0.9                                                    # a short run warms up in a tenth of its steps
    assert runtime.cosine_lr(7, 10, 0, 0.0, progress=0.5) == pytest.approx(0.5)


def test_unknown_device_names_the_flag():
    with pytest.raises(ValueError, match="--device"):
        runtime.pick_device("abacus")


def test_attention_plans_nothing_for_a_shape():
    torch.backends.cuda.enable_cudnn_sdp(True)
    runtime.pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_manifest_says_where_this_ran():
    manifest = runtime.run_manifest()
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["cores"] >= 1 and len(json.dumps(manifest)) > 100
    assert runtime.peak_memory_mb() > 10


def test_metrics_survive_a_crash_and_a_resume(tmp_path):
    log = runtime.MetricsLog(tmp_path)
    for step in range(4):
        log.log(step, kind="train", loss=float("nan") if step == 1 else float(step), per=[1.0, math.inf])
    log.log(2, kind="validation", validation_loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')                                          # cut off by a crash
    assert [m["loss"] for m in runtime.read_metrics(log.path) if m["kind"] == "train"] == [0.0, None, 2.0, 3.0]
    runtime.MetricsLog(tmp_path, start_step=2)
    assert [(m["step"], m["kind"]) for m in runtime.read_metrics(log.path)] == [(0, "train"), (1, "train"), (2, "validation")]


def test_broken_wandb_never_stops_a_run(tmp_path, capsys, monkeypatch):
    class Broken:
        def log(self, *a, **k):
            raise RuntimeError("no network")
    log = runtime.MetricsLog(tmp_path)
    log.run = Broken()
    log.log(0, loss=1.0)
    log.log(1, loss=2.0)
    log.close()
    assert len(runtime.read_metrics(log.path)) == 2 and "no network" in capsys.readouterr().err


def test_online_wandb_without_an_account_asks_nothing(tmp_path, monkeypatch, capsys):
    import types
    seen = {}
    fake = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None), init=lambda **k: seen.update(k), Settings=lambda **k: k)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    runtime.MetricsLog(tmp_path, {}, "online")
    assert seen["mode"] == "offline" and "wandb login" in capsys.readouterr().err


def test_runtime_alone_does_not_load_torch():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", "import sys, runtime; print('torch' in sys.modules)"], cwd=runtime.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False" and time.monotonic() - start < 20


def test_human_time():
    assert [runtime.human_time(s) for s in (3.4, 75, 7265)] == ["3 s", "1 min 15 s", "2 h 1 min"]


# ----------------------------------------------------------------------------- attention

def test_the_attention_backend_is_measured_and_told(monkeypatch):
    """Flash stays on unless another is clearly faster; the manifest says what was chosen and from what."""
    import torch
    monkeypatch.setattr(runtime, "ATTENTION", {})
    assert runtime.run_manifest()["attention"] is None
    try:
        found = runtime.choose_attention("cpu", 4, 2, 16, positions=32, repeats=1)
        assert found["backend"] in found["ms"] and all(v > 0 for ms in found["ms"].values() for v in ms.values())
        assert runtime.run_manifest()["attention"]["shape"] == [4, 2, 16, 32]
        for math_ms, chosen in ((1.0, "math"), (9.0, "flash")):
            times = iter([math_ms, math_ms, 10.0, 10.0])
            monkeypatch.setattr(runtime, "_seconds", lambda *_, times=times: next(times))
            assert runtime.choose_attention("cpu", 4, 2, 16)["backend"] == chosen
            assert torch.backends.cuda.flash_sdp_enabled() == (chosen == "flash")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)


# Large blocks come and go between small ones that stay, as a conversation's do. What glibc keeps of them is counted in MB.
FRAGMENTS = """
import ctypes, runtime
import numpy as np
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info
{}
np.ones(2_500_000)                                     # 20 MB are freed: by itself glibc takes blocks of that size from its heap from now on
large, small = [], []
for _ in range(10):
    large.append(np.ones(500_000))
    small.append(bytes(100_000))
large.clear()
print(libc.mallinfo2().fordblks / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is set")
def test_freed_memory_is_given_back_where_small_blocks_stay_between():
    def kept(setting: str) -> float:
        code = FRAGMENTS.format(setting)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        return float(subprocess.run([sys.executable, "-c", code], cwd=runtime.ROOT, env=clean, capture_output=True, text=True, check=True).stdout)
    assert kept("") > 35.0, "what is mended here is still so"
    assert kept("assert runtime.return_freed_memory()") < 5.0


# Blocks below the thresholds, every other one freed: only resident memory shows that their pages went back.
HOLES = """
import re, time, runtime
{}
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
blocks = [bytearray(b"x" * 60_000) for _ in range(2000)]
full = resident()
del blocks[::2]
end = time.monotonic() + 5
while time.monotonic() < end and full - resident() < 40:
    time.sleep(0.02)
print(full - resident())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is set")
def test_pages_between_blocks_in_use_go_back_too():
    def given_back(setting: str) -> float:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        return float(subprocess.run([sys.executable, "-c", HOLES.format(setting)], cwd=runtime.ROOT, env=clean, capture_output=True, text=True, check=True).stdout)
    assert given_back("") < 10.0, "what is mended here is still so"
    assert given_back("assert runtime.return_freed_memory(0.1)") > 40.0
