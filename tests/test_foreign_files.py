"""Files that others may have made: settings, cards, tables, models and run folders are limited, and run no code."""

import json
import os
import time
import warnings

import peft
import pyarrow as pa
import pytest
import torch
from conftest import BUILDERS, build_lm
from pyarrow import parquet
from runs import CONFIG

from bayes_lora.cli.show import load_encoder
from bayes_lora.errors import BayesLoraError, ConfigError, ModelFileError, PosteriorError, SiteError, TaskError
from bayes_lora.lm import model_files
from bayes_lora.lm.loading import inject, load_language_model
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs import loading
from bayes_lora.runs.dry_run import read_architecture
from bayes_lora.tasks.readers import parquet_files
from bayes_lora.tasks.readers.card import read_card
from bayes_lora.tasks.readers.table_rows import read_table
from bayes_lora.tasks.splits import load_split
from bayes_lora.utils.limits import check_nesting

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine values, nine times, ...: 9^9 of them."""

CHAIN = "".join(f"- &a{i} [{f'*a{i - 1}' if i else 'x'}]\n" for i in range(400))
"""Each element holds the one before it: a depth of 400 without any nesting of brackets."""


def refused(error, call, *parts, seconds=5):
    began = time.process_time()
    with pytest.raises(error) as caught:
        call()
    assert time.process_time() - began < seconds
    message = str(caught.value)
    assert len(message) < 1500 and all(part in message for part in parts), message


@pytest.mark.parametrize("read", [RunConfig.load, read_card])
@pytest.mark.parametrize(
    "content, problem",
    [
        (BOMB, "expected at most 100,000 values, got "),
        (CHAIN, "nested more than 50 levels deep"),
        ("&a [*a]\n", "nested more than 50 levels deep"),
        ("[" * 20_000, "cannot be read as YAML"),
        ("- x\n" * 80_000, "expected at most 262,144 bytes"),
        ("fit: {steps: !!bool maybe}\n", "cannot be read as YAML"),
        ("fit: {steps: !!int ''}\n", "cannot be read as YAML"),
        ("fit: {steps: !!timestamp x}\n", "cannot be read as YAML"),
    ],
    ids=["anchors", "chain", "itself", "brackets", "long", "bool", "int", "timestamp"],
)
def test_yaml_is_limited(tmp_path, read, content, problem):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    refused(ConfigError, lambda: read(path), "c.yaml: cannot be read as YAML", problem)


@pytest.mark.parametrize("read", [RunConfig.load, read_card])
def test_yaml_is_read_of_files_alone(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml"):
        refused(ConfigError, lambda name=name: read(tmp_path / name), name, "expected a file, got")


def test_a_setting_of_the_command_line_is_limited():
    refused(ConfigError, lambda: RunConfig.load(None, [f"prior.x={BOMB}"]), "--set", "expected at most 100,000 values")


@pytest.mark.parametrize("key", ["recipe", "seed", "guide", "fit", "language_model.target_modules", "prior.x"])
def test_a_message_quotes_a_part_of_a_long_value(key):
    values = long = list(range(50_000))
    for part in reversed(key.split(".")):
        values = {part: values}
    refused(ConfigError, lambda: RunConfig.from_dict(values), key.partition(".")[0])
    refused(ConfigError, lambda: RunConfig.from_dict(long), "expected a mapping")


def test_nesting_counts_each_alias():
    one = [1, 2]
    check_nesting({"a": [one, one], "b": one}, max_values=13)
    with pytest.raises(ValueError, match="at most 12 values, got 13"):
        check_nesting({"a": [one, one], "b": one}, max_values=12)


@pytest.mark.parametrize(
    "table, limit, problem",
    [
        ({"a": pa.nulls(3_000_000)}, {}, "at most 2,000,000 rows, got 3,000,000"),
        ({"a": ["x", "y"], "b": [[1], [2, 3]]}, {"MAX_VALUES": 4}, "at most 4 values, got 5"),
        ({"a": ["x" * 1000, "y" * 1000]}, {"MAX_BYTES": 500}, "at most 500 uncompressed bytes, got "),
        # Stored once, but in each of 5,000 rows.
        ({"a": ["x" * 10_000] * 5000}, {"MAX_BYTES": 1_000_000}, "at most 1,000,000 uncompressed bytes, got more"),
    ],
    ids=["rows", "values", "bytes", "repeated"],
)
def test_parquet_is_limited_before_it_is_unpacked(tmp_path, monkeypatch, table, limit, problem):
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table(table), path, compression="zstd")
    assert path.stat().st_size < 60_000
    for name, value in limit.items():
        monkeypatch.setattr(parquet_files, name, value)
    refused(TaskError, lambda: read_table(path), f"{path}: expected {problem}", "keep a part of the rows")


def test_parquet_is_read_of_files_alone(tmp_path):
    os.mkfifo(tmp_path / "t.parquet")
    refused(TaskError, lambda: read_table(tmp_path / "t.parquet"), "t.parquet: expected", "a pipe or a device")


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_if_the_user_says_so(tmp_path, tokenizer, monkeypatch):
    folder, marker = tmp_path / "own", tmp_path / "ran"
    torch.manual_seed(1)
    BUILDERS["llama"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    facts |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_language_model, load_encoder):
        refused(ModelFileError, lambda load=load: load(folder), "trust_remote_code", seconds=30)
        assert not marker.exists()
    load_language_model(folder, device="cpu", target_modules=["q_proj"], model_kwargs={"trust_remote_code": True})
    assert marker.exists()


@pytest.mark.parametrize("config", [{"r": 10**7}, {"r": 2, "rank_pattern": {"q_proj": 10**7}}])
def test_a_rank_above_every_matrix_is_refused(config):
    lora = peft.LoraConfig(target_modules=["q_proj"], **config)
    refused(SiteError, lambda: inject(lora, BUILDERS["llama"]()), "r=10000000", "largest matrix has 24 rows")


@pytest.fixture
def run(lm, tmp_path):
    """The folder of a run whose model is on the hub."""
    config = RunConfig.from_dict({"recipe": "abmll-network", "guide": {"hidden": 4, "directions": 1, "bilinear": 1}})
    Posterior.from_objective(lm, build_objective(lm, config).double().eval()).save(tmp_path / "run" / "posterior")
    facts = CONFIG.to_dict()
    facts["language_model"] |= {"name": "someone/a-model", "r": 3, "cache_folder": str(tmp_path / "cache")}
    facts["language_model"]["cache_gib"] = 1e300
    (tmp_path / "run" / "config.json").write_text(json.dumps(facts))
    return tmp_path / "run"


def test_the_name_of_a_model_is_told_before_it_is_fetched(run, monkeypatch, tokenizer, tmp_path):
    monkeypatch.setattr(model_files, "find_in_hub_cache", lambda *_: None)
    seen = []

    def build(settings):
        seen.extend(str(warning.message) for warning in caught)
        assert settings.cache_folder is None and settings.cache_gib == 4.0
        return build_lm("llama", tokenizer)

    monkeypatch.setattr(loading, "build_language_model", build)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loading.load_posterior(run)
    told = "config.json names the language model 'someone/a-model', which is not on this machine: it is downloaded"
    assert len(seen) == 1 and told in seen[0]
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(model_files, "find_in_hub_cache", lambda *_: tmp_path)
    loading.load_posterior(run)  # warnings are errors


def test_the_name_of_an_adapter_is_told_too(tmp_path, model_folder):
    with pytest.warns(
        UserWarning, match=r"x.json names the adapter 'someone/an-adapter', which is not on this machine"
    ):
        model_files.warn_of_download(str(model_folder), None, tmp_path / "x.json", adapter="someone/an-adapter")
    model_files.warn_of_download(str(model_folder), None, tmp_path / "x.json", adapter=str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*names the language model:UserWarning")
def test_a_rank_of_the_settings_is_compared_before_the_model_is_loaded(run, monkeypatch):
    facts = json.loads((run / "config.json").read_text())
    facts["language_model"]["r"] = 10**7
    (run / "config.json").write_text(json.dumps(facts))
    monkeypatch.setattr(loading, "build_language_model", None)
    refused(PosteriorError, lambda: loading.load_posterior(run), "config.json is damaged: expected the rank")


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"guide": ' + "[" * 60 + "]" * 60 + "}", "null", "{"])
def test_damaged_settings_of_a_run_are_refused(run, content):
    (run / "config.json").write_text(content)
    refused(BayesLoraError, lambda: loading.load_posterior(run), "config.json")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_an_adapter_with_values_that_are_not_finite_is_refused(model_folder, tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(BUILDERS["llama"](), lora)
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "adapter")
    refused(
        ModelFileError,
        lambda: load_language_model(model_folder, adapter=tmp_path / "adapter", device="cpu"),
        "lora_B.weight has NaN or infinite values",
        seconds=30,
    )


@pytest.mark.parametrize(
    "read, error, name",
    [
        (lambda path: load_split(path.parent, "s"), TaskError, "splits.json"),
        (read_architecture, ModelFileError, "config.json"),
    ],
    ids=["splits", "architecture"],
)
def test_other_json_is_limited(tmp_path, read, error, name):
    path = tmp_path / name
    path.write_text("[" * 100_000)
    refused(error, lambda: read(path), name)
    path.unlink()
    os.mkfifo(path)
    refused(error, lambda: read(path), name, "expected a file, got a folder, a pipe or a device")
