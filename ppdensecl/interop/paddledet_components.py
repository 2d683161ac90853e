"""What PaddleDetection's configs lack for the paper's transfers. Importing this registers it.

| registered | |
|---|---|
| Res5HeadExtraNorm | the RoI head of a C4 network: res5, trained, and a BatchNorm after it |
| MaskFeatNorm | four 3×3 convolutions with BatchNorm and the upsampling; PaddleDetection's own takes no BatchNorm |
| !IterationSteps | a learning rate whose steps are counted in iterations, as the paper does; PaddleDetection counts epochs |
"""

import paddle
from paddle import nn
from paddle.regularizer import L2Decay
from ppdet.core.workspace import register, serializable
from ppdet.modeling.backbones.name_adapter import NameAdapter
from ppdet.modeling.backbones.resnet import BasicBlock, Blocks, BottleNeck
from ppdet.modeling.heads.mask_head import MaskFeat
from ppdet.modeling.shape_spec import ShapeSpec

from ppdensecl.models.resnet import BLOCKS


def _batch_norm(channels):
    free = paddle.ParamAttr(regularizer=L2Decay(0.0))  # no weight decay on a norm, as everywhere in these recipes
    return nn.BatchNorm2D(channels, weight_attr=free, bias_attr=free)


@register
class Res5HeadExtraNorm(nn.Layer):
    """x [R, 1024, 14, 14] (256 channels below depth 50) → [R, 2048, 7, 7] (512): res5, nothing frozen, and a BatchNorm.

    Source: MoCo's detection/train_net.py, Res5ROIHeadsExtraNorm. A SyncBN top level makes all of these synchronous.
    """

    def __init__(self, depth=50):
        super().__init__()
        self.variant = "b"
        block = BottleNeck if depth >= 50 else BasicBlock
        self.res5 = Blocks(block, 256 * block.expansion, 512, count=BLOCKS[depth][3], name_adapter=NameAdapter(self),
                           stage_num=5, variant="b", freeze_norm=False)
        self.channels = 512 * block.expansion
        self.norm = _batch_norm(self.channels)

    @property
    def out_shape(self):
        return [ShapeSpec(channels=self.channels, stride=16)]

    def forward(self, x, stage=0):
        return self.norm(self.res5(x))


@register
class MaskFeatNorm(MaskFeat):
    """x [R, C, 14, 14] → [R, out_channel, 28, 28]: `num_convs` 3×3 convolutions, with BatchNorm and ReLU, then as theirs."""

    def __init__(self, in_channel=256, out_channel=256, num_convs=4):
        super().__init__(in_channel, out_channel, num_convs=num_convs)
        layers = []
        for name, layer in self.upsample.named_children():
            if isinstance(layer, nn.Conv2D):
                conv = nn.Conv2D(layer._in_channels, out_channel, 3, padding=1, bias_attr=False,
                                 weight_attr=nn.initializer.KaimingNormal(fan_in=out_channel * 9))
                layers += [(name, nn.Sequential(conv, _batch_norm(out_channel)))]
            else:
                layers += [(name, layer)]
        self.upsample = nn.Sequential(*layers)


@serializable
class IterationSteps:
    """A linear warm-up of `warmup` iterations from `start_factor`, then × 0.1 at each of `milestones`, all in iterations."""

    use_warmup = False  # theirs, which would come before this

    def __init__(self, milestones, warmup=100, start_factor=0.001):
        self.milestones, self.warmup, self.start_factor = milestones, warmup, start_factor

    def __call__(self, base_lr, step_per_epoch=None):
        boundaries = [step - self.warmup for step in self.milestones]  # Paddle counts from the end of the warm-up
        decay = paddle.optimizer.lr.PiecewiseDecay(boundaries, [base_lr * 0.1**n for n in range(len(boundaries) + 1)])
        return paddle.optimizer.lr.LinearWarmup(decay, self.warmup, self.start_factor * base_lr, base_lr)
