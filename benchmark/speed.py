"""Time per step of the scripts and of Stable-Baselines3's SAC, by stage, on HalfCheetah's sizes: one command, one table, one CSV.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py                      # on a CPU, with 1 and 2 threads; some 15 minutes
    python benchmark/speed.py --device cuda

The programs take turns, a few updates each, round after round, so that a busy moment of the machine falls on all of them; the table
has the median of the rounds. What is timed is the scripts' own code, imported. The floor is the matrix products of one update alone,
recorded as they happen and repeated with the same shapes. The whole program is `main`, environment included, in a process
of its own: the time from one step to the next, over its last ones, so that its start does not count; beside it, on a CPU, how much of
that its stages took.
"""
import argparse
import contextlib
import csv
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
ENV_ID, BATCH_SIZE, STORED = "HalfCheetah-v4", 256, 10_000
STAGES = ("act", "sample", "discriminator", "reward", "critic", "actor", "target", "environment")
COLUMNS = (*STAGES, "sum", "step", "whole program", "in its stages", "floor")


class RecordProducts(TorchDispatchMode):
    """Shapes and strides of the two factors of every matrix product that runs inside."""

    def __init__(self):
        super().__init__()
        self.factors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.factors.append([(tuple(x.shape), x.stride()) for x in args[-2:]])
        return function(*args, **(kwargs or {}))


def matrix(shape: tuple[int, int], stride: tuple[int, int], device: torch.device) -> torch.Tensor:
    """A random matrix, transposed where the recorded one was."""
    if stride[0] == 1 and shape[0] > 1:
        return torch.randn(shape[::-1], device=device).t()
    return torch.randn(shape, device=device)


def agent_class(module: ModuleType) -> type:
    """The script's class of all that is learned."""
    return next(getattr(module, name) for name in ("DiffAIL", "GAIL", "SAC") if hasattr(module, name))


class Program:
    """One of the scripts: its networks, filled buffer and environment, its stages as calls without arguments, and its whole step."""

    def __init__(self, script: str, device: torch.device, **options):
        module = importlib.import_module(script)
        args = module.Args(env_id=ENV_ID, batch_size=BATCH_SIZE, **options)
        env = module.make_env(ENV_ID)
        (o,), (a,) = env.observation_space.shape, env.action_space.shape
        if hasattr(args, "alpha"):  # as main does for HalfCheetah
            args.alpha = 0.12 / a
        agent = agent_class(module)(o, a, args, device)
        widths = (o, a, o, 1, 1) if script == "sac_baseline" else (o, a, o)
        buffer = module.ReplayBuffer(args.buffer_size, widths, device)
        with np.load(ROOT / "demos" / f"{ENV_ID}.npz") as file:
            demos = [torch.from_numpy(file[name][:STORED]).to(device) for name in ("observations", "actions", "next_observations")]
        rows = torch.cat([part + 0.1 * torch.randn_like(part) for part in demos], dim=1)
        buffer.rows[:STORED] = torch.nn.functional.pad(rows, (0, sum(widths) - rows.shape[1]))
        buffer.added.fill_(STORED)
        buffer.position = STORED
        observation, _ = env.reset(seed=0)
        first = [part[:1000] for part in demos]  # one demonstration
        learner = [] if script == "sac_baseline" else [agent.fit_normalizer(*first)]

        def sample():
            self.batch = buffer.sample(BATCH_SIZE)

        actor_input = torch.zeros(o, device=device)
        graphed = (lambda function: partial(next, module.graphed(function))) if device.type == "cuda" else lambda function: function
        act_once, self.update = graphed(partial(agent.actor.act, actor_input)), graphed(partial(agent.update, *learner, buffer))

        def act():
            actor_input.copy_(torch.from_numpy(observation))
            self.action = act_once().cpu().numpy()

        def environment():
            following, reward, terminated, _, _ = env.step(self.action)
            end = [np.array([reward]), np.array([terminated])] if script == "sac_baseline" else []
            buffer.add(observation, self.action, following, *end)

        torch.compiler.set_stance("force_eager")  # compiled code keeps its products to itself
        with RecordProducts() as products:
            agent.update(*learner, buffer)
        torch.compiler.set_stance("default")
        self.factors = [[matrix(*factor, device) for factor in pair] for pair in products.factors]
        sample()
        act()
        self.stages = {"act": act, "sample": sample}
        if learner:
            dim = learner[0].shape[1]
            x = learner[0][:BATCH_SIZE]
            policy = agent.discriminator_input(*self.batch)
            self.stages["sample"] = lambda: (sample(), sample())
            self.stages["discriminator"] = lambda: agent.descend(agent.discriminator_optimizer, agent.discriminator_loss, x, policy)
            if script == "diffail":
                noise = partial(torch.randn, args.diffusion_steps, BATCH_SIZE, dim, device=device)
                self.stages["reward"] = lambda: agent.reward(agent.discriminator, policy, noise(), args.reward_form)
            else:
                self.stages["reward"] = lambda: agent.reward(agent.discriminator, policy, args.reward_form)
        rewards = torch.rand(BATCH_SIZE, device=device)
        self.stages["critic"] = lambda: agent.descend(agent.critic_optimizer, agent.critic_loss, *self.batch[:3], rewards, args.gamma)
        self.stages["actor"] = lambda: agent.descend(agent.actor_optimizer, agent.actor_loss, self.batch[0])
        self.stages["target"] = lambda: module.polyak_update(agent.target_critic, agent.critic, args.tau)
        for name in set(self.stages) - {"act"}:
            self.stages[name] = graphed(self.stages[name])
        self.stages["environment"] = environment

    def step(self):
        """What `main` does in one step: act, learn, step the environment, store."""
        self.stages["act"]()
        self.update()
        self.stages["environment"]()

    def floor(self):
        """The matrix products of one update, alone."""
        for a, b in self.factors:
            torch.mm(a, b)


