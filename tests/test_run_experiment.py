"""run_experiment.py: what is skipped, redone, resumed, kept; on little scripts in a folder of their own."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_experiment as rx
from config import TrainConfig, count_parameters, model_preset

HERE = Path(__file__).resolve().parent.parent

FIRST = "import part\nopen('log', 'a').write('first ')\nopen('first.out', 'w').write(part.WORD)\n"
SECOND = """import sys, pathlib
open('log', 'a').write('second' + (':resumed ' if '--resume' in sys.argv else ' '))
if pathlib.Path('trip').exists():
    pathlib.Path('last.pt').write_text('half')
    sys.exit(3)
pathlib.Path('last.pt').write_text('full'); pathlib.Path('best.pt').write_text('best')
"""
SLEEPER = """import pathlib, sys, time
pathlib.Path('ready').write_text('resumed' if '--resume' in sys.argv else 'new')
if '--resume' in sys.argv: pathlib.Path('best.pt').write_text('x'); sys.exit(0)
try: time.sleep(60)
except KeyboardInterrupt: pathlib.Path('last.pt').write_text('saved'); sys.exit(130)
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "part.py").write_text("WORD = 'one'\n")
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text(SECOND)
    return tmp_path


def steps(**changes):
    return [rx.Step("first", "doing the first", "first.py", [], outputs=["first.out"]),
            rx.Step("second", "doing the second", "second.py", [], outputs=["best.pt"], resume="last.pt", keeps=["best.pt"], **changes)]


def run(root, **more):
    return rx.run_steps(steps(), root, Path(sys.executable), **more)


def log(root):
    return (root / "log").read_text().split()


def test_finished_steps_are_skipped_and_fresh_redoes_them(root):
    run(root)
    assert all(s["skipped"] for s in run(root)) and log(root) == ["first", "second"]
    run(root, fresh=True)
    assert log(root) == ["first", "second"] * 2


def test_a_changed_module_redoes_its_steps_and_those_after(root):
    run(root)
    (root / "part.py").write_text("WORD = 'two'\n")
    run(root)
    assert log(root) == ["first", "second"] * 2
    (root / "second.py").write_text(SECOND + "# changed\n")
    run(root)
    assert log(root) == ["first", "second"] * 2 + ["second"]


@pytest.mark.parametrize("spoil", [lambda p: p.unlink(), lambda p: p.write_text("other")])
def test_a_lost_or_changed_output_is_made_again(root, spoil):
    run(root)
    spoil(root / "first.out")
    run(root)
    assert log(root)[2] == "first" and (root / "first.out").read_text() == "one"


def test_fresh_tells_the_scripts_that_can_start_anew(root):
    (root / "first.py").write_text("import sys\nopen('first.out', 'w').write(' '.join(sys.argv[1:]))\n")
    changed = steps()
    changed[0].fresh = "--anew"
    for fresh, said in ((False, ""), (True, "--anew")):
        rx.run_steps(changed, root, Path(sys.executable), fresh=fresh)
        assert (root / "first.out").read_text() == said


def test_a_failed_step_is_named_and_goes_on_from_its_checkpoint(root):
    (root / "trip").touch()
    with pytest.raises(ValueError, match="'second' failed .*code 3"):
        run(root)
    (root / "trip").unlink()
    run(root)
    assert log(root) == ["first", "second", "second:resumed"]


def test_other_settings_do_not_resume(root):
    (root / "trip").touch()
    with pytest.raises(ValueError):
        run(root)
    (root / "trip").unlink()
    changed = steps()
    changed[1].arguments = ["--other"]
    rx.run_steps(changed, root, Path(sys.executable))
    assert log(root)[-1] == "second"


def test_a_step_without_its_output_has_failed(root):
    (root / "first.py").write_text("pass\n")
    with pytest.raises(ValueError, match="did not write first.out"):
        run(root)


def test_files_made_by_others_are_kept(root, capsys):
    (root / "best.pt").write_text("days of work")
    run(root)
    kept = list(root.glob("before-*/best.pt"))
    assert [k.read_text() for k in kept] == ["days of work"] and (root / "best.pt").read_text() == "best"
    run(root, fresh=True)
    assert len(list(root.glob("before-*/best.pt"))) == 1     # its own are replaced


