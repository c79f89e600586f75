"""Is the uncertainty of the shipped prior true? Its predictions on unseen tasks of CrossFit, next to those of a LoRA.

    python benchmarks/uncertainty.py --tasks data/crossfit --molecules data/chemistry/BBBP.csv --cache cache/crossfit
    python benchmarks/uncertainty.py               # print the results that are there

Four questions, by the protocol of benchmarks/unseen.py (test tasks, three support sets of 16 examples, 95 % intervals
of a paired bootstrap over tasks and, within tasks, over support sets):

- errors: is a wrong answer more uncertain than a right one of the same task?
- inputs: is an input from elsewhere more uncertain? Inputs of another task, the words of an input in random order,
  sentences in German, molecules as SMILES strings; each with the options of the task.
- draws: does the average over the posterior beat a single prediction at the mean with a temperature, which is chosen
  on training tasks? Of linear predictions, and of those of the network under ten draws.
- risk: does a threshold of risk_control_threshold keep its promise? The answers to a task's queries are a population,
  from which calibration questions are drawn; so the true error rate of what is answered is known.

It needs the cache of benchmarks/unseen.py for the LoRA, and takes half an hour more.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from crossfit import DEVELOPMENT, unseen_names, unseen_tasks
from harness import machine
from lm_baselines import EVERY, QUERY, SUPPORT, TEMPERATURES, Baselines, tempered
from prior import settings, tasks_of
from scipy.stats import spearmanr
from torch import Tensor
from unseen import FromGrams, UnseenTask, entropy, interval, label_counts, supports

import bayes_lora
from bayes_lora.metrics import ood_metrics, risk_control_threshold
from bayes_lora.metrics.ranking import TieGroups
from bayes_lora.recipes.recipes import build_language_model, build_objective
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.tasks import Example, Task
from bayes_lora.utils.storage import read_json, write_json

NUM_INPUTS = 24
DRAWS, DRAWN_QUERIES = 10, 30
CALIBRATION, REPEATS, DELTA, TARGETS = 100, 100, 0.1, (0.1, 0.2, 0.3)
GERMAN = (
    "Der Zug nach Hamburg hatte gestern fast eine Stunde Verspätung.",
    "Ich habe den Film zweimal gesehen und würde ihn jedem empfehlen.",
    "Wer hat die Rechnung für den Umbau der Küche bezahlt?",
    "Nach dem Regen roch es im Garten nach feuchter Erde.",
    "Die Ministerin wies den Vorwurf am Abend entschieden zurück.",
    "Das Essen war kalt, und die Bedienung hat uns lange warten lassen.",
    "Warum frieren Seen von oben nach unten zu?",
    "Meine Schwester studiert seit zwei Jahren Physik in Wien.",
    "Man darf Menschen nicht nach ihrer Herkunft beurteilen.",
    "Der Verein gewann das Spiel erst in der letzten Minute.",
    "Bitte schicken Sie mir die Unterlagen bis Freitag zu.",
    "Ein Löffel aus Metall leitet die Wärme besser als einer aus Holz.",
    "Sie stellte die Leiter an den Baum und pflückte die reifen Kirschen.",
    "Die Aktie verlor an einem einzigen Tag ein Fünftel ihres Wertes.",
    "Kannst du mir sagen, wo die nächste Apotheke ist?",
    "Der Hund bellte so laut, dass die Nachbarn wach wurden.",
    "Im Winter werden die Tage kürzer und die Nächte länger.",
    "Ohne Beweise ist diese Behauptung nichts wert.",
    "Er vergaß den Schlüssel und musste durch das Fenster klettern.",
    "Das neue Telefon ist schneller, aber der Akku hält nicht lange.",
    "Forscher fanden im Eis der Arktis Spuren von Mikroplastik.",
    "Wie lange muss der Teig im Kühlschrank ruhen?",
    "Die Kinder bauten am Strand eine Burg aus nassem Sand.",
    "Leider kann ich morgen nicht zur Besprechung kommen.",
)


def inputs_from_elsewhere(
    name: str, queries: Mapping[str, list[Example]], molecules: Sequence[str]
) -> dict[str, list[Example]]:
    """Return examples of a task whose inputs are replaced, by kind; their answers mean nothing."""
    own, generator = queries[name][:NUM_INPUTS], random.Random(name)
    names = sorted(queries)
    other = queries[names[(names.index(name) + 1) % len(names)]]

    def with_inputs(texts: Sequence[str]) -> list[Example]:
        return [Example(text, row.options, 0) for row, text in zip(own, texts, strict=False)]

    def shuffled(text: str) -> str:
        words = text.split()
        generator.shuffle(words)
        return " ".join(words)

    return {
        "another task": with_inputs([row.input for row in other]),
        "words in random order": with_inputs([shuffled(row.input) for row in own]),
        "German": with_inputs(GERMAN),
        "molecules": with_inputs(molecules),
    }


def smiles(path: Path) -> list[str]:
    """Return the molecules of a table, in random order."""
    with path.open(encoding="utf-8") as file:
        found = [row["smiles"] for row in csv.DictReader(file)]
    random.Random(0).shuffle(found)
    return found


def auroc(uncertainty: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive has more uncertainty than a negative; NaN if there is one kind only."""
    return float(TieGroups(uncertainty.numpy(), positive.numpy()).auroc(np.ones((1, len(positive))))[0])


