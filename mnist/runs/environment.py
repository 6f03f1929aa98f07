"""What a job runs on: processes, hardware, versions."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mnist.distributed import World
from mnist.threads import usable_cores


def environment(world: World) -> dict[str, Any]:
    """As ``environment.json`` and ``report.json`` have it."""
    return {
        "world_size": world.size,
        "device": world.device.type,
        "hardware": _hardware(world.device),
        "precision": world.precision_name,
        "threads": world.threads,
        "usable_cores": usable_cores(),
        "platform": platform.platform(),
        "commit": _commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    packages = {name: version(name) for name in ("torch", "accelerate", "numpy")}
    return {"python": platform.python_version()} | packages


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor())


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, if it runs from one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
