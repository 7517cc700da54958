"""Fine-tuning on a custom corpus: the workflow, its model card, and its notebook."""
