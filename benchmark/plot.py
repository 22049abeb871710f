"""Learning curves from benchmark/results/*.csv, with the expert's line and the paper's curve, to benchmark/figures/*.png.

    pip install -r benchmark/requirements.txt
    python benchmark/plot.py
"""
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("agg")
HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"  # Okabe and Ito: told apart by colour-blind readers
STYLES = {"paper": (BLUE, "-", "this code, paper’s reward"), "released": (ORANGE, "--", "this code, released reward")}


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(rows: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    """Thousands of steps and mean returns."""
    return [int(row["step"]) / 1000 for row in rows], [float(row["mean_return"]) for row in rows]


def plot_setting(env_id: str, setting: str, runs: list[tuple[dict, list[dict]]], paper: list[dict]) -> Path:
    """One panel: every run of ours, the expert's line, the paper's curve."""
    body = env_id.split("-v")[0]
    figure, axes = plt.subplots(figsize=(7, 5.4), layout="constrained")
    wanted = dict(env=body, setting=setting, trajectories="1", algorithm="DiffAIL")
    theirs = [row for row in paper if wanted.items() <= row.items()]
    axes.plot(*curve(theirs), ":", color=GREY, lw=2.5, label="the paper's, mean of 5 seeds")
    for config, rows in runs:
        colour, line, label = STYLES[config["args"]["reward_form"]]
        label += f", seed {config['args']['seed']}"
        if "finished_at_step" not in config:
            label += f", first {int(rows[-1]['step']) // 1000}k steps"
        axes.plot(*curve(rows), line, color=colour, lw=2.2, label=label)
    with np.load(HERE.parent / "demos" / f"{env_id}.npz", allow_pickle=False) as file:
        expert = np.mean(json.loads(file["metadata"].item())["returns"])
    axes.axhline(expert, color=GREEN, lw=1.8)
    axes.annotate(f"expert, {expert:.0f}", (1, expert), xycoords=("axes fraction", "data"), ha="right", xytext=(0, 4),
                  textcoords="offset points", color=GREEN, fontsize=12)  # fmt: skip
    axes.set(xlabel="environment steps (thousands)", ylabel="return", title=f"{env_id}, {setting}, 1 trajectory")
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    path = HERE / "figures" / f"{env_id}__{setting}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main():
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14})
    paper = read_csv(HERE / "paper" / "learning_curves.csv")
    panels = defaultdict(list)
    for path in sorted((HERE / "results").glob("*__diffail__*.csv")):
        config = json.loads(path.with_suffix(".json").read_text())
        setting = "state-only" if config["args"]["state_only"] else "state-action"
        panels[config["args"]["env_id"], setting].append((config, read_csv(path)))
    (HERE / "figures").mkdir(exist_ok=True)
    for (env_id, setting), runs in panels.items():
        print(plot_setting(env_id, setting, runs, paper))


if __name__ == "__main__":
    main()
