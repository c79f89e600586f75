"""The pages of the API reference: one per public package, a section per module, from the names in ``__all__``."""

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from docstrings import to_markdown

ROOT = Path(__file__).parents[2]
PACKAGE = "bayes_lora"


@dataclass(frozen=True)
class Page:
    """A page of the reference.

    Attributes:
        package: its name, ``bayes_lora.guides``.
        title: of the page.
        modules: names by module, relative to the package, for packages that list no names of their own.
    """

    package: str
    title: str
    modules: dict[str, list[str]] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """Path of the page in the site's sources."""
        return f"reference/{self.package.rsplit('.', 1)[-1]}.md"


PAGES = [
    Page("bayes_lora", "bayes_lora"),
    Page("bayes_lora.models", "models: priors"),
    Page("bayes_lora.guides", "guides: posteriors given a support set"),
    Page(
        "bayes_lora.posterior",
        "posterior: adapt, predict, save",
        {
            "posterior": ["Posterior"],
            "task_posterior": ["TaskPosterior"],
            "prediction_draws": ["PredictionDraws", "uncertainty"],
            "metric_table": ["metric_table"],
            "diagnose": ["Diagnosis", "SiteWidth"],
            "calibrate": ["choose_width", "choose_temperature"],
            "baselines": ["pretrained", "label_counts", "finetune_lora"],
        },
    ),
    Page(
        "bayes_lora.runs",
        "runs: fit, load, compare",
        {
            "fit": ["fit_posterior", "split_tasks"],
            "loading": ["load_prior", "load_posterior", "load_language_model_of"],
            "compare": ["compare"],
            "report": ["Comparison", "MethodResult", "metrics_table"],
            "sweep": ["sweep", "sweep_beta", "sweep_table", "BetaPoint", "Executor"],
            "support_curve": ["support_curve"],
            "predictions": ["Predictions", "Question", "read_predictions", "write_predictions"],
            "dry_run": ["dry_run", "DryRun", "read_architecture"],
        },
    ),
    Page("bayes_lora.report", "report: runs as one HTML file", {"page": ["write_report", "render_report"]}),
    Page(
        "bayes_lora.recipes",
        "recipes: settings of a run",
        {
            "config": ["RunConfig", "EpisodeConfig", "LanguageModelConfig", "ObjectiveConfig"],
            "recipes": ["Recipe"],
            "tracking": ["TrackingConfig"],
        },
    ),
    Page("bayes_lora.tasks", "tasks: examples, files, splits"),
    Page("bayes_lora.episodes", "episodes: prompts and tensors"),
    Page(
        "bayes_lora.lm",
        "lm: the language model with LoRA sites",
        {
            "loading": ["load_language_model", "from_peft"],
            "language_model": ["LanguageModel"],
            "sites": ["LoraSites"],
            "features": ["FeatureReader"],
            "generation": ["Generated"],
        },
    ),
    Page("bayes_lora.infer", "infer: objective, handlers, plates"),
    Page("bayes_lora.metrics", "metrics: scores, uncertainty, plots"),
    Page("bayes_lora.distributions", "distributions", {"weight_distribution": ["WeightDistribution"]}),
    Page("bayes_lora.types", "types: what models and guides must offer"),
    Page("bayes_lora.errors", "errors"),
]
# Modules that a page shows in addition to those of the package's names.
MORE = {
    "bayes_lora.infer": {
        "fit_config": ["FitConfig"],
        "training": ["FitState", "fit"],
        "schedules": ["beta_fraction", "linear_warmup", "cyclical"],
        "predictive": ["predictive", "held_out_nll"],
        "empirical_bayes": ["EmpiricalBayes", "TaskGrams", "fit_theta"],
        "score_posterior": ["ScorePosterior", "score_posterior"],
    },
    "bayes_lora.tasks": {"shipped": ["demo_tasks", "demo_spreadsheet"]},
    "bayes_lora.metrics": {"uncertainty": ["uncertainty"]},
}
# Other pages come first in search.
FRONT_MATTER = "---\nsearch:\n  boost: 0.5\n---\n\n"
# Base classes come first.
BASES = ("factor_model", "hierarchical_model", "objective", "task", "task_guide")


