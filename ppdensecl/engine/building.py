"""What a config stands for: the model, its pictures; and what of it cannot run."""

import paddle

from ppdensecl.config import Config
from ppdensecl.data.sources import open_source
from ppdensecl.errors import UserError
from ppdensecl.models import DenseCL


def build_model(config: Config) -> DenseCL:
    """The model of a config, initialised from its seed."""
    paddle.seed(config.seed)
    return DenseCL(**config.model.model_dump(), seed=config.seed)


def build_source(config: Config):
    """The pictures of a config, see `open_source`. Raises UserError."""
    d = config.data
    return open_source(d.source, root=d.root, list_file=d.list_file, annotation=d.annotation, seed=config.seed,
                       synthetic_count=d.synthetic_count)


def check(config: Config, where):
    """Raises UserError for keys that do not go with each other, or not with the device `where`, such as `gpu:0`."""
    optim, model = config.optim, config.model
    if optim.amp != "off" and where == "cpu":
        raise UserError(f"'optim.amp' is '{optim.amp}', but Paddle's autocast does nothing on the CPU; use off")
    least = {"off": 0, "float16": 7, "bfloat16": 8}[optim.amp]
    if least and paddle.device.cuda.get_device_capability()[0] < least:  # Paddle would only warn, and compute in float32
        raise UserError(f"'optim.amp' is '{optim.amp}', for which this GPU is too old (it needs compute capability {least}.0); "
                        "use off")
    if optim.to_static and (optim.recompute or optim.amp != "off"):
        raise UserError("'optim.to_static' is true, which goes neither with optim.recompute nor with optim.amp; use one of them")
    if model.sync_bn and where == "cpu":
        raise UserError("'model.sync_bn' is true, but Paddle's SyncBatchNorm has no CPU kernel; use false")
    if model.sync_bn and model.bn_groups > 1:
        raise UserError("'model.sync_bn' is true and 'model.bn_groups' more than 1: the one joins batches for their "
                        "statistics, the other parts them; use one of the two")
    if config.data.batch_size % model.bn_groups:
        raise UserError(f"'model.bn_groups' is {model.bn_groups}, which does not divide data.batch_size "
                        f"{config.data.batch_size}; use a divisor of it")
