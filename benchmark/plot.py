"""From benchmark/results/*.csv: learning curves and the reward's correlation to benchmark/figures/, and the README's table to the console.

    pip install -r benchmark/requirements.txt
    python benchmark/plot.py

A result is called ENV__SCRIPT__SETTING__NUMBERtraj__sSEED.csv, or ...__VARIANT.csv where it was not made with the defaults.
"""
import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("agg")
HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"  # Okabe and Ito: for colour-blind readers too
NAMES = {"diffail": "DiffAIL", "gail_baseline": "GAIL"}
STYLES = [(BLUE, "-"), (ORANGE, "--"), (PURPLE, "-."), (GREEN, (0, (5, 1, 1, 1, 1, 1)))]


@dataclass
class Run:
    """One CSV of benchmark/results and its configuration."""

    path: Path
    config: dict
    columns: dict[str, np.ndarray]  # by name, one number per evaluation

    def __post_init__(self):
        self.env_id, self.script, self.setting, _, seed, *variant = self.path.stem.split("__")
        self.seed, self.variant, self.finished = int(seed[1:]), " ".join(variant), "finished_at_step" in self.config


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV, as numbers where they are."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {name: column if name in ("env", "setting", "algorithm") else column.astype(float) for name, column in columns.items()}


def expert_return(env_id: str) -> float:
    """Mean return of the demonstrations."""
    with np.load(HERE.parent / "demos" / f"{env_id}.npz", allow_pickle=False) as file:
        return float(np.mean(json.loads(file["metadata"].item())["returns"]))


def paper_curve(paper: dict, env_id: str, setting: str, algorithm: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and mean returns of the paper's seeds, with one trajectory; empty where the paper has none."""
    rows = (paper["env"] == env_id.split("-v")[0]) & (paper["setting"] == setting) & (paper["algorithm"] == algorithm)
    rows &= paper["trajectories"] == 1
    return paper["step"][rows], paper["mean_return"][rows]


def plot_group(axes: plt.Axes, runs: list[Run], column: str, style: tuple, label: str):
    """One line: the mean over the seeds as far as all of them have come, and, with several, a band from the least to the greatest."""
    n = min(len(run.columns["step"]) for run in runs)
    values = np.array([run.columns[column][:n] for run in runs])
    steps, (colour, line) = runs[0].columns["step"][:n] / 1000, style
    label += f", {'seed' if len(runs) == 1 else 'seeds'} {', '.join(str(run.seed) for run in runs)}"
    if not all(run.finished for run in runs):
        label += f", first {steps[-1]:.0f}k steps"
    axes.plot(steps, values.mean(0), linestyle=line, color=colour, lw=2.2, label=label)
    if len(runs) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of several seeds under one label."""
    labelled = defaultdict(list)
    for run in sorted(runs, key=lambda run: (list(NAMES).index(run.script), run.variant, run.seed)):
        labelled[NAMES[run.script] + (f" {run.variant}" if run.variant else "")].append(run)
    return labelled


def finish(figure: plt.Figure, axes: plt.Axes, name: str):
    """Legend, frame, grid, and the file."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.savefig(HERE / "figures" / name, dpi=150)
    plt.close(figure)
    print(HERE / "figures" / name)


def plot_returns(env_id: str, setting: str, runs: list[Run], paper: dict):
    """Learning curves of one environment and setting, with the expert's line and the paper's curves."""
    figure, axes = plt.subplots(figsize=(7, 5.6), layout="constrained")
    for label, style in (("DiffAIL", ":"), ("GAIL", (0, (1, 4)))):
        steps, returns = paper_curve(paper, env_id, setting, label)
        if len(steps):
            axes.plot(steps / 1000, returns, linestyle=style, color=GREY, lw=2.2, label=f"{label} in the paper, mean of 5 seeds")
    for style, (label, seeds) in zip(STYLES, groups(runs).items(), strict=False):
        plot_group(axes, seeds, "mean_return", style, label)
    expert = expert_return(env_id)
    axes.axhline(expert, color="black", lw=1.2)
    where = dict(xycoords=("axes fraction", "data"), ha="right", xytext=(0, 4), textcoords="offset points", fontsize=12)
    axes.annotate(f"expert, {expert:.0f}", (1, expert), **where)
    axes.set(xlabel="environment steps (thousands)", ylabel="return", title=f"{env_id}, {setting}, 1 trajectory")
    finish(figure, axes, f"{env_id}__{setting}.png")


def plot_correlation(env_id: str, setting: str, runs: list[Run]):
    """The correlation of surrogate and true return over the episodes of each evaluation, DiffAIL's beside GAIL's."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for style, (label, seeds) in zip(STYLES, groups(runs).items(), strict=False):
        plot_group(axes, seeds, "reward_correlation", style, label)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="environment steps (thousands)", ylabel="Pearson correlation of surrogate and true return", ylim=(-1.05, 1.05))
    axes.set_title(f"{env_id}, {setting}, 1 trajectory")
    finish(figure, axes, f"{env_id}__{setting}__correlation.png")


def table(runs: list[Run], paper: dict) -> str:
    """Markdown: best and final return (mean of the last five evaluations) of every run, in per cent of the expert's, beside the paper's."""
    head = ["run", "steps", "first at the expert's return", "best", "final", "the paper's best and final", "commit"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for run in runs:
        expert, steps, returns = expert_return(run.env_id), run.columns["step"], run.columns["mean_return"]
        above = steps[returns >= expert]
        cells = [f"[{run.env_id}, {NAMES[run.script]}, {run.setting}, seed {run.seed}{', ' * bool(run.variant)}{run.variant}]"
                 f"(benchmark/results/{run.path.name})"]  # fmt: skip
        cells += [f"{steps[-1] / 1000:.0f}k" + " so far" * (not run.finished)]
        cells += [f"{above[0] / 1000:.0f}k" if len(above) else "no"]
        cells += [f"{round(value)}, {round(100 * value / expert)} %" for value in (returns.max(), returns[-5:].mean())]
        theirs, expert = (paper_curve(paper, run.env_id, run.setting, algorithm)[1] for algorithm in (NAMES[run.script], "expert"))
        cells += [f"{100 * theirs.max() / expert[0]:.0f} %, {100 * theirs[-5:].mean() / expert[0]:.0f} %" if len(theirs) else ""]
        cells += [run.config["commit"][:7]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14})
    paper = read_columns(HERE / "paper" / "learning_curves.csv")
    paths = sorted((HERE / "results").glob("*__*traj__s*.csv"))
    runs = [Run(path, json.loads(path.with_suffix(".json").read_text()), read_columns(path)) for path in paths]
    panels = defaultdict(list)
    for run in runs:
        panels[run.env_id, run.setting].append(run)
    (HERE / "figures").mkdir(exist_ok=True)
    for (env_id, setting), members in panels.items():
        plot_returns(env_id, setting, members, paper)
        measured = [run for run in members if "reward_correlation" in run.columns]
        if len({run.script for run in measured}) == 2:
            plot_correlation(env_id, setting, measured)
    print(table(runs, paper))


if __name__ == "__main__":
    main()
