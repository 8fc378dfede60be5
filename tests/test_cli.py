"""Every command of the README, run with tiny settings in a copy of the project, beginning with ./run_experiment.sh.

The copy holds the scripts, an untrained tiny codec and an environment whose Python is this one. Each line of the
README's bash blocks must stand in COMMANDS, with the flags that make it tiny (a later flag wins over an earlier one).
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run_experiment
import setup_environment

ROOT = Path(__file__).resolve().parent.parent
TINY_TRAIN = "--model_size test --batch_positions 512 --eval_batches 1 --lexicon_words 4 --wandb disabled --output"

PATIENCE = 900      # seconds; only a machine that does other work needs more than a minute

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX shell")]


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


# README line: (flags added to make it tiny, standard input), or the word under which it is tested elsewhere.
COMMANDS = {
    "./run_experiment.sh": "the fixture `house` runs it",
    "TARGET_HOURS=0.5 MAX_STEPS=20 ./run_experiment.sh": "the fixture `house` runs it",
    "./run_experiment.sh --model_size tiny --from_scratch": "test_flags_of_the_experiment",
    "./run_tests.sh": "it runs this file",
    "python serve.py": "tests/test_serve.py starts and stops it",
    "python serve.py --responder openai:http://127.0.0.1:11434 --responder_model qwen3": "tests/test_responders.py asks such a server",
    ". .venv/bin/activate": "every test here uses the environment's Python",
    "python setup_environment.py": ("", ""),
    "python setup_environment.py --check": ("", ""),
    "python demo.py": ("--max_seconds 1 --output outputs/chat", "Hello there.\n/save\n/quit\n"),
    "python demo.py --voice my_voice.wav": ("--max_seconds 1 --output outputs/voice", "Hello there.\n/reset\n/quit\n"),
    "python demo.py --mode test": ("--max_seconds 0.5 --output outputs/test", ""),
    "python demo.py --mode batch --input examples/conversations.json --output outputs/batch": ("--max_seconds 1", ""),
    "python demo.py --responder smollm": ("--max_seconds 1 --output outputs/asked", "Hello there.\n/quit\n"),
    "python demo.py --precision int8": ("--max_seconds 1 --output outputs/int8", "Hello there.\n/quit\n"),
    "python demo.py --compile_depth": ("--max_seconds 1 --output outputs/compiled", "Hello there.\n/quit\n"),
    "python demo.py --speculative auto": ("--max_seconds 1 --output outputs/drafted", "Hello there.\n/quit\n"),
    "python checkpoint.py --checkpoint checkpoints/best_model.pt --output checkpoints/nano-int8 --quantise int8": ("", ""),
    "python collect_data.py --target_hours 1": ("--target_hours 0.01", ""),
    "python collect_data.py --target_hours 1 --texts my_texts.txt --output data/readings": ("--target_hours 0.004 --engine hibari --workers 1", ""),
    "python collect_data.py corpora": ("", ""),
    "python collect_data.py --source folder --path my_recordings --output data/mine": ("", ""),
    "python collect_data.py report --data data/mine --output outputs/data_report.html": ("--data data/synthetic", ""),
    "python collect_data.py plan --hours 100000 --price 0.03": ("--results people.md", ""),
    "python dataset_pipeline.py --data data/synthetic --codec pretrained/codec": ("", ""),
    "python config.py": ("", ""),
    "python rvq_tokenizer.py encode my_voice.wav outputs/voice.codes": ("", ""),
    "python rvq_tokenizer.py info outputs/voice.codes": ("", ""),
    "python rvq_tokenizer.py decode outputs/voice.codes outputs/voice.wav": ("", ""),
    "python checkpoint.py import_csm csm-1b --output checkpoints/csm-1b": ("", ""),
    "python checkpoint.py export_csm checkpoints/csm-1b --format transformers --output checkpoints/csm-1b-transformers": ("", ""),
    "python train.py --max_steps 1000": (f"--max_steps 2 {TINY_TRAIN} checkpoints/again", ""),
    "python train.py --resume checkpoints/last.pt --max_steps 2000": ("--max_steps 3 --output checkpoints/longer", ""),
    "python train.py --max_steps 1000 --samples 3 --sample_every 250 --scored 4 --score_every 500": (f"--max_steps 2 --samples 1 --scored 1 {TINY_TRAIN} checkpoints/watched", ""),
    "python train.py --model_size tiny --from_scratch": (f"--max_steps 1 {TINY_TRAIN} checkpoints/scratch", ""),
    "python train_ear.py --checkpoint pretrained/nano": ("--checkpoint checkpoints/best_model.pt --max_steps 2 --eval_turns 2 --batch_frames 100 --wandb disabled --output checkpoints/with_ear", ""),
    "python train_codec.py --max_steps 20000": ("--max_steps 1 --batch 1 --seconds 0.96 --limit_hours 0.005 --wandb disabled", ""),
    "python train_codec.py --init_from checkpoints/codec/last.pt --decoder_only --lr 3e-4 --output checkpoints/decoder":
        ("--max_steps 1 --batch 1 --seconds 0.96 --limit_hours 0.005 --wandb disabled", ""),
    "python train_codec.py --export checkpoints/codec/pretrained --resume checkpoints/codec/last.pt": ("", ""),
    "python checkpoint.py --checkpoint checkpoints/best_model.pt --output checkpoints/nano": ("--output checkpoints/small", ""),
    "python train.py --lora --data my_recordings": (f"--init_from checkpoints/best_model.pt --max_steps 2 {TINY_TRAIN} checkpoints/mine", ""),
    "python demo.py --adapter checkpoints/adapter": ("--adapter checkpoints/mine/adapter --max_seconds 1 --output outputs/mine", "Hello there.\n/quit\n"),
    "python lora.py --output checkpoints/merged": ("--adapter checkpoints/mine/adapter", ""),
    "python train.py --model_size large --dry_run --ranks 64 --gpu_memory_gb 80": ("", ""),
    "python benchmark.py judges": ("--turns 2 --results outputs/R.md", ""),
    "python benchmark.py data": ("--turns 2 --results outputs/R.md", ""),
    "python benchmark.py codec": ("--turns 2 --results outputs/R.md", ""),
    "python benchmark.py tokens": ("--turns 2 --train_turns 20 --probe_turns 2 --steps 3 --model_steps 10 --results outputs/R.md", ""),
    "python benchmark.py voice": ("--turns 2 --sets 1 --long 2 --listen 2 --results outputs/R.md", ""),
    "python benchmark.py ear": ("--turns 2 --checkpoint checkpoints/with_ear --results outputs/R.md", ""),
    "python benchmark.py replies": ("--prompts 2 --results outputs/R.md", ""),
    "python benchmark.py personal": ("--turns 2 --minutes 0.25 --steps 1 --results outputs/R.md", ""),
    "python benchmark.py speed": ("--turns 2 --results outputs/R.md", ""),
    "python benchmark.py latency": ("--quick --turns 2 --long 8 --frames 2 --rows 'nano turn,order: delay' --no_judge --results outputs/R.md", ""),
    "python experiments/token_orders.py": ("--model_size test --frames 3 --repeats 1", ""),
    "python experiments/token_orders.py --train_steps 2000": ("--model_size test --frames 3 --repeats 1 --train_steps 2 --batch 2 --spoken_turns 1 --eval_turns 2", ""),
    "python benchmark.py serve": ("--sessions 1 --seconds 1 --talks 1 --ends 2 --replay 2 --malformed 30 --results outputs/R.md", ""),
    "python benchmark.py train": ("--model_size test --rows 1 --positions 128 --repeats 1 --races fp32 --plan test --results outputs/R.md", ""),
    "python benchmark.py watermark": ("--turns 3 --keys 2 --results outputs/R.md", ""),
    "python watermark.py embed my_voice.wav --output outputs/marked.wav": ("", ""),
    "python watermark.py detect outputs/marked.wav": ("", ""),
    "python train_watermark.py": ("--turns 10 --steps 3 --batch 2", ""),
    "python benchmark.py evaluation": ("--spoiled 2 --spoken 1 --voices 0 --kinds noise --jobs 1 --max_seconds 1 --results outputs/R.md", ""),
    "python benchmark.py conversations": ("--count 1 --beside 1 --again 0 --jobs 1 --max_seconds 1 --results outputs/R.md", ""),
    "python benchmark.py engine": ("--turns 2 --sessions 1,2 --repeats 1 --long 16 --results outputs/R.md", ""),
    "python benchmark.py fast": ("--turns 2 --sentences 1 --frames 3 --sizes nano --variants plain,int8,speculative --checkpoint checkpoints/best_model.pt --results outputs/R.md", ""),
    "python benchmark.py people": ("--prompts none --split train --parts turns,filters --conversations 1 --turns 3 --clips 2 --results outputs/R.md", ""),
    "python benchmark.py inspect": ("--save outputs/inspect", ""),
    "python evaluation_framework.py validate": ("--count 2 --jobs 1 --kinds noise", ""),
    "python evaluation_framework.py run --checkpoint checkpoints/best_model.pt --conversations data/synthetic --output outputs/evaluation":
        ("--count 1 --jobs 1 --again 0 --max_seconds 1", ""),
    "python evaluation_framework.py pronunciation": ("--voices 0 --judge_voices 1", ""),
    "python evaluation_framework.py fit": "tests/test_evaluation_framework.py: the house has too little data",
    "python experiments/h1_semantic_codes.py": ("--train_turns 6 --test_turns 3 --linear_steps 2 --recurrent_steps 2 --seeds 1 --results outputs/R.md", ""),
    "python experiments/h2_prosodic_memory.py": ("--steps 0 --checkpoint '' --results outputs/R.md", ""),
    "python experiments/h3_cross_attention.py": ("--steps 1 --seeds 1 --codebooks 4 --width 16 --layers 2 --batch_positions 512 --held_out 2 --conditions on,off --results outputs/R.md", ""),
    "python experiments/human_speech.py": "tests/test_human_speech.py: it needs prompts of people, of Debian's packages",
    "python experiments/scaling.py": ("--steps 6 --seeds 1 --codebooks 4 --batch_positions 512 --sizes 16x2,24x2 --draws 2 --held_out 2 --results outputs/R.md", ""),
    "python report.py": ("--no_judges --output outputs/again.html", ""),
}


def run(house: Path, command: list[str], stdin: str = "", **env) -> subprocess.CompletedProcess:
    """Ends politely when it takes too long, so that no step is left running."""
    process = subprocess.Popen(command, cwd=house, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    try:
        out, err = process.communicate(stdin, timeout=PATIENCE)
    except BaseException:
        process.terminate()
        process.wait(60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def tiny_codec(folder: Path) -> None:
    from checkpoint import save_codec
    from config import CodecConfig
    from rvq_tokenizer import Codec
    save_codec(Codec(CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, semantic_dim=8, acoustic_dim=8, width=32, latent=32,
                                 encoder_layers=1, latent_layers=1, decoder_width=32, decoder_layers=1, num_mels=40)).eval(), folder)


def tiny_official_weights(folder: Path) -> None:
    """A CSM in Sesame's own format, tiny and untrained."""
    import csm_weights
    from architecture import CSM
    from config import OFF, model_preset
    model = CSM(model_preset("test", **OFF))
    model.init_weights()
    csm_weights.write(csm_weights.Official(model.cfg, model.state_dict(), "original"), folder, "original")


