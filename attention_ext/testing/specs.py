"""The lists of specs: every feature alone, every pair of features, lengths at tile edges, empty sizes, hard inputs."""

from __future__ import annotations

import itertools
import random
from typing import Any

from attention_ext.testing.samples import Spec

SINGLE = [
    Spec("plain"),
    Spec("more_keys", lengths="more_keys"),
    Spec("more_queries", lengths="more_queries"),
    Spec("decode", lengths="decode"),
    Spec("wider_value", head_dims="wider_value"),
    Spec("narrower_value", head_dims="narrower_value"),
    Spec("grouped", heads=(4, 2)),
    Spec("multi_query", heads=(3, 1)),
    Spec("bool_mask", mask="bool bhqk"),
    Spec("bool_mask_shared", mask="bool qk"),
    Spec("bool_mask_padding", mask="bool b11k"),
    Spec("bool_mask_hidden_batch", mask="bool b11k hidden"),
    Spec("bool_mask_rows", mask="bool bhq1"),
    Spec("bool_mask_three_dims", mask="bool hqk"),
    Spec("bool_mask_transposed", mask="bool b1qk transposed"),
    Spec("bool_mask_strided", mask="bool 1hqk strided"),
    Spec("bias", mask="float bhqk"),
    Spec("bias_shared", mask="float qk"),
    Spec("bias_per_head", mask="float 1hqk"),
    Spec("bias_per_batch", mask="float b1qk"),
    Spec("bias_three_dims", mask="float hqk"),
    Spec("bias_padding", mask="float b11k"),
    Spec("bias_one_row", mask="float 1k"),
    Spec("bias_columns", mask="float bh1k"),
    Spec("bias_rows", mask="float bhq1"),
    Spec("bias_one_number", mask="float 11"),
    Spec("bias_transposed", mask="float bhqk transposed", lengths="more_keys"),
    Spec("bias_strided", mask="float bhqk strided", lengths="more_keys"),
    Spec("bias_hiding", mask="float bhqk inf"),
    Spec("bias_hiding_shared", mask="float qk inf"),
    Spec("causal", causal="top_left"),
    Spec("causal_more_keys", causal="top_left", lengths="more_keys"),
    Spec("causal_more_queries", causal="top_left", lengths="more_queries"),
    Spec("causal_bottom_right", causal="bottom_right", lengths="more_keys"),
    Spec("causal_bottom_right_hidden_rows", causal="bottom_right", lengths="more_queries"),
    Spec("causal_decode", causal="bottom_right", lengths="decode"),
    Spec("causal_grouped", causal="top_left", heads=(4, 2)),
    Spec("window", window="both"),
    Spec("window_left", window="left", lengths="more_keys"),
    Spec("window_right", window="right", lengths="more_queries"),
    Spec("window_bottom_right", window="both", alignment="bottom_right", lengths="more_keys"),
    Spec("window_causal", window="left", causal="bottom_right", lengths="more_keys"),
    Spec("window_diagonal", window="diagonal"),
    Spec("softcap", softcap=1.5),
    Spec("alibi", alibi="heads"),
    Spec("alibi_per_batch", alibi="batch", lengths="more_keys"),
    Spec("alibi_bottom_right", alibi="heads", alignment="bottom_right", lengths="more_keys"),
    Spec("sinks", sinks="heads"),
    Spec("sinks_per_batch", sinks="batch", heads=(4, 2)),
    Spec("sinks_hidden_rows", sinks="heads", mask="bool bhqk"),
    Spec("scale", scale=0.3),
    Spec("scale_negative", scale=-0.7),
    Spec("scale_zero", scale=0.0),
    Spec("key_lengths", key_lengths=True, lengths="more_keys"),
    Spec("key_lengths_zero", key_lengths=(4, 0)),
    Spec("key_lengths_bottom_right", key_lengths=True, causal="bottom_right", lengths="more_keys"),
    Spec("varlen", varlen=True, lengths="more_keys"),
    Spec("varlen_causal", varlen=True, causal="bottom_right", lengths="more_keys"),
    Spec("varlen_bias", varlen=True, mask="float bhqk", lengths="more_keys"),
    Spec("varlen_padded", varlen=True, padding=5, alibi="batch", sinks="heads", lengths="more_keys"),
    Spec("dropout", dropout_p=0.3),
    Spec("offsets_causal", offsets=(3, 1), causal="top_left", heads=(4, 2)),
    Spec("offsets_window", offsets=(2, 5), window="both", alibi="heads", alignment="bottom_right", lengths="more_keys"),
    Spec("offsets_dropout", offsets=(5, 8), dropout_p=0.3, window="left", sinks="heads", lengths="more_queries"),
    Spec("offsets_varlen", offsets=(3, 0), varlen=True, causal="top_left", alibi="batch", lengths="more_keys"),
    Spec("no_grad_logsumexp", grad_logsumexp=False),
    Spec("everything", (7, 9), (3, 4), 2, (4, 2), "float 1hqk inf", "bottom_right", (4, None), "top_left", 1.5, "batch",
         "heads", 0.4, (9, 6), False, 0.2),
]  # fmt: skip

