"""Group norm with what surrounds it in f as one operation, by torch, C++ or torch.compile.

Apart from its convolutions f (paper, §3.2) is group norms, rectifiers and sums. Operator by
operator each of them reads and writes whole maps of a batch. The operations here go through one
image at a time, so that what is read a second time is still in the cache, and keep for the backward
pass what cannot be computed again:

- :func:`norm_relu`: norm, ReLU;
- :func:`norm_relu_conv`: norm, ReLU, convolution;
- :func:`conv2d`: a convolution, where it is of 3x3 by Winograd's method;
- :func:`residual_norms`: mask of dropout, injection, norm, + z, rectifier, norm;
- :func:`sum_rectify`: sum of maps, each normalized and brought to the size of the sum, rectifier.

All take ``kernel``, one of :data:`KERNELS`, and give the same results whichever it is, to rounding.
Only torch is needed.
"""

from .backends import KERNELS, resolve
from .convolution import conv2d
from .norm_relu import norm_relu
from .norm_relu_conv import norm_relu_conv
from .norms import Norm
from .residual_norms import residual_norms
from .sum_rectify import Term, sum_rectify

__all__ = [
    'KERNELS',
    'Norm',
    'Term',
    'conv2d',
    'norm_relu',
    'norm_relu_conv',
    'residual_norms',
    'resolve',
    'sum_rectify',
]
