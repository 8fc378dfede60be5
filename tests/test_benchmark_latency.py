"""The race: rows in their own processes and in turns, ratios of pairs, bars; racers at the smallest size, judges stood in for."""
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
import benchmark_latency as latency
import benchmark_model
import benchmark_voice
import demo
import racers
import test_benchmark
from config import model_preset
from text_tokenizer import normalise

data, weights, judges = test_benchmark.data, test_benchmark.weights, test_benchmark.judges      # fixtures: two conversations; an untrained codec and model; judges
TOOLS = {"load_talker": benchmark_voice.load_talker, "session_with_voices": benchmark_voice.session_with_voices, "weights_name": benchmark_voice.weights_name,
         "responder": demo.Responder, "official": benchmark_model.official, "their_model": benchmark_model.their_model, "memory_mb": benchmark_model.memory_mb}


@pytest.fixture
def spec(data, weights):
    return {"codec": str(weights / "codec"), "checkpoint": str(weights / "nano"), "data": str(data), "seed": 0, "threads": 1, "tools": TOOLS, "frames": 4}


def arguments(data, turns=2, **other):
    return SimpleNamespace(**({"data": str(data), "split": "test", "seed": 0, "turns": turns, "frames": 4, "long": 12, "rows": "", "quick": False} | other))


# ----------------------------------------------------------------------------- racers

@pytest.fixture
def item(data):
    return latency.answer_items(arguments(data), 1)[0]


def test_items_are_turns_with_the_turn_before(data):
    one, two = (latency.answer_items(arguments(data), 3) for _ in range(2))
    assert [i["text"] for i in one] == [i["text"] for i in two] and len(one) == 3
    for i in one:
        before = i["turns"][i["index"] - 1]
        assert i["text"] == i["turns"][i["index"]]["text"] and i["user_text"] == before["text"] and len(i["user"]) == 28800 and i["frames"] == 15
        assert i["user_speaker"] == before["custom"]["speaker_index"]


def test_our_model_speaks_after_the_voices(spec, item):
    racer = racers.Ours(spec | {"variant": "plain"})
    made = racer.speak(item)
    assert made["text"] == item["text"] and len(made["audio"]) == 1920 * made["frames"] > 0 and 0 < made["first_ms"] <= made["total_ms"] and made["cpu_ms"] > 0
    assert set(racer.session(item).voices) == {0, 1} and racer.about()["weights"] == "trained"


def test_random_sizes_speak_without_voices_for_a_few_frames(spec, item):
    racer = racers.Ours(spec | {"size": "test", "frames": 3})
    assert racer.about()["weights"] == "random" and not racer.session(item).voices and 1 <= racer.speak(item)["frames"] <= 3


@pytest.mark.parametrize("reply", ["given", "head", "written"])
def test_a_turn_is_answered_from_the_users_sound(spec, item, reply, monkeypatch):
    import classic_pipeline

    class Ears:
        def __init__(self, cfg):
            self.fed = 0

        def reset(self):
            self.fed = 0

        def feed(self, block, last=False):
            self.fed += len(block)

        def transcript(self):
            assert self.fed == len(item["user"])
            return "hello there"
    monkeypatch.setattr(classic_pipeline, "Ears", Ears)
    racer = racers.Ours(spec | {"reply": reply})
    kept = []
    inner = racer.session
    monkeypatch.setattr(racer, "session", lambda item: kept.append(inner(item)) or kept[-1])
    try:
        made = racer.answer(item)
    except ValueError as error:                                                # an untrained head may have nothing to say
        assert reply == "head" and "speakable" in str(error)
        return
    turns = kept[0].turns
    assert turns[0].codes is not None and turns[0].speaker == item["user_speaker"] and " ".join(t.text for t in turns[1:]) == normalise(made["text"])
    assert (len(turns) == 2 or reply == "head") and made["frames"] == sum(t.num_frames for t in turns[1:]) == len(made["audio"]) // 1920
    assert turns[0].text == {"given": item["user_text"], "written": "hello there"}.get(reply, turns[0].text)
    stages = made["stages"]
    assert list(stages) == ["words of the user", "heard", "reply", "first sound"] and list(stages.values()) == sorted(stages.values())
    assert stages["first sound"] == made["first_ms"] and (reply != "given" or made["text"] == item["text"])


