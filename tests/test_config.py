import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_lora.episodes import TEMPLATES
from bayes_lora.errors import ConfigError
from bayes_lora.infer.training import FitConfig
from bayes_lora.recipes.config import EpisodeConfig, LanguageModelConfig, ObjectiveConfig, RunConfig

CHANGED = RunConfig(
    objective=ObjectiveConfig(beta=0.5, gamma=2.0), episodes=EpisodeConfig(held_out=3), fit=FitConfig(steps=7), seed=4
)


@pytest.mark.parametrize("config", [RunConfig(), CHANGED])
def test_round_trip(config, tmp_path):
    assert RunConfig.from_dict(config.to_dict()) == config
    as_json = json.dumps(config.to_dict())
    assert RunConfig.from_dict(json.loads(as_json)) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(as_json)))
    assert RunConfig.load(path) == config


def test_missing_sections_and_empty_files_are_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert RunConfig.load(tmp_path / "empty.yaml") == RunConfig() == RunConfig.from_dict({}) == RunConfig.load(None)


def test_file_goes_over_base_and_settings_over_file(tmp_path):
    (tmp_path / "c.yaml").write_text("fit: {steps: 9, warmup: 1}\nobjective: {beta: 1e-4}\n")
    config = RunConfig.load(tmp_path / "c.yaml", ["fit.steps=11", "fit.steps=12"], CHANGED)
    assert config.fit == FitConfig(steps=12, warmup=1)
    assert config.objective == ObjectiveConfig(beta=1e-4, gamma=2.0)
    assert config.episodes == CHANGED.episodes
    assert CHANGED.fit.steps == 7


@pytest.mark.parametrize(
    "setting, section, key, value",
    [
        ("objective.beta=1e-4", "objective", "beta", 1e-4),
        ("objective.gamma=2", "objective", "gamma", 2.0),
        ("objective.gamma=null", "objective", "gamma", None),
        ("language_model.target_modules=[q_proj, v_proj]", "language_model", "target_modules", ["q_proj", "v_proj"]),
        ("language_model.name=1e5", "language_model", "name", "1e5"),
        ("language_model.name=a=b", "language_model", "name", "a=b"),
        ("episodes.score_support=false", "episodes", "score_support", False),
        ("episodes.held_out=3", "episodes", "held_out", 3.0),
        ("fit.steps=3", "fit", "steps", 3),
    ],
)
def test_setting(setting, section, key, value):
    found = getattr(getattr(RunConfig.load(None, [setting]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_settings_of_two_and_three_levels():
    config = RunConfig.load(None, ["seed=3", "language_model.template.separator=/", "fit={steps: 4}"])
    assert (config.seed, config.language_model.template.separator, config.fit) == (3, "/", FitConfig(steps=4))


BAD = {
    "sede=3": ["--set: unknown key 'sede'", "seed"],
    "objektive.beta=1": ["unknown key 'objektive'", "objective"],
    "objective.betta=1": ["unknown key 'objective.betta'", "beta"],
    "fit.fit=1": ["unknown key 'fit.fit'"],
    "objective=3": ["objective: expected a section with ['beta', 'gamma', 'num_particles', 'predictive'], got 3"],
    "objective=": ["objective: expected a section"],
    "language_model.template=x": ["language_model.template 'x' is not the name of a template", "chat-letters"],
    "objective.beta=much": ["objective.beta: ", "valid number", "got 'much'"],
    "objective.beta=[1]": ["objective.beta: ", "[1]"],
    "objective.beta=0": ["objective.beta: ", "greater than 0", "got 0"],
    "objective.beta=.nan": ["objective.beta: ", "finite"],
    "objective.gamma=-1": ["objective.gamma: ", "greater than 0"],
    "fit.steps=2.5": ["fit.steps: ", "integer", "got 2.5"],
    "fit.steps=0": ["fit.steps: expected a positive number, got 0."],
    "prior.random=C": ["prior.random: ", "'A', 'B' or 'AB'", "got 'C'"],
    "prior.initial_scale=[0.1]": ["prior.initial_scale"],
    "prior.initial_scale=[0.1, 0]": ["prior.initial_scale.1: "],
    "guide.theta_guide=pointy": ["guide.theta_guide.name: unknown theta_guide 'pointy'", "'point'"],
    "guide={name: guide-network, hiden: 6}": ["unknown key 'guide.hiden'", "guide-network", "'hidden'"],
    "guide.hidden=6": [
        "not a setting of tangent-guide",
        "is one of flow-network, guide-network, tangent-network: set guide.name.",
    ],
    "guide=6": ["guide: expected a section", "got 6"],
    "guide.name=[swag]": ["guide.name: unknown guide"],
    "prior.name=rank_ard": ["prior.name: unknown prior 'rank_ard'", "'rank-ard'"],
    "guide={name: gradient-guide, steps: 2.5}": ["guide.steps: ", "integer", "got 2.5"],
    "guide={name: gradient-guide, family: {name: low-rnk}}": [
        "guide.family.name: unknown family 'low-rnk'",
        "'low-rank'",
    ],
    "guide={name: gradient-guide, family: {name: low-rank, rnk: 3}}": ["unknown key 'guide.family.rnk'"],
    "guide={name: gradient-guide, start: {name: guide-network, hiden: 6}}": ["unknown key 'guide.start.hiden'"],
    "guide={name: gradient-guide, start: 3}": ["guide.start: expected a name, or a mapping"],
    "recipe=abml": ["recipe 'abml' is unknown", "'abmll'"],
    "guide={name: guide-network, dropout: 1}": ["guide.dropout: ", "less than 1"],
    "language_model.r=0": ["language_model.r: "],
    "language_model.top_layers=0": ["language_model.top_layers: "],
    "language_model.target_modules=q_proj": ["language_model.target_modules: "],
    "language_model.template.prompt=hello": ["language_model.template.", "{input}"],
    "episodes.num_support=0": ["episodes.num_support: "],
    "episodes.held_out=-1": ["episodes.held_out: "],
    "seed=-1": ["seed: "],
    "objective.beta": ["--set 'objective.beta': expected section.key=value"],
    "=3": ["--set '=3': expected section.key=value"],
    "objective.=3": ["expected section.key=value"],
    ".beta=3": ["expected section.key=value"],
    "fit.steps=[1": ["--set 'fit.steps=[1'", "not a YAML value"],
    "fit.steps=2001-13-45": ["--set 'fit.steps=2001-13-45'", "not a YAML value"],
}


@pytest.mark.parametrize("setting", BAD)
def test_bad_setting(setting):
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(None, [setting])
    for part in BAD[setting]:
        assert part in str(caught.value)
    assert "Value error" not in str(caught.value) and "ArgsKwargs" not in str(caught.value)


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"- 1\n", ["expected a mapping", "[1]"]),
        (b"0\n", ["expected a mapping"]),
        (b"''\n", ["expected a mapping"]),
        (b"objective\n", ["expected a mapping", "'objective'"]),
        (b"fit: [\n", ["cannot be read as YAML"]),
        (b"seed: 2001-13-45\n", ["cannot be read as YAML"]),
        (b"\xff\xfe\n", ["cannot be read as YAML"]),
        (b"recipe: !!python/name:os.system\n", ["cannot be read as YAML"]),
        (b"fit: {stepps: 3}\n", ["unknown key 'fit.stepps'", "steps"]),
        (b"3: 4\n", ["unknown key '3'"]),
        (b"fit: 3\n", ["fit: expected a section", "got 3"]),
        (b"fit:\n", ["fit: expected a section", "got None"]),
    ],
)
def test_bad_file(content, parts, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read as YAML") as caught:
            RunConfig.load(path)
        assert str(path) in str(caught.value)


def test_from_dict_names_its_source():
    with pytest.raises(ConfigError, match=r"^run/config.json: expected a mapping"):
        RunConfig.from_dict(["fit"], "run/config.json")
    with pytest.raises(ConfigError, match=r"^run/config.json: fit.steps: "):
        RunConfig.from_dict({"fit": {"steps": "many"}}, "run/config.json")


DEFAULTS = RunConfig().to_dict()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("{input}") | st.just(10**400)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        key: JSON | st.fixed_dictionaries({}, optional={name: JSON for name in value})
        if isinstance(value, dict)
        else JSON
        for key, value in DEFAULTS.items()
    },
)


