"""The output of a suite: its numbers, what they depend on, and a chart."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import mdeq_mm

import mmcv
import mmengine
import torch


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    settings = dict(
        device=device,
        name=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        torch=torch.__version__,
        mmengine=mmengine.__version__,
        mmcv=mmcv.__version__,
        mdeq_mm=mdeq_mm.__version__,
    )
    if device == 'cuda':
        settings.update(
            name=torch.cuda.get_device_name(),
            cuda=torch.version.cuda,
            # For convolutions: by default cuDNN rounds float32 to TF32.
            tf32=torch.backends.cudnn.allow_tf32,
        )
    return settings


def write(result: dict[str, Any], path: Path) -> None:
    """Write numbers as JSON. If the process is stopped meanwhile, the old file stays intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(result, indent=2))
    part.replace(path)


def paint(result: dict[str, Any], path: Path) -> None:
    """Write a bar chart of the ratios."""
    # Imported here: suites without a chart do not need matplotlib.
    from matplotlib.figure import Figure

    ratios = result['ratio']
    figure = Figure(figsize=(7, 0.4 * len(ratios) + 1.2), layout='constrained')
    plot = figure.subplots()
    bars = plot.barh(list(ratios)[::-1], list(ratios.values())[::-1])
    plot.bar_label(bars, fmt='%.2f', padding=3)
    plot.axvline(1, color='black', linewidth=0.8)
    plot.margins(x=0.12)
    plot.set_xlabel(f'{result["caption"]}; {result["base"]} = 1')
    figure.savefig(path, dpi=120)
