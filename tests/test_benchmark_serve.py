"""The replay of benchmark.py serve, against a server that answers every typed turn with half a second of silence."""
import asyncio
import json
from types import SimpleNamespace

import pytest

import benchmark_serve

websockets = pytest.importorskip("websockets")
RATE = benchmark_serve.RATE


class Stub:
    """What benchmark_serve.Server offers; its memory grows by 1 MB a turn."""
    host, memory_mb = "127.0.0.1", 100.0

    def __init__(self):
        self.here = self.most = 0

    def metric(self, name: str) -> float:
        return float(self.here)

    async def answer(self, ws) -> None:
        self.here += 1
        self.most = max(self.most, self.here)
        try:
            async for message in ws:
                if json.loads(message)["type"] == "text":
                    self.memory_mb += 1.0
                    await ws.send(bytes(RATE))                   # half a second, 2 bytes a sample
                    await ws.send(json.dumps({"type": "reply_done", "duration_s": 0.5}))
        finally:
            self.here -= 1


def replay(turns: int, seconds: float, talkers: int) -> tuple[dict, Stub]:
    async def whole():
        stub = Stub()
        async with websockets.serve(stub.answer, stub.host, 0) as server:
            stub.port = server.sockets[0].getsockname()[1]
            return await benchmark_serve.many_turns(stub, turns, seconds, talkers, [], ["Hello."], 0), stub
    return asyncio.run(whole())


def test_a_replay_goes_on_until_there_was_enough_sound():
    found, _ = replay(turns=4, seconds=20.0, talkers=1)
    assert found["turns"] == 40 and found["seconds_of_sound"] == 20.0, "half a second each"
    assert replay(turns=7, seconds=0.0, talkers=1)[0]["turns"] == 7


def test_conversations_of_a_replay_stand_side_by_side_and_all_leave():
    found, stub = replay(turns=30, seconds=0.0, talkers=3)
    assert stub.most == 3 and found["places_taken_after"] == 0
    assert 30 <= found["turns"] <= 32, "those that had begun are ended"


def test_a_server_that_grows_is_found_out():
    found, _ = replay(turns=60, seconds=0.0, talkers=1)
    assert found["growth_mb_per_100_turns"] == pytest.approx(100.0, rel=0.01) and found["memory_before_mb"] == 100.0 and found["memory_after_mb"] == 160.0


class Growing:
    """What benchmark_serve.Server offers; it takes 50 MB with the first request, and `each` MB with every one."""

    def __init__(self, each: float):
        self.each, self.memory_mb, self.process = each, 100.0, SimpleNamespace(poll=lambda: None)

    def metric(self, name: str) -> float:
        return 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("each, grown", [(0.0, 0.0), (0.5, 500.0)])
def test_what_the_first_nonsense_loads_is_no_growth(monkeypatch, each, grown):
    def fuzz(server, tally, count, seed):
        server.memory_mb = max(server.memory_mb, 150.0) + each * count
        for _ in range(count):
            tally.add("frames", 400)

    async def frames(server, tally, count, seed):
        fuzz(server, tally, count, seed)
        tally.counts["frames"]["frames sent"] = tally.counts["frames"].get("frames sent", 0)
    for name, what in {"Server": lambda args, *more: Growing(each), "fuzz_schema": fuzz, "fuzz_bodies": fuzz, "fuzz_frames": frames, "SETTLE": 0.0}.items():
        monkeypatch.setattr(benchmark_serve, name, what)
    found = benchmark_serve.bench_malformed(SimpleNamespace(malformed=300, seed=0))
    assert found["requests"] == 300 and found["growth_mb_per_1000"] == pytest.approx(grown)
    assert (found["memory_before_mb"], found["memory_after_a_tenth_mb"]) == (100.0, 150.0 + 30 * each)
    body = benchmark_serve.serve_body({"streams": [], "conversations": [], "endpointing": None, "malformed": found})
    assert "100 MB before, " in body and "MB after the first tenth" in body