def stable_baselines(device: torch.device):
    """SB3's SAC as it comes: a function that makes it do n steps."""
    warnings.filterwarnings("ignore")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # that v4 is out of date
    from stable_baselines3 import SAC

    agent = SAC("MlpPolicy", ENV_ID, learning_starts=100, device=device, seed=0)
    agent.learn(300)
    return lambda steps: agent.learn(steps, reset_num_timesteps=False)


def seconds_per_call(functions: dict, calls: int, device: torch.device) -> dict:
    """Mean seconds of each function, called in turn, as in a step: repeated by itself each would find its data in the cache."""
    seconds = dict.fromkeys(functions, 0.0)
    for _ in range(calls):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += (time.perf_counter() - begin) / calls
    return seconds


def whole_program(script: str, options: dict, device: str, threads: int, steps: int = 200, barrier=None) -> dict[str, float]:
    """Seconds per learning step of `main`, over its last steps, and on a CPU how many of these are spent in its stages.

    For a process of its own: it leaves the script with timers in it. With a barrier, several begin these steps at the same time."""
    module, begins, in_stages = importlib.import_module(script), [], 0.0
    kind = agent_class(module)

    def timed(function):
        def call(*args):
            nonlocal in_stages
            begin = time.perf_counter()
            result = function(*args)
            in_stages += time.perf_counter() - begin
            return result

        return call

    def initialize(agent, *args, plain=kind.__init__):
        plain(agent, *args)
        if hasattr(agent, "reward"):
            agent.reward = timed(agent.reward)  # compiled or not

    def make_env(*args, plain=module.make_env):
        env = plain(*args)
        step = timed(env.step)

        def marked_step(action):
            if barrier and len(begins) == 349:  # the 300 random steps, and all but one of the 50 before the timed ones
                barrier.wait()
            begins.append((time.perf_counter(), in_stages))
            return step(action)

        env.step = marked_step
        return env

    replaced = [(kind, "__init__", initialize), (module, "make_env", make_env)]
    buffer = module.ReplayBuffer
    stages = (module.Actor, "act"), (kind, "descend"), (buffer, "sample"), (buffer, "add"), (module, "polyak_update")
    replaced += [(owner, name, timed(getattr(owner, name))) for owner, name in stages if hasattr(owner, name)]
    for owner, name, new in replaced:
        setattr(owner, name, new)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        options = dict(options, device=device, threads=threads, output_dir=Path(folder), eval_every=10**9)
        args = module.Args(env_id=ENV_ID, learning_starts=300, total_timesteps=300 + 50 + steps, **options)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            module.main(args)
    whole, in_stages = ((last - first) / steps for first, last in zip(begins[-1 - steps], begins[-1]))
    return {"whole program": whole} | ({"in its stages": in_stages} if device == "cpu" else {})


def side_by_side(script: str, options: dict, device: str, processes: int) -> float:
    """Steps per second of several runs on one GPU, all together; under NVIDIA's MPS, where that is running, their kernels overlap."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        barrier = manager.Barrier(processes, timeout=600)
        runs = [pool.submit(whole_program, script, options, device, 1, 5_000, barrier) for _ in range(processes)]
        return sum(1 / run.result()["whole program"] for run in runs)


def whole_stable_baselines(device: str, threads: int, steps: int = 200) -> dict[str, float]:
    """Seconds per learning step of SB3's SAC, over its last steps, as `whole_program` has them of a script. For a process of its own."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    learn = stable_baselines(torch.device(device))
    learn(50)
    begin = time.perf_counter()
    learn(steps)
    return {"whole program": (time.perf_counter() - begin) / steps}


