"""Load a model through vAccel's PyTorch operations and run it: `python torch_run.py model.onnx`.

The model's format chooses the backend, so an ONNX file works here. This one takes a float32 of shape 1x1x1x1.
"""

import sys

from remora.vaccel import Resource, ResourceType, Session
from remora.vaccel.ops.torch import Tensor, TensorType


def main(path: str) -> None:
    session = Session()
    model = Resource(path, ResourceType.MODEL)
    model.register(session)
    session.torch_model_load(model)
    (answer,) = session.torch_model_run(model, [Tensor([1, 1, 1, 1], TensorType.FLOAT, [2.5])])
    print("dims", answer.dims, "data", answer.data)
    model.unregister(session)


if __name__ == "__main__":
    main(sys.argv[1])
