"""The experiments of the paper: inputs, runs, plan, and what figures and tables show."""
