from .backbone import MDEQBackbone
from .cell import MDEQCell
from .fuse_neck import MDEQFuseNeck

__all__ = ['MDEQBackbone', 'MDEQCell', 'MDEQFuseNeck']
