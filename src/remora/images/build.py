"""Builds a function's image from its directory: a base, its requirements, its files, each a layer of its own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from remora.errors import InvalidArgumentError
from remora.images.base import SOURCE_DATE_EPOCH, add_tar, debian_base, image_digest
from remora.images.importer import topmost
from remora.images.model import Image, ImageConfig, machine_architecture
from remora.images.progress import Progress, silent
from remora.images.recipe import FILE_NAME, Recipe, load_recipe
from remora.images.requirements import image_python, install_requirements
from remora.images.store import Adding, ImageStore
from remora.images.tree_tar import LowerLayers, write_tree_tar


def build_image(
    store: ImageStore, directory: Path, *, name: str | None = None, refresh: bool = False, progress: Progress = silent
) -> Image:
    """Build the image that `directory/remora.toml` describes (docs/images.md), and return it.

    Args:
        store: where it goes; the base is kept there too and shared.
        directory: the function's directory.
        name: instead of the one in the recipe.
        refresh: make the base anew from today's packages.
        progress: told each step.

    Raises:
        RemoraError: what is wrong with the recipe, the packages, the requirements or the disk; nothing was added then.
    """
    recipe = load_recipe(directory)
    with ExitStack() as stack:
        base = _base(store, recipe, refresh, progress)
        if base is not None:
            stack.enter_context(store.hold(base))
        adding = stack.enter_context(store.adding())
        layers = list(base.diff_ids) if base is not None else []
        lower = stack.enter_context(LowerLayers(base.layers if base is not None else ()))
        for digest in (
            _requirements_layer(adding, recipe, lower, progress),
            _files_layer(adding, recipe, lower, progress),
        ):
            if digest is not None:
                layers.append(digest)
        if not layers:
            raise InvalidArgumentError(f"{directory / FILE_NAME} gives an empty image", fix="add a base or [files]")
        config = _over(recipe.config, base.config if base is not None else ImageConfig())
        final = topmost(layers)
        return adding.commit(
            name or recipe.name, image_digest(config, final), final, config, machine_architecture(), ""
        )


def _base(store: ImageStore, recipe: Recipe, refresh: bool, progress: Progress) -> Image | None:
    if recipe.base == "scratch":
        return None
    if recipe.suite is None:
        return store.get(recipe.base)
    return debian_base(store, recipe.suite, recipe.variant, recipe.packages, refresh=refresh, progress=progress)


def _requirements_layer(adding: Adding, recipe: Recipe, lower: LowerLayers, progress: Progress) -> str | None:
    if recipe.requirements is None:
        return None
    requirements = recipe.directory / recipe.requirements
    if not requirements.is_file():
        raise InvalidArgumentError(f"{recipe.directory / FILE_NAME}: [python] requirements: there is no {requirements}")
    progress("installing Python requirements", 0, 0)
    version, packages = image_python(lower)
    scratch = adding.scratch_dir()
    install_requirements(requirements, version, scratch / "packages")
    tar = scratch / "layer.tar"
    # Bytecode belongs to the layer, so this tree is walked whole.
    write_tree_tar(tar, {recipe.target or packages: scratch / "packages"}, lower, SOURCE_DATE_EPOCH, keep_caches=True)
    return add_tar(adding.layer, tar)


def _files_layer(adding: Adding, recipe: Recipe, lower: LowerLayers, progress: Progress) -> str | None:
    if not recipe.files:
        return None
    progress("packing files", 0, 0)
    tar = adding.scratch_dir() / "layer.tar"
    files = {destination: recipe.directory / source for destination, source in recipe.files.items()}
    write_tree_tar(tar, files, lower, SOURCE_DATE_EPOCH)
    return add_tar(adding.layer, tar)


def _over(own: ImageConfig, base: ImageConfig) -> ImageConfig:
    """The recipe's settings over those of the base; an entry point of its own drops the base's command."""
    return replace(
        own,
        entrypoint=own.entrypoint or base.entrypoint,
        cmd=own.cmd or (() if own.entrypoint else base.cmd),
        env={**base.env, **own.env},
        cwd=own.cwd if own.cwd != "/" else base.cwd,
        user=own.user or base.user,
        labels={**base.labels, **own.labels},
        exposed_ports=tuple(dict.fromkeys((*base.exposed_ports, *own.exposed_ports))),
        stop_signal=own.stop_signal if own.stop_signal != "SIGTERM" else base.stop_signal,
    )
