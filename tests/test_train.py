"""The trainer on a tiny model and random shards: resume, accumulation, curriculum, averages, plain refusals."""
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import architecture
import checkpoint
import runtime
import train
from config import TrainConfig, model_preset, to_dict
from runtime import ROOT, Ranks, read_metrics

CFG = model_preset("test")
FINGERPRINT = "c" * 16


def write_tokens(folder, fingerprint=FINGERPRINT, conversations=8, turns=4):
    """Shards as dataset_pipeline.py writes them, with random codes."""
    generator = torch.Generator().manual_seed(0)
    index = {"format": 1, "codec_fingerprint": fingerprint, "tokenizer": "bytes", "frame_rate": 12.5, "num_codebooks": 32, "splits": {}}
    (folder / "tokens").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        records, codes, consumed = [], [], []
        for c in range(conversations):
            for t in range(turns):
                n = int(torch.randint(6, 20, (1,), generator=generator))
                text = "good morning." if t % 2 else "yes."
                codes.append(torch.randint(0, 64, (32, n), generator=generator).to(torch.int16))
                consumed.append((torch.arange(1, n + 1) * len(text) // n).to(torch.int16))
                records.append({"id": f"{split}{c}-{t}", "conversation": f"{split}{c}", "text": text, "frames": n, "phones": 2, "speaker": t % 2,
                                "mood": "calm", "character": "x"})
        tensors = {"codes": torch.cat(codes, 1), "consumed": torch.cat(consumed), "phones": torch.full((2 * len(records),), 5, dtype=torch.uint8)}
        header = {"format": "1", "codec_fingerprint": fingerprint, "content": "x", "turns": json.dumps(records)}
        save_file(tensors, folder / "tokens" / f"{split}-00000.safetensors", header)
        index["splits"][split] = {"shards": [f"{split}-00000.safetensors"]}
    (folder / "tokens/index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No lexicon file and no audio samples: tests/test_watching.py has them."""
    monkeypatch.setattr(train, "load_lexicon", lambda *a: None)
    monkeypatch.setattr(train.watching.Watcher, "look", lambda self, *what: None)


def settings(folder, output, **changes):
    return TrainConfig(**{"model_size": "test", "data": str(folder), "output": str(output), "max_steps": 6, "batch_positions": 256, "warmup_steps": 2,
                          "eval_every": 100, "eval_batches": 1, "save_every": 3, "log_every": 1, "precision": "fp32", "wandb": "disabled", "device": "cpu",
                          "from_scratch": True} | changes)


def flags(cfg):
    return [f"--{name}={value}" for name, value in to_dict(cfg).items()]


def run(cfg, saved=None):
    trainer = train.Trainer(cfg, saved)
    trainer.run()
    return trainer


def losses(folder):
    return [m["loss"] for m in read_metrics(folder / "metrics.jsonl") if m["kind"] == "train"]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(data, tmp_path, workers):
    """Worker processes that ran ahead of the stop (and of a stage of the curriculum) change nothing either."""
    whole = run(settings(data, tmp_path / "a"))
    part = train.Trainer(settings(data, tmp_path / "b", num_workers=workers))
    original = part._step_and_log

    def stop_after_three():
        original()
        part.interrupted = part.step == 3
    part._step_and_log = stop_after_three
    part.run()
    torch.manual_seed(99)
    cfg, saved = train.read_settings(["--resume", str(tmp_path / "b/last.pt")])
    assert cfg.max_steps == 6 and saved["step"] == 3 and cfg.num_workers == workers
    resumed = run(cfg, saved)
    assert not multiprocessing.active_children()
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 6
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values, resumed.average.values))


# ----------------------------------------------------------------------------- killed, and a full disk

def same(a, b, where="") -> None:
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def start(context, cfg):
    """A process that begins this run, or goes on with it where there is a checkpoint."""
    resume = os.path.join(cfg.output, "last.pt")
    process = context.Process(target=train.main, args=(["--resume", resume] if os.path.exists(resume) else flags(cfg),))
    process.start()
    return process


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows cannot kill this way")
def test_killed_at_random_moments_it_resumes_to_the_same_bits(data, tmp_path):
    """SIGKILL at `SIGKILLS` moments of a run that saves at every step (the issue asks for 20; 3 by default)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])                                 # torch is imported once, not per attempt
    options = {"max_steps": 8, "save_every": 1, "eval_every": 4, "lexicon_words": 0, "codec": str(tmp_path / "none")}
    began = time.monotonic()
    whole = start(context, settings(data, tmp_path / "whole", **options))
    whole.join()
    seconds, chance = time.monotonic() - began, random.Random(5)
    assert whole.exitcode == 0
    kills, runs, cfg = 0, 0, None
    wanted = int(os.environ.get("SIGKILLS", 3))
    while kills < wanted or cfg is not None:
        cfg = cfg or settings(data, tmp_path / f"killed{runs}", **options)
        process = start(context, cfg)
        process.join(chance.uniform(0.1, 1.0) * seconds if kills < wanted else None)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            want, got = (checkpoint.load_training(folder / "last.pt") for folder in (tmp_path / "whole", tmp_path / f"killed{runs}"))
            for name in ("model", "ema", "optimizer", "loader", "rng", "best", "validation", "step"):
                same(want[name], got[name], name)
            assert losses(tmp_path / "whole") == losses(tmp_path / f"killed{runs}")
            same(checkpoint.load_training(tmp_path / "whole/best_model.pt")["ema"], checkpoint.load_training(tmp_path / f"killed{runs}/best_model.pt")["ema"])
            assert not list((tmp_path / f"killed{runs}").glob(".*.tmp"))
            runs, cfg = runs + 1, None
    assert kills == wanted and runs >= 1


def test_killed_between_the_two_names_of_a_best_model(data, tmp_path, monkeypatch):
    def killed(*paths):
        raise SystemExit
    cfg = settings(data, tmp_path, max_steps=2, eval_every=1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "link_file", killed)
        run(cfg)
    (tmp_path / "last.pt").rename(tmp_path / "elsewhere.pt")
    assert not (tmp_path / "best_model.pt").exists()
    train.Trainer(*train.read_settings(["--resume", str(tmp_path / "elsewhere.pt")])).settle(checkpoint.load_training(tmp_path / "elsewhere.pt"))
    assert not (tmp_path / "best_model.pt").exists()                          # a file from elsewhere is not this folder's last.pt
    (tmp_path / "elsewhere.pt").rename(tmp_path / "last.pt")
    assert train.main(["--resume", str(tmp_path / "last.pt"), "--max_steps", "1"]) == 0
    assert (tmp_path / "best_model.pt").samefile(tmp_path / "last.pt")


def test_a_full_disk_is_survived(data, tmp_path, monkeypatch, capsys):
    """A save that fails half-way costs nothing: the file before it stays whole, training goes on and saves again."""
    write, full = runtime._write_into, []

    def failing(file, content):
        if callable(content) and len(full) < 2:
            file.write(b"half a file")
            full.append(checkpoint.load_training(tmp_path / "last.pt")["step"] if (tmp_path / "last.pt").exists() else None)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    def late(self):
        if self.step == 2:
            monkeypatch.setattr(runtime, "_write_into", failing)
        return due(self)
    due = train.Trainer.due_to_save
    monkeypatch.setattr(train.Trainer, "due_to_save", late)
    trainer = run(settings(data, tmp_path, save_every=1, max_steps=5))
    said = capsys.readouterr().err
    assert full == [1, 1] and said.count("the disk is full") == 2 and "saves again later" in said
    assert checkpoint.load_training(tmp_path / "last.pt")["step"] == 5 and trainer.saved_step == 5
    monkeypatch.setattr(runtime, "_write_into", lambda file, content: failing(file, content) if not full.clear() else None)
    with pytest.raises(ValueError, match="disk is full"):                     # at the end there is no later
        run(settings(data, tmp_path / "b", max_steps=1))


def test_accumulate_four_equals_a_batch_of_four(data, tmp_path):
    """One normaliser for all micro-batches: loss and gradient are those of all targets at once."""
    trainer = train.Trainer(settings(data, tmp_path, accumulate=4, batch_positions=128))
    trainer.data.p_history = 0.0                                              # join() below knows no history
    trainer.next_batch = lambda: trainer.data.next_batch(train.Stage(1))
    drawn = trainer._draw()
    batches = [d[0] for d in drawn]
    trainer._draw = lambda: drawn
    split = trainer.gradients()
    gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer._draw = lambda: [(join(*batches), None, None, torch.Generator().manual_seed(0))]
    together = trainer.gradients()
    for name in split:
        assert split[name] == pytest.approx(together[name], rel=1e-5), name
    scale = max(float(g.abs().max()) for g in gradient.values())
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - gradient[name]).abs().max() < 1e-5 * scale, name
    assert len({b.turn.shape for b in batches}) > 1                           # unequal micro-batches, or nothing is shown


def join(*batches):
    """Several batches as one."""
    from dataclasses import fields
    out = {}
    for f in fields(batches[0]):
        parts = [getattr(b, f.name) for b in batches]
        if parts[0] is None:
            out[f.name] = None
            continue
        shape = (sum(len(p) for p in parts), max(p.size(1) for p in parts), *parts[0].shape[2:])
        out[f.name], row = torch.full(shape, -1 if f.name in ("turn", "text_index", "reading") else 0, dtype=parts[0].dtype), 0
        for p in parts:
            out[f.name][row:row + len(p), :p.size(1)] = p
            row += len(p)
    return train.FrameBatch(**out)


def test_a_sixteenth_of_the_frames_stands_for_all(data, tmp_path):
    """The depth loss and its gradient over 1/16 of the frames, averaged over draws, are those over every frame."""
    trainer = train.Trainer(settings(data, tmp_path))
    model = trainer.model
    batch = trainer.data.next_batch(train.Stage(3))[0]
    voice = (batch.turn >= 0) & batch.mask[..., 0]
    with torch.no_grad():
        model.audio_head.mul_(20)                                             # frames must differ in their loss
        h = model(batch).flatten(0, 1)
    direction = torch.randn(model.audio_head.shape, generator=torch.Generator().manual_seed(1))

    def depth(fraction, seed):
        model.cfg.depth_fraction, out = fraction, {}
        model._audio_loss(h, batch, voice, torch.Generator().manual_seed(seed), out, {})
        loss = out["depth"][0] / out["depth"][1]
        slope = (torch.autograd.grad(loss, model.audio_head)[0] * direction).sum()
        return torch.stack([loss.detach(), slope]).double()

    full = depth(1.0, 0)
    draws = torch.stack([depth(1 / 16, seed) for seed in range(400)])
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - full).abs() < 4 * error).all()) and bool((error < 0.05 * full.abs().clamp(min=1)).all())
    assert bool((draws.std(0) > 1e-3).all())                                  # each draw is another share


def test_logits_in_pieces_equal_logits_at_once(data, tmp_path, monkeypatch):
    """Same losses and gradients, and no head ever makes more logits than the limit (the text head, codebook 0 and the depth decoder)."""
    trainer = train.Trainer(settings(data, tmp_path))
    model, batch, made, results = trainer.model, trainer.data.next_batch(train.Stage(3))[0], [], []
    bmm = torch.bmm
    for name in ("text_head", "codebook0_head"):
        getattr(model, name).register_forward_hook(lambda module, x, y: made.append(y.numel()))
    monkeypatch.setattr(torch, "bmm", lambda a, b: made.append(a.shape[0] * a.shape[1] * b.shape[2]) or bmm(a, b))
    for limit in (2 ** 24, 7 * 65 * 3):
        monkeypatch.setattr(architecture, "LOGITS", limit)
        made.clear()
        model.zero_grad()
        terms = model.loss(batch, generator=torch.Generator().manual_seed(0))
        metrics = terms.pop("metrics")
        train.weighted_loss(terms, {n: c for n, (_, c) in terms.items()}, model.cfg.loss_weights).backward()
        results.append(({n: float(v.detach()) for n, (v, _) in (terms | metrics).items()}, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        assert max(made) <= limit and (limit == 2 ** 24 or len(made) > 20)
    (plain, gradients), (pieces, others) = results
    assert pieces == pytest.approx(plain, rel=1e-5) and gradients.keys() == others.keys()
    scale = max(float(g.abs().max()) for g in gradients.values())
    assert all((others[n] - g).abs().max() < 1e-5 * scale for n, g in gradients.items())


def test_compile_reaches_every_block(data, tmp_path, monkeypatch):
    """What a compiled block computes is tests/test_architecture.py's to show."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(self))
    model = train.Trainer(settings(data, tmp_path, compile=True)).model
    assert compiled == train.blocks_of(model) and len(compiled) == CFG.backbone.layers + CFG.depth.layers


def test_counts_are_those_of_the_loss(data, tmp_path):
    trainer = train.Trainer(settings(data, tmp_path))
    for _ in range(3):
        batch, history, _ = trainer.data.next_batch(train.Stage(3))
        words = (torch.tensor([[97, 98], [99, 256]]), torch.tensor([[3, 0], [4, 0]]))
        terms = trainer.model.loss(batch, history, words)
        terms.pop("metrics")
        assert train.target_counts(trainer.model, batch, words) == {name: count for name, (_, count) in terms.items()}


def test_two_ranks_share_one_gradient(data, tmp_path):
    """Sum over ranks of gradients that were divided by the counts of all ranks (the ranks are simulated by hand)."""
    alone = train.Trainer(settings(data, tmp_path / "a", accumulate=2))
    alone.next_batch = lambda: alone.data.next_batch(train.Stage(0))
    drawn = alone._draw()
    alone._draw = lambda: drawn
    alone.gradients()
    want = alone.model.projection.weight.grad.clone()
    total = [alone._counts([d]) for d in drawn]
    both = {k: total[0][k] + total[1][k] for k in total[0]}
    got = torch.zeros_like(want)
    for d in drawn:
        one = train.Trainer(settings(data, tmp_path / "b"), ranks=Ranks(0, 1, 0))
        d[3].manual_seed(d[3].initial_seed())
        one._draw, one._counts = lambda d=d: [d], lambda drawn: both
        one.gradients()
        got += one.model.projection.weight.grad
    assert torch.allclose(got, want, atol=1e-6 * float(want.abs().max()) + 1e-8)


def test_torchrun_equals_one_process_with_twice_the_micro_batches(data, tmp_path):
    options = {"max_steps": 2, "lexicon_words": 0, "codec": str(tmp_path / "none")}
    run(settings(data, tmp_path / "alone", accumulate=2, **options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *flags(settings(data, tmp_path / "two", **options))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_from_scratch_the_first_loss_is_that_of_guessing(data, tmp_path):
    trainer = train.Trainer(settings(data, tmp_path))
    for value in trainer.validate()["per_codebook"]:
        assert abs(value - math.log(CFG.audio_vocab)) < 0.5
    assert len(trainer.validation["per_codebook"]) == CFG.num_codebooks


def test_training_lowers_the_validation_loss_and_writes_what_it_promises(data, tmp_path):
    trainer = run(settings(data, tmp_path, max_steps=15, eval_every=5, save_every=-1))
    held = [m["validation_c0"] for m in read_metrics(tmp_path / "metrics.jsonl") if m["kind"] == "validation"]
    assert len(held) == 4 and held[-1] < held[0] - 0.02
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best_model.pt", "last.pt", "loss.png", "metrics.jsonl"]
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    model = checkpoint.load_model(tmp_path / "best_model.pt")
    assert torch.equal(model.projection.weight, dict(zip(trainer.average.names, trainer.average.values))["projection.weight"]) and model.codec_fingerprint == FINGERPRINT


def test_validation_does_not_disturb_training(data, tmp_path):
    run(settings(data, tmp_path / "a", eval_every=1))
    run(settings(data, tmp_path / "b", eval_every=100))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_curriculum_only_from_scratch(data, tmp_path):
    trainer = train.Trainer(settings(data, tmp_path, max_steps=10))
    assert trainer.stage() == train.Stage(0, train.EARLY_SECONDS)
    trainer.step = 4
    assert trainer.stage() == train.Stage(3)
    checkpoint.save_pretrained(trainer.model, tmp_path / "shipped", codec_fingerprint=FINGERPRINT)
    tuned = train.Trainer(settings(data, tmp_path, from_scratch=False, init_from=str(tmp_path / "shipped")))
    assert tuned.stage() == train.Stage(3) and tuned.lr_scale < 1


def test_minutes_rule_the_schedule_and_are_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "monotonic", lambda ticks=iter(range(10 ** 6)): next(ticks) * 5.0)      # a clock of 5 s per look
    saves = []
    save = train.Trainer.save
    monkeypatch.setattr(train.Trainer, "save", lambda self, best=False: saves.append(self.step) or save(self, best))
    trainer = run(settings(data, tmp_path, minutes=1.0, max_steps=1, save_every=-1, save_minutes=0.25))
    assert trainer.minutes >= 1.0 and trainer.step > 1 and len(saves) > 1        # by the clock, and at the end
    assert checkpoint.load_training(tmp_path / "last.pt")["minutes"] == trainer.minutes


def test_average_follows_and_swaps(data, tmp_path):
    model = torch.nn.Linear(2, 2)
    average = train.Average(model, 0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1.0
    average.update()
    live = model.weight.detach().clone()
    with average.applied():
        assert torch.allclose(model.weight, before + 0.9)                      # decay of the first update: 1/10
    assert torch.equal(model.weight, live)


def test_every_parameter_is_in_exactly_one_optimiser(data, tmp_path):
    trainer = train.Trainer(settings(data, tmp_path))
    grouped = [id(p) for o in trainer.optimisers for g in o.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainer.model.parameters())
    matrices, decayed, plain = train.split_parameters(trainer.model)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    assert not any("head" in names[id(p)] or "embedding" in names[id(p)] for p in matrices)
    assert any("gate" in names[id(p)] for p in plain) and any("audio_head" in names[id(p)] for p in decayed)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_not_finite_stops_before_the_step(data, tmp_path, what, monkeypatch):
    trainer = train.Trainer(settings(data, tmp_path))
    if what == "loss":
        with torch.no_grad():
            trainer.model.codebook0_head.weight[0] = float("nan")
    else:                                                                     # the loss is finite, its gradient is not
        trainer.model.projection.weight.register_hook(lambda gradient: gradient * math.inf)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    monkeypatch.setattr(trainer, "_evaluate", lambda keep: None)
    with pytest.raises(ValueError, match=f"the {what} of step 0 is not finite.*--lr"):
        trainer.run()
    assert all(torch.equal(p, before[n]) or n == "codebook0_head.weight" for n, p in trainer.model.named_parameters())
    found = torch.load(tmp_path / "nonfinite-0.pt", weights_only=True)
    assert found["step"] == 0 and torch.equal(found["frames"], trainer.last_batch[0].frames) and "history" in found


def test_plain_refusals(data, tmp_path, capsys):
    def error(**changes):
        assert train.main(flags(settings(data, tmp_path / "out", **changes))) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("error: ")
        return err
    assert "python collect_data.py" in error(data=str(tmp_path / "none"))
    assert "there is no checkpoint" in error(resume=str(tmp_path / "none.pt"))
    assert "nano" in error(model_size="giant")
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    assert "damaged" in error(resume=str(tmp_path / "bad.pt"))
    assert not (tmp_path / "out").exists()


def test_another_codec_is_refused(data, tmp_path, capsys):
    run(settings(data, tmp_path / "a", max_steps=1))
    other = write_tokens(tmp_path / "other", "d" * 16, conversations=1)
    before = (tmp_path / "a/last.pt").read_bytes()
    assert train.main(["--resume", str(tmp_path / "a/last.pt"), "--data", str(other), "--max_steps", "3"]) == 2
    assert "fingerprint" in capsys.readouterr().err and (tmp_path / "a/last.pt").read_bytes() == before


def test_damaged_shards_are_skipped_counted_and_named(tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file

    from dataset_pipeline import read_turns
    from text_tokenizer import ByteTokenizer
    data = write_tokens(tmp_path, conversations=1)
    index, first = json.loads((tmp_path / "tokens/index.json").read_text()), tmp_path / "tokens/train-00000.safetensors"
    with safe_open(first, "pt") as file:
        header = file.metadata()
    tensors, turns = load_file(first), json.loads(header["turns"])
    bad = {"train-00001": first.read_bytes()[:-40], "train-00002": b"nonsense"}
    for name, content in bad.items():
        (tmp_path / f"tokens/{name}.safetensors").write_bytes(content)
    save_file(tensors, tmp_path / "tokens/train-00003.safetensors", header | {"turns": json.dumps(turns[:-1])})
    save_file(tensors, tmp_path / "tokens/train-00004.safetensors", header | {"digest": "0" * 16})
    save_file(tensors, tmp_path / "tokens/train-00005.safetensors", {"format": "1"})
    index["splits"]["train"]["shards"] = [f"train-{n:05d}.safetensors" for n in range(7)]
    (tmp_path / "tokens/index.json").write_text(json.dumps(index))
    read = train.ConversationDataset(data, CFG).conversations
    said = capsys.readouterr().err
    assert sum(len(c) for c in read) == len(turns) and said.count("\n") == 1
    assert "6 of 7 train shards" in said and "train-00001" in said and "train-00002" in said and "train-00000" not in said
    first.unlink()
    with pytest.raises(ValueError, match="7 of 7 train shards.*python dataset_pipeline.py"):
        read_turns(data, "train", ByteTokenizer())


def test_too_little_memory_is_said_before_the_run(data, tmp_path, capsys):
    assert train.main(flags(settings(data, tmp_path / "out", gpu_memory_gb=0.001))) == 2
    said = capsys.readouterr().err
    assert "--model_size" in said and "torchrun" in said and not (tmp_path / "out").exists()
    assert train.main(flags(settings(data, tmp_path / "out", gpu_memory_gb=0.008, batch_positions=512, max_steps=1))) == 0
    assert "lower --batch_positions" in capsys.readouterr().err               # it may fit: said, not refused


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as leaving:
        train.main(["--acumulate", "5"])
    assert leaving.value.code == 2 and "did you mean --accumulate?" in capsys.readouterr().err


def test_main_end_to_end_and_a_finished_run(data, tmp_path, capsys):
    cfg = settings(data, tmp_path, max_steps=2)
    assert train.main(flags(cfg)) == 0
    assert "starting from scratch" in capsys.readouterr().out
    assert train.main(["--resume", str(tmp_path / "best_model.pt")]) == 0
    assert "raise --max_steps" in capsys.readouterr().out
    assert train.main(["--resume", str(tmp_path / "best_model.pt"), "--model_size", "nano"]) == 2
    assert "leave out --model_size" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path / "best_model.pt"), "--max_steps", "3"]) == 0
    assert len(losses(tmp_path)) == 3
    assert train.main(flags(cfg)) == 0                                          # a new run sets the old one aside
    assert checkpoint.load_training(tmp_path / "previous/last.pt")["step"] == 3


def test_a_run_says_beforehand_how_long_it_takes(data, tmp_path, capsys):
    assert train.main(flags(settings(data, tmp_path, max_steps=3))) == 0
    said = capsys.readouterr().out
    assert "roughly" in said and "for 3 steps" in said and "for the remaining 1 steps" in said


def test_large_models_take_smaller_batches_on_a_cpu():
    assert train.read_settings(["--model_size", "tiny", "--device", "cpu"])[0].batch_positions == train.CPU_POSITIONS
    assert train.read_settings(["--model_size", "tiny", "--device", "cpu", "--batch_positions", "4096"])[0].batch_positions == 4096
    assert train.read_settings(["--model_size", "nano", "--device", "cpu"])[0].batch_positions == TrainConfig().batch_positions


def test_full_disk_is_said_before_the_work(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.runtime, "free_disk_mb", lambda folder: 0.5)
    assert train.main(flags(settings(data, tmp_path / "out"))) == 2
    assert "free some space" in capsys.readouterr().err


def test_lexicon_words_are_padded():
    from text_tokenizer import PAD, ByteTokenizer
    words = train.Lexicon([("ab", "\u00e6b"), ("a", "\u0259"), ("x", "\u025bksz")], ByteTokenizer())
    tokens, phones = words.draw(16, torch.Generator().manual_seed(0))
    assert len(words.pairs) == 2 and tokens.shape == (16, 2) and set(tokens[:, 1].tolist()) == {98, PAD} and phones.min() == 0
