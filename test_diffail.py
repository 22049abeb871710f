"""Tests of the three scripts: mathematics against independent references, behaviour as a user sees it, bad input.

    python -m pytest
"""
import ast
import copy
import csv
import dataclasses
import inspect
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import diffail
import gail_baseline
import sac_baseline

HERE = Path(__file__).parent
SCRIPTS = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("test_"))
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NEEDS_COMPILER = pytest.mark.skipif(not diffail.can_compile(), reason="nothing can be compiled here, see can_compile")
STEPS = 10


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def make_discriminator(dim: int = 5, schedule: str = "linear", form: str = "paper") -> diffail.DiffusionDiscriminator:
    """A discriminator in float64, with the same schedule values."""
    return diffail.DiffusionDiscriminator(dim, 16, STEPS, schedule, form).double()


def reference_prediction(discriminator: diffail.DiffusionDiscriminator, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """eps_phi(x_t, t) written out with torch's own mish, each sample's time embedded by itself."""
    net = discriminator.noise_predictor
    frequencies = [10_000 ** (-i / 7) for i in range(8)]
    rows = [[math.sin(k * f) for f in frequencies] + [math.cos(k * f) for f in frequencies] for k in t.tolist()]
    time_features = net.time_out(F.mish(net.time_in(torch.tensor(rows, dtype=x_t.dtype, device=x_t.device))))
    h = torch.cat([x_t, time_features], dim=1)
    for layer in net.hidden:
        h = F.mish(layer(h))
    return net.out(h)


def reference_l_and_d(discriminator: diffail.DiffusionDiscriminator, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, form: str):
    """L(x, eps, t) and D(x, eps, t), [B] each, from the schedule's formula up."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, STEPS, dtype=torch.float64), 0).to(t.device)[t][:, None]
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    squared_error = (noise - reference_prediction(discriminator, x_t, t)) ** 2
    loss = squared_error.mean(1)
    return loss, torch.exp(-loss) if form == "paper" else torch.exp(-squared_error).mean(1)


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
    embedding = diffail.NoisePredictor(5, 8, 20).time_embedding
    for t in (0, 1, 19):
        for i in range(8):
            angle = t * math.exp(-math.log(10_000) * i / 7)
            assert embedding[t, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert embedding[t, 8 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_mish_and_its_first_two_derivatives_are_torchs():
    def derivatives(function, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        return function(x).detach(), slope.detach(), curvature

    x = torch.cat([torch.linspace(-60, 60, 2001), torch.tensor([-104.0, 0.0, 89.0])])
    for ours, theirs in zip(derivatives(diffail.mish, x.double()), derivatives(F.mish, x.double())):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)
    for ours, theirs in zip(derivatives(diffail.mish, x), derivatives(F.mish, x.double())):
        assert ((ours - theirs).abs() <= 2e-7 * (1 + x.abs())).all()  # a rounding or two of x
    far = derivatives(diffail.mish, torch.tensor([-1e4, 1e4]))  # where torch's own second derivative is not a number
    assert [value.tolist() for value in far] == [[0, 1e4], [0, 1], [0, 0]]


# ---------------------------------------------------------------------------------------------------- discriminator


@pytest.mark.parametrize("form", ["paper", "released"])
def test_discriminator_is_exp_of_minus_the_diffusion_loss_or_the_mean_over_coordinates(form):
    discriminator, x = make_discriminator(form=form), 2 * torch.randn(64, 5).double()
    noise, t = torch.randn(64, 5).double(), torch.randint(STEPS, (64,))
    loss, d = reference_l_and_d(discriminator, x, noise, t, form)
    np.testing.assert_allclose(discriminator.diffusion_loss(x, noise, t).detach(), loss.detach(), rtol=1e-6)
    np.testing.assert_allclose(discriminator(x, noise, t).detach(), d.detach(), rtol=1e-6)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 9.0])
def test_discriminator_stays_in_zero_one_for_extreme_inputs(scale, form):
    discriminator = diffail.DiffusionDiscriminator(5, 16, STEPS, "linear", form)
    nn.init.zeros_(discriminator.noise_predictor.out.weight)  # so the prediction is the bias, and L is known
    noise, t = scale * torch.ones(8, 5), torch.zeros(8, dtype=torch.long)
    nn.init.zeros_(discriminator.noise_predictor.out.bias)
    d = discriminator(1e3 * torch.randn(8, 5), noise, t)
    assert ((d > 0) if form == "paper" else (d >= 0)).all() and (d <= 1).all()
    np.testing.assert_allclose(d.detach(), math.exp(-(scale**2)), rtol=1e-5, atol=1e-7 if form == "released" else 0)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_log_one_minus_d_is_exact_and_its_gradient_finite_over_sixteen_decades(form):
    loss = torch.logspace(-12, 4, 400).requires_grad_()
    value = diffail.log_one_minus_d(loss[:, None].expand(-1, 3), form)  # of three errors alike the two forms are the same
    (grad,) = torch.autograd.grad(value.sum(), loss)
    exact = [math.log(-math.expm1(-v)) for v in loss.double().tolist()]
    exact_grad = [1 / math.expm1(v) if v < 700 else 0.0 for v in loss.double().tolist()]
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()
    np.testing.assert_allclose(value.detach(), exact, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-4, atol=1e-6)
    zero = torch.zeros(1, requires_grad=True)
    at_zero = diffail.log_one_minus_d(zero, form)
    assert torch.isfinite(torch.autograd.grad(at_zero, zero)[0]).all() and math.isfinite(at_zero.item()) and at_zero.item() < -60


@pytest.mark.parametrize("form", ["paper", "released"])
def test_discriminator_loss_is_the_binary_cross_entropy_of_d_and_for_the_expert_its_bound(form):
    discriminator = make_discriminator(form=form)
    expert, policy, noise = torch.randn(32, 5).double(), 2 * torch.randn(32, 5).double(), torch.randn(64, 5).double()
    t = torch.randint(STEPS, (64,))
    expert_loss, policy_loss = discriminator.adversarial_loss(expert, policy, noise, t)
    loss, d_expert = reference_l_and_d(discriminator, expert, noise[:32], t[:32], form)
    _, d_policy = reference_l_and_d(discriminator, policy, noise[32:], t[32:], form)
    entropy = F.binary_cross_entropy(d_expert, torch.ones_like(d_expert)).item()
    assert expert_loss.item() == pytest.approx(loss.mean().item(), rel=1e-6)
    assert entropy == pytest.approx(expert_loss.item(), rel=1e-6) if form == "paper" else entropy < 0.99 * expert_loss.item()
    assert policy_loss.item() == pytest.approx(F.binary_cross_entropy(d_policy, torch.zeros_like(d_policy)).item(), rel=1e-6)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gradient_penalty_and_its_parameter_gradient(form):
    discriminator = make_discriminator(form=form)
    for parameter in discriminator.parameters():
        parameter.data.mul_(2)  # away from the flat start, so that every term counts
    expert, policy, mix = torch.randn(16, 5).double(), torch.randn(16, 5).double(), torch.rand(16, 1).double()
    noise, t = torch.randn(16, 5).double(), torch.randint(STEPS, (16,))
    penalty = discriminator.gradient_penalty(expert, policy, mix, noise, t)
    gradients = torch.autograd.grad(penalty, list(discriminator.parameters()), allow_unused=True)

    x = (mix * expert + (1 - mix) * policy).requires_grad_()
    (grad_x,) = torch.autograd.grad(reference_l_and_d(discriminator, x, noise, t, form)[1].sum(), x, create_graph=True)
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
            values.append(discriminator.gradient_penalty(expert, policy, mix, noise, t).item())
            parameter.data.sub_(direction, alpha=sign * h)
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_surrogate_reward_is_that_of_a_plain_loop_over_t(form):
    discriminator, x, noise = make_discriminator(), 2 * torch.randn(12, 5).double(), torch.randn(STEPS, 12, 5).double()
    rewards = discriminator.surrogate_reward(x, noise, form)
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
    rewards = discriminator.surrogate_reward(torch.zeros(200, 1), noise, form)
    assert torch.isfinite(rewards).all() and (rewards > 0).all()
    assert (rewards.diff() < 0).all()
    far = discriminator.surrogate_reward(torch.zeros(1, 1), torch.full((STEPS, 1, 1), 1e3), form)
    exact = discriminator.surrogate_reward(torch.zeros(1, 1), torch.zeros(STEPS, 1, 1), form)
    assert far.item() == 0 and math.isfinite(exact.item()) and exact.item() > 60


def train_discriminator(expert: torch.Tensor, policy: torch.Tensor, updates: int = 1500) -> diffail.DiffusionDiscriminator:
    discriminator = diffail.DiffusionDiscriminator(expert.shape[1], 64, STEPS, "linear")
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    for _ in range(updates):
        e, p = (data[torch.randint(len(data), (128,))] for data in (expert, policy))
        expert_loss, policy_loss = discriminator.adversarial_loss(e, p, *discriminator.sample_noise_and_t(256, e.shape[1]))
        penalty = discriminator.gradient_penalty(e, p, torch.rand(128, 1), *discriminator.sample_noise_and_t(128, e.shape[1]))
        optimizer.zero_grad()
        (expert_loss + policy_loss + 0.1 * penalty).backward()
        optimizer.step()
    return discriminator


def area_under_roc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    return (positive[:, None] > negative[None]).double().mean().item()


def test_discriminator_separates_expert_from_random_on_held_out_data_and_not_two_identical_sets():
    demos, _ = diffail.load_demonstrations(HERE / "demos" / "HalfCheetah-v4.npz", "HalfCheetah-v4", 8, diffail.make_env("HalfCheetah-v4"))
    expert = torch.from_numpy(np.concatenate([demos["observations"], demos["next_observations"]], 1))
    env = diffail.make_env("HalfCheetah-v4")
    observation, _ = env.reset(seed=0)
    pairs, rng = [], np.random.default_rng(0)
    for i in range(4000):
        following, _, _, truncated, _ = env.step(rng.uniform(-1, 1, 6).astype(np.float32))
        pairs.append(np.concatenate([observation, following]))
        observation = env.reset(seed=i)[0] if truncated else following
    random = torch.from_numpy(np.array(pairs))

    def score(discriminator, x):
        return discriminator.surrogate_reward(x, torch.randn(STEPS, *x.shape), "paper")

    discriminator = train_discriminator(expert[:4000], random[:2000])
    assert area_under_roc(score(discriminator, expert[4000:6000]), score(discriminator, random[2000:])) >= 0.95
    same = train_discriminator(expert[:4000], expert[:4000])
    assert area_under_roc(score(same, expert[4000:6000]), score(same, expert[6000:8000])) == pytest.approx(0.5, abs=0.05)


# -------------------------------------------------------------------------------------------------------------- GAIL


def test_gails_objective_and_rewards_are_those_of_its_sigmoid():
    discriminator = gail_baseline.MLPDiscriminator(5, 8).double()
    discriminator.net[-1].weight.data.mul_(30)
    expert, policy = torch.randn(64, 5).double(), 2 * torch.randn(64, 5).double()
    d_expert, d_policy = (torch.sigmoid(discriminator.net(x).clamp(-10, 10)).squeeze(1) for x in (expert, policy))
    assert (discriminator.net(expert).abs() > 10).any() and discriminator(expert).abs().max() == 10
    expert_loss, policy_loss = discriminator.adversarial_loss(expert, policy)
    assert expert_loss.item() == pytest.approx(F.binary_cross_entropy(d_expert, torch.ones_like(d_expert)).item(), rel=1e-9)
    assert policy_loss.item() == pytest.approx(F.binary_cross_entropy(d_policy, torch.zeros_like(d_policy)).item(), rel=1e-9)
    for form, expected in (("released", d_policy.log()), ("paper", -(1 - d_policy).log())):
        rewards = discriminator.surrogate_reward(policy, form)
        np.testing.assert_allclose(rewards, expected.detach(), rtol=1e-9)
        assert not rewards.requires_grad


def test_gails_gradient_penalty_is_that_of_finite_differences():
    discriminator = gail_baseline.MLPDiscriminator(5, 8).double()
    expert, policy, mix = torch.randn(16, 5).double(), torch.randn(16, 5).double(), torch.rand(16, 1).double()
    x, h = mix * expert + (1 - mix) * policy, 1e-5

    def penalty():
        columns = [(discriminator(x + h * e) - discriminator(x - h * e)) / (2 * h) for e in torch.eye(5).double()]
        return ((torch.stack(columns, 1).norm(dim=1) - 1) ** 2).mean()

    ours, expected = discriminator.gradient_penalty(expert, policy, mix), penalty()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = [p for name, p in discriminator.named_parameters() if name != "net.4.bias"]  # a constant has no gradient in x
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9)


def test_one_gail_update_is_the_plain_one():
    args = gail_baseline.Args(alpha=0.02, grad_penalty=4.0, hidden_dim=8, batch_size=32, discriminator_lr=1e-3)
    agent = gail_baseline.GAIL(3, 2, args, torch.device("cpu"))
    expert, policy, wide = torch.randn(32, 5), torch.randn(32, 5), copy.deepcopy(agent.discriminator)
    rng = torch.get_rng_state()
    losses = agent.descend(agent.discriminator_optimizer, agent.discriminator_loss, expert, policy)
    torch.set_rng_state(rng)
    logits, targets = wide(torch.cat([expert, policy])), torch.cat([torch.ones(32), torch.zeros(32)])
    penalty = wide.gradient_penalty(expert, policy, torch.rand(32, 1))
    total = F.binary_cross_entropy_with_logits(logits, targets) + 4 * penalty
    gradients = torch.autograd.grad(total, list(wide.parameters()), allow_unused=True)
    for before, after, gradient in zip(wide.parameters(), agent.discriminator.parameters(), gradients):
        np.testing.assert_allclose(after.grad, gradient, rtol=1e-4, atol=1e-7)
        expected = before - 1e-3 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
        np.testing.assert_allclose(after.detach(), expected.detach(), rtol=0, atol=2e-5)
    assert losses["grad_penalty"].item() == pytest.approx(penalty.item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- SAC


@pytest.mark.parametrize("agent_class", [diffail.DiffAIL, gail_baseline.GAIL])
def test_networks_begin_as_pytorch_does_and_the_targets_as_the_critics(agent_class):
    script = sys.modules[agent_class.__module__]
    agent = agent_class(17, 6, script.Args(alpha=0.02, grad_penalty=0.1, hidden_dim=8), torch.device("cpu"))
    assert agent.actor.net[0].weight.abs().max().item() == pytest.approx(1 / math.sqrt(17), rel=0.01)
    assert not torch.equal(agent.critic.q1[0].weight, agent.critic.q2[0].weight)
    assert all(torch.equal(*pair) for pair in zip(agent.critic.parameters(), agent.target_critic.parameters()))


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
    torch.manual_seed(1)
    np.testing.assert_array_equal(actor.act(observations), actions.detach())
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
    agent = diffail.DiffAIL(3, 2, diffail.Args(alpha=0.3, autotune=True, hidden_dim=8, sac_hidden_dim=8), torch.device("cpu"))
    agent.target_critic = diffail.TwinCritic(3, 2, 8)
    agent.double().log_alpha.data.fill_(math.log(0.3))
    batch = torch.randn(7, 3), torch.rand(7, 2) * 2 - 1, torch.randn(7, 3), torch.randn(7), torch.tensor([0.9, 0, 0.9, 0.9, 0, 0.9, 0.9])
    return agent, agent.actor, agent.critic, agent.target_critic, [part.double() for part in batch]


def test_critic_loss_is_the_hand_written_one():
    agent, actor, critic, target, (s, a, s_next, rewards, discount) = tiny_sac()
    torch.manual_seed(5)
    loss, losses = agent.critic_loss(s, a, s_next, rewards, discount)
    torch.manual_seed(5)
    noise = torch.randn(7, 2, dtype=torch.float64).numpy()
    a_next, log_prob = numpy_sample(actor, s_next.numpy(), noise)
    x_next, x = np.concatenate([s_next, a_next], 1), np.concatenate([s, a], 1)
    value = np.minimum(numpy_mlp(target.q1, x_next), numpy_mlp(target.q2, x_next))[:, 0] - 0.3 * log_prob
    y = rewards.numpy() + discount.numpy() * value
    expected = sum(0.5 * np.mean((numpy_mlp(q, x)[:, 0] - y) ** 2) for q in (critic.q1, critic.q2))
    assert loss.item() == losses["qf_loss"].item() == pytest.approx(expected, rel=1e-10)


def test_actor_loss_is_the_hand_written_one():
    agent, actor, critic, _, (s, *_) = tiny_sac()
    torch.manual_seed(5)
    loss, losses = agent.actor_loss(s)
    torch.manual_seed(5)
    noise = torch.randn(7, 2, dtype=torch.float64).numpy()
    actions, log_prob = numpy_sample(actor, s.numpy(), noise)
    x = np.concatenate([s, actions], 1)
    q = np.minimum(numpy_mlp(critic.q1, x), numpy_mlp(critic.q2, x))[:, 0]
    mean, log_std = np.split(numpy_mlp(actor.net, s.numpy()), 2, axis=1)
    expected = np.mean(0.3 * log_prob - q)
    assert losses["actor_loss"].item() == pytest.approx(expected, rel=1e-10)
    assert losses["entropy"].item() == pytest.approx(-log_prob.mean(), rel=1e-10)
    expected += 1e-3 * (np.mean(mean**2) + np.mean(log_std**2)) - math.log(0.3) * (log_prob.mean() - 1)  # -0.5 for each of two dimensions
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    gradient, *tuned = torch.autograd.grad(loss, [agent.log_alpha, *actor.parameters()])
    assert gradient.item() == pytest.approx(-(log_prob.mean() - 1), rel=1e-10)
    agent.args.autotune = False
    torch.manual_seed(5)
    untuned = torch.autograd.grad(agent.actor_loss(s)[0], list(actor.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(tuned, untuned))  # the temperature's loss is none of the actor's


def test_polyak_update_is_the_weighted_mean():
    target, source = diffail.TwinCritic(3, 2, 8).double(), diffail.TwinCritic(3, 2, 8).double()
    expected = [0.995 * p.detach().numpy() + 0.005 * q.detach().numpy() for p, q in zip(target.parameters(), source.parameters())]
    diffail.polyak_update(target, source, 0.005)
    for parameter, value in zip(target.parameters(), expected):
        np.testing.assert_allclose(parameter.detach(), value, rtol=1e-12)


def test_gradients_stay_in_the_network_that_learns():
    agent, actor, critic, target, batch = tiny_sac()
    agent.critic_loss(*batch)[0].backward()
    assert all(p.grad is None for p in [*target.parameters(), *actor.parameters(), agent.log_alpha])
    assert all(p.grad is not None for p in critic.parameters())
    critic.zero_grad()
    agent.actor_loss(batch[0])[0].backward(inputs=list(actor.parameters()))
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.parameters())


def test_replay_buffer_returns_what_was_stored_and_forgets_the_oldest():
    buffer = diffail.ReplayBuffer(4, (2, 1), torch.device("cpu"))
    for i in range(6):
        buffer.add(np.array([i, 10 * i], np.float32), np.array([100.0 * i]))
        for window in (None, 1, 2, 3, 9):
            a, b = buffer.sample(2000, window)
            assert torch.equal(a[:, 1], 10 * a[:, 0]) and torch.equal(b[:, 0], 100 * a[:, 0])
            oldest = max(0, i + 1 - min(window or 4, 4))
            counts = torch.bincount(a[:, 0].long())
            assert len(counts) == i + 1 and not counts[:oldest].any()
            assert (counts[oldest:] > 0.8 * 2000 / (i + 1 - oldest)).all()  # uniform


# ------------------------------------------------------------------------------------------------ one whole update


def plain_update(agent: diffail.DiffAIL, expert_x: torch.Tensor, buffer: diffail.ReplayBuffer) -> tuple[dict, dict]:
    """DiffAIL.update with nothing optimised: one network pass per diffusion step, autograd through its own gradient, torch's mish, plain
    Adam by its formula. In float64, from the same draws in the same order. Returns the losses and {name: (gradient, updated parameter)}."""
    args, device, wide = agent.args, expert_x.device, copy.deepcopy(agent).double()
    batch, d = args.batch_size, expert_x.shape[1]

    def randn(*shape):
        return torch.randn(*shape, device=device).double()

    def sample(window=None):
        o, a, o_next = (part.double() for part in buffer.sample(batch, window))
        return o, a, o_next, torch.cat([o, o_next if args.state_only else a], 1)

    def adam(optimizer, names, loss):
        parameters = [dict(wide.named_parameters())[name] for name in names]
        for name, parameter, grad in zip(names, parameters, torch.autograd.grad(loss, parameters)):
            group, state = optimizer.param_groups[0], optimizer.state[dict(agent.named_parameters())[name]]
            (beta1, beta2), step = group["betas"], int(state.get("step", 0)) + 1
            m = beta1 * state.get("exp_avg", torch.zeros_like(grad)).double() + (1 - beta1) * grad
            v = beta2 * state.get("exp_avg_sq", torch.zeros_like(grad)).double() + (1 - beta2) * grad**2
            parameter.data -= group["lr"] * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
            updated[name] = grad, parameter.detach().clone()

    def network(module):
        return [f"{module}.{name}" for name, _ in getattr(wide, module).named_parameters()]

    losses, updated = {}, {}
    o, a, o_next, x = sample()
    noise = randn(STEPS, batch, d)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, STEPS, dtype=torch.float64), 0)
    likeness = []
    for t in range(STEPS):
        x_t = alpha_bar[t].sqrt() * x + (1 - alpha_bar[t]).sqrt() * noise[t]
        squared_error = (noise[t] - reference_prediction(wide.discriminator, x_t, torch.full((batch,), t, device=device))) ** 2
        likeness.append(squared_error.mean(1) if args.reward_form == "paper" else torch.exp(-squared_error).mean(1))
    likeness = torch.stack(likeness).mean(0)
    rewards = -args.reward_scale * (1 - (torch.exp(-likeness) if args.reward_form == "paper" else likeness)).log().detach()
    losses["surrogate_reward"], losses["alpha"] = rewards.mean(), wide.log_alpha.exp().detach()

    expert = expert_x[torch.randint(len(expert_x), (batch,), device=device)].double()
    policy = sample(args.discriminator_window)[3]
    noise, t = randn(2 * batch, d), torch.randint(STEPS, (2 * batch,), device=device)
    form = args.reward_form if args.objective_form == "reward" else "paper"
    expert_loss, _ = reference_l_and_d(wide.discriminator, expert, noise[:batch], t[:batch], form)
    _, d_policy = reference_l_and_d(wide.discriminator, policy, noise[batch:], t[batch:], form)
    losses["disc_expert_loss"], losses["disc_policy_loss"] = expert_loss.mean(), -(1 - d_policy).log().mean()
    mix = torch.rand(batch, 1, device=device).double()
    x = (mix * expert + (1 - mix) * policy).requires_grad_()
    _, d_mixed = reference_l_and_d(wide.discriminator, x, randn(batch, d), torch.randint(STEPS, (batch,), device=device), form)
    losses["grad_penalty"] = ((torch.autograd.grad(d_mixed.sum(), x, create_graph=True)[0].norm(dim=1) - 1) ** 2).mean()
    total = losses["disc_expert_loss"] + losses["disc_policy_loss"] + args.grad_penalty * losses["grad_penalty"]
    adam(agent.discriminator_optimizer, network("discriminator"), total)

    def act(observations):
        mean, log_std = wide.actor(observations)
        policy = Independent(Normal(mean, log_std.exp()), 1)
        u = mean + log_std.exp() * randn(*mean.shape)
        return u.tanh(), policy.log_prob(u) - (1 - u.tanh() ** 2).log().sum(1), mean, log_std

    a_next, log_prob, _, _ = act(o_next)
    value = torch.min(*wide.target_critic(o_next, a_next)) - losses["alpha"] * log_prob
    losses["qf_loss"] = sum(0.5 * ((q - (rewards + args.gamma * value).detach()) ** 2).mean() for q in wide.critic(o, a))
    adam(agent.critic_optimizer, network("critic"), losses["qf_loss"])

    a_new, log_prob, mean, log_std = act(o)
    losses["actor_loss"] = (losses["alpha"] * log_prob - torch.min(*wide.critic(o, a_new))).mean()
    losses["entropy"] = -log_prob.mean()
    regularizer = args.actor_regularizer * ((mean**2).mean() + (log_std**2).mean())
    adam(agent.actor_optimizer, network("actor"), losses["actor_loss"] + regularizer)
    if args.autotune:
        adam(agent.actor_optimizer, ["log_alpha"], -wide.log_alpha * (log_prob.detach().mean() + agent.target_entropy))
    else:
        updated["log_alpha"] = None, wide.log_alpha
    for name, parameter in wide.target_critic.named_parameters():
        updated[f"target_critic.{name}"] = None, (1 - args.tau) * parameter + args.tau * dict(wide.critic.named_parameters())[name]
    return losses, updated


@pytest.mark.parametrize("script", [diffail, gail_baseline, sac_baseline], ids=lambda script: script.__name__)
def test_gradients_may_come_in_any_layout(script):
    """As compiled ones do on a GPU, where matrices are padded; the fused Adam goes by the layout of the parameters."""
    kind = {diffail: "DiffAIL", gail_baseline: "GAIL", sac_baseline: "SAC"}[script]
    extra = {} if script is sac_baseline else {"alpha": 0.1}
    agents = [getattr(script, kind)(5, 2, script.Args(compile=False, sac_hidden_dim=8, **extra), torch.device("cpu")) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    observations = torch.randn(16, 5)
    for agent, rows in zip(agents, (0, 3)):

        def padded(*arguments, rows=rows):
            grads, losses = script.gradients(*arguments)
            return [F.pad(grad, (0, rows))[..., : grad.shape[-1]] if grad.dim() else grad for grad in grads], losses

        agent.gradients = padded
        torch.manual_seed(0)
        agent.descend(agent.actor_optimizer, agent.actor_loss, observations)
    for (name, expected), ours in zip(agents[0].actor.named_parameters(), agents[1].actor.parameters()):
        np.testing.assert_array_equal(ours.detach(), expected.detach(), err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "state_only, objective, form, autotune, compiled",
    [
        (False, "reward", "paper", True, False),
        (True, "paper", "released", False, False),
        (False, "reward", "released", False, False),
        pytest.param(True, "paper", "released", True, True, marks=NEEDS_COMPILER),
        pytest.param(False, "reward", "released", True, True, marks=NEEDS_COMPILER),
    ],
)
def test_an_update_is_that_of_the_plain_algorithm(state_only, objective, form, autotune, compiled, device):
    device, sizes = torch.device(device), dict(hidden_dim=32, sac_hidden_dim=32, batch_size=64)
    others = dict(alpha=0.05, grad_penalty=0.1, discriminator_window=50, objective_form=objective)
    args = diffail.Args(state_only=state_only, reward_form=form, autotune=autotune, compile=compiled, **others, **sizes)
    agent = diffail.DiffAIL(5, 2, args, device)
    for parameter in agent.target_critic.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # away from the critics, so that the step towards them shows
    buffer = diffail.ReplayBuffer(500, (5, 2, 5), device)

    def add():
        buffer.add(*(np.tanh(np.random.default_rng(buffer.position).normal(size=n)) for n in (5, 2, 5)))

    for _ in range(300):
        add()
    expert_x = torch.randn(100, 10 if state_only else 7, device=device)
    update = partial(agent.update, expert_x, buffer)
    if device.type == "cuda":  # the first three as they are, from the fourth on by the graph
        update = partial(next, diffail.graphed(update))
    for _ in range(5):
        add()  # so that the last transitions, which are the discriminator's, are others each time
        rng = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
        losses, updated = plain_update(agent, expert_x, buffer)
        (torch.set_rng_state if device.type == "cpu" else torch.cuda.set_rng_state)(rng)
        ours = update()
        assert set(ours) == set(losses)
        for name, value in losses.items():
            assert ours[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
        for name, parameter in agent.named_parameters():
            gradient, expected = updated[name]
            np.testing.assert_allclose(parameter.detach().cpu(), expected.detach().cpu(), rtol=0, atol=2e-5, err_msg=name)
            if gradient is not None:
                largest = gradient.abs().max().item()
                np.testing.assert_allclose(parameter.grad.cpu(), gradient.cpu(), rtol=1e-4, atol=1e-5 * largest + 1e-9, err_msg=name)


@pytest.mark.parametrize("script", [diffail, gail_baseline], ids=lambda script: script.__name__)
def test_the_window_is_the_discriminators_alone(script):
    kind = script.DiffAIL if script is diffail else script.GAIL
    args = script.Args(discriminator_window=50, batch_size=512, alpha=0.05, grad_penalty=0.1, compile=False)
    agent = kind(5, 2, args, torch.device("cpu"))
    buffer, seen = script.ReplayBuffer(200, (5, 2, 5), torch.device("cpu")), {}
    for i in range(300):
        buffer.add(np.full(5, i), np.zeros(2), np.full(5, i))
    original = agent.discriminator_loss, agent.critic_loss
    agent.discriminator_loss = lambda expert, policy: seen.update(discriminator=policy) or original[0](expert, policy)
    agent.critic_loss = lambda *batch: seen.update(critic=batch[0]) or original[1](*batch)
    agent.update(torch.randn(100, 7), buffer)
    assert seen["discriminator"][:, 0].min() >= 250 and seen["discriminator"][:, 0].max() > 290
    assert seen["critic"][:, 0].min() < 150 and seen["critic"][:, 0].max() > 250


@NEEDS_COMPILER
@pytest.mark.parametrize("script", [gail_baseline, sac_baseline], ids=lambda script: script.__name__)
def test_a_compiled_update_is_the_uncompiled_one(script):
    """From the same random numbers. DiffAIL's is held to the plain algorithm above."""
    kind, extra = (gail_baseline.GAIL, dict(alpha=0.05, grad_penalty=4.0)) if script is gail_baseline else (sac_baseline.SAC, {})
    agents, buffer = [], script.ReplayBuffer(500, (5, 2, 5) if script is gail_baseline else (5, 2, 5, 1, 1), torch.device("cpu"))
    buffer.rows.uniform_(0, 1)
    buffer.added.fill_(500)
    learner = [torch.rand(100, 7)] if script is gail_baseline else []
    for compiled in (False, True):
        torch.manual_seed(0)
        agents.append(kind(5, 2, script.Args(compile=compiled, sac_hidden_dim=32, batch_size=64, **extra), torch.device("cpu")))
        losses = [agents[-1].update(*learner, buffer) for _ in range(3)]
    for (name, plain), compiled in zip(agents[0].named_parameters(), agents[1].parameters()):
        np.testing.assert_allclose(compiled.detach(), plain.detach(), rtol=0, atol=2e-5, err_msg=name)
    assert agents[1].gradients is not script.gradients and losses[-1]["qf_loss"] > 0


# ---------------------------------------------------------------------------------------------------- training loops


class Corridor(gym.Env):
    """Five steps to the end: even episodes terminate there, odd ones are truncated. Observation: [position, episode parity]."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(np.array([-3.0], np.float32), np.array([1.0], np.float32))
    episode, actions = -1, ()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.position = self.episode + 1, 0
        return self.observation(), {}

    def observation(self):
        return np.array([self.position, self.episode % 2], np.float32)

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        Corridor.actions = (*Corridor.actions, float(action[0]))
        self.position += 1
        end, odd = self.position == 5, self.episode % 2 == 1
        return self.observation(), 7.0, end and not odd, end and odd, {}


class Fall(Corridor):
    """Terminates from the third step on, which a time limit of six steps does not know of."""

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, self.position >= 3, False, {}


def spaces_only(observation_space: gym.Space, action_space: gym.Space) -> type[gym.Env]:
    return type("SpacesOnly", (gym.Env,), {"observation_space": observation_space, "action_space": action_space})


gym.register("Corridor-v0", entry_point=Corridor)
gym.register("Fall-v0", entry_point=Fall, max_episode_steps=6)
BOX = gym.spaces.Box(-1, 1, (2,))
gym.register("Dict-v0", entry_point=spaces_only(gym.spaces.Dict(position=BOX), BOX))
gym.register("Image-v0", entry_point=spaces_only(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX))
gym.register("Unbounded-v0", entry_point=spaces_only(BOX, gym.spaces.Box(-np.inf, np.inf, (2,))))
gym.register("Whole-v0", entry_point=spaces_only(BOX, gym.spaces.Box(0, 5, (2,), np.int64)))
SMALL = dict(env_id="Corridor-v0", learning_starts=20, batch_size=64, buffer_size=500, sac_hidden_dim=8, eval_every=50, eval_episodes=2)
SMALL |= dict(device="cpu", threads=1, compile=False)  # with two, networks this small would but wait, on a busy machine for long
IMITATION = SMALL | dict(hidden_dim=8, cut_probability=1.0)


def corridor_demos(path: Path, episodes: int = 3, env_id: str = "Corridor-v0") -> Path:
    """A demonstration file for Corridor-v0, written with numpy alone."""
    n = 5 * episodes
    position = np.tile(np.arange(5), episodes)
    parity = np.repeat(np.arange(episodes) % 2, 5)
    arrays = dict(
        observations=np.stack([position, parity], 1).astype(np.float32),
        next_observations=np.stack([position + 1, parity], 1).astype(np.float32),
        actions=np.linspace(-3, 1, n, dtype=np.float32)[:, None],
        rewards=np.full(n, 7, np.float32),
        terminations=(position == 4) & (parity == 0),
        truncations=(position == 4) & (parity == 1),
        metadata=json.dumps({"env_id": env_id, "returns": [35.0] * episodes}),
    )
    np.savez(path, **arrays)
    return path


def spy_on_critic_loss(script, monkeypatch) -> list:
    kind = next(getattr(script, name) for name in ("DiffAIL", "GAIL", "SAC") if hasattr(script, name))
    calls, original = [], kind.critic_loss
    monkeypatch.setattr(kind, "critic_loss", lambda agent, *batch: calls.append(batch) or original(agent, *batch))
    return calls


def test_sac_bootstraps_through_truncations_and_not_through_terminations(tmp_path, monkeypatch):
    calls = spy_on_critic_loss(sac_baseline, monkeypatch)
    sac_baseline.main(sac_baseline.Args(**SMALL, total_timesteps=100, output_dir=tmp_path))
    seen = set()
    for *_, next_observations, rewards, discount in calls:
        terminated = (next_observations[:, 0] == 5) & (next_observations[:, 1] == 0)
        assert torch.equal(discount, 0.99 * (1 - terminated.float()))
        assert (rewards == 7).all()
        seen |= {tuple(row) for row in next_observations.int().tolist()}
    assert {(5, 0), (5, 1)} <= seen  # both kinds of end were in the batches


@pytest.mark.parametrize("script", [diffail, gail_baseline])
def test_imitation_bootstraps_through_every_end_and_never_sees_the_reward(script, tmp_path, monkeypatch):
    calls = spy_on_critic_loss(script, monkeypatch)
    args = dict(**IMITATION, total_timesteps=100, demos=corridor_demos(tmp_path / "demos.npz"), output_dir=tmp_path)
    script.main(script.Args(**args))
    assert len(calls) == 80
    for *_, next_observations, rewards, discount in list(calls):
        assert discount == 0.99  # a number: the same after terminations, truncations and all else
        assert (next_observations[:, 0] <= 5).all() and not (rewards == 7).any()
    surrogate_rewards = [call[3] for call in calls]
    evaluations = (tmp_path / f"Corridor-v0__{script.__name__}__state-action__1traj__s1" / "evaluations.csv").read_text()
    step = Corridor.step
    monkeypatch.setattr(Corridor, "step", lambda self, action: (lambda o, r, *rest: (o, -9.0, *rest))(*step(self, action)))
    again = spy_on_critic_loss(script, monkeypatch)
    script.main(script.Args(**args | {"output_dir": tmp_path / "other-reward"}))
    assert all(torch.equal(a, b[3]) for a, b in zip(surrogate_rewards, again))  # another true reward, the same surrogate rewards
    assert "35.000" in evaluations and "-45.000" in next((tmp_path / "other-reward").glob("*/evaluations.csv")).read_text()


@pytest.mark.parametrize("script", [diffail, gail_baseline])
@pytest.mark.parametrize("probability, last", [(1.0, 3), (0.0, 6)])
def test_training_goes_on_after_a_fall_for_no_step_or_until_the_time_limit(script, probability, last, tmp_path):
    args = IMITATION | dict(env_id="Fall-v0", total_timesteps=120, demos=corridor_demos(tmp_path / "demos.npz", env_id="Fall-v0"))
    script.main(script.Args(**args | {"cut_probability": probability}, output_dir=tmp_path / "runs"))
    (run_dir,) = (tmp_path / "runs").iterdir()
    positions = torch.load(run_dir / "checkpoint.pt", weights_only=True)["rows"][:, 3]  # of [observation, action, next_observation]
    assert torch.equal(positions, (torch.arange(120) % last + 1).float())
    events = EventAccumulator(str(run_dir)).Reload()
    for tag, value in {"charts/episodic_return": 21, "charts/episodic_length": 3}.items():  # up to the fall
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == list(range(last, 121, last)) and {scalar.value for scalar in scalars} == {value}
    with open(run_dir / "evaluations.csv", newline="") as file:
        assert {row["mean_length"] for row in csv.DictReader(file)} == {"3.000"}  # evaluations end where the task does


@pytest.mark.parametrize("script", [diffail, gail_baseline])
def test_after_a_fall_training_is_cut_in_each_step_with_the_same_probability(script, tmp_path):
    args = IMITATION | dict(env_id="Fall-v0", demos=corridor_demos(tmp_path / "demos.npz", env_id="Fall-v0"), cut_probability=0.4)
    args |= dict(total_timesteps=8_000, learning_starts=7_990, buffer_size=8_000, eval_every=8_000, output_dir=tmp_path / "runs")
    script.main(script.Args(**args))
    (path,) = (tmp_path / "runs").glob("*/checkpoint.pt")
    positions = torch.load(path, weights_only=True)["rows"][:, 3].int()
    lengths = positions[:-1][positions[1:] == 1]  # 3, where it is cut at the fall, to 6, the time limit
    shares = [(lengths == length).float().mean().item() for length in (3, 4, 5, 6)]
    assert len(lengths) > 1_500 and shares == pytest.approx([0.4, 0.24, 0.144, 0.216], abs=0.05)  # four standard errors


def test_actions_are_scaled_to_the_bounds_and_back(tmp_path):
    env = diffail.make_env("Corridor-v0")
    env.reset(seed=0)
    for action, expected in ((-1.0, -3.0), (0.0, -1.0), (1.0, 1.0)):
        env.step(np.array([action], np.float32))
        assert Corridor.actions[-1] == pytest.approx(expected)
    actor = diffail.Actor(2, 1, 8)
    episode = diffail.play_episode(actor, env, seed=0)
    actions = torch.tanh(actor(torch.from_numpy(episode["observations"]))[0]).detach().numpy()
    np.testing.assert_allclose(episode["actions"], actions, rtol=1e-5)
    np.testing.assert_allclose(Corridor.actions[-5:], 2 * actions[:, 0] - 1, rtol=1e-5)


@pytest.mark.parametrize("state_only", [False, True])
@pytest.mark.parametrize("script", [diffail, gail_baseline])
def test_the_correlation_is_that_of_the_episodes_surrogate_and_true_returns(script, state_only):
    agent_class = diffail.DiffAIL if script is diffail else gail_baseline.GAIL
    agent = agent_class(2, 1, script.Args(alpha=0.1, hidden_dim=8, sac_hidden_dim=8, state_only=state_only), torch.device("cpu"))
    generator = np.random.default_rng(0)
    shapes = {"observations": 2, "actions": 1, "next_observations": 2}
    episodes = [{name: generator.normal(size=(n, width)).astype(np.float32) for name, width in shapes.items()} for n in (4, 9, 6, 7)]
    returns, surrogate_returns = [3.0, -1.0, 2.5, 8.0], []
    for episode, value in zip(episodes, returns):
        n = len(episode["actions"])
        episode["rewards"] = np.full(n, value / n)
        x = torch.from_numpy(np.concatenate([episode["observations"], episode["next_observations" if state_only else "actions"]], 1))
        if script is diffail:
            noise = torch.randn(10, *x.shape, generator=torch.Generator().manual_seed(0))
            surrogate_returns.append(2 * agent.discriminator.surrogate_reward(x, noise, "released").sum().item())
        else:
            surrogate_returns.append(2 * F.logsigmoid(agent.discriminator(x)).sum().item())
    rng = torch.get_rng_state()
    compared = script.compare_rewards(episodes, agent.surrogate_return)
    assert torch.equal(rng, torch.get_rng_state())  # the run goes on as it would without
    assert compared["mean_surrogate_return"] == pytest.approx(np.mean(surrogate_returns), rel=1e-5)
    assert compared["reward_correlation"] == pytest.approx(np.corrcoef(surrogate_returns, returns)[0, 1], rel=1e-4)
    assert math.isnan(script.compare_rewards(episodes[:1], agent.surrogate_return)["reward_correlation"])
    for episode in episodes:  # ten episodes of one length and return, whose mean is not exactly that return
        episode["rewards"] = np.array([0.1])
    assert math.isnan(script.compare_rewards(episodes * 3, lambda episode: len(episode["actions"]))["reward_correlation"])
    for i, episode in enumerate(episodes):
        episode["rewards"] = np.array([float(i)])
    assert math.isnan(script.compare_rewards(episodes * 3, lambda _: 0.1)["reward_correlation"])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("state_only", [False, True])
def test_what_the_discriminator_gets(state_only, normalize, tmp_path, monkeypatch):
    path = corridor_demos(tmp_path / "demos.npz", episodes=3)
    calls, original = [], diffail.DiffusionDiscriminator.adversarial_loss
    monkeypatch.setattr(diffail.DiffusionDiscriminator, "adversarial_loss", lambda *args: calls.append(args) or original(*args))
    args = dict(**IMITATION, demos=path, num_trajectories=2, state_only=state_only, normalize=normalize)
    diffail.main(diffail.Args(**args, total_timesteps=70, output_dir=tmp_path))
    with np.load(path) as file:
        data = {name: file[name][:10] for name in ("observations", "actions", "next_observations")}  # of two episodes, not three
    a = (data["actions"] - -3) / (1 - -3) * 2 - 1
    expected = np.concatenate([data["observations"], data["next_observations"] if state_only else a], 1)
    mean, scale = (expected.mean(0), 2 * expected.std(0, ddof=1)) if normalize else (0, 1)  # to a standard deviation of 0.5
    expected = (expected - mean) / scale
    found = np.concatenate([expert.numpy() for _, expert, *_ in calls])
    assert {tuple(row) for row in found.round(3).tolist()} == {tuple(row) for row in expected.round(3).tolist()}
    for _, _, policy, noise, t in calls:
        x = policy.numpy() * scale + mean
        assert set(x[:, 0].round().astype(int).tolist()) <= set(range(5))
        if state_only:
            np.testing.assert_allclose(x[:, 2], x[:, 0] + 1, atol=1e-4)
        else:
            assert (np.abs(x[:, 2]) <= 1 + 1e-6).all()
        assert noise.shape == (128, policy.shape[1]) and set(t.tolist()) <= set(range(10))


def test_a_coordinate_that_never_moves_is_only_centred(tmp_path):
    args = dict(**IMITATION, demos=corridor_demos(tmp_path / "d.npz"), state_only=True, normalize=True)
    diffail.main(diffail.Args(**args, total_timesteps=70, output_dir=tmp_path))  # one trajectory: the parity is always 0
    agent = torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)["agent"]
    np.testing.assert_allclose(agent["x_mean"], [2, 0, 3, 0])
    np.testing.assert_allclose(agent["x_scale"], [math.sqrt(10), 1, math.sqrt(10), 1], rtol=1e-6)


@pytest.mark.parametrize("script", [diffail, gail_baseline])
@pytest.mark.parametrize("env_id, steps", [("Ant-v4", 500_000), ("Hopper-v4", 750_000), ("Walker2d-v5", 750_000)])
def test_environments_differ_by_steps_what_is_hoppers_and_ants_temperature_alone(script, env_id, steps, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "load_demonstrations", lambda *args: sys.exit(3))
    monkeypatch.setattr(script, "check_numbers", seen.append)
    given = {"grad_penalty": 0.5, "discriminator_window": 7, "total_timesteps": 9_000}
    if script is diffail:
        given["objective_form"] = "paper"
    for options in ({}, given):
        with pytest.raises(SystemExit):
            script.main(script.Args(env_id=env_id, **options))
    alpha = 0.06 if (script, env_id) == (diffail, "Ant-v4") else 0.12 / {"A": 8, "H": 3, "W": 6}[env_id[0]]
    default = dataclasses.asdict(script.Args()) | {"env_id": env_id, "alpha": alpha}
    default |= {"normalize": env_id == "Hopper-v4", "compile": script.can_compile()}
    penalty = 4.0 if script is gail_baseline else 0.1 if env_id == "Hopper-v4" else 0.0
    window = 100_000 if env_id == "Hopper-v4" else None
    resolved = {"total_timesteps": steps, "grad_penalty": penalty, "discriminator_window": window}
    if script is diffail:
        resolved["objective_form"] = "reward" if env_id == "Hopper-v4" else "paper"
    assert dataclasses.asdict(seen[0]) == default | resolved
    assert dataclasses.asdict(seen[1]) == default | given
    assert default["hidden_dim"] == 128


@pytest.mark.parametrize("lacking", [pytest.param(None, marks=NEEDS_COMPILER), "compiler", "headers", "Linux"])
def test_what_can_be_compiled_is_unless_told_otherwise(lacking, tmp_path, monkeypatch):
    if lacking == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif lacking == "headers":
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    elif lacking == "Linux":
        monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(diffail, "compiled", lambda function: lambda *args: made.append(function) or function(*args))
    for option, expected in {None: lacking is None, False: False}.items():
        made, folder = [], tmp_path / str(option)
        args = small_run(tmp_path, compile=option, output_dir=folder)[0]
        diffail.main(args)
        (run_dir,) = folder.iterdir()
        assert bool(made) == expected == json.loads((run_dir / "config.json").read_text())["args"]["compile"]
        other = small_run(tmp_path, compile=None if option is False else False, output_dir=folder, resume=True)[0]
        diffail.main(dataclasses.replace(other, total_timesteps=120))  # a run may go on where there is no compiler, or is one


@NEEDS_COMPILER
def test_two_threads_compute_the_same_each_time():
    """Sizes at which compiled code shares its loops among threads, which must not add up one sum in whatever order they come."""
    torch.set_num_threads(2)
    agents, buffer = [], diffail.ReplayBuffer(500, (17, 6, 17), torch.device("cpu"))
    buffer.rows.uniform_(0, 1)
    buffer.added.fill_(500)
    expert_x = torch.rand(100, 34)
    for _ in range(2):
        torch.manual_seed(0)
        args = diffail.Args(state_only=True, compile=True, alpha=0.02, reward_form="released")
        agents.append(diffail.DiffAIL(17, 6, args, torch.device("cpu")))
        for _ in range(20):
            agents[-1].update(expert_x, buffer)
    for (name, first), second in zip(agents[0].named_parameters(), agents[1].parameters()):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("autotune", [False, True])
def test_optimizers_are_the_released_ones_and_alpha_follows_its_target_only_with_autotune(autotune, tmp_path, monkeypatch):
    agents, original = [], diffail.DiffAIL.actor_loss
    monkeypatch.setattr(diffail.DiffAIL, "actor_loss", lambda agent, *batch: agents.append(agent) or original(agent, *batch))
    run = dict(demos=corridor_demos(tmp_path / "d.npz"), total_timesteps=70, output_dir=tmp_path)
    diffail.main(diffail.Args(**IMITATION, **run, autotune=autotune))
    state = torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)
    groups = {name: state[f"{name}_optimizer"]["param_groups"][0] for name in ("discriminator", "actor", "critic")}
    assert {name: (group["lr"], *group["betas"]) for name, group in groups.items()} == {
        "discriminator": (3e-5, 0.9, 0.999), "actor": (3e-4, 0.25, 0.999), "critic": (3e-4, 0.25, 0.999),
    }  # fmt: skip
    assert len(groups["actor"]["params"]) == (7 if autotune else 6)  # the temperature is the actor's seventh
    assert {agent.target_entropy for agent in agents} == {-0.5}  # minus half the action's one dimension
    assert (state["agent"]["log_alpha"].exp().item() == pytest.approx(0.12, rel=1e-6)) != autotune


@pytest.mark.parametrize("script", [diffail, gail_baseline])
def test_a_tuned_temperature_stays_at_most_at_alpha(script, tmp_path):
    args = dict(**IMITATION, demos=corridor_demos(tmp_path / "d.npz"), total_timesteps=70, autotune=True, alpha=0.3)
    for target, expected in {5.0: 0.3, -5.0: 0.3 * math.exp(-50 * 3e-4)}.items():  # Adam moves its logarithm by 3e-4 at each of 50 steps
        script.main(script.Args(**args, target_entropy_per_dim=target, output_dir=tmp_path / str(target)))
        (path,) = (tmp_path / str(target)).glob("*/checkpoint.pt")
        alpha = torch.load(path, weights_only=True)["agent"]["log_alpha"].exp().item()
        assert alpha == pytest.approx(expected, rel=1e-3)


def test_a_return_below_zero_has_no_percentage():
    assert diffail.share_of_expert(3000.0, 4000.0) == "75.0 % of the expert's"
    assert diffail.share_of_expert(-360.0, -180.0) == "the expert's is -180.0"
    assert diffail.share_of_expert(1.0, 0.0) == "the expert's is 0.0"


# ---------------------------------------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("path", sorted((HERE / "demos").glob("*.npz")), ids=lambda path: path.stem)
def test_recorded_demonstrations(path):
    env_id, env = path.stem, diffail.make_env(path.stem)
    with np.load(path, allow_pickle=False) as file:
        data, metadata = {name: file[name] for name in file.files}, json.loads(file["metadata"].item())
    ends = np.flatnonzero(data["terminations"] | data["truncations"]) + 1
    assert len(ends) == len(metadata["returns"]) == 16
    assert np.std(metadata["returns"]) < 0.05 * np.mean(metadata["returns"])
    paper = {"HalfCheetah-v4": 4461, "Hopper-v4": 3401, "Ant-v4": 4226}
    if env_id == "Walker2d-v4":  # the paper's has 6714
        assert np.mean(metadata["returns"]) > 4500
    else:
        assert np.mean(metadata["returns"]) == pytest.approx(paper[env_id], rel=0.05)
    for start, end, expected in zip([0, *ends[:-1]], ends, metadata["returns"]):
        assert data["rewards"][start:end].sum(dtype=np.float64) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_array_equal(data["next_observations"][start : end - 1], data["observations"][start + 1 : end])
    for n in (1, 4, 16):
        demos, expert_return = diffail.load_demonstrations(path, env_id, n, env)
        assert {len(part) for part in demos.values()} == {ends[n - 1]}
        assert expert_return == pytest.approx(np.mean(metadata["returns"]))

    if metadata["versions"]["mujoco"] == diffail.mujoco.__version__:  # another simulator's contacts drift apart
        raw = gym.make(env_id)
        for i in (0, 15):
            start, end = ([0, *ends][i], ends[i])
            observation, _ = raw.reset(seed=metadata["episode_seeds"][i])
            np.testing.assert_allclose(observation, data["observations"][start], rtol=1e-6)
            rewards = [raw.step(action)[1] for action in data["actions"][start:end]]
            np.testing.assert_allclose(rewards[:100], data["rewards"][start : start + 100], rtol=1e-4, atol=1e-4)
            assert sum(rewards) == pytest.approx(metadata["returns"][i], rel=0.01)


def test_demonstrations_survive_the_round_trip(tmp_path):
    actor = sac_baseline.Actor(2, 1, 8)
    args = sac_baseline.Args(env_id="Corridor-v0", demo_episodes=4)
    path = tmp_path / "new folder" / "demos.npz"
    config = dict(command="c", commit="d", versions={})
    path.parent.mkdir()
    sac_baseline.record_demonstrations(path, actor, sac_baseline.make_env("Corridor-v0"), args, config)
    demos, expert_return = diffail.load_demonstrations(path, "Corridor-v0", 3, diffail.make_env("Corridor-v0"))
    assert demos["observations"].shape == (15, 2) and demos["actions"].shape == (15, 1) and expert_return == 35
    np.testing.assert_array_equal(demos["observations"][:, 0], np.tile(np.arange(5), 3))
    np.testing.assert_array_equal(demos["next_observations"][:, 0], np.tile(np.arange(1, 6), 3))
    actions = actor(torch.from_numpy(demos["observations"]))[0].tanh().detach().numpy()
    np.testing.assert_allclose(demos["actions"], actions, rtol=1e-5, atol=1e-6)
    with np.load(path) as file:
        np.testing.assert_allclose(file["actions"][:15], 2 * actions - 1, rtol=1e-5)  # in the environment's units, from -3 to 1


def test_failed_episodes_can_be_left_out(tmp_path, capsys):
    actor, config = sac_baseline.Actor(2, 1, 8), dict(command="c", commit="d", versions={})
    path, args = tmp_path / "demos.npz", sac_baseline.Args(demo_episodes=3, min_demo_return=35)
    env = sac_baseline.make_env("Corridor-v0")
    step = env.unwrapped.step

    def step_with_failures(action):
        observation, reward, *rest = step(action)
        return observation, reward - (observation[1] == 1), *rest  # every other episode returns 30

    env.unwrapped.step = step_with_failures
    sac_baseline.record_demonstrations(path, actor, env, args, config)
    with np.load(path) as file:
        metadata, rewards = json.loads(file["metadata"].item()), file["rewards"]
    assert metadata["returns"] == [35.0] * 3 and rewards.shape == (15,)
    assert metadata["episode_seeds"] == [diffail.episode_seed(1, sac_baseline.DEMONSTRATION, i) for i in (0, 2, 4)]
    assert metadata["episodes_skipped"] == 2 and "2 others skipped" in capsys.readouterr().out
    args.min_demo_return = 36
    with pytest.raises(SystemExit) as exit_:
        sac_baseline.record_demonstrations(tmp_path / "none.npz", actor, env, args, config)
    assert exit_.value.code == 1 and "0 of 30 episodes reached" in capsys.readouterr().err and not (tmp_path / "none.npz").exists()


def test_an_expert_that_missed_its_target_is_not_recorded(tmp_path, capsys):
    args = SMALL | dict(total_timesteps=100, target_return=36, save_demos=tmp_path / "demos.npz", demo_episodes=2, output_dir=tmp_path)
    for resume in (False, True):  # resumed, the run is found finished
        with pytest.raises(SystemExit) as exit_:
            sac_baseline.main(sac_baseline.Args(**args, resume=resume))
        assert exit_.value.code == 1 and "nothing was recorded" in capsys.readouterr().err and not args["save_demos"].exists()
    sac_baseline.main(sac_baseline.Args(**args | {"target_return": None}, resume=True))  # asked for as it is
    assert args["save_demos"].exists()


# --------------------------------------------------------------------------------------------------------- bad input


def damaged(change: str, path: Path) -> Path:
    """A demonstration file for Corridor-v0 with one thing wrong."""
    corridor_demos(path)
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    if change == "missing":
        path.unlink()
    elif change == "empty file":
        path.write_bytes(b"")
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif change == "not an archive":
        path.write_text("observations,actions\n1,2\n")
    elif change == "pickle":
        np.savez(path, **data | {"observations": np.array([{"a": 1}], dtype=object)})
    else:
        edits = {
            "no actions": lambda d: d.pop("actions"),
            "no metadata": lambda d: d.pop("metadata"),
            "extra dimension": lambda d: d.update(observations=d["observations"][None]),
            "other environment": lambda d: d.update(metadata=np.array(json.dumps({"env_id": "Ant-v4", "returns": [1.0]}))),
            "other width": lambda d: d.update(observations=d["observations"][:, :1]),
            "lengths": lambda d: d.update(actions=d["actions"][:-1]),
            "nan": lambda d: d["observations"].__setitem__((3, 0), np.nan),
            "infinity": lambda d: d["rewards"].__setitem__(2, np.inf),
            "bounds": lambda d: d["actions"].__setitem__((0, 0), 1.5),
            "float64": lambda d: d.update(observations=d["observations"].astype(np.float64)),
            "no transitions": lambda d: d.update({k: v[:0] for k, v in d.items() if k != "metadata"}),
            "no whole episode": lambda d: d.update({k: v[:4] for k, v in d.items() if k != "metadata"}),
            "expert return": lambda d: d.update(metadata=np.array(json.dumps({"env_id": "Corridor-v0", "returns": [math.nan]}))),
        }
        edits[change](data)
        np.savez(path, **data)
    return path


BAD_INPUT = [  # what is done to the demonstrations, further arguments, and a part of the line that is printed
    ("missing", "", "sac_baseline.py --env-id Corridor-v0 --save-demos"),
    ("missing", "", "(there are: other)"),
    ("empty file", "", "not a whole"),
    ("truncated", "", "not a whole"),
    ("not an archive", "", "not a whole"),
    ("pickle", "", "not a whole"),
    ("no actions", "", "not a whole"),
    ("no metadata", "", "not a whole"),
    ("extra dimension", "", "observations is"),
    ("other environment", "", "recorded in Ant-v4"),
    ("other width", "", "observations is"),
    ("lengths", "", "actions is"),
    ("nan", "", "not finite"),
    ("infinity", "", "not finite"),
    ("bounds", "", "outside the bounds"),
    ("float64", "", "float64"),
    ("no transitions", "", "at least one"),
    ("no whole episode", "", "holds 0 episodes"),
    ("expert return", "", "the expert's mean return in the metadata is nan"),
    ("", "--num-trajectories 4", "holds 3 episodes, --num-trajectories asks for 4"),
    ("", "--num-trajectories 0", "--num-trajectories is 0, and must be a finite number from 1"),
    ("", "--env-id NoSuch-v0", "cannot make the environment"),
    ("", "--env-id HalfCheetah-v2", "cannot make the environment 'HalfCheetah-v2'"),
    ("", "--env-id CartPole-v1", "action space must be a one-dimensional Box"),
    ("", "--env-id FrozenLake-v1", "observation space must be a one-dimensional Box"),
    ("", "--env-id Dict-v0", "observation space must be a one-dimensional Box"),
    ("", "--env-id Image-v0", "observation space must be a one-dimensional Box"),
    ("", "--env-id Unbounded-v0", "must have finite bounds"),
    ("", "--env-id Whole-v0", "Box of floating-point numbers, not Box(0, 5, (2,), int64)"),
    ("", "--diffusion-steps 0", "--diffusion-steps is 0, and must"),
    ("", "--discriminator-lr -1", "--discriminator-lr is -1.0, and must be a finite number from 0"),
    ("", "--actor-lr nan", "--actor-lr is nan, and must"),
    ("", "--reward-scale inf", "--reward-scale is inf, and must"),
    ("", "--gamma 1.5", "--gamma is 1.5, and must be a finite number from 0 to 1"),
    ("", "--alpha 0", "--alpha is 0.0, and must"),
    ("", "--seed -1", "--seed is -1, and must"),
    ("", "--discriminator-window 0", "--discriminator-window is 0, and must be a finite number from 1"),
    ("", "--batch-size 0", "--batch-size is 0, and must"),
    ("", "--batch-size 501", "--batch-size 501 is more than will be stored"),
    ("", "--learning-starts 1000 --total-timesteps 1000", "leaves nothing to learn"),
    ("", "--output-dir {file}", "cannot write to"),
    ("", "--compile True", "--compile True needs Linux, a C++ compiler"),
    pytest.param("", "--device cuda", "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")),
]


@pytest.mark.parametrize("damage, arguments, message", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(damage, arguments, message, tmp_path, capsys, monkeypatch):
    path = damaged(damage, tmp_path / "demos.npz") if damage else corridor_demos(tmp_path / "demos.npz")
    corridor_demos(tmp_path / "other.npz")
    if "--compile True" in arguments:
        monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "file").write_text("not a folder")
    command = "--env-id Corridor-v0 --learning-starts 20 --buffer-size 500 --total-timesteps 700 "
    command += "--demos {0}/demos.npz --output-dir {0}/runs "
    words = (command + arguments).format(tmp_path, file=tmp_path / "file").split()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        diffail.main(tyro.cli(diffail.Args, args=words))
    done = capsys.readouterr()
    assert exit_.value.code == 2 and message in done.err and done.err.count("\n") == 1 and done.out == ""
    assert str(path) in done.err or not damage
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # nothing changed, no folder made


@pytest.mark.parametrize(
    "script, arguments",
    [
        (gail_baseline, "--env-id CartPole-v1"),
        (gail_baseline, "--demos README.md"),
        (gail_baseline, "--num-trajectories 17"),
        (gail_baseline, "--grad-penalty -1"),
        (gail_baseline, "--batch-size 501 --buffer-size 500 --learning-starts 10 --total-timesteps 600"),
        (sac_baseline, "--batch-size 501 --buffer-size 500 --learning-starts 10 --total-timesteps 600"),
        (sac_baseline, "--env-id NoSuch-v0 --save-demos {}/new/demos.npz"),
    ],
)
def test_bad_input_to_the_baselines_too(script, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main(tyro.cli(script.Args, args=[*arguments.format(tmp_path).split(), "--output-dir", str(tmp_path / "runs")]))
    assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_message_of_several_lines_is_printed_as_one(capsys):
    for code, arguments in ((2, ()), (1, (1,))):
        with pytest.raises(SystemExit) as exit_:
            diffail.fail(f"not {gym.spaces.Box(np.arange(40.0), np.arange(40.0) + 1, dtype=np.float64)}", *arguments)
        assert exit_.value.code == code and capsys.readouterr().err.count("\n") == 1


def test_bad_input_from_the_command_line():
    for words in (["--num-trajectories", "17"], ["--noise-schedule", "quadratic"]):
        done = run("diffail.py", *words)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_to_the_bytes_is_a_correct_load_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    content = bytearray(corridor_demos(folder / "demos.npz").read_bytes())
    env = diffail.make_env("Corridor-v0")
    original = diffail.load_demonstrations(folder / "demos.npz", "Corridor-v0", 3, env)
    where = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if kind == "flip":
        content[where] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[where : where + data.draw(st.integers(1, 200))]
    else:
        content[where:where] = data.draw(st.binary(min_size=1, max_size=20))
    (folder / "demos.npz").write_bytes(content)
    try:
        loaded = diffail.load_demonstrations(folder / "demos.npz", "Corridor-v0", 3, env)
    except SystemExit as exit_:
        assert exit_.code == 2
    else:
        assert loaded[1] == original[1]
        for name, part in original[0].items():
            np.testing.assert_array_equal(loaded[0][name], part)


def test_nothing_is_overwritten(tmp_path, capsys):
    demos = corridor_demos(tmp_path / "demos.npz")
    args = dict(**SMALL, total_timesteps=70, output_dir=tmp_path / "runs")
    diffail.main(diffail.Args(**args, demos=demos, hidden_dim=8))
    sac_baseline.main(sac_baseline.Args(**args))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call, message in (
        (lambda: diffail.main(diffail.Args(**args, demos=demos, hidden_dim=8)), "--resume"),
        (lambda: sac_baseline.main(sac_baseline.Args(**args)), "--resume"),
        (lambda: sac_baseline.main(sac_baseline.Args(**args | {"seed": 2}, save_demos=demos)), "is not overwritten"),
        (lambda: diffail.main(diffail.Args(**args | {"batch_size": 65}, demos=demos, hidden_dim=8, resume=True)), "another batch_size"),
    ):
        with pytest.raises(SystemExit) as exit_:
            call()
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------- the whole program


def run(*command: object, **kwargs) -> subprocess.CompletedProcess:
    """One of the programs to its end; one that hangs is a failure after 15 minutes."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=HERE, timeout=900, **kwargs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "script, flags, name",
    [
        ("sac_baseline", "--save-demos {}/demos.npz --demo-episodes 2", "Hopper-v4__sac_baseline__s1"),
        ("diffail", "--num-trajectories 3 --compile False", "Hopper-v4__diffail__state-action__3traj__s1"),
        ("gail_baseline", "--num-trajectories 3 --compile False", "Hopper-v4__gail_baseline__state-action__3traj__s1"),
        ("gail_baseline", "--state-only --reward-form paper", "Hopper-v4__gail_baseline__state-only__1traj__s1"),
        ("diffail", "--state-only --reward-form paper --noise-schedule vp", "Hopper-v4__diffail__state-only__1traj__s1"),
    ],
)
def test_command_line_end_to_end(script, flags, name, device, tmp_path):
    command = [f"{script}.py", "--env-id", "Hopper-v4", *flags.format(tmp_path).split()]
    command += ["--device", device, "--output-dir", tmp_path / "runs"]
    command += ["--total-timesteps", 400, "--learning-starts", 200, "--eval-every", 200, "--eval-episodes", 2]
    done = run(*command)
    assert done.returncode == 0 and done.stderr == ""
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == name and str(run_dir) in done.stdout and "best return" in done.stdout
    assert {path.name for path in run_dir.iterdir()} >= {"evaluations.csv", "config.json", "checkpoint.pt", "policy.pt"}
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1 and not list(run_dir.glob("*.tmp"))

    with open(run_dir / "evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["200", "400"] and all(float(row["mean_length"]) > 1 for row in rows)
    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["total_timesteps"] == config["finished_at_step"] == 400
    assert config["args"].get("alpha") == (None if script == "sac_baseline" else 0.12 / 3)  # an action has 3 dimensions
    assert config["versions"]["torch"] == torch.__version__
    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    actor = diffail.Actor(11, 3, policy["sac_hidden_dim"])
    actor.load_state_dict(policy["actor"])
    env = diffail.make_env(policy["env_id"])
    seeds = [diffail.episode_seed(1, 1, 400, i) for i in range(2)]
    if device == "cpu":  # the saved policy is the one evaluated last
        for name, value in diffail.summarize([diffail.play_episode(actor, env, seed) for seed in seeds]).items():
            assert value == pytest.approx(float(rows[-1][name]), abs=1e-3)
    if script != "sac_baseline":  # over two episodes a correlation is 1 or -1
        assert all(abs(float(row["reward_correlation"])) == 1 and float(row["mean_surrogate_return"]) != 0 for row in rows)
    again = run(*command, "--resume", *(["--save-demos", tmp_path / "new.npz"] if script == "sac_baseline" else []))
    assert again.returncode == 0 and "has finished" in again.stdout
    if script == "sac_baseline":  # a finished expert can still be recorded
        with np.load(tmp_path / "demos.npz") as first, np.load(tmp_path / "new.npz") as second:
            np.testing.assert_array_equal(first["actions"], second["actions"])


def pendulum_demos(folder: Path) -> list:
    """The arguments of a small DiffAIL run on Pendulum-v1, with demonstrations made for it."""
    small = ["--env-id", "Pendulum-v1", "--learning-starts", 150, "--batch-size", 16, "--sac-hidden-dim", 8]
    small += ["--eval-every", 100, "--eval-episodes", 1, "--threads", 1]
    recording = ["--total-timesteps", 200, "--compile", False, "--save-demos", folder / "demos.npz", "--output-dir", folder / "sac"]
    recorded = run("sac_baseline.py", *small, *recording)
    assert recorded.returncode == 0, recorded.stderr
    return [*small, "--demos", folder / "demos.npz", "--hidden-dim", 8]


@pytest.mark.parametrize("device", DEVICES)
def test_stopped_and_resumed_is_the_uninterrupted_run(device, tmp_path):
    flags = [*pendulum_demos(tmp_path), "--device", device, "--total-timesteps", 2000, "--checkpoint-every", 200]
    flags += ["--buffer-size", 700, "--discriminator-window", 300, "--output-dir"]  # so that it forgets, before a stop and after
    assert run("diffail.py", *flags, tmp_path / "whole").returncode == 0
    (whole,) = (tmp_path / "whole").iterdir()
    stopped = tmp_path / "stopped" / whole.name
    for rows, number in ((2, signal.SIGKILL), (6, signal.SIGTERM), (10, signal.SIGINT), (14, signal.SIGKILL)):
        command = [sys.executable, "diffail.py", *map(str, flags), str(tmp_path / "stopped"), "--resume"]
        process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 900
        while not (stopped / "evaluations.csv").exists() or (stopped / "evaluations.csv").read_text().count("\n") <= rows:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:  # a checkpoint, one line on how to resume, and the exit code of a shell
            assert process.returncode == 128 + number and errors.splitlines()[-1].endswith("with --resume goes on from there"), errors
            state = torch.load(stopped / "checkpoint.pt", weights_only=True)
            assert f"stopped at step {state['step']:,}" in errors and state["step"] % 200 == 0
    done = run("diffail.py", *flags, tmp_path / "stopped", "--resume")
    assert done.returncode == 0, done.stderr
    resumed = [entry["step"] for entry in json.loads((stopped / "config.json").read_text())["resumed"]]
    assert 0 < resumed[0] < resumed[-1] < 2000 and resumed == sorted(resumed)
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (stopped, whole))
    for state in (ours, theirs):
        del state["wall_time"], state["config"]
    if device == "cuda":  # a GPU need not round alike in two runs, see the README
        steps = [(folder / "evaluations.csv").read_text().splitlines() for folder in (stopped, whole)]
        assert [line.split(",")[0] for line in steps[0]] == [line.split(",")[0] for line in steps[1]]
        form = partial(torch.utils._pytree.tree_map, lambda leaf: leaf.shape if torch.is_tensor(leaf) else type(leaf))
        assert ours["step"] == theirs["step"] and form(ours) == form(theirs)
        return
    assert (stopped / "evaluations.csv").read_bytes() == (whole / "evaluations.csv").read_bytes()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)  # of one episode there is no correlation

    again = run("diffail.py", *flags, tmp_path / "again")  # and the same command gives the same evaluations
    assert again.returncode == 0
    assert next((tmp_path / "again").glob("*/evaluations.csv")).read_bytes() == (whole / "evaluations.csv").read_bytes()


