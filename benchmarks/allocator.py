"""What huge pages are worth to a forward pass on a CPU: the same network in two fresh processes.

    python -m benchmarks.allocator [--passes 15]

U-Net on ResNet-18, one window of 4 × 512². See `segpipe.process.allocator`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

from benchmarks.fresh import run_fresh


def one(passes: int) -> None:
    """Time forward passes in this process; print the median in ms and the page faults of one pass."""
    import segmentation_models_pytorch as smp
    import torch

    network = smp.create_model("unet", "resnet18", encoder_weights=None, in_channels=4, classes=5).eval()
    x = torch.randn(1, 4, 512, 512)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            network(x)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(passes):
            begun = time.perf_counter()
            network(x)
            seconds.append(time.perf_counter() - begun)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(f"{1000 * statistics.median(seconds):.0f} {faults // passes}")


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    print("huge pages   forward pass ms   page faults a pass")
    for name, value in (("no", "0"), ("yes", "1")) * 2:
        found = run_fresh("benchmarks.allocator", str(arguments.passes), THP_MEM_ALLOC_ENABLE=value)
        print("{:10s} {:>17s} {:>20s}".format(name, *found), flush=True)


if __name__ == "__main__":
    main()
