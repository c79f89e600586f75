"""The command that writes a task's posterior for inference servers: bayes-lora export."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayes_lora.cli.console import print_line, status
from bayes_lora.cli.options import Overwrite

if TYPE_CHECKING:
    from bayes_lora.posterior.export import Exported

# Imports are inside the command, so that --help is fast: those of torch after the checks, so that errors are too.

__all__ = ["export"]

DTYPES = ("float32", "bfloat16", "float16")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's option --max-lora-rank."""


def export(
    adapted: Annotated[Path, typer.Option(help="A folder written by `adapt`.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    draws: Annotated[int, typer.Option(help="Posterior draws to write beside the mean.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the draws; that of `predict` is 0.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; by default float32, and of a merged model the base model's.",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write the base model with the mean merged into its weights.")
    ] = False,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Write zeros for layers that are not adapted: for TGI and LoRAX.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a task's posterior for an inference server such as vLLM: its mean and draws as plain PEFT adapters.

    `scores.json` beside them says how log-probabilities under the adapters become those of the posterior. Draws are for
    posteriors that predict with draws; see docs/serving.md.

    Example: `bayes-lora export --adapted runs/tickets --output served`, of a fit by SVI with `--draws 10`
    """
    from bayes_lora.runs.folder import language_model_of, read_home, read_question_card
    from bayes_lora.utils.progress import hide_loading_bar
    from bayes_lora.utils.storage import check_new_folder

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    run = read_home(adapted)
    language_model_of(run)
    options = read_question_card(adapted).options
    check_new_folder(output, overwrite=overwrite, marker="scores.json")
    hide_loading_bar()
    from bayes_lora.lm.model_files import model_line, packaged_copy
    from bayes_lora.posterior.task_posterior import TaskPosterior
    from bayes_lora.runs.loading import load_language_model_of

    lm = load_language_model_of(run)
    status(model_line(lm.name, lm.arithmetic))
    posterior = TaskPosterior.load(adapted / "posterior", lm)
    found = posterior.export(
        output,
        num_draws=draws,
        seed=seed,
        dtype=dtype,
        merge=merge,
        options=options if isinstance(options, tuple) else None,
        all_layers=all_layers,
        overwrite=overwrite,
    )
    _tell(found, str(packaged_copy(lm.name) or lm.name))


def _tell(found: Exported, name: str) -> None:
    """Say what was written and how large it is, and how vLLM serves it."""
    draws = len(found.adapters) - 1
    what = "mean" + (f" and {draws} draw{'s' * (draws > 1)}" if draws else "")
    print_line(
        f"{what} in {found.path}: plain PEFT adapters of rank {found.rank}, {_megabytes(found.adapter_bytes)} each, "
        "and scores.json"
    )
    if found.merged_bytes is not None:
        print_line(f"merged model in {found.path / 'merged'}: {_megabytes(found.merged_bytes)}")
    rank = next((limit for limit in RANKS if limit >= found.rank), None)
    if rank is None:
        print_line(f"vLLM accepts ranks up to {RANKS[-1]}, and these adapters have {found.rank}")
        return
    modules = [f"{each}={found.path / each}" for each in found.adapters]
    words = ["vllm", "serve", name, "--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(draws + 1)]
    print_line(shlex.join([*words, "--lora-modules", *modules]))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"
