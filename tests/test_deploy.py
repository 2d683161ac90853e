"""deploy/*/infer.py: the numbers of the training-side model on real files, what is skipped, what is refused, memory."""

import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import ROOT
from ppdensecl.data.picture import decode
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features
from ppdensecl.inference import exported
from ppdensecl.inference.features_file import FeaturesFile
from ppdensecl.interop import export
from ppdensecl.visual.pca import Colours
from test_export_finetune import written
from test_export_model import config, needs_onnx

sys.path.append(str(ROOT / "deploy"))
import extraction  # noqa: E402

PADDLE, ONNX = "inference_python", "onnx"


@pytest.fixture(scope="module")
def onnx():
    needs_onnx()


@pytest.fixture(scope="module")
def both(onnx, tmp_path_factory):
    """(checkpoint, export with ONNX)"""
    folder = tmp_path_factory.mktemp("both")
    _, path = written(folder, 18)
    export.export(str(path), config(), folder / "out", [3, 4], onnx=True)
    return path, folder / "out"


def picture(path, seed, size=(90, 70)):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Made pictures of several formats and shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(["a.jpg", "in/b.png", "in/deep/ä c.webp", "z.bmp"]):
        picture(folder / name, number, (50 + 40 * number, 97))
    return folder


def infer(kind, *arguments, timeout=300, env=None, **options):
    return subprocess.run([sys.executable, f"deploy/{kind}/infer.py", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=timeout, env={**os.environ, **(env or {})}, **options)


def right_features(checkpoint, paths):
    views = [features.centre(decode(open(path, "rb").read(), str(path)), (64, 64)) for path in paths]
    net = features.load_backbone(checkpoint)
    return {"pooled": features.features(net, np.stack(views)), "stage4": features.features(net, np.stack(views), 4, "map"),
            "stage3": features.features(net, np.stack(views), 3, "map")}


def compare(file, checkpoint, names, tolerance=1e-5):
    found = np.load(file)
    assert set(found.files) == {*names, "paths"}
    for name, right in right_features(checkpoint, found["paths"]).items():
        if name in names:
            np.testing.assert_allclose(found[name], right, rtol=0, atol=tolerance * np.abs(right).max())
    return found["paths"].tolist()


def test_paddle_inference_gives_the_models_numbers_as_paddles_suites_call_it(exported_r18, photos, tmp_path):
    checkpoint, model = exported_r18
    log, output = tmp_path / "log/infer.log", tmp_path / "out/f.npz"
    result = infer(PADDLE, "--device=cpu", "--mkldnn=False", "--cpu-threads=1", "--batch-size=3", "--tensorrt=False",
                   "--precision=fp32", f"--model-dir={model}", f"--image-dir={photos}", f"--save-log-path={log}",
                   "--benchmark=True", f"--check-with={checkpoint}", f"--output={output}", f"--pca-dir={tmp_path / 'pca'}")
    assert result.returncode == 0, result.stderr
    paths = compare(output, checkpoint, ["stage4", "pooled"])
    assert paths == sorted(paths, key=lambda path: os.fsencode(os.path.relpath(path, photos)))
    assert f"{photos}/in/deep/ä c.webp" in paths
    assert re.search(r"benchmark: preprocess [\d.]+ ms, run [\d.]+ ms, postprocess [\d.]+ ms per picture; [\d.]+ pictures/s",
                     log.read_text())
    assert "gives the same, to" in result.stdout and [path.name for path in output.parent.iterdir()] == ["f.npz"]
    drawn = sorted((tmp_path / "pca").iterdir())
    assert len(drawn) == len(paths) and Image.open(drawn[0]).size == (128, 64)


@pytest.mark.parametrize("kind, model", [(PADDLE, "exported_r18"), (ONNX, "both")])
def test_real_photos_give_the_models_numbers(kind, model, data_folder, tmp_path, request):
    checkpoint, model = request.getfixturevalue(model)
    real = sorted((data_folder / "photos" / "images").iterdir())[:400:40]
    (tmp_path / "list.txt").write_text("\n".join(map(str, real)))
    result = infer(kind, "--model-dir", model, "--image-dir", tmp_path / "list.txt", "--output", tmp_path / "f.npz",
                   "--outputs", "stage4", "pooled", "--batch-size=3")
    assert result.returncode == 0, result.stderr
    assert compare(tmp_path / "f.npz", checkpoint, ["stage4", "pooled"]) == list(map(str, real))


def test_onednn_gives_the_models_numbers(exported_r18, photos, tmp_path):
    checkpoint, model = exported_r18
    result = infer(PADDLE, "--mkldnn", "--model-dir", model, "--image-dir", photos, "--output", tmp_path / "f.npz",
                   "--outputs", "pooled")
    assert result.returncode == 0 and "oneDNN" in result.stdout, result.stderr
    compare(tmp_path / "f.npz", checkpoint, ["pooled"], 1e-4)


BLOCKED = ("paddle", "paddleseg", "ppdet", "pydantic", "lmdb", "visualdl", "matplotlib", "onnx", "paddle2onnx", "scipy")


def test_onnx_gives_the_models_numbers_with_nothing_of_the_training_installed(both, photos, tmp_path):
    checkpoint, model = both
    blocker = "import sys\nclass Blocked:\n    def find_spec(self, name, *_):\n"
    blocker += f"        if name.split('.')[0] in {BLOCKED}: raise ImportError(name + ' is blocked')\n"
    blocker += "sys.meta_path.insert(0, Blocked())\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    result = infer(ONNX, "--model-dir", model, "--image-dir", photos, "--output", tmp_path / "f.npz", "--batch-size=3",
                   "--pca-dir", tmp_path / "pca", "--benchmark", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0 and "onnxruntime" in result.stdout, result.stderr
    compare(tmp_path / "f.npz", checkpoint, ["stage3", "stage4", "pooled"])
    result = infer(PADDLE, "--model-dir", model, "--image-dir", photos, env={"PYTHONPATH": str(tmp_path)})
    assert "paddle is blocked" in result.stderr  # or the first half has shown nothing


def test_damaged_pictures_are_named_and_skipped(exported_r18, tmp_path):
    checkpoint, model = exported_r18
    folder = tmp_path / "pictures"
    good = [str(picture(folder / f"{name}.png", number)) for number, name in enumerate("bdf")]
    (folder / "a.jpg").write_bytes(b"")
    (folder / "c.jpg").write_text("this is text")
    whole = picture(folder / "e.jpg", 5, (300, 300)).read_bytes()
    (folder / "e.jpg").write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "f.npz"
    result = infer(PADDLE, "--model-dir", model, "--image-dir", folder, "--output", output, "--batch-size", 2)
    assert result.returncode == 0 and "of 3 pictures, 3 skipped" in result.stdout, result.stderr
    for name in "ace":
        assert f"skipped: {folder}/{name}.jpg: " in result.stderr
    assert compare(output, checkpoint, ["stage4", "pooled"]) == good
    before = output.read_bytes()
    for path in good:
        os.unlink(path)
    result = infer(PADDLE, "--model-dir", model, "--image-dir", folder, "--output", output)
    assert result.returncode == 1 and "none of the 3 pictures" in result.stderr and "Traceback" not in result.stderr
    assert output.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"pictures", "f.npz"}


