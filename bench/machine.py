"""What the numbers depend on: machine, versions, date, load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PEERS = ("FLASH-pytorch", "rotary-embedding-torch", "flash-attn", "fla-core", "liger-kernel")


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The checkout's commit, `-dirty` if tracked files differ from it; None without git or any commit."""
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copy_speed() -> float:
    """Bytes read and written per second when a GPU copies 1 GiB, median of 20: what no elementwise kernel can beat."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(20):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return 2 * source.nbytes / statistics.median(times)


def product_speed() -> dict[str, float]:
    """Operations per second of PyTorch's own product of two 1024 x 1024 matrices here, by dtype: the median of 15, or
    of what a second holds, as a processor without units for bf16 may take seconds for one."""
    speeds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, out = torch.ones(1024, 1024, dtype=dtype), torch.empty(1024, 1024, dtype=dtype)
        times: list[float] = []
        while not times or (len(times) < 16 and sum(times) < 1):
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            times.append(time.perf_counter() - start)
        speeds[name] = 2 * 1024**3 / statistics.median(times[1:] or times)
    return speeds


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a result. Call it before the run: it takes the load."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_before": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "flashgau": version("flashgau"),
        "flashgau_commit": git_commit(),
        "peers": {name: version(name) for name in PEERS if version(name)},
    }
    if device == "cpu":
        facts["product_flop_per_second"] = product_speed()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "copy_bytes_per_second": copy_speed(),
            "gpu_memory_bytes": properties.total_memory,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None
