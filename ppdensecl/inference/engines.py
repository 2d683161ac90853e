"""What computes an exported network: Paddle Inference or onnxruntime. Each is imported when it is made.

    engine.run(images)  float32 [N, 3, H, W], normalised → {output's name: float32 array}
    engine.title        for the user, e.g. "paddlepaddle 3.3.1 on the CPU, 2 threads"
"""

from __future__ import annotations

from ppdensecl.errors import UserError
from ppdensecl.inference.exported import ONNX, PADDLE_NETWORKS, PADDLE_WEIGHTS
from ppdensecl.machine import cores


class PaddleEngine:
    """Paddle Inference. One thread at a time may call `run`.

    Args:
        exported: see `exported.read`.
        device: cpu or gpu (the first visible one).
        threads: of the CPU; None for all that this process may use.
        mkldnn: oneDNN's kernels in place of Paddle's own, on the CPU.
        precision: fp32; on a GPU also fp16.
        tensorrt: on a GPU whose Paddle is built with it; engines are built for batches up to `batch_size` of the export's size.
    """

    def __init__(self, exported, device="cpu", threads=None, mkldnn=False, precision="fp32", tensorrt=False, batch_size=1):
        if device == "cpu" and (tensorrt or precision != "fp32"):
            raise UserError(f"--{'tensorrt' if tensorrt else f'precision {precision}'} is for GPUs; use --device gpu, or fp32 "
                            "without TensorRT")
        if device == "gpu" and mkldnn:
            raise UserError("--mkldnn is for the CPU; leave it out, or use --device cpu")
        import paddle
        from paddle import inference

        paddle.disable_signal_handler()  # it would print a C++ traceback for a SIGTERM
        if device == "gpu" and not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
            reason = "no GPU is visible" if paddle.is_compiled_with_cuda() else "this paddlepaddle is the CPU build"
            raise UserError(f"--device gpu: {reason}; use --device cpu, or install paddlepaddle-gpu")
        network = exported.file(PADDLE_NETWORKS)
        if network.suffix == ".json" and paddle.__version__.startswith("2."):
            raise UserError(f"{network}: is a network of Paddle 3, but this is paddlepaddle {paddle.__version__}; export it with "
                            "this version, or use 3.0 or newer here")
        config = inference.Config(str(network), str(exported.file([PADDLE_WEIGHTS])))
        config.disable_glog_info()
        threads = threads or cores()
        if device == "gpu":
            half = precision == "fp16"
            kind = inference.PrecisionType.Half if half else inference.PrecisionType.Float32
            config.enable_use_gpu(256, 0, kind)
            if tensorrt:
                config.enable_tensorrt_engine(1 << 30, batch_size, 3, kind, False, False)
                largest = [batch_size, 3, *exported.size]
                config.set_trt_dynamic_shape_info(*({exported.input_name: shape} for shape in (
                    [1, 3, *exported.size], largest, largest)))
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(threads)
            if mkldnn:
                config.enable_mkldnn()
                config.set_mkldnn_cache_capacity(4)  # of kernels made for one size of input; the last batch is another one
            elif hasattr(config, "disable_mkldnn"):  # what Paddle 3 would use by itself
                config.disable_mkldnn()
        self._predictor = inference.create_predictor(config)
        self._input = self._predictor.get_input_handle(exported.input_name)
        self._outputs = dict(zip(exported.outputs, map(self._predictor.get_output_handle, self._predictor.get_output_names())))
        how = f"GPU, {precision}{', TensorRT' if tensorrt else ''}" if device == "gpu" else (
            f"CPU, {threads} thread{'s' if threads > 1 else ''}{', oneDNN' if mkldnn else ''}")
        self.title = f"Paddle Inference {paddle.__version__} on the {how}"

    def run(self, images):
        self._input.reshape(images.shape)
        self._input.copy_from_cpu(images)
        self._predictor.run()
        return {name: output.copy_to_cpu() for name, output in self._outputs.items()}


class OnnxEngine:
    """onnxruntime; arguments as for PaddleEngine. Any thread may call `run`."""

    def __init__(self, exported, device="cpu", threads=None):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"onnxruntime cannot be imported ({error}); `pip install onnxruntime`") from None
        provider = "CUDAExecutionProvider" if device == "gpu" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise UserError(f"--device gpu: onnxruntime {onnxruntime.__version__} has no CUDA here; use --device cpu, or install "
                            "onnxruntime-gpu")
        threads = threads or cores()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # converters leave unused constants behind, of each of which it would tell
        self._session = onnxruntime.InferenceSession(str(exported.file([ONNX])), options, providers=[provider])
        self._names = exported.outputs
        self._input = exported.input_name
        how = "GPU" if device == "gpu" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        self.title = f"onnxruntime {onnxruntime.__version__} on the {how}"

    def run(self, images):
        return dict(zip(self._names, self._session.run(list(self._names), {self._input: images})))
