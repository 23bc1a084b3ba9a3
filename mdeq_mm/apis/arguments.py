"""Command-line arguments and errors that the tools share."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import DictAction

from ..compat import UnsafeCheckpointError


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, by which every setting of a config can be changed."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that win over the config and over the other flags, as '
        'model.backbone.solver.max_iter=18; lists as key="[a,b]" or key=a,b',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the tools that run a Runner, train.py and test.py."""
    parser.add_argument(
        '--work-dir', help='folder for logs and results (default: work_dirs/CONFIG)'
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='turn off pin_memory of the data loaders'
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes (default: %(default)s)',
    )
    # torchrun sets LOCAL_RANK; the older launcher passes one spelling or the other.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``: a GPU if there is one, else the CPU."""
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument(
        '--device', default=default, help='where to compute (default here: %(default)s)'
    )


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a wrong argument, file or setting into one line and exit status 1.

    Only for the preparation: an error raised by the training itself keeps its traceback.

    Args:
        program: Name of the tool, printed at the start of the line.
    """
    try:
        yield
    except (FileNotFoundError, ValueError, UnsafeCheckpointError) as error:
        sys.exit(f'{program}: {error}')
