"""Writes weights that are the same on every machine, which no training's are, for results that can be compared:
python test_tipc/fixed_weights.py -c configs/densecl_r50.yaml --output test_tipc/output/densecl_r50/pretrained.pdparams"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import command_line  # noqa: E402


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--output", required=True, metavar="FILE.pdparams")
    arguments = parser.parse_args()
    config = command_line.read_config(arguments)
    import numpy as np

    from ppdensecl.engine import checkpoint
    from ppdensecl.models import ResNet

    backbone = ResNet(int(config.model.backbone[len("resnet"):]), stages=config.model.stages)
    random = np.random.Generator(np.random.Philox(key=20112021))

    def draw(name, shape):
        """Uniform numbers that keep the size of what passes through; each array has an effect on the features."""
        numbers = random.random(shape, dtype=np.float64) - 0.5
        if len(shape) == 4:  # a convolution, as in Kaiming's initialisation
            return numbers * np.sqrt(24 / np.prod(shape[1:]))
        if name.endswith((".weight", "_variance")):
            return 0.75 + 0.5 * numbers
        return 0.2 * numbers

    checkpoint.write_arrays(arguments.output, {name: draw(name, value.shape).astype(np.float32)
                                               for name, value in sorted(backbone.state_dict().items())})
    print(f"{arguments.output}: fixed weights of {config.model.backbone}")


if __name__ == "__main__":
    command_line.run(main)
