from ppdensecl.models.densecl import DenseCL, DenseCLOutput, Encoder
from ppdensecl.models.heads import DenseProjectionHead
from ppdensecl.models.queue import NegativeQueue
from ppdensecl.models.resnet import ResNet

__all__ = ["DenseCL", "DenseCLOutput", "DenseProjectionHead", "Encoder", "NegativeQueue", "ResNet"]
