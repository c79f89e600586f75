"""Loading a base model: damaged folders are refused by one line that says which folder, what is wrong, and the cure."""

import copy
import json
import re
import shutil
from unittest.mock import MagicMock

import huggingface_hub
import peft
import pytest
import torch
from conftest import BUILDERS, SIZES
from huggingface_hub.errors import RevisionNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    ViTConfig,
)

from bayes_lora.cli.show import load_encoder
from bayes_lora.episodes import collate
from bayes_lora.errors import (
    ConfigError,
    ModelError,
    ModelFileError,
    PosteriorError,
    SiteError,
    TaskError,
    did_you_mean,
)
from bayes_lora.lm import base_model
from bayes_lora.lm.fingerprint import fingerprint
from bayes_lora.lm.loading import from_peft, load_language_model
from bayes_lora.lm.model_files import DEFAULT_MODEL
from bayes_lora.lm.packaged_model import CONVERTED_FOLDER
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import LanguageModelConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.tasks import Example


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


# PEFT 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

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
    monkeypatch.setattr(base_model, "find_model", lambda *_, **__: tmp_path / folder)
    with pytest.raises(ModelFileError, match=cure):
        load_language_model(name)


def test_a_full_memory_is_no_damage(model_folder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_language_model(model_folder, device="cpu")


def test_a_whole_folder_loads(model_folder):
    lm = load_language_model(
        str(model_folder), device="cpu", top_layers=1, model_kwargs={"attn_implementation": "eager"}
    )
    assert lm.name == str(model_folder) and lm.model.config._attn_implementation == "eager"
    assert lm.trunk.depth == 3


@pytest.fixture
def hub_cache(model_folder, tmp_path, monkeypatch):
    """A cache of the hub with two revisions of ``org/model``: other weights, and another chat template."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("BAYES_LORA_CACHE", str(tmp_path / "cache"))
    root = cache / "models--org--model"
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(model_folder, root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit)
    second = root / "snapshots" / ("b" * 40)
    torch.manual_seed(5)
    BUILDERS["llama"]().save_pretrained(second)
    (second / "chat_template.jinja").write_text("second")
    configure(second, rms_norm_eps=0.5)
    return root


def load(**kwargs):
    return load_language_model("org/model", device="cpu", cache_folder=None, **kwargs)


@pytest.mark.parametrize("how", ["v2", "b" * 40, {"model_kwargs": {"revision": "v2"}}])
def test_a_revision_is_loaded_whole(hub_cache, how):
    lm = load(**how if isinstance(how, dict) else {"revision": how})
    expected = AutoModelForCausalLM.from_pretrained(hub_cache / "snapshots" / ("b" * 40))
    assert torch.equal(lm.model.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    assert lm.model.config.rms_norm_eps == 0.5 and lm.tokenizer.chat_template == "second"
    first = load()
    assert not torch.equal(first.model.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    assert first.revision is None and first.tokenizer.chat_template is None
    settings = LanguageModelConfig(disk_cache=False).matching(lm)
    assert settings.revision == lm.revision == (how if isinstance(how, str) else "v2")
    assert fingerprint(build_language_model(settings)) == fingerprint(lm)


def test_a_revision_that_is_nowhere_is_refused(hub_cache, model_folder, monkeypatch):
    message = r"'org/model' at revision 'nope' is not on this machine .*run: hf download org/model --revision nope$"
    with pytest.raises(ModelFileError, match=message):
        load(revision="nope")
    with pytest.raises(
        ModelFileError, match="'org/model' at revision 'nope' is not on this machine, and its tokenizer"
    ):
        load_encoder("org/model", revision="nope")

    def unknown(*_, **__):
        raise RevisionNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    with pytest.raises(
        ModelFileError, match=r"'org/model' has no revision 'nope' .*Expected a branch, a tag or a commit"
    ):
        load(revision="nope")
    with pytest.raises(ConfigError, match=r"revision 'v2': only a hub id has revisions, and '.*tiny-llama' is a local"):
        load_language_model(model_folder, revision="v2")
    with pytest.raises(
        ConfigError, match=r"revision='v2' and model_kwargs=\{'revision': 'v3'\}: they differ. Give one"
    ):
        load(revision="v2", model_kwargs={"revision": "v3"})


def test_a_revision_is_part_of_a_posterior_and_of_an_adapter(hub_cache, tmp_path):
    first, second = load(top_layers=1), load(top_layers=1, revision="v2")
    adapted = TaskPosterior(second, {}, second.sites.initial(), ("a",))
    adapted.save(tmp_path / "posterior")
    TaskPosterior.load(tmp_path / "posterior", second)
    with pytest.raises(PosteriorError, match="fitted with revision='v2', but .* revision=None"):
        TaskPosterior.load(tmp_path / "posterior", first)
    copied = load_language_model(hub_cache / "snapshots" / ("b" * 40), device="cpu", cache_folder=None, top_layers=1)
    TaskPosterior.load(tmp_path / "posterior", copied)  # the same weights under another name
    adapted.export_peft(tmp_path / "adapter")
    assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").revision == "v2"
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(copied.name), tmp_path / "adapter")
    assert from_peft(model, second.tokenizer, cache_folder=None).revision == "v2"


@pytest.fixture(scope="module")
def gemma3(tokenizer, tmp_path_factory):
    """A tiny random Gemma 3 with a vision tower, whose modules have the names of the decoder's."""
    text = SIZES | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 40}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=16)
    image = dict(mm_tokens_per_image=4, boi_token_index=317, eoi_token_index=318, image_token_index=319)
    folder = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(1)
    config = Gemma3Config(text_config=text, vision_config=vision | {"patch_size": 8}, **image)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chosen", [{}, {"target_modules": ["q_proj"]}])
