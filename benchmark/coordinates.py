"""By which coordinates of x a DiffAIL run's discriminator tells its policy from its demonstration.

    python benchmark/coordinates.py runs/Hopper-v4__diffail__state-action__1traj__s1

Writes benchmark/results/coordinates/NAME.csv, or NAME__VARIANT.csv: for each coordinate of x, over 10 episodes of the checkpoint's
deterministic policy and over the demonstration that it learned from, its mean and standard deviation as the discriminator sees it, and
means over t of exp(-(eps - eps_phi)^2), of which D in the released form is the mean over the coordinates, and of (eps - eps_phi)^2.
"""
import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from reward_by_velocity import ROOT, diffail, load_run

EPISODES = 10


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--to", type=Path, default=ROOT / "benchmark" / "results" / "coordinates", help="folder to write to")
    parser.add_argument("--variant", help="in a word or two, what was not the default")
    options = parser.parse_args()
    state, agent, env, demos = load_run(options.run_dir)
    episodes = [diffail.play_episode(agent.actor, env, seed) for seed in range(EPISODES)]
    second = "s'" if agent.args.state_only else "a"
    table = [["step", "transitions", "coordinate", "mean", "std", "d", "squared_error"]]
    for name, parts in {"policy": episodes, "demonstration": [demos]}.items():
        transitions = {part: np.concatenate([one[part] for one in parts]) for part in demos}
        x, observation_dim = agent.discriminator_input(*map(torch.from_numpy, transitions.values())), len(transitions["observations"][0])
        noise = torch.randn(agent.args.diffusion_steps, *x.shape, generator=torch.Generator().manual_seed(0))
        error = agent.discriminator.denoising_error(x, noise, torch.arange(len(noise))[:, None]).square()
        columns = x.mean(0), x.std(0), torch.exp(-error).mean((0, 1)), error.mean((0, 1))
        for i, values in enumerate(zip(*columns, strict=True)):
            coordinate = f"s[{i}]" if i < observation_dim else f"{second}[{i - observation_dim}]"
            table.append([state["step"], name, coordinate, *(f"{value.item():.4g}" for value in values)])
    path = options.to / (options.run_dir.name + (f"__{options.variant}" if options.variant else "") + ".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    print(f"{path}, at step {state['step']:,}")


if __name__ == "__main__":
    main()
