"""Every task of the data at hand, read whole: how many load, how many do not and why, and how many examples."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest

from bayes_lora.tasks.crossfit_tsv import read_crossfit
from bayes_lora.tasks.legalbench import without_demonstrations
from bayes_lora.tasks.metaicl import load_task
from bayes_lora.tasks.sources import load_tasks
from bayes_lora.tasks.text_files import read_table, read_text

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def folder(name):
    return pytest.param(DATA / name, marks=pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"no {DATA / name}"))


def load(path, **options):
    """Return the tasks, and what the warnings say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tasks = load_tasks(path, **options)
    return tasks, [str(one.message).removeprefix(f"{path}: ") for one in caught]


def sizes(tasks, names):
    return {name: (len(tasks[name].support), len(tasks[name].query)) for name in names}


CROSSFIT = {
    "glue-mnli": (80, 80),
    "glue-rte": (80, 77),
    "ai2_arc": (79, 77),
    "commonsense_qa": (80, 80),
    "discovery": (80, 80),
    "ethos-race": (69, 60),
    "hellaswag": (80, 80),
    "trec-finegrained": (80, 80),
    "tweet_eval-emoji": (80, 80),
    "yelp_polarity": (80, 80),
    "superglue-wsc": (77, 67),
    "race-high": (79, 80),
    "quail": (79, 80),
    "wiqa": (80, 79),
}
BY_SEED = {
    "glue-mnli": (16, 1000),
    "glue-rte": (16, 277),
    "ai2_arc": (16, 299),
    "commonsense_qa": (16, 1000),
    "discovery": (16, 64),
    "ethos-race": (16, 87),
    "hellaswag": (16, 64),
    "trec-finegrained": (16, 1000),
}


@pytest.mark.parametrize("path", [folder("crossfit")])
def test_crossfit(path):
    tasks, said = load(path, merge_duplicates=True)
    assert len(tasks) == 82
    assert said == ["23 of 105 tasks are left out: 23 free-form (ade_corpus_v2-dosage, freebase_qa, hotpot_qa, ...)"]
    assert (sum(len(t.support) for t in tasks.values()), sum(len(t.query) for t in tasks.values())) == (6415, 6234)
    assert sizes(tasks, CROSSFIT) == CROSSFIT
    assert sizes(load(path, merge_duplicates=True, seed=13)[0], BY_SEED) == BY_SEED


@pytest.mark.parametrize("path", [folder("crossfit")])
@pytest.mark.parametrize("name", ["glue-mnli", "tweet_eval-emoji", "climate_fever", "trec", "numer_sense", "wiqa"])
def test_crossfit_as_its_own_files(path, name, tmp_path):
    """A classification task gives the same examples from CrossFit's own files as from those of the MetaICL layout."""
    (tmp_path / name).mkdir()
    for file in sorted((path / name).glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        text = "".join("{}\t{}\n".format(" ".join(r["input"].split()), r["output"]) for r in records)
        (tmp_path / name / f"{file.stem}.tsv").write_text(text, encoding="utf-8")
    for seed in (None, 13, 100):
        own, other = read_crossfit(tmp_path / name, seed=seed), load_task(path / name, seed=seed)
        assert own.support[0].options == tuple(sorted(other.support[0].options))
        for half in ("support", "query"):
            pairs = [(" ".join(e.input.split()), e.output) for e in getattr(other, half)]
            assert [(e.input, e.output) for e in getattr(own, half)] == list(dict(pairs).items()) or seed is not None
            assert {(e.input, e.output) for e in getattr(own, half)} == set(pairs)


LEGALBENCH = {
    "abercrombie": 5,
    "corporate_lobbying": 10,
    "consumer_contracts_qa": 4,
    "cuad_non-compete": 6,
    "hearsay": 5,
    "proa": 5,
    "maud_tail_period_length": 1,
    "unfair_tos": 9,
    "citation_prediction_classification": 2,
}


@pytest.mark.parametrize("path", [folder("legalbench")])
def test_legalbench(path):
    tasks, said = load(path)
    assert len(tasks) == 153
    assert said == [
        "9 of 162 tasks are left out: 7 free-form (citation_prediction_open, definition_extraction, sara_numeric, "
        "...); 2 without rows (rule_qa, scalr)"
    ]
    left_out = {child.name for child in path.iterdir() if child.is_dir()} - set(tasks)
    assert left_out == {
        *("citation_prediction_open", "definition_extraction", "sara_numeric", "successor_liability"),
        *("ssla_company_defendants", "ssla_individual_defendants", "ssla_plaintiff", "rule_qa", "scalr"),
    }
    assert sum(len(task) for task in tasks.values()) == 809
    # The 34 tasks on merger agreements have one example each, whose options the prompt lists.
    assert Counter(len(task) for task in tasks.values()) == {1: 34, 2: 1, 4: 8, 5: 4, 6: 64, 7: 2, 8: 38, 9: 1, 10: 1}
    assert Counter(len(task.support[0].options) for task in tasks.values()) == {
        2: 131,
        3: 5,
        4: 5,
        5: 3,
        7: 4,
        8: 1,
        9: 3,
        10: 1,
    }
    assert {name: len(tasks[name]) for name in LEGALBENCH} == LEGALBENCH


@pytest.mark.parametrize("path", [folder("legalbench")])
def test_legalbench_prompts_hold_no_solved_rows(path):
    """The instructions and the query stay; no row is in them, and no line shows a cue with an answer behind it."""
    cut = 0
    for child in sorted(one for one in path.iterdir() if (one / "train.tsv").exists()):
        prompt = read_text(child / "base_prompt.txt", "prompt")
        rows = read_table(child / "train.tsv", "\t").rows
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


CHEMISTRY = {
    "BACE/Class": (1513, 691),
    "BBBP/p_np": (2050, 1567),
    "ClinTox/FDA_APPROVED": (1484, 1390),
    "ClinTox/CT_TOX": (1484, 112),
    "HIV/HIV_active": (1400, 700),
    "Tox21/NR-AR": (7439, 310),
    "Tox21/NR-AR-LBD": (6902, 238),
    "Tox21/NR-AhR": (6691, 785),
    "Tox21/NR-Aromatase": (5940, 307),
    "Tox21/NR-ER": (6316, 798),
    "Tox21/NR-ER-LBD": (7112, 356),
    "Tox21/NR-PPAR-gamma": (6583, 189),
    "Tox21/SR-ARE": (5935, 961),
    "Tox21/SR-ATAD5": (7232, 267),
    "Tox21/SR-HSE": (6594, 379),
    "Tox21/SR-MMP": (5920, 936),
    "Tox21/SR-p53": (6909, 431),
}


@pytest.mark.parametrize("path", [folder("chemistry")])
def test_chemistry(path):
    """All labels of all molecules; blanks of Tox21 are left out, and no column is."""
    tasks, said = load(path)
    assert said == []
    assert {name: (len(task), sum(e.answer for e in task.support)) for name, task in tasks.items()} == CHEMISTRY
    assert tasks["Tox21/NR-AhR"].support[0].input == "SMILES: CCOc1ccc2nc(S(N)(=O)=O)sc2c1\nNR-AhR?"
    assert tasks["Tox21/NR-AhR"].support[0].output == "yes"
