"""Suite gpu: a training step by memory format, kernel, precision and compilation."""

import argparse
import gc
import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from memory import PeakMemory
from nets import LARGE, TINY, Torchdeq, backbone, resnet101, train_step
from timing import timed
from torch import Tensor, nn
from worker import Worker

REPORT_SUFFIX = '.md'
PRECISIONS = dict(float32=None, bf16=torch.bfloat16, fp16=torch.float16)
# Options, and evaluations of f in the forward and in the backward pass: the exact gradient of the
# paper's recipes, and those of Jacobian regularization.
NETS = dict(
    tiny=(TINY, ((24, 24),)),
    large=(LARGE, ((18, 20), (8, 7))),
)
RESNET = 'ResNet-101'
# The first steps compile, build caches and choose algorithms.
WARM_UP = dict(cuda=3, cpu=1)
# Seconds for one row. Compilation takes most of it.
LIMIT = 600
HEAD = (
    *('net', 'code', 'layout', 'norms', 'precision', 'compiled', 'ms', 'median'),
    *(f'time / {RESNET}', 'peak MB', f'memory / {RESNET}', 'note'),
)


@dataclass(frozen=True)
class Row:
    """One way to run a training step.

    Attributes:
        net: A key of ``NETS``, or ``RESNET``.
        nfe: Evaluations of f in the forward and in the backward pass; None for ``RESNET``.
        code: Whose solver runs, ``'mdeq_mm'`` or ``'torchdeq'``; ``'mmpretrain'`` for ``RESNET``.
        channels_last: Memory format.
        kernel: ``norm_kernel`` of the backbone; None for ``RESNET``.
        precision: A key of ``PRECISIONS``.
        compiled: ``compile_cell`` of the backbone; for ``RESNET`` the whole net.
    """

    net: str
    nfe: tuple[int, int] | None
    code: str
    channels_last: bool
    kernel: str | None
    precision: str
    compiled: bool

    def cells(self) -> list[str]:
        """The cells of the table before the numbers."""
        return [
            self.net if self.nfe is None else f'{self.net} {self.nfe[0]}+{self.nfe[1]}',
            self.code,
            'channels last' if self.channels_last else 'contiguous',
            self.kernel or '–',
            self.precision,
            'yes' if self.compiled else 'no',
        ]

    @property
    def name(self) -> str:
        """The name that ``--only`` is matched against."""
        *cells, compiled = self.cells()
        return ', '.join([*cells, *(['compiled cell'] if self.compiled else [])])


def rows(nfe: int) -> list[Row]:
    """All that is measured, each pass with at most ``nfe`` evaluations of f."""
    layouts, flags, found = (False, True), (False, True), []
    for layout, precision, compiled in itertools.product(layouts, PRECISIONS, flags):
        found.append(Row(RESNET, None, 'mmpretrain', layout, None, precision, compiled))
    for net, (_, counts) in NETS.items():
        for forward, backward in counts:
            spent = min(forward, nfe), min(backward, nfe)
            for layout, precision in itertools.product(layouts, PRECISIONS):
                for kernel, compiled in itertools.product(('native', 'compiled'), flags):
                    found.append(Row(net, spent, 'mdeq_mm', layout, kernel, precision, compiled))
                found.append(Row(net, spent, 'torchdeq', layout, 'native', precision, False))
    # Two budgets of a net coincide where nfe limits both.
    return list(dict.fromkeys(found))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time each row by itself, in a process that may crash.

    The files are written after each row. Rows measured earlier with the same versions on the same
    card are kept.
    """
    path = Path(args.out, 'gpu.json')
    settings = dict(
        environment=report.environment(args.device), batch=args.batch, most_evaluations=args.nfe
    )
    results = _measured_before(path, settings)
    chosen = [row for row in rows(args.nfe) if args.only.search(row.name)]
    if importlib.util.find_spec('torchdeq') is None:
        print('  torchdeq is not installed (pip install torchdeq): left out')
        chosen = [row for row in chosen if row.code != 'torchdeq']
    if not chosen:
        raise SystemExit(f'--only {args.only.pattern!r} matches no row, as "{rows(24)[-1].name}"')
    with Worker() as worker:
        for number, row in enumerate(chosen, 1):
            work = row, args.device, args.batch, args.repeats
            numbers, error = worker.run(measure_row, *work, limit=LIMIT)
            results[row.name] = dict(cells=row.cells(), **(numbers or dict(error=error)))
            print(
                f'  {number} of {len(chosen)}: {row.name}: {_said(results[row.name])}', flush=True
            )
            report.write(dict(settings, rows=results), path)
            paint(dict(settings, rows=results), path.with_suffix(REPORT_SUFFIX))
    return dict(settings, rows=results)


def measure_row(row: Row, device: str, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of each of ``repeats`` steps and peak memory of one, in bytes over its start.

    On a CPU no peak is measured: the allocator keeps memory that earlier rows freed.
    """
    # Left over from the last row.
    gc.collect()
    torch._dynamo.reset()
    if device == 'cuda':
        torch.cuda.empty_cache()
    x = torch.randn(batch, 3, 32, 32, device=device)
    net, x = build(row, x)
    step = train_step(net, x, PRECISIONS[row.precision])
    for _ in range(WARM_UP[device]):
        step()
    peak = None
    if device == 'cuda':
        with PeakMemory(device) as memory:
            step()
        peak = memory.peak
    seconds = [timed(step, device) for _ in range(repeats)]
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    finite = all(bool(torch.isfinite(grad).all()) for grad in grads)
    return dict(seconds=seconds, peak=peak, finite=finite)