def small_run(tmp_path: Path, **changes) -> tuple[diffail.Args, Path]:
    """Arguments of a run on Corridor-v0, and the path of its checkpoint."""
    demos = tmp_path / "demos.npz"
    args = IMITATION | dict(demos=demos if demos.exists() else corridor_demos(demos), total_timesteps=100, output_dir=tmp_path)
    return diffail.Args(**args | changes), tmp_path / "Corridor-v0__diffail__state-action__1traj__s1" / "checkpoint.pt"


def test_a_checkpoint_that_is_not_one_is_one_line_and_left_as_it_is(tmp_path, capsys):
    args, path = small_run(tmp_path)
    diffail.main(args)
    whole = path.read_bytes()
    sac_baseline.main(sac_baseline.Args(**SMALL, total_timesteps=100, output_dir=tmp_path))
    foreign = (tmp_path / "Corridor-v0__sac_baseline__s1" / "checkpoint.pt").read_bytes()
    torch.save({name: part for name, part in torch.load(path, weights_only=True).items() if name != "agent"}, tmp_path / "part.pt")
    part = (tmp_path / "part.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-100], b"not a checkpoint", foreign, part):
        path.write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            diffail.main(small_run(tmp_path, resume=True, total_timesteps=200)[0])
        message = capsys.readouterr().err
        assert exit_.value.code == 2 and str(path) in message and message.count("\n") == 1
        assert path.read_bytes() == content


def test_what_keeps_a_checkpoint_from_being_read_is_said(tmp_path, capsys, monkeypatch):
    args, path = small_run(tmp_path)
    diffail.main(args)
    monkeypatch.setattr(torch, "load", lambda *_, **__: tmp_path.read_bytes())  # as where the file must not be read
    with pytest.raises(SystemExit) as exit_:
        diffail.main(small_run(tmp_path, resume=True, total_timesteps=200)[0])
    assert exit_.value.code == 2 and "IsADirectoryError" in capsys.readouterr().err and path.exists()


def test_no_file_can_run_code(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    path = small_run(tmp_path)[1]
    torch.save({"config": {"args": {}}, "agent": Hostile()}, tmp_path / "hostile.pt")
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    (tmp_path / "it ran").unlink()  # so the payload does its work where something runs it
    path.parent.mkdir()
    for content in ((tmp_path / "hostile.pt").read_bytes(), pickle.dumps(Hostile(), protocol=2)):
        path.write_bytes(content)
        with pytest.raises(SystemExit):
            diffail.main(small_run(tmp_path, resume=True)[0])
    np.savez(tmp_path / "demos.npz", observations=np.array([Hostile()], dtype=object), metadata="{}")
    for content in ((tmp_path / "demos.npz").read_bytes(), pickle.dumps(Hostile(), protocol=2)):
        (tmp_path / "demos.npz").write_bytes(content)
        with pytest.raises(SystemExit):
            diffail.main(small_run(tmp_path, seed=2)[0])
    code, _ = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    with pytest.raises(pickle.UnpicklingError):
        exec(re.sub(r'"runs/.*?/policy.pt"', repr(str(tmp_path / "hostile.pt")), code), {})
    assert not (tmp_path / "it ran").exists()


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path):
    flags = [*pendulum_demos(tmp_path), "--compile", False, "--checkpoint-every", 200, "--output-dir", tmp_path, "--resume"]
    flags += ["--total-timesteps"]
    assert run("diffail.py", *flags, 400).returncode == 0
    (path,) = tmp_path.glob("*diffail*/checkpoint.pt")
    before = path.read_bytes()
    limit = len(before) + 2_000  # bytes a file may have: the transitions of the next checkpoint do not fit
    full = run("diffail.py", *flags, 2000, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2 and f"cannot write {path}, and left it as it was" in full.stderr and full.stderr.count("\n") == 1
    assert path.read_bytes() == before and not list(path.parent.glob("*.tmp"))
    assert run("diffail.py", *flags, 600).returncode == 0

    flags = [*flags[: flags.index("--checkpoint-every")], "--eval-every", 5000, "--output-dir", tmp_path / "events"]
    flags += ["--total-timesteps", 5000]
    full = run("diffail.py", *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000)))
    assert full.returncode == 2 and "File too large" in full.stderr and full.stderr.count("\n") == 1  # TensorBoard's file


