"""Milliseconds per step and peak memory of whole programs on HalfCheetah-v4.

    python benchmark/speed.py --peers                       # beside Stable-Baselines3's SAC
    python benchmark/speed.py --against HEAD~1 --threads 1  # beside an older commit
    python benchmark/speed.py --device cuda --processes 8   # eight at a time on one GPU, under NVIDIA's MPS

Each measurement is a process of its own that runs a script as it is, but for an environment that notes when
it is stepped. The programs take turns, round after round, so that a busy moment of the machine falls on all
of them, and the median of the rounds is told.

First: pip install -r benchmark/requirements.txt"""

import argparse
import contextlib
import csv
import importlib
import io
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENV_ID, SB3 = "HalfCheetah-v4", "Stable-Baselines3 SAC"
LEARNING_STARTS, WARM_UP = 300, 50  # random steps, and learning steps before the measured ones
MEASURED = {"cpu": 450, "cuda": 5_000}
SCRIPTS = {"diffail": True, "gail_baseline": True, "sac_baseline": False}  # whether it has --state-only
COLUMNS = "device", "threads", "processes", "program", "milliseconds", "peak_memory_mib"


class Clock:
    """Makes environments that note when they are stepped; the one stepped first, training's, counts."""

    def __init__(self, make_env: Callable, start: Callable):
        self.make_env, self.start, self.timed, self.times = make_env, start, None, []

    def __call__(self, *args):
        """Returns an environment."""
        env = self.make_env(*args)
        step = env.step

        def noted_step(action):
            self.timed = self.timed or env
            if self.timed is env:
                if len(self.times) == LEARNING_STARTS + WARM_UP:
                    self.start()
                self.times.append(time.perf_counter())
            return step(action)

        env.step = noted_step
        return env


def run_script(root: Path, script: str, options: dict, start: Callable) -> list[float]:
    """Runs a script of this folder; returns the times of its training's steps."""
    sys.path.insert(0, str(root))
    module = importlib.import_module(script)
    module.make_env = clock = Clock(module.make_env, start)
    with tempfile.TemporaryDirectory() as folder:
        options = options | {"env_id": ENV_ID, "eval_every": 10**9, "output_dir": Path(folder)}
        if SCRIPTS[script]:
            options["state_only"] = True
        main = module.train if hasattr(module, "train") else module.main  # main until 5137cb8
        main(module.Args(learning_starts=LEARNING_STARTS, **options))
    return clock.times


def run_sb3(options: dict, start: Callable) -> list[float]:
    """Runs Stable-Baselines3's SAC with its defaults; returns the times of its steps."""
    import gymnasium
    import torch
    from stable_baselines3 import SAC

    torch.set_num_threads(options["threads"])
    torch.set_flush_denormal(True)  # as the scripts do
    clock = Clock(gymnasium.make, start)
    agent = SAC("MlpPolicy", clock(ENV_ID), learning_starts=LEARNING_STARTS, device=options["device"])
    agent.learn(options["total_timesteps"])
    return clock.times


def measure(root: Path, program: str, options: dict, start: Callable) -> tuple[float, float]:
    """Runs one program in this process; returns seconds per step and the peak of its memory in MiB."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            run = run_sb3(options, start) if program == SB3 else run_script(root, program, options, start)
    except SystemExit:  # the script has told why, and a pool would not
        raise RuntimeError(output.getvalue()) from None
    times = run[LEARNING_STARTS + WARM_UP :]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return (times[-1] - times[0]) / (len(times) - 1), int(peak[1]) / 1024


def measure_together(processes: int, *args) -> tuple[float, float]:
    """Runs copies of one program at once; returns milliseconds per step of all together, and a peak."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        start = manager.Barrier(processes, timeout=600).wait
        runs = [pool.submit(measure, *args, start) for _ in range(processes)]
        seconds, peaks = zip(*(run.result() for run in runs))
    return 1000 / sum(1 / s for s in seconds), max(peaks)


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Checks a revision out into a temporary folder, which it yields."""
    with tempfile.TemporaryDirectory() as folder:
        git, path = ["git", "-C", str(ROOT), "worktree"], f"{folder}/tree"
        subprocess.run([*git, "add", "--quiet", "--detach", path, revision], check=True)
        try:
            yield Path(path)
        finally:
            subprocess.run([*git, "remove", "--force", path], check=True)


def main():
    """Measures, prints a table, and writes a CSV if it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--processes", type=int, default=1, help="of one program at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", metavar="REV", help="measure the scripts of this git revision too")
    parser.add_argument("--peers", action="store_true", help="measure Stable-Baselines3's SAC too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: the scripts' own")
    parser.add_argument("--output", type=Path, metavar="FILE", help="CSV to write")
    args = parser.parse_args()
    steps = LEARNING_STARTS + WARM_UP + MEASURED[args.device]
    options = {"device": args.device, "total_timesteps": steps}
    if args.compile is not None:
        options["compile"] = args.compile
    results = {}
    with contextlib.ExitStack() as stack:
        roots = {"": ROOT}
        if args.against:
            roots[f" at {args.against}"] = stack.enter_context(worktree(args.against))
        programs = [(root, script, label) for script in SCRIPTS for label, root in roots.items()]
        programs += [(ROOT, SB3, "")] * args.peers
        for _ in range(args.rounds):
            for threads in args.threads:
                for root, program, label in programs:
                    result = measure_together(args.processes, root, program, options | {"threads": threads})
                    name = program if program == SB3 else f"{program}.py{' --state-only' * SCRIPTS[program]}"
                    key = args.device, threads, args.processes, name + label
                    results.setdefault(key, []).append(result)
                    print(f"{key[-1]}, threads: {threads}: {result[0]:.2f} ms", flush=True)
    rows = [(*key, *(statistics.median(values) for values in zip(*found))) for key, found in results.items()]
    sb3 = {row[1]: row[4] for row in rows if row[3] == SB3}
    print(
        f"\n{'program':44}{'threads':>8}{'processes':>10}{'ms/step':>9}{'steps/s':>9}{'x SB3':>7}{'MiB':>6}"
    )
    for _, threads, processes, name, ms, peak in rows:
        ratio = f"{ms / sb3[threads]:.2f}" if sb3 else ""
        print(f"{name:44}{threads:8}{processes:10}{ms:9.2f}{1000 / ms:9.0f}{ratio:>7}{peak:6.0f}")
    if args.output:
        with open(args.output, "w", newline="") as file:
            lines = [(*row[:4], f"{row[4]:.4f}", f"{row[5]:.0f}") for row in rows]
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines])


if __name__ == "__main__":
    main()
