"""The continuous-depth baselines of the paper's Table 1, integrated by torchdiffeq."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..options import check_int, check_number, checks_options


def _integrators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """torchdiffeq's integrator, differentiated through its steps or by the adjoint method.

    Imported only here because no other model needs the package.
    """
    try:
        from torchdiffeq import odeint, odeint_adjoint
    except ImportError as error:
        raise ImportError(
            'NeuralODEBackbone integrates with torchdiffeq, which cannot be imported here '
            f'({error}). Install it: pip install torchdiffeq'
        ) from error
    return odeint, odeint_adjoint


def _with_time(t: Tensor, z: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C + 1, H, W): the last channel is t everywhere."""
    return torch.cat([z, t.to(z.dtype).expand(len(z), 1, *z.shape[2:])], dim=1)


class ConvODEFunction(nn.Module):
    """dz/dt = h(t, z): three convolutions, each with the time as an additional channel.

    There is no normalization: h must be smooth enough in z for a solution to exist, and batch
    statistics would make an image's path depend on the other images.

    Args:
        channels (int): Channels of the state.
        hidden_channels (int): Channels between the convolutions.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + 1, hidden_channels, 1)
        self.conv2 = nn.Conv2d(hidden_channels + 1, hidden_channels, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden_channels + 1, channels, 1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Time (a scalar) and state (N, C, H, W) -> derivative, (N, C, H, W)."""
        out = F.relu(self.conv1(_with_time(t, z)))
        out = F.relu(self.conv2(_with_time(t, out)))
        # Under autocast the convolutions give half precision; the integrator keeps z's.
        return self.conv3(_with_time(t, out)).to(z.dtype)


@MODELS.register_module()
@checks_options
class NeuralODEBackbone(BaseModule):
    """Neural ODE (Chen et al., 2018), augmented (Dupont et al., 2019) or not.

    The image is z(0), the feature map z(1) of dz/dt = h(t, z), with no downsampling. dopri5
    integrates; the adjoint method, a second ODE solved backwards in time, gives the gradients,
    so no intermediate state is stored. The steps adapt to the error of the whole batch: unlike an
    MDEQ's, an image's answer depends on its batch, to within ``tol``.

    Needs the optional package torchdiffeq.

    Args:
        in_channels (int): Channels of the image.
        hidden_channels (int): Channels inside h.
        augment_channels (int): Channels of zeros that join the image in z(0). 0 is the plain
            Neural ODE, whose paths cannot cross; with more dimensions they need not.
        tol (float): Relative and absolute tolerance of the integrator, both ways.
        steps (int): If positive, so many equal steps of the fourth-order Runge-Kutta method in
            place of dopri5, whatever their error. The gradient goes back through them, and memory
            grows with their number; an image's answer no longer depends on its batch.
        init_cfg (dict | list, optional): MM's initialization; PyTorch's by default.
    """

    def __init__(
        self,
        in_channels: int = 3,
        hidden_channels: int = 64,
        augment_channels: int = 0,
        tol: float = 1e-3,
        steps: int = 0,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        name = type(self).__name__
        self.in_channels = check_int(name, 'in_channels', in_channels, 1)
        self.augment_channels = check_int(name, 'augment_channels', augment_channels, 0)
        check_int(name, 'hidden_channels', hidden_channels, 1)
        self.tol = check_number(name, 'tol', tol, 0, open_low=True)
        self.steps = check_int(name, 'steps', steps, 0)
        # A missing package is reported when the model is built, not at its first batch.
        _integrators()
        self.function = ConvODEFunction(in_channels + augment_channels, hidden_channels)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(N, in_channels, H, W) -> z(1), one (N, in_channels + augment_channels, H, W)."""
        z0 = F.pad(x, (0, 0, 0, 0, 0, self.augment_channels))
        odeint, odeint_adjoint = _integrators()
        times = torch.linspace(0, 1, max(1, self.steps) + 1, dtype=x.dtype, device=x.device)
        if self.steps:
            path = odeint(self.function, z0, times, method='rk4')
        else:
            path = odeint_adjoint(
                self.function, z0, times, rtol=self.tol, atol=self.tol, method='dopri5'
            )
        return (path[-1],)
