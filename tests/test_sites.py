import peft
import pytest
import torch
from conftest import BUILDERS, TARGETS, build_lm
from torch import nn

from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.errors import SiteError
from bayes_lora.lm.inject import inject
from bayes_lora.lm.sites import Slot, find_sites
from bayes_lora.utils.grouped_linear import RowGroups, linear


def random_values(sites, *batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        s: torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) for s, shape in sites.shapes.items()
    }


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_slot_equals_a_loop(groups):
    weight, x = torch.randn(groups, 5, 4, dtype=torch.float64), torch.randn(6, 7, 4, dtype=torch.float64)
    slot = Slot(torch.zeros(5, 4, dtype=torch.float64))
    slot.bind(weight)
    blocks = x.chunk(groups)
    expected = torch.cat([block @ w.T for block, w in zip(blocks, weight, strict=True)])
    torch.testing.assert_close(slot(x), expected)


def test_an_unbound_slot_adds_nothing_whatever_it_held():
    initial, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 7, 4, dtype=torch.float64)
    slot = Slot(initial)
    assert torch.equal(slot(x), torch.zeros(6, 7, 5, dtype=torch.float64)) and not slot.weight.numel()
    slot.bind(initial)
    torch.testing.assert_close(slot(x), x @ initial.T)


