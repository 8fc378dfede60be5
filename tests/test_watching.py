"""Watching a training: samples, scores and W&B, none of which changes what is trained or ends it."""
import json
import math
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import checkpoint
import demo
import runtime
import train
import watching
from audio_io import read_audio
from config import CodecConfig, TrainConfig
from rvq_tokenizer import Codec
from runtime import Ranks, read_metrics
from test_train import flags, losses, run, same, settings, write_tokens

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """(data, codec): tokens of a tiny untrained codec."""
    folder = tmp_path_factory.mktemp("house")
    codec = Codec(CodecConfig(width=16, latent=16, codebook_size=64, encoder_layers=1, latent_layers=1, decoder_width=32, decoder_layers=1, num_mels=40))
    fingerprint = checkpoint.save_codec(codec, folder / "codec")
    return write_tokens(folder / "data", fingerprint, conversations=2), folder / "codec"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Speech of half a second, without the shipped voices."""
    monkeypatch.setattr(train, "load_lexicon", lambda *a: None)
    monkeypatch.setattr(watching, "SECONDS", 0.5)
    monkeypatch.setattr(watching, "LINE_WORDS", (1, 14))
    monkeypatch.setattr(demo, "shipped_voices", lambda folder: [])


def watched(house, output, **changes):
    data, codec = house
    return settings(data, output, **{"codec": str(codec), "eval_every": 2, "samples": 1} | changes)


def restless(self):
    """Scores of a judge that draws random numbers and takes threads as it likes."""
    random.random(), np.random.rand(3), torch.rand(5), torch.set_num_threads(torch.get_num_threads() + 1)
    return dict.fromkeys(watching.SCORES, 0.5) | {"mood": None, "conversations": 2, "seconds": 0.1}


# ----------------------------------------------------------------------------- nothing changes

def test_a_watched_training_computes_the_same_bits_and_resumes_to_them(house, tmp_path, monkeypatch):
    monkeypatch.setattr(watching.Watcher, "scores", restless)
    threads = torch.get_num_threads()
    run(watched(house, tmp_path / "alone", samples=0))
    run(watched(house, tmp_path / "watched", sample_every=1, scored=2, score_every=2))
    assert len(list((tmp_path / "watched/samples").glob("step_*/1.wav"))) == 6 and torch.get_num_threads() == threads
    part = train.Trainer(watched(house, tmp_path / "part", sample_every=1, scored=2, score_every=1))
    step = part._step_and_log
    part._step_and_log = lambda: (step(), setattr(part, "interrupted", part.step == 3))
    part.run()
    run(*train.read_settings(["--resume", str(tmp_path / "part/last.pt")]))
    want = checkpoint.load_training(tmp_path / "alone/last.pt")
    for name in ("watched", "part"):
        got = checkpoint.load_training(tmp_path / name / "last.pt")
        for key in ("model", "ema", "optimizer", "loader", "rng", "best", "validation"):
            same(want[key], got[key], f"{name}/{key}")
        assert losses(tmp_path / name) == losses(tmp_path / "alone")


def test_random_numbers_and_threads_go_on():
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(1)), torch.get_num_threads()
    with runtime.undisturbed():
        want = draws()
        torch.set_num_threads(3)
    assert draws() == want
    with pytest.raises(KeyError), runtime.undisturbed():
        draws()
        raise KeyError
    after = draws()
    assert after[-1] == want[-1] and after != want


# ----------------------------------------------------------------------------- samples

def test_samples_are_sound_and_picture_of_held_out_lines_by_the_averaged_weights(house, tmp_path, monkeypatch):
    trainer = train.Trainer(watched(house, tmp_path, samples=2))
    with torch.no_grad():
        trainer.average.values[0] += 1.0
    weights, averaged, heard = [p.detach().clone() for p in trainer.model.parameters()], trainer.average.values[0].clone(), []
    converse = demo.Lab.converse
    monkeypatch.setattr(demo.Lab, "converse", lambda self, plan: heard.append((next(self.model.parameters()).clone(), self.model.training)) or converse(self, plan))
    folder = trainer.watcher.write_samples(7)
    rows = json.loads((folder / "samples.json").read_text())
    assert folder == tmp_path / "samples/step_000007" and {r["text"] for r in rows} == {"good morning.", "yes."}
    for row in rows:
        audio = read_audio(folder / row["audio"])
        assert 0 < len(audio) == round(row["seconds"] * 24000) <= 0.6 * 24000 and (folder / row["picture"]).read_bytes()[:4] == PNG and isinstance(row["ended"], bool)
    assert torch.equal(heard[0][0], averaged) and not heard[0][1] and trainer.model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters()))
    first = [read_audio(folder / row["audio"]) for row in rows]
    again = trainer.watcher.write_samples(8)
    assert all(np.array_equal(a, read_audio(again / row["audio"])) for a, row in zip(first, rows))             # the same draw: steps can be compared


def test_the_lines_are_those_of_the_validation_split_and_the_same_every_time():
    def turn(text):
        return types.SimpleNamespace(text=text)
    talks = [[turn(f"this is the line number {n}"), turn("no"), turn(" ".join(["long"] * 20))] for n in range(20)]
    lines = watching.held_out_lines(talks, 3)
    assert lines == watching.held_out_lines(talks[::-1], 3) and len(set(lines)) == 3 and all("line number" in line for line in lines)
    assert watching.held_out_lines([], 2) == list(watching.LINES[:2])


@pytest.mark.parametrize("every, steps", [(0, [2, 4, 5]), (3, [3, 5]), (-1, [5])])
def test_how_often_is_a_flag(house, tmp_path, monkeypatch, every, steps):
    """0: at every validation, but not before an untrained model has learned something."""
    looked = []
    monkeypatch.setattr(watching.Watcher, "look", lambda self, step, log, sample, score: looked.append((step, sample, score)))
    run(watched(house, tmp_path, max_steps=5, sample_every=every, score_every=-1))
    assert [step for step, sample, _ in looked if sample] == steps and [step for step, _, score in looked if score] == [5]


def test_only_the_first_rank_looks(house, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(watching.Watcher, "look", lambda self, step, *more: looked.append(step))
    for rank in (1, 0):
        trainer = train.Trainer(watched(house, tmp_path, max_steps=2), ranks=Ranks(rank, 1, rank))
        assert not looked
        trainer.run()
    assert looked[-1] == 2


def test_two_ranks_wait_for_the_first_one_to_look(house, tmp_path):
    """Under torchrun: one set of samples, and the losses of a run that was not watched."""
    options = {"max_steps": 2, "eval_every": 1, "lexicon_words": 0}
    run(watched(house, tmp_path / "alone", accumulate=2, **options | {"samples": 0}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *flags(watched(house, tmp_path / "two", scored=1, **options))]
    done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "two/samples").iterdir()) == ["step_000001", "step_000002"] and done.stderr.count("note: no scores") == 1


def test_a_sharded_run_says_that_it_cannot(house, tmp_path, monkeypatch, capsys):
    trainer = train.Trainer(watched(house, tmp_path))
    monkeypatch.setattr(trainer, "plan", types.SimpleNamespace(sharded=True))
    trainer._watch(True, True)
    assert capsys.readouterr().err.count("no rank of a sharded run holds the whole model") == 1 and not (tmp_path / "samples").exists()


def test_a_new_run_sets_the_samples_aside(tmp_path):
    for text in ("old", "new"):
        (tmp_path / "samples/step_000001").mkdir(parents=True)
        (tmp_path / "samples/step_000001/samples.json").write_text(text)
        train.set_aside(tmp_path)
    assert (tmp_path / "previous/samples/step_000001/samples.json").read_text() == "new" and not (tmp_path / "samples").exists()


# ----------------------------------------------------------------------------- what fails

@pytest.mark.parametrize("what", ["codec missing", "another codec", "speech", "disk", "judges"])
def test_whatever_fails_is_one_line_and_training_goes_on(house, tmp_path, monkeypatch, capsys, what):
    def broken(*a, **k):
        raise RuntimeError("CUDA out of memory.\nTried to allocate too much")
    cfg = watched(house, tmp_path / "run", scored=1)
    if what == "codec missing":
        cfg.codec = str(tmp_path / "none")
    if what == "another codec":
        checkpoint.save_codec(Codec(CodecConfig(width=16, latent=16, codebook_size=64, encoder_layers=1, latent_layers=1, decoder_width=32, decoder_layers=1, num_mels=20)), tmp_path / "other")
        cfg.codec = str(tmp_path / "other")
    if what == "speech":
        monkeypatch.setattr(demo.Lab, "converse", broken)
    if what == "disk":
        monkeypatch.setattr(runtime, "write_json", broken)
    trainer = run(cfg)
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("note: no ")]
    assert trainer.step == 6 and trainer.model.training and len(losses(tmp_path / "run")) == 6
    assert len(said) == (1 if what == "judges" else 2) and all("training goes on" in line for line in said)          # the data holds no conversations to score: always the last
    rows = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if m["kind"] == "evaluation"]
    assert [m["step"] for m in rows] == [2, 4, 6] and all(m[f"evaluation/{name}"] is None for m in rows for name in watching.SCORES)


# ----------------------------------------------------------------------------- scores

def conversations_in(folder, count=3, turns=12, seconds=1.2):
    """A collected validation split of humming."""
    import gzip

    from audio_io import write_audio
    (folder / "manifests/validation").mkdir(parents=True)
    tone = 0.2 * np.sin(2 * np.pi * 150 * np.arange(int(seconds * 24000)) / 24000).astype(np.float32)
    write_audio(folder / "hum.wav", tone)
    rows = [{"recording_id": f"c{c}", "speaker": "ab"[t % 2], "text": "what a fine morning", "start": t * seconds, "duration": seconds, "custom": {"mood": "calm", "turn_audio": "hum.wav"}}
            for c in range(count) for t in range(turns)]
    with gzip.open(folder / "manifests/validation/supervisions.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in rows))


def test_the_short_evaluation_is_that_of_the_framework(house, tmp_path, monkeypatch):
    """Held-out conversations, spoken by the model in training, through the framework's own measures and scores."""
    import conversation_metrics as metrics
    import judges
    import validity
    conversations_in(tmp_path / "data")
    monkeypatch.setattr(judges, "transcribe", lambda audio, *more: "what a morning")
    monkeypatch.setattr(judges, "distill_mos", lambda audio, *more: 3.0)
    monkeypatch.setattr(judges, "speaker_embedding", lambda audio, *more: np.eye(1, 256, dtype=np.float32)[0])
    monkeypatch.setattr(validity, "natural_rendering", lambda text: None)
    trainer = train.Trainer(watched(house, tmp_path / "out", scored=2))
    trainer.cfg.data = f"{house[0]},{tmp_path / 'data'}"                       # folders without conversations are passed over
    plans = watching.held_out_plans(trainer.cfg.data, 2)
    assert [len(p.turns) for p in plans] == [watching.TURNS] * 2 and all(t.voice is not None for t in plans[0].turns[:2])
    assert len(watching.held_out_plans(trainer.cfg.data, 9)) == 3
    log = runtime.MetricsLog(tmp_path / "out")
    trainer.watcher.look(4, log, False, True)
    row, = read_metrics(log.path)
    assert row["step"] == 4 and row["kind"] == "evaluation" and row["evaluation/conversations"] == 2 and row["evaluation/seconds"] > 0
    assert row["evaluation/wer"] == pytest.approx(0.25) and row["evaluation/words"] == pytest.approx(0.75) and row["evaluation/sound"] == pytest.approx(0.5)
    assert row["evaluation/prosody"] is None and {f"evaluation/{name}" for name in metrics.SCORES} < set(row)


