"""Fine-tunes a semantic segmentation network with PaddleSeg, from a backbone of tools/export_finetune.py or from nothing.

python tools/finetune_seg.py -c configs/seg/fcn_r50-d8_voc12aug_20k.yml train --pretrained seg.pdparams --save_dir output/voc
python tools/finetune_seg.py -c configs/seg/fcn_r50-d8_voc12aug_20k.yml eval --model_path output/voc/iter_20000/model.pdparams
python tools/finetune_seg.py -c configs/seg/fcn_r50-d8_voc12aug_20k.yml predict --model_path … --image_path PICTURES --save_dir masks
python tools/finetune_seg.py -c configs/seg/fcn_r50-d8_voc12aug_20k.yml export --model_path … --save_dir output/voc/deploy
python tools/finetune_seg.py -c configs/seg/fcn_r50-d8_voc12aug_20k.yml precise_bn --model_path … --save_dir output/voc/precise

precise_bn writes the model again with BatchNorm statistics of 200 training batches, to evaluate and export that. Without
--pretrained the backbone starts from random weights. batch_size is that of each GPU; for several GPUs:
python -m paddle.distributed.launch tools/finetune_seg.py …
"""

import argparse

import command_line


def _parser():
    parser = command_line.parser(__doc__, config=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("-c", "--config", required=True, help="YAML file, see configs/seg/")
    add("mode", nargs="?", default="train", choices=["train", "eval", "predict", "export", "precise_bn"])
    add("--dataset_root", metavar="DIR", help="where the pictures are (default: as the config says)")
    add("--opts", nargs="+", action="extend", metavar="KEY=VALUE", help="set values of the config, e.g. lr_scheduler.power=1.0")
    add("--num_workers", type=int, default=2, help="processes that read pictures (default 2)")
    add("--precision", choices=["fp32", "fp16"], default="fp32")
    add("--amp_level", choices=["O1", "O2"], default="O1")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto")
    add("--save_dir", metavar="DIR", help="where to write (all but eval)")
    group = parser.add_argument_group("train")
    group.add_argument("--pretrained", metavar="FILE", help="weights of the backbone; all tensors must fit")
    group.add_argument("--resume", metavar="DIR", help="go on from SAVE_DIR/iter_N")
    for name, kind in (("iters", int), ("batch_size", int), ("learning_rate", float)):
        group.add_argument(f"--{name}", type=kind, help="default: as the config says")
    group.add_argument("--save_interval", type=int, default=1000, help="iterations from checkpoint to checkpoint (default 1000)")
    group.add_argument("--keep_checkpoint_max", type=int, default=5)
    group.add_argument("--log_iters", type=int, default=10)
    group.add_argument("--no_eval", action="store_true", help="do not evaluate at each checkpoint")
    group.add_argument("--use_ema", action="store_true", help="also keep an average of the weights, SAVE_DIR/…/ema_model.pdparams")
    group.add_argument("--use_vdl", action="store_true", help="write VisualDL curves to SAVE_DIR")
    group.add_argument("--seed", type=int, help="of weights, crops and order; with workers, their crops differ all the same")
    group = parser.add_argument_group("eval, predict, export and precise_bn")
    group.add_argument("--model_path", metavar="FILE", help="a whole model, SAVE_DIR/iter_N/model.pdparams")
    group.add_argument("--batches", type=int, help="precise_bn: of training pictures, on each GPU (default 200)")
    group.add_argument("--aug_eval", action="store_true", help="eval: with --scales and --flip_horizontal")
    group.add_argument("--scales", nargs="+", type=float, default=[1.0])
    group.add_argument("--flip_horizontal", action="store_true")
    group.add_argument("--image_path", metavar="PATH", help="predict: a picture, a folder, or a .txt that lists pictures")
    group.add_argument("--is_slide", action="store_true", help="eval and predict: windows of --crop_size, --stride apart")
    group.add_argument("--crop_size", nargs=2, type=int, metavar=("W", "H"))
    group.add_argument("--stride", nargs=2, type=int, metavar=("W", "H"))
    group.add_argument("--input_shape", nargs=4, type=int, metavar=("N", "C", "H", "W"), default=[-1, 3, -1, -1],
                       help="export: -1 is any length")
    group.add_argument("--output_op", choices=["argmax", "softmax"], default="argmax")
    return parser


def main():
    parser = _parser()
    arguments = parser.parse_args()
    needed = {"train": ["save_dir"], "eval": ["model_path"], "predict": ["model_path", "image_path", "save_dir"],
              "export": ["model_path", "save_dir"], "precise_bn": ["model_path", "save_dir"]}[arguments.mode]
    if arguments.is_slide and not (arguments.crop_size and arguments.stride):
        parser.error("--is_slide needs --crop_size and --stride")
    for name in needed:
        if getattr(arguments, name) is None:
            parser.error(f"{arguments.mode} needs --{name}")
    if arguments.batches is not None and arguments.batches < 1:
        parser.error("--batches must be at least 1")
    try:
        from ppdensecl.interop import paddleseg as seg
    except ImportError as error:
        raise command_line.UserError(f"PaddleSeg cannot be imported ({error}); install requirements.txt, or "
                                     "requirements-gpu.txt beside a paddlepaddle-gpu") from error
    from ppdensecl.engine import device

    device.select(arguments.device)
    config = seg.read_config(arguments.config, arguments.dataset_root, arguments.pretrained, iters=arguments.iters,
                             batch_size=arguments.batch_size, learning_rate=arguments.learning_rate, opts=arguments.opts)
    shared = {name: getattr(arguments, name) for name in ("num_workers", "precision", "amp_level")}
    sliding = dict(is_slide=True, crop_size=arguments.crop_size, stride=arguments.stride) if arguments.is_slide else {}
    seg.utils.set_seed(arguments.seed)
    if arguments.mode == "train":
        own = ("save_interval", "keep_checkpoint_max", "log_iters", "use_vdl", "use_ema")
        seg.train(config, arguments.save_dir, arguments.resume, not arguments.no_eval, **shared,
                  **{name: getattr(arguments, name) for name in own})
    elif arguments.mode == "eval":
        more = {"scales": arguments.scales, "flip_horizontal": arguments.flip_horizontal} if arguments.aug_eval else {}
        scores = seg.evaluate(config, arguments.model_path, aug_eval=arguments.aug_eval, **more, **sliding, **shared)
        print(f"{arguments.model_path}: mIoU {scores['mIoU']:.4f}, pixel accuracy {scores['Acc']:.4f}")
    elif arguments.mode == "predict":
        count = seg.predict(config, arguments.model_path, arguments.image_path, arguments.save_dir, **sliding)
        print(f"written: {count} masks in {arguments.save_dir}")
    elif arguments.mode == "precise_bn":
        more = {} if arguments.batches is None else {"batches": arguments.batches}
        print(seg.make_precise(config, arguments.model_path, arguments.save_dir, num_workers=arguments.num_workers, **more))
    else:
        shape = [None if length == -1 else length for length in arguments.input_shape]
        print(f"written: {seg.export(config, arguments.model_path, arguments.save_dir, shape, arguments.output_op)}")


if __name__ == "__main__":
    command_line.run(main)
