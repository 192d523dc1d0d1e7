"""The operator's trusted models: manifests, and the recipes that build models from packages."""

from remora.catalog.entries import CatalogEntry, load_catalog, models_dir

__all__ = ["CatalogEntry", "load_catalog", "models_dir"]
