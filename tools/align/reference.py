"""DenseCL in PyTorch, as plainly as it can be said: what ours is compared with.

The names are those of the authors' checkpoints (`encoder_q.0.conv1.weight`, `encoder_q.1.mlp.0.weight`, `queue`, …), so that
such a checkpoint loads. The losses are the textbook form: all logits side by side, cross entropy with label 0.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """BasicBlock (two 3×3 convolutions) or Bottleneck (1×1, 3×3 with the stride, 1×1)."""

    def __init__(self, cin, width, stride, bottleneck):
        super().__init__()
        cout = width * (4 if bottleneck else 1)
        kernels = ((1, width, 1), (3, width, stride), (1, cout, 1)) if bottleneck else ((3, width, stride), (3, width, 1))
        self.layers = len(kernels)
        channels = cin
        for number, (kernel, out, step) in enumerate(kernels, 1):
            setattr(self, f"conv{number}", nn.Conv2d(channels, out, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(out))
            channels = out
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = x
        for number in range(1, self.layers + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.layers:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, depth):
        super().__init__()
        bottleneck = depth >= 50
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        cin = 64
        for number, (width, blocks) in enumerate(zip((64, 128, 256, 512), BLOCKS[depth]), 1):
            cout = width * (4 if bottleneck else 1)
            layers = []
            for block in range(blocks):
                layers.append(Block(cin, width, 2 if number > 1 and block == 0 else 1, bottleneck))
                cin = cout
            setattr(self, f"layer{number}", nn.Sequential(*layers))
        for module in self.modules():  # the authors': fan-in, and BatchNorm as PyTorch makes it (1 and 0)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x):
        """The maps of the four stages."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for number in (1, 2, 3, 4):
            x = getattr(self, f"layer{number}")(x)
            maps.append(x)
        return maps


class Head(nn.Module):
    def __init__(self, cin, hidden, dim, num_grid):
        super().__init__()
        self.num_grid = num_grid
        self.mlp = nn.Sequential(nn.Linear(cin, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.mlp2 = nn.Sequential(nn.Conv2d(cin, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))
        for module in self.mlp:  # the 1×1 convolutions keep PyTorch's own initialisation
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def to_grid(self, x):
        return F.adaptive_avg_pool2d(x, self.num_grid) if self.num_grid else x

    def forward(self, x):
        """global [N, D], dense [N, D, P], dense_pooled [N, D]; none is normalised."""
        dense = self.mlp2(self.to_grid(x))
        return self.mlp(x.mean((2, 3))), dense.flatten(2), dense.mean((2, 3))


class DenseCL(nn.Module):
    def __init__(self, depth, hidden, dim, queue_len, num_grid, loss_lambda, lambda_warmup_iters, matching, momentum,
                 temperature):
        super().__init__()
        width = 2048 if depth >= 50 else 512
        self.encoder_q = nn.Sequential(ResNet(depth), Head(width, hidden, dim, num_grid))
        self.encoder_k = nn.Sequential(ResNet(depth), Head(width, hidden, dim, num_grid))
        for parameter in self.encoder_k.parameters():
            parameter.requires_grad = False
        self.loss_lambda, self.lambda_warmup_iters, self.matching = loss_lambda, lambda_warmup_iters, matching
        self.momentum, self.temperature = momentum, temperature
        self.unit = partial(F.normalize, dim=1)
        for name in ("queue", "queue2"):
            self.register_buffer(name, F.normalize(torch.randn(dim, queue_len), dim=0))
            self.register_buffer(f"{name}_ptr", torch.zeros(1, dtype=torch.long))

    def encode(self, encoder, x):
        """A dict of everything that an encoder gives for x."""
        maps = encoder[0](x)
        raw = dict(zip(("global", "dense", "dense_pooled"), encoder[1](maps[-1])))
        raw["features"] = encoder[1].to_grid(maps[-1]).flatten(2)
        unit = {name: self.unit(value) for name, value in raw.items()}
        return {"view": x, **{f"stage{i}": m for i, m in enumerate(maps, 1)},
                **{f"{name}_raw": raw[name] for name in raw}, **unit}

    def forward(self, view_q, view_k, step, permutation):
        """Everything of one step but the optimizer: a dict of tensors with `loss`; `permutation` is of the global batch."""
        q = self.encode(self.encoder_q, normalise(view_q, self.queue.dtype))
        with torch.no_grad():
            for a, b in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
                b.mul_(self.momentum).add_(a, alpha=1 - self.momentum)
            n = len(view_k)
            mine = slice(rank() * n, (rank() + 1) * n)
            shuffled = gather(view_k)[permutation[mine]]
            k = self.encode(self.encoder_k, normalise(shuffled, self.queue.dtype))
            everyones = {name: gather(value)[permutation.argsort()] for name, value in k.items()}
            k = {name: value[mine] for name, value in everyones.items()}

            of = "features" if self.matching == "backbone" else "dense"
            similarity = torch.einsum("ncp,ncr->npr", q[of], k[of])  # [N, P, P]
            matches = similarity.argmax(2)  # [N, P]
            best = similarity.topk(2, dim=2).values if similarity.shape[2] > 1 else torch.stack([similarity[..., 0]] * 2, 2)
            positive = torch.gather(k["dense"], 2, matches[:, None].expand(-1, k["dense"].shape[1], -1))  # [N, D, P]

        loss_global, accuracy = self._info_nce(q["global"], k["global"], self.queue)
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (q["dense"], positive)]  # [N·P, D], picture by picture
        loss_dense, dense_accuracy = self._info_nce(*rows, self.queue2)
        weight = 0.0 if step < self.lambda_warmup_iters else self.loss_lambda
        loss = (1 - weight) * loss_global + weight * loss_dense
        self._enqueue("queue", everyones["global"])
        self._enqueue("queue2", everyones["dense_pooled"])
        return {"loss": loss, "loss_global": loss_global, "loss_dense": loss_dense, "matches": matches, "accuracy": accuracy,
                "dense_accuracy": dense_accuracy, "gap": best[..., 0] - best[..., 1],
                **{f"q_{a}": b for a, b in q.items()}, **{f"k_{a}": b for a, b in k.items()}}

    def _info_nce(self, query, positive, queue):
        queue = queue.clone()  # a loss never sees its own keys
        logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ queue], 1)
        label = torch.zeros(len(query), dtype=torch.long)
        accuracy = (logits.argmax(1) == 0).to(logits.dtype).mean()
        return F.cross_entropy(logits / self.temperature, label), accuracy

    def _enqueue(self, name, keys):
        queue, pointer = getattr(self, name), getattr(self, f"{name}_ptr")
        rows = (int(pointer) + torch.arange(len(keys))) % queue.shape[1]
        queue[:, rows] = keys.T
        pointer[0] = (int(pointer) + len(keys)) % queue.shape[1]


def normalise(x, dtype):
    """uint8 [N, H, W, 3] → [N, 3, H, W], by the formula of torchvision's ToTensor and Normalize."""
    x = x.permute(0, 3, 1, 2).to(dtype) / 255
    return (x - torch.tensor(MEAN, dtype=dtype).view(3, 1, 1)) / torch.tensor(STD, dtype=dtype).view(3, 1, 1)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x):
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
