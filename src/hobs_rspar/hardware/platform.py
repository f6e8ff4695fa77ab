"""The device that is measured: which one, its fingerprint, and a short name for it.

A fingerprint holds what a timing depends on and what stays the same between two runs; it names the hardware and the
software, never the machine. Timings of different fingerprints are never compared.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from hobs_rspar.errors import UserError

CPUINFO = Path("/proc/cpuinfo")
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
# Instruction sets that decide which kernels PyTorch's CPU libraries choose.
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
                    "amx_int8", "asimd", "asimddp", "sve", "bf16")


def fingerprint(device: torch.device, threads: int) -> dict:
    """What a timing depends on, without anything that names the machine.

    Args:
        device: the measured device.
        threads: CPU threads that PyTorch may use.

    Returns:
        JSON-ready: kind, device, cores, threads, os, python, torch, and the device's own keys.
    """
    model, flags = _cpu()
    common = {"kind": device.type, "device": model, "cores": os.cpu_count() or 1, "threads": threads, "os": _os(),
              "python": platform.python_version(), "torch": torch.__version__}
    return common | (_cuda(device) if device.type == "cuda" else _cpu_details(flags))


def slug(fingerprint: dict) -> str:
    """File-safe name of a platform, such as ``cpu_intel_xeon_processor_2c_t1`` or ``cuda_nvidia_h200``."""
    name = re.sub(r"\((r|tm|c)\)|@.*$|\bcpu\b", " ", fingerprint["device"].lower())
    name = re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "unknown"
    if fingerprint["kind"] == "cuda":
        return f"cuda_{name}"
    return f"cpu_{name}_{fingerprint['cores']}c_t{fingerprint['threads']}"


def require_platform(wanted: str | None, here: str) -> str:
    """The platform whose timings are meant, which must be this machine.

    Args:
        wanted: ``params.benchmark.platform``; None means this machine.
        here: this machine's own slug.

    Raises:
        UserError: another platform is wanted.
    """
    if wanted not in (None, here):
        raise UserError(f"params.yaml: benchmark.platform is '{wanted}', but this machine is '{here}'. Set it to null "
                        f"(this machine) or to {here}, or run the benchmark on {wanted}; existing timings of "
                        "other platforms are kept")
    return here


def readings(device: torch.device) -> dict:
    """What varies from moment to moment and is recorded, never set: clock in MHz, and a GPU's power and temperature."""
    if device.type != "cuda":
        clock = re.search(r"^cpu MHz\s*:\s*([\d.]+)", _text(CPUINFO), re.MULTILINE)
        return {"clock_mhz": float(clock[1]) if clock else None}
    nvml, handle = nvml_handle(device)
    if nvml is None:
        return {}
    queries = {"clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
               "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
               "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
               "throttle_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)}
    return {key: _ask(nvml, query) for key, query in queries.items()}


def nvml_handle(device: torch.device):
    """NVIDIA's management library and the handle of ``device``, or (None, the reason why not).

    The device is found by its UUID, because CUDA and the management library may number devices differently.
    """
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(name)
    except (pynvml.NVMLError, AttributeError) as problem:
        return None, f"NVML does not answer ({problem})"


def power_cap_watts(device: torch.device) -> float | None:
    """A GPU's enforced power limit in watts; None where it cannot be read."""
    nvml, handle = nvml_handle(device) if device.type == "cuda" else (None, None)
    if nvml is None:
        return None
    limit = _ask(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return None if limit is None else limit / 1e3


def _ask(nvml, query):
    """The answer of an NVML query, None where the device does not support it."""
    try:
        return query()
    except nvml.NVMLError:
        return None


def _cuda(device: torch.device) -> dict:
    properties, cap = torch.cuda.get_device_properties(device), power_cap_watts(device)
    nvml, handle = nvml_handle(device)
    driver = _ask(nvml, nvml.nvmlSystemGetDriverVersion) if nvml else None
    clock = _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)) if nvml else None
    return {"device": properties.name, "host_cpu": _cpu()[0], "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1), "driver": driver, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "max_clock_mhz": clock, "power_cap": None if cap is None else f"{cap:g} W"}


def _cpu_details(flags: set[str]) -> dict:
    clock = _text(CPUFREQ).strip()
    return {"instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
            "torch_kernels": torch.backends.cpu.get_cpu_capability(), "driver": None, "cuda": None,
            "max_clock_mhz": int(clock) / 1e3 if clock.isdigit() else None, "power_cap": None}


def _cpu() -> tuple[str, set[str]]:
    """Model name and feature flags of the CPU."""
    text = _text(CPUINFO)
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine() or "unknown"
    return name, set(flags[1].split()) if flags else set()


def _os() -> str:
    """Operating system and architecture, without the kernel's build, which can name a provider."""
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        system = platform.system()
    return f"{system} {platform.machine()}"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
