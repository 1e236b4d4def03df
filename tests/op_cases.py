"""Arguments for every op: `CASES[op]` maps a case id to a function that draws the positional arguments."""

from functools import partial

import torch
from op_arguments import (
    FLOATS,
    GEMM_SHAPES,
    GROUPED_SHAPES,
    ROWS,
    add_norm_args,
    attention,
    block,
    codes,
    compensated,
    compensated_odd_scales,
    grouped,
    grouped_full,
    grouped_odd_scales,
    grouped_poisoned,
    linear,
    linear_asymmetric,
    linear_full,
    linear_odd_scales,
    linear_poisoned,
    linear_quantize,
    linear_quantize_poisoned,
    linear_saturated,
    norm_args,
    normal,
    per_group,
    poisoned,
    qkv,
    qkv_poisoned,
    residual_args,
    scales,
    strided_residual,
)

from vqvit import numerics as nm
from vqvit import reference as ref
from vqvit.layouts import PACKED

CASES = {
    "quantize_per_token": {
        **{name: lambda x=x: (x(),) for name, x in ROWS.items()},
        **{
            f"delta_{name}": lambda x=ROWS[name]: (x(), 0.7)
            for name in ("197x768", "odd_k", "poisoned", "offset", "k1")
        },
        "delta_negative": lambda: (normal(11, 70), -0.4),
        "equalizer": lambda: (normal(11, 70), 0.0, torch.rand(70) + 0.5),
        "equalizer_delta_sums": lambda: (normal(11, 70), 0.3, torch.rand(70) + 0.5, True, True),
        **{
            f"asymmetric_{name}": lambda x=ROWS[name]: (x(), 0.0, None, False, True)
            for name in ("197x768", "odd_k", "zero_rows", "poisoned", "offset", "empty", "bf16_197", "tiny_and_huge")
        },
    },
    "quantize_per_group": {
        **{name: lambda x=x: (x(),) for name, x in ROWS.items()},
        "equalizer": lambda: (normal(11, 300), torch.rand(300) + 0.5),
    },
    "quantize_static": {
        **{name: lambda x=x: (x(), torch.tensor(0.037)) for name, x in ROWS.items()},
        "equalizer_sums": lambda: (normal(11, 70), torch.tensor(0.02), torch.rand(70) + 0.5, True),
    },
    "layer_norm": {
        **{name: lambda x=x: norm_args(x()) for name, x in ROWS.items()},
        "paper": lambda: (*norm_args(normal(11, 70)), True),
        "vectors_of_halves": lambda: (normal(11, 70), *torch.randn(2, 70).half(), 1e-6),
    },
    "layernorm_quantize": {
        **{name: lambda x=x: norm_args(x()) for name, x in ROWS.items()},
        "delta": lambda: (*norm_args(normal(11, 70)), 0.5),
        "static_sums": lambda: (*norm_args(poisoned()), 0.0, torch.tensor(0.02), True),
        "paper": lambda: (*norm_args(normal(11, 70)), 0.0, None, False, True),
    },
    "add_layernorm_quantize": {
        **{
            name: lambda x=ROWS[name]: add_norm_args(x())
            for name in ("197x768", "odd_k", "poisoned", "empty", "batch", "transposed")
        },
        "no_layer_scale": lambda: add_norm_args(normal(11, 70), layer_scale=False),
        "bf16": lambda: add_norm_args(normal(11, 70, dtype=torch.bfloat16), torch.bfloat16),
        "fp16_into_fp32": lambda: add_norm_args(normal(11, 70, dtype=torch.float16)),
        "static": lambda: (*add_norm_args(normal(11, 70)), 0.0, torch.tensor(0.02), True),
        "delta_paper": lambda: (*add_norm_args(normal(11, 70)), 0.5, None, False, True),
    },
    "patchify_quantize": {
        "vit_b16": lambda: (normal(1, 3, 224, 224), 16, 16),
        "rectangular": lambda: (normal(2, 1, 12, 20), 3, 5),
        "channels_last": lambda: (normal(2, 3, 28, 28).to(memory_format=torch.channels_last), 14, 14),
        "equalizer_bf16": lambda: (normal(2, 3, 16, 16, dtype=torch.bfloat16), 4, 4, torch.rand(48) + 0.5),
        "no_image": lambda: (normal(0, 3, 8, 8), 4, 4),
    },
    "int8_mm": {name: lambda s=s: (codes(s[0], s[1]), codes(s[2], s[1])) for name, s in GEMM_SHAPES.items()},
    "int8_linear": {
        **{name: lambda s=s: linear(s) for name, s in GEMM_SHAPES.items()},
        **{
            f"{activation}_{name}": partial(linear_full, (19, 40, 70), activation, dtype)
            for activation in nm.ACTIVATIONS
            for name, dtype in FLOATS.items()
        },
        **{
            f"{layout}_{name}": partial(linear_full, shape, "gelu", torch.float32, layout)
            for layout in PACKED
            for name, shape in GEMM_SHAPES.items()
        },
        **{
            f"odd_scales_{activation}_{layout}": partial(linear_odd_scales, (19, 40, 70), activation, layout)
            for activation in nm.ACTIVATIONS
            for layout in ("rows", *PACKED)
        },
        "odd_scales_epilogue": partial(linear_odd_scales, (19, 40, 130), "none", epilogue=True),
        "odd_scales_whole_tiles": partial(linear_odd_scales, (24, 64, 128), "none"),
        "odd_scales_grouped": partial(grouped_odd_scales, (19, 300, 70), "silu"),
        "a_zero": partial(linear_asymmetric, (9, 37, 70), True, False),
        "b_zero": partial(linear_asymmetric, (9, 37, 70), False, True),
        "both_zero": partial(linear_asymmetric, (9, 37, 70), True, True),
        "saturated": linear_saturated,
        "poisoned": linear_poisoned,
        "strided": strided_residual,
        **{f"grouped_{name}": partial(grouped, s) for name, s in GROUPED_SHAPES.items()},
        **{f"grouped_{name}": partial(grouped_full, (19, 300, 70), "gelu", dtype) for name, dtype in FLOATS.items()},
        **{
            f"grouped_{layout}": partial(grouped_full, (14, 260, 129), "gelu", torch.float32, layout)
            for layout in PACKED
        },
        "grouped_poisoned": grouped_poisoned,
    },
    "int8_linear_quantize": {
        **{f"per_token_{name}": partial(linear_quantize, s) for name, s in GEMM_SHAPES.items()},
        **{f"static_{name}": partial(linear_quantize, s, static=True) for name, s in GEMM_SHAPES.items()},
        **{layout: partial(linear_quantize, (19, 40, 70), layout=layout, row_sum=True) for layout in PACKED},
        **{f"{layout}_static": partial(linear_quantize, (19, 40, 70), layout=layout, static=True) for layout in PACKED},
        "asymmetric_sums": partial(linear_quantize, (19, 40, 70), symmetric=False, row_sum=True),
        "quick_gelu_sums": partial(linear_quantize, (19, 40, 70), "quick_gelu", row_sum=True),
        "poisoned": partial(linear_quantize_poisoned, False),
        "poisoned_static": partial(linear_quantize_poisoned, True),
        **{f"per_group_{name}": partial(per_group, s) for name, s in GEMM_SHAPES.items()},
        "per_group_300": partial(per_group, (19, 40, 300), "none"),
        **{f"per_group_{layout}": partial(per_group, (19, 40, 300), layout=layout) for layout in PACKED},
        "per_group_grouped": partial(per_group, (19, 300, 200), grouped_input=True),
        **{
            f"per_group_grouped_{layout}": partial(per_group, (19, 300, 200), "gelu_tanh", True, layout)
            for layout in PACKED
        },
        "per_group_poisoned": lambda: (*linear_quantize_poisoned(False), True, False, True),
        "per_token_grouped": lambda: (*grouped((9, 200, 70)), normal(70), "gelu"),
    },
    "quantize_residual": {
        name: lambda x=ROWS[name]: residual_args(x())
        for name in ("197x768", "odd_k", "ties", "poisoned", "zero_rows", "bf16_197", "empty")
    },
    "int8_linear_compensated": {
        **{mode: partial(compensated, (13, 37, 70), mode) for mode in ref.COMPENSATION_TERMS},
        **{
            f"odd_scales_{mode}_{activation}": partial(compensated_odd_scales, (13, 37, 70), mode, activation)
            for mode in ref.COMPENSATION_TERMS
            for activation in ("none", "relu", "silu")
        },
        "197_full": partial(compensated, (197, 64, 65), "full"),
        **{layout: partial(compensated, (13, 37, 70), "full", layout=layout) for layout in PACKED},
        **{
            f"{layout}_activation": partial(
                compensated, (13, 37, 70), "activation", layout=layout, weight_residual=False
            )
            for layout in PACKED
        },
        **{f"full_{name}": partial(compensated, (9, 70, 40), "full", 1.0, True, name) for name in nm.ACTIVATIONS},
        "residual": partial(compensated, (70, 64, 130), "weight", epilogue=True),
        "residual_bf16": partial(compensated, (9, 33, 20), "full", epilogue=True, dtype=torch.bfloat16),
        "layer_scale": lambda: (*compensated((9, 33, 20), "paper"), normal(20)),
        "paper_mu_no_bias": partial(compensated, (9, 33, 20), "paper", 1.7, False),
        "empty": lambda: (codes(0, 8), scales(0), codes(0, 8), codes(5, 8), scales(5), codes(5, 8)),
    },
    "quantize_qkv": {
        "vit_s": lambda: (normal(1, 197, 3 * 128), 2),
        "head_80": lambda: (normal(2, 17, 3 * 160), 2),
        "odd_head": lambda: (normal(1, 5, 3 * 33), 3),
        "bf16": lambda: (normal(1, 9, 96, dtype=torch.bfloat16), 2),
        "strided": lambda: (normal(9, 2, 96).transpose(0, 1), 2),
        "one_token": lambda: (normal(3, 1, 48), 2),
        "poisoned": lambda: (poisoned()[:, :48].unsqueeze(0), 2),
        "no_image": lambda: (normal(0, 4, 48), 2),
    },
    "int8_linear_qkv": {
        "vit_s": partial(qkv, 197, 1, 96, 2, 64),
        "two_images": partial(qkv, 17, 2, 130, 4, 32),
        "head_80": partial(qkv, 9, 2, 33, 2, 80),
        "odd_head": partial(qkv, 5, 1, 20, 3, 11, bias=False),
        **{layout: partial(qkv, 9, 3, 70, 2, 64, layout=layout) for layout in PACKED},
        "zero_points": partial(qkv, 9, 3, 70, 1, 64, zero=True),
        "grouped": lambda: (*grouped((18, 200, 192)), normal(192), 9, 1),
        "one_token": partial(qkv, 1, 3, 40, 1, 128),
        "poisoned": qkv_poisoned,
        "no_image": partial(qkv, 4, 0, 40, 2, 16),
    },
    "int8_attention": {
        "197": partial(attention, 1, 2, 197, 197, 64),
        "one_query": partial(attention, 2, 3, 1, 50, 64),
        "one_key": partial(attention, 1, 1, 3, 1, 16),
        "head_80": partial(attention, 1, 2, 33, 65, 80),
        "odd": partial(attention, 2, 1, 7, 13, 24),
        "long": partial(attention, 1, 1, 20, 530, 32),
        "bf16": lambda: (*attention(1, 2, 17, 17, 32), torch.bfloat16),
        "no_image": partial(attention, 0, 2, 4, 4, 16),
        **{f"poisoned_{side}": partial(attention, 1, 2, 9, 9, 16, side) for side in "qkv"},
    },
    "int8_attention_quantize": {
        "197": partial(attention, 1, 2, 197, 197, 64),
        "three_heads": partial(attention, 2, 3, 9, 50, 64),
        "head_32": partial(attention, 1, 6, 33, 65, 32),
        "head_80": partial(attention, 1, 2, 7, 13, 80),
        "head_128": partial(attention, 1, 2, 20, 300, 128),
        "odd": partial(attention, 2, 1, 7, 13, 11),
        "no_image": partial(attention, 0, 2, 4, 4, 16),
        **{f"poisoned_{side}": partial(attention, 1, 2, 9, 9, 16, side) for side in "qkv"},
        **{f"poisoned_{side}_of_pair": partial(attention, 1, 3, 9, 9, 64, side) for side in "qkv"},
        "poisoned_v_128": partial(attention, 1, 2, 9, 300, 128, "v"),
        "no_image_of_pairs": partial(attention, 0, 2, 4, 4, 64),
    },
    "int8_encoder_block": {
        "vit_197": partial(block, 1, 197, 128, 2, 64, 256),
        "two_images": partial(block, 2, 50, 96, 3, 32, 130, layer_scales=True),
        "bf16": partial(block, 2, 17, 64, 1, 64, 128, torch.bfloat16, layer_scales=True),
        "fp16_deltas": partial(block, 1, 9, 48, 2, 24, 100, torch.float16, deltas=(0.3, 0.5, 0.7)),
        "odd": partial(block, 2, 5, 33, 3, 11, 71, activation="silu", biases=False),
        "inner_width": partial(block, 1, 7, 40, 2, 80, 65, activation="quick_gelu"),
        "rows": partial(block, 1, 13, 64, 2, 32, 128, layouts=("rows",) * 4, activation="gelu_tanh"),
        "strips": partial(block, 2, 29, 64, 2, 64, 200, layouts=("strips",) * 4),
        "layouts": partial(block, 1, 13, 64, 2, 32, 128, layouts=("strips", "panels", "rows", "strips"), leading=3),
        "no_activation": partial(block, 1, 13, 64, 2, 32, 128, activation="none"),
        "relu_poisoned": partial(block, 3, 9, 64, 2, 32, 128, activation="relu", poison=True),
        "groups": partial(block, 2, 11, 64, 3, 64, 260, groups=(True, True), layer_scales=True),
        "groups_bf16": partial(block, 1, 21, 64, 2, 64, 130, torch.bfloat16, groups=(True, True)),
        "groups_odd": partial(block, 2, 5, 33, 3, 59, 271, groups=(True, False), deltas=(0.3, 0.0, 0.7)),
        "groups_poisoned": partial(block, 3, 9, 64, 2, 80, 160, groups=(False, True), poison=True),
        "one_token": partial(block, 3, 1, 64, 1, 64, 64),
        "no_image": partial(block, 0, 4, 64, 2, 32, 128),
        "leading": partial(block, 1, 197, 128, 2, 64, 256, leading=1),
        "leading_of_three": partial(block, 3, 50, 96, 3, 32, 130, layer_scales=True, leading=2),
        "leading_groups": partial(block, 2, 21, 64, 3, 64, 260, groups=(True, True), leading=1),
        "leading_mixed_panels": partial(block, 2, 13, 40, 2, 80, 65, torch.bfloat16, leading=7),
        "leading_poisoned": partial(block, 3, 9, 64, 2, 64, 128, poison=True, leading=5),
        "leading_all": partial(block, 2, 9, 64, 2, 32, 128, leading=9),
        "strided": lambda: (normal(9, 2, 64).transpose(0, 1), *block(2, 9, 64, 2, 32, 128)[1:]),
    },
    "pack_weight": {
        f"{layout}_{name}": lambda s=s, layout=layout: (codes(s[2], s[1]), layout)
        for layout in PACKED
        for name, s in GEMM_SHAPES.items()
    },
    "unpack_weight": {
        f"{layout}_{name}": lambda s=s, layout=layout: (ref.pack_weight(codes(s[2], s[1]), layout), s[2], s[1])
        for layout in PACKED
        for name, s in GEMM_SHAPES.items()
    },
}
