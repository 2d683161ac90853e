"""Does the dense branch tell places by what they show, or by where they are?
python benchmarks/positions.py output/RUN/epoch_16 …: mean cosines of a query cell's dense embedding, as the loss has them

match      with its match's in the other view, the positive of the loss
others     with the key embeddings of its own position in the map, of other pictures
elsewhere  with those of other positions, of other pictures
queue      with other pictures' keys as they go into the dense queue: averaged over the map, then normalised
"""

import argparse
import sys
from pathlib import Path

import measure  # noqa: F401, sets up the environment before paddle
import numpy as np
import paddle

from ppdensecl.config import load_config
from ppdensecl.data.sources import spread
from ppdensecl.data.transforms import Augmentation
from ppdensecl.data.views import two_views
from ppdensecl.engine import checkpoint, device
from ppdensecl.engine.building import build_model, build_source
from ppdensecl.errors import UserError
from ppdensecl.models import matching
from ppdensecl.models.densecl import normalise


@paddle.no_grad()
def cosines(path, count):
    config = load_config(path.parent / "config.yaml")
    device.select("cpu")
    model = build_model(config)
    checkpoint.set_weights(model, checkpoint.load_weights(path), path)
    if not model.dense:
        raise UserError(f"{path}: is of MoCo-v2, which has no dense branch; give a run with model.loss_lambda above 0")
    model.train()  # BatchNorm with the batch's statistics, as in training
    views = np.stack([two_views(picture, Augmentation(size=config.data.size), config.seed + 1, 0, index)
                      for index, picture in spread(build_source(config), count)])
    _, query, _, seen = model.encoder_q(normalise(paddle.to_tensor(views[:, 0])))  # [N, P, D], [N, P, C]
    _, key, pooled, other = model.encoder_k(normalise(paddle.to_tensor(views[:, 1])))
    positive = float((query * matching.take(key, matching.match(seen, other))).sum(-1).mean())
    query, key, pooled = query.numpy(), key.numpy(), pooled.numpy()
    cells, same = np.eye(query.shape[1], dtype=bool), np.eye(len(query), dtype=bool)
    each = np.einsum("npd,mqd->nmpq", query, key)
    return {"match": positive, "others": each[~same][:, cells].mean(), "elsewhere": each[~same][:, ~cells].mean(),
            "queue": np.einsum("npd,md->nmp", query, pooled)[~same].mean()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=128, help="pictures of the training, in new views (default %(default)s)")
    arguments = parser.parse_args()
    try:
        for path in arguments.checkpoint:
            print(path, ", ".join(f"{name} {value:.2f}" for name, value in cosines(path, arguments.count).items()), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
