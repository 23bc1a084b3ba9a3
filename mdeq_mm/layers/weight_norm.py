"""Weight normalization of convolutions, in torch's parametrization form."""

from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def weight_normed(conv: nn.Conv2d, enabled: bool = True) -> nn.Conv2d:
    """``conv`` with its weight split into a norm per output channel and a direction.

    Wrap repeated calls in ``torch.nn.utils.parametrize.cached()``, so that the product is made
    once: ``ImplicitLayer`` does.

    Args:
        conv (nn.Conv2d): The layer, changed in place.
        enabled (bool): False returns the layer as it is.
    """
    return weight_norm(conv, dim=0) if enabled else conv
