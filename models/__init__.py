"""Pure Keras 3: architectures, losses, metrics and landmark schemes.

Nothing in this package knows of TensorFlow, DVC, MLflow or Prefect, so it runs under any Keras
backend.
"""
