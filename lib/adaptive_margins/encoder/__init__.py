"""Encoders: opened and checked, tokenised, embedded; what makes them fast on a CPU stands apart."""
