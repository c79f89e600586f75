"""Every task of the data at hand, read whole: how many load, how many do not and why, and how many examples."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
from real_data import data_folder, needs_data

from bayes_lora.tasks import Example
from bayes_lora.tasks.readers.crossfit import read_crossfit
from bayes_lora.tasks.readers.legalbench import without_demonstrations
from bayes_lora.tasks.readers.load import load_tasks
from bayes_lora.tasks.readers.metaicl import read_metaicl
from bayes_lora.tasks.readers.table_rows import read_table
from bayes_lora.tasks.readers.text_files import read_text


def folder(name):
    return pytest.param(data_folder(name), marks=needs_data(name))


def load(path, **options):
    """Return the tasks, and what the warnings say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tasks = load_tasks(path, **options)
    return tasks, [str(one.message).removeprefix(f"{path}: ") for one in caught]


COUNTS = json.loads(Path(__file__).with_name("shared_data.json").read_text(encoding="utf-8"))
"""Of each task of crossfit: support, query, both again of seed 13, and the number of options, or "free"; of legalbench
without those of the seed; of chemistry molecules, those whose label is 1, and the number of options."""


def halves(task):
    return len(task.support), len(task.query)


def kind(task):
    sizes = {len(example.options) for example in task.examples}
    return "free" if task.free_form else "-".join(str(size) for size in sorted({min(sizes), max(sizes)}))


@pytest.mark.parametrize("path", [folder("crossfit")])
def test_crossfit(path):
    """All of them load, pooled and by seed; the free-form ones can be left out."""
    tasks, said = load(path, merge_duplicates=True)
    seeded, said_by_seed = load(path, merge_duplicates=True, seed=13)
    assert said == said_by_seed == []
    assert set(tasks) == {child.name for child in path.iterdir() if child.is_dir()}
    counts = {name: [*halves(task), *halves(seeded[name]), kind(task)] for name, task in tasks.items()}
    assert counts == COUNTS["crossfit"]
    assert len(tasks) == 105 and sum(task.free_form for task in tasks.values()) == 23
    assert all(len(e.references) == 1 for task in tasks.values() if task.free_form for e in task.examples)
    kept, said = load(path, merge_duplicates=True, free_form=False)
    assert list(kept) == [name for name, task in tasks.items() if not task.free_form]
    assert said == ["23 of 105 tasks are left out: 23 free-form (ade_corpus_v2-dosage, freebase_qa, hotpot_qa, ...)"]


FREE_FORM = {
    "freebase_qa": ("Who was the main singing star in the musical Half a Sixpence?", "tommy steele"),
    "kilt_trex": ("Time Bandits [SEP] screenwriter", "Terry Gilliam"),
    "wikisql": ("What is Country, when Score is 70-73=143?", "SELECT Country FROM table WHERE Score = 70-73=143"),
}


@pytest.mark.parametrize("path", [folder("crossfit")])
@pytest.mark.parametrize("name", FREE_FORM)
def test_crossfit_free_form(path, name):
    text, answer = FREE_FORM[name]
    assert Example(text, references=(answer,)) in read_metaicl(path / name).query


