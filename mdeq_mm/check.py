"""``python -m mdeq_mm.check``: what of the stack is installed, what is missing, how to get it.

A broken stack (missing, doubled, mixed) already stops the import of the package, with the same
kind of message.
"""

from typing import List

from . import __version__
from .compat import PACKAGES, Package, can_import, installed_of, installed_version

# Of the packages that need not be there, those that the configs of this project use.
_USED_FOR = {'mmseg': 'segmentation configs', 'mmpretrain': 'classification configs'}


def _line(package: Package) -> str:
    names = installed_of(package)
    if names:
        return f'{package.module:<12}{", ".join(f"{n} {installed_version(n)}" for n in names)}'
    if can_import(package.module):
        return f'{package.module:<12}found, without a record of its distribution'
    return f'{package.module:<12}missing: needed by {_USED_FOR[package.module]}'


def report() -> List[str]:
    """The lines that :func:`main` prints."""
    lines = [f'{"mdeq_mm":<12}{__version__}']
    lines += [f'{name:<12}{installed_version(name)}' for name in ('torch', 'torchvision', 'numpy')]
    missing = [p for p in PACKAGES if not can_import(p.module)]
    lines += [_line(p) for p in PACKAGES if p not in missing or p.module in _USED_FOR]
    upstream = any(not n.startswith('onedl-') for p in PACKAGES for n in installed_of(p))
    for package in (p for p in missing if p.module in _USED_FOR):
        wanted = package.upstream[0] if upstream else package.onedl
        lines.append(f'To use {_USED_FOR[package.module]}: pip install {wanted}')
    return lines


def main() -> None:
    """Print the report."""
    print('\n'.join(report()))


if __name__ == '__main__':
    main()
