"""Figures and the results table, from benchmark/results or from run directories.

    python benchmark/plot.py               # figures to benchmark/figures, README.md's table to the console
    python benchmark/plot.py runs/*        # learning curves of these runs to learning_curves.png
    python benchmark/plot.py --add runs/*  # finished runs into benchmark/results

First: pip install -r benchmark/requirements.txt"""

import argparse
import functools
import json
from itertools import cycle, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
NAMES = {"diffail": "DiffAIL", "gail_baseline": "GAIL", "sac_baseline": "SAC"}
METHODS = "diffail", "gail_baseline"  # those of the figures and of the table
ROBOTS = "HalfCheetah-v4", "Ant-v4", "Hopper-v4", "Walker2d-v4"
CELLS = list(product(ROBOTS, ("state-action", "state-only")))
# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]


def expert_return(env_id: str) -> float:
    """Returns the mean return of the demonstrations, NaN where there are none."""
    path = HERE.parent / "demos" / f"{env_id}.npz"
    if not path.exists():
        return np.nan
    with np.load(path) as file:
        return np.mean(json.loads(file["metadata"].item())["returns"])


def read_run_dirs(paths: list[Path]) -> pd.DataFrame:
    """Returns the evaluations of these runs; directories without any are left out."""
    frames = [pd.DataFrame()]
    for file in (file for path in paths for file in path.glob("evaluations.csv") if file.stat().st_size):
        config = json.loads((file.parent / "config.json").read_text())
        env_id = config["args"]["env_id"]
        _, script, *setting, _ = file.resolve().parent.name.split("__")
        frame = pd.read_csv(file).assign(run=str(file), script=script, env_id=env_id)
        frame["setting"] = ", ".join(setting).removesuffix(", 1traj")  # empty for SAC
        frames.append(frame.assign(expert=config.get("expert_return") or expert_return(env_id)))
    return pd.concat(frames)


def read_results() -> pd.DataFrame:
    """Returns the evaluations of the imitation runs in benchmark/results."""
    frames = []
    for path in (HERE / "results").glob("*__state-*.csv"):
        script, setting = path.stem.split("__")
        frames.append(pd.read_csv(path).assign(script=script, setting=setting))
    results = pd.concat(frames).rename(columns={"seed": "run"})
    return results.assign(expert=results["env_id"].map(functools.cache(expert_return)))


def add(path: Path):
    """Puts a finished run into benchmark/results, in the place of one of its environment and seed."""
    config = json.loads(file.read_text()) if (file := path / "config.json").exists() else {}
    kind = path.resolve().name.split("__")[1:-1]
    if "finished_at_step" not in config or kind[2:] not in ([], ["1traj"]):
        return print(f"left out, as it is no finished run with one demonstration: {path}")
    run = {"env_id": config["args"]["env_id"], "seed": config["args"]["seed"]}
    read = functools.partial(pd.read_csv, dtype=str, keep_default_na=False)  # all digits stay as they are

    def merge(old: list[dict], own: list[dict]) -> list[dict]:
        """Returns the other runs' rows and this run's own, in order."""
        others = [row for row in old if (row["env_id"], int(row["seed"])) != tuple(run.values())]
        return sorted(others + [run | row for row in own], key=lambda row: (row["env_id"], int(row["seed"])))

    file = HERE / "results" / ("__".join(kind[:2]) + ".csv")
    rows = read(file).to_dict("records") if file.exists() else []
    configs = json.loads(file.with_suffix(".json").read_text()) if rows else []
    pd.DataFrame(merge(rows, read(path / "evaluations.csv").to_dict("records"))).to_csv(file, index=False)
    file.with_suffix(".json").write_text(json.dumps(merge(configs, [{"config": config}]), indent=1) + "\n")


def read_paper(env_id: str, setting: str, algorithm: str) -> pd.Series:
    """Returns the mean returns of the paper's curve by step, empty where it has none."""
    frame = pd.read_csv(HERE / "paper" / "learning_curves.csv")
    cell = frame["env"].eq(env_id.removesuffix("-v4")) & frame["setting"].eq(setting)
    curve = frame[cell & frame["algorithm"].eq(algorithm)].set_index("step")["mean_return"]
    # A point is the mean of the evaluations from its step to 30,000 later: it belongs in their middle
    return curve.set_axis(curve.index + 15_000)


def select(runs: pd.DataFrame, script: str, cell: tuple[str, str], column="mean_return") -> pd.DataFrame:
    """Returns a column of the evaluations: a row for each step that all runs have, a column for each run."""
    rows = (runs["script"] == script) & (runs["env_id"] == cell[0]) & (runs["setting"] == cell[1])
    return runs[rows].pivot(index="step", columns="run", values=column).dropna()


