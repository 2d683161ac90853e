"""Features of pictures by onnxruntime, from an export with --onnx; needs no Paddle:
python deploy/onnx/infer.py --model-dir output/RUN/inference --image-dir PICTURES --output features.npz"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import extraction  # noqa: E402


def main():
    arguments = extraction.parser(__doc__).parse_args()

    def engine(model):
        from ppdensecl.inference.engines import OnnxEngine

        return OnnxEngine(model, arguments.device, arguments.cpu_threads)

    extraction.extract(arguments, engine)


if __name__ == "__main__":
    extraction.run(main)
