"""A checkpoint as a static graph: the same numbers in Paddle Inference and onnxruntime, or no file."""

import shutil

import numpy as np
import paddle
import pytest
import yaml

from ppdensecl.config import load_config
from ppdensecl.engine import checkpoint
from ppdensecl.errors import UserError
from ppdensecl.evaluation import features
from ppdensecl.inference import engines, exported
from ppdensecl.interop import export
from ppdensecl.models import DenseCL
from test_export_finetune import backbone, written

PADDLE_3 = not paddle.__version__.startswith("2.")


def config(depth=18, *overrides):
    return load_config("configs/densecl_r50.yaml", [f"model.backbone=resnet{depth}", "data.image_size=64", *overrides])


def refused(words, function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700 and all(word in text for word in words), text


@pytest.fixture
def mine(exported_r18, tmp_path):
    """The same, to be changed."""
    return exported_r18[0], shutil.copytree(exported_r18[1], tmp_path / "out")


def needs_onnx():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    try:
        import paddle2onnx  # noqa: F401
    except (ImportError, ValueError) as error:
        pytest.skip(f"no paddle2onnx for this paddlepaddle: {error}")


@pytest.mark.parametrize("depth, stages", [(18, None), (50, [2, 4])])
def test_outputs_are_the_models_at_any_size_and_batch(tmp_path, depth, stages):
    net, path = written(tmp_path, depth)
    notes = export.export(str(path), config(depth), tmp_path / "out", stages)
    assert "Paddle Inference's are the model's to" in notes[-1]
    engine = engines.PaddleEngine(exported.read(tmp_path / "out"))
    for shape in (5, 3, 33, 100), (1, 3, 224, 224):
        images = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        found = engine.run(images)
        maps = [value.numpy() for value in net.stages(paddle.to_tensor(images))]
        right = {f"stage{number}": maps[number - 1] for number in stages or [4]}
        right["pooled"] = maps[-1].mean((2, 3))
        assert found.keys() == right.keys()
        for name, value in right.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def test_the_description_tells_all_that_is_needed(tmp_path):
    _, path = written(tmp_path, 50)
    export.export(str(path), config(50, "data.image_size=[96,128]"), tmp_path / "out", [3])
    found = yaml.safe_load((tmp_path / "out/inference.yml").read_text())
    assert [(output["name"], output["shape"]) for output in found["outputs"]] == [
        ("stage3", [-1, 1024, -1, -1]), ("pooled", [-1, 1024])]
    assert found["input"]["shape"] == [-1, 3, -1, -1] and found["preprocess"]["size"] == [96, 128]
    assert found["config"]["data"]["image_size"] == [96, 128] and found["checkpoint"]["sha256"] == checkpoint.sha256_of(path)
    network = "inference.json" if PADDLE_3 else "inference.pdmodel"
    assert set(found["files"]) == {network, "inference.pdiparams"} == {
        file.name for file in (tmp_path / "out").iterdir()} - {"inference.yml"}
    assert all(checkpoint.sha256_of(tmp_path / "out" / name) == digest for name, digest in found["files"].items())
    assert found["checked"]["largest_difference"]["Paddle Inference"] <= 1e-5


def test_the_graph_ends_at_the_last_stage_that_is_asked_for(exported_r18, tmp_path):
    export.export(str(exported_r18[0]), config(), tmp_path / "out", [2])
    assert (tmp_path / "out/inference.pdiparams").stat().st_size < (exported_r18[1] / "inference.pdiparams").stat().st_size / 10


def test_onnx_has_names_and_open_sizes_and_the_models_numbers(tmp_path):
    needs_onnx()
    net, path = written(tmp_path, 18)
    notes = export.export(str(path), config(), tmp_path / "out", [3, 4], onnx=True)
    assert "onnxruntime's are the model's to" in notes[-1]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "out/inference.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["image"]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("stage3", ["N", 256, "H/16", "W/16"]), ("stage4", ["N", 512, "H/32", "W/32"]), ("pooled", ["N", 512])]
    images = np.random.default_rng(1).standard_normal((2, 3, 80, 48), dtype=np.float32)
    right = net.stages(paddle.to_tensor(images))[3].numpy()
    np.testing.assert_allclose(session.run(["stage4"], {"image": images})[0], right, rtol=0, atol=1e-5 * np.abs(right).max())


def test_the_model_that_an_export_is_compared_with_stays_as_it_is_in_training(tmp_path):
    network = export.Network(backbone(18), [4])
    export._save(network, tmp_path)
    assert (tmp_path / exported.PADDLE_WEIGHTS).exists() and not hasattr(network.forward, "program_cache")


def test_nothing_is_there_where_the_numbers_are_others(mine, tmp_path, monkeypatch):
    """Also what an earlier export left stays, and can be used."""
    path, out = mine
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    save = export._save

    def other_weights(network, folder):
        network.backbone.conv1.weight.set_value(network.backbone.conv1.weight * 1.001)
        save(network, folder)
        network.backbone.conv1.weight.set_value(network.backbone.conv1.weight / 1.001)

    monkeypatch.setattr(export, "_save", other_weights)
    refused(["outputs differ from the model's by", "at most 1e-05"], export.export, str(path), config(), out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    exported.read(out).file(exported.PADDLE_NETWORKS)
    refused(["outputs differ"], export.export, str(path), config(), tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_an_export_into_a_runs_folder_leaves_the_run_alone(tmp_path):
    """And no file of an earlier export stays that does not belong to the new one."""
    _, path = written(tmp_path, 18)
    (tmp_path / "inference.onnx").write_bytes(b"of an earlier export")
    export.export(str(path), config(), tmp_path)
    assert path.exists() and not (tmp_path / "inference.onnx").exists()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("overrides, stages, change, words", [
    (["model.backbone=resnet50"], None, {}, ["holds a resnet18 with 4 stages", "the config says resnet50"]),
    ([], [5], {}, ["--stages 5", "1 to 4"]),
    ([], None, {"bn1.bias": np.full(64, np.nan, np.float32)}, ["not all numbers are finite in bn1.bias"]),
])
def test_bad_requests_are_refused(tmp_path, overrides, stages, change, words):
    _, path = written(tmp_path, 18, lambda arrays: {**arrays, **change})
    refused(words, export.export, str(path), config(18, *overrides), tmp_path / "out", stages)
    assert not (tmp_path / "out").exists()


def test_changed_files_and_descriptions_are_refused(mine):
    folder, description = mine[1], mine[1] / "inference.yml"
    right = description.read_text()
    for text, words in [
        ("", "is not as tools/export_model.py writes it"),
        ("format: 1\n", "is not as"),
        (right.replace("format: 1", "format: 2"), "has format 2, expected 1"),
        (right.replace("view: centre", "view: upside"), "is not as"),
        (right.replace("inference.pdiparams", "../../etc/passwd"), "is not as"),
        (right.replace("- 0.229", "- 0"), "is not as"),
        ("!!python/object/apply:os.system ['touch /tmp/x']", "is not as"),
    ]:
        description.write_text(text)
        refused([words], exported.read, folder)
    description.write_text(right)
    refused(["holds no inference.onnx", "--onnx"], exported.read(folder).file, [exported.ONNX])
    weights = folder / "inference.pdiparams"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused(["its checksum is wrong"], engines.PaddleEngine, exported.read(folder))
    weights.unlink()
    refused(["inference.pdiparams: cannot be read"], engines.PaddleEngine, exported.read(folder))
    refused(["/none/inference.yml: cannot be read"], exported.read, "/none")


def test_views_and_numbers_are_those_of_the_probes(exported_r18):
    """So that what a probe measured holds for what is deployed."""
    model, generator = exported.read(exported_r18[1]), np.random.default_rng(0)
    assert model.view == "centre" and model.size == (64, 64)
    for view, probes in ("centre", features.centre), ("whole", features.whole):
        for shape in (50, 70), (200, 131), (64, 64), (300, 20):
            for size in (64, 64), (48, 80):
                picture = generator.integers(0, 256, (*shape, 3), np.uint8)
                assert (model._replace(view=view, size=size).seen(picture) == probes(picture, size)).all()
    views = generator.integers(0, 256, (2, 64, 64, 3), np.uint8)
    found = engines.PaddleEngine(model).run(model.normalised(views))["pooled"]
    right = features.features(backbone(18), views)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * np.abs(right).max())


def test_the_tool_exports_a_run_as_paddles_suites_call_it(tmp_path, run_tool):
    paddle.seed(0)
    model = DenseCL(backbone="resnet18", hidden_dim=32, embedding_dim=16, queue_len=64)
    checkpoint.write_arrays(tmp_path / "latest.pdparams", {name: value.numpy() for name, value in model.state_dict().items()})
    result = run_tool("export_model.py", "-c", "configs/densecl_r18_demo.yaml", "-o", "device=cpu",
                      f"--pretrained={tmp_path / 'latest'}", f"--output-dir={tmp_path}")
    assert result.returncode == 0 and "outputs stage4, pooled" in result.stdout, result.stderr
    assert exported.read(tmp_path).size == (64, 64)
    for arguments, words in [(["--pretrained", "/none"], "/none: cannot be read"),
                             (["-o", "model.backbone=resnet50"], "holds a resnet18"),
                             (["--output-dir", "/proc/none"], "--output-dir /proc/none: cannot be written")]:
        result = run_tool("export_model.py", "-c", "configs/densecl_r18_demo.yaml", "--pretrained", tmp_path / "latest",
                          "--output-dir", tmp_path / "other", *arguments)
        assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_engines_refuse_what_this_machine_cannot(exported_r18):
    model = exported.read(exported_r18[1])
    for options, words in [({"precision": "fp16"}, "--precision fp16 is for GPUs"),
                           ({"tensorrt": True}, "--tensorrt is for GPUs"),
                           ({"device": "gpu", "mkldnn": True}, "--mkldnn is for the CPU")]:
        refused([words], engines.PaddleEngine, model, **options)
    if not paddle.is_compiled_with_cuda():
        refused(["this paddlepaddle is the CPU build"], engines.PaddleEngine, model, device="gpu")
