"""DETR-like models of transformers, of random weights and a few thousand parameters; and what is to be found."""

from typing import Any, cast

import torch
import transformers

hf = cast("Any", transformers)
CLASSES, QUERIES, WIDTH, LAYERS, GROUPS = 5, 20, 32, 2, 3  # groups: of LW-DETR
LABELS = [
    {
        "class_labels": torch.tensor([1, 3, 0]),
        "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.3, 0.4], [0.2, 0.7, 0.1, 0.3]]),
    },
    {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},  # nothing there
    {"class_labels": torch.tensor([4, 4]), "boxes": torch.tensor([[0.5, 0.5, 0.9, 0.8], [0.4, 0.1, 0.2, 0.1]])},
]


def build(name: str, **extra: Any) -> Any:
    """A model of a few thousand parameters, in training."""
    stages: dict[str, Any] = {"hidden_sizes": [8, 12, 12, 12], "embedding_size": 8}
    stages["out_features"] = ["stage2", "stage3", "stage4"]
    config: dict[str, Any] = {"num_labels": CLASSES, "num_queries": QUERIES, "decoder_layers": LAYERS}
    config |= {"decoder_ffn_dim": 16, "auxiliary_loss": True}
    if name == "LwDetr":
        config |= {"d_model": WIDTH, "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
        config |= {"group_detr": GROUPS, "projector_scale_factors": [1.0], "num_queries": 8}
        vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
        vit |= {"pretrain_image_size": 64, "window_block_indices": [1], "out_indices": [2], "num_windows": 4}
        config["backbone_config"] = hf.LwDetrViTConfig(**vit)
    else:
        config |= {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
        config |= {"decoder_attention_heads": 2, "hidden_size" if name == "DabDetr" else "d_model": WIDTH}
    if name in ("RTDetr", "RTDetrV2", "DFine", "Deimv2"):
        config |= {"encoder_hidden_dim": WIDTH, "encoder_in_channels": [12] * 3, "feat_strides": [8, 16, 32]}
        config |= {"decoder_in_channels": [WIDTH] * 3, "num_denoising": 10}
        config["decoder_n_points"] = 2 if name.startswith("RT") else [2, 2, 2]
    if name.startswith("RT"):
        stages["embeddings_size"] = stages.pop("embedding_size")
        config["backbone_config"] = hf.RTDetrResNetConfig(depths=[1] * 4, **stages)
    elif name in ("DFine", "Deimv2"):
        widths = {f"stage_{each}_channels": [8, 12, 12, 12] for each in ("mid", "out")}
        blocks = {"stage_in_channels": [8, 8, 12, 12], "stem_channels": [3, 8, 8], "stage_num_blocks": [1] * 4}
        config["backbone_config"] = hf.HGNetV2Config(**widths, **blocks, stage_numb_of_layers=[1] * 4, **stages)
    elif name != "LwDetr":
        config["backbone_config"] = hf.ResNetConfig(depths=[1] * 4, **stages)
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForObjectDetection")(getattr(hf, f"{name}Config")(**{**config, **extra})).train()
    with torch.no_grad():
        for parameter in model.parameters():  # some are zero, so that boxes would be equal and their order by chance
            parameter += 0.05 * torch.randn_like(parameter)
    return model
