"""The model on a hub, in other processes and other libraries: what goes up comes back, and says what it is."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_stand_in
import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tgq_fast.data import Catalog
from tgq_fast.errors import CheckpointError, StorageError
from tgq_fast.evaluation import evaluate
from tgq_fast.models import TGQFormerModel, TGQFormerProcessor
from tgq_fast.models.card import model_card, read_run
from tgq_fast.pool.embed import model_digest

RUN = {
    "status": "finished",
    "arguments": {"epochs": 7, "seed": 3, "batch_size": 64, "lr": 0.002, "keep": "best"},
    "catalog": {"digest": "abcdef" * 8, "items": 4321},
    "versions": {"python": "3.11", "tgq_fast version": "9.8", "tgq_fast commit": "c0ffee", "torch": "2.13"},
    "result": {
        "steps": 90,
        "best_step": 60,
        "trainable_parameters": 1234567,
        "verdict": {"words": "Training helped: a."},
    },
}


def test_a_run_cannot_be_saved_in_a_file(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(clip, "dual_encoder", reader_layers=1))
    with pytest.raises(StorageError, match="Not a directory"):
        model.save_pretrained(tmp_path / "file" / "run")


@pytest.fixture(scope="module")
def run(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(clip, "dual_encoder", reader_layers=1))
    folder = tmp_path_factory.mktemp("run") / "tgq"
    model.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


def elsewhere(code: str, *arguments: object, **environment: str) -> Any:
    """What a fresh process prints as JSON."""
    given = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
import json, sys
from tgq_fast import TGQFormerModel
from tgq_fast.errors import CheckpointError
from tgq_fast.pool.embed import model_digest
model = TGQFormerModel.from_pretrained(sys.argv[1])
one = model.push_to_hub("tgq", license="apache-2.0", token="hf_x", tags=["shoes"])
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/second", license="apache-2.0", token="hf_x")
model.push_to_hub("tgq", revision="next", commit_message="again", token="hf_x")
from transformers import AutoModel, AutoProcessor
back = [TGQFormerModel.from_pretrained("me/tgq"), AutoModel.from_pretrained("me/second")]
back.append(TGQFormerModel.from_pretrained("me/tgq", revision="next"))
processor = AutoProcessor.from_pretrained("me/tgq")
try:
    TGQFormerModel.from_pretrained("me/nothing")
except CheckpointError as error:
    said = str(error)
print(json.dumps([one, [model_digest(m) for m in back], type(processor).__name__, said]))
"""


@pytest.mark.slow
def test_what_is_pushed_comes_back(run: Path, tmp_path: Path) -> None:
    with hub_stand_in.running_hub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        address, digests, processor, said = elsewhere(PUSH, run, tmp_path / "saved", **online)
    assert address.startswith(f"{hub.url}/me/tgq/commit/") and processor == "TGQFormerProcessor"
    assert digests == [model_digest(TGQFormerModel.from_pretrained(run))] * 3
    assert "me/nothing" in said and "hub" in said
    first, second = hub.repositories["me/tgq"]["main"], hub.repositories["me/second"]["main"]
    assert sorted(first) == sorted(
        ["README.md", "config.json", "model.safetensors", "processor_config.json", "tgq_former.py"]
    )
    assert {n: c for n, c in first.items() if n != "README.md"} == {n: c for n, c in second.items() if n != "README.md"}
    cards = [files["README.md"].decode() for files in (first, second)]
    assert cards[0].replace("- shoes\n", "").replace("me/tgq", "me/second") == cards[1]
    assert hub.messages == ["Upload model", "Upload model", "again"] and hub.tokens == {"Bearer hf_x"}
    assert set(hub.repositories["me/tgq"]["next"]) == set(first)


