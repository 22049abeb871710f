"""From benchmark/results/*.csv: learning curves to benchmark/figures/, and the tables of README.md and results/README.md to the console.

    pip install -r benchmark/requirements.txt
    python benchmark/plot.py

A result is called ENV__SCRIPT__SETTING__NUMBERtraj__sSEED.csv, or ...__VARIANT.csv where it was not made with the defaults.
overview.png has all environments and settings, in per cent of the expert's return. Further figures have DiffAIL's variants, a panel for
each, in evaluations and in training episodes, the temperature where there are runs with and without --autotune, and the correlation of
surrogate and true return where there are runs of both DiffAIL and GAIL.
"""
import csv
import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("agg")
HERE = Path(__file__).parent
# Okabe and Ito: for colour-blind readers too
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY, BROWN = "#555555", "#6B4226"
NAMES = {"diffail": "DiffAIL", "gail_baseline": "GAIL"}
ENVIRONMENTS = "HalfCheetah-v4", "Ant-v4", "Hopper-v4", "Walker2d-v4"
TEMPERATURES = {"": "the defaults: alpha fixed, λ = 0", "penalty": "alpha fixed, λ = 0.1"}
TEMPERATURES |= {"penalty-paper-reward": "alpha fixed, λ = 0.1, paper's reward"}
TUNED = {"autotune": "--autotune"}
TUNED |= {"autotune-until-225k": "--autotune, alpha fixed from 225k on"}
TUNED |= {"autotune-0.3": "--autotune, target 0.3, and other changes"}
TUNED |= {"capped": "--autotune, alpha at most 0.06, λ = 0"}
TEMPERATURES |= TUNED
STYLES = [(BLUE, "-"), (ORANGE, "--"), (PURPLE, "-."), (GREEN, (0, (5, 1, 1, 1, 1, 1))), (SKY, (0, (8, 2))), (AMBER, (0, (2, 1)))]
NAMED = {"env", "setting", "algorithm", "transitions"}  # columns that are no numbers
ALIKE = 0.05  # an evaluation whose episodes' returns have a standard deviation below this part of the expert's return


@dataclass
class Run:
    """One CSV of benchmark/results and its configuration."""

    path: Path
    config: dict
    columns: dict[str, np.ndarray]  # by name, one number per evaluation; training_return is the mean since the last one

    def __post_init__(self):
        self.env_id, self.script, self.setting, trajectories, seed, *variant = self.path.stem.split("__")
        self.trajectories, self.seed, self.variant = int(trajectories.removesuffix("traj")), int(seed[1:]), " ".join(variant)
        self.cell = self.env_id, self.setting, self.trajectories
        self.finished = "finished_at_step" in self.config
        training = self.path.parent / "training" / self.path.name
        self.training = read_columns(training) if training.exists() else {}
        if self.training:
            ends, is_return = self.columns["step"], ~np.isnan(self.training["episodic_return"])
            steps, returns = (self.training[name][is_return] for name in ("step", "episodic_return"))
            since = [(begin < steps) & (steps <= end) for begin, end in itertools.pairwise([0, *ends])]
            self.columns["training_return"] = np.array([returns[rows].mean() if rows.any() else np.nan for rows in since])


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV, as numbers but for the names."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([row[name] or "nan" for row in rows]) for name in rows[0]}
    return {name: column if name in NAMED else column.astype(float) for name, column in columns.items()}


def load_runs(folder: str) -> list[Run]:
    """The imitation runs in a folder of benchmark/results."""
    paths = sorted((HERE / "results" / folder).glob("*__*traj__s*.csv"))
    return [Run(path, json.loads(path.with_suffix(".json").read_text()), read_columns(path)) for path in paths]


def expert_return(env_id: str) -> float:
    """Mean return of the demonstrations."""
    with np.load(HERE.parent / "demos" / f"{env_id}.npz", allow_pickle=False) as file:
        return float(np.mean(json.loads(file["metadata"].item())["returns"]))