def test_nothing_held_out_is_said():
    with pytest.raises(ValueError, match="held out"):
        watching.held_out_plans("none", 2)


# ----------------------------------------------------------------------------- gates, rates, codebooks

def test_gates_and_decays_are_those_of_the_model(house, tmp_path):
    model = train.Trainer(watched(house, tmp_path)).model
    with torch.no_grad():
        model.read_memory[0].gate.fill_(0.25)
        model.hear_prosody[0].decay.fill_(1.0)
    found = watching.additions_now(model)
    assert found["gate/read_memory.0"] == 0.25 and found["gate/read_text.0"] == 1.0 and found["decay/hear_prosody.0"] == pytest.approx(math.log1p(math.e))
    memory = model.cfg.memory
    for bank, half in (("semantic", memory.semantic_half_life), ("prosodic", memory.prosodic_half_life)):
        assert found[f"decay/read_memory.0/{bank}"] == pytest.approx(math.log(2) / half, rel=1e-4)
    assert watching.additions_now(torch.nn.Linear(2, 2)) == {}


def test_the_loss_of_each_codebook_is_logged_and_adds_up(house, tmp_path):
    trainer = train.Trainer(watched(house, tmp_path, accumulate=2))
    trainer.next_batch = lambda: trainer.data.draw(trainer.stage())
    means = trainer.gradients()
    assert len(means["per_codebook"]) == trainer.model.cfg.num_codebooks and means["per_codebook"][0] == means["c0"]
    weights = trainer.model.cfg.depth_weights
    assert np.mean([w * v for w, v in zip(weights, means["per_codebook"][1:])]) == pytest.approx(means["depth"], rel=1e-5)
    trainer.data.close()