def source_of(module: str) -> Path:
    """Return the file of a module or package."""
    parts = module.split(".")
    # models/ and guides/ stand at the root of the repository.
    base = ROOT.joinpath(*parts[1:]) if parts[1:2] in (["models"], ["guides"]) else ROOT.joinpath(*parts)
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def public_names(package: str) -> dict[str, str]:
    """Return the module of each name of a package's ``__all__``, without importing it."""
    tree = ast.parse(source_of(package).read_text(encoding="utf-8"))
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    if "_MODULES" in assigned:  # imported on first use
        modules = ast.literal_eval(assigned["_MODULES"])
        return {name: f"{package}.{module}" for name, module in modules.items()}
    imported = {
        alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    names = ast.literal_eval(assigned["__all__"]) if "__all__" in assigned else []
    return {name: imported.get(name, package) for name in names}


def home(module: str, name: str) -> str:
    """Return the module that defines a name, for a name that its package imports."""
    return public_names(module)[name] if source_of(module).name == "__init__.py" else module


def sections(page: Page) -> dict[str, list[str]]:
    """Return the names that a page shows, by module."""
    shown: dict[str, list[str]] = {f"{page.package}.{module}": names for module, names in page.modules.items()}
    for name, module in public_names(page.package).items() if not shown else ():
        shown.setdefault(module, []).append(name)
    for module, names in MORE.get(page.package, {}).items():
        known = shown.setdefault(f"{page.package}.{module}", [])
        known += [name for name in names if name not in known]
    if page.modules:
        return shown
    return dict(sorted(shown.items(), key=lambda item: (item[0].rsplit(".", 1)[-1] not in BASES, item[0])))


def summary(module: str, name: str) -> str:
    """Return the first paragraph of a docstring, in Markdown."""
    tree = ast.parse(source_of(home(module, name)).read_text(encoding="utf-8"))
    node = next(node for node in tree.body if getattr(node, "name", None) == name)
    return " ".join(to_markdown((ast.get_docstring(node) or "").split("\n\n")[0]).split())


def render(page: Page) -> str:
    """Return the page's Markdown: directives of mkdocstrings."""
    if page.package == PACKAGE:
        return _front(page)
    module = ast.parse(source_of(page.package).read_text(encoding="utf-8"))
    names = public_names(page.package)
    shown = sections(page)
    lines = [FRONT_MATTER + f"# {page.title}", ""]
    if page.package not in shown:  # otherwise its docstring is part of the section
        text = ast.get_docstring(module) or ""
        lines += [to_markdown(text, lambda name: f"{names[name]}.{name}" if name in names else None), ""]
    for module_name, members in shown.items():
        heading = str(module_name != page.package).lower()
        lines += [
            f"::: {module_name}",
            "    options:",
            f"      show_root_heading: {heading}",
            f"      show_root_toc_entry: {heading}",
            "      heading_level: 2",
            f"      members: [{', '.join(members)}]",
            "",
        ]
    return "\n".join(lines)


def _front(page: Page) -> str:
    """Return the page of the names that ``import bayes_lora`` offers, each with a link to where it is documented."""
    lines = [
        f"# {page.title}",
        "",
        "The names that `import bayes_lora` offers:",
        "",
        "| name | what it is |",
        "| --- | --- |",
    ]
    for name, module in public_names(PACKAGE).items():
        first = summary(module, name).replace("|", "\\|")
        lines.append(f"| [`{name}`][{page.package}.{name}] | {first} |")
    lines += ["", "The packages, a page each:", ""]
    lines += [f"- [`{other.package}`]({other.uri.rsplit('/', 1)[-1]})" for other in PAGES if other is not page]
    return "\n".join(lines) + "\n"
