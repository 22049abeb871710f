"""What a DiffAIL run's critics think of the states before and after a fall, over its replay buffer.

    python benchmark/values.py runs/Hopper-v4__diffail__state-action__1traj__s1

For Hopper, Walker2d and Ant. Writes benchmark/results/values/NAME.csv, or NAME__VARIANT.csv: of transitions before a fall and of those
after one, by how many steps after, over the whole replay buffer and over its last 25,000 transitions, the mean surrogate reward c R and
the means of min(Q1, Q2) for an action of the policy's. A state that a robot never leaves again is worth about its reward divided by
1 - gamma. A fall is what Gymnasium takes for one, which ends an episode of an evaluation; in an episode without one all counts as before.
"""
import argparse
import csv
import itertools
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from reward_by_velocity import ROOT, load_run

SAMPLES = 4_000  # at most, of each kind of transition


def healthy(env: gym.Env, observation: np.ndarray) -> bool:
    """What a robot's environment says of a state, which the observation [qpos, without where it is in the plane, qvel] leaves open."""
    env.data.qpos[env.model.nq + env.model.nv - len(observation) :] = observation[: len(observation) - env.model.nv]
    env.data.qvel[:] = observation[-env.model.nv :]
    return env.is_healthy


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--to", type=Path, default=ROOT / "benchmark" / "results" / "values", help="folder to write to")
    parser.add_argument("--variant", help="in a word or two, what was not the default")
    options = parser.parse_args()
    state, agent, env, _ = load_run(options.run_dir)
    if not hasattr(env.unwrapped, "is_healthy"):
        parser.error(f"{agent.args.env_id} knows no falls")
    (o,), (a,), args = env.observation_space.shape, env.action_space.shape, agent.args
    rows = state["rows"].roll(-state["added"], 0)  # from the oldest to the newest, in a full ring buffer too
    transitions = observations, _, next_observations = rows[:, : o + a + o].split((o, a, o), dim=1)
    edges = [0] * (state["step"] == len(rows))  # a full ring buffer begins within an episode, which is left out
    edges += [*(1 + (next_observations[:-1] != observations[1:]).any(1).nonzero()[:, 0]).tolist(), len(rows)]
    fallen = torch.tensor([not healthy(env.unwrapped, observation) for observation in next_observations.double().numpy()])
    since_fall = torch.full((len(rows),), -1_000_000)  # steps since the fall, 0 at the transition that is one
    for begin, end in itertools.pairwise(edges):
        if fallen[begin:end].any():
            since_fall[begin:end] = torch.arange(end - begin) - fallen[begin:end].int().argmax()
    kinds = {"before a fall": since_fall <= 0, "of these the last 20": (since_fall > -20) & (since_fall <= 0)}
    kinds |= {f"{low + 1} to {low + 20} steps after": (low < since_fall) & (since_fall <= low + 20) for low in range(0, 100, 20)}
    kinds |= {"more than 100 steps after": since_fall > 100}
    generator, table = torch.Generator().manual_seed(0), [["step", "transitions", "kind", "number", "reward", "value"]]
    torch.manual_seed(0)  # for the policy's actions
    for name, since in {"all": 0, "last 25,000": max(0, len(rows) - 25_000)}.items():
        for kind, chosen in kinds.items():
            places = since + chosen[since:].nonzero()[:, 0]
            if len(places) < 20:
                continue
            sample = places[torch.randperm(len(places), generator=generator)[:SAMPLES]]
            x = agent.discriminator_input(*(part[sample] for part in transitions))
            noise = torch.randn(args.diffusion_steps, *x.shape, generator=generator)
            reward = args.reward_scale * agent.discriminator.surrogate_reward(x, noise, args.reward_form).mean()
            value = torch.min(*agent.critic(observations[sample], agent.actor.act(observations[sample]))).mean()
            table.append([state["step"], name, kind, len(places), f"{reward:.4g}", f"{value:.4g}"])
    path = options.to / (options.run_dir.name + (f"__{options.variant}" if options.variant else "") + ".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    print(f"{path}, at step {state['step']:,}")


if __name__ == "__main__":
    main()
