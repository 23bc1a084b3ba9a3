"""Which OpenMMLab packages are installed, and whether they work together.

Two families of distributions give the same import names: upstream OpenMMLab (``mmengine``,
``mmcv``, ...) and the OneDL forks (``onedl-mmengine``, ``onedl-mmcv``, ...). Whichever is
installed second overwrites the files of the first, so one environment must hold one family only.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """An OpenMMLab import name and the distributions that can provide it."""

    module: str
    onedl: str
    # The first is the one to install, given as a requirement; the others are variants of it.
    upstream: tuple[str, ...]
    required: bool

    @property
    def distributions(self) -> tuple[str, ...]:
        """Names of all distributions that can provide the module."""
        upstream = [re.split(r'[<>=!~ ]', name, maxsplit=1)[0] for name in self.upstream]
        return self.onedl, *upstream


PACKAGES = (
    Package('mmengine', 'onedl-mmengine', ('mmengine', 'mmengine-lite'), True),
    Package('mmcv', 'onedl-mmcv', ('mmcv<2.2', 'mmcv-lite', 'mmcv-full'), True),
    Package('mmseg', 'onedl-mmsegmentation', ('mmsegmentation',), False),
    Package('mmpretrain', 'onedl-mmpretrain', ('mmpretrain',), False),
    Package('mmdet', 'onedl-mmdetection', ('mmdet',), False),
)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_of(package: Package) -> list[str]:
    """The installed distributions that provide ``package.module``; more than one is a conflict."""
    return [name for name in package.distributions if installed_version(name) is not None]


def can_import(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # an import hook refuses it; a stand-in without a spec
        return False


def has_openmmlab() -> bool:
    """Whether mmengine or mmcv, which this package needs, can be imported."""
    return any(can_import(package.module) for package in PACKAGES if package.required)


def has_operators() -> bool:
    """Whether the installed mmcv holds its compiled operators; it is not imported."""
    spec = importlib.util.find_spec('mmcv') if can_import('mmcv') else None
    folders = spec.submodule_search_locations if spec else None
    return any(next(Path(folder).glob('_ext*'), None) for folder in folders or ())


def operators_command() -> str:
    """The command that rebuilds the installed mmcv with its operators.

    Without ``--no-build-isolation`` the build does not see torch and silently leaves them out.
    """
    (package,) = [package for package in PACKAGES if package.module == 'mmcv']
    wanted = package.onedl if package.onedl in installed_of(package) else package.upstream[0]
    return (
        f'pip install "setuptools<81" wheel && MMCV_WITH_OPS=1 pip install --no-build-isolation '
        f'--no-deps --no-cache-dir --force-reinstall --no-binary :all: "{wanted}"'
    )


def _install_command(packages: list[Package], onedl: bool) -> str:
    wanted = [package.onedl if onedl else package.upstream[0] for package in packages]
    return 'pip install ' + ' '.join(f'"{name}"' if '<' in name else name for name in wanted)


class Problem(NamedTuple):
    """What is wrong with the installed stack, and the one command that fixes it."""

    what: str
    command: str


def _clash(found: dict[Package, list[str]]) -> Problem | None:
    """What is doubled or mixed among the installed distributions."""
    doubled = [names for names in found.values() if len(names) > 1]
    everything = [name for names in found.values() for name in names]
    onedl = [name for name in everything if name.startswith('onedl-')]
    upstream = [name for name in everything if not name.startswith('onedl-')]
    if doubled:
        what = '; '.join(f'{" and ".join(names)} overwrite each other' for names in doubled)
    elif onedl and upstream:
        what = (
            f'{", ".join(onedl)} (OneDL) and {", ".join(upstream)} (upstream OpenMMLab) '
            'are two families that do not work together'
        )
    else:
        return None
    # Distributions that share files are both removed and one is reinstalled: removing one deletes
    # files of the other.
    wrong = {p: n for p, n in found.items() if len(n) > 1 or (onedl and set(n) & set(upstream))}
    gone = [name for names in wrong.values() for name in names]
    install = _install_command(list(wrong), onedl=bool(onedl))
    return Problem(what, f'pip uninstall -y {" ".join(gone)} && {install}')


def find_problem() -> Problem | None:
    """What keeps the installed stack from working; None if nothing does. Imports none of it.

    mmseg and mmpretrain are needed only by configs that name their classes, so their absence is not
    a problem here; ``python -m mdeq_mm.check`` lists it.
    """
    found = {package: installed_of(package) for package in PACKAGES}
    clash = _clash(found)
    if clash:
        return clash
    absent = [name for name in ('numpy', 'torch') if not can_import(name)]
    if absent:
        return Problem(f'mdeq_mm needs {" and ".join(absent)}', f'pip install {" ".join(absent)}')
    missing = [package for package in PACKAGES if package.required]
    missing = [package for package in missing if not can_import(package.module)]
    if not missing:
        return None
    names = [name for names in found.values() for name in names]
    # The family that is already installed decides; the default is OneDL.
    upstream = any(not name.startswith('onedl-') for name in names)
    # A distribution on record whose files are gone: plain "pip install" would do nothing.
    hollow = [name for package in missing for name in found[package]]
    command = _install_command(missing, onedl=not upstream)
    if hollow:
        command = f'pip uninstall -y {" ".join(hollow)} && {command}'
    modules = ' and '.join(package.module for package in missing)
    return Problem(
        f'mdeq_mm needs {modules}, which cannot be imported here '
        f'(installed: {", ".join(names) or "no OpenMMLab package"})',
        command,
    )


def check_stack() -> None:
    """Check that exactly one OpenMMLab stack is installed, without importing it.

    Raises:
        ImportError: Something is missing, doubled or mixed; the message names it and gives the one
            command that fixes it.
    """
    problem = find_problem()
    if problem:
        raise ImportError(
            'mdeq_mm cannot use this environment (python -m mdeq_mm.check lists it): '
            f'{problem.what}. Fix it with: {problem.command}',
            name='mdeq_mm',
        )
