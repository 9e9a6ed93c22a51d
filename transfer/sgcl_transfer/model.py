"""Faster R-CNN with a C4 backbone: proposals from the fourth stage, the fifth as head over each region, and a BatchNorm behind it.

The extra norm is what MoCo's detection protocol has (`Res5ROIHeadsExtraNorm`): self-supervised weights leave the fifth stage's outputs at
a scale that a detector's learning rate was not made for. Nothing is frozen, every BatchNorm learns.
"""
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_iou

# Sides of anchors in pixels of a field, as published with NuCLS.
ANCHORS = (12, 24, 48)
RATIOS = (0.5, 1.0, 2.0)
# Side of a region, in cells of the fourth stage.
REGION = 14
# As far as a box may lie on an ignored nucleus before it stops being ground.
IGNORE_IOU = 0.5
# What our weights were trained with.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def detector(network, width, classes, scale, regions, proposals, detections):
    """Of a torchvision ResNet whose last stage has `width` channels, for pictures enlarged `scale` times.

    `regions` are trained on in a picture, `proposals` looked at when testing, `detections` kept of them. Targets have `boxes` and
    `labels`, and may have `ignore`: boxes that are neither nucleus nor ground.
    """
    backbone = Stages(network)
    anchors = AnchorGenerator((tuple(round(side * scale) for side in ANCHORS),), (RATIOS,))
    # Many nuclei a field: thrice the usual proposals in training, as published with NuCLS.
    rpn = Proposals(
        anchors,
        RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 6000, "testing": 6000},
        post_nms_top_n={"training": 3000, "testing": proposals},
        nms_thresh=0.7,
    )
    heads = Heads(
        MultiScaleRoIAlign(["0"], REGION, sampling_ratio=2),
        Res5Head(network, width),
        FastRCNNPredictor(width, classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=regions,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=detections,
    )
    return GeneralizedRCNN(backbone, rpn, heads, Normal(0, 0, MEAN, STD))


class Normal(GeneralizedRCNNTransform):
    """Takes off the mean and fills up batches. Pictures come here enlarged, and boxes go in and out in enlarged pixels."""

    def resize(self, image, target=None):
        return image, target


class Stages(nn.Module):
    """Stem to fourth stage of a ResNet: stride 16."""

    def __init__(self, network):
        super().__init__()
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        self.stages = nn.Sequential(network.layer1, network.layer2, network.layer3)
        self.out_channels = network.layer4[0].conv1.in_channels

    def forward(self, x):
        return self.stages(self.stem(x))


class Res5Head(nn.Module):
    """Fifth stage over regions (N, C, 14, 14), the extra norm, the mean: (N, width)."""

    def __init__(self, network, width):
        super().__init__()
        self.res5 = network.layer4
        self.norm = nn.BatchNorm2d(width)

    def forward(self, regions):
        return self.norm(self.res5(regions)).mean(dim=(2, 3))


class Proposals(RegionProposalNetwork):
    """Learns nothing from anchors on ignored boxes."""

    def assign_targets_to_anchors(self, anchors, targets):
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, boxes, target in zip(labels, anchors, targets):
            label[(label == 0) & ignored(boxes, target)] = -1.0
        return labels, matched


class Heads(RoIHeads):
    """Learns nothing from regions on ignored boxes."""

    def select_training_samples(self, proposals, targets):
        # The step below is not given the targets.
        self.targets = targets
        return super().select_training_samples(proposals, targets)

    def assign_targets_to_proposals(self, proposals, gt_boxes, gt_labels):
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for label, boxes, target in zip(labels, proposals, self.targets):
            label[(label == 0) & ignored(boxes, target)] = -1
        return matched, labels


def ignored(boxes, target):
    """Whether each box lies on an ignored one."""
    ignore = target.get("ignore")
    if ignore is None or len(ignore) == 0:
        return boxes.new_zeros(len(boxes), dtype=bool)
    return box_iou(boxes, ignore.to(boxes)).amax(dim=1) >= IGNORE_IOU
