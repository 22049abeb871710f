"""A grid of runs, several at a time: what is finished is skipped, what was interrupted is resumed, and a run that fails stops no other.

    pip install -r benchmark/requirements.txt
    python benchmark/run.py --env-ids HalfCheetah-v4 Hopper-v4 --seeds 1 2 3 --jobs 2
    python benchmark/run.py --scripts gail_baseline --settings state-action -- --total-timesteps 100000
    python benchmark/run.py --jobs 8 --gpus 1
    python benchmark/run.py --cluster slurm --jobs 24

What comes after `--` is handed to the scripts; where that makes other runs than before, give another --output-dir too. submitit starts
the processes, here or on a Slurm cluster; its logs are in OUTPUT_DIR/logs. Ctrl-C ends the runs here where their episodes end, with
checkpoints; the same command goes on from there.
"""
import argparse
import importlib
import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import submitit
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def run_dir(output_dir: Path, script: str, env_id: str, setting: str, trajectories: int, seed: int) -> Path:
    """Where the script writes this run."""
    return output_dir / f"{env_id}__{script}__{setting}__{trajectories}traj__s{seed}"


def finished(folder: Path, script: str, words: list[str]) -> bool:
    """Whether the run has come to its end with these arguments. Where they differ it is started again, and --resume says by what.

    What is left out now must have been left out then: the value that a script fills in is known to the script alone."""
    module = importlib.import_module(script)
    args = tyro.cli(module.Args, args=words)
    steps = args.total_timesteps or module.TOTAL_TIMESTEPS.get(args.env_id.split("/")[-1].split("-v")[0], 500_000)
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {"args": {}}
    given_then = {word.split("=")[0][2:].replace("-", "_") for word in shlex.split(config.get("command", "")) if word.startswith("--")}
    as_before = all(
        name not in given_then if value is None else str(value) == str(config["args"].get(name))
        for name, value in vars(args).items()
        if name not in module.MAY_CHANGE_ON_RESUME
    )
    return as_before and config.get("finished_at_step", -1) >= steps


def last_evaluation(folder: Path) -> str:
    """The last line of evaluations.csv, in words."""
    path = folder / "evaluations.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    if not lines:
        return "no evaluation"
    step, mean_return = lines[-1].split(",")[:2]
    return f"{int(step):,} steps, return {float(mean_return):.1f}"


def execute(command: list[str]):
    """In a process of submitit's, run the command, and raise what it says where it fails. Unlike this process it heeds Ctrl-C."""
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=heed)
    if done.returncode:
        raise RuntimeError(done.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", nargs="+", default=["diffail"], choices=["diffail", "gail_baseline"])
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v4"])
    parser.add_argument("--settings", nargs="+", default=["state-only", "state-action"], choices=["state-only", "state-action"])
    parser.add_argument("--trajectories", nargs="+", type=int, default=[1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each run; here all runs have the same ones, and with 0 they see none")
    parser.add_argument("--cluster", choices=["local", "slurm"], default="local")
    parser.add_argument("--hours", type=float, default=48, help="time limit of one run")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:cut]), words[cut + 1 :]

    executor = submitit.AutoExecutor(folder=options.output_dir / "logs", cluster=options.cluster)
    executor.update_parameters(timeout_min=int(60 * options.hours), cpus_per_task=1, name="diffail")
    if options.gpus:
        executor.update_parameters(gpus_per_node=options.gpus)
    grid = list(itertools.product(options.seeds, options.env_ids, options.settings, options.trajectories, options.scripts))
    waiting, running, failed = [], {}, []
    for seed, env_id, setting, trajectories, script in grid:
        folder = run_dir(options.output_dir, script, env_id, setting, trajectories, seed)
        words = ["--env-id", env_id, "--num-trajectories", str(trajectories), "--seed", str(seed)]
        words += ["--state-only"] * (setting == "state-only") + ["--output-dir", str(options.output_dir)]
        words += ["--threads", "1", "--resume", *further]
        if not finished(folder, script, words):
            waiting.append((folder, [sys.executable, str(ROOT / f"{script}.py"), *words]))
    with tqdm(total=len(grid), initial=len(grid) - len(waiting), unit=" runs") as progress:
        try:
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    folder, command = waiting.pop(0)
                    caught = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by submitit's processes, which Ctrl-C would end
                    running[folder] = executor.submit(execute, command)
                    signal.signal(signal.SIGINT, caught)
                for folder, job in list(running.items()):
                    if job.done():
                        del running[folder]
                        progress.update()
                        if job.exception() is not None:
                            failed.append(folder)
                            reason = (str(job.exception()).strip().splitlines() or ["no reason"])[-1]
                            progress.write(f"{folder.name}: failed, see {job.paths.stderr}: {reason}")
                        else:
                            progress.write(f"{folder.name}: finished, {last_evaluation(folder)}")
                progress.set_postfix_str(" | ".join(f"{folder.name}: {last_evaluation(folder)}" for folder in running))
                time.sleep(1)
        except KeyboardInterrupt:  # the terminal has sent it to the runs here too, and on a cluster they go on
            while options.cluster == "local" and not all(job.done() for job in running.values()):
                time.sleep(0.5)
            raise SystemExit(130) from None
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