BLOCK_MASKS = [
    Spec("blocks_causal", block_mask="causal"),
    Spec("blocks_causal_more_keys", block_mask="causal 128x128", lengths="more_keys", heads=(4, 2)),
    Spec("blocks_document", block_mask="document 16x8"),
    Spec("blocks_window", block_mask="window", lengths="more_queries"),
    Spec("blocks_prefix", block_mask="prefix 32x64", lengths="more_keys"),
    Spec("blocks_random", block_mask="random bh", lengths="more_keys"),
    Spec("blocks_random_per_head", block_mask="random h 64x64", heads=(4, 2), lengths="more_keys"),
    Spec("blocks_random_per_batch", block_mask="random b 128x32", heads=(3, 1), lengths="more_keys"),
    Spec("blocks_of_one_query", block_mask="random bh 1x8", lengths="more_keys"),
    Spec("blocks_of_odd_queries", block_mask="random h 7x24", lengths="more_queries"),
    Spec("blocks_decode", block_mask="random bh 1x16", lengths="decode", heads=(4, 2)),
    Spec("blocks_decode_shared", block_mask="random 2x128", lengths="decode", heads=(3, 1), sinks="heads"),
    Spec("blocks_decode_everything", block_mask="random h 2x40", lengths="decode", mask="bool bhqk", softcap=1.5,
         alibi="heads", window=(300, 2), alignment="bottom_right"),
    Spec("blocks_and_causal", block_mask="random bh", causal="top_left", lengths="more_keys"),
    Spec("blocks_and_window", block_mask="random h 32x32", window="both", alignment="bottom_right",
         lengths="more_queries"),
    Spec("blocks_and_bool_mask", block_mask="random bh 64x48", mask="bool bhqk", lengths="more_keys"),
    Spec("blocks_and_padding_mask", block_mask="causal 64x64", mask="bool b11k"),
    Spec("blocks_and_bias", block_mask="random h", mask="float bhqk inf", lengths="more_keys"),
    Spec("blocks_and_softcap", block_mask="document", softcap=1.5),
    Spec("blocks_and_alibi", block_mask="random b", alibi="batch", lengths="more_keys"),
    Spec("blocks_and_sinks", block_mask="random bh", sinks="heads", heads=(4, 2)),
    Spec("blocks_and_key_lengths", block_mask="random bh", key_lengths=True, lengths="more_keys"),
    Spec("blocks_and_scale", block_mask="random bh 16x16", scale=-0.7),
    Spec("blocks_and_dropout", block_mask="random bh", dropout_p=0.3, lengths="more_queries"),
    Spec("blocks_and_offsets", block_mask="random bh 32x48", offsets=(3, 1), causal="top_left", heads=(4, 2)),
    Spec("blocks_varlen", block_mask="random bh", varlen=True, lengths="more_keys"),
    Spec("blocks_varlen_everything", block_mask="random bh 32x24", varlen=True, padding=5, mask="float bhqk",
         causal="bottom_right", alibi="batch", sinks="heads", lengths="more_keys", heads=(4, 2)),
]  # fmt: skip

_SELF_CHECK = ("plain", "grouped", "bool_mask", "bias", "causal_more_keys", "window", "softcap", "alibi", "sinks")
SELF_CHECK = [spec for spec in SINGLE if spec.name in _SELF_CHECK]

HARD = [
    spec
    for name in ("x3", "x30", "tied", "one_hot", "outlier")
    for spec in (
        Spec(f"{name}_plain", distribution=name),
        Spec(f"{name}_causal", distribution=name, causal="top_left", heads=(4, 2)),
        Spec(f"{name}_bias", distribution=name, mask="float 1hqk", lengths="more_keys"),
    )
]

_EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 191, 192, 193, 257, 513)

LENGTHS = [
    *(Spec(f"lengths_{n}_by_33", lengths=(n, 33), head_dims=(8, 8)) for n in _EDGES),
    *(Spec(f"lengths_33_by_{n}", lengths=(33, n), head_dims=(8, 8)) for n in _EDGES if n != 33),
    *(Spec(f"lengths_{n}_causal", lengths=(n, n), head_dims=(8, 8), causal="top_left", heads=(2, 1)) for n in _EDGES),
    *(Spec(f"lengths_{n}_window", lengths=(n, n + 1), head_dims=(8, 8), window=(33, 7)) for n in _EDGES),
    *(Spec(f"decode_{q}_by_{n}", lengths=(q, n), head_dims=(16, 16), heads=(4, 2), causal="bottom_right")
      for q in (1, 2, 7) for n in (1, 63, 193, 1025)),
]  # fmt: skip

