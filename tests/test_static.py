"""optim.to_static: the backbones as static graphs train to the same weights."""

import numpy as np
import pytest

from conftest import ROOT
from ppdensecl.engine import checkpoint

TINY = ["-c", "configs/densecl_r18_demo.yaml", "-o", "data.synthetic_count=16", "data.batch_size=8", "data.workers=0", "device=cpu",
        "data.image_size=64", "model.stages=2", "model.queue_len=32", "log.interval=1", "log.visualdl=false", "optim.epochs=2"]


def test_the_weights_are_the_same_also_after_resuming(run_tool, tmp_path):
    def train(folder, *options):
        result = run_tool("train.py", *TINY, f"output_dir={tmp_path / folder}", *options, "--processes", "1")
        assert result.returncode == 0, result.stdout + result.stderr
        return checkpoint.read_arrays(tmp_path / folder / "latest.pdparams")

    plain, static = train("plain"), train("static", "optim.to_static=True")
    assert plain.keys() == static.keys()
    for name, array in plain.items():
        np.testing.assert_allclose(static[name], array, rtol=0, atol=1e-6 * max(1, np.abs(array).max()), err_msg=name)
    train("cut", "optim.to_static=true", "optim.max_iters=3")
    resumed = train("cut", "optim.to_static=true", "--resume")
    assert all((resumed[name] == array).all() for name, array in static.items())


def test_it_is_both_backbones(tmp_path):
    from ppdensecl.config import load_config
    from ppdensecl.engine.trainer import Trainer

    for static in ("true", "false"):
        model = Trainer(load_config(ROOT / TINY[1], [*TINY[3:], f"output_dir={tmp_path / static}", f"optim.to_static={static}"])).model
        for encoder in (model.encoder_q, model.encoder_k):
            assert hasattr(encoder.backbone.forward, "program_cache") == (static == "true")


@pytest.mark.parametrize("other", ["optim.recompute=1", "optim.amp=float16"])
def test_what_does_not_go_with_it_is_refused(run_tool, tmp_path, other):
    result = run_tool("train.py", *TINY, f"output_dir={tmp_path}", "optim.to_static=true", other, "--processes", "1")
    assert result.returncode == 1 and "optim." in result.stderr and "Traceback" not in result.stderr, result.stderr