def this_python_as_environment(venv: Path) -> None:
    """A folder that setup_environment takes for a finished environment; its Python is the one that runs the tests."""
    python = setup_environment.venv_python(venv)
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    stamp = {"python": "3", "dev": False, "missing": [], "hash": setup_environment.requirements_hash(ROOT, "3")}
    (venv / setup_environment.STAMP).write_text(json.dumps(stamp))


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> Path:
    """A copy of the project in which ./run_experiment.sh has gone through, at the smallest size."""
    folder = tmp_path_factory.mktemp("house")
    for name in [p.name for p in ROOT.glob("*.py")] + ["run_experiment.sh", "requirements.txt", "constraints.txt"]:
        shutil.copy2(ROOT / name, folder / name)
    for name in ("assets", "examples", "experiments"):
        shutil.copytree(ROOT / name, folder / name)
    tiny_codec(folder / "pretrained/codec")
    shutil.copytree(ROOT / "pretrained/watermark", folder / "pretrained/watermark")
    tiny_official_weights(folder / "csm-1b")
    this_python_as_environment(folder / ".venv")
    done = run(folder, ["./run_experiment.sh"], TARGET_HOURS="0.01", MAX_STEPS="2", MODEL_SIZE="test")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "first_run.txt").write_text(done.stdout)
    import audio_io
    voice = audio_io.read_audio(next((folder / "data/synthetic").rglob("*.flac")))
    audio_io.write_audio(folder / "my_voice.wav", voice)
    (folder / "my_texts.txt").write_text("".join(f"The bus number {n} leaves at {n} past seven today.\n" for n in range(300)))
    rates = {"rates": dict.fromkeys(("channels", "voices", "asr", "filters", "tokens"), 10.0), "bytes_per_hour": dict.fromkeys(("flac", "manifests", "tokens"), 1e8)}
    (folder / "people.md").write_text(f"<!-- begin people -->\n```json\n{json.dumps(rates)}\n```\n<!-- end people -->\n")
    (folder / "my_recordings").mkdir()
    for name in ("one_ann", "two_ann", "three_bob"):
        audio_io.write_audio(folder / "my_recordings" / f"{name}.wav", voice)
        (folder / "my_recordings" / f"{name}.txt").write_text("What was said there.\n")
    return folder


