"""Several ranks (gloo, on this machine): DDP and FSDP2 against one process, checkpoints across numbers of ranks, the plan, the rehearsal."""
import json
import multiprocessing
import os
import shutil
import socket

import pytest
import torch

import checkpoint
import config
import parallel
import runtime
import train
from test_train import FINGERPRINT, losses, settings, write_tokens

STEPS, CUT = 4, 2


class Remembering(train.ConversationDataset):
    """Half of the windows have a history: it is often on one rank alone."""
    def __init__(self, *given, **named):
        super().__init__(*given, p_history=0.5, **named)


def without_curriculum(patch) -> None:
    patch(train, "ConversationDataset", Remembering)
    patch(train, "EARLY_SHARE", 0.0)


@pytest.fixture(autouse=True, scope="module")
def histories():
    with pytest.MonkeyPatch.context() as patch:
        without_curriculum(patch.setattr)
        yield


def options(folder, name, **changes):
    return settings(folder / "data", folder / name, **{"max_steps": STEPS, "batch_positions": 128, "muon_lr": 0.0, "ema": 0.9, "lexicon_words": 0,
                                                       "codec": str(folder / "none"), "save_every": -1, "save_minutes": 0.0} | changes)


def cut_short(cfg, ranks=runtime.Ranks(), saved=None):
    """Train CUT steps of the run, then stop as Ctrl-C would."""
    trainer = train.Trainer(cfg, saved, ranks)
    step, trainer.heard = trainer._step_and_log, []

    def stop():
        step()
        trainer.heard.append(trainer.last_batch[1] is not None and bool((trainer.last_batch[1].turn >= 0).any()))
        trainer.interrupted = trainer.step == CUT
    trainer._step_and_log = stop
    trainer.run()
    return trainer


def resume(path, ranks=runtime.Ranks(), *more):
    cfg, saved = train.read_settings(["--resume", str(path), *more])
    trainer = train.Trainer(cfg, saved, ranks)
    trainer.run()
    return trainer


def one_of_two(rank, port, folder):
    """What each of two ranks does, in one process group."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    without_curriculum(setattr)
    ranks = runtime.start_distributed(torch.device("cpu"))
    for kind, file in (("ddp", "last.pt"), ("fsdp", "last.dcp")):
        trainer = cut_short(options(folder, kind, parallel=kind, recompute=kind == "fsdp"), ranks)
        (folder / f"{kind}-{rank}.heard").write_text(json.dumps(trainer.heard))
        if ranks.main:
            copy = shutil.copytree if kind == "fsdp" else shutil.copy
            copy((folder / kind / file).resolve(), folder / f"{kind}-{file}")
            held = sum(parallel.local(p).numel() for p in trainer.model.parameters())
            (folder / f"{kind}.json").write_text(json.dumps([held, sum(p.numel() for p in trainer.model.parameters()), trainer.plan.say()]))
        ranks.wait()
        resume(folder / kind / file, ranks)
    train.Trainer(options(folder, "muon", parallel="fsdp", muon_lr=0.02, max_steps=2), None, ranks).run()
    runtime.stop_distributed(ranks)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders: alone (one process, two micro-batches per step), ddp, fsdp, muon (two ranks)."""
    folder = tmp_path_factory.mktemp("runs")
    write_tokens(folder / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    context.set_forkserver_preload(["train"])
    both = [context.Process(target=one_of_two, args=(rank, port, folder)) for rank in (0, 1)]
    for process in both:
        process.start()
    train.Trainer(options(folder, "alone", accumulate=2)).run()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_equal_one(runs, kind):
    """Same losses as one process that sees both ranks' batches, through a stop and a resume."""
    alone = losses(runs / "alone")
    assert len(alone) == STEPS and losses(runs / kind) == pytest.approx(alone, rel=1e-5)
    first, second = (json.loads((runs / f"{kind}-{rank}.heard").read_text()) for rank in (0, 1))
    assert any(a != b for a, b in zip(first, second)), "no step in which one rank alone has a history"


def test_sharded_ranks_hold_half_each(runs):
    whole, total, said = json.loads((runs / "ddp.json").read_text())
    held, same_total, sharded_said = json.loads((runs / "fsdp.json").read_text())
    assert whole == total == same_total and 0.45 * total < held < 0.55 * total
    assert "DistributedDataParallel" in said and "fully_shard" in sharded_said


@pytest.mark.parametrize("file", ["ddp-last.pt", "fsdp-last.dcp"])
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(runs, file, tmp_path):
    resume(runs / file, runtime.Ranks(), "--accumulate", "2", "--parallel", "auto", "--output", str(tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(runs / "alone")[CUT:], rel=1e-5)


def test_muon_works_on_shares(runs, tmp_path):
    train.Trainer(options(runs, "muon-alone", accumulate=2, muon_lr=0.02, max_steps=2)).run()
    assert losses(runs / "muon") == pytest.approx(losses(runs / "muon-alone"), rel=1e-3)      # Muon multiplies in bfloat16


def test_only_whole_folders_that_something_points_to_are_left(runs):
    names = sorted(p.name for p in (runs / "fsdp").iterdir())
    assert names == ["best_model.dcp", "last.dcp", "loss.png", "metrics.jsonl", f"step{STEPS:06d}.dcp"]
    assert (runs / "fsdp/last.dcp").resolve() == (runs / f"fsdp/step{STEPS:06d}.dcp").resolve()


def test_sharded_weights_can_be_talked_with(runs):
    model, plain = checkpoint.load_model(runs / "fsdp/best_model.dcp"), checkpoint.load_model(runs / "alone/best_model.pt")
    assert model.codec_fingerprint == FINGERPRINT
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=2e-3), name
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), train.build_model(options(runs, "x"), None, FINGERPRINT)[0].parameters()))


