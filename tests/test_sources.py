"""The sources: what they find, in which order, and what they say about bad input."""

import io
import json
import os
import subprocess
import sys

from PIL import Image

import numpy as np
import pytest

from ppdensecl.data.picture import UndecodableError
from ppdensecl.data.source import Names
from ppdensecl.data.sources import CocoSource, FolderSource, ListSource, SyntheticSource, open_source, spread
from ppdensecl.errors import UserError


def png(value):
    buffer = io.BytesIO()
    Image.new("L", (4, 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def make(folder, *names):
    """Pictures whose grey value is their position in `names`."""
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return folder


def names(source, root=None):
    prefix = f"{root}{os.sep}" if root else ""
    return [source.name(i)[len(prefix) :] for i in range(len(source))]


def values(source):
    return [int(source.picture(i)[0, 0, 0]) for i in range(len(source))]


def refused(*parts):
    """A context that expects a UserError of one sentence with all `parts`."""

    class Refused:
        def __enter__(self):
            self.raises = pytest.raises(UserError)
            self.caught = self.raises.__enter__()

        def __exit__(self, *exception):
            result = self.raises.__exit__(*exception)
            message = str(self.caught.value)
            assert all(str(part) in message for part in parts), message
            assert "\n" not in message
            return result

    return Refused()


# Names


def test_names_hold_any_bytes():
    items = [b"a.jpg", b"", "日本/é.jpg".encode(), b"\xff\xfe.png", b"x" * 300]
    held = Names(iter(items))
    assert list(held) == items and len(held) == 5
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            held[outside]


def test_fingerprint_tells_lists_apart():
    prints = {Names(list_).fingerprint() for list_ in ([b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"], [b"ab"], [])}
    assert len(prints) == 5
    assert Names([b"ab", b"c"]).fingerprint() == Names([b"ab", b"c"]).fingerprint()


# Folder


def test_folder_finds_pictures_at_any_depth(tmp_path):
    make(tmp_path, "b.jpg", "a/deep/er/c.PNG", "a.JPEG", "a/z.webp", "a b/ü.tif")
    (tmp_path / "notes.txt").write_text("no picture")
    make(tmp_path, ".hidden/x.jpg", ".x.jpg", "a/.thumbs/y.jpg")
    make(tmp_path / "trap.jpg", "inside.png")  # a folder whose name looks like a picture
    source = open_source("folder", root=str(tmp_path))
    assert names(source, tmp_path) == sorted(names(source, tmp_path), key=str.encode)
    assert set(names(source, tmp_path)) == {
        "a b/ü.tif", "a.JPEG", "a/deep/er/c.PNG", "a/z.webp", "b.jpg", "trap.jpg/inside.png"
    }  # fmt: skip
    picture = source.picture(len(source) - 2)
    assert picture.shape == (3, 4, 3) and picture.dtype == np.uint8
    assert source.read(0) == (tmp_path / "a b/ü.tif").read_bytes()


def test_folder_follows_links_once(tmp_path):
    outside = make(tmp_path / "outside", "o.jpg")
    root = make(tmp_path / "root", "real/r.jpg", "zz/z.jpg")
    (root / "real" / "loop").symlink_to(root)
    (root / "a_link_to_real").symlink_to(root / "real")
    for number in range(40):
        (root / f"link{37 * number % 41}").symlink_to(outside)
    (root / "file_link.jpg").symlink_to(outside / "o.jpg")
    source = FolderSource(root)
    assert names(source, root) == ["file_link.jpg", "link0/o.jpg", "real/r.jpg", "zz/z.jpg"]
    assert values(source) == [0, 0, 0, 1]


def test_folder_with_a_name_that_is_not_utf8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(png(7))
    source = FolderSource(tmp_path)
    assert values(source) == [7]
    assert source.name(0).endswith("caf\\xe9.png") and source.name(0).encode()


def test_vanished_and_broken_files_are_undecodable(tmp_path):
    make(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    source = FolderSource(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes(b"nonsense")
    with pytest.raises(UndecodableError, match="No such file") as caught:
        source.picture(0)
    assert caught.value.name == str(tmp_path / "a.png")
    with pytest.raises(UndecodableError, match="not a picture"):
        source.picture(1)
    assert source.picture(2)[0, 0, 0] == 2
    with pytest.raises(UndecodableError, match="No such file"):
        source.read(3)


def test_fingerprint_does_not_depend_on_the_mount_point(tmp_path):
    one, two = make(tmp_path / "one", "a.png", "b.png"), make(tmp_path / "two", "b.png", "a.png")
    assert FolderSource(one).fingerprint() == FolderSource(two).fingerprint()
    make(two, "c.png")
    assert FolderSource(one).fingerprint() != FolderSource(two).fingerprint()


def test_bad_folders(tmp_path):
    with refused("data.root", "not set"):
        open_source("folder")
    with refused("data.root", tmp_path / "none", "does not exist"):
        open_source("folder", root=tmp_path / "none")
    (tmp_path / "file").write_text("")
    with refused("data.root", tmp_path / "file", "is a file", "folder"):
        FolderSource(tmp_path / "file")
    with refused("data.root", tmp_path, "no pictures", ".jpeg"):
        FolderSource(tmp_path)


def test_unreadable_folder(tmp_path):
    make(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    code = (
        "import os, sys\nfrom ppdensecl.data.sources import FolderSource\n"
        "if os.geteuid() == 0: os.seteuid(65534)  # root may read everything\n"
        "try:\n    FolderSource('.')\nexcept Exception as error:\n    print(type(error).__name__, error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    tmp_path.chmod(0o755)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    (tmp_path / "locked").chmod(0o755)
    assert run.stdout.startswith("UserError data.root: ./locked cannot be read: Permission denied"), run


# List


def test_list_keeps_order_and_skips_comments(tmp_path):
    make(tmp_path / "data", "a.png", "b.png", "sub/c.png")
    (tmp_path / "data" / "list.txt").write_bytes(b"\xef\xbb\xbf# pictures\r\nsub/c.png\r\n\r\n  a.png  \r\n#b.png\r\na.png")
    source = open_source("list", list_file=str(tmp_path / "data" / "list.txt"))
    assert values(source) == [2, 0, 0]


def test_list_relative_to_a_root_or_absolute(tmp_path):
    make(tmp_path / "data", "a.png", "b.png")
    (tmp_path / "list.txt").write_text(f"b.png\n{tmp_path}/data/a.png\n")
    assert values(open_source("list", root=tmp_path / "data", list_file=tmp_path / "list.txt")) == [1, 0]


def test_list_with_blanks_and_labels(tmp_path):
    make(tmp_path, "plain.png", "with blank.png", "with", "tab.png", "two words.png", "labels/plain.png", "tab.png\tx")
    lines = {
        "with blank.png": 1,  # exists as a whole, although "with" exists as well
        "plain.png labels/plain.png": 0,
        "two words.png 17": 4,
        "tab.png\tlabels/plain.png": 3,
        "tab.png\tsome more words": 3,
        "with blank.png\t3": 1,
        "tab.png\tx": 6,
    }
    (tmp_path / "list.txt").write_text("\n".join([*lines, "missing file.png"]))
    source = ListSource(tmp_path / "list.txt")
    assert [int(source.picture(i)[0, 0, 0]) for i in range(7)] == list(lines.values())
    with pytest.raises(UndecodableError, match="missing file.png: No such file"):
        source.read(7)


def test_bad_lists(tmp_path):
    with refused("data.list_file", "not set"):
        open_source("list", root=tmp_path)
    with refused("data.list_file", "list.txt", "does not exist"):
        ListSource(tmp_path / "list.txt")
    with refused("data.list_file", "is a folder"):
        ListSource(tmp_path)
    (tmp_path / "list.txt").write_text("# nothing\n\n")
    with refused("data.list_file", "lists no pictures"):
        ListSource(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    with refused("data.list_file", "none of the first 2", tmp_path / "a.png", "data.root"):
        ListSource(tmp_path / "list.txt")
    with refused("data.root", "does not exist"):
        ListSource(tmp_path / "list.txt", tmp_path / "none")
    (tmp_path / "list.txt").write_bytes(bytes(range(256)))
    with refused("data.list_file", "none of the first"):
        ListSource(tmp_path / "list.txt")


# COCO


def coco(path, *pairs):
    path.write_text(json.dumps({"images": [{"id": id_, "file_name": name} for id_, name in pairs], "annotations": []}))
    return path


def test_coco_lists_by_ascending_id(tmp_path):
    make(tmp_path / "train", "a.png", "b.png", "sub/c.png")
    annotation = coco(tmp_path / "c.json", (9, "a.png"), (10, "sub/c.png"), (1, "b.png"))
    source = open_source("coco", root=tmp_path / "train", annotation=annotation)
    assert values(source) == [1, 0, 2]
    assert names(open_source("coco", root=tmp_path / "train")) == names(FolderSource(tmp_path / "train"))


def test_bad_coco(tmp_path):
    make(tmp_path, "a.png")
    path = tmp_path / "c.json"
    with refused("data.annotation", path, "does not exist"):
        CocoSource(tmp_path, path)
    for text in ("{", "\xff"):
        path.write_text(text, encoding="latin-1")
        with refused("data.annotation", path, "JSON"):
            CocoSource(tmp_path, path)
    for text in ("{}", "[]", "3", '{"images": 5}', '{"images": [{"id": 1}]}', '{"images": [{"id": 1, "file_name": 2}]}'):
        path.write_text(text)
        with refused("data.annotation", path, '"images"'):
            CocoSource(tmp_path, path)
    coco(path)
    with refused("data.annotation", "empty"):
        CocoSource(tmp_path, path)
    coco(path, (1, "other.png"))
    with refused("data.annotation", "other.png", "data.root"):
        CocoSource(tmp_path, path)
    coco(path, (1, "a.png"))
    with refused("data.root", "not set"):
        CocoSource(None, path)


# The function that opens them


def test_open_source():
    source = open_source("synthetic", synthetic_count=3, seed=5, root="/ignored")
    assert isinstance(source, SyntheticSource) and len(source) == 3
    assert (source.picture(0) == SyntheticSource(3, 5).picture(0)).all()
    with refused("data.source", "'web'", "folder"):
        open_source("web")


def test_order_does_not_depend_on_the_process(tmp_path):
    make(tmp_path, *(f"{i % 7}/{i}.jpg" for i in range(60)))
    code = "import sys; from ppdensecl.data.sources import *; print(FolderSource(sys.argv[1]).fingerprint())"
    for hash_seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "LC_ALL": "C"}
        run = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == FolderSource(tmp_path).fingerprint(), run.stderr


# Some pictures of a source


def test_spread_takes_none_twice_where_pictures_are_broken(tmp_path):
    source = FolderSource(make(tmp_path, *(f"{i:02d}.png" for i in range(20))))

    def taken(count, world_size=1):
        found = [list(spread(source, count, rank, world_size)) for rank in range(world_size)]
        assert all((picture == index).all() for part in found for index, picture in part)
        return sorted(index for part in found for index, _ in part)
    assert taken(5) == [0, 4, 9, 14, 19] and taken(40) == list(range(20)) and taken(1) == [0]
    for broken in (0, 1, 2, 3, 9, 19):
        (tmp_path / f"{broken:02d}.png").write_bytes(b"broken")
    left = [4, 5, 6, 7, 8, *range(10, 19)]
    assert taken(5) == taken(5, 2) == [4, 10, 14]  # 4 does not stand in for 0 beside itself, and nothing follows 19
    assert taken(40) == taken(40, 3) == left and taken(1) == [4]