# ----------------------------------------------------------------------------- W&B

class Seen:
    """Stands in for wandb."""

    def __init__(self):
        self.lines, self.fails = [], False
        self.api, self.Settings, self.run = types.SimpleNamespace(api_key="k"), lambda **k: k, self

    def init(self, **how):
        self.how = how
        return self

    def log(self, values, step):
        if self.fails:
            raise OSError("no network")
        self.lines.append((step, values))

    def finish(self):
        pass

    def Audio(self, path, caption):
        return "sound", read_audio(path), caption

    def Image(self, path, caption):
        return "picture", open(path, "rb").read(4), caption


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_gets_everything_during_training(house, tmp_path, monkeypatch, mode):
    seen = Seen()
    monkeypatch.setitem(sys.modules, "wandb", seen)
    monkeypatch.setattr(watching.Watcher, "scores", restless)
    cfg = watched(house, tmp_path, wandb=mode, scored=2)
    run(cfg)
    assert seen.how["mode"] == mode
    names = {name for _, values in seen.lines for name in values}
    codebooks = [f"{k:02d}" for k in range(1, train.model_preset("test").num_codebooks + 1)]
    assert {f"per_codebook/{k}" for k in codebooks} | {f"validation_per_codebook/{k}" for k in codebooks} < names
    assert {"grad_norm", "lr", "muon_lr", "gate/read_memory.0", "decay/read_memory.0/semantic", "decay/read_memory.0/prosodic", "samples/1", "spectrograms/1", "evaluation/words", "evaluation/wer"} < names
    assert "evaluation/mood" not in names                                      # not scored: no value
    steps = [step for step, _ in seen.lines]
    assert steps == sorted(steps)                                              # W&B drops what comes late
    step, values = next((s, v) for s, v in seen.lines if "samples/1" in v)
    assert step == 2 and values["samples/1"][0] == "sound" and len(values["samples/1"][1]) and values["spectrograms/1"][1] == PNG and values["samples/1"][2] in ("good morning.", "yes.")
    rates = [m for m in read_metrics(tmp_path / "metrics.jsonl") if m["kind"] == "train"]
    assert all(m["lr"] == pytest.approx(cfg.lr * m["lr_factor"]) and m["muon_lr"] == pytest.approx(cfg.muon_lr * m["lr_factor"]) for m in rates)


