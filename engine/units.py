"""Sizes in bytes as people write them."""

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MAX_BYTES = 2**63
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Read '1.5GiB', '300 MB' or '4096' as bytes. Raises ValueError if it is none of the kind."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is no size in bytes; write 4096, 300MB or 1.5GiB")
    size = float(match[1]) * UNITS[match[2].upper()]
    if size >= MAX_BYTES:
        raise ValueError(f"{text[:40]!r} is beyond all memory; write 4096, 300MB or 1.5GiB")
    return int(size)


def format_bytes(size: float) -> str:
    """Write a size with three figures or so: '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
