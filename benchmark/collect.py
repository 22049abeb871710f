"""From run directories to benchmark/results/: evaluations, configuration, and the returns of the training episodes.

    pip install -r benchmark/requirements.txt
    python benchmark/collect.py runs/HalfCheetah-v4__diffail__state-only__1traj__s1
    python benchmark/collect.py --variant paper-reward runs-paper/HalfCheetah-v4__diffail__state-only__1traj__s1

Writes NAME.csv, NAME.json and episodes/NAME.csv, NAME being that of the run directory, and of the variant where the run was not made with
the defaults. `episodes` has the step and the return of each training episode, out of TensorBoard's files: there the policy explores, and in
evaluations it does not. To be run again as a run goes on; the results of another run under that name are left alone.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).parent / "results"
MAY_DIFFER = {"resume", "output_dir", "total_timesteps", "device", "threads", "checkpoint_every"}


def what_it_is(config: dict) -> tuple[str, dict]:
    """Commit and arguments, without those that do not make another run."""
    return config["commit"], {name: value for name, value in config["args"].items() if name not in MAY_DIFFER}


def training_returns(run_dir: Path) -> dict[int, float]:
    """Return of each training episode, by the step at its end. Of several files, each holds from where it begins."""
    returns = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if "charts/episodic_return" in events.Tags()["scalars"]:
            scalars = events.Scalars("charts/episodic_return")
            returns = {step: value for step, value in returns.items() if step < scalars[0].step} | {s.step: s.value for s in scalars}
    return returns


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--variant", help="in a word or two, what was not the default")
    options = parser.parse_args()
    for run_dir in options.run_dirs:
        name = run_dir.name + (f"__{options.variant}" if options.variant else "")
        config, target = json.loads((run_dir / "config.json").read_text()), RESULTS / f"{name}.json"
        if target.exists() and what_it_is(json.loads(target.read_text())) != what_it_is(config):
            sys.exit(f"collect.py: {target} is of a run with other arguments or of another commit, and is left as it is")
        returns = training_returns(run_dir)
        shutil.copyfile(run_dir / "config.json", target)
        shutil.copyfile(run_dir / "evaluations.csv", RESULTS / f"{name}.csv")
        lines = ["step,return", *(f"{step},{value:.3f}" for step, value in sorted(returns.items()))]
        (RESULTS / "episodes").mkdir(exist_ok=True)
        (RESULTS / "episodes" / f"{name}.csv").write_text("\n".join(lines) + "\n")
        print(f"{RESULTS / name}.csv: {len(returns)} training episodes")


if __name__ == "__main__":
    main()
