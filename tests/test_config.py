from pathlib import Path

import pytest
import yaml

from ppdensecl.config import build_config, load_config
from ppdensecl.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEMO = CONFIGS / "densecl_r18_demo.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_survives_a_round_trip(path):
    config = load_config(path)
    assert config.output_dir == f"output/{path.stem}"
    assert build_config(yaml.safe_load(config.to_yaml())) == config


def test_the_recipes_are_the_papers():
    imagenet, coco = load_config(CONFIGS / "densecl_r50.yaml"), load_config(CONFIGS / "densecl_r50_coco_800ep.yaml")
    assert (imagenet.optim.lr, imagenet.optim.epochs, coco.optim.lr, coco.optim.epochs) == (0.03, 200, 0.3, 800)
    assert load_config(CONFIGS / "densecl_r50_coco_1600ep.yaml").optim.epochs == 1600
    for config in (imagenet, coco):
        m, o = config.model, config.optim
        assert (m.queue_len, m.momentum, m.temperature, m.loss_lambda, m.embedding_dim) == (65536, 0.999, 0.2, 0.5, 128)
        assert (o.momentum, o.weight_decay, o.schedule, o.lr_step, o.warmup_epochs) == (0.9, 1e-4, "cosine", "epoch", 0)
        assert config.data.batch_size * 8 == 256 and config.data.size == (224, 224)
    for name in ("r50", "r50_coco_800ep"):
        densecl, moco = load_config(CONFIGS / f"densecl_{name}.yaml"), load_config(CONFIGS / f"moco_v2_{name}.yaml")
        assert moco.model.loss_lambda == 0
        assert moco.model.model_copy(update={"loss_lambda": 0.5}) == densecl.model and moco.optim == densecl.optim


@pytest.mark.parametrize("override, dotted, value", [
    ("optim.lr=1e-3", "optim.lr", 1e-3),
    ("optim.amp=off", "optim.amp", "off"),
    ("log.visualdl=True", "log.visualdl", True),
    ("log.visualdl=false", "log.visualdl", False),
    ("model.num_grid=null", "model.num_grid", None),
    ("data.image_size=[64, 96]", "data.image_size", [64, 96]),
    ("data.root=/a b: c #d", "data.root", "/a b: c #d"),
    ("data.root='12'", "data.root", "12"),
    ("optim.lr=1", "optim.lr", 1.0),
    ("seed=010", "seed", 10),
    ("data.root=__import__('os').system('touch /tmp/x')", "data.root", "__import__('os').system('touch /tmp/x')"),
])
def test_overrides_are_yaml_scalars(override, dotted, value):
    found = load_config(DEMO, [override])
    for name in dotted.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("override, words", [
    ("model.temprature=1", ["-o model.temprature=1", "'model.temprature'", "'model.temperature'"]),
    ("temperature=1", ["unknown key", "'model.temperature'"]),
    ("modle.momentum=1", ["'modle'", "'model'"]),
    ("model.queue_len=ten", ["'model.queue_len' is 'ten'", "whole number"]),
    ("model.queue_len=1.5", ["'model.queue_len'", "whole number"]),
    ("optim.lr=-1", ["'optim.lr' is -1", "greater than 0"]),
    ("optim.lr=.inf", ["'optim.lr'", "finite"]),
    ("optim.amp=of", ["'optim.amp' is 'of'", "off, float16, bfloat16", "did you mean 'off'"]),
    ("model.backbone=resnet5", ["resnet50"]),
    ("data.image_size=16", ["'data.image_size' is 16", "[height, width]"]),
    ("data.image_size=[64]", ["'data.image_size'", "[height, width]"]),
    ("log.visualdl=yes", ["'log.visualdl' is 'yes'", "true or false"]),
    ("model=3", ["'model' is 3", "section"]),
    ("nonsense", ["-o nonsense", "section.key=value"]),
    ("seed=[1", ["-o seed=[1", "not valid YAML"]),
    ("data.root=[!!python/object/apply:os.system [ls]]", ["not allowed"]),
])
def test_a_bad_override_is_one_sentence(override, words):
    with pytest.raises(UserError) as error:
        load_config(DEMO, [override])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("model:\n  momentun: 0.9\n", [":2", "'model.momentun'", "'model.momentum'"]),
    ("optim:\n  lr: fast\n", [":2", "'optim.lr' is 'fast'", "a number"]),
    ("optim:\n  lr: 1\n  lr: 2\n", [":3", "given twice"]),
    ("optim: [1, 2\n", ["not valid YAML"]),
    ("just words\n", ["not a config"]),
    ("seed: !!python/object/apply:os.system ['true']\n", [":1", "not allowed"]),
    ("_base_: missing.yaml\n", ["missing.yaml", "cannot read"]),
    ("_base_: [a, b]\n", ["`_base_`", "one YAML file"]),
    ("_base_: x.yaml\n", ["leads back"]),
    ("\x00\x01", ["YAML"]),
])
def test_a_bad_file_is_one_sentence_that_names_file_and_line(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    for word in ["x.yaml" if "missing" not in text else "", *words]:
        assert word in str(error.value)


def test_bases_are_merged_and_the_nearest_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.1, epochs: 5}\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("_base_: a.yaml\noptim: {lr: 0.2}\n")
    (tmp_path / "c.yaml").write_text("_base_: b.yaml\nseed: 3\n")
    config = load_config(tmp_path / "c.yaml", ["optim.momentum=0.5"])
    assert (config.optim.lr, config.optim.epochs, config.optim.momentum, config.seed) == (0.2, 5, 0.5, 3)