@pytest.mark.parametrize("module", [diffail, gail_baseline, sac_baseline], ids=lambda module: module.__name__)
@pytest.mark.parametrize("file", ["policy.pt", "config.json"])
def test_a_run_that_dies_while_it_finishes_is_finished_by_resume(module, file, tmp_path, monkeypatch, capsys):
    args = dict(total_timesteps=80, checkpoint_every=20, output_dir=tmp_path / "runs")
    args |= SMALL if module is sac_baseline else IMITATION | {"demos": corridor_demos(tmp_path / "demos.npz")}
    write_file, written = module.write_file, []

    def dies(path, write):
        written.append(path.name)
        if path.name == file and "policy.pt" in written:
            raise SystemExit(1)
        write_file(path, write)

    monkeypatch.setattr(module, "write_file", dies)
    with pytest.raises(SystemExit):
        module.main(module.Args(**args))
    monkeypatch.undo()
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "checkpoint.pt").exists()
    module.main(module.Args(**args, resume=True))
    assert "has finished" not in capsys.readouterr().out
    assert (run_dir / "policy.pt").exists() and json.loads((run_dir / "config.json").read_text())["finished_at_step"] == 80
    module.main(module.Args(**args, resume=True))
    assert "has finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what, message",
    [
        ("disc_policy_loss", "disc_policy_loss is not finite at step 150"),
        ("surrogate_reward", "surrogate_reward is not finite at step 150"),
        ("critic", "critic.q1.0.weight is not finite at step 200"),
        ("actor", "action is not finite at step 150"),
    ],
)
def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(what, message, tmp_path, monkeypatch, capsys):
    diffail.main(small_run(tmp_path)[0])
    path, calls = small_run(tmp_path)[1], []
    before, update = path.read_bytes(), diffail.DiffAIL.update

    def broken(self, *args):
        losses = update(self, *args)
        calls.append(losses)
        if what == "actor" and len(calls) == 49:
            self.actor.net[0].weight.data[0, 0] = math.nan
        if what == "critic" and len(calls) == 100:
            self.critic.q1[0].weight.data[0, 0] = math.inf
        return losses | ({what: torch.tensor(math.inf)} if what in losses else {})

    monkeypatch.setattr(diffail.DiffAIL, "update", broken)
    with pytest.raises(SystemExit) as exit_:
        diffail.main(small_run(tmp_path, resume=True, total_timesteps=200)[0])
    done = capsys.readouterr().err
    assert exit_.value.code == 1 and message in done and done.count("\n") == 1
    assert path.read_bytes() == before


