"""What is saved is refused by a language model of other predictions, and accepted by one of the same predictions."""

import json
import shutil

import peft
import pytest
import torch
from conftest import SIZES
from runs import CONFIG
from tokenizers import AddedToken, Tokenizer, processors
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bayes_lora.episodes import PromptTemplate
from bayes_lora.episodes.tokenizer_facts import tokenizer_facts
from bayes_lora.errors import ModelFileError, PosteriorError
from bayes_lora.infer.training import FitState
from bayes_lora.lm.fingerprint import EXPORTED, FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.loading import inject, load_language_model
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs.checkpoint import Checkpoints

CHAT = (
    "{% if messages %}%s{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TODAY = " The current date is 26 November 2026, and the assistant is polite. "
MOE = dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8, layer_types=None)


def retokenized(tokenizer, change=lambda parts: None, **kwargs):
    """The tokenizer, with its file changed, and keyword arguments of its class."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    tokens = dict(bos_token="<s>", eos_token="<s>", pad_token="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **tokens | kwargs)


def with_tokens(tokenizer, *tokens):
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def with_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def chatting(tokenizer, text=TODAY):
    changed = retokenized(tokenizer)
    changed.chat_template = CHAT.replace("%s", text)
    return changed


def exchange_ids(parts):
    """Exchange the ids of two tokens of the vocabulary."""
    vocab = parts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def make(tokenizer, config=None, lora=None, dtype=torch.float64, seed=1, name="tiny", **kwargs):
    """A tiny language model with LoRA at q_proj of its first two layers."""
    torch.manual_seed(seed)
    config = config or LlamaConfig(**SIZES)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype)
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=[0, 1], task_type="CAUSAL_LM")
    adapter = peft.LoraConfig(**options | (lora or {}))
    inject(adapter, model, seed=2)
    return LanguageModel(model, tokenizer, adapter, name=name, **dict(max_length=96) | kwargs)


def save(lm, folder):
    """A posterior, a task posterior and a checkpoint of this language model."""
    objective = build_objective(lm, CONFIG)
    phi = {site: value + 0.1 for site, value in lm.sites.initial().items()}
    Posterior.from_objective(lm, objective.eval()).save(folder / "posterior")
    TaskPosterior(lm, {}, phi, ("a",)).save(folder / "task")
    optimizer = torch.optim.Adam(objective.parameters())
    Checkpoints(folder / "checkpoint", objective, optimizer, CONFIG.to_dict(), lm).save(FitState())


def load(lm, folder):
    """Load each of them, and yield what was raised, or None."""
    objective = build_objective(lm, CONFIG)
    optimizer = torch.optim.Adam(objective.parameters())
    loads = [
        lambda: Posterior.load(folder / "posterior", lm),
        lambda: TaskPosterior.load(folder / "task", lm),
        lambda: Checkpoints(folder / "checkpoint", objective, optimizer, CONFIG.to_dict(), lm).load(),
    ]
    for one in loads:
        try:
            one()
            yield None
        except PosteriorError as error:
            yield str(error)


def llama(**kwargs):
    return {"config": LlamaConfig(**SIZES | kwargs)}


def qwen3(**kwargs):
    return {"config": Qwen3Config(**SIZES | dict(head_dim=4) | kwargs)}


def gemma2(**kwargs):
    return {"config": Gemma2Config(**SIZES, head_dim=4, query_pre_attn_scalar=4, **kwargs)}


def moe(experts):
    return {"config": Qwen2MoeConfig(**SIZES | MOE, num_experts_per_tok=experts)}


def lora(**kwargs):
    return {"lora": kwargs}


def rope(**kwargs):
    return {"rope_parameters": dict(rope_type="default", rope_theta=10000.0) | kwargs}


CHATS = {"template": PromptTemplate("{input}", chat=True)}
# By item: keyword arguments of make() then and now, of retokenized(), and the message.
DIFFERENT = {
    "layers": ({}, lora(layers_to_transform=[2, 3]), r"modules.q_proj.lora_A\[0\]='model.layers.0.self_attn.q_proj', "),
    "one layer": ({}, lora(layers_to_transform=[0, 2]), r"\[1\]='model.layers.1.*has .*\[1\]='model.layers.2"),
    "kind": ({}, lora(target_modules=["o_proj"]), r"shapes.q_proj.lora_A=\[2, 4, 16\].* has .*lora_A=nothing"),
    "rank": ({}, lora(r=2, lora_alpha=4), r"shapes.q_proj.lora_A=\[2, 4, 16\].* has shapes.q_proj.lora_A=\[2, 2, 16\]"),
    "rank of a layer": ({}, lora(rank_pattern={"layers.1.self_attn.q_proj": 2}), r"with shapes.q_proj.lora_A=\[2, 4"),
    "alpha": ({}, lora(lora_alpha=80), r"scalings.model.layers.0.self_attn.q_proj=2.0.* has .*q_proj=20.0"),
    "rslora": ({}, lora(use_rslora=True), r"scalings.model.layers.0.self_attn.q_proj=2.0.* has .*q_proj=4.0"),
    "alpha of a layer": (
        {},
        lora(alpha_pattern={"layers.1.self_attn.q_proj": 2}),
        r"fitted with scalings.model.layers.1.self_attn.q_proj=2.0, but tiny has .*q_proj=0.5\.",
    ),
    "weights": ({}, {"seed": 3}, "on base weights other than those of tiny, .* Use the same copy, or fit again"),
    "revision": ({"revision": "v2"}, {"revision": "v3"}, "with revision='v2', but tiny has revision='v3'. Use"),
    "template": ({}, {"template": PromptTemplate(gap=" | ")}, r"template.gap='\\n\\n', .* template.gap=' | '"),
    "max_length": ({}, {"max_length": 50}, "fitted with max_length=96, but tiny has max_length=50. Use the same"),
    "normalize": ({}, {"normalize": "mean"}, "with normalize='sum', but tiny has normalize='mean'"),
    "positions": ({}, llama(max_position_embeddings=128), "with max_positions=256, but tiny has max_positions=128"),
    "norm": ({}, llama(rms_norm_eps=1e-3), "with config.rms_norm_eps=1e-06, .*=0.001. Use the same config.json"),
    "activation": ({}, llama(hidden_act="gelu"), "with config.hidden_act='silu', .*='gelu'"),
    "rope theta": (
        llama(**rope()),
        llama(**rope(rope_theta=500.0)),
        "fitted with config.rope_parameters.rope_theta=10000.0, but tiny has config.rope_parameters.rope_theta=500.0",
    ),
    "rope scaling": (
        llama(**rope()),
        llama(**rope(rope_type="linear", factor=2.0)),
        "config.rope_parameters.*rope_type='default'.*'linear'",
    ),
    "softcap": (
        gemma2(),
        gemma2(final_logit_softcapping=5.0),
        "config.final_logit_softcapping=30.0.*=5.0",
    ),
    "sliding window": (
        qwen3(use_sliding_window=True, sliding_window=64, max_window_layers=2),
        qwen3(use_sliding_window=True, sliding_window=64, max_window_layers=0),
        r"config.*layer_types\[0\]='full_attention'.*'sliding_attention'",
    ),
    "experts": (moe(2), moe(1), "with config.num_experts_per_tok=2, .*config.num_experts_per_tok=1"),
}  # fmt: skip
# By item: the tokenizer then and now, and the message.
TOKENIZERS = {
    "vocabulary": (None, lambda t: retokenized(t, exchange_ids), "tokenizer.vocabulary.hash="),
    "merges": (None, lambda t: retokenized(t, lambda p: p["model"]["merges"].pop()), "tokenizer.vocabulary.hash="),
    "model": (None, lambda t: retokenized(t, lambda p: p["model"].update(ignore_merges=True)), "model.ignore_merges=n"),
    "added token": (None, lambda t: with_tokens(retokenized(t), " film"), "added_tokens.size=1, .*=2"),
    "its spaces": (
        lambda t: with_tokens(retokenized(t), AddedToken("film", lstrip=True)),
        lambda t: with_tokens(retokenized(t), AddedToken("film", lstrip=False)),
        "with tokenizer.added_tokens.hash=",
    ),
    "normalizer": (
        None,
        lambda t: retokenized(t, lambda p: p.update(normalizer={"type": "Lowercase"})),
        "tokenizer.normalizer=None, .*tokenizer.normalizer={'type': 'Lowercase'}",
    ),
    "pre-tokenizer": (
        None,
        lambda t: retokenized(t, lambda p: p["pre_tokenizer"].update(add_prefix_space=True)),
        "tokenizer.pre_tokenizer.add_prefix_space=nothing, .*=True",
    ),
    "decoder": (None, lambda t: retokenized(t, lambda p: p.update(decoder={"type": "Fuse"})), "tokenizer.decoder."),
    "end of text": (None, lambda t: retokenized(t, eos_token="a"), "tokenizer.eos_token='<s>', .*eos_token='a'"),
    "special tokens in a text": (None, lambda t: retokenized(t, split_special_tokens=True), "tokenizer.sample="),
    "first token": (None, lambda t: with_bos(retokenized(t)), r"with frame.prefix=\[\], .*frame.prefix=\[0\]"),
    "date of a chat": (
        chatting,
        lambda t: chatting(t, TODAY.replace("26 Nov", "27 Nov")),
        r"frame.first='...urrent date is 26 November 2026, ...',.*frame.first='...urrent date is 27 November 2026, ...'"
        ".* Use the same ones .a date in them is set by template.chat_arguments",
    ),
    "end of a message": (
        chatting,
        lambda t: setattr(c := chatting(t), "chat_template", c.chat_template.replace("[end]", "[.]")) or c,
        r"with frame.cue='\[end\]\[assistant\]'",
    ),
}  # fmt: skip


def check_refused(before, after, folder, message):
    save(before, folder)
    assert list(load(before, folder)) == [None] * 3
    errors = list(load(after, folder))
    assert None not in errors, f"{['posterior', 'task posterior', 'checkpoint'][errors.index(None)]} was accepted"
    for error in errors:
        with pytest.raises(PosteriorError, match=message):
            raise PosteriorError(error)
        assert "\n" not in error and len(error) < 700


@pytest.mark.parametrize("item", DIFFERENT)
def test_another_model_or_setting_is_refused_by_name(tokenizer, tmp_path, item):
    before, after, message = DIFFERENT[item]
    check_refused(make(tokenizer, **before), make(tokenizer, **after), tmp_path, message)


@pytest.mark.parametrize("item", TOKENIZERS)
def test_another_tokenizer_is_refused_by_its_part(tokenizer, tmp_path, item):
    *change, message = TOKENIZERS[item]
    kwargs = CHATS if change[0] is chatting else {}
    before, after = (retokenized(tokenizer) if one is None else one(tokenizer) for one in change)
    check_refused(make(before, **kwargs), make(after, **kwargs), tmp_path, message)


def from_folder(tokenizer, folder):
    """The tokenizer written and read, after it was used with truncation and padding."""
    used = retokenized(tokenizer)
    used(["a film", "so"], padding=True, truncation=True, max_length=2)
    used.save_pretrained(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def padded(tokenizer, _):
    return retokenized(tokenizer, pad_token=None, padding_side="left", model_max_length=7)


BOOKKEEPING = dict(use_cache=False, initializer_range=0.3, attention_dropout=0.1, my_note="a copy", pad_token_id=1)
# By item: keyword arguments of make(), and the tokenizer.
SAME = {
    "half precision": ({"dtype": torch.float16}, None),
    "bfloat16": ({"dtype": torch.bfloat16}, None),
    "name": ({"name": "elsewhere/copy", "revision": "v3"}, None),
    "attention": ({"config": LlamaConfig(**SIZES, attn_implementation="eager")}, None),
    "bookkeeping": ({"config": LlamaConfig(**SIZES | BOOKKEEPING)}, None),
    "in float32 (GGUF)": (llama(rms_norm_eps=float(torch.tensor(1e-6))), None),
    "another spelling of the scaling": (lora(lora_alpha=4, use_rslora=True), None),
    "another spelling of the layers": (
        lora(target_modules=r".*layers\.[01]\..*q_proj", layers_to_transform=None),
        None,
    ),
    "token budget": ({"token_budget": 50, "gradient_checkpointing": True}, None),
    "tokenizer from a folder": ({}, from_folder),
    "padding token": ({}, padded),
}


@pytest.mark.parametrize("item", SAME)
def test_another_form_of_the_same_model_is_accepted(tokenizer, tmp_path, item):
    kwargs, change = SAME[item]
    save(make(retokenized(tokenizer), revision="v2"), tmp_path)
    here = retokenized(tokenizer) if change is None else change(tokenizer, tmp_path)
    assert list(load(make(here, **{"revision": "v2"} | kwargs), tmp_path)) == [None] * 3


def test_a_value_that_another_version_of_transformers_adds_is_accepted(tokenizer, tmp_path, lm):
    facts = json.loads(json.dumps({FINGERPRINT: fingerprint(lm)}))
    facts[FINGERPRINT]["config"] |= {"former_key": 1}
    del facts[FINGERPRINT]["config"]["mlp_bias"]
    check_fingerprint(facts, lm, tmp_path)


@pytest.mark.parametrize("saved", [{}, [], {"language_model": {"name": "llama"}, "base_weights": {}}])
def test_a_file_without_a_fingerprint_is_refused(lm, tmp_path, saved):
    message = f"{tmp_path}: it has no 'fingerprint' of its language model, as files of former versions. Fit again.$"
    with pytest.raises(PosteriorError, match=message):
        check_fingerprint(saved, lm, tmp_path)


@pytest.mark.parametrize("value", [None, [], 1.0, "a", {}])
def test_a_damaged_fingerprint_is_refused_in_one_line(lm, tmp_path, value):
    facts = json.loads(json.dumps(fingerprint(lm)))
    with pytest.raises(PosteriorError, match=r"is damaged: 'fingerprint' has no mapping 'base'\. Restore it"):
        check_fingerprint({FINGERPRINT: value}, lm, tmp_path)
    for section in facts.keys() - {"base", "adapter_weights"}:  # another name is accepted, and no adapter is empty
        with pytest.raises(PosteriorError) as caught:
            check_fingerprint({FINGERPRINT: facts | {section: dict.fromkeys(facts[section], value)}}, lm, tmp_path)
        assert "\n" not in str(caught.value), section


def test_a_tokenizer_that_gets_more_tokens_gets_other_facts(tokenizer):
    """The facts are kept, so that a posterior is saved in milliseconds."""
    changed = retokenized(tokenizer)
    before = tokenizer_facts(changed)
    assert tokenizer_facts(changed) == before == tokenizer_facts(retokenized(tokenizer))
    after = tokenizer_facts(with_tokens(changed, "film"))
    assert before["added_tokens"]["size"] + 1 == after["added_tokens"]["size"]


@pytest.fixture
def exported(model_folder, tmp_path):
    """A copy of a base model, and an adapter exported from a posterior on it."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    lm = load_language_model(base, layers_to_transform=[1], **LOCAL)
    phi = {site: value + 0.1 for site, value in lm.sites.initial().items()}
    TaskPosterior(lm, {}, phi, ("a",)).export_peft(tmp_path / "adapter")
    return base, tmp_path / "adapter"


