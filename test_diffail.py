"""Tests of diffail.py and sac_baseline.py: mathematics against independent references, behaviour as a user sees it, bad input.

    python -m pytest
"""
import ast
import csv
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F

import diffail
import sac_baseline

HERE = Path(__file__).parent
SCRIPTS = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("test_"))
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
STEPS = 10


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)


def make_discriminator(dim: int = 5, steps: int = STEPS, schedule: str = "linear", hidden_dim: int = 16) -> diffail.DiffusionDiscriminator:
    """A discriminator in float64, with the same schedule values."""
    return diffail.DiffusionDiscriminator(dim, hidden_dim, steps, schedule).double()


def reference_prediction(discriminator: diffail.DiffusionDiscriminator, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """eps_phi(x_t, t) written out with torch's own mish, each sample's time embedded by itself."""
    net = discriminator.noise_predictor
    frequencies = [10_000 ** (-i / 7) for i in range(8)]
    rows = [[math.sin(k * f) for f in frequencies] + [math.cos(k * f) for f in frequencies] for k in t.tolist()]
    time_features = net.time_out(F.mish(net.time_in(torch.tensor(rows, dtype=x_t.dtype))))
    h = torch.cat([x_t, time_features], dim=1)
    for layer in net.hidden:
        h = F.mish(layer(h))
    return net.out(h)


def reference_loss(discriminator: diffail.DiffusionDiscriminator, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """L(x, eps, t), from the schedule's formula up."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, STEPS, dtype=torch.float64), 0)[t][:, None]
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    return ((noise - reference_prediction(discriminator, x_t, t)) ** 2).mean(1)


# -------------------------------------------------------------------------------------------------------- diffusion


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_schedules_follow_their_formulas(steps):
    linear = [1e-4 + (2e-2 - 1e-4) * i / max(steps - 1, 1) for i in range(steps)]
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    cosine = [min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)]
    vp = [1 - math.exp(-0.1 / steps - 0.5 * 9.9 * (2 * i - 1) / steps**2) for i in range(1, steps + 1)]
    for name, expected in {"linear": linear, "cosine": cosine, "vp": vp}.items():
        betas = diffail.noise_schedule(name, steps)
        assert betas.dtype == torch.float64 and betas.shape == (steps,)
        np.testing.assert_allclose(betas, expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp"])
def test_noised_has_the_mean_and_variance_of_the_forward_diffusion(schedule):
    n, discriminator = 200_000, make_discriminator(dim=1, schedule=schedule)
    for t in (0, 4, 9):
        alpha_bar = float(torch.cumprod(1 - diffail.noise_schedule(schedule, STEPS), 0)[t])
        x_t = discriminator.noised(torch.full((n, 1), 3.0).double(), torch.randn(n, 1).double(), torch.full((n,), t))
        assert x_t.mean().item() == pytest.approx(3 * math.sqrt(alpha_bar), abs=5 / math.sqrt(n))
        assert x_t.var().item() == pytest.approx(1 - alpha_bar, rel=0.02)


def test_time_embedding_follows_its_formula():
    embedding = diffail.time_embedding(20, 16)
    for t in (0, 1, 19):
        for i in range(8):
            angle = t * math.exp(-math.log(10_000) * i / 7)
            assert embedding[t, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert embedding[t, 8 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_mish_and_both_derivatives_are_torchs():
    x = torch.cat([torch.linspace(-60, 60, 2001), torch.tensor([-104.0, 0.0, 89.0])]).double().requires_grad_()
    y, slope = diffail.mish(x)
    expected = F.mish(x)
    (expected_slope,) = torch.autograd.grad(expected.sum(), x, create_graph=True)
    (expected_curvature,) = torch.autograd.grad(expected_slope.sum(), x)
    (curvature,) = torch.autograd.grad(slope.sum(), x, retain_graph=True)
    (slope_again,) = torch.autograd.grad(y.sum(), x)
    for ours, theirs in ((y, expected), (slope, expected_slope), (slope_again, expected_slope), (curvature, expected_curvature)):
        np.testing.assert_allclose(ours.detach(), theirs.detach(), atol=1e-13)
    far = torch.tensor([-1e4, 1e4], requires_grad=True)  # where torch's own second derivative is not a number
    y, slope = diffail.mish(far)
    assert y.tolist() == [0, 1e4] and slope.tolist() == [0, 1] and torch.autograd.grad(slope.sum(), far)[0].tolist() == [0, 0]
    with torch.no_grad():
        y, slope = diffail.mish(x.detach().float())
    assert slope is None
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- discriminator


def test_discriminator_is_exp_of_minus_the_diffusion_loss():
    discriminator, x = make_discriminator(), 2 * torch.randn(64, 5).double()
    noise, t = torch.randn(64, 5).double(), torch.randint(STEPS, (64,))
    loss = reference_loss(discriminator, x, noise, t)
    np.testing.assert_allclose(discriminator.diffusion_loss(x, noise, t).detach(), loss.detach(), rtol=1e-6)
    np.testing.assert_allclose(discriminator(x, noise, t).detach(), torch.exp(-loss).detach(), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 9.0])
def test_discriminator_stays_in_zero_one_for_extreme_inputs(scale):
    discriminator = diffail.DiffusionDiscriminator(5, 16, STEPS, "linear")
    nn.init.zeros_(discriminator.noise_predictor.out.weight)  # so the prediction is the bias, and L is known
    noise, t = scale * torch.ones(8, 5), torch.zeros(8, dtype=torch.long)
    nn.init.zeros_(discriminator.noise_predictor.out.bias)
    d = discriminator(1e3 * torch.randn(8, 5), noise, t)
    assert (d > 0).all() and (d <= 1).all()
    np.testing.assert_allclose(d.detach(), math.exp(-(scale**2)), rtol=1e-5)


def test_log_one_minus_exp_is_exact_and_its_gradient_finite_over_sixteen_decades():
    loss = torch.logspace(-12, 4, 400).requires_grad_()
    value = diffail.log_one_minus_exp(loss)
    (grad,) = torch.autograd.grad(value.sum(), loss)
    exact = [math.log(-math.expm1(-v)) for v in loss.double().tolist()]
    exact_grad = [1 / math.expm1(v) if v < 700 else 0.0 for v in loss.double().tolist()]
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()
    np.testing.assert_allclose(value.detach(), exact, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-4, atol=1e-6)
    at_zero = diffail.log_one_minus_exp(torch.zeros(1, requires_grad=True))
    assert torch.isfinite(at_zero).all() and at_zero.item() < -60


def test_discriminator_loss_is_the_binary_cross_entropy_of_d():
    discriminator = make_discriminator()
    expert, policy, noise = torch.randn(32, 5).double(), 2 * torch.randn(32, 5).double(), torch.randn(64, 5).double()
    t = torch.randint(STEPS, (64,))
    expert_loss, policy_loss = diffail.discriminator_loss(discriminator, expert, policy, noise, t)
    d_expert = torch.exp(-reference_loss(discriminator, expert, noise[:32], t[:32]))
    d_policy = torch.exp(-reference_loss(discriminator, policy, noise[32:], t[32:]))
    assert expert_loss.item() == pytest.approx(F.binary_cross_entropy(d_expert, torch.ones_like(d_expert)).item(), rel=1e-6)
    assert policy_loss.item() == pytest.approx(F.binary_cross_entropy(d_policy, torch.zeros_like(d_policy)).item(), rel=1e-6)


def test_gradient_of_d_is_that_of_finite_differences():
    discriminator, x = make_discriminator(), torch.randn(6, 5).double()
    noise, t, h = torch.randn(6, 5).double(), torch.randint(STEPS, (6,)), 1e-5
    grad = discriminator.gradient(x, noise, t)
    for i in range(5):
        step = h * torch.eye(5).double()[i]
        numeric = (discriminator(x + step, noise, t) - discriminator(x - step, noise, t)) / (2 * h)
        np.testing.assert_allclose(grad[:, i].detach(), numeric.detach(), rtol=1e-5, atol=1e-9)


def test_gradient_penalty_and_its_parameter_gradient():
    discriminator = make_discriminator()
    for parameter in discriminator.parameters():
        parameter.data.mul_(2)  # away from the flat start, so that every term counts
    expert, policy, mix = torch.randn(16, 5).double(), torch.randn(16, 5).double(), torch.rand(16, 1).double()
    noise, t = torch.randn(16, 5).double(), torch.randint(STEPS, (16,))
    penalty = diffail.gradient_penalty(discriminator, expert, policy, mix, noise, t)
    gradients = torch.autograd.grad(penalty, list(discriminator.parameters()), allow_unused=True)

    x = (mix * expert + (1 - mix) * policy).requires_grad_()
    (grad_x,) = torch.autograd.grad(torch.exp(-reference_loss(discriminator, x, noise, t)).sum(), x, create_graph=True)
    expected = ((grad_x.norm(dim=1) - 1) ** 2).mean()
    expected_gradients = torch.autograd.grad(expected, list(discriminator.parameters()), allow_unused=True)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-9)

    h = 1e-5
    for parameter, gradient in zip(discriminator.parameters(), gradients):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * h)
            values.append(diffail.gradient_penalty(discriminator, expert, policy, mix, noise, t).item())
            parameter.data.sub_(direction, alpha=sign * h)
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_surrogate_reward_is_that_of_a_plain_loop_over_t(form):
    discriminator, x, noise = make_discriminator(), 2 * torch.randn(12, 5).double(), torch.randn(STEPS, 12, 5).double()
    rewards = diffail.surrogate_reward(discriminator, x, noise, form)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, STEPS, dtype=torch.float64), 0)
    for b in range(12):
        losses, likeness = [], []
        for t in range(STEPS):
            x_t = alpha_bar[t].sqrt() * x[b] + (1 - alpha_bar[t]).sqrt() * noise[t, b]
            squared_error = (noise[t, b] - reference_prediction(discriminator, x_t[None], torch.tensor([t]))[0]) ** 2
            losses.append(squared_error.mean().item())
            likeness += torch.exp(-squared_error).tolist()
        d = math.exp(-np.mean(losses)) if form == "paper" else np.mean(likeness)
        assert rewards[b].item() == pytest.approx(-math.log(1 - d), rel=1e-5)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_rewards_are_finite_and_positive_and_fall_with_the_loss(form):
    discriminator = diffail.DiffusionDiscriminator(1, 16, STEPS, "linear")
    nn.init.zeros_(discriminator.noise_predictor.out.weight)
    nn.init.zeros_(discriminator.noise_predictor.out.bias)  # the prediction is 0, so L = noise^2
    noise = torch.logspace(-6, 0.5, 200).view(1, -1, 1).repeat(STEPS, 1, 1)
    rewards = diffail.surrogate_reward(discriminator, torch.zeros(200, 1), noise, form)
    assert torch.isfinite(rewards).all() and (rewards > 0).all()
    assert (rewards.diff() < 0).all()
    far = diffail.surrogate_reward(discriminator, torch.zeros(1, 1), torch.full((STEPS, 1, 1), 1e3), form)
    exact = diffail.surrogate_reward(discriminator, torch.zeros(1, 1), torch.zeros(STEPS, 1, 1), form)
    assert far.item() == 0 and math.isfinite(exact.item()) and exact.item() > 60


def train_discriminator(expert: torch.Tensor, policy: torch.Tensor, updates: int = 1500) -> diffail.DiffusionDiscriminator:
    discriminator = diffail.DiffusionDiscriminator(expert.shape[1], 64, STEPS, "linear")
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    for _ in range(updates):
        e, p = (data[torch.randint(len(data), (128,))] for data in (expert, policy))
        expert_loss, policy_loss = diffail.discriminator_loss(discriminator, e, p, *discriminator.draw(256, e.shape[1]))
        penalty = diffail.gradient_penalty(discriminator, e, p, torch.rand(128, 1), *discriminator.draw(128, e.shape[1]))
        optimizer.zero_grad()
        (expert_loss + policy_loss + 0.1 * penalty).backward()
        optimizer.step()
    return discriminator


def area_under_roc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    return (positive[:, None] > negative[None]).double().mean().item()


def test_discriminator_separates_expert_from_random_on_held_out_data_and_not_two_identical_sets():
    demos = diffail.load_demonstrations(HERE / "demos" / "HalfCheetah-v4.npz", "HalfCheetah-v4", 8, diffail.make_env("HalfCheetah-v4"))
    expert = torch.from_numpy(np.concatenate([demos.observations, demos.next_observations], 1))
    env = diffail.make_env("HalfCheetah-v4")
    observation, _ = env.reset(seed=0)
    pairs = []
    for i in range(4000):
        following, _, _, truncated, _ = env.step(np.random.uniform(-1, 1, 6).astype(np.float32))
        pairs.append(np.concatenate([observation, following]))
        observation = env.reset(seed=i)[0] if truncated else following
    random = torch.from_numpy(np.array(pairs))

    def score(discriminator, x):
        return diffail.surrogate_reward(discriminator, x, torch.randn(STEPS, *x.shape), "paper")

    discriminator = train_discriminator(expert[:4000], random[:2000])
    assert area_under_roc(score(discriminator, expert[4000:6000]), score(discriminator, random[2000:])) >= 0.95
    same = train_discriminator(expert[:4000], expert[:4000])
    assert area_under_roc(score(same, expert[4000:6000]), score(same, expert[6000:8000])) == pytest.approx(0.5, abs=0.05)


# --------------------------------------------------------------------------------------------------------------- SAC


@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: tanh saturates and 1 - a^2 is 0 in floating point
def test_actor_log_prob_is_that_of_torch_distributions(scale):
    actor, observations = diffail.Actor(3, 2, 8).double(), torch.randn(50, 3).double()
    actor.net[-1].weight.data.mul_(scale)
    actor.net[-1].bias.data[:2] = 0.5 * scale
    torch.manual_seed(1)
    actions, log_prob, mean, log_std = actor.sample(observations)
    torch.manual_seed(1)
    u = mean + log_std.exp() * torch.randn_like(mean)
    # cache_size=1 lets the transform use u itself, where atanh(a) would be infinite
    policy = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)])
    transformed = policy.transforms[0](u)
    expected = policy.log_prob(transformed)
    if scale > 1:
        assert (1 - actions.float() ** 2 == 0).any()
    np.testing.assert_allclose(actions.detach(), transformed.detach(), rtol=1e-12)
    np.testing.assert_allclose(log_prob.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    assert torch.isfinite(log_prob).all()
    assert (log_std >= -20).all() and (log_std <= 2).all()


def numpy_mlp(net: nn.Sequential, x: np.ndarray) -> np.ndarray:
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in net if isinstance(m, nn.Linear)]
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ layers[-1][0].T + layers[-1][1]


def numpy_sample(actor: diffail.Actor, observations: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, log_std = np.split(numpy_mlp(actor.net, observations), 2, axis=1)
    std = np.exp(np.clip(log_std, -20, 2))
    u = mean + std * noise
    density = -((u - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
    return np.tanh(u), (density - np.log(1 - np.tanh(u) ** 2)).sum(1)


def tiny_sac() -> tuple:
    actor, critic, target = diffail.Actor(3, 2, 8), diffail.TwinCritic(3, 2, 8), diffail.TwinCritic(3, 2, 8)
    batch = torch.randn(7, 3), torch.rand(7, 2) * 2 - 1, torch.randn(7, 3), torch.randn(7), torch.tensor([0.9, 0, 0.9, 0.9, 0, 0.9, 0.9])
    return actor.double(), critic.double(), target.double(), torch.tensor(0.3, dtype=torch.float64), [part.double() for part in batch]


def test_critic_loss_is_the_hand_written_one():
    actor, critic, target, alpha, (s, a, s_next, rewards, discount) = tiny_sac()
    torch.manual_seed(5)
    loss = diffail.critic_loss(critic, target, actor, alpha, s, a, s_next, rewards, discount)
    torch.manual_seed(5)
    noise = torch.randn(7, 2, dtype=torch.float64).numpy()
    a_next, log_prob = numpy_sample(actor, s_next.numpy(), noise)
    x_next, x = np.concatenate([s_next, a_next], 1), np.concatenate([s, a], 1)
    value = np.minimum(numpy_mlp(target.q1, x_next), numpy_mlp(target.q2, x_next))[:, 0] - 0.3 * log_prob
    y = rewards.numpy() + discount.numpy() * value
    expected = sum(0.5 * np.mean((numpy_mlp(q, x)[:, 0] - y) ** 2) for q in (critic.q1, critic.q2))
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_actor_and_temperature_loss_are_the_hand_written_ones():
    actor, critic, _, alpha, (s, *_) = tiny_sac()
    torch.manual_seed(5)
    loss, log_prob, mean, log_std = diffail.actor_loss(actor, critic, alpha, s)
    torch.manual_seed(5)
    noise = torch.randn(7, 2, dtype=torch.float64).numpy()
    actions, expected_log_prob = numpy_sample(actor, s.numpy(), noise)
    x = np.concatenate([s, actions], 1)
    q = np.minimum(numpy_mlp(critic.q1, x), numpy_mlp(critic.q2, x))[:, 0]
    assert loss.item() == pytest.approx(np.mean(0.3 * expected_log_prob - q), rel=1e-10)
    np.testing.assert_allclose(log_prob.detach(), expected_log_prob, rtol=1e-9)
    np.testing.assert_allclose(torch.cat([mean, log_std], 1).detach(), numpy_mlp(actor.net, s.numpy()), rtol=1e-10)

    log_alpha = torch.tensor(math.log(0.3), dtype=torch.float64, requires_grad=True)
    loss = diffail.temperature_loss(log_alpha, log_prob, -1.5)
    assert loss.item() == pytest.approx(-math.log(0.3) * (expected_log_prob.mean() - 1.5), rel=1e-10)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(-(expected_log_prob.mean() - 1.5), rel=1e-10)
    assert all(parameter.grad is None for parameter in actor.parameters())


def test_polyak_update_is_the_weighted_mean():
    target, source = diffail.TwinCritic(3, 2, 8).double(), diffail.TwinCritic(3, 2, 8).double()
    expected = [0.995 * p.detach().numpy() + 0.005 * q.detach().numpy() for p, q in zip(target.parameters(), source.parameters())]
    diffail.polyak_update(target, source, 0.005)
    for parameter, value in zip(target.parameters(), expected):
        np.testing.assert_allclose(parameter.detach(), value, rtol=1e-12)


def test_gradients_stay_in_the_network_that_learns():
    actor, critic, target, alpha, batch = tiny_sac()
    diffail.critic_loss(critic, target, actor, alpha, *batch).backward()
    assert all(p.grad is None for p in [*target.parameters(), *actor.parameters()])
    assert all(p.grad is not None for p in critic.parameters())
    critic.zero_grad()
    diffail.actor_loss(actor, critic, alpha, batch[0])[0].backward(inputs=list(actor.parameters()))
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.parameters())


def test_replay_buffer_returns_what_was_stored_and_forgets_the_oldest():
    buffer = diffail.ReplayBuffer(4, (2, 1), torch.device("cpu"))
    for i in range(6):
        buffer.add(np.array([i, 10 * i], np.float32), np.array([100.0 * i]))
        assert buffer.size == min(i + 1, 4)
    a, b = buffer.sample(2000)
    assert set(a[:, 0].tolist()) == {2, 3, 4, 5}
    assert torch.equal(a[:, 1], 10 * a[:, 0]) and torch.equal(b[:, 0], 100 * a[:, 0])
    counts = torch.bincount(a[:, 0].long())[2:]
    assert (counts > 400).all()  # uniform: 500 each
