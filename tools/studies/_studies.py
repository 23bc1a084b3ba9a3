"""The studies: which recipes and nets each compares, and on what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Options = Mapping[str, Any]

# Evaluations of f at which equilibria are tested; rows are trained with 8 or 18 of them.
COUNTS = (1, 2, 4, 6, 8, 12, 16, 18, 24, 40)


@dataclass(frozen=True)
class Row:
    """One row of a study, trained once for each seed.

    Args:
        title: What tables and plots call it.
        config: Stem of a file in configs/.
        options: Settings that win over the config, as ``--cfg-options`` do.
        warmup_share: Share of the iterations in which f is unrolled and smoothed (paper, §3.3).
        time_of: Two other rows. This one is trained for as many epochs as take the CPU time of the
            first of them, at what an epoch of the second takes.
    """

    title: str
    config: str
    options: Options = field(default_factory=dict)
    warmup_share: float = 0.0
    time_of: tuple[str, str] | None = None


@dataclass(frozen=True)
class Study:
    """What is compared with what.

    Args:
        title: One line on it.
        rows: Rows by name; the name is part of the names of files.
        epochs: Epochs of every row, unless the command line says otherwise.
        options: Settings of every row, over which its own win.
        seeds: Seeds of every row, likewise.
        holdout: If positive, every so many-th training image is kept out of the training and
            tested on, in place of the test set, which stays unseen.
        baseline: The row whose training time is 1 in the table.
    """

    title: str
    rows: Mapping[str, Row]
    epochs: int
    options: Options = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    holdout: int = 0
    baseline: str | None = None


# Half the time of float32 where a CPU has instructions for it. Equilibria are tested in float32.
BFLOAT16 = {'optim_wrapper.type': 'BFloat16OptimWrapper'}

# --- Training recipes of one net --------------------------------------------------------------

TINY = 'mdeq_tiny_cifar10_5k'
ANDERSON = dict(type='Anderson', max_iter=8, tol=1e-3, memory=5)
BROYDEN = dict(type='LimitedMemoryBroyden', max_iter=18, tol=1e-3, memory=5)
JACOBIAN_FREE = dict(type='JacobianFreeGradient')
# Published weights are 0.4 to 3, in 2 to 10 percent of the iterations. In 40 iterations on these
# images weight 1 in 10 percent of them takes |J|^2 / D from 0.6, where it is without, to 0.1, at no
# loss; three times the weight, or the share, takes it to 0.05 and slows the loss down.
PENALTY = dict(type='JacobianRegularizer', weight=1.0, probability=0.1)
WIDE, NARROW = (5, 20), (6, 12)


def phantom(steps: int) -> Options:
    """The gradient of a few damped layers."""
    return dict(type='PhantomGradient', steps=steps, damping=0.5)


def truncated(steps: int) -> Options:
    """The gradient of a few damped steps on the graph of one evaluation."""
    return dict(type='TruncatedGradient', steps=steps, damping=0.5)


def exact(solver: Options) -> Options:
    """The gradient of the implicit function theorem."""
    return dict(type='ImplicitGradient', solver=dict(solver))


def recipe(
    gradient: Options,
    solver: Options = ANDERSON,
    jitter: tuple[int, int] | None = None,
    regularizer: Options | None = None,
) -> Options:
    """Settings of an MDEQ that a recipe consists of."""
    if jitter is not None:
        solver = dict(solver, jitter=jitter)
    return {
        'model.backbone.solver': dict(solver, _delete_=True),
        'model.backbone.gradient': dict(gradient, _delete_=True),
        'model.backbone.regularizer': regularizer,
    }


RECIPES = Study(
    title='Training recipes of MDEQ-tiny: evaluations of f, gradients, varying budgets, penalty',
    epochs=6,
    options=BFLOAT16,
    baseline='paper',
    rows=dict(
        paper=Row(
            "the paper's: warm-up, 18 evaluations, exact gradient by 20",
            TINY,
            {
                **recipe(exact(dict(BROYDEN, max_iter=20)), BROYDEN),
                'default_hooks.warmup.unrolled_layers': 10,
            },
            # 3000 iterations of 50 epochs of 50,000 images in batches of 128.
            warmup_share=3000 / (50 * 391),
        ),
        few=Row('8 evaluations, exact gradient by 8', TINY, recipe(exact(ANDERSON))),
        phantom3=Row('8, phantom gradient of 3 layers', TINY, recipe(phantom(3))),
        phantom5=Row('8, phantom gradient of 5 layers', TINY, recipe(phantom(5))),
        jacobian_free=Row('8, Jacobian-free gradient', TINY, recipe(JACOBIAN_FREE)),
        narrow=Row('6 to 12, phantom 3', TINY, recipe(phantom(3), jitter=NARROW)),
        wide=Row('5 to 20, phantom 3', TINY, recipe(phantom(3), jitter=WIDE)),
        penalty=Row('8, phantom 3, penalty', TINY, recipe(phantom(3), regularizer=PENALTY)),
        narrow_penalty=Row(
            '6 to 12, phantom 3, penalty',
            TINY,
            recipe(phantom(3), jitter=NARROW, regularizer=PENALTY),
        ),
        wide_penalty=Row(
            '5 to 20, phantom 3, penalty',
            TINY,
            recipe(phantom(3), jitter=WIDE, regularizer=PENALTY),
        ),
        # Cheaper gradients with what keeps f contracting.
        wide_penalty_free=Row(
            '5 to 20, Jacobian-free, penalty',
            TINY,
            recipe(JACOBIAN_FREE, jitter=WIDE, regularizer=PENALTY),
        ),
        narrow_penalty_truncated=Row(
            '6 to 12, truncated 3, penalty',
            TINY,
            recipe(truncated(3), jitter=NARROW, regularizer=PENALTY),
        ),
    ),
)

PENALTIES = Study(
    title='Weights of the Jacobian penalty, tested on a fifth of the training images',
    epochs=RECIPES.epochs,
    options=BFLOAT16,
    seeds=(0,),
    holdout=5,
    rows={
        f'weight{weight}': Row(
            f'penalty of weight {weight}',
            TINY,
            recipe(phantom(3), regularizer=dict(PENALTY, weight=weight)),
        )
        for weight in (0.1, 0.3, 1.0, 3.0)
    },
)

# --- Nets of one size -------------------------------------------------------------------------

NETS = dict(
    node=('Neural ODE', 'node_cifar10_5k'),
    anode=('augmented Neural ODE', 'anode_cifar10_5k'),
    resnet18=('ResNet-18, an eighth as wide', 'resnet18_w8_cifar10_5k'),
    deq=('single-stream DEQ', 'deq_tiny_cifar10_5k'),
    mdeq=('MDEQ-tiny', TINY),
)


def rate(lr: float, decay: float) -> Options:
    """Settings of a net's optimizer."""
    return {'optim_wrapper.optimizer.lr': lr, 'optim_wrapper.optimizer.weight_decay': decay}


