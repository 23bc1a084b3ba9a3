from torch.nn.modules.module import register_module_module_registration_hook

from .backbone import MDEQBackbone
from .cell import MDEQCell
from .fuse_neck import MDEQFuseNeck
from .multitask import JointHead, PresentClasses
from .neural_ode import NeuralODEBackbone
from .scales import check_built_scales

__all__ = [
    'JointHead',
    'MDEQBackbone',
    'MDEQCell',
    'MDEQFuseNeck',
    'NeuralODEBackbone',
    'PresentClasses',
]

register_module_module_registration_hook(check_built_scales)