def test_stamps_record_time_memory_and_outputs(root):
    (root / "first.py").write_text("import time\nx = bytearray(200_000_000)\ntime.sleep(2.5)\nopen('first.out', 'w').write('x')\n")
    run(root)
    stamp = json.loads((root / "outputs/steps/first.json").read_text())
    assert stamp["seconds"] > 1 and stamp["outputs"].keys() == {"first.out"} and stamp["command"] == ["first.py"]
    if sys.platform == "linux":
        assert 190 < stamp["peak_memory_mb"] < 400


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupting_and_running_again_goes_on(root, sent):
    """Interrupted or ended: the child saves before the parent goes. Killed: the orphan holds the lock until it ends."""
    (root / "second.py").write_text(SLEEPER)
    driver = ("import signal, sys; from pathlib import Path; import run_experiment as rx; sys.path.insert(0, 'tests')\n"
              "from test_run_experiment import steps\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
              f"with rx.only_one(Path({str(root)!r})): rx.run_steps(steps(), Path({str(root)!r}), Path(sys.executable))")
    parent = subprocess.Popen([sys.executable, "-c", driver], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env=os.environ | {"PYTHONPATH": str(HERE)})
    wait_for(lambda: (root / "ready").exists())
    time.sleep(0.3)
    parent.send_signal(sent)
    parent.wait(60)
    if sent == signal.SIGKILL and sys.platform == "linux":
        with pytest.raises(ValueError, match="another run"), rx.only_one(root):
            pass
        orphan = next(p for p in rx_children("second.py", root))
        os.kill(orphan, signal.SIGINT)
        wait_for(lambda: not Path(f"/proc/{orphan}").exists() or (root / "last.pt").exists())
    assert (root / "last.pt").read_text() == "saved"
    run(root)
    assert (root / "ready").read_text() == "resumed"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def rx_children(script, root):
    """Processes that run this script of this test's own folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(root / script) in (entry / "cmdline").read_text():
                    yield int(entry.name)
            except OSError:
                continue


def test_one_run_at_a_time(tmp_path):
    with rx.only_one(tmp_path), pytest.raises(ValueError, match="another run"), rx.only_one(tmp_path):
        pass


def test_sources_are_followed_through_imports():
    names = {p.name for p in rx.source_files("run_experiment.py")}
    assert names == {"run_experiment.py", "setup_environment.py", "config.py", "runtime.py"}


@pytest.mark.parametrize("argv", [["--target_hours", "0"], ["--target_hours", "nan"], ["--target_hours", "much"], ["--max_steps", "0"],
                                  ["--max_steps", "1.5"], ["--model_size", "enormous"], ["--modelsize", "nano"]])
def test_bad_settings_are_one_line_and_exit_2(argv, capsys):
    try:
        code = rx.main(argv)
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out


def test_environment_variables_are_the_defaults(monkeypatch):
    for name, value in {"TARGET_HOURS": "0.5", "MAX_STEPS": "7", "MODEL_SIZE": "tiny"}.items():
        monkeypatch.setenv(name, value)
    assert rx.read_settings(rx.parse([])) == rx.Settings(0.5, 7, "tiny", False)
    assert rx.read_settings(rx.parse(["--max_steps", "9"])).max_steps == 9


def test_size_follows_the_gpu():
    assert rx.pick_model_size({"gpus": []}) == "nano" == rx.pick_model_size({"gpus": [["small", 6e9]]})
    assert rx.pick_model_size({"gpus": [["small", 6e9], ["card", 8.4e9]]}) == "tiny"


def test_expected_training_time_grows_with_model_and_steps():
    assert rx.training_flops("nano", 200) == 2 * rx.training_flops("nano", 100)
    assert rx.training_flops("tiny", 1) > 10 * rx.training_flops("nano", 1)
    assert rx.training_flops("nano", 1) > 6 * count_parameters(model_preset("nano"))["backbone"] * TrainConfig().batch_positions


def test_expected_time_comes_from_the_last_run_where_there_is_one(tmp_path):
    (tmp_path / "outputs/steps").mkdir(parents=True)
    stamp = {"state": "done", "seconds": 50.0, "command": ["train.py", "--max_steps", "100", "--model_size", "nano"]}
    (tmp_path / "outputs/steps/train.json").write_text(json.dumps(stamp))
    assert rx.training_seconds(tmp_path, Path(sys.executable), rx.Settings(1, 300, "nano"))[0] == 150.0


def test_the_summary_names_everything_made():
    stamps = [{"name": "demo", "seconds": 61.0, "peak_memory_mb": 1500.0, "outputs": {"outputs/demo/results.json": "x"}},
              {"name": "report", "seconds": 5.0, "peak_memory_mb": None, "outputs": {"outputs/report.html": "y"}, "skipped": True}]
    text = rx.summary(stamps, 3.0, 70.0)
    for piece in ("1 min 1 s", "1.5 GB", "unknown", "skipped", "outputs/report.html", "outputs/demo/results.json"):
        assert piece in text
