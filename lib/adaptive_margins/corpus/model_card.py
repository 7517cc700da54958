"""The report of a fine-tuning → a model card: README.md, as the Hugging Face hub reads it.

Every number in a card is one of the report. What the report does not say (whom the data belongs to, what the encoder does on
other texts) the card says that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adaptive_margins.losses import MarginLoss

_SHIPPED = {"minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")}
_ROWS = {
    "start": "the encoder it started from",
    "trained": "this model",
    "bm25": "BM25",
    "hybrid": "this model fused with BM25",
}
_LICENCES = {"apache-2.0": "the Apache License 2.0"}
_PAPER = (
    "Gienapp et al. 2025, [doi:10.1145/3731120.3744594](https://doi.org/10.1145/3731120.3744594)"
)


def model_card(report: Mapping[str, Any]) -> str:
    """README.md of a fine-tuned encoder: a YAML header with its test measures, and a page of Markdown.

    Args:
        report: what `finetune.finetune` returns, and writes as training.json.

    Raises:
        KeyError: the report lacks an entry.
    """
    data, encoder = report["collection"], report["encoder"]
    base, licence = _base(encoder["name"])
    unchanged = report["kept"] == "start"
    start = base or Path(encoder["name"]).name  # of a folder not where it lies
    title = f"{start.split('/')[-1]} {'kept as it was for' if unchanged else 'fine-tuned on'} {data['name']}"
    header = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[
            *("sentence-transformers", "sentence-similarity", "feature-extraction", "dense"),
            *([] if unchanged else ["loss:MarginLoss"]),
        ],
        base_model=base,
        license=licence or "other",
        license_name=None if licence else "unknown",
        license_link=f"https://huggingface.co/{base}" if base and not licence else None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type="unknown",
                dataset_name=data["name"],
                dataset_split="test",
                metric_type=measure,
                metric_name=measure,
                metric_value=value,
            )
            for measure, value in report["measures"]["trained"].items()
        ],
    )
    parts = {
        title: _about(report, f"[{base}](https://huggingface.co/{base})" if base else start),
        "Use": _USE.format(**report["settings"]),
        "Evaluation": _evaluation(report),
        "Data": _data(data),
        "Loss": _loss(report["target"]),
        "Training": _training(report),
        "Limits": _limits(report),
        "Licence": _licence(start, base, licence),
        "Versions": _table(("", "version"), report["versions"].items()),
        "Citation": f"```bibtex{MarginLoss(None).citation}```",
    }
    sections = [
        f"{'#' if heading == title else '##'} {heading}\n\n{text}\n"
        for heading, text in parts.items()
    ]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(sections)


def _base(name: str) -> tuple[str | None, str | None]:
    """Hub id and licence of an encoder of `encoder.load.open_encoder`, as far as they are known from its name."""
    if name in _SHIPPED:
        return _SHIPPED[name]
    hub_id, at, _ = name.partition("@")
    return (hub_id if at else None), None


def _about(report: Mapping[str, Any], start: str) -> str:
    encoder = report["encoder"]
    if report["kept"] == "start":
        what = (
            f"The weights are those of {start}, unchanged. It was trained on {report['collection']['name']}, but the trained "
            "encoder was not better on the validation queries, so the original was kept."
        )
    else:
        what = f"It is {start}, fine-tuned on {report['collection']['name']} with a margin loss: without a teacher model."
    return (
        "An encoder for dense retrieval: the cosine similarity of a query's vector and a passage's says how relevant the "
        f"passage is. {what} It has {encoder['parameters']:,} parameters; the weights it started from are "
        f"`{encoder['identity']}`.\n\n**{report['verdict']}**"
    )


_USE = """\
```python
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["a question"])
passages = model.encode_document(["a passage", "another passage"])
print(cos_sim(queries, passages))
```

It was measured with queries of at most {query_length} and passages of at most {passage_length} tokens; the rest of a text was
cut off."""


def _evaluation(report: Mapping[str, Any]) -> str:
    measures, data = report["measures"], report["collection"]
    validation = report["validation"]
    checked = ", ".join(
        f"{measure} {validation['start'][measure]:.3f} at the start, {value:.3f} at the best check"
        for measure, value in validation["best"].items()
    )
    means = _table(
        ("test queries", *measures["start"]),
        ((_ROWS[name], *(f"{x:.3f}" for x in measures[name].values())) for name in measures),
    )
    compared = _table(
        ("", "measure", "queries", "difference", "95 % interval", "p (t test)", "p (TOST)", ""),
        (_compared(pair, found) for pair, found in report["comparisons"].items()),
    )
    return f"""\
Each system ranks all {data["passages"]:,} passages of {data["name"]} for each test query, to a depth of \
{report["settings"]["depth"]}. Passages that nobody judged count as not relevant.

{means}

{compared}

Two runs differ (better, worse) if a paired t test over the queries says so at .05; else they are equivalent if two one-sided \
tests say at .05 that the difference is smaller than the margin; else it is undecided. The p-values are not corrected for the \
number of comparisons.

