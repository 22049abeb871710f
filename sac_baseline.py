"""Soft Actor-Critic on the true reward, in one file: the yardstick, and the source of the experts.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905:

    J_Q = 1/2 E[(Q(s, a) - (r + gamma (min Q'(s', a') - alpha log pi(a'|s'))))^2]       eq. 5     critic_loss
    J_pi = E[alpha log pi(a|s) - min Q(s, a)] with a = tanh(mean + std eps)             eq. 9     actor_loss
    J_alpha = E[-alpha (log pi(a|s) + target entropy)]                                  eq. 18    actor_loss

gamma is 0 where the task ends. alpha is tuned, towards a target entropy of -dim(A).

    python sac_baseline.py --env-id HalfCheetah-v4
    python sac_baseline.py --env-id Pendulum-v1 --target-return -180 --save-demos demos/Pendulum-v1.npz
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
    # The task
    env_id: str = "HalfCheetah-v4"  # Gymnasium environment with Box observations and Box actions
    seed: int = 1  # of everything random: networks, exploration, minibatches, environment
    total_timesteps: int = 1_000_000  # environment steps

    # SAC
    learning_starts: int = 5_000  # uniformly random steps before the first update
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    sac_hidden_dim: int = 256  # units in each of the two hidden layers of actor and critics
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critics towards the critics
    actor_lr: float = 3e-4  # Adam learning rate of the actor and of the temperature
    critic_lr: float = 1e-3  # Adam learning rate of the critics

    # Demonstrations
    target_return: float | None = None  # stop as soon as the mean return of an evaluation reaches this
    save_demos: Path | None = None  # record the final deterministic policy to this .npz file
    demo_episodes: int = 16  # episodes to record
    min_demo_return: float | None = None  # leave out episodes with a lower return

    # The run
    eval_every: int = 10_000  # steps between evaluations
    eval_episodes: int = 10  # episodes of the deterministic policy per evaluation
    checkpoint_every: int = 25_000  # a checkpoint at the first episode end after this many steps
    resume: bool = False  # go on from the run's last checkpoint, or begin where there is none
    output_dir: Path = Path("runs")  # folder of the run directories
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    threads: int = 2  # of PyTorch on the CPU: 2 for one run alone, up to a third less time than 1; for several side by side 1 each
    compile: bool | None = None  # compile losses and gradients: a slower start, faster steps; None: where a C++ compiler is


MAY_CHANGE_ON_RESUME = {"resume", "output_dir", "total_timesteps", "device", "threads", "compile", "checkpoint_every"}
MAY_CHANGE_ON_RESUME |= {"target_return", "save_demos", "demo_episodes", "min_demo_return"}
TRAINING, EVALUATION, DEMONSTRATION = range(3)  # streams of episode seeds


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


class SAC(nn.Module):
    """Networks, optimisers and the update step.

    In the methods a batch is observations [B, obs], actions [B, act] in [-1, 1], next_observations [B, obs], and rewards [B]."""

    def __init__(self, observation_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.target_entropy = args, -action_dim
        self.actor = Actor(observation_dim, action_dim, args.sac_hidden_dim)
        self.critic = TwinCritic(observation_dim, action_dim, args.sac_hidden_dim)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.to(device)
        self.gradients = compiled(gradients) if args.compile else gradients
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # capturable in a CUDA graph
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_lr)
        self.actor_optimizer = adam([*self.actor.parameters(), self.log_alpha], lr=args.actor_lr)

    def update(self, buffer: ReplayBuffer) -> dict[str, Tensor]:
        """One step on everything; returns scalars to log. Nothing in it waits for the GPU."""
        *batch, rewards, terminations = buffer.sample(self.args.batch_size)
        discount = self.args.gamma * (1 - terminations.squeeze(-1))
        losses = self.descend(self.critic_optimizer, self.critic_loss, *batch, rewards.squeeze(-1), discount)
        losses |= self.descend(self.actor_optimizer, self.actor_loss, batch[0])
        polyak_update(self.target_critic, self.critic, self.args.tau)
        return losses

    def descend(self, optimizer: torch.optim.Optimizer, loss_function: Callable, *batch: Tensor) -> dict[str, Tensor]:
        """One step of the optimiser down loss_function(*batch)[0], on its own parameters alone; returns scalars to log."""
        parameters = optimizer.param_groups[0]["params"]
        grads, losses = self.gradients(loss_function, parameters, *batch)
        for parameter, grad in zip(parameters, grads):
            parameter.grad = grad.contiguous()  # compiled, it may have another layout, which the fused Adam refuses or misreads
        optimizer.step()
        return losses

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
        """High value and high entropy for the actor (SAC, eq. 9), and the target entropy for the temperature (eq. 18).

        In place of eq. 18's factor alpha there is log alpha, as in most code: the gradient keeps its sign."""
        alpha = self.log_alpha.detach().exp()
        actions, log_prob, _, _ = self.actor.sample(observations)
        pi_loss = (alpha * log_prob - torch.min(*self.critic(observations, actions))).mean()
        loss = pi_loss - self.log_alpha * (log_prob.detach().mean() + self.target_entropy)
        return loss, {"actor_loss": pi_loss, "alpha": alpha, "entropy": -log_prob.mean()}


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


