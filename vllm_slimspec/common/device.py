"""The name of a device in result files."""

from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return the name of a device for result files; of a CPU, with this process's threads and the instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
