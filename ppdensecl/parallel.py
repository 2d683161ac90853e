"""Everything that knows ranks. In a single process without a group all of it is the identity.

Shuffling BN (He et al., "Momentum Contrast", section 3.3): the key encoder sees a batch whose pictures come from other
processes, so that a key's BatchNorm statistics do not give away its query.
"""

import paddle
import paddle.distributed as dist

from ppdensecl import rng


def start():
    """Joins the group that `paddle.distributed.launch` made; without one there is nothing to do."""
    if world_size() > 1:
        from paddle.distributed import fleet

        fleet.init(is_collective=True)


def rank():
    return dist.get_rank()


def world_size():
    return dist.get_world_size()


def is_main():
    return rank() == 0


def wrap(model, optimizer):
    """The model and optimizer as the training loop calls them: as they are, or fleet's data-parallel ones."""
    if world_size() == 1:
        return model, optimizer
    from paddle.distributed import fleet

    return fleet.distributed_model(model), fleet.distributed_optimizer(optimizer)


def gather(x):
    """The rows of all ranks in rank order: [n, …] → [R·n, …]. No gradient."""
    if world_size() == 1:
        return x
    parts = []
    dist.all_gather(parts, x)
    return paddle.concat(parts, axis=0)


def local(x):
    """This rank's rows of a gathered tensor: [R·n, …] → [n, …]."""
    n = x.shape[0] // world_size()
    return x[rank() * n:(rank() + 1) * n]


class Shuffle:
    """One step's exchange of rows (R·n in all) between the ranks, or between the groups of a batch that are normalised
    apart. The same on all ranks without any message: it is a pure function of seed and step. With one group in one process
    it changes nothing (a batch has the same statistics in any order)."""

    def __init__(self, rows, groups, seed, step):
        self.mine = None
        if world_size() * groups > 1:
            permutation = rng.generator(seed, rng.Purpose.SHUFFLE_BN, step).permutation(rows)
            inverse = permutation.argsort()
            # Copied to the device before the forward passes, not between them.
            self.mine, self.inverse, self.inverse_mine = map(
                paddle.to_tensor, (local(permutation), inverse, local(inverse)))

    def scatter(self, x):
        """This rank's share of the shuffled batch: [n, …] → [n, …], where row i of rank r is row permutation[r·n + i]."""
        return x if self.mine is None else paddle.gather(gather(x), self.mine)

    def restore(self, x):
        """All ranks' results for a scattered batch in the order before the shuffle: [n, …] → [R·n, …]."""
        return x if self.mine is None else paddle.gather(gather(x), self.inverse)

    def restore_local(self, x):
        """This rank's rows of `restore(x)`: [n, …] → [n, …]."""
        return x if self.mine is None else paddle.gather(gather(x), self.inverse_mine)
