"""Tests of the three scripts: mathematics against independent references, whole runs, bad input, the texts.

    python -m pytest
"""
import ast
import copy
import csv
import inspect
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
import zipfile
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._inductor.config
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import diffail
import gail_baseline
import sac_baseline

HERE = Path(__file__).parent
IMITATORS = [diffail, gail_baseline]
SCRIPTS = [*IMITATORS, sac_baseline]
PATHS = [HERE / f"{script.__name__}.py" for script in SCRIPTS]
STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
T, OBS, ACT = 10, 5, 2


def name_of(value):
    return getattr(value, "__name__", None)


each_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
each_imitator = pytest.mark.parametrize("script", IMITATORS, ids=name_of)


@pytest.fixture(autouse=True)
def as_it_was():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in STOPS}  # none ignored
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- References: float64, nothing optimised, the same random numbers in the same order ---


def make_discriminator(script=diffail, dim=5, **options):
    """In float64, and away from its start, so that every term counts; and the data that it is scaled by."""
    expert = torch.randn(40, dim) * torch.tensor([3.0, 1, 1, 0.2, 0])[:dim] + 1  # one that never varies
    d = script.Discriminator(expert, script.Args(**options)).double()
    for parameter in d.parameters():
        parameter.data.mul_(1.5)
    if script is gail_baseline:
        d.net[-1].weight.data.mul_(30)  # so that some logits are clamped
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


def draw(x):
    return torch.randn(x.shape, device=x.device).double(), torch.randint(T, (len(x),), device=x.device)


def plain_d(d, form, eps, t, x):
    """D(x) from the linear schedule's formula up, and -log of the paper's."""
    alpha_bar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 2e-2, T)), device=x.device)[t][:, None]
    error = (eps - plain_prediction(d, alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps, t)) ** 2
    return torch.exp(-error.mean(1)) if form == "paper" else torch.exp(-error).mean(1), error.mean(1)


def plain_logit(d, x):
    return d.net(x).squeeze(1).clamp(-10, 10)


def plain_scale(script, args, data, x):
    std = (2 if script is diffail else 1) * data.std(0, correction=1)
    return (x - data.mean(0)) / torch.where(std == 0, 1, std) if args.normalize else x


def plain_loss(script, d, args, data, expert, policy):
    """The discriminator's objective and its parts: cross-entropies, and a penalty by finite differences."""
    expert, policy, n = *(plain_scale(script, args, data, x) for x in (expert, policy)), len(expert)
    both, form, parts = torch.cat([expert, policy]), getattr(args, "objective_form", None), {}
    values, bound = plain_d(d, form, *draw(both), both) if form else (plain_logit(d, both).sigmoid(), None)
    entropy = F.binary_cross_entropy(values, (torch.arange(2 * n) < n).to(values), reduction="none")
    parts["expert_loss"] = entropy[:n].mean()
    if form:  # that of the paper's D, which for the other one is a bound
        assert parts["expert_loss"] < bound[:n].mean() * (1 + 1e-9)
        parts["expert_loss"] = bound[:n].mean()
    parts["policy_loss"] = entropy[n:].mean()
    total = sum(parts.values()) / (1 if form else 2)
    if args.grad_penalty:
        mix = torch.rand(n, 1, device=expert.device).double()
        x = mix * expert + (1 - mix) * policy
        output = partial(plain_d, d, form, *draw(x)) if form else lambda x: (plain_logit(d, x),)
        steps = 1e-5 * torch.eye(x.shape[1]).to(x)
        grad = torch.stack([(output(x + h)[0] - output(x - h)[0]) / 2e-5 for h in steps], 1)
        parts["grad_penalty"] = ((grad.norm(dim=1) - 1) ** 2).mean()
        total = total + args.grad_penalty * parts["grad_penalty"]
    return total, parts


@torch.no_grad()
def plain_reward(script, d, args, data, x):
    """R by a plain loop over t."""
    x = plain_scale(script, args, data, x)
    if script is gail_baseline:
        value = torch.sigmoid(plain_logit(d, x))
        return -(1 - value).log() if args.reward_form == "paper" else value.log()
    eps, errors = torch.randn(T, *x.shape, device=x.device).double(), []
    for k in range(T):
        alpha_bar = math.prod(1 - beta for beta in np.linspace(1e-4, 2e-2, T)[: k + 1])
        x_t = math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * eps[k]
        errors.append((eps[k] - plain_prediction(d, x_t, torch.full((len(x),), k))) ** 2)
    if args.reward_form == "paper":
        return -(1 - torch.exp(-sum(error.mean(1) for error in errors) / T)).log()
    return -(1 - sum(torch.exp(-error).mean(1) for error in errors) / T).log()


# --- Diffusion and discriminator ---


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_schedules_follow_their_formulas(steps):
    linear = [1e-4 + (2e-2 - 1e-4) * i / max(steps - 1, 1) for i in range(steps)]
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    cosine = [min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)]
    vp = [1 - math.exp(-0.1 / steps - 0.5 * 9.9 * (2 * i - 1) / steps**2) for i in range(1, steps + 1)]
    for name, expected in {"linear": linear, "cosine": cosine, "vp": vp}.items():
        betas = diffail.Discriminator.noise_schedule(name, steps)
        assert betas.dtype == torch.float64 and betas.shape == (steps,)
        np.testing.assert_allclose(betas, expected, rtol=1e-12)
        d, _ = make_discriminator(noise_schedule=name, diffusion_steps=steps)
        np.testing.assert_allclose(d.signal[:, 0] ** 2, (1 - betas).cumprod(0), rtol=1e-5)  # of x_t's mean
        np.testing.assert_allclose(d.noise[:, 0] ** 2, 1 - (1 - betas).cumprod(0), rtol=1e-5)  # its variance


def test_mish_and_its_first_two_derivatives_are_torchs():
    def derivatives(function, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        return function(x).detach(), slope.detach(), curvature

    x = torch.cat([torch.linspace(-60, 60, 2001), torch.tensor([-104.0, 0.0, 89.0])])
    mish = partial(diffail.Discriminator.mish, None)
    calls = (mish, x.double()), (mish, x), (F.mish, x.double())
    for ours, rounded, theirs in zip(*(derivatives(*call) for call in calls)):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)
        assert ((rounded - theirs).abs() <= 2e-7 * (1 + x.abs())).all()  # a rounding or two of x
    far = derivatives(mish, torch.tensor([-1e4, 1e4]))  # where torch's own curvature is not a number
    assert [value.tolist() for value in far] == [[0, 1e4], [0, 1], [0, 0]]


@pytest.mark.parametrize("form", ["paper", "released"])
def test_log_one_minus_d_is_exact_and_its_gradient_finite_over_sixteen_decades(form):
    d, _ = make_discriminator()
    error = torch.logspace(-12, 4, 400).requires_grad_()
    value = d.one_minus_d(error[:, None].expand(-1, 3), form).log()  # of errors alike both forms are one
    (grad,) = torch.autograd.grad(value.sum(), error)
    exact = [math.log(-math.expm1(-v)) for v in error.double().tolist()]
    exact_grad = [1 / math.expm1(v) if v < 700 else 0.0 for v in error.double().tolist()]
    np.testing.assert_allclose(value.detach(), exact, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-4, atol=1e-6)
    zero = torch.zeros(1, 3, requires_grad=True)
    at_zero = d.one_minus_d(zero, form).log()
    assert torch.isfinite(torch.autograd.grad(at_zero.sum(), zero)[0]).all() and -80 < at_zero.item() < -60


CASES = [  # script and options of the discriminator
    (diffail, {"objective_form": "paper", "reward_form": "released"}),
    (diffail, {"objective_form": "released", "normalize": True}),
    (diffail, {"objective_form": "paper", "grad_penalty": 0.3, "normalize": True, "reward_form": "paper"}),
    (diffail, {"objective_form": "released", "grad_penalty": 0.3, "reward_form": "paper"}),
    (gail_baseline, {"grad_penalty": 0.0, "reward_form": "paper"}),
    (gail_baseline, {"grad_penalty": 4.0, "normalize": True}),
]


