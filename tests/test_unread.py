"""No recipe drops a setting: it is used, or the user is told."""

import re
import types
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from bayes_lora.errors import ConfigError
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import GradientConfig, GuideConfig, ObjectiveConfig, PriorConfig, RunConfig
from bayes_lora.recipes.recipes import RECIPES, build_objective
from bayes_lora.recipes.settings_read import NOT_OF_RECIPES, changed_settings, describe, settings_of, watched

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"
SETTINGS = [name for name, _ in settings_of(RunConfig()) if name.partition(".")[0] not in NOT_OF_RECIPES]
# Those that are None by default; and an ensemble has a particle for each of its 4 members, or more.
OTHERS = {"gradient.beta": 0.3, "gradient.batch_size": 3, "objective.gamma": 0.3, "objective.num_particles": 6}


def changed(config, name):
    """The settings with another value of one of them."""
    section, key = name.split(".")
    part = getattr(config, section)
    value = getattr(part, key)
    if name in OTHERS:
        other = OTHERS[name]
    elif isinstance(value, str):
        other = next(one for one in get_args(get_type_hints(type(part))[key]) if one != value)
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, tuple):
        other = tuple(0.5 * one for one in value)
    else:
        other = value + 1 if isinstance(value, int) else 0.5 * value
    return replace(config, **{section: replace(part, **{key: other})})


def facts(thing, lm, seen):
    """All values inside a thing, tensors included; those of the language model aside."""
    if isinstance(thing, torch.Tensor):
        return tuple(thing.shape), thing.detach().numpy().tobytes()
    if isinstance(thing, str | int | float | None):
        return thing
    if thing is lm or id(thing) in seen:
        return None
    seen[id(thing)] = thing  # kept, or another thing could come to stand at its place
    if isinstance(thing, dict):
        return tuple((str(key), facts(value, lm, seen)) for key, value in thing.items())
    if isinstance(thing, list | tuple | set):
        return tuple(facts(value, lm, seen) for value in thing)
    if isinstance(thing, type | types.ModuleType):
        return thing.__name__
    inside = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    return (type(thing).__name__, facts(inside, lm, seen), facts(getattr(thing, "__dict__", None), lm, seen))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_changes_what_is_built_or_is_refused(lm, recipe):
    """What is read and then dropped would be neither."""
    config, read = RunConfig(recipe=recipe), set()
    RECIPES[recipe](lm, watched(config, read))
    before = facts(build_objective(lm, config), lm, {})
    assert before == facts(build_objective(lm, config), lm, {})
    for name in SETTINGS:
        try:
            after = facts(build_objective(lm, changed(config, name)), lm, {})
        except ConfigError as error:
            assert name.split(".")[1] in str(error)
            assert name in read or f"recipe {recipe!r} does not read {name} (default " in str(error)
        else:
            assert name in read and after != before, name


def test_the_table_in_the_docs_is_what_the_recipes_read(lm):
    found = dict(re.findall(r"^\| `(.*?)` \| (.*?) \|$", DOCS.read_text(), re.MULTILINE))
    expected = {}
    for recipe, make in RECIPES.items():
        read = set()
        make(lm, watched(RunConfig(recipe=recipe), read))
        expected[recipe] = describe(read)
    assert found == expected


def test_the_error_names_all_that_is_not_read_and_what_is(lm):
    config = RunConfig(
        recipe="laplace-lora",
        guide=GuideConfig(theta="normal"),
        gradient=GradientConfig(steps=3, learn_rates=True),
        seed=3,
    )
    with pytest.raises(ConfigError) as caught:
        build_objective(lm, config)
    assert str(caught.value) == (
        "recipe 'laplace-lora' does not read guide.theta (default 'point', got 'normal'), gradient.learn_rates "
        "(default False, got True). Leave out what it does not read, or take a recipe that reads it (docs/recipes.md). "
        "'laplace-lora' reads prior (initial_scale, loc_scale), gradient (steps, learning_rate, optimizer, beta), "
        "laplace, objective."
    )
    with pytest.warns(UserWarning, match="recipe 'laplace-lora' does not read guide.theta"):
        build_objective(lm, config, strict=False)


def test_a_saved_posterior_with_a_setting_that_was_dropped_still_loads(lm, tmp_path):
    """As folders of version 0.1.0 may hold."""
    config = RunConfig(recipe="blob", objective=ObjectiveConfig(beta=0.1))
    objective = build_objective(lm, config)
    Posterior(lm, objective, replace(config, prior=PriorConfig(rate=0.5))).save(tmp_path / "posterior")
    with pytest.warns(UserWarning, match=r"does not read prior.rate \(default 0.01, got 0.5\)"):
        loaded = Posterior.load(tmp_path / "posterior", lm)
    for name, value in objective.state_dict().items():
        assert torch.equal(loaded.objective.state_dict()[name], value)


def test_settings_that_are_set_to_their_defaults_are_not_changed():
    config = RunConfig(gradient=GradientConfig(steps=5, beta=None), prior=PriorConfig(rate=0.5))
    assert changed_settings(config) == {"prior.rate": (0.01, 0.5)}
    again = RunConfig.from_dict(RunConfig().to_dict())
    assert changed_settings(again) == {}


@dataclass(frozen=True)
class Inner:
    a: int = 1
    b: int = 2

    @property
    def doubled(self):
        return 2 * self.b


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    c: int = 3


@pytest.mark.parametrize(
    "use, expected",
    [
        (lambda outer: outer.inner, {"inner"}),
        (lambda outer: outer.inner.a, {"inner", "inner.a"}),
        (lambda outer: outer.inner.doubled, {"inner", "inner.b"}),
        (lambda outer: replace(outer, inner=replace(outer.inner, a=5)).c, {"inner", "inner.b", "c"}),
        (lambda outer: asdict(outer.inner), {"inner", "inner.a", "inner.b"}),
        (lambda outer: vars(outer.inner), {"inner", "inner.a", "inner.b"}),
    ],
)
def test_what_is_read_is_seen_however_it_is_read(use, expected):
    read = set()
    outer = watched(Outer(Inner(b=7)), read)
    assert not read and isinstance(outer, Outer)
    use(outer)
    assert read == expected
    assert asdict(outer) == {"inner": {"a": 1, "b": 7}, "c": 3}
