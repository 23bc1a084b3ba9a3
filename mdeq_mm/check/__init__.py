"""``python -m mdeq_mm.check``: what is installed, doubled or missing, and the command to fix it.

It also works in a broken environment, so nothing that could be missing is imported here.
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

# What each package is needed for.
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
    """One line for each package: its distribution and version, or that it is missing."""
    rows = [('mdeq_mm', __version__)]
    for name in ('torch', 'torchvision', 'numpy'):
        rows.append((name, installed_version(name) or 'missing'))
    rows += [(package.module, _state(package)) for package in PACKAGES]
    return [f'{name:<12}{state}' for name, state in rows]


def optional_commands() -> list[str]:
    """Commands that install what some configs need and this environment lacks."""
    lines = []
    upstream = any(not n.startswith('onedl-') for p in PACKAGES for n in installed_of(p))
    present = [package for package in PACKAGES if can_import(package.module)]
    for package in PACKAGES:
        if package not in present and not package.required:
            wanted = package.upstream[0] if upstream else package.onedl
            lines.append(f'To use {_USED_FOR[package.module]}: pip install {wanted}')
    # The forks' mmsegmentation does not need the operators.
    needy = [p for p in present if p.module == 'mmdet' or (upstream and p.module == 'mmseg')]
    if needy and not has_operators():
        lines.append(
            f"{' and '.join(p.module for p in needy)} cannot be used without mmcv's compiled "
            f'operators. Compiling them takes up to an hour on one core: {operators_command()}'
        )
    return lines


def import_error() -> tuple[str, Exception] | None:
    """The first module that is installed but cannot be imported, and its error."""
    optional = [p.module for p in PACKAGES if not p.required and can_import(p.module)]
    parts = [f'mdeq_mm.{part}' for part in ('hooks', 'layers', 'models')]
    for module in ('numpy', 'torch', 'mmengine', 'mmcv', *parts, *optional):
        try:
            importlib.import_module(module)
        except Exception as error:  # some packages check versions by assert
            # The cause inside the package, not its advice to run this check.
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
        print(f'\n{problem.what}.\nFix it with: {problem.command}')
        if not has_openmmlab() and can_import('torch'):
            print('mdeq_mm.deq works without them: solvers and gradients for any f in PyTorch.')
        return 1
    failed = import_error()
    if failed:
        module, error = failed
        print(f'\n{module} is installed but cannot be imported: {type(error).__name__}: {error}')
        return 1
    for line in optional_commands():
        print(line)
    return 0
