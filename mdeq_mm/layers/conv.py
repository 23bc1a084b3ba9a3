"""The strided convolution of stem, fusion and neck."""

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class MDEQConv2d(nn.Conv2d):
    """``nn.Conv2d`` with ``padding=kernel_size // 2`` that is also correct on maps one pixel wide.

    For a strided convolution of such a map, oneDNN leaves parts of the bfloat16 weight gradient
    unwritten (torch 2.14 on a CPU). Only one window fits, so a stride of 1 is equivalent.
    """

    def forward(self, x: Tensor) -> Tensor:
        stride = (self.stride[0], 1) if x.shape[-1] == 1 else self.stride
        return F.conv2d(x, self.weight, self.bias, stride, self.padding, self.dilation, self.groups)