def paper_curve(paper: dict, env_id: str, setting: str, trajectories: int, algorithm: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and mean returns of the paper's seeds in this environment, setting and number of trajectories; empty where it has none.

    The authors' plotting script draws at t the mean of the evaluations at t, t + 10k, t + 20k and t + 30k steps: here it is at t + 15k."""
    rows = (paper["env"] == env_id.split("-v")[0]) & (paper["setting"] == setting)
    rows &= (paper["algorithm"] == algorithm) & (paper["trajectories"] == trajectories)
    return paper["step"][rows] + 15_000, paper["mean_return"][rows]


def seeds_of(runs: list[Run]) -> str:
    """Their seeds, and how far all of them have come if not all are finished, in words."""
    words = f"{'seed' if len(runs) == 1 else 'seeds'} {', '.join(str(run.seed) for run in runs)}"
    end = min(run.columns["step"][-1] for run in runs)
    return words if all(run.finished and run.columns["step"][-1] == end for run in runs) else f"{words}, first {end / 1000:.0f}k steps"


def plot_group(axes: plt.Axes, runs: list[Run], column: str, style: tuple, label: str):
    """One line: the mean over the seeds as far as all of them have come, and, with several, a band from the least to the greatest."""
    n = min(len(run.columns["step"]) for run in runs)
    values = np.array([run.columns[column][:n] for run in runs])
    steps, (colour, line) = runs[0].columns["step"][:n], style
    assert all((run.columns["step"][:n] == steps).all() for run in runs), f"{label}: evaluations at other steps"
    axes.plot(steps / 1000, values.mean(0), linestyle=line, color=colour, lw=2.2, label=label, marker="o" if n == 1 else None)
    if len(runs) > 1:
        axes.fill_between(steps / 1000, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of several seeds under one label."""
    labelled = defaultdict(list)
    for run in sorted(runs, key=lambda run: (list(NAMES).index(run.script), run.variant, run.seed)):
        labelled[NAMES[run.script] + (f" {run.variant}" if run.variant else "")].append(run)
    return labelled


def drawn(runs: list[Run]) -> list[Run]:
    """Without runs that were stopped where another of their script and variant has finished: a mean ends where its shortest run does."""
    finished = {(run.script, run.variant) for run in runs if run.finished}
    return [run for run in runs if run.finished or (run.script, run.variant) not in finished]


def finish(figure: plt.Figure, panels: list[plt.Axes], name: str):
    """Legend, frame, grid, and the file."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    labelled = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=1, frameon=False)
    figure.savefig(HERE / "figures" / name, dpi=150)
    plt.close(figure)
    print(HERE / "figures" / name)


def title(run: Run) -> str:
    """Environment, setting, number of trajectories."""
    return f"{run.env_id}, {run.setting}, {run.trajectories} {'trajectory' if run.trajectories == 1 else 'trajectories'}"


def mark_expert(axes: plt.Axes, env_id: str):
    """A line at the mean return of the demonstrations."""
    expert = expert_return(env_id)
    axes.axhline(expert, color="black", lw=1.2, label=f"expert, {expert:.0f}")


def plot_paper(axes: plt.Axes, paper: dict, cell: tuple, algorithms: dict[str, tuple]):
    """The paper's curves in one environment, setting and number of trajectories; algorithms: by name, the line's style."""
    for algorithm, line in algorithms.items():
        steps, returns = paper_curve(paper, *cell, algorithm)
        if len(steps):
            label = f"{algorithm} in the paper, mean of 5 seeds, smoothed"
            axes.plot(steps / 1000, returns, linestyle=line, color=GREY, lw=2.2, label=label)


def plot_returns(runs: list[Run], paper: dict, name: str):
    """Learning curves of one environment and setting, with the expert's line and the paper's curves."""
    figure, axes = plt.subplots(figsize=(7, 5.9), layout="constrained")
    mark_expert(axes, runs[0].env_id)
    plot_paper(axes, paper, runs[0].cell, {"DiffAIL": (0, (1, 1)), "GAIL": (0, (1, 4))})
    for style, (label, seeds) in zip(STYLES, groups(runs).items(), strict=False):
        plot_group(axes, seeds, "mean_return", style, f"{label}, {seeds_of(seeds)}")
    axes.set(xlabel="environment steps (thousands)", ylabel="return", title=title(runs[0]))
    finish(figure, [axes], f"{name}.png")


def plot_variants(runs: list[Run], paper: dict, column: str, name: str):
    """DiffAIL's variants in one environment and setting, a panel for each, beside the defaults and, for evaluations, the paper's curve."""
    labelled = groups(runs)
    defaults = labelled.pop(NAMES["diffail"], [])
    rows = math.ceil(len(labelled) / 2)
    figure, panels = plt.subplots(rows, 2, figsize=(9, 1.9 + 2.6 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axes, seeds in zip(panels.flat, labelled.values(), strict=False):
        mark_expert(axes, runs[0].env_id)
        if column == "mean_return":
            plot_paper(axes, paper, runs[0].cell, {"DiffAIL": (0, (1, 1))})
        if defaults:
            plot_group(axes, defaults, column, (BLUE, "-"), f"DiffAIL, the defaults, {seeds_of(defaults)}")
        plot_group(axes, seeds, column, (ORANGE, "--"), "the variant")
        axes.set_title(f"{seeds[0].variant}\n{seeds_of(seeds)}", fontsize=12)
    for axes in panels.flat[len(labelled) :]:
        axes.set_axis_off()
    figure.suptitle(title(runs[0]) + (", training episodes" if column == "training_return" else ""))
    for axes in panels.flat[max(len(labelled) - 2, 0) : len(labelled)]:  # the lowest one of each column
        axes.set_xlabel("environment steps (thousands)")
        axes.tick_params(labelbottom=True)
    for axes in panels[:, 0]:
        axes.set_ylabel("return")
    finish(figure, list(panels.flat[: len(labelled)]), f"{name}.png")


def plot_overview(panels: dict[tuple, list[Run]], paper: dict):
    """All environments and settings with one trajectory: our defaults and the paper's, each in per cent of its own expert."""
    figure, axes = plt.subplots(len(ENVIRONMENTS), 2, figsize=(9, 12), sharey=True, layout="constrained")
    for panel, (env_id, setting) in zip(axes.flat, itertools.product(ENVIRONMENTS, ("state-action", "state-only")), strict=True):
        panel.axhline(100, color="black", lw=1.2, label="expert")
        _, paper_expert = paper_curve(paper, env_id, setting, 1, "expert")
        for (script, name), colour in zip(NAMES.items(), (BLUE, ORANGE), strict=True):
            steps, returns = paper_curve(paper, env_id, setting, 1, name)
            if len(steps):
                label = f"{name} in the paper, mean of 5 seeds, smoothed"
                panel.plot(steps / 1000, 100 * returns / paper_expert[0], linestyle=":", color=colour, lw=1.6, alpha=0.8, label=label)
            runs = [run for run in panels.get((env_id, setting, 1), ()) if (run.script, run.variant) == (script, "")]
            if runs:
                n = min(len(run.columns["step"]) for run in runs)
                shares = 100 * np.array([run.columns["mean_return"][:n] for run in runs]) / expert_return(env_id)
                steps = runs[0].columns["step"][:n] / 1000
                panel.plot(steps, shares.mean(0), color=colour, lw=2.2, label=f"{name}, here")
                panel.fill_between(steps, shares.min(0), shares.max(0), color=colour, alpha=0.18, lw=0)
        panel.set(title=f"{env_id}, {setting}", ylim=(-30, 135))
    for panel in axes[-1]:
        panel.set_xlabel("environment steps (thousands)")
    for panel in axes[:, 0]:
        panel.set_ylabel("% of the expert's return")
    finish(figure, list(axes.flat), "overview.png")


def plot_correlation(runs: list[Run], name: str):
    """How the surrogate return goes with the true one, over the episodes of each evaluation, and over the evaluations of each run."""
    figure, (within, across) = plt.subplots(2, figsize=(7, 9), layout="constrained")
    expert = expert_return(runs[0].env_id)
    colours = {"diffail": iter((BLUE, SKY, PURPLE, GREEN)), "gail_baseline": iter((ORANGE, AMBER, BROWN))}  # a seed each
    for run, marker in zip(runs, itertools.cycle("os^Dv"), strict=False):
        colour = next(colours[run.script])
        steps, returns, stds, surrogate, correlation = (
            run.columns[column] for column in ("step", "mean_return", "std_return", "mean_surrogate_return", "reward_correlation")
        )
        differ = stds >= ALIKE * expert
        within.plot(steps[differ] / 1000, correlation[differ], marker, color=colour, ms=8)
        within.plot(steps[~differ] / 1000, correlation[~differ], marker, color=colour, ms=5, mfc="none", alpha=0.6)
        label = f"{NAMES[run.script]}, seed {run.seed}: r over evaluations = {np.corrcoef(surrogate, returns)[0, 1]:.2f}".replace("-", "−")
        across.plot(returns, (surrogate - surrogate.min()) / np.ptp(surrogate), marker, color=colour, ms=6, alpha=0.8, label=label)
    within.plot([], [], "o", color=GREY, ms=5, mfc="none", label=f"hollow: returns with std below {100 * ALIKE:.0f} % of the expert's")
    within.axhline(0, color="black", lw=0.8)
    within.set(xlabel="environment steps (thousands)", ylabel="r over an evaluation's episodes", ylim=(-1.05, 1.05), title=title(runs[0]))
    across.set(xlabel="mean return of an evaluation", ylabel="mean surrogate return,\nscaled to 0 … 1")
    finish(figure, [within, across], f"{name}__correlation.png")


def plot_temperature(runs: list[Run], panel: str):
    """Return and temperature alpha of runs with a fixed temperature and with --autotune."""
    figure, panels = plt.subplots(2, figsize=(7, 7.3), sharex=True, layout="constrained")
    mark_expert(panels[0], runs[0].env_id)
    for (colour, line), run in zip(STYLES, runs, strict=False):
        begin = run.config["resumed"][-1]["step"] if "until" in run.variant else 0  # until there it is the run it was taken from
        for axes, columns, name in ((panels[0], run.columns, "mean_return"), (panels[1], run.training, "alpha")):
            rows = (columns["step"] >= max(columns["step"][columns["step"] <= begin], default=0)) & ~np.isnan(columns[name])
            axes.plot(columns["step"][rows] / 1000, columns[name][rows], linestyle=line, color=colour, lw=2.2)
        panels[0].lines[-1].set_label(f"{TEMPERATURES[run.variant]}, seed {run.seed}")
    panels[0].set(ylabel="return", title=title(runs[0]))
    panels[1].set(xlabel="environment steps (thousands)", ylabel="temperature alpha", ylim=(0, None))
    finish(figure, panels, f"{panel}__temperature.png")


def plot_reward_by_velocity(path: Path):
    """Both forms of the surrogate reward by forward velocity, in the replay buffer of a run and in its demonstration."""
    figure, panels = plt.subplots(2, figsize=(7, 7.3), sharex=True, layout="constrained")
    columns = read_columns(path)
    panels[1].set_yscale("log", nonpositive="mask")
    for axes, form in zip(panels, ("released", "paper"), strict=True):
        for name, (colour, line), marker in zip(("replay buffer", "demonstration"), STYLES, "os", strict=False):
            rows = columns["transitions"] == name
            axes.plot(columns["velocity"][rows], columns[form][rows], linestyle=line, color=colour, marker=marker, lw=2.2, label=name)
        axes.set_ylabel(f"c × reward per step,\n{form} form")
    panels[0].set(title=", ".join(path.stem.split("__")[0:3:2]), ylim=(0, None))
    panels[1].set(xlabel="forward velocity (m/s)")
    finish(figure, panels, f"{path.stem}__reward.png")


def best_and_final(returns: np.ndarray, expert: float) -> str:
    """The highest return, and the mean of the last five, in per cent of the expert's."""
    return f"{100 * returns.max() / expert:.0f} %, {100 * returns[-5:].mean() / expert:.0f} %"


def summary(panels: dict[tuple, list[Run]], paper: dict) -> str:
    """Markdown: best and final return of each run with the defaults, in per cent of the expert's, beside the paper's.

    Of a run that was stopped it has the best return."""
    head = ["environment, setting", *NAMES.values(), *(f"{name} in the paper" for name in NAMES.values())]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for env_id, setting in itertools.product(ENVIRONMENTS, ("state-action", "state-only")):
        cell, ours, theirs = (env_id, setting, 1), [], []
        for script in NAMES:
            texts = []
            for run in panels.get(cell, ()):
                if (run.script, run.variant) == (script, ""):
                    text = best_and_final(run.columns["mean_return"], expert_return(env_id))
                    texts.append(text if run.finished else f"{text.split(',')[0]} until {run.columns['step'][-1] / 1000:.0f}k")
            ours.append("; ".join(texts))
        for name in NAMES.values():
            returns, expert = (paper_curve(paper, *cell, algorithm)[1] for algorithm in (name, "expert"))
            theirs.append(best_and_final(returns, expert[0]) if len(returns) else "")
        lines.append(f"| {env_id}, {setting} | {' | '.join(ours + theirs)} |")
    return "\n".join(lines)


def table(runs: list[Run], paper: dict) -> str:
    """Markdown: best and final return (mean of the last five evaluations) of every run, in per cent of the expert's, beside the paper's."""
    head = ["run", "steps", "first at the expert's return", "best", "final", "the paper's best and final", "commits"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for run in runs:
        expert, steps, returns = expert_return(run.env_id), run.columns["step"], run.columns["mean_return"]
        above = steps[returns >= expert]
        cells = [f"[{run.env_id}, {NAMES[run.script]}, {run.setting}, seed {run.seed}{', ' * bool(run.variant)}{run.variant}]"
                 f"({run.path.name})"]  # fmt: skip
        cells += ["stopped at " * (not run.finished) + f"{steps[-1] / 1000:.0f}k"]
        cells += [f"{above[0] / 1000:.0f}k" if len(above) else "no"]
        cells += [f"{round(value)}, {round(100 * value / expert)} %" for value in (returns.max(), returns[-5:].mean())]
        cells[-1] = cells[-1] if run.finished else ""
        theirs, expert = (paper_curve(paper, *run.cell, algorithm)[1] for algorithm in (NAMES[run.script], "expert"))
        cells += [best_and_final(theirs, expert[0]) if len(theirs) else ""]
        parts = run.config, *run.config.get("resumed", [])
        cells += [", ".join(dict.fromkeys(part["commit"][:7] for part in parts))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14})
    paper = read_columns(HERE / "paper" / "learning_curves.csv")
    runs, tried = load_runs(""), load_runs("tried")
    panels = defaultdict(list)
    for run in runs:
        panels[run.cell].append(run)
    (HERE / "figures").mkdir(exist_ok=True)
    plot_overview({cell: drawn(members) for cell, members in panels.items()}, paper)
    for (env_id, setting, trajectories), members in panels.items():
        members = drawn(members)
        name = f"{env_id}__{setting}__{trajectories}traj"
        defaults = [run for run in members if run.variant == ""]
        if defaults:
            plot_returns(defaults, paper, name)
        for column, figure in (("mean_return", "variants"), ("training_return", "training")):
            explored = [run for run in members if run.script == "diffail" and column in run.columns]
            if any(run.variant for run in explored):
                plot_variants(explored, paper, column, f"{name}__{figure}")
        tuned = [run for run in (*members, *tried) if run.script == "diffail" and run.variant in TEMPERATURES]
        tuned = [run for run in tuned if (*run.cell, run.seed) == (env_id, setting, trajectories, 1)]
        if any(run.variant in TUNED for run in tuned):
            plot_temperature(tuned, name)
        measured = [run for run in members if run.variant == "" and "reward_correlation" in run.columns]
        if len({run.script for run in measured}) == 2:
            plot_correlation(measured, name)
    for path in sorted((HERE / "results" / "reward_by_velocity").glob("*.csv")):
        plot_reward_by_velocity(path)
    defaults, variants = ([run for run in runs if bool(run.variant) == varied] for varied in (False, True))
    print(summary(panels, paper), table(defaults, paper), table(variants, paper), sep="\n\n")


if __name__ == "__main__":
    main()
