"""The backbone: stem and injection, then the equilibrium of f at all scales."""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..compat import allow_repeated_backward
from ..deq.layer import ImplicitLayer
from ..deq.problem import Shape, pack, unpack
from ..deq.solvers.base import Function
from ..layers import check_groups, reset_masks
from ..options import check_int, check_number, checks_options
from .cell import MDEQCell

_DEFAULT_INIT = (
    dict(type='Normal', layer='Conv2d', std=0.01),
    dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1),
)


@MODELS.register_module()
@checks_options
class MDEQBackbone(BaseModule):
    """Multiscale deep equilibrium model (Bai, Koltun & Kolter, NeurIPS 2020).

    Features at ``len(channels)`` resolutions, each half the one before, are driven to a joint
    equilibrium z* = f(z*; x). Training and evaluation both return f(z*).

    Args:
        in_channels (int): Channels of the image.
        channels (Sequence[int]): Channels per scale, highest resolution first.
        expansion (int): Width factor inside the residual blocks.
        stem_strides (Sequence[int]): Strides of the stem's 3x3 convolutions. (2, 2) starts the
            first scale at a quarter of the image, (1, 1) at full size (CIFAR).
        drop_rate (float): Variational dropout in f.
        weight_norm (bool): Weight-normalize the convolutions of f that the paper's models do.
        upsample (str): ``'nearest'`` as in the released weights, ``'bilinear'`` as in the paper.
        norm_cfg (dict): Normalization in f.
        stem_norm_cfg (dict): Normalization in stem and injection.
        solver (dict): Solver of the forward pass: ``FixedPointIteration``, ``Anderson`` or
            ``LimitedMemoryBroyden`` with its options.
        gradient (dict): How gradients pass the equilibrium; see :mod:`mdeq_mm.deq.gradients`.
        unrolled_layers (int): If positive, an explicit weight-tied net of so many layers takes
            the place of the equilibrium. ``MDEQWarmupHook`` sets it for a time.
        eval_solver (dict, optional): Options of ``solver`` that differ in evaluation mode:
            ``dict(max_iter=18)`` buys speed, more calls than in training accuracy.
        skip_solved (bool): In evaluation mode, call f for the unsolved images of a batch alone
            once at most half are unsolved.
        compile_cell (bool | dict): Compile f by ``torch.compile``; a dict holds its options.
        out_indices (Sequence[int], optional): Scales to return; all by default.
        frozen_stages (int): -1 trains all; 0 freezes the stem, 1 the injection as well, 2 also f.
        norm_eval (bool): Keep batch norm in evaluation mode while training.
        init_cfg (dict | list, optional): MM's initialization. By default convolutions are drawn
            from N(0, 0.01), which weight-normalized ones do not feel, as in the released code.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64, 128, 256),
        expansion: int = 5,
        stem_strides: Sequence[int] = (2, 2),
        drop_rate: float = 0.0,
        weight_norm: bool = True,
        upsample: str = 'nearest',
        norm_cfg: Dict[str, Any] = dict(type='GN', num_groups=8),
        stem_norm_cfg: Dict[str, Any] = dict(type='BN'),
        solver: Dict[str, Any] = dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3),
        gradient: Dict[str, Any] = dict(
            type='ImplicitGradient',
            solver=dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3),
        ),
        unrolled_layers: int = 0,
        eval_solver: Optional[Dict[str, Any]] = None,
        skip_solved: bool = False,
        compile_cell: Union[bool, Dict[str, Any]] = False,
        out_indices: Optional[Sequence[int]] = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: Optional[Union[Dict, List[Dict]]] = None,
    ) -> None:
        super().__init__(init_cfg=list(_DEFAULT_INIT) if init_cfg is None else init_cfg)
        name = type(self).__name__
        self.channels = tuple(check_int(name, 'channels', c, 1) for c in channels)
        if not self.channels:
            raise ValueError(f'{name}: channels must name at least one scale, got {channels!r}.')
        self.stem_strides = tuple(check_int(name, 'stem_strides', s, 1) for s in stem_strides)
        if not self.stem_strides:
            raise ValueError(f'{name}: stem_strides must name at least one convolution.')
        self.out_indices = _checked_out_indices(name, out_indices, len(self.channels))
        check_int(name, 'in_channels', in_channels, 1)
        check_int(name, 'expansion', expansion, 1)
        check_number(name, 'drop_rate', drop_rate, 0, 1, open_high=True)
        self.frozen_stages = check_int(name, 'frozen_stages', frozen_stages, -1)
        if self.frozen_stages > 2:
            raise ValueError(f'{name}: frozen_stages must be -1, 0, 1 or 2, got {frozen_stages}.')
        self.norm_eval = norm_eval

        self.stem = self._make_stem(in_channels, stem_norm_cfg)
        self.injection = self._make_injection(stem_norm_cfg)
        self.cell = MDEQCell(self.channels, expansion, norm_cfg, drop_rate, weight_norm, upsample)
        self.implicit = ImplicitLayer(solver, gradient, unrolled_layers, eval_solver, skip_solved)
        self._parametrized: List[nn.Module] = []
        if not isinstance(compile_cell, (bool, dict)):
            raise ValueError(
                f'{name}: compile_cell must be True, False or a dict of options of torch.compile, '
                f'got {compile_cell!r}.'
            )
        # A dict without options compiles, too.
        if compile_cell is not False:
            self._compile_cell({} if compile_cell is True else compile_cell)
        self._freeze()

    def _compile_cell(self, options: Dict[str, Any]) -> None:
        self._parametrized = [m for m in self.cell.modules() if parametrize.is_parametrized(m)]
        # The adjoint solver repeats it.
        allow_repeated_backward()
        self.cell.compile(**options)

    def _make_stem(self, in_channels: int, norm_cfg: Dict[str, Any]) -> nn.Sequential:
        width = self.channels[0]
        if norm_cfg.get('type') == 'GN':
            check_groups(width, norm_cfg['num_groups'], f'stem_norm_cfg={norm_cfg}')
        convs = []
        options = dict(padding=1, bias=False, conv_cfg=dict(type='MDEQConv2d'), norm_cfg=norm_cfg)
        for stride in self.stem_strides:
            convs.append(ConvModule(in_channels, width, 3, stride, **options))
            in_channels = width
        return nn.Sequential(*convs)

    def _make_injection(self, norm_cfg: Dict[str, Any]) -> nn.Module:
        # As released: none for nets of full resolution with at most two scales.
        if all(stride == 1 for stride in self.stem_strides) and len(self.channels) <= 2:
            return nn.Identity()
        width = self.channels[0]
        return ConvModule(width, width, 1, bias=False, norm_cfg=norm_cfg)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """(N, in_channels, H, W) -> the (N, Ci, Hi, Wi) of ``out_indices``.

        Any H, W of at least 1 works: strides round up.
        """
        # Convolutions on a CPU are fastest, and their gradients by far, with channels last.
        channels_last = x.device.type == 'cpu'
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        injection = self.injection(self.stem(x))
        if self.training:
            reset_masks(self.cell)
        shapes = self._shapes(injection)
        # The state stays in full precision, whatever autocast makes of the maps inside f.
        dtype = torch.promote_types(self.dtype, injection.dtype)

        def f_for(injection: Tensor) -> Function:
            def f(z: Tensor) -> Tensor:
                for conv in self._parametrized:
                    # Made here, not in a graph of its own for the call that finds no cached one.
                    conv.weight  # noqa: B018
                features = self.cell(unpack(z, shapes, channels_last), injection)
                return pack(features, channels_last).to(dtype)

            return f

        # Masks of dropout are for the batch as it is.
        f_of_rows = None if self.training else lambda rows: f_for(injection[rows])
        size = sum(c * h * w for c, h, w in shapes)
        z0 = torch.zeros(len(x), size, dtype=dtype, device=x.device)
        # The layer asks for the gradient of z itself: without this, what is frozen would build a
        # graph and solve for adjoints that nothing takes.
        wanted = injection.requires_grad or any(p.requires_grad for p in self.cell.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            out = self.implicit(f_for(injection), z0, f_of_rows)
        features = unpack(out, shapes, channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # Copies, not views of one state: what a head does in place stays with that head.
        return tuple(features[i].clone(memory_format=layout) for i in self.out_indices)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def _shapes(self, injection: Tensor) -> List[Shape]:
        """(Ci, Hi, Wi) per scale, each half the one before, rounded up."""
        h, w = injection.shape[-2:]
        shapes = []
        for c in self.channels:
            shapes.append((c, h, w))
            h, w = (h + 1) // 2, (w + 1) // 2
        return shapes

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


def _checked_out_indices(
    name: str, out_indices: Optional[Sequence[int]], num_scales: int
) -> Tuple[int, ...]:
    """All scales for None, else ``out_indices`` if each names a scale."""
    if out_indices is None:
        return tuple(range(num_scales))
    indices = tuple(out_indices)
    if not indices or any(not isinstance(i, int) or not 0 <= i < num_scales for i in indices):
        raise ValueError(
            f'{name}: out_indices must name scales among 0..{num_scales - 1} (channels has '
            f'{num_scales} entries), got {out_indices!r}.'
        )
    return indices
