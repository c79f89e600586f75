"""Arguments of from_pretrained reach the configuration, the tokenizer and the weights alike."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from conftest import BUILDERS
from packaging.version import Version
from transformers import AutoModelForCausalLM

from bayes_lora.errors import ConfigError, ModelFileError
from bayes_lora.lm.loading import load_language_model


def load(name, **model_kwargs):
    return load_language_model(name, top_layers=1, cache_folder=None, model_kwargs=model_kwargs)


def embeddings(model):
    return model.get_input_embeddings().weight


def write(model_folder, folder, marker):
    """Another model, and its tokenizer with a marker."""
    shutil.copytree(model_folder, folder)
    torch.manual_seed(5)
    model = BUILDERS["llama"]()
    model.config.rms_norm_eps = 0.5
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(marker)
    return model


def check(lm, model, marker):
    assert torch.equal(embeddings(lm.model), embeddings(model))
    assert lm.model.config.rms_norm_eps == 0.5 and lm.tokenizer.chat_template == marker


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "usual"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_cache_folder_and_a_folder_inside_the_repository(model_folder, tmp_path, offline):
    cache = tmp_path / "own"
    root = cache / "models--org--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    outer = write(model_folder, root / "snapshots" / ("a" * 40), "outer")
    inner = write(model_folder, root / "snapshots" / ("a" * 40) / "inner", "inner")
    check(load("org/model", cache_dir=cache), outer, "outer")
    check(load("org/model", cache_dir=str(cache), local_files_only=True, subfolder="inner"), inner, "inner")
    with pytest.raises(ModelFileError, match="'org/model' is not on this machine, and local_files_only=True"):
        load("org/model", local_files_only=True)


def test_a_folder_inside_a_local_folder(model_folder, tmp_path):
    inner = write(model_folder, tmp_path / "outer" / "inner", "inner")
    check(load(tmp_path / "outer", subfolder="inner"), inner, "inner")
    with pytest.raises(ModelFileError, match=r"outer/nothing' does not exist"):
        load(tmp_path / "outer", subfolder="nothing")


def test_a_download_uses_the_token_the_cache_and_the_folder(model_folder, tmp_path, offline, monkeypatch):
    asked = []

    def model_info(self, name, **kwargs):
        asked.append(kwargs["token"])
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename="inner/model.safetensors", size=4)])

    def download(name, **kwargs):
        asked.append((kwargs["token"], kwargs["cache_dir"], kwargs["allow_patterns"][0], kwargs["ignore_patterns"]))
        return str(tmp_path / "snapshot")

    inner = write(model_folder, tmp_path / "snapshot" / "inner", "inner")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    check(load("org/model", token="secret", cache_dir="here", subfolder="inner"), inner, "inner")
    assert asked == ["secret", ("secret", "here", "inner/*.json", ["inner/*/*"])]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="transformers itself loads the adapter")
def test_the_configuration_of_a_merged_adapter_does_not_matter(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "merged")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "not/here", "target_modules": ["q_proj"], "r": 2})
    )
    lm = load(folder)
    assert torch.equal(embeddings(lm.model), embeddings(AutoModelForCausalLM.from_pretrained(model_folder)))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="transformers would load the adapter in it"):
        load(folder)


def test_a_device_map_is_respected(model_folder, monkeypatch):
    def moved(*_, **__):
        raise AssertionError("the model was moved")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(BUILDERS["llama"]().__class__, "to", moved)
    for device_map in ({"": "cpu"}, "cpu", "auto"):
        assert load(model_folder, device_map=device_map).device == torch.device("cpu")
    with pytest.raises(AssertionError, match="was moved"):
        load(model_folder)
    with pytest.raises(ConfigError, match=r"device='cpu' and model_kwargs=\{'device_map': 'auto'\}: both choose"):
        load_language_model(model_folder, device="cpu", model_kwargs={"device_map": "auto"})


def test_a_model_on_several_devices_is_refused(model_folder, tmp_path):
    layers = {f"model.layers.{i}": "cpu" for i in range(3)}
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map = layers | rest | {"model.layers.3": "disk"}
    with pytest.raises(ConfigError, match=r"expected the whole model on one device, got \['cpu', 'meta'\]"):
        load(model_folder, device_map=device_map, offload_folder=str(tmp_path))
