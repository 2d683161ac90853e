"""The projection head of DenseCL (paper, section 3.2): a global branch and a dense branch, both without BatchNorm."""

import math

import paddle.nn.functional as F
from paddle import nn


def _linear(cin, cout):
    # Kaiming normal with fan-in, bias 0: what the authors' code gives its Linear layers.
    return nn.Linear(cin, cout, weight_attr=nn.initializer.KaimingNormal(), bias_attr=nn.initializer.Constant(0.0))


def _conv1x1(cin, cout):
    # The authors leave their 1×1 convolutions at PyTorch's default: uniform within ±1/√fan_in, for the bias too.
    bound = 1.0 / math.sqrt(cin)
    return nn.Conv2D(cin, cout, 1, weight_attr=nn.initializer.Uniform(-bound, bound),
                     bias_attr=nn.initializer.Uniform(-bound, bound))


class DenseProjectionHead(nn.Layer):
    """Projects a backbone map to one global and S×S dense embeddings.

    Args:
        in_channels: C, the backbone's width.
        hidden_dim: width of the hidden layer of either branch.
        embedding_dim: D.
        num_grid: S, or None to keep the map's own H×W.
        dense: False leaves the dense branch out (MoCo-v2).
    """

    def __init__(self, in_channels, hidden_dim, embedding_dim, num_grid=None, dense=True):
        super().__init__()
        self.num_grid = num_grid
        self.dense = dense
        self.global_fc1 = _linear(in_channels, hidden_dim)
        self.global_fc2 = _linear(hidden_dim, embedding_dim)
        if dense:
            self.dense_conv1 = _conv1x1(in_channels, hidden_dim)
            self.dense_conv2 = _conv1x1(hidden_dim, embedding_dim)

    def to_grid(self, features):
        """[N, C, H, W] → [N, C, S, S]; the map itself where no grid is set or it has that size already."""
        if self.num_grid is None or list(features.shape[2:]) == [self.num_grid, self.num_grid]:
            return features
        return F.adaptive_avg_pool2d(features, self.num_grid)

    def forward(self, features):
        """features [N, C, H, W] → global [N, D], dense [N, D, S, S], dense_pooled [N, D]; none is normalised.

        Without the dense branch the last two are None.
        """
        x = features.mean(axis=[2, 3])
        x = self.global_fc2(F.relu(self.global_fc1(x)))
        if not self.dense:
            return x, None, None
        y = self.dense_conv2(F.relu(self.dense_conv1(self.to_grid(features))))
        return x, y, y.mean(axis=[2, 3])
