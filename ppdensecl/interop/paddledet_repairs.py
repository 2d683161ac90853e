"""Repairs of PaddleDetection 2.6.0. It was written for a Paddle in which a tensor always had a dimension."""

import contextlib
import functools

import paddle
import ppdet
from ppdet.modeling import ops
from ppdet.modeling.proposal_generator.rpn_head import RPNHead
from ppdet.utils.logger import setup_logger

LOGGER = setup_logger("ppdet.ppdensecl")


def repair():
    """Replaces what fails in PaddleDetection 2.6.0, once, and says so; other versions stay as they are."""
    if ppdet.__version__ != "2.6.0":
        LOGGER.warning(f"PaddleDetection {ppdet.__version__}: ppdensecl knows 2.6.0, and repairs nothing here")
    elif not getattr(paddle.concat, "takes_0d", False):
        new = int(paddle.__version__.split(".")[0]) >= 3
        paddle.concat = _takes_0d(paddle.concat)
        RPNHead._gen_proposal = _gen_proposal
        if new:
            ops.multiclass_nms = _multiclass_nms
        LOGGER.info("PaddleDetection 2.6.0: ppdensecl lets paddle.concat take 0-d tensors, and RPNHead count in a 1-d one"
                    + (", and calls multiclass_nms as Paddle 3 has it" if new else ""))


def _takes_0d(concat):
    @functools.wraps(concat)  # without it to_static would look into this function, for ever
    def concat_0d(x, axis=0, name=None):
        return concat([item.reshape([1]) if item.ndim == 0 else item for item in x], axis, name)
    concat_0d.takes_0d = True
    return concat_0d


_their_gen_proposal = RPNHead._gen_proposal  # a name of the module: Paddle 2.6's to_static finds none of a closure


def _gen_proposal(self, scores, bbox_deltas, anchors, inputs):
    rois, count = _their_gen_proposal(self, scores, bbox_deltas, anchors, inputs)
    return rois, count.reshape([-1])


def _multiclass_nms(bboxes, scores, score_threshold, nms_top_k, keep_top_k, nms_threshold=0.3, normalized=True, nms_eta=1.0,
                    background_label=-1, return_index=False, return_rois_num=True, rois_num=None, name=None):
    found, index, count = paddle._C_ops.multiclass_nms3(
        bboxes, scores, rois_num, score_threshold, nms_top_k, keep_top_k, nms_threshold, normalized, nms_eta, background_label)
    return found, count if return_rois_num else None, index if return_index else None


@contextlib.contextmanager
def full_graph():
    """Both Paddles would else trace in pieces, which have no program to save."""
    to_static = paddle.jit.to_static
    paddle.jit.to_static = functools.partial(to_static, full_graph=True)
    try:
        yield
    finally:
        paddle.jit.to_static = to_static
