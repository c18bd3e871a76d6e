"""python -m examples [name ...]: runs the examples; each prints its result and draws a picture."""

import importlib
import sys
import time

import torch

NAMES = (
    "overfitting",
    "convergence",
    "initial_weights",
    "ensemble",
    "spatial",
    "locked",
    "on_off",
)


def main(names):
    unknown = set(names) - set(NAMES)
    if unknown:
        sys.exit(f"no such example: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    torch.set_num_threads(1)  # the networks are too small for two
    for name in names or NAMES:
        start = time.perf_counter()
        module = importlib.import_module(f"examples.{name}")
        print(f"\n{name}: {module.__doc__.splitlines()[0]}", flush=True)
        module.main()
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
