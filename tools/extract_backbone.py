"""Writes the query encoder's backbone alone: python tools/extract_backbone.py output/RUN/latest backbone.pdparams"""

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("checkpoint", help="path without suffix, or the .pdparams")
    parser.add_argument("out", help="file to write, e.g. backbone.pdparams")
    arguments = parser.parse_args()
    from ppdensecl.engine.checkpoint import extract_backbone

    names = extract_backbone(arguments.checkpoint, arguments.out)
    print(f"{arguments.out}: {len(names)} entries of the query encoder's backbone")


if __name__ == "__main__":
    command_line.run(main)
