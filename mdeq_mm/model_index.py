"""Adds the classification models of this project to mmpretrain's model hub."""

from pathlib import Path


def config_root() -> Path:
    """The folder that holds ``configs/``: in a wheel ``mdeq_mm/.mim``, else the repository.

    Raises:
        FileNotFoundError: If neither contains the metafile.
    """
    package = Path(__file__).resolve().parent
    for root in (package / '.mim', package.parent):
        if (root / 'configs' / 'metafile.yml').is_file():
            return root
    raise FileNotFoundError(
        f'no configs/metafile.yml in {package / ".mim"} or {package.parent}: install mdeq_mm from '
        'its repository, by "pip install ." or "pip install -e ."'
    )


def register_models() -> None:
    """Add the models to ``mmpretrain.list_models`` and ``mmpretrain.get_model``.

    A model has the name of its config: ``mdeq_small_imagenet`` for
    ``configs/mdeq_small_imagenet.py``. There are no weights for them: pass your own,
    ``get_model(name, pretrained=CHECKPOINT)``. Calling this again has no effect.

    Raises:
        ModuleNotFoundError: If mmpretrain is not installed.
    """
    # Imported here because the package itself depends on neither mmpretrain nor mmsegmentation.
    from mmpretrain.apis import ModelHub

    if not ModelHub.has('mdeq_small_imagenet'):
        root = config_root()
        ModelHub.register_model_index(root / 'configs' / 'metafile.yml', config_prefix=root)