def test_losses_are_checked_every_thousand_steps(tmp_path, monkeypatch, capsys):
    update = diffail.DiffAIL.update
    monkeypatch.setattr(diffail.DiffAIL, "update", lambda self, *args: update(self, *args) | {"qf_loss": torch.tensor(math.nan)})
    with pytest.raises(SystemExit) as exit_:
        diffail.main(small_run(tmp_path, learning_starts=950, total_timesteps=1100, eval_every=5000)[0])
    assert exit_.value.code == 1 and "qf_loss is not finite at step 1000" in capsys.readouterr().err


def test_the_whole_pipeline_learns_the_inverted_pendulum(tmp_path):
    small = ["--env-id", "InvertedPendulum-v4", "--sac-hidden-dim", 64, "--batch-size", 128, "--learning-starts", 500]
    small += ["--actor-lr", 1e-3, "--critic-lr", 1e-3, "--tau", 0.02, "--gamma", 0.98]
    small += ["--eval-every", 1000, "--eval-episodes", 3, "--threads", 1, "--compile", False, "--output-dir", tmp_path]
    small += ["--device", "cpu"]  # on a GPU the same seed is other random numbers, and so few steps are a matter of luck
    demos = tmp_path / "InvertedPendulum-v4.npz"
    recording = ["--target-return", 900, "--save-demos", demos, "--demo-episodes", 2]
    expert = run("sac_baseline.py", *small, "--total-timesteps", 20_000, *recording)
    assert expert.returncode == 0, expert.stdout + expert.stderr
    imitation = ["--state-only", "--demos", demos, "--cut-probability", 1, "--hidden-dim", 64]
    imitation += ["--discriminator-lr", 3e-4, "--alpha", 0.3]  # so the first seeds of both learn it; with 0.12 one of DiffAIL's does not
    for script, grad_penalty in (("diffail.py", 0.1), ("gail_baseline.py", 0.5)):
        imitator = run(script, *small, "--total-timesteps", 5000, *imitation, "--grad-penalty", grad_penalty)
        assert imitator.returncode == 0, imitator.stderr
    with np.load(demos) as file:
        expert_return = np.mean(json.loads(file["metadata"].item())["returns"])
    env = diffail.make_env("InvertedPendulum-v4")
    env.action_space.seed(0)
    lengths = []
    for i in range(20):
        env.reset(seed=i)
        lengths.append(1)
        while not env.step(env.action_space.sample())[2]:
            lengths[-1] += 1
    assert np.mean(lengths) < 0.1 * expert_return  # a random policy; the reward is 1 a step
    for script in ("diffail", "gail_baseline"):
        with open(next(tmp_path.glob(f"*{script}*/evaluations.csv")), newline="") as file:
            returns = [float(row["mean_return"]) for row in csv.DictReader(file)]
        assert max(returns) >= 0.5 * expert_return, (script, returns)


