"""What other projects call the arrays of a DenseCL or MoCo model, and which way round they store them.

A layout is a table of (their prefix, our prefix); the longest prefix that fits a name counts. Our names are those of
`DenseCL.state_dict()`, or for a backbone alone torchvision's with Paddle's `_mean` and `_variance`.

| layout | whose files |
|---|---|
| ours | this project |
| densecl | the authors' code, OpenSelfSup, mmselfsup 0.x; the MoCo of the last two has no `mlp2` and `queue2` |
| mmpretrain | mmselfsup 1.x, mmpretrain |
| moco | facebookresearch/moco, version 2 |
| passl | PASSL: the authors' names, but Paddle's leaves and Linear layers |
| backbone | torchvision, and whatever was extracted under its names |
"""

from __future__ import annotations

import numpy as np

from ppdensecl.errors import UserError
from ppdensecl.interop.safetensors_file import show

BACKBONE = "encoder_q.backbone."
_QUEUES = [("queue", "queue.keys"), ("queue_ptr", "queue.pointer"),
           ("queue2", "queue_dense.keys"), ("queue2_ptr", "queue_dense.pointer")]
_NECK = [("mlp.0.", "head.global_fc1."), ("mlp.2.", "head.global_fc2."),
         ("mlp2.0.", "head.dense_conv1."), ("mlp2.2.", "head.dense_conv2.")]


def _encoder(ours, backbone, neck, parts=_NECK):
    return [(backbone, f"{ours}.backbone."), *((neck + theirs, f"{ours}.{part}") for theirs, part in parts)]


def _sequential(encoder):  # of backbone and neck
    return _encoder(encoder, f"{encoder}.0.", f"{encoder}.1.")


_AUTHORS = _QUEUES + _sequential("encoder_q") + _sequential("encoder_k")
_TABLES = {
    "ours": [(name, name) for name in ("queue.", "queue_dense.", "encoder_q.", "encoder_k.")],
    "densecl": _AUTHORS,
    "mmpretrain": (_QUEUES + _encoder("encoder_q", "backbone.", "neck.")
                   + _encoder("encoder_k", "encoder_k.module.0.", "encoder_k.module.1.")),
    "moco": _QUEUES[:2] + [pair for name in ("encoder_q", "encoder_k") for pair in _encoder(
        name, f"{name}.", f"{name}.", [("fc.0.", "head.global_fc1."), ("fc.2.", "head.global_fc2.")])],
    "passl": _AUTHORS,
    "backbone": [("", ""), ("backbone.", "")],
}
LAYOUTS = {
    "ours": "checkpoint of this project",
    "densecl": "checkpoint of the authors' code (OpenSelfSup)",
    "mmpretrain": "checkpoint of mmselfsup 1.x or mmpretrain",
    "moco": "checkpoint of facebookresearch/moco",
    "passl": "checkpoint of PASSL",
    "backbone": "backbone under torchvision's names",
}
_COPIES = {layout: ("backbone.", "encoder_q.0.") for layout in ("densecl", "passl")}  # self.backbone = self.encoder_q[0]
_WRAPPED = "module."  # what torch's DistributedDataParallel puts before every name; facebookresearch/moco saves it so
_LEAVES = [(".running_mean", "._mean"), (".running_var", "._variance")]
_PADDLE = ("ours", "passl")  # whose leaves and Linear layers are Paddle's
_RESNET = ("conv1.", "bn1.", "layer")
_COUNTER, _STEPS = ".num_batches_tracked", "encoder_k.steps"  # of PyTorch's BatchNorm, of mmengine's averaged model
COUNTERS = "counters that Paddle lacks"


