"""Operations by service, each with its `Tensor` and `TensorType`."""
