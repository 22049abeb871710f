"""GAIL: adversarial imitation learning, the baseline: diffail.py with another discriminator, in one file.
Ho & Ermon, NeurIPS 2016, arXiv 1606.03476; with --state-only GAIfO, Torabi et al. 2018, arXiv 1807.06158.
A discriminator learns to tell the expert's x from the policy's; the policy is paid for x like the expert's.
x is [s, a], a state and an action, or with --state-only [s, s']. The true reward is only logged.

    D = sigmoid(f(x))                            near 1: the expert's               logit
    min -E_expert[log D] - E_policy[log(1 - D)]  tell them apart                    Discriminator.loss
    R = log D                                    pay, in the authors' code           Discriminator.reward
    max E[sum of gamma^k (2 R - alpha log pi)]   by SAC, arXiv 1812.05905           critic_loss, actor_loss
"""
import copy
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

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
    env_id: str = "HalfCheetah-v4"  # Gymnasium environment, its observations and actions Boxes of floats
    state_only: bool = False  # imitate [s, s'] instead of [s, a]
    demos: Path | None = None  # demonstrations (.npz); None: demos/ENV_ID.npz beside this script
    num_trajectories: int = 1  # demonstrated episodes to learn from, the first of the file
    seed: int = 1  # of everything random
    total_timesteps: int = 500_000  # environment steps
    # Discriminator
    normalize: bool = False  # scale x by the expert's mean and standard deviation
    discriminator_window: int = 1_000_000  # learn from the policy's last so many steps
    reward_form: Literal["paper", "released"] = "released"  # pay -log(1 - D), or log D
    grad_penalty: float = 4.0  # weight of (|grad_x f| - 1)^2, which keeps f from being a cliff
    discriminator_lr: float = 3e-4  # Adam learning rate
    # SAC
    learning_starts: int = 5_000  # uniformly random steps before the first update
    batch_size: int = 256  # samples per update, of the expert and of the policy
    gamma: float = 0.99  # discount factor
    sac_lr: float = 3e-4  # Adam learning rate of actor and critics
    alpha: float | None = None  # temperature, the weight of entropy; None: 0.12 / dim(A)
    cut_probability: float = 0.01  # that a training episode ends, in each step from a fall (termination) on
    # The run
    eval_every: int = 10_000  # steps between evaluations, each with a checkpoint
    eval_episodes: int = 10  # episodes of the deterministic policy per evaluation
    resume: bool = False  # go on from the last checkpoint, or begin where there is none
    output_dir: Path = Path("runs")  # folder of the run directories
    device: Literal["auto", "cpu"] = "auto"  # auto: CUDA where there is one
    threads: int = 2  # of PyTorch on the CPU; 1 where other work runs beside it
    compile: bool | None = None  # torch.compile: slower start, faster steps; None: where a compiler is


ROBOTS = {  # their own defaults, found by experiment
    "Walker2d": Args(total_timesteps=750_000),
    "Hopper": Args(total_timesteps=750_000, normalize=True, discriminator_window=100_000),
}  # fmt: skip
MAY_CHANGE_ON_RESUME = {"demos", "total_timesteps", "resume", "output_dir", "device", "threads", "compile"}
NAMES = "observations", "actions", "next_observations", "rewards", "terminations", "truncations"


