"""Tests of the three scripts: mathematics against independent references, whole runs, bad input, the texts.

    python -m pytest
"""
import ast
import copy
import csv
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

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
from torch.utils import _pytree as pytree

import diffail
import gail_baseline
import sac_baseline

HERE = Path(__file__).parent
IMITATORS = [diffail, gail_baseline]
SCRIPTS = [*IMITATORS, sac_baseline]
STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
T, OBS, ACT = 10, 5, 2
name_of = lambda value: getattr(value, "__name__", None)  # noqa: E731
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
each_imitator = pytest.mark.parametrize("script", IMITATORS, ids=name_of)
each_form = pytest.mark.parametrize("form", ["paper", "released"])


@pytest.fixture(autouse=True)
def as_it_was():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- References: float64, nothing optimised, the same random numbers in the same order ---


def make_discriminator(script=diffail, dim=5, **options):
    """In float64, and away from its start, so that every term counts; and the data that it is scaled by."""
    expert = torch.randn(40, dim) * torch.tensor([3.0, 1, 1, 0.2, 1])[:dim] + 1
    d = script.Discriminator(expert, script.Args(**options)).double()
    for parameter in d.parameters():
        parameter.data.mul_(1.5)
    return d, expert.double()


def make_agent(script, device="cpu", **options):
    if script is sac_baseline:
        return script.SAC(OBS, ACT, script.Args(**options), device)
    demos = torch.randn(50, OBS), 2 * torch.rand(50, ACT) - 1, torch.randn(50, OBS)
    return script.Agent([part.to(device) for part in demos], script.Args(**options))


def plain_prediction(d, x_t, t):
    """eps_phi(x_t, t) with torch's own mish, each sample's time embedded by itself."""
    rates = [10_000 ** (-i / 7) for i in range(8)]
    rows = [[f(k * rate) for f in (math.sin, math.cos) for rate in rates] for k in t.tolist()]
    h = torch.cat([x_t, d.time_out(F.mish(d.time_in(torch.tensor(rows).to(x_t))))], 1)
    for layer in d.hidden:
        h = F.mish(layer(h))
    return d.out(h)


def plain_errors(d, x, t=None):
    """(eps - eps_phi)^2, from the linear schedule's formula up, with noise and t drawn here."""
    eps = torch.randn(x.shape, device=x.device).double()
    t = torch.randint(T, (len(x),), device=x.device) if t is None else t
    alpha_bar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 2e-2, T)), device=x.device)[t][:, None]
    return (eps - plain_prediction(d, alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps, t)) ** 2


def plain_d(errors, form):
    return torch.exp(-errors.mean(1)) if form == "paper" else torch.exp(-errors).mean(1)


def plain_logit(d, x):
    return d.net(x).squeeze(1).clamp(-10, 10)


