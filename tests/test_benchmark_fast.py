"""The section on fast decoding: what is counted, what is timed, what is written."""
from types import SimpleNamespace

import pytest

import benchmark_fast
from benchmark_fast import bytes_per_frame, fast_body, time_size
from config import OFF, model_preset
from quantisation import WeightOnly, Wide


def test_bytes_are_those_of_the_products():
    """A CSM without additions: the backbone's matrices once, the depth decoder's K times, each codebook's head once; norms are the rest."""
    import torch
    from architecture import CSM
    from layers import Product
    cfg = model_preset("test", **OFF)
    model, K = CSM(cfg), cfg.num_codebooks
    for variant, kind, rest in (("plain", Product, 0.01), ("bf16", Wide, 0.02), ("int8", WeightOnly, 0.1)):       # int8 rows have scales besides
        def size(module, kind=kind):
            return sum(kind(m.weight).nbytes for m in module.modules() if isinstance(m, torch.nn.Linear))
        once = size(model.backbone) + kind(model.codebook0_head.weight).nbytes + kind(model.projection.weight).nbytes
        wanted = once + K * size(model.decoder) + sum(kind(head.t()).nbytes for head in model.audio_head.detach())
        found = bytes_per_frame(cfg, variant)
        assert found["steps"] == pytest.approx(wanted, rel=0.1 + rest) and found["cached"] < found["steps"]
    assert bytes_per_frame(cfg, "speculative", 2.0)["steps"] > bytes_per_frame(cfg, "speculative", 1.0)["steps"] > bytes_per_frame(cfg, "int8")["steps"]


def test_variants_are_timed_and_compared():
    args = SimpleNamespace(variants="plain,fp32,int8,speculative", frames=4, seed=0, checkpoint="")
    found = time_size("test", args, 1e10)
    variants = found["variants"]
    assert list(variants) == ["plain", "fp32", "int8", "speculative"] and found["interleaved"] and not found["trained"]
    assert all(v["ms"] >= v["best_ms"] > 0 and v["depth_ms"] > 0 and v["backbone_ms"] > 0 for v in variants.values())
    assert [variants[n]["equal_codes"] for n in ("plain", "fp32", "speculative")] == [1, 1, 1] and 0.2 < variants["int8"]["equal_codes"] <= 1
    assert variants["speculative"]["tally"]["frames"] == 5 and variants["int8"]["tally"] is None       # one frame warms up
    body = fast_body({"read_gb_per_s": 10.0, "sizes": {"test": found}, "attention": {"test": {"backend": "flash", "shape": [4, 2, 16, 512], "ms": {"flash": {"one_ms": 0.03, "prefill_ms": 4.0}}}}})
    assert "random weights" in body and "**int8**" in body and "flash 0.030 and 4.00 ms" in body and "were kept" in body


def test_bad_flags_are_named():
    args = SimpleNamespace(sizes="nano,huge", variants="plain", frames=4, codec="x")
    with pytest.raises(ValueError, match="--sizes"):
        benchmark_fast.bench_fast(args)
    with pytest.raises(ValueError, match="plain"):
        benchmark_fast.bench_fast(SimpleNamespace(sizes="nano", variants="int8", frames=4, codec="x"))
