"""LoRA configurations: settings that train or change weights outside the sites are refused."""

import dataclasses

import peft
import pytest
from conftest import BUILDERS
from peft.tuners.lora.config import KasaConfig

from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.lm.adapters import check_lora_config
from bayes_lora.lm.inject import inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.loading import load_language_model

# PEFT 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

REFUSED = [
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": {"embed_tokens": [1]}},
    {"target_parameters": ["model.layers.0.self_attn.q_proj.weight"]},
    {"bias": "lora_only"},
    {"bias": "all"},
    {"use_dora": True},
    {"lora_bias": True},
    {"use_qalora": True},
    {"alora_invocation_tokens": [3]},
    {"velora_config": {}},
    {"kasa_config": KasaConfig()},
    {"megatron_config": {"hidden_size": 16}},
]


def lora_config(**kwargs):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | kwargs)


@pytest.mark.parametrize("setting", REFUSED, ids=lambda setting: next(iter(setting)))
def test_other_weights_and_variants_of_lora_are_refused(setting):
    [name] = setting
    model = BUILDERS["llama"]()
    before = [module for module, _ in model.named_modules()]
    with pytest.raises(SiteError, match=rf"LoraConfig\({name}=.*(Leave {name} out|Set {name}=(False|'none'))\.$"):
        inject(lora_config(**setting), model)
    assert [module for module, _ in model.named_modules()] == before


def test_a_setting_that_a_later_version_of_peft_adds_is_refused():
    """It might change how predictions are computed."""

    @dataclasses.dataclass
    class Later(peft.LoraConfig):
        use_magic: bool = False

    check_lora_config(Later(target_modules=["q_proj"]))
    with pytest.raises(SiteError, match=r"LoraConfig\(use_magic=True\): .*Set use_magic=False\."):
        check_lora_config(Later(target_modules=["q_proj"], use_magic=True))


@pytest.mark.parametrize(
    ("setting", "value"), [("lora_alpha", 3), ("use_rslora", True), ("alpha_pattern", {"q_proj": 3}), ("r", 4)]
)
def test_a_configuration_that_is_not_the_adapter_s_is_refused(tokenizer, setting, value):
    """PEFT would multiply the exported weights by another scaling than the one that was predicted with."""
    model = BUILDERS["llama"]()
    inject(lora_config(), model)
    with pytest.raises(
        ConfigError, match=rf"lora_config: its {setting} is .*, but adapter 'default' was injected with"
    ):
        LanguageModel(model, tokenizer, lora_config(**{setting: value}))


@pytest.mark.parametrize("init", ["pissa", "PiSSA", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(init):
    config = lora_config()
    config.init_lora_weights = init  # afterwards, because some need packages or settings of their own
    with pytest.raises(SiteError, match=rf"init_lora_weights='{init}'\): this changes the base weights"):
        check_lora_config(config)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("mica", r"'mica'\): expected True, False, 'gaussian', 'orthogonal' or 'eva'"),
        ("nonsense", r"'nonsense'\): expected True, False, 'gaussian', 'orthogonal' or 'eva'"),
        ("eva", r"'eva'\): PEFT computes these values from data.*initialize_lora_eva_weights.*from_peft"),
    ],
)
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
def test_initialisations_that_would_not_be_applied_are_refused(model_folder, init, message):
    with pytest.raises(SiteError, match=message):
        load_language_model(model_folder, lora_config(init_lora_weights=init), device="cpu")