def plain_loss(script, d, args, data, expert, policy):
    """The discriminator's objective and its parts: binary cross-entropies, autograd through its own gradient."""
    std, factor = data.std(0, correction=1), 2 if script is diffail else 1
    scale = (lambda x: (x - data.mean(0)) / (factor * std)) if args.normalize else lambda x: x
    expert, policy = scale(expert), scale(policy)
    n = len(expert)
    if script is diffail:
        errors = plain_errors(d, torch.cat([expert, policy]))
        parts = {"expert_loss": errors[:n].mean()}  # the entropy itself for the paper's D, else its bound
        d_policy = plain_d(errors[n:], args.objective_form)
        function = lambda x: plain_d(plain_errors(d, x), args.objective_form)  # noqa: E731
    else:
        d_expert, d_policy = (torch.sigmoid(plain_logit(d, x)) for x in (expert, policy))
        parts = {"expert_loss": F.binary_cross_entropy(d_expert, torch.ones_like(d_expert))}
        function = partial(plain_logit, d)
    parts["policy_loss"] = F.binary_cross_entropy(d_policy, torch.zeros_like(d_policy))
    total = (parts["expert_loss"] + parts["policy_loss"]) / (1 if script is diffail else 2)
    if args.grad_penalty:
        mix = torch.rand(n, 1, device=expert.device).double()
        x = (mix * expert + (1 - mix) * policy).requires_grad_()
        (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        parts["grad_penalty"] = ((grad.norm(dim=1) - 1) ** 2).mean()
        total = total + args.grad_penalty * parts["grad_penalty"]
    return total, parts


@torch.no_grad()
def plain_reward(script, d, args, data, x):
    """R by a plain loop over t."""
    if args.normalize:
        x = (x - data.mean(0)) / ((2 if script is diffail else 1) * data.std(0, correction=1))
    if script is gail_baseline:
        f = plain_logit(d, x)
        return -(1 - torch.sigmoid(f)).log() if args.reward_form == "paper" else torch.sigmoid(f).log()
    eps, errors = torch.randn(T, *x.shape, device=x.device).double(), []
    for k in range(T):
        alpha_bar = math.prod(1 - beta for beta in np.linspace(1e-4, 2e-2, T)[: k + 1])
        x_t = math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * eps[k]
        errors.append((eps[k] - plain_prediction(d, x_t, torch.full((len(x),), k))) ** 2)
    if args.reward_form == "paper":
        mean = sum(error.mean(1) for error in errors) / T
        return -(1 - torch.exp(-mean)).log()
    return -(1 - sum(torch.exp(-error).mean(1) for error in errors) / T).log()


# --- Diffusion and discriminator ---


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
def test_x_t_has_the_mean_and_variance_of_the_forward_diffusion(schedule):
    n, seen = 200_000, []
    d, _ = make_discriminator(dim=1, noise_schedule=schedule)
    d.predict_noise = lambda x_t, t: seen.append(x_t) or torch.zeros_like(x_t)
    for t in (0, 4, 9):
        alpha_bar = math.prod(1 - beta for beta in diffail.noise_schedule(schedule, T)[: t + 1].tolist())
        d.squared_error(torch.full((n, 1), 3.0), torch.full((n,), t))
        assert seen[-1].mean().item() == pytest.approx(3 * math.sqrt(alpha_bar), abs=5 / math.sqrt(n))
        assert seen[-1].var().item() == pytest.approx(1 - alpha_bar, rel=0.02)


def test_every_t_is_drawn_equally_often():
    seen, (d, _) = [], make_discriminator(diffusion_steps=4)
    d.predict_noise = lambda x_t, t: seen.append(t) or x_t
    d.squared_error(torch.zeros(40_000, 5))
    np.testing.assert_allclose(torch.bincount(seen[0], minlength=4) / 40_000, 0.25, atol=0.015)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_the_predicted_noise_is_that_of_the_plain_network_with_its_time_embedding(steps):
    (d, _), x_t, t = make_discriminator(diffusion_steps=steps), torch.randn(50, 5).double(), torch.arange(50) % steps
    expected = plain_prediction(d, x_t, t).detach()
    np.testing.assert_allclose(d.predict_noise(x_t, t).detach(), expected, atol=2e-5)  # of angles in float32
    assert steps == 1 or (expected - plain_prediction(d, x_t, 0 * t)).abs().max() > 0.01


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
    far = derivatives(diffail.mish, torch.tensor([-1e4, 1e4]))  # where torch's own second derivative is no number
    assert [value.tolist() for value in far] == [[0, 1e4], [0, 1], [0, 0]]


@each_form
def test_d_is_exp_of_minus_the_mean_error_or_the_mean_over_coordinates(form):
    (d, _), x = make_discriminator(), 2 * torch.randn(64, 5).double()
    torch.manual_seed(1)
    ours = 1 - d.one_minus_d(d.squared_error(x), form)
    torch.manual_seed(1)
    expected = plain_d(plain_errors(d, x), form)
    np.testing.assert_allclose(ours.detach(), expected.detach(), rtol=1e-5)
    assert ((ours > 0) & (ours < 1)).all()


@each_form
def test_log_one_minus_d_is_exact_and_its_gradient_finite_over_sixteen_decades(form):
    d, _ = make_discriminator()
    error = torch.logspace(-12, 4, 400).requires_grad_()
    value = d.one_minus_d(error[:, None].expand(-1, 3), form).log()  # of errors alike the two forms are the same
    (grad,) = torch.autograd.grad(value.sum(), error)
    exact = [math.log(-math.expm1(-v)) for v in error.double().tolist()]
    exact_grad = [1 / math.expm1(v) if v < 700 else 0.0 for v in error.double().tolist()]
    np.testing.assert_allclose(value.detach(), exact, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-4, atol=1e-6)
    zero = torch.zeros(1, 3, requires_grad=True)
    at_zero = d.one_minus_d(zero, form).log()
    assert torch.isfinite(torch.autograd.grad(at_zero.sum(), zero)[0]).all() and -80 < at_zero.item() < -60


CASES = [  # script and options of the discriminator
    (diffail, {"objective_form": "paper", "reward_form": "paper"}),
    (diffail, {"objective_form": "released", "normalize": True}),
    (diffail, {"objective_form": "paper", "grad_penalty": 0.3, "normalize": True, "reward_form": "paper"}),
    (diffail, {"objective_form": "released", "grad_penalty": 0.3}),
    (gail_baseline, {"grad_penalty": 0.0, "reward_form": "paper"}),
    (gail_baseline, {"grad_penalty": 4.0, "normalize": True}),
]


@pytest.mark.parametrize("script, options", CASES, ids=name_of)
def test_objective_its_gradient_and_the_reward_are_the_plain_ones(script, options):
    d, data = make_discriminator(script, **options)
    expert, policy = data[:16], 2 * torch.randn(16, 5).double()
    results = []
    for loss in (d.loss, partial(plain_loss, script, d, d.args, data)):
        torch.manual_seed(1)
        total, parts = loss(expert, policy)
        results.append((total, parts, torch.autograd.grad(total, list(d.parameters()), allow_unused=True)))
    (total, parts, gradients), (expected, expected_parts, expected_gradients) = results
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts.keys() == expected_parts.keys()
    for name, part in parts.items():
        assert part.item() == pytest.approx(expected_parts[name].item(), rel=1e-6), name
    for ours, theirs in zip(gradients, expected_gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-8)

    torch.manual_seed(1)
    rewards = d.reward(policy)
    torch.manual_seed(1)
    np.testing.assert_allclose(rewards, plain_reward(script, d, d.args, data, policy), rtol=1e-5)
    assert not rewards.requires_grad and rewards.shape == (16,)
    assert (rewards < 0).all() if (script, d.args.reward_form) == (gail_baseline, "released") else (rewards > 0).all()


@pytest.mark.parametrize("script, options", CASES[2:4] + CASES[5:], ids=name_of)
def test_gradient_penalty_and_all_gradients_are_those_of_finite_differences(script, options):
    d, data = make_discriminator(script, **options | {"normalize": False})
    expert, policy, h = data[:16], torch.randn(16, 5).double(), 1e-5

    def loss():
        torch.manual_seed(1)
        return d.loss(expert, policy)

    def output(x):  # with the noise and t that the penalty draws in loss
        torch.manual_seed(1)
        if script is gail_baseline:
            return d(x)
        d.squared_error(torch.cat([expert, policy]))
        torch.rand(16, 1)
        return d.one_minus_d(d.squared_error(x), d.args.objective_form)

    torch.manual_seed(1)
    if script is diffail:
        d.squared_error(torch.cat([expert, policy]))
    mix = torch.rand(16, 1)
    x = mix * expert + (1 - mix) * policy
    columns = [(output(x + h * e) - output(x - h * e)) / (2 * h) for e in torch.eye(5).double()]
    penalty = ((torch.stack(columns, 1).norm(dim=1) - 1) ** 2).mean()
    total, parts = loss()
    assert parts["grad_penalty"].item() == pytest.approx(penalty.item(), rel=1e-6)
    assert total.item() != pytest.approx((total - d.args.grad_penalty * penalty).item())

    gradients = torch.autograd.grad(total, list(d.parameters()))
    for parameter, gradient in zip(d.parameters(), gradients):
        direction, values = torch.randn_like(parameter), []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * h)
            values.append(loss()[0].item())
            parameter.data.sub_(direction, alpha=sign * h)
        difference = (values[0] - values[1]) / (2 * h)
        assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-3, abs=1e-8)


