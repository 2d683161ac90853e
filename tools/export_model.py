"""Writes a checkpoint's backbone for inference, and checks that its numbers stay the same:
python tools/export_model.py -c output/RUN/config.yaml --pretrained output/RUN/latest --output-dir output/RUN/inference --onnx"""

import command_line


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--pretrained", required=True, metavar="CKPT", help="of this project, with or without suffix; an extracted "
                        "or converted backbone .pdparams; or others' .pth, .pt, .safetensors")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="gets inference.json (of Paddle 2 .pdmodel), "
                        ".pdiparams and .yml; an earlier export there is replaced, other files stay")
    parser.add_argument("--stages", type=int, nargs="+", metavar="1..4", help="whose maps are outputs (default: the last); the "
                        "pooled feature is the mean of the last of them")
    parser.add_argument("--view", default="centre", choices=["centre", "whole"], help="what infer.py and the service show the "
                        "network of a picture: its centre (default), or all of it, squeezed; at data.image_size")
    parser.add_argument("--onnx", action="store_true", help="also inference.onnx, checked with onnxruntime")
    arguments = parser.parse_args()
    config = command_line.read_config(arguments)
    from ppdensecl.engine import device
    from ppdensecl.interop.export import export

    device.select("cpu")  # a GPU's shortened multiplications would differ from what they are compared with
    print("\n".join(export(arguments.pretrained, config, arguments.output_dir, arguments.stages, arguments.view, arguments.onnx)))


if __name__ == "__main__":
    command_line.run(main)
