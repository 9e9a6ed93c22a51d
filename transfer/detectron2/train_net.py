"""Trains and tests a detector with detectron2 on NuCLS, from `backbone.detectron2.pkl` as `sgclctl pull` fetches it.

  python train_net.py --config-file R-50-C4-nucls.yaml --data NuCLS/QC --fold 1 MODEL.WEIGHTS weights/backbone.detectron2.pkl

Wants detectron2 and sgcl_transfer (`pip install --no-deps ..`), which reads NuCLS's layout.
"""
from pathlib import Path

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.structures import BoxMode
from torch import nn

from sgcl_transfer import nucls


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """A norm behind the fifth stage; the stage of ResNet-18 and -34 where those are the backbone, which detectron2's own does not make."""

    @classmethod
    def _build_res5_block(cls, cfg):
        resnets = cfg.MODEL.RESNETS
        if resnets.DEPTH in (18, 34):
            width = 8 * resnets.RES2_OUT_CHANNELS
            blocks = {18: 2, 34: 3}[resnets.DEPTH]
            strides = [2] + [1] * (blocks - 1)
            stage = ResNet.make_stage(
                BasicBlock, blocks, stride_per_block=strides, in_channels=width // 2, out_channels=width, norm=resnets.NORM
            )
            stage = nn.Sequential(*stage)
        else:
            stage, width = super()._build_res5_block(cfg)
        stage.add_module("norm", get_norm(resnets.NORM, width))
        return stage, width


def records(data, fold, part):
    """NuCLS's fields as detectron2 wants them. Ignored nuclei are crowds: they do not count when testing; in training they are ground."""
    learnt, tested, _ = nucls.split(data, nucls.read(data), fold, 0.3, 0)
    for number, field in enumerate(learnt if part == "train" else tested, 1):
        nuclei = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label - 1, "iscrowd": 0}
            for box, label in zip(field.boxes.tolist(), field.labels.tolist())
            if label > 0
        ]
        for box in field.boxes[field.labels == 0].tolist():
            crowd = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 1}
            nuclei += [{**crowd, "category_id": of} for of in range(len(nucls.CLASSES))]
        yield {
            "file_name": str(field.picture),
            "image_id": number,
            "width": field.width,
            "height": field.height,
            "annotations": nuclei,
        }


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, name, output_folder=None):
        folder = output_folder or f"{cfg.OUTPUT_DIR}/inference"
        # As many as the detector keeps: COCO's 100 would cut dense fields off.
        return COCOEvaluator(name, output_dir=folder, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE)


def main(args):
    for part in ("train", "test"):
        DatasetCatalog.register(f"nucls_{part}", lambda part=part: list(records(args.data, args.fold, part)))
        MetadataCatalog.get(f"nucls_{part}").thing_classes = list(nucls.CLASSES)
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--data", type=Path, required=True, help="folder in NuCLS's layout")
    parser.add_argument("--fold", type=int, default=1, help="published fold")
    arguments = parser.parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