def test_wandb_that_fails_at_a_sample_costs_wandb_alone(house, tmp_path, monkeypatch, capsys):
    seen = Seen()
    seen.Image = None
    monkeypatch.setitem(sys.modules, "wandb", seen)
    run(watched(house, tmp_path, wandb="offline"))
    assert capsys.readouterr().err.count("note: W&B") == 1 and len(losses(tmp_path)) == 6 and len(list((tmp_path / "samples").glob("*/1.png"))) == 3


def test_the_real_wandb_offline_takes_sound_and_pictures(house, tmp_path):
    pytest.importorskip("wandb")
    run(watched(house, tmp_path, wandb="offline", max_steps=1))
    files = [p.suffix for p in (tmp_path / "wandb").glob("offline-run-*/files/media/**/*") if p.is_file()]
    assert ".wav" in files and ".png" in files and list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_without_wandb_nothing_is_loaded_and_nothing_asked(house, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                            # an import would fail
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question"))
    run(watched(house, tmp_path, wandb="disabled", max_steps=1))
    run(watched(house, tmp_path / "b", wandb="offline", max_steps=1))
    assert (tmp_path / "samples/step_000001/1.wav").exists() and len(losses(tmp_path / "b")) == 1


def test_counts_of_samples_cannot_be_negative():
    with pytest.raises(ValueError, match="--samples 0"):
        TrainConfig(samples=-1)
