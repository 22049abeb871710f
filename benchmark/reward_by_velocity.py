"""How both forms of a DiffAIL run's surrogate reward go with the robot's forward velocity, over its replay buffer and its demonstration.

    python benchmark/reward_by_velocity.py --variant normalize runs/Ant-v4__diffail__state-action__1traj__s1

Writes benchmark/results/reward_by_velocity/NAME.csv, or NAME__VARIANT.csv; plot.py draws it. The discriminator and the transitions are
those of the checkpoint, without the random ones at the run's beginning.
"""
import argparse
import csv
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import diffail  # noqa: E402  (of this repository)

FORWARD_VELOCITY = {"HalfCheetah-v4": 8, "Hopper-v4": 5, "Walker2d-v4": 8, "Ant-v4": 13}  # its place in the observation
EDGES = np.arange(-1.25, 6.3, 0.5)  # so that one interval has 0 in its middle


def load_run(run_dir: Path) -> tuple[dict, diffail.DiffAIL, gym.Env, dict[str, np.ndarray]]:
    """Checkpoint, agent, environment and demonstrations of a DiffAIL run."""
    state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    args = replace(diffail.Args(), **state["config"]["args"] | {"compile": False})
    env = diffail.make_env(args.env_id)
    agent = diffail.DiffAIL(env.observation_space.shape[0], env.action_space.shape[0], args, torch.device("cpu"))
    agent.load_state_dict(state["agent"])
    demos_path = Path(args.demos or ROOT / "demos" / f"{args.env_id}.npz")
    return state, agent, env, diffail.load_demonstrations(demos_path, args.env_id, args.num_trajectories, env)[0]


@torch.no_grad()
def rewards(agent: diffail.DiffAIL, *transitions: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Of each transition the reward in the released and in the paper's form, times c, and the diffusion loss, mean over t."""
    args, generator, blocks = agent.args, torch.Generator().manual_seed(0), []
    for x in agent.discriminator_input(*transitions).split(1_000):  # all at once would take gigabytes for each layer
        noise = torch.randn(args.diffusion_steps, *x.shape, generator=generator)
        forms = (args.reward_scale * agent.discriminator.surrogate_reward(x, noise, form) for form in ("released", "paper"))
        blocks.append((*forms, agent.discriminator.diffusion_loss(x, noise, torch.arange(args.diffusion_steps)[:, None]).mean(0)))
    return tuple(torch.cat(values).numpy() for values in zip(*blocks))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--to", type=Path, default=ROOT / "benchmark" / "results" / "reward_by_velocity", help="folder to write to")
    parser.add_argument("--variant", help="in a word or two, what was not the default")
    options = parser.parse_args()
    run_dir = options.run_dir
    state, agent, env, demos = load_run(run_dir)
    (o,), (a,), args = env.observation_space.shape, env.action_space.shape, agent.args
    expert = map(torch.from_numpy, demos.values())
    rows = state["rows"].roll(-state["added"], 0)  # from the oldest to the newest, in a full ring buffer too
    random = max(0, args.learning_starts - (state["step"] - len(rows)))
    stored = rows[random:].split((o, a, o), dim=1)
    place, table = FORWARD_VELOCITY[args.env_id], [["transitions", "velocity", "number", "released", "paper", "diffusion_loss"]]
    for name, transitions in {"replay buffer": stored, "demonstration": tuple(expert)}.items():
        velocity, values = transitions[0][:, place].numpy(), rewards(agent, *transitions)
        for low_edge, high_edge in itertools.pairwise(EDGES):
            inside = (low_edge <= velocity) & (velocity < high_edge)
            if inside.sum() >= 20:
                means = (f"{value[inside].mean():.4g}" for value in values)
                table.append([name, (low_edge + high_edge) / 2, inside.sum(), *means])
    path = options.to / (run_dir.name + (f"__{options.variant}" if options.variant else "") + ".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    print(f"{path}, at step {state['step']:,}")


if __name__ == "__main__":
    main()
