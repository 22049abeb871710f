"""SAC on the true reward, in one file: the yardstick for diffail.py, and the source of its experts.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905:

    J_Q = 1/2 E[(Q(s, a) - r - gamma (min Q'(s', a') - alpha log pi(a'|s')))^2]   eq. 5    critic_loss
    J_pi = E[alpha log pi(a|s) - min Q(s, a)], a = tanh(mean + std eps)           eq. 9    actor_loss
    J_alpha = E[-alpha (log pi(a|s) - dim(A))]                                    eq. 18   actor_loss

gamma is 0 where the task ends.

    python sac_baseline.py --env-id HalfCheetah-v4
    python sac_baseline.py --env-id Pendulum-v1 --target-return -180 --save-demos demos/Pendulum-v1.npz
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
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # The task
    env_id: str = "HalfCheetah-v4"  # Gymnasium environment with Box observations and Box actions
    seed: int = 1  # of everything random
    total_timesteps: int = 1_000_000  # environment steps
    # SAC
    learning_starts: int = 5_000  # uniformly random steps before the first update
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount factor
    actor_lr: float = 3e-4  # Adam learning rate of the actor and of the temperature
    critic_lr: float = 1e-3  # Adam learning rate of the critics
    # Demonstrations
    target_return: float | None = None  # stop as soon as the mean return of an evaluation reaches this
    save_demos: Path | None = None  # record the final deterministic policy to this new .npz file
    demo_episodes: int = 16  # episodes to record
    min_demo_return: float | None = None  # leave out episodes with a lower return
    # The run
    eval_every: int = 10_000  # steps between evaluations, each with a checkpoint
    eval_episodes: int = 10  # episodes of the deterministic policy per evaluation
    resume: bool = False  # go on from the run's last checkpoint, or begin where there is none
    output_dir: Path = Path("runs")  # folder of the run directories
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    threads: int = 2  # of PyTorch on the CPU; 1 where other work runs beside it
    compile: bool | None = None  # torch.compile: slower start, faster steps; None: where a compiler is


MAY_CHANGE_ON_RESUME = {"total_timesteps", "resume", "output_dir", "device", "threads", "compile"}
MAY_CHANGE_ON_RESUME |= {"target_return", "save_demos", "demo_episodes", "min_demo_return"}
NAMES = "observations", "actions", "next_observations", "rewards", "terminations", "truncations"


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


class SAC(nn.Module):
    """Networks, optimizers and update. s is [B, obs], a [B, act] in [-1, 1], s_next [B, obs], rewards [B]."""

    def __init__(self, obs_dim, act_dim, args, device):
        super().__init__()
        self.args, self.target_entropy = args, -act_dim
        self.actor = mlp(obs_dim, 2 * act_dim)
        self.critics = nn.ModuleList(mlp(obs_dim + act_dim, 1) for _ in range(2))
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.to(device)
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # capturable in a CUDA graph
        self.critic_adam = adam(self.critics.parameters(), lr=args.critic_lr)
        self.actor_adam = adam([*self.actor.parameters(), self.log_alpha], lr=args.actor_lr)
        torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradients become one program
        # Random numbers as uncompiled; no padding, which a measurement decides on: runs would differ.
        options = {"fallback_random": True, "shape_padding": False}
        compiled = partial(torch.compile, disable=not args.compile, options=options)
        self.backward = compiled(backward)

    def update(self, buffer):
        """One step of everything; returns scalars to log. Nothing in it waits for a GPU."""
        s, a, s_next, rewards, terminated = buffer.sample(self.args.batch_size)
        discount = self.args.gamma * (1 - terminated.squeeze(-1))
        batch = s, a, s_next, rewards.squeeze(-1), discount
        scalars = self.descend(self.critic_adam, self.critic_loss, *batch)
        scalars |= self.descend(self.actor_adam, self.actor_loss, s)
        with torch.no_grad():
            torch._foreach_lerp_([*self.targets.parameters()], [*self.critics.parameters()], 0.005)
        return scalars

    def descend(self, adam, loss_function, *batch):
        adam.zero_grad()
        scalars = self.backward(loss_function, adam.param_groups[0]["params"], *batch)
        adam.step()
        return scalars

    def critic_loss(self, s, a, s_next, rewards, discount):
        """Soft Bellman error of both critics (eq. 5), for a discount [B] that is 0 where the task ends."""
        with torch.no_grad():
            a_next, log_prob, _, _ = sample(self.actor, s_next)
            value = torch.min(*q_values(self.targets, s_next, a_next)) - self.log_alpha.exp() * log_prob
            target = rewards + discount * value
        loss = sum(0.5 * F.mse_loss(q, target) for q in q_values(self.critics, s, a))
        return loss, {"qf_loss": loss}

    def actor_loss(self, s):
        """High value and high entropy for the actor (eq. 9), the target entropy for the temperature (eq. 18).

        In place of eq. 18's factor alpha there is log alpha, as in most code: the gradient keeps its sign."""
        a, log_prob, _, _ = sample(self.actor, s)
        alpha = self.log_alpha.detach().exp()
        loss = (alpha * log_prob - torch.min(*q_values(self.critics, s, a))).mean()
        alpha_loss = -self.log_alpha * (log_prob.detach().mean() + self.target_entropy)
        return loss + alpha_loss, {"actor_loss": loss, "alpha": alpha, "entropy": -log_prob.mean()}


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