def test_one_picture_and_a_list(exported_r18, tmp_path):
    checkpoint, model = exported_r18
    one, two = picture(tmp_path / "one.png", 1), picture(tmp_path / "p/two.jpg", 2)
    (tmp_path / "list.txt").write_text("p/two.jpg\n# a remark\none.png\n")
    for where, expected in (one, [one]), (tmp_path / "list.txt", [two, one]):
        result = infer(PADDLE, "--model-dir", model, "--image-dir", where, "--output", tmp_path / "f.npz", "--outputs", "pooled")
        assert result.returncode == 0, result.stderr
        assert compare(tmp_path / "f.npz", checkpoint, ["pooled"]) == list(map(str, expected))


@pytest.mark.parametrize("arguments, status, words", [
    (["--precision=fp16"], 1, "--precision fp16 is for GPUs"),
    (["--precision=fp16", "--check-with=x"], 1, "--check-with compares to 0.0001, which --precision fp16 cannot give"),
    (["--tensorrt=True"], 1, "--tensorrt is for GPUs"),
    (["--image-dir=/none"], 1, "--image-dir: /none does not exist"),
    (["--image-dir={}"], 1, "holds no pictures"),
    (["--model-dir={}"], 1, "give a folder that tools/export_model.py wrote"),
    (["--output=f.txt"], 1, "give a name that ends so"),
    (["--outputs", "logits"], 1, "--outputs logits: the export has stage4, pooled"),
    (["--output=/proc/f.npz"], 1, "--output /proc/f.npz: cannot be written"),
    (["--mkldnn=maybe"], 2, "expected True or False"),
    (["--batch-size=0"], 2, "expected a whole number from 1"),
])
def test_bad_requests_are_refused_in_one_sentence(exported_r18, photos, tmp_path, arguments, status, words):
    arguments = [argument.format(tmp_path) for argument in arguments]
    result = infer(PADDLE, "--model-dir", exported_r18[1], "--image-dir", photos, "--output", tmp_path / "f.npz", *arguments)
    assert result.returncode == status and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_another_checkpoint_is_told_apart(exported_r18, photos, tmp_path):
    _, other = written(tmp_path, 34)
    result = infer(PADDLE, "--model-dir", exported_r18[1], "--image-dir", photos, "--output", tmp_path / "f.npz", "--check-with",
                   other)
    assert result.returncode == 1 and "the training-side model's outputs differ by" in result.stderr, result.stderr
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_no_unfinished_file(exported_r18, photos, tmp_path, number, status):
    (tmp_path / "list.txt").write_text("\n".join([str(photos / "a.jpg")] * 100000))
    process = subprocess.Popen([sys.executable, f"deploy/{PADDLE}/infer.py", "--model-dir", str(exported_r18[1]), "--image-dir",
                                str(tmp_path / "list.txt"), "--output", str(tmp_path / "out/f.npz")], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "out").exists() or len(list((tmp_path / "out").iterdir())) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in errors, errors
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PADDLE, ONNX])
def test_memory_does_not_grow_with_the_number_of_pictures(kind, both, tmp_path):
    """What is written for a picture of 128 pixels is 98 KiB."""
    paths = [picture(tmp_path / f"{number}.jpg", number, (300, 280)) for number in range(20)]
    peaks = []
    for count in 200, 1000:
        (tmp_path / "list.txt").write_text("\n".join(str(paths[number % 20]) for number in range(count)))
        result = infer(kind, "--model-dir", both[1], "--image-dir", tmp_path / "list.txt", "--output", tmp_path / "f.npz",
                       "--size", 128, "--benchmark", timeout=900)
        assert result.returncode == 0, result.stderr
        peaks.append(int(re.search(r"peak memory (\d+) MiB", result.stdout)[1]))
        size = (tmp_path / "f.npz").stat().st_size / 2**20
    print(kind, peaks, "MiB; the file", round(size), "MiB")
    assert size > 90 and peaks[1] < peaks[0] + 25, peaks


