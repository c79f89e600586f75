"""Options and arguments that several commands of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_lora.recipes.names import GUIDE_NAMES, PRIOR_NAMES, RECIPE_NAMES
from bayes_lora.utils.tables import TableFormat

__all__ = [
    "DATA",
    "Config",
    "Draws",
    "FittedRun",
    "Format",
    "Guide",
    "Input",
    "Label",
    "MaxLength",
    "MaxOptions",
    "Model",
    "Names",
    "Overwrite",
    "Prior",
    "Recipe",
    "Resume",
    "Run",
    "Set",
    "Shots",
    "ShuffleOptions",
    "Split",
    "Steps",
    "Table",
    "Task",
    "Tasks",
]

DATA = "a table (.csv, .tsv, .parquet, .jsonl), a card (.yaml), a .jsonl file or folder in the MetaICL layout"

Tasks = Annotated[Path, typer.Option(help=f"A folder of tasks, or one task: {DATA}.")]
Task = Annotated[str | None, typer.Option(help="Name of the task, if there are several.")]
Names = Annotated[str | None, typer.Option(help="Only these tasks: comma-separated names.")]
Split = Annotated[str | None, typer.Option(help="Name of a split in the folder's splits.json.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="metaicl, crossfit, unifiedqa, legalbench, molecules, card or table; detected from the files by default."
    ),
]
Input = Annotated[
    str | None,
    typer.Option(help=r"Input column of a table, or a template such as '{subject}\n{body}'; detected by default."),
]
Label = Annotated[
    str | None, typer.Option(help="Answer column of a table; by default a column named label, output, answer, ...")
]
MaxOptions = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of different answers of a task that become options: by default 64 of a table and of "
        "CrossFit, 32 of LegalBench. More are free text.",
        min=2,
    ),
]
Shots = Annotated[int, typer.Option(help="Support examples per task.", min=1)]
ShuffleOptions = Annotated[
    bool,
    typer.Option("--shuffle-options", help="Shuffle the options of each example, to counter position bias."),
]

Table = Annotated[
    TableFormat,
    typer.Option(
        "--table",
        help="How tables are written. Other than as text, nothing else is on standard output, and json and csv have "
        "numbers in full precision.",
    ),
]
Config = Annotated[Path | None, typer.Option(help="A YAML file with settings.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting, such as objective.beta=1e-4. Repeatable.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A named prior and guide, see docs/recipes.md; by default tangent, or abmll-network with another --prior "
        "or --guide.",
        autocompletion=lambda: RECIPE_NAMES,
    ),
]
Prior = Annotated[
    str | None,
    typer.Option(
        help="Another prior: rank-ard, ...; set its settings with --set prior.KEY=VALUE. See docs/zoo.md.",
        autocompletion=lambda: PRIOR_NAMES,
    ),
]
Guide = Annotated[
    str | None,
    typer.Option(
        help="Another guide: swag, ...; set its settings with --set guide.KEY=VALUE. See docs/zoo.md.",
        autocompletion=lambda: GUIDE_NAMES,
    ),
]
Run = Annotated[Path, typer.Option(help="The run folder.")]
FittedRun = Annotated[Path | None, typer.Option(help="The folder of a fit; by default the prior of this package.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
Model = Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file of a causal LM.")]
Steps = Annotated[
    int | None,
    typer.Option(help="Gradient steps that refine the amortized posterior; by default 10, or 0 in closed form.", min=0),
]
Draws = Annotated[int, typer.Option(help="Posterior draws to average over; 0 predicts with the mean.", min=0)]
MaxLength = Annotated[
    int | None, typer.Option(help="Maximum number of tokens of a row; by default that of the run, or 128.", min=1)
]
