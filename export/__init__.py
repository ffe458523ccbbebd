"""The heavy side of bge-onnx: turns a Hugging Face checkpoint into a verified ONNX artifact, once."""
