"""Pre-trains DenseCL (or MoCo-v2): python tools/train.py -c configs/densecl_r18_photos.yaml -o data.root=/my/pictures"""

import command_line


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT",
                        help="go on from the newest whole checkpoint of output_dir, or from the one given")
    parser.add_argument("--overwrite", action="store_true", help="delete the checkpoints of an earlier run in output_dir")
    parser.add_argument("--print-config", action="store_true", help="show the merged config and end")
    arguments = parser.parse_args()
    config = command_line.read_config(arguments)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return
    from ppdensecl.engine.trainer import Trainer

    Trainer(config, arguments.resume, arguments.overwrite).fit()


if __name__ == "__main__":
    command_line.run(main)