@pytest.mark.parametrize("script, options", CASES, ids=name_of)
def test_objective_its_gradient_and_the_reward_are_the_plain_ones(script, options):
    d, data = make_discriminator(script, **options)
    expert, policy, results = data[:16], 2 * torch.randn(16, 5).double(), []
    for loss in (d.loss, partial(plain_loss, script, d, d.args, data)):
        torch.manual_seed(1)
        total, parts = loss(expert, policy)
        results.append((total, parts, torch.autograd.grad(total, list(d.parameters()), allow_unused=True)))
    (total, parts, gradients), (expected, expected_parts, expected_gradients) = results
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {name: part.item() for name, part in expected_parts.items()}, rel=1e-6
    )
    for ours, theirs in zip(gradients, expected_gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item() + 1e-9)
    torch.manual_seed(1)
    rewards = d.reward(policy)
    torch.manual_seed(1)
    np.testing.assert_allclose(rewards, plain_reward(script, d, d.args, data, policy), rtol=1e-5)
    assert not rewards.requires_grad and rewards.shape == (16,)


@each_imitator
def test_discriminator_separates_expert_from_random_and_not_two_identical_sets(script):
    env, path = diffail.make_env("HalfCheetah-v4"), HERE / "demos" / "HalfCheetah-v4.npz"
    (s, a, _), _ = diffail.load_demonstrations(path, env, 8)
    expert = torch.cat([s, a], 1)
    other = torch.cat([s, 2 * torch.rand(a.shape) - 1], 1)  # random actions in the expert's states
    for policy, held_out, low, high in ((other, other, 0.95, 1), (expert, expert, 0.45, 0.55)):
        d = script.Discriminator(expert, script.Args(grad_penalty=0.1))
        adam = torch.optim.Adam(d.parameters(), lr=1e-3)
        for _ in range(200):
            adam.zero_grad()
            d.loss(*(data[torch.randint(4000, (128,))] for data in (expert, policy)))[0].backward()
            adam.step()
        rewards = d.reward(expert[4000:6000]), d.reward(held_out[6000:8000])
        assert low <= (rewards[0][:, None] > rewards[1]).double().mean() <= high  # area under the ROC curve


