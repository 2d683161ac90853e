"""An exported model behind HTTP:
python deploy/service/serve.py --model-dir output/RUN/inference --port 8000
curl --data-binary @a.jpg http://127.0.0.1:8000/features"""

import functools
import signal
import socket
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import extraction  # noqa: E402

from ppdensecl.errors import UserError  # noqa: E402
from ppdensecl.machine import cores  # noqa: E402


def main():
    parser = extraction.command_line.parser(__doc__, config=False)
    whole_number = extraction.whole_number
    parser.add_argument("--model-dir", required=True, metavar="DIR", help="that tools/export_model.py wrote")
    parser.add_argument("--engine", default="paddle", choices=["paddle", "onnx"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--cpu-threads", type=whole_number, help="(default: all cores of this process)")
    extraction.add_switch(parser, "--mkldnn", "oneDNN's kernels in place of Paddle's own, on the CPU")
    parser.add_argument("--host", default="127.0.0.1", help="(default %(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="(default %(default)s; 0 for any that is free)")
    parser.add_argument("--batch-size", type=whole_number, default=8, help="pictures computed together (default %(default)s)")
    parser.add_argument("--queue", type=whole_number, default=32, help="requests at a time; more get 503 (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=10, metavar="SECONDS", help="of a request (default %(default)s)")
    parser.add_argument("--max-megabytes", type=whole_number, default=20, help="of a body (default %(default)s)")
    parser.add_argument("--max-megapixels", type=whole_number, default=25, help="of a picture (default %(default)s)")
    arguments = parser.parse_args()
    if not 0 <= arguments.port <= 65535 or not arguments.timeout > 0:
        parser.error("--port is 0 to 65535 and --timeout greater than 0")
    import numpy as np
    from ppdensecl.data import picture
    from ppdensecl.inference import engines, exported

    try:
        import uvicorn
        from app import make
        from connection import Connection
    except ImportError as error:
        raise UserError(f"the service needs a package that is missing ({error}); `pip install fastapi uvicorn python-multipart "
                        "prometheus-client`") from None

    # Resizing takes some 20 bytes of memory for each pixel, and decode has no other way to be told.
    picture.MAX_PIXELS = min(picture.MAX_PIXELS, arguments.max_megapixels * 10**6)
    model = exported.read(arguments.model_dir)
    try:
        listening = socket.create_server((arguments.host, arguments.port), backlog=256)
    except OSError as error:
        raise UserError(f"--host {arguments.host} --port {arguments.port}: cannot be listened on ({error.strerror}); give "
                        "another port, or 0 for any that is free") from None
    threads = arguments.cpu_threads or cores()
    if arguments.engine == "paddle":
        engine = engines.PaddleEngine(model, arguments.device, threads, arguments.mkldnn)
    elif arguments.mkldnn:
        raise UserError("--mkldnn is for --engine paddle; leave it out, or change the engine")
    else:
        engine = engines.OnnxEngine(model, arguments.device, threads)
    engine.run(np.zeros((1, 3, *model.size), np.float32))  # the first time takes longer
    app = make(model, engine, threads, arguments.batch_size, arguments.queue, arguments.max_megabytes * 10**6, arguments.timeout)
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda *_: None)  # uvicorn stops, and then raises the signal once more: the status would not be 0
    config = uvicorn.Config(app, http=functools.partial(Connection, seconds=arguments.timeout), access_log=False,
                            log_level="warning", timeout_keep_alive=5,
                            limit_concurrency=8 * arguments.queue, timeout_graceful_shutdown=int(arguments.timeout) + 1)
    print(f"{model.title}: serving on http://{arguments.host}:{listening.getsockname()[1]}; {engine.title}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    extraction.command_line.run(main)
