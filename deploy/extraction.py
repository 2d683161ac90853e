"""What deploy/inference_python/infer.py and deploy/onnx/infer.py share: their options, and the way from pictures to features.

Needs numpy, OpenCV, Pillow, PyYAML and tqdm, and what computes: Paddle or onnxruntime.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import command_line  # noqa: E402 (sets the path to the library)

from ppdensecl.errors import UserError  # noqa: E402
from ppdensecl.machine import cores  # noqa: E402

WARM_UP = 3  # runs of the first batch before --benchmark counts
_PCA_FROM = 16  # pictures whose cells decide the colours of all


def boolean(text):
    """True and False as the runners of Paddle's test suites spell them."""
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def whole_number(text):
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def add_switch(group, name, what):
    """--name, --name=True or --name=False."""
    group.add_argument(name, type=boolean, nargs="?", const=True, default=False, metavar="True|False", help=what)


def parser(description):
    arguments = command_line.parser(description, config=False)
    arguments.add_argument("--model-dir", required=True, metavar="DIR", help="that tools/export_model.py wrote")
    arguments.add_argument("--image-dir", required=True, metavar="PATH",
                           help="a picture, a folder (at any depth), or a .txt with a path per line")
    arguments.add_argument("--output", default="output/features.npz", metavar="FILE.npz",
                           help="the arrays of --outputs and paths, a row per picture (default %(default)s)")
    arguments.add_argument("--outputs", nargs="+", metavar="NAME", help="of the export's outputs (default: all)")
    arguments.add_argument("--size", type=whole_number, nargs="+", metavar="PIXELS", help="of the view, one or height and width "
                           "(default: the export's)")
    arguments.add_argument("--pca-dir", metavar="DIR", help="also a PNG for each picture: view, and dense features as colours")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    arguments.add_argument("--cpu-threads", type=whole_number, help="(default: all cores of this process)")
    arguments.add_argument("--batch-size", type=whole_number, default=8, help="(default %(default)s)")
    add_switch(arguments, "--benchmark", "time each stage, one after the other on one thread for all but the network")
    arguments.add_argument("--save-log-path", metavar="FILE", help="what is printed is written there too")
    return arguments


def run(main):
    """Like command_line.run, with another sentence for Ctrl-C."""
    def interruptible():
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted; no features were written", file=sys.stderr)
            sys.exit(130)

    command_line.run(interruptible)


def extract(arguments, make_engine, checked=None):
    """Reads, computes, writes, and reports. make_engine(exported) → engine; checked(images, outputs) looks at each batch.

    Raises UserError, also where no picture at all could be read.
    """
    from ppdensecl.inference import exported, pictures
    from ppdensecl.inference.features_file import FeaturesFile
    from tqdm import tqdm

    model = exported.read(arguments.model_dir)
    if arguments.size:
        if len(arguments.size) > 2:
            raise UserError("--size takes one number, or height and width")
        model = model._replace(size=tuple(arguments.size * (3 - len(arguments.size))))
    kept = _kept(arguments.outputs, model)
    source = pictures.open_pictures(arguments.image_dir)
    engine = make_engine(model)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no unfinished file stays; Paddle sets its own when imported
    say = _speaker(arguments.save_log_path)
    say(f"{model.title}: {len(source)} pictures from {arguments.image_dir}, {model.view} {model.size[0]} x {model.size[1]}, "
        f"batches of {arguments.batch_size}; {engine.title}")
    bad = []
    with tqdm(total=len(source), unit=" pictures", disable=None, leave=False) as bar, \
            FeaturesFile(arguments.output, source.name) as file:
        def skip(error):
            bad.append(error.reason)
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            bar.update()

        drawn = PcaPictures(arguments.pca_dir, source) if arguments.pca_dir else None
        threads = 0 if arguments.benchmark else arguments.cpu_threads or cores()
        clock = {"preprocess": 0.0, "run": 0.0, "postprocess": 0.0}
        batches = iter(pictures.views(source, model, arguments.batch_size, threads, skip))
        while True:
            started = time.perf_counter()
            indices, views = next(batches, (None, None))
            if indices is None:
                break
            images = model.normalised(views)
            ready = time.perf_counter()
            for _ in range(WARM_UP if arguments.benchmark and not len(file) else 0):
                engine.run(images)
            run = time.perf_counter()
            outputs = engine.run(images)
            done = time.perf_counter()
            file.add(indices, {name: outputs[name] for name in kept})
            if drawn:
                drawn.add(indices, views, outputs[model.maps[-1]])
            for name, seconds in zip(clock, (ready - started, done - run, time.perf_counter() - done)):
                clock[name] += seconds
            if checked:
                checked(images, outputs)
            bar.update(len(indices))
        if drawn:
            drawn.close()
        count = len(file)
        if not count:
            raise UserError(f"--image-dir: none of the {len(bad)} pictures of {arguments.image_dir} can be read ({bad[0]})")
    say(f"{arguments.output}: {', '.join(kept)} of {count} pictures" + (f", {len(bad)} skipped" if bad else "")
        + (f"; colours of their dense features in {arguments.pca_dir}" if drawn else ""))
    if arguments.benchmark:
        per_picture = {name: 1000 * seconds / count for name, seconds in clock.items()}
        say("benchmark: " + ", ".join(f"{name} {value:.2f} ms" for name, value in per_picture.items())
            + f" per picture; {1000 / sum(per_picture.values()):.1f} pictures/s after {WARM_UP} runs to warm up; peak memory "
            f"{_peak_mebibytes()} MiB")


def _peak_mebibytes():
    """Of this program alone; getrusage also counts what the process was before it became this one."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def _kept(asked, model):
    unknown = [name for name in asked or () if name not in model.outputs]
    if unknown:
        raise UserError(f"--outputs {unknown[0]}: the export has {', '.join(model.outputs)}")
    return list(dict.fromkeys(asked or model.outputs))


def _speaker(log):
    """say(text) prints, and appends to the file `log` if there is one. Raises UserError."""
    if not log:
        return lambda text: print(text, flush=True)
    try:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        file = open(log, "w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise UserError(f"--save-log-path {log}: cannot be written ({error.strerror})") from None

    def say(text):
        print(text, flush=True)
        print(text, file=file)

    return say


class PcaPictures:
    """PNGs of views beside the colours of their maps. The first pictures wait until there are enough to choose the colours by."""

    def __init__(self, folder, source):
        self._folder, self._source = Path(folder), source
        self._colours, self._waiting = None, []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--pca-dir {folder}: cannot be made ({error.strerror})") from None

    def add(self, indices, views, maps):
        self._waiting += zip(indices, views, maps)
        if self._colours or len(self._waiting) >= _PCA_FROM:
            self.close()

    def close(self):
        import numpy as np
        from PIL import Image
        from ppdensecl.visual.pca import Colours

        if self._waiting and not self._colours:
            self._colours = Colours(np.stack([feature_map for _, _, feature_map in self._waiting]))
        for index, view, feature_map in self._waiting:
            picture = np.hstack([view, self._colours.picture(feature_map, view.shape[:2])])
            stem = Path(self._source.name(index)).stem.encode()[:200].decode(errors="ignore")  # names have 255 bytes at most
            path = self._folder / f"{index:06d}_{stem}.png"
            temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}")
            try:
                Image.fromarray(picture).save(temporary, "PNG", compress_level=1)
                os.replace(temporary, path)
            except OSError as error:
                raise UserError(f"--pca-dir: {path} cannot be written ({error.strerror})") from None
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
        self._waiting = []