def listed(names):
    """At most ten of the names, for an error message."""
    names = list(names)
    return ", ".join(map(show, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def recognise(names):
    """The layout to which names belong. Raises UserError where there is none."""
    names = _unwrapped(dict.fromkeys(names))
    if any(name.startswith("encoder_q.backbone.") for name in names):
        return "ours"
    if any(name.startswith("encoder_q.0.") for name in names):
        return "passl" if any(name.endswith("._mean") for name in names) else "densecl"
    if any(name.startswith("encoder_k.module.") for name in names):
        return "mmpretrain"
    if "encoder_q.conv1.weight" in names:
        return "moco"
    if "conv1.weight" in names or "backbone.conv1.weight" in names:
        return "backbone"
    raise UserError("holds neither a DenseCL or MoCo model nor a ResNet under torchvision's names, but "
                    + (listed(names) or "no arrays"))


def to_torch(arrays, layout="densecl", copies=False, batches_tracked=None, wrapped=None):
    """{our name: array} → {their name: array} of `layout`; but for PASSL's, Linear weights are then [out, in], queues [D, K].

    Any part of a model will do: parameters, gradients, buffers. `copies` adds the authors' second `backbone.*`;
    `batches_tracked` adds the counters that Paddle lacks: one number for all, or {name: number} as from `translate`;
    `wrapped` puts `module.` before all names (None: where the layout's project does).
    Raises UserError, listing names without a place in the layout.
    """
    order = [ours for _, ours in _TABLES[layout]]
    backwards = [(ours, theirs) for theirs, ours in _TABLES[layout]]
    found, unknown = {}, []
    for name, array in arrays.items():
        ours, theirs = _longest(backwards, name)
        if ours is None or not _known(name, layout):
            unknown.append(name)
            continue
        leaves = [] if layout in _PADDLE else [(b, a) for a, b in _LEAVES]
        found[_renamed(name, ours, theirs, leaves)] = (order.index(ours), name, turned(name, array, layout))
    if unknown:
        raise UserError(f"{len(unknown)} entries have no place in a {LAYOUTS[layout]}: {listed(unknown)}")
    result = {}
    for name in sorted(found, key=lambda name: found[name][0]):
        _, ours, result[name] = found[name]
        if ours.endswith("._variance") and layout not in _PADDLE:
            _count(result, name[:-len(".running_var")] + _COUNTER, ours[:-len("._variance")] + _COUNTER, batches_tracked)
    if layout == "mmpretrain":
        _count(result, _STEPS, _STEPS, batches_tracked)
    if copies:
        copy, original = _COPIES[layout]
        result.update({copy + name[len(original):]: array for name, array in list(result.items())
                       if name.startswith(original)})
    wrapped = layout == "moco" if wrapped is None else wrapped
    return {_WRAPPED + name: array for name, array in result.items()} if wrapped else result


def from_torch(arrays, layout="densecl"):
    """The inverse of `to_torch`: {their name: array} → {our name: array}. Raises UserError."""
    return translate(arrays, layout)[0]


def translate(arrays, layout, backbone=False):
    """{their name: array} → ({our name: array}, {reason: {name: array}} of what has no place here).

    The names under the reason COUNTERS are what they would be here, all others theirs. With `backbone` only the query
    encoder's backbone is taken, under torchvision's names, and all else is left out.
    Raises UserError: names that nothing here knows are listed; two of theirs are one of ours; copies differ.
    """
    arrays = _unwrapped(arrays)
    if layout == "moco" and not backbone and "encoder_q.fc.weight" in arrays:
        raise UserError("is a checkpoint of MoCo v1, whose head of one linear layer has no place in this model; "
                        "its backbone can be used, with --backbone")
    found, left_out, unknown = {}, {}, []
    for name, array in arrays.items():
        theirs, ours = _longest(_TABLES[layout], name)
        renamed = None if theirs is None else _renamed(name, theirs, ours, _LEAVES)
        known = renamed is not None and _known(renamed, layout)
        reason = _reason(name, renamed, arrays, layout)
        if backbone and not (known and (layout == "backbone" or renamed.startswith(BACKBONE))):
            reason = "what is not the query encoder's backbone"
        if reason:
            left_out.setdefault(reason, {})[renamed if reason == COUNTERS and known else name] = array
        elif not known:
            unknown.append(name)
        elif renamed in found:
            raise UserError(f"'{show(name)}' and another entry are both '{show(renamed)}' here; expected one")
        else:
            found[renamed] = turned(renamed, array, layout)
    if unknown:
        raise UserError(f"{len(unknown)} entries have no place in a {LAYOUTS[layout]}: {listed(unknown)}; "
                        "--backbone takes the backbone alone")
    if backbone and layout != "backbone":
        for part in filter(None, (found, left_out.get(COUNTERS))):
            whole = dict(part)
            part.clear()
            part.update({name[len(BACKBONE):]: array for name, array in whole.items()})
    return found, left_out


def _count(result, name, ours, counts):
    count = counts.get(ours) if isinstance(counts, dict) else counts
    if count is not None:
        result[name] = np.array(count, np.int64)


def _reason(name, renamed, arrays, layout):
    """Why an entry has no place in our model, in words, or None. Raises UserError where a copy is none."""
    copy, original = _COPIES.get(layout, (None, None))
    if copy and name.startswith(copy):
        twin = original + name[len(copy):]
        if twin not in arrays or not _same(arrays[twin], arrays[name]):
            raise UserError(f"'{show(name)}' should be a copy of '{show(twin)}' and is not; "
                            "the entries belong to two different models")
        return f"copies of {original}*"
    if (renamed and renamed.endswith(_COUNTER)) or (layout == "mmpretrain" and name == _STEPS):
        return COUNTERS
    return "a classifier" if layout == "backbone" and renamed in ("fc.weight", "fc.bias") else None


def _known(ours, layout):
    """Whether what a name is here can be an entry of our model: inside a backbone, only what a ResNet has."""
    part = ours if layout == "backbone" else ours.partition(".backbone.")[2]
    return not part or part.startswith(_RESNET)


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def is_wrapped(names):
    return bool(names) and all(name.startswith(_WRAPPED) for name in names)


def _unwrapped(arrays):
    return {name[len(_WRAPPED):]: array for name, array in arrays.items()} if is_wrapped(arrays) else arrays


def _longest(table, name):
    """The pair whose first prefix is the longest that fits; one without a full stop at its end must be the whole name."""
    return max(((a, b) for a, b in table if (name.startswith(a) if a.endswith(".") or not a else name == a)),
               key=lambda pair: len(pair[0]), default=(None, None))


def _renamed(name, prefix, replacement, leaves):
    name = replacement + name[len(prefix):]
    return next((name[:-len(a)] + b for a, b in leaves if name.endswith(a)), name)


def turned(ours, array, layout):
    """`array` in the direction that the layout has for our name, or from there in ours: both are the same."""
    linear = ours.endswith((".global_fc1.weight", ".global_fc2.weight")) and layout not in _PADDLE
    queue = ours in ("queue.keys", "queue_dense.keys") and layout != "ours"
    return np.ascontiguousarray(array.T) if linear or queue else array
