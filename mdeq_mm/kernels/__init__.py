"""Group norm and its neighbours in f as one operation, in torch, C++ or torch.compile.

Apart from its convolutions f (paper, §3.2) is group norms, rectifiers and sums. As separate
operators, each of them reads and writes whole maps of a batch. The operations here process one
image at a time, so that data read a second time is still in the cache. For the backward pass they
keep only what cannot be recomputed:

- :func:`norm_relu`: norm, ReLU;
- :func:`norm_relu_conv`: norm, ReLU, convolution;
- :func:`residual_norms`: dropout mask, injection, norm, + z, rectifier, norm;
- :func:`sum_rectify`: sum of maps, each normalized and resized to the sum, rectifier.

All take ``kernel``, one of :data:`KERNELS`. The results are the same to rounding. Only torch is
needed.
"""

from .backends import KERNELS, resolve
from .norm_relu import norm_relu
from .norm_relu_conv import norm_relu_conv
from .norms import Norm
from .residual_norms import residual_norms
from .sum_rectify import Term, sum_rectify

__all__ = [
    'KERNELS',
    'Norm',
    'Term',
    'norm_relu',
    'norm_relu_conv',
    'residual_norms',
    'resolve',
    'sum_rectify',
]
