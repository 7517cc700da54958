"""Figures, tables and the build of the book."""
