"""What `kompakt list` shows: recipes that ship, and the methods of every slot with their options."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from typing import Any

from ..compress.recipe import METHODS, SLOTS, Recipe, recipe_names


def catalogue() -> dict[str, Any]:
    """``{"recipes": […], "methods": {slot: […]}}``, JSON-able."""
    recipes = [Recipe.load(name) for name in recipe_names()]
    methods = {slot: [] for slot in SLOTS}
    for slot, key, kind in ((slot, key, kind) for slot, find in METHODS.items() for key, kind in find().items()):
        about = inspect.getdoc(sys.modules[kind.__module__]) or ""
        methods[slot].append(
            {
                "method": key,
                "description": about.split("\n")[0],
                "options": {field.name: _plain(field.default) for field in fields(kind)},
            }
        )
    return {
        "recipes": [{"name": recipe.name, "description": recipe.description} for recipe in recipes],
        "methods": methods,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
