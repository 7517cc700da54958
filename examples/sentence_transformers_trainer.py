"""The margin loss in the trainer of Sentence Transformers: two data sets, two losses, an evaluator.

Takes seconds on a CPU.

    python examples/sentence_transformers_trainer.py OUTPUT [ENCODER]

ENCODER is a Sentence Transformers folder; without it, the small encoder packaged with this project
is used. Eight triples teach it nothing: replace them by yours.
"""

from __future__ import annotations

import sys

from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.losses import CachedMarginLoss, MarginLoss

COLUMNS = ("anchor", "positive", "negative")  # the order counts, the names do not
ANIMALS = [
    ("how long do cats sleep", "Cats sleep for most of the day.", "A litter has four kittens."),
    ("what do owls eat", "Owls hunt mice and other small animals.", "Owls turn their heads far."),
    ("where do penguins live", "Penguins live on southern coasts.", "Penguins cannot fly."),
    ("why do bees dance", "By a dance bees tell where flowers are.", "A hive has one queen."),
]
PYTHON = [
    ("sort a list in place", "list.sort orders the list itself.", "sorted returns a new list."),
    ("merge two dicts", "d | e has the keys of both.", "d.keys() is a view of the keys."),
    ("read a file line by line", "A file object yields its lines.", "os.remove deletes a file."),
    ("round a number down", "math.floor gives the integer below.", "round goes to the nearest."),
]
QUESTIONS = {"food of owls": ANIMALS[1][1], "line after line of a text file": PYTHON[2][1]}


def main(output: str, encoder: str = "minilm") -> tuple[SentenceTransformer, dict[str, float]]:
    """Train, save the encoder to OUTPUT, and return it with the evaluator's measures."""
    model = open_encoder(encoder)  # any SentenceTransformer will do
    data = DatasetDict(
        {
            name: Dataset.from_dict(dict(zip(COLUMNS, zip(*triples, strict=True), strict=True)))
            for name, triples in (("animals", ANIMALS), ("python", PYTHON))
        }
    )
    corpus = dict(enumerate(text for _, *pair in ANIMALS + PYTHON for text in pair))
    evaluator = InformationRetrievalEvaluator(
        queries=dict(enumerate(QUESTIONS)),
        corpus=corpus,
        relevant_docs={
            number: {docid for docid, text in corpus.items() if text == answer}
            for number, answer in enumerate(QUESTIONS.values())
        },
        write_csv=False,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=f"{output}/trainer",
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=2e-5,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=1,
            report_to="none",  # or "tensorboard", "wandb", "mlflow", "trackio"
            use_cpu=True,
        ),
        train_dataset=data,
        loss={  # cached: for batches that are too large for the memory
            "animals": MarginLoss(model, target="distributed"),
            "python": CachedMarginLoss(model, target="adaptive", in_batch=True, mini_batch_size=2),
        },
        evaluator=evaluator,
    )
    trainer.train()
    model.save_pretrained(output)
    return model, evaluator(model)


if __name__ == "__main__":
    for measure, value in main(*sys.argv[1:])[1].items():
        print(f"{measure}: {value:.3f}")
