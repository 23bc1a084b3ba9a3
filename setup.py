"""The parts of the set-up that are computed; the rest is in setup.cfg."""

import re
import shutil
from pathlib import Path
from typing import List

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def requirements(name: str) -> List[str]:
    """The requirements in ``requirements/<name>.txt``, those of files it includes too."""
    found = []
    for line in (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines():
        line = line.split('#')[0].strip()
        if line.startswith('-r '):
            found += requirements(Path(line[3:].strip()).stem)
        elif line:
            found.append(line)
    return found


def version() -> str:
    """Read from mdeq_mm/version.py: importing the package needs what is not installed yet."""
    return re.search(r"__version__ = '(.+)'", (ROOT / 'mdeq_mm/version.py').read_text()).group(1)


class BuildWithMim(build_py):
    """Puts configs and tools into a wheel where OpenMMLab's tools look: ``mdeq_mm/.mim``.

    They are copied into the build directory alone, so the working tree stays as it is. An editable
    install reads them from the working tree and needs no copy.
    """

    def run(self) -> None:
        """Build as usual, then add ``.mim``."""
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        mim = Path(self.build_lib) / 'mdeq_mm' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for folder in ('configs', 'tools'):
            if (ROOT / folder).is_dir():
                ignore = shutil.ignore_patterns('.*', '__pycache__', '*.pyc', '*.toml')
                shutil.copytree(ROOT / folder, mim / folder, ignore=ignore)
        if (ROOT / 'model-index.yml').is_file():
            shutil.copy(ROOT / 'model-index.yml', mim)


if __name__ == '__main__':
    setup(
        version=version(),
        # No OpenMMLab package here: which of the two families it is, is the user's choice.
        install_requires=requirements('runtime'),
        extras_require={
            'onedl': requirements('onedl'),
            'mim': requirements('mminstall'),
            'tests': requirements('tests'),
            'docs': requirements('docs'),
            'optional': requirements('optional'),
        },
        cmdclass={'build_py': BuildWithMim},
        zip_safe=False,
    )