class Discriminator(nn.Module):
    """D(x) = sigmoid(f(x)), f being an MLP.

    To try another method put its class here, under this name: made from the expert's x [N, d], with a `loss`
    for its parameters to descend and a `reward`, without gradient, to pay the policy; x comes as it is."""

    def __init__(self, expert: Tensor, args: Args):
        super().__init__()
        self.args, dim = args, expert.shape[1]
        self.register_buffer("mean", expert.mean(0) if args.normalize else torch.zeros(dim))
        std = expert.std(0) if args.normalize else torch.ones(dim)
        self.register_buffer("std", std.masked_fill(std < 1e-6, 1.0))  # what never varies is only centred
        layers = nn.Linear(dim, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)
        self.net = nn.Sequential(*layers)

    def logit(self, x):
        """f [B], clamped, of scaled x [B, d]."""
        return self.net(x).squeeze(-1).clamp(-10, 10)

    def loss(self, expert: Tensor, policy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective for the expert's x and the policy's, [B, d] each, and its parts to log."""
        x = (torch.cat([expert, policy]) - self.mean) / self.std
        expert_logit, policy_logit = self.logit(x).chunk(2)
        expert_loss, policy_loss = F.softplus(-expert_logit).mean(), F.softplus(policy_logit).mean()
        loss = (expert_loss + policy_loss) / 2
        parts = {"expert_loss": expert_loss, "policy_loss": policy_loss}
        if self.args.grad_penalty:  # between the expert's and the policy's (Gulrajani et al. 2017, eq. 3)
            mix = torch.rand(len(expert), 1, device=x.device)
            expert, policy = x.chunk(2)
            x = (mix * expert + (1 - mix) * policy).requires_grad_()
            output = self.logit(x)
            (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            parts["grad_penalty"] = (grad.norm(dim=-1) - 1).square().mean()
            loss = loss + self.args.grad_penalty * parts["grad_penalty"]
        return loss, parts

    @torch.no_grad()
    def reward(self, x: Tensor) -> Tensor:
        """R [B] of x [B, d]."""
        logit = self.logit((x - self.mean) / self.std)
        return F.softplus(logit) if self.args.reward_form == "paper" else -F.softplus(-logit)


def mlp(inputs, outputs):
    layers = nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)
    return nn.Sequential(*layers)


def sample(actor, s):
    """a = tanh(u) in [-1, 1], log pi(a|s), mean and log std of u ~ N(mean, std) (SAC, appendix C)."""
    mean, log_std = actor(s).chunk(2, dim=-1)
    log_std, eps = log_std.clamp(-20, 2), torch.randn_like(mean)
    u = mean + log_std.exp() * eps
    log_normal = -0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - a^2), exact where tanh saturates
    return u.tanh(), (log_normal - log_det).sum(-1), mean, log_std


def q_values(critics, s, a):
    """Q1(s, a) and Q2(s, a), [B] each."""
    return [critic(torch.cat([s, a], dim=-1)).squeeze(-1) for critic in critics]


class ReplayBuffer:
    """All transitions of the run, on the training device: a row each, of parts with these widths."""

    def __init__(self, capacity, widths, device):
        self.rows, self.widths = torch.empty(capacity, sum(widths), device=device), widths
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # a tensor, for the CUDA graph

    def add(self, step, *parts):
        self.rows[step - 1] = torch.from_numpy(np.concatenate(parts, dtype=np.float32))
        self.size.fill_(step)

    def sample(self, batch_size, window=None):
        """Parts [batch_size, width] of random transitions, of all or of the last `window`."""
        count = self.size.clamp(max=window or len(self.rows))
        # randint(count) would wait for the GPU. The remainder's bias is below 1e-12.
        rows = self.size - count + torch.randint(2**62, (batch_size,), device=count.device) % count
        return self.rows[rows].split(self.widths, dim=1)


def backward(loss_function, parameters, *batch):
    """Gradients of the loss, into these parameters alone; returns scalars to log."""
    loss, scalars = loss_function(*batch)
    loss.backward(inputs=parameters)
    return {name: value.detach() for name, value in scalars.items()}


class Agent(nn.Module):
    """Networks, optimizers and update, given the expert's s, a in [-1, 1] and s_next, [N, dim] each."""

    def __init__(self, demos, args):
        super().__init__()
        obs_dim, act_dim, _ = [x.shape[1] for x in demos]
        self.args = args
        self.register_buffer("expert", self.pair(*demos))
        self.discriminator = Discriminator(self.expert, args)
        self.actor = mlp(obs_dim, 2 * act_dim)
        self.critics = nn.ModuleList(mlp(obs_dim + act_dim, 1) for _ in range(2))
        self.targets = copy.deepcopy(self.critics)
        self.register_buffer("log_alpha", torch.tensor(math.log(args.alpha or 0.12 / act_dim)))
        self.to(self.expert.device)
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # capturable in a CUDA graph
        sac_adam = partial(adam, lr=args.sac_lr, betas=(0.25, 0.999))  # the reward moves: little momentum
        self.discriminator_adam = adam(self.discriminator.parameters(), lr=args.discriminator_lr)
        self.critic_adam, self.actor_adam = (sac_adam(x.parameters()) for x in (self.critics, self.actor))
        torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradients become one program
        # Random numbers as uncompiled; no padding, which a measurement decides on: runs would differ.
        options = {"fallback_random": True, "shape_padding": False}
        compiled = partial(torch.compile, disable=not args.compile, options=options)
        self.backward, self.reward = compiled(backward), compiled(self.discriminator.reward)

    def pair(self, s, a, s_next):
        return torch.cat([s, s_next if self.args.state_only else a], dim=-1)

    def update(self, buffer):
        """One step of everything; returns scalars to log. Nothing in it waits for a GPU."""
        s, a, s_next = buffer.sample(self.args.batch_size)
        rewards = 2 * self.reward(self.pair(s, a, s_next))  # 2 is the released code's scale
        expert = self.expert[torch.randint(len(self.expert), (len(s),), device=s.device)]
        policy = self.pair(*buffer.sample(len(s), self.args.discriminator_window))
        side = torch.cuda.Stream() if s.is_cuda else None  # on a GPU the discriminator learns beside SAC
        if side:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            scalars = self.descend(self.discriminator_adam, self.discriminator.loss, expert, policy)
        scalars |= self.descend(self.critic_adam, self.critic_loss, s, a, s_next, rewards)
        scalars |= self.descend(self.actor_adam, self.actor_loss, s)
        with torch.no_grad():
            torch._foreach_lerp_([*self.targets.parameters()], [*self.critics.parameters()], 0.005)
        if side:
            torch.cuda.current_stream().wait_stream(side)
        return scalars | {"surrogate_reward": rewards.mean()}

    def descend(self, adam, loss_function, *batch):
        adam.zero_grad()
        scalars = self.backward(loss_function, adam.param_groups[0]["params"], *batch)
        adam.step()
        return scalars

    def critic_loss(self, s, a, s_next, rewards):
        """Soft Bellman error (SAC, eq. 5). Values go on through a fall: as R >= 0, living would else pay."""
        with torch.no_grad():
            a_next, log_prob, _, _ = sample(self.actor, s_next)
            value = torch.min(*q_values(self.targets, s_next, a_next)) - self.log_alpha.exp() * log_prob
            target = rewards + self.args.gamma * value
        loss = sum(0.5 * F.mse_loss(q, target) for q in q_values(self.critics, s, a))
        return loss, {"qf_loss": loss}

    def actor_loss(self, s):
        """High value and high entropy (SAC, eq. 9), with the released code's small regularizer."""
        a, log_prob, mean, log_std = sample(self.actor, s)
        loss = (self.log_alpha.exp() * log_prob - torch.min(*q_values(self.critics, s, a))).mean()
        regularizer = 1e-3 * (mean.square().mean() + log_std.square().mean())
        return loss + regularizer, {"actor_loss": loss, "entropy": -log_prob.mean()}


def graphed(function):
    """Yields what `function` returns: three times as it is, to fill caches, then by a CUDA graph."""
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


def fail(message, code=2):
    """One line on stderr and, but for code 0, the end; code 2 is for the user's input, files and disk."""
    tqdm.write(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr)
    if code:
        raise SystemExit(code)


def check_args(args):
    """Exits with code 2 where a number is out of range; settles what --compile None is."""
    for name, value in vars(args).items():
        least = {"seed": 0, "alpha": 1e-6}.get(name, 1 if type(value) is int else 0)
        limits = {"gamma": 1, "cut_probability": 1, "learning_starts": args.total_timesteps - 1}
        most = limits.get(name, 2**63 - 1)
        if type(value) in (int, float) and not least <= value <= most and not name.endswith("_return"):
            fail(f"--{name.replace('_', '-')} is {value}, and must be from {least} to {most}")
    has_compiler = shutil.which(torch._inductor.config.cpp.cxx[1]) is not None
    if args.compile and not has_compiler:
        fail("--compile True needs a C++ compiler: g++, or what CXX names")
    args.compile = has_compiler if args.compile is None else args.compile


def make_env(env_id: str) -> gym.Env:
    """Actions are in [-1, 1], observations float32. Exits with code 2 where that cannot be."""
    gym.logger.min_level = gym.logger.ERROR  # no warning that v4 is out of date: v4 is meant
    try:
        env = gym.make(env_id)
        for space in env.observation_space, env.action_space:
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
                raise TypeError(f"its spaces must be one-dimensional Boxes of floats, not {space}")
        env = gym.wrappers.TransformObservation(env, lambda s: s.astype(np.float32), None)
        return gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))  # refuses infinite bounds
    except Exception as error:  # environments fail in ways of their own
        fail(f"cannot use the environment {env_id!r}: {error}")


