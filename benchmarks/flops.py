"""What FlopCounterMode does not count by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dropbp_fx.graph.cost import operator_flops


def _counter_of(operator: Any) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return operator_flops(operator, args, kwargs, out_val)

    count._get_raw = True  # FlopCounterMode: hand tensors over as they are
    return count


#: FlopCounterMode has no formula for the CPU's fused attention and would count it as nothing.
CPU_ATTENTION = {
    operator: _counter_of(operator)
    for operator in (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
}
