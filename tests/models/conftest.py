"""Before any test imports timm, transformers, open_clip or lpips."""

from tokenflow_ext.models.torchvision_shim import ensure_torchvision

ensure_torchvision()
