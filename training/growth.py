"""Growing a model: another vocabulary, then width, depth and experts, as one plan says.

A plan is checked before any work is done. Growth by padding, isometric copies, equal copies,
identity layers and clones of a feed-forward leaves what the model computes as it was.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig, Stack
from engine.errors import ConfigError
from training.growth_axes import Axis
from training.growth_depth import DepthMethod, Layer, deepen, has_equal_layers, plan_layers
from training.growth_width import (
    COPYING,
    WIDTHS,
    Split,
    WidthMaps,
    WidthMethod,
    build_maps,
    is_exact,
    wide_eps,
    widen,
)
from training.upcycling import Upcycling, check_upcycling, keeps_gates, upcycle
from training.vocabulary_growth import VocabularyMap, regrow_rows

State = Mapping[str, Tensor]
STACKS: tuple[Stack, ...] = ("encoder", "decoder")
SIZES = (*WIDTHS, "num_encoder_layers", "num_decoder_layers")
MAX_SIZE = 2**20  # of a width or a number of experts: more is a slip of the hand
VOCABULARY_FIELDS = (
    "vocab_size",
    "tokenizer",
    "pad_token_id",
    "decoder_start_token_id",
    "eos_token_ids",
    "continuation_sentinel",
)
FREE_FIELDS = (*SIZES, "num_experts", "router", "norm_eps", "max_positions")
EXPERT_FIELDS = (
    "dense_layers",
    "num_experts_per_token",
    "normalize_gates",
    "routed_scale",
    "expert_d_ff",
    "shared_d_ff",
    "expert_bias",
    "router_bias",
    "choice_bias",
    "expert_groups",
    "top_groups",
    "group_score",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPlan:
    """What a model becomes, and by which operators.

    `split` says how copies share what they do together, `noise` (in shares of a tensor's deviation)
    is added to copies; padding makes none. `target.norm_eps` is set by the width operator.
    """

    target: ModelConfig
    width: WidthMethod = "pad"
    split: Split = "even"
    noise: float = 0.0
    depth: DepthMethod = "identity"
    experts: Upcycling = field(default_factory=Upcycling)
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise is {self.noise!r}; it must be 0 or more, and finite")
        if self.width not in COPYING and (self.noise or self.split == "uneven"):
            raise ConfigError(
                f"noise and uneven split set copies apart, but width {self.width} makes none; "
                f"leave them out, or choose of {', '.join(COPYING)}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True, slots=True)
class Growth:
    """A plan worked out for one model: maps of axes and layers; no weight is touched yet."""

    plan: GrowthPlan
    source: ModelConfig
    target: ModelConfig
    maps: WidthMaps
    layers: Mapping[str, list[Layer]]
    vocabulary: VocabularyMap | None

    @property
    def is_exact(self) -> bool:
        """Whether the grown model computes what the source does (old tokens only)."""
        plan = self.plan
        wide = is_exact(self.source, self.target, plan.width, plan.noise)
        return wide and self.keeps_depth and (not self.upcycles or self.experts_exact)

    @property
    def keeps_depth(self) -> bool:
        """Whether all that new layers do is nothing."""
        return not has_equal_layers(self.layers)

    @property
    def upcycles(self) -> bool:
        """Whether a dense model becomes a mixture of experts."""
        return self.target.num_experts > 0 and not self.source.num_experts

    @property
    def experts_exact(self) -> bool:
        """Whether the experts together compute the dense feed-forward."""
        return self.plan.experts.is_exact(self.target)

    @property
    def stream(self) -> Axis:
        """How a vector that the encoder reads instead of an embedding grows."""
        return self.maps.stream

    def warnings(self) -> list[str]:
        """What the plan does that nobody wants by accident."""
        found = []
        plan, widens = self.plan, widened(self.source, self.target)
        if widens and plan.width in ("isometric", "fpi") and not plan.noise:
            tied = "no two of the copies will ever differ, whatever the optimiser"
            if plan.split == "even":
                found.append(f"{plan.width} without split or noise: {tied}; use split or noise")
        if widens and plan.width == "fpi" and not is_exact(self.source, self.target, "fpi", 0.0):
            found.append(
                f"d_model {self.target.d_model} is no multiple of {self.source.d_model}: fpi is "
                "not exact then; isometric and pad are"
            )
        if self.upcycles and not keeps_gates(self.target):
            hint = "set normalize_gates" if self.target.is_top_k else "choose another router"
            found.append(
                f"the router {self.target.router} gates its experts: clones are not exact; {hint}"
            )
        return found


def widened(source: ModelConfig, target: ModelConfig) -> list[str]:
    """The widths that grow."""
    return [name for name in WIDTHS if getattr(target, name) > getattr(source, name)]


def prepare_growth(
    source: ModelConfig, plan: GrowthPlan, vocabulary: VocabularyMap | None = None
) -> Growth:
    """Check a plan and choose all maps; no weight is read.

    Raises ConfigError if the target is smaller than the source or differs in what cannot grow.
    """
    check_target(source, plan.target, has_vocabulary=vocabulary is not None)
    eps = wide_eps(source, plan.target.d_model, plan.width)
    target = replace(plan.target, norm_eps=eps)
    if target.num_experts and not source.num_experts:
        target = plan.experts.choose_layers(target)
        check_upcycling(replace(source, d_ff=target.d_ff), target)
    generator = torch.Generator().manual_seed(plan.seed)
    maps = build_maps(source, target, plan.width, plan.split, generator)
    layers: dict[str, list[Layer]] = {
        stack: plan_layers(source.num_layers(stack), target.num_layers(stack), plan.depth)
        for stack in STACKS
    }
    return Growth(plan, source, target, maps, layers, vocabulary)


def check_target(source: ModelConfig, target: ModelConfig, *, has_vocabulary: bool) -> None:
    """Raise ConfigError unless the source can grow to the target."""
    for name in SIZES:
        old, new = getattr(source, name), getattr(target, name)
        if new < old:
            raise ConfigError(f"{name} is {new}, less than the model's {old}; growth only adds")
    for name in (*WIDTHS, "num_experts"):
        if (new := getattr(target, name)) > MAX_SIZE:
            raise ConfigError(f"{name} is {new}; allowed: up to {MAX_SIZE}")
    if source.num_experts not in (0, target.num_experts):
        raise ConfigError(
            f"num_experts is {target.num_experts}, the model has {source.num_experts}; only a "
            "dense model can be given experts"
        )
    if source.num_experts and target.router != source.router:
        raise ConfigError(
            f"router is {target.router}, that of the model {source.router}; it cannot change"
        )
    _check_family(source, target)
    given, old = asdict(target), asdict(source)
    free = FREE_FIELDS + (VOCABULARY_FIELDS if has_vocabulary else ())
    free += EXPERT_FIELDS if target.num_experts and not source.num_experts else ()
    for name, value in given.items():
        if name not in free and value != old[name]:
            hint = "give [vocabulary]" if name in VOCABULARY_FIELDS else "it cannot grow"
            raise ConfigError(f"{name} is {value!r}, that of the model {old[name]!r}; {hint}")


def is_t5(config: ModelConfig) -> bool:
    """Whether a model is of the family whose tensors can be widened; others can be upcycled."""
    is_plain = config.positions == "relative" and config.norm == "rms" and config.latent is None
    has_biases = config.qkv_bias or config.out_bias or config.ff_bias or config.expert_bias
    return is_plain and not has_biases and config.kv_heads == config.num_heads


def _check_family(source: ModelConfig, target: ModelConfig) -> None:
    grown = widened(source, target)
    if grown and (not is_t5(source) or source.shared_d_ff or source.expert_d_ff):
        raise ConfigError(
            f"{grown[0]} grows in models of the T5 family only; experts can be added to others"
        )
    deeper = any(target.num_layers(stack) > source.num_layers(stack) for stack in STACKS)
    if deeper and (source.dense_layers or source.windows or not is_t5(source)):
        raise ConfigError(
            "layers can be added to models of the T5 family only, whose layers are all alike"
        )


def grow(state: State, growth: Growth) -> dict[str, Tensor]:
    """The weights of the grown model from those of the source."""
    generator = new_generator(growth.plan)
    if growth.vocabulary is not None:
        state = regrow_rows(state, growth.vocabulary, generator)
    wide = state
    if widened(growth.source, growth.target):
        wide = widen(state, growth.maps, growth.plan.noise, generator)
    deep = deepen(wide, growth.layers)
    if growth.upcycles:
        deep = upcycle(deep, growth.target, growth.plan.experts, generator)
    return deep


def new_generator(plan: GrowthPlan) -> torch.Generator:
    """What draws all that is new, in the order of `grow`."""
    return torch.Generator().manual_seed(plan.seed + 1)


def grow_prompt(prompt_PD: Tensor, stream: Axis) -> Tensor:
    """Soft prompt vectors as the grown model reads them, in fp32 or wider."""
    known = stream.origin >= 0
    grown = prompt_PD.double()[:, stream.origin.clamp(min=0)] * stream.weight * known
    return grown.to(torch.promote_types(prompt_PD.dtype, torch.float32))


def describe(growth: Growth) -> list[dict[str, Any]]:
    """The operators that a plan comes to, in their order, for the record."""
    plan, source, target = growth.plan, growth.source, growth.target
    operators: list[dict[str, Any]] = []
    if growth.vocabulary is not None:
        operators.append({"operator": "vocabulary", **asdict(growth.vocabulary.report)})
    if widened(source, target):
        sizes = {name: [getattr(source, name), getattr(target, name)] for name in WIDTHS}
        operators.append(
            {"operator": plan.width, "split": plan.split, "noise": plan.noise, **sizes}
        )
    for stack in STACKS:
        layers = growth.layers[stack]
        if len(layers) > source.num_layers(stack):
            order = [layer.source for layer in layers]
            zero = [i for i, layer in enumerate(layers) if layer.is_identity]
            operators.append(
                {"operator": plan.depth, "stack": stack, "layers": order, "identity": zero}
            )
    if growth.upcycles:
        facts = {"experts": target.num_experts, "router": target.router, **asdict(plan.experts)}
        operators.append({"operator": "upcycle", **facts})
    return operators
