"""Prints the index to take torch from, for `make`: PyTorch's own, of CPU builds, where there is no NVIDIA driver; else nothing.

pip asks every index for every package, and an index that cannot be reached costs it several long tries for each of them. So this
one is asked once before; where it does not answer, torch is whatever pip's own index offers, and a line on stderr says so.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE_S = 5.0
DRIVER_FILES = ("proc/driver/nvidia/version", "dev/nvidiactl")


def choose(has_driver: Callable[[], bool], answers: Callable[[str], bool]) -> tuple[str, str]:
    """The index, or an empty string for pip's own, and a line to say about it, or an empty string."""
    if has_driver():
        return "", ""
    if answers(CPU_INDEX):
        return CPU_INDEX, f"No NVIDIA driver here: taking torch's CPU build from {CPU_INDEX} (make TORCH_INDEX= for pip's own)"
    return "", f"No NVIDIA driver here, but {CPU_INDEX} does not answer: taking torch from pip's own index"


def has_nvidia_driver(root: Path = Path("/"), command: str = "nvidia-smi") -> bool:
    """Whether this machine has one, by its files or by its tool."""
    if any((root / name).exists() for name in DRIVER_FILES):
        return True
    try:
        done = subprocess.run([command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def answers_in_time(index: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether the index serves torch, asked on a thread: a name that does not resolve can hold one up for longer."""
    found = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{index}/torch/", headers={"user-agent": "hetserve-make"})
            with urllib.request.urlopen(request, timeout=patience_s) as answer:
                if answer.status == 200:
                    found.set()
        except (OSError, ValueError):
            pass
        finally:
            over.set()

    over = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    over.wait(patience_s)
    return found.is_set()


def main() -> None:
    index, said = choose(has_nvidia_driver, answers_in_time)
    if said:
        print(said, file=sys.stderr)
    print(index)


if __name__ == "__main__":
    main()
