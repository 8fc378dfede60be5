"""The memory plan of `python config.py`: every figure against the thing itself."""
import copy

import pytest
import torch
import torch.nn.functional as F

import config
import layers
from architecture import CSM
from test_architecture import batch_of, speak
from train import build_optimisers, split_parameters


def on_meta(cfg) -> CSM:
    with torch.device("meta"):
        return CSM(cfg)


@pytest.mark.parametrize("name", list(config.MODEL_PRESETS))
def test_counts_are_those_of_the_model(name):
    cfg = config.model_preset(name)
    model = on_meta(cfg)
    assert sum(p.numel() for p in model.parameters()) == config.count_all(cfg)
    assert sum(p.numel() for p in split_parameters(model)[0]) == config.count_matrices(cfg)
    for part, count in config.count_additions(cfg).items():
        assert sum(p.numel() for p in model.get_submodule(part).parameters()) == count, part


def test_states_are_those_of_a_training_step():
    cfg = config.model_preset("test")
    model = CSM(cfg)
    model.init_weights()
    optimisers = build_optimisers(model, config.TrainConfig())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimiser in optimisers:
        optimiser.step()
    held = sum(v.nbytes for o in optimisers for state in o.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    plan = config.training_bytes(cfg)
    assert plan["optimiser"] == held and plan["weights"] == plan["gradients"] == plan["average"] == sum(p.nbytes for p in model.parameters())
    assert plan["total"] == sum(value for name, value in plan.items() if name != "total")


def test_states_are_split_over_the_gpus_and_activations_are_not():
    cfg = config.model_preset("medium")
    one, many = config.training_bytes(cfg), config.training_bytes(cfg, gpus=64)
    assert all(many[name] == -(-one[name] // 64) for name in ("weights", "gradients", "optimiser", "average")) and many["activations"] == one["activations"]


@pytest.mark.parametrize("name", ["nano", "test"])
def test_a_conversation_holds_what_the_plan_says(name):
    cfg = config.model_preset(name)
    state = on_meta(cfg).new_state(dtype=torch.bfloat16)
    plan = config.conversation_bytes(cfg)
    assert plan["kv_cache"] == sum(c.k.nbytes + c.v.nbytes for c in state.caches) and plan["heard"] == sum(h.nbytes for h in state.heard)
    assert plan["memory"] == cfg.memory.max_slots * (2 * cfg.memory.width * 2 + 8)


def fused(q, k, v, mask):
    """Attention as on a GPU: the CPU's own path keeps the scores, which the plan leaves out."""
    causal = isinstance(mask, str)
    bias = None if causal or mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def kept_bytes(cfg, rows) -> int:
    """Bytes of all distinct tensors that a training forward keeps for the backward pass, weights and their bf16 copies left out."""
    model = CSM(cfg)
    model.init_weights(open_gates=True)
    weights, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    # copies of weights are recognised by their shape: as they are, stacked or transposed
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    stacked = {(sum(m.weight.shape[0] for m in group), group[0].weight.shape[1]) for b in (*model.backbone.layers, *model.decoder.layers)
               for group in ((b.attn.q_proj, b.attn.k_proj, b.attn.v_proj), (b.mlp.w1, b.mlp.w3))}

    def keep(tensor):
        storage, shape = tensor.untyped_storage(), tuple(tensor.shape)
        if storage.data_ptr() not in weights and shape not in shapes | stacked and shape[::-1] not in shapes | stacked:
            seen[storage.data_ptr()] = storage.nbytes(), tensor                # the tensor is held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.train().loss(batch_of(cfg, rows))
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("off", [False, True])
def test_activations_are_what_is_measured(off, monkeypatch):
    """Within a sixth, on the geometry of nano: half of the positions text."""
    monkeypatch.setattr(layers, "attend", fused)
    monkeypatch.setattr(layers, "again", lambda function, *tensors: function(*tensors))       # a GPU does not
    cfg = config.model_preset("nano", **(copy.deepcopy(config.OFF) if off else {}))
    rows = [speak(cfg, 0, 57, 60) + speak(cfg, 1, 57, 60, 5)] * 2
    measured, planned = kept_bytes(cfg, rows), sum(config.activation_bytes(cfg, sum(map(len, rows))).values())
    assert planned == pytest.approx(measured, rel=1 / 6)


def test_the_printed_plan_names_every_preset(capsys):
    assert config.main(["--batch_positions", "2048"]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"\n{name} ") >= 2 for name in config.MODEL_PRESETS if name != "nano") and "1,552,791,552" in out and "2048 positions" in out
