"""Models in which a long row changes the others, or is attended to in parts, against transformers one row at a time."""

import peft
import pytest
import torch
from conftest import SIZES, make_tasks
from lm_helpers import random_phi
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.lm.inject import inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.text_config import max_positions, max_row_length
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks import Example

SHORT = SIZES | {"pad_token_id": 0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.0],
    "long_factor": [4.0, 6.0],
    "original_max_position_embeddings": 40,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "head_dim": 4}


def phi3():
    longrope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}
    return Phi3ForCausalLM(Phi3Config(**SHORT, **longrope, sliding_window=None))


def dynamic():
    return LlamaForCausalLM(LlamaConfig(**SHORT | {"max_position_embeddings": 40}, rope_parameters=DYNAMIC))


def chunked():
    return Llama4ForCausalLM(Llama4TextConfig(**SHORT, **EXPERTS, attention_chunk_size=40))


MODELS = {"phi3": (phi3, ["qkv_proj"]), "dynamic": (dynamic, ["q_proj"]), "chunked": (chunked, ["q_proj"])}


def build(kind, tokenizer):
    make, targets = MODELS[kind]
    torch.manual_seed(1)
    model = make().double().eval()
    lora = peft.LoraConfig(r=2, target_modules=targets, layers_to_transform=[2, 3], task_type="CAUSAL_LM")
    inject(lora, model)
    return LanguageModel(model, tokenizer, lora, max_length=200)


def alone(lm, example):
    """The scores of an encoded example's options, one row at a time, by transformers' forward."""
    prompt, scores = example.tokens[example.segments == 0].tolist(), []
    for k in range(example.num_options):
        option = example.targets[example.target_options == k].tolist()
        logits = lm.model(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(option)))
    return torch.stack(scores)


@pytest.mark.filterwarnings("ignore:.*prompts are longer than max_length=")
@pytest.mark.parametrize("kind", MODELS)
def test_a_long_row_does_not_change_the_short_ones(kind, tokenizer):
    """The long row comes first, so that whatever it changes is cached; it is as long as the model allows."""
    lm = build(kind, tokenizer)
    examples = [Example("the film was good and bad so maybe not " * 6, ("yes", "no"), 0)]
    encoded = lm.encoder([*examples, *make_tasks(1)["task-0"].examples[:3]])
    assert max(map(len, encoded)) == lm.encoder.max_length == max_row_length(lm.model.config)
    values = random_phi(lm, 1, 1)
    with torch.no_grad():
        found = lm({site: value[None] for site, value in values.items()}, collate([encoded]))[0, 0]
        with lm.sites.bind({site: value[0, 0] for site, value in values.items()}):
            expected = torch.stack([alone(lm, example) for example in encoded])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["phi3", "dynamic"])
def test_an_answer_that_would_change_the_other_prompts_is_refused(kind, tokenizer):
    lm = build(kind, tokenizer)
    posterior = TaskPosterior(lm, {}, lm.sites.initial(), ("one",))
    assert posterior.generate(["good"], num_draws=0, max_new_tokens=4)
    with pytest.raises(ConfigError, match=r"ForCausalLM changes the rotary angles of all prompts after 40\. "):
        posterior.generate(["good", "the film was good and bad"], num_draws=0, max_new_tokens=40)


def test_limits_of_the_configurations():
    assert [max_row_length(make().config) for make, _ in MODELS.values()] == [39, 39, 40]
    assert [max_positions(make().config) for make, _ in MODELS.values()] == [40, 40, None]
    assert max_row_length(LlamaConfig(**SHORT)) == 256
    config = LlamaConfig(**SHORT)
    config.sliding_window = -1  # some models write it for "none"
    assert max_row_length(config) == 256
    layers = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config.rope_parameters = layers
    assert max_row_length(config) == 39
