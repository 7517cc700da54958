"""Collections (passages, queries, qrels) and the triples that encoders are trained on."""
