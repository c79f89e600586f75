"""Options and arguments that several commands of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DATA",
    "Config",
    "Draws",
    "Format",
    "Guide",
    "Input",
    "Label",
    "MaxLength",
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
    "Task",
    "Tasks",
]

DATA = "a table (.csv, .tsv, .parquet, .jsonl), a card (.yaml), a .jsonl file or folder in the MetaICL layout"

Tasks = Annotated[Path, typer.Option(help=f"A folder of tasks, or one task: {DATA}.")]
Task = Annotated[str | None, typer.Option(help="Name of the task, where there are several.")]
Names = Annotated[str | None, typer.Option(help="Only these tasks: names with commas between.")]
Split = Annotated[str | None, typer.Option(help="A split of the folder's splits.json.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="metaicl, crossfit, unifiedqa, legalbench, molecules, card or table; by default told from the files."
    ),
]
Input = Annotated[
    str | None,
    typer.Option(help=r"Of a table: the input's column, or a template as in '{subject}\n{body}'; by default guessed."),
]
Label = Annotated[str | None, typer.Option(help="Of a table: the answers' column; by default the one named label &c.")]
Shots = Annotated[int, typer.Option(help="Support examples per task.", min=1)]
ShuffleOptions = Annotated[
    bool,
    typer.Option("--shuffle-options", help="Options of each example in an order of its own, against position bias."),
]

Config = Annotated[Path | None, typer.Option(help="A YAML file with settings.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, as in objective.beta=1e-4. Repeatable.")]
Recipe = Annotated[str | None, typer.Option(help="A named prior and guide, see docs/recipes.md.")]
Prior = Annotated[
    str | None,
    typer.Option(help="Another prior: rank-ard, ...; its settings are --set prior.KEY=VALUE. See docs/zoo.md."),
]
Guide = Annotated[
    str | None, typer.Option(help="Another guide: swag, ...; its settings are --set guide.KEY=VALUE. See docs/zoo.md.")
]
Run = Annotated[Path, typer.Option(help="The run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote there.")]
Model = Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file of a causal LM.")]
Steps = Annotated[int, typer.Option(help="Gradient steps after the guide's one pass.", min=0)]
Draws = Annotated[int, typer.Option(help="Posterior draws to average over; 0 predicts with the mean.", min=0)]
MaxLength = Annotated[int | None, typer.Option(help="Longest row in tokens, instead of the run's or 128.", min=1)]