# --- SAC, replay buffer, one whole update ---


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
    gaussian = Independent(Normal(mean, log_std.exp()), 1)
    policy = TransformedDistribution(gaussian, [TanhTransform(cache_size=1)])
    transformed = policy.transforms[0](u)
    expected = policy.log_prob(transformed)
    assert (scale > 1) == (1 - a.float() ** 2 == 0).any().item()
    np.testing.assert_allclose(a.detach(), transformed.detach(), rtol=1e-12)
    np.testing.assert_allclose(log_prob.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(mean, actor(s)[:, :2]) and torch.equal(log_std, actor(s)[:, 2:].clamp(-20, 2))


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
    """One update by plain formulas, from the same draws. Returns scalars and {name: (gradient, value)}."""
    args, wide, updated = agent.args, copy.deepcopy(agent).double(), {}
    parameters = dict(wide.named_parameters())

    def draw(window=None):
        return [part.double() for part in buffer.sample(args.batch_size, window)]

    def adam(optimizer, network, loss, lr, beta1):
        names = [name for name in parameters if name.split(".")[0] == network]
        for name, grad in zip(names, torch.autograd.grad(loss, [parameters[name] for name in names])):
            state = optimizer.state[dict(agent.named_parameters())[name]]
            step = int(state.get("step", 0)) + 1
            m = beta1 * state.get("exp_avg", torch.zeros_like(grad)).double() + (1 - beta1) * grad
            v = 0.999 * state.get("exp_avg_sq", torch.zeros_like(grad)).double() + 0.001 * grad**2
            parameters[name].data -= lr * m / (1 - beta1**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
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
        scalars, critic_lr, actor_lr, beta1, weight = {"alpha": alpha}, args.critic_lr, args.actor_lr, 0.9, 0
    else:
        d, data = wide.discriminator, agent.expert.double()
        rewards, discount = 2 * plain_reward(script, d, args, data, agent.pair(s, a, s_next)), args.gamma
        expert = data[torch.randint(len(data), (args.batch_size,), device=s.device)]
        policy = agent.pair(*draw(args.discriminator_window))
        total, scalars = plain_loss(script, d, args, data, expert, policy)
        scalars["surrogate_reward"] = rewards.mean()
        adam(agent.discriminator_adam, "discriminator", total, args.discriminator_lr, 0.9)
        critic_lr, actor_lr, beta1, weight = args.sac_lr, args.sac_lr, 0.25, 1e-3
        assert alpha.item() == pytest.approx(0.12 / ACT)

    a_next, log_prob, _ = act(s_next)
    value = torch.min(*q_values(wide.targets, s_next, a_next)) - alpha * log_prob
    target = (rewards + discount * value).detach()
    scalars["qf_loss"] = sum(0.5 * ((q - target) ** 2).mean() for q in q_values(wide.critics, s, a))
    adam(agent.critic_adam, "critics", scalars["qf_loss"], critic_lr, beta1)

    a_new, log_prob, squares = act(s)
    scalars["entropy"] = -log_prob.mean()
    scalars["actor_loss"] = (alpha * log_prob - torch.min(*q_values(wide.critics, s, a_new))).mean()
    adam(agent.actor_adam, "actor", scalars["actor_loss"] + weight * squares, actor_lr, beta1)
    if script is sac_baseline:
        alpha_loss = -wide.log_alpha * (log_prob.detach().mean() - ACT)
        adam(agent.actor_adam, "log_alpha", alpha_loss, actor_lr, beta1)
    for name in [name for name in parameters if name.startswith("targets.")]:
        critic = parameters[name.replace("targets", "critics")]
        updated[name] = None, 0.995 * parameters[name] + 0.005 * critic
    return scalars, updated


COMPILER = pytest.mark.skipif(os.system("g++ --version > /dev/null 2>&1") != 0, reason="there is no g++")
UPDATES = [(*case, i % 2 == 0, False) for i, case in enumerate(CASES)]  # with state_only, compiled
UPDATES += [(sac_baseline, {"actor_lr": 2e-4, "critic_lr": 4e-4}, None, False)]
COMPILED = [(*case, True, True) for case in (CASES[3], CASES[5], (sac_baseline, {}))]
UPDATES += [pytest.param(*case, marks=COMPILER) for case in COMPILED]


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("script, options, state_only, compiled", UPDATES, ids=name_of)
def test_an_update_is_that_of_the_plain_algorithm(script, options, state_only, compiled, device):
    options = {"batch_size": 32, "compile": compiled} | options
    options |= {} if script is sac_baseline else {"state_only": state_only, "discriminator_window": 50}
    agent = make_agent(script, torch.device(device), **options)
    assert not torch.equal(*(critic[0].weight for critic in agent.critics))
    for parameter, critic in zip(agent.targets.parameters(), agent.critics.parameters()):
        assert torch.equal(parameter, critic)  # at first; now away from the critics, so that the step shows
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    widths = (OBS, ACT, OBS, 1, 1)[: 5 if script is sac_baseline else 3]
    buffer, rng = script.ReplayBuffer(500, widths, torch.device(device)), np.random.default_rng(0)

    def add(step):
        buffer.add(step, *[np.tanh(rng.normal(size=n)) for n in widths[:4]], *[[step % 2]][: len(widths) - 3])

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
            gradient, value = (part if part is None else part.detach().cpu() for part in updated[name])
            np.testing.assert_allclose(parameter.detach().cpu(), value, rtol=0, atol=2e-5, err_msg=name)
            if gradient is None:
                assert parameter.grad is None, name
            else:  # of its own loss alone
                atol = 1e-5 * gradient.abs().max().item() + 1e-9
                np.testing.assert_allclose(parameter.grad.cpu(), gradient, 1e-4, atol, err_msg=name)


# --- Training loops, in small environments ---


class Corridor(gym.Env):
    """Ends after five steps, by a termination or a truncation. State: position, and which of them."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(np.array([-3.0], np.float32), np.array([1.0], np.float32))
    reward, penalty, actions = 7.0, 0.0, []  # the penalty is for steps of episodes that are truncated

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.truncates = 0, int(self.np_random.integers(2))
        return np.array([0, self.truncates], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        self.actions.append(float(action[0]))
        self.position += 1
        end, state = self.position == 5, np.array([self.position, self.truncates], np.float32)
        reward = self.reward - self.penalty * self.truncates
        return state, reward, end and not self.truncates, end and bool(self.truncates), {}


class Fall(Corridor):
    """Terminates from the third step on, which a time limit of six steps does not know of."""

    def step(self, action):
        state, reward, *_ = super().step(action)
        return state, reward, self.position >= 3, False, {}


BOX = gym.spaces.Box(-1, 1, (2,))
SPACES = {
    "Dict-v0": (gym.spaces.Dict(position=BOX), BOX),
    "Image-v0": (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
    "Unbounded-v0": (BOX, gym.spaces.Box(np.arange(40.0), np.inf, dtype=float)),  # printed on several lines
    "Whole-v0": (BOX, gym.spaces.Box(0, 5, (2,), np.int64)),
}
gym.register("Corridor-v0", entry_point=Corridor)
gym.register("Fall-v0", entry_point=Fall, max_episode_steps=6)
for env_id, (states, actions) in SPACES.items():
    spaces = {"observation_space": states, "action_space": actions}
    gym.register(env_id, entry_point=type("SpacesOnly", (gym.Env,), spaces))


def corridor_demos(path, episodes=3, env_id="Corridor-v0", **changes):
    """A demonstration file, written with numpy alone; a change that is None leaves its array out."""
    position, odd = np.tile(np.arange(5), episodes), np.repeat(np.arange(episodes) % 2, 5)
    arrays = {
        "observations": np.stack([position, odd], 1).astype(np.float32),
        "actions": np.linspace(-3, 1, 5 * episodes, dtype=np.float32)[:, None],
        "next_observations": np.stack([position + 1, odd], 1).astype(np.float32),
        "rewards": np.full(5 * episodes, 7, np.float32),
        "terminations": (position == 4) & (odd == 0),
        "truncations": (position == 4) & (odd == 1),
        "metadata": np.array(json.dumps({"env_id": env_id, "returns": [35.0] * episodes})),
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def train(script, folder, *more, env_id="Corridor-v0"):
    """A small run in this process; later options replace earlier ones. Returns its run directory."""
    words = f"--env-id {env_id} --learning-starts 20 --batch-size 16 --total-timesteps 100 --eval-every 50"
    words += f" --eval-episodes 2 --device cpu --threads 1 --compile False --output-dir {folder}/runs"
    if script is not sac_baseline:
        folder.mkdir(exist_ok=True)
        if not (demos := folder / "demos.npz").exists():
            corridor_demos(demos, env_id=env_id)
        words += f" --demos {demos} --cut-probability 1"
    args = tyro.cli(script.Args, args=[*words.split(), *map(str, more)])
    script.train(args)
    return run_dir_of(args.output_dir, script)


def run_dir_of(folder, script):
    (run_dir,) = folder.glob(f"*__{script.__name__}__*")
    return run_dir


def rows_of(run_dir):
    with open(run_dir / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars_of(run_dir):
    """{tag: [(step, value)]} of TensorBoard, without the times."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(scalar.step, scalar.value) for scalar in events.Scalars(tag)] for tag in tags}


def state_of(run_dir):
    """All that a checkpoint holds, to the bit, but for times and arguments; evaluations and policy."""
    state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    del state["args"], state["run"]["seconds"]
    policy = torch.load(run_dir / "policy.pt", map_location="cpu", weights_only=True)
    content = (run_dir / "evaluations.csv").read_text(), policy, state
    return pytree.tree_map(lambda x: x.numpy().tobytes() if torch.is_tensor(x) else x, content)


def stored(run_dir):
    """s, a and s_next of all steps that an imitator's run in the corridor has stored."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["rows"].split((2, 1, 2), dim=1)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def one_line(capsys, code, call, *arguments):
    """Makes the call, which ends with this exit code and one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call(*arguments)
    err = capsys.readouterr().err
    assert (exit_.value.code, err.count("\n")) == (code, 1), (exit_.value.code, err)
    return err


def test_sac_bootstraps_through_truncations_and_not_through_terminations(tmp_path, monkeypatch):
    calls, seen, original = [], set(), sac_baseline.SAC.critic_loss
    spy = lambda *batch: calls.append(batch) or original(*batch)  # noqa: E731
    monkeypatch.setattr(sac_baseline.SAC, "critic_loss", spy)
    train(sac_baseline, tmp_path)
    for *_, s_next, rewards, discount in calls:
        terminated = (s_next[:, 0] == 5) & (s_next[:, 1] == 0)
        assert torch.equal(discount, 0.99 * (1 - terminated.float())) and (rewards == 7).all()
        seen |= {tuple(row) for row in s_next.int().tolist()}
    assert len(calls) == 80 and {(5, 0), (5, 1)} <= seen  # both kinds of end were in the batches


@each_script
def test_only_sac_learns_from_the_true_reward(script, tmp_path, monkeypatch):
    first = train(script, tmp_path / "1")
    monkeypatch.setattr(Corridor, "reward", -9.0)
    second = train(script, tmp_path / "2")
    assert [rows_of(run_dir)[-1]["mean_return"] for run_dir in (first, second)] == ["35.000", "-45.000"]
    (_, policy, state), (_, other_policy, other) = state_of(first), state_of(second)
    same = policy == other_policy and state["learned"] == other["learned"] and state["rows"] == other["rows"]
    assert same == (script is not sac_baseline)


@pytest.mark.parametrize("probability, shares", [
    (1, [1, 0, 0, 0]), (0.4, [0.4, 0.24, 0.144, 0.216]), (0, [0, 0, 0, 1]),
])  # fmt: skip
@each_imitator
def test_after_a_fall_training_is_cut_by_chance_in_each_step(script, probability, shares, tmp_path):
    more = "--total-timesteps", 6000, "--learning-starts", 5990, "--eval-every", 6000
    run_dir = train(script, tmp_path, *more, "--cut-probability", probability, env_id="Fall-v0")
    positions = stored(run_dir)[2][:, 0].int()
    lengths = positions[:-1][positions[1:] == 1]  # 3, where it is cut at the fall, to 6, the time limit
    found = [(lengths == length).float().mean().item() for length in (3, 4, 5, 6)]
    assert len(lengths) >= 999 and found == pytest.approx(shares, abs=0.06 * (0 < probability < 1))
    for tag, value in {"charts/episodic_return": 21, "charts/episodic_length": 3}.items():  # up to the fall
        steps, values = zip(*scalars_of(run_dir)[tag])
        assert {*values} == {value} and [*steps[: len(lengths)]] == lengths.cumsum(0).tolist()
    assert rows_of(run_dir)[0]["mean_length"] == "3.000"  # evaluations end where the task does


def test_actions_are_scaled_to_the_bounds_and_back():
    env, actor = diffail.make_env("Corridor-v0"), diffail.mlp(2, 2)
    env.reset(seed=0)
    for action, expected in ((-1.0, -3.0), (0.0, -1.0), (1.0, 1.0)):
        env.step(np.array([action], np.float32))
        assert Corridor.actions[-1] == pytest.approx(expected)
    s, a, s_next, *_ = diffail.play_episode(actor, env, seed=0)
    np.testing.assert_allclose(a, actor(torch.from_numpy(s))[:, :1].tanh().detach(), rtol=1e-5)
    np.testing.assert_allclose(Corridor.actions[-5:], 2 * a[:, 0] - 1, rtol=1e-5)
    np.testing.assert_array_equal(s_next[:, 0], [1, 2, 3, 4, 5])


@pytest.mark.parametrize("state_only", [False, True])
@each_imitator
def test_what_the_discriminator_gets(script, state_only, tmp_path, monkeypatch):
    def tuples(x):
        return {tuple(row) for row in np.round(x, 4).tolist()}

    calls, original = [], script.Discriminator.loss
    spy = lambda *batch: calls.append(batch) or original(*batch)  # noqa: E731
    monkeypatch.setattr(script.Discriminator, "loss", spy)
    more = "--discriminator-window", 30, "--total-timesteps", 150, "--num-trajectories", 2
    run_dir = train(script, tmp_path, *more, *["--state-only"] * state_only)
    with np.load(tmp_path / "demos.npz") as file:  # of two episodes, not three
        s, a, s_next = (file[name][:10] for name in diffail.NAMES[:3])
    expected = np.concatenate([s, s_next if state_only else (a + 1) / 2], 1)
    assert tuples(torch.cat([expert for _, expert, _ in calls]).numpy()) == tuples(expected)
    s, a, s_next = stored(run_dir)
    x = torch.cat([s, s_next if state_only else a], 1).numpy()
    assert len(calls) == 130
    for i, (_, _, policy) in enumerate(calls):  # the update at step 21 + i comes before that step
        assert tuples(policy.numpy()) <= tuples(x[max(0, i - 10) : i + 20])


@each_imitator
def test_evaluations_correlate_surrogate_and_true_returns(script, monkeypatch):
    agent, rng = make_agent(script), np.random.default_rng(0)
    episodes, surrogates, returns = [], [], [3, -1, 2.5, 8]
    d = copy.deepcopy(agent.discriminator).double()
    for value, n in zip(returns, (4, 9, 6, 7)):
        s, a, s_next = (rng.normal(size=(n, width)).astype(np.float32) for width in (OBS, ACT, OBS))
        episodes.append([s, a, s_next, np.full(n, value / n), None, None])
        x = torch.from_numpy(np.concatenate([s, a], 1)).double()
        torch.manual_seed(0)
        surrogates.append(2 * plain_reward(script, d, agent.args, agent.expert, x).sum().item())
    monkeypatch.setattr(script, "play_episode", lambda actor, env, seed: episodes[seed])

    def evaluate(order: list[int]) -> dict:
        """The evaluation of these episodes."""
        monkeypatch.setattr(script, "episode_seed", lambda *key: order[key[-1]])
        agent.args.eval_episodes = len(order)
        return script.evaluate(agent, None, 10)

    before = torch.manual_seed(9).get_state()
    row = evaluate([0, 1, 2, 3])
    assert torch.equal(before, torch.get_rng_state())  # the run goes on as it would without
    expected = {"mean_return": np.mean(returns), "std_return": np.std(returns), "mean_length": 6.5}
    correlation = np.corrcoef(surrogates, returns)[0, 1]
    expected |= {"mean_surrogate_return": np.mean(surrogates), "reward_correlation": correlation}
    assert row == pytest.approx(expected, rel=1e-3)
    episodes[0][3], episodes[1][3] = np.array([0.1]), np.array([0.1])
    for same in ([0], [1, 1, 1], [2] * 10, [0, 1] * 5):
        assert math.isnan(evaluate(same)["reward_correlation"])


HOPPER = {"total_timesteps": 750_000, "normalize": True, "discriminator_window": 100_000}


@pytest.mark.parametrize("script, env_id, expected", [
    (diffail, "HalfCheetah-v4", {}),
    (diffail, "Hopper-v4", HOPPER | {"objective_form": "released", "grad_penalty": 0.1}),
    (diffail, "Walker2d-v5", {"total_timesteps": 750_000}),
    (diffail, "Ant-v4", {"alpha": 0.06}),
    (gail_baseline, "Hopper-v4", HOPPER),
    (gail_baseline, "Ant-v4", {}),
], ids=name_of)  # fmt: skip
@pytest.mark.parametrize("given", [{}, {"grad_penalty": 0.5, "total_timesteps": 9_000, "alpha": 0.3}])
def test_robots_defaults_are_the_command_lines(script, env_id, expected, given, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise SystemExit("config.json is written")

    with np.load(HERE / "demos" / f"{env_id.split('-')[0]}-v4.npz") as file:
        metadata = json.dumps(json.loads(file["metadata"].item()) | {"env_id": env_id})
        np.savez(demos := tmp_path / "demos.npz", **dict(file) | {"metadata": metadata})
    given = given | {"env_id": env_id, "demos": demos, "output_dir": tmp_path, "compile": False}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", stop)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    with pytest.raises(SystemExit, match="is written"):
        runpy.run_path(str(HERE / f"{script.__name__}.py"), run_name="__main__")
    used = json.loads((run_dir_of(tmp_path, script) / "config.json").read_text())["args"]
    for name, value in (vars(script.Args()) | expected | given).items():
        assert str(used[name]) == str(value), name


# --- Stop and resume ---


@each_script
def test_a_run_stopped_by_signals_and_resumed_is_whole(script, whole_runs, tmp_path, monkeypatch, capsys):
    (_, *options), _, whole = whole_runs[script]
    play = partial(train, script, tmp_path, *options, env_id="InvertedPendulum-v4")
    # At the first step, before learning, in an episode, in an evaluation's step, one before the last
    stops, add = dict(zip((1, 577, 750, 800, 999), [*STOPS, *STOPS])), script.ReplayBuffer.add

    def stop(self, step, *parts):
        add(self, step, *parts)
        if step in stops:
            signal.raise_signal(stops.pop(step))

    monkeypatch.setattr(script.ReplayBuffer, "add", stop)
    for step, number in list(stops.items()):
        assert str(step) in one_line(capsys, 128 + number, play, "--resume")
        stopped = run_dir_of(tmp_path / "runs", script)
        time.sleep(1.1)  # TensorBoard orders files of one process by their names' seconds alone
        assert torch.load(stopped / "checkpoint.pt", weights_only=True)["run"]["step"] == step
    for _ in range(2):  # to its end, and again, when nothing is left to do
        assert play("--resume") == stopped and state_of(stopped) == state_of(whole)
        assert str(stopped) in capsys.readouterr().out
    assert repr(scalars_of(stopped)) == repr(scalars_of(whole))  # repr, as nan is not nan
    monkeypatch.undo()
    assert rows_of(play("--seed", 2, "--output-dir", tmp_path / "other")) != rows_of(whole)


@each_script
def test_a_signal_that_is_ignored_as_by_nohup_stays_ignored(script, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train(script, tmp_path)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@each_script
@pytest.mark.parametrize("name", ["checkpoint.pt", "policy.pt", "evaluations.csv", "config.json"])
def test_a_run_that_dies_while_it_writes_is_finished_by_resume(script, name, tmp_path, monkeypatch):
    whole, write_file = train(script, tmp_path / "1"), script.write_file

    def dies(path, content):
        if path.name == name and (path.parent / "config.json").exists():
            raise KeyError("as if it were killed")
        write_file(path, content)

    for _ in range(2):  # with nothing or the first evaluation's files, and again
        monkeypatch.setattr(script, "write_file", dies)
        with pytest.raises(KeyError):
            train(script, tmp_path / "2", "--resume")
        monkeypatch.undo()
    resumed = train(script, tmp_path / "2", "--resume")
    assert state_of(resumed) == state_of(whole)
    assert json.loads((resumed / "config.json").read_text())["finished_at_step"] == 100


@each_script
def test_nothing_is_overwritten(script, tmp_path, capsys):
    run_dir = train(script, tmp_path)
    corridor_demos(other := tmp_path / "other.npz", actions=np.zeros((15, 1), np.float32))
    before = contents(tmp_path)
    refused = [("--resume",), ("--batch-size", 17, "--resume"), ("--gamma", 0.5, "--resume")]
    refused += [("--total-timesteps", 60, "--resume")]
    if script is sac_baseline:
        refused += [("--save-demos", run_dir / "policy.pt", "--seed", 2)]
    else:
        refused += [("--alpha", 0.3, "--resume"), ("--demos", other, "--resume")]
    for option, *more in refused:
        line = one_line(capsys, 2, train, script, tmp_path, *[option, *more][not more :])
        assert option in line or option[2:].replace("-", "_") in line
    assert contents(tmp_path) == before


@each_script
def test_a_finished_run_without_its_checkpoint_is_not_begun_anew(script, tmp_path, capsys):
    (train(script, tmp_path) / "checkpoint.pt").unlink()
    before = contents(tmp_path)
    assert "finished" in one_line(capsys, 2, train, script, tmp_path, "--resume")
    assert contents(tmp_path) == before


@each_script
def test_random_damage_to_a_checkpoint_is_seen(script, tmp_path, capsys):
    path, chance = train(script, tmp_path) / "checkpoint.pt", random.Random(0)
    whole, state = path.read_bytes(), state_of(path.parent)
    for _ in range(70):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert state_of(train(script, tmp_path, "--resume")) == state  # a byte between the parts
        except SystemExit as exit_:
            assert exit_.code == 2
    capsys.readouterr()


@each_script
def test_a_checkpoint_of_other_shapes_is_refused(script, tmp_path, capsys):
    path = train(script, tmp_path) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    one, rows = copy.deepcopy(state["learned"][1]), state["rows"]
    one["state"][0]["exp_avg"] = one["state"][0]["exp_avg"][:1].clone()
    changes = [{"rows": rows[:1].clone()}, {"rows": rows[:, :1].clone()}]
    changes += [{"run": state["run"] | {"step": "100"}}, {"run": state["run"] | {"csv": None}}]
    agent, _, *others = state["learned"]
    changes += [{"learned": [agent, one, *others]}]
    for change in changes:
        torch.save(state | change, path)
        before = contents(tmp_path)
        assert "cannot be read" in one_line(capsys, 2, train, script, tmp_path, "--resume")
        assert contents(tmp_path) == before


@each_script
def test_a_damaged_checkpoint_is_one_line_and_left_as_it_is(script, tmp_path, capsys):
    path = train(script, tmp_path) / "checkpoint.pt"
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    foreign = train(sac_baseline if script is diffail else diffail, tmp_path / "foreign") / path.name
    damaged = [b"", whole[: len(whole) // 2], whole[:-100], b"not a checkpoint", foreign.read_bytes()]
    for part in state:
        torch.save({name: value for name, value in state.items() if name != part}, tmp_path / "part.pt")
        damaged.append((tmp_path / "part.pt").read_bytes())
    for content in damaged:
        path.write_bytes(content)
        line = one_line(capsys, 2, train, script, tmp_path, "--resume", "--total-timesteps", 200)
        assert str(path.parent) in line and path.read_bytes() == content


@each_script
def test_no_file_can_run_code(script, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    torch.save({"args": {}, "run": Hostile()}, tmp_path / "hostile.pt")
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    (tmp_path / "it ran").unlink()  # so the payload does its work where something runs it
    checkpoint, hostile = train(script, tmp_path) / "checkpoint.pt", (tmp_path / "hostile.pt").read_bytes()
    corridor_demos(demos := tmp_path / "demos.npz", observations=np.array([Hostile()] * 15, dtype=object))
    for path, whole, *option in (checkpoint, hostile, "--resume"), (demos, demos.read_bytes()):
        for content in (whole, pickle.dumps(Hostile(), protocol=2)):
            path.write_bytes(content)
            with pytest.raises(SystemExit):  # for SAC, which reads no demonstrations, as the run exists
                train(script, tmp_path, *option)
    assert not (tmp_path / "it ran").exists()


@each_script
def test_a_full_disk_leaves_the_last_checkpoint(script, tmp_path, capsys):
    path = train(script, tmp_path, "--total-timesteps", 63) / "checkpoint.pt"
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 200, hard))  # bytes a file may have
    try:
        line = one_line(capsys, 2, train, script, tmp_path, "--resume", "--total-timesteps", 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in line and path.read_bytes() == before
    longer = train(script, tmp_path, "--resume", "--total-timesteps", 200)
    assert state_of(longer) == state_of(train(script, tmp_path / "whole", "--total-timesteps", 200))


@each_script
def test_what_is_not_finite_ends_the_run(script, tmp_path, monkeypatch, capsys):
    path = train(script, tmp_path) / "checkpoint.pt"
    kind, before, steps = vars(script).get("SAC") or script.Agent, path.read_bytes(), iter(range(101, 201))
    update = kind.update

    def broken(self, buffer):
        scalars = update(self, buffer)
        if next(steps) == 150:
            self.critics[0][0].weight.data[0, 0] = math.nan
        return scalars

    monkeypatch.setattr(kind, "update", broken)
    line = one_line(capsys, 1, train, script, tmp_path, "--resume", "--total-timesteps", 200)
    assert "critics.0.0.weight is not finite at step 150" in line and path.read_bytes() == before


# --- Demonstrations and bad input ---


@pytest.mark.parametrize("path", sorted((HERE / "demos").glob("*.npz")), ids=lambda path: path.stem)
def test_recorded_demonstrations(path):
    env = diffail.make_env(path.stem)
    with np.load(path, allow_pickle=False) as file:
        data, metadata = dict(file), json.loads(file["metadata"].item())
    ends, returns = np.flatnonzero(data["terminations"] | data["truncations"]) + 1, metadata["returns"]
    assert len(ends) == len(returns) == 16 and np.std(returns) < 0.05 * np.mean(returns)
    near = {"HalfCheetah": 4461, "Hopper": 3401, "Ant": 4226, "Walker2d": 4600}[path.stem[:-3]]
    assert np.mean(returns) == pytest.approx(near, rel=0.05)  # the paper's, but for Walker2d
    for start, end, expected in zip([0, *ends[:-1]], ends, returns):
        assert data["rewards"][start:end].sum(dtype=np.float64) == pytest.approx(expected, rel=1e-5)
        followed = data["observations"][start + 1 : end]
        np.testing.assert_array_equal(followed, data["next_observations"][start : end - 1])
    for n in (1, 4, 16):
        demos, expert_return = diffail.load_demonstrations(path, env, n)
        assert {len(part) for part in demos} == {ends[n - 1]} and expert_return == np.mean(returns)


def test_recorded_episodes_are_the_policys_without_those_that_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Corridor, "penalty", 1.0)
    record = partial(train, sac_baseline, tmp_path, "--demo-episodes", 4, "--save-demos")
    path = tmp_path / "new folder" / "demos.npz"
    run_dir = record(path, "--min-demo-return", 35)
    actor = diffail.mlp(2, 2)
    actor.load_state_dict(torch.load(run_dir / "policy.pt", weights_only=True))
    (s, a, s_next), expert_return = diffail.load_demonstrations(path, diffail.make_env("Corridor-v0"), 3)
    assert expert_return == 35 and s.shape == (15, 2) and a.shape == (15, 1)
    assert torch.equal(s[:, 0], torch.arange(5).repeat(3).float()) and torch.equal(s_next[:, 0], s[:, 0] + 1)
    np.testing.assert_allclose(a, actor(s)[:, :1].tanh().detach(), rtol=1e-5, atol=1e-6)
    with np.load(path) as file:
        metadata = json.loads(file["metadata"].item())
        np.testing.assert_allclose(file["actions"][:15], 2 * a - 1, atol=1e-5)  # in the environment's units
        assert not file["truncations"].any() and file["terminations"].sum() == 4
    tried = {sac_baseline.episode_seed(1, 2, i) for i in range(4 + metadata["episodes_skipped"])}
    assert metadata["returns"] == [35.0] * 4 and set(metadata["episode_seeds"]) < tried
    again = partial(record, tmp_path / "none.npz", "--resume")
    assert "--min-demo-return" in one_line(capsys, 1, again, "--min-demo-return", 36)
    assert not (tmp_path / "none.npz").exists()
    again()  # of a finished run
    assert (tmp_path / "none.npz").exists()


@pytest.mark.parametrize("target, reached", [(36, False), (-100, True), (35, True)])
def test_a_target_return_ends_training_and_decides_about_recording(target, reached, tmp_path, capsys):
    path = tmp_path / "demos.npz"
    play = partial(train, sac_baseline, tmp_path, "--demo-episodes", 2, "--save-demos", path)
    for resume in ([], ["--resume"]):  # resumed, the run is found finished
        if not reached:
            assert "--target-return" in one_line(capsys, 1, play, "--target-return", target, *resume)
        else:
            assert [row["step"] for row in rows_of(play("--target-return", target, *resume))] == ["50"]
            path.unlink()
    assert not path.exists()
    assert play("--resume") and path.exists()  # asked for as it is


def spoiled(**changes):
    """Writes demonstrations with these arrays made from the right ones."""
    def write(path):
        with np.load(path) as file:
            changed = {name: change and change(file[name].copy()) for name, change in changes.items()}
        corridor_demos(path, **changed)
    return write  # fmt: skip


DAMAGES = {  # what is done to the demonstrations' file, and what the message names beside its path
    "missing": (Path.unlink, "sac_baseline.py --env-id Corridor-v0 --save-demos"),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "folder": (lambda path: path.unlink() or path.mkdir(), ""),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-200]), ""),
    "text": (lambda path: path.write_text("observations,actions\n1,2\n"), ""),
    "pickle": (spoiled(observations=lambda x: np.array([{}] * len(x), dtype=object)), ""),
    "no-actions": (spoiled(actions=None), ""), "no-metadata": (spoiled(metadata=None), ""),
    "extra-dimension": (spoiled(observations=lambda x: x[None]), ""),
    "scalar": (spoiled(rewards=lambda x: x[0]), ""),
    "other-width": (spoiled(observations=lambda x: x[:, :1]), ""),
    "lengths": (spoiled(actions=lambda x: x[:-1]), ""),
    "nan": (spoiled(observations=lambda x: np.put(x, 7, np.nan) or x), "row 3 is not finite"),
    "infinity": (spoiled(next_observations=lambda x: np.put(x, 7, np.inf) or x), "row 3 is not fin"),
    "next-is-same": (spoiled(next_observations=lambda x: x - [1, 0]), "row 0: next_obs"),
    "shuffled": (spoiled(observations=lambda x: x[::-1]), "row 0: next_observations"),
    "ends-late": (spoiled(**dict.fromkeys(diffail.NAMES[4:], lambda x: np.roll(x, 1))), "row 14, the last"),
    "last-is-no-end": (spoiled(terminations=lambda x: x & (np.arange(15) < 14)), "2 episodes and 3 returns"),
    "cut-off": (spoiled(**dict.fromkeys(diffail.NAMES, lambda x: x[:14]), metadata=lambda _: np.array(
        '{"env_id": "Corridor-v0", "returns": [35, 35]}')), "row 13, the last, ends no episode"),
    "other-return": (spoiled(metadata=lambda _: np.array(
        '{"env_id": "Corridor-v0", "returns": [35, 36, 35]}')), "row 9: returns"),
    "returns": (spoiled(metadata=lambda _: np.array('{"env_id": "Corridor-v0", "returns": [1]}')), "3 e"),
    "no-array": (lambda path: zipfile.ZipFile(corridor_demos(path, actions=None), "a").writestr(
        "actions.npy", b"text"), "arrays of shapes"),
    "bounds": (spoiled(actions=lambda x: np.put(x, 3, 1.5) or x), "bounds"),
    "return": (spoiled(metadata=lambda _: np.array('{"env_id": "Corridor-v0", "returns": [NaN]}')), ""),
    "environment": (spoiled(metadata=lambda _: np.array('{"env_id": "Ant-v4", "returns": [1]}')), "Ant-v4"),
    "ends-as-floats": (spoiled(truncations=lambda x: x.astype(np.float32)), ""),
    "no-transitions": (spoiled(**dict.fromkeys(diffail.NAMES, lambda x: x[:0])), ""),
    "no-whole-episode": (spoiled(**dict.fromkeys(diffail.NAMES, lambda x: x[:4])), ""),
}  # fmt: skip
WRONG = """--num-trajectories 4; --num-trajectories 0; --env-id NoSuch-v0; --env-id HalfCheetah-v2; --seed -1
--env-id CartPole-v1; --env-id FrozenLake-v1; --env-id Dict-v0; --env-id Image-v0; --env-id Unbounded-v0
--env-id Whole-v0; --diffusion-steps 0; --discriminator-lr -1; --sac-lr nan; --actor-lr nan; --critic-lr inf
--alpha 0; --alpha -1; --grad-penalty inf; --cut-probability 1.5; --discriminator-window 0; --batch-size 0
--batch-size -3; --threads 0; --eval-every 0; --eval-episodes 0; --demo-episodes 0
--seed 99999999999999999999; --learning-starts 100; --compile True; --gamma nan; --gamma 1.5
--output-dir {0}/file; --output-dir /proc/1; --save-demos {0}/file/demos.npz; --save-demos {0}/file"""
OPTIONS = [words.split() for words in re.split("; |\n", WRONG)]
OF_SCRIPTS = [(x, *y) for x in SCRIPTS for y in OPTIONS if y[0][2:].replace("-", "_") in vars(x.Args())]


def refused(script, name, value, tmp_path, capsys):
    before = contents(tmp_path)
    line = one_line(capsys, 2, train, script, tmp_path, name, value)
    assert contents(tmp_path) == before and len(line) < 500  # nothing is made, and the line can be read
    return line


@pytest.mark.parametrize("damage", DAMAGES)
@each_imitator
def test_demonstrations_that_are_not_right_are_one_line_and_exit_code_2(script, damage, tmp_path, capsys):
    (change, message), path = DAMAGES[damage], corridor_demos(tmp_path / "damaged.npz")
    corridor_demos(tmp_path / "demos.npz")
    change(path)
    line = refused(script, "--demos", path, tmp_path, capsys)
    assert str(path) in line and message in line


@each_imitator
def test_what_is_odd_about_demonstrations_is_said_and_they_are_used(script, tmp_path, capsys):
    made = json.dumps({"env_id": "Corridor-v0", "returns": [35.0] * 3, "versions": {"mujoco": "3.4.0"}})
    plain = corridor_demos(tmp_path / "1.npz")
    odd = corridor_demos(tmp_path / "2.npz", rewards=np.full(15, 7.0), metadata=np.array(made))
    gaps = json.dumps({"env_id": "Corridor-v0", "returns": [35.0] * 3, "subsampled": True})
    s_next = np.full((15, 2), 9, np.float32)
    gappy = corridor_demos(tmp_path / "3.npz", metadata=np.array(gaps), next_observations=s_next)
    env = script.make_env("Corridor-v0")
    for low, path, *words in [
        (-9, plain), (-9, odd, "rewards are converted", "MuJoCo 3.4.0"), (-9, gappy),
        (0.5, plain, "row 0 leaves the observation space"),
        (-9, corridor_demos(tmp_path / "4.npz", episodes=1), "observations[:, 1] never move"),
    ]:  # fmt: skip
        env.observation_space = gym.spaces.Box(low, 9, (2,))
        assert script.load_demonstrations(path, env, 1)[1] == 35
        said = capsys.readouterr().err
        assert all(word in said for word in words) and said.count(str(path)) == len(words)
    long = {name: np.arange(15) == 14 for name in diffail.NAMES[4:]} | {"next_observations": s_next}
    long["metadata"] = np.array(gaps.replace("35.0, 35.0, 35.0", "105"))
    long = corridor_demos(tmp_path / "5.npz", **long)
    env.spec.max_episode_steps = 14
    assert "row 14 ends too long" in one_line(capsys, 2, script.load_demonstrations, long, env, 1)


@pytest.mark.parametrize("script, name, value", OF_SCRIPTS, ids=name_of)
def test_bad_options_are_one_line_and_exit_code_2(script, name, value, tmp_path, capsys):
    corridor_demos(tmp_path / "demos.npz")
    (tmp_path / "file").write_text("not a folder")
    compiler = {"cpp.cxx": (None, "no-such-compiler")} if name == "--compile" else {}
    with torch._inductor.config.patch(compiler):
        line = refused(script, name, value := value.format(tmp_path), tmp_path, capsys)
    assert name in line or name[2:].replace("-", "_") in line or value in line


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_to_the_bytes_is_a_correct_load_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.npz"
    content, env = bytearray(corridor_demos(path).read_bytes()), diffail.make_env("Corridor-v0")
    original = diffail.load_demonstrations(path, env, 3)
    where = data.draw(st.integers(0, len(content) - 1))
    until = where + data.draw(st.integers(0, 200))
    content[where:until] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    try:
        loaded = diffail.load_demonstrations(path, env, 3)
    except SystemExit as exit_:
        assert exit_.code == 2
    else:
        assert loaded[1] == original[1] and all(map(torch.equal, loaded[0], original[0]))


# --- As a user runs it ---


def run(*command):
    """A program to its end; one that hangs is a failure after ten minutes."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=HERE, timeout=600)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """A run of each script on the inverted pendulum: {script: (command, what it printed, run directory)}."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    options = "--env-id InvertedPendulum-v4 --total-timesteps 1000 --learning-starts 700 --batch-size 16"
    options += " --eval-every 100 --eval-episodes 2 --device cpu --threads 1 --compile False"
    for script, path in reversed([*zip(SCRIPTS, PATHS)]):  # SAC is first, and records the demonstrations
        command, demos = [path, *options.split()], folder / "demos.npz"
        imitate = ["--num-trajectories", 2, "--cut-probability", 0.1, "--demos", demos]
        command += [] if script is sac_baseline else imitate
        record = ["--demo-episodes", 2, "--save-demos", demos] if script is sac_baseline else []
        done = run(*command, *record, "--output-dir", folder)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        runs[script] = command, done.stdout, run_dir_of(folder, script)
    return runs


@each_script
def test_what_a_run_writes(script, whole_runs):
    (_, printed, run_dir), imitates = whole_runs[script], script is not sac_baseline
    setting = "state-action__2traj__" if imitates else ""
    assert run_dir.name == f"InvertedPendulum-v4__{script.__name__}__{setting}s1"
    assert str(run_dir) in printed and printed.count(" steps: return ") == 10
    files = {re.sub("(?<=tfevents).*", "", path.name) for path in run_dir.iterdir()}
    assert files == {"evaluations.csv", "config.json", "checkpoint.pt", "policy.pt", "events.out.tfevents"}
    rows, scalars = rows_of(run_dir), scalars_of(run_dir)
    columns = ["mean_return", "std_return", "mean_length"]
    columns += ["mean_surrogate_return", "reward_correlation"] * imitates
    assert list(rows[0]) == ["step", *columns]
    assert [int(row["step"]) for row in rows] == [*range(100, 1001, 100)]
    losses = ["surrogate_reward", "expert_loss", "policy_loss"] if imitates else ["alpha"]
    losses += ["qf_loss", "actor_loss", "entropy", *["grad_penalty"] * (script is gail_baseline)]
    tags = {f"losses/{name}" for name in losses} | {f"eval/{name}" for name in columns}
    assert scalars.keys() == tags | {"charts/episodic_return", "charts/episodic_length"}
    for name in columns:
        values = [value for _, value in scalars[f"eval/{name}"]]
        np.testing.assert_allclose(values, [float(row[name]) for row in rows], rtol=1e-4, atol=6e-4)

    config = json.loads((run_dir / "config.json").read_text())
    assert int(config["args"]["total_timesteps"]) == 1000 and config["versions"]["torch"] == torch.__version__
    head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert config["commit"].removesuffix("-dirty") == head.strip()
    actor = script.mlp(4, 2 * 1)  # the saved policy is the one that was evaluated last
    actor.load_state_dict(torch.load(run_dir / "policy.pt", weights_only=True))
    env, play = script.make_env("InvertedPendulum-v4"), script.play_episode
    returns = [play(actor, env, script.episode_seed(1, 1, 1000, i))[3].sum() for i in range(2)]
    assert float(rows[-1]["mean_return"]) == pytest.approx(np.mean(returns), abs=1e-3)


@each_script
def test_a_run_killed_at_a_random_moment_and_resumed_is_the_whole_one(script, whole_runs, tmp_path):
    command, _, whole = whole_runs[script]
    command = [*map(str, command), "--output-dir", str(tmp_path), "--resume"]
    process = subprocess.Popen([sys.executable, *command], cwd=HERE)
    while process.poll() is None and not list(tmp_path.glob("*/evaluations.csv")):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1))
    process.kill()  # which does nothing, should it have ended by then
    process.wait()
    done = run(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert state_of(run_dir_of(tmp_path, script)) == state_of(whole)


def test_bad_input_on_the_command_line():
    done = run("gail_baseline.py", "--batch-size", 0)
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch("gail_baseline.py: .*\n", done.stderr)


def test_an_environment_of_another_module_has_its_demonstrations_made_and_imitated(tmp_path):
    more = {"env_id": "test_diffail:Corridor-v0"}
    train(sac_baseline, tmp_path, "--demo-episodes", 2, "--save-demos", tmp_path / "own.npz", **more)
    for script in IMITATORS:
        assert rows_of(train(script, tmp_path, "--demos", tmp_path / "own.npz", **more))


def test_the_whole_pipeline_learns_the_inverted_pendulum(tmp_path):
    options = "--env-id InvertedPendulum-v4 --batch-size 64 --learning-starts 500 --gamma 0.95"
    options += " --eval-every 500 --eval-episodes 3 --device cpu --threads 1 --compile False"
    options, demos = [*options.split(), "--output-dir", tmp_path], tmp_path / "demos.npz"
    expert = ["--actor-lr", 1e-3, "--critic-lr", 3e-3, "--total-timesteps", 8000, "--target-return", 100]
    done = run("sac_baseline.py", *options, *expert, "--save-demos", demos, "--demo-episodes", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(demos) as file:
        expert_return = np.mean(json.loads(file["metadata"].item())["returns"])
    imitation = ["--state-only", "--demos", demos, "--sac-lr", 3e-3, "--alpha", 0.1, "--cut-probability", 1]
    own = {diffail: ["--grad-penalty", 0.1, "--discriminator-lr", 3e-4]}
    own[gail_baseline] = ["--reward-form", "paper", "--grad-penalty", 0.5, "--discriminator-lr", 1e-3]
    for script in own:
        done = run(f"{script.__name__}.py", *options, *imitation, *own[script], "--total-timesteps", 2000)
        assert done.returncode == 0, done.stderr
        returns = [float(row["mean_return"]) for row in rows_of(run_dir_of(tmp_path, script))]
        assert max(returns) >= 0.5 * expert_return >= 50 > 2 * returns[0], returns  # [0]: untrained


# --- The texts, and benchmark/ ---


def source_of(script):
    """{name: source} of the script's functions and classes."""
    own = [x for x in vars(script).values() if getattr(x, "__module__", "") == script.__name__]
    return {x.__name__: inspect.getsource(x) for x in own}


def test_same_name_same_source():
    found = [source_of(script) for script in SCRIPTS]
    for name in {name for names in found for name in names} - {"Args", "Discriminator", "train"}:
        assert len({names[name] for names in found if name in names}) == 1, name
    shared = {"mlp", "sample", "q_values", "ReplayBuffer", "backward", "graphed", "fail", "make_env"}
    assert shared | {"write_file", "episode_seed", "play_episode"} <= set.intersection(*map(set, found))
    kinds = diffail.Agent, gail_baseline.Agent, sac_baseline.SAC
    assert len({inspect.getsource(kind.descend) for kind in kinds}) == len({x.NAMES for x in SCRIPTS}) == 1


def test_gail_differs_from_diffail_in_docstring_args_and_discriminator_alone():
    rest, seam = [], ("Args", "Discriminator")
    for script in IMITATORS:
        text = inspect.getsource(script)
        nodes = [x for x in ast.parse(text).body if isinstance(x, ast.Assign)]
        constants = [ast.get_source_segment(text, node) for node in nodes]
        for part in [script.__doc__, *constants, *(source_of(script)[name] for name in seam)]:
            text = text.replace(part, "")
        rest.append([line for line in text.splitlines() if line])
    assert rest[0] == rest[1]
    diff = subprocess.run(["diff", PATHS[1], PATHS[0]], capture_output=True, text=True).stdout
    assert len(re.findall("^[<>]", diff, re.M)) <= 100


@pytest.mark.parametrize("path, most", [*zip([*PATHS, Path(__file__)], (540, 495, 415, 1300))])
def test_files_are_short_and_stand_alone(path, most):
    lines = path.read_text().splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 110
    imported = {re.split("[ .,]", line)[1] for line in lines if re.match("(import|from) ", line)}
    pins = set(re.findall(r"^(\w+)(?:\[\w+\])?==[\d.]+$", (HERE / "requirements.txt").read_text(), re.M))
    own = {path.stem for path in PATHS} if path == Path(__file__) else set()  # nothing of each other
    assert imported - set(sys.stdlib_module_names) <= pins | own


@pytest.mark.parametrize("path", ["README.md", "benchmark/README.md", "demos/README.md"])
def test_links_and_commands_are_true(path):
    text, modules = (HERE / path).read_text(), {script.__name__: script for script in SCRIPTS}
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        target = (HERE / path).parent / link if link else HERE / path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, anchor
    text += "\n".join(script.__doc__ for script in SCRIPTS) * (path == "README.md")
    for name, options in re.findall(r"python (?:-m )?([\w/]+)(?:\.py)?((?: [^\n#&`;]*)?)", text):
        if name in modules and "--help" not in options:
            tyro.cli(modules[name].Args, args=shlex.split(options))
        elif name not in ("pytest", "venv", "pip"):
            known = (HERE / f"{name}.py").read_text()
            for word in re.findall(r"--[\w-]+", options.split(" -- ")[0]):
                assert f'"{word}"' in known or word == "--help", word


def test_the_readmes_code_works(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", (HERE / "README.md").read_text(), re.S | re.M)
    torch.save(diffail.mlp(17, 12).state_dict(), policy := tmp_path / "policy.pt")
    exec(re.sub(r"runs/\S+/policy.pt", str(policy), blocks.pop(0)), played := {})
    assert played["states"].shape == (1000, 17) and played["rewards"].shape == (1000,)
    with np.load(corridor_demos(tmp_path / "corridor.npz")) as file:
        names = dict(zip(["s", "a", "s_next", "r", "fell", "out_of_time"], map(file.get, diffail.NAMES)))
    changes = {"my_demos": f"{tmp_path}/my_demos", "HalfCheetah-v4": "Corridor-v0", "[4500.0]": "3 * [35.0]"}
    for before, after in changes.items():
        assert before in blocks[0]
        blocks[0] = blocks[0].replace(before, after)
    exec(blocks[0], names | {"np": np, "json": json})
    for script in IMITATORS:  # a class of one's own in the discriminator's place
        exec(blocks[-1], vars(script) | {"__name__": "own"}, own := {})
        monkeypatch.setattr(script, "Discriminator", own["Discriminator"])
        run_dir = train(script, tmp_path, "--demos", tmp_path / "my_demos.npz", "--discriminator-lr", 0.01)
        first, last = (float(row["mean_surrogate_return"]) for row in rows_of(run_dir))
        assert 0 < first != last > 0


def percents(curves, expert):
    """In % of the expert's: highest and mean of the last five, over the steps that all curves have."""
    steps, texts = sorted(set.intersection(*map(set, curves))), []
    found = np.array([[curve[step] for step in steps] for curve in curves]) * 100 / expert
    for values in (found.max(axis=1), found[:, -5:].mean(axis=1)):
        span = f" ({values.min():.0f}–{values.max():.0f})" if len(values) > 1 else ""
        texts.append(f"{values.mean():.0f}{span}")
    return " / ".join(texts)


def test_the_readmes_results_are_those_of_the_files():
    results, curves, rows = HERE / "benchmark" / "results", {}, []
    paths = [*results.glob("*__state-*.csv"), HERE / "benchmark" / "paper" / "learning_curves.csv"]
    for path in paths:  # {(method, setting, robot): {run: {step: return}}}
        with open(path, newline="") as file:
            for x in csv.DictReader(file):
                own = path.parent == results and (*path.stem.split("__"), x["env_id"][:-3])
                seeds = curves.setdefault(own or (x["algorithm"], x["setting"], x["env"]), {})
                seeds.setdefault(x.get("seed"), {})[int(x["step"])] = float(x["mean_return"])
    for robot in ("HalfCheetah", "Ant", "Hopper", "Walker2d"):
        with np.load(HERE / "demos" / f"{robot}-v4.npz") as file:
            expert = np.mean(json.loads(file["metadata"].item())["returns"])
        for setting in ("state-action", "state-only"):
            cells = [f"{robot}-v4, {setting}"]
            for method in ("diffail", "gail_baseline", "DiffAIL", "GAIL"):
                runs, own = curves.get((method, setting, robot), {}), method.islower()
                theirs = max(curves["expert", setting, robot][None].values())
                text = percents(runs.values(), expert if own else theirs) if runs else ""
                cells.append(text + f", n = {len(runs)}" * bool(own and runs))
            rows.append(f"| {' | '.join(cells)} |")
    table = re.search(r"^\| best / final.*?\n\n", (HERE / "README.md").read_text(), re.S | re.M)[0]
    assert table.strip().splitlines()[2:] == rows


STUB = """
import os, signal, sys, time
from pathlib import Path

words, caught = sys.argv[1:], []
folder, seed = (words[words.index(name) + 1] for name in ("--output-dir", "--seed"))
setting = "state-only" if "--state-only" in words else "state-action"
if seed == "9":  # as a run that goes on for two seconds after Ctrl-C; seed 8 is still importing
    signal.signal(signal.SIGINT, lambda *_: caught.append(1))
with open(f"{folder}/started", "a") as file:
    print(seed, setting, *words[words.index("--resume") :], file=file)
if seed == "2":
    raise SystemExit("seed 2 does not work")
while seed in "89" and not caught:
    time.sleep(0.1)
time.sleep(2 * len(caught))
run_dir = Path(folder, f"Hopper-v4__diffail__{setting}__1traj__s{seed}")
run_dir.mkdir(exist_ok=True)
(run_dir / "evaluations.csv").write_text("step,mean_return\\n100,12.5\\n")
(run_dir / "gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
"""


def grid(tmp_path):
    """benchmark/run.py, beside a stub in the place of diffail.py."""
    pytest.importorskip("submitit", reason="submitit is not installed, see benchmark/requirements.txt")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "diffail.py").write_text(STUB)
    script = tmp_path / "benchmark" / "run.py"
    script.write_bytes((HERE / "benchmark" / "run.py").read_bytes())
    return script


def test_a_grid_resumes_every_run_and_goes_on_past_a_failure(tmp_path):
    command = [grid(tmp_path), "--env-ids", "Hopper-v4", "--output-dir", runs := tmp_path / "runs"]
    first = run(*command, "--seeds", 1, 2, "--", "--total-timesteps", 100)
    assert first.returncode == 1 and "s1: finished, 100 steps, return 12.5" in first.stdout
    assert first.stdout.count("s2: failed: seed 2 does not work") == 2
    started, settings = (runs / "started").read_text().splitlines(), ("state-action", "state-only")
    expected = [f"{seed} {setting} --resume --total-timesteps 100" for seed in (1, 2) for setting in settings]
    assert sorted(started) == expected
    second = run(*command, "--seeds", 1, 3, "--settings", "state-only", "--gpus", 2)
    assert second.returncode == 0, second.stderr
    assert {*(runs / "started").read_text().splitlines()[4:]} == {f"{x} state-only --resume" for x in (1, 3)}
    gpus = [(runs / f"Hopper-v4__diffail__{setting}__1traj__s1" / "gpus").read_text() for setting in settings]
    assert gpus == ["", "0,1"]


def test_ctrl_c_waits_for_the_checkpoints_of_a_grid(tmp_path):
    command = [grid(tmp_path), "--env-ids", "Hopper-v4", "--settings", "state-only", "--seeds", "8", "9"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen([sys.executable, *command, "--output-dir", tmp_path], **quiet)
    while not (tmp_path / "started").exists() or (tmp_path / "started").read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) == 130 and len(list(tmp_path.glob("*s9/gpus"))) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing is left of it
