"""The report of a run is one file that needs nothing else, and foreign text in it is only text."""

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from PIL import Image

from ppdensecl.errors import UserError
from ppdensecl.visual import pictures, report
from test_visual import CHECK, LINE, run_folder  # noqa: F401 (a fixture)

HOSTILE = "<script>alert('1')<img src=x onerror=alert(2)>&\"'`$x$"


class _Page(HTMLParser):
    """Tags, links and texts of a page; every tag that is opened is closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.links, self.texts, self.pictures = [], [], [], [], {}
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        assert not any(name.startswith("on") for name, _ in attributes)
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href", "action", "data", "srcset", "poster") if name in values]
        if tag == "img":
            self.pictures[values["alt"]] = values["src"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)

    @property
    def text(self):
        return " ".join(self.texts)


def _copied(run_folder, folder):  # noqa: F811
    """A run whose pictures are of its latest checkpoint: nothing has to be drawn but the curves."""
    return shutil.copytree(run_folder, folder)


def _score(**more):
    return json.dumps({"task": "retrieval", "trained": 0.381, "random": 0.304, "chance": 0.075, "checkpoint": "run/latest",
                       "command": "tools/eval.py --task retrieval", **more})


def test_the_page_needs_nothing_else_and_has_all_parts(run_folder, run_tool, tmp_path):  # noqa: F811
    run = _copied(run_folder, tmp_path / "my run")
    (run / "retrieval.json").write_text(_score())
    (run / "other.json").write_text('{"no": "score"}')
    with open(run / "train.log", "a") as log:
        log.write("[2026/11/23 16:26:49] ppdensecl INFO: command: tools/train.py -c a.yaml -o data.root=/x\n"
                  "[2026/11/23 16:26:50] ppdensecl WARNING: cannot decode a.jpg\n" + CHECK.format(2, 0.4) + "\n")
    before = {path: path.stat().st_mtime_ns for path in (run / "pictures").iterdir() if path.stem != "curves"}
    result = run_tool("report.py", run)
    assert result.returncode == 0 and "report.html" in result.stdout and not result.stderr, result.stderr
    page, path = _Page(run / "report.html"), run / "report.html"
    assert path.stat().st_size < 5e6
    assert all(link.startswith(("data:image/", "#")) for link in page.links) and not {"script", "link"} & set(page.tags)
    ids = {f'id="{link[1:]}"' for link in page.links if link.startswith("#")}
    assert len(ids) == 6 and all(name in path.read_text() for name in ids)
    assert set(page.pictures) == {"curves", "views", "pca", "retrieval", "matches_0", "mutual_0", "similarity_0"}
    for name, source in page.pictures.items():
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
        picture.load()
        assert picture.size == Image.open(run / "pictures" / f"{name}.png").size
    assert "@import" not in path.read_text() and "url(" not in path.read_text()
    for words in ("my run", "2 of 2, finished", "38.1 %", "30.4 %", "7.5 %", "python tools/eval.py --task retrieval",
                  "queue_len: 16", "python tools/train.py -c a.yaml -o data.root=/x", "cannot decode a.jpg", "paddlepaddle",
                  f"--checkpoint '{run}'/latest"):
        assert words in page.text, words
    assert {path: path.stat().st_mtime_ns for path in before} == before and not list(run.glob("*.tmp*"))


def test_pictures_of_another_checkpoint_are_drawn_again_or_it_is_said(run_folder, tmp_path):  # noqa: F811
    run = _copied(run_folder, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace("synthetic_count: 8", "synthetic_count: 2")  # sooner drawn
    (run / "config.yaml").write_text(config)
    latest = pictures.drawn_of(run)
    assert latest == pictures.identity(run / "latest") and latest["iteration"] == 2
    pictures.draw_run(run, "iter_1", matches=1, count=2)
    other = (run / "pictures" / "pca.png").read_bytes()
    assert pictures.drawn_of(run)["checkpoint"] == "iter_1"

    (run / "config.yaml").write_text("data: {root: /gone, image_size: 64}\nmodel: {backbone: resnet18}\n")
    for record, said in ((None, "checkpoint than the latest: iter_1 of iteration 1"), ("[]", "not known which checkpoint")):
        if record:
            (run / "pictures" / "checkpoint.json").write_text(record)
        assert said in report.write_report(run, run / "a.html") and said in _Page(run / "a.html").text
    assert (run / "pictures" / "pca.png").read_bytes() == other

    (run / "config.yaml").write_text(config)
    assert report.write_report(run, run / "a.html") is None
    assert (run / "pictures" / "pca.png").read_bytes() != other and pictures.drawn_of(run) == latest


def test_a_drawing_that_broke_off_is_of_no_checkpoint(run_folder, tmp_path, monkeypatch):  # noqa: F811
    run = _copied(run_folder, tmp_path / "run")

    def broken(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(pictures, "_draw_views", broken)
    with pytest.raises(KeyboardInterrupt):
        pictures.draw_run(run, matches=1)
    assert pictures.drawn_of(run) == {}


def test_a_field_that_the_last_line_lacks_says_when_it_was(run_folder, tmp_path):  # noqa: F811
    run = _copied(run_folder, tmp_path / "run")
    (run / "train.log").write_text(LINE.format(1, 4.0) + "\n" + LINE.format(2, 4.5).replace("loss_dense: 3.0, ", ""))
    report.write_report(run, run / "r.html")
    text = _Page(run / "r.html").text
    assert "global loss, last 4.5 dense loss, last 3 (iteration 1) accuracy" in text


def test_foreign_text_stays_text(run_folder, tmp_path):  # noqa: F811
    name = HOSTILE.replace("/", "") + "\udcff"  # and a byte that is no text
    run = _copied(run_folder, tmp_path / name)
    with open(run / "config.yaml", "a") as file:
        file.write(f"# config {HOSTILE} </pre></details>\n")
    with open(run / "train.log", "a") as file:
        file.write("".join(f"[{HOSTILE[:8]}] ppdensecl {level}: {text} </pre>{HOSTILE} {text}\n" for level, text in (
            ("INFO", "ppdensecl 0.1"), ("INFO", "command: log"), ("WARNING", "warned"))))
    (run / "a.json").write_text(_score(task=HOSTILE, command=f"</td>{HOSTILE}", checkpoint=HOSTILE, checkpoint_sha256="x",
                                       trained=HOSTILE, random=float("nan"), chance=10**400, options=HOSTILE))
    states = json.loads((run / "latest.pdstates").read_text())
    (run / "latest.pdstates").write_text(json.dumps({**states, "iteration": HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    report.write_report(run, tmp_path / "r.html")
    page = _Page(tmp_path / "r.html")
    assert "script" not in page.tags and len(page.pictures) == page.tags.count("img") == 7
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert page.text.count("<script>alert(") > 12 and page.text.count("–") == 3 and "&lt;" not in page.text


@pytest.mark.parametrize("content", ["{", "[1]", '{"task": 1, "trained": 2}', "[" * 100000, '{"task": "knn"}', "\udcff"])
def test_json_that_is_no_score_is_left_out(run_folder, tmp_path, content):  # noqa: F811
    (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "y.json").mkdir()
    assert "None yet" in report._scores(tmp_path, {})
    (tmp_path / "z.json").write_text(_score(options={"shuffle_labels": True}))
    assert "control: shuffled" in report._scores(tmp_path, {"sha256": 3}) and "38.1 %" in report._scores(tmp_path, {})


def test_a_score_of_another_checkpoint_says_so(tmp_path):
    states = {"sha256": {".pdparams": "aa"}}
    for digest, other in (("aa", False), ("bb", True), (None, False)):
        (tmp_path / "z.json").write_text(_score(checkpoint_sha256=digest))
        assert ("another checkpoint" in report._scores(tmp_path, states)) is other


def test_a_run_that_goes_on_and_one_from_an_older_version(run_folder, tmp_path):  # noqa: F811
    run = _copied(run_folder, tmp_path / "run")
    (run / "train.log").write_text(LINE.format(7, 4.0))
    report.write_report(run, run / "r.html")
    text = _Page(run / "r.html").text
    assert "7 of ?, not finished; the checkpoint is of iteration 2" in text and "the log holds no command" in text


def test_a_run_without_its_data_has_a_report_that_says_so(run_folder, run_tool, tmp_path):  # noqa: F811
    run = _copied(run_folder, tmp_path / "run")
    (run / "pictures" / "views.png").unlink()
    (run / "config.yaml").write_text("data: {root: /gone, image_size: 64}\nmodel: {backbone: resnet18}\n")
    result = run_tool("report.py", run, "--out", tmp_path / "r.html")
    assert result.returncode == 0 and "note: the pictures could not be drawn: data.root: /gone does not exist" in result.stderr
    page = _Page(tmp_path / "r.html")
    assert "New pictures could not be drawn: data.root: /gone" in page.text and {"curves", "pca"} < set(page.pictures)


@pytest.mark.parametrize("gone, words", [
    ("train.log", "train.log: cannot be read"), ("latest.pdparams", "holds no checkpoint yet"),
    ("config.yaml", "config.yaml: cannot read")])
def test_what_is_no_run_is_one_sentence(run_folder, tmp_path, gone, words):  # noqa: F811
    run = _copied(run_folder, tmp_path / "run")
    (run / gone).unlink()
    with pytest.raises(UserError, match=words):
        report.write_report(run, run / "report.html")
    assert not (run / "report.html").exists()


def test_the_tool_refuses_in_one_sentence(run_tool, tmp_path):
    for arguments, status, words in (([tmp_path], 1, "train.log: cannot be read"),
                                     ([tmp_path, "--out", "/none/r.html"], 2, "there is no such folder")):
        result = run_tool("report.py", *arguments)
        assert result.returncode == status and words in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_a_broken_picture_is_one_sentence(run_folder, tmp_path):  # noqa: F811
    run = _copied(run_folder, tmp_path / "run")
    (run / "pictures" / "pca.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="pca.png: cannot be read as a picture"):
        report.write_report(run, run / "r.html")


@pytest.mark.slow
def test_a_browser_shows_it_without_network(run_folder, tmp_path):  # noqa: F811
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium is on the PATH")
    run = _copied(run_folder, tmp_path / "run")
    report.write_report(run, tmp_path / "r.html")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser",
               "--proxy-server=127.0.0.1:1", "--window-size=1200,4000"]
    subprocess.run([*command, f"--screenshot={tmp_path}/s.png", f"file://{tmp_path}/r.html"], check=True, capture_output=True,
                   timeout=120)
    shown = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    curves = np.asarray(Image.open(run / "pictures" / "curves.png").convert("RGB").resize((1088, 700)))
    assert shown.shape == (4000, 1200, 3)
    assert cv2.matchTemplate(shown, curves, cv2.TM_CCOEFF_NORMED).max() > 0.9  # the picture is seen, not its name
