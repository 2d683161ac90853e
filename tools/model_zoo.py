"""Packs a checkpoint's backbone for publishing, and verifies a packed one.

python tools/model_zoo.py pack output/RUN/latest --out zoo --name densecl_r50_coco_800ep --license Apache-2.0
python tools/model_zoo.py verify zoo/densecl_r50_coco_800ep-1f2e3d4c.pdparams

The file is the query encoder's backbone in float32; tools/eval.py, export_finetune.py and convert_weights.py read it.
"""

import argparse

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", allow_abbrev=False, help="write NAME-<8 hex digits>.pdparams and .json")
    packing.add_argument("checkpoint", metavar="CKPT", help="of this project, with or without suffix; an extracted backbone; or "
                                                            "others' .pth, .pt, .safetensors")
    packing.add_argument("--out", required=True, metavar="DIR", help="where to write")
    packing.add_argument("--name", required=True, help="what it is, e.g. densecl_r50_coco_800ep")
    packing.add_argument("--license", metavar="TEXT", help="under which others may use the weights (default: not stated)")
    verifying = commands.add_parser("verify", allow_abbrev=False, help="check a packed file against its name and metadata")
    verifying.add_argument("file", metavar="FILE", help="the .pdparams; its .json lies beside it")
    arguments = parser.parse_args()
    from ppdensecl.interop import model_zoo

    if arguments.command == "pack":
        print("\n".join(model_zoo.pack(arguments.checkpoint, arguments.out, arguments.name, arguments.license)))
    else:
        print(model_zoo.verify(arguments.file))


if __name__ == "__main__":
    command_line.run(main)
