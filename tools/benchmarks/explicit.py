"""Of suite step: MDEQ beside the explicit net that one would take in its place, time and memory."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mdeq_mm.optim import has_bfloat16

import torch
from memory import peak_memory
from nets import LARGE, SMALL, backbone, hrnet_w18, resnet101, train_step
from timing import Result, Step, interleaved
from torch import nn


@dataclass(frozen=True)
class Pair:
    """An explicit net and an MDEQ for the same work.

    Attributes:
        name: Of the explicit net.
        explicit: Builds it on a device.
        options: Of :func:`nets.backbone`.
        size: (H, W) of the images; None for ``--crop``.
        rows: Further options by what to call the MDEQ with them.
    """

    name: str
    explicit: Callable[[str], nn.Module]
    options: dict[str, Any]
    size: tuple[int, int] | None
    rows: dict[str, dict[str, Any]]


PHANTOM = dict(type='PhantomGradient', steps=3)
PAIRS = dict(
    large=Pair(
        'ResNet-101 (mmpretrain)',
        resnet101,
        LARGE,
        (32, 32),
        {
            'MDEQ-large, 18 and 20 evaluations': dict(nfe=(18, 20)),
            'MDEQ-large, 8 and 7': dict(nfe=(8, 7)),
            'MDEQ-large, 8, phantom gradient of 3': dict(nfe=8, gradient=PHANTOM),
        },
    ),
    cityscapes=Pair(
        'HRNet-W18 (mmseg)',
        hrnet_w18,
        SMALL,
        None,
        {
            'MDEQ-small, 27 and 30 evaluations': dict(nfe=(27, 30)),
            'MDEQ-small, 10, phantom gradient of 3': dict(nfe=10, gradient=PHANTOM),
        },
    ),
)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time a training step of both nets in turn, and its peak memory in a process of its own."""
    pair = PAIRS[args.net]
    size = pair.size or args.crop
    shape = (args.batch, 3, *size)
    low = {'': None, **({', bf16': torch.bfloat16} if has_bfloat16(args.device) else {})}
    cases = {
        row + suffix: (args.net, row, shape, args.device, dtype)
        for suffix, dtype in low.items()
        for row in (pair.name, *pair.rows)
    }
    steps = {name: build(*case) for name, case in cases.items()}
    samples = interleaved(steps, args.repeats, args.device)
    caption = f'training step, {args.batch} x {size[0]}x{size[1]}'
    time = Result.of(samples, pair.name, caption)
    print(f'\n{time}')
    peaks = {name: [peak_memory(args.device, build, *case) / 2**20] for name, case in cases.items()}
    memory = Result.of(
        peaks, pair.name, f'peak memory of that step over its start, {caption}', 'MB'
    )
    print(f'\n{memory}')
    return dict(time.to_dict(), memory=memory.to_dict())


def build(
    net: str, row: str, shape: tuple[int, ...], device: str, dtype: torch.dtype | None
) -> Step:
    """The training step of a row of a pair."""
    pair = PAIRS[net]
    module = (
        pair.explicit(device)
        if row == pair.name
        else backbone(device, **pair.options, **pair.rows[row])
    )
    return train_step(module, torch.randn(*shape, device=device), dtype)