On validation, which decided what was kept: {checked}."""


def _compared(pair: str, found: Mapping[str, Any]) -> tuple[Any, ...]:
    a, b = (_ROWS[name] for name in pair.split(" vs "))
    difference = f"{found['difference']:+.3f}"
    if found["ci"] is None:  # too few queries for a test
        return (f"{a} − {b}", found["measure"], found["n"], difference, *"–––", found["verdict"])
    low, high = found["ci"]
    return (
        f"{a} − {b}", found["measure"], found["n"], difference, f"[{low:+.3f}, {high:+.3f}]", f"{found['p_t']:.2g}",
        f"{found['p_tost']:.2g}, margin {found['margin']:g}", found["verdict"],
    )  # fmt: skip


def _data(data: Mapping[str, Any]) -> str:
    sizes = [
        ("passages", f"{data['passages']:,}"),
        *((f"{name} queries", f"{count:,}") for name, count in data["sets"].items()),
        ("fingerprint", f"`{data['fingerprint']}`"),
    ]
    text = f"{data['name']}\n\n{_table(('', ''), sizes)}"
    if data["split"]:
        text += f"\n\n{data['split']}"
    if data["pseudo"]:
        text += (
            "\n\nThe collection had no queries. All of them, the test queries included, are pseudo-queries made from its "
            f"passages: {_words(data['pseudo'])}."
        )
    return text


def _loss(target: float | str) -> str:
    margin = "l = φ(q_i, d⁺_i) − φ(q_i, d⁻_i) − "
    formula, equations = {
        "adaptive": (f"{margin}(1 + φ(d⁺_i, d⁻_i)) / 2", "Equations 2 and 4"),
        "distributed": (f"{margin}(1 + φ(d⁺_i, d⁻_j)) / 2", "Equations 3 and 5"),
    }.get(str(target), (f"{margin}{target}", "Equations 1 and 4"))
    over = "all pairs i, j of a batch" if target == "distributed" else "the triples i of a batch"
    kind = target if isinstance(target, str) else f"static ({target})"
    return (
        f"Margin loss with {kind} targets: the mean of l² over {over}, for triples of a query q, a positive passage d⁺ and a "
        f"negative passage d⁻, φ being the cosine similarity ({equations} of {_PAPER}):\n\n    {formula}"
    )


def _training(report: Mapping[str, Any]) -> str:
    triples = {k: v for k, v in report["triples"].items() if k not in ("guarded", "left_out")}
    text = (
        f"{_table(('triples', ''), triples.items())}\n\n"
        f"{_table(('setting', ''), [('seed', report['seed']), *report['settings'].items()])}\n\n"
        f"Training ended at step {report['stop_step']}; the best check was at step {report['best_step']}. Seconds it took: "
        f"{_words(report['seconds'])}."
    )
    if left_out := report["triples"].get("left_out"):
        text += (
            "\n\nTriples that contradict the judgements or teach nothing were left out"
            f" (`adaptive_margins.data.mining.Checked` explains the counts): {_words(left_out)}."
        )
    if guarded := report["triples"]["guarded"]:
        text += (
            "\n\nCandidates for negatives that may be relevant were left out (`adaptive_margins.data.mining.Guarded` explains "
            f"the counts): {_words(guarded)}."
        )
    return text


def _limits(report: Mapping[str, Any]) -> str:
    limits = [
        f"Measured on one collection ({report['collection']['name']}) and one split of it, and trained with one seed. How it "
        "does on other texts, topics or languages is not known.",
        "What is wrong or one-sided in the data, or in the encoder it started from, is likely to be in this one.",
        "A text longer than the model reads is cut: what stands after the cut is not found.",
    ]
    if report["encoder"]["name"] == "minilm":
        limits.append(
            "The encoder it started from was already trained contrastively by its makers, on pairs of sentences from many "
            "sources, MS MARCO among them: little here says what the loss does with an encoder that was not."
        )
    if report["collection"]["pseudo"]:
        limits.append("Test queries made from the passages say less than queries that people ask.")
    return "\n".join(f"- {limit}" for limit in limits)


def _licence(start: str, base: str | None, licence: str | None) -> str:
    if licence:
        weights = (
            f"The weights it started from ({base}) are under {_LICENCES[licence]}, which allows to change them and to pass "
            "them on, under its conditions."
        )
    else:
        where = f": see https://huggingface.co/{base}" if base else ""
        weights = f"The licence of the weights it started from ({start}) is not known here{where}."
    return (
        f"{weights} The licence of the data is not known here either: whoever passes the model on must find out what it "
        "allows."
    )


def _words(values: Mapping[str, Any]) -> str:
    """Names and values in a row; a mapping among them is taken apart."""
    return ", ".join(
        _words(value) if isinstance(value, Mapping) else f"{name.replace('_', ' ')} {value}"
        for name, value in values.items()
    )


def _table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
