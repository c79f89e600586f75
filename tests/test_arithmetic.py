"""Float32 by torch or by oneDNN, and bfloat16: equal up to rounding, and the fastest one is chosen."""

import json

import pytest
import torch
from conftest import build_lm, make_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import bayes_lora
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.lm import arithmetic
from bayes_lora.lm.arithmetic import FILE, avoid_recompiled_attention, choose_arithmetic, fastest, rates
from bayes_lora.lm.base_facts import base_facts
from bayes_lora.lm.model_files import default_model_here
from bayes_lora.lm.onednn_linear import OneDnnLinear, has_onednn, onednn_linear, torch_linears, use_onednn
from bayes_lora.posterior.baselines import pretrained

CPU, FLOAT, HALF = torch.device("cpu"), torch.float32, torch.bfloat16
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")


@needs_onednn
@settings(deadline=None, max_examples=60)
@given(
    batch=st.lists(st.integers(1, 5), max_size=3),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_onednn_computes_the_layer_its_gradient_and_the_gradient_of_that(batch, sizes, bias, transposed, seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    weight = drawn(*sizes).mT if transposed else drawn(*sizes)
    b = drawn(weight.shape[0]) if bias else None
    x, to_y, to_x = drawn(*batch, weight.shape[1]), drawn(*batch, weight.shape[0]), drawn(*batch, weight.shape[1])

    def values(linear):
        inputs, direction = x.clone().requires_grad_(), to_y.clone().requires_grad_()
        y = linear(inputs, weight, b)
        (gradient,) = torch.autograd.grad(y, inputs, direction, create_graph=True)
        (second,) = torch.autograd.grad(gradient, direction, to_x)
        return y, gradient, second

    for found, expected in zip(values(onednn_linear), values(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@needs_onednn
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_scores_and_gradients_of_a_model_by_onednn_are_those_by_torch(kind, tokenizer):
    tasks = make_tasks(2)
    scores, gradients = [], []
    for backend in ("torch", "onednn"):
        lm = build_lm(kind, tokenizer, dtype=FLOAT)
        if backend == "onednn":
            use_onednn(lm.model)
        assert lm.arithmetic.linear_backend == backend
        episode = collate([lm.encoder(task.examples) for task in tasks.values()])
        generator = torch.Generator().manual_seed(0)
        phi = {
            site: torch.randn(3, 2, 1, *shape, generator=generator).requires_grad_()
            for site, shape in lm.sites.shapes.items()
        }
        found = lm(phi, episode)
        scores.append(found.detach())
        gradients.append(torch.autograd.grad(found.log_softmax(-1)[..., 0].sum(), list(phi.values())))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)
    for found, expected in zip(*reversed(gradients), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


def test_an_older_torch_does_not_name_the_processor(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert arithmetic.processor_name()


@needs_onednn
def test_only_frozen_float32_layers_are_computed_by_onednn(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "bayes_lora.lm.onednn_linear.onednn_linear", lambda *args: calls.append(args) or F.linear(*args)
    )
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    use_onednn(model)
    x = torch.randn(2, 4)
    model(x)
    assert not calls  # its weight is trained
    model.requires_grad_(False)
    model(x)
    assert len(calls) == 1
    with torch_linears(model):
        model(x)
        assert type(model[0]) is torch.nn.Linear
    assert type(model[0]) is OneDnnLinear
    assert model(x[:0]).shape == (0, 3)
    with torch.autocast("cpu", HALF):
        assert model(x).dtype == HALF
    model.double()(x.double())
    assert len(calls) == 1


@needs_onednn
def test_the_self_check_compares_with_products_by_torch(tokenizer, monkeypatch):
    lm = build_lm("llama", tokenizer, dtype=FLOAT)
    use_onednn(lm.model)
    wrong = lambda x, weight, bias=None: 1.01 * F.linear(x, weight, bias)  # noqa: E731
    monkeypatch.setattr("bayes_lora.lm.onednn_linear.onednn_linear", wrong)
    with pytest.raises(bayes_lora.errors.ModelError, match="not supported"):
        _ = lm.forward


@pytest.mark.parametrize(
    ("measured", "dtype", "expected"),
    [
        ({"torch": 40.0, "onednn": 80.0, "bfloat16": 150.0}, None, (HALF, "torch")),
        ({"torch": 40.0, "onednn": 80.0, "bfloat16": 150.0}, FLOAT, (FLOAT, "onednn")),
        ({"torch": 40.0, "onednn": 80.0, "bfloat16": 150.0}, HALF, (HALF, "torch")),
        ({"torch": 40.0, "onednn": 80.0, "bfloat16": 110.0}, None, (FLOAT, "onednn")),
        ({"torch": 40.0, "onednn": 43.0, "bfloat16": 59.0}, None, (FLOAT, "torch")),
        ({"torch": 40.0, "onednn": 43.0, "bfloat16": 61.0}, None, (HALF, "torch")),
        ({"torch": 40.0, "onednn": 45.0}, None, (FLOAT, "onednn")),
        ({"torch": 40.0}, None, (FLOAT, "torch")),
        ({"torch": 40.0, "onednn": 80.0}, torch.float64, (torch.float64, "torch")),
    ],
)
def test_another_arithmetic_is_chosen_where_it_is_clearly_faster(measured, dtype, expected):
    assert fastest(measured, dtype) == expected


def test_settings_override_what_was_measured(monkeypatch):
    monkeypatch.setattr(arithmetic, "rates", lambda folder: {"torch": 1.0, "onednn": 2.0, "bfloat16": 9.0})
    assert choose_arithmetic(None, None, CPU) == (HALF, "torch")
    assert choose_arithmetic("float32", None, CPU) == (FLOAT, "onednn")
    assert choose_arithmetic(FLOAT, "torch", CPU) == (FLOAT, "torch")
    assert choose_arithmetic(None, "torch", CPU) == (HALF, "torch")
    assert choose_arithmetic(None, None, CPU, quantized=True) == (FLOAT, "torch")
    if has_onednn():
        assert choose_arithmetic(None, "onednn", CPU) == (FLOAT, "onednn")


@pytest.mark.parametrize(
    ("dtype", "backend", "device", "quantized", "message"),
    [
        ("float16x", None, "cpu", False, "dtype: expected a torch.dtype, 'float32' or 'bfloat16', got 'float16x'"),
        (None, "mkl", "cpu", False, "linear_backend: expected 'torch' or 'onednn', got 'mkl'"),
        ("bfloat16", "onednn", "cpu", False, "expected torch.float32 on 'cpu', got torch.bfloat16 on 'cpu'"),
        (None, "onednn", "cuda", False, "expected torch.float32 on 'cpu', got a model on 'cuda'"),
        (None, "onednn", "cpu", True, "expected torch.float32 on 'cpu', got quantised layers"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(monkeypatch, dtype, backend, device, quantized, message):
    monkeypatch.setattr(arithmetic, "has_onednn", lambda: True)
    with pytest.raises(ConfigError, match=message):
        choose_arithmetic(dtype, backend, torch.device(device), quantized=quantized)


def test_onednn_is_refused_where_torch_was_built_without_it(monkeypatch):
    monkeypatch.setattr(arithmetic, "has_onednn", lambda: False)
    with pytest.raises(ConfigError, match="this build of torch has no oneDNN"):
        choose_arithmetic(None, "onednn", CPU)
    assert set(arithmetic.measure()) == {"torch", "bfloat16"}


def test_rates_are_measured_once_per_machine(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(arithmetic, "measure", lambda: calls.append(1) or {"torch": 3.0, "bfloat16": 1.0})

    def in_another_process(folder=tmp_path):
        monkeypatch.setattr(arithmetic, "_known", {})
        return rates(folder)

    assert in_another_process() == rates(tmp_path) == in_another_process() == {"torch": 3.0, "bfloat16": 1.0}
    assert len(calls) == 1
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # other kernels
    in_another_process()
    assert len(calls) == 2 and len(json.loads((tmp_path / FILE).read_text())) == 2
    for damaged in ("{", "[]", '{"x": 3}', json.dumps({key: {"torch": -1.0} for key in arithmetic._known})):
        (tmp_path / FILE).write_text(damaged)
        assert in_another_process()["torch"] == 3.0
    assert len(calls) == 6
    (tmp_path / "file").write_text("")
    assert in_another_process(tmp_path / "file")["torch"] == 3.0  # a folder that cannot be made


def test_rates_are_those_of_the_products(monkeypatch):
    """By a clock that runs by the operations of each product at a given rate."""
    now, rate = [0.0], {"float32": 2e9, "bfloat16": 5e9}

    def linear(x, weight):
        now[0] += 2 * x.shape[0] * weight.numel() / rate[str(x.dtype).removeprefix("torch.")]
        return torch.zeros(x.shape[0], weight.shape[0])

    monkeypatch.setattr(arithmetic.F, "linear", linear)
    monkeypatch.setattr(arithmetic, "onednn_linear", lambda x, weight: linear(x, weight) + 1.0)  # wrong
    monkeypatch.setattr(arithmetic, "has_onednn", lambda: True)
    monkeypatch.setattr(arithmetic.time, "thread_time", lambda: now[0])
    before = torch.get_num_threads()
    assert arithmetic.measure() == pytest.approx({"torch": 2e9, "bfloat16": 5e9})
    assert torch.get_num_threads() == before


def test_a_loaded_model_says_how_it_computes(model_folder):
    lm = bayes_lora.load_language_model(model_folder)
    assert lm.arithmetic.dtype == "float32" and lm.arithmetic.linear_backend == "torch"
    assert str(lm.arithmetic).startswith("float32 on ") and "thread" in str(lm.arithmetic)
    half = bayes_lora.load_language_model(model_folder, dtype="bfloat16")
    assert half.model.dtype == HALF and half.arithmetic.to_dict()["dtype"] == "bfloat16"


@needs_onednn
def test_a_model_is_loaded_with_the_backend_that_is_faster_or_asked_for(model_folder, monkeypatch):
    monkeypatch.setattr(arithmetic, "_known", {arithmetic._machine_key(): {"torch": 1.0, "onednn": 2.0}})
    fast = bayes_lora.load_language_model(model_folder)
    plain = bayes_lora.load_language_model(model_folder, linear_backend="torch")
    assert [lm.arithmetic.linear_backend for lm in (fast, plain)] == ["onednn", "torch"]
    assert "by oneDNN" in str(fast.arithmetic)
    # Stored states are not mixed, because they are rounded differently.
    assert base_facts(fast.model, "") != base_facts(plain.model, "")
    assert fast.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.skipif(default_model_here() is None, reason="the default model is not here: run bayes-lora fetch")
def test_predictions_on_real_tasks_do_not_depend_on_the_arithmetic():
    """The mean NLL moves by less than its standard error over examples, in 16 bits too, and by oneDNN by nothing."""
    _, unseen = bayes_lora.demo_tasks()
    tasks = list(unseen.values())[:2]
    found = {}
    for name, options in {
        "torch": {"dtype": "float32", "linear_backend": "torch"},
        "onednn": {"dtype": "float32", "linear_backend": "onednn" if has_onednn() else "torch"},
        "bfloat16": {"dtype": "bfloat16"},
    }.items():
        lm = bayes_lora.load_language_model(cache_folder=None, **options)
        log_probs = pretrained(lm, tasks).predict([task.query[:8] for task in tasks], num_draws=0)
        gold = [[example.answer for example in task.query[:8]] for task in tasks]
        found[name] = -torch.cat([own[range(8), answers] for own, answers in zip(log_probs, gold, strict=True)])
    exact = found["torch"]
    error = float(exact.std()) / len(exact) ** 0.5
    assert (found["onednn"] - exact).abs().max() < 1e-3
    assert abs(float((found["bfloat16"] - exact).mean())) < 0.2 * error
    assert (found["bfloat16"] - exact).abs().max() < 0.5
    assert (found["bfloat16"] != exact).any()


def test_cudnn_does_not_compile_attention_for_every_shape(monkeypatch, tokenizer):
    chosen, asked = [], []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    avoid_recompiled_attention(torch.device("cpu"))
    assert not chosen
    avoid_recompiled_attention(torch.device("cuda", 1))
    assert chosen == [False]
    monkeypatch.setattr("bayes_lora.lm.language_model.avoid_recompiled_attention", asked.append)
    build_lm("llama", tokenizer)
    assert asked == [torch.device("cpu")]