def test_a_multimodal_model_keeps_its_settings_in_its_text_part(gemma3, tokenizer, chosen):
    lm = load_language_model(gemma3, device="cpu", cache_folder=None, top_layers=2, max_length=200, **chosen)
    kinds = chosen.get("target_modules", ["q_proj", "v_proj", "o_proj"])
    modules = {name for names in lm.sites.modules.values() for name in names}
    assert modules == {f"model.language_model.layers.{i}.self_attn.{kind}" for i in (2, 3) for kind in kinds}
    assert lm.hidden_size == 16 and lm.encoder.max_length == load_encoder(gemma3, max_length=200).max_length == 40
    assert LanguageModelConfig().matching(lm).top_layers == 2
    example = Example("so good", ("yes", "no"), 0)  # its row is shorter than the window
    [scores] = lm(lm.sites.initial(), collate([lm.encoder([example])]))[0]
    plain, (prompt, options) = AutoModelForCausalLM.from_pretrained(gemma3).eval(), lm.encoder.template.render(example)
    for option, score in zip(options, scores, strict=True):
        before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + option))
        with torch.no_grad():
            log_probs = plain(input_ids=torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
        expected = sum(log_probs[i - 1, whole[i]] for i in range(len(before), len(whole)))
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-3)
    assert lm.trunk.depth == 2


@pytest.mark.parametrize("targets", [["q_proj"], r".*(language_model.*v_proj|vision_tower.*fc1)"])
def test_lora_outside_the_decoder_is_refused(gemma3, targets):
    """Text does not reach a vision tower, whose layers have the names of the decoder's."""
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    message = (
        r"'model\.vision_tower\..*': text does not reach it, because it is outside the decoder 'model\.language_mod"
    )
    with pytest.raises(SiteError, match=message) as caught:
        load_language_model(gemma3, lora, device="cpu", cache_folder=None)
    lora.exclude_modules = re.search(r"exclude_modules='(.*)'\.$", str(caught.value))[1]
    lm = load_language_model(gemma3, lora, device="cpu", cache_folder=None)
    assert all(name.startswith("model.language_model.") for names in lm.sites.modules.values() for name in names)


def add_tokens(folder, tokenizer, special):
    """Give the model in a folder a tokenizer with more tokens than the 320 of its embeddings."""
    own = copy.deepcopy(tokenizer)
    names = [f"<label_{i}>" for i in range(322 - len(own))]
    own.add_tokens(names, special_tokens=special)
    own.pad_token = names[-1]
    own.save_pretrained(folder)
    assert own.convert_tokens_to_ids(names[-2:]) == [320, 321]
    return names[-2:]


