"""One run of a study: train, test at several evaluations of f, and write the results."""

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any

from mdeq_mm.apis import (
    build_runner,
    check_data,
    check_scales,
    find_resumable_checkpoint,
    fit_to_machine,
    load_config,
    one_line_errors,
    spectral_radii,
    sweep_evaluations,
)
from mdeq_mm.deq import implicit_layers

import torch
from _records import is_there, read_json, settings_of, write_json
from _studies import COUNTS, Row, Study
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
METRIC = 'accuracy/top1'
# Test images, evenly over the data set, on which the spectral radius is measured.
RADIUS_IMAGES = 50
PACKAGES = ('mdeq-mm', 'torch', 'mmengine', 'mmcv', 'mmpretrain', 'numpy')


class Times(Hook):
    """CPU seconds of each training iteration, with the loading of its images."""

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def before_train_epoch(self, runner: Runner) -> None:
        self._began = time.process_time()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        now = time.process_time()
        self.seconds.append(now - self._began)
        self._began = now


class History(Hook):
    """Keeps, for each epoch, loss, accuracy, and the CPU time that training has taken so far.

    The time is that of the process, of training epochs alone: neither validation nor checkpoints
    are in it, nor an epoch that was interrupted and is trained again.

    Args:
        path: The file for them, which a resumed run continues.
    """

    # Before checkpoints are saved.
    priority = 'VERY_HIGH'

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self._began = 0.0

    def before_train(self, runner: Runner) -> None:
        # An interrupted run may have gone beyond its last checkpoint.
        self.epochs = (read_json(self.path) or [])[: runner.epoch]
        if len(self.epochs) < runner.epoch:
            raise ValueError(
                f'{self.path} tells of {len(self.epochs)} epochs and the checkpoint beside it was '
                f'saved after {runner.epoch}: delete the folder to begin again'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        self._validate_the_last(runner)
        self._losses, self._began = [], time.process_time()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        self._losses.append(float(outputs['loss'].detach()))

    def after_train_epoch(self, runner: Runner) -> None:
        before = self.epochs[-1]['cpu_seconds'] if self.epochs else 0.0
        spent = time.process_time() - self._began
        loss = sum(self._losses) / len(self._losses)
        self.epochs.append(
            dict(epoch=runner.epoch + 1, loss=loss, cpu_seconds=before + spent, accuracy=None)
        )
        write_json(self.path, self.epochs)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.epochs[-1]['accuracy'] = metrics[METRIC]
        write_json(self.path, self.epochs)

    def after_train(self, runner: Runner) -> None:
        self._validate_the_last(runner)

    def _validate_the_last(self, runner: Runner) -> None:
        """Repeat a validation that was interrupted after its checkpoint was saved."""
        if self.epochs and self.epochs[-1]['accuracy'] is None:
            runner.val_loop.run()


def processor() -> str:
    """The machine's processor in its maker's words, where the system tells."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = dict(python=platform.python_version())
    for name in PACKAGES:
        for candidate in (name, f'onedl-{name}'):
            try:
                found[name] = version(candidate)
            except PackageNotFoundError:
                continue
    return found


def make_config(
    row: Row,
    settings: dict[str, Any],
    data_root: str | None,
    work_dir: Path,
    iterations: int | None = None,
) -> Config:
    """The config of a run, ready for a Runner.

    Args:
        row: The row.
        settings: Its settings.
        data_root: Folder of the images, instead of the config's.
        work_dir: Folder of the run's checkpoints and logs.
        iterations: If given, an epoch has at most so many, and nothing is validated or saved.

    Raises:
        FileNotFoundError: If the config or the images are missing.
        ValueError: If a checkpoint of an interrupted run cannot be used.
    """
    # A copy, because merging changes the options.
    options = json.loads(json.dumps(settings['options']))
    if data_root is not None:
        options['data_root'] = data_root
    cfg = load_config(str(CONFIGS / f'{row.config}.py'), str(work_dir), options=options)
    epochs = settings['epochs']
    cfg.train_cfg.max_epochs = epochs
    cfg.param_scheduler[0].update(T_max=epochs, end=epochs)
    cfg.randomness = dict(seed=settings['seed'])
    cfg.default_hooks.checkpoint.update(save_best=None, max_keep_ckpts=1)
    fit_to_machine(cfg)
    check_scales(cfg.model)
    check_data(cfg, ('train_dataloader', 'test_dataloader'), '--data-root FOLDER')
    if settings['holdout']:
        _hold_out(cfg, settings['holdout'])
    if iterations is not None:
        _shorten(cfg, iterations)
    if row.warmup_share:
        count = round(row.warmup_share * epochs * _iterations(cfg))
        cfg.default_hooks.warmup.update(unrolled_iters=count, softplus_iters=count)
    cfg.load_from = find_resumable_checkpoint(cfg.work_dir)
    cfg.resume = cfg.load_from is not None
    return cfg


def _images(dataset: dict[str, Any]) -> int:
    return len(DATASETS.build(dataset))


def _iterations(cfg: Config) -> int:
    """Iterations of an epoch."""
    return ceil(_images(cfg.train_dataloader.dataset) / cfg.train_dataloader.batch_size)


def _hold_out(cfg: Config, every: int) -> None:
    """Test on every n-th training image, and train on the others."""
    images = range(_images(cfg.train_dataloader.dataset))
    trained, kept = cfg.train_dataloader.dataset, cfg.train_dataloader.dataset.copy()
    trained['indices'] = [index for index in images if index % every]
    kept['indices'] = [index for index in images if index % every == 0]
    for name in ('val_dataloader', 'test_dataloader'):
        cfg[name].dataset = kept


def _shorten(cfg: Config, iterations: int) -> None:
    """Leave of each epoch the first iterations, and train only."""
    count = iterations * cfg.train_dataloader.batch_size
    cfg.train_dataloader.dataset.indices = [*range(_images(cfg.train_dataloader.dataset))][:count]
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)


def _some_of(settings: dict[str, Any]) -> DataLoader:
    """A loader of a few images, evenly over the data set, which is sorted by class."""
    dataset = dict(settings['dataset'])
    indices = dataset.get('indices') or range(_images(dataset))
    dataset['indices'] = [*indices[:: ceil(len(indices) / RADIUS_IMAGES)]]
    return Runner.build_dataloader(dict(settings, dataset=dataset), seed=0)


def test_equilibrium(runner: Runner) -> dict[str, Any]:
    """Accuracy and residual by evaluations of f, and the spectral radius; empty for an explicit
    net.

    The radius is measured where the solver is after the largest number of evaluations.
    """
    layers = implicit_layers(runner.model)
    if not layers:
        return {}
    cfg = runner.cfg
    loader = Runner.build_dataloader(cfg.test_dataloader, seed=0)

    def evaluator() -> Any:
        built = runner.build_evaluator(cfg.test_evaluator)
        built.dataset_meta = loader.dataset.metainfo
        return built

    rows = sweep_evaluations(runner.model, loader, evaluator, COUNTS)
    radii = spectral_radii(runner.model, _some_of(cfg.test_dataloader), evaluations=max(COUNTS))
    return dict(
        budget=layers[0].solver.max_iter,
        evaluations=[
            dict(evaluations=row['evaluations'], accuracy=row[METRIC], residual=row['residual'])
            for row in rows
        ],
        spectral_radius=dict(
            mean=float(radii.mean()), largest=float(radii.max()), images=len(radii)
        ),
    )


def run(
    study: Study,
    row: Row,
    seed: int,
    epochs: int,
    data_root: str | None,
    work_dir: Path,
    result: Path,
) -> dict[str, Any]:
    """Train and test one row with one seed, or continue an interrupted run.

    Args:
        study: The study.
        row: One of its rows.
        seed: Seed of weights, order and dropout.
        epochs: Epochs.
        data_root: Folder of the images, instead of the config's.
        work_dir: Folder of the run's checkpoints and logs.
        result: File to write.

    Returns:
        What the file holds.

    Raises:
        SystemExit: If config or images are not there, or ``work_dir`` holds a run of other
            settings.
    """
    settings = settings_of(study, row, seed, epochs)
    torch.set_num_threads(1)
    with one_line_errors('study.py'):
        kept = work_dir / 'settings.json'
        if not is_there(kept, settings, 'delete the folder, or name another by --work-dir'):
            write_json(kept, settings)
        cfg = make_config(row, settings, data_root, work_dir)
    runner = build_runner(cfg)
    history = History(work_dir / 'history.json')
    runner.register_hook(history)
    runner.train()
    content = dict(
        settings,
        title=row.title,
        parameters=sum(p.numel() for p in runner.model.parameters()),
        training_images=len(runner.train_dataloader.dataset),
        test_images=len(runner.val_dataloader.dataset),
        iterations=runner.max_iters,
        warmup_iterations=cfg.default_hooks.warmup.get('unrolled_iters', 0),
        accuracy=history.epochs[-1]['accuracy'],
        cpu_seconds=history.epochs[-1]['cpu_seconds'],
        **test_equilibrium(runner),
        history=history.epochs,
        processor=processor(),
        threads=torch.get_num_threads(),
        device=str(next(runner.model.parameters()).device),
        versions=versions(),
    )
    write_json(result, content)
    return content


def time_iterations(
    row: Row,
    settings: dict[str, Any],
    data_root: str | None,
    work_dir: Path,
    iterations: int,
) -> list[float]:
    """CPU seconds of each iteration of a short training, on one thread.

    As much of it is unrolled as of a whole one. Solvers take their whole budgets, which nets that
    have been trained for some time need.

    Returns:
        As many as ``iterations``, fewer if there are fewer images.

    Raises:
        SystemExit: If config or images are not there.
    """
    torch.set_num_threads(1)
    with one_line_errors('study.py'):
        cfg = make_config(row, settings, data_root, work_dir, iterations)
        cfg.log_level = 'ERROR'
    runner, times = build_runner(cfg), Times()
    for layer in implicit_layers(runner.model):
        layer.solver = layer.solver.replace(tol=0)
        if hasattr(layer.gradient, 'solver'):
            layer.gradient = layer.gradient.replace(solver=layer.gradient.solver.replace(tol=0))
    runner.register_hook(times)
    runner.train()
    return times.seconds
