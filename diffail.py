"""DiffAIL: adversarial imitation learning whose discriminator is a diffusion model, in one file.

Wang et al., "DiffAIL: Diffusion Adversarial Imitation Learning", AAAI 2024, arXiv 2312.06348. x is a pair [s, a] or, with
--state-only, [s, s'], of dimension d; with --normalize (the default for Hopper alone) it is scaled to the expert's mean 0 and std 0.5.

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps                     forward diffusion       DiffusionDiscriminator.noised
    L(x, eps, t) = mean over d of (eps - eps_phi(x_t, t))^2         diffusion loss          DiffusionDiscriminator.diffusion_loss
    D(x, eps, t) = exp(-L(x, eps, t))                               discriminator           DiffusionDiscriminator.forward
             or, for Hopper, the reward's, by --objective-form, mean over d of exp(-(eps - eps_phi)^2)
    min_phi  E_expert[L] - E_policy[log(1 - D)]                     objective               DiffusionDiscriminator.adversarial_loss
             + lambda E[(||grad_x D(x)||_2 - 1)^2]                  gradient penalty        DiffusionDiscriminator.gradient_penalty
    R(x) = -log(1 - mean over t and d of exp(-(eps_t - eps_phi)^2)) surrogate reward        DiffusionDiscriminator.surrogate_reward
             or, as the paper prints it, with --reward-form paper, -log(1 - exp(-mean over t of L))
    max_pi   E[sum over k of gamma^k (c R - alpha log pi)]          SAC (arXiv 1812.05905)  critic_loss, actor_loss

The policy's samples are the replay buffer's; for Hopper the discriminator learns from the last 100,000 of them alone, by
--discriminator-window. The losses take one random t and eps for each sample; only the reward averages over all t.
The penalty, lambda being --grad-penalty, is taken at random points between a sample of the expert's and one of the policy's; it is the
default for Hopper alone. c is --reward-scale; alpha is constant, unless --autotune has actor_loss tune it. The actor's loss has a small
regulariser, as in the released code.

The true reward is never learned from: it is not even stored. It is only logged and printed.

    python diffail.py --env-id HalfCheetah-v4 --state-only
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.15.0",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
import copy
import errno
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # What to imitate
    env_id: str = "HalfCheetah-v4"  # Gymnasium environment with Box observations and Box actions
    state_only: bool = False  # imitate pairs of states [s, s'] instead of pairs [s, a]
    demos: Path | None = None  # demonstrations (.npz); None: demos/ENV_ID.npz beside this script
    num_trajectories: int = 1  # demonstrated episodes to learn from, the first ones of the file
    seed: int = 1  # of everything random: networks, exploration, minibatches, noise, environment
    total_timesteps: int | None = None  # environment steps; None: 750,000 for Hopper and Walker2d, 500,000 for all others
    cut_probability: float = 0.01  # that a training episode ends there, in each step from a termination on; released: 0, up to 1,000 steps

    # Discriminator and surrogate reward
    normalize: bool | None = None  # scale x, not SAC's inputs, to the demonstrations' mean 0 and std 0.5; None: for Hopper alone
    hidden_dim: int = 128  # units in each of the three hidden layers of the noise predictor
    diffusion_steps: int = 10  # T
    noise_schedule: Literal["linear", "cosine", "vp"] = "linear"  # of the variances beta_1 ... beta_T
    grad_penalty: float | None = None  # weight lambda of the gradient penalty; None: 0, for Hopper 0.1; released: 0.1, for some less
    objective_form: Literal["paper", "reward"] | None = None  # D to learn by: exp(-L), or as --reward-form; None: paper, for Hopper reward
    reward_form: Literal["released", "paper"] = "released"  # D: mean of exp(-squared error), or exp(-mean L), which needs a lower --alpha
    reward_scale: float = 2.0  # factor on the surrogate reward
    discriminator_lr: float = 3e-5  # Adam learning rate of the discriminator
    discriminator_window: int | None = None  # learn from the policy's last so many samples; None: all, for Hopper 100,000; released: all

    # SAC
    learning_starts: int = 5_000  # uniformly random steps before the first update
    batch_size: int = 256  # samples per update, of the expert and of the policy
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    sac_hidden_dim: int = 256  # units in each of the two hidden layers of actor and critics
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critics towards the critics
    actor_lr: float = 3e-4  # Adam learning rate of the actor and of the temperature
    critic_lr: float = 3e-4  # Adam learning rate of the critics
    sac_beta1: float = 0.25  # Adam's beta_1 for actor, critics and temperature: the reward moves, so little momentum
    alpha: float | None = None  # temperature; with --autotune the most it may be; None: 0.12 / dim(A), for Ant 0.06
    autotune: bool = False  # tune alpha towards a target entropy, from --alpha downwards; released: from 0.2, without a bound
    target_entropy_per_dim: float = -0.5  # target entropy of --autotune per dimension of the action; released: -0.5, in effect 0.1 to 0.3
    actor_regularizer: float = 1e-3  # weight of mean^2 + log_std^2 in the actor's loss

    # The run
    eval_every: int = 10_000  # steps between evaluations
    eval_episodes: int = 10  # episodes of the deterministic policy per evaluation
    checkpoint_every: int = 25_000  # a checkpoint at the first episode end after this many steps
    resume: bool = False  # go on from the run's last checkpoint, or begin where there is none
    output_dir: Path = Path("runs")  # folder of the run directories
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    threads: int = 2  # of PyTorch on the CPU: 2 for one run alone, up to a third less time than 1; for several side by side 1 each
    compile: bool | None = None  # compile losses, gradients and reward: a slower start, faster steps; None: where a C++ compiler is


TOTAL_TIMESTEPS = {"Hopper": 750_000, "Walker2d": 750_000}  # as in the paper; for the others 500,000
NORMALIZED = {"Hopper"}  # bodies whose x is scaled by default; found by experiment, see fit_normalizer
OBJECTIVE_FORM = {"Hopper": "reward"}  # by default; for the others paper; found by experiment, see benchmark/results/README.md
GRAD_PENALTY = {"Hopper": 0.1}  # by default; for the others 0; found by experiment, see benchmark/results/README.md
DISCRIMINATOR_WINDOW = {"Hopper": 100_000}  # by default; for the others all; found by experiment, see benchmark/results/README.md
ALPHA = {"Ant": 0.06}  # temperature, by default; found by experiment: 0.12 / dim(A), which all others have, is too low for it
MAY_CHANGE_ON_RESUME = {"resume", "output_dir", "total_timesteps", "device", "threads", "compile", "checkpoint_every"}
TRAINING, EVALUATION = range(2)  # streams of episode seeds


# ------------------------------------------------------------------------------------ discriminator and surrogate reward


def noise_schedule(name: str, steps: int) -> Tensor:
    """Variances beta_1 ... beta_T of the forward diffusion, float64 [steps].

    Index i is step t = i + 1 of the equations. With 10 linear steps alpha_bar ends at 0.9: even x_T is mostly x, its noise hard to predict.
    linear: Ho et al. 2020; cosine: Nichol & Dhariwal 2021, eq. 17; vp: Song et al. 2021, discretised as in Xiao et al. 2022,
    with the bounds of Wang et al. 2023 (Diffusion-QL)."""
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64)
    t = torch.arange(steps + 1, dtype=torch.float64)
    if name == "cosine":
        alpha_bar = torch.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    beta_min, beta_max = 0.1, 10.0
    return 1 - torch.exp(-beta_min / steps - 0.5 * (beta_max - beta_min) * (2 * t[1:] - 1) / steps**2)


def mish(x: Tensor) -> Tensor:
    """mish(x) = x tanh(log(1 + e^x)) (Misra 2019), with tanh(log(1 + e^x)) = 1 - 2 / ((1 + e^x)^2 + 1).

    F.mish would do, but compiled for a CPU the discriminator's step takes 1.6 times as long with it (benchmark/README.md)."""
    return x * (1 - 2 / ((1 + x.clamp(max=20).exp()).square() + 1))  # from 20 on that is x, to the last digit


