"""The compiled frame gives the codes of the step by step path, for every seed, and failing to compile is no failure."""
import copy
import shutil

import pytest
import torch

import depth_graph
from architecture import CSM
from config import SamplingConfig, TransformerConfig, model_preset
from generation import draw_codes

SAMPLING = SamplingConfig(depth_temperature=0.9, depth_top_k=5)


@pytest.fixture(scope="module")
def model():
    made = CSM(model_preset("test", num_codebooks=4, depth=TransformerConfig(1, 32, 64, 2, 1, max_positions=8)))
    made.init_weights(torch.Generator().manual_seed(0), open_gates=True)
    made.audio_head.data *= 20
    return made.eval()


def same(model, sampling, seed):
    other = copy.copy(model)
    other.frame_codes = None
    h, c0 = torch.randn(1, model.cfg.backbone.width), torch.tensor([3])
    with torch.inference_mode():
        got, want = (draw_codes(m, h, 64, sampling, torch.Generator().manual_seed(seed), c0) for m in (model, other))
    assert got.shape == (1, 4) and torch.equal(got, want)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_graph_gives_the_same_codes(model):
    model = copy.copy(model)
    assert "one graph" in depth_graph.compile_depth(model, SAMPLING, 64)
    for seed in range(12):
        same(model, SAMPLING, seed)
    assert len(model.frame_codes.graphs) == 1


@pytest.mark.parametrize("sampling", [SamplingConfig(depth_temperature=0.0), SAMPLING], ids=["greedy", "drawn"])
@pytest.mark.parametrize("loops", [True, False], ids=["loop", "unrolled"])
def test_what_is_compiled_is_right_before_it_is(model, sampling, loops, monkeypatch):
    """The same function without a compiler: both the loop of the CPU and the unrolled form of the GPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = copy.copy(model)
    graph = depth_graph.DepthGraph(model)
    graph.loops, model.frame_codes = loops, graph
    for seed in range(6):
        same(model, sampling, seed)


def test_without_a_compiler_everything_stays(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++\ncompiler found")
    monkeypatch.setattr(torch, "compile", broken)
    model = copy.copy(model)
    note = depth_graph.compile_depth(model)
    assert "no C++ compiler found" in note and "\n" not in note and model.frame_codes is None


def test_weights_that_no_graph_can_hold(model):
    import quantisation
    if not quantisation._works(quantisation.Dynamic):
        pytest.skip("no such operator here")
    model = copy.deepcopy(model)
    quantisation.quantise(model, "int8", "dynamic")
    assert "--compile_depth" in depth_graph.compile_depth(model) and model.frame_codes is None
