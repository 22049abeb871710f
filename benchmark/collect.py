"""From run directories to benchmark/results/: evaluations, configuration, and the returns of the training episodes.

    pip install -r benchmark/requirements.txt
    python benchmark/collect.py runs/HalfCheetah-v4__diffail__state-only__1traj__s1
    python benchmark/collect.py --variant paper-reward runs-paper/HalfCheetah-v4__diffail__state-only__1traj__s1

Writes NAME.csv, NAME.json and training/NAME.csv, NAME being that of the run directory, and of the variant where the run was not made with
the defaults. `training` has, out of TensorBoard's files, the losses, temperature, entropy, and the returns of the training episodes, in
which the policy explores, as in evaluations it does not. To be run again as a run goes on; the results of another run under that name are
left alone.
"""
import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).parent / "results"
MAY_DIFFER = {"resume", "output_dir", "total_timesteps", "device", "threads", "checkpoint_every"}
MAY_DIFFER |= {"target_return", "save_demos", "demo_episodes", "min_demo_return"}  # of sac_baseline.py


def what_it_is(config: dict) -> tuple[str, dict]:
    """Commit and arguments, without those that do not make another run."""
    return config["commit"], {name: value for name, value in config["args"].items() if name not in MAY_DIFFER}


def training_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """By name and step, the returns of the training episodes and the losses. Of several files, each holds from where it begins."""
    scalars = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag == "charts/episodic_return" or tag.startswith("losses/"):
                new = {event.step: event.value for event in events.Scalars(tag)}
                old = scalars.get(tag.split("/")[1], {})
                scalars[tag.split("/")[1]] = {step: value for step, value in old.items() if step < min(new)} | new
    return scalars


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--variant", help="in a word or two, what was not the default")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    for run_dir in options.run_dirs:
        name = run_dir.name + (f"__{options.variant}" if options.variant else "")
        config, target = json.loads((run_dir / "config.json").read_text()), options.to / f"{name}.json"
        if target.exists() and what_it_is(json.loads(target.read_text())) != what_it_is(config):
            sys.exit(f"collect.py: {target} is of a run with other arguments or of another commit, and is left as it is")
        if not (run_dir / "evaluations.csv").exists():
            sys.exit(f"collect.py: {run_dir} has no evaluation yet")
        scalars = training_scalars(run_dir)
        steps = sorted(set().union(*scalars.values()))
        rows = [["step", *scalars], *([step, *(f"{x[step]:.4g}" if step in x else "" for x in scalars.values())] for step in steps)]
        shutil.copyfile(run_dir / "evaluations.csv", options.to / f"{name}.csv")
        shutil.copyfile(run_dir / "config.json", target)
        (options.to / "training").mkdir(parents=True, exist_ok=True)
        with open(options.to / "training" / f"{name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        print(f"{options.to / name}.csv, up to step {steps[-1]}")


if __name__ == "__main__":
    main()
