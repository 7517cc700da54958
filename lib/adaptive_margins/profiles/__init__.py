"""Profiles: one YAML file each; `config` reads and checks them."""