def load_demonstrations(path: Path, env: gym.Env, num_trajectories: int) -> tuple[list[Tensor], float]:
    """s, a in [-1, 1] and s_next [N, dim], and the expert's return. Exits with code 2 where they are bad."""
    env_id, limits, space = env.spec.id, env.env.action_space, env.observation_space
    try:
        with np.load(path) as file:
            data, metadata = [file[name] for name in NAMES], json.loads(file["metadata"].item())
        shapes = [(len(data[0]), *shape) for shape in (space.shape, limits.shape, space.shape, (), (), ())]
        if [np.shape(x) for x in data] != shapes or metadata["env_id"] != env_id:
            raise ValueError(f"it needs arrays of shapes {shapes}; it is of {metadata['env_id']}")
        s, a, s_next, rewards, terminated, truncated = data
        a = 2 * (a - limits.low) / (limits.high - limits.low) - 1
        ends, rows, returns = np.flatnonzero(terminated | truncated), np.arange(len(s)), metadata["returns"]
        if not num_trajectories <= len(ends) == len(returns):
            raise ValueError(f"it holds {len(ends)} episodes and {len(returns)} returns")
        follows = (s_next == np.roll(s, -1, axis=0)).all(1) | np.isin(rows, ends)
        sums = np.add.reduceat(rewards, np.r_[0, ends[:-1] + 1], dtype=float)
        longest, made = env.spec.max_episode_steps, metadata.get("versions", {}).get("mujoco")
        for code, where, right, what in (
            (2, rows, np.isfinite(np.c_[s, a, s_next, rewards]).all(1), "row {} is not finite"),
            (2, rows, (np.abs(a) <= 1 + 1e-5).all(1), "row {}: an action out of bounds"),
            (2, rows[-1:], ends[-1:] == rows[-1:], "row {}, the last, ends no episode"),
            (2, rows, follows | (metadata.get("subsampled") is True), "row {}: next_observations is not the "
             'next row; for rows with gaps put "subsampled": true into the metadata'),
            (2, ends, np.diff(ends, prepend=-1) <= (longest or len(s)), "row {} ends too long an episode"),
            (2, ends, np.isclose(sums, returns, rtol=1e-4), "row {}: returns is not the rewards' sum"),
            (0, rows, ((s >= space.low) & (s <= space.high)).all(1), "row {} leaves the observation space"),
            (0, range(s.shape[1]), np.ptp(s, axis=0) > 0, "observations[:, {}] never move"),
            (0, NAMES, np.array([x.dtype == np.float32 for x in data[:4]]), "{} are converted to float32"),
            (0, [made], np.array([made in (None, mujoco.__version__)]), "made by MuJoCo {}, not this one"),
        ):  # fmt: skip
            if not right.all():
                fail(f"{path}: {what.format(where[right.argmin()])}", code)
        arrays = [x[: ends[num_trajectories - 1] + 1].astype(np.float32) for x in (s, a, s_next)]
        return [torch.from_numpy(x) for x in arrays], float(np.mean(returns))
    except Exception as error:  # what a damaged archive raises is open-ended
        make = f"python sac_baseline.py --env-id {env_id} --save-demos {path}"
        fail(f"{path} does not give {num_trajectories} episodes of {env_id}: {error!r}; to make them: {make}")


