"""What each stage does, one module a stage, run as `python -m pipelines.NAME`."""

import os

# Read by libraries when they are imported: no phoning home, no chatter, no windows.
for _name, _value in {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GIT_PYTHON_REFRESH": "quiet",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)