def errors(tasks: Mapping[str, UnseenTask], methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return AUROC of wrong answers and excess AURC within tasks, by method and uncertainty, and differences."""
    rows: dict[str, dict[str, list[float]]] = {}
    excess: dict[str, dict[str, list[float]]] = {}
    for method, predict in methods.items():
        for name, task in tasks.items():
            query = torch.arange(sum(task.sets), len(task.grams.answer))
            for support in supports(task, 16):
                log_probs, epistemic = predict(task, support, query)
                confidence, chosen = log_probs.exp().max(-1)
                wrong = chosen != task.grams.answer[query]
                kinds = {"confidence": 1.0 - confidence, "entropy": entropy(log_probs)}
                if method == "tangent":
                    kinds["mutual information"] = epistemic
                for kind, value in kinds.items():
                    key, groups = f"{method}: {kind}", TieGroups(value.numpy(), wrong.numpy())
                    once = np.ones((1, len(wrong)))
                    rows.setdefault(key, {}).setdefault(name, []).append(float(groups.auroc(once)[0]))
                    excess.setdefault(key, {}).setdefault(name, []).append(float(groups.excess_aurc(once)[0]))
    # A support set after which all answers are right, or all wrong, is left out of all methods.
    for name in tasks:
        defined = [not any(np.isnan(own[name][i]) for own in rows.values()) for i in range(len(tasks[name].sets))]
        for own in rows.values():
            own[name] = [value for value, keep in zip(own[name], defined, strict=True) if keep]
    for own in rows.values():
        for name in [name for name in own if not own[name]]:
            del own[name]
    return {
        key: {
            "auroc": over_tasks(own),
            "excess aurc": over_tasks(excess[key]),
            "auroc minus that of the tangent's confidence": difference(own, rows["tangent: confidence"]),
        }
        for key, own in rows.items()
    }


def signal(tasks: Mapping[str, UnseenTask], predict: Any) -> dict[str, Any]:
    """Return whether errors are found where the task is learned: by task, what is gained over label counts, and AUROC.

    Also the rank correlation of the two over tasks, with its p-value.
    """
    rows = {}
    for name, task in tasks.items():
        query = torch.arange(sum(task.sets), len(task.grams.answer))
        gold, parts = task.grams.answer[query], []
        for support in supports(task, 16):
            log_probs, _ = predict(task, support, query)
            counts, _ = label_counts(task, support, query)
            gain = (log_probs - counts).gather(-1, gold[:, None]).mean()
            confidence, chosen = log_probs.exp().max(-1)
            parts.append((float(gain), auroc(1.0 - confidence, chosen != gold)))
        gain, found = (fmean(values) for values in zip(*parts, strict=True))
        rows[name] = {"nats gained": gain, "auroc": found}
    defined = [row for row in rows.values() if not np.isnan(row["auroc"])]
    test = spearmanr([row["nats gained"] for row in defined], [row["auroc"] for row in defined])
    return {"tasks": rows, "rank correlation": float(test.statistic), "p-value": float(test.pvalue)}


def over_tasks(rows: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the mean over tasks of the mean over support sets, and its interval."""
    zero = {name: [0.0] * len(own) for name, own in rows.items()}
    return {"mean": fmean(fmean(own) for own in rows.values()), "interval": interval(dict(rows), zero)}  # type: ignore[arg-type]


def difference(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> dict[str, Any]:
    return over_tasks({name: [a - b for a, b in zip(own, other[name], strict=True)] for name, own in one.items()})


def inputs(tasks: Mapping[str, UnseenTask], counts: Mapping[str, Mapping[str, int]], predict: Any) -> dict[str, Any]:
    """Return AUROC of inputs from elsewhere, by kind and uncertainty, and mean uncertainties."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    means: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, task in tasks.items():
        begin = sum(task.sets)
        places = {}
        for kind, count in counts[name].items():
            places[kind] = torch.arange(begin, begin + count)
            begin += count
        for support in supports(task, 16):
            values = {kind: uncertainties(predict(task, support, index)) for kind, index in places.items()}
            for kind, own in values.items():
                for which, value in own.items():
                    means.setdefault(kind, {}).setdefault(which, {}).setdefault(name, []).append(float(value.mean()))
                    if kind == "queries":
                        continue
                    found_in = values["queries"][which]
                    rate = ood_metrics(found_in, value).auroc
                    found.setdefault(kind, {}).setdefault(which, {}).setdefault(name, []).append(float(rate))
    return {
        kind: {
            which: {
                "auroc": over_tasks(own),
                "auroc minus that of the confidence": difference(own, by_kind["confidence"]),
                "mean": over_tasks(means[kind][which]),
                "mean of queries": over_tasks(means["queries"][which]),
            }
            for which, own in by_kind.items()
        }
        for kind, by_kind in found.items()
    }


def uncertainties(predicted: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return uncertainties of queries from their log-probabilities and mutual information, nats and probabilities."""
    log_probs, epistemic = predicted
    return {
        "confidence": 1.0 - log_probs.exp().max(-1).values,
        "entropy": entropy(log_probs),
        "mutual information": epistemic,
    }


def linear_draws(tasks: Mapping[str, UnseenTask], training: Mapping[str, Any], predict: FromGrams) -> dict[str, Any]:
    """Return NLL of the average over linear scores and of their mean, each with the temperature best in training."""

    def nll(grams: Any, support: Tensor, query: Tensor, averaged: bool, temperature: float) -> float:
        log_probs = predict.scores.predict(grams, support, query).log_probs(temperature, averaged=averaged)
        return -float(log_probs.gather(-1, grams.answer[query][:, None]).mean())

    tuned = list(training.values())[::EVERY]
    index = torch.arange(SUPPORT), torch.arange(SUPPORT, SUPPORT + QUERY)
    rows, chosen = {}, {}
    for averaged in (True, False):
        best = min(
            TEMPERATURES,
            key=lambda one: fmean(nll(grams, *index, averaged, one) for grams in tuned),  # noqa: B023
        )
        for temperature in dict.fromkeys([1.0, best]):
            name = ("average" if averaged else "mean") + ("" if temperature == 1.0 else ", temperature")
            chosen[name] = temperature
            rows[name] = {
                task.name: [
                    nll(task.grams, support, torch.arange(sum(task.sets), len(task.rows)), averaged, temperature)
                    for support in supports(task, 16)
                ]
                for task in tasks.values()
            }
    return compared(rows, chosen)


def network_draws(
    lm: Any, tasks: Mapping[str, UnseenTask], training: Mapping[str, Task], folder: Path
) -> dict[str, Any]:
    """Return NLL of the network: under ten draws and at the mean of the weights, with the temperature best in training.

    Of the first support set of each task, and of its first queries.
    """
    posterior = bayes_lora.load_prior(lm)

    def kept(name: str, task: Task) -> dict[str, Tensor]:
        path = folder / f"{name}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            adapted = posterior.adapt(task)
            ask = {"ten draws": DRAWS, "mean": 0}
            found = {how: adapted.predict(task.query, num_draws=n, predictive="draws") for how, n in ask.items()}
            torch.save(found | {"linear": adapted.predict(task.query)}, path)
            print(name, flush=True)
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]

    def nll(log_probs: Tensor, task: Task, temperature: float = 1.0) -> float:
        answer = torch.tensor([row.answer for row in task.query])
        return -float(tempered(log_probs.double(), temperature).gather(-1, answer[:, None]).mean())

    tuning = {
        task.name: Task(task.name, task.examples[:SUPPORT], task.examples[SUPPORT : SUPPORT + QUERY])
        for task in list(training.values())[::EVERY]
    }
    first = {
        task.name: Task(
            task.name,
            tuple(task.rows[: task.sets[0]]),
            tuple(task.rows[sum(task.sets) : sum(task.sets) + DRAWN_QUERIES]),
        )
        for task in tasks.values()
    }
    tuned = {name: kept(f"tuning/{name}", task) for name, task in tuning.items()}
    tested = {name: kept(f"test/{name}", task) for name, task in first.items()}
    rows, chosen = {}, {}
    for how in ("linear", "ten draws", "mean"):
        best = min(
            TEMPERATURES,
            key=lambda one: fmean(nll(tuned[name][how], task, one) for name, task in tuning.items()),  # noqa: B023
        )
        for temperature in dict.fromkeys([1.0, best]):
            name = how if temperature == 1.0 else f"{how}, temperature"
            chosen[name] = temperature
            rows[name] = {task: [nll(found[how], first[task], temperature)] for task, found in tested.items()}
    return compared(rows, chosen)


def compared(rows: Mapping[str, Mapping[str, list[float]]], temperatures: Mapping[str, float]) -> dict[str, Any]:
    """Return NLL by kind of prediction, and the difference to that at the mean with the best temperature."""
    base = [name for name in rows if name.startswith("mean")][-1]
    return {
        name: {
            "nll": over_tasks(own),
            "temperature": temperatures[name],
            f"minus {base}": difference(own, rows[base]),
        }
        for name, own in rows.items()
    }


def risk(tasks: Mapping[str, UnseenTask], predict: Any) -> dict[str, Any]:
    """Return how often promises about errors were broken, and at which coverage."""
    populations: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, task in tasks.items():
        query = torch.arange(sum(task.sets), len(task.grams.answer))
        for support in supports(task, 16):
            confidence, chosen = predict(task, support, query)[0].exp().max(-1)
            populations.setdefault(name, []).append((confidence, chosen == task.grams.answer[query]))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for target in TARGETS:
        for delta in (None, DELTA):
            own: dict[str, dict[str, list[float]]] = {}
            for name, sets in populations.items():
                for confidence, correct in sets:
                    drawn = []
                    for _ in range(REPEATS):
                        index = torch.randint(len(correct), (CALIBRATION,), generator=generator)
                        control = risk_control_threshold(confidence[index], correct[index], target, delta)
                        drawn.append(_of_threshold(confidence, correct, control.threshold, target, delta))
                    others = [pair for other, pairs in populations.items() if other != name for pair in pairs[:1]]
                    joined = [torch.cat(parts) for parts in zip(*others, strict=True)]
                    control = risk_control_threshold(joined[0], joined[1], target, delta)
                    elsewhere = _of_threshold(confidence, correct, control.threshold, target, delta)
                    for what, value in {
                        "broken": fmean(one["broken"] for one in drawn),
                        "bounded": fmean(one["bounded"] for one in drawn),
                        "coverage": fmean(one["coverage"] for one in drawn),
                        "of other tasks: broken": elsewhere["broken"],
                        "of other tasks: bounded": elsewhere["bounded"],
                        "of other tasks: coverage": elsewhere["coverage"],
                    }.items():
                        own.setdefault(what, {}).setdefault(name, []).append(value)
            key = f"target {target:g}" + ("" if delta is None else f", delta {delta:g}")
            found[key] = {what: over_tasks(by_task) for what, by_task in own.items()}
    return found


def _of_threshold(
    confidence: Tensor, correct: Tensor, threshold: float, target: float, delta: float | None
) -> dict[str, float]:
    answered = confidence > threshold
    wrong = float((answered & ~correct).double().mean())
    coverage = float(answered.double().mean())
    bounded = wrong if delta is None else wrong / coverage if coverage else 0.0
    return {"coverage": coverage, "bounded": bounded, "broken": float(bounded > target)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, help="folder of CrossFit's tasks, with splits.json")
    parser.add_argument("--molecules", type=Path, help="a table with a column smiles")
    parser.add_argument("--cache", type=Path, help="folder for derivatives, hidden states, predictions")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "uncertainty.json")
    chosen = parser.parse_args(arguments)
    if chosen.tasks is None or chosen.cache is None or chosen.molecules is None:
        show(read_json(chosen.output))
        return
    config = settings(chosen.cache)
    lm = build_language_model(config.language_model)
    start = build_objective(lm, settings())
    origin, training, molecules = start.guide.theta_mean(), tasks_of(chosen.tasks), smiles(chosen.molecules)
    parts = {name: rest for name, *rest in unseen_tasks(chosen.tasks, unseen_names(chosen.tasks))}
    parts = {name: rest for name, rest in parts.items() if name not in DEVELOPMENT}
    queries = {name: rest[1] for name, rest in parts.items()}
    tasks, widened, counts = {}, {}, {}
    for name, (sets, asked) in parts.items():
        support = [row for one in sets for row in one]
        elsewhere = {"queries": asked[:NUM_INPUTS], **inputs_from_elsewhere(name, queries, molecules)}
        counts[name] = {kind: len(rows) for kind, rows in elsewhere.items()}
        for target, rows in ((tasks, support + asked), (widened, support + sum(elsewhere.values(), []))):
            grams = grams_of_tasks(lm, start.model, origin, {name: Task(name, tuple(rows))})[name]
            fixed = len({row.options for row in rows}) == 1
            target[name] = UnseenTask(name, rows, grams, [len(one) for one in sets], fixed)
        print(name, flush=True)
    tangent = FromGrams(lm)
    baselines = Baselines(lm, chosen.cache / "predictions", training)
    found = baselines.methods()
    results = {
        "machine": machine(torch.device("cpu")),
        "LoRA": baselines.settings["LoRA"],
        "errors": errors(tasks, {"tangent": tangent, "LoRA, temperature": found["LoRA"], "LoRA": baselines.lora(1.0)}),
        "errors by task": signal(tasks, tangent),
        "inputs": inputs(widened, counts, tangent),
        "linear predictions": linear_draws(tasks, grams_of_tasks(lm, start.model, origin, training), tangent),
        "risk": risk(tasks, tangent),
    }
    write_json(chosen.output, results)
    results["network"] = network_draws(lm, tasks, training, chosen.cache / "predictions" / "network")
    write_json(chosen.output, results)
    show(results)


def show(results: Mapping[str, Any]) -> None:
    """Print means with their intervals."""

    def lines(found: Mapping[str, Any], indent: str = "") -> None:
        for name, value in found.items():
            if isinstance(value, dict) and "interval" in value:
                low, high = value["interval"]
                print(f"{indent}{name}: {value['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")
            elif isinstance(value, dict):
                print(f"{indent}{name}")
                lines(value, indent + "  ")
            else:
                print(f"{indent}{name}: {value}")

    lines(results)


if __name__ == "__main__":
    main()
