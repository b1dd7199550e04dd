"""Vectors of a soft prompt from files of other programs: one tensor, or one among others.

Source: PPT saves a bare tensor [P, d]; CPM-2's fine-tuning keeps it in the model's state; older
PEFT wrote adapter_model.bin.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from engine.adapters import VECTORS
from engine.checkpoint_cpm2_layout import PROMPT
from engine.checkpoint_tensors import open_tensor_file
from engine.errors import CheckpointError
from engine.pickles import load_pickle

PLACES = ("module", "model")  # under which training frameworks put a state
NAMES = (VECTORS, PROMPT)


def read_prompt_file(path: Path) -> Tensor:
    """The vectors of a .safetensors file, or of one that torch.save wrote (read restricted).

    They are the tensor with the name that PEFT or CPM-2 gives them, or the only one.
    Raises CheckpointError if the file is damaged, holds code, or no such tensor.
    """
    if path.suffix == ".safetensors":
        files = open_tensor_file(path)
        return files.tensor(_choose(path, files.names()))
    content = load_pickle(path)
    if isinstance(content, Mapping):
        place = next((place for place in PLACES if isinstance(content.get(place), Mapping)), None)
        state = content if place is None else content[place]
        content = state[_choose(path, [name for name in state if isinstance(name, str)])]
    if not isinstance(content, Tensor) or content.is_sparse or content.is_nested:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dense tensor")
    return content.clone()


def _choose(path: Path, names: list[str]) -> str:
    if known := [name for name in NAMES if name in names]:
        return known[0]
    if len(names) != 1:
        raise CheckpointError(
            f"{path}: holds {len(names)} tensors, none of them named {' or '.join(NAMES)}"
        )
    return names[0]
