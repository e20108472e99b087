"""Ranges of int8 weights on which no processor's kernels overflow.

x86 processors without VNNI multiply uint8 by int8 in pairs and add the two products in 16 bits,
which saturate: 255 (a + b) must stay below 2¹⁵, so that two codes that meet may add up to 128. A
file that does not keep to it answers otherwise there than on all other processors.
"""

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

LEVELS = 127  # of a symmetric int8 weight
_PAIR = 127.5  # sum of two neighbouring codes before they are rounded, at most


def safe_ranges(*orders: np.ndarray) -> np.ndarray:
    """The least r of each row for which codes round(127 w / r) add up to 128 in no pair.

        r = max(max |w_k|, 127 / 127.5 max |w_k + w_k+1|, both of one sign)

    Args:
        orders: the same rows (n, k), in every order in which a kernel may read them.
    Returns: (n,).
    """
    ranges: np.ndarray = np.abs(orders[0]).max(1)
    for rows in orders:
        for part in (rows.clip(min=0), (-rows).clip(min=0)):
            pairs = (part[:, :-1] + part[:, 1:]).max(1, initial=0)
            ranges = np.maximum(ranges, LEVELS / _PAIR * pairs)
    return ranges


def weight_overrides(model: ModelProto) -> dict[str, list[dict[str, Any]]]:
    """What onnxruntime's quantizer takes as TensorQuantOverrides: of every channel, its range."""
    values = {value.name: value for value in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul") or node.input[1] not in values:
            continue
        weight = numpy_helper.to_array(values[node.input[1]])
        if node.op_type == "MatMul":
            axis, orders = 1, [weight.T]
        elif _is_depthwise(node, weight):
            continue  # its kernels widen before they multiply
        else:
            axis, orders = 0, [weight, np.moveaxis(weight, 1, -1)]
        ranges = safe_ranges(*(rows.reshape(len(rows), -1) for rows in orders))
        found[node.input[1]] = [{"axis": axis, "rmin": -r, "rmax": r} for r in ranges]
    return found


def _is_depthwise(node: NodeProto, weight: np.ndarray) -> bool:
    groups = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "group"), 1)
    return bool(groups == len(weight) and weight.shape[1] == 1)