# The best of the tuning below; the single-stream DEQ has the MDEQ's, and the Neural ODEs have their
# configs', which are not tuned.
RATES = dict(resnet18=rate(3e-3, 1e-4), mdeq=rate(3e-3, 0.0), deq=rate(3e-3, 0.0))

TABLE1 = Study(
    title='Nets of one size, trained alike (paper, Table 1, on a tenth of the images)',
    epochs=30,
    options=BFLOAT16,
    rows={
        **{name: Row(title, config, RATES.get(name, {})) for name, (title, config) in NETS.items()},
        'resnet18_same_time': Row(
            'ResNet-18, as much time as MDEQ',
            NETS['resnet18'][1],
            RATES['resnet18'],
            time_of=('mdeq', 'resnet18'),
        ),
    },
)

TUNING = Study(
    title='Learning rate and weight decay of each net, tested on a fifth of the training images',
    epochs=20,
    options=BFLOAT16,
    seeds=(0,),
    holdout=5,
    rows={
        f'{name}_lr{lr:g}_wd{decay:g}': Row(
            f'{title}, rate {lr:g}, decay {decay:g}',
            config,
            rate(lr, decay),
        )
        for (name, (title, config)), lr, decay in product(
            NETS.items(), (3e-4, 1e-3, 3e-3), (0.0, 1e-4, 1e-3)
        )
    }
    | {
        # The configs' dropout of f is 0.25.
        f'mdeq_lr{lr:g}_drop{drop:g}': Row(
            f'MDEQ-tiny, rate {lr:g}, decay 0, dropout {drop:g}',
            TINY,
            {**rate(lr, 0.0), 'model.backbone.drop_rate': drop},
        )
        for lr, drop in product((1e-3, 3e-3), (0.0, 0.1))
    },
)

STUDIES = dict(recipes=RECIPES, penalties=PENALTIES, table1=TABLE1, tuning=TUNING)
