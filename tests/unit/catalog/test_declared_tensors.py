"""What a manifest declares of inputs and outputs is checked, shown before loading, and binding."""

from __future__ import annotations

import pytest

from remora.catalog.build import recipe, recipe_names
from remora.catalog.local import LocalModel
from remora.catalog.manifest import parse_manifest
from remora.errors import InvalidArgumentError, NotFoundError
from remora.workers.contract import TensorSpec

HEAD = b'name = "mine"\ntask = "tensor"\n'


def test_inputs_and_outputs_are_read() -> None:
    text = HEAD + b'[[inputs]]\nname = "x"\ndtype = "int8"\nshape = [-1, 2]\n'
    assert parse_manifest(text, "mine.toml").inputs == (TensorSpec("x", "int8", (-1, 2)),)


@pytest.mark.parametrize(
    "text",
    [
        b'inputs = "x"\n',
        b'[[inputs]]\nname = "x"\ndtype = "float31"\nshape = [1]\n',
        b'[[inputs]]\nname = "x"\ndtype = "float32"\nshape = [-2]\n',
        b'[[inputs]]\nname = "x"\ndtype = "float32"\nshape = [true]\n',
        b'[[outputs]]\nname = "x"\ndtype = "float32"\n',
        b'[[outputs]]\nname = "x"\ndtype = "float32"\nshape = [1]\nunit = "m"\n',
    ],
)
def test_a_wrong_declaration_is_named_with_an_example(text: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"mine\.toml: (in|out)puts") as caught:
        parse_manifest(HEAD + text, "mine.toml")
    assert "shape = [" in str(caught.value.fix)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_declares_what_its_model_turns_out_to_be(name: str) -> None:
    manifest, _text = recipe(name)
    try:
        model = LocalModel.from_catalog(name).model
    except NotFoundError as error:
        pytest.skip(str(error))
    for declared, real in ((manifest.inputs, model.inputs), (manifest.outputs, model.outputs)):
        assert [(spec.name, spec.dtype, spec.shape) for spec in declared] == [
            (spec.name, spec.dtype, spec.shape) for spec in real
        ]
