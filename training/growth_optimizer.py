"""The state of an optimiser through growth: carried, scaled as its gradients are, or reset.

Source: StackingBERT's code carries moments; staged training (arXiv:2203.06211) scales them so that
the training dynamics stay.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.transformer import Transformer
from training.growth import Growth, is_t5
from training.growth_axes import Axis, Factor, expand, parse_layer
from training.growth_depth import deepen
from training.growth_width import expand_layered
from training.optimizers import build_optimizer
from training.recipe import OptimizerName, TrainRecipe
from training.state import STATE_FILE, find_state, read_state, write_state

Moments = Literal["carry", "scale", "reset"]
ByKey = dict[str, dict[str, Tensor]]  # exp_avg and the like -> parameter -> tensor
FIRST = ("exp_avg", "momentum_buffer")  # begin at zero where nothing is known, others at their mean
FACTORS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))  # torch's, Hugging Face's
OPTIMIZERS: dict[str, OptimizerName] = {
    "AdamW": "adamw",
    "Adafactor": "adafactor",
    "AdafactorHF": "adafactor_hf",
    "Muon": "muon",
}


class RunState(NamedTuple):
    """What a run had come to: its optimiser, weights, and moments by key and parameter."""

    optimizer: str
    weights: dict[str, Tensor]
    moments: ByKey


def read_run(run: Path, config: ModelConfig) -> RunState:
    """Read the state of a run folder.

    Raises CheckpointError if there is none, it is damaged, or of another model than `config`.
    """
    path = run / STATE_FILE
    try:
        path = find_state(run) or path
        if not path.exists():
            raise CheckpointError(
                f"{path}: does not exist; give the folder of a run that was trained"
            )
        facts, tensors = read_state(path)
        names = parameter_order(config, OPTIMIZERS[facts["optimizer"]])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be grown ({error}); is it damaged?") from error
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in expected.items()}:
        raise CheckpointError(f"{path}: holds another model than the one to grow")
    moments: ByKey = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            index, key = name.removeprefix("optimizer.").split(".", 1)
            moments.setdefault(key, {})[names[int(index)]] = tensor
    return RunState(facts["optimizer"], weights, moments)


def write_run(run: Path, config: ModelConfig, state: RunState) -> None:
    """Write a state from which `infmoe train` goes on in a run folder, at step 0.

    Raises CheckpointError if the folder holds a state.
    """
    if find_state(run) is not None:
        raise CheckpointError(f"{run}: holds the state of a run; choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    order = parameter_order(config, OPTIMIZERS[state.optimizer])
    index = {name: i for i, name in enumerate(order)}
    tensors = {f"model.{name}": tensor for name, tensor in state.weights.items()}
    for key, values in state.moments.items():
        tensors |= {f"optimizer.{index[name]}.{key}": value for name, value in values.items()}
    facts: dict[str, Any] = {"step": 0, "optimizer": state.optimizer, "config": asdict(config)}
    write_state(run, facts, tensors)


def parameter_order(config: ModelConfig, optimizer: OptimizerName) -> list[str]:
    """Names of the parameters in the order in which a run's optimiser numbers them."""
    with torch.device("meta"):
        model = Transformer(config)
    built = build_optimizer(model, TrainRecipe(steps=1, optimizer=optimizer))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in built.param_groups for p in group["params"]]


def check_moments(growth: Growth, how: Moments) -> None:
    """Raise ConfigError if moments cannot go through this growth."""
    if how != "reset" and (growth.upcycles or growth.vocabulary is not None):
        raise ConfigError(
            f"moments: {how} goes through width and depth; experts and another vocabulary begin "
            "anew: choose reset, or grow in two steps"
        )
    if how != "reset" and not is_t5(growth.source):
        raise ConfigError(f"moments: {how} is for models of the T5 family; choose reset")


def grow_moments(
    moments: ByKey, shapes: Mapping[str, Tensor], growth: Growth, how: Moments
) -> ByKey:
    """The moments of the grown model; identity layers have none, and begin like new parameters.

    `shapes` are the weights of the source. carry copies; scale multiplies by what growth does to
    gradients (squared for second moments); reset gives none. What is new has a first moment of 0
    and the mean of the old second moments.
    Raises ConfigError if experts or another vocabulary are to be given moments.
    """
    check_moments(growth, how)
    if how == "reset":
        return {}
    wide: ByKey = {}
    for key, tensors in moments.items():
        if any(key in pair for pair in FACTORS):
            continue
        wide[key] = {
            name: tensor if tensor.ndim == 0 else _widen_moment(tensors, name, key, growth, how)
            for name, tensor in tensors.items()
        }
    for row, column in FACTORS:
        if row in moments:
            factors = _widen_factors(moments[row], moments[column], shapes, growth, how)
            wide |= dict(zip((row, column), factors, strict=True))
    identity = {
        (stack, i)
        for stack, layers in growth.layers.items()
        for i, layer in enumerate(layers)
        if layer.is_identity
    }
    deep = {key: deepen(v, growth.layers, zero_writers=False) for key, v in wide.items()}
    return {
        key: {name: value for name, value in v.items() if parse_layer(name) not in identity}
        for key, v in deep.items()
    }


def _widen_moment(
    tensors: dict[str, Tensor], name: str, key: str, growth: Growth, how: Moments
) -> Tensor:
    factor: Factor = "none"
    if how == "scale":
        factor = "grad" if key in FIRST else "grad_squared"
    grown = expand_layered(tensors, name, growth.maps, factor)
    fill = torch.zeros(()).double() if key in FIRST else _known_mean(grown.values, grown.is_new)
    return torch.where(grown.is_new, fill, grown.values).to(tensors[name].dtype)


def _known_mean(values: Tensor, is_new: Tensor) -> Tensor:
    return values[~is_new].mean()


def _widen_factors(
    old_rows: Mapping[str, Tensor],
    old_columns: Mapping[str, Tensor],
    shapes: Mapping[str, Tensor],
    growth: Growth,
    how: Moments,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adafactor's: the second moment of a matrix is row x column / mean(row).

    With rows scaled to r and columns to c, the grown matrix is r x c / mean(row); its own factors
    are its means over columns and over rows. Under AKI they are those of the own layer. Torch keeps
    a dimension of 1 where the mean was taken, Hugging Face does not.
    """
    factor: Factor = "grad_squared" if how == "scale" else "none"
    rows, columns = {}, {}
    for name, row in old_rows.items():
        axes = growth.maps.axes(name, tuple(shapes[name].shape))
        column, kept = old_columns[name], row.ndim == len(axes)
        if kept:
            row, column = row.squeeze(-1), column.squeeze(-2)
        r = _expand_known(row, axes[:-1], factor).unsqueeze(-1)
        c = _expand_known(column, axes[:-2] + axes[-1:], factor).unsqueeze(-2)
        old_mean = row.double().mean(-1)[..., None, None]  # per expert, whose number does not grow
        old_mean = old_mean.clamp(min=torch.finfo(torch.float64).tiny)
        wide_row = (r * c.mean(-1, keepdim=True) / old_mean).to(row.dtype)
        wide_column = (c * r.mean(-2, keepdim=True) / old_mean).to(row.dtype)
        rows[name] = wide_row if kept else wide_row.squeeze(-1)
        columns[name] = wide_column if kept else wide_column.squeeze(-2)
    return rows, columns


def _expand_known(tensor: Tensor, axes: tuple[Axis, ...], factor: Factor) -> Tensor:
    """Expand a factor; what is new has the mean of the rest."""
    grown = expand(tensor, axes, factor)
    return torch.where(grown.is_new, _known_mean(grown.values, grown.is_new), grown.values)