def peak_memory(script: str, device: str, options: dict) -> float:
    """MiB of memory, not the GPU's, that a run of the script takes at most; Linux only."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / f"{script}.py", "--env-id", ENV_ID, "--device", device, "--output-dir", folder]
        command += ["--state-only"] * options.get("state_only", False) + ["--compile", options["compile"]]
        command += ["--grad-penalty", options["grad_penalty"]] if "grad_penalty" in options else []
        command += ["--threads", "1", "--learning-starts", "300", "--total-timesteps", "400", "--eval-every", "1000"]
        process, peak = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
        while process.poll() is None:  # VmHWM is the peak so far; what wait4 reports has this process in it, from before the exec
            sizes = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max([peak, *map(int, sizes)])
            time.sleep(0.05)
        return peak / 1024


def write(path: Path | None, rows: list[list]):
    """What has been measured so far, if a file is wanted: what comes after the rounds takes long too, and may be cut short."""
    if path:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["device", "threads", "program", "stage", "milliseconds"], *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="every fifth one with the whole programs, too")
    parser.add_argument("--calls", type=int, default=20, help="of each stage, per round")
    parser.add_argument("--output", type=Path, help="CSV to write")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_flush_denormal(True)
    torch._dynamo.config.recompile_limit = 64  # all programs are in one process
    runs = {}
    for script, extra in {"diffail": {"state_only": True}, "gail_baseline": {"state_only": True}, "sac_baseline": {}}.items():
        runs[f"{script}.py"] = script, extra | {"compile": True}
        runs[f"{script}.py --compile False"] = script, extra | {"compile": False}
    script, extra = runs["diffail.py"]
    runs["diffail.py --grad-penalty 0.1"] = script, extra | {"grad_penalty": 0.1}
    programs = {name: Program(script, device, **extra) for name, (script, extra) in runs.items()}
    learn = stable_baselines(device)

    rows, all_threads = [], (1, 2) if device.type == "cpu" else (1,)
    times = {}
    for round_ in range(-1, options.rounds):  # the first is for warming up
        for threads in all_threads:
            torch.set_num_threads(threads)
            learned = seconds_per_call({"learn": partial(learn, options.calls)}, 1, device)
            seconds = {("Stable-Baselines3 SAC", "step"): learned["learn"] / options.calls}
            for name, program in programs.items():
                for functions in (program.stages, {"step": program.step}, {"floor": program.floor}):
                    for stage, value in seconds_per_call(functions, options.calls, device).items():
                        seconds[name, stage] = value
            if round_ >= 0:
                if round_ % 5 == 0:
                    wholes = {name: partial(whole_program, *run) for name, run in runs.items()}
                    for name, whole in (wholes | {"Stable-Baselines3 SAC": whole_stable_baselines}).items():
                        # In a process of its own, as a user runs it
                        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                            result = process.submit(whole, options.device, threads).result()
                        seconds |= {(name, stage): value for stage, value in result.items()}
                for (name, stage), value in seconds.items():
                    times.setdefault((threads, name, stage), []).append(1e3 * value)

    median = {key: float(np.median(values)) for key, values in times.items()}
    for threads in all_threads:
        sb3_step, sb3_whole = (median[threads, "Stable-Baselines3 SAC", stage] for stage in ("step", "whole program"))
        print(f"\n{options.device}, {threads} threads, milliseconds", end="; ")
        print(f"Stable-Baselines3's SAC: step {sb3_step:.2f}, whole program {sb3_whole:.2f}\n")
        print(f"{'':30}" + "".join(f"{column:>15}" for column in COLUMNS) + f"{'step / SB3':>12}{'whole / SB3':>13}{'step / floor':>14}")
        for name in programs:
            values = {stage: value for (n, program, stage), value in median.items() if (n, program) == (threads, name)}
            values["sum"] = sum(values.get(stage, 0) for stage in STAGES)
            cells = "".join(f"{values[column]:15.2f}" if column in values else f"{'':15}" for column in COLUMNS)
            step, whole = values["step"], values["whole program"]
            print(f"{name:30}{cells}{step / sb3_step:12.2f}{whole / sb3_whole:13.2f}{step / values['floor']:14.2f}")
            rows += [[options.device, threads, name, stage, f"{value:.4f}"] for stage, value in values.items()]
        for stage, value in {"step": sb3_step, "whole program": sb3_whole}.items():
            rows.append([options.device, threads, "Stable-Baselines3 SAC", stage, f"{value:.4f}"])
    write(options.output, rows)
    print()
    for processes in (1, 8, 16) if device.type == "cuda" else ():
        rate = side_by_side(*runs["diffail.py"], options.device, processes)
        rows.append([options.device, 1, f"diffail.py, {processes} processes", "whole program", f"{1e3 / rate:.4f}"])
        print(f"diffail.py, {processes} processes at a time: {rate:.0f} steps per second in all", flush=True)
        write(options.output, rows)
    with ThreadPoolExecutor() as pool:
        peaks = pool.map(lambda run: peak_memory(run[0], options.device, run[1]), runs.values())
    for name, memory in zip(runs, peaks):
        rows.append([options.device, 1, name, "peak memory MiB", f"{memory:.0f}"])
        print(f"{name:30}{memory:8.0f} MiB at most")
    write(options.output, rows)


if __name__ == "__main__":
    main()