def check_new(path: Path):
    """Exit with code 2 where `path` exists or its folder cannot be made: nothing is overwritten."""
    if path.exists():
        fail(f"--save-demos {path}: the file exists already, and is not overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--save-demos {path}: cannot make its folder: {error.strerror}")


def record_demonstrations(path: Path, actor: Actor, env: gym.Env, args: Args, config: dict):
    """Write episodes of the deterministic policy to a new .npz file, and print their returns.

    Exits with code 1 where --min-demo-return leaves out more than nine episodes in ten."""
    seeds, episodes, tried = [], [], 0
    while len(episodes) < args.demo_episodes:
        if tried == 10 * args.demo_episodes:
            fail(f"{len(episodes)} of {tried} episodes reached --min-demo-return {args.min_demo_return}: nothing was recorded", 1)
        seed = episode_seed(args.seed, DEMONSTRATION, tried)
        episode, tried = play_episode(actor, env, seed), tried + 1
        if args.min_demo_return is None or episode["rewards"].sum() >= args.min_demo_return:
            seeds.append(seed)
            episodes.append(episode)
    returns = np.array([episode["rewards"].sum() for episode in episodes])
    arrays = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
    arrays["actions"] = env.action(arrays["actions"])  # in the environment's units
    arrays = {name: array if array.dtype == bool else array.astype(np.float32) for name, array in arrays.items()}
    metadata = {"env_id": args.env_id, "returns": returns.tolist(), "episode_seeds": seeds, "seed": args.seed}
    metadata["episodes_skipped"] = tried - len(episodes)
    metadata |= {name: config[name] for name in ("command", "commit", "resumed", "versions") if name in config}
    check_new(path)  # again: the training before this took its time
    write_file(path, lambda file: np.savez_compressed(file, metadata=json.dumps(metadata), **arrays))
    skipped = f", {tried - len(returns)} others skipped" if args.min_demo_return is not None else ""
    print(f"{path}: {len(returns)} episodes, return {returns.mean():.1f} ± {returns.std():.1f}{skipped}")


# -------------------------------------------------------------------------------------------------------------- training


