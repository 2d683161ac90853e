"""ppdensecl: Dense Contrastive Learning (Wang et al., CVPR 2021) in PaddlePaddle."""

# Under paddlepaddle 2.6 PNG reading hangs when Pillow is imported after paddle: import it before anybody can.
from PIL import Image as _Image  # noqa: F401

__version__ = "0.1.0"
