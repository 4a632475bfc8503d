"""What each stage does, one module a stage, run as `python -m pipelines.NAME`."""