def record_demonstrations(path, actor, env, args, config):
    """Write episodes of the deterministic policy to a new .npz file, and print their returns.

    Exits with code 1 where --min-demo-return leaves out more than nine episodes in ten."""
    seeds, episodes, tried = [], [], 0
    while len(episodes) < args.demo_episodes:
        if tried == 10 * args.demo_episodes:
            fail(f"{len(episodes)} of {tried} episodes reached --min-demo-return: nothing was recorded", 1)
        seed, tried = episode_seed(args.seed, 2, tried), tried + 1
        episode = play_episode(actor, env, seed)
        if args.min_demo_return is None or episode[3].sum() >= args.min_demo_return:
            seeds.append(seed)
            episodes.append(episode)
    returns = [float(episode[3].sum()) for episode in episodes]
    arrays = {name: np.concatenate(parts) for name, parts in zip(NAMES, zip(*episodes))}
    arrays["actions"] = env.action(arrays["actions"])  # in the environment's units
    arrays = {name: x if x.dtype == bool else x.astype(np.float32) for name, x in arrays.items()}
    metadata = {"env_id": env.spec.id, "returns": returns, "episode_seeds": seeds, **config}
    metadata["episodes_skipped"] = tried - len(episodes)
    if path.exists():
        fail(f"--save-demos {path}: the file exists already, and is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp.npz")
    np.savez_compressed(temporary, metadata=json.dumps(metadata, default=str), **arrays)
    temporary.replace(path)
    print(f"{path}: {len(returns)} episodes, return {np.mean(returns):.1f} ± {np.std(returns):.1f}")


