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


def packaged_weights() -> dict[str, Path]:
    """The weights that come with the package, by the name of their config."""
    folder = Path(__file__).resolve().parent / 'weights'
    return {path.stem: path for path in sorted(folder.glob('*.pth'))}


def register_models() -> None:
    """Add the models to ``mmpretrain.list_models`` and ``mmpretrain.get_model``.

    A model has the name of its config: ``mdeq_small_imagenet`` for
    ``configs/mdeq_small_imagenet.py``. ``get_model(name, pretrained=True)`` takes the weights that
    come with the package, where :func:`packaged_weights` has some; for other models pass your own,
    ``get_model(name, pretrained=CHECKPOINT)``. Calling this again has no effect.

    Raises:
        ModuleNotFoundError: If mmpretrain is not installed.
    """
    # Imported here because the package itself depends on neither mmpretrain nor mmsegmentation.
    from mmpretrain.apis import ModelHub

    if not ModelHub.has('mdeq_small_imagenet'):
        root = config_root()
        ModelHub.register_model_index(root / 'configs' / 'metafile.yml', config_prefix=root)
        # The hub makes paths of configs absolute, but not those of weights.
        for name, path in packaged_weights().items():
            if ModelHub.has(name):
                ModelHub._models_dict[name].weights = str(path)
