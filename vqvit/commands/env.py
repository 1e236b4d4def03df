"""Show versions, devices, instruction sets, and which backends can run here and why not."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # no options of its own


def run(arguments: argparse.Namespace) -> dict:
    del arguments
    import torch

    from vqvit import backends, provenance
    from vqvit.backends import cpu
    from vqvit.kernels import devices as gpus

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {
        **provenance.environment("cpu"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": [
            {"device": d, "name": provenance.device_name(d), "backend": backends.selected(torch.device(d))}
            for d in devices
        ],
        "cpu_kernels": [] if cpu.unavailable() else list(cpu.available_isas()),
        "gpu_support": [
            gpus.support(torch.cuda.get_device_capability(index)) for index in range(torch.cuda.device_count())
        ],
        "backends": [{"name": name, "unavailable": backends.unavailable(name)} for name in backends.NAMES],
    }


def to_text(result: dict) -> str:
    from vqvit.report import text_table

    shown = [
        [key, ", ".join(value) or "–" if isinstance(value, list) else str(value if value is not None else "–")]
        for key, value in result.items()
        if key not in ("devices", "backends", "command", "date", "backend", "device")
    ]
    devices = [[d["device"], d["name"], d["backend"]] for d in result["devices"]]
    backends = [[b["name"], b["unavailable"] or "yes"] for b in result["backends"]]
    width = max(len(row[0]) for row in shown)
    return "\n".join(
        [
            *(f"{key:{width}}  {value}" for key, value in shown),
            "",
            text_table(["device", "name", "backend in use"], devices),
            "",
            text_table(["backend", "can run here"], backends),
        ]
    )