# Their parts


@pytest.mark.parametrize("names", [["stage4/../../x", "pooled"], ["stage5", "pooled"], ["stage4", "pooled", "stage4"]])
def test_an_export_with_other_outputs_is_refused(exported_r18, tmp_path, names):
    found = yaml.safe_load((exported_r18[1] / exported.DESCRIPTION).read_text())
    (tmp_path / exported.DESCRIPTION).write_text(yaml.safe_dump(found))
    assert exported.read(tmp_path).outputs == ("stage4", "pooled")
    found["outputs"] = [{**found["outputs"][0], "name": name} for name in names]
    (tmp_path / exported.DESCRIPTION).write_text(yaml.safe_dump(found))
    with pytest.raises(UserError, match="inference.yml: is not as tools/export_model.py writes it"):
        exported.read(tmp_path)


class Named:
    """As much of a source as PcaPictures asks for."""

    def __init__(self, name):
        self._name = name

    def name(self, index):
        return self._name


def drawn(folder, name):
    generator = np.random.default_rng(0)
    pictures = extraction.PcaPictures(folder, Named(name))
    views = generator.integers(0, 256, (1, 256, 256, 3), np.uint8)  # which no PNG makes small
    pictures.add([0], views, generator.standard_normal((1, 64, 8, 8), np.float32))
    pictures.close()


