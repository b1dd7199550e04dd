"""Number formats by their short names."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a short name; None stays None. Raises ValueError if there is no such name."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]