class NoisePredictor(nn.Module):
    """eps_phi(x_t, t): an MLP on x_t and an embedding of t, sinusoidal as in Vaswani et al. 2017 and then through two layers."""

    def __init__(self, dim: int, hidden_dim: int, diffusion_steps: int):
        super().__init__()
        angles = torch.arange(diffusion_steps)[:, None] * torch.exp(-math.log(10_000) * torch.arange(8) / 7)
        self.register_buffer("time_embedding", torch.cat([angles.sin(), angles.cos()], dim=-1))  # [T, 16]
        self.time_in, self.time_out = nn.Linear(16, 32), nn.Linear(32, 16)
        self.hidden = nn.ModuleList(nn.Linear(width, hidden_dim) for width in (dim + 16, hidden_dim, hidden_dim))
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t [..., d] and t, broadcast to [...], to the predicted noise [..., d]."""
        embedding = self.time_out(mish(self.time_in(self.time_embedding[t])))
        h = torch.cat([x_t, embedding.expand(*x_t.shape[:-1], 16)], dim=-1)
        for layer in self.hidden:
            # layer(h), but with the bias apart: addmm would first copy it to all rows, 3 to 7 % of the reward's time (benchmark/README.md)
            h = mish(F.linear(h, layer.weight) + layer.bias)
        return self.out(h)


def log_one_minus_d(squared_error: Tensor, form: str, dim: int | tuple[int, ...] = -1) -> Tensor:
    """log(1 - D), where D is exp(-mean of the squared error), the paper's form, or the mean of exp(-squared error), over `dim`.

    At least -69.08, and with finite gradients. 1 - exp(-L) would lose all its digits near L = 0."""
    if form == "paper":
        return torch.log(-torch.expm1(-squared_error.mean(dim).clamp(min=1e-30)))
    return torch.log((-torch.expm1(-squared_error).mean(dim)).clamp(min=1e-30))


class DiffusionDiscriminator(nn.Module):
    """D(x, eps, t) = exp(-L(x, eps, t)): the better the diffusion model denoises x, the more x looks like the expert's.

    This is the paper's form. The other, which the released code has in its reward alone, is the mean over d of exp(-squared error).
    Everywhere below x is [B, d], noise [B, d] and t [B], integers from 0 to T - 1, unless it says otherwise."""

    def __init__(self, dim: int, hidden_dim: int, diffusion_steps: int, schedule: str, form: str = "paper"):
        super().__init__()
        self.form = form
        alpha_bar = torch.cumprod(1 - noise_schedule(schedule, diffusion_steps), dim=0)
        self.register_buffer("sqrt_alpha_bar", alpha_bar.sqrt().float()[:, None])  # [T, 1]
        self.register_buffer("sqrt_one_minus_alpha_bar", (1 - alpha_bar).sqrt().float()[:, None])
        self.noise_predictor = NoisePredictor(dim, hidden_dim, diffusion_steps)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, of the shape of the noise."""
        return self.sqrt_alpha_bar[t] * x + self.sqrt_one_minus_alpha_bar[t] * noise

    def denoising_error(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps - eps_phi(x_t, t), of the shape of the noise: [B, d], or [T, B, d] with t [T, 1] for all T steps at once."""
        return noise - self.noise_predictor(self.noised(x, noise, t), t)

    def diffusion_loss(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """L(x, eps, t), [B]. The paper prints a squared norm; the authors' code takes the mean over d."""
        return self.denoising_error(x, noise, t).square().mean(-1)

    def forward(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """D(x, eps, t) in [0, 1], [B]. The adversarial loss goes by the errors, which keep the digits that D near 1 loses."""
        if self.form == "paper":
            return torch.exp(-self.diffusion_loss(x, noise, t))
        return 1 + torch.expm1(-self.denoising_error(x, noise, t).square()).mean(-1)

    def adversarial_loss(self, expert: Tensor, policy: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E_expert[L] and -E_policy[log(1 - D)], for expert and policy [B, d], noise [2B, d] and t [2B].

        E_expert[L] is -E_expert[log D] in the paper's form, and in the released one, by Jensen's inequality, never less."""
        expert_error, policy_error = self.denoising_error(torch.cat([expert, policy]), noise, t).square().chunk(2)
        return expert_error.mean(), -log_one_minus_d(policy_error, self.form).mean()

    def gradient_penalty(self, expert: Tensor, policy: Tensor, mix: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """E[(||grad D||_2 - 1)^2] where mix [B, 1] in [0, 1] puts x between policy and expert (Gulrajani et al. 2017, eq. 3)."""
        x = (mix * expert + (1 - mix) * policy).requires_grad_()
        (grad,) = torch.autograd.grad(self(x, noise, t).sum(), x, create_graph=True)
        return (grad.norm(dim=-1) - 1).square().mean()

    def sample_noise_and_t(self, batch_size: int, dim: int) -> tuple[Tensor, Tensor]:
        """Standard normal noise [batch_size, dim] and uniform t [batch_size]."""
        device, steps = self.sqrt_alpha_bar.device, len(self.sqrt_alpha_bar)
        return torch.randn(batch_size, dim, device=device), torch.randint(steps, (batch_size,), device=device)

    @torch.no_grad()
    def surrogate_reward(self, x: Tensor, noise: Tensor, form: str) -> Tensor:
        """R(x) = -log(1 - D), [B], for x [B, d] and noise [T, B, d]: each of the T steps with its own noise, all in one batch."""
        t = torch.arange(len(noise), device=x.device)[:, None]
        return -log_one_minus_d(self.denoising_error(x, noise, t).square(), form, dim=(0, 2))  # over t and d


# ------------------------------------------------------------------------------------------------------------------- SAC


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three linear layers, ReLU after the first two."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Actor(nn.Module):
    """Tanh-Gaussian policy pi(a|s): a = tanh(u), u ~ N(mean(s), std(s))."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.net = mlp(observation_dim, hidden_dim, 2 * action_dim)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Observations [..., obs] to the mean and the log standard deviation of u, [..., act] each."""
        mean, log_std = self.net(observations).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reparameterised actions [..., act] in [-1, 1], log pi(a|s) [...], mean and log_std of u (SAC, appendix C).

        log(1 - tanh(u)^2) is written 2 (log 2 - u - softplus(-2u)), which stays exact where tanh saturates."""
        mean, log_std = self(observations)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (log_normal - log_det).sum(-1), mean, log_std

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """Actions as `sample` draws them, without the rest."""
        mean, log_std = self(observations)
        return (mean + log_std.exp() * torch.randn_like(mean)).tanh()


class TwinCritic(nn.Module):
    """Two independent action values Q1(s, a) and Q2(s, a)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.q1 = mlp(observation_dim + action_dim, hidden_dim, 1)
        self.q2 = mlp(observation_dim + action_dim, hidden_dim, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Observations [B, obs] and actions [B, act] to two values, [B] each."""
        x = torch.cat([observations, actions], dim=-1)
        return self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, tau: float):
    """target <- (1 - tau) target + tau source, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)  # all of them in one call


class ReplayBuffer:
    """Ring buffer on the training device. A transition is one row, so that storing and sampling are one copy each."""

    def __init__(self, capacity: int, widths: tuple[int, ...], device: torch.device):
        self.rows = torch.empty(capacity, sum(widths), device=device)
        self.added = torch.zeros((), dtype=torch.int64, device=device)  # ever; on the device, where a captured CUDA graph reads it
        self.widths, self.position = widths, 0

    def add(self, *parts: np.ndarray):
        """Store one transition: one vector for each of the widths."""
        row = torch.from_numpy(np.concatenate(parts, dtype=np.float32))
        self.rows[self.position] = row.to(self.rows.device, non_blocking=True)
        self.added += 1
        self.position = (self.position + 1) % len(self.rows)

    def sample(self, batch_size: int, window: int | None = None) -> tuple[Tensor, ...]:
        """Uniform transitions with replacement, of all or of the last `window`: one tensor [batch_size, width] for each of the widths."""
        count = self.added.clamp(max=min(window or len(self.rows), len(self.rows)))
        # randint would need its bound on the host, which would wait for the GPU. The remainder's bias is below 1e-12.
        rows = self.added - count + torch.randint(2**62, (batch_size,), device=self.rows.device) % count
        return self.rows[rows % len(self.rows)].split(self.widths, dim=1)


# --------------------------------------------------------------------------------------------------------------- DiffAIL


def can_compile() -> bool:
    """Whether there is what torch.compile needs: a C++ compiler, g++ or the one that CXX names, and Python's headers.

    Linux alone, as other systems' compilers often come without OpenMP."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return sys.platform == "linux" and headers and shutil.which(os.environ.get("CXX", "g++")) is not None


def compiled(function: Callable) -> Callable:
    """`function` through torch.compile: two fifths off DiffAIL's step on a CPU, a fifth off SAC's (benchmark/results/speed__cpu.csv)."""
    torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad too: a loss and its gradient become one program
    warnings.filterwarnings("ignore", "TensorFloat32")  # on a GPU: float32 is meant, and in full
    # Random numbers from PyTorch, not from the compiler: the same ones as uncompiled, and sooner drawn on a CPU. No padding of matrices
    # on a GPU: whether to is decided by a measurement, so that two runs of one command would round differently.
    return torch.compile(function, options={"fallback_random": True, "shape_padding": False})


def gradients(loss_function: Callable, parameters: list[Tensor], *batch: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Gradients of the loss loss_function(*batch)[0], and the scalars to log, loss_function(*batch)[1]; compiled, one program does both."""
    loss, losses = loss_function(*batch)
    return torch.autograd.grad(loss, parameters), {name: value.detach() for name, value in losses.items()}


class DiffAIL(nn.Module):
    """Networks, optimisers and the update step.

    In the methods a batch is observations [B, obs], actions [B, act] in [-1, 1], and next_observations [B, obs]."""

    def __init__(self, observation_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.target_entropy = args, args.target_entropy_per_dim * action_dim
        input_dim = observation_dim + (observation_dim if args.state_only else action_dim)
        form = args.reward_form if args.objective_form == "reward" else "paper"
        self.discriminator = DiffusionDiscriminator(input_dim, args.hidden_dim, args.diffusion_steps, args.noise_schedule, form)
        self.actor = Actor(observation_dim, action_dim, args.sac_hidden_dim)
        self.critic = TwinCritic(observation_dim, action_dim, args.sac_hidden_dim)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.register_buffer("x_mean", torch.zeros(input_dim))
        self.register_buffer("x_scale", torch.ones(input_dim))
        self.to(device)
        self.gradients = compiled(gradients) if args.compile else gradients
        self.reward = compiled(DiffusionDiscriminator.surrogate_reward) if args.compile else DiffusionDiscriminator.surrogate_reward
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # capturable in a CUDA graph
        betas = args.sac_beta1, 0.999
        self.discriminator_optimizer = adam(self.discriminator.parameters(), lr=args.discriminator_lr)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_lr, betas=betas)
        tuned = [self.log_alpha] if args.autotune else []
        self.actor_optimizer = adam([*self.actor.parameters(), *tuned], lr=args.actor_lr, betas=betas)

    def discriminator_input(self, observations: Tensor, actions: Tensor, next_observations: Tensor) -> Tensor:
        """x, [B, d]."""
        x = torch.cat([observations, next_observations if self.args.state_only else actions], dim=-1)
        return (x - self.x_mean) / self.x_scale

    def fit_normalizer(self, *demonstrations: Tensor) -> Tensor:
        """The demonstrations' x [N, d]; with --normalize True, theirs is scaled to mean 0 and std 0.5, and all later x alike.

        The diffusion's noise has the same scale in all coordinates, up to 0.3 at t = T: one that moves less, as Hopper's torso angle
        by 0.05, is lost in it. Without scaling our Hopper learned to hop as the expert does, but leaning over too far. With a std of 1
        the noise is so little that a slow hop and a somewhat faster one are both surely not the expert's, and the reward has no slope:
        one of two seeds stayed there for long. 0.5 is that of the data in Karras et al. 2022."""
        if self.args.normalize:
            x = self.discriminator_input(*demonstrations)  # as it is: so far x_mean is 0 and x_scale 1
            std = x.std(0)
            self.x_mean, self.x_scale = x.mean(0), (2 * std).masked_fill(std < 1e-6, 1.0)  # what never moves is only centred
        return self.discriminator_input(*demonstrations)

    def update(self, expert_x: Tensor, buffer: ReplayBuffer) -> dict[str, Tensor]:
        """One step on everything, with the expert's x [N, d]; returns scalars to log. Nothing in it waits for the GPU."""
        args = self.args
        # SAC's minibatch. Its rewards are those of the discriminator as it is now; none are stored.
        batch = buffer.sample(args.batch_size)
        x = self.discriminator_input(*batch)
        noise = torch.randn(args.diffusion_steps, *x.shape, device=x.device)
        rewards = args.reward_scale * self.reward(self.discriminator, x, noise, args.reward_form)
        # Another minibatch, for the discriminator. From here on it and SAC need nothing of each other: a GPU does both at a time,
        # which takes a quarter off an H200's step, with the penalty.
        expert = expert_x[torch.randint(len(expert_x), (args.batch_size,), device=expert_x.device)]
        policy = self.discriminator_input(*buffer.sample(args.batch_size, args.discriminator_window))
        side_stream = torch.cuda.Stream() if x.is_cuda else None
        if side_stream:
            side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream) if side_stream else nullcontext():
            losses = self.descend(self.discriminator_optimizer, self.discriminator_loss, expert, policy)
        losses |= self.descend(self.critic_optimizer, self.critic_loss, *batch, rewards, args.gamma)
        losses |= self.descend(self.actor_optimizer, self.actor_loss, batch[0])
        self.log_alpha.data.clamp_(max=math.log(args.alpha))  # tuned without a bound, it grew until HalfCheetah stood still
        polyak_update(self.target_critic, self.critic, args.tau)
        if side_stream:
            torch.cuda.current_stream().wait_stream(side_stream)
        return losses | {"surrogate_reward": rewards.mean()}

    def descend(self, optimizer: torch.optim.Optimizer, loss_function: Callable, *batch: Tensor) -> dict[str, Tensor]:
        """One step of the optimiser down loss_function(*batch)[0], on its own parameters alone; returns scalars to log."""
        parameters = optimizer.param_groups[0]["params"]
        grads, losses = self.gradients(loss_function, parameters, *batch)
        for parameter, grad in zip(parameters, grads):
            parameter.grad = grad.contiguous()  # compiled, it may have another layout, which the fused Adam refuses or misreads
        optimizer.step()
        return losses

    def discriminator_loss(self, expert: Tensor, policy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoise the expert's samples [B, d] well, and the policy's badly."""
        noise, t = self.discriminator.sample_noise_and_t(2 * len(expert), expert.shape[1])
        expert_loss, policy_loss = self.discriminator.adversarial_loss(expert, policy, noise, t)
        loss, losses = expert_loss + policy_loss, {"disc_expert_loss": expert_loss, "disc_policy_loss": policy_loss}
        if self.args.grad_penalty:
            mix, (noise, t) = torch.rand(len(expert), 1, device=expert.device), self.discriminator.sample_noise_and_t(*expert.shape)
            penalty = self.discriminator.gradient_penalty(expert, policy, mix, noise, t)
            loss, losses["grad_penalty"] = loss + self.args.grad_penalty * penalty, penalty
        return loss, losses

    def critic_loss(
        self, observations: Tensor, actions: Tensor, next_observations: Tensor, rewards: Tensor, discount: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Soft Bellman error of both critics (SAC, eq. 5), for rewards [B] and a discount, a number or [B] with 0 where the task ends."""
        with torch.no_grad():
            next_actions, next_log_prob, _, _ = self.actor.sample(next_observations)
            next_value = torch.min(*self.target_critic(next_observations, next_actions)) - self.log_alpha.exp() * next_log_prob
            target = rewards + discount * next_value
        q1, q2 = self.critic(observations, actions)
        loss = 0.5 * (F.mse_loss(q1, target) + F.mse_loss(q2, target))
        return loss, {"qf_loss": loss}

    def actor_loss(self, observations: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """High value and high entropy for the actor (SAC, eq. 9), and with --autotune the target entropy for the temperature (eq. 18).

        In place of eq. 18's factor alpha there is log alpha, as in most code: the gradient keeps its sign."""
        alpha = self.log_alpha.detach().exp()
        actions, log_prob, mean, log_std = self.actor.sample(observations)
        pi_loss = (alpha * log_prob - torch.min(*self.critic(observations, actions))).mean()
        loss = pi_loss + self.args.actor_regularizer * (mean.square().mean() + log_std.square().mean())
        if self.args.autotune:
            loss = loss - self.log_alpha * (log_prob.detach().mean() + self.target_entropy)
        return loss, {"actor_loss": pi_loss, "alpha": alpha, "entropy": -log_prob.mean()}

    def surrogate_return(self, episode: dict[str, np.ndarray]) -> float:
        """Sum of an episode's surrogate rewards, times --reward-scale, with noise from a generator of its own, seeded alike each time."""
        parts = (torch.from_numpy(episode[name]).to(self.log_alpha.device) for name in ("observations", "actions", "next_observations"))
        x = self.discriminator_input(*parts)
        generator = torch.Generator(x.device).manual_seed(0)
        noise = torch.randn(self.args.diffusion_steps, *x.shape, device=x.device, generator=generator)
        # Not the compiled reward: episodes differ in length, and it would be compiled again for that.
        return self.args.reward_scale * self.discriminator.surrogate_reward(x, noise, self.args.reward_form).sum().item()


def graphed(function: Callable) -> Iterator:
    """What `function` returns, time after time, on a GPU as one CUDA graph: an update is then one launch in place of hundreds.

    The first three run as they are, on a stream of their own: they load libraries and fill the optimisers. The fourth is captured."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for _ in range(3):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = function()
        torch.cuda.current_stream().wait_stream(stream)
        yield result
    with torch.cuda.graph(graph):
        result = function()
    while True:
        graph.replay()
        yield result


# -------------------------------------------------------------------------------------------- environment and evaluation


def make_env(env_id: str) -> gym.Env:
    """A Gymnasium environment with actions in [-1, 1] and observations in float32.

    Exits with code 2 where the environment is unknown or a space is not a one-dimensional Box of floats (bounded, for actions)."""
    gym.logger.min_level = gym.logger.ERROR  # no warnings, such as that v4 is out of date; here v4 is meant
    try:
        env = gym.make(env_id)
    except Exception as error:  # environments fail in ways of their own
        fail(f"cannot make the environment {env_id!r}: {error}")
    for name, space in {"observation": env.observation_space, "action": env.action_space}.items():
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
            fail(f"{env_id}: the {name} space must be a one-dimensional Box of floating-point numbers, not {space}")
    if not env.action_space.is_bounded() or (env.action_space.low >= env.action_space.high).any():
        fail(f"{env_id}: the action space must have finite bounds, the lower ones below the upper, not {env.action_space}")
    box = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    env = gym.wrappers.TransformObservation(env, lambda o: o.astype(np.float32), box)
    return gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))


def episode_seed(*key: int) -> int:
    """A seed that is a function of (run's seed, stream, numbers): with one per episode, resuming needs no simulator state."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def play_episode(actor: Actor, env: gym.Env, seed: int) -> dict[str, np.ndarray]:
    """One episode of the deterministic policy tanh(mean), as arrays named as in a demonstration file; actions in [-1, 1]."""
    actor = copy.deepcopy(actor).cpu()  # one observation at a time is faster there than on a GPU
    steps, done = [], False
    observation, _ = env.reset(seed=seed)
    while not done:
        with torch.no_grad():
            action = actor(torch.from_numpy(observation))[0].tanh().numpy()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        steps.append((observation, action, next_observation, reward, terminated, truncated))
        observation, done = next_observation, terminated or truncated
    names = ("observations", "actions", "next_observations", "rewards", "terminations", "truncations")
    return {name: np.array(column) for name, column in zip(names, zip(*steps))}


def summarize(episodes: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Mean and standard deviation of the return, and mean length."""
    returns, lengths = [episode["rewards"].sum() for episode in episodes], [len(episode["rewards"]) for episode in episodes]
    return {"mean_return": float(np.mean(returns)), "std_return": float(np.std(returns)), "mean_length": float(np.mean(lengths))}


def compare_rewards(episodes: list[dict[str, np.ndarray]], surrogate_return: Callable) -> dict[str, float]:
    """Mean surrogate return, and its Pearson correlation with the true return: does the surrogate reward rank episodes as the task does?

    The correlation is nan where one of the two returns is the same in all episodes."""
    returns = np.array([episode["rewards"].sum() for episode in episodes])
    surrogate_returns = np.array([surrogate_return(episode) for episode in episodes])
    varies = np.ptp(returns) > 0 and np.ptp(surrogate_returns) > 0
    correlation = float(np.corrcoef(surrogate_returns, returns)[0, 1]) if varies else math.nan
    return {"mean_surrogate_return": float(surrogate_returns.mean()), "reward_correlation": correlation}


def share_of_expert(mean_return: float, expert_return: float) -> str:
    """A return beside the expert's: in per cent, where that means something."""
    return f"{100 * mean_return / expert_return:.1f} % of the expert's" if expert_return > 0 else f"the expert's is {expert_return:.1f}"


def write_evaluations(path: Path, evaluations: list[dict[str, float]]):
    """evaluations.csv: one row per evaluation."""
    lines = [",".join(evaluations[0])]
    lines += [",".join(str(value) if isinstance(value, int) else f"{value:.3f}" for value in row.values()) for row in evaluations]
    write_file(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


# ------------------------------------------------------------------------------------------------------- files and input


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on what went wrong; exit code 2 for the user's input, files and disk."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)  # on a line of its own beside a progress bar
    raise SystemExit(code)


def check_numbers(args: Args):
    """Exit with code 2 where a number, of any of the three scripts, is out of range: counts begin at 1, most others at 0, some end at 1."""
    least = {"seed": 0, "alpha": 1e-6}
    least |= dict.fromkeys(["target_return", "min_demo_return", "target_entropy_per_dim"], -math.inf)
    most = {"seed": 2**63 - 1, "threads": 1024, "gamma": 1, "tau": 1, "sac_beta1": 0.999, "cut_probability": 1}
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low, high = least.get(name, 1 if type(value) is int else 0), most.get(name, math.inf)
            if not (low <= value <= high and math.isfinite(value)):
                fail(f"--{name.replace('_', '-')} is {value}, and must be a finite number from {low} to {high}")


def write_file(path: Path, write: Callable):
    """Call `write` on a file beside `path` and rename it: `path` is written whole or not at all. Exits with code 2 where it cannot be."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}, and left it as it was: {error}")


def describe_run(args: Args, device: torch.device) -> dict:
    """What a later reader needs to tell what made a result: arguments, command, commit, machine, versions."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    return {
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()},
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "versions": {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in (torch, gym, mujoco, np)},
    }


def catch_stop_signals() -> list[int]:
    """Catch SIGTERM and SIGINT (Ctrl-C): the first goes into the list that is returned, the second ends the program at once."""
    caught = []

    def handler(number: int, _):
        if caught:
            raise SystemExit(128 + number)
        caught.append(number)
        tqdm.write(f"{signal.Signals(number).name}: the run ends where this episode does; once more ends it at once", file=sys.stderr)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught


def check_finite(values: dict[str, Tensor], step: int):
    """Exit with code 1 where a loss, action or parameter is no longer finite. The last checkpoint, in which all was finite, is kept."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            fail(f"{name} is not finite at step {step}; the last checkpoint is kept", 1)


def load_checkpoint(path: Path, learned: dict, buffer: ReplayBuffer, config: dict) -> dict:
    """Restore and return what main's checkpoint wrote; `config` becomes the run's first, with today's arguments and this resumption.

    Exits with code 2 where the file is damaged or was made with other arguments."""
    try:
        state = torch.load(path, map_location=buffer.rows.device, weights_only=True)
        before = state["config"]["args"]
        changed = [name for name, value in config["args"].items() if name not in MAY_CHANGE_ON_RESUME and value != before.get(name)]
        if changed:
            fail(f"{path} was made with another {', '.join(changed)}; --resume needs the same arguments")
        for name, part in learned.items():
            part.load_state_dict(state[name])
        buffer.position = state["added"] % len(buffer.rows)
        buffer.added.fill_(state["added"])
        buffer.rows[: len(state["rows"])] = state["rows"]
        torch.set_rng_state(state["rng"].cpu())
        if buffer.rows.is_cuda and state["device_rng"] is not None:  # a run that moved here from a CPU has none
            torch.cuda.set_rng_state(state["device_rng"].cpu())
    except Exception as error:  # what a damaged archive raises is open-ended
        fail(f"{path} cannot be read as a checkpoint of this script, and is left as it is: {type(error).__name__}")
    resumed = {"step": state["step"]} | {name: config[name] for name in ("command", "commit", "device", "versions")}
    config |= state["config"] | {"args": config["args"], "resumed": [*state["config"].get("resumed", []), resumed]}
    return state


def load_demonstrations(path: Path, env_id: str, num_trajectories: int, env: gym.Env) -> tuple[dict[str, np.ndarray], float]:
    """Transitions [N, dim] of a file's first `num_trajectories` episodes, actions in [-1, 1], and the mean return of all its episodes.

    Exits with code 2 where the file is missing, broken, not finite, of another environment or its actions' bounds, or too short."""
    obs_shape, action_space = env.observation_space.shape, env.env.action_space  # the environment's own, not yet rescaled
    try:
        with np.load(path, allow_pickle=False) as file:
            n = file["rewards"].size
            expected = {"observations": (n, *obs_shape), "actions": (n, *action_space.shape), "next_observations": (n, *obs_shape)}
            expected |= {"rewards": (n,), "terminations": (n,), "truncations": (n,)}
            data, metadata = {name: file[name] for name in expected}, json.loads(file["metadata"].item())
            recorded_env_id, expert_return = str(metadata["env_id"]), float(np.mean(metadata["returns"]))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.npz"))) or "none"
        make = f"python sac_baseline.py --env-id {env_id} --save-demos {path}"
        fail(f"no demonstrations at {path} (there are: {known}); to make them: {make}")
    except Exception as error:  # what a damaged archive raises is open-ended
        fail(f"{path} is not a whole demonstration file: {type(error).__name__} {error}")
    if recorded_env_id != env_id:
        fail(f"{path} was recorded in {recorded_env_id}, not in {env_id}")
    for name, shape in expected.items():
        dtype = np.dtype(bool if name in ("terminations", "truncations") else np.float32)
        if n == 0 or data[name].shape != shape or data[name].dtype != dtype:
            fail(f"{path}: {name} is {data[name].dtype} {data[name].shape}; {env_id} asks for {dtype} {shape}, and at least one transition")
        if not np.isfinite(data[name]).all():
            fail(f"{path}: {name} has values that are not finite")
    if (data["actions"] < action_space.low - 1e-5).any() or (data["actions"] > action_space.high + 1e-5).any():
        fail(f"{path}: some actions are outside the bounds of {env_id}")
    if not math.isfinite(expert_return):
        fail(f"{path}: the expert's mean return in the metadata is {expert_return}")
    ends = np.flatnonzero(data["terminations"] | data["truncations"]) + 1
    if num_trajectories > len(ends):
        fail(f"{path} holds {len(ends)} episodes, --num-trajectories asks for {num_trajectories}")
    data["actions"] = (2 * (data["actions"] - action_space.low) / (action_space.high - action_space.low) - 1).astype(np.float32)
    return {name: data[name][: ends[num_trajectories - 1]] for name in ("observations", "actions", "next_observations")}, expert_return


# -------------------------------------------------------------------------------------------------------------- training


def main(args: Args):
    # Set-up: everything is checked before anything is written.
    check_numbers(args)
    body = args.env_id.split("/")[-1].split("-v")[0]
    args.total_timesteps = args.total_timesteps or TOTAL_TIMESTEPS.get(body, 500_000)
    args.normalize = body in NORMALIZED if args.normalize is None else args.normalize
    args.objective_form = args.objective_form or OBJECTIVE_FORM.get(body, "paper")
    args.grad_penalty = GRAD_PENALTY.get(body, 0.0) if args.grad_penalty is None else args.grad_penalty
    args.discriminator_window = args.discriminator_window or DISCRIMINATOR_WINDOW.get(body)
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} leaves nothing to learn in --total-timesteps {args.total_timesteps}")
    if args.batch_size > min(args.buffer_size, args.total_timesteps):
        fail(f"--batch-size {args.batch_size} is more than will be stored: see --buffer-size and --total-timesteps")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    if args.compile and not can_compile():
        fail("--compile True needs Linux, a C++ compiler, g++ or the one that CXX names, and Python's headers (python3-dev)")
    device = torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
    args.compile = can_compile() if args.compile is None else args.compile
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # dead units leave denormal moments in Adam; arithmetic on those is many times slower
    torch.manual_seed(args.seed)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    (observation_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    args.alpha = args.alpha or ALPHA.get(body, 0.12 / action_dim)
    demos_path = args.demos or Path(__file__).parent / "demos" / f"{args.env_id}.npz"
    demos, expert_return = load_demonstrations(demos_path, args.env_id, args.num_trajectories, env)

    setting = "state-only" if args.state_only else "state-action"
    run_dir = args.output_dir / f"{args.env_id}__diffail__{setting}__{args.num_trajectories}traj__s{args.seed}"

    agent = DiffAIL(observation_dim, action_dim, args, device)
    expert_x = agent.fit_normalizer(*(torch.from_numpy(array).to(device) for array in demos.values()))
    buffer = ReplayBuffer(args.buffer_size, (observation_dim, action_dim, observation_dim), device)
    actor_input = torch.zeros(observation_dim, device=device)
    act, update = partial(agent.actor.act, actor_input), partial(agent.update, expert_x, buffer)
    if device.type == "cuda":
        act, update = partial(next, graphed(act)), partial(next, graphed(update))
    learned = {"agent": agent, "discriminator_optimizer": agent.discriminator_optimizer}
    learned |= {"critic_optimizer": agent.critic_optimizer, "actor_optimizer": agent.actor_optimizer}

    config, checkpoint_path = describe_run(args, device), run_dir / "checkpoint.pt"
    try:
        run_dir.mkdir(parents=True, exist_ok=args.resume)
    except FileExistsError:
        fail(f"{run_dir} holds a run already: go on with it by --resume, or choose another --output-dir or --seed")
    except OSError as error:
        fail(f"cannot write to {run_dir}: {error.strerror}")
    start, episode, wall_time, evaluations = 0, 0, 0.0, []
    if args.resume and checkpoint_path.exists():
        state = load_checkpoint(checkpoint_path, learned, buffer, config)
        start, episode, wall_time, evaluations = (state[name] for name in ("step", "episode", "wall_time", "evaluations"))
        if start >= args.total_timesteps:
            print(f"{run_dir} has finished its {start:,} steps already")
            return
    write_file(run_dir / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
    writer = SummaryWriter(run_dir, purge_step=start + 1)
    losses, stop = {}, catch_stop_signals()
    steps = range(start + 1, args.total_timesteps + 1)
    progress = tqdm(steps, initial=start, total=args.total_timesteps, unit=" steps", disable=None, dynamic_ncols=True)
    observation, _ = env.reset(seed=episode_seed(args.seed, TRAINING, episode))
    episode_return, episode_length, fallen, last_checkpoint, clock = 0.0, 0, False, start, time.perf_counter() - wall_time

    def checkpoint(step: int):
        """Write all that a run goes on from. Each episode has its own seed, so between two of them the simulator's state is not needed.

        At the end of a run an episode may be unfinished: with a greater --total-timesteps it begins anew."""
        check_finite(losses | agent.state_dict(), step)
        state = {name: part.state_dict() for name, part in learned.items()} | {
            "config": config,
            "evaluations": evaluations,
            "step": step,
            "episode": episode,
            "wall_time": time.perf_counter() - clock,
            "rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
            "rows": buffer.rows[: int(buffer.added)].clone(),  # a view would be saved with all that is behind it
            "added": int(buffer.added),
        }
        write_file(checkpoint_path, lambda file: torch.save(state, file))

    for step in progress:
        # Learn, and only then step the environment: on a GPU the update is queued by then, and both work at the same time.
        if step <= args.learning_starts:
            action = (2 * torch.rand(action_dim) - 1).numpy()
        else:
            actor_input.copy_(torch.from_numpy(observation))
            action = act().cpu().numpy()
            check_finite({"action": torch.from_numpy(action)}, step)
            losses = update()
            if step % 1_000 == 0:
                check_finite(losses, step)
                for name, value in losses.items():
                    writer.add_scalar(f"losses/{name}", value.item(), step)
        next_observation, reward, terminated, truncated, _ = env.step(action)
        # Neither the reward nor the end of an episode is stored: values are bootstrapped through terminations, or else the
        # surrogate reward, which is never negative, would make staying alive good in itself.
        buffer.add(observation, action, next_observation)
        observation = next_observation

        if not fallen:  # what comes after a termination is learned from, but no part of the return
            episode_return, episode_length = episode_return + float(reward), episode_length + 1
        fallen = fallen or terminated
        # A cut by chance: were it always after as many steps, nothing would ever be seen to follow the last of them, and the values there,
        # which are bootstrapped, would be held by nothing. On Hopper they rose until falling seemed to pay.
        done = truncated or (fallen and torch.rand(()).item() < args.cut_probability)
        if done:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", episode_length, step)
            episode, episode_return, episode_length, fallen = episode + 1, 0.0, 0, False
            observation, _ = env.reset(seed=episode_seed(args.seed, TRAINING, episode))

        if step % args.eval_every == 0:
            check_finite(losses | agent.state_dict(), step)
            seeds = [episode_seed(args.seed, EVALUATION, step, i) for i in range(args.eval_episodes)]
            episodes = [play_episode(agent.actor, eval_env, seed) for seed in seeds]
            evaluations.append({"step": step} | summarize(episodes) | compare_rewards(episodes, agent.surrogate_return))
            write_evaluations(run_dir / "evaluations.csv", evaluations)
            mean_return, std_return = evaluations[-1]["mean_return"], evaluations[-1]["std_return"]
            writer.add_scalar("eval/return", mean_return, step)
            writer.add_scalar("charts/reward_correlation", evaluations[-1]["reward_correlation"], step)
            writer.add_scalar("charts/SPS", step / (time.perf_counter() - clock), step)
            share = share_of_expert(mean_return, expert_return)
            progress.write(f"{step:>9,} steps: return {mean_return:8.1f} ± {std_return:6.1f}, {share}")
            progress.set_postfix_str(f"return {mean_return:.0f}, {share}")
        if done and step < args.total_timesteps and (stop or step - last_checkpoint >= args.checkpoint_every):
            checkpoint(step)
            last_checkpoint = step
            if stop:
                progress.close()
                writer.close()
                fail(f"{run_dir}: stopped at step {step:,}; the same command with --resume goes on from there", 128 + stop[0])

    # The end: policy, summary, and last the checkpoint, which tells --resume that all of it is there.
    writer.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is no episode left to wait for
    signal.signal(signal.SIGINT, signal.default_int_handler)
    check_finite(losses | agent.state_dict(), step)
    policy = {"actor": agent.actor.state_dict(), "env_id": args.env_id, "sac_hidden_dim": args.sac_hidden_dim}
    write_file(run_dir / "policy.pt", lambda file: torch.save(policy, file))
    finished = {"finished_at_step": step, "wall_time_seconds": round(time.perf_counter() - clock), "expert_return": expert_return}
    write_file(run_dir / "config.json", lambda file: file.write(json.dumps(config | finished, indent=2).encode()))
    checkpoint(step)
    print(f"{run_dir}: {step:,} steps in {finished['wall_time_seconds'] / 60:.1f} minutes")
    if evaluations:
        returns = np.array([row["mean_return"] for row in evaluations])
        best, final = returns.max(), returns[-5:].mean()
        print(f"best return {best:.1f}, {share_of_expert(best, expert_return)}")
        print(f"final return {final:.1f}, {share_of_expert(final, expert_return)} (mean of the last {len(returns[-5:])} evaluations)")


if __name__ == "__main__":
    # TensorBoard writes in a thread, and raises here what failed there: a full disk is one line.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else threading.__excepthook__(args)
    try:
        main(tyro.cli(Args))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"{error}; what was written whole, a checkpoint too, is still there")
