"""Shared by the tests: the environment before paddle's import, real pictures where they are, and the tools as processes."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import ImageFile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GLOG_minloglevel", "2")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so would all that it starts
warnings.filterwarnings("ignore", message="When training, we now always track global mean")
import ppdensecl  # noqa: E402,F401 (imports Pillow before anything imports paddle)


def _folder(variable, what):
    path = os.environ.get(variable)
    if not path or not Path(path).is_dir():
        pytest.skip(f"{variable} names no folder with {what}")
    return Path(path)


@pytest.fixture(autouse=True)
def strict_pillow():
    """Some library of the fine-tuning suites tells Pillow, when it is imported, to accept pictures that are cut short."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.fixture
def data_folder():
    """Real pictures: photos/images, camvid, bccd_voc."""
    return _folder("PPDENSECL_TEST_DATA", "the research pictures")


@pytest.fixture(scope="session")
def exported_r18(tmp_path_factory):
    """(checkpoint, folder of its export) of a ResNet-18; not to be changed."""
    from ppdensecl.interop import export
    from test_export_finetune import written
    from test_export_model import config

    folder = tmp_path_factory.mktemp("exported_r18")
    _, path = written(folder, 18)
    export.export(str(path), config(), folder / "out")
    return path, folder / "out"


@pytest.fixture
def run_tool():
    """run_tool("train.py", "-c", …) → CompletedProcess with text output; never longer than `timeout` seconds."""

    def run(tool, *arguments, timeout=300, env=None, **options):
        return subprocess.run([sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)], cwd=ROOT, text=True,
                              capture_output=True, timeout=timeout, env={**os.environ, **(env or {})}, **options)

    return run
