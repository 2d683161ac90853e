"""Converts a PyTorch, safetensors or PASSL checkpoint into one of this project, or back with --to torch; needs no PyTorch.

python tools/convert_weights.py densecl_r50.pth densecl_r50             a checkpoint, to go on training from
python tools/convert_weights.py --backbone densecl_r50.pth b.pdparams   its backbone alone
python tools/convert_weights.py --to torch output/RUN/latest back.pth   back, or .safetensors
"""

import argparse

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="IN", help=".pth, .pt, .safetensors, .pdparams, or a checkpoint without suffix")
    parser.add_argument("out", metavar="OUT", help="what to write: a checkpoint with or without .pdparams; with --to torch a "
                                                   ".pth, .pt or .safetensors")
    parser.add_argument("--backbone", action="store_true", help="take the query encoder's backbone alone")
    parser.add_argument("--to", choices=["paddle", "torch"], default="paddle")
    parser.add_argument("-c", "--config", help="the run that shall go on from it (default: the recipe, with the sizes found)")
    parser.add_argument("-o", "--override", nargs="+", action="append", default=[], metavar="KEY=VALUE",
                        help="set values of the config")
    arguments = parser.parse_args()
    if (arguments.override and not arguments.config) or (arguments.config and (arguments.backbone or arguments.to == "torch")):
        parser.error("-c is for a whole checkpoint of this project, and -o needs it")
    if arguments.out.endswith((".pth", ".pt", ".safetensors")) != (arguments.to == "torch"):
        parser.error(f"OUT is {arguments.out}; --to torch, and nothing else, writes .pth, .pt and .safetensors")
    from ppdensecl.interop import convert

    if arguments.to == "torch":
        notes = convert.to_torch(arguments.source, arguments.out, arguments.backbone)
    else:
        config = command_line.read_config(arguments) if arguments.config else None
        notes = convert.to_paddle(arguments.source, arguments.out, arguments.backbone, config)
    print("\n".join(notes))


if __name__ == "__main__":
    command_line.run(main)