# More keys than a split of the decode kernel (1,536), and than one round of key groups in the backward kernel (1,728).
LONG = [
    Spec("decode_1_by_3100", lengths=(1, 3100), head_dims=(40, 24), heads=(4, 2), batch=1),
    Spec("decode_8_by_4700", lengths=(8, 4700), head_dims=(24, 40), heads=(4, 2), batch=1, causal="bottom_right"),
    Spec("decode_8_by_4700_sinks", lengths=(8, 4700), head_dims=(16, 16), batch=1, sinks="heads"),
    Spec("decode_3_by_3100_window", lengths=(3, 3100), head_dims=(16, 16), heads=(3, 1), batch=1, window=(1700, 0),
         alignment="bottom_right", sinks="heads"),
    Spec("decode_2_by_3100_lengths", lengths=(2, 3100), head_dims=(16, 16), heads=(4, 2), batch=3,
         key_lengths=(3100, 1537, 1536), mask="float b11k"),
    *(Spec(f"lengths_33_by_{n}", lengths=(33, n), head_dims=(16, 24), batch=1) for n in (1730, 2700, 3700)),
    *(Spec(f"lengths_33_by_{n}_bias", lengths=(33, n), head_dims=(24, 16), heads=(2, 1), batch=1, mask="float 1hqk inf")
      for n in (1730, 2700, 3700)),
]  # fmt: skip

_DIMS = (1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 72, 80, 96, 111, 112, 128, 129, 192, 256, 320)

HEAD_DIMS = [
    *(Spec(f"head_dim_{d}", lengths=(35, 70), head_dims=(d, d), batch=1) for d in _DIMS),
    *(Spec(f"head_dims_{d}_{d_v}", lengths=(35, 70), head_dims=(d, d_v), batch=1)
      for d, d_v in ((1, 65), (65, 1), (192, 128), (128, 192), (17, 16), (16, 17), (8, 320), (320, 8))),
]  # fmt: skip

EMPTY = [
    Spec("empty_batch", batch=0),
    Spec("empty_heads", heads=(0, 0)),
    Spec("empty_queries", lengths=(0, 5)),
    Spec("empty_keys", lengths=(5, 0)),
    Spec("empty_keys_with_sinks", lengths=(5, 0), sinks="heads"),
    Spec("empty_keys_with_bias", lengths=(5, 0), mask="float bhqk"),
    Spec("empty_lengths", lengths=(0, 0)),
    Spec("empty_value", head_dims=(3, 0)),
    Spec("empty_value_with_bias", head_dims=(3, 0), mask="float qk", causal="top_left"),
]

_FACTORS: dict[str, tuple[Any, ...]] = {
    "mask": (None, "bool bhqk", "bool qk", "bool b11k", "bool bhqk strided", "float bhqk", "float qk", "float b1q1",
             "float 1h1k", "float hqk", "float bhqk inf", "float bhqk transposed"),
    "causal": (None, "top_left", "bottom_right"),
    "alignment": ("top_left", "bottom_right"),
    "window": (None, "left", "right", "both"),
    "lengths": ("equal", "more_keys", "more_queries", "decode"),
    "head_dims": ("same", "wider_value", "narrower_value"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "softcap": (0.0, 1.5),
    "alibi": (None, "heads", "batch"),
    "sinks": (None, "heads"),
    "scale": (None, 0.4, -0.5),
    "sequences": ("dense", "key_lengths", "varlen"),
    "dropout_p": (0.0, 0.3),
    "layout": ("contiguous", "heads_last", "packed", "offset", "strided", "expanded", "overlapping"),
    "grad": ("random", "ones", "heads_last"),
    "grad_logsumexp": (False, True),
    "distribution": ("gaussian", "x3"),
}  # fmt: skip


def pairs() -> list[Spec]:
    """About 90 specs that cover all pairs: every two values of two features occur together at least once."""
    names = list(_FACTORS)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(_FACTORS[a])), range(len(_FACTORS[b])))
    }
    generator = random.Random(0)
    specs: list[Spec] = []
    while missing:
        indices = dict(min(missing))
        for name in generator.sample(names, len(names)):
            if name not in indices:
                values = generator.sample(range(len(_FACTORS[name])), len(_FACTORS[name]))
                gains = [sum(_pair((name, x), item) in missing for item in indices.items()) for x in values]
                indices[name] = values[gains.index(max(gains))]
        missing -= {_pair(x, y) for x, y in itertools.combinations(indices.items(), 2)}
        chosen = {name: _FACTORS[name][x] for name, x in indices.items()}
        sequences = chosen.pop("sequences")
        chosen |= {"key_lengths": sequences == "key_lengths", "varlen": sequences == "varlen"}
        specs.append(Spec(f"pair_{len(specs)}", **chosen))
    return specs


def _pair(x: tuple[str, int], y: tuple[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    names = list(_FACTORS)
    return (x, y) if names.index(x[0]) < names.index(y[0]) else (y, x)


PAIRS = pairs()

FEATURES = [*SINGLE, *PAIRS, *BLOCK_MASKS]
