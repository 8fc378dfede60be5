"""The model benches: transformers' CSM beside ours, the plan beside a step, pictures."""
import json
import math

import pytest
import torch

import benchmark
import benchmark_model
import test_benchmark
from architecture import CSM
from config import model_preset

data, weights = test_benchmark.data, test_benchmark.weights                    # fixtures: two conversations; an untrained codec and model
SPEC = {"model_size": "test", "rows": 2, "positions": 256, "seed": 3, "device": "cpu", "threads": 1, "precision": "fp32"}


# ----------------------------------------------------------------------------- train

def test_the_batch_is_whole_turns_half_text_half_voice():
    cfg = model_preset("test")
    batch = benchmark_model.make_batch(cfg, 2, 256, 0)
    assert batch.mask[..., 0].float().mean() == 0.5 and batch.turn[0, [0, 127, 128, 255]].tolist() == [0, 0, 1, 1]
    end = batch.mask[..., 0] & ~batch.frames[..., :-1].any(-1)
    assert end[0].nonzero()[:, 0].tolist() == [127, 255] and int(batch.frames[..., :-1].max()) < cfg.audio_vocab
    assert torch.isfinite(CSM(cfg)(batch)).all()


def test_both_sides_have_the_same_loss_and_gradients_flow():
    pytest.importorskip("transformers")
    device = torch.device("cpu")
    losses = [make(SPEC, device)() for make in (benchmark_model.our_step, benchmark_model.their_step)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx([math.log(65)] * 2, rel=0.05)
    other = benchmark_model.our_step(SPEC | {"seed": 4}, device)()
    assert abs(other[1] - losses[0][1]) > 1e-4
    with pytest.raises(ValueError, match="8 frames of 8 codebooks.*--rows"):
        benchmark_model.their_step(SPEC | {"rows": 1}, device)


def made_up(ours: list, theirs: list) -> dict:
    memory = {"ours": {"libraries": 100.0, "peak": 300.0}, "theirs": {"libraries": 200.0, "peak": 700.0}}
    first = {"ours": {"c0": 4.0, "depth": 5.0}, "theirs": {"c0": 4.0, "depth": 5.00002}}
    return benchmark_model.race_result({"rows": 2, "positions": 100}, first, {"ours": ours, "theirs": theirs}, memory)


def test_ratios_are_those_of_pairs_and_memory_is_that_above_the_libraries():
    r = made_up([1.0, 2.0, 1.0], [2.0, 5.0, 2.2])
    assert r["speed"] == {"median": 2.2, "lowest": 2.0, "highest": 2.5, "pairs": 3} and r["positions_per_second"]["ours"] == 200
    assert r["memory"] == pytest.approx(0.4) and r["memory_of_processes"] == pytest.approx(3 / 7) and r["loss_difference"] == pytest.approx(2e-5)
    assert [b["met"] for b in benchmark_model.bars({"fp32": r})] == [True, True, True]
    slow = benchmark_model.bars({"bf16": made_up([2.0], [2.0])})
    assert [b["met"] for b in slow] == [False, True] and slow[0]["value"] == 1.0


def test_train_bench(tmp_path, capsys):
    """The whole of it at the smallest size: three processes."""
    pytest.importorskip("transformers")
    result = test_benchmark.run(capsys, "train", "--model_size", "test", "--rows", 1, "--positions", 128, "--repeats", 2, "--races", "fp32,defaults",
                                "--plan", "test", "--threads", 1, "--results", tmp_path / "R.md")
    race, plan = result["races"]["fp32"], result["plan"]["test"]
    assert race["loss_difference"] < 1e-4 and race["speed"]["pairs"] == 2 and race["speed"]["lowest"] <= race["speed"]["median"] <= race["speed"]["highest"]
    assert 0 < race["above_libraries_mb"]["ours"] < race["peak_mb"]["ours"] and race["memory_of_processes"] < 1
    assert all(0 < used < 1 for used in race["model_flop_utilisation"].values()) and 1e-6 < result["races"]["defaults"]["loss_difference"] < 0.05
    assert plan["positions"] == 128 and plan["measured_mb"] > 0 and plan["planned_mb"] == pytest.approx(sum(plan["planned_parts_mb"].values()), rel=1e-3)
    text = (tmp_path / "R.md").read_text()
    assert "## Training step" in text and "fp32: positions per second" in text and benchmark.read_results(tmp_path / "R.md")["train"] == result


def test_flops_are_those_of_the_matrix_products():
    """Twice the positions cost twice the products of the weights, and four times those of attention."""
    one, two = (benchmark_model.step_flops({"model_size": "test", "rows": 1, "positions": n, "seed": 0}) for n in (128, 256))
    cfg = model_preset("test")
    b = cfg.backbone
    backbone = 6 * 128 * b.layers * (b.width * (2 * b.width + 2 * b.kv_heads * b.head_dim) + 3 * b.width * b.ffn)
    assert one > backbone and two > 2 * one - 0.1 * backbone and two < 4 * one


@pytest.mark.parametrize("words", [("--model_size", "huge"), ("--positions", "64"), ("--plan", "huge"), ("--rows", "0"), ("--races", "fp8")])
def test_bad_input_is_one_line(words, tmp_path, capsys):
    assert benchmark.main(["train", *words, "--results", str(tmp_path / "R.md")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "R.md").exists()


# ----------------------------------------------------------------------------- inspect

def test_half_lives_are_those_the_memory_begins_with():
    cfg = model_preset("test")
    model = CSM(cfg)
    model.init_weights()
    for bank, turns in enumerate((cfg.memory.semantic_half_life, cfg.memory.prosodic_half_life)):
        assert benchmark_model.half_lives(model.read_memory[0].decay[bank]).tolist() == pytest.approx([turns] * cfg.memory.heads, rel=1e-4)


def test_watched_weights_are_those_that_are_used():
    """With the null key's share they add up to one, and they give the module's own output."""
    from layers import CrossAttention
    torch.manual_seed(0)
    cross = CrossAttention(8, 8, 8, 2)
    with torch.no_grad():
        cross.null.normal_()
        k, v = cross.keys(torch.randn(1, 5, 8))
        q, bias = torch.randn(1, 3, 8), torch.randn(1, 2, 3, 5)
        plain = cross.look(q, k, v, bias)
        with benchmark_model.watched([cross]) as seen:
            assert torch.equal(cross.look(q, k, v, bias), plain)
    assert torch.equal(cross.look(q, k, v, bias), plain) and "look" not in vars(cross)
    torch.testing.assert_close((seen[cross] @ v).transpose(1, 2).flatten(2), plain)
    assert (seen[cross].sum(-1) < 1).all()


def test_inspect_draws_what_there_is(data, weights, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["inspect", "--data", data, "--codec", weights / "codec", "--checkpoint", weights / "nano", "--save", tmp_path / "pictures"]
    assert benchmark.main([str(w) for w in words]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = [p.rsplit("/", 1)[1] for p in result["pictures"]]
    assert names == ["gates.png", "half_lives.png", "text.png", "memory.png"]
    assert all((tmp_path / "pictures" / n).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for n in names)
    assert result["gates"]["read_text"] == [0.0] and len(result["half_lives"]["semantic slots"][0]) == 2
    assert result["letters_off"][0] < 8                                        # untrained, but guided: the bias begins as a bump


def test_the_turn_that_is_drawn_has_its_reading_position_and_older_slots(data, weights):
    from checkpoint import load_codec, load_model
    from text_tokenizer import load_tokenizer
    talker = load_model(weights / "nano"), load_codec(weights / "codec"), load_tokenizer("bytes")
    turns = benchmark.pick_turns(data, "test", 1, 0)[0][0]
    with torch.no_grad():
        seen = benchmark_model.attend_to_turn(talker, data, turns, 3)
    text = turns[3]["text"]
    assert "".join(seen["letters"]).strip() == text and seen["slots"] == [0, 1] and len(seen["borders"]) == 1
    frames = math.ceil(1.2 * 12.5)
    assert len(seen["reading"]) == frames + 2 and seen["reading"] == sorted(seen["reading"]) and seen["reading"][-1] == 2 + len(text)
    assert seen["text"][0].shape == (frames + 2, len(seen["letters"])) and seen["memory"][0].shape[0] == 4
