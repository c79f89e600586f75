"""Plate diagrams, as graphviz source."""

import pytest
from lm_helpers import make_episode
from zoo import PRIORS

from bayes_lora.errors import ConfigError

ALL = [name for name in PRIORS if name != "ActivationSpace"]


@pytest.mark.parametrize("prior", ALL)
def test_the_diagram_has_the_sites_their_plates_and_what_they_depend_on(lm, prior):
    pytest.importorskip("graphviz")
    model, episode = PRIORS[prior](lm), make_episode(lm)
    likelihood = model.likelihood
    source = model.render(episode).source
    assert model.likelihood is likelihood
    for site in model.random_sites:
        assert f'"phi.{site}" -> answer' in source
    for name in model.initial_theta():
        assert f'"{name}"' in source
    assert "label=task" in source and "label=example" in source


def test_noise_at_activations_cannot_be_drawn(lm):
    with pytest.raises(ConfigError, match="noise enters at every token"):
        PRIORS["ActivationSpace"](lm).render(make_episode(lm))


def test_without_graphviz_the_cure_is_named(lm, monkeypatch):
    monkeypatch.setattr("bayes_lora.models.hierarchical_model.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bayes-lora\[render\]'"):
        PRIORS["HierarchicalNormal"](lm).render(make_episode(lm))
