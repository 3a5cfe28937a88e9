"""A trained model in another form: an ONNX file, int8. Each form is a card of its own."""
