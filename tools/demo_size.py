"""Prints batch size and epochs with which a folder of pictures makes about 160 iterations: for tools/demo.sh."""

import command_line


def main():
    parser = command_line.parser(__doc__, config=False)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    from ppdensecl.data.sources import FolderSource

    pictures = len(FolderSource(folder))
    batch = min(32, pictures)
    print(batch, -(-160 // (pictures // batch)))


if __name__ == "__main__":
    command_line.run(main)
