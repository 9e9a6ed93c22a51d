# As fcn_r50-d8_bcss.py, on a ResNet-18.
_base_ = './fcn_r50-d8_bcss.py'
model = dict(backbone=dict(depth=18), decode_head=dict(in_channels=512, channels=128))
