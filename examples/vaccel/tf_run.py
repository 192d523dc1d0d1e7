"""Run a model through vAccel's TensorFlow and TensorFlow Lite operations: `python tf_run.py model.onnx`."""

import sys

from remora.vaccel import Resource, ResourceType, Session
from remora.vaccel.ops import tf
from remora.vaccel.ops.tf import lite


def main(path: str) -> None:
    session = Session()
    model = Resource(path, ResourceType.MODEL)
    model.register(session)

    status = session.tf_model_load(model)
    tensor = tf.Tensor([1, 1, 1, 1], tf.TensorType.FLOAT, [1.5])
    outputs, status = session.tf_model_run(model, [tf.Node("input", 0)], [tensor], [tf.Node("output", 0)])
    print("tf", outputs[0].data, "status", status.code)
    session.tf_model_unload(model)

    session.tflite_model_load(model)
    small = lite.Tensor([1, 1, 1, 1], lite.TensorType.FLOAT32, [3.5])
    results, code = session.tflite_model_run(model, [small])
    print("tflite", results[0].data, "status", code)
    session.tflite_model_unload(model)


if __name__ == "__main__":
    main(sys.argv[1])
