"""The modules of Stable Diffusion's UNets and text encoders, as rows of data.

UNets have two sets of names: those of diffusers, and those of the original code (`input_blocks`, `middle_block`,
`output_blocks`), under which kohya's scripts train SDXL. Both are made here by the same counting.
"""

from __future__ import annotations

from functools import cache

_TRANSFORMER = (
    *(f"attn{n}.to_{name}" for n in (1, 2) for name in ("q", "k", "v", "out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
_ATTENTION = (
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.{depth}.{leaf}" for depth in range(10) for leaf in _TRANSFORMER),
)
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_TEXT = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_LEVELS = 4


@cache
def unet_modules() -> dict[str, str]:
    """Path in diffusers to name in the original code; more modules than any one UNet has.

    A level has two resnets (and attentions) on its way down and three up. Where a level has no attentions its
    upsampler is called as the first attention would be; `original_upsamplers` has those names.
    """
    rows = dict(_OUTER)
    for level in range(_LEVELS):
        for layer in range(2):
            _pair(rows, f"down_blocks.{level}", layer, f"input_blocks.{1 + 3 * level + layer}")
        rows[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * level}.0.op"
        for layer in range(3):
            _pair(rows, f"up_blocks.{level}", layer, f"output_blocks.{3 * level + layer}")
        rows[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{2 + 3 * level}.2.conv"
    for layer in range(2):
        _resnet(rows, f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}")
    _attention(rows, "mid_block.attentions.0", "middle_block.1")
    return rows


def original_upsamplers() -> dict[str, str]:
    """The upsamplers of levels without attentions: path in diffusers to name in the original code."""
    return {
        f"up_blocks.{level}.upsamplers.0.conv": f"output_blocks.{2 + 3 * level}.1.conv"
        for level in range(_LEVELS)
    }


@cache
def text_modules() -> tuple[str, ...]:
    """The paths in a CLIP text encoder of at most 32 layers."""
    layers = [f"text_model.encoder.layers.{layer}.{leaf}" for layer in range(32) for leaf in _TEXT]
    return (*layers, "text_projection")


def _pair(rows: dict[str, str], block: str, layer: int, original: str) -> None:
    _resnet(rows, f"{block}.resnets.{layer}", f"{original}.0")
    _attention(rows, f"{block}.attentions.{layer}", f"{original}.1")


def _resnet(rows: dict[str, str], path: str, original: str) -> None:
    rows.update({f"{path}.{leaf}": f"{original}.{name}" for leaf, name in _RESNET.items()})


def _attention(rows: dict[str, str], path: str, original: str) -> None:
    rows.update({f"{path}.{leaf}": f"{original}.{leaf}" for leaf in _ATTENTION})
