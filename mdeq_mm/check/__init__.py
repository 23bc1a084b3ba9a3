"""``python -m mdeq_mm.check``: what is installed, doubled or missing, and the command to fix it.

It answers in a broken environment as well, so nothing is imported here that could be missing.
"""

import importlib

from ..compat import (
    PACKAGES,
    Package,
    can_import,
    find_problem,
    has_openmmlab,
    has_operators,
    installed_of,
    installed_version,
    operators_command,
)
from ..version import __version__

# What needs the packages that the configs of this project use.
_USED_FOR = {
    'mmengine': 'mdeq_mm itself',
    'mmcv': 'mdeq_mm itself',
    'mmseg': 'segmentation configs',
    'mmpretrain': 'classification configs',
    'mmdet': 'detection configs',
}


def _state(package: Package) -> str:
    names = installed_of(package)
    found = ', '.join(f'{name} {installed_version(name)}' for name in names)
    if len(names) > 1:
        return f'{found}: doubled'
    if not can_import(package.module):
        found += ', its files are gone: ' if names else ''
        return f'{found}missing, needed by {_USED_FOR[package.module]}'
    if not names:
        found = 'found, without a record of its distribution'
    if package.module == 'mmcv' and not has_operators():
        found += ', without compiled operators'
    return found


def table() -> list[str]:
    """A line for each package: its distribution and version, or that it is missing."""
    rows = [('mdeq_mm', __version__)]
    for name in ('torch', 'torchvision', 'numpy'):
        rows.append((name, installed_version(name) or 'missing'))
    rows += [(package.module, _state(package)) for package in PACKAGES]
    return [f'{name:<12}{state}' for name, state in rows]


def optional_commands() -> list[str]:
    """How to get what some configs need and this environment lacks."""
    lines = []
    upstream = any(not n.startswith('onedl-') for p in PACKAGES for n in installed_of(p))
    present = [package for package in PACKAGES if can_import(package.module)]
    for package in PACKAGES:
        if package not in present and not package.required:
            wanted = package.upstream[0] if upstream else package.onedl
            lines.append(f'To use {_USED_FOR[package.module]}: pip install {wanted}')
    # The forks' mmsegmentation does without the operators.
    needy = [p for p in present if p.module == 'mmdet' or (upstream and p.module == 'mmseg')]
    if needy and not has_operators():
        lines.append(
            f"{' and '.join(p.module for p in needy)} cannot be used without mmcv's compiled "
            f'operators. It compiles, for up to an hour a core: {operators_command()}'
        )
    return lines


def import_error() -> tuple[str, Exception] | None:
    """The first module that cannot be imported though it is there, and what it says."""
    optional = [p.module for p in PACKAGES if not p.required and can_import(p.module)]
    parts = [f'mdeq_mm.{part}' for part in ('hooks', 'layers', 'models')]
    for module in ('numpy', 'torch', 'mmengine', 'mmcv', *parts, *optional):
        try:
            importlib.import_module(module)
        except Exception as error:  # some check versions by assert
            # What failed inside the package, rather than its advice to run this check.
            return module, error.__cause__ or error if module in parts else error
    return None


def main() -> int:
    """Print the report.

    Returns:
        0 if mdeq_mm can be used, 1 if not.
    """
    print('\n'.join(table()))
    problem = find_problem()
    if problem:
        print(f'\n{problem.what}.\nMend it with: {problem.command}')
        if not has_openmmlab() and can_import('torch'):
            print('Without them mdeq_mm.deq works, the solvers and gradients for any f of torch.')
        return 1
    failed = import_error()
    if failed:
        module, error = failed
        print(f'\n{module} is there but cannot be imported: {type(error).__name__}: {error}')
        return 1
    for line in optional_commands():
        print(line)
    return 0
