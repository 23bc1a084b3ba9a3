"""The convolutions of f, stem and neck."""

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..kernels import conv2d


@MODELS.register_module()
class MDEQConv2d(nn.Conv2d):
    """``nn.Conv2d`` with ``padding=kernel_size // 2`` that is also correct on maps one pixel wide.

    For a strided convolution of such a map, oneDNN leaves parts of the bfloat16 weight gradient
    unwritten (torch 2.14 on a CPU). Only one window fits, so a stride of 1 is equivalent.

    Attributes:
        kernel (str): What computes it where its stride is 1, one of
            :data:`mdeq_mm.kernels.KERNELS`; torch does where it is ``'native'``.
    """

    kernel = 'native'

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel != 'native' and self.is_plain:
            return conv2d(x, self.weight, self.padding[0], self.kernel)
        stride = (self.stride[0], 1) if x.shape[-1] == 1 else self.stride
        return F.conv2d(x, self.weight, self.bias, stride, self.padding, self.dilation, self.groups)

    @property
    def is_plain(self) -> bool:
        """Whether it has a stride of 1 and neither bias, dilation nor groups."""
        ones = (*self.stride, *self.dilation, self.groups)
        padded = isinstance(self.padding, tuple) and self.padding[0] == self.padding[1]
        return set(ones) == {1} and padded and self.bias is None
