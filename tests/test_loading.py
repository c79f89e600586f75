"""Loading a base model: damaged folders are refused by one line that says which folder, what is wrong, and the cure."""

import json
import shutil

import pytest
import torch

from bayes_lora.errors import ModelFileError, did_you_mean
from bayes_lora.lm import loading
from bayes_lora.lm.loading import load_language_model
from bayes_lora.lm.model_files import DEFAULT_MODEL
from bayes_lora.lm.packaged_model import CONVERTED_FOLDER


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGE = {
    "truncated weights": (
        lambda p: truncate(p / "model.safetensors", -1000),
        r"the weights cannot be read \(SafetensorError: .*Copy or save the model again",
    ),
    "a pointer instead of weights": (
        lambda p: (p / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "the weights cannot be read",
    ),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        r"the weights cannot be read \(OSError: .*no file named model.safetensors",
    ),
    "weights of fewer layers": (
        lambda p: configure(p, num_hidden_layers=6),
        r"18 weights are missing or .* such as model\.layers\.4\..*Copy or save the model again",
    ),
    "weights of another width": (
        lambda p: configure(p, intermediate_size=32),
        r"12 weights are missing or have another shape .* such as model\.layers\.0\.mlp",
    ),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "the config.json cannot be read .*valid JSON"),
    "no object": (lambda p: (p / "config.json").write_text("[]"), "the config.json cannot be read"),
    "no model type": (lambda p: (p / "config.json").write_text("{}"), "the config.json cannot be read"),
    "no causal LM": (
        lambda p: configure(p, model_type="t5", architectures=["T5Model"]),
        "the weights cannot be read .*AutoModelForCausalLM",
    ),
    "no tokenizer": (no_tokenizer, "the tokenizer cannot be read .*Put the model's tokenizer.json and"),
    "a damaged tokenizer": (lambda p: (p / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_folder_is_refused(model_folder, tmp_path, kind):
    damage, message = DAMAGE[kind]
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    damage(folder)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_language_model(folder, device="cpu")
    text = str(caught.value)
    assert text.startswith(f"'{folder}': ") and "\n" not in text and len(text) < 400 + len(str(folder))
    assert caught.value.__cause__ is not None or "missing" in text


def test_a_damaged_gguf_file_is_refused(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"tiny.gguf': the file cannot be read \(.*Copy or save"):
        load_language_model(file, device="cpu")


@pytest.mark.parametrize(
    ("name", "folder", "cure"),
    [
        (DEFAULT_MODEL, CONVERTED_FOLDER, "Delete this folder, then run: bayes-lora fetch"),
        (DEFAULT_MODEL, "snapshot", f"again: hf download --force-download {DEFAULT_MODEL}"),
        ("some/model", "snapshot", "again: hf download --force-download some/model"),
    ],
)
def test_the_cure_depends_on_where_the_files_are_from(tmp_path, monkeypatch, name, folder, cure):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{")
    monkeypatch.setattr(loading, "find_model", lambda _: tmp_path / folder)
    with pytest.raises(ModelFileError, match=cure):
        load_language_model(name)


def test_a_full_memory_is_no_damage(model_folder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_language_model(model_folder, device="cpu")


def test_a_whole_folder_loads(model_folder):
    lm = load_language_model(
        str(model_folder), device="cpu", top_layers=1, model_kwargs={"attn_implementation": "eager"}
    )
    assert lm.name == str(model_folder) and lm.model.config._attn_implementation == "eager"
    assert lm.trunk.depth == 3


def test_near_names():
    known = ["steps", "warmup", "average"]
    assert did_you_mean("step", known) == " (did you mean 'steps'?)"
    assert did_you_mean("zzz", known) == did_you_mean("zzz", [], list_all=True) == ""
    assert did_you_mean("zzz", known, list_all=True) == " (known: 'steps', 'warmup', 'average')"
