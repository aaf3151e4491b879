"""Start the ranks of one run on a Ray cluster: python ray_launch.py run.toml --ranks 8 [--gpus-per-rank 1] [flags]."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote
class Rank:
    """One process of the run, where Ray has placed it."""

    def address(self) -> tuple[str, int]:
        """Return this machine's address and a free port, for the other ranks to meet at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, environment: dict[str, str], command: list[str]) -> int:
        """Run the command as one rank; return its exit code."""
        # Ray shows a rank its own GPU only, which is therefore number 0.
        return subprocess.run(command, env=os.environ | environment, check=False).returncode


def main() -> int:
    """Place the ranks, start them, and wait for all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpus-per-rank", type=int, default=1)
    options, flags = parser.parse_known_args()
    ray.init()
    bundle = {"CPU": 1, **({"GPU": options.gpus_per_rank} if options.gpus_per_rank else {})}
    group = placement_group([bundle] * options.ranks, strategy="PACK")
    ray.get(group.ready())
    ranks = [
        Rank.options(
            num_cpus=1, num_gpus=options.gpus_per_rank, scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)
        ).remote()
        for i in range(options.ranks)
    ]
    host, port = ray.get(ranks[0].address.remote())
    common = {"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": host, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "rlft", "train", options.config, "--resume", "auto", *flags]
    codes = ray.get([rank.run.remote(common | {"RANK": str(i)}, command) for i, rank in enumerate(ranks)])
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main())