LOCAL = dict(device="cpu", cache_folder=None)


def rewrite(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def other_weights(base, _):
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(base)


def other_alpha(_, adapter):
    rewrite(adapter / "adapter_config.json", lambda config: config.update(lora_alpha=32))


def other_tokenizer(base, _):
    rewrite(base / "tokenizer.json", lambda parts: parts.update(normalizer={"type": "Lowercase"}))


def other_config(base, _):
    rewrite(base / "config.json", lambda config: config.update(rms_norm_eps=0.5))


def another_revision(_, adapter):
    rewrite(adapter / EXPORTED, lambda facts: facts[FINGERPRINT]["base"].update(revision="v2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "exported on base weights other than those of .*base, .* Use the same copy"),
        (other_tokenizer, "exported with tokenizer.normalizer=None, .*'Lowercase'}, .*. Use the same tokenizer"),
        (other_config, "exported with config.rms_norm_eps=1e-06, but .*0.5. Use the same config.json"),
        (other_alpha, "exported with scalings.model.layers.1.self_attn.q_proj=2.0.*=4.0"),
        (another_revision, "exported with revision='v2', but .*base has revision=None. Use the same revision"),
    ],
)
def test_an_exported_adapter_is_refused_on_another_base(exported, change, message):
    base, adapter = exported
    change(base, adapter)
    with pytest.raises(ModelFileError, match=rf"adapter.bayes_lora.json: {message}.*or delete this file") as caught:
        load_language_model(base, adapter=adapter, **LOCAL)
    assert "\n" not in str(caught.value)
    (adapter / EXPORTED).unlink()
    assert load_language_model(base, adapter=adapter, **LOCAL).adapter == str(adapter)


def test_an_exported_adapter_may_have_other_prompts_and_another_folder(exported, tmp_path):
    base, adapter = exported
    base, adapter = (one.rename(tmp_path / f"moved-{one.name}") for one in (base, adapter))
    options = dict(template=PromptTemplate("{input}:"), max_length=60, dtype="bfloat16")
    lm = load_language_model(base, adapter=adapter, **LOCAL, **options)
    assert lm.sites.modules["q_proj.lora_A"] == ["model.layers.1.self_attn.q_proj"]
    facts = json.loads((adapter / EXPORTED).read_text())
    assert facts[FINGERPRINT]["settings"]["max_length"] == 128  # that of the posterior
