"""Everything that knows ranks. In a single process without a group all of it is the identity.

Shuffling BN (He et al., "Momentum Contrast", section 3.3): the key encoder sees a batch whose pictures come from other
processes, so that a key's BatchNorm statistics do not give away its query.
"""

import contextlib
import hashlib

import numpy as np
import paddle
import paddle.distributed as dist

from ppdensecl import rng
from ppdensecl.errors import UserError
from ppdensecl.machine import to_device

WIDE = 2**15  # numbers in a row


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
    return _begin_gather(x)()


def _begin_gather(x):
    """Begins to gather; what it returns waits for the end and gives the rows of all ranks."""
    if world_size() == 1:
        return lambda: x
    x = x.contiguous()
    rows = paddle.empty([world_size() * x.shape[0], *x.shape[1:]], dtype=x.dtype)
    # Into one tensor: dist.all_gather makes a list, whose concatenation is one more copy of everything.
    task = dist.stream.all_gather(rows, x, sync_op=False)

    def end(sent=x):  # which has to live until it has arrived
        task.wait()
        return rows
    return end


def agree(facts=dict, error=None):
    """Called by all ranks before they go on: raises UserError on all of them where one cannot (`error`, its own) or has other
    facts, `facts()` is {what: text}, than rank 0. Nobody is left waiting for a rank that will never come."""
    if error:
        if world_size() > 1:
            _exchange([str(error), ""])
        raise error
    if world_size() == 1:
        return
    facts = facts()
    names = "\n".join(facts)
    for r, (message, theirs) in enumerate(answers := _exchange(["", names])):
        if message:
            raise UserError(f"rank {r}: {message}")
        if theirs != answers[0][1]:
            raise UserError(f"rank {r} runs another version of ppdensecl than rank 0; install the same on all machines")
    answers = _exchange(facts.values()) if facts else ()
    for r, texts in enumerate(answers):
        for what, here, there in zip(facts, answers[0], texts):
            if here != there:
                raise UserError(f"rank {r} has another {what} than rank 0, {there} instead of {here}; "
                                "start all ranks with the same")


@contextlib.contextmanager
def together(facts=dict):
    """Context: a UserError or OSError of one rank within it becomes a UserError of all ranks, and `facts` are compared at its end;
    see `agree`."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    except OSError as caught:
        error = UserError(f"{caught.filename or 'a file'}: {caught.strerror or caught}")
    agree(facts, error)


def _exchange(texts, width=1024):
    """The texts of all ranks, [[str] of each rank]; what is longer than `width` bytes is represented by its digest."""
    rows = np.zeros((1, len(texts), width), np.uint8)
    for row, text in zip(rows[0], texts):
        data = text.encode()
        data = data if len(data) <= width else data[:width - 70] + b"... " + hashlib.sha256(data).hexdigest().encode()
        row[:len(data)] = np.frombuffer(data, np.uint8)
    return [[bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in rank]
            for rank in gather(paddle.to_tensor(rows)).numpy()]


def mean(numbers):
    """The mean over all ranks of each of some numbers: [float] → [float]."""
    return gather(paddle.to_tensor([numbers], dtype="float64")).numpy().mean(axis=0).tolist()


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
            self.mine, self.inverse, self.inverse_mine = map(to_device, (local(permutation), inverse, local(inverse)))

    def scatter(self, x):
        """This rank's share of the shuffled batch: x [n, …] → [n, …], whose row i on rank r is row permutation[r·n + i]."""
        return x if self.mine is None else paddle.gather(gather(x), self.mine)

    def restore(self, everyones, mine=()):
        """Begins to bring results for a scattered batch back into the order before the shuffle; what it returns ends it and
        gives the tensors `everyones`, [n, …] → [R·n, …], and `mine`, [n, …] → [n, …], this rank's rows alone. What is narrow
        travels in one message; a map that is wide on its own, because copying it there and back costs more than a message."""
        tensors = (*everyones, *mine)
        if self.mine is None:
            return lambda: tensors
        rows = [x.reshape([len(x), -1]) for x in tensors]
        narrow = [i for i, x in enumerate(rows) if x.shape[1] < WIDE]
        messages = [narrow, *([i] for i in range(len(rows)) if i not in narrow)]
        gathered = [(message, _begin_gather(paddle.concat([rows[i] for i in message], axis=1) if len(message) > 1
                                            else rows[message[0]])) for message in messages if message]

        def end():
            found = [None] * len(rows)
            for message, arrived in gathered:
                parts = arrived()
                parts = parts.split([rows[i].shape[1] for i in message], axis=1) if len(message) > 1 else [parts]
                for i, part in zip(message, parts):
                    index = self.inverse if i < len(everyones) else self.inverse_mine
                    found[i] = paddle.gather(part, index).reshape([-1, *tensors[i].shape[1:]])
            return tuple(found)
        return end
