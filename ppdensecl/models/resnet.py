"""ResNet backbones (He et al., CVPR 2016) as everyone's checkpoints have them.

Parameter names are torchvision's (`conv1.weight`, `layer1.0.bn1.weight`, `layer2.0.downsample.0.weight`, …; a BatchNorm's
running statistics are Paddle's `_mean` and `_variance`), the stride of a bottleneck is in its 3×3 convolution, and there
is no classifier. Initialisation is that of the authors' code: Kaiming normal with fan-in, BatchNorm 1 and 0, the last
BatchNorm of a block included.
"""

import paddle.nn.functional as F
from paddle import nn

from ppdensecl.models.recompute import recompute

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _conv(cin, cout, kernel, stride=1, dilation=1):
    # KaimingNormal's default is fan-in with ReLU's gain: std = sqrt(2 / (kernel² · cin)).
    return nn.Conv2D(cin, cout, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation,
                     weight_attr=nn.initializer.KaimingNormal(), bias_attr=False)


def _norm(channels):
    return nn.BatchNorm2D(channels, momentum=0.9, epsilon=1e-5)  # 0.9 here is 0.1 in PyTorch's convention


class BasicBlock(nn.Layer):
    expansion = 1

    def __init__(self, cin, width, stride, first_dilation, dilation, downsample):
        super().__init__()
        self.conv1 = _conv(cin, width, 3, stride, first_dilation)
        self.bn1 = _norm(width)
        self.conv2 = _conv(width, width, 3, dilation=dilation)
        self.bn2 = _norm(width)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu_(y.add_(x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Layer):
    expansion = 4

    def __init__(self, cin, width, stride, first_dilation, dilation, downsample):
        super().__init__()
        self.conv1 = _conv(cin, width, 1)
        self.bn1 = _norm(width)
        self.conv2 = _conv(width, width, 3, stride, first_dilation)
        self.bn2 = _norm(width)
        self.conv3 = _conv(width, width * 4, 1)
        self.bn3 = _norm(width * 4)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu_(self.bn1(self.conv1(x)))
        y = F.relu_(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu_(y.add_(x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Layer):
    """The convolutional part of ResNet-18, 34, 50, 101 or 152.

    Args:
        depth: 18, 34, 50, 101 or 152.
        output_stride: 32, 16 or 8. Below 32 the last one or two stages trade their stride for dilation by torchvision's
            rule: the convolution that had the stride keeps the dilation of the stage before, all later ones get the new
            one. Every `32 / output_stride`-th position of the result then equals the undilated network's.
        stages: how many of the four stages there are; fewer are for small pictures and quick trials.

    `feat_channels` are the widths of the stages; `forward` gives the last map [N, C, H/32, W/32] (float, ReLU
    output, not normalised), `stages` all four. Of the first `recompute` stages (an attribute, at first 0; the stem
    goes with the first) `forward` keeps the blocks' inputs only; the backward pass computes the rest again.
    """

    def __init__(self, depth=50, output_stride=32, stages=4):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {depth}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        block = BasicBlock if depth < 50 else Bottleneck
        self.depth = depth
        self.recompute = 0
        widths = (64, 128, 256, 512)[:stages]
        self.feat_channels = [width * block.expansion for width in widths]
        self.conv1 = _conv(3, 64, 7, 2)
        self.bn1 = _norm(64)
        self.maxpool = nn.MaxPool2D(3, 2, 1)
        cin, total_stride, dilation = 64, 4, 1
        for number, (width, blocks) in enumerate(zip(widths, BLOCKS[depth]), 1):
            stride, first_dilation = (1 if number == 1 else 2), dilation
            if stride == 2 and total_stride >= output_stride:
                stride, dilation = 1, dilation * 2
            total_stride *= stride
            cout = width * block.expansion
            downsample = None
            if stride != 1 or cin != cout or number > 1:
                downsample = nn.Sequential(_conv(cin, cout, 1, stride), _norm(cout))
            layers = [block(cin, width, stride, first_dilation, dilation, downsample)]
            layers += [block(cout, width, 1, dilation, dilation, None) for _ in range(1, blocks)]
            setattr(self, f"layer{number}", nn.Sequential(*layers))
            cin = cout

    def _stages(self):
        return [getattr(self, f"layer{number}") for number in range(1, len(self.feat_channels) + 1)]

    def _stem(self, x):
        return self.maxpool(F.relu_(self.bn1(self.conv1(x))))

    def forward(self, x):
        """x [N, 3, H, W] float → the last stage's map [N, C, H/output_stride, W/output_stride]."""
        x = recompute(self._stem, [self.conv1, self.bn1], x) if self.recompute else self._stem(x)
        for number, stage in enumerate(self._stages()):
            if number >= self.recompute:
                x = stage(x)
                continue
            for block in stage:
                x = recompute(block, [block], x)
        return x

    def stages(self, x):
        """x [N, 3, H, W] float → the maps of all stages, at strides 4, 8, 16, 32 (or as dilated)."""
        x, maps = self._stem(x), []
        for stage in self._stages():
            x = stage(x)
            maps.append(x)
        return maps