FAKE_ARGS = """
import json, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import tyro

TOTAL_TIMESTEPS, MAY_CHANGE_ON_RESUME = {"Hopper": 100}, {"resume", "output_dir", "total_timesteps", "threads"}

@dataclass
class Args:
    env_id: str = "Hopper-v4"
    num_trajectories: int = 1
    seed: int = 1
    state_only: bool = False
    output_dir: Path = Path("runs")
    threads: int = 2
    resume: bool = False
    total_timesteps: int | None = None
    alpha: float | None = None
"""

FAKE_SCRIPT = FAKE_ARGS + """
if __name__ == "__main__":
    args = tyro.cli(Args)
    setting = "state-only" if args.state_only else "state-action"
    with open(args.output_dir / "started", "a") as file:
        print(args.seed, setting, *sys.argv[sys.argv.index("--resume") :], file=file)
    (args.output_dir / "gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    if args.seed == 2:
        raise SystemExit("seed 2 does not work")
    run_dir = args.output_dir / f"Hopper-v4__diffail__{setting}__1traj__s{args.seed}"
    run_dir.mkdir(exist_ok=True)
    (run_dir / "evaluations.csv").write_text("step,mean_return\\n100,12.5\\n")
    used = vars(args) | {"output_dir": str(args.output_dir), "alpha": args.alpha or 0.02}
    config = {"args": used, "command": " ".join(sys.argv), "finished_at_step": args.total_timesteps or 100}
    (run_dir / "config.json").write_text(json.dumps(config))
"""


