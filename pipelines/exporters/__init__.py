"""One module per target runtime, each with the same `export(model_path, out, calibration)`."""