def build(row: Row, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The network of a row and its input, (N, 3, H, W)."""
    device = x.device.type
    if row.net == RESNET:
        layout = torch.channels_last if row.channels_last else torch.contiguous_format
        net = resnet101(device).to(memory_format=layout)
        return torch.compile(net) if row.compiled else net, x.contiguous(memory_format=layout)
    options, _ = NETS[row.net]
    net = backbone(
        device,
        row.nfe,
        channels_last=row.channels_last,
        norm_kernel=row.kernel,
        compile_cell=row.compiled,
        **options,
    )
    return (Torchdeq(net, row.nfe, 'broyden', ift=True) if row.code == 'torchdeq' else net), x


def _measured_before(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of the file, if they were measured with the same settings."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    results = before.pop('rows', {})
    if _without_load(before) == _without_load(settings):
        return results
    print(f'  {path} is of another card, version or size: replaced')
    return {}


def _without_load(settings: dict[str, Any]) -> dict[str, Any]:
    environment = dict(settings.get('environment', {}), load=None)
    return dict(settings, environment=environment)


def _said(result: dict[str, Any]) -> str:
    if 'error' in result:
        return f'failed: {result["error"]}'
    return f'{min(result["seconds"]) * 1e3:.4g} ms, {_megabytes(result["peak"])} MB'


def _megabytes(count: int | None) -> str:
    return '–' if count is None else f'{count / 2**20:.4g}'


def paint(result: dict[str, Any], path: Path) -> None:
    """Write the table, as Markdown."""
    environment, measured = result['environment'], list(result['rows'].values())
    about = [f'torch {environment["torch"]}', f'batch {result["batch"]}', '32×32 pixels']
    if environment['device'] == 'cuda':
        about.insert(1, f'CUDA {environment["cuda"]}')
        about.append(f'convolutions of float32 in {"TF32" if environment["tf32"] else "float32"}')
    lines = [
        f'# Training step on {environment["name"]}',
        '',
        f'{", ".join(about)}. Fastest step and median; peak memory of a step over its start; both '
        f'over those of the fastest {RESNET} in the same precision.',
        '',
        _line(HEAD),
        _line('---' for _ in HEAD),
    ]
    bases = _bases(measured)
    for row in measured:
        base = bases.get(row['cells'][HEAD.index('precision')])
        lines.append(_line([*row['cells'], *_numbers(row, base)]))
    path.write_text('\n'.join(lines) + '\n')


def _bases(measured: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fastest ResNet-101 by precision."""
    of_resnet = [row for row in measured if row['cells'][0] == RESNET and 'error' not in row]
    of_resnet.sort(key=lambda row: -min(row['seconds']))
    return {row['cells'][HEAD.index('precision')]: row for row in of_resnet}


def _numbers(row: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    """The cells of the numbers, including those relative to ``base``, and the note."""
    if 'error' in row:
        return ['failed', *['–'] * 4, row['error']]
    least, peak = min(row['seconds']), row['peak']
    slower = '–' if base is None else f'{least / min(base["seconds"]):.2f}'
    larger = '–' if base is None or not peak else f'{peak / base["peak"]:.2f}'
    times = f'{least * 1e3:.4g}', f'{median(row["seconds"]) * 1e3:.4g}'
    note = '' if row['finite'] else 'gradients not finite'
    return [*times, slower, _megabytes(peak), larger, note]


def _line(cells: Any) -> str:
    return '| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in cells) + ' |'
