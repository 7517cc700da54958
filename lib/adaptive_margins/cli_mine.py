"""The command for hard negatives: mine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from adaptive_margins.cli_corpus import (
    MOST_SEED,
    Device,
    Json,
    Miner,
    Model,
    Source,
    Verbose,
    command,
)
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.terminal import encoder_options, expanded, old_path, show, working

commands = typer.Typer()
_EXAMPLES = """\
mine my_corpus --output my_corpus/triples.tsv
mine my_corpus --output tuples.parquet --negatives 5
mine pydocs --output mined --cross-encoder my_reranker
"""


@command(commands, _EXAMPLES)
@encoder_options
def mine(
    path: Source,
    output: Annotated[
        Path,
        Option(
            parser=old_path,
            help="NAME.tsv: ids, as triples.tsv; NAME.jsonl, NAME.parquet: texts and ids; a new"
            " folder: the collection with the triples.",
        ),
    ],
    options: EncoderOptions,
    retriever: Annotated[Miner, Option(help="Ranks the candidates.")] = "bm25",
    model: Model = "minilm",
    negatives: Annotated[int, Option(min=1, help="Negatives of each positive.")] = 1,
    depth: Annotated[int, Option(min=1, help="Candidates per query.")] = 100,
    cross_encoder: Annotated[
        str | None,
        Option(parser=expanded, help="Scores for the filter: a folder, or ORG/NAME@REVISION."),
    ] = None,
    seed: Annotated[int, Option(min=0, max=MOST_SEED, help="Seeds split and negatives.")] = 1,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Mine hard negatives, for `train` or another trainer.

    Candidates that are probably relevant are dropped, as by `train`. The output
    has triples, or with several --negatives n-tuples; NAME.scores.tsv next to it
    has ranks and scores.
    """
    with working(verbose, f"{model} {cross_encoder or ''}"):
        from adaptive_margins.corpus.mine import mine_negatives
        from adaptive_margins.text_tables import aligned

        asked = retriever, model, negatives, depth, cross_encoder, seed, device, options
        found = mine_negatives(path, output, *asked)
    counts = {**found["filtered"], "too_few": found["too_few"], "rows": found["rows"]}
    rows = aligned([[name.replace("_", " "), f"{count:,}"] for name, count in counts.items()])
    last = f"{found['output']}; ranks and scores of negatives: {found['scores']}"
    parts = [found["split"], "\n".join(rows), last]
    show(found, as_json, "\n\n".join(part for part in parts if part))
