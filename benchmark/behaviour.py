"""What a DiffAIL run's policy does, beside its demonstration: forward velocity, size of the actions, and the surrogate reward of both.

    python benchmark/behaviour.py runs/Ant-v4__diffail__state-only__1traj__s1

Writes benchmark/results/behaviour/NAME.csv, or NAME__VARIANT.csv, with means per step over 10 episodes of the checkpoint's deterministic
policy and over the demonstration that it learned from. The surrogate reward, times c, is the checkpoint's discriminator's.
"""
import argparse
import csv
from pathlib import Path

import numpy as np
from reward_by_velocity import FORWARD_VELOCITY, ROOT, diffail, load_run

EPISODES = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--to", type=Path, default=ROOT / "benchmark" / "results" / "behaviour", help="folder to write to")
    parser.add_argument("--variant", help="in a word or two, what was not the default")
    options = parser.parse_args()
    state, agent, env, demos = load_run(options.run_dir)
    episodes = [diffail.play_episode(agent.actor, env, seed) for seed in range(EPISODES)]
    policy = {name: np.concatenate([episode[name] for episode in episodes]) for name in ("observations", "actions", "next_observations")}
    table = [["step", "transitions", "number", "velocity", "mean_abs_action", "squared_actions", "surrogate_reward"]]
    for name, transitions in {"policy": policy, "demonstration": demos}.items():
        actions, number = transitions["actions"], len(transitions["actions"])
        velocity = transitions["observations"][:, FORWARD_VELOCITY[agent.args.env_id]].mean()
        means = velocity, np.abs(actions).mean(), np.square(actions).sum(1).mean(), agent.surrogate_return(transitions) / number
        table.append([state["step"], name, number, *(f"{value:.4g}" for value in means)])
    path = options.to / (options.run_dir.name + (f"__{options.variant}" if options.variant else "") + ".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    print(f"{path}, at step {state['step']:,}")


if __name__ == "__main__":
    main()