@pytest.mark.parametrize("length", [3, 40])  # each group multiplied alone, and a matrix for each row
@pytest.mark.parametrize("deferred", [False, True])
def test_groups_of_unequal_size_equal_a_loop(length, deferred):
    """Values and gradients, of weights and of deferred weights' moments."""
    torch.manual_seed(0)
    sizes = (1, 3, 2)
    x = torch.randn(6, length, 4, dtype=torch.float64, requires_grad=True)
    shapes = [(2, 4), (5, 2), (2, 4), (5, 2)] if deferred else [(5, 4)]
    parts = [torch.randn(3, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    row_groups = RowGroups.of(sizes, torch.device("cpu"))
    found, expected = [], []
    if deferred:
        weight = DeferredWeight(*parts)
        found.append(weight.variance(x, row_groups))
        for group, rows in enumerate(x.split(sizes)):
            expected.append(DeferredWeight(*(part[group] for part in parts)).variance(rows))
        parts = parts[2:]  # of which the variance is made
    else:
        slot = Slot(torch.zeros(5, 4, dtype=torch.float64))
        slot.bind(parts[0], row_groups)
        found.append(slot(x))
        expected = [rows @ own.T for rows, own in zip(x.split(sizes), parts[0], strict=True)]
    found, expected = found[0], torch.cat(expected)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    pairs = (torch.autograd.grad(value, [x, *parts], direction) for value in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sizes", [(1, 3, 2), (2, 2, 2)])
@pytest.mark.parametrize("deferred", [False, True])
def test_flattened_rows_equal_rows(sizes, deferred):
    """Some models flatten ``(rows, length, in)`` before an MLP: OPT, and Qwen2-MoE before its shared expert."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    slot = Slot(torch.zeros(5, 4, dtype=torch.float64))
    weight = torch.randn(3, 5, 4, dtype=torch.float64)
    bound = (lambda value, groups: linear(value, weight, groups)) if deferred else weight
    slot.bind(bound, RowGroups.of(sizes, torch.device("cpu")))
    expected = torch.cat([rows @ own.T for rows, own in zip(x.split(sizes), weight, strict=True)])
    torch.testing.assert_close(slot(x.flatten(0, 1)), expected.flatten(0, 1))


@pytest.mark.parametrize("of_x", [False, True])
def test_groups_of_unequal_size_have_second_derivatives(of_x):
    """As second-order steps need them, and one alone where only the weight is random."""
    torch.manual_seed(0)
    row_groups = RowGroups.of((1, 3, 2), torch.device("cpu"))
    x = torch.randn(6, 24, 4, dtype=torch.float64, requires_grad=of_x)
    weight = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    chosen = [x, weight] if of_x else [weight]

    def twice(multiply):
        first = torch.autograd.grad(multiply(x, weight).pow(3).sum(), chosen, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g * g).sum() for g in first), chosen)]

    found = twice(lambda x, w: linear(x, w, row_groups))
    expected = twice(lambda x, w: torch.cat([part @ own.T for part, own in zip(x.split((1, 3, 2)), w, strict=True)]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_groups_of_equal_size_need_no_blocks():
    assert RowGroups.of((2, 2, 2), torch.device("cpu")) is None
    assert RowGroups.of((1, 2), torch.device("cpu")).group.tolist() == [0, 1, 1]


def test_rows_of_other_groups_are_refused(lm):
    with pytest.raises(SiteError, match=r"values for \[2\] groups, but rows for 3"):
        with lm.sites.bind(random_values(lm.sites, 2), (1, 2, 1)):
            pass
    with pytest.raises(SiteError, match=r"values for \[\] groups, but rows for 1"):
        with lm.sites.bind(random_values(lm.sites), (4,)):
            pass


def test_row_groups_are_restored_with_what_was_bound(lm):
    ids = torch.tensor([[5, 9, 2], [1, 1, 8], [7, 3, 2]])
    values = random_values(lm.sites, 2)
    with lm.sites.bind(values, (2, 1)):
        before = lm.model(input_ids=ids).logits
        with lm.sites.bind({site: value[0] for site, value in values.items()}):
            first = lm.model(input_ids=ids).logits
        torch.testing.assert_close(lm.model(input_ids=ids).logits, before, rtol=0, atol=0)
    torch.testing.assert_close(before[:2], first[:2])
    assert (before[2] - first[2]).abs().max() > 1e-3
    assert lm.sites._bindings.values == ({}, None)


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_bound_model_equals_peft_with_the_same_weights(kind, tokenizer):
    lm = build_lm(kind, tokenizer)
    phi = random_values(lm.sites)
    torch.manual_seed(1)
    plain = BUILDERS[kind]().double()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS.get(kind, ["q_proj", "v_proj", "o_proj"]),
        layers_to_transform=[2, 3], fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    plain = peft.inject_adapter_in_model(config, plain).eval()
    weights = lm.sites.unstack(phi)
    loaded = plain.load_state_dict({f"{n}.default.weight": w for n, w in weights.items()}, strict=False)
    assert not loaded.unexpected_keys
    ids = torch.tensor([[5, 9, 2, 7], [1, 1, 8, 3]])
    with lm.sites.bind(phi):
        bound = lm.model(input_ids=ids).logits
    torch.testing.assert_close(bound, plain(input_ids=ids).logits)
    assert (bound - lm.model(input_ids=ids).logits).abs().max() > 1e-3  # the values did something


def test_binding_is_undone_also_after_an_error(lm):
    ids = torch.tensor([[5, 9, 2]])
    before = lm.model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="inside"), lm.sites.bind(random_values(lm.sites)):
        raise RuntimeError("inside")
    torch.testing.assert_close(lm.model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_nested_bindings_restore_the_outer_one(lm):
    ids, outer = torch.tensor([[5, 9, 2]]), random_values(lm.sites)
    with lm.sites.bind(outer):
        expected = lm.model(input_ids=ids).logits
        with lm.sites.bind(random_values(lm.sites, seed=1)):
            assert not torch.equal(lm.model(input_ids=ids).logits, expected)
        torch.testing.assert_close(lm.model(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_gradients_under_checkpointing_equal_those_without(lm):
    ids = torch.tensor([[5, 9, 2, 7, 1], [4, 4, 8, 1, 2]])
    phi = {site: value.requires_grad_() for site, value in random_values(lm.sites, 2).items()}

    def gradients():
        with lm.sites.bind(phi):
            loss = lm.model(input_ids=ids).logits.logsumexp(-1).sum()
        with lm.sites.bind(random_values(lm.sites, seed=3)):  # another forward before the backward
            lm.model(input_ids=ids)
        return torch.autograd.grad(loss, list(phi.values()))

    expected = gradients()
    lm.model.train()
    enable = getattr(lm.model, "activation_checkpointing_enable", None) or lm.model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": lm.sites.checkpoint_context})
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().max() > 0


def test_unstack_and_stack_are_inverse(lm):
    values = random_values(lm.sites, 5, 2)
    weights = lm.sites.unstack(values)
    name = "model.layers.3.self_attn.v_proj.lora_B"
    torch.testing.assert_close(weights[name], values["v_proj.lora_B"][..., 1, :, :])
    again = lm.sites.stack(weights)
    assert again.keys() == values.keys()
    assert all(torch.equal(again[site], values[site]) for site in values)
    del weights[name]
    with pytest.raises(SiteError, match=r"missing \['model.layers.3.self_attn.v_proj.lora_B'\]"):
        lm.sites.stack(weights)


def test_layers_of_other_shapes_become_sites_of_their_own(tokenizer):
    model = BUILDERS["llama"]()
    model.model.layers[3].self_attn.q_proj = nn.Linear(16, 20, bias=False)
    inject(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    sites = find_sites(model)
    assert sites.shapes["q_proj.lora_B"] == (3, 16, 2)
    assert sites.shapes["q_proj.lora_B.2"] == (1, 20, 2)
    assert sites.shapes["q_proj.lora_A"] == (3, 2, 16)  # the numbers of both factors are the same
    assert sites.shapes["q_proj.lora_A.2"] == (1, 2, 16)
    assert sites.delta_shapes == {"q_proj.delta_weight": (3, 16, 16), "q_proj.delta_weight.2": (1, 20, 16)}
    assert "model.layers.3.self_attn.q_proj.lora_B" in sites.unstack(sites.initial())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.pop("q_proj.lora_A"),
            r"site 'q_proj.lora_A': no value given. Expected one of event shape \(2, 3, 16\)",
        ),
        (lambda v: v.update({"q_prj.lora_A": v["q_proj.lora_A"]}), r"no such site \(did you mean 'q_proj.lora_A' or"),
        (lambda v: v.update({"q_proj.lora_A": v["q_proj.lora_A"].mT}), r"got \(2, 16, 3\). Is it transposed"),
        (
            lambda v: v.update({"q_proj.lora_A": v["q_proj.lora_A"][None]}),
            r"\(groups, layers, out, in\) for all sites",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(lm, change, message):
    values = random_values(lm.sites)
    change(values)
    with pytest.raises(SiteError, match=message), lm.sites.bind(values):
        pass


def test_unknown_target_modules_name_the_near_ones():
    config = peft.LoraConfig(r=2, target_modules=["q_prj"])
    with pytest.raises(
        SiteError, match=r"the model has no module 'q_prj' \(did you mean 'q_proj' or .*It has \['act_fn"
    ):
        inject(config, BUILDERS["llama"]())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_prj"])  # PEFT alone would take q_proj and say nothing
    with pytest.raises(SiteError, match=r"no module 'v_prj' \(did you mean 'v_proj'"):
        inject(config, BUILDERS["llama"]())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[7])
    with pytest.raises(SiteError, match=r"target_modules \['q_proj'\]: .*not found"):
        inject(config, BUILDERS["llama"]())


def test_a_model_without_lora_is_refused():
    with pytest.raises(SiteError, match="no LoRA layer"):
        find_sites(BUILDERS["llama"]())


def test_dora_is_refused():
    model, lora = BUILDERS["llama"](), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(SiteError, match=r"LoraConfig\(use_dora=True\): only plain LoRA can be.* Set use_dora=False"):
        inject(lora, model)
    peft.inject_adapter_in_model(lora, model)
    with pytest.raises(SiteError, match=r"q_proj': only plain LoRA .*got PEFT's DoraLinearVariant\.$"):
        find_sites(model)


def test_lora_bias_is_refused():
    model = BUILDERS["qwen2"]()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), model)
    with pytest.raises(SiteError, match=r"'model.layers.0.self_attn.q_proj': its LoRA has a bias.*Set lora_bias=False"):
        find_sites(model)


def test_lora_dropout_is_taken_out_with_one_warning():
    model = BUILDERS["llama"]()
    inject(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5), model)
    with pytest.warns(UserWarning, match="lora_dropout=0.5 is not applied") as caught:
        sites = find_sites(model)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    ids = torch.tensor([[5, 9, 2]])
    with sites.bind({site: value.float() for site, value in random_values(sites).items()}):
        one, two = (model.train()(input_ids=ids).logits for _ in range(2))
    assert torch.equal(one, two)


def test_seeded_injection_leaves_the_random_state_alone():
    before, values = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        model = BUILDERS["llama"]()
        torch.set_rng_state(before)
        inject(peft.LoraConfig(r=2, target_modules=["q_proj"]), model, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        values.append(find_sites(model).initial()["q_proj.lora_A"])
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_binding_takes_no_time_for_each_layer(lm, monkeypatch):
    """A checkpointed layer binds twice in a step, so that time for each layer would be time for each pair of them."""

    def refuse(slot, name, value):
        raise AssertionError(f"{name} of a slot is set")

    monkeypatch.setattr(Slot, "__setattr__", refuse)
    ids = torch.tensor([[5, 9, 2]])
    with lm.sites.bind(random_values(lm.sites)):
        _, again = lm.sites.checkpoint_context()
        bound = lm.model(input_ids=ids).logits
        with lm.sites.unbound():
            base = lm.model(input_ids=ids).logits
            with again:
                assert torch.equal(lm.model(input_ids=ids).logits, bound)
            assert torch.equal(lm.model(input_ids=ids).logits, base)
    assert not torch.equal(bound, base)


def test_activations_of_the_base_alone_keep_their_dtype(tokenizer):
    """Slots hold initial values in float32, to which PEFT would cast what enters each of them."""
    lm = build_lm("llama", tokenizer, dtype=torch.bfloat16)
    seen = []
    for _, slot in lm.sites.slots():
        slot.register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.dtype)))
    with lm.sites.unbound():
        lm.model(input_ids=torch.tensor([[5, 9, 2]]))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
