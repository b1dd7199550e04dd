"""The adapters of the demo model: whole, of this model, as their cards say, and of some use."""

import json
import re
from itertools import product
from pathlib import Path

import pytest

from engine.checkpoint import load_model
from engine.prepare import prepare
from engine.tokenizer import open_tokenizer
from engine.worker import LoadedModel, Worker
from tests.fakes import live_server
from tests.waiting import wait_for
from training.adapter_tools import check_adapter, show_adapter
from training.served import evaluate_served
from training.task_data import SOURCES
from training.tasks import open_task
from training.tune_run import evaluate_model, read_tune_recipe

ROOT = Path(__file__).parents[1]
DEMO, ADAPTERS = ROOT / "models/demo", ROOT / "models/adapters"
NAMES = sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))
ROWS = {
    "spam-en": [
        ("You have won! Claim your free money now, call today, no risk!", "spam"),
        ("Kernel patch. On Monday John wrote: > the build fails here > for me too", "ham"),
    ],
}


def test_there_is_an_adapter_for_each_source_of_rows():
    names = {one.origin.name for one in SOURCES} - {"subjects_en"}  # that is for SmolLM2 alone
    assert [name.replace("-", "_") for name in NAMES] == sorted(names)
    assert len(NAMES) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_fits_the_demo_and_its_card_tells_its_score(name):
    adapter = check_adapter(ADAPTERS / name, DEMO)
    told = show_adapter(ADAPTERS / name)
    assert sum(told["bytes"].values()) < 300_000
    plan = read_tune_recipe(ROOT / f"training/recipes/adapters/{name.replace('-', '_')}.toml")
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
    (source,) = [one for one in SOURCES if one.origin.name == name.replace("-", "_")]
    assert f"`{source.origin.package}` {source.origin.version}" in card
    assert re.search(
        rf"\[{name}\]\({name}/README.md\)", (ADAPTERS / "README.md").read_text("utf-8")
    )


@pytest.mark.parametrize("name", NAMES)
def test_peft_opens_the_folder(name):
    peft = pytest.importorskip("peft")
    config = peft.PeftConfig.from_pretrained(ADAPTERS / name)
    assert config.num_virtual_tokens == check_adapter(ADAPTERS / name, DEMO).num_vectors
    assert config.token_dim == json.loads((DEMO / "config.json").read_text("utf-8"))["d_model"]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_plain_cases_are_told_apart(tmp_path, name):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS[name]]
    rows.write_text("\n".join(lines), encoding="utf-8")
    task = open_task(
        json.loads((ADAPTERS / name / "infmoe_adapter.json").read_text("utf-8"))["task"]
    )
    report = evaluate_model(DEMO, rows, task, ADAPTERS / name)
    assert report.answers == tuple(label for _, label in ROWS[name])


BEGINNINGS = ("房间不错", "早餐很差", "位置很好", "服务态度差", "这本书内容很好", "电脑外观漂亮")
NEXT = ("价格也便宜", "但是有点贵", "离地铁很近", "包装很好", "物流太慢")


@pytest.fixture(scope="module")
def served():
    """The demo behind a server, in bf16 as it is stored, with kernels."""
    model = load_model(DEMO)
    prepare(model)
    assert model.kernels is not None
    loaded = LoadedModel(model, open_tokenizer(DEMO, model.config.tokenizer))
    worker = Worker("demo", lambda _: loaded)
    worker.start()
    try:
        wait_for(lambda: worker.state == "ready")
        with live_server(worker, adapters=ADAPTERS) as url:
            yield url
    finally:
        worker.drain(5.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_server_gives_the_answers_of_the_command(tmp_path, served, name):
    """Also in bf16, where torch without kernels rounds, and so writes, otherwise."""
    task = open_task(
        json.loads((ADAPTERS / name / "infmoe_adapter.json").read_text("utf-8"))["task"]
    )
    rows = tmp_path / "rows.jsonl"
    label = next(iter(task.labels), "很好")
    texts = [f"{first}，{second}，" for first, second in product(BEGINNINGS, NEXT)]
    lines = [json.dumps({"text": text, task.answer.column: label}) for text in texts]
    rows.write_text("\n".join(lines), encoding="utf-8")
    here = evaluate_model(DEMO, rows, task, ADAPTERS / name, rows=7)
    there = evaluate_served(served, rows, task, name)
    assert there.answers == here.answers
    assert there.summary() == here.summary()
    if task.kind == "generate":
        assert len(set(here.answers)) > 3
