"""Whether a DiffAIL run's policy starts to run, without noise and with its own, and what standing and running are worth to SAC.

    python benchmark/gaits.py --variant autotune-0.3 runs/Ant-v4__diffail__state-only__1traj__s1

Writes benchmark/results/gaits/NAME.csv, or NAME__VARIANT.csv: ten episodes of the checkpoint's policy for each of three shares of its own
noise (0: the deterministic policy of the evaluations, 1: the policy as it trains), with the return, and the mean surrogate reward, times
c, and the mean entropy of the steps in which the robot stands, and of those in which it runs. An episode without such steps has no means.
"""
import argparse
import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from reward_by_velocity import FORWARD_VELOCITY, ROOT, diffail, load_run

NOISE, EPISODES = (0, 0.5, 1), 10
STANDING, RUNNING = 0.5, 3.5  # m/s: slower than this, either way, and faster than this


class Noisy(torch.nn.Module):
    """The actor with a share of its noise, in the form that diffail.play_episode takes: its mean is the noisy action before tanh."""

    def __init__(self, actor: diffail.Actor, share: float):
        super().__init__()
        self.actor, self.share = actor, share

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.actor(observations)
        return mean + self.share * log_std.exp() * torch.randn_like(mean), log_std


@torch.no_grad()
def measure(agent: diffail.DiffAIL, env: gym.Env, share: float, seed: int) -> dict[str, float]:
    """One episode: its return, and steps, surrogate reward times c and entropy by gait."""
    episode = diffail.play_episode(Noisy(agent.actor, share), env, seed)
    parts = [torch.from_numpy(episode[name]) for name in ("observations", "actions", "next_observations")]
    x = agent.discriminator_input(*parts)
    noise = torch.randn(agent.args.diffusion_steps, *x.shape)
    rewards = agent.args.reward_scale * agent.discriminator.surrogate_reward(x, noise, agent.args.reward_form)
    entropies = -agent.actor.sample(parts[0])[1]  # one sample of -log pi for each step
    row = {"noise": share, "seed": seed, "return": episode["rewards"].sum(), "length": len(x), "alpha": agent.log_alpha.exp().item()}
    velocity = parts[0][:, FORWARD_VELOCITY[agent.args.env_id]]
    for gait, steps in {"standing": velocity.abs() < STANDING, "running": velocity > RUNNING}.items():
        row[f"{gait}_steps"] = int(steps.sum())
        row |= {f"{gait}_reward": rewards[steps].mean().item(), f"{gait}_entropy": entropies[steps].mean().item()}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--to", type=Path, default=ROOT / "benchmark" / "results" / "gaits", help="folder to write to")
    parser.add_argument("--variant", help="in a word or two, what was not the default")
    options = parser.parse_args()
    state, agent, env, _ = load_run(options.run_dir)
    torch.manual_seed(0)
    rows = [{"step": state["step"]} | measure(agent, env, share, seed) for share in NOISE for seed in range(EPISODES)]
    options.to.mkdir(parents=True, exist_ok=True)
    path = options.to / (options.run_dir.name + (f"__{options.variant}" if options.variant else "") + ".csv")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)
    for share in NOISE:
        episodes = [row for row in rows if row["noise"] == share]
        print(f"noise {share}: returns", *(round(row["return"]) for row in episodes))
        for gait in ("standing", "running"):
            steps, *means = ([row[f"{gait}_{name}"] for row in episodes] for name in ("steps", "reward", "entropy"))
            if any(steps):
                reward, entropy = (np.nansum(np.multiply(steps, values)) / sum(steps) for values in means)
                worth = reward + rows[0]["alpha"] * entropy
                print(f"  {gait}: {sum(steps)} steps, reward {reward:.2f}, entropy {entropy:.2f}, with alpha times it {worth:.2f}")


if __name__ == "__main__":
    main()
