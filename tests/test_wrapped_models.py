"""Models inside a wrapper, whose modules have other names: refused before any work, with the cure."""

import peft
import pytest
import torch
from conftest import BUILDERS

from bayes_lora.errors import ConfigError
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.loading import from_peft

# PEFT 0.21 on transformers 5.23; importing torch's compiler
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


def lora_config():
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "PeftModelForCausalLM": (
        lambda model: peft.get_peft_model(model, lora_config()),
        r"Use from_peft\(peft_model, tok",
    ),
    "PeftMixedModel": (lambda model: peft.get_peft_model(model, lora_config(), mixed=True), "Pass the model inside it"),
    "OptimizedModule": (torch.compile, "Pass the model inside it"),
    "Wrapper": (Wrapper, "Pass the model inside it"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_refused(kind, tokenizer):
    wrap, cure = WRAPPERS[kind]
    model = BUILDERS["llama"]()
    wrapped = wrap(model)
    names = [name for name, _ in wrapped.named_modules()]
    with pytest.raises(ConfigError, match=rf"expected a transformers PreTrainedModel, got {kind}\. {cure}"):
        LanguageModel(wrapped, tokenizer, lora_config())
    assert [name for name, _ in wrapped.named_modules()] == names


@pytest.mark.parametrize("kind", ["PeftMixedModel", "Wrapper"])
def test_from_peft_refuses_another_wrapper(kind, tokenizer):
    model = peft.get_peft_model(BUILDERS["llama"](), lora_config(), mixed=kind == "PeftMixedModel")
    with pytest.raises(ConfigError, match=rf"expected a peft\.PeftModel, got {kind}"):
        from_peft(Wrapper(model) if kind == "Wrapper" else model, tokenizer)


def test_from_peft_refuses_a_wrapper_inside_the_peft_model(tokenizer):
    model = BUILDERS["llama"]()
    compiled = peft.PeftModel(torch.compile(model), lora_config())
    with pytest.raises(ConfigError, match="expected a transformers PreTrainedModel, got OptimizedModule"):
        from_peft(compiled, tokenizer)
