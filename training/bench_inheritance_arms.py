"""The runs that the benchmark of inheritance compares, and their budgets.

Besides embedding and head the small model has 28 thousand weights, the large one 222 thousand; of
the large pair 1.8 and 14 million.
"""

from dataclasses import dataclass, replace

from engine.config import ModelConfig
from engine.tokenizer import ByteTokenizer
from training.bench_inheritance_runs import Arm
from training.bench_inheritance_steps import Shape
from training.flops import training_flops
from training.growth import GrowthPlan

SMALL = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size,
    d_model=32,
    d_ff=80,
    d_kv=32,
    num_heads=1,
    num_encoder_layers=1,
    num_decoder_layers=1,
    tokenizer="bytes",
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_ids=(1,),
)
LARGE = replace(
    SMALL, d_model=64, d_ff=160, num_heads=2, num_encoder_layers=2, num_decoder_layers=2
)
DEEP = replace(SMALL, num_encoder_layers=2, num_decoder_layers=2)
MIDDLE = replace(SMALL, d_model=48, d_ff=120)
SPARSE = replace(SMALL, num_experts=4)

PAIR_SMALL = replace(
    SMALL, d_model=128, d_ff=320, num_heads=4, num_encoder_layers=4, num_decoder_layers=4
)
PAIR_LARGE = replace(
    PAIR_SMALL, d_model=256, d_ff=640, num_heads=8, num_encoder_layers=8, num_decoder_layers=8
)

NOISE = 0.02  # of copies, in shares of a tensor's deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Models, steps and learning rates.

    Steps at which a state is kept or read divide by `eval_every`.
    """

    small: ModelConfig = SMALL
    large: ModelConfig = LARGE
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    scratch_steps: int = 1200
    source_rate: float = 8e-3
    source_steps: int = 1200
    early_steps: int = 400
    grown_steps: int = 700
    variant_steps: int = 500
    middle_steps: int = 200
    teaching_steps: int = 100
    sparse_steps: int = 800
    small_text_steps: int = 600


QUICK = Budget(
    rates=(4e-3, 8e-3),
    scratch_steps=8,
    source_steps=4,
    early_steps=2,
    grown_steps=6,
    variant_steps=4,
    middle_steps=2,
    teaching_steps=2,
    sparse_steps=4,
    small_text_steps=4,
)
PAIR = Budget(
    small=PAIR_SMALL,
    large=PAIR_LARGE,
    rates=(1e-3, 2e-3),
    scratch_steps=600,
    source_rate=4e-3,
    source_steps=800,
    early_steps=400,
    grown_steps=350,
)


def scratch_arm(budget: Budget, rate: float) -> Arm:
    """The large model from a random start, at one learning rate."""
    return Arm(name=f"scratch-{rate:g}", config=budget.large, steps=budget.scratch_steps, rate=rate)


def source_arms(budget: Budget, rate: float, shape: Shape) -> list[Arm]:
    """The small model; and the control, which trains it on for the operations of a grown run."""
    lengths = shape.source_length, shape.target_length
    times = training_flops(budget.large, *lengths) / training_flops(budget.small, *lengths)
    more = times * budget.grown_steps
    steps = -(-round(more) // shape.eval_every) * shape.eval_every
    source = Arm(
        name="source",
        config=budget.small,
        steps=budget.source_steps,
        rate=budget.source_rate,
        keep=(budget.early_steps, budget.source_steps),
    )
    control = Arm(
        name="continued",
        config=budget.small,
        steps=steps,
        rate=rate,
        parent="source",
        parent_step=budget.source_steps,
        moments="carry",
        first_batch=budget.source_steps,
        keep=(steps,),
    )
    return [source, control]


def grown_arms(budget: Budget, rate: float) -> list[Arm]:
    """The large model grown from the small one, by several operators and in several ways."""
    pad = GrowthPlan(target=budget.large)
    late = Arm(
        name="pad",
        config=budget.large,
        steps=budget.grown_steps,
        rate=rate,
        parent="source",
        parent_step=budget.source_steps,
        growth=pad,
    )
    other = replace(late, steps=budget.variant_steps)
    middle = replace(
        other,
        name="middle",
        config=MIDDLE,
        steps=budget.middle_steps,
        parent_step=budget.early_steps,
        growth=GrowthPlan(target=MIDDLE),
        keep=(budget.middle_steps,),
    )
    plans = {
        "pad-stack": replace(pad, depth="stack"),
        "fpi-noise": replace(pad, width="fpi", noise=NOISE, depth="stack"),
        "isometric-uneven": replace(pad, width="isometric", split="uneven"),
    }
    return [
        late,
        replace(late, name="pad-early", parent_step=budget.early_steps),
        *(replace(other, name=name, growth=plan) for name, plan in plans.items()),
        middle,
        replace(other, name="staged", parent="middle", parent_step=budget.middle_steps),
        replace(other, name="pad-moments", moments="scale"),
        replace(other, name="pad-fast", rate=2 * rate),
        replace(
            other,
            name="pad-taught",
            teacher="source",
            teacher_step=budget.source_steps,
            inherit_steps=budget.teaching_steps,
        ),
    ]


def wide_arms(budget: Budget, rate: float) -> list[Arm]:
    """From a source as deep as the large model: AKI takes from the layer above, so it needs two."""
    source = Arm(
        name="deep-source",
        config=DEEP,
        steps=budget.source_steps,
        rate=budget.source_rate,
        keep=(budget.source_steps,),
    )
    pad = Arm(
        name="deep-pad",
        config=LARGE,
        steps=budget.variant_steps,
        rate=rate,
        parent=source.name,
        parent_step=budget.source_steps,
        growth=GrowthPlan(target=LARGE),
    )
    aki = GrowthPlan(target=LARGE, width="aki", noise=NOISE)
    return [source, pad, replace(pad, name="deep-aki", growth=aki)]


def sparse_arms(budget: Budget, rate: float) -> list[Arm]:
    """Mixtures of experts: upcycled from the small model, and from a random start."""
    upcycled = Arm(
        name="upcycled",
        config=SPARSE,
        steps=budget.sparse_steps,
        rate=rate,
        parent="source",
        parent_step=budget.source_steps,
        growth=GrowthPlan(target=SPARSE),
        first_batch=budget.source_steps,
    )
    scratch = Arm(
        name="sparse-scratch", config=SPARSE, steps=budget.sparse_steps, rate=budget.source_rate
    )
    return [upcycled, scratch]


def small_text_arms(budget: Budget, rate: float, teacher: Arm) -> list[Arm]:
    """The large model on little text, alone and taught by a small one that has read much."""
    alone = Arm(
        name="little-alone",
        config=LARGE,
        steps=budget.small_text_steps,
        rate=rate,
        text="small",
    )
    taught = replace(
        alone,
        name="little-taught",
        teacher=teacher.name,
        teacher_step=teacher.steps,
        inherit_steps=2 * budget.small_text_steps,  # its share falls from 1 to 1/2
    )
    return [alone, taught]