@settings(deadline=None, max_examples=200)
@given(SECTIONS | st.dictionaries(st.text() | st.sampled_from(list(DEFAULTS)), JSON))
def test_any_mapping_is_a_config_or_a_config_error(values):
    try:
        assert isinstance(RunConfig.from_dict(values), RunConfig)
    except ConfigError:
        pass


@settings(deadline=None, max_examples=200)
@given(st.text() | st.tuples(st.sampled_from(["fit.steps", "recipe", "prior", "seed"]), st.text()).map("=".join))
def test_any_setting_is_a_config_or_a_config_error(setting):
    try:
        assert isinstance(RunConfig.load(None, [setting]), RunConfig)
    except ConfigError:
        pass


def test_a_template_by_its_name(tmp_path):
    """Wherever a section may stand; a field of it may then be changed."""
    (tmp_path / "c.yaml").write_text("language_model: {template: chat, max_length: 64}\n")
    config = RunConfig.load(tmp_path / "c.yaml", ["language_model.template.end=END"])
    assert config.language_model.template == replace(TEMPLATES["chat"], end="END")
    assert config.language_model.max_length == 64
    assert RunConfig.load(None, ["language_model.template=letters"]).language_model.template == TEMPLATES["letters"]
    assert RunConfig.from_dict({"language_model": {"template": "plain"}}) == RunConfig()
    with pytest.raises(
        ConfigError, match="--set: language_model.template 'chatt' is not the name of a template.*'chat'"
    ):
        RunConfig.load(None, ["language_model.template=chatt"])


def test_rank_in_files_of_before_is_r(tmp_path):
    values = RunConfig().to_dict()
    del values["language_model"]["r"]
    values["language_model"]["rank"] = 5
    assert RunConfig.from_dict(values).language_model == LanguageModelConfig(r=5)
    assert values["language_model"]["rank"] == 5  # what was given is left as it was
    (tmp_path / "c.yaml").write_text("language_model: {rank: 3, top_layers: 2, template: letters}\n")
    found = RunConfig.load(tmp_path / "c.yaml", base=RunConfig(language_model=LanguageModelConfig(r=9)))
    assert found.language_model == LanguageModelConfig(r=3, top_layers=2, template=TEMPLATES["letters"])
    assert RunConfig.load(tmp_path / "c.yaml", ["language_model.rank=4"]).language_model.r == 4
    with pytest.raises(ConfigError, match=r"run.json: language_model.rank and language_model.r are the same"):
        RunConfig.from_dict({"language_model": {"rank": 3, "r": 4}}, "run.json")