def test_a_grid_skips_what_is_finished_and_goes_on_past_a_failure(tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "run.py").write_bytes((HERE / "benchmark" / "run.py").read_bytes())
    (tmp_path / "diffail.py").write_text(FAKE_SCRIPT)
    runs = tmp_path / "runs"
    command = [tmp_path / "benchmark" / "run.py", "--env-ids", "Hopper-v4", "--output-dir", runs]
    first = run(*command, "--seeds", 1, 2, "--", "--total-timesteps", 100)
    assert first.returncode == 1 and "s2: failed" in first.stdout and "s1: finished, 100 steps, return 12.5" in first.stdout
    started = [f"{seed} {setting} --resume --total-timesteps 100" for seed in (1, 2) for setting in ("state-only", "state-action")]
    assert sorted((runs / "started").read_text().splitlines()) == sorted(started)
    second = run(*command, "--seeds", 1, 3, "--", "--total-timesteps", 100)
    assert second.returncode == 0, second.stderr
    assert [line[0] for line in (runs / "started").read_text().splitlines()[4:]] == ["3", "3"]

    def newly_started(*further: str) -> int:
        before = len((runs / "started").read_text().splitlines())
        assert run(*command, "--seeds", 1, "--", *further).returncode == 0
        return len((runs / "started").read_text().splitlines()) - before

    assert newly_started() == newly_started("--alpha", "0.02") == 0  # 100 steps and this alpha are the defaults
    assert newly_started("--total-timesteps=200") == newly_started("--alpha=0.1") == 2
    assert newly_started() == 2  # 0.1 is not the default
    assert (runs / "gpus").read_text() == ""
    assert run(*command, "--seeds", 4, "--gpus", 2).returncode == 0
    assert (runs / "gpus").read_text() == "0,1"