@pytest.mark.parametrize("way", ["load_language_model", "from_peft"])
def test_added_tokens_without_an_embedding_are_refused(model_folder, tokenizer, tmp_path, way):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    first, _ = add_tokens(folder, tokenizer, special=False)
    message = (
        rf"1 tokens of the tokenizer have no embedding, such as '{first}' with id 320: the model has 320 embeddings\."
        r".*resize_token_embeddings"
    )
    with pytest.raises(ModelFileError, match=message) as caught:
        if way == "load_language_model":
            load_language_model(folder, device="cpu")
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
            lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
            from_peft(peft.PeftModel(model, lora), AutoTokenizer.from_pretrained(folder))
    assert "\n" not in str(caught.value)


def test_special_tokens_without_an_embedding_are_refused_in_texts(model_folder, tokenizer, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    first, _ = add_tokens(folder, tokenizer, special=True)
    lm = load_language_model(folder, device="cpu", cache_folder=None)
    q = TaskPosterior(lm, {}, lm.sites.initial(), ("one",))
    good = Example("good", ("yes", "no"), 0)
    q.predict([good], num_draws=0)
    assert (
        len(q.generate(["good", "a longer film"], num_draws=0, max_new_tokens=3)) == 2
    )  # the padding has no embedding
    for example in (Example(f"good {first}", ("yes", "no"), 0), Example("good", ("yes", first), 0)):
        message = (
            rf"example '{example.input}': its token '{first}' with id 320 has no embedding, because the model has 320"
        )
        with pytest.raises(TaskError, match=message):
            q.predict([example], num_draws=0)
        with pytest.raises(TaskError, match=message):
            q.predict([good], num_draws=0, demonstrations=[example])


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (T5Config(), "'t5' is an encoder-decoder"),
        (BartConfig(), "'bart' is an encoder-decoder"),
        (ViTConfig(), "'vit' is not a causal language model"),
    ],
)
def test_a_model_that_is_not_causal_is_refused(model_folder, tmp_path, config, kind):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config.save_pretrained(folder)
    message = rf"'{folder}': expected a causal language model .*but {kind}\. Choose a decoder-only model\."
    with pytest.raises(ModelError, match=message):
        load_language_model(folder, device="cpu")


CURES = {
    "dtype": ({"dtype": "float16"}, "dtype: expected a torch.dtype, 'float32' or 'bfloat16', got 'float16'"),
    "number": ({"dtype": 16}, "dtype: expected a torch.dtype, .* got 16"),
    "their dtype": ({"model_kwargs": {"dtype": "auto"}}, "model_kwargs: dtype is the argument dtype= .*Pass it there"),
    "old dtype": ({"model_kwargs": {"torch_dtype": "auto"}}, "model_kwargs: torch_dtype is the argument dtype="),
    "text": (
        {"target_modules": "q_proj"},
        r"target_modules: expected a list of names, got the text 'q_proj'\. Pass \['q_proj'\], or a regular",
    ),
}


@pytest.mark.parametrize("kind", CURES)
def test_wrong_settings_are_not_damaged_files(model_folder, kind):
    settings, message = CURES[kind]
    with pytest.raises(ConfigError, match=message):
        load_language_model(model_folder, device="cpu", **settings)


def test_a_missing_package_is_not_a_damaged_file(model_folder, monkeypatch):
    def fail(*_, **__):
        raise ImportError("FlashAttention2 seems not to be installed.")

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", fail)
    chosen = {"attn_implementation": "flash_attention_2"}
    message = (
        r"\(ImportError: Flash.*\)\. Install the package that is missing, or change attn_impl\w+ in model_kwargs\.$"
    )
    with pytest.raises(ConfigError, match=message):
        load_language_model(model_folder, device="cpu", model_kwargs=chosen)
    monkeypatch.setattr(base_model.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ConfigError, match=r"the tokenizer cannot .*\. Install the package that is missing\.$"):
        load_language_model(model_folder, device="cpu")


def test_wrong_model_kwargs_are_named_first(model_folder):
    with pytest.raises(
        ModelFileError, match=r"Check attn_implementation in model_kwargs\. Otherwise: copy or save the model"
    ):
        load_language_model(model_folder, device="cpu", model_kwargs={"attn_implementation": "no such"})


def test_near_names():
    known = ["steps", "warmup", "average"]
    assert did_you_mean("step", known) == " (did you mean 'steps'?)"
    assert did_you_mean("zzz", known) == did_you_mean("zzz", [], list_all=True) == ""
    assert did_you_mean("zzz", known, list_all=True) == " (known: 'steps', 'warmup', 'average')"
