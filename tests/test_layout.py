"""The house rules as tests: who may import whom, silence on import, instant --help, the README's list of files."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports only from lower ranks; siblings never import each other.
RANKS = {"config": 0, "small_language_model": 0, "abbreviations": 0,
         "runtime": 1, "audio_io": 1, "text_tokenizer": 1, "retriever": 1, "mirroring": 1, "word_model": 1, "serve_limits": 1, "serve_schemas": 1,
         "layers": 2, "parallel": 2, "optimisers": 2, "endpointing": 2, "speech_formats": 2, "watermark": 2, "corpora": 2, "shards": 2, "judges": 2, "moods": 2,
         "rvq_tokenizer": 3, "mimi_codec": 3, "discriminators": 3, "additions": 3, "ear": 3, "csm_weights": 3, "filters": 3, "segmentation": 3,
         "architecture": 4, "data_plan": 4, "record_script": 4,
         "checkpoint": 5, "synthetic_conversations": 5, "frame_step": 5, "writing": 5, "turns": 5, "depth_graph": 5, "quantisation": 5, "dialogue": 5, "turn_taking": 5,
         "data_report": 5, "people": 5,
         "codec_tools": 6, "collect_data": 6, "dataset_pipeline": 6, "generation": 6, "lora": 6, "listening": 6, "classic_pipeline": 6, "corruptions": 6,
         "prosody": 6,
         "measuring": 7, "recordings": 7, "codec_data": 7, "report": 7, "draw_codes": 7, "batching": 7, "speculative": 7, "racers": 7, "conversation_metrics":
         7, "evaluation_page": 7,
         "demo": 8, "train_codec": 8, "benchmark_codec": 8, "benchmark_ear": 9, "benchmark_model": 8, "benchmark_tokens": 8, "benchmark_voice": 8, "benchmark_engine":
         8, "benchmark_fast": 8, "benchmark_latency": 8, "benchmark_serve": 8, "live": 8, "benchmark_watermark": 8, "train_watermark": 8, "pronunciation": 8,
         "validity": 8, "benchmark_people": 8,
         "responders": 9, "benchmark_personal": 9, "benchmark_replies": 9, "service": 9, "evaluation_run": 9,
         "serve_gate": 10, "evaluation_framework": 10, "watching": 10,
         "serve_socket": 11, "benchmark_evaluation": 11, "train": 11,
         "serve_app": 12, "benchmark": 12, "train_ear": 12,
         "serve": 13}
# Outside the ranks: standard library only, and these rooms.
ALONE = {"setup_environment": set(), "run_experiment": {"setup_environment", "config", "runtime"}}
STANDARD_AT_IMPORT = {"config", "runtime", "setup_environment", "run_experiment"}
NOT_ASCII = {"config.py", "text_tokenizer.py", "judges.py"}     # the phone alphabet; tables of the characters that are replaced
MAX_LINES, MAX_FUNCTION = 800, 60


def tracked(pattern: str = "") -> list[str]:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    out = subprocess.run(["git", "ls-files", *([pattern] if pattern else [])], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in out.splitlines() if (ROOT / name).exists()]


MODULES = sorted(p.stem for p in ROOT.glob("*.py"))
SCRIPTS = sorted(m for m in MODULES if "__main__" in (ROOT / f"{m}.py").read_text(encoding="utf-8"))


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imports(nodes) -> set[str]:
    """Top-level names of the modules imported by these nodes."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def top_level(module: str):
    """Nodes that run on import: everything outside functions."""
    waiting = list(tree(module).body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt) or isinstance(child, ast.ExceptHandler)]


# ----------------------------------------------------------------------------- rooms

def test_every_module_has_a_rank():
    assert set(MODULES) <= set(RANKS) | set(ALONE), "give the new module a rank here and a line in the README"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards_only(module):
    ours = imports(ast.walk(tree(module))) & set(MODULES)
    if module in ALONE:
        assert ours <= ALONE[module]
    else:
        wrong = {name for name in ours if name in ALONE or RANKS[name] >= RANKS[module]}
        assert not wrong, f"{module}.py (rank {RANKS[module]}) imports {wrong}"


def test_no_module_imports_experiments_or_tests():
    for module in MODULES:
        assert not imports(ast.walk(tree(module))) & {"experiments", "tests", "conftest"}


@pytest.mark.parametrize("module", sorted(ALONE))
def test_rooms_that_run_before_anything_is_installed(module):
    assert imports(ast.walk(tree(module))) <= set(sys.stdlib_module_names) | ALONE[module]


@pytest.mark.parametrize("module", sorted(STANDARD_AT_IMPORT))
def test_rooms_that_import_only_the_standard_library_at_first(module):
    assert imports(top_level(module)) <= set(sys.stdlib_module_names) | set(MODULES)


