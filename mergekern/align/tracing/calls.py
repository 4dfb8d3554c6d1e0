"""ATen calls by name, and the rule of each (see `rules`)."""

from __future__ import annotations

from .contractions import (
    addmm,
    attention,
    conv_transpose,
    convolution,
    einsum,
    embedding,
    linear,
    matmul,
)
from .joins import cat, elementwise, fill, gather, glu, index, index_select, pad, stack
from .reductions import (
    batch_norm,
    cumulative,
    extreme,
    group_norm,
    layer_norm,
    mean_pool,
    prelu,
    reduction,
    rms_norm,
    softmax,
    spatial,
)
from .rules import Interpreter, Rule


def _words(text: str) -> list[str]:
    return text.split()


_MOVES = _words(
    "view reshape _unsafe_view permute transpose t numpy_T mT movedim moveaxis swapaxes expand "
    "expand_as broadcast_to unsqueeze squeeze slice select narrow flatten unflatten contiguous "
    "clone alias detach roll repeat repeat_interleave tile flip split split_with_sizes chunk "
    "unbind unsafe_split unsafe_chunk pixel_shuffle pixel_unshuffle channel_shuffle view_as "
    "reshape_as diagonal unfold"
)
_SAME = _words("to _to_copy type_as dropout feature_dropout alpha_dropout")
_SPATIAL = _words(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
_MEAN_POOLS = _words(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)
_REDUCTIONS = _words("mean sum amax amin var std var_mean linalg_vector_norm norm logsumexp")
# Elementwise calls that torch does not tag as such.
_ELEMENTWISE = _words(
    "where masked_fill hardswish hardsigmoid hardtanh relu6 selu celu log_sigmoid softplus rrelu "
    "mish threshold logit nan_to_num clip"
)
_FILLS = _words("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty")


RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, Interpreter.move),
    **dict.fromkeys(_SAME, Interpreter.same),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(_MEAN_POOLS, mean_pool),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), conv_transpose),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("argmax", "argmin"), extreme),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(_FILLS, fill),
    "linear": linear,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "embedding": embedding,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "prelu": prelu,
    "cumsum": cumulative,
    "cat": cat,
    "stack": stack,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "glu": glu,
}