def train(args: Args):
    check_args(args)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # dead units leave denormal numbers in Adam, which are slow
    torch.manual_seed(args.seed)
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    if args.save_demos and (args.save_demos.exists() or args.save_demos.parent.is_file()):
        fail(f"--save-demos {args.save_demos}: the file exists already, and is not overwritten")
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    agent = SAC(obs_dim, act_dim, args, device)
    buffer = ReplayBuffer(args.total_timesteps, [obs_dim, act_dim, obs_dim, 1, 1], device)
    actor_input = torch.zeros(env.observation_space.shape, device=device)
    act, update = torch.no_grad()(lambda: sample(agent.actor, actor_input)[0]), partial(agent.update, buffer)
    if device == "cuda":
        act, update = partial(next, graphed(act)), partial(next, graphed(update))

    # `run` is what changes and is neither learned nor stored
    run_name = f"{args.env_id}__{Path(__file__).stem}__s{args.seed}"
    run_dir = args.output_dir / run_name
    checkpoint, config_path = run_dir / "checkpoint.pt", run_dir / "config.json"
    if config_path.exists() and not checkpoint.exists() and b"finished_at_step" in config_path.read_bytes():
        fail(f"{run_dir} holds a finished run without its checkpoint: choose another --output-dir or --seed")
    if run_dir.exists() and not args.resume:
        fail(f"{run_dir} holds a run already: --resume it, or choose another --output-dir or --seed")
    git = partial(subprocess.run, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = git("git describe --always --dirty --abbrev=40").stdout.strip()
    config = {"args": vars(args), "commit": commit}
    config["versions"] = {module.__name__: str(module.__version__) for module in (torch, gym, mujoco, np)}
    learned = agent, agent.critic_adam, agent.actor_adam
    run = SimpleNamespace(step=0, seconds=0.0, csv="", episode=0, begun=0, rewards=[], last_return=-math.inf)
    if args.resume and checkpoint.exists():
        try:
            if zipfile.ZipFile(checkpoint).testzip():  # PyTorch does not look at the archive's checksums
                raise ValueError("checksum")
            saved = torch.load(checkpoint, map_location=device)
            kinds = [{name: type(value) for name, value in x.items()} for x in (vars(run), saved["run"])]
            run = SimpleNamespace(**saved["run"])
            changed = [name for name, value in saved["args"].items() if value != getattr(args, name)]
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
    target = math.inf if args.target_return is None else args.target_return
    if run.last_return >= target and run.step % args.eval_every == 0:
        steps = range(0)  # what is left is to record
    for step in tqdm(steps, initial=run.step, total=args.total_timesteps, disable=None):
        # Learn, and only then step the environment: on a GPU both work at the same time.
        if step <= args.learning_starts:
            a = (2 * torch.rand(env.action_space.shape) - 1).numpy()
        else:
            actor_input.copy_(torch.from_numpy(s))
            a, scalars = act().cpu().numpy(), update()
        s_next, reward, terminated, truncated, _ = env.step(a)
        buffer.add(step, s, a, s_next, [reward], [terminated])
        s, logs = s_next, {}
        run.rewards.append(float(reward))
        if terminated or truncated:
            logs = {"charts/episodic_return": sum(run.rewards), "charts/episodic_length": len(run.rewards)}
            run.episode, run.begun, run.rewards = run.episode + 1, step, []
            s, _ = env.reset(seed=episode_seed(args.seed, 0, run.episode))
        if step % 1_000 == 0:
            logs |= {f"losses/{name}": value.item() for name, value in scalars.items()}
        if step % args.eval_every == 0:
            seeds = [episode_seed(args.seed, 1, step, i) for i in range(args.eval_episodes)]
            rewards = [play_episode(agent.actor, eval_env, seed)[3] for seed in seeds]
            returns, lengths = [x.sum() for x in rewards], [len(x) for x in rewards]
            row = {"mean_return": np.mean(returns), "std_return": np.std(returns)}
            row["mean_length"] = np.mean(lengths)
            logs |= {f"eval/{name}": value for name, value in row.items()}
            logs["charts/SPS"] = step / (time.time() - start)
            run.csv = run.csv or ",".join(["step", *row]) + "\n"
            run.csv += ",".join([str(step), *(f"{value:.3f}" for value in row.values())]) + "\n"
            run.last_return, std = float(row["mean_return"]), row["std_return"]
            tqdm.write(f"{step:>9,} steps: return {run.last_return:8.1f} ± {std:6.1f}")
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
        if step % args.eval_every == 0 and run.last_return >= target:
            break
        if signals and step < args.total_timesteps:
            fail(f"{run_dir}: stopped at step {step:,}; --resume goes on from there", 128 + signals[0])

    writer.close()
    config |= {"finished_at_step": run.step, "wall_time_seconds": round(run.seconds)}
    write_file(config_path, json.dumps(config, indent=2, default=str))
    print(f"{run_dir}: {run.step:,} steps in {run.seconds / 60:.1f} minutes")
    if args.target_return is not None and run.last_return < target:
        fail(f"the last evaluation did not reach --target-return {target}: nothing was recorded", 1)
    if args.save_demos:
        record_demonstrations(args.save_demos, agent.actor, eval_env, args, config)


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except OSError as error:  # a full disk, say
        fail(f"{error}; what was written whole, a checkpoint too, is still there")