def test_config_is_standard_library_throughout():
    assert imports(ast.walk(tree("config"))) <= set(sys.stdlib_module_names)


def test_the_judges_know_no_model_of_ours():
    models = {"architecture", "rvq_tokenizer", "layers", "checkpoint", "generation", "text_tokenizer"}
    for judge in ("judges", "turn_taking", "prosody", "corruptions", "dialogue", "conversation_metrics", "pronunciation"):
        assert not imports(ast.walk(tree(judge))) & models


# ----------------------------------------------------------------------------- import and --help

def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_every_module_imports_silently():
    done = python("-W", "ignore::DeprecationWarning", "-c", "import " + ", ".join(MODULES))
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr


HELP = """
import runpy, sys
sys.argv = [{script!r}, {flag!r}]
try: runpy.run_path({script!r}, run_name="__main__")
except SystemExit as leaving: code = leaving.code
heavy = sorted({{"torch", "numpy", "scipy", "onnxruntime", "lhotse", "matplotlib"}} & set(sys.modules))
if heavy: sys.exit("before parsing it imports " + " ".join(heavy))
sys.exit(code)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_instant(script):
    """Exit 0 with a description, before anything heavy is imported."""
    done = python("-c", HELP.format(script=f"{script}.py", flag="--help"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "usage: " in done.stdout and len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_one_line_and_exit_2(script):
    done = python("-c", HELP.format(script=f"{script}.py", flag="--no_such_flag"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# ----------------------------------------------------------------------------- files

def readme_files() -> list[str]:
    """The first word in backticks of every row of the README's section "Files"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Files\n(.*?)(?=^## )", text, re.S | re.M)
    return re.findall(r"^\| `([^`]+)` \|", section.group(1), re.M)


def test_readme_lists_exactly_the_tracked_files():
    names = {name.split("/")[0] + ("/" if "/" in name else "") for name in tracked()}
    listed = readme_files()
    assert len(listed) == len(set(listed))
    assert set(listed) == names, f"not listed: {sorted(names - set(listed))}; listed but not there: {sorted(set(listed) - names)}"


def test_readme_paths_exist():
    """Every path with a known ending that the README links to is in the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def code_files() -> list[str]:
    return [n for n in tracked() if n.endswith((".py", ".sh", ".bat", ".toml")) or n == ".ci/run"]


def test_no_file_is_too_long():
    assert [n for n in code_files() if len((ROOT / n).read_bytes().splitlines()) > MAX_LINES] == []


def test_no_function_is_too_long():
    long = []
    for name in tracked("*.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "main" and node.end_lineno - node.lineno >= MAX_FUNCTION:
                long.append(f"{name}: {node.name}")
    assert long == []


def test_code_is_ascii():
    """Tests may hold the characters that they test."""
    assert [n for n in code_files() if n not in NOT_ASCII and not n.startswith("tests/") and not (ROOT / n).read_bytes().isascii()] == []


def test_no_path_or_registry_of_one_machine():
    """Written so that this file does not match itself."""
    bad = re.compile(r"(?<![\w.}])/(wor[k]|far[m]|roo[t]|tm[p]|hom[e])/|pyp[i]\.org|pythonhoste[d]|download\.pytorc[h]|index-ur[l] ")
    found = []
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data and len(data) < 2_000_000:
            found += [f"{name}: {match.group(0)}" for match in bad.finditer(data.decode("utf-8", "replace"))]
    assert found == []


def test_nothing_is_left_half_done():
    bad = re.compile(r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b|NotImplementedErro[r]|except\s*:|pickle\.loa[d]|weights_only\s*=\s*Fals[e]|allow_pickle\s*=\s*Tru[e]")
    found = [f"{n}: {m.group(0)}" for n in tracked("*.py") for m in bad.finditer((ROOT / n).read_text(encoding="utf-8"))]
    assert found == []


# ----------------------------------------------------------------------------- scripts

SHELL = ["run_experiment.sh", "run_tests.sh", ".ci/run"]


@pytest.mark.parametrize("script", SHELL)
def test_shellcheck(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SHELL)
def test_shell_scripts_are_executable_and_short(script):
    assert os.access(ROOT / script, os.X_OK) and len((ROOT / script).read_text().splitlines()) < 30
    assert "set -euo pipefail" in (ROOT / script).read_text()


def test_the_batch_file_is_a_handful_of_lines_that_call_python():
    lines = (ROOT / "run_experiment.bat").read_text().splitlines()
    assert len(lines) <= 8 and all("run_experiment.py" in line for line in lines[-1:])


def test_ruff():
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not ruff:
        pytest.skip("ruff is not installed")
    done = subprocess.run([ruff, "check", "--no-cache", "--output-format", "concise", *tracked("*.py")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
