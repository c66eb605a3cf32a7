"""Recipes that ship with kompakt, one YAML file each."""
