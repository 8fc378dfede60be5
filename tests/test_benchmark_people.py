"""The bench of people's recordings: hours by repetition give the tokens that the pipeline gives, broken files are named, parts are kept, bars."""
import gzip
import json
from types import SimpleNamespace

import pytest

import audio_io
import benchmark_people as bench
import dataset_pipeline
import test_benchmark
from people_speech import spoken

weights = test_benchmark.weights


@pytest.fixture(scope="module")
def voices():
    sounds = [audio_io.resample(s, 24000, 16000) for s in spoken()]
    return {"high": sounds[::2], "low": sounds[1::2]}


def args_of(tmp_path, weights=None, **changes):
    given = {"codec": str(weights / "codec") if weights else "", "files": 3, "seed": 0, "many": 0.03, "hours": 0.01, "shard": 4, "save": str(tmp_path / "save"), "prompts": "", "data": "", "split": "test", "parts": "broken", "results": "", "what": "people"}
    return SimpleNamespace(**given | changes)


def test_codes_computed_once_are_the_codes_of_every_repetition(voices, weights, tmp_path, monkeypatch):
    import collect_data
    args, coded = args_of(tmp_path, weights), []
    (tmp_path / "mine").mkdir()
    bench.recordings_for(voices, tmp_path / "mine", args.files, 3.0, 0)
    collect_data.collect(*bench.collecting(tmp_path / "mine", tmp_path / "people"))
    plain, _ = bench.tokenising(args, tmp_path / "people", tmp_path / "plain", args.many)
    real = dataset_pipeline.encode_turns
    monkeypatch.setattr(dataset_pipeline, "encode_turns", lambda codec, audios: coded.extend(audios) or real(codec, audios))
    kept, _ = bench.tokenising(args, tmp_path / "people", tmp_path / "kept", args.many, remember=True)
    assert kept["turns"] == plain["turns"] > 10 and kept["hours"] == plain["hours"] >= args.many and kept["shards"] == plain["shards"] > 3
    assert len(coded) <= args.files and dataset_pipeline.read_audio is audio_io.read_audio
    for path in (tmp_path / "plain/tokens").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "kept/tokens" / path.name).read_bytes()
    with gzip.open(tmp_path / "kept/manifests/train/supervisions.jsonl.gz", "rt") as file:
        ids = [json.loads(line)["id"] for line in file]
    assert len(set(ids)) == len(ids) == kept["turns"]


def test_freed_memory_is_given_back_after_every_shard(voices, weights, tmp_path, monkeypatch):
    """Holes in the heap grew to 200 MB in an hour of speech."""
    import collect_data
    import runtime
    given = []
    monkeypatch.setattr(dataset_pipeline, "release_freed_memory", lambda: given.append(runtime.release_freed_memory()))
    (tmp_path / "mine").mkdir()
    bench.recordings_for(voices, tmp_path / "mine", 3, 3.0, 0)
    collect_data.collect(*bench.collecting(tmp_path / "mine", tmp_path / "people"))
    made, _ = bench.tokenising(args_of(tmp_path, weights), tmp_path / "people", tmp_path / "repeated", 0.02)
    assert len(given) == made["shards"] > 2 and len(set(given)) == 1


def test_many_hours_say_what_was_simulated(voices, weights, tmp_path):
    found = bench.bench_many(args_of(tmp_path, weights), voices)
    assert found["hours"] >= 0.03 > found["distinct_hours"] > 0 and found["indexed_mb"] > 10
    empty = dict.fromkeys(("turns", "filters", "broken", "kills", "rates", "memory", "loader"))
    text = bench.people_body({"voices": "two characters", "many": found | {"growth_mb": 0.5}, "bars": []} | empty)
    assert f"by repetition of {found['distinct_hours']:.2f} h" in text and "coded once each" in text


def test_broken_files_are_counted_and_named(voices, tmp_path, monkeypatch):
    words = bench.collecting
    monkeypatch.setattr(bench, "collecting", lambda mine, out: (*words(mine, out), "--no_filters"))       # six lines: some files repeat others
    found = bench.bench_broken(args_of(tmp_path), voices)
    assert found["broken"] == found["named"] == found["counted"] == 7 and found["good"] == found["kept"] == 9 and not found["missing"] + found["wrongly_named"]


def test_figures_are_kept_until_code_or_flags_change(tmp_path, monkeypatch):
    args, asked = args_of(tmp_path), []

    def measure(args, voices):
        asked.append(1)
        return {"n": len(asked)}
    assert [bench.kept(args, "many", measure, {})["n"] for _ in range(2)] == [1, 1]
    args.results, args.clips = "elsewhere.md", 9
    assert bench.kept(args, "many", measure, {})["n"] == 1
    args.files = 4
    assert bench.kept(args, "many", measure, {})["n"] == 2
    monkeypatch.setattr(bench, "CODE", ("config",))
    assert bench.kept(args, "many", measure, {})["n"] == 3


def test_twenty_kills_are_twenty_kills_at_work(tmp_path, monkeypatch):
    """A collector that had ended by itself is not counted; what ends every time does not go on for ever."""
    class Process:
        def __init__(self, out):
            self.ended, self.out = next(ends), out

        def wait(self, timeout=None):
            if timeout and not self.ended:
                raise bench.subprocess.TimeoutExpired("collector", timeout)
            self.out.mkdir(exist_ok=True)
            (self.out / "index.jsonl").write_text('{"settings": {}}\n{"id": "a"}\n')

        def poll(self):
            return 0 if self.ended else None

        def send_signal(self, number):
            pass
    ends = iter([True, True, False, True, False, True])                            # undisturbed; then two at work of four; the last one ends
    monkeypatch.setattr(bench, "_collector", lambda mine, out: Process(out))
    monkeypatch.setattr(bench, "recordings_for", lambda *a: None)
    found = bench.bench_kills(args_of(tmp_path, kills=2), {})
    assert (found["kills"], found["starts"], found["lost"], found["added"], found["doubled"], found["conversations"]) == (2, 4, 0, 0, 0, 1)
    ends = iter([True] * 20)
    assert bench.bench_kills(args_of(tmp_path, kills=2), {})["starts"] == 8


def test_bars_are_met_missed_or_not_measured():
    result = {"kills": {"lost": 0, "added": 0, "doubled": 1, "changed": 0}, "broken": {"missing": [], "wrongly_named": [], "good": 9, "kept": 9, "counted": 7, "broken": 7},
              "memory": {"growth_mb": 3.0}, "many": None, "loader": {"waste": 0.06}}
    assert [b["met"] for b in bench.bars(result)] == [False, True, True, None, False]
    assert [b["value"] for b in bench.bars(result | {"broken": None})][1] is None