def test_the_card_is_written_from_the_run(run: Path, catalog: Catalog) -> None:
    import yaml

    model = TGQFormerModel.from_pretrained(run)
    rows = torch.nn.functional.normalize(torch.randn(len(catalog), 4), dim=1)
    measured = evaluate(catalog, rows, ks=(1,), split="train", samples=10)
    card = model_card(model.config, read_run(run), name="me/tgq", license="mit", evaluation=measured, tags=["shoes"])
    head, text = card.split("---\n")[1:]
    facts = yaml.safe_load(head)
    assert facts["license"] == "mit" and "shoes" in facts["tags"] and facts["library_name"] == "tgq_fast"
    (result,) = facts["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]}["HR@1"] == round(measured["HR@1"], 4)
    for said in (
        "4321 items",
        "abcdefabcdefabcd",
        "epochs 7",
        "seed 3",
        "60 of 90",
        "1,234,567",
        "Training helped: a.",
    ):
        assert said in text, said
    assert "9.8" in text and f"| HR@1 | {measured['HR@1']:.3f} |" in text and "`category`" in text
    assert str(run.parent) not in card  # no folder of this machine
    bare = model_card(model.config, None, name="me/tgq")
    assert "None was chosen" in bare and "Not known" in bare and "license" not in yaml.safe_load(bare.split("---\n")[1])


@pytest.mark.slow
def test_a_card_that_lies_in_the_run_is_taken_as_it_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for path in run.iterdir():
        (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "own" / "README.md").write_text("mine")
    code = "import sys, tgq_fast; tgq_fast.TGQFormerModel.from_pretrained(sys.argv[1]).push_to_hub('o/m'); print(1)"
    with hub_stand_in.running_hub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_y"}
        elsewhere(code, tmp_path / "own", **environment)
    assert hub.repositories["o/m"]["main"]["README.md"] == b"mine"


def test_offline_a_name_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for kind in (TGQFormerModel, TGQFormerProcessor):
        with pytest.raises(CheckpointError, match=r"me/absent-model: no such folder, and the hub"):
            kind.from_pretrained("me/absent-model")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        TGQFormerModel.from_pretrained("/no/such/folder")  # a path is never asked for


AUTO = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoProcessor
said = []
for auto in (AutoConfig, AutoModel, AutoProcessor):
    try:
        auto.from_pretrained(sys.argv[1])
    except Exception as error:
        said.append(str(error))
made = [auto.from_pretrained(sys.argv[1], trust_remote_code=True) for auto in (AutoConfig, AutoModel, AutoProcessor)]
from tgq_fast.pool.embed import model_digest
print()
print(json.dumps([said, [type(x).__module__ + "." + type(x).__name__ for x in made], model_digest(made[1])]))
"""


@pytest.mark.slow
def test_auto_classes_without_the_import_say_what_is_missing_or_load(run: Path, tmp_path: Path) -> None:
    """They blamed the version of transformers."""
    said, types, digest = elsewhere(AUTO, run, HF_HOME=str(tmp_path))
    assert len(said) == 3 and all("trust_remote_code=True" in text for text in said)
    assert types == [
        "tgq_fast.models.configuration.TGQFormerConfig",
        "tgq_fast.models.modeling.TGQFormerModel",
        "tgq_fast.models.processing.TGQFormerProcessor",
    ]
    assert digest == model_digest(TGQFormerModel.from_pretrained(run))


# ------------------------------------------------------------------ processes, processors, loaders


def pictures(catalog: Catalog, count: int = 4) -> list[Image.Image]:
    return [Image.open(catalog.root / str(item.file_name)).convert("RGB") for item in catalog.items[:count]]


def test_model_takes_what_the_processor_returns(run: Path, catalog: Catalog) -> None:
    model, processor = TGQFormerModel.from_pretrained(run), TGQFormerProcessor.from_pretrained(run)
    images = [*pictures(catalog, 3), None]
    metadata = [{"category": item.category} for item in catalog.items[:4]]
    with torch.no_grad():
        found = model(**processor(images, metadata)).embedding
        bare = model(**processor(images[:3])).embedding
    rows = [{"image": image, **fields} if image else fields for image, fields in zip(images, metadata, strict=True)]
    torch.testing.assert_close(found, model.encode(rows), atol=2e-6, rtol=0)
    torch.testing.assert_close(bare, model.encode(images[:3]), atol=2e-6, rtol=0)


def test_model_is_pickled_before_and_after_encoding(run: Path, catalog: Catalog) -> None:
    model, images = TGQFormerModel.from_pretrained(run), pictures(catalog)
    before = pickle.dumps(model)
    expected = model.encode(images)
    for data in (before, pickle.dumps(model)):
        assert torch.equal(pickle.loads(data).encode(images), expected)


class Processed(torch.utils.data.Dataset[Any]):
    """Processes in the loader's workers."""

    def __init__(self, processor: TGQFormerProcessor, images: list[Image.Image]) -> None:
        self.processor, self.images = processor, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> torch.Tensor:
        pixels = self.processor([self.images[place]]).pixel_values
        assert pixels is not None
        return pixels[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processor_works_in_the_workers_of_a_loader(run: Path, catalog: Catalog, start: str) -> None:
    processor, images = TGQFormerProcessor.from_pretrained(run), pictures(catalog)
    expected = processor(images).pixel_values
    loader = torch.utils.data.DataLoader(
        Processed(processor, images), batch_size=2, num_workers=2, multiprocessing_context=start
    )
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.slow
def test_model_maps_a_dataset_in_two_processes(run: Path, catalog: Catalog, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model, images = TGQFormerModel.from_pretrained(run), pictures(catalog)
    expected = model.encode(images).numpy()
    given = datasets.Dataset.from_dict({"image": images})
    mapped = given.map(
        lambda rows: {"embedding": model.encode(rows["image"]).numpy()}, batched=True, batch_size=2, num_proc=2
    )
    np.testing.assert_allclose(np.asarray(mapped["embedding"]), expected, atol=2e-6)
