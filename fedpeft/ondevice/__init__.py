"""Training in stock onnxruntime, from a kit: no torch anywhere."""