# ----------------------------------------------------------------------------- the README

def test_every_command_of_the_readme_is_known():
    assert sorted(set(readme_commands())) == sorted(COMMANDS)


@pytest.mark.parametrize("line", [line for line, how in COMMANDS.items() if isinstance(how, tuple)])
def test_readme_command(house, line):
    flags, stdin = COMMANDS[line]
    words = shlex.split(line)
    assert words[0] == "python"
    if words[1] == "train_codec.py":
        pytest.importorskip("pyworld")
    done = run(house, [sys.executable, *words[1:], *shlex.split(flags)], stdin)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_flags_of_the_experiment():
    settings = run_experiment.read_settings(run_experiment.parse(["--model_size", "tiny", "--from_scratch"]))
    train = next(s for s in run_experiment.build_steps(settings) if s.name == "train")
    assert {"--from_scratch", "tiny"} <= set(train.arguments)


# ----------------------------------------------------------------------------- the experiment

def test_the_experiment_leaves_everything_it_names(house):
    said = (house / "first_run.txt").read_text()
    made = [line.strip() for line in said.split("made:\n")[1].splitlines()]
    assert "outputs/report.html" in made and "checkpoints/best_model.pt" in made
    assert [name for name in made if not (house / name).exists()] == []
    results = json.loads((house / "outputs/demo/results.json").read_text())
    conversations = {c["id"]: c["turns"] for c in results["conversations"]}
    assert len(conversations) >= 5 and max(map(len, conversations.values())) >= 6
    assert all((house / "outputs/demo" / t["audio"]).exists() for turns in conversations.values() for t in turns)


