"""The backbone: stem and injection, then the equilibrium of f at all scales."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from ..compat import allow_repeated_backward
from ..deq import CellProblem
from ..layers import ScaleOutput, check_groups, is_group_norm
from ..options import check_choice, check_flag, check_int, check_number, checks_options
from ..registry import build_implicit
from .cell import MDEQCell

Config = dict[str, Any]

_DEFAULT_INIT = (
    dict(type='Normal', layer='Conv2d', std=0.01),
    dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1),
)

#: The paper's networks (appendix A): what ``arch`` stands for.
ARCHS: dict[str, Config] = dict(
    tiny=dict(channels=(24, 24), expansion=5, stem_strides=(1, 1)),
    small=dict(channels=(32, 64, 128, 256), expansion=5, stem_strides=(2, 2)),
    large=dict(channels=(80, 160, 320, 640), expansion=5, stem_strides=(2, 2)),
    xl=dict(channels=(88, 176, 352, 704), expansion=6, stem_strides=(2, 2)),
)


@MODELS.register_module()
@checks_options
class MDEQBackbone(BaseModule):
    """Multiscale deep equilibrium model (Bai, Koltun & Kolter, NeurIPS 2020).

    Features at ``len(channels)`` resolutions, each half the one before, are driven to a joint
    equilibrium z* = f(z*; x). Training and evaluation both return f(z*).

    Args:
        arch (str, optional): A network of the paper: ``'tiny'``, ``'small'``, ``'large'`` or
            ``'xl'``. It gives ``channels``, ``expansion`` and ``stem_strides``; what is given
            beside it wins. Without it they are those of ``'small'``.
        in_channels (int): Channels of the image.
        channels (Sequence[int]): Channels per scale, highest resolution first.
        expansion (int): Width factor inside the residual blocks.
        stem_strides (Sequence[int]): Strides of the stem's 3x3 convolutions. (2, 2) starts the
            first scale at a quarter of the image, (1, 1) at full size (CIFAR).
        drop_rate (float): Variational dropout in f.
        weight_norm (bool): Weight-normalize convolutions of f, as the paper's models do.
        upsample (str): ``'nearest'`` as in the released weights, ``'bilinear'`` as in the paper.
        norm_cfg (dict): Normalization in f.
        stem_norm_cfg (dict): Normalization in stem and injection.
        norm_kernel (str): The implementation of norms, rectifiers and sums of f: ``'native'``,
            torch's operators; ``'cpp'``, C++ for CPUs, built at first use; ``'compiled'``,
            torch.compile. ``'auto'`` is ``'cpp'`` on a CPU with a compiler and ``'native'``
            elsewhere.
        cell (dict, optional): Another f instead of :class:`MDEQCell`: a module with
            ``forward(states, injection)`` and ``state_shapes(injection)``, registered in MM's
            ``MODELS``. Its first scale takes the injection, (N, channels[0], H, W).
        solver (dict): Solver of the forward pass: ``FixedPointIteration``, ``Anderson`` or
            ``LimitedMemoryBroyden`` with its options.
        gradient (dict): How gradients pass through the equilibrium; see
            :mod:`mdeq_mm.deq.gradients`.
        start (dict): Where a solve begins: ``ZeroStart``, or ``PreviousStart`` for video.
        regularizer (dict, optional): ``JacobianRegularizer`` with its options.
        unrolled_layers (int): If positive, an explicit weight-tied net of this many layers replaces
            the equilibrium. ``MDEQWarmupHook`` sets it during the warm-up.
        eval_solver (dict, optional): Options of ``solver`` that differ in evaluation mode, as
            ``dict(max_iter=18)``.
        skip_solved (bool): In evaluation mode, evaluate f for the unsolved images alone once at
            most half of a batch is unsolved.
        compile_cell (bool | dict): Compile f by ``torch.compile``; a dict holds its options.
        channels_last (bool | str): Memory format of the maps inside. ``'auto'`` is channels last on
            a CPU, where it is fastest, above all for gradients of convolutions. True is so
            everywhere, and the maps returned are channels last as well.
        out_indices (Sequence[int], optional): Scales to return; all by default.
        frozen_stages (int): -1 trains all; 0 freezes the stem, 1 the injection as well, 2 also f.
        norm_eval (bool): Keep batch norm in evaluation mode while training.
        init_cfg (dict | list, optional): MM's initialization. By default convolutions are drawn
            from N(0, 0.01) as in the released code; weight-normalized ones keep PyTorch's
            initialization.
    """

    #: mmseg's models hand their own ``pretrained`` on to the backbone.
    option_remedies = dict(
        pretrained=" It is mmsegmentation's model.pretrained, weights of the backbone that stood "
        "here: set model.pretrained=None, and load MDEQ's own by backbone.init_cfg="
        "dict(type='Pretrained', checkpoint=..., prefix='backbone.')."
    )

    def __init__(
        self,
        arch: str | None = None,
        in_channels: int = 3,
        channels: Sequence[int] | None = None,
        expansion: int | None = None,
        stem_strides: Sequence[int] | None = None,
        drop_rate: float = 0.0,
        weight_norm: bool = True,
        upsample: str = 'nearest',
        norm_cfg: Config = dict(type='GN', num_groups=8),
        stem_norm_cfg: Config = dict(type='BN'),
        norm_kernel: str = 'auto',
        cell: Config | None = None,
        solver: Config = dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3),
        gradient: Config = dict(
            type='ImplicitGradient',
            solver=dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3),
        ),
        start: Config = dict(type='ZeroStart'),
        regularizer: Config | None = None,
        unrolled_layers: int = 0,
        eval_solver: Config | None = None,
        skip_solved: bool = False,
        compile_cell: bool | Config = False,
        channels_last: bool | str = 'auto',
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: Config | list[Config] | None = None,
    ) -> None:
        super().__init__(init_cfg=list(_DEFAULT_INIT) if init_cfg is None else init_cfg)
        name = type(self).__name__
        preset = ARCHS['small' if arch is None else check_choice(name, 'arch', arch, ARCHS)]
        given = dict(channels=channels, expansion=expansion, stem_strides=stem_strides)
        shape = {**preset, **{k: v for k, v in given.items() if v is not None}}
        self.channels = _checked_sequence(name, 'channels', shape['channels'])
        self.stem_strides = _checked_sequence(name, 'stem_strides', shape['stem_strides'])
        self.out_indices = _checked_out_indices(name, out_indices, len(self.channels))
        check_int(name, 'in_channels', in_channels, 1)
        check_int(name, 'expansion', shape['expansion'], 1)
        check_number(name, 'drop_rate', drop_rate, 0, 1, open_high=True)
        self.frozen_stages = check_int(name, 'frozen_stages', frozen_stages, -1)
        if self.frozen_stages > 2:
            raise ValueError(
                f'{name}: frozen_stages must be -1 (none), 0 (stem), 1 (injection as well) or 2 '
                f'(f as well, so all of it), got {frozen_stages}.'
            )
        self.norm_eval = check_flag(name, 'norm_eval', norm_eval)
        self.channels_last = check_choice(
            name, 'channels_last', channels_last, ('auto', True, False)
        )
        _check_norm_cfg(name, 'stem_norm_cfg', stem_norm_cfg)
        _check_norm_cfg(name, 'norm_cfg', norm_cfg)

        self.stem = self._make_stem(in_channels, stem_norm_cfg)
        self.injection = self._make_injection(stem_norm_cfg)
        f = dict(
            channels=self.channels,
            expansion=shape['expansion'],
            norm_cfg=norm_cfg,
            drop_rate=drop_rate,
            weight_norm=weight_norm,
            upsample=upsample,
            norm_kernel=norm_kernel,
        )
        self.cell = MDEQCell(**f) if cell is None else _build_cell(name, cell, f, expansion)
        self.implicit = build_implicit(
            solver,
            gradient,
            start,
            eval_solver=eval_solver,
            regularizer=regularizer,
            unrolled_layers=unrolled_layers,
            skip_solved=skip_solved,
        )
        # Behind f, so that the last norm of the backbone is that of its last map.
        self.outputs = nn.ModuleList(ScaleOutput(self.channels[i]) for i in self.out_indices)
        self._compiled = _compiled_call(name, compile_cell)
        self._freeze()

    def _make_stem(self, in_channels: int, norm_cfg: Config) -> nn.Sequential:
        width = self.channels[0]
        if is_group_norm(norm_cfg):
            check_groups(width, norm_cfg['num_groups'], f'stem_norm_cfg={norm_cfg}')
        convs = []
        options = dict(padding=1, bias=False, conv_cfg=dict(type='MDEQConv2d'), norm_cfg=norm_cfg)
        for stride in self.stem_strides:
            convs.append(ConvModule(in_channels, width, 3, stride, **options))
            in_channels = width
        return nn.Sequential(*convs)

    def _make_injection(self, norm_cfg: Config) -> nn.Module:
        # As released: none for nets of full resolution with at most two scales.
        if all(stride == 1 for stride in self.stem_strides) and len(self.channels) <= 2:
            return nn.Identity()
        width = self.channels[0]
        return ConvModule(width, width, 1, bias=False, norm_cfg=norm_cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, in_channels, H, W) -> the (N, Ci, Hi, Wi) of ``out_indices``, in the dtype of x.

        Any H, W of at least 1 works: strides round up.
        """
        problem = self.problem(x)
        # The layer itself requires a gradient of z. Without this check, a frozen backbone would
        # build a graph and solve for an adjoint that nobody needs.
        wanted = problem.injection.requires_grad or _trains(self.cell)
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            features = self.implicit(problem)
        # As other backbones give them, which heads that view() rely on.
        layout = torch.channels_last if self.channels_last is True else torch.contiguous_format
        # Copies, not views of one state, so that a head may work in place.
        return tuple(
            output(features[i].to(x.dtype, memory_format=layout, copy=True))
            for i, output in zip(self.out_indices, self.outputs)
        )

    def problem(self, x: Tensor) -> CellProblem:
        """f bound to a batch of images, (N, in_channels, H, W), as solvers take it.

        Calling it evaluates f: (N, D) -> (N, D). ``maps`` returns the (N, Ci, Hi, Wi) of a state.
        """
        channels_last = self.channels_last
        if channels_last == 'auto':
            channels_last = x.device.type == 'cpu'
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        injection = self.injection(self.stem(x))
        problem = CellProblem(self.cell, injection, channels_last, self._compiled)
        widths = tuple(shape[0] for shape in problem.shapes)
        if widths != self.channels:
            raise ValueError(
                f'{type(self.cell).__name__} has scales of {widths} channels, but the backbone was '
                f'built with channels={self.channels}: make them equal. Heads expect the latter.'
            )
        return problem

    def reset_start(self) -> None:
        """Forget the last equilibrium: the next image begins a new stream (``PreviousStart``)."""
        self.implicit.start.reset()

    def _freeze(self) -> None:
        for part in (self.stem, self.injection, self.cell)[: self.frozen_stages + 1]:
            part.eval()
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> 'MDEQBackbone':
        """Training mode, except for frozen stages and, under ``norm_eval``, batch norm."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def _trains(module: nn.Module) -> bool:
    """Whether a parameter below ``module`` requires grad.

    A replica made by ``nn.DataParallel`` has no parameters: plain tensors stand for them.
    """
    return any(
        tensor.requires_grad
        for part in module.modules()
        for tensor in (
            *part.parameters(recurse=False),
            *getattr(part, '_former_parameters', {}).values(),
        )
    )


def _call(cell: nn.Module, states: Sequence[Tensor], injection: Tensor) -> list[Tensor]:
    return cell(states, injection)


def _compiled_call(name: str, options: bool | Config) -> Callable[..., list[Tensor]] | None:
    """The compiled call of the cell; None if it is not compiled."""
    if not isinstance(options, (bool, dict)):
        raise ValueError(
            f'{name}: compile_cell must be True, False or a dict of options of torch.compile, '
            f'got {options!r}.'
        )
    # An empty dict compiles as well.
    if options is False:
        return None
    # The adjoint solver repeats the backward pass.
    allow_repeated_backward()
    return torch.compile(_call, **({} if options is True else options))


def _build_cell(
    name: str, cell: Config | nn.Module, options: Config, expansion: int | None
) -> nn.Module:
    """The user's f.

    Args:
        name (str): The caller's name, for error messages.
        cell (dict | nn.Module): The cell, or its config.
        options (dict): The options for ``MDEQCell``, which must have their defaults.
        expansion (int, optional): The value that the user gave, not that of ``arch``.

    Raises:
        TypeError: The user set an option of ``MDEQCell``, or the cell lacks ``state_shapes``.
    """
    defaults = inspect.signature(MDEQCell).parameters
    ours = [k for k, v in options.items() if k not in ('channels', 'expansion')]
    ours = [k for k in ours if options[k] != defaults[k].default]
    ours += [] if expansion is None else ['expansion']
    if ours:
        raise TypeError(
            f'{name}: {", ".join(sorted(ours))} are options of MDEQCell, which cell={cell!r} '
            'replaces. Leave them out, or give them to your cell.'
        )
    built = cell if isinstance(cell, nn.Module) else MODELS.build(cell)
    if not callable(getattr(built, 'state_shapes', None)):
        raise TypeError(
            f'{name}: cell {type(built).__name__} has no state_shapes(injection), which '
            'returns the (Ci, Hi, Wi) of its scales.'
        )
    return built


def _check_norm_cfg(name: str, option: str, value: Any) -> None:
    if not isinstance(value, dict) or 'type' not in value:
        raise TypeError(
            f"{name}: {option} must be a dict with a 'type', as dict(type='GN', num_groups=8), got "
            f'{value!r}. f and its stem do not converge without normalization.'
        )
    if option == 'stem_norm_cfg' and is_group_norm(value) and 'num_groups' not in value:
        raise ValueError(f'{name}: {option}={dict(value)} lacks num_groups: add num_groups=8.')


_ENTRY = dict(channels='scale', stem_strides='convolution')


def _checked_sequence(name: str, option: str, value: Any) -> tuple[int, ...]:
    """``value`` as a tuple of positive integers."""
    if isinstance(value, (str, int)) or not isinstance(value, Sequence) or not value:
        example = f' For one {_ENTRY[option]} write ({value},).' if type(value) is int else ''
        raise ValueError(
            f'{name}: {option} must be a list of integers >= 1 with at least one entry, got '
            f'{value!r}.{example}'
        )
    return tuple(check_int(name, option, entry, 1) for entry in value)


def _checked_out_indices(
    name: str, out_indices: Sequence[int] | None, num_scales: int
) -> tuple[int, ...]:
    """All scales for None, else ``out_indices`` if each names a scale."""
    if out_indices is None:
        return tuple(range(num_scales))
    listed = isinstance(out_indices, Sequence) and not isinstance(out_indices, str)
    indices = tuple(out_indices) if listed else ()
    if not indices or any(
        isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_scales for i in indices
    ):
        raise ValueError(
            f'{name}: out_indices must be a list of scales among 0..{num_scales - 1} (channels has '
            f'{num_scales} entries), as ({num_scales - 1},), got {out_indices!r}.'
        )
    return indices
