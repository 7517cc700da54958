"""Report of a fine-tuning → model card: README.md as the Hugging Face hub reads it.

Every number of a card is one of the report. What the report does not contain, such as the licence
of the data, is named as unknown. The text is in
``book/templates/model_card.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from adaptive_margins.book.render import plain, render
from adaptive_margins.losses import MarginLoss

_SHIPPED = {"minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")}
_SYSTEMS = {
    "start": "the encoder it started from",
    "trained": "this model",
    "bm25": "BM25",
    "hybrid": "this model fused with BM25",
}
_FOLDED = {
    "trained": "models trained like this one, each on other queries than it ranks",
    "hybrid": "these models fused with BM25",
}
_TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "dense"]
_TARGETS = {
    "adaptive": ("(1 + φ(d⁺_i, d⁻_i)) / 2", "Equations 2 and 4"),
    "distributed": ("(1 + φ(d⁺_i, d⁻_j)) / 2", "Equations 3 and 5"),
    "softmax": ("", ""),
}


def model_card(report: Mapping[str, Any]) -> str:
    """Return README.md of a fine-tuned encoder: a YAML header with its test measures, and Markdown.

    Args:
        report: what `finetune` returns, and writes as training.json.

    Raises:
        jinja2.UndefinedError, KeyError: the report lacks an entry.
    """
    name, encoder = report["collection"]["name"], report["encoder"]["name"]
    base, licence = _base(encoder)
    start = base or Path(encoder).name  # without the folders above it
    unchanged = report["kept"] == "start"
    what = "kept as it was for" if unchanged else "fine-tuned on"
    title = f"{start.split('/')[-1]} {what} {name}"
    target, equations = _TARGETS.get(str(report["target"]), (report["target"], "Equations 1 and 4"))
    hidden = ("guarded", "left_out")  # the template states them in sentences
    return render(
        "model_card.md",
        report=report,
        header=_header(report, title, base, licence).to_yaml(),
        title=title,
        unchanged=unchanged,
        base=base,
        licence=licence,
        start=start,
        link=f"[{base}](https://huggingface.co/{base})" if base else plain(start),
        systems={**_SYSTEMS, **(_FOLDED if "folds" in report else {})},
        target=target,
        equations=equations,
        triples=[(k, v) for k, v in report["triples"].items() if k not in hidden],
        citation=_loss(report)(None).citation,
    )


def _header(
    report: Mapping[str, Any], title: str, base: str | None, licence: str | None
) -> ModelCardData:
    results = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type="unknown",
            dataset_name=report["collection"]["name"],
            dataset_split="cross-validation" if "folds" in report else "test",
            metric_type=measure,
            metric_name=measure,
            metric_value=value,
        )
        for measure, value in report["measures"][report["kept"]].items()
    ]
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=_TAGS if report["kept"] == "start" else [*_TAGS, f"loss:{_loss(report).__name__}"],
        base_model=base,
        license=licence or "other",
        license_name=None if licence else "unknown",
        license_link=f"https://huggingface.co/{base}" if base and not licence else None,
        model_name=title,
        eval_results=results,
    )


def _loss(report: Mapping[str, Any]) -> Any:
    return MultipleNegativesRankingLoss if report["target"] == "softmax" else MarginLoss


def _base(name: str) -> tuple[str | None, str | None]:
    """Hub id and licence of an encoder of `open_encoder`, as far as its name contains them."""
    if name in _SHIPPED:
        return _SHIPPED[name]
    hub_id, at, _ = name.partition("@")
    return (hub_id if at else None), None
