"""Prints what an installed CUDA torch needs to be imported and built against, one per line.

`pip install torch` would also bring Triton, the CUDA bindings and libraries that torch loads only
on demand, which a machine without a GPU never uses.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

NOT_LINKED = {"triton", "cuda-bindings"}
NOT_LINKED_EXTRAS = {"cusolver", "nvrtc", "nvtx"}  # of cuda-toolkit


def linked_requirements(distribution: str = "torch") -> list[str]:
    requirements = []
    for line in requires(distribution) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if requirement.name in NOT_LINKED or (marker and not marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        requirement.extras -= NOT_LINKED_EXTRAS
        requirements.append(str(requirement))
    return requirements


if __name__ == "__main__":
    print("\n".join(linked_requirements()))
