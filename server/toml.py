"""Values as TOML spells them; the standard library only reads it."""

import json
from pathlib import Path


def write_value(value: object) -> str:
    """Spell a value of a setting. Raises TypeError if it is of another kind than settings are."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):  # a JSON string is a TOML string, but for one character
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(write_value, value))}]"
    raise TypeError(f"no setting is a {type(value).__name__}")
