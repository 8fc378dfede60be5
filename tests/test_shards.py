"""Tokens made by several workers: each its share, a lost one's by the others, nothing twice, memory that stays."""
import json
import os
import threading
import time

import pytest

import dataset_pipeline as dp
import shards
from test_dataset import ToyCodec, write_corpus


def files(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "tokens").glob("*.safetensors"))}


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "a")


def tokenise(folder, rank=0, world=1, monkeypatch=None, **how):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return dp.tokenise(folder, ToyCodec(), progress=False, turns_per_shard=4, **how)


def test_a_rank_makes_its_share_first(corpus, monkeypatch):
    made = []
    monkeypatch.setattr(shards, "_make", lambda path, *rest: made.append(path.name) or True)
    plan = [(corpus / f"x{k}", [k]) for k in range(7)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = set()
    shards.share(lambda: iter(plan), lambda path, parts: path.name in made or path.name in done, None)
    assert made[:2] == ["x1", "x4"] and sorted(made) == [f"x{k}" for k in range(7)]          # then what nobody has made


def test_workers_make_what_one_makes(corpus, tmp_path, monkeypatch):
    alone = tokenise(corpus, monkeypatch=monkeypatch)
    wanted = files(corpus)
    assert len(wanted) > 4
    for path in (corpus / "tokens").iterdir():
        path.unlink()
    for rank in (2, 0, 1):
        index = tokenise(corpus, rank, 3, monkeypatch)
    assert files(corpus) == wanted and index == alone and not list((corpus / "tokens").glob(".*claim"))


def test_workers_at_the_same_time(corpus, monkeypatch):
    tokenise(corpus, monkeypatch=monkeypatch)
    wanted, count = files(corpus), []
    for path in (corpus / "tokens").iterdir():
        path.unlink()
    real = dp._write_shard
    monkeypatch.setattr(dp, "_write_shard", lambda path, *rest: (count.append(path.name), time.sleep(0.02), real(path, *rest)))
    monkeypatch.setattr(shards, "place", lambda ranks=threading.local(): (int(threading.current_thread().name[-1]), 3))
    threads = [threading.Thread(target=dp.tokenise, args=(corpus, ToyCodec()), kwargs={"progress": False, "turns_per_shard": 4}, name=f"rank{r}") for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(corpus) == wanted and sorted(set(count)) == sorted(wanted) and len(count) <= len(wanted) + 2


def test_a_lost_workers_shards_are_made_by_the_others(corpus, monkeypatch):
    """One died with its claim in hand: the claim grows old and is taken over. A half-written file is no shard."""
    tokenise(corpus, monkeypatch=monkeypatch)
    wanted = files(corpus)
    lost, half, *_ = [corpus / "tokens" / name for name in wanted]
    lost.unlink()
    half.write_bytes(half.read_bytes()[:100])
    assert shards.claim(lost) and not shards.claim(lost) and shards.claim(half)
    old = time.time() - 2 * shards.STALE_SECONDS
    for path in (lost, half):
        os.utime(path.with_name(f".{path.name}.claim"), (old, old))
    tokenise(corpus, 1, 2, monkeypatch)
    assert files(corpus) == wanted


def test_a_fresh_claim_is_waited_for(corpus, monkeypatch):
    path, done, waited = corpus / "one", [], []
    shards.claim(path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: waited.append(seconds) or len(waited) == 3 and shards.release(path))
    shards.share(lambda: iter([(path, [])]), lambda *a: bool(done), lambda *a: done.append(1))
    assert len(waited) == 3 and done == [1]


def test_ranks_that_do_not_fit(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK"):
        shards.place()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert shards.place() == (3, 8)


def test_the_manifest_finds_what_has_changed(corpus, monkeypatch):
    tokenise(corpus, monkeypatch=monkeypatch)
    folder = corpus / "tokens"
    listed = json.loads((folder / "manifest.json").read_text())
    assert set(listed["shards"]) == set(files(corpus)) and listed["bytes"] == sum(map(len, files(corpus).values())) and shards.check_manifest(folder) == []
    name, other = sorted(listed["shards"])[:2]
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(bytes(data))
    (folder / other).unlink()
    assert shards.check_manifest(folder) == [name, other]
    monkeypatch.setattr(shards, "sha256", lambda path: pytest.fail("read again"))
    (folder / name).unlink()
    shards.write_manifest(folder, sorted(listed["shards"])[2:])            # unchanged ones are not read again


def test_plans_are_streamed_where_manifests_are_in_order(corpus, monkeypatch):
    for split in dp.SPLITS:
        path = corpus / "manifests" / split / "supervisions.jsonl.gz"
        assert shards.count_in_order(path) == sum(len(t) for t in dp.read_supervisions(corpus, split).values())
        assert list(shards.stream(path)) == list(dp.read_supervisions(corpus, split).values())
    plan = [(p.name, [s["id"] for s in parts]) for p, parts in dp._plan(corpus, 4)]
    import gzip
    path = corpus / "manifests/train/supervisions.jsonl.gz"
    with gzip.open(path, "rt") as file:
        backwards = file.readlines()[::-1]
    with gzip.open(path, "wt") as file:
        file.writelines(backwards)
    assert shards.count_in_order(path) is None and [(p.name, [s["id"] for s in parts]) for p, parts in dp._plan(corpus, 4)] == plan


def test_memory_does_not_grow_with_the_manifest(tmp_path):
    """Ten times the supervisions: the plan of a shard at a time holds no more."""
    import gzip
    import tracemalloc
    peaks = []
    for count in (300, 3000):
        path = tmp_path / f"{count}.gz"
        with gzip.open(path, "wt") as file:
            for k in range(count):
                file.write(json.dumps({"id": f"{k}", "recording_id": f"r{k // 3:06d}", "start": k % 3, "text": "x" * 500}) + "\n")
        tracemalloc.start()
        assert sum(len(s) for s in shards.grouped(shards.stream(path), 30)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