def test_gails_logit_is_clamped():
    d, _ = make_discriminator(gail_baseline)
    d.net[-1].weight.data.mul_(1000)
    x = torch.randn(64, 5).double()
    assert (d.net(x).abs() > 10).any() and d(x).abs().max() == 10


@each_imitator
def test_what_never_varies_is_only_centred(script):
    x = torch.randn(300, 4) * torch.tensor([5.0, 0.1, 0.0, 0.0]) + torch.tensor([2.0, -1.0, 0.0, 7.0])
    d = script.Discriminator(x, script.Args(normalize=True))
    scaled, std = (x - d.mean) / d.std, 0.5 if script is diffail else 1
    np.testing.assert_allclose(scaled.std(0), [std, std, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
    plain = script.Discriminator(x, script.Args(normalize=False))
    assert (plain.mean == 0).all() and (plain.std == 1).all()


@each_form
def test_rewards_are_finite_and_fall_with_the_error(form, monkeypatch):
    d = diffail.Discriminator(torch.randn(9, 1), diffail.Args(reward_form=form))
    nn.init.zeros_(d.out.weight)
    nn.init.zeros_(d.out.bias)  # the prediction is 0, so e^2 = eps^2
    noise = torch.cat([torch.zeros(1), torch.logspace(-6, 0.5, 200), torch.tensor([1e3])])
    monkeypatch.setattr(torch, "randn", lambda shape, **_: noise[:, None].expand(shape))
    rewards = d.reward(torch.zeros(202, 1))
    assert torch.isfinite(rewards).all() and (rewards.diff() < 0).all()
    assert rewards[0] > 60 and rewards[-1] == 0 and (rewards[:-1] > 0).all()


@pytest.fixture(scope="module")
def cheetah():
    """Pairs of states, of the expert and of a random policy."""
    env, rng = diffail.make_env("HalfCheetah-v4"), np.random.default_rng(0)
    (s, _, s_next), _ = diffail.load_demonstrations(HERE / "demos" / "HalfCheetah-v4.npz", env, 8)
    pairs, (state, _) = [], env.reset(seed=0)
    for i in range(4000):
        following, _, _, truncated, _ = env.step(rng.uniform(-1, 1, 6).astype(np.float32))
        pairs.append(np.concatenate([state, following]))
        state = env.reset(seed=i)[0] if truncated else following
    return torch.cat([s, s_next], 1), torch.from_numpy(np.array(pairs))


@each_imitator
def test_discriminator_separates_held_out_data_and_not_two_identical_sets(script, cheetah):
    expert, other = cheetah
    for policy, positive, negative, wanted in (
        (other[:2000], expert[4000:6000], other[2000:], (0.95, 1)),
        (expert[:4000], expert[4000:6000], expert[6000:8000], (0.45, 0.55)),
    ):
        d = script.Discriminator(expert[:4000], script.Args(grad_penalty=0.1))
        adam = torch.optim.Adam(d.parameters(), lr=1e-3)
        for _ in range(400):
            adam.zero_grad()
            batch = [data[torch.randint(len(data), (128,))] for data in (expert[:4000], policy)]
            d.loss(*batch)[0].backward()
            adam.step()
        area = (d.reward(positive)[:, None] > d.reward(negative)[None]).double().mean()  # under the ROC curve
        assert wanted[0] <= area <= wanted[1]


# --- SAC, replay buffer, one whole update ---


def numpy_mlp(net, x):
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in net if isinstance(m, nn.Linear)]
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ layers[-1][0].T + layers[-1][1]


def numpy_sample(actor, s, noise):
    mean, log_std = np.split(numpy_mlp(actor, s), 2, axis=1)
    std = np.exp(np.clip(log_std, -20, 2))
    u = mean + std * noise
    density = -((u - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
    return np.tanh(u), (density - np.log(1 - np.tanh(u) ** 2)).sum(1), mean, log_std


@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: tanh saturates, and 1 - a^2 is 0 in floating point
def test_log_prob_is_that_of_torch_distributions(scale):
    actor, s = diffail.mlp(3, 4).double(), torch.randn(50, 3).double()
    actor[-1].weight.data.mul_(scale)
    actor[-1].bias.data[:2] = 0.5 * scale
    torch.manual_seed(1)
    a, log_prob, mean, log_std = diffail.sample(actor, s)
    torch.manual_seed(1)
    u = mean + log_std.exp() * torch.randn_like(mean)
    # cache_size=1 lets the transform use u itself, where atanh(a) would be infinite
    policy = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)])
    transformed = policy.transforms[0](u)
    expected = policy.log_prob(transformed)
    assert (scale > 1) == (1 - a.float() ** 2 == 0).any().item()
    np.testing.assert_allclose(a.detach(), transformed.detach(), rtol=1e-12)
    np.testing.assert_allclose(log_prob.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    raw_mean, raw_log_std = actor(s).chunk(2, dim=1)
    assert torch.equal(mean, raw_mean) and torch.equal(log_std, raw_log_std.clamp(-20, 2))


@each_script
def test_critic_and_actor_loss_are_the_hand_written_ones(script):
    agent = make_agent(script)
    assert all(torch.equal(*pair) for pair in zip(agent.critics.parameters(), agent.targets.parameters()))
    assert not torch.equal(*(critic[0].weight for critic in agent.critics))
    agent.log_alpha.data.fill_(math.log(0.3))
    agent.double()
    for parameter in agent.targets.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    s, a, s_next, rewards = (torch.randn(7, *shape).double() for shape in ((OBS,), (ACT,), (OBS,), ()))
    discount = torch.tensor([0.9, 0, 0.9, 0.9, 0, 0.9, 0.9]) if script is sac_baseline else torch.tensor(0.99)
    noise = torch.randn(7, ACT, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    torch.manual_seed(5)
    loss, scalars = agent.critic_loss(s, a, s_next, rewards, *[discount][: script is sac_baseline])
    a_next, log_prob, *_ = numpy_sample(agent.actor, s_next.numpy(), noise)
    x_next, x = np.concatenate([s_next, a_next], 1), np.concatenate([s, a], 1)
    value = np.minimum(*(numpy_mlp(q, x_next)[:, 0] for q in agent.targets)) - 0.3 * log_prob
    y = rewards.numpy() + discount.numpy() * value
    expected = sum(0.5 * np.mean((numpy_mlp(q, x)[:, 0] - y) ** 2) for q in agent.critics)
    assert loss.item() == scalars["qf_loss"].item() == pytest.approx(expected, rel=1e-6)

    torch.manual_seed(5)
    loss, scalars = agent.actor_loss(s)
    a_new, log_prob, mean, log_std = numpy_sample(agent.actor, s.numpy(), noise)
    q = np.minimum(*(numpy_mlp(q, np.concatenate([s, a_new], 1))[:, 0] for q in agent.critics))
    expected = np.mean(0.3 * log_prob - q)
    assert scalars["actor_loss"].item() == pytest.approx(expected, rel=1e-6)
    assert scalars["entropy"].item() == pytest.approx(-log_prob.mean(), rel=1e-6)
    if script is sac_baseline:  # the target entropy is minus the actions' dimension
        expected -= math.log(0.3) * (log_prob.mean() - ACT)
    else:
        expected += 1e-3 * (np.mean(mean**2) + np.mean(log_std**2))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_replay_buffer_returns_what_was_stored_uniformly_from_its_window():
    buffer = diffail.ReplayBuffer(6, (2, 1), "cpu")
    for step in range(1, 7):
        buffer.add(step, np.array([step, 10 * step], np.float32), [100.0 * step])
        for window in (None, 1, 2, 3, 9):
            a, b = buffer.sample(2000, window)
            assert torch.equal(a[:, 1], 10 * a[:, 0]) and torch.equal(b[:, 0], 100 * a[:, 0])
            oldest = max(1, step + 1 - (window or 9))
            counts = torch.bincount(a[:, 0].long())
            assert len(counts) == step + 1 and not counts[:oldest].any()
            assert (counts[oldest:] > 0.8 * 2000 / (step + 1 - oldest)).all()


def plain_update(script, agent, buffer):
    """One update by plain formulas, from the same draws. Returns scalars and {name: (gradient, new parameter)}."""
    args, wide, updated = agent.args, copy.deepcopy(agent).double(), {}
    parameters = dict(wide.named_parameters())

    def draw(window=None):
        return [part.double() for part in buffer.sample(args.batch_size, window)]

    def pair(s, a, s_next):
        return torch.cat([s, s_next if args.state_only else a], 1)

    def adam(optimizer, network, loss, lr, beta1):
        names = [name for name in parameters if name.split(".")[0] == network]
        for name, grad in zip(names, torch.autograd.grad(loss, [parameters[name] for name in names])):
            state = optimizer.state[dict(agent.named_parameters())[name]]
            step = int(state.get("step", 0)) + 1
            m = beta1 * state.get("exp_avg", torch.zeros_like(grad)).double() + (1 - beta1) * grad
            v = 0.999 * state.get("exp_avg_sq", torch.zeros_like(grad)).double() + 0.001 * grad**2
            move = lr * (m / (1 - beta1**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            parameters[name].data -= move
            updated[name] = grad, parameters[name].detach().clone()

    def act(s):
        mean, log_std = wide.actor(s).chunk(2, dim=1)
        u = mean + log_std.exp() * torch.randn(mean.shape, device=s.device)
        log_prob = Independent(Normal(mean, log_std.exp()), 1).log_prob(u) - (1 - u.tanh() ** 2).log().sum(1)
        return u.tanh(), log_prob, (mean**2).mean() + (log_std**2).mean()

    def q_values(networks, s, a):
        return [network(torch.cat([s, a], 1))[:, 0] for network in networks]

    alpha = wide.log_alpha.exp().detach()
    s, a, s_next, *rest = draw()
    if script is sac_baseline:
        rewards, discount = rest[0][:, 0], args.gamma * (1 - rest[1][:, 0])
        scalars, critic_lr, actor_lr, beta1 = {"alpha": alpha}, args.critic_lr, args.actor_lr, 0.9
    else:
        d, data = wide.discriminator, agent.expert.double()
        rewards, discount = 2 * plain_reward(script, d, args, data, pair(s, a, s_next)), args.gamma
        expert = data[torch.randint(len(data), (args.batch_size,), device=s.device)]
        policy = pair(*draw(args.discriminator_window))
        total, scalars = plain_loss(script, d, args, data, expert, policy)
        scalars["surrogate_reward"] = rewards.mean()
        adam(agent.discriminator_adam, "discriminator", total, args.discriminator_lr, 0.9)
        critic_lr, actor_lr, beta1 = args.sac_lr, args.sac_lr, 0.25
        assert alpha.item() == pytest.approx(0.12 / ACT)

    a_next, log_prob, _ = act(s_next)
    value = torch.min(*q_values(wide.targets, s_next, a_next)) - alpha * log_prob
    target = (rewards + discount * value).detach()
    scalars["qf_loss"] = sum(0.5 * ((q - target) ** 2).mean() for q in q_values(wide.critics, s, a))
    adam(agent.critic_adam, "critics", scalars["qf_loss"], critic_lr, beta1)

    a_new, log_prob, squares = act(s)
    scalars["entropy"] = -log_prob.mean()
    scalars["actor_loss"] = (alpha * log_prob - torch.min(*q_values(wide.critics, s, a_new))).mean()
    regularizer = 0 if script is sac_baseline else 1e-3 * squares
    adam(agent.actor_adam, "actor", scalars["actor_loss"] + regularizer, actor_lr, beta1)
    if script is sac_baseline:
        alpha_loss = -wide.log_alpha * (log_prob.detach().mean() - ACT)
        adam(agent.actor_adam, "log_alpha", alpha_loss, actor_lr, beta1)
    for name in [name for name in parameters if name.startswith("targets.")]:
        source = parameters[name.replace("targets.", "critics.")]
        updated[name] = None, 0.995 * parameters[name] + 0.005 * source
    return scalars, updated


COMPILER = pytest.mark.skipif(os.system("g++ --version > /dev/null 2>&1") != 0, reason="there is no g++")
UPDATES = [
    (diffail, CASES[0][1], True, False),
    (diffail, CASES[1][1], False, False),
    (diffail, CASES[2][1], False, False),
    (gail_baseline, CASES[4][1], True, False),
    (gail_baseline, CASES[5][1], False, False),
    (sac_baseline, {"actor_lr": 2e-4, "critic_lr": 4e-4}, None, False),
    pytest.param(diffail, CASES[3][1], True, True, marks=COMPILER),
    pytest.param(gail_baseline, CASES[5][1], True, True, marks=COMPILER),
    pytest.param(sac_baseline, {}, None, True, marks=COMPILER),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("script, options, state_only, compiled", UPDATES, ids=name_of)
def test_an_update_is_that_of_the_plain_algorithm(script, options, state_only, compiled, device):
    options = {"batch_size": 32, "compile": compiled} | options
    if script is not sac_baseline:
        options |= {"state_only": state_only, "discriminator_window": 50}
    agent = make_agent(script, torch.device(device), **options)
    for parameter in agent.targets.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # away from the critics: the step must show
    widths = (OBS, ACT, OBS, 1, 1)[: 5 if script is sac_baseline else 3]
    buffer, rng = script.ReplayBuffer(500, widths, torch.device(device)), np.random.default_rng(0)

    def add(step):
        buffer.add(step, *[np.tanh(rng.normal(size=n)) for n in widths[:4]], *[[step % 2]] * (len(widths) > 4))

    for step in range(1, 301):
        add(step)
    update = partial(agent.update, buffer)
    if device == "cuda":  # the first three as they are, from the fourth on by the graph
        update = partial(next, script.graphed(update))
    random_state = torch.cuda if device == "cuda" else torch
    for step in range(301, 306):
        add(step)
        state = random_state.get_rng_state()
        expected, updated = plain_update(script, agent, buffer)
        random_state.set_rng_state(state)
        scalars = update()
        assert scalars.keys() == expected.keys()
        for name, value in expected.items():
            assert scalars[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
        for name, parameter in agent.named_parameters():
            gradient, value = updated[name]
            close = partial(np.testing.assert_allclose, parameter.detach().cpu(), value.detach().cpu())
            close(rtol=0, atol=2e-5, err_msg=name)
            if gradient is None:
                assert parameter.grad is None, name
            else:  # of its own loss alone
                atol = 1e-5 * gradient.abs().max().item() + 1e-9
                np.testing.assert_allclose(parameter.grad.cpu(), gradient.cpu(), 1e-4, atol, err_msg=name)
