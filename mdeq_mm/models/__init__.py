from .backbone import MDEQBackbone
from .cell import MDEQCell
from .fuse_neck import MDEQFuseNeck
from .multitask import JointHead, PresentClasses
from .neural_ode import NeuralODEBackbone

__all__ = [
    'JointHead',
    'MDEQBackbone',
    'MDEQCell',
    'MDEQFuseNeck',
    'NeuralODEBackbone',
    'PresentClasses',
]