def save(figure: plt.Figure, path: Path):
    """Writes the figure, with one legend for all of its panels below them."""
    labelled = {}
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        labelled |= {label: line for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    print(path)


def plot_curves(runs: pd.DataFrame, path: Path, percent: bool = False, paper: bool = False):
    """Draws mean and range of the returns, a panel for each environment and setting."""
    own = set(zip(runs["env_id"], runs["setting"]))
    cells = [cell for cell in dict.fromkeys(CELLS + sorted(own)) if cell in own]
    colours = dict(zip([*NAMES, *sorted(set(runs["script"]) - set(NAMES))], cycle(COLOURS)))
    columns = min(len(cells), 2)
    rows = -(-len(cells) // columns)  # rounded up
    size = {"figsize": (8 if columns == 1 else 11, 1.4 + 2.8 * rows), "sharey": percent}
    figure, grid = plt.subplots(rows, columns, squeeze=False, layout="constrained", **size)
    for axes, cell in zip(grid.flat, cells):
        members = runs[(runs["env_id"] == cell[0]) & (runs["setting"] == cell[1])]
        expert = members["expert"].iloc[0]
        unit = expert / 100 if percent else 1
        for script in sorted(set(members["script"])):
            returns, name = select(members, script, cell) / unit, NAMES.get(script, script)
            steps, colour = returns.index / 1000, colours[script]
            axes.plot(steps, returns.mean(axis=1), color=colour, lw=2.2, label=name, zorder=3)
            axes.fill_between(steps, returns.min(axis=1), returns.max(axis=1), color=colour, alpha=0.2, lw=0)
            curve = read_paper(*cell, name)
            if paper and len(curve):
                curve /= read_paper(*cell, "expert").max() / 100 if percent else 1
                axes.plot(curve.index / 1000, curve, ":", color=colour, lw=1.8, label=f"{name} (paper)")
        if not np.isnan(expert):
            axes.axhline(expert / unit, color="black", lw=1.2, ls="--", label="expert")
        axes.set(title=", ".join(filter(None, cell)), xlabel="thousand steps", xlim=(0, None))
        axes.set_ylabel("% of the expert" if percent else "return")
    for axes in grid.flat[len(cells) :]:
        axes.remove()
    save(figure, path)


def plot_correlation(runs: pd.DataFrame, path: Path):
    """Draws each evaluation's surrogate return by its true one; r is the mean of the seeds' correlations."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, layout="constrained")
    for axes, script, colour in zip(panels, METHODS, COLOURS):
        true = select(runs, script, CELLS[0])
        surrogate = select(runs, script, CELLS[0], "mean_surrogate_return")
        axes.plot(true, surrogate, "o", color=colour, ms=6, alpha=0.5, mew=0)
        axes.axvline(expert_return(CELLS[0][0]), color="black", lw=1.2, ls="--", label="expert")
        axes.set_title(f"{NAMES[script]}: r = {true.corrwith(surrogate).mean():.2f}")
        axes.set(xlabel="mean return of an evaluation", ylabel="mean surrogate return")
    save(figure, path)


def best_and_final(returns: pd.DataFrame, expert: float) -> str:
    """Returns highest evaluation and mean of the last five in %: means over seeds, and ranges if several."""
    texts = []
    for values in (returns.max() * 100 / expert, returns.tail(5).mean() * 100 / expert):
        span = f" ({values.min():.0f}–{values.max():.0f})" if len(values) > 1 else ""
        texts.append(f"{values.mean():.0f}{span}")
    return " / ".join(texts)


def table(runs: pd.DataFrame) -> str:
    """Returns README.md's table of results in Markdown."""
    lines = ["| best / final, in % | DiffAIL | GAIL | DiffAIL, paper | GAIL, paper |", "|---" * 5 + "|"]
    for cell in CELLS:
        ours = [select(runs, script, cell) for script in METHODS]
        texts = [f"{best_and_final(seeds, expert_return(cell[0]))}, n = {seeds.shape[1]}" for seeds in ours]
        papers = [read_paper(*cell, NAMES[script]).to_frame() for script in METHODS]
        texts += [best_and_final(curve, read_paper(*cell, "expert").max()) for curve in papers]
        texts = [text if len(returns) else "" for text, returns in zip(texts, ours + papers)]
        lines.append(f"| {', '.join(cell)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main():
    """Draws what is asked for, or adds the runs to benchmark/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories; none: benchmark/results")
    parser.add_argument("--add", action="store_true", help="put the runs into benchmark/results")
    parser.add_argument("--output", type=Path, default=Path("learning_curves.png"), help="figure of the runs")
    options = parser.parse_args()
    plt.rcParams.update({"backend": "agg", "font.size": 12})
    if options.add:
        for path in options.runs:
            add(path)
        return
    runs, figures = read_run_dirs(options.runs) if options.runs else read_results(), HERE / "figures"
    if runs.empty:
        parser.error("these runs have no evaluations yet")
    if options.runs:
        return plot_curves(runs, options.output)
    example = runs.query(f"script == 'diffail' and env_id == '{ROBOTS[0]}' and setting == 'state-only'")
    plot_curves(example, figures / f"{ROBOTS[0]}__state-only.png", paper=True)
    plot_curves(runs, figures / "overview.png", percent=True, paper=True)
    plot_correlation(runs, figures / "correlation.png")
    print(table(runs))


if __name__ == "__main__":
    main()