def test_an_old_and_a_young_conversation_take_turns(spec, data):
    racer, items = racers.Ours(spec), latency.long_items(arguments(data))
    seen = [racer.paired(i) for i in items[:2]]
    assert [s["old"]["turn"] for s in seen] == [items[0]["old"] + 1, items[0]["old"] + 2] and [s["young"]["turn"] for s in seen] == [5, 6]
    assert items[0]["old"] + len(items) == 12 and [list(s) for s in seen] == [["young", "old"], ["old", "young"]]
    assert all(s[w]["cost_ms"] >= s[w]["first_ms"] > 0 for s in seen for w in s)


def test_both_sides_say_the_same_codes(spec, item):
    pytest.importorskip("transformers")
    csm = spec | {"size": "csm-test", "frames": 5}
    ours, theirs = (racers.Csm(csm | {"side": side}).speak(item) for side in ("ours", "theirs"))
    assert ours["codes"] == theirs["codes"] and len(ours["codes"]) == 5 and len({tuple(c) for c in ours["codes"]}) > 1
    for made in (ours, theirs):
        assert len(made["audio"]) == 5 * 1920 and 0 < made["first_ms"] < made["total_ms"] and 0 < made["ms_per_frame"] < made["total_ms"] / 5
    assert racers.Csm(csm | {"side": "ours", "seed": 1}).speak(item)["codes"] != ours["codes"]


def test_other_orders_say_as_many_frames_as_the_text_took(spec, item):
    racer = racers.OtherOrder(spec | {"order": "delay", "size": "test"})
    made = racer.speak(item)
    assert made["frames"] == item["frames"] == 15 and len(made["audio"]) == 15 * 1920 and racer.about()["bytes"]["every_read"] > 0


def test_an_unknown_variant_is_left_out(spec):
    with pytest.raises(racers.LeftOut, match="no faster variant"):
        racers.Ours(spec | {"variant": "faster"})


def test_bytes_of_a_frame_are_those_of_its_matrices(weights):
    import checkpoint
    codec, cfg = checkpoint.load_codec(str(weights / "codec")), model_preset("test")
    model = racers.random_model(cfg, 0)
    found, eight = racers.frame_bytes(model, codec), racers.frame_bytes(model, codec, 1)
    t = cfg.depth
    depth = 4 * t.layers * (2 * t.width ** 2 + 2 * t.width * t.kv_heads * t.head_dim + 3 * t.width * t.ffn) / 1e6
    assert found["every_read"] - found["once"] == pytest.approx((cfg.num_codebooks - 1) * depth)
    assert eight["every_read"] - found["codec"] == pytest.approx((found["every_read"] - found["codec"]) / 4)


def test_random_models_are_made_without_a_first_filling():
    from architecture import CSM
    plain = CSM(model_preset("test"))
    plain.init_weights(torch.Generator().manual_seed(3))
    made = racers.random_model(model_preset("test"), 3)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), made.state_dict().values(), strict=True))


def test_each_sentence_is_spoken_when_it_is_written(spec, item, monkeypatch):
    """The first sound comes before the second sentence is asked for; while the user speaks the reply is rehearsed."""
    from generation import Session
    order = []

    def reply_stream(self, speaker):
        for piece in ("This is the first one. A", "nd the second."):
            order.append(piece)
            yield piece
    inner, rehearse = Session.speak, racers.Ours._rehearse
    monkeypatch.setattr(Session, "reply_stream", reply_stream)
    monkeypatch.setattr(Session, "speak", lambda self, me, text, mood=None: order.append(text) or inner(self, me, text))
    monkeypatch.setattr(racers.Ours, "_rehearse", lambda self, clock, listening, me: order.append("rehearsal") or rehearse(self, clock, listening, me))
    made = racers.Ours(spec | {"reply": "head"}).answer(item)
    assert order == ["rehearsal"] * (len(racers.blocks(item["user"])) - 1) + ["This is the first one. A", "This is the first one.", "nd the second.", "And the second."]
    assert made["text"] == "This is the first one. And the second."


def test_blocks_are_pieces_of_80_ms():
    assert [len(b) for b in racers.blocks(np.zeros(4000))] == [1920, 1920, 160] and [len(b) for b in racers.blocks(np.zeros(0))] == [0]