INTERRUPTED_SCRIPT = FAKE_ARGS + """
if __name__ == "__main__":
    args, caught = tyro.cli(Args), []
    if args.seed == 1:  # as a run whose episode goes on for two seconds; the other one is still importing
        signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    (args.output_dir / f"started{args.seed}").touch()
    while not caught:
        time.sleep(0.1)
    print("SIGINT", file=sys.stderr, flush=True)
    time.sleep(2)
    print("stopped", file=sys.stderr, flush=True)
    (args.output_dir / "checkpoint").touch()
    raise SystemExit(130)
"""


def test_ctrl_c_waits_for_the_checkpoints_of_a_grid(tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "run.py").write_bytes((HERE / "benchmark" / "run.py").read_bytes())
    (tmp_path / "diffail.py").write_text(INTERRUPTED_SCRIPT)
    command = [sys.executable, tmp_path / "benchmark" / "run.py", "--settings", "state-only", "--seeds", "1", "2", "--output-dir", tmp_path]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not all((tmp_path / f"started{seed}").exists() for seed in (1, 2)):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) == 130 and (tmp_path / "checkpoint").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing is left of it


# --------------------------------------------------------------------------------------------------- the text itself


def definitions(path: Path) -> dict[str, str]:
    text = path.read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) for node in nodes if node.name not in ("main", "Args")}


@pytest.mark.parametrize("buffer_size", [1_000, 300])
def test_rewards_by_velocity_are_counted_over_the_replay_buffer_and_the_demonstration(buffer_size, tmp_path):
    sizes = ["--total-timesteps", 400, "--learning-starts", 200, "--eval-every", 1000, "--sac-hidden-dim", 16, "--hidden-dim", 16]
    sizes += ["--buffer-size", buffer_size, "--demos", tmp_path / "later.npz", "--threads", 1, "--compile", False, "--output-dir", tmp_path]
    sizes += ["--num-trajectories", 2]  # more than the tool takes at once
    with np.load(HERE / "demos" / "Hopper-v4.npz") as file:  # without the first episode, so that it is not the default file
        first = 1 + np.flatnonzero(file["terminations"] | file["truncations"])[0]
        later = {name: file[name] if name == "metadata" else file[name][first:] for name in file.files}
    np.savez(tmp_path / "later.npz", **later)
    assert run("diffail.py", "--env-id", "Hopper-v4", *sizes).returncode == 0
    (run_dir,) = tmp_path.glob("Hopper*")
    done = run("benchmark/reward_by_velocity.py", run_dir, "--to", tmp_path / "out", "--variant", "tiny")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / f"{run_dir.name}__tiny.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    velocities = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["rows"][:, 5].numpy()
    # Of a ring of 300, steps 301 to 400 have overwritten 1 to 100, and 101 to 200 are the random ones that are left.
    stored = velocities[200:] if buffer_size > 400 else np.concatenate([velocities[200:], velocities[:100]])
    demonstrated = later["observations"][: 1 + np.flatnonzero(later["terminations"] | later["truncations"])[1], 5]
    for name, velocities in {"replay buffer": stored, "demonstration": demonstrated}.items():
        found = {float(row["velocity"]): int(row["number"]) for row in rows if row["transitions"] == name}
        counts = {middle: int(((velocities >= middle - 0.25) & (velocities < middle + 0.25)).sum()) for middle in np.arange(-1, 6.1, 0.5)}
        assert found == {middle: count for middle, count in counts.items() if count >= 20} and found
    # Jensen: the mean of exp(-squared error) is at least exp(-mean), so the released form's D and reward are the greater ones.
    assert all(float(row["released"]) >= float(row["paper"]) > 0 and float(row["diffusion_loss"]) > 0 for row in rows)


def test_behaviour_is_that_of_the_checkpoints_policy_and_of_its_demonstration(tmp_path):
    sizes = ["--total-timesteps", 300, "--learning-starts", 200, "--eval-every", 1000, "--sac-hidden-dim", 16, "--hidden-dim", 16]
    sizes += ["--compile", False]
    assert run("diffail.py", "--env-id", "Hopper-v4", "--state-only", *sizes, "--threads", 1, "--output-dir", tmp_path).returncode == 0
    (run_dir,) = tmp_path.glob("Hopper*")
    done = run("benchmark/behaviour.py", run_dir, "--to", tmp_path / "out", "--variant", "tiny")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / f"{run_dir.name}__tiny.csv", newline="") as file:
        rows = {row.pop("transitions"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    network = diffail.Actor(11, 3, 16)
    network.load_state_dict(torch.load(run_dir / "policy.pt", weights_only=True)["actor"])
    env, velocities, actions = gym.make("Hopper-v4"), [], []
    for seed in range(10):
        observation, done = env.reset(seed=seed)[0], False
        while not done:
            velocities.append(observation[5])
            with torch.no_grad():
                actions.append(network(torch.from_numpy(observation).float())[0].tanh().numpy())
            observation, _, terminated, truncated, _ = env.step(actions[-1])
            done = terminated or truncated
    with np.load(HERE / "demos" / "Hopper-v4.npz") as file:
        first = slice(1 + np.flatnonzero(file["terminations"] | file["truncations"])[0])
        demonstrated = file["observations"][first, 5], file["actions"][first]
        x = torch.from_numpy(np.concatenate([file["observations"][first], file["next_observations"][first]], axis=1))
    discriminator = diffail.DiffusionDiscriminator(22, 16, 10, "linear")
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    discriminator.load_state_dict({name.removeprefix("discriminator."): value for name, value in state.items() if "discriminator." in name})
    noise, x = torch.randn(10, *x.shape), (x - x.mean(0)) / (2 * x.std(0))  # other noise than the script's: the mean over all steps is near
    with torch.no_grad():
        error = discriminator.denoising_error(x, noise, torch.arange(10)[:, None])
    expected_reward = -2 * torch.log(1 - torch.exp(-error.square()).mean((0, 2))).mean().item()
    for name, (velocity, action) in {"policy": (velocities, np.array(actions)), "demonstration": demonstrated}.items():
        wanted = {"step": 300, "number": len(action), "velocity": np.mean(velocity), "mean_abs_action": np.abs(action).mean()}
        wanted["squared_actions"] = np.square(action).sum(1).mean()
        reward = rows[name].pop("surrogate_reward")
        assert rows[name] == pytest.approx(wanted, rel=1e-3)
        assert name == "policy" or reward == pytest.approx(expected_reward, rel=0.02)


def test_coordinates_are_those_of_the_policy_and_of_the_demonstration(tmp_path):
    sizes = ["--total-timesteps", 300, "--learning-starts", 200, "--eval-every", 1000, "--sac-hidden-dim", 16, "--hidden-dim", 16]
    assert run("diffail.py", "--env-id", "Hopper-v4", *sizes, "--compile", False, "--threads", 1, "--output-dir", tmp_path).returncode == 0
    (run_dir,) = tmp_path.glob("Hopper*")
    done = run("benchmark/coordinates.py", run_dir, "--to", tmp_path / "out", "--variant", "tiny")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / f"{run_dir.name}__tiny.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["coordinate"] for row in rows] == 2 * ([f"s[{i}]" for i in range(11)] + ["a[0]", "a[1]", "a[2]"])
    demonstration = [row for row in rows if row["transitions"] == "demonstration"]
    assert all(abs(float(row["mean"])) < 1e-3 and float(row["std"]) == pytest.approx(0.5, abs=1e-3) for row in demonstration)
    actor = diffail.Actor(11, 3, 16)
    actor.load_state_dict(torch.load(run_dir / "policy.pt", weights_only=True)["actor"])
    with np.load(HERE / "demos" / "Hopper-v4.npz") as file:
        velocity = file["observations"][: 1 + np.flatnonzero(file["terminations"] | file["truncations"])[0], 5]
    played = [diffail.play_episode(actor, diffail.make_env("Hopper-v4"), seed)["observations"][:, 5] for seed in range(10)]
    expected = (np.concatenate(played) - velocity.mean()) / (2 * velocity.std(ddof=1))
    assert float(rows[5]["mean"]) == pytest.approx(expected.mean(), rel=1e-3)
    assert float(rows[5]["std"]) == pytest.approx(expected.std(ddof=1), rel=1e-3)
    for name in ("policy", "demonstration"):
        shares = {row["coordinate"]: (float(row["d"]), float(row["squared_error"])) for row in rows if row["transitions"] == name}
        assert all(0 < math.exp(-error) <= d < 1 for d, error in shares.values())  # Jensen, coordinate by coordinate


def test_gaits_without_noise_are_those_of_the_evaluations(tmp_path):
    sizes = ["--total-timesteps", 300, "--learning-starts", 200, "--eval-every", 1000, "--sac-hidden-dim", 16, "--hidden-dim", 16]
    assert run("diffail.py", "--env-id", "Hopper-v4", *sizes, "--compile", False, "--threads", 1, "--output-dir", tmp_path).returncode == 0
    (run_dir,) = tmp_path.glob("Hopper*")
    done = run("benchmark/gaits.py", run_dir, "--to", tmp_path / "out", "--variant", "tiny")
    assert done.returncode == 0 and "noise 0: returns" in done.stdout and done.stderr == ""
    with open(tmp_path / "out" / f"{run_dir.name}__tiny.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [(row["noise"], row["seed"]) for row in rows] == [(share, seed) for share in (0, 0.5, 1) for seed in range(10)]
    actor = diffail.Actor(11, 3, 16)
    actor.load_state_dict(torch.load(run_dir / "policy.pt", weights_only=True)["actor"])
    deterministic = [diffail.play_episode(actor, diffail.make_env("Hopper-v4"), seed) for seed in range(10)]
    for row, episode in zip(rows, deterministic):
        standing = np.abs(episode["observations"][:, 5]) < 0.5
        assert row["return"] == pytest.approx(episode["rewards"].sum(), rel=1e-3) and row["length"] == len(standing)
        assert row["standing_steps"] == standing.sum() and row["running_steps"] == 0 and math.isnan(row["running_reward"])
        mean, log_std = actor(torch.from_numpy(episode["observations"][standing]))
        policy = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])
        entropy = -policy.log_prob(policy.sample((1000,))).mean().item()
        assert row["standing_entropy"] == pytest.approx(entropy, abs=1.5) and row["standing_reward"] > 0
    assert len({row["return"] for row in rows[10:]} & {row["return"] for row in rows[:10]}) == 0  # the noise does something


def test_values_are_counted_by_steps_after_a_fall(tmp_path):
    sizes = ["--total-timesteps", 1000, "--learning-starts", 700, "--eval-every", 10_000, "--sac-hidden-dim", 16, "--hidden-dim", 16]
    sizes += ["--compile", False, "--threads", 1, "--output-dir", tmp_path]
    assert run("diffail.py", "--env-id", "Hopper-v4", *sizes).returncode == 0
    (run_dir,) = tmp_path.glob("Hopper*")
    done = run("benchmark/values.py", run_dir, "--to", tmp_path / "out", "--variant", "tiny")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / f"{run_dir.name}__tiny.csv", newline="") as file:
        found = {row["kind"]: row for row in csv.DictReader(file) if row["transitions"] == "all"}
    state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    since = []  # steps since the fall; a policy that has learned nothing falls long before the time limit
    for scalar in EventAccumulator(str(run_dir)).Reload().Scalars("charts/episodic_length"):
        since += range(1 - int(scalar.value), scalar.step - len(since) - int(scalar.value) + 1)
    last = state["rows"][len(since) :, 14:]  # an unfinished episode; Hopper-v4's falls: at a height of 0.7 or an angle of 0.2
    falls = ((last[:, 0] <= 0.7) | (last[:, 1].abs() >= 0.2)).nonzero().flatten().tolist()
    since = np.array([*since, *(i - falls[0] if falls else -1000 for i in range(len(last)))])
    critic, actor = diffail.TwinCritic(11, 3, 16), diffail.Actor(11, 3, 16)
    for name, network in {"critic.": critic, "actor.": actor}.items():
        network.load_state_dict({key.removeprefix(name): value for key, value in state["agent"].items() if key.startswith(name)})
    bounds = {"before a fall": (-2000, 0), "of these the last 20": (-19, 0), "more than 100 steps after": (101, 2000)}
    bounds |= {f"{low} to {low + 19} steps after": (low, low + 19) for low in range(1, 100, 20)}
    numbers = {name: int(((low <= since) & (since <= high)).sum()) for name, (low, high) in bounds.items()}
    assert {name: int(row["number"]) for name, row in found.items()} == {name: n for name, n in numbers.items() if n >= 20}
    assert len(found) > 4 and len({row["value"] for row in found.values()}) == len(found)
    for name, row in found.items():
        low, high = bounds[name]
        observations = state["rows"][torch.from_numpy((low <= since) & (since <= high)), :11]
        draws = observations.repeat(100, 1)  # many of the policy's actions for each state, where the tool takes one
        value = torch.min(*critic(draws, actor.act(draws))).mean().item()
        assert float(row["value"]) == pytest.approx(value, abs=0.02) and float(row["reward"]) > 0
    assert run("diffail.py", "--env-id", "HalfCheetah-v4", *sizes).returncode == 0
    refused = run("benchmark/values.py", *tmp_path.glob("HalfCheetah*"), "--to", tmp_path / "out")
    assert refused.returncode == 2 and "HalfCheetah-v4 knows no falls" in refused.stderr and len(list((tmp_path / "out").iterdir())) == 1