def test_the_second_run_skips_every_step(house):
    done = run(house, ["./run_experiment.sh"], TARGET_HOURS="0.01", MAX_STEPS="2", MODEL_SIZE="test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before, skipped") == len(run_experiment.build_steps(run_experiment.Settings(model_size="nano")))


def test_batch_results_have_the_documented_shape(house):
    """The keys of the README's example, all filled in, and paths relative to the folder."""
    flags, _ = COMMANDS["python demo.py --mode batch --input examples/conversations.json --output outputs/batch"]
    done = run(house, [sys.executable, "demo.py", "--mode", "batch", "--input", "examples/conversations.json", "--output", "outputs/shape", *flags.split()])
    assert done.returncode == 0, done.stderr
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = next(json.loads(b) for b in re.findall(r"^```json\n(.*?)^```", text, re.S | re.M) if "first_audio_ms" in b)
    results = json.loads((house / "outputs/shape/results.json").read_text())
    assert set(results) >= set(wanted)
    for conversation in results["conversations"]:
        assert set(conversation) >= set(wanted["conversations"][0])
        for turn in conversation["turns"]:
            assert set(turn) >= set(wanted["conversations"][0]["turns"][0]) and None not in (turn["duration_s"], turn["total_ms"])
            assert (house / "outputs/shape" / turn["audio"]).exists() and turn["text"]


def test_the_readme_input_example_is_accepted(house):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = next(b for b in re.findall(r"^```json\n(.*?)^```", text, re.S | re.M) if '"mood"' in b)
    (house / "readme.json").write_text(example)
    done = run(house, [sys.executable, "demo.py", "--mode", "batch", "--input", "readme.json", "--output", "outputs/readme", "--max_seconds", "0.5"])
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


# ----------------------------------------------------------------------------- plain errors

BAD = [("serve.py", "--host", "0.0.0.0"), ("serve.py", "--responder", "nobody"), ("serve.py", "--end_ms", "5"), ("serve.py", "--checkpoint", "nowhere"), ("demo.py", "--checkpoint", "README.md"), ("demo.py", "--mode", "batch"), ("demo.py", "--mode", "batch", "--input", "none.json"),
       ("demo.py", "--voice", "requirements.txt"), ("demo.py", "--temperature", "-1"), ("demo.py", "--codec", "nowhere"),
       ("train.py", "--data", "nowhere"), ("train.py", "--resume", "requirements.txt"), ("train.py", "--model_size", "enormous"),
       ("train_codec.py", "--data", "nowhere"), ("dataset_pipeline.py", "--data", "nowhere"), ("dataset_pipeline.py", "--codec", "nowhere"),
       ("collect_data.py", "--target_hours", "-1"), ("collect_data.py", "--target_hours", "much"), ("checkpoint.py", "--checkpoint", "nowhere", "--output", "x"),
       ("report.py", "--demo", "requirements.txt")]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_one_line_and_exit_2(house, words):
    done = run(house, [sys.executable, *words])
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
