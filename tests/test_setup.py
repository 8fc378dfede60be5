"""setup_environment.py: stamps, plain failures, pins. One real virtual environment is made, nothing is installed."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import setup_environment as se

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A root with requirements, an "environment" that exists, and a pip that only notes what it was asked."""
    (tmp_path / "requirements.txt").write_text("one==1.0\n")
    (tmp_path / "constraints.txt").write_text("one==1.0\ntwo==2.0\n")
    python = se.venv_python(tmp_path / "env")
    python.parent.mkdir(parents=True)
    python.write_text("")
    asked = []
    monkeypatch.setattr(se, "make_venv", lambda venv: "3.11.7")
    monkeypatch.setattr(se, "pip_install", lambda venv, arguments, total=1: asked.append(arguments))
    return tmp_path, tmp_path / "env", asked


def test_unchanged_requirements_are_not_installed_again(house):
    root, venv, asked = house
    assert se.setup(venv, root) is True
    first = len(asked)
    assert se.setup(venv, root) is False and len(asked) == first


@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt"])
def test_changed_requirements_are_installed(house, name):
    root, venv, asked = house
    se.setup(venv, root)
    (root / name).write_text("one==1.1\n")
    assert not se.is_ready(venv, root) and se.setup(venv, root) is True


def test_dev_adds_to_a_plain_environment_and_stays(house):
    root, venv, asked = house
    se.setup(venv, root)
    assert not se.is_ready(venv, root, dev=True)
    se.setup(venv, root, dev=True)
    assert se.DEV[0] in asked[-2 - len(se.OPTIONAL) - len(se.DEV_OPTIONAL)] and asked[-1] == ["--no-deps", se.DEV_OPTIONAL[-1]]
    assert se.is_ready(venv, root) and se.is_ready(venv, root, dev=True)


def test_an_interrupted_installation_leaves_no_stamp(house, monkeypatch):
    root, venv, _ = house
    monkeypatch.setattr(se, "pip_install", lambda *a, **k: (_ for _ in ()).throw(se.SetupError("no network: ...")))
    with pytest.raises(se.SetupError, match="no network"):
        se.setup(venv, root)
    assert not se.is_ready(venv, root)


def test_an_optional_package_may_be_missing(house, monkeypatch):
    root, venv, _ = house

    def pip(venv, arguments, total=1):
        if arguments[-1] == se.OPTIONAL[0]:
            raise se.SetupError("pip failed (no compiler)")
    monkeypatch.setattr(se, "pip_install", pip)
    assert se.setup(venv, root) and se.read_stamp(venv)["missing"] == [se.OPTIONAL[0]]


@pytest.mark.parametrize("output, start", [
    ("WARNING: Retrying ... NewConnectionError: Failed to establish a new connection\nERROR: No matching distribution found for torch", "no network"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk full"),
    ("WARNING: something\nERROR: No matching distribution found for torch==9", "pip failed (ERROR: No matching distribution found for torch==9)"),
])
def test_pip_failures_have_one_plain_line(output, start):
    line = se.pip_failure(output)
    assert line.startswith(start) and "\n" not in line


def test_python_versions():
    se.check_python((3, 11))
    for version in ((3, 9), (3, 10), (3, 14)):
        with pytest.raises(se.SetupError, match="install Python 3.11"):
            se.check_python(version)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert se.main(["--venv", str(tmp_path)]) == 2
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert capsys.readouterr().err.startswith("error: ")


def test_check_installs_nothing(tmp_path, capsys):
    assert se.main(["--check", "--venv", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert not (tmp_path / "none").exists() and err.count("\n") == 1 and "setup_environment.py" in err and "cores" in out


@pytest.mark.slow
def test_no_network_is_one_line_and_exit_2(tmp_path):
    """A real environment and a real pip that finds nobody at the other end."""
    for name in ("requirements.txt", "constraints.txt"):
        (tmp_path / name).write_text("csm-lab-test-package-that-is-nowhere==1.0\n")
    (tmp_path / "setup_environment.py").write_text((ROOT / "setup_environment.py").read_text())
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    done = subprocess.run([sys.executable, "setup_environment.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no network") and done.stderr.count("\n") == 1


def test_a_broken_environment_is_recognised(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("not a program")
    assert se.python_version(tmp_path) is None


def test_description_says_what_is_unknown():
    found = {"python": None, "torch": None, "torchaudio": None, "gpus": [["Card", 8 * 2**30]], "mps": False, "sound": None,
             "system": "Linux", "cores": 2, "memory": None, "free_disk": 5e9}
    text = "\n".join(se.describe(found))
    assert "Card (8 GB)" in text and "unknown memory" in text and "no environment" in text


def requirement_lines(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def test_everything_is_pinned_and_agrees():
    direct, pinned = requirement_lines("requirements.txt"), requirement_lines("constraints.txt")
    for line in [*direct, *pinned, *se.NO_DEPS, *se.OPTIONAL, *se.DEV, *se.DEV_OPTIONAL]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*|setuptools<81", line), line
    assert set(direct) <= set(pinned), set(direct) - set(pinned)
    assert "torch==2.13.0" in direct


def test_the_stamp_is_json_and_complete(house):
    root, venv, _ = house
    se.setup(venv, root)
    stamp = json.loads((venv / se.STAMP).read_text())
    assert set(stamp) == {"hash", "python", "dev", "missing"}
