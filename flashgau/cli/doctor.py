"""`flashgau doctor`: what this machine has, and which backend each operation would use on it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flashgau.cli.console import FAILURE, dump_json, make_console, make_table, mebibytes

OPERATIONS = (
    "attention",
    "glu",
    "glu_linear",
    "gau_attention",
    "mixed_chunk_attention",
    "mixed_chunk_step",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
PACKAGES = ("flashgau", "torch", "triton", "einops", "numpy")
# Environment variables that change what flashgau does, and what each is for.
VARIABLES = {
    "FLASHGAU_BACKEND": "backend of every call that names none",
    "FLASHGAU_TUNING": "folder of the tables of block sizes that were measured here",
    "TRITON_INTERPRET": "1 runs Triton kernels in Python, on CPU tensors too",
}
# Instruction sets that decide how fast PyTorch's own products are, under the names Linux and macOS give them.
INSTRUCTION_SETS = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "avx512_bf16": ("avx512_bf16",),
    "avx512_fp16": ("avx512_fp16",),
    "amx": ("amx_tile",),
    "neon": ("asimd", "neon"),
    "sve": ("sve",),
    "arm_bf16": ("bf16",),
}


def _package_versions() -> dict[str, str | None]:
    """Version of each package that matters; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    # PyTorch knows its build (+cpu, +cu130); the package's metadata does not always.
    found["torch"] = str(torch.__version__)
    return found


def _proc_fields(path: str) -> dict[str, str]:
    """`key : value` lines of a file under /proc, the first of each key; empty where there is no such file."""
    fields: dict[str, str] = {}
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _cpu_facts() -> dict[str, Any]:
    import torch

    from flashgau.eager.common import native_halves

    fields = _proc_fields("/proc/cpuinfo")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    known = {name: any(flag in flags for flag in names) for name, names in INSTRUCTION_SETS.items()}
    if platform.machine().lower() in ("x86_64", "amd64"):
        known = {name: has for name, has in known.items() if name.startswith(("avx", "amx"))}
    else:
        known = {name: has for name, has in known.items() if not name.startswith(("avx", "amx"))}
    return {
        "model": model,
        "machine": platform.machine(),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": known if flags else None,
        "native_halves": sorted(str(half).removeprefix("torch.") for half in native_halves("cpu")),
    }


def _memory_facts() -> dict[str, int | None]:
    """Bytes of memory: of the machine, free for use now, and the limit of this process's control group."""
    fields = _proc_fields("/proc/meminfo")

    def kib(name: str) -> int | None:
        value = fields.get(name, "").split()
        return int(value[0]) * 1024 if value else None

    total = kib("MemTotal")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit: int | None = None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        # "max", and in the older interface a number near 2^63, both say that there is no limit.
        if text.isdigit() and (total is None or int(text) < total):
            limit = int(text)
        break
    return {"total_bytes": total, "available_bytes": kib("MemAvailable"), "limit_bytes": limit}


def available_memory() -> int | None:
    """Bytes this process can still take, as far as the system tells; None where it does not."""
    facts = _memory_facts()
    known = [facts[key] for key in ("available_bytes", "limit_bytes")]
    numbers = [number for number in known if number is not None]
    return min(numbers) if numbers else facts["total_bytes"]


def _gpu_facts() -> list[dict[str, Any]]:
    import torch

    gpus: list[dict[str, Any]] = []
    if not torch.cuda.is_available():
        return gpus
    for index in range(torch.cuda.device_count()):
        # One broken device must not hide the others.
        try:
            properties = torch.cuda.get_device_properties(index)
            free, _ = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            gpus.append({"index": index, "device": f"cuda:{index}", "error": str(error).splitlines()[0]})
            continue
        gpus.append(
            {
                "index": index,
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "free_bytes": free,
                "multiprocessors": properties.multi_processor_count,
                "shared_memory_bytes": getattr(properties, "shared_memory_per_block_optin", None),
                "l2_bytes": getattr(properties, "L2_cache_size", None),
                "warp_size": getattr(properties, "warp_size", None),
            }
        )
    return gpus


def _backend_facts(devices: list[str]) -> list[dict[str, Any]]:
    """For every operation and device: the backend of a plain call by dtype, and what rules out the others."""
    import torch

    from flashgau.ops import dispatch

    rows: list[dict[str, Any]] = []
    for op in OPERATIONS:
        for device in devices:
            defaults: dict[str, str | None] = {}
            reasons: dict[str, dict[str, str | None]] = {}
            for name in DTYPES:
                dtype = getattr(torch, name)
                reasons[name] = dict(dispatch.explain(op, device, dtype))
                try:
                    defaults[name] = dispatch.resolve(op, None, torch.device(device), dtype)
                except (ValueError, RuntimeError):
                    defaults[name] = None  # FLASHGAU_BACKEND names one that does not exist or cannot run here
            rows.append({"op": op, "device": device, "default": defaults, "unusable_because": reasons})
    return rows


