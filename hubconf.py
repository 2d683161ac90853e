"""Entry points of paddle.hub: a backbone from a clone, which need not be installed.

    backbone = paddle.hub.load("path/to/the/clone", "densecl_resnet50", source="local", pretrained="backbone.pdparams")
    maps = backbone(pictures)  # float32 [N, 3, H, W] → [N, 2048, H/32, W/32]
"""

import ppdensecl as _ppdensecl  # noqa: F401 (paddle.hub takes the clone off sys.path before it calls an entry point)

dependencies = ["numpy", "cv2", "PIL", "yaml"]

_HELP = """The ResNet-{depth} of DenseCL: its convolutional part, in eval mode.

Takes float32 [N, 3, H, W], RGB on a scale of 0 to 1, normalised with mean (0.485, 0.456, 0.406) and deviation
(0.229, 0.224, 0.225); gives the last map, float32 [N, {width}, H/32, W/32], not normalised. `stages(x)` gives all four.
Names of parameters are torchvision's.

pretrained: a file, of which every tensor of the backbone must be there and fit: a checkpoint of tools/train.py (with or
    without suffix; the query encoder's backbone is taken), a backbone of tools/extract_backbone.py, or a .pth, .pt or
    .safetensors of the authors' code, moco, mmselfsup, mmpretrain or torchvision. None gives RANDOM weights, the
    start of a training. Raises ppdensecl.errors.UserError.
"""


def _entry(depth, width):
    def entry(pretrained=None):
        from ppdensecl.engine import checkpoint
        from ppdensecl.errors import UserError
        from ppdensecl.interop.foreign import read
        from ppdensecl.models import ResNet

        backbone = ResNet(depth)
        if pretrained is not None:
            found = read(str(pretrained), backbone=True)
            if (found.depth, found.stages) != (depth, 4):
                raise UserError(f"{found.file}: holds a ResNet-{found.depth} with {found.stages} of 4 stages, expected a whole "
                                f"ResNet-{depth}")
            checkpoint.set_weights(backbone, found.arrays, found.file)
        backbone.eval()
        return backbone

    entry.__name__ = entry.__qualname__ = f"densecl_resnet{depth}"
    entry.__doc__ = _HELP.format(depth=depth, width=width)
    return entry


densecl_resnet18 = _entry(18, 512)
densecl_resnet34 = _entry(34, 512)
densecl_resnet50 = _entry(50, 2048)
densecl_resnet101 = _entry(101, 2048)
