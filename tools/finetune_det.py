"""Fine-tunes a detector with PaddleDetection, from a backbone of tools/export_finetune.py or from nothing.

python tools/finetune_det.py -c configs/det/faster_rcnn_r50_c4_voc_24k.yml train -o pretrain_weights=det.pdparams
python tools/finetune_det.py -c configs/det/faster_rcnn_r50_c4_voc_24k.yml train --resume output/det/faster_rcnn_r50_c4_voc_24k/7
python tools/finetune_det.py -c configs/det/faster_rcnn_r50_c4_voc_24k.yml eval -o weights=output/det/…/model_final.pdparams
python tools/finetune_det.py -c configs/det/faster_rcnn_r50_c4_voc_24k.yml export -o weights=…
python tools/finetune_det.py -c configs/det/mask_rcnn_r50_fpn_coco_1x.yml precise_bn --out precise.pdparams -o weights=…

precise_bn writes the model again with BatchNorm statistics of 200 training batches, to evaluate and export that; with
-o precise_bn=200, as the VOC C4 configs have it, training does so itself at its end.

All settings are PaddleDetection's, set with -o: TrainDataset.dataset_dir, EvalDataset.dataset_dir, worker_num, save_dir, …
`total_batch_size` is shared by all GPUs; for several: python -m paddle.distributed.launch tools/finetune_det.py …
"""

import argparse

import command_line


def main():
    parser = command_line.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("mode", nargs="?", default="train", choices=["train", "eval", "export", "precise_bn"])
    parser.add_argument("--resume", metavar="CKPT", help="train: go on from SAVE_DIR/CONFIG/N, without suffix")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--out", metavar="PATH", help="export: folder to write (default: SAVE_DIR/deploy); precise_bn: file")
    arguments = parser.parse_args()
    if arguments.mode == "precise_bn" and arguments.out is None:
        parser.error("precise_bn needs --out FILE.pdparams")
    try:
        from ppdensecl.interop import paddledet as det
    except ImportError as error:
        raise command_line.UserError(f"PaddleDetection cannot be imported ({error}); install requirements.txt, or "
                                     "requirements-gpu.txt beside a paddlepaddle-gpu") from error
    from ppdensecl import parallel
    from ppdensecl.engine import device

    device.select(arguments.device)
    det.start_ranks()
    config = det.read_config(arguments.config, [item for group in arguments.override for item in group])
    if arguments.mode != "train" and not config.get("weights"):
        parser.error(f"{arguments.mode} needs -o weights=FILE, a whole model")
    if arguments.mode == "export":
        print(f"written: {det.export_model(config, arguments.out or config.save_dir + '/deploy')}")
        return
    if arguments.mode == "precise_bn":
        det.make_precise(config, arguments.out)
        print(f"written: {arguments.out}")
        return
    results = det.train(config, arguments.resume) if arguments.mode == "train" else det.evaluate(config)
    if not parallel.is_main():  # one rank evaluates
        return
    for kind, name in (("bbox", "bbox"), ("mask", "mask"), ("voc07", "bbox as VOC 2007 counts")):
        if kind in results:
            ap, ap50, ap75 = (100 * max(number, 0) for number in results[kind][:3])
            print(f"{name}: AP {ap:.2f}, AP50 {ap50:.2f}, AP75 {ap75:.2f}")
    if not results and (arguments.mode == "eval" or config.get("validate", True)):
        print("bbox: AP 0.00, nothing was found with a score that counts")


if __name__ == "__main__":
    command_line.run(main)