def collect() -> dict[str, Any]:
    """Everything `flashgau doctor` reports, as plain data."""
    import torch

    gpus = _gpu_facts()
    devices = ["cpu"] + [gpu["device"] for gpu in gpus if "error" not in gpu]
    return {
        "versions": _package_versions(),
        "platform": platform.platform(),
        "python_executable": sys.executable,
        "cpu": _cpu_facts(),
        "memory": _memory_facts(),
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
        "gpus": gpus,
        "backends": _backend_facts(devices),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def healthy(facts: dict[str, Any]) -> bool:
    """Whether every operation has a backend on every device found, for fp32."""
    return all(row["default"]["float32"] is not None for row in facts["backends"])


def facts_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine in (name, value) lines, for a table in a terminal or on a page."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())
    cpu, memory = facts["cpu"], facts["memory"]
    rows = [("versions", versions), ("platform", facts["platform"])]
    rows.append(
        (
            "cpu",
            f"{cpu['model']} ({cpu['machine']}), {cpu['usable_cores']} of {cpu['logical_cores']} cores usable"
            f", {cpu['torch_threads']} PyTorch threads, PyTorch uses {cpu['torch_capability']}",
        )
    )
    sets = cpu["instruction_sets"]
    if sets:
        rows.append(("instructions", ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in sets.items())))
    halves = " and ".join(cpu["native_halves"])
    rows.append(
        ("halves", f"{halves} multiplied as they are" if halves else "multiplied as fp32, which is faster here")
    )
    if memory["total_bytes"] is not None:
        text = mebibytes(memory["total_bytes"])
        if memory["available_bytes"] is not None:
            text += f", {mebibytes(memory['available_bytes'])} available"
        if memory["limit_bytes"] is not None:
            text += f", limited to {mebibytes(memory['limit_bytes'])}"
        rows.append(("memory", text))
    if not facts["gpus"]:
        kinds = (("CUDA", facts["cuda"]), ("ROCm", facts["hip"]))
        build = next((f"for {kind} {version}" for kind, version in kinds if version), "without GPU support")
        rows.append(("gpu", f"none found (PyTorch is built {build})"))
    for gpu in facts["gpus"]:
        if "error" in gpu:
            rows.append((gpu["device"], f"cannot be used: {gpu['error']}"))
            continue
        shared, cache = gpu["shared_memory_bytes"], gpu["l2_bytes"]
        text = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors"
        text += f", {mebibytes(gpu['memory_bytes'])} ({mebibytes(gpu['free_bytes'])} free)"
        text += f", {shared // 1024} KiB shared memory per block" if shared else ""
        text += f", {mebibytes(cache)} L2" if cache else ""
        rows.append((gpu["device"], text))
    for name, value in facts["environment"].items():
        rows.append((name, f"{'not set' if value is None else value} ({VARIABLES[name]})"))
    return rows


def backend_rows(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(operation, device, default backend, why not the others) for a table."""
    rows = []
    for row in facts["backends"]:
        default = row["default"]
        chosen = default["float32"] or "none"
        others = {name: default[name] or "none" for name in DTYPES if (default[name] or "none") != chosen}
        text = chosen + "".join(f"; {name}: {backend}" for name, backend in others.items())
        reasons = [f"{name}: {why}" for name, why in row["unusable_because"]["float32"].items() if why]
        rows.append((row["op"], row["device"], text, "; ".join(reasons) or "all are usable"))
    return rows


def show(facts: dict[str, Any]) -> None:
    """Print the facts as two tables."""
    console = make_console()
    machine = make_table("machine", "")
    for name, value in facts_rows(facts):
        machine.add_row(name, value)
    console.print(machine)
    backends = make_table("operation", "device", "default backend", "not usable here")
    for operation, device, chosen, reasons in backend_rows(facts):
        backends.add_row(operation, device, chosen, reasons)
    console.print(backends)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show versions, devices, and which backend each operation would use, and why.

    Exit status 1 if some operation has no usable backend.

    \b
    Examples:
      flashgau doctor
      flashgau doctor --json | python -m json.tool
    """
    facts = collect()
    if as_json:
        print(dump_json(facts))
    else:
        show(facts)
    if not healthy(facts):
        raise typer.Exit(FAILURE)
