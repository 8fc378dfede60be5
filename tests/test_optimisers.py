"""Muon in batches against torch.optim.Muon, one matrix after the other."""
import copy

import pytest
import torch
from torch.optim import _muon

import optimisers

SHAPES = [(8, 8), (8, 8), (4, 12), (12, 4), (12, 4), (4, 12), (1, 6), (20, 3)]


def matrices(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in SHAPES]


def steps(optimiser, params, first, last):
    for number in range(first, last):
        g = torch.Generator().manual_seed(100 + number)
        for i, p in enumerate(params):
            p.grad = None if (i, number) == (3, 1) else torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        optimiser.step()


@pytest.fixture
def exact(monkeypatch):
    """Both in float64, where only the order of sums differs."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())         # as it is called in torch's iteration
    monkeypatch.setattr(optimisers.Muon, "dtype", torch.float64)


@pytest.mark.parametrize("numbers", [2 ** 20, 100])
def test_batched_steps_are_those_of_torch(exact, monkeypatch, numbers):
    monkeypatch.setattr(optimisers, "CACHED", numbers)
    ours, theirs = matrices(), matrices()
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
    a, b = optimisers.Muon(ours, **options), torch.optim.Muon(theirs, **options)
    steps(a, ours, 0, 4)
    steps(b, theirs, 0, 4)
    assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-9) for x, y in zip(ours, theirs))
    for x, y in zip(ours, theirs):
        assert torch.allclose(a.state[x]["momentum_buffer"], b.state[y]["momentum_buffer"], rtol=1e-12, atol=1e-12)


def test_in_bfloat16_they_differ_by_its_rounding():
    ours, theirs = ([torch.nn.Parameter(p.detach().float()) for p in matrices()] for _ in range(2))
    before = copy.deepcopy(ours)
    steps(optimisers.Muon(ours, lr=0.05, weight_decay=0.0), ours, 0, 1)
    steps(torch.optim.Muon(theirs, lr=0.05, weight_decay=0.0), theirs, 0, 1)
    for x, y, was in zip(ours, theirs, before):
        assert (x - y).norm() < 0.03 * (y - was).norm()


def test_each_goes_on_from_the_others_file(exact):
    whole, first, second = matrices(), matrices(), matrices()
    steps(optimisers.Muon(whole, lr=0.05), whole, 0, 4)
    old = torch.optim.Muon(first, lr=0.05)
    steps(old, first, 0, 2)
    new = optimisers.Muon(first, lr=0.01)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    steps(new, first, 2, 3)
    with torch.no_grad():
        for p, q in zip(second, first):
            p.copy_(q)
    last = torch.optim.Muon(second, lr=0.01)
    last.load_state_dict(copy.deepcopy(new.state_dict()))
    steps(last, second, 3, 4)
    assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-9) for x, y in zip(whole, second))


def test_the_iteration_is_the_one_of_torch():
    """A release of PyTorch that changes it is noticed here."""
    g = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    settings = torch.optim.Muon([torch.nn.Parameter(g)]).defaults
    assert settings["nesterov"] and settings["adjust_lr_fn"] is None
    ours = optimisers.orthogonalise(g.bfloat16().unsqueeze(0), settings["ns_coefficients"], settings["ns_steps"], settings["eps"])[0]
    theirs = _muon._zeropower_via_newtonschulz(g, settings["ns_coefficients"], settings["ns_steps"], settings["eps"])
    assert torch.allclose(ours.float(), theirs.float(), atol=0.02)