def test_results_are_collected_as_a_run_goes_on_but_not_over_those_of_another_run(tmp_path):
    run_dir, to = tmp_path / "Pendulum-v1__sac_baseline__s1", tmp_path / "results"
    with SummaryWriter(run_dir) as writer:
        for step in (1_000, 2_000):
            writer.add_scalar("losses/qf_loss", step / 4_000, step)
    (run_dir / "evaluations.csv").write_text("step,mean_return\n1000,12.5\n")

    def collect(**args) -> subprocess.CompletedProcess:
        (run_dir / "config.json").write_text(json.dumps({"commit": "c", "args": {"seed": 1, "min_demo_return": None} | args}))
        return run("benchmark/collect.py", "--to", to, run_dir)

    to.mkdir()
    assert collect().returncode == 0 and collect(min_demo_return=-200.0).returncode == 0
    assert (to / "training" / f"{run_dir.name}.csv").read_text() == "step,qf_loss\n1000,0.25\n2000,0.5\n"
    before = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    refused = collect(seed=2)
    assert refused.returncode == 1 and "left as it is" in refused.stderr and len(before) == 3
    assert before == {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}


def test_same_name_same_source():
    shared = 0
    for i, one in enumerate(SCRIPTS):
        for other in SCRIPTS[i + 1 :]:
            ours, theirs = definitions(one), definitions(other)
            for name in ours.keys() & theirs.keys():
                assert ours[name] == theirs[name], f"{name} differs between {one.name} and {other.name}"
                shared += 1
    assert shared >= 60
    for name in ("descend", "critic_loss"):
        assert len({inspect.getsource(getattr(kind, name)) for kind in (diffail.DiffAIL, gail_baseline.GAIL, sac_baseline.SAC)}) == 1
    assert inspect.getsource(diffail.DiffAIL.actor_loss) == inspect.getsource(gail_baseline.GAIL.actor_loss)


def test_gail_differs_from_diffail_in_its_discriminator_and_reward_alone():
    def names_alike(text: str) -> str:
        for name in ("DiffAIL", "GAIL"):
            text = text.replace(f"agent = {name}(", "agent = Agent(")
        return re.sub(r"__(diffail|gail_baseline)__", "__script__", text)

    def lines(script) -> list[str]:
        text = names_alike(inspect.getsource(script.main))
        return [line for line in text.splitlines() if "#" not in line and "surrogate reward, which" not in line]

    of_hopper = [line for line in lines(diffail) if "GRAD_PENALTY" in line or "OBJECTIVE_FORM" in line]
    plain = [line.replace("ALPHA.get(body, 0.12 / action_dim)", "0.12 / action_dim") for line in lines(diffail) if line not in of_hopper]
    assert len(of_hopper) == 2 and plain == lines(gail_baseline)
    fields = [{field.name: field.default for field in dataclasses.fields(script.Args)} for script in (diffail, gail_baseline)]
    assert fields[0].keys() ^ fields[1].keys() == {"diffusion_steps", "noise_schedule", "objective_form"}
    assert {name for name in fields[1] if fields[0][name] != fields[1][name]} == {"grad_penalty", "discriminator_lr"}


def test_scripts_import_nothing_of_each_other_and_declare_the_pinned_requirements():
    pins = {line for line in (HERE / "requirements.txt").read_text().splitlines() if "==" in line}
    for path in SCRIPTS:
        imported = {name.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for name in node.names}
        assert not imported & {other.stem for other in SCRIPTS}
        block = re.search(r"# /// script\n(.*?)# ///", path.read_text(), re.S)[1]
        declared = set(re.findall(r'"([^"]+==[^"]+)"', block))
        assert declared <= pins
        assert {re.split(r"\W", pin)[0] for pin in declared} >= imported & {"torch", "gymnasium", "mujoco", "numpy", "tyro"}


def test_the_policy_is_used_as_the_readme_says(tmp_path, capsys):
    args = IMITATION | dict(sac_hidden_dim=16, demos=corridor_demos(tmp_path / "demos.npz"))
    diffail.main(diffail.Args(**args, total_timesteps=70, output_dir=tmp_path))
    code, _ = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    (path,) = tmp_path.glob("*/policy.pt")
    namespace = {}
    exec(re.sub(r'"runs/.*?/policy.pt"', repr(str(path)), code), namespace)
    assert namespace["actor"].net[0].weight.shape == (16, 2)
    assert "{'mean_return': 35.0, 'std_return': 0.0, 'mean_length': 5.0}" in capsys.readouterr().out


def test_demonstrations_of_minari_become_a_file_as_the_readme_says(tmp_path, monkeypatch):
    _, code = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    numbers = np.random.default_rng(0)
    episodes = [
        SimpleNamespace(
            observations=numbers.normal(size=(length + 1, 2)), actions=numbers.uniform(-3, 1, (length, 1)), rewards=np.full(length, 7.0),
            terminations=np.arange(length) == length - 1, truncations=np.zeros(length, bool),
        )
        for length in (3, 5)
    ]  # fmt: skip
    dataset = SimpleNamespace(iterate_episodes=lambda: iter(episodes))
    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=lambda name, download: dataset))
    exec(code.replace("HalfCheetah-v5", "Corridor-v0").replace('"demos/', f'"{tmp_path}/'), {})
    demos, expert_return = diffail.load_demonstrations(tmp_path / "Corridor-v0.npz", "Corridor-v0", 2, diffail.make_env("Corridor-v0"))
    assert expert_return == 28
    np.testing.assert_allclose(demos["actions"], np.concatenate([episode.actions + 1 for episode in episodes]) / 2, rtol=1e-5, atol=1e-6)
    for i, episode in enumerate(episodes):
        rows = slice(3 * i, 3 + 5 * i)
        np.testing.assert_array_equal(demos["observations"][rows], episode.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(demos["next_observations"][rows], episode.observations[1:].astype(np.float32))


def test_readme_points_at_the_lines_it_names():
    assert "@@" not in (HERE / "README.md").read_text()
    links = re.findall(r"\[`(\w+)\.py:(\w+(?:\.\w+)?)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) >= 10
    for script, name, file, line in links:
        assert file == f"{script}.py"
        nodes = ast.parse((HERE / file).read_text()).body
        for part in name.split("."):
            (node,) = [node for node in nodes if getattr(node, "name", None) == part]
            nodes = node.body
        assert node.lineno == int(line), f"README says line {line} of {file} is {name}, which is line {node.lineno}"


def test_the_results_in_the_readmes_are_those_of_the_files():
    results = HERE / "benchmark" / "results"
    rows = re.findall(r"^\| \[.*?\]\((\S+)\.csv\) \|(.*)\|$", (results / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {path.stem for path in results.glob("*traj__s*.csv")}
    summary = re.search(r"\| environment, setting \|.*?\n\n", (HERE / "README.md").read_text(), re.S).group()
    for name, cells in rows:
        with open(results / f"{name}.csv", newline="") as file:
            evaluations = [(int(row["step"]), float(row["mean_return"])) for row in csv.DictReader(file)]
        config = json.loads((results / f"{name}.json").read_text())
        with np.load(HERE / "demos" / f"{config['args']['env_id']}.npz") as file:
            expert = np.mean(json.loads(file["metadata"].item())["returns"])
        steps, first, best, final, theirs, commits = (cell.strip() for cell in cells.split("|"))
        wanted = {"env": config["args"]["env_id"].split("-v")[0], "setting": name.split("__")[2], "trajectories": "1"}
        with open(HERE / "benchmark" / "paper" / "learning_curves.csv", newline="") as file:
            rows_of_paper = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
        algorithm = "DiffAIL" if "__diffail__" in name else "GAIL"
        curve, line = ([float(row["mean_return"]) for row in rows_of_paper if row["algorithm"] == key] for key in (algorithm, "expert"))
        assert theirs == (f"{100 * max(curve) / line[0]:.0f} %, {100 * sum(curve[-5:]) / 5 / line[0]:.0f} %" if curve else "")
        finished = config.get("finished_at_step") == evaluations[-1][0]
        assert steps == ("" if finished else "stopped at ") + f"{evaluations[-1][0] // 1000}k"
        assert first == next((f"{step // 1000}k" for step, value in evaluations if value >= expert), "no")
        last = [value for _, value in evaluations[-5:]]
        for cell, value in ((best, max(value for _, value in evaluations)), (final, sum(last) / len(last))):
            assert cell == (f"{round(value)}, {round(100 * value / expert)} %" if finished or cell is not final else "")
        env_id, _, setting, _, _, *variant = name.split("__")
        if not variant:
            (line,) = re.findall(rf"^\| {env_id}, {setting} \|(.*)\|$", summary, re.M)
            columns = (1, 3) if algorithm == "GAIL" else (0, 2)
            ours, papers = (line.split("|")[i].strip() for i in columns)
            shown = best.split(", ")[1] + (f", {final.split(', ')[1]}" if finished else f" until {evaluations[-1][0] // 1000}k")
            assert shown in ours.split("; ") and papers == theirs
        parts = [part["commit"] for part in (config, *config.get("resumed", []))]
        assert commits.split(", ") == list(dict.fromkeys(commit[:7] for commit in parts)) and "dirty" not in "".join(parts)
