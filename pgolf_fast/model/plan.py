"""The order in which the trunk visits its blocks, and the U-Net skips between visits."""

from typing import NamedTuple

from pgolf_fast.config.model import ModelConfig


class Visit(NamedTuple):
    """One run of a block in a forward."""

    number: int  # position in the plan
    layer: int
    push: bool  # an encoder: its output is kept as a skip
    skip: int | None  # row of skip_weights for the skip that enters before it
    lanes: bool  # runs on two residual lanes
    last: bool


def visit_plan(config: ModelConfig, *, looping: bool = True) -> tuple[Visit, ...]:
    """Return the visits of a forward, with the extra passes of the loop if `looping` (PR 1394).

    The first half of them are encoders. The decoder at position j joins the skip of the j-th last encoder by
    row j of skip_weights, so a row belongs to a position and not to a block (PR 1493).
    """
    layers = list(range(config.num_layers))
    if looping and config.num_loops:
        first, end = config.loop_start, config.loop_end + 1
        layers[first:end] = layers[first:end] * (config.num_loops + 1)
    half, lanes = len(layers) // 2, config.lanes_from
    return tuple(
        Visit(
            number=i,
            layer=layer,
            push=i < half,
            skip=i - half if half <= i < 2 * half else None,
            lanes=lanes is not None and layer >= lanes,
            last=i == len(layers) - 1,
        )
        for i, layer in enumerate(layers)
    )
