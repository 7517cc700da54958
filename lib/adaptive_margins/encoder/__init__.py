"""Encoders: opening and checks, tokens, embeddings, and fast training on a CPU."""
