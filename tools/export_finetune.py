"""Writes a checkpoint's backbone as the file that another project fine-tunes from, and lets that project load it first.

python tools/export_finetune.py output/RUN/latest --to paddleseg --out seg.pdparams     for tools/finetune_seg.py
python tools/export_finetune.py output/RUN/latest --to paddledet --out det.pdparams     for tools/finetune_det.py
python tools/export_finetune.py output/RUN/latest --to paddleclas --out clas.pdparams   with a clone of it in PYTHONPATH
python tools/export_finetune.py densecl_r50.pth --to torch --out backbone.safetensors   torchvision's names, or .pth
"""

import argparse

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", metavar="CKPT", help="of this project, with or without suffix; an extracted or converted "
                                                           "backbone .pdparams; or others' .pth, .pt, .safetensors")
    parser.add_argument("--to", required=True, choices=["paddleseg", "paddledet", "paddleclas", "torch"])
    parser.add_argument("--out", required=True, metavar="FILE", help=".pdparams; for torch .pth, .pt or .safetensors")
    arguments = parser.parse_args()
    from ppdensecl.engine import device
    from ppdensecl.interop.finetune import export

    device.select("cpu")  # a GPU's shortened multiplications would differ from what they are compared with
    print("\n".join(export(arguments.checkpoint, arguments.out, arguments.to)))


if __name__ == "__main__":
    command_line.run(main)
