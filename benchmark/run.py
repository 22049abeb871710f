"""A grid of runs, several at a time; a run that fails stops no other.

    python benchmark/run.py --env-ids HalfCheetah-v4 Hopper-v4 --seeds 1 2 3 --jobs 2
    python benchmark/run.py --scripts gail_baseline --settings state-action -- --total-timesteps 100000
    python benchmark/run.py --jobs 8 --gpus 1
    python benchmark/run.py --cluster slurm --jobs 24

Every run is started with --resume: a finished one ends at once, an interrupted one goes on. What comes after
`--` is handed to the scripts; where that makes other runs than before, give another --output-dir too.
submitit starts the processes, here or on a Slurm cluster, and what they print is in OUTPUT_DIR/logs. Ctrl-C
ends the runs on this machine with checkpoints; those on a cluster go on.

First: pip install -r benchmark/requirements.txt"""

import argparse
import itertools
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import submitit
from tqdm import tqdm

ROOT = Path(__file__).parent.parent


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Returns this script's options, and what is for the runs' scripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    settings = ["state-only", "state-action"]
    parser.add_argument("--scripts", nargs="+", default=["diffail"], help="names without .py")
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v4"])
    parser.add_argument("--settings", nargs="+", default=settings, choices=settings)
    parser.add_argument("--trajectories", nargs="+", type=int, default=[1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--gpus", type=int, default=0, help="of each run; here shared, 0: none is used")
    parser.add_argument("--cluster", choices=["local", "slurm"], default="local")
    parser.add_argument("--hours", type=float, default=48, help="time limit of one run")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    for script in options.scripts:
        if not (ROOT / f"{script}.py").exists():
            parser.error(f"there is no {script}.py in {ROOT}")
    return options, words[cut + 1 :]


def execute(command: list[str]) -> str:
    """Runs the command; returns nothing if it succeeds, else the last line of its stderr."""
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # submitit's own process ignores Ctrl-C
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    sys.stderr.write(done.stderr)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else ""


def failure(job: submitit.Job) -> str:
    """Returns why a job that has ended failed, nothing if it has not."""
    error = job.exception()  # submitit's own, such as a time limit
    return job.result() if error is None else str(error).strip().splitlines()[0]


def last_evaluation(folder: Path) -> str:
    """Returns step and return of the last line of evaluations.csv."""
    path = folder / "evaluations.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    if not lines:
        return "no evaluation"
    step, mean_return = lines[-1].split(",")[:2]
    return f"{int(step):,} steps, return {float(mean_return):.1f}"


def main():
    """Starts the runs of the grid, as many at a time as --jobs, and exits with 1 if one has failed."""
    options, further = read_arguments()
    executor = submitit.AutoExecutor(folder=options.output_dir / "logs", cluster=options.cluster)
    executor.update_parameters(timeout_min=int(60 * options.hours), cpus_per_task=1, name="diffail")
    if options.gpus:
        executor.update_parameters(gpus_per_node=options.gpus)
    grid = itertools.product(
        options.seeds, options.env_ids, options.settings, options.trajectories, options.scripts
    )
    waiting, running, failed = [], {}, False
    for seed, env_id, setting, trajectories, script in grid:
        words = ["--env-id", env_id, "--num-trajectories", trajectories, "--seed", seed, "--threads", 1]
        words += ["--state-only"] * (setting == "state-only")
        words += ["--output-dir", options.output_dir, "--resume", *further]
        folder = options.output_dir / f"{env_id}__{script}__{setting}__{trajectories}traj__s{seed}"
        waiting.append((folder, [sys.executable, *map(str, [ROOT / f"{script}.py", *words])]))
    with tqdm(total=len(waiting), unit=" runs") as progress:
        try:
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    folder, command = waiting.pop(0)
                    # Inherited by submitit's processes, which Ctrl-C would end
                    caught = signal.signal(signal.SIGINT, signal.SIG_IGN)
                    running[folder] = executor.submit(execute, command)
                    signal.signal(signal.SIGINT, caught)
                for folder, job in list(running.items()):
                    if job.done():
                        del running[folder]
                        progress.update()
                        reason = failure(job)
                        failed = failed or bool(reason)
                        told = f"finished, {last_evaluation(folder)}"
                        if reason:
                            told = f"failed: {reason} ({job.paths.stderr})"
                        progress.write(f"{folder.name}: {told}")
                states = [f"{folder.name}: {last_evaluation(folder)}" for folder in running]
                progress.set_postfix_str(" | ".join(states))
                time.sleep(1)
        except KeyboardInterrupt:  # the terminal has sent it to the runs on this machine too
            progress.write("waiting for the runs' checkpoints")
            while options.cluster == "local" and not all(job.done() for job in running.values()):
                time.sleep(0.5)
            raise SystemExit(130) from None
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
