"""Kill a run at random moments and resume it until it ends; then compare it, bit for bit, with the same run left alone.

    python benchmark/soak.py diffail.py --env-id HalfCheetah-v4 --state-only --total-timesteps 100000 --checkpoint-every 1000

Beside the script's own arguments: --kills N and --soak-dir PATH, a new folder. Exit code 1 where the two runs differ.
"""
import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent


def outcome(run_dir: Path) -> dict:
    """All that must agree: evaluations, parameters, optimisers, replay buffer, random streams, and what TensorBoard shows."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != "charts/SPS"}
    kept = {name: part for name, part in state.items() if name not in ("wall_time", "config")}
    return kept | {"evaluations.csv": (run_dir / "evaluations.csv").read_text(), "TensorBoard": shown}


def same(ours: object, theirs: object) -> bool:
    """Whether two trees of tensors and numbers, or two texts, are equal to the last bit; nan is nan."""
    if isinstance(theirs, str):
        return ours == theirs
    try:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--soak-dir", type=Path, default=Path("runs/soak"))
    options, words = parser.parse_known_args()
    options.soak_dir.mkdir(parents=True)
    command = [sys.executable, ROOT / words[0], *words[1:], "--resume", "--output-dir"]

    start = time.perf_counter()
    subprocess.run([*command, options.soak_dir / "whole"], check=True)
    seconds = time.perf_counter() - start

    kills, moments = 0, random.Random(0)
    while kills < options.kills:
        process = subprocess.Popen([*command, options.soak_dir / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if process.wait(timeout=moments.uniform(0, 2 * seconds / options.kills)) != 0:
                raise SystemExit(f"exit code {process.returncode} after {kills} kills")
            break  # it came to its end
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run([*command, options.soak_dir / "killed"], check=True)

    (whole,), (killed,) = (list((options.soak_dir / name).iterdir()) for name in ("whole", "killed"))
    resumed = [entry["step"] for entry in json.loads((killed / "config.json").read_text()).get("resumed", [])]
    print(f"{kills} kills; checkpoints gone on from that led to another one: {resumed}")
    if not resumed:
        raise SystemExit("no kill came after the first checkpoint: fewer --kills, or a smaller --checkpoint-every")
    ours, theirs = outcome(killed), outcome(whole)
    different = [name for name in theirs if not same(ours[name], theirs[name])]
    print(f"differs in {', '.join(different)}" if different else f"the same in {', '.join(theirs)}")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