def test_work_that_is_not_done_in_time_is_a_delay(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(racers.time, "perf_counter", lambda: now[0])
    clock = racers.Clock()
    for spent, late in ((0.1, 0.02), (0.09, 0.03), (0.04, 0.0), (0.2, 0.12)):
        clock.arrive()
        now[0] += spent
        clock.work()
        assert clock.late == pytest.approx(late)
    assert clock.arrive() == pytest.approx(now[0] - 0.12) and clock.left() == pytest.approx(-0.04) and clock.busy == pytest.approx(0.43)


def test_chunks_are_timed_one_by_one():
    def chunks():
        yield np.ones(10)
        time.sleep(0.05)
        yield np.zeros(5)
    made = racers.timed_chunks(chunks(), time.perf_counter())
    assert made["first_ms"] < made["total_ms"] - 40 and len(made["audio"]) == 15 and made["cpu_ms"] < made["total_ms"]
    assert racers.timed_chunks([], time.perf_counter())["first_ms"] is None


# ----------------------------------------------------------------------------- numbers

def test_what_is_heard_comes_after_the_quiet():
    audio = np.concatenate([np.zeros(2400), np.ones(100)]).astype(np.float32)
    assert latency.audible_ms({"audio": audio, "first_ms": 50.0}) == pytest.approx(150.0)
    assert latency.audible_ms({"audio": np.zeros(100), "first_ms": 50.0}) is None and latency.audible_ms({"audio": audio, "first_ms": None}) is None


def csm_answer(number, ms, codes):
    return {"number": number, "ms_per_frame": ms, "cpu_ms_per_frame": ms / 2, "codes": codes}


def test_ratios_are_those_of_the_same_item():
    found = {"A, ours": {"answers": [csm_answer(0, 10.0, [[1], [2]]), csm_answer(2, 20.0, [[1], [3]])]},
             "A, transformers": {"answers": [csm_answer(0, 100.0, [[1], [2]]), csm_answer(1, 1.0, [[9]]), csm_answer(2, 300.0, [[1], [2], [4]])]},
             "B, ours": {"answers": [csm_answer(0, 10.0, [[1]])]}}
    out = latency.csm_result(found)
    assert list(out) == ["A, ours"]
    got = out["A, ours"]
    assert (got["faster"], got["lowest"], got["highest"], got["pairs"]) == (12.5, 10.0, 15.0, 2) and got["faster_by_cpu_time"] == pytest.approx(400 / 30)
    assert got["codes"] == {"frames": 5, "equal": 3}


def test_the_long_conversation_is_compared_per_frame():
    def turn(number, cost, frames, first):
        return {"turn": number, "cost_ms": cost, "frames": frames, "first_ms": first, "positions": 100}
    pairs = [{"old": turn(199, 440.0, 20, 30.0), "young": turn(5, 200.0, 10, 20.0)}, {"old": turn(200, 0.0, 0, None), "young": turn(6, 100.0, 5, 20.0)}]
    out = latency.long_result({"x": {"answers": pairs}})
    assert out["cost_ratio"] == pytest.approx(1.1) and out["pairs"] == 1 and out["turns"]["old"] == [199, 199] and out["first_sound_ratio"] == 1.5
    assert latency.long_result({}) is None


def rows_of(**numbers):
    return {name.replace("_", " "): {"first_sound_ms": {"p50": a, "p95": b}, "real_time_factor": {"p50": c, "p95": c}} for name, (a, b, c) in numbers.items()}


def test_bars_are_met_at_their_limits_and_unknown_where_not_measured():
    rows = rows_of(nano=(60.0, 119.0, 0.31), nano_int8=(50.0, 120.0, 0.2), tiny_int8=(300.0, 400.0, 0.99), pipeline_with_hibari=(400.0, 500.0, 1.0), pipeline_with_Kokoro=(900.0, 999.0, 1.0))
    rows["nano, reply at hand"] = rows_of(x=(100.0, 179.0, 0.3))["x"]
    csm = {"CSM 8x384 + 3x256, ours": {"faster": 10.0, "codes": {"frames": 5, "equal": 5}}, "CSM 8x384 + 3x256, ours compiled": {"faster": 12.0, "codes": {"frames": 5, "equal": 4}},
           "CSM 8x384 + 3x256, ours int8": {"faster": 12.0, "codes": {"frames": 5, "equal": 1}}}
    met = {b["what"]: b["met"] for b in latency.bars(rows, csm, {"cost_ratio": 1.11})}
    assert met["nano: first sound after the text, ms, 95 % of turns"] and not met["nano int8: first sound after the text, ms, 95 % of turns"]
    assert not met["nano: real-time factor, median"] and met["nano int8: real-time factor, median"] and met["tiny int8: real-time factor, median"]
    assert met["nano, reply at hand: first sound after the user's turn, ms, 95 % of turns"] and met["nano, its own reply: first sound after the user's turn, ms, 95 % of turns"] is None
    times = [v for k, v in met.items() if "times faster per frame" in k]
    assert times == [True, False, True, None] and met["long conversation: cost of a frame, old over young"] is False
    assert met["nano, reply at hand: first sound sooner than the quicker pipeline's, times"] and met["nano, its own reply: first sound sooner than the quicker pipeline's, times"] is None
    assert all(b["met"] is None for b in latency.bars({}, {}, None))


def test_rows_are_chosen_by_heat_or_name():
    def names(rows="", quick=False):
        return [r.name for r in latency.wanted(SimpleNamespace(rows=rows, quick=quick))]
    assert len(names()) == len(set(names())) == len(latency.ROWS) and names("long") == ["nano, turn after turn"]
    assert names("order: delay, PIPELINE with h") == ["order: delay pattern", "pipeline with hibari"] and "tiny" not in names(quick=True) and "nano" in names(quick=True)
    with pytest.raises(ValueError, match="--rows quick"):
        names("quick")


def test_the_plan_keeps_sizes_apart_and_large_models_alone(data):
    plan = latency.heats_of(arguments(data, turns=8, frames=25), latency.ROWS)
    sizes = [{r.spec.get("size") for r in part} for part, _, _ in plan]
    assert {"small"} in sizes and all(len(part) == 1 for part, _, _ in plan if part[0].spec.get("size") == "small")
    assert sum(len(part) for part, _, _ in plan) == len(latency.ROWS) and {"csm-nano"} in sizes and {"csm-tiny"} in sizes
    assert next(spec["frames"] for part, _, spec in plan if part[0].spec.get("size") == "small") == 4


def test_bandwidth_is_measured():
    assert 0.1 < latency.memory_bandwidth(1) < 2000


# ----------------------------------------------------------------------------- the whole

def test_a_race_from_end_to_end(data, weights, tmp_path, judges, monkeypatch, capsys):
    """Real processes: our model, both sides of CSM, a row that fails, a long conversation."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(latency, "BANDWIDTH_MB", 16)
    monkeypatch.setattr(latency, "ROWS", [
        latency.Row("nano", "speak", "ours", {"variant": "plain"}, judged=True), latency.Row("nano faster", "speak", "ours", {"variant": "faster"}),
        latency.Row("C, ours", "csm", "csm", {"size": "csm-test", "side": "ours"}), latency.Row("C, transformers", "csm", "csm", {"size": "csm-test", "side": "theirs"}),
        latency.Row("nano, turn after turn", "long", "ours", {}, "paired")])
    result = test_benchmark.run(capsys, "latency", "--data", data, "--codec", weights / "codec", "--checkpoint", weights / "nano", "--turns", 3, "--frames", 3, "--long", 9,
                                "--threads", 1, "--results", tmp_path / "R.md", "--save", tmp_path / "pictures")
    rows = result["rows"]
    assert rows["nano"]["n"] == 3 and rows["nano"]["frames"] > 0 and rows["nano"]["wer"]["n"] == 3 and rows["nano"]["peak_mb"] > rows["nano"]["libraries_mb"] > 0
    assert rows["nano faster"]["error"] == "there is no faster variant here" and "first_sound_ms" not in rows["nano faster"]
    assert result["csm"]["C, ours"]["codes"] == {"frames": 6, "equal": 6} and result["csm"]["C, ours"]["pairs"] == 2 and rows["C, ours"]["floor_ms"]["once"] > 0
    assert result["long"]["turns"] == {"old": [8, 9], "young": [5, 6]} and result["bandwidth_gb_s"] > 0
    text = (tmp_path / "R.md").read_text()
    assert "## Latency" in text and "Left out. nano faster: there is no faster variant here." in text and "6 of 6" in text and benchmark.read_results(tmp_path / "R.md")["latency"] == result
    assert [(tmp_path / "pictures" / n).read_bytes()[:4] for n in ("first_sound.png", "frame.png")] == [b"\x89PNG"] * 2
    assert json.dumps(result["bars"]).count('"met": null') >= 1


def test_mistakes_are_one_line(data, weights, tmp_path, capsys):
    for words, name in ((["--rows", "nothing"], "--rows nothing"), (["--frames", "1"], "--frames 1"), (["--turns", "1"], "--turns 1")):
        assert benchmark.main(["latency", "--data", str(data), "--codec", str(weights / "codec"), *words, "--results", str(tmp_path / "R.md")]) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1 and not (tmp_path / "R.md").exists()


@pytest.mark.parametrize("variant", ["int8", "speculative"])
def test_variants_are_switched_on(spec, item, variant):
    """The model as it is then speaks; what was switched on can be seen."""
    racer = racers.Ours(spec | {"variant": variant})
    assert racer.speak(item)["frames"] > 0 and racer.about()["note"]
    assert racer.model.precision == "int8" if variant == "int8" else racer.model.frame_codes is not None
