"""Features of pictures by Paddle Inference:
python deploy/inference_python/infer.py --model-dir output/RUN/inference --image-dir PICTURES --output features.npz"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import extraction  # noqa: E402

from ppdensecl.errors import UserError  # noqa: E402

TOLERANCE = 1e-4  # of the largest value, between the exported network and the training-side one


def main():
    parser = extraction.parser(__doc__)
    extraction.add_switch(parser, "--mkldnn", "oneDNN's kernels in place of Paddle's own, on the CPU")
    extraction.add_switch(parser, "--tensorrt", "on a GPU")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"], help="fp16 is for GPUs")
    parser.add_argument("--check-with", metavar="CKPT", help="compare all outputs with those of the training-side model of this "
                        f"checkpoint on the CPU; more than {TOLERANCE} of the largest value apart is an error (on a GPU set "
                        "NVIDIA_TF32_OVERRIDE=0 for whole float32)")
    arguments = parser.parse_args()
    if arguments.check_with and arguments.precision != "fp32":
        raise UserError(f"--check-with compares to {TOLERANCE}, which --precision {arguments.precision} cannot give; leave one "
                        "of them out")

    def engine(model):
        from ppdensecl.inference.engines import PaddleEngine

        return PaddleEngine(model, arguments.device, arguments.cpu_threads, arguments.mkldnn, arguments.precision,
                            arguments.tensorrt, arguments.batch_size)

    if not arguments.check_with:
        extraction.extract(arguments, engine)
        return
    from ppdensecl.engine import device
    from ppdensecl.inference import exported
    from ppdensecl.interop.export import Comparison

    device.select("cpu")  # of the training-side model: nothing is shortened there
    comparison = Comparison(arguments.check_with, exported.read(arguments.model_dir).outputs, TOLERANCE)
    extraction.extract(arguments, engine, comparison.add)
    print(f"checked: the training-side model of {arguments.check_with} gives the same, to {comparison.worst:.0e} of the largest "
          "value")


if __name__ == "__main__":
    extraction.run(main)
