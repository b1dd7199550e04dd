"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.recipe import TrainRecipe

ADAM_BETAS, ADAM_EPS = (0.9, 0.98), 1e-8
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NOT_ON_BLOCKS = (
    "embedding.weight",
    "lm_head.weight",
    "relative_bias.weight",
    "centroids",
    "router.weight",
)


def build_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe; norms do not decay.

    adafactor is torch's, which scales by each parameter's size; adafactor_hf does that with a rate
    that it does not cap, as Hugging Face's. muon is for the matrices of blocks; it shares its rate
    with the AdamW of the rest.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_norm = [name.endswith(("norm", "norm.weight")) for name, _ in trained]
    matrices = [(n, p) for (n, p), norm in zip(trained, is_norm, strict=True) if not norm]
    norms = [p for (_, p), norm in zip(trained, is_norm, strict=True) if norm]
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in matrices], "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=recipe.learning_rate)
    if recipe.optimizer == "adafactor_hf":
        return AdafactorHF(groups, lr=recipe.learning_rate)
    if recipe.optimizer == "muon":
        blocks = [p for n, p in matrices if not n.endswith(NOT_ON_BLOCKS)]
        rest = [p for n, p in matrices if n.endswith(NOT_ON_BLOCKS)]
        muon = {"params": blocks, "weight_decay": recipe.weight_decay, "is_muon": True}
        return Muon([muon, groups[0] | {"params": rest}, groups[1]], lr=recipe.learning_rate)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS)


class AdafactorHF(torch.optim.Optimizer):
    """Adafactor with Hugging Face's semantics: the rate is used as given, there is no momentum.

    With `scale_parameter` the step is relative to a parameter's size, as torch's; without, the
    rate is absolute, as prompt tuning wants it.

    Source: Adafactor (arXiv:1804.04235); transformers' optimization.Adafactor, relative_step off.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        is_factored = grad.ndim >= 2
        if not state:
            state["step"] = torch.zeros(())
            if is_factored:
                state["exp_avg_sq_row"] = grad.new_zeros(grad.shape[:-1])
                state["exp_avg_sq_col"] = grad.new_zeros(grad.shape[:-2] + grad.shape[-1:])
            else:
                state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        new = float(state["step"]) ** group["decay_rate"]  # 1 - beta2
        rate = group["lr"]
        if group["scale_parameter"]:
            rate *= max(group["eps"][1], _rms(parameter))
        squared = grad.square() + group["eps"][0]
        if is_factored:
            row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.lerp_(squared.mean(-1), new)
            column.lerp_(squared.mean(-2), new)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
            update = grad * scale * column.rsqrt().unsqueeze(-2)
        else:
            state["exp_avg_sq"].lerp_(squared, new)
            update = grad * state["exp_avg_sq"].rsqrt()
        update /= max(1.0, _rms(update) / group["clip_threshold"])
        parameter.mul_(1 - group["weight_decay"] * rate)
        parameter.sub_(update, alpha=rate)


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm(2)) / math.sqrt(tensor.numel())


class Muon(torch.optim.Optimizer):
    """Muon for groups marked `is_muon`, AdamW for the others; stacks of matrices go one by one.

    The update of a matrix is made orthogonal and scaled to the size of AdamW's, so that one rate
    serves both.

    Source: Jordan et al., Muon (2024); the scale 0.2 sqrt(max(rows, columns)): arXiv:2502.16982.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.95) -> None:
        defaults = {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "is_muon": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            update = self._muon if group["is_muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, group)

    def _muon(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        direction = orthogonalize(grad.lerp(mean, group["momentum"]))
        scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
        parameter.sub_(direction, alpha=group["lr"] * scale)

    def _adamw(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        first, second = ADAM_BETAS
        mean = state["exp_avg"].lerp_(grad, 1 - first)
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - second)
        number = float(state["step"])
        root = (square / (1 - second**number)).sqrt() + ADAM_EPS
        parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - first**number))


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with singular values near 1, of each matrix in (..., rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def learning_rate(step: int, recipe: TrainRecipe) -> float:
    """Learning rate of a step, counted from 0.

    All schedules rise linearly over the warm-up. Then constant stays; linear falls to 0 at the end;
    wsd (warm-up, stable, decay) stays and falls to 0 over the last `decay` share; noam falls as
    base / sqrt(step), so that `learning_rate` is the base, not the peak.

    Source: noam as CPM-2 trains with it; WSD: MiniCPM (arXiv:2404.06395).
    """
    warmup = max(round(recipe.steps * recipe.warmup), 1)
    done = step + 1
    if recipe.schedule == "noam":
        return recipe.learning_rate * min(1 / math.sqrt(done), done / warmup / math.sqrt(warmup))
    rise = min(done / warmup, 1.0)
    left = (recipe.steps - step) / recipe.steps
    if recipe.schedule == "linear":
        rise = min(rise, left / max(1 - warmup / recipe.steps, 1e-9))
    elif recipe.schedule == "wsd" and recipe.decay > 0:
        rise = min(rise, left / recipe.decay)
    return recipe.learning_rate * rise