def write_file(path, content):
    """Write text, or what torch.save takes: `path` is written whole, or left as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if temporary.exists():
            temporary.unlink()
        fail(f"cannot write {path}, and left it as it was: {error}")


def episode_seed(*key):
    """One for each episode, from the run's seed, 0 (training) or 1 (evaluation), and numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def play_episode(actor: nn.Module, env: gym.Env, seed: int) -> list[np.ndarray]:
    """An episode of the deterministic policy tanh(mean): what NAMES says, with actions in [-1, 1]."""
    actor = copy.deepcopy(actor).cpu()  # one state at a time is faster there than on a GPU
    steps, done, (s, _) = [], False, env.reset(seed=seed)
    while not done:
        with torch.no_grad():
            a = actor(torch.from_numpy(s)).chunk(2)[0].tanh().numpy()
        s_next, reward, terminated, truncated, _ = env.step(a)
        steps.append((s, a, s_next, reward, terminated, truncated))
        s, done = s_next, terminated or truncated
    return [np.array(column) for column in zip(*steps)]


def evaluate(agent, env, step):
    """Means over episodes, and the correlation of their surrogate with their true returns."""
    episodes = []
    for i in range(agent.args.eval_episodes):
        s, a, s_next, rewards, *_ = play_episode(agent.actor, env, episode_seed(agent.args.seed, 1, step, i))
        x = agent.pair(*map(torch.from_numpy, (s, a, s_next))).to(agent.expert.device)
        with torch.random.fork_rng():  # the same noise each time, and none of the training's
            torch.manual_seed(0)
            episodes.append((rewards.sum(), len(s), 2 * agent.discriminator.reward(x).sum().item()))
    returns, lengths, surrogates = np.array(episodes).T
    varies = np.ptp(returns) > 0 and np.ptp(surrogates) > 0
    correlation = np.corrcoef(surrogates, returns)[0, 1] if varies else math.nan
    row = {"mean_return": np.mean(returns), "std_return": np.std(returns), "mean_length": np.mean(lengths)}
    return row | {"mean_surrogate_return": np.mean(surrogates), "reward_correlation": correlation}


