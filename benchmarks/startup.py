"""From the command to the end of the first iteration's forward pass: python benchmarks/startup.py [-c configs/densecl_r18_demo.yaml] [-o KEY=VALUE …]

`tools/train.py` with its config, data workers and log, against a script that imports Paddle, makes the same model and runs
its forward pass once on an empty batch. In alternation, wall and CPU seconds (the workers' too).
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time

import measure

ROUNDS = 5


def train(arguments):
    """Ends with the first forward pass."""
    sys.path.insert(0, str(measure.ROOT / "tools"))
    import command_line

    command_line._prepare_environment()
    from ppdensecl.engine import trainer

    os.environ.pop("OMP_NUM_THREADS", None)  # Paddle's import has set it to 1, and train.py would take it for the user's wish

    forward = trainer.DenseCL.forward

    def once(self, *given, **options):
        output = forward(self, *given, **options)
        float(output.loss)
        os.killpg(0, 9)

    trainer.DenseCL.forward = once
    sys.argv = ["tools/train.py", "--processes", "1", *arguments]
    runpy.run_path(str(measure.ROOT / "tools/train.py"), run_name="__main__")


def bare(arguments):
    from PIL import Image  # noqa: F401
    import paddle

    from ppdensecl.config import load_config
    from ppdensecl.engine.building import build_model

    config = load_config(arguments[1], arguments[3:])
    paddle.set_device("cpu")
    model = build_model(config)
    views = paddle.zeros([config.data.batch_size, *config.data.size, 3], "uint8")
    float(model(views, views).loss)
    os.killpg(0, 9)


def timed(way, arguments):
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, __file__, way, *arguments], start_new_session=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.PIPE)
    after = os.times()
    return {"seconds": time.perf_counter() - start,
            "cpu": after.children_user + after.children_system - before.children_user - before.children_system}


if __name__ == "__main__":
    if sys.argv[1:2] in (["train"], ["bare"]):
        {"train": train, "bare": bare}[sys.argv[1]](sys.argv[2:])
    else:
        given = sys.argv[1:] or ["-c", str(measure.ROOT / "configs/densecl_r18_demo.yaml"), "-o"]
        with tempfile.TemporaryDirectory() as folder:
            found = {"bare": [], "train": []}
            for _ in range(ROUNDS):
                for way, times in found.items():
                    more = ["--overwrite"] if way == "train" else []
                    times.append(timed(way, [*given, f"output_dir={folder}", *more]))
        medians = {way: {key: measure.median(times, key) for key in ("seconds", "cpu")} for way, times in found.items()}
        print(measure.table(["start", "seconds", "CPU seconds"], [[way, *values.values()] for way, values in medians.items()]))
        print({key: round(medians["train"][key] / medians["bare"][key], 2) for key in ("seconds", "cpu")}, measure.machine())