# ----------------------------------------------------------------------------- the plan, without machines

def needs(name, positions=4096):
    def of(gpus):
        parts = config.training_bytes(config.model_preset(name), positions, gpus, True)
        return {k: v for k, v in parts.items() if k != "total"}
    return of


@pytest.mark.parametrize("name, ranks, kind, offload", [("tiny", 1, "alone", False), ("small", 8, "ddp", False), ("medium", 8, "fsdp", False), ("large", 64, "fsdp", False),
                                                        ("large", 16, "fsdp", True)])
def test_the_plan_takes_the_simplest_way_that_fits(name, ranks, kind, offload):
    plan = parallel.choose(needs(name), ranks, 80e9, 500e9)
    assert (plan.kind, plan.offload) == (kind, offload) and plan.on_device <= 80e9 and kind.replace("alone", "one process") in plan.say().lower().replace("distributeddataparallel", "ddp")


def test_what_fits_nowhere_names_the_flags():
    with pytest.raises(ValueError, match="--batch_positions.*--recompute"):
        parallel.choose(needs("large"), 2, 16e9, 64e9)
    with pytest.raises(ValueError, match="--model_size.*torchrun"):
        parallel.choose(needs("small"), 1, 8e9)


def test_a_rehearsal_of_70_billion(capsys):
    assert train.main(["--model_size", "large", "--dry_run", "--ranks", "64", "--gpu_memory_gb", "80"]) == 0
    said = capsys.readouterr().out
    total = config.count_all(config.model_preset("large"))
    assert f"large: {total / 1e9:.3f} B parameters" in said
    assert "fully_shard" in said and "rank 0 of 64" in said and "87 groups" in said
    share = float(said.split("numbers (")[1].split()[0])
    assert 1.0 <= share < 1.01
    assert train.main(["--model_size", "large", "--dry_run", "--ranks", "64"]) == 2 and "--gpu_memory_gb" in capsys.readouterr().err


def test_ranks_with_shares_refuse_the_file_of_a_whole_model(runs):
    cfg, saved = train.read_settings(["--resume", str(runs / "ddp-last.pt"), "--parallel", "fsdp"])
    with pytest.raises(ValueError, match="--parallel ddp.*--init_from"):
        train.Trainer(cfg, saved, runtime.Ranks(0, 2, 0))
