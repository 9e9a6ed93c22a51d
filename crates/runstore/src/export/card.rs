//! `config.json` as timm reads it from a folder (`timm/models/_hub.py`), and the model card.

use serde_json::{Value, json};

use super::Provenance;
use crate::config::{Arch, RunConfig};

const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

pub(super) fn timm_config(config: &RunConfig, from: &Provenance) -> Value {
    let px = config.views.global_px;
    json!({
        "architecture": config.backbone.arch.name(),
        "num_classes": 0,
        "num_features": config.backbone.arch.feature_dim(),
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [3, px, px],
            "fixed_input_size": false,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": MEAN,
            "std": STD,
            "num_classes": 0,
            "pool_size": [px.div_ceil(32), px.div_ceil(32)],
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "sgcl": from,
    })
}

pub(super) fn readme(config: &RunConfig, from: &Provenance) -> String {
    let arch = config.backbone.arch.name();
    let depth = arch.trim_start_matches("resnet");
    let width = match config.backbone.arch {
        Arch::Resnet50 => "256",
        Arch::Resnet18 | Arch::Resnet34 => "64",
    };
    let variant =
        serde_json::to_value(config.variant).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    format!(
        r#"---
library_name: timm
tags: [image-feature-extraction, pathology, self-supervised]
---
# {arch}, pretrained without labels

A {arch} encoder for histopathology patches, trained by {method} (variant `{variant}`).

| | |
|---|---|
| run | `{run}` |
| commit | {commit} (`{write_id}`) |
| epochs | {epochs} of {wanted} |
| data | `{data}` |
| data content id | `{data_id}` |
| weights sha256 | `{weights}` |
| sgcl | {software} |

Input: RGB, values 0 to 1, then mean {MEAN:?} and standard deviation {STD:?}. Trained on views of {px} pixels. Features: {dim} values
a patch (after average pooling). There is no classifier.

## torchvision

```python
import torch, torchvision
weights = torch.load("backbone.pth")["state_dict"]
model = torchvision.models.{arch}()
model.fc = torch.nn.Identity()
model.load_state_dict(weights)
```

## timm

```python
import timm
model = timm.create_model("local-dir:.", pretrained=True)  # this folder
```

## detectron2

`backbone.detectron2.pkl` has detectron2's names. The weights expect **RGB**; detectron2's default is BGR, so its configuration needs:

```yaml
MODEL:
  WEIGHTS: backbone.detectron2.pkl
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  RESNETS: {{DEPTH: {depth}, RES2_OUT_CHANNELS: {width}, STRIDE_IN_1X1: False}}
INPUT:
  FORMAT: RGB
```

`export.json` has the SHA-256 of every file.
"#,
        method = config.method.title(),
        run = from.run,
        commit = from.commit,
        write_id = from.commit_write_id,
        epochs = from.epochs,
        wanted = config.epochs,
        data = from.data,
        data_id = from.data_id,
        weights = from.weights_sha256,
        software = from.software,
        px = config.views.global_px,
        dim = config.backbone.arch.feature_dim(),
    )
}