def train(args: Args):
    check_args(args)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # dead units leave denormal numbers in Adam, which are slow
    torch.manual_seed(args.seed)
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    demos_path = args.demos or Path(__file__).parent / "demos" / f"{args.env_id}.npz"
    demos, expert_return = load_demonstrations(demos_path, env, args.num_trajectories)
    agent = Agent([x.to(device) for x in demos], args)
    buffer = ReplayBuffer(args.total_timesteps, [x.shape[1] for x in demos], device)
    actor_input = torch.zeros(env.observation_space.shape, device=device)
    act, update = torch.no_grad()(lambda: sample(agent.actor, actor_input)[0]), partial(agent.update, buffer)
    if device == "cuda":
        act, update = partial(next, graphed(act)), partial(next, graphed(update))

    # `run` is what changes and is neither learned nor stored
    setting = "state-only" if args.state_only else "state-action"
    run_name = f"{args.env_id}__{Path(__file__).stem}__{setting}__{args.num_trajectories}traj__s{args.seed}"
    run_dir = args.output_dir / run_name
    checkpoint, config_path = run_dir / "checkpoint.pt", run_dir / "config.json"
    if config_path.exists() and not checkpoint.exists() and b"finished_at_step" in config_path.read_bytes():
        fail(f"{run_dir} holds a finished run without its checkpoint: choose another --output-dir or --seed")
    if run_dir.exists() and not args.resume:
        fail(f"{run_dir} holds a run already: --resume it, or choose another --output-dir or --seed")
    git = partial(subprocess.run, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = git("git describe --always --dirty --abbrev=40").stdout.strip()
    config = {"args": vars(args), "commit": commit, "expert_return": expert_return}
    config["versions"] = {module.__name__: str(module.__version__) for module in (torch, gym, mujoco, np)}
    learned = agent, agent.discriminator_adam, agent.critic_adam, agent.actor_adam
    run = SimpleNamespace(step=0, seconds=0.0, csv="", episode=0, begun=0, rewards=[], fallen=False)
    if args.resume and checkpoint.exists():
        try:
            if zipfile.ZipFile(checkpoint).testzip():  # PyTorch does not look at the archive's checksums
                raise ValueError("checksum")
            saved = torch.load(checkpoint, map_location=device)
            kinds = [{name: type(value) for name, value in x.items()} for x in (vars(run), saved["run"])]
            run = SimpleNamespace(**saved["run"])
            changed = [name for name, value in saved["args"].items() if value != getattr(args, name)]
            changed += ["demos"] * (not torch.equal(saved["learned"][0]["expert"], agent.expert))
            changed += ["total_timesteps, a greater one"] * (run.step > args.total_timesteps)
            if changed:
                fail(f"{run_dir} was made with another {', '.join(changed)}")
            for part, state in zip(learned, saved["learned"]):
                part.load_state_dict(state)
            for adam in learned[1:]:
                for x, moments in adam.state.items():  # the fused step would write beyond smaller ones
                    torch.stack([x, moments["exp_avg"], moments["exp_avg_sq"]])
            rows = buffer.rows[: run.step]
            if kinds[0] != kinds[1] or rows.shape != saved["rows"].shape:
                raise ValueError("parts")
            rows.copy_(saved["rows"])
            buffer.size.fill_(run.step)
            torch.set_rng_state(saved["rng"].cpu())
        except Exception as error:  # what a damaged archive raises is open-ended
            fail(f"{checkpoint} cannot be read, and is left as it is: {type(error).__name__}")
    s, _ = env.reset(seed=episode_seed(args.seed, 0, run.episode))
    for a in buffer.rows[run.begun : run.step].cpu().split(buffer.widths, dim=1)[1].numpy():
        s, *_ = env.step(a)  # the unfinished episode again, to where it was
    write_file(config_path, json.dumps(config, indent=2, default=str))
    writer, scalars, signals = SummaryWriter(run_dir, purge_step=run.step + 1), {}, []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with SIGHUP
            signal.signal(number, lambda number, _: signals.append(number))

    steps, start = range(run.step + 1, args.total_timesteps + 1), time.time() - run.seconds
    for step in tqdm(steps, initial=run.step, total=args.total_timesteps, disable=None):
        # Learn, and only then step the environment: on a GPU both work at the same time.
        if step <= args.learning_starts:
            a = (2 * torch.rand(env.action_space.shape) - 1).numpy()
        else:
            actor_input.copy_(torch.from_numpy(s))
            a, scalars = act().cpu().numpy(), update()
        s_next, reward, terminated, truncated, _ = env.step(a)
        buffer.add(step, s, a, s_next)
        s, logs = s_next, {}
        if not run.fallen:  # what comes after a fall is learned from, but no part of the return
            run.rewards.append(float(reward))
            run.fallen = bool(terminated)
        # After a fall an episode goes on, to show that it leads nowhere, and ends by chance: nothing holds
        # down the value of its last state, so that must not always be the same one.
        if truncated or (run.fallen and torch.rand(()).item() < args.cut_probability):
            logs = {"charts/episodic_return": sum(run.rewards), "charts/episodic_length": len(run.rewards)}
            run.episode, run.begun, run.rewards, run.fallen = run.episode + 1, step, [], False
            s, _ = env.reset(seed=episode_seed(args.seed, 0, run.episode))
        if step % 1_000 == 0:
            logs |= {f"losses/{name}": value.item() for name, value in scalars.items()}
        if step % args.eval_every == 0:
            row = evaluate(agent, eval_env, step)
            logs |= {f"eval/{name}": value for name, value in row.items()}
            logs["charts/SPS"] = step / (time.time() - start)
            run.csv = run.csv or ",".join(["step", *row]) + "\n"
            run.csv += ",".join([str(step), *(f"{value:.3f}" for value in row.values())]) + "\n"
            mean, std = row["mean_return"], row["std_return"]
            share = f", {100 * mean / expert_return:.1f} % of the expert's" if expert_return > 0 else ""
            tqdm.write(f"{step:>9,} steps: return {mean:8.1f} ± {std:6.1f}{share}")
        for name, value in logs.items():
            writer.add_scalar(name, value, step)
        if signals or step % args.eval_every == 0 or step == args.total_timesteps:
            for name, value in (agent.state_dict() | scalars).items():
                if not value.isfinite().all():
                    fail(f"{name} is not finite at step {step}; the last checkpoint is kept", 1)
            run.step, run.seconds = step, time.time() - start
            kept = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE_ON_RESUME}
            saved = {"run": vars(run), "args": kept, "rng": torch.get_rng_state()}
            saved |= {"learned": [part.state_dict() for part in learned], "rows": buffer.rows[:step].clone()}
            write_file(run_dir / "policy.pt", agent.actor.state_dict())
            write_file(run_dir / "evaluations.csv", run.csv)
            write_file(checkpoint, saved)  # last: --resume makes what is missing again
        if signals and step < args.total_timesteps:
            fail(f"{run_dir}: stopped at step {step:,}; --resume goes on from there", 128 + signals[0])

    writer.close()
    config |= {"finished_at_step": run.step, "wall_time_seconds": round(run.seconds)}
    write_file(config_path, json.dumps(config, indent=2, default=str))
    print(f"{run_dir}: {run.step:,} steps in {run.seconds / 60:.1f} minutes")


if __name__ == "__main__":
    robot = tyro.cli(Args).env_id.split("-v")[0]
    try:
        train(tyro.cli(Args, default=ROBOTS.get(robot, Args())))
    except OSError as error:  # a full disk, say
        fail(f"{error}; what was written whole, a checkpoint too, is still there")