def test_colours_of_a_picture_with_a_long_name(tmp_path):
    drawn(tmp_path, "p/" + "x" + "ä𝄞" * 42 + ".jpg")  # 253 bytes, as a file system takes them
    [path] = tmp_path.iterdir()
    assert path.name == "000000_x" + "ä𝄞" * 33 + ".png"
    assert Image.open(path).size == (512, 256)


def test_a_full_disk_leaves_the_old_colours(tmp_path):
    (tmp_path / "000000_a.png").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(UserError, match="--pca-dir: .*000000_a.png cannot be written .File too large"):
            drawn(tmp_path, "a.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "000000_a.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_features_file_has_the_rows_in_order_whatever_the_batches(tmp_path):
    rows = np.random.default_rng(0).standard_normal((7, 2, 3), dtype=np.float32)
    with FeaturesFile(tmp_path / "f.npz", "name {}".format) as file:
        for some in [0, 1, 2], [4, 5], [106]:
            file.add(some, {"maps": rows[[min(i, 6) for i in some]], "pooled": rows[[min(i, 6) for i in some]].mean((1, 2))})
    found = np.load(tmp_path / "f.npz", allow_pickle=False)
    assert found["paths"].tolist() == [f"name {i}" for i in (0, 1, 2, 4, 5, 106)]
    assert (found["maps"] == rows[[0, 1, 2, 4, 5, 6]]).all() and (found["pooled"] == found["maps"].mean((1, 2))).all()
    assert found["maps"].dtype == found["pooled"].dtype == np.float32


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path):
    (tmp_path / "f.npz").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 1 << 16
    try:
        with pytest.raises(UserError, match="--output .*f.npz: cannot be written .File too large"):
            with FeaturesFile(tmp_path / "f.npz", str) as file:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                for _ in range(3):
                    file.add([0], {"pooled": np.zeros((1, limit // 8), np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "f.npz").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_the_same_things_have_the_same_colours_and_others_have_others():
    """Three kinds of cells with a little noise: a picture's colours say which is which, in every picture alike."""
    generator = np.random.default_rng(0)
    kinds = np.eye(64, dtype=np.float32)[:3]
    labels = generator.integers(0, 3, (4, 6, 8))
    maps = kinds[labels] * generator.uniform(1, 9, (4, 6, 8, 1)) + 0.01 * generator.standard_normal((4, 6, 8, 64))
    maps = maps.transpose(0, 3, 1, 2)
    colours = Colours(maps[:3].astype(np.float32))
    found = np.stack([colours.picture(one.astype(np.float32), (6, 8)) for one in maps]).astype(int)
    means = [np.median(found[labels == kind], axis=0) for kind in range(3)]
    for kind in range(3):
        assert np.abs(found[labels == kind] - means[kind]).max(axis=1).mean() < 60
        assert np.abs(means[kind] - means[kind - 1]).max() > 120
    assert colours.picture(maps[0].astype(np.float32), (48, 96)).shape == (48, 96, 3)


def test_reading_ahead_is_bounded_and_in_order(exported_r18):
    from ppdensecl.inference import pictures

    decoded = []

    class Source:
        def __len__(self):
            return 100

        def picture(self, index):
            decoded.append(index)
            time.sleep(0.002 * (index % 3))
            return np.full((70, 70, 3), index, np.uint8)

    model = exported.read(exported_r18[1])
    batches = pictures.views(Source(), model, 4, 3, None)
    indices, views = next(batches)
    time.sleep(0.1)
    assert indices == [0, 1, 2, 3] and views[:, 0, 0, 0].tolist() == indices and len(decoded) <= 13
    assert [i for indices, views in batches for i in indices] == list(range(4, 100))