def main(args: Args):
    # Set-up: everything is checked before anything is written.
    check_numbers(args)
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
    if args.save_demos:
        check_new(args.save_demos)

    run_dir = args.output_dir / f"{args.env_id}__sac_baseline__s{args.seed}"
    agent = SAC(observation_dim, action_dim, args, device)
    buffer = ReplayBuffer(args.buffer_size, (observation_dim, action_dim, observation_dim, 1, 1), device)
    actor_input = torch.zeros(observation_dim, device=device)
    act, update = partial(agent.actor.act, actor_input), partial(agent.update, buffer)
    if device.type == "cuda":
        act, update = partial(next, graphed(act)), partial(next, graphed(update))
    learned = {"agent": agent, "critic_optimizer": agent.critic_optimizer, "actor_optimizer": agent.actor_optimizer}

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
        target, last = args.target_return, (evaluations or [{"step": 0}])[-1]
        reached = target is not None and last["step"] == start and last["mean_return"] >= target
        if start >= args.total_timesteps or reached:
            print(f"{run_dir} has finished its {start:,} steps already")
            if target is not None and not reached:
                fail(f"the last evaluation did not reach --target-return {target}: nothing was recorded", 1)
            if args.save_demos:
                record_demonstrations(args.save_demos, agent.actor, eval_env, args, config)
            return
    write_file(run_dir / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
    writer = SummaryWriter(run_dir, purge_step=start + 1)
    losses, stop = {}, catch_stop_signals()
    steps = range(start + 1, args.total_timesteps + 1)
    progress = tqdm(steps, initial=start, total=args.total_timesteps, unit=" steps", disable=None, dynamic_ncols=True)
    observation, _ = env.reset(seed=episode_seed(args.seed, TRAINING, episode))
    episode_return, episode_length, last_checkpoint, clock = 0.0, 0, start, time.perf_counter() - wall_time

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
        # A truncated episode would have gone on, so values are bootstrapped through its end; a terminated one is over.
        buffer.add(observation, action, next_observation, np.array([reward]), np.array([terminated]))
        observation = next_observation

        done = terminated or truncated
        episode_return, episode_length = episode_return + float(reward), episode_length + 1
        if done:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", episode_length, step)
            episode, episode_return, episode_length = episode + 1, 0.0, 0
            observation, _ = env.reset(seed=episode_seed(args.seed, TRAINING, episode))

        if step % args.eval_every == 0:
            check_finite(losses | agent.state_dict(), step)
            seeds = [episode_seed(args.seed, EVALUATION, step, i) for i in range(args.eval_episodes)]
            episodes = [play_episode(agent.actor, eval_env, seed) for seed in seeds]
            evaluations.append({"step": step} | summarize(episodes))
            write_evaluations(run_dir / "evaluations.csv", evaluations)
            mean_return, std_return = evaluations[-1]["mean_return"], evaluations[-1]["std_return"]
            writer.add_scalar("eval/return", mean_return, step)
            writer.add_scalar("charts/SPS", step / (time.perf_counter() - clock), step)
            progress.write(f"{step:>9,} steps: return {mean_return:8.1f} ± {std_return:6.1f}")
            progress.set_postfix_str(f"return {mean_return:.0f}")
            if args.target_return is not None and mean_return >= args.target_return:
                break
        if done and step < args.total_timesteps and (stop or step - last_checkpoint >= args.checkpoint_every):
            checkpoint(step)
            last_checkpoint = step
            if stop:
                progress.close()
                writer.close()
                fail(f"{run_dir}: stopped at step {step:,}; the same command with --resume goes on from there", 128 + stop[0])

    # The end: policy, summary, and last the checkpoint, which tells --resume that all of it is there; then the demonstrations.
    writer.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is no episode left to wait for
    signal.signal(signal.SIGINT, signal.default_int_handler)
    check_finite(losses | agent.state_dict(), step)
    policy = {"actor": agent.actor.state_dict(), "env_id": args.env_id, "sac_hidden_dim": args.sac_hidden_dim}
    write_file(run_dir / "policy.pt", lambda file: torch.save(policy, file))
    finished = {"finished_at_step": step, "wall_time_seconds": round(time.perf_counter() - clock)}
    write_file(run_dir / "config.json", lambda file: file.write(json.dumps(config | finished, indent=2).encode()))
    checkpoint(step)
    print(f"{run_dir}: {step:,} steps in {finished['wall_time_seconds'] / 60:.1f} minutes")
    if evaluations:
        returns = np.array([row["mean_return"] for row in evaluations])
        print(f"best return {returns.max():.1f}, final return {returns[-5:].mean():.1f} (mean of the last {len(returns[-5:])} evaluations)")
    if args.target_return is not None and not (evaluations and evaluations[-1]["mean_return"] >= args.target_return):
        fail(f"the last evaluation did not reach --target-return {args.target_return}: nothing was recorded", 1)
    if args.save_demos:
        record_demonstrations(args.save_demos, agent.actor, eval_env, args, config)


if __name__ == "__main__":
    # TensorBoard writes in a thread, and raises here what failed there: a full disk is one line.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else threading.__excepthook__(args)
    try:
        main(tyro.cli(Args))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"{error}; what was written whole, a checkpoint too, is still there")
