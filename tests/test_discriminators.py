"""Discriminators: what they see, one pass against two, who learns from what."""
import copy

import pytest
import torch

from discriminators import Adversary, Discriminators, adversarial_loss, discriminator_loss, feature_loss, set_rate


def sounds(seed=0, batch=2, n=9600):
    """Hiss as recordings, tones as decoded sound."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(n) / 24000
    real = 0.1 * torch.randn(batch, n, generator=generator)
    return 0.1 * torch.sin(6.2832 * 300 * (1 + torch.rand(batch, 1, generator=generator)) * t), real


def test_phase_is_seen_only_where_asked():
    """A sound turned upside down has the same magnitudes and another phase."""
    audio = sounds()[1]
    for phase in (False, True):
        torch.manual_seed(0)
        nets = Discriminators(4, phase)
        with torch.no_grad():
            same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(nets(audio)[1], nets(-audio)[1]))
        assert same == (not phase)


def test_one_pass_gives_the_gradients_of_two():
    """The usual way as the oracle: discriminators on detached sound first, then the decoder against frozen discriminators."""
    fake, real = sounds()
    fake.requires_grad_()
    torch.manual_seed(0)
    adversary = Adversary(4, False, 1.0, 24000)
    losses, metrics = adversary.judge(fake, real, torch.Generator())
    (losses["adversarial"] + 2 * losses["features"]).backward(inputs=[fake])
    assert all(p.grad is None for p in adversary.nets.parameters()), "the decoder's loss must not reach the discriminators"
    nets, parameters = adversary.nets, list(adversary.nets.parameters())
    scores = [nets(x)[1] for x in (real, fake.detach())]
    assert metrics["discriminator"] == pytest.approx(float(discriminator_loss(*scores).detach()), rel=1e-5)
    for waiting, slow in zip(adversary.waiting, torch.autograd.grad(discriminator_loss(*scores), parameters), strict=True):
        assert torch.allclose(waiting, slow, atol=1e-6)
    (real_features, _), (features, scores) = nets(real), nets(fake)
    slow, = torch.autograd.grad(adversarial_loss(scores) + 2 * feature_loss(real_features, features), fake)
    assert torch.allclose(fake.grad, slow, atol=1e-7) and slow.abs().max() > 0


def test_they_learn_to_tell_and_the_sound_learns_to_pass():
    torch.manual_seed(0)
    adversary, generator = Adversary(4, False, 0.2, 24000), torch.Generator().manual_seed(0)
    set_rate(adversary.optimizer, 3e-3)
    before = [p.detach().clone() for p in adversary.nets.parameters()]
    for step in range(25):
        fake, real = sounds(step)
        _, metrics = adversary.judge(fake.requires_grad_(), real, generator)
        adversary.update()
    assert metrics["told_apart"] > 0.9 and metrics["discriminator"] < 0.3
    assert all(not torch.equal(a, b) for a, b in zip(before, adversary.nets.parameters()))
    fake, real = sounds(99)
    fake.requires_grad_()
    first = adversary.judge(fake, real, torch.Generator())[0]["adversarial"]
    for _ in range(5):
        loss = adversary.judge(fake, real, torch.Generator())[0]["adversarial"]
        slope, = torch.autograd.grad(loss, fake)
        fake = (fake - 0.01 * slope.sign()).detach().requires_grad_()
    assert adversary.judge(fake, real, torch.Generator())[0]["adversarial"] < first


def test_both_are_seen_at_the_same_place():
    """The same sound twice has no distance in any feature, wherever the part is taken from; another sound has."""
    adversary, generator = Adversary(4, False, 0.1, 24000), torch.Generator().manual_seed(0)
    fake, real = sounds()
    for _ in range(4):
        assert adversary.judge(real.clone().requires_grad_(), real, generator)[0]["features"] < 1e-6
    assert adversary.judge(fake.requires_grad_(), real, generator)[0]["features"] > 0.01


def test_state_goes_round_and_another_size_is_refused():
    fake, real = sounds()
    one, other = Adversary(4, False, 0.2, 24000), Adversary(4, False, 0.2, 24000)
    one.judge(fake.requires_grad_(), real, torch.Generator())
    one.update()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for adversary in (one, other):
        adversary.judge(fake, real, torch.Generator().manual_seed(0))
        adversary.update()
    assert all(torch.equal(a, b) for a, b in zip(one.nets.parameters(), other.nets.parameters()))
    with pytest.raises(ValueError, match="--discriminator_width"):
        Adversary(8, False, 0.2, 24000).load_state_dict(one.state_dict())