@pytest.mark.filterwarnings("ignore:.*answers are free text, because:UserWarning")
@pytest.mark.parametrize("path", [folder("crossfit")])
@pytest.mark.parametrize(
    "name",
    [
        *("glue-mnli", "tweet_eval-emoji", "climate_fever", "trec", "numer_sense", "wiqa"),
        *("web_questions", "lama-trex", "superglue-record", "xsum"),
    ],
)
def test_crossfit_as_its_own_files(path, name, tmp_path):
    """Classification and free-form tasks give the same examples from CrossFit's own files as in the MetaICL layout."""
    (tmp_path / name).mkdir()
    for file in sorted((path / name).glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        text = "".join("{}\t{}\n".format(" ".join(r["input"].split()), r["output"]) for r in records)
        (tmp_path / name / f"{file.stem}.tsv").write_text(text, encoding="utf-8")
    for seed in (None, 13, 100):
        own, other = read_crossfit(tmp_path / name, seed=seed), read_metaicl(path / name, seed=seed)
        assert own.support[0].options == tuple(sorted(other.support[0].options))
        for half in ("support", "query"):
            pairs = [(" ".join(e.input.split()), e.output) for e in getattr(other, half)]
            assert [(e.input, e.output) for e in getattr(own, half)] == list(dict(pairs).items()) or seed is not None
            assert {(e.input, e.output) for e in getattr(own, half)} == set(pairs)


LEGALBENCH_FREE_FORM = {
    "citation_prediction_open": ["Phillips v. AWH Corp.", "Jones v. Robinson Prop. Grp., L.P."],
    "definition_extraction": [
        *("land", "traffic", "decision", "banking", "statute", "assessment", "hawkers and peddlers", "information"),
    ],
    "sara_numeric": ["$27181", "$62000", "$19039", "$0"],
    "ssla_company_defendants": [
        *("Juniper Networks, Inc.", "Electronic Arts Inc.", "Catalyst Pharmaceutical Partners, Inc."),
    ],
    "ssla_individual_defendants": [
        "Kevin R. Johnson,Pradeep Sindhu,Robyn M. Denholm,Gene Zamiska",
        "Andrew Wilson,Blake J. Jorgensen,Peter Robert Moore,Frank D. Gibeau,Patrick Soderlund",
        "Patrick J McEnany,Hubert E Huckel,Steven R Miller",
    ],
    "ssla_plaintiff": ["Not named", "Ryan Kelly", "Ruth C May, Donna E Ledgerwood"],
    "successor_liability": [
        *("de facto merger,mere continuation", "mere continuation,fraudulent conveyance", "express agreement"),
    ],
}


@pytest.mark.parametrize("path", [folder("legalbench")])
def test_legalbench(path):
    tasks, said = load(path)
    assert said == ["2 of 162 tasks are left out: 2 without rows (rule_qa, scalr)"]
    assert {child.name for child in path.iterdir() if child.is_dir()} - set(tasks) == {"rule_qa", "scalr"}
    assert {name: [*halves(task), kind(task)] for name, task in tasks.items()} == COUNTS["legalbench"]
    free = {name: task for name, task in tasks.items() if task.free_form}
    assert {name: [e.references for e in task.support] for name, task in free.items()} == {
        name: [(answer,) for answer in answers] for name, answers in LEGALBENCH_FREE_FORM.items()
    }
    choice = [task for task in tasks.values() if not task.free_form]
    # The 34 tasks on merger agreements have one example each, whose options the prompt lists.
    assert Counter(len(task) for task in choice) == {1: 34, 2: 1, 4: 8, 5: 4, 6: 64, 7: 2, 8: 38, 9: 1, 10: 1}
    kept, said = load(path, free_form=False)
    assert (len(kept), said[0].partition(": ")[2]) == (
        153,
        "7 free-form (citation_prediction_open, definition_extraction, sara_numeric, ...); "
        "2 without rows (rule_qa, scalr)",
    )


@pytest.mark.parametrize("path", [folder("legalbench")])
def test_legalbench_prompts_hold_no_solved_rows(path):
    """The instructions and the query stay; no row is in them, and no line shows a cue with an answer behind it."""
    cut = 0
    for child in sorted(one for one in path.iterdir() if (one / "train.tsv").exists()):
        prompt = read_text(child / "base_prompt.txt", "prompt")
        rows = read_table(child / "train.tsv").rows
        left = without_demonstrations(prompt)  # by labels alone; the rows tell whether that was right
        assert without_demonstrations(prompt, rows) == left
        query = left[left.rfind("\n", 0, left.index("{{")) + 1 :]
        assert prompt.endswith(query) and prompt.startswith(left[: -len(query)])
        words = " ".join(left.split())
        for cells in (row for _, row in rows):
            texts = [" ".join(cell.split()) for column, cell in cells.items() if column != "answer"]
            assert not any(text in words for text in texts if len(text) > 25), child.name
        assert not re.search(r"(?m)^(A|Label|Answer|Governed by|OUTCOME):[ \t]*\S", left), child.name
        cut += left != prompt
    assert cut == 145


@pytest.mark.parametrize("path", [folder("chemistry")])
def test_chemistry(path):
    """All labels of all molecules; blanks of Tox21 are left out, and no column is."""
    tasks, said = load(path)
    assert said == []
    counts = {name: [len(task), sum(e.answer for e in task.support), kind(task)] for name, task in tasks.items()}
    assert counts == COUNTS["chemistry"]
    assert tasks["Tox21/NR-AhR"].support[0].input == "SMILES: CCOc1ccc2nc(S(N)(=O)=O)sc2c1\nNR-AhR?"
    assert tasks["Tox21/NR-AhR"].support[0].output == "yes"
